//! Which files of a directory are used together.
//!
//! A model may have two encoders, one for images and one for clips (Video-LLaVA):
//! they are of different kinds here, so neither is in the other's way.
//!
//! Exports come in several precisions of each module, not always all of them:
//! `decoder_model_merged_q4.onnx` may have no `embed_tokens_q4.onnx` beside it.
//! Clients then pair what is there. A *set* is one vision encoder, one token
//! embedding and one decoder that a client would open together, or one file that
//! holds all of them. A decoder can be two graphs: one that starts a cache and one
//! that goes on from it, as two files or as the branches of a merged one.

use std::collections::BTreeSet;

use super::decoder::CacheNames;
use super::pixels::takes_clips;
use super::{NoMatch, Part, Role, Vlm, WholeModel};
use crate::ir::{DataType, Dim, Model, ValueId};

/// Metadata key of the recipe that a file was rewritten with: its text.
pub const RECIPE_KEY: &str = "duet.recipe";

/// Metadata key of the version that rewrote a file.
pub const VERSION_KEY: &str = "duet.version";

/// Metadata key under which rewritten files say what they are: a rewritten
/// graph is no longer recognised by its dataflow.
pub const ROLE_KEY: &str = "duet.role";

/// Decoder modules that Optimum and transformers.js put side by side, best
/// first. Elsewhere two decoders of one variant are ambiguous.
const DECODERS: &[&str] = &[
    "decoder_model_merged",
    "decoder_with_past_model",
    "decoder_model",
];

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Vision tower and projector.
    Vision,
    /// The same for clips, beside the one for images or alone.
    Video,
    /// Token embedding.
    Embedding,
    /// Decoder.
    Decoder,
    /// All of these in one graph.
    Whole,
    /// None of these.
    Unknown,
}

impl Kind {
    /// The parts of a model.
    pub const PARTS: [Self; 5] = [
        Self::Vision,
        Self::Video,
        Self::Embedding,
        Self::Decoder,
        Self::Whole,
    ];

    /// Words for messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vision => "vision encoder",
            Self::Video => "video encoder",
            Self::Embedding => "token embedding",
            Self::Decoder => "decoder",
            Self::Whole => "whole model",
            Self::Unknown => "not recognised",
        }
    }

    /// One word, for metadata.
    pub fn word(self) -> &'static str {
        match self {
            Self::Vision => "vision",
            Self::Video => "video",
            Self::Embedding => "embedding",
            Self::Decoder => "decoder",
            Self::Whole => "whole",
            Self::Unknown => "unknown",
        }
    }

    /// What a rewritten file says it is. Files of versions that did not stamp it
    /// are told by their interface.
    fn stamped(model: &Model) -> Option<Self> {
        if let Some(word) = model.metadata(ROLE_KEY) {
            let stamped = Self::PARTS.into_iter().find(|k| k.word() == word);
            // A file of two towers has one stamp.
            return stamped.map(|kind| match kind {
                Self::Vision if takes_clips(model) => Self::Video,
                Self::Video if !takes_clips(model) => Self::Vision,
                kind => kind,
            });
        }
        model.metadata(RECIPE_KEY)?;
        let floats = |values: &[ValueId], ranks: std::ops::RangeInclusive<usize>| {
            values.iter().any(|&v| {
                let ty = model.value(v).ty.as_ref();
                let float = ty.and_then(|t| t.dtype()).is_some_and(DataType::is_float);
                let rank = ty.and_then(|t| t.shape()).map(<[Dim]>::len);
                float && rank.is_some_and(|r| ranks.contains(&r))
            })
        };
        let graph = model.graph();
        if WholeModel::has_interface(model) {
            return Some(Self::Whole);
        }
        if floats(&graph.outputs, 4..=4) {
            return Some(Self::Decoder);
        }
        Some(if floats(&graph.inputs, 4..=5) {
            if takes_clips(model) {
                Self::Video
            } else {
                Self::Vision
            }
        } else {
            Self::Embedding
        })
    }
}

/// The graphs of one decoder, as positions in [`Vlm::parts`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DecoderFiles {
    /// The graph that goes on from a cache; the only one of a decoder that has
    /// none.
    pub main: usize,
    /// The graph that runs first, if that is another.
    pub prompt: Option<usize>,
}

/// The files that are used together, as positions in [`Vlm::parts`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileSet {
    /// Variant that the set is named after; empty for the plain files.
    pub variant: String,
    /// Vision encoder.
    pub vision: Option<usize>,
    /// Encoder of clips, where the model has one.
    pub video: Option<usize>,
    /// Token embedding.
    pub embedding: Option<usize>,
    /// Decoder.
    pub decoder: Option<DecoderFiles>,
    /// The model in one file.
    pub whole: Option<usize>,
}

impl FileSet {
    /// The file of a kind; of a decoder in two, the one that goes on.
    pub fn get(&self, kind: Kind) -> Option<usize> {
        match kind {
            Kind::Vision => self.vision,
            Kind::Video => self.video,
            Kind::Embedding => self.embedding,
            Kind::Decoder => self.decoder.map(|d| d.main),
            Kind::Whole => self.whole,
            Kind::Unknown => None,
        }
    }

    /// All parts of the set.
    pub fn files(&self) -> impl Iterator<Item = usize> {
        let decoder = self.decoder.map(|d| d.main);
        let prompt = self.decoder.and_then(|d| d.prompt);
        [
            self.vision,
            self.video,
            self.embedding,
            prompt,
            decoder,
            self.whole,
        ]
        .into_iter()
        .flatten()
    }
}

impl Part {
    /// What the file is: as it is stamped, else as it was recognised.
    pub fn kind(&self) -> Kind {
        Kind::stamped(&self.model).unwrap_or_else(|| self.role.kind())
    }

    /// File name without extension and variant.
    pub fn module(&self) -> String {
        let stem = self.file.file_stem().unwrap_or_default().to_string_lossy();
        let suffix = format!("_{}", self.variant);
        match stem.strip_suffix(&suffix) {
            Some(module) if !self.variant.is_empty() => module.to_owned(),
            _ => stem.into_owned(),
        }
    }

    /// Whether it goes on from a cache.
    fn takes_past(&self) -> bool {
        let inputs = &self.model.graph().inputs;
        inputs
            .iter()
            .any(|v| CacheNames::takes(self.model.name(*v)))
    }

    /// Element type of what passes between the files.
    fn interface(&self) -> Option<DataType> {
        let graph = self.model.graph();
        let values = match self.kind() {
            Kind::Decoder => &graph.inputs,
            _ => &graph.outputs,
        };
        values.iter().find_map(|&v| {
            let value = self.model.value(v);
            let ty = value.ty.as_ref()?;
            let embeds = ty.dtype()?.is_float() && ty.shape().is_none_or(|s| s.len() <= 3);
            (embeds && value.initializer.is_none()).then(|| ty.dtype())?
        })
    }
}

impl Vlm {
    /// Variants of the recognised files, the plain one first.
    pub fn variants(&self) -> Vec<String> {
        let parts = self.parts.iter().filter(|p| p.kind() != Kind::Unknown);
        let all: BTreeSet<String> = parts.map(|p| p.variant.clone()).collect();
        all.into_iter().collect()
    }

    /// One set for each variant, completed with files of other variants where
    /// it has none of its own: those with the same element type at the
    /// interface first, of these the plain ones first.
    pub fn sets(&self) -> Vec<FileSet> {
        self.variants().iter().map(|v| self.set(v)).collect()
    }

    /// The set of a variant.
    pub fn set(&self, variant: &str) -> FileSet {
        let of = |kind: Kind| {
            let all = self.parts.iter().enumerate();
            all.filter(move |(_, p)| p.kind() == kind)
        };
        let own = |kind: Kind| {
            let files = of(kind).filter(|(_, p)| p.variant == variant);
            files.min_by_key(|(index, p)| (preference(p), *index))
        };
        // The decoder says what it reads; without one of its own, what is there.
        let anchor = [Kind::Decoder, Kind::Vision, Kind::Video, Kind::Embedding]
            .into_iter()
            .find_map(own)
            .map(|(_, p)| p);
        let nearest = |kind: Kind| {
            // A file that holds everything needs none beside it.
            let anchor = anchor?;
            let stamp = |p: &Part| p.model.metadata(RECIPE_KEY).map(str::to_owned);
            let best = of(kind).min_by_key(|(index, p)| {
                let begins = !p.variant.is_empty() && variant.starts_with(&p.variant);
                (
                    stamp(anchor) != stamp(p),
                    anchor.interface() != p.interface(),
                    !begins,
                    !p.variant.is_empty(),
                    preference(p),
                    *index,
                )
            });
            best.map(|(index, _)| index)
        };
        let pick = |kind: Kind| own(kind).map(|(i, _)| i).or_else(|| nearest(kind));
        let decoder = pick(Kind::Decoder).map(|chosen| {
            let all = self.decoder_files(&self.parts[chosen].variant);
            let holds = |d: &&DecoderFiles| d.main == chosen || d.prompt == Some(chosen);
            all.iter().find(holds).copied().unwrap_or(DecoderFiles {
                main: chosen,
                prompt: None,
            })
        });
        FileSet {
            variant: variant.to_owned(),
            vision: pick(Kind::Vision),
            video: pick(Kind::Video),
            embedding: pick(Kind::Embedding),
            decoder,
            whole: own(Kind::Whole).map(|(index, _)| index),
        }
    }

    /// The decoders of a variant, each with the graph that starts its cache where
    /// that is another.
    ///
    /// Only names tell which of several files goes on from a cache that another
    /// started: the exporters' convention is `decoder_with_past_model` beside
    /// `decoder_model`.
    pub fn decoder_files(&self, variant: &str) -> Vec<DecoderFiles> {
        let part = |i: usize| &self.parts[i];
        let ours = |i: &usize| part(*i).variant == variant && part(*i).kind() == Kind::Decoder;
        let all = (0..self.parts.len()).filter(ours);
        let (going_on, starting): (Vec<usize>, Vec<usize>) =
            all.partition(|i| part(*i).takes_past());
        let named = |i: usize| part(i).module().contains("with_past");
        let any_named = going_on.iter().any(|i| named(*i));
        let partner = |main: usize| {
            let branch = starting.iter().find(|s| part(**s).file == part(main).file);
            let alone = |i: usize| part(i).source.branch.is_none();
            let file = || starting.iter().find(|s| alone(**s));
            let merged = part(main).module() == DECODERS[0];
            let chosen = alone(main) && !merged && (!any_named || named(main));
            branch.or_else(|| file().filter(|_| chosen)).copied()
        };
        let mut found: Vec<DecoderFiles> = going_on
            .iter()
            .map(|&main| DecoderFiles {
                main,
                prompt: partner(main),
            })
            .collect();
        let taken: Vec<usize> = found.iter().filter_map(|d| d.prompt).collect();
        let left = starting.into_iter().filter(|s| !taken.contains(s));
        found.extend(left.map(|main| DecoderFiles { main, prompt: None }));
        found
    }

    /// Files of one kind and variant between which nothing decides, as positions
    /// of one part of each.
    pub fn ambiguous(&self) -> Option<(Kind, Vec<usize>)> {
        for kind in Kind::PARTS {
            for variant in self.variants() {
                let all = self.parts.iter().enumerate();
                let same = all.filter(|(_, p)| p.kind() == kind && p.variant == variant);
                let mut same: Vec<usize> = same.map(|(i, _)| i).collect();
                // The branches of a file follow each other.
                same.dedup_by_key(|i| &self.parts[*i].file);
                let known = |i: &usize| DECODERS.contains(&self.parts[*i].module().as_str());
                let named = kind == Kind::Decoder && same.iter().all(known);
                let pair = || match same[..] {
                    [a, b] => self.parts[a].takes_past() != self.parts[b].takes_past(),
                    _ => false,
                };
                if same.len() > 1 && !named && !(kind == Kind::Decoder && pair()) {
                    return Some((kind, same));
                }
            }
        }
        None
    }

    /// Takes what does not fit the decoder for another model's: a tower or
    /// embedding of another width is no part of this one.
    pub fn set_strangers_aside(&mut self) {
        let widths: BTreeSet<Option<i64>> = self.decoders().map(|(_, d)| d.width).collect();
        let [Some(width)] = widths.into_iter().collect::<Vec<_>>()[..] else {
            return;
        };
        for part in &mut self.parts {
            let (what, found) = match &part.role {
                Role::Vision(t) => ("a vision encoder of this model", t.feature_width),
                Role::Encoder(e) => ("a vision encoder of this model", e.feature_width),
                Role::Embedding(e) => ("a token embedding of this model", e.width),
                Role::Decoder(_) | Role::Whole(_) | Role::Unknown(_) => continue,
            };
            if let Some(found) = found.filter(|f| *f != width) {
                let why = format!("its output is {found} wide, the decoder reads {width}");
                part.role = Role::Unknown(vec![NoMatch::new(what, why)]);
            }
        }
    }
}

/// Preference among files of one kind and variant: that of their names, and of a
/// decoder in two graphs the one that goes on from a cache.
fn preference(part: &Part) -> (usize, bool) {
    let module = part.module();
    let known = DECODERS.iter().position(|d| *d == module);
    (known.unwrap_or(0), !part.takes_past())
}
