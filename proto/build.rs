//! Compiles `onnx.proto` with protox (pure Rust: no `protoc` on the machine is
//! needed) into prost types.

use std::path::{Path, PathBuf};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR")?).join("proto");
    let file = dir.join("onnx.proto");
    println!("cargo:rerun-if-changed={}", file.display());
    println!("cargo:rerun-if-changed={}", dir.join("build.rs").display());
    let set = protox::compile([&file], [Path::new(&dir)])?;
    prost_build::Config::new()
        // Tensor payloads stay slices of the memory-mapped file.
        .bytes([
            ".onnx.TensorProto.raw_data",
            ".onnx.TensorProto.string_data",
            ".onnx.AttributeProto.s",
            ".onnx.AttributeProto.strings",
        ])
        // Upstream comments are not written as rustdoc.
        .disable_comments(["."])
        .compile_fds(set)?;
    Ok(())
}
