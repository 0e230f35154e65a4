//! External data: a location is untrusted, and a range has to lie in its file.
//! Refusing is all that reading does: never a byte is written.

mod common;

use std::fs;

use common::*;
use duet_onnx::onnx::{OnnxError, read};
use duet_onnx::proto::{ModelProto, TensorProto};

/// A directory with `m.onnx` that refers to external data, and 64 bytes in `w.bin`.
struct Directory {
    dir: tempfile::TempDir,
}

impl Directory {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("model")).unwrap();
        fs::write(dir.path().join("model/w.bin"), [0; 64]).unwrap();
        fs::write(dir.path().join("secret.bin"), [1; 64]).unwrap();
        Self { dir }
    }

    fn model_dir(&self) -> std::path::PathBuf {
        self.dir.path().join("model")
    }

    /// Writes the model and reads it; nothing may change on disk.
    fn read(&self, tensors: &[TensorProto]) -> Result<duet_onnx::ir::Model, OnnxError> {
        let mut proto = nested();
        proto
            .graph
            .as_mut()
            .unwrap()
            .initializer
            .extend(tensors.iter().cloned());
        self.read_proto(&proto)
    }

    fn read_proto(&self, proto: &ModelProto) -> Result<duet_onnx::ir::Model, OnnxError> {
        let path = self.model_dir().join("m.onnx");
        fs::write(&path, encode(proto)).unwrap();
        let before = snapshot(self.dir.path());
        let result = read(&path);
        assert_eq!(
            snapshot(self.dir.path()),
            before,
            "reading changed something"
        );
        result
    }

    #[track_caller]
    fn refuses(&self, tensors: &[TensorProto], variant: &str, fragments: &[&str]) {
        let Err(error) = self.read(tensors) else {
            panic!("accepted: {fragments:?}")
        };
        let message = error.to_string();
        assert_eq!(kind(&error), variant, "{message}");
        assert!(message.contains("m.onnx: "), "{message}");
        for fragment in fragments {
            assert!(
                message.contains(fragment),
                "'{fragment}' is not in: {message}"
            );
        }
    }

    #[track_caller]
    fn refuses_location(&self, location: &str, fragments: &[&str]) {
        let tensor = external("w", &[4], &[("location", location), ("length", "16")]);
        let place = format!("external data '{location}': of tensor 'w': ");
        self.refuses(
            &[tensor],
            "External",
            &[&[place.as_str()], fragments].concat(),
        );
    }
}

fn at(name: &str, offset: &str, length: &str) -> TensorProto {
    let count: i64 = length.parse().unwrap_or(0) / 4;
    external(
        name,
        &[count],
        &[
            ("location", "w.bin"),
            ("offset", offset),
            ("length", length),
        ],
    )
}

#[test]
fn locations_outside_the_directory_are_refused() {
    let d = Directory::new();
    d.refuses_location(
        "../secret.bin",
        &["'..' is not allowed", "in or below the model's directory"],
    );
    d.refuses_location("sub/../../secret.bin", &["'..' is not allowed"]);
    // Inside after all, but no reader follows it.
    d.refuses_location("sub/../w.bin", &["'..' is not allowed"]);
    let absolute = d.dir.path().join("secret.bin");
    d.refuses_location(
        absolute.to_str().unwrap(),
        &["an absolute path is not allowed"],
    );
    let own = d.model_dir().join("w.bin");
    d.refuses_location(own.to_str().unwrap(), &["an absolute path is not allowed"]);
}

#[cfg(unix)]
#[test]
fn links_out_of_the_directory_are_refused_and_links_inside_are_not() {
    use std::os::unix::fs::symlink;
    let d = Directory::new();
    symlink("../secret.bin", d.model_dir().join("link.bin")).unwrap();
    d.refuses_location(
        "link.bin",
        &["a link that leaves the directory", "secret.bin", "cp -rL"],
    );
    symlink("..", d.model_dir().join("up")).unwrap();
    d.refuses_location("up/secret.bin", &["a link that leaves the directory"]);
    symlink("nowhere", d.model_dir().join("broken.bin")).unwrap();
    d.refuses_location("broken.bin", &["is the data file beside the model?"]);
    symlink("w.bin", d.model_dir().join("alias.bin")).unwrap();
    let alias = external("w", &[4], &[("location", "alias.bin"), ("length", "16")]);
    assert!(d.read(&[alias]).is_ok());
}

#[test]
fn locations_that_name_no_file_are_refused() {
    let d = Directory::new();
    fs::create_dir(d.model_dir().join("folder")).unwrap();
    d.refuses_location(
        "missing.bin",
        &["missing.bin", "is the data file beside the model?"],
    );
    d.refuses_location("folder", &["is no file"]);
    d.refuses_location(".", &["is no file"]);
    d.refuses_location("w.bin\0.txt", &["expected a file name"]);
    d.refuses_location("w.bin/x", &["is the data file beside the model?"]);
    d.refuses(
        &[external("w", &[4], &[("location", "")])],
        "Malformed",
        &[
            "initializer",
            "tensor 'w'",
            "external data without a location",
        ],
    );
    d.refuses(
        &[external("w", &[4], &[])],
        "Malformed",
        &["external data without a location"],
    );
}

#[test]
fn ranges_outside_the_file_are_refused() {
    let d = Directory::new();
    let huge = u64::MAX.to_string();
    let last = (u64::MAX - 3).to_string();
    d.refuses(
        &[at("w", "52", "16")],
        "External",
        &["of tensor 'w'", "52..68", "has 64", "truncated?"],
    );
    d.refuses(&[at("w", "65", "0")], "External", &["65..65", "has 64"]);
    d.refuses(
        &[at("w", &last, "16")],
        "External",
        &["offset", "overflows"],
    );
    d.refuses(&[at("w", "16", &huge)], "External", &["overflows"]);
    d.refuses(&[at("w", "0", &huge)], "External", &["has 64"]);
    for (key, text) in [
        ("offset", "-1"),
        ("length", "many"),
        ("offset", "99999999999999999999999"),
    ] {
        let tensor = external("w", &[4], &[("location", "w.bin"), (key, text)]);
        d.refuses(
            &[tensor],
            "Malformed",
            &["tensor 'w'", key, text, "is no byte count"],
        );
    }
    // Without a length, the dimensions say how much is read.
    let open = |offset: &str, count: i64| {
        external("w", &[count], &[("location", "w.bin"), ("offset", offset)])
    };
    d.refuses(&[open("52", 4)], "External", &["52..68", "has 64"]);
    d.refuses(&[open(&last, 4)], "External", &["overflows"]);
    assert!(d.read(&[open("48", 4)]).is_ok());
}

#[test]
fn a_file_that_shrinks_after_reading_is_an_error_when_it_is_asked_for() {
    let d = Directory::new();
    let model = d.read(&[at("w", "32", "32")]).unwrap();
    let tensor = model.value(find(&model, "w")).initializer.as_ref().unwrap();
    let file = fs::OpenOptions::new()
        .write(true)
        .open(d.model_dir().join("w.bin"))
        .unwrap();
    file.set_len(40).unwrap();
    let error = tensor.bytes(model.external()).unwrap_err().to_string();
    assert!(
        error.contains("32..64") && error.contains("has 40"),
        "{error}"
    );
}

#[test]
fn partly_overlapping_ranges_are_refused_and_tied_weights_are_not() {
    let d = Directory::new();
    d.refuses(
        &[at("b", "16", "16"), at("a", "8", "16")],
        "External",
        &["w.bin", "tensors 'a' (8..24) and 'b' (16..32) overlap"],
    );
    d.refuses(
        &[at("a", "0", "32"), at("b", "8", "8")],
        "External",
        &["overlap"],
    );
    d.refuses(
        &[at("a", "0", "16"), at("b", "0", "8")],
        "External",
        &["overlap"],
    );
    // Behind a pair that shares its bytes, and under another spelling of the path.
    let other = external(
        "c",
        &[4],
        &[("location", "./w.bin"), ("offset", "4"), ("length", "16")],
    );
    d.refuses(
        &[at("a", "0", "16"), at("b", "0", "16"), other],
        "External",
        &["overlap"],
    );
    let tied = [
        at("a", "0", "16"),
        at("b", "0", "16"),
        at("c", "16", "48"),
        at("none", "8", "0"),
    ];
    let model = d.read(&tied).unwrap();
    assert_eq!(violations(&model), []);
}

#[test]
fn external_data_in_node_attributes_and_bodies_is_checked_too() {
    let d = Directory::new();
    let outside = external("t", &[4], &[("location", "../secret.bin")]);
    let constant = duet_onnx::proto::NodeProto {
        attribute: vec![duet_onnx::proto::AttributeProto {
            name: Some("value".into()),
            t: Some(outside.clone()),
            r#type: Some(duet_onnx::proto::attribute_proto::AttributeType::Tensor.into()),
            ..Default::default()
        }],
        ..node("Constant", &[], &["k"])
    };
    let mut in_node = nested();
    in_node.graph.as_mut().unwrap().node.push(constant);
    let mut in_body = nested();
    in_body.graph.as_mut().unwrap().node[1].attribute[1]
        .g
        .as_mut()
        .unwrap()
        .initializer
        .push(outside);
    for (proto, tensor) in [(in_node, "Constant 'Constant_k'"), (in_body, "'t'")] {
        let error = d.read_proto(&proto).map(|_| ()).unwrap_err();
        let message = error.to_string();
        assert_eq!(kind(&error), "External");
        assert!(
            message.contains("'..' is not allowed") && message.contains(tensor),
            "{message}"
        );
    }
}

#[test]
fn a_length_that_does_not_fit_the_dimensions_breaks_invariant_8() {
    let d = Directory::new();
    let wrong = external("w", &[5], &[("location", "w.bin"), ("length", "16")]);
    let countless = external(
        "u",
        &[1 << 62, 1 << 62],
        &[("location", "w.bin"), ("offset", "16")],
    );
    let found = violations(&d.read(&[wrong, countless]).unwrap());
    assert_eq!(
        found.iter().map(|v| v.invariant).collect::<Vec<_>>(),
        [8, 8]
    );
    assert!(found[0].place.contains("initializer 'w'"), "{}", found[0]);
    assert_eq!(found[0].problem, "float[5] takes 20 bytes, length says 16");
    assert!(
        found[1].problem.contains("impossible number of elements"),
        "{}",
        found[1]
    );
}

#[test]
fn a_model_from_memory_has_no_external_data() {
    let mut proto = nested();
    let far = external("w", &[4], &[("location", "w.bin"), ("length", "16")]);
    proto.graph.as_mut().unwrap().initializer.push(far);
    let model = load(&proto);
    let tensor = model.value(find(&model, "w")).initializer.as_ref().unwrap();
    let error = tensor.bytes(model.external()).unwrap_err().to_string();
    assert!(
        error.contains("'w.bin'") && error.contains("not read from a directory"),
        "{error}"
    );
}
