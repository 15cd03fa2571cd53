//! Which experts of a mixture the rows of the validation sets are sent to together, layer by layer.

use attune_models::Pass;
use attune_points::Theta;
use serde::Serialize;

use crate::error::Error;
use crate::setup::Prepared;

/// What was counted in all validation sets.
#[derive(Debug, Serialize)]
pub(crate) struct Together {
    /// Rows, each of which went through a few experts of every layer.
    rows: u64,
    layers: Vec<OfLayer>,
}

#[derive(Debug, Serialize)]
struct OfLayer {
    layer: u32,
    /// For each two experts how many rows went through both; on the diagonal, how many went through the one.
    rows_of_both: Vec<Vec<u64>>,
}

/// Counts where the trained model sends the rows of the validation sets; nothing for a model without experts or a run
/// without such sets.
///
/// # Errors
/// Whatever the pass raises.
pub(crate) fn together(prepared: &Prepared, theta: &Theta) -> Result<Option<Together>, Error> {
    let model = &prepared.shared.model;
    let Some(experts) = model.base().architecture().experts else { return Ok(None) };
    let layouts = prepared.shared.validation.iter().flat_map(|(_, batches)| batches);
    let mut found: Option<Together> = None;
    for layout in layouts {
        let routing = model.routing(&Pass { theta, layout, dropout: None })?;
        let found = found.get_or_insert_with(|| Together { rows: 0, layers: Vec::new() });
        if found.layers.is_empty() {
            let of = |layer| OfLayer { layer, rows_of_both: vec![vec![0; experts.count]; experts.count] };
            found.layers = routing.iter().map(|of_layer| of(of_layer.layer)).collect();
        }
        found.rows += layout.n_rows() as u64;
        for (of_layer, counts) in routing.iter().zip(&mut found.layers) {
            for chosen in of_layer.chosen()?.chunks_exact(experts.per_token) {
                for &one in chosen {
                    for &other in chosen {
                        counts.rows_of_both[one as usize][other as usize] += 1;
                    }
                }
            }
        }
    }
    Ok(found)
}
