//! Patches: what they change, what they remove, and what is refused.

mod common;

use common::*;
use duet_onnx::ir::{DataType, Dim, IrError, Model, Patch, Tensor, ValueId, ValueType};

fn f32s(dims: &[i64]) -> ValueType {
    ValueType::tensor(
        DataType::Float,
        dims.iter().map(|d| Dim::Known(*d)).collect(),
    )
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
fn a_typed_value_that_becomes_an_output_is_described_once() {
    let mut proto = chain();
    proto.graph.as_mut().unwrap().value_info = vec![value("a", FLOAT, &[2])];
    let before = load(&proto);
    let after = patched(&before, |p| p.add_output(find(&before, "a"), f32s(&[2])));
    let written = decode(&bytes_of(&after)).graph.unwrap();
    assert_eq!(written.output[2], value("a", FLOAT, &[2]));
    assert_eq!(written.value_info, []);
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
fn an_optional_input_is_connected_and_an_attribute_set() {
    let before = load(&chain());
    let (a, b) = (find(&before, "a"), producer(&before, "b"));
    let after = patched(&before, |p| {
        let one = p.op("Sqrt", &[a]);
        let two = p.op("Exp", &[a]);
        // Slot 0 is read already, slot 2 is omitted, slot 3 lies behind the last.
        p.connect(b, 0, one);
        p.connect(b, 3, two);
        p.set_attribute(b, duet_onnx::ir::int("mode", 3));
    });
    let node = after.node(b);
    assert_eq!(node.inputs.len(), 4);
    assert_eq!((node.input(2), node.attr_int("mode")), (None, Some(3)));
    let uses = |v: ValueId| after.value(v).uses.iter().filter(|u| u.node == b).count();
    assert_eq!(
        (
            uses(a),
            uses(node.input(0).unwrap()),
            uses(node.input(3).unwrap())
        ),
        (0, 1, 1)
    );
    // In the file as well.
    let written = decode(&bytes_of(&after));
    let nodes = written.graph.unwrap().node;
    let found = nodes.iter().find(|n| n.output == ["b"]).unwrap();
    assert_eq!(found.input[1..], ["v", "", "duet/t/Exp"]);
    assert_eq!((found.attribute.len(), found.attribute[0].i), (1, Some(3)));
    assert_eq!(found.input[0], "duet/t/Sqrt");
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
