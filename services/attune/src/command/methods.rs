//! `attune methods`: what can be named in a job file.

use std::path::PathBuf;
use std::str::FromStr;

use attune_spec::method::{Catalogue, Category, Filter, MethodDocument, Point, SiteKind};
use serde_json::{Value, json};

use crate::advise::{Advice, Goal, RULES, Rules, Task};
use crate::print::{Column, Failure, Out, Table, manual};
use crate::words;

/// Lists and describes the methods that a job file can name.
#[derive(Debug, clap::Subcommand)]
#[command(after_help = "Examples:
  attune methods list --point adapter
  attune methods list --point adapter --site linear --merges --peft
  attune methods show lora
  attune methods advise --task classification --examples 500 --short-of time")]
pub(crate) enum Command {
    /// Lists methods: name, extension point, what it does.
    List(List),
    /// Describes one method: parameters, defaults, cost, paper, and how a job file names it.
    Show(Show),
    /// Says which method to try first, by what did best in committed runs on as much data.
    Advise(Advise),
}

/// What somebody wants to train on.
#[derive(Debug, clap::Args)]
pub(crate) struct Advise {
    /// What the data is of.
    #[arg(long, value_name = "TASK")]
    task: Task,
    /// How many rows it has.
    #[arg(long, value_name = "N")]
    examples: u64,
    /// What there is little of; the smallest loss counts if it is left out.
    #[arg(long, value_name = "WHAT")]
    short_of: Option<Short>,
    /// Rules of one's own: the `rules.json` that `attune experiment report` writes of a grid with axes `task`, `examples` and `method`.
    #[arg(long, value_name = "FILE")]
    rules: Option<PathBuf>,
}

/// What there is little of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Short {
    /// Time to train.
    Time,
    /// Memory to train in.
    Memory,
    /// Room for the result.
    Storage,
}

impl Short {
    const fn goal(of: Option<Self>) -> Goal {
        match of {
            None => Goal::Quality,
            Some(Self::Time) => Goal::Time,
            Some(Self::Memory) => Goal::Memory,
            Some(Self::Storage) => Goal::Storage,
        }
    }
}

/// Which methods are listed.
#[derive(Debug, clap::Args)]
pub(crate) struct List {
    /// Only methods of this extension point, such as adapter or optimizer.
    #[arg(long, value_name = "POINT")]
    point: Option<PointName>,
    /// Only methods that tune a model in this way: selective, additive, prompt, reparameterisation or hybrid.
    #[arg(long, value_name = "CATEGORY", value_parser = parse_category)]
    category: Option<Category>,
    /// Only methods that can be put on sites of this kind.
    #[arg(long, value_name = "KIND")]
    site: Option<SiteName>,
    /// Only methods that can be merged into the base.
    #[arg(long)]
    merges: bool,
    /// Only methods whose adapters are kept in PEFT's layout.
    #[arg(long)]
    peft: bool,
    /// Only methods that work where linears of the base are held in few bits.
    #[arg(long)]
    few_bits: bool,
    /// Only methods whose name, aliases or summary contain this text.
    #[arg(value_name = "TEXT")]
    text: Option<String>,
}

fn parse_category(text: &str) -> Result<Category, String> {
    let names = Category::ALL.map(Category::as_str);
    Category::ALL.into_iter().find(|category| category.as_str() == text).ok_or_else(|| {
        let hint = attune_spec::suggest::hint(text, names);
        format!("expected one of {}{hint}", names.join(", "))
    })
}

/// A kind of site as it is written on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum SiteName {
    /// Linears.
    Linear,
    /// Tables of embeddings.
    Embedding,
    /// Norms.
    Norm,
    /// Whole attentions.
    Attention,
    /// Whole MLPs.
    Mlp,
}

impl SiteName {
    const fn kind(self) -> SiteKind {
        match self {
            Self::Linear => SiteKind::Linear,
            Self::Embedding => SiteKind::Embedding,
            Self::Norm => SiteKind::Norm,
            Self::Attention => SiteKind::Attention,
            Self::Mlp => SiteKind::Mlp,
        }
    }
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
        Command::Advise(question) => advise(question, out),
    }
}

fn list_methods(list: &List, out: &mut Out) -> Result<(), Failure> {
    let filter = list.filter();
    let mut found: Vec<&MethodDocument> =
        Catalogue::embedded().documents().filter(|method| filter.matches(method)).collect();
    found.sort_by_key(|method| method.point);
    if out.is_json() {
        let entry = |method: &&MethodDocument| {
            let (few_bits, sites) = (method.on_quantized(), &method.applies);
            json!({
                "name": method.name, "point": method.point, "aliases": method.aliases, "summary": method.summary, "sites": sites,
                "category": method.category, "merges": method.merges, "peft_type": method.peft_type, "few_bits": few_bits,
            })
        };
        return out.document(&found.iter().map(entry).collect::<Value>());
    }
    let mut table = Table::new([Column::left("NAME"), Column::left("POINT"), Column::left("SUMMARY")]);
    for method in found {
        table.row([method.name.as_str(), method.point.as_str(), method.summary.as_str()]);
    }
    out.table(&table)
}

impl List {
    fn filter(&self) -> Filter {
        Filter {
            point: self.point.map(|point| point.0),
            category: self.category,
            site: self.site.map(SiteName::kind),
            merges: self.merges,
            peft: self.peft,
            few_bits: self.few_bits,
            text: self.text.clone(),
        }
    }
}

fn show_method(name: &str, out: &mut Out) -> Result<(), Failure> {
    let catalogue = Catalogue::embedded();
    let method = catalogue
        .get(name)
        .ok_or_else(|| Failure::usage(catalogue.unknown(name)).with_hint("see what there is: attune methods list"))?;
    if out.is_json() { out.document(method) } else { out.text(&manual::page(method)) }
}

fn advise(question: &Advise, out: &mut Out) -> Result<(), Failure> {
    let goal = Short::goal(question.short_of);
    let own = question.rules.as_deref().map(Rules::read).transpose()?;
    let rules = own.as_ref().unwrap_or(&RULES);
    let found = rules.advise(question.task, question.examples, goal);
    let Advice { rule, is_beyond } =
        found.ok_or_else(|| Failure::failed("no runs are of such data, so that there is no advice"))?;
    if out.is_json() {
        let (version, grid) = (rules.version, &rules.experiment);
        return out.document(&json!({"rule": rule, "beyond": is_beyond, "version": version, "experiment": grid}));
    }
    let why = match goal {
        Goal::Quality => "its best loss was the smallest".to_owned(),
        Goal::Time => format!("it was nearly its best soonest, after {:.1} s of training", rule.seconds),
        Goal::Memory => format!("it took the least memory, {}", words::bytes(rule.memory_bytes as u64)),
        Goal::Storage => format!("its result was the smallest, {:.0} parameters", rule.parameters),
    };
    let among = match goal {
        Goal::Quality => String::new(),
        _ => format!(" of those with {:.0} % of the most gain or more", 100.0 * rules.kept),
    };
    let beyond = if is_beyond { "; no run had as much data" } else { "" };
    out.text(&format!(
        "{}\n  {why}{among}: it took {:.3} off the loss, and the most was {:.3}\n  rule {} (version {}), made of runs on {} rows{beyond}\n  runs {} of the grid {}\n",
        rule.method,
        rule.gain,
        rule.most,
        rule.id,
        rules.version,
        rule.examples,
        rule.runs.join(", "),
        rules.experiment,
    ))
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
    fn a_category_that_is_none_is_told_what_there_is() {
        assert_eq!(parse_category("prompt").unwrap(), Category::Prompt);
        assert!(parse_category("promt").unwrap_err().ends_with("did you mean \"prompt\"?"));
    }
}
