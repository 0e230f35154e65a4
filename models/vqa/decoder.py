"""Trains projector and decoder on questions about pictures, the tower frozen.

    python models/vqa/decoder.py --tower work/tower.pt --out work/llava.pt [--layers 6] [--start FILE] [--steps N]

First with few layers, then with all: `--start` takes what fewer layers have learned, and new layers begin as the
identity (progressive stacking). Every step sees new pictures with a dozen questions each.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

import model
import optimise
import scene
import words


class Asked(IterableDataset):
    """Endless batches of what the frozen tower says of new pictures, without CLS, and questions about them."""

    def __init__(self, tower: Path, seed: int, batch: int, questions: int, split: str):
        self.tower, self.seed, self.batch, self.questions, self.split = tower, seed, batch, questions, split

    def __iter__(self):
        torch.set_num_threads(1)
        net = model.llava(1, 8, torch.load(self.tower))
        rng = np.random.default_rng(self.seed)
        while True:
            made = [scene.scene(rng, self.split) for _ in range(self.batch)]
            asked = [scene.ask(rng, m, self.questions) for m in made]
            pixels = torch.from_numpy(np.stack([m.pixels for m in made]))
            yield model.seen(net.model.vision_tower, pixels)[:, 1:], asked


@torch.no_grad()
def accuracy(answers: model.Answers, batches: list) -> dict[str, float]:
    """Share of questions of each type whose first token is right (answers are one word)."""
    right = defaultdict(list)
    for features, asked in batches:
        logits, wanted = answers(features, asked)
        best = (logits.argmax(-1) == wanted)[::2].tolist()
        for (kind, _, _), good in zip((q for row in asked for q in row), best):
            right[kind].append(good)
            right["all"].append(good)
    return {kind: round(float(np.mean(values)), 4) for kind, values in sorted(right.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tower", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--questions", type=int, default=14)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=21)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    texts = words.Texts()
    size = texts.tok.get_vocab_size()
    if args.start is None:
        net = model.llava(args.layers, size, torch.load(args.tower))
    else:
        saved = torch.load(args.start)
        net = model.llava(saved["layers"], size)
        net.load_state_dict(saved["state"])
        if saved["layers"] < args.layers:
            net = model.grow(net, args.layers)
        model.set_tower(net, torch.load(args.tower))
    net.model.vision_tower.requires_grad_(False)
    answers = model.Answers(net, texts)

    def batches(seed: int, split: str, batch: int, questions: int):
        data = Asked(args.tower, seed, batch, questions, split)
        return iter(DataLoader(data, batch_size=None, num_workers=1, prefetch_factor=6))

    validation = batches(1021, "val", 20, 12)
    validation = [next(validation) for _ in range(10)]
    stream = batches(args.seed, "train", args.batch, args.questions)

    def check() -> dict[str, float]:
        return accuracy(answers, validation)

    optimise.learn(net, answers, stream, check, args.out, rate=args.rate, steps=args.steps, warm=100)


if __name__ == "__main__":
    main()
