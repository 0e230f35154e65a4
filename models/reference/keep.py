"""Stage 1 without merging: which patch tokens of an image stay as they are. Positions count patches from 0."""

import torch

from .order import Margins
from .recipe import Keep

WORD = (1 << 64) - 1


def splitmix64(seed: int):
    """The numbers of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    state = seed
    while True:
        state = (state + 0x9E3779B97F4A7C15) & WORD
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
        yield z ^ (z >> 31)


def drawn(count: int, keep: int, seed: int) -> list[int]:
    """The first `keep` of a shuffle of `count` places (Fisher and Yates), ascending."""
    places, numbers = list(range(count)), splitmix64(seed)
    for i in range(keep):
        other = i + (next(numbers) * (count - i) >> 64)
        places[i], places[other] = places[other], places[i]
    return sorted(places[:keep])


def even(count: int, keep: int) -> list[int]:
    """The middles of `keep` even steps."""
    return [(2 * i + 1) * count // (2 * keep) for i in range(keep)]


def diverse(features: torch.Tensor, keep: int, margins: Margins) -> list[int]:
    """DivPrune's choice among `features` [N, D], in the order in which it is made."""
    unit = features / features.norm(dim=-1, keepdim=True)
    distance = 1 - unit @ unit.T
    nearest = distance.clone().fill_diagonal_(torch.inf).min(dim=0).values
    chosen = []
    for _ in range(keep):
        left = torch.tensor([i for i in range(len(features)) if i not in chosen])
        margins.best(nearest[left][None], scale=1.0)
        # The first of equal ones, as torch.argmax does not promise.
        best = int(left[(nearest[left] == nearest[left].max()).nonzero()[0, 0]])
        nearest = torch.minimum(nearest, distance[best]) if chosen else distance[best]
        chosen.append(best)
    return chosen


def places(features: torch.Tensor, to: Keep, margins: Margins) -> list[int]:
    """Places that stay of one image's `features` [N, D], ascending."""
    count = len(features)
    keep = to.count(count)
    if to.how == "random_drop":
        return drawn(count, keep, to.seed)
    if to.how == "uniform_drop":
        return even(count, keep)
    return sorted(diverse(features, keep, margins))
