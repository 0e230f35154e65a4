//! Putting a rewritten model on disk: all of it or nothing.
//!
//! Everything is written under a temporary name in the target's parent and
//! renamed at the end; the source is only read, and what exists is never
//! replaced.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Component, Path, PathBuf};

use super::copy::copy_file;
use super::unfinished::{self, Unfinished};
use super::{Layout, ModelDir, OnnxError, Serialized};

/// How external data files reach a new directory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum DataMode {
    /// Copied (the kernel shares blocks where the file system can, and holes stay
    /// holes).
    #[default]
    Copy,
    /// Hard-linked: no byte is written, but onnx ≥ 1.23 and, in places, ONNX
    /// Runtime refuse such files.
    Hardlink,
}

/// What to write, by path relative to the model's root.
#[derive(Debug, Default)]
pub struct Outputs {
    /// Rewritten model files.
    pub models: Vec<(PathBuf, Serialized)>,
    /// Other files with new contents (configs).
    pub configs: Vec<(PathBuf, Vec<u8>)>,
    /// External data files that the models refer to, relative to the root.
    pub data: BTreeSet<PathBuf>,
    /// Files of the source that do not come along: models that were not chosen
    /// and their data. What is in `data` comes along all the same.
    pub left_out: BTreeSet<PathBuf>,
}

/// Writes a new, self-contained directory: the outputs, and whatever else the
/// source directory holds.
///
/// # Errors
/// A target that exists, lies inside the source, or whose parent does not
/// exist; and those of reading and writing. Nothing is left behind.
pub fn write_out(
    source: &ModelDir,
    outputs: &Outputs,
    target: &Path,
    mode: DataMode,
) -> Result<(), OnnxError> {
    if target.symlink_metadata().is_ok() {
        return Err(OnnxError::Exists {
            path: target.to_owned(),
        });
    }
    let parent = match target.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    let refuse = |problem: String| OnnxError::Directory {
        path: target.to_owned(),
        problem,
    };
    if target.file_name().is_none() || target.components().next_back() == Some(Component::ParentDir)
    {
        return Err(refuse("expected the name of a new directory".into()));
    }
    if !parent.is_dir() {
        return Err(refuse(format!(
            "its parent {} does not exist; create it first",
            parent.display()
        )));
    }
    let root = source
        .root
        .canonicalize()
        .map_err(OnnxError::io(&source.root))?;
    let real_parent = parent.canonicalize().map_err(OnnxError::io(parent))?;
    if source.layout.is_directory() && real_parent.starts_with(&root) {
        return Err(refuse(
            "it lies inside the model directory; name a directory outside it".into(),
        ));
    }
    // What is read there is the old file, and the new one is written over its name.
    let mut files = outputs.models.iter().map(|(file, _)| file);
    if let Some(file) = files.find(|file| outputs.data.contains(*file)) {
        return Err(OnnxError::Directory {
            path: source.root.join(file),
            problem: "external data lies in this model file, which is written anew, so the data would not be where \
                      it is looked for; give the data a file of its own, or write beside the old files (--beside)"
                .into(),
        });
    }
    let mut carried = BTreeSet::new();
    match source.layout {
        Layout::SingleFile => carried.extend(outputs.data.iter().cloned()),
        Layout::HuggingFace | Layout::Flat | Layout::GenAi => {
            list(&source.root, Path::new(""), &mut carried)?;
        }
    }
    carried.retain(|path| !outputs.left_out.contains(path) || outputs.data.contains(path));
    for (path, _) in &outputs.models {
        carried.remove(path);
    }
    for (path, _) in &outputs.configs {
        carried.remove(path);
    }
    let mut builder = tempfile::Builder::new();
    builder.prefix(".duet-");
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
    let made = Unfinished::made(|| builder.tempdir_in(parent));
    let (temp, _unfinished) = made.map_err(OnnxError::io(parent))?;
    let place = |relative: &Path| -> Result<PathBuf, OnnxError> {
        // The temporary directory itself is not made again where an interruption has removed it.
        let mut dir = temp.path().to_owned();
        for part in relative.parent().into_iter().flat_map(Path::components) {
            dir.push(part);
            match fs::create_dir(&dir) {
                Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                    return Err(OnnxError::io(dir)(error));
                }
                _ => {}
            }
        }
        Ok(temp.path().join(relative))
    };
    for relative in &carried {
        let (from, to) = (source.root.join(relative), place(relative)?);
        let link = mode == DataMode::Hardlink && outputs.data.contains(relative);
        if link {
            // A link to the file itself: a link to a symbolic link would dangle.
            let real = from.canonicalize().map_err(OnnxError::io(&from))?;
            fs::hard_link(&real, &to).map_err(OnnxError::io(&from))?;
        } else {
            copy_file(&from, &to).map_err(OnnxError::io(&from))?;
        }
    }
    for (relative, model) in &outputs.models {
        let path = place(relative)?;
        let file = fs::File::create(&path).map_err(OnnxError::io(&path))?;
        model.write_to(&target.join(relative), &file)?;
    }
    for (relative, contents) in &outputs.configs {
        let path = place(relative)?;
        fs::write(&path, contents).map_err(OnnxError::io(&path))?;
    }
    let _undisturbed = unfinished::undisturbed();
    rename_new(temp.path(), target)?;
    // It has its final name now: nothing to clean up.
    let _ = temp.keep();
    Ok(())
}

/// Renames, refusing to replace what another process put there meanwhile.
fn rename_new(from: &Path, to: &Path) -> Result<(), OnnxError> {
    #[cfg(any(target_os = "linux", target_os = "macos"))]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::EXIST) => {
                return Err(OnnxError::Exists {
                    path: to.to_owned(),
                });
            }
            // Not every file system knows the flag.
            Err(
                rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS | rustix::io::Errno::NOTSUP,
            ) => {}
            Err(error) => return Err(OnnxError::io(to)(error.into())),
        }
    }
    if to.symlink_metadata().is_ok() {
        return Err(OnnxError::Exists {
            path: to.to_owned(),
        });
    }
    fs::rename(from, to).map_err(OnnxError::io(to))
}

/// Lists all files below `root/at`; links to files count as files.
fn list(root: &Path, at: &Path, into: &mut BTreeSet<PathBuf>) -> Result<(), OnnxError> {
    let dir = root.join(at);
    for entry in fs::read_dir(&dir).map_err(OnnxError::io(&dir))? {
        let entry = entry.map_err(OnnxError::io(&dir))?;
        let relative = at.join(entry.file_name());
        let path = entry.path();
        let kind = entry.file_type().map_err(OnnxError::io(&path))?;
        if kind.is_dir() {
            list(root, &relative, into)?;
        } else if path.is_file() {
            into.insert(relative);
        } else {
            return Err(OnnxError::Directory {
                path,
                problem:
                    "is neither a file nor a directory (a link to a directory, or a broken link?); \
                          it cannot be carried over"
                        .into(),
            });
        }
    }
    Ok(())
}

/// Path of `relative` with `_suffix` after its stem.
pub fn suffixed(relative: &Path, suffix: &str) -> PathBuf {
    let stem = relative.file_stem().unwrap_or_default().to_string_lossy();
    let name = match relative.extension() {
        Some(ext) => format!("{stem}_{suffix}.{}", ext.to_string_lossy()),
        None => format!("{stem}_{suffix}"),
    };
    relative.with_file_name(name)
}

/// Writes new files next to the old ones, under names with a suffix; data files
/// are shared and not touched. Returns the paths written.
///
/// # Errors
/// A suffix that is no part of a file name, a target that exists, and those of
/// writing. What was written before the error is removed.
pub fn write_beside(
    source: &ModelDir,
    outputs: &Outputs,
    suffix: &str,
) -> Result<Vec<PathBuf>, OnnxError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if suffix.is_empty() || !suffix.chars().all(plain) || suffix.contains("..") {
        return Err(OnnxError::Directory {
            path: source.root.clone(),
            problem: format!(
                "'{suffix}' is no file-name suffix; use letters, digits, '-', '_' and '.'"
            ),
        });
    }
    let target = |relative: &Path| source.root.join(suffixed(relative, suffix));
    let all = outputs.models.iter().map(|(p, _)| p);
    for relative in all.chain(outputs.configs.iter().map(|(p, _)| p)) {
        let path = target(relative);
        if path.symlink_metadata().is_ok() {
            return Err(OnnxError::Exists { path });
        }
    }
    let fresh = |path: &Path| {
        let dir = path.parent().unwrap_or(Path::new("."));
        let mut builder = tempfile::Builder::new();
        builder.prefix(".duet-");
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        Unfinished::made(|| builder.tempfile_in(dir)).map_err(OnnxError::io(path))
    };
    let (mut staged, mut unfinished) = (Vec::new(), Vec::new());
    for (relative, model) in &outputs.models {
        let path = target(relative);
        let (file, known) = fresh(&path)?;
        unfinished.push(known);
        model.write_to(&path, file.as_file())?;
        staged.push((file, path));
    }
    for (relative, contents) in &outputs.configs {
        let path = target(relative);
        let (file, known) = fresh(&path)?;
        unfinished.push(known);
        fs::write(file.path(), contents).map_err(OnnxError::io(&path))?;
        staged.push((file, path));
    }
    let mut written: Vec<PathBuf> = Vec::new();
    // All of them or none.
    let _undisturbed = unfinished::undisturbed();
    for (file, path) in staged {
        if let Err(error) = file.persist_noclobber(&path) {
            for done in &written {
                let _ = fs::remove_file(done);
            }
            return Err(if error.error.kind() == std::io::ErrorKind::AlreadyExists {
                OnnxError::Exists { path }
            } else {
                OnnxError::io(path)(error.error)
            });
        }
        written.push(path);
    }
    Ok(written)
}
