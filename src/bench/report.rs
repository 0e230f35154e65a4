//! The numbers, as one document.

use serde::Serialize;

use super::ideal::{Base, Curve};
use super::job::Turn;
use super::profile::Profile;
use super::rounds::Measured;
use super::schedule::Schedule;
use crate::statistics::median;

/// Version of the JSON document.
pub const SCHEMA_VERSION: u32 = 1;

/// A number, or why there is none.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Reading<T> {
    /// Measured.
    Known(T),
    /// Not measured.
    Unknown {
        /// Why.
        not_measured: String,
    },
}

impl<T> Reading<T> {
    /// Of what may be missing.
    fn or(value: Option<T>, why: impl FnOnce() -> String) -> Self {
        match value {
            Some(value) => Self::Known(value),
            None => Self::Unknown {
                not_measured: why(),
            },
        }
    }

    /// The number.
    pub fn known(&self) -> Option<&T> {
        match self {
            Self::Known(value) => Some(value),
            Self::Unknown { .. } => None,
        }
    }

    /// Why there is none.
    pub fn why(&self) -> Option<&str> {
        match self {
            Self::Known(_) => None,
            Self::Unknown { not_measured } => Some(not_measured),
        }
    }
}

/// A duration over the rounds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Time {
    /// Median of the rounds, milliseconds.
    pub median_ms: f64,
    /// Shortest.
    pub min_ms: f64,
    /// Longest.
    pub max_ms: f64,
    /// The base's time as a multiple of this, median of the rounds' ratios; none where the base has none.
    pub speedup: Option<f64>,
    /// Of each round, in order.
    pub rounds_ms: Vec<f64>,
}

/// What a schedule would ideally take.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Ideal {
    /// Median of the rounds, milliseconds.
    pub median_ms: f64,
    /// Ideal time divided by measured time, median of the rounds' ratios.
    pub share: f64,
    /// Of each round, in order.
    pub rounds_ms: Vec<f64>,
}

/// Keys and values behind the prompt.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CacheReport {
    /// Bytes of all keys and values, as they are.
    pub bytes: usize,
    /// The base's bytes as a multiple of these.
    pub smaller: Option<f64>,
    /// Tokens in each layer's.
    pub tokens_by_layer: Vec<usize>,
    /// Bytes by the schedule.
    pub scheduled_bytes: Option<usize>,
    /// Whether lengths and bytes are exactly the schedule's.
    pub as_scheduled: Option<bool>,
}

/// One model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelReport {
    /// Name in tables.
    pub name: String,
    /// Directory or file.
    pub path: String,
    /// The recipe that it is stamped with; none of the base, or of a model that no recipe made.
    pub recipe: Option<String>,
    /// Tokens of the prompt, image features included.
    pub prompt_tokens: usize,
    /// Image features among them.
    pub visual_tokens: usize,
    /// Visual tokens that a decoder layer sees on average.
    pub average_visual_tokens: Option<f64>,
    /// Tokens that each decoder layer works on, text included.
    pub tokens_by_layer: Option<Vec<usize>>,
    /// Rows of logits that the prompt gives.
    pub logits_rows: usize,
    /// Vision encoder, all images.
    pub vision: Reading<Time>,
    /// Embeddings of the prompt.
    pub embed: Reading<Time>,
    /// The decoder over the prompt.
    pub prefill: Reading<Time>,
    /// What the schedule would ideally take for it.
    pub ideal_prefill: Reading<Ideal>,
    /// Vision encoder, embeddings and prompt.
    pub time_to_first_token: Reading<Time>,
    /// A decode step of the decoder, on the prompt's cache.
    pub decode_step: Reading<Time>,
    /// What the schedule's cache would ideally take for it.
    pub ideal_decode_step: Reading<Ideal>,
    /// Decode steps, each with the embedding of its token.
    pub tokens_per_second: Reading<f64>,
    /// Cache behind the prompt.
    pub cache: Reading<CacheReport>,
    /// Largest resident size of the model's process, after opening and warming up.
    pub peak_memory_bytes: Reading<u64>,
}

/// The unmodified model at a length.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LengthReport {
    /// Tokens of the prompt.
    pub tokens: usize,
    /// The decoder over it.
    pub prefill_ms: f64,
    /// A decode step on its cache.
    pub decode_step_ms: Option<f64>,
    /// The decoder over it, in each round.
    pub prefill_rounds_ms: Vec<f64>,
    /// A decode step on its cache, in each round; empty where there is none.
    pub decode_step_rounds_ms: Vec<f64>,
}

/// The unmodified model's head on some rows.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HeadReport {
    /// Rows.
    pub rows: usize,
    /// Median.
    pub median_ms: f64,
    /// Of each round, in order.
    pub rounds_ms: Vec<f64>,
}

/// How it was measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Circumstances {
    /// File name of ONNX Runtime's library, which holds its version.
    pub library: String,
    /// What the library says of its build.
    pub build: String,
    /// Threads inside an operator.
    pub threads: usize,
    /// Execution providers, best first; empty is the CPU.
    pub providers: Vec<String>,
    /// Rounds that count.
    pub rounds: usize,
    /// Turns of each model before them.
    pub warm_up: usize,
    /// Images in the prompt.
    pub images: usize,
    /// Tokens of text in it.
    pub text_tokens: usize,
    /// Decode steps in a turn.
    pub new_tokens: usize,
    /// Seed of pixels, ids and features.
    pub seed: u64,
}

/// Everything.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// How it was measured.
    pub measured: Circumstances,
    /// The models, the base first.
    pub models: Vec<ModelReport>,
    /// The base at the lengths from which ideals are taken.
    pub base_at_lengths: Reading<Vec<LengthReport>>,
    /// The base's head.
    pub base_head: Reading<Vec<HeadReport>>,
    /// Where the time goes, if that was asked for.
    pub profiles: Option<Vec<Profile>>,
}

/// What is known of a model besides its times.
#[derive(Debug, Clone)]
pub struct About {
    /// Name in tables.
    pub name: String,
    /// Directory or file.
    pub path: String,
    /// Recipe, if it is stamped with one.
    pub recipe: Option<String>,
    /// Tokens by layer; or why they are not known.
    pub schedule: Result<Schedule, String>,
    /// Whether it has a vision encoder of its own.
    pub vision: bool,
    /// Whether it has a token embedding of its own.
    pub embed: bool,
    /// Whether it is one file.
    pub whole: bool,
    /// Whether it has a decoder of its own.
    pub decoder: bool,
}

/// A turn's step: the median of its steps.
fn step(turn: &Turn) -> Option<f64> {
    (!turn.decode.is_empty()).then(|| median(&turn.decode))
}

/// Everything before the first token.
fn first_token(turn: &Turn, whole: bool) -> Option<f64> {
    match whole {
        true => turn.prefill,
        false => Some(turn.vision? + turn.embed? + turn.prefill?),
    }
}

/// A part of every turn, in rounds, at least one; none if a turn has not got it.
fn series(turns: &[Turn], part: impl Fn(&Turn) -> Option<f64>) -> Option<Vec<f64>> {
    let all: Option<Vec<f64>> = turns.iter().map(part).collect();
    all.filter(|all| !all.is_empty())
}

/// Median of the ratios of two series.
fn ratio(above: &[f64], below: &[f64]) -> f64 {
    let each: Vec<f64> = above.iter().zip(below).map(|(a, b)| a / b).collect();
    median(&each)
}

fn milliseconds(seconds: &[f64]) -> Vec<f64> {
    seconds.iter().map(|s| s * 1e3).collect()
}

/// Of seconds in rounds, beside the base's.
fn time(own: &[f64], base: Option<&Vec<f64>>) -> Time {
    Time {
        median_ms: median(own) * 1e3,
        min_ms: own.iter().copied().fold(f64::INFINITY, f64::min) * 1e3,
        max_ms: own.iter().copied().fold(f64::NEG_INFINITY, f64::max) * 1e3,
        speedup: base.map(|base| ratio(base, own)),
        rounds_ms: milliseconds(own),
    }
}

/// What each round measured of the base.
fn bases(measured: &Measured, depth: usize) -> Vec<Base> {
    let own = measured
        .turns
        .first()
        .map(Vec::as_slice)
        .unwrap_or_default();
    (0..measured.rounds)
        .filter_map(|round| {
            let turn = own.get(round)?;
            let lengths = || measured.lengths.iter();
            let prefill = lengths().filter_map(|(n, t)| Some((*n, t.get(round)?.prefill)));
            let steps = lengths().filter_map(|(n, t)| {
                let steps = &t.get(round)?.decode;
                (!steps.is_empty()).then(|| (*n, median(steps)))
            });
            let heads = measured.heads.iter();
            let heads = heads.filter_map(|(n, t)| Some((*n, *t.get(round)?)));
            let whole = turn.prefill.map(|t| (turn.prompt_tokens, t));
            let step = step(turn).map(|t| (turn.prompt_tokens, t));
            Some(Base {
                depth,
                // Its own turn first: of two points at one length the first counts.
                prefill: Curve::new(whole.into_iter().chain(prefill).collect()),
                head: Curve::new(heads.collect()),
                step: Curve::new(step.into_iter().chain(steps).collect()),
            })
        })
        .collect()
}

/// Ideal seconds of each round beside the measured ones.
fn ideal(own: Option<&Vec<f64>>, ideal: &[f64]) -> Option<Ideal> {
    let own = own?;
    let share = ratio(ideal, own);
    share.is_finite().then(|| Ideal {
        median_ms: median(ideal) * 1e3,
        share,
        rounds_ms: milliseconds(ideal),
    })
}

impl Report {
    /// Puts numbers and circumstances together; models are in the order of `about`, the base first.
    pub fn new(
        about: &[About],
        measured: &Measured,
        circumstances: Circumstances,
        profiles: Option<Vec<Profile>>,
    ) -> Self {
        let models = about.iter().enumerate();
        let models = models.map(|(at, about)| model(about, at, measured));
        let missing = || {
            let why = measured.no_lengths.clone();
            why.unwrap_or_else(|| "no rewritten model asks for it".into())
        };
        let lengths = measured.lengths.iter().map(|(tokens, times)| {
            let prefill: Vec<f64> = times.iter().map(|t| t.prefill).collect();
            let steps: Vec<f64> = times.iter().map(|t| median(&t.decode)).collect();
            LengthReport {
                tokens: *tokens,
                prefill_ms: median(&prefill) * 1e3,
                decode_step_ms: Some(median(&steps) * 1e3).filter(|ms| ms.is_finite()),
                prefill_rounds_ms: milliseconds(&prefill),
                decode_step_rounds_ms: milliseconds(&steps)
                    .into_iter()
                    .filter(|ms| ms.is_finite())
                    .collect(),
            }
        });
        let lengths: Vec<LengthReport> = lengths.collect();
        let heads = measured.heads.iter().map(|(rows, times)| HeadReport {
            rows: *rows,
            median_ms: median(times) * 1e3,
            rounds_ms: milliseconds(times),
        });
        let heads: Vec<HeadReport> = heads.collect();
        Self {
            schema_version: SCHEMA_VERSION,
            measured: circumstances,
            models: models.collect(),
            base_at_lengths: Reading::or(Some(lengths).filter(|l| !l.is_empty()), missing),
            base_head: Reading::or(Some(heads).filter(|h| !h.is_empty()), missing),
            profiles,
        }
    }
}

/// Why a part of a model has no time.
fn no_part(about: &About, has: bool, what: &str) -> String {
    match (about.whole, has) {
        (true, _) => "the model is one file, whose parts are not timed apart".into(),
        (false, false) => format!("the model has no {what}"),
        (false, true) => format!("the {what} was not run"),
    }
}

fn model(about: &About, at: usize, measured: &Measured) -> ModelReport {
    let own = measured
        .turns
        .get(at)
        .map(Vec::as_slice)
        .unwrap_or_default();
    let base = measured
        .turns
        .first()
        .map(Vec::as_slice)
        .unwrap_or_default();
    let first = own.first().cloned().unwrap_or_default();
    let timed = |part: &dyn Fn(&Turn) -> Option<f64>| {
        let own = series(own, part);
        let time = own
            .as_ref()
            .map(|own| time(own, series(base, part).as_ref()));
        (own, time)
    };
    let (_, vision) = timed(&|t| t.vision);
    let (_, embed) = timed(&|t| t.embed);
    let (prefills, prefill) = timed(&|t| t.prefill);
    let (_, first_time) = timed(&|t| first_token(t, about.whole));
    let (steps, decode) = timed(&step);
    let schedule = about.schedule.as_ref();
    let no_decode = || match (about.whole, about.decoder) {
        (true, _) => {
            "the model is one file without a cache: each token takes a run over all before it"
                .into()
        }
        (false, true) => {
            "the decoder has no cache to go on from, or no tokens were to be decoded".into()
        }
        (false, false) => no_part(about, false, "decoder"),
    };

    // Ideals, round by round.
    let depth = schedule.map_or(0, |s| s.tokens.len());
    let bases = bases(measured, depth);
    let why_not = || match (&measured.no_lengths, schedule) {
        (Some(why), _) => why.clone(),
        (None, Err(why)) => why.clone(),
        (None, Ok(_)) => "the unmodified model was not measured at other lengths".into(),
    };
    let ready = measured.no_lengths.is_none() && !measured.heads.is_empty() && depth > 0;
    let ideals = |of: &dyn Fn(&Base, &Schedule) -> f64| -> Vec<f64> {
        let schedule = schedule.ok().filter(|_| ready);
        let schedule = schedule.into_iter();
        schedule
            .flat_map(|s| bases.iter().map(move |b| of(b, s)))
            .collect()
    };
    let rows = first.logits_rows;
    let prefill_ideal = ideal(
        prefills.as_ref(),
        &ideals(&|b, s| b.prefill(&s.tokens, rows)),
    );
    let step_ideal = ideal(steps.as_ref(), &ideals(&|b, s| b.step(&s.tokens)));

    let per_token = series(own, |t| {
        let embed = if t.decode_embed.is_empty() {
            0.0
        } else {
            median(&t.decode_embed)
        };
        Some(step(t)? + embed)
    });
    let cache = (!first.cache_lengths.is_empty()).then(|| {
        let scheduled = schedule.ok().and_then(|s| s.cache_bytes);
        let base_bytes = base.first().map(|t| t.cache_bytes).filter(|n| *n > 0);
        CacheReport {
            bytes: first.cache_bytes,
            smaller: base_bytes.map(|n| n as f64 / first.cache_bytes as f64),
            tokens_by_layer: first.cache_lengths.clone(),
            scheduled_bytes: scheduled,
            as_scheduled: schedule.ok().zip(scheduled).map(|(s, bytes)| {
                bytes == first.cache_bytes && s.holds(&first.cache_lengths, first.prompt_tokens)
            }),
        }
    });
    let memory = measured.memory.get(at).cloned();
    let memory = memory.unwrap_or_else(|| Err("it was not asked for".into()));
    ModelReport {
        name: about.name.clone(),
        path: about.path.clone(),
        recipe: about.recipe.clone(),
        prompt_tokens: first.prompt_tokens,
        visual_tokens: first.visual_tokens,
        average_visual_tokens: schedule.ok().map(Schedule::average),
        tokens_by_layer: schedule.ok().map(|s| s.tokens.clone()),
        logits_rows: rows,
        vision: Reading::or(vision, || no_part(about, about.vision, "vision encoder")),
        embed: Reading::or(embed, || no_part(about, about.embed, "token embedding")),
        prefill: Reading::or(prefill, || no_part(about, about.decoder, "decoder")),
        ideal_prefill: Reading::or(prefill_ideal, why_not),
        time_to_first_token: Reading::or(first_time, || {
            let parts = [
                (about.vision, "vision encoder"),
                (about.embed, "token embedding"),
                (about.decoder, "decoder"),
            ];
            let missing = parts.iter().find(|p| !p.0).map_or("decoder", |p| p.1);
            no_part(about, false, missing)
        }),
        decode_step: Reading::or(decode, no_decode),
        ideal_decode_step: Reading::or(step_ideal, || match steps {
            Some(_) => why_not(),
            None => no_decode(),
        }),
        tokens_per_second: Reading::or(per_token.map(|t| 1.0 / median(&t)), no_decode),
        cache: Reading::or(cache, no_decode),
        peak_memory_bytes: match memory {
            Ok(bytes) => Reading::Known(bytes),
            Err(not_measured) => Reading::Unknown { not_measured },
        },
    }
}

#[cfg(test)]
pub(super) mod tests;
