use serde_json::json;

use super::*;
use crate::runtime::template::{Content, Part};

/// A byte-level tokenizer with one token for each byte, merges for `hello`, and the usual special tokens.
pub(crate) fn write_tokenizer(dir: &Path) {
    // GPT-2's table: printable bytes stand for themselves, the others for U+0100 and on.
    let mut vocab = serde_json::Map::new();
    for (id, special) in ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
        .iter()
        .enumerate()
    {
        vocab.insert(special.to_string(), id.into());
    }
    let mut next = 256;
    for byte in 0u32..256 {
        let printable = matches!(byte, 33..=126 | 161..=172 | 174..=255);
        let code = if printable { byte } else { next };
        next += u32::from(!printable);
        let text = char::from_u32(code).unwrap().to_string();
        let id = vocab.len();
        vocab.insert(text, id.into());
    }
    let merges = [["h", "e"], ["l", "l"], ["he", "ll"], ["hell", "o"]];
    for [a, b] in merges {
        let id = vocab.len();
        vocab.insert(format!("{a}{b}"), id.into());
    }
    let added: Vec<Json> = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
        .iter()
        .enumerate()
        .map(|(id, content)| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false,
                   "rstrip": false, "normalized": false, "special": true})
        })
        .collect();
    let tokenizer = json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false,
                          "use_regex": true},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}},
                     {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false,
                    "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
                  "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
                  "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": merges}
    });
    std::fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
}

fn processor(files: &[(&str, Json)]) -> TextProcessor {
    let dir = tempfile::tempdir().unwrap();
    write_tokenizer(dir.path());
    for (name, content) in files {
        std::fs::write(dir.path().join(name), content.to_string()).unwrap();
    }
    TextProcessor::from_dir(dir.path()).unwrap()
}

fn usual() -> TextProcessor {
    processor(&[
        (
            "config.json",
            json!({"image_token_index": 4, "text_config": {"eos_token_id": 2}}),
        ),
        (
            "tokenizer_config.json",
            json!({"bos_token": {"content": "<s>"}, "eos_token": "</s>"}),
        ),
    ])
}

#[test]
fn prompts_are_neither_cut_nor_begun_twice() {
    let text = usual();
    let ids = text.encode("hello, hello").unwrap().ids;
    assert_eq!(ids.len(), 1 + 1 + 1 + 1 + 1, "{ids:?}");
    assert_eq!(ids[0], 1);
    assert_eq!(text.encode("<s>hello, hello").unwrap().ids, ids);
    assert_eq!(text.encode_raw("hello", false).unwrap().ids, [ids[1]]);
    assert_eq!(text.decode(&ids, true).unwrap(), "hello, hello");
    let encoded = text.encode("a<image>hello").unwrap();
    assert_eq!(encoded.offsets, [(0, 0), (0, 1), (1, 8), (8, 13)]);
}

#[test]
fn placeholders_expand_to_their_counts() {
    let text = usual();
    let expanded = text.expand(&[1, 4, 9, 4, 8], &[3, 1]).unwrap();
    assert_eq!(expanded.ids, [1, 4, 4, 4, 9, 4, 8]);
    assert_eq!(
        expanded.visual,
        [false, true, true, true, false, true, false]
    );
    assert_eq!(expanded.source, [0, 1, 1, 1, 2, 3, 4]);
    // An image may come down to nothing.
    assert_eq!(text.expand(&[1, 4, 9], &[0]).unwrap().ids, [1, 9]);
    for (ids, counts) in [(&[1u32, 4][..], &[][..]), (&[1], &[5]), (&[4, 4], &[1])] {
        let error = text.expand(ids, counts).unwrap_err().to_string();
        assert!(
            error.contains("<image>") && error.contains("placeholder"),
            "{error}"
        );
    }
}

#[test]
fn the_image_token_is_found_wherever_it_is_named() {
    let expected = Some(ImageToken {
        id: 4,
        text: "<image>".into(),
    });
    let cases = [
        ("config.json", json!({"image_token_index": 4})),
        ("config.json", json!({"image_token_id": 4})),
        ("processor_config.json", json!({"image_token": "<image>"})),
        (
            "tokenizer_config.json",
            json!({"image_token": {"content": "<image>"}}),
        ),
        (
            "tokenizer_config.json",
            json!({"extra_special_tokens": {"image_token": "<image>"}}),
        ),
        ("config.json", json!({})),
    ];
    for (name, content) in cases {
        assert_eq!(
            processor(&[(name, content)]).image_token(),
            expected.as_ref()
        );
    }
    let other = processor(&[("tokenizer_config.json", json!({"image_token": "<pad>"}))]);
    assert_eq!(other.image_token().unwrap().id, 3);
    // An id outside the vocabulary is still the id to look for.
    let outside = processor(&[("config.json", json!({"image_token_index": 32000}))]);
    assert_eq!(
        outside.image_token(),
        Some(&ImageToken {
            id: 32000,
            text: "<image>".into()
        })
    );
}

#[test]
fn end_of_sequence_ids() {
    let list = json!({"eos_token_id": [2, 3]});
    let both = [
        ("generation_config.json", list),
        ("config.json", json!({"eos_token_id": 9})),
    ];
    assert_eq!(processor(&both).eos_ids(), [2, 3]);
    assert_eq!(
        processor(&[("config.json", json!({"eos_token_id": 9}))]).eos_ids(),
        [9]
    );
    assert_eq!(usual().eos_ids(), [2]);
    let by_text = [("special_tokens_map.json", json!({"eos_token": "</s>"}))];
    assert_eq!(processor(&by_text).eos_ids(), [2]);
    assert!(processor(&[]).eos_ids().is_empty());
}

#[test]
fn without_a_template_the_prompt_is_llavas() {
    let text = usual();
    assert!(!text.has_template());
    let prompt = text.render(&[Message::user(1, "What is this?")]).unwrap();
    assert_eq!(prompt, "USER: <image>\nWhat is this? ASSISTANT:");
    let prompt = text.render(&[Message::user(0, "Hi")]).unwrap();
    assert_eq!(prompt, "USER: Hi ASSISTANT:");
}

#[test]
fn streaming_never_cuts_a_character() {
    let text = usual();
    let sentence = "hello Grüße, 你好 🙂!";
    let ids = text.encode(sentence).unwrap().ids;
    let mut stream = Detokenizer::new();
    let mut pieces: Vec<String> = Vec::new();
    for &id in &ids {
        let piece = stream.push(&text, id).unwrap();
        assert!(!piece.contains('\u{FFFD}'), "{piece:?} after {pieces:?}");
        pieces.push(piece);
    }
    assert_eq!(stream.finish(&text).unwrap(), "");
    assert_eq!(pieces.concat(), sentence);
    assert!(pieces.iter().filter(|piece| !piece.is_empty()).count() > 10);

    // Half a character at the end of an answer comes out as what it is.
    let mut stream = Detokenizer::new();
    let half = text.encode_raw("é", false).unwrap().ids[0];
    assert_eq!(stream.push(&text, half).unwrap(), "");
    assert_eq!(stream.finish(&text).unwrap(), "\u{FFFD}");
}

#[test]
fn streaming_keeps_the_spaces_between_words() {
    // Metaspace decoders drop the space of the first token only.
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always",
                    "split": true},
        "model": {"type": "WordLevel", "vocab": {"▁A": 0, "▁cat": 1, "s": 2}, "unk_token": "s"}
    });
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let text = TextProcessor::from_dir(dir.path()).unwrap();
    let mut stream = Detokenizer::new();
    let pieces: Vec<String> = [0, 1, 2, 1]
        .iter()
        .map(|&id| stream.push(&text, id).unwrap())
        .collect();
    assert_eq!(pieces, ["A", " cat", "s", " cat"]);
}

#[test]
fn a_missing_or_damaged_tokenizer_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let error = TextProcessor::from_dir(dir.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json"), "{error}");
    std::fs::write(dir.path().join("tokenizer.json"), "{").unwrap();
    let error = TextProcessor::from_dir(dir.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json"), "{error}");
}

/// Chats and texts as Transformers renders and tokenizes them.
#[test]
fn recorded_chats_and_texts_come_out_the_same() {
    let models = crate::runtime::test_models::models_dir();
    let goldens = read_json(&models.join("goldens/tokenizer.json"))
        .unwrap()
        .unwrap();
    let dir = models.join("fixtures/ts-eager-mha");
    let text = TextProcessor::from_dir(&dir).unwrap();
    let template = ChatTemplate::from_dir(&dir).unwrap().unwrap();
    let ids = |case: &Json| -> Vec<u32> {
        case["ids"]
            .as_array()
            .unwrap()
            .iter()
            .map(|id| id.as_u64().unwrap() as u32)
            .collect()
    };
    let chats = goldens["chats"].as_array().unwrap();
    assert!(chats.len() >= 4);
    for chat in chats {
        let messages: Vec<Message> = chat["messages"]
            .as_array()
            .unwrap()
            .iter()
            .map(message)
            .collect();
        let add = chat["add_generation_prompt"].as_bool().unwrap();
        let prompt = template.render(&messages, text.specials(), add).unwrap();
        assert_eq!(prompt, chat["prompt"].as_str().unwrap());
        assert_eq!(text.encode(&prompt).unwrap().ids, ids(chat), "{prompt}");
    }
    let texts = goldens["texts"].as_array().unwrap();
    assert!(!texts.is_empty());
    for case in texts {
        let source = case["text"].as_str().unwrap();
        assert_eq!(text.encode(source).unwrap().ids, ids(case), "{source}");
    }
}

fn message(json: &Json) -> Message {
    let content = match &json["content"] {
        Json::String(text) => Content::Text(text.clone()),
        parts => Content::Parts(
            parts
                .as_array()
                .unwrap()
                .iter()
                .map(|part| match part["text"].as_str() {
                    Some(text) => Part::Text(text.into()),
                    None => Part::Image,
                })
                .collect(),
        ),
    };
    Message {
        role: json["role"].as_str().unwrap().into(),
        content,
    }
}
