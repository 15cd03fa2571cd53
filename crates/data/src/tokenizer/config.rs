//! What a model folder says about its tokeniser beside `tokenizer.json`: named special tokens and the chat template.

use std::path::Path;

use serde_json::Value;

use crate::error::Error;
use crate::readers::kind;

/// Tokens with a meaning of their own.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Specials {
    /// The texts of all special tokens, by id.
    pub(crate) special: Vec<String>,
    /// The named ones, such as `("eos_token", "</s>")`, as chat templates see them.
    pub(crate) named: Vec<(String, String)>,
}

impl Specials {
    /// The text of the end-of-text token, if there is one.
    pub fn eos(&self) -> Option<&str> {
        self.named("eos_token")
    }

    /// The text of a named special token, such as `bos_token`.
    pub fn named(&self, name: &str) -> Option<&str> {
        self.named.iter().find(|(known, _)| known == name).map(|(_, token)| token.as_str())
    }

    /// The texts of all special tokens, by id.
    pub fn all(&self) -> &[String] {
        &self.special
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TemplateSource {
    pub(super) place: String,
    pub(super) text: String,
}

#[derive(Debug, Default)]
pub(super) struct Parts {
    pub(super) named: Vec<(String, String)>,
    pub(super) template: Option<TemplateSource>,
}

/// Reads the files that are there. A named token of `tokenizer_config.json` goes before `special_tokens_map.json`,
/// `chat_template.jinja` before the template in `tokenizer_config.json`, as in `transformers`.
pub(super) fn read(folder: &Path) -> Result<Parts, Error> {
    let mut parts = Parts::default();
    let config = folder.join("tokenizer_config.json");
    if let Some(text) = read_if_there(&config)? {
        parts.take_config(&config, &parse(&config, &text)?)?;
    }
    let map = folder.join("special_tokens_map.json");
    if let Some(text) = read_if_there(&map)? {
        parts.take_named(&map, &parse(&map, &text)?)?;
    }
    let template = folder.join("chat_template.jinja");
    if let Some(text) = read_if_there(&template)? {
        parts.template = Some(TemplateSource { place: template.display().to_string(), text });
    }
    Ok(parts)
}

impl Parts {
    pub(super) fn take_config(&mut self, path: &Path, config: &Value) -> Result<(), Error> {
        self.take_named(path, config)?;
        let text = match config.get("chat_template") {
            None | Some(Value::Null) => return Ok(()),
            Some(Value::String(text)) => text.clone(),
            // Several templates by name; the one for plain conversations is `default`.
            Some(Value::Array(templates)) => {
                let named = |template: &&Value| template.get("name").and_then(Value::as_str) == Some("default");
                let found = templates.iter().find(named).and_then(|template| template.get("template")?.as_str());
                let Some(text) = found else {
                    return Err(error(path, "`chat_template` is a list without an entry named \"default\""));
                };
                text.to_owned()
            }
            Some(other) => {
                return Err(error(path, &format!("`chat_template` is {}; expected a text", kind(other))));
            }
        };
        self.template = Some(TemplateSource { place: path.display().to_string(), text });
        Ok(())
    }

    fn take_named(&mut self, path: &Path, config: &Value) -> Result<(), Error> {
        let Value::Object(fields) = config else {
            return Err(error(path, &format!("is {}; expected an object", kind(config))));
        };
        for (name, value) in fields.iter().filter(|(name, _)| name.ends_with("_token") && !name.starts_with("add_")) {
            let token = match value {
                Value::String(token) => token,
                Value::Object(token) => match token.get("content") {
                    Some(Value::String(content)) => content,
                    _ => return Err(error(path, &format!("`{name}` is an object without the text `content`"))),
                },
                Value::Null | Value::Bool(_) => continue,
                Value::Number(_) | Value::Array(_) => {
                    return Err(error(path, &format!("`{name}` is {}; expected a text", kind(value))));
                }
            };
            if !self.named.iter().any(|(known, _)| known == name) {
                self.named.push((name.clone(), token.clone()));
            }
        }
        Ok(())
    }
}

fn error(path: &Path, message: &str) -> Error {
    Error::Tokenizer { path: path.to_owned(), message: message.to_owned() }
}

fn read_if_there(path: &Path) -> Result<Option<String>, Error> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(error(path, &format!("cannot be read: {e}"))),
    }
}

fn parse(path: &Path, text: &str) -> Result<Value, Error> {
    serde_json::from_str(text).map_err(|e| error(path, &format!("is not valid JSON: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_of_several_templates_is_taken() {
        let config = serde_json::json!({
            "bos_token": null, "eos_token": "</s>", "add_bos_token": true, "unk_token": {"content": "<unk>"},
            "chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}],
        });
        let mut parts = Parts::default();
        parts.take_config(Path::new("c.json"), &config).unwrap();
        assert_eq!(parts.template.unwrap().text, "d");
        let named = [("eos_token", "</s>"), ("unk_token", "<unk>")].map(|(a, b)| (a.to_owned(), b.to_owned()));
        assert_eq!(parts.named, named);
    }

    #[test]
    fn the_template_file_goes_before_the_one_in_the_config() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("tokenizer_config.json"), r#"{"chat_template": "c"}"#).unwrap();
        std::fs::write(folder.path().join("special_tokens_map.json"), r#"{"eos_token": "</s>"}"#).unwrap();
        assert_eq!(read(folder.path()).unwrap().template.unwrap().text, "c");
        std::fs::write(folder.path().join("chat_template.jinja"), "j").unwrap();
        let parts = read(folder.path()).unwrap();
        assert_eq!(parts.template.unwrap().text, "j");
        assert_eq!(parts.named, [("eos_token".to_owned(), "</s>".to_owned())]);
    }
}
