"""How the times of `cargo bench --bench rewriting` grow with the number of nodes.

    python benches/growth.py [--target target] [--most 1.3]

Prints the medians of the last run, and for each step the exponent e of time ~ nodes^e between neighbouring sizes: 1 is
linear. Exits with 1 if a step grows faster than --most between its two largest sizes.
"""

import argparse
import json
import math
import sys
from pathlib import Path

STEPS = ["parse", "verify", "recognise", "rewrite", "write", "diff", "diff-renamed"]


def medians(folder: Path) -> dict[int, float]:
    """Nodes -> seconds."""
    found = {}
    for path in folder.glob("*/new/estimates.json"):
        estimates = json.loads(path.read_text())
        found[int(path.parents[1].name)] = estimates["median"]["point_estimate"] / 1e9
    return dict(sorted(found.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, default=Path("target"), help="cargo's build directory")
    parser.add_argument("--most", type=float, default=1.3, help="largest exponent that is accepted")
    args = parser.parse_args()
    steep = []
    lines = []
    for step in STEPS:
        times = list(medians(args.target / "criterion" / step).items())
        if not times:
            print(f"{step}: no result in {args.target}/criterion; run cargo bench --bench rewriting", file=sys.stderr)
            return 2
        growth = [math.log(t2 / t1) / math.log(n2 / n1) for (n1, t1), (n2, t2) in zip(times, times[1:])]
        if growth and growth[-1] > args.most:
            steep.append(step)
        if not lines:
            sizes = [f"{nodes:,} nodes" for nodes, _ in times]
            lines = [["step", *sizes, *("growth" for _ in growth)], ["---"] * (1 + len(times) + len(growth))]
        lines.append([step, *(f"{t * 1e3:.2f} ms" for _, t in times), *(f"{e:.2f}" for e in growth)])
    print("\n".join("| " + " | ".join(line) + " |" for line in lines))
    for step in steep:
        print(f"{step} grows faster than nodes^{args.most}", file=sys.stderr)
    return 1 if steep else 0


if __name__ == "__main__":
    sys.exit(main())
