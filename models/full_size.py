"""Vision-language models at their true size, with the real graphs and no weights, in the transformers.js layout.

    python models/full_size.py --family llava-1.5 --out DIR [--layers N] [--pack FOLDER]

The classes of Transformers with the dimensions of the published models, fp16, as PyTorch's dynamo exporter leaves
them at opset 18, cut into files by the export scripts of the family's own folder. Weights are never written: their
data files are sparse, 13 GiB by name and a few MiB on disk (where the file system keeps holes), and the memory that
the script needs is that of the graphs. Everything that reads graphs works on it; running it gives nothing, because
all weights are zero. Configs and tokenizer are those of the small models, with the true sizes. `--pack` writes the
graphs alone once more, packed by gzip and without what the exporter notes of each node, with the sizes of their data
files: small enough for a fixture.

| family | tower | decoder |
|---|---|---|
| `llava-1.5` | CLIP ViT-L/14-336, CLS dropped | Llama-2-7B: 32 layers, 4096 wide |
| `llava-narrow` | the same | 14 layers, 2304 wide: 2,000 nodes and 2.6 GB, no published model |
| `video-llava` | two CLIP ViT-L/14-224, one for images, one for frames | the same |
| `llava-next` | CLIP ViT-L/14-336 for each crop | the same (llava-v1.6-vicuna-7b) |
| `llava-next-mistral` | the same | Mistral-7B: 32 layers, 8 key heads (llava-v1.6-mistral-7b) |
| `llava-onevision` | SigLIP so400m/14-384 for each crop, 729 patches | Qwen2-7B: 28 layers, 3584 wide, 4 key heads |
| `qwen2.5-vl` | 32 blocks, full attention in 7, 15, 23, 31, windows of 112 px, groups of 2 x 2 | the same, M-RoPE |
"""

import argparse
import importlib.util
import json
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import onnx
import onnx_ir as ir
import torch
from torch import nn
from transformers import initialization

HERE = Path(__file__).parent
# Tensors of at least as many bytes go to the data file.
EXTERNAL = 1024
# As ONNX Runtime maps them: multiples of a page.
PAGE = 4096
# Resolutions of llava-onevision-qwen2-7b-ov in crops: every grid of up to 6 x 6.
ONEVISION_GRIDS = [[384 * h, 384 * w] for h in range(1, 7) for w in range(1, 7)]


def folders(*names: str) -> None:
    """Puts folders of this directory on the path, the first one first: several have modules of the same name."""
    sys.path[:0] = [str(HERE / name) for name in names]


def bare(kind: type, config) -> nn.Module:
    """A model whose memory is reserved and never touched."""
    with initialization.no_init_weights():
        net = kind._from_config(config, attn_implementation="sdpa", dtype=torch.float16)
    return net.eval().requires_grad_(False)


def load(path: str):
    """A module under a name of its own."""
    spec = importlib.util.spec_from_file_location(path.removesuffix(".py").replace("/", "_"), HERE / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def update(folder: Path, files: dict[str, dict]) -> None:
    """Other values of keys in JSON files."""
    for file, changes in files.items():
        values = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps(values, indent=2) + "\n")


def clip_and_llama(module: ModuleType, image: int, layers: int | None, narrow: bool = False) -> tuple:
    """Size and configuration, by a module with `Size` and `config`, of Llama-2-7B (or something narrower) behind
    CLIP ViT-L/14 for images of so many pixels."""
    width, intermediate, heads, depth = (2304, 5760, 18, 14) if narrow else (4096, 11008, 32, 32)
    size = module.Size(image, 1024, 4096, 16, 24, width, intermediate, heads, heads, layers or depth, seed=0)
    config = module.config(size)
    config.text_config.vocab_size = 32064
    config.vision_config.projection_dim = 768
    return size, config


# Each: (decoder layers or None for the model's own, folder for configs) -> llava's export module, whose `nest` and
# `clean` serve all, and the files to export.


def llava(layers: int | None, out: Path, narrow: bool = False) -> tuple[ModuleType, list]:
    folders("llava")
    import build
    import export
    from transformers import LlavaForConditionalGeneration

    size, config = clip_and_llama(build, 336, layers, narrow)
    net = bare(LlavaForConditionalGeneration, config)
    export.configs(net, size, out)
    return export, export.parts(net, size)


def video_llava(layers: int | None, out: Path) -> tuple[ModuleType, list]:
    folders("video_llava", "llava")
    import export_video
    import network
    from transformers import VideoLlavaForConditionalGeneration

    size, config = clip_and_llama(network, 224, layers)
    net = bare(VideoLlavaForConditionalGeneration, config)
    export_video.configs(net, out, size)
    return export_video.llava, export_video.parts(net, export_video.Form("sdpa", 18, True, joined=False), size)


def crops(name: str, layers: int | None, out: Path, mistral: bool = False) -> tuple[ModuleType, list]:
    sys.path.append(str(HERE / "llava_next"))
    folders("llava", "forms")
    import anyres
    import build
    import transformers

    if name == "llava-next":
        size, _ = clip_and_llama(build, 336, layers)
        if mistral:
            size = replace(size, intermediate=14336, kv_heads=8)
    else:
        size = build.Size(384, 1152, 4304, 16, 26, 3584, 18944, 28, 4, layers or 28, seed=0)
    anyres.SIZES[name] = size
    kind, config = anyres.config(name)
    if mistral:
        text = {k: v for k, v in config.text_config.to_dict().items() if k != "model_type"}
        config.text_config = transformers.MistralConfig(**text | {"sliding_window": None})
    config.text_config.vocab_size = 32064 if name == "llava-next" else 152128
    net = bare(kind, config)
    net.model.image_newline.zero_()
    # The module of llava's own name is loaded already.
    crop = load("llava_next/export.py")
    crop.configs(name, net, out)
    if name == "llava-onevision":
        grids = {"image_grid_pinpoints": ONEVISION_GRIDS}
        aspect = {"vision_aspect_ratio": "anyres_max_9"}
        files = {"config.json": grids | aspect, "preprocessor_config.json": grids, "processor_config.json": aspect}
        update(out, files)
    return crop.llava, crop.parts(name, net)


def qwen(layers: int | None, out: Path) -> tuple[ModuleType, list]:
    folders("qwen_vl")
    import build
    import export
    import transformers
    import vision

    name = "qwen2.5-vl"
    size = build.Size(
        width=3584,
        intermediate=18944,
        heads=28,
        kv_heads=4,
        layers=layers or 28,
        section=(16, 24, 24),
        vision_width=1280,
        vision_intermediate=3420,
        vision_heads=16,
        vision_layers=32,
        full=(7, 15, 23, 31),
        patch=14,
        window=112,
    )
    build.SIZES[name] = size
    config = build.config(name)
    config.text_config.vocab_size = 152064
    net = bare(getattr(transformers, config.architectures[0]), config)
    export.configs(net, name, out)
    # Pixels of an image, as the published models have them.
    update(out, {"preprocessor_config.json": {"size": {"shortest_edge": 3136, "longest_edge": 12845056}}})
    return export.shared, [vision.part(net, export.FORMS["dynamo18"], size), *export.parts(net, size)]


FAMILIES: dict[str, Callable[[int | None, Path], tuple[ModuleType, list]]] = {
    "llava-1.5": llava,
    "llava-narrow": lambda layers, out: llava(layers, out, narrow=True),
    "video-llava": video_llava,
    "llava-next": lambda layers, out: crops("llava-next", layers, out),
    "llava-next-mistral": lambda layers, out: crops("llava-next", layers, out, mistral=True),
    "llava-onevision": lambda layers, out: crops("llava-onevision", layers, out),
    "qwen2.5-vl": qwen,
}


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


def pack(folder: Path, target: Path) -> None:
    """Each graph of `folder` as target/NAME.onnx.gz, and the bytes of the data files in target/data.json."""
    gz = load("llava/gz.py")
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.glob("*.onnx")):
        model = onnx.load(path, load_external_data=False)
        graph = model.graph
        for value in [*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer]:
            del value.metadata_props[:]
        packed = gz.compressed(model.SerializeToString(deterministic=True))
        (target / f"{path.name}.gz").write_bytes(packed)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.onnx_data"))}
    (target / "data.json").write_text(json.dumps(sizes, indent=2) + "\n")


def exported(part, shared: ModuleType, dtype: torch.dtype = torch.float16) -> ir.Model:
    """The graph of one file, with llava's export module for what all have in common."""

    def cast(value):
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            part.module.eval(),
            torch.utils._pytree.tree_map(cast, part.args),
            input_names=part.inputs,
            output_names=part.outputs,
            dynamic_shapes=shared.nest(part),
            opset_version=18,
            dynamo=True,
            verbose=False,
        )
    return program.model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", required=True, choices=list(FAMILIES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, help="decoder layers, if not as many as the model has")
    parser.add_argument("--pack", type=Path, metavar="FOLDER", help="write the graphs there too, packed")
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    folder = args.out / "onnx"
    folder.mkdir(parents=True)
    shared, parts = FAMILIES[args.family](args.layers, args.out)
    for part in parts:
        began = time.monotonic()
        graph = exported(part, shared)
        total = sparse(graph, folder, f"{part.file}.onnx_data")
        proto = ir.to_proto(graph)
        shared.clean(proto)
        (folder / f"{part.file}.onnx").write_bytes(proto.SerializeToString())
        took = time.monotonic() - began
        print(f"{part.file}: {len(proto.graph.node)} nodes, {total / 2**30:.2f} GiB of data, {took:.0f} s")
    if args.pack:
        pack(folder, args.pack)
    return 0


if __name__ == "__main__":
    sys.exit(main())
