//! Initialisations that look at data: what they find there, and what a start that does not look lacks.

use std::collections::BTreeMap;
use std::path::PathBuf;

use attune_adapt::{BUDGETS, INITS};
use attune_models::{Base, Pass};
use attune_points::adapter::Attachment;
use attune_points::layout::{NO_LABEL, Source};
use attune_points::stats::{Covariance, Stat};
use attune_points::{Grads, Layout, Row, Stats, TensorName, Weight};
use attune_spec::id::Step;
use attune_spec::job::Precision;
use attune_spec::method::{BuildCx, MethodRef};
use attune_tensor::{Rng, linalg};
use candle_core::{DType, Device, Tensor};
use libtest_mimic::{Failed, Trial};
use serde_json::{Value, json};

use crate::fail;
use crate::starts::{Started, init, logits, small};
use crate::support::{CrossEntropy, batch, difference, largest};

type Run = fn() -> Result<(), Failed>;

const TRIALS: [(&str, Run); 13] = [
    ("corda_divides_the_whole_weight", whole_weight),
    ("corda_forgets_less_of_what_it_keeps_than_a_start_that_looks_at_nothing", forgets_less),
    ("corda_is_pissa_where_inputs_vary_alike", like_pissa),
    ("corda_keeps_what_matters_least_for_the_data", least),
    ("corda_looks_at_the_domains_that_it_is_told", domains),
    ("eva_has_the_directions_in_which_inputs_vary_most", directions),
    ("eva_moves_further_in_the_first_step_than_a_start_that_looks_at_nothing", first_step),
    ("eva_needs_more_rows_than_its_rank", too_few),
    ("kore_keeps_the_answers_to_data_whatever_it_learns", keeps),
    ("kore_needs_a_factor_that_stays", needs_a_still),
    ("lora_ga_moves_as_full_tuning_would_as_far_as_its_rank_allows", as_full),
    ("lora_ga_shares_out_singular_vectors_as_it_is_told", shares),
    ("what_looks_at_data_starts_where_peft_starts", golden),
];

pub(crate) fn trials() -> Vec<Trial> {
    TRIALS.into_iter().map(|(name, run)| Trial::test(format!("init::{name}"), run)).collect()
}

/// The covariance that was measured at a site.
fn covariance<'s>(started: &'s Started, site: &str) -> Result<&'s Covariance, Failed> {
    let found = started.stats.iter().find_map(|(_, at, stat)| match stat {
        Stat::Covariance(found) if at.as_str() == site => Some(found),
        _ => None,
    });
    Ok(found.ok_or("nothing was measured")?)
}

/// A factor of a site.
fn factor(started: &Started, site: &str, local: &str) -> Result<Tensor, Failed> {
    let tensor = started.fresh.own.get(&TensorName::new(site, local)).ok_or("no such tensor")?;
    Ok(tensor.to_dtype(DType::F64)?)
}

fn sites(started: &Started) -> Vec<String> {
    started.attachments.iter().map(|at| at.site.to_string()).collect()
}

fn number(tensor: &Tensor) -> Result<f64, Failed> {
    Ok(tensor.to_dtype(DType::F64)?.sum_all()?.to_scalar()?)
}

/// How much of the inputs' variance the rows of a matrix span, if they are orthonormal.
fn spanned(a_ri: &Tensor, of: &Covariance) -> Result<f64, Failed> {
    let mean_i = (&of.sum_i / of.rows as f64)?;
    let c_ii = (of.sum_ii.to_dtype(DType::F64)? - mean_i.unsqueeze(1)?.matmul(&of.sum_i.unsqueeze(0)?)?)?;
    let of_rows = a_ri.matmul(&c_ii)?.mul(a_ri)?;
    let trace = (&c_ii * Tensor::eye(c_ii.dim(0)?, DType::F64, &Device::Cpu)?)?;
    Ok(number(&of_rows)? / number(&trace)?)
}

fn directions() -> Result<(), Failed> {
    let starts = [
        json!({"method": "eva"}),
        json!({"method": "eva", "rows": "tokens"}),
        json!({"method": "eva", "iterations": 12}),
    ];
    for start in starts {
        let started = Started::new(small()?, start.clone())?;
        let plain = Started::new(small()?, json!({"method": "orthonormal"}))?;
        let theta = started.theta();
        let off = difference(&logits(&started.model, &theta)?, &logits(&started.model, &theta.adapters_off())?);
        assert_eq!(off, 0.0, "{start}: it starts as the base");
        for site in sites(&started) {
            let (a_ri, of) = (factor(&started, &site, "lora_A")?, covariance(&started, &site)?);
            let unit = Tensor::eye(4, DType::F64, &Device::Cpu)?;
            assert!(difference(&a_ri.matmul(&a_ri.t()?)?, &unit) < 1e-6, "{start}, {site}");
            assert_eq!(largest(&factor(&started, &site, "lora_B")?), 0.0);
            // No four directions span more than the first eigenvectors; each of these is one.
            let (found, random) = (spanned(&a_ri, of)?, spanned(&factor(&plain, &site, "lora_A")?, of)?);
            assert!(found > 1.5 * random, "{start}, {site}: {found} of the variance, {random} at random");
            let mean_i = (&of.sum_i / of.rows as f64)?;
            let c_ii = (of.sum_ii.to_dtype(DType::F64)? - mean_i.unsqueeze(1)?.matmul(&of.sum_i.unsqueeze(0)?)?)?;
            let turned = a_ri.matmul(&c_ii)?;
            let values = turned.mul(&a_ri)?.sum_keepdim(1)?;
            let rest = (turned - a_ri.broadcast_mul(&values)?)?;
            let bound = if start.get("iterations").is_some() { 1e-2 } else { 1e-5 };
            assert!(largest(&rest) < bound * largest(&values), "{start}, {site}: no eigenvectors");
            let values: Vec<f64> = values.flatten_all()?.to_vec1()?;
            assert!(values.windows(2).all(|pair| pair[0] >= pair[1]), "{start}, {site}: {values:?}");
            if start.get("iterations").is_none() {
                let all = linalg::eigen(&c_ii)?.values.to_vec1::<f64>()?;
                assert!((values[0] - all[0]).abs() < 1e-6 * all[0] && (values[3] - all[3]).abs() < 1e-5 * all[0]);
            }
        }
    }
    // Whitened, rows are as long as the fourth root of what varies along them says.
    let (plain, white) = (
        Started::new(small()?, json!({"method": "eva"}))?,
        Started::new(small()?, json!({"method": "eva", "whiten": true}))?,
    );
    for site in sites(&plain) {
        let (a_ri, w_ri) = (factor(&plain, &site, "lora_A")?, factor(&white, &site, "lora_A")?);
        let lengths: Vec<f64> = w_ri.sqr()?.sum(1)?.sqrt()?.to_vec1()?;
        assert!(lengths.windows(2).all(|pair| pair[0] <= pair[1]), "{lengths:?}");
        assert!((number(&(a_ri * &w_ri)?)? - lengths.iter().sum::<f64>()).abs() < 1e-4, "of the same directions");
    }
    Ok(())
}

/// The length of the gradient of all factors B over that of all factors A themselves.
fn length(start: Value) -> Result<f64, Failed> {
    let started = Started::new(small()?, start)?;
    let theta = started.theta();
    let mut sink = Grads::wanting(theta.trained().map(|(id, _)| id));
    let layout = batch();
    started.model.grad(&Pass { theta: &theta, layout: &layout, dropout: None }, &CrossEntropy, 1.0, &mut sink)?;
    let (mut of_b, mut of_a) = (0.0, 0.0);
    for (id, gradient) in sink.iter() {
        if id.name.local() == "lora_B" {
            of_b += number(&gradient.ok_or("no gradient")?.sqr()?)?;
        } else {
            of_a += number(&theta.get(id).ok_or("no value")?.sqr()?)?;
        }
    }
    Ok((of_b / of_a).sqrt())
}

fn first_step() -> Result<(), Failed> {
    let eva = length(json!({"method": "eva"}))?;
    for plain in ["kaiming", "orthonormal"] {
        let plain_length = length(json!({"method": plain}))?;
        assert!(eva > 1.3 * plain_length, "{eva} against {plain_length} of {plain}");
    }
    Ok(())
}

fn too_few() -> Result<(), Failed> {
    let data: Layout = batch().of_docs(|at, _| at == 0);
    let error = Started::on(small()?, json!({"method": "eva"}), &[data]).err().ok_or("accepted")?;
    let message = error.message().unwrap_or_default().to_owned();
    assert!(message.contains("rank 4 needs more: raise `examples`"), "{message}");
    // Nobody measured anything.
    let started = Started::new(small()?, json!({"method": "kaiming"}))?;
    let at = &started.attachments[0];
    let weight = Tensor::zeros((at.tensors[1].shape[0], at.tensors[0].shape[1]), DType::F32, &Device::Cpu)?;
    let mut rng = Rng::new(1, "init");
    let of = init(json!({"method": "eva"}))?;
    let error = of.init(&*started.adapter, at, &weight, &started.stats, &mut rng).err().ok_or("accepted")?;
    let expected = format!("the covariance of inputs (Supervised) over 128 examples was not measured at {}", at.site);
    assert_eq!(error.to_string(), expected);
    Ok(())
}

/// `C'` of a site, as it was measured.
fn damped(started: &Started, site: &str, damp: f64) -> Result<Tensor, Failed> {
    let found = covariance(started, site)?;
    let c_ii = (found.sum_ii.to_dtype(DType::F64)? / found.documents as f64)?;
    let unit = Tensor::eye(c_ii.dim(0)?, DType::F64, &Device::Cpu)?;
    let mean = number(&(&c_ii * &unit)?)? / c_ii.dim(0)? as f64;
    Ok((c_ii + (unit * (damp * mean))?)?)
}

fn weight(started: &Started, site: &str) -> Result<Tensor, Failed> {
    Ok(started.model.base().tensor(&TensorName::new(site, "weight"), DType::F64)?)
}

/// What a start puts into the factors of one site, `s B A`.
fn change(started: &Started, site: &str) -> Result<Tensor, Failed> {
    let changes = started.changes()?;
    Ok(changes.into_iter().find(|(at, _)| at == site).ok_or("no such site")?.1)
}

const QUERY: &str = "model.layers.1.self_attn.q_proj";

/// With as many triples as there are, they make the weight.
fn whole_weight() -> Result<(), Failed> {
    for mode in ["ipm", "kpm"] {
        let method = (json!({"method": "lora", "rank": 24, "alpha": 36}), QUERY);
        let started = Started::with(small()?, method, json!({"method": "corda", "mode": mode}), &[batch()])?;
        let (found, w_oi) = (change(&started, QUERY)?, weight(&started, QUERY)?);
        assert!(difference(&found, &w_oi) < 1e-4 * largest(&w_oi), "{mode}");
    }
    Ok(())
}

/// The slice of `kpm` gives less for the data than any other of its rank; that of `ipm` more.
fn least() -> Result<(), Failed> {
    let of = |mode: &str| Started::new(small()?, json!({"method": "corda", "mode": mode}));
    let (most, least, blind) = (of("ipm")?, of("kpm")?, Started::new(small()?, json!({"method": "pissa"}))?);
    for site in sites(&least) {
        let c_ii = damped(&least, &site, 0.01)?;
        let all = linalg::svd(&weight(&least, &site)?.matmul(&c_ii)?)?.s.to_vec1::<f64>()?;
        let norm = |started: &Started| -> Result<f64, Failed> {
            Ok(number(&change(started, &site)?.matmul(&c_ii)?.sqr()?)?.sqrt())
        };
        let root = |values: &[f64]| values.iter().map(|value| value * value).sum::<f64>().sqrt();
        let (smallest, largest) = (root(&all[all.len() - 4..]), root(&all[..4]));
        assert!((norm(&least)? - smallest).abs() < 1e-4 * largest, "{site}: {} for {smallest}", norm(&least)?);
        assert!((norm(&most)? - largest).abs() < 1e-4 * largest, "{site}");
        assert!(norm(&blind)? <= largest * (1.0 + 1e-6), "{site}: no slice gives more");
    }
    Ok(())
}

/// One site, its initialisation called with statistics of our own.
fn with_covariance(start: Value, sum_ii: Tensor) -> Result<(Tensor, Tensor), Failed> {
    with_covariance_of("both", start, sum_ii)
}

/// The same with factors of which some train.
fn with_covariance_of(trains: &str, start: Value, sum_ii: Tensor) -> Result<(Tensor, Tensor), Failed> {
    let method = (json!({"method": "lora", "rank": 4, "alpha": 8, "trains": trains}), QUERY);
    let started = Started::with(small()?, method, json!({"method": "kaiming"}), &[batch()])?;
    let at = started.attachments.iter().find(|at| at.site.as_str() == QUERY).ok_or("no such site")?;
    let of = init(start)?;
    let mut stats = Stats::none();
    let sum_i = Tensor::zeros(sum_ii.dim(0)?, DType::F64, &Device::Cpu)?;
    let found = Stat::Covariance(Covariance { sum_ii, sum_i, rows: 100, documents: 1 });
    of.calibrate().into_iter().for_each(|request| stats.insert(request, at.site.clone(), found.clone()));
    let (own, _) = of.init(&*started.adapter, at, &weight(&started, QUERY)?, &stats, &mut Rng::new(1, "init"))?;
    let factor = |local: &str| -> Result<Tensor, Failed> { Ok(own.get(local)?.to_dtype(DType::F64)?) };
    Ok((factor("lora_A")?, factor("lora_B")?))
}

fn like_pissa() -> Result<(), Failed> {
    let (a_ri, b_or) = with_covariance(json!({"method": "corda"}), Tensor::eye(24, DType::F32, &Device::Cpu)?)?;
    let pissa = Started::new(small()?, json!({"method": "pissa"}))?;
    let expected = change(&pissa, QUERY)?;
    // The factor on the product is 2; the balance of the factors is another.
    assert!(difference(&(b_or.matmul(&a_ri)? * 2.0)?, &expected) < 1e-5 * largest(&expected));
    assert!(difference(&a_ri, &factor(&pissa, QUERY, "lora_A")?) > 1e-4);
    Ok(())
}

/// A linear is taught something on inputs in some directions; how much of its answers to inputs in others changes.
fn forgotten(a_ri: &Tensor, b_or: &Tensor, old_ti: &Tensor, new_ti: &Tensor) -> Result<(f64, f64), Failed> {
    let wanted_to = Rng::new(9, "wanted").normal_tensor((new_ti.dim(0)?, b_or.dim(0)?), 1.0, DType::F64)?;
    let start_oi = b_or.matmul(a_ri)?;
    let (mut a_ri, mut b_or) = (a_ri.clone(), b_or.clone());
    let change = |a_ri: &Tensor, b_or: &Tensor, x_ti: &Tensor| -> Result<Tensor, Failed> {
        Ok(x_ti.matmul(&(b_or.matmul(a_ri)? - &start_oi)?.t()?)?)
    };
    for _ in 0..400 {
        let off_to = (change(&a_ri, &b_or, new_ti)? - &wanted_to)?;
        let by_weight = (off_to.t()?.matmul(new_ti)? / new_ti.dim(0)? as f64)?;
        let (da, db) = (b_or.t()?.matmul(&by_weight)?, by_weight.matmul(&a_ri.t()?)?);
        (a_ri, b_or) = ((a_ri - (da * 0.05)?)?, (b_or - (db * 0.05)?)?);
    }
    let learned = number(&(change(&a_ri, &b_or, new_ti)? - &wanted_to)?.sqr()?)? / number(&wanted_to.sqr()?)?;
    let moved = number(&change(&a_ri, &b_or, old_ti)?.sqr()?)?;
    Ok((learned, moved))
}

/// Old inputs vary in 16 directions of 24, new ones in the other 8: what is learned of the new need not cost the old anything.
fn forgets_less() -> Result<(), Failed> {
    let random = |name: &str, rows: usize, cols: usize| Rng::new(4, name).normal_tensor((rows, cols), 1.0, DType::F64);
    let old_ti = (random("old", 200, 16)?.matmul(&random("directions", 16, 24)?)? * 0.2)?;
    let sum_ii = old_ti.t()?.matmul(&old_ti)?;
    let others = linalg::eigen(&sum_ii)?.vectors.narrow(0, 16, 8)?.contiguous()?;
    let new_ti = random("new", 30, 8)?.matmul(&others)?;
    let sum_ii = sum_ii.to_dtype(DType::F32)?;
    let (a_ri, b_or) = with_covariance(json!({"method": "corda", "mode": "kpm"}), sum_ii)?;
    let (learned, moved) = forgotten(&a_ri, &b_or, &old_ti, &new_ti)?;
    let plain = Started::new(small()?, json!({"method": "kaiming"}))?;
    // As long as the other, so that both learn alike.
    let (plain_a, plain_b) = (factor(&plain, QUERY, "lora_A")?, factor(&plain, QUERY, "lora_B")?);
    let longer = (number(&a_ri.sqr()?)? / number(&plain_a.sqr()?)?).sqrt();
    let (plain_learned, plain_moved) = forgotten(&(plain_a * longer)?, &plain_b, &old_ti, &new_ti)?;
    assert!(learned < 1.0 && plain_learned < 1.0, "{learned} and {plain_learned} are left to learn");
    assert!(moved < 0.5 * plain_moved, "{moved} of the old moved, {plain_moved} with LoRA");
    Ok(())
}

fn domains() -> Result<(), Failed> {
    let domains = [("facts".parse().map_err(fail)?, 1.0), ("tasks".parse().map_err(fail)?, 1.0)];
    let cx = BuildCx { steps: Step(10), domains: &domains, words: None };
    let build = |start: Value| {
        let start: MethodRef = serde_json::from_value(start).map_err(fail)?;
        INITS.build(&start, &"init".into(), &cx).map_err(|faults| faults[0].to_string().into())
    };
    let of: Result<_, Failed> = build(json!({"method": "corda", "mode": "kpm", "domains": ["tasks"]}));
    assert_eq!(of?.calibrate()[0].domains, Some([1].into()));
    let of: Result<_, Failed> = build(json!({"method": "corda", "domains": ["fact"]}));
    let error = of.err().ok_or("accepted")?;
    let message = error.message().unwrap_or_default();
    assert!(
        message.contains("`init.domains[0]` is \"fact\", which is no domain of the job (facts, tasks)"),
        "{message}"
    );
    let of: Result<_, Failed> = build(json!({"method": "corda", "mode": "kpm", "iterations": 3}));
    assert!(of.is_err_and(|error| error.message().is_some_and(|message| message.contains("`init.iterations`"))));
    Ok(())
}

/// The gradient that was measured at a site.
fn gradient(started: &Started, site: &str) -> Result<Tensor, Failed> {
    let found = started.stats.iter().find_map(|(_, at, stat)| match stat {
        Stat::Gradient(found) if at.as_str() == site => Some(found),
        _ => None,
    });
    let found = found.ok_or("nothing was measured")?;
    Ok((found.sum_oi.to_dtype(DType::F64)? / found.denominator)?)
}

/// The cosine between the gradient by a weight and what one small step of gradient descent on the factors changes of the weight.
fn agreement(started: &Started, site: &str, g_oi: &Tensor) -> Result<f64, Failed> {
    let (a_ri, b_or) = (factor(started, site, "lora_A")?, factor(started, site, "lora_B")?);
    let by_a = b_or.matmul(&b_or.t()?)?.matmul(g_oi)?;
    let moved = (by_a + g_oi.matmul(&a_ri.t()?)?.matmul(&a_ri)?)?;
    let norm = |x: &Tensor| -> Result<f64, Failed> { Ok(number(&x.sqr()?)?.sqrt()) };
    Ok(number(&(&moved * g_oi)?)? / norm(&moved)? / norm(g_oi)?)
}

fn as_full() -> Result<(), Failed> {
    let even = Started::new(small()?, json!({"method": "lora-ga", "scale": "unit", "by_gradient": false}))?;
    let (usual, plain) =
        (Started::new(small()?, json!({"method": "lora-ga"}))?, Started::new(small()?, json!({"method": "kaiming"}))?);
    for site in sites(&even) {
        let g_oi = gradient(&even, &site)?;
        let all = linalg::svd(&g_oi)?.s.to_vec1::<f64>()?;
        let root = |values: &[f64]| values.iter().map(|value| value * value).sum::<f64>().sqrt();
        let best = root(&all[..8]) / root(&all);
        let found = agreement(&even, &site, &g_oi)?;
        assert!((found - best).abs() < 1e-5, "{site}: {found} of {best} that eight directions allow");
        let (usual, plain) = (agreement(&usual, &site, &g_oi)?, agreement(&plain, &site, &g_oi)?);
        assert!(usual > 1.2 * plain && found > 1.2 * plain, "{site}: {usual}, {plain} with LoRA");
    }
    Ok(())
}

fn shares() -> Result<(), Failed> {
    for (direction, to_a, to_b) in [
        ("ArB2r", [0, 1, 2, 3], [4, 5, 6, 7]),
        ("A2rBr", [4, 5, 6, 7], [0, 1, 2, 3]),
        ("ArBr", [1, 3, 5, 7], [0, 2, 4, 6]),
    ] {
        // The factor on the product is 2, queries are 24 wide.
        for (scale, on_a, on_b) in [("unit", 1.0, 1.0), ("stable", 1.0, 24f64.powf(0.25) / 4.0), ("gd_scale", 0.5, 0.5)]
        {
            let started = Started::new(small()?, json!({"method": "lora-ga", "direction": direction, "scale": scale}))?;
            let of = linalg::svd(&gradient(&started, QUERY)?)?;
            let at = |places: [u32; 4]| Tensor::new(&places, &Device::Cpu);
            let a_ri = (of.v.index_select(&at(to_a)?, 0)? * on_a)?;
            let s_r = of.s.index_select(&at(to_b)?, 0)?;
            let b_or = (of.u.index_select(&at(to_b)?, 1)?.broadcast_mul(&s_r)? * on_b)?;
            assert!(difference(&a_ri, &factor(&started, QUERY, "lora_A")?) < 1e-6, "{direction}, {scale}");
            assert!(
                difference(&b_or, &factor(&started, QUERY, "lora_B")?) < 1e-6 * largest(&b_or),
                "{direction}, {scale}"
            );
        }
    }
    let by_weight = Started::new(small()?, json!({"method": "lora-ga", "scale": "weight_svd"}))?;
    let largest_of = |x: &Tensor| -> Result<f64, Failed> { Ok(linalg::svd(x)?.s.to_vec1::<f64>()?[0]) };
    let (b, w) = (largest_of(&factor(&by_weight, QUERY, "lora_B")?)?, largest_of(&weight(&by_weight, QUERY)?)?);
    assert!((b - w).abs() < 1e-5 * w, "{b} and {w}");
    let (one, again) = (
        Started::new(small()?, json!({"method": "lora-ga", "direction": "random"}))?,
        Started::new(small()?, json!({"method": "lora-ga", "direction": "random"}))?,
    );
    assert_eq!(difference(&factor(&one, QUERY, "lora_A")?, &factor(&again, QUERY, "lora_A")?), 0.0);
    // As many singular vectors as keys are wide are too few for twice the rank.
    let method = (json!({"method": "lora", "rank": 8}), "k_proj");
    let error = Started::with(small()?, method, json!({"method": "lora-ga"}), &[batch()]).err().ok_or("accepted")?;
    assert!(error.message().is_some_and(|message| message.contains("rank 8 needs twice as many")), "{error:?}");
    Ok(())
}

/// What PEFT starts with, see `golden/calibrated.py`, but for the sign of each direction.
fn golden() -> Result<(), Failed> {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    for (name, start) in [
        ("eva", json!({"method": "eva", "rows": "tokens"})),
        ("eva_supervised", json!({"method": "eva"})),
        ("eva_whiten", json!({"method": "eva", "whiten": true})),
        ("eva_rho", json!({"method": "eva", "rows": "tokens"})),
        ("corda_ipm", json!({"method": "corda"})),
        ("corda_kpm", json!({"method": "corda", "mode": "kpm"})),
        ("lora_ga", json!({"method": "lora-ga"})),
        ("lora_ga_gd", json!({"method": "lora-ga", "direction": "ArBr", "scale": "gd_scale"})),
        ("gpt2_eva", json!({"method": "eva"})),
        ("gpt2_corda_kpm", json!({"method": "corda", "mode": "kpm"})),
        ("gpt2_lora_ga", json!({"method": "lora-ga", "direction": "A2rBr", "scale": "unit"})),
    ] {
        let file = here.join(format!("golden/calibrated/{name}.safetensors"));
        let mut expected: BTreeMap<_, _> = candle_core::safetensors::load(file, &Device::Cpu)?.into_iter().collect();
        let mut column = |name: &str| -> Result<Vec<i64>, Failed> {
            Ok(expected.remove(name).ok_or("no such column")?.to_vec1::<i64>()?)
        };
        let (ids, labels) = (column("input_ids")?, column("labels")?);
        let (lengths, _) = (column("doc_lengths")?, column("positions")?);
        let mut rows = ids.iter().zip(&labels);
        let data = lengths.iter().map(|length| {
            let mut layout = Layout::new();
            let label = |label: i64| u32::try_from(label).unwrap_or(NO_LABEL);
            let rows = rows.by_ref().take(*length as usize).map(|(id, next)| (Row::Token(*id as u32), label(*next)));
            layout.push(Source::default(), rows);
            layout
        });
        let mut data: Vec<Layout> = data.collect();
        if name == "eva_whiten" {
            // It settles when it has seen everything twice, and lengths depend on how much that was.
            data.extend(data.clone());
        }
        let base = if name.starts_with("gpt2") { "gpt2" } else { "llama" };
        let base = Base::open(&here.join("../models/golden").join(base), Precision::F32)?;
        let sites: Vec<String> =
            expected.keys().filter_map(|name| name.strip_suffix(".lora_A").map(str::to_owned)).collect();
        let expected_ranks: BTreeMap<&String, usize> =
            sites.iter().map(|site| (site, expected[&format!("{site}.lora_A")].dims()[0])).collect();
        let method = json!({"method": "lora", "rank": 4, "alpha": 8, "rank_pattern": expected_ranks});
        let started = Started::with(base, (method, "all-linear"), start, &data)?;
        assert_eq!(
            sites.len(),
            if name == "eva_whiten" {
                1
            } else if name == "eva_rho" {
                8
            } else {
                3
            }
        );
        if name == "eva_rho" {
            let budget = json!({"method": "explained-variance", "rows": "tokens"});
            assert_eq!(shared(&started, budget, &sites)?, expected_ranks.values().copied().collect::<Vec<_>>());
        }
        for site in sites {
            let (a_ri, b_or) = (factor(&started, &site, "lora_A")?, factor(&started, &site, "lora_B")?);
            let of = |local: &str| -> Result<Tensor, Failed> {
                Ok(expected.get(&format!("{site}.{local}")).ok_or("no such tensor")?.to_dtype(DType::F64)?)
            };
            let (peft_a, peft_b) = (of("lora_A")?, of("lora_B")?);
            // Each direction of A, and of B, has a sign of its own where they are not those of one triple.
            let aligned = |ours: &Tensor, theirs: &Tensor| -> Result<f64, Failed> {
                let signs = (ours * theirs)?.sum_keepdim(1)?.sign()?;
                Ok(difference(&ours.broadcast_mul(&signs)?, theirs) / largest(theirs).max(1e-30))
            };
            let off_a = aligned(&a_ri, &peft_a)?;
            let off_b = aligned(&b_or.t()?.contiguous()?, &peft_b.t()?.contiguous()?)?;
            assert!(off_a < 1e-3 && off_b < 1e-3, "{name}, {site}: off by factors of {off_a} and {off_b}");
            if name.starts_with("corda") {
                let (ours, theirs) = (b_or.matmul(&a_ri)?, peft_b.matmul(&peft_a)?);
                let off = difference(&ours, &theirs) / largest(&theirs);
                assert!(off < 1e-3, "{name}, {site}: the product is off by a factor of {off}");
            }
        }
    }
    Ok(())
}

/// The ranks that a budget gives some sites.
fn shared(started: &Started, budget: Value, sites: &[String]) -> Result<Vec<usize>, Failed> {
    let method: MethodRef = serde_json::from_value(budget)?;
    let cx = BuildCx { steps: Step(1), domains: &[], words: None };
    let budget = BUDGETS.build(&method, &"budget".into(), &cx).map_err(fail)?;
    let mut at: Vec<_> = started.attachments.to_vec();
    at.retain(|at| sites.iter().any(|site| *site == at.site.as_str()));
    at.sort_by(|a, b| a.site.cmp(&b.site));
    let all = started.model.base().architecture().sites();
    let weight = |at: &Attachment| {
        let site = all.iter().find(|site| site.id == at.site).expect("a site of the base");
        Ok(Box::new(started.model.base().weight(site)) as Box<dyn Weight + '_>)
    };
    let shares = budget.share(4, &at, &weight, &started.stats)?;
    Ok(shares.into_iter().map(|share| share.rank as usize).collect())
}

/// Data in `spanned` of 24 directions, and what `kore` makes of a linear that reads it.
fn kept(spanned: usize) -> Result<(Tensor, Tensor, Tensor), Failed> {
    let random = |name: &str, rows: usize, cols: usize| Rng::new(4, name).normal_tensor((rows, cols), 1.0, DType::F64);
    let old_ti = random("old", 200, spanned)?.matmul(&random("directions", spanned, 24)?)?;
    let sum_ii = old_ti.t()?.matmul(&old_ti)?.to_dtype(DType::F32)?;
    let (a_ri, b_or) = with_covariance_of("b", json!({"method": "kore"}), sum_ii)?;
    Ok((old_ti, a_ri, b_or))
}

fn keeps() -> Result<(), Failed> {
    // Twenty of 24 directions leave four, which is the rank.
    let (old_ti, a_ri, b_or) = kept(20)?;
    assert!(largest(&old_ti.matmul(&a_ri.t()?)?) < 1e-4 * largest(&old_ti), "A sees none of the data");
    let plain = Started::new(small()?, json!({"method": "kaiming"}))?;
    let w_oi = weight(&plain, QUERY)?;
    let change = (b_or.matmul(&a_ri)? * 2.0)?;
    // What is taken out is the weight within the span of A.
    let within = linalg::svd(&a_ri)?.v;
    let expected = w_oi.matmul(&within.t()?.contiguous()?)?.matmul(&within)?;
    assert!(difference(&change, &expected) < 1e-5 * largest(&w_oi));
    // Whatever B becomes: answers to the data stay. With an A that looked at nothing they do not.
    let learned_or = Rng::new(6, "learned").normal_tensor(b_or.shape(), 1.0, DType::F64)?;
    let answers = largest(&old_ti.matmul(&w_oi.t()?)?);
    let moved = |a_ri: &Tensor| -> Result<f64, Failed> {
        Ok(largest(&old_ti.matmul(&a_ri.t()?)?.matmul(&learned_or.t()?)?) / answers)
    };
    let random = moved(&factor(&plain, QUERY, "lora_A")?)?;
    assert!(moved(&a_ri)? < 1e-4 && random > 0.1, "{} moved, {random} with LoRA", moved(&a_ri)?);
    // With the largest directions instead of the smallest ones it would be the opposite.
    let (all_ti, a_ri, _) = kept(24)?;
    let seen = number(&all_ti.matmul(&linalg::svd(&a_ri)?.v.t()?.contiguous()?)?.sqr()?)?;
    let all = linalg::eigen(&all_ti.t()?.matmul(&all_ti)?)?.values.to_vec1::<f64>()?;
    assert!((seen / all[20..].iter().sum::<f64>() - 1.0).abs() < 1e-3, "{seen} for the four smallest of {all:?}");
    Ok(())
}

fn needs_a_still() -> Result<(), Failed> {
    let unit = Tensor::eye(24, DType::F32, &Device::Cpu)?;
    let error = with_covariance(json!({"method": "kore"}), unit).err().ok_or("accepted")?;
    assert!(error.message().is_some_and(|message| message.contains("set `trains: b`")), "{error:?}");
    Ok(())
}
