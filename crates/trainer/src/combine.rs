//! Several adapters to one: folders in PEFT's layout, site by site through a merge, to a folder in the same layout.
//!
//! Weights of a base are read only where an adapter's folder leaves out what they say, for what adapters add is known without; its `config.json`
//! says which sites there are.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use attune_adapt::held::{self, Held};
use attune_adapt::joined::{of_pairs, pairs};
use attune_adapt::{ADAPTERS, headed, peft};
use attune_architecture::{Architecture, SiteId, targets};
use attune_artifacts::formats::card::Card;
use attune_artifacts::formats::peft::is_hub_id;
use attune_merge::{Drawn, MERGES, Pair, Space, combined};
use attune_models::Base;
use attune_points::merge::Keeps;
use attune_spec::FieldPath;
use attune_spec::id::{Digest, Step};
use attune_spec::job::{HeadSpec, Precision};
use attune_spec::method::{BuildCx, Merges, MethodRef};
use attune_tensor::Rng;
use serde::Serialize;

use crate::error::Error;
use crate::few;
use crate::pin;

/// What is combined, and how.
#[derive(Debug, Clone)]
pub struct Combine<'a> {
    /// The folder of the base that all of them were trained on.
    pub base: &'a Path,
    /// The adapters.
    pub of: &'a [Part],
    /// The merge.
    pub method: &'a MethodRef,
    /// Where it works.
    pub space: Space,
    /// Of what is drawn at random.
    pub seed: u64,
}

/// One of the adapters.
#[derive(Debug, Clone)]
pub struct Part {
    /// What it is called in the card of what is made: never a path.
    pub name: String,
    /// Its folder.
    pub folder: PathBuf,
    /// Its weight.
    pub weight: f64,
}

/// What was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Combined {
    /// Sites that have an adapter.
    pub sites: usize,
    /// The largest rank among them.
    pub rank: usize,
    /// Numbers of the adapter.
    pub parameters: usize,
}

/// One adapter, as it is combined.
struct Read {
    folder: peft::Folder,
    held: Option<Held>,
    pairs: BTreeMap<SiteId, Pair>,
}

impl Combine<'_> {
    /// Combines the adapters and writes the one that they become into the folder `to`. The same adapters, weights and seed give the same
    /// bytes.
    ///
    /// # Errors
    /// [`Error`] naming the adapter, the site or the parameter at fault.
    pub fn run(&self, to: &Path) -> Result<Combined, Error> {
        let drawn = Rng::new(self.seed, "merge");
        self.run_with(to, &|site| Box::new(Drawn::at(&drawn, site.as_str())))
    }

    /// The same where somebody else says which entries are kept, site by site in the order of the base.
    ///
    /// # Errors
    /// As for [`Combine::run`].
    pub fn run_with<'k>(&self, to: &Path, keeps: &dyn Fn(&SiteId) -> Box<dyn Keeps + 'k>) -> Result<Combined, Error> {
        let cx = BuildCx { steps: Step(0), domains: &[], words: None };
        let merge = MERGES.build(self.method, &FieldPath::from("method"), &cx).map_err(Error::Faults)?;
        let of_nothing = || Error::Input { input: "of".to_owned(), message: "names no adapter".to_owned() };
        let config = self.base.join("config.json");
        let text = std::fs::read(&config).map_err(Error::io(&config))?;
        let architecture = Architecture::from_json(&text).map_err(|error| of_folder(self.base, error.to_string()))?;
        let folders: Vec<PathBuf> = self.of.iter().map(|part| part.folder.clone()).collect();
        let head = few::head_of(&folders)?;
        let architecture = match &head {
            Some(head) => architecture.over(head).map_err(|fault| Error::Faults(vec![fault]))?,
            None => architecture,
        };
        let mut read: Vec<Read> = Vec::with_capacity(self.of.len());
        let mut repeated = None;
        for part in self.of {
            let folder = peft::read(&part.folder)?;
            if let Some(saved) = &folder.saved {
                let modules = saved.targets.entries().join(", ");
                let message = format!("keeps modules whole beside the adapter, which have no sum: {modules}");
                return Err(of_folder(&part.folder, message));
            }
            let base = match (&folder.ranges, read.first()) {
                (ranges, Some(first)) if *ranges != first.folder.ranges => {
                    let message = "has other layers of its base repeated than the first one: no base is both";
                    return Err(of_folder(&part.folder, message.to_owned()));
                }
                (Some(ranges), _) => repeated.insert(architecture.repeating(ranges).map_err(Error::Faults)?),
                (None, _) => &architecture,
            };
            let one = one(part, folder, (base, self.base), &cx)?;
            if let Some(first) = read.first() {
                belongs(&one, first, &part.folder)?;
            }
            read.push(one);
        }
        let first = read.first().ok_or_else(of_nothing)?;
        let base_name = base_name(first.folder.base.as_deref(), self.base)?;
        let architecture = repeated.unwrap_or(architecture);
        // The largest of all sites, for what is made of changes may have more rank than any of them.
        let ranks = read.iter().flat_map(|one| one.pairs.values()).map(|pair| pair.a_ri.dim(0));
        let largest = ranks.collect::<candle_core::Result<Vec<usize>>>()?.into_iter().max();
        let space = match self.space {
            Space::Changes { rank, clamp } => Space::Changes { rank: rank.or(largest), clamp },
            space => space,
        };
        let mut made = BTreeMap::new();
        for site in architecture.sites() {
            let at: Vec<(Pair, f64)> = read
                .iter()
                .zip(self.of)
                .filter_map(|(one, part)| Some((one.pairs.get(&site.id)?.clone(), part.weight)))
                .collect();
            if at.is_empty() {
                continue;
            }
            let pair = combined(&at, &*merge, space, &mut *keeps(&site.id))
                .map_err(|error| Error::Input { input: site.id.to_string(), message: error.to_string() })?;
            made.insert(site.id, (pair.b_or, pair.a_ri));
        }
        let ranks = made.values().map(|(_, a_ri)| a_ri.dim(0)).collect::<candle_core::Result<Vec<usize>>>()?;
        let joined = of_pairs(made, &architecture)?;
        let card = self.card(&base_name, head.as_ref().is_some_and(HeadSpec::gives_vectors));
        let part = peft::Part { adapter: &*joined.adapter, attachments: &joined.attachments, params: &joined.params };
        peft::write(to, part, None, &architecture, &base_name, &card)?;
        if let Some(held) = &first.held {
            held::write(to, held, None)?;
        }
        if let Some(head) = &head {
            headed::write(to, head, architecture.hidden, None)?;
        }
        Ok(Combined {
            sites: ranks.len(),
            rank: ranks.into_iter().max().unwrap_or_default(),
            parameters: joined.params.iter().map(|(_, tensor)| tensor.elem_count()).sum(),
        })
    }

    fn card(&self, base_name: &str, gives_vectors: bool) -> String {
        let method = &self.method.method;
        let of: Vec<String> = self.of.iter().map(|part| format!("{} times {}", part.weight, part.name)).collect();
        let facts = [
            ("merge", serde_json::to_string(self.method).unwrap_or_default()),
            ("space", serde_json::to_string(&self.space).unwrap_or_default()),
            ("of", of.join(", ")),
            ("seed", self.seed.to_string()),
        ];
        let title = format!("{} adapters combined", self.of.len());
        let pipeline_tag = if gives_vectors { "sentence-similarity" } else { "text-generation" };
        Card { title: &title, base_model: Some(base_name), method, pipeline_tag, facts: &facts }.render()
    }
}

/// What a base in this folder is called in files that go elsewhere, by what an adapter's folder says of it.
pub(crate) fn base_name(said: Option<&str>, base: &Path) -> Result<String, Error> {
    match said {
        Some(name) if is_hub_id(name) || name.parse::<Digest>().is_ok() => Ok(name.to_owned()),
        // A path means nothing elsewhere, so the base is named by its content.
        _ => Ok(pin::content(base)?.to_string()),
    }
}

pub(crate) fn of_folder(folder: &Path, message: String) -> Error {
    Error::Input { input: folder.display().to_string(), message }
}

/// What an adapter adds, at which sites of a base that lies there.
fn one(
    part: &Part,
    mut folder: peft::Folder,
    (base, base_folder): (&Architecture, &Path),
    cx: &BuildCx<'_>,
) -> Result<Read, Error> {
    let Part { folder: path, weight, .. } = part;
    if !weight.is_finite() {
        return Err(of_folder(path, format!("has the weight {weight}; expected a number")));
    }
    let of_faults = |faults: Vec<attune_spec::Fault>| {
        of_folder(path, faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))
    };
    let method = &folder.method.method;
    let card = ADAPTERS.card(method);
    if card.is_none_or(|card| card.merges != Merges::Factors) {
        let message = format!(
            "is of {method}, which is no product of two factors beside a weight; expected LoRA or what is written as it"
        );
        return Err(of_folder(path, message));
    }
    let applies = card.map(|card| card.applies).unwrap_or_default();
    let adapter = ADAPTERS.build(&folder.method, &FieldPath::from("adapter"), cx).map_err(of_faults)?;
    let sites = targets::resolve(&folder.targets, None, base, |site| applies.contains(&site.offers()));
    let sites = sites.map_err(of_faults)?;
    let attachments = adapter.attach(base, &sites).map_err(of_faults)?;
    if !adapter.said_by_base().is_empty() {
        let opened = Base::open(base_folder, Precision::F32)?;
        folder.complete(&*adapter, &attachments, |at| {
            let site = sites.iter().find(|site| site.id == at.site);
            let none = || attune_points::Error::Refused(format!("the base has no {}", at.site));
            Ok(Box::new(opened.weight(site.ok_or_else(none)?)))
        })?;
    }
    let params = folder.params(&*adapter, &attachments)?;
    let found = pairs(&*adapter, &attachments, &params, base).map_err(|error| of_folder(path, error.to_string()))?;
    let held = held::read(path)?;
    if held::read_less(path, &attachments)?.is_some() {
        let message = "stands beside weights of its base that were quantised anew for it alone, which another adapter does not know; merge \
                       it into a base first (`outputs.merged_into` of the job that made it)";
        return Err(of_folder(path, message.to_owned()));
    }
    let pairs = found.into_iter().map(|(site, (b_or, a_ri, scale))| (site, Pair { b_or, a_ri, scale })).collect();
    Ok(Read { folder, held, pairs })
}

/// Whether an adapter was trained on the base of the first one, as far as their folders say.
fn belongs(one: &Read, first: &Read, path: &Path) -> Result<(), Error> {
    if one.held != first.held {
        let message =
            "was trained on a base whose weights were held in another way than that of the first one: no base is both";
        return Err(of_folder(path, message.to_owned()));
    }
    let digest = |read: &Read| read.folder.base.as_deref().and_then(|name| name.parse::<Digest>().ok());
    // The same base may have several names, but its content has one digest.
    match (digest(one), digest(first)) {
        (Some(own), Some(other)) if own != other => {
            let message = format!(
                "was trained on the base {own}, and the first one on {other}: their changes mean nothing together"
            );
            Err(of_folder(path, message))
        }
        _ => Ok(()),
    }
}
