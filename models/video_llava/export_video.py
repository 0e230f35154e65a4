"""Exports the model of network.py with PyTorch's two exporters to the transformers.js layout.

    python models/video_llava/export_video.py [--out models/video_llava/fixtures] [NAME ...]

Every NAME of FORMS becomes a directory with the configs, a tokenizer and onnx/{vision_encoder,video_encoder,
embed_tokens,decoder_model_merged}.onnx (`together`: both towers in vision_encoder.onnx); features, logits and a
decode step are then compared with the PyTorch model under ONNX Runtime, and the command fails if they differ. Of
`dynamo18` and `together` only the encoder is kept with the fixtures, packed by gzip.
"""

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from tokenizers import Tokenizer
from torch import nn
from transformers.cache_utils import DynamicCache

import network
from network import FRAMES, SIZES, VIDEO, Size

# network puts LLaVA's scripts on the path.
import check  # noqa: E402
import export as llava  # noqa: E402
import tokens  # noqa: E402

FIXTURES = Path(__file__).parent / "fixtures"


@dataclass(frozen=True)
class Form:
    """One way of exporting. `joined`: the frames of a clip come out as one list of tokens; `together`: both towers,
    which share the projector, in one file with two inputs and two outputs.

    `size` "true" has the geometry of Video-LLaVA-7B (224 px, 257 tokens of a frame, 32 decoder layers) and small
    widths: what the recipes of `passes/` are for.
    """

    attention: str
    opset: int
    dynamo: bool
    joined: bool
    external: bool = False
    size: str = "small"
    together: bool = False


FORMS = {
    "ts-sdpa": Form("sdpa", 17, False, joined=False),
    "dynamo18": Form("sdpa", 18, True, joined=True),
    "together": Form("sdpa", 17, False, joined=False, together=True),
    "geometry": Form("sdpa", 17, False, joined=False, size="true"),
}


class ImageEncoder(nn.Module):
    """pixel_values_images [batch, 3, H, W] -> image_features [batch, N, D]; CLS is dropped."""

    def __init__(self, net):
        super().__init__()
        self.tower, self.projector = net.model.image_tower, net.model.multi_modal_projector
        self.layer = net.config.vision_feature_layer

    def forward(self, pixel_values_images: torch.Tensor) -> torch.Tensor:
        states = self.tower(pixel_values_images, output_hidden_states=True).hidden_states
        return self.projector(states[self.layer][:, 1:])


class VideoEncoder(nn.Module):
    """pixel_values_videos [batch, frames, 3, H, W] -> video_features [batch * frames, 1 + N, D], CLS of every
    frame included, as `get_video_features` has it; `joined`: [batch, frames * (1 + N), D]."""

    def __init__(self, net, joined: bool):
        super().__init__()
        self.tower, self.projector = net.model.video_tower, net.model.multi_modal_projector
        self.layer, self.joined = net.config.vision_feature_layer, joined

    def forward(self, pixel_values_videos: torch.Tensor) -> torch.Tensor:
        batch, frames, channels, height, width = pixel_values_videos.shape
        flat = pixel_values_videos.reshape(batch * frames, channels, height, width)
        features = self.projector(self.tower(flat, output_hidden_states=True).hidden_states[self.layer])
        if self.joined:
            features = features.reshape(batch, frames * features.shape[1], features.shape[2])
        return features


class BothEncoders(nn.Module):
    """pixel_values_images and pixel_values_videos -> image_features and video_features, as the two above."""

    def __init__(self, net, joined: bool):
        super().__init__()
        self.images, self.videos = ImageEncoder(net), VideoEncoder(net, joined)

    def forward(self, pixel_values_images: torch.Tensor, pixel_values_videos: torch.Tensor):
        return self.images(pixel_values_images), self.videos(pixel_values_videos)


def parts(net, form: Form, size: Size) -> list[llava.Part]:
    g = torch.Generator().manual_seed(0)
    side = size.image
    out = {0: "batch_size", 1: "video_tokens"} if form.joined else {0: "batch_frames"}
    encoders = [
        llava.Part(
            "vision_encoder",
            ImageEncoder(net),
            (torch.randn(2, 3, side, side, generator=g),),
            ["pixel_values_images"],
            ["image_features"],
            {"pixel_values_images": {0: "batch_size"}, "image_features": {0: "batch_size"}},
        ),
        llava.Part(
            "video_encoder",
            VideoEncoder(net, form.joined),
            (torch.randn(2, 3, 3, side, side, generator=g),),
            ["pixel_values_videos"],
            ["video_features"],
            {"pixel_values_videos": {0: "batch_size", 1: "num_frames"}, "video_features": out},
        ),
    ]
    if form.together:
        image, video = encoders
        video.axes["pixel_values_videos"][0] = "num_videos"
        both = llava.Part(
            "vision_encoder",
            BothEncoders(net, form.joined),
            (*image.args, *video.args),
            image.inputs + video.inputs,
            image.outputs + video.outputs,
            image.axes | video.axes,
        )
        encoders = [both]
    return [*encoders, *llava.language_parts(net, size)]


def configs(net, folder: Path, size: Size, tok: Tokenizer) -> None:
    """The JSON files around the graphs, as Transformers' VideoLlavaProcessor saves them."""
    config = json.loads(net.config.to_json_string(use_diff=False))
    config.pop("_name_or_path", None)
    tokens.dump(config, folder / "config.json")
    ids = {"bos_token_id": tokens.BOS, "eos_token_id": tokens.EOS, "pad_token_id": tokens.PAD}
    tokens.dump({"_from_model_config": True, **ids}, folder / "generation_config.json")
    square = {"height": size.image, "width": size.image}
    pictures = {
        "processor_class": "VideoLlavaProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size.image},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    tokens.dump({**pictures, "image_processor_type": "VideoLlavaImageProcessor"}, folder / "preprocessor_config.json")
    clips = {**pictures, "video_processor_type": "VideoLlavaVideoProcessor", "do_sample_frames": False}
    tokens.dump({**clips, "num_frames": FRAMES}, folder / "video_preprocessor_config.json")
    tokens.dump(
        {
            "processor_class": "VideoLlavaProcessor",
            "image_token": "<image>",
            "video_token": network.VIDEO_TOKEN,
            "num_additional_image_tokens": 1,
            "patch_size": size.patch,
            "vision_feature_select_strategy": "default",
        },
        folder / "processor_config.json",
    )
    tokens.save(folder, tok, "VideoLlavaProcessor", {"video_token": network.VIDEO_TOKEN}, TEMPLATE)


# Images first, then clips, then text.
TEMPLATE = tokens.CHAT_TEMPLATE.replace(
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}",
    "{% for part in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}",
)


class Files:
    """The sessions of an exported directory."""

    def __init__(self, folder: Path):
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 2, 3
        self.session = lambda name: ort.InferenceSession(
            str(folder / "onnx" / f"{name}.onnx"), options, providers=["CPUExecutionProvider"]
        )

    def run(self, name: str, feed: dict) -> list[np.ndarray]:
        return self.session(name).run(None, feed)


def compare(folder: Path, net, size: Size) -> dict[str, float]:
    """Largest absolute differences from PyTorch: an image, if there is an encoder for images, and a clip in one
    prompt."""
    files, rng = Files(folder), np.random.default_rng(3)
    image = rng.standard_normal((1, 3, size.image, size.image)).astype(np.float32)
    clips = rng.standard_normal((2, 4, 3, size.image, size.image)).astype(np.float32)
    result = {}
    features = None
    if (folder / "onnx" / "video_encoder.onnx").exists():
        video = files.run("video_encoder", {"pixel_values_videos": clips})[0]
        if (folder / "onnx" / "vision_encoder.onnx").exists():
            features = files.run("vision_encoder", {"pixel_values_images": image})[0]
    else:
        given = {"pixel_values_images": image, "pixel_values_videos": clips}
        features, video = files.run("vision_encoder", given)
    video = video.reshape(2, -1, size.width)
    images = 0 if features is None else features.shape[1]
    rows = [tokens.BOS, 20, *[tokens.IMAGE] * images, 30, *[VIDEO] * video.shape[1], 40, 41, 42]
    ids = np.array([rows], np.int64)
    embeds = files.run("embed_tokens", {"input_ids": ids})[0]
    embeds[ids == VIDEO] = video[0]
    if features is not None:
        embeds[ids == tokens.IMAGE] = features[0]
    mask = np.ones_like(ids)
    heads = (1, size.kv_heads, 0, size.width // size.heads)
    past = {n: np.zeros(heads, np.float32) for n in llava.cache_names("past_key_values", size.layers)}
    feed = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": check.positions_of(mask), **past}
    logits, *cache = files.run("decoder_model_merged", feed)
    given = [torch.from_numpy(x) for x in (ids, image, clips[:1])]
    with torch.no_grad():
        both = net.model.get_video_features(torch.from_numpy(clips), vision_feature_layer=-2).pooler_output.numpy()
        want = net(
            input_ids=given[0],
            pixel_values=None if features is None else given[1],
            pixel_values_videos=given[2],
            past_key_values=DynamicCache(),
        )
        result["clips"] = float(np.abs(video - both.reshape(video.shape)).max())
        result["logits"] = float(np.abs(logits - want.logits.numpy()).max())
        layers = [t for layer in want.past_key_values.layers for t in (layer.keys, layer.values)]
        result["cache"] = max(float(np.abs(a - b.numpy()).max()) for a, b in zip(cache, layers))
    return {k: v if v == v else float("inf") for k, v in result.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FIXTURES)
    parser.add_argument("names", nargs="*", default=["ts-sdpa", "dynamo18"], metavar="NAME", help=", ".join(FORMS))
    args = parser.parse_args()
    unknown = [n for n in args.names if n not in FORMS]
    if unknown:
        parser.error(f"unknown {', '.join(unknown)}; expected some of {', '.join(FORMS)}")
    torch.set_num_threads(2)
    worst = 0.0
    for name in args.names:
        form, folder = FORMS[name], args.out / name
        size = SIZES[form.size]
        net = network.model(form.attention, size)
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "onnx").mkdir(parents=True)
        configs(net, folder, size, network.tokenizer())
        for part in parts(net, form, size):
            llava.export(part, form, folder / "onnx")
        for what, difference in compare(folder, network.model("eager", size), size).items():
            print(f"{name:10} {what:10} max |onnx - torch| = {difference:.2e}")
            worst = max(worst, difference)
    if not worst < check.TOLERANCE:
        print(f"worst difference {worst:.2e}, expected below {check.TOLERANCE:.0e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
