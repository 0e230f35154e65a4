"""Vision towers without a CLS token, exported as the fixtures are.

    python models/forms/towers.py [--out DIR] [NAME ...]

| tower | what it is |
|---|---|
| `siglip` | SigLIP under LLaVA, as in LLaVA-OneVision: last layer, every patch; tanh GELU; Llama of `gqa` |
| `siglip2` | the same with the last layer but one, so that the exporter drops a layer; QuickGELU |
| `idefics3` | Idefics3, SmolVLM's class: 144 patches; the connector's pixel shuffle puts 2 x 2 of them into one token |

The Idefics3 tower is run with no patch mask, that is for whole images; `idefics3-mask-*` has the mask as the
class makes it, with `pixel_attention_mask` as an input. TorchScript gives both a ScatterND of two types, which
ONNX Runtime does not load; `idefics3-plain-*` adds the position embeddings of a whole image, as export scripts
for such towers do, and runs the class's encoder, last norm and connector.
"""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import torch
import transformers
from torch import nn
from transformers import Idefics3ForConditionalGeneration, LlavaForConditionalGeneration

import common
import export
import variants
from common import build, tokens
from export import Form

_GQA = build.SIZES["gqa"]
SIZES = {
    "siglip": replace(_GQA, vision_layers=4, seed=31),
    "siglip2": replace(_GQA, vision_layers=5, seed=32),
    "idefics3": replace(_GQA, vision_layers=4, image=168, seed=33),
}
SHUFFLE = 2
KINDS = {
    "ts-sdpa": Form("", "sdpa", 17, False),
    "ts-eager": Form("", "eager", 14, False),
    "dynamo18": Form("", "sdpa", 18, True),
    "dynamo23": Form("", "sdpa", 23, True),
}
FORMS = {f"{tower}-{kind}": (tower, kind) for tower in SIZES for kind in KINDS}
FORMS |= {f"idefics3-plain-{kind}": ("idefics3", kind) for kind in ("ts-sdpa", "ts-eager")}
FORMS |= {f"idefics3-mask-{kind}": ("idefics3", kind) for kind in ("ts-eager", "dynamo18")}


def vision_config(tower: str, size: build.Size, kind: type):
    return kind(
        hidden_size=size.vision_width,
        intermediate_size=size.vision_intermediate,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.vision_heads,
        image_size=size.image,
        patch_size=size.patch,
        hidden_act="quick_gelu" if tower == "siglip2" else "gelu_pytorch_tanh",
    )


def model(tower: str, attention: str = "eager") -> nn.Module:
    size = SIZES[tower]
    cfg = build.config(size)
    if tower.startswith("siglip"):
        cfg.vision_config = vision_config(tower, size, transformers.SiglipVisionConfig)
        # LLaVA never runs the pooling head.
        cfg.vision_config.vision_use_head = False
        cfg.vision_feature_select_strategy = "full"
        cfg.vision_feature_layer = -1 if tower == "siglip" else -2
        return variants.fill(LlavaForConditionalGeneration, cfg, size.seed, attention)
    idefics = transformers.Idefics3Config(
        vision_config=vision_config(tower, size, transformers.Idefics3VisionConfig).to_dict(),
        text_config=cfg.text_config,
        scale_factor=SHUFFLE,
        image_token_id=tokens.IMAGE,
        pad_token_id=tokens.PAD,
        tie_word_embeddings=False,
        architectures=["Idefics3ForConditionalGeneration"],
    )
    return variants.fill(Idefics3ForConditionalGeneration, idefics, size.seed, attention)


class FullTower(nn.Module):
    """pixel_values [batch, 3, H, W] -> image_features [batch, N, D] of every patch."""

    def __init__(self, net):
        super().__init__()
        self.tower, self.projector = net.model.vision_tower, net.model.multi_modal_projector
        self.layer = net.config.vision_feature_layer

    def forward(self, pixel_values):
        states = self.tower(pixel_values, output_hidden_states=True).hidden_states
        return self.projector(states[self.layer])


class Shuffled(nn.Module):
    """pixel_values [batch, 3, H, W] -> image_features [batch, N / SHUFFLE^2, D]."""

    def __init__(self, net):
        super().__init__()
        self.tower, self.connector = net.model.vision_model, net.model.connector

    def forward(self, pixel_values):
        return self.connector(self.tower(pixel_values).last_hidden_state)


class ShuffledPlain(Shuffled):
    """The same without position ids: every patch of the square has its own, in order."""

    def forward(self, pixel_values):
        embeddings = self.tower.embeddings
        patches = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        states = self.tower.encoder(inputs_embeds=patches + embeddings.position_embedding.weight).last_hidden_state
        return self.connector(self.tower.post_layernorm(states))


class ShuffledMasked(Shuffled):
    """The same, with a mask of pixels [batch, H, W], of which the class makes one of patches."""

    def forward(self, pixel_values, pixel_attention_mask):
        size = self.tower.patch_size
        grid = pixel_attention_mask.unfold(1, size, size).unfold(2, size, size)
        patches = grid.sum(dim=(-1, -2)) > 0
        return self.connector(self.tower(pixel_values, patch_attention_mask=patches).last_hidden_state)


def adapted(net):
    """`net` with the names of parts that LLaVA has."""
    if isinstance(net, LlavaForConditionalGeneration):
        return net

    def get_image_features(pixels):
        return SimpleNamespace(pooler_output=Shuffled(net)(pixels))

    return SimpleNamespace(
        model=SimpleNamespace(language_model=net.model.text_model),
        lm_head=net.lm_head,
        config=net.config,
        get_input_embeddings=net.get_input_embeddings,
        get_image_features=get_image_features,
    )


def configs(net, size: build.Size, folder: common.Path) -> None:
    export.configs(net, size, folder)
    shuffled = isinstance(net, Idefics3ForConditionalGeneration)
    half, one = [0.5, 0.5, 0.5], {"height": size.image, "width": size.image}
    path = folder / "preprocessor_config.json"
    values = json.loads(path.read_text())
    values |= {"image_mean": half, "image_std": half, "size": one, "do_center_crop": False}
    values |= {"image_processor_type": "SiglipImageProcessor"}
    del values["crop_size"]
    if shuffled:
        values |= {"image_processor_type": "Idefics3ImageProcessor", "processor_class": "Idefics3Processor"}
        values |= {"size": {"longest_edge": size.image}, "max_image_size": {"longest_edge": size.image}}
        values |= {"do_image_splitting": False}
    tokens.dump(values, path)
    path = folder / "processor_config.json"
    values = json.loads(path.read_text())
    values |= {"num_additional_image_tokens": 0, "vision_feature_select_strategy": "full"}
    if shuffled:
        values = {"processor_class": "Idefics3Processor", "image_seq_len": size.patches // SHUFFLE**2}
    tokens.dump(values, path)


def parts(net, size: build.Size, way: str) -> list[export.Part]:
    if isinstance(net, LlavaForConditionalGeneration):
        result = export.parts(net, size)
        result[0].module = FullTower(net)
        return result
    # Parts are made of LLaVA's names; only modules that a Part does not run are missing.
    shell = nn.Module()
    shell.model = nn.Module()
    shell.model.language_model, shell.model.vision_tower = net.model.text_model, net.model.vision_model
    shell.model.multi_modal_projector = net.model.connector
    shell.lm_head, shell.config = net.lm_head, SimpleNamespace(vision_feature_layer=-1)
    shell.get_input_embeddings = net.get_input_embeddings
    result = export.parts(shell, size)
    result[0].module = {"mask": ShuffledMasked, "plain": ShuffledPlain}.get(way, Shuffled)(net)
    if way == "mask":
        first = result[0]
        first.args = (*first.args, torch.ones(first.args[0].shape[0], size.image, size.image, dtype=torch.bool))
        first.inputs = [*first.inputs, "pixel_attention_mask"]
        first.axes["pixel_attention_mask"] = {0: "batch_size"}
    return result


def main() -> int:
    args = common.arguments(__doc__, FORMS)
    good = True
    for name in args.names:
        tower, kind = FORMS[name]
        form, size = KINDS[kind], SIZES[tower]
        how = f"{tower}, {'dynamo' if form.dynamo else 'TorchScript'} opset {form.opset}, {form.attention}"
        folder = common.begin(args.out, name)
        net = model(tower, form.attention)
        configs(net, size, folder)
        try:
            for part in parts(net, size, name.split("-")[1]):
                export.export(part, form, folder / "onnx")
        except Exception as error:
            common.not_made(args.out, name, how, error)
            continue
        reference = adapted(model(tower))
        good &= common.record(args.out, name, how, lambda: common.measure(args.out / name, reference, size), 1e-4)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
