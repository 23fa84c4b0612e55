//! Tables of text: columns as wide as their widest cell, two blanks between them.

use std::fmt;

const GAP: &str = "  ";

/// A header and rows of the same number of cells.
#[derive(Debug)]
pub(crate) struct Table {
    header: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(header: &[&str]) -> Self {
        Self { header: header.iter().map(|cell| (*cell).to_owned()).collect(), rows: Vec::new() }
    }

    /// Adds a row; cells that are lacking are empty. Control characters, which a pod's labels or an
    /// image could smuggle into a terminal, are shown as `?`.
    pub(crate) fn row<S: AsRef<str>>(&mut self, cells: impl IntoIterator<Item = S>) {
        let mut row: Vec<String> = cells.into_iter().map(|cell| printable(cell.as_ref())).collect();
        row.resize(self.header.len(), String::new());
        self.rows.push(row);
    }
}

/// The text without characters that act on a terminal.
pub(crate) fn printable(text: &str) -> String {
    text.chars().map(|character| if character.is_control() { '?' } else { character }).collect()
}

impl fmt::Display for Table {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines = || std::iter::once(&self.header).chain(&self.rows);
        let widths: Vec<usize> = (0..self.header.len())
            .map(|column| lines().map(|row| row[column].chars().count()).max().unwrap_or(0))
            .collect();
        for row in lines() {
            let padded: Vec<String> =
                row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
            writeln!(out, "{}", padded.join(GAP).trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_end_without_blanks() {
        let mut table = Table::new(&["ID", "NAME", "STATE"]);
        table.row(["0123", "a", "running"]);
        table.row(["4", "größer", ""]);
        assert_eq!(table.to_string(), "ID    NAME    STATE\n0123  a       running\n4     größer\n");
    }

    #[test]
    fn short_rows_are_filled_and_long_ones_cut() {
        let mut table = Table::new(&["A", "B"]);
        table.row(["1"]);
        table.row(["1", "2", "3"]);
        assert_eq!(table.to_string(), "A  B\n1\n1  2\n");
    }

    #[test]
    fn control_characters_are_not_printed() {
        let mut table = Table::new(&["A"]);
        table.row(["\x1b[2Jx\ny"]);
        assert_eq!(table.to_string(), "A\n?[2Jx?y\n");
    }
}
