//! Unfolding: bringing a network that lies in model-local functions or in the
//! branches of an `If` to where it can be recognised and changed.
//!
//! A file whose network lies open is taken as it is. Where functions hold it,
//! their calls are inlined; where the branches of an `If` hold it, each branch
//! becomes a part of its own, and the parts are joined before the file is
//! written. So does each of two towers that lie side by side. What no pass changes
//! is written as it was read, functions and all.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::sync::Arc;

use super::hidden::{network_functions, network_holders};
use super::lanes::towers_of;
use super::{NoMatch, Role, hidden_network};
use crate::ir::{
    Branch, IrError, Lane, Model, NodeId, called, inline, join, join_lanes, lanes, split,
};

/// How a part differs from what its file holds.
#[derive(Clone, Debug, Default)]
pub struct Source {
    /// Model-local functions (`domain::name`) whose calls were inlined.
    pub inlined: Vec<String>,
    /// Which of several parts of its file it is: a branch of an `If` (`then_branch`,
    /// `else_branch`), or the tower that takes the input of that name.
    pub branch: Option<String>,
    /// Where the part is not the file's model as it was read.
    folded: Option<Arc<Folded>>,
}

/// A file's model before it was unfolded.
#[derive(Debug)]
struct Folded {
    read: Arc<Model>,
    taken: Taken,
}

/// What was taken apart.
#[derive(Debug)]
enum Taken {
    /// Nothing: functions were inlined.
    Nothing,
    /// The branches of a node of this model, with functions inlined.
    Branches(Box<Model>, NodeId),
    /// Towers that lie side by side.
    Towers,
}

impl Source {
    /// Whether the part is one of several towers in its file.
    pub fn is_tower(&self) -> bool {
        let folded = self.folded.as_ref();
        folded.is_some_and(|f| matches!(f.taken, Taken::Towers))
    }

    /// The model of a file, given all parts that came from it, in order.
    ///
    /// # Errors
    /// Branches that no longer fit together.
    pub(super) fn fold<'a>(parts: &[(&'a Self, &'a Model)]) -> Result<Cow<'a, Model>, IrError> {
        let [(first, model), ..] = parts else {
            unreachable!("a file has at least one part");
        };
        let Some(folded) = &first.folded else {
            return Ok(Cow::Borrowed(model));
        };
        if !parts.iter().any(|(_, m)| m.is_patched()) {
            return Ok(Cow::Borrowed(&folded.read));
        }
        let each = parts
            .iter()
            .map(|(source, model)| (source.branch.clone().unwrap_or_default(), (*model).clone()));
        match &folded.taken {
            Taken::Nothing => Ok(Cow::Borrowed(model)),
            Taken::Branches(whole, node) => {
                let branches = each.map(|(attribute, model)| Branch { attribute, model });
                join(whole, *node, &branches.collect::<Vec<_>>()).map(Cow::Owned)
            }
            Taken::Towers => {
                let lanes = each.map(|(name, model)| Lane { name, model });
                join_lanes(&folded.read, &lanes.collect::<Vec<_>>()).map(Cow::Owned)
            }
        }
    }
}

/// A part of a file.
pub(super) struct Unfolded {
    pub(super) model: Model,
    pub(super) role: Role,
    pub(super) source: Source,
}

impl Unfolded {
    fn recognised(&self) -> bool {
        !matches!(self.role, Role::Unknown(_))
    }
}

/// The parts of a file: one, unless it is a merged decoder or holds two towers.
pub(super) fn unfold(read: Model) -> Vec<Unfolded> {
    let towers = match towers_of(&read) {
        Some(Ok(groups)) => lanes(&read, &groups).map_err(|e| e.to_string()),
        Some(Err(why)) => Err(why),
        None => Ok(Vec::new()),
    };
    match towers {
        Ok(lanes) if lanes.is_empty() => {}
        Ok(lanes) => {
            let folded = Arc::new(Folded {
                read: Arc::new(read),
                taken: Taken::Towers,
            });
            let part = |lane: Lane| Unfolded {
                role: Role::of(&lane.model),
                model: lane.model,
                source: Source {
                    inlined: Vec::new(),
                    branch: Some(lane.name),
                    folded: Some(folded.clone()),
                },
            };
            return lanes.into_iter().map(part).collect();
        }
        Err(why) => {
            return vec![Unfolded {
                model: read,
                role: Role::Unknown(vec![NoMatch::new("a vision tower", why)]),
                source: Source::default(),
            }];
        }
    }
    let role = Role::of(&read);
    let plain = |read: Model, role: Role| {
        let source = Source::default();
        vec![Unfolded {
            model: read,
            role,
            source,
        }]
    };
    if !matches!(role, Role::Unknown(_)) {
        return plain(read, role);
    }
    let network = network_functions(&read);
    let holders = network_holders(&read);
    if network.is_empty() && holders.is_empty() && called(&read, read.main()).is_empty() {
        return plain(read, role);
    }
    let read = Arc::new(read);
    let first = if network.is_empty() && holders.is_empty() {
        Ok(Vec::new())
    } else {
        open(&read, network)
    };
    if let Ok(parts) = &first
        && parts.iter().any(Unfolded::recognised)
    {
        return first.unwrap_or_default();
    }
    // A function without weights can stand between recogniser and network too.
    let every: BTreeSet<usize> = (0..read.functions.len()).collect();
    if !every.is_empty()
        && let Ok(parts) = open(&read, every)
        && parts.iter().any(Unfolded::recognised)
    {
        return parts;
    }
    match first {
        Ok(parts) if !parts.is_empty() => parts,
        Ok(_) => plain(Arc::unwrap_or_clone(read), role),
        Err(found) => {
            let why = NoMatch::new("vision tower, embedding or decoder", found);
            plain(Arc::unwrap_or_clone(read), Role::Unknown(vec![why]))
        }
    }
}

/// The parts of a file once these functions are inlined.
fn open(read: &Arc<Model>, mut functions: BTreeSet<usize>) -> Result<Vec<Unfolded>, String> {
    let mut whole = inlined(read, &functions)?;
    let holders = network_holders(&whole);
    let shown = |functions: &BTreeSet<usize>| {
        let functions = functions.iter().map(|f| &read.functions[*f]);
        let names = functions.map(|f| format!("{}::{}", f.domain, f.name));
        names.collect::<Vec<String>>()
    };
    let Some(&holder) = holders.first() else {
        let source = Source {
            inlined: shown(&functions),
            branch: None,
            folded: Some(Arc::new(Folded {
                read: read.clone(),
                taken: Taken::Nothing,
            })),
        };
        let role = Role::of(&whole);
        return Ok(vec![Unfolded {
            model: whole,
            role,
            source,
        }]);
    };
    let refuse = hidden_network(&whole).unwrap_or_default();
    if holders.len() > 1 || !whole.node(holder).is("If") {
        return Err(refuse);
    }
    // A branch becomes a model without functions.
    let bodies = whole.node(holder).subgraphs();
    if bodies.flat_map(|g| called(&whole, g)).next().is_some() {
        functions = (0..read.functions.len()).collect();
        whole = inlined(read, &functions)?;
    }
    let node = *network_holders(&whole).first().ok_or(&refuse)?;
    let branches = split(&whole, node)
        .map_err(|why| format!("{refuse}; its branches cannot be taken apart: {why}"))?;
    let inlined = shown(&functions);
    let folded = Arc::new(Folded {
        read: read.clone(),
        taken: Taken::Branches(Box::new(whole), node),
    });
    let parts = branches.into_iter().map(|branch| Unfolded {
        role: Role::of(&branch.model),
        model: branch.model,
        source: Source {
            inlined: inlined.clone(),
            branch: Some(branch.attribute),
            folded: Some(folded.clone()),
        },
    });
    Ok(parts.collect())
}

fn inlined(model: &Model, functions: &BTreeSet<usize>) -> Result<Model, String> {
    if functions.is_empty() {
        return Ok(model.clone());
    }
    inline(model, functions).map_err(|e| e.to_string())
}
