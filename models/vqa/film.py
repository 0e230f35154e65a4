"""The video sibling: Video-LLaVA's architecture, whose decoder starts as the trained model's.

    python models/vqa/film.py --start work/llava.pt --out work/film.pt [--steps N]

Both towers are the trained one, with the positions of its top left 7 x 7 patches. As Transformers' class has it, a clip
of 8 frames is 8 x 50 tokens, CLS of each frame among them.
"""

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset
from transformers import VideoLlavaConfig, VideoLlavaForConditionalGeneration

import clip
import model
import optimise
import scene
import tower
import words

VIDEO_TOKEN = "<video>"
VIDEO = len(words.SPECIALS)


def corpus() -> list[str]:
    lines = [form.format(c) for forms in clip.FORMS.values() for form in forms for c in scene.COLOURS for _ in range(6)]
    return words.corpus() + lines + [f" {w}" for w in (*clip.WAYS, clip.STILL) for _ in range(9)]


def tokenizer():
    """The trained model's tokenizer with a clip's placeholder, and the words of questions about clips."""
    return words.tokenizer(corpus(), (VIDEO_TOKEN,))


def config(layers: int, vocabulary: int) -> VideoLlavaConfig:
    ids = {"bos_token_id": words.BOS, "eos_token_id": words.EOS, "pad_token_id": words.PAD}
    vision = tower.config(tower.LIVE + 1)
    vision.image_size = clip.SIDE
    return VideoLlavaConfig(
        vision_config=vision,
        text_config=model.text_config(layers, vocabulary),
        image_token_index=words.IMAGE,
        video_token_index=VIDEO,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        image_seq_length=clip.GRID**2,
        video_seq_length=clip.FRAMES * (clip.GRID**2 + 1),
        architectures=["VideoLlavaForConditionalGeneration"],
        tie_word_embeddings=False,
        **ids,
    )


def empty(layers: int, vocabulary: int) -> VideoLlavaForConditionalGeneration:
    return VideoLlavaForConditionalGeneration._from_config(config(layers, vocabulary), attn_implementation="sdpa").float()


def video_llava(start: Path, tok) -> VideoLlavaForConditionalGeneration:
    """What the image model has learned, under Video-LLaVA's names; rows of tokens that both know are copied."""
    saved = torch.load(start)
    old = words.tokenizer()
    net = empty(saved["layers"], tok.get_vocab_size())
    state, mine = saved["state"], net.state_dict()
    grid = torch.arange(scene.GRID**2).view(scene.GRID, scene.GRID)[: clip.GRID, : clip.GRID].flatten()
    rows = torch.cat([torch.zeros(1, dtype=torch.long), grid + 1])
    pairs = [(i, old.token_to_id(t)) for t, i in tok.get_vocab().items() if old.token_to_id(t) is not None]
    here, there = torch.tensor(pairs).T
    for name in mine:
        source = name.replace("image_tower", "vision_tower").replace("video_tower", "vision_tower")
        if "position_ids" in name:
            continue
        if "position_embedding" in name:
            mine[name] = state[source][rows]
        elif name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
            mine[name][here] = state[source][there]
        else:
            mine[name] = state[source]
    net.load_state_dict(mine)
    return net


@torch.no_grad()
def seen(net, pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [B, FRAMES, H, W, 3] -> what the projector reads of each clip, [B, FRAMES * (1 + N), D]."""
    vision = net.model.video_tower
    states = vision.pre_layrnorm(vision.embeddings(tower.normalised(pixels.flatten(0, 1))))
    for layer in vision.encoder.layers[: tower.LIVE]:
        out = layer(states, attention_mask=None)
        states = out[0] if isinstance(out, tuple) else out
    return states.unflatten(0, pixels.shape[:2]).flatten(1, 2)


class Asked(IterableDataset):
    """Endless batches of what the frozen tower says of new clips, and questions about them."""

    def __init__(self, start: Path, seed: int, batch: int, questions: int, split: str):
        self.start, self.seed, self.batch, self.questions, self.split = start, seed, batch, questions, split

    def __iter__(self):
        torch.set_num_threads(1)
        net = video_llava(self.start, tokenizer())
        rng = np.random.default_rng(self.seed)
        while True:
            made = [clip.clip(rng, self.split) for _ in range(self.batch)]
            asked = [clip.ask(rng, m, self.questions) for m in made]
            yield seen(net, torch.from_numpy(np.stack([m.pixels for m in made]))), asked


@torch.no_grad()
def accuracy(answers: model.Answers, batches: list) -> dict[str, float]:
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
    parser.add_argument("--start", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--questions", type=int, default=10)
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
    answers = model.Answers(net, words.Texts(tok), VIDEO)

    def batches(seed: int, split: str, batch: int, questions: int):
        data = Asked(args.start, seed, batch, questions, split)
        return iter(DataLoader(data, batch_size=None, num_workers=1, prefetch_factor=6))

    validation = batches(1071, "val", 10, 10)
    validation = [next(validation) for _ in range(10)]
    train = optimise.Optimiser(net, net.model.language_model.layers, args.rate, args.steps, warm=50)
    stream = batches(args.seed, "train", args.batch, args.questions)
    began, mean = time.time(), 0.0
    log = args.out.with_suffix(".jsonl").open("w")
    for step in range(args.steps + 1):
        if step % 100 == 0:
            found = accuracy(answers, validation)
            print(step, f"{time.time() - began:.0f} s", round(mean, 4), found, flush=True)
            log.write(json.dumps({"step": step, "seconds": round(time.time() - began), "loss": mean, **found}) + "\n")
            log.flush()
            torch.save({"layers": len(net.model.language_model.layers), "state": net.state_dict()}, args.out)
        features, asked = next(stream)
        logits, wanted = answers(features, asked)
        loss = cross_entropy(logits, wanted)
        train.step(loss)
        mean = loss.item() if step == 0 else 0.95 * mean + 0.05 * loss.item()


if __name__ == "__main__":
    main()
