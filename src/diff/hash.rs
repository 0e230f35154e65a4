//! Hashes of graph structure, used to *propose* which nodes correspond.
//!
//! They are 64 bits wide, fast, and not relied on: what is proposed is compared
//! element by element, so a collision can make a report longer, never shorter.

use super::side::{ConstId, Side};
use crate::ir::{AttrValue, Attribute, Model, Node, NodeId};

/// Combines numbers, in order.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mix(u64);

impl Mix {
    pub(super) fn new(tag: u64) -> Self {
        Self(0x9e37_79b9_7f4a_7c15).with(tag)
    }

    pub(super) fn add(&mut self, number: u64) {
        let product = u128::from(self.0.rotate_left(23) ^ number ^ 0xa076_1d64_78bd_642f)
            * u128::from(0xe703_7ed1_a0b4_28db_u64 ^ number.rotate_left(32));
        self.0 = (product as u64) ^ ((product >> 64) as u64) ^ self.0.wrapping_mul(31);
    }

    pub(super) fn with(mut self, number: u64) -> Self {
        self.add(number);
        self
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.add(u64::from_le_bytes(word));
        }
        self.add(bytes.len() as u64);
    }

    pub(super) fn end(self) -> u64 {
        self.0
    }
}

/// How much of a node has to agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Level {
    /// Operator, attributes, contents of constants.
    Exact,
    /// Operator, attributes, type and dimensions of constants.
    Shape,
    /// Operator.
    Operator,
}

impl Level {
    pub(super) const ALL: [Self; 3] = [Self::Exact, Self::Shape, Self::Operator];
}

/// Whether the operands of a node may be exchanged: the result is the same (of more
/// than two operands a sum depends on their order). Not so of `Max` and `Min`, whose
/// operands may be 0 and −0; of operators of old sets that say how the second is
/// broadcast; of a model-local function that bears an operator's name.
pub(super) fn commutes(model: &Model, node: &Node) -> bool {
    const OPERATORS: [&str; 11] = [
        "Add",
        "Mul",
        "And",
        "Or",
        "Xor",
        "Equal",
        "Sum",
        "Mean",
        "BitwiseAnd",
        "BitwiseOr",
        "BitwiseXor",
    ];
    node.domain.is_empty()
        && node.inputs.len() == 2
        && node.inputs.iter().all(Option::is_some)
        && OPERATORS.contains(&node.op_type.as_str())
        && node.attributes.is_empty()
        && !model.is_function(node)
}

/// Number of inputs without the omitted ones at the end.
pub(super) fn arity(node: &Node) -> usize {
    node.inputs
        .iter()
        .rposition(Option::is_some)
        .map_or(0, |at| at + 1)
}

impl Side<'_> {
    /// A constant, as far as a level looks.
    pub(super) fn constant_hash(&self, id: ConstId, level: Level) -> u64 {
        let constant = &self.constants[id];
        let mut mix = Mix::new(1);
        match level {
            Level::Exact => mix.bytes(&constant.digest[..16]),
            Level::Shape => {
                mix.bytes(constant.dtype.to_string().as_bytes());
                constant.dims.iter().for_each(|d| mix.add(*d as u64));
            }
            Level::Operator => {}
        }
        mix.end()
    }

    /// A node by itself: nothing of what it is connected to but constants.
    /// `function` numbers functions alike on both sides.
    pub(super) fn node_hash(
        &self,
        id: NodeId,
        level: Level,
        function: &dyn Fn(usize) -> u64,
    ) -> u64 {
        let node = self.model.node(id);
        let mut mix = Mix::new(2);
        match self.model.function_of(node) {
            Some(f) => mix.add(function(f)),
            None => {
                mix.bytes(node.domain.as_bytes());
                mix.bytes(node.op_type.as_bytes());
            }
        }
        if level == Level::Operator {
            return mix.end();
        }
        // Attributes in no order: their hashes are added up.
        let mut sum = 0u64;
        for (index, attribute) in node.attributes.iter().enumerate() {
            let default = self
                .defaults(node)
                .iter()
                .find(|(n, _)| *n == attribute.name);
            if default.is_none_or(|(_, d)| !d.is(&attribute.value)) {
                sum = sum.wrapping_add(self.attribute_hash(id, index, attribute, level));
            }
        }
        mix.add(sum);
        let mut slots: Vec<u64> = Vec::new();
        for (slot, input) in node.inputs.iter().enumerate().take(arity(node)) {
            let place = if commutes(self.model, node) {
                0
            } else {
                slot as u64 + 1
            };
            let what = match input {
                None => 3,
                Some(v) => match self.constant_of[v.index()] {
                    Some(c) => self.constant_hash(c, level),
                    None => 4,
                },
            };
            slots.push(Mix::new(place).with(what).end());
        }
        if commutes(self.model, node) {
            slots.sort_unstable();
        }
        slots.into_iter().for_each(|s| mix.add(s));
        mix.end()
    }

    fn attribute_hash(
        &self,
        node: NodeId,
        index: usize,
        attribute: &Attribute,
        level: Level,
    ) -> u64 {
        let mut mix = Mix::new(5);
        mix.bytes(attribute.name.as_bytes());
        match &attribute.value {
            AttrValue::Float(v) => mix.add(u64::from(v.to_bits())),
            AttrValue::Int(v) => mix.add(*v as u64),
            AttrValue::String(v) => mix.bytes(v),
            AttrValue::Floats(v) => v.iter().for_each(|f| mix.add(u64::from(f.to_bits()))),
            AttrValue::Ints(v) => v.iter().for_each(|i| mix.add(*i as u64)),
            AttrValue::Strings(v) => v.iter().for_each(|s| mix.bytes(s)),
            AttrValue::Tensor(_) => match self.attribute_constants.get(&(node, index)) {
                Some(c) => mix.add(self.constant_hash(*c, level)),
                None => mix.add(6),
            },
            // Bodies are hashed with the values that they capture.
            AttrValue::Graph(_) => mix.add(7),
            AttrValue::Graphs(list) => mix.add(list.len() as u64),
            AttrValue::Ref(name) => mix.bytes(name.as_bytes()),
            AttrValue::Other(bytes) => mix.bytes(&self.essence(bytes)),
        }
        mix.end()
    }
}
