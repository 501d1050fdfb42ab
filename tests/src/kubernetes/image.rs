//! Container images written by hand, as no registry is needed or asked: busybox, which is the test's pods' and every sandbox's.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::process::Program;

/// The image of pods and of their sandboxes.
pub const IMAGE: &str = "localhost/husk-test:1";

/// Stays until it is told to end: a first process has no default action for SIGTERM.
const COMMAND: &str = "trap 'exit 0' TERM; while :; do sleep 3600 & wait $!; done";

/// Writes the image to `directory` and returns the path of its archive. `programs` are static ones to have beside busybox.
pub(super) fn build(directory: &Path, programs: &[PathBuf]) -> Result<PathBuf> {
    let bin = directory.join("root/bin");
    for needed in [&bin, &directory.join("root/tmp")] {
        fs::create_dir_all(needed).with_context(|| format!("making {}", needed.display()))?;
    }
    let found = ["/bin/busybox", "/usr/bin/busybox"].map(Path::new).into_iter().find(|path| path.exists());
    let busybox = found.context("busybox is missing: install the package busybox-static")?;
    let loader = Program::new("ldd").args([busybox]).run()?;
    ensure!(
        !loader.stdout.contains("=>"),
        "{} needs shared libraries: install the package busybox-static",
        busybox.display()
    );
    for program in programs.iter().map(PathBuf::as_path).chain([busybox]) {
        let copy = bin.join(program.file_name().context("a program without a name")?);
        fs::copy(program, &copy).with_context(|| format!("copying {}", program.display()))?;
        fs::set_permissions(&copy, fs::Permissions::from_mode(0o755))?;
    }
    for applet in Program::new(busybox).args(["--list"]).check()?.lines().filter(|applet| *applet != "busybox") {
        symlink("busybox", bin.join(applet)).with_context(|| format!("naming {applet}"))?;
    }
    pack(&directory.join("root"), &directory.join("layer.tar"), &["."])?;
    let sum = Program::new("sha256sum").args([directory.join("layer.tar")]).check()?;
    let digest = sum.split_whitespace().next().context("sha256sum printed nothing")?;
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let config = json!({
        "architecture": architecture,
        "os": "linux",
        "config": {"Cmd": ["/bin/sh", "-c", COMMAND], "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{digest}")]},
    });
    let manifest = json!([{"Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"]}]);
    for (name, content) in [("config.json", config), ("manifest.json", manifest)] {
        fs::write(directory.join(name), content.to_string()).with_context(|| format!("writing {name}"))?;
    }
    let image = directory.join("image.tar");
    pack(directory, &image, &["manifest.json", "config.json", "layer.tar"])?;
    Ok(image)
}

fn pack(from: &Path, to: &Path, files: &[&str]) -> Result<()> {
    let options = [Path::new("--owner=0"), Path::new("--group=0"), Path::new("-C"), from, Path::new("-cf"), to];
    Program::new("tar").args(options).args(files).check().map(drop)
}
