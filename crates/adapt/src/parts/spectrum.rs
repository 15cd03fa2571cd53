//! A few numbers of a weight's transform, at places that torch's generator draws among all of its entries.

use std::collections::BTreeMap;

use attune_architecture::Site;
use attune_points::TensorSpec;
use attune_points::adapter::Attachment;
use attune_spec::Fault;

use crate::parts::{linears, torch};

/// As many numbers, called `local`, at each site as `most` or, at single ones, `own` says.
///
/// # Errors
/// One fault for each site that is no linear, has fewer entries, or more than are drawn from.
pub(crate) fn attach(
    local: &'static str,
    (most, own): (u32, &BTreeMap<String, u32>),
    sites: &[Site],
) -> Result<Vec<Attachment>, Vec<Fault>> {
    linears::attach(sites, |site, output, input| {
        let (field, count) = match own.get(site.id.as_str()) {
            Some(&count) => ("frequencies_pattern", count as usize),
            None => ("frequencies", most as usize),
        };
        let entries = output * input;
        if entries as u64 >= torch::PERMUTED_MAX {
            let message = format!("names {}, whose {entries} entries are too many; expected smaller weights", site.id);
            return Err(Fault::new("targets", message));
        }
        if count > entries {
            let message = format!("is {count}; {} is {output} by {input}, so {entries} is the most", site.id);
            return Err(Fault::new(field, message));
        }
        Ok(vec![TensorSpec::trained(local, [count])])
    })
}
