"""Seeded LLaVA-NeXT and LLaVA-OneVision models of Transformers' own classes, as small as those of models/llava."""

import sys
from dataclasses import replace
from pathlib import Path

import transformers
from torch import nn

for folder in ("llava", "forms"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))

import build  # noqa: E402
import tokens  # noqa: E402
import towers  # noqa: E402
import variants  # noqa: E402

_GQA = replace(build.SIZES["gqa"], image=84)
SIZES = {
    "llava-next": replace(_GQA, seed=41),
    "llava-onevision": replace(_GQA, vision_layers=3, layers=5, seed=42),
}
# OneVision shrinks the grid of an image of more crops than this (times 1.21): published models say 9 of up to 36.
ASPECT = "anyres_max_2"


def pinpoints(name: str) -> list[list[int]]:
    """Resolutions (height, width) in pixels; in crops, LLaVA-NeXT's own, and OneVision's up to four of 1 to 36."""
    edge = SIZES[name].image
    if name == "llava-next":
        grid = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
    else:
        grid = [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (3, 1)]
    return [[h * edge, w * edge] for h, w in grid]


def config(name: str) -> tuple[type, transformers.PretrainedConfig]:
    """Class and configuration of a model."""
    size = SIZES[name]
    plain = build.config(size)
    shared = {
        "image_token_index": tokens.IMAGE,
        "image_grid_pinpoints": pinpoints(name),
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
        "bos_token_id": tokens.BOS,
        "eos_token_id": tokens.EOS,
        "pad_token_id": tokens.PAD,
    }
    if name == "llava-next":
        kind = transformers.LlavaNextForConditionalGeneration
        cfg = transformers.LlavaNextConfig(
            vision_config=plain.vision_config,
            text_config=plain.text_config,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            image_seq_length=size.patches,
            architectures=[kind.__name__],
            **shared,
        )
    else:
        kind = transformers.LlavaOnevisionForConditionalGeneration
        tower = towers.vision_config("siglip", size, transformers.SiglipVisionConfig)
        # The pooling head is never run.
        tower.vision_use_head = False
        cfg = transformers.LlavaOnevisionConfig(
            vision_config=tower,
            text_config=variants.text_config(variants.Variant(size, "Qwen2Config")),
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            vision_aspect_ratio=ASPECT,
            video_token_index=tokens.UNK,
            architectures=[kind.__name__],
            **shared,
        )
    return kind, cfg


def model(name: str, attention: str = "eager") -> nn.Module:
    """A LlavaNextForConditionalGeneration or LlavaOnevisionForConditionalGeneration, fp32, weights from a seed."""
    kind, cfg = config(name)
    return variants.fill(kind, cfg, SIZES[name].seed, attention)
