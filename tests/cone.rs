//! Cones: what a value depends on, cloning it with other roots, and cutting it
//! out as a model of its own.

mod common;

use common::*;
use duet_onnx::ir::{DataType, Dim, Model, Patch, Substitution, ValueType, cone, extract, verify};
use duet_onnx::proto::{GraphProto, ModelProto, NodeProto};

/// A float tensor type of known dimensions.
fn f32s(dims: &[i64]) -> ValueType {
    ValueType::tensor(
        DataType::Float,
        dims.iter().map(|d| Dim::Known(*d)).collect(),
    )
}

/// `root → r1 → r2 = Add(r1, f1)`, `f1 = Neg(free)`, and a two-output Split.
fn cones() -> Model {
    let two = |name: &str| value(name, FLOAT, &[2]);
    load(&model(graph(
        "g",
        &[two("root"), two("free"), two("new")],
        &[two("out"), two("half0"), two("half1")],
        &[longs("axes", &[0])],
        &[
            node("Neg", &["root"], &["r1"]),
            node("Neg", &["free"], &["f1"]),
            node("Add", &["r1", "f1"], &["r2"]),
            node("Split", &["r2"], &["half0", "half1"]),
            node("Unsqueeze", &["half1", "axes"], &["out"]),
        ],
    )))
}

#[test]
fn a_cone_clone_copies_what_depends_on_a_root_and_shares_the_rest() {
    let m = cones();
    let v = |name: &str| find(&m, name);
    let mut subst = Substitution::from([(v("root"), v("new"))]);
    let after = patched(&m, |p| {
        let copy = p.clone_cone(v("out"), &mut subst).unwrap();
        assert_eq!(subst[&v("out")], copy);
        p.add_output(copy, f32s(&[1, 1]));
    });
    let new: Vec<String> = listing(&after)
        .into_iter()
        .filter(|n| n.contains("duet/"))
        .collect();
    assert_eq!(
        new,
        [
            "Neg(new)->duet/t/Neg",
            "Add(duet/t/Neg,f1)->duet/t/Add",
            "Split(duet/t/Add)->duet/t/Split:0,duet/t/Split:1",
            "Unsqueeze(duet/t/Split:1,axes)->duet/t/Unsqueeze",
        ]
    );
    // What does not depend on the root stands for itself.
    for shared in ["free", "f1", "axes"] {
        assert_eq!(subst[&v(shared)], v(shared), "{shared}");
    }
    for cloned in ["r1", "r2", "half0", "half1", "out"] {
        assert_ne!(subst[&v(cloned)], v(cloned), "{cloned}");
    }
}

#[test]
fn later_clones_share_earlier_ones_and_both_outputs_of_a_node() {
    let m = cones();
    let v = |name: &str| find(&m, name);
    let mut subst = Substitution::from([(v("root"), v("new"))]);
    let mut patch = Patch::new(&m, "t");
    patch.clone_cone(v("half0"), &mut subst).unwrap();
    let second = patch.clone_cone(v("half1"), &mut subst).unwrap();
    assert_eq!(subst[&v("half1")], second);
    assert_eq!(patch.finish().inserted(), 3, "Neg, Add and one Split");
}

#[test]
fn a_substituted_value_inside_the_cone_cuts_it() {
    let m = cones();
    let v = |name: &str| find(&m, name);
    let mut subst = Substitution::from([(v("r2"), v("new")), (v("half0"), v("free"))]);
    let mut patch = Patch::new(&m, "t");
    patch.clone_cone(v("out"), &mut subst).unwrap();
    // An output that is a root itself stays substituted by what was given.
    assert_eq!(subst[&v("half0")], v("free"));
    assert_eq!(patch.finish().inserted(), 2, "Split and Unsqueeze");
    // Nothing to substitute: nothing cloned.
    let mut patch = Patch::new(&m, "t");
    let same = patch
        .clone_cone(v("out"), &mut Substitution::new())
        .unwrap();
    assert_eq!((same, patch.finish().inserted()), (v("out"), 0));
}

#[test]
fn cloned_nodes_keep_attributes_and_domain() {
    let mut proto = model(graph(
        "g",
        &[value("x", FLOAT, &[2, 3]), value("n", FLOAT, &[2, 3])],
        &[value("y", FLOAT, &[3, 2])],
        &[],
        &[
            node("Transpose", &["x"], &["t"]),
            node("Mine", &["t"], &["y"]),
        ],
    ));
    let main = proto.graph.as_mut().unwrap();
    main.node[0].attribute.push(ints("perm", &[1, 0]));
    main.node[0].doc_string = Some("where the exporter was".into());
    main.node[1].domain = Some("com.microsoft".into());
    main.node[1].attribute.push(int("k", 3));
    proto.opset_import.push(opset("com.microsoft", 1));
    let m = load(&proto);
    let after = patched(&m, |p| {
        let mut subst = Substitution::from([(find(&m, "x"), find(&m, "n"))]);
        let copy = p.clone_cone(find(&m, "y"), &mut subst).unwrap();
        p.replace_output(0, copy, f32s(&[3, 2]));
    });
    let written = decode(&bytes_of(&after)).graph.unwrap();
    let [transpose, mine] = written.node.as_slice() else {
        panic!("{:?}", written.node)
    };
    assert_eq!(transpose.attribute, [ints("perm", &[1, 0])]);
    assert_eq!(
        (transpose.name(), transpose.doc_string()),
        ("duet/t/Transpose", "")
    );
    assert_eq!(
        (mine.domain(), mine.attribute.as_slice()),
        ("com.microsoft", &[int("k", 3)][..])
    );
    assert_eq!(mine.output, ["y"]);
}

#[test]
fn a_weight_in_blocks_is_dequantised_for_the_clone_alone() {
    let weight = |blocks: Option<i64>| {
        let attribute = blocks
            .map(|b| vec![int("block_size", b)])
            .unwrap_or_default();
        load(&model(graph(
            "blocks",
            &[value("x", FLOAT, &[2, 2])],
            &[value("y", FLOAT, &[2, 2])],
            &[
                floats("w", &[2, 2], &[1.0; 4]),
                floats("s", &[1, 2], &[1.0; 2]),
            ],
            &[
                NodeProto {
                    attribute,
                    ..node("DequantizeLinear", &["w", "s"], &["d"])
                },
                node("MatMul", &["x", "d"], &["y"]),
            ],
        )))
    };
    let cloned = |blocks| {
        let before = weight(blocks);
        let (x, y) = (find(&before, "x"), find(&before, "y"));
        patched(&before, |p| {
            let other = p.op("Neg", &[x]);
            let mut subst = Substitution::from([(x, other)]);
            let new = p.clone_cone(y, &mut subst).unwrap();
            p.add_output(new, f32s(&[2, 2]));
        })
    };
    let counts = |m: &Model| {
        let all = m.graph().nodes.iter().map(|n| m.node(*n));
        (
            all.filter(|n| n.is("DequantizeLinear")).count(),
            m.graph().initializers.len(),
        )
    };
    // Neither operator nor tensor is shared, where sharing costs a fusion.
    assert_eq!(counts(&cloned(Some(2))), (2, 4));
    assert_eq!(counts(&cloned(None)), (1, 2));
}

#[test]
fn deep_graphs_do_not_exhaust_the_stack() {
    const DEPTH: usize = 20_000;
    let names: Vec<String> = (0..=DEPTH).map(|i| format!("v{i}")).collect();
    // Each node reads its predecessor twice: naive recursion would also double.
    let nodes: Vec<_> = (0..DEPTH)
        .map(|i| node("Add", &[&names[i], &names[i]], &[&names[i + 1]]))
        .collect();
    let inputs = [value("v0", FLOAT, &[2]), value("new", FLOAT, &[2])];
    let last = value(&names[DEPTH], FLOAT, &[2]);
    let proto = model(graph("deep", &inputs, &[last], &[], &nodes));
    // A thread's stack is smaller than the main thread's.
    let small = std::thread::Builder::new().stack_size(256 << 10);
    let work = move || {
        let m = load(&proto);
        let (first, last) = (find(&m, "v0"), find(&m, &format!("v{DEPTH}")));
        assert_eq!(cone::ancestors(&m, &[last], false).len(), DEPTH + 1);
        assert_eq!(cone::descendants(&m, &[first], true).len(), DEPTH + 1);
        let part = extract(&m, &[(first, f32s(&[2]))], &[(last, f32s(&[2]))]).unwrap();
        assert_eq!(part.graph().nodes.len(), DEPTH);
        let mut subst = Substitution::from([(first, find(&m, "new"))]);
        let after = patched(&m, |p| {
            let copy = p.clone_cone(last, &mut subst).unwrap();
            p.replace_output(0, copy, f32s(&[2]));
        });
        // The copies replaced the originals, which are dead now.
        assert_eq!(after.graph().nodes.len(), DEPTH);
        let reread = decode(&bytes_of(&after)).graph.unwrap();
        assert_eq!(reread.node[0].input, ["new", "new"]);
        assert_eq!(reread.node[DEPTH - 1].output, [format!("v{DEPTH}")]);
    };
    small.spawn(work).unwrap().join().unwrap();
}

/// `y = If(c) { t: Neg(outer) } { e: own = Neg(x) }`, `outer = Abs(x)`.
fn branches() -> ModelProto {
    let two = |name: &str| value(name, FLOAT, &[2]);
    let body = |name: &str, read: &str, out: &str| -> GraphProto {
        graph(name, &[], &[two(out)], &[], &[node("Neg", &[read], &[out])])
    };
    let bodies = [
        ("then_branch", body("t", "outer", "in_t")),
        ("else_branch", body("e", "x", "in_e")),
    ];
    model(graph(
        "main",
        &[value("c", BOOL, &[]), two("x"), two("n"), two("free")],
        &[two("y"), two("z")],
        &[],
        &[
            node("Abs", &["x"], &["outer"]),
            holder("If", &["c"], &["y"], &bodies),
            node("Add", &["y", "free"], &["z"]),
        ],
    ))
}

#[test]
fn cones_see_through_captured_values() {
    let m = load(&branches());
    let v = |name: &str| find(&m, name);
    let names = |set: std::collections::HashSet<duet_onnx::ir::ValueId>| {
        let mut all: Vec<String> = set.into_iter().map(|v| m.name(v).to_owned()).collect();
        all.sort();
        all
    };
    let down = names(cone::descendants(&m, &[v("outer")], false));
    assert_eq!(down, ["in_t", "outer", "y", "z"]);
    let up = names(cone::ancestors(&m, &[v("y")], false));
    assert_eq!(up, ["c", "in_e", "in_t", "outer", "x", "y"]);
    // The body that reads 'outer' is held by the If.
    let inner = m.value(v("outer")).uses[0].node;
    let held_by = cone::holder_of(&m, m.node(inner).graph).unwrap();
    assert_eq!(m.node(held_by).op_type, "If");
    assert_eq!(cone::holder_of(&m, m.main()), None);
}

#[test]
fn data_only_cones_stop_at_shapes() {
    let m = load(&model(graph(
        "g",
        &[value("x", FLOAT, &[2]), value("w", FLOAT, &[2])],
        &[value("y", FLOAT, &[2])],
        &[],
        &[
            node("Shape", &["x"], &["s"]),
            node("Expand", &["w", "s"], &["y"]),
        ],
    )));
    let v = |name: &str| find(&m, name);
    assert!(cone::descendants(&m, &[v("x")], false).contains(&v("y")));
    assert!(!cone::descendants(&m, &[v("x")], true).contains(&v("y")));
    assert!(cone::ancestors(&m, &[v("y")], false).contains(&v("x")));
    let data = cone::ancestors(&m, &[v("y")], true);
    assert!(data.contains(&v("w")) && !data.contains(&v("x")));
}

#[test]
fn a_sub_graph_in_a_cone_is_refused_by_name_unless_it_can_be_shared() {
    let m = load(&branches());
    let v = |name: &str| find(&m, name);
    // Captured only: the If's own input does not depend on the root.
    let mut subst = Substitution::from([(v("outer"), v("n"))]);
    let refused = Patch::new(&m, "t").clone_cone(v("z"), &mut subst);
    assert_eq!(refused, Err("If 'If_y'".into()));
    let mut subst = Substitution::from([(v("free"), v("n"))]);
    let after = patched(&m, |p| {
        let copy = p.clone_cone(v("z"), &mut subst).unwrap();
        p.replace_output(1, copy, f32s(&[2]));
    });
    assert_eq!(listing(&after)[2..], ["Add(y,n)->z"]);
}

#[test]
fn a_dead_if_takes_its_bodies_and_what_they_captured_along() {
    let mut proto = branches();
    let main = proto.graph.as_mut().unwrap();
    // The then-branch alone reads this weight of the main graph.
    main.initializer.push(floats("captured", &[2], &[1.0, 2.0]));
    let body = main.node[1].attribute[0].g.as_mut().unwrap();
    body.node[0] = node("Add", &["outer", "captured"], &["in_t"]);
    body.initializer.push(floats("own", &[2], &[1.0, 2.0]));
    let before = load(&proto);
    let after = patched(&before, |p| {
        let new = p.op("Neg", &[find(&before, "x")]);
        p.replace_output(0, new, f32s(&[2]));
        p.rewire(producer(&before, "z"), 0, new);
    });
    assert_eq!(listing(&after), ["Neg(x)->y", "Add(y,free)->z"]);
    assert_eq!(initializer_names(&after), [""; 0]);
    assert_eq!(after.value(find(&before, "x")).uses.len(), 1);
    // While the If lives, what its bodies capture does too.
    let after = patched(&before, |p| {
        p.rewire(producer(&before, "z"), 0, find(&before, "x"))
    });
    assert_eq!(initializer_names(&after), ["captured"]);
}

// ---- extracting ----

#[test]
fn an_extracted_part_is_a_model_of_its_own() {
    let m = load(&chain());
    let v = |name: &str| find(&m, name);
    let part = extract(&m, &[(v("a"), f32s(&[2]))], &[(v("y"), f32s(&[2]))]).unwrap();
    assert_eq!(listing(&part), ["Mul(a,v)->b", "Neg(b)->y"]);
    assert_eq!(initializer_names(&part), ["v"]);
    assert!(part.input("a").is_some() && part.graph().inputs.len() == 1);
    assert_eq!((part.ir_version, part.opset("")), (8, Some(17)));
    let written = decode(&bytes_of(&part));
    assert_eq!(
        (written.ir_version(), written.opset_import.clone()),
        (8, vec![opset("", 17)])
    );
    let again = duet_onnx::onnx::read_bytes("part", encode(&written)).unwrap();
    assert_eq!(listing(&again), listing(&part));
    assert_eq!(
        written.graph.unwrap().initializer,
        [floats("v", &[2], &[1.0, 2.0])]
    );
}

#[test]
fn extracting_cuts_multi_output_nodes_and_says_what_is_missing() {
    let m = cones();
    let v = |name: &str| find(&m, name);
    let typed = |names: &[&str]| -> Vec<_> { names.iter().map(|n| (v(n), f32s(&[2]))).collect() };
    // half0 is given, half1 is computed by the same node.
    let part = extract(&m, &typed(&["half0", "r2"]), &typed(&["out", "half0"])).unwrap();
    verify(&part).unwrap();
    assert_eq!(
        listing(&part),
        [
            "Split(r2)->half0:unused,half1",
            "Unsqueeze(half1,axes)->out"
        ]
    );
    let missing = extract(&m, &typed(&["r1"]), &typed(&["out"]))
        .unwrap_err()
        .to_string();
    assert!(
        missing.contains("'free': the part needs this input too"),
        "{missing}"
    );
    let held = load(&branches());
    let (y, x) = (find(&held, "y"), find(&held, "x"));
    let refused = extract(&held, &[(x, f32s(&[2]))], &[(y, f32s(&[2]))])
        .unwrap_err()
        .to_string();
    assert!(refused.contains("If 'If_y'"), "{refused}");
}

#[test]
fn extracted_constants_are_loaded_from_external_data() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(
        dir.path().join("w.bin"),
        [0, 0, 0, 0, 0, 0, 0x80, 0x3f, 0, 0, 0, 0x40],
    )
    .unwrap();
    let mut proto = chain();
    proto.graph.as_mut().unwrap().initializer[1] = external(
        "v",
        &[2],
        &[("location", "w.bin"), ("offset", "4"), ("length", "8")],
    );
    let path = dir.path().join("m.onnx");
    std::fs::write(&path, encode(&proto)).unwrap();
    let m = duet_onnx::onnx::read(&path).unwrap();
    let v = |name: &str| find(&m, name);
    let part = extract(&m, &[(v("a"), f32s(&[2]))], &[(v("b"), f32s(&[2]))]).unwrap();
    let written = decode(&bytes_of(&part)).graph.unwrap();
    assert_eq!(written.initializer, [floats("v", &[2], &[1.0, 2.0])]);
    // A data file is opened when it is first needed, and then kept.
    let fresh = duet_onnx::onnx::read(&path).unwrap();
    std::fs::remove_file(dir.path().join("w.bin")).unwrap();
    let again = extract(&m, &[(v("a"), f32s(&[2]))], &[(v("b"), f32s(&[2]))]).unwrap();
    assert_eq!(bytes_of(&again), bytes_of(&part));
    let v = |name: &str| find(&fresh, name);
    let gone = extract(&fresh, &[(v("a"), f32s(&[2]))], &[(v("b"), f32s(&[2]))]).unwrap_err();
    assert!(gone.to_string().contains("w.bin"), "{gone}");
}
