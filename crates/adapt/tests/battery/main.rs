//! The batteries of the points `Adapter` and `Budget`: one named trial for each method and property.
//!
//! A method that joins the list is tested here without further ado. What it has and plain LoRA lacks is a trial of `own`.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod blends;
mod budgets;
mod calibrated;
mod contexts;
mod few;
mod forms;
mod golden;
mod own;
mod starts;
mod support;

use std::collections::BTreeMap;

use attune_adapt::{ADAPTERS, peft, slot};
use attune_architecture::{Site, targets};
use attune_models::{Base, Model, Pass};
use attune_points::adapter::{Adapter, Merged};
use attune_points::params::Scope;
use attune_points::{Grads, Row, Stats, TensorName};
use attune_spec::id::Step;
use attune_spec::method::{BuildCx, Card, Merges, MethodDocument, MethodRef, expression};
use attune_tensor::Rng;
use candle_core::{DType, Tensor};
use libtest_mimic::{Arguments, Failed, Trial};
use serde_json::{Value, json};
use support::{CrossEntropy, Setup, batch, difference, largest};

type Property = fn(&'static Card) -> Result<(), Failed>;

const PROPERTIES: [(&str, Property); 8] = [
    ("defaults_parse", defaults_parse),
    ("an_unknown_field_is_refused_with_its_path", unknown_field),
    ("it_starts_as_the_base", starts_as_the_base),
    ("its_gradient_agrees_with_central_differences", gradient),
    ("save_and_load_keep_the_bits", save_and_load),
    ("merged_equals_unmerged", merged_equals_unmerged),
    ("the_cost_formula_counts_its_tensors", cost),
    ("its_start_depends_on_seed_and_site_only", start),
];

/// Parameters of methods whose defaults are made for wider models than the battery's.
static SMALL: &[(&str, &[(&str, u32)])] = &[
    ("abba", &[("rank_1", 2), ("rank_2", 3), ("scale", 1)]),
    ("adalora", &[("rank", 4), ("target_rank", 2)]),
    ("adamss", &[("rank", 7), ("subspaces", 3), ("subspace_rank", 2)]),
    ("alora", &[("rank", 2), ("alpha", 4)]),
    ("bbtv2", &[("length", 4), ("dimensions", 6), ("population", 6)]),
    ("bone", &[("rank", 5)]),
    ("bottleneck", &[("reduction", 4)]),
    ("c3a", &[("block_size", 4)]),
    ("cartridge", &[("length", 4)]),
    ("chain-of-lora", &[("rank", 2), ("links", 3)]),
    ("clover", &[("block", 4)]),
    ("compacter", &[("reduction", 4), ("factors", 2)]),
    ("connected-adapter", &[("width", 5), ("side", 3)]),
    ("deft", &[("rank", 3)]),
    ("delora", &[("lambda", 1)]),
    ("dsee", &[("rank", 2), ("entries", 20)]),
    ("elastic-lora", &[("rank", 4), ("step", 1), ("smallest", 1), ("alpha", 4)]),
    ("fourierft", &[("frequencies", 50)]),
    ("glora", &[("rank", 3)]),
    ("gralora", &[("rank", 4), ("hybrid", 2), ("alpha", 6)]),
    ("hira", &[("rank", 2)]),
    ("kasa", &[("rank", 3), ("alpha", 6)]),
    ("lily", &[("rank", 4), ("stride", 2)]),
    ("loldu", &[("rank", 5)]),
    ("lotr", &[("rank", 4)]),
    ("mora", &[("rank", 2)]),
    ("multitask-prompt-tuning", &[("length", 4), ("rank", 2)]),
    ("nora", &[("rank", 6), ("inner_rank", 2), ("alpha", 4)]),
    ("oft", &[("block_size", 4)]),
    ("p-tuning", &[("length", 4), ("hidden", 5)]),
    ("prompt-tuning", &[("length", 4)]),
    ("peanut", &[("rank", 5), ("depth", 1)]),
    ("poet", &[("block_size", 4)]),
    ("poly", &[("rank", 3)]),
    ("psoft", &[("rank", 4)]),
    ("pvera", &[("rank", 6)]),
    ("qalora", &[("rank", 2), ("group_size", 4)]),
    ("randlora", &[("rank", 7), ("alpha", 7)]),
    ("road", &[("group_size", 4)]),
    ("roselora", &[("rank", 2), ("alpha", 2)]),
    ("shira", &[("rank", 2)]),
    ("sltrain", &[("rank", 2)]),
    ("spectral-ft", &[("rank", 6), ("inner_rank", 2)]),
    ("tinylora", &[("rank", 3), ("numbers", 5)]),
    ("unilora", &[("rank", 3), ("numbers", 50)]),
    ("vblora", &[("rank", 3), ("vectors", 7), ("length", 4)]),
    ("vera", &[("rank", 6)]),
    ("waveft", &[("frequencies", 50), ("scaling", 2)]),
    ("xlora", &[("depth", 3), ("size", 5)]),
];

/// Parameters that are lists and without which a method has nothing to do.
static LISTS: &[(&str, &str, &[u32])] = &[
    ("context-aware-prompt", "tokens", &[5, 30, 2, 7, 11]),
    ("context-aware-prompt", "types", &[1, 2, 3, 4, 6]),
    ("trainable-tokens", "tokens", &[5, 30, 2]),
];

/// Parameters under which a method's gradient is that of the objective, where it leaves a term out by default or has one more.
fn exact(card: &Card) -> Option<(&'static str, Value)> {
    match card.name {
        "dora" => Some(("norm_gradient", json!(true))),
        "loramoe" => Some(("balance", json!(0))),
        "osf" => Some(("project", json!(false))),
        _ => None,
    }
}

/// Whether a tensor's gradient is another one than the loss's, which is a step in it: what stands in for it is tested beside it.
fn is_step(card: &Card, local: &str) -> bool {
    matches!((card.name, local), ("taps" | "selective-lora", "score"))
}

/// Whether only what training draws depends on a tensor: without draws it has no gradient, and with them it is tested beside it.
pub(crate) fn is_of_draws(local: &str) -> bool {
    matches!(local, "std_prior" | "expert_weights_prior")
}

/// Whether sites start from weights of other sites.
fn starts_together(card: &Card) -> bool {
    card.name == "frod"
}

/// A method of the list as the battery runs it.
fn method(card: &Card) -> Value {
    let mut method = json!({"method": card.name});
    for (name, value) in SMALL.iter().filter(|(name, _)| *name == card.name).flat_map(|(_, params)| *params) {
        method[name] = (*value).into();
    }
    for (_, name, values) in LISTS.iter().filter(|(name, _, _)| *name == card.name) {
        method[*name] = json!(values);
    }
    if let ("alora", Some(Row::Token(token))) = (card.name, batch().rows().get(8)) {
        // Invoked by what a document has.
        method["tokens"] = json!([token]);
    }
    method
}

fn main() {
    let arguments = Arguments::from_args();
    let mut trials: Vec<Trial> = ADAPTERS
        .cards()
        .flat_map(|card| {
            PROPERTIES.into_iter().map(move |(property, run)| {
                Trial::test(format!("adapter::{}::{property}", card.name), move || run(card))
            })
        })
        .collect();
    trials.push(Trial::test("adapter::lora::a_rank_beyond_the_width_is_refused_with_the_site", too_wide));
    trials.extend(own::trials());
    trials.extend(starts::trials());
    trials.extend(few::trials());
    trials.extend(forms::trials());
    trials.extend(calibrated::trials());
    trials.extend(budgets::trials());
    trials.extend(golden::trials());
    trials.extend(contexts::trials());
    trials.extend(blends::trials());
    libtest_mimic::run(&arguments, trials).exit();
}

fn build(method: Value) -> Result<Box<dyn Adapter>, Vec<String>> {
    let method: MethodRef = serde_json::from_value(method).map_err(|error| vec![error.to_string()])?;
    let cx = BuildCx { steps: Step(10), domains: &[], words: None };
    ADAPTERS
        .build(&method, &"tune.adapter".into(), &cx)
        .map_err(|faults| faults.iter().map(ToString::to_string).collect())
}

fn fail<E: std::fmt::Debug>(error: E) -> Failed {
    Failed::from(format!("{error:?}"))
}

fn defaults_parse(card: &'static Card) -> Result<(), Failed> {
    let document = ADAPTERS.documents().find(|document| document.name == card.name).ok_or("no document")?;
    let mut defaults = document.defaults.clone();
    defaults["method"] = card.name.into();
    // What only a job can name, such as tokens, has no default that would do.
    for (name, listed) in method(card).as_object().into_iter().flatten().filter(|(_, value)| value.is_array()) {
        defaults[name] = listed.clone();
    }
    build(defaults).map_err(fail)?;
    for field in document.defaults.as_object().ok_or("the defaults are no mapping")?.keys() {
        let schema = &document.schema["properties"][field];
        assert!(schema["description"].is_string(), "parameter {field} is not described");
    }
    assert!(card.summary.ends_with('.'), "the summary is no sentence");
    Ok(())
}

fn unknown_field(card: &'static Card) -> Result<(), Failed> {
    let Err(faults) = build(json!({"method": card.name, "no_such_field": 1})) else { return Err("accepted".into()) };
    assert!(faults[0].starts_with("`tune.adapter.no_such_field` is not a known field"), "{faults:?}");
    Ok(())
}

fn starts_as_the_base(card: &'static Card) -> Result<(), Failed> {
    let setup = Setup::of(card, build(method(card)).map_err(fail)?, DType::F32);
    let layout = batch();
    let with = setup.logits(&layout)?;
    let without = setup.model.logits(&Pass { theta: &setup.theta.adapters_off(), layout: &layout, dropout: None })?;
    let off = difference(&with, &without);
    assert_eq!(
        off > 0.0,
        card.moves.is_some(),
        "it starts {off} away from the base, and its card says {:?}",
        card.moves
    );
    Ok(())
}

/// The derivative along a random direction in each tensor against a central difference, in f64.
fn gradient(card: &'static Card) -> Result<(), Failed> {
    let mut method = method(card);
    if let Some((parameter, value)) = exact(card) {
        method[parameter] = value;
    }
    gradient_of(card, method)
}

fn gradient_of(card: &Card, method: Value) -> Result<(), Failed> {
    let mut setup = Setup::of(card, build(method).map_err(fail)?, DType::F64);
    setup.disturb(0.1);
    let layout = setup.begun(&batch());
    let mut sink = Grads::wanting(setup.theta.trained().map(|(id, _)| id));
    setup.model.grad(&Pass { theta: &setup.theta, layout: &layout, dropout: None }, &CrossEntropy, 1.0, &mut sink)?;
    let mut rng = Rng::new(4, "directions");
    // The square of it times the third derivative, which is large where rows of the stream itself move, and rounding of 1e-16 over it.
    let step = 3e-6;
    for (id, value) in
        setup.theta.trained().filter(|(id, _)| !is_step(card, id.name.local()) && !is_of_draws(id.name.local()))
    {
        let direction = rng.normal_tensor(value.shape(), 1.0, DType::F64)?;
        let loss = |sign: f64| -> Result<f64, Failed> {
            let theta = setup.with(&id.name, (value + (&direction * (sign * step))?)?);
            Ok(setup.model.score(&Pass { theta: &theta, layout: &layout, dropout: None }, &CrossEntropy)?.loss_sum)
        };
        let numeric = (loss(1.0)? - loss(-1.0)?) / (2.0 * step);
        let gradient = sink.get(&id).ok_or_else(|| format!("{id} has no gradient"))?;
        let exact = (gradient * &direction)?.sum_all()?.to_scalar::<f64>()?;
        assert!((numeric - exact).abs() <= 1e-6 * (1.0 + exact.abs()), "{id}: {numeric} against {exact}");
    }
    Ok(())
}

fn save_and_load(card: &'static Card) -> Result<(), Failed> {
    let mut setup = Setup::of(card, build(method(card)).map_err(fail)?, DType::F32);
    if setup.adapter.peft().is_none() {
        // Its result is a whole model, whose writing and reading the models' own tests cover.
        assert!(card.trains_base, "neither an adapter folder nor a whole model");
        return Ok(());
    }
    setup.disturb(0.1);
    let folder = tempfile::tempdir()?;
    let architecture = setup.model.base().architecture();
    let write = |to: &std::path::Path| {
        peft::write(to, setup.part(&setup.params()), None, architecture, "owner/base", "a card\n")
    };
    write(folder.path())?;
    let read = peft::read(folder.path())?;
    let method = serde_json::to_value(&read.method)?;
    let is_another = read.method.method != card.name;
    let adapter = build(method).map_err(fail)?;
    // A folder says by itself what it is attached to.
    let takes = |site: &Site| card.applies.contains(&site.offers());
    let sites = targets::resolve(&read.targets, None, architecture, takes).map_err(fail)?;
    if is_another {
        // What is kept is what it makes, as a method that has that by itself.
        let base = Base::random(support::architecture(), 5, DType::F32)?;
        let mut other = Setup::on(base, adapter, &read.targets, card.applies, DType::F32);
        other.theta = other.with_params(read.params(&*other.adapter, &other.attachments)?);
        assert_eq!(difference(&other.logits(&batch())?, &setup.logits(&batch())?), 0.0);
        return Ok(());
    }
    assert_eq!(adapter.attach(architecture, &sites).map_err(fail)?, setup.attachments);
    let params = read.params(&*adapter, &setup.attachments)?;
    for (name, tensor) in setup.params().iter() {
        let loaded = params.get(name).ok_or_else(|| format!("{name} was lost"))?;
        assert_eq!(difference(loaded, tensor), 0.0, "{name}");
    }
    let again = tempfile::tempdir()?;
    write(again.path())?;
    for file in ["adapter_model.safetensors", "adapter_config.json", "README.md"] {
        assert_eq!(std::fs::read(folder.path().join(file))?, std::fs::read(again.path().join(file))?, "{file}");
    }
    let error = peft::write(again.path(), setup.part(&setup.params()), None, architecture, "/models/x", "");
    assert!(error.is_err_and(|error| error.to_string().contains("never a local path")));
    Ok(())
}

fn merged_equals_unmerged(card: &'static Card) -> Result<(), Failed> {
    merged_of(card, method(card))
}

fn merged_of(card: &Card, method: Value) -> Result<(), Failed> {
    let mut setup = Setup::of(card, build(method).map_err(fail)?, DType::F64);
    setup.disturb(0.1);
    let layout = batch();
    let unmerged = setup.logits(&layout)?;
    let base = setup.model.base();
    let infos = base.architecture().tensors().into_iter();
    let mut tensors: BTreeMap<String, Tensor> = infos
        .map(|info| Ok((info.name.clone(), base.tensor(&TensorName::from_path(&info.name), DType::F64)?)))
        .collect::<Result<_, attune_points::Error>>()?;
    for at in &setup.attachments {
        let site = base.architecture().site(at.site.as_str()).ok_or("no site")?;
        let locals = attune_models::stack::locals(at, &setup.params())?;
        let name = base.tensor_name(at.site.as_str(), "weight").to_string();
        match setup.adapter.merge(at, &locals, &base.weight(&site))? {
            Merged::Factors { left, right, scale } => {
                let delta = (left.matmul(&right)? * scale)?;
                tensors.insert(name.clone(), (&tensors[&name] + delta)?);
            }
            Merged::Weight { weight, bias } => {
                tensors.insert(name, weight);
                tensors.extend(bias.map(|bias| (base.tensor_name(at.site.as_str(), "bias").to_string(), bias)));
            }
            Merged::No(_) => {
                assert_eq!(card.merges, Merges::No);
                return Ok(());
            }
            other => return Err(format!("{other:?} does not merge").into()),
        }
    }
    assert_ne!(card.merges, Merges::No);
    let merged = Model::new(Base::from_tensors(base.architecture().clone(), &tensors)?, Default::default()).in_f64();
    let theta = attune_points::Theta::default();
    let merged = merged.logits(&Pass { theta: &theta, layout: &layout, dropout: None })?;
    // Two ways to compute the same in f64: a few hundred roundings of 1e-16.
    assert!(difference(&merged, &unmerged) < 1e-12 * (1.0 + largest(&unmerged)), "{}", difference(&merged, &unmerged));
    Ok(())
}

fn cost(card: &'static Card) -> Result<(), Failed> {
    cost_of(card, &method(card))
}

fn cost_of(card: &Card, method: &Value) -> Result<(), Failed> {
    let document = ADAPTERS.documents().find(|document| document.name == card.name).ok_or("no document")?;
    let setup = Setup::of(card, build(method.clone()).map_err(fail)?, DType::F32);
    for at in &setup.attachments {
        let site = setup.model.base().architecture().site(at.site.as_str()).ok_or("no site")?;
        let mut names = document.defaults.as_object().cloned().unwrap_or_default();
        names.extend(method.as_object().cloned().unwrap_or_default());
        names.extend(site.sizes(setup.model.base().architecture()));
        let expected = expression::number(card.parameters, &names)?;
        let count = |shared: bool| -> usize {
            let counted = at.tensors.iter().filter(|t| t.train && (t.scope != Scope::Site) == shared);
            counted.map(|t| t.shape.iter().product::<usize>()).sum()
        };
        assert_eq!(count(false) as f64, expected, "{}", at.site);
        let shared = if card.shared.is_empty() { 0.0 } else { expression::number(card.shared, &names)? };
        assert_eq!(count(true) as f64, shared, "shared at {}", at.site);
    }
    fixed(card, &document, method, &setup)?;
    held(card, &document, &setup)?;
    // What is shared is there once.
    let mut all: Vec<TensorName> = Vec::new();
    all.extend(setup.attachments.iter().flat_map(|at| at.tensors.iter().map(|spec| spec.name(at.site.as_str()))));
    all.sort();
    all.dedup();
    assert_eq!(all.len(), setup.params().len());
    Ok(())
}

/// What a card says of the numbers that it holds for a while can be read, and grows with the rows.
fn held(card: &Card, document: &MethodDocument, setup: &Setup) -> Result<(), Failed> {
    let architecture = setup.model.base().architecture();
    let defaults = document.defaults.as_object().cloned().unwrap_or_default();
    for at in &setup.attachments {
        let site = architecture.site(at.site.as_str()).ok_or("no site")?;
        let of = |text: &str, rows: u64| {
            let mut names = defaults.clone();
            names.extend(site.sizes(architecture));
            names.insert("rows".to_owned(), rows.into());
            if text.is_empty() { Ok(0.0) } else { expression::number(text, &names) }
        };
        let said = [
            of(card.start_numbers, 0)?,
            of(card.graph_numbers, 0)?,
            of(card.graph_numbers, 1)?,
            of(card.graph_numbers, 2)?,
        ];
        let [_, none, one, two] = said;
        if said.iter().any(|n| !n.is_finite() || *n < 0.0) || one < none || two - one != one - none {
            return Err(format!("{}: it is said to hold {said:?} numbers", at.site).into());
        }
    }
    Ok(())
}

/// Numbers that do not train are counted as well, but for lists as long as a width.
fn fixed(card: &Card, document: &MethodDocument, method: &Value, setup: &Setup) -> Result<(), Failed> {
    let architecture = setup.model.base().architecture();
    let mut names = document.defaults.as_object().cloned().unwrap_or_default();
    names.extend(method.as_object().cloned().unwrap_or_default());
    let (mut said, mut slack, mut widest) = (0.0, 0.0, (0, 0));
    for at in &setup.attachments {
        let site = architecture.site(at.site.as_str()).ok_or("no site")?;
        names.extend(site.sizes(architecture));
        said += if card.fixed.is_empty() { 0.0 } else { expression::number(card.fixed, &names)? };
        let (output, input) = site.out_in().unwrap_or_default();
        slack += (2 * (output + input)) as f64;
        widest = (widest.0.max(output), widest.1.max(input));
    }
    if !card.fixed_shared.is_empty() {
        names.extend([("o".to_owned(), widest.0.into()), ("i".to_owned(), widest.1.into())]);
        said += expression::number(card.fixed_shared, &names)?;
    }
    let of = |at: &attune_points::adapter::Attachment, spec: &attune_points::TensorSpec| {
        (spec.name(at.site.as_str()), spec.shape.iter().product::<usize>())
    };
    let all = setup
        .attachments
        .iter()
        .flat_map(|at| at.tensors.iter().filter(|spec| !spec.train).map(move |spec| of(at, spec)));
    let all: BTreeMap<TensorName, usize> = all.collect();
    let found = all.values().sum::<usize>() as f64;
    if (said - found).abs() > slack {
        let each: Vec<String> = all.iter().map(|(name, n)| format!("{name} {n}")).collect();
        return Err(format!("its card says {said} fixed numbers; it has {found}: {}", each.join(", ")).into());
    }
    Ok(())
}

fn start(card: &'static Card) -> Result<(), Failed> {
    let setup = Setup::of(card, build(method(card)).map_err(fail)?, DType::F32);
    let fresh = |seed: u64, attachments: &[attune_points::adapter::Attachment]| {
        slot::fresh(&*setup.adapter, None, attachments, |at| setup.weight(at), &Stats::none(), &Rng::new(seed, "init"))
            .map(|fresh| fresh.own)
    };
    let all = fresh(7, &setup.attachments)?;
    let last = setup.attachments.len() - 1;
    let alone = fresh(7, &setup.attachments[last..])?;
    if starts_together(card) {
        // Sites start from the weights of others, and from nothing else.
        let again = fresh(7, &setup.attachments)?;
        for (name, tensor) in all.iter() {
            assert_eq!(difference(tensor, again.get(name).ok_or("missing")?), 0.0, "{name} depends on chance");
        }
        return Ok(());
    }
    let shared = |name: &&TensorName| {
        setup.attachments[last].tensors.iter().any(|t| t.scope != Scope::Site && t.name("") == **name)
    };
    for (name, tensor) in alone.iter().filter(|(name, _)| !shared(name)) {
        assert_eq!(difference(tensor, all.get(name).ok_or("missing")?), 0.0, "{name} depends on other sites");
    }
    Ok(())
}

fn too_wide() -> Result<(), Failed> {
    let adapter = build(json!({"method": "lora", "rank": 4096})).map_err(fail)?;
    let setup = Setup::new(build(json!({"method": "lora"})).map_err(fail)?, "q_proj", DType::F32);
    let architecture = setup.model.base().architecture();
    let faults = adapter.attach(architecture, &architecture.sites()[1..3]).expect_err("accepted");
    let faults: Vec<String> = faults.iter().map(ToString::to_string).collect();
    assert!(faults[0].contains("which is a norm; expected linears"), "{faults:?}");
    assert!(faults[1].starts_with("`rank` is 4096; model.layers.0.self_attn.q_proj is"), "{faults:?}");
    Ok(())
}
