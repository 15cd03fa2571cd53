//! Every folder under `golden/`, computed by PEFT (the scripts beside them).

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use attune_adapt::{ADAPTERS, peft};
use attune_models::{Base, Pass, surgery};
use attune_points::adapter::Merged;
use attune_points::layout::{NO_LABEL, Source};
use attune_points::{Grads, Layout, Params, Row, TensorName};
use attune_spec::job::{Precision, Targets};
use attune_spec::method::Catalogue;
use candle_core::{DType, Device, Tensor};
use libtest_mimic::{Failed, Trial};

use crate::is_of_draws;
use crate::support::{CrossEntropy, Setup, difference, largest};

/// Each case and the base that it was made on.
const CASES: &[(&str, &str)] = &[
    ("gpt2_adalora", "gpt2"),
    ("gpt2_all_linear", "gpt2"),
    ("gpt2_deft", "gpt2"),
    ("gpt2_dora", "gpt2"),
    ("gpt2_embedded", "gpt2"),
    ("gpt2_fourierft", "gpt2"),
    ("gpt2_frod", "gpt2"),
    ("gpt2_gralora", "gpt2"),
    ("gpt2_hira", "gpt2"),
    ("gpt2_ia3", "gpt2"),
    ("gpt2_lora_bias", "gpt2"),
    ("gpt2_monteclora", "gpt2"),
    ("gpt2_multitask", "gpt2"),
    ("gpt2_norms", "gpt2"),
    ("gpt2_prefix", "gpt2"),
    ("gpt2_prompt", "gpt2"),
    ("gpt2_pvera", "gpt2"),
    ("gpt2_randlora", "gpt2"),
    ("gpt2_tinylora", "gpt2"),
    ("gpt2_tokens", "gpt2"),
    ("gpt2_unilora", "gpt2"),
    ("gpt2_vblora", "gpt2"),
    ("gpt2_vera", "gpt2"),
    ("gpt2_waveft", "gpt2"),
    ("llama_adalora", "llama"),
    ("llama_adamss", "llama"),
    ("llama_adaption", "llama"),
    ("llama_all_linear", "llama"),
    ("llama_alora", "llama"),
    ("llama_bdlora", "llama"),
    ("llama_beft", "llama"),
    ("llama_boft", "llama"),
    ("llama_bone", "llama"),
    ("llama_bone_mini", "llama"),
    ("llama_c3a", "llama"),
    ("llama_deft", "llama"),
    ("llama_delora", "llama"),
    ("llama_embedded", "llama"),
    ("llama_fourierft", "llama"),
    ("llama_frod", "llama"),
    ("llama_glora", "llama"),
    ("llama_gralora", "llama"),
    ("llama_hira", "llama"),
    ("llama_hra", "llama"),
    ("llama_kasa", "llama"),
    ("llama_lily", "llama"),
    ("llama_loha", "llama"),
    ("llama_lokr", "llama"),
    ("llama_monteclora", "llama"),
    ("llama_multitask", "llama"),
    ("llama_oft", "llama"),
    ("llama_osf", "llama"),
    ("llama_patterns", "llama"),
    ("llama_peanut", "llama"),
    ("llama_poly", "llama"),
    ("llama_prefix", "llama"),
    ("llama_prompt", "llama"),
    ("llama_psoft", "llama"),
    ("llama_pvera", "llama"),
    ("llama_qalora", "llama"),
    ("llama_randlora", "llama"),
    ("llama_replicated", "llama"),
    ("llama_road_2", "llama"),
    ("llama_shira", "llama"),
    ("llama_some", "llama"),
    ("llama_supertuning", "llama"),
    ("llama_tinylora", "llama"),
    ("llama_tokens", "llama"),
    ("llama_unilora", "llama"),
    ("llama_vblora", "llama"),
    ("llama_velora", "llama"),
    ("llama_vera", "llama"),
    ("llama_waveft", "llama"),
    ("mistral_adaption", "mistral"),
    ("qwen2_adalora", "qwen2"),
    ("qwen2_adamss", "qwen2"),
    ("qwen2_adamss_one", "qwen2"),
    ("qwen2_all_linear", "qwen2"),
    ("qwen2_alora", "qwen2"),
    ("qwen2_bdlora", "qwen2"),
    ("qwen2_beft", "qwen2"),
    ("qwen2_boft", "qwen2"),
    ("qwen2_bone_bat", "qwen2"),
    ("qwen2_c3a", "qwen2"),
    ("qwen2_deft", "qwen2"),
    ("qwen2_delora", "qwen2"),
    ("qwen2_dora", "qwen2"),
    ("qwen2_glora", "qwen2"),
    ("qwen2_glora_forms", "qwen2"),
    ("qwen2_hra", "qwen2"),
    ("qwen2_ia3", "qwen2"),
    ("qwen2_kasa", "qwen2"),
    ("qwen2_lily", "qwen2"),
    ("qwen2_loha", "qwen2"),
    ("qwen2_lokr", "qwen2"),
    ("qwen2_lora_bias", "qwen2"),
    ("qwen2_norms", "qwen2"),
    ("qwen2_oft", "qwen2"),
    ("qwen2_osf", "qwen2"),
    ("qwen2_peanut", "qwen2"),
    ("qwen2_poly", "qwen2"),
    ("qwen2_psoft", "qwen2"),
    ("qwen2_qalora", "qwen2"),
    ("qwen2_road_1", "qwen2"),
    ("qwen2_road_4", "qwen2"),
    ("qwen2_shira", "qwen2"),
    ("qwen2_some_rslora", "qwen2"),
    ("qwen2_supertuning", "qwen2"),
    ("qwen2_tokens", "qwen2"),
    ("qwen2_waveft", "qwen2"),
];

/// What configurations say about what is computed; each method has some of them.
pub(crate) const KEYS: &[&str] = &[
    "r",
    "alpha",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "rank_dropout",
    "module_dropout",
    "use_effective_conv2d",
    "init_weights",
    "fan_in_fan_out",
    "feedforward_modules",
    "variant",
    "kasa_config",
    "group_size",
    "bias",
    "peft_type",
    "task_type",
    "num_virtual_tokens",
    "num_transformer_submodules",
    "num_layers",
    "num_attention_heads",
    "token_dim",
    "prefix_projection",
    "prompt_tuning_init",
    "num_tasks",
    "num_ranks",
    "adapter_len",
    "adapter_layers",
    "oft_block_size",
    "block_share",
    "use_cayley_neumann",
    "num_cayley_neumann_terms",
    "coft",
    "boft_block_size",
    "apply_GS",
    "block_size",
    "mask_type",
    "n_frequency",
    "scaling",
    "random_loc_seed",
    "boft_block_num",
    "boft_n_butterfly_factor",
    "boft_dropout",
    "decompose_both",
    "decompose_factor",
    "rank_dropout_scale",
    "hira_dropout",
    "mini_r",
    "miss_dropout",
    "gralora_k",
    "hybrid_r",
    "gralora_dropout",
    "delora_lambda",
    "d_initial",
    "vera_dropout",
    "projection_prng_key",
    "save_projection",
    "randlora_alpha",
    "randlora_dropout",
    "sparse",
    "very_sparse",
    "init_r",
    "num_vectors",
    "vector_length",
    "topk",
    "vblora_dropout",
    "init_vector_bank_bound",
    "init_logits_std",
    "save_only_topk_weights",
    "wavelet_family",
    "use_idwt",
    "proportional_parameters",
    "u",
    "weight_tying",
    "tinylora_dropout",
    "projection_seed",
    "init_v_bound",
    "sparsity",
    "select_top",
    "lora_dropout",
    "save_precomputed_indices",
    "decomposition_method",
    "para",
    "init_scale",
    "deft_dropout",
    "depth",
    "act_fn",
    "pvera_dropout",
    "sample_at_inference",
    "stride_A",
    "num_B",
    "proj_seed",
    "theta_d_length",
    "unilora_dropout",
    "init_theta_d_bound",
    "save_indices",
    "token_indices",
    "lora_bias",
    "monteclora_config",
    "use_bdlora",
    "config_A_B",
    "config_C",
    "config_D_E",
    "num_subspaces",
    "subspace_rank",
    "use_dynamic_rank",
    "n_tasks",
    "n_skills",
    "n_splits",
    "poly_type",
    "num_frozen_tokens",
    "alora_invocation_tokens",
    "layer_replication",
];

/// Cases whose rows a network makes, which PEFT leaves out of the adapter: its tensors stand beside it.
const ENCODERS: &[(&str, &str)] =
    &[("gpt2_p_tuning_lstm", "gpt2"), ("llama_p_tuning", "llama"), ("llama_prefix_made", "llama")];

/// Both sides compute in f32; the bound that outputs and (relative) gradients have to keep.
pub(crate) const TOLERANCE: f64 = 1e-4;

pub(crate) fn trials() -> Vec<Trial> {
    let trial = |(case, base): &(&'static str, &'static str), run: fn(&str, &str) -> Result<(), Failed>| {
        let (case, base) = (*case, *base);
        Trial::test(format!("golden::{case}::agrees_with_peft"), move || run(case, base))
    };
    let cases = CASES.iter().map(|of| trial(of, run));
    let encoders = ENCODERS.iter().map(|of| trial(of, encoder));
    cases.chain(encoders).chain([trial(&("bert_prompt", "bert"), vectors)]).collect()
}

pub(crate) type Tensors = BTreeMap<String, Tensor>;

pub(crate) fn open(path: PathBuf) -> Result<Option<Tensors>, Failed> {
    if !path.is_file() {
        return Ok(None);
    }
    Ok(Some(candle_core::safetensors::load(path, &Device::Cpu)?.into_iter().collect()))
}

pub(crate) fn layout(golden: &Tensors) -> Result<Layout, Failed> {
    let ints = |name: &str| -> Result<Vec<i64>, Failed> { Ok(golden[name].to_dtype(DType::I64)?.to_vec1()?) };
    let (ids, labels) = (ints("input_ids")?, ints("labels")?);
    let mut layout = Layout::new();
    let mut start = 0;
    for length in ints("doc_lengths")? {
        let rows = start..start + length as usize;
        start = rows.end;
        let row = |row: usize| (Row::Token(ids[row] as u32), u32::try_from(labels[row]).unwrap_or(NO_LABEL));
        layout.push(Source::default(), rows.map(row).collect::<Vec<_>>());
    }
    Ok(layout)
}

fn run(case: &str, base_name: &str) -> Result<(), Failed> {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let golden = here.join("golden").join(case);
    let mut folder = peft::read(&golden.join("adapter"))?;
    let mut base = Base::open(&here.join("../models/golden").join(base_name), Precision::F32)?;
    if let Some(surgery) = folder.ranges.as_ref().and_then(|ranges| Catalogue::embedded().repeating(ranges)) {
        base = surgery::operate(&base, &surgery, 0)?;
    }
    let adapter = super::build(serde_json::to_value(&folder.method)?).map_err(super::fail)?;
    let card = ADAPTERS.card(&folder.method.method).ok_or("no card")?;
    let mut setup = Setup::on(base, adapter, &folder.targets, card.applies, DType::F32);
    folder.complete(&*setup.adapter, &setup.attachments, |at| setup.weight(at))?;
    setup.theta = setup.with_params(folder.params(&*setup.adapter, &setup.attachments)?);

    let mut compared = 0;
    for (batch, gradients) in
        [("expected.safetensors", "gradients.safetensors"), ("packed.safetensors", "packed_gradients.safetensors")]
    {
        let (Some(expected), Some(gradients)) = (open(golden.join(batch))?, open(golden.join(gradients))?) else {
            continue;
        };
        let layout = setup.begun(&layout(&expected)?);
        let pass = Pass { theta: &setup.theta, layout: &layout, dropout: None };
        let off = difference(&setup.model.logits(&pass)?, &expected["logits"]);
        assert!(off < TOLERANCE, "{batch}: logits are off by {off}");
        let mut sink = Grads::wanting(setup.theta.trained().map(|(id, _)| id));
        let scale = 1.0 / layout.counts().tokens as f64;
        let report = setup.model.grad(&pass, &CrossEntropy, scale, &mut sink)?;
        let loss: f64 = expected["loss"].to_dtype(DType::F64)?.to_vec1::<f64>()?[0];
        assert!(
            (report.mean() - loss).abs() < TOLERANCE * loss,
            "{batch}: the loss is {} against {loss}",
            report.mean()
        );
        // Gradients are laid out as their tensors are, beside what never trains.
        let mut params = setup.params();
        for (id, gradient) in sink.iter().filter(|(id, _)| !is_of_draws(id.name.local())) {
            params.insert(id.name.clone(), gradient.ok_or("no gradient")?.clone());
        }
        let silent = |name: &TensorName| params.is_fixed(name) || is_of_draws(name.local());
        let fixed = params.iter().filter(|(name, _)| silent(name)).count();
        let found = written(&setup, &params)?;
        let gradients = without_copies(gradients, &found);
        assert_eq!(found.len() - fixed, gradients.len());
        assert!(gradients.keys().all(|name| found.contains_key(name)), "{:?}", found.keys());
        for (name, reference) in gradients {
            let found = found.get(&name).ok_or_else(|| format!("no gradient of {name}"))?;
            let off = difference(found, &reference) / largest(&reference);
            assert!(off < TOLERANCE, "{batch}: the gradient of {name} is off by a factor of {off}");
        }
        compared += 1;
    }
    assert!(compared > 0, "nothing was compared");

    written_back(&setup, &golden.join("adapter"))?;
    if let Some(folder) = std::env::var_os("ATTUNE_WRITTEN") {
        keep(&setup, &PathBuf::from(folder).join(case), base_name, &golden.join("expected.safetensors"))?;
    }

    for (name, reference) in open(golden.join("merged.safetensors"))?.unwrap_or_default() {
        let site = name.strip_suffix(".weight").ok_or("no weight")?;
        let at = setup.attachments.iter().find(|at| at.site.as_str() == site).ok_or("no attachment")?;
        let locals = attune_models::stack::locals(at, &setup.params())?;
        let base = setup.model.base();
        let weight = match setup.adapter.merge(at, &locals, &*setup.weight(at)?)? {
            Merged::Factors { left, right, scale } => {
                (base.tensor(&base.tensor_name(site, "weight"), DType::F32)? + (left.matmul(&right)? * scale)?)?
            }
            Merged::Weight { weight, .. } => weight,
            other => return Err(format!("{other:?} does not merge").into()),
        };
        let transposed = base.architecture().site(site).is_some_and(|site| site.kind.transposed());
        let reference = if transposed { reference.t()? } else { reference };
        assert!(difference(&weight, &reference) < TOLERANCE, "{name}");
    }
    Ok(())
}

/// Rows before the documents of a model that gives vectors: they count in these.
fn vectors(case: &str, base_name: &str) -> Result<(), Failed> {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let golden = here.join("golden").join(case);
    let opened = |name: &str| open(golden.join(name))?.ok_or_else(|| Failed::from(format!("no {name}")));
    let (expected, gradients) = (opened("expected.safetensors")?, opened("gradients.safetensors")?);
    let folder = peft::read(&golden.join("adapter"))?;
    let base = Base::open(&here.join("../models/golden").join(base_name), Precision::F32)?;
    let adapter = super::build(serde_json::to_value(&folder.method)?).map_err(super::fail)?;
    let card = ADAPTERS.card(&folder.method.method).ok_or("no card")?;
    let mut setup = Setup::on(base, adapter, &folder.targets, card.applies, DType::F32);
    setup.theta = setup.with_params(folder.params(&*setup.adapter, &setup.attachments)?);
    let layout = setup.begun(&layout(&expected)?);
    let pass = Pass { theta: &setup.theta, layout: &layout, dropout: None };
    let hidden = setup.model.hidden(&pass)?.pop().ok_or("no rows")?;
    assert!(difference(&hidden, &expected["hidden"]) < TOLERANCE);
    let mut sink = Grads::wanting(setup.theta.trained().map(|(id, _)| id));
    let vectors = setup.model.embed_grad(&pass, &expected["dy"], &mut sink)?;
    assert!(difference(&vectors, &expected["mean"]) < TOLERANCE);
    let reference = &gradients["prompt_embeddings"];
    for (_, gradient) in sink.iter() {
        let off = difference(gradient.ok_or("no gradient")?, reference) / largest(reference);
        assert!(off < TOLERANCE, "the gradient is off by a factor of {off}");
    }
    Ok(())
}

/// A tensor of ours from those of PEFT's encoder; of its two biases the sum is meant, and each has that one's gradient.
fn of_encoder(local: &str, theirs: &Tensors, biases: &[&str]) -> Result<Tensor, Failed> {
    let layers = (0..).take_while(|layer| theirs.contains_key(&format!("lstm_head.weight_ih_l{layer}"))).count();
    let both = |layers: std::ops::Range<usize>, name: &str| -> Result<Tensor, Failed> {
        let names = layers.flat_map(|layer| ["", "_reverse"].map(|side| format!("lstm_head.{name}_l{layer}{side}")));
        Ok(Tensor::cat(&names.map(|name| theirs[&name].clone()).collect::<Vec<_>>(), 0)?)
    };
    Ok(match local {
        "embedding" => theirs["embedding.weight"].clone(),
        "lstm_first" => both(0..1, "weight_ih")?,
        "lstm_further" => both(1..layers, "weight_ih")?,
        "lstm_state" => both(0..layers, "weight_hh")?,
        "lstm_bias" => {
            let all = biases.iter().map(|bias| both(0..layers, bias)).collect::<Result<Vec<_>, _>>()?;
            Tensor::stack(&all, 0)?.sum(0)?
        }
        _ => {
            let name = local.trim_start_matches("linear_");
            let (linear, part) = name.split_once('_').unwrap_or((name, "weight"));
            theirs[&format!("mlp_head.{}.{part}", 2 * linear.parse::<usize>()?)].clone()
        }
    })
}

/// A tensor of ours, of the attention of a layer if it is not all of them's, from those of PEFT's perceptron, whose last linear makes the
/// numbers of all layers: in each keys before values.
fn of_perceptron(name: &TensorName, theirs: &Tensors) -> Result<Tensor, Failed> {
    let part = if name.local().ends_with("bias") { "bias" } else { "weight" };
    Ok(match name.local() {
        "embedding" => theirs["embedding.weight"].clone(),
        "inner" | "inner_bias" => theirs[&format!("transform.0.{part}")].clone(),
        local => {
            let layer = name.owner().split('.').find_map(|part| part.parse::<usize>().ok()).ok_or("no layer")?;
            let k = theirs["embedding.weight"].dim(1)?;
            let which = 2 * layer + usize::from(local.starts_with("values"));
            theirs[&format!("transform.2.{part}")].narrow(0, which * k, k)?.contiguous()?
        }
    })
}

/// A component that makes its rows: what the model answers, its gradients, and the rows that are left of it.
fn encoder(case: &str, base_name: &str) -> Result<(), Failed> {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let golden = here.join("golden").join(case);
    let opened = |name: &str| open(golden.join(name))?.ok_or_else(|| Failed::from(format!("no {name}")));
    let (expected, theirs) = (opened("expected.safetensors")?, opened("encoder.safetensors")?);
    let gradients = opened("encoder_gradients.safetensors")?;
    let config = |folder: &Path| -> Result<serde_json::Value, Failed> {
        Ok(serde_json::from_slice(&std::fs::read(folder.join("adapter_config.json"))?)?)
    };
    let said = config(&golden.join("adapter"))?;
    let card = ADAPTERS.cards().find(|card| card.peft_type == said["peft_type"].as_str()).ok_or("no card")?;
    let mut method = serde_json::json!({
        "method": card.name,
        "length": said["num_virtual_tokens"],
        "hidden": said["encoder_hidden_size"],
    });
    let of_rows = said["encoder_reparameterization_type"].as_str().map(str::to_lowercase);
    if let Some(encoder) = &of_rows {
        method["encoder"] = encoder.as_str().into();
        method["layers"] = said["encoder_num_layers"].clone();
    }
    let of = |name: &TensorName, theirs: &Tensors, biases: &[&str]| {
        if of_rows.is_some() { of_encoder(name.local(), theirs, biases) } else { of_perceptron(name, theirs) }
    };
    let adapter = super::build(method);
    let on = |adapter, targets: &Targets| -> Result<Setup, Failed> {
        let base = Base::open(&here.join("../models/golden").join(base_name), Precision::F32)?;
        Ok(Setup::on(base, adapter, targets, card.applies, DType::F32))
    };
    let mut setup = on(adapter.map_err(super::fail)?, &Targets::from(card.targets))?;
    let mut params = setup.params();
    for (name, _) in setup.params().iter() {
        params.insert(name.clone(), of(name, &theirs, &["bias_ih", "bias_hh"])?);
    }
    setup.theta = setup.with_params(params);

    let layout = setup.begun(&layout(&expected)?);
    let pass = Pass { theta: &setup.theta, layout: &layout, dropout: None };
    let off = difference(&setup.model.logits(&pass)?, &expected["logits"]);
    assert!(off < TOLERANCE, "logits are off by {off}");
    let mut sink = Grads::wanting(setup.theta.trained().map(|(id, _)| id));
    setup.model.grad(&pass, &CrossEntropy, 1.0 / layout.counts().tokens as f64, &mut sink)?;
    for (id, gradient) in sink.iter() {
        let reference = of(&id.name, &gradients, &["bias_hh"])?;
        let off = difference(gradient.ok_or("no gradient")?, &reference) / largest(&reference);
        assert!(off < TOLERANCE, "the gradient of {id} is off by a factor of {off}");
    }

    // PEFT's file, and ours, hold the rows that were made.
    let folder = tempfile::tempdir()?;
    write(&setup, &setup.params(), folder.path())?;
    let written = config(folder.path())?;
    let more = ["encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"];
    for key in KEYS.iter().chain(&more) {
        assert_eq!(written[key], said[key], "{key}");
    }
    let (ours, kept) = (tensors(folder.path())?, tensors(&golden.join("adapter"))?);
    assert_eq!(ours.keys().collect::<Vec<_>>(), kept.keys().collect::<Vec<_>>());
    for (name, tensor) in &ours {
        assert!(difference(tensor, &kept[name]) < TOLERANCE, "{name}");
    }
    let read = peft::read(&golden.join("adapter"))?;
    let adapter = super::build(serde_json::to_value(&read.method)?).map_err(super::fail)?;
    let mut rows = on(adapter, &read.targets)?;
    rows.theta = rows.with_params(read.params(&*rows.adapter, &rows.attachments)?);
    let pass = Pass { theta: &rows.theta, layout: &layout, dropout: None };
    assert!(difference(&rows.model.logits(&pass)?, &expected["logits"]) < TOLERANCE);
    if let Some(folder) = std::env::var_os("ATTUNE_WRITTEN") {
        keep(&setup, &PathBuf::from(folder).join(case), base_name, &golden.join("expected.safetensors"))?;
    }
    Ok(())
}

/// Leaves the adapter as we write it, what the model answers with it, and the name of the base, for PEFT to read
/// (`golden/check_peft_reads.py --cases`).
pub(crate) fn keep(setup: &Setup, to: &Path, base: &str, expected: &Path) -> Result<(), Failed> {
    write(setup, &setup.params(), &to.join("adapter"))?;
    std::fs::write(to.join("base"), base)?;
    let Some(expected) = open(expected.to_owned())? else { return Ok(()) };
    let logits = setup.logits(&layout(&expected)?)?;
    let of = |name: &'static str| (name, expected[name].clone());
    let kept = HashMap::from([of("input_ids"), of("doc_lengths"), ("logits", logits)]);
    Ok(candle_core::safetensors::save(&kept, to.join("logits.safetensors"))?)
}

/// Tensors as an adapter folder of ours holds them.
fn written(setup: &Setup, params: &Params) -> Result<Tensors, Failed> {
    let folder = tempfile::tempdir()?;
    write(setup, params, folder.path())?;
    tensors(folder.path())
}

pub(crate) fn write(setup: &Setup, params: &Params, to: &Path) -> Result<(), Failed> {
    let architecture = setup.model.base().architecture();
    Ok(peft::write(to, setup.part(params), None, architecture, "owner/base", "a card")?)
}

/// The local name of a tensor that belongs to no module.
fn own_name(name: &str) -> Option<&str> {
    name.strip_prefix("base_model.").filter(|local| !local.contains('.'))
}

pub(crate) fn tensors(folder: &Path) -> Result<Tensors, Failed> {
    open(folder.join("adapter_model.safetensors"))?.ok_or_else(|| "no tensors".into())
}

/// Tensors without those that are not among ours and are copies of others of the same local name: a head that is tied to a table has one.
fn without_copies(mut all: Tensors, ours: &Tensors) -> Tensors {
    let local = |name: &str| name.rsplit_once('.').map(|(_, local)| local.to_owned());
    let is_copy = |name: &String, tensor: &Tensor| {
        let mut others = all.iter().filter(|(other, _)| ours.contains_key(*other) && local(other) == local(name));
        others.any(|(_, other)| other.dims() == tensor.dims() && difference(other, tensor) == 0.0)
    };
    let further = all.iter().filter(|(name, _)| !ours.contains_key(*name));
    let copies: Vec<String> =
        further.filter(|(name, tensor)| is_copy(name, tensor)).map(|(name, _)| name.clone()).collect();
    all.retain(|name, _| !copies.contains(name));
    all
}

/// The adapter as we write it says of its base and itself what PEFT's own file says, and holds the same tensors.
pub(crate) fn written_back(setup: &Setup, reference: &Path) -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    write(setup, &setup.params(), folder.path())?;
    let config = |folder: &Path| -> Result<serde_json::Value, Failed> {
        Ok(serde_json::from_slice(&std::fs::read(folder.join("adapter_config.json"))?)?)
    };
    let (ours, theirs) = (config(folder.path())?, config(reference)?);
    // What PEFT says of every LoRA, and we where it is so.
    let asked = ["use_qalora", "qalora_group_size"].into_iter().filter(|key| !ours[*key].is_null());
    for key in KEYS.iter().copied().chain(asked) {
        assert_eq!(ours[key], theirs[key], "{key}");
    }
    let (mut ours, mut theirs) = (tensors(folder.path())?, tensors(reference)?);
    // What stands beside theirs, so that nothing has to be found again.
    ours.retain(|name, _| setup.adapter.said_by_base().iter().all(|local| !name.ends_with(&format!(".{local}"))));
    // Zeros that stand for what is off, what is needed to save less while training, and tables of the base.
    const NOT_WRITTEN: [&str; 3] = [".zeros", ".lora_velora_embed", ".base_layer.weight"];
    theirs.retain(|name, _| NOT_WRITTEN.iter().all(|end| !name.ends_with(end)));
    let mut theirs = without_copies(theirs, &ours);
    // What all sites share they write at each as well.
    let shared: Vec<String> = theirs.keys().filter_map(|name| own_name(name)).map(str::to_owned).collect();
    theirs
        .retain(|name, _| own_name(name).is_some() || !shared.iter().any(|local| name.ends_with(&format!(".{local}"))));
    assert_eq!(ours.keys().collect::<Vec<_>>(), theirs.keys().collect::<Vec<_>>());
    for (name, tensor) in &ours {
        assert_eq!(difference(tensor, &theirs[name]), 0.0, "{name}");
    }
    Ok(())
}
