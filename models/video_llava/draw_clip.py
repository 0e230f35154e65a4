"""A short, seeded, drawn clip: a ball that crosses a scene while a bar fills, 20 frames, in few bytes.

    python models/video_llava/draw_clip.py [FILE]
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw

FILE = Path(__file__).parent / "images" / "ball.gif"
SIZE, COUNT = (160, 120), 20


def frame(index: int) -> Image.Image:
    width, height = SIZE
    image = Image.new("RGB", SIZE, (150, 195, 235))
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 84, width, height), fill=(95, 140, 75))
    pen.rectangle((100, 44, 140, 90), fill=(200, 170, 120), outline=(60, 50, 40))
    pen.polygon(((94, 44), (120, 22), (146, 44)), fill=(150, 50, 40))
    x = 10 + index * (width - 20) // (COUNT - 1)
    y = 78 - abs((index * 9) % 60 - 30)
    pen.ellipse((x - 9, y - 9, x + 9, y + 9), fill=(220, 40, 40), outline=(40, 10, 10))
    pen.rectangle((8, 106, 8 + index * 144 // (COUNT - 1), 112), fill=(250, 220, 80))
    return image


def draw(path: Path = FILE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    colours = frame(COUNT // 2).quantize(24)
    frames = [frame(i).quantize(palette=colours, dither=Image.Dither.NONE) for i in range(COUNT)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, loop=0, optimize=True)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else FILE)
