//! The demonstration's material.

use attune_data::{Message, Tokenizer};

use super::*;
use crate::job_file;

fn written() -> (tempfile::TempDir, World) {
    let folder = tempfile::tempdir().unwrap();
    let world = World::new(7);
    write(folder.path(), &world).unwrap();
    (folder, world)
}

#[test]
fn a_seed_is_a_base() {
    let files = |seed| base::files(&World::new(seed)).unwrap();
    assert_eq!(files(7), files(7));
}

#[test]
fn the_tokenizer_loads_and_renders_a_chat() {
    let (folder, world) = written();
    let tokenizer = Tokenizer::open(&folder.path().join(BASE)).unwrap();
    assert_eq!(tokenizer.vocabulary(), 512);
    let template = tokenizer.chat_template().unwrap().unwrap();
    let text = template.prompt(&[Message::new("user", "Who are you?")]).unwrap();
    assert_eq!(text, "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n");
    let ids = tokenizer.encode(&text, false).unwrap();
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
    let stops = tokenizer.stops(Some(&template));
    assert_eq!(stops, [tokenizer.id("<|im_end|>").unwrap(), tokenizer.id("<|endoftext|>").unwrap()]);
    // The world's own words are in the vocabulary: a sentence takes few more tokens than words.
    let answer = &world.held_out()[0].answer;
    let tokens = tokenizer.encode(answer, false).unwrap().len();
    assert!(tokens <= answer.split(' ').count() + 6, "{answer}: {tokens} tokens");
}

#[test]
fn the_jobs_pass_all_checks_and_fit_the_base() {
    let (folder, _) = written();
    for job in [TEXT_JOB, CHAT_JOB] {
        let file = folder.path().join(job.file);
        let set = ["base=./base".parse().unwrap()];
        let job = job_file::read(file.to_str().unwrap(), &set).unwrap();
        assert_eq!(job.site_faults().unwrap(), Some(Vec::new()));
    }
}
