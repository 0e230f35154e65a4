//! The packed forms of `models/forms/packed`, put together as the directories that people have.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use serde::Deserialize;

use super::models::root;
use super::packed::contents;

/// What `models/forms/pack.py` says about a form.
#[derive(Deserialize)]
pub(crate) struct Form {
    /// Folder name.
    #[serde(skip)]
    pub(crate) name: String,
    /// Heading in the table of forms.
    pub(crate) heading: String,
    /// What made it.
    pub(crate) how: String,
    /// Golden set of its weights, where the form computes in fp32.
    pub(crate) goldens: Option<String>,
    /// Why ONNX Runtime does not run the unmodified files, if it does not.
    pub(crate) error: Option<String>,
    /// Whether the unmodified decoder takes one token at a time on top of a cache.
    pub(crate) single_steps: bool,
    files: BTreeMap<PathBuf, PathBuf>,
}

/// Every packed form, by name.
pub(crate) fn all() -> Vec<Form> {
    let folder = root().join("models/forms/packed");
    let mut names: Vec<String> = fs::read_dir(&folder)
        .unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
        .map(|entry| {
            entry
                .expect("an entry")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    names.sort();
    names.iter().map(|name| form(name)).collect()
}

/// One packed form.
pub(crate) fn form(name: &str) -> Form {
    let path = root()
        .join("models/forms/packed")
        .join(name)
        .join("form.json");
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut form: Form =
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    name.clone_into(&mut form.name);
    form
}

impl Form {
    /// The form's directory under `target/tmp`, of this test binary and unpacked once.
    pub(crate) fn directory(&self) -> PathBuf {
        static DONE: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
        let binary = std::env::current_exe().expect("a program");
        let folder =
            Path::new(env!("CARGO_TARGET_TMPDIR")).join(binary.file_stem().expect("a name"));
        let mut done = DONE.lock().expect("no panic while unpacking");
        if done.insert(self.name.clone()) {
            self.unpack(&folder);
        }
        folder.join(&self.name)
    }

    /// Writes the form's directory into `folder` and returns it.
    pub(crate) fn unpack(&self, folder: &Path) -> PathBuf {
        let target = folder.join(&self.name);
        for (file, source) in &self.files {
            let source = root().join("models").join(source);
            let bytes = contents(&source);
            let file = target.join(file);
            fs::create_dir_all(file.parent().expect("a folder")).expect("a folder");
            fs::write(&file, bytes).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        }
        target
    }
}
