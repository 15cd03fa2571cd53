//! The point `Adapter`: which attachments at which sites, with which tensors, and what do they merge to?

use std::ops::Range;

use attune_architecture::{Architecture, Site, SiteId};
use attune_spec::Fault;
use attune_spec::id::Step;
use attune_tensor::rng::Rng;
use candle_core::Tensor;

use crate::engine::StepRule;
use crate::error::{Error, Result};
use crate::forms::AsWeight;
use crate::layout::{Doc, Layout};
use crate::params::{Locals, Params, TensorSpec};
use crate::stats::{Stats, StatsRequest};
use crate::weight::Weight;

/// What an adapter puts at one site.
#[derive(Debug, Clone, PartialEq)]
pub struct Attachment {
    /// The site.
    pub site: SiteId,
    /// The tensors that it reads there.
    pub tensors: Vec<TensorSpec>,
}

/// A component of a model with parameters of its own, made from a slot of the job's stack.
pub trait Adapter: Send + Sync {
    /// The attachments at `sites` (the slot's resolved targets) of a model of this architecture.
    ///
    /// # Errors
    /// One fault for each site that this method cannot be put on, with the field path relative to the slot.
    fn attach(&self, arch: &Architecture, sites: &[Site]) -> std::result::Result<Vec<Attachment>, Vec<Fault>>;

    /// Starting values of the tensors at `at`, and what has to happen to the base weight for them. Randomness comes from
    /// `rng` alone, which is keyed by the site.
    ///
    /// # Errors
    /// Whatever computing them raises.
    fn init(&self, at: &Attachment, weight: &dyn Weight, rng: &mut Rng) -> Result<(Locals, BaseEdit)>;

    /// Starting values at all of its attachments at once, in their order, where those of one site depend on weights of others; `weight` gives the
    /// base's at each, and `rng` is keyed by no site. None for most, whose sites know nothing of each other: [`Adapter::init`] starts them.
    ///
    /// # Errors
    /// As for [`Adapter::init`].
    fn init_together(
        &self,
        _at: &[Attachment],
        _weight: &WeightOf<'_, '_>,
        _rng: &Rng,
    ) -> Result<Option<Vec<(Locals, BaseEdit)>>> {
        Ok(None)
    }

    /// What it wants measured at its sites, on the job's data and without itself, before it starts. Nothing for most.
    fn calibrate(&self) -> Vec<StatsRequest> {
        Vec::new()
    }

    /// A text, as tokens, whose keys and values at its attentions it wants to know before it starts. None for most.
    fn reads(&self) -> Option<&[u32]> {
        None
    }

    /// Starting values as in [`Adapter::init`], where it is known what it wants [measured](Adapter::calibrate) and what attentions made
    /// of the text that it [reads](Adapter::reads).
    ///
    /// # Errors
    /// As for [`Adapter::init`]; what `stats` does not have.
    fn init_by(
        &self,
        at: &Attachment,
        weight: &dyn Weight,
        _stats: &Stats,
        rng: &mut Rng,
    ) -> Result<(Locals, BaseEdit)> {
        self.init(at, weight, rng)
    }

    /// Whether it takes out of the base's own weights, at all of its sites, what it finds to be least in them: a second such component would take out the same
    /// once more. Few do.
    fn truncates(&self) -> bool {
        false
    }

    /// The tensors that never train and that a folder of it need not have, for the base's weight says them: whoever reads one
    /// without them finds them as a start does, whatever is drawn. None for most.
    fn said_by_base(&self) -> &'static [&'static str] {
        &[]
    }

    /// Whether what it trains is kept in the folder of another adapter that trains beside it, where there is one. Few are.
    fn is_kept_beside(&self) -> bool {
        false
    }

    /// How the component takes part in the computation at `at`.
    fn port(&self, at: &Attachment) -> Port<'_>;

    /// Which rows of a batch it acts on, ascending and disjoint: others pass linears and blocks as if it were not there, bit for bit. All of
    /// them if `None`, as for most. Ports that put something before documents, or at a table, do not heed it.
    fn acts_on(&self, _layout: &Layout) -> Option<Vec<Range<u32>>> {
        None
    }

    /// A loss on the tensors of the component at `at` themselves, a number, in differentiable operations only. Its gradient is
    /// added to that of the mean loss once an optimiser step. None for most.
    ///
    /// # Errors
    /// A tensor that was not declared, or shapes that do not fit.
    fn penalty(&self, _at: &Attachment, _tensors: &Locals) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// How the steps of a job that trains it use the engine, where the usual step is not enough: a choice of what trains that
    /// changes on the way. Such a job has no other step rule. None for most.
    fn step_rule(&self, _of: &Trained<'_>) -> Option<Box<dyn StepRule>> {
        None
    }

    /// What the component at `at` becomes without itself.
    ///
    /// # Errors
    /// Whatever computing it raises.
    fn merge(&self, at: &Attachment, tensors: &Locals, weight: &dyn Weight) -> Result<Merged>;

    /// The same component without what a run that has ended left of it that does nothing: an adapter of fewer sites or smaller tensors that
    /// computes what this one does with these parameters. It is what a folder holds. None where there is nothing of the kind, as for
    /// most.
    ///
    /// # Errors
    /// Parameters that are not those of `at`.
    fn compacted(&self, _at: &[Attachment], _params: &Params) -> Result<Option<Compacted>> {
        Ok(None)
    }

    /// How the adapter is written down in Hugging Face PEFT's layout; `None` if its result is a whole model.
    fn peft(&self) -> Option<Peft>;

    /// The keys of its configuration there, beside `target_modules`, that list the module of `at`. None for most.
    fn peft_lists(&self, _at: &Attachment) -> &'static [&'static str] {
        &[]
    }
}

/// Gives the base weight at an attachment.
pub type WeightOf<'f, 'w> = dyn Fn(&Attachment) -> Result<Box<dyn Weight + 'w>> + Sync + 'f;

/// An adapter with its parameters, in place of a larger one that computes the same.
pub struct Compacted {
    /// The adapter.
    pub adapter: Box<dyn Adapter>,
    /// Where it is attached.
    pub attachments: Vec<Attachment>,
    /// Its parameters.
    pub params: Params,
}

/// A component that trains, as a step rule of its own gets to know it.
pub struct Trained<'a> {
    /// Its place in the stack.
    pub slot: u16,
    /// Where it is attached, in the order of the model's sites.
    pub attachments: Vec<&'a Attachment>,
    /// How many steps the job has.
    pub steps: Step,
}

/// What an initialisation needs done to the base.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum BaseEdit {
    /// Nothing: the component starts as the identity, or as what its card says.
    None,
    /// The component starts as something, which is taken out of the base: the same component with these tensors stays beside
    /// it, frozen, so that both together start as nothing. The base is as it was, and other jobs may share it.
    Beside(Locals),
    /// The weight, which is held in few bits, is quantised anew: of what it was before, less what the same component with these
    /// tensors adds to it. The base is the job's own then.
    Requantized(Locals),
}

/// Where a component takes part. More ports (router, head) join with their first users.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub enum Port<'a> {
    /// `y + delta(x)` at a linear operator.
    Delta(&'a dyn RowMap),
    /// Another weight in place of a linear operator's own, made of it.
    Weight(&'a dyn WeightMap),
    /// Other rows in place of those that a linear operator's own weight is multiplied with, made of them. What is added beside it
    /// reads the rows as they are.
    Input(&'a dyn EndMap),
    /// Other rows in place of those that a linear operator's own weight and bias give, made of them, before anything is added.
    Output(&'a dyn EndMap),
    /// Other rows in place of those that a block adds to the stream, made of them.
    Branch(&'a dyn BranchMap),
    /// Other rows in place of those that a block adds to the stream, made of them and of what the branches before it in the stack
    /// would add to them. These take part by it alone.
    Mixture(&'a dyn MixtureMap),
    /// Rows added at a linear operator, made of those that it reads and of what the components before it in the stack would add
    /// there. These take part by it alone.
    Blend(&'a dyn BlendMap),
    /// Further keys and values at an attention.
    Attention(&'a dyn AttentionMap),
    /// Rows that an attention looks at beside its documents.
    Aside(&'a dyn AsideMap),
    /// Rows before those of each document, at the table of tokens.
    Sequence(&'a dyn SequenceMap),
    /// Rows in place of some of a table's own, wherever the table is used: where tokens are looked up, and where it is the weight of
    /// a head.
    Table(&'a dyn TableMap),
    /// Rows added to the embeddings of tokens where these are looked up.
    Lookup(&'a dyn LookupMap),
    /// Rows added to those of each document by their places in it, at the table of tokens or where the stream enters an attention.
    Places(&'a dyn PlacesMap),
    /// Other rows in place of the stream's behind a block, or behind the table of tokens, made of them and of rows that the component
    /// carries from there to there.
    Side(&'a dyn SideMap),
    /// The component's tensors `weight` and `bias` stand in for the operator's own.
    Weights,
}

/// A map from the weight of a linear operator to the weight that its rows are multiplied with.
///
/// The engine makes the new weight at one site at a time, once forward and once in reverse, and keeps none: a pass never
/// holds the weights of two sites. Several such components at a site apply in the order of the stack.
pub trait WeightMap: Send + Sync {
    /// The weight `[o, i]` in place of `w_oi`, in differentiable operations only and valid in f64: the definition, the oracle
    /// of tests and the backward.
    ///
    /// # Errors
    /// A tensor that was not declared, or shapes that do not fit.
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> Result<Tensor>;

    /// The bias `[o]` in place of `b_o`, which the operator has beside the weight `w_oi` that [`WeightMap::graph`] is given, in
    /// differentiable operations only and valid in f64. It stays as it is for most.
    ///
    /// # Errors
    /// As for [`WeightMap::graph`].
    fn bias(&self, b_o: &Tensor, _w_oi: &Tensor, _tensors: &Locals) -> Result<Tensor> {
        Ok(b_o.clone())
    }
}

/// A map of rows to rows of the same width, at one end of a linear operator's own product. Several at one end apply in the order
/// of the stack.
pub trait EndMap: Send + Sync {
    /// The rows `[T, w]` in place of `x_tw`, in differentiable operations only and valid in f64. Each row of the result depends
    /// on its own row alone.
    ///
    /// # Errors
    /// A tensor that was not declared, or shapes that do not fit.
    fn graph(&self, x_tw: &Tensor, tensors: &Locals) -> Result<Tensor>;

    /// The same component as another weight `[o, i]`, and bias, of the operator that it stands before or behind; none if it has no such
    /// form. Which of the two runs is the engine's choice, by what they cost.
    fn as_weight(&self, _o_i: (usize, usize)) -> Option<AsWeight<'_>> {
        None
    }
}

/// A map from what a block reads and gives to what is added to the stream in place of the latter: a bottleneck after an
/// attention or an MLP, or beside it.
pub trait BranchMap: Send + Sync {
    /// The rows `[T, D]` in place of `y_td`, which the block gave for the rows `x_td` (after the norm, where norms come first),
    /// in differentiable operations only and valid in f64. Each row of the result depends on its own row of both alone.
    ///
    /// # Errors
    /// A tensor that was not declared, or shapes that do not fit.
    fn graph(&self, x_td: &Tensor, y_td: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> Result<Tensor>;
}

/// A map from what branches would add to a block's rows to what is added.
pub trait MixtureMap: Send + Sync {
    /// The rows `[T, D]` in place of `y_td`, which the block gave for the rows `x_td`, by what each of the branches at this block
    /// would add to them, `[T, D]` each in the order of the stack, in differentiable operations only and valid in f64. Each
    /// row of the result depends on its own row of all alone. Without branches it is `y_td`.
    ///
    /// # Errors
    /// A tensor that was not declared, or shapes that do not fit.
    fn graph(&self, x_td: &Tensor, y_td: &Tensor, added: &[Tensor], tensors: &Locals, cx: &RowCx<'_>)
    -> Result<Tensor>;
}

/// What a blend is made of.
pub struct Blended<'a> {
    /// The rows that the operator reads, `[T, i]`.
    pub x_ti: &'a Tensor,
    /// What each of the components would add to the rows that the operator gives, `[T, o]` each, in the order of the stack.
    pub added: &'a [Tensor],
    /// The rows that the base gives by itself, `[T, D]`, after its last norm and without any component; none, unless
    /// [`BlendMap::reads_base`] says that they are read. No gradient goes through them.
    pub base_td: Option<&'a Tensor>,
}

/// A map from what components would add to the rows of a linear operator to what is added. A loss that one of them has of its own
/// is not heard.
pub trait BlendMap: Send + Sync {
    /// How many components it blends, the same at each of its sites.
    fn blends(&self) -> usize;

    /// Whether it reads the rows that the base gives by itself. Where it does, a pass of the base alone goes before each pass that it
    /// takes part in.
    fn reads_base(&self) -> bool {
        false
    }

    /// The tensors at `at` in place of those that it starts with, made of what each of the components that it blends is when it is
    /// merged into the operator's weight. None for most.
    ///
    /// # Errors
    /// Components that it cannot be made of.
    fn made_of(&self, _at: &Attachment, _blended: &[Merged]) -> Result<Option<Locals>> {
        Ok(None)
    }

    /// The rows `[T, o]` that are added in place of what the components would add, in differentiable operations only and valid in f64.
    /// Each row of the result depends on its own row of all alone.
    ///
    /// # Errors
    /// A tensor that was not declared, or shapes that do not fit.
    fn graph(&self, of: &Blended<'_>, tensors: &Locals, cx: &RowCx<'_>) -> Result<Tensor>;
}

/// Keys and values that every row of an attention sees before those of its own document.
///
/// They take places: a document's first row has the position that follows theirs.
pub trait AttentionMap: Send + Sync {
    /// How many there are, P; the same at every attention of a slot.
    fn length(&self) -> usize;

    /// Keys and values, `[P, K W]` each (K key heads of width W), in differentiable operations only and valid in f64. Keys are
    /// compared as they are: no position turns them.
    ///
    /// # Errors
    /// A tensor that was not declared, or shapes that do not fit.
    fn graph(&self, tensors: &Locals) -> Result<(Tensor, Tensor)>;

    /// The way back: the tensors, by their local names, of which [`AttentionMap::graph`] makes these keys and values, `[P, K W]`. None
    /// where it makes them of something else.
    ///
    /// # Errors
    /// Shapes that do not fit.
    fn tensors(&self, _keys_pk: &Tensor, _values_pk: &Tensor) -> Result<Option<Vec<(&'static str, Tensor)>>> {
        Ok(None)
    }
}

/// Rows that an attention's own linears make keys and values of, for every document to look at apart from its own: what is found
/// there is weighed by a gate and added to what is found in the document. No position is taken.
pub trait AsideMap: Send + Sync {
    /// The rows `[P, D]`, and the gate `[1]`, in differentiable operations only and valid in f64. Keys of the rows are compared as
    /// they are: no position turns them.
    ///
    /// # Errors
    /// A tensor that was not declared, or shapes that do not fit.
    fn graph(&self, tensors: &Locals) -> Result<(Tensor, Tensor)>;
}

/// Rows that enter the stream before those of each document, in the place of embeddings of tokens.
///
/// They are rows of the layout ([`crate::Row::Virtual`]), planned where documents are packed: they take positions, count in the
/// budget of a batch, and are not supervised. Each document has its own, all with the same values.
pub trait SequenceMap: Send + Sync {
    /// How many there are, P.
    fn length(&self) -> usize;

    /// The rows `[P, D]`, in differentiable operations only and valid in f64. They are made once in a pass for each of its parts.
    ///
    /// # Errors
    /// A tensor that was not declared, or shapes that do not fit.
    fn graph(&self, tensors: &Locals) -> Result<Tensor>;
}

/// Rows for some tokens in place of those that a table has for them. The table is never made anew: what is looked up, and the
/// logits of these tokens, come from these rows. Where several components have one for a token, the last of the stack's counts.
pub trait TableMap: Send + Sync {
    /// The tokens, K different ones.
    fn tokens(&self) -> &[u32];

    /// Their rows `[K, D]`, in that order, in differentiable operations only and valid in f64.
    ///
    /// # Errors
    /// A tensor that was not declared, or shapes that do not fit.
    fn graph(&self, tensors: &Locals) -> Result<Tensor>;
}

/// Rows that are added to the embeddings of tokens where these are looked up, by the tokens alone. Logits do not see them, nor do rows
/// that are no tokens.
pub trait LookupMap: Send + Sync {
    /// The rows `[K, D]` that K different tokens, `tokens_k` of whole numbers of 32 bits, get, in differentiable operations only and
    /// valid in f64.
    ///
    /// # Errors
    /// A tensor that was not declared, or shapes that do not fit.
    fn of_tokens(&self, tokens_k: &Tensor, tensors: &Locals) -> Result<Tensor>;
}

/// Rows that are added to those of each document by their places: to the embeddings at the table of tokens, or to the stream before
/// it enters an attention and goes by it.
///
/// Places count the rows of a document without those that other components put before it: the component's own come first, then the
/// document's.
pub trait PlacesMap: Send + Sync {
    /// The first place that has a row added, and how many have, P.
    fn places(&self) -> (usize, usize);

    /// The rows `[P, D]`, in differentiable operations only and valid in f64. They are made once in a pass for each of its parts.
    ///
    /// # Errors
    /// A tensor that was not declared, or shapes that do not fit.
    fn graph(&self, tensors: &Locals) -> Result<Tensor>;
}

/// A map from the stream behind a block, and from rows that the component carries beside it, to both.
///
/// The rows that it carries are zeros before its first site; from there on each of its sites is given what the one before it made.
/// Their gradients go the same way back, past the blocks between.
pub trait SideMap: Send + Sync {
    /// How wide the rows are that it carries, Z; the same at all sites of a slot.
    fn width(&self) -> usize;

    /// The rows `[T, D]` in place of `h_td`, the stream, and those `[T, Z]` that are carried on in place of `z_tz`, in differentiable
    /// operations only and valid in f64. Each row of both depends on its own row of both alone.
    ///
    /// # Errors
    /// A tensor that was not declared, or shapes that do not fit.
    fn graph(&self, h_td: &Tensor, z_tz: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> Result<(Tensor, Tensor)>;
}

/// A map from the rows at a site to rows of its output.
pub trait RowMap: Send + Sync {
    /// The contribution `[T, o]` for input rows `x_ti`, in differentiable operations only and valid in f64: the definition,
    /// the oracle of tests and the default backward. A `Delta` does not see the operator's own output.
    ///
    /// # Errors
    /// A tensor that was not declared, or shapes that do not fit.
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> Result<Tensor>;

    /// A loss of its own on these rows, a number, in differentiable operations only and valid in f64: a balance of experts. Its
    /// gradient is added to the objective's as if it were the mean loss of each of the part's supervised tokens; reports have the
    /// objective's loss alone. None for most; not asked of a map that is fused, nor at a
    /// head, whose rows come in chunks.
    ///
    /// # Errors
    /// As for [`RowMap::graph`].
    fn loss(&self, _x_ti: &Tensor, _tensors: &Locals, _cx: &RowCx<'_>) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// The same component as another weight `[o, i]`, and bias, of the operator that it adds to; none if it has no such form, as one that
    /// drops numbers of single rows or has a loss of its own. Which of the two runs is the engine's choice, by what they cost.
    fn as_weight(&self, _o_i: (usize, usize)) -> Option<AsWeight<'_>> {
        None
    }

    /// The same map in a form that the engine computes within the product of the site's own weight; none if it has no such
    /// form. It is held to `graph`.
    fn fused(&self) -> Option<FusedRows> {
        None
    }
}

/// A form of [`RowMap`] that the engine has kernels for.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum FusedRows {
    /// `scale · up_or down_ri (mask ∘ x)`, where the mask is that of dropout with probability `dropout`.
    LowRank {
        /// Local name of the tensor `[r, i]`.
        down: &'static str,
        /// Local name of the tensor `[o, r]`.
        up: &'static str,
        /// The factor on the product.
        scale: f64,
        /// Probability that an input value is dropped in training.
        dropout: f64,
    },
}

/// What a component may know about the pass it runs in.
pub struct RowCx<'a> {
    /// The site.
    pub site: &'a SiteId,
    /// Columns of what is there: of the operator's output, of the rows that a block adds.
    pub output: usize,
    /// Whether dropout applies; `None` in evaluation. Keyed by step and site: ask it for row-wise streams.
    pub dropout: Option<&'a dyn DropoutMask>,
    /// The batch.
    pub layout: &'a Layout,
    /// Which of its rows are at hand; all of them if `None`.
    pub rows: Option<&'a [u32]>,
}

impl RowCx<'_> {
    /// The documents of the batch that have rows at hand, each with the places of these among them. Rows of a document follow
    /// each other.
    pub fn docs(&self) -> Vec<(&Doc, Range<usize>)> {
        let docs = self.layout.docs();
        let place = |row: u32| match self.rows {
            None => row as usize,
            Some(rows) => rows.partition_point(|&at| at < row),
        };
        let own = docs.iter().map(|doc| (doc, place(doc.rows.start)..place(doc.rows.end)));
        own.filter(|(_, places)| !places.is_empty()).collect()
    }
}

/// Makes the keep-masks of dropout and other noise of training, from logical indices only, so that neither packing nor ranks change them.
pub trait DropoutMask: Sync {
    /// A tensor `[T, width]` like `x`'s dtype: `1 / (1 - p)` where a value is kept, 0 where it is dropped. Each row's values
    /// depend only on (seed, step, site, the row's example and its position in it).
    ///
    /// # Errors
    /// Whatever making the tensor raises.
    fn mask(&self, site: &SiteId, width: usize, p: f64, like: &Tensor) -> Result<Tensor>;

    /// A tensor `[T, width]` of standard normal numbers like `x`'s dtype, keyed as [`DropoutMask::mask`] is.
    ///
    /// # Errors
    /// As for [`DropoutMask::mask`]; one that has masks alone refuses.
    fn noise(&self, site: &SiteId, _width: usize, _like: &Tensor) -> Result<Tensor> {
        Err(Error::Refused(format!("there is no noise for {site} here")))
    }

    /// A tensor of this shape of standard normal numbers like `like`'s dtype, the same for all rows of a step: noise of what is made of tensors
    /// alone. Its values depend only on (seed, step, site, `what`).
    ///
    /// # Errors
    /// As for [`DropoutMask::noise`].
    fn shared_noise(&self, site: &SiteId, what: &str, _shape: &[usize], _like: &Tensor) -> Result<Tensor> {
        Err(Error::Refused(format!("there is no noise for {what} of {site} here")))
    }
}

/// What a component becomes when it is merged.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Merged {
    /// A low-rank change of the weight: `w_oi + scale * left_or right_ri`.
    Factors {
        /// `[o, r]`.
        left: Tensor,
        /// `[r, i]`.
        right: Tensor,
        /// The factor on the product.
        scale: f64,
    },
    /// A new weight (and bias) in place of the operator's own.
    Weight {
        /// In the shape of the operator's weight.
        weight: Tensor,
        /// `[o]`, where the operator has one.
        bias: Option<Tensor>,
    },
    /// Nothing: it has to stay beside the base, for this reason.
    No(&'static str),
}

/// An adapter in Hugging Face PEFT's layout: its configuration, and how local names are spelt in
/// `adapter_model.safetensors`.
#[derive(Debug, Clone, PartialEq)]
pub struct Peft {
    /// Keys and values of `adapter_config.json`, `peft_type` among them; the writer adds what it knows of the base and the
    /// sites.
    pub config: serde_json::Map<String, serde_json::Value>,
    /// How its tensors are laid out.
    pub tensors: PeftTensors,
}

/// How the tensors of an adapter are laid out in `adapter_model.safetensors`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum PeftTensors {
    /// Each by itself: its local name and its spelling after the path of the module that owns it, such as `lora_A` and
    /// `lora_A.weight`; one that all sites share has no path before it, and a spelling from `base_model.` on is its whole name.
    Each(Vec<(&'static str, &'static str)>),
    /// The same, where what several sites share is repeated after the path of each of them.
    Repeated(Vec<(&'static str, &'static str)>),
    /// The keys and values before those of documents as the component makes them, whatever it makes them of: those of all layers, each
    /// of P rows, side by side in one tensor of P rows of this name, layer after layer, and in a layer keys before values. Such adapters have
    /// no target modules: they say how many layers, heads and numbers there are.
    Joined(&'static str),
    /// Each by itself as above, at the attentions of the last layers: the configuration has one name for all of these, and how many
    /// there are under this key.
    LastLayers(&'static str, Vec<(&'static str, &'static str)>),
    /// Each under a whole name. Such adapters have no target modules.
    Whole(Vec<(&'static str, &'static str)>),
    /// The rows before documents as the component makes them, whatever it makes them of, under this whole name. Such adapters have
    /// no target modules either.
    Prompt(&'static str),
    /// Each by its local name after the path of its module, which is listed under `modules_to_save` and not among the target modules.
    Saved,
}
