//! Text to tokens and back: tokenizer, chat template, image placeholders, end-of-sequence tokens.

use std::path::{Path, PathBuf};

use serde_json::Value as Json;
use tokenizers::Tokenizer;

use super::error::{Result, RuntimeError};
use super::image::read_json;
use super::template::{ChatTemplate, Message, SpecialTokens};

/// The token that stands for an image or a clip in a prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageToken {
    /// Its id.
    pub id: u32,
    /// Its text, for example `<image>`.
    pub text: String,
}

/// Tokens of a text, with where each comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Byte range of each token in the text; empty for tokens that the tokenizer adds by itself.
    pub offsets: Vec<(usize, usize)>,
}

/// Token ids in which each image placeholder is repeated once for each of its features.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expanded {
    /// Token ids.
    pub ids: Vec<u32>,
    /// True at the places of image features.
    pub visual: Vec<bool>,
    /// Which of the unexpanded tokens each token comes from.
    pub source: Vec<usize>,
}

/// Tokenizer, template and special tokens of a model.
#[derive(Debug, Clone)]
pub struct TextProcessor {
    tokenizer: Tokenizer,
    path: PathBuf,
    template: Option<ChatTemplate>,
    specials: SpecialTokens,
    image_token: Option<ImageToken>,
    video_token: Option<ImageToken>,
    eos_ids: Vec<u32>,
}

impl TextProcessor {
    /// Reads `tokenizer.json` and, where they are there, `tokenizer_config.json`, `special_tokens_map.json`,
    /// `config.json`, `generation_config.json`, `processor_config.json` and the chat template.
    ///
    /// # Errors
    /// `tokenizer.json` is missing or damaged, or another file is damaged.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let path = dir.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(RuntimeError::io(&path))?;
        let failed = |e: tokenizers::Error| RuntimeError::Tokenizer {
            path: path.clone(),
            reason: e.to_string(),
        };
        let mut tokenizer = Tokenizer::from_bytes(&bytes).map_err(failed)?;
        // Settings left over from training would cut or fill prompts.
        tokenizer.with_truncation(None).map_err(failed)?;
        tokenizer.with_padding(None);

        let read = |name: &str| read_json(&dir.join(name));
        let tokenizer_config = read("tokenizer_config.json")?;
        let special_tokens = read("special_tokens_map.json")?;
        let model_config = read("config.json")?;
        let generation = read("generation_config.json")?;
        let processor = read("processor_config.json")?;

        let special = |name: &str| {
            [&tokenizer_config, &special_tokens]
                .into_iter()
                .flatten()
                .find_map(|c| token(c, name))
        };
        let specials = SpecialTokens {
            bos: special("bos_token"),
            eos: special("eos_token"),
            pad: special("pad_token"),
            unk: special("unk_token"),
        };

        let others = [
            processor.as_ref(),
            tokenizer_config.as_ref(),
            special_tokens.as_ref(),
        ];
        let placeholder = |kind| placeholder(&tokenizer, kind, model_config.as_ref(), &others);
        let (image_token, video_token) = (placeholder("image"), placeholder("video"));

        let mut eos_ids = Vec::new();
        let text_config = model_config
            .as_ref()
            .and_then(|config| config.get("text_config"));
        for config in [generation.as_ref(), model_config.as_ref(), text_config] {
            eos_ids = config
                .map(|config| id_list(config, "eos_token_id"))
                .unwrap_or_default();
            if !eos_ids.is_empty() {
                break;
            }
        }
        if eos_ids.is_empty() {
            let id = specials
                .eos
                .as_deref()
                .and_then(|eos| tokenizer.token_to_id(eos));
            eos_ids.extend(id);
        }
        let template = ChatTemplate::from_dir(dir)?;
        Ok(Self {
            tokenizer,
            path,
            template,
            specials,
            image_token,
            video_token,
            eos_ids,
        })
    }

    /// Special tokens.
    pub fn specials(&self) -> &SpecialTokens {
        &self.specials
    }

    /// The image placeholder, if the model has one.
    pub fn image_token(&self) -> Option<&ImageToken> {
        self.image_token.as_ref()
    }

    /// The placeholder of a clip, if the model has one.
    pub fn video_token(&self) -> Option<&ImageToken> {
        self.video_token.as_ref()
    }

    /// Tokens that end an answer.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    /// True if the model brings a chat template.
    pub fn has_template(&self) -> bool {
        self.template.is_some()
    }

    /// Replaces the chat template.
    pub fn set_template(&mut self, template: ChatTemplate) {
        self.template = Some(template);
    }

    /// Renders a conversation, ready for the model's answer, with one placeholder for each image. A model
    /// without a template gets `USER: <image>\n… ASSISTANT:`, as LLaVA-1.5 was trained.
    ///
    /// # Errors
    /// The template fails.
    pub fn render(&self, messages: &[Message]) -> Result<String> {
        if let Some(template) = &self.template {
            return template.render(messages, &self.specials, true);
        }
        let text = |token: &Option<ImageToken>, usual: &str| match token {
            Some(token) => token.text.clone(),
            None => usual.to_owned(),
        };
        let image = text(&self.image_token, "<image>");
        let video = text(&self.video_token, "<video>");
        let mut out = String::new();
        for message in messages {
            let role = message.role.to_uppercase();
            let mut images = format!("{image}\n").repeat(message.images());
            images += &format!("{video}\n").repeat(message.clips());
            out.push_str(&format!("{role}: {images}{} ", message.texts().join(" ")));
        }
        Ok(out + "ASSISTANT:")
    }

    /// Tokenizes a rendered prompt. The begin-of-sequence token is added as the tokenizer says, but not twice
    /// where the template has written it already.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn encode(&self, text: &str) -> Result<Encoded> {
        let has_bos = self
            .specials
            .bos
            .as_deref()
            .is_some_and(|b| !b.is_empty() && text.starts_with(b));
        self.encode_raw(text, !has_bos)
    }

    /// Tokenizes a text, with or without the special tokens that the tokenizer adds by itself.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn encode_raw(&self, text: &str, add_special_tokens: bool) -> Result<Encoded> {
        let encoding = self
            .tokenizer
            .encode(text, add_special_tokens)
            .map_err(|e| self.failed(e))?;
        Ok(Encoded {
            ids: encoding.get_ids().to_vec(),
            offsets: encoding.get_offsets().to_vec(),
        })
    }

    /// The text of tokens.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        self.tokenizer
            .decode(ids, skip_special_tokens)
            .map_err(|e| self.failed(e))
    }

    /// The text of one token as the vocabulary has it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }

    /// Repeats the image placeholder of image i `counts[i]` times.
    ///
    /// # Errors
    /// There are images but the model has no placeholder, or the prompt has another number of them.
    pub fn expand(&self, ids: &[u32], counts: &[usize]) -> Result<Expanded> {
        self.expand_both(ids, counts, &[])
    }

    /// The same for prompts with clips: the placeholder of image i `images[i]` times, that of clip i
    /// `clips[i]` times.
    ///
    /// # Errors
    /// As [`expand`](Self::expand), of images and of clips.
    pub fn expand_both(&self, ids: &[u32], images: &[usize], clips: &[usize]) -> Result<Expanded> {
        let image = self.checked("image", self.image_token.as_ref(), ids, images.len())?;
        let own = self.video_token.as_ref();
        let own = own.filter(|token| self.image_token.as_ref() != Some(token));
        let video = self.checked("video", own, ids, clips.len())?;
        let (mut images, mut clips) = (images.iter(), clips.iter());
        let mut out = Expanded {
            ids: Vec::new(),
            visual: Vec::new(),
            source: Vec::new(),
        };
        for (place, &id) in ids.iter().enumerate() {
            let counts = match Some(id) {
                of if of == image => Some(&mut images),
                of if of == video => Some(&mut clips),
                _ => None,
            };
            let visual = counts.is_some();
            let times = counts.and_then(Iterator::next).copied().unwrap_or(1);
            for _ in 0..times {
                out.ids.push(id);
                out.visual.push(visual);
                out.source.push(place);
            }
        }
        Ok(out)
    }

    /// The id of a placeholder, which has to be in `ids` once for each of `given`.
    fn checked(
        &self,
        kind: &str,
        token: Option<&ImageToken>,
        ids: &[u32],
        given: usize,
    ) -> Result<Option<u32>> {
        let Some(token) = token else {
            if given == 0 {
                return Ok(None);
            }
            return Err(RuntimeError::Prompt(format!(
                "the model has no {kind} placeholder of its own: neither config.json (`{kind}_token_index`, \
                 `{kind}_token_id`) nor the processor's or tokenizer's configuration beside {} names one",
                self.path.display()
            )));
        };
        let found = ids.iter().filter(|id| **id == token.id).count();
        if found != given {
            return Err(RuntimeError::Prompt(format!(
                "it has {found} {kind} placeholders (`{}`) for {given} {kind}s; write one placeholder \
                 for each {kind}",
                token.text
            )));
        }
        Ok(Some(token.id))
    }

    fn failed(&self, e: tokenizers::Error) -> RuntimeError {
        RuntimeError::Tokenizer {
            path: self.path.clone(),
            reason: e.to_string(),
        }
    }
}

/// Turns tokens into text as they come, never cutting a character that takes several tokens.
#[derive(Debug, Clone, Default)]
pub struct Detokenizer {
    ids: Vec<u32>,
    /// Tokens before this are out already and no longer needed as context.
    start: usize,
    /// Tokens before this are out already.
    done: usize,
}

impl Detokenizer {
    /// Starts a new text.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a token; returns the text that is certain now, which may be empty. Special tokens give none.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn push(&mut self, text: &TextProcessor, id: u32) -> Result<String> {
        self.ids.push(id);
        self.emit(text, false)
    }

    /// What is left at the end, with `U+FFFD` for characters that never became whole.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn finish(&mut self, text: &TextProcessor) -> Result<String> {
        self.emit(text, true)
    }

    /// Decoders look at neighbours (a leading space is dropped at the start of a text only), so the tokens
    /// before are decoded along and cut off again.
    fn emit(&mut self, text: &TextProcessor, last: bool) -> Result<String> {
        let known = text.decode(&self.ids[self.start..self.done], true)?;
        let whole = text.decode(&self.ids[self.start..], true)?;
        if !last && whole.ends_with('\u{FFFD}') {
            return Ok(String::new());
        }
        // A decoder that rewrites what was out already cannot be taken back; go on after what is the same.
        let same: usize = known
            .chars()
            .zip(whole.chars())
            .take_while(|(a, b)| a == b)
            .map(|(a, _)| a.len_utf8())
            .sum();
        if whole.len() == same {
            return Ok(String::new());
        }
        self.start = self.done;
        self.done = self.ids.len();
        Ok(whole[same..].to_string())
    }
}

/// A special token of a configuration: a string, or an object with `content`.
fn token(config: &Json, name: &str) -> Option<String> {
    let value = config.get(name)?;
    value
        .as_str()
        .or_else(|| value.get("content")?.as_str())
        .map(str::to_string)
}

/// An id or a list of ids.
fn id_list(config: &Json, key: &str) -> Vec<u32> {
    let id = |value: &Json| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match config.get(key) {
        Some(Json::Array(list)) => list.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}

/// The placeholder of a `kind` (`image`, `video`): by id from the model's configuration, else by text from the
/// others, else the usual `<image>` if the vocabulary has it.
fn placeholder(
    tokenizer: &Tokenizer,
    kind: &str,
    model: Option<&Json>,
    others: &[Option<&Json>],
) -> Option<ImageToken> {
    let by_text = |text: String| {
        Some(ImageToken {
            id: tokenizer.token_to_id(&text)?,
            text,
        })
    };
    let named = others.iter().flatten().find_map(|config| {
        token(config, &format!("{kind}_token")).or_else(|| {
            let extra = config.get("extra_special_tokens")?;
            token(extra, &format!("{kind}_token"))
        })
    });
    let usual = format!("<{kind}>");
    let id = [format!("{kind}_token_index"), format!("{kind}_token_id")]
        .iter()
        .find_map(|key| id_list(model?, key).first().copied());
    match id {
        Some(id) => {
            let text = tokenizer.id_to_token(id).or(named).unwrap_or(usual);
            Some(ImageToken { id, text })
        }
        None => named.and_then(by_text).or_else(|| by_text(usual)),
    }
}

#[cfg(test)]
mod tests;
