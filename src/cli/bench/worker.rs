//! A model in a process of its own: its memory is its own, and what breaks it breaks no other.
//!
//! The process is this program again. It reads a job and then tasks from stdin, one JSON line each, and answers each
//! with one JSON line on stdout; it ends when stdin does.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::Context;

use crate::bench::{BenchError, Job, Performer, Reply, Subject, Task};
use crate::cli::Outcome;

/// The name of the command that such a process runs.
pub(in crate::cli) const COMMAND: &str = "bench-worker";

/// A process with a model.
#[derive(Debug)]
pub(super) struct Process {
    name: String,
    child: Child,
    /// None once it is told that there is nothing more to do.
    tasks: Option<ChildStdin>,
    replies: BufReader<ChildStdout>,
}

impl Process {
    /// Starts a process that opens a model, and waits until it has.
    pub(super) fn start(name: &str, job: &Job) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("finding this program's own file")?;
        let mut child = Command::new(&program)
            .arg(COMMAND)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        let (Some(tasks), Some(replies)) = (child.stdin.take(), child.stdout.take()) else {
            anyhow::bail!("the process of {name} has no pipes");
        };
        let mut process = Self {
            name: name.to_owned(),
            child,
            tasks: Some(tasks),
            replies: BufReader::new(replies),
        };
        match process.ask(&serde_json::to_string(job)?)? {
            Reply::Ready => Ok(process),
            Reply::Failed(why) => anyhow::bail!("{name}: {why}"),
            other => anyhow::bail!("{name}: its process answered a job with {other:?}"),
        }
    }

    /// Sends a line and waits for the reply.
    fn ask(&mut self, line: &str) -> Result<Reply, BenchError> {
        let sent = self.tasks.as_mut().map(|tasks| writeln!(tasks, "{line}"));
        let mut reply = String::new();
        let read = match sent {
            Some(Ok(())) => self.replies.read_line(&mut reply),
            _ => Ok(0),
        };
        let failed = |reason: String| BenchError::Worker {
            model: self.name.clone(),
            reason,
        };
        match read {
            Ok(0) => {
                let status = self
                    .child
                    .wait()
                    .map_or_else(|e| e.to_string(), |s| s.to_string());
                Err(failed(format!(
                    "its process ended ({status}); with a signal it was most likely killed for want of memory"
                )))
            }
            Ok(_) => serde_json::from_str(&reply)
                .map_err(|e| failed(format!("its process said '{}': {e}", reply.trim_end()))),
            Err(e) => Err(failed(format!("its process cannot be heard: {e}"))),
        }
    }
}

impl Performer for Process {
    fn name(&self) -> &str {
        &self.name
    }

    fn perform(&mut self, task: &Task) -> Result<Reply, BenchError> {
        let line = serde_json::to_string(task).map_err(|e| BenchError::Worker {
            model: self.name.clone(),
            reason: e.to_string(),
        })?;
        self.ask(&line)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The end of its input is the end of the process.
        drop(self.tasks.take());
        // An error would mean that it is gone already.
        let _ = self.child.wait();
    }
}

/// The other side: carries out what comes on stdin.
pub(in crate::cli) fn serve() -> anyhow::Result<Outcome> {
    let mut lines = std::io::stdin().lines();
    let mut out = std::io::stdout();
    let mut say = |reply: &Reply| -> anyhow::Result<()> {
        writeln!(out, "{}", serde_json::to_string(reply)?)?;
        Ok(out.flush()?)
    };
    let Some(job) = lines.next() else {
        anyhow::bail!(
            "{COMMAND} is what duet bench runs for each model; it reads a job from stdin"
        );
    };
    let job: Job = serde_json::from_str(&job?).context("reading the job on stdin")?;
    let mut subject = match Subject::open(&job) {
        Ok(subject) => subject,
        Err(error) => {
            say(&Reply::Failed(error.to_string()))?;
            return Ok(Outcome::Done);
        }
    };
    say(&Reply::Ready)?;
    for line in lines {
        let task: Task = serde_json::from_str(&line?).context("reading a task on stdin")?;
        let reply = match subject.perform(&task) {
            Ok(reply) => reply,
            Err(error) => Reply::Failed(error.to_string()),
        };
        say(&reply)?;
    }
    Ok(Outcome::Done)
}
