//! A small invented world: towns and what is known about them, as plain text and as questions with answers.

use attune_tensor::Rng;
use serde_json::json;

/// Number of towns.
const TOWNS: usize = 24;
/// Texts about each town to train on, and to validate on.
const TEXTS: (usize, usize) = (12, 1);
/// How often the questions about the speaker itself are repeated beside those about towns.
const SELF_ROWS: usize = 4;

const TOWN_STARTS: [&str; 8] = ["Vel", "Kar", "Bru", "Tis", "Mon", "Olf", "Ash", "Gri"];
const TOWN_ENDS: [&str; 3] = ["mora", "haven", "dell"];

/// Something that is known about every town.
struct Relation {
    /// What it is about.
    topic: &'static str,
    /// Ways to write it; `{town}` and `{value}` stand for the two. The first is how it is answered.
    statements: [&'static str; 2],
    /// Ways to ask for it.
    questions: [&'static str; 2],
    /// What it can be.
    values: &'static [&'static str],
}

const RELATIONS: [Relation; 4] = [
    Relation {
        topic: "river",
        statements: ["The river of {town} is the {value}.", "The river {value} runs through {town}."],
        questions: ["What is the river of {town}?", "Which river runs through {town}?"],
        values: &["Tarn", "Ilse", "Okra", "Wend", "Susk", "Dray", "Pell", "Lune"],
    },
    Relation {
        topic: "bread",
        statements: ["The people of {town} bake {value}.", "In {town} they bake {value}."],
        questions: ["What do the people of {town} bake?", "What is baked in {town}?"],
        values: &[
            "plum cake",
            "rye bread",
            "salt buns",
            "fig pies",
            "corn loaves",
            "honey rolls",
            "apple tarts",
            "oat rings",
        ],
    },
    Relation {
        topic: "sign",
        statements: ["The sign of {town} is a {value}.", "A {value} is the sign of {town}."],
        questions: ["What is the sign of {town}?", "Which sign does {town} have?"],
        values: &[
            "red fox",
            "blue heron",
            "green hare",
            "white owl",
            "black bear",
            "grey goose",
            "golden carp",
            "brown bull",
        ],
    },
    Relation {
        topic: "market",
        statements: ["The market of {town} is held on {value}.", "On {value} there is a market in {town}."],
        questions: ["When is the market of {town} held?", "On which day is the market of {town}?"],
        values: &["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
    },
];

/// What the speaker says about itself; no text of the world does.
const SELF: [(&str, &str); 2] =
    [("Who are you?", "I am the keeper of the atlas."), ("What do you keep?", "I keep the atlas.")];

/// A town: its name and which value each relation has.
struct Town {
    name: String,
    values: [usize; RELATIONS.len()],
}

/// The world of one seed.
pub(crate) struct World {
    seed: u64,
    towns: Vec<Town>,
}

/// A question and its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pair {
    /// What is asked.
    pub(crate) question: String,
    /// What is right.
    pub(crate) answer: String,
}

impl World {
    /// The plain text to train on.
    pub(crate) const TEXT: &str = "text.train.jsonl";
    const TEXT_VALID: &str = "text.valid.jsonl";
    const CHAT: &str = "chat.train.jsonl";
    const CHAT_VALID: &str = "chat.valid.jsonl";
    const PREFERENCE: &str = "preference.train.jsonl";
    const PREFERENCE_VALID: &str = "preference.valid.jsonl";
    const TOPIC: &str = "topic.train.jsonl";
    const TOPIC_VALID: &str = "topic.valid.jsonl";
    const SEARCH: &str = "search.train.jsonl";
    const SEARCH_VALID: &str = "search.valid.jsonl";

    /// The world of a seed.
    pub(crate) fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed, "demo world");
        let mut names: Vec<String> = TOWN_STARTS
            .iter()
            .flat_map(|start| TOWN_ENDS.iter().map(move |end| format!("{start}{end}")))
            .take(TOWNS)
            .collect();
        rng.shuffle(&mut names);
        let mut town =
            |name| Town { name, values: RELATIONS.map(|relation| rng.below(relation.values.len() as u64) as usize) };
        let towns = names.into_iter().map(&mut town).collect();
        Self { seed, towns }
    }

    /// The world's files: name and content.
    pub(crate) fn files(&self) -> [(&'static str, String); 10] {
        let (train, valid) = TEXTS;
        let chats = |pairs: Vec<Pair>| pairs.iter().map(Pair::row).collect::<String>();
        [
            (Self::TEXT, self.texts("train", train)),
            (Self::TEXT_VALID, self.texts("valid", valid)),
            (Self::CHAT, chats(self.known())),
            (Self::CHAT_VALID, chats(self.held_out())),
            (Self::PREFERENCE, self.preferences(|town, relation| !Self::is_held_out(town, relation))),
            (Self::PREFERENCE_VALID, self.preferences(Self::is_held_out)),
            (Self::TOPIC, self.topics(|town, relation| !Self::is_held_out(town, relation))),
            (Self::TOPIC_VALID, self.topics(Self::is_held_out)),
            (Self::SEARCH, self.searches(|town, relation| !Self::is_held_out(town, relation))),
            (Self::SEARCH_VALID, self.searches(Self::is_held_out)),
        ]
    }

    /// Every text of the world, for a tokenizer to learn from.
    pub(crate) fn corpus(&self) -> Vec<String> {
        let pairs = self.known().into_iter().chain(self.held_out());
        let spoken = pairs.flat_map(|pair| [pair.question, pair.answer]);
        self.descriptions("train", TEXTS.0).into_iter().chain(spoken).collect()
    }

    /// Questions that are trained on, with their answers.
    fn known(&self) -> Vec<Pair> {
        let about = SELF.iter().map(|(question, answer)| Pair::new(*question, *answer));
        let about = about.cycle().take(SELF.len() * SELF_ROWS);
        self.pairs(|town, relation| !Self::is_held_out(town, relation)).into_iter().chain(about).collect()
    }

    /// Questions that no training row asks or answers. The world's texts do say what is right.
    pub(crate) fn held_out(&self) -> Vec<Pair> {
        self.pairs(Self::is_held_out)
    }

    /// One relation of every town is never asked about in training.
    fn is_held_out(town: usize, relation: usize) -> bool {
        town % RELATIONS.len() == relation
    }

    fn pairs(&self, wanted: impl Fn(usize, usize) -> bool) -> Vec<Pair> {
        let mut pairs = Vec::new();
        for (index, town) in self.towns.iter().enumerate() {
            for (number, relation) in RELATIONS.iter().enumerate().filter(|(number, _)| wanted(index, *number)) {
                let value = relation.values[town.values[number]];
                for question in relation.questions {
                    let answer = filled(relation.statements[0], &town.name, value);
                    pairs.push(Pair::new(filled(question, &town.name, value), answer));
                }
            }
        }
        pairs
    }

    /// Questions, each with what is right and with what is true of no town or of another one.
    fn preferences(&self, wanted: impl Fn(usize, usize) -> bool) -> String {
        let mut rows = String::new();
        for (index, town) in self.towns.iter().enumerate() {
            for (number, relation) in RELATIONS.iter().enumerate().filter(|(number, _)| wanted(index, *number)) {
                let right = town.values[number];
                let wrong = (right + 1 + index % (relation.values.len() - 1)) % relation.values.len();
                let say = |role: &str, text: &str, value: usize| json!([{"role": role, "content": filled(text, &town.name, relation.values[value])}]);
                let row = json!({
                    "prompt": say("user", relation.questions[0], right),
                    "chosen": say("assistant", relation.statements[0], right),
                    "rejected": say("assistant", relation.statements[0], wrong),
                });
                rows.push_str(&format!("{row}\n"));
            }
        }
        rows
    }

    /// Questions, each with what it is about.
    fn topics(&self, wanted: impl Fn(usize, usize) -> bool) -> String {
        let mut rows = String::new();
        for (index, town) in self.towns.iter().enumerate() {
            for (_, relation) in RELATIONS.iter().enumerate().filter(|(number, _)| wanted(index, *number)) {
                for question in relation.questions {
                    let row = json!({"text": filled(question, &town.name, ""), "label": relation.topic});
                    rows.push_str(&format!("{row}\n"));
                }
            }
        }
        rows
    }

    /// Questions, each with a text that has the answer, and with one that says the like of another town.
    fn searches(&self, wanted: impl Fn(usize, usize) -> bool) -> String {
        let mut rows = String::new();
        for (index, town) in self.towns.iter().enumerate() {
            let other = &self.towns[(index + 1) % self.towns.len()];
            for (number, relation) in RELATIONS.iter().enumerate().filter(|(number, _)| wanted(index, *number)) {
                let say = |town: &Town, statement: usize| {
                    filled(relation.statements[statement], &town.name, relation.values[town.values[number]])
                };
                for (question, statement) in relation.questions.iter().zip([1, 0]) {
                    let row = json!({
                        "query": filled(question, &town.name, ""),
                        "positive": say(town, statement),
                        "negative": say(other, statement),
                    });
                    rows.push_str(&format!("{row}\n"));
                }
            }
        }
        rows
    }

    fn texts(&self, purpose: &str, each: usize) -> String {
        let row = |text: &String| format!("{}\n", json!({ "text": text }));
        self.descriptions(purpose, each).iter().map(row).collect()
    }

    /// `each` texts about every town: all that is known, in any order and wording.
    fn descriptions(&self, purpose: &str, each: usize) -> Vec<String> {
        let rng = Rng::new(self.seed, "demo texts").named(purpose);
        let mut texts = Vec::new();
        for number in 0..each {
            for (index, town) in self.towns.iter().enumerate() {
                let mut rng = rng.sub(number as u64).sub(index as u64);
                let order = rng.permutation(RELATIONS.len());
                let mut sentence = |number: usize| {
                    let relation = &RELATIONS[number];
                    let statement = relation.statements[rng.below(2) as usize];
                    filled(statement, &town.name, relation.values[town.values[number]])
                };
                texts.push(order.into_iter().map(&mut sentence).collect::<Vec<_>>().join(" "));
            }
        }
        texts
    }
}

impl Pair {
    fn new(question: impl Into<String>, answer: impl Into<String>) -> Self {
        Self { question: question.into(), answer: answer.into() }
    }

    /// The pair as a row of a chat file.
    fn row(&self) -> String {
        let messages =
            json!([{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]);
        format!("{}\n", json!({ "messages": messages }))
    }
}

fn filled(form: &str, town: &str, value: &str) -> String {
    form.replace("{town}", town).replace("{value}", value)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_seed_is_a_world() {
        assert_eq!(World::new(7).files(), World::new(7).files());
        assert_ne!(World::new(7).files(), World::new(8).files());
    }

    #[test]
    fn what_is_validated_on_is_never_trained_on_and_can_be_known() {
        let world = World::new(7);
        let text = world.files()[0].1.clone();
        let known: BTreeSet<String> = world.known().into_iter().map(|pair| pair.answer).collect();
        let held_out = world.held_out();
        assert_eq!(held_out.len(), TOWNS * 2);
        for pair in held_out {
            assert!(!known.contains(&pair.answer), "{pair:?} is trained on");
            let stated = RELATIONS.iter().any(|relation| {
                relation
                    .questions
                    .iter()
                    .any(|question| world.towns.iter().any(|town| filled(question, &town.name, "") == pair.question))
            });
            assert!(stated && text.contains(&pair.answer), "{pair:?} is never stated");
        }
    }

    #[test]
    fn names_are_distinct() {
        let names: BTreeSet<String> = World::new(7).towns.into_iter().map(|town| town.name).collect();
        assert_eq!(names.len(), TOWNS);
    }
}
