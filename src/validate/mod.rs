//! Checking that a rewritten model computes what its recipe says.
//!
//! - [`oracle`]: the method's selection in plain `ndarray`;
//! - [`reference`](mod@reference): the unmodified model run layer-exactly around it;
//! - [`check`]: the comparison, as a list of findings;
//! - [`structure`]: what can be checked without running anything.

pub mod oracle;
pub mod reference;
pub mod scenario;
pub mod structure;
mod tally;

mod decoders;
mod embed;
mod error;
mod fixed;
mod limits;
mod numeric;
mod padded;
mod plain;
mod precision;
mod probe;
mod report;
mod rows;
mod second;
mod whole;

pub use error::ValidateError;
pub use fixed::check_fixed;
pub use numeric::{Options, check};
pub use report::{Finding, Report};
