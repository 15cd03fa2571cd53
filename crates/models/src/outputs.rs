//! What a model gives beside losses and gradients: logits, vectors of documents, hidden rows, routing.

use std::sync::{Arc, Mutex, PoisonError};

use attune_architecture::HeadKind;
use attune_points::layout::{Axis, Column, NO_LABEL, Source, VECTORS, Values};
use attune_points::objective::{Denominator, Level, Objective, ScopeLoss, ScopeView};
use attune_points::{Error, GradSink, Layout, Result, Row, Theta};
use candle_core::{DType, Device, Tensor};

use crate::cache::Cache;
use crate::dropout::Dropout;
use crate::graphs::Saved;
use crate::head::{self, Head};
use crate::model::{How, Model, Pass};
use crate::pass::{Times, alone, outputs, sequence};
use crate::routing::Routing;
use crate::vectors;

impl Model {
    /// Logits of every row, `[T, V]` or `[T, classes]`: for scoring short texts and tests; training never makes them.
    ///
    /// # Errors
    /// A head without logits; whatever the pass raises.
    pub fn logits(&self, pass: &Pass<'_>) -> Result<Tensor> {
        if self.how == How::Views {
            let all: Vec<u32> = (0..pass.layout.n_rows() as u32).collect();
            return outputs::logits(&self.machine(), self.part(pass), &all);
        }
        self.by_graph(pass, |cx| self.head.graph(&self.walk(cx, None, None)?[0], cx))
    }

    /// Logits of each document's class, `[N, classes]`, of a model that classifies documents.
    ///
    /// # Errors
    /// Another head; a document without rows; whatever the pass raises.
    pub fn classify(&self, pass: &Pass<'_>) -> Result<Tensor> {
        let HeadKind::Sequence { row, .. } = self.base.architecture().head else {
            return Err(Error::Refused("this model does not classify documents".to_owned()));
        };
        let rows = head::rows(pass.layout, row)?;
        if self.how == How::Views {
            return outputs::logits(&self.machine(), self.part(pass), &rows);
        }
        self.of_rows(pass, &rows)
    }

    /// The logits of some rows, by graphs.
    fn of_rows(&self, pass: &Pass<'_>, rows: &[u32]) -> Result<Tensor> {
        let rows_n = Tensor::new(rows, &Device::Cpu)?;
        self.by_graph(pass, |cx| {
            let h_nd = self.walk(cx, None, None)?[0].index_select(&rows_n, 0)?;
            self.head.graph(&h_nd, &cx.with(cx.tracked, Some(rows)))
        })
    }

    /// A vector per document, `[N, D]`, of a model with an embedding head.
    ///
    /// # Errors
    /// Another head; a document without rows; whatever the pass raises.
    pub fn embed(&self, pass: &Pass<'_>) -> Result<Tensor> {
        let pooling = Head::pooling(self.base.architecture())?;
        if self.how == How::Views {
            return outputs::embed(&self.machine(), self.part(pass), pooling);
        }
        self.by_graph(pass, |cx| self.head.pooled(&self.walk(cx, None, None)?[0], pooling, cx))
    }

    /// The gradient of a loss whose gradient by [`Model::embed`]'s vectors is `dy_nd`, into `sink`; gives the vectors.
    ///
    /// # Errors
    /// As for [`Model::embed`]; a `dy_nd` that is not of the vectors' shape and type.
    pub fn embed_grad(&self, pass: &Pass<'_>, dy_nd: &Tensor, sink: &mut dyn GradSink) -> Result<Tensor> {
        let heard = vectors::Heard { toward: Some(dy_nd.clone()), ..Default::default() };
        self.grad(pass, &heard, 1.0, sink)?;
        heard.into_parts().pop().ok_or_else(|| Error::Refused("a batch without documents has no vectors".to_owned()))
    }

    /// The routing of each layer of experts, from the first; empty for a model without.
    ///
    /// # Errors
    /// Whatever the pass raises.
    pub fn routing(&self, pass: &Pass<'_>) -> Result<Vec<Routing>> {
        if self.how == How::Views {
            return outputs::routing(&self.machine(), self.part(pass));
        }
        let mut routing = Vec::new();
        self.by_graph(pass, |cx| self.walk(cx, None, Some(&mut routing)))?;
        Ok(routing)
    }

    /// Hidden rows before each block of the trunk above the embedding, and after the last: for audits and tests.
    ///
    /// # Errors
    /// Whatever the pass raises.
    pub fn hidden(&self, pass: &Pass<'_>) -> Result<Vec<Tensor>> {
        if self.how == How::Views {
            return outputs::hidden(&self.machine(), self.part(pass));
        }
        let mut saved = Saved { from: 1, ..Saved::default() };
        let last = self.by_graph(pass, |cx| self.walk(cx, Some(&mut saved), None))?;
        // The stream alone, without what components carry beside it.
        let streams = saved.inputs.into_values().chain([last]);
        Ok(streams.filter_map(|streams| streams.into_iter().next()).collect())
    }

    /// The layouts with a column of the log-probabilities of their labels at `at`, and where the time went. Those that have it
    /// stay as they are.
    ///
    /// # Errors
    /// Whatever the pass raises.
    pub fn with_logp(
        &self,
        column: &str,
        at: &Theta,
        dropout: Option<Dropout>,
        layouts: &[Arc<Layout>],
    ) -> Result<(Vec<Arc<Layout>>, Times)> {
        let lack = |layout: &&Arc<Layout>| layout.column(column).is_none();
        let bound =
            |row: &Row| matches!(row, Row::Virtual { slot, .. } if !at.bindings.iter().any(|one| one.slot == *slot));
        // A component that is away has no rows either.
        let seen: Vec<Layout> = layouts.iter().filter(lack).map(|layout| layout.without(bound)).collect();
        let passes = seen.iter().map(|layout| Pass { theta: at, layout, dropout });
        let passes: Vec<Pass<'_>> = passes.collect();
        if passes.is_empty() {
            return Ok((layouts.to_vec(), Times::default()));
        }
        let heard = Heard::default();
        let (_, times) = self.score_parts(&passes, &heard)?;
        let mut heard = heard.0.into_inner().unwrap_or_else(PoisonError::into_inner).into_iter();
        let mut with = Vec::with_capacity(layouts.len());
        for layout in layouts {
            if !lack(&layout) {
                with.push(Arc::clone(layout));
                continue;
            }
            let mut logp_t = vec![0.0; layout.n_rows()];
            for (row, logp) in layout.supervised().iter().zip(heard.by_ref()) {
                logp_t[row.row as usize] = logp;
            }
            let mut layout = Layout::clone(layout);
            layout.set_column(column, Column { axis: Axis::Row, values: Values::F64(logp_t) })?;
            with.push(Arc::new(layout));
        }
        Ok((with, times))
    }

    /// The layouts with a column of the vectors of their documents at `at`, [`VECTORS`], and where the time went.
    ///
    /// # Errors
    /// A head that gives logits; whatever the pass raises.
    pub fn with_vectors(
        &self,
        at: &Theta,
        dropout: Option<Dropout>,
        layouts: &[Arc<Layout>],
    ) -> Result<(Vec<Arc<Layout>>, Times)> {
        let passes: Vec<Pass<'_>> = layouts.iter().map(|layout| Pass { theta: at, layout, dropout }).collect();
        let heard = vectors::Heard::default();
        let (_, times) = self.score_parts(&passes, &heard)?;
        let with = layouts.iter().zip(heard.into_parts()).map(|(layout, y_nd)| {
            let (_, width) = y_nd.dims2()?;
            let values = Values::Vectors { width, numbers: y_nd.to_dtype(DType::F32)?.flatten_all()?.to_vec1()? };
            let mut layout = Layout::clone(layout);
            layout.set_column(VECTORS, Column { axis: Axis::Doc, values })?;
            Ok(Arc::new(layout))
        });
        Ok((with.collect::<Result<_>>()?, times))
    }

    /// The rows that components put before every document: what a layout begins its documents with
    /// ([`Layout::begun_with`]).
    pub fn rows_before(&self, theta: &Theta) -> Vec<Row> {
        sequence::before_all(&self.stack, theta)
    }

    /// An empty cache for this many texts.
    pub(crate) fn cache(&self, theta: &Theta, texts: usize) -> Cache {
        let cache = Cache::new(self.trunk.len(), texts);
        if alone::is_read(&self.stack, theta) { cache.with_alone() } else { cache }
    }

    /// Makes room in the cache for each of `texts`, by its number, with the rows before it.
    pub(crate) fn reserve(&self, texts: &[(usize, &[u32])], before: &[Row], cache: &mut Cache) {
        if self.how == How::Views {
            let needs: Vec<(usize, usize)> = texts.iter().map(|(at, text)| (*at, before.len() + text.len())).collect();
            cache.reserve(&needs, self.arena());
        }
    }

    /// Logits `[V]` after the last token of each of `texts`, which come after the rows `before`. What the cache, in which there is room for the texts, knows of
    /// them already is not computed again; each has a token that is new. Graphs know nothing of caches and take whole texts.
    pub(crate) fn next(
        &self,
        theta: &Theta,
        texts: &[(usize, &[u32])],
        before: &[Row],
        cache: &mut Cache,
    ) -> Result<Vec<Vec<f64>>> {
        if self.how == How::Views {
            let mut layout = Layout::new();
            for &(at, text) in texts {
                let rows = before.iter().copied().chain(text.iter().map(|&token| Row::Token(token)));
                let known = cache.rows(at);
                layout.push(Source::default(), rows.skip(known).map(|row| (row, NO_LABEL)));
                layout.follow(&text[..known.saturating_sub(before.len())]);
            }
            let of: Vec<usize> = texts.iter().map(|(at, _)| *at).collect();
            let part = self.part(&Pass { theta, layout: &layout, dropout: None });
            let logits_nv = outputs::decode(&self.machine(), part, &of, cache)?;
            let rows = logits_nv.values().chunks_exact(logits_nv.n_cols());
            return Ok(rows.map(|row| row.iter().map(|&logit| f64::from(logit)).collect()).collect());
        }
        let of_text = |&(_, text): &(usize, &[u32])| {
            let layout = Layout::single(text).begun_with(before);
            let last = [layout.n_rows().saturating_sub(1) as u32];
            let logits_1v = self.of_rows(&Pass { theta, layout: &layout, dropout: None }, &last)?;
            Ok(logits_1v.squeeze(0)?.to_dtype(DType::F64)?.to_vec1()?)
        };
        texts.iter().map(of_text).collect()
    }
}

/// An objective that listens: the log-probability of each supervised row's label, part after part.
#[derive(Default)]
struct Heard(Mutex<Vec<f64>>);

impl Objective for Heard {
    fn level(&self) -> Level {
        Level::Part
    }

    fn denominator(&self) -> Denominator {
        Denominator::Tokens
    }

    fn scope(&self, scope: &ScopeView<'_>) -> Result<ScopeLoss> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend(scope.logp_t);
        Ok(ScopeLoss { loss: 0.0, dlogp_t: vec![0.0; scope.logp_t.len()], beside: Vec::new() })
    }
}

#[cfg(test)]
mod tests {
    use attune_architecture::{Architecture, Site, SiteKind};
    use attune_points::adapter::{Adapter, Attachment, BaseEdit, FusedRows, Merged, Peft, Port, RowCx, RowMap};
    use attune_points::{Bank, BankKind, Locals, Params, TensorSpec, Weight};
    use attune_spec::Fault;
    use attune_tensor::{Rng, ops};

    use super::*;
    use crate::{Base, Slot, Stack};

    /// `y += x_ti down_riᵀ up_orᵀ`.
    struct LowRank {
        /// Whether it tells the engine of its form.
        fused: bool,
    }

    impl Adapter for LowRank {
        fn attach(&self, _: &Architecture, sites: &[Site]) -> std::result::Result<Vec<Attachment>, Vec<Fault>> {
            let attachments = sites.iter().filter_map(|site| {
                let SiteKind::Linear { output, input, .. } = site.kind else { return None };
                let tensors = vec![TensorSpec::trained("down", [3, input]), TensorSpec::trained("up", [output, 3])];
                Some(Attachment { site: site.id.clone(), tensors })
            });
            Ok(attachments.collect())
        }

        fn init(&self, _: &Attachment, _: &dyn Weight, _: &mut Rng) -> Result<(Locals, BaseEdit)> {
            Err(Error::Refused("its tensors are given".to_owned()))
        }

        fn port(&self, _: &Attachment) -> Port<'_> {
            Port::Delta(self)
        }

        fn merge(&self, _: &Attachment, _: &Locals, _: &dyn Weight) -> Result<Merged> {
            Err(Error::Refused("it is not merged".to_owned()))
        }

        fn peft(&self) -> Option<Peft> {
            None
        }
    }

    impl RowMap for LowRank {
        fn graph(&self, x_ti: &Tensor, tensors: &Locals, _: &RowCx<'_>) -> Result<Tensor> {
            let h_tr = ops::linear(x_ti, tensors.get("down")?, None)?;
            Ok(ops::linear(&h_tr, tensors.get("up")?, None)?)
        }

        fn fused(&self) -> Option<FusedRows> {
            self.fused.then_some(FusedRows::LowRank { down: "down", up: "up", scale: 1.0, dropout: 0.0 })
        }
    }

    /// A window in the second layer, biases, grouped heads.
    const WINDOW: &str = r#"{
        "model_type": "qwen2", "hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 2, "vocab_size": 41, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": true, "use_sliding_window": true, "sliding_window": 5,
        "max_window_layers": 1, "initializer_range": 0.2
    }"#;
    /// Norms of queries and keys.
    const NORMED: &str = r#"{
        "model_type": "qwen3", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3,
        "num_key_value_heads": 1, "head_dim": 10, "vocab_size": 41, "rms_norm_eps": 1e-5, "max_position_embeddings": 256,
        "hidden_act": "gelu", "tie_word_embeddings": false, "initializer_range": 0.2
    }"#;
    /// Learned positions, one linear for queries, keys and values.
    const LEARNED: &str = r#"{
        "model_type": "gpt2", "n_embd": 24, "n_inner": 40, "n_layer": 2, "n_head": 4, "n_positions": 130, "vocab_size": 41,
        "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2
    }"#;
    const MIXTURE: &str = r#"{
        "model_type": "olmoe", "hidden_size": 36, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 2, "vocab_size": 41, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": false, "num_experts": 7, "num_experts_per_tok": 3,
        "norm_topk_prob": true, "initializer_range": 0.2
    }"#;
    const FAMILIES: [&str; 4] = [WINDOW, NORMED, LEARNED, MIXTURE];

    /// A model with a component on every linear, and values of its tensors.
    fn tuned(config: &str, dtype: DType, fused: bool) -> (Model, Theta) {
        let base = Base::random(Architecture::from_json(config.as_bytes()).unwrap(), 5, dtype).unwrap();
        let component = LowRank { fused };
        let attachments = component.attach(base.architecture(), &base.architecture().sites()).unwrap();
        let mut params = Params::new();
        for at in &attachments {
            let mut rng = Rng::new(1, "set").named(at.site.as_str());
            for spec in &at.tensors {
                let value = rng.normal_tensor(spec.shape.as_slice(), 0.2, DType::F32).unwrap();
                params.insert(spec.name(at.site.as_str()), value);
            }
        }
        let bank = Bank { slot: "skill".into(), kind: BankKind::Adapter, sets: vec![Arc::new(params)], train: true };
        let model = Model::new(base, Stack::new(vec![Slot::new(Arc::new(component), attachments)]));
        (model, Theta::single([bank]))
    }

    fn text(seed: u64, length: usize) -> Vec<u32> {
        let mut rng = Rng::new(seed, "text");
        (0..length).map(|_| rng.below(41) as u32).collect()
    }

    fn next(model: &Model, theta: &Theta, texts: &[(usize, &[u32])], cache: &mut Cache) -> Vec<Vec<f64>> {
        model.reserve(texts, &[], cache);
        model.next(theta, texts, &[], cache).unwrap()
    }

    /// The logits after each of some beginnings of a text, the longer ones with a cache of the shorter ones' rows, and those of
    /// the same rows in a pass over the whole text.
    fn both_ways(model: &Model, theta: &Theta) -> Vec<(Vec<f64>, Vec<f64>)> {
        // Beyond a block of the attention kernel's keys, by single tokens and by several.
        let text = text(2, 125);
        let layout = Layout::single(&text);
        let whole = model.logits(&Pass { theta, layout: &layout, dropout: None }).unwrap();
        let whole: Vec<Vec<f64>> = whole.to_dtype(DType::F64).unwrap().to_vec2().unwrap();
        let mut cache = model.cache(theta, 1);
        let ends = (5..30).chain([50, 97]).chain(98..=125);
        ends.map(|end| (next(model, theta, &[(0, &text[..end])], &mut cache).remove(0), whole[end - 1].clone()))
            .collect()
    }

    #[test]
    fn decoding_gives_the_bits_of_a_whole_pass() {
        for config in FAMILIES {
            for dtype in [DType::F32, DType::BF16] {
                let (model, theta) = tuned(config, dtype, true);
                let equal = both_ways(&model, &theta).iter().all(|(found, expected)| found == expected);
                assert!(equal, "{dtype:?}: {config}");
            }
        }
    }

    /// The sums of a graph's products run in an order that depends on the number of rows: both sides compute in f32, within the
    /// bound that the golden files are held to as well.
    #[test]
    fn decoding_with_components_by_their_graphs_is_as_near_to_a_whole_pass_as_f32_is() {
        for config in FAMILIES {
            let (model, theta) = tuned(config, DType::F32, false);
            for (found, expected) in both_ways(&model, &theta) {
                let most = expected.iter().fold(0.0f64, |most, x| most.max(x.abs()));
                let off = found.iter().zip(&expected).fold(0.0f64, |off, (a, b)| off.max((a - b).abs()));
                assert!(off < 1e-4 * most, "off by {off} of {most}: {config}");
            }
        }
    }

    #[test]
    fn a_text_has_the_bits_beside_others_that_it_has_alone() {
        for (config, fused) in FAMILIES.into_iter().flat_map(|config| [(config, true), (config, false)]) {
            let (model, theta) = tuned(config, DType::F32, fused);
            let whole: Vec<Vec<u32>> = [7, 1, 70, 3].into_iter().zip(1..).map(|(n, seed)| text(seed, n + 50)).collect();
            let (mut shared, mut alone) = (model.cache(&theta, 4), [0; 4].map(|_| model.cache(&theta, 1)));
            for turn in 0..50 {
                // Texts end and begin again while others go on.
                let mut open: Vec<usize> = (0..4).filter(|at| turn < 20 + 10 * at).collect();
                if turn % 9 == 5 {
                    open.reverse();
                }
                if turn == 17 {
                    shared.clear(2);
                    alone[2].clear(0);
                }
                let texts: Vec<(usize, &[u32])> =
                    open.iter().map(|&at| (at, &whole[at][..whole[at].len() - 50 + turn])).collect();
                let together = next(&model, &theta, &texts, &mut shared);
                for ((at, text), together) in texts.into_iter().zip(together) {
                    let alone = next(&model, &theta, &[(0, text)], &mut alone[at]).remove(0);
                    assert!(alone == together, "text {at} in turn {turn}, fused: {fused}: {config}");
                }
            }
        }
    }
}
