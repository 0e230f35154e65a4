"""Exports a trained model with PyTorch's exporter to the transformers.js layout, in half precision.

    python models/vqa/to_onnx.py --model work/llava.pt --out models/vqa/fixtures/llava [--dtype fp16|fp32]

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

import model
import words  # puts llava's scripts on the path
import check  # noqa: E402
import export  # noqa: E402
import tokens  # noqa: E402


def trained(path: Path, attention: str = "sdpa"):
    """The model in a file of decoder.py, its weights rounded to half precision and kept in single."""
    saved = torch.load(path)
    net = model.llava(saved["layers"], saved["state"]["lm_head.weight"].shape[0])
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
    tokens.VOCAB = words.Texts().tok.get_vocab_size()
    net = trained(args.model)
    size = model.size(net.config.text_config.num_hidden_layers)
    shutil.rmtree(args.out, ignore_errors=True)
    (args.out / "onnx").mkdir(parents=True)
    export.configs(net, size, args.out)
    tokens.save(args.out, words.tokenizer())
    for part in export.parts(net, size):
        export.export(part, export.Form("vqa", "sdpa", 17, False), args.out / "onnx")
        if args.dtype == "fp16":
            halved(args.out / "onnx" / f"{part.file}.onnx")
    differences = check.compare(args.out, trained(args.model, "eager"), size)
    for what, difference in differences.items():
        print(f"{what:34} max |onnx - torch| = {difference:.2e}")
    limit = check.TOLERANCE if args.dtype == "fp32" else 0.1
    if not max(differences.values()) < limit:
        print(f"expected differences below {limit:.0e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
