"""Clips of 8 frames in which something moves and something changes, and questions about them: scene.py's sibling.

A frame is 98 x 98 pixels, 7 x 7 patches. One tile moves from patch to patch, one or two stay; on one of them another
digit or shape appears half-way. What was there at first is on the first frames only, what is there at last on the last.
"""

from dataclasses import dataclass, replace

import numpy as np

import scene
from scene import COLOUR_NAMES, DIGITS, LETTERS, PATCH, SHAPES, Tile, pick

FRAMES, GRID = 8, 7
SIDE = GRID * PATCH
WAYS = [(0, -1), (0, 1), (-1, 0), (1, 0)]
FORMS = {
    "first": ["What is on the {} tile at first?", "What does the {} tile show at first?"],
    "last": ["What is on the {} tile at last?", "What does the {} tile show at last?"],
    "colour first": [
        "What colour is the tile with the {} at first?",
        "Which colour has the tile with the {} at first?",
    ],
    "colour last": ["What colour is the tile with the {} at last?", "Which colour has the tile with the {} at last?"],
    "digit": scene.FORMS["digit"],
    "shape": scene.FORMS["shape"],
    "letter": scene.FORMS["letter"],
}


@dataclass
class Clip:
    """Frames [FRAMES, SIDE, SIDE, 3] uint8 and the tiles as they lie in the first one.

    On the tile of number `changing` is `after` from some frame on.
    """

    pixels: np.ndarray
    tiles: list[Tile]
    changing: int
    after: str

    def contents(self, last: bool) -> list[str]:
        """What is on each tile in the first frame, or in the last one."""
        return [self.after if last and i == self.changing else t.content for i, t in enumerate(self.tiles)]


def clip(rng: np.random.Generator, split: str) -> Clip:
    """Draws a clip."""
    texture = scene.textures(split)[rng.integers(len(scene.textures(split)))]
    top, left = rng.integers(SIDE, size=2)
    levels = rng.integers(90, 190) + (np.arange(7) - 3)[:, None] * rng.uniform(1, 7) + rng.integers(-10, 11, 3)
    ground = np.round(levels).astype(np.float32)[texture[top : top + SIDE, left : left + SIDE]]

    way = pick(rng, WAYS)
    span = int(rng.integers(2, 5))
    dy, dx = (d * span for d in way)
    row = int(rng.integers(max(0, -dy), GRID - 2 - max(0, dy)))
    column = int(rng.integers(max(0, -dx), GRID - 2 - max(0, dx)))
    colours = rng.permutation(len(COLOUR_NAMES))

    def content() -> str:
        return pick(rng, DIGITS if rng.random() < 0.6 else SHAPES)

    def tile(row: int, column: int, colour: int) -> Tile:
        return Tile(colour, row, column, content(), pick(rng, LETTERS), int(rng.integers(4)))

    tiles = [tile(row, column, int(colours[0]))]
    path = {(row + dy * k // span, column + dx * k // span) for k in range(span + 1)}
    wanted = 1 + int(rng.integers(1, 3))
    for _ in range(40):
        if len(tiles) == wanted:
            break
        r, c = (int(v) for v in rng.integers(0, GRID - 2, 2))
        if any(abs(r - y) < 3 and abs(c - x) < 3 for y, x in [*path, *((t.top, t.left) for t in tiles[1:])]):
            continue
        tiles.append(tile(r, c, int(colours[len(tiles)])))
    changing, since = int(rng.integers(len(tiles))), int(rng.integers(3, 6))
    after = tiles[changing].content
    while after == tiles[changing].content:
        after = content()
    for _ in range(int(rng.integers(0, 4))):
        r, c = (int(v) for v in rng.integers(0, GRID, 2))
        if any(-1 < r - y < 3 and -1 < c - x < 3 for y, x in [*path, *((t.top, t.left) for t in tiles[1:])]):
            continue
        mask = scene.shapes(pick(rng, SHAPES), int(rng.integers(9, 13)))
        scene.paste(ground, mask, r * PATCH + 1, c * PATCH + 1, scene.shade(rng, int(colours[rng.integers(3, 8)])))

    def stamp(tile: Tile, look: int):
        return scene.stamp(np.random.default_rng(look), split, tile)

    looks = [int(look) for look in rng.integers(2**32, size=len(tiles))]
    stamps = [stamp(*one) for one in zip(tiles, looks)]
    changed = stamp(replace(tiles[changing], content=after), looks[changing])
    frames = np.empty((FRAMES, SIDE, SIDE, 3), np.uint8)
    for number in range(FRAMES):
        pixels = ground.copy()
        moved = round(span * number / (FRAMES - 1))
        for index, one in enumerate(tiles):
            y, x = (moved * d for d in way) if index == 0 else (0, 0)
            stamp = changed if index == changing and number >= since else stamps[index]
            stamp(pixels, one.top + y, one.left + x)
        frames[number] = np.clip(np.round(pixels), 0, 255)
    return Clip(frames, tiles, changing, after)


def ask(rng: np.random.Generator, made: Clip, count: int) -> list[tuple[str, str, str]]:
    """`count` different questions about a clip, if so many can be asked: (type, question, answer)."""
    return scene.in_turn(rng, tuple(FORMS), count, lambda kind: question(rng, made, kind))


def question(rng: np.random.Generator, made: Clip, kind: str) -> tuple[str, str, str] | None:
    """A question of a type, or None if nothing of this type can be asked about the clip."""
    numbers = list(range(len(made.tiles)))
    shown = made.contents("last" in kind)
    if kind in ("digit", "shape"):  # of a tile on which nothing changes
        numbers = [i for i in numbers if i != made.changing and (shown[i] in DIGITS) == (kind == "digit")]
    elif "colour" in kind:
        numbers = [i for i in numbers if shown.count(shown[i]) == 1]
    if not numbers:
        return None
    index = pick(rng, numbers)
    if kind != "letter" and made.changing in numbers and rng.random() < 0.5:
        index = made.changing
    tile, name = made.tiles[index], COLOUR_NAMES[made.tiles[index].colour]
    form = pick(rng, FORMS[kind])
    if "colour" in kind:
        what = shown[index]
        return kind, form.format(f"digit {what}" if what in DIGITS else what), name
    return kind, form.format(name), tile.letter if kind == "letter" else shown[index]
