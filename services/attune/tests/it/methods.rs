//! `attune methods`.

use crate::support::run;

#[test]
fn the_list_is_a_table_and_json() {
    let ran = run(&["methods", "list", "--point", "adapter"]);
    assert_eq!((ran.status, ran.stderr.as_str()), (0, ""));
    let mut lines = ran.stdout.lines();
    assert_eq!(lines.next().unwrap().split_whitespace().collect::<Vec<_>>(), ["NAME", "POINT", "SUMMARY"]);
    assert!(lines.clone().all(|line| line.contains(" adapter ")), "{}", ran.stdout);
    assert!(lines.any(|line| line.starts_with("lora ")), "{}", ran.stdout);
    let all = run(&["methods", "list", "--json"]).json();
    let names: Vec<&str> = all.as_array().unwrap().iter().map(|method| method["name"].as_str().unwrap()).collect();
    assert!(names.contains(&"lora") && names.contains(&"adamw"), "{names:?}");
}

#[test]
fn a_method_reads_like_an_entry_of_a_manual() {
    insta::assert_snapshot!(run(&["methods", "show", "lora"]).all(), @r#"
    exit status 0
    --- stdout
    lora (adapter)

      Low-rank adaptation: a product of two thin matrices beside each frozen weight; the standard
      choice, cheap to train, to store and to serve.

      Decides     which attachments at which sites, with which tensors, and what do they merge to?
      Sites       linear; all-linear where a slot names none
      Cost        rank*(i*(trains != "b") + o*(trains != "a")) + o*(bias and trains != "a") trained
                  parameters at a site of input width i and output width o
      Merges      into the base's weight, as a low-rank change
      Base        of whole numbers, or in few bits (`tune.quantization`)
      PEFT        kept in PEFT's layout as LORA
      Paper       LoRA: Low-Rank Adaptation of Large Language Models. Edward J. Hu, Yelong Shen,
                  Phillip Wallis, Zeyuan Allen-Zhu, Yuanzhi Li, Shean Wang, Lu Wang, Weizhu Chen
                  (2021)

    Parameters
      NAME           TYPE                     DEFAULT  RANGE          MEANING
      rank           whole number             8        1 ..= 4096     Rank of the change.
      alpha          number                   8        0 ..= 1000000  Numerator of the scaling.
      dropout        number                   0        0 ..= 0.99     Share of the component's input that is dropped in training.
      rslora         true | false             false                   Scales by `alpha / sqrt(rank)` instead of `alpha / rank`.
      trains         both | b | a             both                    Which factors train.
      b_lr           number                   1        0 ..= 1000000  Factor on the learning rate of B (LoRA+ has some 16).
      bias           true | false             false                   Adds a trained bias to what B gives, scaled as that is.
      rank_pattern   mapping to whole number  none                    Rank at single sites, by whole path.
      alpha_pattern  mapping to number        none                    Alpha at single sites, by whole path.

    In a job file
      tune:
        adapter: {method: lora, rank: 8, alpha: 8, dropout: 0, rslora: false, trains: both, b_lr: 1, bias: false}
    --- stderr
    "#);
    insta::assert_snapshot!(run(&["methods", "show", "cosine"]).all(), @r"
    exit status 0
    --- stdout
    cosine (schedule)

      Lets the learning rate fall to 0 along half a cosine, after a warm-up: slow at first and at
      the end.

      Decides     how does the learning rate run over time?

    Parameters
      NAME    TYPE    DEFAULT  RANGE             MEANING
      warmup  number  0.03     0 ..= 1000000000  How long the rate rises from 0: a share of the run below 1, or a number of steps.

    In a job file
      tune:
        schedule: {method: cosine, warmup: 0.03}
    --- stderr
    ");
    assert_eq!(run(&["methods", "show", "adamw", "--json"]).json()["defaults"]["beta1"], 0.9);
}

#[test]
fn an_unknown_method_is_met_with_the_nearest() {
    insta::assert_snapshot!(run(&["methods", "show", "lroa"]).all(), @r#"
    exit status 2
    --- stdout
    --- stderr
    error: there is no method "lroa"; did you mean "lora"?

    hint: see what there is: attune methods list
    "#);
    insta::assert_snapshot!(run(&["methods", "show", "lroa", "--json"]).all(), @r#"
    exit status 2
    --- stdout
    --- stderr
    {"error":{"message":"there is no method \"lroa\"; did you mean \"lora\"?","hint":"see what there is: attune methods list","faults":[]}}
    "#);
}

/// The same question has the same answer, which names the rule and the runs that it is made of.
#[test]
fn advice_cites_its_rule_and_the_runs() {
    let ask =
        |more: &[&str]| run(&[&["methods", "advise", "--task", "classification", "--examples", "40"], more].concat());
    let ran = ask(&["--short-of", "storage"]);
    assert_eq!(ran.status, 0, "{}", ran.all());
    assert!(ran.stdout.contains("rule classification-50-storage (version 1)"), "{}", ran.stdout);
    assert!(ran.stdout.contains("of the grid by-size") && ran.stdout.contains("runs j-"), "{}", ran.stdout);
    assert_eq!(ran.all(), ask(&["--short-of", "storage"]).all());
    let json = ask(&["--json"]).json();
    assert_eq!(json["rule"]["goal"], "quality");
    assert_eq!(json["beyond"], false);
    let far = run(&["methods", "advise", "--task", "generation", "--examples", "1000000"]);
    assert!(far.stdout.contains("no run had as much data"), "{}", far.stdout);
    assert_eq!(run(&["methods", "advise", "--task", "poetry", "--examples", "5"]).status, 2);
}
