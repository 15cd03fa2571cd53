//! Markers around the assistant's text, and where they stood.

use std::ops::Range;

use super::Rendered;
use crate::tokenizer::Specials;

/// Two characters of the private-use planes that occur neither in the template nor in the messages.
pub(super) fn markers(template: &str, contents: &[&str]) -> (char, char) {
    let used = |c: char| template.contains(c) || contents.iter().any(|content| content.contains(c));
    let mut free = ('\u{F0000}'..='\u{FFFFD}').filter(|c| !used(*c));
    // A row of at most 16 MiB holds fewer than 65 534 * 65 characters of four bytes, but it may hold each one once; the
    // last two then stand in, and the comparison with the unmarked rendering refuses the row.
    (free.next().unwrap_or('\u{FFFFC}'), free.next().unwrap_or('\u{FFFFD}'))
}

/// The text with markers around its part between leading and trailing white space.
pub(super) fn mark(text: &str, start: char, end: char) -> String {
    let core = text.trim();
    let lead = text.len() - text.trim_start().len();
    format!("{}{start}{core}{end}{}", &text[..lead], &text[lead + core.len()..])
}

/// The text without markers, and where they stood; `None` unless they alternate.
pub(super) fn take_out(marked: &str, start: char, end: char) -> Option<Rendered> {
    let mut text = String::with_capacity(marked.len());
    let mut spans: Vec<Range<usize>> = Vec::new();
    let mut open = None;
    for c in marked.chars() {
        if c == start {
            if open.replace(text.len()).is_some() {
                return None;
            }
        } else if c == end {
            spans.push(open.take()?..text.len());
        } else {
            text.push(c);
        }
    }
    open.is_none().then_some(Rendered { text, spans })
}

/// Lengthens each span through the special token that ends the turn; gives the last one an end-of-text token if nothing
/// ends it. A span that the template itself marked may hold its end of turn already.
///
/// Fails, with the words, if a conversation would be learnt without an end.
pub(super) fn through_end_of_turn(
    rendered: &mut Rendered,
    specials: &Specials,
    marked_by_template: bool,
) -> Result<(), &'static str> {
    let count = rendered.spans.len();
    for index in 0..count {
        let span = rendered.spans[index].clone();
        let inside = rendered.text[span.clone()].trim_end();
        if marked_by_template && specials.special.iter().any(|token| inside.ends_with(token.as_str())) {
            continue;
        }
        let last = index + 1 == count;
        let limit = if last { rendered.text.len() } else { rendered.spans[index + 1].start };
        let after = &rendered.text[span.end..limit];
        match first_special(after, specials) {
            // Between turns only white space may come before it: anything else is the next turn already.
            Some(found) if last || after[..found.start].trim().is_empty() => {
                rendered.spans[index].end = span.end + found.end;
            }
            _ if last => {
                let eos =
                    specials.eos().ok_or("it writes no end of the turn, and the tokenizer names no `eos_token`")?;
                let rest = after.trim_end().len();
                rendered.text.truncate(span.end + rest);
                rendered.text.push_str(eos);
                rendered.spans[index].end = rendered.text.len();
            }
            _ => {}
        }
    }
    Ok(())
}

/// The first special token in a text; the longest, where several start at the same place.
fn first_special(text: &str, specials: &Specials) -> Option<Range<usize>> {
    let found = specials.special.iter().filter_map(|token| text.find(token.as_str()).map(|at| at..at + token.len()));
    found.min_by_key(|range| (range.start, std::cmp::Reverse(range.end)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markers_are_characters_that_nothing_else_uses() {
        let (start, end) = markers("\u{F0000}", &["\u{F0002}"]);
        assert_eq!((start, end), ('\u{F0001}', '\u{F0003}'));
    }

    #[test]
    fn markers_go_inside_the_white_space_and_come_out_again() {
        let marked = mark(" \na b\t", '<', '>');
        assert_eq!(marked, " \n<a b>\t");
        let rendered = take_out("x<a b>y<>", '<', '>').unwrap();
        assert_eq!((rendered.text.as_str(), rendered.spans), ("xa by", vec![1..4, 5..5]));
        for wrong in ["<a", "a>", "<<a>>", ">a<"] {
            assert!(take_out(wrong, '<', '>').is_none(), "{wrong}");
        }
    }
}
