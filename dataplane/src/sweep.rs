//! Whether what is not desired may go.

use serde::{Deserialize, Serialize};

/// Permission to remove what carries our mark and is not desired.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Sweep {
    /// The desired state is complete: what is not in it goes.
    Allowed,
    /// The cluster source has not delivered its first full list: what is missing from the desired state may only be
    /// unknown yet. Nothing is removed; what differs is still corrected.
    Withheld,
}
