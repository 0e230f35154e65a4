//! Models in turns: what slows a machine down for a while slows all of them down.

use std::path::Path;
use std::time::{Duration, Instant};

use super::error::{BenchError, Result};
use super::job::{LengthTime, Reply, Task, Turn};
use super::profile::Profile;
use super::subject::PROFILED as TURNS;

/// Carries out tasks: a model in this process, or one in a process of its own.
pub trait Performer {
    /// What it is called in messages.
    fn name(&self) -> &str;

    /// Carries out a task.
    ///
    /// # Errors
    /// The model cannot, or its process is gone.
    fn perform(&mut self, task: &Task) -> Result<Reply>;
}

/// How often.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Turns of each model that are not counted; at least one.
    pub warm_up: usize,
    /// Rounds; none: as many as fit into [`USUAL`], within [`LEAST`] and [`MOST`].
    pub runs: Option<usize>,
}

/// Time for the rounds, where their number is left open.
pub const USUAL: Duration = Duration::from_secs(45);
/// Rest in front of each turn: threads that have just computed wait for more on a core of their own for some
/// milliseconds, which the next model would share.
const REST: Duration = Duration::from_millis(20);
/// Rounds at least.
pub const LEAST: usize = 3;
/// Rounds at most.
pub const MOST: usize = 25;

/// What was measured, round by round.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Measured {
    /// By model, a turn for each round.
    pub turns: Vec<Vec<Turn>>,
    /// By model: bytes, or why they are not known.
    pub memory: Vec<std::result::Result<u64, String>>,
    /// The base at some lengths, a time for each round.
    pub lengths: Vec<(usize, Vec<LengthTime>)>,
    /// The base's head on some rows, a time for each round.
    pub heads: Vec<(usize, Vec<f64>)>,
    /// Why the base was not measured at lengths, if it was not.
    pub no_lengths: Option<String>,
    /// Rounds.
    pub rounds: usize,
}

/// Lengths and rows at which the base is measured besides its own turns; or why it is not.
pub type Sweep = std::result::Result<(Vec<usize>, Vec<usize>), String>;

/// One model's turn, or one point of the base: by its position in [`Measured`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unit {
    Model(usize),
    Length(usize),
    Head(usize),
}

/// Warms models up, asks `sweep` (given a turn of each) what is to be measured of the base, the first of them, and
/// measures everything in turns. Each round starts with another one, so that none always follows the same.
///
/// # Errors
/// A model cannot carry out its turn.
pub fn measure(
    models: &mut [&mut dyn Performer],
    settings: Settings,
    sweep: impl FnOnce(&[Turn]) -> Sweep,
    progress: &mut dyn FnMut(&str),
) -> Result<Measured> {
    let mut measured = Measured::default();
    let mut first = Vec::new();
    let started = Instant::now();
    for model in models.iter_mut() {
        progress(&format!("{}: warming up", model.name()));
        let mut last = turn(*model)?;
        for _ in 1..settings.warm_up.max(1) {
            last = turn(*model)?;
        }
        first.push(last);
        measured.memory.push(match model.perform(&Task::Memory)? {
            Reply::Memory(found) => found,
            other => return Err(unexpected(*model, &other)),
        });
        measured.turns.push(Vec::new());
    }
    let mut units: Vec<Unit> = (0..models.len()).map(Unit::Model).collect();
    if let Some(base) = models.first_mut() {
        let wanted = sweep(&first).and_then(|(lengths, heads)| {
            progress(&format!("{}: at other lengths", base.name()));
            // A head that cannot be cut out is no reason to measure nothing else.
            for &rows in &heads {
                head(*base, rows).map_err(|e| e.to_string())?;
            }
            for &tokens in &lengths {
                length(*base, tokens).map_err(|e| e.to_string())?;
            }
            Ok((lengths, heads))
        });
        match wanted {
            Ok((lengths, heads)) => {
                units.extend((0..lengths.len()).map(Unit::Length));
                units.extend((0..heads.len()).map(Unit::Head));
                measured.lengths = lengths.iter().map(|n| (*n, Vec::new())).collect();
                measured.heads = heads.iter().map(|n| (*n, Vec::new())).collect();
            }
            Err(why) => measured.no_lengths = Some(why),
        }
    }
    let one = started.elapsed() / u32::try_from(settings.warm_up.max(1)).unwrap_or(1);
    let runs = settings.runs.unwrap_or_else(|| rounds_that_fit(one));
    for round in 0..runs {
        progress(&format!("round {} of {runs}", round + 1));
        let at = round % units.len().max(1);
        let order = units[at..].iter().chain(&units[..at]);
        for unit in order {
            std::thread::sleep(REST);
            match *unit {
                Unit::Model(i) => measured.turns[i].push(turn(&mut *models[i])?),
                Unit::Length(i) => {
                    let (tokens, times) = &mut measured.lengths[i];
                    times.push(length(&mut *models[0], *tokens)?);
                }
                Unit::Head(i) => {
                    let (rows, times) = &mut measured.heads[i];
                    times.push(head(&mut *models[0], *rows)?);
                }
            }
        }
        measured.rounds += 1;
    }
    Ok(measured)
}

/// Rounds of this length that fit into the usual time.
fn rounds_that_fit(one: Duration) -> usize {
    let fitting = USUAL.as_secs_f64() / one.as_secs_f64().max(1e-9);
    (fitting as usize).clamp(LEAST, MOST)
}

fn turn(model: &mut dyn Performer) -> Result<Turn> {
    match model.perform(&Task::Turn)? {
        Reply::Turn(turn) => Ok(*turn),
        other => Err(unexpected(model, &other)),
    }
}

fn length(model: &mut dyn Performer, tokens: usize) -> Result<LengthTime> {
    match model.perform(&Task::Length(tokens))? {
        Reply::Length(time) => Ok(time),
        other => Err(unexpected(model, &other)),
    }
}

fn head(model: &mut dyn Performer, rows: usize) -> Result<f64> {
    match model.perform(&Task::Head(rows))? {
        Reply::Head(time) => Ok(time),
        other => Err(unexpected(model, &other)),
    }
}

/// Profiles of a model's vision encoder and prompt, those that it has, written into `folder`.
///
/// # Errors
/// The model cannot be run, or the profile not be read.
pub fn profile(model: &mut dyn Performer, folder: &Path) -> Result<Vec<Profile>> {
    match model.perform(&Task::Profile(folder.to_owned()))? {
        Reply::Profile { vision, prefill } => {
            let parts = [("vision", vision), ("prefill", prefill)].into_iter();
            let files = parts.filter_map(|(part, file)| Some((part, file?)));
            let name = model.name();
            files
                .map(|(part, file)| Profile::read(name, part, &file, TURNS))
                .collect()
        }
        other => Err(unexpected(model, &other)),
    }
}

/// A reply to another task, or a failure.
fn unexpected(model: &dyn Performer, reply: &Reply) -> BenchError {
    BenchError::Worker {
        model: model.name().to_owned(),
        reason: match reply {
            Reply::Failed(why) => why.clone(),
            other => format!("it answered another question: {other:?}"),
        },
    }
}

#[cfg(test)]
mod tests;
