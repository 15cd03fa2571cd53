//! What every adapter can be used for: a short job for each adapter and setting, and what came of it.
//!
//! `docs/capabilities.md` is the table, `docs/evidence/capabilities.jsonl` has a line for each cell: the job's losses and the digest of what it
//! left. Some cells are tried again by every run of the tests, all of them where `ATTUNE_CAPABILITIES` is set; it also writes both files.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use attune_adapt::ADAPTERS;
use attune_trainer::audit::bootstrap::Bootstrap;
use attune_trainer::audit::drift::Drift;
use attune_trainer::audit::measure::Folder;
use attune_trainer::cohort;
use attune_trainer::control::Control;
use attune_trainer::protocol::{Event, Request};
use attune_trainer::run::{End, run};
use serde::{Deserialize, Serialize};

use crate::bits::KINDS;
use crate::every::{BLENDS, FURTHER, named};
use crate::outputs::unpack;
use crate::support::{Outside, Small, files, metric};

type Change<'c> = (&'c str, &'c str);
type Files = BTreeMap<String, Vec<u8>>;

/// What came of a job.
struct Ran {
    /// Losses of the validation set, from before the first step on.
    losses: Vec<f64>,
    files: Files,
}

/// One setting: its name in the table, what it is, and how it is tried.
struct Setting {
    name: &'static str,
    what: &'static str,
    tries: fn(&Small, &[Change<'_>]) -> Result<Ran, String>,
}

const SUMS: [Change<'static>; 2] =
    [("data.domains", "[{name: sums, source: ./sums.jsonl}]"), ("tune.from_scratch", "false")];

const SETTINGS: [Setting; 14] = [
    Setting { name: "one set", what: "texts of one kind", tries: |small, own| learns(small, own, &[]) },
    Setting {
        name: "mixture",
        what: "texts of two kinds in one job",
        tries: |small, own| {
            let two = "[{name: greetings, source: ./greetings.jsonl, weight: 2}, {name: sums, source: ./sums.jsonl}]";
            learns(small, own, &[("data.domains", two)])
        },
    },
    Setting {
        name: "few",
        what: "four texts",
        tries: |small, own| {
            let all = std::fs::read_to_string(small.path("sums.jsonl")).unwrap();
            let few: String = all.split_inclusive('\n').take(4).collect();
            std::fs::write(small.path("few.jsonl"), few).unwrap();
            learns(small, own, &[("data.domains", "[{name: few, source: ./few.jsonl}]")])
        },
    },
    Setting { name: "in turn", what: "a job that starts from the result of another, on other texts", tries: in_turn },
    Setting {
        name: "pairs",
        what: "preferences (`dpo`), beside the model without the adapter",
        tries: |small, own| {
            let pairs = "[{name: pairs, source: ./pairs.jsonl}]";
            let of_pairs = [
                ("tune.objective", "{method: dpo}"),
                ("data.domains", pairs),
                ("data.validation", pairs),
                ("tune.batch_tokens", "320"),
            ];
            learns(small, own, &of_pairs)
        },
    },
    Setting {
        name: "answers",
        what: "rewards of its own answers (`grpo`)",
        tries: |small, own| {
            let of_answers = [
                ("tune.objective", "{method: grpo, generations: 3, max_tokens: 6}"),
                ("tune.rewards", "[{method: regex-match, pattern: '^[ -~]'}]"),
                ("data.domains", "[{name: greetings, source: ./greetings.jsonl}]"),
                ("data.validation", "[{name: greetings, source: ./greetings.jsonl, rows: 3}]"),
                ("tune.batch_tokens", "256"),
                ("tune.steps", "4"),
            ];
            finish(small, own, &of_answers, 1)
        },
    },
    Setting {
        name: "classes",
        what: "a head over classes that trains beside it",
        tries: |small, own| {
            let rows: String = (0..8)
                .map(|i| format!("{{\"text\": \"{i} and {i}\", \"label\": \"{}\"}}\n", ["low", "high"][i / 4]))
                .collect();
            std::fs::write(small.path("classes.jsonl"), rows).unwrap();
            let rows = "[{name: sums, source: ./classes.jsonl}]";
            let of_classes = [
                ("tune.head", "{task: classification, labels: [low, high]}"),
                ("data.domains", rows),
                ("data.validation", rows),
            ];
            learns(small, own, &of_classes)
        },
    },
    Setting {
        name: "bf16",
        what: "a base in bf16",
        tries: |small, own| learns(small, own, &[("tune.precision", "bf16")]),
    },
    Setting {
        name: "4 bits",
        what: "a base in four bits (`nf4`)",
        tries: |small, own| learns(small, own, &[("tune.quantization", "{method: nf4}")]),
    },
    Setting { name: "experts", what: "a base whose blocks have experts", tries: on_experts },
    Setting { name: "beside LoRA", what: "a LoRA at the same sites that trains with it", tries: beside },
    Setting {
        name: "ranks",
        what: "two processes, with the bytes of one",
        tries: |small, own| {
            let (one, two) = (finish(small, own, &SUMS, 1)?, finish(small, own, &SUMS, 2)?);
            if one.files == two.files { Ok(one) } else { Err("other bytes".to_owned()) }
        },
    },
    Setting { name: "lanes", what: "beside another job on one base, with the bytes of it alone", tries: in_lanes },
    Setting { name: "merged", what: "a plain model folder that says the same", tries: merged },
];

/// Runs the small job with these changes.
fn finish(small: &Small, own: &[Change<'_>], more: &[Change<'_>], ranks: u32) -> Result<Ran, String> {
    let plan = small.try_plan(&[&[("tune.steps", "20"), SUMS[1]], own, more].concat())?;
    let (request, _work) = small.request(plan, ranks, None);
    let outside = Outside::default();
    run(&request, &outside).map_err(|error| error.to_string())?;
    Ok(ran(&outside.events.into_inner().unwrap()))
}

fn ran(events: &[Event]) -> Ran {
    let losses = ["sums", "pairs", "greetings"].map(|set| metric(events, &format!("eval/{set}/loss")));
    Ran { losses: losses.into_iter().find(|losses| !losses.is_empty()).unwrap_or_default(), files: files(events) }
}

/// The loss after the last step is below that before the first.
fn learns(small: &Small, own: &[Change<'_>], more: &[Change<'_>]) -> Result<Ran, String> {
    let data: &[Change<'_>] = if more.iter().any(|(field, _)| *field == "data.domains") { &[] } else { &SUMS[..1] };
    learned(finish(small, own, &[data, more].concat(), 1)?)
}

fn learned(ran: Ran) -> Result<Ran, String> {
    match (ran.losses.first(), ran.losses.last()) {
        (Some(before), Some(after)) if after < before => Ok(ran),
        _ => Err(format!("learns nothing: {:?}", ran.losses)),
    }
}

/// What a second job begins with is what the first ended with.
fn in_turn(small: &Small, own: &[Change<'_>]) -> Result<Ran, String> {
    let greetings = ("data.domains", "[{name: greetings, source: ./greetings.jsonl}]");
    let first = finish(small, own, &[greetings], 1)?;
    unpack(&first.files, "Result", &small.path("first"));
    let further: Vec<Change<'_>> = own.iter().copied().filter(|(field, _)| *field != "tune.adapter").collect();
    // All weights are a model, which is the next one's base.
    let from = match small.path("first/adapter_config.json").try_exists().unwrap() {
        true => ("tune.adapter", "{from: ./first}"),
        false => ("base", "./first"),
    };
    let whole = [("tune.adapter", "{method: full}")];
    let more = if from.0 == "base" { &whole[..] } else { &[] };
    let second = finish(small, &further, &[&[from, SUMS[0]], more].concat(), 1)?;
    let (ended, begun) = (first.losses[first.losses.len() - 1], second.losses[0]);
    if (ended - begun).abs() > 1e-4 * ended.abs() {
        return Err(format!("ends at {ended}, begins at {begun}"));
    }
    learned(second)
}

/// On a base that was made of the small one.
fn on_experts(small: &Small, own: &[Change<'_>]) -> Result<Ran, String> {
    let surgery = [
        ("tune.surgery", "{method: dynamic-dino, copies: 2, granularity: 2}"),
        ("tune.adapter", "{method: full, targets: [w1, w2, w3, gate]}"),
        ("tune.steps", "1"),
    ];
    let made = finish(small, &surgery, &SUMS, 1)?;
    unpack(&made.files, "Result", &small.path("experts"));
    learns(small, own, &[("base", "./experts")])
}

/// The adapter and a LoRA, one after the other at each site.
fn beside(small: &Small, own: &[Change<'_>]) -> Result<Ran, String> {
    let adapter = own.iter().find(|(field, _)| *field == "tune.adapter").map_or("", |(_, text)| text);
    let stack = format!("[{adapter}, {{name: beside, method: lora, rank: 2}}]");
    let own: Vec<Change<'_>> = own.iter().copied().filter(|(field, _)| *field != "tune.adapter").collect();
    learns(small, &own, &[("tune.adapter", "null"), ("tune.stack", &stack)])
}

fn in_lanes(small: &Small, own: &[Change<'_>]) -> Result<Ran, String> {
    let alone = finish(small, own, &SUMS, 1)?;
    let common = [("tune.steps", "20"), SUMS[1]];
    let plans = [small.try_plan(&[&common, own, &SUMS].concat())?, small.try_plan(&common)?];
    let (requests, _works): (Vec<Request>, Vec<_>) = plans.into_iter().map(|plan| small.request(plan, 1, None)).unzip();
    let outsides = [Outside::default(), Outside::default()];
    let lanes: Vec<(&Request, &dyn Control)> =
        requests.iter().zip(&outsides).map(|(request, outside)| (request, outside as &dyn Control)).collect();
    let ends = Mutex::new(Vec::new());
    cohort::run(&lanes, &|lane, end| ends.lock().unwrap().push((lane, end.map_err(|error| error.to_string()))));
    for (lane, end) in ends.into_inner().unwrap() {
        match end {
            Ok(End::Finished(_)) => {}
            other => return Err(format!("lane {lane}: {other:?}")),
        }
    }
    let [outside, _] = outsides;
    let beside = files(&outside.events.into_inner().unwrap());
    if beside == alone.files { Ok(alone) } else { Err("other bytes".to_owned()) }
}

/// The loss of the folder alone, measured apart from the job, is the job's last.
fn merged(small: &Small, own: &[Change<'_>]) -> Result<Ran, String> {
    let ran = finish(small, own, &[SUMS[0], ("outputs.merged", "true")], 1)?;
    let whole = ran.files.keys().any(|name| name.starts_with("Merged/"));
    unpack(&ran.files, if whole { "Merged" } else { "Result" }, &small.path("whole"));
    let folder = Folder::Model(small.path("whole"));
    let drift = Drift {
        base: &small.path("base"),
        trained: Some(&folder),
        slice: small.path("sums.jsonl"),
        seen: small.path("sums.jsonl"),
        rows: Some(5),
        max_length: 32,
        most: 2.0,
        bootstrap: Bootstrap { resamples: 1, level: 0.5, seed: 1 },
    };
    let found = drift.run().map_err(|error| error.to_string())?;
    let loss = found.answers.map_or(f64::NAN, |answers| answers.perplexity[0].ln());
    let last = ran.losses[ran.losses.len() - 1];
    if (loss - last).abs() < 1e-4 * last {
        Ok(ran)
    } else {
        Err(format!("the folder's loss is {loss}, the job's {last}"))
    }
}

/// Those whose usual job is of some texts alone, or too short for these.
const ANYWHERE: [(&str, &str); 3] = [
    ("alora", "{method: alora, text: ' ', rank: 4, alpha: 8}"),
    ("loramoe", "{method: loramoe, rank: 2, experts: 4}"),
    ("multitask-prompt-tuning", "{method: multitask-prompt-tuning, length: 3, rank: 2}"),
];

/// How each adapter is tried: what it changes of the small job.
fn jobs() -> Vec<(&'static str, Vec<Change<'static>>)> {
    let names = ADAPTERS.cards().map(|card| card.name).filter(|name| !BLENDS.contains(name));
    let of = |name: &'static str| {
        if let Some((_, text)) = ANYWHERE.iter().find(|(of, _)| *of == name) {
            return Some(vec![("tune.adapter", *text), ("tune.batch_tokens", "256")]);
        }
        let is_it = |changes: &&[Change<'static>]| {
            changes.iter().any(|(field, text)| *field == "tune.adapter" && named(text).next() == Some(name))
                && changes
                    .iter()
                    .all(|(field, _)| ["tune.adapter", "tune.batch_tokens", "tune.optimizer"].contains(field))
        };
        let kind = KINDS.iter().map(|(_, changes)| *changes).find(is_it).map(<[_]>::to_vec);
        let further = || FURTHER.iter().find(|text| named(text).next() == Some(name));
        kind.or_else(|| further().map(|text| vec![("tune.adapter", *text)]))
    };
    names.filter_map(|name| Some((name, of(name)?))).collect()
}

/// What came of one cell, as it is kept.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Cell {
    adapter: String,
    setting: String,
    job: Vec<(String, String)>,
    /// Why not, where it is not possible.
    refused: Option<String>,
    losses: Vec<f64>,
    result: Option<String>,
}

fn tried(adapter: &str, own: &[Change<'_>], setting: &Setting) -> Cell {
    let small = Small::with_weights();
    let found = (setting.tries)(&small, own);
    let shown = small.path("").display().to_string();
    let digest = |files: &Files| {
        let mut hasher = blake3::Hasher::new();
        for (name, bytes) in files.iter().filter(|(name, _)| name.ends_with(".safetensors")) {
            hasher.update(name.as_bytes()).update(bytes);
        }
        format!("blake3:{}", hasher.finalize().to_hex())
    };
    Cell {
        adapter: adapter.to_owned(),
        setting: setting.name.to_owned(),
        job: own.iter().map(|(field, text)| ((*field).to_owned(), (*text).to_owned())).collect(),
        refused: found.as_ref().err().map(|why| why.replace(&shown, "")),
        losses: found.as_ref().map(|ran| ran.losses.clone()).unwrap_or_default(),
        result: found.as_ref().ok().map(|ran| digest(&ran.files)),
    }
}

fn docs(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs").join(name)
}

/// A refusal's words for the table, where those of several adapters are one.
fn words(refusal: &str, adapter: &str) -> String {
    let named = refusal.replace(&format!("`tune.adapter` is {adapter},"), "`tune.adapter` is one");
    named.lines().next().unwrap_or_default().trim().to_owned()
}

fn page(cells: &[Cell]) -> String {
    let mut page = String::from(
        "# What adapters can be used for\n\nA job of twenty steps (of answers four) on a small base for each adapter and setting. ✓ has a run behind it that did what the setting says: the\n\
         loss of the validation set fell, or the bytes were those of the job alone, or the merged folder had the job's loss. Numbers are refusals, by their words below; jobs\n\
         that are refused say so before their first step. Evidence: [each run](evidence/capabilities.jsonl); made by\n\
         `ATTUNE_CAPABILITIES=1 cargo nextest run --profile long -E 'test(capabilities::)'` with the workspace's features. Adapters that mix others\n\
         (`adapterfusion`, `arrow`, `xlora`) begin from folders of these and have tests of their own.\n\n",
    );
    for setting in &SETTINGS {
        let _ = writeln!(page, "- **{}**: {}.", setting.name, setting.what);
    }
    let _ = write!(page, "\n| adapter |");
    for setting in &SETTINGS {
        let _ = write!(page, " {} |", setting.name);
    }
    let _ = write!(page, "\n| --- |");
    SETTINGS.iter().for_each(|_| page.push_str(" :-: |"));
    let mut reasons: Vec<String> = Vec::new();
    for row in cells.chunks(SETTINGS.len()) {
        let _ = write!(page, "\n| `{}` |", row[0].adapter);
        for cell in row {
            let Some(refusal) = &cell.refused else {
                page.push_str(" ✓ |");
                continue;
            };
            let words = words(refusal, &cell.adapter);
            let at = reasons.iter().position(|known| *known == words).unwrap_or_else(|| {
                reasons.push(words);
                reasons.len() - 1
            });
            let _ = write!(page, " {} |", at + 1);
        }
    }
    page.push_str("\n\n");
    for (number, reason) in (1..).zip(&reasons) {
        let _ = writeln!(page, "{number}. {reason}");
    }
    page
}

/// One cell of every so many is tried by each run of the tests.
const EVERY: usize = 61;

#[test]
fn cells_of_the_table_have_runs_behind_them() {
    let evidence = docs("evidence/capabilities.jsonl");
    let all: Vec<(&str, Vec<Change<'_>>, &Setting)> = jobs()
        .into_iter()
        .flat_map(|(name, own)| SETTINGS.iter().map(move |setting| (name, own.clone(), setting)))
        .collect();
    if std::env::var_os("ATTUNE_CAPABILITIES").is_some() {
        let cells: Vec<Cell> = all.iter().map(|(name, own, setting)| tried(name, own, setting)).collect();
        let lines: Vec<String> = cells.iter().map(|cell| serde_json::to_string(cell).unwrap()).collect();
        std::fs::write(&evidence, lines.join("\n") + "\n").unwrap();
        std::fs::write(docs("capabilities.md"), page(&cells)).unwrap();
        return;
    }
    let kept = std::fs::read_to_string(&evidence).unwrap();
    let kept: Vec<Cell> = kept.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let names = |(adapter, setting): (&str, &str)| format!("{adapter}: {setting}");
    let of_kept: Vec<String> = kept.iter().map(|cell| names((&cell.adapter, &cell.setting))).collect();
    let due: Vec<String> = all.iter().map(|(adapter, _, setting)| names((adapter, setting.name))).collect();
    let stale = "the table is of other adapters or settings: make it again with ATTUNE_CAPABILITIES=1";
    assert!(of_kept == due, "{stale}");
    assert_eq!(std::fs::read_to_string(docs("capabilities.md")).unwrap(), page(&kept));
    for (at, (adapter, own, setting)) in all.iter().enumerate().skip(7).step_by(EVERY) {
        let cell = tried(adapter, own, setting);
        assert_eq!(cell.refused, kept[at].refused, "{adapter}: {}", setting.name);
        assert_eq!(cell.losses.len(), kept[at].losses.len(), "{adapter}: {}", setting.name);
    }
}
