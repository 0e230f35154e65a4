//! Patches: what they change, what they remove, and what is refused.

mod common;

use common::*;
use duet_onnx::ir::{
    DataType, Dim, IrError, Model, Patch, Substitution, Tensor, ValueType, cone, extract, verify,
};
use duet_onnx::proto::{GraphProto, ModelProto};

fn f32s(dims: &[i64]) -> ValueType {
    ValueType::tensor(
        DataType::Float,
        dims.iter().map(|d| Dim::Known(*d)).collect(),
    )
}

/// ```text
/// a = Add(x, w); b = Mul(a, v); y = Neg(b); z = Abs(a); unread = Exp(old)
/// ```
/// `unread` is dead and `spare` has no reader, before any patch.
fn chain() -> ModelProto {
    let two = |name: &str| floats(name, &[2], &[1.0, 2.0]);
    model(graph(
        "chain",
        &[value("x", FLOAT, &[2])],
        &[value("y", FLOAT, &[2]), value("z", FLOAT, &[2])],
        &[two("w"), two("v"), two("old"), two("spare")],
        &[
            node("Add", &["x", "w"], &["a"]),
            node("Exp", &["old"], &["unread"]),
            node("Mul", &["a", "v"], &["b"]),
            node("Neg", &["b"], &["y"]),
            node("Abs", &["a"], &["z"]),
        ],
    ))
}

#[test]
fn rewire_moves_one_reader_and_no_other() {
    let before = load(&chain());
    let (a, mul) = (find(&before, "a"), producer(&before, "b"));
    let after = patched(&before, |p| {
        let new = p.op("Sqrt", &[a]);
        p.rewire(mul, 0, new);
    });
    assert_eq!(
        listing(&after),
        [
            "Add(x,w)->a",
            "Exp(old)->unread",
            "Sqrt(a)->duet/t/Sqrt",
            "Mul(duet/t/Sqrt,v)->b",
            "Neg(b)->y",
            "Abs(a)->z"
        ]
    );
    // The model that was planned on is as it was.
    assert_eq!(listing(&before).len(), 5);
    assert_eq!(before.value(a).uses.len(), 2);
}

#[test]
fn rewire_all_moves_every_reader_but_the_patch_itself() {
    let before = load(&chain());
    let a = find(&before, "a");
    let after = patched(&before, |p| {
        let new = p.op("Sqrt", &[a]);
        p.rewire_all(a, new);
    });
    let readers: Vec<String> = listing(&after)
        .into_iter()
        .filter(|n| n.contains("(a"))
        .collect();
    assert_eq!(readers, ["Sqrt(a)->duet/t/Sqrt"]);
    assert_eq!(after.value(a).uses.len(), 1);
}

#[test]
fn inserted_nodes_are_stamped_named_and_numbered() {
    let before = load(&chain());
    let a = find(&before, "a");
    let after = patched(&before, |p| {
        p.scope("first");
        let one = p.op("Neg", &[a]);
        let two = p.op("Neg", &[one]);
        let pair = p.node("", "TopK", &[Some(two), None], 2, vec![]);
        p.name_value(pair[1], "best");
        p.rewire(producer(&before, "z"), 0, pair[0]);
    });
    let new: Vec<(&str, &str)> = after
        .graph()
        .nodes
        .iter()
        .map(|n| after.node(*n))
        .filter(|n| n.pass.is_some())
        .map(|n| (n.pass.as_deref().unwrap(), n.name.as_str()))
        .collect();
    let names = [
        "duet/t/first/Neg",
        "duet/t/first/Neg_2",
        "duet/t/first/TopK",
    ];
    assert_eq!(new, names.map(|n| ("t", n)));
    assert!(
        listing(&after)
            .iter()
            .any(|n| n.ends_with("->duet/t/first/TopK:0,duet/t/best"))
    );
}

#[test]
fn equal_small_constants_are_shared_and_large_ones_are_not_compared() {
    let before = load(&chain());
    let mut patch = Patch::new(&before, "t");
    let (one, two) = (patch.i64s(&[1, 2]), patch.i64s(&[1, 2]));
    assert_eq!(one, two);
    assert_ne!(one, patch.i64s(&[1, 3]));
    // Same bytes, other dimensions or type.
    assert_ne!(
        one,
        patch.constant(Tensor::raw("", DataType::Int64, vec![2, 1], vec![0; 16]))
    );
    let large = || Tensor::raw("", DataType::Uint8, vec![300], vec![7; 300]);
    assert_ne!(patch.constant(large()), patch.constant(large()));
}

#[test]
fn newly_dead_nodes_and_their_initializers_go_and_the_long_dead_stay() {
    let before = load(&chain());
    let neg = producer(&before, "y");
    let after = patched(&before, |p| p.rewire(neg, 0, find(&before, "x")));
    assert_eq!(
        listing(&after),
        ["Add(x,w)->a", "Exp(old)->unread", "Neg(x)->y", "Abs(a)->z"]
    );
    assert_eq!(initializer_names(&after), ["w", "old", "spare"]);
    let written = decode(&bytes_of(&after)).graph.unwrap();
    let names: Vec<&str> = written.initializer.iter().map(|t| t.name()).collect();
    assert_eq!((written.node.len(), names), (4, vec!["w", "old", "spare"]));
}

#[test]
fn an_initializer_goes_with_its_last_reader_only() {
    let mut proto = chain();
    proto.graph.as_mut().unwrap().node[4].input.push("v".into());
    let before = load(&proto);
    // The Mul that reads v dies, the Abs still reads it.
    let after = patched(&before, |p| {
        p.rewire(producer(&before, "y"), 0, find(&before, "x"))
    });
    assert!(initializer_names(&after).contains(&"v"));
    // Its only reader is rewired away without dying.
    let before = load(&chain());
    let after = patched(&before, |p| {
        let new = p.constant(Tensor::raw("", DataType::Float, vec![2], vec![0; 8]));
        p.rewire(producer(&before, "b"), 1, new);
    });
    assert_eq!(
        initializer_names(&after),
        ["w", "old", "spare", "duet/t/const"]
    );
}

#[test]
fn what_a_patch_inserts_without_a_reader_is_not_kept() {
    let before = load(&chain());
    let after = patched(&before, |p| {
        let unread = p.i64s(&[1, 2, 3]);
        let shape = p.op("Shape", &[find(&before, "a")]);
        p.op("Reshape", &[shape, unread]);
        p.i64s(&[9]);
    });
    assert_eq!(listing(&after), listing(&before));
    assert_eq!(initializer_names(&after), initializer_names(&before));
}

#[test]
fn an_initializer_that_is_a_graph_output_stays() {
    let mut proto = chain();
    proto
        .graph
        .as_mut()
        .unwrap()
        .output
        .push(value("v", FLOAT, &[2]));
    let before = load(&proto);
    let after = patched(&before, |p| {
        p.rewire(producer(&before, "y"), 0, find(&before, "x"))
    });
    assert!(initializer_names(&after).contains(&"v"));
}

#[test]
fn replace_output_keeps_the_name_renames_the_old_and_readers_follow() {
    let mut proto = chain();
    // A second reader of the output value.
    let main = proto.graph.as_mut().unwrap();
    main.node.push(node("Exp", &["y"], &["e"]));
    main.output.push(value("e", FLOAT, &[2]));
    let before = load(&proto);
    let y = find(&before, "y");
    let after = patched(&before, |p| {
        let new = p.op("Sqrt", &[y]);
        p.replace_output(0, new, f32s(&[2]));
    });
    assert_eq!(
        listing(&after)[3..],
        [
            "Neg(b)->duet/t/Sqrt:inner",
            "Abs(a)->z",
            "Exp(duet/t/Sqrt:inner)->e",
            "Sqrt(duet/t/Sqrt:inner)->y"
        ]
    );
    let written = decode(&bytes_of(&after)).graph.unwrap();
    let names: Vec<&str> = written.output.iter().map(|o| o.name()).collect();
    assert_eq!(names, ["y", "z", "e"]);
    assert_eq!(written.output[0], value("y", FLOAT, &[2]));
    // As the file has it, every name is written by one node.
    let neg = written.node.iter().find(|n| n.op_type() == "Neg").unwrap();
    assert_eq!(neg.output, ["duet/t/Sqrt:inner"]);
    let exp = written.node.iter().find(|n| n.output == ["e"]).unwrap();
    assert_eq!(exp.input, ["duet/t/Sqrt:inner"]);
}

#[test]
fn replacing_an_output_by_what_does_not_read_it_removes_the_old() {
    let before = load(&chain());
    let after = patched(&before, |p| {
        let new = p.op("Sqrt", &[find(&before, "a")]);
        p.replace_output(0, new, f32s(&[2]));
    });
    assert_eq!(
        listing(&after),
        ["Add(x,w)->a", "Exp(old)->unread", "Abs(a)->z", "Sqrt(a)->y"]
    );
    assert!(!initializer_names(&after).contains(&"v"));
}

#[test]
fn an_output_can_become_an_existing_value_or_a_constant() {
    let before = load(&chain());
    let after = patched(&before, |p| {
        p.replace_output(0, find(&before, "a"), f32s(&[2]))
    });
    assert_eq!(
        listing(&after),
        ["Add(x,w)->y", "Exp(old)->unread", "Abs(y)->z"]
    );
    let after = patched(&before, |p| {
        p.replace_output(0, find(&before, "spare"), f32s(&[2]))
    });
    assert_eq!(initializer_names(&after), ["w", "old", "y"]);
    let written = decode(&bytes_of(&after)).graph.unwrap();
    assert_eq!(written.initializer[2], floats("y", &[2], &[1.0, 2.0]));
}

#[test]
fn graph_inputs_keep_their_names() {
    let mut proto = chain();
    proto
        .graph
        .as_mut()
        .unwrap()
        .output
        .push(value("x", FLOAT, &[2]));
    let before = load(&proto);
    let x = find(&before, "x");
    let by_input = refusal(&before, |p| p.replace_output(0, x, f32s(&[2])));
    assert!(by_input.contains("'x' is a graph input"), "{by_input}");
    let of_input = refusal(&before, |p| {
        let new = p.op("Sqrt", &[x]);
        p.replace_output(2, new, f32s(&[2]));
    });
    assert!(of_input.contains("'x' is a graph input"), "{of_input}");
    let twice = refusal(&before, |p| {
        p.replace_output(0, find(&before, "z"), f32s(&[2]))
    });
    assert!(twice.contains("'z' is a graph output already"), "{twice}");
}

#[test]
fn inputs_outputs_types_and_metadata_are_added() {
    let before = load(&chain());
    let after = patched(&before, |p| {
        let mask = p.add_input(
            "mask",
            ValueType::tensor(DataType::Bool, vec![Dim::param("n")]),
        );
        let a = find(&before, "a");
        let new = p.op("Where", &[mask, a, a]);
        p.rewire(producer(&before, "z"), 0, new);
        p.add_output(a, f32s(&[2]));
        p.metadata("key", "first");
        p.metadata("key", "second");
    });
    assert!(after.input("mask").is_some() && after.output("a").is_some());
    assert_eq!(after.metadata("key"), Some("second"));
    let written = decode(&bytes_of(&after));
    let main = written.graph.as_ref().unwrap();
    let dims = |v: &duet_onnx::proto::ValueInfoProto| format!("{:?}", v.r#type);
    assert_eq!(main.input[1].name(), "mask");
    assert!(
        dims(&main.input[1]).contains("DimParam(\"n\")"),
        "{}",
        dims(&main.input[1])
    );
    assert_eq!(main.output[2], value("a", FLOAT, &[2]));
    assert_eq!(written.metadata_props.len(), 1);
}

#[test]
fn a_withdrawn_type_is_not_written() {
    let mut proto = chain();
    proto.graph.as_mut().unwrap().value_info = vec![
        value("a", FLOAT, &[2]),
        value("b", FLOAT, &[2]),
        value("unread", FLOAT, &[2]),
    ];
    let before = load(&proto);
    let after = patched(&before, |p| {
        p.forget_type(find(&before, "b"));
        p.set_type(find(&before, "a"), f32s(&[5]));
    });
    let written = decode(&bytes_of(&after)).graph.unwrap();
    assert_eq!(
        written.value_info,
        [value("a", FLOAT, &[5]), value("unread", FLOAT, &[2])]
    );
    // The type of a removed value goes with it.
    let after = patched(&before, |p| {
        p.rewire(producer(&before, "y"), 0, find(&before, "x"))
    });
    let written = decode(&bytes_of(&after)).graph.unwrap();
    let names: Vec<&str> = written.value_info.iter().map(|v| v.name()).collect();
    assert_eq!(names, ["a", "unread"]);
}

#[test]
fn order_is_the_files_own_except_where_a_node_has_to_move() {
    // Two interleaved chains: no depth-first or breadth-first order.
    let names = ["p0", "q0", "p1", "q1", "p2", "q2"];
    let mut nodes = vec![node("Neg", &["x"], &["p0"]), node("Neg", &["x"], &["q0"])];
    for i in 2..names.len() {
        nodes.push(node("Neg", &[names[i - 2]], &[names[i]]));
    }
    let outputs = [value("q2", FLOAT, &[2]), value("p2", FLOAT, &[2])];
    let before = load(&model(graph(
        "g",
        &[value("x", FLOAT, &[2])],
        &outputs,
        &[],
        &nodes,
    )));
    let order = |m: &Model| -> Vec<String> {
        let out = |n: &duet_onnx::ir::NodeId| m.name(m.node(*n).output(0).unwrap()).to_owned();
        m.graph().nodes.iter().map(out).collect()
    };
    let after = patched(&before, |p| {
        let new = p.op("Sqrt", &[find(&before, "q0")]);
        p.rewire(producer(&before, "q1"), 0, new);
    });
    assert_eq!(
        order(&after),
        ["p0", "q0", "p1", "duet/t/Sqrt", "q1", "p2", "q2"]
    );
    // p1 reads q2 now: q2 and what it needs move up, nothing else moves.
    let after = patched(&before, |p| {
        p.rewire(producer(&before, "p1"), 0, find(&before, "q2"))
    });
    assert_eq!(order(&after), ["q0", "q1", "q2", "p1", "p2"]);
}

#[test]
fn a_cycle_is_refused() {
    let before = load(&chain());
    let plan = plan(&before, |p| {
        p.rewire(producer(&before, "a"), 1, find(&before, "b"))
    });
    match before.apply(plan) {
        Err(IrError::Cycle { node }) => {
            assert!(["Add 'Add_a'", "Mul 'Mul_b'"].contains(&node.as_str()))
        }
        other => panic!("expected a cycle, found {other:?}"),
    }
    let before = load(&chain());
    let own = plan_self_loop(&before);
    assert!(matches!(before.apply(own), Err(IrError::Cycle { .. })));
}

fn plan_self_loop(before: &Model) -> duet_onnx::ir::PatchPlan {
    plan(before, |p| {
        p.rewire(producer(before, "b"), 0, find(before, "b"))
    })
}

#[test]
fn a_patch_fits_only_the_state_it_was_planned_on() {
    let before = load(&chain());
    let planned = || {
        plan(&before, |p| {
            p.rewire(producer(&before, "y"), 0, find(&before, "a"))
        })
    };
    let later = before.clone().apply(planned()).unwrap();
    let again = later.apply(planned()).unwrap_err();
    assert!(
        again.to_string().contains("another state of the model"),
        "{again}"
    );
    // Also where nothing was added: the count of patches differs.
    let only_metadata = patched(&before, |p| p.metadata("k", "v"));
    assert!(only_metadata.apply(planned()).is_err());
    // Another model of the same size takes it, one of another size does not.
    let mut other = chain();
    other.graph.as_mut().unwrap().initializer.pop();
    assert!(load(&other).apply(planned()).is_err());
}

#[test]
fn slots_nodes_and_outputs_that_do_not_exist_are_refused() {
    let before = load(&chain());
    let x = find(&before, "x");
    let slot = refusal(&before, |p| p.rewire(producer(&before, "y"), 1, x));
    assert_eq!(
        slot,
        "rewire of input 1 of Neg 'Neg_y', which it does not have"
    );
    let output = refusal(&before, |p| {
        let new = p.op("Neg", &[x]);
        p.replace_output(7, new, f32s(&[2]));
    });
    assert_eq!(output, "there is no graph output 7");
    // A node that an earlier patch removed.
    let gone = producer(&before, "b");
    let after = patched(&before, |p| p.rewire(producer(&before, "y"), 0, x));
    let removed = refusal(&after, |p| p.rewire(gone, 0, x));
    assert!(removed.contains("which does not exist"), "{removed}");
}

#[test]
fn names_that_exist_are_refused() {
    let before = load(&chain());
    let input = refusal(&before, |p| {
        p.add_input("b", f32s(&[2]));
    });
    assert_eq!(input, "the name 'b' exists already");
    let chosen = refusal(&before, |p| {
        for _ in 0..2 {
            let new = p.op("Neg", &[find(&before, "a")]);
            p.name_value(new, "score");
        }
    });
    assert_eq!(chosen, "the name 'duet/t/score' exists already");
    // The same pass a second time would repeat its names.
    let once = patched(&before, |p| {
        let new = p.op("Sqrt", &[find(&before, "a")]);
        p.rewire(producer(&before, "z"), 0, new);
    });
    let twice = refusal(&once, |p| {
        let new = p.op("Sqrt", &[find(&once, "a")]);
        p.rewire(producer(&once, "z"), 0, new);
    });
    assert_eq!(twice, "the name 'duet/t/Sqrt' exists already");
}

#[test]
fn an_empty_patch_changes_nothing() {
    let before = load(&chain());
    let empty = plan(&before, |_| {});
    assert!(empty.is_empty());
    let after = before.apply(empty).unwrap();
    assert_eq!(bytes_of(&after), encode(&chain()));
}

// ---- cones ----

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
    std::fs::remove_file(dir.path().join("w.bin")).unwrap();
    let gone = extract(&m, &[(v("a"), f32s(&[2]))], &[(v("b"), f32s(&[2]))]).unwrap_err();
    assert!(gone.to_string().contains("w.bin"), "{gone}");
}
