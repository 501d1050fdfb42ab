//! The troubleshooting command `huskctl`.

use std::process::ExitCode;

fn main() -> ExitCode {
    husk_node_daemon::huskctl::run(&husk_node_daemon::huskctl::Arguments::of_process())
}
