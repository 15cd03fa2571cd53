//! Sums over what linears read.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use attune_architecture::{Architecture, Place, Site, SiteId};
use attune_models::{Base, Model, Pass, Slot, Stack};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, RowCx, RowMap};
use attune_points::layout::NO_LABEL;
use attune_points::stats::{Counted, What};
use attune_points::{Bank, BankKind, Layout, Locals, Params, Result, Stats, StatsRequest, Theta, Weight};
use attune_probe::{Wanted, measure};
use attune_spec::Fault;
use attune_tensor::Rng;
use candle_core::{DType, Device, Tensor};

use crate::support::{GPT2, LLAMA, OLMOE, Plain, agree, base, bits, data, linears, measured, values};

/// A component that adds nothing and remembers what its sites read.
#[derive(Default)]
struct Remembers {
    read: Mutex<BTreeMap<SiteId, Vec<Tensor>>>,
}

impl RowMap for Remembers {
    fn graph(&self, x_ti: &Tensor, _: &Locals, cx: &RowCx<'_>) -> Result<Tensor> {
        self.read.lock().unwrap().entry(cx.site.clone()).or_default().push(x_ti.to_dtype(DType::F64)?);
        Ok(Tensor::zeros((x_ti.dim(0)?, cx.output), x_ti.dtype(), &Device::Cpu)?)
    }
}

impl Adapter for Remembers {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> std::result::Result<Vec<Attachment>, Vec<Fault>> {
        Ok(sites.iter().map(|site| Attachment { site: site.id.clone(), tensors: Vec::new() }).collect())
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, _: &mut Rng) -> Result<(Locals, BaseEdit)> {
        Ok((Locals::new(at.site.as_str(), []), BaseEdit::None))
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Delta(self)
    }

    fn merge(&self, _: &Attachment, _: &Locals, _: &dyn Weight) -> Result<Merged> {
        Ok(Merged::No("it adds nothing"))
    }

    fn peft(&self) -> Option<Peft> {
        None
    }
}

/// What each linear reads of a micro-batch, in f64.
fn read(base: &Arc<Base>, layout: &Layout) -> BTreeMap<SiteId, Tensor> {
    let remembers = Arc::new(Remembers::default());
    let adapter: Arc<dyn Adapter> = Arc::<Remembers>::clone(&remembers);
    let attachments = adapter.attach(base.architecture(), &linears(base)).unwrap();
    let model = Model::new(Arc::clone(base), Stack::new(vec![Slot::new(adapter, attachments)]));
    let sets = vec![Arc::new(Params::new())];
    let theta = Theta::single([Bank { slot: "x".into(), kind: BankKind::Adapter, sets, train: false }]);
    model.logits(&Pass { theta: &theta, layout, dropout: None }).unwrap();
    let read = std::mem::take(&mut *remembers.read.lock().unwrap());
    read.into_iter().map(|(site, parts)| (site, Tensor::cat(&parts, 0).unwrap())).collect()
}

fn covariance(rows: Counted) -> StatsRequest {
    StatsRequest { what: What::InputCovariance { rows, scaled: false }, examples: 1000, domains: None }
}

fn norms(rows: Counted) -> StatsRequest {
    StatsRequest { what: What::InputNorms { rows }, examples: 1000, domains: None }
}

/// Sums of outer products and of rows, straight from the rows.
fn direct(base: &Arc<Base>, layouts: &[Arc<Layout>], rows: Counted) -> BTreeMap<SiteId, (Vec<f64>, Vec<f64>, u64)> {
    let mut sums: BTreeMap<SiteId, (Vec<f64>, Vec<f64>, u64)> = BTreeMap::new();
    for layout in layouts {
        for (site, x_ti) in read(base, layout) {
            // An expert's rows are told apart by what they are alone: every row counts there.
            let chosen: Vec<u32> = (0..x_ti.dim(0).unwrap() as u32)
                .filter(|&row| rows == Counted::Tokens || layout.labels()[row as usize] != NO_LABEL)
                .collect();
            if chosen.is_empty() {
                continue;
            }
            let n = chosen.len() as u64;
            let x_ti = x_ti.index_select(&Tensor::new(chosen, &Device::Cpu).unwrap(), 0).unwrap();
            let second = values(&x_ti.t().unwrap().contiguous().unwrap().matmul(&x_ti).unwrap());
            let first = values(&x_ti.sum(0).unwrap());
            let sum = sums.entry(site).or_insert_with(|| (vec![0.0; second.len()], vec![0.0; first.len()], 0));
            sum.0.iter_mut().zip(second).for_each(|(sum, x)| *sum += x);
            sum.1.iter_mut().zip(first).for_each(|(sum, x)| *sum += x);
            sum.2 += n;
        }
    }
    sums
}

fn is_direct(stats: &Stats, request: &StatsRequest, direct: &BTreeMap<SiteId, (Vec<f64>, Vec<f64>, u64)>, bound: f64) {
    for (site, (second, first, rows)) in direct {
        let found = stats.covariance(request, site).unwrap();
        assert_eq!(found.rows, *rows, "{site}");
        assert!(agree(&values(&found.sum_ii), second, bound), "{site}");
        assert!(agree(&values(&found.sum_i), first, bound), "{site}");
    }
}

#[test]
fn sums_are_those_of_what_every_linear_reads() {
    let data = data();
    for config in [LLAMA, GPT2, OLMOE] {
        let base = base(config, DType::F32);
        let kinds = if config == OLMOE { vec![Counted::Tokens] } else { vec![Counted::Tokens, Counted::Supervised] };
        for rows in kinds {
            let (of, squares) = (covariance(rows), norms(rows));
            let stats = measured(&base, &[of.clone(), squares.clone()], &data, 40);
            let direct = direct(&base, &data, rows);
            assert_eq!(direct.len(), linears(&base).len());
            is_direct(&stats, &of, &direct, 1e-6);
            for (site, (second, first, _)) in &direct {
                let diagonal: Vec<f64> = second.iter().step_by(first.len() + 1).copied().collect();
                assert!(agree(&values(&stats.norms(&squares, site).unwrap().sum_i), &diagonal, 1e-6), "{site}");
            }
        }
    }
}

#[test]
fn activations_of_16_bits_are_summed_in_more() {
    let (base, data) = (base(LLAMA, DType::BF16), data());
    let of = covariance(Counted::Tokens);
    is_direct(
        &measured(&base, std::slice::from_ref(&of), &data, 40),
        &of,
        &direct(&base, &data, Counted::Tokens),
        1e-6,
    );
}

#[test]
fn queries_keys_and_values_share_a_sum_and_so_do_the_halves_of_a_gated_mlp() {
    let base = base(LLAMA, DType::F32);
    let of = covariance(Counted::Tokens);
    let stats = measured(&base, std::slice::from_ref(&of), &data(), 40);
    let tensor = |site: &str| stats.covariance(&of, &site.into()).unwrap().sum_ii.id();
    let (attention, mlp) = ("model.layers.1.self_attn", "model.layers.1.mlp");
    let at = |block: &str, linear: &str| tensor(&format!("{block}.{linear}"));
    assert!(at(attention, "q_proj") == at(attention, "k_proj") && at(attention, "q_proj") == at(attention, "v_proj"));
    assert_eq!(at(mlp, "gate_proj"), at(mlp, "up_proj"));
    let all = [at(attention, "q_proj"), at(attention, "o_proj"), at(mlp, "up_proj"), at(mlp, "down_proj")];
    let distinct: BTreeSet<String> = all.iter().map(|id| format!("{id:?}")).collect();
    assert_eq!(distinct.len(), 4);
    let mut wanted = Wanted::default();
    wanted.add(&of, &linears(&base)).unwrap();
    // Eight bytes for each number of one half, and of the sum of the rows.
    let bytes = |width: u64| 8 * (width * (width + 1) / 2 + width);
    assert_eq!(wanted.bytes(), 2 * (3 * bytes(24) + bytes(32)));
}

/// The order of the data is part of the bits, and of nothing else.
#[test]
fn sums_of_the_same_data_in_another_order_agree() {
    let (base, data) = (base(LLAMA, DType::F32), data());
    let of = covariance(Counted::Tokens);
    let turned: Vec<Arc<Layout>> = data.iter().rev().cloned().collect();
    let (one, other) = (
        measured(&base, std::slice::from_ref(&of), &data, 40),
        measured(&base, std::slice::from_ref(&of), &turned, 40),
    );
    for site in linears(&base) {
        let sum = |stats: &Stats| values(&stats.covariance(&of, &site.id).unwrap().sum_ii);
        assert!(agree(&sum(&one), &sum(&other), 1e-6), "{}", site.id);
    }
}

/// What goes through the model together, and on how many threads, is a matter of speed.
#[test]
fn no_bit_depends_on_threads_or_on_what_goes_together() {
    let data = data();
    for config in [LLAMA, OLMOE] {
        let base = base(config, DType::F32);
        let gradient = StatsRequest { what: What::Gradient, examples: 9, domains: None };
        let scaled = What::InputCovariance { rows: Counted::Supervised, scaled: true };
        let scaled = StatsRequest { what: scaled, ..gradient.clone() };
        let requests = [covariance(Counted::Tokens), norms(Counted::Supervised), scaled, gradient];
        let on = |threads: usize, rows: usize| {
            let pool = rayon_pool(threads);
            pool.install(|| bits(&measured(&base, &requests, &data, rows)))
        };
        let one = on(1, 1);
        assert!(one.len() >= 3 * linears(&base).len());
        for (threads, rows) in [(1, 60), (2, 1000), (3, 45)] {
            assert!(on(threads, rows) == one, "{threads} threads, {rows} rows");
        }
    }
}

fn rayon_pool(threads: usize) -> rayon::ThreadPool {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
}

/// The first examples, those of some domains, and no more of the data than that.
#[test]
fn a_request_is_about_the_first_examples_of_its_domains() {
    let (base, data) = (base(LLAMA, DType::F32), data());
    let first = StatsRequest { examples: 4, ..covariance(Counted::Tokens) };
    let odd = StatsRequest { examples: 3, domains: Some(BTreeSet::from([1])), ..covariance(Counted::Tokens) };
    let chosen = |keep: &dyn Fn(u64) -> bool| -> Vec<Arc<Layout>> {
        data.iter().map(|layout| Arc::new(layout.of_docs(|_, doc| keep(doc.example)))).collect()
    };
    let site = &linears(&base)[0];
    let mut wanted = Wanted::default();
    wanted.add(&first, std::slice::from_ref(site)).unwrap();
    wanted.add(&odd, std::slice::from_ref(site)).unwrap();
    let mut taken = 0;
    let mut next = || {
        taken += 1;
        Ok(data.get(taken - 1).cloned())
    };
    let (stats, seen) = measure(&mut Plain::new(&base), &wanted, 40, &mut next).unwrap();
    assert_eq!(seen.documents, 4 + 3);
    assert_eq!(taken, 3, "the examples 0 to 3, and 1, 3 and 5, are in the first three");
    for (request, keep) in [
        (&first, &(|example: u64| example < 4) as &dyn Fn(u64) -> bool),
        (&odd, &|example| [1, 3, 5].contains(&example)),
    ] {
        let direct = direct(&base, &chosen(keep), Counted::Tokens);
        let (second, _, rows) = &direct[&site.id];
        let found = stats.covariance(request, &site.id).unwrap();
        assert_eq!((found.rows, found.documents), (*rows, request.examples));
        assert!(agree(&values(&found.sum_ii), second, 1e-6), "{request}");
    }
}

#[test]
fn what_cannot_be_measured_is_refused_with_its_site() {
    let base = base(LLAMA, DType::F32);
    let site = |id: &str| base.architecture().site(id).unwrap();
    let refused =
        |request: &StatsRequest, id: &str| Wanted::default().add(request, &[site(id)]).unwrap_err().to_string();
    let of = covariance(Counted::Tokens);
    assert!(refused(&of, "lm_head").contains("lm_head: the head reads some rows at a time"));
    assert!(refused(&of, "model.norm").contains("model.norm is a norm"));
    assert!(refused(&StatsRequest { examples: 0, ..of }, "lm_head").contains("expected 1 example or more"));
    let gradient = StatsRequest { what: What::Gradient, examples: 1, domains: None };
    assert!(Wanted::default().add(&gradient, &[site("lm_head")]).is_ok());
}

/// Keys of a text are those of a document that begins with it, and what reads no keys has none.
#[test]
fn a_text_is_read_at_attentions_and_nowhere_else() {
    let base = base(LLAMA, DType::F32);
    let is_attention = |site: &Site| site.place == Place::Attention;
    let sites: Vec<Site> = base.architecture().sites().into_iter().filter(is_attention).collect();
    let read = |tokens: &[u32]| {
        let mut wanted = Wanted::default();
        wanted.add_text(tokens, &sites, base.architecture().kv_width()).unwrap();
        assert_eq!(wanted.bytes(), (2 * 8 * tokens.len() * 12) as u64);
        let (stats, seen) = measure(&mut Plain::new(&base), &wanted, 64, &mut || Ok(None)).unwrap();
        assert_eq!((seen.documents, seen.rows), (1, tokens.len() as u64));
        stats
    };
    let (short, long) = (read(&[3, 1, 4]), read(&[3, 1, 4, 1, 5]));
    for site in &sites {
        let (short, long) =
            (short.of_text(&[3, 1, 4], &site.id).unwrap(), long.of_text(&[3, 1, 4, 1, 5], &site.id).unwrap());
        for (short, long) in [(&short.keys_tk, &long.keys_tk), (&short.values_tk, &long.values_tk)] {
            assert_eq!(values(short), values(&long.narrow(0, 0, 3).unwrap()));
        }
    }
    let unread = short.of_text(&[3, 1], &sites[0].id).unwrap_err().to_string();
    assert!(unread.contains("a text of 2 tokens was not measured"), "{unread}");
    let mut wanted = Wanted::default();
    let refused = wanted.add_text(&[3], &linears(&base)[..1], 12).unwrap_err().to_string();
    assert!(refused.contains("are of attentions"), "{refused}");
    assert!(wanted.add_text(&[], &sites, 12).is_err());
}
