"""Exports small LLaVA-NeXT and LLaVA-OneVision models, whose images come in several crops.

    python models/llava_next/export.py [--out models/llava_next/fixtures] [NAME ...]

What people's exports have in common: the vision encoder gives the projected features of each crop, [crops, N, D],
and no more. Laying the crops out as one picture, cutting the padding off and putting `image_newline` behind each
row depends on the size of every picture, so clients do it:

- optimum-intel's and OpenVINO GenAI's LLaVA-NeXT run tower and projector on crops; `image_newline`, a weight that
  belongs to none of the graphs, is a list of D numbers in config.json, and the client packs (GenAI:
  `m_vlm_config.image_newline` and `pack_image_features_llava_next` in its llava_next code; optimum-intel:
  `torch.tensor(self.config.image_newline)` before `pack_image_features`);
- a Triton/torchpipe serving of LLaVA-OneVision hands [5, 729, 896] features to a step of its own that loads
  `image_newline.pt` and packs;
- transformers.js gives LLaVA-OneVision one crop, no newline, and takes its N features as they are.

So the fixtures have the layout of models/llava/export.py, one file per module (packed, NAME.onnx.gz), and `image_newline` in config.json:

| name | tower | decoder | pixel_values | exporter |
|---|---|---|---|---|
| `llava-next` | CLIP, layer -2, CLS dropped | Llama, grouped keys | [crops, 3, H, W] | TorchScript 17, sdpa |
| `llava-onevision` | SigLIP, last layer, no CLS | Qwen2 (q/k/v bias) | [batch, crops, 3, H, W] | dynamo 18, sdpa |
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

HERE = Path(__file__).parent
for folder in ("llava", "forms"):
    sys.path.insert(0, str(HERE.parent / folder))

import check  # noqa: E402
import export as llava  # noqa: E402
import gz  # noqa: E402
import tokens  # noqa: E402
from anyres import ASPECT, SIZES, model, pinpoints  # noqa: E402
from export import Form  # noqa: E402

FIXTURES = HERE / "fixtures"
FORMS = {
    "llava-next": Form("llava-next", "sdpa", 17, False),
    "llava-onevision": Form("llava-onevision", "sdpa", 18, True),
}


class Crops(nn.Module):
    """pixel_values [crops, 3, H, W] -> image_features [crops, N, D], the projector included."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.tower, self.projector = net.model.vision_tower, net.model.multi_modal_projector
        self.layer = net.config.vision_feature_layer
        self.first = int(net.config.vision_feature_select_strategy == "default")

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        states = self.tower(pixel_values, output_hidden_states=True).hidden_states
        return self.projector(states[self.layer][:, self.first :])


class BatchedCrops(Crops):
    """pixel_values [batch, crops, 3, H, W], as the processor gives them -> image_features [batch * crops, N, D]."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return super().forward(pixel_values.flatten(0, 1))


def parts(name: str, net: nn.Module) -> list[llava.Part]:
    shell = SimpleNamespace(
        model=net.model, lm_head=net.lm_head, config=net.config, get_input_embeddings=net.get_input_embeddings
    )
    result = llava.parts(shell, SIZES[name])
    vision = result[0]
    vision.module = Crops(net)
    vision.axes = {"pixel_values": {0: "num_crops"}, "image_features": {0: "num_crops"}}
    if name == "llava-onevision":
        vision.module = BatchedCrops(net)
        vision.args = (torch.stack([vision.args[0], vision.args[0].flip(0), vision.args[0]]),)
        vision.axes = {
            "pixel_values": {0: "batch_size", 1: "num_crops"},
            "image_features": {0: "num_features"},
        }
    return result


def configs(name: str, net: nn.Module, folder: Path) -> None:
    size = SIZES[name]
    llava.configs(net, size, folder)

    def update(file: str, **changes) -> None:
        path = folder / file
        values = json.loads(path.read_text()) | changes
        tokens.dump({k: v for k, v in values.items() if v is not None}, path)

    update("config.json", image_newline=net.model.image_newline.tolist())
    update("preprocessor_config.json", image_grid_pinpoints=pinpoints(name), do_pad=True)
    if name == "llava-next":
        update(
            "preprocessor_config.json",
            processor_class="LlavaNextProcessor",
            image_processor_type="LlavaNextImageProcessor",
        )
        update("processor_config.json", processor_class="LlavaNextProcessor")
        return
    half, square = [0.5, 0.5, 0.5], {"height": size.image, "width": size.image}
    update(
        "preprocessor_config.json",
        processor_class="LlavaOnevisionProcessor",
        image_processor_type="LlavaOnevisionImageProcessor",
        size=square,
        do_center_crop=False,
        crop_size=None,
        image_mean=half,
        image_std=half,
    )
    processor = {
        "processor_class": "LlavaOnevisionProcessor",
        "image_token": "<image>",
        "num_image_tokens": size.patches,
        "vision_aspect_ratio": ASPECT,
        "vision_feature_select_strategy": "full",
    }
    tokens.dump(processor, folder / "processor_config.json")


def unpacked(net: nn.Module) -> SimpleNamespace:
    """`net` with the features of each crop as what check.py compares."""

    def get_image_features(pixels):
        return SimpleNamespace(pooler_output=Crops(net)(pixels))

    return SimpleNamespace(
        model=net.model,
        lm_head=net.lm_head,
        config=net.config,
        get_input_embeddings=net.get_input_embeddings,
        get_image_features=get_image_features,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FIXTURES)
    parser.add_argument("names", nargs="*", default=list(FORMS), metavar="NAME", help=", ".join(FORMS))
    args = parser.parse_args()
    unknown = [n for n in args.names if n not in FORMS]
    if unknown:
        parser.error(f"unknown {', '.join(unknown)}; expected some of {', '.join(FORMS)}")
    torch.set_num_threads(2)
    worst = 0.0
    for name in args.names:
        form, folder = FORMS[name], args.out / name
        net = model(name, form.attention)
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "onnx").mkdir(parents=True)
        configs(name, net, folder)
        for part in parts(name, net):
            llava.export(part, form, folder / "onnx")
        differences = check.compare(folder, unpacked(model(name)), SIZES[name])
        for path in sorted((folder / "onnx").glob("*.onnx")):
            gz.pack(path)
        for what, difference in differences.items():
            print(f"{name:16} {what:34} max |onnx - torch| = {difference:.2e}")
        worst = max(worst, *differences.values())
    if not worst < check.TOLERANCE:
        print(f"worst difference {worst:.2e}, expected below {check.TOLERANCE:.0e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
