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
      Category    reparameterisation
      Sites       linear, embedding; all-linear where a slot names none
      Trains      rank*(i*(trains != "b") + o*(trains != "a")) + o*(bias and trains != "a")
                  parameters at a site of input width i and output width o
      Merges      into the base's weight, as a low-rank change
      Base        of whole numbers, or in few bits (`tune.quantization`)
      PEFT        kept in PEFT's layout as LORA
      Paper       LoRA: Low-Rank Adaptation of Large Language Models. Edward J. Hu, Yelong Shen,
                  Phillip Wallis, Zeyuan Allen-Zhu, Yuanzhi Li, Shean Wang, Lu Wang, Weizhu Chen
                  (2021)

    What it computes
        y_to = x_ti W_oi^T + s · (drop(x_ti) A_ri^T) B_or^T
        s    = alpha / r        or, with rslora,  alpha / sqrt(r)
        y_to = … + s · d_o      with `bias`
        e_d  = W_vd[token] + s · B_dr A_rv[:, token]      at a table of tokens
        ∂A <- (B^T B + δ 1)^-1 ∂A        ∂B <- ∂B (A A^T + δ 1)^-1        with `preconditioned`

    Symbols
      `lora_A` `A_ri` and `lora_B` `B_or`, f32; both train, or as `trains` says one of them; A
      starts uniform in ±1/sqrt(i) (Kaiming with a = sqrt(5)), B at 0. `drop` is dropout on the
      component's input. The learning rate of B is `b_lr` times that of all else. With `bias`, At a
      table of tokens `lora_embedding_A` `A_rv` and `lora_embedding_B` `B_dr` are for what is looked
      up alone, without dropout and bias: A starts at 0 and B normal. `lora_bias` `d_o` belongs to
      B: it starts at 0, trains where B does, at its rate, and does not decay. `preconditioned`
      gradients are divided by Gram matrices of the other factor, δ being `damping`, before they are
      clipped and the optimiser sees them: the product then moves alike however it is split into
      factors. Beside `trains: b` that is the projected gradient of LoRA-FA.

    Cost
      `r*(i+o)` parameters per linear, `r*o` or `r*i` where one factor trains, and `o` more with
      `bias`; `2 r (i+o)` extra FLOPs per token forward. With `bias` it is not computed within the
      product of the linear's own weight. `preconditioned` steps invert two `r` by `r` matrices a
      linear and multiply by them, `2 r² (i+o)` FLOPs a step, and are steps of the component's own:
      beside no other rule of steps.

    Limits
      With B = 0 it is the base, bit for bit. With r = min(i, o) it can be any change of the weight.
      Where B alone trains, the change stays in the rows that A spans. A `bias` merges where the
      linear has one; else it stays beside the base, and so does what is added at a table of tokens
      that is the head's as well.

    Differs from its paper or others
      Agrees with PEFT; its optimisers `riemannian` and, beside `trains: b`, `lorafa` are
      `preconditioned` here, with clipping after it rather than before, and without LoRA-FA's
      division by s², from which a step of Adam does not depend. `rank_pattern` and `alpha_pattern`
      name whole paths, not patterns: reading a PEFT folder resolves its patterns.

    Parameters
      NAME            TYPE                     DEFAULT  RANGE           MEANING
      rank            whole number             8        1 ..= 4096      Rank of the change.
      alpha           number                   8        0 ..= 1000000   Numerator of the scaling.
      dropout         number                   0        0 ..= 0.99      Share of the component's input that is dropped in training.
      rslora          true | false             false                    Scales by `alpha / sqrt(rank)` instead of `alpha / rank`.
      trains          both | b | a             both                     Which factors train.
      b_lr            number                   1        0 ..= 1000000   Factor on the learning rate of B (LoRA+ has some 16).
      bias            true | false             false                    Adds a trained bias to what B gives, scaled as that is.
      preconditioned  true | false             false                    Divides the gradient of each factor by what the other one makes of a change.
      damping         number                   0.01     1e-12 ..= 1000  What is added to the diagonal of what a gradient is divided by.
      rank_pattern    mapping to whole number  none                     Rank at single sites, by whole path.
      alpha_pattern   mapping to number        none                     Alpha at single sites, by whole path.

    In a job file
      tune:
        adapter: {method: lora, rank: 8, alpha: 8, dropout: 0, rslora: false, trains: both, b_lr: 1, bias: false, preconditioned: false, damping: 0.01}
    --- stderr
    "#);
    insta::assert_snapshot!(run(&["methods", "show", "cosine"]).all(), @r"
    exit status 0
    --- stdout
    cosine (schedule)

      Lets the learning rate fall to 0 along half a cosine, after a warm-up: slow at first and at
      the end.

      Decides     how does the learning rate run over time?

    What it computes
        d < w: d / w        else: (1 + cos(π (d - w) / (n - w))) / 2

    Symbols
      `d` finished updates, `n` updates of the run, `w` updates of the warm-up; the factor is on the
      learning rate.

    Cost
      None.

    Limits
      0 at the end of the run; half way at the half of the time after the warm-up.

    Differs from its paper or others
      none; agrees with the scheduler of the same name in `transformers`.

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
    assert!(ran.stdout.contains("rule classification-100-storage (version 1)"), "{}", ran.stdout);
    assert!(ran.stdout.contains("of the grid by-size") && ran.stdout.contains("runs j-"), "{}", ran.stdout);
    assert_eq!(ran.all(), ask(&["--short-of", "storage"]).all());
    let json = ask(&["--json"]).json();
    assert_eq!(json["rule"]["goal"], "quality");
    assert_eq!(json["beyond"], false);
    let far = run(&["methods", "advise", "--task", "generation", "--examples", "1000000"]);
    assert!(far.stdout.contains("no run had as much data"), "{}", far.stdout);
    assert_eq!(run(&["methods", "advise", "--task", "poetry", "--examples", "5"]).status, 2);
}
