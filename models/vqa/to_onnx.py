"""Exports a trained model with PyTorch's exporter to the transformers.js layout, in half precision.

    python models/vqa/to_onnx.py --model work/llava.pt --out models/vqa/llava [--dtype fp16|fp32]
    python models/vqa/to_onnx.py --model work/film.pt --out models/vqa/film

Of the model for clips, told by its weights, the encoder for pictures is left out: its tower is the same once more.

Weights are rounded to half precision first, so that every precision computes with the same ones; inputs and outputs
stay fp32. The export is compared with PyTorch under ONNX Runtime.
"""

import argparse
import shutil
import sys
from pathlib import Path

import onnx
import torch
from onnxruntime.transformers import float16

import film  # puts llava's and video_llava's scripts on the path
import model
import words
import check  # noqa: E402
import export  # noqa: E402
import export_video  # noqa: E402
import tokens  # noqa: E402


def trained(path: Path, attention: str = "sdpa"):
    """The model in a file of decoder.py or film.py, its weights rounded to half precision and kept in single."""
    saved = torch.load(path)
    make = film.empty if film.is_film(saved["state"]) else model.llava
    net = make(saved["layers"], saved["state"]["lm_head.weight"].shape[0])
    net.load_state_dict({k: v.half().float() if v.is_floating_point() else v for k, v in saved["state"].items()})
    net.set_attn_implementation(attention)
    return net.eval().requires_grad_(False)


def halved(path: Path) -> None:
    found = float16.convert_float_to_float16(onnx.load(path), keep_io_types=True)
    onnx.save_model(found, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", choices=("fp16", "fp32"), default="fp16")
    args = parser.parse_args()
    torch.set_num_threads(2)
    net = trained(args.model)
    layers = net.config.text_config.num_hidden_layers
    tokens.VOCAB = net.config.text_config.vocab_size
    shutil.rmtree(args.out, ignore_errors=True)
    (args.out / "onnx").mkdir(parents=True)
    if film.is_film(net.state_dict()):
        size, form, compare = film.size(layers), export_video.FORMS["ts-sdpa"], export_video.compare
        export_video.configs(net, args.out, size, film.tokenizer())
        parts = export_video.parts(net, form, size)[1:]
    else:
        size, form, compare = model.size(layers), export.Form("vqa", "sdpa", 17, False), check.compare
        export.configs(net, size, args.out)
        tokens.save(args.out, words.tokenizer())
        parts = export.parts(net, size)
    for part in parts:
        export.export(part, form, args.out / "onnx")
        if args.dtype == "fp16":
            halved(args.out / "onnx" / f"{part.file}.onnx")
    differences = compare(args.out, trained(args.model, "eager"), size)
    for what, difference in differences.items():
        print(f"{what:34} max |onnx - torch| = {difference:.2e}")
    limit = check.TOLERANCE if args.dtype == "fp32" else 0.1
    if not max(differences.values()) < limit:
        print(f"expected differences below {limit:.0e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
