#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

/// A directory of this process's own.
static DIRECTORY: LazyLock<PathBuf> =
    LazyLock::new(|| std::env::temp_dir().join(format!("husk-fuzz-{}", std::process::id())));

libfuzzer_sys::fuzz_target!(|input: &[u8]| husk_ipam::lease::fuzzing::lease_store(&DIRECTORY, input));
