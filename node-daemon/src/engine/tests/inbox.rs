//! The running loop: wakes count as one, none is lost, questions are answered between passes.

use std::sync::mpsc::Receiver;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use husk_overlay::ipc::{Request, Response};
use husk_overlay::mode::Mode;

use super::bed::{Bed, blocks, name, prefix};
use crate::engine::{GAP, Handle, Message, SETTLE, State, channel, soonest};

/// Longer than anything here takes, shorter than the loop's own tick, which would hide a lost wake.
const PATIENCE: Duration = Duration::from_secs(4);

/// A loop on a thread of its own, which ends with this value.
pub(super) struct Running {
    pub(super) handle: Handle,
    state: tokio::sync::watch::Receiver<State>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    /// Takes the engine out of the bed; what the test changes is shared.
    pub(super) fn start(bed: &mut Bed) -> Self {
        let (handle, inbox): (Handle, Receiver<Message>) = channel(bed.state.clone(), bed.leases());
        let state = bed.state.clone();
        let waker = handle.waker();
        let old = {
            let spare = Bed::new(bed.config.mode, 1);
            std::mem::replace(&mut bed.engine, spare.engine)
        };
        let mut engine = old;
        let thread = std::thread::spawn(move || engine.run(&inbox, &waker));
        Self { handle, state, thread: Some(thread) }
    }

    pub(super) fn wait(&self, what: &str, reached: impl Fn(&State) -> bool) {
        let started = Instant::now();
        while !reached(&self.state.borrow()) {
            assert!(started.elapsed() < PATIENCE, "{what}: {:?}", self.state.borrow());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub(super) fn passes(&self) -> u64 {
        self.state.borrow().passes
    }

    fn ask(&self, request: Request) -> Response {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(self.handle.answer(request))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.handle.stop();
        let ended = self.thread.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            ended.unwrap().unwrap();
        }
    }
}

#[test]
fn a_storm_of_wakes_costs_few_passes_and_the_last_change_is_seen() {
    const THREADS: u64 = 8;
    const WAKES: u64 = 5_000;
    let mut bed = Bed::new(Mode::Direct, 2);
    let running = Running::start(&mut bed);
    running.wait("first pass", |state| state.ready);
    for round in 0..20_u16 {
        let (before, started) = (running.passes(), Instant::now());
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    let waker = running.handle.waker();
                    (0..WAKES / 20).for_each(|_| waker.wake());
                });
            }
        });
        // A change right behind the storm, announced by one wake that may meet a pass at any point.
        bed.node.state().underlay_mtu = 1400 + u32::from(round);
        running.handle.waker().wake();
        running.wait("the last change", |state| {
            state.node_file.as_ref().is_some_and(|file| file.pod_mtu == 1400 + u32::from(round))
        });
        let most = started.elapsed().as_millis() / 20 + 3;
        assert!(u128::from(running.passes() - before) <= most, "{} passes", running.passes() - before);
    }
}

#[test]
fn events_are_gathered_unless_somebody_waits_for_the_pass() {
    let now = Instant::now();
    let earliest = now + GAP;
    assert_eq!(soonest(now, earliest, false), earliest);
    assert_eq!(soonest(earliest, now, false), earliest + SETTLE);
    assert_eq!(soonest(now, earliest, true), now);
}

#[test]
fn who_waits_for_a_pass_gets_it_whatever_was_asked_before() {
    let mut bed = Bed::new(Mode::Direct, 1);
    let running = Running::start(&mut bed);
    running.wait("first pass", |state| state.ready);
    let waker = running.handle.waker();
    for _ in 0..100 {
        let before = running.passes();
        waker.wake();
        waker.hurry();
        running.wait("a pass", |state| state.passes > before);
    }
}

#[test]
fn no_wake_is_lost_between_threads() {
    let mut bed = Bed::new(Mode::Direct, 1);
    let running = Running::start(&mut bed);
    running.wait("first pass", |state| state.ready);
    // Every thread adds peers, each with a wake behind it; with the last wake all of them must have been seen.
    for index in 1..=40 {
        bed.allocate(index);
    }
    std::thread::scope(|scope| {
        for lane in 0..4_u16 {
            let (bed, waker) = (&bed.source, running.handle.waker());
            scope.spawn(move || {
                for index in (1..=40_u16).filter(|index| index % 4 == lane) {
                    bed.state().snapshot.nodes.insert(name(index), super::bed::record(index));
                    waker.wake();
                }
            });
        }
    });
    let started = Instant::now();
    let routed = || {
        let state = bed.kernel.state();
        (1..=40)
            .all(|index| blocks(index).iter().all(|block| state.own.routes.keys().any(|key| key.destination == *block)))
    };
    while !routed() {
        assert!(started.elapsed() < PATIENCE, "a wake was lost");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn questions_are_answered_in_a_storm_and_after_it() {
    let mut bed = Bed::new(Mode::Wireguard, 3);
    let running = Running::start(&mut bed);
    running.wait("first pass", |state| state.ready);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let waker = running.handle.waker();
            (0..20_000).for_each(|_| waker.wake());
        });
        for request in [Request::Status, Request::Peers, Request::Mtu, Request::Diff, Request::Ipam] {
            let Response::Report { report } = running.ask(request.clone()) else { panic!("{request:?}") };
            assert!(!report.is_null());
        }
        assert_eq!(running.ask(Request::Released), Response::Done);
    });
}

#[test]
fn wireguard_peers_that_somebody_removed_come_back_without_a_wake() {
    let mut bed = Bed::new(Mode::Wireguard, 3);
    let running = Running::start(&mut bed);
    running.wait("first pass", |state| state.ready);
    let whole = bed.kernel.state().own.wireguard.clone();
    bed.kernel.flush(husk_dataplane::kernel::Table::Wireguard);
    let started = Instant::now();
    while bed.kernel.state().own.wireguard != whole {
        assert!(started.elapsed() < Duration::from_secs(2), "the loop looks at least every second");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn blocks_are_handed_out_by_the_running_loop() {
    let mut config = husk_overlay::config::Config::new(vec![prefix("10.64.0.0/28")]);
    config.mode = Mode::Direct;
    config.block_lengths.ipv4 = 30;
    let mut bed = Bed::of(config);
    let running = Running::start(&mut bed);
    running.wait("first pass", |state| state.ready);
    for pod in ["a", "b", "c"] {
        bed.lease(pod).unwrap();
    }
    assert!(bed.lease("d").is_err());
    let families = [husk_overlay::prefix::Family::Ipv4].into();
    assert_eq!(running.ask(Request::Blocks { families }), Response::Done);
    assert!(bed.lease("d").is_ok());
}

#[test]
fn a_loop_that_ended_says_so() {
    let mut bed = Bed::new(Mode::Direct, 1);
    let running = Running::start(&mut bed);
    running.handle.stop();
    let started = Instant::now();
    loop {
        if let Response::Refused { reason } = running.ask(Request::Status) {
            assert!(reason.contains("stopping"), "{reason}");
            break;
        }
        assert!(started.elapsed() < PATIENCE);
    }
}
