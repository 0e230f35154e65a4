"""Checks ONNX files as strictly as the onnx package can.

    python models/check_onnx.py PATH ...

Every .onnx file in or below the given paths goes through `onnx.checker` with its full check and through
strict shape inference with data propagation. Exit code 0: all pass; 1: the failures are listed;
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
    try:
        files = models(parser.parse_args().paths)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    bad = 0
    for path in files:
        problems = failures(path)
        bad += bool(problems)
        print(f"{'FAIL' if problems else 'ok  '} {path}")
        for problem in problems:
            print(f"     {problem.strip()}")
    print(f"{len(files) - bad} of {len(files)} files pass")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
