//! Whether rows suit the batches and the objective that they are for, and what is to be said of files.

use attune_data::loader::{Domain, Room};
use attune_data::{Dataset, Packing};
use attune_points::objective::Needs;
use attune_spec::job::Form;
use attune_spec::{Fault, FieldPath};

use crate::error::Error;

/// Whether every row fits the micro-batch that it has to go into whole.
pub(crate) fn fits(domains: &[Domain], validation: &[(String, Dataset)], packing: &Packing) -> Result<(), Error> {
    let room = packing.shard_tokens();
    let longest = |data: &Dataset| (0..data.len()).map(|row| packing.tokens_of(data, row)).max().unwrap_or(0);
    let sets = domains.iter().map(|domain| &*domain.data).chain(validation.iter().map(|(_, data)| data));
    let longest = sets.map(longest).max().unwrap_or(0);
    if longest <= room {
        return Ok(());
    }
    let what = match packing.answers {
        None => "the longest row, with all its documents, has".to_owned(),
        Some(Room { each, .. }) => format!("the longest prompt with {each} answers as long as they may be comes to"),
    };
    let message = format!(
        "is {} for {} logical shards, {room} tokens each; {what} {longest}: set `tune.logical_shards` lower or this higher",
        packing.batch_tokens, packing.logical_shards
    );
    Err(Error::Faults(vec![Fault::new("tune.batch_tokens", message)]))
}

/// Whether the rows of a file are what an objective compares, pairs or not.
pub(crate) fn of_objective(data: &Dataset, objective: &str, needs: Needs, path: FieldPath) -> Option<Fault> {
    let message = match (needs.pairs, data.report().form == Form::Preference) {
        _ if needs.answers.is_some() && data.report().form == Form::Text => {
            format!("holds texts without prompts, and `{objective}` learns from answers to prompts")
        }
        (true, false) => format!(
            "holds rows of {}; `{objective}` compares two answers: expected rows with `chosen` and `rejected`",
            data.report().form.name()
        ),
        (false, true) => {
            format!("holds pairs of a chosen and a rejected answer, and `{objective}` would learn both alike")
        }
        _ => return None,
    };
    Some(Fault::new(path, message))
}

/// Whether every prompt leaves room for an answer.
pub(crate) fn has_room(data: &Dataset, max_length: u32, answers: Room, path: FieldPath) -> Option<Fault> {
    let longest = (max_length - max_length.min(answers.max_tokens)) as usize;
    let long = data.documents().filter(|document| document.prompt_tokens() > longest).count();
    (long > 0).then(|| {
        let message = format!(
            "has {long} prompts of more than {longest} tokens, after which answers of {} are longer than `data.max_length`, \
             {max_length}: set it higher or answers shorter",
            answers.max_tokens
        );
        Fault::new(path, message)
    })
}

/// What is not learned of a file although nothing failed; `classes` are those of the head, if it tells some apart.
pub(crate) fn remarks(report: &attune_data::dataset::Report, classes: &[String]) -> Vec<String> {
    let mut remarks = Vec::new();
    let missing: Vec<&str> =
        report.classes.iter().zip(classes).filter(|(count, _)| **count == 0).map(|(_, name)| name.as_str()).collect();
    if !missing.is_empty() {
        remarks.push(format!("{}: no row has the class {}", report.file, missing.join(", ")));
    }
    if let Some(first) = report.bad.first.first() {
        let bad = report.bad.count();
        remarks.push(format!("{bad} of {} rows are bad and left out, the first of them {first}", report.rows + bad));
    }
    if report.truncated > 0 {
        let (cut, rows) = (report.truncated, report.rows);
        remarks.push(format!("{}: {cut} of {rows} rows are cut off at `data.max_length`", report.file));
    }
    remarks
}
