//! The types of a tensor's elements.

use std::fmt;

macro_rules! dtypes {
    ($($(#[$doc:meta])* $variant:ident $name:literal $bits:literal,)*) => {
        /// The type of a tensor's elements.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Dtype { $($(#[$doc])* $variant,)* }

        impl Dtype {
            /// Every type, narrow ones first.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The written form.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// Bits of one element.
            pub const fn bits(self) -> u64 {
                match self { $(Self::$variant => $bits,)* }
            }

            pub(super) fn from_name(name: &str) -> Option<Self> {
                match name { $($name => Some(Self::$variant),)* _ => None }
            }
        }
    };
}

dtypes! {
    /// 4-bit float.
    F4 "F4" 4,
    /// 6-bit float, 2 exponent bits.
    F6E2m3 "F6_E2M3" 6,
    /// 6-bit float, 3 exponent bits.
    F6E3m2 "F6_E3M2" 6,
    /// Boolean, one byte.
    Bool "BOOL" 8,
    /// Unsigned 8-bit integer.
    U8 "U8" 8,
    /// Signed 8-bit integer.
    I8 "I8" 8,
    /// 8-bit float, 5 exponent bits.
    F8E5m2 "F8_E5M2" 8,
    /// 8-bit float, 4 exponent bits.
    F8E4m3 "F8_E4M3" 8,
    /// 8-bit exponent.
    F8E8m0 "F8_E8M0" 8,
    /// 8-bit float, 4 exponent bits, one zero.
    F8E4m3Fnuz "F8_E4M3FNUZ" 8,
    /// 8-bit float, 5 exponent bits, one zero.
    F8E5m2Fnuz "F8_E5M2FNUZ" 8,
    /// Signed 16-bit integer.
    I16 "I16" 16,
    /// Unsigned 16-bit integer.
    U16 "U16" 16,
    /// 16-bit float.
    F16 "F16" 16,
    /// 16-bit float with the exponent of a 32-bit one.
    Bf16 "BF16" 16,
    /// Signed 32-bit integer.
    I32 "I32" 32,
    /// Unsigned 32-bit integer.
    U32 "U32" 32,
    /// 32-bit float.
    F32 "F32" 32,
    /// Complex number of two 32-bit floats.
    C64 "C64" 64,
    /// 64-bit float.
    F64 "F64" 64,
    /// Signed 64-bit integer.
    I64 "I64" 64,
    /// Unsigned 64-bit integer.
    U64 "U64" 64,
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Bytes of a tensor; nothing when they overflow or do not end on a byte.
pub(super) fn size_bytes(dtype: Dtype, shape: &[u64]) -> Option<u64> {
    let bits = shape.iter().try_fold(dtype.bits(), |bits, n| bits.checked_mul(*n))?;
    bits.is_multiple_of(8).then_some(bits / 8)
}
