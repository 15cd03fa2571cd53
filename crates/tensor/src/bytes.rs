//! Numbers as they lie in files and travel: little endian, one after the other.

use std::borrow::Cow;

/// The bytes of numbers; the numbers' own where the machine has them in that order.
pub fn of_f32(values: &[f32]) -> Cow<'_, [u8]> {
    if cfg!(target_endian = "little") {
        return Cow::Borrowed(bytemuck::cast_slice(values));
    }
    Cow::Owned(values.iter().flat_map(|value| value.to_le_bytes()).collect())
}

/// The numbers of bytes; what is left of them after whole numbers says nothing.
pub fn to_f32(bytes: &[u8]) -> Vec<f32> {
    let (whole, _) = bytes.as_chunks::<{ size_of::<f32>() }>();
    let mut values = vec![0.0; whole.len()];
    if cfg!(target_endian = "little") {
        bytemuck::cast_slice_mut::<f32, u8>(&mut values).copy_from_slice(whole.as_flattened());
    } else {
        values.iter_mut().zip(whole).for_each(|(value, bytes)| *value = f32::from_le_bytes(*bytes));
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_back_bit_for_bit_from_any_place_in_memory() {
        let values = [1.5f32, -0.0, f32::MIN_POSITIVE / 2.0, f32::INFINITY];
        let bytes = of_f32(&values);
        assert_eq!(bytes[..4], 1.5f32.to_le_bytes());
        let shifted: Vec<u8> = [7].into_iter().chain(bytes.iter().copied()).chain([1, 2]).collect();
        let back = to_f32(&shifted[1..]);
        assert_eq!(back.iter().map(|value| value.to_bits()).collect::<Vec<_>>(), values.map(f32::to_bits));
        assert_eq!(to_f32(&[]), Vec::<f32>::new());
    }
}
