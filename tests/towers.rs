//! Vision towers in the forms that optimisers leave and that other families have, made from a fixture by
//! small patches: each is recognised as the same tower, merged, and validated against the unmodified model.

mod support;

use bytes::Bytes;
use duet_onnx::arch::{Role, VisionTower, Vlm};
use duet_onnx::ir::{
    Attribute, DataType, Dim, Model, NodeId, Patch, Size, Tensor, ValueId, ValueType, consts,
    extract, float, int, verify,
};
use duet_onnx::onnx::{read_bytes, serialize};
use duet_onnx::passes::rewrite;
use duet_onnx::runtime::Value;
use duet_onnx::validate::scenario::Seeded;
use duet_onnx::validate::{Options, Report, check};

use support::models::{fixture, open, options, recipe, recipe_text, rewritten, runtime};

const MERGES: [&str; 3] = [
    "{dominant: 30, contextual: 6}",
    "{dominant: 12, contextual: 5, selector: uniform, cls: drop}",
    "{dominant: 0.2, contextual: 4, selector: local, cls: drop}",
];

/// The tower of a fixture that has everything apart: MatMul, Add, Softmax, LayerNormalization.
fn plain() -> (Model, VisionTower) {
    let vlm = fixture("ts-sdpa-mha");
    let (index, tower) = vlm.towers().next().expect("a tower");
    (vlm.parts[index].model.clone(), tower.clone())
}

/// The model with a patch, written and read again: a file like any other.
fn patched(model: &Model, change: impl FnOnce(&mut Patch<'_>)) -> Model {
    let mut model = model.clone();
    if model.opset("com.microsoft").is_none() {
        model.opset_imports.push(("com.microsoft".into(), 1));
    }
    let mut patch = Patch::new(&model, "made");
    change(&mut patch);
    let plan = patch.finish();
    let model = model.apply(plan).expect("the patch applies");
    let mut bytes = serialize(verify(&model).unwrap_or_else(|e| panic!("{e}"))).to_vec();
    // ModelProto.opset_import (field 8): domain "com.microsoft", version 1.
    bytes.extend([0x42, 17, 0x0a, 13]);
    bytes.extend(b"com.microsoft\x10\x01");
    read_bytes("made", Bytes::from(bytes)).expect("a model")
}

fn alone(model: Model) -> Vlm {
    Vlm::new(vec![("vision_encoder.onnx".into(), String::new(), model)])
}

fn tower_of(vlm: &Vlm) -> &VisionTower {
    match &vlm.parts[0].role {
        Role::Vision(tower) => tower,
        Role::Unknown(why) => panic!("not recognised: {why:?}"),
        other => panic!("recognised as {}", other.name()),
    }
}

fn validated(base: &Vlm, merge: &str) -> Report {
    runtime();
    let text = recipe_text(&[("token_merge", merge)], "");
    let options = Options {
        session: options(),
        seed: 11,
    };
    let report = check(
        base,
        &rewritten(base, &text),
        &recipe(&text),
        &options,
        &mut |_| (),
    );
    report.unwrap_or_else(|e| panic!("{e}\n{text}"))
}

fn passes(base: &Vlm, merge: &str) {
    let report = validated(base, merge);
    let failed: Vec<_> = report.findings.iter().filter(|f| !f.passed).collect();
    assert!(failed.is_empty(), "{merge}: {failed:#?}");
    assert!(
        report.findings.iter().any(|f| f.check.contains("tract")),
        "{merge}"
    );
    assert!(report.worst_features < 1e-4, "{merge}");
}

fn refusal(base: Vlm, merge: &str) -> String {
    let text = recipe_text(&[("token_merge", merge)], "");
    rewrite(base, &recipe(&text))
        .expect_err("a refusal")
        .to_string()
}

/// A projection `x · W + b` as its parts: (x, W, b).
fn linear(model: &Model, root: ValueId) -> (ValueId, ValueId, ValueId) {
    let add = model
        .producer_node(root)
        .filter(|n| n.is("Add"))
        .expect("a bias");
    let (a, b) = (add.input(0).expect("left"), add.input(1).expect("right"));
    let (bias, product) = if consts::constant(model, a).is_some() {
        (a, b)
    } else {
        (b, a)
    };
    let product = model.producer_node(product).expect("a product");
    (
        product.input(0).expect("x"),
        product.input(1).expect("W"),
        bias,
    )
}

/// Behind the softmax of the last block: (the value projection, what the output projection reads).
fn around(model: &Model, tower: &VisionTower) -> (ValueId, ValueId) {
    let reader = |v: ValueId| model.value(v).uses[0].node;
    let softmax = model
        .node(tower.site.node)
        .output(0)
        .expect("probabilities");
    let product = model.node(reader(softmax));
    let mut value = product.input(1).expect("values");
    while let Some(node) = model.producer_node(value).filter(|n| !n.is("Add")) {
        value = node.input(0).expect("an operand");
    }
    let mut end = product.output(0).expect("an output");
    while !model.node(reader(end)).is("MatMul") {
        end = model.node(reader(end)).output(0).expect("an output");
    }
    (value, end)
}

fn numbers(model: &Model, value: ValueId) -> Vec<f32> {
    let tensor = consts::constant(model, value).expect("a constant");
    let all = tensor.to_f64s(model.external()).expect("numbers");
    all.into_iter().map(|n| n as f32).collect()
}

fn matrix(dims: &[i64], numbers: &[f32]) -> Tensor {
    let bytes = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
    Tensor::raw("made", DataType::Float, dims.to_vec(), bytes)
}

/// The last attention as one operator: inputs and attributes from (x, packed weight, packed bias, [q, k, v]).
fn fused(
    op: &str,
    inputs: impl Fn(&mut Patch<'_>, ValueId, ValueId, ValueId, [ValueId; 3]) -> Vec<Option<ValueId>>,
    attributes: Vec<Attribute>,
) -> Vlm {
    let (model, tower) = plain();
    let (value, end) = around(&model, &tower);
    let roots = [tower.site.query.root, tower.site.key.root, value];
    let parts = roots.map(|root| linear(&model, root));
    let weights = parts.map(|p| numbers(&model, p.1));
    let rows = weights[0].len() / 48;
    let mut packed = Vec::new();
    for row in 0..rows {
        for weight in &weights {
            packed.extend_from_slice(&weight[row * 48..(row + 1) * 48]);
        }
    }
    let biases = parts.map(|p| numbers(&model, p.2)).concat();
    alone(patched(&model, |patch| {
        let weight = patch.constant(matrix(&[rows as i64, 144], &packed));
        let bias = patch.constant(matrix(&[144], &biases));
        let given = inputs(patch, parts[0].0, weight, bias, roots);
        let mut all = vec![int("num_heads", 4)];
        all.extend(attributes);
        let out = patch.node("com.microsoft", op, &given, 1, all)[0];
        patch.rewire_all(end, out);
    }))
}

/// Every form says the same of itself as the tower it was made from.
fn same_tower(vlm: &Vlm) {
    let (_, want) = plain();
    let found = tower_of(vlm);
    assert_eq!(
        (
            found.layers,
            found.heads,
            found.head_dim,
            found.cls,
            found.tokens,
            found.feature_width
        ),
        (
            want.layers,
            want.heads,
            want.head_dim,
            want.cls,
            want.tokens,
            want.feature_width
        )
    );
}

#[test]
fn a_packed_attention_is_scored_from_its_weight() {
    let vlm = fused(
        "Attention",
        |_, x, w, b, _| vec![Some(x), Some(w), Some(b)],
        vec![],
    );
    same_tower(&vlm);
    for merge in MERGES {
        passes(&vlm, merge);
    }
}

#[test]
fn a_quantised_packed_attention_is_scored_from_its_integers() {
    let vlm = fused(
        "QAttention",
        |patch, x, w, b, _| {
            let weight = patch.value(w).initializer.clone().expect("a weight");
            let all = weight.to_f64s(patch.model().external()).expect("numbers");
            let scale = all.iter().fold(0.0, |m: f64, n| m.max(n.abs())) / 127.0;
            let bytes = all
                .iter()
                .map(|n| ((n / scale).round() as i8) as u8)
                .collect();
            let weight = Tensor::raw("int8", DataType::Int8, weight.dims.clone(), bytes);
            let weight = patch.constant(weight);
            let scale = patch.f32(scale as f32);
            let tokens = patch.node("", "DynamicQuantizeLinear", &[Some(x)], 3, vec![]);
            let [x, x_scale, zero] = tokens[..] else {
                panic!("three outputs");
            };
            let given = [x, weight, b, x_scale, scale];
            [given.map(Some).as_slice(), &[None, Some(zero)]].concat()
        },
        vec![],
    );
    same_tower(&vlm);
    for merge in MERGES {
        passes(&vlm, merge);
    }
}

#[test]
fn a_stated_scale_and_a_position_bias_count() {
    let bias = |patch: &mut Patch<'_>| {
        let numbers: Vec<f32> = (0..4 * 82 * 82)
            .map(|i| ((i * 37 % 101) as f32 - 50.0) / 20.0)
            .collect();
        patch.constant(matrix(&[1, 4, 82, 82], &numbers))
    };
    let vlm = fused(
        "Attention",
        |patch, x, w, b, _| vec![Some(x), Some(w), Some(b), None, None, Some(bias(patch))],
        vec![float("scale", 0.5)],
    );
    same_tower(&vlm);
    for merge in MERGES {
        passes(&vlm, merge);
    }
}

#[test]
fn multi_head_attention_with_and_without_a_bias() {
    let apart = fused(
        "MultiHeadAttention",
        |_, _, _, _, roots| roots.map(Some).to_vec(),
        vec![],
    );
    same_tower(&apart);
    passes(&apart, MERGES[0]);
    let biased = fused(
        "MultiHeadAttention",
        |patch, _, _, bias, roots| {
            let model = patch.model();
            // Without their own bias, which the operator adds.
            let bare = roots.map(|root| {
                let (x, w, _) = linear(model, root);
                Some(patch.op("MatMul", &[x, w]))
            });
            [bare.as_slice(), &[Some(bias)]].concat()
        },
        vec![],
    );
    same_tower(&biased);
    for merge in MERGES {
        passes(&biased, merge);
    }
}

/// Scores and dominant patches of a merged model, without what is behind the tower: some layouts run on
/// other devices only.
fn ranked(base: &Vlm) -> (Vec<f32>, Vec<i64>) {
    let text = recipe_text(&[("token_merge", MERGES[0])], "");
    let merged = rewritten(base, &text);
    let (model, pixels) = (&merged.parts[0].model, tower_of(base).pixels);
    let typed = |name: &str, dtype| {
        let value = model.find(name).unwrap_or_else(|| panic!("{name}"));
        (value, ValueType::tensor(dtype, vec![Dim::Unknown; 2]))
    };
    let wanted = [
        typed("duet/token_merge/score", DataType::Float),
        typed("duet/token_merge/dominant_indices", DataType::Int64),
    ];
    let name = base.parts[0].model.name(pixels).to_owned();
    let given = model.find(&name).expect("pixels");
    let ty = model.value(given).ty.clone().expect("typed pixels");
    let part = extract(model, &[(given, ty)], &wanted).expect("a part");
    let mut session = open(&part, std::path::Path::new("ranked"));
    let images = Seeded::new(3).images(2, 3, 126, 126);
    let images = Value::new(images.into()).expect("pixels");
    let out = session.run(&[(name.as_str(), &images)]).expect("runs");
    let at = |i: usize| out.get(model.name(wanted[i].0)).expect("an output");
    let dominant = at(1).to_tensor().expect("indices");
    (
        at(0).f32s().expect("scores").into_owned(),
        dominant.i64s().expect("indices").to_vec(),
    )
}

#[test]
fn queries_and_keys_packed_with_values_are_taken_apart() {
    let pack = |patch: &mut Patch<'_>, roots: &[ValueId]| {
        let parts: Vec<ValueId> = roots
            .iter()
            .map(|root| patch.reshape(*root, &[-1, 82, 4, 1, 12]))
            .collect();
        let all = patch.concat(&parts, 3);
        Some(patch.reshape(all, &[-1, 82, 4, parts.len() as i64, 12]))
    };
    let (model, _) = plain();
    let want = ranked(&alone(model));
    assert_eq!((want.0.len(), want.1.len()), (2 * 81, 2 * 29));
    let all = fused(
        "MultiHeadAttention",
        |patch, _, _, _, roots| vec![pack(patch, &roots)],
        vec![],
    );
    let keys = fused(
        "MultiHeadAttention",
        |patch, _, _, _, roots| vec![Some(roots[0]), pack(patch, &roots[1..])],
        vec![],
    );
    for vlm in [all, keys] {
        same_tower(&vlm);
        let found = ranked(&vlm);
        assert_eq!(found.1, want.1);
        let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-6;
        assert!(found.0.iter().zip(&want.0).all(near));
    }
}

#[test]
fn a_causal_fused_attention_is_refused() {
    let vlm = fused(
        "Attention",
        |_, x, w, b, _| vec![Some(x), Some(w), Some(b)],
        vec![int("unidirectional", 1)],
    );
    let message = refusal(vlm, MERGES[0]);
    assert!(
        message.contains("'unidirectional'") && message.contains("export without"),
        "{message}"
    );
}

/// The tower's last sum behind a normalisation, as one operator or two.
fn normed(fused: bool) -> Vlm {
    let (model, tower) = plain();
    let sum = model.producer_node(tower.hidden).expect("a sum");
    let summed: Vec<ValueId> = sum.inputs.iter().flatten().copied().collect();
    let learned = |f: fn(usize) -> f32| matrix(&[48], &(0..48).map(f).collect::<Vec<f32>>());
    alone(patched(&model, |patch| {
        let weight = patch.constant(learned(|i| 0.5 + i as f32 / 40.0));
        let bias = patch.constant(learned(|i| (i as f32 - 24.0) / 10.0));
        let epsilon = vec![float("epsilon", 1e-5)];
        let out = match fused {
            true => {
                let inputs = [Some(summed[0]), Some(summed[1]), Some(weight), Some(bias)];
                let op = "SkipLayerNormalization";
                patch.node("com.microsoft", op, &inputs, 1, epsilon)[0]
            }
            false => patch.op_with("LayerNormalization", &[tower.hidden, weight, bias], epsilon),
        };
        patch.rewire_all(tower.hidden, out);
    }))
}

#[test]
fn a_normalisation_at_the_end_belongs_to_the_tower() {
    for fused in [false, true] {
        let vlm = normed(fused);
        same_tower(&vlm);
        let tower = tower_of(&vlm);
        let name = vlm.parts[0].model.name(tower.hidden).to_owned();
        assert!(
            name.contains("LayerNormalization") && name.starts_with("duet/made"),
            "{name}"
        );
        passes(&vlm, MERGES[0]);
    }
}

/// The fixture with its 9 × 9 patches shuffled into 3 × 3 tokens of 3 × 3 patches each, as Idefics3 does it.
fn shuffled(pool: bool) -> Vlm {
    let (model, tower) = plain();
    let Some(ValueType::Tensor { dtype, .. }) = model.value(tower.features).ty else {
        panic!("typed features");
    };
    let reader = model.value(tower.entry).uses[0].node;
    let projection = numbers(&model, model.node(reader).input(1).expect("a weight"));
    // [9 · 48, 32]: each patch with a weight of its own.
    let wide: Vec<f32> = (0..9)
        .flat_map(|part| {
            projection
                .iter()
                .map(move |w| w * (1.0 + part as f32 / 4.0) / 9.0)
        })
        .collect();
    alone(patched(&model, |patch| {
        let mut x = patch.reshape(tower.entry, &[-1, 9, 9, 48]);
        if pool {
            x = patch.transpose(x, &[0, 3, 1, 2]);
            let edge = |name| duet_onnx::ir::ints(name, &[3, 3]);
            x = patch.op_with(
                "AveragePool",
                &[x],
                vec![edge("kernel_shape"), edge("strides")],
            );
            x = patch.reshape(x, &[-1, 48, 9]);
            x = patch.transpose(x, &[0, 2, 1]);
            patch.rewire_all(tower.entry, x);
        } else {
            x = patch.reshape(x, &[-1, 9, 3, 144]);
            x = patch.transpose(x, &[0, 2, 1, 3]);
            x = patch.reshape(x, &[-1, 3, 3, 432]);
            x = patch.transpose(x, &[0, 2, 1, 3]);
            x = patch.reshape(x, &[-1, 9, 432]);
            let wide = patch.constant(matrix(&[432, 32], &wide));
            let projected = patch.op("MatMul", &[x, wide]);
            let old = patch.model().node(reader).output(0).expect("an output");
            patch.rewire_all(old, projected);
        }
        let dims = [None, Some(9), Some(32)];
        let dim = |d: Option<i64>| d.map_or(duet_onnx::ir::Dim::Unknown, duet_onnx::ir::Dim::Known);
        patch.set_type(
            tower.features,
            ValueType::tensor(dtype, dims.map(dim).to_vec()),
        );
    }))
}

#[test]
fn tokens_behind_a_pixel_shuffle_are_merged() {
    let vlm = shuffled(false);
    let tower = tower_of(&vlm);
    assert_eq!(
        (
            tower.patches(),
            tower.candidates(),
            tower.features_per_image()
        ),
        (Some(81), Some(9), Some(9))
    );
    let shuffle = tower.shuffle.as_ref().expect("a shuffle");
    // Token 1 is the second square of 3 × 3 patches in the first row of squares.
    assert_eq!(shuffle.per, 9);
    assert_eq!(shuffle.patches[9..18], [3, 4, 5, 12, 13, 14, 21, 22, 23]);
    for merge in [
        "{dominant: 3, contextual: 2, cls: drop}",
        "{dominant: 0.34, contextual: 2, selector: uniform, cls: drop}",
        "{dominant: 2, contextual: 3, selector: local, cluster_width: 2, cls: drop}",
        "{dominant: 1.0, contextual: 0, cls: drop}",
    ] {
        passes(&vlm, merge);
    }
    let message = refusal(vlm, "{dominant: 3, contextual: 2}");
    assert!(message.contains("'cls: drop'"), "{message}");
}

#[test]
fn merging_in_front_of_pooling_is_refused() {
    let message = refusal(shuffled(true), "{dominant: 3, contextual: 2, cls: drop}");
    assert!(
        message.contains("as a grid") && message.contains("AveragePool"),
        "{message}"
    );
}

/// A tower with `count` learned rows put in front of its tokens or behind them, which are left out again behind
/// the last block.
fn with_registers(count: i64, in_front: bool) -> Vlm {
    let (model, tower) = plain();
    let width = tower.heads * tower.head_dim;
    // What the first block reads: CLS and patches, with their places added.
    let joins = |n: &NodeId| {
        let node = model.node(*n);
        node.is("Concat") && node.attr_int("axis") == Some(1) && node.inputs.len() == 2
    };
    let joined = model
        .graph()
        .nodes
        .iter()
        .copied()
        .find(joins)
        .expect("a CLS token");
    let joined = model.node(joined).output(0).expect("an output");
    let readers = &model.value(joined).uses;
    let added = readers
        .iter()
        .find(|u| model.node(u.node).is("Add"))
        .expect("positions");
    let start = model.node(added.node).output(0).expect("an output");
    let model = patched(&model, |patch| {
        let data = vec![0x3e; usize::try_from(count * width).expect("few") * 4];
        let rows = patch.constant(Tensor::raw(
            "",
            DataType::Float,
            vec![1, count, width],
            data,
        ));
        let batch = patch.size_of(start, 0);
        let batch = patch.size_value(batch);
        let batch = patch.reshape(batch, &[1]);
        let rest = patch.i64s(&[count, width]);
        let shape = patch.concat(&[batch, rest], 0);
        let rows = patch.op("Expand", &[rows, shape]);
        let all = if in_front {
            [rows, start]
        } else {
            [start, rows]
        };
        let joined = patch.concat(&all, 1);
        patch.rewire_all(start, joined);
        let (from, to) = if in_front {
            (1 + count, i64::MAX)
        } else {
            (1, -count)
        };
        let cut = patch.slice(tower.hidden, Size::Known(from), Size::Known(to), 1);
        patch.rewire_all(tower.entry, cut);
    });
    alone(model)
}

#[test]
fn merging_in_a_tower_with_registers_is_refused() {
    for (count, in_front) in [(4, true), (4, false)] {
        let message = refusal(with_registers(count, in_front), MERGES[0]);
        assert!(
            message.contains("takes tokens by their place in the list"),
            "{message}"
        );
    }
}

#[test]
fn a_scale_and_a_head_width_that_are_computed_from_shapes_are_read() {
    let (model, tower) = plain();
    let model = patched(&model, |patch| {
        for operand in [&tower.site.query, &tower.site.key] {
            let mut at = operand.value;
            while at != operand.root {
                let id = model.producer_of(at).expect("a producer");
                let node = model.node(id);
                let first = node.input(0).expect("an operand");
                match node.op_type.as_str() {
                    // x.view(batch, -1, heads, x.shape[2] // heads)
                    "Reshape" => {
                        let total = patch.size_of(operand.root, 2);
                        let total = patch.size_value(total);
                        let total = patch.reshape(total, &[1]);
                        let heads = patch.i64s(&[tower.heads]);
                        let width = patch.op("Div", &[total, heads]);
                        let rows = patch.i64s(&[0, -1]);
                        let shape = patch.concat(&[rows, heads, width], 0);
                        patch.rewire(id, 1, shape);
                    }
                    // √(1 / √width), as a tracer writes the scale that PyTorch's own attention takes
                    "Mul" => {
                        let shape = patch.op("Shape", &[first]);
                        let width = patch.slice(shape, Size::Known(-1), Size::Known(i64::MAX), 0);
                        let width = patch.cast(width, DataType::Float);
                        let root = patch.op("Sqrt", &[width]);
                        let one = patch.constant(Tensor::f32_scalar("", 1.0));
                        let scale = patch.op("Div", &[one, root]);
                        let scale = patch.op("Sqrt", &[scale]);
                        patch.rewire(id, 1, scale);
                    }
                    _ => {}
                }
                at = first;
            }
        }
    });
    let base = alone(model);
    let found = tower_of(&base);
    assert_eq!((found.heads, found.head_dim), (tower.heads, tower.head_dim));
    assert!((found.site.scale() - tower.site.scale()).abs() < 1e-6);
    passes(&base, MERGES[0]);
}

#[test]
fn a_number_of_tokens_that_an_optimiser_wrote_into_the_projector_is_no_obstacle() {
    let (model, tower) = plain();
    // What onnxsim makes of a linear layer: a list of rows, and back to images of 81 tokens.
    let model = patched(&model, |patch| {
        let width = tower.heads * tower.head_dim;
        let rows = patch.reshape(tower.entry, &[-1, width]);
        let images = patch.reshape(rows, &[-1, 81, width]);
        patch.rewire_all(tower.entry, images);
    });
    let base = alone(model);
    for merge in MERGES {
        passes(&base, merge);
    }
    // All patches and CLS are one more than the number.
    passes(&base, "{dominant: 82, contextual: 0, cls: keep}");
}

/// Tokens laid out channel by channel, as a convolution reads them, and put back: in a grid whose shape is put together
/// of a size that only the run knows and a list, and in a row.
#[test]
fn a_list_that_is_laid_out_as_channels_is_refused() {
    for grid in [true, false] {
        let (model, tower) = plain();
        let model = patched(&model, |patch| {
            let width = tower.heads * tower.head_dim;
            let turned = patch.transpose(tower.entry, &[0, 2, 1]);
            let channels = if grid {
                let images = patch.size_of(turned, 0);
                let images = patch.size_value(images);
                let images = patch.reshape(images, &[1]);
                let rest = patch.i64s(&[width, 9, 9]);
                let shape = patch.concat(&[images, rest], 0);
                let grid = patch.op("Reshape", &[turned, shape]);
                patch.reshape(grid, &[0, 0, -1])
            } else {
                patch.reshape(turned, &[-1, width, 81])
            };
            let tokens = patch.transpose(channels, &[0, 2, 1]);
            patch.rewire_all(tower.entry, tokens);
        });
        let message = refusal(alone(model), MERGES[1]);
        assert!(message.contains("as a grid"), "{message}");
    }
}

/// A CLS token that is joined when the patches have their places already is counted all the same.
#[test]
fn a_token_joined_behind_the_table_of_places_is_counted() {
    let (model, tower) = plain();
    assert_eq!((tower.cls, tower.tokens), (true, Some(82)));
    let joined = model
        .graph()
        .nodes
        .iter()
        .copied()
        .find(|n| model.node(*n).is("Concat") && model.node(*n).attr_int("axis") == Some(1))
        .expect("a CLS token");
    let node = model.node(joined);
    let [cls, patches] = [0, 1].map(|slot| node.input(slot).expect("an input"));
    let all = node.output(0).expect("an output");
    let add = model.value(all).uses[0].node;
    let start = model.node(add).output(0).expect("an output");
    let table = model.node(add).inputs.iter().flatten();
    let table = table.copied().find(|v| *v != all).expect("a table");
    // The places of all tokens in their order, read from an embedding.
    let read = model.producer_node(table).filter(|n| n.is("Gather"));
    let table = read.and_then(|n| n.input(0)).unwrap_or(table);
    let model = patched(&model, |patch| {
        let [first, rest] =
            [(0, 1), (1, usize::MAX)].map(|(from, to)| rows_of(patch, table, from, to));
        let cls = patch.op("Add", &[cls, first]);
        let patches = patch.op("Add", &[patches, rest]);
        let joined = patch.concat(&[cls, patches], 1);
        patch.rewire_all(start, joined);
    });
    let base = alone(model);
    assert_eq!(
        (tower_of(&base).cls, tower_of(&base).tokens),
        (true, Some(82))
    );
    passes(&base, MERGES[0]);
}

/// Rows of a constant `[1, rows, width]`.
fn rows_of(patch: &mut Patch<'_>, table: ValueId, from: usize, to: usize) -> ValueId {
    let model = patch.model();
    let tensor = consts::constant(model, table).expect("a table");
    let dims = consts::dims(model, table).expect("its shape");
    let width = dims.last().copied().expect("a width");
    let all = tensor.bytes(model.external()).expect("numbers");
    let row = usize::try_from(width).expect("a width") * 4;
    let to = to.min(all.len() / row);
    let shape = vec![1, (to - from) as i64, width];
    let part = all[from * row..to * row].to_vec();
    patch.constant(Tensor::raw("", DataType::Float, shape, part))
}
