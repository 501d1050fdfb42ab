//! What fuzzing runs (see `fuzz/`): all that reads what others wrote, for any bytes. Tests run the kept inputs too.
//!
//! Nothing here may panic, and what must hold for every input is asserted.

use std::ffi::OsString;
use std::net::IpAddr;
use std::os::unix::ffi::OsStringExt as _;

use husk_dataplane::pod::PodSpec;
use husk_overlay::mac::MacAddress;
use husk_overlay::prefix::Family;
use husk_overlay::record::DualStack;
use serde_json::{Value, json};

use crate::attachment;
use crate::error::{Code, Failure};
use crate::invocation::{Arguments, Attach, Invocation};
use crate::netconf::NetConf;
use crate::node;
use crate::result::{self, Made};
use crate::version::{self, Version};

/// Boot id of the node files in the corpus.
pub const BOOT_ID: &str = "b";

/// A network configuration on standard input, and everything a command asks it for.
pub fn network_configuration(stdin: &[u8]) {
    assert!(Version::parse(crate::version_for_errors(stdin)).is_ok());
    assert!(version::answer(stdin)["supportedVersions"].is_array());
    match NetConf::parse(stdin) {
        Ok(conf) => {
            assert!(conf.run_file(husk_overlay::ipc::NODE_FILE).is_absolute());
            every_question(&conf, &Arguments::default());
        }
        Err(failure) => assert_tells(&failure),
    }
}

/// The environment, one `NAME=VALUE` in a line, and what a configuration makes of its `CNI_ARGS`.
pub fn environment(lines: &[u8]) {
    let variable = |line: &[u8]| {
        let middle = line.iter().position(|byte| *byte == b'=')?;
        let text = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
        Some((text(&line[..middle]), text(&line[middle + 1..])))
    };
    let invocation = Invocation::read(lines.split(|byte| *byte == b'\n').filter_map(variable));
    let conf = NetConf::parse(br#"{"cniVersion": "1.1.0", "name": "husk", "type": "husk"}"#)
        .expect("a configuration with all it needs");
    let container = match &invocation {
        Ok(Invocation::Add(Attach { container, args, .. }) | Invocation::Check(Attach { container, args, .. })) => {
            every_question(&conf, args);
            container
        }
        Ok(Invocation::Del(container)) => container,
        Ok(Invocation::Status | Invocation::Gc | Invocation::Version) => return,
        Err(failure) => {
            assert_eq!(failure.code, Code::InvalidEnvironment);
            assert!(failure.message.contains("CNI_"), "{failure}");
            return assert_tells(failure);
        }
    };
    // Garbage collection knows an interface's owner by its alias.
    let id = attachment::id(&conf, container);
    assert_eq!(attachment::of_alias(&id.to_string()), Some(id));
}

/// The daemon's `node.json`.
pub fn node_file(text: &[u8]) {
    match node::parse(text, BOOT_ID) {
        Ok(node) => {
            let again = serde_json::to_vec(&node).expect("a node file is written as JSON");
            assert_eq!(node::parse(&again, BOOT_ID), Ok(node));
        }
        Err(reason) => assert!(!reason.is_empty()),
    }
}

/// Asks a configuration for all that the commands want of it.
fn every_question(conf: &NetConf, args: &Arguments) {
    let mac = told(conf.requested_mac(args.mac.as_deref())).flatten();
    assert!(mac.is_none_or(|mac| mac.is_unicast()));
    let addresses = told(conf.requested_addresses(args.ip.as_deref())).unwrap_or_default();
    told(conf.refuse_unknown_fields());
    let kept = told(conf.valid_attachments()).unwrap_or_default();
    assert!(kept.iter().all(|id| id.network == conf.network));
    let (Some(dns), Some(previous)) = (told(conf.dns()), told(conf.previous_result())) else { return };
    told(conf.bandwidth());
    let mappings = told(conf.port_mappings()).unwrap_or_default();
    for (index, mapping) in mappings.iter().enumerate() {
        assert!(mappings[..index].iter().all(|other| !mapping.clashes_with(other)));
    }
    let spec = pod(mac, &addresses);
    let default_routes = spec.addresses.iter().map(Family::of).collect();
    let made = Made { spec: &spec, sandbox: "/run/netns/x", default_routes };
    let before = previous.and_then(|previous| result::find_interface(previous, "eth0"));
    let Some(rendered) = told(result::render(conf.version, previous, &made, &dns)) else { return };
    let rendered = rendered.as_object().expect("a result is an object");
    assert_eq!(rendered.get("cniVersion").and_then(Value::as_str), Some(conf.version.as_str()));
    if before.is_none() {
        // CHECK finds in the result what ADD put there, behind whatever a plugin before us said of an interface that it did
        // not list.
        let found = result::find_interface(rendered, "eth0").expect("the result has the pod's interface");
        assert!(found.addresses.ends_with(&spec.addresses.iter().collect::<Vec<_>>()));
    }
}

/// How a pod of these addresses is wired.
fn pod(mac: Option<MacAddress>, addresses: &[IpAddr]) -> PodSpec {
    let addresses: DualStack = addresses.iter().copied().collect();
    let endpoint = json!({
        "network": "husk", "containerId": "abc", "ifname": "eth0",
        "addresses": addresses,
        "podMac": mac.unwrap_or(MacAddress([2, 0, 0, 0, 0, 2])),
        "hostInterface": "husk00000000001",
        "netns": {"path": "/run/netns/x", "device": 4, "inode": 7},
    });
    PodSpec::of(&serde_json::from_value(endpoint).expect("an endpoint"), 1420)
}

/// The answer, if there is one; a failure has to be one that a runtime understands.
fn told<T>(answer: Result<T, Failure>) -> Option<T> {
    answer.inspect_err(assert_tells).ok()
}

fn assert_tells(failure: &Failure) {
    assert!(!failure.message.is_empty());
    let json = failure.json(Version::NEWEST.as_str());
    assert!(json["code"].as_u64().is_some_and(|code| code > 0) && json["msg"].is_string(), "{json}");
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    /// Runs the kept inputs of a target.
    fn replay(target: &str, run: fn(&[u8])) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
        let mut inputs = 0;
        for item in fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
            run(&fs::read(item.unwrap().path()).unwrap());
            inputs += 1;
        }
        assert!(inputs > 0, "{} is empty", folder.display());
    }

    #[test]
    fn kept_inputs_of_the_network_configuration() {
        replay("network_configuration", super::network_configuration);
    }

    #[test]
    fn kept_inputs_of_the_environment() {
        replay("environment", super::environment);
    }

    #[test]
    fn kept_inputs_of_the_node_file() {
        replay("node_file", super::node_file);
    }
}
