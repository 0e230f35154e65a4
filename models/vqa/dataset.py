"""Writes pictures or clips of one split, and questions about them, as a data set for `duet eval`.

    python models/vqa/dataset.py --split test --pictures 300 --out models/vqa/test
    python models/vqa/dataset.py --split test --clips 100 --out models/vqa/test-clips

Both have few colours and are stored without loss, so that every program that reads them has the same pixels. A clip is
a GIF; clips that have a frame of more than 256 colours are left out.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import GifImagePlugin, Image

import clip
import scene

SEEDS = {"train": 31, "val": 32, "test": 33}


def pictures(split: str, count: int, questions: int):
    """The scenes of a data set with their questions, always the same: (scene, [(type, question, answer)])."""
    rng = np.random.default_rng(SEEDS[split])
    for _ in range(count):
        made = scene.scene(rng, split)
        yield made, scene.ask(rng, made, questions)


def clips(split: str, count: int, questions: int):
    """The same of clips: (clip, frames as pictures with a palette, [(type, question, answer)])."""
    rng = np.random.default_rng(SEEDS[split] + 10)
    while count > 0:
        made = clip.clip(rng, split)
        frames = [few_colours(frame) for frame in made.pixels]
        if None not in frames:
            yield made, frames, clip.ask(rng, made, questions)
            count -= 1


def few_colours(pixels: np.ndarray) -> Image.Image | None:
    """[H, W, 3] uint8 as a picture with a palette of its own, or None if there are too many colours."""
    colours, index = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)
    if len(colours) > 256:
        return None
    picture = Image.fromarray(index.reshape(pixels.shape[:2]).astype(np.uint8), "P")
    picture.putpalette(colours.tobytes())
    return picture


def save_clip(frames: list[Image.Image], pixels: np.ndarray, path: Path) -> None:
    """Writes a GIF of whole frames, equal ones too (Pillow's writer drops these), and sees that it holds the very
    pixels."""
    blocks = list(GifImagePlugin.getheader(frames[0], info={"duration": 250})[0])
    for frame in frames:
        blocks += GifImagePlugin.getdata(frame, (0, 0), duration=250, include_color_table=True)
    path.write_bytes(b"".join(blocks) + b";")
    with Image.open(path) as read:
        if read.n_frames != len(frames):
            raise RuntimeError(f"{path}: {read.n_frames} frames were written of {len(frames)}")
        for number, frame in enumerate(pixels):
            read.seek(number)
            if not np.array_equal(np.asarray(read.convert("RGB")), frame):
                raise RuntimeError(f"{path}: frame {number} was written with other colours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", choices=scene.SPLITS, required=True)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--pictures", type=int, default=300)
    what.add_argument("--clips", type=int)
    parser.add_argument("--questions", type=int, default=6)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    folder = "images" if args.clips is None else "clips"
    (args.out / folder).mkdir(parents=True, exist_ok=True)
    lines = []

    def add(name: str, key: str, number: int, asked: list[tuple[str, str, str]]) -> None:
        for index, (kind, question, answer) in enumerate(asked):
            one = {"id": f"{number:03}-{index}", key: name, "question": question, "answer": answer, "type": kind}
            lines.append(json.dumps(one))

    if args.clips is None:
        for number, (made, asked) in enumerate(pictures(args.split, args.pictures, args.questions)):
            name = f"images/{number:03}.png"
            Image.fromarray(made.pixels).save(args.out / name, "PNG", optimize=True)
            add(name, "image", number, asked)
    else:
        for number, (made, frames, asked) in enumerate(clips(args.split, args.clips, args.questions)):
            name = f"clips/{number:03}.gif"
            save_clip(frames, made.pixels, args.out / name)
            add(name, "video", number, asked)
    (args.out / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    name = f"tiles, {args.split}" if args.clips is None else f"moving tiles, {args.split}"
    about = {"schema_version": 1, "name": name, "metric": "exact", "max_new_tokens": 3}
    (args.out / "dataset.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    print(f"{args.out}: {args.clips or args.pictures} {folder}, {len(lines)} questions")


if __name__ == "__main__":
    main()
