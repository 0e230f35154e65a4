//! Which clients a rewritten model suits, from what is in its files. `docs/clients.md` has the versions that were
//! tested, and `tests/clients` the tests.

use std::path::Path;

use serde_json::{Value, json};

use crate::arch::{Decoder, Kind, Part};
use crate::ir::{Dim, Model, ValueId};
use crate::onnx::{Layout, ModelDir};
use crate::passes::{
    KEPT_OUTPUT, KvLayout, Recipe, Rewritten, SALIENT_MASK_INPUT, SHAPES_KEY, TokenMerge,
    VISUAL_MASK_INPUT, VisualPrune,
};

/// `model_type`s that transformers.js 4.3 has a class of three files for.
const TRANSFORMERS_JS: &[&str] = &[
    "gemma3",
    "idefics3",
    "llava",
    "llava_onevision",
    "llava_qwen2",
    "paligemma",
    "qwen2_5_vl",
    "qwen2_vl",
    "smolvlm",
];

/// Whether a client runs the model.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Suits {
    Yes,
    /// If the one who uses it does this.
    With(String),
    /// Why not.
    No(String),
}

/// A client and whether it runs the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Client {
    name: &'static str,
    suits: Suits,
}

impl Client {
    /// For programs.
    pub(super) fn json(&self) -> Value {
        let (word, note) = match &self.suits {
            Suits::Yes => ("yes", None),
            Suits::With(note) => ("with", Some(note)),
            Suits::No(note) => ("no", Some(note)),
        };
        json!({ "client": self.name, "suits": word, "note": note })
    }
}

/// The same for people, a line for each kind of answer.
pub(super) fn lines(clients: &[Client]) -> Vec<String> {
    let yes: Vec<&str> = clients
        .iter()
        .filter(|c| c.suits == Suits::Yes)
        .map(|c| c.name)
        .collect();
    let mut lines = Vec::new();
    if !yes.is_empty() {
        lines.push(format!("suits {}", yes.join(", ")));
    }
    for client in clients {
        match &client.suits {
            Suits::Yes => {}
            Suits::With(what) => lines.push(format!("suits {}, if: {what}", client.name)),
            Suits::No(why) => lines.push(format!("not for {}: {why}", client.name)),
        }
    }
    lines
}

/// What clients go by.
struct Facts {
    layout: Layout,
    /// Written next to the old files, under other names.
    beside: bool,
    model_type: Option<String>,
    /// Inputs of the decoder that no unmodified model has.
    extra: Vec<&'static str>,
    whole: bool,
    /// Vision encoder, embedding and decoder are all there.
    complete: bool,
    /// `decoder_model_merged`, with a cache whose heads are stated.
    merged_decoder: bool,
    /// Caches of layers differ in length.
    ragged: bool,
    merges: bool,
    placed: bool,
    kept_output: bool,
    /// Images of several crops, whose merged tokens the processor does not count.
    merged_crops: bool,
    /// Every shape is fixed.
    fixed: bool,
}

/// Every client, in the order of the documentation.
pub(super) fn clients(
    dir: &ModelDir,
    done: &Rewritten,
    recipe: &Recipe,
    beside: bool,
    crops: bool,
) -> Vec<Client> {
    let facts = Facts::of(dir, done, recipe, beside, crops);
    let answers = [
        ("transformers.js", facts.transformers_js()),
        ("AutoProcessor with ONNX Runtime", facts.auto_processor()),
        ("ONNX Runtime (Python, Node.js, Web)", facts.plain()),
        ("ONNX Runtime GenAI", facts.genai()),
    ];
    answers.map(|(name, suits)| Client { name, suits }).to_vec()
}

impl Facts {
    fn of(dir: &ModelDir, done: &Rewritten, recipe: &Recipe, beside: bool, crops: bool) -> Self {
        let parts = &done.vlm.parts;
        let has = |kinds: &[Kind]| parts.iter().any(|p| kinds.contains(&p.role.kind()));
        let inputs =
            |model: &Model, name: &str| model.graph().inputs.iter().any(|v| model.name(*v) == name);
        let extra = [VISUAL_MASK_INPUT, SALIENT_MASK_INPUT];
        let extra = extra
            .into_iter()
            .filter(|name| parts.iter().any(|p| inputs(&p.model, name)));
        let kept = |p: &Part| {
            p.model
                .graph()
                .outputs
                .iter()
                .any(|v| p.model.name(*v) == KEPT_OUTPUT)
        };
        let placed = recipe.placed(&done.vlm);
        let merges = recipe.pass::<TokenMerge>().is_some();
        let drops = placed || recipe.pass::<VisualPrune>().is_some();
        let config = std::fs::read_to_string(dir.root.join("config.json")).ok();
        let config: Option<Value> = config.and_then(|text| serde_json::from_str(&text).ok());
        let model_type = config.and_then(|c| Some(c.get("model_type")?.as_str()?.to_owned()));
        Self {
            layout: dir.layout,
            beside,
            model_type,
            extra: extra.collect(),
            whole: has(&[Kind::Whole]),
            complete: has(&[Kind::Vision, Kind::Video])
                && has(&[Kind::Embedding])
                && has(&[Kind::Decoder]),
            merged_decoder: done
                .vlm
                .decoders()
                .all(|(part, d)| is_merged(&parts[part], d)),
            ragged: drops && recipe.context.kv == KvLayout::Ragged,
            merges,
            placed,
            kept_output: parts.iter().any(kept),
            merged_crops: crops && merges && !placed,
            fixed: parts.iter().any(|p| p.model.metadata(SHAPES_KEY).is_some()),
        }
    }

    /// What every client of whole directories needs.
    fn directory(&self) -> Option<Suits> {
        let no = |why: &str| Some(Suits::No(why.to_owned()));
        match () {
            () if self.beside => no("it opens files and configs by their usual names; use --out"),
            () if self.layout == Layout::GenAi || !self.layout.is_directory() => {
                no("it reads Hugging Face directories (config.json, processor configs, onnx/)")
            }
            () if self.whole || !self.complete => {
                no("it runs a vision encoder, an embedding and a decoder, which are not all there")
            }
            () if self.kept_output => no(
                "positions would be those of the whole grid, and fewer features come out \
                 (kept_token_indices); use placement: decoder",
            ),
            () if self.merged_crops => no(
                "its processor counts the unmerged tokens of all crops; use placement: decoder, or visual_prune alone",
            ),
            () => None,
        }
    }

    /// What one has to do to fill the inputs.
    fn fill(&self) -> Option<String> {
        let given = |extra: &[&str]| format!("the decoder's {} is given", extra.join(" and "));
        let padded =
            "prompts and caches are padded to the fixed lengths (docs/clients.md, fixed shapes)";
        match (self.extra.as_slice(), self.fixed) {
            ([], false) => None,
            ([], true) => Some(padded.to_owned()),
            (extra, false) => Some(given(extra)),
            (extra, true) => Some(format!("{}, and {padded}", given(extra))),
        }
    }

    fn transformers_js(&self) -> Suits {
        if let Some(no) = self.directory() {
            return no;
        }
        if !self.extra.is_empty() {
            return Suits::No(format!(
                "it gives no {}; use marker: channel",
                self.extra.join(", ")
            ));
        }
        if self.fixed {
            return Suits::No(
                "it gives prompts and caches of any length; rewrite without --static".into(),
            );
        }
        if !self.merged_decoder {
            return Suits::No(
                "it opens onnx/decoder_model_merged.onnx with a cache whose heads and their width are stated".into(),
            );
        }
        match &self.model_type {
            Some(known) if TRANSFORMERS_JS.contains(&known.as_str()) => Suits::Yes,
            Some(other) => Suits::No(format!("it has no class for model_type '{other}'")),
            None => Suits::No("there is no config.json that names a model_type".into()),
        }
    }

    fn auto_processor(&self) -> Suits {
        match self.directory() {
            Some(no) => no,
            None => self.fill().map_or(Suits::Yes, Suits::With),
        }
    }

    fn plain(&self) -> Suits {
        self.fill().map_or(Suits::Yes, Suits::With)
    }

    fn genai(&self) -> Suits {
        if self.layout != Layout::GenAi {
            return Suits::No("there is no genai_config.json".into());
        }
        if !self.extra.is_empty() {
            return Suits::No(format!(
                "it gives no {}; use marker: channel",
                self.extra.join(", ")
            ));
        }
        if self.ragged {
            return Suits::No(
                "it allocates one length for the caches of all layers; use kv: padded".into(),
            );
        }
        if self.beside {
            return Suits::With(
                "genai_config_SUFFIX.json is the genai_config.json of a directory".into(),
            );
        }
        if self.merges && !self.placed {
            return Suits::With(
                "prompt, pixel_values and num_image_tokens come from set_inputs, since its processors fix the number \
                 of image tokens (or placement: decoder)"
                    .into(),
            );
        }
        Suits::Yes
    }
}

/// Whether a decoder is a file that transformers.js opens, with a cache that it can begin.
fn is_merged(part: &Part, decoder: &Decoder) -> bool {
    let stem = part.file.file_stem().unwrap_or_default().to_string_lossy();
    let folder = part.file.parent() == Some(Path::new("onnx"));
    let stated = |v: ValueId| {
        let shape = part.model.value(v).ty.as_ref().and_then(|t| t.shape());
        let known = |at: usize| {
            shape
                .and_then(|s| s.get(at))
                .is_some_and(|d| matches!(d, Dim::Known(_)))
        };
        known(1) && known(3)
    };
    let caches = decoder
        .layers
        .iter()
        .map(|l| l.past.is_some_and(|(k, v)| stated(k) && stated(v)));
    let branch = part.source.branch.is_some();
    folder && stem.starts_with("decoder_model_merged") && (branch || caches.into_iter().all(|c| c))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        Facts {
            layout: Layout::HuggingFace,
            beside: false,
            model_type: Some("llava".into()),
            extra: Vec::new(),
            whole: false,
            complete: true,
            merged_decoder: true,
            ragged: true,
            merges: true,
            placed: false,
            kept_output: false,
            merged_crops: false,
            fixed: false,
        }
    }

    fn no(suits: &Suits, fragment: &str) {
        assert!(
            matches!(suits, Suits::No(why) if why.contains(fragment)),
            "{suits:?}"
        );
    }

    #[test]
    fn directories_are_for_clients_of_directories() {
        let llava = facts();
        assert_eq!(llava.transformers_js(), Suits::Yes);
        assert_eq!(
            (llava.auto_processor(), llava.plain()),
            (Suits::Yes, Suits::Yes)
        );
        no(&llava.genai(), "genai_config.json");
        let beside = Facts {
            beside: true,
            ..facts()
        };
        no(&beside.transformers_js(), "--out");
        assert_eq!(beside.plain(), Suits::Yes);
        let next = Facts {
            model_type: Some("llava_next".into()),
            ..facts()
        };
        no(&next.transformers_js(), "llava_next");
        let crops = Facts {
            merged_crops: true,
            ..facts()
        };
        no(&crops.auto_processor(), "crops");
        let qwen = Facts {
            kept_output: true,
            ..facts()
        };
        no(&qwen.transformers_js(), "placement: decoder");
    }

    #[test]
    fn further_inputs_are_for_loops_of_ones_own() {
        let input = Facts {
            extra: vec![VISUAL_MASK_INPUT],
            ..facts()
        };
        no(&input.transformers_js(), VISUAL_MASK_INPUT);
        assert!(matches!(input.plain(), Suits::With(what) if what.contains(VISUAL_MASK_INPUT)));
    }

    #[test]
    fn genai_takes_one_length_for_all_layers() {
        let genai = |ragged, merges, placed| Facts {
            layout: Layout::GenAi,
            ragged,
            merges,
            placed,
            ..facts()
        };
        no(&genai(true, true, true).genai(), "kv: padded");
        assert!(
            matches!(genai(false, true, false).genai(), Suits::With(what) if what.contains("set_inputs"))
        );
        assert_eq!(genai(false, true, true).genai(), Suits::Yes);
        assert_eq!(genai(false, false, false).genai(), Suits::Yes);
        no(&genai(false, true, true).transformers_js(), "Hugging Face");
    }
}
