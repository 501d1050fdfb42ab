//! The only crate that talks to the Linux kernel: every table is read, compared with what is desired, and changed.
//!
//! Reading order: [`netlink`] is the wire and [`netns`] says in which namespace; each kernel table has a module of its own
//! with `diff` and what it takes to read and apply; [`kernel`] joins the tables, [`linux`] is the real kernel and [`fake`]
//! the one for tests, and [`reconcile`] is the pass that makes either as desired. [`underlay`] finds facts, [`events`]
//! wakes, [`pod`] wires pods; [`nflog`] hears of packets that rules tell of; [`probe`] sends packets of exactly some size, [`echo`] pings;
//! [`conntrack`] ends connections that a change of port mappings leaves behind; [`connections`] hears of all that begin and
//! end; [`way`] asks what becomes of a packet; [`capture`] sees packets as they pass.

pub mod addresses;
pub mod capture;
pub mod connections;
pub mod conntrack;
pub mod echo;
pub mod error;
pub mod events;
pub mod fake;
pub mod fdb;
pub mod features;
mod interfaces;
pub mod kernel;
pub mod link_counters;
pub mod links;
pub mod linux;
pub mod napi;
pub mod neighbours;
mod netfilter;
pub mod netlink;
pub mod netns;
pub mod nflog;
pub mod nft;
pub mod offload;
pub mod pod;
pub mod policy;
pub mod probe;
pub mod reconcile;
pub mod routes;
mod step;
pub mod sweep;
pub mod sysctl;
mod sysfs;
pub mod underlay;
pub mod way;
pub mod wireguard;
pub mod xfrm;

pub use error::Error;
pub use sweep::Sweep;
