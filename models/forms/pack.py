"""Chooses the forms that tests run on and packs them into packed/.

    python models/forms/pack.py --from DIR [--out models/forms/packed]

DIR is where the other scripts of this folder wrote all forms and forms.json. A packed form is a folder with
`form.json` and the files that no fixture of llava/ and no form before it has, compressed; `files` says where
each file of the form's directory lies, from models/ on. tests/forms.rs puts the directories together again.
"""

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
MODELS = HERE.parent
sys.path.append(str(MODELS / "llava"))

import gz  # noqa: E402

# Name -> (heading of the table, golden set or None where only the unmodified file is the reference).
FORMS = {
    "Exporters": {
        "dynamo24-gqa": "gqa",
        "t457-ts-eager-gqa": "gqa",
        "split-ts-sdpa-gqa": "gqa",
        "if-ts-eager-mha": "mha",
        "function-ts-sdpa-gqa": "gqa",
        "vlm-ts-sdpa-mha": "mha",
        "function-dynamo18-mha": "mha",
        "vlm-batch-dynamo18-gqa": "gqa",
        "vlm-batch-dynamo23-mha": "mha",
    },
    "Towers without CLS": {
        "siglip-ts-eager": "siglip",
        "siglip2-dynamo23": "siglip2",
        "idefics3-plain-ts-sdpa": None,
    },
    "Decoders": {
        "qwen2-ts-sdpa": "qwen2",
        "qwen2-dynamo23": "qwen2",
        "qwen3-ts-sdpa": "qwen3",
        "mistral-ts-eager": "mistral",
        "phi3-ts-sdpa": "phi3",
        "gemma2-ts-eager": "gemma2",
        "gemma3-ts-sdpa": "gemma3",
    },
    "Optimised graphs": {
        "ort-basic-dynamo18-gqa": "gqa",
        "ort-extended-ts-sdpa-mha": "mha",
        "opt-ts-eager-mha": "mha",
        "osc-t457-dynamo18-mha": "mha16",
    },
    "ONNX Runtime GenAI": {
        "genai-fp32-gqa": "gqa16",
        "genai-fp32-unpacked-gqa": "gqa16",
        "genai-fp32-lastlogit-gqa": "gqa16",
        "genai-fp32-mha": "mha16",
        "genai-fp16-rotary-mha": None,
        "genai-int4-gqa": None,
        "genai-int8-gqa": None,
        "genai-phi3": "phi3",
        "genai-qwen3": "qwen3",
        "genai-gemma2": "gemma2",
        "genai09-mha-mha": "mha",
        "genaivlm-fp32-gqa": "gqa16",
        "genaivlm-int4-gqa": None,
        "genaidir-int4-gqa": None,
    },
    "Precisions": {
        "fp16-ts-sdpa-mha": None,
        "fp16io-ts-eager-mha": None,
        "bf16-dynamo23-gqa": None,
        "int8-ts-eager-gqa": None,
        "int8mm-dynamo23-gqa": None,
        "qdq-ts-sdpa-mha": None,
        "q4-ts-sdpa-gqa": None,
        "q4f16-dynamo18-mha": None,
    },
}
# Headings under which a form is about its decoder.
DECODERS = ("Decoders", "ONNX Runtime GenAI")
# Unmodified, these do not take several new tokens on top of a cache.
SINGLE_STEPS = ("genai09-mha-mha",)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="source", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, default=HERE / "packed")
    args = parser.parse_args()
    known = json.loads((args.source / "forms.json").read_text())
    shutil.rmtree(args.out, ignore_errors=True)
    where: dict[str, str] = {}
    # Files that are not what a form is about come from an earlier form of the same weights.
    others: dict[tuple[str, str], str] = {}
    for path in sorted((MODELS / "llava" / "fixtures").rglob("*")):
        if path.is_file():
            where.setdefault(digest(path), str(path.relative_to(MODELS)))
    total = 0
    for heading, names in FORMS.items():
        for name, goldens in names.items():
            folder, entry = args.out / name, known[name]
            folder.mkdir(parents=True)
            files = {}
            for path in sorted((args.source / name).rglob("*")):
                if not path.is_file():
                    continue
                key, relative = digest(path), str(path.relative_to(args.source / name))
                same = others.get((goldens, relative)) if heading in DECODERS else None
                if same is not None and path.stem in ("vision_encoder", "embed_tokens"):
                    files[relative] = same
                    continue
                if key not in where:
                    packed = folder / f"{path.name}.gz"
                    packed.write_bytes(gz.compressed(path.read_bytes()))
                    where[key] = str(packed.relative_to(MODELS) if args.out.is_relative_to(MODELS) else packed)
                    total += packed.stat().st_size
                files[relative] = where[key]
                if goldens and heading in DECODERS:
                    others.setdefault((goldens, relative), where[key])
            facts = {
                "heading": heading,
                "how": entry["how"],
                "goldens": goldens,
                # What keeps the unmodified files from running, if anything does.
                "error": entry.get("error"),
                "single_steps": name in SINGLE_STEPS,
                "files": files,
            }
            (folder / "form.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{sum(map(len, FORMS.values()))} forms, {total / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
