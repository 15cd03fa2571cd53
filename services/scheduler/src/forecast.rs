//! What a job will cost, told from the base's structure and the plan, before anything is loaded.

use attune_architecture::Site;
use attune_proto::v1;
use attune_scheduler_core::Memory;
use attune_spec::job::plan::{Length, ROWS_PER_PASS};
use attune_spec::job::{Activations, Plan, Precision};
use attune_spec::method::{Catalogue, MethodDocument, SiteKind, expression};
use serde_json::{Map, Value};

use crate::admit::{self, Admitted};

/// Bytes that each trained parameter takes beside gradients of shards: value, sum of gradients and two moments in f32, and in part the
/// value once more where it is written.
const TRAINED_BYTES: u64 = 18;
/// The same in each process of a gang, but for the moments, which one of them has: value, sum, and what of gradients and values is
/// on its way.
const SHARED_BYTES: u64 = 10;
/// Bytes of the moments.
const MOMENTS_BYTES: u64 = 8;
/// Bytes of a gradient, of which each logical shard of a pass has its own.
const GRADIENT_BYTES: u64 = 4;

/// Bytes of a number that a graph makes.
const NUMBER_BYTES: u64 = 4;
/// Bytes of a number that a component holds and never trains: in use, and where it is written.
const FIXED_BYTES: f64 = 8.0;

/// Bytes of a process beside weights and passes: the program, a tokenizer, data, the allocator, threads and their scratch. Measured as
/// what jobs of several sizes took beside the rest, in the development profile.
const PROCESS_BYTES: u64 = 80 << 20;

/// What the graphs of components hold beside what they train where their cards do not say it, measured as what forty of them took on two
/// shapes and in batches of two sizes: for each row of a pass some numbers of as many as a linear takes and gives, or as a block does, which has more of them at once;
const ROW_NUMBERS: usize = 2;
/// see [`ROW_NUMBERS`];
const BLOCK_NUMBERS: usize = 7;
/// at the largest linear some weights of its shape, whatever the rows;
const WEIGHTS_AT_ONCE: usize = 7;
/// and what the allocator keeps of all this for the next one.
const GRAPH_BYTES: u64 = 16 << 20;

/// What training takes of memory; nothing when the base's structure is not known here.
pub(crate) fn memory(admitted: &Admitted) -> Option<Memory> {
    let (architecture, plan) = (admitted.architecture.as_ref()?, admitted.plan.as_ref()?);
    let (bytes, again) = (element_bytes(plan), plan.activations == Activations::Recompute);
    let pass = |rows: u64| {
        let per_row = architecture.kept_bytes_per_row(bytes, again) + architecture.working_bytes_per_row(bytes, again);
        rows * per_row + architecture.head_bytes(rows, bytes)
    };
    // What holds a micro-batch several times goes through by itself.
    let shard = u64::from(plan.batch_tokens / plan.logical_shards.max(1));
    let copies = of_step(plan, |document| &document.copies)? as u64;
    let here = admitted.spec.resources.devices_per_worker;
    let all = admitted.spec.resources.workers * here;
    let rows = if copies > 1 { copies * shard } else { plan.rows_at_once(all) * u64::from(here) };
    let shards = if copies > 1 { u64::from(here) } else { rows / shard.max(1) };
    // What components have measured is gone when they train, and no pass runs while they begin.
    let begun = statistics(admitted)? + start(admitted)?.saturating_sub(pass(rows));
    Some(Memory {
        base: PROCESS_BYTES + weights(admitted)?,
        own: trained_bytes(admitted, rows, shards)?.max(begun),
        pass: pass(rows),
        full_pass: pass(rows.max(ROWS_PER_PASS.into())),
    })
}

/// Bytes of what trains, in one process through which so many rows of so many logical shards go at a time.
fn trained_bytes(admitted: &Admitted, rows: u64, shards: u64) -> Option<u64> {
    let Trainable { parameters: n, fixed, row_numbers, graph } = trainable(admitted)?;
    let resources = &admitted.spec.resources;
    // Ranks that share a process have all moments each.
    let workers = if resources.devices_per_worker == 1 { u64::from(resources.workers) } else { 1 };
    let of_one = if workers > 1 { n * SHARED_BYTES + n * MOMENTS_BYTES / workers } else { n * TRAINED_BYTES };
    let of_graphs = (rows * graph.row_numbers + graph.numbers) * NUMBER_BYTES + graph.bytes;
    let of_rows = (rows as f64 * row_numbers) as u64 * 4;
    Some(of_one + n * GRADIENT_BYTES * shards + of_rows + of_graphs + (fixed * FIXED_BYTES) as u64)
}

/// Bytes of what components hold before the first step and not later, at one linear after the other; nothing when somebody does not say
/// how many they are.
fn start(admitted: &Admitted) -> Option<u64> {
    let (architecture, plan) = (admitted.architecture.as_ref()?, admitted.plan.as_ref()?);
    let mut numbers: f64 = 0.0;
    for slot in plan.stack.iter().filter(|slot| slot.train) {
        for asks in slot.method.iter().chain(&slot.init) {
            let document = Catalogue::embedded().get(&asks.method)?;
            if document.start_numbers.is_empty() {
                continue;
            }
            for site in admit::sites(slot, architecture).ok()?.iter().filter(|site| site.out_in().is_some()) {
                let mut names = asks.params.clone();
                names.extend(site.sizes(architecture));
                numbers = numbers.max(expression::number(&document.start_numbers, &names).ok()?);
            }
        }
    }
    Some(numbers as u64 * NUMBER_BYTES)
}

/// Bytes of the base's weights: of those in few bits twice, if the job has some quantised anew beside those that jobs share.
fn weights(admitted: &Admitted) -> Option<u64> {
    let (architecture, plan) = (admitted.architecture.as_ref()?, admitted.plan.as_ref()?);
    let (catalogue, bytes) = (Catalogue::embedded(), element_bytes(plan));
    let Some(format) = &plan.quantization else { return Some(architecture.weight_bytes(bytes)) };
    let few = |output, input| catalogue.stored_bytes(format, output, input);
    few(1, 1)?;
    let all = architecture.quantized_weight_bytes(bytes, |output, input| few(output, input).unwrap_or(0.0));
    let anew = plan.stack.iter().any(|slot| slot.init.as_ref().is_some_and(|init| catalogue.owns_base(init)));
    let whole = architecture.quantized_weight_bytes(bytes, |_, _| 0.0);
    Some(if anew { 2 * all - whole } else { all })
}

/// Bytes of a number of the base.
const fn element_bytes(plan: &Plan) -> u64 {
    match plan.precision {
        Precision::F32 => 4,
        Precision::Bf16 => 2,
    }
}

/// What the card of the step rule says, 1 if it says nothing.
fn of_step(plan: &Plan, text: impl Fn(&MethodDocument) -> &String) -> Option<f64> {
    let document = Catalogue::embedded().get(&plan.step.method)?;
    let text = text(document);
    if text.is_empty() { Some(1.0) } else { expression::number(text, &plan.step.params).ok() }
}

/// What trains.
struct Trainable {
    /// Parameters.
    parameters: u64,
    /// Numbers that components hold beside them.
    fixed: f64,
    /// Numbers that components on linears keep of each row of a pass: as many as a LoRA of as many parameters would.
    row_numbers: f64,
    /// What the largest graph of a component holds while it runs.
    graph: Graph,
}

/// What a graph holds while it runs.
#[derive(Debug, Clone, Copy, Default)]
struct Graph {
    /// Numbers of each row.
    row_numbers: u64,
    /// Numbers whatever the rows.
    numbers: u64,
    /// Bytes that the allocator keeps of it.
    bytes: u64,
}

impl Graph {
    /// At one site, where the card says nothing: norms and tables are small beside linears, and attentions and MLPs as a whole take and
    /// give the stream.
    fn at(site: &Site, hidden: usize) -> Self {
        match (site.offers(), site.out_in()) {
            (SiteKind::Linear, Some((output, input))) => Self {
                row_numbers: (ROW_NUMBERS * (output + input)) as u64,
                numbers: (WEIGHTS_AT_ONCE * output * input) as u64,
                bytes: GRAPH_BYTES,
            },
            (SiteKind::Mlp, _) => {
                Self { row_numbers: (BLOCK_NUMBERS * 2 * hidden) as u64, numbers: 0, bytes: GRAPH_BYTES }
            }
            (SiteKind::Attention, _) => Self { row_numbers: (ROW_NUMBERS * 2 * hidden) as u64, numbers: 0, bytes: 0 },
            _ => Self::default(),
        }
    }

    /// As a card says it of a linear, by an expression that is linear in the rows; nothing when it cannot be read.
    fn said(text: &str, mut names: Map<String, Value>) -> Option<Self> {
        let mut numbers = |rows: u64| {
            names.insert("rows".to_owned(), rows.into());
            expression::number(text, &names).ok()
        };
        let (none, one) = (numbers(0)?, numbers(1)?);
        Some(Self { row_numbers: (one - none).max(0.0) as u64, numbers: none.max(0.0) as u64, bytes: GRAPH_BYTES })
    }

    fn largest(self, other: Self) -> Self {
        Self {
            row_numbers: self.row_numbers.max(other.row_numbers),
            numbers: self.numbers.max(other.numbers),
            bytes: self.bytes.max(other.bytes),
        }
    }
}

/// What trains; nothing when somebody does not say how many parameters that are.
fn trainable(admitted: &Admitted) -> Option<Trainable> {
    let (architecture, plan) = (admitted.architecture.as_ref()?, admitted.plan.as_ref()?);
    let (mut parameters, mut fixed, mut row_numbers, mut graph) = (0.0, 0.0, 0.0, Graph::default());
    for slot in plan.stack.iter().filter(|slot| slot.train) {
        let method = slot.method.as_ref()?;
        let document = Catalogue::embedded().get(&method.method)?;
        if document.parameters.is_empty() {
            continue;
        }
        let mut sites = admit::sites(slot, architecture).ok()?;
        if document.trains_base {
            // A weight that is tied to another one trains there.
            let infos = architecture.tensors();
            sites.retain(|site| infos.iter().any(|info| info.site == site.id));
        }
        let names = |site: &Site| {
            let mut names = method.params.clone();
            names.extend(site.sizes(architecture));
            names
        };
        if !document.fused && !document.trains_base {
            for site in &sites {
                let at = match document.graph_numbers.as_str() {
                    text if !text.is_empty() && site.offers() == SiteKind::Linear => Graph::said(text, names(site))?,
                    _ => Graph::at(site, architecture.hidden),
                };
                graph = graph.largest(at);
            }
        }
        for site in &sites {
            let names = names(site);
            let own = expression::number(&document.parameters, &names).ok()?;
            parameters += own;
            if !document.fixed.is_empty() {
                fixed += expression::number(&document.fixed, &names).ok()?;
            }
            if let Some((output, input)) = site.out_in().filter(|_| !document.trains_base) {
                row_numbers += own / (output + input) as f64;
            }
        }
        // What is shared has the sizes of any site: those that it depends on are alike at all.
        if let Some(site) = sites.first().filter(|_| !document.shared.is_empty()) {
            parameters += expression::number(&document.shared, &names(site)).ok()?;
        }
        if !document.fixed_shared.is_empty() {
            let widths = sites.iter().filter_map(Site::out_in);
            let (o, i) = widths.fold((0, 0), |(o, i), (output, input)| (o.max(output), i.max(input)));
            let mut names = method.params.clone();
            names.extend([("o".to_owned(), o.into()), ("i".to_owned(), i.into())]);
            fixed += expression::number(&document.fixed_shared, &names).ok()?;
        }
    }
    Some(Trainable { parameters: parameters.max(0.0) as u64, fixed, row_numbers: row_numbers.max(0.0), graph })
}

/// Bytes of what components have measured before the first step; nothing when somebody does not say how many they are.
fn statistics(admitted: &Admitted) -> Option<u64> {
    let (architecture, plan) = (admitted.architecture.as_ref()?, admitted.plan.as_ref()?);
    let mut bytes = 0.0;
    let inits = plan.stack.iter().filter_map(|slot| Some((slot, slot.init.as_ref()?)));
    let trained = plan.stack.iter().filter(|slot| slot.train);
    let budget = trained.filter_map(|slot| Some((slot, plan.budget.as_ref()?)));
    let own = plan.stack.iter().filter_map(|slot| Some((slot, slot.method.as_ref().filter(|_| slot.init.is_none())?)));
    for (slot, asks) in inits.chain(budget).chain(own) {
        let document = Catalogue::embedded().get(&asks.method)?;
        let mut sites = admit::sites(slot, architecture).ok()?;
        if document.trains_base {
            // A weight that is tied to another one trains there.
            let infos = architecture.tensors();
            sites.retain(|site| infos.iter().any(|info| info.site == site.id));
        }
        for (at, site) in sites.iter().enumerate() {
            let is_first = !sites[..at].iter().any(|before| before.reads_with(site));
            let formulas = [(is_first, &document.input_statistics), (true, &document.weight_statistics)];
            for (_, formula) in formulas.into_iter().filter(|(counts, formula)| *counts && !formula.is_empty()) {
                let mut names = asks.params.clone();
                names.extend(site.sizes(architecture));
                bytes += expression::number(formula, &names).ok()?;
            }
        }
    }
    Some(bytes.max(0.0) as u64)
}

/// The forecast; nothing when the base's structure is not known here.
pub(crate) fn of(admitted: &Admitted) -> Option<v1::Forecast> {
    let (architecture, plan) = (admitted.architecture.as_ref()?, admitted.plan.as_ref()?);
    let trainable = trainable(admitted)?.parameters;
    let step_tokens = u64::from(plan.batch_tokens) * u64::from(plan.accumulation);
    let steps = match plan.length {
        Length::Steps(steps) => steps,
        Length::Tokens(tokens) => tokens.div_ceil(step_tokens.max(1)),
        // Only the data can tell.
        Length::Epochs(_) => 0,
    };
    let tokens = steps.saturating_mul(step_tokens);
    let again = plan.activations == Activations::Recompute;
    let forward = architecture.forward_flops_per_token(f64::from(plan.max_length) / 2.0, 1.0);
    // Forward, perhaps again block by block, and back: by the rows, and by the weights where they train.
    let trains_base = trainable >= architecture.parameters() / 2;
    let pass = 2.0 + if trains_base { 1.0 } else { 0.0 } + if again { 1.0 } else { 0.0 };
    let passes = of_step(plan, |document| &document.passes)?;
    Some(v1::Forecast {
        trainable_parameters: trainable,
        total_parameters: architecture.parameters(),
        memory_bytes: memory(admitted)?.total(),
        steps,
        tokens,
        flops: forward * pass * passes * tokens as f64,
        duration: None,
    })
}
