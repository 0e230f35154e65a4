"""Exports Qwen's vision towers in the forms that people have, and compares each with Transformers' own tower.

    python models/qwen_vl/vision_forms.py [--out models/qwen_vl/fixtures] [NAME ...]

Every NAME of FORMS becomes a directory with onnx/vision_encoder.onnx.gz (`models/README.md` says who makes files
like these, and with what). Weights are those of build.py, so the goldens of merge_goldens.py are right for all forms of
one tower. `t449-…` need Transformers 4.49 (requirements-4.49.txt) and are made there alone; everything else is made
with requirements.txt.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
import transformers
from torch import nn

import build
from build import SIZE, sibling

import gz

shared = sibling("export")

FIXTURES = Path(__file__).parent / "fixtures"
# Frames, rows and columns in patches, of one image or of several in one call.
GRIDS = ([(1, 8, 8)], [(1, 10, 6)], [(1, 2, 14)], [(1, 4, 4)], [(2, 6, 10)], [(1, 20, 26)], [(1, 2, 2)])
IMAGES = [g for g in GRIDS if g[0][0] == 1]
EQUAL = ([(1, 6, 10)] * 2, [(1, 8, 8)] * 3)
FIXED = (1, 10, 14)
WIDTH = 3 * 2 * SIZE.patch**2


class Fixed(nn.Module):
    """Transformers' own tower for one grid: what the grid decides is Python numbers to the tracer."""

    def __init__(self, net):
        super().__init__()
        self.tower = build.tower(net)
        self.grid = torch.tensor([FIXED])

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.tower(pixel_values, self.grid).pooler_output


def write(module, path: Path, opset: int, dynamo: bool, grid_name: str | None = "image_grid_thw", images: int = 1):
    """Exports `module` as one file; without a `grid_name` it is for one grid. Several `images` mean any number."""
    pixels = torch.randn(images * int(np.prod(FIXED)), WIDTH, generator=torch.Generator().manual_seed(0))
    given, names, axes = (pixels,), ["pixel_values"], {"pixel_values": {}, "image_features": {}}
    if grid_name is not None:
        given, names = (pixels, torch.tensor([FIXED] * images)), [*names, grid_name]
        axes = {"pixel_values": {0: "num_patches"}, "image_features": {0: "num_tokens"}}
        axes[grid_name] = {0: "num_images"} if images > 1 else {}
    part = shared.Part(path.stem, module, given, names, ["image_features"], axes)
    shared.export(part, shared.Form("", "", opset, dynamo), path.parent)


def any_grid(make: Callable, attention: str, opset: int, dynamo: bool) -> Callable:
    def run(path: Path) -> None:
        from vision import Vision

        write(Vision(make(attention), attention == "eager"), path, opset, dynamo)

    return run


def fixed(path: Path) -> None:
    write(Fixed(build.model(attention="eager")), path, 17, False, None)


def older(attention: str, opset: int) -> Callable:
    def run(path: Path) -> None:
        # The names that transformers.js has for Qwen2-VL.
        module = build.tower(build.qwen2(attention))
        write(module, path, opset, False, "grid_thw")

    return run


def genai(level: ort.GraphOptimizationLevel) -> Callable:
    def run(path: Path) -> None:
        import genai_vision

        write(genai_vision.Packed(build.model(), False), path, genai_vision.OPSET, True, images=2)
        model = onnx.load(path)
        genai_vision.surgery(model)
        onnx.save_model(model, path)
        genai_vision.optimised(str(path), str(path), level)
        model = onnx.load(path)
        genai_vision.products(model)
        onnx.save_model(model, path)

    return run


def converted(source: str, kind: str) -> Callable:
    def run(path: Path) -> None:
        FORMS[source].make(path)
        sys.path.append(str(Path(__file__).parents[1] / "forms"))
        precisions = sibling("precisions")
        match kind:
            case "fp16":
                precisions.half(path, path, False)
            case "fp16io":
                precisions.half(path, path, True)
            case "int8":
                precisions.quantize_dynamic(str(path), str(path), weight_type=precisions.QuantType.QInt8)
            case "int4":
                onnx.save_model(precisions.four_bits(path), path)

    return run


@dataclass(frozen=True)
class Form:
    make: Callable[[Path], None]
    net: Callable
    grids: tuple = GRIDS
    # Largest absolute difference of features; None where weights are rounded, and only its size is said.
    tolerance: float | None = 2e-5
    version: str = "5."


BASIC, EXTENDED = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC, ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
FORMS = {
    "vision-ts-sdpa": Form(any_grid(lambda a: build.model(attention=a), "sdpa", 17, False), build.model),
    "vision-dynamo18": Form(any_grid(lambda a: build.model(attention=a), "sdpa", 18, True), build.model),
    "vision-fixed-ts-eager": Form(fixed, build.model, ([FIXED],)),
    "vision-genai": Form(genai(BASIC), build.model, (*GRIDS, *EQUAL)),
    "vision-genai-extended": Form(genai(EXTENDED), build.model, (*GRIDS, *EQUAL)),
    "vision-genai-int4": Form(converted("vision-genai", "int4"), build.model, (*GRIDS, *EQUAL), None),
    "vision-fp16": Form(converted("vision-dynamo18", "fp16"), build.model, GRIDS, 2e-2),
    # quantize_dynamic does not take the dynamo form: its shape inference disagrees with what the file says.
    "vision-int8": Form(converted("vision-ts-sdpa", "int8"), build.model, GRIDS, None),
    "vision-qwen2-ts-sdpa": Form(any_grid(build.qwen2, "sdpa", 17, False), build.qwen2),
    "vision-qwen2-ts-eager": Form(any_grid(build.qwen2, "eager", 14, False), build.qwen2),
    "vision-qwen2-dynamo18": Form(any_grid(build.qwen2, "sdpa", 18, True), build.qwen2),
    # Its mask is filled for as many frames as the example has.
    "t449-qwen2-sdpa": Form(older("sdpa", 14), build.qwen2, IMAGES, version="4.49"),
    "t449-qwen2-eager": Form(older("eager", 17), build.qwen2, IMAGES, version="4.49"),
}
# Written only when asked for by name: second forms of what another has.
SPARE = (
    "vision-dynamo18",
    "vision-genai-extended",
    "vision-qwen2-ts-eager",
    "vision-qwen2-dynamo18",
    "t449-qwen2-eager",
)


def compare(path: Path, net, grids) -> tuple[float, float]:
    """Largest absolute difference of features from Transformers' tower, and the features' standard deviation."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 2
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    half = session.get_inputs()[0].type == "tensor(float16)"
    tower, worst, every = build.tower(net), 0.0, []
    for seed, images in enumerate(grids):
        pixels = torch.randn(sum(map(np.prod, images)), WIDTH, generator=torch.Generator().manual_seed(seed))
        thw = torch.tensor(images)
        with torch.no_grad():
            want = tower(pixels, thw)
        want = getattr(want, "pooler_output", want).numpy()
        values = (pixels.numpy().astype(np.float16 if half else np.float32), thw.numpy())
        feed = {i.name: v for i, v in zip(session.get_inputs(), values)}
        found = session.run(None, feed)[0].astype(np.float32)
        if found.shape != want.shape:
            raise RuntimeError(f"{path}: {found.shape} for {images}, expected {want.shape}")
        difference = float(np.abs(found - want).max())
        worst = max(worst, difference if difference == difference else float("inf"))
        every.append(want)
    return worst, float(np.concatenate(every).std())


def main() -> int:
    here = transformers.__version__
    able = [n for n, form in FORMS.items() if here.startswith(form.version)]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FIXTURES)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(FORMS))
    args = parser.parse_args()
    names = args.names or [n for n in able if n not in SPARE]
    if unknown := [n for n in names if n not in able]:
        parser.error(f"{', '.join(unknown)}: expected some of {', '.join(able)} with Transformers {here}")
    torch.set_num_threads(2)
    good = True
    for name in names:
        form, folder = FORMS[name], args.out / name
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "vision_encoder.onnx"
            form.make(path)
            difference, size = compare(path, form.net(), form.grids)
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "onnx").mkdir(parents=True)
            packed = gz.compressed(path.read_bytes())
            (folder / "onnx" / "vision_encoder.onnx.gz").write_bytes(packed)
        print(
            f"{name:22} {len(form.grids)} calls: max |onnx - torch| = {difference:.1e} "
            f"(features have a standard deviation of {size:.2f}); {len(packed) / 1024:.0f} KiB"
        )
        good &= difference < (form.tolerance or size)
    if not good:
        print("a form differs from Transformers' tower by more than it may", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
