//! What passes tell the log of decisions.

use std::collections::BTreeSet;

use husk_dataplane::fake::Fault;
use husk_dataplane::kernel::Table;
use husk_overlay::config::DecisionLogs;
use husk_overlay::ipc::{Request, Response};
use husk_overlay::issue::IssueKind;
use husk_overlay::mode::Mode;
use husk_overlay::rotation::Cause;
use nix::errno::Errno;

use super::super::{Ask, Message, channel};
use super::bed::{Bed, name};
use crate::line_log::{Client, Entry, Event, LogLine, Logs};

/// Has the bed log decisions.
fn logging(bed: &mut Bed) -> Logs {
    let config = DecisionLogs { audit: Some(bed.directory.path().join("audit.jsonl")), ..DecisionLogs::default() };
    let logs = Logs::start(&config, &name(0)).unwrap();
    bed.engine.log_to(logs.clone());
    logs
}

/// What was logged since somebody looked last.
fn news(bed: &Bed, logs: &Logs, seen: &mut usize) -> Vec<Event> {
    logs.flush();
    let text = std::fs::read_to_string(bed.directory.path().join("audit.jsonl")).unwrap_or_default();
    let events = text.lines().skip(*seen).map(|line| match serde_json::from_str::<LogLine>(line).unwrap().entry {
        Entry::Audit(event) => event,
        Entry::Flow { .. } => panic!("{line}"),
    });
    let events: Vec<Event> = events.collect();
    *seen += events.len();
    events
}

#[test]
fn peers_pods_and_issues_that_come_and_go_are_logged_once() {
    let mut bed = Bed::new(Mode::Vxlan, 3);
    bed.pass();
    bed.lease("pod").unwrap();
    bed.plug("pod");
    let logs = logging(&mut bed);
    let mut seen = 0;
    bed.pass();
    bed.pass();
    assert_eq!(news(&bed, &logs, &mut seen), [], "what there was when the daemon started is no news");

    bed.allocate(5);
    bed.join(5);
    bed.leave(1);
    bed.unplug("pod");
    bed.release("pod");
    bed.pass();
    bed.pass();
    let told = news(&bed, &logs, &mut seen);
    let [Event::PeerLeft { peer: gone }, Event::PeerJoined { peer: come, addresses }, Event::PodReleased { pod, .. }] =
        told.as_slice()
    else {
        panic!("{told:?}")
    };
    assert_eq!((gone, come, addresses.len(), pod.contains("pod")), (&name(1), &name(5), 1, true), "{told:?}");

    bed.kernel.inject(Fault::Change(Table::Routes), Errno::EPERM);
    bed.kernel.flush(Table::Routes);
    bed.pass();
    bed.pass();
    let raised = news(&bed, &logs, &mut seen);
    let kinds: BTreeSet<IssueKind> = raised
        .iter()
        .map(|event| match event {
            Event::IssueRaised { issue } => issue.kind,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(kinds, [IssueKind::ApplyFailed].into());
    bed.kernel.heal();
    bed.pass();
    let cleared = news(&bed, &logs, &mut seen);
    assert_eq!(cleared.len(), raised.len());
    assert!(cleared.iter().all(|event| matches!(event, Event::IssueCleared { .. })), "{cleared:?}");
}

#[test]
fn keys_are_logged_with_the_reason_they_were_made_for() {
    let mut bed = Bed::new(Mode::Wireguard, 2);
    let logs = logging(&mut bed);
    bed.pass();
    let (answer, _receiver) = tokio::sync::oneshot::channel();
    bed.engine.answer(Ask { request: Request::RotateKeys, answer });
    let causes: Vec<Cause> = news(&bed, &logs, &mut 0)
        .into_iter()
        .filter_map(|event| match event {
            Event::KeyMade { cause, .. } => Some(cause),
            _ => None,
        })
        .collect();
    assert!(causes.ends_with(&[Cause::Request]), "{causes:?}");
}

#[tokio::test]
async fn what_a_client_decided_is_logged_with_who_it_was_and_what_was_refused_is_not() {
    let mut bed = Bed::new(Mode::Vxlan, 2);
    let logs = logging(&mut bed);
    let by = || Client { uid: Some(1000), pid: Some(7), ..Client::default() };
    let quarantine = |on| Request::Quarantine { pod: "shop/db".into(), on };
    // Its loop has ended.
    let stopping = bed.handle().logging_to(logs.clone());
    let response = stopping.answer_client(quarantine(true), by).await;
    assert!(matches!(response, Response::Refused { .. }), "{response:?}");
    assert_eq!(news(&bed, &logs, &mut 0), []);

    let (handle, inbox) = channel(bed.state.clone(), bed.leases());
    let content = std::thread::spawn(move || {
        while let Ok(Message::Ask(ask)) = inbox.recv() {
            ask.answer.send(Response::Report { report: serde_json::json!({}) }).unwrap();
        }
    });
    let handle = handle.logging_to(logs.clone());
    for request in [quarantine(true), Request::Status, quarantine(false), Request::RotateKeys] {
        handle.answer_client(request, by).await;
    }
    handle.stop();
    content.join().unwrap();
    let expected = [
        Event::QuarantineSet { pod: "shop/db".into(), by: by() },
        Event::QuarantineReleased { pod: "shop/db".into(), by: by() },
        Event::KeyRotationAsked { by: by() },
    ];
    assert_eq!(news(&bed, &logs, &mut 0), expected);
}
