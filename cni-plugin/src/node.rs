//! `node.json`: the daemon's word about MTU and blocks.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use husk_overlay::ipc::{NodeFile, VERSION};
use husk_overlay::prefix::Family;
use serde::Deserialize;

use crate::error::{Code, Failure};

/// Smallest MTU in bytes of a link that carries a family (RFC 791 and RFC 8200 section 5).
fn least_mtu(family: Family) -> u32 {
    match family {
        Family::Ipv4 => 68,
        Family::Ipv6 => 1280,
    }
}

/// Reads the file. Whatever is wrong with it is the daemon's to put right, so that the runtime should try again.
pub(crate) fn read(path: &Path) -> Result<NodeFile, Failure> {
    let text = fs::read(path).map_err(|error| {
        let reason = match error.kind() {
            ErrorKind::NotFound => "it does not exist: huskd has not become ready since the host was started; \
                                    look at its log, or start it"
                .to_owned(),
            _ => format!("it cannot be read: {error}"),
        };
        not_ready(path, &reason)
    })?;
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map_err(|error| Failure::new(Code::Io, format!("read /proc/sys/kernel/random/boot_id: {error}")))?;
    parse(&text, boot_id.trim()).map_err(|reason| not_ready(path, &reason))
}

fn not_ready(path: &Path, reason: &str) -> Failure {
    Failure::new(Code::TryAgainLater, format!("no pod can be connected by {}: {reason}", path.display()))
}

/// Reads the content, which has to be of this boot; else the reason why no pod can be connected.
pub(crate) fn parse(text: &[u8], boot_id: &str) -> Result<NodeFile, String> {
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    let garbage = |error: serde_json::Error| format!("it is not understood ({error}); restart huskd");
    let Versioned { version } = serde_json::from_slice(text).map_err(garbage)?;
    if version != VERSION {
        return Err(format!(
            "its version is {version}, but this plugin knows {VERSION}: huskd and the plugin are of different releases; \
             install the plugin of huskd's release (husk-cni install)"
        ));
    }
    let node: NodeFile = serde_json::from_slice(text).map_err(garbage)?;
    if node.boot_id != boot_id {
        return Err("it was written before the host was last booted; huskd has not become ready since".to_owned());
    }
    if let Some(family) = node.families.iter().find(|family| node.pod_mtu < least_mtu(**family)) {
        let (mtu, least) = (node.pod_mtu, least_mtu(*family));
        return Err(format!("its pod MTU {mtu} is too small for {family}, which needs {least}; look at huskctl mtu"));
    }
    Ok(node)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GOOD: &str = r#"{"version":1,"bootId":"b","podMtu":1420,"blocks":["10.42.0.0/26"],"families":["ipv4"],
        "router":{"ipv4":"10.42.0.0"},"clusterCidrs":["10.42.0.0/16"],"coolDown":30}"#;

    #[test]
    fn reasons() {
        assert_eq!(parse(GOOD.as_bytes(), "b").unwrap().pod_mtu, 1420);
        let reason = |text: &str, boot_id| parse(text.as_bytes(), boot_id).unwrap_err();
        assert!(reason(GOOD, "another").contains("booted"));
        assert!(reason(&GOOD.replace("\"version\":1", "\"version\":2"), "b").contains("husk-cni install"));
        assert!(reason(&GOOD.replace("1420", "0"), "b").contains("MTU 0"));
        let ipv6 = GOOD.replace("[\"ipv4\"]", "[\"ipv4\",\"ipv6\"]");
        assert!(reason(&ipv6.replace("1420", "1279"), "b").contains("1280"));
        assert!(parse(ipv6.replace("1420", "1280").as_bytes(), "b").is_ok());
        assert!(reason(&GOOD.replace("10.42.0.0/26", "10.42.0.1/26"), "b").contains("10.42.0.0/26"));
        let failure = read(Path::new("/nonexistent/node.json")).unwrap_err();
        assert_eq!(failure.code, Code::TryAgainLater);
        assert!(failure.message.contains("huskd"), "{failure}");
    }

    proptest! {
        #[test]
        fn no_content_panics(text in proptest::collection::vec(any::<u8>(), 0..100), cut in 0..GOOD.len(), byte in any::<u8>()) {
            prop_assert!(parse(&text, "b").is_err());
            prop_assert!(parse(&GOOD.as_bytes()[..cut], "b").is_err());
            let mut damaged = GOOD.as_bytes().to_vec();
            damaged[cut] = byte;
            let _ = parse(&damaged, "b");
        }
    }
}
