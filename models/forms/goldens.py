"""Records what the PyTorch reference gives for the models that only the forms have.

    python models/forms/goldens.py [SET ...]

Beside the goldens of models/llava and in the same files, for the language models of variants.py and the towers of
towers.py. The forms of `mha` and `gqa` are compared with
what models/llava/goldens.py records.
"""

import sys

import torch

import common
import towers
import variants
from common import LLAVA

sys.path.insert(0, str(LLAVA))
import goldens as recorder  # noqa: E402
from cases import PADDED_PART, PART, TOWER  # noqa: E402

# GroupQueryAttention, which the decoders of these are exported with, takes no padding on the left.
UNPADDED = ("mha16", "gqa16")
SETS = {name: PART if name in UNPADDED else PADDED_PART for name in variants.VARIANTS}
SETS |= {name: TOWER for name in ("siglip", "siglip2")}


def main() -> int:
    args = common.arguments(__doc__, SETS, recorder.GOLDENS)
    torch.set_grad_enabled(False)
    for name in args.names:
        tower = name in towers.SIZES
        model, size = (towers.model, towers.SIZES[name]) if tower else (variants.model, variants.size_of(name))
        recorder.record(name, SETS[name], args.out, model, size, optional=SETS[name])
    return 0


if __name__ == "__main__":
    sys.exit(main())
