"""The vision towers of Qwen2-VL and Qwen2.5-VL for any grid, and stage 1 on what comes out of them.

Transformers puts the tokens of Qwen2.5-VL in the order of their windows and back again. Here they stay in their
own order (row by row, the 2 x 2 patches of a token one after the other) and a window is a mask, so there is
nothing to undo: rows of patches, scores and features are all in the order in which features leave the tower.

Which features the merge works on: the method's description says, for towers in general, that tokens are merged
in front of the projector. The public code of Qwen2.5-VL merges what the merger (the projector of these towers)
gives, behind the undoing of the window order, and is followed.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .merge import choose, contextual
from .order import Margins
from .recipe import Merge


@dataclass
class Seen:
    """What the tower gives for one image of n merged tokens."""

    features: torch.Tensor  # [n, D], as the merger gives them, in position order
    score: torch.Tensor  # [n], attention received in the last block
    metric: torch.Tensor  # [n, head_dim], keys of the last block after the rotary embedding


@dataclass
class MergedGrid:
    """One image after the merge; all numbers are positions among its n tokens."""

    features: torch.Tensor  # [tokens, D], in the order of `kept`
    kept: list[int]  # dominant tokens and anchors, ascending
    dominant: list[int]
    anchors: list[int]  # in the order in which they were chosen
    members: list[list[int]]


def layout(grid: tuple[int, int, int], unit: int, edge: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For every patch of `grid` (frames, rows, columns), in the order in which patches come: row and column [P, 2],
    frame [P], window [P]. A token is `unit` x `unit` patches, a window `edge` x `edge` tokens, cut off at the
    lower and right border of the picture."""
    frames, height, width = grid
    if height % unit or width % unit:
        raise ValueError(f"grid {grid}: expected rows and columns in multiples of {unit}")
    places = [
        (down + y, across + x)
        for down in range(0, height, unit)
        for across in range(0, width, unit)
        for y in range(unit)
        for x in range(unit)
    ]
    place = torch.tensor(places).repeat(frames, 1)
    frame = torch.arange(frames).repeat_interleave(height * width)
    row, column = (place // unit // edge).unbind(dim=1)
    # More windows than a row or a frame of this grid can have.
    many = height * width
    return place, frame, (frame * many + row) * many + column


def rotate(x: torch.Tensor, place: torch.Tensor, theta: float) -> torch.Tensor:
    """Axial rotary embedding of `x` [heads, P, d]: the first quarter of the angles turns by the row of a patch,
    the second by its column; entry i is paired with entry i + d/2."""
    half = x.shape[-1] // 2
    # As the weights are loaded, the frequencies are fp32 values whatever the model computes in.
    inverse = 1.0 / (theta ** (torch.arange(0, half, 2, dtype=torch.float32) / half))
    angle = (place[:, :, None].to(x.dtype) * inverse.to(x.dtype)).flatten(1)
    cos, sin = angle.cos(), angle.sin()
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _norm(module, x: torch.Tensor) -> torch.Tensor:
    """RMSNorm (Qwen2.5-VL) or LayerNorm (Qwen2-VL), both with an epsilon of 1e-6."""
    if getattr(module, "bias", None) is not None:
        return F.layer_norm(x, x.shape[-1:], module.weight, module.bias, 1e-6)
    return module.weight * (x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + 1e-6))


def _linear(module, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, module.weight, module.bias)


def _mlp(module, x: torch.Tensor) -> torch.Tensor:
    """Gated (Qwen2.5-VL) or QuickGELU between two layers (Qwen2-VL)."""
    if hasattr(module, "gate_proj"):
        return _linear(module.down_proj, F.silu(_linear(module.gate_proj, x)) * _linear(module.up_proj, x))
    x = _linear(module.fc1, x)
    return _linear(module.fc2, x * torch.sigmoid(1.702 * x))


def look(net, pixel_values: torch.Tensor, grid: tuple[int, int, int]) -> Seen:
    """One image through the tower of `net`, a Qwen2VL- or Qwen2_5_VLForConditionalGeneration.

    `pixel_values` [P, channels * frames * patch * patch] holds the P = grid[0] * grid[1] * grid[2] patches.
    """
    visual, config = net.model.visual, net.config.vision_config
    heads, unit = config.num_heads, config.spatial_merge_size
    full = getattr(config, "fullatt_block_indexes", None)
    # Qwen2-VL has no windows: every block sees the whole frame.
    edge = max(grid) if full is None else config.window_size // unit // config.patch_size
    place, frame, window = layout(grid, unit, edge)
    if pixel_values.shape[0] != len(place):
        raise ValueError(f"grid {grid}: expected {len(place)} rows of pixels; found {pixel_values.shape[0]}")
    patch = visual.patch_embed.proj
    x = F.linear(pixel_values, patch.weight.flatten(1), patch.bias)
    theta = config.rope_parameters["rope_theta"]
    probs = key = None
    for index, block in enumerate(visual.blocks):
        part = frame if full is None or index in full else window
        query, key, value = (
            t.unflatten(-1, (heads, -1)).transpose(0, 1)
            for t in _linear(block.attn.qkv, _norm(block.norm1, x)).chunk(3, dim=-1)
        )
        query, key = (rotate(t, place, theta) for t in (query, key))
        scores = query @ key.transpose(1, 2) * query.shape[-1] ** -0.5
        probs = torch.softmax(scores.masked_fill(part[:, None] != part[None, :], -torch.inf), dim=-1)
        x = x + _linear(block.attn.proj, (probs @ value).transpose(0, 1).flatten(1))
        x = x + _mlp(block.mlp, _norm(block.norm2, x))
    merger, group = visual.merger, unit**2
    x = _linear(merger.mlp[0], _norm(merger.ln_q, x).reshape(-1, group * x.shape[1]))
    features = _linear(merger.mlp[2], F.gelu(x))
    # Received by a patch: summed over the queries, mean over the heads; by a token: mean over its patches.
    score = probs.sum(dim=1).mean(dim=0).reshape(-1, group).mean(dim=1)
    metric = key.mean(dim=0).unflatten(0, (-1, group)).mean(dim=1)
    return Seen(features, score, metric)


def merge_grid(seen: Seen, to: Merge, margins: Margins) -> MergedGrid:
    """Stage 1 on one image. All frames of a grid are one set of n tokens: one budget, one pool.

    Dominant and contextual tokens come out together in ascending order, a contextual one at its anchor's place.
    Ratios of a few tokens may come to none at all: then the best token is kept, since an image has to be something.
    """
    k1, k2 = to.counts(seen.features.shape[0], has_cls=False)
    k1 = max(k1, int(k1 + k2 == 0))
    made = choose(seen.score, seen.score, seen.metric, (k1, k2), to, margins)
    tokens = torch.cat([seen.features[made.dominant], contextual(seen.features, made, to)])
    kept = torch.cat([made.dominant, torch.tensor(made.anchors, dtype=torch.long)])
    order = kept.argsort()
    return MergedGrid(tokens[order], kept[order].tolist(), made.dominant.tolist(), made.anchors, made.members)
