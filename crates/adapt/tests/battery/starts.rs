//! Initialisations: what they start, what they take out of the base, and that both together are the base.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use attune_adapt::slot::{self, Fresh};
use attune_adapt::{ADAPTERS, INITS, joined};
use attune_architecture::{Site, targets};
use attune_models::{Base, Model, Pass, Slot, Stack};
use attune_points::adapter::{Adapter, Attachment, Merged};
use attune_points::init::Init;
use attune_points::{Bank, BankKind, Grads, Layout, Params, Stats, Theta, Weight};
use attune_spec::id::Step;
use attune_spec::job::{Precision, Targets};
use attune_spec::method::{BuildCx, MethodRef, SiteKind};
use attune_tensor::{Rng, linalg};
use candle_core::{DType, Device, Tensor};
use libtest_mimic::{Failed, Trial};
use serde_json::{Value, json};

use crate::support::{CrossEntropy, Setup, batch, difference, largest, stats};
use crate::{build, fail};

type Run = fn() -> Result<(), Failed>;

const TRIALS: [(&str, Run); 9] = [
    ("a_change_of_mica_is_at_right_angles_to_what_the_base_does_most", smallest_directions),
    ("a_named_start_replaces_the_own_one", named),
    ("a_start_and_what_it_takes_out_are_the_base", together),
    ("an_orthogonal_start_is_away_from_zero_on_both_sides_and_its_product_is_zero", orthogonal),
    ("an_orthonormal_start_has_rows_of_length_one_that_are_at_right_angles", orthonormal),
    ("both_factors_of_a_start_away_from_zero_learn_in_the_first_step", first_step),
    ("pissa_takes_out_the_largest_singular_values", largest_values),
    ("what_is_taken_out_is_what_peft_takes_out", golden),
    ("what_starts_as_a_product_is_refused_elsewhere", refused),
];

pub(crate) fn trials() -> Vec<Trial> {
    TRIALS.into_iter().map(|(name, run)| Trial::test(format!("init::{name}"), run)).collect()
}

/// Initialisations that take something out of the base.
fn taking() -> [Value; 7] {
    [
        json!({"method": "pissa"}),
        json!({"method": "pissa", "iterations": 6}),
        json!({"method": "olora"}),
        json!({"method": "corda"}),
        json!({"method": "corda", "iterations": 6}),
        json!({"method": "corda", "mode": "kpm"}),
        json!({"method": "lora-ga"}),
    ]
}

pub(crate) fn init(of: Value) -> Result<Box<dyn Init>, Failed> {
    let cx = BuildCx { steps: Step(10), domains: &[], words: None };
    INITS.build(&serde_json::from_value(of)?, &"init".into(), &cx).map_err(fail)
}

/// LoRA on all linears of a model, started by an initialisation.
pub(crate) struct Started {
    pub(crate) model: Model,
    pub(crate) adapter: Arc<dyn Adapter>,
    pub(crate) attachments: Vec<Attachment>,
    pub(crate) fresh: Fresh,
    pub(crate) stats: Stats,
}

impl Started {
    pub(crate) fn new(base: Base, start: Value) -> Result<Self, Failed> {
        Self::on(base, start, &[batch()])
    }

    /// The same on other data.
    pub(crate) fn on(base: Base, start: Value, data: &[Layout]) -> Result<Self, Failed> {
        let method = json!({"method": "lora", "rank": 4, "alpha": 8, "dropout": 0.3});
        Self::with(base, (method, "all-linear"), start, data)
    }

    /// Another method at other sites.
    pub(crate) fn with(
        base: Base,
        (method, named): (Value, &str),
        start: Value,
        data: &[Layout],
    ) -> Result<Self, Failed> {
        let method: MethodRef = serde_json::from_value(method)?;
        let cx = BuildCx { steps: Step(10), domains: &[], words: None };
        let adapter: Arc<dyn Adapter> = ADAPTERS.build(&method, &"adapter".into(), &cx).map_err(fail)?.into();
        let takes = |site: &Site| site.offers() == SiteKind::Linear;
        let sites = targets::resolve(&Targets::from(named), None, base.architecture(), takes).map_err(fail)?;
        let attachments = adapter.attach(base.architecture(), &sites).map_err(fail)?;
        let init = init(start)?;
        let base = Arc::new(base);
        let bare = Model::new(Arc::clone(&base), Stack::default());
        let stats = stats(&bare, &init.calibrate(), &sites, data);
        let weight = |at: &Attachment| weight(&base, &sites, at);
        let fresh = slot::fresh(&*adapter, Some(&*init), &attachments, weight, &stats, &Rng::new(1, "init"))?;
        let slot = || Slot::new(Arc::clone(&adapter), attachments.iter().cloned());
        let stack = Stack::new(vec![slot(), slot()]);
        Ok(Self { model: Model::new(base, stack), adapter, attachments, fresh, stats })
    }

    pub(crate) fn theta(&self) -> Theta {
        let bank = |slot: &str, params: &Params, train| Bank {
            slot: slot.into(),
            kind: BankKind::Adapter,
            sets: vec![Arc::new(params.clone())],
            train,
        };
        if self.fresh.beside.is_empty() {
            return Theta::single([bank("x", &self.fresh.own, true)]);
        }
        let banks = [bank("x", &self.fresh.own, true), bank("x-start", &self.fresh.beside, false)];
        Theta { beside: BTreeMap::from([(0, 1)]), ..Theta::single(banks) }
    }

    /// What the component adds to the weight of each site at its start.
    pub(crate) fn changes(&self) -> Result<Vec<(String, Tensor)>, Failed> {
        let change = |at: &Attachment| {
            let locals = attune_models::stack::locals(at, &self.fresh.own)?;
            let none = Tensor::zeros((0, 0), DType::F32, &Device::Cpu)?;
            match self.adapter.merge(at, &locals, &none)? {
                Merged::Factors { left, right, scale } => {
                    Ok((at.site.to_string(), (left.matmul(&right)? * scale)?.to_dtype(DType::F64)?))
                }
                other => Err(format!("{other:?} is no product").into()),
            }
        };
        self.attachments.iter().map(change).collect()
    }
}

fn weight<'b>(base: &'b Base, sites: &'b [Site], at: &Attachment) -> attune_points::Result<Box<dyn Weight + 'b>> {
    let site = sites.iter().find(|site| site.id == at.site);
    let site = site.ok_or_else(|| attune_points::Error::Refused("no site".to_owned()))?;
    Ok(Box::new(base.weight(site)))
}

pub(crate) fn small() -> Result<Base, Failed> {
    Ok(Base::random(crate::support::architecture(), 5, DType::F32)?)
}

pub(crate) fn logits(model: &Model, theta: &Theta) -> Result<Tensor, Failed> {
    Ok(model.logits(&Pass { theta, layout: &batch(), dropout: None })?)
}

/// In f32 the sum of a product and its opposite is off by the rounding of the larger of the two.
fn together() -> Result<(), Failed> {
    for start in taking() {
        let started = Started::new(small()?, start.clone())?;
        let theta = started.theta();
        let base = logits(&started.model, &theta.adapters_off())?;
        let off = difference(&logits(&started.model, &theta)?, &base);
        assert!(off < 1e-5 * (1.0 + largest(&base)), "{start}: off by {off}");
        assert_eq!(difference(&logits(&started.model, &theta.untrained())?, &base), 0.0);
        assert!(started.changes()?.iter().all(|(_, change)| largest(change) > 1e-5), "{start} takes out nothing");
        // Moved away from its start it is one LoRA on the base as it was.
        let mut moved = theta.clone();
        let own = started.fresh.own.map(|_, tensor| tensor * 1.1)?;
        moved.banks[0].sets = vec![Arc::new(own.clone())];
        let with = logits(&started.model, &moved)?;
        let base = small()?;
        let joined =
            joined::joined(&*started.adapter, &started.attachments, &own, &started.fresh.beside, base.architecture())?;
        let slot = Slot::new(joined.adapter.into(), joined.attachments);
        let sets = vec![Arc::new(joined.params)];
        let alone = Theta::single([Bank { slot: "x".into(), kind: BankKind::Adapter, sets, train: false }]);
        let found = logits(&Model::new(base, Stack::new(vec![slot])), &alone)?;
        assert!(difference(&with, &logits(&started.model, &theta)?) > 1e-3, "{start}: nothing moved");
        let off = difference(&found, &with);
        assert!(off < 1e-5 * (1.0 + largest(&with)), "{start}: joined it is off by {off}");
    }
    Ok(())
}

/// The largest gradient of a factor A in the first step.
fn gradient_of_a(start: Value) -> Result<f64, Failed> {
    let started = Started::new(small()?, start)?;
    let theta = started.theta();
    let mut sink = Grads::wanting(theta.trained().map(|(id, _)| id));
    let layout = batch();
    started.model.grad(&Pass { theta: &theta, layout: &layout, dropout: None }, &CrossEntropy, 1.0, &mut sink)?;
    let of_a = sink.iter().filter(|(id, _)| id.name.local() == "lora_A");
    Ok(of_a.filter_map(|(_, gradient)| gradient).map(largest).fold(0.0, f64::max))
}

/// With B at zero, A waits for it.
fn first_step() -> Result<(), Failed> {
    for start in taking().into_iter().chain([json!({"method": "orthogonal"})]) {
        assert!(gradient_of_a(start)? > 1e-6);
    }
    assert_eq!(gradient_of_a(json!({"method": "kaiming"}))?, 0.0);
    Ok(())
}

fn orthogonal() -> Result<(), Failed> {
    let started = Started::new(small()?, json!({"method": "orthogonal"}))?;
    let of = |local: &str| -> Vec<&Tensor> {
        started.fresh.own.iter().filter(|(name, _)| name.local() == local).map(|(_, tensor)| tensor).collect()
    };
    let (down, up) = (of("lora_A"), of("lora_B"));
    assert_eq!((down.len(), up.len()), (started.attachments.len(), started.attachments.len()));
    for (a, b) in down.into_iter().zip(up) {
        for factor in [a, b] {
            let square: f32 = factor.sqr()?.mean_all()?.to_scalar()?;
            assert!((0.03..0.3).contains(&square.sqrt()), "numbers of {} on average", square.sqrt());
        }
        assert!(largest(&b.matmul(a)?) < 1e-6 * largest(a).max(1.0), "the product is {}", largest(&b.matmul(a)?));
    }
    // Halves of an odd rank are none.
    let setup = Setup::new(build(json!({"method": "lora", "rank": 3})).map_err(fail)?, "q_proj", DType::F32);
    let fresh = slot::fresh(
        &*setup.adapter,
        Some(&*init(json!({"method": "orthogonal"}))?),
        &setup.attachments,
        |at| setup.weight(at),
        &Stats::none(),
        &Rng::new(1, "init"),
    );
    let error = fresh.map(|_| ()).expect_err("accepted").to_string();
    assert!(error.contains("is 3: expected an even one"), "{error}");
    Ok(())
}

fn orthonormal() -> Result<(), Failed> {
    let started = Started::new(small()?, json!({"method": "orthonormal"}))?;
    let mut found = Vec::new();
    for (name, tensor) in started.fresh.own.iter() {
        if name.local() == "lora_A" {
            let unit = Tensor::eye(4, DType::F32, &Device::Cpu)?;
            assert!(difference(&tensor.matmul(&tensor.t()?)?, &unit) < 1e-5, "{name}");
            found.push(tensor.flatten_all()?.to_vec1::<f32>()?);
        } else {
            assert_eq!(largest(tensor), 0.0, "{name}");
        }
    }
    found.dedup();
    assert_eq!(found.len(), started.attachments.len(), "sites start alike");
    Ok(())
}

fn largest_values() -> Result<(), Failed> {
    for (start, bound) in [(json!({"method": "pissa"}), 1e-5), (json!({"method": "pissa", "iterations": 16}), 1e-2)] {
        let started = Started::new(small()?, start.clone())?;
        for (site, change) in started.changes()? {
            let name = attune_points::TensorName::new(site.as_str(), "weight");
            let weight = started.model.base().tensor(&name, DType::F64)?;
            let all: Vec<f64> = linalg::svd(&weight)?.s.to_vec1()?;
            let found: Vec<f64> = linalg::svd(&change)?.s.to_vec1()?;
            let left: f64 = (weight - &change)?.sqr()?.sum_all()?.to_scalar()?;
            let rest: f64 = all[4..].iter().map(|value| value * value).sum();
            assert!((left - rest).abs() < bound * rest, "{start}, {site}: {left} is left, {rest} are the others");
            assert!((found[0] - all[0]).abs() < bound * all[0] && found[4] < 1e-5, "{start}, {site}");
        }
    }
    Ok(())
}

fn golden() -> Result<(), Failed> {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    for name in ["olora", "pissa"] {
        let file = here.join(format!("golden/starts/{name}.safetensors"));
        let expected: BTreeMap<_, _> = candle_core::safetensors::load(file, &Device::Cpu)?.into_iter().collect();
        let base = Base::open(&here.join("../models/golden/llama"), Precision::F32)?;
        let changes = Started::new(base, json!({"method": name}))?.changes()?;
        for (site, expected) in expected {
            let (_, change) = changes.iter().find(|(found, _)| *found == site).ok_or("no such site")?;
            let off = difference(change, &expected) / largest(&expected);
            assert!(off < 1e-5, "{name}, {site}: off by a factor of {off}");
        }
    }
    Ok(())
}

fn refused() -> Result<(), Failed> {
    let setup = Setup::new(build(json!({"method": "dora"})).map_err(fail)?, "q_proj", DType::F32);
    for start in taking() {
        let init = init(start)?;
        let fresh = slot::fresh(
            &*setup.adapter,
            Some(&*init),
            &setup.attachments,
            |at| setup.weight(at),
            &Stats::none(),
            &Rng::new(1, "init"),
        );
        let error = fresh.map(|_| ()).expect_err("accepted").to_string();
        assert!(error.contains("is for a pair of factors"), "{error}");
    }
    Ok(())
}

fn named() -> Result<(), Failed> {
    let setup = Setup::new(build(json!({"method": "lora"})).map_err(fail)?, "q_proj", DType::F32);
    let fresh = |init: Option<Value>| -> Result<Tensor, Failed> {
        let cx = BuildCx { steps: Step(10), domains: &[], words: None };
        let init = init.map(|init| {
            INITS.build(&serde_json::from_value(init).unwrap_or_else(|_| MethodRef::named("")), &"init".into(), &cx)
        });
        let init = init.transpose().map_err(fail)?;
        let fresh = slot::fresh(
            &*setup.adapter,
            init.as_deref(),
            &setup.attachments,
            |at| setup.weight(at),
            &Stats::none(),
            &Rng::new(1, "init"),
        )?;
        Ok(fresh.own.iter().next().ok_or("no tensor")?.1.clone())
    };
    let (own, kaiming, gaussian) = (
        fresh(None)?,
        fresh(Some(json!({"method": "kaiming"})))?,
        fresh(Some(json!({"method": "gaussian", "std": 3.0})))?,
    );
    assert_eq!(difference(&own, &kaiming), 0.0);
    assert!(largest(&own) <= 1.0 / (own.dims()[1] as f64).sqrt());
    assert!(largest(&gaussian) > 3.0);
    let full = Setup::new(build(json!({"method": "full"})).map_err(fail)?, "q_proj", DType::F32);
    let cx = BuildCx { steps: Step(10), domains: &[], words: None };
    let init = INITS.build(&MethodRef::named("gaussian"), &"init".into(), &cx).map_err(fail)?;
    let refused = slot::fresh(
        &*full.adapter,
        Some(&*init),
        &full.attachments,
        |at| full.weight(at),
        &Stats::none(),
        &Rng::new(1, "init"),
    );
    assert!(refused.is_err_and(|error| error.to_string().contains("is for a pair of factors")));
    Ok(())
}

/// Whatever A is, the change has nothing in common with the rest of the weight; a change of LoRA's own start has.
fn smallest_directions() -> Result<(), Failed> {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let llama = || Base::open(&here.join("../models/golden/llama"), Precision::F32);
    let file = candle_core::safetensors::load(here.join("golden/starts/mica.safetensors"), &Device::Cpu)?;
    let file: BTreeMap<_, _> = file.into_iter().collect();
    let overlap = |method: Value, start: Value| -> Result<f64, Failed> {
        let mut started = Started::with(llama()?, (method, "all-linear"), start.clone(), &[batch()])?;
        let theta = started.theta();
        assert_eq!(
            difference(&logits(&started.model, &theta)?, &logits(&started.model, &theta.adapters_off())?),
            0.0,
            "it starts as the base"
        );
        let rng = Rng::new(3, "moved");
        started.fresh.own = started.fresh.own.map(|name, tensor| {
            if started.fresh.own.is_fixed(name) {
                return Ok(tensor.clone());
            }
            tensor + rng.named(&name.to_string()).normal_tensor(tensor.shape(), 0.1, DType::F32)?
        })?;
        let mut most = 0.0f64;
        for (site, change) in started.changes()? {
            let name = attune_points::TensorName::new(site.as_str(), "weight");
            let all = linalg::svd(&started.model.base().tensor(&name, DType::F64)?)?;
            let leading = all.triples(0, all.s.dim(0)? - 4)?.u;
            most = most.max(largest(&leading.t()?.matmul(&change)?) / largest(&change));
        }
        if start["method"] == "mica" {
            for (site, expected) in &file {
                let name = attune_points::TensorName::new(site.as_str(), "lora_B");
                let b = started.fresh.own.get(&name).ok_or("no factor")?;
                assert!(difference(&b.matmul(&b.t()?)?, expected) < 1e-5, "{site}");
            }
        }
        Ok(most)
    };
    let a_alone = json!({"method": "lora", "rank": 4, "alpha": 8, "trains": "a"});
    let (own, plain) = (
        overlap(a_alone, json!({"method": "mica"}))?,
        overlap(json!({"method": "lora", "rank": 4, "alpha": 8}), json!({"method": "kaiming"}))?,
    );
    assert!(own < 1e-5 && plain > 0.1, "{own} and {plain} of a change are among the leading directions");
    let both = Started::new(small()?, json!({"method": "mica"})).err().map(|error| format!("{error:?}"));
    assert!(both.is_some_and(|error| error.contains("expected `trains: a`")));
    Ok(())
}
