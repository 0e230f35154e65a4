//! Interfaces that exporters give beside the usual one, made from a fixture by editing its files: they are
//! rewritten, and `duet validate` runs them.

mod common;
mod support;

use bytes::Bytes;
use prost::Message;

use duet_onnx::arch::{Role, Vlm};
use duet_onnx::ir::verify;
use duet_onnx::onnx::{read_bytes, serialize};
use duet_onnx::passes::rewrite;
use duet_onnx::proto::tensor_shape_proto::Dimension;
use duet_onnx::proto::tensor_shape_proto::dimension::Value;
use duet_onnx::proto::type_proto::Value as Type;
use duet_onnx::proto::{
    AttributeProto, GraphProto, TensorProto, ValueInfoProto, attribute_proto::AttributeType,
};

use common::{int, ints, longs, node};
use support::models::{fixture, recipe, recipe_text, rewritten};
use support::reports::{failures, validated};

const MERGE: &str = "{dominant: 20, contextual: 4, cls: drop}";
const PRUNE: &str = "{drops: [{after_layer: 3, keep: 0.5}, {after_layer: 5, keep: 0.0}]}";

/// A fixture with the graph of each of its files changed.
fn edited(change: impl Fn(&Role, &mut GraphProto)) -> Vlm {
    let parts = fixture("ts-sdpa-gqa").parts.into_iter().map(|part| {
        let bytes = serialize(verify(&part.model).expect("a valid fixture"));
        let mut file =
            duet_onnx::proto::ModelProto::decode(&bytes.to_vec()[..]).expect("a written file");
        change(&part.role, file.graph.as_mut().expect("a graph"));
        let label = part.file.display().to_string();
        let model = read_bytes(&label, Bytes::from(file.encode_to_vec()));
        let model = model.unwrap_or_else(|e| panic!("{e}"));
        (part.file, part.variant, model)
    });
    Vlm::new(parts.collect())
}

/// Rewrites it and validates that: every check passes. How many scenarios were left out, and why.
fn valid(base: &Vlm) -> Vec<String> {
    let both = [("token_merge", MERGE), ("visual_prune", PRUNE)];
    valid_with(base, &recipe_text(&both, ""))
}

fn valid_with(base: &Vlm, text: &str) -> Vec<String> {
    let report = validated(base, &rewritten(base, text), text, 5);
    assert!(report.passed(), "{:#?}\n{text}", failures(&report));
    let details = report.findings.iter().map(|f| &f.detail);
    let left_out: Vec<String> = details
        .filter(|d| d.starts_with("left out"))
        .cloned()
        .collect();
    // Some scenario has run through both drop points, and tract has seen them.
    let all = |what: &str| report.findings.iter().any(|f| f.check.contains(what));
    assert!(all("tract: drop point 2") && all("one image"));
    assert!(
        report
            .findings
            .iter()
            .any(|f| f.detail.contains("8 kept sets equal"))
    );
    left_out
}

fn dims(value: &mut ValueInfoProto) -> &mut Vec<Dimension> {
    match value.r#type.as_mut().and_then(|t| t.value.as_mut()) {
        Some(Type::TensorType(t)) => &mut t.shape.as_mut().expect("a shape").dim,
        other => panic!("{other:?}"),
    }
}

/// Makes the input `name` one of element type `code`, cast to the type that it had.
fn retype(graph: &mut GraphProto, name: &str, code: i32) {
    let Some(input) = graph.input.iter_mut().find(|i| i.name() == name) else {
        return;
    };
    if let Some(Type::TensorType(t)) = input.r#type.as_mut().and_then(|t| t.value.as_mut()) {
        t.elem_type = Some(code);
    }
    let inner = format!("{name}/integers");
    for reader in &mut graph.node {
        for read in reader.input.iter_mut().filter(|i| *i == name) {
            read.clone_from(&inner);
        }
    }
    let mut cast = node("Cast", &[name], &[&inner]);
    cast.attribute.push(int("to", 7));
    graph.node.insert(0, cast);
}

#[test]
fn files_that_take_one_image_and_one_row_are_validated() {
    let base = edited(|_, graph| {
        for value in graph.input.iter_mut().chain(&mut graph.output) {
            dims(value)[0].value = Some(Value::DimValue(1));
        }
        graph.value_info.clear();
    });
    let left_out = valid(&base);
    assert_eq!(left_out.len(), 4, "{left_out:?}");
    assert!(left_out.iter().all(|d| d.contains("one row at a time")));
}

#[test]
fn masks_and_positions_of_other_element_types_are_validated() {
    // int32, bool, float.
    for (mask, positions) in [(6, 6), (9, 7), (1, 7)] {
        let base = edited(|role, graph| {
            if matches!(role, Role::Decoder(_)) {
                retype(graph, "attention_mask", mask);
                retype(graph, "position_ids", positions);
            }
        });
        assert_eq!(valid(&base), Vec::<String>::new());
    }
}

#[test]
fn a_decoder_without_a_mask_is_not_asked_about_padding() {
    let base = edited(|role, graph| {
        if !matches!(role, Role::Decoder(_)) {
            return;
        }
        graph.input.retain(|i| i.name() != "attention_mask");
        let numbers = [("zero", 0), ("one", 1), ("two", 2), ("three", 3)];
        let numbers = numbers.map(|(name, number)| longs(name, &[number]));
        graph.initializer.extend(numbers);
        let mut ones = node("ConstantOfShape", &["made/shape"], &["attention_mask"]);
        ones.attribute.push(AttributeProto {
            name: Some("value".into()),
            r#type: Some(AttributeType::Tensor.into()),
            t: Some(longs("value", &[1])),
            ..AttributeProto::default()
        });
        let mut shape = node("Concat", &["made/batch", "made/length"], &["made/shape"]);
        shape.attribute.push(int("axis", 0));
        let nodes = [
            node("Shape", &["inputs_embeds"], &["made/entry"]),
            node("Slice", &["made/entry", "zero", "one"], &["made/batch"]),
            node("Slice", &["made/entry", "one", "two"], &["made/new"]),
            node("Shape", &["past_key_values.0.key"], &["made/cache"]),
            node("Slice", &["made/cache", "two", "three"], &["made/past"]),
            node("Add", &["made/past", "made/new"], &["made/length"]),
            shape,
            ones,
        ];
        graph.node.splice(0..0, nodes);
    });
    let left_out = valid(&base);
    assert_eq!(left_out.len(), 3, "{left_out:?}");
    assert!(left_out.iter().all(|d| d.contains("no attention_mask")));
}

#[test]
fn caches_of_other_names_and_weights_among_the_inputs_are_validated() {
    let base = edited(|role, graph| {
        let weights = graph.initializer.iter().map(|t| ValueInfoProto {
            name: t.name.clone(),
            r#type: Some(duet_onnx::proto::TypeProto {
                value: Some(Type::TensorType(duet_onnx::proto::type_proto::Tensor {
                    elem_type: t.data_type,
                    shape: Some(duet_onnx::proto::TensorShapeProto {
                        dim: t
                            .dims
                            .iter()
                            .map(|&n| Dimension {
                                value: Some(Value::DimValue(n)),
                                ..Dimension::default()
                            })
                            .collect(),
                    }),
                })),
                ..duet_onnx::proto::TypeProto::default()
            }),
            ..ValueInfoProto::default()
        });
        let weights: Vec<_> = weights.collect();
        graph.input.extend(weights);
        if !matches!(role, Role::Decoder(_)) {
            return;
        }
        // past_key_values.3.key → past_key_3, past_key_values.4.key → past.4.k
        let rename = |name: &mut String| {
            for (old, new) in [("past_key_values.", "past"), ("present.", "present")] {
                let parts = name.strip_prefix(old).and_then(|rest| rest.split_once('.'));
                if let Some((layer, part)) = parts {
                    let odd = layer.ends_with(['1', '3', '5', '7', '9']);
                    *name = match odd {
                        true => format!("{new}_{part}_{layer}"),
                        false => format!("{new}.{layer}.{}", &part[..1]),
                    };
                    return;
                }
            }
        };
        let ports = graph.input.iter_mut().chain(&mut graph.output);
        ports.filter_map(|p| p.name.as_mut()).for_each(rename);
        let nodes = graph.node.iter_mut();
        nodes
            .flat_map(|n| n.input.iter_mut().chain(&mut n.output))
            .for_each(rename);
    });
    assert_eq!(valid(&base), Vec::<String>::new());
}

#[test]
fn an_encoder_of_no_known_structure_is_pruned_behind_and_not_merged_in() {
    // Softmax as exponentials and their sum: no attention is recognised.
    let base = edited(|role, graph| {
        if !matches!(role, Role::Vision(_)) {
            return;
        }
        let nodes = std::mem::take(&mut graph.node);
        for one in nodes {
            if one.op_type() != "Softmax" {
                graph.node.push(one);
                continue;
            }
            let out = one.output[0].clone();
            let (exp, sum) = (format!("{out}/exp"), format!("{out}/sum"));
            graph.node.extend([
                node("Exp", &[&one.input[0]], &[&exp]),
                node("ReduceSum", &[&exp, "made/last"], &[&sum]),
                node("Div", &[&exp, &sum], &[&out]),
            ]);
        }
        graph.initializer.push(longs("made/last", &[-1]));
    });
    let (_, encoder) = base.encoders().next().expect("an encoder");
    assert_eq!(encoder.feature_width, Some(32));
    assert!(
        encoder.why.to_string().contains("no attention"),
        "{}",
        encoder.why
    );
    for rest in ["", "marker: input\n"] {
        let text = recipe_text(&[("visual_prune", PRUNE)], rest);
        assert_eq!(valid_with(&base, &text), Vec::<String>::new());
    }
    for (pass, how) in [("token_merge", MERGE), ("uniform_drop", "{keep: 20}")] {
        let text = recipe_text(&[(pass, how)], "");
        let refused = rewrite(base.clone(), &recipe(&text)).expect_err("a refusal");
        let message = refused.to_string();
        assert!(
            message.contains("no attention") && message.contains("visual_prune alone"),
            "{message}"
        );
    }
}

/// The numbers of a matrix, turned.
fn turned(weight: &TensorProto) -> TensorProto {
    let [rows, columns] = [0, 1].map(|axis| weight.dims[axis] as usize);
    let raw = weight.raw_data();
    let at = |place: usize| &raw[place * 4..place * 4 + 4];
    let places = (0..columns).flat_map(|c| (0..rows).map(move |r| r * columns + c));
    let mut made = weight.clone();
    made.dims.reverse();
    made.raw_data = Some(places.flat_map(at).copied().collect::<Vec<u8>>().into());
    made
}

/// As exporters leave a graph that fold no constants: sizes get their axis and weights are turned
/// when the graph runs.
#[test]
fn graphs_in_which_nothing_is_folded_are_read() {
    let base = edited(|_, graph| {
        let reads = |op: &str, slot: Option<usize>, name: &str| {
            graph.node.iter().any(|n| {
                let mut inputs = n.input.iter().enumerate();
                n.op_type() == op && inputs.any(|(at, i)| slot.is_none_or(|s| s == at) && i == name)
            })
        };
        let mut before = Vec::new();
        let mut weights = graph.initializer.clone();
        for weight in &mut weights {
            let name = weight.name().to_owned();
            let inner = format!("{name}/as-it-was");
            if weight.dims.len() == 2 && reads("MatMul", Some(1), &name) {
                *weight = turned(weight);
                let mut turn = node("Transpose", &[&inner], &[&name]);
                turn.attribute.push(ints("perm", &[1, 0]));
                before.push(turn);
            } else if weight.dims == [1] && weight.data_type() == 7 && reads("Concat", None, &name)
            {
                weight.dims.clear();
                before.push(node("Unsqueeze", &[&inner, "made/first"], &[&name]));
            } else {
                continue;
            }
            weight.name = Some(inner);
        }
        weights.push(longs("made/first", &[0]));
        graph.initializer = weights;
        graph.node.splice(0..0, before);
    });
    let (_, decoder) = base.decoders().next().expect("a decoder");
    assert_eq!(decoder.heads, Some(4));
    assert_eq!(valid(&base), Vec::<String>::new());
}
