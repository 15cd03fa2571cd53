//! What components cost: a step of each method against one of LoRA of about equal size, whose products are summed within the base's,
//! in turn in one process; first LoRA itself by its graph, as components without a fused form run.
//!
//! `cargo bench --workspace --features attune/failpoints --profile dev --bench components [-- NAME …]`; `RAYON_NUM_THREADS` says how many
//! threads; with `CANDLE_NUM_THREADS=1` it is as in a worker's attempts.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a bench that cannot go on stops, and prints what it found"
)]

use std::sync::Arc;

use attune_adapt::{ADAPTERS, slot};
use attune_architecture::{Architecture, Site, targets};
use attune_models::pass::Stopwatch;
use attune_models::pass::walk::Keep;
use attune_models::{Base, Model, Pass, Slot, Stack};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, RowCx, RowMap};
use attune_points::layout::{NO_LABEL, Source};
use attune_points::objective::{ChunkLoss, ChunkView, Denominator, Objective};
use attune_points::{Bank, BankKind, GradSink, Grads, Layout, Locals, Result, Row, Stats, Theta, Weight};
use attune_spec::Fault;
use attune_spec::id::Step;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, MethodRef};
use attune_tensor::Rng;
use candle_core::{DType, Tensor};

/// The program's own: with the system's, fresh pages would cost more than what is computed in them.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const SHAPE: &str = r#"{
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 4096, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": false
}"#;
const DOCUMENTS: u64 = 8;
const LENGTH: usize = 256;
/// A step's logical shards, each of which has sums over rows of its own.
const PARTS: usize = 8;
const ROUNDS: usize = 5;

/// LoRA that hides that it has a fused form.
struct Lora {
    inner: Box<dyn Adapter>,
    /// Any of its attachments: all have the same map.
    at: Attachment,
}

impl Lora {
    fn hidden(architecture: &Architecture, like: &Measured) -> (Self, Vec<Attachment>) {
        let inner = build(&method(r#"{"method": "lora", "rank": 16, "alpha": 32}"#));
        let ids: Vec<_> = like.model.stack().slots()[0].attachments().map(|at| at.site.clone()).collect();
        let sites: Vec<Site> = architecture.sites().into_iter().filter(|site| ids.contains(&site.id)).collect();
        let attachments = inner.attach(architecture, &sites).unwrap();
        (Self { inner, at: attachments[0].clone() }, attachments)
    }
}

fn method(text: &str) -> MethodRef {
    serde_json::from_str(text).unwrap()
}

fn build(method: &MethodRef) -> Box<dyn Adapter> {
    ADAPTERS
        .build(method, &"adapter".into(), &BuildCx { steps: Step(1), domains: &[], words: None })
        .unwrap_or_else(|faults| panic!("{faults:?}"))
}

impl Adapter for Lora {
    fn attach(&self, arch: &Architecture, sites: &[Site]) -> std::result::Result<Vec<Attachment>, Vec<Fault>> {
        self.inner.attach(arch, sites)
    }

    fn init(&self, at: &Attachment, weight: &dyn Weight, rng: &mut Rng) -> Result<(Locals, BaseEdit)> {
        self.inner.init(at, weight, rng)
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Delta(self)
    }

    fn merge(&self, at: &Attachment, tensors: &Locals, weight: &dyn Weight) -> Result<Merged> {
        self.inner.merge(at, tensors, weight)
    }

    fn peft(&self) -> Option<Peft> {
        self.inner.peft()
    }
}

impl RowMap for Lora {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> Result<Tensor> {
        let Port::Delta(map) = self.inner.port(&self.at) else { unreachable!("it adds rows") };
        map.graph(x_ti, tensors, cx)
    }
}

struct CrossEntropy;

impl Objective for CrossEntropy {
    fn denominator(&self) -> Denominator {
        Denominator::Tokens
    }

    fn chunk(&self, chunk: &ChunkView<'_>) -> Result<ChunkLoss> {
        Ok(ChunkLoss::CrossEntropy { weight_t: vec![1.0; chunk.rows.len()] })
    }
}

/// Methods as they are measured: each with about as many parameters as LoRA of rank 16 has, where its form allows it.
const METHODS: &[&str] = &[
    r#"{"method": "abba", "rank_1": 8, "rank_2": 8}"#,
    r#"{"method": "adalora", "rank": 16, "target_rank": 8}"#,
    r#"{"method": "adamss"}"#,
    r#"{"method": "adaption-prompt"}"#,
    r#"{"method": "alora", "rank": 16, "tokens": [7]}"#,
    r#"{"method": "beft"}"#,
    r#"{"method": "boft", "block_size": 8}"#,
    r#"{"method": "bone", "rank": 32}"#,
    r#"{"method": "bottleneck", "reduction": 8}"#,
    r#"{"method": "connected-adapter", "width": 64, "side": 64}"#,
    r#"{"method": "c3a", "block_size": 8}"#,
    r#"{"method": "capaboost", "rank": 16}"#,
    r#"{"method": "cartridge"}"#,
    r#"{"method": "chain-of-lora", "rank": 6, "links": 3}"#,
    r#"{"method": "clover", "block": 16}"#,
    r#"{"method": "compacter"}"#,
    r#"{"method": "context-aware-prompt", "tokens": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]}"#,
    r#"{"method": "deft", "rank": 16}"#,
    r#"{"method": "delora", "rank": 16}"#,
    r#"{"method": "dora", "rank": 16}"#,
    r#"{"method": "dsee", "rank": 16}"#,
    r#"{"method": "elastic-lora", "rank": 16, "smallest": 8}"#,
    r#"{"method": "flora-tucker"}"#,
    r#"{"method": "fourierft"}"#,
    r#"{"method": "frod"}"#,
    r#"{"method": "full"}"#,
    r#"{"method": "glora"}"#,
    r#"{"method": "gralora", "rank": 16}"#,
    r#"{"method": "hira", "rank": 16}"#,
    r#"{"method": "hra", "rank": 16}"#,
    r#"{"method": "ia3"}"#,
    r#"{"method": "kasa", "rank": 16}"#,
    r#"{"method": "lily", "rank": 32}"#,
    r#"{"method": "ln-tuning"}"#,
    r#"{"method": "loha", "rank": 8}"#,
    r#"{"method": "lokr", "rank": 16}"#,
    r#"{"method": "loldu", "rank": 128}"#,
    r#"{"method": "loramoe", "rank": 4, "experts": 4}"#,
    r#"{"method": "lorma", "rank": 16}"#,
    r#"{"method": "lotr", "rank": 32}"#,
    r#"{"method": "mora", "rank": 16}"#,
    r#"{"method": "multitask-prompt-tuning"}"#,
    r#"{"method": "nora", "rank": 128, "inner_rank": 16}"#,
    r#"{"method": "oft", "block_size": 16}"#,
    r#"{"method": "osf", "preserved": 0.9}"#,
    r#"{"method": "p-tuning"}"#,
    r#"{"method": "peanut", "rank": 32, "depth": 1}"#,
    r#"{"method": "poet", "block_size": 16}"#,
    r#"{"method": "poly", "rank": 4}"#,
    r#"{"method": "prefix-tuning"}"#,
    r#"{"method": "prompt-tuning"}"#,
    r#"{"method": "psoft", "rank": 96}"#,
    r#"{"method": "bdlora", "rank": 16}"#,
    r#"{"method": "monteclora", "rank": 16}"#,
    r#"{"method": "pvera"}"#,
    r#"{"method": "qalora", "rank": 16, "group_size": 8}"#,
    r#"{"method": "randlora"}"#,
    r#"{"method": "road", "group_size": 16}"#,
    r#"{"method": "roselora", "rank": 16}"#,
    r#"{"method": "selective-lora", "rank": 16}"#,
    r#"{"method": "shira", "rank": 16}"#,
    r#"{"method": "sltrain", "rank": 8, "density": 0.04}"#,
    r#"{"method": "spectral-ft", "rank": 128, "inner_rank": 16}"#,
    r#"{"method": "spiel", "density": 0.1}"#,
    r#"{"method": "supertuning", "sparsity": 0.9}"#,
    r#"{"method": "svft", "bands": 16}"#,
    r#"{"method": "taps"}"#,
    r#"{"method": "tinylora"}"#,
    r#"{"method": "trainable-tokens", "tokens": [1, 2, 3, 4, 5, 6, 7, 8]}"#,
    r#"{"method": "unilora", "rank": 16}"#,
    r#"{"method": "vblora", "vectors": 64, "length": 16}"#,
    r#"{"method": "vectorfit"}"#,
    r#"{"method": "vera"}"#,
    r#"{"method": "waveft"}"#,
];

/// Methods that mix what others add, and three of which: these are frozen, and run as well.
const MIXING: &[(&str, &str)] = &[
    (r#"{"method": "adapterfusion"}"#, r#"{"method": "bottleneck", "reduction": 8, "width": 0}"#),
    (r#"{"method": "xlora", "adapters": 3}"#, r#"{"method": "lora", "rank": 16}"#),
];
const MIXED: usize = 3;

/// A component on the sites that it takes by itself, and how many parameters train.
struct Measured {
    model: Model,
    theta: Theta,
    parameters: usize,
}

/// A fresh component at its sites, with its tensors.
fn banked(base: &Base, adapter: Arc<dyn Adapter>, attachments: Vec<Attachment>, train: bool) -> (Slot, Bank) {
    let sites = base.architecture().sites();
    let weight = |at: &Attachment| {
        let site = sites.iter().find(|site| site.id == at.site).unwrap();
        Ok(Box::new(base.weight(site)) as Box<dyn Weight + '_>)
    };
    let fresh = slot::fresh(&*adapter, None, &attachments, weight, &Stats::none(), &Rng::new(1, "init")).unwrap();
    let bank = Bank { slot: "skill".into(), kind: BankKind::Adapter, sets: vec![Arc::new(fresh.own)], train };
    (Slot::new(adapter, attachments), bank)
}

impl Measured {
    fn new(base: &Arc<Base>, method: &MethodRef) -> Self {
        let (adapter, attachments) = Self::placed(base, method, method);
        let (slot, bank) = banked(base, adapter, attachments, true);
        if ADAPTERS.card(&method.method).unwrap().trains_base {
            return Self::of(base, Vec::new(), vec![Bank { kind: BankKind::Weights, ..bank }]);
        }
        Self::of(base, vec![slot], vec![bank])
    }

    /// One that mixes what some others add.
    fn mixing(base: &Arc<Base>, method: &MethodRef, other: &MethodRef) -> Self {
        let others = (0..MIXED).map(|_| Self::placed(base, other, method));
        let mut banks: Vec<_> =
            others.map(|(adapter, attachments)| banked(base, adapter, attachments, false)).collect();
        let (adapter, attachments) = Self::placed(base, method, method);
        banks.push(banked(base, adapter, attachments, true));
        let (slots, banks) = banks.into_iter().unzip();
        Self::of(base, slots, banks)
    }

    /// A component on the sites that `like` takes by itself.
    fn placed(base: &Arc<Base>, method: &MethodRef, like: &MethodRef) -> (Arc<dyn Adapter>, Vec<Attachment>) {
        let card = ADAPTERS.card(&like.method).unwrap();
        let takes = |site: &Site| card.applies.contains(&site.offers());
        let sites = targets::resolve(&Targets::from(card.targets), None, base.architecture(), takes).unwrap();
        let adapter = build(method);
        let attachments = adapter.attach(base.architecture(), &sites).unwrap();
        (adapter.into(), attachments)
    }

    fn of(base: &Arc<Base>, slots: Vec<Slot>, banks: Vec<Bank>) -> Self {
        let mut theta = Theta::single(banks);
        // Away from its start, so that nothing is multiplied with zeros.
        let mut rng = Rng::new(1, "moved");
        let trained: Vec<_> = theta.trained().map(|(id, tensor)| (id, tensor.clone())).collect();
        for (id, tensor) in &trained {
            let noise = rng.normal_tensor(tensor.shape(), 0.02, DType::F32).unwrap();
            theta.put(id, (tensor + noise).unwrap());
        }
        let parameters = trained.iter().map(|(_, tensor)| tensor.elem_count()).sum();
        Self { model: Model::new(Arc::clone(base), Stack::new(slots)), theta, parameters }
    }
}

/// Seconds of the clock and of all processors, and the loss.
fn step(model: &Model, theta: &Theta, layouts: &[Layout]) -> (f64, f64, f64) {
    let before = model.rows_before(theta);
    let layouts: Vec<Layout> = layouts.iter().map(|layout| layout.begun_with(&before)).collect();
    let (watch, cpu) = (Stopwatch::start(), cpu_seconds());
    let passes: Vec<Pass<'_>> = layouts.iter().map(|layout| Pass { theta, layout, dropout: None }).collect();
    let mut sinks: Vec<Grads> = passes.iter().map(|_| Grads::wanting(theta.trained().map(|(id, _)| id))).collect();
    let mut sinks: Vec<&mut dyn GradSink> = sinks.iter_mut().map(|sink| sink as &mut dyn GradSink).collect();
    let (reports, _) = model.grad_parts(&passes, &CrossEntropy, 1.0, Keep::All, &mut sinks).unwrap();
    let loss = reports.iter().map(|report| report.loss_sum).sum();
    (watch.elapsed().as_secs_f64(), cpu_seconds() - cpu, loss)
}

/// Seconds that all threads have run, to a hundredth.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / 100.0
}

fn main() {
    let base = Arc::new(Base::random(Architecture::from_json(SHAPE.as_bytes()).unwrap(), 1, DType::F32).unwrap());
    let mut layouts = vec![Layout::new(); PARTS];
    for example in 0..DOCUMENTS {
        let mut rng = Rng::new(9, "document").sub(example);
        let mut ids: Vec<u32> = (0..=LENGTH).map(|_| rng.below(4096) as u32).collect();
        // Which calls what waits for it.
        ids[0] = 7;
        let rows =
            (0..LENGTH).map(|row| (Row::Token(ids[row]), if row + 1 == LENGTH { NO_LABEL } else { ids[row + 1] }));
        layouts[example as usize % PARTS].push(Source { example, ..Source::default() }, rows.collect::<Vec<_>>());
    }
    let lora = Measured::new(&base, &method(r#"{"method": "lora", "rank": 16, "alpha": 32}"#));
    let (hidden, attachments) = Lora::hidden(base.architecture(), &lora);
    let (slot, bank) = banked(&base, Arc::new(hidden), attachments, true);
    let mut all = vec![("lora by its graph".to_owned(), Measured::of(&base, vec![slot], vec![bank]))];
    let named: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let asked = |method: &MethodRef| named.is_empty() || named.contains(&method.method);
    let methods = METHODS.iter().map(|text| method(text)).filter(asked);
    all.extend(methods.map(|method| (method.method.clone(), Measured::new(&base, &method))));
    let mixing = MIXING.iter().map(|(text, other)| (method(text), method(other))).filter(|(method, _)| asked(method));
    all.extend(mixing.map(|(method, other)| (method.method.clone(), Measured::mixing(&base, &method, &other))));
    println!("LoRA of rank 16 has {} parameters", lora.parameters);
    println!(
        "| method | parameters, of LoRA's | ms a step | against LoRA's | by processor time |\n|---|---|---|---|---|"
    );
    for (name, measured) in &all {
        let mut spent = [(); 2].map(|()| (Vec::new(), 0.0));
        for round in 0..=ROUNDS {
            for (of, (seconds, cpu)) in [&lora, measured].into_iter().zip(&mut spent) {
                let (took, ran, loss) = step(&of.model, &of.theta, &layouts);
                assert!(loss.is_finite(), "{name}");
                // The first round only warms up.
                if round > 0 {
                    seconds.push(took);
                    *cpu += ran;
                }
            }
        }
        let [plain, own] = spent.map(|(mut seconds, cpu)| {
            seconds.sort_by(f64::total_cmp);
            (seconds[seconds.len() / 2], cpu)
        });
        println!(
            "| `{name}` | {:.2} | {:.0} | {:.2} | {:.2} |",
            measured.parameters as f64 / lora.parameters as f64,
            1e3 * own.0,
            own.0 / plain.0,
            own.1 / plain.1
        );
    }
}
