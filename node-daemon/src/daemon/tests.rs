use std::sync::mpsc::channel as std_channel;
use std::time::Instant;

use husk_overlay::prefix::Prefix;

use super::*;

fn config() -> Config {
    Config::new(vec!["10.0.0.0/8".parse::<Prefix>().unwrap()])
}

#[test]
fn a_host_name_becomes_the_nodes_name() {
    for (host, name) in [
        ("worker-1", "worker-1"),
        ("Worker-1", "worker-1"),
        ("IP-10-0-0-1.EU.Example.COM", "ip-10-0-0-1.eu.example.com"),
        ("worker.example.", "worker.example"),
        ("localhost1", "localhost1"),
        ("my.localhost", "my.localhost"),
    ] {
        assert_eq!(name_of_host(host).unwrap().as_str(), name, "{host}");
    }
    for host in ["localhost", "LOCALHOST", "localhost.", "localhost.localdomain", "(none)", "", ".", "a_b", "a..b"] {
        let error = format!("{:#}", name_of_host(host).unwrap_err());
        assert!(error.contains(&format!("{host:?}")) && error.contains("set node.name"), "{error}");
    }
}

#[test]
fn a_configured_name_needs_no_host_name() {
    let mut config = config();
    config.node_name = Some(NodeName::new("localhost").unwrap());
    let mut options = Options {
        config: CONFIG_FILE.into(),
        run_directory: marks::RUN_DIRECTORY.into(),
        state_directory: marks::STATE_DIRECTORY.into(),
        node_name: None,
        proc_sys: sysctl::PROC_SYS.into(),
    };
    assert_eq!(node_name(&options, &config).unwrap().as_str(), "localhost");
    options.node_name = Some(NodeName::new("of-the-command-line").unwrap());
    assert_eq!(node_name(&options, &config).unwrap().as_str(), "of-the-command-line");
}

#[test]
fn a_path_that_can_be_no_cluster_directory_is_told_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let (runtime, node) = (runtime(), NodeName::new("a").unwrap());
    let file = directory.path().join("file");
    std::fs::write(&file, "x").unwrap();
    for (path, joined) in [(file.clone(), false), (file.clone(), true), (file.join("below"), false)] {
        let mut config = config();
        config.source = SourceConfig::Directory { path: path.clone() };
        let wake: crate::kubernetes::source::Wake = Arc::new(|| {});
        let opening = Opening {
            node: &node,
            joined,
            limits: Limits::COMMAND,
            runtime: runtime.handle(),
            policy_wake: Arc::clone(&wake),
            wake,
        };
        let Err(error) = source::open(&config, &opening) else { panic!("{} opens", path.display()) };
        let error = format!("{error:#}");
        assert!(error.contains("source.directory.path") && error.contains(path.to_str().unwrap()), "{error}");
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

#[test]
fn a_loop_that_is_stuck_holds_up_no_stop() {
    let (release, stuck) = std_channel::<()>();
    let (told, stopped) = std_channel();
    let started = Instant::now();
    let runtime = runtime();
    let work = move || {
        let _ = stuck.recv();
    };
    runtime.block_on(supervise(work, || told.send(()).unwrap(), std::future::ready(("SIGTERM", ())))).unwrap();
    drop(runtime);
    assert!(stopped.try_recv().is_ok());
    assert!(started.elapsed() < STOP_PATIENCE + Duration::from_secs(5));
    drop(release);
}

#[test]
fn a_loop_that_stops_when_told_is_waited_for() {
    let (stop, told) = std_channel::<()>();
    let (ended, end) = std_channel();
    let work = move || {
        told.recv().unwrap();
        ended.send(()).unwrap();
    };
    runtime().block_on(supervise(work, || stop.send(()).unwrap(), std::future::ready(("SIGTERM", ())))).unwrap();
    assert!(end.try_recv().is_ok());
}

#[test]
fn a_loop_that_ends_by_itself_ends_the_daemon() {
    let nobody = || panic!("nobody is told to stop");
    for work in [|| {}, || panic!("the loop of a test")] {
        let error = runtime().block_on(supervise(work, nobody, std::future::pending::<(&str, ())>())).unwrap_err();
        assert!(error.to_string().contains("ended by itself"), "{error}");
    }
}
