//! The CNI plugin, installed as CNI type `husk` (CNI specification 1.1).
//!
//! Called by a container runtime with `CNI_COMMAND` in its environment, it is a plugin: JSON on standard output, nothing
//! else. Called by a person, it is a small tool that installs itself.
//!
//! Reading order: `invocation` and `netconf` are what the runtime says, `add` and its fellows what is done,
//! `result` and `error` what the runtime is told; `node` and `daemon` are the daemon's side.

mod add;
mod allocation;
mod attachment;
mod check;
mod daemon;
mod deadline;
mod del;
mod error;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod gc;
mod host_ports;
mod input;
mod install;
mod invocation;
mod netconf;
mod node;
mod result;
mod status;
mod version;
mod warnings;

use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use husk_ipam::lease::since_boot;
use husk_overlay::ipc::{Attaching, SOCKET_FILE};
use serde_json::Value;

use deadline::Deadline;
use error::Failure;
use invocation::Invocation;
use netconf::NetConf;
use version::Version;

/// The CNI plugin of Husk. A container runtime calls it with CNI_COMMAND in the environment.
#[derive(Debug, Parser)]
#[command(version, about, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Tool,
}

#[derive(Debug, Subcommand)]
enum Tool {
    /// Install this program as CNI type `husk`, replacing an older one in one step.
    Install {
        /// Directory in which the runtime looks for CNI plugins.
        #[arg(long, default_value = "/opt/cni/bin", value_name = "DIR")]
        bin_dir: PathBuf,
    },
    /// Print the version and the supported versions of the CNI specification.
    Version,
}

/// The whole program: what it does is in its environment, its arguments and on its standard input.
#[must_use]
pub fn run() -> ExitCode {
    let started = since_boot();
    if std::env::var_os(invocation::COMMAND).is_some() { plugin(started) } else { tool(&Arguments::parse()) }
}

/// Serves a runtime.
fn plugin(started: Duration) -> ExitCode {
    warnings::show();
    let invocation = Invocation::read(std::env::vars_os());
    let deadline = invocation.as_ref().map_or_else(|_| Deadline::after(input::PATIENCE), Deadline::of);
    let (stdin, outcome) = match input::read(io::stdin(), deadline.within(input::PATIENCE)) {
        Ok(stdin) => {
            let outcome = invocation.and_then(|invocation| serve(&invocation, &stdin, started, deadline));
            (stdin, outcome)
        }
        Err(failure) => (Vec::new(), Err(failure)),
    };
    let (output, status) = match outcome {
        Ok(None) => return ExitCode::SUCCESS,
        Ok(Some(result)) => (result, ExitCode::SUCCESS),
        Err(failure) => (failure.json(version_for_errors(&stdin)), ExitCode::FAILURE),
    };
    match writeln!(io::stdout().lock(), "{output}") {
        Ok(()) => status,
        Err(error) => {
            // Nobody hears: a runtime that gave up deletes what it did not get a result for.
            let _ = writeln!(io::stderr(), "husk-cni: write to standard output: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(
    invocation: &Invocation,
    stdin: &[u8],
    started: Duration,
    deadline: Deadline,
) -> Result<Option<Value>, Failure> {
    let conf = || NetConf::parse(stdin);
    match invocation {
        Invocation::Version => Ok(Some(version::answer(stdin))),
        Invocation::Add(attach) => {
            let conf = conf()?;
            counted(&conf, Attaching::Add, started, || add::add(&conf, attach, deadline).map(Some))
        }
        Invocation::Del(container) => {
            let conf = conf()?;
            counted(&conf, Attaching::Del, started, || del::del(&conf, container, deadline).map(|()| None))
        }
        Invocation::Check(attach) => check::check(&conf()?, attach, deadline).map(|()| None),
        Invocation::Status => status::status(&conf()?, deadline).map(|()| None),
        Invocation::Gc => gc::gc(&conf()?, started, deadline).map(|()| None),
    }
}

/// Does it, and tells the daemon how long it took and how it ended.
fn counted<T>(
    conf: &NetConf,
    command: Attaching,
    started: Duration,
    attach: impl FnOnce() -> Result<T, Failure>,
) -> Result<T, Failure> {
    let result = attach();
    let took = since_boot().saturating_sub(started);
    daemon::notify_end(&conf.run_file(SOCKET_FILE), command, took, result.as_ref().err().map(|failure| failure.code));
    result
}

/// The version an error is reported in: the configuration's if it can be read and is known.
fn version_for_errors(stdin: &[u8]) -> &'static str {
    let config: Option<Value> = serde_json::from_slice(stdin).ok();
    let given = config.as_ref().and_then(|config| config.get("cniVersion")).and_then(Value::as_str);
    given.and_then(|text| Version::parse(text).ok()).unwrap_or(Version::NEWEST).as_str()
}

/// Serves a person.
fn tool(arguments: &Arguments) -> ExitCode {
    let done = match &arguments.command {
        Tool::Install { bin_dir } => install::install(bin_dir).map(|path| format!("installed {}", path.display())),
        Tool::Version => {
            let known = Version::ALL.map(Version::as_str).join(", ");
            Ok(format!("husk-cni {}, CNI specification {known}", env!("CARGO_PKG_VERSION")))
        }
    };
    let (text, status) = match done {
        Ok(text) => (text, ExitCode::SUCCESS),
        Err(error) => (format!("husk-cni: {error:#}"), ExitCode::FAILURE),
    };
    let written = if status == ExitCode::SUCCESS {
        writeln!(io::stdout().lock(), "{text}")
    } else {
        writeln!(io::stderr().lock(), "{text}")
    };
    if written.is_ok() { status } else { ExitCode::FAILURE }
}
