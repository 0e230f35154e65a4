"""Checks ONNX files as strictly as the onnx package can.

    python models/check_onnx.py [--fixed] PATH ...

Every .onnx file in or below the given paths goes through `onnx.checker` with its full check and through
strict shape inference with data propagation. With --fixed, every value has to have a shape of numbers, as
the file states it, and where inference from the inputs alone gives a shape it has to be that one (of
ONNX Runtime's own operators the onnx package infers nothing). Exit code 0: all pass; 1: the failures are listed;
2: a path does not exist or holds no .onnx file.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import onnx


def models(paths: list[Path]) -> list[Path]:
    """The .onnx files of files and directories, in order; an error names a path that has none."""
    found = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path}: does not exist")
        below = [path] if path.is_file() else sorted(path.rglob("*.onnx"))
        if not below:
            raise FileNotFoundError(f"{path}: holds no .onnx file")
        found += below
    return found


def shapes(graph: onnx.GraphProto) -> dict[str, list[int | None] | None]:
    """Stated shapes of intermediate values and outputs; None stands for what is not known."""
    known = {}
    for value in [*graph.value_info, *graph.output]:
        tensor = value.type.tensor_type
        dims = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
        known[value.name] = dims if tensor.HasField("shape") else None
    return known


def loose(path: Path) -> list[str]:
    """Values whose shape is not fixed, or not the one that follows from the inputs."""
    model = onnx.load(str(path), load_external_data=False)
    stated = shapes(model.graph)
    del model.graph.value_info[:]
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    try:
        model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except Exception as error:
        return [f"strict shape inference from the inputs alone: {error}"]
    inferred = shapes(model.graph)
    apart = constants(model.graph)
    result = []
    for name in (name for node in model.graph.node for name in node.output if name):
        shape, other = stated.get(name), inferred.get(name)
        if shape is None or None in shape:
            if name not in apart:
                result.append(f"'{name}' has the shape {shape}; expected numbers")
        elif other is not None and None not in other and other != shape:
            result.append(f"'{name}' is stated as {shape}, and {other} follows from the inputs")
    return result


def constants(graph: onnx.GraphProto) -> set[str]:
    """Outputs of Constant nodes: their shape is in the node."""
    return {name for node in graph.node if node.op_type == "Constant" for name in node.output}


def failures(path: Path) -> list[str]:
    """What is wrong with one file. Paths, not loaded models: external data is checked in its place."""
    result = []
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # the checker raises several unrelated types
        result.append(f"full check: {error}")
    try:
        with tempfile.TemporaryDirectory() as folder:
            onnx.shape_inference.infer_shapes_path(
                str(path), str(Path(folder) / "inferred.onnx"), check_type=True, strict_mode=True, data_prop=True
            )
    except Exception as error:
        result.append(f"strict shape inference: {error}")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    parser.add_argument("--fixed", action="store_true", help="shapes have to be numbers")
    arguments = parser.parse_args()
    try:
        files = models(arguments.paths)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    bad = 0
    for path in files:
        problems = failures(path) + (loose(path) if arguments.fixed else [])
        bad += bool(problems)
        print(f"{'FAIL' if problems else 'ok  '} {path}")
        for problem in problems:
            print(f"     {problem.strip()}")
    print(f"{len(files) - bad} of {len(files)} files pass")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
