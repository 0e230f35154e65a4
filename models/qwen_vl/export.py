"""Exports the models of build.py with PyTorch's two exporters.

    python models/qwen_vl/export.py [--out models/qwen_vl/fixtures] [NAME ...]

Every NAME of FORMS becomes a directory with the configs, a tokenizer and onnx/{vision_encoder, embed_tokens,
decoder_model_merged}.onnx; vision.py has the first of them. The decoder takes `position_ids` [3, batch,
sequence]. All are compared with the PyTorch model under ONNX Runtime, with grids of different shape, and the
command fails if they differ. Graphs of PACKED are compressed afterwards (.onnx.gz).
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from transformers.cache_utils import DynamicCache

import build
import vision
import words
from build import PIXELS, SIZE, SIZES, Size, sibling

import gz
import tokens

shared = sibling("export")

FIXTURES = Path(__file__).parent / "fixtures"
FORMS = {
    "ts-sdpa": shared.Form("qwen2.5-vl", "sdpa", 17, False),
    "dynamo18": shared.Form("qwen2.5-vl", "sdpa", 18, True),
    "qwen2-vl": shared.Form("qwen2-vl", "sdpa", 17, False),
}
# Which graphs of a directory are kept compressed.
PACKED = {"dynamo18": "vision_encoder.onnx", "qwen2-vl": "*.onnx"}
PROCESSORS = {"qwen2.5-vl": "Qwen2_5_VLProcessor", "qwen2-vl": "Qwen2VLProcessor"}
TOLERANCE = 2e-4


def parts(net, size: Size = SIZE) -> list[shared.Part]:
    g = torch.Generator().manual_seed(0)
    batch, seq, past = 2, 5, 3
    head = size.width // size.heads
    cache = [torch.randn(batch, size.kv_heads, past, head, generator=g) for _ in range(2 * size.layers)]
    seq_axes = {0: "batch_size", 1: "sequence_length"}
    names = shared.cache_names("past_key_values", size.layers)
    presents = shared.cache_names("present", size.layers)
    # Three rows that differ: the exporter must not take them for one.
    positions = torch.arange(past, past + seq).repeat(3, batch, 1) + torch.arange(3)[:, None, None]
    return [
        shared.Part(
            "embed_tokens",
            shared.EmbedTokens(net),
            (torch.randint(5, tokens.VOCAB, (batch, seq), generator=g),),
            ["input_ids"],
            ["inputs_embeds"],
            {"input_ids": seq_axes, "inputs_embeds": seq_axes},
        ),
        shared.Part(
            "decoder_model_merged",
            shared.Decoder(net),
            (
                torch.randn(batch, seq, size.width, generator=g),
                torch.tensor([[0] + [1] * (past + seq - 1), [1] * (past + seq)]),
                positions,
                cache,
            ),
            ["inputs_embeds", "attention_mask", "position_ids", *names],
            ["logits", *presents],
            {
                "inputs_embeds": seq_axes,
                "attention_mask": {0: "batch_size", 1: "total_sequence_length"},
                "position_ids": {1: "batch_size", 2: "sequence_length"},
                **{n: {0: "batch_size", 2: "past_sequence_length"} for n in names},
                "logits": seq_axes,
                **{n: {0: "batch_size", 2: "total_sequence_length"} for n in presents},
            },
        ),
    ]


def compare(folder: Path, net) -> dict[str, float]:
    """Largest absolute differences of embeddings and logits over a prompt, a decode step and a second turn."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 2
    embed, decoder = (
        ort.InferenceSession(str(folder / "onnx" / f"{n}.onnx"), options, providers=["CPUExecutionProvider"])
        for n in ("embed_tokens", "decoder_model_merged")
    )
    result = {}
    for batch in (1, 2):
        rng = np.random.default_rng(batch)
        cache, past, total = DynamicCache(), None, 0
        mask = np.zeros((batch, 0), np.int64)
        for step, length in enumerate((17, 1, 6, 1)):
            ids = rng.integers(5, tokens.VOCAB, (batch, length))
            embeds = embed.run(None, {"input_ids": ids})[0]
            want = net.get_input_embeddings()(torch.from_numpy(ids)).numpy()
            result["embeddings"] = max(result.get("embeddings", 0.0), float(np.abs(embeds - want).max()))
            new = np.ones((batch, length), np.int64)
            if batch > 1 and step == 0:
                new[0, :2] = 0
            mask = np.concatenate([mask, new], axis=1)
            positions = np.tile(np.arange(total, total + length), (3, batch, 1))
            if step == 0:
                # A grid of 3 x 3 in the middle, as the model's own function lays it out.
                grid = np.indices((1, 3, 3)).reshape(3, 9) + 4
                positions[:, :, 4:13] = grid[:, None]
                positions[:, :, 13:] -= 6
            total += length - (6 if step == 0 else 0)
            feed = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}
            for i, value in enumerate(decoder.get_inputs()[3:]):
                _, heads, _, width = value.shape
                feed[value.name] = past[i] if past else np.zeros((batch, heads, 0, width), np.float32)
            logits, *past = decoder.run(None, feed)
            with torch.no_grad():
                out = net.model.language_model(
                    inputs_embeds=torch.from_numpy(embeds),
                    attention_mask=torch.from_numpy(mask),
                    position_ids=torch.from_numpy(positions),
                    past_key_values=cache,
                    use_cache=True,
                )
                want = net.lm_head(out.last_hidden_state).numpy()
            result[f"batch {batch} step {step} logits"] = float(np.abs(logits - want)[new == 1].max())
    return {k: v if v == v else float("inf") for k, v in result.items()}


def configs(net, model: str, folder: Path) -> None:
    config = json.loads(net.config.to_json_string(use_diff=False))
    config.pop("_name_or_path", None)
    tokens.dump(config, folder / "config.json")
    ids = {"bos_token_id": tokens.BOS, "eos_token_id": tokens.EOS, "pad_token_id": tokens.PAD}
    tokens.dump({"_from_model_config": True, **ids}, folder / "generation_config.json")
    words.save(folder, PROCESSORS[model], PIXELS, SIZES[model].patch)


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
        form, folder = FORMS[name], args.out / name
        net = build.model(form.model, form.attention)
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "onnx").mkdir(parents=True)
        configs(net, form.model, folder)
        for part in [vision.part(net, form), *parts(net, SIZES[form.model])]:
            shared.export(part, form, folder / "onnx")
        plain = build.model(form.model)
        differences = {"features": vision.compare(folder, plain), **compare(folder, plain)}
        for what, difference in differences.items():
            print(f"{name:10} {what:24} max |onnx - torch| = {difference:.2e}")
        worst = max(worst, *differences.values())
        if name in PACKED:
            for path in sorted((folder / "onnx").glob(PACKED[name])):
                gz.pack(path)
    if not worst < TOLERANCE:
        print(f"worst difference {worst:.2e}, expected below {TOLERANCE:.0e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
