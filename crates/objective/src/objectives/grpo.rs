//! Group-relative policy optimisation and its relatives: the model answers each prompt several times, and what was better than
//! the group's mean becomes likelier; rules judge the answers, no model of values is trained.
//!
//! # Update
//! ```text
//! A_i = (R_i - mean R) / (std R + 1e-4)         mean over the prompt's group; std over the group or the step, or not divided
//! ρ_t = exp(log π(y_t) - log π_made(y_t))       `importance: sequence` takes exp of the mean over the answer for each token
//! grpo, dapo, dr_grpo, luspo    l_t = -min(min(ρ_t, δ) A, clip(ρ_t, 1-ε, 1+ε') A)
//! cispo   l_t = -sg(min(ρ_t, ε')) A log π(y_t)
//! sapo    l_t = -(4/τ) σ(τ(ρ_t - 1)) A          τ of the sign of A
//! vespo   l_t = -sg(e^λ W^k e^(-λW)) A log π(y_t),   W = exp(Σ_t log π(y_t) - log π_made(y_t));  k, λ of the sign of A
//! l_t += β ρ_t (e^d - d - 1),                   d = log π_ref(y_t) - log π(y_t); without ρ_t if not `unbiased_kl`
//! L = Σ_t l_t / N                    N tokens of the step:  dapo, cispo, vespo
//!   = mean over answers of (1/n) Σ_t l_t        grpo, sapo;  of (1/max_tokens) Σ_t l_t: dr_grpo;  of Σ_t l_t: luspo
//! ```
//!
//! # Symbols
//! `R` the weighted rewards of an answer (`tune.rewards`), `y_t` its `n` tokens with the one that ended it, `π_made` the model
//! that made it, `π_ref` the model without the slots that train; `sg` lets no gradient through. `loss` names one of them,
//! `epsilon` ε, `epsilon_high` ε', `delta` δ, `beta` β.
//!
//! # Cost
//! `generations` answers to each prompt, token by token, before each batch; two sweeps of the head, one forward pass of the
//! reference if β > 0, and one over all micro-batches if `scale` is `batch`.
//!
//! # Limits
//! With one update a batch ρ = 1, and grpo's gradient is REINFORCE's with the group's advantage. Where all of a group's rewards
//! are alike, A = 0 and nothing is learned of it. An answer that nothing can judge has A = 0 and no part in means.
//!
//! # Departures
//! TRL's `bnpo` is not here: it divides by the tokens of a micro-batch, which would make bits depend on how a batch is cut. No
//! weighting by entropy, no bonus of entropy, no mask of stale answers, no correction of a sampler's log-probabilities: answers
//! are made by the model that trains. Log-probabilities are at temperature 1 whatever `temperature` answers are sampled at.
//!
//! # Paper
//! DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models. Shao et al., 2024; the names of the others
//! are TRL's.

use std::ops::Range;

use attune_points::layout::{Axis, Column, MADE, REWARD, Values};
use attune_points::objective::{Answers, Denominator, Level, Needs, Objective, ScopeLoss, ScopeView};
use attune_points::{Error, Result};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Method, Paper, Point, Rule};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Keeps an advantage finite where all rewards are alike; as in TRL.
const ALIKE: f64 = 1e-4;

/// The largest ratio of `cispo` where none is given: what TRL's documentation recommends.
const CISPO_HIGH: f64 = 5.0;

/// Ratios of whole answers are taken within these logarithms.
const LOG_RATIO: (f64, f64) = (-18.420_680_743_952_367, 20.0);

/// What is made of advantages and ratios.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Loss {
    /// Every token of the step counts the same: long answers more than short ones.
    #[default]
    Dapo,
    /// Every answer counts the same.
    Grpo,
    /// Answers are divided by the longest that they can be, so that length is not rewarded; with `scale: none`.
    DrGrpo,
    /// Ratios are cut, gradients are not.
    Cispo,
    /// Ratios are bent instead of cut.
    Sapo,
    /// Answers weigh as much as they are long; with `importance: sequence`.
    Luspo,
    /// A smooth weight of the ratio of the whole answer.
    Vespo,
}

/// What a ratio is of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Importance {
    /// Each token.
    #[default]
    Token,
    /// The whole answer, by its tokens: GSPO.
    Sequence,
}

/// What advantages are divided by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Scale {
    /// The deviation of the group's rewards.
    #[default]
    Group,
    /// The deviation of all rewards of the step.
    Batch,
    /// Nothing.
    None,
}

/// Parameters of the objective.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Answers to each prompt.
    #[schemars(range(min = 2, max = 1024))]
    generations: u16,
    /// The most tokens of an answer.
    #[schemars(range(min = 1, max = 1_048_576))]
    max_tokens: u32,
    /// How answers are sampled: larger values flatten the distribution.
    #[schemars(range(min = 0.01, max = 100.0))]
    temperature: f64,
    /// Answers are sampled from the likeliest tokens that make up this share of the probability.
    #[schemars(range(min = 0.01, max = 1.0))]
    top_p: f64,
    /// What is made of advantages and ratios.
    loss: Loss,
    /// What a ratio is of.
    importance: Importance,
    /// What advantages are divided by.
    scale: Scale,
    /// How far below 1 a ratio counts.
    #[schemars(range(min = 0.0, max = 1.0))]
    epsilon: f64,
    /// How far above 1 a ratio counts; `epsilon` if it is left out. For `cispo` the largest ratio itself, 5 if it is left out.
    #[schemars(range(min = 0.0, max = 1000.0))]
    epsilon_high: Option<f64>,
    /// The largest ratio of an answer that was worse than the mean; none if it is left out.
    #[schemars(range(min = 1.0, max = 1000.0))]
    delta: Option<f64>,
    /// How strongly the model is held to what it said before training.
    #[schemars(range(min = 0.0, max = 1000.0))]
    beta: f64,
    /// Whether the divergence is weighed by the ratio, so that its gradient is that of the reverse divergence.
    unbiased_kl: bool,
    /// `sapo`'s τ for answers that were better than the mean, and for the others.
    #[schemars(inner(range(min = 0.01, max = 100.0)))]
    sapo_temperatures: [f64; 2],
    /// `vespo`'s k for answers that were no worse than the mean, and for the others.
    #[schemars(inner(range(min = 0.0, max = 100.0)))]
    vespo_k: [f64; 2],
    /// `vespo`'s λ, likewise.
    #[schemars(inner(range(min = 1e-4, max = 100.0)))]
    vespo_lambda: [f64; 2],
    /// Answers that reached `max_tokens` teach nothing.
    mask_truncated: bool,
}

impl Default for Config {
    /// TRL's.
    fn default() -> Self {
        Self {
            generations: 8,
            max_tokens: 256,
            temperature: 1.0,
            top_p: 1.0,
            loss: Loss::Dapo,
            importance: Importance::Token,
            scale: Scale::Group,
            epsilon: 0.2,
            epsilon_high: None,
            delta: None,
            beta: 0.0,
            unbiased_kl: true,
            sapo_temperatures: [1.0, 1.05],
            vespo_k: [2.0, 3.0],
            vespo_lambda: [3.0, 2.0],
            mask_truncated: false,
        }
    }
}

pub(super) struct Grpo {
    config: Config,
}

impl Method for Grpo {
    const CARD: Card = Card {
        paper: Some(Paper {
            title: "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
            authors: "Zhihong Shao, Peiyi Wang, Qihao Zhu, Runxin Xu, Junxiao Song, Xiao Bi and others",
            year: 2024,
        }),
        answers: "generations",
        answer_tokens: "max_tokens",
        rules: &[
            Rule {
                when: "loss == \"luspo\"",
                require: "importance == \"sequence\"",
                message: "is token, but `loss: luspo` weighs whole answers; expected sequence",
                path: "importance",
            },
            Rule {
                when: "loss == \"dr_grpo\"",
                require: "scale == \"none\"",
                message: "divides advantages, but `loss: dr_grpo` takes them as they are; expected none",
                path: "scale",
            },
        ],
        ..Card::new(
            "grpo",
            Point::Objective,
            "Group-relative policy optimisation and its relatives: the model answers each prompt several times, and what was \
             better than the group's mean becomes likelier; rules judge the answers, no model of values is trained.",
        )
    };
    type Config = Config;
    type Object = dyn Objective;

    fn build(config: Config, _: &BuildCx<'_>) -> std::result::Result<Box<dyn Objective>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

/// An answer: which of a scope's rows it has, and how much better it is than its group's mean.
struct Judged {
    rows: Range<usize>,
    advantage: f64,
}

/// The mean and the deviation of what is a number; the deviation of fewer than two is 0.
fn spread(rewards: &[f64]) -> (f64, f64) {
    let known = || rewards.iter().copied().filter(|reward| !reward.is_nan());
    let n = known().count() as f64;
    let mean = known().sum::<f64>() / n.max(1.0);
    let variance = known().map(|reward| (reward - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    (mean, variance.sqrt())
}

/// A column of numbers of a layout.
fn column<'l>(scope: &'l ScopeView<'_>, name: &str, axis: Axis) -> Option<&'l [f64]> {
    match scope.layout.column(name) {
        Some(Column { axis: found, values: Values::F64(values) }) if *found == axis => Some(values),
        _ => None,
    }
}

impl Config {
    /// The answers of a scope, group by group.
    fn judged(&self, scope: &ScopeView<'_>) -> Result<Vec<Judged>> {
        let rewards = column(scope, REWARD, Axis::Doc)
            .ok_or_else(|| Error::Refused(format!("a batch lacks the column {REWARD:?} of its documents")))?;
        let (_, of_all) = spread(&rewards[scope.docs.clone()]);
        let mut judged = Vec::with_capacity(scope.docs.len());
        for group in scope.layout.docs()[scope.docs.clone()].chunk_by(|a, b| a.group == b.group) {
            let docs = scope.docs.start + judged.len()..scope.docs.start + judged.len() + group.len();
            let (mean, of_group) = spread(&rewards[docs.clone()]);
            let divisor = match self.scale {
                Scale::Group => of_group + ALIKE,
                Scale::Batch => of_all + ALIKE,
                Scale::None => 1.0,
            };
            judged.extend(docs.map(|doc| {
                let advantage = (rewards[doc] - mean) / divisor;
                let advantage = if advantage.is_nan() { 0.0 } else { advantage };
                Judged { rows: scope.rows_of(doc), advantage }
            }));
        }
        Ok(judged)
    }

    /// `l_t` by a token's ratio and log-probability, and its derivatives by both.
    fn token(&self, advantage: f64, ratio: f64, logp: f64, whole: f64) -> (f64, f64, f64) {
        let high = self.epsilon_high.unwrap_or(if self.loss == Loss::Cispo { CISPO_HIGH } else { self.epsilon });
        let side = |of: [f64; 2], is_good: bool| of[usize::from(!is_good)];
        match self.loss {
            Loss::Grpo | Loss::Dapo | Loss::DrGrpo | Loss::Luspo => {
                let capped = self.delta.map_or(ratio, |delta| ratio.min(delta));
                let clipped = ratio.clamp(1.0 - self.epsilon, 1.0 + high);
                if capped * advantage <= clipped * advantage {
                    let moves = self.delta.is_none_or(|delta| ratio <= delta);
                    (-capped * advantage, if moves { -advantage } else { 0.0 }, 0.0)
                } else {
                    // Where the clipped branch is the smaller one the ratio lies outside, or δ cut the other.
                    let moves = clipped == ratio;
                    (-clipped * advantage, if moves { -advantage } else { 0.0 }, 0.0)
                }
            }
            Loss::Cispo => {
                let weight = -ratio.min(high) * advantage;
                (weight * logp, 0.0, weight)
            }
            Loss::Sapo => {
                let tau = side(self.sapo_temperatures, advantage > 0.0);
                let sigmoid = 1.0 / (1.0 + (-tau * (ratio - 1.0)).exp());
                (-4.0 / tau * sigmoid * advantage, -4.0 * sigmoid * (1.0 - sigmoid) * advantage, 0.0)
            }
            Loss::Vespo => {
                let log_whole = whole.clamp(LOG_RATIO.0, LOG_RATIO.1);
                let (k, lambda) = (side(self.vespo_k, advantage >= 0.0), side(self.vespo_lambda, advantage >= 0.0));
                let weight = -(lambda + k * log_whole - lambda * log_whole.exp()).exp() * advantage;
                (weight * logp, 0.0, weight)
            }
        }
    }

    /// What a token of an answer of `n` counts.
    fn share(&self, n: usize) -> f64 {
        match self.loss {
            Loss::Dapo | Loss::Cispo | Loss::Vespo | Loss::Luspo => 1.0,
            Loss::Grpo | Loss::Sapo => 1.0 / n as f64,
            Loss::DrGrpo => 1.0 / f64::from(self.max_tokens),
        }
    }
}

impl Objective for Grpo {
    fn level(&self) -> Level {
        if self.config.scale == Scale::Batch { Level::Step } else { Level::Group }
    }

    fn needs(&self) -> Needs {
        let Config { generations, max_tokens, temperature, top_p, mask_truncated, beta, .. } = self.config;
        let answers = Answers { each: generations, max_tokens, temperature, top_p, finished_only: mask_truncated };
        Needs { reference: beta > 0.0, answers: Some(answers), ..Needs::default() }
    }

    fn denominator(&self) -> Denominator {
        match self.config.loss {
            Loss::Dapo | Loss::Cispo | Loss::Vespo => Denominator::Tokens,
            Loss::Grpo | Loss::Sapo | Loss::DrGrpo | Loss::Luspo => Denominator::Documents,
        }
    }

    fn scope(&self, scope: &ScopeView<'_>) -> Result<ScopeLoss> {
        let config = &self.config;
        let made = column(scope, MADE, Axis::Row);
        let (mut loss, mut kl, mut cut) = (0.0, 0.0, 0.0);
        let mut dlogp_t = vec![0.0; scope.logp_t.len()];
        for Judged { rows, advantage } in config.judged(scope)?.into_iter().filter(|judged| !judged.rows.is_empty()) {
            let logp_t = &scope.logp_t[rows.clone()];
            // What was made by these very parameters has a ratio of 1, whose gradient is not nothing.
            let log_ratio_t: Vec<f64> = match made {
                None => vec![0.0; rows.len()],
                Some(made) => {
                    let made = scope.rows[rows.clone()].iter().map(|row| made[row.row as usize]);
                    logp_t.iter().zip(made).map(|(logp, made)| logp - made).collect()
                }
            };
            let n = rows.len();
            let mean = log_ratio_t.iter().sum::<f64>() / n as f64;
            let whole = log_ratio_t.iter().map(|ratio| ratio.clamp(-20.0, 20.0)).sum();
            let (share, counted) =
                (config.share(n), if self.denominator() == Denominator::Tokens { 1.0 } else { 1.0 / n as f64 });
            // The derivative by the mean of an answer's log-ratios is spread over its tokens.
            let mut by_mean = 0.0;
            for ((at, &logp), &log_ratio) in rows.clone().zip(logp_t).zip(&log_ratio_t) {
                let of_sequence = config.importance == Importance::Sequence;
                let ratio = if of_sequence { mean } else { log_ratio }.exp();
                let (value, by_ratio, by_logp) = config.token(advantage, ratio, logp, whole);
                loss += share * value;
                dlogp_t[at] += share * by_logp;
                if of_sequence {
                    by_mean += share * by_ratio * ratio;
                } else {
                    dlogp_t[at] += share * by_ratio * ratio;
                }
                if advantage != 0.0 && by_ratio == 0.0 && by_logp == 0.0 {
                    cut += counted;
                }
                if let Some(reference) = scope.reference_t.get(at) {
                    let d = reference - logp;
                    let (divergence, beta) = (d.exp() - d - 1.0, share * config.beta);
                    let weight = if config.unbiased_kl { ratio } else { 1.0 };
                    loss += beta * weight * divergence;
                    dlogp_t[at] += beta * weight * (1.0 - d.exp());
                    if config.unbiased_kl {
                        *if of_sequence { &mut by_mean } else { &mut dlogp_t[at] } += beta * ratio * divergence;
                    }
                    kl += counted * divergence;
                }
            }
            dlogp_t[rows].iter_mut().for_each(|dlogp| *dlogp += by_mean / n as f64);
        }
        let mut beside = vec![("clipped", cut)];
        if config.beta > 0.0 {
            beside.push(("kl", kl));
        }
        Ok(ScopeLoss { loss, dlogp_t, beside })
    }
}

#[cfg(test)]
mod tests {
    use attune_points::Layout;
    use attune_points::layout::{NO_LABEL, Row, Source};
    use serde_json::Value;

    use super::*;

    const ALL: [Loss; 7] = [Loss::Dapo, Loss::Grpo, Loss::DrGrpo, Loss::Cispo, Loss::Sapo, Loss::Luspo, Loss::Vespo];

    /// Groups of answers with these numbers of tokens, their rewards, and what made them.
    fn layout(lengths: &[usize], each: usize, rewards: &[f64], made: Option<&[f64]>) -> Layout {
        let mut layout = Layout::new();
        for (at, n) in lengths.iter().enumerate() {
            // Two tokens of a prompt.
            let rows = (0..=*n as u32 + 1)
                .map(|row| (Row::Token(row), if row == 0 || row > *n as u32 { NO_LABEL } else { row }));
            let source = Source { group: Some((at / each) as u32), ..Source::default() };
            layout.push(source, rows.collect::<Vec<_>>());
        }
        let values = Values::F64(rewards.to_vec());
        layout.set_column(REWARD, Column { axis: Axis::Doc, values }).unwrap();
        if let Some(made) = made {
            let mut values = vec![0.0; layout.n_rows()];
            layout.supervised().iter().zip(made).for_each(|(row, logp)| values[row.row as usize] = *logp);
            layout.set_column(MADE, Column { axis: Axis::Row, values: Values::F64(values) }).unwrap();
        }
        layout
    }

    /// The loss of a step and its gradient, divided as the engine does.
    fn step(config: &Config, layout: &Layout, logp_t: &[f64], reference_t: &[f64]) -> (f64, Vec<f64>) {
        let objective = Grpo { config: config.clone() };
        let rows = layout.supervised();
        let scale = 1.0 / objective.denominator().of(layout.counts());
        let docs = layout.docs();
        let scopes: Vec<Range<usize>> = if objective.level() == Level::Step {
            std::iter::once(0..docs.len()).collect()
        } else {
            let ends = docs.chunk_by(|a, b| a.group == b.group).scan(0, |end, group| {
                *end += group.len();
                Some(*end - group.len()..*end)
            });
            ends.collect()
        };
        let (mut loss, mut gradient) = (0.0, Vec::new());
        for scope in scopes {
            let at = |row: u32| rows.partition_point(|supervised| supervised.row < row);
            let own = at(docs[scope.start].rows.start)..at(docs[scope.end - 1].rows.end);
            let view = ScopeView {
                layout,
                docs: scope,
                rows: &rows[own.clone()],
                logp_t: &logp_t[own.clone()],
                reference_t: reference_t.get(own).unwrap_or_default(),
            };
            let found = objective.scope(&view).unwrap();
            loss += found.loss * scale;
            gradient.extend(found.dlogp_t.iter().map(|dlogp| dlogp * scale));
        }
        (loss, gradient)
    }

    fn numbers(value: &Value) -> Vec<f64> {
        value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap_or(f64::NAN)).collect()
    }

    /// `golden/grpo.py` with TRL 1.16.0.
    #[test]
    fn losses_and_gradients_are_those_of_trl() {
        let golden: Value = serde_json::from_str(include_str!("../../golden/grpo.json")).unwrap();
        let lengths: Vec<usize> = numbers(&golden["lengths"]).into_iter().map(|n| n as usize).collect();
        let [rewards, logp, made, reference] =
            ["rewards", "logp", "made", "reference"].map(|name| numbers(&golden[name]));
        let cases = golden["cases"].as_object().unwrap();
        assert_eq!(cases.len(), 14);
        for (name, case) in cases {
            let mut written = case["config"].clone();
            written["max_tokens"] = golden["max_tokens"].clone();
            let config: Config = serde_json::from_value(written).unwrap();
            let made = (case["first"] == Value::Bool(false)).then_some(made.as_slice());
            let layout = layout(&lengths, 3, &rewards, made);
            let reference = if config.beta > 0.0 { reference.as_slice() } else { &[] };
            let (loss, gradient) = step(&config, &layout, &logp, reference);
            assert!((loss - case["loss"].as_f64().unwrap()).abs() < 1e-9, "{name}: {loss}");
            for (found, expected) in gradient.iter().zip(numbers(&case["gradient"])) {
                assert!((found - expected).abs() < 1e-9, "{name}: {found} against {expected}");
            }
        }
    }

    const LENGTHS: [usize; 4] = [2, 3, 1, 2];
    const LOGP: [f64; 8] = [-1.0, -0.4, -2.0, -0.7, -1.3, -0.9, -0.2, -1.8];

    /// With one update a batch the gradient is that of `-A log π`, REINFORCE with the group's advantage, for every loss.
    #[test]
    fn the_first_update_is_reinforce() {
        let rewards = [1.0, 0.0, 0.0, 3.0];
        let layout = layout(&LENGTHS, 4, &rewards, None);
        let (mean, deviation) = (1.0, 2f64.sqrt());
        for loss in ALL {
            let config = Config { loss, max_tokens: 10, ..Config::default() };
            let (_, gradient) = step(&config, &layout, &LOGP, &[]);
            let mut at = 0;
            for (n, reward) in LENGTHS.into_iter().zip(rewards) {
                let advantage = (reward - mean) / (deviation + ALIKE);
                let share = match loss {
                    Loss::Grpo | Loss::Sapo => 0.25 / n as f64,
                    Loss::DrGrpo => 0.25 / 10.0,
                    Loss::Luspo => 0.25,
                    Loss::Dapo | Loss::Cispo | Loss::Vespo => 1.0 / 8.0,
                };
                for found in &gradient[at..at + n] {
                    assert!((found + share * advantage).abs() < 1e-12, "{loss:?}: {found}");
                }
                at += n;
            }
        }
    }

    #[test]
    fn rewards_that_are_all_alike_or_unknown_teach_nothing() {
        for rewards in [[0.3; 4], [f64::NAN; 4], [f64::NAN, 0.3, f64::NAN, 0.3], [f64::NAN, f64::NAN, 0.3, f64::NAN]] {
            for scale in [Scale::Group, Scale::Batch, Scale::None] {
                let config = Config { scale, ..Config::default() };
                let (loss, gradient) = step(&config, &layout(&LENGTHS, 4, &rewards, None), &LOGP, &[]);
                assert_eq!((loss, gradient), (0.0, vec![0.0; 8]), "{rewards:?}, {scale:?}");
            }
        }
    }

    /// Two answers of one and of three tokens, A = ±1/sqrt(2) each before the 1e-4, all ratios 1.
    #[test]
    fn answers_of_unequal_length_count_as_the_loss_says() {
        let layout = layout(&[1, 3], 2, &[1.0, 0.0], None);
        let a = 0.5 / (0.5f64.sqrt() + ALIKE);
        for (loss, expected) in [
            (Loss::Grpo, 0.0),
            (Loss::Dapo, (-a + 3.0 * a) / 4.0),
            (Loss::DrGrpo, (-a + 3.0 * a) / (2.0 * 5.0)),
            (Loss::Luspo, (-a + 3.0 * a) / 2.0),
        ] {
            let config = Config { loss, max_tokens: 5, ..Config::default() };
            let (found, _) = step(&config, &layout, &[-1.0; 4], &[]);
            assert!((found - expected).abs() < 1e-12, "{loss:?}: {found} against {expected}");
        }
    }

    #[test]
    fn the_divergence_from_the_reference_is_nothing_there_and_positive_elsewhere() {
        let layout = layout(&LENGTHS, 4, &[0.0; 4], None);
        let config = Config { beta: 1.0, ..Config::default() };
        let (loss, gradient) = step(&config, &layout, &LOGP, &LOGP);
        assert_eq!((loss, gradient), (0.0, vec![0.0; 8]));
        for reference in [-0.1, -0.9, -5.0] {
            assert!(step(&config, &layout, &LOGP, &[reference; 8]).0 > 0.0);
        }
    }

    /// Of every loss, away from the places where it bends.
    #[test]
    fn gradients_agree_with_central_differences() {
        let made: Vec<f64> = LOGP.iter().enumerate().map(|(at, logp)| logp + 0.3 * ((at * at) as f64).sin()).collect();
        let reference = [-1.1; 8];
        let layout = layout(&LENGTHS, 2, &[1.0, -0.5, 0.2, 0.9], Some(&made));
        for loss in ALL {
            for importance in [Importance::Token, Importance::Sequence] {
                let unbiased_kl = loss != Loss::Grpo;
                let config =
                    Config { loss, importance, beta: 0.3, unbiased_kl, delta: Some(1.15), ..Config::default() };
                // What lets no gradient through has a value whose differences say nothing: its weight times log π is compared.
                if matches!(loss, Loss::Cispo | Loss::Vespo) {
                    continue;
                }
                let (_, gradient) = step(&config, &layout, &LOGP, &reference);
                for at in 0..LOGP.len() {
                    let moved = |by: f64| {
                        let mut logp = LOGP;
                        logp[at] += by;
                        step(&config, &layout, &logp, &reference).0
                    };
                    let numeric = (moved(1e-6) - moved(-1e-6)) / 2e-6;
                    assert!(
                        (numeric - gradient[at]).abs() < 1e-8,
                        "{loss:?}, {importance:?}: {numeric}, {}",
                        gradient[at]
                    );
                }
            }
        }
    }

    /// Rows are packed by what the card says of answers, and these are given as the objective says.
    #[test]
    fn its_card_says_what_it_needs() {
        let config = Config { generations: 5, max_tokens: 33, ..Config::default() };
        let params = serde_json::to_value(&config).unwrap().as_object().unwrap().clone();
        let number = |text| attune_spec::method::expression::number(text, &params).unwrap();
        let needs = Grpo { config }.needs().answers.unwrap();
        assert_eq!(number(Grpo::CARD.answers), f64::from(needs.each));
        assert_eq!(number(Grpo::CARD.answer_tokens), f64::from(needs.max_tokens));
    }

    #[test]
    fn a_batch_without_rewards_is_refused() {
        let mut layout = Layout::new();
        layout.push(Source::default(), [(Row::Token(0), 1), (Row::Token(1), NO_LABEL)]);
        let rows = layout.supervised();
        let view = ScopeView { layout: &layout, docs: 0..1, rows: &rows, logp_t: &[-1.0], reference_t: &[] };
        let error = Grpo { config: Config::default() }.scope(&view).unwrap_err();
        assert_eq!(error.to_string(), "a batch lacks the column \"reward\" of its documents");
    }
}
