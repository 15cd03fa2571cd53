//! `attune data`.

use crate::support::Place;

const CHATS: &str =
    "{\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}, {\"role\": \"assistant\", \"content\": \"Hello!\"}]}
{\"messages\": [{\"role\": \"human\", \"content\": \"Hi\"}, {\"role\": \"assistant\", \"content\": \"Hello!\"}]}
{\"messages\": [}
";

#[test]
fn a_preview_shows_what_is_read_and_what_is_learned() {
    let place = Place::with_demo();
    place.write("chats.jsonl", CHATS);
    let preview = ["data", "preview", "--base", "base", "chats.jsonl", "--rows", "1"];
    insta::assert_snapshot!(place.run(&preview).all(), @r"
    exit status 0
    --- stdout
    ── chats.jsonl, row 1: 25 tokens, 5 learned
    <|im_start|>user
    Hi<|im_end|>
    <|im_start|>assistant
    ⟦Hello!<|im_end|>⟧
    --- stderr
    ");
    let row = place.run(&[&preview[..], &["--json"]].concat()).json();
    let (ids, mask) = (row["ids"].as_array().unwrap(), row["labels_mask"].as_array().unwrap());
    assert_eq!((ids.len(), ids.len() as u64), (mask.len(), row["tokens"].as_u64().unwrap()));
    let learned = mask.iter().filter(|mark| **mark == 1).count() as u64;
    assert!(learned > 0 && row["learned_tokens"] == learned, "{row}");
}

#[test]
fn rows_that_cannot_be_used_are_named_by_file_and_line() {
    let place = Place::with_demo();
    place.write("chats.jsonl", CHATS);
    let ran = place.run(&["data", "validate", "--base", "base", "chats.jsonl", "text.valid.jsonl"]);
    insta::assert_snapshot!(ran.all(), @r#"
    exit status 2
    --- stdout
    text.valid.jsonl: 24 rows, all usable
    --- stderr
    error: chats.jsonl: 2 of 3 rows cannot be used
      chats.jsonl:2: `messages[0].role` is "human"; expected one of system, developer, user, assistant, tool; did you mean "user"?
      chats.jsonl:3: not valid JSON at column 15: expected value
    "#);
    let ran = place.run(&["data", "validate", "--base", "base", "chats.jsonl", "--json"]);
    assert_eq!((ran.status, ran.stderr.as_str()), (2, ""));
    let found = ran.json();
    assert_eq!((&found[0]["valid"], &found[0]["bad_rows"]), (&false.into(), &2.into()));
    assert_eq!(found[0]["first"][0]["origin"]["number"], 2);
    let ran = place.run(&["data", "preview", "--base", "base", "chats.jsonl"]);
    insta::assert_snapshot!(ran.all(), @r#"
    exit status 2
    --- stdout
    --- stderr
    error: chats.jsonl:2: `messages[0].role` is "human"; expected one of system, developer, user, assistant, tool; did you mean "user"? (and at least 1 more bad row; `on_bad_row: skip` leaves them out)
    "#);
}

#[test]
fn a_job_names_its_own_files() {
    let place = Place::with_demo();
    let ran = place.run(&["data", "validate", "--job", "text.yaml"]);
    insta::assert_snapshot!(ran.all(), @r"
    exit status 0
    --- stdout
    text.train.jsonl: 288 rows, all usable
    text.valid.jsonl: 24 rows, all usable
    --- stderr
    ");
    let ran = place.run(&["data", "stats", "--job", "text.yaml"]);
    assert_eq!((ran.status, ran.stderr.as_str()), (0, ""));
    assert!(ran.stdout.starts_with("FILE") && ran.stdout.contains("text.train.jsonl"), "{}", ran.stdout);
    let found = place.run(&["data", "stats", "--job", "text.yaml", "--json"]).json();
    assert_eq!(found.as_array().unwrap().len(), 2);
    assert_eq!(found[0]["report"]["truncated"], 0);
    insta::assert_snapshot!(place.run(&["data", "stats", "--job", "chat.yaml"]).all(), @r"
    exit status 2
    --- stdout
    --- stderr
    error: chat.yaml: base demo-base:latest is not a folder on this machine

    hint: name a folder with its tokenizer: --base FOLDER
    ");
    assert_eq!(place.run(&["data", "stats", "--job", "chat.yaml", "--base", "base"]).status, 0);
}

#[test]
fn what_cannot_be_read_is_said_with_what_would_be_right() {
    let place = Place::with_demo();
    insta::assert_snapshot!(place.run(&["data", "stats", "--base", "base", "rows.txt"]).all(), @r#"
    exit status 2
    --- stdout
    --- stderr
    error: data source "rows.txt" does not say its format; expected a name in .jsonl, .ndjson, .csv or .parquet
    "#);
    insta::assert_snapshot!(place.run(&["data", "stats", "--base", "base", "none.jsonl"]).all(), @r"
    exit status 2
    --- stdout
    --- stderr
    error: none.jsonl: there is no such file
    ");
    insta::assert_snapshot!(place.run(&["data", "stats", "--base", "nowhere", "text.valid.jsonl"]).all(), @r"
    exit status 2
    --- stdout
    --- stderr
    error: tokenizer nowhere/tokenizer.json: there is no such file; a SentencePiece model needs converting first (transformers' `save_pretrained` of a fast tokenizer)
    ");
    let ran = place.run(&["data", "stats", "--base", "base", "text.valid.jsonl", "--form", "chta"]);
    assert_eq!(ran.status, 2);
    assert!(ran.stderr.contains("chta"), "{}", ran.stderr);
}
