//! The parts of a vision-language model: its files, and what is in each.

use std::borrow::Cow;
use std::path::PathBuf;

use super::unfold::{Source, unfold};
use super::{ArchError, Decoder, Embedding, Encoder, Kind, NoMatch, VisionTower, WholeModel};
use crate::ir::{IrError, Model};

/// What a model file is.
#[derive(Clone, Debug)]
pub enum Role {
    /// Vision tower and projector.
    Vision(Box<VisionTower>),
    /// Vision encoder whose tower is not known.
    Encoder(Box<Encoder>),
    /// Token embedding.
    Embedding(Box<Embedding>),
    /// Decoder.
    Decoder(Box<Decoder>),
    /// All of these in one graph.
    Whole(Box<WholeModel>),
    /// None of these; why not, for each.
    Unknown(Vec<NoMatch>),
}

impl Role {
    /// A word for messages.
    pub fn name(&self) -> &'static str {
        self.kind().name()
    }

    /// The role without what was found.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Vision(t) if t.video => Kind::Video,
            Self::Vision(_) | Self::Encoder(_) => Kind::Vision,
            Self::Embedding(_) => Kind::Embedding,
            Self::Decoder(_) => Kind::Decoder,
            Self::Whole(_) => Kind::Whole,
            Self::Unknown(_) => Kind::Unknown,
        }
    }

    /// Recognises what a model is.
    pub fn of(model: &Model) -> Self {
        let whole = WholeModel::has_interface(model).then(|| WholeModel::recognise(model));
        let whole = match whole {
            Some(Ok(whole)) => return Self::Whole(Box::new(whole)),
            Some(Err(why)) => Some(why),
            None => None,
        };
        // First: layers with a cache are also layers, which a tower is made of.
        let decoder = match Decoder::recognise(model) {
            Ok(decoder) => return Self::Decoder(Box::new(decoder)),
            Err(why) => why,
        };
        let vision = match VisionTower::recognise(model) {
            Ok(tower) => return Self::Vision(Box::new(tower)),
            Err(why) => why,
        };
        let embedding = match Embedding::recognise(model) {
            Ok(embedding) => return Self::Embedding(Box::new(embedding)),
            Err(why) => why,
        };
        // A whole model that is not understood is no encoder either.
        if whole.is_none()
            && let Some(encoder) = Encoder::recognise(model, &vision)
        {
            return Self::Encoder(Box::new(encoder));
        }
        Self::Unknown(whole.map_or_else(|| vec![vision, decoder, embedding], |why| vec![why]))
    }
}

/// One file of a vision-language model, or one branch of a merged decoder.
#[derive(Clone, Debug)]
pub struct Part {
    /// Path relative to the model's root, for messages and output.
    pub file: PathBuf,
    /// Precision suffix; empty for the plain file.
    pub variant: String,
    /// The graph.
    pub model: Model,
    /// What it is.
    pub role: Role,
    /// How it differs from what the file holds.
    pub source: Source,
}

impl Part {
    /// Path, and the branch where the part is one of a file's.
    pub fn label(&self) -> String {
        match &self.source.branch {
            Some(branch) => format!("{} ({branch})", self.file.display()),
            None => self.file.display().to_string(),
        }
    }

    /// Whether another part is the same piece of the same file.
    pub fn is_piece(&self, other: &Self) -> bool {
        self.file == other.file && self.source.branch == other.source.branch
    }
}

/// A file of a model as it is to be written.
#[derive(Clone, Debug)]
pub struct FileModel<'a> {
    /// Path relative to the model's root.
    pub file: PathBuf,
    /// Its graph, functions and branches as the file has them.
    pub model: Cow<'a, Model>,
}

/// A vision-language model as its files.
#[derive(Clone, Debug, Default)]
pub struct Vlm {
    /// Parts in the files' order; the branches of one file follow each other.
    pub parts: Vec<Part>,
}

impl Vlm {
    /// Recognises each of the given models.
    pub fn new(models: Vec<(PathBuf, String, Model)>) -> Self {
        let parts = models
            .into_iter()
            .flat_map(|(file, variant, model)| {
                unfold(model).into_iter().map(move |unfolded| Part {
                    file: file.clone(),
                    variant: variant.clone(),
                    model: unfolded.model,
                    role: unfolded.role,
                    source: unfolded.source,
                })
            })
            .collect();
        let mut vlm = Self { parts };
        vlm.set_encoders_aside();
        vlm
    }

    /// Beside a tower that is known, what merely gives features is no encoder of this model.
    fn set_encoders_aside(&mut self) {
        let known = |p: &Part| matches!(p.role, Role::Vision(_) | Role::Whole(_));
        if !self.parts.iter().any(known) {
            return;
        }
        for part in &mut self.parts {
            if let Role::Encoder(encoder) = &part.role {
                part.role = Role::Unknown(vec![encoder.why.clone()]);
            }
        }
    }

    /// The files, put together from their parts. A file that nothing changed is
    /// as it was read.
    ///
    /// # Errors
    /// Branches that no longer fit together.
    pub fn files(&self) -> Result<Vec<FileModel<'_>>, IrError> {
        let mut files = Vec::new();
        let mut at = 0;
        while let Some(first) = self.parts.get(at) {
            let pieces = self.parts[at..].iter().take_while(|p| p.file == first.file);
            let pieces: Vec<(&Source, &Model)> = pieces.map(|p| (&p.source, &p.model)).collect();
            at += pieces.len();
            files.push(FileModel {
                file: first.file.clone(),
                model: Source::fold(&pieces)?,
            });
        }
        Ok(files)
    }

    /// Vision towers with their files' positions; those for clips behind those for images.
    pub fn towers(&self) -> impl Iterator<Item = (usize, &VisionTower)> {
        let all = || {
            self.parts
                .iter()
                .enumerate()
                .filter_map(|(i, p)| match &p.role {
                    Role::Vision(t) => Some((i, t.as_ref())),
                    Role::Whole(w) => Some((i, &w.tower)),
                    _ => None,
                })
        };
        let images = all().filter(|(_, t)| !t.video);
        images.chain(all().filter(|(_, t)| t.video))
    }

    /// Files that give features, with their positions and that of the features among their
    /// outputs, whether their tower is known or not.
    pub fn features(&self) -> impl Iterator<Item = (usize, usize)> {
        let towers = self.towers();
        let known = towers.filter_map(|(index, tower)| Some((index, tower.features_index?)));
        known.chain(self.encoders().map(|(index, e)| (index, e.features_index)))
    }

    /// Encoders of no known structure with their files' positions.
    pub fn encoders(&self) -> impl Iterator<Item = (usize, &Encoder)> {
        let all = self.parts.iter().enumerate();
        all.filter_map(|(i, p)| match &p.role {
            Role::Encoder(e) => Some((i, e.as_ref())),
            _ => None,
        })
    }

    /// Decoders with their files' positions.
    pub fn decoders(&self) -> impl Iterator<Item = (usize, &Decoder)> {
        self.parts
            .iter()
            .enumerate()
            .filter_map(|(i, p)| match &p.role {
                Role::Decoder(d) => Some((i, d.as_ref())),
                Role::Whole(w) => Some((i, &w.decoder)),
                _ => None,
            })
    }

    /// Token embeddings with their files' positions.
    pub fn embeddings(&self) -> impl Iterator<Item = (usize, &Embedding)> {
        self.parts
            .iter()
            .enumerate()
            .filter_map(|(i, p)| match &p.role {
                Role::Embedding(e) => Some((i, e.as_ref())),
                _ => None,
            })
    }

    /// A file that holds none of the parts a pass was asked for is an error
    /// that says why, file by file.
    pub fn missing(&self, what: &str, pick: fn(&NoMatch) -> bool) -> ArchError {
        let mut problems = Vec::new();
        for part in &self.parts {
            let reasons = match &part.role {
                Role::Unknown(reasons) => reasons.as_slice(),
                Role::Encoder(encoder) => std::slice::from_ref(&encoder.why),
                _ => &[],
            };
            let mut reasons = reasons.iter().filter(|r| pick(r)).peekable();
            if !matches!(part.role, Role::Unknown(_)) && reasons.peek().is_none() {
                problems.push(format!("{}: it is the {}", part.label(), part.role.name()));
            }
            for reason in reasons {
                problems.push(format!("{}: {reason}", part.label()));
            }
        }
        ArchError::Unsupported {
            file: what.to_owned(),
            problem: format!("none was recognised\n  {}", problems.join("\n  ")),
        }
    }
}
