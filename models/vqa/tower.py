"""Pre-trains the vision tower: what does each patch show, and what is on the picture as a whole?

    python models/vqa/tower.py --out work/sparse.pt --steps 600
    python models/vqa/tower.py --out work/full.pt --start work/sparse.pt --kept 0 --steps 300 --rate 8e-4 --seed 2
    python models/vqa/tower.py --out work/tower.pt --start work/full.pt --positions 0.5 --kept 0 --steps 160 --rate 8e-4

The first run shows the tower fewer than half of the patches: what is learned of a patch is the same, for half of the
price.

Labels of patches are free in drawn pictures: the colour of the tile that a patch lies on, the digit, shape or letter in
it, the colour of a small shape, where it lies. The CLS token has to name, for each colour, what is on the tile, its
letter, and how many small shapes there are: as in CLIP's training it has to look for what matters, and its attention
learns where that is.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset
from transformers import CLIPVisionConfig, CLIPVisionModel

import optimise
import scene

WIDTH, HEADS, LIVE = 128, 4, 6
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
NONE = len(scene.COLOURS)
DENSE = 5  # labels of every patch; the others are of the picture
CONTENTS = ["", *scene.DIGITS, *scene.SHAPES]


def config(layers: int) -> CLIPVisionConfig:
    """A CLIP tower; LLaVA reads the output of the layer before the last one."""
    return CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        image_size=scene.SIDE,
        patch_size=scene.PATCH,
        hidden_act="gelu",
    )


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> [B, 3, H, W], as CLIP's processor does it."""
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def sincos() -> torch.Tensor:
    """Two-dimensional sine and cosine positions [GRID * GRID, WIDTH], rows in the first half."""
    rates = 100.0 ** -(torch.arange(WIDTH // 4) / (WIDTH // 4))
    angles = torch.arange(scene.GRID)[:, None] * rates
    line = torch.cat([angles.sin(), angles.cos()], 1)
    both = torch.cat([line[:, None].expand(-1, scene.GRID, -1), line[None].expand(scene.GRID, -1, -1)], 2)
    return both.flatten(0, 1)


class Reader(nn.Module):
    """The tower and the heads that read its last live layer in training."""

    def __init__(self):
        super().__init__()
        self.tower = CLIPVisionModel(config(LIVE))
        self.tile = nn.Linear(WIDTH, NONE + 1)
        self.glyph = nn.Linear(WIDTH, len(scene.GLYPHS))
        self.ink = nn.Linear(WIDTH, NONE + 1)
        self.place = nn.Linear(WIDTH, 2 * scene.GRID)
        self.summary = nn.Linear(WIDTH, NONE * (len(CONTENTS) + len(scene.LETTERS) + 1 + scene.MOST + 1))

    def forward(self, pixels: torch.Tensor, kept: torch.Tensor | None = None) -> list[torch.Tensor]:
        """`kept` [B, K]: patches that the tower sees, for cheaper steps; all if left out."""
        states = self.tower.embeddings(normalised(pixels))
        if kept is not None:
            index = torch.cat([torch.zeros_like(kept[:, :1]), kept + 1], 1)
            states = states.gather(1, index[..., None].expand(-1, -1, WIDTH))
        states = self.tower.encoder(inputs_embeds=self.tower.pre_layrnorm(states)).last_hidden_state
        patches = states[:, 1:]
        summary = self.summary(states[:, 0]).unflatten(1, (NONE, -1))
        sizes = (len(CONTENTS), len(scene.LETTERS) + 1, scene.MOST + 1)
        row, column = self.place(patches).chunk(2, -1)
        dense = [self.tile(patches), self.glyph(patches), self.ink(patches), row, column]
        return [*dense, *summary.split(sizes, -1)]


def labels(made: scene.Scene) -> list[np.ndarray]:
    """Labels of patches, and of the picture for each colour; -100 where a colour is on two tiles."""
    content, letter, count = (np.zeros(NONE, np.int64) for _ in range(3))
    for tile in made.tiles:
        twice = content[tile.colour] != 0
        content[tile.colour] = -100 if twice else CONTENTS.index(tile.content)
        letter[tile.colour] = -100 if twice else 1 + scene.LETTERS.index(tile.letter)
    for _, colour in made.loose:
        count[colour] += 1
    place = np.divmod(np.arange(scene.GRID**2), scene.GRID)
    return [made.tile_of, made.glyph_of, made.ink_of, *place, content, letter, count]


class Pictures(IterableDataset):
    """Endless batches: half of the pictures crowded, half as questions are asked about."""

    def __init__(self, seed: int, batch: int, split: str):
        self.seed, self.batch, self.split = seed, batch, split

    def __iter__(self):
        torch.set_num_threads(1)
        rng = np.random.default_rng(self.seed)
        while True:
            made = []
            for index in range(self.batch):
                crowd = index % 2 == 0 and self.split == "train"
                made.append(scene.scene(rng, self.split, *(((9, 12), (8, 14)) if crowd else ())))
            pixels = torch.from_numpy(np.stack([m.pixels for m in made]))
            each = zip(*(labels(m) for m in made))
            yield pixels, [torch.from_numpy(np.stack(one)) for one in each]


def some(glyph: torch.Tensor, count: int) -> torch.Tensor:
    """`count` patches of each picture, most of those that show something among them, ascending."""
    score = torch.rand(glyph.shape) + (glyph > 0) * (torch.rand(glyph.shape) < 0.95)
    return score.topk(count, 1).indices.sort(1).values


def losses(outputs: list[torch.Tensor], wanted: list[torch.Tensor]) -> list[torch.Tensor]:
    weight = torch.ones(len(scene.GLYPHS))
    weight[0] = 0.05
    weights = [None, weight, *[None] * 6]
    return [
        cross_entropy(o.flatten(0, 1), w.flatten(), weight=c, ignore_index=-100)
        for o, w, c in zip(outputs, wanted, weights)
    ]


@torch.no_grad()
def accuracy(net: Reader, split: str, batches: int = 8) -> dict[str, float]:
    """Share of right labels: of patches of tiles and of glyphs by kind, and of the CLS token's answers."""
    net.eval()
    right: dict[str, list[float]] = {}
    stream = iter(Pictures(5 if split == "val" else 6, 32, split))
    for _ in range(batches):
        pixels, wanted = next(stream)
        outputs = net(pixels)
        best = [o.argmax(-1) for o in outputs]
        glyph = wanted[1]
        kinds = {
            "digit": (glyph >= 1) & (glyph <= 10),
            "shape": (glyph >= 11) & (glyph <= 16),
            "loose": (glyph >= 17) & (glyph <= 22),
            "letter": glyph >= 23,
            "nothing": glyph == 0,
        }
        for name, where in kinds.items():
            right.setdefault(name, []).extend((best[1] == glyph)[where].float().tolist())
        right.setdefault("tile", []).extend((best[0] == wanted[0]).float().flatten().tolist())
        right.setdefault("place", []).extend(
            ((best[3] == wanted[3]) & (best[4] == wanted[4])).float().flatten().tolist()
        )
        right.setdefault("ink", []).extend((best[2] == wanted[2])[kinds["loose"]].float().tolist())
        for name, b, w in zip(("cls content", "cls letter", "cls count"), best[DENSE:], wanted[DENSE:]):
            right.setdefault(name, []).extend((b == w)[w > 0].float().tolist())
    net.train()
    return {name: round(float(np.mean(values)), 4) for name, values in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--start", type=Path, help="what an earlier run has learned")
    parser.add_argument("--positions", type=float, default=0.0, help="adds sine and cosine positions, so much of them")
    parser.add_argument("--kept", type=int, default=84, help="patches that a step shows; 0: all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    net = Reader()
    if args.start is not None:
        net.load_state_dict(torch.load(args.start), strict=False)
    with torch.no_grad():
        net.tower.embeddings.position_embedding.weight[1:] += args.positions * sincos()
    train = optimise.Optimiser(net, net.tower.encoder, args.rate, args.steps)
    stream = iter(
        DataLoader(Pictures(args.seed, args.batch, "train"), batch_size=None, num_workers=1, prefetch_factor=4)
    )
    scales = (1.0, 1.0, 0.5, 0.3, 0.3, 0.6, 0.4, 0.4)
    began, mean = time.time(), None
    log = args.out.with_suffix(".jsonl").open("w")
    for step in range(args.steps + 1):
        if step % 200 == 0 and step:
            found = accuracy(net, "val", 3)
            print(step, f"{time.time() - began:.0f} s", found, flush=True)
            log.write(json.dumps({"step": step, "seconds": round(time.time() - began), **found}) + "\n")
            log.flush()
            torch.save(net.state_dict(), args.out)
        pixels, wanted = next(stream)
        kept = some(wanted[1], args.kept) if args.kept else None
        if kept is not None:
            wanted = [w.gather(1, kept) for w in wanted[:DENSE]] + wanted[DENSE:]
        parts = losses(net(pixels, kept), wanted)
        loss = sum(s * p for s, p in zip(scales, parts))
        train.step(loss)
        found = np.array([p.item() for p in parts])
        mean = found if mean is None else 0.95 * mean + 0.05 * found
        if step % 25 == 0:
            print(step, f"{time.time() - began:.0f} s", np.round(mean, 3), flush=True)
    print("validation", accuracy(net, "val", 30))
    torch.save(net.state_dict(), args.out)


if __name__ == "__main__":
    main()
