//! Sub-graphs and model-local functions: represented, verified, carried through
//! byte for byte, and written anew where a patch reaches into them.

mod common;

use common::*;
use duet_onnx::ir::{AttrValue, DataType, Def, Dim, GraphId, GraphKind, Model, ValueType};
use duet_onnx::onnx::read_bytes;
use duet_onnx::proto::{GraphProto, NodeProto};

fn f32s() -> ValueType {
    ValueType::tensor(DataType::Float, vec![Dim::Known(2)])
}

fn named_graph(m: &Model, name: &str) -> GraphId {
    m.graphs()
        .find(|(_, g)| g.name == name)
        .unwrap_or_else(|| panic!("no graph '{name}'"))
        .0
}

/// The body of a decoded node by attribute name.
fn body<'p>(node: &'p NodeProto, name: &str) -> &'p GraphProto {
    let found = node.attribute.iter().find(|a| a.name() == name);
    found
        .and_then(|a| a.g.as_ref())
        .unwrap_or_else(|| panic!("no body '{name}'"))
}

#[test]
fn bodies_and_functions_are_graphs_of_the_model() {
    let m = load(&nested());
    let kinds: Vec<(&str, GraphKind)> =
        m.graphs().map(|(_, g)| (g.name.as_str(), g.kind)).collect();
    let parent = |name: &str| GraphKind::Body {
        parent: named_graph(&m, name),
    };
    assert_eq!(kinds.len(), 7);
    for (name, kind) in [
        ("main", GraphKind::Main),
        ("t", parent("main")),
        ("tt", parent("t")),
        ("te", parent("t")),
        ("e", parent("main")),
        ("body", parent("main")),
        ("Twice", GraphKind::Function),
    ] {
        assert!(kinds.contains(&(name, kind)), "{name}: {kinds:?}");
    }
    let held = m.node(producer(&m, "y"));
    assert_eq!(
        held.subgraphs().collect::<Vec<_>>(),
        [named_graph(&m, "t"), named_graph(&m, "e")]
    );
    assert!(
        matches!(held.attr("else_branch"), Some(AttrValue::Graph(g)) if *g == named_graph(&m, "e"))
    );
    assert!(m.is_function(m.node(producer(&m, "z"))));
    assert_eq!(m.functions[0].body, named_graph(&m, "Twice"));
    assert_eq!(m.functions[0].opset_imports, [(String::new(), 17)]);
    assert_eq!(violations(&m), []);
}

#[test]
fn captured_values_are_uses_of_the_outer_value() {
    let m = load(&nested());
    let o = m.value(find(&m, "o"));
    let mut readers: Vec<&str> = o
        .uses
        .iter()
        .map(|u| m.subgraph(m.node(u.node).graph).name.as_str())
        .collect();
    readers.sort_unstable();
    assert_eq!(readers, ["body", "tt"]);
    // A body's input is its own, whatever the outer graph calls its values.
    let turn = m.subgraph(named_graph(&m, "body"));
    assert!(turn.inputs.iter().all(|v| m.value(*v).def == Def::Input));
    assert_eq!(m.subgraph(named_graph(&m, "e")).initializers.len(), 1);
}

#[test]
fn a_name_of_the_body_hides_the_outer_one() {
    let mut proto = nested();
    let main = proto.graph.as_mut().unwrap();
    let turn = main.node[2].attribute[0].g.as_mut().unwrap();
    turn.input[2] = two("x");
    turn.node[1].input[0] = "x".into();
    let m = load(&proto);
    let inner = m.subgraph(named_graph(&m, "body")).inputs[2];
    assert_ne!(inner, find(&m, "x"));
    assert_eq!(m.value(inner).uses.len(), 1);
    assert_eq!(
        m.value(find(&m, "x")).uses.len(),
        3,
        "Abs, Loop and the inner If's branch"
    );
}

#[test]
fn what_no_graph_around_defines_is_reported_where_it_is_read() {
    let mut proto = nested();
    let main = proto.graph.as_mut().unwrap();
    main.node[1].attribute[1].g.as_mut().unwrap().node[0].input[0] = "t_out".into();
    proto.functions[0].node[0].input[1] = "x".into();
    let found: Vec<String> = violations(&load(&proto))
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(
        found,
        [
            "[1] Neg 'Neg_e_out': reads 't_out', which nothing defines",
            "[1] Add 'Add_r': reads 'x', which nothing defines"
        ]
    );
}

#[test]
fn a_function_may_import_operator_sets_of_its_own() {
    let mut proto = nested();
    proto.functions[0]
        .opset_import
        .push(opset("com.example", 1));
    proto.functions[0].node[0].domain = Some("com.example".into());
    assert_eq!(violations(&load(&proto)), []);
    proto.functions[0].opset_import.pop();
    let found = violations(&load(&proto));
    assert_eq!(found.iter().map(|v| v.invariant).collect::<Vec<_>>(), [6]);
}

#[test]
fn models_with_sub_graphs_are_written_as_they_were_read() {
    let file = encode(&nested());
    let m = read_bytes("nested", file.clone()).unwrap();
    assert_eq!(bytes_of(&m), file);
    // A patch that does not reach into a body leaves the holder's bytes.
    let after = patched(&m, |p| p.metadata("k", "v"));
    let graph_of = |bytes: &[u8]| contents(bytes, 7).pop().unwrap();
    assert_eq!(graph_of(&bytes_of(&after)), graph_of(&file));
    let after = patched(&m, |p| {
        let new = p.op("Sqrt", &[find(&m, "l")]);
        p.rewire(producer(&m, "z"), 0, new);
    });
    let (old, new) = (
        contents(&graph_of(&file), 1),
        contents(&graph_of(&bytes_of(&after)), 1),
    );
    assert_eq!(old[..3], new[..3], "Abs, If and Loop");
    assert_eq!(
        contents(&bytes_of(&after), 25),
        contents(&file, 25),
        "the function"
    );
}

/// What the file has to look like after `o` was renamed to `renamed` and the
/// name went to another node.
fn check_renamed(written: &[u8], renamed: &str) {
    let proto = decode(written);
    let main = proto.graph.unwrap();
    let by_output = |name: &str| main.node.iter().find(|n| n.output[0] == name).unwrap();
    assert_eq!(by_output(renamed).op_type(), "Abs");
    assert_eq!(by_output("o").input, [renamed]);
    // Every reader follows, two bodies down as well.
    let then = body(by_output("y"), "then_branch");
    let inner = body(&then.node[0], "then_branch");
    assert_eq!(inner.node[0].input, [renamed]);
    assert_eq!(body(by_output("l"), "body").node[1].input, ["s", renamed]);
    // The rest of the bodies is as it was.
    let original = nested().graph.unwrap();
    assert_eq!(
        body(&then.node[0], "else_branch"),
        body(
            &body(&original.node[1], "then_branch").node[0],
            "else_branch"
        )
    );
    assert_eq!(
        body(by_output("y"), "else_branch"),
        body(&original.node[1], "else_branch")
    );
    assert_eq!(
        body(by_output("l"), "body").input,
        body(&original.node[2], "body").input
    );
    assert_eq!(
        body(by_output("l"), "body").node[0],
        body(&original.node[2], "body").node[0]
    );
    let names: Vec<&str> = main.output.iter().map(|o| o.name()).collect();
    assert_eq!(names, ["y", "o", "z"]);
}

#[test]
fn renaming_a_captured_value_rewrites_the_bodies_that_read_it() {
    let file = encode(&nested());
    let m = read_bytes("nested", file.clone()).unwrap();
    let after = patched(&m, |p| {
        let new = p.op("Sqrt", &[find(&m, "o")]);
        p.replace_output(1, new, f32s());
    });
    let written = bytes_of(&after);
    check_renamed(&written, "duet/t/Sqrt:inner");
    // The function and the bodies that do not read it keep their bytes.
    assert_eq!(contents(&written, 25), contents(&file, 25));
    let kept = encode(&model(negates("te", "x", "te_out")));
    let kept = contents(&kept, 7).pop().unwrap();
    assert!(written.windows(kept.len()).any(|w| w == kept));
    let again = read_bytes("again", written.clone().into()).unwrap();
    assert_eq!(violations(&again), []);
    assert_eq!(bytes_of(&again), written);
}

#[test]
fn rewiring_reaches_readers_in_bodies() {
    let m = load(&nested());
    let o = find(&m, "o");
    let after = patched(&m, |p| {
        let new = p.op("Sqrt", &[o]);
        p.rewire_all(o, new);
    });
    let main = decode(&bytes_of(&after)).graph.unwrap();
    let order: Vec<&str> = main.node.iter().map(|n| n.op_type()).collect();
    assert_eq!(
        order,
        ["Abs", "Sqrt", "If", "Loop", "Twice"],
        "captured values count in the order"
    );
    let then = body(&main.node[2], "then_branch");
    assert_eq!(
        body(&then.node[0], "then_branch").node[0].input,
        ["duet/t/Sqrt"]
    );
    assert_eq!(
        body(&main.node[3], "body").node[1].input,
        ["s", "duet/t/Sqrt"]
    );
}

#[test]
fn unknown_fields_inside_rewritten_bodies_survive() {
    // In the If's attribute, in the body it holds, and in the node that reads 'o'.
    let strange = |place: &str| delimited(1002, place.as_bytes());
    let mut proto = nested();
    proto.graph.as_mut().unwrap().node[1] = holder(
        "If",
        &["c"],
        &["y"],
        &[
            ("then_branch", negates("t", "o", "t_out")),
            ("else_branch", negates("e", "x", "e_out")),
        ],
    );
    let append = |message: &[u8], number: u64, extra: &dyn Fn(Vec<u8>) -> Vec<u8>| -> Vec<u8> {
        let fields = walk(message).into_iter();
        let each = fields.map(|f| {
            if f.number == number {
                delimited(number, &extra(f.contents))
            } else {
                f.whole
            }
        });
        each.flatten().collect()
    };
    let in_node = |c: Vec<u8>| [c, strange("node")].concat();
    let in_body = |c: Vec<u8>| [append(&c, 1, &in_node), strange("body")].concat();
    let in_attribute = |c: Vec<u8>| [append(&c, 6, &in_body), strange("attribute")].concat();
    let in_if = |c: Vec<u8>| append(&c, 5, &in_attribute);
    let file = append(&encode(&proto), 7, &|g| append(&g, 1, &in_if));
    let m = read_bytes("strange", file.into()).unwrap();
    let after = patched(&m, |p| {
        let new = p.op("Sqrt", &[find(&m, "o")]);
        p.replace_output(1, new, f32s());
    });
    let written = bytes_of(&after);
    // The If's two bodies and the Loop's one; its body has two nodes.
    for (place, count) in [("attribute", 3), ("body", 3), ("node", 4)] {
        let needle = strange(place);
        let found = written
            .windows(needle.len())
            .filter(|w| *w == needle)
            .count();
        assert_eq!(found, count, "{place}");
    }
    let main = decode(&written).graph.unwrap();
    let held = main.node.iter().find(|n| n.op_type() == "If").unwrap();
    assert_eq!(
        body(held, "then_branch").node[0].input,
        ["duet/t/Sqrt:inner"]
    );
}

#[test]
fn a_body_that_gives_out_what_it_captured_follows_a_rename() {
    let mut proto = nested();
    let main = proto.graph.as_mut().unwrap();
    main.node[1].attribute[1].g = Some(graph("e", &[], &[two("o")], &[], &[]));
    let m = load(&proto);
    assert_eq!(violations(&m), []);
    let after = patched(&m, |p| {
        let new = p.op("Sqrt", &[find(&m, "o")]);
        p.replace_output(1, new, f32s());
    });
    let main = decode(&bytes_of(&after)).graph.unwrap();
    let held = main.node.iter().find(|n| n.op_type() == "If").unwrap();
    assert_eq!(
        body(held, "else_branch").output[0].name(),
        "duet/t/Sqrt:inner"
    );
    assert_eq!(main.output[1], two("o"));
}

#[test]
fn lists_of_graphs_are_carried_and_rewritten() {
    let mut proto = nested();
    let main = proto.graph.as_mut().unwrap();
    let held = &mut main.node[1].attribute;
    held.truncate(1);
    held[0] = duet_onnx::proto::AttributeProto {
        name: Some("cases".into()),
        graphs: vec![negates("c0", "o", "c0_out"), negates("c1", "x", "c1_out")],
        r#type: Some(duet_onnx::proto::attribute_proto::AttributeType::Graphs.into()),
        ..Default::default()
    };
    let m = load(&proto);
    assert!(
        matches!(m.node(producer(&m, "y")).attr("cases"), Some(AttrValue::Graphs(l)) if l.len() == 2)
    );
    assert_eq!(bytes_of(&m), encode(&proto));
    let after = patched(&m, |p| {
        let new = p.op("Sqrt", &[find(&m, "o")]);
        p.replace_output(1, new, f32s());
    });
    let main = decode(&bytes_of(&after)).graph.unwrap();
    let held = main.node.iter().find(|n| n.op_type() == "If").unwrap();
    assert_eq!(
        held.attribute[0].graphs[0].node[0].input,
        ["duet/t/Sqrt:inner"]
    );
    assert_eq!(held.attribute[0].graphs[1], negates("c1", "x", "c1_out"));
}

#[test]
fn a_body_does_not_type_what_it_only_captured() {
    let mut proto = nested();
    let main = proto.graph.as_mut().unwrap();
    main.node[1].attribute[1].g = Some(graph("e", &[], &[value("l", INT64, &[9])], &[], &[]));
    // The Loop, whose output the body gives out, has to come first.
    main.node.swap(1, 2);
    main.value_info.push(two("l"));
    let m = load(&proto);
    assert_eq!(violations(&m), []);
    assert_eq!(m.value(find(&m, "l")).ty, Some(f32s()));
}

#[test]
fn an_untouched_body_keeps_its_bytes_inside_a_rewritten_node() {
    // Fields of several kinds in turns, as no writer of ours puts them.
    let own = |name: &str| delimited(5, &encode_tensor(&floats(name, &[2], &[1.0, 2.0])));
    let other = [
        own("k"),
        delimited(
            1,
            &[
                delimited(4, b"Add"),
                delimited(1, b"k"),
                delimited(1, b"j"),
                delimited(2, b"e_out"),
            ]
            .concat(),
        ),
        own("j"),
        delimited(12, b"\x0a\x05e_out"),
        delimited(2, b"e"),
    ]
    .concat();
    let mut file = Vec::new();
    for field in walk(&encode(&nested())) {
        if field.number != 7 {
            file.extend(field.whole);
            continue;
        }
        let mut inner = Vec::new();
        for (at, element) in walk(&field.contents).into_iter().enumerate() {
            if element.number != 1 || at != 1 {
                inner.extend(element.whole);
                continue;
            }
            // The If: its else-branch becomes a list with the odd one.
            let mut held = Vec::new();
            for part in walk(&element.contents) {
                if part.number == 5 && text_of(&part.contents, 1) == "else_branch" {
                    // A list of two bodies, of which the patch reaches the first.
                    let first = prost::Message::encode_to_vec(&negates("c", "o", "c_out"));
                    let attribute = [
                        delimited(1, b"else_branch"),
                        delimited(11, &first),
                        delimited(11, &other),
                        number(20, 10),
                    ];
                    held.extend(delimited(5, &attribute.concat()));
                } else {
                    held.extend(part.whole);
                }
            }
            inner.extend(delimited(1, &held));
        }
        file.extend(delimited(7, &inner));
    }
    let m = read_bytes("odd", file.clone().into()).unwrap();
    assert_eq!(bytes_of(&m), file);
    let after = patched(&m, |p| {
        let new = p.op("Sqrt", &[find(&m, "o")]);
        p.replace_output(1, new, f32s());
    });
    let written = bytes_of(&after);
    let main = decode(&written).graph.unwrap();
    let held = main.node.iter().find(|n| n.op_type() == "If").unwrap();
    let inner = body(&body(held, "then_branch").node[0], "then_branch");
    assert_eq!(
        inner.node[0].input,
        ["duet/t/Sqrt:inner"],
        "the If was written anew"
    );
    assert!(written.windows(other.len()).any(|w| w == other));
}

fn encode_tensor(tensor: &duet_onnx::proto::TensorProto) -> Vec<u8> {
    prost::Message::encode_to_vec(tensor)
}
