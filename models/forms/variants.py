"""LLaVA models that differ from those of llava/build.py in the language model.

The tower, the projector, the tokenizer and the way that weights are drawn are the same. `mha16` and `gqa16`
are Llama with heads of 16, which ONNX Runtime's GroupQueryAttention asks for (`mha16` holds the very weights
of `mha`; the attention of `gqa16` is twice as wide as its residual stream). The others are named for what
their decoders are: each a class of Transformers, with what that family has and Llama has not switched on.
"""

from dataclasses import dataclass, replace

import torch
import transformers
from torch import nn
from transformers import LlavaForConditionalGeneration, PretrainedConfig

import common
import export
from common import build, tokens


@dataclass(frozen=True)
class Variant:
    """A language model: its configuration class and what is set beside the usual sizes."""

    size: build.Size
    text: str
    extra: tuple[tuple[str, object], ...] = ()
    head_dim: int | None = None

    @property
    def width(self) -> int:
        return self.head_dim or self.size.width // self.size.heads


_MHA, _GQA = build.SIZES["mha"], build.SIZES["gqa"]
# Shorter than a prompt with an image, so that the window matters at once.
_WINDOW = 48
VARIANTS = {
    "mha16": Variant(replace(_MHA, heads=2, kv_heads=2), "LlamaConfig"),
    "gqa16": Variant(_GQA, "LlamaConfig", head_dim=16),
    "qwen2": Variant(replace(_GQA, seed=21), "Qwen2Config"),
    "qwen3": Variant(replace(_GQA, seed=22), "Qwen3Config", head_dim=16),
    "mistral": Variant(replace(_GQA, seed=23), "MistralConfig", (("sliding_window", _WINDOW),), 16),
    # Heads of 32, of which the embedding turns 16: GroupQueryAttention wants multiples of 16.
    "phi3": Variant(
        replace(_MHA, heads=2, kv_heads=2, seed=24),
        "Phi3Config",
        (
            ("partial_rotary_factor", 0.5),
            ("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
            ("sliding_window", None),
            ("original_max_position_embeddings", 1024),
        ),
        32,
    ),
    "gemma2": Variant(
        replace(_GQA, seed=25),
        "Gemma2Config",
        (("sliding_window", _WINDOW), ("query_pre_attn_scalar", 8), ("final_logit_softcapping", 15.0)),
        16,
    ),
    "gemma3": Variant(
        replace(_GQA, seed=26),
        "Gemma3TextConfig",
        (("sliding_window", _WINDOW), ("query_pre_attn_scalar", 8), ("sliding_window_pattern", 6)),
        16,
    ),
}


def text_config(variant: Variant) -> PretrainedConfig:
    size, old = variant.size, build.config(variant.size).text_config
    values = {
        "vocab_size": tokens.VOCAB,
        "hidden_size": size.width,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": variant.width,
        # GenAI's builder stores the cosines and sines of all of them.
        "max_position_embeddings": 1024,
        "rms_norm_eps": old.rms_norm_eps,
        "bos_token_id": tokens.BOS,
        "eos_token_id": tokens.EOS,
        "pad_token_id": tokens.PAD,
        "tie_word_embeddings": False,
        **dict(variant.extra),
    }
    return getattr(transformers, variant.text)(**values)


def size_of(name: str) -> build.Size:
    return VARIANTS[name].size if name in VARIANTS else build.SIZES[name]


def model(name: str, attention: str = "eager") -> LlavaForConditionalGeneration:
    """The model called `name` here or in llava/build.py, fp32."""
    if name not in VARIANTS:
        return build.model(name, attention)
    variant = VARIANTS[name]
    cfg = build.config(variant.size)
    cfg.text_config = text_config(variant)
    return fill(LlavaForConditionalGeneration, cfg, variant.size.seed, attention)


def fill(kind: type, cfg: PretrainedConfig, seed: int, attention: str) -> nn.Module:
    """A model of class `kind` with weights drawn as llava/build.py draws them."""
    cfg._attn_implementation = attention
    net = kind._from_config(cfg, attn_implementation=attention).float().eval()
    generator = torch.Generator().manual_seed(seed)
    gemma = "gemma" in cfg.text_config.model_type
    with torch.no_grad():
        for key, parameter in sorted(net.named_parameters()):
            value = build._draw(key, parameter.shape, generator)
            if gemma and "language_model" in key and "norm" in key:
                value -= 1  # Gemma multiplies by 1 + weight.
            parameter.copy_(value.bfloat16().float())
        net.lm_head.weight[tokens.silent()] = 0
    return net.requires_grad_(False)


class Decoder(export.Decoder):
    """As in llava/export.py, with the cap that Gemma 2 puts on its logits."""

    def __init__(self, net):
        super().__init__(net)
        head, cap = net.lm_head, getattr(net.config.text_config, "final_logit_softcapping", None)
        self.head = head if cap is None else Capped(head, cap)


class Capped(nn.Module):
    def __init__(self, head: nn.Module, cap: float):
        super().__init__()
        self.inner, self.cap = head, cap

    def forward(self, states):
        return self.cap * torch.tanh(self.inner(states) / self.cap)


def parts(name: str, net: LlavaForConditionalGeneration) -> list[export.Part]:
    """The three files to export, with a cache of this model's width."""
    result = export.parts(net, size_of(name))
    if name in VARIANTS:
        decoder = result[-1]
        *rest, cache = decoder.args
        generator = torch.Generator().manual_seed(0)
        width = VARIANTS[name].width
        wide = [torch.randn(*t.shape[:3], width, generator=generator) for t in cache]
        decoder.args = (*rest, wide)
        decoder.module = Decoder(net)
    return result


def exported(name: str, form: export.Form, folder: common.Path, only: tuple[str, ...] = common.STEMS) -> None:
    """Writes the JSON files and the graphs of model `name`, exported as `form` says, into `folder`."""
    net = model(name, form.attention)
    export.configs(net, size_of(name), folder)
    for part in parts(name, net):
        if part.file in only:
            export.export(part, form, folder / "onnx")
