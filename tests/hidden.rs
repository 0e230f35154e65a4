//! Networks hidden in the branches of an `If`, in model-local functions and in
//! loops: rewritten like the plain export that they were made from, or refused by
//! name. Nothing is skipped.

mod common;
#[path = "support/hide.rs"]
mod hide;
mod support;

use std::fs;
use std::path::PathBuf;

use common::opset;
use duet_onnx::arch::{Role, Vlm};
use duet_onnx::ir::{Model, verify};
use duet_onnx::onnx::{read_bytes, serialize};
use duet_onnx::passes::rewrite;
use duet_onnx::proto::{ModelProto, NodeProto};
use duet_onnx::runtime::{Decoder, StepInput, Tensor, Value};
use duet_onnx::validate::{Options, check};
use hide::{function, in_functions, in_stretches, looped, merged, starting};
use ndarray::Array3;
use prost::Message;
use support::models::{fixture, open, options, recipe, recipe_text, rewritten, root, runtime};

const DECODER: &str = "onnx/decoder_model_merged.onnx";

fn both() -> String {
    let prune = "{drops: [{after_layer: 2, keep: 0.5}, {after_layer: 5, keep: 0.0}]}";
    recipe_text(
        &[
            ("token_merge", "{dominant: 30, contextual: 6}"),
            ("visual_prune", prune),
        ],
        "",
    )
}

/// A fixture's decoder file, decoded.
fn decoder_of(name: &str) -> ModelProto {
    let folder = root().join("models/llava/fixtures").join(name).join("onnx");
    let path = folder.join("decoder_model_merged.onnx");
    let bytes = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    ModelProto::decode(bytes.as_slice()).unwrap()
}

/// The fixture with other decoder files instead of its own.
fn with_decoders(name: &str, decoders: &[(&str, &ModelProto)]) -> Vlm {
    let mut files: Vec<(PathBuf, String, Model)> = decoders
        .iter()
        .map(|(file, proto)| {
            let bytes = proto.encode_to_vec().into();
            let model = read_bytes(file, bytes).unwrap_or_else(|e| panic!("{file}: {e}"));
            verify(&model).unwrap_or_else(|e| panic!("{file}: {e}"));
            (PathBuf::from(file), String::new(), model)
        })
        .collect();
    let others = fixture(name).parts;
    let others = others
        .into_iter()
        .filter(|p| !matches!(p.role, Role::Decoder(_)));
    files.extend(others.map(|p| (p.file, p.variant, p.model)));
    files.sort_by(|a, b| a.0.cmp(&b.0));
    Vlm::new(files)
}

/// The open decoder of a model that is one file.
fn run_of(vlm: &Vlm) -> Decoder {
    let files = vlm.files().unwrap();
    let file = files
        .iter()
        .find(|f| f.file == std::path::Path::new(DECODER))
        .unwrap();
    Decoder::new(open(&file.model, &file.file)).unwrap()
}

/// Prompts of the same embeddings, then two tokens: the same logits and lengths.
fn same_answers(plain: &Vlm, hidden: &Vlm) {
    runtime();
    let (mut a, mut b) = (run_of(plain), run_of(hidden));
    let width = a.embeds().1.unwrap();
    assert_eq!(b.embeds().1, Some(width));
    let embeds = |tokens: usize, salt: usize| {
        let array = Array3::from_shape_fn((2, tokens, width), |(r, i, d)| {
            let marked = (3..3 + 24).contains(&i) && tokens > 1;
            match d + 1 == width {
                true => f32::from(u8::from(marked)),
                false => (((r * 31 + i * 17 + d * 7 + salt) as f32) * 0.61).sin(),
            }
        });
        StepInput::new(Value::new(Tensor::from(array)).unwrap())
    };
    let (mut x, mut y) = (a.empty_cache(2).unwrap(), b.empty_cache(2).unwrap());
    for (tokens, salt) in [(40, 0), (1, 5), (1, 9)] {
        let (p, q) = (
            a.step(&embeds(tokens, salt), &x).unwrap(),
            b.step(&embeds(tokens, salt), &y).unwrap(),
        );
        assert_eq!(p.cache.lengths(), q.cache.lengths());
        let (p_logits, q_logits) = (p.last_logits().unwrap(), q.last_logits().unwrap());
        let worst = (&p_logits - &q_logits)
            .iter()
            .fold(0f32, |w, d| w.max(d.abs()));
        assert!(worst <= 1e-5, "logits differ by {worst}");
        (x, y) = (p.cache, q.cache);
    }
    let lengths = x.lengths();
    assert!(lengths[0] == 42 && lengths[7] == 42 - 24, "{lengths:?}");
}

fn valid(base: &Vlm, changed: &Vlm) {
    runtime();
    let options = Options {
        session: options(),
        seed: 2,
    };
    let report = check(base, changed, &recipe(&both()), &options, &mut |_| ()).unwrap();
    let failed: Vec<String> = report
        .findings
        .iter()
        .filter(|f| !f.passed)
        .map(|f| format!("{}: {}", f.check, f.detail))
        .collect();
    assert!(failed.is_empty(), "{failed:#?}");
    let second = report
        .findings
        .iter()
        .any(|f| f.check.contains("second question"));
    assert!(second, "nothing was said about decoding");
}

/// Bytes of every file.
fn bytes(vlm: &Vlm) -> Vec<(PathBuf, Vec<u8>)> {
    let files = vlm.files().unwrap();
    let each = files.iter().map(|f| {
        (
            f.file.clone(),
            serialize(verify(&f.model).unwrap()).to_vec(),
        )
    });
    each.collect()
}

fn decoder_bytes(vlm: &Vlm) -> Vec<u8> {
    let all = bytes(vlm);
    all.into_iter()
        .find(|(f, _)| f == std::path::Path::new(DECODER))
        .unwrap()
        .1
}

fn read_again(bytes: Vec<u8>) -> Vlm {
    let model = read_bytes(DECODER, bytes.into()).unwrap();
    Vlm::new(vec![(DECODER.into(), String::new(), model)])
}

fn a_merged_decoder_is_rewritten_in_both_branches(name: &str) {
    let plain = fixture(name);
    let proto = merged(&decoder_of(name));
    let base = with_decoders(name, &[(DECODER, &proto)]);
    let found: Vec<_> = base
        .decoders()
        .map(|(i, d)| (base.parts[i].source.branch.clone(), d.depth()))
        .collect();
    assert_eq!(
        found,
        [
            (Some("else_branch".into()), 8),
            (Some("then_branch".into()), 8)
        ],
        "{:?}",
        base.parts.iter().map(|p| &p.role).collect::<Vec<_>>()
    );
    let untouched = decoder_bytes(&base);
    assert_eq!(untouched, proto.encode_to_vec(), "reading changes nothing");
    let changed = rewritten(&base, &both());
    valid(&base, &changed);
    same_answers(&rewritten(&plain, &both()), &changed);

    let written = decoder_bytes(&changed);
    assert_eq!(
        written,
        decoder_bytes(&rewritten(&base, &both())),
        "the same bytes"
    );
    let file = ModelProto::decode(written.as_slice()).unwrap();
    let graph = file.graph.as_ref().unwrap();
    assert_eq!(graph.node.len(), 1);
    let names = |list: &[duet_onnx::proto::TensorProto]| -> Vec<String> {
        list.iter().map(|t| t.name().to_owned()).collect()
    };
    let before = names(&proto.graph.as_ref().unwrap().initializer);
    assert_eq!(
        names(&graph.initializer),
        before,
        "weights stay in the outer graph"
    );
    for attribute in &graph.node[0].attribute {
        let body = attribute.g.as_ref().unwrap();
        assert!(
            body.initializer
                .iter()
                .all(|t| t.name().starts_with("duet/"))
        );
        let inserted = body.node.iter().filter(|n| n.name().starts_with("duet/"));
        assert!(inserted.count() > 50, "{}", attribute.name());
    }
    let stamps = file
        .metadata_props
        .iter()
        .filter(|m| m.key() == "duet.recipe");
    assert_eq!(stamps.count(), 1);
    let again = rewrite(read_again(written), &recipe(&both()))
        .unwrap_err()
        .to_string();
    assert!(again.contains("rewritten before"), "{again}");
}

#[test]
fn merged_torchscript() {
    a_merged_decoder_is_rewritten_in_both_branches("ts-eager-gqa");
}

#[test]
fn merged_dynamo() {
    a_merged_decoder_is_rewritten_in_both_branches("dynamo18-mha");
}

#[test]
fn new_inputs_of_a_merged_decoder_are_the_outer_graphs() {
    let name = "ts-sdpa-mha";
    let base = with_decoders(name, &[(DECODER, &merged(&decoder_of(name)))]);
    let text = recipe_text(
        &[(
            "visual_prune",
            "{drops: [{after_layer: 3, keep: 0.4}], text: salient, positions: keep}",
        )],
        "marker: input\n",
    );
    let changed = rewritten(&base, &text);
    let file = ModelProto::decode(decoder_bytes(&changed).as_slice()).unwrap();
    let inputs = file.graph.unwrap().input;
    let last: Vec<&str> = inputs.iter().rev().take(2).map(|i| i.name()).collect();
    assert_eq!(last, ["salient_token_mask", "visual_token_mask"]);
    runtime();
    let options = Options {
        session: options(),
        seed: 6,
    };
    let report = check(&base, &changed, &recipe(&text), &options, &mut |_| ()).unwrap();
    assert!(report.passed(), "{:#?}", report.findings);
}

#[test]
fn a_decoder_in_functions_is_inlined_and_rewritten() {
    for name in ["ts-sdpa-gqa", "dynamo23-mha"] {
        let proto = in_functions(&decoder_of(name));
        let base = with_decoders(name, &[(DECODER, &proto)]);
        let (index, decoder) = base
            .decoders()
            .next()
            .unwrap_or_else(|| panic!("{name}: {:?}", base.parts));
        assert_eq!(decoder.depth(), 8);
        assert_eq!(
            base.parts[index].source.inlined,
            ["hidden::Decoder", "hidden::Layers"]
        );
        assert_eq!(
            decoder_bytes(&base),
            proto.encode_to_vec(),
            "reading changes nothing"
        );
        // A recipe that leaves the decoder alone leaves its functions alone.
        let merge = recipe_text(&[("token_merge", "{dominant: 30, contextual: 6}")], "");
        assert_eq!(
            decoder_bytes(&rewritten(&base, &merge)),
            proto.encode_to_vec()
        );

        let changed = rewritten(&base, &both());
        valid(&base, &changed);
        same_answers(&rewritten(&fixture(name), &both()), &changed);
        let file = ModelProto::decode(decoder_bytes(&changed).as_slice()).unwrap();
        let left: Vec<&str> = file.functions.iter().map(|f| f.name()).collect();
        assert_eq!(left, ["Same"]);
        let calls = file.graph.unwrap().node;
        assert!(calls.iter().any(|n| n.op_type() == "Same"));
        let inlined = calls
            .iter()
            .filter(|n| n.name().starts_with("call_Decoder/call_Layers/"));
        assert!(inlined.count() > 100);
    }
}

#[test]
fn a_decoder_in_a_row_of_functions_is_inlined_and_rewritten() {
    let name = "dynamo18-mha";
    let proto = in_stretches(&decoder_of(name));
    let base = with_decoders(name, &[(DECODER, &proto)]);
    let (index, _) = base.decoders().next().unwrap();
    assert_eq!(base.parts[index].source.inlined.len(), 8);
    let changed = rewritten(&base, &both());
    valid(&base, &changed);
    same_answers(&rewritten(&fixture(name), &both()), &changed);
}

#[test]
fn a_merged_decoder_whose_branches_call_functions_is_rewritten() {
    let name = "ts-eager-mha";
    let plain = decoder_of(name);
    let mut proto = merged(&plain);
    // The branch with a past is one call.
    let graph = plain.graph.as_ref().unwrap();
    let (mut made, call) = function(graph, "hidden", "Decoder");
    made.opset_import.clone_from(&plain.opset_import);
    let branches = &mut proto.graph.as_mut().unwrap().node[0].attribute;
    let then = branches
        .iter_mut()
        .find(|a| a.name() == "then_branch")
        .unwrap();
    then.g.as_mut().unwrap().node = vec![call];
    proto.functions.push(made);
    proto.opset_import.push(opset("hidden", 1));
    proto.ir_version = Some(proto.ir_version().max(8));
    let base = with_decoders(name, &[(DECODER, &proto)]);
    assert_eq!(base.decoders().count(), 2, "{:?}", base.parts[0].role);
    let changed = rewritten(&base, &both());
    valid(&base, &changed);
    same_answers(&rewritten(&fixture(name), &both()), &changed);
}

#[test]
fn two_files_that_share_the_work_are_rewritten_together() {
    let name = "ts-eager-mha";
    let plain = decoder_of(name);
    let first = starting(&plain);
    let base = with_decoders(
        name,
        &[
            ("onnx/decoder_model.onnx", &first),
            ("onnx/decoder_with_past_model.onnx", &plain),
        ],
    );
    assert_eq!(base.decoders().count(), 2);
    valid(&base, &rewritten(&base, &both()));
}

fn refusal(vlm: Vlm) -> String {
    rewrite(vlm, &recipe(&both())).unwrap_err().to_string()
}

#[test]
fn a_network_in_a_loop_is_refused_by_name() {
    let name = "ts-eager-mha";
    let message = refusal(with_decoders(
        name,
        &[(DECODER, &looped(&decoder_of(name)))],
    ));
    assert!(
        message.contains("Loop 'the_loop'") && message.contains("unrolled"),
        "{message}"
    );
}

#[test]
fn a_decoder_that_is_half_outside_its_if_is_refused_by_name() {
    let name = "ts-eager-mha";
    let mut file = merged(&decoder_of(name));
    let graph = file.graph.as_mut().unwrap();
    let choice = &mut graph.node[0];
    let mut outside = Vec::new();
    for attribute in &mut choice.attribute {
        let body = attribute.g.as_mut().unwrap();
        if attribute.name.as_deref() == Some("then_branch") {
            // The first layer up to its keys.
            let gives = |n: &NodeProto| n.output.iter().any(|o| o.starts_with("present."));
            let end = body.node.iter().position(gives).unwrap();
            outside.extend(body.node.drain(..end));
        }
    }
    let choice = graph.node.pop().unwrap();
    graph.node = outside;
    graph.node.push(choice);
    let message = refusal(with_decoders(name, &[(DECODER, &file)]));
    for part in [
        "If 'optimum::if'",
        "then_branch",
        "outside",
        "decoder_with_past_model",
    ] {
        assert!(message.contains(part), "'{part}' is not in: {message}");
    }
}

#[test]
fn a_decoder_that_cannot_be_rewritten_is_not_left_beside_one_that_was() {
    let name = "ts-eager-mha";
    let plain = decoder_of(name);
    let base = with_decoders(
        name,
        &[
            ("onnx/decoder_model.onnx", &looped(&plain)),
            ("onnx/decoder_with_past_model.onnx", &plain),
        ],
    );
    let message = refusal(base);
    assert!(
        message.contains("decoder_model.onnx is a decoder too")
            && message.contains("Loop 'the_loop'"),
        "{message}"
    );
}

#[test]
fn functions_of_another_operator_set_are_refused_by_name() {
    let name = "ts-sdpa-gqa";
    let mut proto = in_functions(&decoder_of(name));
    proto.functions[2].opset_import = vec![opset("", 13)];
    let message = refusal(with_decoders(name, &[(DECODER, &proto)]));
    for part in ["hidden::Layers", "ai.onnx 13", "the model 17"] {
        assert!(message.contains(part), "'{part}' is not in: {message}");
    }
}
