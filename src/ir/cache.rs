//! Names of cache inputs and outputs: the one thing about a decoder that names decide, since
//! exporters keep to it and clients rely on it.

/// (layer, is key) of a cache name such as `present.3.key`,
/// `past_key_values.3.value`, `past_key_3` or `past.3.k`; `what` is `past` or `present`.
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
    let says = |word: &str| {
        let mut parts = own.split(|c: char| !c.is_ascii_alphanumeric());
        own.contains(word) || parts.any(|part| part == &word[..1])
    };
    match (says("key"), says("value")) {
        (true, false) => Some((layer, true)),
        (false, true) => Some((layer, false)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_layer_and_part() {
        for (name, what, found) in [
            ("past_key_values.3.key", "past", Some((3, true))),
            ("past_key_values.3.value", "past", Some((3, false))),
            ("present.12.value", "present", Some((12, false))),
            ("past_key_3", "past", Some((3, true))),
            ("past.3.k", "past", Some((3, true))),
            ("present_v_0", "present", Some((0, false))),
            ("past_key_values.7.v", "past", Some((7, false))),
            // Both in one tensor, no layer, and others' inputs.
            ("past_kv_0", "past", None),
            ("past_key_values.3", "past", None),
            ("past_key", "past", None),
            ("inputs_embeds", "past", None),
        ] {
            assert_eq!(cache_name(name, what), found, "{name}");
        }
    }
}
