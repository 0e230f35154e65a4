//! A report as people, pull requests, browsers and pipelines read it.
//!
//! Every format tells the same changes in the same order. Names come from files
//! that somebody else wrote: each format shows control and direction characters
//! by their number and escapes what has a meaning in its syntax.

mod graph;
mod html;
mod json;
mod junit;
mod markdown;
mod places;
mod sarif;
mod text;
mod words;

use super::Report;

pub use words::about;
pub(super) use words::clean;

/// In what form a report is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// For a terminal.
    Text,
    /// One document, described by `docs/diff.schema.json`.
    Json,
    /// A comment on a pull request: at most [`COMMENT_LIMIT`] bytes.
    Markdown,
    /// One page without references to anything outside of it.
    Html,
    /// `JUnit` XML: a suite for each file, a case for each class.
    Junit,
    /// SARIF 2.1.0: a result for each change.
    Sarif,
}

impl Format {
    /// All formats.
    pub const ALL: [Self; 6] = [
        Self::Text,
        Self::Json,
        Self::Markdown,
        Self::Html,
        Self::Junit,
        Self::Sarif,
    ];

    /// Its name on the command line.
    pub fn word(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Json => "json",
            Self::Markdown => "markdown",
            Self::Html => "html",
            Self::Junit => "junit",
            Self::Sarif => "sarif",
        }
    }
}

/// GitHub takes no longer comment. It counts characters; here bytes are
/// counted, which are never fewer.
pub const COMMENT_LIMIT: usize = 65_536;

/// How much of a report, and with what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// Every place, every renamed name, values in full (text and Markdown; the
    /// other formats always tell everything).
    pub full: bool,
    /// Terminal colours, in text.
    pub colour: bool,
}

/// Writes a report in a format, with a line end behind the last line.
pub fn render(report: &Report, format: Format, view: View) -> String {
    match format {
        Format::Text => text::render(report, view),
        Format::Json => json::render(report),
        Format::Markdown => markdown::render(report, view),
        Format::Html => html::render(report),
        Format::Junit => junit::render(report),
        Format::Sarif => sarif::render(report),
    }
}
