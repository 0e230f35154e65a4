//! Token embeddings of both models, with image features in their places.

use ndarray::Array2;

use super::ValidateError;
use super::scenario::Layout;
use crate::arch::{Embedding, Scatter};
use crate::ir::{Dim, Model, Patch, ValueType};
use crate::runtime::{Embedder, Tensor, scatter};

/// The token id whose places take the features.
///
/// # Errors
/// The graph does not compare the ids with one.
pub(super) fn placeholder(found: &Scatter, name: &str) -> Result<i64, ValidateError> {
    found.placeholder.ok_or_else(|| {
        ValidateError::Model(format!(
            "{name}: which token id takes the image features cannot be told from the graph; expected one \
             Equal of the ids with a constant"
        ))
    })
}

/// The unmodified embedding graph, taking any number of features of an image:
/// the reference puts the merged ones in.
///
/// # Errors
/// The model cannot be patched.
pub(super) fn any_count(model: &Model, embedding: &Embedding) -> Result<Model, ValidateError> {
    let features = embedding.scatter.as_ref().filter(|s| s.rank == 3);
    let ty = features.and_then(|s| model.value(s.features).ty.clone());
    let (Some(found), Some(ValueType::Tensor { dtype, shape })) = (features, ty) else {
        return Ok(model.clone());
    };
    let shape = shape.map(|mut dims| {
        dims[1] = Dim::Unknown;
        dims
    });
    let mut patch = Patch::new(model, "probe");
    patch.set_type(found.features, ValueType::Tensor { dtype, shape });
    let plan = patch.finish();
    Ok(model.clone().apply(plan)?)
}

/// Embeddings `[b, L, width]` of a layout, the features of its images in their
/// places: put there by the model if it takes them, else by the same code that
/// clients have for it.
///
/// # Errors
/// The model cannot be run, or the features do not fit the places.
pub(super) fn embed(
    embedder: &mut Embedder,
    layout: &Layout,
    placeholder: Option<i64>,
    features: &[Tensor],
) -> Result<Tensor, ValidateError> {
    let Some(token) = placeholder.filter(|_| embedder.takes_features()) else {
        let visual: Vec<bool> = layout.visual.iter().copied().collect();
        let embeds = embedder.run(layout.ids.clone())?.to_tensor()?;
        return Ok(scatter(embeds, &visual, features)?);
    };
    // Text must not hold the token by chance.
    let ids = Array2::from_shape_fn(layout.ids.dim(), |at| match layout.ids[at] {
        _ if layout.visual[at] => token,
        id if id == token => i64::from(token == 0),
        id => id,
    });
    Ok(embedder.run_with(ids, features)?.to_tensor()?)
}
