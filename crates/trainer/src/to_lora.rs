//! An adapter of whatever method as plain LoRA, for servers that know nothing else: what it adds to each weight, by its largest singular
//! directions.

use std::collections::BTreeMap;
use std::path::Path;

use attune_adapt::joined::of_pairs;
use attune_adapt::{headed, held, peft};
use attune_architecture::{Site, SiteId, SiteKind};
use attune_artifacts::formats::card::Card;
use attune_models::{Base, stack};
use attune_points::adapter::{Attachment, Merged};
use attune_points::{Locals, Weight};
use attune_spec::FieldPath;
use attune_spec::id::Step;
use attune_spec::job::{HeadSpec, Precision};
use attune_spec::method::BuildCx;
use attune_tensor::linalg::{self, Svd};
use candle_core::{DType, Tensor};
use rayon::prelude::*;
use serde::Serialize;

use crate::combine::{base_name, of_folder};
use crate::component::Component;
use crate::error::Error;
use crate::few;

/// What is converted, and how much of it is kept.
#[derive(Debug, Clone)]
pub struct ToLora<'a> {
    /// The folder of the base that it was trained on.
    pub base: &'a Path,
    /// What the adapter is called in the card of what is made: never a path.
    pub name: &'a str,
    /// Its folder.
    pub folder: &'a Path,
    /// How many directions are kept.
    pub keep: Keep,
}

/// How many of a change's singular directions are kept, the largest first.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Keep {
    /// So many at each linear, or all where there are fewer.
    Rank(usize),
    /// At each linear as few as hold this share of the sum of the squares of its singular values.
    Share(f64),
}

/// What was made.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Converted {
    /// The method that it was.
    pub method: String,
    /// Each site that has an adapter.
    pub sites: BTreeMap<String, Kept>,
    /// The largest rank among them.
    pub rank: usize,
    /// Numbers of the adapter, without those of modules that are kept whole.
    pub parameters: usize,
}

/// What was kept at a site.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Kept {
    /// Directions.
    pub rank: usize,
    /// Their share of the sum of the squares of the change's singular values: one less the square of what is off over that of the change.
    pub share: f64,
}

impl Converted {
    /// The site of which the least was kept, and how much.
    pub fn least(&self) -> Option<(&str, Kept)> {
        let least = self.sites.iter().min_by(|a, b| a.1.share.total_cmp(&b.1.share));
        least.map(|(site, kept)| (site.as_str(), *kept))
    }
}

/// A change of a weight as two factors, with what was kept of it.
type Factored = (Tensor, Tensor, Kept);

impl ToLora<'_> {
    /// Converts the adapter and writes the LoRA that it becomes into the folder `to`. The same adapter gives the same bytes.
    ///
    /// # Errors
    /// [`Error`] naming the folder or the site at fault: a component that does not merge, or that is at something else than linears, or
    /// that changes biases.
    pub fn run(&self, to: &Path) -> Result<Converted, Error> {
        let refused = |message: String| of_folder(self.folder, message);
        match self.keep {
            Keep::Rank(0) => return Err(refused("is to have rank 0; expected 1 or more".to_owned())),
            Keep::Share(share) if !(share > 0.0 && share <= 1.0) => {
                return Err(refused(format!("is to keep the share {share}; expected more than 0, and 1 at most")));
            }
            _ => {}
        }
        let folders = [self.folder.to_owned()];
        let head = few::head_of(&folders)?;
        let base = few::open_under(self.base, &folders, Precision::F32, head.as_ref())?;
        let cx = BuildCx { steps: Step(0), domains: &[], words: None };
        let read = peft::read(self.folder)?;
        let component = Component::read(self.folder, &base, &FieldPath::from("adapter"), &cx)?;
        if component.requantized.is_some() {
            let message = "stands beside weights of its base that were quantised anew for it alone; merge it into a base first \
                           (`outputs.merged_into` of the job that made it)";
            return Err(refused(message.to_owned()));
        }
        let attachments: Vec<&Attachment> = component.slot.attachments().collect();
        let made: Vec<Option<Factored>> = attachments
            .par_iter()
            .map(|at| {
                let site = base.architecture().site(at.site.as_str());
                let site = site.ok_or_else(|| refused(format!("adapts {}, which the base does not have", at.site)))?;
                let locals = stack::locals(at, &component.params)?;
                self.at(&component, at, &locals, (&base, &site))
            })
            .collect::<Result<_, Error>>()?;
        let mut sites = BTreeMap::new();
        let mut pairs: BTreeMap<SiteId, (Tensor, Tensor)> = BTreeMap::new();
        for (at, made) in attachments.iter().zip(made) {
            let Some((b_or, a_ri, kept)) = made else { continue };
            sites.insert(at.site.to_string(), kept);
            pairs.insert(at.site.clone(), (b_or, a_ri));
        }
        if pairs.is_empty() {
            return Err(refused("adds nothing to any weight: there is nothing to convert".to_owned()));
        }
        let joined = of_pairs(pairs, base.architecture())?;
        let base_name = base_name(read.base.as_deref(), self.base)?;
        let gives_vectors = head.as_ref().is_some_and(HeadSpec::gives_vectors);
        let card = self.card(&base_name, [&read.method.method, joined.method], gives_vectors);
        let part = peft::Part { adapter: &*joined.adapter, attachments: &joined.attachments, params: &joined.params };
        let whole: Option<(Vec<Attachment>, &Component)> =
            component.saved.as_deref().map(|saved| (saved.slot.attachments().cloned().collect(), saved));
        let saved = whole.as_ref().map(|(attachments, saved)| peft::Part {
            adapter: saved.slot.adapter(),
            attachments,
            params: &saved.params,
        });
        peft::write(to, part, saved, base.architecture(), &base_name, &card)?;
        if let Some(held) = &component.held {
            held::write(to, held, None)?;
        }
        if let Some(head) = &head {
            headed::write(to, head, base.architecture().hidden, None)?;
        }
        Ok(Converted {
            method: read.method.method,
            rank: sites.values().map(|kept: &Kept| kept.rank).max().unwrap_or_default(),
            sites,
            parameters: joined.params.iter().map(|(_, tensor)| tensor.elem_count()).sum(),
        })
    }

    /// What the component adds at one site, if it adds anything.
    fn at(
        &self,
        component: &Component,
        at: &Attachment,
        locals: &Locals,
        (base, site): (&Base, &Site),
    ) -> Result<Option<Factored>, Error> {
        let refused = |message: String| of_folder(self.folder, message);
        let adapter = component.slot.adapter();
        if !matches!(site.kind, SiteKind::Linear { .. }) {
            let message = format!("adapts {}, which is no linear: LoRA has no place for what it does there", at.site);
            return Err(refused(message));
        }
        let own = base.weight(site);
        let change_oi = match adapter.merge(at, locals, &own)? {
            Merged::Factors { left, right, scale } => {
                let (left, right) = (left.to_dtype(DType::F64)?, right.to_dtype(DType::F64)?);
                (left.matmul(&right)? * scale)?
            }
            Merged::Weight { weight, bias } => {
                let before = own.bias(DType::F32)?;
                if let Some(bias) = bias {
                    let still = match &before {
                        Some(before) => (&bias - before)?.abs()?.max_all()?.to_scalar::<f32>()? == 0.0,
                        None => bias.abs()?.max_all()?.to_scalar::<f32>()? == 0.0,
                    };
                    if !still {
                        let message = format!("changes the bias of {}, for which LoRA has no place", at.site);
                        return Err(refused(message));
                    }
                }
                (weight.to_dtype(DType::F64)? - own.dense(DType::F32)?.to_dtype(DType::F64)?)?
            }
            Merged::No(why) => return Err(refused(format!("does not merge at {}: {why}", at.site))),
            other => return Err(refused(format!("merges at {} to {other:?}, which is not known here", at.site))),
        };
        factored(&change_oi, self.keep).map_err(|error| refused(format!("at {}: {error}", at.site)))
    }

    fn card(&self, base_name: &str, [from, method]: [&str; 2], gives_vectors: bool) -> String {
        let facts = [
            ("of", self.name.to_owned()),
            ("method", from.to_owned()),
            ("keep", serde_json::to_string(&self.keep).unwrap_or_default()),
        ];
        let title = format!("{from} as LoRA");
        let pipeline_tag = if gives_vectors { "sentence-similarity" } else { "text-generation" };
        Card { title: &title, base_model: Some(base_name), method, pipeline_tag, facts: &facts }.render()
    }
}

/// The largest directions of a change as factors, the singular values on the left one; none of nothing.
fn factored(change_oi: &Tensor, keep: Keep) -> attune_points::Result<Option<Factored>> {
    let all = linalg::svd(change_oi)?;
    let squares: Vec<f64> = all.s.to_vec1::<f64>()?.iter().map(|s| s * s).collect();
    let total: f64 = squares.iter().sum();
    if total == 0.0 {
        return Ok(None);
    }
    let rank = match keep {
        Keep::Rank(rank) => {
            // What rounding leaves of a change of fewer directions is none of it.
            let least = f64::from(f32::EPSILON).powi(2) * total;
            rank.min(squares.iter().filter(|square| **square > least).count())
        }
        Keep::Share(share) => {
            let mut held = 0.0;
            let before = squares.iter().take_while(|square| {
                let goes_on = held < share * total;
                held += **square;
                goes_on
            });
            before.count()
        }
    };
    let rank = rank.max(1);
    let kept = Kept { rank, share: squares[..rank].iter().sum::<f64>() / total };
    let Svd { u, s, v } = all.triples(0, rank)?;
    let b_or = u.broadcast_mul(&s.unsqueeze(0)?)?;
    Ok(Some((b_or.to_dtype(DType::F32)?, v.to_dtype(DType::F32)?.contiguous()?, kept)))
}

#[cfg(test)]
mod tests {
    use attune_tensor::Rng;

    use super::*;

    fn normal(name: &str, shape: [usize; 2]) -> Tensor {
        Rng::new(1, name).normal_tensor(&shape[..], 1.0, DType::F64).unwrap()
    }

    fn square(x: &Tensor) -> f64 {
        x.sqr().unwrap().sum_all().unwrap().to_scalar().unwrap()
    }

    #[test]
    fn what_is_off_is_what_was_not_kept() {
        for shape in [[9, 6], [6, 9]] {
            let change = normal("change", shape);
            let mut before = f64::INFINITY;
            for rank in 1..=6 {
                let (b, a, kept) = factored(&change, Keep::Rank(rank)).unwrap().unwrap();
                assert_eq!((kept.rank, b.dims(), a.dims()), (rank, &[shape[0], rank][..], &[rank, shape[1]][..]));
                let made = b.matmul(&a).unwrap().to_dtype(DType::F64).unwrap();
                let off = square(&(&change - made).unwrap()) / square(&change);
                assert!((off - (1.0 - kept.share)).abs() < 1e-6 && off < before, "{off} and {}", kept.share);
                before = off;
            }
        }
    }

    #[test]
    fn a_share_takes_the_fewest_directions_that_hold_it() {
        let change = normal("change", [9, 6]);
        let shares: Vec<f64> =
            (1..=6).map(|rank| factored(&change, Keep::Rank(rank)).unwrap().unwrap().2.share).collect();
        for (fewer, share) in shares.iter().enumerate() {
            let rank = |share| factored(&change, Keep::Share(share)).unwrap().unwrap().2.rank;
            assert_eq!(rank(share - 1e-9), fewer + 1);
            if fewer + 1 < shares.len() {
                assert_eq!(rank(share + 1e-9), fewer + 2);
            }
        }
    }

    #[test]
    fn a_change_of_few_directions_has_no_more_and_nothing_has_none() {
        let change = normal("b", [9, 2]).matmul(&normal("a", [2, 6])).unwrap();
        let (_, _, kept) = factored(&change, Keep::Rank(5)).unwrap().unwrap();
        assert_eq!(kept.rank, 2);
        assert!((kept.share - 1.0).abs() < 1e-12);
        assert!(factored(&(change * 0.0).unwrap(), Keep::Rank(5)).unwrap().is_none());
    }
}
