//! Which rows a component reaches, and which inputs it tells apart.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use attune_architecture::{Place, SiteId};
use attune_models::{Model, Pass, generate};
use attune_points::generate::Sampling;
use attune_points::{Layout, Row, Tap, Theta};
use attune_tensor::kernels::Kernels;
use attune_tensor::view::MatRef;
use candle_core::DType;
use libtest_mimic::Failed;
use serde_json::{Value, json};

use super::{Own, PLAIN, change};
use crate::support::{Setup, batch, largest};
use crate::{build, fail};

pub(super) const OWN: &[(&str, Own)] = &[
    ("alora::keys_and_values_before_an_invocation_are_the_bases_to_the_last_bit", before_an_invocation),
    ("alora::a_text_goes_on_by_a_cache_as_it_does_as_a_whole", generated),
    ("alora::invoked_by_the_first_token_it_is_lora", invoked_at_once),
    ("qalora::a_merged_weight_changes_by_one_number_for_all_inputs_of_a_group", one_number),
];

/// The keys and values of every attention, row by row.
struct Kept<'a> {
    model: &'a Model,
    rows: Mutex<Vec<Vec<u32>>>,
}

impl Kept<'_> {
    /// The bits of all that attentions keep of each row of a batch.
    fn of(model: &Model, theta: &Theta, layout: &Layout) -> Result<Vec<Vec<u32>>, Failed> {
        let kept = Kept { model, rows: Mutex::new(vec![Vec::new(); layout.n_rows()]) };
        model.look(&[Pass { theta, layout, dropout: None }], &kept)?;
        Ok(kept.rows.into_inner().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Tap for Kept<'_> {
    fn wants(&self, site: &SiteId) -> bool {
        self.model.base().architecture().site(site.as_str()).is_some_and(|site| site.place == Place::Attention)
    }

    fn read(
        &self,
        _: &SiteId,
        _: usize,
        _: Option<&[u32]>,
        _: MatRef<'_>,
        _: &dyn Kernels,
    ) -> attune_points::Result<()> {
        Ok(())
    }

    fn keys_values(
        &self,
        _: &SiteId,
        _: usize,
        k: MatRef<'_>,
        v: MatRef<'_>,
        _: &dyn Kernels,
    ) -> attune_points::Result<()> {
        let mut rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        for (at, kept) in rows.iter_mut().enumerate() {
            for x in [k, v] {
                let MatRef::F32(x) = x else { continue };
                kept.extend(x.row(at).iter().map(|value| value.to_bits()));
            }
        }
        Ok(())
    }
}

/// A component with LoRA's tensors at all linears, away from its start.
fn setup(method: Value) -> Result<Setup, Failed> {
    let mut setup = Setup::new(build(method).map_err(fail)?, "all-linear", DType::F32);
    setup.disturb(0.3);
    Ok(setup)
}

/// Tokens of a row of the batch's second document, whose rows are 6 to 14, and of those after it.
fn tokens(layout: &Layout, rows: Range<usize>) -> Vec<u32> {
    let token = |row: &Row| if let Row::Token(token) = row { Some(*token) } else { None };
    layout.rows()[rows].iter().filter_map(token).collect()
}

fn invoked_by(tokens: &[u32]) -> Value {
    json!({"method": "alora", "tokens": tokens, "rank": 2, "alpha": 4})
}

fn plain() -> Value {
    json!({"method": PLAIN, "rank": 2, "alpha": 4})
}

/// Which rows of the batch have other keys or values than the base's.
fn changed(method: Value) -> Result<Vec<usize>, Failed> {
    let (setup, layout) = (setup(method)?, batch());
    let with = Kept::of(&setup.model, &setup.theta, &layout)?;
    let without = Kept::of(&setup.model, &setup.theta.adapters_off(), &layout)?;
    assert!(without.iter().all(|row| row.len() == 2 * 2 * 12), "two layers of keys and values, 12 wide");
    Ok((0..layout.n_rows()).filter(|row| with[*row] != without[*row]).collect())
}

fn before_an_invocation() -> Result<(), Failed> {
    let layout = batch();
    let invoked = changed(invoked_by(&tokens(&layout, 9..11)))?;
    assert_eq!(invoked, (9..15).collect::<Vec<_>>(), "from its first token to the end of its document");
    assert_eq!(changed(plain())?, (0..21).collect::<Vec<_>>());
    Ok(())
}

/// Where it is invoked by the first token of every document, a component is LoRA.
fn invoked_at_once() -> Result<(), Failed> {
    let mut layout = Layout::new();
    for _ in 0..2 {
        let rows = [3, 8, 21, 5].map(|token| (Row::Token(token), attune_points::layout::NO_LABEL));
        layout.push(attune_points::layout::Source::default(), rows);
    }
    let logits =
        |method: Value| -> Result<Vec<f32>, Failed> { Ok(setup(method)?.logits(&layout)?.flatten_all()?.to_vec1()?) };
    assert_eq!(logits(invoked_by(&[3]))?, logits(plain())?);
    Ok(())
}

fn generated() -> Result<(), Failed> {
    let layout = batch();
    let prompt = tokens(&layout, 6..13);
    let (setup, sampling) = (setup(invoked_by(&prompt[3..5]))?, Sampling { max_tokens: 12, ..Sampling::default() });
    let made = |theta: &Theta| generate::generate(&setup.model, theta, &prompt, &sampling, |_| true);
    let mut whole = prompt.clone();
    for _ in 0..sampling.max_tokens {
        let layout = Layout::single(&whole);
        let logits = setup.model.logits(&Pass { theta: &setup.theta, layout: &layout, dropout: None })?;
        let last = logits.to_vec2::<f32>()?.pop().ok_or("no row")?;
        let best = (0..last.len()).min_by(|a, b| last[*b].total_cmp(&last[*a])).ok_or("no token")?;
        whole.push(best as u32);
    }
    assert_eq!(made(&setup.theta)?.tokens, whole[prompt.len()..]);
    assert_ne!(made(&setup.theta)?.tokens, made(&setup.theta.adapters_off())?.tokens, "it changes nothing");
    Ok(())
}

/// By how much the change of a merged weight differs among the inputs of a group of four, at most.
fn within_groups(method: Value) -> Result<f64, Failed> {
    let mut setup = Setup::new(build(method).map_err(fail)?, "model.layers.1.mlp.up_proj", DType::F64);
    setup.disturb(0.3);
    let change_oi = change(&setup)?;
    assert!(largest(&change_oi) > 0.1, "nothing moved");
    let (o, i) = change_oi.dims2()?;
    let groups = change_oi.reshape((o, i / 4, 4))?;
    Ok(largest(&groups.broadcast_sub(&groups.mean_keepdim(2)?)?))
}

fn one_number() -> Result<(), Failed> {
    let grouped = within_groups(json!({"method": "qalora", "rank": 2, "alpha": 2, "group_size": 4}))?;
    let plain = within_groups(plain())?;
    assert!(grouped < 1e-12 && plain > 0.01, "{grouped} and {plain}");
    Ok(())
}
