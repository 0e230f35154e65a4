//! "Did you mean": errors about words that are not known.

/// A sentence about an unknown word: the nearest known one, or all of them.
pub(crate) fn unknown(what: &str, name: &str, known: &[&str], place: &str) -> String {
    let nearest = known
        .iter()
        .map(|k| (strsim::damerau_levenshtein(k, name), *k))
        .min()
        .filter(|(distance, k)| *distance <= k.len().max(name.len()) / 2);
    let hint = match nearest {
        Some((_, k)) => format!("did you mean '{k}'?"),
        None => format!("known: {}", known.join(", ")),
    };
    format!("unknown {what} '{name}' in {place}; {hint}")
}
