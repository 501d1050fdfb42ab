//! The newest flows, numbered together and kept apart, so that many connections do not drive out what was denied. Equal ones of
//! what was denied within one second are one with a count, which is kept when that second is over, so that what was read once
//! does not change.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::record::{Flow, FlowVerdict};
use super::{CONNECTIONS, DENIED, FlowKind, Kinds};
use crate::line_log::Logs;

/// Flows that are kept, of what was denied and of connections each.
const KEPT: usize = 10_000;

/// How long equal flows count as one.
const MERGED: Duration = Duration::from_secs(1);

/// Flows that may wait for their second to be over; with more, the oldest is kept at once.
const WAITING: usize = 1000;

/// The newest flows.
#[derive(Debug, Default)]
pub(super) struct Ring {
    denied: VecDeque<Flow>,
    connections: VecDeque<Flow>,
    /// With the time of their first packet, oldest first.
    waiting: VecDeque<(Instant, Flow)>,
    newest: u64,
    /// Flows kept, of what was denied and of connections.
    pub(super) recorded: [u64; 2],
    /// Of those lost, how many the log was told of, and when last.
    logged: ([u64; 2], Option<Instant>),
    /// Records lost, of what was denied and of connections.
    pub(super) lost: [u64; 2],
    /// Why nothing is recorded of either, where that is so.
    pub(super) unavailable: [Option<String>; 2],
    /// Connections are listened to now.
    pub(super) listening: bool,
    pub(super) logs: Logs,
}

impl Ring {
    /// Takes a flow that came at `now`.
    pub(super) fn take(&mut self, flow: Flow, now: Instant) {
        if let Some((_, same)) = self.waiting.iter_mut().find(|(_, waiting)| waiting.is_like(&flow)) {
            same.count += flow.count;
            return;
        }
        if self.waiting.len() >= WAITING
            && let Some((_, oldest)) = self.waiting.pop_front()
        {
            self.keep(oldest);
        }
        self.waiting.push_back((now, flow));
    }

    /// Keeps what waits no longer.
    pub(super) fn keep_settled(&mut self, now: Instant) {
        while self.waiting.front().is_some_and(|(since, _)| now.saturating_duration_since(*since) >= MERGED)
            && let Some((_, flow)) = self.waiting.pop_front()
        {
            self.keep(flow);
        }
    }

    /// Has the log say how many were lost; at most once in a second, since what is lost is lost in great number.
    pub(super) fn log_lost(&mut self, now: Instant) {
        let (told, last) = &mut self.logged;
        if *told == self.lost || last.is_some_and(|last| now.saturating_duration_since(last) < MERGED) {
            return;
        }
        *last = Some(now);
        for (kind, (told, lost)) in FlowKind::ALL.into_iter().zip(told.iter_mut().zip(self.lost)) {
            let count = lost.saturating_sub(std::mem::replace(told, lost));
            if count > 0 {
                self.logs.flows_lost(kind, count);
            }
        }
    }

    pub(super) fn keep(&mut self, flow: Flow) {
        self.newest += 1;
        let flow = Flow { sequence: self.newest, ..flow };
        self.logs.flow(&flow);
        let kept = if flow.verdict == FlowVerdict::Denied {
            tracing::debug!(
                policy = flow.reason,
                count = flow.count,
                "denied {}: {} {} -> {}",
                flow.direction,
                flow.protocol,
                flow.source,
                flow.destination
            );
            self.recorded[DENIED] += 1;
            &mut self.denied
        } else {
            self.recorded[CONNECTIONS] += 1;
            &mut self.connections
        };
        if kept.len() >= KEPT {
            kept.pop_front();
        }
        kept.push_back(flow);
    }

    pub(super) fn newest(&self) -> u64 {
        self.newest
    }

    /// At most so many flows after a number, the oldest of them first; without a number the newest.
    pub(super) fn after(&self, after: Option<u64>, most: usize, kinds: Kinds) -> Vec<Flow> {
        let from = |kept: &VecDeque<Flow>, wanted: bool| -> Vec<Flow> {
            let first = match after {
                _ if !wanted => kept.len(),
                Some(after) => kept.partition_point(|flow| flow.sequence <= after),
                None => kept.len().saturating_sub(most),
            };
            kept.iter().skip(first).take(most).cloned().collect()
        };
        let mut flows = from(&self.denied, kinds.denied);
        flows.append(&mut from(&self.connections, kinds.connections));
        flows.sort_by_key(|flow| flow.sequence);
        match after {
            Some(_) => flows.truncate(most),
            None => drop(flows.drain(..flows.len().saturating_sub(most))),
        }
        flows
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flows::record::tests::flow;

    fn counts(ring: &Ring) -> Vec<(u64, u64)> {
        ring.after(Some(0), usize::MAX, Kinds::ALL).iter().map(|flow| (flow.sequence, flow.count)).collect()
    }

    #[test]
    fn equal_flows_of_a_second_are_one() {
        let (mut ring, start) = (Ring::default(), Instant::now());
        for (port, milliseconds) in [(80, 0), (80, 500), (81, 600), (80, 999)] {
            ring.take(flow(port), start + Duration::from_millis(milliseconds));
            ring.keep_settled(start + Duration::from_millis(milliseconds));
        }
        assert_eq!((counts(&ring), ring.newest()), (vec![], 0), "the second is not over");
        ring.keep_settled(start + Duration::from_millis(1000));
        assert_eq!(counts(&ring), [(1, 3)]);
        ring.take(flow(80), start + Duration::from_millis(1100));
        ring.keep_settled(start + Duration::from_secs(5));
        assert_eq!(counts(&ring), [(1, 3), (2, 1), (3, 1)]);
    }

    #[test]
    fn the_newest_are_kept_and_read_by_number() {
        let mut ring = Ring::default();
        for port in 0..=u16::try_from(KEPT).unwrap() {
            ring.keep(flow(port));
        }
        let all = counts(&ring);
        assert_eq!((all.len(), all[0].0, ring.newest()), (KEPT, 2, 10_001));
        let numbers = |flows: Vec<Flow>| flows.iter().map(|flow| flow.sequence).collect::<Vec<_>>();
        assert_eq!(numbers(ring.after(Some(9_000), 2, Kinds::ALL)), [9_001, 9_002]);
        assert_eq!(numbers(ring.after(None, 2, Kinds::ALL)), [10_000, 10_001]);
        assert!(ring.after(Some(10_001), 2, Kinds::ALL).is_empty());
    }

    #[test]
    fn the_log_says_where_flows_were_lost_and_how_many() {
        use husk_overlay::config::DecisionLogs;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("flows.jsonl");
        let config = DecisionLogs { flows: Some(path.clone()), ..DecisionLogs::default() };
        let logs = Logs::start(&config, &"node-a".parse().unwrap()).unwrap();
        let (mut ring, start) = (Ring { logs: logs.clone(), ..Ring::default() }, Instant::now());
        // Losses of one second are one line, and what is lost after the last line is told a second later.
        for (milliseconds, lost) in
            [(0, [0, 0]), (100, [7, 0]), (600, [9, 0]), (1000, [10, 3]), (1100, [12, 3]), (3000, [12, 3])]
        {
            ring.lost = lost;
            ring.log_lost(start + Duration::from_millis(milliseconds));
        }
        logs.flush();
        let text = std::fs::read_to_string(&path).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        let lines: Vec<serde_json::Value> = lines.collect();
        let told = |it: &serde_json::Value| (it["flows"].as_str().unwrap().to_owned(), it["count"].as_u64().unwrap());
        assert!(lines.iter().all(|line| line["kind"] == "audit" && line["event"] == "flowsLost"), "{text}");
        let told: Vec<(String, u64)> = lines.iter().map(told).collect();
        assert_eq!(told, [("denied".into(), 7), ("denied".into(), 5), ("connection".into(), 3)]);
    }

    #[test]
    fn many_at_once_wait_in_bounded_number() {
        let (mut ring, now) = (Ring::default(), Instant::now());
        (0..1200).for_each(|port| ring.take(flow(port), now));
        assert_eq!((ring.waiting.len(), ring.newest()), (WAITING, 200));
    }

    #[test]
    fn connections_do_not_drive_out_what_was_denied() {
        let mut ring = Ring::default();
        ring.keep(flow(80));
        for _ in 0..=KEPT {
            ring.keep(Flow { verdict: FlowVerdict::New, ..flow(81) });
        }
        ring.keep(flow(82));
        let numbers = |after, most, kinds| -> Vec<u64> {
            ring.after(after, most, kinds).iter().map(|flow| flow.sequence).collect()
        };
        let denied = Kinds { denied: true, connections: false };
        assert_eq!(numbers(None, 9, denied), [1, 10_003]);
        assert_eq!(numbers(None, 2, Kinds::ALL), [10_002, 10_003]);
        assert_eq!(numbers(Some(0), 2, Kinds::ALL), [1, 3], "of connections the first is gone");
        assert_eq!(numbers(Some(10_001), 9, Kinds { denied: false, connections: true }), [10_002]);
    }
}
