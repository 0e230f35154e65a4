"""Decoders of ONNX Runtime GenAI's model builder, from checkpoints with the fixtures' weights.

    python models/forms/genai.py [--out DIR] [NAME ...]

The language model of llava/build.py is saved as a LlamaForCausalLM checkpoint in a temporary directory and
`python -m onnxruntime_genai.models.builder` makes the decoder of it. `genai-*` take the decoder into a
Hugging Face layout beside a TorchScript export of vision encoder and embedding; `genaidir-*` are the builder's
directory as it is (`genai_config.json`, `model.onnx`, tokenizer), text only. `genaivlm-*` are directories as
GenAI's own scripts for vision models make them: `text.onnx` of the builder, `vision.onnx`, an `embedding.onnx`
that puts the features in the placeholders' places, and a `genai_config.json` that names all three.

All but those named below write GroupQueryAttention, heads grouped or not, whose `seqlens_k` is the sum of the
mask: left padding is not for them, and neither is a batch that continues a cache with several tokens. The width
of a head is a symbolic dimension of the caches. `genai09-*` are of builder 0.9.2, made when the script runs where
that version is installed (requirements-4.57.txt); its CUDA decoders in fp32 hold MultiHeadAttention with a mask
that respects padding, repeated keys and com.microsoft.RotaryEmbedding. What 0.18.0 makes for `cuda` and `dml` in
fp32 is an invalid graph: com.microsoft.Attention without the cache outputs. It is kept as a form that nothing
loads (`genai-fp32-broken-gqa`).
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

import common
import precisions
import variants
from common import tokens
from export import Form as Export
from export import Part
from export import export as export_part


@dataclass(frozen=True)
class Form:
    """One run of the builder; `tolerance` in standard deviations, None for common.UNLIKE_AT_MOST alone."""

    model: str
    precision: str
    provider: str
    options: tuple[str, ...] = ()
    tolerance: float | None = 1e-4
    builder: str = "0.18.0"


TORCHSCRIPT = Export("", "sdpa", 17, False)
EMBEDS = "exclude_embeds=true"
FORMS = {
    "genai-fp32-mha": Form("mha16", "fp32", "cpu", (EMBEDS,)),
    "genai-fp32-gqa": Form("gqa16", "fp32", "cpu", (EMBEDS,)),
    "genai-fp32-unpacked-gqa": Form("gqa16", "fp32", "cpu", (EMBEDS, "fuse_qkv=false")),
    "genai-fp32-lastlogit-gqa": Form("gqa16", "fp32", "cpu", (EMBEDS, "prune_lm_head=true")),
    # For DirectML the rotary embedding is an operator of its own, and position_ids an input.
    "genai-fp16-rotary-gqa": Form("gqa16", "fp16", "dml", (EMBEDS,), 2e-2),
    "genai-fp16-rotary-mha": Form("mha16", "fp16", "dml", (EMBEDS,), 2e-2),
    "genai-fp16-gqa": Form("gqa16", "fp16", "cuda", (EMBEDS,), 2e-2),
    "genai-bf16-gqa": Form("gqa16", "bf16", "cuda", (EMBEDS,), None),
    "genai-fp32-broken-gqa": Form("gqa16", "fp32", "cuda", (EMBEDS,), None),
    "genai-int4-mha": Form("mha16", "int4", "cpu", (EMBEDS,), None),
    "genai-int4-gqa": Form("gqa16", "int4", "cpu", (EMBEDS,), None),
    "genai-int4-asym-gqa": Form("gqa16", "int4", "cpu", (EMBEDS, "is_symmetric=false", "block_size=16"), None),
    "genai-int4-qdq-gqa": Form("gqa16", "int4", "cpu", (EMBEDS, "use_qdq=true"), None),
    "genai-int8-gqa": Form("gqa16", "int8", "cpu", (EMBEDS,), None),
    # Not Mistral: the builder writes it without its window (0.18.0).
    "genai-qwen3": Form("qwen3", "fp32", "cpu", (EMBEDS,)),
    "genai-phi3": Form("phi3", "fp32", "cpu", (EMBEDS,)),
    "genai-gemma2": Form("gemma2", "fp32", "cpu", (EMBEDS, "windowed_kv_cache=false")),
    # The default: sliding layers want caches of at least the window, filled in turn. Not for a growing cache.
    "genai-gemma2-windowed": Form("gemma2", "fp32", "cpu", (EMBEDS,), None),
    # The last generation of builders with MultiHeadAttention: for CUDA in fp32.
    "genai09-mha-gqa": Form("gqa", "fp32", "cuda", (EMBEDS,), builder="0.9.2"),
    "genai09-mha-mha": Form("mha", "fp32", "cuda", (EMBEDS,), builder="0.9.2"),
    # 0.18.0 cannot read the rotary parameters of Gemma 3 from a configuration of Transformers 5.
    "genai09-gemma3": Form("gemma3", "fp32", "cpu", (EMBEDS,), builder="0.9.2"),
    "genai09-fp32-gqa": Form("gqa16", "fp32", "cpu", (EMBEDS,), builder="0.9.2"),
    "genai09-int4-gqa": Form("gqa16", "int4", "cpu", (EMBEDS,), None, builder="0.9.2"),
    "genaidir-fp32-gqa": Form("gqa16", "fp32", "cpu"),
    "genaidir-int4-gqa": Form("gqa16", "int4", "cpu", (), None),
    "genaivlm-fp32-gqa": Form("gqa16", "fp32", "cpu", (EMBEDS,)),
    "genaivlm-int4-gqa": Form("gqa16", "int4", "cpu", (EMBEDS,), None),
    "genaidir-int4-embedded-gqa": Form("gqa16", "int4", "cpu", ("op_types_to_quantize=MatMul/Gather",), None),
}


def checkpoint(net, folder: Path) -> None:
    """The language model of a LLaVA as a checkpoint of its own, with the tokenizer."""
    text = AutoModelForCausalLM.from_config(net.config.text_config, attn_implementation="eager")
    weights = {f"model.{k}": v for k, v in net.model.language_model.state_dict().items()}
    text.load_state_dict({**weights, "lm_head.weight": net.lm_head.weight})
    text.save_pretrained(folder)
    tokens.save(folder)


def run_builder(source: Path, target: Path, form: Form, filename: str) -> None:
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", target]
    command += ["-c", source / "cache", "-p", form.precision, "-e", form.provider]
    command += ["--extra_options", "hf_token=false", f"filename={filename}", *form.options]
    done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}")


class Embedding(nn.Module):
    """(input_ids [batch, sequence], image_features [images, N, D]) -> inputs_embeds [batch, sequence, D]."""

    def __init__(self, net):
        super().__init__()
        self.embed = net.get_input_embeddings()

    def forward(self, input_ids, image_features):
        places = (input_ids == tokens.IMAGE).unsqueeze(-1)
        return self.embed(input_ids).masked_scatter(places, image_features)


def vision_language(form: Form, folder: Path, net) -> None:
    """The files beside `text.onnx`, which the builder has written into `folder`."""
    size = variants.size_of(form.model)
    vision = variants.parts(form.model, net)[0]
    vision.file = "vision"
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, tokens.VOCAB, (2, size.patches + 6), generator=generator)
    ids[:, 3 : 3 + size.patches] = tokens.IMAGE
    sequence = {0: "batch_size", 1: "sequence_length"}
    # GenAI's own generator runs a step without images on features of no tokens; other clients on those of no image,
    # and then the graph may state how many tokens an image has. There is a form of either.
    features = {0: "num_images"} | ({1: "num_image_tokens"} if form.precision == "fp32" else {})
    embedding = Part(
        "embedding",
        Embedding(net),
        (ids, torch.randn(2, size.patches, size.width, generator=generator)),
        ["input_ids", "image_features"],
        ["inputs_embeds"],
        {"input_ids": sequence, "image_features": features, "inputs_embeds": sequence},
    )
    for part in (vision, embedding):
        export_part(part, TORCHSCRIPT, folder)
    path = folder / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["type"] = "gemma3"  # GenAI has no LLaVA; this type asks for these three files.
    config["model"]["image_token_id"] = tokens.IMAGE
    config["model"]["embedding"] = {
        "filename": "embedding.onnx",
        "inputs": {"input_ids": "input_ids", "image_features": "image_features"},
        "outputs": {"inputs_embeds": "inputs_embeds"},
    }
    config["model"]["vision"] = {
        "filename": "vision.onnx",
        "inputs": {"pixel_values": "pixel_values"},
        "outputs": {"image_features": "image_features"},
    }
    tokens.dump(config, path)


def measure_vlm(folder: Path, net, size) -> dict[str, float]:
    """As common.measure, of a prompt with an image through the three files and a step after it."""
    vision, embedding = (common.session(folder / f"{f}.onnx") for f in ("vision", "embedding"))
    bundle = common.Bundle(folder, variants.VARIANTS["gqa16"].width)
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((1, 3, size.image, size.image)).astype(np.float32)
    features = vision.run(None, {"pixel_values": pixels})[0]
    result = {"features": common.apart(features, common.torch_features(net, pixels))}
    ids = rng.integers(5, tokens.VOCAB, (1, 12 + size.patches))
    ids[:, 5 : 5 + size.patches] = tokens.IMAGE
    cache, past, seen = DynamicCache(), None, 0
    for step in range(2):
        # GenAI runs the embedding of a step without images.
        embeds = embedding.run(None, {"input_ids": ids, "image_features": features[: 1 - step]})[0]
        want = Embedding(net)(torch.from_numpy(ids), torch.from_numpy(features[: 1 - step])).numpy()
        result[f"step {step} embeddings"] = common.apart(embeds, want)
        positions = np.arange(seen, seen + ids.shape[1])[None]
        seen += ids.shape[1]
        mask = np.ones((1, seen), np.int64)
        want = common.torch_decode(net, embeds, mask, positions, cache)
        past = bundle.decode(embeds, mask, positions, past)
        result[f"step {step} logits"] = common.apart(past["logits"], want)
        ids = rng.integers(5, tokens.VOCAB, (1, 1))
    return result


def make(name: str, form: Form, out: Path, net) -> str:
    """Builds the form and says how."""
    with tempfile.TemporaryDirectory() as scratch:
        source, built = Path(scratch) / "checkpoint", Path(scratch) / "built"
        checkpoint(net, source)
        if name.startswith(("genaidir", "genaivlm")):
            folder = out / name
            shutil.rmtree(folder, ignore_errors=True)
            whole = name.startswith("genaivlm")
            run_builder(source, folder, form, "text.onnx" if whole else "model.onnx")
            if whole:
                vision_language(form, folder, variants.model(form.model, "sdpa"))
        else:
            folder = common.begin(out, name)
            # Gemma 2 has no other attention than eager.
            export = replace(TORCHSCRIPT, attention="eager") if form.model == "gemma2" else TORCHSCRIPT
            variants.exported(form.model, export, folder, ("vision_encoder", "embed_tokens"))
            run_builder(source, built, form, "decoder_model_merged.onnx")
            for path in built.glob("decoder_model_merged.onnx*"):
                shutil.copyfile(path, folder / "onnx" / path.name)
            if form.precision == "fp16":
                # What goes between the three files has one type.
                for path in (folder / "onnx" / f"{stem}.onnx" for stem in ("vision_encoder", "embed_tokens")):
                    precisions.half(path, path, keep_io=False)
    options = ", ".join((form.precision, form.provider, *form.options))
    return f"language model of {form.model}, onnxruntime_genai.models.builder {form.builder} ({options})"


def main() -> int:
    installed = version("onnxruntime-genai")
    args = common.arguments(__doc__, [n for n, f in FORMS.items() if f.builder == installed])
    good = True
    for name in args.names:
        form = FORMS[name]
        size, net = variants.size_of(form.model), variants.model(form.model)
        how = make(name, form, args.out, net)
        # GroupQueryAttention takes batches neither padded nor continued by several tokens; the mask beside
        # MultiHeadAttention pads, but continues by one token only, whatever the batch.
        multi_head = name.startswith("genai09-mha")
        plan = {1: (1, 1) if multi_head else common.STEPS, 2: (1, 1)}
        good &= common.record(
            args.out,
            name,
            how,
            lambda: (
                measure_vlm(args.out / name, net, size)
                if name.startswith("genaivlm")
                else common.measure(args.out / name, net, size, plan, padded=multi_head)
            ),
            form.tolerance,
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
