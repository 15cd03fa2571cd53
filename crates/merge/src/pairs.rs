//! In which space adapters are combined, and what becomes of one site of theirs.

use attune_points::merge::{Keeps, Merge, Weighted};
use attune_tensor::{Rng, linalg};
use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use crate::error::Error;

/// What an adapter adds to a weight: `scale * b_or a_ri`.
#[derive(Debug, Clone)]
pub struct Pair {
    /// The factor that gives the rows of the change.
    pub b_or: Tensor,
    /// The factor that reads.
    pub a_ri: Tensor,
    /// The factor on the product.
    pub scale: f64,
}

/// What is combined.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Space {
    /// The factors of the adapters, all of one rank, each kind by itself: that of both weights which is `weight * scale` goes to each factor
    /// by its root. What is combined is the change only roughly, for a product of sums is no sum of products.
    Factors,
    /// The factors side by side, so that changes add up exactly and ranks as well. For sums alone.
    Concatenated,
    /// The changes of the weight, of which the largest singular directions become factors again.
    Changes {
        /// How many; as many as the largest of the adapters has at the site if absent, and never more than the weight has rows or
        /// columns.
        #[serde(default)]
        rank: Option<usize>,
        /// Numbers of both factors are clamped to the quantile of this share of them, on both sides. They are not if absent.
        #[serde(default)]
        clamp: Option<f64>,
    },
}

/// The pair in the place of several at one site, with 1 as the factor on its product. There is one or more.
///
/// # Errors
/// [`Error`] where the pairs cannot be combined in this space.
pub fn combined(of: &[(Pair, f64)], merge: &dyn Merge, space: Space, keeps: &mut dyn Keeps) -> Result<Pair, Error> {
    let ranks = of.iter().map(|(pair, _)| pair.a_ri.dim(0)).collect::<candle_core::Result<Vec<usize>>>()?;
    let (b_or, a_ri) = match space {
        Space::Factors if ranks.windows(2).any(|two| two[0] != two[1]) => return Err(Error::Ranks { ranks }),
        Space::Factors => {
            let weighted: Vec<f64> = of.iter().map(|(pair, weight)| weight * pair.scale).collect();
            // The sign goes to one factor alone, for two would undo each other.
            let signed = |value: &f64| value.abs().sqrt() * if *value >= 0.0 { 1.0 } else { -1.0 };
            let one = |tensor: fn(&Pair) -> &Tensor, root: &dyn Fn(&f64) -> f64| -> Vec<_> {
                let all = of.iter().zip(&weighted);
                all.map(|((pair, _), weight)| Weighted { tensor: tensor(pair), weight: root(weight) }).collect()
            };
            let a_ri = merge.combine(&one(|pair| &pair.a_ri, &signed), keeps)?;
            (merge.combine(&one(|pair| &pair.b_or, &|value: &f64| value.abs().sqrt()), keeps)?, a_ri)
        }
        Space::Concatenated if !merge.is_sum() => return Err(Error::NoSum),
        Space::Concatenated => {
            let a = of.iter().map(|(pair, weight)| &pair.a_ri * (weight * pair.scale));
            let a = a.collect::<candle_core::Result<Vec<Tensor>>>()?;
            let b: Vec<&Tensor> = of.iter().map(|(pair, _)| &pair.b_or).collect();
            (Tensor::cat(&b, 1)?, Tensor::cat(&a, 0)?)
        }
        Space::Changes { rank, clamp } => {
            if rank == Some(0) {
                return Err(Error::NoRank);
            }
            if let Some(share) = clamp.filter(|share| !(0.0..=1.0).contains(share)) {
                return Err(Error::Clamp(share));
            }
            let changes = of.iter().map(|(pair, _)| pair.b_or.matmul(&pair.a_ri)? * pair.scale);
            let changes = changes.collect::<candle_core::Result<Vec<Tensor>>>()?;
            let weighted: Vec<_> =
                changes.iter().zip(of).map(|(tensor, (_, weight))| Weighted { tensor, weight: *weight }).collect();
            let change_oi = merge.combine(&weighted, keeps)?;
            let most = change_oi.dims().iter().copied().min().unwrap_or_default();
            let rank = rank.unwrap_or_else(|| ranks.iter().copied().max().unwrap_or_default()).min(most);
            factored(&change_oi, rank, clamp)?
        }
    };
    Ok(Pair { b_or, a_ri, scale: 1.0 })
}

/// The largest `rank` singular directions of a change as factors, the values on the left one.
fn factored(change_oi: &Tensor, rank: usize, clamp: Option<f64>) -> Result<(Tensor, Tensor), Error> {
    let parts = linalg::svd(change_oi)?.truncated(rank)?;
    let dtype = change_oi.dtype();
    let b_or = parts.u.broadcast_mul(&parts.s.unsqueeze(0)?)?.to_dtype(dtype)?;
    let a_ri = parts.v.to_dtype(dtype)?;
    let Some(share) = clamp else { return Ok((b_or, a_ri)) };
    let mut numbers = values(&b_or)?;
    numbers.extend(values(&a_ri)?);
    let bound = quantile(numbers, share);
    // A quantile of mostly negative numbers is no bound: everything would be at it.
    let bound = bound.max(0.0);
    Ok((b_or.clamp(-bound, bound)?, a_ri.clamp(-bound, bound)?))
}

fn values(tensor: &Tensor) -> candle_core::Result<Vec<f64>> {
    tensor.flatten_all()?.to_dtype(DType::F64)?.to_vec1()
}

/// Between the two numbers that are next to it, as far as it is from either.
fn quantile(mut numbers: Vec<f64>, share: f64) -> f64 {
    numbers.sort_by(f64::total_cmp);
    let place = share * numbers.len().saturating_sub(1) as f64;
    let below = place as usize;
    let at = |place: usize| numbers.get(place.min(numbers.len().saturating_sub(1))).copied().unwrap_or_default();
    at(below) + (at(below + 1) - at(below)) * (place - below as f64)
}

/// Entries that are drawn: those of one tensor by the stream, the site, how often something was asked for there, and their places.
#[derive(Debug)]
pub struct Drawn {
    rng: Rng,
    asked: u64,
}

impl Drawn {
    /// Those of a site.
    pub fn at(rng: &Rng, site: &str) -> Self {
        Self { rng: rng.named(site), asked: 0 }
    }
}

impl Keeps for Drawn {
    fn keep(&mut self, _: usize, entries: usize, share: f64) -> attune_points::Result<Vec<bool>> {
        let mut rng = self.rng.sub(self.asked);
        self.asked += 1;
        Ok((0..entries).map(|_| rng.uniform() < share).collect())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::words;

    fn normal(name: &str, shape: [usize; 2]) -> Tensor {
        Rng::new(3, name).normal_tensor(&shape[..], 1.0, DType::F64).unwrap()
    }

    fn pair(name: &str, rank: usize, scale: f64) -> Pair {
        let of = |end: &str, shape| normal(&format!("{name}{end}"), shape);
        Pair { b_or: of("b", [7, rank]), a_ri: of("a", [rank, 5]), scale }
    }

    fn change(pair: &Pair) -> Tensor {
        (pair.b_or.matmul(&pair.a_ri).unwrap() * pair.scale).unwrap()
    }

    fn off(a: &Tensor, b: &Tensor) -> f64 {
        (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
    }

    fn made(
        word: &str,
        density: Option<f64>,
        of: &[(Pair, f64)],
        rank: Option<usize>,
        seed: u64,
    ) -> Result<Pair, Error> {
        let (method, space) = words::of(word, density, None, rank, None).unwrap();
        let cx = attune_spec::method::BuildCx { steps: attune_spec::id::Step(0), domains: &[], words: None };
        let merge = crate::MERGES.build(&method, &"method".into(), &cx).unwrap();
        combined(of, &*merge, space, &mut Drawn::at(&Rng::new(seed, "merge"), "q_proj"))
    }

    fn summed(of: &[(Pair, f64)]) -> Tensor {
        of.iter().fold(Tensor::zeros((7, 5), DType::F64, &Device::Cpu).unwrap(), |sum, (pair, weight)| {
            (sum + (change(pair) * *weight).unwrap()).unwrap()
        })
    }

    #[test]
    fn side_by_side_and_by_directions_changes_add_up_whatever_their_ranks_and_signs() {
        let of = [(pair("x", 2, 1.5), 0.7), (pair("y", 1, 0.5), -1.3)];
        let joined = made("cat", None, &of, None, 0).unwrap();
        assert_eq!((joined.a_ri.dim(0).unwrap(), joined.scale), (3, 1.0));
        assert!(off(&change(&joined), &summed(&of)) < 1e-12);
        let whole = made("svd", None, &of, Some(3), 0).unwrap();
        assert!(off(&change(&whole), &summed(&of)) < 1e-12);
        // The best that rank 1 can do is off by the second singular value.
        let one = made("svd", None, &of, Some(1), 0).unwrap();
        let left = (change(&one) - summed(&of)).unwrap();
        let values: Vec<f64> = linalg::svd(&summed(&of)).unwrap().s.to_vec1().unwrap();
        let largest: Vec<f64> = linalg::svd(&left).unwrap().s.to_vec1().unwrap();
        assert!((largest[0] - values[1]).abs() < 1e-12);
    }

    #[test]
    fn copies_of_one_adapter_are_it_again() {
        for (word, density) in [("linear", None), ("ties", Some(1.0)), ("svd", None), ("ties_svd", Some(1.0))] {
            let one = pair("x", 2, 1.5);
            // Sums take weights that add up to 1; where entries agree their mean is taken.
            let weight = if word.contains("ties") { 1.0 } else { 0.5 };
            let of = [(one.clone(), weight), (one.clone(), weight)];
            let expected = match word {
                // Each factor has the root of its weight, and there are two.
                "linear" => (change(&one) * 2.0).unwrap(),
                _ => change(&one),
            };
            let made = made(word, density, &of, None, 0).unwrap();
            assert!(off(&change(&made), &expected) < 1e-12, "{word}");
        }
    }

    #[test]
    fn the_order_of_adapters_changes_nothing() {
        for word in ["linear", "ties", "magnitude_prune", "svd", "ties_svd", "magnitude_prune_svd"] {
            let density = (!["linear", "svd"].contains(&word)).then_some(0.6);
            let (x, y) = ((pair("x", 2, 1.5), 0.7), (pair("y", 2, 0.5), -1.3));
            let one = made(word, density, &[x.clone(), y.clone()], None, 0).unwrap();
            let other = made(word, density, &[y, x], None, 0).unwrap();
            assert!(off(&change(&one), &change(&other)) < 1e-12, "{word}");
        }
    }

    #[test]
    fn what_is_drawn_depends_on_the_seed_and_is_right_in_the_mean() {
        let of = [(pair("x", 2, 1.0), 1.0)];
        let drawn = |seed| change(&made("dare_linear_svd", Some(0.4), &of, Some(5), seed).unwrap());
        assert_eq!(off(&drawn(1), &drawn(1)), 0.0);
        assert!(off(&drawn(1), &drawn(2)) > 0.1);
        let draws = 2000;
        let sum = (1..draws).fold(drawn(0), |sum, seed| (sum + drawn(seed)).unwrap());
        let mean = (sum / f64::from(draws as u32)).unwrap();
        let largest: f64 = change(&of[0].0).abs().unwrap().max_all().unwrap().to_scalar().unwrap();
        // An entry x has the variance x² (1 - p)/p.
        assert!(off(&mean, &change(&of[0].0)) < 5.0 * largest * (0.6f64 / 0.4 / draws as f64).sqrt());
    }

    #[test]
    fn numbers_beyond_the_quantile_are_clamped_on_both_sides() {
        let change_oi = normal("x", [7, 5]);
        let (b, a) = factored(&change_oi, 5, None).unwrap();
        let (clamped_b, clamped_a) = factored(&change_oi, 5, Some(0.8)).unwrap();
        let all: Vec<f64> = values(&b).unwrap().into_iter().chain(values(&a).unwrap()).collect();
        let bound = quantile(all.clone(), 0.8);
        assert!(bound > 0.0 && all.iter().filter(|value| **value > bound).count() == 12);
        assert_eq!(off(&clamped_b, &b.clamp(-bound, bound).unwrap()), 0.0);
        assert_eq!(off(&clamped_a, &a.clamp(-bound, bound).unwrap()), 0.0);
        assert_eq!(quantile(vec![1.0, 4.0, 2.0], 0.75), 3.0);
    }

    #[test]
    fn what_does_not_go_together_is_refused() {
        let of = [(pair("x", 2, 1.0), 1.0), (pair("y", 1, 1.0), 1.0)];
        let why = |made: Result<Pair, Error>| made.unwrap_err().to_string();
        assert!(why(made("linear", None, &of, None, 0)).starts_with("ranks are 2, 1, "));
        assert!(why(made("svd", None, &of, Some(0), 0)).contains("rank 0"));
        let cx = attune_spec::method::BuildCx { steps: attune_spec::id::Step(0), domains: &[], words: None };
        let ties = attune_spec::method::MethodRef::named("ties");
        let ties = crate::MERGES.build(&ties, &"method".into(), &cx).unwrap();
        let keeps = &mut Drawn::at(&Rng::new(0, "merge"), "q_proj");
        assert!(why(combined(&of, &*ties, Space::Concatenated, keeps)).contains("only sums"));
        let nowhere = Space::Changes { rank: None, clamp: Some(1.5) };
        assert!(why(combined(&of, &*ties, nowhere, keeps)).contains("quantile 1.5"));
        let mut torn = of.clone();
        torn[1].0 = Pair { a_ri: (normal("n", [1, 5]) * f64::NAN).unwrap(), ..torn[1].0.clone() };
        assert!(why(made("svd", None, &torn, None, 0)).contains("not finite"));
    }
}
