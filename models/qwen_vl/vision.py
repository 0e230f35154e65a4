"""The vision towers of build.py for any grid, as PyTorch's exporters take them, and their comparison with
Transformers' own. export.py makes one for each of its models, vision_forms.py makes them alone.

    pixel_values [patches, channels * frames * patch * patch], image_grid_thw [1, 3] -> image_features [tokens, D]

which is the interface of the exports that people have. PyTorch's exporters do not take Transformers' tower as
it is: it splits queries, keys and values at offsets that it computes from the grid (a Python list), and fills its
window index in a Python loop, so that one grid is baked into the file. What public exports do instead:

- Microsoft's recipe for ONNX Runtime GenAI (github.com/microsoft/olive-recipes,
  Qwen-Qwen2.5-VL-3B-Instruct/builtin: user_script.py, codes/modeling_qwen2_5_vl.py): dynamo, one image a call,
  the window order and the rotary tables computed in the graph from image_grid_thw, attention left as a packed
  operator that is replaced by a Loop over windows afterwards; GenAI runs the encoder once for each image;
- github.com/techshoww/Qwen2.5-VL-3B-Instruct-export-onnx and others: one grid per file, patches and rotary
  table put in order, and the masks made, outside of the file.

Here everything is computed in the graph, and a window is a mask: patches see those with the same window number,
in the blocks with full attention those of the same frame. That is what the packed operator computes.
"""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from build import SIZE, Size, sibling

shared = sibling("export")

# Time, height and width in patches: windows that are whole, cut off on each side, and several frames.
GRIDS = ((1, 8, 8), (1, 10, 6), (1, 2, 14), (1, 4, 4), (2, 6, 10))


class Vision(nn.Module):
    """The tower and merger of `net`, a Qwen2.5-VL or a Qwen2-VL; `eager` spells the attention out."""

    def __init__(self, net, eager: bool):
        super().__init__()
        self.visual, self.eager = net.model.visual, eager
        self.merge = self.visual.spatial_merge_size
        # Edge of a window, in tokens; Qwen2-VL has no windows.
        self.window = None
        if hasattr(self.visual, "window_size"):
            self.window = self.visual.window_size // self.merge // self.visual.patch_size

    def places(self, grid: torch.Tensor, tokens: int):
        """Order of the tokens by window [n]; and in that order, of every patch: its window and frame [n * m * m],
        and its row and column [n * m * m, 2]."""
        m, edge = self.merge, self.window
        rows, columns = grid[0, 1] // m, grid[0, 2] // m
        token = torch.arange(tokens)
        frame, row, column = token // (rows * columns), token // columns % rows, token % columns
        window, order = frame, token
        if edge is not None:
            down, across = (rows + edge - 1) // edge, (columns + edge - 1) // edge
            window = (frame * down + row // edge) * across + column // edge
            order = torch.argsort((window * edge + row % edge) * edge + column % edge)
        # The patches of a token follow one another, its upper row first.
        within = torch.arange(m * m)
        down = row[order][:, None] * m + within // m
        across = column[order][:, None] * m + within % m
        spread = lambda x: x[order][:, None].expand(-1, m * m).reshape(-1)  # noqa: E731
        return order, spread(window), spread(frame), torch.stack([down, across], dim=-1).reshape(-1, 2)

    def attend(self, attn, x: torch.Tensor, tables, seen: torch.Tensor) -> torch.Tensor:
        qkv = attn.qkv(x).reshape(-1, 3, attn.num_heads, attn.head_dim).permute(1, 0, 2, 3)
        query, key = apply_rotary_pos_emb_vision(qkv[0], qkv[1], *tables)
        query, key, value = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, qkv[2]))
        if self.eager:
            scores = query @ key.transpose(2, 3) * attn.scaling
            scores = scores + torch.where(seen, 0.0, torch.finfo(scores.dtype).min)
            out = torch.softmax(scores, dim=-1) @ value
        else:
            out = scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=attn.scaling)
        return attn.proj(out.squeeze(0).transpose(0, 1).flatten(1))

    def forward(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
        visual, unit = self.visual, self.merge**2
        hidden = visual.patch_embed(pixel_values)
        tokens = hidden.shape[0] // unit
        order, window, frame, places = self.places(image_grid_thw, tokens)
        if self.window is not None:
            hidden = hidden.reshape(-1, unit, hidden.shape[1])[order].reshape(-1, hidden.shape[1])
        tables = visual.rotary_pos_emb(hidden, places)
        windowed, full = (x[:, None] == x[None, :] for x in (window, frame))
        for index, block in enumerate(visual.blocks):
            seen = full if self.window is None or index in visual.fullatt_block_indexes else windowed
            hidden = hidden + self.attend(block.attn, block.norm1(hidden), tables, seen)
            hidden = hidden + block.mlp(block.norm2(hidden))
        features = visual.merger(hidden)
        return features if self.window is None else features[torch.argsort(order)]


def part(net, form, size: Size = SIZE) -> shared.Part:
    grid = torch.tensor([GRIDS[1]])
    width = 3 * 2 * size.patch**2
    pixels = torch.randn(int(grid.prod()), width, generator=torch.Generator().manual_seed(0))
    axes = {"pixel_values": {0: "num_patches"}, "image_grid_thw": {}, "image_features": {0: "num_tokens"}}
    names = ["pixel_values", "image_grid_thw"]
    module = Vision(net, form.attention == "eager")
    return shared.Part("vision_encoder", module, (pixels, grid), names, ["image_features"], axes)


def compare(folder: Path, net) -> float:
    """Largest absolute difference of features from Transformers' tower, over all grids."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 2
    path = str(folder / "onnx" / "vision_encoder.onnx")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    worst = 0.0
    for seed, grid in enumerate(GRIDS):
        pixels = torch.randn(int(np.prod(grid)), 3 * 2 * SIZE.patch**2, generator=torch.Generator().manual_seed(seed))
        thw = torch.tensor([grid])
        with torch.no_grad():
            want = net.model.visual(pixels, grid_thw=thw).pooler_output.numpy()
        found = session.run(None, {"pixel_values": pixels.numpy(), "image_grid_thw": thw.numpy()})[0]
        if found.shape != want.shape:
            raise RuntimeError(f"{folder}: {found.shape} for {grid}, expected {want.shape}")
        difference = float(np.abs(found - want).max())
        worst = max(worst, difference if difference == difference else float("inf"))
    return worst
