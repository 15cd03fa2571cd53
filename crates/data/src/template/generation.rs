//! `{% generation %} … {% endgeneration %}`: how a template itself says which text the assistant wrote.
//!
//! The tag is not Jinja's. It is rewritten to a write of a marker, in such a way that white-space control and line
//! numbers stay what they were.

/// The variable that holds the marker before the assistant's text.
pub(super) const START: &str = "attune_generation_start";
/// The variable that holds the marker after it.
pub(super) const END: &str = "attune_generation_end";

/// The template with its generation tags rewritten, and how many blocks there were.
pub(super) fn rewrite(source: &str) -> (String, usize) {
    let mut out = String::with_capacity(source.len());
    let mut count = 0;
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        match parse(tag) {
            Some(found) => {
                count += usize::from(found.variable == START);
                let Tag { left, variable, right, length } = found;
                // The outer control signs work on the text outside, as they did on the tag.
                out.push_str(&format!("{{%{left} if true %}}{{{{ {variable} }}}}{{% endif {right}%}}"));
                rest = &tag[length..];
            }
            None => {
                out.push_str("{%");
                rest = &tag[2..];
            }
        }
    }
    out.push_str(rest);
    (out, count)
}

struct Tag<'a> {
    left: &'a str,
    variable: &'static str,
    right: &'a str,
    length: usize,
}

/// Reads a generation tag at the start of `text`, which starts with `{%`.
fn parse(text: &str) -> Option<Tag<'_>> {
    let (inner, _) = text[2..].split_once("%}")?;
    let length = 2 + inner.len() + 2;
    let sign = |text: &str| text == "-" || text == "+";
    let left = inner.get(..1).filter(|text| sign(text)).unwrap_or("");
    let body = &inner[left.len()..];
    let right = body.len().checked_sub(1).and_then(|last| body.get(last..)).filter(|text| sign(text)).unwrap_or("");
    let variable = match body[..body.len() - right.len()].trim() {
        "generation" => START,
        "endgeneration" => END,
        _ => return None,
    };
    Some(Tag { left, variable, right, length })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_tag_is_rewritten() {
        let (text, count) = rewrite("{% if a %}\n{%- generation -%}\nx{% endgeneration %}{% endif %}{% é");
        assert_eq!(count, 1);
        assert_eq!(
            text,
            "{% if a %}\n{%- if true %}{{ attune_generation_start }}{% endif -%}\nx\
             {% if true %}{{ attune_generation_end }}{% endif %}{% endif %}{% é"
        );
        assert_eq!(
            rewrite("{% set generation = 1 %}{{ generation }}"),
            ("{% set generation = 1 %}{{ generation }}".to_owned(), 0)
        );
    }
}
