//! Finding and loading ONNX Runtime's shared library.
//!
//! The library is looked for, in this order: the file that `ORT_DYLIB_PATH` names; beside the executable;
//! the active virtual or conda environment; `./.venv`; the `onnxruntime` package of the `python3` on PATH;
//! the directory that [`install`] fills; system directories. The first usable one is loaded,
//! once for the whole process. `ort` panics if it has to look for the library itself, so everything of this
//! module that touches `ort` goes through [`Runtime`] first.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};

use super::error::{Result, RuntimeError};
use super::install;

/// Oldest ONNX Runtime (minor version) that has the API used here.
pub const MINIMUM_MINOR: u32 = ort::MINOR_VERSION;

/// How a library was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Named by `ORT_DYLIB_PATH`.
    Variable,
    /// In the executable's directory, or `lib` beside or above it.
    Executable,
    /// In the environment that `VIRTUAL_ENV` names.
    VirtualEnv,
    /// In the environment that `CONDA_PREFIX` names.
    Conda,
    /// In `./.venv`.
    DotVenv,
    /// In the package of the `python3` on PATH.
    Python,
    /// Installed by `duet runtime install`.
    Installed,
    /// In a directory of the system.
    System,
    /// Given by the caller.
    Given,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Variable => "named by ORT_DYLIB_PATH",
            Self::Executable => "beside the executable",
            Self::VirtualEnv => "in the active virtual environment",
            Self::Conda => "in the active conda environment",
            Self::DotVenv => "in ./.venv",
            Self::Python => "in the package of the python3 on PATH",
            Self::Installed => "installed by duet",
            Self::System => "in a system directory",
            Self::Given => "given",
        })
    }
}

/// A library file and how it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Library {
    /// The file.
    pub path: PathBuf,
    /// How it was found.
    pub origin: Origin,
}

/// Where to look. [`Places::of_process`] reads it from the environment; tests fill it by hand.
#[derive(Debug, Clone, Default)]
pub struct Places {
    /// Value of `ORT_DYLIB_PATH`.
    pub variable: Option<PathBuf>,
    /// Directory of the executable.
    pub executable_dir: Option<PathBuf>,
    /// Value of `VIRTUAL_ENV`.
    pub virtual_env: Option<PathBuf>,
    /// Value of `CONDA_PREFIX`.
    pub conda: Option<PathBuf>,
    /// Current directory.
    pub current_dir: Option<PathBuf>,
    /// Python interpreters to ask, best first.
    pub pythons: Vec<OsString>,
    /// Our own cache directory.
    pub cache: Option<PathBuf>,
    /// System library directories.
    pub system: Vec<PathBuf>,
}

impl Places {
    /// The places of this process, from its environment variables, executable and current directory.
    pub fn of_process() -> Self {
        let var = |name: &str| {
            std::env::var_os(name)
                .filter(|v| !v.is_empty())
                .map(PathBuf::from)
        };
        let executable_dir = std::env::current_exe()
            .ok()
            .and_then(|exe| std::fs::canonicalize(exe).ok())
            .and_then(|exe| exe.parent().map(Path::to_path_buf));
        Self {
            variable: var("ORT_DYLIB_PATH"),
            executable_dir,
            virtual_env: var("VIRTUAL_ENV"),
            conda: var("CONDA_PREFIX"),
            current_dir: std::env::current_dir().ok(),
            pythons: if cfg!(windows) {
                vec!["python".into(), "python3".into()]
            } else {
                vec!["python3".into()]
            },
            cache: install::cache_dir(),
            system: system_dirs(),
        }
    }

    /// The first usable library file.
    ///
    /// # Errors
    /// [`RuntimeError::LibraryNotFound`] with every place looked at; also if `ORT_DYLIB_PATH` is set but
    /// names nothing usable, because then something else would be loaded than was asked for.
    pub fn find(&self) -> Result<Library> {
        let mut search = Search::default();
        if let Some(path) = &self.variable {
            if path.is_file() {
                return Ok(Library {
                    path: absolute(path),
                    origin: Origin::Variable,
                });
            }
            return search
                .look(Origin::Variable, path)
                .ok_or(RuntimeError::LibraryNotFound {
                    searched: search.searched,
                });
        }
        if let Some(dir) = &self.executable_dir {
            let above = dir.parent().map(|up| up.join("lib"));
            let dirs = [Some(dir.clone()), Some(dir.join("lib")), above];
            for dir in dirs.into_iter().flatten() {
                if let Some(found) = search.look(Origin::Executable, &dir) {
                    return Ok(found);
                }
            }
        }
        let dot_venv = self.current_dir.as_ref().map(|dir| dir.join(".venv"));
        for (origin, root) in [
            (Origin::VirtualEnv, &self.virtual_env),
            (Origin::Conda, &self.conda),
            (Origin::DotVenv, &dot_venv),
        ] {
            if let Some(found) = root.as_ref().and_then(|root| search.look_env(origin, root)) {
                return Ok(found);
            }
        }
        for python in &self.pythons {
            if let Some(found) = search.look_python(python) {
                return Ok(found);
            }
        }
        let installed = self.cache.as_ref().map(|cache| install::target(cache));
        if let Some(found) = installed.and_then(|dir| search.look(Origin::Installed, &dir)) {
            return Ok(found);
        }
        for dir in &self.system {
            if let Some(found) = search.look(Origin::System, dir) {
                return Ok(found);
            }
        }
        Err(RuntimeError::LibraryNotFound {
            searched: search.searched,
        })
    }
}

/// Remembers what was looked at, for the message that is shown when nothing is found.
#[derive(Default)]
struct Search {
    searched: Vec<String>,
}

impl Search {
    /// Looks for a library directly in a directory.
    fn look(&mut self, origin: Origin, dir: &Path) -> Option<Library> {
        let mut best: Option<(Version, PathBuf)> = None;
        let mut too_old = None;
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let Some(version) = name.to_str().and_then(library_version) else {
                continue;
            };
            // A link whose target is gone looks like a file in the listing only.
            if !entry.path().is_file() {
                continue;
            }
            if version.is_too_old() {
                too_old = Some(entry.path());
            } else if best.as_ref().is_none_or(|(known, _)| version > *known) {
                best = Some((version, entry.path()));
            }
        }
        if let Some((_, path)) = best {
            return Some(Library {
                path: absolute(&path),
                origin,
            });
        }
        self.searched.push(match too_old {
            Some(path) => format!(
                "{} ({origin}): older than 1.{MINIMUM_MINOR}",
                path.display()
            ),
            None => format!("{} ({origin})", dir.display()),
        });
        None
    }

    /// Looks in a Python or conda environment: its library directory and its `onnxruntime` package.
    fn look_env(&mut self, origin: Origin, root: &Path) -> Option<Library> {
        for dir in site_packages(root) {
            // A package without this folder is no place worth naming among those that were searched.
            let capi = Some(dir.join("onnxruntime").join("capi")).filter(|dir| dir.is_dir());
            if let Some(found) = capi.and_then(|capi| self.look(origin, &capi)) {
                return Some(found);
            }
        }
        let lib = if cfg!(windows) {
            root.join("Library").join("bin")
        } else {
            root.join("lib")
        };
        self.look(origin, &lib)
    }

    /// Asks a Python interpreter where its `onnxruntime` package is. The package is not imported.
    fn look_python(&mut self, python: &OsString) -> Option<Library> {
        // `-c` puts the current directory first on the module path: whatever lies there is not to be run.
        const ASK: &str = "import sys\n\
                           if sys.path and not sys.path[0]: del sys.path[0]\n\
                           from importlib.util import find_spec\n\
                           spec = find_spec('onnxruntime')\n\
                           print(*((spec and spec.submodule_search_locations) or ()), sep='\\n')";
        let output = Command::new(python)
            .args(["-c", ASK])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .output();
        let name = python.to_string_lossy();
        let output = match output {
            Ok(output) if output.status.success() => output,
            Ok(_) => {
                self.searched
                    .push(format!("`{name}` on PATH: failed to run"));
                return None;
            }
            Err(error) => {
                self.searched.push(format!("`{name}` on PATH: {error}"));
                return None;
            }
        };
        let text = String::from_utf8_lossy(&output.stdout);
        let dirs: Vec<&str> = text
            .lines()
            .map(str::trim)
            .filter(|l| !l.is_empty())
            .collect();
        if dirs.is_empty() {
            self.searched
                .push(format!("`{name}` on PATH: has no package onnxruntime"));
        }
        dirs.iter()
            .find_map(|dir| self.look(Origin::Python, &Path::new(dir).join("capi")))
    }
}

/// Version in a library's file name; a name without one is taken for new enough, the loader decides.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Version(Vec<u32>);

impl Version {
    fn is_too_old(&self) -> bool {
        // Some builds carry only the major version (`libonnxruntime.so.1`): nothing to compare then.
        match self.0[..] {
            [1, minor, ..] => minor < MINIMUM_MINOR,
            _ => false,
        }
    }
}

/// The version in a file name of ONNX Runtime's shared library (empty if it shows none), or `None` if the
/// file is something else.
fn library_version(name: &str) -> Option<Version> {
    let version = if cfg!(windows) {
        return name
            .eq_ignore_ascii_case("onnxruntime.dll")
            .then(|| Version(vec![]));
    } else if cfg!(target_os = "macos") {
        name.strip_prefix("libonnxruntime")?
            .strip_suffix(".dylib")?
    } else {
        name.strip_prefix("libonnxruntime.so")?
    };
    if version.is_empty() {
        return Some(Version(vec![]));
    }
    let parts = version.strip_prefix('.')?.split('.');
    parts
        .map(|part| part.parse().ok())
        .collect::<Option<Vec<u32>>>()
        .map(Version)
}

/// The `site-packages` directories of an environment, sorted.
fn site_packages(root: &Path) -> Vec<PathBuf> {
    if cfg!(windows) {
        return vec![root.join("Lib").join("site-packages")];
    }
    let mut found = Vec::new();
    for lib in ["lib", "lib64"] {
        for entry in std::fs::read_dir(root.join(lib))
            .into_iter()
            .flatten()
            .flatten()
        {
            if entry.file_name().to_string_lossy().starts_with("python") {
                found.push(entry.path().join("site-packages"));
            }
        }
    }
    found.sort();
    found
}

fn system_dirs() -> Vec<PathBuf> {
    let mut dirs: Vec<PathBuf> = Vec::new();
    let list = if cfg!(windows) {
        "PATH"
    } else if cfg!(target_os = "macos") {
        "DYLD_LIBRARY_PATH"
    } else {
        "LD_LIBRARY_PATH"
    };
    if let Some(value) = std::env::var_os(list) {
        dirs.extend(std::env::split_paths(&value).filter(|dir| !dir.as_os_str().is_empty()));
    }
    if cfg!(target_os = "macos") {
        dirs.extend(["/opt/homebrew/lib", "/usr/local/lib"].map(PathBuf::from));
    } else if !cfg!(windows) {
        dirs.extend(["/usr/local/lib", "/usr/lib", "/usr/lib64", "/lib"].map(PathBuf::from));
        dirs.push(format!("/usr/lib/{}-linux-gnu", std::env::consts::ARCH).into());
    }
    dirs
}

/// `ort` reads a relative path as relative to the executable; nobody means that.
fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf())
}

/// The loaded library and ONNX Runtime's process-wide environment.
#[derive(Debug)]
pub struct Runtime {
    library: Library,
    environment: ort::environment::Environment,
}

// ONNX Runtime allows one library and one environment in a process, and `ort` cannot make a second one after
// the first is gone, so the one there is lives until the end.
static RUNTIME: OnceLock<Runtime> = OnceLock::new();
static LOADING: Mutex<()> = Mutex::new(());

impl Runtime {
    /// The process's runtime: what is loaded already, else the first library found. Never installs.
    ///
    /// # Errors
    /// Nothing found, or what was found cannot be loaded or is too old.
    pub fn get() -> Result<&'static Self> {
        match RUNTIME.get() {
            Some(runtime) => Ok(runtime),
            None => Self::load(Places::of_process().find()?),
        }
    }

    /// Loads a given library file. If one is loaded already, that one stays and is returned: compare
    /// [`library`](Self::library) where it matters.
    ///
    /// # Errors
    /// The file cannot be loaded, is not ONNX Runtime or is too old.
    pub fn load(library: Library) -> Result<&'static Self> {
        let _one_at_a_time = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(runtime) = RUNTIME.get() {
            return Ok(runtime);
        }
        let failed = |reason: String| RuntimeError::LibraryLoad {
            path: library.path.clone(),
            origin: library.origin.to_string(),
            reason,
            minimum: MINIMUM_MINOR,
        };
        let environment = ort::init_from(absolute(&library.path))
            .map_err(|e| failed(e.to_string()))?
            .with_name("duet")
            .with_telemetry(false)
            .build()
            .map_err(|e| failed(e.to_string()))?;
        Ok(RUNTIME.get_or_init(|| Self {
            library,
            environment,
        }))
    }

    /// The library in use.
    pub fn library(&self) -> &Library {
        &self.library
    }

    /// What the library says about its build: version, commit, compiler flags.
    pub fn build_info(&self) -> &'static str {
        ort::info()
    }

    pub(super) fn environment(&self) -> &ort::environment::Environment {
        &self.environment
    }
}

/// The process's runtime; if no library is found, installs the pinned one first.
///
/// For commands that are allowed to download: the demonstration, the tests and the explicit install.
/// `announce` gets one line before anything is downloaded and one when it is there.
///
/// # Errors
/// As [`Runtime::get`] and [`install::install`].
pub fn ensure(announce: &mut dyn FnMut(&str)) -> Result<&'static Runtime> {
    match Runtime::get() {
        Err(RuntimeError::LibraryNotFound { .. }) => {
            let path = install::install(announce)?;
            Runtime::load(Library {
                path,
                origin: Origin::Installed,
            })
        }
        other => other,
    }
}

#[cfg(test)]
mod tests;
