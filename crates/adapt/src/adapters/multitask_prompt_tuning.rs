//! Rows before those of every document, a prompt times a small low-rank matrix of its task: for going on from a prompt that several
//! tasks were trained to share, where the task has little data.
//!
//! # Update
//! ```text
//! x_td = [P_pd ∘ (U_pr V_rd); E_td]         p < length, E_td the embeddings of a document's tokens, from position length on
//! ```
//!
//! # Symbols
//! `prompt` `P_pd`, `[length, d]`, rows of the table of tokens that are drawn at the start; `task_cols` `U_pr`, `[1, length, rank]`, and
//! `task_rows` `V_rd`, `[1, rank, d]`, normal with standard deviation `std`. All are f32, trained, once for the whole base.
//!
//! # Cost
//! `length*d + rank*(length + d)` parameters in all, where the stream is `d` wide; `length` rows more in each document. It does not
//! merge.
//!
//! # Limits
//! With `U V` of ones it is trained rows by themselves.
//!
//! # Departures
//! One task a component: the second stage of the method, PEFT's with `num_tasks: 1`. The first one, in which several tasks are distilled
//! into one prompt, needs a task of each document and is not here. The prompt starts as PEFT's `SAMPLE_VOCAB` does.
//!
//! # Paper
//! Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning. Wang, Panda, Karlinsky, Feris, Sun, Kim, 2023.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, PeftTensors, Port, SequenceMap};
use attune_points::{Locals, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, MethodRef, Paper, Point, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::parts::prompt;
use crate::parts::starts::{self, Start};

const PROMPT: &str = "prompt";
const COLS: &str = "task_cols";
const ROWS: &str = "task_rows";

/// Parameters of multitask prompt tuning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Rows before each document.
    #[schemars(range(min = 1, max = 4096))]
    length: u32,
    /// Rank of the task's matrix.
    #[schemars(range(min = 1, max = 1024))]
    rank: u32,
    /// Standard deviation that its factors start with.
    #[schemars(range(min = 0.0, max = 10.0))]
    std: f64,
}

impl Default for Config {
    /// The paper's rank; PEFT's start.
    fn default() -> Self {
        Self { length: 20, rank: 1, std: 0.02 }
    }
}

pub(super) struct MultitaskPromptTuning {
    config: Config,
}

impl Method for MultitaskPromptTuning {
    const CARD: Card = Card {
        category: Some(Category::Prompt),
        paper: Some(Paper {
            title: "Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning",
            authors: "Zhen Wang, Rameswar Panda, Leonid Karlinsky, Rogerio Feris, Huan Sun, Yoon Kim",
            year: 2023,
        }),
        applies: &[SiteKind::Embedding],
        targets: prompt::TARGETS,
        parameters: "0",
        shared: "length*o + rank*(length + o)",
        rows_before: "length",
        moves: Some("documents come after rows that are no part of them"),
        merges: Merges::No,
        peft_type: Some("MULTITASK_PROMPT_TUNING"),
        ..Card::new(
            "multitask-prompt-tuning",
            Point::Adapter,
            "Rows before those of every document, a prompt times a small low-rank matrix of its task: for going on from a prompt that \
             several tasks were trained to share, where the task has little data.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Adapter for MultitaskPromptTuning {
    fn attach(&self, arch: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let [length, rank] = [self.config.length, self.config.rank].map(|size| size as usize);
        let tensors = vec![
            prompt::trained(PROMPT, [length, arch.hidden]),
            prompt::trained(COLS, [1, length, rank]),
            prompt::trained(ROWS, [1, rank, arch.hidden]),
        ];
        prompt::attach(arch, sites, self.config.length, tensors)
    }

    fn init(&self, at: &Attachment, table: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        let rows_pd = prompt::rows_at(table, prompt::drawn(table, self.config.length, rng))?;
        let start =
            |local: &str| if local == PROMPT { Start::Is(rows_pd.clone()) } else { Start::Normal(self.config.std) };
        starts::each(at, rng, |spec| start(spec.local))
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Sequence(self)
    }

    fn merge(&self, _: &Attachment, _: &Locals, _: &dyn Weight) -> attune_points::Result<Merged> {
        Ok(Merged::No(prompt::UNMERGED))
    }

    fn peft(&self) -> Option<Peft> {
        let own = json!({"num_tasks": 1, "num_ranks": self.config.rank, "prompt_tuning_init": "SAMPLE_VOCAB"});
        let names = vec![(PROMPT, "prompt_embeddings"), (COLS, "prefix_task_cols"), (ROWS, "prefix_task_rows")];
        let Peft { config, .. } = prompt::peft("MULTITASK_PROMPT_TUNING", self.config.length, &own);
        Some(Peft { config, tensors: PeftTensors::Whole(names) })
    }
}

impl SequenceMap for MultitaskPromptTuning {
    fn length(&self) -> usize {
        self.config.length as usize
    }

    fn graph(&self, tensors: &Locals) -> attune_points::Result<Tensor> {
        let task_pd = ops::matmul(&tensors.get(COLS)?.squeeze(0)?, &tensors.get(ROWS)?.squeeze(0)?)?;
        Ok((tensors.get(PROMPT)? * task_pd)?)
    }
}

/// What `adapter_config.json` of PEFT's prompt of one task says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, _: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let (length, targets) = prompt::from_peft(config)?;
    let said = |key: &str| config.get(key).cloned().unwrap_or_default();
    if said("num_tasks") != 1 {
        let message = format!("is {}; expected 1: keep the rows of the task that is meant", said("num_tasks"));
        return Err(vec![Fault::new("num_tasks", message)]);
    }
    let Some(rank) = said("num_ranks").as_u64().filter(|rank| (1..=1024).contains(rank)) else {
        return Err(vec![Fault::new("num_ranks", format!("is {}; expected 1 to 1024", said("num_ranks")))]);
    };
    let params = Map::from_iter([("length".to_owned(), json!(length)), ("rank".to_owned(), json!(rank))]);
    Ok((MethodRef { method: MultitaskPromptTuning::CARD.name.to_owned(), params }, targets))
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn rows_are_a_prompt_times_the_tasks_matrix() {
        let method = MultitaskPromptTuning { config: Config { length: 2, rank: 2, std: 1.0 } };
        let tensor = |values: &[f64], shape: &[usize]| Tensor::from_slice(values, shape, &Device::Cpu).unwrap();
        let tensors = Locals::new(
            "wte",
            [
                (PROMPT, tensor(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[2, 3])),
                (COLS, tensor(&[1.0, 2.0, 0.0, -1.0], &[1, 2, 2])),
                (ROWS, tensor(&[1.0, 0.0, 2.0, 3.0, 1.0, 0.5], &[1, 2, 3])),
            ],
        );
        let rows: Vec<Vec<f64>> = method.graph(&tensors).unwrap().to_vec2().unwrap();
        // [[1, 2], [0, -1]] [[1, 0, 2], [3, 1, 0.5]] = [[7, 2, 3], [-3, -1, -0.5]]
        assert_eq!(rows, [[7.0, 4.0, 9.0], [-12.0, -5.0, -3.0]]);
        let ones = tensors.iter().map(|(local, tensor)| match local {
            PROMPT => (local, tensor.clone()),
            _ => (local, (tensor.ones_like().unwrap() * if local == COLS { 0.5 } else { 1.0 }).unwrap()),
        });
        let rows = method.graph(&Locals::new("wte", ones.collect::<Vec<_>>())).unwrap();
        assert_eq!(rows.dtype(), DType::F64);
        assert_eq!(rows.to_vec2::<f64>().unwrap(), [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]);
    }

    #[test]
    fn prompts_of_several_tasks_are_refused() {
        let config = json!({"num_virtual_tokens": 5, "num_tasks": 3, "num_ranks": 1});
        let faults = from_peft(config.as_object().unwrap(), &[]).unwrap_err();
        assert!(faults[0].to_string().starts_with("`num_tasks` is 3; expected 1"), "{}", faults[0]);
    }
}
