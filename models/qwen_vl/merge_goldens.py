"""Records what stage 1 of the PyTorch reference gives for the vision towers of this folder.

    python models/qwen_vl/merge_goldens.py [--out models/qwen_vl/goldens]

Writes OUT/merge.json and OUT/merge.safetensors for Qwen2.5-VL's tower, OUT/merge-qwen2.* for Qwen2-VL's. Each case
is a recipe and a list of images, each an image grid (frames, rows and columns of patches) and the seed of its
pixels, which are not stored: a reader makes them itself (`pixels`). A case is refused if double precision would
choose other tokens, or if a choice was so close that another right implementation could choose otherwise; the tower
of the reference has to give what Transformers' does.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import build
from build import sibling

sys.path.insert(1, str(Path(__file__).parents[1]))
from reference.order import Margins  # noqa: E402
from reference.qwen_tower import look, merge_grid  # noqa: E402
from reference.recipe import parse  # noqa: E402

shared = sibling("goldens")

GOLDENS = Path(__file__).parent / "goldens"
# Frames, rows, columns in patches; 16, 15, 7, 4, 30 (two frames), 130 and 1 tokens. All but the first have windows
# that are cut off.
SQUARE, TALL, WIDE, SMALL, FRAMES, LARGE, ONE = (
    (1, 8, 8),
    (1, 10, 6),
    (1, 2, 14),
    (1, 4, 4),
    (2, 6, 10),
    (1, 20, 26),
    (1, 2, 2),
)
ALL = (SQUARE, TALL, WIDE, SMALL, FRAMES, LARGE, ONE)
# Of the form that is for one grid (vision_forms.py); 35 tokens.
FIXED = (1, 10, 14)
SEEDED = (*ALL, FIXED)


@dataclass(frozen=True)
class Case:
    what: str
    merge: dict
    grids: tuple[tuple[int, int, int], ...]


def merge(dominant, contextual, **options) -> dict:
    return {"dominant": dominant, "contextual": contextual, **options}


CASES = {
    "keep-all": Case("ratio 1 and no contextual token: the unmodified features", merge(1.0, 0), ALL),
    "counts": Case("budgets below, at and above what is there", merge(12, 4), SEEDED),
    "narrow": Case("a pool that leaves residuals out", merge(5, 2, cluster_width=2), SEEDED),
    "wide": Case("a pool of all residuals, anchors apart", merge(30, 9, cluster_width=20), (LARGE, FRAMES)),
    "large": Case("budgets that only the largest grid exceeds", merge(54, 10), (LARGE, FRAMES, SQUARE)),
    "published": Case("the published budgets, which no grid exceeds", merge(540, 100), (LARGE, SMALL)),
    "ratios": Case("ratios of each grid's own count", merge(0.5, 0.1), SEEDED),
    "ratio-rest": Case("ratios that leave nothing over", merge(0.6, 0.5), (LARGE, TALL, WIDE)),
    "no-contextual": Case("dominant tokens alone", merge(6, 0), ALL),
    "one-contextual": Case("a single anchor takes the whole pool", merge(0.4, 1), (LARGE, TALL, WIDE)),
    "uniform": Case("selector uniform", merge(9, 3, selector="uniform"), SEEDED),
    "uniform-ratios": Case("selector uniform, ratios", merge(0.3, 0.15, selector="uniform"), (LARGE, FRAMES, WIDE)),
    "local": Case("selector local", merge(5, 3, selector="local", cluster_width=3), SEEDED),
    "local-ratios": Case("selector local, ratios", merge(0.3, 0.15, selector="local"), (LARGE, FRAMES, WIDE)),
}
# What a tower without windows is asked.
QWEN2 = ["keep-all", "counts", "narrow", "large", "ratios", "uniform", "local"]


def pixels(grid: tuple[int, int, int], seed: int) -> np.ndarray:
    """[patches, 3 * 2 * patch * patch], see inputs.py."""
    return shared.inputs.hashed(seed, (int(np.prod(grid)), 3 * 2 * build.SIZE.patch**2))


def seed_of(grid: tuple[int, int, int]) -> int:
    return SEEDED.index(grid) + 1


def play(case: Case, net) -> tuple[list[np.ndarray], list[dict], float]:
    """Features and facts of each image, and the smallest margin."""
    to, _ = parse({"passes": [{"token_merge": case.merge}]})
    dtype, margins = net.lm_head.weight.dtype, Margins()
    features, images = [], []
    for grid in case.grids:
        seen = look(net, torch.from_numpy(pixels(grid, seed_of(grid))).to(dtype), grid)
        got = merge_grid(seen, to, margins)
        features.append(got.features.numpy())
        images.append(
            {
                "grid": list(grid),
                "seed": seed_of(grid),
                "tokens": seen.features.shape[0],
                "dominant": got.dominant,
                "anchors": got.anchors,
                "members": got.members,
                "kept": got.kept,
            }
        )
    return features, images, margins.smallest


def from_transformers(net) -> float:
    """How far the reference's tower is from Transformers' own, over all grids."""
    worst = 0.0
    for grid in SEEDED:
        given = torch.from_numpy(pixels(grid, seed_of(grid)))
        want = net.model.visual(given, grid_thw=torch.tensor([grid])).pooler_output
        worst = max(worst, float((look(net, given, grid).features - want).abs().max()))
    return worst


def record(name: str, make, cases: list[str], out: Path) -> None:
    """Writes OUT/NAME.json and OUT/NAME.safetensors for the model that `make` gives."""
    net, exact = make(), make().double()
    if not (far := from_transformers(net)) < 1e-5:
        raise RuntimeError(f"{name}: Transformers' tower gives features that differ by {far:.1e}")
    tensors, index = {}, []
    for key in cases:
        case = CASES[key]
        features, images, margin = play(case, net)
        more, same, _ = play(case, exact)
        shared.settled(f"{name}, {key}", images, same, margin)
        error = max(float(np.abs(a - b).max()) for a, b in zip(features, more) if a.size)
        tensors |= {f"{key}.{i}.features": np.ascontiguousarray(f) for i, f in enumerate(features)}
        recipe = {"version": 1, "passes": [{"token_merge": case.merge}]}
        closest = margin if np.isfinite(margin) else None
        index.append({"name": key, "what": case.what, "recipe": recipe, "smallest_margin": closest, "images": images})
        print(f"{name:16} {key:16} margin {margin:8.1e}  fp32 against fp64 {error:.1e}")
    shared.inputs.save(tensors, out / f"{name}.safetensors")
    head = {"schema_version": 1, "pixel_width": 3 * 2 * build.SIZE.patch**2, "cases": index}
    (out / f"{name}.json").write_text(shared.compact(head) + "\n", encoding="utf-8")
    print(f"{name:16} the tower against Transformers: {far:.1e}")


def main() -> int:
    out = shared.target(__doc__, GOLDENS)
    record("merge", build.model, list(CASES), out)
    record("merge-qwen2", build.qwen2, QWEN2, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
