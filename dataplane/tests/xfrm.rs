//! IPsec of the real kernel, each test in network namespaces of its own: what is applied is read back, changes are as small
//! as they should be, and packets take the way that the policies name and no other.
//!
//! Policies are in every kernel these tests run on. ESP and the xfrm interface are not: what needs them says so on standard
//! error where they are missing and checks that this is told; with `HUSK_TEST_KERNEL=full`, or as `hack/vm` sets it
//! `HUSK_TEST_KERNEL_WIREGUARD=required`, in the environment it fails instead.

#![allow(clippy::unwrap_used, clippy::panic, reason = "functions that tests share are test code too")]

#[path = "xfrm/bed.rs"]
mod bed;
#[path = "xfrm/tables.rs"]
mod tables;
#[path = "xfrm/traffic.rs"]
mod traffic;
