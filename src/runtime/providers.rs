//! Execution providers by name.

use ort::ep::{self, ExecutionProvider};
use ort::session::builder::SessionBuilder;

use super::error::{Result, RuntimeError};
use super::library::Runtime;

/// What is known of one provider.
struct Known {
    /// Name as given by users.
    short: &'static str,
    /// ONNX Runtime's own name for it.
    canonical: &'static str,
    available: fn() -> ort::Result<bool>,
    register: fn(&mut SessionBuilder) -> ort::Result<()>,
}

macro_rules! known {
    ($($short:literal => $ty:ty;)*) => {
        const KNOWN: &[Known] = &[$(Known {
            short: $short,
            canonical: <$ty as ExecutionProvider>::NAME,
            available: <$ty>::is_available,
            register: |builder| <$ty>::default().register(builder),
        },)*];
    };
}

known! {
    "cpu" => ep::CPU;
    "cuda" => ep::CUDA;
    "tensorrt" => ep::TensorRT;
    "rocm" => ep::ROCm;
    "migraphx" => ep::MIGraphX;
    "coreml" => ep::CoreML;
    "directml" => ep::DirectML;
    "openvino" => ep::OpenVINO;
    "xnnpack" => ep::XNNPACK;
    "qnn" => ep::QNN;
}

/// Short names of the execution providers that the loaded library was built with.
///
/// # Errors
/// ONNX Runtime is not there.
pub fn available() -> Result<Vec<&'static str>> {
    Runtime::get()?;
    Ok(KNOWN
        .iter()
        .filter(|k| (k.available)().unwrap_or(false))
        .map(|k| k.short)
        .collect())
}

/// Checks that an execution provider of this name can be asked for.
///
/// # Errors
/// The name is not known, or the loaded library was built without the provider; the message says which library that
/// is, what it has, and what to do.
pub fn check(name: &str) -> Result<()> {
    known(name).map(|_| ())
}

/// Adds the provider of this name to a session that is being built.
pub(super) fn register(name: &str, builder: &mut SessionBuilder) -> Result<()> {
    let found = known(name)?;
    (found.register)(builder).map_err(|e| failed(name, e.to_string()))
}

fn failed(name: &str, reason: String) -> RuntimeError {
    RuntimeError::Provider {
        name: name.into(),
        reason,
    }
}

fn known(name: &str) -> Result<&'static Known> {
    let known = KNOWN
        .iter()
        .find(|k| k.short.eq_ignore_ascii_case(name) || k.canonical.eq_ignore_ascii_case(name))
        .ok_or_else(|| {
            let all: Vec<&str> = KNOWN.iter().map(|k| k.short).collect();
            let reason = format!("it is not known; the known ones are {}", all.join(", "));
            failed(name, reason)
        })?;
    // Before any library is chosen, ort would load one of its own choice.
    let runtime = Runtime::get()?;
    if !(known.available)().unwrap_or(false) {
        let library = &runtime.library().path;
        let reason = format!(
            "the library {} was built without it (it has {}); install a build that has it, for \
             example `pip install onnxruntime-gpu` for CUDA, or point ORT_DYLIB_PATH at one",
            library.display(),
            available()?.join(", ")
        );
        return Err(failed(name, reason));
    }
    Ok(known)
}
