"""The tokenizer of the trained model: byte-level BPE whose merges make every word of the task one token."""

import itertools
import sys
from pathlib import Path

from tokenizers import Tokenizer

import scene

sys.path.insert(0, str(Path(__file__).parent.parent / "llava"))
import tokens  # noqa: E402

VOCAB = 512
ANSWERS = (*scene.COLOURS, *scene.SHAPES, *scene.DIGITS, *scene.LETTERS)
BOS, EOS, PAD, IMAGE = tokens.BOS, tokens.EOS, tokens.PAD, tokens.IMAGE


def corpus() -> list[str]:
    """Every question, with every colour, shape and digit in it, and every answer, in the chat template."""
    lines = []
    for kind, forms in scene.FORMS.items():
        for form, colour, content in itertools.product(forms, scene.COLOURS, [*scene.SHAPES, "digit 7"]):
            lines.append(form.format(content if kind in ("colour", "small colour") else colour))
    lines += [" " + word for word in ANSWERS for _ in range(9)]
    return lines + ["USER: \n ASSISTANT:"] * 9


def tokenizer(lines: list[str] | None = None, extra: tuple[str, ...] = ()) -> Tokenizer:
    """Of the pictures' questions, or of `lines`; every answer is one token, `extra` are special ones."""
    tok = tokens.train(lines or corpus(), VOCAB, extra)
    for word in ANSWERS:
        if len(tok.encode(f" {word}", add_special_tokens=False).ids) != 1:
            raise RuntimeError(f"expected one token for '{word}'; raise VOCAB")
    return tok


class Texts:
    """Questions and answers as token ids."""

    def __init__(self, tok: Tokenizer | None = None):
        self.tok = tok or tokenizer()
        self.known: dict[str, list[int]] = {}
        self.prefix = self.tok.encode("USER: ").ids  # with <s>; the placeholders follow

    def ids(self, text: str) -> list[int]:
        if text not in self.known:
            self.known[text] = self.tok.encode(text, add_special_tokens=False).ids
        return self.known[text]

    def question(self, text: str) -> list[int]:
        """What follows the image, up to where the answer begins."""
        return self.ids(f"\n{text} ASSISTANT:")

    def answer(self, text: str) -> list[int]:
        return [*self.ids(f" {text}"), EOS]
