//! What a model's process is told and what it answers: plain data, one JSON line each.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The files of a model, those that it has.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Files {
    /// Vision encoder.
    pub vision: Option<PathBuf>,
    /// Whether that takes clips.
    pub clips: bool,
    /// Token embedding.
    pub embed: Option<PathBuf>,
    /// Decoder; of one in two files the one that goes on from a cache.
    pub decoder: Option<PathBuf>,
    /// The decoder that runs over the prompt, where that is another file.
    pub prompt: Option<PathBuf>,
    /// The model in one file.
    pub whole: Option<PathBuf>,
}

/// What a model is run on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inputs {
    /// Images (crops, clips) in the prompt.
    pub images: usize,
    /// Height and width in pixels, where the file fixes none.
    pub image_size: Option<[usize; 2]>,
    /// Frames of a clip, where the file fixes none.
    pub frames: usize,
    /// Tokens of text in front of the images and behind them.
    pub text: [usize; 2],
    /// Features of each image where no encoder gives them.
    pub features: usize,
    /// Patches on the edge of a token, for encoders of rows of patches.
    pub merge: usize,
    /// Ids are below this.
    pub vocabulary: i64,
    /// The id that images have in the prompt, where the model looks for it.
    pub placeholder: Option<i64>,
    /// Width of the unmodified model's embeddings, where it is known: one more is a marker channel.
    pub width: Option<usize>,
    /// Tokens to decode in a turn.
    pub steps: usize,
    /// Seed of ids, pixels and features.
    pub seed: u64,
}

/// A model to measure.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// Its files.
    pub files: Files,
    /// Heads of the cache, (count, width), where the decoder does not declare them.
    pub heads: Option<(usize, usize)>,
    /// Threads inside an operator.
    pub threads: usize,
    /// Execution providers, best first.
    pub providers: Vec<String>,
    /// What it is run on.
    pub inputs: Inputs,
}

/// Something to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    /// Everything that a question takes: vision encoder, embeddings, prompt, decode steps.
    Turn,
    /// A prompt of so many tokens of text, and decode steps on its cache.
    Length(usize),
    /// The head alone (what turns the last layer's output into logits) on so many rows.
    Head(usize),
    /// Peak memory so far.
    Memory,
    /// Some turns with ONNX Runtime's profiler; profiles are written into this folder.
    Profile(PathBuf),
}

/// What it gave. Times are in seconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// The model is open.
    Ready,
    /// Of [`Task::Turn`].
    Turn(Box<Turn>),
    /// Of [`Task::Length`].
    Length(LengthTime),
    /// Of [`Task::Head`].
    Head(f64),
    /// Of [`Task::Memory`], in bytes; or why it is not known.
    Memory(std::result::Result<u64, String>),
    /// Of [`Task::Profile`]: the profile of the vision encoder and of the decoder's run over the prompt.
    Profile {
        /// Vision encoder.
        vision: Option<PathBuf>,
        /// Decoder, or the model in one file.
        prefill: Option<PathBuf>,
    },
    /// It could not be done.
    Failed(String),
}

/// A turn: how long each part took, and what it was.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Turn {
    /// Vision encoder, all images.
    pub vision: Option<f64>,
    /// Embeddings of the prompt.
    pub embed: Option<f64>,
    /// The decoder over the prompt; of a model in one file all of it.
    pub prefill: Option<f64>,
    /// Each decode step: the decoder over one token, on the cache that the prompt leaves.
    pub decode: Vec<f64>,
    /// The embedding of each of these tokens.
    pub decode_embed: Vec<f64>,
    /// Tokens of the prompt, image features included.
    pub prompt_tokens: usize,
    /// Image features among them.
    pub visual_tokens: usize,
    /// Tokens in each layer's cache behind the prompt.
    pub cache_lengths: Vec<usize>,
    /// Bytes of the cache behind the prompt.
    pub cache_bytes: usize,
    /// Bytes of one element of the cache.
    pub cache_element: usize,
    /// Rows of logits that the prompt gives.
    pub logits_rows: usize,
}

/// The base at some length.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LengthTime {
    /// The prompt.
    pub prefill: f64,
    /// Each decode step on its cache; none where the decoder has none.
    pub decode: Vec<f64>,
}
