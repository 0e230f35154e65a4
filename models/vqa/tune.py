"""Fine-tunes a trained model with both stages of a recipe active: the "trained" column.

    python models/vqa/tune.py --start work/llava.pt --recipe passes/NAME.yaml --out work/llava-duet.pt
    python models/vqa/tune.py --start work/film.pt …

The token merge runs behind the frozen tower; projector and decoder learn on its tokens, and the decoder drops visual
tokens at the recipe's layers by what the question asks. Gradients go through the tokens that are kept. The model is
then exported without the stages, as any other, and rewritten.
"""

import argparse
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import clip
import film
import model
import optimise
import scene
import tower
import words
from answers import merge, parse, reference_tower
from reference.order import Margins


class Merged(IterableDataset):
    """Endless batches of merged tokens [pictures or clips, tokens, D] as the projector reads them, and questions."""

    def __init__(self, start: Path, merging, seed: int, batch: int, questions: int, split: str):
        self.start, self.merging = start, merging
        self.seed, self.batch, self.questions, self.split = seed, batch, questions, split

    @torch.no_grad()
    def __iter__(self):
        torch.set_num_threads(1)
        net = loaded(self.start)
        moving = film.is_film(net.state_dict())
        draw, ask = (clip.clip, clip.ask) if moving else (scene.scene, scene.ask)
        if moving:
            net = SimpleNamespace(model=SimpleNamespace(vision_tower=net.model.video_tower), config=net.config)
        rng = np.random.default_rng(self.seed)
        while True:
            made = [draw(rng, self.split) for _ in range(self.batch)]
            asked = [ask(rng, m, self.questions) for m in made]
            pixels = torch.from_numpy(np.stack([m.pixels for m in made])).view(-1, *made[0].pixels.shape[-3:])
            out = reference_tower.run(net, tower.normalised(pixels))
            if self.merging is None:
                tokens = out.hidden[:, int(not moving) :]
            else:
                images = zip(out.hidden, out.probs, out.metric)
                tokens = torch.stack([merge(*one, self.merging, Margins()).hidden for one in images])
            yield tokens.reshape(self.batch, -1, tokens.shape[-1]), asked


def loaded(path: Path):
    saved = torch.load(path)
    make = film.empty if film.is_film(saved["state"]) else model.llava
    net = make(saved["layers"], saved["state"]["lm_head.weight"].shape[0])
    net.load_state_dict(saved["state"])
    return net


class Pruned(nn.Module):
    """One question a row, the text as long as the longest; the decoder with the drops of a schedule."""

    def __init__(self, net, texts: words.Texts, drops: dict[int, float]):
        super().__init__()
        self.net, self.texts, self.drops = net, texts, drops

    def forward(self, features: torch.Tensor, asked: list) -> tuple[torch.Tensor, torch.Tensor]:
        """`features` [pictures, N, D] and the questions about each -> logits [tokens, V] and tokens of the answers."""
        head, count = self.texts.prefix, features.shape[1]
        picture = torch.tensor([b for b, row in enumerate(asked) for _ in row])
        pairs = [(self.texts.question(q), self.texts.answer(a)) for row in asked for _, q, a in row]
        longest = max(len(q) + len(a) - 1 for q, a in pairs)
        first = len(head)
        ids = torch.full((len(pairs), first + count + longest), words.PAD)
        ids[:, :first] = torch.tensor(head)
        real = torch.ones_like(ids, dtype=torch.bool)
        asks = torch.zeros_like(real)
        ends = torch.tensor([len(q) for q, _ in pairs])
        for b, (question, answer) in enumerate(pairs):
            text = [*question, *answer[:-1]]
            ids[b, first + count : first + count + len(text)] = torch.tensor(text)
            real[b, first + count + len(text) :] = False
            # The answer does not ask: at run time it is not there yet when tokens are dropped.
            asks[b, first + count : first + count + len(question)] = True
        embeds = self.net.get_input_embeddings()(ids).clone()
        embeds[:, first : first + count] = self.net.model.multi_modal_projector(features)[picture]
        decoder, hidden, now = self.net.model.language_model, embeds, count
        for index, layer in enumerate(decoder.layers):
            if index in self.drops:
                keep = int(count * self.drops[index])
                hidden, real, asks = self.drop(layer, hidden, real, asks, (first, now, keep))
                now = keep
            length = hidden.shape[1]
            positions = torch.arange(length)[None].expand(len(pairs), -1)
            sees = real[:, None, None, :] & torch.ones(length, length, dtype=torch.bool).tril()
            sees = sees | torch.eye(length, dtype=torch.bool)
            rotary = decoder.rotary_emb(hidden, positions)
            out = layer(hidden, attention_mask=sees, position_ids=positions, position_embeddings=rotary)
            hidden = out[0] if isinstance(out, tuple) else out
        hidden = decoder.norm(hidden)
        at = first + now + ends - 1
        rows = torch.arange(len(pairs))
        states = torch.stack([hidden[rows, at], hidden[rows, at + 1]], 1)
        return self.net.lm_head(states).flatten(0, 1), torch.tensor([t for _, a in pairs for t in a])

    def drop(self, layer, hidden, real, asks, span: tuple[int, int, int]):
        """Keeps the visual tokens that the question looks at most by the next layer (METHOD: stage 2)."""
        first, now, keep = span
        with torch.no_grad():
            attention, length = layer.self_attn, hidden.shape[1]
            x = layer.input_layernorm(hidden)
            q, k = (
                p(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
                for p in (attention.q_proj, attention.k_proj)
            )
            positions = torch.arange(length)[None]
            q, k = apply_rotary_pos_emb(q, k, *self.net.model.language_model.rotary_emb(hidden, positions))
            scores = q @ k.transpose(2, 3) * attention.head_dim**-0.5
            sees = torch.ones(length, length, dtype=torch.bool).tril() & real[:, None, None, :]
            probs = scores.masked_fill(~sees, -torch.inf).softmax(-1).mean(1)
            score = (probs * asks[:, :, None]).sum(1) / asks.sum(1, keepdim=True)
            kept = score[:, first : first + now].topk(keep, 1).indices.sort(1).values + first
            before = torch.arange(first).expand(len(hidden), -1)
            behind = torch.arange(first + now, length).expand(len(hidden), -1)
            index = torch.cat([before, kept, behind], 1)
        rows = torch.arange(len(hidden))[:, None]
        return hidden[rows, index], real[rows, index], asks[rows, index]


@torch.no_grad()
def accuracy(net: Pruned, batches: list) -> float:
    right = []
    for features, asked in batches:
        logits, wanted = net(features, asked)
        right += (logits.argmax(-1) == wanted)[::2].tolist()
    return float(np.mean(right))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--start", type=Path, required=True)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--questions", type=int, default=10)
    parser.add_argument("--rate", type=float, default=4e-4)
    parser.add_argument("--seed", type=int, default=51)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    merging, pruning = parse(yaml.safe_load(args.recipe.read_text()))
    net = loaded(args.start)
    moving = film.is_film(net.state_dict())
    for vision in (net.model.image_tower, net.model.video_tower) if moving else (net.model.vision_tower,):
        vision.requires_grad_(False)
    texts = words.Texts(film.tokenizer() if moving else None)
    pruned = Pruned(net, texts, dict(pruning.drops) if pruning else {})

    def batches(seed: int, split: str, batch: int, questions: int):
        data = Merged(args.start, merging, seed, batch, questions, split)
        return iter(DataLoader(data, batch_size=None, num_workers=1, prefetch_factor=6))

    validation = batches(1051, "val", 20, 12)
    validation = [next(validation) for _ in range(8)]
    stream = batches(args.seed, "train", args.batch, args.questions)

    def check() -> dict[str, float]:
        return {"all": round(accuracy(pruned, validation), 4)}

    print(0, check(), flush=True)
    optimise.learn(net, pruned, stream, check, args.out, rate=args.rate, steps=args.steps, warm=30, every=50)


if __name__ == "__main__":
    main()
