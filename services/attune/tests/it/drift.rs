//! `attune drift`.

use crate::support::Place;

#[test]
fn what_is_looked_at_has_to_be_there() {
    let place = Place::with_demo();
    std::fs::create_dir(place.path().join("one")).unwrap();
    let drift =
        |more: &[&str]| place.run(&[&["drift", "--base", "base", "--slice", "chat.valid.jsonl"], more].concat());
    for (more, message) in [
        (&["--seen", "today.jsonl"][..], "today.jsonl"),
        (&["--seen", "chat.valid.jsonl", "--adapter", "./two"], "./two: there is no such folder"),
        (&["--seen", "chat.valid.jsonl", "--most", "0.5"], "expected 1 or more, such as 1.2"),
        (&["--seen", "chat.valid.jsonl", "--rows", "0"], "0 is not in 1.."),
        (&["--seen", "chat.valid.jsonl", "--adapter", "./one", "--model", "./one"], "cannot be used with"),
        (&[], "--seen <FILE>"),
    ] {
        let ran = drift(more);
        assert_eq!((ran.status, ran.stdout.as_str()), (2, ""), "{}", ran.all());
        assert!(ran.stderr.contains(message), "{message}: {}", ran.all());
    }
}
