//! What a comparison found: the types that every rendering, policy and script reads.
//!
//! A [`Report`] serialises to one JSON document (`duet diff --format json`).
//! Fields are only ever added within a [`SCHEMA_VERSION`]; a field that changes
//! its meaning or goes away raises it.
//!
//! ```text
//! Report ── files: FileReport* ─┬─ changes: Change* ── places: Place* (one for each repeat)
//!                               ├─ storage: StorageNote*   where bytes lie; never a difference
//!                               ├─ renames                 names only; never a difference
//!                               └─ model: ModelFacts       sizes and counts of both sides
//! ```

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::policy::PolicyResult;

/// Version of the JSON document.
pub const SCHEMA_VERSION: u32 = 1;

/// What kind of thing changed, the gravest first. The order is the order of severity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Class {
    /// Inputs and outputs of the model: names, types, dimensions, order. Clients break.
    Contract,
    /// IR version, operator sets, domains. Runtimes may refuse the file.
    Version,
    /// Nodes, attributes, wiring, functions, whole model files. Another computation.
    Structure,
    /// Contents, type or dimensions of constants.
    Weights,
    /// Files beside the models: processor, generation and other configs.
    Config,
    /// Stated types of intermediate values.
    Shapes,
    /// Producer, key/value metadata of models, graphs, nodes and values.
    Metadata,
    /// What no runtime acts on: doc strings, graph names, operands of a
    /// commutative operator in another order, a default that is spelled out.
    /// Alone it leaves two models equal.
    Cosmetic,
}

impl Class {
    /// All classes, the gravest first.
    pub const ALL: [Self; 8] = [
        Self::Contract,
        Self::Version,
        Self::Structure,
        Self::Weights,
        Self::Config,
        Self::Shapes,
        Self::Metadata,
        Self::Cosmetic,
    ];

    /// The word that JSON, policies and `--ignore` use.
    pub fn word(self) -> &'static str {
        match self {
            Self::Contract => "contract",
            Self::Version => "version",
            Self::Structure => "structure",
            Self::Weights => "weights",
            Self::Config => "config",
            Self::Shapes => "shapes",
            Self::Metadata => "metadata",
            Self::Cosmetic => "cosmetic",
        }
    }

    /// Whether changes of this class make two models different.
    pub fn counts(self) -> bool {
        self != Self::Cosmetic
    }
}

/// What exactly changed. The words (kebab-case) are stable: rule ids of SARIF,
/// names in policies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    // contract
    /// A model input that only B has.
    InputAdded,
    /// A model input that only A has.
    InputRemoved,
    /// An input with another name, at the same place and of the same type.
    InputRenamed,
    /// Type or dimensions of an input.
    InputType,
    /// The same inputs in another order.
    InputOrder,
    /// A model output that only B has.
    OutputAdded,
    /// A model output that only A has.
    OutputRemoved,
    /// An output with another name, computed by the same value.
    OutputRenamed,
    /// Type or dimensions of an output.
    OutputType,
    /// The same outputs in another order.
    OutputOrder,
    // version
    /// `ir_version`.
    IrVersion,
    /// Version of an operator set, of the model or of a function.
    Opset,
    // structure
    /// Nodes that only B has, between or beside what is in both.
    NodesAdded,
    /// Nodes that only A has.
    NodesRemoved,
    /// Nodes of A that have others in their place.
    NodesReplaced,
    /// Nodes that a pass of ours inserted (`duet/<pass>/…`), with what it redirected.
    Rewrite,
    /// An attribute of a node that is in both.
    Attribute,
    /// An input of a node in both comes from elsewhere.
    Rewired,
    /// A model output is given out by another value.
    OutputRewired,
    /// Optional outputs of a node that are asked for or not.
    OutputsAsked,
    /// A model-local function that only B has.
    FunctionAdded,
    /// A model-local function that only A has.
    FunctionRemoved,
    /// Signature of a function: number of inputs, outputs, its attributes.
    FunctionSignature,
    /// Quantisation annotation of a value.
    Quantization,
    /// Training information, device configurations, and fields that this version
    /// does not know, compared byte for byte.
    Opaque,
    /// A model file that only B has.
    ModelAdded,
    /// A model file that only A has.
    ModelRemoved,
    /// A model file of another name: runtimes find models by it.
    ModelRenamed,
    // weights
    /// Elements of a constant.
    WeightValues,
    /// Element type of a constant.
    WeightType,
    /// Dimensions of a constant.
    WeightShape,
    /// A constant that has become computed, or the other way round, with the same reader.
    WeightSource,
    // config
    /// A key that only B has.
    ConfigAdded,
    /// A key that only A has.
    ConfigRemoved,
    /// Another value for a key.
    ConfigChanged,
    /// A file, no model, that only B has.
    FileAdded,
    /// A file, no model, that only A has.
    FileRemoved,
    /// Another contents of a file that is neither a model nor read as JSON.
    FileChanged,
    // shapes
    /// Type or dimensions of an intermediate value.
    ValueType,
    // metadata
    /// Producer's name or version, model version, model domain.
    Producer,
    /// A key of the model's metadata.
    Metadata,
    /// Metadata of graphs, nodes, values, tensors or functions.
    ElementMetadata,
    // cosmetic
    /// Doc strings.
    DocString,
    /// Name of a graph, function, or of a function's domain.
    GraphName,
    /// Operands of a commutative operator in another order.
    OperandOrder,
    /// A default that one side spells out.
    DefaultAttribute,
    /// A type that only one side states.
    TypeStated,
    /// An initializer that nothing reads.
    UnusedInitializer,
    /// An operator set that no node needs.
    UnusedOpset,
}

impl Kind {
    /// All kinds, in the order of their declaration.
    pub const ALL: [Self; 49] = [
        Self::InputAdded,
        Self::InputRemoved,
        Self::InputRenamed,
        Self::InputType,
        Self::InputOrder,
        Self::OutputAdded,
        Self::OutputRemoved,
        Self::OutputRenamed,
        Self::OutputType,
        Self::OutputOrder,
        Self::IrVersion,
        Self::Opset,
        Self::NodesAdded,
        Self::NodesRemoved,
        Self::NodesReplaced,
        Self::Rewrite,
        Self::Attribute,
        Self::Rewired,
        Self::OutputRewired,
        Self::OutputsAsked,
        Self::FunctionAdded,
        Self::FunctionRemoved,
        Self::FunctionSignature,
        Self::Quantization,
        Self::Opaque,
        Self::ModelAdded,
        Self::ModelRemoved,
        Self::ModelRenamed,
        Self::WeightValues,
        Self::WeightType,
        Self::WeightShape,
        Self::WeightSource,
        Self::ConfigAdded,
        Self::ConfigRemoved,
        Self::ConfigChanged,
        Self::FileAdded,
        Self::FileRemoved,
        Self::FileChanged,
        Self::ValueType,
        Self::Producer,
        Self::Metadata,
        Self::ElementMetadata,
        Self::DocString,
        Self::GraphName,
        Self::OperandOrder,
        Self::DefaultAttribute,
        Self::TypeStated,
        Self::UnusedInitializer,
        Self::UnusedOpset,
    ];

    /// The word that JSON, SARIF and policies use.
    pub fn word(self) -> String {
        // The serialised form is a string by construction of the enum.
        match serde_json::to_value(self) {
            Ok(serde_json::Value::String(word)) => word,
            _ => String::new(),
        }
    }
}

/// How two files, or two sides as wholes, stand to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// The same bytes (and the same bytes of weights).
    Identical,
    /// Other bytes, the same computation: names, order, storage, cosmetics.
    Equal,
    /// At least one change that counts.
    Different,
}

/// A comparison.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// Version of duet that made it.
    pub duet: String,
    /// First path, as it was given.
    pub a: String,
    /// Second path, as it was given.
    pub b: String,
    /// The whole comparison's result; [`Report::settle`] computes it.
    pub verdict: Verdict,
    /// Number of changes that count (not ignored), by class; cosmetic ones too.
    pub counts: BTreeMap<Class, usize>,
    /// Number of changes that were ignored.
    pub ignored: usize,
    /// What a policy came to, if there was one.
    pub policy: Option<PolicyResult>,
    /// One entry for each file of either side, by path. Files of no interest
    /// (identical ones) are listed too.
    pub files: Vec<FileReport>,
}

impl Report {
    /// Recomputes verdicts and counts from the changes: to be called after
    /// [`Change::ignored`] was set on some of them.
    pub fn settle(&mut self) {
        self.counts.clear();
        self.ignored = 0;
        self.verdict = Verdict::Identical;
        for file in &mut self.files {
            let mut counts = false;
            for change in &file.changes {
                if change.ignored.is_some() {
                    self.ignored += 1;
                } else {
                    *self.counts.entry(change.class).or_default() += 1;
                    counts |= change.class.counts();
                }
            }
            file.verdict = if counts {
                Verdict::Different
            } else if file.same_bytes {
                Verdict::Identical
            } else {
                Verdict::Equal
            };
            self.verdict = self.verdict.max(file.verdict);
        }
    }

    /// Whether a change counts, or a policy is broken: exit code 1.
    pub fn differs(&self) -> bool {
        let broken = self.policy.as_ref().is_some_and(|p| !p.passed());
        self.verdict == Verdict::Different || broken
    }
}

/// What a file is compared as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FileKind {
    /// An ONNX model with the external data that it names.
    Model,
    /// JSON, compared key by key.
    Json,
    /// Anything else, compared byte for byte.
    Other,
}

/// On which sides a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Presence {
    /// On both.
    Both,
    /// Only on side A: it was removed.
    OnlyA,
    /// Only on side B: it was added.
    OnlyB,
}

/// One file of a comparison.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FileReport {
    /// Path below the compared directory, with `/`; the file's name where two
    /// files were named. Side A's, unless only B has the file.
    pub path: String,
    /// Path on side B, if it is another one.
    pub path_b: Option<String>,
    /// What it was compared as.
    pub kind: FileKind,
    /// On which sides it is.
    pub presence: Presence,
    /// Result for this file.
    pub verdict: Verdict,
    /// Both sides have the same bytes (of models: of the weights as well).
    pub same_bytes: bool,
    /// Sizes and counts, for models on both sides.
    pub model: Option<ModelFacts>,
    /// What changed, the gravest class first, then in the model's order.
    pub changes: Vec<Change>,
    /// Where bytes lie, as far as it differs.
    pub storage: Vec<StorageNote>,
    /// Names, as far as they differ.
    pub renames: Renames,
}

/// Numbers of a compared pair of models.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelFacts {
    /// Nodes of side A, those in bodies and functions included.
    pub nodes_a: usize,
    /// Nodes of side B.
    pub nodes_b: usize,
    /// Nodes in both, modified ones included.
    pub matched: usize,
    /// Nodes in both of which something that counts changed.
    pub modified: usize,
    /// Nodes that only A has.
    pub removed: usize,
    /// Nodes that only B has.
    pub added: usize,
    /// Constants of side A: initializers and `Constant` nodes.
    pub constants_a: usize,
    /// Constants of side B.
    pub constants_b: usize,
    /// Bytes of all constants of side A.
    pub weight_bytes_a: u64,
    /// Bytes of all constants of side B.
    pub weight_bytes_b: u64,
    /// Constants whose contents changed.
    pub weights_changed: usize,
}

/// One change, at one place or the same at several.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Change {
    /// How grave.
    pub class: Class,
    /// What.
    pub kind: Kind,
    /// One line in plain English, without names of nodes and without the place:
    /// `attribute 'axis' of Softmax: -1 → 1`, `3 nodes inserted: Cast, Mul, Add`.
    pub title: String,
    /// What was there, in words, where that is one thing.
    pub before: Option<String>,
    /// What is there now.
    pub after: Option<String>,
    /// The part that changed, as a policy or a tool would name it: an
    /// attribute's name, a metadata key, an operator set's domain, an input.
    pub subject: Option<String>,
    /// The pass that did it, for [`Kind::Rewrite`].
    pub pass: Option<String>,
    /// Where; never empty. More than one: the same change repeated.
    pub places: Vec<Place>,
    /// Why it does not count, if it does not: `--ignore metadata`, `within rtol 1e-3`.
    pub ignored: Option<String>,
    /// Weights: the worst of all places.
    pub weights: Option<WeightChange>,
    /// Both graphs around the first place, for changes of structure.
    pub context: Option<Context>,
}

/// One place of a change.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Place {
    /// Graph: empty for the main graph, else the way to a body or function:
    /// `If 'name' then_branch`, `function local::Twice`.
    pub graph: String,
    /// On side A.
    pub a: Option<Spot>,
    /// On side B.
    pub b: Option<Spot>,
    /// Number of the decoder or encoder layer, counted from 0, where it can be
    /// told: by the caches that depend on the place, else by the names.
    pub layer: Option<u32>,
    /// Nodes that only A has, in order.
    pub removed: Vec<Spot>,
    /// Nodes that only B has, in order.
    pub added: Vec<Spot>,
    /// Weights: what changed in this tensor.
    pub weights: Option<WeightChange>,
}

/// A node, a value, or an input of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spot {
    /// Name of the node; may be empty, as in the file.
    pub node: Option<String>,
    /// Its operator, with the domain if that is not the standard one.
    pub op: Option<String>,
    /// Number of the input of the node, counted from 0.
    pub slot: Option<usize>,
    /// Name of the value; in configs the path of the key (`a.b[2]`).
    pub value: Option<String>,
}

/// How two constants differ.
///
/// Numbers compare as doubles; 64-bit integers beyond 2^53 as whole numbers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WeightChange {
    /// Element type on side A.
    pub dtype_a: String,
    /// Element type on side B.
    pub dtype_b: String,
    /// Dimensions on side A.
    pub dims_a: Vec<i64>,
    /// Dimensions on side B.
    pub dims_b: Vec<i64>,
    /// Number of elements (of side A).
    pub elements: u64,
    /// Elements with other bits. Zero where types or dimensions differ so that
    /// elements cannot be compared; then the numbers below are absent.
    pub changed: u64,
    /// Of these, elements outside of the tolerance that was asked for.
    pub beyond: u64,
    /// Index of the first changed element, row by row.
    pub first: Option<u64>,
    /// Largest |b − a| of finite elements.
    pub max_abs: Option<f64>,
    /// Largest |b − a| / |a| of finite elements with a ≠ 0.
    pub max_rel: Option<f64>,
    /// √Σa², finite elements.
    pub norm_a: Option<f64>,
    /// √Σb², finite elements.
    pub norm_b: Option<f64>,
    /// √Σ(b − a)², finite elements.
    pub norm_diff: Option<f64>,
    /// Changed elements that are NaN or infinite on either side.
    pub non_finite: u64,
    /// Changed elements that are equal as numbers: 0 and −0.
    pub signs_of_zero: u64,
}

/// Graph neighbourhood of a change.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Context {
    /// Nodes of side A in topological order.
    pub a: Vec<ContextNode>,
    /// Nodes of side B in topological order.
    pub b: Vec<ContextNode>,
}

/// What happened to a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NodeState {
    /// It is in both, unchanged.
    Same,
    /// It is in both, changed.
    Modified,
    /// Only A has it.
    Removed,
    /// Only B has it.
    Added,
}

/// A node in a [`Context`]. Edges are names: a value is read where an input
/// bears the name of another node's output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContextNode {
    /// The same number on both sides for a node that is in both; else `None`.
    pub pair: Option<u32>,
    /// What happened to it.
    pub state: NodeState,
    /// Operator, with the domain if that is not the standard one.
    pub op: String,
    /// Name.
    pub name: String,
    /// Names of its inputs; empty for an omitted one.
    pub inputs: Vec<String>,
    /// Names of its outputs.
    pub outputs: Vec<String>,
}

/// Something about storage, for people: never a difference.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StorageNote {
    /// One line: `212 tensors moved from the file into model.onnx_data (1.2 GB)`.
    pub text: String,
    /// Number of tensors or elements that it is about.
    pub count: usize,
}

/// Names that differ between what is otherwise the same.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renames {
    /// Nodes: old and new name.
    pub nodes: Vec<(String, String)>,
    /// Values (constants included): old and new name.
    pub values: Vec<(String, String)>,
}

impl Renames {
    /// Whether nothing was renamed.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty() && self.values.is_empty()
    }
}
