//! Supervised fine-tuning: the cross-entropy of the tokens that the data marks as learned.
//!
//! # Update
//! ```text
//! L = (1 / N) Σ_t -log softmax(logits_tv)[label_t]
//! ```
//!
//! # Symbols
//! `t` runs over the supervised rows of the whole optimiser step, all micro-batches and ranks; `N` is their number.
//!
//! # Cost
//! One sweep of the head over the supervised rows.
//!
//! # Limits
//! With one supervised token it is that token's negative log-likelihood.
//!
//! # Departures
//! none.
//!
//! # Paper
//! none: common practice.

use attune_points::objective::{ChunkLoss, ChunkView, Denominator, Objective};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Method, Point};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// It has no parameters.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {}

pub(super) struct Sft;

impl Method for Sft {
    const CARD: Card = Card {
        aliases: &["cross-entropy"],
        ..Card::new(
            "sft",
            Point::Objective,
            "Supervised fine-tuning: the cross-entropy of the tokens that the data marks as learned.",
        )
    };
    type Config = Config;
    type Object = dyn Objective;

    fn build(_: Config, _: &BuildCx<'_>) -> Result<Box<dyn Objective>, Vec<Fault>> {
        Ok(Box::new(Self))
    }
}

impl Objective for Sft {
    fn denominator(&self) -> Denominator {
        Denominator::Tokens
    }

    fn chunk(&self, chunk: &ChunkView<'_>) -> attune_points::Result<ChunkLoss> {
        Ok(ChunkLoss::CrossEntropy { weight_t: vec![1.0; chunk.rows.len()] })
    }
}

#[cfg(test)]
mod tests {
    use attune_points::Layout;
    use attune_points::layout::Supervised;

    use super::*;

    #[test]
    fn every_supervised_token_counts_the_same() {
        let (layout, rows) = (Layout::new(), [Supervised { row: 3, label: 1 }, Supervised { row: 9, label: 0 }]);
        let loss = Sft.chunk(&ChunkView { layout: &layout, rows: &rows }).unwrap();
        assert!(matches!(loss, ChunkLoss::CrossEntropy { weight_t } if weight_t == [1.0, 1.0]));
        assert_eq!(Sft.denominator(), Denominator::Tokens);
    }
}
