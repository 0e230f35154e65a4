"""The cases of which goldens.py records what the method gives, for both families."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "llava"))

from cases import LONG, SECOND_TEXT, SHORT, Case, Turn, ask, merge, prune, recipe  # noqa: E402

STEPS, FALL = ((2, 0.5), (4, 0.25)), ((2, 0.5), (4, 0.0))
FIVE = Turn((ask(SHORT),), (("street",),))
OTHER = Turn((ask(LONG),), (("shapes",),))
# The smallest number of crops that the family has: two in LLaVA-OneVision, three in LLaVA-NeXT.
FEW = Turn((ask(LONG),), (("small",),))
WIDE = Turn((ask(SHORT),), (("wide",),))
TWO_IMAGES = Turn((ask("Compare the first image with the second image.", 2),), (("small", "wide"),))
PADDED = Turn((ask(SHORT), ask(LONG)), (("small",), ("shapes",)))
SECOND_IMAGE = Turn((" USER: <image>\nAnd what is this? ASSISTANT:",), (("small",),))

CASES = {
    "baseline": Case("no pass: newline tokens and no padding", recipe(), (FIVE,)),
    "baseline-few": Case("no pass, an image of few crops", recipe(), (FEW,)),
    "baseline-wide": Case("no pass, a wide image", recipe(), (WIDE,)),
    "merge": Case("each crop merged", recipe(merge(12, 3)), (FIVE,)),
    "merge-few": Case("each of few crops merged", recipe(merge(12, 3)), (FEW,)),
    "merge-local-drop": Case("local anchors, CLS dropped", recipe(merge(9, 4, selector="local", cls="drop")), (OTHER,)),
    "merge-ratios": Case("budgets as ratios of a crop's patches", recipe(merge(0.4, 0.1)), (TWO_IMAGES,)),
    "prune": Case("pruning alone, newline tokens among the visual ones", recipe(prune(*STEPS)), (FIVE,)),
    "prune-few": Case("pruning alone, few crops", recipe(prune(*STEPS)), (FEW,)),
    "prune-zero": Case("all crops leave", recipe(prune(*FALL, text="last")), (WIDE,)),
    "prune-keep": Case("positions kept", recipe(prune(*STEPS, positions="keep")), (OTHER,)),
    "prune-two-images": Case("two images of different numbers of crops", recipe(prune(*STEPS)), (TWO_IMAGES,)),
    "both": Case("both passes, five crops", recipe(merge(12, 3), prune(*STEPS)), (FIVE,)),
    "both-few": Case("both passes, few crops", recipe(merge(12, 3), prune(*STEPS)), (FEW,)),
    "both-padded": Case("two rows of different numbers of crops", recipe(merge(12, 3), prune(*STEPS)), (PADDED,)),
    "both-second-turn": Case(
        "a question, then a second image", recipe(merge(12, 3), prune(*FALL)), (WIDE, SECOND_TEXT, SECOND_IMAGE)
    ),
}
