#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| husk_ipam::lease::fuzzing::lease_name(input));
