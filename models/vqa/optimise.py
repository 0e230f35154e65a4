"""The optimiser of both trainings."""

import math

import torch
from torch import nn


class Optimiser:
    """Muon for the weight matrices of `blocks`, AdamW for everything else of `net`; warm-up, then a cosine."""

    def __init__(self, net: nn.Module, blocks: nn.Module, rate: float, steps: int, warm: int = 100):
        inside = {id(p) for p in blocks.parameters() if p.ndim == 2}
        every = [p for p in net.parameters() if p.requires_grad]
        matrices, others = ([p for p in every if (id(p) in inside) == which] for which in (True, False))
        self.parameters = every
        self.parts = [
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=rate, weight_decay=0.0, betas=(0.9, 0.98)),
        ]

        def share(step: int) -> float:
            cosine = 0.5 * (1 + math.cos(math.pi * min(1, step / steps)))
            return min(1, (step + 1) / warm) * (0.02 + 0.98 * cosine)

        self.schedules = [torch.optim.lr_scheduler.LambdaLR(p, share) for p in self.parts]

    def step(self, loss: torch.Tensor) -> None:
        for part in self.parts:
            part.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part in self.parts:
            part.step()
        for schedule in self.schedules:
            schedule.step()
