//! Ports of the host that pods claim.

use std::path::Path;

use husk_overlay::endpoint::AttachmentId;
use husk_overlay::port_mapping::PortMapping;

use super::load;
use crate::{Error, PortClash};

/// Refuses mappings that clash with those of a lease. To be called with the store locked. Only who wants ports pays for it:
/// unlike addresses, they stand inside the lease files. A damaged lease claims none, as its pod is not connected.
pub(super) fn refuse_claimed(directory: &Path, id: &AttachmentId, wanted: &[PortMapping]) -> Result<(), Error> {
    if wanted.is_empty() {
        return Ok(());
    }
    for (holder, endpoint) in load::load(directory)?.endpoints {
        for held in &endpoint.port_mappings {
            if let Some(mapping) = wanted.iter().find(|mapping| mapping.clashes_with(held)) {
                return Err(Error::PortClaimed(Box::new(PortClash {
                    mapping: mapping.clone(),
                    id: id.clone(),
                    held: held.clone(),
                    pod: endpoint.display_name(),
                    holder,
                })));
            }
        }
    }
    Ok(())
}
