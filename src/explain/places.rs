//! From what graphs choose to patches.

use std::collections::BTreeMap;
use std::ops::Range;

use super::ExplainError;
use super::error::wrong;
use crate::runtime::Pixels;

/// A picture that the encoder sees in one piece: an image, a crop of one, a frame of a clip.
#[derive(Debug, Clone)]
pub struct Unit {
    /// As the encoder sees it, before it becomes numbers.
    pub pixels: Pixels,
    /// Rows and columns of its tokens, where they are a grid, and their edge in pixels.
    pub grid: Option<[usize; 3]>,
    /// Row of the sheet on which the pictures of one image or clip are laid out.
    pub row: usize,
}

/// Tokens among which the encoder chooses at once: those of a unit, or of all frames of a clip that is one grid.
#[derive(Debug, Clone)]
pub struct Choice {
    /// The first unit that they are of.
    pub unit: usize,
    /// Tokens of a unit.
    pub plane: usize,
    /// All of them, CLS not counted.
    pub all: usize,
    /// What is chosen, if anything is.
    pub kept: Option<Kept>,
}

/// What an encoder pass keeps; tokens are numbered in the order in which the encoder has them, CLS not counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// Tokens that stay as they are, ascending.
    pub dominant: Vec<usize>,
    /// Tokens that others are merged into, in their order.
    pub contextual: Vec<Cluster>,
}

/// A contextual token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cluster {
    /// The token that it stands for.
    pub anchor: usize,
    /// Those merged into it, ascending.
    pub members: Vec<usize>,
}

/// A token of the encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Spot {
    /// Position in [`Explanation::choices`].
    pub choice: usize,
    /// Number among the choice's tokens.
    pub place: usize,
}

/// What a visual token of the prompt is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenKind {
    /// The class token of the tower.
    Cls,
    /// What is put behind a row of crops.
    Newline,
    /// A token of the encoder as it is.
    Patch,
    /// A contextual token: number in [`Kept::contextual`] of its choice.
    Contextual(usize),
    /// A feature that the merge discarded and left in its place.
    Discarded,
}

/// A visual token of the prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// What it is.
    pub kind: TokenKind,
    /// The encoder's tokens that it is or is interpolated from; of a contextual one the anchor.
    pub at: Vec<Spot>,
}

/// An image or a clip of the question.
#[derive(Debug, Clone)]
pub struct Visual {
    /// Whether it is a clip.
    pub clip: bool,
    /// Its pictures, in [`Explanation::units`].
    pub units: Range<usize>,
    /// Its choices, in [`Explanation::choices`].
    pub choices: Range<usize>,
    /// Its tokens, in [`Explanation::tokens`].
    pub tokens: Range<usize>,
}

/// Layers that see the tokens of a stage, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layers {
    /// The first.
    pub first: usize,
    /// The last; not known of models without a cache that were rewritten before.
    pub last: Option<usize>,
}

impl Layers {
    /// `1–16`, `17–`, or that there are none.
    pub fn text(self) -> String {
        match self.last {
            Some(last) if last < self.first => "none".into(),
            Some(last) if last == self.first => last.to_string(),
            Some(last) => format!("{}–{last}", self.first),
            None => format!("{}–", self.first),
        }
    }
}

/// What is left after a pass or drop point.
#[derive(Debug, Clone)]
pub struct Stage {
    /// The pass that left this; `None` for what there is at first.
    pub pass: Option<&'static str>,
    /// Layers that had run before, for drop points.
    pub after_layer: Option<usize>,
    /// Layers that see this; `None` if none does, because a pass has chosen before.
    pub layers: Option<Layers>,
    /// The tokens that are left, in [`Explanation::tokens`], ascending; `None` is all that the encoder has.
    pub tokens: Option<Vec<usize>>,
}

impl Stage {
    /// `visual_prune after layer 9`; `None` for what there is at first.
    pub fn name(&self) -> Option<String> {
        let pass = self.pass?;
        Some(match self.after_layer {
            None => pass.to_owned(),
            Some(layer) => format!("{pass} after layer {layer}"),
        })
    }
}

/// Which visual tokens of a question survive where.
#[derive(Debug, Clone)]
pub struct Explanation {
    /// All pictures.
    pub units: Vec<Unit>,
    /// All choices of the encoder.
    pub choices: Vec<Choice>,
    /// Images and clips, in the prompt's order.
    pub visuals: Vec<Visual>,
    /// Visual tokens of the prompt, in its order.
    pub tokens: Vec<Token>,
    /// What is left, stage by stage.
    pub stages: Vec<Stage>,
    /// The answer, and how it came about.
    pub answer: crate::runtime::Generation,
}

/// How many tokens of a stage are what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// As they are.
    pub patches: usize,
    /// Contextual.
    pub contextual: usize,
    /// Class tokens.
    pub cls: usize,
    /// Newlines.
    pub newlines: usize,
    /// Discarded, but still there.
    pub discarded: usize,
}

impl Counts {
    /// All of them.
    pub fn total(&self) -> usize {
        self.patches + self.contextual + self.cls + self.newlines + self.discarded
    }

    /// `37 as they are + 6 contextual + 1 CLS`.
    pub fn text(&self) -> String {
        let one = |n: usize, what: &str| match n {
            0 => None,
            n => Some(format!("{n} {what}")),
        };
        let parts = [
            one(self.patches, "as they are"),
            one(self.contextual, "contextual"),
            one(self.cls, "CLS"),
            one(self.newlines, "newlines"),
            one(self.discarded, "discarded"),
        ];
        let parts: Vec<String> = parts.into_iter().flatten().collect();
        match parts.is_empty() {
            true => "none".into(),
            false => parts.join(" + "),
        }
    }
}

impl Explanation {
    /// How many tokens of a stage are what, of all images or of one.
    pub fn counts(&self, stage: &Stage, visual: Option<&Visual>) -> Counts {
        let mut counts = Counts::default();
        let Some(tokens) = &stage.tokens else {
            let choices = visual.map_or(0..self.choices.len(), |v| v.choices.clone());
            counts.patches = self.choices[choices].iter().map(|c| c.all).sum();
            return counts;
        };
        let own = |t: &&usize| visual.is_none_or(|v| v.tokens.contains(t));
        for token in tokens.iter().filter(own) {
            *match self.tokens[*token].kind {
                TokenKind::Patch => &mut counts.patches,
                TokenKind::Contextual(_) => &mut counts.contextual,
                TokenKind::Cls => &mut counts.cls,
                TokenKind::Newline => &mut counts.newlines,
                TokenKind::Discarded => &mut counts.discarded,
            } += 1;
        }
        counts
    }

    /// What is left of a choice at a stage: the same in the encoder's numbers, `None` where that is all.
    pub fn left(&self, stage: &Stage, choice: usize) -> Option<Kept> {
        let tokens = stage.tokens.as_ref()?;
        let mut left = Kept {
            dominant: Vec::new(),
            contextual: Vec::new(),
        };
        for token in tokens.iter().map(|t| &self.tokens[*t]) {
            let own = token.at.iter().filter(|spot| spot.choice == choice);
            match token.kind {
                TokenKind::Patch => left.dominant.extend(own.map(|spot| spot.place)),
                TokenKind::Contextual(number) => {
                    let kept = self.choices[choice].kept.as_ref();
                    let cluster = kept.and_then(|kept| kept.contextual.get(number));
                    if own.count() > 0 {
                        left.contextual.extend(cluster.cloned());
                    }
                }
                TokenKind::Cls | TokenKind::Newline | TokenKind::Discarded => {}
            }
        }
        left.dominant.sort_unstable();
        left.dominant.dedup();
        Some(left)
    }
}

/// Rows, columns and edge in pixels of `count` square tokens that lie row by row on a picture of this height and width,
/// what is left over at its right and lower edge not counted (as a convolution does that cuts it). `None` if they
/// are no such grid.
pub fn grid_of(count: usize, height: usize, width: usize) -> Option<[usize; 3]> {
    let fits = |edge: &usize| (height / edge) * (width / edge) == count;
    let edge = (1..=height.min(width)).rev().find(fits)?;
    Some([height / edge, width / edge, edge])
}

/// Tokens of the encoder that a prompt's tokens stand for, of one choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// CLS, if it comes, dominant ones ascending, contextual ones in their order.
    Merged,
    /// Dominant and contextual ones together, ascending.
    ByPlace,
    /// All, each in its place, CLS first if it comes.
    InPlace,
}

impl Choice {
    /// The prompt's tokens of this choice, which is number `choice`, where it has `rows` of them.
    pub(super) fn tokens(
        &self,
        choice: usize,
        order: Order,
        rows: usize,
    ) -> Result<Vec<Token>, ExplainError> {
        let at = |kind, place| Token {
            kind,
            at: vec![Spot { choice, place }],
        };
        let mut marks: BTreeMap<usize, TokenKind> = BTreeMap::new();
        if let Some(kept) = &self.kept {
            let clusters = kept.contextual.iter().enumerate();
            marks.extend(clusters.map(|(i, c)| (c.anchor, TokenKind::Contextual(i))));
            marks.extend(kept.dominant.iter().map(|d| (*d, TokenKind::Patch)));
            if let Some(last) = marks.keys().next_back().filter(|last| **last >= self.all) {
                return wrong(format!(
                    "token {last} was chosen of an image of {} tokens",
                    self.all
                ));
            }
        }
        let mut tokens: Vec<Token> = match (order, &self.kept) {
            (Order::Merged, Some(kept)) => {
                let own = kept.dominant.iter().map(|d| at(TokenKind::Patch, *d));
                let clusters = kept.contextual.iter().enumerate();
                let contextual = clusters.map(|(i, c)| at(TokenKind::Contextual(i), c.anchor));
                own.chain(contextual).collect()
            }
            (Order::ByPlace, Some(_)) => marks.iter().map(|(p, kind)| at(*kind, *p)).collect(),
            (Order::InPlace, Some(_)) => (0..self.all)
                .map(|place| {
                    let kind = marks.get(&place).copied();
                    at(kind.unwrap_or(TokenKind::Discarded), place)
                })
                .collect(),
            (_, None) => (0..self.all).map(|p| at(TokenKind::Patch, p)).collect(),
        };
        match rows.checked_sub(tokens.len()) {
            Some(0) => {}
            Some(1) if order != Order::ByPlace => tokens.insert(
                0,
                Token {
                    kind: TokenKind::Cls,
                    at: Vec::new(),
                },
            ),
            _ => {
                return wrong(format!(
                    "the encoder gives {rows} tokens of an image, and by what it chose there are {}, or one more \
                     with CLS",
                    tokens.len()
                ));
            }
        }
        Ok(tokens)
    }
}

/// A drop point's choice.
#[derive(Debug, Clone)]
pub(super) struct Drop {
    /// The pass.
    pub(super) pass: &'static str,
    /// Layers that have run.
    pub(super) after_layer: usize,
    /// What is kept of the tokens, text and visual, that were left before.
    pub(super) kept: Vec<usize>,
}

/// The stages of a prompt of `visual.len()` tokens, of which those are visual that are `true`; `encoder` is the pass
/// that chose among the encoder's tokens.
pub(super) fn stages(
    visual: &[bool],
    encoder: Option<&'static str>,
    drops: &[Drop],
    depth: Option<usize>,
) -> Result<Vec<Stage>, ExplainError> {
    // Number among the visual tokens of each token of the prompt.
    let mut count = 0;
    let number: Vec<Option<usize>> = visual
        .iter()
        .map(|visual| {
            visual.then(|| {
                count += 1;
                count - 1
            })
        })
        .collect();
    let until = |next: Option<&Drop>| next.map(|d| d.after_layer).or(depth);
    let entering = |pass| Stage {
        pass,
        after_layer: None,
        layers: Some(Layers {
            first: 1,
            last: until(drops.first()),
        }),
        tokens: Some((0..count).collect()),
    };
    let mut stages = Vec::new();
    if encoder.is_some() {
        stages.push(Stage {
            pass: None,
            after_layer: None,
            layers: None,
            tokens: None,
        });
    }
    stages.push(entering(encoder));
    let mut left: Vec<usize> = (0..visual.len()).collect();
    for (i, drop) in drops.iter().enumerate() {
        let kept = drop.kept.iter().map(|at| left.get(*at).copied());
        let Some(kept) = kept.collect::<Option<Vec<_>>>() else {
            return wrong(format!(
                "{} keeps tokens behind layer {} that are not there: {} were left before",
                drop.pass,
                drop.after_layer,
                left.len()
            ));
        };
        left = kept;
        stages.push(Stage {
            pass: Some(drop.pass),
            after_layer: Some(drop.after_layer),
            layers: Some(Layers {
                first: drop.after_layer + 1,
                last: until(drops.get(i + 1)),
            }),
            tokens: Some(left.iter().filter_map(|at| number[*at]).collect()),
        });
    }
    Ok(stages)
}

#[cfg(test)]
mod tests;
