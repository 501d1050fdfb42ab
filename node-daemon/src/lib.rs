//! The node daemon `huskd` and the troubleshooting command `huskctl`.
//!
//! Reading order: [`daemon`] puts the parts together; [`engine`] is the reconcile loop; [`source`] where the cluster's state
//! comes from, [`kubernetes`] one such place; [`follow`] a configuration that changes; [`host`] what a node says about itself,
//! [`keys`] its keys; [`companion`] processes that outlive the daemon ([`tunnels`]: and its container): [`wireguard_userspace`]
//! the device for kernels without WireGuard, [`udp_encapsulation`] the socket for ESP in UDP; [`flows`] what policy denied, and connections that
//! begin and end;
//! [`probing`] what the paths to peers really carry, [`offload`] whether the VXLAN device may leave work to others; [`boot`]
//! what a reboot ends; [`cleanup`] the way out.
//!
//! What tells people: [`server`] and [`report`] are the daemon's socket, [`huskctl`] its client, [`manual`] its pages;
//! [`trace`] what becomes of a packet; [`doctor`] what is looked at beyond the daemon, `firewall` rules of others, [`leases`] those of
//! pods that are gone; [`metrics`] what is counted, [`http`] what serves that, [`ui`] its page; [`line_log`] logs of flows and decisions.

pub mod boot;
pub mod cleanup;
pub mod companion;
pub mod daemon;
pub mod doctor;
pub mod engine;
pub mod files;
mod firewall;
pub mod flows;
pub mod follow;
pub mod health;
pub mod host;
pub mod http;
pub mod huskctl;
pub mod identity;
pub mod keys;
mod knock;
pub mod kubernetes;
pub mod leases;
pub mod line_log;
pub mod logging;
pub mod manual;
pub mod metrics;
pub mod node_file;
mod nudge;
pub mod offload;
pub mod probing;
mod programs;
pub mod report;
pub mod server;
pub mod source;
pub mod trace;
pub mod tunnels;
pub mod udp_encapsulation;
pub mod ui;
pub mod watch;
pub mod wireguard_userspace;
mod worker;
