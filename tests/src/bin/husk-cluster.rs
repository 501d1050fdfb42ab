//! A Kubernetes cluster with Husk on this machine, for people to look around in: up, down, and what lies between.

use std::io::{IsTerminal as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::builder::{PossibleValuesParser, TypedValueParser as _};
use clap::{Args, Parser, Subcommand, ValueEnum};
use husk_tests::kubernetes::{self, ControlService, Kept, Kubernetes, Log, NAMESPACE, NodeService};
use husk_tests::{Mode, kernel, scope, supervise};
use indicatif::{ProgressBar, ProgressStyle};

/// Exit status after a signal: 128 and the number of SIGINT, as shells have it.
const INTERRUPTED: u8 = 130;

/// How often the spinner turns.
const TICK: Duration = Duration::from_millis(100);

/// The argument by which this program tells itself to do the work instead of looking after the process that does.
const UNSUPERVISED: &str = "--unsupervised";

const EXAMPLES: &str = "\
Examples:
  hack/cluster up                                  three nodes, WireGuard
  hack/cluster up --nodes 2 --overlay dual-stack   IPv4 and IPv6 for pods
  hack/cluster kubectl get pods -A -o wide
  hack/cluster logs host2 daemon
  hack/cluster down

Exit status: 0 done, 1 something failed, 2 wrong usage, 130 interrupted; of kubectl its own.";

/// A real Kubernetes cluster on this machine, each node a network namespace with containerd and a kubelet, and Husk on it.
#[derive(Parser)]
#[command(name = "hack/cluster", bin_name = "hack/cluster", version, after_help = EXAMPLES)]
struct Arguments {
    #[command(subcommand)]
    action: Action,
    #[arg(long, hide = true, global = true)]
    unsupervised: bool,
}

#[derive(Subcommand)]
enum Action {
    /// Bring a cluster up and leave it running
    Up(Up),
    /// Run kubectl as the cluster's admin
    #[command(disable_help_flag = true)]
    Kubectl {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENT")]
        arguments: Vec<String>,
    },
    /// Print a log: of a program of a node, or of the control plane
    Logs {
        /// host1 and so on, or control-plane
        node: String,
        /// Which: daemon (default), kubelet, containerd or kube-proxy of a node; apiserver (default), etcd, controller-manager or
        /// scheduler of the control plane
        program: Option<Source>,
        /// Go on as the log grows
        #[arg(long, short)]
        follow: bool,
    },
    /// Say what runs
    Status,
    /// Remove everything, also what a killed `up` left
    Down,
}

#[derive(Args)]
struct Up {
    /// Number of nodes
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=8))]
    nodes: u8,
    /// How pod packets travel between the nodes; ipsec and vxlan-ipsec need ESP in the kernel
    #[arg(long, default_value = "wireguard", value_parser = PossibleValuesParser::new(["wireguard", "ipsec", "vxlan-ipsec", "vxlan"])
        .try_map(|text| text.parse::<Mode>()))]
    mode: Mode,
    /// Manifests to install, a directory of manifests/overlays; by default the one named like the mode
    #[arg(long, value_name = "NAME", conflicts_with = "mode")]
    overlay: Option<String>,
    /// Directory with kube-apiserver, kubelet and the others, rather than those that hack/cluster obtains
    #[arg(long, value_name = "DIR")]
    binaries: Option<PathBuf>,
    /// Leave Husk out: the nodes stay NotReady until something else gives them a network
    #[arg(long)]
    no_install: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Source {
    Daemon,
    Kubelet,
    Containerd,
    KubeProxy,
    Etcd,
    Apiserver,
    ControllerManager,
    Scheduler,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = match &arguments.action {
        Action::Up(up) if arguments.unsupervised => bring_up(up),
        Action::Up(up) => check(up).and_then(|()| look_after()),
        Action::Kubectl { arguments } => only().and_then(|kept| Err(kept.exec_kubectl(arguments))),
        Action::Logs { node, program, follow } => only().and_then(|kept| logs(&kept, node, *program, *follow)),
        Action::Status => only().and_then(|kept| status(&kept)),
        Action::Down => down(),
    };
    done.unwrap_or_else(|error| {
        let _ = writeln!(std::io::stderr(), "hack/cluster: {error:#}");
        ExitCode::FAILURE
    })
}

/// Says beforehand what cannot work.
fn check(up: &Up) -> Result<()> {
    if let Some(kept) = Kept::find()?.first() {
        bail!("a cluster is up already ({}); hack/cluster down removes it", kept.prefix());
    }
    ensure!(
        up.no_install || !up.overlay().contains("ipsec") || kernel::has(kernel::Part::Esp)?,
        "{} needs ESP with AES-GCM and the xfrm interface, and this machine's kernel lacks them",
        up.overlay()
    );
    Ok(())
}

impl Up {
    fn overlay(&self) -> &str {
        self.overlay.as_deref().unwrap_or(self.mode.as_str())
    }
}

fn bring_up(up: &Up) -> Result<ExitCode> {
    supervise::unblock_signals()?;
    let mut builder = Kubernetes::builder().nodes(up.nodes);
    if let Some(directory) = &up.binaries {
        builder = builder.binaries(directory);
    }
    match up.overlay() {
        "dual-stack" => builder = builder.dual_stack(),
        "pools" => builder = builder.without_node_cidrs(),
        _ => {}
    }
    let progress = Progress::start();
    let started = Instant::now();
    let kubernetes = builder.start_and_tell(&|step| progress.show(step))?;
    if !up.no_install {
        kubernetes.with_logs(install(&kubernetes, up.overlay(), &progress))?;
    }
    let kept = kubernetes.keep((!up.no_install).then(|| up.overlay()))?;
    progress.finish();
    say(&format!("The cluster is up, after {:.0} s.\n{}", started.elapsed().as_secs_f64(), ways_in(&kept)));
    Ok(ExitCode::SUCCESS)
}

fn install(kubernetes: &Kubernetes, overlay: &str, progress: &Progress) -> Result<()> {
    progress.show("giving every node Husk's image");
    kubernetes.import_image(&kubernetes::husk_image()?)?;
    progress.show("applying the manifests");
    kubernetes.apply(&kubernetes::render(overlay)?)?;
    progress.show("waiting until Husk runs and every node is ready");
    kubernetes.wait_installed()
}

fn look_after() -> Result<ExitCode> {
    let done = supervise::supervise(UNSUPERVISED)?;
    if done.interrupted {
        let kept = !Kept::find()?.is_empty();
        let text =
            if kept { "It stays up; hack/cluster down removes it." } else { "Everything it made is gone again." };
        let _ = writeln!(std::io::stderr(), "\nhack/cluster was interrupted. {text}");
        return Ok(ExitCode::from(INTERRUPTED));
    }
    Ok(done.status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}

/// The cluster that is up.
fn only() -> Result<Kept> {
    Kept::find()?.pop().context("no cluster is up; hack/cluster up brings one up")
}

fn ways_in(kept: &Kept) -> String {
    let command = std::env::var("HUSK_CLUSTER").unwrap_or_else(|_| "hack/cluster".to_owned());
    let node = kept.nodes().first().map_or("host1", String::as_str);
    let mut lines = vec![
        format!("ask the cluster   {command} kubectl get pods -A -o wide"),
        format!("read a log        {command} logs {node} kubelet"),
        format!("enter a node      nsenter --net={} bash", kept.netns(node).display()),
        format!("watch the wire    ip netns exec {}-switch tcpdump -n -i any", kept.prefix()),
        format!("tear down         {command} down"),
    ];
    if kept.overlay().is_some() {
        lines.insert(2, format!("ask Husk          {command} kubectl -n {NAMESPACE} exec ds/husk -- huskctl status"));
    }
    lines.join("\n")
}

fn status(kept: &Kept) -> Result<ExitCode> {
    let kubectl = kept.kubectl()?;
    let husk = kept.overlay().map_or_else(|| "without Husk".to_owned(), |overlay| format!("Husk: overlay {overlay}"));
    say(&format!("{} ({husk})\nkubeconfig: {}\n", kept.prefix(), kept.kubeconfig().display()));
    say(kubectl.run(["get", "nodes", "--output", "wide"])?.trim_end());
    say("");
    say(kubectl.run(["get", "pods", "--all-namespaces", "--output", "wide"])?.trim_end());
    Ok(ExitCode::SUCCESS)
}

fn logs(kept: &Kept, node: &str, program: Option<Source>, follow: bool) -> Result<ExitCode> {
    let known = kept.nodes().iter().any(|it| it == node);
    ensure!(
        known || node == "control-plane",
        "there is no node {node}; there are control-plane and {}",
        kept.nodes().join(", ")
    );
    let log = match (known, program) {
        (true, None | Some(Source::Daemon)) => return daemon_log(kept, node, follow),
        (true, Some(Source::Kubelet)) => Log::Node(node.to_owned(), NodeService::Kubelet),
        (true, Some(Source::Containerd)) => Log::Node(node.to_owned(), NodeService::Containerd),
        (true, Some(Source::KubeProxy)) => Log::Node(node.to_owned(), NodeService::KubeProxy),
        (false, None | Some(Source::Apiserver)) => Log::Control(ControlService::ApiServer),
        (false, Some(Source::Etcd)) => Log::Control(ControlService::Etcd),
        (false, Some(Source::ControllerManager)) => Log::Control(ControlService::ControllerManager),
        (false, Some(Source::Scheduler)) => Log::Control(ControlService::Scheduler),
        (true, Some(_)) => bail!("{node} has the logs daemon, kubelet, containerd and kube-proxy"),
        (false, Some(_)) => bail!("the control plane has the logs apiserver, etcd, controller-manager and scheduler"),
    };
    let program = if follow { ["tail", "--lines=+1", "--follow"].as_slice() } else { ["cat"].as_slice() };
    let error = Command::new(program[0]).args(&program[1..]).arg(kept.log(&log)).exec();
    Err(error).with_context(|| format!("starting {}", program[0]))
}

/// The daemon is in a pod: what it logs, the kubelet keeps.
fn daemon_log(kept: &Kept, node: &str, follow: bool) -> Result<ExitCode> {
    let field = format!("spec.nodeName={node}");
    let get = ["get", "pods", "--namespace", NAMESPACE, "--field-selector", &field, "--output", "name"];
    let pods = kept.kubectl()?.run(get)?;
    // Of all DaemonSets in the namespace, the daemon's alone has no second word in its name.
    let pod = pods.lines().find(|pod| pod.trim_start_matches("pod/").matches('-').count() == 1);
    let pod = pod.with_context(|| format!("no daemon's pod is on {node}; is Husk installed (hack/cluster status)?"))?;
    let mut arguments: Vec<_> = ["logs", "--namespace", NAMESPACE, pod].map(str::to_owned).into();
    if follow {
        arguments.push("--follow".to_owned());
    }
    Err(kept.exec_kubectl(&arguments))
}

fn down() -> Result<ExitCode> {
    let kept = Kept::find()?;
    for cluster in &kept {
        cluster.remove().with_context(|| format!("removing {}", cluster.prefix()))?;
        say(&format!("Torn down: {}", cluster.prefix()));
    }
    let killed = scope::sweep().context("removing what a killed run left")?;
    if !killed.is_empty() {
        say(&format!("Removed what a run that was killed left: {}", killed.join(", ")));
    } else if kept.is_empty() {
        say("Nothing to tear down: no cluster was left up.");
    }
    Ok(ExitCode::SUCCESS)
}

fn say(text: &str) {
    // A reader that closed the pipe has read enough.
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// What a person sees meanwhile, on standard error: a line for each step, and on a terminal a spinner on the last one.
struct Progress {
    bar: ProgressBar,
    started: Instant,
}

impl Progress {
    fn start() -> Self {
        let bar = if std::io::stderr().is_terminal() { ProgressBar::new_spinner() } else { ProgressBar::hidden() };
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(TICK);
        Self { bar, started: Instant::now() }
    }

    fn show(&self, step: &str) {
        let line = format!("{:>5.1} s  {step}", self.started.elapsed().as_secs_f64());
        self.bar.suspend(|| {
            let _ = writeln!(std::io::stderr(), "{line}");
        });
        self.bar.set_message(step.to_owned());
    }

    fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
