//! The same bytes, whatever happens on the way.

use std::path::PathBuf;

use attune_spec::id::Step;
use attune_spec::job::Plan;
use attune_trainer::protocol::{Event, OutputRole, Phase};
use attune_trainer::run::{End, run};

use crate::support::{Outside, Small, files, metric};

/// Kinds of jobs, by what they change of the small one: an adapter of each port, full tuning, an objective over pairs.
pub(crate) const KINDS: [(&str, &[(&str, &str)]); 60] = [
    ("lora", &[("tune.adapter", "{method: lora, rank: 4, alpha: 8, dropout: 0.1}")]),
    ("pissa", &[("tune.adapter", "{method: lora, rank: 4, alpha: 8, dropout: 0.1, init: {method: pissa}}")]),
    ("few bits", &[FEW[0], FEW[1], ("tune.adapter", "{method: lora, rank: 4, alpha: 8, dropout: 0.1}")]),
    (
        "another weight of few bits",
        &[
            FEW[0],
            ("tune.quantization", "{method: nf4, double_quant: true}"),
            ("tune.adapter", "{method: dora, rank: 2}"),
        ],
    ),
    (
        "loftq",
        &[FEW[0], FEW[1], ("tune.adapter", "{method: lora, rank: 4, alpha: 8, init: {method: loftq, iterations: 3}}")],
    ),
    ("eva", &[("tune.adapter", "{method: lora, rank: 4, dropout: 0.1, init: {method: eva, examples: 9}}")]),
    (
        "corda",
        &[("tune.adapter", "{method: lora, rank: 4, init: {method: corda, mode: kpm, domains: [sums], examples: 5}}")],
    ),
    (
        "ranks by sensitivity",
        &[
            ("tune.adapter", "{method: lora, rank: 4, dropout: 0.1, init: {method: eva, examples: 5}}"),
            ("tune.budget", "{method: sensitivity-lora, examples: 7, least: 1}"),
        ],
    ),
    (
        "ranks of two slots by sensitivity",
        &[
            ("tune.adapter", "null"),
            (
                "tune.stack",
                "[{name: one, method: lora, rank: 4, targets: [q_proj, up_proj]}, {name: two, method: dora, rank: 2, targets: [q_proj, down_proj]}]",
            ),
            ("tune.budget", "{method: sensitivity-lora, curvature: fisher, examples: 7, least: 1}"),
        ],
    ),
    ("lora-ga", &[("tune.adapter", "{method: lora, rank: 4, init: {method: lora-ga, examples: 12}}")]),
    ("kore", &[("tune.adapter", "{method: lora, rank: 4, trains: b, init: {method: kore, domains: [greetings]}}")]),
    ("b alone", &[("tune.adapter", "{method: lora, trains: b, b_lr: 4, init: {method: orthonormal}}")]),
    ("preconditioned", &[("tune.adapter", "{method: lora, preconditioned: true, init: {method: orthogonal}}")]),
    ("tokens", &[("tune.adapter", "{method: lora, rank: 4, targets: [embed_tokens, q_proj]}")]),
    ("full", &[("tune.adapter", "{method: full}")]),
    ("full by parts", &[("tune.adapter", "{method: full}"), ("tune.matmul", "high")]),
    (
        "upcycled",
        &[
            ("tune.surgery", "{method: dynamic-dino, copies: 3, granularity: 4}"),
            ("tune.adapter", "{method: full, targets: [w1, w2, w3, gate]}"),
        ],
    ),
    (
        "repeated layers of few bits",
        &[
            FEW[0],
            FEW[1],
            ("tune.surgery", "{method: layer-replication, ranges: [[0, 2], [1, 2]]}"),
            ("tune.adapter", "{method: dora, rank: 4, alpha: 8}"),
        ],
    ),
    ("dora", &[("tune.adapter", "{method: dora, rank: 4, alpha: 8}")]),
    ("prefix", &[("tune.adapter", "{method: prefix-tuning, length: 3}")]),
    ("cartridge", &[("tune.adapter", "{method: cartridge, length: 4, sinks: 1, start: text, text: 'Who? I am Ada.'}")]),
    (
        "demonstrations",
        &[
            (
                "tune.adapter",
                "{method: context-aware-prompt, tokens: [52, 12, 29, 7], types: [1, 2, 3, 4], decay: 0.5}",
            ),
            ("tune.batch_tokens", "256"),
        ],
    ),
    ("lora from a letter on", &[("tune.adapter", "{method: alora, text: a, rank: 4, alpha: 8, dropout: 0.1}")]),
    ("grouped inputs", &[("tune.adapter", "{method: qalora, rank: 2, group_size: 4, dropout: 0.1}")]),
    ("connected", &[("tune.adapter", "{method: connected-adapter, width: 5, side: 3, insertion: both}")]),
    (
        "two slots",
        &[
            ("tune.adapter", "null"),
            (
                "tune.stack",
                "[{method: prefix-tuning, length: 3, hidden: 5}, {method: bottleneck, targets: mlp, width: 6, parallel: true, \
                  composition: learned, scale: 4, dropout: 0.1}]",
            ),
        ],
    ),
    ("prompt", PROMPT),
    ("prompt by a network", &[("tune.adapter", "{method: p-tuning, length: 3, encoder: lstm, hidden: 4}"), PROMPT[1]]),
    ("prompt on pairs", &[PROMPT[0], ("tune.batch_tokens", "320"), PAIRS[0], PAIRS[1], PAIRS[2]]),
    (
        "prompt and answers used again",
        &[PROMPT[0], PROMPT[1], USED_AGAIN[0], ANSWERS[0], ANSWERS[1], ANSWERS[2], ANSWERS[3]],
    ),
    ("smooth prompt", &[PROMPT[0], PROMPT[1], ("tune.step", SMART)]),
    ("searched rows", SEARCHED),
    ("searched rows on pairs of a whole step", &[SEARCHED[0], SEARCHED[1], STEP[0], STEP[1], STEP[2], STEP[3]]),
    ("rows aside", &[("tune.adapter", "{method: adaption-prompt, length: 3}")]),
    ("bottleneck", &[("tune.adapter", "{method: bottleneck, reduction: 4, activation: silu}")]),
    ("compacter", &[("tune.adapter", "{method: compacter, reduction: 4, factors: 2}")]),
    ("loramoe", &[("tune.adapter", "{method: loramoe, rank: 2, experts: 4, knowledge: [sums]}")]),
    ("norms", &[("tune.adapter", "{method: ln-tuning}")]),
    ("ia3", &[("tune.adapter", "{method: ia3}")]),
    ("vera", &[("tune.adapter", "{method: vera, rank: 8, dropout: 0.1}")]),
    ("shira", &[("tune.adapter", "{method: shira, rank: 2}")]),
    ("lotr", &[("tune.adapter", "{method: lotr, rank: 4}")]),
    ("spiel", &[("tune.adapter", "{method: spiel, density: 0.05, every: 4, watch: 2}")]),
    ("adalora", &[("tune.adapter", "{method: adalora, rank: 4, target_rank: 2, every: 2, dropout: 0.1}")]),
    ("roselora", &[("tune.adapter", "{method: roselora, rank: 4, keep: 0.5}")]),
    ("vectorfit", &[("tune.adapter", "{method: vectorfit, freeze: 0.3, every: 0.2}")]),
    ("tokens", &[("tune.adapter", "{method: trainable-tokens, tokens: [10, 65], words: [e]}")]),
    ("lora with a bias", &[("tune.adapter", "{method: lora, rank: 4, dropout: 0.1, bias: true}")]),
    ("bdlora", &[("tune.adapter", "{method: bdlora, rank: 4, dropout: 0.1}")]),
    ("monteclora", &[("tune.adapter", "{method: monteclora, rank: 4, dropout: 0.1, scale: 0.1, entropy: true}")]),
    ("glora", &[("tune.adapter", "{method: glora, rank: 2}")]),
    (
        "adamss",
        &[("tune.adapter", "{method: adamss, rank: 8, subspaces: 3, active: 9, before: 0.2, until: 0.7, every: 2}")],
    ),
    ("poly", &[("tune.adapter", "{method: poly, rank: 2, tasks: 2, skills: 3}")]),
    ("frod", &[("tune.adapter", "{method: frod, density: 0.05, dropout: 0.1}")]),
    ("dpo", PAIRS),
    ("a whole step", STEP),
    ("grpo", ANSWERS),
    ("grpo over a whole step", ALL_ANSWERS),
    ("grpo with answers used again", USED_AGAIN),
    ("smart", &[("tune.step", SMART)]),
];

/// The base's own weights, in few bits.
const FEW: [(&str, &str); 2] = [("tune.from_scratch", "false"), ("tune.quantization", "{method: nf4}")];

/// Rows before documents that take their room.
const PROMPT: &[(&str, &str)] =
    &[("tune.adapter", "{method: prompt-tuning, length: 3, start: text, text: Who}"), ("tune.batch_tokens", "256")];

/// Rows at all layers whose numbers are searched for.
const SEARCHED: &[(&str, &str)] = &[
    ("tune.adapter", "{method: bbtv2, length: 3, dimensions: 6, population: 6}"),
    ("tune.optimizer", "{method: adamw}"),
    ("tune.batch_tokens", "256"),
];

/// Embeddings are moved so far that it shows.
const SMART: &str = "{method: smart, radius: 0.02, noise: 0.01, ascent: 0.02}";

/// The same with a loss that sees all pairs of a step.
const STEP: &[(&str, &str)] = &[
    ("tune.objective", "{method: dpo, loss: aot, beta: 1}"),
    ("data.domains", "[{name: pairs, source: ./pairs.jsonl}]"),
    ("data.validation", "[{name: pairs, source: ./pairs.jsonl}]"),
    ("tune.batch_tokens", "256"),
];

/// The small job on pairs.
const PAIRS: &[(&str, &str)] = &[
    ("tune.objective", "{method: dpo, sft: 0.1}"),
    ("data.domains", "[{name: pairs, source: ./pairs.jsonl}]"),
    ("data.validation", "[{name: pairs, source: ./pairs.jsonl, rows: 3}]"),
    ("tune.batch_tokens", "256"),
];

/// The small job on answers of its own, which are judged by how they begin and whether they end.
const ANSWERS: &[(&str, &str)] = &[
    ("tune.objective", "{method: grpo, generations: 3, max_tokens: 6, beta: 0.1, loss: grpo}"),
    ("tune.rewards", "[{method: regex-match, pattern: '^[ -~]'}, {method: overlong, margin: 4, weight: 0.3}]"),
    ("data.domains", "[{name: greetings, source: ./greetings.jsonl}]"),
    ("data.validation", "[{name: greetings, source: ./greetings.jsonl, rows: 3}]"),
];

/// The same with advantages that see all answers of a step.
const ALL_ANSWERS: &[(&str, &str)] = &[
    ("tune.objective", "{method: grpo, generations: 3, max_tokens: 6, scale: batch, mask_truncated: true}"),
    ANSWERS[1],
    ANSWERS[2],
    ANSWERS[3],
];

/// The same with several updates on the answers.
const USED_AGAIN: &[(&str, &str)] =
    &[("tune.step", "{method: reuse, times: 3}"), ANSWERS[0], ANSWERS[1], ANSWERS[2], ANSWERS[3]];

/// Two parts of a number are nearly the number: what is learned by them is nearly what is learned by numbers, and where a
/// processor has no faster way it is the same.
#[test]
fn products_by_parts_learn_what_products_of_numbers_learn() {
    let small = Small::new();
    let learn = |matmul| {
        let (events, _) = small.finish(small.plan(&[("tune.steps", "20"), ("tune.matmul", matmul)]), 1);
        let profile = events.iter().find_map(|event| match event {
            Event::Running { kernel_profile, .. } => Some(kernel_profile.clone()),
            _ => None,
        });
        (profile.unwrap(), metric(&events, "train/loss"))
    };
    let ((plain, numbers), (profile, parts)) = (learn("highest"), learn("high"));
    let by_parts = profile.contains("-high");
    assert_eq!(by_parts, plain.starts_with("cpu/amx "), "{plain} and {profile}");
    assert_eq!(by_parts, numbers != parts, "{numbers:?} and {parts:?}");
    let apart = numbers.iter().zip(&parts).map(|(a, b)| (a - b).abs() / a).fold(0.0, f64::max);
    assert!(apart < 1e-4, "{apart}: {numbers:?} and {parts:?}");
    assert!(numbers[19] < 0.9 * numbers[0]);
}

#[test]
fn a_run_goes_through_its_phases_and_learns() {
    let small = Small::new();
    let (events, files) = small.finish(small.plan(&[("tune.steps", "30"), ("tune.evaluate.every_steps", "10")]), 1);
    let phases: Vec<Phase> = events
        .iter()
        .filter_map(|event| match event {
            Event::Starting { phase } => Some(*phase),
            _ => None,
        })
        .collect();
    assert_eq!(phases, [Phase::Base, Phase::Data, Phase::Rehearsal, Phase::Evaluation]);
    let losses = metric(&events, "eval/sums/loss");
    assert_eq!(losses.len(), 4, "before, at 10, at 20, after");
    assert!(losses[3] < 0.9 * losses[0], "{losses:?}");
    assert_eq!(metric(&events, "train/loss").len(), 30);
    let speed = metric(&events, "train/tokens_per_second");
    for work in ["gemm", "attention", "elementwise", "adapter", "head", "optimizer", "data", "collective", "other"] {
        assert_eq!(metric(&events, &format!("time/{work}")).len(), 30, "{work}");
    }
    // What a step took is all in the kinds of its work: rows over their sum are its speed.
    let of_step = |event: &Event| match event {
        Event::Metrics { metrics, .. } => {
            let times = metrics.iter().filter(|metric| metric.name.starts_with("time/"));
            Some(times.map(|metric| metric.value).sum::<f64>()).filter(|sum| *sum > 0.0)
        }
        _ => None,
    };
    let spent: Vec<f64> = events.iter().filter_map(of_step).collect();
    let rows: Vec<f64> = speed.iter().zip(&spent).map(|(speed, seconds)| speed * seconds).collect();
    assert!(rows.iter().all(|rows| (rows - rows.round()).abs() < 0.01 && *rows >= 1.0), "{rows:?}");
    let gemm: f64 = metric(&events, "time/gemm").iter().sum();
    assert!(gemm > 0.0 && gemm < spent.iter().sum(), "products took {gemm} s");
    let utilisation = metric(&events, "train/mfu");
    assert!(utilisation.len() == 30 && utilisation.iter().all(|share| *share > 0.0), "{utilisation:?}");
    assert!(files.keys().any(|name| name == "Result/adapter_model.safetensors"), "{:?}", files.keys());
    let config = String::from_utf8(files["Result/adapter_config.json"].clone()).unwrap();
    assert!(config.contains("\"base_model_name_or_path\": \"blake3:"), "{config}");
}

#[test]
fn a_stopped_run_goes_on_to_the_same_bytes() {
    let small = Small::with_weights();
    for (name, changes) in KINDS {
        let plan = small.plan(&[changes, &[("tune.evaluate.every_steps", "4")]].concat());
        let (_, whole) = small.finish(plan.clone(), 1);
        for cut in [1, 5, 9] {
            let (request, _work) = small.request(plan.clone(), 1, None);
            let outside = Outside::stopping_after(cut);
            assert_eq!(run(&request, &outside).unwrap(), End::Stopped(Step(cut)), "{name}");
            let checkpoint = checkpoint(&outside);
            let (request, _work) = small.request(plan.clone(), 1, Some(&checkpoint));
            let outside = Outside::default();
            run(&request, &outside).unwrap();
            assert_eq!(files(&outside.events.into_inner().unwrap()), whole, "{name} cut at {cut}");
        }
    }
}

pub(crate) fn checkpoint(outside: &Outside) -> PathBuf {
    let events = outside.events.lock().unwrap();
    let last = events.iter().rev().find_map(|event| match event {
        Event::Checkpoint { folder, .. } => Some(folder.clone()),
        _ => None,
    });
    last.unwrap()
}

#[test]
fn more_ranks_give_the_same_bytes() {
    let small = Small::with_weights();
    for (name, changes) in KINDS {
        let plan = small.plan(&[changes, &[("tune.steps", "5")]].concat());
        let (_, one) = small.finish(plan.clone(), 1);
        for ranks in [2, 4] {
            assert_eq!(small.finish(plan.clone(), ranks).1, one, "{name} on {ranks} ranks");
        }
    }
}

/// What is trained to be smooth says nearly the same where its inputs are moved, and what is not says something else; without a
/// way to move there is no difference, for dropout drops the same of all copies.
#[test]
fn a_smooth_run_changes_less_where_its_inputs_are_moved() {
    let small = Small::new();
    let rough = |smoothness: &str, noise: &str| {
        let step = format!(
            "{{method: smart, smoothness: {smoothness}, proximity: 0, radius: 0.05, noise: {noise}, ascent: {noise}}}"
        );
        let changes = [("tune.step", step.as_str()), ("tune.steps", "30"), ("tune.logical_shards", "1")];
        let (events, files) = small.finish(small.plan(&changes), 1);
        (metric(&events, "train/smart/smoothness"), metric(&events, "eval/sums/loss"), files)
    };
    let (unheeded, losses, _) = rough("1e-9", "0.03");
    let (heeded, smooth_losses, _) = rough("5", "0.03");
    assert!(heeded[29] < 0.7 * unheeded[29], "{} and {}", heeded[29], unheeded[29]);
    assert!(losses[1] < losses[0] && smooth_losses[1] < smooth_losses[0], "both learn");
    let (still, ..) = rough("5", "0");
    assert!(still.iter().all(|divergence| *divergence == 0.0), "{still:?}");
}

#[test]
fn a_smooth_step_without_weights_leaves_the_bytes_of_the_usual_one() {
    let small = Small::new();
    let (_, usual) = small.finish(small.plan(&[]), 1);
    let (_, none) = small.finish(small.plan(&[("tune.step", "{method: smart, smoothness: 0, proximity: 0}")]), 1);
    let adapter = "Result/adapter_model.safetensors";
    assert_eq!(usual[adapter], none[adapter]);
}

/// Before training nothing is preferred to what the reference prefers: the loss is that of no difference, and what is learned of
/// pairs shows in margins.
#[test]
fn a_run_on_pairs_starts_at_no_difference_and_learns_to_tell_them_apart() {
    let small = Small::new();
    let changes = [("tune.objective", "{method: dpo}"), ("tune.adapter.dropout", "0"), ("tune.steps", "20")];
    let (events, _) = small.finish(small.plan(&[PAIRS, &changes].concat()), 2);
    let (losses, measured) = (metric(&events, "train/loss"), metric(&events, "eval/pairs/loss"));
    for start in [losses[0], measured[0]] {
        assert!((start - std::f64::consts::LN_2).abs() < 1e-6, "{start}");
    }
    let margins = metric(&events, "train/rewards/margin");
    assert!(margins[0].abs() < 1e-6 && margins[19] > 0.05, "{margins:?}");
    assert_eq!(*metric(&events, "train/rewards/accuracy").last().unwrap(), 1.0);
}

#[test]
fn a_run_whose_loss_sees_whole_steps_learns_to_tell_pairs_apart() {
    let small = Small::new();
    let (events, _) =
        small.finish(small.plan(&[STEP, &[("tune.adapter.dropout", "0"), ("tune.steps", "20")]].concat()), 2);
    let (losses, measured) = (metric(&events, "train/loss"), metric(&events, "eval/pairs/loss"));
    for start in [losses[0], measured[0]] {
        assert!((start - std::f64::consts::LN_2).abs() < 1e-6, "{start}");
    }
    assert!(measured[1] < 0.6, "{measured:?}");
    assert!(metric(&events, "train/rewards/margin")[19] > 0.2);
}

#[test]
fn rows_that_an_objective_does_not_compare_are_refused_by_their_field() {
    let small = Small::new();
    let failure = |changes: &[(&str, &str)]| {
        let (request, _work) = small.request(small.plan(changes), 1, None);
        run(&request, &Outside::default()).unwrap_err().to_string()
    };
    let of_texts = failure(&[("tune.objective", "{method: dpo}")]);
    assert!(of_texts.contains("`data.domains[1]` holds rows of text; `dpo` compares two answers"), "{of_texts}");
    let alike = failure(&[PAIRS, &[("tune.objective", "{method: sft}")]].concat());
    assert!(alike.contains("`data.validation[0]` holds pairs"), "{alike}");
    let narrow = failure(&[PAIRS, &[("tune.batch_tokens", "80"), ("data.max_length", "20")]].concat());
    assert!(
        narrow.contains("`tune.batch_tokens` is 80 for 4 logical shards, 20 tokens each; the longest row"),
        "{narrow}"
    );
}

#[test]
fn a_run_of_epochs_ends_with_its_data_on_any_number_of_ranks() {
    let small = Small::new();
    let changes = [("tune.steps", "null"), ("tune.epochs", "1.5"), ("tune.accumulation", "2")];
    let plan = small.plan(&changes);
    let (_, one) = small.finish(plan.clone(), 1);
    // The last step has fewer micro-batches than there are shards: some ranks have nothing to do.
    assert_eq!(small.finish(plan, 4).1, one);
    let report: serde_json::Value = serde_json::from_slice(&one["Report/report.json"]).unwrap();
    let documents: u64 = report["documents"].as_object().unwrap().values().map(|count| count.as_u64().unwrap()).sum();
    assert_eq!(documents, 29, "one and a half times 7 + 12, rounded up");
    let steps = report["steps"].as_u64().unwrap();
    assert!(report["tokens"].as_u64().unwrap() < steps * 256, "the last step is not full");
}

#[test]
fn accumulated_batches_equal_the_whole_batch() {
    let small = Small::new();
    let steps = ("tune.steps", "5");
    let whole = small.plan(&[steps, ("tune.batch_tokens", "256"), ("tune.logical_shards", "8")]);
    let halves = small.plan(&[steps, ("tune.accumulation", "2")]);
    let (whole, halves) = (small.finish(whole, 1).1, small.finish(halves, 1).1);
    assert_eq!(whole["Result/adapter_model.safetensors"], halves["Result/adapter_model.safetensors"]);
}

#[test]
fn checkpoints_on_the_way_and_another_seed_do_what_they_should() {
    let small = Small::new();
    let (events, with) = small.finish(small.plan(&[("tune.checkpoint.every_steps", "3")]), 2);
    let steps: Vec<u64> = events
        .iter()
        .filter_map(|event| match event {
            Event::Checkpoint { step, .. } => Some(step.0),
            _ => None,
        })
        .collect();
    assert_eq!(steps, [3, 6, 9]);
    let (_, without) = small.finish(small.plan(&[]), 1);
    assert_eq!(with["Result/adapter_model.safetensors"], without["Result/adapter_model.safetensors"]);
    let (_, other) = small.finish(small.plan(&[("tune.seed", "8")]), 1);
    assert_ne!(other["Result/adapter_model.safetensors"], without["Result/adapter_model.safetensors"]);
}

#[test]
fn a_merged_model_is_the_base_with_the_adapter_and_goes_on_as_a_base() {
    let small = Small::new();
    merged_speaks_as_adapted(&small, &small.plan(&[("outputs.merged", "true"), ("tune.adapter.dropout", "0")]));
}

/// What the second makes of a weight is made of what the first has made of it.
#[test]
fn a_merged_model_has_all_adapters_of_a_linear() {
    let small = Small::new();
    let (request, work) = small.request(small.plan(&[("tune.adapter.dropout", "0")]), 1, None);
    run(&request, &Outside::default()).unwrap();
    std::fs::rename(work.path().join("adapter"), small.path("before")).unwrap();
    for method in ["lokr", "dora"] {
        let stack = format!("[{{name: facts, from: ./before, train: false}}, {{method: {method}, rank: 2}}]");
        let changes = [("tune.adapter", "null"), ("tune.stack", stack.as_str()), ("outputs.merged", "true")];
        merged_speaks_as_adapted(&small, &small.plan(&changes));
    }
}

fn merged_speaks_as_adapted(small: &Small, plan: &Plan) {
    let (_, files) = small.finish(plan.clone(), 1);
    let model = tempfile::tempdir().unwrap();
    for (name, bytes) in files.iter().filter_map(|(name, bytes)| Some((name.strip_prefix("Merged/")?, bytes))) {
        std::fs::write(model.path().join(name), bytes).unwrap();
    }
    let mut plan = small.plan(&[("tune.from_scratch", "false"), ("tune.steps", "1")]);
    plan.base = attune_spec::job::plan::Input::Path(model.path().display().to_string());
    let (events, _) = small.finish(plan, 1);
    let report: serde_json::Value = serde_json::from_slice(&files["Report/report.json"]).unwrap();
    let adapted = report["validation"].as_array().unwrap().last().unwrap()["loss"]["sums"].as_f64().unwrap();
    let merged = metric(&events, "eval/sums/loss")[0];
    assert!((adapted - merged).abs() < 1e-4, "{adapted} with the adapter, {merged} merged");
}

/// Two adapters, each trained on one domain, are mixed for both: the same bytes resumed and on several ranks.
#[test]
fn adapters_that_were_trained_one_by_one_are_mixed() {
    let lora = "{method: lora, rank: 3, alpha: 6, targets: [q_proj, v_proj, up_proj]}";
    let at = "targets: [q_proj, v_proj, up_proj]";
    for (each, mixed) in [
        ("{method: bottleneck, reduction: 2, targets: mlp}", "{method: adapterfusion}".to_owned()),
        (lora, format!("{{method: arrow, top_k: 1, {at}}}, {{name: further, method: lora, rank: 2}}")),
        (lora, format!("{{method: xlora, depth: 2, size: 12, dropout: 0.1, {at}}}")),
    ] {
        mixes(each, &mixed);
    }
}

fn mixes(each: &str, mixed: &str) {
    let small = Small::new();
    for (name, kept) in [("greeter", "greetings"), ("adder", "sums")] {
        let domains = format!("[{{name: {kept}, source: ./{kept}.jsonl}}]");
        let plan = small.plan(&[("tune.adapter", each), ("data.domains", &domains), ("tune.steps", "15")]);
        let (request, work) = small.request(plan, 1, None);
        run(&request, &Outside::default()).unwrap();
        std::fs::rename(work.path().join("adapter"), small.path(name)).unwrap();
    }
    let stack = |mixed: &str| {
        format!("[{{name: a, from: ./greeter, train: false}}, {{name: b, from: ./adder, train: false}}, {mixed}]")
    };
    let plan = small.plan(&[("tune.adapter", "null"), ("tune.stack", &stack(mixed)), ("tune.steps", "6")]);
    let (events, whole) = small.finish(plan.clone(), 1);
    let losses = metric(&events, "train/loss");
    assert!(losses.last() < losses.first(), "{mixed}: {losses:?}");
    assert_eq!(small.finish(plan.clone(), 2).1, whole, "{mixed}");
    let (request, _work) = small.request(plan.clone(), 1, None);
    let outside = Outside::stopping_after(2);
    assert_eq!(run(&request, &outside).unwrap(), End::Stopped(Step(2)));
    let (request, work) = small.request(plan, 1, Some(&checkpoint(&outside)));
    let outside = Outside::default();
    run(&request, &outside).unwrap();
    assert_eq!(files(&outside.events.into_inner().unwrap()), whole, "{mixed}");

    // What was left is a start that says what the end said.
    let after = *metric(&events, "eval/sums/loss").last().unwrap();
    let mut again = "{from: ./adapter}".to_owned();
    std::fs::rename(work.path().join("adapter"), small.path("adapter")).unwrap();
    if work.path().join("adapter-further").is_dir() {
        std::fs::rename(work.path().join("adapter-further"), small.path("further")).unwrap();
        again.push_str(", {name: further, from: ./further}");
    }
    let plan = small.plan(&[("tune.adapter", "null"), ("tune.stack", &stack(&again)), ("tune.steps", "1")]);
    let before = metric(&small.finish(plan, 1).0, "eval/sums/loss")[0];
    assert!((before - after).abs() < 1e-6, "{mixed}: {before} against {after}");
}

/// What has nothing to train makes its adapter, and changes nothing.
#[test]
fn a_mixture_without_anything_to_train_is_made_and_measured() {
    let small = Small::new();
    let lora = [("tune.adapter", "{method: lora, rank: 3, targets: [q_proj]}"), ("tune.steps", "8")];
    let (request, work) = small.request(small.plan(&lora), 1, None);
    run(&request, &Outside::default()).unwrap();
    std::fs::rename(work.path().join("adapter"), small.path("one")).unwrap();
    let plan = |method: &str| {
        let others = "{name: a, from: ./one, train: false}, {name: b, from: ./one, train: false}";
        let stack = format!("[{others}, {method}]");
        small.plan(&[("tune.adapter", "null"), ("tune.stack", &stack), ("tune.steps", "2")])
    };
    let (events, files) = small.finish(plan("{method: arrow, targets: [q_proj]}"), 2);
    let losses = metric(&events, "eval/sums/loss");
    assert_eq!(losses.first(), losses.last());
    assert!(files.contains_key("Result/adapter_model.safetensors"), "{:?}", files.keys());
    for (method, told) in [
        (
            "{method: xlora, adapters: 3, targets: [q_proj]}",
            "`tune.stack[2]` blends what 3 adapters before it add to a linear, and 2 of them add to model.layers.0",
        ),
        (
            "{method: arrow, targets: [q_proj, k_proj]}",
            "`tune.stack[2]` blends what 2 adapters before it add to a linear, and 0 of them add to model.layers.0.self_attn.k_proj",
        ),
    ] {
        let (request, _work) = small.request(plan(method), 1, None);
        let error = run(&request, &Outside::default()).unwrap_err().to_string();
        assert!(error.contains(told), "{method}: {error}");
    }
}

/// Slots that train side by side are an adapter each, and what cannot be beside another says so.
#[test]
fn slots_that_train_together_are_an_adapter_each() {
    let small = Small::new();
    let stack = |slots: &str| small.plan(&[("tune.adapter", "null"), ("tune.stack", slots), ("tune.steps", "12")]);
    let (events, files) = small.finish(stack("[{method: lora, rank: 2}, {name: vectors, method: ia3}]"), 1);
    let losses = metric(&events, "train/loss");
    assert!(losses.last() < losses.first(), "{losses:?}");
    let weights = |role: &str| format!("{role}/adapter_model.safetensors");
    for role in ["Result".to_owned(), format!("{:?}", OutputRole::Further("vectors".parse().unwrap()))] {
        assert!(files.contains_key(&weights(&role)), "{role}: {:?}", files.keys());
    }
    for (slots, told) in [
        ("[{method: lora}, {method: full}]", "the base's own weights, which train alone"),
        ("[{method: spiel}, {method: lora}]", "steps of its own, which trains alone"),
    ] {
        let (request, _work) = small.request(stack(slots), 1, None);
        let error = run(&request, &Outside::default()).unwrap_err().to_string();
        assert!(error.contains(told), "{slots}: {error}");
    }
}

#[test]
fn an_adapter_is_a_start_and_a_frozen_layer_under_another() {
    let small = Small::new();
    let (events, _) = small.finish(small.plan(&[("tune.steps", "20"), ("tune.adapter.dropout", "0")]), 1);
    let after = *metric(&events, "eval/sums/loss").last().unwrap();
    let (request, work) = small.request(small.plan(&[("tune.steps", "20"), ("tune.adapter.dropout", "0")]), 1, None);
    run(&request, &Outside::default()).unwrap();
    std::fs::rename(work.path().join("adapter"), small.path("before")).unwrap();
    for stack in ["[{from: ./before}]", "[{name: facts, from: ./before, train: false}, {method: lora, rank: 2}]"] {
        let plan = small.plan(&[("tune.adapter", "null"), ("tune.stack", stack), ("tune.steps", "1")]);
        let (events, _) = small.finish(plan, 1);
        let before = metric(&events, "eval/sums/loss")[0];
        assert!((before - after).abs() < 1e-6, "{stack}: {before} against {after}");
    }
}
