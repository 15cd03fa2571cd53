//! Weights whose numbers are whole ones times a step, group by group of neighbours in a row: what a server of few bits can hold.

use attune_points::{Error, Locals, Result, TensorSpec, Weight};
use candle_core::{DType, Device, Tensor};

use crate::parts::masks;

/// The local name of the steps, `[o, G]`.
pub(crate) const STEP: &str = "grid_step";
/// The local name of the whole numbers that stand for 0, `[o, G]`.
pub(crate) const ZERO: &str = "grid_zero";

/// The format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Grid {
    /// Bits of a whole number.
    pub(crate) bits: u32,
    /// Numbers of a row that share a step, but for the last ones of a row, which may be fewer.
    pub(crate) group: usize,
}

impl Grid {
    /// The largest whole number; 0 is the smallest.
    fn largest(self) -> f64 {
        f64::from((1u32 << self.bits.min(31)) - 1)
    }

    /// What it keeps of a weight `[o, i]`.
    pub(crate) fn specs(self, (o, i): (usize, usize)) -> [TensorSpec; 2] {
        let shape = [o, i.div_ceil(self.group)];
        [TensorSpec::fixed(STEP, shape), TensorSpec::fixed(ZERO, shape)]
    }

    /// Steps and zeros by which each group of a weight spans from its least to its largest number, and 0 is exactly one of its values: what is
    /// pruned stays so.
    ///
    /// # Errors
    /// Numbers that are not finite.
    pub(crate) fn of(self, w_oi: &Tensor) -> Result<(Tensor, Tensor)> {
        let rows: Vec<Vec<f32>> = w_oi.to_dtype(DType::F32)?.to_vec2()?;
        let (mut steps, mut zeros) = (Vec::new(), Vec::new());
        for group in rows.iter().flat_map(|row| row.chunks(self.group)) {
            if group.iter().any(|number| !number.is_finite()) {
                return Err(Error::Refused("a weight has a number that is not finite".to_owned()));
            }
            let (least, most) = group.iter().fold((0f32, 0f32), |(least, most), x| (least.min(*x), most.max(*x)));
            let step = (f64::from(most) - f64::from(least)) / self.largest();
            // A group of zeros has any step.
            let step = if step > 0.0 { step } else { 1.0 };
            steps.push(step as f32);
            zeros.push((-f64::from(least) / step).round() as f32);
        }
        let shape = (rows.len(), steps.len() / rows.len().max(1));
        let held = |numbers| Tensor::from_vec(numbers, shape, &Device::Cpu);
        Ok((held(steps)?, held(zeros)?))
    }

    /// Those of what is left of a weight behind a mask; of all of it without one.
    ///
    /// # Errors
    /// As for [`Grid::of`]; a mask of another weight.
    pub(crate) fn of_kept(self, weight: &dyn Weight, mask: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
        let w_oi = weight.dense(DType::F32)?;
        match mask {
            Some(mask) => self.of(&(&w_oi * masks::as_matrix(mask, &w_oi)?)?),
            None => self.of(&w_oi),
        }
    }

    /// What each number's group has, in the type of the numbers.
    fn spread(self, of_og: &Tensor, v_oi: &Tensor) -> Result<Tensor> {
        let groups: Vec<u32> = (0..v_oi.dim(1)?).map(|at| (at / self.group) as u32).collect();
        let groups = Tensor::new(groups, v_oi.device())?;
        Ok(of_og.to_dtype(v_oi.dtype())?.index_select(&groups, 1)?)
    }

    /// The whole numbers that a weight's are nearest to, before any is clamped.
    fn nearest(self, v_oi: &Tensor, step_oi: &Tensor, zero_oi: &Tensor) -> Result<Tensor> {
        Ok(((v_oi.detach() / step_oi)?.round()? + zero_oi)?)
    }

    /// The whole numbers that a weight's become: 0 to the largest.
    ///
    /// # Errors
    /// A tensor that was not declared.
    #[cfg(test)]
    pub(crate) fn codes(self, v_oi: &Tensor, tensors: &Locals) -> Result<Tensor> {
        let [step, zero] = [STEP, ZERO].map(|local| self.spread(tensors.get(local)?, v_oi));
        Ok(self.nearest(v_oi, &step?, &zero?)?.clamp(0.0, self.largest())?)
    }

    /// The values of the grid that a weight's numbers are nearest to, exactly, with a gradient that passes to the numbers as if they were the
    /// values themselves, but for those beyond the ends of the grid, which do not move by it.
    ///
    /// # Errors
    /// A tensor that was not declared.
    pub(crate) fn onto(self, v_oi: &Tensor, tensors: &Locals) -> Result<Tensor> {
        let (step_oi, zero_oi) = (self.spread(tensors.get(STEP)?, v_oi)?, self.spread(tensors.get(ZERO)?, v_oi)?);
        let nearest_oi = self.nearest(v_oi, &step_oi, &zero_oi)?;
        let codes_oi = nearest_oi.clamp(0.0, self.largest())?;
        let within_oi = nearest_oi.eq(&codes_oi)?.to_dtype(v_oi.dtype())?;
        let values_oi = ((codes_oi - zero_oi)? * step_oi)?;
        // Nothing is left of the difference but its gradient.
        let passed_oi = (v_oi - v_oi.detach())?;
        Ok((values_oi + (passed_oi * within_oi)?)?)
    }
}

#[cfg(test)]
mod tests {
    use attune_tensor::rng::Rng;
    use candle_core::Var;

    use super::*;

    const GRID: Grid = Grid { bits: 3, group: 4 };

    fn locals(w_oi: &Tensor) -> Locals {
        let (step, zero) = GRID.of(w_oi).unwrap();
        Locals::new("q", [(STEP, step), (ZERO, zero)])
    }

    fn normal(name: &str, dtype: DType) -> Tensor {
        Rng::new(1, name).normal_tensor((3, 10), 1.0, dtype).unwrap()
    }

    #[test]
    fn a_group_has_few_values_one_of_which_is_0_and_its_own_come_back() {
        let w = normal("w", DType::F32);
        let w = (&w * w.abs().unwrap().ge(0.5).unwrap().to_dtype(DType::F32).unwrap()).unwrap();
        let locals = locals(&w);
        assert!(GRID.specs((3, 10)).iter().all(|spec| locals.get(spec.local).unwrap().dims() == spec.shape));
        let on = GRID.onto(&w, &locals).unwrap();
        let (rows, steps) = (on.to_vec2::<f32>().unwrap(), locals.get(STEP).unwrap().to_vec2::<f32>().unwrap());
        for ((row, own), steps) in rows.iter().zip(w.to_vec2::<f32>().unwrap()).zip(steps) {
            for ((values, own), step) in row.chunks(4).zip(own.chunks(4)).zip(steps) {
                let mut distinct: Vec<u32> = values.iter().map(|value| value.to_bits()).collect();
                distinct.sort_unstable();
                distinct.dedup();
                assert!(distinct.len() <= 8);
                for (value, own) in values.iter().zip(own) {
                    assert!((value - own).abs() <= 0.51 * step, "{value} {own} {step}");
                    assert!(*own != 0.0 || *value == 0.0);
                }
            }
        }
        // What is on the grid stays where it is, bit for bit, and has the same whole numbers.
        let again = GRID.onto(&on, &locals).unwrap();
        assert_eq!(again.to_vec2::<f32>().unwrap(), rows);
        let codes = |x: &Tensor| GRID.codes(x, &locals).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(codes(&w), codes(&on));
        assert!(codes(&w).iter().flatten().all(|code| code.fract() == 0.0 && (0.0..=7.0).contains(code)));
    }

    /// The gradient is that of the numbers themselves, but for those beyond the grid.
    #[test]
    fn gradients_pass_straight_through_within_the_grid_and_stop_at_its_ends() {
        let (w, by) = (normal("w", DType::F64), normal("by", DType::F64));
        let v = Var::from_tensor(&(&w * 1.5).unwrap()).unwrap();
        let loss = (GRID.onto(v.as_tensor(), &locals(&w)).unwrap() * &by).unwrap().sum_all().unwrap();
        let gradient = loss.backward().unwrap().get(v.as_tensor()).unwrap().to_vec2::<f64>().unwrap();
        let codes = GRID.codes(v.as_tensor(), &locals(&w)).unwrap().to_vec2::<f64>().unwrap();
        let (by, mut ends) = (by.to_vec2::<f64>().unwrap(), 0);
        for ((gradient, code), by) in gradient.iter().flatten().zip(codes.iter().flatten()).zip(by.iter().flatten()) {
            if *gradient == 0.0 {
                assert!([0.0, 7.0].contains(code));
                ends += 1;
            } else {
                assert!((gradient - by).abs() < 1e-12);
            }
        }
        assert!((1..28).contains(&ends), "{ends}");
    }

    #[test]
    fn a_group_of_zeros_stays_and_what_is_not_finite_is_refused() {
        let none = Tensor::zeros((2, 8), DType::F32, &Device::Cpu).unwrap();
        let on = GRID.onto(&none, &locals(&none)).unwrap().to_vec2::<f32>().unwrap();
        assert!(on.iter().flatten().all(|value| *value == 0.0));
        assert!(GRID.of(&(none + f64::INFINITY).unwrap()).is_err());
    }
}
