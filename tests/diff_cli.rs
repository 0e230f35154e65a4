//! `duet diff` as people and pipelines use it: exit codes, messages, files, what
//! the manual shows, and what the GitHub action runs.

#[path = "diff_report/command.rs"]
mod command;
mod common;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use command::*;
use common::*;

#[test]
fn exit_codes_say_same_different_and_error() {
    let pair = Pair::new();
    let same = pair.diff(&[]);
    code(&same, 0);
    assert!(
        stdout(&same).contains("Identical: 2 files, the same bytes."),
        "{}",
        stdout(&same)
    );
    pair.write(
        "b/config.json",
        "{\n  \"hidden_size\": 64, \"image_size\": 336.0}",
    );
    let equal = pair.diff(&[]);
    code(&equal, 0);
    assert!(stdout(&equal).contains("Equal: "), "{}", stdout(&equal));
    pair.write(
        "b/config.json",
        "{\"image_size\": 448, \"hidden_size\": 64}",
    );
    pair.write(
        "b/onnx/model.onnx",
        encode(&simple("other", &[1.0, 2.0, 3.0, 4.5])),
    );
    let different = pair.diff(&[]);
    code(&different, 1);
    let text = stdout(&different);
    for line in [
        "Different: 1 weight, 1 config and 1 metadata changes in 2 of 2 files.",
        "'image_size': 336 → 448",
        "producer: pytorch → other",
    ] {
        assert!(text.contains(line), "'{line}' is not in:\n{text}");
    }
    assert_eq!(stderr(&different), "", "the result is on stdout only");
    code(&duet(&["diff", "nowhere", "nowhere"]), 2);
}

#[test]
fn ignored_classes_kinds_and_tolerances() {
    let pair = Pair::new();
    pair.write(
        "b/onnx/model.onnx",
        encode(&simple("other", &[1.0, 2.0, 3.0, 4.0001])),
    );
    code(&pair.diff(&[]), 1);
    code(&pair.diff(&["--ignore", "metadata"]), 1);
    let both = pair.diff(&["--ignore", "weights,producer"]);
    code(&both, 0);
    assert!(
        stdout(&both).contains("2 changes are not counted."),
        "{}",
        stdout(&both)
    );
    code(&pair.diff(&["--ignore", "metadata", "--atol", "0.001"]), 0);
    code(&pair.diff(&["--ignore", "metadata", "--rtol", "1e-4"]), 0);
    code(&pair.diff(&["--ignore", "metadata", "--rtol", "1e-6"]), 1);
    code(&pair.diff(&["--ignore", "all"]), 0);
    let typo = pair.diff(&["--ignore", "metdata"]);
    code(&typo, 2);
    assert!(
        stderr(&typo).contains("did you mean 'metadata'?"),
        "{}",
        stderr(&typo)
    );
    for bad in ["-1", "nan", "inf", "much"] {
        code(&pair.diff(&[&format!("--rtol={bad}")]), 2);
    }
}

#[test]
fn policies_decide_the_exit_code() {
    let pair = Pair::new();
    pair.write(
        "b/onnx/model.onnx",
        encode(&simple("other", &[1.0, 2.0, 3.0, 4.0001])),
    );
    let allowed = "version: 1\natol: 0.001\nrules: [{allow: producer}]\n";
    let policy = pair.write("allow.yaml", allowed);
    let output = pair.diff(&["--policy", &policy]);
    code(&output, 0);
    assert!(
        stdout(&output).contains("Allowed by "),
        "{}",
        stdout(&output)
    );
    // The command line overrides the file.
    let output = pair.diff(&["--policy", &policy, "--atol", "0"]);
    code(&output, 1);
    let text = stdout(&output);
    assert!(
        text.contains("Denied by ") && text.contains("✗ deny everything else"),
        "{text}"
    );
    let missing = pair.write(
        "missing.yaml",
        "version: 1\ndefault: allow\nrewrites: {token_merge: 1}",
    );
    let output = pair.diff(&["--policy", &missing, "--format", "junit"]);
    code(&output, 1);
    assert!(stdout(&output).contains("expected exactly once, it is not there"));
    let typo = pair.write("typo.yaml", "version: 1\nruls: []");
    let output = pair.diff(&["--policy", &typo]);
    code(&output, 2);
    let message = stderr(&output);
    assert!(
        message.contains("typo.yaml") && message.contains("did you mean 'rules'?"),
        "{message}"
    );
    assert_eq!(stdout(&output), "");
}

#[test]
fn bad_input_is_one_clear_message() {
    let pair = Pair::new();
    let good = pair
        .path("a/onnx/model.onnx")
        .to_str()
        .expect("UTF-8")
        .to_owned();
    let bytes = fs::read(&good).expect("the model");
    let cut = pair.write("cut.onnx", &bytes[..bytes.len() / 2]);
    let noise: Vec<u8> = (0..4096_u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let noise = pair.write("noise.onnx", noise);
    let bad_json = pair.write("bad.json", "{\"a\": ");
    let good_json = pair.write("good.json", "{\"a\": 1}");
    let deep = pair.write("deep.json", "[".repeat(100_000));
    let mut lost = simple("x", &W);
    let data = external("w", &[4], &[("location", "weights.bin"), ("length", "16")]);
    lost.graph.as_mut().expect("a graph").initializer = vec![data];
    let lost = pair.write("lost.onnx", encode(&lost));
    let mut outside = simple("x", &W);
    let data = external(
        "w",
        &[4],
        &[("location", "../../etc/passwd"), ("length", "16")],
    );
    outside.graph.as_mut().expect("a graph").initializer = vec![data];
    let outside = pair.write("outside.onnx", encode(&outside));
    let folder = pair.path("a").to_str().expect("UTF-8").to_owned();
    let missing = pair
        .path("missing.onnx")
        .to_str()
        .expect("UTF-8")
        .to_owned();
    let cases: &[(&str, &str, &str)] = &[
        (&good, &cut, "cut.onnx: not a valid ONNX file"),
        (&noise, &good, "noise.onnx: not a valid ONNX file"),
        (&good, &missing, "missing.onnx"),
        (&good, &folder, "is a directory"),
        (&good, &lost, "weights.bin"),
        (&good, &outside, "'..' is not allowed"),
        (&good, "/dev/zero", "/dev/zero"),
    ];
    // A config that is no JSON is another file, with the reason.
    for bad in [&bad_json, &deep] {
        let output = duet(&["diff", &good_json, bad]);
        code(&output, 1);
        let text = stdout(&output);
        assert!(text.contains("the new one is no JSON: "), "{text}");
    }
    for (a, b, expected) in cases {
        let output = duet(&["diff", a, b]);
        code(&output, 2);
        let message = stderr(&output);
        assert!(
            message.starts_with("error: ") && message.contains(expected),
            "{expected}: {message}"
        );
        assert_eq!(message.lines().count(), 1, "{message}");
        assert_eq!(stdout(&output), "");
    }
    let output = pair.diff(&["--output", "report.pdf"]);
    code(&output, 2);
    assert!(
        stderr(&output).contains("expected a file ending in .txt"),
        "{}",
        stderr(&output)
    );
    code(&pair.diff(&["--format", "xml"]), 2);
}

#[test]
fn one_run_writes_every_format() {
    let pair = Pair::new();
    pair.write(
        "b/config.json",
        "{\"image_size\": 448, \"hidden_size\": 64}",
    );
    let files = [
        "diff.txt",
        "diff.json",
        "diff.md",
        "diff.html",
        "diff.xml",
        "diff.sarif",
    ];
    let paths = files.map(|f| pair.path(f).to_str().expect("UTF-8").to_owned());
    let options: Vec<&str> = paths
        .iter()
        .flat_map(|p| ["--output", p.as_str()])
        .collect();
    let output = pair.diff(&options);
    code(&output, 1);
    assert!(stdout(&output).contains("'image_size': 336 → 448"));
    let read = |name: &str| fs::read_to_string(pair.path(name)).expect("written");
    for (file, expected) in [
        ("diff.txt", "~ 'image_size': 336 → 448"),
        ("diff.json", "\"schema_version\": 1"),
        ("diff.md", "! 'image_size': 336 → 448"),
        ("diff.html", "<!DOCTYPE html>"),
        ("diff.xml", "<testsuites "),
        ("diff.sarif", "\"version\": \"2.1.0\""),
    ] {
        assert!(read(file).contains(expected), "{file}");
    }
    // What goes to stdout is the same.
    for (format, file) in [
        ("json", "diff.json"),
        ("markdown", "diff.md"),
        ("sarif", "diff.sarif"),
    ] {
        assert_eq!(
            stdout(&pair.diff(&["--format", format])),
            read(file),
            "{format}"
        );
    }
    assert_eq!(stdout(&pair.diff(&["--json"])), read("diff.json"));
}

#[test]
fn a_reader_that_stops_early_is_no_error() {
    let pair = Pair::new();
    let many: Vec<String> = (0..40_000)
        .map(|i| format!("\"key{i}\": {{\"x\": {i}}}"))
        .collect();
    pair.write("b/config.json", format!("{{{}}}", many.join(",")));
    let (a, b) = (pair.path("a"), pair.path("b"));
    let mut child = Command::new(env!("CARGO_BIN_EXE_duet"))
        .args(["diff", "--format", "json"])
        .args([a, b])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("the binary starts");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("it ends");
    code(&output, 1);
    assert_eq!(stderr(&output), "");
}

#[test]
fn names_with_markup_come_out_escaped() {
    let pair = Pair::new();
    let name = "b/we <b>ird<i> & `nämé`.json";
    pair.write(name, "{}");
    let html = stdout(&pair.diff(&["--format", "html"]));
    assert!(html.contains("we &lt;b&gt;ird&lt;i&gt; &amp; `nämé`.json"));
    assert!(!html.contains("<b>ird"));
    let xml = stdout(&pair.diff(&["--format", "junit"]));
    assert!(
        xml.contains("name=\"we &lt;b&gt;ird&lt;i&gt; &amp; `nämé`.json\""),
        "{xml}"
    );
    let sarif = stdout(&pair.diff(&["--format", "sarif"]));
    assert!(
        sarif.contains("we%20%3Cb%3Eird%3Ci%3E%20%26%20%60n%C3%A4m%C3%A9%60.json"),
        "{sarif}"
    );
    let markdown = stdout(&pair.diff(&["--format", "markdown"]));
    assert!(
        markdown.contains("we &lt;b&gt;ird&lt;i&gt; &amp; &#96;nämé&#96;.json"),
        "{markdown}"
    );
}

#[test]
fn damage_gives_a_report_or_an_error_never_a_panic() {
    use duet_onnx::diff::render::{Format, View, render};
    let dir = tempfile::tempdir().expect("a directory");
    let (a, b) = (dir.path().join("a.onnx"), dir.path().join("b.onnx"));
    let file = encode(&nested()).to_vec();
    fs::write(&a, &file).expect("written");
    let options = duet_onnx::diff::Options {
        context: 2,
        ..Default::default()
    };
    let (mut compared, mut refused) = (0, 0);
    for at in 0..file.len() {
        let mut bytes = file.clone();
        bytes[at] ^= 1 << (at % 8);
        fs::write(&b, &bytes).expect("written");
        let lines = duet_onnx::diff::textconv(&b).expect("always lines");
        assert!(!lines.is_empty());
        match duet_onnx::diff::compare(&a, &b, &options) {
            Ok(report) => {
                compared += 1;
                for format in Format::ALL {
                    render(&report, format, View::default());
                }
            }
            Err(e) => {
                refused += 1;
                assert!(e.to_string().contains("b.onnx: "), "{e}");
            }
        }
    }
    assert!(
        compared > 50 && refused > 50,
        "{compared} compared, {refused} refused"
    );
}

// ---- a rewrite, and what the manual says ----

/// The code blocks of a language in docs/diff.md.
fn blocks(language: &str) -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/diff.md");
    let text = fs::read_to_string(path).expect("docs/diff.md");
    let start = format!("```{language}\n");
    let parts = text.split(start.as_str()).skip(1);
    let block = |p: &str| p.split("```").next().expect("a block").to_owned();
    parts.map(block).collect()
}

#[test]
fn the_manual_shows_valid_yaml_and_valid_policies() {
    let all = blocks("yaml");
    let (policies, jobs): (Vec<&String>, Vec<&String>) =
        all.iter().partition(|b| b.starts_with("version: 1\n"));
    assert_eq!((policies.len(), jobs.len()), (2, 2));
    for text in policies {
        let policy = duet_onnx::diff::policy::Policy::parse(text);
        policy.unwrap_or_else(|e| panic!("{e}\n{text}"));
    }
    for text in jobs {
        let job: serde_json::Value =
            serde_yaml::from_str(text).unwrap_or_else(|e| panic!("{e}\n{text}"));
        assert!(job.is_object());
    }
}

#[test]
fn a_rewritten_model_reads_as_one_and_passes_the_manuals_policy() {
    let pair = Pair::new();
    let recipe = "version: 1\npasses:\n  - token_merge: {dominant: 30, contextual: 6}\n  - visual_prune: {drops: \
                  [{after_layer: 3, keep: 0.5}, {after_layer: 5, keep: 0.0}]}\n";
    let recipe = pair.write("recipe.yaml", recipe);
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let before = root.join("models/llava/fixtures/ts-sdpa-mha");
    let before = before.to_str().expect("UTF-8");
    let after = pair.path("rewritten");
    let after = after.to_str().expect("UTF-8");
    code(
        &duet(&[
            "rewrite", before, "--recipe", &recipe, "--out", after, "--quiet",
        ]),
        0,
    );
    let output = duet(&["diff", before, after]);
    code(&output, 1);
    let text = stdout(&output);
    for line in [
        "Rewritten by duet: token_merge and visual_prune; nothing else changed in graphs and weights.",
        "+ duet/visual_prune/drop1 inserted after layer 3",
        "+ duet/visual_prune/drop2 inserted after layer 5",
        "+ metadata 'duet.recipe' added",
        "'image_seq_length': 81 → 36",
    ] {
        assert!(text.contains(line), "'{line}' is not in:\n{text}");
    }
    let manual = blocks("yaml");
    let policy = manual
        .iter()
        .find(|b| b.contains("rewrites: { "))
        .expect("the example");
    let path = pair.write("policy.yaml", policy);
    code(&duet(&["diff", before, after, "--policy", &path]), 0);
    let more = policy.replace("drop*: 2", "drop*: 3");
    assert_ne!(&more, policy);
    let path = pair.write("policy.yaml", more);
    let output = duet(&["diff", before, after, "--policy", &path]);
    code(&output, 1);
    assert!(
        stdout(&output).contains("expected exactly 3 times, found at 2 places"),
        "{}",
        stdout(&output)
    );
}

// ---- CI ----

fn action(pair: &Pair, extra: &[(&str, &str)]) -> (Output, String, String) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (output, summary) = (pair.path("output"), pair.path("summary"));
    for file in [&output, &summary] {
        fs::write(file, "").expect("written");
    }
    let run = Command::new("bash")
        .arg(root.join(".ci/diff-action"))
        .current_dir(pair.dir.path())
        .env("DUET", env!("CARGO_BIN_EXE_duet"))
        .env("DIFF_BASE", "a")
        .env("DIFF_HEAD", "b")
        .env("DIFF_REPORTS", "re ports")
        .env("GITHUB_OUTPUT", &output)
        .env("GITHUB_STEP_SUMMARY", &summary)
        .envs(extra.iter().copied())
        .output()
        .expect("bash starts");
    let read = |path: &Path| fs::read_to_string(path).expect("text");
    (run, read(&output), read(&summary))
}

#[test]
fn the_github_action_reports_and_fails() {
    let pair = Pair::new();
    let (run, result, summary) = action(&pair, &[]);
    code(&run, 0);
    assert_eq!(result, "result=same\n");
    assert!(summary.contains("✅ duet diff"), "{summary}");
    pair.write(
        "b/config.json",
        "{\"image_size\": 448, \"hidden_size\": 64}",
    );
    let (run, result, summary) = action(&pair, &[]);
    code(&run, 1);
    assert_eq!(result, "result=different\n");
    assert!(summary.contains("'image_size': 336 → 448"), "{summary}");
    for ending in ["json", "md", "html", "xml", "sarif"] {
        assert!(
            pair.path(&format!("re ports/diff.{ending}")).is_file(),
            "{ending}"
        );
    }
    code(&action(&pair, &[("DIFF_FAIL", "false")]).0, 0);
    code(&action(&pair, &[("DIFF_IGNORE", "config")]).0, 0);
    pair.write(
        "policy.yaml",
        "version: 1\nrules: [{allow: config, subject: image_*}]",
    );
    code(&action(&pair, &[("DIFF_POLICY", "policy.yaml")]).0, 0);
    // A name is never a command, nor an option.
    let (run, ..) = action(
        &pair,
        &[("DIFF_BASE", "$(touch owned)"), ("DIFF_HEAD", "--help")],
    );
    code(&run, 2);
    assert!(!pair.path("owned").exists());
}

#[test]
fn the_action_file_passes_every_input_on() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join("action.yml")).expect("action.yml");
    let action: serde_json::Value = serde_yaml::from_str(&text).expect("valid YAML");
    assert_eq!(action["runs"]["using"], "composite");
    let steps = action["runs"]["steps"].as_array().expect("steps");
    let last = steps.last().expect("a step");
    let env = last["env"].as_object().expect("an environment");
    for input in action["inputs"].as_object().expect("inputs").keys() {
        let used = env.values().any(|v| {
            v.as_str()
                .is_some_and(|v| v.contains(&format!("inputs.{input}")))
        });
        assert!(used, "{input} is not used");
    }
    let script = fs::read_to_string(root.join(".ci/diff-action")).expect("the script");
    for name in env.keys() {
        assert!(script.contains(name.as_str()), "{name} is not read");
    }
    for step in steps {
        let run = step["run"].as_str().unwrap_or("");
        assert!(
            !run.contains("${{"),
            "inputs reach scripts through the environment only: {run}"
        );
    }
}
