"""Stage 1: the token merge after the vision encoder, one image at a time."""

from dataclasses import dataclass, field

import torch

from .recipe import Merge
from .order import Margins, descending, top


@dataclass
class Merged:
    """One image after the merge. Positions count patches from 0; CLS has none."""

    hidden: torch.Tensor  # [tokens, C]: CLS if kept, dominant ascending, contextual in anchor order
    dominant: list[int]
    anchors: list[int]
    members: list[list[int]] = field(default_factory=list)  # of each anchor, ascending, without it


def cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of every row of `a` [n, d] with every row of `b` [m, d]."""
    unit = [x / x.norm(dim=-1, keepdim=True) for x in (a, b)]
    return unit[0] @ unit[1].T


@dataclass
class Choice:
    """What a merge decided, as patch positions without CLS."""

    dominant: torch.Tensor  # ascending
    anchors: list[int]
    members: list[list[int]]  # of each anchor, ascending, without it


def choose(score, received, keys, counts: tuple[int, int], to: Merge, margins: Margins) -> Choice:
    """`score` and `received` [N], `keys` [N, head_dim] of one image, for `counts` dominant and contextual tokens."""
    count, k2 = counts
    dominant = top(score, count)
    margins.cut(score, count)
    left = torch.ones(score.shape[0], dtype=torch.bool)
    left[dominant] = False
    rest = left.nonzero().flatten()  # residuals, ascending
    if not k2:
        return Choice(dominant, [], [])
    if to.selector == "local":
        return Choice(dominant, *_local(rest, received, keys, k2, to.cluster_width, margins))
    pool = rest
    if to.selector == "attention":
        size = min(max(1, to.cluster_width * k2), rest.numel())
        margins.order(score[rest], size)
        pool = rest[descending(score[rest])[:size]]
    return Choice(dominant, *_assign(pool, keys, k2, margins))


def contextual(patches: torch.Tensor, choice: Choice, to: Merge) -> torch.Tensor:
    """The contextual tokens [k2, C] of `patches` [N, C], in anchor order."""
    if not choice.anchors:
        return patches[:0]
    pairs = zip(choice.anchors, choice.members)
    if to.selector == "local":
        return torch.stack([patches[[a, *m]].mean(dim=0) for a, m in pairs])
    return torch.stack([patches[a] + (patches[m].mean(dim=0) if m else 0) for a, m in pairs])


def merge(
    hidden: torch.Tensor, probs: torch.Tensor, metric: torch.Tensor, to: Merge, margins: Margins, has_cls: bool = True
) -> Merged:
    """`hidden` [T, C], `probs` [heads, T, T] and `metric` [T, head_dim] of one image; T = 1 + N with CLS, else N."""
    lead = int(has_cls)
    cls, patches, keys = hidden[:lead], hidden[lead:], metric[lead:]
    received = probs[:, :, lead:].sum(dim=(0, 1))
    # Without CLS: attention received, mean over heads of the sum over queries.
    score = probs[:, 0, 1:].sum(dim=0) if has_cls else received / probs.shape[0]
    made = choose(score, received, keys, to.counts(patches.shape[0], has_cls), to, margins)
    kept = [cls] if has_cls and to.cls == "keep" else []
    tokens = torch.cat([*kept, patches[made.dominant], contextual(patches, made, to)])
    return Merged(tokens, made.dominant.tolist(), made.anchors, made.members)


def _assign(pool: torch.Tensor, keys: torch.Tensor, k2: int, margins: Margins) -> tuple[list, list]:
    """Every `step`-th of `pool` is an anchor; each of the others joins the anchor it resembles most."""
    step = max(1, pool.numel() // k2)
    anchors = pool[::step][:k2]
    others = torch.tensor([p for p in pool.tolist() if p not in set(anchors.tolist())], dtype=torch.long)
    similarity = cosines(keys[others], keys[anchors])
    margins.best(similarity, scale=1.0)
    members = [[] for _ in range(k2)]
    for position, row in sorted(zip(others.tolist(), similarity)):
        members[int(descending(row)[0])].append(position)
    return anchors.tolist(), members


def _local(rest, received, keys, k2: int, width: int, margins: Margins) -> tuple[list, list]:
    """The most attended residuals, each with its nearest neighbours among all other residuals."""
    margins.order(received[rest], k2)
    anchors = rest[descending(received[rest])[:k2]].tolist()
    members = []
    for anchor in anchors:
        others = rest[rest != anchor]
        similarity = cosines(keys[[anchor]], keys[others])[0]
        size = min(width, others.numel())
        margins.cut(similarity, size, scale=1.0)
        members.append(others[top(similarity, size)].tolist())
    return anchors, members
