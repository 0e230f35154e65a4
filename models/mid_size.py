"""A LLaVA-1.5 of half a billion parameters in its decoder, to measure speed on: real widths, random weights, fp32.

    python models/mid_size.py --out DIR [--layers N] [--vision-layers N]

CLIP ViT-L/14-336's geometry (577 tokens, 1024 wide; fewer blocks) in front of a Llama decoder of 24 layers, 1280
wide, ten heads of 128 as in Llama-2, the vocabulary of LLaVA. Everything is exported as `full_size.py` does it
(PyTorch's dynamo exporter, opset 18, the transformers.js layout), but the weights are there: drawn from a seed by
`llava/build.py`, so that attention is far from uniform. The same command gives the same bytes. 3 GB on disk, 7 GB
of memory.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

import onnx
import onnx_ir as ir
import torch

import full_size

VOCAB = 32064


def size_of(layers: int, vision_layers: int):
    """Dimensions, by llava's build module; one more block for the last one, which LLaVA never reads."""
    full_size.folders("llava")
    import build

    return build.Size(336, 1024, 4096, 16, vision_layers + 1, 1280, 3456, 10, 10, layers, seed=17)


def model(size):
    """The model in PyTorch, with the weights that its export has."""
    import build
    from transformers import LlavaForConditionalGeneration, initialization

    config = build.config(size)
    config.text_config.vocab_size = VOCAB
    with initialization.no_init_weights():
        net = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    build.fill(net.float(), size.seed)
    return net.eval().requires_grad_(False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=24, help="decoder layers (default: 24)")
    parser.add_argument("--vision-layers", type=int, default=12, help="blocks that features depend on (default: 12)")
    args = parser.parse_args()
    size = size_of(args.layers, args.vision_layers)
    import export

    shutil.rmtree(args.out, ignore_errors=True)
    folder = args.out / "onnx"
    folder.mkdir(parents=True)
    began = time.monotonic()
    net = model(size)
    print(f"weights drawn in {time.monotonic() - began:.0f} s")
    export.configs(net, size, args.out)
    for part in export.parts(net, size):
        began = time.monotonic()
        path, data = folder / f"{part.file}.onnx", folder / f"{part.file}.onnx_data"
        graph = full_size.exported(part, export, torch.float32)
        ir.save(graph, path, external_data=data.name, size_threshold_bytes=full_size.EXTERNAL)
        proto = onnx.load(path, load_external_data=False)
        export.clean(proto)
        path.write_bytes(proto.SerializeToString(deterministic=True))
        took = time.monotonic() - began
        print(f"{part.file}: {len(proto.graph.node)} nodes, {data.stat().st_size / 2**30:.2f} GiB of data, {took:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
