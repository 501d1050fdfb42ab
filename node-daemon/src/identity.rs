//! Who this host is to the others: its node name, and what tells it from another host that uses the same name.

use std::io;
use std::path::Path;

use husk_overlay::name::{InstanceId, NodeName};

use crate::files;

/// File in the state directory that holds the instance id.
pub const INSTANCE_FILE: &str = "instance";

/// Name and instance of this host.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Node name.
    pub name: NodeName,
    /// Random, made on first start, kept across reboots.
    pub instance: InstanceId,
}

impl Identity {
    /// What an earlier start left in the state directory; none where there is nothing that can be understood.
    ///
    /// # Errors
    /// Of the file system.
    pub fn find(name: &NodeName, state_directory: &Path) -> io::Result<Option<Self>> {
        let path = state_directory.join(INSTANCE_FILE);
        let Some(text) = files::read_text(&path, 256)? else { return Ok(None) };
        match InstanceId::new(text.trim()) {
            Ok(instance) => Ok(Some(Self { name: name.clone(), instance })),
            Err(error) => {
                tracing::warn!(file = %path.display(), %error, "the instance id cannot be understood");
                Ok(None)
            }
        }
    }

    /// As [`Identity::find`], and makes an instance id where there is none.
    ///
    /// # Errors
    /// Of the file system, or when the kernel gives no randomness.
    pub fn load(name: NodeName, state_directory: &Path) -> io::Result<Self> {
        if let Some(found) = Self::find(&name, state_directory)? {
            return Ok(found);
        }
        let path = state_directory.join(INSTANCE_FILE);
        let mut random = [0; 16];
        getrandom::fill(&mut random).map_err(io::Error::other)?;
        let text = format!("{:032x}", u128::from_ne_bytes(random));
        let instance = InstanceId::new(&text).map_err(io::Error::other)?;
        files::replace(&path, format!("{text}\n").as_bytes(), 0o600)?;
        Ok(Self { name, instance })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_id_is_made_once_and_replaced_when_broken() {
        let directory = tempfile::tempdir().unwrap();
        let load = || Identity::load(NodeName::new("a").unwrap(), directory.path()).unwrap().instance;
        let first = load();
        assert_eq!(load(), first);
        std::fs::write(directory.path().join(INSTANCE_FILE), "garbage").unwrap();
        assert_ne!(load(), first);
    }
}
