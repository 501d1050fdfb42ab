//! Tests of the loop on a fake kernel.

mod audit;
mod bed;
mod blocks;
mod convergence;
mod esp;
mod expander;
mod failures;
mod inbox;
mod observe;
mod peers;
mod pods;
mod policy;
mod policy_reports;
mod probes;
mod readiness;
mod secrets;
mod wireguard;
