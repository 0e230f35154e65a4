"""Pictures of tiles, drawn shapes and real handwritten digits, and questions about them.

A picture is 196 x 196 pixels, 14 x 14 patches of 14 pixels. On a textured background lie tiles, each of another
colour, about 3 x 3 patches large. In the middle of a tile is a handwritten digit or a drawn shape about as large as a
patch, in one of its corners a letter of 5 x 7 pixels. Small coloured shapes lie between the tiles. So most of the
patches say little, as in photographs, and what a question asks for is in very few.

The digits are those of scikit-learn's `load_digits` (1,797 digits, the test part of the UCI set "Optical Recognition of
Handwritten Digits", CC BY 4.0). Training, validation and test use different digits, textures and seeds.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits

PATCH, GRID = 14, 14
SIDE = PATCH * GRID
COLOURS = {
    "red": (208, 44, 44),
    "green": (44, 160, 60),
    "blue": (44, 84, 208),
    "yellow": (232, 208, 52),
    "purple": (136, 52, 172),
    "orange": (240, 132, 32),
    "pink": (244, 148, 196),
    "brown": (116, 72, 36),
}
COLOUR_NAMES = list(COLOURS)
DIGITS = [str(d) for d in range(10)]
SHAPES = ["circle", "square", "triangle", "star", "cross", "ring"]
LETTERS = ["C", "E", "H", "K", "L", "T", "U", "X"]
# Kinds of what can be in one patch; 0 is nothing.
GLYPHS = ["", *DIGITS, *(f"tile {s}" for s in SHAPES), *(f"loose {s}" for s in SHAPES), *LETTERS]
GLYPH = {name: i for i, name in enumerate(GLYPHS)}
MOST = 4  # loose shapes of one colour
FONT = {
    "C": "01111 10000 10000 10000 10000 10000 01111",
    "E": "11111 10000 10000 11110 10000 10000 11111",
    "H": "10001 10001 10001 11111 10001 10001 10001",
    "K": "10001 10010 10100 11000 10100 10010 10001",
    "L": "10000 10000 10000 10000 10000 10000 11111",
    "T": "11111 00100 00100 00100 00100 00100 00100",
    "U": "10001 10001 10001 10001 10001 10001 01110",
    "X": "10001 10001 01010 00100 01010 10001 10001",
}
# Each type of question with its forms.
FORMS = {
    "digit": ["What digit is on the {} tile?", "Which digit does the {} tile show?"],
    "shape": ["What shape is on the {} tile?", "Which shape does the {} tile show?"],
    "letter": ["What letter is on the {} tile?", "Which letter does the {} tile show?"],
    "colour": ["What colour is the tile with the {}?", "Which colour has the tile that shows the {}?"],
    "small shape": ["What shape is the small {} one?", "Which shape has the small {} one?"],
    "small colour": ["What colour is the small {}?", "Which colour has the small {}?"],
}
SPLITS = ("train", "val", "test")
# Last digits and texture seeds of each split.
PARTS = {"train": slice(0, 1200), "val": slice(1200, 1450), "test": slice(1450, 1797)}


@dataclass
class Tile:
    """A tile: its colour, its top left patch, the digit or shape in it and the letter in its corner."""

    colour: int
    top: int
    left: int
    content: str
    letter: str
    corner: int


@dataclass
class Scene:
    """A drawn picture [SIDE, SIDE, 3] uint8, what is on it, and what each of its patches shows."""

    pixels: np.ndarray
    tiles: list[Tile]
    loose: list[tuple[str, int]]
    tile_of: np.ndarray  # [GRID * GRID] colour of the tile that a patch lies on, len(COLOURS) for none
    glyph_of: np.ndarray  # [GRID * GRID] index in GLYPHS
    ink_of: np.ndarray  # [GRID * GRID] colour of a loose shape, len(COLOURS) for none
    questions: list[tuple[str, str, str]] = field(default_factory=list)


@cache
def digits(split: str) -> list[list[np.ndarray]]:
    """Masks 0..1 of every digit of a split, ten lists, in several sizes and angles each."""
    data = load_digits()
    order = np.random.default_rng(7).permutation(len(data.target))[PARTS[split]]
    masks: list[list[np.ndarray]] = [[] for _ in range(10)]
    rng = np.random.default_rng(11)
    for index in order:
        picture = Image.fromarray((data.images[index] / 16 * 255).astype(np.uint8))
        picture = picture.resize((24, 24), Image.Resampling.BICUBIC)
        for _ in range(8):
            size = int(rng.integers(12, 15))
            turned = picture.rotate(float(rng.uniform(-12, 12)), Image.Resampling.BICUBIC)
            mask = turned.resize((size, size), Image.Resampling.BOX)
            masks[data.target[index]].append(np.asarray(mask, np.float32) / 255)
    return masks


@cache
def shapes(name: str, size: int) -> np.ndarray:
    """Mask 0..1 of a shape."""
    scale = 8
    s = size * scale
    canvas = Image.new("L", (s, s))
    draw = ImageDraw.Draw(canvas)
    box = (0, 0, s - 1, s - 1)
    if name == "circle":
        draw.ellipse(box, fill=255)
    elif name == "ring":
        draw.ellipse(box, fill=255)
        inner = s * 0.28
        draw.ellipse((inner, inner, s - 1 - inner, s - 1 - inner), fill=0)
    elif name == "square":
        draw.rectangle((s * 0.08, s * 0.08, s * 0.92, s * 0.92), fill=255)
    elif name == "triangle":
        draw.polygon([(s / 2, 0), (s - 1, s - 1), (0, s - 1)], fill=255)
    elif name == "cross":
        draw.rectangle((s * 0.35, 0, s * 0.65, s), fill=255)
        draw.rectangle((0, s * 0.35, s, s * 0.65), fill=255)
    elif name == "star":
        angles = [(np.pi * (k / 5 - 0.5), 0.5 if k % 2 == 0 else 0.2) for k in range(10)]
        draw.polygon([(s * (0.5 + r * np.cos(a)), s * (0.52 + r * np.sin(a))) for a, r in angles], fill=255)
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX), np.float32) / 255


@cache
def letter(name: str) -> np.ndarray:
    return np.array([[float(c) for c in row] for row in FONT[name].split()], np.float32)


@cache
def textures(split: str) -> list[np.ndarray]:
    """Backgrounds [2 * SIDE, 2 * SIDE] uint8 of few levels: stripes, checks, dots, soft noise."""
    rng = np.random.default_rng({"train": 1, "val": 2, "test": 3}[split] * 1000)
    y, x = np.mgrid[0 : 2 * SIDE, 0 : 2 * SIDE].astype(np.float32)
    made = []
    for kind in range(96 if split == "train" else 24):
        angle, period = rng.uniform(0, np.pi), rng.uniform(6, 40)
        along = x * np.cos(angle) + y * np.sin(angle)
        across = y * np.cos(angle) - x * np.sin(angle)
        match kind % 4:
            case 0:
                value = np.sin(along * 2 * np.pi / period)
            case 1:
                value = np.sign(np.sin(along * 2 * np.pi / period) * np.sin(across * 2 * np.pi / period))
            case 2:
                value = (np.cos(along * 2 * np.pi / period) + np.cos(across * 2 * np.pi / period) > 1.2) * 2.0 - 1
            case _:
                coarse = rng.normal(size=(24, 24)).astype(np.float32)
                soft = Image.fromarray(coarse).resize((2 * SIDE, 2 * SIDE), Image.Resampling.BICUBIC)
                value = np.clip(np.asarray(soft), -1.5, 1.5) / 1.5
        made.append(np.round((value + 1) * 3).astype(np.uint8))  # 0 to 6
    return made


def paste(pixels: np.ndarray, mask: np.ndarray, top: int, left: int, ink: np.ndarray) -> None:
    """Draws a mask in a colour, cut off at the picture's edges."""
    height, width = mask.shape
    y, x = max(top, 0), max(left, 0)
    below, right = min(top + height, pixels.shape[0]), min(left + width, pixels.shape[1])
    part = mask[y - top : below - top, x - left : right - left, None]
    area = pixels[y:below, x:right]
    area += part * (ink - area)


def shade(rng: np.random.Generator, colour: int) -> np.ndarray:
    return np.clip(np.array(COLOURS[COLOUR_NAMES[colour]], np.float32) + rng.integers(-12, 13, 3), 0, 255)


def pick(rng: np.random.Generator, items):
    return items[int(rng.integers(len(items)))]


def stamp(rng: np.random.Generator, split: str, tile: Tile):
    """How a tile looks, as a function that draws it with its top left patch at a row and a column."""
    near, far = rng.integers(0, 4, 2), rng.integers(0, 4, 2)
    colour = shade(rng, tile.colour)
    dark = colour @ np.array([0.3, 0.59, 0.11]) > 120
    ink = np.clip(np.full(3, 10.0 if dark else 245.0, np.float32) + rng.integers(-10, 11), 0, 255)
    if tile.content in DIGITS:
        mask = pick(rng, digits(split)[int(tile.content)])
    else:
        mask = shapes(tile.content, int(rng.integers(10, 14)))
    middle = PATCH + (PATCH - len(mask)) // 2 + rng.integers(-2, 3, 2)
    written = rng.integers(-1, 2, 2) + (4, 5) + np.array([tile.corner // 2, tile.corner % 2]) * 2 * PATCH

    def draw(pixels: np.ndarray, row: int, column: int) -> None:
        corner = np.array([row, column]) * PATCH
        (y0, x0), (y1, x1) = corner + near, corner + 3 * PATCH - far
        pixels[y0:y1, x0:x1] = colour
        paste(pixels, mask, *(corner + middle), ink)
        paste(pixels, letter(tile.letter), *(corner + written), ink)

    return draw


def scene(
    rng: np.random.Generator, split: str, tiles: tuple[int, int] = (4, 6), loose: tuple[int, int] = (3, 8)
) -> Scene:
    """Draws a picture with a number of tiles and of loose shapes in the given ranges, both ends included."""
    texture = textures(split)[rng.integers(len(textures(split)))]
    top, left = rng.integers(SIDE, size=2)
    grey = rng.integers(90, 190)
    tint = rng.integers(-10, 11, 3)
    levels = grey + (np.arange(7) - 3)[:, None] * rng.uniform(1, 7) + tint
    pixels = np.round(levels).astype(np.float32)[texture[top : top + SIDE, left : left + SIDE]]

    tile_of = np.full((GRID, GRID), len(COLOURS))
    glyph_of = np.zeros((GRID, GRID), np.int64)
    ink_of = np.full((GRID, GRID), len(COLOURS))
    placed: list[Tile] = []
    colours = rng.permutation(len(COLOURS))
    wanted = int(rng.integers(tiles[0], tiles[1] + 1))
    for _ in range(200):
        if len(placed) == wanted:
            break
        row, column = (int(v) for v in rng.integers(0, GRID - 2, 2))
        if any(abs(row - t.top) < 3 and abs(column - t.left) < 3 for t in placed):
            continue
        kinds = DIGITS if rng.random() < 0.6 else SHAPES
        content, character, corner = pick(rng, kinds), pick(rng, LETTERS), int(rng.integers(4))
        tile = Tile(int(colours[len(placed) % len(colours)]), row, column, content, character, corner)
        placed.append(tile)
        tile_of[row : row + 3, column : column + 3] = tile.colour
        stamp(rng, split, tile)(pixels, row, column)
        glyph_of[row + 1, column + 1] = GLYPH[content if content in DIGITS else f"tile {content}"]
        r, c = row + 2 * (corner // 2), column + 2 * (corner % 2)
        glyph_of[r, c] = GLYPH[tile.letter]

    small: list[tuple[str, int]] = []
    free = np.argwhere(tile_of == len(COLOURS))
    favourite = rng.permutation(len(COLOURS))[:6]
    for row, column in rng.permutation(free)[: int(rng.integers(loose[0], loose[1] + 1))]:
        colour = int(pick(rng, favourite))
        if sum(c == colour for _, c in small) == MOST:
            continue
        name = pick(rng, SHAPES)
        size = int(rng.integers(9, 13))
        dy, dx = rng.integers(-1, 2, 2)
        ink = shade(rng, colour)
        paste(
            pixels,
            shapes(name, size),
            row * PATCH + (PATCH - size) // 2 + dy,
            column * PATCH + (PATCH - size) // 2 + dx,
            ink,
        )
        small.append((name, colour))
        glyph_of[row, column] = GLYPH[f"loose {name}"]
        ink_of[row, column] = colour
    made = Scene(
        np.clip(np.round(pixels), 0, 255).astype(np.uint8),
        placed,
        small,
        tile_of.ravel(),
        glyph_of.ravel(),
        ink_of.ravel(),
    )
    return made


def ask(
    rng: np.random.Generator, made: Scene, count: int, kinds: tuple[str, ...] = tuple(FORMS)
) -> list[tuple[str, str, str]]:
    """`count` questions about a picture, of types in turn, if so many can be asked: (type, question, answer)."""
    return in_turn(rng, kinds, count, lambda kind: question(rng, made, kind))


def in_turn(
    rng: np.random.Generator, kinds: tuple[str, ...], count: int, ask_one: Callable[[str], tuple[str, str, str] | None]
) -> list[tuple[str, str, str]]:
    """`count` different questions, if so many can be asked, of all kinds before one comes again."""
    asked: list[tuple[str, str, str]] = []
    seen: set[str] = set()
    order: list[str] = []
    for _ in range(8 * count):
        if len(asked) == count:
            break
        if not order:
            order = [str(k) for k in rng.permutation(kinds)]
        one = ask_one(order.pop())
        if one is not None and one[1] not in seen:
            seen.add(one[1])
            asked.append(one)
    return asked


def question(rng: np.random.Generator, made: Scene, kind: str) -> tuple[str, str, str] | None:
    """A question of a type, or None if nothing of this type can be asked about the picture."""

    def one(items: list) -> object:
        return items[int(rng.integers(len(items)))] if items else None

    name = COLOUR_NAMES
    if kind in ("digit", "shape"):
        tile = one([t for t in made.tiles if (t.content in DIGITS) == (kind == "digit")])
        if tile is None:
            return None
        form = pick(rng, FORMS[kind])
        return kind, form.format(name[tile.colour]), tile.content
    if kind == "letter":
        tile = one(made.tiles)
        form = pick(rng, FORMS[kind])
        return kind, form.format(name[tile.colour]), tile.letter
    if kind == "colour":
        contents = [t.content for t in made.tiles]
        tile = one([t for t in made.tiles if contents.count(t.content) == 1])
        if tile is None:
            return None
        form = pick(rng, FORMS[kind])
        what = f"digit {tile.content}" if tile.content in DIGITS else tile.content
        return kind, form.format(what), name[tile.colour]
    if kind in ("small shape", "small colour"):
        by = int(kind == "small shape")  # what is said of it: the shape, or the colour
        said = [small[by] for small in made.loose]
        small = one([small for small in made.loose if said.count(small[by]) == 1])
        if small is None:
            return None
        shape, colour = small
        asked, answer = (name[colour], shape) if by else (shape, name[colour])
        return kind, pick(rng, FORMS[kind]).format(asked), answer
    raise ValueError(kind)
