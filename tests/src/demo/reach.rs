//! Who reaches whom: every pod asks every other, over both families; then pods, hosts and the outside.

use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Shutdown, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use husk_overlay::ipc::NodeFile;
use husk_overlay::mode::Mode;
use husk_overlay::prefix::Family;

use super::progress::Step;
use super::report::{Asked, Beyond, Check, Checks, Pair};
use crate::probe::{Echo, EchoServer, Reach, payload, tcp};
use crate::{Cluster, Host, Netns, Pod, patience};

/// Bytes of a transfer: some packets of full size each way, and no more than a socket takes at once.
const TRANSFER: usize = 20_000;

/// How long a transfer may stand still.
const STALL_LIMIT: Duration = Duration::from_secs(3);

/// How long each of the two parts may take: a demo in which nothing answers should end all the same.
const LIMIT: Duration = Duration::from_secs(20);

/// A pod, where it lives, and the server in it.
#[derive(Debug)]
pub(super) struct Member<'a> {
    number: usize,
    host: &'a Host,
    pod: &'a Pod,
    server: EchoServer,
    mtu: usize,
}

impl Member<'_> {
    fn at(&self, family: Family) -> Result<SocketAddr> {
        Ok(self.server.at(self.pod.address(family)?))
    }
}

/// Starts a server in every pod.
pub(super) fn members<'a>(cluster: &'a Cluster, pods: &'a [(usize, Pod)]) -> Result<Vec<Member<'a>>> {
    let member = |(number, pod): &'a (usize, Pod)| {
        let server = EchoServer::start(pod.netns())?;
        Ok(Member { number: *number, host: cluster.host(*number), pod, server, mtu: pod.mtu()? })
    };
    pods.iter().map(member).collect()
}

/// Every pod asks every other. All pods ask at once, for each family: one that gets no answer should not keep the others
/// waiting.
pub(super) fn pairs(members: &[Member<'_>], step: &Step) -> Vec<Pair> {
    let (asked, total) = (AtomicUsize::new(0), members.len() * members.len().saturating_sub(1) * Family::ALL.len());
    let deadline = Instant::now() + patience(LIMIT);
    let row = |from: &Member<'_>| {
        let others: Vec<_> = members.iter().filter(|to| to.pod.name() != from.pod.name()).collect();
        let columns = in_parallel(&Family::ALL, |family| {
            let column = others.iter().map(|to| {
                let checks = checks(from, to, *family, deadline);
                step.show(&format!("{} of {total}", asked.fetch_add(1, Ordering::Relaxed) + 1));
                (*family, checks)
            });
            column.collect::<Vec<_>>()
        });
        let pair = |(index, to): (usize, &&Member<'_>)| Pair {
            from: from.pod.name().to_owned(),
            to: to.pod.name().to_owned(),
            families: columns.iter().map(|column| column[index].clone()).collect(),
        };
        others.iter().enumerate().map(pair).collect::<Vec<_>>()
    };
    in_parallel(members, row).into_iter().flatten().collect()
}

/// Does `work` for all items at once; the results are in the items' order.
fn in_parallel<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let work = &work;
    thread::scope(|scope| {
        let threads: Vec<_> = items.iter().map(|item| scope.spawn(move || work(item))).collect();
        threads.into_iter().map(|it| it.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    })
}

fn checks(from: &Member<'_>, to: &Member<'_>, family: Family, deadline: Instant) -> Checks {
    let ask = |question: &dyn Fn(SocketAddr) -> Check| match to.at(family) {
        Ok(_) if Instant::now() > deadline => Check::NotAsked,
        Ok(at) => question(at),
        Err(error) => Check::failed("an address of this family", format!("{error:#}")),
    };
    let netns = from.pod.netns();
    Checks {
        tcp: ask(&|at| transfer(netns, at)),
        full_mtu: ask(&|at| full_size(netns, at.ip(), from.mtu)),
        oversize_refused: ask(&|at| oversize(netns, at.ip(), from.mtu)),
    }
}

fn transfer(netns: &Netns, to: SocketAddr) -> Check {
    match there_and_back(netns, to) {
        Ok(()) => Check::Held,
        Err(error) => Check::failed(format!("{TRANSFER} bytes there and back"), format!("{error:#}")),
    }
}

fn there_and_back(netns: &Netns, to: SocketAddr) -> Result<()> {
    let mut stream = tcp::connect(netns, to, STALL_LIMIT)?;
    stream.set_read_timeout(Some(patience(STALL_LIMIT)))?;
    stream.write_all(&payload::of_length(TRANSFER)).context("sending")?;
    stream.shutdown(Shutdown::Write).context("ending the stream")?;
    let mut echoed = Vec::new();
    if let Err(error) = stream.read_to_end(&mut echoed) {
        let bytes = echoed.len();
        ensure!(
            error.kind() != ErrorKind::WouldBlock,
            "connected, and after {bytes} bytes nothing for {:?}",
            patience(STALL_LIMIT)
        );
        return Err(error).with_context(|| format!("connected, and nothing more after {bytes} bytes"));
    }
    payload::verify(0, &echoed)?;
    ensure!(echoed.len() == TRANSFER, "the connection ended after {} bytes", echoed.len());
    Ok(())
}

fn full_size(netns: &Netns, to: IpAddr, mtu: usize) -> Check {
    match Echo::to(to).packet_size(mtu).run(netns) {
        Ok(Reach::Answered { packet_size, .. }) if packet_size == mtu => Check::Held,
        other => Check::failed(format!("an answer of {mtu} bytes"), describe(other)),
    }
}

fn oversize(netns: &Netns, to: IpAddr, mtu: usize) -> Check {
    match Echo::to(to).packet_size(mtu + 1).run(netns) {
        Ok(Reach::TooBig { path_mtu, local: true }) if path_mtu == mtu => Check::Held,
        other => Check::failed(format!("refused by the sender's own kernel, MTU {mtu}"), describe(other)),
    }
}

fn describe(reach: Result<Reach>) -> String {
    match reach {
        Ok(Reach::Answered { packet_size, .. }) => format!("an answer of {packet_size} bytes"),
        Ok(Reach::TooBig { path_mtu, local: true }) => format!("refused by the sender's own kernel, MTU {path_mtu}"),
        Ok(Reach::TooBig { path_mtu, local: false }) => format!("refused by a router on the path, MTU {path_mtu}"),
        Ok(Reach::Refused(errno)) => errno.desc().to_owned(),
        Ok(Reach::Silent) => "no answer".to_owned(),
        Err(error) => format!("{error:#}"),
    }
}

/// The questions between pods, hosts and the outside.
pub(super) fn beyond(mode: Mode, cluster: &Cluster, members: &[Member<'_>], step: &Step) -> Result<Vec<Beyond>> {
    let questions = Questions {
        members,
        servers: cluster.hosts().iter().map(|host| EchoServer::start(host.netns())).collect::<Result<_>>()?,
        cluster,
        deadline: Instant::now() + patience(LIMIT),
    };
    let underlay = cluster.families();
    let both = Family::ALL.to_vec();
    let next = |number: usize| number % cluster.hosts().len() + 1;
    let mut rows = Vec::new();
    step.show("pods to their own hosts");
    rows.push(questions.row("pod", "its own host, underlay address", &underlay, |member, family| {
        questions.pod_to_host(member, member.number, member.host.address(family)?)
    }));
    let elsewhere = if mode.tunnelled() {
        rows.push(questions.row("pod", "its own host, overlay address", &both, |member, family| {
            questions.pod_to_host(member, member.number, router(member.host, family)?)
        }));
        "another host, overlay address"
    } else {
        "another host"
    };
    step.show("pods to other hosts");
    rows.push(questions.row("pod", elsewhere, &both, |member, family| {
        let other = next(member.number);
        let host = cluster.host(other);
        let address = if mode.tunnelled() { router(host, family)? } else { host.address(family)? };
        questions.pod_to_host(member, other, address)
    }));
    step.show("hosts to pods");
    for (to, distance) in [("a pod of its own", 0), ("a pod of another host", 1)] {
        rows.push(questions.row("host", to, &both, |member, family| {
            let from = if distance == 0 { member.host } else { cluster.host(next(member.number)) };
            let check = transfer(from.netns(), member.at(family)?);
            Ok(Asked { from: from.name().to_owned(), to: member.pod.name().to_owned(), check })
        }));
    }
    step.show("pods to the outside");
    rows.push(questions.row("pod", "the outside, seen there as its host", &underlay, |member, family| {
        questions.outside(member, family)
    }));
    Ok(rows)
}

struct Questions<'a> {
    members: &'a [Member<'a>],
    servers: Vec<EchoServer>,
    cluster: &'a Cluster,
    deadline: Instant,
}

impl Questions<'_> {
    fn row(
        &self,
        from: &'static str,
        to: &str,
        families: &[Family],
        ask: impl Fn(&Member<'_>, Family) -> Result<Asked> + Sync,
    ) -> Beyond {
        let answer = |member: &Member<'_>, family| {
            let unanswered = |check| Asked { from: member.pod.name().to_owned(), to: to.to_owned(), check };
            if Instant::now() > self.deadline {
                return unanswered(Check::NotAsked);
            }
            let failed = |error: anyhow::Error| unanswered(Check::failed("an answer", format!("{error:#}")));
            ask(member, family).unwrap_or_else(failed)
        };
        let column = |family: &Family| (*family, in_parallel(self.members, |member| answer(member, *family)));
        Beyond { from, to: to.to_owned(), families: families.iter().map(column).collect::<BTreeMap<_, _>>() }
    }

    fn pod_to_host(&self, member: &Member<'_>, number: usize, address: IpAddr) -> Result<Asked> {
        let check = transfer(member.pod.netns(), self.servers[number - 1].at(address));
        let (from, to) = (member.pod.name().to_owned(), self.cluster.host(number).name().to_owned());
        Ok(Asked { from, to, check })
    }

    /// The outside answers, and has seen the pod's host and not the pod.
    fn outside(&self, member: &Member<'_>, family: Family) -> Result<Asked> {
        // A server for this question only: all its clients are this pod.
        let server = EchoServer::start(self.cluster.outside())?;
        let mut check = transfer(member.pod.netns(), server.at(Cluster::outside_address(family)));
        let expected = member.host.address(family)?;
        let seen: Vec<_> = server.peers().iter().map(SocketAddr::ip).collect();
        if check == Check::Held && seen != [expected] {
            check = Check::failed(format!("seen there as {expected}"), format!("seen as {seen:?}"));
        }
        Ok(Asked { from: member.pod.name().to_owned(), to: "outside".to_owned(), check })
    }
}

/// The host's own address inside the overlay, from what the daemon told the plugin.
fn router(host: &Host, family: Family) -> Result<IpAddr> {
    let path = host.file(husk_overlay::marks::RUN_DIRECTORY).join(husk_overlay::ipc::NODE_FILE);
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let file: NodeFile = serde_json::from_str(&text).with_context(|| format!("parsing {}", path.display()))?;
    file.router.get(family).ok_or_else(|| anyhow!("{} has no {family} address inside the overlay", host.name()))
}
