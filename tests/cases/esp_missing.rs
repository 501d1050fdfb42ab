//! A kernel without ESP: the daemon says so and what to do, no pod is made, and nothing leaves in plaintext instead.
//!
//! A kernel that has it proves the opposite: it is not said, and a pod is made.

use std::time::Duration;

use anyhow::{Context, Result};
use husk_tests::kernel::{self, Part};
use husk_tests::probe::Echo;
use husk_tests::{Cluster, ESP_MODES, Leak, eventually};
use serde_json::json;

/// How long what a daemon does by itself may take.
const SOON: Duration = Duration::from_secs(10);

#[test]
fn a_kernel_without_esp_is_told_of_and_sends_nothing() -> Result<()> {
    let has_esp = kernel::has(Part::Esp)?;
    for mode in ESP_MODES {
        let cluster = Cluster::builder().mode(mode).build()?;
        let leak = Leak::watch(&cluster)?;
        let host = cluster.host(1);
        for host in cluster.hosts() {
            host.install_plugin()?;
            host.start_daemon()?;
        }
        if has_esp {
            cluster.wait_ready()?;
            host.add_pod("a")?;
            assert_eq!(host.huskctl_json(["status"])?["issues"], json!([]), "{mode}");
        } else {
            let config = json!({"cniVersion": "1.1.0", "name": "husk", "type": "husk"});
            let mut said = String::new();
            eventually("STATUS to say what is missing", SOON, || {
                let status = host.cni_with("STATUS", None, config.clone())?;
                said.clone_from(&status.stdout);
                Ok(status.error_code() == Some(50) && said.contains("ESP"))
            })
            .with_context(|| format!("{mode}: {said}"))?;
            let status = host.huskctl_json(["status"])?;
            let issues = status["issues"].as_array().context("issues")?;
            let esp = issues.iter().find(|issue| issue["message"].as_str().is_some_and(|text| text.contains("ESP")));
            let esp = esp.with_context(|| format!("{mode}: {status:#}"))?;
            assert_eq!(status["ready"], json!(false), "{mode}");
            assert!(esp["remedy"].as_str().is_some_and(|text| !text.is_empty()), "{mode}: {esp:#}");

            let sandbox = host.sandbox("refused")?;
            let add = host.cni_with("ADD", Some(sandbox.spec()), config)?;
            assert_eq!(add.error_code(), Some(11), "{mode}: {add:?}");
            assert!(add.stdout.contains("ESP"), "{mode}: {add:?}");
            assert!(sandbox.mtu().is_err(), "{mode}: a refused pod has an interface");
            // What the host sends to the other's pods stays here, too.
            for to in ["10.42.0.70", "10.42.200.1", "fd42::7"] {
                let reach = Echo::to(to.parse()?).limit(Duration::from_millis(200)).run(host.netns())?;
                assert!(!reach.arrived(), "{mode}: {reach:?}");
            }
        }
        leak.finish(&cluster)?;
    }
    Ok(())
}
