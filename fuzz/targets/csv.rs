#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| attune_untrusted::csv(bytes));
