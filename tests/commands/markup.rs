//! Whether markup is well-formed.

use std::collections::BTreeSet;

/// Checks that markup is well-formed and returns the names of its elements.
/// `void`: elements that are never closed.
#[track_caller]
pub(crate) fn well_formed(text: &str, void: &[&str]) -> BTreeSet<String> {
    let mut open: Vec<String> = Vec::new();
    let mut seen = BTreeSet::new();
    let mut rest = text;
    while let Some((before, tag)) = rest.split_once('<') {
        references(before);
        // The end of a tag is a '>' outside of quotes.
        let (mut quote, mut end) = (None, None);
        for (i, c) in tag.char_indices() {
            match (quote, c) {
                (None, '"' | '\'') => quote = Some(c),
                (Some(q), c) if q == c => quote = None,
                (None, '>') => {
                    end = Some(i);
                    break;
                }
                (None, '<') => panic!("'<' in a tag: {tag:.80}"),
                _ => {}
            }
        }
        let end = end.unwrap_or_else(|| panic!("a tag that does not end: {tag:.80}"));
        let inside = &tag[..end];
        rest = &tag[end + 1..];
        if inside.starts_with(['?', '!']) {
            continue;
        }
        let name: String = inside
            .trim_start_matches('/')
            .chars()
            .take_while(|c| c.is_ascii_alphanumeric())
            .collect();
        for attribute in inside.split('"').skip(1).step_by(2) {
            references(attribute);
        }
        if inside.starts_with('/') {
            assert_eq!(
                open.pop().as_deref(),
                Some(name.as_str()),
                "closed out of order"
            );
        } else if !inside.ends_with('/') && !void.contains(&name.as_str()) {
            open.push(name.clone());
        }
        seen.insert(name);
        // CSS is no markup.
        if inside == "style" {
            rest = rest.split_once("</style>").expect("closed").1;
            open.pop();
        }
    }
    references(rest);
    assert_eq!(open, [""; 0], "elements left open");
    seen
}

/// Every '&' starts a reference.
#[track_caller]
fn references(text: &str) {
    for (at, _) in text.match_indices('&') {
        let name: String = text[at + 1..].chars().take_while(|c| *c != ';').collect();
        let known = ["amp", "lt", "gt", "quot", "apos"].contains(&name.as_str());
        let number = name
            .strip_prefix('#')
            .is_some_and(|n| n.parse::<u32>().is_ok());
        assert!(known || number, "a bare '&' in {text:.80}");
    }
}
