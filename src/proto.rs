//! Protobuf types generated from `proto/onnx.proto`, and nothing else.

#![allow(missing_docs, unreachable_pub, clippy::all, reason = "generated code")]

include!(concat!(env!("OUT_DIR"), "/onnx.rs"));
