//! `attune generate`: lets a model answer.

use attune_data::Message;
use attune_points::generate::Sampling;
use attune_spec::job::Precision;
use serde_json::json;

use crate::print::{Failure, Out};
use crate::remote::{Place, Server, folders};
use crate::speaker::Speaker;

/// Lets a model answer a prompt, with adapters or without.
#[derive(Debug, clap::Args)]
#[command(after_help = "The base's chat template is applied where it has one.

Examples:
  attune generate --base ./base --prompt \"Who are you?\"
  attune generate --base ./base --adapter ./adapter --prompt \"Who are you?\" --temperature 0.7 --seed 1")]
pub(crate) struct Arguments {
    /// The base: a model folder, or the digest or tag of one that the server has.
    #[arg(long, value_name = "REF")]
    base: Place,
    /// An adapter in PEFT's layout: a folder, digest or tag; several apply in order, the first innermost.
    #[arg(long = "adapter", value_name = "REF")]
    adapters: Vec<Place>,
    /// What is said to the model.
    #[arg(long, value_name = "TEXT")]
    prompt: String,
    /// What the model is told before that, as its system message.
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    system: Option<String>,
    /// Goes on from the prompt as it stands, without the chat template.
    #[arg(long)]
    raw: bool,
    /// The most tokens that are made.
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_tokens: usize,
    /// 0 takes the likeliest token each time; larger values flatten the distribution.
    #[arg(long, value_name = "T", default_value_t = 0.0, allow_negative_numbers = true, value_parser = temperature)]
    temperature: f64,
    /// Samples from the likeliest tokens that make up this share of the probability.
    #[arg(long, value_name = "P", default_value_t = 1.0, allow_negative_numbers = true, value_parser = top_p)]
    top_p: f64,
    /// The seed of sampling.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

pub(super) fn run(arguments: &Arguments, server: &Server, out: &mut Out) -> Result<(), Failure> {
    let (base, adapters) = folders(&arguments.base, &arguments.adapters, server)?;
    let speaker = Speaker::open(&base, &adapters, Precision::F32)?;
    let sampling = Sampling {
        temperature: arguments.temperature,
        top_p: arguments.top_p,
        seed: arguments.seed,
        max_tokens: arguments.max_tokens,
        stop: Vec::new(),
    };
    let streamed = !out.is_json();
    let each = |piece: &str| {
        if streamed {
            out.text(piece)?;
            out.flush()?;
        }
        Ok(())
    };
    let answer = if arguments.raw {
        speaker.speak(&arguments.prompt, true, sampling, each)?
    } else {
        let system = arguments.system.as_deref().map(|system| Message::new("system", system));
        let messages: Vec<Message> = system.into_iter().chain([Message::new("user", &*arguments.prompt)]).collect();
        speaker.answer(&messages, sampling, each)?
    };
    if out.is_json() {
        let finish = if answer.complete { "stop" } else { "length" };
        return out.document(&json!({"text": answer.text, "tokens": answer.tokens, "finish": finish}));
    }
    out.line("")
}

fn temperature(text: &str) -> Result<f64, String> {
    let value = text.parse::<f64>().ok().filter(|value| value.is_finite() && *value >= 0.0);
    value.ok_or_else(|| "expected 0 or more".to_owned())
}

fn top_p(text: &str) -> Result<f64, String> {
    let value = text.parse::<f64>().ok().filter(|value| *value > 0.0 && *value <= 1.0);
    value.ok_or_else(|| "expected more than 0 and at most 1".to_owned())
}
