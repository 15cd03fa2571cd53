//! Scales what linears give, or what they read, number by number: the fewest parameters of all adapters, for few examples and many
//! tasks over one base.
//!
//! # Update
//! ```text
//! y'_to = l_o ∘ (x_ti W_oi^T + b_o)             at most linears
//! y'_to = (l_i ∘ x_ti) W_oi^T + b_o             at those that lead out of an MLP, or that `inputs` names
//! ```
//!
//! # Symbols
//! `ia3_l`: `l_o` as `[o, 1]`, `l_i` as `[1, i]`; f32, trained, starts at 1.
//!
//! # Cost
//! `o` parameters per linear, `i` where inputs are scaled; some multiplications a row, and the product again in reverse where
//! outputs are scaled. Where it costs less, a pass makes another weight in place of it, forward and in reverse, and the gradient by it.
//!
//! # Limits
//! With all `l` at 1 it is the base, bit for bit. It scales rows or columns of a weight and turns none.
//!
//! # Departures
//! none; agrees with PEFT. The paper's places are keys, values and the MLP's last linear: `targets: [k_proj, v_proj, down_proj]`.
//! By default it takes all linears.
//!
//! # Paper
//! Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning. Liu, Tam, Muqeeth, Mohta, Huang, Bansal,
//! Raffel, 2022.

use attune_architecture::{Architecture, Place, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, EndMap, Merged, Peft, PeftTensors, Port, WeightMap};
use attune_points::forms::{AsWeight, Cost};
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, MethodRef, Paper, Point, SiteKind};
use attune_spec::{Fault, suggest};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::parts::linears;
use crate::parts::starts::{self, Start};

const SCALE: &str = "ia3_l";

/// Parameters of (IA)³.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Linears whose input is scaled, by module name or whole path; those that lead out of an MLP if it is left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    inputs: Option<Vec<String>>,
}

pub(super) struct Ia3 {
    config: Config,
}

impl Method for Ia3 {
    const CARD: Card = Card {
        category: Some(Category::Additive),
        paper: Some(Paper {
            title: "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
            authors: "Haokun Liu, Derek Tam, Mohammed Muqeeth, Jay Mohta, Tenghao Huang, Mohit Bansal, Colin Raffel",
            year: 2022,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "down*i + (1-down)*o",
        graph_numbers: "4*rows*(i+o) + 7*o*i",
        merges: Merges::Weight,
        peft_type: Some("IA3"),
        ..Card::new(
            "ia3",
            Point::Adapter,
            "Scales what linears give, or what they read, number by number: the fewest parameters of all adapters, for few \
             examples and many tasks over one base.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Ia3 {
    fn scales_inputs(&self, site: &Site) -> bool {
        match &self.config.inputs {
            None => site.place == Place::Down,
            Some(named) => named.iter().any(|name| is_named(site, name)),
        }
    }
}

/// Whether a name is a site's, or the end of its path.
fn is_named(site: &Site, name: &str) -> bool {
    let before = site.id.as_str().strip_suffix(name);
    before.is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

/// Whether an attachment scales what its linear reads.
fn is_input(at: &Attachment) -> bool {
    at.tensors.first().is_some_and(|spec| spec.shape.first() == Some(&1) && spec.shape.get(1) != Some(&1))
}

impl Adapter for Ia3 {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let unknown = |name: &&String| !sites.iter().any(|site| is_named(site, name));
        if let Some(name) = self.config.inputs.iter().flatten().find(unknown) {
            let names = sites.iter().filter_map(|site| site.id.as_str().rsplit('.').next());
            let hint = suggest::hint(name, names);
            return Err(vec![Fault::new("inputs", format!("names {name:?}, which is none of the targets{hint}"))]);
        }
        linears::attach(sites, |site, output, input| {
            let shape = if self.scales_inputs(site) { [1, input] } else { [output, 1] };
            // Decay would pull it to 0, not to the base.
            Ok(vec![TensorSpec { decay: false, ..TensorSpec::trained(SCALE, shape) }])
        })
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        starts::each(at, rng, |_| Start::Constant(1.0))
    }

    fn port(&self, at: &Attachment) -> Port<'_> {
        if is_input(at) { Port::Input(self) } else { Port::Output(self) }
    }

    fn merge(&self, at: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        let scale = tensors.get(SCALE)?;
        // As it lies it scales columns or rows.
        let w_oi = weight.dense(scale.dtype())?.broadcast_mul(scale)?;
        let bias = match weight.bias(scale.dtype())? {
            Some(bias) if !is_input(at) => Some((bias * scale.flatten_all()?)?),
            bias => bias,
        };
        Ok(Merged::Weight { weight: w_oi, bias })
    }

    fn peft(&self) -> Option<Peft> {
        let config = json!({"peft_type": "IA3", "task_type": "CAUSAL_LM", "inference_mode": true, "fan_in_fan_out": false, "feedforward_modules": []});
        let config = config.as_object().cloned().unwrap_or_default();
        Some(Peft { config, tensors: PeftTensors::Each(vec![(SCALE, SCALE)]) })
    }

    fn peft_lists(&self, at: &Attachment) -> &'static [&'static str] {
        if is_input(at) { &["feedforward_modules"] } else { &[] }
    }
}

impl EndMap for Ia3 {
    fn graph(&self, x_tw: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        Ok(ops::scale_columns(x_tw, tensors.get(SCALE)?)?)
    }

    fn as_weight(&self, (o, i): (usize, usize)) -> Option<AsWeight<'_>> {
        let (row, weight) = (Cost::new(0, o), Cost::new(0, o * i));
        Some(AsWeight { map: self, row, weight, product_again: true })
    }
}

impl WeightMap for Ia3 {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        let scale = tensors.get(SCALE)?;
        Ok(if scale.dim(0)? == 1 { ops::scale_columns(w_oi, scale)? } else { ops::scale_rows(w_oi, scale)? })
    }

    fn bias(&self, b_o: &Tensor, _: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        let scale = tensors.get(SCALE)?;
        Ok(if scale.dim(0)? == 1 { b_o.clone() } else { (b_o * scale.flatten_all()?)? })
    }
}

/// What `adapter_config.json` of a PEFT (IA)³ says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let inputs = match config.get("feedforward_modules") {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Array(named)) => named.iter().filter_map(|name| name.as_str().map(str::to_owned)).collect(),
        Some(other) => {
            let message = format!("is {other}; expected a list of modules, for patterns are not read here");
            return Err(vec![Fault::new("feedforward_modules", message)]);
        }
    };
    let params = Map::from_iter([("inputs".to_owned(), json!(inputs))]);
    Ok((MethodRef { method: Ia3::CARD.name.to_owned(), params }, Targets::Many(modules.to_vec())))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn rows_are_scaled_number_by_number() {
        let ia3 = Ia3 { config: Config::default() };
        let x = Tensor::new(&[[1f32, 2.0], [3.0, 4.0]], &Device::Cpu).unwrap();
        let scale = Tensor::new(&[[2f32], [-1.0]], &Device::Cpu).unwrap();
        let made = EndMap::graph(&ia3, &x, &Locals::new("k_proj", [(SCALE, scale)])).unwrap();
        assert_eq!(made.to_vec2::<f32>().unwrap(), [[2.0, -2.0], [6.0, -4.0]]);
    }

    #[test]
    fn a_pattern_of_feedforward_modules_is_refused_with_what_would_do() {
        let config = json!({"peft_type": "IA3", "feedforward_modules": ".*down_proj"});
        let faults = from_peft(config.as_object().unwrap(), &[]).unwrap_err();
        assert!(faults[0].to_string().contains("expected a list of modules"), "{}", faults[0]);
    }
}
