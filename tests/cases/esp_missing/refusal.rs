//! What a host does whose kernel lacks ESP.

use std::time::Duration;

use anyhow::{Context, Result};
use husk_tests::probe::Echo;
use husk_tests::{Cluster, eventually};
use serde_json::json;

/// How long what a daemon does by itself may take.
const SOON: Duration = Duration::from_secs(10);

/// The first host, whose daemon runs, says what is missing and what to do, makes no pod, and sends nothing.
pub(crate) fn tell(cluster: &Cluster) -> Result<()> {
    let (host, mode) = (cluster.host(1), cluster.mode());
    let config = json!({"cniVersion": "1.1.0", "name": "husk", "type": "husk"});
    let mut said = String::new();
    eventually("STATUS to say what is missing", SOON, || {
        let status = host.cni_with("STATUS", None, config.clone())?;
        said.clone_from(&status.stdout);
        Ok(status.error_code() == Some(51) && said.contains("ESP"))
    })
    .with_context(|| format!("{mode}: {said}"))?;
    let status = host.huskctl_json(["status"])?;
    let issues = status["issues"].as_array().context("issues")?;
    let esp = issues.iter().find(|issue| issue["message"].as_str().is_some_and(|text| text.contains("ESP")));
    let esp = esp.with_context(|| format!("{mode}: {status:#}"))?;
    assert_eq!((&status["ready"], &esp["severity"]), (&json!(false), &json!("blocking")), "{mode}");
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
    Ok(())
}
