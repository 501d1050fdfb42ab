//! Private keys and the preshared key are nowhere but in their files: not in the log at any level, not in reports, not in
//! other files, not in the `Debug` form of what the loop works with.

#[expect(unreachable_pub, reason = "the end-to-end harness, whose file it is, offers it")]
#[path = "../../../../tests/src/secret.rs"]
mod secret;

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use base64::Engine as _;
use husk_dataplane::kernel::Actual;
use husk_dataplane::reconcile::survey;
use husk_overlay::config::{DecisionLogs, LogConfig, LogFormat, LogLevel};
use husk_overlay::ipc::{Request, Response};
use husk_overlay::keys::{PrivateKey, PublicKey};
use husk_overlay::mode::Mode;
use tracing_subscriber::layer::SubscriberExt as _;

use super::bed::Bed;
use super::esp::settle;
use crate::line_log::Logs;
use crate::logging;
use secret::forms;

const PRESHARED: &[u8] = b"the secret of the whole cluster";

/// Takes all that is logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn contains(text: &[u8], form: &[u8]) -> bool {
    text.windows(form.len()).any(|window| window == form)
}

fn expect_none(secrets: &[Vec<u8>], what: &str, text: &[u8]) {
    for secret in secrets {
        // A part of a key is a secret too.
        for part in std::iter::once(secret.as_slice()).chain(secret.chunks(16)) {
            assert!(!forms(part).iter().any(|form| contains(text, form)), "a secret is in {what}");
        }
    }
}

/// Private keys in the key files there are now.
fn private_keys(directory: &Path) -> Vec<Vec<u8>> {
    let files = std::fs::read_dir(directory.join("keys")).unwrap().map(|it| it.unwrap().path());
    let keys = files.filter(|path| path.extension().is_some_and(|it| it == "key"));
    let decode =
        |path| base64::engine::general_purpose::STANDARD.decode(std::fs::read(path).unwrap().trim_ascii()).unwrap();
    keys.map(decode).collect()
}

fn public_half(secret: &[u8]) -> Option<PublicKey> {
    let text = base64::engine::general_purpose::STANDARD.encode(secret);
    PrivateKey::from_base64(&text).ok().map(|key| key.public())
}

fn other_files(directory: &Path, found: &mut Vec<(String, Vec<u8>)>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            other_files(&path, found);
        } else if path.extension().is_none_or(|it| it != "key") {
            found.push((path.display().to_string(), std::fs::read(&path).unwrap()));
        }
    }
}

#[test]
fn no_secret_is_where_somebody_could_read_it() {
    for (mode, format) in
        [(Mode::Ipsec, LogFormat::Text), (Mode::VxlanIpsec, LogFormat::Json), (Mode::Wireguard, LogFormat::Json)]
    {
        let psk = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(psk.path(), PRESHARED).unwrap();
        let log = Log::default();
        let config = LogConfig { format, level: LogLevel::Trace };
        let writer = log.clone();
        let registry = tracing_subscriber::registry().with(logging::filter(&config));
        let layer = tracing_subscriber::fmt::layer().with_writer(move || writer.clone());
        let subscriber: Box<dyn tracing::Subscriber + Send + Sync> = match format {
            LogFormat::Json => Box::new(registry.with(layer.json().flatten_event(true))),
            LogFormat::Text => Box::new(registry.with(layer.with_ansi(false))),
        };
        let mut secrets = vec![PRESHARED.to_vec()];
        let mut shown: Vec<(String, Vec<u8>)> = Vec::new();
        let mut bed = Bed::new(mode, 3);
        tracing::subscriber::with_default(subscriber, || {
            bed.config.ipsec.preshared_key_file = Some(psk.path().to_owned());
            bed.node.state().generations_in_files = true;
            bed.restart();
            let logs =
                DecisionLogs { audit: Some(bed.directory.path().join("audit.jsonl")), ..DecisionLogs::default() };
            bed.engine.log_to(Logs::start(&logs, &bed.engine.parts.node_name).unwrap());
            settle(&mut bed);
            secrets.extend(private_keys(bed.directory.path()));
            for request in
                [Request::RotateKeys, Request::Status, Request::Peers, Request::Keys, Request::Diff, Request::Mtu]
            {
                let (answer, mut receiver) = tokio::sync::oneshot::channel();
                bed.engine.answer(crate::engine::Ask { request: request.clone(), answer });
                let response: Response = receiver.try_recv().unwrap();
                shown.push((format!("{request:?}"), serde_json::to_vec(&response).unwrap()));
            }
            secrets.extend(private_keys(bed.directory.path()));
            bed.kernel.flush(husk_dataplane::kernel::Table::XfrmStates);
            bed.node.state().uptime *= 2;
            settle(&mut bed);
            secrets.extend(private_keys(bed.directory.path()));
            // An error is told as well.
            bed.kernel.inject(
                husk_dataplane::fake::Fault::Change(husk_dataplane::kernel::Table::XfrmStates),
                nix::errno::Errno::EINVAL,
            );
            bed.allocate(3);
            bed.join(3);
            settle(&mut bed);
            bed.engine.keeper.as_ref().unwrap().flush();
            bed.engine.audit.logs.flush();
            assert!(bed.directory.path().join("audit.jsonl").exists(), "decisions are logged");
        });
        let last = bed.engine.last.as_ref().unwrap();
        let (actual, _): (Actual, _) = survey(&mut bed.kernel.clone(), &last.plan.desired);
        shown.push(("facts".into(), format!("{:?} {:#?}", last.facts, last.facts).into_bytes()));
        shown.push(("plan".into(), format!("{:?} {:#?}", last.plan, last.plan).into_bytes()));
        shown.push(("actual".into(), format!("{actual:?} {actual:#?}").into_bytes()));
        shown.push(("outcome".into(), format!("{:?}", last.outcome).into_bytes()));
        shown.push(("kernel".into(), format!("{:?}", bed.kernel).into_bytes()));
        shown.push(("state".into(), format!("{:?}", bed.state.borrow()).into_bytes()));
        other_files(bed.directory.path(), &mut shown);
        let log = log.0.lock().unwrap().clone();
        assert!(!log.is_empty(), "{mode}: everything is logged");
        shown.push(("log".into(), log));
        assert!(secrets.len() >= 2, "{mode}: {} secrets", secrets.len());
        if mode.uses_wireguard() {
            let known: BTreeSet<PublicKey> = secrets.iter().filter_map(|secret| public_half(secret)).collect();
            let used: Vec<_> = bed.kernel.state().own.wireguard.values().filter_map(|it| it.public_key).collect();
            assert!(!used.is_empty() && used.iter().all(|key| known.contains(key)), "{mode}: {used:?} of {known:?}");
        }
        for (what, text) in &shown {
            expect_none(&secrets, &format!("{what} ({mode})"), text);
        }
        let found = std::fs::read_dir(bed.directory.path().join("keys")).unwrap().filter(|file| {
            let text = std::fs::read(file.as_ref().unwrap().path()).unwrap();
            secrets.iter().any(|secret| forms(secret).iter().any(|form| contains(&text, form)))
        });
        assert!(found.count() > 0, "{mode}: the search finds them where they are");
    }
}
