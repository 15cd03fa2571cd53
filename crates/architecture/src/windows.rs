//! The attention window of each layer, from whichever fields the family reads.

use serde_json::Value;

use crate::config::{LAYERS_MAX, POSITIONS_MAX};
use crate::family::{FamilyRow, MAX_WINDOW_LAYERS_DEFAULT, WINDOW_DEFAULT, WindowRule};
use crate::fields::Fields;

/// One entry a layer; none sees everything.
pub(crate) fn windows(row: &FamilyRow, fields: &mut Fields<'_>, layers: u64) -> Vec<Option<u64>> {
    let full = vec![None; layers as usize];
    let switched_on = match row.window {
        WindowRule::None => return full,
        WindowRule::Every | WindowRule::IfGiven => true,
        WindowRule::ByLayer => fields.flag("use_sliding_window").unwrap_or(false),
    };
    let missing = (!fields.has("sliding_window") && row.window != WindowRule::IfGiven).then_some(WINDOW_DEFAULT);
    let window = fields.count("sliding_window", POSITIONS_MAX).or(missing).filter(|_| switched_on);
    let types = layer_types(fields, layers);
    match (row.window, types, window) {
        (_, None, None) => full,
        (WindowRule::ByLayer, None, Some(window)) => {
            let first = match fields.get("max_window_layers") {
                // 0 is meaningful here: windows from the first layer on.
                Some(Value::Number(n)) if n.as_u64() == Some(0) => 0,
                _ => fields.count("max_window_layers", LAYERS_MAX).unwrap_or(MAX_WINDOW_LAYERS_DEFAULT),
            };
            (0..layers).map(|layer| (layer >= first).then_some(window)).collect()
        }
        (_, None, Some(window)) => vec![Some(window); layers as usize],
        (rule, Some(types), window) => {
            let contradicts = |sliding: &bool| {
                (*sliding && window.is_none()) || (rule != WindowRule::ByLayer && *sliding != window.is_some())
            };
            if let Some(layer) = types.iter().position(contradicts) {
                let kind = if types[layer] { "sliding_attention" } else { "full_attention" };
                let have =
                    window.map_or_else(|| "no window in use".to_owned(), |w| format!("a window of {w} in every layer"));
                fields.fault(
                    &format!("layer_types[{layer}]"),
                    format!("is {kind:?}, but `sliding_window` gives {have}; expected the two to agree"),
                );
            }
            types.iter().map(|sliding| window.filter(|_| *sliding)).collect()
        }
    }
}

/// Whether each layer slides, if `layer_types` says so.
fn layer_types(fields: &mut Fields<'_>, layers: u64) -> Option<Vec<bool>> {
    let value = fields.get("layer_types")?;
    let list = value.as_array().filter(|list| list.len() as u64 == layers);
    let Some(list) = list else {
        let found = value.as_array().map_or_else(|| "no list".to_owned(), |list| format!("a list of {}", list.len()));
        fields.fault("layer_types", format!("is {found}; expected one entry for each of {layers} layers"));
        return None;
    };
    let mut sliding = Vec::with_capacity(list.len());
    for (layer, kind) in list.iter().enumerate() {
        match kind.as_str() {
            Some("full_attention") => sliding.push(false),
            Some("sliding_attention") => sliding.push(true),
            _ => {
                let given = crate::fields::quote(kind);
                fields.fault(
                    &format!("layer_types[{layer}]"),
                    format!("is {given}; expected \"full_attention\" or \"sliding_attention\""),
                );
                return None;
            }
        }
    }
    Some(sliding)
}
