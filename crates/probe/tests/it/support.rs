// Small models and data.

use std::collections::BTreeMap;
use std::sync::Arc;

use attune_architecture::{Architecture, Site, SiteId, SiteKind};
use attune_models::pass::walk::Keep;
use attune_models::{Base, Model, Pass, Stack};
use attune_points::layout::{LabelCounts, NO_LABEL, Source};
use attune_points::objective::{ChunkLoss, ChunkView, Denominator, Objective};
use attune_points::{GradSink, Layout, Result, Row, Stats, StatsRequest, Tap, TensorId, Theta};
use attune_probe::{Wanted, measure};
use attune_tensor::Rng;
use candle_core::{DType, Tensor};

pub(crate) const LLAMA: &str = r#"{
    "model_type": "llama", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 37, "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": false, "rope_theta": 100.0, "initializer_range": 0.3
}"#;

/// Queries, keys and values in one linear.
pub(crate) const GPT2: &str = r#"{
    "model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24, "n_positions": 32, "vocab_size": 37,
    "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "initializer_range": 0.3
}"#;

/// Experts, each of which reads some rows.
pub(crate) const OLMOE: &str = r#"{
    "model_type": "olmoe", "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 37, "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "num_experts": 3, "num_experts_per_tok": 2, "norm_topk_prob": false, "tie_word_embeddings": false, "rope_theta": 100.0,
    "initializer_range": 0.3
}"#;

pub(crate) fn base(config: &str, dtype: DType) -> Arc<Base> {
    Arc::new(Base::random(Architecture::from_json(config.as_bytes()).unwrap(), 5, dtype).unwrap())
}

/// All linears of a model but its head.
pub(crate) fn linears(base: &Base) -> Vec<Site> {
    let is_linear = |site: &Site| matches!(site.kind, SiteKind::Linear { .. }) && site.layer.is_some();
    base.architecture().sites().into_iter().filter(is_linear).collect()
}

/// Five micro-batches of two to four documents of two domains.
pub(crate) fn data() -> Vec<Arc<Layout>> {
    let mut rng = Rng::new(3, "data");
    let mut example = 0;
    let mut of_part = |documents: usize| {
        let mut layout = Layout::new();
        for _ in 0..documents {
            let ids: Vec<u32> = (0..4 + rng.below(9)).map(|_| rng.below(37) as u32).collect();
            let label =
                |row: usize| if row % 3 == 1 { NO_LABEL } else { ids.get(row + 1).copied().unwrap_or(NO_LABEL) };
            let rows: Vec<_> = ids.iter().enumerate().map(|(row, &id)| (Row::Token(id), label(row))).collect();
            layout.push(Source { example, domain: (example % 2) as u16, ..Source::default() }, rows);
            example += 1;
        }
        Arc::new(layout)
    };
    [3, 2, 4, 3, 2].map(&mut of_part).to_vec()
}

/// Plain cross-entropy.
pub(crate) struct CrossEntropy;

impl Objective for CrossEntropy {
    fn denominator(&self) -> Denominator {
        Denominator::Tokens
    }

    fn chunk(&self, chunk: &ChunkView<'_>) -> Result<ChunkLoss> {
        Ok(ChunkLoss::CrossEntropy { weight_t: vec![1.0; chunk.rows.len()] })
    }
}

/// A model as the pass uses it.
pub(crate) struct Plain(pub(crate) Model);

impl Plain {
    pub(crate) fn new(base: &Arc<Base>) -> Self {
        Self(Model::new(Arc::clone(base), Stack::default()))
    }
}

impl attune_probe::Model for Plain {
    fn look(&mut self, on: &[Arc<Layout>], tap: &dyn Tap) -> Result<()> {
        let theta = Theta::default();
        let passes: Vec<Pass<'_>> = on.iter().map(|layout| Pass { theta: &theta, layout, dropout: None }).collect();
        self.0.look(&passes, tap).map(drop)
    }

    fn gradients(&mut self, on: &Arc<Layout>, sink: &mut dyn GradSink) -> Result<()> {
        let theta = Theta::default();
        let pass = Pass { theta: &theta, layout: on, dropout: None };
        self.0.grad_parts(&[pass], &CrossEntropy, 1.0, Keep::Inputs, &mut [sink]).map(drop)
    }

    fn weight(&self, site: &Site) -> TensorId {
        TensorId { owner: attune_points::Owner::Base, name: self.0.base().tensor_name(site.id.as_str(), "weight") }
    }

    fn denominator(&self, counts: LabelCounts) -> f64 {
        CrossEntropy.denominator().of(counts)
    }
}

/// What is measured at all linears.
pub(crate) fn measured(
    base: &Arc<Base>,
    requests: &[StatsRequest],
    data: &[Arc<Layout>],
    rows_per_pass: usize,
) -> Stats {
    let sites = linears(base);
    let mut wanted = Wanted::default();
    requests.iter().for_each(|request| wanted.add(request, &sites).unwrap());
    let mut data = data.iter().cloned();
    measure(&mut Plain::new(base), &wanted, rows_per_pass, &mut || Ok(data.next())).unwrap().0
}

/// Every number of a tensor.
pub(crate) fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Whether numbers agree but for `bound` of the largest.
pub(crate) fn agree(found: &[f64], expected: &[f64], bound: f64) -> bool {
    let largest = expected.iter().fold(1e-30, |most: f64, x| most.max(x.abs()));
    found.len() == expected.len() && found.iter().zip(expected).all(|(a, b)| (a - b).abs() <= bound * largest)
}

/// By request and site, each number's bits.
pub(crate) fn bits(stats: &Stats) -> BTreeMap<(String, SiteId), Vec<u64>> {
    use attune_points::stats::Stat;
    let of = |tensors: &[&Tensor]| tensors.iter().flat_map(|tensor| values(tensor)).map(f64::to_bits).collect();
    let each = stats.iter().map(|(request, site, stat)| {
        let bits = match stat {
            Stat::Covariance(found) => of(&[&found.sum_ii, &found.sum_i]),
            Stat::Norms(found) => of(&[&found.sum_i]),
            Stat::Gradient(found) => of(&[&found.sum_oi]),
            _ => Vec::new(),
        };
        ((request.to_string(), site.clone()), bits)
    });
    each.collect()
}
