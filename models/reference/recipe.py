"""The part of a recipe that this implementation reads, checked while it is read."""

import math
from dataclasses import dataclass

SELECTORS = ("attention", "uniform", "local")
PLACEMENTS = ("encoder", "decoder")
TEXTS = ("all", "last", "salient")
KEEPERS = ("random_drop", "uniform_drop", "div_prune")


def _pick(value: str, allowed: tuple[str, ...], where: str) -> str:
    if value not in allowed:
        raise ValueError(f"{where}: expected one of {', '.join(allowed)}; found {value!r}")
    return value


@dataclass(frozen=True)
class Merge:
    """Parameters of `token_merge`. Budgets are counts (int) or ratios of the patch count (float)."""

    dominant: int | float
    contextual: int | float
    cluster_width: int = 4
    selector: str = "attention"
    cls: str | None = None
    placement: str = "encoder"

    def __post_init__(self):
        _pick(self.selector, SELECTORS, "token_merge.selector")
        _pick(self.placement, PLACEMENTS, "token_merge.placement")
        if self.cls is None:
            # Left out: kept, but not among features that hold no place for it.
            object.__setattr__(self, "cls", "drop" if self.placement == "decoder" else "keep")
        _pick(self.cls, ("keep", "drop"), "token_merge.cls")
        if self.cluster_width < 1:
            raise ValueError(f"token_merge.cluster_width: expected at least 1; found {self.cluster_width}")
        if self.dominant < 0 or self.contextual < 0:
            raise ValueError("token_merge: expected budgets of at least 0")

    def counts(self, patches: int, has_cls: bool = True) -> tuple[int, int]:
        """(dominant patches, contextual tokens) for a tower with `patches` patch tokens."""
        k1, k2 = (math.floor(b * patches) if isinstance(b, float) else b for b in (self.dominant, self.contextual))
        if has_cls and self.cls == "keep":
            if k1 == 0:
                raise ValueError("token_merge.dominant: it counts CLS, which is kept; expected at least 1")
            k1 -= 1
        k1 = min(k1, patches)
        return k1, min(k2, patches - k1)


@dataclass(frozen=True)
class Keep:
    """Parameters of the passes that keep some patch tokens as they are; `how` is the pass."""

    how: str
    keep: int | float
    seed: int = 0
    placement = "encoder"

    def __post_init__(self):
        _pick(self.how, KEEPERS, "passes")
        if self.keep < 0:
            raise ValueError(f"{self.how}.keep: expected at least 0; found {self.keep}")

    def count(self, patches: int) -> int:
        """Tokens that stay of `patches`."""
        return min(math.floor(self.keep * patches) if isinstance(self.keep, float) else self.keep, patches)


@dataclass(frozen=True)
class Prune:
    """Parameters of `visual_prune`; `drops` holds (layers that have run, fraction kept).

    `ratio_base` says what the fractions are of: the visual tokens that `entered` the decoder (the method), or
    `current`, the schedule of the public code for Qwen2.5-VL, which the method calls a fault. Each drop then looks
    at the c tokens that count as visual there, with r the fraction before this drop (1 at the first) and r' its own:

    - the first floor(c * r) of them, in sequence order, are ranked. The others stay, and count as text from here on,
      at later drops and, with `text: all`, among those that ask, beginning with this drop;
    - of the ranked, the floor(c * r') with the largest score are kept (in sequence order), the rest leave. What is
      kept is what counts as visual at the next drop: its c is floor(c * r').

    `rank_layer` says whose attention ranks: the `next` layer's, or (FastV) that of the `previous` one, which has just
    run, on what entered it.

    Products are rounded down in double precision, as everywhere. In a batch all rows lose as many as the row that
    may lose least, the smallest floor(c * r) - floor(c * r'); a row that so keeps more has them count as visual.
    So [0.5, 0.25] of n tokens leaves floor(n/2) - floor(floor(n/2)/2) + floor(floor(n/2)/4), about 37.5 %, and
    [0.5, 0] about 25 %. With a single drop it is the same as `entered`. A row without a visual token (text alone, a
    decode step) loses nothing, so nothing leaves in that call.
    """

    drops: tuple[tuple[int, float], ...]
    text: str = "all"
    positions: str | None = None
    rank_mask: str = "causal"
    rank_layer: str = "next"
    ratio_base: str = "entered"

    def __post_init__(self):
        _pick(self.text, TEXTS, "visual_prune.text")
        _pick(self.rank_mask, ("causal", "none"), "visual_prune.rank_mask")
        _pick(self.rank_layer, ("next", "previous"), "visual_prune.rank_layer")
        _pick(self.ratio_base, ("entered", "current"), "visual_prune.ratio_base")
        _pick(self.positions or "keep", ("renumber", "keep"), "visual_prune.positions")
        for (layer, keep), (later, less) in zip(self.drops, self.drops[1:]):
            if later <= layer or less > keep:
                raise ValueError(f"visual_prune.drops: expected rising layers and falling ratios; found {self.drops}")
        if any(not 0 <= keep <= 1 or layer < 1 for layer, keep in self.drops):
            raise ValueError(f"visual_prune.drops: expected layers from 1 and ratios in 0..1; found {self.drops}")

    def positions_of(self, mrope: bool, placed: bool = False) -> str:
        """What happens to positions; left out, they are kept with M-RoPE and where discarded features come in
        (`placed`), and contiguous otherwise."""
        if mrope and self.positions == "renumber":
            raise ValueError("visual_prune.positions: expected keep with M-RoPE's three rows; found renumber")
        return self.positions or ("keep" if mrope or placed else "renumber")


def parse(recipe: dict) -> tuple[Merge | Keep | None, Prune | None]:
    """Reads the structure of a recipe file; `marker` and `kv` do not change what is computed."""
    merge = prune = None
    for entry in recipe["passes"]:
        ((name, options),) = entry.items()
        if name == "token_merge":
            merge = Merge(**options)
        elif name == "visual_prune":
            options = dict(options)
            drops = tuple((d["after_layer"], d["keep"]) for d in options.pop("drops"))
            prune = Prune(drops, **options)
        elif name in KEEPERS:
            merge = Keep(name, **options)
        elif name == "fast_v":
            # FastV: one drop, by what the last token paid in the layer before; positions stay.
            drops = ((options.get("after_layer", 2), options["keep"]),)
            positions = options.get("positions", "keep")
            prune = Prune(drops, text="last", positions=positions, rank_layer="previous")
        else:
            known = ", ".join(("token_merge", *KEEPERS, "visual_prune", "fast_v"))
            raise ValueError(f"passes: expected one of {known}; found {name!r}")
    return merge, prune
