//! Of components that are drawn anew at every step.

use std::path::PathBuf;

use attune_architecture::SiteId;
use attune_models::Pass;
use attune_models::dropout::Dropout;
use attune_points::adapter::{DropoutMask, Port, RowCx, RowMap};
use attune_points::{Layout, Locals};
use attune_tensor::{Rng, autograd};
use candle_core::{DType, Device, Tensor};
use libtest_mimic::Failed;
use serde_json::{Value, json};

use super::{Own, PLAIN};
use crate::support::{Setup, batch, difference, largest};
use crate::{build, fail};

pub(super) const OWN: &[(&str, Own)] = &[
    ("monteclora::a_step_answers_by_weights_of_its_own_and_an_answer_by_their_mean", weights_of_a_step),
    ("drawn::a_draw_gives_what_peft_gives", golden),
    ("drawn::gradients_through_a_draw_are_exact", exact),
];

/// A linear of 24 inputs and outputs.
const QUERIES: &str = "model.layers.1.self_attn.q_proj";

/// Numbers that were drawn before.
struct Drawn {
    draws_nri: Tensor,
    spreads_rr: Tensor,
    shares_n: Tensor,
}

impl DropoutMask for Drawn {
    fn mask(&self, _: &SiteId, _: usize, _: f64, like: &Tensor) -> attune_points::Result<Tensor> {
        Ok(like.ones_like()?)
    }

    fn shared_noise(&self, _: &SiteId, what: &str, shape: &[usize], like: &Tensor) -> attune_points::Result<Tensor> {
        let drawn = match what {
            "draws" => &self.draws_nri,
            "spreads" => &self.spreads_rr,
            _ => &self.shares_n,
        };
        Ok(drawn.reshape(shape)?.to_dtype(like.dtype())?)
    }
}

/// What a component adds to rows, the loss of its own, and the gradients of both by its tensors.
fn added(
    map: &dyn RowMap,
    (x_ti, dy_to): (&Tensor, &Tensor),
    tensors: &[(&'static str, Tensor)],
    drawn: &Drawn,
) -> Result<(Tensor, Tensor, Vec<Tensor>), Failed> {
    let (site, layout) = (SiteId::new("q_proj"), Layout::new());
    let cx = RowCx { site: &site, output: dy_to.dim(1)?, dropout: Some(drawn), layout: &layout, rows: None };
    let leaves = tensors.iter().map(|(_, tensor)| autograd::leaf(tensor)).collect::<Result<Vec<_>, _>>()?;
    let locals = tensors.iter().zip(&leaves).map(|((local, _), leaf)| (*local, leaf.as_tensor().clone()));
    let locals = Locals::new("q_proj", locals);
    let y_to = map.graph(x_ti, &locals, &cx)?;
    let loss = map.loss(x_ti, &locals, &cx)?.ok_or("no loss")?;
    let all: Vec<_> = leaves.iter().collect();
    let found = autograd::pull(&all, &[(&y_to, dy_to), (&loss, &loss.ones_like()?)])?;
    Ok((y_to, loss, found.into_iter().collect::<Option<Vec<_>>>().ok_or("a tensor without gradient")?))
}

const TRAINED: [&str; 4] = ["lora_A", "lora_B", "std_prior", "expert_weights_prior"];

fn map_of(setup: &Setup) -> Result<&dyn RowMap, Failed> {
    match setup.adapter.port(&setup.attachments[0]) {
        Port::Delta(map) => Ok(map),
        _ => Err("it adds nothing to rows".into()),
    }
}

/// `golden/monteclora_draw.safetensors`, see `golden/drawn.py`.
fn golden() -> Result<(), Failed> {
    let file = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden/monteclora_draw.safetensors");
    let theirs = candle_core::safetensors::load(file, &Device::Cpu)?;
    let method = json!({
        "method": "monteclora", "rank": 3, "alpha": 6, "samples": 4, "entropy": true, "prior": 0.3, "scale": 0.05, "kl_weight": 0.01,
    });
    let setup = Setup::new(build(method).map_err(fail)?, QUERIES, DType::F32);
    let chi_r1 = theirs["chi_r"].sqrt()?.unsqueeze(1)?;
    let drawn = Drawn {
        // PEFT draws for the transposed factor.
        draws_nri: theirs["z_draws"].transpose(1, 2)?.contiguous()?,
        spreads_rr: chi_r1.broadcast_mul(&Tensor::eye(3, DType::F32, &Device::Cpu)?)?,
        shares_n: theirs["z_shares"].clone(),
    };
    let tensors = TRAINED.map(|local| (local, theirs[local].clone()));
    let (y_to, loss, gradients) = added(map_of(&setup)?, (&theirs["x"], &theirs["dy"]), &tensors, &drawn)?;
    assert!(difference(&y_to, &theirs["y"]) < 1e-4 * largest(&theirs["y"]));
    assert!(difference(&loss, &theirs["loss"].squeeze(0)?) < 1e-4, "{loss} and {}", theirs["loss"]);
    for (local, gradient) in TRAINED.iter().zip(gradients) {
        let reference = &theirs[&format!("grad.{local}")];
        let off = difference(&gradient, reference) / largest(reference);
        assert!(off < 1e-4, "the gradient of {local} is off by a factor of {off}");
    }
    Ok(())
}

/// The derivative along a random direction in each tensor against a central difference, in f64, with both divergences.
fn exact() -> Result<(), Failed> {
    let normal = |name: &str, shape: &[usize]| Rng::new(6, name).normal_tensor(shape, 0.5, DType::F64);
    let (x_ti, dy_to) = (normal("x", &[5, 6])?, normal("dy", &[5, 4])?);
    let drawn = Drawn {
        draws_nri: normal("draws", &[3, 2, 6])?,
        spreads_rr: normal("spreads", &[2, 2])?,
        shares_n: normal("shares", &[3])?,
    };
    for dirichlet in ["reference", "exact"] {
        let method = json!({
            "method": "monteclora", "rank": 2, "samples": 3, "entropy": true, "scale": 0.5, "kl_weight": 0.3, "dirichlet": dirichlet,
        });
        let setup = Setup::new(build(method).map_err(fail)?, QUERIES, DType::F64);
        let map = map_of(&setup)?;
        let shapes: [&[usize]; 4] = [&[2, 6], &[4, 2], &[2], &[3]];
        let mut tensors = Vec::new();
        for (local, shape) in TRAINED.into_iter().zip(shapes) {
            tensors.push((local, normal(local, shape)?));
        }
        let whole = |tensors: &[(&'static str, Tensor)]| -> Result<f64, Failed> {
            let (y_to, loss, _) = added(map, (&x_ti, &dy_to), tensors, &drawn)?;
            Ok(((y_to * &dy_to)?.sum_all()? + loss)?.to_scalar::<f64>()?)
        };
        let (_, _, gradients) = added(map, (&x_ti, &dy_to), &tensors, &drawn)?;
        for (at, gradient) in gradients.iter().enumerate() {
            let along = normal("along", tensors[at].1.dims())?;
            let moved = |step: f64| -> Result<f64, Failed> {
                let mut moved = tensors.clone();
                moved[at].1 = (&moved[at].1 + (&along * step)?)?;
                whole(&moved)
            };
            let numeric = (moved(1e-5)? - moved(-1e-5)?) / 2e-5;
            let exact = (gradient * &along)?.sum_all()?.to_scalar::<f64>()?;
            assert!((numeric - exact).abs() < 1e-6 * (1.0 + exact.abs()), "{}: {numeric} and {exact}", tensors[at].0);
            assert!(exact.abs() > 1e-4, "{}: nothing", tensors[at].0);
        }
    }
    Ok(())
}

/// How far apart what a component adds in two steps of training is, how far one step is from what is added to each of two rows to what is added to
/// their sum, and how far apart two answers are.
fn apart(method: Value) -> Result<[f64; 3], Failed> {
    let mut setup = Setup::new(build(method).map_err(fail)?, QUERIES, DType::F64);
    setup.disturb(0.3);
    let layout = batch();
    let logits = |dropout| setup.model.logits(&Pass { theta: &setup.theta, layout: &layout, dropout });
    let step = |step| Some(Dropout { seed: 1, step });
    let at = &setup.attachments[0];
    let locals = attune_models::stack::locals(at, &setup.params())?;
    let normal = |name: &str, shape: &[usize]| Rng::new(6, name).normal_tensor(shape, 0.5, DType::F64);
    let drawn = Drawn {
        draws_nri: normal("draws", &[8, 4, 24])?,
        spreads_rr: normal("spreads", &[4, 4])?,
        shares_n: normal("shares", &[8])?,
    };
    let none = Layout::new();
    let cx = RowCx { site: &at.site, output: 24, dropout: Some(&drawn), layout: &none, rows: None };
    let of = |x: &Tensor| map_of(&setup)?.graph(x, &locals, &cx).map_err(Failed::from);
    let (x, y) = (normal("x", &[3, 24])?, normal("y", &[3, 24])?);
    let sum = (of(&x)? + of(&y)?)?;
    Ok([
        difference(&logits(step(1))?, &logits(step(2))?),
        difference(&of(&(x + y)?)?, &sum),
        difference(&logits(None)?, &logits(None)?),
    ])
}

fn weights_of_a_step() -> Result<(), Failed> {
    let [steps, sum, answers] = apart(json!({"method": "monteclora", "rank": 4, "scale": 0.1}))?;
    let [plain, _, _] = apart(json!({"method": PLAIN, "rank": 4}))?;
    assert!(steps > 0.01 && sum < 1e-10 && answers == 0.0 && plain == 0.0, "{steps}, {sum}, {answers} and {plain}");
    Ok(())
}
