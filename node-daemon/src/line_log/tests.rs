use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::time::Instant;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::*;

const PATIENCE: Duration = Duration::from_secs(30);

fn node() -> NodeName {
    NodeName::new("node-a").unwrap()
}

fn config(directory: &Path) -> DecisionLogs {
    DecisionLogs { audit: Some(directory.join("audit.jsonl")), ..DecisionLogs::default() }
}

fn left(number: usize) -> Event {
    Event::PeerLeft { peer: format!("node-{number}").parse().unwrap() }
}

fn lines(path: &Path) -> Vec<LogLine> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Runs with a small file system of its own.
fn on_small_disk(work: impl FnOnce(&Path) + Send) {
    let directory = tempfile::tempdir().unwrap();
    let world = || {
        let none = None::<&str>;
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        mount(Some("tmpfs"), directory.path(), Some("tmpfs"), MsFlags::empty(), Some("size=64k")).unwrap();
        work(directory.path());
    };
    thread::scope(|scope| scope.spawn(world).join().unwrap());
}

#[test]
fn a_line_says_when_where_what_and_by_whom() {
    let by = Client { uid: Some(0), pid: Some(7), command: Some("huskctl".into()), login_uid: Some(1000) };
    let entry = Entry::Audit(Event::QuarantineSet { pod: "shop/db".into(), by });
    let line = line(Timestamp::UNIX_EPOCH, &node(), entry).unwrap();
    let expected = "{\"time\":\"1970-01-01T00:00:00Z\",\"node\":\"node-a\",\"kind\":\"audit\",\"event\":\"quarantineSet\",\
        \"pod\":\"shop/db\",\"by\":{\"uid\":0,\"pid\":7,\"command\":\"huskctl\",\"loginUid\":1000}}\n";
    assert_eq!(line, expected);
}

#[test]
fn a_flow_is_logged_as_it_is_shown() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("flows.jsonl");
    let logs = Logs::start(&DecisionLogs { flows: Some(path.clone()), ..DecisionLogs::default() }, &node()).unwrap();
    let flow = crate::flows::example();
    logs.flow(&flow);
    logs.decision(|| unreachable!("nobody wants decisions"));
    logs.flush();
    let text = fs::read_to_string(&path).unwrap();
    let line: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&line["kind"], &line["event"], &line["node"]), (&"flow".into(), &"denied".into(), &"node-a".into()));
    assert_eq!(line["flow"], serde_json::to_value(&flow).unwrap());
    assert_eq!(lines(&path)[0].entry, Entry::Flow { event: flow.verdict, flow: Box::new(flow) });
}

#[test]
fn a_full_disk_holds_up_nobody_is_told_and_what_is_missing_is_counted() {
    on_small_disk(|disk| {
        let logs = Logs::start(&config(disk), &node()).unwrap();
        let path = disk.join("audit.jsonl");
        // All but a little of the disk, so that a line is cut short within.
        fs::write(disk.join("filler"), vec![0; 60 << 10]).unwrap();
        let many = 1000;
        let begun = Instant::now();
        (0..many).for_each(|number| logs.decision(|| left(number)));
        while logs.issues().is_empty() {
            assert!(begun.elapsed() < PATIENCE);
            thread::yield_now();
        }
        let issue = logs.issues().remove(0);
        assert_eq!((issue.kind, issue.subject.as_str()), (IssueKind::LogUnwritable, path.to_str().unwrap()));
        assert!(issue.message.contains("space"), "{issue}");
        logs.flush();
        let written = lines(&path).len();
        assert!(written > 0 && written < many, "{written} lines, all of them whole");

        fs::remove_file(disk.join("filler")).unwrap();
        logs.decision(|| left(many));
        logs.flush();
        assert_eq!(logs.issues(), []);
        let after: Vec<Entry> = lines(&path).into_iter().skip(written).map(|line| line.entry).collect();
        let lost = u64::try_from(many - written).unwrap();
        assert_eq!(after, [Entry::Audit(Event::LinesLost { count: lost }), Entry::Audit(left(many))]);
    });
}

#[test]
fn a_disk_with_room_again_is_found_without_another_line() {
    on_small_disk(|disk| {
        let logs = Logs::start(&config(disk), &node()).unwrap();
        fs::write(disk.join("filler"), vec![0; 64 << 10]).unwrap();
        logs.decision(|| left(1));
        logs.flush();
        assert_eq!(logs.issues().len(), 1);
        fs::remove_file(disk.join("filler")).unwrap();
        let begun = Instant::now();
        while !logs.issues().is_empty() {
            assert!(begun.elapsed() < PATIENCE, "{:?}", logs.issues());
            thread::yield_now();
        }
        let entries: Vec<Entry> = lines(&disk.join("audit.jsonl")).into_iter().map(|line| line.entry).collect();
        assert_eq!(entries, [Entry::Audit(Event::LinesLost { count: 1 })]);
    });
}

#[test]
fn a_queue_that_is_full_drops_and_counts() {
    let directory = tempfile::tempdir().unwrap();
    // A writer that does not write yet.
    let (queue, jobs) = sync_channel(2);
    let shared = Arc::<Shared>::default();
    let path = directory.path().join("log");
    let log = LineLog { path: path.clone(), node: node(), queue, shared: Arc::clone(&shared) };
    (0..5).for_each(|number| log.tell(Timestamp::now(), Entry::Audit(left(number))));
    assert_eq!(shared.missing.load(Ordering::Relaxed), 3);
    drop(log);
    let writer = Writer { file: LineFile::new(&path, LogLimits::default()), node: node(), shared };
    writer.write_all(&jobs);
    let entries: Vec<Entry> = lines(&path).into_iter().map(|line| line.entry).collect();
    let expected = [Event::LinesLost { count: 3 }, left(0), left(1)].map(Entry::Audit);
    assert_eq!(entries, expected);
}

#[test]
fn who_asks_is_known_by_the_kernel() {
    let pid = i32::try_from(std::process::id()).unwrap();
    let client = Client::of(fs::metadata("/proc/self").unwrap().uid(), Some(pid));
    assert_eq!((client.pid, client.command.is_some()), (Some(pid), true));
    assert_ne!(client.login_uid, Some(u32::MAX));
    assert_eq!(Client::of(7, None), Client { uid: Some(7), ..Client::default() });
}
