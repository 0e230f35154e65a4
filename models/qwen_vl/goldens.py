"""Records what the PyTorch reference gives for every case of cases.py.

    python models/qwen_vl/goldens.py [--out models/qwen_vl/goldens]

Writes OUT/CASE.safetensors and OUT/cases.json (OUT/current.json for the cases of `ratio_base: current`). Features
are seeded noise, so that cases do not depend on a vision tower; positions are Transformers' own
(`get_rope_index`). A case is refused if double precision would choose other tokens, or if a choice was so close
that another right implementation could choose otherwise.
"""

import sys
from pathlib import Path

import numpy as np
import torch

import build
from build import sibling

import tokens

sys.path.insert(1, str(Path(__file__).parents[1]))
from cases import CASES, CURRENT, Case, Turn  # noqa: E402
from reference.decoder import entry  # noqa: E402
from reference.families import Family  # noqa: E402
from reference.order import Margins  # noqa: E402
from reference.recipe import parse  # noqa: E402

shared = sibling("goldens")

GOLDENS = Path(__file__).parent / "goldens"
STEPS = 3


def lay_out(tokenizer, turn: Turn, first: bool) -> tuple[np.ndarray, np.ndarray, list]:
    """Token ids [B, S] with placeholders, mask [B, S], padded on the left, and all rows' grids in order."""
    rows, grids = [], []
    for parts in turn.rows:
        ids = [tokens.BOS] if first else []
        for part in parts:
            if isinstance(part, str):
                ids += tokenizer.encode(part, add_special_tokens=False).ids
            else:
                ids += [tokens.IMAGE] * int(np.prod(part))
                grids.append(part)
        rows.append(ids)
    length = max(map(len, rows))
    ids = np.array([[tokens.PAD] * (length - len(r)) + r for r in rows], np.int64)
    mask = np.array([[0] * (length - len(r)) + [1] * len(r) for r in rows], np.int64)
    return ids, mask, grids


def positions_of(net, ids, mask, grids, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Transformers' positions [3, B, S] of a turn whose rows go on at `start` [B], and where the next goes on."""
    merge = net.config.vision_config.spatial_merge_size
    rope, _ = net.model.get_rope_index(
        torch.from_numpy(ids),
        torch.from_numpy((ids == tokens.IMAGE).astype(np.int32)),
        image_grid_thw=torch.tensor([[t, h * merge, w * merge] for t, h, w in grids]) if grids else None,
        attention_mask=torch.from_numpy(mask),
    )
    positions = (rope.numpy() + start[None, :, None]) * mask[None]
    # The last token is text in every case, and the next one follows it.
    return positions, positions[0, :, -1] + 1


def play(case: Case, net, tokenizer) -> tuple[dict, list, float]:
    """Runs a case; returns tensors, facts of each turn for the JSON file, and the smallest margin."""
    _, prune = parse(case.recipe)
    decoder, margins = Family(net, prune), Margins()
    dtype = net.lm_head.weight.dtype
    noise = torch.Generator().manual_seed(5)
    tensors, turns, past = {}, [], None
    seen = np.zeros((len(case.turns[0].rows), 0), np.int64)
    start = np.zeros(seen.shape[0], np.int64)

    def call(ids, new, positions, features):
        embeds = net.get_input_embeddings()(torch.from_numpy(ids)).clone()
        visual = torch.from_numpy(ids == tokens.IMAGE)
        embeds[visual] = features.to(dtype)
        rope = torch.from_numpy(positions).permute(1, 2, 0)
        return decoder.run(entry(embeds, torch.from_numpy(new == 1), visual, rope, prune), past, margins)

    for index, turn in enumerate(case.turns):
        ids, new, grids = lay_out(tokenizer, turn, index == 0)
        features = torch.randn(int((ids == tokens.IMAGE).sum()), build.SIZE.width, generator=noise).bfloat16().float()
        positions, start = positions_of(net, ids, new, grids, start)
        seen = np.concatenate([seen, new], axis=1)
        result = call(ids, new, positions, features)
        past = result.cache
        name = f"turn{index}"
        tensors |= {
            f"{name}.input_ids": ids,
            f"{name}.attention_mask": seen,
            f"{name}.position_ids": positions,
            f"{name}.image_features": features.numpy(),
            f"{name}.logits": result.logits.numpy(),
        }
        facts = {
            "grids": [list(g) for g in grids],
            "drops": [{"after_layer": d.after_layer, "kept": d.kept.tolist()} for d in result.drops],
            "cache_lengths": [c.real.shape[1] for c in past],
        }
        logits = result.logits
        for step in range(STEPS):
            fed = logits.argmax(dim=-1, keepdim=True).numpy()
            positions, start = np.tile(start[None, :, None], (3, 1, 1)), start + 1
            seen = np.concatenate([seen, np.ones_like(fed)], axis=1)
            result = call(fed, np.ones_like(fed), positions, torch.zeros(0, build.SIZE.width))
            past, logits = result.cache, result.logits
            tensors[f"{name}.step{step}.input_ids"] = fed
            tensors[f"{name}.step{step}.position_ids"] = positions
            tensors[f"{name}.step{step}.logits"] = logits.numpy()
        facts["cache_lengths_after_decode"] = [c.real.shape[1] for c in past]
        turns.append(facts)
    return tensors, turns, margins.smallest


def unmodified(net, tensors: dict) -> float:
    """How far the reference is from Transformers' own model on the first prompt of a case without passes."""
    ids = torch.from_numpy(tensors["turn0.input_ids"])
    embeds = net.get_input_embeddings()(ids).clone()
    embeds[ids == tokens.IMAGE] = torch.from_numpy(tensors["turn0.image_features"])
    positions = torch.from_numpy(tensors["turn0.position_ids"])
    net.config.text_config._attn_implementation = "eager"
    out = net.model.language_model(inputs_embeds=embeds, position_ids=positions).last_hidden_state
    return float(np.abs(net.lm_head(out)[:, -1].numpy() - tensors["turn0.logits"]).max())


def record(name: str, cases: dict[str, Case], out: Path) -> None:
    """Writes OUT/NAME.json and the tensors of each of `cases`."""
    net, exact, tokenizer = build.model(), build.model().double(), tokens.tokenizer()
    index = []
    for key, case in cases.items():
        tensors, turns, margin = play(case, net, tokenizer)
        more, same, _ = play(case, exact, tokenizer)
        shared.settled(key, turns, same, margin)
        if not case.recipe["passes"] and (far := unmodified(build.model(), tensors)) > 1e-4:
            raise RuntimeError(f"{key}: Transformers' own model gives logits that differ by {far:.1e}")
        error = max(
            float(np.abs(tensors[t] - more[t]).max() / more[t].std()) for t in tensors if t.endswith("logits")
        )
        saved = {k: np.ascontiguousarray(v) for k, v in sorted(tensors.items())}
        shared.inputs.save(saved, out / f"{key}.safetensors")
        closest = margin if np.isfinite(margin) else None
        index.append(
            {"name": key, "what": case.what, "recipe": case.recipe, "smallest_margin": closest, "turns": turns}
        )
        print(f"{key:14} margin {margin:8.1e}  fp32 against fp64 {error:.1e} of a standard deviation")
    head = {"schema_version": 1, "image_token_id": tokens.IMAGE, "cases": index}
    (out / f"{name}.json").write_text(shared.compact(head) + "\n", encoding="utf-8")


def main() -> int:
    out = shared.target(__doc__, GOLDENS)
    for name, cases in (("cases", CASES), ("current", CURRENT)):
        record(name, cases, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
