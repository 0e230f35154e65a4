//! Embedding graphs that put image features in their places themselves: the
//! marker channel follows the features, whatever nodes copy them.

mod commands;
mod common;

use commands::{runtime, source};
use common::{FLOAT, INT64, floats, graph, int, ints, load, longs, model, node, value};
use duet_onnx::arch::{Embedding, Role, Vlm};
use duet_onnx::ir::{Model, verify};
use duet_onnx::onnx::{read, serialize};
use duet_onnx::passes::{Recipe, rewrite};
use duet_onnx::proto::{AttributeProto, GraphProto, NodeProto};
use duet_onnx::runtime::{Embedder, Session, SessionOptions, Tensor};
use ndarray::{Array2, arr2};

/// The placeholder of all graphs here; the exported one has the same.
const IMAGE: i64 = 4;

fn with(mut node: NodeProto, attributes: &[AttributeProto]) -> NodeProto {
    node.attribute.extend_from_slice(attributes);
    node
}

/// `ids [b, s]`, `features [n, 2, 3]` → `embeds [b, s, 3]` by the nodes between
/// `rows` (text), `hit` (bool `[b, s]`) and `flat` (features `[n·2, 3]`).
fn embedding(features: &[i64], nodes: &[NodeProto]) -> GraphProto {
    let table: Vec<f32> = (0..30).map(|v| v as f32 * 0.25 - 1.0).collect();
    let mut token = longs("token", &[IMAGE]);
    token.dims.clear();
    let mut all = vec![
        node("Gather", &["table", "ids"], &["rows"]),
        node("Equal", &["ids", "token"], &["hit"]),
        node("Reshape", &["features", "to_rows"], &["flat"]),
    ];
    all.extend_from_slice(nodes);
    graph(
        "embedding",
        &[
            value("ids", INT64, &[-1, -1]),
            value("features", FLOAT, features),
        ],
        &[value("embeds", FLOAT, &[-1, -1, 3])],
        &[
            floats("table", &[10, 3], &table),
            token,
            longs("to_rows", &[-1, 3]),
            longs("last", &[-1]),
            longs("all", &[-1]),
            longs("one", &[1]),
        ],
        &all,
    )
}

/// `ScatterND` at the places of the token.
fn scatter_nd(features: &[i64]) -> Model {
    let nodes = [
        node("NonZero", &["hit"], &["where"]),
        with(
            node("Transpose", &["where"], &["places"]),
            &[ints("perm", &[1, 0])],
        ),
        node("ScatterND", &["rows", "places", "flat"], &["embeds"]),
    ];
    load(&model(embedding(features, &nodes)))
}

/// As `masked_scatter` is exported: each place gathers its own row, then `Where`.
fn masked_scatter() -> Model {
    let nodes = [
        with(
            node("Cast", &["hit"], &["number"]),
            &[int("to", INT64.into())],
        ),
        node("Reshape", &["number", "all"], &["line"]),
        node("CumSum", &["line", "axis"], &["count"]),
        node("Sub", &["count", "one"], &["before"]),
        node("Max", &["before", "zero"], &["index"]),
        // A prompt without an image has a row to point at.
        node("Concat", &["flat", "spare"], &["filled"]),
        with(
            node("Gather", &["filled", "index"], &["taken"]),
            &[int("axis", 0)],
        ),
        node("Shape", &["rows"], &["shape"]),
        node("Reshape", &["taken", "shape"], &["placed"]),
        node("Unsqueeze", &["hit", "last"], &["mask"]),
        node("Where", &["mask", "placed", "rows"], &["embeds"]),
    ];
    let mut graph = embedding(&[-1, 2, 3], &nodes);
    let mut axis = longs("axis", &[0]);
    axis.dims.clear();
    graph.initializer.push(axis);
    graph.initializer.push(longs("zero", &[0]));
    graph.initializer.push(floats("spare", &[1, 3], &[9.0; 3]));
    for node in &mut graph.node {
        if node.op_type.as_deref() == Some("Concat") {
            node.attribute.push(int("axis", 0));
        }
    }
    load(&model(graph))
}

/// Element by element into a filler, then `Where` with the text, scaled before.
fn scatter_elements() -> Model {
    let nodes = [
        node("Mul", &["rows", "scale"], &["scaled"]),
        node("Unsqueeze", &["hit", "last"], &["mask"]),
        node("Shape", &["rows"], &["shape"]),
        node("Expand", &["mask", "shape"], &["wide"]),
        node("Reshape", &["wide", "all"], &["line"]),
        node("NonZero", &["line"], &["where"]),
        node("Reshape", &["where", "all"], &["places"]),
        node("Reshape", &["flat", "all"], &["values"]),
        node("Reshape", &["scaled", "all"], &["texts"]),
        node(
            "ScatterElements",
            &["texts", "places", "values"],
            &["mixed"],
        ),
        node("Reshape", &["mixed", "shape"], &["embeds"]),
    ];
    let mut graph = embedding(&[-1, 2, 3], &nodes);
    graph.initializer.push(floats("scale", &[1], &[5.0]));
    load(&model(graph))
}

fn exported() -> Model {
    let path = source("models/forms/fixtures/genai/embedding.onnx");
    read(&path).expect("a model")
}

fn recognised(model: &Model) -> Embedding {
    match Role::of(model) {
        Role::Embedding(found) => *found,
        other => panic!("{other:?}"),
    }
}

/// The graph as `visual_prune` leaves it beside a decoder and a tower.
fn marked(model: &Model) -> Model {
    let fixture = |name: &str| read(&commands::part("ts-sdpa-gqa", name)).expect("a model");
    let vlm = Vlm::new(vec![
        (
            "vision.onnx".into(),
            String::new(),
            fixture("vision_encoder"),
        ),
        ("embed.onnx".into(), String::new(), model.clone()),
        (
            "text.onnx".into(),
            String::new(),
            fixture("decoder_model_merged"),
        ),
    ]);
    let text = "version: 1\npasses:\n  - visual_prune: {drops: [{after_layer: 2, keep: 0.5}]}\n";
    let done = rewrite(vlm, &Recipe::parse(text).expect("a recipe")).expect("rewritten");
    done.vlm.parts[1].model.clone()
}

fn open(model: &Model) -> Embedder {
    runtime();
    let bytes = serialize(verify(model).expect("verified")).to_vec();
    let options = SessionOptions {
        intra_threads: 1,
        ..SessionOptions::default()
    };
    Embedder::new(Session::from_bytes(&bytes, "embedding", &options).expect("opens")).expect("fits")
}

/// Features of `images` images, `[rows, width]` each, and the same with a mark.
fn features(images: usize, rows: usize, width: usize, mark: f32) -> (Vec<Tensor>, Vec<Tensor>) {
    let make = |image: usize, wide: usize| {
        let data: Vec<f32> = (0..rows * wide)
            .map(|i| match (i / wide, i % wide) {
                (_, channel) if channel == width => mark,
                (row, channel) => (image * 100 + row * 10 + channel) as f32 + 0.5,
            })
            .collect();
        Tensor::new([rows, wide], data).expect("a tensor")
    };
    let all = |wide| (0..images).map(|i| make(i, wide)).collect();
    (all(width), all(width + 1))
}

/// Old embeddings and the place of every feature against what the marked graph
/// gives for the same ids.
#[track_caller]
fn agrees(model: &Model, ids: &Array2<i64>, images: usize, rows: usize, mark: f32) {
    let width = 3.max(recognised(model).width.map_or(3, |w| w as usize));
    let (plain, wide) = features(images, rows, width, mark);
    let (mut old, mut new) = (open(model), open(&marked(model)));
    assert!(old.takes_features() && new.takes_features());
    let before = old.run_with(ids.clone(), &plain).expect("runs");
    let after = new.run_with(ids.clone(), &wide).expect("runs");
    let (b, s) = ids.dim();
    assert_eq!(before.shape(), [b, s, width]);
    assert_eq!(after.shape(), [b, s, width + 1]);
    let (before, after) = (
        before.f32s().expect("floats"),
        after.f32s().expect("floats"),
    );
    let places = before.chunks(width).zip(after.chunks(width + 1));
    for ((old, new), id) in places.zip(ids) {
        assert_eq!(old, &new[..width], "embedding of {id}");
        assert_eq!(
            new[width],
            if *id == IMAGE { mark } else { 0.0 },
            "mark of {id}"
        );
    }
}

fn every_way(model: &Model, rows: usize) {
    let mut one = vec![1, 2];
    one.extend(vec![IMAGE; rows]);
    one.push(3);
    let mut two = one.clone();
    two.extend(vec![IMAGE; rows]);
    let row = |ids: &[i64]| Array2::from_shape_fn((1, ids.len()), |(_, i)| ids[i]);
    agrees(model, &row(&one), 1, rows, 1.0);
    agrees(model, &row(&two), 2, rows, 1.0);
    // Whatever the channel carries arrives.
    agrees(model, &row(&one), 1, rows, 2.0);
    // A batch, and text alone: a decode step.
    let batch = Array2::from_shape_fn((2, one.len()), |(r, i)| one[(i + r) % one.len()]);
    agrees(model, &batch, 2, rows, 1.0);
    agrees(model, &arr2(&[[7]]), 0, rows, 1.0);
}

#[test]
fn scatter_nd_is_followed() {
    every_way(&scatter_nd(&[-1, 2, 3]), 2);
    // All rows of all images in one list.
    every_way(&scatter_nd(&[-1, 3]), 2);
}

#[test]
fn masked_scatter_is_followed() {
    every_way(&masked_scatter(), 2);
}

#[test]
fn scatter_elements_is_followed_and_text_may_be_scaled() {
    every_way(&scatter_elements(), 2);
}

#[test]
fn the_exported_graph_is_followed() {
    every_way(&exported(), 81);
}

#[test]
fn what_was_found_is_said() {
    for (model, rank, others) in [
        (scatter_nd(&[-1, 2, 3]), 3, 1),
        (scatter_nd(&[-1, 3]), 2, 1),
        (masked_scatter(), 3, 2),
        (exported(), 3, 1),
    ] {
        let found = recognised(&model).scatter.expect("features go in");
        assert_eq!(found.rank, rank);
        assert_eq!(found.others.len(), others, "{:?}", found.others);
        assert_eq!(found.placeholder, Some(IMAGE));
    }
}

#[test]
fn features_that_are_computed_with_are_refused_by_name() {
    let refused = |nodes: &[NodeProto]| {
        let mut graph = embedding(&[-1, 2, 3], nodes);
        graph.initializer.push(floats("half", &[1], &[0.5]));
        match Role::of(&load(&model(graph))) {
            Role::Unknown(reasons) => reasons.last().expect("a reason").to_string(),
            other => panic!("{other:?}"),
        }
    };
    let places = [
        node("NonZero", &["hit"], &["where"]),
        with(
            node("Transpose", &["where"], &["places"]),
            &[ints("perm", &[1, 0])],
        ),
    ];
    let ending = |nodes: &[NodeProto]| [&places, nodes].concat();
    let scaled = ending(&[
        node("Mul", &["flat", "half"], &["scaled"]),
        node("ScatterND", &["rows", "places", "scaled"], &["embeds"]),
    ]);
    let message = refused(&scaled);
    assert!(
        message.contains("Mul 'Mul_scaled' changes the features"),
        "{message}"
    );
    let text = reduction("add");
    let added = ending(&[with(
        node("ScatterND", &["rows", "places", "flat"], &["embeds"]),
        &[text],
    )]);
    let message = refused(&added);
    assert!(
        message.contains("ScatterND 'ScatterND_embeds' changes"),
        "{message}"
    );
    let unused = [node("Identity", &["rows"], &["embeds"])];
    let message = refused(&unused);
    assert!(
        message.contains("'features' does not reach 'embeds'"),
        "{message}"
    );
}

/// `reduction = how`.
fn reduction(how: &str) -> AttributeProto {
    AttributeProto {
        name: Some("reduction".into()),
        s: Some(how.as_bytes().to_vec().into()),
        r#type: Some(duet_onnx::proto::attribute_proto::AttributeType::String.into()),
        ..Default::default()
    }
}
