//! Counts in closed form, for forecasts of memory and time before anything is loaded.

use crate::decoder::Architecture;
use crate::site::{Place, Site, SiteKind};

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
    /// attends to `context` rows on average; of experts those are counted that a token goes through. The head is counted for `supervised` of the tokens, a share in 0 ..= 1.
    /// A backward pass with frozen weights costs about as much again, with trained weights twice as much.
    pub fn forward_flops_per_token(&self, context: f64, supervised: f64) -> f64 {
        let used = self.experts.map_or(1.0, |experts| experts.per_token as f64 / experts.count as f64);
        let share = |site: &Site| if site.expert.is_some() { used } else { 1.0 };
        let matrices: f64 = self.layer_sites().map(|site| products(&site) as f64 * share(&site)).sum();
        let attention: f64 = self
            .windows
            .iter()
            .map(|window| 4.0 * self.query_width() as f64 * window.map_or(context, |w| context.min(w as f64)))
            .sum();
        2.0 * self.layers as f64 * matrices + attention + 2.0 * self.table() as f64 * supervised
    }

    /// Bytes of all weights with `element_bytes` each.
    pub fn weight_bytes(&self, element_bytes: u64) -> u64 {
        self.parameters() * element_bytes
    }

    /// Bytes that a forward pass keeps for the backward pass per token: the input of each block.
    pub fn saved_bytes_per_token(&self, element_bytes: u64) -> u64 {
        (2 * self.layers as u64 + 1) * self.hidden as u64 * element_bytes
    }

    /// Bytes that re-running the widest block with its backward link takes per token, for documents of `length` rows:
    /// about six tensors of the inner width, or the projections and three tensors of scores per head.
    pub fn block_bytes_per_token(&self, length: u64, element_bytes: u64) -> u64 {
        let rows = self.experts.map_or(1, |experts| experts.per_token as u64);
        let mlp = rows * (6 * self.inner as u64 + 4 * self.hidden as u64);
        let scores = self.heads as u64 * length;
        let attention =
            3 * scores + 6 * self.query_width() as u64 + 6 * self.kv_width() as u64 + 4 * self.hidden as u64;
        mlp.max(attention) * element_bytes
    }

    /// Bytes of keys and values that generation keeps per token.
    pub fn cache_bytes_per_token(&self, element_bytes: u64) -> u64 {
        2 * self.layers as u64 * self.kv_width() as u64 * element_bytes
    }

    /// Elements of the embedding's table.
    const fn table(&self) -> u64 {
        self.vocab as u64 * self.hidden as u64
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
        SiteKind::Embedding { .. } | SiteKind::Norm { .. } => 0,
    }
}
