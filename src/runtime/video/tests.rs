use super::*;

#[test]
fn steps_are_those_of_numpy() {
    // np.linspace(0, n - 1, 8, dtype=int)
    let cases = [
        (1, [0; 8]),
        (3, [0, 0, 0, 0, 1, 1, 1, 2]),
        (8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (20, [0, 2, 5, 8, 10, 13, 16, 19]),
        (29, [0, 4, 8, 12, 16, 20, 24, 28]),
        (300, [0, 42, 85, 128, 170, 213, 256, 299]),
    ];
    for (total, want) in cases {
        assert_eq!(even_steps(total, 8), want, "{total} frames");
    }
    assert_eq!(even_steps(0, 8), Vec::<usize>::new());
    assert_eq!(even_steps(9, 1), [0]);
}

/// Eight frames at even steps.
fn eight(total: usize, _: Option<f64>) -> Vec<usize> {
    even_steps(total, 8)
}

fn ball() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/video_llava/images/ball.gif")
}

/// CRC-32 of the bytes of each frame.
fn sums(frames: &[Pixels]) -> Vec<u64> {
    let sum = |frame: &Pixels| {
        let mut crc = flate2::Crc::new();
        crc.update(frame.rgb());
        u64::from(crc.sum())
    };
    frames.iter().map(sum).collect()
}

/// What Pillow decodes (`models/video_llava/record_goldens.py`).
fn recorded() -> Vec<u64> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/video_llava/goldens/clip.json");
    let text = std::fs::read_to_string(path).unwrap();
    let golden: serde_json::Value = serde_json::from_str(&text).unwrap();
    let list = golden["crc32"].as_array().unwrap();
    list.iter().map(|n| n.as_u64().unwrap()).collect()
}

/// Writes the frames of the clip that ships into a folder, `name(i)` each.
fn unfold(to: &Path, name: impl Fn(usize) -> String) {
    let file = BufReader::new(File::open(ball()).unwrap());
    let frames = GifDecoder::new(file).unwrap().into_frames();
    for (index, frame) in frames.enumerate() {
        let frame = frame.unwrap().into_buffer();
        frame.save(to.join(name(index))).unwrap();
    }
}

#[test]
fn frames_of_a_gif_are_pillows() {
    assert_eq!(sums(&sample(ball(), 8).unwrap()), recorded());
    // What Pillow says of the frames' durations, 20 times 100 ms.
    let seconds = take(ball(), &eight).unwrap().seconds.unwrap();
    assert!((seconds - 2.0).abs() < 1e-9, "{seconds}");
}

#[test]
fn a_folder_is_sorted_and_other_files_are_passed_over() {
    let place = tempfile::tempdir().unwrap();
    unfold(place.path(), |i| format!("{i:03}.PNG"));
    std::fs::write(place.path().join("notes.txt"), "no frame").unwrap();
    assert_eq!(sums(&sample(place.path(), 8).unwrap()), recorded());
    // As people number them: 10 comes behind 9.
    let numbered = tempfile::tempdir().unwrap();
    unfold(numbered.path(), |i| format!("frame {}.png", i + 1));
    assert_eq!(sums(&sample(numbered.path(), 8).unwrap()), recorded());
    let mut names = [
        "b2",
        "a10b1",
        "a9",
        "a09",
        "a",
        "a10",
        "18446744073709551617",
    ];
    names.sort_by_key(|name| in_order(name));
    assert_eq!(
        names,
        [
            "18446744073709551617",
            "a",
            "a09",
            "a9",
            "a10",
            "a10b1",
            "b2"
        ]
    );
    // Fewer frames than wanted: some are seen twice.
    let two = tempfile::tempdir().unwrap();
    for name in ["000.PNG", "001.PNG"] {
        std::fs::copy(place.path().join(name), two.path().join(name)).unwrap();
    }
    let found = sums(&sample(two.path(), 8).unwrap());
    assert_eq!(found.len(), 8);
    assert!(found[..7].iter().all(|s| *s == found[0]) && found[7] != found[0]);
}

#[test]
fn what_is_no_clip_is_refused() {
    let place = tempfile::tempdir().unwrap();
    let refused = |path: &Path| sample(path, 8).unwrap_err().to_string();
    assert!(refused(place.path()).contains("holds no frames"));
    let file = place.path().join("clip.gif");
    for (bytes, why) in [(&b"GIF"[..], "no video"), (b"GIF89a but then nothing", "")] {
        std::fs::write(&file, bytes).unwrap();
        let said = refused(&file);
        assert!(said.contains("clip.gif") && said.contains(why), "{said}");
    }
    // A copy that was cut off.
    let all = std::fs::read(ball()).unwrap();
    std::fs::write(&file, &all[..all.len() / 2]).unwrap();
    assert!(refused(&file).contains("damaged or not complete"));
    assert!(refused(&place.path().join("none.mp4")).contains("none.mp4"));
    std::fs::write(&file, "neither a GIF nor a folder").unwrap();
    let said = video(OsStr::new("no-such-ffmpeg"), &file, &eight).unwrap_err();
    assert!(said.to_string().contains("install ffmpeg"), "{said}");
}

/// A program that takes the options that ffmpeg is given and answers from a folder of frames.
#[cfg(unix)]
fn stand_in(place: &Path, mode: &str) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let script = format!(
        r#"#!/bin/sh
case "$*" in *"{mode} passthrough"*) ;; *) echo "Unrecognized option 'fps_mode'." >&2; exit 1;; esac
case "$*" in *"-f null -"*) echo frame=7; echo frame=20; echo out_time_us=2000000; echo progress=end; exit 0;; esac
for last; do :; done
count=0
for n in $(echo "$*" | grep -o 'n\\,[0-9]*' | cut -d, -f2); do
  count=$((count + 1))
  cp "{0}/$n.png" "$(dirname "$last")/$(printf %06d $count).png"
done
"#,
        place.display()
    );
    let draft = place.join("draft.sh");
    std::fs::write(&draft, script).unwrap();
    std::fs::set_permissions(&draft, std::fs::Permissions::from_mode(0o755)).unwrap();
    // A file that a process of another thread may still hold open for writing does not start.
    let file = place.join("ffmpeg");
    let _ = std::fs::remove_file(&file);
    let copied = Command::new("cp").arg(&draft).arg(&file).status().unwrap();
    assert!(copied.success());
    file
}

#[cfg(unix)]
#[test]
fn other_files_go_through_ffmpeg() {
    let place = tempfile::tempdir().unwrap();
    unfold(place.path(), |i| format!("{i}.png"));
    let clip = place.path().join("clip.mp4");
    std::fs::write(&clip, "what only the program can read").unwrap();
    for mode in ["-fps_mode", "-vsync"] {
        let program = stand_in(place.path(), mode);
        let found = video(program.as_os_str(), &clip, &eight).unwrap();
        assert_eq!(sums(&found.frames), recorded(), "{mode}");
        assert_eq!(found.seconds, Some(2.0), "{mode}");
    }
    std::fs::remove_file(place.path().join("13.png")).unwrap();
    let program = stand_in(place.path(), "-fps_mode");
    let said = video(program.as_os_str(), &clip, &eight)
        .unwrap_err()
        .to_string();
    assert!(said.contains("wrote 7 frames, expected 8"), "{said}");
}
