"""Two seeded, drawn pictures: something for a preprocessor to resize and crop, in few bytes."""

import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

HERE = Path(__file__).parent / "images"


def street(size: tuple[int, int] = (400, 300), seed: int = 1) -> Image.Image:
    """Landscape: sky, ground, houses with windows, a sun."""
    rng = random.Random(seed)
    image = Image.new("RGB", size, (140, 190, 235))
    pen = ImageDraw.Draw(image)
    width, height = size
    pen.rectangle((0, height * 2 // 3, width, height), fill=(90, 140, 70))
    pen.ellipse((width - 90, 20, width - 30, 80), fill=(250, 220, 80))
    for i in range(5):
        x, w, h = 12 + i * 78, 60, rng.randint(70, 150)
        top = height * 2 // 3 + 20 - h
        pen.rectangle((x, top, x + w, top + h), fill=tuple(rng.randint(60, 220) for _ in range(3)))
        pen.polygon(((x - 6, top), (x + w // 2, top - 34), (x + w + 6, top)), fill=(150, 50, 40))
        for row in range(h // 36):
            for column in range(2):
                left, up = x + 10 + 26 * column, top + 10 + 32 * row
                pen.rectangle((left, up, left + 14, up + 18), fill=(250, 245, 190), outline=(40, 40, 40))
    for x in range(0, width, 40):
        pen.line((x, height - 26, x + 22, height - 26), fill=(255, 255, 255), width=4)
    return image


def shapes(size: tuple[int, int] = (300, 420), seed: int = 2) -> Image.Image:
    """Portrait: overlapping circles, boxes and lines on paper, and a word."""
    rng = random.Random(seed)
    image = Image.new("RGB", size, (245, 240, 228))
    pen = ImageDraw.Draw(image)
    width, height = size
    for _ in range(16):
        x, y, r = rng.randrange(width), rng.randrange(height), rng.randint(14, 60)
        colour = tuple(rng.randint(20, 235) for _ in range(3))
        box = (x - r, y - r, x + r, y + r)
        rng.choice((pen.ellipse, pen.rectangle))(box, fill=colour, outline=(20, 20, 20))
    for _ in range(6):
        ends = [rng.randrange(width), rng.randrange(height), rng.randrange(width), rng.randrange(height)]
        pen.line(ends, fill=tuple(rng.randint(0, 120) for _ in range(3)), width=3)
    pen.text((24, height - 40), "DUET 42", fill=(0, 0, 0), font_size=28)
    return image


def draw(folder: Path = HERE) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    street().save(folder / "street.png", optimize=True)
    shapes().save(folder / "shapes.png", optimize=True)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
