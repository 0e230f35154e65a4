//! Clips: frames out of a folder, a GIF or, where an `ffmpeg` program is there, any video file.
//!
//! A model sees a few frames of a clip, taken at even steps. Video-LLaVA takes 8 by
//! `np.linspace(0, frames - 1, 8, dtype=int)` (`load_and_transform_video` in LanguageBind's
//! `processing_video.py`, which Video-LLaVA's repository carries): the first and the last frame are among
//! them, and a clip of fewer frames repeats some. Frames that are not taken are not kept.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufReader, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use image::codecs::gif::GifDecoder;
use image::{AnimationDecoder, DynamicImage};
use ndarray::Axis;

use super::error::{Result, RuntimeError};
use super::image::{ImageProcessor, Pixels, read_json};
use super::session::{Session, SessionOptions};
use super::tensor::Tensor;
use super::vision::{Inside, VisionEncoder, is_clips};

mod patches;

pub use patches::PatchClips;

/// Image files that a folder of frames may hold.
const FRAMES: [&str; 6] = ["png", "jpg", "jpeg", "gif", "bmp", "webp"];

/// The child process that reads video files, looked for on `PATH`.
const FFMPEG: &str = "ffmpeg";

/// A clip as a model is to see it.
#[derive(Debug, Clone, PartialEq)]
pub struct Clip {
    /// The frames that were taken.
    pub frames: Vec<Pixels>,
    /// How long the whole clip lasts, if the file says so.
    pub seconds: Option<f64>,
}

impl From<Vec<Pixels>> for Clip {
    fn from(frames: Vec<Pixels>) -> Self {
        Self {
            frames,
            seconds: None,
        }
    }
}

/// Which frames to take: told how many there are and, if the file says so, how many seconds they last; the
/// indices are ascending.
pub type Choose<'a> = &'a dyn Fn(usize, Option<f64>) -> Vec<usize>;

/// Indices of `count` frames at even steps among `total`, the first and the last included: NumPy's
/// `linspace(0, total - 1, count, dtype=int)`. Empty if there is no frame.
pub fn even_steps(total: usize, count: usize) -> Vec<usize> {
    if total == 0 {
        return Vec::new();
    }
    let last = total - 1;
    let step = last as f64 / count.saturating_sub(1).max(1) as f64;
    (0..count)
        .map(|i| match i + 1 == count && i > 0 {
            true => last,
            false => (i as f64 * step).floor() as usize,
        })
        .collect()
}

/// `count` frames of a clip at even steps, see [`take`].
///
/// # Errors
/// As [`take`].
pub fn sample(path: impl AsRef<Path>, count: usize) -> Result<Vec<Pixels>> {
    Ok(take(path, &|total, _| even_steps(total, count))?.frames)
}

/// Frames of a clip: of a folder, its image files sorted by name (numbers in names by their value); of a GIF, its
/// frames; of any other file what `ffmpeg` decodes.
///
/// # Errors
/// There is no such file or no frame in it, a frame cannot be decoded, or the file needs `ffmpeg` and there
/// is none.
pub fn take(path: impl AsRef<Path>, choose: Choose<'_>) -> Result<Clip> {
    let path = path.as_ref();
    let meta = std::fs::metadata(path).map_err(RuntimeError::io(path))?;
    if meta.is_dir() {
        return folder(path, choose);
    }
    let mut start = [0; 6];
    let mut file = File::open(path).map_err(RuntimeError::io(path))?;
    match file.read_exact(&mut start) {
        Ok(()) if start.starts_with(b"GIF8") => gif(path, choose),
        Ok(()) => video(OsStr::new(FFMPEG), path, choose),
        Err(e) if e.kind() == ErrorKind::UnexpectedEof => Err(failed(
            path,
            format!(
                "{} bytes are no video; expected a folder of frames, a GIF or a video file",
                meta.len()
            ),
        )),
        Err(e) => Err(RuntimeError::io(path)(e)),
    }
}

fn failed(path: &Path, reason: String) -> RuntimeError {
    RuntimeError::Image {
        name: path.display().to_string(),
        reason,
    }
}

/// The frames that `get` gives for each of the wanted indices, in order; one that is wanted twice is got once.
fn pick(wanted: &[usize], mut get: impl FnMut(usize) -> Result<Pixels>) -> Result<Vec<Pixels>> {
    let mut known: BTreeMap<usize, Pixels> = BTreeMap::new();
    for &index in wanted {
        if let std::collections::btree_map::Entry::Vacant(place) = known.entry(index) {
            place.insert(get(index)?);
        }
    }
    Ok(wanted
        .iter()
        .filter_map(|i| known.get(i).cloned())
        .collect())
}

fn folder(path: &Path, choose: Choose<'_>) -> Result<Clip> {
    let mut files: Vec<PathBuf> = Vec::new();
    for entry in std::fs::read_dir(path).map_err(RuntimeError::io(path))? {
        let file = entry.map_err(RuntimeError::io(path))?.path();
        let kind = file.extension().map(|e| e.to_string_lossy().to_lowercase());
        if kind.is_some_and(|k| FRAMES.contains(&k.as_str())) && file.is_file() {
            files.push(file);
        }
    }
    if files.is_empty() {
        return Err(failed(
            path,
            format!(
                "the folder holds no frames; expected image files ({})",
                FRAMES.join(", ")
            ),
        ));
    }
    files.sort_by_cached_key(|file| {
        in_order(&file.file_name().unwrap_or_default().to_string_lossy())
    });
    let wanted = choose(files.len(), None);
    Ok(pick(&wanted, |index| Pixels::open(&files[index]))?.into())
}

/// What names are sorted by: runs of digits by the number they are, so that `10.png`
/// comes behind `9.png`, everything else by its characters. (A name of equal numbers,
/// `1` and `01`, goes by itself.)
fn in_order(name: &str) -> (Vec<(String, usize, String)>, String) {
    let mut pieces = Vec::new();
    let mut rest = name;
    while !rest.is_empty() {
        let digit = |c: char| c.is_ascii_digit();
        let (text, tail) = rest.split_at(rest.find(digit).unwrap_or(rest.len()));
        let (number, tail) = tail.split_at(tail.find(|c| !digit(c)).unwrap_or(tail.len()));
        let number = number.trim_start_matches('0').to_owned();
        // Longer numbers are larger.
        pieces.push((text.to_owned(), number.len(), number));
        rest = tail;
    }
    (pieces, name.to_owned())
}

fn gif(path: &Path, choose: Choose<'_>) -> Result<Clip> {
    let wrong =
        |e: image::ImageError| failed(path, format!("{e}; the file is damaged or not complete"));
    let frames = || {
        let file = File::open(path).map_err(RuntimeError::io(path))?;
        let decoder = GifDecoder::new(BufReader::new(file)).map_err(wrong)?;
        Ok::<_, RuntimeError>(decoder.into_frames())
    };
    // How many there are, and how long they last, is known at the end only.
    let (mut total, mut seconds) = (0, 0.0);
    for frame in frames()? {
        let (thousandths, divisor) = frame.map_err(wrong)?.delay().numer_denom_ms();
        seconds += f64::from(thousandths) / f64::from(divisor.max(1)) / 1e3;
        total += 1;
    }
    let seconds = Some(seconds).filter(|s| *s > 0.0);
    if total == 0 {
        return Err(failed(path, "the GIF holds no frame".into()));
    }
    let wanted = choose(total, seconds);
    let mut known = BTreeMap::new();
    for (index, frame) in frames()?.enumerate() {
        if wanted.contains(&index) {
            let frame = frame.map_err(wrong)?.into_buffer();
            known.insert(index, Pixels::from_image(DynamicImage::ImageRgba8(frame)));
        }
    }
    let frames = pick(&wanted, |index| {
        known.remove(&index).ok_or_else(|| {
            failed(
                path,
                format!("frame {index} of {total} was there once and then not"),
            )
        })
    })?;
    Ok(Clip { frames, seconds })
}

/// Frames of a video file. The decoder is run twice: to count the frames, since what a file says of its length is
/// often wrong, and to write those that are wanted.
fn video(ffmpeg: &OsStr, path: &Path, choose: Choose<'_>) -> Result<Clip> {
    let input = std::path::absolute(path).map_err(RuntimeError::io(path))?;
    let attempt = |mode: [&str; 2], last: &[&OsStr]| -> Result<std::process::Output> {
        let plain = ["-nostdin", "-v", "error", "-progress", "pipe:1", "-i"];
        let child = Command::new(ffmpeg)
            .args(plain)
            .arg(&input)
            .args(["-map", "0:v:0"])
            .args(mode)
            .args(last)
            .stdin(Stdio::null())
            .output();
        child.map_err(|e| match e.kind() {
            ErrorKind::NotFound => failed(
                path,
                format!(
                    "it is no folder of frames and no GIF, and to read other videos the program '{}' is needed, \
                     which is not on PATH: install ffmpeg, or give a folder of frames or a GIF",
                    ffmpeg.to_string_lossy()
                ),
            ),
            _ => failed(path, format!("{} does not start: {e}", ffmpeg.to_string_lossy())),
        })
    };
    // Every frame as it is, none repeated or left out for an even rate. Before version 5.1 the option had
    // another name.
    let run = |last: &[&OsStr]| -> Result<Vec<u8>> {
        let mut output = attempt(["-fps_mode", "passthrough"], last)?;
        if !output.status.success() && String::from_utf8_lossy(&output.stderr).contains("fps_mode")
        {
            output = attempt(["-vsync", "passthrough"], last)?;
        }
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            // The first line names the cause, further ones what became of it.
            let said = said.trim().lines().next().unwrap_or("(nothing)").to_owned();
            let why = format!("ffmpeg cannot decode it ({}): {said}", output.status);
            return Err(failed(path, why));
        }
        Ok(output.stdout)
    };
    let passthrough = ["-f", "null", "-"].map(OsStr::new);
    let report = run(&passthrough)?;
    let report = String::from_utf8_lossy(&report);
    let last_of = |key: &str| {
        let mut values = report.lines().filter_map(|l| l.trim().strip_prefix(key));
        values.next_back().map(str::trim)
    };
    let total = last_of("frame=").and_then(|n| n.parse::<usize>().ok());
    let micros = last_of("out_time_us=").and_then(|n| n.parse::<f64>().ok());
    let seconds = micros.map(|n| n / 1e6).filter(|s| *s > 0.0);
    let Some(total) = total.filter(|n| *n > 0) else {
        return Err(failed(path, "ffmpeg finds no frame in it".into()));
    };
    let wanted = choose(total, seconds);
    let mut once = wanted.clone();
    once.dedup();
    let place = tempfile::tempdir().map_err(RuntimeError::io(&std::env::temp_dir()))?;
    let chosen: Vec<String> = once.iter().map(|n| format!("eq(n\\,{n})")).collect();
    let filter = format!("select={}", chosen.join("+"));
    let target = place.path().join("%06d.png");
    let options = ["-vf", filter.as_str(), "-f", "image2"].map(OsStr::new);
    let mut last = options.to_vec();
    last.push(target.as_os_str());
    run(&last)?;
    let written = std::fs::read_dir(place.path()).map_err(RuntimeError::io(place.path()))?;
    let written = written.count();
    if written != once.len() {
        let why = format!(
            "ffmpeg wrote {written} frames, expected {} of the {total} that it counted",
            once.len()
        );
        return Err(failed(path, why));
    }
    let frames = pick(&wanted, |index| {
        let number = once.iter().position(|n| *n == index).unwrap_or(0) + 1;
        Pixels::open(place.path().join(format!("{number:06}.png")))
    })?;
    Ok(Clip { frames, seconds })
}

/// How a model's clips are prepared.
#[derive(Debug, Clone, PartialEq)]
pub struct ClipProcessor {
    /// What is done to each frame.
    pub images: ImageProcessor,
    /// Frames of a clip that the configuration asks for.
    pub frames: Option<usize>,
    /// Frames to take of a second, that the configuration asks for.
    pub rate: Option<f64>,
}

impl ClipProcessor {
    /// Reads `video_preprocessor_config.json` or the `video_processor` part of `processor_config.json`; a model
    /// that has neither prepares frames as it does images.
    ///
    /// # Errors
    /// As [`ImageProcessor::from_dir`].
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let own = dir.join("video_preprocessor_config.json");
        let shared = dir.join("processor_config.json");
        let part = read_json(&shared)?.and_then(|c| c.get("video_processor").cloned());
        let (config, path) = match (read_json(&own)?, part) {
            (Some(config), _) => (config, own),
            (None, Some(config)) => (config, shared),
            (None, None) => {
                let images = ImageProcessor::from_dir(dir)?;
                return Ok(Self {
                    images,
                    frames: None,
                    rate: None,
                });
            }
        };
        let frames = match config.get("num_frames") {
            None | Some(serde_json::Value::Null) => None,
            Some(value) => {
                let count = value.as_u64().and_then(|n| usize::try_from(n).ok());
                let count = count.filter(|n| (1..=1024).contains(n)).ok_or_else(|| {
                    let reason =
                        format!("`num_frames` is {value}, expected a number from 1 to 1024");
                    RuntimeError::config(&path, reason)
                })?;
                Some(count)
            }
        };
        let rate = match config.get("fps") {
            None | Some(serde_json::Value::Null) => None,
            Some(value) => {
                let rate = value.as_f64().filter(|n| *n > 0.0);
                Some(rate.ok_or_else(|| {
                    let reason = format!("`fps` is {value}, expected a number above 0");
                    RuntimeError::config(&path, reason)
                })?)
            }
        };
        Ok(Self {
            images: ImageProcessor::from_json(&config, &path)?,
            frames,
            rate,
        })
    }
}

/// The part of a model that sees clips.
#[derive(Debug)]
pub struct ClipEncoder {
    /// Pixels `[clips, frames, 3, height, width]` to features.
    pub encoder: VisionEncoder,
    /// Frames to pixels.
    pub processor: ClipProcessor,
    /// Frames of a clip, where the model takes one number only.
    pub fixed: Option<usize>,
}

impl ClipEncoder {
    /// Opens an encoder of clips; `configs` is the model's directory.
    ///
    /// # Errors
    /// The file does not load or takes no clips, or a configuration is damaged.
    pub fn open(file: &Path, configs: &Path, options: &SessionOptions) -> Result<Self> {
        Self::from_session(Session::open(file, options)?, configs)
    }

    /// Takes an open encoder of clips over; `configs` is the model's directory.
    ///
    /// # Errors
    /// The model takes no clips, or a configuration is damaged.
    pub fn from_session(session: Session, configs: &Path) -> Result<Self> {
        let processor = ClipProcessor::from_dir(configs)?;
        let inputs = session.inputs();
        // In a file of two towers it is told by its name.
        let port = inputs.iter().find(|p| is_clips(p)).or(inputs.first());
        let dims = port.map(|port| port.dims.clone()).filter(|d| d.len() == 5);
        let fixed = dims
            .as_ref()
            .ok_or_else(|| RuntimeError::Interface {
                model: session.model().to_string(),
                expected: "an encoder of clips, pixels [clips, frames, 3, height, width]".into(),
                found: session
                    .inputs()
                    .iter()
                    .map(ToString::to_string)
                    .collect::<Vec<_>>()
                    .join(", "),
            })?
            .get(1)
            .and_then(|dim| dim.fixed());
        Ok(Self {
            encoder: VisionEncoder::for_clips(session)?,
            processor,
            fixed,
        })
    }

    /// Frames to take of a clip: what the file fixes, else what the configuration says, else `usual`.
    pub fn frames(&self, usual: usize) -> usize {
        self.fixed.or(self.processor.frames).unwrap_or(usual)
    }

    /// Features of each clip, `[frames · features, width]`, frames in order.
    ///
    /// # Errors
    /// A clip has no frames, or not as many as the model takes; a frame cannot be resized; the run fails.
    pub fn encode(&mut self, clips: &[Clip]) -> Result<Vec<Tensor>> {
        let all = self.encode_inside(clips)?;
        Ok(all.into_iter().map(|(features, _)| features).collect())
    }

    /// The same, each with what the model gives besides.
    pub(super) fn encode_inside(&mut self, clips: &[Clip]) -> Result<Vec<(Tensor, Inside)>> {
        let mut features = Vec::with_capacity(clips.len());
        for Clip { frames: clip, .. } in clips {
            if clip.is_empty() || self.fixed.is_some_and(|n| n != clip.len()) {
                return Err(RuntimeError::Prompt(format!(
                    "a clip has {} frames; expected {}",
                    clip.len(),
                    self.fixed.map_or("1 or more".into(), |n| n.to_string())
                )));
            }
            let frames = clip
                .iter()
                .map(|frame| self.processor.images.process(frame))
                .collect::<Result<Vec<_>>>()?;
            let views: Vec<_> = frames.iter().map(|frame| frame.view()).collect();
            let all = ndarray::stack(Axis(0), &views);
            let all = all.map_err(|e| RuntimeError::Tensor(e.to_string()))?;
            let pixels = all.insert_axis(Axis(0)).into();
            features.extend(self.encoder.run_inside(pixels)?);
        }
        Ok(features)
    }
}

#[cfg(test)]
mod tests;
