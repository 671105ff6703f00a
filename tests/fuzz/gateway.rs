#![no_main]

#[allow(dead_code)]
#[path = "../../main.rs"]
mod gateway;

libfuzzer_sys::fuzz_target!(|input: &[u8]| gateway::fuzz::one(input));
