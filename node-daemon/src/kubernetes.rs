//! The Kubernetes API as cluster source, and as the place where a node tells how it is.
//!
//! ```text
//!  API server ── watches ──► Store ── snapshot() ──► engine ── publish, claim, release ──► API server
//!                                                      └─ State ──► Reporter ── status, Events, Node condition ──► API server
//! ```
//!
//! | what | where |
//! |---|---|
//! | records of nodes | `OverlayNode`, one per node, written by that node with server-side apply |
//! | what policy is made of | Pods, Namespaces, NetworkPolicies, and ClusterNetworkPolicies where the API server has them |
//! | allocation lock | `AddressBlock`: its name is its CIDR, so that the API's refusal to create a name twice is the lock |
//! | blocks with `ipam.blocks: node-cidrs` | `spec.podCIDRs` of the `Node` objects; there are no `AddressBlock`s then |
//!
//! **What is kept in memory** is what a snapshot needs, parsed, and nothing of the objects' metadata but identity and version.
//!
//! **When the API is away**, watches try again with growing pauses. What they had delivered stays; after a moment the source
//! calls itself unavailable, so that nothing is claimed or given back by what may be old. After an outage everything is listed
//! anew. An API server that was restored from an older state counts versions from there; a watch that goes on from a later one is
//! deaf, which `resume` finds out. What others have said, and such an API server has forgotten, counts for a minute more: who hears
//! of it first must neither drop their routes nor take their blocks.
//!
//! **A node is gone** when its `Node` object is missing and its daemon gives no sign of life, both for `ipam.releaseAfter`.
//! Whichever daemon notices first removes its record and blocks; see [`departed`]. No owner references: the garbage
//! collector of Kubernetes would give a block to others while pods of a live node still use it.
//!
//! Reading order: [`objects`] the kinds and what is kept of them; [`store`] what the watches delivered; `watches` and `resume` how; [`source`]
//! the cluster source; [`policy`] what policy is made of; [`departed`] nodes that are gone and, with the same walk, `pools`; [`reporter`] the way back, with `events` and `quarantine`.

pub mod client;
pub mod departed;
mod events;
pub mod objects;
pub mod policy;
mod pools;
mod quarantine;
pub mod reporter;
mod resume;
pub mod source;
pub mod store;
mod watches;

pub use client::connect;
pub use objects::{definitions, definitions_yaml};
pub use reporter::Reporter;
pub use source::KubernetesSource;
