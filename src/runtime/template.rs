//! Chat templates: Jinja as Transformers renders it.

use std::path::{Path, PathBuf};

use minijinja::{Environment, ErrorKind, context};
use serde::{Serialize, Serializer};
use serde_json::{Value as Json, json};

use super::error::{Result, RuntimeError};
use super::image::read_json;

/// One piece of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// Stands for one image.
    Image,
    /// Stands for one clip.
    Video,
    /// Text.
    Text(String),
}

/// What a message says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// Plain text; templates see a string.
    Text(String),
    /// Images, clips and texts; templates see a list of `{type: image}`, `{type: video}` and
    /// `{type: text, text: …}`.
    Parts(Vec<Part>),
}

/// A message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What it says.
    pub content: Content,
}

impl Message {
    /// A user's message: `images` images, then the text.
    pub fn user(images: usize, text: impl Into<String>) -> Self {
        Self::user_with(images, 0, text)
    }

    /// A user's message: `images` images, `clips` clips, then the text.
    pub fn user_with(images: usize, clips: usize, text: impl Into<String>) -> Self {
        let mut parts = vec![Part::Image; images];
        parts.extend(vec![Part::Video; clips]);
        parts.push(Part::Text(text.into()));
        Self {
            role: "user".into(),
            content: Content::Parts(parts),
        }
    }

    /// The model's answer.
    pub fn assistant(text: impl Into<String>) -> Self {
        let content = Content::Parts(vec![Part::Text(text.into())]);
        Self {
            role: "assistant".into(),
            content,
        }
    }

    /// Images in this message.
    pub fn images(&self) -> usize {
        self.count(&Part::Image)
    }

    /// Clips in this message.
    pub fn clips(&self) -> usize {
        self.count(&Part::Video)
    }

    fn count(&self, kind: &Part) -> usize {
        match &self.content {
            Content::Text(_) => 0,
            Content::Parts(parts) => parts.iter().filter(|part| *part == kind).count(),
        }
    }

    /// The texts of this message, in order.
    pub fn texts(&self) -> Vec<&str> {
        match &self.content {
            Content::Text(text) => vec![text],
            Content::Parts(parts) => parts
                .iter()
                .filter_map(|part| match part {
                    Part::Text(text) => Some(text.as_str()),
                    Part::Image | Part::Video => None,
                })
                .collect(),
        }
    }
}

impl Serialize for Message {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let content = match &self.content {
            Content::Text(text) => json!(text),
            Content::Parts(parts) => parts
                .iter()
                .map(|part| match part {
                    Part::Image => json!({"type": "image"}),
                    Part::Video => json!({"type": "video"}),
                    Part::Text(text) => json!({"type": "text", "text": text}),
                })
                .collect(),
        };
        json!({"role": self.role, "content": content}).serialize(serializer)
    }
}

/// Special tokens that templates and tokenizers mention.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Begin of sequence.
    pub bos: Option<String>,
    /// End of sequence.
    pub eos: Option<String>,
    /// Padding.
    pub pad: Option<String>,
    /// Unknown.
    pub unk: Option<String>,
}

/// A model's chat template.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    source: String,
    path: PathBuf,
}

impl ChatTemplate {
    /// The template of a model directory: `chat_template.jinja`, else `chat_template.json`, else
    /// `tokenizer_config.json` (one template, or a list with one named `default`). `None` if there is none.
    ///
    /// # Errors
    /// A file cannot be read, or holds something else than a template.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Option<Self>> {
        let dir = dir.as_ref();
        let path = dir.join("chat_template.jinja");
        match std::fs::read_to_string(&path) {
            Ok(source) => return Ok(Some(Self::new(source, path))),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => return Err(RuntimeError::Io { path, source }),
        }
        for name in ["chat_template.json", "tokenizer_config.json"] {
            let path = dir.join(name);
            let config = read_json(&path)?;
            let source = match config
                .as_ref()
                .and_then(|config| config.get("chat_template"))
            {
                None | Some(Json::Null) => continue,
                Some(Json::String(source)) => Some(source.clone()),
                Some(Json::Array(list)) => pick(list),
                Some(_) => None,
            };
            let source = source.ok_or_else(|| {
                RuntimeError::config(
                    &path,
                    "`chat_template` is neither a string nor a list of {name, template}",
                )
            })?;
            return Ok(Some(Self::new(source, path)));
        }
        Ok(None)
    }

    /// A template from its text; `path` appears in messages.
    pub fn new(source: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        Self {
            source: keep_generation_blocks(&source.into()),
            path: path.into(),
        }
    }

    /// Renders a conversation.
    ///
    /// # Errors
    /// The template does not parse, uses something unknown, or refuses the conversation.
    pub fn render(
        &self,
        messages: &[Message],
        specials: &SpecialTokens,
        add_generation_prompt: bool,
    ) -> Result<String> {
        let failed = |e: minijinja::Error| {
            // The chain behind an error is where `raise_exception`'s words and the line are.
            let mut reason = e.to_string();
            let mut cause = std::error::Error::source(&e);
            while let Some(error) = cause {
                reason.push_str(&format!(": {error}"));
                cause = error.source();
            }
            RuntimeError::Template {
                path: self.path.clone(),
                reason,
            }
        };
        let mut environment = Environment::new();
        // What Transformers' own Jinja environment sets.
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function(
            "raise_exception",
            |text: String| -> std::result::Result<String, minijinja::Error> {
                Err(minijinja::Error::new(ErrorKind::InvalidOperation, text))
            },
        );
        environment
            .add_template("chat", &self.source)
            .map_err(failed)?;
        let template = environment.get_template("chat").map_err(failed)?;
        template
            .render(context! {
                messages,
                add_generation_prompt,
                bos_token => specials.bos.as_deref().unwrap_or(""),
                eos_token => specials.eos.as_deref().unwrap_or(""),
                pad_token => specials.pad.as_deref().unwrap_or(""),
                unk_token => specials.unk.as_deref().unwrap_or(""),
            })
            .map_err(failed)
    }
}

/// The default template of a list of named ones, or the first.
fn pick(list: &[Json]) -> Option<String> {
    let template = |entry: &Json| entry.get("template")?.as_str().map(str::to_string);
    let named = |name: &str| {
        list.iter()
            .find(|entry| entry.get("name").and_then(Json::as_str) == Some(name))
    };
    template(named("default").or(list.first())?)
}

/// `{% generation %}` blocks mark what to train on and render as they are. They become blocks that are always
/// taken, so that the whitespace that their dashes eat stays eaten.
fn keep_generation_blocks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(end) = rest[start..].find("%}").map(|at| start + at) else {
            break;
        };
        let tag = &rest[start + 2..end];
        let word = tag.trim_matches(|c: char| c == '-' || c == '+' || c.is_whitespace());
        let instead = match word {
            "generation" => Some("if true"),
            "endgeneration" => Some("endif"),
            _ => None,
        };
        match instead {
            Some(instead) => {
                out.push_str(&rest[..start + 2]);
                out.push_str(&tag.replacen(word, &format!(" {instead} "), 1));
                out.push_str("%}");
            }
            None => out.push_str(&rest[..end + 2]),
        }
        rest = &rest[end + 2..];
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The template of LLaVA-1.5's processors: images first, then texts, `generation` blocks.
    const LLAVA: &str = "{% for message in messages %}{% if message['role'] != 'system' %}\
        {{ message['role'].upper() + ': '}}{% endif %}\
        {# Render all images first #}\
        {% for content in message['content'] | selectattr('type', 'equalto', 'image') %}\
        {{ '<image>\n' }}{% endfor %}\
        {% if message['role'] != 'assistant' %}\
        {% for content in message['content'] | selectattr('type', 'equalto', 'text') %}\
        {{ content['text'] + ' '}}{% endfor %}{% else %}\
        {% for content in message['content'] | selectattr('type', 'equalto', 'text') %}\
        {% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}\
        {% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}";

    fn render(source: &str, messages: &[Message]) -> Result<String> {
        let specials = SpecialTokens {
            bos: Some("<s>".into()),
            ..SpecialTokens::default()
        };
        ChatTemplate::new(source, "x.jinja").render(messages, &specials, true)
    }

    #[test]
    fn llava() {
        let messages = [
            Message::user(2, "What is this?"),
            Message::assistant("A cat."),
            Message::user(0, "Sure?"),
        ];
        assert_eq!(
            render(LLAVA, &messages).unwrap(),
            "USER: <image>\n<image>\nWhat is this? ASSISTANT: A cat. USER: Sure? ASSISTANT:"
        );
    }

    #[test]
    fn content_may_be_a_string_or_a_list() {
        let source = "{{ bos_token }}{% for m in messages %}\
            {% if m.content is string %}{{ m.content.strip() }}\
            {% else %}{{ m.content | length }}{% endif %};{% endfor %}";
        let messages = [
            Message {
                role: "user".into(),
                content: Content::Text("  hi ".into()),
            },
            Message::user(1, "there"),
        ];
        assert_eq!(render(source, &messages).unwrap(), "<s>hi;2;");
    }

    #[test]
    fn blocks_are_trimmed_and_generation_dashes_count() {
        let source = "{% for m in messages %}\n  {% if true %}\nx \n  \
                      {%- generation -%}\n y {%- endgeneration %}\n{% endif %}\n{% endfor %}";
        assert_eq!(render(source, &[Message::user(0, "")]).unwrap(), "xy");
        // A variable that is only called like the tag is left alone.
        assert_eq!(
            keep_generation_blocks("{% if generation %}"),
            "{% if generation %}"
        );
        assert_eq!(keep_generation_blocks("a {% b"), "a {% b");
    }

    #[test]
    fn python_idioms() {
        let source = "{% set ns = namespace(n=0) %}{% for m in messages[1:] %}\
            {% if m['role'] == 'assistant' %}{% continue %}{% endif %}{% set ns.n = ns.n + 1 %}\
            {% endfor %}{{ ns.n }}{{ messages | tojson | length > 10 }}\
            {{ 'a,b'.split(',') | last }}{{ ' x'.lstrip() }}{{ missing is defined }}";
        let messages = [
            Message::user(0, "a"),
            Message::assistant("b"),
            Message::user(0, "c"),
        ];
        assert_eq!(render(source, &messages).unwrap(), "1TruebxFalse");
    }

    #[test]
    fn refusals_and_mistakes_are_errors_that_name_the_file() {
        let error = render("{{ raise_exception('roles must alternate') }}", &[]);
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("x.jinja") && error.contains("roles must alternate"),
            "{error}"
        );
        let error = render("{% for x in %}", &[]).unwrap_err().to_string();
        assert!(error.contains("x.jinja"), "{error}");
    }

    #[test]
    fn files_are_looked_at_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        let found = || {
            ChatTemplate::from_dir(dir.path())
                .unwrap()
                .map(|t| t.source)
        };
        assert_eq!(found(), None);
        write("tokenizer_config.json", r#"{"chat_template": "one"}"#);
        assert_eq!(found().unwrap(), "one");
        let list = r#"{"chat_template": [{"name": "rag", "template": "r"},
                                         {"name": "default", "template": "d"}]}"#;
        write("tokenizer_config.json", list);
        assert_eq!(found().unwrap(), "d");
        write("chat_template.json", r#"{"chat_template": "two"}"#);
        assert_eq!(found().unwrap(), "two");
        write("chat_template.jinja", "three");
        assert_eq!(found().unwrap(), "three");
        write("chat_template.jinja", "");
        std::fs::remove_file(dir.path().join("chat_template.jinja")).unwrap();
        write("chat_template.json", r#"{"chat_template": 3}"#);
        assert!(ChatTemplate::from_dir(dir.path()).is_err());
    }
}
