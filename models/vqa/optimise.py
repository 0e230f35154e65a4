"""The optimiser of all trainings, and the loop of those that ask questions."""

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

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


def learn(
    net: nn.Module,
    answers: nn.Module,
    stream: Iterator,
    check: Callable[[], dict[str, float]],
    out: Path,
    *,
    rate: float,
    steps: int,
    warm: int,
    every: int = 100,
) -> None:
    """Trains the decoder of `net` on batches for `answers`, (features, questions) -> (logits, tokens); checks and saves
    every so often, to `out` and a log of JSON lines beside it."""
    train = Optimiser(net, net.model.language_model.layers, rate, steps, warm)
    began, mean = time.time(), 0.0
    log = out.with_suffix(".jsonl").open("w")
    for step in range(1, steps + 1):
        logits, wanted = answers(*next(stream))
        loss = nn.functional.cross_entropy(logits, wanted)
        train.step(loss)
        mean = loss.item() if step == 1 else 0.95 * mean + 0.05 * loss.item()
        seconds = round(time.time() - began)
        if step % 25 == 0:
            print(step, f"{seconds} s", round(mean, 4), flush=True)
        if step % every == 0 or step == steps:
            found = check()
            print(step, f"{seconds} s", found, flush=True)
            log.write(json.dumps({"step": step, "seconds": seconds, "loss": mean, **found}) + "\n")
            log.flush()
            torch.save({"layers": len(net.model.language_model.layers), "state": net.state_dict()}, out)
