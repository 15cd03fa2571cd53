//! What components cost: steps of LoRA at every linear, summed within the base's products, against the same by its graph (as
//! components without a fused form run) and against DoRA, which makes another weight; in turn in one process.
//!
//! `cargo bench -p attune-adapt --profile dev --bench components`; `RAYON_NUM_THREADS` says how many threads.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a bench that cannot go on stops, and prints what it found"
)]

use std::sync::Arc;

use attune_adapt::ADAPTERS;
use attune_architecture::{Architecture, Site, SiteKind};
use attune_models::pass::Stopwatch;
use attune_models::pass::walk::Keep;
use attune_models::{Base, Model, Pass, Slot, Stack};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, RowCx, RowMap};
use attune_points::layout::{NO_LABEL, Source};
use attune_points::objective::{ChunkLoss, ChunkView, Denominator, Objective};
use attune_points::{Bank, BankKind, GradSink, Grads, Layout, Locals, Params, Result, Row, Theta, Weight};
use attune_spec::Fault;
use attune_spec::id::Step;
use attune_spec::method::{BuildCx, MethodRef};
use attune_tensor::Rng;
use candle_core::{DType, Tensor};
use serde_json::json;

const SHAPE: &str = r#"{
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 4096, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": false
}"#;
const DOCUMENTS: u64 = 8;
const LENGTH: usize = 256;
/// A step's logical shards, each of which has sums over rows of its own.
const PARTS: usize = 8;
const ROUNDS: usize = 7;

/// LoRA, which may hide that it has a fused form.
struct Lora {
    inner: Box<dyn Adapter>,
    fused: bool,
    /// Any of its attachments: all have the same map.
    at: Option<Attachment>,
}

impl Lora {
    fn new(fused: bool, architecture: &Architecture, sites: &[Site]) -> (Self, Vec<Attachment>) {
        let inner = build("lora");
        let attachments = inner.attach(architecture, sites).unwrap();
        (Self { inner, fused, at: attachments.first().cloned() }, attachments)
    }
}

fn build(method: &str) -> Box<dyn Adapter> {
    let method: MethodRef = serde_json::from_value(json!({"method": method, "rank": 16, "alpha": 32})).unwrap();
    ADAPTERS.build(&method, &"adapter".into(), &BuildCx { steps: Step(1), domains: &[] }).unwrap()
}

impl Adapter for Lora {
    fn attach(&self, arch: &Architecture, sites: &[Site]) -> std::result::Result<Vec<Attachment>, Vec<Fault>> {
        self.inner.attach(arch, sites)
    }

    fn init(&self, at: &Attachment, weight: &dyn Weight, rng: &mut Rng) -> Result<(Locals, BaseEdit)> {
        self.inner.init(at, weight, rng)
    }

    fn port(&self, at: &Attachment) -> Port<'_> {
        if self.fused { self.inner.port(at) } else { Port::Delta(self) }
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
        let Some(Port::Delta(map)) = self.at.as_ref().map(|at| self.inner.port(at)) else {
            unreachable!("it adds rows")
        };
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

/// How a component takes part.
#[derive(Clone, Copy)]
enum How {
    Fused,
    Graph,
    Weight,
}

fn model(base: &Arc<Base>, how: How) -> (Model, Theta) {
    let architecture = base.architecture();
    // The head has no adapter, as in the comparisons with other programs.
    let is_target = |site: &Site| site.layer.is_some() && matches!(site.kind, SiteKind::Linear { .. });
    let sites: Vec<Site> = architecture.sites().into_iter().filter(is_target).collect();
    let (component, attachments): (Arc<dyn Adapter>, Vec<Attachment>) = match how {
        How::Fused | How::Graph => {
            let (lora, attachments) = Lora::new(matches!(how, How::Fused), architecture, &sites);
            (Arc::new(lora), attachments)
        }
        How::Weight => {
            let dora = build("dora");
            let attachments = dora.attach(architecture, &sites).unwrap();
            (dora.into(), attachments)
        }
    };
    let mut params = Params::new();
    for at in &attachments {
        let mut rng = Rng::new(1, "set").named(at.site.as_str());
        for spec in &at.tensors {
            let value = rng.normal_tensor(spec.shape.as_slice(), 0.02, DType::F32).unwrap();
            params.insert(spec.name(at.site.as_str()), value);
        }
    }
    let bank = Bank { slot: "skill".into(), kind: BankKind::Adapter, sets: vec![Arc::new(params)], train: true };
    let stack = Stack::new(vec![Slot::new(component, attachments)]);
    (Model::new(Arc::clone(base), stack), Theta::single([bank]))
}

/// Seconds of the clock and of all processors, and the loss.
fn step(model: &Model, theta: &Theta, layouts: &[Layout]) -> (f64, f64, f64) {
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
        let ids: Vec<u32> = (0..=LENGTH).map(|_| rng.below(4096) as u32).collect();
        let rows =
            (0..LENGTH).map(|row| (Row::Token(ids[row]), if row + 1 == LENGTH { NO_LABEL } else { ids[row + 1] }));
        layouts[example as usize % PARTS].push(Source { example, ..Source::default() }, rows.collect::<Vec<_>>());
    }
    let models = [How::Fused, How::Graph, How::Weight].map(|how| model(&base, how));
    let mut spent = [(); 3].map(|()| (Vec::new(), 0.0));
    for round in 0..=ROUNDS {
        for ((model, theta), (seconds, cpu)) in models.iter().zip(&mut spent) {
            let (took, ran, loss) = step(model, theta, &layouts);
            // The first round only warms up.
            if round > 0 {
                seconds.push(took);
                *cpu += ran;
            } else {
                println!("loss {loss}");
            }
        }
    }
    let [fused, graph, weight] = spent.map(|(mut seconds, cpu)| {
        seconds.sort_by(f64::total_cmp);
        (seconds[seconds.len() / 2], cpu)
    });
    println!("within the product {:.0} ms a step", 1e3 * fused.0);
    for (how, (seconds, cpu)) in [("by graph", graph), ("by another weight", weight)] {
        let ratios = (seconds / fused.0, cpu / fused.1);
        println!("{how} {:.0} ms a step: ratio {:.2}, by processor time {:.2}", 1e3 * seconds, ratios.0, ratios.1);
    }
}
