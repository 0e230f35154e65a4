"""The cases of which goldens.py records what the method gives.

A turn has one row of parts for each batch row: text, or a grid (time, height, width) of image tokens.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Turn:
    rows: tuple[tuple[str | tuple[int, int, int], ...], ...]


@dataclass(frozen=True)
class Case:
    what: str
    recipe: dict
    turns: tuple[Turn, ...]


def prune(*drops, **options) -> dict:
    entry = {"visual_prune": {"drops": [{"after_layer": n, "keep": k} for n, k in drops], **options}}
    return {"version": 1, "passes": [entry], "marker": "input"}


ASK, LONG = "\nWhat is it? ASSISTANT:", "\nHow many people stand with the dog? ASSISTANT:"
ONE = Turn((("USER: ", (1, 5, 7), LONG),))
TWO = Turn((("USER: ", (1, 4, 6), " and ", (1, 6, 3), LONG),))
PADDED = Turn((("USER: ", (1, 4, 4), ASK), ("USER: Look. ", (1, 3, 7), LONG)))
MIXED = Turn((("USER: ", (1, 5, 5), ASK), ("USER: ", (1, 3, 4), " ", (1, 2, 8), LONG)))
VIDEO = Turn((("USER: ", (3, 3, 4), LONG),))
NO_IMAGE = Turn((("USER: Is there a dog? ASSISTANT:",),))
SECOND_TEXT = Turn(((" USER: And how many houses? ASSISTANT:",),))
SECOND_IMAGE = Turn(((" USER: ", (1, 6, 4), "\nAnd this one? ASSISTANT:"),))
FALL, STEPS = ((2, 0.5), (4, 0.0)), ((1, 0.7), (2, 0.5), (4, 0.25))

CASES = {
    "baseline": Case("no pass: the unmodified model", {"version": 1, "passes": []}, (ONE,)),
    "one": Case("one image, positions as the model has them", prune(*STEPS), (ONE,)),
    "two": Case("two images of different grids", prune(*STEPS, positions="keep"), (TWO,)),
    "padded": Case("two rows of different length", prune((2, 0.5), (4, 0.25)), (PADDED,)),
    "mixed": Case("rows with one and two images, to zero", prune(*FALL), (MIXED,)),
    "last": Case("ranked by the last token, several frames", prune(*STEPS, text="last"), (VIDEO,)),
    "unmasked": Case("ranked without the causal mask", prune(*STEPS, rank_mask="none"), (TWO,)),
    "unmasked-padded": Case(
        "two rows of different length, ranked without the causal mask", prune((2, 0.5), rank_mask="none"), (PADDED,)
    ),
    "no-image": Case("a prompt without an image", prune(*FALL), (NO_IMAGE,)),
    "second-turn": Case("a second question on the cache", prune(*FALL), (ONE, SECOND_TEXT)),
    "second-image": Case("a second image on the cache", prune(*STEPS), (TWO, SECOND_IMAGE)),
}

# The public code's schedule, in a list of its own.
CURRENT = {
    "current": Case(
        "ratios of what is left, ranked without the causal mask: the public code's schedule",
        prune(*STEPS, ratio_base="current", rank_mask="none"),
        (ONE,),
    ),
    "current-zero": Case("ratios of what is left, to zero", prune(*FALL, ratio_base="current"), (TWO,)),
    "current-padded": Case(
        "ratios of what is left, rows with one and two images", prune(*STEPS, ratio_base="current"), (MIXED,)
    ),
    "current-last": Case(
        "ratios of what is left, ranked by the last token", prune(*STEPS, ratio_base="current", text="last"), (VIDEO,)
    ),
    "current-second-image": Case(
        "ratios of what is left, a second image on the cache", prune(*STEPS, ratio_base="current"), (TWO, SECOND_IMAGE)
    ),
}
