//! One pair of models: everything that is compared, in order.

use std::path::Path;

use super::change::group;
use super::report::FileReport;
use super::{DiffError, Options, files, header};
use crate::onnx::{details, read};

/// Compares two model files.
pub(super) fn files(
    file: &mut FileReport,
    a: &Path,
    b: &Path,
    _options: &Options,
) -> Result<(), DiffError> {
    let (ma, mb) = (read(a)?, read(b)?);
    let (da, db) = (details::of_model(&ma), details::of_model(&mb));
    let mut found = Vec::new();
    header::compare((&ma, &da), (&mb, &db), &mut found);
    header::contract(&ma, &mb, &mut found);
    file.same_bytes = files::same_bytes(a, b)?;
    file.changes = group(found);
    Ok(())
}
