//! Names of cache inputs and outputs: the one thing about a decoder that names decide, since
//! exporters keep to it and clients rely on it.

/// (layer, is key) of a cache name such as `present.3.key`,
/// `past_key_values.3.value` or `past_key_3`; `what` is `past` or `present`.
pub fn cache_name(name: &str, what: &str) -> Option<(usize, bool)> {
    let rest = name.strip_prefix(what)?;
    let digits: String = rest
        .chars()
        .skip_while(|c| !c.is_ascii_digit())
        .take_while(char::is_ascii_digit)
        .collect();
    let layer = digits.parse().ok()?;
    // `past_key_values` holds both words: the layer's own word comes last.
    let own = rest.replace("key_values", "");
    match (own.contains("key"), own.contains("value")) {
        (true, false) => Some((layer, true)),
        (false, true) => Some((layer, false)),
        _ => None,
    }
}
