//! `config.json` texts of public models, and what is read from them.

mod configs;
mod faults;
mod resolve;
