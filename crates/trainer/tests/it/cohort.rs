//! Lanes: several runs over one base in one process, each with the bytes of the run alone.

use std::collections::BTreeMap;
use std::sync::Mutex;

use attune_spec::job::Plan;
use attune_trainer::control::Control;
use attune_trainer::protocol::{Event, Request};
use attune_trainer::{Error, cohort, run::End};

use crate::support::{Outside, Small, files};

/// What each lane differs in: rank, targets, data, length, batch, seed, optimiser, dropout.
const LANES: [&[(&str, &str)]; 3] = [
    &[
        ("tune.adapter.rank", "2"),
        ("tune.adapter.targets", "[q_proj, v_proj]"),
        ("tune.steps", "6"),
        ("tune.seed", "1"),
    ],
    &[
        ("tune.adapter", "{method: lora, rank: 5, alpha: 3}"),
        ("data.domains", "[{name: sums, source: ./sums.jsonl}]"),
        ("data.max_length", "24"),
        ("tune.batch_tokens", "96"),
        ("tune.optimizer", "{method: adamw, lr: 0.02, weight_decay: 0.1}"),
        ("tune.schedule", "{method: constant}"),
        ("tune.accumulation", "2"),
        ("tune.seed", "2"),
    ],
    &[
        ("tune.adapter", "{method: lora, rank: 3, alpha: 8, dropout: 0.3, targets: [down_proj, k_proj]}"),
        ("tune.logical_shards", "2"),
        ("tune.evaluate.every_steps", "3"),
        ("tune.max_grad_norm", "0.01"),
        ("tune.steps", "8"),
        ("tune.seed", "3"),
    ],
];

fn plan(small: &Small, changes: &[(&str, &str)]) -> Plan {
    small.plan(&[&[("tune.from_scratch", "false")], changes].concat())
}

type Files = BTreeMap<String, Vec<u8>>;

/// Runs plans side by side; how each ended, and what it left if it finished.
fn together(small: &Small, plans: Vec<Plan>, outsides: &[Outside]) -> Vec<(Result<End, Error>, Option<Files>)> {
    let (requests, _works): (Vec<Request>, Vec<_>) = plans.into_iter().map(|plan| small.request(plan, 1, None)).unzip();
    let lanes: Vec<(&Request, &dyn Control)> =
        requests.iter().zip(outsides).map(|(request, outside)| (request, outside as &dyn Control)).collect();
    let ends: Mutex<BTreeMap<usize, Result<End, Error>>> = Mutex::default();
    cohort::run(&lanes, &|lane, end| assert!(ends.lock().unwrap().insert(lane, end).is_none()));
    let ends = ends.into_inner().unwrap();
    assert_eq!(ends.len(), lanes.len(), "each lane ends once");
    let left = |(end, outside): (Result<End, Error>, &Outside)| {
        let is_done = matches!(end, Ok(End::Finished(_)));
        let files = is_done.then(|| files(&outside.events.lock().unwrap()));
        (end, files)
    };
    ends.into_values().zip(outsides).map(left).collect()
}

fn outsides(n: usize) -> Vec<Outside> {
    (0..n).map(|_| Outside::default()).collect()
}

fn alone(small: &Small) -> Vec<Files> {
    LANES.iter().map(|changes| small.finish(plan(small, changes), 1).1).collect()
}

const PAIRS: &str = "[{name: pairs, source: ./pairs.jsonl}]";

/// Lanes whose components take part in other ways than LoRA's, whose objective sees pairs and whole steps, and whose steps have
/// passes of their own.
const PORTS: [&[(&str, &str)]; 20] = [
    &[("tune.adapter", "{method: dora, rank: 2, targets: all-linear}")],
    &[("tune.adapter", "{method: prefix-tuning, length: 3}")],
    &[("tune.adapter", "{method: connected-adapter, width: 4, side: 3}")],
    &[("tune.adapter", "{method: adaption-prompt, length: 3}")],
    &[("tune.adapter", "{method: p-tuning, length: 3, hidden: 4}"), ("tune.batch_tokens", "256")],
    &[
        ("tune.adapter", "{method: bbtv2, length: 3, dimensions: 6, population: 6}"),
        ("tune.optimizer", "{method: adamw}"),
        ("tune.batch_tokens", "256"),
    ],
    &[
        ("tune.adapter", "{method: prompt-tuning, length: 3}"),
        ("tune.objective", "{method: dpo}"),
        ("data.domains", PAIRS),
        ("data.validation", PAIRS),
        ("tune.batch_tokens", "320"),
    ],
    &[("tune.adapter", "{method: compacter, reduction: 4, factors: 2}"), ("tune.logical_shards", "2")],
    &[("tune.adapter", "{method: loramoe, rank: 2, experts: 2, targets: all-linear}")],
    &[
        ("tune.adapter", "{method: loramoe, rank: 2, experts: 2, targets: all-linear}"),
        ("tune.objective", "{method: dpo, loss: aot}"),
        ("data.domains", PAIRS),
        ("data.validation", PAIRS),
        ("tune.batch_tokens", "256"),
    ],
    &[("tune.adapter", "{method: ia3}")],
    &[("tune.adapter", "{method: ln-tuning}")],
    &[("tune.adapter", "{method: vera, rank: 8, dropout: 0.1}")],
    &[("tune.adapter", "{method: lora, rank: 4, dropout: 0.1, init: {method: pissa}}")],
    &[("tune.adapter", "{method: lora, rank: 4, dropout: 0.1, init: {method: eva, examples: 9}}")],
    &[("tune.adapter", "{method: lora, rank: 4, init: {method: lora-ga}}"), ("tune.logical_shards", "2")],
    &[("tune.adapter", "{method: spiel, density: 0.05, every: 4, watch: 2}")],
    &[("tune.adapter", "{method: adalora, rank: 4, target_rank: 2, every: 2}")],
    &[
        ("tune.objective", "{method: grpo, generations: 3, max_tokens: 6, beta: 0.1}"),
        ("tune.rewards", "[{method: regex-match, pattern: '^[ -~]'}, {method: overlong, margin: 4, weight: 0.3}]"),
        ("tune.step", "{method: reuse, times: 2}"),
        ("data.domains", "[{name: greetings, source: ./greetings.jsonl}]"),
        ("data.validation", "[{name: greetings, source: ./greetings.jsonl, rows: 3}]"),
    ],
    &[("tune.step", "{method: smart, radius: 0.02, noise: 0.01, ascent: 0.02}")],
];

#[test]
fn lanes_of_every_port_leave_the_bytes_of_the_runs_alone() {
    let small = Small::with_weights();
    let ends = together(&small, PORTS.map(|changes| plan(&small, changes)).to_vec(), &outsides(PORTS.len()));
    for ((end, files), changes) in ends.into_iter().zip(PORTS) {
        end.expect("the lane ends");
        let (_, alone) = small.finish(plan(&small, changes), 1);
        let files = files.expect("the lane leaves files");
        for (name, bytes) in &alone {
            assert!(files.get(name) == Some(bytes), "{name} of {changes:?} is another beside the others");
        }
    }
}

/// Lanes over one base in few bits, and one whose start quantises it anew for itself alone.
#[test]
fn lanes_of_few_bits_leave_the_bytes_of_the_runs_alone() {
    let small = Small::with_weights();
    let few = ("tune.quantization", "{method: nf4, double_quant: true}");
    let own = "{method: lora, rank: 2, init: {method: loftq, iterations: 2}}";
    let lanes: [&[(&str, &str)]; 3] =
        [&[few], &[few, ("tune.adapter", "{method: dora, rank: 2}")], &[few, ("tune.adapter", own)]];
    let ends = together(&small, lanes.map(|changes| plan(&small, changes)).to_vec(), &outsides(3));
    for ((end, files), changes) in ends.into_iter().zip(lanes) {
        end.expect("the lane ends");
        let (_, alone) = small.finish(plan(&small, changes), 1);
        assert!(files.as_ref() == Some(&alone), "{changes:?}");
    }
}

#[test]
fn lanes_leave_the_bytes_of_the_runs_alone() {
    let small = Small::with_weights();
    let alone = alone(&small);
    for order in [[0, 1, 2], [2, 0, 1]] {
        let plans = order.iter().map(|lane| plan(&small, LANES[*lane])).collect();
        let outsides = outsides(3);
        let ends = together(&small, plans, &outsides);
        for (lane, (end, files)) in order.iter().zip(ends) {
            assert!(files.as_ref() == Some(&alone[*lane]), "lane {lane} beside others: {end:?}");
        }
        // Each has its own events: as many steps as it has.
        let steps = |outside: &Outside| {
            let events = outside.events.lock().unwrap();
            events.iter().filter(|event| matches!(event, Event::Progress { .. })).count()
        };
        assert_eq!(outsides.iter().map(steps).collect::<Vec<_>>(), order.map(|lane| [6, 10, 8][lane]));
    }
}

#[test]
fn a_lane_that_fails_stops_or_leaves_changes_nothing_for_the_others() {
    let small = Small::with_weights();
    std::fs::write(small.path("bad.jsonl"), "{\"text\": \"a\"}\n{\"text\": 1}\n").unwrap();
    let alone = alone(&small);
    let explodes = [
        ("tune.optimizer", "{method: adamw, lr: 10, weight_decay: 1}"),
        ("tune.adapter.targets", "down_proj"),
        ("tune.steps", "50"),
    ];
    let mut plans: Vec<Plan> = LANES.iter().map(|changes| plan(&small, changes)).collect();
    plans.push(plan(&small, &explodes));
    plans.push(plan(&small, &[("data.domains[1].source", "./bad.jsonl")]));
    plans.push(plan(&small, &[("tune.seed", "9")]));
    plans.push(plan(&small, &[("tune.steps", "30")]));
    let mut outsides = outsides(5);
    outsides.extend([Outside::stopping_after(4), Outside::leaving_after(5)]);
    let mut ends = together(&small, plans, &outsides).into_iter();
    for (lane, alone) in alone.iter().enumerate() {
        let (end, files) = ends.next().unwrap();
        assert!(files.as_ref() == Some(alone), "lane {lane} beside others: {end:?}");
    }
    let mut end = || ends.next().map(|(end, _)| end.map_err(|error| error.to_string())).unwrap();
    let message = end().unwrap_err();
    assert!(message.contains("is not finite at step"), "{message}");
    let message = end().unwrap_err();
    assert!(message.contains("bad.jsonl:2: "), "{message}");
    assert!(matches!(end(), Ok(End::Stopped(step)) if step.0 == 4));
    assert!(matches!(end(), Ok(End::Stopped(step)) if step.0 == 5));
    let saved = |outside: &Outside| {
        let events = outside.events.lock().unwrap();
        events.iter().any(|event| matches!(event, Event::Checkpoint { .. }))
    };
    assert_eq!((saved(&outsides[5]), saved(&outsides[6])), (true, false), "who leaves writes nothing");
}

#[test]
fn a_lane_that_panics_is_alone_with_it() {
    struct Clumsy(Outside);
    impl Control for Clumsy {
        fn stop_requested(&self) -> bool {
            panic!("dropped the baton")
        }
        fn take_checkpoint_request(&self) -> bool {
            false
        }
        fn emit(&self, event: Event) {
            self.0.emit(event);
        }
    }
    let small = Small::with_weights();
    let (_, whole) = small.finish(plan(&small, LANES[0]), 1);
    let (first, _work) = small.request(plan(&small, LANES[0]), 1, None);
    let (second, _work2) = small.request(plan(&small, LANES[1]), 1, None);
    let (outside, clumsy) = (Outside::default(), Clumsy(Outside::default()));
    let ends: Mutex<BTreeMap<usize, String>> = Mutex::default();
    cohort::run(&[(&first, &outside), (&second, &clumsy)], &|lane, end| {
        let text = end.map_or_else(|error| error.to_string(), |_| "done".to_owned());
        ends.lock().unwrap().insert(lane, text);
    });
    let ends = ends.into_inner().unwrap();
    assert_eq!(ends[&0], "done");
    assert!(ends[&1].contains("dropped the baton"), "{ends:?}");
    assert!(files(&outside.events.into_inner().unwrap()) == whole);
}

#[test]
fn a_run_of_several_ranks_is_no_lane() {
    let small = Small::with_weights();
    let (request, _work) = small.request(plan(&small, &[]), 2, None);
    cohort::run(&[(&request, &Outside::default())], &|_, end| {
        let message = end.unwrap_err().to_string();
        assert!(message.contains("makes 2 ranks; a job that shares its base has one"), "{message}");
    });
}
