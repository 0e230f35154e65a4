"""LLaVA models with language models other than Llama, exported as the fixtures are.

    python models/forms/decoders.py [--out DIR] [NAME ...]

| family | what is not as in Llama |
|---|---|
| `qwen2` | biases on q, k, v |
| `qwen3` | norms on the heads of q and k; attention wider than the residual stream |
| `mistral` | a sliding window (48 tokens, shorter than a prompt with an image) |
| `phi3` | one matrix for q, k, v and one for gate and up; half of each head is rotated |
| `gemma2` | norms before and after attention and MLP, as 1 + w; scores and logits capped; half of the layers slide |
| `gemma3` | the same norms, norms on q and k; five of six layers slide, with other rotation frequencies |
"""

import sys

import common
import variants
from export import Form

FAMILIES = {
    "ts-sdpa": Form("", "sdpa", 17, False),
    "ts-eager": Form("", "eager", 14, False),
    "dynamo18": Form("", "sdpa", 18, True),
    "dynamo18-eager": Form("", "eager", 18, True),
    "dynamo23": Form("", "sdpa", 23, True),
}
# Capped scores are only in the eager attention.
MADE = {
    "qwen2": ("ts-sdpa", "dynamo18", "dynamo23"),
    "qwen3": ("ts-sdpa", "dynamo18", "dynamo23"),
    "mistral": ("ts-eager", "dynamo18", "dynamo23"),
    "phi3": ("ts-sdpa", "dynamo18", "dynamo23"),
    "gemma2": ("ts-eager", "dynamo18-eager"),
    "gemma3": ("ts-sdpa", "dynamo18"),
}
FORMS = {f"{family}-{kind}": (family, kind) for family, kinds in MADE.items() for kind in kinds}


def main() -> int:
    args = common.arguments(__doc__, FORMS)
    good = True
    for name in args.names:
        family, kind = FORMS[name]
        form = FAMILIES[kind]
        how = f"{family}, {'dynamo' if form.dynamo else 'TorchScript'} opset {form.opset}, {form.attention}"
        folder = common.begin(args.out, name)
        try:
            variants.exported(family, form, folder)
        except Exception as error:
            common.not_made(args.out, name, how, error)
            continue
        size, net = variants.size_of(family), variants.model(family)
        good &= common.record(args.out, name, how, lambda: common.measure(args.out / name, net, size), 1e-4)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
