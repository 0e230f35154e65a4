//! Asking the question and collecting what was chosen.

use std::ops::ControlFlow;

use super::ExplainError;
use super::error::wrong;
use super::places::{
    Choice, Cluster, Drop, Explanation, Kept, Order, Spot, Token, TokenKind, Unit, Visual, grid_of,
    stages,
};
use super::values::{Values, decoder_scopes, kept_name};
use crate::passes::Recipe;
use crate::runtime::{
    Clip, GenerateOptions, Generation, Inside, Message, Pixels, Place, Seen, Slot, Vision,
    VlmPipeline, WholePipeline,
};

type Result<T> = std::result::Result<T, ExplainError>;

/// What is known of a model that was opened up.
#[derive(Debug)]
pub struct Look<'a> {
    /// What it was rewritten with.
    pub recipe: &'a Recipe,
    /// Whether discarded features come out of the encoder too, for the decoder to drop.
    pub placed: bool,
    /// Layers of the decoder, where its caches do not tell.
    pub depth: Option<usize>,
    /// What the graph that sees images says about its choice.
    pub images: Values,
    /// The same of the one that sees clips.
    pub clips: Values,
}

/// A question about images and clips, which go before its text.
#[derive(Debug)]
pub struct Question<'a> {
    /// Images.
    pub images: &'a [Pixels],
    /// Clips, see [`VlmPipeline::take_clip`].
    pub clips: &'a [Clip],
    /// The text.
    pub text: &'a str,
}

impl Question<'_> {
    fn message(&self) -> Message {
        Message::user_with(self.images.len(), self.clips.len(), self.text)
    }
}

/// Pictures, choices and tokens as they are collected.
#[derive(Default)]
struct Collected {
    units: Vec<Unit>,
    choices: Vec<Choice>,
    visuals: Vec<Visual>,
    tokens: Vec<Token>,
}

/// Answers a question and tells which visual tokens survived where.
///
/// # Errors
/// A run fails; the model does not say what it chose, or nothing that fits.
pub fn explain(
    pipeline: &mut VlmPipeline,
    look: &Look<'_>,
    question: &Question<'_>,
    options: &GenerateOptions,
) -> Result<Explanation> {
    let seen = pipeline.encode(question.images, question.clips)?;
    let prepared = pipeline.prepare_encoded(&[question.message()], &seen)?;
    let mut collected = Collected::default();
    let clip_id = pipeline.text.video_token().map(|t| t.id);
    let (mut images, mut clips) = (
        question.images.iter().zip(seen.images()),
        question.clips.iter().zip(seen.clips()),
    );
    // In the order of the prompt.
    let ids = prepared.ids.iter().zip(&prepared.visual);
    let ids: Vec<u32> = ids.filter(|(_, v)| **v).map(|(id, _)| *id).collect();
    while let Some(id) = ids.get(collected.tokens.len()) {
        let before = collected.tokens.len();
        let clip = match Some(*id) == clip_id || images.len() == 0 {
            true => clips.next(),
            false => None,
        };
        if let Some((clip, seen)) = clip {
            collected.clip(pipeline, look, clip, seen)?;
        } else if let Some((image, seen)) = images.next() {
            collected.image(pipeline, look, image, seen)?;
        } else {
            return wrong(
                "the prompt has more image tokens than its images and clips have features",
            );
        }
        if collected.tokens.len() == before {
            return wrong("an image or a clip has no tokens");
        }
    }
    let answer = pipeline.generate(&prepared, None, options, &mut |_| ControlFlow::Continue(()))?;
    let depth = match answer.cache_lengths.len() {
        0 => look.depth,
        n => Some(n),
    };
    finish(collected, look, &prepared.visual, depth, answer)
}

/// The same with a whole model in one file, which takes images only.
///
/// # Errors
/// As [`explain`]; the question is about clips.
pub fn explain_whole(
    pipeline: &mut WholePipeline,
    look: &Look<'_>,
    question: &Question<'_>,
    options: &GenerateOptions,
) -> Result<Explanation> {
    let prompt = pipeline.prepare(&[question.message()], question.images)?;
    let answer = pipeline.generate(&prompt, options, &mut |_| ControlFlow::Continue(()))?;
    let visual = prompt.visual.iter().filter(|v| **v).count();
    let count = question.images.len();
    if count == 0 || visual % count != 0 {
        return wrong(format!("{visual} image tokens for {count} images"));
    }
    let mut collected = Collected::default();
    let inside = Inside::of_run(&answer.extra, count);
    for (image, inside) in question.images.iter().zip(&inside) {
        let pixels = vec![(pipeline.images.fit(image)?, 0)];
        let seen = Encoder {
            values: &look.images,
            placed: look.placed,
            inside: std::slice::from_ref(inside),
            rows: visual / count,
        };
        collected.pictures(&seen, pixels, None, false)?;
    }
    finish(collected, look, &prompt.visual, look.depth, answer)
}

/// What an encoder made of an image or a clip.
struct Encoder<'a> {
    values: &'a Values,
    placed: bool,
    /// Of each run: one for all frames of a clip, or one for each crop.
    inside: &'a [Inside],
    /// Features.
    rows: usize,
}

impl Collected {
    fn image(
        &mut self,
        pipeline: &VlmPipeline,
        look: &Look<'_>,
        image: &Pixels,
        seen: &Seen,
    ) -> Result<()> {
        let encoder = Encoder {
            values: &look.images,
            placed: look.placed,
            inside: seen.inside(),
            rows: seen.tokens(),
        };
        if let Vision::Patches(_) = pipeline.vision {
            return self.grid(&encoder, seen, vec![pipeline.images.fit(image)?], false);
        }
        let crops = pipeline.images.fit_crops(image)?;
        let across = pipeline.images.crop_grid(image.height(), image.width());
        let row = |i: usize| match (i.checked_sub(1), across) {
            (Some(i), Some((_, across))) => 1 + i / across.max(1),
            _ => 0,
        };
        let pixels = crops.into_iter().enumerate();
        let pixels = pixels.map(|(i, crop)| (crop, row(i))).collect();
        self.pictures(&encoder, pixels, pipeline.slots(image)?, false)
    }

    fn clip(
        &mut self,
        pipeline: &VlmPipeline,
        look: &Look<'_>,
        clip: &Clip,
        seen: &Seen,
    ) -> Result<()> {
        let (frames, moments) = pipeline.fit_clip(clip)?;
        let patches = pipeline.clips.is_none();
        let encoder = Encoder {
            values: if patches { &look.images } else { &look.clips },
            placed: look.placed,
            inside: seen.inside(),
            rows: seen.tokens(),
        };
        if patches {
            // Of the frames that make one frame of tokens the first is shown.
            let shown = frames.into_iter().step_by(moments).collect();
            return self.grid(&encoder, seen, shown, true);
        }
        let pixels = frames.into_iter().enumerate();
        let pixels = pixels.map(|(i, frame)| (frame, i / ACROSS)).collect();
        self.pictures(&encoder, pixels, None, true)
    }

    /// Tokens of an encoder that sees pictures of a fixed number of tokens each.
    fn pictures(
        &mut self,
        encoder: &Encoder<'_>,
        pixels: Vec<(Pixels, usize)>,
        slots: Option<Vec<Slot>>,
        clip: bool,
    ) -> Result<()> {
        let count = pixels.len();
        let (units, choices, tokens) = (self.units.len(), self.choices.len(), self.tokens.len());
        let rows = match &slots {
            Some(slots) => {
                let base = |s: &&Slot| matches!(s, Slot::Token(place) if place.crop == 0);
                slots.iter().filter(base).count()
            }
            None if count == 0 || !encoder.rows.is_multiple_of(count) => {
                return wrong(format!(
                    "the encoder gives {} tokens for {count} pictures",
                    encoder.rows
                ));
            }
            None => encoder.rows / count,
        };
        let mut packed: Vec<Vec<Token>> = Vec::new();
        for (i, (pixels, row)) in pixels.into_iter().enumerate() {
            // One run for all frames, or one for each crop.
            let (inside, frame) = match encoder.inside {
                [one] => (one, i),
                several => match several.get(i) {
                    Some(own) => (own, 0),
                    None => return wrong("the encoder saw fewer crops than the image has"),
                },
            };
            let (all, kept) = encoder.choice(inside, frame, rows, &pixels)?;
            let choice = Choice {
                unit: self.units.len(),
                plane: all,
                all,
                kept,
            };
            let order = match encoder.placed {
                true => Order::InPlace,
                false => Order::Merged,
            };
            packed.push(choice.tokens(self.choices.len(), order, rows)?);
            self.choices.push(choice);
            self.units.push(Unit {
                grid: grid_of(all, pixels.height(), pixels.width()),
                pixels,
                row,
            });
        }
        match slots {
            None => self.tokens.extend(packed.into_iter().flatten()),
            Some(slots) => {
                let laid = slots.iter().map(|slot| slotted(slot, &packed));
                self.tokens.extend(laid.collect::<Result<Vec<_>>>()?);
            }
        }
        self.visuals.push(Visual {
            clip,
            units: units..self.units.len(),
            choices: choices..self.choices.len(),
            tokens: tokens..self.tokens.len(),
        });
        if self.tokens.len() - tokens != encoder.rows {
            return wrong(format!(
                "the encoder gives {} tokens of an image, and by what it chose there are {}",
                encoder.rows,
                self.tokens.len() - tokens
            ));
        }
        Ok(())
    }

    /// Tokens of an encoder that sees a grid of any size, of one frame or several.
    fn grid(
        &mut self,
        encoder: &Encoder<'_>,
        seen: &Seen,
        frames: Vec<Pixels>,
        clip: bool,
    ) -> Result<()> {
        let Some((block, inside)) = seen.block().zip(encoder.inside.first()) else {
            return wrong("the encoder does not say in which grid its tokens lie");
        };
        let grid = block.grid;
        if frames.len() != grid.time {
            return wrong(format!(
                "a grid of {} frames for {} pictures",
                grid.time,
                frames.len()
            ));
        }
        let mut choice = Choice {
            unit: self.units.len(),
            plane: grid.height * grid.width,
            all: grid.tokens(),
            kept: encoder.kept(inside, 0, false)?,
        };
        // Of no contextual token the graph names one that it leaves out.
        if let (Some(kept), Some(places)) =
            (&mut choice.kept, encoder.row(inside, "kept_indices", 0)?)
        {
            kept.dominant.sort_unstable();
            kept.contextual.retain(|c| {
                places.contains(&c.anchor) && kept.dominant.binary_search(&c.anchor).is_err()
            });
        }
        let order = match encoder.placed {
            true => Order::InPlace,
            false => Order::ByPlace,
        };
        let (units, tokens) = (self.units.len(), self.tokens.len());
        let number = self.choices.len();
        self.tokens
            .extend(choice.tokens(number, order, encoder.rows)?);
        self.choices.push(choice);
        for (i, pixels) in frames.into_iter().enumerate() {
            let edge = pixels.height() / grid.height.max(1);
            self.units.push(Unit {
                grid: Some([grid.height, grid.width, edge]),
                pixels,
                row: i / ACROSS,
            });
        }
        self.visuals.push(Visual {
            clip,
            units: units..self.units.len(),
            choices: number..number + 1,
            tokens: tokens..self.tokens.len(),
        });
        Ok(())
    }
}

/// Frames of a clip in a row of its sheet.
const ACROSS: usize = 4;

/// A token of packed crops.
fn slotted(slot: &Slot, crops: &[Vec<Token>]) -> Result<Token> {
    let at = |place: &Place| {
        let token = crops.get(place.crop).and_then(|c| c.get(place.token));
        token.cloned().ok_or_else(|| {
            ExplainError::Model(format!(
                "the image's grid has a token {} in crop {}, and the encoder gives none",
                place.token, place.crop
            ))
        })
    };
    Ok(match slot {
        Slot::Token(place) => at(place)?,
        Slot::Newline => Token {
            kind: TokenKind::Newline,
            at: Vec::new(),
        },
        Slot::Between {
            corners,
            down,
            across,
        } => {
            let [v, h] = [*down, *across];
            let weights = [(1.0 - v) * (1.0 - h), (1.0 - v) * h, v * (1.0 - h), v * h];
            let read = corners.iter().zip(weights).filter(|(_, w)| *w > 0.0);
            let read = read
                .map(|(place, _)| at(place))
                .collect::<Result<Vec<_>>>()?;
            let mut spots: Vec<Spot> = read.iter().flat_map(|t| t.at.clone()).collect();
            spots.sort_unstable();
            spots.dedup();
            Token {
                kind: read.first().map_or(TokenKind::Patch, |t| t.kind),
                at: spots,
            }
        }
    })
}

impl Encoder<'_> {
    /// A row of indices.
    fn row(&self, inside: &Inside, name: &str, frame: usize) -> Result<Option<Vec<usize>>> {
        let Some(rows) = self.values.indices(inside, name)? else {
            return Ok(None);
        };
        // Images that share a run have a row each, and so have frames.
        let Some(row) = rows.get(frame) else {
            return wrong(format!(
                "'{name}' has {} rows, expected one for picture {}",
                rows.len(),
                frame + 1
            ));
        };
        let row = row.iter().map(|i| usize::try_from(*i).ok());
        match row.collect() {
            Some(row) => Ok(Some(row)),
            None => wrong(format!("'{name}' holds numbers below 0")),
        }
    }

    /// How many tokens there are to choose among on a picture that the prompt has `rows` of, and what is chosen.
    fn choice(
        &self,
        inside: &Inside,
        frame: usize,
        rows: usize,
        pixels: &Pixels,
    ) -> Result<(usize, Option<Kept>)> {
        let stated = self.values.all(inside);
        let (height, width) = (pixels.height(), pixels.width());
        // Among features or rows of the tower there may be CLS in front: patches are a grid.
        let with_cls = |n: usize| {
            n > 1 && grid_of(n, height, width).is_none() && grid_of(n - 1, height, width).is_some()
        };
        let all = stated.unwrap_or(rows);
        let cls = !self.values.merges() && with_cls(all);
        let kept = self.kept(inside, frame, cls)?;
        if let (Some(pass), None) = (self.values.pass(), &kept) {
            return wrong(format!(
                "the vision encoder says nothing of what {pass} chose (values duet/{pass}/…): the pass keeps no \
                 patch, or CLS alone, or the file is not what it was written as"
            ));
        }
        Ok((all - usize::from(cls), kept))
    }

    /// What the encoder's pass keeps; `cls`: rows of a selection are counted from CLS.
    fn kept(&self, inside: &Inside, frame: usize, cls: bool) -> Result<Option<Kept>> {
        let Some(pass) = self.values.pass() else {
            return Ok(None);
        };
        let plain = |dominant| Kept {
            dominant,
            contextual: Vec::new(),
        };
        if !self.values.merges() {
            if let Some(kept) = self.row(inside, "kept_indices", frame)? {
                return Ok(Some(plain(kept)));
            }
            let first = i64::from(cls);
            let rows = self.values.rows();
            let rows = rows.map(|rows| rows.iter().map(|r| usize::try_from(r - first).ok()));
            return match rows.map(Iterator::collect::<Option<Vec<_>>>) {
                None => Ok(None),
                Some(Some(rows)) => Ok(Some(plain(rows))),
                Some(None) => wrong(format!("{pass} keeps CLS among the patches")),
            };
        }
        let dominant = self.row(inside, "dominant_indices", frame)?;
        let anchors = self.row(inside, "anchor_indices", frame)?;
        if dominant.is_none() && anchors.is_none() {
            return Ok(None);
        }
        let anchors = anchors.unwrap_or_default();
        let members = self.members(inside, frame, anchors.len())?;
        let clusters = anchors.into_iter().zip(members);
        let clusters = clusters.map(|(anchor, mut members)| {
            members.sort_unstable();
            Cluster { anchor, members }
        });
        let mut dominant = dominant.unwrap_or_default();
        dominant.sort_unstable();
        Ok(Some(Kept {
            dominant,
            contextual: clusters.collect(),
        }))
    }

    /// The members of each of `count` anchors' clusters.
    fn members(&self, inside: &Inside, frame: usize, count: usize) -> Result<Vec<Vec<usize>>> {
        let mut clusters = vec![Vec::new(); count];
        // Where every token of the pool is an anchor, there are none.
        let Some(members) = self.row(inside, "member_indices", frame)? else {
            return Ok(clusters);
        };
        let of = self.values.indices(inside, "member_anchors")?;
        let of = of.and_then(|rows| rows.get(frame).cloned());
        let each = (members.len() / count.max(1)).max(1);
        for (i, member) in members.into_iter().enumerate() {
            let own = match &of {
                // −1: an anchor itself.
                Some(of) => of.get(i).and_then(|anchor| usize::try_from(*anchor).ok()),
                // As many neighbours for each.
                None => Some(i / each),
            };
            if let Some(own) = own.and_then(|anchor| clusters.get_mut(anchor)) {
                own.push(member);
            }
        }
        Ok(clusters)
    }
}

/// Puts the decoder's part behind the encoder's.
fn finish(
    collected: Collected,
    look: &Look<'_>,
    visual: &[bool],
    depth: Option<usize>,
    answer: Generation,
) -> Result<Explanation> {
    let count = visual.iter().filter(|v| **v).count();
    if count != collected.tokens.len() {
        return wrong(format!(
            "the prompt has {count} visual tokens, the images and clips have {}",
            collected.tokens.len()
        ));
    }
    let pruning = look.recipe.pruning();
    let encoder = look.recipe.encoder_pass().map(|p| p.name());
    let decoder = Inside::of_run(&answer.extra, 1).pop().unwrap_or_default();
    let mut drops = Vec::new();
    if look.placed {
        let left = decoder_scopes(look.recipe)
            .into_iter()
            .find_map(|scope| kept(&decoder, &kept_name(scope, 0)).transpose());
        let Some(kept) = left.transpose()? else {
            return wrong(
                "the decoder does not say which discarded features it drops behind layer 1",
            );
        };
        drops.push(Drop {
            pass: encoder.unwrap_or_default(),
            after_layer: 1,
            kept,
        });
    }
    if let Some(pruning) = pruning {
        for (i, drop) in pruning.prune.drops.iter().enumerate() {
            let name = kept_name(pruning.pass, i + 1);
            let Some(kept) = kept(&decoder, &name)? else {
                return wrong(format!(
                    "the decoder has no value '{name}', which says what is kept"
                ));
            };
            drops.push(Drop {
                pass: pruning.pass,
                after_layer: drop.after_layer,
                kept,
            });
        }
    }
    Ok(Explanation {
        stages: stages(visual, encoder, &drops, depth)?,
        units: collected.units,
        choices: collected.choices,
        visuals: collected.visuals,
        tokens: collected.tokens,
        answer,
    })
}

/// Indices `[1, n]` that a decoder gave.
fn kept(decoder: &Inside, name: &str) -> Result<Option<Vec<usize>>> {
    let rows = decoder.integers(name)?;
    let row = rows.and_then(|rows| rows.into_iter().next());
    let index = |i: i64| usize::try_from(i).unwrap_or(usize::MAX);
    Ok(row.map(|row| row.into_iter().map(index).collect()))
}
