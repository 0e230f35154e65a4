//! The rules, each against what the operator specification says of it.

use super::fact::{Call, Data, Fact};
use super::{shapes, values};
use crate::ir::model::{Attribute, Node};
use crate::ir::{DataType, GraphId, ValueId, int, ints};

fn node(domain: &str, op: &str, inputs: usize, outputs: usize, attributes: Vec<Attribute>) -> Node {
    let ids = |n: usize| (0..n).map(|i| Some(ValueId::new(i))).collect();
    Node {
        name: String::new(),
        op_type: op.into(),
        domain: domain.into(),
        overload: String::new(),
        inputs: ids(inputs),
        outputs: ids(outputs),
        attributes,
        graph: GraphId::new(0),
        pass: None,
        origin: None,
        edited: false,
    }
}

fn numbers(shape: &[i64], all: &[i64]) -> Fact {
    Fact {
        data: Some(Data::Ints(all.into())),
        ..Fact::of(Some(DataType::Int64), shape.to_vec())
    }
}

fn list(all: &[i64]) -> Fact {
    numbers(&[all.len() as i64], all)
}

fn floats(shape: &[i64]) -> Fact {
    Fact::of(Some(DataType::Float), shape.to_vec())
}

fn facts(node: &Node, inputs: &[Fact]) -> Vec<Fact> {
    let call = Call {
        node,
        inputs: inputs.iter().map(Some).collect(),
    };
    let mut found = shapes::infer(&call);
    if let Some(first) = found.first_mut() {
        first.data = values::evaluate(&call, first);
    }
    found
}

/// Shape, and elements where they are known.
fn of(op: &str, attributes: Vec<Attribute>, inputs: &[Fact]) -> (Vec<i64>, Option<Vec<i64>>) {
    let found = facts(&node("", op, inputs.len(), 1, attributes), inputs);
    let shape = found[0].shape.clone();
    let data = match &found[0].data {
        Some(Data::Ints(all)) => Some(all.to_vec()),
        _ => None,
    };
    (shape.unwrap_or_else(|| panic!("{op}: no shape")), data)
}

fn known(op: &str, attributes: Vec<Attribute>, inputs: &[Fact]) -> Vec<i64> {
    of(op, attributes, inputs)
        .1
        .unwrap_or_else(|| panic!("{op}: no elements"))
}

#[test]
fn arithmetic_of_sizes() {
    let (a, b) = (list(&[7, -7, 8]), list(&[2]));
    assert_eq!(known("Add", vec![], &[a.clone(), b.clone()]), [9, -5, 10]);
    // Division goes towards zero, the remainder has the divisor's sign.
    assert_eq!(known("Div", vec![], &[a.clone(), b.clone()]), [3, -3, 4]);
    assert_eq!(known("Mod", vec![], &[a.clone(), b.clone()]), [1, 1, 0]);
    assert_eq!(known("Less", vec![], &[a.clone(), b]), [0, 1, 0]);
    let which = numbers(&[3, 1], &[1, 0, 1]);
    let (shape, chosen) = of("Where", vec![], &[which, a, numbers(&[], &[0])]);
    assert_eq!(
        (shape, chosen),
        (vec![3, 3], Some(vec![7, -7, 8, 0, 0, 0, 7, -7, 8]))
    );
    // What overflows is not worked out.
    let large = numbers(&[], &[i64::MAX]);
    assert_eq!(of("Mul", vec![], &[large, numbers(&[], &[2])]).1, None);
}

#[test]
fn moving_elements() {
    let matrix = numbers(&[2, 3], &[0, 1, 2, 3, 4, 5]);
    let perm = vec![ints("perm", &[1, 0])];
    assert_eq!(
        known("Transpose", perm, std::slice::from_ref(&matrix)),
        [0, 3, 1, 4, 2, 5]
    );
    let reversed = [
        matrix.clone(),
        list(&[-1]),
        list(&[i64::MIN]),
        list(&[1]),
        list(&[-1]),
    ];
    assert_eq!(
        of("Slice", vec![], &reversed),
        (vec![2, 3], Some(vec![2, 1, 0, 5, 4, 3]))
    );
    let clipped = [matrix.clone(), list(&[1]), list(&[i64::MAX]), list(&[1])];
    assert_eq!(
        of("Slice", vec![], &clipped),
        (vec![2, 2], Some(vec![1, 2, 4, 5]))
    );
    let gathered = of(
        "Gather",
        vec![int("axis", 1)],
        &[matrix.clone(), list(&[-1, 0])],
    );
    assert_eq!(gathered, (vec![2, 2], Some(vec![2, 0, 5, 3])));
    let joined = of(
        "Concat",
        vec![int("axis", 1)],
        &[matrix.clone(), numbers(&[2, 1], &[8, 9])],
    );
    assert_eq!(joined, (vec![2, 4], Some(vec![0, 1, 2, 8, 3, 4, 5, 9])));
    assert_eq!(
        known("Tile", vec![], &[list(&[1, 2]), list(&[2])]),
        [1, 2, 1, 2]
    );
    assert_eq!(
        known(
            "Expand",
            vec![],
            &[numbers(&[2, 1], &[1, 2]), list(&[2, 2])]
        ),
        [1, 1, 2, 2]
    );
    let range = [numbers(&[], &[5]), numbers(&[], &[-1]), numbers(&[], &[-2])];
    assert_eq!(of("Range", vec![], &range), (vec![3], Some(vec![5, 3, 1])));
    let least = of(
        "ReduceMin",
        vec![int("keepdims", 0), ints("axes", &[1])],
        &[matrix],
    );
    assert_eq!(least, (vec![2], Some(vec![0, 3])));
    let sums = [list(&[1, 2, 3]), numbers(&[], &[0])];
    assert_eq!(known("CumSum", vec![int("reverse", 1)], &sums), [6, 5, 3]);
    // Rows of a matrix are not summed by the rule for one row.
    let rows = [numbers(&[2, 2], &[1, 2, 3, 4]), numbers(&[], &[1])];
    assert_eq!(of("CumSum", vec![], &rows).1, None);
}

#[test]
fn shapes_of_layers() {
    let shape = |op: &str, attributes, inputs: &[Fact]| of(op, attributes, inputs).0;
    let picture = floats(&[2, 3, 126, 126]);
    let strides = vec![ints("strides", &[14, 14])];
    let patches = shape(
        "Conv",
        strides,
        &[picture.clone(), floats(&[32, 3, 14, 14])],
    );
    assert_eq!(patches, [2, 32, 9, 9]);
    let padded = vec![ints("pads", &[1, 1, 1, 1]), ints("dilations", &[2, 2])];
    assert_eq!(
        shape("Conv", padded, &[picture, floats(&[8, 3, 3, 3])]),
        [2, 8, 124, 124]
    );
    assert_eq!(
        shape(
            "MatMul",
            vec![],
            &[floats(&[4, 1, 5, 6]), floats(&[3, 6, 7])]
        ),
        [4, 3, 5, 7]
    );
    assert_eq!(
        shape("MatMul", vec![], &[floats(&[6]), floats(&[3, 6, 7])]),
        [3, 7]
    );
    let target = [floats(&[2, 3, 4]), list(&[0, -1])];
    assert_eq!(shape("Reshape", vec![], &target), [2, 12]);
    assert_eq!(
        shape("Flatten", vec![int("axis", -1)], &[floats(&[2, 3, 4])]),
        [6, 4]
    );
    assert_eq!(
        shape("Unsqueeze", vec![], &[floats(&[2, 3]), list(&[-1, 0])]),
        [1, 2, 3, 1]
    );
    let rows = [
        floats(&[2, 9, 5]),
        Fact::of(Some(DataType::Int64), vec![2, 4, 1]),
    ];
    assert_eq!(
        shape("GatherND", vec![int("batch_dims", 1)], &rows),
        [2, 4, 5]
    );
    // A reshape that does not fit has no shape.
    let call = facts(
        &node("", "Reshape", 2, 1, vec![]),
        &[floats(&[2, 3]), list(&[4, -1])],
    );
    assert_eq!(call[0].shape, None);
}

#[test]
fn attention_adds_what_is_new_to_its_past() {
    let caches = |found: &[Fact]| -> Vec<Vec<i64>> {
        found.iter().filter_map(|f| f.shape.clone()).collect()
    };
    let heads = vec![int("num_heads", 4), int("kv_num_heads", 2)];
    let group = node("com.microsoft", "GroupQueryAttention", 5, 3, heads);
    let past = floats(&[1, 2, 6, 8]);
    let inputs = [
        floats(&[1, 3, 32]),
        floats(&[1, 3, 16]),
        floats(&[1, 3, 16]),
        past.clone(),
        past.clone(),
    ];
    assert_eq!(
        caches(&facts(&group, &inputs)),
        [vec![1, 3, 32], vec![1, 2, 9, 8], vec![1, 2, 9, 8]]
    );
    let heads = vec![int("q_num_heads", 4), int("kv_num_heads", 2)];
    let standard = node("", "Attention", 6, 3, heads);
    let mask = floats(&[1, 1, 3, 9]);
    let inputs = [
        floats(&[1, 3, 32]),
        floats(&[1, 3, 16]),
        floats(&[1, 3, 16]),
        mask,
        past.clone(),
        past,
    ];
    let found = caches(&facts(&standard, &inputs));
    assert_eq!(
        found[..3],
        [vec![1, 3, 32], vec![1, 2, 9, 8], vec![1, 2, 9, 8]]
    );
}

#[test]
fn all_of_a_row_sorted_is_known() {
    let scores = floats(&[2, 4]);
    let first = facts(
        &node("", "TopK", 2, 2, vec![]),
        &[scores.clone(), list(&[4])],
    );
    assert!(first[1].permutes, "every place is taken");
    let sort = node("", "TopK", 2, 2, vec![int("largest", 0)]);
    let sorted = facts(&sort, &[first[1].clone(), list(&[4])]);
    assert_eq!(
        sorted[0].data,
        Some(Data::Ints([0, 1, 2, 3, 0, 1, 2, 3].into()))
    );
    let some = facts(&node("", "TopK", 2, 2, vec![]), &[scores, list(&[3])]);
    assert!(!some[1].permutes);
    assert_eq!(some[1].shape, Some(vec![2, 3]));
    assert_eq!(facts(&sort, &[some[1].clone(), list(&[3])])[0].data, None);
}
