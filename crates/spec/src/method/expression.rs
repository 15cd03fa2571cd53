//! The small language of cards: costs such as `r * (i + o)` and conditions such as `dropout < 1 and rank >= 1`.
//!
//! Numbers, texts and `true`/`false`; names of fields, dotted into mappings; `+ - * /`, comparisons, `and`, `or`, `not`,
//! parentheses, the functions `min`, `max`, `ceil`, `floor`, `sqrt`, [`divisor`], `count(list)`, `sum(list)`, and `if(condition, then, otherwise)`. Among numbers a
//! truth value counts as 1 or 0. It has no loops, so evaluation ends. The scheduler and the trainer evaluate the same text and
//! therefore agree.

use serde_json::{Map, Value};

/// What an expression comes to.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// A number.
    Number(f64),
    /// A truth value.
    Bool(bool),
    /// A text.
    Text(String),
    /// A field that was not given.
    Null,
}

/// Why an expression has no value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expression {text:?}, at character {at}: {what}")]
pub struct ExpressionError {
    /// The whole expression.
    pub text: String,
    /// Where it went wrong, counted from 0.
    pub at: usize,
    /// What went wrong.
    pub what: String,
}

/// Evaluates `text` with the fields of `names`.
///
/// # Errors
/// A text outside of the language, an unknown name, or an operation on values of the wrong kind.
pub fn evaluate(text: &str, names: &Map<String, Value>) -> Result<Outcome, ExpressionError> {
    let mut parser = Parser { text, at: 0, names, depth: 0 };
    let outcome = parser.either()?;
    parser.space();
    if parser.at < text.len() { Err(parser.error("unexpected text")) } else { Ok(outcome) }
}

/// Evaluates a condition.
///
/// # Errors
/// As for [`evaluate`], or a value that is not true or false.
pub fn holds(text: &str, names: &Map<String, Value>) -> Result<bool, ExpressionError> {
    match evaluate(text, names)? {
        Outcome::Bool(value) => Ok(value),
        other => Err(ExpressionError { text: text.to_owned(), at: 0, what: format!("{other:?} is not true or false") }),
    }
}

/// Evaluates a number.
///
/// # Errors
/// As for [`evaluate`], or a value that is not a number.
pub fn number(text: &str, names: &Map<String, Value>) -> Result<f64, ExpressionError> {
    match evaluate(text, names)? {
        Outcome::Number(value) => Ok(value),
        other => Err(ExpressionError { text: text.to_owned(), at: 0, what: format!("{other:?} is not a number") }),
    }
}

/// Nesting that no card needs.
const DEPTH_MAX: usize = 32;

/// One side of a rectangle of `n`: `most` where it divides `n`, else the largest divisor that is at most `most` (0 for no such
/// bound) and at most the root.
pub fn divisor(n: u64, most: u64) -> u64 {
    if most > 0 && n.is_multiple_of(most) {
        return most;
    }
    let bound = if most == 0 { n.isqrt() } else { most.min(n.isqrt()) };
    (1..=bound).rev().find(|side| n.is_multiple_of(*side)).unwrap_or(1)
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
    names: &'a Map<String, Value>,
    depth: usize,
}

impl<'a> Parser<'a> {
    fn error(&self, what: impl Into<String>) -> ExpressionError {
        ExpressionError { text: self.text.to_owned(), at: self.at, what: what.into() }
    }

    fn rest(&self) -> &str {
        &self.text[self.at..]
    }

    fn space(&mut self) {
        self.at += self.rest().len() - self.rest().trim_start().len();
    }

    fn take(&mut self, token: &str) -> bool {
        self.space();
        let word = token.chars().all(char::is_alphabetic);
        let follows = |rest: &str| rest.chars().next().is_some_and(|c| c.is_alphanumeric() || c == '_');
        let found = self.rest().strip_prefix(token).is_some_and(|rest| !(word && follows(rest)));
        if found {
            self.at += token.len();
        }
        found
    }

    fn either(&mut self) -> Result<Outcome, ExpressionError> {
        let mut left = self.both()?;
        while self.take("or") {
            let (a, b) = (self.truth(left)?, self.both()?);
            left = Outcome::Bool(self.truth(b)? || a);
        }
        Ok(left)
    }

    fn both(&mut self) -> Result<Outcome, ExpressionError> {
        let mut left = self.negation()?;
        while self.take("and") {
            let (a, b) = (self.truth(left)?, self.negation()?);
            left = Outcome::Bool(self.truth(b)? && a);
        }
        Ok(left)
    }

    fn negation(&mut self) -> Result<Outcome, ExpressionError> {
        if self.take("not") {
            let value = self.comparison()?;
            return Ok(Outcome::Bool(!self.truth(value)?));
        }
        self.comparison()
    }

    fn comparison(&mut self) -> Result<Outcome, ExpressionError> {
        let left = self.sum()?;
        for operator in ["==", "!=", "<=", ">=", "<", ">"] {
            if self.take(operator) {
                let right = self.sum()?;
                if operator == "==" || operator == "!=" {
                    return Ok(Outcome::Bool((left == right) == (operator == "==")));
                }
                let (a, b) = (self.number(&left)?, self.number(&right)?);
                return Ok(Outcome::Bool(match operator {
                    "<=" => a <= b,
                    ">=" => a >= b,
                    "<" => a < b,
                    _ => a > b,
                }));
            }
        }
        Ok(left)
    }

    fn sum(&mut self) -> Result<Outcome, ExpressionError> {
        let mut left = self.product()?;
        loop {
            let sign = if self.take("+") {
                1.0
            } else if self.take("-") {
                -1.0
            } else {
                return Ok(left);
            };
            let (a, right) = (self.number(&left)?, self.product()?);
            left = Outcome::Number(a + sign * self.number(&right)?);
        }
    }

    fn product(&mut self) -> Result<Outcome, ExpressionError> {
        let mut left = self.value()?;
        loop {
            let divide = if self.take("*") {
                false
            } else if self.take("/") {
                true
            } else {
                return Ok(left);
            };
            let (a, right) = (self.number(&left)?, self.value()?);
            let b = self.number(&right)?;
            left = Outcome::Number(if divide { a / b } else { a * b });
        }
    }

    fn value(&mut self) -> Result<Outcome, ExpressionError> {
        self.space();
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err(self.error("nested too deeply"));
        }
        let outcome = self.plain_value();
        self.depth -= 1;
        outcome
    }

    fn plain_value(&mut self) -> Result<Outcome, ExpressionError> {
        if self.take("(") {
            let inner = self.either()?;
            return if self.take(")") { Ok(inner) } else { Err(self.error("expected ')'")) };
        }
        if self.take("-") {
            let inner = self.value()?;
            return Ok(Outcome::Number(-self.number(&inner)?));
        }
        if self.take("\"") {
            let end = self.rest().find('"').ok_or_else(|| self.error("a text without its closing quote"))?;
            let text = self.rest()[..end].to_owned();
            self.at += end + 1;
            return Ok(Outcome::Text(text));
        }
        let is_word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.');
        let length = self.rest().find(|c| !is_word(c)).unwrap_or_else(|| self.rest().len());
        let word = self.rest()[..length].to_owned();
        if word.is_empty() {
            return Err(self.error("expected a value"));
        }
        if word.starts_with(|c: char| c.is_ascii_digit()) {
            let value = word.parse().map_err(|_| self.error(format!("{word:?} is not a number")))?;
            self.at += length;
            return Ok(Outcome::Number(value));
        }
        self.at += length;
        match word.as_str() {
            "true" => Ok(Outcome::Bool(true)),
            "false" => Ok(Outcome::Bool(false)),
            "null" => Ok(Outcome::Null),
            "if" => self.case(),
            "count" => Ok(Outcome::Number(self.list(&word)?.len() as f64)),
            "sum" => {
                let numbers = self.list(&word)?.iter().map(Value::as_f64).sum::<Option<f64>>();
                Ok(Outcome::Number(numbers.ok_or_else(|| self.error("sum takes a list of numbers"))?))
            }
            "min" | "max" | "ceil" | "floor" | "sqrt" | "divisor" => self.call(&word),
            _ => self.field(&word),
        }
    }

    fn call(&mut self, function: &str) -> Result<Outcome, ExpressionError> {
        if !self.take("(") {
            return Err(self.error(format!("expected '(' after {function}")));
        }
        let mut arguments = Vec::new();
        loop {
            let value = self.either()?;
            arguments.push(self.number(&value)?);
            if !self.take(",") {
                break;
            }
        }
        if !self.take(")") {
            return Err(self.error("expected ')'"));
        }
        let value = match (function, arguments.as_slice()) {
            ("min", [first, rest @ ..]) => rest.iter().fold(*first, |a, b| a.min(*b)),
            ("max", [first, rest @ ..]) => rest.iter().fold(*first, |a, b| a.max(*b)),
            ("ceil", [x]) => x.ceil(),
            ("floor", [x]) => x.floor(),
            ("sqrt", [x]) => x.sqrt(),
            // Widths of matrices are far below 2^53.
            ("divisor", [n, most]) => divisor(*n as u64, *most as u64) as f64,
            ("divisor", _) => return Err(self.error("divisor takes two values")),
            _ => return Err(self.error(format!("{function} takes one value"))),
        };
        Ok(Outcome::Number(value))
    }

    fn case(&mut self) -> Result<Outcome, ExpressionError> {
        let mut part = |before: &str| {
            if self.take(before) { self.either() } else { Err(self.error(format!("expected '{before}'"))) }
        };
        let (condition, then, otherwise) = (part("(")?, part(",")?, part(",")?);
        if !self.take(")") {
            return Err(self.error("expected ')'"));
        }
        Ok(if self.truth(condition)? { then } else { otherwise })
    }

    /// The list of a field.
    fn list(&mut self, function: &str) -> Result<&'a [Value], ExpressionError> {
        if !self.take("(") {
            return Err(self.error(format!("expected '(' after {function}")));
        }
        self.space();
        let length = self.rest().find(')').ok_or_else(|| self.error("expected ')'"))?;
        let path = self.rest()[..length].trim().to_owned();
        let Some(Value::Array(list)) = self.found(&path) else {
            return Err(self.error(format!("{path:?} is not a list")));
        };
        self.at += length + 1;
        Ok(list)
    }

    /// The value of a field.
    fn found(&self, path: &str) -> Option<&'a Value> {
        let mut parts = path.split('.');
        let first = parts.next().and_then(|name| self.names.get(name));
        parts.try_fold(first, |at, name| Some(at?.get(name))).flatten()
    }

    fn field(&self, path: &str) -> Result<Outcome, ExpressionError> {
        match self.found(path) {
            Some(Value::Number(value)) => Ok(Outcome::Number(value.as_f64().unwrap_or(f64::NAN))),
            Some(Value::Bool(value)) => Ok(Outcome::Bool(*value)),
            Some(Value::String(value)) => Ok(Outcome::Text(value.clone())),
            Some(Value::Null) => Ok(Outcome::Null),
            Some(_) => Err(self.error(format!("{path:?} is a list or a mapping"))),
            None => Err(self.error(format!("{path:?} is not a field"))),
        }
    }

    fn number(&self, outcome: &Outcome) -> Result<f64, ExpressionError> {
        match outcome {
            Outcome::Number(value) => Ok(*value),
            Outcome::Bool(value) => Ok(f64::from(u8::from(*value))),
            other => Err(self.error(format!("{other:?} is not a number"))),
        }
    }

    fn truth(&self, outcome: Outcome) -> Result<bool, ExpressionError> {
        match outcome {
            Outcome::Bool(value) => Ok(value),
            other => Err(self.error(format!("{other:?} is not true or false"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn names() -> Map<String, Value> {
        let names = json!({"r": 8, "i": 256, "o": 688, "dropout": 0.1, "scale": {"kind": "rs"}, "last": null, "or_rank": 3, "ids": [4, 2]});
        names.as_object().unwrap().clone()
    }

    #[test]
    fn costs_and_conditions_have_their_usual_meaning() {
        for (text, expected) in [
            ("r*(i+o)", Outcome::Number(7552.0)),
            ("2 + 3 * 4 - 6 / 2", Outcome::Number(11.0)),
            ("-r + ceil(i / 100)", Outcome::Number(-5.0)),
            ("max(1, min(r, 4), 2)", Outcome::Number(4.0)),
            ("dropout >= 0 and dropout < 1", Outcome::Bool(true)),
            ("not (r > 3) or scale.kind == \"rs\"", Outcome::Bool(true)),
            ("r*(scale.kind == \"rs\") + i*(r > 9)", Outcome::Number(8.0)),
            ("last == null", Outcome::Bool(true)),
            ("or_rank", Outcome::Number(3.0)),
            ("2 * if(scale.kind == \"rs\", r, if(r > 1, i, o))", Outcome::Number(16.0)),
            ("if(r < 1, 1, if(last == null, i, o))", Outcome::Number(256.0)),
            ("if(scale.kind == \"rs\" and r > 4, r * 2, 1) + 1", Outcome::Number(17.0)),
            ("if(r > 8, 1, if(r == 8, 2, 3))", Outcome::Number(2.0)),
            ("divisor(o, 0) + divisor(i, 4)", Outcome::Number(20.0)),
            ("count( ids ) * r + 1", Outcome::Number(17.0)),
            ("sum(ids) + 0", Outcome::Number(6.0)),
        ] {
            assert_eq!(evaluate(text, &names()), Ok(expected), "{text}");
        }
    }

    #[test]
    fn a_divisor_is_as_near_to_the_bound_or_to_the_root_as_there_is_one() {
        for (n, most, side) in
            [(256, 0, 16), (128, 0, 8), (127, 0, 1), (128, 4, 4), (12, 5, 3), (128, 64, 64), (0, 3, 3), (1, 0, 1)]
        {
            assert_eq!(divisor(n, most), side, "{n}, {most}");
        }
    }

    #[test]
    fn other_texts_are_refused_with_their_place() {
        for text in [
            "",
            "r +",
            "unknown",
            "r and true",
            "(r",
            "min()",
            "if(r, 1, 2)",
            "if(true, 1)",
            "divisor(4)",
            "count(r)",
            "count(ids",
            "sum(r)",
            "ids",
            "1 2",
            "\"open",
            "scale",
            &"(".repeat(100),
        ] {
            assert!(evaluate(text, &names()).is_err(), "{text:?} was accepted");
        }
        let error = evaluate("r * rnak", &names()).unwrap_err();
        assert_eq!(error.to_string(), "expression \"r * rnak\", at character 8: \"rnak\" is not a field");
    }
}
