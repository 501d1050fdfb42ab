//! Tests of the loop on a fake kernel.

mod bed;
mod blocks;
mod convergence;
mod expander;
mod failures;
mod inbox;
mod peers;
mod pods;
mod readiness;
