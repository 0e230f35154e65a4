//! `duet demo`: the main job, start to end, on the model that ships.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;

use super::counts::{average, percent_fewer, tokens_by_layer};
use super::rewrite::outputs;
use super::{Engine, Global, Outcome, load, run::millis, style};
use crate::onnx::{DataMode, write_out};
use crate::passes::rewrite;
use crate::runtime::{
    self, CacheHeads, GenerateOptions, Generation, Message, Pixels, VlmFiles, VlmPipeline,
};
use crate::validate::{Options, check};

/// Arguments of `duet demo`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Recipe: a built-in name or a YAML file
    #[arg(long, default_value = "demo", value_name = "NAME_OR_FILE")]
    recipe: String,
    /// Timed runs of each model, interleaved
    #[arg(long, default_value_t = 9, value_name = "N")]
    runs: usize,
    #[command(flatten)]
    engine: Engine,
}

macro_rules! bundled {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_bytes!(concat!("../../models/llava/fixtures/demo/", $name)))),*]
    };
}

/// The bundled model: a small LLaVA-1.5 of random weights with the real image
/// geometry (336 px, 576 patches), exported by PyTorch.
const MODEL: &[(&str, &[u8])] = bundled!(
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "onnx/vision_encoder.onnx",
    "onnx/embed_tokens.onnx",
    "onnx/decoder_model_merged.onnx",
);

const PICTURE: &[u8] = include_bytes!("../../models/llava/images/street.png");
const QUESTION: &str = "What is it?";

pub(super) fn run(arguments: &Arguments, global: &Global) -> anyhow::Result<Outcome> {
    runtime::ensure(&mut |line| global.say(line))?;
    let mut engine = arguments.engine.clone();
    if engine.threads == 0 {
        engine.threads = 2;
    }
    let work = tempfile::tempdir().context("a temporary directory for the demonstration")?;
    let (base, new) = (work.path().join("llava"), work.path().join("llava-duet"));
    for (name, contents) in MODEL {
        let path = base.join(name);
        std::fs::create_dir_all(path.parent().unwrap_or(&base))?;
        std::fs::write(&path, contents)?;
    }

    heading("1. What was recognised");
    let load::Selected { dir, vlm, .. } = load::select(&base, &[], global)?;
    for (_, t) in vlm.towers() {
        anstream::println!(
            "  vision tower   {} live blocks, {} heads, {}{} patches",
            t.layers,
            t.heads,
            if t.cls { "CLS + " } else { "" },
            t.patches().unwrap_or(0)
        );
    }
    for (_, d) in vlm.decoders() {
        anstream::println!(
            "  decoder        {} layers, {} heads, {} key/value heads, width {}",
            d.depth(),
            d.heads.unwrap_or(0),
            d.kv_heads,
            d.width.unwrap_or(0)
        );
    }

    heading("2. What was inserted");
    let recipe = load::recipe(&arguments.recipe)?;
    let original = vlm.clone();
    let started = Instant::now();
    let done = rewrite(vlm, &recipe)?;
    write_out(
        &dir,
        &outputs(&dir, &done, &recipe, None)?,
        &new,
        DataMode::Copy,
    )?;
    let took = started.elapsed();
    for (pass, summary) in &done.summaries {
        anstream::println!("  {}{pass:<13}{}  {summary}", style::NEW, style::RESET);
        for change in done.changes.iter().filter(|c| c.pass == *pass) {
            let file = done.vlm.parts[change.part].label();
            anstream::println!("                 {file}: {} nodes", change.inserted);
        }
    }
    anstream::println!("  rewritten and written in {:.1} ms", millis(took));

    heading("3. Visual tokens, layer by layer");
    if let Some((before, after)) = tokens_by_layer(&original, &recipe) {
        let mut rows = vec![vec!["layer".into(), "before".into(), "after".into()]];
        for (layer, (b, a)) in before.iter().zip(&after).enumerate() {
            rows.push(vec![(layer + 1).to_string(), b.to_string(), a.to_string()]);
        }
        let (b, a) = (average(&before), average(&after));
        rows.push(vec!["average".into(), format!("{b:.2}"), format!("{a:.2}")]);
        anstream::print!("{}", style::table(&rows));
        anstream::println!("  {}", percent_fewer(1.0 - a / b));
    }

    heading("4. Does it compute what the method says?");
    global
        .say("  comparing with the unmodified model run layer by layer around an ndarray oracle …");
    let options = Options {
        session: engine.options(),
        seed: 0,
    };
    let report = check(&original, &done.vlm, &recipe, &options, &mut |step| {
        global.detail(step)
    })?;
    super::validate::print(&report);

    heading("5. Side by side");
    let heads = original.decoders().next();
    let heads = heads.and_then(|(_, d)| load::heads_of((d.kv_heads, d.head_dim)));
    side_by_side(&base, &new, heads, arguments.runs.max(1), &engine)?;
    Ok(if report.passed() {
        Outcome::Done
    } else {
        Outcome::Failed
    })
}

fn heading(text: &str) {
    anstream::println!("\n{}{text}{}", style::HEAD, style::RESET);
}

/// Runs both models in turns on the same picture and question.
fn side_by_side(
    base: &Path,
    new: &Path,
    heads: Option<CacheHeads>,
    runs: usize,
    engine: &Engine,
) -> anyhow::Result<()> {
    let open = |dir: &Path| -> anyhow::Result<VlmPipeline> {
        let file = |name: &str| dir.join("onnx").join(format!("{name}.onnx"));
        let files = VlmFiles {
            vision_encoder: file("vision_encoder"),
            embed_tokens: file("embed_tokens"),
            decoder: file("decoder_model_merged"),
            configs: dir.to_owned(),
        };
        let options = engine.options();
        Ok(VlmPipeline::open_with_heads(&files, &options, heads)?)
    };
    let mut models = [open(base)?, open(new)?];
    let picture = [Pixels::decode(PICTURE, "street.png")?];
    let messages = [Message::user(1, QUESTION)];
    let options = GenerateOptions {
        max_new_tokens: 16,
        ignore_eos: true,
        ..Default::default()
    };
    let mut seen: [Vec<Generation>; 2] = [Vec::new(), Vec::new()];
    for round in 0..=runs {
        for (model, answers) in models.iter_mut().zip(&mut seen) {
            let prepared = model.prepare(&messages, &picture)?;
            let answer =
                model.generate(
                    &prepared,
                    None,
                    &options,
                    &mut |_| ControlFlow::Continue(()),
                )?;
            // The first round warms up.
            if round > 0 {
                answers.push(answer);
            }
        }
    }
    let median = |answers: &[Generation], of: fn(&Generation) -> Duration| {
        let mut times: Vec<Duration> = answers.iter().map(of).collect();
        times.sort();
        millis(times[times.len() / 2])
    };
    let time = |name: &str, of: fn(&Generation) -> Duration| {
        let (b, a) = (median(&seen[0], of), median(&seen[1], of));
        vec![
            name.into(),
            format!("{b:.2} ms"),
            format!("{a:.2} ms"),
            format!("{:.2}×", b / a),
        ]
    };
    let (b, a) = (&seen[0][0], &seen[1][0]);
    let bytes = |g: &Generation| style::bytes(g.cache_bytes as u64);
    let ratio = b.cache_bytes as f64 / a.cache_bytes as f64;
    let mut rows = vec![
        vec![
            String::new(),
            "before".into(),
            "after".into(),
            "ratio".into(),
        ],
        vec![
            "visual tokens in".into(),
            b.visual_tokens.to_string(),
            a.visual_tokens.to_string(),
            String::new(),
        ],
        time("vision encoder", |g| g.timing.vision),
        time("prefill", |g| g.timing.prefill),
        time("decode step", |g| {
            let steps = &g.timing.decode;
            steps.iter().sum::<Duration>() / u32::try_from(steps.len().max(1)).unwrap_or(1)
        }),
    ];
    rows.push(vec![
        "cache".into(),
        bytes(b),
        bytes(a),
        format!("{ratio:.2}×"),
    ]);
    anstream::print!("{}", style::table(&rows));
    anstream::println!(
        "  {}medians of {runs} interleaved runs, {} threads; weights are random, so the answers mean nothing{}",
        style::DIM,
        engine.threads,
        style::RESET
    );
    Ok(())
}
