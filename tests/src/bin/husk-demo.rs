//! The demo: hosts as network namespaces on one underlay, an overlay between them, and what the wire saw.
//!
//! Two processes: one does everything, the other waits for it, passes signals on, and removes what is left when the
//! first has ended in whatever way. So a panic, Ctrl-C or a kill at any instruction leaves nothing behind.

use std::io::Write as _;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::builder::{PossibleValuesParser, TypedValueParser as _};
use clap::{Parser, ValueEnum};
use husk_overlay::mtu;
use husk_tests::demo::{self, Plan};
use husk_tests::supervise::{self, Supervised};
use husk_tests::{Family, Mode, kernel, kubernetes, scope};

/// Exit status after a signal: 128 and the number of SIGINT, as shells have it.
const INTERRUPTED: u8 = 130;

const EXAMPLES: &str = "\
Examples:
  hack/demo                                three hosts, WireGuard over IPv4
  hack/demo --mode vxlan --underlay ipv6   what an unencrypted overlay shows to the wire
  hack/demo --nodes 5 --mtu 9000           more hosts, jumbo frames
  hack/demo --vm --mode ipsec              on a Debian kernel in a virtual machine, which has what this mode needs
  hack/demo --keep                         leave it up and look around; hack/demo --down removes it
  hack/demo --output json | jq .passed     for scripts; progress goes to standard error

Exit status: 0 everything that should hold held, 1 something did not, 2 wrong usage, 130 interrupted.";

/// Shows Husk at work: hosts as network namespaces on one underlay, two pods on each, attached by the CNI plugin; who
/// reaches whom, where the bytes of a packet go, how fast it is, and what a capture on the underlay saw.
#[derive(Parser)]
#[command(name = "hack/demo", bin_name = "hack/demo", version, after_help = EXAMPLES)]
struct Arguments {
    /// How pod packets travel between the hosts; ipsec and vxlan-ipsec need ESP in the kernel, see --vm
    #[arg(long, default_value = "wireguard", value_parser = PossibleValuesParser::new(["wireguard", "ipsec", "vxlan-ipsec", "vxlan", "direct"])
        .try_map(|text| text.parse::<Mode>()))]
    mode: Mode,
    /// Number of hosts
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(2..=8))]
    nodes: u8,
    /// Address family of the network between the hosts
    #[arg(long, value_name = "FAMILY", default_value = "ipv4", value_parser = PossibleValuesParser::new(["ipv4", "ipv6"])
        .map(|text| if text == "ipv6" { Family::Ipv6 } else { Family::Ipv4 }))]
    underlay: Family,
    /// MTU of the network between the hosts
    #[arg(long, value_name = "BYTES", default_value_t = 1500, value_parser = clap::value_parser!(u32).range(1280..=65535))]
    mtu: u32,
    /// Run in a virtual machine with Debian's kernel, which has all that the modes need; emulated, it takes minutes
    #[arg(long, value_name = "KERNEL", num_args = 0..=1, require_equals = true, default_missing_value = "6.1",
        value_parser = PossibleValuesParser::new(["6.1", "6.12"]), conflicts_with_all = ["keep", "down"])]
    vm: Option<String>,
    /// Leave everything up and say how to look around
    #[arg(long)]
    keep: bool,
    /// Remove what --keep left; NAME says which demo, where several are up, and `all` means all of them
    #[arg(long, value_name = "NAME", num_args = 0..=1, require_equals = true, default_missing_value = "", exclusive = true)]
    down: Option<String>,
    /// Form of the report
    #[arg(long, short, value_enum, default_value_t = Output::Table)]
    output: Output,
    /// Do the work instead of looking after the process that does
    #[arg(long, hide = true)]
    unsupervised: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people
    Table,
    /// JSON for scripts
    Json,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = match &arguments {
        Arguments { down: Some(which), .. } => remove_kept(which),
        Arguments { unsupervised: true, .. } => work(&arguments),
        _ => match check(&arguments) {
            Ok(()) => supervise(),
            Err(error) => {
                report(&error);
                return ExitCode::from(2);
            }
        },
    };
    done.unwrap_or_else(|error| {
        report(&error);
        ExitCode::FAILURE
    })
}

fn report(error: &anyhow::Error) {
    let _ = writeln!(std::io::stderr(), "hack/demo: {error:#}");
}

/// Says beforehand what cannot work: an underlay too small for IPv6, which the demo gives every pod, and a mode that the
/// kernel lacks something for.
fn check(arguments: &Arguments) -> Result<()> {
    let Arguments { mode, underlay, mtu: underlay_mtu, .. } = arguments;
    // hack/demo starts the machine; who calls this program directly has not been there.
    ensure!(arguments.vm.is_none(), "only hack/demo itself can start a virtual machine");
    let left = mtu::inner_mtu(&mode.stack(false), *underlay, *underlay_mtu)?;
    let needed = mtu::underlay_needed(&mode.stack(false), *underlay, mtu::MINIMUM_IPV6);
    ensure!(
        left >= mtu::MINIMUM_IPV6,
        "--mtu {underlay_mtu} leaves {left} bytes to pods in mode {mode} over {underlay}, and IPv6 needs {}; \
         use --mtu {needed} or more",
        mtu::MINIMUM_IPV6
    );
    ensure!(
        !mode.uses_esp() || kernel::has(kernel::Part::Esp)?,
        "mode {mode} needs ESP with AES-GCM and the xfrm interface, and this machine's kernel lacks them. \
         `hack/demo --vm --mode {mode}` shows it on a Debian kernel in a virtual machine"
    );
    Ok(())
}

fn work(arguments: &Arguments) -> Result<ExitCode> {
    supervise::unblock_signals()?;
    let plan = Plan {
        mode: arguments.mode,
        hosts: arguments.nodes,
        underlay: arguments.underlay,
        mtu: usize::try_from(arguments.mtu)?,
        keep: arguments.keep,
    };
    let report = demo::run(&plan)?;
    let text = match arguments.output {
        Output::Table => demo::text(&report),
        Output::Json => serde_json::to_string_pretty(&report)? + "\n",
    };
    // A reader that closed the pipe has read enough.
    let _ = std::io::stdout().write_all(text.as_bytes());
    Ok(if report.passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs the demo in a process of its own and removes what that process leaves, however it ends.
fn supervise() -> Result<ExitCode> {
    let Supervised { worker, status, interrupted, swept } = supervise::supervise("--unsupervised")?;
    if interrupted {
        // With --keep it may have been done already.
        let kept = scope::kept().iter().any(|name| name.contains(&format!("-{worker}-")));
        let text = if kept { "It stays up; hack/demo --down removes it." } else { "Everything it made is gone again." };
        let _ = writeln!(std::io::stderr(), "\nThe demo was interrupted. {text}");
        return Ok(ExitCode::from(INTERRUPTED));
    }
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    if code.is_none() {
        let _ = writeln!(std::io::stderr(), "\nThe demo was ended ({status}); what it left was removed: {swept:?}");
    }
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}

/// Removes a demo by its name, `all`, or without a name the only one.
fn remove_kept(which: &str) -> Result<ExitCode> {
    // What hack/cluster left up is not the demo's.
    let clusters: Vec<String> = kubernetes::Kept::find()?.iter().map(|it| it.prefix().to_owned()).collect();
    let mut kept: Vec<String> = scope::kept().into_iter().filter(|name| !clusters.contains(name)).collect();
    kept.sort();
    let names = kept.join(", ");
    match which {
        "all" => {}
        "" => ensure!(
            kept.len() < 2,
            "{} demos are up: {names}. Some may be somebody else's: say which one to remove (--down=NAME), or --down=all",
            kept.len()
        ),
        name => {
            let up = if kept.is_empty() { "none is".to_owned() } else { format!("up: {names}") };
            ensure!(kept.iter().any(|it| it == name), "no demo of the name {name} is up; {up}");
            kept.retain(|it| it == name);
        }
    }
    for prefix in &kept {
        scope::sweep_kept(prefix).with_context(|| format!("removing {prefix}"))?;
    }
    let killed = scope::sweep().context("removing what a killed demo left")?;
    let mut lines = Vec::new();
    match kept.as_slice() {
        [] if killed.is_empty() => lines.push("Nothing to tear down: no demo was left up.".to_owned()),
        [] => {}
        [one] => lines.push(format!("Torn down: {one}")),
        more => lines.push(format!("Torn down {} demos: {}", more.len(), more.join(", "))),
    }
    if !killed.is_empty() {
        lines.push(format!("Removed what a demo that was killed left: {}", killed.join(", ")));
    }
    for line in lines {
        let _ = writeln!(std::io::stdout(), "{line}");
    }
    Ok(ExitCode::SUCCESS)
}
