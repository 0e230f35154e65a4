"""External data as onnx's own writer lays it out, from the embedding of a fixture.

    python models/forms/external.py [--out DIR]

Writes `NAME/embed_tokens.onnx` with its weights in one file beside it (`one-file`), in one file for each tensor,
named after it (`per-tensor`; where a name is no file name, onnx makes one up), and in a sub-folder (`sub-folder`).
"""

import argparse
from pathlib import Path

import onnx

ROOT = Path(__file__).resolve().parent
SOURCE = ROOT.parent / "llava/fixtures/ts-sdpa-gqa/onnx/embed_tokens.onnx"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "fixtures/external")
    out = parser.parse_args().out
    options = {"save_as_external_data": True, "size_threshold": 0}
    for name, how in {
        "one-file": {"all_tensors_to_one_file": True, "location": "embed_tokens.onnx_data"},
        "per-tensor": {"all_tensors_to_one_file": False},
        "sub-folder": {"all_tensors_to_one_file": True, "location": "weights/embed_tokens.bin"},
    }.items():
        folder = out / name
        # onnx does not make the folder that a location names.
        (folder / Path(how.get("location", "")).parent).mkdir(parents=True, exist_ok=True)
        for old in folder.rglob("*"):
            if old.is_file():
                old.unlink()
        onnx.save(onnx.load(SOURCE), folder / "embed_tokens.onnx", **options, **how)


if __name__ == "__main__":
    main()
