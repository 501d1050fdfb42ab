//! The plugin as a runtime calls it: a process, with hosts and pods as network namespaces. Needs root.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod world;

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use husk_dataplane::netns::Netns;
use husk_ipam::lease::{BootTime, Demand, Supply};
use husk_overlay::endpoint::AttachmentId;
use husk_overlay::ipc::{Attaching, NODE_FILE, Request, Response};
use husk_overlay::prefix::Family;
use serde_json::{Value, json};
use world::{Host, MTU, Pod, outcome};

fn not_ready(reason: &str) -> Response {
    Response::NotReady { reason: reason.to_owned(), issues: Vec::new() }
}

fn id(pod: &Pod) -> AttachmentId {
    AttachmentId {
        network: "husk".parse().unwrap(),
        container_id: pod.container_id.parse().unwrap(),
        ifname: "eth0".parse().unwrap(),
    }
}

/// Makes a lease as an ADD does that is killed at once.
fn lease_only(host: &Host, pod: &Pod) {
    let blocks = ["10.42.0.0/26", "fd42::/122"].map(|block| block.parse().unwrap());
    let families = BTreeSet::from(Family::ALL);
    let supply = Supply {
        blocks: &blocks,
        families: &families,
        reserved: husk_overlay::plan::router_addresses(&blocks.into()),
        cool_down: Duration::from_secs(30),
    };
    let demand = Demand::plain(id(pod), pod.netns.identity().unwrap());
    host.store().lock().unwrap().allocate(&supply, &demand, BootTime::now()).unwrap();
}

#[test]
fn a_pod_lives_and_dies_in_every_version() {
    let host = Host::ready();
    for version in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let pod = Pod::new("abc");
        let conf = json!({"cniVersion": version});
        let result = host.add_with(&pod, conf.clone()).ok();
        assert_eq!(result["cniVersion"], version);
        assert_eq!(result["ips"].as_array().unwrap().len(), 2);
        assert_eq!(result["interfaces"][1]["sandbox"], pod.path());
        assert_eq!(pod.interfaces(), 2);

        let endpoint = host.store().find(&id(&pod)).unwrap().unwrap();
        assert_eq!(endpoint.display_name(), "default/abc");
        let checked = host.command("CHECK", &pod, json!({"cniVersion": version, "prevResult": result}));
        if version == "0.3.1" {
            assert_eq!(checked.code(), 1);
        } else {
            assert_eq!(checked.ok(), Value::Null);
        }
        for _ in 0..2 {
            assert_eq!(host.command("DEL", &pod, conf.clone()).ok(), Value::Null);
            host.assert_empty();
            assert_eq!(pod.interfaces(), 1);
        }
    }
    assert!(host.asked.lock().unwrap().contains(&Request::Admit { id: id(&Pod::new("abc")) }));
    for ended in [Attaching::Add, Attaching::Del] {
        host.await_asked(|request| {
            matches!(request, Request::Ended { command, error: None, microseconds: 1.. } if *command == ended)
        });
    }
}

#[test]
fn one_family_alone() {
    for (block, lead) in [("10.42.0.0/26", "10.42.0.1"), ("fd42::/122", "fd42::1")] {
        let host = Host::ready();
        host.write_node_file(&[block], |_| ());
        assert_eq!(host.add(&Pod::new("abc")).addresses(), [lead]);
    }
}

#[test]
fn what_the_runtime_asks_for_it_gets() {
    let (host, pod) = (Host::ready(), Pod::new("abc"));
    let asked = json!({
        "runtimeConfig": {"ips": ["10.42.0.33/24"], "mac": "02:00:5e:10:00:01", "dns": {"servers": ["10.0.0.53"]}},
        "dns": {"domain": "cluster.local"},
    });
    let result = host.add_with(&pod, asked).ok();
    assert_eq!(result["ips"][0]["address"], "10.42.0.33/32");
    assert_eq!(result["interfaces"][1]["mac"], "02:00:5e:10:00:01");
    assert_eq!(result["dns"], json!({"nameservers": ["10.0.0.53"], "domain": "cluster.local"}));
    assert!(pod.run("ip link show eth0").contains("02:00:5e:10:00:01"));
    let checked = host.command("CHECK", &pod, json!({"prevResult": result}));
    assert_eq!(checked.ok(), Value::Null);

    let other = Pod::new("other");
    let refused = host.add_with(&other, json!({"runtimeConfig": {"ips": ["10.42.0.33"]}}));
    assert_eq!(refused.code(), 7);
    assert!(refused.message().contains("10.42.0.33"), "{refused:?}");
}

#[test]
fn a_chained_result_is_extended() {
    let host = Host::ready();
    let previous = json!({"cniVersion": "1.1.0", "interfaces": [{"name": "x"}], "ips": [], "vendor": 1});
    let result = host.add_with(&Pod::new("abc"), json!({"prevResult": previous})).ok();
    assert_eq!(result["vendor"], 1);
    assert_eq!(result["ips"][0]["interface"], 2);
}

#[test]
fn without_a_daemon_add_says_try_again_and_leaves_nothing() {
    let (host, pod) = (Host::new(), Pod::new("abc"));
    let failed = host.add(&pod);
    assert_eq!(failed.code(), 11);
    assert!(failed.message().contains("huskd is not running"), "{failed:?}");
    host.assert_empty();
    assert_eq!(host.del(&pod).ok(), Value::Null);

    fs::remove_file(host.file(NODE_FILE)).unwrap();
    assert_eq!(host.add(&pod).code(), 11);
    for (change, word) in [("version", "husk-cni install"), ("boot", "booted"), ("garbage", "not understood")] {
        host.write_node_file(&["10.42.0.0/26"], |node| match change {
            "version" => node.version = 99,
            "boot" => node.boot_id = "another".to_owned(),
            _ => {}
        });
        if change == "garbage" {
            fs::write(host.file(NODE_FILE), b"{\"version\": \"x\"").unwrap();
        }
        let failed = host.add(&pod);
        assert_eq!(failed.code(), 11);
        assert!(failed.message().contains(word), "{word}: {failed:?}");
    }
    assert!(!host.store().directory().exists());
}

#[test]
fn a_daemon_that_becomes_ready_between_two_looks_is_no_failure() {
    let (host, pod) = (Host::new(), Pod::new("abc"));
    let (path, aside) = (host.file(NODE_FILE), host.file("aside"));
    fs::rename(&path, &aside).unwrap();
    host.serve(move |request| {
        if matches!(request, Request::Ready) {
            fs::rename(&aside, &path).unwrap();
        }
        Some(Response::Done)
    });
    host.add(&pod).ok();
}

#[test]
fn a_pod_that_is_not_admitted_is_undone() {
    for (answer, code, word) in [
        (Some(not_ready("no route to any peer")), 11, "no route to any peer"),
        (Some(Response::Refused { reason: "a policy forbids it".to_owned() }), 105, "a policy forbids it"),
        (None, 11, "closed the connection"),
    ] {
        let (host, pod) = (Host::new(), Pod::new("abc"));
        host.serve(move |request| if matches!(request, Request::Admit { .. }) { answer.clone() } else { None });
        let failed = host.add(&pod);
        assert_eq!(failed.code(), code);
        assert!(failed.message().contains(word), "{failed:?}");
        host.assert_empty();
        assert_eq!(pod.interfaces(), 1);
    }
}

#[test]
fn a_failure_in_the_middle_is_undone() {
    let (host, pod) = (Host::ready(), Pod::new("abc"));
    pod.run("ip link add other type bridge");
    pod.run("ip link set other up");
    pod.run("ip route add default dev other");
    // And in every table that would be for an interface that is not the first.
    for index in 2..9 {
        pod.run(&format!("ip route add default dev other table {}", 7200 + index));
    }
    let failed = host.add(&pod);
    assert_eq!(failed.code(), 102);
    assert!(failed.message().contains("default via 169.254.1.1 dev eth0 table 720"), "{failed:?}");
    host.assert_empty();
    pod.run("ip link del other");
    assert!(host.add(&pod).success);
}

#[test]
fn a_second_add_is_an_error_and_harms_nobody() {
    let (host, pod) = (Host::ready(), Pod::new("abc"));
    let result = host.add(&pod).ok();
    let failed = host.add(&pod);
    assert_eq!(failed.code(), 101);
    assert!(failed.message().contains("CNI DEL"), "{failed:?}");
    assert_eq!(host.command("CHECK", &pod, json!({"prevResult": result})).ok(), Value::Null);
}

#[test]
fn an_interface_of_somebody_else_is_an_error_and_stays() {
    let (host, pod) = (Host::ready(), Pod::new("abc"));
    pod.run("ip link add eth0 type bridge");
    let failed = host.add(&pod);
    assert_eq!(failed.code(), 101);
    host.assert_empty();
    assert_eq!(host.del(&pod).ok(), Value::Null);
    assert_eq!(pod.interfaces(), 2);
}

#[test]
fn an_add_that_was_killed_early_does_not_block_the_next() {
    let (host, pod) = (Host::ready(), Pod::new("abc"));
    lease_only(&host, &pod);
    assert_eq!(host.add(&pod).addresses().len(), 2);
    assert_eq!(host.leased(), ["abc"]);
}

#[test]
fn an_add_that_was_killed_late_is_cleaned_up_by_del() {
    let (host, pod) = (Host::new(), Pod::new("abc"));
    host.serve(|request| {
        if matches!(request, Request::Admit { .. }) {
            std::thread::sleep(Duration::from_secs(3600));
        }
        Some(Response::Done)
    });
    let mut child = host.start_add(&pod, json!({}));
    let deadline = Instant::now() + Duration::from_secs(20);
    while !host.asked.lock().unwrap().iter().any(|request| matches!(request, Request::Admit { .. })) {
        assert!(Instant::now() < deadline, "the plugin never asked");
        std::thread::yield_now();
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!((host.wired(), host.leased()), (vec!["abc".to_owned()], vec!["abc".to_owned()]));
    assert_eq!(host.add(&pod).code(), 101);
    assert_eq!(host.del(&pod).ok(), Value::Null);
    host.assert_empty();
    assert_eq!(pod.interfaces(), 1);
}

#[test]
fn an_add_that_is_deleted_meanwhile_fails_and_leaves_nothing() {
    let (host, pod) = (Arc::new(Host::new()), Arc::new(Pod::new("abc")));
    let (weak, same_pod) = (Arc::downgrade(&host), Arc::clone(&pod));
    host.serve(move |request| {
        if matches!(request, Request::Admit { .. }) {
            assert_eq!(weak.upgrade()?.del(&same_pod).ok(), Value::Null);
        }
        Some(Response::Done)
    });
    let failed = host.add(&pod);
    assert_eq!(failed.code(), 11);
    assert!(failed.message().contains("was deleted"), "{failed:?}");
    host.assert_empty();
    assert_eq!(pod.interfaces(), 1);
}

#[test]
fn del_needs_nothing() {
    let host = Host::new();
    let pod = Pod::new("abc");
    assert_eq!(host.del(&pod).ok(), Value::Null);
    assert!(!host.store().directory().exists());

    // The namespace is gone, and the daemon and its directory with it.
    host.serve(|_| Some(Response::Done));
    assert!(host.add(&pod).success);
    let stdin = host.conf(json!({"mtu": "nonsense", "prevResult": 7})).to_string();
    let variables = [("CNI_COMMAND", "DEL"), ("CNI_CONTAINERID", "abc"), ("CNI_IFNAME", "eth0"), ("CNI_NETNS", "")];
    drop(pod);
    fs::remove_file(host.file("daemon.sock")).unwrap();
    fs::remove_file(host.file(NODE_FILE)).unwrap();
    assert_eq!(host.call(&variables, stdin.as_bytes()).ok(), Value::Null);
    host.assert_empty();
}

#[test]
fn a_daemon_deletes_the_interface_by_name_and_index() {
    let (host, pod) = (Host::new(), Pod::new("one"));
    let netns = Arc::new(host.netns.run_in(|| Netns::current().unwrap()).unwrap());
    let done = Arc::new(std::sync::Mutex::new(Vec::new()));
    host.serve({
        let done = Arc::clone(&done);
        move |request| {
            if let Request::Detach { interface, index } = request {
                let vacated = netns.run_in(|| husk_dataplane::pod::vacate(interface, *index, ())).unwrap().unwrap();
                done.lock().unwrap().push((interface.clone(), vacated));
            }
            Some(Response::Done)
        }
    });
    host.add(&pod).ok();
    assert!(host.del(&pod).success);
    assert_eq!(*done.lock().unwrap(), [(id(&pod).host_interface(), true)]);
    host.assert_empty();
    // There is nothing to ask for any more.
    assert!(host.del(&pod).success);
    assert_eq!(done.lock().unwrap().len(), 1);
}

#[test]
fn del_does_without_a_daemon_that_lies_refuses_vanishes_or_hangs() {
    type Answer = fn() -> Option<Response>;
    let hang: Answer = || loop {
        std::thread::park();
    };
    let refuse: Answer = || Some(Response::Refused { reason: "the request is not understood".to_owned() });
    for (name, answer) in
        [("lies", (|| Some(Response::Done)) as Answer), ("refuses", refuse), ("vanishes", || None), ("hangs", hang)]
    {
        let (host, pod) = (Host::new(), Pod::new("one"));
        host.serve(move |request| match request {
            Request::Detach { .. } => answer(),
            _ => Some(Response::Done),
        });
        host.add(&pod).ok();
        let started = Instant::now();
        assert!(host.del(&pod).success, "{name}");
        assert!(started.elapsed() < Duration::from_secs(5), "{name}");
        host.assert_empty();
        assert!(host.asked.lock().unwrap().iter().any(|it| matches!(it, Request::Detach { .. })), "{name}");
    }
}

#[test]
fn del_removes_a_damaged_lease() {
    let (host, pod) = (Host::ready(), Pod::new("abc"));
    host.add(&pod).ok();
    for item in fs::read_dir(host.store().directory()).unwrap() {
        fs::write(item.unwrap().path(), b"garbage").unwrap();
    }
    assert_eq!(host.del(&pod).ok(), Value::Null);
    host.assert_empty();
}

#[test]
fn many_adds_and_dels_at_once() {
    let host = Host::ready();
    let pods: Vec<Pod> = (0..16).map(|number| Pod::new(&format!("pod{number:02}"))).collect();
    let children: Vec<_> = pods.iter().map(|pod| host.start_add(pod, json!({}))).collect();
    let addresses: Vec<String> = children.into_iter().flat_map(|child| outcome(child).addresses()).collect();
    assert_eq!(addresses.len(), 32);
    assert_eq!(addresses.iter().collect::<BTreeSet<_>>().len(), 32);
    assert_eq!(host.wired().len(), 16);
    std::thread::scope(|scope| {
        for pod in &pods {
            let host = &host;
            scope.spawn(move || assert_eq!(host.del(pod).ok(), Value::Null));
        }
    });
    host.assert_empty();
}

#[test]
fn a_full_node_gets_another_block() {
    let host = Arc::new(Host::new());
    host.write_node_file(&["10.42.0.0/31"], |_| ());
    let weak = Arc::downgrade(&host);
    host.serve(move |request| {
        if let Request::Blocks { families } = request {
            assert_eq!(*families, BTreeSet::from([Family::Ipv4]));
            weak.upgrade()?.write_node_file(&["10.42.0.0/31", "10.42.9.0/31"], |_| ());
        }
        Some(Response::Done)
    });
    assert_eq!(host.add(&Pod::new("a")).addresses(), ["10.42.0.1"]);
    assert_eq!(host.add(&Pod::new("b")).addresses(), ["10.42.9.0"]);
    assert_eq!(host.add(&Pod::new("c")).addresses(), ["10.42.9.1"]);
    let failed = host.add(&Pod::new("d"));
    assert_eq!(failed.code(), 100);
    assert!(failed.message().contains("3 leased") && failed.message().contains("pool"), "{failed:?}");
}

#[test]
fn a_resting_address_serves_when_there_is_no_other() {
    let host = Host::new();
    host.write_node_file(&["10.42.0.0/31"], |_| ());
    let refusal = Response::Refused { reason: "the pool is exhausted".to_owned() };
    host.serve(move |request| match request {
        Request::Blocks { .. } => Some(refusal.clone()),
        _ => Some(Response::Done),
    });
    let (a, b) = (Pod::new("a"), Pod::new("b"));
    assert_eq!(host.add(&a).addresses(), ["10.42.0.1"]);
    assert!(host.del(&a).success);
    assert_eq!(host.add(&b).addresses(), ["10.42.0.1"]);
    let failed = host.add(&a);
    assert_eq!(failed.code(), 100);
    assert!(failed.message().contains("the pool is exhausted"), "{failed:?}");
}

#[test]
fn check_tells_what_is_wrong() {
    let (host, pod) = (Host::ready(), Pod::new("abc"));
    let result = host.add(&pod).ok();
    let check = |extra: &Value| host.command("CHECK", &pod, extra.clone());
    let conf = json!({"prevResult": result});
    assert_eq!(check(&json!({})).code(), 7);

    pod.run("ip address add 192.0.2.7/32 dev eth0");
    assert_eq!(check(&conf).ok(), Value::Null);
    pod.run("ip link set eth0 mtu 1300");
    pod.run("ip -6 route del default");
    let failed = check(&conf);
    assert_eq!(failed.code(), 103);
    for word in ["MTU 1300 instead of 1420", "default via fe80::1"] {
        assert!(failed.message().contains(word), "{word}: {failed:?}");
    }
    pod.run("ip link set eth0 mtu 1420");
    pod.run("ip -6 route add default via fe80::1 dev eth0");
    assert_eq!(check(&conf).ok(), Value::Null);

    // The daemon has adapted its pods to another underlay since.
    host.write_node_file(&["10.42.0.0/26", "fd42::/122"], |node| node.pod_mtu = MTU - 20);
    assert!(check(&conf).message().contains("1400"));
    fs::remove_file(host.file(NODE_FILE)).unwrap();
    assert_eq!(check(&conf).ok(), Value::Null);

    host.store().release(&id(&pod), BootTime::now()).unwrap();
    assert!(check(&conf).message().contains("no lease"));
}

#[test]
fn status_is_the_daemons_word() {
    let host = Host::new();
    let failed = host.plain("STATUS", json!({}));
    assert_eq!(failed.code(), 50);
    assert!(failed.message().contains("huskd is not running"), "{failed:?}");
    host.serve(|_| Some(not_ready("the pool is exhausted")));
    let failed = host.plain("STATUS", json!({}));
    assert_eq!(failed.code(), 50);
    assert!(failed.message().contains("the pool is exhausted"), "{failed:?}");

    let host = Host::ready();
    assert_eq!(host.plain("STATUS", json!({})).ok(), Value::Null);
    assert_eq!(host.plain("STATUS", json!({"cniVersion": "1.0.0"})).code(), 1);
    fs::remove_file(host.file(NODE_FILE)).unwrap();
    assert_eq!(host.plain("STATUS", json!({})).code(), 50);
}

#[test]
fn gc_removes_what_is_not_valid_and_nothing_else() {
    let host = Host::ready();
    let pods = ["valid", "lost", "leaseless", "unwired"].map(Pod::new);
    let [valid, lost, leaseless, unwired] = &pods;
    for pod in [valid, lost, leaseless] {
        host.add(pod).ok();
    }
    host.store().release(&id(leaseless), BootTime::now()).unwrap();
    lease_only(&host, unwired);
    let foreign = Pod::new("foreign");
    host.add_with(&foreign, json!({"name": "another"})).ok();
    host.run("ip link add husk0123456789a type bridge");

    assert_eq!(host.gc(&[valid], json!({})).ok(), Value::Null);
    assert_eq!(host.leased(), ["foreign", "valid"]);
    assert!(host.run("ip link show husk0123456789a").contains("husk0123456789a"));
    host.run("ip link del husk0123456789a");
    assert_eq!(host.wired(), ["foreign", "valid"]);
    assert_eq!(lost.interfaces() + leaseless.interfaces(), 2);
    assert_eq!(valid.interfaces(), 2);

    assert_eq!(host.gc(&[], json!({"name": "another"})).ok(), Value::Null);
    assert_eq!(host.gc(&[], json!({})).ok(), Value::Null);
    host.assert_empty();
    assert_eq!(host.plain("GC", json!({})).code(), 7);
    assert_eq!(host.gc(&[], json!({"cniVersion": "1.0.0"})).code(), 1);
}

#[test]
fn gc_spares_an_add_under_way() {
    let host = Arc::new(Host::new());
    let weak = Arc::downgrade(&host);
    host.serve(move |request| {
        if matches!(request, Request::Admit { .. }) {
            assert_eq!(weak.upgrade()?.gc(&[], json!({})).ok(), Value::Null);
        }
        Some(Response::Done)
    });
    let pod = Pod::new("abc");
    let result = host.add(&pod).ok();
    assert_eq!(host.command("CHECK", &pod, json!({"prevResult": result})).ok(), Value::Null);
    assert_eq!(host.gc(&[], json!({})).ok(), Value::Null);
    host.assert_empty();
}

#[test]
fn gc_goes_on_past_what_it_cannot_judge_and_reports_it() {
    let host = Host::ready();
    let (damaged, lost) = (Pod::new("damaged"), Pod::new("lost"));
    host.add(&damaged).ok();
    for item in fs::read_dir(host.store().directory()).unwrap() {
        let path = item.unwrap().path();
        if path.extension().is_some_and(|it| it == "json") {
            fs::write(path, b"garbage").unwrap();
        }
    }
    host.add(&lost).ok();
    let failed = host.gc(&[], json!({}));
    assert_eq!(failed.code(), 104);
    assert!(failed.message().contains(".json"), "{failed:?}");
    assert_eq!(host.wired(), ["damaged"], "an interface with a lease stays, however damaged that is");
}

#[test]
fn the_host_is_no_pod() {
    let host = Host::ready();
    let own = Pod {
        container_id: "abc".to_owned(),
        netns: host.netns.run_in(husk_dataplane::netns::Netns::current).unwrap().unwrap(),
    };
    let failed = host.add(&own);
    assert_eq!(failed.code(), 4);
    assert!(failed.message().contains("CNI_NETNS") && failed.message().contains("host's own"), "{failed:?}");
    for path in ["/nonexistent", "/etc/passwd", "/proc/self/ns/mnt"] {
        let variables =
            [("CNI_COMMAND", "ADD"), ("CNI_CONTAINERID", "abc"), ("CNI_IFNAME", "eth0"), ("CNI_NETNS", path)];
        let failed = host.call(&variables, host.conf(json!({})).to_string().as_bytes());
        assert_eq!(failed.code(), 4);
        assert!(failed.message().contains("CNI_NETNS") && failed.message().contains(path), "{failed:?}");
    }
    host.assert_empty();
}

#[test]
fn errors_are_json_of_the_right_version_and_code() {
    let host = Host::ready();
    let pod = Pod::new("abc");
    let call = |conf: Value| host.command("ADD", &pod, conf);
    let failed = call(json!({"mtu": 1400}));
    assert_eq!(failed.code(), 2);
    assert!(failed.message().contains("mtu = 1400"), "{failed:?}");
    assert_eq!(call(json!({"cniVersion": "0.2.0"})).code(), 1);
    assert_eq!(call(json!({"cniVersion": "0.2.0"})).output["cniVersion"], "1.1.0");
    assert_eq!(call(json!({"cniVersion": "0.4.0", "name": "/"})).output["cniVersion"], "0.4.0");
    assert_eq!(call(json!({"name": ""})).code(), 7);
    assert_eq!(host.call(&[("CNI_COMMAND", "STATUS")], b"{").code(), 6);
    let failed = host.call(&[("CNI_COMMAND", "ADD")], b"{}");
    assert_eq!(failed.code(), 4);
    for name in ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"] {
        assert!(failed.message().contains(name), "{failed:?}");
    }
    assert_eq!(failed.stderr, "");
    host.assert_empty();
}

#[test]
fn version_and_the_tool() {
    let host = Host::new();
    let answer = host.call(&[("CNI_COMMAND", "VERSION")], br#"{"cniVersion": "0.4.0"}"#).ok();
    assert_eq!(answer["cniVersion"], "0.4.0");
    assert_eq!(answer["supportedVersions"], json!(["0.3.1", "0.4.0", "1.0.0", "1.1.0"]));

    let bin = host.file("bin");
    let tool = |arguments: &[&str]| Command::new(env!("CARGO_BIN_EXE_husk-cni")).args(arguments).output().unwrap();
    let installed = tool(&["install", "--bin-dir", bin.to_str().unwrap()]);
    assert!(installed.status.success(), "{installed:?}");
    assert_eq!(fs::read(bin.join("husk")).unwrap(), fs::read(env!("CARGO_BIN_EXE_husk-cni")).unwrap());
    assert!(String::from_utf8(tool(&["--help"]).stdout).unwrap().contains("install"));
    assert!(tool(&["version"]).status.success() && tool(&["--version"]).status.success());
    assert!(!tool(&[]).status.success());
}

#[test]
fn the_daemon_is_told_how_an_add_failed() {
    let host = Host::new();
    host.serve(|request| {
        let not_ready = Response::NotReady { reason: "no key yet".into(), issues: Vec::new() };
        Some(if matches!(request, Request::Admit { .. }) { not_ready } else { Response::Done })
    });
    assert_eq!(host.add(&Pod::new("abc")).code(), 11);
    let told = |request: &Request| matches!(request, Request::Ended { command: Attaching::Add, error: Some(11), .. });
    host.await_asked(told);
}
