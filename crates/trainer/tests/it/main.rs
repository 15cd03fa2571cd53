//! Whole runs in one process: the same bytes after a stop, on more ranks, with accumulation; PyTorch's parameters.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod answers;
mod as_lora;
mod attempt;
mod audits;
mod bits;
mod calibration;
mod capabilities;
mod classes;
mod cohort;
mod combined;
mod confined;
mod every;
mod faults;
mod gangs;
mod outputs;
mod peft_steps;
mod prompts;
mod quantized;
mod reference;
mod rests;
mod searches;
mod support;
mod surgery;
mod threads;
mod turns;
mod vectors;
