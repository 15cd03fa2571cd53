//! `attune methods`: what can be named in a job file.

use std::str::FromStr;

use attune_spec::method::{Catalogue, MethodDocument, Point};
use serde_json::{Value, json};

use crate::print::{Column, Failure, Out, Table, manual};

/// Lists and describes the methods that a job file can name.
#[derive(Debug, clap::Subcommand)]
#[command(after_help = "Examples:
  attune methods list --point adapter
  attune methods show lora")]
pub(crate) enum Command {
    /// Lists methods: name, extension point, what it does.
    List(List),
    /// Describes one method: parameters, defaults, cost, paper, and how a job file names it.
    Show(Show),
}

/// Which methods are listed.
#[derive(Debug, clap::Args)]
pub(crate) struct List {
    /// Only methods of this extension point, such as adapter or optimizer.
    #[arg(long, value_name = "POINT")]
    point: Option<PointName>,
    /// Only methods whose name, aliases or summary contain this text.
    #[arg(value_name = "TEXT")]
    text: Option<String>,
}

/// Which method is described.
#[derive(Debug, clap::Args)]
pub(crate) struct Show {
    /// The method's name or an alias.
    #[arg(value_name = "NAME")]
    name: String,
}

/// An extension point as it is written on the command line.
#[derive(Debug, Clone, Copy)]
struct PointName(Point);

impl FromStr for PointName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let written = text.replace('-', "_");
        let names = Point::ALL.map(Point::as_str);
        Point::ALL.into_iter().find(|point| point.as_str() == written).map(Self).ok_or_else(|| {
            let hint = attune_spec::suggest::hint(text, names);
            format!("expected one of {}{hint}", names.join(", "))
        })
    }
}

pub(super) fn run(command: &Command, out: &mut Out) -> Result<(), Failure> {
    match command {
        Command::List(list) => list_methods(list, out),
        Command::Show(show) => show_method(&show.name, out),
    }
}

fn list_methods(list: &List, out: &mut Out) -> Result<(), Failure> {
    let mut found: Vec<&MethodDocument> =
        Catalogue::embedded().documents().filter(|method| matches(method, list)).collect();
    found.sort_by_key(|method| method.point);
    if out.is_json() {
        let entry = |method: &&MethodDocument| json!({"name": method.name, "point": method.point, "aliases": method.aliases, "summary": method.summary});
        return out.document(&found.iter().map(entry).collect::<Value>());
    }
    let mut table = Table::new([Column::left("NAME"), Column::left("POINT"), Column::left("SUMMARY")]);
    for method in found {
        table.row([method.name.as_str(), method.point.as_str(), method.summary.as_str()]);
    }
    out.table(&table)
}

fn matches(method: &MethodDocument, list: &List) -> bool {
    let of_point = list.point.is_none_or(|point| point.0 == method.point);
    let Some(text) = &list.text else { return of_point };
    let text = text.to_lowercase();
    let texts = [&method.name, &method.summary].into_iter().chain(&method.aliases);
    of_point && texts.into_iter().any(|own| own.to_lowercase().contains(&text))
}

fn show_method(name: &str, out: &mut Out) -> Result<(), Failure> {
    let catalogue = Catalogue::embedded();
    let method = catalogue
        .get(name)
        .ok_or_else(|| Failure::usage(catalogue.unknown(name)).with_hint("see what there is: attune methods list"))?;
    if out.is_json() { out.document(method) } else { out.text(&manual::page(method)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_is_written_with_either_dash() {
        assert_eq!("step-rule".parse::<PointName>().unwrap().0, Point::StepRule);
        assert_eq!("step_rule".parse::<PointName>().unwrap().0, Point::StepRule);
        assert!("adaptor".parse::<PointName>().unwrap_err().ends_with("did you mean \"adapter\"?"));
    }

    #[test]
    fn the_list_can_be_narrowed() {
        let count = |point: Option<&str>, text: Option<&str>| {
            let point = point.map(|point| point.parse().unwrap());
            let list = List { point, text: text.map(str::to_owned) };
            Catalogue::embedded().documents().filter(|method| matches(method, &list)).count()
        };
        assert!(count(None, None) > count(Some("adapter"), None));
        assert!(count(Some("adapter"), Some("LOW-RANK adaptation")) > 0);
        assert!(count(Some("adapter"), Some("LOW-RANK adaptation")) < count(Some("adapter"), None));
        assert_eq!(count(Some("optimizer"), Some("low-rank adaptation")), 0);
    }
}
