//! Direct preference optimisation and its relatives: the better of two answers is made likelier than the other, measured
//! against what the model said before training; no reward model, no sampling.
//!
//! # Update
//! ```text
//! r_y  = log π(y) - log π_ref(y)         sums over the answer's tokens
//! s_y  = r_y  |  -e^-r_y  |  log σ(r_y)  |  e^((α-1) r_y) / (α-1)              by `divergence`, α = 1/2
//! Δ    = s_w - s_l                       w the chosen answer, l the rejected one, n their tokens, q = σ(βΔ)
//! sigmoid       -(1-ε) log σ(βΔ) - ε log σ(-βΔ)
//! robust        (-(1-ε) log σ(βΔ) + ε log σ(-βΔ)) / (1-2ε)
//! hinge         max(0, 1 - βΔ)
//! ipo           (s_w/n_w - s_l/n_l - 1/(2β))²
//! exo_pair      q (log q - log(1-ε)) + (1-q) (log(1-q) - log ε)
//! nca_pair      -log σ(βs_w) - ½ log σ(-βs_w) - ½ log σ(-βs_l)
//! bco_pair      -log σ(βs_w) - log σ(-βs_l)
//! sppo_hard     (s_w - 1/(2β))² + (s_l + 1/(2β))²
//! apo_zero      1 - σ(βs_w) + σ(βs_l)
//! apo_down      σ(βs_w) + 1 - σ(βΔ)
//! discopop      (1-m) (-log σ(βΔ)) + m e^-βΔ,   m = σ(βΔ/τ), τ = 1/20
//! sigmoid_norm  -log σ(β(s_w/n_w - s_l/n_l))
//! aot           as sigmoid, of Δ_k = u_(k) - v_(k): u = log π(w) - log π(l) and v, the same of π_ref, each sorted over the step
//! aot_unpaired  as sigmoid, of Δ_k = r_w,(k) - r_l,(k), each sorted over the step
//! L = mean over pairs + sft · -(1/n_w) log π(w)
//! ```
//!
//! # Symbols
//! `loss` names one of them, `beta` β, `label_smoothing` ε. The reference is the model without the slots that train.
//!
//! # Cost
//! Two sweeps of the head, and a forward pass of the reference for each batch; `aot` and `aot_unpaired` one more forward pass.
//! Two documents a pair.
//!
//! # Limits
//! Before training Δ = 0: sigmoid is log 2, hinge 1, ipo 1/(4β²), apo_zero 1, bco_pair 2 log 2.
//!
//! # Departures
//! WPO's weights, length desensitising and a reference that follows are not here. `aot` and `aot_unpaired` take log-ratios as they
//! are, whatever the divergence, and sort over the whole step. A slot that goes on from an adapter is measured against the base, not against that adapter.
//!
//! # Paper
//! Direct Preference Optimization: Your Language Model is Secretly a Reward Model. Rafailov et al., 2023; the names of the
//! others are TRL's.

use attune_points::layout::View;
use attune_points::objective::{Denominator, Level, Needs, Objective, ScopeLoss, ScopeView};
use attune_points::{Error, Result};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Method, Paper, Point, Rule};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A loss of a pair.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Loss {
    /// DPO, with label smoothing cDPO.
    #[default]
    Sigmoid,
    /// Unbiased under labels that are wrong with probability `label_smoothing`.
    Robust,
    /// A margin, as in SLiC.
    Hinge,
    /// A square, by tokens.
    Ipo,
    /// The reverse divergence of preferences.
    ExoPair,
    /// Noise-contrastive alignment.
    NcaPair,
    /// Two classes.
    BcoPair,
    /// Self-play with hard labels.
    SppoHard,
    /// Anchored: chosen answers up, rejected ones down.
    ApoZero,
    /// Anchored: both down, rejected ones more.
    ApoDown,
    /// A blend of a logistic and an exponential loss that was found by search.
    Discopop,
    /// DPO by tokens.
    SigmoidNorm,
    /// Distributions of preferences, over the step, apart.
    Aot,
    /// Distributions of chosen and of rejected answers, over the step, apart.
    AotUnpaired,
}

/// What a log-ratio is taken for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Divergence {
    /// The log-ratio itself.
    #[default]
    ReverseKl,
    /// `-e^-r`.
    ForwardKl,
    /// `log σ(r)`.
    Js,
    /// `e^((α-1) r) / (α-1)` for α = 1/2.
    Alpha,
}

/// Parameters of the objective.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// The loss of a pair.
    loss: Loss,
    /// How strongly the model is held to what it said before.
    #[schemars(range(min = 1e-6, max = 1000.0))]
    beta: f64,
    /// Share of pairs whose order is taken to be wrong.
    #[schemars(range(min = 0.0, max = 0.5))]
    label_smoothing: f64,
    /// What log-ratios are taken for.
    divergence: Divergence,
    /// Weight of the mean negative log-likelihood of a chosen token, added to the loss of its pair.
    #[schemars(range(min = 0.0, max = 1000.0))]
    sft: f64,
}

impl Default for Config {
    /// The paper's β.
    fn default() -> Self {
        Self { loss: Loss::Sigmoid, beta: 0.1, label_smoothing: 0.0, divergence: Divergence::ReverseKl, sft: 0.0 }
    }
}

pub(super) struct Dpo {
    config: Config,
}

impl Method for Dpo {
    const CARD: Card = Card {
        paper: Some(Paper {
            title: "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
            authors: "Rafael Rafailov, Archit Sharma, Eric Mitchell, Stefano Ermon, Christopher D. Manning, Chelsea Finn",
            year: 2023,
        }),
        rules: &[
            Rule {
                when: r#"loss == "robust""#,
                require: "label_smoothing < 0.5",
                message: "is 0.5, at which a robust loss is not defined; expected less",
                path: "label_smoothing",
            },
            Rule {
                when: r#"loss == "exo_pair""#,
                require: "label_smoothing > 0",
                message: "is 0, at which exo_pair is not defined; expected more, such as 0.001",
                path: "label_smoothing",
            },
        ],
        ..Card::new(
            "dpo",
            Point::Objective,
            "Direct preference optimisation and its relatives: the better of two answers is made likelier than the other, \
             measured against what the model said before training; no reward model, no sampling.",
        )
    };
    type Config = Config;
    type Object = dyn Objective;

    fn build(config: Config, _: &BuildCx<'_>) -> std::result::Result<Box<dyn Objective>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

/// `log σ(x)`, which neither overflows nor loses what is small.
fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

fn sigmoid(x: f64) -> f64 {
    log_sigmoid(x).exp()
}

/// A number and its derivatives by the scores of the chosen and the rejected answer.
type ByScores = (f64, [f64; 2]);

impl Divergence {
    /// The score of a log-ratio, and its derivative.
    fn score(self, r: f64) -> (f64, f64) {
        match self {
            Self::ReverseKl => (r, 1.0),
            // Beyond this an exponential says nothing but "far".
            Self::ForwardKl => (-(-r).min(50.0).exp(), if -r < 50.0 { (-r).exp() } else { 0.0 }),
            Self::Js => (log_sigmoid(r), sigmoid(-r)),
            Self::Alpha => {
                let power = (-0.5 * r).min(50.0);
                (-2.0 * power.exp(), if -0.5 * r < 50.0 { power.exp() } else { 0.0 })
            }
        }
    }
}

impl Config {
    /// The loss of scores `s_w` and `s_l` of answers of `n_w` and `n_l` tokens.
    fn of_pair(&self, [s_w, s_l]: [f64; 2], [n_w, n_l]: [f64; 2]) -> ByScores {
        let (beta, eps) = (self.beta, self.label_smoothing);
        let z = beta * (s_w - s_l);
        // d/dz log σ(z) = σ(-z).
        let by_z = |loss: f64, dz: f64| (loss, [beta * dz, -beta * dz]);
        let by_each = |loss: f64, dw: f64, dl: f64| (loss, [dw, dl]);
        match self.loss {
            Loss::Sigmoid => {
                let (loss, dz) = self.smoothed(z);
                by_z(loss, dz)
            }
            Loss::Robust => {
                let loss = -(1.0 - eps) * log_sigmoid(z) + eps * log_sigmoid(-z);
                let dz = -(1.0 - eps) * sigmoid(-z) - eps * sigmoid(z);
                by_z(loss / (1.0 - 2.0 * eps), dz / (1.0 - 2.0 * eps))
            }
            Loss::Hinge => by_z((1.0 - z).max(0.0), if z < 1.0 { -1.0 } else { 0.0 }),
            Loss::Ipo => {
                let off = s_w / n_w - s_l / n_l - 1.0 / (2.0 * beta);
                by_each(off * off, 2.0 * off / n_w, -2.0 * off / n_l)
            }
            Loss::ExoPair => {
                let (q, log_q, log_rest) = (sigmoid(z), log_sigmoid(z), log_sigmoid(-z));
                let (up, down) = (log_q - (-eps).ln_1p(), log_rest - eps.ln());
                // d/dz q = q (1 - q); the terms of d log q and d log(1-q) cancel.
                by_z(q * up + (1.0 - q) * down, q * (1.0 - q) * (up - down))
            }
            Loss::NcaPair => {
                let (w, l) = (beta * s_w, beta * s_l);
                let loss = -log_sigmoid(w) - 0.5 * log_sigmoid(-w) - 0.5 * log_sigmoid(-l);
                by_each(loss, beta * (0.5 * sigmoid(w) - sigmoid(-w)), 0.5 * beta * sigmoid(l))
            }
            Loss::BcoPair => {
                let (w, l) = (beta * s_w, beta * s_l);
                by_each(-log_sigmoid(w) - log_sigmoid(-l), -beta * sigmoid(-w), beta * sigmoid(l))
            }
            Loss::SppoHard => {
                let (w, l) = (s_w - 1.0 / (2.0 * beta), s_l + 1.0 / (2.0 * beta));
                by_each(w * w + l * l, 2.0 * w, 2.0 * l)
            }
            Loss::ApoZero => {
                let (w, l) = (sigmoid(beta * s_w), sigmoid(beta * s_l));
                by_each(1.0 - w + l, -beta * w * (1.0 - w), beta * l * (1.0 - l))
            }
            Loss::ApoDown => {
                let (w, q) = (sigmoid(beta * s_w), sigmoid(z));
                let dq = beta * q * (1.0 - q);
                by_each(w + 1.0 - q, beta * w * (1.0 - w) - dq, dq)
            }
            Loss::Discopop => {
                let (tau, far) = (0.05, (-z).min(50.0).exp());
                let m = sigmoid(z / tau);
                let dm = m * (1.0 - m) / tau;
                let loss = (1.0 - m) * -log_sigmoid(z) + m * far;
                let dfar = if -z < 50.0 { -far } else { 0.0 };
                by_z(loss, dm * log_sigmoid(z) - (1.0 - m) * sigmoid(-z) + dm * far + m * dfar)
            }
            // Of one pair there is nothing to sort.
            Loss::Aot | Loss::AotUnpaired => {
                let (loss, dz) = self.smoothed(z);
                by_z(loss, dz)
            }
            Loss::SigmoidNorm => {
                let z = beta * (s_w / n_w - s_l / n_l);
                by_each(-log_sigmoid(z), -beta * sigmoid(-z) / n_w, beta * sigmoid(-z) / n_l)
            }
        }
    }
}

impl Config {
    /// `-(1-ε) log σ(z) - ε log σ(-z)`, and its derivative.
    fn smoothed(&self, z: f64) -> (f64, f64) {
        let eps = self.label_smoothing;
        (-(1.0 - eps) * log_sigmoid(z) - eps * log_sigmoid(-z), -(1.0 - eps) * sigmoid(-z) + eps * sigmoid(z))
    }

    /// The loss of all pairs by the order of their numbers, and its gradient by the log-ratios of each pair.
    fn by_order(&self, pairs: &[Answers]) -> (f64, Vec<[f64; 2]>) {
        // What is sorted against what: by it the chosen and the rejected log-probability count with these signs.
        let sides: [Vec<f64>; 2] = match self.loss {
            Loss::Aot => [
                pairs.iter().map(|pair| pair.logp[0] - pair.logp[1]).collect(),
                pairs.iter().map(|pair| pair.reference[0] - pair.reference[1]).collect(),
            ],
            _ => [pairs.iter().map(|pair| pair.ratio(0)).collect(), pairs.iter().map(|pair| pair.ratio(1)).collect()],
        };
        let [first, second] = sides.each_ref().map(|numbers| {
            let mut order: Vec<usize> = (0..numbers.len()).collect();
            order.sort_by(|&a, &b| numbers[a].total_cmp(&numbers[b]));
            order
        });
        let (mut loss, mut by_pair) = (0.0, vec![[0.0; 2]; pairs.len()]);
        for (a, b) in first.into_iter().zip(second) {
            let (of_pair, dz) = self.smoothed(self.beta * (sides[0][a] - sides[1][b]));
            loss += of_pair;
            by_pair[a][0] += self.beta * dz;
            // The reference's side has no gradient.
            if self.loss == Loss::Aot { by_pair[a][1] -= self.beta * dz } else { by_pair[b][1] -= self.beta * dz }
        }
        (loss, by_pair)
    }
}

/// What is known of a pair: sums over each answer's tokens.
struct Answers {
    rows: [std::ops::Range<usize>; 2],
    logp: [f64; 2],
    reference: [f64; 2],
}

impl Answers {
    fn ratio(&self, side: usize) -> f64 {
        self.logp[side] - self.reference[side]
    }

    fn tokens(&self, side: usize) -> f64 {
        self.rows[side].len().max(1) as f64
    }
}

/// The pairs of a scope, in order.
fn pairs(scope: &ScopeView<'_>) -> Result<Vec<Answers>> {
    let docs = &scope.layout.docs()[scope.docs.clone()];
    let mut pairs = Vec::with_capacity(docs.len() / 2);
    let mut first = scope.docs.start;
    for group in docs.chunk_by(|a, b| a.group == b.group) {
        let [View::Chosen, View::Rejected] = group.iter().map(|doc| doc.view).collect::<Vec<_>>()[..] else {
            let message = "a group of the batch is no pair of a chosen and a rejected answer; this objective takes rows with \
                           `chosen` and `rejected` (`form: preference`)";
            return Err(Error::Refused(message.to_owned()));
        };
        let rows = [first, first + 1].map(|doc| scope.rows_of(doc));
        first += 2;
        let sums = |of: &[f64]| rows.each_ref().map(|rows| of[rows.clone()].iter().sum::<f64>());
        let (logp, reference) = (sums(scope.logp_t), sums(scope.reference_t));
        pairs.push(Answers { rows, logp, reference });
    }
    Ok(pairs)
}

impl Objective for Dpo {
    fn level(&self) -> Level {
        match self.config.loss {
            Loss::Aot | Loss::AotUnpaired => Level::Step,
            _ => Level::Group,
        }
    }

    fn needs(&self) -> Needs {
        Needs { reference: true, pairs: true, ..Needs::default() }
    }

    fn denominator(&self) -> Denominator {
        Denominator::Groups
    }

    fn scope(&self, scope: &ScopeView<'_>) -> Result<ScopeLoss> {
        let (config, pairs) = (&self.config, pairs(scope)?);
        let (mut loss, by_pair) = match self.level() {
            Level::Step => config.by_order(&pairs),
            _ => {
                let of_pair = |pair: &Answers| {
                    let scores = [0, 1].map(|side| config.divergence.score(pair.ratio(side)));
                    let tokens = [0, 1].map(|side| pair.tokens(side));
                    let (loss, by_scores) = config.of_pair(scores.map(|(score, _)| score), tokens);
                    (loss, [0, 1].map(|side: usize| by_scores[side] * scores[side].1))
                };
                let each: Vec<(f64, [f64; 2])> = pairs.iter().map(of_pair).collect();
                (each.iter().map(|(loss, _)| loss).sum(), each.into_iter().map(|(_, by_ratios)| by_ratios).collect())
            }
        };
        let mut dlogp_t = vec![0.0; scope.logp_t.len()];
        let (mut rewards, mut right) = ([0.0; 2], 0.0);
        for (pair, by_ratios) in pairs.iter().zip(by_pair) {
            for side in [0, 1] {
                dlogp_t[pair.rows[side].clone()].fill(by_ratios[side]);
                rewards[side] += config.beta * pair.ratio(side);
            }
            if config.sft > 0.0 {
                loss -= config.sft * pair.logp[0] / pair.tokens(0);
                dlogp_t[pair.rows[0].clone()].iter_mut().for_each(|dlogp| *dlogp -= config.sft / pair.tokens(0));
            }
            right += f64::from(u8::from(pair.ratio(0) > pair.ratio(1)));
        }
        let [chosen, rejected] = rewards;
        let beside = vec![
            ("rewards/chosen", chosen),
            ("rewards/rejected", rejected),
            ("rewards/margin", chosen - rejected),
            ("rewards/accuracy", right),
        ];
        Ok(ScopeLoss { loss, dlogp_t, beside })
    }
}

#[cfg(test)]
mod tests {
    use attune_points::Layout;
    use attune_points::layout::{NO_LABEL, Row, Source};

    use super::*;

    const LOSSES: [Loss; 12] = [
        Loss::Sigmoid,
        Loss::Robust,
        Loss::Hinge,
        Loss::Ipo,
        Loss::ExoPair,
        Loss::NcaPair,
        Loss::BcoPair,
        Loss::SppoHard,
        Loss::ApoZero,
        Loss::ApoDown,
        Loss::Discopop,
        Loss::SigmoidNorm,
    ];

    fn config(loss: Loss) -> Config {
        Config { loss, beta: 0.4, label_smoothing: 0.1, ..Config::default() }
    }

    /// A pair of answers of two and three tokens after a prompt of two.
    fn pair(views: [View; 2]) -> Layout {
        let mut layout = Layout::new();
        for (view, tokens) in views.into_iter().zip([2u32, 3]) {
            let rows = (0..=tokens).map(|row| (Row::Token(row), if row == 0 { NO_LABEL } else { row }));
            layout.push(Source { view, group: Some(0), ..Source::default() }, rows.collect::<Vec<_>>());
        }
        layout
    }

    fn scope(config: Config, logp_t: &[f64], reference_t: &[f64]) -> ScopeLoss {
        let layout = pair([View::Chosen, View::Rejected]);
        let rows = layout.supervised();
        Dpo { config }.scope(&ScopeView { layout: &layout, docs: 0..2, rows: &rows, logp_t, reference_t }).unwrap()
    }

    const LOGP: [f64; 5] = [-1.0, -2.5, -0.7, -3.0, -1.2];
    const REFERENCE: [f64; 5] = [-1.4, -2.0, -0.9, -2.0, -1.3];

    #[test]
    fn before_training_losses_are_the_constants_that_they_have_at_no_difference() {
        let ln_2 = std::f64::consts::LN_2;
        let plain = |loss| Config { loss, ..Config::default() };
        for (loss, expected) in [
            (Loss::Sigmoid, ln_2),
            (Loss::Hinge, 1.0),
            (Loss::Ipo, 1.0 / (4.0 * 0.1 * 0.1)),
            (Loss::ApoZero, 1.0),
            (Loss::BcoPair, 2.0 * ln_2),
            (Loss::NcaPair, 2.0 * ln_2),
            (Loss::SigmoidNorm, ln_2),
            (Loss::SppoHard, 50.0),
        ] {
            assert!((scope(plain(loss), &LOGP, &LOGP).loss - expected).abs() < 1e-12, "{loss:?}");
        }
    }

    #[test]
    fn gradients_agree_with_central_differences_for_every_loss_and_divergence() {
        for loss in LOSSES {
            for divergence in [Divergence::ReverseKl, Divergence::ForwardKl, Divergence::Js, Divergence::Alpha] {
                let config = Config { divergence, sft: 0.3, ..config(loss) };
                let found = scope(config.clone(), &LOGP, &REFERENCE);
                for at in 0..LOGP.len() {
                    let moved = |step: f64| {
                        let mut logp = LOGP;
                        logp[at] += step;
                        scope(config.clone(), &logp, &REFERENCE).loss
                    };
                    let numeric = (moved(1e-6) - moved(-1e-6)) / 2e-6;
                    let exact = found.dlogp_t[at];
                    assert!(
                        (numeric - exact).abs() < 1e-7 * (1.0 + exact.abs()),
                        "{loss:?}, {divergence:?}: {numeric} against {exact}"
                    );
                }
            }
        }
    }

    /// The paper's equation: the gradient by the chosen log-probability is -β σ(-βΔ), by the other one its opposite.
    #[test]
    fn the_gradient_of_the_plain_loss_is_the_papers() {
        let found = scope(Config { beta: 0.4, ..Config::default() }, &LOGP, &REFERENCE);
        let ratio = |rows: std::ops::Range<usize>| rows.map(|at| LOGP[at] - REFERENCE[at]).sum::<f64>();
        let delta = ratio(0..2) - ratio(2..5);
        let expected = -0.4 * sigmoid(-0.4 * delta);
        for (at, dlogp) in found.dlogp_t.iter().enumerate() {
            assert!((dlogp - if at < 2 { expected } else { -expected }).abs() < 1e-12);
        }
        let margin = found.beside.iter().find(|(name, _)| *name == "rewards/margin").unwrap().1;
        assert!((margin - 0.4 * delta).abs() < 1e-12);
    }

    /// A number known from outside: losses of TRL's definitions at s_w = 0.3, s_l = -0.2, by hand with β = 0.5 and ε = 0.1.
    #[test]
    fn losses_at_a_point_are_those_computed_by_hand() {
        let of = |loss| {
            Config { loss, beta: 0.5, label_smoothing: 0.1, ..Config::default() }.of_pair([0.3, -0.2], [2.0, 4.0]).0
        };
        for (loss, expected) in [
            (Loss::Sigmoid, 0.9 * 0.575_939_369 + 0.1 * 0.825_939_369),
            (Loss::Robust, (0.9 * 0.575_939_369 - 0.1 * 0.825_939_369) / 0.8),
            (Loss::Hinge, 0.75),
            (Loss::Ipo, (0.15f64 + 0.05 - 1.0).powi(2)),
            (Loss::SppoHard, 0.7f64.powi(2) + 0.8f64.powi(2)),
            (Loss::SigmoidNorm, 0.644_396_660),
        ] {
            assert!((of(loss) - expected).abs() < 1e-6, "{loss:?}: {} against {expected}", of(loss));
        }
    }

    /// Sorting pairs the smallest with the smallest: the loss of a step does not depend on which reference stood beside which
    /// answer, and its gradient is that of the pairs as they were sorted.
    #[test]
    fn a_step_is_compared_in_order() {
        let mut layout = Layout::new();
        for _ in 0..3 {
            let of_pair = pair([View::Chosen, View::Rejected]);
            layout = Layout::concat([&layout, &of_pair].into_iter().filter(|layout| layout.n_rows() > 0));
        }
        let rows = layout.supervised();
        let number = |seed: f64| (0..rows.len()).map(|at| -1.0 - (seed * (at + 1) as f64).sin()).collect::<Vec<f64>>();
        let (logp, reference) = (number(0.7), number(1.3));
        for loss in [Loss::Aot, Loss::AotUnpaired] {
            let objective = Dpo { config: Config { sft: 0.2, ..config(loss) } };
            assert_eq!(objective.level(), Level::Step);
            let of = |logp_t: &[f64], reference_t: &[f64]| {
                objective.scope(&ScopeView { layout: &layout, docs: 0..6, rows: &rows, logp_t, reference_t }).unwrap()
            };
            let found = of(&logp, &reference);
            for at in 0..logp.len() {
                let moved = |step: f64| {
                    let mut logp = logp.clone();
                    logp[at] += step;
                    of(&logp, &reference).loss
                };
                let numeric = (moved(1e-6) - moved(-1e-6)) / 2e-6;
                assert!(
                    (numeric - found.dlogp_t[at]).abs() < 1e-7,
                    "{loss:?}: {numeric} against {}",
                    found.dlogp_t[at]
                );
            }
            // Five rows a pair: the references of the first and the last change places.
            let turned = [&reference[10..], &reference[5..10], &reference[..5]].concat();
            let same = (of(&logp, &turned).loss - found.loss).abs() < 1e-12;
            assert_eq!(same, loss == Loss::Aot, "{loss:?}");
            let at_start = of(&logp, &logp).loss
                + 0.2 * [0, 5, 10].map(|pair| (logp[pair] + logp[pair + 1]) / 2.0).iter().sum::<f64>();
            assert!((at_start - 3.0 * std::f64::consts::LN_2).abs() < 1e-12, "{loss:?}: {at_start}");
        }
    }

    #[test]
    fn swapped_answers_have_the_opposite_difference() {
        let config = Config { beta: 0.4, ..Config::default() };
        let (there, back) = (config.of_pair([0.7, -0.3], [1.0, 1.0]), config.of_pair([-0.3, 0.7], [1.0, 1.0]));
        assert!((there.0 - -log_sigmoid(0.4)).abs() < 1e-12 && (back.0 - -log_sigmoid(-0.4)).abs() < 1e-12);
    }

    #[test]
    fn a_group_that_is_no_pair_is_refused_with_what_is_expected() {
        let layout = pair([View::Chosen, View::Chosen]);
        let rows = layout.supervised();
        let view = ScopeView { layout: &layout, docs: 0..2, rows: &rows, logp_t: &LOGP, reference_t: &LOGP };
        let error = Dpo { config: Config::default() }.scope(&view).unwrap_err();
        assert!(error.to_string().contains("`form: preference`"), "{error}");
    }
}
