//! Models that a pass must refuse rather than break, made from fixtures by small
//! patches.

use std::path::PathBuf;

use duet_onnx::arch::{Role, Vlm};
use duet_onnx::ir::{Model, Patch, ints};
use duet_onnx::onnx::read;
use duet_onnx::passes::{Recipe, rewrite};

fn fixture(file: &str) -> Model {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("models/llava/fixtures")
        .join(file);
    read(&path).expect("a fixture")
}

fn refusal(model: Model, recipe: &str) -> String {
    let vlm = Vlm::new(vec![("model.onnx".into(), String::new(), model)]);
    let recipe = Recipe::parse(recipe).expect("a recipe");
    rewrite(vlm, &recipe).expect_err("a refusal").to_string()
}

const MERGE: &str = "version: 1\npasses:\n  - token_merge: {dominant: 9, contextual: 3}";
const PRUNE: &str =
    "version: 1\nmarker: input\npasses:\n  - visual_prune: {drops: [{after_layer: 3, keep: 0.5}]}";

#[test]
fn merging_in_front_of_pooling_is_refused() {
    let model = fixture("ts-sdpa-mha/onnx/vision_encoder.onnx");
    let Role::Vision(tower) = Role::of(&model) else {
        panic!("a vision encoder");
    };
    assert_eq!(tower.grid, None);
    // [n, 81, 48] → [n, 48, 9, 9] → pooled with overlap → [n, 81, 48].
    let mut patch = Patch::new(&model, "pool");
    let grid = patch.reshape(tower.entry, &[-1, 9, 9, 48]);
    let grid = patch.transpose(grid, &[0, 3, 1, 2]);
    let edges = vec![
        ints("kernel_shape", &[3, 3]),
        ints("strides", &[1, 1]),
        ints("pads", &[1, 1, 1, 1]),
    ];
    let pooled = patch.op_with("AveragePool", &[grid], edges);
    let list = patch.reshape(pooled, &[-1, 48, 81]);
    let list = patch.transpose(list, &[0, 2, 1]);
    patch.rewire_all(tower.entry, list);
    let plan = patch.finish();
    let model = model.apply(plan).expect("applies");
    let message = refusal(model, MERGE);
    assert!(
        message.contains("as a grid") && message.contains("duet/pool/AveragePool"),
        "{message}"
    );
}

#[test]
fn a_tower_that_takes_token_ids_is_a_whole_model() {
    use duet_onnx::ir::{DataType, Dim, ValueType};
    let model = fixture("ts-sdpa-mha/onnx/vision_encoder.onnx");
    let mut patch = Patch::new(&model, "ids");
    patch.add_input(
        "input_ids",
        ValueType::tensor(DataType::Int64, vec![Dim::Unknown; 2]),
    );
    let plan = patch.finish();
    let message = refusal(model.apply(plan).expect("applies"), MERGE);
    assert!(
        message.contains("a whole model") && message.contains("looked up with 'input_ids'"),
        "{message}"
    );
}

#[test]
fn layers_that_share_keys_are_refused() {
    let model = fixture("dynamo18-mha/onnx/decoder_model_merged.onnx");
    let Role::Decoder(decoder) = Role::of(&model) else {
        panic!("a decoder");
    };
    // Layer 5 also reads what layer 1 made of the tokens: nothing between them is
    // all that the later layers depend on.
    let early = decoder.layers[1].new_key.value;
    let late = decoder.layers[5].new_key.value;
    let reader = model.value(late).uses[0];
    let mut patch = Patch::new(&model, "share");
    let sum = patch.op("Add", &[late, early]);
    patch.rewire(reader.node, reader.slot, sum);
    let plan = patch.finish();
    let message = refusal(model.apply(plan).expect("applies"), PRUNE);
    assert!(
        message.contains("are entered by the same tensor"),
        "{message}"
    );
}

#[test]
fn a_second_tensor_across_the_drop_point_is_refused() {
    let model = fixture("dynamo18-mha/onnx/decoder_model_merged.onnx");
    let Role::Decoder(decoder) = Role::of(&model) else {
        panic!("a decoder");
    };
    // An output of layer 7 that the logits do not depend on reads layer 1's cache.
    let value = |layer: usize| decoder.layers[layer].present.unwrap().1;
    let (early, late) = (value(1), value(7));
    let ty = model.value(late).ty.clone().expect("a typed output");
    let index = model
        .graph()
        .outputs
        .iter()
        .position(|v| *v == late)
        .expect("an output");
    let mut patch = Patch::new(&model, "skip");
    let sum = patch.op("Add", &[late, early]);
    patch.replace_output(index, sum, ty);
    let plan = patch.finish();
    let message = refusal(model.apply(plan).expect("applies"), PRUNE);
    assert!(
        message.contains("carries token data across the drop point"),
        "{message}"
    );
}

#[test]
fn an_unknown_input_that_later_layers_read_is_refused() {
    use duet_onnx::ir::{DataType, Dim, ValueType};
    let model = fixture("dynamo18-mha/onnx/decoder_model_merged.onnx");
    let Role::Decoder(decoder) = Role::of(&model) else {
        panic!("a decoder");
    };
    let late = decoder.layers[5].boundary[0];
    let reader = model.value(late).uses[0];
    let mut patch = Patch::new(&model, "gate");
    let shape = vec![
        Dim::param("batch_size"),
        Dim::param("sequence_length"),
        Dim::Known(1),
    ];
    let gate = patch.add_input("token_gate", ValueType::tensor(DataType::Float, shape));
    let gated = patch.op("Mul", &[late, gate]);
    patch.rewire(reader.node, reader.slot, gated);
    let plan = patch.finish();
    let message = refusal(model.apply(plan).expect("applies"), PRUNE);
    assert!(message.contains("'token_gate'"), "{message}");
}

/// The residual tensor `x` of a layer becomes `x + softmax(x·xᵀ)·x`.
fn with_another_attention(model: Model, at: duet_onnx::ir::ValueId) -> Model {
    let mut patch = Patch::new(&model, "plant");
    let key = patch.transpose(at, &[0, 2, 1]);
    let scores = patch.op("MatMul", &[at, key]);
    let shares = patch.softmax(scores);
    let mixed = patch.op("MatMul", &[shares, at]);
    let sum = patch.op("Add", &[at, mixed]);
    patch.rewire_all(at, sum);
    let plan = patch.finish();
    model.apply(plan).expect("applies")
}

#[test]
fn an_attention_that_is_no_layers_is_not_skipped() {
    let model = fixture("ts-eager-mha/onnx/decoder_model_merged.onnx");
    let Role::Decoder(decoder) = Role::of(&model) else {
        panic!("a decoder");
    };
    let [at] = decoder.layers[4].boundary[..] else {
        panic!("one residual tensor")
    };
    let message = refusal(with_another_attention(model, at), PRUNE);
    assert!(
        message.contains("belongs to none of the 8 layers")
            && message.contains("duet/plant/Softmax"),
        "{message}"
    );
}
