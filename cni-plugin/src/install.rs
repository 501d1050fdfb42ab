//! `husk-cni install`: puts this program where runtimes look for it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use husk_overlay::marks::CNI_TYPE;

/// Copies this program into the directory under the name of its CNI type, in one step: whoever executes the file meanwhile
/// gets the old or the new one, whole. Returns its path.
pub(crate) fn install(directory: &Path) -> Result<PathBuf> {
    fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
    let target = directory.join(CNI_TYPE);
    let temporary = directory.join(format!(".{CNI_TYPE}.{}", std::process::id()));
    let copied = copy(&temporary, &target);
    if copied.is_err() {
        // The copy that failed is the error to report.
        let _ = fs::remove_file(&temporary);
    }
    copied.with_context(|| format!("cannot install {}", target.display()))?;
    Ok(target)
}

fn copy(temporary: &Path, target: &Path) -> io::Result<()> {
    // The link follows this program even if its file was replaced since it was started.
    let mut source = File::open("/proc/self/exe")?;
    let mut file = File::create(temporary)?;
    io::copy(&mut source, &mut file)?;
    file.set_permissions(fs::Permissions::from_mode(0o755))?;
    // Else a power cut could leave a file of the right name and no content.
    file.sync_all()?;
    drop(file);
    fs::rename(temporary, target)?;
    match target.parent() {
        Some(directory) => File::open(directory)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_is_whole_executable_and_alone() {
        let directory = tempfile::tempdir().unwrap();
        let bin = directory.path().join("opt/cni/bin");
        for _ in 0..2 {
            let path = install(&bin).unwrap();
            assert_eq!(path, bin.join("husk"));
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o755);
            assert_eq!(fs::read(&path).unwrap(), fs::read("/proc/self/exe").unwrap());
            assert_eq!(fs::read_dir(&bin).unwrap().count(), 1);
        }
    }

    #[test]
    fn a_directory_that_cannot_be_is_named() {
        let error = install(Path::new("/proc/husk/bin")).unwrap_err();
        assert!(format!("{error:#}").contains("/proc/husk/bin"), "{error:#}");
    }
}
