"""Qwen's special tokens on llava's small tokenizer, its chat template, and the configs of its processors.

The ids are those of `tokens.py`: its special tokens under Qwen's names, and the last three of its vocabulary for
the tokens around a picture. So the goldens of the decoder, which hold ids, do not depend on this.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer

import tokens

START, END, PAD, IMAGE, VIDEO = "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|image_pad|>", "<|video_pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
UNUSED = "<|unused|>"
# Behind the vocabulary, as Qwen has them.
LAST = [VIDEO, VISION_START, VISION_END]
VIDEO_ID, VISION_START_ID, VISION_END_ID = range(tokens.VOCAB - 3, tokens.VOCAB)
NAMES = dict(zip(tokens.SPECIALS, [UNUSED, START, END, PAD, IMAGE], strict=True))

# What Qwen2.5-VL's template says, in our own words: a system message unless there is one, pictures and clips where
# the message has them, each between two tokens of its own.
CHAT_TEMPLATE = (
    "{%- set seen = namespace(images=0, clips=0) -%}"
    "{%- for message in messages -%}"
    "{%- if loop.first and message.role != 'system' -%}"
    "{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' -}}"
    "{%- endif -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}"
    "{%- set seen.images = seen.images + 1 -%}"
    "{%- if add_vision_id -%}{{- 'Picture ' ~ seen.images ~ ': ' -}}{%- endif -%}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif part['type'] == 'video' or 'video' in part -%}"
    "{%- set seen.clips = seen.clips + 1 -%}"
    "{%- if add_vision_id -%}{{- 'Video ' ~ seen.clips ~ ': ' -}}{%- endif -%}"
    "{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}"
    "{%- elif 'text' in part -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


def added(index: int, text: str) -> dict:
    """An entry of `added_tokens`."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": text, **flags}


def tokenizer() -> Tokenizer:
    """llava's tokenizer with Qwen's special tokens, and without a token that it adds by itself."""
    state = json.loads(tokens.tokenizer().to_str())
    model = state["model"]
    by_id = {index: text for text, index in model["vocab"].items()}
    gone = {by_id[i] for i in (VIDEO_ID, VISION_START_ID, VISION_END_ID)}
    for old, new in NAMES.items():
        by_id[model["vocab"][old]] = new
    kept = {text: index for index, text in sorted(by_id.items()) if text not in gone}
    model["vocab"] = kept
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) not in gone]
    model["unk_token"] = None
    if any(part in gone for pair in model["merges"] for part in pair):
        raise RuntimeError(f"merges are built on {gone}; expected the last of the vocabulary to be unused")
    specials = [*NAMES.values()]
    state["added_tokens"] = [added(i, t) for i, t in enumerate(specials)]
    state["added_tokens"] += [added(VIDEO_ID + i, t) for i, t in enumerate(LAST)]
    state["post_processor"] = None
    tok = Tokenizer.from_str(json.dumps(state))
    ids = {text: tok.token_to_id(text) for text in (IMAGE, *LAST)}
    if list(ids.values()) != [tokens.IMAGE, VIDEO_ID, VISION_START_ID, VISION_END_ID]:
        raise RuntimeError(f"special tokens have the ids {ids}")
    return tok


def save(folder: Path, processor: str, size: dict[str, int], patch: int) -> None:
    """tokenizer, template and processor configs; `size` bounds the pixels of a picture, `patch` is a patch's edge."""
    tok = tokenizer()
    (folder / "tokenizer.json").write_text(tok.to_str(pretty=True) + "\n", encoding="utf-8")
    roles = {
        "image_token": IMAGE,
        "video_token": VIDEO,
        "vision_bos_token": VISION_START,
        "vision_eos_token": VISION_END,
    }
    tokens.dump(
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": processor,
            "bos_token": None,
            "eos_token": END,
            "pad_token": PAD,
            "unk_token": None,
            "extra_special_tokens": roles,
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 4096,
            "padding_side": "left",
        },
        folder / "tokenizer_config.json",
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    common = {
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "size": size,
        "patch_size": patch,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }
    tokens.dump(
        {"processor_class": processor, "image_processor_type": "Qwen2VLImageProcessor", **common},
        folder / "preprocessor_config.json",
    )
    tokens.dump(
        {"processor_class": processor, "video_processor_type": "Qwen2VLVideoProcessor", **common},
        folder / "video_preprocessor_config.json",
    )
