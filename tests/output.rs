//! Writing to disk: all of it or nothing, and nothing that exists is changed.

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Barrier;

use common::*;
use duet_onnx::ir::Model;
use duet_onnx::onnx::{
    DataMode, ModelDir, OnnxError, Outputs, Serialized, read, serialize, write_beside, write_out,
};

/// A temporary directory with `model/` in it:
/// ```text
/// config.json
/// onnx/decoder.onnx  → decoder.data
/// onnx/decoder.data
/// onnx/vision.onnx
/// extra/deep/notes.txt
/// ```
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("model");
        fs::create_dir_all(root.join("onnx")).unwrap();
        fs::create_dir_all(root.join("extra/deep")).unwrap();
        fs::write(root.join("config.json"), "{}").unwrap();
        fs::write(root.join("extra/deep/notes.txt"), "notes").unwrap();
        fs::write(root.join("onnx/decoder.data"), [7; 64]).unwrap();
        let mut decoder = nested();
        let far = external(
            "far",
            &[4],
            &[("location", "decoder.data"), ("length", "16")],
        );
        decoder.graph.as_mut().unwrap().initializer.push(far);
        fs::write(root.join("onnx/decoder.onnx"), encode(&decoder)).unwrap();
        fs::write(root.join("onnx/vision.onnx"), encode(&nested())).unwrap();
        Self { dir }
    }

    fn path(&self, relative: &str) -> PathBuf {
        self.dir.path().join(relative)
    }

    fn model(&self) -> ModelDir {
        ModelDir::open(&self.path("model")).unwrap()
    }

    /// What the rewrite of the decoder would write.
    fn outputs(&self) -> Outputs {
        Outputs {
            models: vec![("onnx/decoder.onnx".into(), self.changed())],
            configs: vec![("config.json".into(), b"{\"new\": true}".to_vec())],
            data: BTreeSet::from(["onnx/decoder.data".into()]),
            ..Default::default()
        }
    }

    fn changed(&self) -> Serialized {
        changed(&read(&self.path("model/onnx/decoder.onnx")).unwrap())
    }

    /// Files directly in the temporary directory.
    fn beside(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir.path()).unwrap();
        let mut names: Vec<String> = entries
            .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    /// Runs what has to fail and leave everything as it was.
    #[track_caller]
    fn fails(&self, variant: &str, fragment: &str, run: impl FnOnce() -> Result<(), OnnxError>) {
        let before = snapshot(self.dir.path());
        let error = run().expect_err(fragment);
        let message = error.to_string();
        assert_eq!(kind(&error), variant, "{message}");
        assert!(
            message.contains(fragment),
            "'{fragment}' is not in: {message}"
        );
        let after = snapshot(self.dir.path());
        let paths = |s: &std::collections::BTreeMap<PathBuf, Vec<u8>>| {
            s.keys().cloned().collect::<Vec<_>>()
        };
        assert_eq!(paths(&after), paths(&before), "something was left behind");
        assert!(after == before, "a file was changed");
    }
}

fn changed(model: &Model) -> Serialized {
    let after = patched(model, |p| p.metadata("duet.test", "value"));
    serialize(duet_onnx::ir::verify(&after).unwrap())
}

fn out(place: &Place, target: &Path) -> Result<(), OnnxError> {
    write_out(&place.model(), &place.outputs(), target, DataMode::Copy)
}

#[test]
fn a_new_directory_holds_the_outputs_and_everything_else() {
    let place = Place::new();
    let source = snapshot(&place.path("model"));
    out(&place, &place.path("new")).unwrap();
    let written = snapshot(&place.path("new"));
    assert_eq!(
        written.keys().collect::<Vec<_>>(),
        source.keys().collect::<Vec<_>>()
    );
    let changed = [Path::new("config.json"), Path::new("onnx/decoder.onnx")];
    for (path, contents) in &written {
        let same = contents == &source[path];
        assert_eq!(
            same,
            !changed.contains(&path.as_path()),
            "{}",
            path.display()
        );
    }
    assert_eq!(written[Path::new("config.json")], b"{\"new\": true}");
    assert!(written[Path::new("onnx/decoder.onnx")] == place.changed().to_vec());
    // It is a model of its own: the data came along.
    let model = read(&place.path("new/onnx/decoder.onnx")).unwrap();
    let tensor = model
        .value(find(&model, "far"))
        .initializer
        .as_ref()
        .unwrap();
    assert_eq!(
        tensor.bytes(model.external()).unwrap(),
        [7u8; 16].as_slice()
    );
    assert!(
        snapshot(&place.path("model")) == source,
        "the source was changed"
    );
    assert_eq!(
        place.beside(),
        ["model", "new"],
        "no temporary directory is left"
    );
}

#[test]
fn new_files_that_the_source_does_not_have_are_written_too() {
    let place = Place::new();
    let mut outputs = place.outputs();
    outputs
        .configs
        .push(("fresh/deeper/more.json".into(), b"[]".to_vec()));
    write_out(&place.model(), &outputs, &place.path("new"), DataMode::Copy).unwrap();
    assert_eq!(
        fs::read(place.path("new/fresh/deeper/more.json")).unwrap(),
        b"[]"
    );
}

#[test]
fn a_single_file_takes_its_data_along_and_nothing_else() {
    let place = Place::new();
    let source = ModelDir::open(&place.path("model/onnx/decoder.onnx")).unwrap();
    let outputs = Outputs {
        models: vec![("decoder.onnx".into(), place.changed())],
        data: BTreeSet::from(["decoder.data".into()]),
        ..Default::default()
    };
    // Beside the file itself is a fine place.
    write_out(
        &source,
        &outputs,
        &place.path("model/onnx/new"),
        DataMode::Copy,
    )
    .unwrap();
    let written = snapshot(&place.path("model/onnx/new"));
    let names: Vec<&Path> = written.keys().map(PathBuf::as_path).collect();
    assert_eq!(
        names,
        [Path::new("decoder.data"), Path::new("decoder.onnx")]
    );
    assert_eq!(written[Path::new("decoder.data")], [7; 64]);
}

#[cfg(unix)]
#[test]
fn hard_links_are_made_on_request_and_of_data_only() {
    use std::os::unix::fs::MetadataExt;
    let place = Place::new();
    let inode = |path: &str| fs::metadata(place.path(path)).unwrap().ino();
    out(&place, &place.path("copied")).unwrap();
    write_out(
        &place.model(),
        &place.outputs(),
        &place.path("linked"),
        DataMode::Hardlink,
    )
    .unwrap();
    assert_ne!(
        inode("copied/onnx/decoder.data"),
        inode("model/onnx/decoder.data")
    );
    assert_eq!(
        inode("linked/onnx/decoder.data"),
        inode("model/onnx/decoder.data")
    );
    for other in ["onnx/vision.onnx", "extra/deep/notes.txt"] {
        assert_ne!(
            inode(&format!("linked/{other}")),
            inode(&format!("model/{other}")),
            "{other}"
        );
    }
}

#[cfg(unix)]
#[test]
fn linked_files_are_carried_over_as_files() {
    // A download cache: every file is a link to a blob elsewhere.
    let place = Place::new();
    fs::create_dir(place.path("blobs")).unwrap();
    for file in ["onnx/decoder.data", "extra/deep/notes.txt"] {
        let (real, link) = (
            place.path("blobs").join(file.replace('/', "-")),
            place.path("model").join(file),
        );
        fs::rename(&link, &real).unwrap();
        let up = "../".repeat(file.matches('/').count() + 1);
        let target = Path::new(&up).join("blobs").join(file.replace('/', "-"));
        std::os::unix::fs::symlink(target, &link).unwrap();
        assert!(link.is_file());
    }
    let source = place.model();
    for (name, mode) in [("copied", DataMode::Copy), ("linked", DataMode::Hardlink)] {
        let outputs = Outputs {
            configs: vec![("config.json".into(), b"{}".to_vec())],
            data: BTreeSet::from(["onnx/decoder.data".into()]),
            ..Default::default()
        };
        write_out(&source, &outputs, &place.path(name), mode).unwrap();
        for (file, contents) in [
            ("onnx/decoder.data", &[7; 64][..]),
            ("extra/deep/notes.txt", b"notes"),
        ] {
            let path = place.path(name).join(file);
            assert!(!path.is_symlink(), "{}", path.display());
            assert_eq!(fs::read(&path).unwrap(), contents, "{}", path.display());
        }
    }
}

#[test]
fn a_target_that_exists_is_refused_whatever_it_is() {
    let place = Place::new();
    fs::create_dir(place.path("empty")).unwrap();
    fs::write(place.path("file"), "mine").unwrap();
    #[allow(unused_mut, reason = "links are made on Unix only")]
    let mut targets = vec!["empty", "file", "model"];
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("nowhere", place.path("dangling")).unwrap();
        targets.push("dangling");
    }
    for target in targets {
        let path = place.path(target);
        place.fails("Exists", "exists already; nothing was written", || {
            out(&place, &path)
        });
    }
}

#[test]
fn a_target_without_a_parent_or_a_name_is_refused() {
    let place = Place::new();
    let lost = place.path("no/such/parent");
    place.fails("Directory", "does not exist; create it first", || {
        out(&place, &lost)
    });
    let under_a_file = place.path("model/config.json/new");
    place.fails("Directory", "does not exist", || out(&place, &under_a_file));
    let nameless = place.path("missing/..");
    place.fails("Directory", "expected the name of a new directory", || {
        out(&place, &nameless)
    });
}

#[test]
fn a_target_inside_the_source_is_refused() {
    let place = Place::new();
    for inside in ["model/new", "model/onnx/new", "model/extra/../new"] {
        let target = place.path(inside);
        place.fails("Directory", "it lies inside the model directory", || {
            out(&place, &target)
        });
    }
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("model/onnx", place.path("way")).unwrap();
        let target = place.path("way/new");
        place.fails("Directory", "it lies inside the model directory", || {
            out(&place, &target)
        });
    }
    // A name that merely begins alike is outside.
    out(&place, &place.path("model-192")).unwrap();
}

#[test]
fn data_inside_a_model_that_is_written_anew_is_refused() {
    let place = Place::new();
    let mut outputs = place.outputs();
    outputs.data.insert("onnx/decoder.onnx".into());
    let new = place.path("new");
    place.fails("Directory", "lies in this model file", || {
        write_out(&place.model(), &outputs, &new, DataMode::Copy)
    });
    // Beside it the old file stays where it is.
    write_beside(&place.model(), &outputs, "new").unwrap();
}

#[cfg(unix)]
#[test]
fn what_cannot_be_carried_over_is_refused_by_name() {
    use std::os::unix::fs::symlink;
    for (name, target) in [("broken", "nowhere"), ("folder", "extra")] {
        let place = Place::new();
        symlink(target, place.path("model").join(name)).unwrap();
        let new = place.path("new");
        place.fails(
            "Directory",
            &format!("model/{name}: is neither a file"),
            || out(&place, &new),
        );
    }
    let place = Place::new();
    let socket = std::os::unix::net::UnixListener::bind(place.path("model/socket")).unwrap();
    let new = place.path("new");
    place.fails("Directory", "model/socket: is neither a file", || {
        out(&place, &new)
    });
    drop(socket);
}

#[test]
fn nothing_is_left_behind_when_a_write_fails_half_way() {
    let place = Place::new();
    let new = place.path("new");
    // A directory where a file has to go, after other files were written.
    let mut outputs = place.outputs();
    outputs
        .configs
        .push(("onnx".into(), b"no directory".to_vec()));
    place.fails("Io", "onnx", || {
        write_out(&place.model(), &outputs, &new, DataMode::Copy)
    });
    let mut outputs = place.outputs();
    outputs
        .models
        .push(("config.json/inner.onnx".into(), place.changed()));
    outputs.configs.clear();
    place.fails("Io", "config.json", || {
        write_out(&place.model(), &outputs, &new, DataMode::Copy)
    });
    // Data that is gone by the time it is copied.
    let source = ModelDir::open(&place.path("model/onnx/vision.onnx")).unwrap();
    let mut outputs = Outputs {
        data: BTreeSet::from(["gone.data".into()]),
        ..Default::default()
    };
    outputs.models.push(("vision.onnx".into(), place.changed()));
    for mode in [DataMode::Copy, DataMode::Hardlink] {
        place.fails("Io", "gone.data", || {
            write_out(&source, &outputs, &new, mode)
        });
    }
}

/// A model with one inline weight of `bytes` bytes, in a file full of holes.
#[cfg(target_os = "linux")]
fn sparse_model(path: &Path, bytes: u64) {
    use std::io::Write;
    let weight = duet_onnx::proto::TensorProto {
        data_type: Some(2),
        dims: vec![i64::try_from(bytes).unwrap()],
        name: Some("w".into()),
        ..Default::default()
    };
    let head = |number: u64, length: u64| {
        let mut out = Vec::new();
        prost::encoding::encode_varint(number << 3 | 2, &mut out);
        prost::encoding::encode_varint(length, &mut out);
        out
    };
    // Fields in front of the data, from the inside out.
    let raw = head(9, bytes);
    let tensor = [prost::Message::encode_to_vec(&weight), raw].concat();
    let in_graph = [head(5, tensor.len() as u64 + bytes), tensor].concat();
    let small = contents(&encode(&nested()), 7).pop().unwrap();
    let graph = [small, in_graph].concat();
    let in_model = [head(7, graph.len() as u64 + bytes), graph].concat();
    let rest = walk(&encode(&nested()))
        .into_iter()
        .filter(|f| f.number != 7);
    let file = [rest.flat_map(|f| f.whole).collect(), in_model].concat();
    let mut out = fs::File::create(path).unwrap();
    out.write_all(&file).unwrap();
    out.set_len(file.len() as u64 + bytes).unwrap();
}

#[cfg(target_os = "linux")]
#[test]
fn more_than_two_gibibytes_inline_are_refused_before_they_are_written() {
    let place = Place::new();
    // Elsewhere, because comparing directories would read the holes.
    let elsewhere = tempfile::tempdir().unwrap();
    let huge = elsewhere.path().join("huge.onnx");
    sparse_model(&huge, (1 << 31) + 5);
    let model = read(&huge).unwrap();
    let weight = model.value(find(&model, "w")).initializer.as_ref().unwrap();
    assert_eq!(weight.bytes(model.external()).unwrap().len(), (1 << 31) + 5);
    let outputs = || Outputs {
        models: vec![("onnx/decoder.onnx".into(), changed(&model))],
        ..Default::default()
    };
    let new = place.path("new");
    let told = "more than the 2 GiB that protobuf allows; export it with external data";
    place.fails("Directory", told, || {
        write_out(&place.model(), &outputs(), &new, DataMode::Copy)
    });
    place.fails("Directory", told, || {
        write_beside(&place.model(), &outputs(), "x").map(|_| ())
    });
}

#[cfg(unix)]
#[test]
fn new_files_have_the_usual_permissions() {
    use std::os::unix::fs::PermissionsExt;
    let place = Place::new();
    // What this process's umask makes of a new file and directory.
    fs::write(place.path("plain"), "").unwrap();
    fs::create_dir(place.path("folder")).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    let (file, folder) = (mode(&place.path("plain")), mode(&place.path("folder")));
    out(&place, &place.path("new")).unwrap();
    for path in ["new", "new/onnx", "new/extra/deep"] {
        assert_eq!(mode(&place.path(path)), folder, "{path}");
    }
    for path in ["new/onnx/decoder.onnx", "new/config.json"] {
        assert_eq!(mode(&place.path(path)), file, "{path}");
    }
    for path in write_beside(&place.model(), &place.outputs(), "new").unwrap() {
        assert_eq!(mode(&path), file, "{}", path.display());
    }
}

// ---- beside ----

#[test]
fn beside_writes_suffixed_files_and_touches_no_old_one() {
    let place = Place::new();
    let stamp = |relative: &Path| {
        fs::metadata(place.path("model").join(relative))
            .unwrap()
            .modified()
            .unwrap()
    };
    let before = snapshot(&place.path("model"));
    let times: Vec<_> = before
        .keys()
        .filter(|p| place.path("model").join(p).is_file())
        .map(|p| (p.clone(), stamp(p)))
        .collect();
    // Were an old file written again, its time would differ.
    std::thread::sleep(std::time::Duration::from_millis(20));
    let written = write_beside(&place.model(), &place.outputs(), "duet-192").unwrap();
    let expected = ["onnx/decoder_duet-192.onnx", "config_duet-192.json"];
    assert_eq!(written, expected.map(|p| place.path("model").join(p)));
    let mut after = snapshot(&place.path("model"));
    assert!(after.remove(Path::new(expected[0])).unwrap() == place.changed().to_vec());
    assert_eq!(
        after.remove(Path::new(expected[1])).unwrap(),
        b"{\"new\": true}"
    );
    assert!(
        after == before,
        "an old file was changed, or something else was written"
    );
    for (path, time) in times {
        assert_eq!(stamp(&path), time, "{}", path.display());
    }
    // It reads the same data file.
    let model = read(&place.path("model/onnx/decoder_duet-192.onnx")).unwrap();
    let tensor = model
        .value(find(&model, "far"))
        .initializer
        .as_ref()
        .unwrap();
    assert_eq!(
        tensor.bytes(model.external()).unwrap(),
        [7u8; 16].as_slice()
    );
}

#[test]
fn beside_refuses_an_existing_target_and_writes_nothing() {
    for existing in ["onnx/decoder_new.onnx", "config_new.json"] {
        let place = Place::new();
        fs::write(place.path("model").join(existing), "mine").unwrap();
        place.fails("Exists", existing, || {
            write_beside(&place.model(), &place.outputs(), "new").map(|_| ())
        });
    }
}

#[test]
fn beside_refuses_suffixes_that_are_no_part_of_a_file_name() {
    let place = Place::new();
    for suffix in [
        "", "a/b", "..", "../x", "a..b", "a b", "a\\b", "ü", "a\0b", "*",
    ] {
        place.fails("Directory", "is no file-name suffix", || {
            write_beside(&place.model(), &place.outputs(), suffix).map(|_| ())
        });
    }
    assert!(write_beside(&place.model(), &place.outputs(), "v1.2_a-b").is_ok());
}

#[test]
fn beside_leaves_nothing_when_a_write_fails_half_way() {
    let place = Place::new();
    let mut outputs = place.outputs();
    outputs
        .configs
        .push(("nowhere/more.json".into(), b"{}".to_vec()));
    place.fails("Io", "nowhere", || {
        write_beside(&place.model(), &outputs, "new").map(|_| ())
    });
    // The same target twice: the second finds the first.
    let mut outputs = place.outputs();
    outputs.configs.push(("config.json".into(), b"[]".to_vec()));
    place.fails("Exists", "config_new.json", || {
        write_beside(&place.model(), &outputs, "new").map(|_| ())
    });
}

// ---- several at once ----

/// Runs `count` writers at the same moment: how many succeeded; the others have
/// to find that the target exists.
fn race(count: usize, write: impl Fn(usize) -> Result<(), OnnxError> + Sync) -> usize {
    let barrier = Barrier::new(count);
    let (write, barrier) = (&write, &barrier);
    let results: Vec<_> = std::thread::scope(|scope| {
        let start = |i| {
            scope.spawn(move || {
                barrier.wait();
                write(i)
            })
        };
        let all: Vec<_> = (0..count).map(start).collect();
        all.into_iter().map(|t| t.join().unwrap()).collect()
    });
    for result in &results {
        if let Err(error) = result {
            assert_eq!(kind(error), "Exists", "{error}");
        }
    }
    results.iter().filter(|r| r.is_ok()).count()
}

#[test]
fn of_several_writers_of_one_directory_exactly_one_wins() {
    for _ in 0..5 {
        let place = Place::new();
        let winners = race(8, |i| {
            let mut outputs = place.outputs();
            for at in 0..20 {
                outputs
                    .configs
                    .push((format!("part{at}").into(), i.to_string().into_bytes()));
            }
            write_out(&place.model(), &outputs, &place.path("new"), DataMode::Copy)
        });
        assert_eq!(winners, 1);
        // All of it is the winner's.
        let parts: BTreeSet<Vec<u8>> = (0..20)
            .map(|at| fs::read(place.path(&format!("new/part{at}"))).unwrap())
            .collect();
        assert_eq!(parts.len(), 1);
        assert_eq!(place.beside(), ["model", "new"]);
    }
}

#[test]
fn of_several_writers_beside_exactly_one_wins() {
    for _ in 0..5 {
        let place = Place::new();
        let before = snapshot(&place.path("model")).len();
        let winners = race(8, |i| {
            let mut outputs = place.outputs();
            outputs.configs[0].1 = i.to_string().into_bytes();
            outputs
                .configs
                .push(("extra/deep/notes.txt".into(), i.to_string().into_bytes()));
            write_beside(&place.model(), &outputs, "new").map(|_| ())
        });
        assert_eq!(winners, 1);
        let one = fs::read(place.path("model/config_new.json")).unwrap();
        assert_eq!(
            one,
            fs::read(place.path("model/extra/deep/notes_new.txt")).unwrap()
        );
        assert_eq!(snapshot(&place.path("model")).len(), before + 3);
    }
}
