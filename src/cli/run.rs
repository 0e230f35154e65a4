//! `duet run`

use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::json;

use super::load::{self, Runnable, Trio};
use super::{Engine, Global, ModelArgument, Outcome, print_json};
use crate::arch::DEFAULT_FRAMES;
use crate::runtime::{
    ClipEncoder, GenerateOptions, Generation, Message, Pixels, RuntimeError, Sampling, Session,
    Stop, Token, VlmFiles, VlmPipeline, WholePipeline,
};

/// Arguments of `duet run`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    model: ModelArgument,
    /// Image; may be repeated, in the order the prompt refers to them
    #[arg(long, value_name = "FILE")]
    image: Vec<PathBuf>,
    /// Clip: a folder of frames, a GIF, or any video file if an ffmpeg program is on PATH; may be repeated
    ///
    /// As many frames as the model takes (8 for Video-LLaVA) are sampled at even steps, the first and the last
    /// among them; Qwen2-VL and Qwen2.5-VL see two of each second, or what their configuration says, and of a
    /// folder all.
    #[arg(long, value_name = "PATH")]
    video: Vec<PathBuf>,
    /// Question or instruction
    #[arg(long, value_name = "TEXT")]
    prompt: String,
    /// Further question in the same conversation, answered on the cache of what was said before; may be repeated
    #[arg(long, value_name = "TEXT")]
    then: Vec<String>,
    /// Tokens to generate at most
    #[arg(long, default_value_t = 128, value_name = "N")]
    max_new_tokens: usize,
    /// Precision of the files to use (fp16, q4, default, …), or the suffix of an earlier --beside
    #[arg(long, value_name = "NAME")]
    variant: Option<String>,
    /// Sample with this temperature instead of taking the likeliest token
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,
    /// Sample among the K likeliest tokens
    #[arg(long, value_name = "K", requires = "temperature")]
    top_k: Option<usize>,
    /// Sample among the likeliest tokens that make up this share
    #[arg(long, value_name = "P", requires = "temperature")]
    top_p: Option<f32>,
    /// Seed of the sampling
    #[arg(long, default_value_t = 0, value_name = "N")]
    seed: u64,
    /// Print one JSON document instead of streaming
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    engine: Engine,
}

pub(super) fn run(arguments: &Arguments, global: &Global) -> anyhow::Result<Outcome> {
    let (dir, model) = load::runnable(&arguments.model.path, arguments.variant.as_deref())?;
    let images = arguments
        .image
        .iter()
        .map(Pixels::open)
        .collect::<Result<Vec<_>, _>>()?;
    let sampling = match arguments.temperature {
        None => Sampling::Greedy,
        Some(t) if t > 0.0 => Sampling::Random {
            temperature: t,
            top_k: arguments.top_k.unwrap_or(0),
            top_p: arguments.top_p.unwrap_or(1.0),
            seed: arguments.seed,
        },
        Some(t) => bail!("--temperature {t}: expected a number above 0"),
    };
    let options = GenerateOptions {
        max_new_tokens: arguments.max_new_tokens,
        sampling,
        ..Default::default()
    };
    let prompt = arguments.prompt.as_str();
    let mut messages = vec![Message::user_with(
        images.len(),
        arguments.video.len(),
        prompt,
    )];
    let quiet_stream = arguments.json;
    let mut out = anstream::stdout();
    let mut failed = None;
    let mut on_token = |token: &Token| {
        if !quiet_stream
            && let Err(error) = write!(out, "{}", token.text).and_then(|()| out.flush())
        {
            failed = Some(error);
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    };
    let answers = match model {
        Runnable::Whole(file) => {
            if !arguments.then.is_empty() {
                bail!(
                    "{}: the model is one file without a cache to go on from; --then needs a decoder with one",
                    file.display()
                );
            }
            if !arguments.video.is_empty() {
                bail!(
                    "{}: the model is one file that takes images; --video needs an encoder of clips beside the \
                     decoder (pixel_values_videos of rank 5)",
                    file.display()
                );
            }
            let engine = arguments.engine.options();
            let mut pipeline = WholePipeline::open(&file, &dir.root, &engine)?;
            let prepared = pipeline.prepare(&messages, &images)?;
            vec![pipeline.generate(&prepared, &options, &mut on_token)?]
        }
        Runnable::Trio(trio) => {
            let mut pipeline = open(&dir.root, &trio, &arguments.engine)?;
            let usual = usize::try_from(DEFAULT_FRAMES)?;
            let clips = arguments.video.iter();
            let clips = clips.map(|path| pipeline.take_clip(path, usual));
            let clips = clips.collect::<Result<Vec<_>, _>>()?;
            let prepared = pipeline.prepare_with_clips(&messages, &images, &clips)?;
            let mut last = pipeline.generate(&prepared, None, &options, &mut on_token)?;
            let mut answers = Vec::new();
            for question in &arguments.then {
                if !quiet_stream {
                    anstream::println!("\n> {question}");
                }
                messages.push(Message::assistant(last.text.clone()));
                messages.push(Message::user(0, question.as_str()));
                let prepared = pipeline.prepare_follow_up(&last, &messages, &[])?;
                let next =
                    pipeline.generate(&prepared, Some(&last.cache), &options, &mut on_token)?;
                answers.push(std::mem::replace(&mut last, next));
            }
            answers.push(last);
            answers
        }
    };
    if let Some(error) = failed
        && error.kind() != std::io::ErrorKind::BrokenPipe
    {
        return Err(error).context("writing the answer");
    }
    if arguments.json {
        let mut documents: Vec<_> = answers.iter().map(document).collect();
        let further = documents.split_off(1);
        let mut first = documents.remove(0);
        if !further.is_empty() {
            first["then"] = further.into();
        }
        first["schema_version"] = 1.into();
        print_json(&first)?;
    } else {
        anstream::println!();
        answers.iter().for_each(|answer| report(answer, global));
    }
    Ok(Outcome::Done)
}

/// Opens what answers questions; `root` holds the configurations.
pub(super) fn open(root: &Path, trio: &Trio, engine: &Engine) -> anyhow::Result<VlmPipeline> {
    let options = engine.options();
    open_through(root, trio, &mut |file| Session::open(file, &options))
}

/// The same, each file through `open`.
pub(super) fn open_through(
    root: &Path,
    trio: &Trio,
    open: &mut dyn FnMut(&Path) -> Result<Session, RuntimeError>,
) -> anyhow::Result<VlmPipeline> {
    let files = VlmFiles {
        vision_encoder: trio.vision.clone(),
        embed_tokens: trio.embed.clone(),
        decoder: trio.decoder.clone(),
        configs: root.to_owned(),
    };
    let pipeline = VlmPipeline::open_through(&files, trio.heads, open)?;
    let mut pipeline = pipeline.with_merged_crops(trio.merged);
    if let Some(video) = &trio.video {
        let clips = ClipEncoder::from_session(open(video)?, &files.configs)?;
        pipeline = pipeline.with_clips(clips);
    }
    Ok(match &trio.prompt {
        Some(prompt) => pipeline.with_prompt_session(open(prompt)?)?,
        None => pipeline,
    })
}

pub(super) fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn decode_millis(answer: &Generation) -> Option<f64> {
    let steps = &answer.timing.decode;
    let total: Duration = steps.iter().sum();
    (!steps.is_empty()).then(|| millis(total) / steps.len() as f64)
}

fn report(answer: &Generation, global: &Global) {
    let decode =
        decode_millis(answer).map_or(String::new(), |ms| format!(", {ms:.2} ms per token"));
    global.say(format!(
        "{} prompt tokens ({} visual), vision {:.1} ms, prefill {:.1} ms{decode}, cache {}",
        answer.prompt_tokens,
        answer.visual_tokens,
        millis(answer.timing.vision),
        millis(answer.timing.prefill),
        super::style::bytes(answer.cache_bytes as u64)
    ));
}

fn document(answer: &Generation) -> serde_json::Value {
    let stop = match answer.stop {
        Stop::Eos => "eos",
        Stop::Length => "length",
        Stop::Caller => "caller",
    };
    json!({
        "text": answer.text,
        "tokens": answer.tokens,
        "stop": stop,
        "prompt": answer.prompt,
        "prompt_tokens": answer.prompt_tokens,
        "visual_tokens": answer.visual_tokens,
        "cache_lengths": answer.cache_lengths,
        "cache_bytes": answer.cache_bytes,
        "milliseconds": {
            "vision": millis(answer.timing.vision),
            "embed": millis(answer.timing.embed),
            "prefill": millis(answer.timing.prefill),
            "decode_per_token": decode_millis(answer),
        },
    })
}
