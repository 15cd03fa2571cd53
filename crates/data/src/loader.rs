//! Packs the documents of one optimiser step into the micro-batches of its logical shards.
//!
//! Next fit in the order of drawing: a document that does not fit into what is left of a micro-batch opens the next one.
//! Documents are never split and none is passed over, so the sequence of documents does not depend on the budget.

use std::sync::Arc;

use attune_points::engine::Batch;
use attune_points::layout::{LabelCounts, NO_LABEL, Source as DocSource};
use attune_points::mixing::{Feedback, Mixing, Simplex};
use attune_points::{Layout, Row, View};
use attune_spec::id::Step;
use attune_spec::job::plan::Length;
use serde::{Deserialize, Serialize};

use crate::classes::Labelled;
use crate::dataset::{Dataset, Document};
use crate::error::Error;
use crate::stream::{Cap, Counters, Drawn, Stream};

/// The room that answers take which the model gives to a row's prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// How many answers.
    pub each: u16,
    /// The most tokens of one.
    pub max_tokens: u32,
}

/// How documents are packed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packing {
    /// Tokens in one batch; each logical shard gets its part.
    pub batch_tokens: u32,
    /// Parts of a batch.
    pub logical_shards: u32,
    /// Batches in one optimiser step.
    pub accumulation: u32,
    /// The longest document.
    pub max_length: u32,
    /// The answers in place of which rows are packed, if the model gives them itself: a row takes as much as they may.
    pub answers: Option<Room>,
    /// The rows that components put before those of every document: they take room, and are none of its tokens.
    pub before: Arc<[Row]>,
}

impl Packing {
    /// Tokens that one micro-batch holds.
    pub const fn shard_tokens(&self) -> usize {
        (self.batch_tokens / self.logical_shards) as usize
    }

    /// Tokens that a row of `data` may become, with the rows before its documents.
    ///
    /// # Panics
    /// If there is no row of this index.
    pub fn tokens_of(&self, data: &Dataset, index: usize) -> usize {
        match self.answers {
            None => data.row(index).map(|document| self.before.len() + document.ids.len()).sum(),
            Some(Room { each, max_tokens }) => {
                let longest =
                    |document: Document<'_>| self.before.len() + document.prompt_tokens() + max_tokens as usize;
                usize::from(each) * data.row(index).map(longest).sum::<usize>()
            }
        }
    }
}

/// A named domain of the mixture.
#[derive(Debug, Clone)]
pub struct Domain {
    /// Its name.
    pub name: String,
    /// Its documents.
    pub data: Arc<Dataset>,
}

/// All that a resumed run needs to go on with its data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Counters of the stream.
    pub counters: Counters,
    /// State of the mixing method.
    pub mixing: Vec<u8>,
    /// What the mixing method hears next.
    pub feedback: Vec<Option<f64>>,
}

/// Hands out the batches of a run.
pub struct Loader {
    domains: Vec<Domain>,
    stream: Stream,
    mixing: Box<dyn Mixing>,
    packing: Packing,
    feedback: Feedback,
    /// Documents after which the run's data ends, if it is counted in epochs.
    documents_max: u64,
}

impl Loader {
    /// The batches of a run from its beginning.
    pub fn new(seed: u64, domains: Vec<Domain>, mixing: Box<dyn Mixing>, packing: Packing, length: Length) -> Self {
        let stream = Stream::new(seed, domains.iter().map(|domain| (domain.name.clone(), domain.data.len())));
        let all: u64 = domains.iter().map(|domain| domain.data.len() as u64).sum();
        let documents_max = match length {
            Length::Epochs(epochs) => (epochs * all as f64).ceil() as u64,
            Length::Steps(_) | Length::Tokens(_) => u64::MAX,
        };
        Self { domains, stream, mixing, packing, feedback: Feedback::default(), documents_max }
    }

    /// The same with bounds on the documents of some domains.
    #[must_use]
    pub fn capped(self, caps: Vec<Cap>) -> Self {
        Self { stream: self.stream.capped(caps), ..self }
    }

    /// The micro-batches of step `step` for all logical shards, in order; number `a * logical_shards + s` is the part of
    /// shard `s` in accumulated batch `a`. A micro-batch is empty when the run's data has ended.
    ///
    /// # Errors
    /// Whatever the mixing method raises.
    pub fn batch(&mut self, step: Step) -> Result<Batch, attune_points::Error> {
        let shares = self.mixing.decide(step, &self.feedback)?;
        let n_parts = self.packing.accumulation * self.packing.logical_shards;
        let mut parts = Vec::with_capacity(n_parts as usize);
        for part in 0..n_parts {
            parts.push((part, Arc::new(self.pack(&shares))));
        }
        let counts = parts.iter().map(|(_, layout)| layout.counts()).sum::<LabelCounts>();
        let n_rows = parts.iter().map(|(_, layout)| layout.n_rows() as u64).sum();
        Ok(Batch { parts, counts, n_rows })
    }

    fn pack(&mut self, shares: &Simplex) -> Layout {
        let mut left = self.packing.shard_tokens();
        let mut layout = Layout::new();
        while self.stream.counters().draws < self.documents_max {
            let Drawn { domain, index } = self.stream.peek(shares);
            let data = &self.domains[domain].data;
            let tokens = self.packing.tokens_of(data, index);
            if tokens > left {
                break;
            }
            left -= tokens;
            self.stream.take(domain, tokens);
            push(&mut layout, data, domain, index);
        }
        let labelled = self.domains.iter().find_map(|domain| domain.data.labelled());
        begun(&layout, &self.packing.before, labelled)
    }

    /// Tells what the step showed, for the mixing method.
    pub fn hear(&mut self, feedback: Feedback) {
        self.feedback = feedback;
    }

    /// What was drawn so far.
    pub fn counters(&self) -> &Counters {
        self.stream.counters()
    }

    /// The domains.
    pub fn domains(&self) -> &[Domain] {
        &self.domains
    }

    /// All that a resumed run needs.
    pub fn state(&self) -> State {
        State {
            counters: self.stream.counters().clone(),
            mixing: self.mixing.state(),
            feedback: self.feedback.loss.clone(),
        }
    }

    /// Goes on from a saved state.
    ///
    /// # Errors
    /// A state that is not of this job.
    pub fn restore(&mut self, state: State) -> Result<(), Error> {
        self.stream.restore(state.counters)?;
        self.mixing.restore(&state.mixing).map_err(|error| Error::State(error.to_string()))?;
        self.feedback = Feedback { loss: state.feedback };
        Ok(())
    }

    /// The number of steps that `length` comes to. Epochs and tokens are counted by walking the packer once from the start,
    /// with the shares that the mixing method decides before it has heard anything.
    ///
    /// # Errors
    /// Whatever the mixing method raises.
    pub fn steps(&mut self, length: Length) -> Result<Step, attune_points::Error> {
        let done = |counters: &Counters| match length {
            Length::Steps(_) => true,
            Length::Epochs(_) => counters.draws >= self.documents_max,
            Length::Tokens(tokens) => counters.tokens.iter().sum::<u64>() >= tokens,
        };
        if let Length::Steps(steps) = length {
            return Ok(Step(steps));
        }
        let shares = self.mixing.decide(Step(0), &Feedback::default())?;
        let mut stream = self.stream.clone();
        let (budget, n_parts) = (self.packing.shard_tokens(), self.packing.accumulation * self.packing.logical_shards);
        let mut steps = 0;
        while !done(stream.counters()) {
            steps += 1;
            for _ in 0..n_parts {
                let mut rows = 0;
                while stream.counters().draws < self.documents_max {
                    let Drawn { domain, index } = stream.peek(&shares);
                    let length = self.packing.tokens_of(&self.domains[domain].data, index);
                    if rows + length > budget {
                        break;
                    }
                    rows += length;
                    stream.take(domain, length);
                }
            }
        }
        Ok(Step(steps))
    }
}

/// Appends the documents of a row, which are a group; the label of a token is its class, or the next token where that is learned.
fn push(layout: &mut Layout, data: &Dataset, domain: usize, index: usize) {
    let group = layout.docs().last().map_or(0, |doc| doc.group + 1);
    for Document { view, ids, trained, classed } in data.row(index) {
        let next = ids.iter().zip(trained).skip(1).map(|(id, trained)| if *trained { *id } else { NO_LABEL });
        let labels: Vec<u32> = match classed {
            Some(classed) => classed.labels.to_vec(),
            None => next.chain([NO_LABEL]).collect(),
        };
        let rows = ids.iter().map(|id| Row::Token(*id)).zip(labels);
        let source = DocSource {
            example: index as u64,
            view,
            domain: domain as u16,
            group: Some(group),
            ..DocSource::default()
        };
        layout.push(source, rows);
        if let Some(classed) = classed {
            layout.typed(classed.types);
        }
    }
}

/// The batch with these rows before those of each document. A class that is asked of the first row is asked of the first of these: what
/// gives it reads the first row, whatever that is, as PEFT's models do. Of queries, any row may have the mark.
fn begun(layout: &Layout, before: &[Row], labelled: Option<Labelled>) -> Layout {
    let mut begun = layout.begun_with(before);
    if let (Some(Labelled::First), 1..) = (labelled, before.len()) {
        let starts: Vec<usize> = begun.docs().iter().map(|doc| doc.rows.start as usize).collect();
        for start in starts {
            begun.swap_labels(start, start + before.len());
        }
    }
    begun
}

/// The documents of a validation set in file order, each after the rows `before`, packed into batches of at most `tokens`.
pub fn in_order(data: &Dataset, tokens: usize, before: &[Row]) -> Vec<Layout> {
    let mut layouts = Vec::new();
    let mut layout = Layout::new();
    for index in 0..data.len() {
        let documents = layout.docs().len() + data.row(index).count();
        if layout.n_rows() > 0 && layout.n_rows() + data.tokens_of(index) + documents * before.len() > tokens {
            layouts.push(begun(&std::mem::take(&mut layout), before, data.labelled()));
        }
        push(&mut layout, data, 0, index);
    }
    layouts.push(begun(&layout, before, data.labelled()));
    layouts
}

/// The micro-batch that costs the most memory: full of documents of the longest length, every token supervised. Documents have
/// these roles in turn, or those of the model's answers, as far as whole rows fit.
pub fn largest(packing: &Packing, views: &[View]) -> Layout {
    let answers = packing.answers.map(|answers| (0..answers.each).map(View::Sample).collect::<Vec<_>>());
    let views = answers.as_deref().unwrap_or(views);
    let mut layout = Layout::new();
    let (mut left, before) = (packing.shard_tokens(), packing.before.len());
    // A row's documents together fit the budget, and each has a token to learn.
    let longest = (packing.max_length as usize).min((left / views.len()).saturating_sub(before)).max(1);
    while left >= (before + 2) * views.len() {
        let length = (left / views.len() - before).min(longest);
        let group = layout.docs().last().map_or(0, |doc| doc.group + 1);
        for &view in views {
            left -= before + length;
            let rows = (0..length).map(|row| (Row::Token(0), if row + 1 < length { 0 } else { NO_LABEL }));
            layout.push(DocSource { view, group: Some(group), ..DocSource::default() }, rows);
        }
    }
    layout.begun_with(&packing.before)
}

#[cfg(test)]
mod tests {
    use attune_spec::method::{BuildCx, MethodRef};
    use proptest::prelude::{prop_assert, prop_assert_eq, proptest};

    use super::*;
    use crate::dataset::tests::texts;
    use crate::mixing::MIXINGS;

    fn domain(name: &str, lengths: &[usize]) -> Domain {
        // The tokeniser appends the end of the text.
        let rows: Vec<String> =
            lengths.iter().enumerate().map(|(i, n)| char::from(b'a' + i as u8).to_string().repeat(n - 1)).collect();
        Domain { name: name.to_owned(), data: Arc::new(texts(&rows)) }
    }

    fn loader(domains: &[Domain], packing: Packing, length: Length) -> Loader {
        let weights: Vec<_> = domains.iter().map(|domain| (domain.name.parse().unwrap(), 1.0)).collect();
        let cx = BuildCx { steps: Step(1), domains: &weights, words: None };
        let mixing = MIXINGS.build(&MethodRef::named("static"), &"mixing".into(), &cx).unwrap();
        Loader::new(7, domains.to_vec(), mixing, packing, length)
    }

    fn packing() -> Packing {
        Packing {
            batch_tokens: 60,
            logical_shards: 3,
            accumulation: 1,
            max_length: 12,
            answers: None,
            before: Arc::default(),
        }
    }

    /// The documents of some steps, as (domain, example), shard by shard.
    fn documents(loader: &mut Loader, from: u64, steps: u64) -> Vec<(u16, u64)> {
        (from..from + steps)
            .flat_map(|step| loader.batch(Step(step)).unwrap().parts)
            .flat_map(|(_, layout)| layout.docs().iter().map(|doc| (doc.domain, doc.example)).collect::<Vec<_>>())
            .collect()
    }

    #[test]
    fn labels_are_the_next_tokens_and_documents_start_anew() {
        let mut loader = loader(&[domain("a", &[3, 4])], packing(), Length::Steps(1));
        let batch = loader.batch(Step(0)).unwrap();
        let layout = &batch.parts[0].1;
        for doc in layout.docs() {
            let rows = doc.rows.start as usize..doc.rows.end as usize;
            let (tokens, labels) = (&layout.rows()[rows.clone()], &layout.labels()[rows.clone()]);
            for (next, label) in tokens[1..].iter().zip(labels) {
                assert_eq!(*next, Row::Token(*label));
            }
            assert_eq!(labels.last(), Some(&NO_LABEL));
        }
        assert_eq!(batch.counts, batch.parts.iter().map(|(_, layout)| layout.counts()).sum());
    }

    #[test]
    fn a_class_of_the_first_row_is_asked_of_the_first_row_before_it() {
        let mut layout = Layout::new();
        for labels in [[3, NO_LABEL], [1, NO_LABEL]] {
            layout.push(DocSource::default(), labels.map(|label| (Row::Token(7), label)));
        }
        let before = [0, 1].map(|index| Row::Virtual { slot: 0, index });
        let first = begun(&layout, &before, Some(Labelled::First));
        assert_eq!(first.labels(), [3, NO_LABEL, NO_LABEL, NO_LABEL, 1, NO_LABEL, NO_LABEL, NO_LABEL]);
        assert_eq!(begun(&layout, &before, Some(Labelled::Words)), layout.begun_with(&before));
        assert_eq!(begun(&layout, &[], Some(Labelled::First)), layout);
    }

    #[test]
    fn regrouping_into_accumulated_batches_gives_the_same_micro_batches() {
        let domains = [domain("a", &[3, 9, 12, 5]), domain("b", &[2, 7, 7])];
        let whole = Packing { batch_tokens: 120, logical_shards: 6, ..packing() };
        let halves = Packing { batch_tokens: 60, logical_shards: 3, accumulation: 2, ..packing() };
        let mut a = loader(&domains, whole, Length::Steps(1));
        let mut b = loader(&domains, halves, Length::Steps(1));
        for step in 0..5 {
            let (a, b) = (a.batch(Step(step)).unwrap(), b.batch(Step(step)).unwrap());
            assert_eq!((a.parts, a.counts), (b.parts, b.counts));
        }
    }

    #[test]
    fn epochs_show_every_document_that_often_and_the_last_step_may_be_short() {
        let domains = [domain("a", &[3, 9, 12, 5, 6])];
        let mut counted = loader(&domains, packing(), Length::Epochs(2.0));
        let steps = counted.steps(Length::Epochs(2.0)).unwrap().0;
        let mut found = documents(&mut counted, 0, steps);
        assert!(documents(&mut counted, steps, 1).is_empty());
        found.sort_unstable();
        let expected: Vec<(u16, u64)> = (0..5).flat_map(|i| [(0, i), (0, i)]).collect();
        assert_eq!(found, expected);
        let mut by_tokens = loader(&domains, packing(), Length::Tokens(100));
        let steps = by_tokens.steps(Length::Tokens(100)).unwrap().0;
        documents(&mut by_tokens, 0, steps);
        let tokens: u64 = by_tokens.counters().tokens.iter().sum();
        assert!((100..160).contains(&tokens), "{tokens}");
    }

    #[test]
    fn validation_sets_are_packed_in_file_order() {
        let data = domain("a", &[3, 9, 12, 5, 6]).data;
        let layouts = in_order(&data, 20, &[]);
        let examples: Vec<Vec<u64>> =
            layouts.iter().map(|layout| layout.docs().iter().map(|doc| doc.example).collect()).collect();
        assert_eq!(examples, [vec![0, 1], vec![2, 3], vec![4]]);
    }

    #[test]
    fn rows_before_documents_take_room_and_are_no_tokens_of_theirs() {
        let before: Arc<[Row]> = [0, 1, 2].map(|index| Row::Virtual { slot: 0, index }).into();
        let data = domain("a", &[3, 9, 12, 5, 6]).data;
        let layouts = in_order(&data, 20, &before);
        let lengths: Vec<Vec<usize>> =
            layouts.iter().map(|layout| layout.docs().iter().map(attune_points::Doc::n_rows).collect()).collect();
        assert_eq!(lengths, [vec![6, 12], vec![15], vec![8, 9]]);
        let with = Packing { before: Arc::clone(&before), ..packing() };
        let layout = largest(&with, &[View::Main]);
        let lengths: Vec<usize> = layout.docs().iter().map(attune_points::Doc::n_rows).collect();
        assert_eq!((lengths, layout.counts().tokens), (vec![15, 5], 12));
        let mut loader = loader(&[domain("a", &[3, 9, 12, 5, 6])], with.clone(), Length::Steps(4));
        for (_, layout) in loader.batch(Step(0)).unwrap().parts {
            assert!(layout.n_rows() <= with.shard_tokens());
            for doc in layout.docs() {
                let rows = &layout.rows()[doc.rows.start as usize..doc.rows.end as usize];
                assert_eq!(rows[..3], before[..]);
                assert!(rows[3..].iter().all(|row| matches!(row, Row::Token(_))));
            }
        }
    }

    #[test]
    fn the_largest_micro_batch_is_full_of_longest_documents() {
        let layout = largest(&packing(), &[View::Main]);
        let lengths: Vec<usize> = layout.docs().iter().map(attune_points::Doc::n_rows).collect();
        assert_eq!(lengths, [12, 8]);
        assert_eq!(layout.counts().tokens, 18);
    }

    proptest! {
        #[test]
        fn nothing_is_split_or_passed_over_and_any_cut_resumes(
            a in proptest::collection::vec(2usize..12, 1..12),
            b in proptest::collection::vec(2usize..12, 1..12),
            cut in 0u64..6,
        ) {
            let domains = [domain("a", &a), domain("b", &b)];
            let mut whole = loader(&domains, packing(), Length::Steps(6));
            let all = documents(&mut whole, 0, 6);
            let mut first = loader(&domains, packing(), Length::Steps(6));
            let before = documents(&mut first, 0, cut);
            let state = serde_json::to_string(&first.state()).unwrap();
            let mut second = loader(&domains, packing(), Length::Steps(6));
            second.restore(serde_json::from_str(&state).unwrap()).unwrap();
            let after = documents(&mut second, cut, 6 - cut);
            prop_assert_eq!(&[before, after].concat(), &all);
            // Every document of a domain comes once before any comes twice.
            for (index, lengths) in [a, b].iter().enumerate() {
                let seen: Vec<u64> = all.iter().filter(|(d, _)| usize::from(*d) == index).map(|(_, e)| *e).collect();
                for epoch in seen.chunks_exact(lengths.len()) {
                    let mut epoch = epoch.to_vec();
                    epoch.sort_unstable();
                    prop_assert_eq!(epoch, (0..lengths.len() as u64).collect::<Vec<_>>());
                }
            }
            let mut sizes = loader(&domains, packing(), Length::Steps(6));
            for (_, layout) in sizes.batch(Step(0)).unwrap().parts {
                prop_assert!(layout.n_rows() <= packing().shard_tokens());
            }
        }
    }
}
