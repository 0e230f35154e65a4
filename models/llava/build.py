"""Seeded, random-weight LLaVA-1.5 models: small, but with the structure of the real ones.

A CLIP tower with CLS, `vision_feature_layer=-2` with CLS dropped, a two-layer GELU projector and a
Llama decoder, all of them the Transformers classes. Nothing is trained; what the weights must do is
give attention that is clearly not uniform, so that the tokens that a pruning step keeps are separated
from those that it drops by far more than fp32 noise.
"""

from dataclasses import dataclass

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import tokens


@dataclass(frozen=True)
class Size:
    """Dimensions of one model; `vision_layers` counts the last, dead layer that LLaVA never reads."""

    image: int
    vision_width: int
    vision_intermediate: int
    vision_heads: int
    vision_layers: int
    width: int
    intermediate: int
    heads: int
    kv_heads: int
    layers: int
    seed: int
    patch: int = 14

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2


SIZES = {
    "mha": Size(126, 48, 48, 4, 5, 32, 64, 4, 4, 8, seed=11),
    "gqa": Size(126, 48, 48, 4, 5, 32, 64, 4, 2, 8, seed=12),
    # LLaVA-1.5's true image geometry: 336 px, 576 patches.
    "demo": Size(336, 48, 48, 4, 8, 64, 128, 4, 4, 16, seed=13),
}


def config(size: Size) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=size.vision_width,
        intermediate_size=size.vision_intermediate,
        projection_dim=size.vision_width,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.vision_heads,
        image_size=size.image,
        patch_size=size.patch,
        hidden_act="quick_gelu",
    )
    text = LlamaConfig(
        vocab_size=tokens.VOCAB,
        hidden_size=size.width,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.width // size.heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        bos_token_id=tokens.BOS,
        eos_token_id=tokens.EOS,
        pad_token_id=tokens.PAD,
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokens.IMAGE,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        image_seq_length=size.patches,
        architectures=["LlavaForConditionalGeneration"],
        bos_token_id=tokens.BOS,
        eos_token_id=tokens.EOS,
        pad_token_id=tokens.PAD,
        tie_word_embeddings=False,
    )


def _draw(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Values of one parameter, by the role that its name tells."""

    def normal(std: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * std

    fan_in = shape[1:].numel() if len(shape) > 1 else 1
    if len(shape) == 1:
        # Norm weights around 1 and never equal to it: an exporter that folds a weight of ones away
        # would hide a mistake in recognition.
        if "norm" in name and name.endswith("weight"):
            return 1 + normal(0.15)
        return normal(1.0 if "class_embedding" in name else 0.1)
    if "embed_tokens" in name:
        return normal(1.0)
    if "position_embedding" in name:
        return normal(0.6)
    if "q_proj" in name or "k_proj" in name:
        # Inputs are normalised, so q.k/sqrt(head_dim) has a standard deviation of about 1.4^2 = 2.
        return normal(1.4 * fan_in**-0.5)
    if "lm_head" in name:
        return normal(3.0 * fan_in**-0.5)
    if "out_proj" in name or "o_proj" in name or "down_proj" in name or "fc2" in name:
        return normal(0.8 * fan_in**-0.5)
    return normal(1.2 * fan_in**-0.5)


def model(name: str, attention: str = "eager") -> LlavaForConditionalGeneration:
    """The model called `name` in SIZES, fp32, with attention implementation `attention`.

    The weights depend on the name alone. They are rounded to bfloat16 values (kept in fp32), because
    half of their bits are then zero and the committed files compress to about half.
    """
    size = SIZES[name]
    cfg = config(size)
    cfg._attn_implementation = attention
    net = LlavaForConditionalGeneration._from_config(cfg, attn_implementation=attention).float().eval()
    fill(net, size.seed)
    return net.requires_grad_(False)


def fill(net: LlavaForConditionalGeneration, seed: int) -> None:
    """Draws every weight of a model, in the order of their names."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in sorted(net.named_parameters()):
            parameter.copy_(_draw(key, parameter.shape, generator).bfloat16().float())
        # A logit of 0 is never the largest of hundreds: no placeholder and no control byte in answers,
        # and nothing that the tokenizer does not know.
        net.lm_head.weight[tokens.silent()] = 0
        net.lm_head.weight[tokens.VOCAB :] = 0
