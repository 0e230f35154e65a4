//! How much accuracy a model keeps: data sets of questions about images, answers, metrics and their intervals.
//!
//! ```text
//! data set ─▶ questions of an image ─▶ models ─▶ answers (JSON lines) ─▶ scores ─▶ table with intervals
//! ```
//!
//! - [`dataset`] reads and checks a data set, and cuts it into shards;
//! - [`run`] asks a model: the vision encoder once for each image, the decoder once for each question;
//! - [`answers`] keeps answers in append-only files, and reads those that others wrote;
//! - [`metric`] scores an answer as the set's own evaluation does, over texts made alike by [`normalise`];
//! - [`convert`](mod@convert) makes data sets of public ones;
//! - [`statistics`] has the bootstrap over images, [`table`] puts the numbers together, [`render`] writes them down;
//! - [`halving`] searches the best of many candidates on few questions.
//!
//! Nothing here knows of passes: an unmodified model, a rewritten one and the answers of another program are
//! compared alike.

pub mod answers;
pub mod convert;
pub mod dataset;
mod error;
pub mod halving;
pub mod metric;
pub mod normalise;
pub mod render;
pub mod run;
pub mod statistics;
pub mod table;

pub use answers::{Answer, AnswerFile, Header, ModelId, Settings};
pub use dataset::{Cluster, DataSet, Question, Shard};
pub use error::EvalError;
pub use metric::Metric;
pub use run::{Pictures, Runner};
pub use table::{Contestant, Table, tabulate};
