"""The trained model: LLaVA-1.5's architecture, small, in Transformers' own classes.

A CLIP tower with CLS, of which LLaVA reads the output of the last layer but one, a two-layer GELU projector and a Llama
decoder.
"""

import copy

import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

import scene
import tower
import words  # puts llava's scripts on the path
import build  # noqa: E402


def size(layers: int) -> build.Size:
    width, heads = tower.WIDTH, tower.HEADS
    sizes = {"vision_width": width, "vision_intermediate": 4 * width, "vision_heads": heads, "width": width}
    return build.Size(
        image=scene.SIDE,
        patch=scene.PATCH,
        vision_layers=tower.LIVE + 1,
        intermediate=320,
        heads=heads,
        kv_heads=heads,
        layers=layers,
        seed=0,
        **sizes,
    )


def config(layers: int, vocabulary: int) -> LlavaConfig:
    """That of llava's models, with the trained tower's activation and the task's words."""
    made = build.config(size(layers))
    made.vision_config = tower.config(tower.LIVE + 1)
    made.text_config.vocab_size = vocabulary
    return made


def llava(layers: int, vocabulary: int, read: dict[str, torch.Tensor] | None = None) -> LlavaForConditionalGeneration:
    """A new model; `read`: what tower.py trained. The tower's last layer, which LLaVA never reads, is a copy of the one
    before it."""
    net = LlavaForConditionalGeneration._from_config(config(layers, vocabulary), attn_implementation="sdpa").float()
    if read is not None:
        set_tower(net, read)
    return net


def set_tower(net: LlavaForConditionalGeneration, read: dict[str, torch.Tensor]) -> None:
    """Puts the tower that tower.py trained into a model."""
    own = {k.removeprefix("tower."): v for k, v in read.items() if k.startswith("tower.")}
    last = {k: v for k, v in own.items() if k.startswith(f"encoder.layers.{tower.LIVE - 1}.")}
    own |= {k.replace(f"layers.{tower.LIVE - 1}.", f"layers.{tower.LIVE}."): v for k, v in last.items()}
    net.model.vision_tower.load_state_dict(own)


def grow(net: LlavaForConditionalGeneration, layers: int) -> LlavaForConditionalGeneration:
    """The model with more decoder layers at its end, which change nothing yet: they are copies of its last ones whose
    output projections are zero."""
    grown = llava(layers, net.config.text_config.vocab_size)
    old = net.config.text_config.num_hidden_layers
    state = copy.deepcopy(net.state_dict())
    mine = grown.state_dict()
    for name in mine:
        if name in state:
            mine[name] = state[name]
            continue
        index = int(name.split("layers.")[1].split(".")[0])
        source = name.replace(f"layers.{index}.", f"layers.{old - (layers - index)}.")
        zero = name.endswith(("o_proj.weight", "down_proj.weight"))
        mine[name] = torch.zeros_like(state[source]) if zero else state[source].clone()
    grown.load_state_dict(mine)
    return grown


@torch.no_grad()
def seen(vision: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> what the projector reads of a tower, CLS first: [B, 1 + N, D]."""
    states = vision.pre_layrnorm(vision.embeddings(tower.normalised(pixels)))
    for layer in vision.encoder.layers[: tower.LIVE]:
        states = layer(states, attention_mask=None)
    return states[0] if isinstance(states, tuple) else states


class Answers(nn.Module):
    """Several questions about each picture in one sequence: they see the picture and themselves, not each other."""

    def __init__(self, net: LlavaForConditionalGeneration, texts: words.Texts):
        super().__init__()
        self.net, self.texts = net, texts

    def forward(
        self, features: torch.Tensor, asked: list[list[tuple[str, str, str]]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`features` [B, N, D] as the projector reads them -> logits [tokens, V] of all answers' tokens and the
        tokens themselves, [tokens]; an answer is a word and the end."""
        head, count = self.texts.prefix, features.shape[1]
        start = len(head) + count
        rows = [[(self.texts.question(q), self.texts.answer(a)) for _, q, a in row] for row in asked]
        length = start + max(sum(len(q) + len(a) - 1 for q, a in row) for row in rows)
        batch = len(rows)
        ids = torch.full((batch, length), words.PAD)
        part = torch.full((batch, length), -1)
        place = torch.zeros((batch, length), dtype=torch.long)
        ids[:, : len(head)] = torch.tensor(head)
        ids[:, len(head) : start] = words.IMAGE
        part[:, :start], place[:, :start] = 0, torch.arange(start)
        asks, wanted = [], []
        for b, row in enumerate(rows):
            at = start
            for number, (question, answer) in enumerate(row, 1):
                text = [*question, *answer[:-1]]
                end = at + len(text)
                ids[b, at:end] = torch.tensor(text)
                part[b, at:end], place[b, at:end] = number, torch.arange(start, start + len(text))
                asks += [(b, at + len(question) - 1 + k) for k in range(len(answer))]
                wanted += answer
                at = end
        embeds = self.net.get_input_embeddings()(ids).clone()
        embeds[:, len(head) : start] = self.net.model.multi_modal_projector(features)
        sees = (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])
        sees &= torch.ones(length, length, dtype=torch.bool).tril()
        out = self.net.model.language_model(
            inputs_embeds=embeds, attention_mask=sees[:, None], position_ids=place, use_cache=False
        )
        asks = torch.tensor(asks)
        return self.net.lm_head(out.last_hidden_state[asks[:, 0], asks[:, 1]]), torch.tensor(wanted)
