//! Finding the model files of a directory.
//!
//! Which file is the vision encoder and which the decoder is not decided here:
//! that is read off the graphs (`arch`). Names only tell *variants* (precisions)
//! of one module apart, as transformers.js names them. In a directory of ONNX
//! Runtime GenAI the files are those that its config names.

use std::path::{Path, PathBuf};

use super::OnnxError;
use super::genai;

/// Suffixes that name a precision; the longest match wins.
const VARIANTS: &[&str] = &[
    "_q4f16",
    "_q8f16",
    "_quantized",
    "_fp32",
    "_fp16",
    "_bf16",
    "_uint8",
    "_int8",
    "_int4",
    "_bnb4",
    "_q4",
    "_q8",
    "_q2",
    "_q1",
];

/// How the files lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Layout {
    /// One `.onnx` file was named.
    SingleFile,
    /// Hugging Face: model files in `onnx/`, configs beside the folder.
    HuggingFace,
    /// Model files and configs in one folder.
    Flat,
    /// ONNX Runtime GenAI: `genai_config.json` names the model files.
    GenAi,
}

impl Layout {
    /// Whether it is more than one file.
    pub fn is_directory(self) -> bool {
        self != Self::SingleFile
    }

    /// Words for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::SingleFile => "single file",
            Self::HuggingFace => "Hugging Face directory",
            Self::Flat => "flat directory",
            Self::GenAi => "ONNX Runtime GenAI directory",
        }
    }

    /// One word, for JSON.
    pub fn word(self) -> &'static str {
        match self {
            Self::SingleFile => "single-file",
            Self::HuggingFace => "hugging-face",
            Self::Flat => "flat",
            Self::GenAi => "genai",
        }
    }
}

/// One `.onnx` file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelFile {
    /// Path relative to the root.
    pub relative: PathBuf,
    /// File stem without the variant.
    pub module: String,
    /// Precision suffix without the underscore; empty for the plain file.
    pub variant: String,
}

/// A model directory or single model file.
#[derive(Clone, Debug)]
pub struct ModelDir {
    /// Directory that holds it all.
    pub root: PathBuf,
    /// How the files lie.
    pub layout: Layout,
    /// Model files, sorted by path.
    pub files: Vec<ModelFile>,
}

impl ModelDir {
    /// Lists the model files at `path`.
    ///
    /// # Errors
    /// A path that does not exist, or holds no `.onnx` file; a GenAI config that
    /// cannot be read or names a file that is not there.
    pub fn open(path: &Path) -> Result<Self, OnnxError> {
        let meta = path.metadata().map_err(OnnxError::io(path))?;
        let problem = |problem: &str| OnnxError::Directory {
            path: path.to_owned(),
            problem: problem.to_owned(),
        };
        if meta.is_file() {
            let name = path
                .file_name()
                .ok_or_else(|| problem("expected a file name"))?;
            let root = match path.parent() {
                Some(p) if !p.as_os_str().is_empty() => p.to_owned(),
                _ => PathBuf::from("."),
            };
            return Ok(Self {
                root,
                layout: Layout::SingleFile,
                files: vec![model_file(PathBuf::from(name))],
            });
        }
        if path.join(genai::CONFIG).is_file() {
            return Ok(Self {
                root: path.to_owned(),
                layout: Layout::GenAi,
                files: genai::files(path)?,
            });
        }
        let mut found = Vec::new();
        for sub in ["", "onnx"] {
            let dir = path.join(sub);
            if !dir.is_dir() {
                continue;
            }
            for entry in std::fs::read_dir(&dir).map_err(OnnxError::io(&dir))? {
                let entry = entry.map_err(OnnxError::io(&dir))?;
                let name = PathBuf::from(entry.file_name());
                if name.extension().is_some_and(|e| e == "onnx") && entry.path().is_file() {
                    found.push(Path::new(sub).join(name));
                }
            }
        }
        found.sort();
        if found.is_empty() {
            return Err(problem(
                "no .onnx file in it or in its onnx/ folder; expected vision_encoder.onnx, \
                 embed_tokens.onnx and decoder_model_merged.onnx, or one model file",
            ));
        }
        Ok(Self {
            root: path.to_owned(),
            layout: if found.iter().any(|f| f.starts_with("onnx")) {
                Layout::HuggingFace
            } else {
                Layout::Flat
            },
            files: found.into_iter().map(model_file).collect(),
        })
    }

    /// Absolute or working-directory-relative path of a model file.
    pub fn path(&self, file: &ModelFile) -> PathBuf {
        self.root.join(&file.relative)
    }
}

fn model_file(relative: PathBuf) -> ModelFile {
    let stem = relative
        .file_stem()
        .map_or(String::new(), |s| s.to_string_lossy().into_owned());
    let variant = VARIANTS
        .iter()
        .find(|v| stem.len() > v.len() && stem.ends_with(*v));
    let (module, variant) = match variant {
        Some(v) => (stem[..stem.len() - v.len()].to_owned(), v[1..].to_owned()),
        None => (stem, String::new()),
    };
    ModelFile {
        relative,
        module,
        variant,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variants_are_told_from_modules() {
        let of = |name: &str| {
            let f = model_file(PathBuf::from(name));
            (f.module, f.variant)
        };
        assert_eq!(
            of("onnx/decoder_model_merged_q4f16.onnx"),
            ("decoder_model_merged".into(), "q4f16".into())
        );
        assert_eq!(
            of("vision_encoder.onnx"),
            ("vision_encoder".into(), String::new())
        );
        assert_eq!(of("_fp16.onnx"), ("_fp16".into(), String::new()));
    }
}
