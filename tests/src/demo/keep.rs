//! A demo that was left up: the commands by which a person looks around in it, each working when pasted.

use std::path::PathBuf;

use anyhow::{Context, Result};
use husk_overlay::prefix::Family;

use super::report::{Hint, Kept};
use crate::{Cluster, Pod, process};

/// Where the capture of a kept demo lies.
pub(super) fn pcap_path(cluster: &Cluster) -> PathBuf {
    cluster.scope().directory().join("underlay.pcap")
}

/// What to say about a demo that is about to be left alone.
pub(super) fn describe(cluster: &Cluster, pods: &[(usize, Pod)]) -> Result<Kept> {
    let host = cluster.host(1);
    let mut hints = Vec::new();
    let mut hint = |purpose: &str, command: String| hints.push(Hint { purpose: purpose.to_owned(), command });
    if let [(_, first), .., (_, last)] = pods {
        let (name, netns) = (first.name(), first.netns());
        hint(&format!("enter pod {name}"), format!("nsenter --net={} bash", netns.path().display()));
        hint(
            &format!("from {name} to {}", last.name()),
            format!("ip netns exec {} ping -c 3 {}", netns.name(), last.address(Family::Ipv6)?),
        );
    }
    // Its mount namespace has no name: it lives as long as the daemon does.
    if let Some(daemon) = host.processes().first() {
        let enter = format!("nsenter --target {} --net --mount", daemon.pid);
        let huskctl = process::binary("huskctl")?;
        hint(&format!("ask {}", host.name()), format!("{enter} {} peers", huskctl.display()));
        let programs = huskctl.parent().context("a program lies in a directory")?;
        hint(&format!("enter {}", host.name()), format!("PATH={}:$PATH {enter} bash", programs.display()));
    }
    hint(&format!("log of {}", host.name()), format!("less {}", host.log_path().display()));
    hint("watch the wire", format!("ip netns exec {} tcpdump -n -i any", cluster.scope().name("switch")));
    hint("what it carried", format!("tcpdump -n -r {}", pcap_path(cluster).display()));
    let command = std::env::var("HUSK_DEMO").unwrap_or_else(|_| "hack/demo".to_owned());
    hint("tear down", format!("{command} --down={}", cluster.scope().prefix()));
    Ok(Kept { prefix: cluster.scope().prefix().to_owned(), hints })
}
