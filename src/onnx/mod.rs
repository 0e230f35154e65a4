//! Model files: protobuf → IR → protobuf, external data, and directories.
//!
//! See [`read`](fn@read) and [`serialize`]; what no pass touched is not moved.

pub mod details;

mod convert;
mod copy;
mod directory;
mod error;
mod external;
mod genai;
mod output;
mod processor;
mod read;
pub mod unfinished;
mod wire;
mod write;

pub use directory::{Layout, ModelDir, ModelFile};
pub use error::OnnxError;
pub use external::DataDirectory;
pub use genai::patch_genai;
pub use output::{DataMode, Outputs, suffixed, write_beside, write_out};
pub use processor::{mark_newline, patch_processor};
pub use read::{read, read_bytes, read_graph};
pub use write::{Serialized, serialize};
