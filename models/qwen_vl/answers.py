"""Records what Transformers makes of pictures and questions with the models of build.py, from files to tokens.

    python models/qwen_vl/answers.py [--out models/qwen_vl/goldens]

Writes OUT/answers.json and OUT/patches.safetensors:

- `answers`: the greedy answers of Transformers' own `generate` to chats, prepared by its own processor; `halved`
  are those to the first picture's chat if of every picture only the tokens at even places are there, with the
  positions that they have in the whole grid; `pruned` and `both` those of the reference with the recipes of that
  name, which prune, and merge and prune, unless a choice was so close that another right implementation could
  choose otherwise;
- `clips`: the same for a clip, `video_llava/images/ball.gif`, of which two frames of each second are taken;
- `pictures`: rows of patches and grids that its image processor (the one with Pillow) makes of pictures of several
  shapes; the tensors hold them before rescaling and normalising, as bytes;
- `sizes`: what `smart_resize` makes of heights and widths.

Pictures that are not in llava/images are made from a formula, see `drawn`.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor, Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.processing_utils import ProcessorMixin

import build
import words
from build import LLAVA, PIXELS, SIZES, sibling

import tokens

sys.path.insert(1, str(Path(__file__).parents[1]))
from reference.decoder import entry  # noqa: E402
from reference.families import Family  # noqa: E402
from reference.order import Margins  # noqa: E402
from reference.qwen_tower import look, merge_grid  # noqa: E402
from reference.recipe import parse  # noqa: E402

shared = sibling("goldens")
MEAN, STD = shared.inputs.MEAN, shared.inputs.STD

GOLDENS = Path(__file__).parent / "goldens"
IMAGES = LLAVA / "images"
CLIP = LLAVA.parent / "video_llava" / "images" / "ball.gif"
NEW = 16
# For the models of both families, which have three layers at least.
DROPS = {"visual_prune": {"drops": [{"after_layer": 1, "keep": 0.5}, {"after_layer": 2, "keep": 0.2}]}}
MERGE = {"token_merge": {"dominant": 14, "contextual": 4}}
RECIPES = {
    "pruned": {"version": 1, "passes": [DROPS], "marker": "input"},
    "both": {"version": 1, "passes": [MERGE, DROPS]},
}
FIRST, SECOND = "What colour is the largest shape?", "How many people stand with the dog near the water?"
# Pictures and question, and the question of a second turn.
CHATS = {
    "street": (["street"], FIRST, None),
    "shapes": (["shapes"], SECOND, None),
    "both": (["street", "shapes"], "Compare the first image with the second image.", None),
    "text": ([], "Is there a dog?", None),
    "turns": (["shapes"], FIRST, "And where is the red car?"),
}
# Name -> width and height; None where the picture is a file.
PICTURES = {
    "street": None,
    "shapes": None,
    "wide": (700, 9),
    "tall": (6, 500),
    "tiny": (5, 3),
    "fitting": (48, 32),
    "large": (911, 640),
}
# Settings of the image processor: the fixtures', and the class's own with the old names of its bounds.
SETTINGS = {
    "small": {"size": PIXELS, "patch_size": 4, "temporal_patch_size": 2, "merge_size": 2},
    "usual": {"min_pixels": 4 * 784, "max_pixels": 9 * 784},
}


def drawn(width: int, height: int) -> Image.Image:
    """A picture of waves and hard edges, all of it integers."""
    x, y, c = np.arange(width)[None, :, None], np.arange(height)[:, None, None], np.arange(3)[None, None, :]
    value = 3 * x * x + 7 * (c + 1) * y + 5 * (x * y % 31) + 90 * ((x // 8 + y // 8 + c) % 2)
    return Image.fromarray((value % 256).astype(np.uint8))


def picture(name: str) -> Image.Image:
    size = PICTURES[name]
    return Image.open(IMAGES / f"{name}.png") if size is None else drawn(*size)


def processor(name: str):
    """The model's processor without its part for clips, which needs torchvision."""
    base = Qwen2_5_VLProcessor if name == "qwen2.5-vl" else Qwen2VLProcessor

    class Processor(base):
        def __init__(self, image_processor, tokenizer, chat_template=None):
            self.image_token, self.video_token = words.IMAGE, words.VIDEO
            self.image_token_id, self.video_token_id = tokens.IMAGE, words.VIDEO_ID
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    images = Qwen2VLImageProcessorPil(patch_size=SIZES[name].patch, size=PIXELS)
    text = PreTrainedTokenizerFast(tokenizer_object=words.tokenizer(), eos_token=words.END, pad_token=words.PAD)
    return Processor(images, text, chat_template=words.CHAT_TEMPLATE)


def ask(net, inputs: dict) -> list[int]:
    """The tokens of the greedy answer."""
    out = net.generate(
        **inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=tokens.EOS, pad_token_id=tokens.PAD
    )
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def embedded(net, inputs: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings [1, S, D] with features in their places, which are visual [1, S], and positions [3, 1, S]."""
    ids = inputs["input_ids"]
    embeds, visual = net.get_input_embeddings()(ids).clone(), ids == tokens.IMAGE
    embeds[visual] = net.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
    rope, _ = net.model.get_rope_index(
        ids, inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"], attention_mask=torch.ones_like(ids)
    )
    return embeds, visual, rope


def halved(net, inputs: dict, places: bool = True) -> list[int]:
    """The greedy answer if tokens of pictures at odd places are left out; without `places`, numbered one by one."""
    embeds, visual, rope = embedded(net, inputs)
    within = (visual.long().cumsum(-1) - 1) % int(inputs["image_grid_thw"][0].prod() // 4)
    left = ~visual[0] | (within[0] % 2 == 0)
    embeds, rope = embeds[:, left], rope[:, :, left]
    if not places:
        rope = torch.arange(embeds.shape[1]).expand(3, 1, -1)
    answer = []
    for _ in range(NEW):
        out = net.model.language_model(inputs_embeds=embeds, position_ids=rope, use_cache=False).last_hidden_state
        answer.append(int(net.lm_head(out[:, -1]).argmax()))
        if answer[-1] == tokens.EOS:
            break
        said = net.get_input_embeddings()(torch.tensor([answer[-1:]]))
        embeds, rope = torch.cat([embeds, said], dim=1), torch.cat([rope, rope[:, :, -1:] + 1], dim=2)
    return answer


def rewritten(net, inputs: dict, recipe: dict) -> tuple[list[int], list[int], float]:
    """The reference's greedy answer with `recipe`, the cache lengths behind the prompt, and the smallest margin."""
    embeds, visual, rope = embedded(net, inputs)
    to, prune = parse(recipe)
    margins, past, answer, lengths = Margins(), None, [], []
    if to is not None:
        left, features, first = ~visual[0], [], 0
        places = visual[0].nonzero().flatten()
        for grid in inputs["image_grid_thw"].tolist():
            patches = int(np.prod(grid))
            got = merge_grid(look(net, inputs["pixel_values"][first : first + patches], tuple(grid)), to, margins)
            left[places[first // 4 + torch.tensor(got.kept)]] = True
            features.append(got.features)
            first += patches
        embeds, visual, rope = embeds[:, left], visual[:, left], rope[:, :, left]
        embeds[visual] = torch.cat(features)
    decoder = Family(net, prune)
    for _ in range(NEW):
        real = torch.ones(embeds.shape[:2], dtype=torch.bool)
        result = decoder.run(entry(embeds, real, visual, rope.permute(1, 2, 0), prune), past, margins)
        lengths = lengths or [c.real.shape[1] for c in result.cache]
        past = result.cache
        answer.append(int(result.logits.argmax()))
        if answer[-1] == tokens.EOS:
            break
        embeds = net.get_input_embeddings()(torch.tensor([answer[-1:]]))
        visual, rope = torch.zeros(1, 1, dtype=torch.bool), rope[:, :, -1:] + 1
    return answer, lengths, margins.smallest


def user(pictures: list[str], text: str) -> dict:
    return {"role": "user", "content": [*({"type": "image"} for _ in pictures), {"type": "text", "text": text}]}


def answers(name: str) -> list[dict]:
    net, prepare = build.model(name), processor(name)
    result = []
    for key, (names, question, further) in CHATS.items():
        messages = [user(names, question)]
        prompt = prepare.apply_chat_template(messages, add_generation_prompt=True)
        images = {"images": [picture(n).convert("RGB") for n in names]} if names else {}
        inputs = dict(prepare(text=[prompt], return_tensors="pt", **images))
        fact = {
            "name": key,
            "images": names,
            "question": question,
            "prompt": prompt,
            "grids": inputs["image_grid_thw"].tolist() if names else [],
            "prompt_tokens": inputs["input_ids"].shape[1],
            "tokens": ask(net, inputs),
        }
        if names:
            fact["halved"] = halved(net, inputs)
            if fact["halved"] in (fact["tokens"], halved(net, inputs, places=False)):
                raise RuntimeError(f"{key}: half the tokens, or their places, change nothing")
            for kind, recipe in RECIPES.items():
                answer, lengths, margin = rewritten(build.model(name), inputs, recipe)
                # Drawn pictures have areas whose tokens are nearly the same.
                if margin < shared.MARGIN:
                    print(f"{name:10} {key:8} {kind}: not recorded, a choice was made by {margin:.1e}")
                else:
                    fact |= {kind: answer, f"{kind}_lengths": lengths}
        if further is not None:
            if tokens.EOS in fact["tokens"]:
                raise RuntimeError(f"{key}: the first answer ends; expected one that goes on")
            # A second turn on what was said, token for token, as a client with a cache has it.
            said = prepare.tokenizer.decode(fact["tokens"], skip_special_tokens=True)
            messages += [{"role": "assistant", "content": [{"type": "text", "text": said}]}, user([], further)]
            whole = prepare.apply_chat_template(messages, add_generation_prompt=True)
            rest = whole.removeprefix(prompt).removeprefix(said)
            more = [*fact["tokens"], *prepare.tokenizer(rest, add_special_tokens=False).input_ids]
            longer = torch.cat([inputs["input_ids"], torch.tensor([more])], dim=1)
            types = torch.zeros_like(longer)
            types[longer == tokens.IMAGE] = 1
            inputs |= {
                "input_ids": longer,
                "attention_mask": torch.ones_like(longer),
                "mm_token_type_ids": types,
            }
            fact |= {"answer": said, "further": further, "further_tokens": ask(net, inputs)}
        print(f"{name:10} {key:8} {fact['prompt_tokens']:4} tokens: {fact['tokens']}")
        result.append(fact)
    for kind in RECIPES:
        changed = [fact["name"] for fact in result if fact.get(kind, fact["tokens"]) != fact["tokens"]]
        if len(changed) < 2:
            raise RuntimeError(f"{kind}: expected two answers that change at least; found {changed}")
    return result


def clip(name: str) -> dict:
    """The greedy answer to a question about CLIP.

    The processor's part for clips needs torchvision. Here frames are prepared by that for images: of the first
    frame of a patch the first moment is taken, of the second the second.
    """
    net, prepare = build.model(name), processor(name)
    with Image.open(CLIP) as file:
        frames, lasting = [], []
        for index in range(file.n_frames):
            file.seek(index)
            frames.append(file.convert("RGB"))
            lasting.append(file.info["duration"] / 1e3)
    total, seconds = len(frames), sum(lasting)
    # Transformers' sample_frames at 2 frames a second.
    count = int(min(max(seconds * 2, 4), total // 2 * 2)) // 2 * 2
    chosen = torch.arange(0, total, total / count).int().tolist()
    made = [prepare.image_processor(frames[i], return_tensors="pt") for i in chosen]
    _, height, width = made[0]["image_grid_thw"][0].tolist()
    moments = torch.stack([m["pixel_values"] for m in made]).reshape(count // 2, 2, height * width, 3, 2, -1)
    # [pair, moment, patch, channel, copy, pixel] -> rows of [channel, moment, pixel], one pair after the other.
    pixels = moments[:, :, :, :, 0].permute(0, 2, 3, 1, 4).reshape(count // 2 * height * width, -1)
    grid = [count // 2, height, width]
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": FIRST}]}]
    prompt = prepare.apply_chat_template(messages, add_generation_prompt=True)
    ids = []
    for token in prepare.tokenizer(prompt, add_special_tokens=False).input_ids:
        ids += [token] * (int(np.prod(grid)) // 4 if token == words.VIDEO_ID else 1)
    ids = torch.tensor([ids])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": 2 * (ids == words.VIDEO_ID).int(),
        "pixel_values_videos": pixels,
        "video_grid_thw": torch.tensor([grid]),
    }
    each = 2 * seconds / count
    if name == "qwen2.5-vl":
        inputs["second_per_grid_ts"] = torch.tensor([each])
    fact = {"frames": chosen, "seconds_per_grid": each, "grid": grid, "question": FIRST, "prompt": prompt}
    fact |= {"prompt_tokens": ids.shape[1], "tokens": ask(net, inputs)}
    print(f"{name:10} clip     {ids.shape[1]:4} tokens: {fact['tokens']}, {chosen}, {each} s, {grid}")
    return fact


def patches() -> tuple[dict[str, np.ndarray], list[dict]]:
    """Rows of patches of every picture with every setting as bytes, and their grids."""
    tensors, facts = {}, []
    for setting, options in SETTINGS.items():
        make = Qwen2VLImageProcessorPil(**options)
        for name in PICTURES:
            image = picture(name).convert("RGB")
            made = make(image, return_tensors="np")
            raw = make(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
            rows = raw.astype(np.uint8)
            if (rows != raw).any():
                raise RuntimeError(f"{name}: pixels are no bytes before rescaling")
            planes = rows.reshape(len(rows), 3, -1).astype(np.float32)
            again = (planes / 255 - MEAN[:, 0]) / STD[:, 0]
            if np.abs(again.reshape(rows.shape) - made["pixel_values"]).max() > 1e-5:
                raise RuntimeError(f"{name}: normalising the bytes does not give the pixel values")
            # Both moments of a patch are the same image: one is enough.
            edge = make.patch_size
            moments = rows.reshape(len(rows), 3, make.temporal_patch_size, edge * edge)
            if (moments != moments[:, :, :1]).any():
                raise RuntimeError(f"{name}: the moments of a patch differ")
            tensors[f"{setting}.{name}"] = np.ascontiguousarray(moments[:, :, 0])
            size = PICTURES[name] or image.size
            grid = made["image_grid_thw"][0].tolist()
            facts.append({"setting": setting, "name": name, "size": list(size), "grid": grid})
    return tensors, facts


def sizes() -> list[list[int]]:
    """Rows of height, width, factor, bounds, and the height and width that they give."""
    rng, rows = np.random.default_rng(3), []
    fixed = [(14, 14), (42, 70), (70, 42), (98, 14), (1, 200), (200, 1), (28, 28), (3000, 2000), (84, 4000)]
    free = [tuple(int(10**e) for e in rng.uniform(0.5, 3.5, 2)) for _ in range(80)]
    for height, width in [*fixed, *(s for s in free if max(s) <= 200 * min(s))]:
        for factor, least, most in ((28, 56 * 56, 28 * 28 * 1280), (8, 256, 2560), (28, 784, 784)):
            found = smart_resize(height, width, factor, least, most)
            rows.append([height, width, factor, least, most, *map(int, found)])
    return rows


def main() -> int:
    out = shared.target(__doc__, GOLDENS)
    tensors, pictures = patches()
    shared.inputs.save(tensors, out / "patches.safetensors")
    known = {name: answers(name) for name in SIZES}
    clips = {name: clip(name) for name in SIZES}
    settings = {k: {"image_processor_type": "Qwen2VLImageProcessor", **v} for k, v in SETTINGS.items()}
    head = {"schema_version": 1, "answers": known, "clips": clips, "recipes": RECIPES}
    head |= {"settings": settings, "pictures": pictures, "sizes": sizes()}
    (out / "answers.json").write_text(shared.compact(head) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
