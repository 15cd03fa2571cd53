//! What sentence-transformers keeps beside a model: which modules a text goes through (`modules.json`), and how rows become a vector
//! (`1_Pooling/config.json`).

use std::io::Write as _;
use std::path::Path;
use std::{fs, io};

use attune_spec::Fault;
use attune_spec::job::HeadPooling;
use serde_json::{Map, Value, json};

use super::write_file;
use crate::error::{Error, Result};

/// Lists the modules.
const MODULES_FILE: &str = "modules.json";
/// Says how many tokens a text may have.
const TRANSFORMER_FILE: &str = "sentence_bert_config.json";
/// The folder of the module that makes vectors of rows.
const POOLING: &str = "1_Pooling";
/// The module's parameters.
const POOLING_FILE: &str = "config.json";

/// What rows become a vector by: its key among the flags, its word, and ours.
const MODES: [(&str, &str, Option<HeadPooling>); 6] = [
    ("pooling_mode_cls_token", "cls", Some(HeadPooling::First)),
    ("pooling_mode_mean_tokens", "mean", Some(HeadPooling::Mean)),
    ("pooling_mode_lasttoken", "lasttoken", Some(HeadPooling::Last)),
    ("pooling_mode_max_tokens", "max", None),
    ("pooling_mode_mean_sqrt_len_tokens", "mean_sqrt_len_tokens", None),
    ("pooling_mode_weightedmean_tokens", "weightedmean", None),
];

/// How rows become a vector, if a folder says it.
///
/// # Errors
/// [`Error::Refused`] for a file that cannot be understood, or says what no head here does.
pub fn pooling(folder: &Path) -> Result<Option<HeadPooling>> {
    let path = folder.join(POOLING).join(POOLING_FILE);
    let refused = |path_of: &str, message: String| Error::Refused {
        what: path.display().to_string(),
        faults: vec![Fault::new(path_of, message)],
    };
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("read", &path, error)),
    };
    let config: Map<String, Value> =
        serde_json::from_slice(&text).map_err(|error| refused("", format!("is no JSON object: {error}")))?;
    let on = |key: &str| config.get(key).and_then(Value::as_bool).unwrap_or(false);
    let words: Vec<&str> = match config.get("pooling_mode") {
        Some(Value::String(word)) => vec![word],
        Some(Value::Array(words)) => words.iter().filter_map(Value::as_str).collect(),
        _ => MODES.iter().filter(|(key, ..)| on(key)).map(|(_, word, _)| *word).collect(),
    };
    let known = |word: &str| MODES.iter().find(|(_, known, _)| *known == word).and_then(|(.., pooling)| *pooling);
    match words.as_slice() {
        [word] if known(word).is_some() => Ok(known(word)),
        _ => {
            let message = format!("is {words:?}; expected one of mean, cls and lasttoken");
            Err(refused("pooling_mode", message))
        }
    }
}

/// Says in a folder how rows of `width` numbers become a vector, of texts of at most `max_length` tokens, if that is known.
///
/// # Errors
/// Whatever writing raises.
pub fn write(folder: &Path, width: usize, pooling: HeadPooling, max_length: Option<u32>) -> Result<()> {
    let modules = ["Transformer", "Pooling"].into_iter().enumerate().map(|(idx, module)| {
        let path = if idx == 0 { "" } else { POOLING };
        json!({"idx": idx, "name": idx.to_string(), "path": path, "type": format!("sentence_transformers.models.{module}")})
    });
    let mut config = Map::from_iter([("word_embedding_dimension".to_owned(), json!(width))]);
    config.extend(MODES.iter().map(|(key, _, of)| ((*key).to_owned(), json!(*of == Some(pooling)))));
    config.insert("include_prompt".to_owned(), json!(true));
    let of_pooling = folder.join(POOLING);
    fs::create_dir_all(&of_pooling).map_err(|error| Error::io("make", &of_pooling, error))?;
    let length = |most| (folder.join(TRANSFORMER_FILE), json!({"max_seq_length": most, "do_lower_case": false}));
    let files =
        [(folder.join(MODULES_FILE), modules.collect()), (of_pooling.join(POOLING_FILE), Value::Object(config))];
    for (path, value) in files.into_iter().chain(max_length.map(length)) {
        write_file(&path, |file| {
            serde_json::to_writer_pretty(&mut *file, &value)?;
            file.write_all(b"\n")
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(pooling(folder.path()).unwrap(), None);
        for given in [HeadPooling::Mean, HeadPooling::First, HeadPooling::Last] {
            write(folder.path(), 16, given, Some(256)).unwrap();
            assert_eq!(pooling(folder.path()).unwrap(), Some(given));
        }
    }

    #[test]
    fn words_and_flags_are_understood_and_what_no_head_does_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join(POOLING)).unwrap();
        let read = |text: &str| {
            fs::write(folder.path().join(POOLING).join(POOLING_FILE), text).unwrap();
            pooling(folder.path()).map_err(|error| error.to_string())
        };
        assert_eq!(read(r#"{"embedding_dimension": 4, "pooling_mode": "cls"}"#), Ok(Some(HeadPooling::First)));
        assert_eq!(read(r#"{"pooling_mode_lasttoken": true}"#), Ok(Some(HeadPooling::Last)));
        assert!(read(r#"{"pooling_mode": ["mean", "max"]}"#).unwrap_err().contains("expected one of mean"));
        assert!(read(r#"{"pooling_mode_max_tokens": true}"#).unwrap_err().contains("[\"max\"]"));
        assert!(read("[]").unwrap_err().contains("no JSON object"));
    }
}
