"""Ordering with the tie rule of the method, and the margins by which choices were made."""

import torch


def descending(scores: torch.Tensor) -> torch.Tensor:
    """Indices of `scores` [n], largest first; equal scores: lower index first."""
    return torch.sort(scores, descending=True, stable=True).indices


def top(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` best indices in ascending order."""
    return descending(scores)[:count].sort().values


class Margins:
    """Smallest relative distance between what was chosen and what was not, over every choice made.

    A choice made by less than rounding noise would be no golden: another right implementation might
    choose otherwise.
    """

    def __init__(self):
        self.smallest = float("inf")

    def _note(self, better: torch.Tensor, worse: torch.Tensor, scale: float | None) -> None:
        size = torch.maximum(better.abs(), worse.abs()).clamp_min(1e-30) if scale is None else scale
        self.smallest = min(self.smallest, float(((better - worse) / size).min()))

    def cut(self, scores: torch.Tensor, count: int, scale: float | None = None) -> None:
        """A set of the `count` largest was taken. `scale`: of the scores, None for their own size."""
        if 0 < count < scores.numel():
            ordered = scores[descending(scores)]
            self._note(ordered[count - 1], ordered[count], scale)

    def order(self, scores: torch.Tensor, count: int) -> None:
        """The `count` largest were taken, and their order matters."""
        ordered = scores[descending(scores)][: count + 1]
        if count and ordered.numel() > 1:
            self._note(ordered[:-1], ordered[1:], None)

    def best(self, scores: torch.Tensor, scale: float) -> None:
        """The largest of each row was taken."""
        if scores.shape[-1] > 1 and scores.shape[0]:
            pair = scores.topk(2, dim=-1).values
            self._note(pair[:, 0], pair[:, 1], scale)
