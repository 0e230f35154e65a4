use super::*;
use std::fs;

fn file_name(version: &str) -> String {
    if cfg!(windows) {
        "onnxruntime.dll".into()
    } else if cfg!(target_os = "macos") {
        format!("libonnxruntime{version}.dylib")
    } else {
        format!("libonnxruntime.so{version}")
    }
}

fn put(dir: &Path, version: &str) -> PathBuf {
    fs::create_dir_all(dir).unwrap();
    let path = dir.join(file_name(version));
    fs::write(&path, b"not a library").unwrap();
    path
}

fn capi(root: &Path) -> PathBuf {
    if cfg!(windows) {
        root.join("Lib/site-packages/onnxruntime/capi")
    } else {
        root.join("lib/python3.11/site-packages/onnxruntime/capi")
    }
}

#[test]
fn places_are_searched_in_order() {
    let temp = tempfile::tempdir().unwrap();
    let root = temp.path();
    let mut expected = vec![
        (Origin::Executable, put(&root.join("bin"), "")),
        (
            Origin::VirtualEnv,
            put(&capi(&root.join("venv")), ".1.30.0"),
        ),
        (Origin::Conda, put(&capi(&root.join("conda")), ".1.30.0")),
        (
            Origin::DotVenv,
            put(&capi(&root.join("here/.venv")), ".1.30.0"),
        ),
        (
            Origin::Installed,
            put(&install::target(&root.join("cache")), ".1.31.1"),
        ),
        (Origin::System, put(&root.join("sys"), ".1.25.0")),
    ];
    let places = Places {
        variable: None,
        executable_dir: Some(root.join("bin")),
        virtual_env: Some(root.join("venv")),
        conda: Some(root.join("conda")),
        current_dir: Some(root.join("here")),
        pythons: vec!["duet-no-such-python".into()],
        cache: Some(root.join("cache")),
        system: vec![root.join("sys")],
    };
    while !expected.is_empty() {
        let (origin, path) = expected.remove(0);
        let found = places.find().unwrap();
        assert_eq!(
            (found.origin, found.path.as_path()),
            (origin, path.as_path())
        );
        fs::remove_file(path).unwrap();
    }
    let error = places.find().unwrap_err().to_string();
    for part in [
        "pip install onnxruntime",
        "duet runtime install",
        "ORT_DYLIB_PATH",
    ] {
        assert!(error.contains(part), "{error}");
    }
    for place in [
        "bin",
        "venv",
        "conda",
        ".venv",
        "duet-no-such-python",
        "cache",
        "sys",
    ] {
        assert!(error.contains(place), "{place} is not named in {error}");
    }
}

#[test]
fn a_variable_that_names_nothing_is_an_error() {
    let temp = tempfile::tempdir().unwrap();
    put(&temp.path().join("sys"), "");
    let places = Places {
        variable: Some(temp.path().join("gone")),
        system: vec![temp.path().join("sys")],
        ..Places::default()
    };
    let error = places.find().unwrap_err().to_string();
    assert!(error.contains("gone"), "{error}");

    // A directory is as good as the file in it.
    let dir = temp.path().join("given");
    let path = put(&dir, "");
    let places = Places {
        variable: Some(dir),
        ..Places::default()
    };
    assert_eq!(
        places.find().unwrap(),
        Library {
            path,
            origin: Origin::Variable
        }
    );
}

#[cfg(not(windows))]
#[test]
fn the_newest_wins_and_the_too_old_is_named() {
    let temp = tempfile::tempdir().unwrap();
    put(temp.path(), ".1.24.0");
    let new = put(temp.path(), ".1.31.1");
    put(temp.path(), ".1.9.0");
    fs::write(temp.path().join("libonnxruntime_providers_shared.so"), b"").unwrap();
    let places = Places {
        system: vec![temp.path().to_path_buf()],
        ..Places::default()
    };
    assert_eq!(places.find().unwrap().path, new);

    let temp = tempfile::tempdir().unwrap();
    put(temp.path(), ".1.9.0");
    let places = Places {
        system: vec![temp.path().to_path_buf()],
        ..Places::default()
    };
    let error = places.find().unwrap_err().to_string();
    assert!(error.contains("older than"), "{error}");
}

#[cfg(target_os = "linux")]
#[test]
fn file_names() {
    assert_eq!(library_version("libonnxruntime.so"), Some(Version(vec![])));
    assert_eq!(
        library_version("libonnxruntime.so.1"),
        Some(Version(vec![1]))
    );
    assert_eq!(
        library_version("libonnxruntime.so.1.31.1"),
        Some(Version(vec![1, 31, 1]))
    );
    assert_eq!(library_version("libonnxruntime.so.bak"), None);
    assert_eq!(library_version("libonnxruntime_providers_shared.so"), None);
    assert!(!Version(vec![1]).is_too_old());
}

#[test]
fn a_loaded_library_stays() {
    let temp = tempfile::tempdir().unwrap();
    let path = put(temp.path(), "");
    ensure(&mut |_| ()).unwrap();
    let runtime = Runtime::load(Library {
        path: path.clone(),
        origin: Origin::Given,
    })
    .unwrap();
    assert_ne!(runtime.library().path, path);
    assert!(
        runtime.build_info().contains("git-commit-id"),
        "{}",
        runtime.build_info()
    );
}

/// Loading is once for a process, so the failing load has a process of its own: this test binary again,
/// running [`child_loads_what_it_is_told`] alone.
#[test]
fn a_file_that_is_no_library_is_an_error_and_a_later_load_works() {
    let temp = tempfile::tempdir().unwrap();
    let path = put(temp.path(), "");
    let good = &ensure(&mut |_| ()).unwrap().library().path;
    let child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "runtime::library::tests::child_loads_what_it_is_told",
        ])
        .env("DUET_TEST_BAD_LIBRARY", &path)
        .env("DUET_TEST_GOOD_LIBRARY", good)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stdout);
    assert!(
        child.status.success() && said.contains("1 passed"),
        "{said}"
    );
}

#[test]
fn child_loads_what_it_is_told() {
    let var = |name| std::env::var_os(name).map(PathBuf::from);
    let (Some(bad), Some(good)) = (var("DUET_TEST_BAD_LIBRARY"), var("DUET_TEST_GOOD_LIBRARY"))
    else {
        return;
    };
    let load = |path| {
        Runtime::load(Library {
            path,
            origin: Origin::Given,
        })
    };
    let error = load(bad.clone()).unwrap_err().to_string();
    assert!(error.contains(&*bad.to_string_lossy()), "{error}");
    assert!(
        error.contains("1.22") && error.contains("duet runtime install"),
        "{error}"
    );
    assert_eq!(load(good.clone()).unwrap().library().path, good);
}
