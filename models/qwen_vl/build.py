"""Seeded, random-weight Qwen2.5-VL and Qwen2-VL models: small, but with the structure of the real ones.

Windowed vision attention with full attention in some blocks and in the last (Qwen2-VL: full attention in all), a
2x2 merger behind it, and a Qwen2 decoder with biases on queries, keys and values, grouped key heads and M-RoPE:
three rows of position ids (time, height, width), each of which turns its own part of every head.
"""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

LLAVA = Path(__file__).parents[1] / "llava"
sys.path += [str(LLAVA), str(Path(__file__).parent)]
import tokens  # noqa: E402
import words  # noqa: E402


def sibling(name: str):
    """The module of that name beside llava's, which has files called as ours are.

    What it imports by such a name is its own too.
    """
    ours = {n: sys.modules.pop(n, None) for n in ("build", "export", "goldens", "cases")}
    sys.path.insert(0, str(LLAVA))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(LLAVA))
        for n, module in ours.items():
            sys.modules.pop(n, None)
            if module is not None:
                sys.modules[n] = module


llava = sibling("build")

VISION_START, VISION_END = words.VISION_START_ID, words.VISION_END_ID


@dataclass(frozen=True)
class Size:
    """Dimensions of one model; `section` splits the turned pairs of a head among the rows of positions."""

    width: int = 32
    intermediate: int = 48
    heads: int = 4
    kv_heads: int = 2
    layers: int = 5
    section: tuple[int, int, int] = (1, 1, 2)
    vision_width: int = 32
    vision_intermediate: int = 48
    vision_heads: int = 2
    vision_layers: int = 4
    full: tuple[int, ...] = (1, 3)
    patch: int = 4
    window: int = 16
    seed: int = 31


SIZE = Size()
# Qwen2-VL's own: fewer layers, and other weights.
SIZES = {"qwen2.5-vl": SIZE, "qwen2-vl": Size(layers=3, vision_intermediate=64, vision_layers=2, full=(), seed=32)}
# Pixels that a picture has at least and at most: 4 and 40 tokens of 8 by 8.
PIXELS = {"shortest_edge": 4 * 64, "longest_edge": 40 * 64}


def config(name: str = "qwen2.5-vl") -> Qwen2_5_VLConfig | Qwen2VLConfig:
    size = SIZES[name]
    ids = {"bos_token_id": tokens.BOS, "eos_token_id": tokens.EOS, "pad_token_id": tokens.PAD}
    vision = {"depth": size.vision_layers, "num_heads": size.vision_heads, "patch_size": size.patch}
    if name == "qwen2.5-vl":
        make, architecture = Qwen2_5_VLConfig, "Qwen2_5_VLForConditionalGeneration"
        vision |= {
            "hidden_size": size.vision_width,
            "intermediate_size": size.vision_intermediate,
            "out_hidden_size": size.width,
            "window_size": size.window,
            "fullatt_block_indexes": list(size.full),
        }
    else:
        make, architecture = Qwen2VLConfig, "Qwen2VLForConditionalGeneration"
        ratio = size.vision_intermediate // size.vision_width
        vision |= {"embed_dim": size.vision_width, "hidden_size": size.width, "mlp_ratio": ratio}
    return make(
        vision_config=vision,
        text_config={
            "vocab_size": tokens.VOCAB,
            "hidden_size": size.width,
            "intermediate_size": size.intermediate,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": list(size.section),
            },
            **ids,
        },
        image_token_id=tokens.IMAGE,
        video_token_id=words.VIDEO_ID,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        architectures=[architecture],
        tie_word_embeddings=False,
        **ids,
    )


def model(
    name: str = "qwen2.5-vl", attention: str = "eager"
) -> Qwen2_5_VLForConditionalGeneration | Qwen2VLForConditionalGeneration:
    """The model, fp32, with attention implementation `attention`; its weights do not depend on it."""
    cfg, size = config(name), SIZES[name]
    make = Qwen2_5_VLForConditionalGeneration if name == "qwen2.5-vl" else Qwen2VLForConditionalGeneration
    net = make._from_config(cfg, attn_implementation=attention).float().eval()
    generator = torch.Generator().manual_seed(size.seed)
    with torch.no_grad():
        for key, parameter in sorted(net.named_parameters()):
            parameter.copy_(llava._draw(key, parameter.shape, generator).bfloat16().float())
        net.lm_head.weight[tokens.silent()] = 0
    return net.requires_grad_(False)


def qwen2(attention: str = "eager") -> Qwen2VLForConditionalGeneration:
    """A Qwen2-VL whose vision tower is drawn, fp32; its decoder is as small as can be and means nothing.

    The weights are the same whatever version of Transformers has the class, which `model` cannot promise: 4.49, whose
    exports people have, knows neither its configuration nor its names of parameters.
    """
    cfg = Qwen2VLConfig(
        vision_config={
            "depth": 3,
            "embed_dim": SIZE.vision_width,
            "hidden_size": SIZE.width,
            "mlp_ratio": 2,
            "num_heads": SIZE.vision_heads,
            "patch_size": SIZE.patch,
        },
        # Given flat, as every version takes it.
        vocab_size=tokens.VOCAB,
        hidden_size=SIZE.width,
        intermediate_size=SIZE.width,
        num_hidden_layers=1,
        num_attention_heads=SIZE.heads,
        num_key_value_heads=SIZE.heads,
        rope_scaling={"type": "mrope", "mrope_section": list(SIZE.section)},
        bos_token_id=tokens.BOS,
        eos_token_id=tokens.EOS,
    )
    net = Qwen2VLForConditionalGeneration._from_config(cfg, attn_implementation=attention).float().eval()
    generator = torch.Generator().manual_seed(SIZE.seed + 1)
    with torch.no_grad():
        for key, parameter in sorted(tower(net).named_parameters()):
            parameter.copy_(llava._draw(key, parameter.shape, generator).bfloat16().float())
    return net.requires_grad_(False)


def tower(net):
    """The vision tower of a Qwen model, wherever a version of Transformers keeps it."""
    return net.visual if hasattr(net, "visual") else net.model.visual
