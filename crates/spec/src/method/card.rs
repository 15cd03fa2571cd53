//! What a method says about itself, as data.

use serde::{Deserialize, Serialize};

/// The extension points: which question a method answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Point {
    /// Which attachments at which sites, with which tensors, and what do they merge to?
    Adapter,
    /// Given base weight and statistics, what are the starting tensors?
    Init,
    /// How are ranks shared among sites?
    Budget,
    /// Layout and outputs to loss.
    Objective,
    /// How good is an answer that the model gave by itself?
    Reward,
    /// Which domain does the next batch come from, given feedback?
    Mixing,
    /// One architecture and its weights to another.
    Surgery,
    /// In how few bits are the frozen matrices of the base held?
    Quantization,
    /// How does one optimiser step use the engine?
    StepRule,
    /// Gradients to update.
    Optimizer,
    /// How does the learning rate run over time?
    Schedule,
    /// Which jobs, in which order, make this result?
    Recipe,
    /// Which jobs of a grid are worth running?
    Search,
    /// What do several sets of weights become together?
    Merge,
}

impl Point {
    /// All points, in the order of the documentation.
    pub const ALL: [Self; 14] = [
        Self::Adapter,
        Self::Init,
        Self::Budget,
        Self::Objective,
        Self::Reward,
        Self::Mixing,
        Self::Surgery,
        Self::Quantization,
        Self::StepRule,
        Self::Optimizer,
        Self::Schedule,
        Self::Recipe,
        Self::Search,
        Self::Merge,
    ];

    /// The point's name as it is written in files and on the wire, such as `step_rule`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Adapter => "adapter",
            Self::Init => "init",
            Self::Budget => "budget",
            Self::Objective => "objective",
            Self::Reward => "reward",
            Self::Mixing => "mixing",
            Self::Surgery => "surgery",
            Self::Quantization => "quantization",
            Self::StepRule => "step_rule",
            Self::Optimizer => "optimizer",
            Self::Schedule => "schedule",
            Self::Recipe => "recipe",
            Self::Search => "search",
            Self::Merge => "merge",
        }
    }

    /// What the point decides, as a question.
    pub const fn question(self) -> &'static str {
        match self {
            Self::Adapter => "which attachments at which sites, with which tensors, and what do they merge to?",
            Self::Init => "given the base weight, what are the starting tensors?",
            Self::Budget => "how are ranks shared among the sites of what trains?",
            Self::Objective => "what is the loss?",
            Self::Reward => "how good is an answer that the model gave by itself?",
            Self::Mixing => "which domain does the next document come from?",
            Self::Surgery => "which model is made of the base before it trains?",
            Self::Quantization => "in how few bits are the frozen matrices of the base held?",
            Self::StepRule => "how does one optimiser step use the engine?",
            Self::Optimizer => "how do gradients change the parameters?",
            Self::Schedule => "how does the learning rate run over time?",
            Self::Recipe => "which jobs, in which order, make this result?",
            Self::Search => "which jobs of a grid are worth running?",
            Self::Merge => "what do several sets of weights become together?",
        }
    }
}

/// Where a method was published.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Paper {
    /// The title.
    pub title: &'static str,
    /// The first authors.
    pub authors: &'static str,
    /// The year.
    pub year: u16,
}

/// What kind of operator a site is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SiteKind {
    /// A matrix multiplication.
    Linear,
    /// A table of vectors.
    Embedding,
    /// A normalisation.
    Norm,
    /// Attention as a whole.
    Attention,
    /// An MLP, or a mixture of experts, as a whole.
    Mlp,
}

impl SiteKind {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Linear, Self::Embedding, Self::Norm, Self::Attention, Self::Mlp];
}

/// How a component tunes a model, in the words of the field's surveys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Category {
    /// Some of the base's own numbers train.
    Selective,
    /// Something is added to the computation that is not there otherwise.
    Additive,
    /// Rows, keys or values are put before what the model reads.
    Prompt,
    /// The change of a weight is written in fewer numbers.
    Reparameterisation,
    /// Several of these at once, or several components mixed.
    Hybrid,
}

impl Category {
    /// All of them, in the order of the documentation.
    pub const ALL: [Self; 5] = [Self::Selective, Self::Additive, Self::Prompt, Self::Reparameterisation, Self::Hybrid];

    /// Its name as it is written in files and on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Selective => "selective",
            Self::Additive => "additive",
            Self::Prompt => "prompt",
            Self::Reparameterisation => "reparameterisation",
            Self::Hybrid => "hybrid",
        }
    }
}

/// What becomes of a component when it is merged into the base.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Merges {
    /// A low-rank change of the weight.
    Factors,
    /// A new weight.
    Weight,
    /// It cannot be merged.
    No,
    /// The question does not apply to this point.
    NotApplicable,
}

/// A condition between fields that a schema cannot express. `when` and `require` are expressions over the method's
/// parameters (see [`super::expression`]); if `when` holds and `require` does not, `path` is at fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Rule {
    /// When the rule applies; `true` for always.
    pub when: &'static str,
    /// What must hold then.
    pub require: &'static str,
    /// What is wrong and what would be right; reads on from the quoted path.
    pub message: &'static str,
    /// The field at fault, relative to the method.
    pub path: &'static str,
}

/// The name among [`Card::becomes`] of the layers that a model has.
pub const LAYERS: &str = "layers";

/// What a method says about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Card {
    /// Its name in job files, kebab-case; unique over all points.
    pub name: &'static str,
    /// The point that it answers.
    pub point: Point,
    /// Other spellings under which it is known.
    pub aliases: &'static [&'static str],
    /// One sentence: what it does and when one would choose it.
    pub summary: &'static str,
    /// How it tunes a model; `None` for points where nothing is tuned.
    pub category: Option<Category>,
    /// Where it was published; `None` for common practice.
    pub paper: Option<Paper>,
    /// The kinds of sites that it can be put on; empty for points without sites.
    pub applies: &'static [SiteKind],
    /// The sites of a slot that names none: an entry as in `targets`; empty for points without sites.
    pub targets: &'static str,
    /// Trainable parameters per site as an expression over the method's parameters, the site's input width `i` and output
    /// width `o`, the widths `d` of the model's stream and `k` of its keys, and whether it has a bias (`b`), leads out of an MLP (`down`) or of that or an
    /// attention (`out`), is a `table` or an attention as a whole (`attention`), as 0 or 1; empty for points without parameters.
    pub parameters: &'static str,
    /// Trainable parameters that all its sites share, as such an expression; empty for none.
    pub shared: &'static str,
    /// Numbers that it has per site and does not train, as such an expression, with the layers of the model as `model_layers`; lists as long as a width need not
    /// be counted. Empty for none.
    pub fixed: &'static str,
    /// Numbers that all its sites share and that do not train, as such an expression over the largest `i` and the largest `o` of them; empty
    /// for none.
    pub fixed_shared: &'static str,
    /// Numbers that its graph at a linear holds at once for a pass of `rows`: what it makes of them and of the weight, what that is made of,
    /// and gradients by both; as such an expression. Empty for `2*rows*(i+o) + 7*o*i`, as most hold.
    pub graph_numbers: &'static str,
    /// Numbers that it holds for a linear before the first step and not later, to take the weight apart or to draw from, as such an
    /// expression. Empty for few.
    pub start_numbers: &'static str,
    /// Whether it takes part within the products of a pass, where others run by graphs of their own.
    pub fused: bool,
    /// How many times the largest pass of a step rule holds a micro-batch, as an expression over its parameters; empty for once.
    pub copies: &'static str,
    /// How many passes over a step's batch, forward and back, a step rule makes in all, copies counted, as such an expression;
    /// empty for one.
    pub passes: &'static str,
    /// Bytes that what it has measured of a linear's inputs takes before the first step, as an expression like `parameters`; linears
    /// that read the same rows count once. Empty for nothing.
    pub input_statistics: &'static str,
    /// Bytes that what it has measured of a linear's weight takes before the first step, as such an expression; empty for nothing.
    pub weight_statistics: &'static str,
    /// How many answers to each prompt an objective has the model give by itself, as an expression over its parameters; empty if
    /// it learns what is in the data.
    pub answers: &'static str,
    /// The most tokens of such an answer, as such an expression.
    pub answer_tokens: &'static str,
    /// Whether it compares vectors of documents, not logits.
    pub compares_vectors: bool,
    /// Rows that it puts before those of every document, as an expression over its parameters; empty for none.
    pub rows_before: &'static str,
    /// What it makes of a model's sizes, `inner`, `experts`, `experts_per_token` and `experts_balance`: expressions over its
    /// parameters and the sizes before; those that it does not name stay. Under [`LAYERS`] stands no expression but the parameter that
    /// lists the layers as ranges of those before. Empty for points that leave a model as it is.
    pub becomes: &'static [(&'static str, &'static str)],
    /// Bytes that a linear's weight takes in a format of few bits, as an expression over its parameters and the weight's widths, `i` and
    /// `o`; empty for points that are no format.
    pub stored_bytes: &'static str,
    /// Whether it is for bases that are held in few bits, and no others.
    pub needs_quantization: bool,
    /// When a job with it has a base of its own, quantised anew, as a condition on its parameters; empty for never.
    pub own_base: &'static str,
    /// Why a model with it does not start as the base, if it does not.
    pub moves: Option<&'static str>,
    /// Whether it can be merged.
    pub merges: Merges,
    /// When it cannot although others of its kind can, as a condition on its parameters; empty for never.
    pub stays_beside: &'static str,
    /// Whether it trains the base's own weights, so that its result is a whole model.
    pub trains_base: bool,
    /// `peft_type` in Hugging Face PEFT's layout, where PEFT has the method.
    pub peft_type: Option<&'static str>,
    /// Conditions between fields.
    pub rules: &'static [Rule],
}

impl Card {
    /// A card with a name, a point and a sentence, from which others are made by struct update.
    pub const fn new(name: &'static str, point: Point, summary: &'static str) -> Self {
        Self {
            name,
            point,
            aliases: &[],
            summary,
            category: None,
            paper: None,
            applies: &[],
            targets: "",
            parameters: "",
            shared: "",
            fixed: "",
            fixed_shared: "",
            graph_numbers: "",
            start_numbers: "",
            copies: "",
            passes: "",
            input_statistics: "",
            weight_statistics: "",
            fused: false,
            answers: "",
            answer_tokens: "",
            compares_vectors: false,
            rows_before: "",
            becomes: &[],
            stored_bytes: "",
            needs_quantization: false,
            own_base: "",
            moves: None,
            merges: Merges::NotApplicable,
            stays_beside: "",
            trains_base: false,
            peft_type: None,
            rules: &[],
        }
    }
}
