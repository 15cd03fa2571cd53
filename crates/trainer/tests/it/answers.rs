//! Jobs that learn from answers which the model gives by itself.

use attune_models::generate::generate;
use attune_models::{Base, Model, Stack};
use attune_points::Theta;
use attune_points::generate::Sampling;
use attune_spec::job::Precision;
use attune_trainer::protocol::Event;
use attune_trainer::run::run;

use crate::support::{Outside, Small, metric};

/// Answers of one letter, of which a tenth are small at first.
const LETTERS: &[(&str, &str)] = &[
    ("tune.objective", "{method: grpo, generations: 8, max_tokens: 1}"),
    ("tune.rewards", "[{method: regex-match, pattern: '^[a-z]'}]"),
    ("tune.from_scratch", "false"),
    ("tune.batch_tokens", "512"),
    ("tune.steps", "40"),
    // Rows of this base are too short for an adapter alone to make anything likely.
    ("tune.adapter", "{method: full}"),
    ("tune.optimizer.lr", "0.02"),
    ("data.domains", "[{name: greetings, source: ./greetings.jsonl}]"),
    ("data.validation", "[{name: greetings, source: ./greetings.jsonl}]"),
];

/// The first token that the result of a run says after the prompt of the greetings.
fn first_said(small: &Small, changes: &[(&str, &str)]) -> (Vec<Event>, u8) {
    let (request, _work) = small.request(small.plan(changes), 1, None);
    let outside = Outside::default();
    run(&request, &outside).unwrap();
    let events = outside.events.into_inner().unwrap();
    let folder = events.iter().find_map(|event| match event {
        Event::Output { folder, .. } => Some(folder.clone()),
        _ => None,
    });
    let model = Model::new(Base::open(&folder.unwrap(), Precision::F32).unwrap(), Stack::default());
    let prompt: Vec<u32> = "Who?".bytes().map(u32::from).collect();
    let sampling = Sampling { max_tokens: 1, ..Sampling::default() };
    let said = generate(&model, &Theta::default(), &prompt, &sampling, |_| true).unwrap();
    let first = said.tokens.first().and_then(|token| u8::try_from(*token).ok());
    (events, first.unwrap_or_default())
}

/// What is rewarded becomes what the model says, though no row of the data shows it; who learns the rows says what they say.
#[test]
fn what_is_rewarded_becomes_likely_and_rows_alone_do_not_show_it() {
    let small = Small::with_weights();
    let (events, said) = first_said(&small, LETTERS);
    let rewards = metric(&events, "answers/reward");
    let (before, after) = (&rewards[..4], &rewards[36..]);
    assert!(before.iter().all(|reward| *reward < 0.4), "{before:?}");
    assert!(after.iter().all(|reward| *reward > 0.9), "{after:?}");
    assert_eq!(metric(&events, "eval/greetings/loss").last(), Some(&-1.0), "minus the reward of the likeliest answer");
    assert!(said.is_ascii_lowercase(), "{said}");
    for name in ["tokens", "finished", "alike", "reward/regex-match"] {
        assert_eq!(metric(&events, &format!("answers/{name}")).len(), 40, "{name}");
    }
    let plainly: Vec<_> = LETTERS[2..].to_vec();
    assert_eq!(first_said(&small, &plainly).1, b' ');
}

#[test]
fn answers_that_have_no_room_are_refused_with_what_would_do() {
    let small = Small::new();
    let refused = |changes: &[(&str, &str)]| {
        let plan = small.plan(&[LETTERS, &[("tune.from_scratch", "true")], changes].concat());
        let (request, _work) = small.request(plan, 1, None);
        run(&request, &Outside::default()).unwrap_err().to_string()
    };
    let long = refused(&[("tune.objective", "{method: grpo, max_tokens: 30, generations: 2}")]);
    assert!(
        long.contains(
            "`data.domains[0]` has 7 prompts of more than 2 tokens, after which answers of 30 are longer than"
        ),
        "{long}"
    );
    let many = refused(&[("tune.objective", "{method: grpo, max_tokens: 24, generations: 32}")]);
    assert!(many.contains("the longest prompt with 32 answers as long as they may be comes to 896"), "{many}");
    let texts = refused(&[("data.domains", "[{name: sums, source: ./sums.jsonl}]")]);
    assert!(texts.contains("`data.domains[0]` holds texts without prompts"), "{texts}");
    let rule = refused(&[("tune.rewards", "[{method: regex-match, pattern: '('}]")]);
    assert!(rule.contains("`tune.rewards[0].pattern` is \"(\", which is no regular expression"), "{rule}");
    let unjudged = refused(&[("tune.rewards", "[{method: numeric-answer}]")]);
    assert!(
        unjudged.contains("no answer to the validation set \"greetings\" can be judged by `tune.rewards`"),
        "{unjudged}"
    );
}

/// The second update on the same answers starts away from what made them, so ratios differ from 1 and far ones are cut; with one
/// update a batch there is nothing to cut.
#[test]
fn answers_that_are_used_again_are_held_to_what_made_them() {
    let small = Small::with_weights();
    let clipped = |times: &str| {
        let rule = format!("{{method: reuse, times: {times}}}");
        let objective = "{method: grpo, generations: 8, max_tokens: 1, epsilon: 0.02}";
        let changes =
            [LETTERS, &[("tune.step", rule.as_str()), ("tune.objective", objective), ("tune.steps", "12")]].concat();
        let (events, _) = first_said(&small, &changes);
        (metric(&events, "train/clipped"), metric(&events, "answers/reward"))
    };
    let (once, _) = clipped("1");
    assert!(once.iter().all(|clipped| *clipped == 0.0), "{once:?}");
    let (cut, rewards) = clipped("4");
    for batch in 0..3 {
        assert_eq!(cut[4 * batch], 0.0, "what is new was made by these very parameters: {cut:?}");
        assert!(cut[4 * batch + 3] > 0.1, "{cut:?}");
        assert!(rewards[4 * batch..4 * batch + 4].iter().all(|reward| *reward == rewards[4 * batch]), "{rewards:?}");
    }
}
