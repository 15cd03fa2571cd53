//! A model in another shape: what a surgery makes of its sizes, as the card of the method says, and the `config.json` of the
//! result.

use attune_spec::method::{MethodDocument, MethodRef, expression};
use attune_spec::{Fault, FieldPath};
use serde_json::{Map, Value, json};

use crate::config::too_many_experts;
use crate::decoder::{Architecture, Experts, MlpKind, Positions};
use crate::family::{FamilyRow, WindowRule};

impl Architecture {
    /// The sizes that a card's expressions speak of.
    fn sizes(&self) -> Map<String, Value> {
        let (count, per_token) = self.experts.map_or((0, 0), |experts| (experts.count, experts.per_token));
        let sizes = [("inner", self.inner), ("experts", count), ("experts_per_token", per_token)];
        sizes.map(|(name, size)| (name.to_owned(), size.into())).into_iter().collect()
    }

    /// What a surgery with all its parameters makes of this model, by its card.
    ///
    /// # Errors
    /// Sizes that are not whole, and whatever this model has that no model of the new shape can have. Paths are relative to
    /// the method.
    pub fn after(&self, surgery: &MethodRef, card: &MethodDocument) -> Result<Self, Vec<Fault>> {
        let refuse = |path: &str, message: String| vec![Fault::new(FieldPath::parse(path), message)];
        let mut names = self.sizes();
        names.extend(surgery.params.clone());
        let number = |field: &str| match card.becomes.get(field) {
            None => Ok(None),
            Some(text) => match expression::number(text, &names) {
                Ok(number) => Ok(Some(number)),
                Err(error) => Err(refuse("", format!("cannot be told the sizes of: {error}"))),
            },
        };
        let size = |field: &str, now: usize| match number(field)? {
            None => Ok(now),
            Some(size) if size.fract() == 0.0 && size >= 1.0 => Ok(size as usize),
            Some(size) => {
                let message = format!("makes `{field}` {size} of {now}; expected parameters that make it whole");
                Err(refuse("", message))
            }
        };
        let now = self.experts.map_or((0, 0), |experts| (experts.count, experts.per_token));
        let inner = size("inner", self.inner)?;
        let (count, per_token) = (size("experts", now.0)?, size("experts_per_token", now.1)?);
        let before = self.experts.map_or(0.0, |experts| experts.balance);
        let balance = number("experts_balance")?.unwrap_or(before);
        if count == 0 {
            return Ok(Self { inner, ..self.clone() });
        }
        self.with_experts(inner, Experts { count, per_token, normalised: true, balance })
    }

    /// The same model with experts of width `inner` in the place of each layer's MLP: of the family that has this one's
    /// attention.
    ///
    /// # Errors
    /// Faults of the model: there is no such family, or it has no place for something that this model has.
    pub fn with_experts(&self, inner: usize, experts: Experts) -> Result<Self, Vec<Fault>> {
        let base = |message: String| Fault::new("", message);
        if self.experts.is_some() {
            return Err(vec![base(format!("needs a base without experts, and {} has some", self.class_name()))]);
        }
        let Some(family) = self.family.row().with_experts else {
            let message = format!(
                "makes experts of MLPs, and no known kind of model is {} with experts; expected a base of llama, mistral \
                 or qwen3",
                self.family
            );
            return Err(vec![base(message)]);
        };
        let row = family.row();
        let mut faults = Vec::new();
        let mut lacks = |what: &str| {
            faults.push(base(format!("makes this {} a {family}, which has no {what}", self.family)));
        };
        let (qkv, others) = (row.bias.qkv || row.bias.attention_field, row.bias.others || row.bias.attention_field);
        if (self.qkv_bias && !qkv) || (self.output_bias && !others) {
            lacks("biases in its attention");
        }
        if self.mlp_bias {
            lacks("biases in its experts");
        }
        if !windows_fit(row, &self.windows) {
            lacks("such windows in its attention");
        }
        if !matches!(self.mlp, MlpKind::Gated(_)) {
            lacks("experts without a gate");
        }
        let (count, layers) = (experts.count as u64, self.layers as u64);
        faults.extend(
            too_many_experts(count, inner as u64, layers)
                .map(|message| base(format!("makes experts whose number {message}"))),
        );
        if !faults.is_empty() {
            return Err(faults);
        }
        let (modules, experts) = (row.modules, Some(experts));
        Ok(Self { family, inner, experts, modules, ..self.clone() })
    }

    /// Makes the `config.json` of a model, from which this one was made, that of this one. What a missing field means
    /// differs from family to family, so that all such fields are written.
    pub fn write_config(&self, config: &mut Map<String, Value>) {
        let row = self.family.row();
        for gone in
            ["layer_types", "max_window_layers", "attention_bias", "mlp_bias", "num_experts", "num_local_experts"]
        {
            config.remove(gone);
        }
        let ids = |ids: &[u32]| match ids {
            [] => Value::Null,
            [id] => json!(id),
            ids => json!(ids),
        };
        let window = self.windows.first().copied().flatten();
        let eps = match self.norm {
            crate::decoder::NormKind::Rms { eps } | crate::decoder::NormKind::Layer { eps } => eps,
        };
        let mut set = |name: &str, value: Value| drop(config.insert(name.to_owned(), value));
        set("model_type", json!(row.name));
        set("architectures", json!([self.class_name()]));
        set(row.fields.inner, json!(self.inner));
        set("num_key_value_heads", json!(self.kv_heads));
        set("head_dim", json!(self.head_dim));
        set(row.fields.max_position, json!(self.max_position));
        set(row.fields.eps, json!(eps));
        set("tie_word_embeddings", json!(self.tied));
        set("bos_token_id", ids(&self.bos));
        set("eos_token_id", ids(&self.eos));
        if row.bias.attention_field {
            set("attention_bias", json!(self.output_bias));
        }
        match row.window {
            WindowRule::None => {}
            WindowRule::Every | WindowRule::IfGiven => set("sliding_window", json!(window)),
            WindowRule::ByLayer => set("use_sliding_window", json!(window.is_some())),
        }
        if let (Some(rule), Some(experts)) = (row.experts, self.experts) {
            set(rule.count.0[0], json!(experts.count));
            set("num_experts_per_tok", json!(experts.per_token));
            set("router_aux_loss_coef", json!(experts.balance));
            if rule.normalised_field {
                set("norm_topk_prob", json!(experts.normalised));
            }
        }
        for &(name, value) in row.fixed {
            set(name, json!(value));
        }
        if let Positions::Rope(rope) = self.positions {
            // Newer files keep the angle's base among the scaling, older ones beside it.
            match config.get_mut("rope_parameters").and_then(Value::as_object_mut) {
                Some(parameters) => drop(parameters.insert("rope_theta".to_owned(), json!(rope.theta))),
                None => drop(config.insert("rope_theta".to_owned(), json!(rope.theta))),
            }
        }
    }
}

/// Whether a family's configuration can say that layers have these windows.
fn windows_fit(row: &FamilyRow, windows: &[Option<u64>]) -> bool {
    match row.window {
        WindowRule::None => windows.iter().all(Option::is_none),
        WindowRule::Every | WindowRule::IfGiven => windows.windows(2).all(|pair| pair[0] == pair[1]),
        WindowRule::ByLayer => true,
    }
}
