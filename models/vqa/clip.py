"""Clips of 8 frames in which something moves and something changes, and questions about them: scene.py's sibling.

A frame is 98 x 98 pixels, 7 x 7 patches. One tile moves from patch to patch, one or two stay; on one of them another
digit or shape appears half-way. Only a comparison of frames tells where a tile goes, and which frame it is what was
there first.
"""

from dataclasses import dataclass, replace

import numpy as np

import scene
from scene import COLOUR_NAMES, DIGITS, LETTERS, PATCH, SHAPES, Tile, pick

FRAMES, GRID = 8, 7
SIDE = GRID * PATCH
WAYS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
STILL = "nowhere"
FORMS = {
    "way": ["Which way does the {} tile move?", "Where does the {} tile go?"],
    "mover": ["What colour is the tile that moves?", "Which colour has the tile that moves?"],
    "first": ["What is on the {} tile at first?", "What does the {} tile show at first?"],
    "last": ["What is on the {} tile at last?", "What does the {} tile show at last?"],
    "digit": scene.FORMS["digit"],
    "shape": scene.FORMS["shape"],
    "letter": scene.FORMS["letter"],
}


@dataclass
class Clip:
    """Frames [FRAMES, SIDE, SIDE, 3] uint8 and the tiles as they lie in the first one.

    The first tile moves `way`; on the tile of number `changing` is `after` from some frame on.
    """

    pixels: np.ndarray
    tiles: list[Tile]
    way: str
    changing: int
    after: str

    def last(self, index: int) -> str:
        """What is on a tile in the last frame."""
        return self.after if index == self.changing else self.tiles[index].content


def clip(rng: np.random.Generator, split: str) -> Clip:
    """Draws a clip."""
    texture = scene.textures(split)[rng.integers(len(scene.textures(split)))]
    top, left = rng.integers(SIDE, size=2)
    levels = rng.integers(90, 190) + (np.arange(7) - 3)[:, None] * rng.uniform(1, 7) + rng.integers(-10, 11, 3)
    ground = np.round(levels).astype(np.float32)[texture[top : top + SIDE, left : left + SIDE]]

    way = pick(rng, list(WAYS))
    span = int(rng.integers(2, 5))
    dy, dx = (d * span for d in WAYS[way])
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
            y, x = (moved * d for d in WAYS[way]) if index == 0 else (0, 0)
            stamp = changed if index == changing and number >= since else stamps[index]
            stamp(pixels, one.top + y, one.left + x)
        frames[number] = np.clip(np.round(pixels), 0, 255)
    return Clip(frames, tiles, way, changing, after)


def ask(rng: np.random.Generator, made: Clip, count: int) -> list[tuple[str, str, str]]:
    """`count` different questions about a clip, if so many can be asked: (type, question, answer)."""
    asked: list[tuple[str, str, str]] = []
    seen: set[str] = set()
    order: list[str] = []
    for _ in range(8 * count):
        if len(asked) == count:
            break
        if not order:
            order = [str(k) for k in rng.permutation(list(FORMS))]
        one = question(rng, made, order.pop())
        if one is not None and one[1] not in seen:
            seen.add(one[1])
            asked.append(one)
    return asked


def question(rng: np.random.Generator, made: Clip, kind: str) -> tuple[str, str, str] | None:
    """A question of a type, or None if nothing of this type can be asked about the clip."""
    numbers = list(range(len(made.tiles)))
    if kind in ("digit", "shape"):  # of a tile on which nothing changes
        numbers = [i for i in numbers if i != made.changing and (made.tiles[i].content in DIGITS) == (kind == "digit")]
    if not numbers:
        return None
    index = pick(rng, numbers)
    if kind == "way" and rng.random() < 0.5 or kind == "mover":
        index = 0
    elif kind in ("first", "last") and rng.random() < 0.5:
        index = made.changing
    tile = made.tiles[index]
    name = COLOUR_NAMES[tile.colour]
    answers = {
        "way": made.way if index == 0 else STILL,
        "mover": name,
        "last": made.last(index),
        "letter": tile.letter,
    }
    return kind, pick(rng, FORMS[kind]).format(name), answers.get(kind, tile.content)
