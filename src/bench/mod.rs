//! Side-by-side speed and memory of a model and its rewritten forms.
//!
//! ```text
//! Job ─▶ Subject (one model, opened) ─┐
//! Job ─▶ Subject ────────────────────┴─▶ rounds (in turns) ─▶ Measured ─▶ Report ─▶ text, JSON, Markdown, SVG
//!                                          ▲                      ▲
//!                                   Schedule (recipe)      ideal (the base's layers at the schedule's lengths)
//! ```
//!
//! - [`Subject`] opens a model and carries out [`Task`]s with random inputs: a whole turn (vision encoder, embeddings,
//!   prompt, decode steps), the base's prompt at some length, the base's head alone, a profile;
//! - [`rounds`] asks all models in turns through [`Performer`], so that each may run in a process of its own;
//! - [`schedule`] tells how many tokens each layer sees by the recipe a model is stamped with, [`ideal`] what that would
//!   cost if layers cost what the unmodified model's do;
//! - [`profile`] sums ONNX Runtime's profile by what nodes are for;
//! - [`report`] holds the numbers, [`render`] writes them down.
//!
//! Times are those that ONNX Runtime takes for a run, in seconds; what a client does around it is not in them.

mod error;
mod head;
pub mod ideal;
mod inputs;
mod job;
mod memory;
pub mod profile;
pub mod render;
pub mod report;
pub mod rounds;
pub mod schedule;
mod subject;

pub use error::{BenchError, Result};
pub use job::{Files, Inputs, Job, LengthTime, Reply, Task, Turn};
pub use report::Report;
pub use rounds::{Measured, Performer, Settings};
pub use schedule::Schedule;
pub use subject::Subject;
