"""Fixtures in other precisions, by ONNX Runtime's own converters and quantisers.

    python models/forms/precisions.py [--out DIR] [NAME ...]

`KIND-FIXTURE`, the files with the suffix that such files are published under.

| kind | suffix | tool |
|---|---|---|
| `fp16` | `_fp16` | onnxruntime.transformers.float16, inputs and outputs fp16 |
| `fp16io` | `_fp16` | the same with `keep_io_types=True` |
| `torchfp16` | `_fp16` | the model in torch.float16, exported as the fixture was |
| `int8` | `_quantized` | quantize_dynamic: MatMulInteger |
| `int8mm` | `_quantized` | the same for MatMul, Gemm and Gather alone |
| `qdq` | `_int8` | quantize_static, QDQ, calibrated with drawn inputs |
| `q4` | `_q4` | matmul_nbits_quantizer: MatMulNBits, blocks of 16 |
| `q4f16` | `_q4f16` | `q4`, then `fp16` |
| `bf16` | `_bf16` | the model in torch.bfloat16, exported by dynamo |
"""

import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers import float16

import common
import export
from common import FIXTURES, STEMS, build, tokens

SUFFIX = {
    "fp16": "_fp16",
    "fp16io": "_fp16",
    "torchfp16": "_fp16",
    "int8": "_quantized",
    "int8mm": "_quantized",
    "qdq": "_int8",
    "q4": "_q4",
    "q4f16": "_q4f16",
    "bf16": "_bf16",
}
SOURCES = {
    "fp16": ("ts-sdpa-mha", "ts-eager-gqa", "dynamo18-mha", "dynamo18-gqa", "dynamo23-gqa"),
    "fp16io": ("ts-sdpa-mha", "ts-eager-mha", "dynamo18-mha", "dynamo23-mha"),
    "torchfp16": ("ts-sdpa-gqa", "ts-eager-mha", "dynamo18-mha", "dynamo23-gqa"),
    "int8": ("ts-sdpa-mha", "ts-eager-gqa", "dynamo18-mha", "dynamo23-gqa"),
    # Asked for all it can, it turns ONNX's Attention into QAttention, an operator with other inputs.
    "int8mm": ("dynamo23-gqa",),
    # quant_pre_process cannot read external data (dynamo18-gqa).
    "qdq": ("ts-sdpa-mha", "dynamo18-mha", "dynamo18-gqa"),
    "q4": ("ts-sdpa-gqa", "dynamo18-mha", "dynamo23-gqa"),
    "q4f16": ("dynamo18-mha",),
    "bf16": ("dynamo18-mha", "dynamo23-gqa"),
}
FORMS = {f"{kind}-{source}": (kind, source) for kind, sources in SOURCES.items() for source in sources}
# Standard deviations of the logits. Others: only common.UNLIKE_AT_MOST, one logit of thousands may be far off.
TOLERANCE = {"fp16": 5e-2, "fp16io": 5e-2, "torchfp16": 5e-2}


def half(source: Path, target: Path, keep_io: bool) -> None:
    model = float16.convert_float_to_float16(onnx.load(source), keep_io_types=keep_io)
    onnx.save_model(model, target)


class Drawn(CalibrationDataReader):
    """A few drawn feeds: a prompt, a prompt on a cache, a step."""

    def __init__(self, path: Path, size):
        model = onnx.load(path, load_external_data=False)
        initializers = {t.name for t in model.graph.initializer}
        self.inputs = [i for i in model.graph.input if i.name not in initializers]
        self.size = size
        self.feeds = iter([self._feed(i, *lengths) for i, lengths in enumerate(((24, 0), (8, 16), (1, 30)))])

    def _feed(self, seed: int, sequence: int, past: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        size, feed = self.size, {}
        for value in self.inputs:
            match value.name.split(".")[0]:
                case "pixel_values":
                    feed[value.name] = rng.standard_normal((2, 3, size.image, size.image)).astype(np.float32)
                case "input_ids":
                    feed[value.name] = rng.integers(5, tokens.VOCAB, (1, sequence))
                case "inputs_embeds":
                    feed[value.name] = rng.standard_normal((1, sequence, size.width)).astype(np.float32)
                case "attention_mask":
                    feed[value.name] = np.ones((1, past + sequence), np.int64)
                case "position_ids":
                    feed[value.name] = np.arange(past, past + sequence)[None]
                case "past_key_values":
                    shape = (1, size.kv_heads, past, size.width // size.heads)
                    feed[value.name] = rng.standard_normal(shape).astype(np.float32)
                case other:
                    raise RuntimeError(f"input {other}: no calibration data are drawn for it")
        return feed

    def get_next(self):
        return next(self.feeds, None)


def static(source: Path, target: Path, size) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        ready = Path(scratch) / "ready.onnx"
        # What the quantiser's manual asks for. Its symbolic shape inference fails on some of these graphs.
        quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
        quantize_static(
            str(ready),
            str(target),
            Drawn(source, size),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm", "Conv"],
        )


def four_bits(source: Path) -> onnx.ModelProto:
    quantizer = MatMulNBitsQuantizer(onnx.load(source), block_size=16, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    return quantizer.model.model


def reexport(source: str, folder: Path, suffix: str, dtype: torch.dtype) -> None:
    form = export.FORMS[source]
    size, net = build.SIZES[form.model], build.model(form.model, form.attention).to(dtype)
    for part in export.parts(net, size):
        part.args = tuple(
            [t.to(dtype) for t in a] if isinstance(a, list) else a.to(dtype) if a.is_floating_point() else a
            for a in part.args
        )
        part.file += suffix
        export.export(part, form, folder)


def make(kind: str, source: str, folder: Path, size) -> str:
    if kind in ("torchfp16", "bf16"):
        dtype = torch.float16 if kind == "torchfp16" else torch.bfloat16
        reexport(source, folder, SUFFIX[kind], dtype)
        return f"weights of {source} in {dtype}, exported as it was"
    for stem in STEMS:
        before = FIXTURES / source / "onnx" / f"{stem}.onnx"
        after = folder / f"{stem}{SUFFIX[kind]}.onnx"
        match kind:
            case "fp16" | "fp16io":
                half(before, after, kind == "fp16io")
            case "int8":
                quantize_dynamic(str(before), str(after), weight_type=QuantType.QInt8)
            case "int8mm":
                operators = ["MatMul", "Gemm", "Gather"]
                quantize_dynamic(str(before), str(after), weight_type=QuantType.QInt8, op_types_to_quantize=operators)
            case "qdq":
                static(before, after, size)
            case "q4":
                onnx.save_model(four_bits(before), after)
            case "q4f16":
                model = float16.convert_float_to_float16(four_bits(before))
                onnx.save_model(model, after)
    tool = {
        "fp16": "float16.convert_float_to_float16",
        "fp16io": "float16.convert_float_to_float16(keep_io_types=True)",
        "int8": "quantize_dynamic(QInt8)",
        "int8mm": "quantize_dynamic(QInt8, MatMul, Gemm, Gather)",
        "qdq": "quantize_static(QDQ, QUInt8, QInt8)",
        "q4": "MatMulNBitsQuantizer(block_size=16, symmetric, accuracy_level=4)",
        "q4f16": "MatMulNBitsQuantizer, then convert_float_to_float16",
    }[kind]
    return f"{source}, {tool}"


def main() -> int:
    args = common.arguments(__doc__, FORMS)
    good = True
    for name in args.names:
        kind, source = FORMS[name]
        model = source.rsplit("-", 1)[1]
        size, net = build.SIZES[model], build.model(model)
        folder = common.begin(args.out, name, source)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                how = make(kind, source, folder / "onnx", size)
            except Exception as error:
                # A converter that cannot take a graph is worth knowing.
                common.not_made(args.out, name, f"{source}, {kind}", error)
                continue
        good &= common.record(
            args.out, name, how, lambda: common.measure(args.out / name, net, size), TOLERANCE.get(kind)
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
