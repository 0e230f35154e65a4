"""Records what the PyTorch reference gives for LLaVA-NeXT and LLaVA-OneVision.

    python models/llava_next/goldens.py [--out models/llava_next/goldens] [SET ...]

As models/llava/goldens.py, with images of several crops. OUT/SET/pixels.safetensors.gz holds, for each picture, the
8-bit crops [crops, 3, H, W] that Transformers' image processor makes (before rescaling and normalising) and, under
NAME.size, height and width of the picture that they were made of. The pictures `street` and `shapes` are the files of
models/llava/images; `small` and `wide` are the upper left 84 x 70 and 400 x 110 (width x height) of `street`.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "llava"))
sys.path.insert(0, str(HERE.parent))

import inputs  # noqa: E402


# Before anyres, which puts models/forms first, where another goldens.py lies.
import goldens as recorder  # noqa: E402
import anyres  # noqa: E402
import tokens  # noqa: E402
from anyres_cases import CASES  # noqa: E402
from reference.anyres import AnyRes, Picture  # noqa: E402

GOLDENS = HERE / "goldens"


def originals() -> dict[str, Image.Image]:
    street = Image.open(inputs.IMAGES / "street.png").convert("RGB")
    return {
        "street": street,
        "shapes": Image.open(inputs.IMAGES / "shapes.png").convert("RGB"),
        "small": street.crop((0, 0, 84, 70)),
        "wide": street.crop((0, 0, 400, 110)),
    }


def processor(name: str):
    edge = anyres.SIZES[name].image
    square = {"height": edge, "width": edge}
    if name == "llava-next":
        return LlavaNextImageProcessorPil(
            size={"shortest_edge": edge}, crop_size=square, image_grid_pinpoints=anyres.pinpoints(name)
        )
    half = [0.5, 0.5, 0.5]
    return LlavaOnevisionImageProcessorPil(
        size=square, image_grid_pinpoints=anyres.pinpoints(name), image_mean=half, image_std=half
    )


def prepared(name: str) -> tuple[dict[str, Picture], dict[str, np.ndarray]]:
    """Pictures by name with their pixel values in double precision, and what is written of them."""
    made = processor(name)
    mean, std = (np.array(v)[:, None, None] for v in (made.image_mean, made.image_std))
    pictures, stored = {}, {}
    for key, image in originals().items():
        values = made(image, return_tensors="np")["pixel_values"][0]
        raw = made(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
        crops = ((raw.astype(np.float64) * (1 / 255) - mean) / std).astype(np.float32)
        if np.abs(crops - values).max() > 1e-5:
            raise RuntimeError(f"{name}, {key}: normalising the 8-bit crops does not give the pixel values")
        stored[key] = np.ascontiguousarray(raw.astype(np.uint8))
        stored[f"{key}.size"] = np.array([image.height, image.width], np.int64)
        pictures[key] = Picture(torch.from_numpy(crops), (image.height, image.width))
    return pictures, stored


def images(pictures: dict[str, Picture], names: list[str], dtype: torch.dtype) -> list[Picture]:
    return [Picture(pictures[n].crops.to(dtype), pictures[n].size) for n in names]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=GOLDENS)
    parser.add_argument("names", nargs="*", default=list(anyres.SIZES), metavar="SET", help=", ".join(anyres.SIZES))
    args = parser.parse_args()
    unknown = [n for n in args.names if n not in anyres.SIZES]
    if unknown:
        parser.error(f"unknown {', '.join(unknown)}; expected some of {', '.join(anyres.SIZES)}")
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    for name in args.names:
        (args.out / name).mkdir(parents=True, exist_ok=True)
        pictures, stored = prepared(name)
        recorder.record(
            name,
            CASES,
            args.out,
            anyres.model,
            anyres.SIZES[name],
            pictures=pictures,
            pixels="pixels.safetensors.gz",
            kind=AnyRes,
            images=images,
        )
        inputs.save(stored, args.out / name / "pixels.safetensors.gz")
    return 0


if __name__ == "__main__":
    sys.exit(main())
