//! Statistics in a file: safetensors whose metadata says what each tensor is, of which base and of which data.
//!
//! The metadata has `format` (`attune-statistics-1`), `base` and `data` (digests), and `entries`: a list in JSON with one entry a
//! statistic. Sites that read the same rows share a tensor. The same statistics give the same bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use attune_architecture::SiteId;
use attune_artifacts::formats::safetensors::{self, Dtype, Header};
use attune_points::stats::{Counted, Covariance, Fisher, Gradient, Norms, Stat, What};
use attune_points::{Stats, StatsRequest};
use attune_spec::id::Digest;
use attune_tensor::Mapped;
use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::wanted::Wanted;

const FORMAT: &str = "attune-statistics-1";

/// What statistics are of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    /// The model: base, and what was on it.
    pub base: Digest,
    /// The data: what there is, how it becomes tokens, and what is learned of it. Which examples came first is the choice of who
    /// measured.
    pub data: Digest,
}

/// One statistic as it stands in the metadata.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    site: String,
    kind: String,
    /// Which rows count: `tokens` or `supervised`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    counted: Option<String>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    scaled: bool,
    examples: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    domains: Option<BTreeSet<u16>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rows: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    documents: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    denominator: Option<f64>,
    /// How many examples were summed over, where that is what is counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    counted_examples: Option<u64>,
    /// Names of its tensors, the main one first.
    tensors: Vec<String>,
}

impl Entry {
    fn of(request: &StatsRequest, site: &SiteId, stat: &Stat, tensors: Vec<String>) -> Self {
        let (counted, scaled) = match request.what {
            What::InputCovariance { rows, scaled } => (Some(rows), scaled),
            What::InputNorms { rows } => (Some(rows), false),
            What::Gradient | What::Fisher => (None, false),
        };
        let counted = counted.map(|counted| match counted {
            Counted::Tokens => "tokens".to_owned(),
            Counted::Supervised => "supervised".to_owned(),
        });
        let (rows, documents, denominator) = match stat {
            Stat::Covariance(Covariance { rows, documents, .. }) | Stat::Norms(Norms { rows, documents, .. }) => {
                (Some(*rows), Some(*documents), None)
            }
            Stat::Gradient(Gradient { denominator, .. }) => (None, None, Some(*denominator)),
            _ => (None, None, None),
        };
        let counted_examples = if let Stat::Fisher(found) = stat { Some(found.examples) } else { None };
        Self {
            site: site.to_string(),
            kind: request.what.name().to_owned(),
            counted,
            scaled,
            examples: request.examples,
            domains: request.domains.clone(),
            rows,
            documents,
            denominator,
            counted_examples,
            tensors,
        }
    }

    /// What was asked for; none if this build knows no such statistic.
    fn request(&self) -> Option<StatsRequest> {
        let rows = match self.counted.as_deref() {
            Some("tokens") => Some(Counted::Tokens),
            Some("supervised") => Some(Counted::Supervised),
            _ => None,
        };
        let scaled = self.scaled;
        let what = [What::Gradient, What::Fisher].into_iter().chain(
            rows.into_iter().flat_map(|rows| [What::InputCovariance { rows, scaled }, What::InputNorms { rows }]),
        );
        let what = what.into_iter().find(|what| what.name() == self.kind)?;
        Some(StatsRequest { what, examples: self.examples, domains: self.domains.clone() })
    }
}

/// The tensors of a statistic, the main one first.
fn tensors(stat: &Stat) -> Vec<&Tensor> {
    match stat {
        Stat::Covariance(found) => vec![&found.sum_ii, &found.sum_i],
        Stat::Norms(found) => vec![&found.sum_i],
        Stat::Gradient(found) => vec![&found.sum_oi],
        Stat::Fisher(found) => vec![&found.sum_oi],
        _ => Vec::new(),
    }
}

/// Writes statistics.
///
/// # Errors
/// [`Error`] naming the file.
pub fn save(path: &Path, stats: &Stats, origin: Origin) -> Result<(), Error> {
    let wrong = |message: String| Error::Content { path: path.to_owned(), message };
    // By what they are, and what they hold: sites that read the same rows share a tensor, wherever each came from.
    let (mut by_id, mut by_content) = (BTreeMap::<String, String>::new(), BTreeMap::new());
    let (mut entries, mut written) = (Vec::new(), Vec::new());
    for (request, site, stat) in stats.iter() {
        let mut own = Vec::new();
        for tensor in tensors(stat) {
            let id = format!("{:?}", tensor.id());
            let name = match by_id.get(&id) {
                Some(name) => name.clone(),
                None => {
                    let (dtype, data) = bytes(tensor)?;
                    let next = format!("{}.{site}", written.len());
                    let shape = tensor.dims().to_vec();
                    let name: &mut String = by_content.entry((dtype, shape, data)).or_insert_with(|| {
                        written.push((next.clone(), dtype));
                        next
                    });
                    by_id.insert(id, name.clone());
                    name.clone()
                }
            };
            own.push(name);
        }
        entries.push(Entry::of(request, site, stat, own));
    }
    let held: BTreeMap<&str, _> =
        by_content.iter().map(|((_, shape, data), name)| (name.as_str(), (shape, data))).collect();
    let views = written.iter().map(|(name, dtype)| {
        let (shape, data) = held[name.as_str()];
        safetensors::Tensor { name: name.clone(), dtype: *dtype, shape: shape.clone(), data }
    });
    let text = serde_json::to_string(&entries).map_err(|error| wrong(error.to_string()))?;
    let metadata = [
        ("format", FORMAT.to_owned()),
        ("base", origin.base.to_string()),
        ("data", origin.data.to_string()),
        ("entries", text),
    ];
    let metadata = metadata.map(|(name, value)| (name.to_owned(), value)).into_iter().collect();
    safetensors::write(path, &views.collect::<Vec<_>>(), &metadata).map_err(|error| wrong(error.to_string()))
}

fn bytes(tensor: &Tensor) -> Result<(Dtype, Vec<u8>), Error> {
    let flat = tensor.flatten_all()?;
    Ok(match tensor.dtype() {
        DType::F64 => (Dtype::F64, flat.to_vec1::<f64>()?.iter().flat_map(|x| x.to_le_bytes()).collect()),
        _ => {
            let flat = flat.to_dtype(DType::F32)?;
            (Dtype::F32, attune_tensor::bytes::of_f32(&flat.to_vec1::<f32>()?).into_owned())
        }
    })
}

/// Reads what is wanted of statistics that have to be of this origin.
///
/// # Errors
/// [`Error`] naming the file, and the base or the data if it is of others.
pub fn load(path: &Path, origin: Origin, wanted: &Wanted) -> Result<Stats, Error> {
    let wrong = |message: String| Error::Content { path: path.to_owned(), message };
    let file = std::fs::File::open(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
    drop(file);
    let header = Header::read(path).map_err(|error| wrong(error.to_string()))?;
    let metadata = |name: &str| header.metadata().get(name).map(String::as_str).unwrap_or_default();
    if metadata("format") != FORMAT {
        return Err(wrong(format!("has format {:?}; this build reads {FORMAT:?}", metadata("format"))));
    }
    for (name, expected) in [("base", origin.base), ("data", origin.data)] {
        if metadata(name) != expected.to_string() {
            return Err(wrong(format!("is of {name} {:?}; expected that of {expected}", metadata(name))));
        }
    }
    let entries: Vec<Entry> =
        serde_json::from_str(metadata("entries")).map_err(|error| wrong(format!("its entries: {error}")))?;
    let mapped = Mapped::open(path).map_err(|error| wrong(error.to_string()))?;
    let mut read: BTreeMap<String, Tensor> = BTreeMap::new();
    let mut stats = Stats::none();
    for entry in entries {
        let unknown = || wrong(format!("has a {:?} of {}, which this build does not know", entry.kind, entry.site));
        let (request, site) = (entry.request().ok_or_else(unknown)?, SiteId::from(entry.site.as_str()));
        if !wanted.has(&request, &site) {
            continue;
        }
        let mut own = Vec::new();
        for name in &entry.tensors {
            if let Some(tensor) = read.get(name) {
                own.push(tensor.clone());
                continue;
            }
            let found = mapped.get(name).map_err(|error| wrong(error.to_string()))?;
            let found = found.ok_or_else(|| wrong(format!("has no tensor {name:?}")))?;
            let tensor = found.to_tensor(found.dtype())?;
            own.push(tensor.clone());
            read.insert(name.clone(), tensor);
        }
        let stat = stat(&request, &entry, &own).ok_or_else(|| {
            wrong(format!("its {} of {} is not whole, or its tensors have other shapes", entry.kind, entry.site))
        })?;
        stats.insert(request, site, stat);
    }
    Ok(stats)
}

/// A statistic of its tensors, if they fit.
fn stat(request: &StatsRequest, entry: &Entry, own: &[Tensor]) -> Option<Stat> {
    let counts = || Some((entry.rows?, entry.documents?));
    match (request.what, own) {
        (What::InputCovariance { .. }, [sum_ii, sum_i]) => {
            let ((rows, documents), input) = (counts()?, sum_i.dims1().ok()?);
            let (sum_ii, sum_i) = (sum_ii.clone(), sum_i.clone());
            (sum_ii.dims() == [input, input]).then_some(Stat::Covariance(Covariance { sum_ii, sum_i, rows, documents }))
        }
        (What::InputNorms { .. }, [sum_i]) => {
            let (rows, documents) = counts()?;
            sum_i.dims1().ok()?;
            Some(Stat::Norms(Norms { sum_i: sum_i.clone(), rows, documents }))
        }
        (What::Gradient, [sum_oi]) => {
            sum_oi.dims2().ok()?;
            Some(Stat::Gradient(Gradient { sum_oi: sum_oi.clone(), denominator: entry.denominator? }))
        }
        (What::Fisher, [sum_oi]) => {
            sum_oi.dims2().ok()?;
            Some(Stat::Fisher(Fisher { sum_oi: sum_oi.clone(), examples: entry.counted_examples? }))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use attune_architecture::{Place, Site, SiteKind};
    use candle_core::Device;

    use super::*;

    fn origin(of: u8) -> Origin {
        Origin { base: Digest::from_bytes([of; 32]), data: Digest::from_bytes([2; 32]) }
    }

    fn some() -> Stats {
        let ramp = |shape: &[usize], dtype| {
            let n = shape.iter().product::<usize>() as f64;
            Tensor::arange(0.0, n, &Device::Cpu).unwrap().to_dtype(dtype).unwrap().reshape(shape).unwrap()
        };
        let request = |what, domains| StatsRequest { what, examples: 7, domains };
        let covariance = What::InputCovariance { rows: Counted::Supervised, scaled: true };
        let (sum_ii, sum_i) = (ramp(&[3, 3], DType::F32), ramp(&[3], DType::F64));
        let stat = Stat::Covariance(Covariance { sum_ii, sum_i: sum_i.clone(), rows: 11, documents: 5 });
        let mut stats = Stats::none();
        for site in ["a.q_proj", "a.k_proj"] {
            stats.insert(request(covariance, Some(BTreeSet::from([0, 3]))), site.into(), stat.clone());
        }
        let norms = What::InputNorms { rows: Counted::Tokens };
        stats.insert(request(norms, None), "b".into(), Stat::Norms(Norms { sum_i, rows: 4, documents: 1 }));
        let sum_oi = ramp(&[2, 3], DType::F32);
        let fisher = Stat::Fisher(Fisher { sum_oi: (&sum_oi * 2.0).unwrap(), examples: 6 });
        stats.insert(request(What::Gradient, None), "b".into(), Stat::Gradient(Gradient { sum_oi, denominator: 2.5 }));
        stats.insert(request(What::Fisher, None), "b".into(), fisher);
        stats
    }

    /// All that [`some`] has is wanted, and at `c` what it does not have.
    fn all() -> Wanted {
        let kind = SiteKind::Linear { output: 2, input: 3, bias: false, transposed: false };
        let at = |id: &str| Site {
            id: id.into(),
            kind,
            layer: Some(0),
            expert: None,
            place: Place::Attention,
            role: "linear",
        };
        let mut wanted = Wanted::default();
        for (request, site, _) in some().iter() {
            wanted.add(request, &[at(site.as_str()), at("c")]).unwrap();
        }
        wanted
    }

    /// All of it, as text with every bit.
    fn everything(stats: &Stats) -> Vec<String> {
        let each = stats.iter().map(|(request, site, stat)| {
            let bytes: Vec<_> = tensors(stat).into_iter().map(|tensor| bytes(tensor).unwrap().1).collect();
            format!("{request} at {site}: {:?}, {bytes:?}", Entry::of(request, site, stat, Vec::new()))
        });
        each.collect()
    }

    #[test]
    fn what_is_written_is_read_bit_by_bit_and_a_shared_tensor_is_there_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("statistics.safetensors");
        save(&path, &some(), origin(1)).unwrap();
        let read = load(&path, origin(1), &all()).unwrap();
        assert_eq!(everything(&read), everything(&some()));
        let names: Vec<String> = Mapped::open(&path).unwrap().names().map(str::to_owned).collect();
        assert_eq!(names.len(), 4, "{names:?}: sums of rows are one tensor here, too");
        let again = folder.path().join("again.safetensors");
        save(&again, &read, origin(1)).unwrap();
        assert!(std::fs::read(&path).unwrap() == std::fs::read(&again).unwrap());
    }

    #[test]
    fn what_is_not_wanted_stays_in_the_file_and_what_is_not_there_stays_wanted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("statistics.safetensors");
        save(&path, &some(), origin(1)).unwrap();
        assert!(load(&path, origin(1), &Wanted::default()).unwrap().is_empty());
        let read = load(&path, origin(1), &all()).unwrap();
        let lacking = all().beside(&read);
        let sites: BTreeSet<&str> = lacking.iter().flat_map(|(_, sites)| sites.keys().map(SiteId::as_str)).collect();
        assert_eq!(sites, BTreeSet::from(["c"]));
        assert_eq!(lacking.iter().count(), all().iter().count());
        assert!(!lacking.iter().any(|(request, _)| lacking.has(request, &"b".into())));
    }

    #[test]
    fn a_file_of_something_else_is_refused_with_what_it_is_of() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("statistics.safetensors");
        save(&path, &some(), origin(1)).unwrap();
        let error = load(&path, origin(9), &all()).unwrap_err().to_string();
        assert!(
            error.contains("is of base \"blake3:0101") && error.contains("expected that of blake3:0909"),
            "{error}"
        );
        let missing = load(&folder.path().join("none"), origin(1), &all()).unwrap_err();
        assert!(matches!(missing, Error::Io { .. }), "{missing}");
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 5]).unwrap();
        assert!(load(&path, origin(1), &all()).is_err(), "cut off");
        std::fs::write(&path, b"no tensors").unwrap();
        assert!(load(&path, origin(1), &all()).is_err(), "something else");
    }
}
