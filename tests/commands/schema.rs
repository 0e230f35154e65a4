//! JSON documents against their committed schemas.

use std::path::Path;

use serde_json::{Value, json};

/// A schema by its path in the repository.
pub(crate) fn committed(path: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    let text = std::fs::read_to_string(path).expect("the committed schema");
    serde_json::from_str(&text).expect("JSON")
}

/// Where a document is not what a schema says.
pub(crate) fn wrong(schema: &Value, document: &Value) -> Vec<String> {
    let mut wrong = Vec::new();
    compare(schema, schema, document, "", &mut wrong);
    wrong
}

/// A document is what a committed schema says, and as `broken` it is not, in so many places.
#[track_caller]
#[allow(dead_code, reason = "not each test binary breaks documents")]
pub(crate) fn conforms(schema: &str, document: &Value, broken: &Value, places: usize) {
    let schema = committed(schema);
    assert_eq!(wrong(&schema, document), [""; 0]);
    // The comparison sees what does not conform.
    let found = wrong(&schema, broken);
    assert_eq!(found.len(), places, "{found:?}");
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
            // Of numbers; whether it has to be one says the type.
            "minimum" => check(value.is_null() || value.as_f64() >= rule.as_f64(), rule),
            "minItems" | "maxItems" => {
                let (n, limit) = (value.as_array().map(Vec::len), rule.as_u64());
                let (n, limit) = (n.expect("a list"), limit.expect("a number") as usize);
                check(
                    if key == "minItems" {
                        n >= limit
                    } else {
                        n <= limit
                    },
                    rule,
                );
            }
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
            | "minimum" | "minItems" | "maxItems" | "required" => {}
            other => panic!("the test does not know the keyword {other}"),
        }
    }
}
