"""What goes in: pictures prepared as Transformers does, and texts as its tokenizer and template do."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import save as to_bytes
from safetensors.numpy import save_file
from transformers import AutoTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import gz
import tokens

IMAGES = Path(__file__).parent / "images"
NAMES = ("street", "shapes")
FIXTURE = Path(__file__).parent / "fixtures" / "ts-sdpa-mha"
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)[:, None, None]
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)[:, None, None]


def processed(name: str, side: int) -> tuple[np.ndarray, np.ndarray]:
    """(pixel_values fp32 [3, side, side], the same before rescaling and normalising, uint8)."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    image = Image.open(IMAGES / f"{name}.png")
    values = processor(image, return_tensors="np")["pixel_values"][0]
    raw = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
    if np.abs((raw.astype(np.float32) / 255 - MEAN) / STD - values).max() > 1e-5:
        raise RuntimeError(f"{name} at {side}: normalising the 8-bit crop does not give the pixel values")
    return values.astype(np.float32), raw.astype(np.uint8)


def pictures(side: int) -> dict[str, np.ndarray]:
    """Pixel values by name; 'noise' is no picture, but spreads scores more evenly than drawings do."""
    result = {name: processed(name, side)[0] for name in NAMES}
    noise = torch.randn(3, side, side, generator=torch.Generator().manual_seed(7))
    return {**result, "noise": noise.bfloat16().float().numpy()}


def hashed(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """fp32 of `shape` that a reader makes itself: the upper byte of SplitMix64 numbers from `seed`, divided by 64,
    less 2."""
    with np.errstate(over="ignore"):
        steps = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64)
        z = np.uint64(seed) + steps * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return ((z >> np.uint64(56)).astype(np.float32) / 64 - 2).reshape(shape)


CHATS = [
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}],
    [{"role": "user", "content": [{"type": "text", "text": "Compare."}, {"type": "image"}, {"type": "image"}]}],
    [{"role": "user", "content": "Is there a dog near the water?"}],
    [
        {"role": "system", "content": "The assistant gives helpful answers."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many trees?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Three."}]},
        {"role": "user", "content": [{"type": "text", "text": "And how many houses?"}]},
    ],
]
TEXTS = ["", " ", "The red car\n\nis  blue.", "naïve café – 東京 🙂", "a<image>b <s>x</s>", "\tTabs\r\nand\u00a0spaces"]


def texts() -> dict:
    """Chats with the prompt and ids that Transformers makes of them, and plain texts with their ids."""
    tokenizer = AutoTokenizer.from_pretrained(FIXTURE)
    chats = []
    for messages in CHATS:
        for opened in (True, False):
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=opened, tokenize=False)
            chats.append(
                {
                    "messages": messages,
                    "add_generation_prompt": opened,
                    "prompt": prompt,
                    "ids": tokenizer(prompt).input_ids,
                }
            )
    plain = [
        {
            "text": text,
            "ids": tokenizer(text).input_ids,
            "ids_without_special": tokenizer(text, add_special_tokens=False).input_ids,
            "decoded": tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids),
        }
        for text in TEXTS
    ]
    return {"schema_version": 1, "chats": chats, "texts": plain}


def save(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Writes tensors; packed where the name ends in .gz."""
    if path.suffix == ".gz":
        path.write_bytes(gz.compressed(to_bytes(tensors)))
        return
    save_file(tensors, path)
    # safetensors creates its files for their owner alone.
    path.chmod(0o644)


def record(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    save(pictures(126), out / "pixels.safetensors.gz")
    tensors = {f"{name}.{side}": processed(name, side)[1] for side in (126, 336) for name in NAMES}
    save(tensors, out / "preprocess.safetensors.gz")
    tokens.dump(texts(), out / "tokenizer.json")
