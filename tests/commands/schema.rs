//! JSON documents against their committed schemas.

use serde_json::{Value, json};

/// A document is what a committed schema says, and as `broken` it is not, in so many places.
#[track_caller]
pub(crate) fn conforms(schema: &str, document: &Value, broken: &Value, places: usize) {
    let text = std::fs::read_to_string(super::source(schema)).expect("the committed schema");
    let schema: Value = serde_json::from_str(&text).expect("JSON");
    let compared = |document: &Value| {
        let mut wrong = Vec::new();
        compare(&schema, &schema, document, "", &mut wrong);
        wrong
    };
    assert_eq!(compared(document), [""; 0]);
    // The comparison sees what does not conform.
    let wrong = compared(broken);
    assert_eq!(wrong.len(), places, "{wrong:?}");
}

/// The keywords that the schema uses; another is an error.
fn compare(schema: &Value, root: &Value, value: &Value, at: &str, wrong: &mut Vec<String>) {
    let is = |kind: &Value| match kind.as_str().expect("a type") {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "integer" => value.is_u64(),
        "number" => value.is_number(),
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        other => panic!("type {other}"),
    };
    let mut check = |fits: bool, rule: &Value| {
        if !fits {
            wrong.push(format!("{at}: {value} is not {rule}"));
        }
    };
    let rules = schema.as_object().expect("a schema");
    for (key, rule) in rules {
        match key.as_str() {
            "type" => check(
                rule.as_array()
                    .map_or_else(|| is(rule), |any| any.iter().any(is)),
                rule,
            ),
            "const" => check(value == rule, rule),
            "enum" => check(rule.as_array().expect("a list").contains(value), rule),
            "minimum" => check(value.as_f64() >= rule.as_f64(), rule),
            "required" => {
                let names = rule.as_array().expect("a list").iter();
                let missing =
                    names.filter(|name| value.get(name.as_str().expect("a name")).is_none());
                missing.for_each(|name| check(false, &json!({ "required": name })));
            }
            _ => {}
        }
    }
    for (key, rule) in rules {
        match key.as_str() {
            "$ref" => {
                let name = rule.as_str().and_then(|r| r.strip_prefix("#/$defs/"));
                compare(
                    &root["$defs"][name.expect("a local reference")],
                    root,
                    value,
                    at,
                    wrong,
                );
            }
            "anyOf" => {
                let mut why = Vec::new();
                let fits = rule.as_array().expect("a list").iter().any(|rule| {
                    let mut own = Vec::new();
                    compare(rule, root, value, at, &mut own);
                    let fits = own.is_empty();
                    why.append(&mut own);
                    fits
                });
                if !fits {
                    wrong.push(format!("{at}: none of several: {}", why.join("; ")));
                }
            }
            "items" => {
                for (index, item) in value.as_array().into_iter().flatten().enumerate() {
                    compare(rule, root, item, &format!("{at}[{index}]"), wrong);
                }
            }
            "properties" => {
                for (name, rule) in rule.as_object().expect("an object") {
                    if let Some(value) = value.get(name) {
                        compare(rule, root, value, &format!("{at}.{name}"), wrong);
                    }
                }
            }
            "additionalProperties" => {
                for (name, value) in value.as_object().into_iter().flatten() {
                    if rules.get("properties").and_then(|p| p.get(name)).is_some() {
                        continue;
                    }
                    match rule {
                        Value::Bool(false) => {
                            wrong.push(format!("{at}: '{name}' is not described"))
                        }
                        rule => compare(rule, root, value, &format!("{at}.{name}"), wrong),
                    }
                }
            }
            "$schema" | "$defs" | "title" | "description" | "type" | "const" | "enum"
            | "minimum" | "required" => {}
            other => panic!("the test does not know the keyword {other}"),
        }
    }
}
