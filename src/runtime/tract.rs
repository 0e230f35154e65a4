//! Runs small graphs with tract: a second engine's opinion on what the passes insert.

use tract_onnx::prelude::{
    DatumType, Framework, InferenceFact, InferenceModelExt, IntoRunnable, IntoTValue,
    Tensor as TractTensor, tvec,
};

use super::error::{Result, RuntimeError};
use super::tensor::{Tensor, TensorData};

/// Runs a model (a serialized `ModelProto` without external data) once, with the shapes of the given inputs.
/// Returns every output, in the model's order, with its name.
///
/// # Errors
/// tract cannot parse the model, infer every type and shape, or run it; an input is missing or unknown; or an
/// output is of a type that is not supported here.
pub fn run_once(model: &[u8], inputs: &[(&str, Tensor)]) -> Result<Vec<(String, Tensor)>> {
    let failed = |stage: &'static str| {
        move |error: tract_onnx::prelude::TractError| RuntimeError::Tract {
            stage,
            reason: format!("{error:#}"),
        }
    };
    let mut graph = tract_onnx::onnx()
        .model_for_read(&mut &model[..])
        .map_err(failed("reading the graph"))?;
    let names: Vec<String> = graph
        .input_outlets()
        .map_err(failed("reading the inputs"))?
        .iter()
        .map(|outlet| graph.node(outlet.node).name.clone())
        .collect();
    if let Some((unknown, _)) = inputs
        .iter()
        .find(|(name, _)| !names.iter().any(|n| n == name))
    {
        return Err(RuntimeError::Tract {
            stage: "reading the inputs",
            reason: format!("no input `{unknown}`; there are {}", names.join(", ")),
        });
    }
    let mut values = tvec![];
    for (index, name) in names.iter().enumerate() {
        let (_, tensor) = inputs
            .iter()
            .find(|(given, _)| given == name)
            .ok_or_else(|| RuntimeError::Tract {
                stage: "reading the inputs",
                reason: format!("input `{name}` is not given"),
            })?;
        let value = to_tract(tensor).map_err(failed("making an input"))?;
        graph = graph
            .with_input_fact(
                index,
                InferenceFact::dt_shape(value.datum_type(), tensor.shape()),
            )
            .map_err(failed("typing the inputs"))?;
        values.push(value.into_tvalue());
    }
    let outlets = graph
        .output_outlets()
        .map_err(failed("reading the outputs"))?
        .to_vec();
    let outputs: Vec<String> = outlets
        .iter()
        .map(|outlet| match graph.outlet_label(*outlet) {
            Some(label) => label.to_string(),
            None => graph.node(outlet.node).name.clone(),
        })
        .collect();
    // Typed, not optimised: what is wanted is a second reading of the operators. Sizes that only the run
    // tells are symbols of the typed graph's scope, which decluttering would replace.
    let typed = graph.into_typed().map_err(failed("typing the graph"))?;
    let scope = typed.symbols.clone();
    let plan = typed.into_runnable().map_err(failed("planning"))?;
    let results = plan.run(values).map_err(failed("running"))?;
    drop(scope);
    outputs
        .into_iter()
        .zip(results)
        .map(|(name, value)| Ok((name, from_tract(&value)?)))
        .collect()
}

fn to_tract(tensor: &Tensor) -> std::result::Result<TractTensor, tract_onnx::prelude::TractError> {
    let shape = tensor.shape();
    macro_rules! convert {
        ($($variant:ident)*) => {
            match tensor.data() {
                $(TensorData::$variant(data) => TractTensor::from_shape(shape, data),)*
                // tract has no bfloat16; the numbers are the same in float32.
                TensorData::BF16(data) => {
                    let wide: Vec<f32> = data.iter().map(|v| v.to_f32()).collect();
                    TractTensor::from_shape(shape, &wide)
                }
            }
        };
    }
    convert!(F32 F64 F16 I8 I16 I32 I64 U8 U16 U32 U64 Bool)
}

fn from_tract(tensor: &TractTensor) -> Result<Tensor> {
    let failed = |reason: String| RuntimeError::Tract {
        stage: "reading an output",
        reason,
    };
    // Shapes and indices inside tract may be symbolic dimensions; as outputs they are plain integers.
    let cast;
    let tensor = if tensor.datum_type() == DatumType::TDim {
        cast = tensor
            .cast_to::<i64>()
            .map_err(|e| failed(format!("{e:#}")))?;
        &*cast
    } else {
        tensor
    };
    macro_rules! convert {
        ($($datum:ident => $dtype:ident)*) => {
            match tensor.datum_type() {
                $(DatumType::$datum => {
                    let view = tensor
                        .try_as_plain_ram()
                        .and_then(|view| view.as_slice().map(|data| TensorData::$dtype(data.to_vec())));
                    view.map_err(|e| failed(format!("{e:#}")))?
                })*
                other => return Err(failed(format!("elements of type {other:?}"))),
            }
        };
    }
    let data = convert!(
        F32 => F32 F64 => F64 F16 => F16 I8 => I8 I16 => I16 I32 => I32 I64 => I64
        U8 => U8 U16 => U16 U32 => U32 U64 => U64 Bool => Bool
    );
    Tensor::new(tensor.shape().to_vec(), data)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::test_models::{self as models, Type};

    #[test]
    fn selects_and_gathers() {
        let scores = Tensor::new([2, 4], vec![1f32, 5.0, 5.0, 0.0, 9.0, 8.0, 7.0, 6.0]).unwrap();
        let rows = Tensor::new([2, 4, 1], (0..8).map(|v| v as f32).collect::<Vec<_>>()).unwrap();
        let outputs = run_once(
            &models::top_two_rows(),
            &[("rows", rows), ("scores", scores)],
        )
        .unwrap();
        let (name, kept) = &outputs[0];
        assert_eq!(name, "kept");
        assert_eq!(kept.shape(), [2, 2, 1]);
        assert_eq!(kept.slice::<f32>().unwrap(), [1.0, 2.0, 4.0, 5.0]);
        // Indices and lengths, symbolic dimensions inside tract, are integers outside.
        assert_eq!(
            outputs[1],
            (
                "places".into(),
                Tensor::new([2, 2], vec![1i64, 2, 0, 1]).unwrap()
            )
        );
        assert_eq!(
            outputs[2],
            ("length".into(), Tensor::new([3], vec![2i64, 4, 1]).unwrap())
        );
    }

    #[test]
    fn mistakes_are_errors() {
        let model = models::unary("Neg", Type::F32, &["n"]);
        let one = || Tensor::new([1], vec![1f32]).unwrap();
        let error = run_once(&model, &[("y", one())]).unwrap_err().to_string();
        assert!(error.contains("`y`") && error.contains('x'), "{error}");
        let error = run_once(&model, &[]).unwrap_err().to_string();
        assert!(error.contains("`x` is not given"), "{error}");
        let error = run_once(b"no model", &[]).unwrap_err().to_string();
        assert!(error.contains("reading the graph"), "{error}");
        let error = run_once(
            &models::unary("NoSuchOperator", Type::F32, &["n"]),
            &[("x", one())],
        );
        assert!(error.unwrap_err().to_string().contains("NoSuchOperator"));
    }
}
