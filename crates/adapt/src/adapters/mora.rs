//! A square matrix between frozen maps that shorten a row and lengthen it again: at LoRA's number of parameters the change has a high
//! rank; for what has to be memorised, such as new knowledge.
//!
//! # Update
//! ```text
//! y_to  = x_ti W_oi^T + g(M_nn f(x_ti))                n = round(sqrt(r (i + o))), with rope rounded down to an even number
//! share f(x)_j = Σ_q x̄_(q n + j)                       g(h)_o = h_(o mod n)
//! group f(x)_j = Σ_q x̄_(j m + q), n m numbers in all     g(h)_o = h_⌊o / k⌋, n k ≥ o for all o
//! group_share, share_group: f of the one, and g of the other
//! rope  f(x)_q = R_q x̄_(q n ..), for each q            g(h)_o = h_(o mod q n), chunk after chunk
//! x̄     = x and its first numbers again, to a multiple of n
//! R_q   = the turn of pairs (j, j + n/2) by q · 10000^(-2j/n)
//! ```
//! With `every`, a second square is beside the first, whose f and g are grouped where the first one's are shared, and the other way round. They take
//! turns of so many steps: one learns, from moments of 0 and with a schedule of its own, and the other stays as it is.
//!
//! # Symbols
//! `mora` `M_nn`, and with `every` `mora_other`, f32, trained, started at 0. f and g have no parameters.
//!
//! # Cost
//! `n*n` parameters per linear, about `r*(i+o)`, twice that with `every`. A row costs `2 n²` FLOPs for each square, `2 n i` with rope.
//! Rows are turned around in memory for small products. Where it costs less, and nothing is dropped, a pass makes another weight in place of
//! it, forward and in reverse, and the gradient by it.
//!
//! # Limits
//! With M = 0 it is the base, bit for bit. With share, the change has rank n at most, and where n = i = o it is M: any change of the
//! weight. With rope the rank has no such bound.
//!
//! # Departures
//! Of the paper's ways to shorten rows those of its code that are maps between chunks, in its words sharing (1), grouping (2), both mixtures of these (3, 4), and
//! rotation (6). There is no scaling. A square wider than the weight is refused. What merging and starting again (ReMoRA) adds to the weight in each of two
//! forms is a square of that form itself, which is kept beside the weight in place of being added to it.
//!
//! # Paper
//! MoRA: High-Rank Updating for Parameter-Efficient Fine-Tuning. Jiang, Huang, Luo, Zhang, Huang, Wei, Deng, Sun, Zhang, Wang, Zhuang,
//! 2024.

use std::collections::BTreeSet;

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, RowCx, RowMap, Trained, WeightMap};
use attune_points::engine::{self, Engine, Job, Source, StepReport, StepRule};
use attune_points::forms::{AsWeight, Cost};
use attune_points::{Locals, Owner, TensorId, TensorName, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::id::Step;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, Paper, Point, Rule, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::dropout::dropped;
use crate::parts::starts::{self, Start};
use crate::parts::tiles::tiled;
use crate::parts::{anew, linears, own};

const M: &str = "mora";
const OTHER: &str = "mora_other";

/// The base of the angles, as of rotary positions.
const THETA: f64 = 10_000.0;

/// How a row becomes as short as the square is wide.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Form {
    /// Chunk by chunk, each turned by its place: for small ranks.
    #[default]
    Rope,
    /// By the sum of its chunks: for large ranks.
    Share,
    /// By the sum of each chunk; what comes of it is spread over as many outputs that lie together.
    Group,
    /// By the sum of each chunk; what comes of it is repeated.
    GroupShare,
    /// By the sum of its chunks; what comes of it is spread over outputs that lie together.
    ShareGroup,
}

impl Form {
    /// Whether each chunk of a row is summed up by itself, and whether outputs that lie together have the same.
    const fn groups(self) -> (bool, bool) {
        match self {
            Self::Rope | Self::Share => (false, false),
            Self::Group => (true, true),
            Self::GroupShare => (true, false),
            Self::ShareGroup => (false, true),
        }
    }

    /// That of the second square.
    const fn other(self) -> Self {
        match self {
            Self::Rope | Self::Group => Self::Share,
            Self::Share => Self::Group,
            Self::GroupShare => Self::ShareGroup,
            Self::ShareGroup => Self::GroupShare,
        }
    }
}

/// Parameters of MoRA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Rank of the LoRA that has as many parameters.
    #[schemars(range(min = 1, max = 4096))]
    rank: u32,
    /// How a row becomes as short as the square is wide.
    form: Form,
    /// Share of the component's input that is dropped in training.
    #[schemars(range(min = 0.0, max = 0.99))]
    dropout: f64,
    /// Steps of a turn of each of two squares; 0 for a single one.
    #[schemars(range(min = 0, max = 1_000_000))]
    every: u64,
}

impl Default for Config {
    /// The paper's values for small ranks.
    fn default() -> Self {
        Self { rank: 8, form: Form::Rope, dropout: 0.0, every: 0 }
    }
}

pub(super) struct Mora {
    config: Config,
}

impl Method for Mora {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "MoRA: High-Rank Updating for Parameter-Efficient Fine-Tuning",
            authors: "Ting Jiang, Shaohan Huang, Shengyue Luo, Zihan Zhang, Haizhen Huang, Furu Wei, Weiwei Deng, Feng Sun, Qi Zhang, \
                      Deqing Wang, Fuzhen Zhuang",
            year: 2024,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "if(form == \"rope\", \
                     4*floor(floor(sqrt(rank*(i+o)) + 0.5)/2)*floor(floor(sqrt(rank*(i+o)) + 0.5)/2), \
                     floor(sqrt(rank*(i+o)) + 0.5)*floor(sqrt(rank*(i+o)) + 0.5)*(1 + (every > 0)))",
        graph_numbers: "19*o*i",
        merges: Merges::Weight,
        rules: &[Rule {
            when: "every > 0",
            require: "form != \"rope\"",
            message: "is for squares whose rows are shared or grouped; expected 0, or another `form`",
            path: "every",
        }],
        ..Card::new(
            "mora",
            Point::Adapter,
            "A square matrix between frozen maps that shorten a row and lengthen it again: at LoRA's number of parameters the \
             change has a high rank; for what has to be memorised, such as new knowledge.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Adapter for Mora {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        linears::attach(sites, |site, o, i| {
            let n = self.width(o, i);
            if n == 0 || n > o.min(i) {
                let rank = self.config.rank;
                let message = format!(
                    "is {rank}, which makes a square {n} wide; {} is {o} by {i}, so it is 1 (with rope 2) to {} wide",
                    site.id,
                    o.min(i)
                );
                return Err(Fault::new("rank", message));
            }
            let comes_and_goes = self.config.every > 0;
            let square = |local| TensorSpec { comes_and_goes, ..TensorSpec::trained(local, [n, n]) };
            Ok(std::iter::once(square(M)).chain(comes_and_goes.then(|| square(OTHER))).collect())
        })
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        starts::each(at, rng, |_| Start::Constant(0.0))
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Delta(self)
    }

    fn step_rule(&self, of: &Trained<'_>) -> Option<Box<dyn StepRule>> {
        let id = |at: &&Attachment, local: &str| TensorId {
            owner: Owner::Bank { slot: of.slot, set: 0 },
            name: TensorName::new(at.site.as_str(), local),
        };
        let squares = [M, OTHER].map(|local| of.attachments.iter().map(|at| id(at, local)).collect());
        let (every, steps) = (self.config.every, of.steps.0);
        (every > 0).then(|| Box::new(Taking { every, steps, squares }) as Box<dyn StepRule>)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        let (m_nn, (o, i)) = (tensors.get(M)?, weight.shape());
        // What it adds to the rows of the identity are the columns of its change.
        let change_io = self.all_rows(&Tensor::eye(i, m_nn.dtype(), m_nn.device())?, tensors, o)?;
        Ok(Merged::Weight { weight: (weight.dense(m_nn.dtype())? + change_io.t()?)?, bias: None })
    }

    fn peft(&self) -> Option<Peft> {
        Some(own::peft(Self::CARD.name, &self.config))
    }
}

impl Mora {
    /// How wide the square is.
    fn width(&self, o: usize, i: usize) -> usize {
        let n = (f64::from(self.config.rank) * (o + i) as f64).sqrt().round() as usize;
        if self.config.form == Form::Rope { n / 2 * 2 } else { n }
    }

    /// The squares, each with its form.
    fn squares<'t>(&self, tensors: &'t Locals) -> attune_points::Result<Vec<(Form, &'t Tensor)>> {
        let (first, second) = ((self.config.form, tensors.get(M)?), self.config.every > 0);
        let second = second.then(|| Ok((self.config.form.other(), tensors.get(OTHER)?)));
        std::iter::once(Ok(first)).chain(second).collect()
    }

    /// What is added to rows of `output` numbers.
    fn all_rows(&self, x_ti: &Tensor, tensors: &Locals, output: usize) -> attune_points::Result<Tensor> {
        let each = self.squares(tensors)?.into_iter().map(|(form, m_nn)| rows(form, x_ti, m_nn, output));
        let each = each.collect::<attune_points::Result<Vec<_>>>()?;
        match each.as_slice() {
            [first, second] => Ok((first + second)?),
            _ => Ok(each[0].clone()),
        }
    }
}

/// What a square adds to rows of `output` numbers.
fn rows(form: Form, x_ti: &Tensor, m_nn: &Tensor, output: usize) -> attune_points::Result<Tensor> {
    let ((t, i), n) = (x_ti.dims2()?, m_nn.dim(0)?);
    // With rope, what later chunks would give has no output.
    let n_used = if form == Form::Rope { output.div_ceil(n) } else { usize::MAX };
    let chunks = i.div_ceil(n).min(n_used);
    let whole = tiled(x_ti, 1, chunks * n)?;
    let h = if form == Form::Rope {
        let (cos, sin) = turns(chunks, n, x_ti)?;
        let turned = ops::rope(&whole.reshape((t, chunks, n))?, &cos, &sin)?.contiguous()?.reshape((t * chunks, n))?;
        ops::linear(&turned, m_nn, None)?.reshape((t, chunks * n))?
    } else {
        let short_tn = match form.groups().0 {
            true => whole.reshape((t, n, chunks))?.sum(2)?,
            false => whole.reshape((t, chunks, n))?.sum(1)?,
        };
        ops::linear(&short_tn, m_nn, None)?
    };
    if form.groups().1 { spread(&h, 1, output) } else { tiled(&h, 1, output) }
}

/// Each row, or column, of a matrix as often as it takes to have `n` of them, one after the other.
fn spread(matrix: &Tensor, dim: usize, n: usize) -> attune_points::Result<Tensor> {
    let (rows, columns) = matrix.dims2()?;
    let all = [rows, columns][dim];
    let copies = n.div_ceil(all);
    let (shape, flat) = match dim {
        0 => ([rows, copies, columns], [rows * copies, columns]),
        _ => ([rows, columns, copies], [rows, columns * copies]),
    };
    let many = matrix.unsqueeze(dim + 1)?.broadcast_as(shape.as_slice())?.contiguous()?.reshape(flat.as_slice())?;
    Ok(many.narrow(dim, 0, n)?)
}

/// Cosines and sines of the angles of each chunk, `[q, n/2]`.
fn turns(chunks: usize, n: usize, like: &Tensor) -> attune_points::Result<(Tensor, Tensor)> {
    let angle = |q: usize, j: usize| q as f64 * THETA.powf(-2.0 * j as f64 / n as f64);
    let table = |of: fn(f64) -> f64| -> attune_points::Result<Tensor> {
        let values: Vec<f64> = (0..chunks).flat_map(|q| (0..n / 2).map(move |j| of(angle(q, j)))).collect();
        Ok(Tensor::from_vec(values, (chunks, n / 2), like.device())?.to_dtype(like.dtype())?)
    };
    Ok((table(f64::cos)?, table(f64::sin)?))
}

impl RowMap for Mora {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> attune_points::Result<Tensor> {
        self.all_rows(&dropped(x_ti, self.config.dropout, cx)?, tensors, cx.output)
    }

    fn as_weight(&self, (o, i): (usize, usize)) -> Option<AsWeight<'_>> {
        let n = self.width(o, i).max(1);
        let (chunks, turned) = if self.config.form == Form::Rope { (i.div_ceil(n), 4 * i) } else { (1, i) };
        let squares = 1 + usize::from(self.config.every > 0);
        let row = Cost::new(squares * chunks * n * n, squares * (i + turned + o));
        let weight = Cost::new(0, 2 * squares * o * i);
        (self.config.dropout == 0.0).then_some(AsWeight { map: self, row, weight, product_again: false })
    }
}

impl WeightMap for Mora {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        let mut made_oi = w_oi.clone();
        for (form, m_nn) in self.squares(tensors)? {
            made_oi = (made_oi + change(form, m_nn, w_oi.dims2()?)?)?;
        }
        Ok(made_oi)
    }
}

/// The change of a weight by a square.
fn change(form: Form, m_nn: &Tensor, (o, i): (usize, usize)) -> attune_points::Result<Tensor> {
    let n = m_nn.dim(0)?;
    let chunks = i.div_ceil(n);
    let of_chunks = if form == Form::Rope {
        // What later chunks would give has no output.
        let given = chunks.min(o.div_ceil(n));
        let (cos, sin) = turns(given, n, m_nn)?;
        let zeros = |count: usize| Tensor::zeros((n, count * n), m_nn.dtype(), m_nn.device());
        let of_chunk = |q: usize| -> candle_core::Result<Tensor> {
            // Columns of M are turned the other way round.
            let turned = ops::rope(m_nn, &cos.narrow(0, q, 1)?, &sin.narrow(0, q, 1)?.neg()?)?;
            Tensor::cat(&[&zeros(q)?, &turned, &zeros(chunks - 1 - q)?], 1)
        };
        Tensor::cat(&(0..given).map(of_chunk).collect::<candle_core::Result<Vec<_>>>()?, 0)?
    } else if form.groups().0 {
        spread(m_nn, 1, chunks * n)?
    } else {
        tiled(m_nn, 1, chunks * n)?
    };
    // The last chunk of a row is filled up with its first numbers.
    let beyond = chunks * n - i;
    let mut change = of_chunks.narrow(1, 0, i)?.contiguous()?;
    if beyond > 0 {
        let again = of_chunks.narrow(1, i, beyond)?.pad_with_zeros(1, 0, i - beyond)?;
        change = (change + again)?;
    }
    if form.groups().1 { spread(&change, 0, o) } else { tiled(&change, 0, o) }
}

/// Steps in which one of two squares of each site learns, and then the other.
struct Taking {
    /// Steps of a turn.
    every: u64,
    steps: u64,
    /// The squares that learn first, and the others.
    squares: [BTreeSet<TensorId>; 2],
}

impl Taking {
    /// Which of them learn at a step.
    fn at(&self, step: u64) -> usize {
        (step / self.every % 2) as usize
    }
}

impl StepRule for Taking {
    fn misfit(&self, job: &Job<'_>) -> Option<String> {
        anew::misfit(job)
    }

    fn scheduled(&self, step: Step, all: Step) -> (Step, Step) {
        let first = step.0 / self.every * self.every;
        (Step(step.0 - first), Step(self.every.min(all.0.saturating_sub(first)).max(1)))
    }

    fn step(&mut self, step: Step, engine: &mut dyn Engine) -> attune_points::Result<StepReport> {
        let batch = engine.batch(Source::Train)?;
        let (gradients, loss) = engine::gradients_on(engine, &batch)?;
        let at = self.at(step.0);
        let grad_norm = engine.update_but(gradients, &self.squares[1 - at])?;
        let next = step.next().0;
        if next.is_multiple_of(self.every) && next < self.steps {
            // What it has learned in the turn before stays; its moments do not.
            let theta = engine.theta().clone();
            for id in &self.squares[self.at(next)] {
                anew::whole(engine, id)?;
            }
            engine.set(theta);
        }
        let metrics = vec![("square".to_owned(), (at + 1) as f64)];
        Ok(StepReport { loss, grad_norm, n_rows: batch.n_rows, metrics })
    }
}

#[cfg(test)]
mod tests {
    use attune_architecture::SiteId;
    use candle_core::DType;

    use super::*;
    use crate::parts::toy::{self, Toy};

    fn of(form: Form, rank: u32) -> Mora {
        Mora { config: Config { form, rank, ..Config::default() } }
    }

    fn tensor(name: &str, shape: &[usize]) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap()
    }

    fn change(form: Form, m: &Tensor, (o, i): (usize, usize)) -> Vec<Vec<f64>> {
        let at = Attachment { site: SiteId::new("up"), tensors: vec![] };
        let none = Tensor::zeros((o, i), DType::F64, m.device()).unwrap();
        match of(form, 1).merge(&at, &Locals::new("up", [(M, m.clone())]), &none).unwrap() {
            Merged::Weight { weight, .. } => weight.to_vec2().unwrap(),
            other => panic!("{other:?}"),
        }
    }

    /// Outputs and inputs that are and are not multiples of the square's width.
    const SHAPES: [(usize, usize); 5] = [(8, 8), (9, 6), (6, 9), (4, 4), (7, 13)];

    #[test]
    fn shared_numbers_of_the_square_are_those_of_inputs_and_outputs_modulo_its_width() {
        let m = tensor("m", &[4, 4]);
        let entries = m.to_vec2::<f64>().unwrap();
        for (o, i) in SHAPES {
            let padded = i.div_ceil(4) * 4;
            for (row, values) in change(Form::Share, &m, (o, i)).iter().enumerate() {
                for (col, value) in values.iter().enumerate() {
                    // The first inputs come again where a chunk is filled up.
                    let places = (0..padded).filter(|place| place % i == col);
                    let by_hand: f64 = places.map(|place| entries[row % 4][place % 4]).sum();
                    assert!((value - by_hand).abs() < 1e-12, "{o} by {i}");
                }
            }
        }
        // As wide as the weight it is the change itself.
        assert_eq!(change(Form::Share, &m, (4, 4)), entries);
    }

    #[test]
    fn a_chunk_is_turned_by_its_place_and_goes_to_its_own_outputs() {
        let m = tensor("m", &[4, 4]);
        let entries = m.to_vec2::<f64>().unwrap();
        for (o, i) in SHAPES {
            let padded = i.div_ceil(4) * 4;
            for (row, values) in change(Form::Rope, &m, (o, i)).iter().enumerate() {
                let (chunk, row) = (row % padded / 4, row % padded % 4);
                for (col, value) in values.iter().enumerate() {
                    let places = (4 * chunk..4 * chunk + 4).filter(|place| place % i == col);
                    let entry = |place: usize| {
                        let (j, pair) = (place % 4 % 2, place % 4 / 2);
                        let (sin, cos) = (chunk as f64 * THETA.powf(-2.0 * j as f64 / 4.0)).sin_cos();
                        let (first, second) = (entries[row][j], entries[row][j + 2]);
                        if pair == 0 { cos * first + sin * second } else { cos * second - sin * first }
                    };
                    let by_hand: f64 = places.map(entry).sum();
                    assert!((value - by_hand).abs() < 1e-12, "{o} by {i}");
                }
            }
        }
    }

    #[test]
    fn it_has_as_many_parameters_as_lora_of_its_rank() {
        for (rank, o, i) in [(8, 4096, 4096), (8, 1024, 4096), (256, 4096, 4096)] {
            let lora = f64::from(rank) * (o + i) as f64;
            for form in [Form::Rope, Form::Share, Form::Group] {
                let n = of(form, rank).width(o, i) as f64;
                assert!((n * n / lora - 1.0).abs() < 0.01, "{n}");
            }
        }
    }

    #[test]
    fn grouped_numbers_are_those_of_inputs_and_outputs_that_lie_together() {
        let m = tensor("m", &[4, 4]);
        let entries = m.to_vec2::<f64>().unwrap();
        for form in [Form::Group, Form::GroupShare, Form::ShareGroup] {
            for (o, i) in SHAPES {
                let (chunks, copies) = (i.div_ceil(4), o.div_ceil(4));
                let (row_of, col_of) = (
                    |row: usize| if form.groups().1 { row / copies } else { row % 4 },
                    |place: usize| if form.groups().0 { place / chunks } else { place % 4 },
                );
                for (row, values) in change(form, &m, (o, i)).iter().enumerate() {
                    for (col, value) in values.iter().enumerate() {
                        let places = (0..4 * chunks).filter(|place| place % i == col);
                        let by_hand: f64 = places.map(|place| entries[row_of(row)][col_of(place)]).sum();
                        assert!((value - by_hand).abs() < 1e-12, "{form:?}, {o} by {i}");
                    }
                }
            }
        }
    }

    /// Two squares reach what one of either form stays away from, and rows, the weight and what is merged are the same.
    #[test]
    fn two_squares_are_the_sum_of_their_forms_and_of_a_higher_rank() {
        let two = Mora { config: Config { form: Form::Share, rank: 1, every: 2, ..Config::default() } };
        let (m, other) = (tensor("m", &[4, 4]), tensor("other", &[4, 4]));
        let locals = Locals::new("up", [(M, m.clone()), (OTHER, other.clone())]);
        for (o, i) in SHAPES {
            let zero = Tensor::zeros((o, i), DType::F64, m.device()).unwrap();
            let made = WeightMap::graph(&two, &zero, &locals).unwrap();
            let at = Attachment { site: SiteId::new("up"), tensors: vec![] };
            let Merged::Weight { weight, .. } = two.merge(&at, &locals, &zero).unwrap() else { panic!("no weight") };
            let off = |a: &Tensor, b: &Tensor| {
                (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f64>().unwrap()
            };
            assert!(off(&made, &weight) < 1e-12);
            let each =
                [(Form::Share, &m), (Form::Group, &other)].map(|(form, m)| super::change(form, m, (o, i)).unwrap());
            assert!(off(&made, &(&each[0] + &each[1]).unwrap()) < 1e-12);
            let rank = |x: &Tensor| {
                let values = attune_tensor::linalg::svd(x).unwrap().s.to_vec1::<f64>().unwrap();
                values.iter().filter(|value| **value > 1e-9 * values[0]).count()
            };
            assert!(rank(&each[0]) <= 4 && rank(&made) >= rank(&each[0]).max(rank(&each[1])));
            assert!(o.min(i) <= 4 || rank(&made) > 4, "{o} by {i} has rank {}", rank(&made));
        }
    }

    #[test]
    fn squares_take_turns_and_each_begins_afresh_with_what_it_has() {
        let spec = |local| TensorSpec { comes_and_goes: true, ..TensorSpec::trained(local, [2, 2]) };
        let at = Attachment { site: SiteId::new("up"), tensors: vec![spec(M), spec(OTHER)] };
        let one = Tensor::ones((2, 2), DType::F32, &candle_core::Device::Cpu).unwrap();
        let (start, pull) = (one.zeros_like().unwrap(), one);
        let mut toy = Toy::new(vec![at], move |_, _| start.clone(), 1.0, move |_, _| Some(pull.clone()));
        let two = Mora { config: Config { form: Form::Share, rank: 1, every: 3, ..Config::default() } };
        let mut rule = two.step_rule(&toy.trained(8)).unwrap();
        let sizes = |toy: &Toy| [M, OTHER].map(|local| -toy.value("up", local).to_vec2::<f32>().unwrap()[0][0]);
        let mut seen = Vec::new();
        for step in 0..8 {
            rule.step(Step(step), &mut toy).unwrap();
            seen.push(sizes(&toy));
        }
        let expected = [[1, 0], [2, 0], [3, 0], [3, 1], [3, 2], [3, 3], [4, 3], [5, 3]];
        assert_eq!(seen, expected.map(|pair| pair.map(|n: u8| f32::from(n))));
        assert_eq!(toy.renewed, [(toy::id("up", OTHER).to_string(), 4), (toy::id("up", M).to_string(), 4)]);
        let scheduled = |step| rule.scheduled(Step(step), Step(8));
        assert_eq!([0, 2, 3, 7].map(scheduled), [(0, 3), (2, 3), (0, 3), (1, 2)].map(|(at, of)| (Step(at), Step(of))));
        assert!(of(Form::Share, 1).step_rule(&toy.trained(8)).is_none());
    }
}
