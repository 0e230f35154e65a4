//! Small decoders of the same weights, in plain operators and with fused attention.

use std::path::PathBuf;

use duet_onnx::arch::Vlm;
use duet_onnx::proto::{
    AttributeProto, NodeProto, TensorProto, ValueInfoProto, attribute_proto::AttributeType,
};

use crate::common::{
    BOOL, FLOAT, INT64, floats, graph, int, ints, load, longs, model, node, opset, value,
};

const LAYERS: usize = 4;
pub(crate) const WIDTH: i64 = 24;
const VOCABULARY: i64 = 13;
const POSITIONS: i64 = 96;

/// Which operator does the attention of the fused decoder.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Kind {
    /// `GroupQueryAttention` with its cache and rotary embedding.
    Group { packed: bool },
    /// `MultiHeadAttention` with its cache and a bias.
    MultiHead,
    /// `MultiHeadAttention` over a cache that was concatenated before it.
    MultiHeadOver,
    /// ONNX `Attention` with its cache.
    Standard,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Form {
    pub(crate) kind: Kind,
    pub(crate) heads: i64,
    pub(crate) key_heads: i64,
    pub(crate) head_dim: i64,
    /// Rotated columns of a head.
    pub(crate) rotated: i64,
    pub(crate) interleaved: bool,
    pub(crate) softcap: f32,
    /// Residual sum and norm in one operator.
    pub(crate) skip: bool,
    /// Plain operators with int8 rounding between them.
    pub(crate) rounded: bool,
}

pub(crate) const GROUP: Form = Form {
    kind: Kind::Group { packed: true },
    heads: 4,
    key_heads: 2,
    head_dim: 16,
    rotated: 16,
    interleaved: false,
    softcap: 0.0,
    skip: true,
    rounded: false,
};

/// Reproducible numbers in −1..1.
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    pub(crate) fn next(&mut self) -> f32 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 40) as f32 / (1u64 << 23) as f32) - 1.0
    }

    fn many(&mut self, count: i64, scale: f32) -> Vec<f32> {
        (0..count).map(|_| self.next() * scale).collect()
    }
}

/// A graph under construction.
struct Build {
    form: Form,
    nodes: Vec<NodeProto>,
    weights: Vec<TensorProto>,
    count: usize,
}

impl Build {
    fn op(&mut self, op: &str, inputs: &[&str], attributes: Vec<AttributeProto>) -> String {
        let out = format!("value{}", self.count);
        self.add("", op, inputs, &[&out], attributes);
        out
    }

    fn add(
        &mut self,
        domain: &str,
        op: &str,
        inputs: &[&str],
        outputs: &[&str],
        attribute: Vec<AttributeProto>,
    ) {
        self.count += 1;
        self.nodes.push(NodeProto {
            attribute,
            domain: Some(domain.into()),
            name: Some(format!("n{}", self.count)),
            ..node(op, inputs, outputs)
        });
    }

    fn longs(&mut self, values: &[i64]) -> String {
        let name = format!("c{}", self.weights.len());
        self.weights.push(longs(&name, values));
        name
    }

    fn scalar(&mut self, number: f32) -> String {
        let name = format!("c{}", self.weights.len());
        self.weights.push(floats(&name, &[], &[number]));
        name
    }

    fn reshape(&mut self, x: &str, dims: &[i64]) -> String {
        let dims = self.longs(dims);
        self.op("Reshape", &[x, &dims], vec![])
    }

    /// `[b, L, heads · d]` → `[b, heads, L, d]`.
    fn split(&mut self, x: &str, heads: i64) -> String {
        let x = self.reshape(x, &[0, 0, heads, self.form.head_dim]);
        self.op("Transpose", &[&x], vec![ints("perm", &[0, 2, 1, 3])])
    }

    /// `[b, heads, L, d]` → `[b, L, heads · d]`.
    fn join(&mut self, x: &str, heads: i64) -> String {
        let x = self.op("Transpose", &[x], vec![ints("perm", &[0, 2, 1, 3])]);
        self.reshape(&x, &[0, 0, heads * self.form.head_dim])
    }

    fn columns(&mut self, x: &str, columns: &[i64]) -> String {
        let columns = self.longs(columns);
        self.op("Gather", &[x, &columns], vec![int("axis", -1)])
    }

    /// Rotates `[b, heads, L, d]` at `position_ids`.
    fn rotary(&mut self, x: &str) -> String {
        let (width, all) = (self.form.rotated, self.form.head_dim);
        let half = width / 2;
        let place = |i: i64, second: bool| match (self.form.interleaved, second) {
            (true, second) => 2 * i + i64::from(second),
            (false, second) => i + if second { half } else { 0 },
        };
        let firsts: Vec<i64> = (0..half).map(|i| place(i, false)).collect();
        let seconds: Vec<i64> = (0..half).map(|i| place(i, true)).collect();
        // Where each column of the result is in [firsts, seconds, rest].
        let order: Vec<i64> = (0..all)
            .map(|c| {
                let at = |list: &[i64]| list.iter().position(|x| *x == c).map(|p| p as i64);
                at(&firsts)
                    .or_else(|| at(&seconds).map(|p| p + half))
                    .unwrap_or(c)
            })
            .collect();
        let rest: Vec<i64> = (width..all).collect();
        let (a, b) = (self.columns(x, &firsts), self.columns(x, &seconds));
        let axis = self.longs(&[1]);
        let mut tables = Vec::new();
        for table in ["cos", "sin"] {
            let rows = self.op("Gather", &[table, "position_ids"], vec![int("axis", 0)]);
            tables.push(self.op("Unsqueeze", &[&rows, &axis], vec![]));
        }
        let (ac, bs) = (
            self.op("Mul", &[&a, &tables[0]], vec![]),
            self.op("Mul", &[&b, &tables[1]], vec![]),
        );
        let (bc, a_s) = (
            self.op("Mul", &[&b, &tables[0]], vec![]),
            self.op("Mul", &[&a, &tables[1]], vec![]),
        );
        let mut parts = vec![
            self.op("Sub", &[&ac, &bs], vec![]),
            self.op("Add", &[&bc, &a_s], vec![]),
        ];
        if !rest.is_empty() {
            parts.push(self.columns(x, &rest));
        }
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        let joined = self.op("Concat", &parts, vec![int("axis", -1)]);
        self.columns(&joined, &order)
    }

    /// What is added to scores: 0 or −1e9, `[b, 1, L, S]`.
    fn mask(&mut self) -> String {
        let sizes = |b: &mut Self, x: &str, axis: i64| {
            let shape = b.op("Shape", &[x], vec![]);
            let at = format!("c{}", b.weights.len());
            b.weights.push(TensorProto {
                dims: vec![],
                ..longs(&at, &[axis])
            });
            b.op("Gather", &[&shape, &at], vec![int("axis", 0)])
        };
        let (past, new) = (
            sizes(self, "past_key_values.0.key", 2),
            sizes(self, "inputs_embeds", 1),
        );
        let total = self.op("Add", &[&past, &new], vec![]);
        for (name, number) in [("zero", 0), ("one", 1)] {
            self.weights.push(TensorProto {
                dims: vec![],
                ..longs(name, &[number])
            });
        }
        let rows = self.op("Range", &[&past, &total, "one"], vec![]);
        let keys = self.op("Range", &["zero", &total, "one"], vec![]);
        let (column, axes) = (self.longs(&[1]), self.longs(&[1, 2]));
        let rows = self.op("Unsqueeze", &[&rows, &column], vec![]);
        let causal = self.op("LessOrEqual", &[&keys, &rows], vec![]);
        let real = self.op("Cast", &["attention_mask"], vec![int("to", BOOL.into())]);
        let real = self.op("Unsqueeze", &[&real, &axes], vec![]);
        let sees = self.op("And", &[&causal, &real], vec![]);
        let (none, masked) = (self.scalar(0.0), self.scalar(-1e9));
        self.op("Where", &[&sees, &none, &masked], vec![])
    }

    fn norm(&mut self, x: &str, weight: &str) -> String {
        let square = self.op("Mul", &[x, x], vec![]);
        let last = self.longs(&[-1]);
        // The axes became an input with operator set 18.
        let mean = if self.form.kind == Kind::Standard {
            self.op("ReduceMean", &[&square, &last], vec![])
        } else {
            self.op("ReduceMean", &[&square], vec![ints("axes", &[-1])])
        };
        let small = self.scalar(1e-5);
        let sum = self.op("Add", &[&mean, &small], vec![]);
        let root = self.op("Sqrt", &[&sum], vec![]);
        let x = self.op("Div", &[x, &root], vec![]);
        self.op("Mul", &[&x, weight], vec![])
    }

    /// Residual sum and its norm.
    fn add_norm(&mut self, x: &str, y: &str, weight: &str, fused: bool) -> (String, String) {
        if fused && self.form.skip {
            let (norm, sum) = (format!("norm{}", self.count), format!("sum{}", self.count));
            self.add(
                "com.microsoft",
                "SkipSimplifiedLayerNormalization",
                &[x, y, weight],
                &[&norm, "", "", &sum],
                vec![float("epsilon", 1e-5)],
            );
            return (sum, norm);
        }
        let sum = self.op("Add", &[x, y], vec![]);
        let norm = self.norm(&sum, weight);
        (sum, norm)
    }

    /// Through int8 and back, in a quantised decoder.
    fn round(&mut self, x: &str, out: Option<&str>) -> String {
        if !self.form.rounded {
            return x.into();
        }
        let (scale, zero) = (self.scalar(0.04), format!("zero{}", self.weights.len()));
        self.weights.push(TensorProto {
            data_type: Some(3),
            dims: vec![],
            raw_data: Some(vec![0u8].into()),
            ..longs(&zero, &[])
        });
        let small = self.op("QuantizeLinear", &[x, &scale, &zero], vec![]);
        let out = out.map_or(format!("rounded{}", self.count), String::from);
        self.add(
            "",
            "DequantizeLinear",
            &[&small, &scale, &zero],
            &[&out],
            vec![],
        );
        out
    }

    fn append(&mut self, layer: usize, what: &str, new: &str) -> String {
        let present = format!("present.{layer}.{what}");
        let past = format!("past_key_values.{layer}.{what}");
        if self.form.rounded {
            let all = self.op("Concat", &[&past, new], vec![int("axis", 2)]);
            return self.round(&all, Some(&present));
        }
        self.add(
            "",
            "Concat",
            &[&past, new],
            &[&present],
            vec![int("axis", 2)],
        );
        present
    }

    fn biased(&mut self, x: &str, layer: usize, at: i64, columns: i64) -> String {
        if self.form.kind != Kind::MultiHead {
            return x.into();
        }
        let columns: Vec<i64> = (at..at + columns).collect();
        let bias = self.columns(&format!("bias{layer}"), &columns);
        self.op("Add", &[x, &bias], vec![])
    }

    /// Attention of `[b, L, ·]` projections, in plain operators.
    fn plain(&mut self, layer: usize, [q, k, v]: [&str; 3], mask: &str) -> String {
        let f = self.form;
        let (columns, key_columns) = (f.heads * f.head_dim, f.key_heads * f.head_dim);
        let q = self.biased(q, layer, 0, columns);
        let k = self.biased(k, layer, columns, key_columns);
        let v = self.biased(v, layer, columns + key_columns, key_columns);
        let (mut q, mut k) = (self.split(&q, f.heads), self.split(&k, f.key_heads));
        if f.rotated > 0 {
            (q, k) = (self.rotary(&q), self.rotary(&k));
        }
        let v = self.split(&v, f.key_heads);
        let (mut k, mut v) = (
            self.append(layer, "key", &k),
            self.append(layer, "value", &v),
        );
        if f.heads != f.key_heads {
            let groups = f.heads / f.key_heads;
            let (axis, repeat) = (self.longs(&[2]), self.longs(&[1, 1, groups, 1, 1]));
            for x in [&mut k, &mut v] {
                let each = self.op("Unsqueeze", &[x, &axis], vec![]);
                let each = self.op("Expand", &[&each, &repeat], vec![]);
                *x = self.reshape(&each, &[0, f.heads, -1, f.head_dim]);
            }
        }
        let k = self.op("Transpose", &[&k], vec![ints("perm", &[0, 1, 3, 2])]);
        let (q, k) = (self.round(&q, None), self.round(&k, None));
        let scale = self.scalar(1.0 / (f.head_dim as f32).sqrt());
        let mut scores = self.op("MatMul", &[&q, &k], vec![]);
        scores = self.op("Mul", &[&scores, &scale], vec![]);
        if f.softcap > 0.0 {
            let cap = self.scalar(f.softcap);
            let inside = self.op("Div", &[&scores, &cap], vec![]);
            let inside = self.op("Tanh", &[&inside], vec![]);
            scores = self.op("Mul", &[&inside, &cap], vec![]);
        }
        let scores = self.op("Add", &[&scores, mask], vec![]);
        let weights = self.op("Softmax", &[&scores], vec![int("axis", -1)]);
        let out = self.op("MatMul", &[&weights, &v], vec![]);
        self.join(&out, f.heads)
    }

    /// The same in one operator.
    fn fused(&mut self, layer: usize, [q, k, v]: [&str; 3], mask: &str) -> String {
        let f = self.form;
        let name = |what: &str| format!("{what}.{layer}.");
        let cache = |what: &str| [name(what) + "key", name(what) + "value"];
        let ([pk, pv], [nk, nv]) = (cache("past_key_values"), cache("present"));
        let out = format!("attention{layer}");
        match f.kind {
            Kind::Group { packed } => {
                let parts = [q, k, v];
                let all = self.op("Concat", &parts, vec![int("axis", -1)]);
                let [q, k, v] = if packed {
                    [all.as_str(), "", ""]
                } else {
                    parts
                };
                let rotary = f.rotated > 0;
                let (cos, sin) = if rotary { ("cos", "sin") } else { ("", "") };
                self.add(
                    "com.microsoft",
                    "GroupQueryAttention",
                    &[q, k, v, &pk, &pv, "lengths", "total", cos, sin],
                    &[&out, &nk, &nv],
                    vec![
                        int("num_heads", f.heads),
                        int("kv_num_heads", f.key_heads),
                        int("do_rotary", rotary.into()),
                        int("rotary_interleaved", f.interleaved.into()),
                        float("softcap", f.softcap),
                    ],
                );
                out
            }
            Kind::MultiHead => {
                let bias = format!("bias{layer}");
                self.add(
                    "com.microsoft",
                    "MultiHeadAttention",
                    &[q, k, v, &bias, "", mask, &pk, &pv],
                    &[&out, &nk, &nv],
                    vec![int("num_heads", f.heads)],
                );
                out
            }
            Kind::MultiHeadOver => {
                let (q, k) = (self.split(q, f.heads), self.split(k, f.heads));
                let (q, k) = (self.rotary(&q), self.rotary(&k));
                let v = self.split(v, f.heads);
                let (k, v) = (
                    self.append(layer, "key", &k),
                    self.append(layer, "value", &v),
                );
                let (q, k, v) = (
                    self.join(&q, f.heads),
                    self.join(&k, f.heads),
                    self.join(&v, f.heads),
                );
                self.add(
                    "com.microsoft",
                    "MultiHeadAttention",
                    &[&q, &k, &v, "", "", mask],
                    &[&out],
                    vec![int("num_heads", f.heads)],
                );
                out
            }
            Kind::Standard => {
                let (q, k) = (self.split(q, f.heads), self.split(k, f.key_heads));
                let (q, k) = (self.rotary(&q), self.rotary(&k));
                let v = self.split(v, f.key_heads);
                self.add(
                    "",
                    "Attention",
                    &[&q, &k, &v, mask, &pk, &pv],
                    &[&out, &nk, &nv],
                    vec![float("softcap", f.softcap)],
                );
                self.join(&out, f.heads)
            }
        }
    }
}

fn float(name: &str, number: f32) -> AttributeProto {
    AttributeProto {
        name: Some(name.into()),
        f: Some(number),
        r#type: Some(AttributeType::Float.into()),
        ..Default::default()
    }
}

/// The decoder of a form, in plain operators or fused. Both have the same weights.
pub(crate) fn decoder(form: Form, fused: bool) -> Vlm {
    let mut build = Build {
        form,
        nodes: Vec::new(),
        weights: Vec::new(),
        count: 0,
    };
    let mut numbers = Numbers(7);
    let (columns, key_columns) = (form.heads * form.head_dim, form.key_heads * form.head_dim);
    let mut weight = |b: &mut Build, name: String, dims: &[i64], scale: f32| {
        let data = numbers.many(dims.iter().product(), scale);
        b.weights.push(floats(&name, dims, &data));
        name
    };
    if form.rotated > 0 {
        let pairs = form.rotated / 2;
        let angle = |i: i64| (i / pairs) as f32 * 100f32.powf(-((i % pairs) as f32) / pairs as f32);
        for (name, of) in [("cos", f32::cos as fn(f32) -> f32), ("sin", f32::sin)] {
            let data: Vec<f32> = (0..POSITIONS * pairs).map(|i| of(angle(i))).collect();
            build.weights.push(floats(name, &[POSITIONS, pairs], &data));
        }
    }
    let group = matches!(form.kind, Kind::Group { .. });
    let mask = if fused && group {
        let axis = build.longs(&[1]);
        let one = build.longs(&[1]);
        let sum = build.op(
            "ReduceSum",
            &["attention_mask", &axis],
            vec![int("keepdims", 0)],
        );
        let less = build.op("Sub", &[&sum, &one], vec![]);
        build.add("", "Cast", &[&less], &["lengths"], vec![int("to", 6)]);
        let shape = build.op("Shape", &["attention_mask"], vec![]);
        let total = build.op("Gather", &[&shape, &one], vec![int("axis", 0)]);
        let total = build.op("Squeeze", &[&total], vec![]);
        build.add("", "Cast", &[&total], &["total"], vec![int("to", 6)]);
        String::new()
    } else {
        build.mask()
    };
    let first = weight(&mut build, "norm0".into(), &[WIDTH], 1.0);
    let (mut hidden, mut normed) = (String::from("inputs_embeds"), String::new());
    if normed.is_empty() {
        normed = build.norm("inputs_embeds", &first);
    }
    for layer in 0..LAYERS {
        let mut project = |b: &mut Build, what: &str, columns: i64| {
            let w = weight(b, format!("{what}{layer}"), &[WIDTH, columns], 0.6);
            b.op("MatMul", &[&normed, &w], vec![])
        };
        let q = project(&mut build, "q", columns);
        let k = project(&mut build, "k", key_columns);
        let v = project(&mut build, "v", key_columns);
        if form.kind == Kind::MultiHead {
            weight(&mut build, format!("bias{layer}"), &[3 * columns], 0.5);
        }
        let parts = [q.as_str(), &k, &v];
        let out = if fused {
            build.fused(layer, parts, &mask)
        } else {
            build.plain(layer, parts, &mask)
        };
        let w = weight(&mut build, format!("o{layer}"), &[columns, WIDTH], 0.4);
        let out = build.op("MatMul", &[&out, &w], vec![]);
        let w = weight(&mut build, format!("inner_norm{layer}"), &[WIDTH], 1.0);
        (hidden, normed) = build.add_norm(&hidden, &out, &w, fused);
        let up = weight(&mut build, format!("up{layer}"), &[WIDTH, 32], 0.6);
        let down = weight(&mut build, format!("down{layer}"), &[32, WIDTH], 0.6);
        let inner = build.op("MatMul", &[&normed, &up], vec![]);
        let inner = build.op("Sigmoid", &[&inner], vec![]);
        let inner = build.op("MatMul", &[&inner, &down], vec![]);
        let w = weight(&mut build, format!("next_norm{layer}"), &[WIDTH], 1.0);
        (hidden, normed) = build.add_norm(&hidden, &inner, &w, fused);
    }
    let head = weight(&mut build, "head".into(), &[WIDTH, VOCABULARY], 1.0);
    build.add("", "MatMul", &[&normed, &head], &["logits"], vec![]);

    let mut inputs = vec![
        value("inputs_embeds", FLOAT, &[-1, -1, WIDTH]),
        value("attention_mask", INT64, &[-1, -1]),
    ];
    if !(fused && group) && form.rotated > 0 {
        inputs.push(value("position_ids", INT64, &[-1, -1]));
    }
    // Fused decoders list all keys before all values, and leave the head width open.
    let width = if fused { -1 } else { form.head_dim };
    let width = if group { width } else { form.head_dim };
    let cache = |what: &str| -> Vec<ValueInfoProto> {
        let one = |layer: usize, part: &str| {
            let dims = [-1, form.key_heads, -1, width];
            value(&format!("{what}.{layer}.{part}"), FLOAT, &dims)
        };
        let keys = (0..LAYERS).map(|l| one(l, "key"));
        let values = (0..LAYERS).map(|l| one(l, "value"));
        if fused {
            keys.chain(values).collect()
        } else {
            (0..LAYERS)
                .flat_map(|l| [one(l, "key"), one(l, "value")])
                .collect()
        }
    };
    inputs.extend(cache("past_key_values"));
    let mut outputs = vec![value("logits", FLOAT, &[-1, -1, VOCABULARY])];
    outputs.extend(cache("present"));
    let standard = if form.kind == Kind::Standard { 23 } else { 17 };
    let mut proto = model(graph(
        "decoder",
        &inputs,
        &outputs,
        &build.weights,
        &build.nodes,
    ));
    proto.ir_version = Some(10);
    proto.opset_import = vec![opset("", standard), opset("com.microsoft", 1)];
    let file = PathBuf::from("decoder_model_merged.onnx");
    Vlm::new(vec![(file, String::new(), load(&proto))])
}
