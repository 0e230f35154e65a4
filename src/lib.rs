//! duet-onnx: rewrites exported vision-language models so that they process
//! fewer visual tokens, runs and validates the result.

pub mod arch;
pub mod ir;
pub mod onnx;
pub mod passes;
pub mod proto;
pub mod runtime;
pub mod validate;
