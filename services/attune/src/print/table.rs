//! A table of text, aligned with spaces.

use std::fmt;

use super::plain;

/// A column: its heading, and which side its cells keep to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Column {
    heading: &'static str,
    right: bool,
}

impl Column {
    /// Text.
    pub(crate) const fn left(heading: &'static str) -> Self {
        Self { heading, right: false }
    }

    /// Numbers.
    pub(crate) const fn right(heading: &'static str) -> Self {
        Self { heading, right: true }
    }
}

/// A table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Table {
    columns: Vec<Column>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table without rows.
    pub(crate) fn new(columns: impl IntoIterator<Item = Column>) -> Self {
        Self { columns: columns.into_iter().collect(), rows: Vec::new() }
    }

    /// Adds a row. Line breaks in a cell become spaces, and nothing in it steers a terminal.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = impl Into<String>>) {
        let flat = |cell: String| plain(&cell.replace(['\n', '\r'], " ")).into_owned();
        self.rows.push(cells.into_iter().map(|cell| flat(cell.into())).collect());
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let headings: Vec<String> = self.columns.iter().map(|column| column.heading.to_owned()).collect();
        let lines: Vec<&Vec<String>> = std::iter::once(&headings).chain(&self.rows).collect();
        let width = |at: usize| {
            lines.iter().filter_map(|line| line.get(at)).map(|cell| cell.chars().count()).max().unwrap_or_default()
        };
        let widths: Vec<usize> = (0..self.columns.len()).map(width).collect();
        for line in lines {
            let mut text = String::new();
            for ((cell, column), width) in line.iter().zip(&self.columns).zip(&widths) {
                if !text.is_empty() {
                    text.push_str("  ");
                }
                let space = " ".repeat(width.saturating_sub(cell.chars().count()));
                if column.right {
                    text.push_str(&space);
                }
                text.push_str(cell);
                if !column.right {
                    text.push_str(&space);
                }
            }
            writeln!(f, "{}", text.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_stand_under_their_headings() {
        let mut table = Table::new([Column::left("NAME"), Column::right("ROWS"), Column::left("NOTE")]);
        table.row(["größe", "12", "one\ntwo"]);
        table.row(["b", "1234567", ""]);
        assert_eq!(
            table.to_string(),
            "NAME      ROWS  NOTE\n\
             größe       12  one two\n\
             b      1234567\n"
        );
    }
}
