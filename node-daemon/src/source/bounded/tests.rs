use std::path::Path;
use std::sync::Mutex;
use std::time::Instant;

use super::*;
use crate::source::directory::DirectorySource;

const PATIENCE: Duration = Duration::from_secs(10);
const SHORT: Limits = Limits { read: Duration::from_millis(30), write: Duration::from_millis(30) };
const LONG: Limits = Limits { read: PATIENCE, write: PATIENCE };

fn node(name: &str) -> NodeName {
    NodeName::new(name).unwrap()
}

fn block(number: u128) -> Prefix {
    "10.42.0.0/16".parse::<Prefix>().unwrap().subnet(26, number).unwrap()
}

/// A directory source in which a call hangs for as long as the test holds the lock, as in a share whose server is gone.
struct Share {
    directory: tempfile::TempDir,
    server: Arc<Mutex<()>>,
}

struct Mounted {
    inner: DirectorySource,
    server: Arc<Mutex<()>>,
}

impl Mounted {
    fn inner(&mut self) -> &mut DirectorySource {
        drop(self.server.lock());
        &mut self.inner
    }
}

impl ClusterSource for Mounted {
    fn snapshot(&mut self) -> Result<Snapshot, SourceError> {
        self.inner().snapshot()
    }
    fn policy_objects(&mut self) -> Result<Arc<Objects>, SourceError> {
        self.inner().policy_objects()
    }
    fn publish(&mut self, record: &NodeRecord) -> Result<(), SourceError> {
        self.inner().publish(record)
    }
    fn claim(&mut self, block: Prefix, node: &NodeName) -> Result<Claim, SourceError> {
        self.inner().claim(block, node)
    }
    fn release(&mut self, block: Prefix, node: &NodeName) -> Result<(), SourceError> {
        self.inner().release(block, node)
    }
    fn withdraw(&mut self, node: &NodeName) -> Result<(), SourceError> {
        self.inner().withdraw(node)
    }
}

/// A source that delivers what the test sends, when the test sends it.
struct Scripted(Receiver<Snapshot>);

/// A source of policy that takes its time.
struct Slow(Duration, Arc<Objects>);

impl ClusterSource for Slow {
    fn snapshot(&mut self) -> Result<Snapshot, SourceError> {
        thread::sleep(self.0);
        Ok(Snapshot::default())
    }
    fn policy_objects(&mut self) -> Result<Arc<Objects>, SourceError> {
        thread::sleep(self.0);
        Ok(Arc::clone(&self.1))
    }
    fn publish(&mut self, _: &NodeRecord) -> Result<(), SourceError> {
        Ok(())
    }
    fn claim(&mut self, _: Prefix, _: &NodeName) -> Result<Claim, SourceError> {
        Ok(Claim::Taken)
    }
    fn release(&mut self, _: Prefix, _: &NodeName) -> Result<(), SourceError> {
        Ok(())
    }
    fn withdraw(&mut self, _: &NodeName) -> Result<(), SourceError> {
        Ok(())
    }
}

impl ClusterSource for Scripted {
    fn snapshot(&mut self) -> Result<Snapshot, SourceError> {
        Ok(self.0.recv().unwrap())
    }
    fn policy_objects(&mut self) -> Result<Arc<Objects>, SourceError> {
        Ok(Arc::default())
    }
    fn publish(&mut self, _: &NodeRecord) -> Result<(), SourceError> {
        Ok(())
    }
    fn claim(&mut self, _: Prefix, _: &NodeName) -> Result<Claim, SourceError> {
        Ok(Claim::Taken)
    }
    fn release(&mut self, _: Prefix, _: &NodeName) -> Result<(), SourceError> {
        Ok(())
    }
    fn withdraw(&mut self, _: &NodeName) -> Result<(), SourceError> {
        Ok(())
    }
}

impl Share {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap(), server: Arc::default() }
    }

    fn open(&self, limits: Limits) -> Bounded {
        let (root, server) = (self.directory.path().to_owned(), Arc::clone(&self.server));
        let open = move || {
            drop(server.lock());
            Ok(Mounted { inner: DirectorySource::open(&root, false)?, server: Arc::clone(&server) })
        };
        Bounded::open("/cluster".into(), limits, open).unwrap()
    }
}

/// The reason why the source is not available.
fn reason<T>(result: Result<T, SourceError>) -> String {
    match result {
        Err(SourceError::Unavailable { reason, .. }) => reason,
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("the source answered"),
    }
}

/// Asks until the source is available again.
fn recovered(source: &mut Bounded) -> Snapshot {
    let end = Instant::now() + PATIENCE;
    loop {
        match source.snapshot() {
            Ok(snapshot) => return snapshot,
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        thread::yield_now();
    }
}

#[test]
fn a_source_that_answers_is_as_it_is() {
    let share = Share::new();
    let mut source = share.open(LONG);
    assert_eq!(source.claim(block(0), &node("a")).unwrap(), Claim::Granted);
    assert_eq!(source.claim(block(0), &node("b")).unwrap(), Claim::Taken);
    source.claim(block(1), &node("a")).unwrap();
    source.release(block(1), &node("a")).unwrap();
    assert_eq!(source.snapshot().unwrap().blocks, [(block(0), node("a"))].into());
    source.withdraw(&node("a")).unwrap();
    std::fs::remove_dir_all(share.directory.path()).unwrap();
    assert!(reason(source.snapshot()).contains("mounted"));
}

#[test]
fn a_stuck_call_is_given_up_in_time_and_further_ones_fail_at_once_in_the_same_words() {
    let share = Share::new();
    let mut source = share.open(LONG);
    source.limits = SHORT;
    let hang = share.server.lock().unwrap();
    let first = reason(source.snapshot());
    assert!(source.snapshot().unwrap_err().to_string().contains("/cluster"));
    assert!(first.contains("does not answer") && first.contains("reading it takes longer than 0.03 s"), "{first}");
    let started = Instant::now();
    let slow = Limits { read: PATIENCE * 100, write: PATIENCE * 100 };
    source.limits = slow;
    for _ in 0..1000 {
        assert_eq!(reason(source.snapshot()), first);
        assert_eq!(reason(source.claim(block(1), &node("a"))), first);
        assert_eq!(reason(source.release(block(0), &node("a"))), first);
        assert_eq!(reason(source.withdraw(&node("a"))), first);
    }
    assert!(started.elapsed() < PATIENCE);
    drop(hang);
    // None of the calls in between was kept for later.
    assert_eq!(recovered(&mut source).blocks.len(), 0);
    assert_eq!(source.snapshot().unwrap().blocks.len(), 0);
}

#[test]
fn a_late_snapshot_is_used_by_the_next_call() {
    let (sender, deliveries) = channel();
    let mut scripted = Some(Scripted(deliveries));
    let mut source = Bounded::open("/cluster".into(), LONG, move || Ok(scripted.take().unwrap())).unwrap();
    source.limits = SHORT;
    reason(source.snapshot());
    let first = Snapshot { blocks: [(block(0), node("a"))].into(), ..Snapshot::default() };
    sender.send(first.clone()).unwrap();
    // Were the late answer dropped, the source would be asked again, and there is no second one.
    assert_eq!(recovered(&mut source), first);
    // The one after it is asked for anew.
    source.limits = LONG;
    sender.send(Snapshot::default()).unwrap();
    assert_eq!(source.snapshot().unwrap(), Snapshot::default());
    // For any other call a late snapshot is of no use.
    source.limits = SHORT;
    reason(source.snapshot());
    sender.send(first).unwrap();
    let end = Instant::now() + PATIENCE;
    while source.claim(block(0), &node("a")).is_err() {
        assert!(Instant::now() < end);
    }
}

#[test]
fn what_was_done_late_is_told_by_the_next_snapshot() {
    let share = Share::new();
    let mut source = share.open(LONG);
    source.limits = SHORT;
    let hang = share.server.lock().unwrap();
    assert!(reason(source.claim(block(0), &node("a"))).contains("claiming a block"));
    assert!(reason(source.snapshot()).contains("claiming a block"), "what hangs is told, not what was asked");
    drop(hang);
    assert_eq!(recovered(&mut source).blocks, [(block(0), node("a"))].into());
    let hang = share.server.lock().unwrap();
    reason(source.release(block(0), &node("a")));
    drop(hang);
    assert_eq!(recovered(&mut source).blocks, [].into());
}

#[test]
fn a_source_that_hangs_at_the_start_is_opened_later() {
    let share = Share::new();
    let hang = share.server.lock().unwrap();
    let mut source = share.open(SHORT);
    assert!(reason(source.snapshot()).contains("opening it"));
    drop(hang);
    assert_eq!(recovered(&mut source), Snapshot::default());
}

#[test]
fn opening_is_tried_again_while_it_may_help_and_told_where_it_cannot() {
    let gone = || SourceError::Unavailable { subject: "/cluster".into(), reason: "no route to host".into() };
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().to_owned();
    let mut attempts = 0;
    let open = move || {
        attempts += 1;
        if attempts < 3 { Err(gone()) } else { DirectorySource::open(&root, false) }
    };
    let mut source = Bounded::open("/cluster".into(), LONG, open).unwrap();
    assert_eq!(reason(source.snapshot()), "no route to host");
    assert_eq!(source.snapshot().unwrap(), Snapshot::default());
    let refused = Bounded::open("/cluster".into(), LONG, || DirectorySource::open(Path::new("/dev/null"), false));
    assert!(matches!(refused, Err(SourceError::Io(_))));
}

#[test]
fn a_source_that_panics_is_opened_anew() {
    let opened = Arc::new(Mutex::new(0));
    let count = Arc::clone(&opened);
    let open = move || {
        *count.lock().unwrap() += 1;
        // A sender that is gone makes it panic.
        Ok(Scripted(channel().1))
    };
    let mut source = Bounded::open("/cluster".into(), LONG, open).unwrap();
    assert!(reason(source.snapshot()).contains("bug"));
    assert_eq!(source.claim(block(0), &node("a")).unwrap(), Claim::Taken);
    assert_eq!(*opened.lock().unwrap(), 2);
}

#[test]
fn objects_of_policy_that_come_late_are_used_though_something_else_was_asked_meanwhile() {
    let objects = Arc::new(Objects::default());
    let slow = Arc::clone(&objects);
    let mut source = Bounded::open("/slow".into(), SHORT, move || Ok(Slow(SHORT.read * 2, Arc::clone(&slow)))).unwrap();
    let end = Instant::now() + PATIENCE;
    let (mut snapshots, mut deliveries) = (0, 0);
    // As the loop asks: one after the other, each time.
    while snapshots == 0 || deliveries == 0 {
        assert!(Instant::now() < end, "{snapshots} {deliveries}");
        snapshots += u32::from(source.snapshot().is_ok());
        if let Ok(found) = source.policy_objects() {
            assert!(Arc::ptr_eq(&found, &objects));
            deliveries += 1;
        }
        thread::sleep(SHORT.read / 3);
    }
}
