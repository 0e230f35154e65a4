//! External data files: where a location may lead, and mapping what it names.
//!
//! A model file is untrusted input. A location is a relative path below the
//! model's directory; anything that would read elsewhere (`..`, an absolute
//! path, a link that leaves the directory) is refused, as ONNX and ONNX Runtime
//! refuse it.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use bytes::Bytes;
use memmap2::Mmap;

use crate::ir::{ExternalRef, ExternalSource, IrError};

/// External data below one directory. Files are looked up once, when first named,
/// and mapped when first asked for.
#[derive(Debug)]
pub struct DataDirectory {
    root: PathBuf,
    real_root: OnceLock<PathBuf>,
    files: Mutex<HashMap<String, DataFile>>,
    model: Option<Mapped>,
}

/// A file that a location was found to name.
#[derive(Debug)]
struct DataFile {
    path: Arc<Path>,
    size: u64,
    mapped: Option<Bytes>,
}

/// How much of a mapped model is gone over before its pages are given back.
const KEPT: usize = 16 << 20;

/// A mapped file, kept open.
#[derive(Debug)]
pub(super) struct Mapped {
    file: File,
    /// `None`: an empty file.
    map: Option<Arc<Mmap>>,
    bytes: Bytes,
    /// Bytes gone over since pages were given back.
    passed: AtomicUsize,
}

impl Mapped {
    /// Opens and maps a file; an empty file is an empty slice.
    pub(super) fn open(path: &Path) -> std::io::Result<Self> {
        let file = File::open(path)?;
        let map = map(&file)?.map(Arc::new);
        let shared = map.clone().map(|map| Bytes::from_owner(Pages(map)));
        Ok(Self {
            file,
            map,
            bytes: shared.unwrap_or_default(),
            passed: AtomicUsize::new(0),
        })
    }

    /// All of it.
    pub(super) fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Counts what is gone over, and after [`KEPT`] bytes gives all pages back to
    /// the kernel.
    fn passed(&self, count: usize) {
        if self.passed.fetch_add(count, Ordering::Relaxed) < KEPT {
            return;
        }
        self.passed.store(0, Ordering::Relaxed);
        if let Some(map) = &self.map {
            // SAFETY: nothing is lost: the mapping is read-only, and a page that is
            // looked at again comes from the file again.
            #[cfg(unix)]
            #[allow(unsafe_code, reason = "memmap2 does not tell mappings apart")]
            // A kernel that keeps them only costs memory.
            let _ = unsafe { map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
            #[cfg(not(unix))]
            let _ = map;
        }
    }
}

/// A mapping that [`Bytes`] share.
struct Pages(Arc<Mmap>);

impl AsRef<[u8]> for Pages {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl DataDirectory {
    /// Data of a model file in `root`.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into(),
            real_root: OnceLock::new(),
            files: Mutex::new(HashMap::new()),
            model: None,
        }
    }

    /// As [`Self::new`], for a model that stays mapped.
    pub(super) fn of(root: impl Into<PathBuf>, model: Mapped) -> Self {
        Self {
            model: Some(model),
            ..Self::new(root)
        }
    }

    /// The file that a location names.
    ///
    /// # Errors
    /// A location that is empty, absolute, contains `..`, or is a link that
    /// leaves the directory; or a file that does not exist.
    pub fn resolve(&self, location: &str) -> Result<PathBuf, IrError> {
        let refuse = |reason: String| IrError::External {
            location: location.to_owned(),
            reason,
        };
        let relative = Path::new(location);
        if location.is_empty() || location.contains('\0') {
            return Err(refuse("expected a file name".into()));
        }
        for part in relative.components() {
            match part {
                Component::Normal(_) | Component::CurDir => {}
                Component::ParentDir => {
                    let why =
                        "'..' is not allowed: data files lie in or below the model's directory";
                    return Err(refuse(why.into()));
                }
                Component::RootDir | Component::Prefix(_) => {
                    return Err(refuse(
                        "an absolute path is not allowed: data files lie in or below the model's directory".into(),
                    ));
                }
            }
        }
        let path = self.root.join(relative);
        let real = path.canonicalize().map_err(|e| {
            refuse(format!(
                "{}: {e}; is the data file beside the model?",
                path.display()
            ))
        })?;
        let root = match self.real_root.get() {
            Some(root) => root,
            None => {
                let root = self.root.canonicalize();
                let root = root.map_err(|e| refuse(e.to_string()))?;
                self.real_root.get_or_init(|| root)
            }
        };
        if !real.starts_with(root) {
            return Err(refuse(format!(
                "is a link that leaves the directory (to {}), which ONNX Runtime refuses too; copy the \
                 model with its data first (cp -rL)",
                real.display()
            )));
        }
        if !real.is_file() {
            return Err(refuse(format!("{} is no file", path.display())));
        }
        Ok(path)
    }

    /// Byte range of a reference, checked against the file's size.
    ///
    /// # Errors
    /// As [`Self::resolve`], or a range that overflows or ends outside.
    pub fn range(&self, reference: &ExternalRef) -> Result<(Arc<Path>, u64, u64), IrError> {
        let refuse = |reason: String| IrError::External {
            location: reference.location.clone(),
            reason,
        };
        let mut files = self.files();
        // Thousands of tensors lie in one file.
        let (path, size) = match files.get(&reference.location) {
            Some(known) => (known.path.clone(), known.size),
            None => {
                let path: Arc<Path> = self.resolve(&reference.location)?.into();
                let size = path.metadata().map_err(|e| refuse(e.to_string()))?.len();
                let found = DataFile {
                    path: path.clone(),
                    size,
                    mapped: None,
                };
                files.insert(reference.location.clone(), found);
                (path, size)
            }
        };
        drop(files);
        let start = reference.offset.unwrap_or(0);
        let length = match reference.length {
            Some(length) => length,
            None => size.checked_sub(start).ok_or_else(|| {
                refuse(format!(
                    "starts at byte {start}, but the file has {size} bytes"
                ))
            })?,
        };
        let end = start
            .checked_add(length)
            .ok_or_else(|| refuse(format!("offset {start} + length {length} overflows")))?;
        if end > size {
            return Err(refuse(format!(
                "expected bytes {start}..{end}, but the file has {size} (truncated?)"
            )));
        }
        Ok((path, start, length))
    }

    fn files(&self) -> MutexGuard<'_, HashMap<String, DataFile>> {
        match self.files.lock() {
            Ok(guard) => guard,
            Err(poisoned) => poisoned.into_inner(),
        }
    }
}

/// Maps a file; an empty file is an empty slice.
pub(crate) fn map_file(path: &Path) -> std::io::Result<Bytes> {
    let map = map(&File::open(path)?)?;
    Ok(map.map_or_else(Bytes::new, Bytes::from_owner))
}

/// As [`map_file`], of an open file; `None`: it is empty.
fn map(file: &File) -> std::io::Result<Option<Mmap>> {
    if file.metadata()?.len() == 0 {
        return Ok(None);
    }
    // SAFETY: the mapping is read-only and private. Another process truncating
    // the file while it is mapped would be an error for any reader of it.
    #[allow(unsafe_code, reason = "memory-mapping has no safe form")]
    let map = unsafe { Mmap::map(file)? };
    // Only headers are looked at, and each would bring two megabytes of weights into
    // this process where the file cache holds huge pages. A kernel may not know it.
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::NoHugePage);
    Ok(Some(map))
}

impl ExternalSource for DataDirectory {
    fn load(&self, reference: &ExternalRef) -> Result<Bytes, IrError> {
        // A file that was looked up earlier may have changed since.
        let mut files = self.files();
        let known = files.get(&reference.location);
        if known.is_some_and(|file| file.mapped.is_none()) {
            files.remove(&reference.location);
        }
        drop(files);
        let (path, start, length) = self.range(reference)?;
        let refuse = |reason: String| IrError::External {
            location: reference.location.clone(),
            reason,
        };
        let mut files = self.files();
        let mapped = files.get_mut(&reference.location).map(|f| &mut f.mapped);
        let bytes = match mapped {
            Some(Some(bytes)) => bytes.clone(),
            empty => {
                let bytes = map_file(&path).map_err(|e| refuse(e.to_string()))?;
                if let Some(slot) = empty {
                    *slot = Some(bytes.clone());
                }
                bytes
            }
        };
        drop(files);
        let to_index = |n: u64| usize::try_from(n).map_err(|_| refuse("too large".into()));
        let (start, end) = (to_index(start)?, to_index(start + length)?);
        if end > bytes.len() {
            return Err(refuse("the file shrank while it was read".into()));
        }
        Ok(bytes.slice(start..end))
    }

    fn directory(&self) -> Option<PathBuf> {
        Some(self.root.clone())
    }

    fn place(&self, bytes: &[u8]) -> Option<(&File, u64)> {
        let Mapped {
            file, bytes: all, ..
        } = self.model.as_ref()?;
        let range = all.as_ptr_range();
        let inside = range.contains(&bytes.as_ptr()) && bytes.as_ptr_range().end <= range.end;
        inside.then(|| (file, (bytes.as_ptr().addr() - range.start.addr()) as u64))
    }

    fn passed(&self, count: usize) {
        if let Some(model) = &self.model {
            model.passed(count);
        }
    }
}
