//! Answers that the model gives to the prompts of a batch by itself, and what they are worth.
//!
//! A row's prompt is what comes before the last run of its tokens that are to be learned; that run is the answer which the data
//! expects. In a batch of answers each row has made room for a group of documents: the prompt with each of the answers, which
//! alone are supervised, the token that ended one included.
//!
//! What is sampled depends on the seed, the step, the micro-batch and the place in it, and on the parameters: not on ranks, nor on
//! what is generated beside it.

use std::collections::BTreeMap;
use std::ops::AddAssign;
use std::sync::Arc;

use attune_data::Tokenizer;
use attune_models::generate::{Request, generate_all};
use attune_models::pass::Stopwatch;
use attune_points::engine::{Batch, Engine};
use attune_points::generate::{Finish, Generated, Sampling};
use attune_points::layout::{Axis, Column, LabelCounts, NO_LABEL, REWARD, Source as Origin, Values};
use attune_points::objective::Answers;
use attune_points::reward::{Answer, Reward};
use attune_points::{Doc, Error, Layout, Result, Row, Theta, View};
use serde::{Deserialize, Serialize};

use crate::engine::{Message, RankEngine};
use crate::together::Company;

/// Rows that texts which are made at once may come to: what a model keeps of them has to fit memory.
const ROWS_AT_ONCE: usize = 16_384;

/// A rule that judges answers.
pub(crate) struct Rule {
    /// Its method's name.
    pub(crate) name: String,
    /// Its share in the reward.
    pub(crate) weight: f64,
    pub(crate) reward: Box<dyn Reward>,
}

/// What makes texts of tokens and says how good they are.
pub(crate) struct Judge {
    pub(crate) tokenizer: Tokenizer,
    /// Tokens that end an answer.
    pub(crate) stop: Vec<u32>,
    pub(crate) rules: Vec<Rule>,
}

/// Sums over answers.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Judged {
    pub(crate) counts: LabelCounts,
    pub(crate) rows: u64,
    answers: u64,
    tokens: u64,
    finished: u64,
    groups: u64,
    /// Groups whose rewards are all the same: they teach nothing.
    alike: u64,
    /// The rewards of those that could be judged, and their number.
    reward: (f64, u64),
    /// The same, rule by rule, unweighted.
    by_rule: Vec<(f64, u64)>,
}

impl AddAssign<&Self> for Judged {
    fn add_assign(&mut self, other: &Self) {
        self.counts = self.counts + other.counts;
        self.rows += other.rows;
        self.answers += other.answers;
        self.tokens += other.tokens;
        self.finished += other.finished;
        self.groups += other.groups;
        self.alike += other.alike;
        self.reward = (self.reward.0 + other.reward.0, self.reward.1 + other.reward.1);
        self.by_rule.resize(self.by_rule.len().max(other.by_rule.len()), (0.0, 0));
        for (sum, (reward, n)) in self.by_rule.iter_mut().zip(&other.by_rule) {
            *sum = (sum.0 + reward, sum.1 + n);
        }
    }
}

impl Judged {
    /// The mean reward, if any answer could be judged.
    pub(crate) fn reward(&self) -> Option<f64> {
        (self.reward.1 > 0).then(|| self.reward.0 / self.reward.1 as f64)
    }

    /// Means by their names in metrics.
    pub(crate) fn metrics(&self, rules: &[Rule]) -> Vec<(String, f64)> {
        if self.answers == 0 {
            return Vec::new();
        }
        let share = |n: u64, of: u64| n as f64 / of.max(1) as f64;
        let mut metrics = vec![
            ("answers/tokens".to_owned(), share(self.tokens, self.answers)),
            ("answers/finished".to_owned(), share(self.finished, self.answers)),
            ("answers/alike".to_owned(), share(self.alike, self.groups)),
        ];
        metrics.extend(self.reward().map(|reward| ("answers/reward".to_owned(), reward)));
        let mut seen = BTreeMap::new();
        for (Rule { name, .. }, (sum, n)) in rules.iter().zip(&self.by_rule).filter(|(_, (_, n))| *n > 0) {
            // The same method may judge twice, with other parameters.
            let nth: &mut u32 = seen.entry(name).or_default();
            *nth += 1;
            let name = if *nth == 1 { name.clone() } else { format!("{name}-{nth}") };
            metrics.push((format!("answers/reward/{name}"), sum / *n as f64));
        }
        metrics
    }
}

impl Judge {
    /// The weighted rewards of an answer, added to the sums; not a number if no rule can say.
    fn judge(&self, answer: &Answer<'_>, sums: &mut Judged) -> f64 {
        sums.by_rule.resize(self.rules.len(), (0.0, 0));
        let (mut total, mut judged) = (0.0, false);
        for (rule, sum) in self.rules.iter().zip(&mut sums.by_rule) {
            if let Some(reward) = rule.reward.of(answer) {
                *sum = (sum.0 + reward, sum.1 + 1);
                total += rule.weight * reward;
                judged = true;
            }
        }
        if !judged {
            return f64::NAN;
        }
        sums.reward = (sums.reward.0 + total, sums.reward.1 + 1);
        total
    }

    fn text(&self, tokens: &[u32]) -> Result<String> {
        self.tokenizer.decode(tokens, false).map_err(|error| Error::Refused(error.to_string()))
    }
}

/// A prompt of a batch.
struct Asked<'l> {
    doc: &'l Doc,
    prompt: Vec<u32>,
    /// The answer that its data expects.
    expected: Vec<u32>,
}

impl<'l> Asked<'l> {
    fn of(layout: &'l Layout, doc: &'l Doc) -> Result<Self> {
        let rows = doc.rows.start as usize..doc.rows.end as usize;
        // The model puts the rows before a prompt there by itself.
        let before = layout.rows()[rows.clone()].iter().take_while(|row| matches!(row, Row::Virtual { .. })).count();
        let rows = rows.start + before..rows.end;
        let labels = &layout.labels()[rows.clone()];
        let token = |row: &Row| match row {
            Row::Token(id) => Ok(*id),
            _ => Err(Error::Refused("prompts are of tokens; this batch has rows of another kind".to_owned())),
        };
        let tokens = layout.rows()[rows].iter().map(token).collect::<Result<Vec<u32>>>()?;
        let Some(last) = labels.iter().rposition(|label| *label != NO_LABEL) else {
            return Err(Error::Refused("a row of this batch has no answer to be learned".to_owned()));
        };
        // Row `t` is asked for token `t + 1`, so the first that is asked is the last of the prompt.
        let first = labels[..last].iter().rposition(|label| *label == NO_LABEL).map_or(0, |row| row + 1);
        Ok(Self { doc, prompt: tokens[..=first].to_vec(), expected: tokens[first + 1..=last + 1].to_vec() })
    }
}

/// Appends an answer as a document: the prompt, what followed, and the token that ended it.
fn push(layout: &mut Layout, of: &Asked<'_>, sample: u16, made: &Generated, is_learned: bool) {
    let end = match made.finish {
        Finish::Stop(token) => Some(token),
        _ => None,
    };
    let tokens: Vec<u32> = of.prompt.iter().chain(&made.tokens).copied().chain(end).collect();
    let label = |row: usize| match tokens.get(row + 1) {
        Some(next) if is_learned && row + 1 >= of.prompt.len() => *next,
        _ => NO_LABEL,
    };
    let rows: Vec<(Row, u32)> = tokens.iter().enumerate().map(|(row, id)| (Row::Token(*id), label(row))).collect();
    let Doc { example, domain, lane, group, .. } = *of.doc;
    layout.push(Origin { example, view: View::Sample(sample), lane, domain, group: Some(group) }, rows);
}

/// Cuts a part's prompts, each after `before` rows, into runs whose texts come to no more than `rows`, or of one prompt.
fn runs<'a, 'l>(
    prompts: &'a [Asked<'l>],
    how: &Answers,
    before: usize,
    rows: usize,
) -> impl Iterator<Item = &'a [Asked<'l>]> {
    let mut rest = prompts;
    std::iter::from_fn(move || {
        let mut sum = 0;
        let fits = |of: &&Asked<'_>| {
            sum += usize::from(how.each) * (before + of.prompt.len() + how.max_tokens as usize);
            sum <= rows
        };
        let n = rest.iter().take_while(fits).count().max(1).min(rest.len());
        let (run, others) = rest.split_at(n);
        rest = others;
        (!run.is_empty()).then_some(run)
    })
}

/// A batch whose documents are all worth nothing: what a rehearsal has in the place of answers.
pub(crate) fn unjudged(mut layout: Layout) -> Result<Layout> {
    let values = Values::F64(vec![0.0; layout.docs().len()]);
    layout.set_column(REWARD, Column { axis: Axis::Doc, values })?;
    Ok(layout)
}

impl RankEngine<'_> {
    fn judge(&self) -> Result<&Judge> {
        let none = || Error::Refused("the objective needs answers, and nothing judges them".to_owned());
        self.shared.judge.as_ref().ok_or_else(none)
    }

    /// A batch with the model's answers at `at` in place of its rows, and what all ranks' are worth. The parts of the batch are
    /// those of this rank.
    pub(crate) fn answered(&mut self, at: &Theta, batch: &Batch, how: &Answers) -> Result<(Batch, Judged)> {
        // Nobody waits for a lane while it speaks.
        self.company.inspect(Company::leave);
        let watch = Stopwatch::start();
        let made = batch.parts.iter().map(|(part, layout)| self.answers_to(at, *part, layout, how)).collect();
        self.spent.answers += watch.elapsed();
        self.company.inspect(Company::enter);
        let made: Result<Vec<(u32, Layout, Judged)>> = made;
        let (mut parts, mut messages) = (Vec::new(), Vec::new());
        for (part, layout, judged) in made? {
            parts.push((part, Arc::new(layout)));
            messages.push((part, Message::Judged(judged)));
        }
        let mut all = Judged::default();
        for (_, message) in self.exchange(messages)? {
            let Message::Judged(judged) = message else {
                return Err(Error::Refused("a rank sent something else where rewards were due".to_owned()));
            };
            all += &judged;
        }
        Ok((Batch { parts, counts: all.counts, n_rows: all.rows }, all))
    }

    /// The answers to one micro-batch.
    fn answers_to(&self, at: &Theta, part: u32, on: &Layout, how: &Answers) -> Result<(u32, Layout, Judged)> {
        let judge = self.judge()?;
        let prompts = on.docs().iter().map(|doc| Asked::of(on, doc)).collect::<Result<Vec<_>>>()?;
        let stream = self.rng("answers").sub(u64::from(part));
        let (mut layout, mut sums, mut rewards) = (Layout::new(), Judged::default(), Vec::new());
        let (mut first, before) = (0, self.shared.model.rows_before(at));
        for run in runs(&prompts, how, before.len(), ROWS_AT_ONCE) {
            let sampling = |place: usize, sample: u16| Sampling {
                temperature: how.temperature,
                top_p: how.top_p,
                seed: stream.sub(place as u64).sub(u64::from(sample)).next_u64(),
                max_tokens: how.max_tokens as usize,
                stop: judge.stop.clone(),
            };
            let places =
                (first..).zip(run).flat_map(|(place, of)| (0..how.each).map(move |sample| (place, of, sample)));
            let asked: Vec<_> = places.map(|(place, of, sample)| (of, sample, sampling(place, sample))).collect();
            first += run.len();
            let requests = asked.iter().map(|(of, _, sampling)| Request { prompt: &of.prompt, sampling });
            let made = generate_all(&self.shared.model, at, &requests.collect::<Vec<_>>(), |_, _| true)?;
            for ((of, sample, _), made) in asked.iter().zip(&made) {
                let finished = matches!(made.finish, Finish::Stop(_));
                let (text, expected) = (judge.text(&made.tokens)?, judge.text(&of.expected)?);
                let tokens = made.tokens.len() + usize::from(finished);
                let max_tokens = how.max_tokens as usize;
                let answer = Answer { text: &text, expected: &expected, tokens, max_tokens, finished };
                rewards.push(judge.judge(&answer, &mut sums));
                push(&mut layout, of, *sample, made, finished || !how.finished_only);
                sums.answers += 1;
                sums.tokens += tokens as u64;
                sums.finished += u64::from(finished);
            }
        }
        for group in rewards.chunks(usize::from(how.each).max(1)) {
            sums.groups += 1;
            sums.alike += u64::from(group.iter().all(|reward| *reward == group[0]));
        }
        layout = layout.begun_with(&before);
        if !rewards.is_empty() {
            layout.set_column(REWARD, Column { axis: Axis::Doc, values: Values::F64(rewards) })?;
        }
        (sums.counts, sums.rows) = (layout.counts(), layout.n_rows() as u64);
        Ok((part, layout, sums))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOW: Answers = Answers { each: 2, max_tokens: 3, temperature: 1.0, top_p: 1.0, finished_only: false };

    fn layout(docs: &[&[(u32, bool)]]) -> Layout {
        let mut layout = Layout::new();
        for doc in docs {
            let next = doc.iter().skip(1).map(|(id, learned)| if *learned { *id } else { NO_LABEL });
            let rows = doc.iter().map(|(id, _)| Row::Token(*id)).zip(next.chain([NO_LABEL]));
            layout.push(Origin::default(), rows);
        }
        layout
    }

    #[test]
    fn a_prompt_is_what_comes_before_the_last_answer() {
        let two_turns = [(1, false), (2, true), (3, false), (4, false), (5, true), (6, true)];
        let text = [(7, true), (8, true), (9, true)];
        let cut = [(1, false), (2, true), (3, false)];
        let layout = layout(&[&two_turns, &text, &cut]).begun_with(&[Row::Virtual { slot: 0, index: 0 }; 3]);
        let found: Vec<_> = layout.docs().iter().map(|doc| Asked::of(&layout, doc).unwrap()).collect();
        let found: Vec<_> = found.iter().map(|of| (of.prompt.as_slice(), of.expected.as_slice())).collect();
        assert_eq!(found, [(&[1, 2, 3, 4][..], &[5, 6][..]), (&[7], &[8, 9]), (&[1], &[2])]);
    }

    #[test]
    fn an_answer_is_supervised_with_the_token_that_ended_it_and_nothing_else_is() {
        let layout = layout(&[&[(1, false), (2, false), (3, true)]]);
        let of = Asked::of(&layout, &layout.docs()[0]).unwrap();
        let mut made = Layout::new();
        push(&mut made, &of, 0, &Generated { tokens: vec![8, 9], finish: Finish::Stop(0) }, true);
        push(&mut made, &of, 1, &Generated { tokens: vec![7], finish: Finish::Length }, true);
        push(&mut made, &of, 2, &Generated { tokens: vec![7], finish: Finish::Length }, false);
        let rows: Vec<u32> = made.supervised().iter().map(|row| row.row).collect();
        let labels: Vec<u32> = made.supervised().iter().map(|row| row.label).collect();
        assert_eq!((rows, labels), (vec![1, 2, 3, 6], vec![8, 9, 0, 7]));
        let views: Vec<View> = made.docs().iter().map(|doc| doc.view).collect();
        assert_eq!(views, [0, 1, 2].map(View::Sample));
        assert!(made.docs().iter().all(|doc| doc.group == made.docs()[0].group));
    }

    #[test]
    fn texts_are_made_in_runs_that_fit() {
        let layout = layout(&[&[(1, false), (2, true)][..]; 5]);
        let prompts: Vec<_> = layout.docs().iter().map(|doc| Asked::of(&layout, doc).unwrap()).collect();
        // Two answers of three tokens, each after a prompt of one, are eight rows.
        let of = |rows| runs(&prompts, &HOW, 0, rows).map(<[_]>::len).collect::<Vec<_>>();
        assert_eq!((of(1), of(16), of(39), of(40)), (vec![1; 5], vec![2, 2, 1], vec![4, 1], vec![5]));
        // Two rows before each text are four more.
        let begun = |rows| runs(&prompts, &HOW, 2, rows).map(<[_]>::len).collect::<Vec<_>>();
        assert_eq!((begun(24), begun(59), begun(60)), (vec![2, 2, 1], vec![4, 1], vec![5]));
    }

    #[test]
    fn what_cannot_be_judged_has_no_part_in_means() {
        struct Even;
        impl Reward for Even {
            fn of(&self, answer: &Answer<'_>) -> Option<f64> {
                answer.text.parse::<u32>().ok().map(|number| f64::from(1 - number % 2))
            }
        }
        struct Short;
        impl Reward for Short {
            fn of(&self, answer: &Answer<'_>) -> Option<f64> {
                (!answer.finished).then_some(-1.0)
            }
        }
        let small = crate::support::Small::new();
        let rule = |name: &str, weight, reward| Rule { name: name.to_owned(), weight, reward };
        let judge = Judge {
            tokenizer: Tokenizer::open(&small.path("base")).unwrap(),
            stop: Vec::new(),
            rules: vec![rule("even", 2.0, Box::new(Even)), rule("even", 0.5, Box::new(Short))],
        };
        let mut sums = Judged { answers: 3, groups: 1, ..Judged::default() };
        let mut of =
            |text, finished| judge.judge(&Answer { text, expected: "", tokens: 1, max_tokens: 1, finished }, &mut sums);
        assert_eq!((of("4", true), of("3", false)), (2.0, -0.5));
        assert!(of("word", true).is_nan());
        assert_eq!(sums.reward(), Some(0.75));
        let metrics: BTreeMap<_, _> = sums.metrics(&judge.rules).into_iter().collect();
        assert_eq!((metrics["answers/reward/even"], metrics["answers/reward/even-2"]), (0.5, -1.0));
    }
}
