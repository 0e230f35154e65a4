"""Answers a data set with the PyTorch implementation of the method, question by question.

    python models/vqa/answers.py --model work/llava.pt --dataset models/vqa/test [--recipe FILE] --out answers.jsonl
    python models/vqa/answers.py --model work/film.pt --dataset models/vqa/test-clips …

A line of the result is {"id": ..., "answer": ...}: `duet eval --answers` compares it with what ONNX Runtime answers.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image, ImageSequence

import film
import to_onnx
import tower
import words

sys.path.insert(0, str(Path(__file__).parent.parent))
from reference import tower as reference_tower  # noqa: E402, F401
from reference.llava import Llava  # noqa: E402
from reference.merge import merge  # noqa: E402, F401
from reference.recipe import parse  # noqa: E402
from reference.video_llava import VideoLlava  # noqa: E402


class Pictures:
    """A trained LLaVA with the two stages of a recipe (None: that stage is absent)."""

    key, token = "image", words.IMAGE

    def __init__(self, net, stages: tuple):
        self.model, self.texts = Llava(net, *stages), words.Texts()

    def features(self, path: Path) -> torch.Tensor:
        pixels = torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy())[None]
        return self.model.image_features(tower.normalised(pixels))[0]

    def call(self, ids, mask, positions, features, past):
        return self.model.call(ids, mask, positions, features, past)


class Clips:
    """A trained Video-LLaVA with the two stages of a recipe."""

    key, token = "video", film.network.VIDEO

    def __init__(self, net, stages: tuple):
        self.model, self.texts = VideoLlava(net, *stages), words.Texts(film.tokenizer())

    def features(self, path: Path) -> torch.Tensor:
        with Image.open(path) as read:
            frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(read)]
        return self.model.video_features(tower.normalised(torch.from_numpy(np.stack(frames)))[None])[0]

    def call(self, ids, mask, positions, features, past):
        return self.model.call(ids, mask, positions, None, features, past)


class Answerer:
    """A trained model with the two stages of a recipe (None: the model as it is), greedy."""

    def __init__(self, net, recipe: dict | None, length: int = 3):
        self.asked = (Clips if film.is_film(net.state_dict()) else Pictures)(
            net, parse(recipe) if recipe else (None, None)
        )
        self.length = length

    @torch.no_grad()
    def features(self, path: Path) -> torch.Tensor:
        return self.asked.features(path)

    @torch.no_grad()
    def answer(self, features: torch.Tensor, question: str) -> str:
        texts = self.asked.texts
        ids = [*texts.prefix, *[self.asked.token] * features.shape[1], *texts.question(question)]
        past, said, place = None, [], 0
        mask = torch.ones(1, 0, dtype=torch.long)
        while True:
            mask = torch.cat([mask, torch.ones(1, len(ids), dtype=torch.long)], 1)
            positions = torch.arange(place, place + len(ids))[None]
            out = self.asked.call(torch.tensor([ids]), mask, positions, None if past else features, past)
            past, place = out.cache, place + len(ids)
            token = int(out.logits[0].argmax())
            if token == words.EOS or len(said) == self.length:
                break
            said.append(token)
            ids = [token]
        return texts.tok.decode(said).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = yaml.safe_load(args.recipe.read_text()) if args.recipe else None
    answerer = Answerer(to_onnx.trained(args.model), recipe)
    lines, last, right = [], None, []
    for text in (args.dataset / "questions.jsonl").read_text().splitlines()[: args.limit]:
        asked = json.loads(text)
        seen = asked[answerer.asked.key]
        if seen != last:
            last, features = seen, answerer.features(args.dataset / seen)
        answer = answerer.answer(features, asked["question"])
        right.append(answer == asked["answer"])
        lines.append(json.dumps({"id": asked["id"], "answer": answer}))
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{np.mean(right):.4f} of {len(right)} questions")


if __name__ == "__main__":
    main()
