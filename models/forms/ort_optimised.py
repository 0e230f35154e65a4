"""Fixtures as ONNX Runtime's own optimisers leave them.

    python models/forms/ort_optimised.py [--out DIR] [NAME ...]

`ort-LEVEL-FIXTURE`: what a session writes with `optimized_model_filepath` at that level. `opt-FIXTURE`: the
`onnxruntime.transformers` optimiser, `clip` for the tower and `gpt2` (its decoder class, the one that ONNX
Runtime's Llama tools use) for the decoder. `osc-FIXTURE`: onnxscript's `optimize_for_ort`.

Who fuses attention was found by trying. The session: nobody's. `onnxruntime.transformers`: the tower's, only
from eager TorchScript (sdpa's split scale and dynamo's transposes are not matched). onnxscript: the tower's
and five of the eight decoder layers', only from dynamo's opset 18: one decoder with two kinds of attention.
"""

import shutil
import sys
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnxruntime.transformers import optimizer
from onnxscript.rewriter.ort_fusions import optimize_for_ort

import common
from common import FIXTURES, STEMS, build, clean

LEVELS = {
    "ort-basic": "ORT_ENABLE_BASIC",
    "ort-extended": "ORT_ENABLE_EXTENDED",
    # Layout changes depend on the processor: NCHWc blocks of 8 or 16. This one is not reproducible elsewhere.
    "ort-all": "ORT_ENABLE_ALL",
}
FORMS = {
    "ort-basic-ts-sdpa-mha": "ts-sdpa-mha",
    "ort-basic-ts-eager-gqa": "ts-eager-gqa",
    "ort-basic-dynamo18-gqa": "dynamo18-gqa",
    "ort-extended-ts-sdpa-mha": "ts-sdpa-mha",
    "ort-extended-ts-sdpa-gqa": "ts-sdpa-gqa",
    "ort-extended-ts-eager-mha": "ts-eager-mha",
    "ort-extended-ts-eager-gqa": "ts-eager-gqa",
    "ort-extended-dynamo18-mha": "dynamo18-mha",
    "ort-extended-dynamo18-gqa": "dynamo18-gqa",
    "ort-extended-dynamo23-gqa": "dynamo23-gqa",
    "ort-all-ts-sdpa-mha": "ts-sdpa-mha",
    "opt-ts-eager-mha": "ts-eager-mha",
    "opt-ts-sdpa-gqa": "ts-sdpa-gqa",
    "opt-dynamo18-mha": "dynamo18-mha",
    "opt-dynamo23-gqa": "dynamo23-gqa",
    "osc-dynamo18-mha": "dynamo18-mha",
    "osc-dynamo18-gqa": "dynamo18-gqa",
    "osc-ts-eager-mha": "ts-eager-mha",
}


def saved(source: Path, target: Path, level: str) -> None:
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 3
    if source.with_name(f"{source.name}_data").exists():
        # Without this the session writes a file that refers to the source's data, which no longer lies beside
        # it, or, above some size, none of it.
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{target.name}_data"
        )
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def optimised(source: Path, target: Path, size) -> None:
    tower = source.stem == "vision_encoder"
    kind = "clip" if tower else "gpt2"
    model = optimizer.optimize_model(
        str(source),
        model_type=kind,
        num_heads=size.vision_heads if tower else size.heads,
        hidden_size=size.vision_width if tower else size.width,
        # 0: only the optimiser's own fusions; it would run a session of ONNX Runtime first otherwise.
        opt_level=0,
    )
    onnx.save_model(model.model, target)


def rewritten(source: Path, target: Path) -> None:
    model, _ = optimize_for_ort(ir.from_proto(onnx.load(source)))
    proto = ir.to_proto(model)
    clean(proto)
    onnx.save_model(proto, target)


def make(name: str, folder: Path, source: str, size) -> str:
    prefix = name.removesuffix(f"-{source}")
    for stem in STEMS:
        before, after = (p / "onnx" / f"{stem}.onnx" for p in (FIXTURES / source, folder))
        if prefix in LEVELS:
            saved(before, after, LEVELS[prefix])
        elif stem == "embed_tokens":
            for path in before.parent.glob(f"{stem}.onnx*"):
                shutil.copyfile(path, after.with_name(path.name))
        elif prefix == "osc":
            rewritten(before, after)
        else:
            optimised(before, after, size)
    if prefix in LEVELS:
        return f"{source}, optimised and saved by a session at {LEVELS[prefix]}"
    tools = {"opt": "onnxruntime.transformers.optimizer (clip, gpt2)", "osc": "onnxscript optimize_for_ort"}
    return f"{source}, {tools[prefix]}"


def main() -> int:
    args = common.arguments(__doc__, FORMS)
    good = True
    for name in args.names:
        source = FORMS[name]
        model = source.rsplit("-", 1)[1]
        size, net = build.SIZES[model], build.model(model)
        how = make(name, common.begin(args.out, name, source), source, size)
        good &= common.record(args.out, name, how, lambda: common.measure(args.out / name, net, size), 1e-4)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
