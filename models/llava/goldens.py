"""Records what the PyTorch reference gives for every case of cases.py.

    python models/llava/goldens.py [--out models/llava/goldens] [SET ...]

Writes OUT/SET/CASE.safetensors and OUT/SET/cases.json (see models/README.md for their fields),
OUT/pixels.safetensors.gz, OUT/preprocess.safetensors.gz and OUT/tokenizer.json. A case is refused if double
precision would choose other tokens, or if a choice was so close that another right implementation
could choose otherwise.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import build
import check
import inputs
import tokens

sys.path.insert(0, str(Path(__file__).parents[1]))
from cases import SETS, Case, Turn  # noqa: E402
from reference.llava import Llava  # noqa: E402
from reference.recipe import parse  # noqa: E402

GOLDENS = Path(__file__).parent / "goldens"
STEPS = 3
# Relative distance between a chosen and a rejected score; fp32 sums differ by about 1e-6.
MARGIN = 2e-5


@dataclass
class Prompt:
    """A batch of tokenized prompts, padded on the left, one placeholder for each feature."""

    ids: np.ndarray  # int64 [B, S]
    mask: np.ndarray  # int64 [B, S]
    salient: np.ndarray  # bool [B, S]


def tokenize(tokenizer, turn: Turn, features: list[int], first: bool) -> Prompt:
    """`features`: of each image, in the order of the placeholders."""
    rows, marks, counts = [], [], iter(features)
    for prompt in turn.prompts:
        encoded = tokenizer.encode(prompt, add_special_tokens=first)
        ids, marked = [], []
        for token, (start, end) in zip(encoded.ids, encoded.offsets):
            count = next(counts) if token == tokens.IMAGE else 1
            spans = [(prompt.find(p), prompt.find(p) + len(p)) for p in turn.salient or () if p in prompt]
            ids += [token] * count
            marked += [end > start and any(start < e and end > s for s, e in spans)] * count
        rows.append(ids)
        marks.append(marked)
    length = max(map(len, rows))
    pad = [length - len(r) for r in rows]
    return Prompt(
        np.array([[tokens.PAD] * p + r for p, r in zip(pad, rows)], np.int64),
        np.array([[0] * p + [1] * len(r) for p, r in zip(pad, rows)], np.int64),
        np.array([[False] * p + m for p, m in zip(pad, marks)]),
    )


def images(pictures: dict[str, np.ndarray], names: list[str], dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.from_numpy(pictures[n]).to(dtype) for n in names]


def play(case: Case, net, pictures: dict, tokenizer, kind=Llava, images=images) -> tuple[dict, dict, float]:
    """Runs a case; returns tensors, facts for the JSON file, and the smallest margin.

    `kind` is the reference, `images` gives what it encodes.
    """
    model = kind(net, *parse(case.recipe))
    dtype = net.lm_head.weight.dtype
    tensors, turns, past, seen = {}, [], None, None

    def call(ids, mask, features=None, salient=None, **more):
        positions = check.positions_of(mask)[:, -ids.shape[1] :]
        arrays = (torch.from_numpy(x) for x in (ids, mask, positions))
        return model.call(*arrays, features, past, salient, **more), positions

    for index, turn in enumerate(case.turns):
        names = [name for row in turn.images for name in row]
        features, merged, counts, more = None, [], [0], {}
        if names:
            encoded, features, merged = model.encode(images(pictures, names, dtype))
            counts = [len(rows) for rows in features]
            more = {"gone": model.gone(features, merged)}
            tensors[f"turn{index}.image_features"] = encoded.numpy()
        prompt = tokenize(tokenizer, turn, counts, first=index == 0)
        mask = prompt.mask if seen is None else np.concatenate([seen, prompt.mask], axis=1)
        salient = torch.from_numpy(prompt.salient) if turn.salient is not None else None
        result, positions = call(prompt.ids, mask, features, salient, **more)
        past = result.cache
        tensors[f"turn{index}.input_ids"] = prompt.ids
        tensors[f"turn{index}.attention_mask"] = mask
        tensors[f"turn{index}.position_ids"] = positions
        if turn.salient is not None:
            tensors[f"turn{index}.salient_token_mask"] = prompt.salient
        tensors[f"turn{index}.logits"] = result.logits.numpy()
        facts = {
            "prompts": list(turn.prompts),
            "images": [list(row) for row in turn.images],
            "features_per_image": counts[0] if len(set(counts)) == 1 else counts,
            "visual_tokens": (prompt.ids == tokens.IMAGE).sum(axis=1).tolist(),
            **({"kept": model.kept} if getattr(model, "kept", None) and names else {}),
            "merged": [{"dominant": m.dominant, "anchors": m.anchors, "members": m.members} for m in merged],
            "drops": [
                {
                    "after_layer": d.after_layer,
                    "visual_tokens": d.visual.tolist(),
                    "kept": d.kept.tolist(),
                    "original": d.origin.tolist(),
                }
                for d in result.drops
            ],
            "cache_lengths": [c.real.shape[1] for c in past],
            "decode": [],
        }
        logits = result.logits
        for step in range(STEPS):
            fed = logits.argmax(dim=-1, keepdim=True).numpy()
            mask = np.concatenate([mask, np.ones_like(fed)], axis=1)
            result, positions = call(fed, mask)
            past, logits = result.cache, result.logits
            tensors[f"turn{index}.step{step}.input_ids"] = fed
            tensors[f"turn{index}.step{step}.position_ids"] = positions
            tensors[f"turn{index}.step{step}.logits"] = logits.numpy()
            facts["decode"].append(fed.flatten().tolist())
        facts["cache_lengths_after_decode"] = [c.real.shape[1] for c in past]
        turns.append(facts)
        seen = mask
    return tensors, {"turns": turns}, model.margins.smallest


def settled(name: str, facts: object, exact: object, margin: float) -> None:
    """Refuses a case, of whose choices `exact` are those in double precision, that another right implementation
    could decide otherwise."""
    if facts != exact:
        raise RuntimeError(f"{name}: double precision chooses other tokens")
    if margin < MARGIN:
        raise RuntimeError(f"{name}: a choice was made by {margin:.1e}, expected at least {MARGIN:.0e}")


def target(description: str, default: Path) -> Path:
    """The folder that the command line of a script names by --out; sets PyTorch up for recording there."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    args.out.mkdir(parents=True, exist_ok=True)
    return args.out


def compact(value: object, depth: int = 0) -> str:
    """JSON with objects spread over lines and arrays of numbers on one."""
    pad = "  " * (depth + 1)
    if isinstance(value, dict) and value:
        inner = ",\n".join(f"{pad}{json.dumps(k)}: {compact(v, depth + 1)}" for k, v in value.items())
        return "{\n" + inner + "\n" + "  " * depth + "}"
    if isinstance(value, list) and any(isinstance(v, dict) for v in value):
        return "[\n" + ",\n".join(pad + compact(v, depth + 1) for v in value) + "\n" + "  " * depth + "]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def record(
    name: str,
    cases: dict[str, Case],
    out: Path,
    model=build.model,
    size: build.Size | None = None,
    optional=(),
    pictures: dict | None = None,
    pixels: str | None = None,
    **how,
) -> None:
    """Records set `name`; `model(name)` makes its model, of dimensions `size`.

    `pictures` by name, from the file `pixels`, are by default those of inputs.py; `how` is what `play` takes.

    Cases of `optional` are left out if a choice in them is close: they were chosen with other weights in mind.
    """
    size = size or build.SIZES[name]
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.safetensors"):
        old.unlink()
    net, exact = model(name), model(name).double()
    pictures = pictures or inputs.pictures(size.image)
    tokenizer = tokens.tokenizer()
    index = []
    for key, case in cases.items():
        tensors, facts, margin = play(case, net, pictures, tokenizer, **how)
        more, same, _ = play(case, exact, pictures, tokenizer, **how)
        if key in optional and facts == same and margin < MARGIN:
            print(f"{name:8} {key:28} margin {margin:8.1e}  too close to be a golden: left out")
            continue
        settled(f"{name}/{key}", facts, same, margin)
        error = max(
            float(np.abs(tensors[t] - more[t]).max() / more[t].std()) for t in tensors if tensors[t].dtype == np.float32
        )
        inputs.save({k: np.ascontiguousarray(v) for k, v in sorted(tensors.items())}, folder / f"{key}.safetensors")
        # JSON has no infinity: null where nothing was chosen.
        closest = margin if np.isfinite(margin) else None
        index.append({"name": key, "what": case.what, "recipe": case.recipe, "smallest_margin": closest, **facts})
        print(f"{name:8} {key:28} margin {margin:8.1e}  fp32 against fp64 {error:.1e} of a standard deviation")
    head = {
        "schema_version": 1,
        "model": name,
        "layers": size.layers,
        "patches": size.patches,
        "image_token_id": tokens.IMAGE,
        "pixels": pixels or f"{'../pixels' if size.image == 126 else '../preprocess'}.safetensors.gz",
        "cases": index,
    }
    (folder / "cases.json").write_text(compact(head) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=GOLDENS)
    parser.add_argument("names", nargs="*", default=list(SETS), metavar="SET", help=", ".join(SETS))
    args = parser.parse_args()
    unknown = [n for n in args.names if n not in SETS]
    if unknown:
        parser.error(f"unknown {', '.join(unknown)}; expected some of {', '.join(SETS)}")
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    inputs.record(args.out)
    for name in args.names:
        # A set of its own for the same weights: mha-placed.
        weights = name.split("-")[0]
        record(name, SETS[name], args.out, model=lambda _, w=weights: build.model(w), size=build.SIZES[weights])
    return 0


if __name__ == "__main__":
    sys.exit(main())
