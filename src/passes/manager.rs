//! Running a recipe: requires → plan → apply → verify → ensures, pass by pass,
//! then the stamp.

use super::{Context, KvLayout, Logits, PassError, Recipe, last_logits, padded};
use crate::arch::{Part, RECIPE_KEY, ROLE_KEY, VERSION_KEY, Vlm};
use crate::ir::{Model, Patch, PatchPlan, verify};

/// Metadata entry of files in which discarded features keep their places.
const PLACEMENT_KEY: &str = "duet.placement";

/// Whether a rewritten vision encoder gives fewer features than it did: its recipe merges or
/// drops tokens there, and what is discarded does not keep its place.
pub fn gives_fewer(model: &Model) -> bool {
    let recipe = earlier_recipe(model).and_then(|(_, text)| Recipe::parse(text).ok());
    recipe.is_some_and(|r| r.context.fewer) && model.metadata(PLACEMENT_KEY).is_none()
}

/// What a pass did to a file.
#[derive(Clone, Debug)]
pub struct Change {
    /// Pass.
    pub pass: &'static str,
    /// Position in [`Vlm::parts`].
    pub part: usize,
    /// Nodes it inserted.
    pub inserted: usize,
}

/// A rewritten model.
#[derive(Debug)]
pub struct Rewritten {
    /// The files; those that no pass changed are as they were.
    pub vlm: Vlm,
    /// What each pass did.
    pub changes: Vec<Change>,
    /// One line a pass, for people.
    pub summaries: Vec<(&'static str, String)>,
}

/// Recipe and tool version that a model was rewritten with, if it was.
pub fn earlier_recipe(model: &Model) -> Option<(&str, &str)> {
    let version = model.metadata(VERSION_KEY)?;
    Some((
        version,
        model.metadata(RECIPE_KEY).unwrap_or("(not recorded)"),
    ))
}

/// Rewrites a model.
///
/// # Errors
/// A model that was rewritten before, a pass that does not fit the model, or a
/// broken invariant after a pass.
pub fn rewrite(vlm: Vlm, recipe: &Recipe) -> Result<Rewritten, PassError> {
    rewrite_with(vlm, recipe, &recipe.context)
}

/// Rewrites a model with other settings than the recipe's own.
pub(super) fn rewrite_with(
    mut vlm: Vlm,
    recipe: &Recipe,
    context: &Context,
) -> Result<Rewritten, PassError> {
    for part in &vlm.parts {
        if let Some((version, earlier)) = earlier_recipe(&part.model) {
            return Err(PassError::Rewritten {
                file: part.label(),
                version: version.to_owned(),
                recipe: earlier.to_owned(),
            });
        }
    }
    let mut changes: Vec<Change> = Vec::new();
    let mut summaries = Vec::new();
    // Everything is checked before anything is changed.
    for pass in &recipe.passes {
        pass.requires(&vlm, context)?;
        summaries.push((pass.name(), pass.summary(&vlm)));
    }
    if let Some(problem) = padded::refused(&vlm, context) {
        return Err(PassError::Requires {
            pass: padded::NAME,
            problem,
        });
    }
    let last = context.logits == Logits::Last;
    if let Some(problem) = last_logits::refused(&vlm).filter(|_| last) {
        return Err(PassError::Requires {
            pass: last_logits::NAME,
            problem,
        });
    }
    let outputs = padded::outputs(&vlm);
    for pass in &recipe.passes {
        let plans = pass.plan(&vlm, context)?;
        carry_out(&mut vlm, &mut changes, pass.name(), plans)?;
        pass.ensures(&vlm, context)?;
    }
    if last {
        let plans = last_logits::plan(&vlm)?;
        if !plans.is_empty() {
            summaries.push((last_logits::NAME, last_logits::SUMMARY.to_owned()));
        }
        carry_out(&mut vlm, &mut changes, last_logits::NAME, plans)?;
    }
    if context.kv == KvLayout::Padded {
        let plans = padded::plan(&vlm, recipe, &outputs);
        if !plans.is_empty() {
            summaries.push((padded::NAME, padded::SUMMARY.to_owned()));
        }
        carry_out(&mut vlm, &mut changes, padded::NAME, plans)?;
    }
    let placed = recipe.placed(&vlm);
    let mut stamped: Vec<usize> = changes.iter().map(|c| c.part).collect();
    stamped.sort_unstable();
    stamped.dedup();
    for index in stamped {
        let kind = vlm.parts[index].role.kind();
        change(&mut vlm.parts[index], "stamp", |model| {
            let mut patch = Patch::new(&model, "stamp");
            patch.metadata(VERSION_KEY, env!("CARGO_PKG_VERSION"));
            patch.metadata(RECIPE_KEY, &recipe.text);
            patch.metadata(ROLE_KEY, kind.word());
            if placed {
                patch.metadata(PLACEMENT_KEY, "decoder");
            }
            let plan = patch.finish();
            model.apply(plan)
        })?;
    }
    Ok(Rewritten {
        vlm,
        changes,
        summaries,
    })
}

/// Applies the patches of one pass: (position of the file, patch).
fn carry_out(
    vlm: &mut Vlm,
    changes: &mut Vec<Change>,
    pass: &'static str,
    plans: Vec<(usize, PatchPlan)>,
) -> Result<(), PassError> {
    for (part, plan) in plans {
        changes.push(Change {
            pass,
            part,
            inserted: plan.inserted(),
        });
        change(&mut vlm.parts[part], pass, |model| model.apply(plan))?;
    }
    Ok(())
}

pub(super) fn change(
    part: &mut Part,
    pass: &'static str,
    apply: impl FnOnce(Model) -> Result<Model, crate::ir::IrError>,
) -> Result<(), PassError> {
    let file = part.label();
    let graph = |source| PassError::Graph { pass, file, source };
    // After an error nothing goes on with the part, so the model need not be kept.
    let model = std::mem::replace(&mut part.model, Model::empty());
    let changed = apply(model).and_then(|model| {
        verify(&model)?;
        Ok(model)
    });
    part.model = changed.map_err(graph)?;
    Ok(())
}
