//! Fixtures that are kept packed by gzip, one file at a time.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Read;
use std::path::{Path, PathBuf};

/// Contents of a file; unpacked where its name ends in `.gz`.
pub(crate) fn contents(path: &Path) -> Vec<u8> {
    let stored = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    if path.extension().is_none_or(|e| e != "gz") {
        return stored;
    }
    let mut bytes = Vec::new();
    flate2::read::GzDecoder::new(stored.as_slice())
        .read_to_end(&mut bytes)
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    bytes
}

/// A copy of a directory with its packed files unpacked, under `target/tmp`. Tests that ask for the
/// same one at once, in one process or several, get the same.
pub(crate) fn unpacked(folder: &Path) -> PathBuf {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(at) = folders.pop() {
        for entry in fs::read_dir(&at).unwrap_or_else(|e| panic!("{}: {e}", at.display())) {
            let path = entry.expect("an entry").path();
            match path.is_dir() {
                true => folders.push(path),
                false => files.push(path),
            }
        }
    }
    files.sort();
    // Named by what is in it: a fixture that was made anew is unpacked anew.
    let mut state = DefaultHasher::new();
    for path in &files {
        let stored = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        (path, stored).hash(&mut state);
    }
    let place = Path::new(env!("CARGO_TARGET_TMPDIR")).join("unpacked");
    let name = folder.file_name().expect("a name").to_string_lossy();
    let target = place.join(format!("{name}-{:016x}", state.finish()));
    if target.is_dir() {
        return target;
    }
    fs::create_dir_all(&place).expect("a folder");
    let written = tempfile::tempdir_in(&place).expect("a folder");
    for path in &files {
        let inside = path.strip_prefix(folder).expect("below the folder");
        let mut to = written.path().join(inside);
        if to.extension().is_some_and(|e| e == "gz") {
            to.set_extension("");
        }
        fs::create_dir_all(to.parent().expect("a folder")).expect("a folder");
        fs::write(&to, contents(path)).unwrap_or_else(|e| panic!("{}: {e}", to.display()));
    }
    // Whoever is first is served; the others' copies go.
    let written = written.keep();
    if fs::rename(&written, &target).is_err() {
        let _ = fs::remove_dir_all(&written);
    }
    assert!(target.is_dir(), "{}", target.display());
    target
}
