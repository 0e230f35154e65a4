//! ONNX Runtime sessions: open a model, look at its interface, run it with named tensors.

use std::borrow::Cow;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ort::logging::LogLevel;
use ort::session::SessionInputValue;
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};
use ort::value::{Outlet, ValueType};

use super::error::{Result, RuntimeError};
use super::library::Runtime;
use super::providers;
use super::tensor::DType;
use super::value::{Value, dtype_of};

/// How much ONNX Runtime may change a graph before running it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Optimization {
    /// Run the graph as written.
    Off,
    /// Constant folding and removal of redundant nodes.
    Basic,
    /// Also operator fusions.
    Extended,
    /// Everything.
    #[default]
    All,
}

/// How to open a session.
#[derive(Debug, Clone, Default)]
pub struct SessionOptions {
    /// Threads inside an operator; 0 lets ONNX Runtime decide (one for each physical core).
    pub intra_threads: usize,
    /// Execution providers by name (`cpu`, `cuda`, `CUDAExecutionProvider`, …), best first. The CPU is always
    /// the last resort for operators that none of them has.
    pub providers: Vec<String>,
    /// Graph optimisation.
    pub optimization: Optimization,
    /// Where a model opened from memory finds its external data.
    pub data_dir: Option<PathBuf>,
    /// Writes a profile; its path starts with this prefix. See [`Session::end_profiling`].
    pub profile: Option<PathBuf>,
    /// Writes the graph as optimised for this machine to this file, for looking at.
    pub optimized_model: Option<PathBuf>,
}

/// One dimension of a declared input or output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Dim {
    /// Known.
    Fixed(usize),
    /// Unknown but named.
    Named(String),
    /// Unknown.
    Unknown,
}

impl Dim {
    /// The size, if it is known.
    pub fn fixed(&self) -> Option<usize> {
        match self {
            Self::Fixed(size) => Some(*size),
            Self::Named(_) | Self::Unknown => None,
        }
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(size) => write!(f, "{size}"),
            Self::Named(name) => f.write_str(name),
            Self::Unknown => f.write_str("?"),
        }
    }
}

/// A declared input or output of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// Name.
    pub name: String,
    /// Element type; `None` for sequences, maps, optionals and types that are not supported here.
    pub dtype: Option<DType>,
    /// Dimensions; empty for a scalar.
    pub dims: Vec<Dim>,
}

impl Port {
    fn new(outlet: &Outlet) -> Self {
        let (dtype, dims) = match outlet.dtype() {
            ValueType::Tensor {
                ty,
                shape,
                dimension_symbols,
            } => {
                let dims = shape.iter().zip(dimension_symbols.iter());
                let dims = dims.map(|(&size, name)| match usize::try_from(size) {
                    Ok(size) => Dim::Fixed(size),
                    Err(_) if name.is_empty() => Dim::Unknown,
                    Err(_) => Dim::Named(name.clone()),
                });
                (dtype_of(*ty), dims.collect())
            }
            _ => (None, Vec::new()),
        };
        Self {
            name: outlet.name().to_string(),
            dtype,
            dims,
        }
    }

    /// What keeps a value from being given to this input, if anything.
    ///
    /// Rank 0 is declared both by scalars and by inputs of unknown rank, so it is not checked.
    fn refuses(&self, value: &Value) -> bool {
        let rank_differs = !self.dims.is_empty() && self.dims.len() != value.shape().len();
        let size_differs = self
            .dims
            .iter()
            .zip(value.shape())
            .any(|(dim, size)| dim.fixed().is_some_and(|fixed| fixed != *size));
        self.dtype.is_some_and(|dtype| dtype != value.dtype()) || rank_differs || size_differs
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.dtype {
            Some(dtype) => write!(f, "{dtype}")?,
            None => f.write_str("(no tensor)")?,
        }
        f.write_str("[")?;
        for (i, dim) in self.dims.iter().enumerate() {
            write!(f, "{}{dim}", if i == 0 { "" } else { ", " })?;
        }
        f.write_str("]")
    }
}

/// An open model.
pub struct Session {
    session: ort::session::Session,
    model: String,
    inputs: Vec<Port>,
    outputs: Vec<Port>,
    profiling: bool,
    spent: Duration,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("model", &self.model)
            .finish_non_exhaustive()
    }
}

impl Session {
    /// Opens a model file. External data is read from beside it.
    ///
    /// # Errors
    /// ONNX Runtime is not there, an execution provider cannot be had, or the model does not load.
    pub fn open(path: impl AsRef<Path>, options: &SessionOptions) -> Result<Self> {
        let path = path.as_ref();
        let model = path.display().to_string();
        // ONNX Runtime's own message for a missing file names neither the file nor the cause well.
        std::fs::metadata(path).map_err(RuntimeError::io(path))?;
        let mut builder = builder(options, &model)?;
        let session = builder.commit_from_file(path);
        Self::opened(session, model, options)
    }

    /// Opens a model from memory; external data is read from [`SessionOptions::data_dir`]. `name` appears in
    /// messages.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn from_bytes(bytes: &[u8], name: &str, options: &SessionOptions) -> Result<Self> {
        let mut builder = builder(options, name)?;
        let session = builder.commit_from_memory(bytes);
        Self::opened(session, name.to_string(), options)
    }

    fn opened(
        session: ort::Result<ort::session::Session>,
        model: String,
        options: &SessionOptions,
    ) -> Result<Self> {
        let session = session.map_err(|e| RuntimeError::Open {
            model: model.clone(),
            reason: e.to_string(),
        })?;
        let inputs = session.inputs().iter().map(Port::new).collect();
        let outputs = session.outputs().iter().map(Port::new).collect();
        Ok(Self {
            session,
            model,
            inputs,
            outputs,
            profiling: options.profile.is_some(),
            spent: Duration::ZERO,
        })
    }

    /// Path or name of the model.
    pub fn model(&self) -> &str {
        &self.model
    }

    /// Time spent inside ONNX Runtime by all runs so far: what is done for a run before and after it (laying out
    /// inputs, copying outputs) is the caller's.
    pub fn spent(&self) -> Duration {
        self.spent
    }

    /// Declared inputs, in order.
    pub fn inputs(&self) -> &[Port] {
        &self.inputs
    }

    /// Declared outputs, in order.
    pub fn outputs(&self) -> &[Port] {
        &self.outputs
    }

    /// The declared input of this name.
    pub fn input(&self, name: &str) -> Option<&Port> {
        self.inputs.iter().find(|port| port.name == name)
    }

    /// The declared output of this name.
    pub fn output(&self, name: &str) -> Option<&Port> {
        self.outputs.iter().find(|port| port.name == name)
    }

    /// Runs the model. Inputs may come in any order; outputs come in the model's order.
    ///
    /// # Errors
    /// An input is unknown, missing, or of the wrong type or shape; the run fails; an output is no tensor.
    pub fn run(&mut self, inputs: &[(&str, &Value)]) -> Result<Outputs> {
        for (name, value) in inputs {
            let port = self.input(name).ok_or_else(|| RuntimeError::Interface {
                model: self.model.clone(),
                expected: format!("an input `{name}`"),
                found: names(&self.inputs),
            })?;
            if port.refuses(value) {
                return Err(RuntimeError::Input {
                    model: self.model.clone(),
                    input: name.to_string(),
                    expected: port.to_string(),
                    found: format!("{}{:?}", value.dtype(), value.shape()),
                });
            }
        }
        if let Some(missing) = self
            .inputs
            .iter()
            .find(|port| !inputs.iter().any(|(name, _)| *name == port.name))
        {
            return Err(RuntimeError::Input {
                model: self.model.clone(),
                input: missing.name.clone(),
                expected: missing.to_string(),
                found: "nothing".into(),
            });
        }
        let feed: Vec<(Cow<'_, str>, SessionInputValue<'_>)> = inputs
            .iter()
            .map(|(name, value)| {
                (
                    Cow::Borrowed(*name),
                    SessionInputValue::View(value.as_ort().view()),
                )
            })
            .collect();
        let start = Instant::now();
        let outputs = self.session.run(feed).map_err(|e| RuntimeError::Run {
            model: self.model.clone(),
            reason: e.to_string(),
        })?;
        self.spent += start.elapsed();
        let outputs = outputs
            .into_iter()
            .map(|(name, value)| Ok((name.to_string(), Value::from_ort(value)?)))
            .collect::<Result<_>>()?;
        Ok(Outputs {
            values: outputs,
            model: self.model.clone(),
        })
    }

    /// Ends profiling and returns the profile's file; `None` if it was not asked for or has ended already.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn end_profiling(&mut self) -> Result<Option<PathBuf>> {
        if !std::mem::take(&mut self.profiling) {
            return Ok(None);
        }
        let file = self
            .session
            .end_profiling()
            .map_err(|e| RuntimeError::Run {
                model: self.model.clone(),
                reason: e.to_string(),
            })?;
        Ok(Some(file.into()))
    }
}

fn builder(options: &SessionOptions, model: &str) -> Result<SessionBuilder> {
    let failed = |reason: String| RuntimeError::Open {
        model: model.into(),
        reason,
    };
    let level = match options.optimization {
        Optimization::Off => GraphOptimizationLevel::Disable,
        Optimization::Basic => GraphOptimizationLevel::Level1,
        Optimization::Extended => GraphOptimizationLevel::Level2,
        Optimization::All => GraphOptimizationLevel::All,
    };
    let runtime = Runtime::get()?;
    let builder =
        ort::session::Session::builder(runtime.environment()).map_err(|e| failed(e.to_string()))?;
    // A library prints nothing: what goes wrong comes back as an error.
    let builder = builder
        .with_log_level(LogLevel::Fatal)
        .map_err(|e| failed(e.to_string()))?;
    let builder = builder
        .with_optimization_level(level)
        .map_err(|e| failed(e.to_string()))?;
    let mut builder = builder
        .with_intra_threads(options.intra_threads)
        .map_err(|e| failed(e.to_string()))?;
    if let Some(dir) = &options.data_dir {
        builder = builder
            .with_config_entry(
                "session.model_external_initializers_file_folder_path",
                dir.display().to_string(),
            )
            .map_err(|e| failed(e.to_string()))?;
    }
    if let Some(prefix) = &options.profile {
        builder = builder
            .with_profiling(prefix)
            .map_err(|e| failed(e.to_string()))?;
    }
    if let Some(path) = &options.optimized_model {
        builder = builder
            .with_optimized_model_path(path)
            .map_err(|e| failed(e.to_string()))?;
    }
    for name in &options.providers {
        providers::register(name, &mut builder)?;
    }
    Ok(builder)
}

fn names(ports: &[Port]) -> String {
    ports
        .iter()
        .map(|port| port.name.as_str())
        .collect::<Vec<_>>()
        .join(", ")
}

/// The outputs of one run, in the model's order.
#[derive(Debug, Clone)]
pub struct Outputs {
    values: Vec<(String, Value)>,
    model: String,
}

impl Outputs {
    /// The output of this name.
    ///
    /// # Errors
    /// There is none.
    pub fn get(&self, name: &str) -> Result<&Value> {
        self.values
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, value)| value)
            .ok_or_else(|| {
                let found: Vec<&str> = self.values.iter().map(|(n, _)| n.as_str()).collect();
                RuntimeError::Interface {
                    model: self.model.clone(),
                    expected: format!("an output `{name}`"),
                    found: found.join(", "),
                }
            })
    }

    /// The first output.
    ///
    /// # Errors
    /// There are none.
    pub fn first(&self) -> Result<&Value> {
        self.values
            .first()
            .map(|(_, value)| value)
            .ok_or_else(|| RuntimeError::Interface {
                model: self.model.clone(),
                expected: "an output".into(),
                found: "none".into(),
            })
    }

    /// Names and values.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.values
            .iter()
            .map(|(name, value)| (name.as_str(), value))
    }

    /// Names and values, owned.
    pub fn into_vec(self) -> Vec<(String, Value)> {
        self.values
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::library::ensure;
    use crate::runtime::tensor::Tensor;
    use crate::runtime::test_models::{self as models, Type};

    fn open(model: &[u8]) -> Session {
        ensure(&mut |_| ()).unwrap();
        Session::from_bytes(model, "test model", &SessionOptions::default()).unwrap()
    }

    fn value(tensor: Result<Tensor>) -> Value {
        Value::new(tensor.unwrap()).unwrap()
    }

    #[test]
    fn interface_and_run() {
        let mut session = open(&models::top_two_rows());
        let rows = &session.inputs()[0];
        assert_eq!((rows.name.as_str(), rows.dtype), ("rows", Some(DType::F32)));
        assert_eq!(
            rows.dims,
            [
                Dim::Named("b".into()),
                Dim::Named("n".into()),
                Dim::Fixed(1)
            ]
        );
        assert_eq!(rows.to_string(), "float32[b, n, 1]");
        assert_eq!(session.output("places").unwrap().dtype, Some(DType::I64));

        let scores = value(Tensor::new([1, 3], vec![1f32, 3.0, 2.0]));
        let rows = value(Tensor::new([1, 3, 1], vec![10f32, 20.0, 30.0]));
        let outputs = session
            .run(&[("scores", &scores), ("rows", &rows)])
            .unwrap();
        assert_eq!(&*outputs.first().unwrap().f32s().unwrap(), [20.0, 30.0]);
        let places = outputs.get("places").unwrap().to_tensor().unwrap();
        assert_eq!(places.slice::<i64>().unwrap(), [1, 2]);
        assert!(
            outputs
                .get("other")
                .unwrap_err()
                .to_string()
                .contains("kept, places, length")
        );
    }

    #[test]
    fn outputs_are_fed_again_without_a_copy() {
        let mut session = open(&models::unary("Neg", Type::F32, &["n"]));
        let mut state = value(Tensor::new([3], vec![1f32, -2.0, 3.0]));
        for _ in 0..3 {
            state = session
                .run(&[("x", &state)])
                .unwrap()
                .first()
                .unwrap()
                .clone();
        }
        assert_eq!(&*state.f32s().unwrap(), [-1.0, 2.0, -3.0]);
        let shared = state.clone();
        assert_eq!(
            shared.f32s().unwrap().as_ptr(),
            state.f32s().unwrap().as_ptr()
        );
    }

    #[test]
    fn wrong_inputs_are_named_before_the_run() {
        let mut session = open(&models::top_two_rows());
        let scores = value(Tensor::new([1, 2], vec![1f32, 3.0]));
        let rows = value(Tensor::new([1, 2, 1], vec![1f32, 3.0]));
        let wide = value(Tensor::new([1, 2, 2], vec![1f32; 4]));
        let ints = value(Tensor::new([1, 2], vec![1i64, 3]));
        let mut error = |inputs: &[(&str, &Value)]| session.run(inputs).unwrap_err().to_string();
        let found = error(&[("rows", &rows)]);
        assert!(
            found.contains("`scores`") && found.contains("nothing"),
            "{found}"
        );
        let found = error(&[("rows", &wide), ("scores", &scores)]);
        assert!(
            found.contains("float32[b, n, 1]") && found.contains("[1, 2, 2]"),
            "{found}"
        );
        let found = error(&[("rows", &rows), ("scores", &ints)]);
        assert!(found.contains("int64[1, 2]"), "{found}");
        let found = error(&[("rows", &rows), ("scores", &scores), ("more", &rows)]);
        assert!(
            found.contains("`more`") && found.contains("rows, scores"),
            "{found}"
        );
        // What only the engine can see.
        let few = value(Tensor::new([1, 1], vec![1f32]));
        let found = error(&[("rows", &rows), ("scores", &few)]);
        assert!(found.contains("test model: run failed"), "{found}");
    }

    #[test]
    fn half_and_bool_go_through() {
        let mut session = open(&models::unary("Neg", Type::F16, &["n"]));
        let x = value(Tensor::new(
            [2],
            vec![half::f16::from_f32(0.5), half::f16::ONE],
        ));
        let y = session.run(&[("x", &x)]).unwrap();
        assert_eq!(&*y.first().unwrap().f32s().unwrap(), [-0.5, -1.0]);
        let mut session = open(&models::unary("Not", Type::Bool, &["n"]));
        let x = value(Tensor::new([2], vec![true, false]));
        let y = session
            .run(&[("x", &x)])
            .unwrap()
            .first()
            .unwrap()
            .to_tensor()
            .unwrap();
        assert_eq!(y.slice::<bool>().unwrap(), [false, true]);
    }

    #[test]
    fn models_that_do_not_load_are_errors() {
        ensure(&mut |_| ()).unwrap();
        let options = SessionOptions::default();
        let error = Session::open("/no/such/model.onnx", &options)
            .unwrap_err()
            .to_string();
        assert!(error.contains("/no/such/model.onnx"), "{error}");
        let error = Session::from_bytes(b"junk", "junk", &options)
            .unwrap_err()
            .to_string();
        assert!(error.contains("cannot open junk"), "{error}");
    }

    #[test]
    fn providers_are_checked() {
        ensure(&mut |_| ()).unwrap();
        let model = models::unary("Neg", Type::F32, &["n"]);
        let with = |name: &str| {
            let options = SessionOptions {
                providers: vec![name.into()],
                ..SessionOptions::default()
            };
            Session::from_bytes(&model, "m", &options)
        };
        for cpu in ["cpu", "CPU", "CPUExecutionProvider"] {
            with(cpu).unwrap();
        }
        let error = with("warp").unwrap_err().to_string();
        assert!(
            error.contains("`warp`") && error.contains("cuda"),
            "{error}"
        );
        let available = providers::available().unwrap();
        assert!(available.contains(&"cpu"));
        if !available.contains(&"cuda") {
            let error = with("cuda").unwrap_err().to_string();
            assert!(
                error.contains("built without it") && error.contains("cpu"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_profile_is_written_where_asked() {
        ensure(&mut |_| ()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let options = SessionOptions {
            profile: Some(dir.path().join("trace")),
            intra_threads: 1,
            optimization: Optimization::Off,
            ..SessionOptions::default()
        };
        let model = models::unary("Neg", Type::F32, &["n"]);
        let mut session = Session::from_bytes(&model, "m", &options).unwrap();
        let x = value(Tensor::new([1], vec![1f32]));
        session.run(&[("x", &x)]).unwrap();
        let file = session.end_profiling().unwrap().unwrap();
        assert!(file.starts_with(dir.path()), "{}", file.display());
        assert!(std::fs::read_to_string(&file).unwrap().contains("Neg"));
        assert_eq!(session.end_profiling().unwrap(), None);
    }
}
