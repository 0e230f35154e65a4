//! `duet inspect`

use serde_json::{Value, json};

use super::{Global, ModelArgument, Outcome, counts, family, load, print_json, style};
use crate::arch::{Decoder, FileSet, Part, PatchRows, Role, VisionTower, Vlm};
use crate::ir::{Model, TensorData};
use crate::onnx::ModelDir;
use crate::passes::{SHAPES_KEY, earlier_recipe};

/// Arguments of `duet inspect`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    model: ModelArgument,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &Arguments, global: &Global) -> anyhow::Result<Outcome> {
    let (dir, vlm) = load::look(&arguments.model.path, global)?;
    let sets = vlm.sets();
    if arguments.json {
        let files: Vec<Value> = vlm.parts.iter().map(describe).collect();
        let file = |index: Option<usize>| index.map(|i| vlm.parts[i].file.clone());
        let sets: Vec<Value> = sets
            .iter()
            .map(|set| {
                json!({
                    "variant": load::variant_name(&set.variant),
                    "vision": file(set.vision),
                    "video": file(set.video),
                    "embedding": file(set.embedding),
                    "decoder": file(set.decoder.map(|d| d.main)),
                    "prompt_decoder": file(set.decoder.and_then(|d| d.prompt)),
                    "whole": file(set.whole),
                })
            })
            .collect();
        let layout = dir.layout.word();
        let depth = vlm.decoders().next().map(|(_, d)| d.depth());
        let tokens = counts::unmodified(&vlm, family::crops(&dir.root, &vlm));
        let tokens: Vec<Value> = tokens
            .iter()
            .map(|(of, tokens)| json!({ "of": of, "tokens": tokens, "layers": depth }))
            .collect();
        print_json(&json!({
            "schema_version": 1,
            "family": family::find(&dir.root, &vlm).map(|f| f.name),
            "visual_tokens": tokens,
            "layout": layout,
            "sets": sets,
            "files": files,
        }))?;
    } else {
        anstream::println!(
            "{}{}{}",
            style::HEAD,
            arguments.model.path.display(),
            style::RESET
        );
        header(&dir, &vlm, &sets);
        print(&vlm.parts);
    }
    let nothing = vlm.parts.iter().all(|p| matches!(p.role, Role::Unknown(_)));
    let rewritten = vlm.parts.iter().any(|p| earlier_recipe(&p.model).is_some());
    Ok(if nothing && !rewritten {
        Outcome::Failed
    } else {
        Outcome::Done
    })
}

/// (inline bytes, external bytes) of a model's initializers.
fn sizes(model: &Model) -> (u64, u64) {
    let (mut inline, mut external) = (0, 0);
    for &value in &model.graph().initializers {
        let Some(tensor) = &model.value(value).initializer else {
            continue;
        };
        match &tensor.data {
            TensorData::Raw(bytes) => inline += bytes.len() as u64,
            TensorData::Strings(list) => inline += list.iter().map(|s| s.len() as u64).sum::<u64>(),
            TensorData::External(_) => {
                external += tensor
                    .element_count()
                    .and_then(|n| tensor.dtype.byte_len(n))
                    .unwrap_or(0);
            }
        }
    }
    (inline, external)
}

/// How the files lie, which precisions there are, and what is used together.
fn header(dir: &ModelDir, vlm: &Vlm, sets: &[FileSet]) {
    if let Some(family) = family::find(&dir.root, vlm) {
        anstream::println!("  family     {}", family.name);
    }
    anstream::println!("  layout     {}", dir.layout.name());
    if let Some((_, decoder)) = vlm.decoders().next() {
        for (of, tokens) in counts::unmodified(vlm, family::crops(&dir.root, vlm)) {
            anstream::println!(
                "  visual     {tokens} tokens of {of} in each of {} layers",
                decoder.depth()
            );
        }
    }
    if sets.len() < 2 {
        return;
    }
    let names: Vec<&str> = sets
        .iter()
        .map(|s| load::variant_name(&s.variant))
        .collect();
    anstream::println!("  variants   {}", names.join(", "));
    for set in sets {
        // Only what a variant lacks is worth a line.
        let mut borrowed: Vec<String> = set
            .files()
            .map(|i| &vlm.parts[i])
            .filter(|p| p.variant != set.variant)
            .map(|p| p.file.display().to_string())
            .collect();
        borrowed.dedup();
        if !borrowed.is_empty() {
            anstream::println!(
                "             {}{} is used with {}{}",
                style::DIM,
                load::variant_name(&set.variant),
                borrowed.join(" and "),
                style::RESET
            );
        }
    }
}

fn describe(part: &Part) -> Value {
    let model = &part.model;
    let (inline, external) = sizes(model);
    let opsets: Vec<Value> = model
        .opset_imports
        .iter()
        .map(|(domain, version)| json!({ "domain": domain, "version": version }))
        .collect();
    let mut file = json!({
        "file": part.file,
        "variant": part.variant,
        "role": part.kind().name(),
        "ir_version": model.ir_version,
        "opsets": opsets,
        "producer": model.producer,
        "nodes": model.graph().nodes.len(),
        "weight_bytes": { "inline": inline, "external": external },
    });
    if let Some(branch) = &part.source.branch {
        file["branch"] = json!(branch);
    }
    if !part.source.inlined.is_empty() {
        file["functions_inlined"] = json!(part.source.inlined);
    }
    if let Some((version, recipe)) = earlier_recipe(model) {
        file["rewritten"] = json!({ "duet_version": version, "recipe": recipe });
        if let Some(shapes) = model.metadata(SHAPES_KEY) {
            file["rewritten"]["static"] = json!(shapes);
        }
    }
    let found = match &part.role {
        Role::Vision(t) => tower(model, t),
        Role::Encoder(e) => json!({
            "input": "images",
            "feature_width": e.feature_width,
            "not_recognised": [e.why.to_string()],
        }),
        Role::Embedding(e) => json!({
            "width": e.width,
            "dtype": e.dtype.to_string(),
            "features_input": e.scatter.as_ref().map(|s| model.name(s.features)),
            "image_token": e.scatter.as_ref().and_then(|s| s.placeholder),
        }),
        Role::Decoder(d) => decoder(model, d),
        Role::Whole(w) => json!({
            "vision": tower(model, &w.tower),
            "decoder": decoder(model, &w.decoder),
            "image_token": w.ids.image,
        }),
        Role::Unknown(reasons) => {
            json!({ "not_recognised": reasons.iter().map(ToString::to_string).collect::<Vec<_>>() })
        }
    };
    file["found"] = found;
    file
}

fn tower(model: &Model, t: &VisionTower) -> Value {
    json!({
        "blocks": t.layers,
        "heads": t.heads,
        "head_dim": t.head_dim,
        "cls": t.cls,
        "cls_dropped_before_projector": t.cls && t.entry != t.hidden,
        "patches": t.patches(),
        "patches_per_token": t.patches_per_token(),
        "features_per_image": t.features_per_image(),
        "input": match (&t.rows, t.video) {
            (Some(_), _) => "patches",
            (None, true) => "clips",
            (None, false) => "images",
        },
        "grid": t.rows.as_ref().and_then(|r| r.grid).map(|v| model.name(v)),
        "blocks_with_windows": t.rows.as_ref().map(|r| r.windowed),
        "frames": t.frames,
        "feature_width": t.feature_width,
        "dtype": t.dtype.to_string(),
        "attention": model.describe(t.site.node),
        "merge_point": model.name(merge_point(t)),
    })
}

fn decoder(model: &Model, d: &Decoder) -> Value {
    json!({
        "layers": d.depth(),
        "heads": d.heads,
        "kv_heads": d.kv_heads,
        "head_dim": d.head_dim,
        "width": d.width,
        "vocabulary": d.vocabulary,
        "position_rows": d.position_rows,
        "dtype": d.dtype.to_string(),
        "drop_points": (1..d.depth()).map(|l| json!({
            "after_layer": l,
            "residual": d.layers[l].boundary.iter().map(|v| model.name(*v)).collect::<Vec<_>>().join(", "),
        })).collect::<Vec<_>>(),
        "prelude_nodes": prelude(model, d),
    })
}

/// Where a merge takes its tokens from.
fn merge_point(tower: &crate::arch::VisionTower) -> crate::ir::ValueId {
    match (&tower.shuffle, &tower.rows) {
        (None, None) => tower.hidden,
        _ => tower.entry,
    }
}

/// Nodes before the first layer that later layers read from: what is cloned at a
/// drop point.
fn prelude(model: &Model, decoder: &Decoder) -> usize {
    let Some(second) = decoder.layers.get(1) else {
        return 0;
    };
    let behind = crate::ir::cone::descendants(model, &second.boundary, false);
    let data = crate::ir::cone::descendants(model, &[decoder.embeds], true);
    let side: Vec<_> = model
        .graph()
        .nodes
        .iter()
        .map(|&n| model.node(n))
        .filter(|n| {
            n.outputs
                .iter()
                .flatten()
                .any(|o| behind.contains(o) && !second.boundary.contains(o))
        })
        .flat_map(|n| n.inputs.iter().flatten().copied())
        .filter(|v| !behind.contains(v) && !data.contains(v))
        .collect();
    let mut cone = crate::ir::cone::ancestors(model, &side, false);
    // Sizes read off the embeddings do not need what those are made of.
    let made = crate::ir::cone::ancestors(model, &[decoder.embeds], false);
    cone.retain(|v| !made.contains(v));
    let nodes: std::collections::HashSet<_> =
        cone.iter().filter_map(|v| model.producer_of(*v)).collect();
    nodes
        .into_iter()
        .filter(|n| !model.node(*n).is("Constant"))
        .count()
}

fn print(parts: &[Part]) {
    for part in parts {
        let model = &part.model;
        let (inline, external) = sizes(model);
        let opset = model.opset("").map_or("?".into(), |v| v.to_string());
        let data = if external > 0 {
            format!(" + {} external", style::bytes(external))
        } else {
            String::new()
        };
        anstream::println!(
            "\n{}{}{}  {}{}, opset {opset}, {} nodes, {} of weights{data}{}",
            style::HEAD,
            part.label(),
            style::RESET,
            style::DIM,
            part.kind().name(),
            model.graph().nodes.len(),
            style::bytes(inline),
            style::RESET
        );
        if !part.source.inlined.is_empty() {
            anstream::println!(
                "  functions  {} inlined to recognise it; rewrite writes a changed file so",
                part.source.inlined.join(", ")
            );
        }
        if part.source.branch.is_some() && earlier_recipe(model).is_none() {
            anstream::println!(
                "{}",
                match part.source.is_tower() {
                    true =>
                        "  input      of a file of two towers; rewrite changes both and joins them again",
                    false =>
                        "  branch     of a merged file; rewrite changes every branch and joins them again",
                }
            );
        }
        if let Some((version, recipe)) = earlier_recipe(model) {
            anstream::println!("  rewritten by duet {version} with");
            recipe.lines().for_each(|l| anstream::println!("    {l}"));
            if let Some(shapes) = model.metadata(SHAPES_KEY) {
                anstream::println!("  static     {shapes}");
                for &input in &model.graph().inputs {
                    let ty = model.value(input).ty.as_ref();
                    let ty = ty.map_or_else(String::new, ToString::to_string);
                    anstream::println!("    '{}' {ty}", model.name(input));
                }
            }
            continue;
        }
        match &part.role {
            Role::Vision(t) => print_tower(model, t),
            Role::Encoder(e) => {
                anstream::println!("  features   {} wide", optional(e.feature_width));
                anstream::println!(
                    "  {}no{} {}; visual_prune alone works on it",
                    style::BAD,
                    style::RESET,
                    e.why
                );
            }
            Role::Embedding(e) => {
                anstream::println!("  width      {}, {}", optional(e.width), e.dtype);
                if let Some(scatter) = &e.scatter {
                    let token = scatter.placeholder.map(|id| format!(" at token {id}"));
                    anstream::println!(
                        "  features   '{}' put in their places{}",
                        model.name(scatter.features),
                        token.unwrap_or_default()
                    );
                }
            }
            Role::Decoder(d) => print_decoder(model, d),
            Role::Whole(w) => {
                print_tower(model, &w.tower);
                print_decoder(model, &w.decoder);
                anstream::println!("  image at   token {}", w.ids.image);
            }
            Role::Unknown(reasons) => {
                for reason in reasons {
                    anstream::println!("  {}no{} {reason}", style::BAD, style::RESET);
                }
            }
        }
    }
}

fn optional(number: Option<i64>) -> String {
    number.map_or("?".into(), |n| n.to_string())
}

fn print_tower(model: &Model, t: &VisionTower) {
    let cls = match (t.cls, t.entry != t.hidden) {
        (true, true) => "CLS (dropped before the projector) + ",
        (true, false) => "CLS + ",
        _ => "",
    };
    anstream::println!(
        "  tower      {} live blocks, {} heads × {}, {}",
        t.layers,
        t.heads,
        t.head_dim,
        t.dtype
    );
    if let Some(rows) = &t.rows {
        print_rows(model, t, rows);
        anstream::println!("  merge at   {}", model.name(merge_point(t)));
        return;
    }
    let shuffled = t.shuffle.as_ref().map_or(String::new(), |s| {
        format!(", {} in a token (pixel shuffle)", s.per)
    });
    let patches = optional(t.patches());
    anstream::println!("  tokens     {cls}{patches} patches{shuffled}");
    anstream::println!(
        "  features   {} × {} per {}",
        optional(t.features_per_image()),
        optional(t.feature_width),
        if t.video { "frame" } else { "image" }
    );
    if t.video {
        let frames = t.frames.map_or("any number".into(), |n| n.to_string());
        anstream::println!("  clips      {frames} of frames, each merged alone");
    }
    anstream::println!("  merge at   {}", model.name(merge_point(t)));
}

/// What a tower takes and gives that gets patches in a grid.
fn print_rows(model: &Model, t: &VisionTower, rows: &PatchRows) {
    let grid = match rows.grid {
        Some(grid) => format!("in the grid '{}'", model.name(grid)),
        None => "of one grid, which the file is made for".into(),
    };
    anstream::println!(
        "  input      rows of patches '{}' {grid}",
        model.name(t.pixels)
    );
    let count =
        |known: Option<i64>| known.map_or("as many as the run tells".into(), |n| n.to_string());
    anstream::println!(
        "  tokens     groups of {} consecutive patches (merger); patches: {}",
        rows.per,
        count(t.tokens)
    );
    let attention = match rows.windowed {
        0 => "all blocks see the same keys".to_owned(),
        n => format!(
            "{n} of {} blocks see other keys than the last one does (windows)",
            t.layers
        ),
    };
    anstream::println!("  attention  {attention}");
    let order = match rows.moves.is_empty() {
        true => "",
        false => ", put back from the order of windows",
    };
    anstream::println!(
        "  features   {} × {}{order}",
        t.candidates().map_or("N".into(), |n| n.to_string()),
        optional(t.feature_width)
    );
}

fn print_decoder(model: &Model, d: &Decoder) {
    anstream::println!(
        "  layers     {}, {} heads, {} key/value heads × {}, width {}, {}",
        d.depth(),
        optional(d.heads),
        d.kv_heads,
        d.head_dim,
        optional(d.width),
        d.dtype
    );
    anstream::println!("  vocabulary {}", optional(d.vocabulary));
    if let Some(rows) = d.position_rows {
        anstream::println!("  positions  {rows} for each token (M-RoPE), kept through drops");
    }
    anstream::println!("  drops      after layer 1 to {}", d.depth() - 1);
    anstream::println!(
        "  prelude    {} nodes that later layers share",
        prelude(model, d)
    );
}
