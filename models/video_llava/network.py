"""A seeded, random-weight Video-LLaVA: small, but with the structure of the real one.

`VideoLlavaForConditionalGeneration` of Transformers: two CLIP towers of one shape (one for images, one that
sees each frame of a clip alone), one projector for both, a Llama decoder. With `vision_feature_layer=-2`
both towers give the output of their second-last layer; of images the class drops CLS
(`vision_feature_select_strategy="default"`), of frames it keeps it, so a clip of 8 frames of 256 patches is
8 x 257 tokens.
"""

import sys
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, VideoLlavaConfig, VideoLlavaForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parents[1] / "llava"))
import build  # noqa: E402
import tokens  # noqa: E402
from build import Size  # noqa: E402

FRAMES = 8
VIDEO_TOKEN = "<video>"
VIDEO = len(tokens.SPECIALS)
SIZE = Size(126, 32, 32, 4, 5, 32, 64, 4, 4, 8, seed=31)
SIZES = {"small": SIZE, "true": Size(224, 32, 32, 4, 5, 32, 64, 4, 4, 32, seed=32)}


def tokenizer():
    """LLaVA's, with the placeholder of a clip behind its special tokens."""
    return tokens.tokenizer((VIDEO_TOKEN,))


def silent() -> list[int]:
    """Tokens that the model should never say."""
    tok = tokenizer()
    texts = (tok.decode([i], skip_special_tokens=False) for i in range(tokens.VOCAB))
    unprintable = {i for i, t in enumerate(texts) if not (t.isprintable() and t.isascii())}
    return sorted({tokens.UNK, tokens.BOS, tokens.PAD, tokens.IMAGE, VIDEO} | unprintable)


def config(size: Size) -> VideoLlavaConfig:
    ids = {"bos_token_id": tokens.BOS, "eos_token_id": tokens.EOS, "pad_token_id": tokens.PAD}
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
        tie_word_embeddings=False,
        **ids,
    )
    return VideoLlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokens.IMAGE,
        video_token_index=VIDEO,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        image_seq_length=size.patches,
        video_seq_length=FRAMES * (size.patches + 1),
        architectures=["VideoLlavaForConditionalGeneration"],
        tie_word_embeddings=False,
        **ids,
    )


def model(attention: str = "eager", size: Size = SIZE) -> VideoLlavaForConditionalGeneration:
    """The model, fp32 with bfloat16 values, with attention implementation `attention`."""
    cfg = config(size)
    cfg._attn_implementation = attention
    net = VideoLlavaForConditionalGeneration._from_config(cfg, attn_implementation=attention).float().eval()
    generator = torch.Generator().manual_seed(size.seed)
    with torch.no_grad():
        for key, parameter in sorted(net.named_parameters()):
            parameter.copy_(build._draw(key, parameter.shape, generator).bfloat16().float())
        net.lm_head.weight[silent()] = 0
    return net.requires_grad_(False)
