//! Questions that are asked again and again, across restarts of the daemon: one that is away is waited for, though not for ever.
//! An update of the DaemonSet, or a configuration that changed, ends nobody's `--follow`.

use std::io::ErrorKind;
use std::path::Path;
use std::time::{Duration, Instant};

use husk_overlay::ipc::Request;
use serde::de::DeserializeOwned;

use super::{Unreachable, ask, style};

/// How long a daemon may be away. A restart takes a second or two, an update with a new image rarely more than this.
const AWAY: Duration = Duration::from_secs(60);

/// Pause between two attempts.
const PAUSE: Duration = Duration::from_millis(500);

/// An answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Answered<T> {
    pub(super) answer: T,
    /// Nobody listened meanwhile: the daemon that answers is another one than before.
    pub(super) restarted: bool,
}

/// Asks the daemon, which has answered before; if it is away, says so on standard error and asks until it is back.
pub(super) fn ask_on<T: DeserializeOwned>(socket: &Path, request: &Request) -> anyhow::Result<Answered<T>> {
    ask_within(AWAY, socket, request, |line| style::tell([line]))
}

fn ask_within<T: DeserializeOwned>(
    limit: Duration,
    socket: &Path,
    request: &Request,
    mut tell: impl FnMut(String),
) -> anyhow::Result<Answered<T>> {
    let mut failing = None;
    let mut restarted = false;
    loop {
        let error = match ask(socket, request) {
            Ok(answer) => {
                if failing.is_some() {
                    tell("huskctl: the daemon answers again".to_owned());
                }
                return Ok(Answered { answer, restarted });
            }
            Err(error) => error,
        };
        restarted |=
            kind(&error).is_some_and(|kind| [ErrorKind::NotFound, ErrorKind::ConnectionRefused].contains(&kind));
        let since = *failing.get_or_insert_with(|| {
            if may_pass(&error) && !limit.is_zero() {
                tell(format!("huskctl: {error:#}; waiting for it, {} s at most", limit.as_secs()));
            }
            Instant::now()
        });
        if !may_pass(&error) || since.elapsed() >= limit {
            return Err(error);
        }
        std::thread::sleep(PAUSE);
    }
}

/// What the system said, if it was the system.
fn kind(error: &anyhow::Error) -> Option<ErrorKind> {
    let unreachable = error.downcast_ref::<Unreachable>().map(|it| it.kind);
    unreachable.or_else(|| error.chain().find_map(|cause| Some(cause.downcast_ref::<std::io::Error>()?.kind())))
}

/// False for what waiting does not help against: a socket that may not be opened, an answer of another version.
fn may_pass(error: &anyhow::Error) -> bool {
    let foreign = error.chain().any(|cause| cause.is::<serde_json::Error>());
    !foreign && kind(error) != Some(ErrorKind::PermissionDenied)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use husk_overlay::ipc::{self, Response};

    use super::*;

    /// Answers one question.
    fn answer(listener: &UnixListener, report: &serde_json::Value) {
        let (mut stream, _) = listener.accept().unwrap();
        let _: Request = ipc::read_message(&mut stream).unwrap();
        ipc::write_message(&mut stream, &Response::Report { report: report.clone() }).unwrap();
    }

    #[test]
    fn a_daemon_that_comes_back_is_waited_for_and_known_as_another_one() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("husk.sock");
        let (mut told, mut daemon) = (Vec::new(), None);
        let answered = ask_within::<u64>(Duration::from_secs(60), &socket, &Request::Status, |line| {
            // It comes back when it has been missed.
            if told.is_empty() {
                let listener = UnixListener::bind(&socket).unwrap();
                daemon = Some(thread::spawn(move || answer(&listener, &7.into())));
            }
            told.push(line);
        });
        assert_eq!(answered.unwrap(), Answered { answer: 7, restarted: true });
        daemon.unwrap().join().unwrap();
        assert!(told[0].contains("no daemon answers") && told[0].contains("60 s"), "{told:?}");
        assert_eq!(told[1..], ["huskctl: the daemon answers again"]);
    }

    #[test]
    fn it_is_not_waited_for_for_ever_and_not_at_all_where_that_does_not_help() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("husk.sock");
        let ask = |limit| {
            let answered: anyhow::Result<Answered<u64>> = ask_within(limit, &socket, &Request::Status, |_| {});
            format!("{:#}", answered.unwrap_err())
        };
        assert!(ask(Duration::ZERO).contains("no daemon answers"));
        let listener = UnixListener::bind(&socket).unwrap();
        let daemon = thread::spawn(move || answer(&listener, &"no number".into()));
        let error = ask(Duration::from_secs(3600));
        assert!(error.contains("should be of one version"), "{error}");
        daemon.join().unwrap();
    }
}
