//! Two forms of one component at a linear: on the rows that go through it, or as another weight. Which of the two costs less?
//!
//! ```text
//! y_to = x_ti W_oi^T + delta(x_ti)   or   out(in(x_ti) W_oi^T)   =   x_ti W'_oi^T
//! ```
//! On rows it is run forward, again in reverse and back, and each of it is paid for every row. As a weight it is made forward and
//! again in reverse, and its gradient is pulled back once for the rows of each part, after `dW_oi = dy_to^T x_ti`, which is one
//! more product as large as the site's own.

use crate::adapter::WeightMap;

/// How many rows a part's gradient is taken to be of: few, for a part of more makes another weight only cheaper.
const ROWS: f64 = 256.0;

/// How many multiply-adds of a product take as long as it takes to turn a number around in memory, or to make one of it by itself.
const MOVED: f64 = 32.0;

/// How often a form's work is done: forward, again in reverse, and, about twice as much, back.
const PASSES: f64 = 4.0;

/// The same of what is made of a weight, by a part: it is made for all parts at once, and pulled back for each.
const PASSES_OF_WEIGHT: f64 = 3.0;

/// What something takes to be done once.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Cost {
    /// Multiply-adds of products of matrices.
    pub products: f64,
    /// Numbers that are turned around in memory, or that are made one by one.
    pub moved: f64,
}

impl Cost {
    /// Products of so many multiply-adds, and so many numbers moved.
    pub const fn new(products: usize, moved: usize) -> Self {
        Self { products: products as f64, moved: moved as f64 }
    }

    fn multiply_adds(self) -> f64 {
        self.products + MOVED * self.moved
    }
}

/// A component at a linear, as another weight.
#[derive(Clone, Copy)]
pub struct AsWeight<'a> {
    /// What makes it.
    pub map: &'a dyn WeightMap,
    /// What it takes on one row, forward.
    pub row: Cost,
    /// What it takes to make the weight.
    pub weight: Cost,
    /// Whether the product with the site's own weight, whose result the way back needs, is made again there.
    pub product_again: bool,
}

impl AsWeight<'_> {
    /// Whether the weight `[o, i]` costs less than the rows.
    pub fn pays(&self, (o, i): (usize, usize)) -> bool {
        let product = (o * i) as f64;
        let again = if self.product_again { product } else { 0.0 };
        let by_rows = ROWS * (PASSES * self.row.multiply_adds() + again);
        let by_weight = ROWS * product + PASSES_OF_WEIGHT * self.weight.multiply_adds();
        by_weight < by_rows
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Tensor;

    use super::*;
    use crate::{Locals, Result};

    struct Same;

    impl WeightMap for Same {
        fn graph(&self, w_oi: &Tensor, _: &Locals) -> Result<Tensor> {
            Ok(w_oi.clone())
        }
    }

    fn pays(rank: usize, width: usize, product_again: bool) -> bool {
        let (row, weight) = (Cost::new(2 * rank * width, 0), Cost::new(rank * width * width, 0));
        AsWeight { map: &Same, row, weight, product_again }.pays((width, width))
    }

    #[test]
    fn thin_changes_stay_on_rows_and_wide_ones_become_weights() {
        assert!(!pays(16, 256, false));
        assert!(pays(256, 256, false));
        assert!(!pays(256, 4096, false));
    }

    #[test]
    fn a_product_that_is_made_again_costs_as_much_as_the_gradient_by_a_weight() {
        assert!(pays(16, 256, true));
        assert!(!pays(0, 256, false));
    }

    #[test]
    fn moving_numbers_is_dear() {
        let of =
            |moved| AsWeight { map: &Same, row: Cost::new(0, moved), weight: Cost::default(), product_again: false };
        assert!(!of(256).pays((256, 256)));
        assert!(of(1024).pays((256, 256)));
    }
}
