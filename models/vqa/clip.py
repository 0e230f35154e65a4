"""Clips of 8 frames with a tile that moves, and questions about them: the video sibling of scene.py.

A frame is 98 x 98 pixels, 7 x 7 patches. One tile moves from patch to patch, one or two stay, small shapes lie between.
Nothing but a comparison of frames tells which tile moves and where to.
"""

from dataclasses import dataclass

import numpy as np

import scene
from scene import COLOUR_NAMES, DIGITS, LETTERS, PATCH, SHAPES, Tile, pick

FRAMES, GRID = 8, 7
SIDE = GRID * PATCH
WAYS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
FORMS = {
    "way": ["Which way does the {} tile move?", "Where does the {} tile go?"],
    "mover": ["What colour is the tile that moves?", "Which colour has the tile that moves?"],
    "moving": ["What is on the tile that moves?", "What does the tile that moves show?"],
    "digit": scene.FORMS["digit"],
    "shape": scene.FORMS["shape"],
    "letter": scene.FORMS["letter"],
}
STILL = "nowhere"


@dataclass
class Clip:
    """Frames [FRAMES, SIDE, SIDE, 3] uint8, the tiles as they lie in the first one; the first tile moves `way`."""

    pixels: np.ndarray
    tiles: list[Tile]
    way: str


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

    def tile(row: int, column: int, colour: int) -> Tile:
        content = pick(rng, DIGITS if rng.random() < 0.6 else SHAPES)
        return Tile(colour, row, column, content, pick(rng, LETTERS), int(rng.integers(4)))

    tiles = [tile(row, column, int(colours[0]))]
    path = {(row + dy * k // span, column + dx * k // span) for k in range(span + 1)}
    wanted = int(rng.integers(1, 3))
    for _ in range(40):
        if len(tiles) == 1 + wanted:
            break
        r, c = (int(v) for v in rng.integers(0, GRID - 2, 2))
        if any(abs(r - y) < 3 and abs(c - x) < 3 for y, x in [*path, *((t.top, t.left) for t in tiles[1:])]):
            continue
        tiles.append(tile(r, c, int(colours[len(tiles)])))
    draw = [scene.stamp(rng, split, t) for t in tiles]
    for _ in range(int(rng.integers(0, 4))):
        r, c = (int(v) for v in rng.integers(0, GRID, 2))
        if any(-1 < r - y < 3 and -1 < c - x < 3 for y, x in [*path, *((t.top, t.left) for t in tiles[1:])]):
            continue
        mask = scene.shapes(pick(rng, SHAPES), int(rng.integers(9, 13)))
        scene.paste(ground, mask, r * PATCH + 1, c * PATCH + 1, scene.shade(rng, int(colours[rng.integers(3, 8)])))
    frames = np.empty((FRAMES, SIDE, SIDE, 3), np.uint8)
    for number in range(FRAMES):
        pixels = ground.copy()
        moved = round(span * number / (FRAMES - 1))
        for index, one in enumerate(tiles):
            step = moved if index == 0 else 0
            one_y, one_x = WAYS[way]
            draw[index](pixels, one.top + one_y * step, one.left + one_x * step)
        frames[number] = np.clip(np.round(pixels), 0, 255)
    return Clip(frames, tiles, way)


def ask(rng: np.random.Generator, made: Clip, count: int) -> list[tuple[str, str, str]]:
    """`count` different questions about a clip: (type, question, answer)."""
    asked: list[tuple[str, str, str]] = []
    seen: set[str] = set()
    order: list[str] = []
    for _ in range(8 * count):
        if len(asked) == count:
            break
        if not order:
            order = [str(k) for k in rng.permutation(list(FORMS))]
        kind = order.pop()
        form, moves = pick(rng, FORMS[kind]), rng.random() < 0.5
        shown = made.tiles if kind in ("way", "letter") else [
            t for t in made.tiles if (t.content in DIGITS) == (kind == "digit")
        ]
        if kind in ("mover", "moving"):
            tile = made.tiles[0]
        elif not shown:
            continue
        else:
            tile = shown[0] if moves else pick(rng, shown)
        name = COLOUR_NAMES[tile.colour]
        answers = {
            "way": made.way if tile is made.tiles[0] else STILL,
            "mover": name,
            "letter": tile.letter,
        }
        question = form.format(name)
        if question not in seen:
            seen.add(question)
            asked.append((kind, question, answers.get(kind, tile.content)))
    return asked
