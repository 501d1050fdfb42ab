//! `hack/bench`: measures Husk beside others.

use std::io::Write as _;
use std::process::ExitCode;

use anyhow::Result;
use clap::builder::{PossibleValuesParser, TypedValueParser as _};
use clap::{Parser, Subcommand};
use husk_tests::{Mode, bench};

/// Measures Husk beside others.
#[derive(Parser)]
#[command(name = "hack/bench", bin_name = "hack/bench", version)]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// ADD and DEL of the CNI plugin beside those of the reference plugins, and beside what the kernel alone takes
    Cni(Cni),
    /// Network policy: making, loading and changing large tables, and what a packet costs
    Policy(Policy),
    /// Payload per byte of the underlay in every mode, beside what fixed overheads would leave
    Mtu(Mtu),
}

#[derive(clap::Args)]
struct Mtu {
    /// JSON instead of a table; progress goes to standard error
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
struct Policy {
    /// Pods of the cluster
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(2000..=60_000))]
    pods: u32,
    /// Policies of the cluster
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=50_000))]
    policies: u32,
    /// Pods of the node
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1000))]
    local: u32,
    /// Rounds; in each, packets meet every table
    #[arg(long, value_name = "N", default_value_t = 9, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// Packets of a round
    #[arg(long, value_name = "N", default_value_t = 50_000, value_parser = clap::value_parser!(u32).range(1000..=10_000_000))]
    packets: u32,
    /// JSON instead of tables; progress goes to standard error
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
struct Cni {
    /// Rounds; in each, every contender adds and deletes a pod
    #[arg(long, value_name = "N", default_value_t = 40, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// Pods at once
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u8).range(1..=100))]
    at_once: u8,
    /// Pods get addresses of both families, instead of IPv4 alone
    #[arg(long)]
    dual_stack: bool,
    /// Encapsulation of the daemon that runs meanwhile
    #[arg(long, default_value = "wireguard", value_parser = PossibleValuesParser::new(["wireguard", "ipsec", "vxlan-ipsec", "vxlan", "direct"])
        .try_map(|text| text.parse::<Mode>()))]
    mode: Mode,
    /// Every single time as JSON instead of tables; progress goes to standard error
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let done = match Arguments::parse().what {
        What::Cni(arguments) => cni(&arguments),
        What::Policy(arguments) => policy(&arguments),
        What::Mtu(arguments) => mtu(&arguments),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hack/bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn cni(arguments: &Cni) -> Result<()> {
    let plan = bench::Plan {
        mode: arguments.mode,
        dual_stack: arguments.dual_stack,
        rounds: arguments.rounds.into(),
        at_once: arguments.at_once.into(),
    };
    let report = bench::run(&plan, |what| eprint!("\r\x1b[K{what}"))?;
    eprint!("\r\x1b[K");
    let text = if arguments.json { format!("{:#}\n", report.json()) } else { report.to_string() };
    Ok(std::io::stdout().write_all(text.as_bytes())?)
}

fn policy(arguments: &Policy) -> Result<()> {
    let plan = bench::policy::Plan {
        pods: usize::try_from(arguments.pods)?,
        policies: usize::try_from(arguments.policies)?,
        local: usize::try_from(arguments.local)?,
        rounds: arguments.rounds.into(),
        packets: usize::try_from(arguments.packets)?,
    };
    let report = bench::policy::run(&plan, |what| eprint!("\r\x1b[K{what}"))?;
    eprint!("\r\x1b[K");
    let text = if arguments.json { format!("{:#}\n", report.json()) } else { report.to_string() };
    Ok(std::io::stdout().write_all(text.as_bytes())?)
}

fn mtu(arguments: &Mtu) -> Result<()> {
    let report = bench::mtu::run(|what| eprint!("\r\x1b[K{what}"))?;
    eprint!("\r\x1b[K");
    let text = if arguments.json { format!("{:#}\n", report.json()) } else { report.to_string() };
    Ok(std::io::stdout().write_all(text.as_bytes())?)
}
