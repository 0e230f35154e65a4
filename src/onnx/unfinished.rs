//! What is being written and has not its final name yet, so that whoever ends the program can remove it.
//!
//! A program that is interrupted runs no destructors: a copy of a model of many gigabytes
//! would stay under its temporary name.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

static PLACES: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Attempts at removing a directory into which files are still being written.
const ATTEMPTS: usize = 100;

/// A temporary file or directory, for as long as this is held.
#[derive(Debug)]
pub struct Unfinished(PathBuf);

impl Unfinished {
    /// Makes one; no interruption comes between its making and its being known.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn made<T: AsRef<Path>>(make: impl FnOnce() -> io::Result<T>) -> io::Result<(T, Self)> {
        let mut places = undisturbed();
        let made = make()?;
        places.push(made.as_ref().to_owned());
        let known = Self(made.as_ref().to_owned());
        Ok((made, known))
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        undisturbed().retain(|place| *place != self.0);
    }
}

/// Nothing is removed by [`discard`] while this is held, as while files get their final names.
pub(super) fn undisturbed() -> MutexGuard<'static, Vec<PathBuf>> {
    PLACES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes all that is unfinished. Until what is returned is dropped, nothing gets its final name.
pub fn discard() -> impl Sized {
    let mut places = undisturbed();
    for place in places.drain(..) {
        remove(&place);
    }
    places
}

/// Removes a file, or a directory even while another thread writes into it.
fn remove(place: &Path) {
    for _ in 0..ATTEMPTS {
        let removed = match place.symlink_metadata() {
            Ok(found) if found.is_dir() => std::fs::remove_dir_all(place),
            Ok(_) => std::fs::remove_file(place),
            Err(_) => return,
        };
        if removed.is_ok() {
            return;
        }
    }
}
