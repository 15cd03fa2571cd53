#![no_main]

// The reader catches panics of the library below it, which the fuzzer's own hook would not let it. One that gets past it ends the
// run all the same.
libfuzzer_sys::fuzz_target!(init: std::panic::set_hook(Box::new(|_| {})), |bytes: &[u8]| attune_untrusted::parquet(bytes));
