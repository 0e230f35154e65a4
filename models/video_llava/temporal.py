"""A video tower whose frames see each other, as LanguageBind's own does, exported, with what its merge chooses.

    python models/video_llava/temporal.py [--out models/video_llava]

Writes OUT/fixtures/temporal/video_encoder.onnx.gz and OUT/goldens/temporal.{json,safetensors}.

Transformers' Video-LLaVA sees each frame alone. The tower that Video-LLaVA was trained with (LanguageBind's video
encoder; `add_time_attn` of its configuration) puts three steps before the attention of every block: a learned vector
for each frame is added to its tokens, the tokens of one place in all frames are normalised, and they attend to each
other. So a block has two attentions, and frames and tokens change places around the first. The one that scores a
frame's tokens is the second; the number of frames is fixed.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer

import export_video
import network
from network import FRAMES, SIZE

sys.path.insert(0, str(Path(__file__).parents[1]))
import build  # noqa: E402
import check  # noqa: E402
import goldens as llava  # noqa: E402
import gz  # noqa: E402
import inputs  # noqa: E402
import record_goldens  # noqa: E402
from cases import merge, recipe  # noqa: E402
from reference.recipe import parse  # noqa: E402
from reference.video_llava import VideoLlava  # noqa: E402

HERE = Path(__file__).parent
SEED = 33
RECIPES = {"merge": recipe(merge(20, 4)), "drop-cls": recipe(merge(12, 3, cls="drop"))}


class TemporalBlock(CLIPEncoderLayer):
    """A block of CLIP's encoder that looks across frames before it looks across a frame."""

    def __init__(self, block: nn.Module, config, frames: int):
        super().__init__(config)
        self.self_attn, self.mlp = block.self_attn, block.mlp
        self.layer_norm1, self.layer_norm2 = block.layer_norm1, block.layer_norm2
        self.frames = frames
        self.temporal_embedding = nn.Parameter(torch.zeros(frames, config.hidden_size))
        self.temporal_layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.temporal_attn = CLIPAttention(config)

    def forward(self, hidden_states: torch.Tensor, attention_mask=None, **kwargs) -> torch.Tensor:
        images, tokens, width = hidden_states.shape
        clips = images // self.frames

        def by_place(x):
            x = x.reshape(clips, self.frames, tokens, width).permute(0, 2, 1, 3)
            return x.reshape(clips * tokens, self.frames, width)

        def by_frame(x):
            x = x.reshape(clips, tokens, self.frames, width).permute(0, 2, 1, 3)
            return x.reshape(images, tokens, width)

        places = by_place(hidden_states) + self.temporal_embedding
        seen, _ = self.temporal_attn(hidden_states=self.temporal_layer_norm1(places), attention_mask=None, **kwargs)
        x = by_frame(places) + by_frame(seen)
        seen, _ = self.self_attn(hidden_states=self.layer_norm1(x), attention_mask=None, **kwargs)
        x = x + seen
        return x + self.mlp(self.layer_norm2(x))


def model(attention: str = "eager"):
    """network.py's model with such a tower for clips."""
    net = network.model(attention)
    tower = net.model.video_tower
    encoder = getattr(tower, "vision_model", tower).encoder
    generator = torch.Generator().manual_seed(SEED)
    config = net.config.vision_config
    config._attn_implementation = attention
    for index, block in enumerate(encoder.layers):
        new = TemporalBlock(block, config, FRAMES)
        with torch.no_grad():
            for key, parameter in sorted(new.named_parameters()):
                if "temporal" in key:
                    drawn = build._draw(key, parameter.shape, generator).bfloat16().float()
                    parameter.copy_(drawn * 0.3 if key == "temporal_embedding" else drawn)
        encoder.layers[index] = new
    return net.eval().requires_grad_(False)


def export(folder: Path) -> None:
    """folder/onnx/video_encoder.onnx: pixel_values_videos [batch, 8, 3, H, W] -> video_features [batch * 8, 82, D]."""
    form = export_video.Form("sdpa", 17, False, joined=False)
    part = export_video.parts(model("sdpa"), form, SIZE)[1]
    clips = torch.randn(2, FRAMES, 3, SIZE.image, SIZE.image, generator=torch.Generator().manual_seed(0))
    part.args, part.axes["pixel_values_videos"] = (clips,), {0: "batch_size"}
    (folder / "onnx").mkdir()
    export_video.llava.export(part, form, folder / "onnx")


def main() -> int:
    out = llava.target(__doc__, HERE)
    net, exact = model(), model().double()
    pixels = record_goldens.pixels("video")
    plain = net.model.get_video_features(torch.from_numpy(pixels), vision_feature_layer=-2).pooler_output
    plain = plain.reshape(1, -1, SIZE.width).numpy()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        export(folder)
        found = export_video.Files(folder).run("video_encoder", {"pixel_values_videos": pixels})[0]
        difference = float(np.abs(found.reshape(plain.shape) - plain).max())
        packed = out / "fixtures" / "temporal" / "video_encoder.onnx.gz"
        packed.parent.mkdir(parents=True, exist_ok=True)
        packed.write_bytes(gz.compressed((folder / "onnx" / "video_encoder.onnx").read_bytes()))
    print(f"features: max |onnx - torch| = {difference:.2e}")
    if not difference < check.TOLERANCE:
        return 1
    tensors, index = {}, []
    for name, passes in RECIPES.items():
        results = []
        for which in (net, exact):
            reference = VideoLlava(which, *parse(passes))
            features, merged = reference.video_features(torch.from_numpy(pixels).to(which.lm_head.weight.dtype))
            chosen = [{"dominant": m.dominant, "anchors": m.anchors, "members": m.members} for m in merged]
            results.append((features.numpy(), chosen, reference.margins.smallest))
        (features, chosen, margin), (_, same, _) = results
        llava.settled(name, chosen, same, margin)
        tensors[name] = features
        index.append({"name": name, "recipe": passes, "smallest_margin": margin, "merged": chosen})
        print(f"{name:9} margin {margin:.1e}")
    unmerged = VideoLlava(net).video_features(torch.from_numpy(pixels))[0].numpy()
    apart = float(np.abs(unmerged - plain).max() / plain.std())
    if not apart < 1e-5:
        raise RuntimeError(f"the reference differs from PyTorch's modules by {apart:.1e} of a standard deviation")
    inputs.save({k: np.ascontiguousarray(v) for k, v in tensors.items()}, out / "goldens" / "temporal.safetensors")
    text = llava.compact({"schema_version": 1, "frames": FRAMES, "cases": index})
    (out / "goldens" / "temporal.json").write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
