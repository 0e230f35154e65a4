"""The cases of which goldens.py records what the method gives.

A case has a recipe (the structure of a recipe file) and turns; a turn has one prompt and one list of
pictures for each batch row. The second turn goes on with the cache of the first.
"""

from dataclasses import dataclass

from tokens import chat


@dataclass(frozen=True)
class Turn:
    prompts: tuple[str, ...]
    images: tuple[tuple[str, ...], ...]
    # For `text: salient`: pieces of the prompts whose tokens are marked (none: no token is). None: no mask.
    salient: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Case:
    what: str
    recipe: dict
    turns: tuple[Turn, ...]


def ask(text: str, images: int = 1) -> str:
    return chat([{"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}])


def merge(dominant, contextual, **options) -> dict:
    return {"token_merge": {"dominant": dominant, "contextual": contextual, **options}}


def prune(*drops, **options) -> dict:
    return {"visual_prune": {"drops": [{"after_layer": n, "keep": k} for n, k in drops], **options}}


def recipe(*passes, **options) -> dict:
    return {"version": 1, "passes": list(passes), **options}


SHORT, LONG = "What is it?", "Which number comes after 7? Answer the question using a single word or phrase."
ONE = Turn((ask(SHORT),), (("street",),))
OTHER = Turn((ask(LONG),), (("shapes",),))
NOISE = Turn((ask(LONG),), (("noise",),))
TWO_IMAGES = Turn((ask("Compare the first image with the second image.", 2),), (("street", "shapes"),))
NO_IMAGE = Turn((ask("Why do you think so?", 0),), ((),))
PADDED = Turn((ask(SHORT), ask(LONG)), (("street",), ("noise",)))
ONE_AND_TWO = Turn((ask("What colour is the largest shape?"), ask(SHORT, 2)), (("shapes",), ("street", "noise")))
TEXT_ROW = Turn((ask(LONG), ask("Is there a dog?", 0)), (("street",), ()))
IMAGE_LAST = Turn(("USER: What is the small house doing? <image>",), (("shapes",),))
SPREAD = Turn(
    ("USER: <image>\nIs it the red car or the blue boat? <image>\nWhere is the clock? ASSISTANT:",),
    (("noise", "street"),),
)
# Second turns go on where the first answer ended, so they have no BOS.
SECOND_TEXT = Turn((" USER: Is there a dog next to the road? ASSISTANT:",), ((),))
SECOND_IMAGE = Turn((" USER: <image>\nAnd what is this? ASSISTANT:",), (("noise",),))
SECOND_BOTH = Turn((" USER: <image>\nAnd this one? ASSISTANT:",) * 2, (("shapes",), ("street",)))

# Schedules: to zero in two steps, three steps, one that drops nothing.
FALL = ((2, 0.5), (5, 0.0))
STEPS = ((3, 0.5), (5, 0.25), (6, 0.125))

GQA = {
    "baseline": Case("no pass: the unmodified model", recipe(), (ONE,)),
    "baseline-padded": Case("no pass, two rows, padding on the left", recipe(), (PADDED,)),
    "merge": Case("the published merge: attention, CLS kept", recipe(merge(30, 6)), (ONE,)),
    "merge-uniform-drop": Case(
        "uniform anchors, CLS dropped", recipe(merge(20, 9, selector="uniform", cls="drop")), (OTHER,)
    ),
    "merge-local": Case("local anchors, CLS kept", recipe(merge(24, 5, selector="local", cluster_width=3)), (NOISE,)),
    "prune": Case("pruning alone, to zero in two steps", recipe(prune(*FALL)), (ONE,)),
    "prune-last-keep": Case(
        "ranked by the last token, positions kept", recipe(prune(*STEPS, text="last", positions="keep")), (OTHER,)
    ),
    "both": Case("both stages", recipe(merge(30, 6), prune(*FALL)), (ONE,)),
    "both-keep": Case("both stages, positions kept", recipe(merge(30, 6), prune(*STEPS, positions="keep")), (NOISE,)),
    "both-no-image": Case("a prompt without an image", recipe(merge(30, 6), prune(*FALL)), (NO_IMAGE,)),
    "both-two-images": Case("two images in one prompt", recipe(merge(18, 4), prune(*STEPS)), (TWO_IMAGES,)),
    "both-padded": Case("two rows of different length", recipe(merge(30, 6), prune(*FALL)), (PADDED,)),
    "both-one-and-two": Case("rows with one and two images", recipe(merge(18, 4), prune(*STEPS)), (ONE_AND_TWO,)),
    "both-second-turn": Case("a second question on the cache", recipe(merge(30, 6), prune(*FALL)), (ONE, SECOND_TEXT)),
    "both-second-image": Case(
        "a second question with an image", recipe(merge(30, 6), prune(*STEPS)), (ONE, SECOND_IMAGE)
    ),
    "prune-keep-second-image": Case(
        "a second image, positions kept", recipe(prune((3, 0.5), (6, 0.25), positions="keep")), (OTHER, SECOND_IMAGE)
    ),
}

SALIENT = {"marker": "input"}
MHA = {
    **GQA,
    "baseline-two-turns": Case("no pass, a second question with an image", recipe(), (ONE, SECOND_IMAGE)),
    "merge-drop": Case("attention, CLS dropped", recipe(merge(30, 6, cls="drop")), (OTHER,)),
    "merge-uniform": Case("uniform anchors, CLS kept", recipe(merge(20, 9, selector="uniform")), (ONE,)),
    "merge-local-drop": Case("local anchors, CLS dropped", recipe(merge(24, 5, selector="local", cls="drop")), (ONE,)),
    "merge-no-contextual": Case("no contextual token", recipe(merge(25, 0)), (NOISE,)),
    "merge-clamped": Case("more contextual tokens asked for than are left", recipe(merge(70, 40)), (ONE,)),
    "merge-all": Case("CLS and every patch kept", recipe(merge(82, 0)), (ONE,)),
    "merge-identity": Case("CLS dropped, every patch kept: the identity", recipe(merge(81, 0, cls="drop")), (OTHER,)),
    "merge-one": Case("CLS alone", recipe(merge(1, 0)), (ONE,)),
    "merge-ratios": Case("budgets as ratios, clusters 2 wide", recipe(merge(0.3, 0.1, cluster_width=2)), (TWO_IMAGES,)),
    "prune-nothing": Case("a schedule that keeps everything", recipe(prune((4, 1.0))), (ONE,)),
    "prune-last": Case("ranked by the last token", recipe(prune(*FALL, text="last")), (NOISE,)),
    "prune-salient": Case(
        "ranked by marked tokens, one of them before the image",
        recipe(prune(*STEPS, text="salient"), **SALIENT),
        (Turn((ask(LONG),), (("street",),), ("USER", "number", "single word")),),
    ),
    "prune-salient-none": Case(
        "no token marked: as by the last token",
        recipe(prune(*STEPS, text="salient"), **SALIENT),
        (Turn((ask(LONG),), (("street",),), ()),),
    ),
    "prune-spread": Case("text between two images", recipe(prune(*STEPS)), (SPREAD,)),
    "prune-zero-at-once": Case("all visual tokens leave after the first layer", recipe(prune((1, 0.0))), (OTHER,)),
    "prune-image-last": Case("no text after the image", recipe(prune(*STEPS)), (IMAGE_LAST,)),
    "both-image-last": Case(
        "no text after the image, which leaves whole", recipe(merge(30, 6), prune(*FALL)), (IMAGE_LAST,)
    ),
    "both-text-row": Case(
        "a row without an image: nothing is dropped", recipe(merge(30, 6), prune(*FALL)), (TEXT_ROW,)
    ),
    "both-keep-padded": Case(
        "two rows, positions kept, ranked by the last token",
        recipe(merge(30, 6), prune(*STEPS, text="last", positions="keep")),
        (PADDED,),
    ),
    "both-keep-one-and-two": Case(
        "rows with one and two images, positions kept",
        recipe(merge(18, 4), prune(*FALL, positions="keep")),
        (ONE_AND_TWO,),
    ),
    "both-padded-second-image": Case(
        "two padded rows, then an image for each", recipe(merge(30, 6), prune(*STEPS)), (PADDED, SECOND_BOTH)
    ),
    "both-three-turns": Case(
        "an image, a question, a second image", recipe(merge(30, 6), prune(*FALL)), (ONE, SECOND_TEXT, SECOND_IMAGE)
    ),
    "both-text-then-image": Case(
        "text first, the image in the second turn", recipe(merge(30, 6), prune(*STEPS)), (NO_IMAGE, SECOND_IMAGE)
    ),
}

PUBLISHED = recipe(merge(300, 7, cluster_width=4), prune((8, 0.5), (12, 0.0)))
DEMO = {
    "baseline": Case("no pass: the unmodified model", recipe(), (ONE,)),
    "both-192": Case("the published budget of 192 on true image geometry", PUBLISHED, (ONE,)),
    "both-192-shapes": Case("the same on the other picture", PUBLISHED, (OTHER,)),
}

# Models that differ in one part: a few cases that touch everything, none of which pads (some attention operators
# take no padding on the left) ...
PART = {
    key: MHA[key]
    for key in ("baseline", "merge", "prune-last-keep", "both", "both-no-image", "both-two-images", "both-second-turn")
}
# ... and, where the model can, two rows of different length.
PADDED_PART = {**PART, **{key: MHA[key] for key in ("baseline-padded", "both-padded", "both-keep-one-and-two")}}
# Towers without CLS: the budgets count patches, and received attention ranks for every selector.
TOWER = {
    key: MHA[key]
    for key in ("baseline", "merge", "merge-uniform-drop", "merge-local", "merge-no-contextual", "merge-ratios", "both")
}

# All features come out in their places, and the decoder drops the discarded ones behind its first layer.
PLACED = {"placement": "decoder"}
GQA_PLACED = {
    "merge": Case("the merge alone", recipe(merge(30, 6, **PLACED)), (ONE,)),
    "both": Case("both stages", recipe(merge(30, 6, **PLACED), prune(*FALL)), (OTHER,)),
    "both-second-image": Case(
        "a second question with an image", recipe(merge(30, 6, **PLACED), prune(*STEPS)), (ONE, SECOND_IMAGE)
    ),
    "both-one-and-two": Case(
        "rows with one and two images: one has discarded features left over",
        recipe(merge(18, 4, **PLACED), prune(*STEPS)),
        (ONE_AND_TWO,),
    ),
    "both-keep-local": Case(
        "local anchors, two images, positions kept",
        recipe(merge(24, 5, selector="local", **PLACED), prune(*STEPS, positions="keep")),
        (TWO_IMAGES,),
    ),
}
MHA_PLACED = {
    **GQA_PLACED,
    "both-at-once": Case(
        "a drop where the discarded features leave, ranked by the last token",
        recipe(merge(30, 6, **PLACED), prune((1, 0.6), (3, 0.3), text="last")),
        (NOISE, SECOND_TEXT),
    ),
    "both-text-row": Case(
        "a row without an image: all discarded features stay, masked",
        recipe(merge(30, 6, **PLACED), prune(*FALL)),
        (TEXT_ROW,),
    ),
}

# What other methods do: tokens kept as they are, and FastV's drop.
RIVALS = {
    "random": Case("places drawn from a seed", recipe({"random_drop": {"keep": 12, "seed": 7}}), (TWO_IMAGES,)),
    "uniform": Case("places at even steps", recipe({"uniform_drop": {"keep": 0.15}}), (ONE,)),
    "divprune": Case("the tokens that are least alike", recipe({"div_prune": {"keep": 16}}), (ONE,)),
    "divprune-two": Case(
        "of two images each, and pruned", recipe({"div_prune": {"keep": 0.2}}, prune(*FALL)), (TWO_IMAGES,)
    ),
    "fastv": Case("one drop after two layers", recipe({"fast_v": {"keep": 0.2}}), (ONE, SECOND_IMAGE)),
    "fastv-padded": Case(
        "two rows of different length, after three layers",
        recipe({"fast_v": {"after_layer": 3, "keep": 0.1}}),
        (PADDED,),
    ),
    "prune-previous": Case(
        "ranked by all text in the layer before, in steps", recipe(prune(*STEPS, rank_layer="previous")), (OTHER,)
    ),
}

SETS = {
    "mha": MHA,
    "gqa": GQA,
    "demo": DEMO,
    "mha-placed": MHA_PLACED,
    "gqa-placed": GQA_PLACED,
    "mha-rivals": RIVALS,
    "gqa-rivals": RIVALS,
}
