//! Components that are another weight as well as a map of rows: both are one, with the same gradients.

use attune_adapt::ADAPTERS;
use attune_points::Layout;
use attune_points::adapter::{Port, RowCx};
use attune_points::forms::AsWeight;
use attune_spec::method::Card;
use attune_tensor::{Rng, autograd, ops};
use candle_core::{DType, Tensor, Var};
use libtest_mimic::{Failed, Trial};

use crate::support::{Setup, difference, largest};
use crate::{build, fail, method};

/// A trial for each method with another form, by its defaults and by what else it can be asked for.
pub(crate) fn trials() -> Vec<Trial> {
    let more = [
        ("mora", "form", "rope"),
        ("mora", "form", "share"),
        ("road", "variant", "road_2"),
        ("road", "variant", "road_4"),
    ];
    let plain = ADAPTERS.cards().map(|card| (card, None));
    let others = more.into_iter().flat_map(|(name, parameter, value)| {
        ADAPTERS.cards().filter(move |card| card.name == name).map(move |card| (card, Some((parameter, value))))
    });
    let trial = |(card, with): (&'static Card, Option<(&'static str, &'static str)>)| {
        let with_name = with.map_or_else(String::new, |(_, value)| format!("_with_{value}"));
        let name = format!("adapter::{}::rows_and_another_weight_are_one{with_name}", card.name);
        Trial::test(name, move || one(card, with))
    };
    plain.chain(others).filter(|(card, _)| has_both(card)).map(trial).collect()
}

fn as_weight<'a>(port: Port<'a>, shape: (usize, usize)) -> Option<AsWeight<'a>> {
    match port {
        Port::Delta(map) => map.as_weight(shape),
        Port::Input(map) | Port::Output(map) => map.as_weight(shape),
        _ => None,
    }
}

fn has_both(card: &Card) -> bool {
    let setup = Setup::of(card, build(method(card)).unwrap_or_else(|faults| panic!("{faults:?}")), DType::F64);
    as_weight(setup.adapter.port(&setup.attachments[0]), (24, 24)).is_some()
}

fn one(card: &Card, with: Option<(&str, &str)>) -> Result<(), Failed> {
    let mut asked = method(card);
    if let Some((parameter, value)) = with {
        asked[parameter] = value.into();
    }
    let mut setup = Setup::of(card, build(asked).map_err(fail)?, DType::F64);
    setup.disturb(0.1);
    let (params, layout) = (setup.params(), Layout::new());
    for at in &setup.attachments {
        let port = setup.adapter.port(at);
        let shape = setup.weight(at)?.shape();
        let Some(form) = as_weight(port, shape) else { return Err(format!("none at {}", at.site).into()) };
        let mut rng = Rng::new(3, at.site.as_str());
        let (w_oi, x_ti) = (setup.weight(at)?.dense(DType::F64)?, rng.normal_tensor((7, shape.1), 1.0, DType::F64)?);
        let (b_o, dy_to) =
            (rng.normal_tensor(shape.0, 1.0, DType::F64)?, rng.normal_tensor((7, shape.0), 1.0, DType::F64)?);
        let run = |weight: bool| -> Result<(Tensor, Vec<Option<Tensor>>), Failed> {
            let x = autograd::leaf(&x_ti)?;
            let leaf = |local: &'static str, tensor: &Tensor| -> Result<(&'static str, Var), Failed> {
                Ok((local, autograd::leaf(tensor)?))
            };
            let held = attune_models::stack::locals(at, &params)?;
            let trained = at.tensors.iter().filter(|spec| spec.train);
            let leaves =
                trained.map(|spec| leaf(spec.local, held.get(spec.local)?)).collect::<Result<Vec<_>, Failed>>()?;
            let own = held.iter().map(|(local, tensor)| {
                let leaf = leaves.iter().find(|(name, _)| *name == local);
                (local, leaf.map_or_else(|| tensor.clone(), |(_, leaf)| leaf.as_tensor().clone()))
            });
            let locals = attune_points::Locals::new(at.site.as_str(), own.collect::<Vec<_>>());
            let through = |x: &Tensor, w: &Tensor, b: &Tensor| ops::linear(x, w, Some(b));
            let cx = RowCx { site: &at.site, output: shape.0, dropout: None, layout: &layout, rows: None };
            let y = match (weight, port) {
                (true, _) => {
                    let bias = form.map.bias(&b_o, &w_oi, &locals)?;
                    through(&x, &form.map.graph(&w_oi, &locals)?, &bias)?
                }
                (false, Port::Delta(map)) => (through(&x, &w_oi, &b_o)? + map.graph(&x, &locals, &cx)?)?,
                (false, Port::Input(map)) => through(&map.graph(&x, &locals)?, &w_oi, &b_o)?,
                (false, Port::Output(map)) => map.graph(&through(&x, &w_oi, &b_o)?, &locals)?,
                _ => return Err("another port".into()),
            };
            let all: Vec<&Var> = leaves.iter().map(|(_, leaf)| leaf).chain([&x]).collect();
            Ok((y.detach(), autograd::pull(&all, &[(&y, &dy_to)])?))
        };
        let ((by_rows, back), (by_weight, back_by_weight)) = (run(false)?, run(true)?);
        let near = |a: &Tensor, b: &Tensor| difference(a, b) < 1e-12 * (1.0 + largest(a));
        assert!(near(&by_rows, &by_weight), "{}: {}", at.site, difference(&by_rows, &by_weight));
        for (index, (by_rows, by_weight)) in back.iter().zip(&back_by_weight).enumerate() {
            let (Some(by_rows), Some(by_weight)) = (by_rows, by_weight) else {
                return Err(format!("{}: gradient {index} is missing", at.site).into());
            };
            assert!(near(by_rows, by_weight), "{}: gradient {index} {}", at.site, difference(by_rows, by_weight));
        }
    }
    Ok(())
}
