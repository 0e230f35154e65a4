//! The values of a rewritten graph that say what was chosen.

use super::ExplainError;
use crate::ir::{Model, ValueId, consts};
use crate::passes::Recipe;
use crate::runtime::{Inside, probe};

/// Drop points that are looked for, at most: more than any decoder has layers.
const MOST_DROPS: usize = 1024;

/// What an encoder graph says about its choice.
#[derive(Debug, Clone, Default)]
pub struct Values {
    /// The pass that chooses among the encoder's tokens.
    pass: Option<&'static str>,
    /// Whether it merges them, rather than keeping some.
    merges: bool,
    /// Name of the input of pixels, after which the scope of a tower is called that shares its file with another.
    input: Option<String>,
    /// The value `[images, tokens, …]` that a selection takes some tokens of, CLS perhaps among them.
    chosen_from: Option<String>,
    /// Rows of it that are the same for every image.
    rows: Option<Vec<i64>>,
}

impl Values {
    /// Opens a graph of a rewritten model up: the same with the values that matter as further outputs, and what they
    /// are called. For decoders the second is of no use.
    ///
    /// # Errors
    /// The graph cannot be given further outputs.
    pub fn open_up(model: &Model, recipe: &Recipe) -> Result<(Model, Self), ExplainError> {
        let mut found: Vec<ValueId> = Vec::new();
        let mut values = Self::default();
        if let Some(pass) = recipe.encoder_pass() {
            values.pass = Some(pass.name());
            values.merges = recipe.context.merges;
            for name in [
                "score",
                "dominant_indices",
                "anchor_indices",
                "member_indices",
                "member_anchors",
                "kept_indices",
            ] {
                found.extend(model.find(&format!("duet/{}/{name}", pass.name())));
            }
            let selects = !values.merges;
            let from = selects.then(|| chosen_from(model, pass.name())).flatten();
            values.chosen_from = from.map(|v| model.name(v).to_owned());
            found.extend(from);
            let rows = model.find(&format!("duet/{}/kept_rows", pass.name()));
            values.rows = rows.and_then(|v| consts::ints(model, v));
        }
        for scope in decoder_scopes(recipe) {
            for drop in 0..MOST_DROPS {
                match model.find(&kept_name(scope, drop)) {
                    Some(value) => found.push(value),
                    // Drop 0 is that of discarded features.
                    None if drop > 0 => break,
                    None => {}
                }
            }
        }
        // A constant is known without running anything, and what nothing reads is gone.
        let made = |v: &ValueId| model.producer_of(*v).and_then(|n| model.try_node(n));
        found.retain(|v| made(v).is_some());
        Ok((probe::with_outputs(model, &found)?, values))
    }

    /// Of a tower that shares its file with another, told by its input.
    #[must_use]
    pub fn of_input(mut self, input: &str) -> Self {
        self.input = Some(input.to_owned());
        self
    }

    /// The pass that chooses among the encoder's tokens.
    pub(super) fn pass(&self) -> Option<&'static str> {
        self.pass
    }

    /// Whether that pass merges them.
    pub(super) fn merges(&self) -> bool {
        self.merges
    }

    /// Rows of [`all`](Self::all)'s tokens that are the same for every image.
    pub(super) fn rows(&self) -> Option<&[i64]> {
        self.rows.as_deref()
    }

    /// A name of the pass's scope as it is in the file that was opened, the likelier first.
    fn names(&self, name: &str) -> Vec<String> {
        let own = format!("duet/{}/", self.pass.unwrap_or_default());
        let scoped = self.input.as_ref().and_then(|input| {
            let rest = name.strip_prefix(&own)?;
            Some(format!("{own}{input}/{rest}"))
        });
        scoped.into_iter().chain([name.to_owned()]).collect()
    }

    /// Indices of one image: a row for each of its pictures (frames).
    pub(super) fn indices(
        &self,
        inside: &Inside,
        name: &str,
    ) -> Result<Option<Vec<Vec<i64>>>, ExplainError> {
        let name = format!("duet/{}/{name}", self.pass.unwrap_or_default());
        for name in self.names(&name) {
            if let Some(rows) = inside.integers(&name)? {
                return Ok(Some(rows));
            }
        }
        Ok(None)
    }

    /// How many tokens each image has to choose among, CLS perhaps among them.
    pub(super) fn all(&self, inside: &Inside) -> Option<usize> {
        let score = format!("duet/{}/score", self.pass.unwrap_or_default());
        let either = [Some(&score), self.chosen_from.as_ref()];
        let mut names = either.into_iter().flatten().flat_map(|n| self.names(n));
        names.find_map(|name| inside.value(&name)?.shape().get(1).copied())
    }
}

/// Scopes of passes that drop tokens in the decoder.
pub(super) fn decoder_scopes(recipe: &Recipe) -> Vec<&'static str> {
    let merge = recipe.encoder_pass().map(|p| p.name());
    recipe
        .pruning()
        .map(|p| p.pass)
        .into_iter()
        .chain(merge)
        .collect()
}

/// The name of the indices that a drop point keeps; drop 0 is that of features that a merge discarded.
pub(super) fn kept_name(pass: &str, drop: usize) -> String {
    format!("duet/{pass}/drop{drop}/kept_indices")
}

/// What a selection takes its tokens of: what is gathered at the places that it chose, or at those that are the same
/// for every image. (Where tokens are the graph's output, they bear the output's name.)
fn chosen_from(model: &Model, pass: &str) -> Option<ValueId> {
    let Some(kept) = model.find(&format!("duet/{pass}/kept_indices")) else {
        let tokens = model.find(&format!("duet/{pass}/kept_tokens"))?;
        return model.try_node(model.producer_of(tokens)?)?.input(0);
    };
    let readers = |value: ValueId| {
        let uses = model.value(value).uses.iter();
        uses.filter_map(|u| model.try_node(u.node))
    };
    let shaped = readers(kept).flat_map(|node| node.outputs.iter().flatten().copied());
    let gathers = |node: &&crate::ir::Node| node.is("GatherND");
    let mut found = readers(kept)
        .chain(shaped.flat_map(readers))
        .filter(gathers);
    found.next()?.input(0)
}
