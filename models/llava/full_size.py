"""LLaVA-1.5-7B at its true size, with the real graph and no weights: a directory in the transformers.js layout.

    python models/llava/full_size.py --out DIR [--layers 32]

CLIP ViT-L/14-336 and Llama-2-7B's decoder, fp16, as PyTorch's dynamo exporter leaves them at opset 18. Weights are
never written: their data files are sparse, 13 GiB by name and a few MiB on disk (where the file system keeps holes),
and the memory that the script needs is that of the graphs. Everything that reads graphs works on it; running it gives
nothing, because all weights are zero.
"""

import argparse
import shutil
import sys
import warnings
from pathlib import Path

import onnx_ir as ir
import torch
from transformers import LlavaForConditionalGeneration, initialization

import build
import export
from build import Size

VOCABULARY = 32064
# Tensors of at least as many bytes go to the data file.
EXTERNAL = 1024
# As ONNX Runtime maps them: multiples of a page.
PAGE = 4096


def model(layers: int) -> tuple[LlavaForConditionalGeneration, Size]:
    """The classes of llava-hf/llava-1.5-7b-hf with its dimensions; memory is reserved, never touched."""
    size = Size(336, 1024, 4096, 16, 24, 4096, 11008, 32, 32, layers, seed=0)
    cfg = build.config(size)
    cfg.text_config.vocab_size = VOCABULARY
    cfg.vision_config.projection_dim = 768
    with initialization.no_init_weights():
        net = LlavaForConditionalGeneration._from_config(cfg, attn_implementation="sdpa", dtype=torch.float16)
    return net.eval().requires_grad_(False), size


def sparse(model: ir.Model, folder: Path, name: str) -> int:
    """Points every large initializer into a data file of holes; returns the file's size."""
    offset = 0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor.nbytes < EXTERNAL:
            continue
        value.const_value = ir.ExternalTensor(
            name, offset, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=value.name, base_dir=folder
        )
        offset += -(-tensor.nbytes // PAGE) * PAGE
    with open(folder / name, "wb") as file:
        file.truncate(offset)
    return offset


def half(value):
    return value.half() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=32, help="decoder layers")
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    folder = args.out / "onnx"
    folder.mkdir(parents=True)
    net, size = model(args.layers)
    export.configs(net, size, args.out)
    for part in export.parts(net, size):
        arguments = torch.utils._pytree.tree_map(half, part.args)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                part.module.eval(),
                arguments,
                input_names=part.inputs,
                output_names=part.outputs,
                dynamic_shapes=export.nest(part),
                opset_version=18,
                dynamo=True,
                verbose=False,
            )
        graph = program.model
        total = sparse(graph, folder, f"{part.file}.onnx_data")
        proto = ir.to_proto(graph)
        export.clean(proto)
        (folder / f"{part.file}.onnx").write_bytes(proto.SerializeToString())
        print(f"{part.file}: {len(proto.graph.node)} nodes, {total / 2**30:.2f} GiB of data")
    return 0


if __name__ == "__main__":
    sys.exit(main())
