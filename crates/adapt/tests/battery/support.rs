//! A small model with one component, for every trial.

use std::sync::Arc;

use attune_adapt::peft::Part;
use attune_adapt::{ADAPTERS, slot};
use attune_architecture::{Architecture, Site, targets};
use attune_models::{Base, Model, Pass, Slot, Stack};
use attune_points::adapter::{Adapter, Attachment, Merged, Port};
use attune_points::layout::{LabelCounts, NO_LABEL, Source};
use attune_points::objective::{ChunkLoss, ChunkView, Denominator, Objective};
use attune_points::{
    Bank, BankKind, GradSink, Layout, Owner, Params, Row, Stats, StatsRequest, Tap, TensorId, TensorName, Theta, Weight,
};
use attune_probe::{Wanted, measure};
use attune_spec::id::Step;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, Card, MethodRef, SiteKind, Words};
use attune_tensor::Rng;
use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

pub(crate) const CONFIG: &str = r#"{
    "model_type": "qwen2", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 37, "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": true, "rope_theta": 100.0, "initializer_range": 0.3
}"#;

pub(crate) fn architecture() -> Architecture {
    Architecture::from_json(CONFIG.as_bytes()).unwrap()
}

/// A model, a component at its targets, and the component's parameters.
pub(crate) struct Setup {
    pub(crate) model: Arc<Model>,
    pub(crate) adapter: Arc<dyn Adapter>,
    pub(crate) attachments: Vec<Attachment>,
    pub(crate) theta: Theta,
}

impl Setup {
    /// A method of the list on the sites that it takes by itself.
    pub(crate) fn of(card: &Card, adapter: Box<dyn Adapter>, dtype: DType) -> Self {
        // The head of this model is its table of tokens.
        let targets = if card.targets == "head" { "down_proj" } else { card.targets };
        Self::on(Self::base(dtype), adapter, &Targets::from(targets), card.applies, dtype)
    }

    /// A component on these linears.
    pub(crate) fn new(adapter: Box<dyn Adapter>, targets: &str, dtype: DType) -> Self {
        Self::on(Self::base(dtype), adapter, &Targets::from(targets), &[SiteKind::Linear], dtype)
    }

    /// The component with these parameters, as a folder keeps it.
    pub(crate) fn part<'a>(&'a self, params: &'a Params) -> Part<'a> {
        Part { adapter: &*self.adapter, attachments: &self.attachments, params }
    }

    fn base(dtype: DType) -> Base {
        Base::random(architecture(), 5, dtype).unwrap()
    }

    pub(crate) fn on(
        base: Base,
        adapter: Box<dyn Adapter>,
        named: &Targets,
        applies: &[SiteKind],
        dtype: DType,
    ) -> Self {
        let takes = |site: &Site| applies.contains(&site.offers());
        let sites = targets::resolve(named, None, base.architecture(), takes).unwrap();
        let attachments = adapter.attach(base.architecture(), &sites).unwrap();
        let adapter: Arc<dyn Adapter> = adapter.into();
        let mut slots = vec![Slot::new(Arc::clone(&adapter), attachments.iter().cloned())];
        // What mixes others has some to mix, frozen ones.
        let others = match adapter.port(&attachments[0]) {
            Port::Mixture(_) => Some((json!({"method": "bottleneck", "reduction": 4}), 2)),
            Port::Blend(map) => Some((json!({"method": "lora", "rank": 2}), map.blends())),
            _ => None,
        };
        let mut mixed = Vec::new();
        for (method, seed) in
            others.iter().flat_map(|(method, count)| (1..=*count as u64).map(move |seed| (method, seed)))
        {
            let (slot, bank) = frozen(method, &base, &sites, seed, dtype);
            slots.push(slot);
            mixed.push(bank);
        }
        let stack = Stack::new(slots);
        let kind = match adapter.port(&attachments[0]) {
            Port::Weights => BankKind::Weights,
            _ => BankKind::Adapter,
        };
        let model = Model::new(base, stack);
        let model = if dtype == DType::F64 { model.in_f64() } else { model };
        let mut setup = Self { model: Arc::new(model), adapter, attachments, theta: Theta::default() };
        let asked = setup.adapter.calibrate();
        let stats = match setup.adapter.reads() {
            None if asked.is_empty() => Stats::none(),
            // What linears read shows in 32 bits alone; the weights are the same.
            None => {
                let narrow = Base::random(setup.model.base().architecture().clone(), 5, DType::F32).unwrap();
                stats(&Model::new(narrow, Stack::default()), &asked, &sites, &[batch()])
            }
            Some(tokens) => of_text(&setup.model, tokens, &sites),
        };
        let params =
            slot::fresh(&*setup.adapter, None, &setup.attachments, |at| setup.weight(at), &stats, &Rng::new(7, "init"));
        let mut params = params.unwrap().own;
        for at in &setup.attachments {
            let Port::Blend(map) = setup.adapter.port(at) else { continue };
            let Some(made) = map.made_of(at, &setup.merged(&mixed, at)).unwrap() else { continue };
            at.tensors.iter().for_each(|spec| {
                params.insert(spec.name(at.site.as_str()), made.get(spec.local).unwrap().clone());
            });
        }
        let params =
            params.map(|_, tensor| if tensor.dtype().is_float() { tensor.to_dtype(dtype) } else { Ok(tensor.clone()) });
        let params = params.unwrap();
        let own = Bank { slot: "x".into(), kind, sets: vec![Arc::new(params)], train: true };
        setup.theta = Theta::single(std::iter::once(own).chain(mixed));
        // The component itself comes last.
        setup.theta.bindings.rotate_left(1);
        setup
    }

    /// The base weight at an attachment.
    pub(crate) fn weight<'a>(&'a self, at: &Attachment) -> attune_points::Result<Box<dyn Weight + 'a>> {
        let site = self.model.base().architecture().site(at.site.as_str()).unwrap();
        let base = self.model.base();
        let bias = base.weight(&site).bias(DType::F32)?;
        let dense = match site.kind {
            attune_architecture::SiteKind::Block { .. } => Tensor::zeros((0, 0), DType::F32, &Device::Cpu)?,
            _ => base.weight(&site).dense(DType::F32)?,
        };
        Ok(Box::new(Owned { dense, bias }))
    }

    /// What those that it mixes, of these banks, are when they are merged into the weight at `at`.
    fn merged(&self, mixed: &[Bank], at: &Attachment) -> Vec<Merged> {
        let others = self.model.stack().slots()[1..].iter().zip(mixed);
        let merged = |(slot, bank): (&Slot, &Bank)| {
            let own = slot.at(&at.site).unwrap();
            let locals = attune_models::stack::locals(own, &bank.sets[0]).unwrap();
            slot.adapter().merge(own, &locals, &*self.weight(own).unwrap()).unwrap()
        };
        others.map(merged).collect()
    }

    /// A batch with the rows that the component puts before its documents.
    pub(crate) fn begun(&self, layout: &Layout) -> Layout {
        layout.begun_with(&self.model.rows_before(&self.theta))
    }

    /// The logits of the rows of a batch, after those that the component puts before its documents.
    pub(crate) fn logits(&self, layout: &Layout) -> attune_points::Result<Tensor> {
        let begun = self.begun(layout);
        let logits = self.model.logits(&Pass { theta: &self.theta, layout: &begun, dropout: None })?;
        let own: Vec<u32> =
            (0..).zip(begun.rows()).filter(|(_, row)| matches!(row, Row::Token(_))).map(|(at, _)| at).collect();
        Ok(logits.index_select(&Tensor::new(own, &Device::Cpu)?, 0)?)
    }

    pub(crate) fn params(&self) -> Params {
        (*self.theta.banks[0].sets[0]).clone()
    }

    pub(crate) fn clone_with(&self, theta: Theta) -> Self {
        let (model, adapter) = (Arc::clone(&self.model), Arc::clone(&self.adapter));
        Self { model, adapter, attachments: self.attachments.clone(), theta }
    }

    /// The parameters with one tensor replaced.
    pub(crate) fn with(&self, name: &TensorName, tensor: Tensor) -> Theta {
        let mut params = self.params();
        params.insert(name.clone(), tensor);
        self.with_params(params)
    }

    pub(crate) fn with_params(&self, params: Params) -> Theta {
        let mut theta = self.theta.clone();
        theta.banks[0].sets[0] = Arc::new(params);
        theta
    }

    /// Moves every tensor that trains away from its start.
    pub(crate) fn disturb(&mut self, std: f64) {
        let mut rng = Rng::new(11, "disturb");
        let mut params = self.params();
        for (id, tensor) in self.theta.trained() {
            let noise = rng.normal_tensor(tensor.shape(), std, tensor.dtype()).unwrap();
            params.insert(id.name, (tensor + noise).unwrap());
        }
        self.theta = self.with_params(params);
    }
}

/// A frozen component at these sites, away from its start.
fn frozen(method: &Value, base: &Base, sites: &[Site], seed: u64, dtype: DType) -> (Slot, Bank) {
    let method: MethodRef = serde_json::from_value(method.clone()).unwrap();
    let cx = BuildCx { steps: Step(1), domains: &[], words: None };
    let adapter: Arc<dyn Adapter> = ADAPTERS.build(&method, &"tune.adapter".into(), &cx).unwrap().into();
    let attachments = adapter.attach(base.architecture(), sites).unwrap();
    let mut params = Params::new();
    for at in &attachments {
        for spec in &at.tensors {
            let mut rng = Rng::new(seed, &method.method).named(at.site.as_str()).named(spec.local);
            params.insert(spec.name(at.site.as_str()), rng.normal_tensor(spec.shape.as_slice(), 0.3, dtype).unwrap());
        }
    }
    let (slot, sets) = (Slot::new(adapter, attachments), vec![Arc::new(params)]);
    (slot, Bank { slot: "mixed".into(), kind: BankKind::Adapter, sets, train: false })
}

struct Owned {
    dense: Tensor,
    bias: Option<Tensor>,
}

impl Weight for Owned {
    fn shape(&self) -> (usize, usize) {
        Weight::shape(&self.dense)
    }

    fn rows(&self, rows: std::ops::Range<usize>, dtype: DType) -> attune_points::Result<Tensor> {
        self.dense.rows(rows, dtype)
    }

    fn bias(&self, dtype: DType) -> attune_points::Result<Option<Tensor>> {
        Ok(self.bias.as_ref().map(|bias| bias.to_dtype(dtype)).transpose()?)
    }
}

/// Three documents, two of one length.
pub(crate) fn batch() -> Layout {
    let mut layout = Layout::new();
    let mut rng = Rng::new(9, "documents");
    for (example, length) in [6usize, 9, 6].into_iter().enumerate() {
        let ids: Vec<u32> = (0..length).map(|_| rng.below(37) as u32).collect();
        let label = |row: usize| if row % 3 == 1 { NO_LABEL } else { ids.get(row + 1).copied().unwrap_or(NO_LABEL) };
        let rows: Vec<_> = ids.iter().enumerate().map(|(row, &id)| (Row::Token(id), label(row))).collect();
        layout.push(Source { example: example as u64, ..Source::default() }, rows);
    }
    layout
}

/// What somebody asks for, measured on a model without components.
pub(crate) fn stats(model: &Model, asked: &[StatsRequest], sites: &[Site], data: &[Layout]) -> Stats {
    let mut wanted = Wanted::default();
    asked.iter().for_each(|request| wanted.add(request, sites).unwrap());
    let mut data = data.iter().map(|layout| Arc::new(layout.clone()));
    measure(&mut Bare(model), &wanted, 64, &mut || Ok(data.next())).unwrap().0
}

/// What attentions of a model without components make of a text.
pub(crate) fn of_text(model: &Model, tokens: &[u32], sites: &[Site]) -> Stats {
    let mut wanted = Wanted::default();
    wanted.add_text(tokens, sites, model.base().architecture().kv_width()).unwrap();
    measure(&mut Bare(model), &wanted, 64, &mut || Ok(None)).unwrap().0
}

/// The tokens of every text.
#[derive(Debug)]
struct Told(Vec<u32>);

impl Words for Told {
    fn tokens(&self, _: &str) -> Result<Vec<u32>, String> {
        Ok(self.0.clone())
    }
}

/// A component that is told the tokens of its text.
pub(crate) fn build_told(method: Value, tokens: &[u32]) -> Result<Box<dyn Adapter>, String> {
    let method: MethodRef = serde_json::from_value(method).map_err(|error| error.to_string())?;
    let told = Told(tokens.to_vec());
    let cx = BuildCx { steps: Step(1), domains: &[], words: Some(&told) };
    ADAPTERS.build(&method, &"tune.adapter".into(), &cx).map_err(|faults| faults[0].to_string())
}

struct Bare<'a>(&'a Model);

impl attune_probe::Model for Bare<'_> {
    fn look(&mut self, on: &[Arc<Layout>], tap: &dyn Tap) -> attune_points::Result<()> {
        let theta = Theta::default();
        let passes: Vec<Pass<'_>> = on.iter().map(|layout| Pass { theta: &theta, layout, dropout: None }).collect();
        self.0.look(&passes, tap).map(drop)
    }

    fn gradients(&mut self, on: &Arc<Layout>, sink: &mut dyn GradSink) -> attune_points::Result<()> {
        let pass = Pass { theta: &Theta::default(), layout: on, dropout: None };
        self.0.grad(&pass, &CrossEntropy, 1.0, sink).map(drop)
    }

    fn weight(&self, site: &Site) -> TensorId {
        TensorId { owner: Owner::Base, name: self.0.base().tensor_name(site.id.as_str(), "weight") }
    }

    fn denominator(&self, counts: LabelCounts) -> f64 {
        CrossEntropy.denominator().of(counts)
    }
}

/// Plain cross-entropy.
pub(crate) struct CrossEntropy;

impl Objective for CrossEntropy {
    fn denominator(&self) -> Denominator {
        Denominator::Tokens
    }

    fn chunk(&self, chunk: &ChunkView<'_>) -> attune_points::Result<ChunkLoss> {
        Ok(ChunkLoss::CrossEntropy { weight_t: vec![1.0; chunk.rows.len()] })
    }
}

pub(crate) fn difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.shape(), b.shape());
    let wide = |x: &Tensor| x.to_dtype(DType::F64).unwrap();
    largest(&(wide(a) - wide(b)).unwrap())
}

pub(crate) fn largest(a: &Tensor) -> f64 {
    a.to_dtype(DType::F64).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}
