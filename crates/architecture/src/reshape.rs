//! A model in another shape: what a surgery makes of its sizes, as the card of the method says, and the `config.json` of the
//! result.

use attune_spec::method::{LAYERS, MethodDocument, MethodRef, expression};
use attune_spec::{Fault, FieldPath};
use serde_json::{Map, Value, json};

use crate::config::{LAYERS_MAX, too_many_experts};
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
        let says = |field: &&str| card.becomes.contains_key(*field);
        let is_of_experts = ["experts", "experts_per_token", "experts_balance"].iter().any(says);
        let made = match count {
            count if count == 0 || !is_of_experts => Self { inner, ..self.clone() },
            count => self.with_experts(inner, Experts { count, per_token, normalised: true, balance })?,
        };
        let Some(listed) = card.becomes.get(LAYERS) else { return Ok(made) };
        let ranges = names.get(listed).cloned().unwrap_or_default();
        let ranges: Vec<[u32; 2]> = serde_json::from_value(ranges)
            .map_err(|error| refuse(listed, format!("are no ranges of layers: {error}")))?;
        made.repeating(&ranges).map_err(|faults| {
            let path = FieldPath::parse(listed);
            faults.into_iter().map(|fault| fault.under(&path)).collect()
        })
    }

    /// A model whose layers are those of this one in these ranges (from the first number to before the second), one range after
    /// the other. A layer that is there more than once has one weight, and is several layers to everything else.
    ///
    /// # Errors
    /// Ranges of none of this model's layers, or of too many in all; paths are relative to the list.
    pub fn repeating(&self, ranges: &[[u32; 2]]) -> Result<Self, Vec<Fault>> {
        let layers = self.layers as u32;
        let mut faults = Vec::new();
        if ranges.is_empty() {
            faults.push(Fault::new(
                "",
                format!("is empty; expected ranges of the {layers} layers, such as [[0, {layers}]]"),
            ));
        }
        for (at, &[start, end]) in ranges.iter().enumerate().filter(|(_, [start, end])| start >= end || *end > layers) {
            let message = format!("is [{start}, {end}]; expected a layer and a later end, 0 to {layers}");
            faults.push(Fault::new(FieldPath::root().index(at), message));
        }
        // Ends are in bounds, so the sum is too.
        let count: u64 = ranges.iter().map(|[start, end]| u64::from(end.saturating_sub(*start))).sum();
        if faults.is_empty() && count > LAYERS_MAX {
            faults.push(Fault::new("", format!("has {count} layers in all; expected at most {LAYERS_MAX}")));
        }
        if !faults.is_empty() {
            return Err(faults);
        }
        let chosen: Vec<u32> = ranges.iter().flat_map(|&[start, end]| start..end).collect();
        let windows = chosen.iter().map(|layer| self.windows[*layer as usize]).collect();
        let origins = match &self.origins {
            None => chosen,
            Some(origins) => chosen.iter().map(|layer| origins[*layer as usize]).collect(),
        };
        Ok(Self { layers: origins.len(), origins: Some(origins), windows, ..self.clone() })
    }

    /// The ranges whose layers this model's are, where it repeats those of another.
    pub fn ranges(&self) -> Option<Vec<[u32; 2]>> {
        let mut ranges: Vec<[u32; 2]> = Vec::new();
        for &layer in self.origins.as_ref()? {
            match ranges.last_mut().filter(|[_, end]| *end == layer) {
                Some([_, end]) => *end += 1,
                None => ranges.push([layer, layer + 1]),
            }
        }
        Some(ranges)
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
        set(row.fields.layers, json!(self.layers));
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
            WindowRule::ByLayer => {
                let any = self.windows.iter().copied().flatten().next();
                set("use_sliding_window", json!(any.is_some()));
                if any.is_some() {
                    let of_layer =
                        |window: &Option<u64>| if window.is_some() { "sliding_attention" } else { "full_attention" };
                    set("sliding_window", json!(any));
                    set("layer_types", self.windows.iter().map(of_layer).collect());
                }
            }
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
