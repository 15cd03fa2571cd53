//! `attune validate`.

use crate::support::{Place, Ran};

const JOB: &str = "version: 1
name: helper
base: ./base
data:
  domains:
    - {name: chat, source: ./chat.train.jsonl}
  max_length: 128
tune:
  adapter: {method: lora, rank: 8}
  steps: 10
";

fn validate(job: &str, more: &[&str]) -> Ran {
    let place = Place::with_demo();
    place.write("job.yaml", job);
    place.run(&[&["validate", "job.yaml"], more].concat())
}

#[test]
fn a_valid_job_is_said_to_be_valid() {
    insta::assert_snapshot!(validate(JOB, &[]).all(), @r"
    exit status 0
    --- stdout
    job.yaml is valid
    --- stderr
    ");
    insta::assert_snapshot!(validate(JOB, &["--set", "tune.adapter.rank=16", "--json"]).all(), @r#"
    exit status 0
    --- stdout
    {
      "file": "job.yaml",
      "valid": true,
      "faults": []
    }
    --- stderr
    "#);
    let place = Place::with_demo();
    for job in ["text.yaml", "chat.yaml"] {
        assert_eq!(place.run(&["validate", job]).status, 0);
    }
}

#[test]
fn a_preset_is_shown_as_the_slots_that_it_stands_for() {
    let head =
        JOB.replace("  adapter: {method: lora, rank: 8}\n", "").replace("name: helper", "name: helper\nkind: recipe");
    let with = |recipe: &str| format!("{head}recipe: {recipe}\n");
    let told = validate(&with("{method: asymmetric-lora, rank: 4, targets: q_proj}"), &[]);
    insta::assert_snapshot!(told.all(), @r"
    exit status 0
    --- stdout
    job.yaml is valid
      stage tune: {method: lora, targets: q_proj, init: {method: orthonormal}, train: true, rank: 4, alpha: 32, dropout: 0, trains: b}
    --- stderr
    ");
    let wrong = validate(&with("{method: mam, rnak: 4, mlps: mpl}"), &[]);
    insta::assert_snapshot!(wrong.all(), @r#"
    exit status 2
    --- stdout
    --- stderr
    error: job.yaml has 1 fault
      `recipe.rnak` is not a known field; did you mean "rank"?
    "#);
    let wrong = validate(&with("{method: mam, mlps: mpl}"), &[]);
    insta::assert_snapshot!(wrong.all(), @r#"
    exit status 2
    --- stdout
    --- stderr
    error: job.yaml has 1 fault
      `recipe.mlps` "mpl" matches no site of this llama model of 2 layers; did you mean "mlp"? (modules: embed_tokens, input_layernorm, q_proj, k_proj, v_proj, o_proj, self_attn, post_attention_layernorm, gate_proj, up_proj, down_proj, mlp, norm, lm_head)
    "#);
}

#[test]
fn what_is_not_yaml_is_said_with_line_and_column() {
    insta::assert_snapshot!(validate("version: 1\nname: [a, b\ntune: {}\n", &[]).all(), @r"
    exit status 2
    --- stdout
    --- stderr
    error: job.yaml:3:5: illegal placement of ':' indicator
    ");
    insta::assert_snapshot!(validate("version: 1\nname: a\nname: b\n", &[]).all(), @r"
    exit status 2
    --- stdout
    --- stderr
    error: job.yaml:3:1: duplicate mapping key: name
    ");
    insta::assert_snapshot!(validate("version: 1\n\tname: a\n", &["--json"]).all(), @r#"
    exit status 2
    --- stdout
    {
      "file": "job.yaml",
      "valid": false,
      "message": "job.yaml:1:10: while scanning a plain scalar, found a tab",
      "faults": []
    }
    --- stderr
    "#);
}

#[test]
fn all_faults_are_said_at_once_with_their_paths() {
    let job = JOB
        .replace("rank: 8", "rank: -4, alpha: high, targest: all-linear")
        .replace("steps: 10", "steps: ten\n  optimizer: {method: adamv}\n  batch_token: 4096");
    insta::assert_snapshot!(validate(&job, &[]).all(), @r#"
    exit status 2
    --- stdout
    --- stderr
    error: job.yaml has 6 faults
      `tune.adapter.alpha` is "high"; expected a number
      `tune.adapter.rank` is -4; expected 1 or more
      `tune.adapter.targest` is not a known field; known are rank, alpha, dropout, rslora, trains, b_lr, bias, preconditioned, damping, rank_pattern, alpha_pattern
      `tune.batch_token` is not a known field; did you mean "batch_tokens"?
      `tune.optimizer.method` is "adamv", which no method of point optimizer is called; known are adamw; did you mean "adamw"?
      `tune.steps` is "ten"; expected nothing or a whole number
    "#);
    insta::assert_snapshot!(validate(&JOB.replace("lora", "lroa"), &[]).all(), @r#"
    exit status 2
    --- stdout
    --- stderr
    error: job.yaml has 1 fault
      `tune.adapter.method` is "lroa", which no method of point adapter is called; there are 80 (`attune methods list --point adapter`); did you mean "lora"?
    "#);
    insta::assert_snapshot!(validate(&JOB.replace("method: lora", "method: adamw"), &["--json"]).all(), @r#"
    exit status 2
    --- stdout
    {
      "file": "job.yaml",
      "valid": false,
      "message": "job.yaml has 1 fault",
      "faults": [
        {
          "path": "tune.adapter.method",
          "message": "is \"adamw\", which is a method of point optimizer; expected one of point adapter"
        }
      ]
    }
    --- stderr
    "#);
    insta::assert_snapshot!(validate(JOB, &["--set", "tune.tokens=100", "--set", "data.max_length=1"]).all(), @r"
    exit status 2
    --- stdout
    --- stderr
    error: job.yaml has 1 fault
      `data.max_length` is 1; expected 2 or more
    ");
}

#[test]
fn sites_are_checked_where_the_base_is_here() {
    let job = JOB.replace("rank: 8", "rank: 8, targets: [q_proj, v_porj]");
    insta::assert_snapshot!(validate(&job, &[]).all(), @r#"
    exit status 2
    --- stdout
    --- stderr
    error: job.yaml has 1 fault
      `tune.adapter.targets[1]` "v_porj" matches no site of this llama model of 2 layers; did you mean "v_proj"? (modules: embed_tokens, input_layernorm, q_proj, k_proj, v_proj, o_proj, self_attn, post_attention_layernorm, gate_proj, up_proj, down_proj, mlp, norm, lm_head)
    "#);
    let elsewhere = job.replace("./base", "some-base:latest");
    assert_eq!(validate(&elsewhere, &[]).status, 0);
}

/// What only a job can name has no default that would do.
#[test]
fn a_method_of_tokens_without_any_is_refused_before_it_runs() {
    for (adapter, path) in [
        ("{method: alora}", "tokens"),
        ("{method: trainable-tokens}", "tokens"),
        ("{method: context-aware-prompt}", "tokens"),
        ("{method: alora, tokens: [5], text: a}", "text"),
    ] {
        let ran = validate(JOB, &["--set", &format!("tune.adapter={adapter}")]);
        assert_eq!(ran.status, 2, "{adapter}: {}", ran.all());
        assert!(ran.stderr.contains(&format!("`tune.adapter.{path}` ")), "{adapter}: {}", ran.all());
    }
    for adapter in
        ["{method: alora, text: a}", "{method: alora, tokens: [5]}", "{method: trainable-tokens, words: [a]}"]
    {
        let ran = validate(JOB, &["--set", &format!("tune.adapter={adapter}")]);
        assert_eq!(ran.status, 0, "{adapter}: {}", ran.all());
    }
}

#[test]
fn sites_are_those_of_what_a_surgery_makes_of_the_base() {
    let full = "tune.adapter={method: full, targets: [w1, gate]}";
    let with = |surgery: &str, more: &str| validate(JOB, &["--set", surgery, "--set", more]);
    let surgery = "tune.surgery={method: dynamic-dino, granularity: 2}";
    let ran = with(surgery, full);
    assert_eq!(ran.status, 0, "{}", ran.all());
    let ran = with(surgery, "tune.adapter={method: full, targets: gate_proj}");
    assert!(ran.stderr.contains("matches no site of this mixtral model"), "{}", ran.all());
    let ran = with("tune.surgery={method: dynamic-dino, granularity: 7}", full);
    assert!(ran.stderr.contains("`tune.surgery` makes `inner`"), "{}", ran.all());
}

#[test]
fn adapters_go_on_repeated_layers_where_their_folders_can_say_so() {
    let with = |ranges: &str, adapter: &str| {
        let surgery = format!("tune.surgery={{method: layer-replication, ranges: {ranges}}}");
        validate(JOB, &["--set", &surgery, "--set", &format!("tune.adapter={adapter}")])
    };
    for adapter in ["{method: lora, targets: model.layers.3.self_attn.q_proj}", "{method: dora}", "{method: full}"] {
        let ran = with("[[0, 2], [0, 2]]", adapter);
        assert_eq!(ran.status, 0, "{}", ran.all());
    }
    let ran = with("[[0, 2], [1, 2]]", "{method: lora, targets: model.layers.3.self_attn.q_proj}");
    assert!(ran.stderr.contains("matches no site of this llama model of 3 layers"), "{}", ran.all());
    let ran = with("[[0, 2], [1, 2]]", "{method: bone}");
    assert!(ran.stderr.contains("`tune.adapter` is bone, whose folder cannot say"), "{}", ran.all());
    let ran = with("[[0, 2], [1, 3]]", "{method: lora}");
    assert!(ran.stderr.contains("`tune.surgery.ranges[1]` is [1, 3]; expected"), "{}", ran.all());
    let ran = with("[]", "{method: lora}");
    assert!(ran.stderr.contains("`tune.surgery.ranges` is empty"), "{}", ran.all());
}

#[test]
fn a_path_that_cannot_be_set_and_a_file_that_is_not_there_are_said() {
    insta::assert_snapshot!(validate(JOB, &["--set", "tune.stack[0].rank=1"]).all(), @r"
    exit status 2
    --- stdout
    --- stderr
    error: --set has 1 fault
      `tune.stack[0]` cannot be set: the list has 0 entries
    ");
    insta::assert_snapshot!(Place::new().run(&["validate", "none.yaml"]).all(), @r"
    exit status 2
    --- stdout
    --- stderr
    error: none.yaml: No such file or directory (os error 2)
    ");
}

#[test]
fn a_path_that_is_not_there_is_a_fault_unless_it_is_the_servers() {
    let absent = ["--set", "data.domains[0].source=./absent.jsonl"];
    let ran = validate(JOB, &absent);
    assert_eq!(ran.status, 2, "{}", ran.all());
    assert!(ran.stderr.contains("`data.domains[0].source` is absent.jsonl: "), "{}", ran.all());
    let ran = validate(JOB, &[&absent[..], &["--server-paths"]].concat());
    assert_eq!(ran.status, 0, "{}", ran.all());
}

#[test]
fn the_examples_are_valid_beside_the_files_of_the_demonstration() {
    let place = Place::new();
    let ran = place.run(&["demo", "--files", "attune-demo/files"]);
    assert_eq!(ran.status, 0, "{}", ran.all());
    std::fs::create_dir_all(place.path().join("examples/adapters")).unwrap();
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut count = 0;
    for folder in ["examples", "examples/adapters"] {
        let files = std::fs::read_dir(root.join(folder)).unwrap().map(|entry| entry.unwrap().path());
        for path in files.filter(|path| path.is_file()) {
            let name = format!("{folder}/{}", path.file_name().unwrap().to_str().unwrap());
            place.write(&name, &std::fs::read_to_string(&path).unwrap());
            let ran = place.run(&["validate", &name]);
            assert_eq!(ran.status, 0, "{name}: {}", ran.all());
            count += 1;
        }
    }
    assert!(count >= 15);
    // Grids are of jobs among these.
    std::fs::create_dir_all(place.path().join("examples/grids")).unwrap();
    for entry in std::fs::read_dir(root.join("examples/grids")).unwrap() {
        let path = entry.unwrap().path();
        let name = format!("examples/grids/{}", path.file_name().unwrap().to_str().unwrap());
        place.write(&name, &std::fs::read_to_string(&path).unwrap());
        let ran = place.run(&["experiment", "report", &name]);
        assert!(ran.stderr.contains("has no results of this grid"), "{name}: {}", ran.all());
    }
}
