//! The README.md of an adapter: a model card whose front matter Hugging Face's hub and tools read.

use std::fmt::Write as _;

/// What a card says. Times and speeds stay out of it: the card is part of the artifact and thereby of its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Card<'a> {
    /// Heading.
    pub title: &'a str,
    /// The base model as a hub id or a digest; never a local path.
    pub base_model: Option<&'a str>,
    /// The method, such as `lora`; a tag.
    pub method: &'a str,
    /// What the adapter is for, such as `text-generation`.
    pub pipeline_tag: &'a str,
    /// Rows of a table: what, value.
    pub facts: &'a [(&'a str, String)],
}

impl Card<'_> {
    /// The file's text; equal cards give equal text.
    pub fn render(&self) -> String {
        let mut text = String::from("---\n");
        let hub_id = self.base_model.filter(|name| super::peft::is_hub_id(name));
        if let Some(id) = hub_id {
            line(&mut text, &format!("base_model: {}", scalar(id)));
        }
        line(&mut text, "library_name: peft");
        line(&mut text, &format!("pipeline_tag: {}", scalar(self.pipeline_tag)));
        line(&mut text, "tags:");
        if let Some(id) = hub_id {
            line(&mut text, &format!("- {}", scalar(&format!("base_model:adapter:{id}"))));
        }
        line(&mut text, &format!("- {}", scalar(self.method)));
        line(&mut text, "- transformers");
        line(&mut text, "---");
        let _ = write!(text, "\n# {}\n", one_line(self.title));
        if let Some(base) = self.base_model {
            let _ = write!(text, "\nBase model: `{}`\n", one_line(base).replace('`', "'"));
        }
        if !self.facts.is_empty() {
            text.push_str("\n| | |\n|---|---|\n");
            for (name, value) in self.facts {
                line(&mut text, &format!("| {} | {} |", cell(name), cell(value)));
            }
        }
        text
    }
}

fn line(text: &mut String, line: &str) {
    text.push_str(line);
    text.push('\n');
}

/// A YAML scalar: bare when it is plain, otherwise quoted as in JSON, which YAML reads.
fn scalar(text: &str) -> String {
    let plain = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._/-:".contains(&b))
        && text.bytes().any(|b| b.is_ascii_alphabetic())
        && !text.starts_with('-')
        && !text.ends_with(':')
        && !matches!(text.to_ascii_lowercase().as_str(), "true" | "false" | "yes" | "no" | "on" | "off" | "null");
    if plain { text.to_owned() } else { serde_json::Value::from(text).to_string() }
}

fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn cell(text: &str) -> String {
    one_line(text).replace('|', "\\|")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_front_matter_names_a_hub_base_and_no_other() {
        let facts = [("rank", "16".to_owned()), ("a|b", "x\ny".to_owned())];
        let card = Card {
            title: "debian-helper",
            base_model: Some("HuggingFaceTB/SmolLM2-135M"),
            method: "lora",
            pipeline_tag: "text-generation",
            facts: &facts,
        };
        assert_eq!(
            card.render(),
            "---\nbase_model: HuggingFaceTB/SmolLM2-135M\nlibrary_name: peft\npipeline_tag: text-generation\ntags:\n\
             - base_model:adapter:HuggingFaceTB/SmolLM2-135M\n- lora\n- transformers\n---\n\n# debian-helper\n\n\
             Base model: `HuggingFaceTB/SmolLM2-135M`\n\n| | |\n|---|---|\n| rank | 16 |\n| a\\|b | x y |\n"
        );
        let digest = format!("blake3:{}", "0".repeat(64));
        let local = Card { base_model: Some(&digest), ..card }.render();
        assert!(!local.contains("base_model:") && local.contains(&format!("Base model: `{digest}`")), "{local}");
    }

    #[test]
    fn scalars_that_yaml_would_misread_are_quoted() {
        for (text, expected) in
            [("lora", "lora"), ("1.0", "\"1.0\""), ("no", "\"no\""), ("a: b", "\"a: b\""), ("é", "\"é\"")]
        {
            assert_eq!(scalar(text), expected);
        }
    }
}
