"""Writes pictures and questions of one split as a data set for `duet eval`.

    python models/vqa/dataset.py --split test --pictures 300 --out models/vqa/test

Pictures have few colours and are stored without loss, so that every program that reads them has the same pixels.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

import scene

SEEDS = {"train": 31, "val": 32, "test": 33}


def pictures(split: str, count: int, questions: int):
    """The scenes of a data set with their questions, always the same: (scene, [(type, question, answer)])."""
    rng = np.random.default_rng(SEEDS[split])
    for _ in range(count):
        made = scene.scene(rng, split)
        yield made, scene.ask(rng, made, questions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", choices=scene.SPLITS, required=True)
    parser.add_argument("--pictures", type=int, default=300)
    parser.add_argument("--questions", type=int, default=6)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    (args.out / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (made, asked) in enumerate(pictures(args.split, args.pictures, args.questions)):
        name = f"images/{number:03}.png"
        Image.fromarray(made.pixels).save(args.out / name, "PNG", optimize=True)
        for index, (kind, question, answer) in enumerate(asked):
            one = {"id": f"{number:03}-{index}", "image": name, "question": question, "answer": answer, "type": kind}
            lines.append(json.dumps(one))
    (args.out / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    about = {"schema_version": 1, "name": f"tiles, {args.split}", "metric": "exact", "max_new_tokens": 3}
    (args.out / "dataset.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    print(f"{args.out}: {args.pictures} pictures, {len(lines)} questions")


if __name__ == "__main__":
    main()
