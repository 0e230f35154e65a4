"""Plain ONNX Runtime, as model cards use it: three sessions, NumPy, and the tokenizer's own library.

    python plain.py JOBS.json     a list of answers on stdout

`job.loop` says what a loop feeds while it decodes:

- `full`: a mask over everything so far, positions counted by it from 0;
- `card`: what cards of onnx-community do: a mask of ones as long as the new token alone, positions counted from 1.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer

IMAGE = "<image>"


def pixels_of(pictures: list[str], settings: dict) -> np.ndarray:
    """Pixel values of pictures of the model's own size, [pictures, 3, side, side]."""
    side = settings["crop_size"]["height"]
    mean, std = (np.array(settings[f"image_{name}"], np.float32) for name in ("mean", "std"))
    values = []
    for picture in pictures:
        image = Image.open(picture).convert("RGB")
        if image.size != (side, side):
            raise ValueError(f"{picture} is {image.size}; this client resizes nothing, expected {side} x {side}")
        scaled = np.asarray(image, np.float32) * np.float32(settings["rescale_factor"])
        values.append(((scaled - mean) / std).transpose(2, 0, 1))
    return np.ascontiguousarray(np.stack(values))


class Model:
    def __init__(self, folder: Path, loop: str, tokens: int) -> None:
        self.session = {
            part: onnxruntime.InferenceSession(folder / "onnx" / f"{part}.onnx")
            for part in ("vision_encoder", "embed_tokens", "decoder_model_merged")
        }
        self.decoder = self.session["decoder_model_merged"]
        self.caches = [i for i in self.decoder.get_inputs() if i.name.startswith("past_key_values")]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        config = json.loads((folder / "config.json").read_text())
        self.image_token, self.eos, self.pad = (
            config["image_token_index"],
            config["eos_token_id"],
            config["pad_token_id"],
        )
        self.pixels = json.loads((folder / "preprocessor_config.json").read_text())
        self.loop, self.tokens = loop, tokens

    def see(self, pictures: list[str]) -> np.ndarray:
        """Features of pictures, [tokens, width] each."""
        return self.session["vision_encoder"].run(None, {"pixel_values": pixels_of(pictures, self.pixels)})[0]

    def embed(self, ids: np.ndarray) -> np.ndarray:
        return self.session["embed_tokens"].run(None, {"input_ids": ids})[0]

    def prompt(self, text: str, pictures: list[str], before: list[int] | None) -> tuple[list[int], np.ndarray | None]:
        """Ids, every placeholder as often as there are features, and the features."""
        chat = f"USER: {''.join(IMAGE + chr(10) for _ in pictures)}{text} ASSISTANT:"
        ids = self.tokenizer.encode(chat if before is None else " " + chat, add_special_tokens=before is None).ids
        ids = ids if before is None else before + ids
        if not pictures:
            return ids, None
        features = self.see(pictures)
        expanded = [[i] * features.shape[1] if i == self.image_token else [i] for i in ids]
        return sum(expanded, []), features.reshape(-1, features.shape[-1])

    def generate(
        self, rows: list[list[int]], features: np.ndarray | None, past: list[np.ndarray] | None, seen: np.ndarray | None
    ):
        """Greedy answers of all rows, the cache, and the mask of what is in it."""
        length = max(map(len, rows))
        ids = np.array([[self.pad] * (length - len(row)) + row for row in rows], np.int64)
        mask = np.array([[0] * (length - len(row)) + [1] * len(row) for row in rows], np.int64)
        embeds = self.embed(ids)
        if features is not None:
            embeds[ids == self.image_token] = features
        if past is None:
            shapes = [
                [
                    len(rows) if isinstance(d, str) and n == 0 else 0 if isinstance(d, str) else d
                    for n, d in enumerate(c.shape)
                ]
                for c in self.caches
            ]
            past = [np.zeros(shape, np.float32) for shape in shapes]
            seen = np.zeros((len(rows), 0), np.int64)
        mask = np.concatenate([seen, mask], 1)
        first = 0 if self.loop == "full" else 1
        positions = (np.maximum(mask.cumsum(1), 1) - 1 + first)[:, -length:]
        answers = [[] for _ in rows]
        while True:
            shown = mask if self.loop == "full" or embeds.shape[1] > 1 else np.ones_like(ids)
            caches = {c.name: value for c, value in zip(self.caches, past)}
            logits, *past = self.decoder.run(
                None, {"inputs_embeds": embeds, "attention_mask": shown, "position_ids": positions, **caches}
            )
            ids = logits[:, -1].argmax(-1)[:, None]
            for answer, token in zip(answers, ids[:, 0]):
                if self.eos not in answer and len(answer) < self.tokens:
                    answer.append(int(token))
            if all(len(a) == self.tokens or a[-1] == self.eos for a in answers):
                return answers, past, mask
            mask = np.concatenate([mask, np.ones_like(ids)], 1)
            positions = positions[:, -1:] + 1
            embeds = self.embed(ids)

    def conversation(self, turns: list[dict]) -> list[list[int]]:
        answers, past, seen = [], None, None
        for turn in turns:
            ids, features = self.prompt(turn["prompt"], turn["images"], answers[-1][-1:] if answers else None)
            answer, past, seen = self.generate([ids], features, past, seen)
            answers += answer
        return answers

    def batch(self, rows: list[dict]) -> list[list[int]]:
        prompts = [self.prompt(row["prompt"], row["images"], None) for row in rows]
        features = [features for _, features in prompts if features is not None]
        return self.generate([ids for ids, _ in prompts], np.concatenate(features) if features else None, None, None)[0]


def answers(job: dict) -> dict:
    model = Model(Path(job["model"]), job.get("loop", "full"), job["tokens"])
    given = {
        c["name"]: model.batch(c["rows"]) if c.get("batch") else model.conversation(c["turns"]) for c in job["cases"]
    }
    return {"version": f"onnxruntime {onnxruntime.__version__}", "answers": given}


if __name__ == "__main__":
    print(json.dumps([answers(entry["job"]) for entry in json.loads(Path(sys.argv[1]).read_text())]))
