//! How far a run is: a bar that is written over on a terminal, a line now and then elsewhere.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use crate::cli::Global;

/// Between two lines where stderr is no terminal.
const QUIET: Duration = Duration::from_secs(15);
/// Between two looks of the bar.
const BLINK: Duration = Duration::from_millis(100);
const WIDTH: usize = 30;

/// Counts questions of all models.
pub(super) struct Progress {
    done: usize,
    total: usize,
    /// When the first question was asked.
    start: Option<Instant>,
    /// Questions that were answered since then.
    fresh: usize,
    last: Option<Instant>,
    terminal: bool,
    silent: bool,
}

impl Progress {
    /// Of `total` questions, of which `done` are answered already.
    pub(super) fn new(total: usize, done: usize, global: &Global) -> Self {
        Self {
            done,
            total,
            start: None,
            fresh: 0,
            last: None,
            terminal: std::io::stderr().is_terminal(),
            silent: global.quiet,
        }
    }

    /// A model begins to answer.
    pub(super) fn begin(&mut self) {
        self.start.get_or_insert_with(Instant::now);
        self.last.get_or_insert_with(Instant::now);
    }

    /// One more question of `model` is answered.
    pub(super) fn step(&mut self, model: &str) {
        self.done += 1;
        self.fresh += 1;
        let wait = if self.terminal { BLINK } else { QUIET };
        let due = self.last.is_none_or(|last| last.elapsed() >= wait);
        if self.silent || !due {
            return;
        }
        self.last = Some(Instant::now());
        let line = self.line(model);
        if self.terminal {
            let mut err = anstream::stderr();
            let _ = write!(err, "\r\x1b[K{line}");
            let _ = err.flush();
        } else {
            anstream::eprintln!("{line}");
        }
    }

    /// Takes the bar away.
    pub(super) fn clear(&self) {
        if self.terminal && !self.silent && self.last.is_some() {
            let mut err = anstream::stderr();
            let _ = write!(err, "\r\x1b[K");
            let _ = err.flush();
        }
    }

    fn line(&self, model: &str) -> String {
        let elapsed = self.start.map_or(Duration::ZERO, |start| start.elapsed());
        let left = remaining(elapsed, self.fresh, self.total - self.done);
        let percent = 100 * self.done / self.total.max(1);
        let bar = match self.terminal {
            true => {
                let full = WIDTH * self.done / self.total.max(1);
                format!("{}{} ", "█".repeat(full), "░".repeat(WIDTH - full))
            }
            false => String::new(),
        };
        format!(
            "{bar}{}/{} answers, {percent} %, {left} left ({model})",
            self.done, self.total
        )
    }
}

/// How long `left` questions take if they take what the `fresh` ones did.
fn remaining(elapsed: Duration, fresh: usize, left: usize) -> String {
    let seconds = elapsed.as_secs_f64() / fresh.max(1) as f64 * left as f64;
    let seconds = seconds.ceil() as u64;
    match seconds / 3600 {
        0 => format!("{}:{:02}", seconds / 60, seconds % 60),
        hours => format!("{hours}:{:02}:{:02}", seconds / 60 % 60, seconds % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_left_is_that_of_the_questions_so_far() {
        assert_eq!(remaining(Duration::from_secs(10), 20, 300), "2:30");
        assert_eq!(remaining(Duration::from_secs(10), 1, 361), "1:00:10");
        assert_eq!(remaining(Duration::from_millis(1), 1000, 1), "0:01");
        assert_eq!(remaining(Duration::ZERO, 0, 5), "0:00");
    }
}
