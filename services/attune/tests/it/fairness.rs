//! `attune fairness`.

use crate::support::Place;

const ASKED: &str = "version: 1
base: ./base
runs:
  - {name: one, adapter: ./one}
target: ./chat.valid.jsonl
decisions: {questions: ./questions.jsonl, options: [good, bad], positive: good}
";

fn refused(place: &Place, change: (&str, &str)) -> String {
    assert!(ASKED.contains(change.0), "{change:?}");
    place.write("asked.yaml", &ASKED.replace(change.0, change.1));
    let ran = place.run(&["fairness", "asked.yaml"]);
    assert_eq!((ran.status, ran.stdout.as_str()), (2, ""), "{}", ran.all());
    ran.stderr
}

#[test]
fn what_is_asked_is_checked_before_a_model_is_opened() {
    let place = Place::with_demo();
    std::fs::create_dir(place.path().join("one")).unwrap();
    place.write("questions.jsonl", "{\"prompt\": \"Is it?\", \"label\": \"fair\", \"group\": \"a\"}\n");
    for (change, message) in [
        (("version: 1", "version: 2"), "asked.yaml: `version` is 2; this build reads version 1"),
        (("adapter: ./one", "model: ./one, adapter: ./one"), "`runs[0]` has to have either `model` or `adapter`"),
        (
            ("positive: good", "positive: fine"),
            "`decisions.positive` is \"fine\"; expected one of two `options` or more",
        ),
        (("version: 1", "version: 1\nleast: 1.5"), "`least` is 1.5; expected a share above 0 and below 1"),
        (("./one}", "./two}"), "./two: there is no such folder"),
        (("target:", "tagret:"), "unknown field `tagret`"),
        (("./base", "./base"), "questions.jsonl: has the label \"fair\", which is none of the options good, bad"),
    ] {
        let said = refused(&place, change);
        assert!(said.contains(message), "{message}: {said}");
    }
}
