use attune_spec::Fault;
use attune_spec::id::Digest;
use attune_spec::job::plan::{Input, Length};
use attune_spec::job::{JobSpec, Plan, ReadError, Reference, read_value, read_yaml};
use attune_spec::method::Catalogue;
use serde_json::{Value, json};

const SMALL: &str = "
version: 1
name: debian-helper
base: file:///models/base
data:
  domains:
    - {name: packages, source: file:///data/packages.train.jsonl}
  max_length: 256
tune:
  adapter: {method: lora, rank: 16, alpha: 32}
  steps: 200
";

fn read(text: &str) -> Result<JobSpec, ReadError> {
    read_value(&read_yaml(text)?, Catalogue::embedded())
}

/// The faults of the small job with `changes` made to it, as lines.
fn faults(changes: &[(&str, Value)]) -> Vec<String> {
    let mut value = read_yaml(SMALL).unwrap();
    for (path, new) in changes {
        attune_spec::job::set_path(&mut value, path, &new.to_string()).unwrap();
    }
    match read_value(&value, Catalogue::embedded()) {
        Ok(_) => Vec::new(),
        Err(ReadError::Faults(faults)) => faults.iter().map(Fault::to_string).collect(),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn a_short_job_has_the_documented_defaults() {
    let spec = read(SMALL).unwrap();
    assert_eq!(spec.tune.batch_tokens, 4096);
    assert_eq!(spec.limits.max_attempts, 3);
    assert_eq!(spec.tune.objective.method, "sft");
    assert_eq!(spec.base, "file:///models/base".parse::<Reference>().unwrap());
    assert_eq!(spec.references().len(), 2);
}

#[test]
fn each_fault_has_its_path_and_says_what_would_do() {
    let cases: &[(&str, Value, &str)] = &[
        (
            "tune.adapter.method",
            json!("lroa"),
            "`tune.adapter.method` is \"lroa\", which no method of point adapter is called; there are",
        ),
        (
            "tune.adapter.method",
            json!("adamw"),
            "`tune.adapter.method` is \"adamw\", which is a method of point optimizer; expected one of point adapter",
        ),
        ("tune.adapter.rank", json!(-4), "`tune.adapter.rank` is -4; expected 1 or more"),
        ("tune.adapter.rank", json!("8"), "`tune.adapter.rank` is \"8\"; expected a whole number"),
        ("tune.adapter.rnak", json!(8), "`tune.adapter.rnak` is not a known field; did you mean \"rank\"?"),
        ("tune.adapter", json!(3), "`tune.adapter` is 3; expected a mapping"),
        ("tune.steps", json!(0), "`tune.steps` is 0; expected 1 or more"),
        ("tune.epochs", json!(1), "`tune` gives steps and epochs; expected exactly one of them"),
        ("tune.steps", json!(null), "`tune` says no length; expected one of `steps`, `epochs`, `tokens`"),
        (
            "tune.optimiser",
            json!({"method": "adamw"}),
            "`tune.optimiser` is not a known field; did you mean \"optimizer\"?",
        ),
        (
            "tune.optimizer",
            json!({"method": "adamw", "lr": "fast"}),
            "`tune.optimizer.lr` is \"fast\"; expected a number",
        ),
        (
            "tune.optimizer",
            json!({"method": "adamw", "lr": 1e30}),
            "`tune.optimizer.lr` is 1e+30; expected 10.0 or less",
        ),
        ("data.on_bad_row", json!("ignore"), "`data.on_bad_row` is \"ignore\"; expected one of fail, skip"),
        ("data.domains", json!([]), "`data.domains` has too few entries; expected 1 or more"),
        ("data.domains[0].weight", json!(-1), "`data.domains[0].weight` is -1; expected 0 or more"),
        (
            "data.domains[0].source",
            json!("ftp://x"),
            "`data.domains[0].source` is wrong: reference \"ftp://x\" is not valid",
        ),
        (
            "data.domains[0].provenance",
            json!({"class": "distilled"}),
            "`data.domains[0].provenance.teacher` is missing: rows of the class distilled have it",
        ),
        (
            "data.domains[0].provenance",
            json!({"class": "expert", "round": 2}),
            "`data.domains[0].provenance.round` is given, and rows of the class expert have none",
        ),
        (
            "data.caps",
            json!({"distilled": 0.5}),
            "`data.caps.distilled` bounds rows of which the job has none: no domain has `provenance.class: distilled`",
        ),
        ("data.caps", json!({"experts": 0.5}), "`data.caps."),
        ("data.max_length", json!(8192), "`tune.batch_tokens` is 4096; expected at least data.max_length = 8192"),
        ("version", json!(2), "`version` is 2; this build reads version 1"),
        ("name", json!("Not A Name"), "`name` is wrong: name \"Not A Name\" is not valid"),
        (
            "resources.devices_per_worker",
            json!(3),
            "`resources.devices_per_worker` makes 3 ranks, which do not divide the 8 logical shards",
        ),
        (
            "resources",
            json!({"device": "cuda", "devices_per_worker": 2}),
            "`resources.devices_per_worker` is 2; expected 1: this version trains a job on one NVIDIA device",
        ),
        (
            "resources",
            json!({"share_base": true, "devices_per_worker": 2}),
            "`resources.share_base` is true, but the job asks for several devices",
        ),
        ("outputs.tag", json!("a:b:c"), "`outputs.tag` is wrong: tag \"a:b:c\" is not valid"),
        ("outputs.merged_tag", json!("m"), "`outputs.merged_tag` is given, but `outputs.merged` is false"),
        ("base", json!(null), "`base` is null; expected a text"),
        (
            "outputs.gate",
            json!({"other": {"loss": 1}}),
            "`outputs.gate.other` is no validation set; expected one of `data.validation`: ",
        ),
        ("outputs.gate", json!({"other": {}}), "`outputs.gate.other` bounds nothing; expected `loss`, `of_before`"),
        ("outputs.gate", json!({"x": {"loss": -1}}), "`outputs.gate.x.loss` is -1; expected 0.0 or more"),
        ("outputs.gate", json!({"x": {"lose": 1}}), "`outputs.gate.x.lose` "),
        (
            "outputs.gate",
            json!({"x": {"accuracy": 0.5}}),
            "`outputs.gate.x.accuracy` is for models that give classes or vectors",
        ),
        (
            "outputs.gate",
            json!({"x": {"reward": 0.5}}),
            "`outputs.gate.x.reward` is what answers of the model are worth, but `tune.objective` is sft",
        ),
    ];
    for (path, value, expected) in cases {
        let faults = faults(&[(path, value.clone())]);
        assert!(faults.iter().any(|fault| fault.starts_with(expected)), "{path}: {value}: {faults:#?}");
    }
}

#[test]
fn who_learns_from_answers_says_what_they_are_worth() {
    let grpo = ("tune.objective", json!({"method": "grpo", "max_tokens": 64}));
    let right = json!([{"method": "exact-match", "weight": 2}, {"method": "overlong", "margin": 8}]);
    assert_eq!(faults(&[grpo.clone(), ("tune.rewards", right.clone())]), [""; 0]);
    assert_eq!(
        faults(std::slice::from_ref(&grpo)),
        [
            "`tune.rewards` is empty, but `tune.objective` is grpo, which learns from answers: expected what they are worth"
        ]
    );
    assert_eq!(
        faults(&[("tune.rewards", right)]),
        ["`tune.rewards` judges answers of the model, but `tune.objective` is sft, which learns what is in the data"]
    );
    let wrong =
        json!([{"method": "exact-mach"}, {"method": "dpo"}, {"method": "overlong", "margin": 0, "weight": "x"}]);
    let found = faults(&[grpo, ("tune.rewards", wrong)]);
    for expected in [
        "`tune.rewards[0].method` is \"exact-mach\", which no method of point reward is called; known are",
        "`tune.rewards[1].method` is \"dpo\", which is a method of point objective; expected one of point reward",
        "`tune.rewards[2].margin` is 0; expected 1 or more",
        "`tune.rewards[2].weight` is",
    ] {
        assert!(found.iter().any(|fault| fault.starts_with(expected)), "{expected}: {found:#?}");
    }
    let long = json!({"method": "grpo", "max_tokens": 256});
    assert_eq!(
        faults(&[("tune.objective", long), ("tune.rewards", json!([{"method": "exact-match"}]))]),
        ["`data.max_length` is 256; with answers of 256 tokens no prompt has room: set it higher or these shorter"]
    );
}

#[test]
fn a_base_from_scratch_is_of_f32() {
    let (fresh, narrow) = (("tune.from_scratch", json!(true)), ("tune.precision", json!("bf16")));
    assert_eq!(faults(std::slice::from_ref(&fresh)), [""; 0]);
    let expected = "`tune.precision` is bf16, but `tune.from_scratch` makes a base of f32; expected f32";
    assert_eq!(faults(&[fresh, narrow]), [expected]);
}

#[test]
fn a_base_is_shared_only_as_it_is() {
    let share = ("resources.share_base", json!(true));
    assert_eq!(faults(std::slice::from_ref(&share)), [""; 0]);
    for (changed, expected) in [
        (("tune.adapter", json!({"method": "full"})), "`tune.adapter` trains the weights of the base"),
        (("tune.from_scratch", json!(true)), "`tune.from_scratch` makes a base of the job's own"),
        (("tune.surgery", json!({"method": "dynamic-dino"})), "`tune.surgery` makes another model of it"),
        (
            ("tune.adapter.init", json!({"method": "loftq", "iterations": 2})),
            "`tune.adapter.init` quantises the base anew",
        ),
    ] {
        let faults = faults(&[share.clone(), changed]);
        let wanted = format!("`resources.share_base` is true, but {expected}");
        assert!(faults.iter().any(|fault| fault.starts_with(&wanted)), "{faults:#?}");
    }
}

#[test]
fn ranks_are_shared_among_sites_that_may_have_their_own() {
    let budget = ("tune.budget", json!({"method": "sensitivity-lora", "least": 1}));
    assert_eq!(faults(std::slice::from_ref(&budget)), [""; 0]);
    let wrong = ("tune.budget", json!({"method": "sensitivity-lora", "least": 0}));
    assert_eq!(faults(&[wrong]), ["`tune.budget.least` is 0; expected 1 or more"]);
    let bone = ("tune.adapter", json!({"method": "bone"}));
    let found = faults(&[budget.clone(), bone]);
    assert!(
        found.len() == 1
            && found[0].starts_with("`tune.budget` is given, but `tune.adapter` is bone, whose sites have no ranks of their own; expected one of")
            && found[0].contains("lora"),
        "{found:?}"
    );
    let own = ("tune.adapter", json!({"method": "lora", "rank_pattern": {"a": 3}}));
    let message = "`tune.adapter.rank_pattern` cannot be given together with `tune.budget`, which decides it";
    assert_eq!(faults(&[budget.clone(), own]), [message]);
    let from = ("tune.adapter", json!({"from": "facts:latest"}));
    let message = "`tune.budget` is given, but `tune.adapter` starts from an adapter, whose ranks are what they are";
    assert_eq!(faults(&[budget, from]), [message]);
}

#[test]
fn a_surgery_is_for_what_keeps_its_model() {
    let (surgery, full) =
        (("tune.surgery", json!({"method": "dynamic-dino"})), ("tune.adapter", json!({"method": "full"})));
    assert_eq!(faults(&[surgery.clone(), full.clone()]), [""; 0]);
    let expected = "`tune.adapter` is an adapter, and `tune.surgery` makes a model of its own, which only a method that trains \
                    the weights of the base keeps";
    assert_eq!(faults(std::slice::from_ref(&surgery)), [expected]);
    let wrong = ("tune.surgery", json!({"method": "dynamic-dino", "copies": 0}));
    assert_eq!(faults(&[wrong, full.clone()]), ["`tune.surgery.copies` is 0; expected 1 or more"]);
    let other = ("tune.surgery", json!({"method": "adamw"}));
    let found = faults(&[other, full]);
    assert!(
        found[0].starts_with("`tune.surgery.method` is \"adamw\", which is a method of point optimizer"),
        "{found:?}"
    );
}

#[test]
fn a_base_in_few_bits_is_for_what_does_not_train_it() {
    let few = ("tune.quantization", json!({"method": "nf4", "double_quant": true}));
    let loftq = |iterations: u32| ("tune.adapter.init", json!({"method": "loftq", "iterations": iterations}));
    assert_eq!(faults(std::slice::from_ref(&few)), [""; 0]);
    assert_eq!(faults(&[few.clone(), ("tune.adapter.init", json!({"method": "pissa"}))]), [""; 0]);
    let shared = ("resources.share_base", json!(true));
    assert_eq!(faults(&[few.clone(), loftq(1), shared.clone()]), [""; 0], "one round leaves the base as it is");
    assert_eq!(faults(&[few.clone(), loftq(2), shared]).len(), 1);
    for (changes, expected) in [
        (
            vec![few.clone(), ("tune.adapter", json!({"method": "full"}))],
            "`tune.quantization` is given, but `tune.adapter` is full, which trains the weights of the base, and weights in few bits \
             do not train: leave it out, or train an adapter beside them, such as lora",
        ),
        (
            vec![few.clone(), ("tune.from_scratch", json!(true))],
            "`tune.quantization` is given, but `tune.from_scratch` makes a base at random: expected a base that was trained",
        ),
        (
            vec![few.clone(), ("tune.surgery", json!({"method": "dynamic-dino"}))],
            "`tune.quantization` is given, but `tune.surgery` is dynamic-dino, which makes another model of whole numbers: leave one \
             of them out",
        ),
        (
            vec![("tune.quantization", json!({"method": "nf5"}))],
            "`tune.quantization.method` is \"nf5\", which no method of point quantization is called; known are nf4; did you mean \
             \"nf4\"?",
        ),
        (
            vec![("tune.quantization", json!({"method": "nf4", "double": true}))],
            "`tune.quantization.double` is not a known field",
        ),
        (
            vec![loftq(1)],
            "`tune.adapter.init` is loftq, which makes up for what few bits lose, but the base has whole numbers; expected \
             `tune.quantization`",
        ),
        (
            vec![few.clone(), ("outputs.merged", json!(true))],
            "`outputs.merged_into` is missing: `tune.quantization` holds the base in few bits, into which nothing is merged; expected \
             base (the weights of its folder) or dequantized (those that the adapter is trained beside)",
        ),
        (
            vec![few.clone(), ("outputs.merged_into", json!("base"))],
            "`outputs.merged_into` is given, but `outputs.merged` is false",
        ),
        (
            vec![("outputs.merged", json!(true)), ("outputs.merged_into", json!("base"))],
            "`outputs.merged_into` is given, but `tune.quantization` is not: there is one base to merge into",
        ),
        (
            vec![few.clone(), loftq(1), ("outputs.merged", json!(true)), ("outputs.merged_into", json!("base"))],
            "`outputs.merged_into` is base, but `tune.adapter.init` is loftq, whose adapter makes up for what the few bits lose: on \
             the weights of the folder it would be counted twice; expected dequantized",
        ),
    ] {
        let found = faults(&changes);
        assert!(found.iter().any(|fault| fault.starts_with(expected)), "{changes:?}: {found:#?}");
    }
    let merged = [few, ("outputs.merged", json!(true)), ("outputs.merged_into", json!("dequantized"))];
    assert_eq!(faults(&merged), [""; 0]);
}

#[test]
fn faults_of_all_layers_come_together() {
    let all = faults(&[
        ("tune.adapter.rank", json!(0)),
        ("tune.schedule", json!({"method": "cosin"})),
        ("data.max_length", json!(1)),
        ("extra", json!(1)),
    ]);
    assert_eq!(all.len(), 4, "{all:#?}");
}

#[test]
fn malformed_yaml_has_line_and_column() {
    let error = read("version: 1\nname: [a\nbase: x\n").unwrap_err();
    assert!(matches!(error, ReadError::Syntax { line: 2..=4, .. }), "{error}");
}

#[test]
fn a_plan_leaves_no_default_open_and_does_not_change_with_names_of_people() {
    let digest = Digest::from_bytes([7; 32]);
    let plan = |spec: &JobSpec| Plan::resolve(spec, Catalogue::embedded(), |_| Ok(Input::Artifact(digest))).unwrap();
    let mut spec = read(SMALL).unwrap();
    let before = plan(&spec);
    assert_eq!(before.length, Length::Steps(200));
    assert_eq!(before.logical_shards, 8);
    assert_eq!(before.artifacts(), [digest]);
    let slot = &before.stack[0];
    assert_eq!((slot.name.as_str(), slot.targets.entries()), ("lora", &["all-linear".to_owned()][..]));
    let params = &slot.method.as_ref().unwrap().params;
    assert_eq!(params["rank"], json!(16));
    assert!(params.contains_key("dropout"), "a default is missing: {params:?}");
    spec.name = "another".parse().unwrap();
    spec.priority = 5;
    assert_eq!(plan(&spec), before);
    let text = serde_json::to_string(&before).unwrap();
    assert_eq!(serde_json::from_str::<Plan>(&text).unwrap(), before);
}

#[test]
fn references_that_cannot_be_resolved_are_told_with_their_paths() {
    let spec = read(SMALL).unwrap();
    let faults = Plan::resolve(&spec, Catalogue::embedded(), |reference| match reference {
        Reference::Path(path) => Err(format!("names {path:?}, which is outside of the data root")),
        _ => Ok(Input::Url(String::new())),
    });
    let paths: Vec<String> = faults.unwrap_err().into_iter().map(|fault| fault.path.to_string()).collect();
    assert_eq!(paths, ["base", "data.domains[0].source"]);
}

#[test]
fn a_job_survives_being_written_and_read_again() {
    let spec = read(SMALL).unwrap();
    let value = serde_json::to_value(&spec).unwrap();
    assert_eq!(read_value(&value, Catalogue::embedded()).unwrap(), spec);
}

/// Shares that are none, and caps that leave documents to nobody.
#[test]
fn caps_of_classes_leave_room_for_every_document() {
    let domain =
        |provenance: serde_json::Value| json!([{"name": "a", "source": "./a.jsonl", "provenance": provenance}]);
    let distilled = domain(json!({"class": "distilled", "teacher": "large"}));
    let found = |share: f64| faults(&[("data.domains", distilled.clone()), ("data.caps", json!({"distilled": share}))]);
    assert_eq!(found(1.0), [""; 0]);
    let less = found(0.5);
    let expected =
        "`data.caps` leave room for 0.5 of the documents; expected 1 or more, or a domain that none is about";
    assert!(less.iter().any(|fault| fault == expected), "{less:#?}");
    assert!(found(1.5)[0].starts_with("`data.caps.distilled` is 1.5; expected a share"), "{:#?}", found(1.5));
}
