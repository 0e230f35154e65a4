//! Running models: ONNX Runtime and tract, and everything between a question about an image and its answer.
//!
//! ```text
//! image ─▶ image ─▶ vision ─┐
//! text  ─▶ text  ─▶ embed ──┴▶ scatter ─▶ decoder ─▶ sampling ─▶ text
//!                                          ▲    │
//!                                          └────┘ cache
//! ```
//!
//! - [`library`] finds and loads ONNX Runtime's shared library, [`install`] fetches it with pip when asked to;
//! - [`session`] opens and runs models with named tensors ([`value`], [`tensor`]), [`providers`] knows execution
//!   providers by name;
//! - [`image`], [`text`] and [`template`] do what a model's configuration files say;
//! - [`video`] takes frames out of clips;
//! - [`vision`] and [`decoder`] run the parts of a VLM at the level of tensors, batches and caches;
//! - [`grid`] numbers the tokens of images for decoders that take three positions each (M-RoPE);
//! - [`whole`] runs a model that is all of these in one file;
//! - [`generate`] puts them together; [`sampling`] picks tokens, [`salient`] marks the words that matter;
//! - [`probe`] opens models that exist in memory, and with more outputs than they have;
//! - [`mod@tract`] runs small graphs with a second engine.
//!
//! The engines' own types stay inside: what goes in and comes out is plain Rust and [`tensor::Tensor`]. Nothing
//! here prints, exits, or downloads unasked.

pub mod decoder;
pub mod embedder;
pub mod error;
pub mod generate;
pub mod grid;
pub mod image;
pub mod install;
pub mod library;
pub mod probe;
pub mod providers;
pub mod salient;
pub mod sampling;
pub mod session;
pub mod template;
pub mod tensor;
pub mod text;
pub mod tract;
pub mod value;
pub mod video;
pub mod vision;
pub mod whole;

#[cfg(test)]
mod test_models;

pub use decoder::{Cache, CacheHeads, Decoder, StepInput, StepOutput};
pub use embedder::Embedder;
pub use error::RuntimeError;
pub use generate::{
    Encoded, GenerateOptions, Generation, Prepared, Seen, Stop, Timing, Token, VlmFiles,
    VlmPipeline,
};
pub use grid::{Block, Grid, GridPositions};
pub use image::{ImageProcessor, Packing, Patches, Pixels, Place, Slot, concatenate};
pub use library::{Library, Runtime, ensure};
pub use sampling::{Sampler, Sampling};
pub use session::{Dim, Optimization, Outputs, Port, Session, SessionOptions};
pub use template::{ChatTemplate, Content, Message, Part};
pub use tensor::{DType, Tensor, TensorData};
pub use text::TextProcessor;
pub use value::Value;
pub use video::{Clip, ClipEncoder, ClipProcessor, PatchClips};
pub use vision::{
    Inside, PatchEncoder, PatchFeatures, Vision, VisionEncoder, lay_out_pixels, pixel_mask, scatter,
};
pub use whole::{WholeInput, WholeModel, WholeOutput, WholePipeline, WholePrompt};
