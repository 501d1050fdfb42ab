#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| husk_cni::fuzzing::network_configuration(input));
