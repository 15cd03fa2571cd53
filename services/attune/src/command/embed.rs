//! `attune embed`: asks a model for vectors of texts.

use std::io::BufRead as _;

use attune_artifacts::formats::sentence_transformers;
use attune_data::{Encoder, Tokenizer};
use attune_models::{Model, Pass};
use attune_points::Theta;
use attune_spec::job::{HeadSpec, Precision, TooLong};
use attune_trainer::{classes, component, few};
use serde_json::json;

use crate::print::{Failure, Out, note};
use crate::remote::{Place, Server, folders};

/// Asks a model for vectors of texts.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Texts that are not named are read from standard input, one a line. How rows become a vector, the adapter's folder says, else \
the base's (`1_Pooling/config.json`); else it is their mean.

Examples:
  attune embed --base ./base --adapter ./adapter \"Which river runs through Velmora?\"
  attune embed --base ./merged --normalize --json < texts.txt > vectors.jsonl"
)]
pub(crate) struct Arguments {
    /// The base: a model folder, or the digest or tag of one that the server has.
    #[arg(long, value_name = "REF")]
    base: Place,
    /// An adapter: a folder, digest or tag; several apply in order, the first innermost.
    #[arg(long = "adapter", value_name = "REF")]
    adapters: Vec<Place>,
    /// Only so many numbers of each vector, the first ones.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    dims: Option<u32>,
    /// Makes each vector, of all its numbers or of the first ones, one of length 1.
    #[arg(long)]
    normalize: bool,
    /// The texts.
    #[arg(value_name = "TEXT")]
    texts: Vec<String>,
}

pub(super) fn run(arguments: &Arguments, server: &Server, out: &mut Out) -> Result<(), Failure> {
    let (base, adapters) = folders(&arguments.base, &arguments.adapters, server)?;
    let head = match few::head_of(&adapters)? {
        Some(head) if head.gives_vectors() => head,
        Some(_) => {
            let hint = "ask it with `attune classify`";
            return Err(Failure::usage("the adapter was trained to tell classes apart".to_owned()).with_hint(hint));
        }
        None => HeadSpec::of_vectors(sentence_transformers::pooling(&base)?, false),
    };
    let weights = few::open_under(&base, &adapters, Precision::F32, Some(&head))?;
    let architecture = weights.architecture();
    let (width, max_length) = (architecture.hidden, u32::try_from(architecture.max_position).unwrap_or(u32::MAX));
    let dims = arguments.dims.map_or(width, |dims| dims as usize);
    if dims > width {
        return Err(Failure::usage(format!("--dims is {dims}; the model's vectors have {width} numbers")));
    }
    let encoder = Encoder::new(Tokenizer::open(&base)?, None, max_length, TooLong::Truncate)?
        .with_classes(classes::of(&head, architecture));
    let (weights, stack, theta) = component::frozen(weights, adapters.iter().map(std::path::PathBuf::as_path))?;
    let normalize = arguments.normalize;
    let teller = Teller { model: Model::new(weights, stack), theta, encoder, dims, normalize };
    if arguments.texts.is_empty() {
        for line in std::io::stdin().lock().lines() {
            teller.tell(&line.map_err(|error| Failure::usage(format!("standard input: {error}")))?, out)?;
        }
        return Ok(());
    }
    arguments.texts.iter().try_for_each(|text| teller.tell(text, out))
}

/// A model that gives vectors.
struct Teller {
    model: Model,
    theta: Theta,
    encoder: Encoder,
    /// How many numbers of each vector are told.
    dims: usize,
    /// Whether they make a vector of length 1.
    normalize: bool,
}

impl Teller {
    /// Tells the vector of a text.
    fn tell(&self, text: &str, out: &mut Out) -> Result<(), Failure> {
        let asked = self.encoder.ask(text, None)?;
        if asked.truncated {
            note("the text is longer than the model's context; its end was left out");
        }
        let layout = asked.layout.begun_with(&self.model.rows_before(&self.theta));
        let vectors = self.model.embed(&Pass { theta: &self.theta, layout: &layout, dropout: None })?;
        let mut vector: Vec<f32> =
            vectors.flatten_all().and_then(|all| all.to_vec1()).map_err(attune_points::Error::from)?;
        vector.truncate(self.dims);
        if self.normalize {
            let length = vector.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt().max(1e-12);
            vector.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
        }
        if out.is_json() {
            return out.record(&json!({"text": text, "vector": vector}));
        }
        let numbers: Vec<String> = vector.iter().map(ToString::to_string).collect();
        out.line(&format!("{}\t{text}", numbers.join(" ")))
    }
}
