//! Ends that come from outside: Ctrl-C in the middle of a rewrite, output that nobody takes.

#![cfg(unix)]

mod commands;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use commands::{BOTH, Place, part, text};

/// Files that are carried over, one by one, so that there is a middle.
const FILES: usize = 4000;

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).expect("a folder");
    let names = entries.map(|e| e.expect("an entry").file_name());
    let mut names: Vec<_> = names.map(|n| n.to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Starts a rewrite, asks it to end as soon as something is being written, and says whether it ended by that.
fn interrupted(place: &Place) -> bool {
    use std::os::unix::process::ExitStatusExt;
    let mut child = Command::new(env!("CARGO_BIN_EXE_duet"))
        .args(["rewrite", &place.at("model"), "--recipe"])
        .args([&place.at("recipe.yaml"), "--out", &place.at("new/out")])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the binary starts");
    let new = place.path("new");
    let started = Instant::now();
    while names(&new).is_empty() && child.try_wait().expect("a status").is_none() {
        assert!(started.elapsed() < Duration::from_secs(60), "it hangs");
    }
    let sent = Command::new("kill")
        .args(["-TERM", &child.id().to_string()])
        .stderr(Stdio::null())
        .status();
    sent.expect("kill");
    let status = child.wait().expect("a status");
    let left = names(&new);
    if status.success() {
        assert_eq!(left, ["out"], "it was too late");
        std::fs::remove_dir_all(new.join("out")).expect("removed");
        return false;
    }
    assert_eq!(status.signal(), Some(15), "{status}");
    assert_eq!(left, [""; 0]);
    true
}

#[test]
fn what_is_half_written_is_removed_when_the_program_is_interrupted() {
    let place = Place::new(BOTH);
    place.graphs("ts-sdpa-gqa", "model");
    for file in 0..FILES {
        place.write(&format!("model/extra/{file}.txt"), b"as it was");
    }
    std::fs::create_dir(place.path("new")).expect("made");
    // A machine may be so quick, or the test so slow, that all is done before. (The other signals are those that the
    // tests may have been started to ignore: by nohup, or in the background of a script.)
    let in_time = (0..20).any(|_| interrupted(&place));
    assert!(in_time, "it always came too late");
    let model = place.path("model");
    assert_eq!(names(&model), ["extra", "onnx"]);
    assert_eq!(names(&model.join("extra")).len(), FILES);
}

#[test]
fn a_signal_that_is_to_be_ignored_is() {
    let place = Place::new(BOTH);
    place.graphs("ts-sdpa-gqa", "model");
    let script = "trap '' HUP; \"$@\" & wait_for=$!; while kill -HUP $wait_for 2>/dev/null; do :; done; wait $wait_for";
    let out = place.at("out");
    let status = Command::new("sh")
        .args(["-c", script, "sh", env!("CARGO_BIN_EXE_duet"), "rewrite"])
        .args([text(&place.path("model")), "--recipe"])
        .args([&place.at("recipe.yaml"), "--out", &out])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .expect("sh");
    if cfg!(target_os = "linux") {
        assert!(status.success(), "{status}");
        assert!(Path::new(&out).is_dir());
    }
}

#[test]
fn what_cannot_be_printed_is_no_panic() {
    let file = part("ts-sdpa-gqa", "decoder_model_merged");
    let command = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_duet"));
        command.args(["inspect", text(&file)]);
        command
    };
    if cfg!(target_os = "linux") {
        let full = std::fs::File::options().write(true).open("/dev/full");
        let ran = command().stdout(full.expect("/dev/full")).output();
        let ran = ran.expect("the binary starts");
        let said = String::from_utf8_lossy(&ran.stderr).into_owned();
        assert_eq!(ran.status.code(), Some(2), "{said}");
        assert!(
            said.starts_with("error: writing to stdout: No space"),
            "{said}"
        );
    }
    let mut child = command()
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    // The reader goes before anything is said.
    drop(child.stdout.take());
    let ran = child.wait_with_output().expect("an end");
    assert!(ran.status.success(), "{:?}", ran.status);
    assert_eq!(String::from_utf8_lossy(&ran.stderr), "");
}
