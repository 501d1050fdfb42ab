//! Logs in JSON lines.

use super::super::reader::{Complaint, Fields};
use super::super::{DecisionLogs, LogLimits};
use super::read_path;

pub(super) fn read_logs(top: &mut Fields<'_, '_>) -> DecisionLogs {
    let mut section = top.section("logs");
    let default = DecisionLogs::default();
    let flows = read_path(&mut section, "flows");
    let audit = read_path(&mut section, "audit");
    if flows.is_some() && flows == audit {
        let reason = "flows are written to the same file, and each of the two would rotate the other's lines away";
        section.complain("audit", Complaint::conflict(reason, "use two files, for example audit.jsonl"));
    }
    let connections = section.flag("connections").unwrap_or(default.connections);
    let bytes =
        section.number("maxBytes", LogLimits::LEAST_BYTES..=1 << 40, "a file holds a few hundred lines at least");
    let keep = section.number("keep", 0..=99, "the files that are kept have a number of two digits");
    section.finish();
    let limits = LogLimits { bytes: bytes.unwrap_or(default.limits.bytes), keep: keep.unwrap_or(default.limits.keep) };
    DecisionLogs { flows, audit, connections, limits }
}
