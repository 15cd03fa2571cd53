//! What initialisations ask to have measured on the job's data.

use std::collections::BTreeSet;

use attune_points::stats::{Counted, Covariance};
use attune_points::{Error, Result};
use attune_spec::method::BuildCx;
use attune_spec::{Fault, FieldPath, suggest};
use attune_tensor::ops;
use candle_core::{DType, Device, Tensor, TensorId};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Which rows of a document count.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Rows {
    /// Those whose next token is learned.
    #[default]
    Supervised,
    /// All tokens.
    Tokens,
}

impl Rows {
    pub(crate) const fn counted(self) -> Counted {
        match self {
            Self::Supervised => Counted::Supervised,
            Self::Tokens => Counted::Tokens,
        }
    }
}

/// The numbers of domains of the job by their names; all of them if there is no list.
///
/// # Errors
/// One fault for each name that no domain has.
pub(crate) fn domains(
    names: Option<&Vec<String>>,
    cx: &BuildCx<'_>,
) -> std::result::Result<Option<BTreeSet<u16>>, Vec<Fault>> {
    let Some(names) = names else { return Ok(None) };
    let known: Vec<&str> = cx.domains.iter().map(|(name, _)| name.as_str()).collect();
    let (mut found, mut faults) = (BTreeSet::new(), Vec::new());
    for (index, name) in names.iter().enumerate() {
        if let Some(number) = known.iter().position(|known| known == name) {
            found.insert(number as u16);
        } else {
            let hint = suggest::hint(name, known.iter().copied());
            let message = format!("is {name:?}, which is no domain of the job ({}){hint}", known.join(", "));
            faults.push(Fault::new(FieldPath::from("domains").index(index), message));
        }
    }
    // Without data there is nothing to compare names with.
    if faults.is_empty() || known.is_empty() { Ok(Some(found)) } else { Err(faults) }
}

/// The covariance about the mean, times the number of rows: `Σ_t (x_t - m)(x_t - m)ᵀ`, in f64.
///
/// # Errors
/// Whatever the operations raise.
pub(crate) fn centred(found: &Covariance) -> Result<Tensor> {
    let mean_i = (&found.sum_i / found.rows as f64)?;
    let outer_ii = ops::matmul(&mean_i.unsqueeze(1)?, &found.sum_i.unsqueeze(0)?)?;
    Ok((found.sum_ii.to_dtype(DType::F64)? - outer_ii)?)
}

/// What is added to a covariance that is inverted, in its mean variance, where nothing else is said.
pub(crate) const DAMP: f64 = 0.01;

/// The covariance a document, in f64, with `damp` times its mean variance added to each: one that has an inverse.
///
/// # Errors
/// Whatever the operations raise.
pub(crate) fn damped(found: &Covariance, damp: f64) -> Result<Tensor> {
    let c_ii = (found.sum_ii.to_dtype(DType::F64)? / found.documents as f64)?;
    let input = c_ii.dim(0)?;
    let unit_ii = Tensor::eye(input, DType::F64, &Device::Cpu)?;
    let mean = (&c_ii * &unit_ii)?.sum_all()?.to_scalar::<f64>()? / input as f64;
    // Where nothing was read but zeros, all directions are alike.
    let mean = if mean > 0.0 { mean } else { 1.0 };
    Ok((c_ii + (unit_ii * (damp * mean))?)?)
}

/// What is made of each of some statistics, once for those that share a tensor, in parallel.
///
/// # Errors
/// The first error of `of`.
pub(crate) fn once_for_each<S: Sync, T: Clone + Send>(
    found: &[S],
    tensor: impl Fn(&S) -> TensorId,
    of: impl Fn(&S) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let (mut unlike, mut which) = (Vec::<&S>::new(), Vec::with_capacity(found.len()));
    for found in found {
        which.push(unlike.iter().position(|other| tensor(other) == tensor(found)).unwrap_or_else(|| {
            unlike.push(found);
            unlike.len() - 1
        }));
    }
    let made = unlike.par_iter().map(|found| of(found)).collect::<Result<Vec<T>>>()?;
    Ok(which.into_iter().map(|which| made[which].clone()).collect())
}

/// Refuses fewer rows than directions that are to be found in them.
///
/// # Errors
/// [`Error::Refused`], with what would do.
pub(crate) fn enough(rows: u64, rank: usize, site: &str) -> Result<()> {
    if rows > rank as u64 {
        return Ok(());
    }
    Err(Error::Refused(format!("{rows} rows of the data count at {site}; rank {rank} needs more: raise `examples`")))
}
