//! The point `Budget`: how are ranks shared among the sites of what trains?

mod explained_variance;
mod sensitivity_lora;

use std::collections::BTreeMap;

use attune_points::budget::Budget;
use attune_spec::method::{MethodRef, Point, Registry, entry};
use serde_json::{Value, json};

use crate::ADAPTERS;

/// All budgets.
pub static BUDGETS: Registry<dyn Budget> = Registry::new(
    Point::Budget,
    &[entry::<explained_variance::ExplainedVariance>(), entry::<sensitivity_lora::SensitivityLora>()],
);

/// The rank of an adapter's sites by its parameters, all of which are given; none if it has no such parameter.
pub fn rank(of: &MethodRef) -> Option<u32> {
    of.params.get("rank").and_then(Value::as_u64).and_then(|rank| u32::try_from(rank).ok())
}

/// The adapter with these ranks at these sites, by their whole paths. The factor on its products stays what it is, unless it is to
/// depend on the rank otherwise (rsLoRA), and then follows each site's.
pub fn ranked(of: &MethodRef, ranks: &BTreeMap<String, u32>) -> MethodRef {
    let (mut ranked, mean) = (of.clone(), rank(of));
    let own: BTreeMap<&String, u32> =
        ranks.iter().filter(|(_, rank)| Some(**rank) != mean).map(|(site, rank)| (site, *rank)).collect();
    let document = ADAPTERS.documents().find(|document| document.name == of.method);
    let scales = document.is_some_and(|document| document.schema["properties"].get("alpha_pattern").is_some());
    let follows = of.params.get("rslora").and_then(Value::as_bool).unwrap_or_default();
    let alpha = of.params.get("alpha").and_then(Value::as_f64).filter(|_| scales && !follows);
    if let (Some(alpha), Some(mean)) = (alpha, mean) {
        let alphas: BTreeMap<&String, f64> =
            own.iter().map(|(site, rank)| (*site, alpha * f64::from(*rank) / f64::from(mean))).collect();
        ranked.params.insert("alpha_pattern".to_owned(), json!(alphas));
    }
    ranked.params.insert("rank_pattern".to_owned(), json!(own));
    ranked
}
