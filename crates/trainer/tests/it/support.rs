// A small job: a random base with a byte tokeniser, two small domains, a validation set.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use attune_data::tokenizer::byte_level_files;
use attune_spec::job::plan::Input;
use attune_spec::job::{Plan, read_value, read_yaml, set_path};
use attune_spec::method::Catalogue;
use attune_trainer::control::Control;
use attune_trainer::protocol::{Event, OutputRole, Request, VERSION};
use attune_trainer::run::{End, run};

const CONFIG: &str = r#"{
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 260, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": true, "rope_theta": 100.0, "initializer_range": 0.2
}"#;

const JOB: &str = "
version: 1
name: small
base: ./base
data:
  domains:
    - {name: greetings, source: ./greetings.jsonl, weight: 2}
    - {name: sums, source: ./sums.jsonl}
  validation:
    - {name: sums, source: ./sums.jsonl, rows: 5}
  max_length: 32
tune:
  adapter: {method: lora, rank: 4, alpha: 8, dropout: 0.1}
  from_scratch: true
  optimizer: {method: adamw, lr: 0.01}
  batch_tokens: 128
  logical_shards: 4
  steps: 10
  seed: 7
";

/// A folder with a base and data.
pub(crate) struct Small {
    folder: tempfile::TempDir,
}

impl Small {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let base = folder.path().join("base");
        std::fs::create_dir(&base).unwrap();
        std::fs::write(base.join("config.json"), CONFIG).unwrap();
        for (name, bytes) in byte_level_files(&["<|endoftext|>"], None) {
            std::fs::write(base.join(name), bytes).unwrap();
        }
        let greetings: String = ["Ada", "Bob", "Cy", "Dee", "Eve", "Flo", "Gus"]
            .map(|name| format!("{{\"prompt\": \"Who?\", \"completion\": \" I am {name}.\"}}\n"))
            .concat();
        std::fs::write(folder.path().join("greetings.jsonl"), greetings).unwrap();
        let sums: String =
            (0..12).map(|i| format!("{{\"text\": \"{i} and {} make {}.\"}}\n", i + 1, 2 * i + 1)).collect();
        std::fs::write(folder.path().join("sums.jsonl"), sums).unwrap();
        let pairs: String = (0..6)
            .map(|i| {
                let (right, wrong) = (2 * i, 2 * i + 1);
                format!("{{\"prompt\": \"{i}+{i}=\", \"chosen\": \"{right}, even\", \"rejected\": \"{wrong}, odd\"}}\n")
            })
            .collect();
        std::fs::write(folder.path().join("pairs.jsonl"), pairs).unwrap();
        Self { folder }
    }

    /// The same, and the base has random weights in a file.
    pub(crate) fn with_weights() -> Self {
        let small = Self::new();
        let (base, made) = (small.path("base"), small.path("made"));
        let random = attune_models::Base::from_scratch(&base, 1).unwrap();
        let nothing = BTreeMap::new();
        attune_models::export::write(&random, &nothing, candle_core::DType::F32, &base, &made).unwrap();
        for entry in std::fs::read_dir(&made).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), base.join(entry.file_name())).unwrap();
        }
        small
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The plan of the small job with some fields changed.
    pub(crate) fn plan(&self, changes: &[(&str, &str)]) -> Plan {
        self.try_plan(changes).unwrap_or_else(|refusal| panic!("{refusal}"))
    }

    /// The same, or why it is refused.
    pub(crate) fn try_plan(&self, changes: &[(&str, &str)]) -> Result<Plan, String> {
        let mut value = read_yaml(JOB).unwrap();
        for (path, text) in changes {
            set_path(&mut value, path, text).unwrap();
        }
        let spec = read_value(&value, Catalogue::embedded()).map_err(|error| error.to_string())?;
        let resolve = |reference: &attune_spec::job::Reference| {
            let text = reference.to_string();
            Ok(Input::Path(self.path(text.trim_start_matches("./")).display().to_string()))
        };
        Plan::resolve(&spec, Catalogue::embedded(), resolve).map_err(|faults| format!("{faults:?}"))
    }

    pub(crate) fn request(&self, plan: Plan, ranks: u32, resume: Option<&Path>) -> (Request, tempfile::TempDir) {
        let work = tempfile::tempdir().unwrap();
        let request = Request {
            version: VERSION,
            name: "small".to_owned(),
            plan,
            inputs: BTreeMap::new(),
            work: work.path().to_owned(),
            ranks,
            card: None,
            resume: resume.map(Path::to_owned),
            seat: None,
        };
        (request, work)
    }

    /// Runs a plan to its end and returns what happened and what the result's files hold.
    pub(crate) fn finish(&self, plan: Plan, ranks: u32) -> (Vec<Event>, BTreeMap<String, Vec<u8>>) {
        let (request, _work) = self.request(plan, ranks, None);
        let outside = Outside::default();
        let end = run(&request, &outside).unwrap();
        assert!(matches!(end, End::Finished(_)), "{end:?}");
        let events = outside.events.into_inner().unwrap();
        let files = files(&events);
        (events, files)
    }
}

/// Every file of every output, by role and name.
pub(crate) fn files(events: &[Event]) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for event in events {
        if let Event::Output { role, folder, .. } = event {
            collect(folder, &format!("{role:?}"), &mut files);
        }
    }
    assert!(files.keys().any(|name| name.starts_with(&format!("{:?}/", OutputRole::Result))));
    files
}

/// Every file below a folder, whose names begin with `below`.
fn collect(folder: &Path, below: &str, files: &mut BTreeMap<String, Vec<u8>>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = format!("{below}/{}", path.file_name().unwrap().to_string_lossy());
        if path.is_dir() {
            collect(&path, &name, files);
        } else {
            files.insert(name, std::fs::read(path).unwrap());
        }
    }
}

/// Hears everything, and asks for a stop after a given number of steps.
#[derive(Default)]
pub(crate) struct Outside {
    pub(crate) events: Mutex<Vec<Event>>,
    pub(crate) stop_after: Option<u64>,
    leave_after: Option<u64>,
    steps: AtomicU64,
}

impl Outside {
    pub(crate) fn stopping_after(steps: u64) -> Self {
        Self { stop_after: Some(steps), ..Self::default() }
    }

    pub(crate) fn leaving_after(steps: u64) -> Self {
        Self { leave_after: Some(steps), ..Self::default() }
    }
}

impl Control for Outside {
    fn stop_requested(&self) -> bool {
        // It is asked before each step: the stop comes with the step that makes the number full.
        self.stop_after.is_some_and(|after| self.steps.load(Ordering::Relaxed) + 1 >= after)
    }

    fn leave_requested(&self) -> bool {
        self.leave_after.is_some_and(|after| self.steps.load(Ordering::Relaxed) >= after)
    }

    fn take_checkpoint_request(&self) -> bool {
        false
    }

    fn emit(&self, event: Event) {
        if matches!(event, Event::Progress { .. }) {
            self.steps.fetch_add(1, Ordering::Relaxed);
        }
        self.events.lock().unwrap().push(event);
    }
}

/// The metric `name` at each step.
pub(crate) fn metric(events: &[Event], name: &str) -> Vec<f64> {
    let of = |event: &Event| match event {
        Event::Metrics { metrics, .. } => metrics.iter().find(|metric| metric.name == name).map(|metric| metric.value),
        _ => None,
    };
    events.iter().filter_map(of).collect()
}
