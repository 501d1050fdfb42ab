//! The troubleshooting command `huskctl`.

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    husk_node_daemon::huskctl::run(&husk_node_daemon::huskctl::Arguments::parse())
}
