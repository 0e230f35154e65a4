"""Records what the PyTorch reference gives for images and clips.

    python models/video_llava/record_goldens.py [--out models/video_llava/goldens]

Writes OUT/CASE.safetensors and OUT/cases.json. Pixels are not stored: they are SplitMix64 numbers that a
reader makes itself (`pixels`). A case is refused if double precision would choose other tokens, or if a
choice was so close that another right implementation could choose otherwise; without a pass the reference
has to be what Transformers computes.
"""

import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import draw_clip
import network
from network import FRAMES, SIZE, VIDEO

sys.path.insert(0, str(Path(__file__).parents[1]))
import check  # noqa: E402
import goldens as llava  # noqa: E402
import inputs  # noqa: E402
import tokens  # noqa: E402
from cases import merge, prune, recipe  # noqa: E402
from reference.recipe import parse  # noqa: E402
from reference.video_llava import VideoLlava  # noqa: E402

GOLDENS = Path(__file__).parent / "goldens"
STEPS = 2
FALL = ((4, 0.5), (6, 0.0))
LATE = ((3, 0.5), (6, 0.125))
# What is in the prompt, in order, and the recipe.
CASES = {
    "image": (("image",), recipe()),
    "video": (("video",), recipe()),
    "image-merge": (("image",), recipe(merge(20, 4))),
    "video-merge": (("video",), recipe(merge(20, 4))),
    "video-merge-drop": (("video",), recipe(merge(12, 3, cls="drop", selector="uniform"))),
    "video-prune": (("video",), recipe(prune(*FALL))),
    "image-both": (("image",), recipe(merge(20, 4), prune(*FALL))),
    "video-both": (("video",), recipe(merge(20, 4), prune(*FALL))),
    "video-both-keep": (("video",), recipe(merge(10, 2), prune(*LATE, positions="keep"))),
    "image-and-video-both": (("image", "video"), recipe(merge(20, 4), prune(*LATE))),
    "video-keep-all": (("video",), recipe(merge(82, 0), prune((4, 1.0)))),
}


def pixels(kind: str) -> np.ndarray:
    """[1, 3, H, W] of an image, [1, FRAMES, 3, H, W] of a clip, see inputs.py."""
    seed, lead = {"image": (1, (1, 3)), "video": (2, (1, FRAMES, 3))}[kind]
    return inputs.hashed(seed, (*lead, SIZE.image, SIZE.image))


def play(kinds: tuple[str, ...], passes: dict, net) -> tuple[dict, dict, float]:
    """Tensors, facts for the JSON file and the smallest margin of one prompt and STEPS greedy steps."""
    model, dtype = VideoLlava(net, *parse(passes)), net.lm_head.weight.dtype
    tensors, merged, features = {}, {}, {"image": None, "video": None}
    ids = [tokens.BOS, 30, 41]
    for kind in kinds:
        run = model.image_features if kind == "image" else model.video_features
        features[kind], chosen = run(torch.from_numpy(pixels(kind)).to(dtype))
        tensors[f"{kind}_features"] = features[kind].numpy()
        merged[kind] = [{"dominant": m.dominant, "anchors": m.anchors, "members": m.members} for m in chosen]
        token = tokens.IMAGE if kind == "image" else VIDEO
        ids += [token] * features[kind].shape[1] + [52, 63]
    ids = np.array([ids + [74, 85, 96, 107]], np.int64)
    mask, past, facts = np.ones_like(ids), None, {"merged": merged, "decode": []}
    tensors["input_ids"] = ids
    for step in range(STEPS + 1):
        positions = check.positions_of(mask)[:, -ids.shape[1] :]
        given = [torch.from_numpy(x) for x in (ids, mask, positions)]
        first = step == 0
        result = model.call(*given, *(features.values() if first else (None, None)), past)
        past = result.cache
        tensors["logits" if first else f"step{step - 1}.logits"] = result.logits.numpy()
        if first:
            facts["drops"] = [
                {"after_layer": d.after_layer, "visual_tokens": d.visual.tolist(), "kept": d.kept.tolist()}
                for d in result.drops
            ]
            facts["cache_lengths"] = [c.real.shape[1] for c in past]
        ids = result.logits.argmax(dim=-1, keepdim=True).numpy()
        if step < STEPS:
            facts["decode"].append(int(ids[0, 0]))
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
    return tensors, facts, model.margins.smallest


def from_gif(net) -> dict:
    """What `duet run --video` has to make of the clip that ships: frames as Pillow decodes them (CRC-32 of their
    RGB bytes), and the greedy answer of the unmodified model to them."""
    gif, processor = Image.open(draw_clip.FILE), inputs.CLIPImageProcessorPil(
        size={"shortest_edge": SIZE.image}, crop_size={"height": SIZE.image, "width": SIZE.image}
    )
    wanted = np.linspace(0, gif.n_frames - 1, FRAMES, dtype=int).tolist()
    frames = []
    for index in wanted:
        gif.seek(index)
        frames.append(gif.convert("RGB"))
    clip = torch.from_numpy(np.stack([processor(f, return_tensors="np")["pixel_values"][0] for f in frames]))
    model = VideoLlava(net)
    features, _ = model.video_features(clip[None].to(net.lm_head.weight.dtype))
    prompt = "USER: <video>\nWhat is it? ASSISTANT:"
    ids = []
    for token in network.tokenizer().encode(prompt).ids:
        ids += [token] * (features.shape[1] if token == VIDEO else 1)
    ids, answer, past, smallest = torch.tensor([ids]), [], None, float("inf")
    mask = torch.ones_like(ids)
    for step in range(4):
        positions = torch.from_numpy(check.positions_of(mask.numpy())[:, -ids.shape[1] :])
        result = model.call(ids, mask, positions, None, None if step else features, past)
        past = result.cache
        best = result.logits[0].topk(2).values
        smallest = min(smallest, float((best[0] - best[1]) / result.logits.std()))
        ids = result.logits.argmax(dim=-1, keepdim=True)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        answer.append(int(ids[0, 0]))
    # Resizing differs from Pillow's by 1 of 255 here and there: answers have to be clear of that.
    if smallest < 0.05:
        raise RuntimeError(f"the answer to the clip hangs by {smallest:.1e} of a standard deviation of the logits")
    return {
        "schema_version": 1,
        "frames": wanted,
        "crc32": [zlib.crc32(f.tobytes()) for f in frames],
        "prompt": "What is it?",
        "tokens": answer,
        "visual_tokens": features.shape[1],
    }


def against_transformers(net) -> None:
    """Without a pass the reference is the model that Transformers computes, image and clip in one prompt."""
    tensors, _, _ = play(("image", "video"), recipe(), net)
    image, clip = (torch.from_numpy(pixels(k)) for k in ("image", "video"))
    ids = torch.from_numpy(tensors["input_ids"])
    want = net(input_ids=ids, pixel_values=image, pixel_values_videos=clip).logits[:, -1].numpy()
    apart = float(np.abs(want - tensors["logits"]).max() / want.std())
    if not apart < 1e-5:
        raise RuntimeError(f"the reference differs from Transformers by {apart:.1e} of a standard deviation")


def main() -> int:
    out = llava.target(__doc__, GOLDENS)
    net, exact = network.model(), network.model().double()
    against_transformers(net)
    (out / "clip.json").write_text(llava.compact(from_gif(net)) + "\n", encoding="utf-8")
    index = []
    for key, (kinds, passes) in CASES.items():
        tensors, facts, margin = play(kinds, passes, net)
        more, same, _ = play(kinds, passes, exact)
        llava.settled(key, facts, same, margin)
        floats = [t for t in tensors if tensors[t].dtype == np.float32]
        error = max(float(np.abs(tensors[t] - more[t]).max() / more[t].std()) for t in floats)
        inputs.save({k: np.ascontiguousarray(v) for k, v in sorted(tensors.items())}, out / f"{key}.safetensors")
        closest = margin if np.isfinite(margin) else None
        index.append({"name": key, "recipe": passes, "contents": list(kinds), "smallest_margin": closest, **facts})
        print(f"{key:24} margin {margin:8.1e}  fp32 against fp64 {error:.1e} of a standard deviation")
    head = {"schema_version": 1, "frames": FRAMES, "image_token_id": tokens.IMAGE, "video_token_id": VIDEO}
    (out / "cases.json").write_text(llava.compact({**head, "cases": index}) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
