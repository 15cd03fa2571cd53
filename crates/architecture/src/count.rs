//! Counts in closed form, for forecasts of memory and time before anything is loaded.

use std::collections::BTreeSet;

use crate::decoder::{Architecture, MlpKind, NormPlacement, QkNorm};
use crate::site::{Place, Site, SiteKind};

/// Values of logits that a chunk may have: 160 MiB.
const LOGITS: usize = 40 << 20;

impl Architecture {
    /// Parameters of the model; a tied head counts once.
    pub fn parameters(&self) -> u64 {
        let outer = self.embedding_sites().into_iter().chain(self.head_sites());
        let own = outer.filter(|site| !(self.tied && site.place == Place::Head));
        own.map(|site| site.kind.parameters()).sum::<u64>() + self.layers as u64 * self.layer_parameters()
    }

    /// Parameters of one decoder layer.
    pub fn layer_parameters(&self) -> u64 {
        self.layer_sites().map(|site| site.kind.parameters()).sum()
    }

    /// Floating-point operations of one token's forward pass, a multiplication and an addition counted apart, when it
    /// attends to `context` rows on average; of experts those are counted that a token goes through. The head is counted for
    /// `supervised` of the tokens, a share in 0 ..= 1.
    /// A backward pass with frozen weights costs about as much again, with trained weights twice as much.
    pub fn forward_flops_per_token(&self, context: f64, supervised: f64) -> f64 {
        let used = self.experts.map_or(1.0, |experts| experts.per_token as f64 / experts.count as f64);
        let share = |site: &Site| if site.expert.is_some() { used } else { 1.0 };
        let matrices: f64 = self.layer_sites().map(|site| products(&site) as f64 * share(&site)).sum();
        let head: u64 = self.head_sites().iter().map(products).sum();
        let attention: f64 = self
            .windows
            .iter()
            .map(|window| 4.0 * self.query_width() as f64 * window.map_or(context, |w| context.min(w as f64)))
            .sum();
        2.0 * self.layers as f64 * matrices + attention + 2.0 * head as f64 * supervised
    }

    /// Layers that have weights of their own: of those that are one layer of another model, one.
    pub fn distinct_layers(&self) -> usize {
        let distinct = |origins: &Vec<u32>| origins.iter().collect::<BTreeSet<_>>().len();
        self.origins.as_ref().map_or(self.layers, distinct)
    }

    /// Bytes of all weights with `element_bytes` each; those that layers share count once.
    pub fn weight_bytes(&self, element_bytes: u64) -> u64 {
        let shared = (self.layers - self.distinct_layers()) as u64 * self.layer_parameters();
        (self.parameters() - shared) * element_bytes
    }

    /// The same where linears of blocks are held in few bits: `few` is the bytes that one takes by its output and input width,
    /// everything else takes `element_bytes` a number.
    pub fn quantized_weight_bytes(&self, element_bytes: u64, few: impl Fn(usize, usize) -> f64) -> u64 {
        let of_layer = self.layer_sites().filter(|site| site.place.quantizes()).filter_map(|site| match site.kind {
            SiteKind::Linear { output, input, .. } => Some((output * input, few(output, input))),
            SiteKind::Embedding { .. } | SiteKind::Norm { .. } | SiteKind::Block { .. } => None,
        });
        let (numbers, bytes) = of_layer.fold((0, 0.0), |sum, (numbers, bytes)| (sum.0 + numbers, sum.1 + bytes));
        let layers = self.distinct_layers() as u64;
        self.weight_bytes(element_bytes) - layers * numbers as u64 * element_bytes + (layers as f64 * bytes) as u64
    }

    /// Bytes that a pass keeps per row for its reverse, with activations of `element_bytes`: the input of each block in 32
    /// bits and, unless blocks are run again, queries, keys, values, what attention gives, and what stands between the
    /// linears of an MLP.
    pub fn kept_bytes_per_row(&self, element_bytes: u64, again: bool) -> u64 {
        let inputs = 2 * self.hidden as u64 * 4;
        let (gates, attention) = (self.gates(), self.attention_bytes(element_bytes));
        let normed = if self.qk_norm == QkNorm::None { 0 } else { (self.query_width() + self.kv_width()) as u64 * 4 };
        let between = match self.experts {
            // Of each of a row's experts also what it gives, and of each expert its probability, twice.
            Some(experts) => {
                experts.per_token as u64 * (gates * self.inner as u64 * element_bytes + self.hidden as u64 * 4)
                    + 2 * experts.count as u64 * 4
            }
            None => gates * self.inner as u64 * element_bytes,
        };
        let sums = if self.placement == NormPlacement::Post { 2 * self.hidden as u64 * 4 } else { 0 };
        let of_block = if again { 0 } else { attention + normed + between + sums };
        self.layers as u64 * (inputs + of_block)
    }

    /// Bytes of buffers per row in which blocks are run and reversed, beside what is kept. A buffer is used again for another
    /// of its width: four of the stream's do for attention as well, those of the MLP and of keys and values come beside them.
    pub fn working_bytes_per_row(&self, element_bytes: u64, again: bool) -> u64 {
        let (inner, hidden) = (self.inner as u64, self.hidden as u64);
        let (query, kv) = (self.query_width() as u64, self.kv_width() as u64);
        let (gates, attention) = (self.gates(), self.attention_bytes(element_bytes));
        // What products give is in 32 bits; in a narrower type there is a copy of it that is multiplied and kept.
        let narrow = element_bytes < 4;
        let first = inner * (if narrow { gates * 4 } else { 4 } + gates * element_bytes);
        let (mlp, saved) = match self.experts {
            // The gradient by what experts give is in rows of its own; what they read goes where either was before.
            Some(experts) => {
                let narrowed = if narrow { element_bytes } else { 0 };
                let each = (first + hidden * (4 + narrowed), gates * inner * element_bytes + hidden * 4);
                (experts.per_token as u64 * each.0, attention.max(experts.per_token as u64 * each.1))
            }
            None => (first, gates * inner * element_bytes + attention),
        };
        let stream = 4 * hidden.max(query) * 4 + 2 * kv * 4;
        let copies = if narrow { 2 * (hidden + kv) * element_bytes } else { 0 };
        let block = if again { saved } else { 0 };
        mlp + stream + copies + block
    }

    /// Bytes of the logits of one chunk of at most `rows` rows, and of what is computed from them.
    pub fn head_bytes(&self, rows: u64, element_bytes: u64) -> u64 {
        let chunk = (self.logits_rows() as u64).min(rows);
        let rounded = if element_bytes < 4 { element_bytes } else { 0 };
        chunk * (self.logits_width() as u64 * (4 + rounded) + self.hidden as u64 * (8 + element_bytes))
    }

    /// Rows of logits that exist at a time. It depends on the logits' width alone, so that the order of sums never depends on a
    /// batch; a head's weight is read once a chunk, so that chunks of few rows would wait for memory.
    pub fn logits_rows(&self) -> usize {
        (LOGITS / self.logits_width().max(1)).clamp(16, 512)
    }

    /// Bytes of keys and values that generation keeps per token.
    pub fn cache_bytes_per_token(&self, element_bytes: u64) -> u64 {
        2 * self.layers as u64 * self.kv_width() as u64 * element_bytes
    }

    /// Linears before an MLP's activation.
    const fn gates(&self) -> u64 {
        if matches!(self.mlp, MlpKind::Gated(_)) { 2 } else { 1 }
    }

    /// Bytes of a row's queries, keys, values, what attention gives, and the logarithms of its sums.
    fn attention_bytes(&self, element_bytes: u64) -> u64 {
        2 * (self.query_width() + self.kv_width()) as u64 * element_bytes + self.heads as u64 * 4
    }

    /// The sites of one layer; all have the same.
    fn layer_sites(&self) -> impl Iterator<Item = Site> {
        self.attention_sites(0).into_iter().chain(self.mlp_sites(0))
    }
}

/// Multiplications of a row by the weight of a site.
const fn products(site: &Site) -> u64 {
    match site.kind {
        SiteKind::Linear { output, input, .. } => output as u64 * input as u64,
        SiteKind::Embedding { .. } | SiteKind::Norm { .. } | SiteKind::Block { .. } => 0,
    }
}
