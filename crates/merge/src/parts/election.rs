//! Entries whose sign most of what is combined agrees with.

use attune_points::Result;
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::stacked::Stacked;

/// Whose sign counts where entries differ.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum MajoritySign {
    /// That of their sum.
    #[default]
    Total,
    /// That of most of them.
    Frequency,
}

impl Stacked {
    /// The mean, over those of the elected sign, of each entry times its tensor's weight; 0 where there are none. Weights have no vote.
    pub(crate) fn elected(&self, by: MajoritySign) -> Result<Tensor> {
        let sign = |number: f64| if number == 0.0 { 0.0 } else { number.signum() };
        self.each(|entries| {
            let votes: f64 = entries
                .iter()
                .map(|(number, _)| match by {
                    MajoritySign::Total => *number,
                    MajoritySign::Frequency => sign(*number),
                })
                .sum();
            let elected = if votes >= 0.0 { 1.0 } else { -1.0 };
            let agree = entries.iter().filter(|(number, _)| sign(*number) == elected);
            let (sum, count) =
                agree.fold((0.0, 0.0), |(sum, count), (number, weight)| (sum + number * weight, count + 1.0));
            sum / f64::max(count, 1.0)
        })
    }
}

#[cfg(test)]
mod tests {
    use attune_points::merge::Weighted;
    use candle_core::Device;

    use super::*;

    #[test]
    fn what_disagrees_with_the_elected_sign_is_left_out_of_the_mean() {
        let rows = [[4.0, -1.0, 0.0, 1.0, 0.0], [-1.0, -1.0, 2.0, 1.0, 0.0], [-1.0, 3.0, 0.0, -3.0, 0.0]];
        let tensors = rows.map(|row: [f64; 5]| Tensor::new(&row[..], &Device::Cpu).unwrap());
        let weights = [1.0, 1.0, 10.0];
        let of: Vec<_> = tensors.iter().zip(weights).map(|(tensor, weight)| Weighted { tensor, weight }).collect();
        let elected = |by| Stacked::of(&of).unwrap().elected(by).unwrap().to_vec1::<f64>().unwrap();
        assert_eq!(elected(MajoritySign::Total), [4.0, 30.0, 2.0, -30.0, 0.0]);
        assert_eq!(elected(MajoritySign::Frequency), [-5.5, -1.0, 2.0, 1.0, 0.0]);
    }
}
