//! A kernel without ESP: the daemon says so and what to do, no pod is made, and nothing leaves in plaintext instead.
//!
//! A kernel that has it proves the opposite: it is not said, and a pod is made. `vm_esp_missing` takes it away from one.

use anyhow::Result;
use husk_tests::kernel::{self, Part};
use husk_tests::{Cluster, ESP_MODES, Host, Leak};
use serde_json::json;

#[path = "esp_missing/refusal.rs"]
mod refusal;

#[test]
fn a_kernel_without_esp_is_told_of_and_sends_nothing() -> Result<()> {
    let has_esp = kernel::has(Part::Esp)?;
    for mode in ESP_MODES {
        let cluster = Cluster::builder().mode(mode).build()?;
        let leak = Leak::watch(&cluster)?;
        let host = cluster.host(1);
        cluster.hosts().iter().try_for_each(Host::start)?;
        if has_esp {
            cluster.wait_ready()?;
            host.add_pod("a")?;
            assert_eq!(host.huskctl_json(["status"])?["issues"], json!([]), "{mode}");
        } else {
            refusal::tell(&cluster)?;
        }
        leak.finish(&cluster)?;
    }
    Ok(())
}
