//! Qwen2.5-VL-7B at its true size: the exporter's own graphs (`models/full_size.py --pack`), whose weights are declared and
//! lie in data files of holes, as many bytes as the model has. Everything that reads graphs works on it.

// Elsewhere a file of holes may take all of its 15 GB.
#![cfg(unix)]

mod commands;

use std::io::Read;
use std::path::Path;

use duet_onnx::ir::verify;
use duet_onnx::onnx::read;
use serde_json::Value as Json;

const GRAPHS: [&str; 3] = ["vision_encoder", "embed_tokens", "decoder_model_merged"];

/// The model's directory, without a word about what it is.
fn model() -> commands::Place {
    let packed = commands::source("models/qwen_vl/fixtures/full-size");
    let place = commands::Place::new("");
    let onnx = place.path("base/onnx");
    std::fs::create_dir_all(&onnx).expect("a folder");
    for name in GRAPHS {
        let file = std::fs::File::open(packed.join(format!("{name}.onnx.gz"))).expect("packed");
        let mut bytes = Vec::new();
        flate2::read::GzDecoder::new(file)
            .read_to_end(&mut bytes)
            .expect("gzip");
        std::fs::write(onnx.join(format!("{name}.onnx")), bytes).expect("written");
    }
    let sizes = std::fs::read_to_string(packed.join("data.json")).expect("data.json");
    let sizes: Json = serde_json::from_str(&sizes).expect("JSON");
    for (name, size) in sizes.as_object().expect("sizes") {
        let data = std::fs::File::create(onnx.join(name)).expect("a data file");
        data.set_len(size.as_u64().expect("a size")).expect("holes");
    }
    place
}

fn numbers(json: &Json) -> Vec<i64> {
    serde_json::from_value(json.clone()).expect("a list of numbers")
}

#[test]
fn everything_that_reads_graphs_works_on_seven_billion_weights() {
    let place = model();
    let base = place.at("base");
    let shown = commands::duet(&["inspect", &base, "--json"]).json();
    // By its structure: there is no configuration.
    assert_eq!(shown["family"], "Qwen2.5-VL");
    let found = |role: &str| {
        let files = shown["files"].as_array().expect("files");
        let file = files.iter().find(|f| f["role"] == role);
        file.unwrap_or_else(|| panic!("no {role}: {shown}"))["found"].clone()
    };
    let (tower, decoder) = (found("vision encoder"), found("decoder"));
    for (json, key, expected) in [
        (&decoder, "layers", 28),
        (&decoder, "heads", 28),
        (&decoder, "kv_heads", 4),
        (&decoder, "head_dim", 128),
        (&decoder, "width", 3584),
        (&decoder, "vocabulary", 152_064),
        (&decoder, "position_rows", 3),
        (&tower, "blocks", 32),
        (&tower, "heads", 16),
        (&tower, "head_dim", 80),
        (&tower, "patches_per_token", 4),
    ] {
        assert_eq!(json[key], expected, "{key}");
    }

    let recipes: [(&str, f64, [f64; 3]); 5] = [
        ("qwen2.5-vl-640", 440.0, [640.0, 320.0, 160.0]),
        ("qwen2.5-vl-320", 220.0, [320.0, 160.0, 80.0]),
        ("qwen2.5-vl-160", 110.0, [160.0, 80.0, 40.0]),
        ("qwen2.5-vl-prune", 0.6875, [1.0, 0.5, 0.25]),
        // Three quarters between layers 8 and 14.
        ("qwen2.5-vl-ratio", f64::NAN, [0.525, 0.35, 0.175]),
    ];
    for (recipe, average, levels) in recipes {
        let arguments = [
            "rewrite", &base, "--recipe", recipe, "--beside", recipe, "--json",
        ];
        let done = commands::duet(&arguments).json();
        let table = &done["visual_tokens"][0];
        let shares = table["by_layer"].is_null();
        let layers = if shares {
            &table["share_by_layer"]
        } else {
            &table["by_layer"]
        };
        let layers: Vec<f64> = serde_json::from_value(layers.clone()).expect("layers");
        assert_eq!(layers.len(), 28, "{recipe}");
        assert_eq!([layers[13], layers[20], layers[27]], levels, "{recipe}");
        if average.is_finite() {
            assert_eq!(table["average"], average, "{recipe}");
        }
        for name in GRAPHS {
            let path = place.path(&format!("base/onnx/{name}_{recipe}.onnx"));
            if !path.exists() {
                assert!(
                    recipe.ends_with("prune") && name != "decoder_model_merged",
                    "{recipe}: {name}"
                );
                continue;
            }
            // No weight was written, and what was is a valid model that names its rewrite.
            let size = std::fs::metadata(&path).expect("a file").len();
            assert!(size < 1_000_000, "{recipe}: {name} has {size} bytes");
            let model = read(&path).unwrap_or_else(|e| panic!("{recipe}: {e}"));
            verify(&model).unwrap_or_else(|e| panic!("{recipe}: {e}"));
            assert!(model.metadata("duet.recipe").is_some(), "{recipe}: {name}");
        }
    }
    assert_eq!(
        held(&place.path("base/onnx"), "onnx_data"),
        3,
        "no data file was added"
    );

    let refused = commands::duet(&[
        "rewrite",
        &base,
        "--recipe",
        "llava-1.5-192",
        "--beside",
        "x",
    ]);
    assert_eq!(refused.code, 2);
    assert!(
        refused
            .stderr
            .contains("(M-RoPE) show that this model is of Qwen2.5-VL's kind"),
        "{}",
        refused.stderr
    );
}

fn held(folder: &Path, extension: &str) -> usize {
    let entries = std::fs::read_dir(folder).expect("a folder");
    let named = entries.filter(|e| {
        let path = e.as_ref().expect("an entry").path();
        path.extension().is_some_and(|found| found == extension)
    });
    named.count()
}

/// `duet plan` where the run tells how many tokens an image has: absolute budgets for images of that many or more,
/// shares for any, and exact counts for a given size.
#[test]
fn a_budget_is_planned_for_images_of_any_size() {
    let place = model();
    let base = place.at("base");
    let plan = |more: &[&str]| {
        let arguments = [&["plan", base.as_str(), "--json"], more].concat();
        commands::duet(&arguments).json()
    };
    let open = plan(&["--budget", "440"]);
    let table = &open["visual_tokens"];
    assert_eq!(table["of"], "an image of 640 tokens or more");
    assert_eq!(
        (&table["average"], &table["first_layer_sees_all"]),
        (&Json::from(440.0), &Json::from(true))
    );
    let recipe = open["recipe"].as_str().expect("a recipe");
    assert!(
        recipe.contains("dominant: 540\n      contextual: 100\n"),
        "{recipe}"
    );

    let share = plan(&["--reduction", "80%"]);
    let average = share["visual_tokens"]["average"].as_f64().expect("a mean");
    assert!((0.195..=0.2).contains(&average), "{average}");

    // 46 × 26 groups of patches.
    let sized = plan(&["--budget", "440", "--image-size", "1280x720"]);
    assert_eq!(
        numbers(&sized["visual_tokens"]["before_by_layer"]),
        [1196; 28]
    );
    // All of them go through the first layer.
    assert_eq!(
        numbers(&sized["visual_tokens"]["by_layer"])[..2],
        [1196, 609]
    );
    assert_eq!(
        plan(&["--budget", "440", "--tokens", "1196"])["recipe"],
        sized["recipe"]
    );
    let refused = commands::duet(&["plan", &base, "--budget", "440", "--crops", "5"]);
    assert!(
        refused.code == 2 && refused.stderr.contains("--image-size"),
        "{}",
        refused.stderr
    );
}
