//! What the daemon tells `huskctl`: the stable JSON of `--output json` and the source of every table.

mod capture;
mod doctor;
mod ipam;
mod keys;
mod mtu;
mod paths;
mod peers;
mod policy;
mod status;
mod top;
mod trace;
mod ui;

pub use crate::flows::{Flow, FlowCount, FlowEnd, FlowVerdict, FlowsReport, Icmp};
pub use crate::line_log::LogLine;
pub use capture::{CaptureReport, Tap, TunnelPorts, VerifyPath};
pub(crate) use doctor::quoted;
pub use doctor::{Action, CheckListing, CheckReport, DoctorReport, Finding, Fix, Outcome, RepairReport, RepairResult};
pub use ipam::{BlockReport, IpamReport, PoolReport, ReleaseReport};
pub use keys::{AssociationReport, Direction, EpochReport, KeysReport, PeerKeysReport, RotationDue, RotationReport};
pub use mtu::{MismatchKind, MtuMismatch, MtuOrigin, MtuReport, MtuSource, WhatIfReport};
pub use paths::{PathReport, ProbeStarted};
pub use peers::{DiffReport, PeerReport, PeerState};
pub use policy::{
    PodPolicyReport, PodPolicyState, PolicyKind, PolicyReport, PolicyRow, QuarantineReport, QuarantinedPod, RuleReport,
};
pub use status::{Counter, KeysSummary, LastPass, Status};
pub use top::{Counted, CountedLink, CountedPeer, CountedPod, Rates, Top, TopLink, TopPeer, TopPod, Totals};
pub use trace::{
    Carrier, Crossing, Decider, Hop, HopName, HopStanding, Live, Place, TraceEnd, TracePeer, TraceReport, TraceSide,
    Translation,
};
pub use ui::UiReport;
