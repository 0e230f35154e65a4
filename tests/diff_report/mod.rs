//! Reports made by hand: one with a bit of everything, and one of names that try
//! to break out of every format.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use duet_onnx::diff::{
    Change, Class, Context, ContextNode, FileKind, FileReport, Kind, ModelFacts, NodeState, Place,
    Presence, Renames, Report, SCHEMA_VERSION, Spot, StorageNote, Verdict, WeightChange,
};

pub(crate) fn report(files: Vec<FileReport>) -> Report {
    let mut report = Report {
        schema_version: SCHEMA_VERSION,
        duet: "0.0.0".into(),
        a: "old".into(),
        b: "new".into(),
        verdict: Verdict::Identical,
        counts: Default::default(),
        ignored: 0,
        policy: None,
        files,
    };
    report.settle();
    report
}

pub(crate) fn file(path: &str, kind: FileKind, changes: Vec<Change>) -> FileReport {
    FileReport {
        path: path.into(),
        path_b: None,
        kind,
        presence: Presence::Both,
        verdict: Verdict::Identical,
        same_bytes: false,
        model: None,
        changes,
        storage: Vec::new(),
        renames: Renames::default(),
    }
}

pub(crate) fn change(class: Class, kind: Kind, title: &str, places: Vec<Place>) -> Change {
    Change {
        class,
        kind,
        title: title.into(),
        before: None,
        after: None,
        subject: None,
        pass: None,
        places: if places.is_empty() {
            vec![Place::default()]
        } else {
            places
        },
        ignored: None,
        weights: None,
        context: None,
    }
}

/// A node that is on both sides.
pub(crate) fn at(op: &str, name: &str, layer: Option<u32>) -> Place {
    let spot = Some(Spot {
        node: Some(name.into()),
        op: Some(op.into()),
        ..Spot::default()
    });
    Place {
        a: spot.clone(),
        b: spot,
        layer,
        ..Place::default()
    }
}

pub(crate) fn node(op: &str, name: &str) -> Spot {
    Spot {
        node: Some(name.into()),
        op: Some(op.into()),
        ..Spot::default()
    }
}

pub(crate) fn weight(changed: u64, max_abs: f64) -> WeightChange {
    WeightChange {
        dtype_a: "float".into(),
        dtype_b: "float".into(),
        dims_a: vec![64, 64],
        dims_b: vec![64, 64],
        elements: 4096,
        changed,
        beyond: changed,
        first: Some(7),
        max_abs: Some(max_abs),
        max_rel: Some(0.25),
        norm_a: Some(8.0),
        norm_b: Some(8.0),
        norm_diff: Some(max_abs),
        non_finite: 0,
        signs_of_zero: 0,
    }
}

pub(crate) fn weights(title: &str, of: &[(&str, u32, WeightChange)]) -> Change {
    let places = of.iter().map(|(name, layer, w)| Place {
        weights: Some(w.clone()),
        ..at("MatMul", name, Some(*layer))
    });
    Change {
        weights: of.first().map(|w| w.2.clone()),
        ..change(Class::Weights, Kind::WeightValues, title, places.collect())
    }
}

pub(crate) fn rewrite(pass: &str, layer: u32) -> Change {
    let name = |i: usize| node("Gather", &format!("duet/{pass}/l{layer}/Gather_{i}"));
    let place = Place {
        layer: Some(layer),
        added: (0..3).map(name).collect(),
        ..Place::default()
    };
    let title = format!("duet/{pass} inserted after layer {layer} (3 nodes)");
    Change {
        pass: Some(pass.into()),
        ..change(Class::Structure, Kind::Rewrite, &title, vec![place])
    }
}

fn context() -> Context {
    let node = |pair, state, op: &str, name: &str, inputs: &[&str], output: &str| ContextNode {
        pair,
        state,
        op: op.into(),
        name: name.into(),
        inputs: inputs.iter().map(ToString::to_string).collect(),
        outputs: vec![output.into()],
    };
    use NodeState::{Added, Same};
    Context {
        a: vec![
            node(Some(0), Same, "MatMul", "/q", &["x", "w"], "q"),
            node(Some(1), Same, "Softmax", "/softmax", &["q"], "p"),
        ],
        b: vec![
            node(Some(0), Same, "MatMul", "/q", &["x", "w"], "q"),
            node(None, Added, "Mul", "/scale", &["q", "half"], "s"),
            node(Some(1), Same, "Softmax", "/softmax", &["s"], "p"),
        ],
    }
}

/// Several files with changes of every class, repeats, ignored ones and notes.
pub(crate) fn everything() -> Report {
    let io = |name: &str| Place {
        a: Some(Spot {
            value: Some(name.into()),
            ..Spot::default()
        }),
        ..Place::default()
    };
    let layers = |op: &str, n: u32| -> Vec<Place> {
        (0..n)
            .map(|l| at(op, &format!("/layers.{l}/{op}"), Some(l)))
            .collect()
    };
    let mut inserted = change(
        Class::Structure,
        Kind::NodesAdded,
        "Mul inserted between MatMul and Softmax",
        vec![Place {
            added: vec![node("Mul", "/scale")],
            layer: Some(0),
            ..Place::default()
        }],
    );
    inserted.context = Some(context());
    let mut recipe = change(
        Class::Metadata,
        Kind::Metadata,
        "metadata 'duet.recipe' added: \"version: 1\" …",
        Vec::new(),
    );
    recipe.subject = Some("duet.recipe".into());
    recipe.after = Some("version: 1\npasses:\n  - token_merge".into());
    let mut doc = change(
        Class::Cosmetic,
        Kind::DocString,
        "doc string of the model changed",
        Vec::new(),
    );
    doc.before = Some("one".into());
    doc.after = Some("two".into());
    let mut tolerated = weights(
        "weights of Gemm changed: float[64,64]",
        &[("/head/Gemm", 0, weight(4, 1e-7))],
    );
    tolerated.ignored = Some("within rtol 1e-5, atol 1e-6".into());
    let mut decoder = file(
        "onnx/decoder_model_merged.onnx",
        FileKind::Model,
        vec![
            change(
                Class::Contract,
                Kind::InputType,
                "input 'inputs_embeds': float[batch,sequence,64] → float[batch,sequence,65]",
                vec![io("inputs_embeds")],
            ),
            change(
                Class::Version,
                Kind::Opset,
                "operator set ai.onnx: 17 → 18",
                Vec::new(),
            ),
            rewrite("visual_prune", 4),
            rewrite("visual_prune", 6),
            inserted,
            change(
                Class::Structure,
                Kind::Attribute,
                "attribute 'axis' of Softmax: -1 → 1",
                layers("Softmax", 28),
            ),
            weights(
                "weights of MatMul changed: float[64,64]",
                &[
                    ("/layers.0/q", 0, weight(41, 0.001)),
                    ("/layers.1/q", 1, weight(3, 0.5)),
                ],
            ),
            change(
                Class::Shapes,
                Kind::ValueType,
                "stated type of values: float[1,2] → float[2,1]",
                vec![
                    at("Add", "/a", None),
                    at("Add", "/b", None),
                    at("Add", "/c", None),
                ],
            ),
            recipe,
            doc,
            tolerated,
        ],
    );
    decoder.model = Some(ModelFacts {
        nodes_a: 1034,
        nodes_b: 1041,
        matched: 1034,
        modified: 28,
        removed: 0,
        added: 7,
        constants_a: 212,
        constants_b: 214,
        weight_bytes_a: 1_200_000,
        weight_bytes_b: 1_200_016,
        weights_changed: 3,
    });
    decoder.storage = vec![StorageNote {
        text: "212 tensors moved from the file into model.onnx_data (1.2 MB)".into(),
        count: 212,
    }];
    decoder.renames.values = vec![("a".into(), "b".into()), ("c".into(), "d".into())];
    let mut config = change(
        Class::Config,
        Kind::ConfigChanged,
        "'patch_size': 14 → 16",
        Vec::new(),
    );
    config.subject = Some("patch_size".into());
    let mut gone = file(
        "onnx/old.onnx",
        FileKind::Model,
        vec![change(
            Class::Structure,
            Kind::ModelRemoved,
            "model file removed (12 bytes)",
            Vec::new(),
        )],
    );
    gone.presence = Presence::OnlyA;
    let mut same = file("tokenizer.json", FileKind::Json, Vec::new());
    same.same_bytes = true;
    report(vec![
        file("config.json", FileKind::Json, vec![config]),
        decoder,
        gone,
        same,
    ])
}

/// What a name may hold that means something in Markdown, HTML, XML, or a terminal.
pub(crate) const HOSTILE: &str = "a b/é\u{202e}<img src=x onerror=alert(1)>&amp;\"'`|*_#1 @user ```\n</code></details>]]>--><b>\u{1b}[31m\u{0}";

/// A report in which everything that comes from a file is [`HOSTILE`].
pub(crate) fn hostile() -> Report {
    let spot = Spot {
        node: Some(HOSTILE.into()),
        op: Some(HOSTILE.into()),
        slot: Some(1),
        value: Some(HOSTILE.into()),
    };
    let place = Place {
        graph: HOSTILE.into(),
        a: Some(spot.clone()),
        b: Some(spot.clone()),
        layer: Some(3),
        removed: vec![spot.clone()],
        added: vec![spot],
        weights: Some(weight(3, 0.5)),
    };
    let node = |state, pair| ContextNode {
        pair,
        state,
        op: HOSTILE.into(),
        name: HOSTILE.into(),
        inputs: vec![HOSTILE.into(), String::new()],
        outputs: vec![format!("{HOSTILE}2")],
    };
    let mut changes: Vec<Change> = Vec::new();
    for (i, kind) in Kind::ALL.into_iter().enumerate() {
        let mut c = change(
            Class::ALL[i % Class::ALL.len()],
            kind,
            &format!("{kind:?} '{HOSTILE}'"),
            vec![place.clone(); 1 + i % 3],
        );
        c.before = Some(format!("{HOSTILE}\nold"));
        c.after = Some(format!("{HOSTILE}\nnew"));
        c.subject = Some(HOSTILE.into());
        c.pass = Some(HOSTILE.into());
        c.weights = Some(weight(3, 0.5));
        c.ignored = (i % 5 == 0).then(|| HOSTILE.into());
        c.context = Some(Context {
            a: vec![node(NodeState::Removed, None)],
            b: vec![node(NodeState::Added, Some(1))],
        });
        changes.push(c);
    }
    changes.sort_by_key(|c| c.class);
    let mut one = file(HOSTILE, FileKind::Model, changes);
    one.path_b = Some(HOSTILE.into());
    one.storage = vec![StorageNote {
        text: HOSTILE.into(),
        count: 1,
    }];
    one.renames.nodes = vec![(HOSTILE.into(), HOSTILE.into())];
    let mut other = file(HOSTILE, FileKind::Other, Vec::new());
    other.same_bytes = true;
    let mut all = report(vec![one, other]);
    all.a = HOSTILE.into();
    all.b = HOSTILE.into();
    all
}
