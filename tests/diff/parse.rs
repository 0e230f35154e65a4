//! ONNX's textual syntax → protobuf, as far as the cases need it, and in two points
//! further: float elements may be given as bits (`0x7fc00001`) and external tensors
//! by their entries. Source: onnx `docs/Syntax.md`.

use duet_onnx::ir::DataType;
use duet_onnx::proto::{
    AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, StringStringEntryProto,
    TensorProto, TensorShapeProto, TypeProto, ValueInfoProto, attribute_proto::AttributeType,
    tensor_proto::DataLocation, tensor_shape_proto, type_proto,
};

use crate::common::opset;

/// A piece of text.
#[derive(Clone, Debug, PartialEq)]
enum Token {
    Word(String),
    Text(String),
    Number(String),
    Sign(&'static str),
}

const SIGNS: [&str; 14] = [
    "=>", "<", ">", "(", ")", "{", "}", "[", "]", ",", "=", ":", "@", "?",
];

fn tokens(text: &str) -> Vec<Token> {
    let mut found = Vec::new();
    let mut rest = text;
    loop {
        rest = rest.trim_start();
        if let Some(comment) = rest.strip_prefix('#') {
            rest = comment.split_once('\n').map_or("", |(_, after)| after);
            continue;
        }
        let Some(c) = rest.chars().next() else {
            return found;
        };
        if c == '"' {
            let mut out = String::new();
            let mut chars = rest.char_indices().skip(1);
            let end = loop {
                match chars.next() {
                    Some((at, '"')) => break at + 1,
                    Some((_, '\\')) => out.extend(chars.next().map(|(_, c)| c)),
                    Some((_, c)) => out.push(c),
                    None => panic!("a text without an end: {rest}"),
                }
            };
            found.push(Token::Text(out));
            rest = &rest[end..];
        } else if let Some(sign) = SIGNS.iter().find(|s| rest.starts_with(**s)) {
            found.push(Token::Sign(sign));
            rest = &rest[sign.len()..];
        } else if c.is_ascii_digit() || c == '-' {
            let inside = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '+');
            let end = rest.find(|c| !inside(c)).unwrap_or(rest.len());
            found.push(Token::Number(rest[..end].to_owned()));
            rest = &rest[end..];
        } else {
            let inside = |c: char| c.is_alphanumeric() || matches!(c, '.' | '_' | '/');
            let end = rest.find(|c| !inside(c)).unwrap_or(rest.len());
            assert!(end > 0, "unexpected text: {rest}");
            found.push(Token::Word(rest[..end].to_owned()));
            rest = &rest[end..];
        }
    }
}

struct Parser {
    tokens: Vec<Token>,
    at: usize,
}

/// A model in textual syntax.
pub(crate) fn model(text: &str) -> ModelProto {
    let mut p = Parser {
        tokens: tokens(text),
        at: 0,
    };
    let mut model = ModelProto::default();
    p.expect("<");
    while !p.take(">") {
        let key = p.word();
        p.expect(":");
        match key.as_str() {
            "ir_version" => model.ir_version = Some(p.int()),
            "producer_name" => model.producer_name = Some(p.word()),
            "producer_version" => model.producer_version = Some(p.word()),
            "domain" => model.domain = Some(p.word()),
            "model_version" => model.model_version = Some(p.int()),
            "doc_string" => model.doc_string = Some(p.word()),
            "opset_import" => model.opset_import = p.opsets(),
            "metadata_props" => model.metadata_props = p.entries(),
            other => panic!("{other} of a model"),
        }
        p.take(",");
    }
    model.graph = Some(p.graph());
    while p.at < p.tokens.len() {
        model.functions.push(p.function());
    }
    model
}

impl Parser {
    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at)
    }

    fn next(&mut self) -> Token {
        self.at += 1;
        let token = self.tokens.get(self.at - 1).cloned();
        token.unwrap_or_else(|| panic!("the text ends too early"))
    }

    fn is(&self, sign: &str) -> bool {
        matches!(self.peek(), Some(Token::Sign(s)) if *s == sign)
    }

    fn take(&mut self, sign: &str) -> bool {
        let found = self.is(sign);
        self.at += usize::from(found);
        found
    }

    #[track_caller]
    fn expect(&mut self, sign: &str) {
        let near = &self.tokens[self.at.saturating_sub(4)..self.tokens.len().min(self.at + 4)];
        assert!(self.is(sign), "expected {sign} near {near:?}");
        self.at += 1;
    }

    fn word(&mut self) -> String {
        match self.next() {
            Token::Word(w) | Token::Text(w) => w,
            other => panic!(
                "expected a name, found {other:?} after {:?}",
                &self.tokens[..self.at]
            ),
        }
    }

    fn int(&mut self) -> i64 {
        match self.next() {
            Token::Number(n) => n.parse().unwrap_or_else(|e| panic!("{n}: {e}")),
            other => panic!("expected a number, found {other:?}"),
        }
    }

    fn opsets(&mut self) -> Vec<duet_onnx::proto::OperatorSetIdProto> {
        let pairs = |p: &mut Self| {
            let domain = p.word();
            p.expect(":");
            let version = p.int();
            opset(&domain, version)
        };
        self.list("[", "]", pairs)
    }

    fn entries(&mut self) -> Vec<StringStringEntryProto> {
        self.list("[", "]", |p| {
            let key = p.word();
            p.expect(":");
            StringStringEntryProto {
                key: Some(key),
                value: Some(p.word()),
            }
        })
    }

    fn list<T>(&mut self, open: &str, close: &str, one: impl Fn(&mut Self) -> T) -> Vec<T> {
        self.expect(open);
        let mut found = Vec::new();
        while !self.take(close) {
            found.push(one(self));
            self.take(",");
        }
        found
    }

    fn dtype(&self) -> Option<DataType> {
        let Some(Token::Word(word)) = self.peek() else {
            return None;
        };
        let mut all = (1..40).map(DataType::from_code);
        all.find(|t| t.to_string() == *word)
    }

    /// `float[2,N] x`, or just a name.
    fn value(&mut self) -> ValueInfoProto {
        let ty = self.dtype().map(|dtype| {
            self.at += 1;
            let shape = if self.is("[") {
                let dims = self.list("[", "]", |p| {
                    let value = match p.next() {
                        Token::Number(n) => Some(tensor_shape_proto::dimension::Value::DimValue(
                            n.parse().unwrap(),
                        )),
                        Token::Word(w) | Token::Text(w) => {
                            Some(tensor_shape_proto::dimension::Value::DimParam(w))
                        }
                        Token::Sign(_) => None,
                    };
                    tensor_shape_proto::Dimension {
                        value,
                        denotation: None,
                    }
                });
                (!dims.is_empty()).then_some(dims)
            } else {
                Some(Vec::new())
            };
            TypeProto {
                value: Some(type_proto::Value::TensorType(type_proto::Tensor {
                    elem_type: Some(dtype.code()),
                    shape: shape.map(|dim| TensorShapeProto { dim }),
                })),
                denotation: None,
            }
        });
        ValueInfoProto {
            name: Some(self.word()),
            r#type: ty,
            ..Default::default()
        }
    }

    fn graph(&mut self) -> GraphProto {
        let mut graph = GraphProto {
            name: Some(self.word()),
            input: self.list("(", ")", Self::value),
            ..Default::default()
        };
        self.expect("=>");
        graph.output = self.list("(", ")", Self::value);
        if self.take("<") {
            while !self.take(">") {
                let start = self.at;
                let info = self.value();
                if self.take("=") {
                    self.at = start;
                    let tensor = self.initializer();
                    graph.initializer.push(tensor);
                } else {
                    graph.value_info.push(info);
                }
                self.take(",");
            }
        }
        graph.node = self.nodes();
        graph
    }

    fn nodes(&mut self) -> Vec<NodeProto> {
        self.expect("{");
        let mut found = Vec::new();
        while !self.take("}") {
            found.push(self.node());
        }
        found
    }

    fn node(&mut self) -> NodeProto {
        let mut node = NodeProto::default();
        if self.take("[") {
            node.name = Some(self.word());
            self.expect("]");
        }
        while !self.take("=") {
            node.output.push(self.word());
            self.take(",");
        }
        let op = self.word();
        match op.rsplit_once('.') {
            Some((domain, op)) => {
                node.domain = Some(domain.to_owned());
                node.op_type = Some(op.to_owned());
            }
            None => node.op_type = Some(op),
        }
        if self.is("<") {
            node.attribute = self.list("<", ">", Self::attribute);
        }
        node.input = self.list("(", ")", Self::word);
        node
    }

    fn attribute(&mut self) -> AttributeProto {
        use AttributeType as T;
        let mut a = AttributeProto {
            name: Some(self.word()),
            ..Default::default()
        };
        let stated = self.take(":").then(|| self.word());
        self.expect("=");
        let ty = match self.peek().cloned() {
            Some(Token::Number(n))
                if n.contains(['.', 'e', 'x']) || stated.as_deref() == Some("float") =>
            {
                self.at += 1;
                a.f = Some(float(&n));
                T::Float
            }
            Some(Token::Number(_)) => {
                a.i = Some(self.int());
                T::Int
            }
            Some(Token::Text(s)) => {
                self.at += 1;
                a.s = Some(s.into_bytes().into());
                T::String
            }
            Some(Token::Sign("@")) => {
                self.at += 1;
                a.ref_attr_name = Some(self.word());
                match stated.as_deref() {
                    Some("float") => T::Float,
                    Some("tensor") => T::Tensor,
                    _ => T::Int,
                }
            }
            Some(Token::Sign("[")) => {
                let all = self.list("[", "]", Self::next);
                let text = |t: &Token| match t {
                    Token::Number(n) | Token::Text(n) | Token::Word(n) => n.clone(),
                    Token::Sign(s) => (*s).to_owned(),
                };
                let numbers = all.iter().map(text);
                match (all.first(), stated.as_deref()) {
                    (Some(Token::Text(_)), _) => {
                        a.strings = numbers.map(|s| s.into_bytes().into()).collect();
                        T::Strings
                    }
                    (Some(Token::Number(n)), _) if n.contains(['.', 'e', 'x']) => {
                        a.floats = numbers.map(|n| float(&n)).collect();
                        T::Floats
                    }
                    (None, Some("floats")) => T::Floats,
                    _ => {
                        a.ints = numbers.map(|n| n.parse().unwrap()).collect();
                        T::Ints
                    }
                }
            }
            Some(Token::Word(_)) if self.dtype().is_some() => {
                a.t = Some(self.tensor());
                T::Tensor
            }
            Some(Token::Word(_)) => {
                a.g = Some(self.graph());
                T::Graph
            }
            other => panic!("an attribute of {other:?}"),
        };
        a.r#type = Some(ty.into());
        a
    }

    /// `float[2] w = {1, 2}` or `float[2] w = ["location": "w.bin"]`.
    fn initializer(&mut self) -> TensorProto {
        let dtype = self
            .dtype()
            .unwrap_or_else(|| panic!("an initializer has a type"));
        self.at += 1;
        let dims = self.dims();
        let name = self.word();
        self.expect("=");
        self.contents(dtype, dims, Some(name))
    }

    /// `float[2] {1, 2}` or `float[2] ["location": "w.bin"]`.
    fn tensor(&mut self) -> TensorProto {
        let dtype = self
            .dtype()
            .unwrap_or_else(|| panic!("a tensor has a type"));
        self.at += 1;
        let dims = self.dims();
        self.contents(dtype, dims, None)
    }

    /// Elements, or where they lie.
    fn contents(&mut self, dtype: DataType, dims: Vec<i64>, name: Option<String>) -> TensorProto {
        let mut tensor = TensorProto {
            name,
            data_type: Some(dtype.code()),
            dims,
            ..Default::default()
        };
        if self.is("[") {
            tensor.external_data = self.entries();
            tensor.data_location = Some(DataLocation::External.into());
        } else {
            self.elements(dtype, &mut tensor);
        }
        tensor
    }

    fn dims(&mut self) -> Vec<i64> {
        if self.is("[") {
            self.list("[", "]", Self::int)
        } else {
            Vec::new()
        }
    }

    fn elements(&mut self, dtype: DataType, tensor: &mut TensorProto) {
        let all = self.list("{", "}", |p| match p.next() {
            Token::Number(n) | Token::Text(n) | Token::Word(n) => n,
            Token::Sign(s) => panic!("an element {s}"),
        });
        if dtype == DataType::String {
            tensor.string_data = all.into_iter().map(|s| s.into_bytes().into()).collect();
            return;
        }
        let one = |n: &String| -> Vec<u8> {
            let int = || n.parse::<i64>().unwrap_or_else(|e| panic!("{n}: {e}"));
            match dtype {
                DataType::Float => float(n).to_le_bytes().to_vec(),
                DataType::Double => n.parse::<f64>().unwrap().to_le_bytes().to_vec(),
                DataType::Int64 | DataType::Uint64 => int().to_le_bytes().to_vec(),
                DataType::Int32 | DataType::Uint32 => int().to_le_bytes()[..4].to_vec(),
                DataType::Float16 | DataType::Bfloat16 | DataType::Int16 | DataType::Uint16 => {
                    int().to_le_bytes()[..2].to_vec()
                }
                _ => int().to_le_bytes()[..1].to_vec(),
            }
        };
        tensor.raw_data = Some(all.iter().flat_map(one).collect::<Vec<u8>>().into());
    }

    fn function(&mut self) -> FunctionProto {
        let mut function = FunctionProto::default();
        self.expect("<");
        while !self.take(">") {
            let key = self.word();
            self.expect(":");
            match key.as_str() {
                "domain" => function.domain = Some(self.word()),
                "overload" => function.overload = Some(self.word()),
                "opset_import" => function.opset_import = self.opsets(),
                other => panic!("{other} of a function"),
            }
            self.take(",");
        }
        function.name = Some(self.word());
        if self.take("<") {
            while !self.take(">") {
                let start = self.at;
                let name = self.word();
                if self.is("=") || self.is(":") {
                    self.at = start;
                    let default = self.attribute();
                    function.attribute_proto.push(default);
                } else {
                    function.attribute.push(name);
                }
                self.take(",");
            }
        }
        function.input = self.list("(", ")", Self::word);
        self.expect("=>");
        function.output = self.list("(", ")", Self::word);
        function.node = self.nodes();
        function
    }
}

/// A float by its value or its bits.
fn float(text: &str) -> f32 {
    match text.strip_prefix("0x") {
        Some(hex) => f32::from_bits(u32::from_str_radix(hex, 16).unwrap()),
        None => text.parse().unwrap_or_else(|e| panic!("{text}: {e}")),
    }
}
