//! Installing ONNX Runtime's shared library into our own cache directory, with pip.
//!
//! Only done when asked for ([`ensure`](super::library::ensure), `duet runtime install`). The wheel is
//! downloaded and unpacked instead of installed: that works in externally managed environments, with
//! `PIP_USER` set, and for interpreters that the wheel itself has no build for, since only the library inside
//! is used. Everything happens in a temporary directory that is renamed at the end, under a file lock, so any
//! number of processes may do it at once and none ever sees half a library.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::error::{Result, RuntimeError};

/// The release that [`install`] brings.
pub const VERSION: &str = "1.31.1";

/// Interpreter versions to ask pip for wheels of when the running one has none.
const OTHER_PYTHONS: [&str; 3] = ["3.13", "3.12", "3.11"];

/// Unpacks the shared libraries and licences of a wheel, flat, into a directory.
const UNPACK: &str = r#"
import glob, os, shutil, sys, zipfile
source, target = sys.argv[1:]
count = 0
with zipfile.ZipFile(glob.glob(os.path.join(source, "onnxruntime-*.whl"))[0]) as wheel:
    for entry in wheel.namelist():
        folder, _, name = entry.rpartition("/")
        library = folder == "onnxruntime/capi" and name.startswith(("libonnxruntime", "onnxruntime")) \
            and (".so" in name or name.endswith((".dylib", ".dll"))) and "pybind11" not in name
        licence = folder == "onnxruntime" and name in ("LICENSE", "ThirdPartyNotices.txt")
        if library or licence:
            with wheel.open(entry) as data, open(os.path.join(target, name), "wb") as file:
                shutil.copyfileobj(data, file)
            count += library
sys.exit(0 if count else "the wheel holds no shared library")
"#;

/// Our cache directory: `$XDG_CACHE_HOME/duet-onnx` or `~/.cache/duet-onnx` on Linux,
/// `~/Library/Caches/duet-onnx` on macOS, `%LOCALAPPDATA%\duet-onnx` on Windows. `None` if there is no home.
pub fn cache_dir() -> Option<PathBuf> {
    let var = |name: &str| {
        // The XDG rules say that relative paths are to be ignored.
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    let base = if cfg!(windows) {
        var("LOCALAPPDATA")
    } else {
        var("XDG_CACHE_HOME").or_else(|| {
            let home = var("HOME")?;
            Some(home.join(if cfg!(target_os = "macos") {
                "Library/Caches"
            } else {
                ".cache"
            }))
        })
    };
    base.map(|base| base.join("duet-onnx"))
}

/// Where [`install`] puts the library inside a cache directory.
pub fn target(cache: &Path) -> PathBuf {
    cache.join(format!("onnxruntime-{VERSION}"))
}

/// Downloads the pinned ONNX Runtime with pip into [`cache_dir`] unless it is there, and returns the library
/// file. `announce` gets one line before the download and one after.
///
/// # Errors
/// No cache directory, no Python with pip, no wheel for this platform, no network, or a file-system error;
/// pip's last lines are part of the message.
pub fn install(announce: &mut dyn FnMut(&str)) -> Result<PathBuf> {
    let cache = cache_dir().ok_or_else(|| RuntimeError::Install {
        reason: "there is no home directory to put it in".into(),
        hint: "Set HOME or XDG_CACHE_HOME".into(),
    })?;
    install_into(&cache, announce)
}

/// [`install`] into a given cache directory.
///
/// # Errors
/// As [`install`].
pub fn install_into(cache: &Path, announce: &mut dyn FnMut(&str)) -> Result<PathBuf> {
    let target = target(cache);
    if let Some(path) = library_in(&target) {
        return Ok(path);
    }
    std::fs::create_dir_all(cache).map_err(RuntimeError::io(cache))?;
    // The lock only spares the others a second download; where the file system has no locks, the rename
    // below decides who wins.
    let lock_path = cache.join("install.lock");
    let lock = File::create(&lock_path).map_err(RuntimeError::io(&lock_path))?;
    let _ = lock.lock();
    if let Some(path) = library_in(&target) {
        return Ok(path);
    }
    announce(&format!(
        "installing ONNX Runtime {VERSION} with pip into {}",
        target.display()
    ));
    let work = tempfile::Builder::new()
        .prefix(".installing-")
        .tempdir_in(cache)
        .map_err(RuntimeError::io(cache))?;
    let unpacked = work.path().join("library");
    std::fs::create_dir(&unpacked).map_err(RuntimeError::io(&unpacked))?;
    let python = download(work.path())?;
    unpack(&python, work.path(), &unpacked)?;
    if let Err(source) = std::fs::rename(&unpacked, &target) {
        // Lost the race, which is fine, or a real error.
        return library_in(&target).ok_or(RuntimeError::Io {
            path: target,
            source,
        });
    }
    announce(&format!("ONNX Runtime {VERSION} is installed"));
    library_in(&target).ok_or_else(|| RuntimeError::Install {
        reason: format!("{} holds no library after unpacking", target.display()),
        hint: "Remove the directory and try again".into(),
    })
}

fn library_in(dir: &Path) -> Option<PathBuf> {
    let places = super::library::Places {
        system: vec![dir.to_path_buf()],
        ..Default::default()
    };
    places.find().ok().map(|library| library.path)
}

/// Downloads the wheel into `dir` with the first Python that has pip; returns that Python.
fn download(dir: &Path) -> Result<String> {
    let mut reasons = Vec::new();
    for python in ["python3", "python"] {
        let version = Command::new(python)
            .args(["-m", "pip", "--version"])
            .stdin(Stdio::null())
            .output();
        match version {
            Ok(output) if output.status.success() => {}
            Ok(output) => {
                reasons.push(format!("`{python} -m pip`: {}", last_lines(&output.stderr)));
                continue;
            }
            Err(error) => {
                reasons.push(format!("`{python}`: {error}"));
                continue;
            }
        }
        let mut failure = String::new();
        for other in std::iter::once(None).chain(OTHER_PYTHONS.map(Some)) {
            let mut command = Command::new(python);
            command
                .args([
                    "-m",
                    "pip",
                    "download",
                    "--quiet",
                    "--disable-pip-version-check",
                ])
                .args(["--no-input", "--no-deps", "--only-binary=:all:", "--dest"])
                .arg(dir);
            if let Some(version) = other {
                command.args(["--python-version", version]);
            }
            command
                .arg(format!("onnxruntime=={VERSION}"))
                .stdin(Stdio::null());
            match command.output() {
                Ok(output) if output.status.success() => return Ok(python.into()),
                Ok(output) => {
                    let said = String::from_utf8_lossy(&output.stderr);
                    // pip's own wording for "no wheel for this interpreter"; anything else is no matter of
                    // the interpreter's version.
                    let no_wheel = said.contains("No matching distribution");
                    if failure.is_empty() {
                        failure = last_lines(&output.stderr);
                    }
                    if !no_wheel {
                        break;
                    }
                }
                Err(error) => {
                    failure = error.to_string();
                    break;
                }
            }
        }
        return Err(RuntimeError::Install {
            reason: format!("`{python} -m pip download onnxruntime=={VERSION}` failed: {failure}"),
            hint: "Check the network and the platform, or install it by hand and set \
                   ORT_DYLIB_PATH to the library file"
                .into(),
        });
    }
    Err(RuntimeError::Install {
        reason: format!("no Python with pip was found ({})", reasons.join("; ")),
        hint: "Install Python 3 with pip, or get ONNX Runtime in another way and set \
               ORT_DYLIB_PATH to the library file"
            .into(),
    })
}

fn unpack(python: &str, wheels: &Path, target: &Path) -> Result<()> {
    let output = Command::new(python)
        .args(["-c", UNPACK])
        .args([wheels, target])
        .stdin(Stdio::null())
        .output()
        .map_err(RuntimeError::io(python))?;
    if output.status.success() {
        return Ok(());
    }
    Err(RuntimeError::Install {
        reason: format!(
            "the wheel cannot be unpacked: {}",
            last_lines(&output.stderr)
        ),
        hint: "Try again, or install it by hand and set ORT_DYLIB_PATH".into(),
    })
}

/// The last few lines of what a program wrote, on one line.
fn last_lines(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    lines[lines.len().saturating_sub(3)..].join(" | ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_not_downloaded_again() {
        let cache = tempfile::tempdir().unwrap();
        let dir = target(cache.path());
        std::fs::create_dir_all(&dir).unwrap();
        let name = if cfg!(windows) {
            "onnxruntime.dll"
        } else if cfg!(target_os = "macos") {
            "libonnxruntime.1.31.1.dylib"
        } else {
            "libonnxruntime.so.1.31.1"
        };
        std::fs::write(dir.join(name), b"").unwrap();
        let mut said = Vec::new();
        let path = install_into(cache.path(), &mut |line| said.push(line.to_string())).unwrap();
        assert_eq!(path, dir.join(name));
        assert!(said.is_empty(), "{said:?}");
    }

    /// Unpacks a wheel made here, so the part after the download is tested without a network.
    #[test]
    fn unpacks_libraries_and_licences_only() {
        const MAKE: &str = r#"
import sys, zipfile
with zipfile.ZipFile(sys.argv[1], "w") as wheel:
    for name in ("onnxruntime/capi/libonnxruntime.so.1.31.1", "onnxruntime/capi/_pybind_state.py",
                 "onnxruntime/capi/onnxruntime_pybind11_state.cpython-311-x86_64-linux-gnu.so",
                 "onnxruntime/LICENSE", "onnxruntime/tools/libonnxruntime.so.9", "../evil/libonnxruntime.so"):
        wheel.writestr(name, name)
"#;
        let dir = tempfile::tempdir().unwrap();
        let wheel = dir.path().join("onnxruntime-1.31.1-cp311-cp311-linux.whl");
        let made = Command::new("python3")
            .args(["-c", MAKE])
            .arg(&wheel)
            .status()
            .unwrap();
        assert!(made.success());
        let target = dir.path().join("library");
        std::fs::create_dir(&target).unwrap();
        unpack("python3", dir.path(), &target).unwrap();
        let mut names: Vec<_> = std::fs::read_dir(&target)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["LICENSE", "libonnxruntime.so.1.31.1"]);
    }

    #[test]
    fn a_wheel_without_a_library_is_an_error() {
        const MAKE: &str = "import sys, zipfile; zipfile.ZipFile(sys.argv[1], 'w').close()";
        let dir = tempfile::tempdir().unwrap();
        let wheel = dir.path().join("onnxruntime-1.31.1-none.whl");
        Command::new("python3")
            .args(["-c", MAKE])
            .arg(&wheel)
            .status()
            .unwrap();
        let error = unpack("python3", dir.path(), dir.path())
            .unwrap_err()
            .to_string();
        assert!(error.contains("no shared library"), "{error}");
    }
}
