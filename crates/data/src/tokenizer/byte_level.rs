//! The smallest tokeniser that can write any text: one token for each byte, and special tokens. For models that are
//! trained from scratch, and for tests.

use serde_json::{Map, Value, json};

use super::Tokenizer;

/// A tokeniser of the 256 bytes (ids 0 to 255) and the special tokens (ids from 256 on, in order). The first special
/// token ends a text.
///
/// # Panics
/// Never: the description that it is read from is made here.
pub fn byte_level(specials: &[&str]) -> Tokenizer {
    let config = config(specials);
    Tokenizer::from_json(json(specials).to_string().as_bytes(), &config)
        .expect("the byte-level description is a valid tokenizer")
}

/// Its `tokenizer.json`.
pub(super) fn json(specials: &[&str]) -> Value {
    let vocabulary: Map<String, Value> =
        (0..=u8::MAX).map(|byte| (symbol(byte).to_string(), Value::from(byte))).collect();
    let added: Vec<Value> = (256u32..)
        .zip(specials)
        .map(|(id, token)| {
            json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        })
        .collect();
    let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": level, "post_processor": level, "decoder": level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocabulary, "merges": []},
    })
}

/// Its `tokenizer_config.json`, without a chat template.
fn config(specials: &[&str]) -> Value {
    json!({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": null, "eos_token": specials.first(),
        "clean_up_tokenization_spaces": false})
}

/// Files of a model folder with this tokeniser: name and content.
///
/// `chat_template` is a Jinja source, kept in `tokenizer_config.json`.
pub fn byte_level_files(specials: &[&str], chat_template: Option<&str>) -> [(&'static str, Vec<u8>); 2] {
    let mut config = config(specials);
    if let (Some(template), Some(fields)) = (chat_template, config.as_object_mut()) {
        fields.insert("chat_template".to_owned(), template.into());
    }
    [
        ("tokenizer.json", json(specials).to_string().into_bytes()),
        ("tokenizer_config.json", format!("{config:#}\n").into_bytes()),
    ]
}

/// The printable character by which byte-level BPE writes a byte (GPT-2's table).
fn symbol(byte: u8) -> char {
    let printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if printable(&byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|byte| !printable(byte)).count() as u32;
    char::from_u32(256 + before).unwrap_or(char::REPLACEMENT_CHARACTER)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_is_its_own_id() {
        let tokenizer = byte_level(&["<|end|>", "<|turn|>"]);
        assert_eq!(tokenizer.encode("A é\n", false).unwrap(), [65, 32, 0xC3, 0xA9, 10]);
        assert_eq!((tokenizer.eos(), tokenizer.id("<|turn|>"), tokenizer.vocabulary()), (Some(256), Some(257), 258));
    }

    #[test]
    fn the_files_make_a_folder_that_loads() {
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes) in byte_level_files(&["<|end|>"], Some("{{ messages[0].content }}")) {
            std::fs::write(folder.path().join(name), bytes).unwrap();
        }
        let tokenizer = Tokenizer::open(folder.path()).unwrap();
        assert_eq!(tokenizer.eos(), Some(256));
        assert!(tokenizer.chat_template().unwrap().is_some());
    }
}
