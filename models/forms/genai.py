"""Decoders of ONNX Runtime GenAI's model builder, from checkpoints with the fixtures' weights.

    python models/forms/genai.py [--out DIR] [NAME ...]

The language model of llava/build.py is saved as a LlamaForCausalLM checkpoint in a temporary directory and
`python -m onnxruntime_genai.models.builder` makes the decoder of it. `genai-*` take the decoder into a
Hugging Face layout beside a TorchScript export of vision encoder and embedding; `genaidir-*` are the builder's
directory as it is (`genai_config.json`, `model.onnx`, tokenizer), text only.

All write GroupQueryAttention, heads ungrouped or not, whose `seqlens_k` is the sum of the mask: left padding
is not for them, and neither is a batch that continues a cache with several tokens. The width of a head is a
symbolic dimension of the caches. What the builder makes for `cuda` and `dml` in fp32 is an invalid graph:
com.microsoft.Attention without the cache outputs (0.18.0). It is kept as a form that nothing loads.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoModelForCausalLM

import common
import precisions
import variants
from common import tokens
from export import Form as Export


@dataclass(frozen=True)
class Form:
    """One run of the builder; `tolerance` in standard deviations of the logits, None where none is known."""

    model: str
    precision: str
    provider: str
    options: tuple[str, ...] = ()
    tolerance: float | None = 1e-4


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
    "genaidir-fp32-gqa": Form("gqa16", "fp32", "cpu"),
    "genaidir-int4-gqa": Form("gqa16", "int4", "cpu", (), None),
    "genaidir-int4-embedded-gqa": Form("gqa16", "int4", "cpu", ("op_types_to_quantize=MatMul/Gather",), None),
}


def checkpoint(net, folder: Path) -> None:
    """The language model of a LLaVA as a checkpoint of its own, with the tokenizer."""
    text = AutoModelForCausalLM.from_config(net.config.text_config)
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


def make(name: str, form: Form, out: Path, net) -> str:
    """Builds the form and says how."""
    with tempfile.TemporaryDirectory() as scratch:
        source, built = Path(scratch) / "checkpoint", Path(scratch) / "built"
        checkpoint(net, source)
        if name.startswith("genaidir"):
            folder = out / name
            shutil.rmtree(folder, ignore_errors=True)
            run_builder(source, folder, form, "model.onnx")
        else:
            folder = common.begin(out, name)
            variants.exported(form.model, TORCHSCRIPT, folder, ("vision_encoder", "embed_tokens"))
            run_builder(source, built, form, "decoder_model_merged.onnx")
            for path in built.glob("decoder_model_merged.onnx*"):
                shutil.copyfile(path, folder / "onnx" / path.name)
            if form.precision == "fp16":
                # What goes between the three files has one type.
                for path in (folder / "onnx" / f"{stem}.onnx" for stem in ("vision_encoder", "embed_tokens")):
                    precisions.half(path, path, keep_io=False)
    options = ", ".join((form.precision, form.provider, *form.options))
    return f"language model of {form.model}, onnxruntime_genai.models.builder ({options})"


def main() -> int:
    args = common.arguments(__doc__, FORMS)
    good = True
    for name in args.names:
        form = FORMS[name]
        size, net = variants.size_of(form.model), variants.model(form.model)
        how = make(name, form, args.out, net)
        # See above: batches neither padded nor continued by several tokens.
        plan = {1: common.STEPS, 2: (1, 1)}
        good &= common.record(
            args.out, name, how, lambda: common.measure(args.out / name, net, size, plan, padded=False), form.tolerance
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
