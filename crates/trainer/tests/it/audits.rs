//! What trained models are like, from what lies in their folders.

use std::path::{Path, PathBuf};

use attune_trainer::audit::answers::judge::{Verdict, verdict};
use attune_trainer::audit::answers::{Answered, Item, Speakers};
use attune_trainer::audit::bootstrap::Bootstrap;
use attune_trainer::audit::drift::{self, Drift};
use attune_trainer::audit::fairness::report::Report;
use attune_trainer::audit::fairness::toxicity::Lexicon;
use attune_trainer::audit::fairness::verdict::{Against, Label};
use attune_trainer::audit::fairness::{Audit, Decisions, Generations, Question};
use attune_trainer::audit::measure::Folder;

use crate::outputs::unpack;
use crate::support::{Small, metric};

/// Trains, leaves the result in a folder, and gives the loss at the end.
fn trained(small: &Small, name: &str, adapter: &str, steps: &str) -> (PathBuf, f64) {
    let changes = [
        ("tune.from_scratch", "false"),
        ("tune.adapter", adapter),
        ("tune.steps", steps),
        ("tune.schedule", "{method: constant}"),
    ];
    let (events, files) = small.finish(small.plan(&changes), 1);
    unpack(&files, "Result", &small.path(name));
    (small.path(name), *metric(&events, "eval/sums/loss").last().unwrap())
}

fn questions() -> Decisions {
    let question = |index: usize| Question {
        prompt: format!("{index} and {} make ", index + 1),
        label: if index.is_multiple_of(3) { "odd" } else { "even" }.to_owned(),
        group: if index.is_multiple_of(2) { "a" } else { "b" }.to_owned(),
    };
    Decisions {
        questions: (0..12).map(question).collect(),
        options: vec!["odd".to_owned(), "even".to_owned()],
        positive: "odd".to_owned(),
    }
}

fn audit(small: &Small, reference: Option<(Against, Folder)>, runs: &[(String, Folder)]) -> Report {
    let lexicon = Lexicon::parse("am\nmake\t0.25").unwrap();
    let heard = std::cell::RefCell::new(Vec::new());
    let base = small.path("base");
    let audit = Audit {
        base: &base,
        runs,
        reference: reference.map(|(against, folder)| (against, "reference".to_owned(), folder)),
        target: small.path("sums.jsonl"),
        known: Some(small.path("greetings.jsonl")),
        rows: Some(5),
        max_length: 32,
        decisions: Some(questions()),
        generations: Some(Generations {
            prompts: vec!["Who?".to_owned(), "3 and".to_owned()],
            each: 2,
            max_tokens: 6,
            scorer: &lexicon,
        }),
        ranks: &[1, 2, 4, 16],
        least: 0.8,
        bootstrap: Bootstrap { resamples: 300, level: 0.95, seed: 1 },
    };
    let report = audit.run(|name| heard.borrow_mut().push(name.to_owned())).unwrap();
    assert_eq!(heard.borrow().len(), 1 + usize::from(report.reference.is_some()) + runs.len());
    report
}

fn label(report: &Report, run: usize, metric: &str) -> Label {
    report.runs[run].verdicts.iter().find(|(name, _)| *name == metric).unwrap().1.label
}

#[test]
fn a_run_that_stopped_early_is_flagged_and_one_that_went_as_far_is_not() {
    let small = Small::with_weights();
    let (full, at_end) = trained(&small, "full", "{method: full}", "40");
    let (short, _) = trained(&small, "short", "{method: lora, rank: 1}", "1");
    let (long, _) = trained(&small, "long", "{method: lora, rank: 8, alpha: 32}", "150");
    let (again, _) = trained(&small, "again", "{method: full}", "60");
    let runs = [
        ("short".to_owned(), Folder::Adapter(short)),
        ("long".to_owned(), Folder::Adapter(long)),
        ("again".to_owned(), Folder::Model(again)),
    ];
    let report = audit(&small, Some((Against::Full, Folder::Model(full))), &runs);
    let (_, reference) = report.reference.as_ref().unwrap();
    assert!((reference.target.loss - at_end).abs() < 1e-4, "{} here, {at_end} in the run", reference.target.loss);
    assert_eq!(report.base.target.divergence, 0.0);
    assert!(reference.target.divergence > 0.1 && reference.known.unwrap().divergence > 0.1);
    assert!(reference.target.loss < report.base.target.loss);
    assert_eq!(label(&report, 0, "target loss"), Label::Flagged, "{:?}", report.runs[0]);
    assert_eq!(label(&report, 2, "target loss"), Label::Mitigated, "{:?}", report.runs[2]);
    let recovered = |run: usize| report.runs[run].verdicts[0].1.recovered.unwrap();
    assert!(recovered(0) < recovered(1) && recovered(1) < recovered(2), "{:?}", [0, 1, 2].map(recovered));
    assert!(report.is_flagged());
    // More was learned by each run than by the one before.
    let learned = |run: usize| report.runs[run].balance.unwrap().adaptation;
    assert!(0.0 < learned(0) && learned(0) < learned(1) && learned(1) < learned(2), "{:?}", [0, 1, 2].map(learned));
    // What a run of all weights changes is in more directions than one, and all of it in as many as there are.
    assert!(!report.changes.is_empty());
    for change in &report.changes {
        assert!(change.energy.is_sorted() && (change.energy[3] - 1.0).abs() < 1e-6, "{change:?}");
        assert!(change.energy[0] < 0.999 && change.stable_rank > 1.001, "{change:?}");
    }
    let page = report.markdown();
    for text in [
        "`short`",
        "**flagged**",
        "mitigated",
        "demographic parity",
        "harmonic mean",
        "stable rank",
        "model.layers.0.mlp.up_proj",
    ] {
        assert!(page.contains(text), "{text}: {page}");
    }
}

/// A base beside itself: no gap that it has is one of the runs, and nothing is flagged.
#[test]
fn identical_models_are_told_apart_by_nothing() {
    let small = Small::with_weights();
    let base = || Folder::Model(small.path("base"));
    let report = audit(&small, Some((Against::Full, base())), &[("same".to_owned(), base())]);
    let (_, reference) = report.reference.as_ref().unwrap();
    for told in [&report.base, reference, &report.runs[0]] {
        assert_eq!((told.target.divergence, told.known.unwrap().divergence), (0.0, 0.0));
        assert_eq!((&told.gaps, told.toxicity), (&report.base.gaps, report.base.toxicity));
    }
    let balance = report.runs[0].balance.unwrap();
    assert_eq!((balance.adaptation, balance.retention, balance.harmonic), (0.0, 100.0, 0.0));
    assert!(report.runs[0].verdicts.len() >= 3, "{:?}", report.runs[0].verdicts);
    for (metric, verdict) in &report.runs[0].verdicts {
        assert_eq!(verdict.label, Label::NothingToRecover, "{metric}");
    }
    assert!(!report.is_flagged());
    assert!(report.changes.iter().all(|change| change.norm == 0.0));
}

/// What a component adds is the change that is looked at: of rank 4, and nothing is said to be mitigated beside it.
#[test]
fn the_largest_rank_stands_in_for_a_run_of_all_weights_and_is_called_so() {
    let small = Small::with_weights();
    let (large, _) = trained(&small, "large", "{method: lora, rank: 4, alpha: 16}", "60");
    let runs = [("itself".to_owned(), Folder::Adapter(large.clone()))];
    let report = audit(&small, Some((Against::LargestRank, Folder::Adapter(large))), &runs);
    assert_eq!(label(&report, 0, "target loss"), Label::AsLargestRank);
    for change in &report.changes {
        assert!((change.energy[2] - 1.0).abs() < 1e-6 && change.energy[1] < 1.0 - 1e-6, "{change:?}");
    }
    let alone = audit(&small, None, &runs);
    assert!(alone.runs[0].verdicts.iter().all(|(_, verdict)| verdict.label == Label::NoReference));
    for page in [report.markdown(), alone.markdown()] {
        assert!(page.contains("nothing is said to be mitigated") && !page.contains("| mitigated |"), "{page}");
    }
    assert!(alone.changes.is_empty());
}

fn drift(small: &Small, trained: Option<&Folder>, (slice, seen): (&str, &str), most: f64) -> drift::Report {
    let drift = Drift {
        base: &small.path("base"),
        trained,
        slice: small.path(slice),
        seen: small.path(seen),
        rows: None,
        max_length: 32,
        most,
        bootstrap: Bootstrap { resamples: 300, level: 0.95, seed: 1 },
    };
    drift.run().unwrap()
}

/// A model that has learned sums alone is at a loss with greetings, and not with sums; before it learned anything both were as hard.
#[test]
fn texts_of_another_kind_than_those_that_were_learned_have_drifted() {
    let small = Small::with_weights();
    let changes = [
        ("tune.from_scratch", "false"),
        ("tune.adapter", "{method: full}"),
        ("tune.steps", "60"),
        ("tune.schedule", "{method: constant}"),
        ("data.domains", "[{name: sums, source: ./sums.jsonl}]"),
    ];
    let (_, files) = small.finish(small.plan(&changes), 1);
    unpack(&files, "Result", &small.path("sums"));
    let trained = Folder::Model(small.path("sums"));
    let same = drift(&small, Some(&trained), ("sums.jsonl", "sums.jsonl"), 2.0);
    let answers = same.answers.as_ref().unwrap();
    assert_eq!((answers.label, answers.distance), (drift::Label::Within, 0.0), "{answers:?}");
    assert!((answers.ratio.unwrap().value - 1.0).abs() < 1e-12 && !same.is_drifted());
    // All of a plain text is learned.
    assert_eq!(same.inputs, None);
    let other = drift(&small, Some(&trained), ("sums.jsonl", "greetings.jsonl"), 2.0);
    let answers = other.answers.as_ref().unwrap();
    assert!(answers.label == drift::Label::Drifted && answers.distance > 0.9, "{answers:?}");
    assert!(other.is_drifted() && other.markdown().contains("| answers | 12, 7 |"), "{}", other.markdown());
    let before = drift(&small, None, ("sums.jsonl", "greetings.jsonl"), 2.0);
    assert!(!before.is_drifted(), "{before:?}");
}

/// What a prompt and its completion have in tokens, all but the first are either given or learned.
#[test]
fn inputs_are_the_tokens_that_are_not_learned() {
    let small = Small::with_weights();
    let whole: String = ["Ada", "Bob", "Cy", "Dee", "Eve", "Flo", "Gus"]
        .map(|name| format!("{{\"text\": \"Who? I am {name}.\"}}\n"))
        .concat();
    std::fs::write(small.path("whole.jsonl"), whole).unwrap();
    let parts = drift(&small, None, ("greetings.jsonl", "greetings.jsonl"), 1.5);
    let (inputs, answers) = (parts.inputs.unwrap(), parts.answers.unwrap());
    assert_eq!(inputs.tokens, [7 * 3; 2]);
    let whole = drift(&small, None, ("whole.jsonl", "whole.jsonl"), 1.5).answers.unwrap();
    assert_eq!(whole.tokens[0], inputs.tokens[0] + answers.tokens[0]);
    let sum = |of: &drift::Compared| of.perplexity[0].ln() * of.tokens[0] as f64;
    assert!((sum(&whole) - sum(&inputs) - sum(&answers)).abs() < 1e-3, "{}", sum(&whole));
}

fn asked(base: &Path, own: Option<&Folder>, other: Option<&Folder>) -> Vec<Answered> {
    let item = |prompt: &str| serde_json::from_value::<Item>(serde_json::json!({"prompt": prompt})).unwrap();
    let items = ["Who?", "3 and 4 make", "5 and"].map(item);
    let speakers = Speakers { base, own, other: Some(other), judge: Some(base), max_tokens: 8 };
    speakers.answer(&items, |_| {}).unwrap()
}

/// The judge's own words about it are of a model that knows nothing: which of two it prefers is chance, and still the same in both orders.
#[test]
fn who_answers_first_makes_no_difference_and_the_same_answers_are_even() {
    let small = Small::with_weights();
    let (full, _) = trained(&small, "full", "{method: full}", "60");
    let (base, full) = (small.path("base"), Folder::Model(full));
    let one = asked(&base, Some(&full), None);
    let other = asked(&base, None, Some(&full));
    assert_eq!(one.len(), 3);
    assert!(one.iter().any(|answered| Some(&answered.own) != answered.other.as_ref()), "{one:?}");
    for (one, other) in one.iter().zip(&other) {
        assert_eq!((Some(&one.own), &one.other), (other.other.as_ref(), &Some(other.own.clone())));
        let ([a, b], [c, d]) = (one.judged.unwrap(), other.judged.unwrap());
        assert!((a + d - 1.0).abs() < 1e-9 && (b + c - 1.0).abs() < 1e-9, "{one:?} {other:?}");
        assert!((0.0..=1.0).contains(&a) && (0.0..=1.0).contains(&b));
    }
    for same in asked(&base, None, None) {
        let [first, second] = same.judged.unwrap();
        assert!((first + second - 1.0).abs() < 1e-9 && verdict([first, second]) == Verdict::Tie, "{same:?}");
    }
}
