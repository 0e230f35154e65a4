"""The video sibling: Video-LLaVA's architecture, its towers and the start of its decoder from the trained model.

    python models/vqa/film.py --start work/llava.pt --out work/film.pt [--steps N]
    python models/vqa/film.py --start work/film.pt --out work/more.pt [--steps N]

Both towers are the trained one with the positions of its top left 7 x 7 patches, and stay as they are; projector and
decoder learn questions about clips. As Transformers' class has it, a clip of 8 frames is 8 x 50 tokens, CLS of each
frame among them.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import VideoLlavaConfig, VideoLlavaForConditionalGeneration

import clip
import model
import optimise
import scene
import tower
import words
from decoder import accuracy

sys.path.insert(0, str(Path(__file__).parent.parent / "video_llava"))
import network  # noqa: E402


def tokenizer():
    """The trained model's words, a clip's placeholder and the words of questions about clips."""
    lines = [form.format(c) for forms in clip.FORMS.values() for form in forms for c in scene.COLOURS for _ in range(6)]
    return words.tokenizer(words.corpus() + lines, (network.VIDEO_TOKEN,))


def size(layers: int) -> network.Size:
    made = model.size(layers)
    return network.Size(**{**vars(made), "image": clip.SIDE})


def config(layers: int, vocabulary: int) -> VideoLlavaConfig:
    made = network.config(size(layers))
    made.vision_config = tower.config(tower.LIVE + 1)
    made.vision_config.image_size = clip.SIDE
    made.text_config.vocab_size = vocabulary
    return made


def empty(layers: int, vocabulary: int) -> VideoLlavaForConditionalGeneration:
    made = config(layers, vocabulary)
    return VideoLlavaForConditionalGeneration._from_config(made, attn_implementation="sdpa").float()


def video_llava(start: Path, tok) -> VideoLlavaForConditionalGeneration:
    """A model of this file, or what the trained model knows under Video-LLaVA's names; of words that both have, the
    rows."""
    saved = torch.load(start)
    old = words.tokenizer()
    net = empty(saved["layers"], tok.get_vocab_size())
    state, mine = saved["state"], net.state_dict()
    if state.keys() == mine.keys():
        net.load_state_dict(state)
        return net
    grid = torch.arange(scene.GRID**2).view(scene.GRID, scene.GRID)[: clip.GRID, : clip.GRID].flatten()
    places = torch.cat([torch.zeros(1, dtype=torch.long), grid + 1])
    pairs = [(i, old.token_to_id(t)) for t, i in tok.get_vocab().items() if old.token_to_id(t) is not None]
    here, there = torch.tensor(pairs).T
    for name in mine:
        source = state[name.replace("image_tower", "vision_tower").replace("video_tower", "vision_tower")]
        if "position_embedding" in name:
            mine[name] = source[places]
        elif name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
            mine[name][here] = source[there]
        else:
            mine[name] = source
    net.load_state_dict(mine)
    return net


def is_film(state: dict[str, torch.Tensor]) -> bool:
    """Whether weights are those of a model for clips."""
    return any("video_tower" in name for name in state)


class Asked(IterableDataset):
    """Endless batches of what the tower says of new clips, [clips, FRAMES * (1 + N), D], and questions about them."""

    def __init__(self, start: Path, seed: int, batch: int, questions: int, split: str):
        self.start, self.seed, self.batch, self.questions, self.split = start, seed, batch, questions, split

    def __iter__(self):
        torch.set_num_threads(1)
        vision = video_llava(self.start, tokenizer()).model.video_tower
        rng = np.random.default_rng(self.seed)
        while True:
            made = [clip.clip(rng, self.split) for _ in range(self.batch)]
            asked = [clip.ask(rng, m, self.questions) for m in made]
            frames = torch.from_numpy(np.concatenate([m.pixels for m in made]))
            yield model.seen(vision, frames).reshape(self.batch, -1, tower.WIDTH), asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--start", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--rate", type=float, default=8e-4)
    parser.add_argument("--seed", type=int, default=71)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    tok = tokenizer()
    net = video_llava(args.start, tok)
    for vision in (net.model.image_tower, net.model.video_tower):
        vision.requires_grad_(False)
    answers = model.Answers(net, words.Texts(tok))

    def batches(seed: int, split: str, batch: int, questions: int):
        data = Asked(args.start, seed, batch, questions, split)
        return iter(DataLoader(data, batch_size=None, num_workers=1, prefetch_factor=4))

    validation = batches(1071, "val", 10, 12)
    validation = [next(validation) for _ in range(8)]
    stream = batches(args.seed, "train", args.batch, args.questions)

    def check() -> dict[str, float]:
        return accuracy(answers, validation)

    optimise.learn(net, answers, stream, check, args.out, rate=args.rate, steps=args.steps, warm=50)


if __name__ == "__main__":
    main()
