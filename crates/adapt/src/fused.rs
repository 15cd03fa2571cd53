//! LoRA of PEFT's on parameters of all experts at once, as LoRA on each expert's linears: what `target_parameters` of a folder's
//! configuration asks for.
//!
//! ```text
//! lora_A [E r, i], lora_B [o, r E]        expert e: A_e rows e r … (e + 1) r of A, B_e columns e, e + E, … of B
//! gate_up_proj                            gate_proj: A_e and the first half of B_e's rows; up_proj: A_e and the others
//! ```

use std::collections::BTreeMap;

use attune_artifacts::formats::peft::PREFIX;
use attune_spec::Fault;
use candle_core::Tensor;
use serde_json::{Map, Value};

/// The key that lists the parameters.
const KEY: &str = "target_parameters";
/// The module of the experts, whose parameters have an axis of experts.
const EXPERTS: &str = "experts";
/// What a wrapper is called by the one around it.
const INNER: &str = ".base_layer";
/// The parameters of experts, in the order in which PEFT wraps them, and the linears of an expert that each is made of.
const OF_EXPERTS: [(&str, &[&str]); 2] = [("gate_up_proj", &["gate_proj", "up_proj"]), ("down_proj", &["down_proj"])];

/// Puts tensors on the linears of experts in the place of those on parameters of all experts, and takes what asks for that out of the configuration. A
/// parameter of two axes is a linear's own weight, on which LoRA is what it is anyway.
///
/// # Errors
/// Parameters that are none of a linear's or of experts'; tensors of other shapes.
pub(crate) fn unfused(
    config: &mut Map<String, Value>,
    tensors: &mut BTreeMap<String, Tensor>,
) -> Result<(), Vec<Fault>> {
    let Some(Value::Array(named)) = config.get(KEY).filter(|named| !named.is_null()) else { return Ok(()) };
    let named: Vec<&str> = named.iter().filter_map(Value::as_str).collect();
    if named.is_empty() {
        return Ok(());
    }
    let last = |name: &str| name.rsplit('.').next().unwrap_or_default().to_owned();
    let is_known = |name: &str| {
        let parameter = last(name);
        parameter == "weight" || OF_EXPERTS.iter().any(|(known, _)| *known == parameter)
    };
    if let Some(other) = named.iter().find(|name| !is_known(name)) {
        let message = format!(
            "names {other:?}; this version reads parameters called weight, and gate_up_proj and down_proj of experts, of LoRA"
        );
        return Err(vec![Fault::new(KEY, message)]);
    }
    for key in ["rank_pattern", "alpha_pattern"] {
        if config.get(key).and_then(Value::as_object).is_some_and(|patterns| !patterns.is_empty()) {
            let message =
                "is given beside `target_parameters`, whose ranks this version reads from `r` and `lora_alpha` alone";
            return Err(vec![Fault::new(key, message)]);
        }
    }
    let rank = config.get("r").and_then(Value::as_u64).unwrap_or(8).max(1) as usize;
    // Of the parameters that are adapted, the first is in the innermost wrapper.
    let of_experts: Vec<&[&str]> = OF_EXPERTS
        .iter()
        .filter(|(parameter, _)| named.iter().any(|name| last(name) == *parameter))
        .map(|(_, linears)| *linears)
        .collect();
    let ours = |name: &String| {
        let (module, _) = name.strip_prefix(PREFIX)?.split_once(".lora_")?;
        let outer = module.trim_end_matches(INNER);
        let depth = (module.len() - outer.len()) / INNER.len();
        (outer.rsplit('.').next() == Some(EXPERTS)).then(|| (name.clone(), outer.to_owned(), depth))
    };
    for (name, module, depth) in tensors.keys().filter_map(ours).collect::<Vec<_>>() {
        let fault = |message: String| vec![Fault::new(KEY, format!("has a tensor {name:?} {message}"))];
        let linears = of_experts.len().checked_sub(depth + 1).and_then(|at| of_experts.get(at));
        let Some((linears, fused)) = linears.zip(tensors.remove(&name)) else {
            return Err(fault("of a parameter that it does not list".to_owned()));
        };
        let made = if name.ends_with(".lora_A.weight") {
            rows(&fused, rank).map(|each| (each, "lora_A"))
        } else {
            columns(&fused, rank).map(|each| (each, "lora_B"))
        };
        let Some((each, local)) = made.ok().filter(|(each, _)| !each.is_empty()) else {
            return Err(fault(format!("of shape {:?}, which is none of experts with rank {rank}", fused.dims())));
        };
        for (expert, tensor) in each.into_iter().enumerate() {
            for (at, linear) in linears.iter().enumerate() {
                let part = if local == "lora_B" { share(&tensor, at, linears.len()) } else { Ok(tensor.clone()) };
                let part = part.map_err(|error| fault(format!("that cannot be divided: {error}")))?;
                tensors.insert(format!("{PREFIX}{module}.{expert}.{linear}.{local}.weight"), part);
            }
        }
    }
    config.remove(KEY);
    Ok(())
}

/// `A_e` of each expert; none if the rows are not those of whole experts.
fn rows(fused: &Tensor, rank: usize) -> candle_core::Result<Vec<Tensor>> {
    let (all, _) = fused.dims2()?;
    let experts = if all % rank == 0 { all / rank } else { 0 };
    (0..experts).map(|expert| fused.narrow(0, expert * rank, rank)?.contiguous()).collect()
}

/// `B_e` of each expert.
fn columns(fused: &Tensor, rank: usize) -> candle_core::Result<Vec<Tensor>> {
    let (output, all) = fused.dims2()?;
    let experts = if all % rank == 0 { all / rank } else { 0 };
    let fused = fused.reshape((output, rank, experts))?;
    (0..experts).map(|expert| fused.narrow(2, expert, 1)?.squeeze(2)?.contiguous()).collect()
}

/// One of `of` equal shares of a matrix's rows.
fn share(tensor: &Tensor, at: usize, of: usize) -> candle_core::Result<Tensor> {
    let rows = tensor.dim(0)? / of;
    tensor.narrow(0, at * rows, rows)?.contiguous()
}

#[cfg(test)]
mod tests {
    use attune_tensor::Rng;
    use candle_core::DType;
    use serde_json::json;

    use super::*;

    const MODULE: &str = "base_model.model.model.layers.0.mlp.experts";

    fn normal(name: &str, shape: [usize; 2]) -> Tensor {
        Rng::new(1, name).normal_tensor(&shape[..], 1.0, DType::F32).unwrap()
    }

    fn config(parameters: &[&str]) -> Map<String, Value> {
        let config = json!({"peft_type": "LORA", "r": 2, "target_parameters": parameters});
        config.as_object().unwrap().clone()
    }

    /// Three experts of rank 2 with four inputs and six outputs, three for each half, and back.
    fn tensors() -> BTreeMap<String, Tensor> {
        BTreeMap::from([
            (format!("{MODULE}.base_layer.lora_A.weight"), normal("a", [6, 4])),
            (format!("{MODULE}.base_layer.lora_B.weight"), normal("b", [6, 6])),
            (format!("{MODULE}.lora_A.weight"), normal("c", [6, 3])),
            (format!("{MODULE}.lora_B.weight"), normal("d", [4, 6])),
        ])
    }

    #[test]
    fn every_expert_has_what_the_product_for_all_of_them_gives_it() {
        let (mut config, mut tensors) = (config(&["experts.gate_up_proj", "experts.down_proj"]), tensors());
        unfused(&mut config, &mut tensors).unwrap();
        assert!(!config.contains_key(KEY) && tensors.len() == 18);
        let of = |expert: usize, linear: &str, local: &str| {
            tensors[&format!("{MODULE}.{expert}.{linear}.{local}.weight")].to_vec2::<f32>().unwrap()
        };
        // PEFT: einsum("o r e, e r i -> e o i") of B as [o, r, e] and A as [e, r, i].
        let (a, b) = (normal("a", [6, 4]).to_vec2::<f32>().unwrap(), normal("b", [6, 6]).to_vec2::<f32>().unwrap());
        for expert in 0..3 {
            for (linear, from) in [("gate_proj", 0), ("up_proj", 3)] {
                let (own_a, own_b) = (of(expert, linear, "lora_A"), of(expert, linear, "lora_B"));
                for (row, own) in own_b.iter().enumerate() {
                    for input in 0..4 {
                        let made: f32 = (0..2).map(|r| own[r] * own_a[r][input]).sum();
                        let fused: f32 = (0..2).map(|r| b[from + row][r * 3 + expert] * a[expert * 2 + r][input]).sum();
                        assert!((made - fused).abs() < 1e-6);
                    }
                }
            }
            assert_eq!((of(expert, "down_proj", "lora_A")[0].len(), of(expert, "down_proj", "lora_B").len()), (3, 4));
        }
    }

    #[test]
    fn what_is_no_parameter_of_experts_is_refused_by_its_name() {
        let refused = |config: &mut Map<String, Value>| unfused(config, &mut tensors()).unwrap_err()[0].to_string();
        let other = refused(&mut config(&["experts.router_bias"]));
        assert!(other.starts_with("`target_parameters` names \"experts.router_bias\"; this version reads"), "{other}");
        let fewer = refused(&mut config(&["experts.down_proj"]));
        assert!(fewer.contains("of a parameter that it does not list"), "{fewer}");
        let mut odd = config(&["experts.gate_up_proj", "experts.down_proj"]);
        odd.insert("r".to_owned(), json!(4));
        assert!(refused(&mut odd).contains("which is none of experts with rank 4"));
        let mut patterns = config(&["experts.down_proj"]);
        patterns.insert("rank_pattern".to_owned(), json!({"down_proj": 4}));
        assert!(refused(&mut patterns).starts_with("`rank_pattern` is given beside"));
    }

    #[test]
    fn a_linears_own_weight_is_what_it_is_anyway() {
        let (mut config, mut tensors) = (config(&["q_proj.weight"]), BTreeMap::new());
        tensors.insert("base_model.model.q_proj.lora_A.weight".to_owned(), normal("a", [2, 4]));
        unfused(&mut config, &mut tensors).unwrap();
        assert!(!config.contains_key(KEY) && tensors.len() == 1);
    }
}
