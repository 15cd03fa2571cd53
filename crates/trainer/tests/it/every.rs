//! Every adapter in a whole job: on a base in f32, where it may take part as another weight, and in bf16, where what stands on rows stays
//! there; with packed batches that accumulate, and all of its validation set measured.

use std::collections::BTreeSet;

use attune_adapt::ADAPTERS;
use attune_spec::id::Step;
use attune_trainer::run::{End, run};

use crate::bits::{KINDS, checkpoint};
use crate::support::{Outside, Small, files, metric};

/// The adapters that have no job of their own among [`KINDS`], at the size of the small base.
pub(crate) const FURTHER: &[&str] = &[
    "{method: abba, rank_1: 2, rank_2: 3}",
    "{method: beft}",
    "{method: boft, block_size: 4}",
    "{method: bone, rank: 4}",
    "{method: c3a, block_size: 4}",
    "{method: capaboost, rank: 2}",
    "{method: chain-of-lora, rank: 2, links: 3}",
    "{method: clover, block: 4}",
    "{method: clover, block: 4, pairs: true, targets: [q_proj, k_proj, v_proj, o_proj]}",
    "{method: deft, rank: 3}",
    "{method: delora, rank: 2}",
    "{method: dsee, rank: 2, entries: 20}",
    "{method: dsee, rank: 2, entries: 20, prune: 0.5, prunes_at: 0.4, mask_delta: true}",
    "{method: dsee, rank: 2, entries: 20, prune_heads: 0.5, prune_neurons: 0.25, prunes_at: 0.4}",
    "{method: elastic-lora, rank: 4, step: 1, smallest: 1, alpha: 4}",
    "{method: elastic-lora, rank: 4, step: 1, smallest: 1, alpha: 4, sparsity: 0.5, examples: 4, narrowest: 0.5}",
    "{method: flora-tucker, rank_in: 2, rank_out: 3}",
    "{method: fourierft, frequencies: 50}",
    "{method: gralora, rank: 4, hybrid: 2, alpha: 6}",
    "{method: hira, rank: 2}",
    "{method: hra, rank: 2}",
    "{method: kasa, rank: 3, alpha: 6}",
    "{method: lily, rank: 4, stride: 2}",
    "{method: loha, rank: 2}",
    "{method: lokr, rank: 2}",
    "{method: loldu, rank: 5}",
    "{method: lorma, rank: 2}",
    "{method: modules-to-save, targets: [down_proj, norm]}",
    "{method: mora, rank: 2}",
    "{method: mora, rank: 2, form: share, every: 2}",
    "{method: multitask-prompt-tuning, length: 3, rank: 2}",
    "{method: nora, rank: 6, inner_rank: 2, alpha: 4}",
    "{method: nora, rank: 6, inner_rank: 2, alpha: 4, inputs: true, examples: 4, reconstruct: true}",
    "{method: oft, block_size: 4}",
    "{method: osf}",
    "{method: peanut, rank: 5, depth: 1}",
    "{method: poet, block_size: 4, every: 2}",
    "{method: psoft, rank: 4}",
    "{method: pvera, rank: 6}",
    "{method: randlora, rank: 7, alpha: 7}",
    "{method: road, group_size: 4}",
    "{method: roselora, rank: 4, keep: 0.1, ends: 0.5}",
    "{method: selective-lora, rank: 2, score_lr: 1, before: 0.5}",
    "{method: sltrain, rank: 2}",
    "{method: spectral-ft, rank: 6, inner_rank: 2}",
    "{method: supertuning}",
    "{method: svft}",
    "{method: taps}",
    "{method: tinylora, rank: 3, numbers: 5}",
    "{method: unilora, rank: 3, numbers: 50}",
    "{method: vblora, rank: 3, vectors: 7, length: 4}",
    "{method: waveft, frequencies: 50}",
];

/// Adapters that blend others, which are made first: `adapters_that_were_trained_one_by_one_are_mixed`.
pub(crate) const BLENDS: [&str; 3] = ["adapterfusion", "arrow", "xlora"];

pub(crate) fn named(text: &str) -> impl Iterator<Item = &str> {
    let ends = |c: char| !(c.is_ascii_alphanumeric() || c == '-');
    text.split("method: ").skip(1).filter_map(move |rest| rest.split(ends).next())
}

#[test]
fn every_adapter_has_a_job() {
    let of_kinds = KINDS.iter().flat_map(|(_, changes)| changes.iter()).flat_map(|(_, text)| named(text));
    let tried: BTreeSet<&str> = of_kinds.chain(FURTHER.iter().flat_map(|text| named(text))).chain(BLENDS).collect();
    let left: Vec<&str> = ADAPTERS.cards().map(|card| card.name).filter(|name| !tried.contains(name)).collect();
    assert_eq!(left, [""; 0]);
}

/// Whole on one rank, and stopped in the middle and ended on two: the same bytes.
fn same_bytes(of: &[&str], precision: &str) {
    let small = Small::with_weights();
    for adapter in of {
        let prompts = ["-prompt", "prompt-"].iter().any(|part| adapter.contains(part));
        let plan = small.plan(&[
            ("tune.from_scratch", "false"),
            ("tune.precision", precision),
            ("tune.adapter", adapter),
            ("tune.accumulation", "2"),
            ("tune.batch_tokens", if prompts { "256" } else { "128" }),
            ("tune.steps", "6"),
            ("tune.evaluate.every_steps", "3"),
        ]);
        let (events, whole) = small.finish(plan.clone(), 1);
        let losses = metric(&events, "train/loss");
        assert!(losses.len() == 6 && losses.iter().all(|loss| loss.is_finite()), "{adapter}: {losses:?}");
        let measured = metric(&events, "eval/sums/loss");
        assert!(measured.len() == 3 && measured[0] != measured[2], "{adapter} changes nothing: {measured:?}");
        let (request, _work) = small.request(plan.clone(), 2, None);
        let outside = Outside::stopping_after(3);
        assert_eq!(run(&request, &outside).unwrap(), End::Stopped(Step(3)), "{adapter}");
        let checkpoint = checkpoint(&outside);
        let (request, _work) = small.request(plan, 2, Some(&checkpoint));
        let outside = Outside::default();
        run(&request, &outside).unwrap();
        assert_eq!(files(&outside.events.into_inner().unwrap()), whole, "{adapter}");
    }
}

/// One of two halves, so that they run side by side.
fn half(second: bool) -> &'static [&'static str] {
    let (one, two) = FURTHER.split_at(FURTHER.len() / 2);
    if second { two } else { one }
}

#[test]
fn adapters_on_bf16_have_the_same_bytes_resumed_and_on_ranks() {
    same_bytes(half(false), "bf16");
}

#[test]
fn further_adapters_on_bf16_have_the_same_bytes_resumed_and_on_ranks() {
    same_bytes(half(true), "bf16");
}

#[test]
fn adapters_on_f32_have_the_same_bytes_resumed_and_on_ranks() {
    same_bytes(half(false), "f32");
}

#[test]
fn further_adapters_on_f32_have_the_same_bytes_resumed_and_on_ranks() {
    same_bytes(half(true), "f32");
}
