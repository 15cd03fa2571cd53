//! Attention within documents: rows of a pack are grouped by the length of their document, and documents of one length
//! attend together. Nothing is padded, no document sees another, and no matrix over the whole pack exists.
//!
//! Axes: N documents of one length, L rows of each, H heads, K key/value heads, G = H / K, W width of a head.

use std::collections::BTreeMap;

use attune_architecture::Architecture;
use attune_points::{Layout, Result};
use attune_tensor::ops;
use candle_core::{DType, Device, Tensor};

use crate::rope::RopeTables;

/// How the rows of a batch attend: the same for all layers.
#[derive(Debug)]
pub(crate) struct RowPlan {
    pub(crate) rope: Option<RopeTables>,
    /// The position of each row.
    pub(crate) positions: Vec<usize>,
    docs: Vec<std::ops::Range<u32>>,
    /// Row numbers in the order of the groups, and the way back; `None` if the rows are in that order already.
    reorder: Option<(Tensor, Tensor)>,
    /// Number of documents and their length, group by group.
    groups: Vec<(usize, usize)>,
    /// Additive masks `[L, L]` by length and window.
    masks: BTreeMap<(usize, Option<u64>), Tensor>,
}

impl RowPlan {
    /// `taken` says how many places are taken before each document.
    pub(crate) fn new(architecture: &Architecture, layout: &Layout, taken: &[usize], dtype: DType) -> Result<Self> {
        let docs = layout.docs().iter().zip(taken);
        let places: Vec<std::ops::Range<usize>> = docs.map(|(doc, &taken)| taken..taken + doc.n_rows()).collect();
        let mut by_length: BTreeMap<usize, Vec<std::ops::Range<u32>>> = BTreeMap::new();
        for doc in layout.docs().iter().filter(|doc| doc.n_rows() > 0) {
            by_length.entry(doc.n_rows()).or_default().push(doc.rows.clone());
        }
        let order: Vec<u32> = by_length.values().flatten().cloned().flatten().collect();
        let in_order = order.iter().enumerate().all(|(place, &row)| place as u32 == row);
        let reorder = if in_order {
            None
        } else {
            let mut back = vec![0u32; order.len()];
            for (place, &row) in order.iter().enumerate() {
                back[row as usize] = place as u32;
            }
            Some((Tensor::new(order, &Device::Cpu)?, Tensor::new(back, &Device::Cpu)?))
        };
        let mut masks = BTreeMap::new();
        for &length in by_length.keys() {
            for &window in &architecture.windows {
                if let Some(mask) = mask(length, window, architecture.causal, dtype)? {
                    masks.insert((length, window), mask);
                }
            }
        }
        Ok(Self {
            rope: RopeTables::new(architecture, &places, dtype)?,
            positions: places.into_iter().flatten().collect(),
            docs: layout.docs().iter().map(|doc| doc.rows.clone()).collect(),
            reorder,
            groups: by_length.into_iter().map(|(length, docs)| (docs.len(), length)).collect(),
            masks,
        })
    }

    /// Attention of all rows, each within its document: `q [T, H, W]`, `k` and `v [T, K, W]`, all rotated already, to
    /// `[T, H W]`. `before` has for each document keys and values `[P, K, W]` that all its rows see as well.
    pub(crate) fn attend(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        window: Option<u64>,
        before: &[Option<(Tensor, Tensor)>],
    ) -> Result<Tensor> {
        if before.iter().any(Option::is_some) {
            return self.attend_beyond(q, k, v, window, before);
        }
        let select = |x: &Tensor| match &self.reorder {
            Some((order, _)) => x.index_select(order, 0),
            None => Ok(x.clone()),
        };
        let (q, k, v) = (select(q)?, select(k)?, select(v)?);
        let mut outputs = Vec::with_capacity(self.groups.len());
        let mut start = 0;
        for &(n, length) in &self.groups {
            let rows = n * length;
            let part = |x: &Tensor| {
                let (_, heads, width) = x.dims3()?;
                x.narrow(0, start, rows)?.reshape((n, length, heads, width))
            };
            outputs.push(attend(&part(&q)?, &part(&k)?, &part(&v)?, self.masks.get(&(length, window)), 0)?);
            start += rows;
        }
        let o = if outputs.len() == 1 { outputs.remove(0) } else { Tensor::cat(&outputs, 0)? };
        match &self.reorder {
            Some((_, back)) => Ok(o.index_select(back, 0)?),
            None => Ok(o),
        }
    }
}

impl RowPlan {
    /// The same document by document, where some see more than their own rows.
    fn attend_beyond(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        window: Option<u64>,
        before: &[Option<(Tensor, Tensor)>],
    ) -> Result<Tensor> {
        let mut outputs = Vec::with_capacity(self.docs.len());
        for (doc, before) in self.docs.iter().zip(before).filter(|(doc, _)| !doc.is_empty()) {
            let part = |x: &Tensor| x.narrow(0, doc.start as usize, doc.len());
            let (q, k, v) = (part(q)?, part(k)?, part(v)?);
            let (k, v) = match before {
                Some((first_k, first_v)) => (Tensor::cat(&[first_k, &k], 0)?, Tensor::cat(&[first_v, &v], 0)?),
                None => (k, v),
            };
            let extra = k.dim(0)? - doc.len();
            let mask = self.masks.get(&(doc.len(), window));
            outputs.push(attend(&q.unsqueeze(0)?, &k.unsqueeze(0)?, &v.unsqueeze(0)?, mask, extra)?);
        }
        Ok(Tensor::cat(&outputs, 0)?)
    }
}

/// The additive mask of documents of one length, `[L, L]`: causal or not, and within a window if there is one, which hides rows
/// more than `window - 1` rows away. `None` if every query sees every key.
fn mask(length: usize, window: Option<u64>, causal: bool, dtype: DType) -> Result<Option<Tensor>> {
    let sees = |row: usize, key: usize| {
        (key <= row || !causal) && window.is_none_or(|window| row.abs_diff(key) < window as usize)
    };
    let values: Vec<f32> = (0..length)
        .flat_map(|row| (0..length).map(move |key| if sees(row, key) { 0.0 } else { f32::NEG_INFINITY }))
        .collect();
    if values.iter().all(|&value| value == 0.0) {
        return Ok(None);
    }
    Ok(Some(Tensor::from_vec(values, (length, length), &Device::Cpu)?.to_dtype(dtype)?))
}

/// `softmax(q kᵀ / sqrt(W) + mask) v` for documents of one shape: `q [N, L, H, W]`, `k` and `v [N, P + L, K, W]`, mask `[L, L]`
/// of the last L keys, to `[N L, H W]`. Query head h reads key head h / G, and all see the first P keys.
fn attend(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>, extra: usize) -> Result<Tensor> {
    let (n, l, h, w) = q.dims4()?;
    let kv = k.dim(2)?;
    let g = h / kv;
    let scaled = (q * (1.0 / (w as f64).sqrt()))?;
    let q_nkgl =
        scaled.reshape((n, l, kv, g, w))?.permute((0, 2, 3, 1, 4))?.contiguous()?.reshape((n, kv, g * l, w))?;
    let k_nkwl = k.permute((0, 2, 3, 1))?.contiguous()?;
    let v_nklw = v.transpose(1, 2)?.contiguous()?;
    let scores = q_nkgl.matmul(&k_nkwl)?;
    let scores = match mask {
        Some(mask) => {
            let mask = mask.pad_with_zeros(1, extra, 0)?;
            let all = l + extra;
            scores.reshape((n * kv * g, l, all))?.broadcast_add(&mask)?.reshape((n, kv, g * l, all))?
        }
        None => scores,
    };
    let o = ops::softmax(&scores)?.matmul(&v_nklw)?;
    Ok(o.reshape((n, kv, g, l, w))?.permute((0, 3, 1, 2, 4))?.contiguous()?.reshape((n * l, h * w))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_show_the_past_within_the_window() {
        let of = |length, window, causal| {
            let mask = mask(length, window, causal, DType::F32).unwrap();
            mask.map(|mask| {
                mask.to_vec2::<f32>().unwrap().iter().map(|row| row.iter().map(|v| *v == 0.0).collect()).collect()
            })
        };
        let expect = |rows: &[&[u8]]| -> Option<Vec<Vec<bool>>> {
            Some(rows.iter().map(|row| row.iter().map(|v| *v == 1).collect()).collect())
        };
        assert_eq!(of(3, None, true), expect(&[&[1, 0, 0], &[1, 1, 0], &[1, 1, 1]]));
        assert_eq!(of(3, Some(2), true), expect(&[&[1, 0, 0], &[1, 1, 0], &[0, 1, 1]]));
        assert_eq!(of(1, Some(2), true), None);
        assert_eq!(of(3, None, false), None);
        assert_eq!(of(3, Some(2), false), expect(&[&[1, 1, 0], &[1, 1, 1], &[0, 1, 1]]));
    }
}
