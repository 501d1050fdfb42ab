//! Husk on the cluster, installed as a user would: its image on every node, its manifests at the API server.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_overlay::prefix::Prefix;
use serde_json::Value;

use super::Kubernetes;
use crate::eventually;
use crate::patience;
use crate::process::Program;

/// Where everything of Husk's is.
pub const NAMESPACE: &str = "husk-system";

/// The variable that names an image archive other than the one in cargo's target directory.
const IMAGE_VARIABLE: &str = "HUSK_IMAGE";

/// How long it may take to render manifests; the program that does may have to be fetched.
const RENDER_LIMIT: Duration = Duration::from_secs(120);

/// How long the API server may take to know new kinds.
const KINDS_LIMIT: Duration = Duration::from_secs(20);

/// How long a DaemonSet may take until all its pods are ready.
const ROLLOUT_LIMIT: Duration = Duration::from_secs(120);

impl Kubernetes {
    /// Installs an overlay of `manifests/overlays`, and waits until every node is ready for pods.
    ///
    /// # Errors
    /// When the image has not been built, a manifest is refused, or a DaemonSet does not become ready.
    pub fn install(&self, overlay: &str) -> Result<()> {
        self.import_image(&husk_image()?)?;
        self.install_manifests(&render(overlay)?)
    }

    /// Applies manifests of Husk, and waits until every node is ready for pods. The image has to be there.
    ///
    /// # Errors
    /// When one is refused, or a DaemonSet does not become ready.
    pub fn install_manifests(&self, manifests: &str) -> Result<()> {
        self.apply(manifests)?;
        self.wait_installed()
    }

    /// Applies manifests, kinds and objects of these kinds among them: the API server needs a moment to know the first.
    ///
    /// # Errors
    /// When one is refused.
    pub fn apply(&self, manifests: &str) -> Result<()> {
        let admin = self.admin();
        eventually("the API server to know the kinds of all manifests", KINDS_LIMIT, || {
            let said = admin.program().args(["apply", "-f", "-"]).stdin(manifests).run()?;
            let unknown = said.stderr.contains("no matches for kind");
            ensure!(said.status.success() || unknown, "applying manifests: {}", said.stderr.trim());
            Ok(said.status.success())
        })
    }

    /// Waits until Husk's DaemonSets are rolled out and every node is ready for pods.
    ///
    /// # Errors
    /// When one is not in time; the error carries what is known of its pods.
    pub fn wait_installed(&self) -> Result<()> {
        let admin = self.admin();
        let waited = eventually("Husk's DaemonSets to be rolled out", ROLLOUT_LIMIT, || {
            // Whoever asks for long may be waiting for an API server that is gone.
            self.ensure_control_runs()?;
            let sets = admin.json(["get", "daemonsets", "--namespace", NAMESPACE])?;
            let sets = sets["items"].as_array().context("no list of DaemonSets")?;
            Ok(!sets.is_empty() && sets.iter().all(is_rolled_out))
        });
        waited.with_context(|| self.describe_pods())?;
        self.wait_nodes_ready()
    }

    /// The nodes that own blocks, as `AddressBlock` objects say.
    ///
    /// # Errors
    /// When the API server does not answer, or one of them makes no sense.
    pub fn block_owners(&self) -> Result<BTreeMap<Prefix, String>> {
        let text = |value: &Value| value.as_str().map(str::to_owned).context("an AddressBlock without CIDR or node");
        let blocks = self.admin().list("addressblocks")?;
        blocks.iter().map(|it| Ok((text(&it["spec"]["cidr"])?.parse()?, text(&it["spec"]["node"])?))).collect()
    }

    /// What is known of Husk's pods, for an error.
    fn describe_pods(&self) -> String {
        let admin = self.admin();
        let said = |arguments: &[&str]| {
            let output = admin.output(arguments.iter().copied().chain(["--namespace", NAMESPACE]));
            output.map(|output| output.stdout + &output.stderr).unwrap_or_default()
        };
        let pods = said(&["get", "pods", "--output", "wide"]);
        let events = said(&["get", "events", "--field-selector", "type=Warning"]);
        let logs = said(&["logs", "daemonset/husk", "--all-containers", "--tail=20"]);
        format!("{pods}\n{events}\n{logs}")
    }
}

/// `kubectl rollout status` does not know DaemonSets that are updated `OnDelete`, whose pods need not be the newest.
fn is_rolled_out(set: &Value) -> bool {
    let (status, count) = (&set["status"], |key: &str| set["status"][key].as_u64().unwrap_or(0));
    let wanted = count("desiredNumberScheduled");
    let newest = set["spec"]["updateStrategy"]["type"] == "OnDelete" || count("updatedNumberScheduled") == wanted;
    status["observedGeneration"] == set["metadata"]["generation"]
        && wanted > 0
        && count("numberAvailable") == wanted
        && newest
}

/// The archive with Husk's image: the one that `HUSK_IMAGE` names, or the one in cargo's target directory.
///
/// # Errors
/// When there is none; the error says how to build it.
pub fn husk_image() -> Result<PathBuf> {
    let own = std::env::current_exe().context("finding the path of the running program")?;
    let named = std::env::var_os(IMAGE_VARIABLE).map(PathBuf::from);
    let built = || own.ancestors().map(|above| above.join("husk-image.tar")).find(|path| path.is_file());
    let image = named.or_else(built).context("there is no husk-image.tar: build it with hack/image --profile dev")?;
    // containerd is asked from another directory.
    image.canonicalize().with_context(|| format!("looking for the image archive {}", image.display()))
}

/// The manifests of an overlay, as `hack/manifests` renders them.
///
/// # Errors
/// When there is no such overlay, or this is not run in a checkout.
pub fn render(overlay: &str) -> Result<String> {
    let here = std::env::current_dir().context("finding the working directory")?;
    let script = here.ancestors().map(|above| above.join("hack/manifests")).find(|path| path.is_file());
    let script: PathBuf = script.with_context(|| format!("{} is not in a checkout of Husk", here.display()))?;
    let script: &Path = &script;
    Program::new(script).args(["render", overlay]).limit(patience(RENDER_LIMIT)).check()
}
