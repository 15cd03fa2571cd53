//! Keys and values that attentions make of a text.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use attune_architecture::SiteId;
use attune_points::stats::KeysValues;
use attune_points::{Layout, Result, Stats, Tap};
use attune_tensor::kernels::Kernels;
use attune_tensor::view::{MatRef, ViewMut};
use candle_core::{Device, Tensor};

use crate::measure::Model;

/// Reads a text, as tokens, in one pass of the model, and adds what these attentions made of it.
///
/// # Errors
/// Whatever the pass raises.
pub(crate) fn read(model: &mut dyn Model, tokens: &[u32], sites: &BTreeSet<SiteId>, stats: &mut Stats) -> Result<()> {
    let reading = Reading { sites, found: Mutex::default() };
    model.look(&[Arc::new(Layout::single(tokens))], &reading)?;
    for (site, made) in reading.found.into_inner().unwrap_or_else(PoisonError::into_inner) {
        stats.insert_text(tokens, site, made);
    }
    Ok(())
}

struct Reading<'a> {
    sites: &'a BTreeSet<SiteId>,
    found: Mutex<BTreeMap<SiteId, KeysValues>>,
}

impl Tap for Reading<'_> {
    fn wants(&self, site: &SiteId) -> bool {
        self.sites.contains(site)
    }

    fn read(&self, _: &SiteId, _: usize, _: Option<&[u32]>, _: MatRef<'_>, _: &dyn Kernels) -> Result<()> {
        Ok(())
    }

    fn keys_values(&self, site: &SiteId, _: usize, k: MatRef<'_>, v: MatRef<'_>, kernels: &dyn Kernels) -> Result<()> {
        let made = KeysValues { keys_tk: wide(k, kernels)?, values_tk: wide(v, kernels)? };
        self.found.lock().unwrap_or_else(PoisonError::into_inner).insert(site.clone(), made);
        Ok(())
    }
}

/// A copy in 32 bits.
fn wide(x: MatRef<'_>, kernels: &dyn Kernels) -> Result<Tensor> {
    let (rows, cols) = (x.rows(), x.cols());
    let mut values = vec![0.0f32; rows * cols];
    kernels.convert(x, ViewMut::new(&mut values, rows, cols).into());
    Ok(Tensor::from_vec(values, (rows, cols), &Device::Cpu)?)
}
