"""What other exporters and other versions of them make of the models of llava/build.py.

    python models/forms/exporters.py [--out DIR] [NAME ...]

- `dynamo24-*`: opset 24.
- `t457-*`: Transformers 4.57, made when the script runs where that is installed (requirements-4.57.txt). Its
  mask functions need torch.vmap, which TorchScript cannot trace: for that exporter Optimum's replacements are
  registered, as Optimum does.
- `osc-t457-*`: those after onnxscript's `optimize_for_ort`, which makes GroupQueryAttention of five of the eight
  layers of these (of Transformers 5's it makes MultiHeadAttention, see ort_optimised.py).
- `split-*`: `decoder_model` without a cache and `decoder_with_past_model`, as older Optimum published them.
- `if-*`: those two merged by Optimum's `merge_decoders` into one `If` on `use_cache_branch`
  (requirements-4.57.txt as well; it refuses dynamo's files, whose branches have different shapes).
- `vlm-*`: the whole model in one file, (input_ids, pixel_values, attention_mask) -> logits, no cache. The class
  of Transformers splits features into a Python list of images, so their number is that of the example: one.
  `vlm-batch-*`: the same pieces put together by masked_scatter, for any number.
- `function-*`: every node of the decoder of a fixture in a model-local function. No exporter of today writes
  one, so this is planted: the graph is moved as it is, weights becoming inputs of the function.
"""

import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper
from torch import nn
from transformers.cache_utils import DynamicCache

import common
import export
import ort_optimised
import variants
from common import FIXTURES, tokens
from export import Form

T4 = version("transformers").startswith("4.")


def _optimum() -> bool:
    try:
        return bool(version("optimum-onnx"))
    except PackageNotFoundError:
        return False


NEW = {
    "dynamo24-mha": Form("mha", "sdpa", 24, True),
    "dynamo24-gqa": Form("gqa", "sdpa", 24, True),
    "dynamo18-eager-gqa": Form("gqa", "eager", 18, True),
    "dynamo23-eager-mha": Form("mha", "eager", 23, True),
    "split-ts-sdpa-gqa": Form("gqa", "sdpa", 17, False),
    "split-ts-eager-mha": Form("mha", "eager", 14, False),
    "split-dynamo18-mha": Form("mha", "sdpa", 18, True),
    "vlm-ts-sdpa-mha": Form("mha", "sdpa", 17, False),
    "vlm-ts-eager-gqa": Form("gqa", "eager", 14, False),
    "vlm-dynamo18-mha": Form("mha", "sdpa", 18, True),
    "vlm-batch-ts-sdpa-gqa": Form("gqa", "sdpa", 17, False),
    "vlm-batch-ts-eager-mha": Form("mha", "eager", 17, False),
    "vlm-batch-dynamo18-gqa": Form("gqa", "sdpa", 18, True),
    "vlm-batch-dynamo23-mha": Form("mha", "sdpa", 23, True),
}
OLD = {
    "t457-ts-sdpa-mha": Form("mha", "sdpa", 17, False),
    "t457-ts-eager-gqa": Form("gqa", "eager", 14, False),
    "t457-dynamo18-gqa": Form("gqa", "sdpa", 18, True),
    "t457-dynamo23-mha": Form("mha", "eager", 23, True),
    "osc-t457-dynamo18-gqa": Form("gqa16", "sdpa", 18, True),
    "osc-t457-dynamo18-mha": Form("mha16", "sdpa", 18, True),
}
MERGED = {
    "if-ts-sdpa-gqa": Form("gqa", "sdpa", 17, False),
    "if-ts-eager-mha": Form("mha", "eager", 14, False),
}
PLANTED = {"function-ts-sdpa-gqa": "ts-sdpa-gqa", "function-dynamo18-mha": "dynamo18-mha"}


# Why some forms are only run with a batch of one.
ONE_ROW = {
    "vlm-batch-dynamo23-mha": "batch 1 only: ONNX Runtime wants a row of cosines for each row of the batch, "
    "the exporter writes one for all",
}


class First(nn.Module):
    """The decoder without a cache to start from."""

    def __init__(self, net):
        super().__init__()
        self.decoder, self.head = net.model.language_model, net.lm_head

    def forward(self, inputs_embeds, attention_mask, position_ids):
        out = self.decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=DynamicCache(),
            use_cache=True,
        )
        flat = [t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)]
        return self.head(out.last_hidden_state), *flat


class Whole(nn.Module):
    """(input_ids, pixel_values, attention_mask) -> logits of every position."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, input_ids, pixel_values, attention_mask):
        return self.net(
            input_ids=input_ids, pixel_values=pixel_values, attention_mask=attention_mask, use_cache=False
        ).logits


class Pieces(nn.Module):
    """As Whole, for any number of images: features take the places of the placeholders in their order."""

    def __init__(self, net):
        super().__init__()
        self.vision = export.VisionEncoder(net)
        self.embed = net.get_input_embeddings()
        self.decoder, self.head = net.model.language_model, net.lm_head

    def forward(self, input_ids, pixel_values, attention_mask):
        places = (input_ids == tokens.IMAGE).unsqueeze(-1)
        embeds = self.embed(input_ids).masked_scatter(places, self.vision(pixel_values))
        out = self.decoder(inputs_embeds=embeds, attention_mask=attention_mask, use_cache=False)
        return self.head(out.last_hidden_state)


def split(parts: list[export.Part], net) -> list[export.Part]:
    """The decoder as two files: without and with a cache."""
    *rest, decoder = parts
    embeds, mask, positions, cache = decoder.args
    axes = dict(decoder.axes)
    first = export.Part(
        "decoder_model",
        First(net),
        # The first row padded, as in the other exports; its length is the sequence's.
        (embeds, mask[:, -embeds.shape[1] :].clone().index_fill_(1, torch.tensor([0]), 1), positions),
        decoder.inputs[:3],
        decoder.outputs,
        {
            **{k: axes[k] for k in (*decoder.inputs[:3], *decoder.outputs)},
            "attention_mask": axes["inputs_embeds"],
            **{k: {0: "batch_size", 2: "sequence_length"} for k in decoder.outputs[1:]},
        },
    )
    first.args[1][0, 0] = 0
    decoder.file = "decoder_with_past_model"
    return [*rest, first, decoder]


def whole(net, size, batches: bool) -> export.Part:
    generator = torch.Generator().manual_seed(0)
    batch, text = 2 if batches else 1, 6
    ids = torch.randint(5, tokens.VOCAB, (batch, text + size.patches), generator=generator)
    ids[:, 3 : 3 + size.patches] = tokens.IMAGE
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    axes = {0: "batch_size", 1: "sequence_length"} if batches else {1: "sequence_length"}
    return export.Part(
        "model",
        Pieces(net) if batches else Whole(net),
        (ids, torch.randn(batch, 3, size.image, size.image, generator=generator), mask),
        ["input_ids", "pixel_values", "attention_mask"],
        ["logits"],
        {
            "input_ids": axes,
            "pixel_values": {0: "batch_size"} if batches else {},
            "attention_mask": axes,
            "logits": axes,
        },
    )


def lean(path: Path) -> None:
    """Removes the module names that dynamo writes beside every node: two thirds of these nodes' bytes."""
    model = onnx.load(path)
    for element in (*model.graph.node, *model.graph.value_info):
        del element.metadata_props[:]
    onnx.save_model(model, path)


def merge(folder: Path) -> None:
    """Optimum's merge of the two decoder files, in place of them."""
    from optimum.onnx import merge_decoders

    first, later = (folder / f"{stem}.onnx" for stem in ("decoder_model", "decoder_with_past_model"))
    # Older exports, which these stand for, had no strict check of names.
    merge_decoders(str(first), str(later), save_path=str(folder / "decoder_model_merged.onnx"), strict=False)
    for path in (first, later):
        path.unlink()


def plant(source: Path, target: Path) -> None:
    """Writes the model at `source` with all of its nodes in one model-local function."""
    model = onnx.load(source)
    graph = model.graph
    weights = [t.name for t in graph.initializer]
    inputs = [i.name for i in graph.input if i.name not in weights]
    outputs = [o.name for o in graph.output]
    body = helper.make_function(
        "models.llava", "Decoder", [*inputs, *weights], outputs, list(graph.node), list(model.opset_import)
    )
    del graph.node[:], graph.value_info[:]
    call = helper.make_node("Decoder", [*inputs, *weights], outputs, name="decoder", domain="models.llava")
    graph.node.append(call)
    model.functions.append(body)
    model.opset_import.append(helper.make_opsetid("models.llava", 1))
    # Functions came with IR version 8.
    model.ir_version = max(model.ir_version, 8)
    onnx.save_model(model, target)


def measure_whole(folder: Path, net, size) -> dict[str, float]:
    run = common.session(next(folder.rglob("model.onnx")))
    result = {}
    batches = (1, 2) if isinstance(run.get_inputs()[0].shape[0], str) else (1,)
    for batch in (1,) if folder.name in ONE_ROW else batches:
        rng = np.random.default_rng(batch)
        ids = rng.integers(5, tokens.VOCAB, (batch, 12 + size.patches))
        ids[:, 5 : 5 + size.patches] = tokens.IMAGE
        mask = np.ones_like(ids)
        if batch > 1:
            mask[0, :2] = 0
        pixels = rng.standard_normal((batch, 3, size.image, size.image)).astype(np.float32)
        feed = {"input_ids": ids, "pixel_values": pixels, "attention_mask": mask}
        with torch.no_grad():
            want = Whole(net)(*(torch.from_numpy(feed[k]) for k in ("input_ids", "pixel_values", "attention_mask")))
        result[f"batch {batch} logits"] = common.apart(run.run(None, feed)[0], want.numpy(), mask == 1)
    return result


def without_vmap() -> None:
    from optimum.exporters.onnx import model_patcher
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    ALL_MASK_ATTENTION_FUNCTIONS.register("sdpa", model_patcher.sdpa_mask_without_vmap)
    ALL_MASK_ATTENTION_FUNCTIONS.register("eager", model_patcher.eager_mask_without_vmap)


def measure_grouped(folder: Path, net, size) -> dict[str, float]:
    """GroupQueryAttention is neither padded on the left nor continued by several tokens in a batch."""
    return common.measure(folder, net, size, {1: common.STEPS, 2: (1, 1)}, padded=False)


def make(name: str, form: Form, folder: Path) -> str:
    size, net = variants.size_of(form.model), variants.model(form.model, form.attention)
    if T4 and not form.dynamo:
        without_vmap()
    tool = f"{'dynamo' if form.dynamo else 'TorchScript'} opset {form.opset}, {form.attention}"
    how = f"{form.model}, Transformers {version('transformers')}, PyTorch {version('torch').split('+')[0]} {tool}"
    if name.startswith("vlm-"):
        export.export(whole(net, size, name.startswith("vlm-batch")), form, folder)
        lean(folder / "model.onnx")
        return f"{how}, one file"
    parts = variants.parts(form.model, net)
    if name.startswith(("split-", "if-")):
        parts = split(parts, net)
        how += ", two decoders"
    for part in parts:
        export.export(part, form, folder)
    if name.startswith("osc-"):
        for path in sorted(folder.glob("*.onnx")):
            ort_optimised.rewritten(path, path)
        how += f", onnxscript {version('onnxscript')} optimize_for_ort"
    if name.startswith("if-"):
        merge(folder)
        how += f", merge_decoders of optimum-onnx {version('optimum-onnx')}"
    return how


def main() -> int:
    available = {**(OLD if T4 else {**NEW, **PLANTED}), **(MERGED if _optimum() else {})}
    args = common.arguments(__doc__, available)
    good = True
    for name in args.names:
        form = available[name]
        source = form if isinstance(form, str) else None
        model = source.rsplit("-", 1)[1] if source else form.model
        size = variants.size_of(model)
        folder = common.begin(args.out, name, source)
        try:
            if source:
                how = f"{source}, its decoder moved into a model-local function"
                for stem in ("vision_encoder", "embed_tokens"):
                    shutil.copyfile(FIXTURES / source / "onnx" / f"{stem}.onnx", folder / "onnx" / f"{stem}.onnx")
                stem = "decoder_model_merged.onnx"
                plant(FIXTURES / source / "onnx" / stem, folder / "onnx" / stem)
            else:
                export.configs(variants.model(model), size, folder)
                how = make(name, form, folder / "onnx")
        except Exception as error:
            # That an exporter fails on a model is a result.
            common.not_made(args.out, name, f"{form}", error)
            continue
        net = variants.model(model)
        test = measure_whole if name.startswith("vlm-") else measure_grouped if "osc-" in name else common.measure
        good &= common.record(
            args.out, name, how, lambda: test(args.out / name, net, size), 1e-4, ONE_ROW.get(name, "")
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
