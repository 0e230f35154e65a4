//! Which files of a directory are used together.
//!
//! Exports come in several precisions of each module, not always all of them:
//! `decoder_model_merged_q4.onnx` may have no `embed_tokens_q4.onnx` beside it.
//! Clients then pair what is there. A *set* is one vision encoder, one token
//! embedding and one decoder that a client would open together.

use std::collections::BTreeSet;

use super::{NoMatch, Part, Role, Vlm};
use crate::ir::{DataType, Dim, Model, ValueId};

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
    /// Token embedding.
    Embedding,
    /// Decoder.
    Decoder,
    /// None of these.
    Unknown,
}

impl Kind {
    /// The parts of a model.
    pub const PARTS: [Self; 3] = [Self::Vision, Self::Embedding, Self::Decoder];

    /// Words for messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vision => "vision encoder",
            Self::Embedding => "token embedding",
            Self::Decoder => "decoder",
            Self::Unknown => "not recognised",
        }
    }

    /// One word, for metadata.
    pub fn word(self) -> &'static str {
        match self {
            Self::Vision => "vision",
            Self::Embedding => "embedding",
            Self::Decoder => "decoder",
            Self::Unknown => "unknown",
        }
    }

    /// What a rewritten file says it is. Files of versions that did not stamp it
    /// are told by their interface.
    fn stamped(model: &Model) -> Option<Self> {
        if let Some(word) = model.metadata(ROLE_KEY) {
            return Self::PARTS.into_iter().find(|k| k.word() == word);
        }
        model.metadata("duet.recipe")?;
        let floats = |values: &[ValueId], ranks: std::ops::RangeInclusive<usize>| {
            values.iter().any(|&v| {
                let ty = model.value(v).ty.as_ref();
                let float = ty.and_then(|t| t.dtype()).is_some_and(DataType::is_float);
                let rank = ty.and_then(|t| t.shape()).map(<[Dim]>::len);
                float && rank.is_some_and(|r| ranks.contains(&r))
            })
        };
        let graph = model.graph();
        if floats(&graph.outputs, 4..=4) {
            return Some(Self::Decoder);
        }
        Some(if floats(&graph.inputs, 4..=5) {
            Self::Vision
        } else {
            Self::Embedding
        })
    }
}

/// The files that are used together, as positions in [`Vlm::parts`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileSet {
    /// Variant that the set is named after; empty for the plain files.
    pub variant: String,
    /// Vision encoder.
    pub vision: Option<usize>,
    /// Token embedding.
    pub embedding: Option<usize>,
    /// Decoder.
    pub decoder: Option<usize>,
}

impl FileSet {
    /// The file of a kind.
    pub fn get(&self, kind: Kind) -> Option<usize> {
        match kind {
            Kind::Vision => self.vision,
            Kind::Embedding => self.embedding,
            Kind::Decoder => self.decoder,
            Kind::Unknown => None,
        }
    }

    /// All files of the set.
    pub fn files(&self) -> impl Iterator<Item = usize> {
        [self.vision, self.embedding, self.decoder]
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
            let fits = move |p: &&(usize, &Part)| p.1.kind() == kind;
            let all: Vec<(usize, &Part)> = self.parts.iter().enumerate().collect();
            all.iter().filter(fits).copied().collect::<Vec<_>>()
        };
        let own = |kind: Kind| {
            let files = of(kind).into_iter().filter(|(_, p)| p.variant == variant);
            files.min_by_key(|(index, p)| (decoder_rank(p), *index))
        };
        // The decoder says what it reads; without one of its own, what is there.
        let anchor = [Kind::Decoder, Kind::Vision, Kind::Embedding]
            .into_iter()
            .find_map(own)
            .map(|(_, p)| p);
        let nearest = |kind: Kind| {
            let files = of(kind).into_iter();
            let best = files.min_by_key(|(index, p)| {
                let stamp = |p: &Part| p.model.metadata("duet.recipe").map(str::to_owned);
                let same_stamp = anchor.is_some_and(|a| stamp(a) == stamp(p));
                let same_type = anchor.is_some_and(|a| a.interface() == p.interface());
                let begins = !p.variant.is_empty() && variant.starts_with(&p.variant);
                (
                    !same_stamp,
                    !same_type,
                    !begins,
                    !p.variant.is_empty(),
                    decoder_rank(p),
                    *index,
                )
            });
            best.map(|(index, _)| index)
        };
        let pick = |kind: Kind| own(kind).map(|(i, _)| i).or_else(|| nearest(kind));
        FileSet {
            variant: variant.to_owned(),
            vision: pick(Kind::Vision),
            embedding: pick(Kind::Embedding),
            decoder: pick(Kind::Decoder),
        }
    }

    /// Files of one kind and variant between which nothing decides. Positions.
    pub fn ambiguous(&self) -> Option<(Kind, Vec<usize>)> {
        for kind in Kind::PARTS {
            for variant in self.variants() {
                let all = self.parts.iter().enumerate();
                let same = all.filter(|(_, p)| p.kind() == kind && p.variant == variant);
                let same: Vec<usize> = same.map(|(i, _)| i).collect();
                let known = |i: &usize| DECODERS.contains(&self.parts[*i].module().as_str());
                let pair = kind == Kind::Decoder && same.iter().all(known);
                if same.len() > 1 && !pair {
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
                Role::Embedding(e) => ("a token embedding of this model", e.width),
                Role::Decoder(_) | Role::Unknown(_) => continue,
            };
            if let Some(found) = found.filter(|f| *f != width) {
                let why = format!("its output is {found} wide, the decoder reads {width}");
                part.role = Role::Unknown(vec![NoMatch::new(what, why)]);
            }
        }
    }
}

/// Preference among decoders of one variant.
fn decoder_rank(part: &Part) -> usize {
    let module = part.module();
    let known = DECODERS.iter().position(|d| *d == module);
    known.unwrap_or(0)
}
