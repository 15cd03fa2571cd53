//! The names of tensors in an adapter file.

/// What PEFT puts before a module's path in the name of a tensor.
pub const PREFIX: &str = "base_model.model.";

/// Which half of a pair of factors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Factor {
    /// `A`, shape `[r, in]`.
    A,
    /// `B`, shape `[out, r]`.
    B,
}

/// The name of a factor's tensor: `base_model.model.<module>.lora_A.weight`.
pub fn tensor_name(module: &str, factor: Factor) -> String {
    let letter = match factor {
        Factor::A => 'A',
        Factor::B => 'B',
    };
    format!("{PREFIX}{module}.lora_{letter}.weight")
}

/// The module and factor that a tensor's name says; nothing when it is no factor of a linear LoRA.
pub fn parse_tensor_name(name: &str) -> Option<(&str, Factor)> {
    let rest = name.strip_prefix(PREFIX)?;
    let by = |suffix: &str, factor| {
        rest.strip_suffix(suffix).filter(|module| !module.is_empty()).map(|module| (module, factor))
    };
    by(".lora_A.weight", Factor::A).or_else(|| by(".lora_B.weight", Factor::B))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back_and_others_are_not_taken_for_factors() {
        let module = "model.layers.3.self_attn.q_proj";
        assert_eq!(tensor_name(module, Factor::A), "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight");
        for factor in [Factor::A, Factor::B] {
            assert_eq!(parse_tensor_name(&tensor_name(module, factor)), Some((module, factor)));
        }
        for other in [
            "model.layers.3.self_attn.q_proj.lora_A.weight",
            "base_model.model.lora_A.weight",
            "base_model.model..lora_A.weight",
            "base_model.model.x.lora_magnitude_vector",
            "base_model.model.embed_tokens.lora_embedding_A",
            "base_model.model.lm_head.weight",
            "base_model.model.x.lora_B.bias",
        ] {
            assert_eq!(parse_tensor_name(other), None, "{other}");
        }
    }
}
