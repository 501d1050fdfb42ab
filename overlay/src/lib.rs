//! What every node of a Husk overlay should look like: types, MTU, keys and [`plan`]. No I/O happens here.
//!
//! Reading order: [`name`], [`prefix`], [`mac`], [`keys`] and [`esp`] are the vocabulary; [`config`] what people say;
//! [`record`] what nodes tell each other, [`manifest`] its text form; [`facts`], [`endpoint`], [`port_mapping`] and [`bandwidth`] what a node
//! finds on itself; [`kernel`] what its kernel should hold; [`mtu`] the byte ledger, [`rotation`] how keys are replaced; [`probe`]
//! what really passes, [`offload`] whether the VXLAN device may leave work to others; [`plan`] puts it all together.

pub mod bandwidth;
pub mod config;
pub mod digest;
pub mod endpoint;
pub mod esp;
pub mod facts;
pub mod ipc;
pub mod issue;
pub mod kernel;
pub mod keys;
pub mod mac;
pub mod manifest;
pub mod marks;
pub mod mode;
pub mod mtu;
pub mod name;
pub mod offload;
pub mod plan;
pub mod port_mapping;
pub mod prefix;
pub mod probe;
pub mod record;
pub mod rotation;
mod yaml;
