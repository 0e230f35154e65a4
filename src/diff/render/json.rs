//! One JSON document: the report's types as they are.

use super::Report;

pub(super) fn render(report: &Report) -> String {
    // The report's types hold strings, numbers, lists and maps keyed by words.
    let text = serde_json::to_string_pretty(report);
    text.unwrap_or_else(|e| format!("{{\"error\": {:?}}}", e.to_string())) + "\n"
}
