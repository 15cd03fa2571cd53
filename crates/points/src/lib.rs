//! What a method is, from the outside: the traits of all extension points and the plain types that they speak.
//!
//! The one invariant: parameters and gradients are *values*. A pass takes the parameters it runs at ([`Theta`]) as an
//! argument and hands each gradient to a [`GradSink`]; nothing that trains hides inside a module. So "adapters off", an
//! average of weights or a perturbed copy are further arguments, not further code.
//!
//! Deliberately absent: any method, any model, any loop, and the notion of a rank, a thread or a device. A lane (one of
//! several jobs over one base) is a set in a bank plus the rows bound to it; no trait here names it.
//!
//! Reading order: [`layout`] (what a row of a batch is), [`params`] and [`theta`] (parameters as values), [`sink`]
//! (where gradients go), [`weight`] (a frozen weight), [`stats`] and [`tap`] (what is measured before training), then one module per extension point, then [`engine`].

pub mod error;

mod column;
pub mod generate;
pub mod layout;
pub mod params;
pub mod sink;
pub mod stats;
pub mod tap;
pub mod theta;
pub mod weight;

pub mod adapter;
pub mod budget;
pub mod forms;
pub mod init;
pub mod merge;
pub mod mixing;
pub mod objective;
pub mod optimizer;
pub mod quantization;
pub mod reward;
pub mod schedule;
pub mod surgery;

pub mod engine;

pub use error::{Error, Result};
pub use layout::{Doc, Layout, Row, View};
pub use params::{Locals, Owner, Params, TensorId, TensorName, TensorSpec};
pub use sink::{Entries, GradSink, Grads, Region};
pub use stats::{Stats, StatsRequest};
pub use tap::Tap;
pub use theta::{Bank, BankKind, Binding, Rows, Theta};
pub use weight::Weight;
