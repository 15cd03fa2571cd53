//! Which entries of a weight stay, a bit each, and how they are chosen.

use attune_points::stats::Norms;
use attune_points::{Error, Locals, Result, TensorSpec, Weight};
use candle_core::{DType, Device, Tensor};

/// The local name of the bits.
pub(crate) const MASK: &str = "mask";

/// Bits of a number of a mask.
const WORD: usize = 64;

/// The bits of a matrix of so many entries, 64 of them a number, the first one in its lowest bit.
pub(crate) fn spec(entries: usize) -> TensorSpec {
    TensorSpec::fixed(MASK, [entries.div_ceil(WORD)])
}

/// The bits of some entries.
///
/// # Errors
/// Whatever making the tensor raises.
pub(crate) fn packed(stays: &[bool]) -> Result<Tensor> {
    let word = |bits: &[bool]| (0..).zip(bits).fold(0u64, |word, (at, stays)| word | u64::from(*stays) << at);
    let words: Vec<i64> = stays.chunks(WORD).map(|bits| word(bits).cast_signed()).collect();
    Ok(Tensor::new(words, &Device::Cpu)?)
}

/// The bits of entries that all stay.
///
/// # Errors
/// As for [`packed`].
pub(crate) fn whole(entries: usize) -> Result<Tensor> {
    packed(&vec![true; entries])
}

/// Which of so many entries stay.
///
/// # Errors
/// [`Error::Refused`] of bits of another matrix.
pub(crate) fn unpacked(words: &Tensor, entries: usize) -> Result<Vec<bool>> {
    let words = words.to_vec1::<i64>()?;
    if words.len() != entries.div_ceil(WORD) {
        return Err(Error::Refused(format!("a mask has {} words; {entries} entries have another number", words.len())));
    }
    Ok((0..entries).map(|at| words[at / WORD].cast_unsigned() >> (at % WORD) & 1 == 1).collect())
}

/// The bits as a matrix like `w_oi`: 1 where an entry stays, 0 elsewhere.
///
/// # Errors
/// As for [`unpacked`].
pub(crate) fn as_matrix(words: &Tensor, w_oi: &Tensor) -> Result<Tensor> {
    let stays = unpacked(words, w_oi.elem_count())?;
    let bytes: Vec<u8> = stays.into_iter().map(u8::from).collect();
    Ok(Tensor::from_vec(bytes, w_oi.shape(), w_oi.device())?.to_dtype(w_oi.dtype())?)
}

/// A tensor of the attachment's, if it is declared.
pub(crate) fn optional<'a>(tensors: &'a Locals, local: &str) -> Option<&'a Tensor> {
    tensors.iter().find(|(name, _)| *name == local).map(|(_, tensor)| tensor)
}

/// What stays of a weight: all of it, where `tensors` has no mask.
///
/// # Errors
/// As for [`unpacked`].
pub(crate) fn kept(w_oi: &Tensor, tensors: &Locals) -> Result<Tensor> {
    match optional(tensors, MASK) {
        Some(words) => Ok((w_oi * as_matrix(words, w_oi)?)?),
        None => Ok(w_oi.clone()),
    }
}

/// A change where a weight is not 0, and 0 where it is.
///
/// # Errors
/// Shapes that do not fit.
pub(crate) fn within(change_oi: &Tensor, w_oi: &Tensor) -> Result<Tensor> {
    Ok((change_oi * w_oi.ne(0.0)?.to_dtype(change_oi.dtype())?)?)
}

/// The bits of the entries of each row that matter most to what a linear gives: the largest `|w_oi| ‖x_i‖`, and of equal ones the first. A
/// share `sparsity` of each row goes, rounded down.
///
/// # Errors
/// Norms of inputs of another width; a weight that cannot be read.
pub(crate) fn by_inputs(weight: &dyn Weight, inputs: &Norms, sparsity: f64) -> Result<Tensor> {
    let (o, i) = weight.shape();
    let norms = inputs.sum_i.to_dtype(DType::F64)?.to_vec1::<f64>()?;
    if norms.len() != i {
        return Err(Error::Refused(format!("inputs have {} norms; the weight reads {i}", norms.len())));
    }
    let lengths: Vec<f64> = norms.into_iter().map(f64::sqrt).collect();
    let kept = i - (sparsity * i as f64 + 1e-9).floor() as usize;
    let mut stays = vec![false; o * i];
    for row in 0..o {
        let w_i = weight.rows(row..row + 1, DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let scores: Vec<f32> =
            w_i.iter().zip(&lengths).map(|(w, length)| (f64::from(w.abs()) * length) as f32).collect();
        super::sparse::largest(&scores, kept).into_iter().for_each(|at| stays[row * i + at] = true);
    }
    packed(&stays)
}

/// The `count`-th largest of scores that come piece by piece, whole numbers of 32 bits, and how many of those that equal it are among the
/// `count` first. `pieces` goes through all scores in the same order whenever it is called; none is kept.
///
/// # Errors
/// Whatever `pieces` raises.
pub(crate) fn threshold(
    count: u64,
    mut pieces: impl FnMut(&mut dyn FnMut(&[u32])) -> Result<()>,
) -> Result<(u32, u64)> {
    const HALF: usize = 1 << 16;
    if count == 0 {
        return Ok((u32::MAX, 0));
    }
    // The upper half of the number first, then the lower half of those that have that: two passes, and no list of all scores.
    let mut left = count;
    let mut found = |counts: &[u64]| {
        for (half, n) in counts.iter().enumerate().rev() {
            if *n >= left {
                return half as u32;
            }
            left -= n;
        }
        0
    };
    let mut counts = vec![0u64; HALF];
    pieces(&mut |scores| scores.iter().for_each(|score| counts[(score >> 16) as usize] += 1))?;
    let upper = found(&counts);
    counts.fill(0);
    let mut lower = |scores: &[u32]| {
        let of_upper = scores.iter().filter(|score| **score >> 16 == upper);
        of_upper.for_each(|score| counts[(score & 0xffff) as usize] += 1);
    };
    pieces(&mut lower)?;
    let lower = found(&counts);
    Ok((upper << 16 | lower, left))
}

#[cfg(test)]
mod tests {
    use attune_tensor::rng::Rng;

    use super::*;

    #[test]
    fn bits_are_read_as_they_were_written() {
        for entries in [1, 63, 64, 65, 200] {
            let stays: Vec<bool> = (0..entries).map(|at| at * at % 7 < 3).collect();
            let words = packed(&stays).unwrap();
            assert_eq!(words.dims(), spec(entries).shape);
            assert_eq!(unpacked(&words, entries).unwrap(), stays);
            assert!(unpacked(&words, entries + WORD).is_err());
        }
        let w_oi = Rng::new(1, "w").normal_tensor((3, 30), 1.0, DType::F64).unwrap();
        let ones = as_matrix(&whole(90).unwrap(), &w_oi).unwrap();
        assert_eq!((ones.dims(), ones.sum_all().unwrap().to_scalar::<f64>().unwrap()), ([3, 30].as_slice(), 90.0));
    }

    fn norms(squares: &[f64]) -> Norms {
        Norms { sum_i: Tensor::new(squares, &Device::Cpu).unwrap(), rows: 7, documents: 1 }
    }

    /// A channel that nothing comes through goes first, however large its weights are; and a row keeps its share whatever others are.
    #[test]
    fn what_reads_nothing_goes_first_and_every_row_keeps_its_share() {
        let w = Rng::new(1, "w").normal_tensor((6, 8), 1.0, DType::F32).unwrap();
        let large = Tensor::new(&[1f32, 1.0, 1.0, 100.0, 1.0, 1.0, 1.0, 1.0], &Device::Cpu).unwrap();
        let rows = Tensor::new(&[[1e-4f32], [1.0], [1.0], [1.0], [1.0], [1e3]], &Device::Cpu).unwrap();
        let w = w.broadcast_mul(&large).unwrap().broadcast_mul(&rows).unwrap();
        let mut squares = [4.0; 8];
        squares[3] = 0.0;
        for (sparsity, kept) in [(0.13, 7), (0.5, 4), (0.9, 1)] {
            let stays = unpacked(&by_inputs(&w, &norms(&squares), sparsity).unwrap(), 48).unwrap();
            for row in stays.chunks(8) {
                assert_eq!(row.iter().filter(|stays| **stays).count(), kept);
                assert!(!row[3], "the dead channel stays at {sparsity}");
            }
        }
        // By their size alone, the same channel is the last to go.
        let by_size = unpacked(&by_inputs(&w, &norms(&[4.0; 8]), 0.5).unwrap(), 48).unwrap();
        assert!(by_size.chunks(8).all(|row| row[3]));
        assert!(by_inputs(&w, &norms(&[1.0; 7]), 0.5).is_err());
    }

    #[test]
    fn the_least_of_the_largest_is_found_among_pieces() {
        let mut rng = Rng::new(3, "scores");
        // Few different numbers, so that many are equal, and numbers that differ in their lower half alone.
        let scores: Vec<u32> = (0..500).map(|_| (rng.below(5) as u32) << 16 | rng.below(4) as u32).collect();
        for count in [1, 2, 17, 250, 499, 500] {
            let pieces = |take: &mut dyn FnMut(&[u32])| {
                scores.chunks(37).for_each(take);
                Ok(())
            };
            let (least, equal) = threshold(count, pieces).unwrap();
            let mut sorted = scores.clone();
            sorted.sort_unstable_by(|a, b| b.cmp(a));
            assert_eq!(least, sorted[count as usize - 1]);
            let above = scores.iter().filter(|score| **score > least).count() as u64;
            assert_eq!(above + equal, count);
        }
        assert_eq!(threshold(0, |_| Ok(())).unwrap(), (u32::MAX, 0));
    }
}
