"""A small, real byte-level BPE tokenizer with LLaVA-1.5's special tokens and chat template."""

import itertools
import json
from pathlib import Path

import jinja2
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB = 400
SPECIALS = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
UNK, BOS, EOS, PAD, IMAGE = range(5)

# The template that llava-hf publishes for LLaVA-1.5, in our own words: images first, then text.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def corpus() -> list[str]:
    """A few hundred lines of the kind of text that a question about a picture is made of."""
    things = ["dog", "cat", "red car", "small house", "tree", "blue boat", "bicycle", "street sign", "cup", "clock"]
    places = ["on the table", "in front of the window", "next to the road", "under the bridge", "near the water"]
    asks = [
        "What is the {t} doing {p}?",
        "Is there a {t} {p}?",
        "How many people stand with the {t} {p}?",
        "The picture shows a {t} {p}.",
        "There is no {t} {p}, but a second one is behind it.",
        "USER: <image>\nWhere is the {t}? Answer the question using a single word or phrase. ASSISTANT: It is {p}.",
    ]
    lines = [a.format(t=t, p=p) for a, t, p in itertools.product(asks, things, places)]
    lines += [
        "A chat between a curious user and an artificial intelligence assistant.",
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        "USER: Describe the image in detail. ASSISTANT: The image shows",
        "What colour is the largest shape? What text is written on it?",
        "Which number comes after 1, 2, 3, 4, 5, 6, 7, 8, 9 and 10?",
        "Compare the first image with the second image and name three differences.",
        "Why do you think so? Explain your answer step by step.",
    ]
    return lines


def train(lines: list[str], vocabulary: int, extra: tuple[str, ...] = ()) -> Tokenizer:
    """Trains a tokenizer of at most `vocabulary` tokens; `extra` special tokens come behind the usual ones."""
    tok = Tokenizer(models.BPE(unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in (*SPECIALS, *extra)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(lines, trainer)
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)])
    return tok


def tokenizer(extra: tuple[str, ...] = ()) -> Tokenizer:
    """The tokenizer of the models of random weights; corpus and trainer are deterministic, so is the result."""
    specials = [*SPECIALS, *extra]
    tok = train([line.replace("<image>", "") for line in corpus()], VOCAB, extra)
    if tok.get_vocab_size() != VOCAB or [tok.token_to_id(t) for t in specials] != list(range(len(specials))):
        raise RuntimeError(f"expected {VOCAB} tokens, specials first; got {tok.get_vocab_size()}")
    return tok


def silent() -> list[int]:
    """Tokens that a model should never say: all specials but the end, and what a terminal cannot show."""
    tok = tokenizer()
    texts = (tok.decode([i], skip_special_tokens=False) for i in range(VOCAB))
    unprintable = {i for i, t in enumerate(texts) if not (t.isprintable() and t.isascii())}
    return sorted({UNK, BOS, PAD, IMAGE} | unprintable)


def chat(messages: list[dict]) -> str:
    """The prompt that the chat template makes of `messages`, the assistant's turn opened."""
    return jinja2.Template(CHAT_TEMPLATE).render(messages=messages, add_generation_prompt=True)


def dump(value: object, path: Path) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save(
    folder: Path,
    tok: Tokenizer | None = None,
    processor: str = "LlavaProcessor",
    extra: dict[str, str] | None = None,
    template: str = CHAT_TEMPLATE,
) -> None:
    """Writes tokenizer.json and the files that go with it; `extra` special tokens by their role."""
    tok, extra = tok or tokenizer(), extra or {}
    (folder / "tokenizer.json").write_text(tok.to_str(pretty=True) + "\n", encoding="utf-8")
    dump(
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": processor,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "image_token": "<image>",
            **extra,
            "extra_special_tokens": {"image_token": "<image>", **extra},
            "added_tokens_decoder": {
                str(i): {
                    "content": t,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": True,
                }
                for i, t in enumerate([*SPECIALS, *extra.values()])
            },
            "add_bos_token": True,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 4096,
            "padding_side": "left",
            "chat_template": template,
        },
        folder / "tokenizer_config.json",
    )
    dump(
        {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "image_token": "<image>",
            **extra,
        },
        folder / "special_tokens_map.json",
    )
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
