//! The graph core: an ONNX model as typed arenas with def–use links.
//!
//! It knows no protobuf and no file system. A reader builds a [`Model`], passes
//! look at it and plan [`Patch`]es, [`Model::apply`] is the only mutation, and
//! [`verify`] proves that what comes out is well-formed before it is written.

pub mod cone;
pub mod consts;

mod apply;
mod branches;
mod cache;
mod copy;
mod dtype;
mod error;
mod extract;
mod fixed;
mod ids;
mod inline;
mod lanes;
mod load;
mod model;
mod ops;
mod patch;
mod share;
mod tensor;
mod text;
mod types;
mod verify;

pub use branches::{Branch, join, split};
pub use cache::cache_name;
pub use cone::Substitution;
pub use dtype::DataType;
pub use error::IrError;
pub use extract::extract;
pub use fixed::{Open, PADDING_KEY, VISUAL_KEY, fix, loose};
pub use ids::{GraphId, NodeId, ValueId};
pub use inline::{called, inline};
pub use lanes::{Lane, join_lanes, lanes};
pub use model::{
    AttrValue, Attribute, Def, Function, Graph, GraphKind, MetadataEntry, Model, Node, Provenance,
    Use, Value,
};
pub use ops::Size;
pub use patch::{Patch, PatchPlan, float, int, ints};
pub use tensor::{ExternalRef, ExternalSource, NoExternal, Tensor, TensorData};
pub use text::text;
pub use types::{Dim, ValueType};
pub use verify::{Verified, Violation, verify};

pub(crate) use load::{Loader, NodeDraft};
