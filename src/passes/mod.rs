//! Passes: what is inserted into a model, planned on immutable graphs.
//!
//! A pass looks at the recognised parts ([`crate::arch`]), plans a patch for each
//! file it changes, and states what holds before and after. The manager applies
//! the patches, verifies every graph after every pass, and stamps the result.
//! Adding a pass takes one file here, its `mod` line and its line in
//! [`REGISTRY`].

mod budget;
mod div_prune;
mod error;
mod fast_v;
mod fewer;
mod fixed;
mod last_logits;
mod make_ups;
mod manager;
mod marker;
mod methods;
mod padded;
mod random_drop;
mod recipe;
mod recount;
mod selection;
mod token_merge;
mod uniform_drop;
mod visual_prune;

pub use budget::{BudgetShape, Planned, PlannedShare, Style, plan, plan_share};
pub use div_prune::DivPrune;
pub use error::PassError;
pub use fast_v::FastV;
pub use fixed::{FixedRun, FixedShapes, PADDING_KEY, SHAPES_KEY, VISUAL_KEY, rewrite_fixed};
pub use make_ups::{MakeUp, Space, make_ups};
pub use manager::{Change, Rewritten, earlier_recipe, gives_fewer, rewrite};
pub use marker::{Marker, VISUAL_MASK_INPUT};
pub use methods::Method;
pub use padded::FILLER;
pub use random_drop::RandomDrop;
pub use recipe::{Count, KvLayout, Logits, Positions, Pruning, Recipe, StaticSpan};
pub use token_merge::{
    Cls, KEPT_OUTPUT, MergeBudget, Placement, Selector, TokenMerge, merge_budget, placement_in,
};
pub use uniform_drop::UniformDrop;
pub use visual_prune::{
    Drop, RankLayer, RankMask, RatioBase, SALIENT_MASK_INPUT, TextQueries, VisualPrune,
    default_positions,
};

use crate::arch::Vlm;
use crate::ir::PatchPlan;

/// Settings of a recipe that concern several passes.
#[derive(Clone, Debug, Default)]
pub struct Context {
    /// How a decoder knows its visual tokens; not said: as the model allows it, see
    /// [`Marker::for_decoder`].
    pub marker: Option<Marker>,
    /// Where they lie, for [`Marker::Static`].
    pub span: Option<StaticSpan>,
    /// How caches of later layers are laid out.
    pub kv: KvLayout,
    /// Of which tokens decoders give logits.
    pub logits: Logits,
    /// Whether the recipe merges tokens.
    pub merges: bool,
    /// Where it says that merged tokens leave, if it does.
    pub placement: Option<Placement>,
    /// Whether it makes the vision encoder's tokens fewer, by merging or otherwise.
    pub fewer: bool,
    /// Whether it prunes in the decoder.
    pub prunes: bool,
    /// What the graphs are for, where their shapes are to be fixed.
    pub fixed: Option<FixedRun>,
}

impl Context {
    /// Whether the vision encoder gives discarded features too, for the decoder to drop.
    pub fn placed(&self, vlm: &Vlm) -> bool {
        self.merges && placement_in(self.placement, vlm) == Placement::Decoder
    }
}

/// A graph pass.
pub trait Pass: std::fmt::Debug {
    /// Name in recipes and in the names of inserted nodes.
    fn name(&self) -> &'static str;

    /// Checks what the pass needs of the model.
    ///
    /// # Errors
    /// What was looked for and what was found.
    fn requires(&self, vlm: &Vlm, context: &Context) -> Result<(), PassError>;

    /// Plans the change of each file: (position of the file, patch).
    ///
    /// # Errors
    /// A construct that the pass cannot work on, with its place.
    fn plan(&self, vlm: &Vlm, context: &Context) -> Result<Vec<(usize, PatchPlan)>, PassError>;

    /// Checks what holds after the patches were applied.
    ///
    /// # Errors
    /// What was expected and what was found (a bug in the pass).
    fn ensures(&self, vlm: &Vlm, context: &Context) -> Result<(), PassError>;

    /// One line for people: what it does to this model.
    fn summary(&self, vlm: &Vlm) -> String;

    /// Tokens that are left of an image in front of the decoder, of `candidates` that the vision
    /// encoder has (see [`VisionTower::candidates`](crate::arch::VisionTower::candidates)); `cls`:
    /// whether a CLS token may come with them. None: the pass does not work on the encoder's tokens.
    fn left_of_image(&self, candidates: i64, cls: bool) -> Option<i64> {
        let _ = (candidates, cls);
        None
    }

    /// Visual tokens that each of `layers` decoder layers sees when `entered` enter. None: the pass
    /// drops none in the decoder.
    fn seen_by_layers(&self, entered: i64, layers: usize) -> Option<Vec<i64>> {
        let _ = (entered, layers);
        None
    }

    /// How it prunes in the decoder, if it does as [`VisualPrune`] does.
    fn pruning(&self) -> Option<&VisualPrune> {
        None
    }

    /// Access to the concrete pass, for code that needs its parameters.
    fn as_any(&self) -> &dyn std::any::Any;
}

/// Where a pass works. A recipe has at most one of each, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// On the tokens of the vision encoder, in front of the decoder.
    Encoder,
    /// Between decoder layers.
    Decoder,
}

/// A registered pass.
pub struct Entry {
    /// Name in recipes.
    pub name: &'static str,
    /// What it does, for `--help` and documentation.
    pub about: &'static str,
    /// Where it works.
    pub stage: Stage,
    /// Parameter names.
    pub keys: &'static [&'static str],
    /// Reads its parameters.
    pub parse: fn(serde_yaml::Value) -> Result<Box<dyn Pass>, String>,
    /// Parameters under which it keeps everything (for the conformance test).
    pub keep_everything: &'static str,
    /// Sets of parameters under which it changes models of 81 tokens and 8 layers, for that test too.
    pub samples: &'static [&'static str],
}

/// Reads a pass's parameters; an error names the key.
fn parse<P: Pass + serde::de::DeserializeOwned + 'static>(
    value: serde_yaml::Value,
) -> Result<Box<dyn Pass>, String> {
    match serde_path_to_error::deserialize::<_, P>(value) {
        Ok(pass) => Ok(Box::new(pass)),
        Err(error) => Err(error.to_string()),
    }
}

/// All passes.
pub const REGISTRY: &[Entry] = &[
    token_merge::ENTRY,
    random_drop::ENTRY,
    uniform_drop::ENTRY,
    div_prune::ENTRY,
    visual_prune::ENTRY,
    fast_v::ENTRY,
];
