//! Directories of ONNX Runtime GenAI: `genai_config.json` names the model files
//! and says how wide the tensors between them are.

use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use super::OnnxError;
use super::directory::ModelFile;

/// The config's name.
pub(super) const CONFIG: &str = "genai_config.json";

/// The model files that the config names, and those of configs with a suffix
/// (`genai_config_SUFFIX.json`), as variants of that name.
///
/// # Errors
/// A config that is no JSON, names no model file, or names one that is not in
/// the directory.
pub(super) fn files(root: &Path) -> Result<Vec<ModelFile>, OnnxError> {
    let mut configs = vec![(root.join(CONFIG), String::new())];
    for entry in std::fs::read_dir(root).map_err(OnnxError::io(root))? {
        let name = entry.map_err(OnnxError::io(root))?.file_name();
        let name = name.to_string_lossy();
        let suffix = name
            .strip_prefix("genai_config_")
            .and_then(|rest| rest.strip_suffix(".json"));
        if let Some(suffix) = suffix {
            configs.push((root.join(name.as_ref()), suffix.to_owned()));
        }
    }
    configs.sort();
    let mut files: Vec<ModelFile> = Vec::new();
    for (path, variant) in configs {
        for file in named(&path, &variant)? {
            // A config with a suffix may share files with the plain one.
            if !files.iter().any(|f| f.relative == file.relative) {
                files.push(file);
            }
        }
    }
    files.sort_by(|a, b| a.relative.cmp(&b.relative));
    Ok(files)
}

fn named(path: &Path, variant: &str) -> Result<Vec<ModelFile>, OnnxError> {
    let problem = |problem: String| OnnxError::Directory {
        path: path.to_owned(),
        problem,
    };
    let text = std::fs::read_to_string(path).map_err(OnnxError::io(path))?;
    let config: Value = serde_json::from_str(&text)
        .map_err(|e| problem(format!("is no JSON document that can be read: {e}")))?;
    let root = path.parent().unwrap_or(Path::new("."));
    let mut files = Vec::new();
    for (key, name) in filenames(&config) {
        let relative = PathBuf::from(&name);
        let inside = relative
            .components()
            .all(|c| matches!(c, Component::Normal(_)));
        if !inside || relative.as_os_str().is_empty() {
            return Err(problem(format!(
                "{key} is '{name}'; expected the name of a file in the directory"
            )));
        }
        if !root.join(&relative).is_file() {
            return Err(problem(format!(
                "{key} is '{name}', but there is no such file in the directory"
            )));
        }
        let stem = relative.file_stem().unwrap_or_default().to_string_lossy();
        let suffix = format!("_{variant}");
        let module = match stem.strip_suffix(&suffix) {
            Some(module) if !variant.is_empty() => module.to_owned(),
            _ => stem.into_owned(),
        };
        files.push(ModelFile {
            relative,
            module,
            variant: variant.to_owned(),
        });
    }
    if files.is_empty() {
        return Err(problem(
            "names no model file; expected model.decoder.filename, and for a vision-language model \
             model.vision.filename and model.embedding.filename"
                .into(),
        ));
    }
    Ok(files)
}

/// (path of the key, file name) of every model file: `model.PART.filename`, and
/// those of a decoder that is a pipeline of several files.
fn filenames(config: &Value) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let Some(parts) = config.get("model").and_then(Value::as_object) else {
        return found;
    };
    let mut add = |key: String, part: &Value| {
        if let Some(name) = part.get("filename").and_then(Value::as_str) {
            // An adapter file is no model.
            if Path::new(name).extension().is_some_and(|e| e == "onnx") {
                found.push((format!("{key}.filename"), name.to_owned()));
            }
        }
    };
    for (part, value) in parts {
        add(format!("model.{part}"), value);
        let stages = value.get("pipeline").and_then(Value::as_array);
        for stage in stages.into_iter().flatten() {
            for (name, stage) in stage.as_object().into_iter().flatten() {
                add(format!("model.{part}.pipeline.{name}"), stage);
            }
        }
    }
    found
}

/// The config of a rewritten model, or `None` if nothing in it changes.
///
/// GenAI allocates image features and embeddings by `model.decoder.hidden_size`,
/// so with a marker channel, which makes these tensors one wider, it becomes
/// `width + 1`. (In GenAI 0.18, `src/models/multi_modal_features.cpp` and
/// `embeddings.cpp`; besides these only speculative decoding reads it.) With caches that the graph fills up to one
/// length (`padded`), `search.past_present_share_buffer` becomes false: a shared buffer is of the longest answer's
/// length from the beginning, and only the attention operator that owns it knows how much of it holds something.
/// `renamed` maps file names to those that the config is to name instead.
///
/// # Errors
/// Text that is no JSON object, or a width that is not the model's.
pub fn patch_genai(
    text: &str,
    marked_width: Option<i64>,
    padded: bool,
    renamed: &dyn Fn(&Path) -> Option<PathBuf>,
) -> Result<Option<String>, String> {
    let mut config: Value = serde_json::from_str(text).map_err(|e| e.to_string())?;
    let before = config.clone();
    if let Some(width) = marked_width
        && let Some(stated) = config.pointer_mut("/model/decoder/hidden_size")
    {
        if stated.as_i64() != Some(width) {
            return Err(format!(
                "model.decoder.hidden_size is {stated}, but the decoder's embeddings are {width} wide"
            ));
        }
        *stated = (width + 1).into();
    }
    if padded && let Some(shared) = config.pointer_mut("/search/past_present_share_buffer") {
        *shared = false.into();
    }
    rename(&mut config, renamed);
    if config == before {
        return Ok(None);
    }
    let text = serde_json::to_string_pretty(&config).map_err(|e| e.to_string())?;
    Ok(Some(text + "\n"))
}

fn rename(value: &mut Value, renamed: &dyn Fn(&Path) -> Option<PathBuf>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                let new = match value.as_str() {
                    Some(name) if key == "filename" => renamed(Path::new(name)),
                    _ => None,
                };
                match new {
                    Some(new) => *value = new.to_string_lossy().replace('\\', "/").into(),
                    None => rename(value, renamed),
                }
            }
        }
        Value::Array(list) => list.iter_mut().for_each(|v| rename(v, renamed)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"{"model": {"type": "gemma3", "vocab_size": 400,
        "decoder": {"filename": "text.onnx", "hidden_size": 32, "head_size": 16},
        "vision": {"filename": "sub/vision.onnx"}, "embedding": {"filename": "embedding.onnx"}}}"#;

    #[test]
    fn only_the_width_changes_and_only_with_a_marker_channel() {
        let keep = |_: &Path| None;
        assert_eq!(patch_genai(TEXT, None, false, &keep).unwrap(), None);
        let text = patch_genai(TEXT, Some(32), false, &keep).unwrap().unwrap();
        let after: Value = serde_json::from_str(&text).unwrap();
        let mut want: Value = serde_json::from_str(TEXT).unwrap();
        want["model"]["decoder"]["hidden_size"] = 33.into();
        assert_eq!(after, want);
        let error = patch_genai(TEXT, Some(48), false, &keep).unwrap_err();
        assert!(
            error.contains("is 32") && error.contains("48 wide"),
            "{error}"
        );
        assert!(patch_genai("{", None, false, &keep).is_err());
    }

    #[test]
    fn padded_caches_share_no_buffer() {
        let keep = |_: &Path| None;
        let search = r#", "search": {"past_present_share_buffer": true, "max_length": 9}}"#;
        let text = TEXT.strip_suffix('}').unwrap().to_owned() + search;
        let after = patch_genai(&text, None, true, &keep).unwrap().unwrap();
        let after: Value = serde_json::from_str(&after).unwrap();
        assert_eq!(
            after["search"],
            serde_json::json!({"past_present_share_buffer": false, "max_length": 9})
        );
        assert_eq!(patch_genai(&text, None, false, &keep).unwrap(), None);
        assert_eq!(patch_genai(TEXT, None, true, &keep).unwrap(), None);
    }

    #[test]
    fn file_names_follow_a_suffix() {
        let renamed = |p: &Path| {
            (p != Path::new("embedding.onnx")).then(|| super::super::output::suffixed(p, "duet"))
        };
        let text = patch_genai(TEXT, None, false, &renamed).unwrap().unwrap();
        let after: Value = serde_json::from_str(&text).unwrap();
        let names: Vec<String> = filenames(&after).into_iter().map(|(_, n)| n).collect();
        assert_eq!(
            names,
            ["text_duet.onnx", "sub/vision_duet.onnx", "embedding.onnx"]
        );
        assert_eq!(after["model"]["decoder"]["hidden_size"], 32);
    }

    #[test]
    fn files_are_those_that_the_config_names() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let put = |name: &str, text: &str| {
            let path = root.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let fails = |fragment: &str| {
            let error = files(root).unwrap_err().to_string();
            assert!(error.contains(fragment), "{error}");
        };
        put(CONFIG, TEXT);
        fails("model.decoder.filename is 'text.onnx', but there is no such file");
        for name in [
            "text.onnx",
            "sub/vision.onnx",
            "embedding.onnx",
            "other.onnx",
        ] {
            put(name, "");
        }
        let names = |list: Vec<ModelFile>| -> Vec<String> {
            let each = list
                .iter()
                .map(|f| f.relative.display().to_string() + "/" + &f.variant);
            each.collect()
        };
        let plain = ["embedding.onnx/", "sub/vision.onnx/", "text.onnx/"];
        assert_eq!(names(files(root).unwrap()), plain);
        put("text_duet.onnx", "");
        put(
            "genai_config_duet.json",
            &TEXT.replace("text.onnx", "text_duet.onnx"),
        );
        let all = names(files(root).unwrap());
        assert_eq!(
            all,
            [
                "embedding.onnx/",
                "sub/vision.onnx/",
                "text.onnx/",
                "text_duet.onnx/duet"
            ]
        );
        put(CONFIG, &TEXT.replace("text.onnx", "../text.onnx"));
        fails("expected the name of a file in the directory");
        put(CONFIG, r#"{"model": {}}"#);
        fails("names no model file");
        put(CONFIG, "[");
        fails("no JSON");
    }
}
