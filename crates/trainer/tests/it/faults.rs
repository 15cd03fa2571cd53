//! Runs that cannot go on say why, where, and what would do.

use std::collections::HashMap;

use attune_trainer::Error;
use attune_trainer::protocol::{Event, FailureClass};
use attune_trainer::run::run;
use candle_core::{Device, Tensor};

use crate::support::{Outside, Small};

type Damage = fn(&mut HashMap<String, Tensor>, &str);

fn fail(small: &Small, changes: &[(&str, &str)], resume: Option<&std::path::Path>) -> (FailureClass, String) {
    let (request, _work) = small.request(small.plan(changes), 1, resume);
    let error: Error = run(&request, &Outside::default()).unwrap_err();
    (error.class(), error.to_string().replace(&small.path("").display().to_string(), ""))
}

#[test]
fn bad_rows_and_files_are_named_with_their_line() {
    let small = Small::new();
    std::fs::write(small.path("bad.jsonl"), "{\"text\": \"a\"}\n{\"text\": 1}\n").unwrap();
    std::fs::write(small.path("empty.jsonl"), "").unwrap();
    let source = "data.domains[1].source";
    for (changes, expected) in [
        (vec![(source, "./bad.jsonl")], "bad.jsonl:2: `text` is a number; expected a text"),
        (vec![(source, "./empty.jsonl")], "empty.jsonl: holds no row"),
        (vec![(source, "./missing.jsonl")], "missing.jsonl: there is no such file"),
        (
            vec![("data.max_length", "8"), ("data.too_long", "refuse"), ("data.domains[0].weight", "0")],
            "greetings.jsonl:1: has",
        ),
    ] {
        let (class, message) = fail(&small, &changes, None);
        assert!(message.starts_with(expected), "{message}");
        assert!(!class.is_retryable(), "{message}");
    }
    let skipping = small.plan(&[(source, "./bad.jsonl"), ("data.on_bad_row", "skip"), ("tune.steps", "1")]);
    let (events, files) = small.finish(skipping, 1);
    let notes = events.iter().filter_map(|event| match event {
        Event::Note { topic, message } if topic != "time" => Some((topic.as_str(), message.as_str())),
        _ => None,
    });
    let said = "1 of 2 rows are bad and left out, the first of them bad.jsonl:2: `text` is a number; expected a text";
    assert_eq!(notes.collect::<Vec<_>>(), [("data/sums", said)]);
    let report: serde_json::Value = serde_json::from_slice(&files["Report/report.json"]).unwrap();
    assert_eq!(report["data"]["data/sums"]["bad"]["by_reason"]["wrong_type"], 1);
}

#[test]
fn a_move_that_bf16_cannot_tell_apart_is_refused() {
    let small = Small::with_weights();
    let changes = [("tune.from_scratch", "false"), ("tune.step", "{method: smart}"), ("tune.precision", "bf16")];
    let (class, message) = fail(&small, &changes, None);
    let expected = "`tune.step` is `smart` with `radius` 0.00001, less than activations of bf16 can tell apart";
    assert!(message.starts_with(expected) && !class.is_retryable(), "{message}");
}

#[test]
fn what_does_not_fit_the_base_has_its_field_path() {
    let small = Small::new();
    for (changes, expected) in [
        (
            vec![("tune.adapter.targets", "q_porj")],
            "`tune.stack[0].targets` \"q_porj\" matches no site of this llama model",
        ),
        (
            vec![("tune.step", "{method: smart}"), ("tune.adapter", "{method: full}")],
            "`tune.step` is `smart` with `proximity`, which needs the model with two sets of what trains at once",
        ),
        (
            vec![("tune.step", "{method: smart}"), ("tune.adapter", "{method: spiel}")],
            "`tune.step` is `smart`; what trains has steps of its own: leave it out",
        ),
        (
            vec![
                ("tune.adapter", "{method: spiel}"),
                ("tune.objective", "{method: dpo, loss: aot}"),
                ("data.domains", "[{name: pairs, source: ./pairs.jsonl}]"),
                ("data.validation", "[{name: pairs, source: ./pairs.jsonl}]"),
                ("tune.batch_tokens", "256"),
            ],
            "`tune.step` is that of a component which looks at the gradient of a single micro-batch",
        ),
        (
            vec![("tune.adapter", "{method: dora, init: {method: pissa}}")],
            "`tune.stack[0].init` cannot start: this initialisation is for a pair of factors",
        ),
        (
            vec![("tune.adapter", "{method: lora, trains: a}")],
            "`tune.stack[0]` cannot start: A alone trains, and B starts at 0",
        ),
        (
            vec![("tune.adapter", "{method: ia3, inputs: [down_porj]}")],
            "`tune.stack[0].inputs` names \"down_porj\", which is none of the targets; did you mean \"down_proj\"?",
        ),
        (
            vec![("tune.adapter", "{method: spiel, targets: lm_head}")],
            "`tune.stack[0].targets` names lm_head, whose weight is another site's",
        ),
        (
            vec![
                ("tune.step", "{method: smart}"),
                ("tune.objective", "{method: dpo}"),
                ("data.domains", "[{name: pairs, source: ./pairs.jsonl}]"),
                ("data.validation", "[{name: pairs, source: ./pairs.jsonl}]"),
                ("tune.batch_tokens", "256"),
            ],
            "`tune.step` is `smart`, which adds to a loss of single tokens; this objective's is one of a Group",
        ),
        (
            vec![("tune.adapter", "{method: adapterfusion}")],
            "`tune.stack[0]` mixes what adapters before it add to a block, and none of them adds to model.layers.0.mlp",
        ),
        (
            vec![
                ("tune.adapter", "null"),
                ("tune.stack", "[{name: a, method: kasa, rank: 2}, {name: b, method: kasa, rank: 3, targets: q_proj}]"),
            ],
            "`tune.stack[1]` takes the least of the weight out of model.layers.0.self_attn.q_proj, as an adapter before it does",
        ),
        (vec![("tune.adapter.rank", "64")], "`tune.stack[0].rank` is 64; model.layers.0"),
        (
            vec![("tune.adapter.targets", "norm")],
            "`tune.stack[0].targets` \"norm\" names only sites that this method does not adapt",
        ),
        (
            vec![("data.max_length", "65"), ("tune.batch_tokens", "1024")],
            "`data.max_length` is 65; the base's context is 64",
        ),
        (vec![("tune.from_scratch", "false")], "base/model.safetensors: cannot be opened"),
    ] {
        let (class, message) = fail(&small, &changes, None);
        assert!(message.starts_with(expected), "{message}");
        assert_eq!(class, FailureClass::Input, "{message}");
    }
}

/// Nothing is kept of a run that does not come to what it is to, and all of one that does.
#[test]
fn a_gate_says_what_was_not_reached() {
    let small = Small::new();
    let set = small.plan(&[]).validation.first().map(|set| set.name.to_string()).unwrap();
    let gate = |bounds: &str| format!("{{{set}: {bounds}}}");
    let low = gate("{loss: 0.001, of_before: 2}");
    let (request, work) = small.request(small.plan(&[("outputs.gate", &low)]), 1, None);
    let outside = Outside::default();
    let error: Error = run(&request, &outside).unwrap_err();
    assert_eq!(error.class(), FailureClass::Gate, "{error}");
    let message = error.to_string();
    assert!(
        message.starts_with(&format!("`outputs.gate.{set}.loss` is 0.001, and the loss of {set} came to ")),
        "{message}"
    );
    assert!(!message.contains("of_before") && message.ends_with("; the result is not kept"), "{message}");
    assert!(
        !outside
            .events
            .lock()
            .unwrap()
            .iter()
            .any(|event| matches!(event, Event::Output { .. } | Event::Finished { .. }))
    );
    drop(work);
    small.finish(small.plan(&[("outputs.gate", &gate("{loss: 100, of_before: 2}"))]), 1);
}

#[test]
fn an_exploding_run_fails_as_numeric_and_names_the_tensor() {
    let small = Small::new();
    // A decay of more than two learning rates makes values grow without bound.
    let changes = [
        ("tune.optimizer", "{method: adamw, lr: 10, weight_decay: 1}"),
        ("tune.adapter.targets", "down_proj"),
        ("tune.steps", "50"),
    ];
    let (class, message) = fail(&small, &changes, None);
    assert_eq!(class, FailureClass::NotFinite, "{message}");
    assert!(message.contains("is not finite at step"), "{message}");
}

/// A base whose attentions say nothing to the rest of it: what is trained in them can learn nothing, and the run says so.
#[test]
fn a_run_whose_adapter_gets_no_signal_names_the_tensor() {
    let small = Small::with_weights();
    let file = small.path("base/model.safetensors");
    let mut weights = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
    for layer in 0..2 {
        let weight = weights.get_mut(&format!("model.layers.{layer}.self_attn.o_proj.weight")).unwrap();
        *weight = weight.zeros_like().unwrap();
    }
    candle_core::safetensors::save(&weights, &file).unwrap();
    let of = |targets: &'static str| {
        [("tune.from_scratch", "false"), ("tune.adapter.targets", targets), ("tune.adapter.dropout", "0")]
    };
    let (class, message) = fail(&small, &of("q_proj"), None);
    assert_eq!(class, FailureClass::NoGradient, "{message}");
    let expected = "was zero in each of the first 8 steps; it does not learn";
    assert!(message.contains("q_proj") && message.ends_with(expected), "{message}");
    small.finish(small.plan(&of("down_proj")), 1);
}

#[test]
fn a_checkpoint_that_is_not_whole_or_not_of_this_plan_is_refused() {
    let small = Small::new();
    let (request, work) = small.request(small.plan(&[]), 1, None);
    run(&request, &Outside::stopping_after(2)).unwrap();
    let checkpoint = work.path().join("checkpoint-2");
    let (_, message) = fail(&small, &[("tune.seed", "9")], Some(&checkpoint));
    assert!(message.contains("is of plan blake3:"), "{message}");
    let state = std::fs::read_to_string(checkpoint.join("state.json")).unwrap();
    for (text, expected) in [
        (state.replace("\"tokens\"", "\"tokenz\""), "unknown field `tokenz`"),
        (state.replace("\"seen\"", "\"sene\""), "unknown field `sene`"),
        (state[..state.len() / 2].to_owned(), "EOF"),
    ] {
        std::fs::write(checkpoint.join("state.json"), text).unwrap();
        let (_, message) = fail(&small, &[], Some(&checkpoint));
        assert!(message.contains(expected), "{message}");
    }
    std::fs::write(checkpoint.join("state.json"), state).unwrap();
    let name = "0/0/model.layers.0.mlp.up_proj.lora_A";
    for (file, name) in [("values.safetensors", name.to_owned()), ("optimizer.safetensors", format!("{name}/exp_avg"))]
    {
        let whole = std::fs::read(checkpoint.join(file)).unwrap();
        let damages: [(&str, Damage); 3] = [
            ("has no tensor", |tensors, name| drop(tensors.remove(name).unwrap())),
            ("which this run does not know", |tensors, name| {
                let tensor = tensors[name].clone();
                tensors.insert(format!("{name}x"), tensor);
            }),
            ("this run makes it", |tensors, name| {
                let tensor = tensors[name].flatten_all().unwrap().narrow(0, 0, 3).unwrap();
                tensors.insert(name.to_owned(), tensor);
            }),
        ];
        for (expected, damage) in damages {
            let mut tensors = candle_core::safetensors::load_buffer(&whole, &Device::Cpu).unwrap();
            damage(&mut tensors, &name);
            candle_core::safetensors::save(&tensors, checkpoint.join(file)).unwrap();
            let (class, message) = fail(&small, &[], Some(&checkpoint));
            assert!(message.contains(file) && message.contains(&name) && message.contains(expected), "{message}");
            assert_eq!(class, FailureClass::Io, "{message}");
        }
        std::fs::write(checkpoint.join(file), whole).unwrap();
    }
    std::fs::remove_file(checkpoint.join("optimizer.safetensors")).unwrap();
    let (class, message) = fail(&small, &[], Some(&checkpoint));
    assert!(message.contains("optimizer.safetensors"), "{message}");
    assert!(class.is_retryable() || class == FailureClass::Input, "{message}");
}

#[test]
fn a_run_does_not_go_on_with_data_that_has_changed() {
    let small = Small::new();
    let (request, work) = small.request(small.plan(&[]), 1, None);
    run(&request, &Outside::stopping_after(2)).unwrap();
    let data = std::fs::read_to_string(small.path("sums.jsonl")).unwrap();
    std::fs::write(small.path("sums.jsonl"), data.replace("0 and 1", "0 or 1")).unwrap();
    let (class, message) = fail(&small, &[], Some(&work.path().join("checkpoint-2")));
    assert_eq!(class, FailureClass::Input);
    assert!(message.starts_with("input sums.jsonl: has changed since the checkpoint was written"), "{message}");
}

#[test]
fn ranks_that_do_not_divide_the_shards_are_refused() {
    let small = Small::new();
    let (request, _work) = small.request(small.plan(&[]), 3, None);
    let message = run(&request, &Outside::default()).unwrap_err().to_string();
    assert!(message.contains("makes 3 ranks, which do not divide the 4 logical shards"), "{message}");
}
