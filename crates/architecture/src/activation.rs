//! The functions between the linears of an MLP, and the names that `config.json` gives them.

use attune_spec::suggest;

/// An activation function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x sigmoid(x)`.
    Silu,
    /// `x Φ(x)` with the error function.
    Gelu,
    /// `x (1 + tanh(sqrt(2/π) (x + 0.044715 x³))) / 2`.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
}

/// Hugging Face's names. `gelu_fast` is another way to write the same polynomial.
const NAMES: &[(&str, Activation)] = &[
    ("silu", Activation::Silu),
    ("swish", Activation::Silu),
    ("gelu", Activation::Gelu),
    ("gelu_python", Activation::Gelu),
    ("gelu_new", Activation::GeluTanh),
    ("gelu_pytorch_tanh", Activation::GeluTanh),
    ("gelu_fast", Activation::GeluTanh),
    ("relu", Activation::Relu),
];

impl Activation {
    /// The function of a name in `config.json`.
    ///
    /// # Errors
    /// What is wrong with the name, and what would do.
    pub(crate) fn named(name: &str) -> Result<Self, String> {
        NAMES.iter().find(|(known, _)| *known == name).map(|(_, activation)| *activation).ok_or_else(|| {
            let known: Vec<&str> = NAMES.iter().map(|(known, _)| *known).collect();
            let hint = suggest::hint(name, known.iter().copied());
            format!("is {name:?}; supported are {}{hint}", known.join(", "))
        })
    }
}
