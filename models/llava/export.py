"""Exports the models of build.py with PyTorch's two exporters to the transformers.js layout.

    python models/llava/export.py [--out models/llava/fixtures] [NAME ...]

Every NAME of FORMS becomes a directory with the configs, a tokenizer and onnx/{vision_encoder,
embed_tokens,decoder_model_merged}.onnx; each triple is then compared with the PyTorch model under ONNX
Runtime, and the command fails if they differ.
"""

import argparse
import json
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration
from transformers.cache_utils import DynamicCache

import build
import check
import tokens
from build import SIZES, Size

FIXTURES = Path(__file__).parent / "fixtures"


@dataclass(frozen=True)
class Form:
    """One way of exporting one model."""

    model: str
    attention: str
    opset: int
    dynamo: bool
    external: bool = False


FORMS = {
    "ts-eager-mha": Form("mha", "eager", 17, False),
    "ts-eager-gqa": Form("gqa", "eager", 14, False),
    "ts-sdpa-mha": Form("mha", "sdpa", 17, False),
    "ts-sdpa-gqa": Form("gqa", "sdpa", 17, False),
    "dynamo18-mha": Form("mha", "sdpa", 18, True),
    "dynamo18-gqa": Form("gqa", "sdpa", 18, True, external=True),
    "dynamo23-mha": Form("mha", "sdpa", 23, True),
    "dynamo23-gqa": Form("gqa", "sdpa", 23, True),
    "demo": Form("demo", "sdpa", 17, False),
}


class VisionEncoder(nn.Module):
    """pixel_values [batch, 3, H, W] -> image_features [batch, N, D], the projector included."""

    def __init__(self, net: LlavaForConditionalGeneration):
        super().__init__()
        self.tower = net.model.vision_tower
        self.projector = net.model.multi_modal_projector
        self.layer = net.config.vision_feature_layer

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        states = self.tower(pixel_values, output_hidden_states=True).hidden_states
        return self.projector(states[self.layer][:, 1:])


class EmbedTokens(nn.Module):
    """input_ids [batch, sequence] -> inputs_embeds [batch, sequence, D]."""

    def __init__(self, net: LlavaForConditionalGeneration):
        super().__init__()
        self.embed = net.get_input_embeddings()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed(input_ids)


class Decoder(nn.Module):
    """inputs_embeds, attention_mask, position_ids and a flat cache -> logits and a flat cache."""

    def __init__(self, net: LlavaForConditionalGeneration):
        super().__init__()
        self.decoder = net.model.language_model
        self.head = net.lm_head

    def forward(self, inputs_embeds, attention_mask, position_ids, past_key_values):
        pairs = list(zip(past_key_values[::2], past_key_values[1::2]))
        out = self.decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=DynamicCache(pairs),
            use_cache=True,
        )
        flat = [t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)]
        return self.head(out.last_hidden_state), *flat


def cache_names(stem: str, layers: int) -> list[str]:
    return [f"{stem}.{i}.{part}" for i in range(layers) for part in ("key", "value")]


@dataclass
class Part:
    """One file to export: the module, example inputs, names and dynamic dimensions."""

    file: str
    module: nn.Module
    args: tuple
    inputs: list[str]
    outputs: list[str]
    axes: dict[str, dict[int, str]]


def parts(net: LlavaForConditionalGeneration, size: Size) -> list[Part]:
    g = torch.Generator().manual_seed(0)
    return [
        Part(
            "vision_encoder",
            VisionEncoder(net),
            (torch.randn(2, 3, size.image, size.image, generator=g),),
            ["pixel_values"],
            ["image_features"],
            {"pixel_values": {0: "batch_size"}, "image_features": {0: "batch_size"}},
        ),
        *language_parts(net, size),
    ]


def language_parts(net, size: Size) -> list[Part]:
    """Embedding and decoder of `net`, whatever its towers are."""
    g = torch.Generator().manual_seed(1)
    batch, seq, past = 2, 5, 3
    cache = [
        torch.randn(batch, size.kv_heads, past, size.width // size.heads, generator=g) for _ in range(2 * size.layers)
    ]
    seq_axes = {0: "batch_size", 1: "sequence_length"}
    names = cache_names("past_key_values", size.layers)
    presents = cache_names("present", size.layers)
    return [
        Part(
            "embed_tokens",
            EmbedTokens(net),
            (torch.randint(5, tokens.VOCAB, (batch, seq), generator=g),),
            ["input_ids"],
            ["inputs_embeds"],
            {"input_ids": seq_axes, "inputs_embeds": seq_axes},
        ),
        Part(
            "decoder_model_merged",
            Decoder(net),
            (
                torch.randn(batch, seq, size.width, generator=g),
                # A padded row keeps the tracer from concluding that the mask may be skipped.
                torch.tensor([[0] + [1] * (past + seq - 1), [1] * (past + seq)]),
                torch.arange(past, past + seq).repeat(batch, 1),
                cache,
            ),
            ["inputs_embeds", "attention_mask", "position_ids", *names],
            ["logits", *presents],
            {
                "inputs_embeds": seq_axes,
                "attention_mask": {0: "batch_size", 1: "total_sequence_length"},
                "position_ids": seq_axes,
                **{n: {0: "batch_size", 2: "past_sequence_length"} for n in names},
                "logits": seq_axes,
                **{n: {0: "batch_size", 2: "total_sequence_length"} for n in presents},
            },
        ),
    ]


def nest(part: Part) -> list:
    """The input axes in the nesting of `part.args`, as the dynamo exporter wants them."""
    flat = [part.axes[n] for n in part.inputs]
    if any(isinstance(a, list) for a in part.args):
        return [*flat[: len(part.args) - 1], flat[len(part.args) - 1 :]]
    return flat


def clean(model: onnx.ModelProto) -> None:
    """Removes stack traces, which hold paths of the exporting machine, and the FX text of every node.

    The latter is as large as the weights of models this small. Other metadata stays: a rewrite has to
    carry it over.
    """

    def nodes(graph: onnx.GraphProto):
        for node in graph.node:
            yield node
            for attribute in node.attribute:
                for sub in [attribute.g, *attribute.graphs]:
                    yield from nodes(sub)

    every = list(nodes(model.graph)) + [n for f in model.functions for n in f.node]
    for node in every:
        node.doc_string = ""
        kept = [(p.key, p.value) for p in node.metadata_props if not p.key.endswith(("stack_trace", "fx_node"))]
        del node.metadata_props[:]
        for key, value in kept:
            node.metadata_props.add(key=key, value=value)


def export(part: Part, form: Form, folder: Path) -> None:
    path = folder / f"{part.file}.onnx"
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if form.dynamo:
            torch.onnx.export(
                part.module,
                part.args,
                str(path),
                input_names=part.inputs,
                output_names=part.outputs,
                dynamic_shapes=nest(part),
                opset_version=form.opset,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        else:
            torch.onnx.export(
                part.module,
                part.args,
                str(path),
                input_names=part.inputs,
                output_names=part.outputs,
                dynamic_axes=part.axes,
                opset_version=form.opset,
                dynamo=False,
                do_constant_folding=True,
            )
    model = onnx.load(path)
    clean(model)
    path.unlink()
    if form.external:
        onnx.save_model(
            model,
            path,
            save_as_external_data=True,
            all_tensors_to_one_file=True,
            location=f"{part.file}.onnx_data",
            size_threshold=1024,
        )
        # onnx creates the data file for its owner alone.
        (folder / f"{part.file}.onnx_data").chmod(0o644)
    else:
        onnx.save_model(model, path)
    # Names that tell nothing about this machine are what the fixtures are committed with.
    if any(mark in path.read_bytes() for mark in (b"site-packages", b'File "/', str(Path.home()).encode())):
        raise RuntimeError(f"{path}: still holds paths of the exporting machine")


def configs(net: LlavaForConditionalGeneration, size: Size, folder: Path) -> None:
    """The JSON files around the graphs, as the Hugging Face layout has them."""
    config = json.loads(net.config.to_json_string(use_diff=False))
    config.pop("_name_or_path", None)
    tokens.dump(config, folder / "config.json")
    ids = {"bos_token_id": tokens.BOS, "eos_token_id": tokens.EOS, "pad_token_id": tokens.PAD}
    tokens.dump({"_from_model_config": True, **ids}, folder / "generation_config.json")
    square = {"height": size.image, "width": size.image}
    tokens.dump(
        {
            "processor_class": "LlavaProcessor",
            "image_processor_type": "CLIPImageProcessor",
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
        },
        folder / "preprocessor_config.json",
    )
    tokens.dump(
        {
            "processor_class": "LlavaProcessor",
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": size.patch,
            "vision_feature_select_strategy": "default",
        },
        folder / "processor_config.json",
    )
    tokens.save(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FIXTURES)
    parser.add_argument("names", nargs="*", default=list(FORMS), metavar="NAME", help=", ".join(FORMS))
    args = parser.parse_args()
    unknown = [n for n in args.names if n not in FORMS]
    if unknown:
        parser.error(f"unknown {', '.join(unknown)}; expected some of {', '.join(FORMS)}")
    torch.set_num_threads(2)
    worst = 0.0
    for name in args.names:
        form = FORMS[name]
        size, net = SIZES[form.model], build.model(form.model, form.attention)
        folder = args.out / name
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "onnx").mkdir(parents=True)
        configs(net, size, folder)
        for part in parts(net, size):
            export(part, form, folder / "onnx")
        differences = check.compare(folder, build.model(form.model, "eager"), size)
        for what, difference in differences.items():
            print(f"{name:14} {what:34} max |onnx - torch| = {difference:.2e}")
        worst = max(worst, *differences.values())
    if not worst < check.TOLERANCE:
        print(f"worst difference {worst:.2e}, expected below {check.TOLERANCE:.0e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
