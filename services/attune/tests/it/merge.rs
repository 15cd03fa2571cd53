//! `attune merge` and `attune convert`.

use std::path::Path;

use crate::support::{Place, run};

fn golden(of: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../crates").join(of).display().to_string()
}

#[test]
fn adapters_become_one_folder_that_can_be_read_again() {
    let place = Place::new();
    let (a, b, base) = (golden("merge/golden/a"), golden("merge/golden/b"), golden("models/golden/llama"));
    let (a, b) = (format!("{a}=0.7"), format!("{b}=-0.5"));
    let type_of = |word| ["merge", &*a, &*b, "--base", &*base, "--combination-type", word];
    let ran = place.run(&[&type_of("cat")[..], &["--to", "both", "--dry-run"]].concat());
    assert_eq!(ran.status, 0, "{}", ran.all());
    assert!(!place.path().join("both").try_exists().unwrap());
    let ran = place.run(&[&type_of("cat")[..], &["--to", "both", "--json"]].concat());
    assert_eq!(ran.status, 0, "{}", ran.all());
    let json = ran.json();
    assert_eq!((&json["folder"], &json["sites"], &json["rank"]), (&"both".into(), &5.into(), &8.into()));
    // What was made is an adapter like any other.
    let again = place.run(&["merge", "both", "--base", &base, "--to", "again"]);
    assert_eq!(again.status, 0, "{}", again.all());
    assert!(again.stdout.starts_with("again\n5 sites, rank 8 at most"), "{}", again.all());
    let there = place.run(&["merge", "both", "--base", &base, "--to", "again"]);
    assert_eq!(there.status, 2);
    assert!(there.stderr.contains("again is there already; expected a new folder"), "{}", there.all());
}

#[test]
fn what_does_not_go_together_is_wrong_usage() {
    let ran = run(&["merge", "a=x", "--base", ".", "--to", "made"]);
    assert_eq!(ran.status, 2);
    assert!(ran.stderr.contains(r#"the weight is "x"; expected a number, such as a=0.5"#), "{}", ran.all());
    let (a, base) = (golden("merge/golden/a"), golden("models/golden/llama"));
    let ran = run(&["merge", &a, "--base", &base, "--to", "made", "--combination-type", "linear", "--density", "0.5"]);
    assert_eq!(ran.status, 2);
    assert!(ran.stderr.contains("`density` says nothing to linear"), "{}", ran.all());
    let ran = run(&["merge", &a, "--base", &base, "--to", "made", "--combination-type", "ties", "--density", "1.5"]);
    assert_eq!(ran.status, 2);
    assert!(ran.stderr.contains("density"), "{}", ran.all());
    let ran = run(&["merge", &a, "--base", &base, "--to", "made", "--combination-type", "sum"]);
    assert!(ran.status == 2 && ran.stderr.contains("magnitude_prune_svd"), "{}", ran.all());
    assert_eq!(run(&["merge", &a, "--base", &base]).status, 2);
}

#[test]
fn an_adapter_of_another_kind_becomes_lora() {
    let place = Place::new();
    let (turned, base) = (golden("adapt/golden/llama_hra/adapter"), golden("models/golden/llama"));
    let convert = ["convert", &*turned, "--base", &*base];
    let ran = place.run(&[&convert[..], &["--rank", "2", "--dry-run"]].concat());
    assert_eq!(ran.status, 0, "{}", ran.all());
    assert!(!place.path().join("lora").try_exists().unwrap());
    let ran = place.run(&[&convert[..], &["--rank", "2", "--to", "lora"]].concat());
    assert_eq!(ran.status, 0, "{}", ran.all());
    assert!(ran.stdout.starts_with("lora\nhra as LoRA: "), "{}", ran.all());
    assert!(ran.stdout.contains("kept of each change: 0.") && ran.stdout.contains(" by 2 directions"), "{}", ran.all());
    let ran = place.run(&[&convert[..], &["--share", "0.9", "--to", "near", "--json"]].concat());
    let sites = ran.json()["sites"].as_object().unwrap().clone();
    assert!(sites.values().all(|kept| kept["share"].as_f64().unwrap() >= 0.9), "{}", ran.all());
    // What was made is an adapter like any other.
    let both = place.run(&["merge", "lora", "near", "--base", &base, "--combination-type", "cat", "--to", "both"]);
    assert_eq!(both.status, 0, "{}", both.all());
    for (wrong, message) in [
        (&["--share", "2", "--to", "made"][..], "expected more than 0, and 1 at most, such as 0.99"),
        (&["--rank", "0", "--to", "made"], "--rank"),
        (&["--rank", "2", "--share", "0.5", "--to", "made"], "cannot be used with"),
        (&["--to", "made"], "--rank"),
        (&["--rank", "2"], "--to"),
        (&["--rank", "2", "--to", "lora"], "lora is there already; expected a new folder"),
    ] {
        let ran = place.run(&[&convert[..], wrong].concat());
        assert!(ran.status == 2 && ran.stderr.contains(message), "{wrong:?}: {}", ran.all());
    }
}
