//! The frozen base: an architecture and its weights, mapped, in memory, or made at random.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use attune_architecture::{Architecture, Place, Site, SiteId, SiteKind, TensorInfo, TensorPart};
use attune_points::quantization::Quantization;
use attune_points::weight::Unquantized;
use attune_points::{TensorName, Weight};
use attune_spec::FieldPath;
use attune_spec::id::Step;
use attune_spec::job::Precision;
use attune_spec::method::{BuildCx, MethodRef};
use attune_tensor::kernels::{DeviceCopy, Kernels};
use attune_tensor::{FrozenWeight, Mapped, Rng};
use candle_core::{DType, Device, Tensor};

use crate::error::Error;
use crate::folder::{self, Found};
use crate::pass::{Activations, Arena};
use crate::quantizations::QUANTIZATIONS;

/// In how few bits linears of blocks are held, and which type products with them are in.
#[derive(Debug, Clone)]
struct Few {
    by: Arc<dyn Quantization>,
    dtype: DType,
}

/// A matrix before it was quantised: where it can be read, and whether it is the transpose there.
#[derive(Debug, Clone)]
struct Source {
    matrix: FrozenWeight,
    transposed: bool,
}

impl Weight for Source {
    fn shape(&self) -> (usize, usize) {
        let (o, i) = self.matrix.shape();
        if self.transposed { (i, o) } else { (o, i) }
    }

    fn rows(&self, rows: Range<usize>, dtype: DType) -> attune_points::Result<Tensor> {
        if !self.transposed {
            return Ok(self.matrix.rows(rows, dtype)?);
        }
        let whole = self.matrix.rows(0..self.matrix.shape().0, dtype)?.t()?;
        Ok(whole.narrow(0, rows.start, rows.len())?.contiguous()?)
    }
}

/// A model's architecture and frozen weights.
#[derive(Debug)]
pub struct Base {
    /// Copies of the matrices on a device; they go before the matrices do.
    kept: Vec<DeviceCopy>,
    architecture: Architecture,
    /// The head's name and the embedding's, if the model keeps one matrix for both.
    tie: Option<(SiteId, SiteId)>,
    matrices: BTreeMap<TensorName, FrozenWeight>,
    vectors: BTreeMap<TensorName, Tensor>,
    few: Option<Few>,
    /// The sites that have numbers at random because the files have none.
    fresh: Vec<SiteId>,
    /// What was quantised.
    sources: BTreeMap<TensorName, Source>,
    /// The buffers of passes over it.
    arena: Arena,
}

impl Base {
    /// A base of this structure without its tensors.
    pub(crate) fn empty(architecture: Architecture) -> Self {
        let tie = architecture.tie();
        Self {
            kept: Vec::new(),
            architecture,
            tie,
            matrices: BTreeMap::new(),
            vectors: BTreeMap::new(),
            few: None,
            fresh: Vec::new(),
            sources: BTreeMap::new(),
            arena: Arena::default(),
        }
    }

    /// A base of this structure without its tensors, which holds what it takes of this one as this one does.
    pub(crate) fn emptied(&self, architecture: Architecture) -> Self {
        Self { few: self.few.clone(), ..Self::empty(architecture) }
    }

    /// The same base on the device of these kernels: passes over it work there, and the matrices lie there too.
    ///
    /// # Errors
    /// What the device failed at: not enough memory, for one.
    pub fn on(mut self, kernels: &'static dyn Kernels) -> attune_points::Result<Self> {
        self.kept.clear();
        self.arena = Arena::new(kernels);
        for matrix in self.matrices.values() {
            // What is held in few bits is widened for each product.
            self.kept.extend(matrix.read()?.mat().and_then(|mat| kernels.keep(mat)));
        }
        kernels.fault()?;
        Ok(self)
    }

    /// The sites that have numbers at random because the base's files have none for them: a head over classes that is new.
    pub fn fresh(&self) -> &[SiteId] {
        &self.fresh
    }

    /// Where passes take their buffers from: all models over this base together.
    pub const fn arena(&self) -> &Arena {
        &self.arena
    }

    /// Opens a Hugging Face folder. Matrices that are stored in the asked precision stay mapped files; others are converted
    /// once, and those that the files hold transposed are turned once, so that every pass reads rows. Vectors (norms,
    /// biases) are held in 32 bits.
    ///
    /// # Errors
    /// [`Error`] naming the file, and the tensor where one is at fault.
    pub fn open(folder: &Path, precision: Precision) -> Result<Self, Error> {
        let mut base = Self::empty(folder::architecture(folder)?);
        base.read(folder, precision, &[], 0)?;
        Ok(base)
    }

    /// The same with the linears of its blocks in few bits: each is quantised as it is read, and the file's memory let go of. Products
    /// with them are in `precision`.
    ///
    /// # Errors
    /// As for [`Base::open`]; a method or parameters that are no format, as a fault of `tune.quantization`.
    pub fn open_quantized(folder: &Path, precision: Precision, format: &MethodRef) -> Result<Self, Error> {
        let mut base = Self::empty(folder::architecture(folder)?);
        base.few = Some(Few { by: quantization(format)?, dtype: dtype(precision) });
        base.read(folder, precision, &[], 0)?;
        Ok(base)
    }

    /// The same base with the linears of its blocks in few bits.
    ///
    /// # Errors
    /// As for [`Base::open_quantized`].
    pub fn quantized(mut self, format: &MethodRef) -> Result<Self, Error> {
        let dtype = match self.activations() {
            Activations::F32 => DType::F32,
            Activations::Bf16 => DType::BF16,
        };
        self.few = Some(Few { by: quantization(format)?, dtype });
        for info in self.architecture.tensors() {
            let name = TensorName::from_path(&info.name);
            if let Some(matrix) = self.matrices.get(&name).filter(|_| info.place.quantizes()) {
                let source = Source { matrix: matrix.clone(), transposed: false };
                self.quantize(name, &info, source)?;
            }
        }
        Ok(self)
    }

    /// Holds a matrix in few bits, if it is one that is held so; whether it is.
    fn quantize(&mut self, name: TensorName, info: &TensorInfo, source: Source) -> Result<bool, Error> {
        let Some(few) = self.few.as_ref().filter(|_| info.place.quantizes()) else { return Ok(false) };
        // Of a transpose the whole is turned once.
        let turned = if source.transposed { Some(source.dense(few.dtype)?) } else { None };
        let whole = turned.as_ref().map_or(&source as &dyn Weight, |turned| turned);
        let quantized = few.by.quantize(whole, few.dtype).map_err(|error| named(error, &name))?;
        self.matrices.insert(name.clone(), FrozenWeight::quantized(quantized, few.dtype)?);
        self.sources.insert(name, source);
        Ok(true)
    }

    /// Takes a matrix that a folder holds in few bits already.
    fn stored(&mut self, name: TensorName, info: &TensorInfo, file: &Mapped, stored: &str) -> Result<(), Error> {
        let format = |message: String| Error::Format { path: file.path().to_owned(), message };
        let Some(few) = &self.few else {
            let state = format!("{stored}.quant_state.");
            let kind = file.names().find_map(|name| name.strip_prefix(&state)).unwrap_or_default();
            let message = format!(
                "tensor {stored:?} is held in few bits ({kind}); expected `tune.quantization` to say so, or a folder with f32, bf16 or \
                 f16 weights"
            );
            return Err(format(message));
        };
        let &[output, input] = info.shape.as_slice() else { return Err(format(format!("{stored:?} is no matrix"))) };
        let part = |further: &str| file.stored(&format!("{stored}{further}"));
        let quantized = few.by.stored((output, input), &part).map_err(|error| match error {
            attune_points::Error::Refused(message) => format(format!("tensor {stored:?} {message}")),
            other => other.into(),
        })?;
        self.matrices.insert(name, FrozenWeight::quantized(quantized, few.dtype)?);
        file.forget(stored);
        Ok(())
    }

    /// Whether linears of its blocks are held in few bits.
    pub const fn holds_few(&self) -> bool {
        self.few.is_some()
    }

    /// Whether linears are held in few bits of which nobody has what they were before.
    pub fn is_few_only(&self) -> bool {
        self.few.is_some()
            && self
                .matrices
                .iter()
                .any(|(name, matrix)| matrix.as_quantized().is_some() && !self.sources.contains_key(name))
    }

    /// The same base with other numbers in few bits: of each of these weights what it was before it was quantised, less the product of
    /// the factors `left_or` and `right_ri` times a number, is quantised anew. Everything else is shared with this one.
    ///
    /// # Errors
    /// A weight that is not held in few bits, or whose numbers before that cannot be read.
    pub fn requantized(
        &self,
        less: impl IntoIterator<Item = (TensorName, (Tensor, Tensor, f64))>,
    ) -> attune_points::Result<Self> {
        let mut made = Self::empty(self.architecture.clone());
        made.matrices.clone_from(&self.matrices);
        made.vectors.clone_from(&self.vectors);
        made.sources.clone_from(&self.sources);
        made.few.clone_from(&self.few);
        made.fresh.clone_from(&self.fresh);
        for (name, (left_or, right_ri, factor)) in less {
            let Some(before) = self.unquantized(&name) else {
                return Err(attune_points::Error::Refused(format!("{name} is not held in few bits")));
            };
            let matrix = before.without(&left_or, &right_ri, factor).map_err(|error| named(error, &name))?;
            made.matrices.insert(name, matrix);
        }
        made.on(self.arena.kernels())
    }

    /// A matrix before it was quantised.
    fn unquantized(&self, name: &TensorName) -> Option<Unquantized<'_>> {
        let (few, source) = (self.few.as_ref()?, self.sources.get(name)?);
        Some(Unquantized { by: &*few.by, weight: Box::new(source.clone()), dtype: few.dtype })
    }

    /// Bytes of its tensors, in memory or in mapped files; those of a tensor with several names count once.
    pub fn bytes(&self) -> usize {
        let (mut matrices, mut vectors) = (BTreeSet::new(), HashSet::new());
        let of_matrices = self.matrices.values().filter(|matrix| matrices.insert(matrix.place()));
        let of_vectors = self.vectors.values().filter(|vector| vectors.insert(vector.id()));
        let of_vectors = of_vectors.map(|vector| vector.elem_count() * vector.dtype().size_in_bytes());
        of_matrices.map(FrozenWeight::bytes).sum::<usize>() + of_vectors.sum::<usize>()
    }

    /// The same trunk under an architecture that [`Architecture::with_head`] or [`Architecture::bidirectional`] made of the
    /// folder's own, with the linears of its blocks in few bits if a format is given. Tensors of a classifier and its pooler that the
    /// files lack start at random from the seed.
    ///
    /// # Errors
    /// As for [`Base::open_quantized`].
    pub fn open_as(
        folder: &Path,
        precision: Precision,
        format: Option<&MethodRef>,
        change: impl FnOnce(Architecture) -> Result<Architecture, attune_spec::Fault>,
        seed: u64,
    ) -> Result<Self, Error> {
        let fault = |fault| Error::Architecture {
            folder: folder.to_owned(),
            source: attune_architecture::Error::Fields(vec![fault]),
        };
        let mut base = Self::empty(change(folder::architecture(folder)?).map_err(fault)?);
        if let Some(format) = format {
            base.few = Some(Few { by: quantization(format)?, dtype: dtype(precision) });
        }
        base.read(folder, precision, &[Place::Classifier, Place::Pooler], seed)?;
        Ok(base)
    }

    /// Reads the folder's tensors; those at `fresh` places may be missing.
    fn read(&mut self, folder: &Path, precision: Precision, fresh: &[Place], seed: u64) -> Result<(), Error> {
        let dtype = dtype(precision);
        let found = folder::tensors(folder, &self.architecture, fresh)?;
        // What whoever made the folder left as it was stays so.
        let is_few = found.iter().any(|(_, found)| matches!(found, Found::Few(..)));
        for (info, found) in found {
            let name = TensorName::from_path(&info.name);
            let matrix = info.shape.len() == 2;
            let tensor = match found {
                Found::Numbers(tensor) => tensor,
                Found::Few(file, stored) => {
                    self.stored(name, &info, &file, &stored)?;
                    continue;
                }
                Found::Nothing => {
                    self.fresh.push(info.site.clone());
                    self.random_tensor(&info, seed, if matrix { dtype } else { DType::F32 })?;
                    continue;
                }
            };
            if !matrix {
                self.vectors.insert(name, tensor.to_tensor(DType::F32)?);
                continue;
            }
            if self.few.is_some() && !is_few {
                let source = Source { matrix: FrozenWeight::mapped(tensor.clone())?, transposed: info.transposed };
                if self.quantize(name.clone(), &info, source)? {
                    tensor.forget();
                    continue;
                }
            }
            let weight = if info.transposed {
                FrozenWeight::dense(&tensor.to_tensor(dtype)?.t()?)?
            } else if tensor.dtype() == dtype && tensor.view().is_some() {
                FrozenWeight::mapped(tensor)?
            } else {
                FrozenWeight::dense(&tensor.to_tensor(dtype)?)?
            };
            self.matrices.insert(name, weight);
        }
        Ok(())
    }

    /// Reads the architecture of a folder and makes random weights for it: matrices normal with the architecture's standard
    /// deviation, norms 1, biases 0. Each tensor's numbers depend on the seed and its name only.
    ///
    /// # Errors
    /// [`Error`] if `config.json` cannot be used.
    pub fn from_scratch(folder: &Path, seed: u64) -> Result<Self, Error> {
        Self::random(folder::architecture(folder)?, seed, DType::F32)
    }

    /// Random weights of `dtype` for an architecture, as for [`Base::from_scratch`].
    ///
    /// # Errors
    /// Whatever making the tensors raises.
    pub fn random(architecture: Architecture, seed: u64, dtype: DType) -> Result<Self, Error> {
        let mut base = Self::empty(architecture);
        for info in base.architecture.tensors() {
            base.random_tensor(&info, seed, dtype)?;
        }
        Ok(base)
    }

    fn random_tensor(&mut self, info: &TensorInfo, seed: u64, dtype: DType) -> Result<(), Error> {
        let name = TensorName::from_path(&info.name);
        if info.shape.len() == 2 {
            let mut stream = Rng::new(seed, "base weights").named(&info.name);
            let std = self.architecture.initial_std(info.place);
            let weight = stream.normal_tensor(info.shape.as_slice(), std, dtype)?;
            self.matrices.insert(name, FrozenWeight::dense(&weight)?);
        } else {
            let value = if info.part == TensorPart::Bias { 0.0 } else { 1.0 };
            let vector = Tensor::full(value, info.shape.as_slice(), &Device::Cpu)?.to_dtype(dtype)?;
            self.vectors.insert(name, vector);
        }
        Ok(())
    }

    /// A base of given tensors, which must be those that the architecture names, in its shapes.
    ///
    /// # Errors
    /// [`Error::MissingTensor`].
    pub fn from_tensors(architecture: Architecture, tensors: &BTreeMap<String, Tensor>) -> Result<Self, Error> {
        let mut base = Self::empty(architecture);
        for info in base.architecture.tensors() {
            let missing = || Error::MissingTensor { folder: "(memory)".into(), name: info.name.clone() };
            let tensor = tensors.get(&info.name).ok_or_else(missing)?;
            let name = TensorName::from_path(&info.name);
            base.put(name, tensor)?;
        }
        Ok(base)
    }

    /// Takes a tensor of another base, where it lies.
    ///
    /// # Errors
    /// A name that the other base does not have.
    pub(crate) fn take(&mut self, name: TensorName, other: &Self, of: &TensorName) -> attune_points::Result<()> {
        if let Some(source) = other.sources.get(of) {
            self.sources.insert(name.clone(), source.clone());
        }
        match other.matrices.get(of) {
            Some(matrix) => drop(self.matrices.insert(name, matrix.clone())),
            None => drop(self.vectors.insert(name, other.vector(of)?.clone())),
        }
        Ok(())
    }

    /// Takes a tensor of its own under another name, where it lies.
    ///
    /// # Errors
    /// A name that it does not have yet.
    pub(crate) fn repeat(&mut self, name: TensorName, of: &TensorName) -> attune_points::Result<()> {
        match self.matrices.get(of).cloned() {
            Some(matrix) => drop(self.matrices.insert(name, matrix)),
            None => drop(self.vectors.insert(name, self.vector(of)?.clone())),
        }
        Ok(())
    }

    /// Takes a tensor.
    ///
    /// # Errors
    /// A tensor that cannot be stored.
    pub(crate) fn put(&mut self, name: TensorName, tensor: &Tensor) -> attune_points::Result<()> {
        if tensor.rank() == 2 {
            self.matrices.insert(name, FrozenWeight::dense(tensor)?);
        } else {
            self.vectors.insert(name, tensor.clone());
        }
        Ok(())
    }

    /// The type that a pass over this base computes its activations in: that of its matrices, if it is bf16.
    pub fn activations(&self) -> Activations {
        let narrow = self.matrices.values().next().is_some_and(|matrix| matrix.dtype() == DType::BF16);
        if narrow { Activations::Bf16 } else { Activations::F32 }
    }

    /// The model's structure.
    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    /// The name under which the tensor `local` of `site` is kept: a tied head's weight is the embedding's.
    pub fn tensor_name(&self, site: &str, local: &str) -> TensorName {
        match &self.tie {
            Some((head, embedding)) if site == head.as_str() => TensorName::new(embedding.as_str(), local),
            _ => TensorName::new(site, local),
        }
    }

    pub(crate) fn matrix(&self, name: &TensorName) -> attune_points::Result<&FrozenWeight> {
        self.matrices.get(name).ok_or_else(|| self.unknown(name))
    }

    pub(crate) fn vector(&self, name: &TensorName) -> attune_points::Result<&Tensor> {
        self.vectors.get(name).ok_or_else(|| self.unknown(name))
    }

    fn unknown(&self, name: &TensorName) -> attune_points::Error {
        attune_points::Error::UnknownTensor {
            component: name.owner().to_owned(),
            name: name.local().to_owned(),
            declared: self.architecture.tensors().into_iter().map(|info| info.name).collect(),
        }
    }

    /// A tensor of the base by name, as a tensor of `dtype`.
    ///
    /// # Errors
    /// A name that the model does not have.
    pub fn tensor(&self, name: &TensorName, dtype: DType) -> attune_points::Result<Tensor> {
        match self.matrices.get(name) {
            Some(matrix) => Ok(matrix.rows(0..matrix.shape().0, dtype)?),
            None => Ok(self.vector(name)?.to_dtype(dtype)?),
        }
    }

    /// The type that a tensor of the base is held in.
    pub fn dtype(&self, name: &TensorName) -> Option<DType> {
        self.matrices.get(name).map(FrozenWeight::dtype).or_else(|| self.vectors.get(name).map(Tensor::dtype))
    }

    /// The weight of a site, as adapters see it.
    pub fn weight<'a>(&'a self, site: &'a Site) -> SiteWeight<'a> {
        SiteWeight { base: self, site }
    }
}

/// What was wrong with a tensor, with its name.
fn named(error: attune_points::Error, name: &TensorName) -> attune_points::Error {
    match error {
        attune_points::Error::Refused(message) => attune_points::Error::Refused(format!("{name}: {message}")),
        other => other,
    }
}

/// What a job's precision of frozen weights is in tensors.
pub const fn dtype(precision: Precision) -> DType {
    match precision {
        Precision::Bf16 => DType::BF16,
        Precision::F32 => DType::F32,
    }
}

/// The format that a job names.
fn quantization(format: &MethodRef) -> Result<Arc<dyn Quantization>, Error> {
    let (path, cx) =
        (FieldPath::from("tune").field("quantization"), BuildCx { steps: Step(0), domains: &[], words: None });
    Ok(QUANTIZATIONS.build(format, &path, &cx).map_err(Error::Refused)?.into())
}

/// The frozen weight (and bias) of one site.
pub struct SiteWeight<'a> {
    base: &'a Base,
    site: &'a Site,
}

impl Weight for SiteWeight<'_> {
    fn shape(&self) -> (usize, usize) {
        match self.site.kind {
            SiteKind::Linear { output, input, .. } => (output, input),
            SiteKind::Embedding { vocab, width } => (vocab, width),
            SiteKind::Norm { width, .. } => (width, 1),
            SiteKind::Block { .. } => (0, 0),
        }
    }

    fn rows(&self, rows: Range<usize>, dtype: DType) -> attune_points::Result<Tensor> {
        let name = self.base.tensor_name(self.site.id.as_str(), "weight");
        match self.site.kind {
            SiteKind::Norm { .. } => Ok(self.base.vector(&name)?.narrow(0, rows.start, rows.len())?.to_dtype(dtype)?),
            SiteKind::Linear { .. } | SiteKind::Embedding { .. } => Ok(self.base.matrix(&name)?.rows(rows, dtype)?),
            SiteKind::Block { .. } => {
                let message = format!("{} is a whole block, which has no weight of its own", self.site.id);
                Err(attune_points::Error::Refused(message))
            }
        }
    }

    fn bias(&self, dtype: DType) -> attune_points::Result<Option<Tensor>> {
        if self.site.kind.bias_width().is_none() {
            return Ok(None);
        }
        let name = self.base.tensor_name(self.site.id.as_str(), "bias");
        Ok(Some(self.base.vector(&name)?.to_dtype(dtype)?))
    }

    fn is_tied(&self) -> bool {
        self.site.place == Place::Embedding && self.base.architecture().tied
    }

    fn unquantized(&self) -> Option<Unquantized<'_>> {
        self.base.unquantized(&self.base.tensor_name(self.site.id.as_str(), "weight"))
    }
}
