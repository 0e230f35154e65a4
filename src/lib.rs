//! duet-onnx rewrites exported vision-language models so that they process fewer
//! visual tokens (DUET-VLM), runs them with ONNX Runtime and checks the result.
//!
//! ```text
//! proto ─▶ onnx (read) ─▶ ir ─▶ arch (recognise) ─▶ passes (plan → patch → verify) ─▶ onnx (write)
//!                                                     runtime (ort, tract) ─▶ validate ◀┘
//! ```
//!
//! Start with [`onnx::read`](fn@onnx::read), [`arch::Vlm`] and
//! [`passes::rewrite`]; `ARCHITECTURE.md` tells why things are as they are.

pub mod arch;
pub mod bench;
pub mod cli;
pub mod diff;
pub mod eval;
pub mod explain;
pub mod ir;
pub mod onnx;
pub mod passes;
pub mod proto;
mod random;
mod readable;
pub mod runtime;
mod statistics;
mod suggest;
pub mod validate;
