"""What the scripts of this directory share: output folders, a check that runs any form, and the record of it.

A form is a directory in the Hugging Face layout. `measure` runs its files as they are under ONNX Runtime on
a prompt with an image, a decode step, a second question on the same cache and a further step, feeding each
graph what its own inputs ask for, and compares with the PyTorch model that the weights came from. `record`
writes the outcome into `forms.json` beside the forms: also that a form does not load or does not run.
"""

import argparse
import json
import logging
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from transformers import LlavaForConditionalGeneration
from transformers.cache_utils import DynamicCache
from transformers.utils.logging import disable_progress_bar

HERE = Path(__file__).parent
LLAVA = HERE.parent / "llava"
sys.path.insert(0, str(LLAVA))

import build  # noqa: E402, F401
import tokens  # noqa: E402
from export import clean  # noqa: E402, F401

FIXTURES = LLAVA / "fixtures"
STEMS = ("vision_encoder", "embed_tokens", "decoder_model_merged")
DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


def begin(out: Path, name: str, source: str | None = None) -> Path:
    """An empty directory for form `name` with the JSON files of fixture `source` (all but the graphs)."""
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "onnx").mkdir(parents=True)
    if source:
        for path in sorted((FIXTURES / source).iterdir()):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    return folder


def session(path: Path, level: str = "ORT_ENABLE_ALL") -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class Bundle:
    """The sessions of a form, whatever its files' suffix, and one way to feed all decoders."""

    def __init__(self, folder: Path, head_dim: int):
        self.head_dim = head_dim
        found = {p.name.removesuffix(".onnx"): p for p in sorted(folder.rglob("*.onnx"))}

        def first(*stems: str) -> ort.InferenceSession | None:
            for stem in stems:
                for name, path in found.items():
                    if name == stem or (name.startswith(f"{stem}_") and not name.startswith(f"{stem}_with")):
                        return session(path)
            return None

        self.vision = first("vision_encoder")
        self.embed = first("embed_tokens")
        self.decoder = first("decoder_model_merged", "decoder_model", "model", "text")
        self.later = first("decoder_with_past_model") or self.decoder

    @staticmethod
    def _run(which: ort.InferenceSession, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        typed = {i.name: feed[i.name].astype(DTYPES[i.type]) for i in which.get_inputs()}
        names = [o.name for o in which.get_outputs()]
        return dict(zip(names, which.run(names, typed), strict=True))

    def image_features(self, pixel_values: np.ndarray) -> np.ndarray:
        batch, _, height, width = pixel_values.shape
        feed = {"pixel_values": pixel_values, "pixel_attention_mask": np.ones((batch, height, width), bool)}
        return next(iter(self._run(self.vision, feed).values())).astype(np.float32)

    def inputs_embeds(self, input_ids: np.ndarray) -> np.ndarray:
        return next(iter(self._run(self.embed, {"input_ids": input_ids}).values())).astype(np.float32)

    def decode(self, embeds, mask, positions, past: dict | None, ids=None) -> dict[str, np.ndarray]:
        """`logits` and `present.*`; `past` None is an empty cache, `ids` are for decoders that embed."""
        which = self.decoder if past is None else self.later
        feed = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}
        if ids is not None:
            feed["input_ids"] = ids
        # The input of If-merged decoders. Names that a graph does not have are not fed.
        feed["use_cache_branch"] = np.array([past is not None])
        for value in which.get_inputs():
            if value.name.startswith("past_key_values"):
                present = value.name.replace("past_key_values", "present")
                _, heads, _, width = value.shape
                # ONNX Runtime GenAI's builder leaves the width of a head open.
                width = width if isinstance(width, int) else self.head_dim
                feed[value.name] = past[present] if past else np.zeros((len(mask), heads, 0, width), np.float32)
        return self._run(which, feed)


def torch_decode(net, embeds: np.ndarray, mask: np.ndarray, positions: np.ndarray, cache: DynamicCache) -> np.ndarray:
    with torch.no_grad():
        out = net.model.language_model(
            inputs_embeds=torch.from_numpy(embeds),
            attention_mask=torch.from_numpy(mask),
            position_ids=torch.from_numpy(positions),
            past_key_values=cache,
            use_cache=True,
        )
        return head(net, out.last_hidden_state).numpy()


def head(net, states: torch.Tensor) -> torch.Tensor:
    """Logits of hidden states, with the cap that Gemma 2 puts on them."""
    logits = net.lm_head(states)
    cap = getattr(net.config.text_config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def torch_features(net: LlavaForConditionalGeneration, pixels: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        features = net.get_image_features(torch.from_numpy(pixels))
    # Transformers 5 returns an output object, 4 the tensors.
    features = getattr(features, "pooler_output", features)
    return torch.stack(list(features)).numpy()


def positions_of(mask: np.ndarray) -> np.ndarray:
    return np.clip(np.cumsum(mask, axis=1) - 1, 0, None)


def apart(got: np.ndarray, want: np.ndarray, where: np.ndarray | None = None) -> float:
    """Largest difference in units of the standard deviation of what is expected; infinite for NaN."""
    if got.shape != want.shape:
        raise RuntimeError(f"shape {got.shape}, expected {want.shape}")
    difference = np.abs(got.astype(np.float64) - want)
    if where is not None:
        difference = difference[where]
    worst = float(difference.max()) / float(want.std())
    return worst if worst == worst else float("inf")


# Holds for every form, however coarse its numbers are: logits of the prompt that say the same as PyTorch's.
UNLIKE = "1 - correlation of logits"
UNLIKE_AT_MOST = 0.25

# Tokens fed after the prompt: a decode step, a second question of several tokens, a step.
STEPS = (1, 6, 1)


def measure(folder: Path, net, size, plan: dict[int, tuple[int, ...]] | None = None, padded: bool = True) -> dict:
    """Differences to PyTorch, keyed by what was compared, in standard deviations of what is expected.

    `plan` maps batch sizes to the numbers of tokens fed after the prompt, by default STEPS for 1 and 2.
    `padded`: the first row of a larger batch is padded by two on the left.
    """
    text = net.config.text_config
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    bundle = Bundle(folder, width)
    embeds_inside = any(i.name == "input_ids" for i in bundle.decoder.get_inputs())
    result = {}
    for batch, steps in (plan or {1: STEPS, 2: STEPS}).items():
        rng = np.random.default_rng(batch)
        ids = rng.integers(5, tokens.VOCAB, (batch, 12))
        table = net.get_input_embeddings()
        with torch.no_grad():
            want = table(torch.from_numpy(ids)).numpy()
        embeds = want
        if bundle.embed:
            embeds = bundle.inputs_embeds(ids)
            result[f"batch {batch} embeddings"] = apart(embeds, want)
        if bundle.vision:
            pixels = rng.standard_normal((batch, 3, size.image, size.image)).astype(np.float32)
            expected = torch_features(net, pixels)
            features = bundle.image_features(pixels)
            result[f"batch {batch} features"] = apart(features, expected)
            if not embeds_inside:
                # Torch gets the graph's own features: each file is compared by itself.
                embeds = np.concatenate([embeds[:, :5], features, embeds[:, 5:]], axis=1)
        mask = np.ones(embeds.shape[:2], np.int64)
        if batch > 1 and padded:
            mask[0, :2] = 0
        # Without the configuration no layer is cut at a sliding window, as none is in an export.
        cache, past = DynamicCache(), None
        for step, length in enumerate((embeds.shape[1], *steps)):
            if step:
                ids = rng.integers(5, tokens.VOCAB, (batch, length))
                with torch.no_grad():
                    embeds = table(torch.from_numpy(ids)).numpy()
                if bundle.embed:
                    embeds = bundle.inputs_embeds(ids)
                mask = np.concatenate([mask, np.ones((batch, length), np.int64)], axis=1)
            positions = positions_of(mask)[:, -length:]
            want = torch_decode(net, embeds, mask, positions, cache)
            out = bundle.decode(embeds, mask, positions, past, ids)
            past = {k: v for k, v in out.items() if k.startswith("present")} or None
            real = mask[:, -length:] == 1
            if out["logits"].shape[1] < length:
                # Made to compute the last row only, as GenAI's builder can.
                want, real = want[:, -1:], real[:, -1:]
            result[f"batch {batch} step {step} logits"] = apart(out["logits"], want, real)
            if not step:
                pair = (out["logits"][real].ravel(), want[real].ravel())
                result[f"batch {batch} {UNLIKE}"] = 1 - float(np.corrcoef(*pair)[0, 1])
            if past is None:
                break
            for index, layer in enumerate(cache.layers):
                for part, value in (("key", layer.keys), ("value", layer.values)):
                    got = past[f"present.{index}.{part}"]
                    seen = np.broadcast_to(mask[:, None, :, None] == 1, value.shape)
                    key = f"batch {batch} step {step} cache"
                    worst = apart(got.astype(np.float32), value.numpy(), seen)
                    result[key] = max(result.get(key, 0.0), worst)
    return result


TRIVIA = {"Constant", "Identity", "Shape", "Gather", "Unsqueeze", "Squeeze", "Concat", "Slice", "Cast", "Reshape"}


def nodes(graph: onnx.GraphProto) -> Iterable[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for sub in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from nodes(sub)


def histogram(path: Path) -> dict[str, int]:
    """Operators of a file, sub-graphs and functions included, without the shape arithmetic."""
    model = onnx.load(path, load_external_data=False)
    every = list(nodes(model.graph)) + [n for f in model.functions for n in f.node]
    count = Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in every)
    return {k: v for k, v in sorted(count.items()) if k not in TRIVIA}


def shorten(error: BaseException) -> str:
    """What went wrong first, in one line."""
    while error.__cause__:
        error = error.__cause__
    return " ".join(str(error).split())[:400]


def record(out: Path, name: str, how: str, test: Callable[[], dict], tolerance: float | None, note: str = "") -> bool:
    """Runs `test` and writes what came of it; True unless it ran and exceeded `tolerance` or UNLIKE_AT_MOST.

    A form that ONNX Runtime does not load or run is a result, not a failure of the script: `runs` is false
    and `error` says why.
    """
    folder = out / name
    entry: dict = {"how": how, "made": True, "runs": True}
    try:
        differences = test()
        entry["worst"] = max(v for k, v in differences.items() if not k.endswith(UNLIKE))
        entry["unlike"] = max((v for k, v in differences.items() if k.endswith(UNLIKE)), default=0.0)
        entry["differences"] = {k: float(f"{v:.3g}") for k, v in differences.items()}
    except Exception as error:  # what the runtime raises has no common base but RuntimeError's siblings
        if type(error).__module__.split(".")[0] not in {"onnxruntime", "builtins"}:
            raise
        entry["runs"] = False
        entry["error"] = shorten(error).replace(f"{folder}/", "")
    if note:
        entry["note"] = note
    entry["bytes"] = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    entry["operators"] = {str(p.relative_to(folder)): histogram(p) for p in sorted(folder.rglob("*.onnx"))}
    write(out, name, entry)
    close = tolerance is None or entry.get("worst", 0) <= tolerance
    # Written so that NaN is not good.
    good = not entry["runs"] or (close and entry["unlike"] <= UNLIKE_AT_MOST)
    state = f"worst {entry['worst']:.2e} sd" if entry["runs"] else f"does not run: {entry['error'][:160]}"
    print(f"{name:36} {entry['bytes'] // 1024:6} KiB  {state}{'' if good else '  EXCEEDS its tolerance'}", flush=True)
    return good


def not_made(out: Path, name: str, how: str, error: Exception) -> None:
    """Records that the tool could not make form `name`."""
    shutil.rmtree(out / name, ignore_errors=True)
    write(out, name, {"how": how, "made": False, "error": shorten(error)})
    print(f"{name:36} not made: {shorten(error)[:200]}", flush=True)


def write(out: Path, name: str, entry: dict) -> None:
    table = out / "forms.json"
    known = json.loads(table.read_text()) if table.exists() else {}
    known[name] = entry
    table.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")


def arguments(doc: str, names: Iterable[str], out: Path = HERE / "all") -> argparse.Namespace:
    names = list(names)
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("names", nargs="*", default=names, metavar="NAME", help=", ".join(names))
    args = parser.parse_args()
    unknown = [n for n in args.names if n not in names]
    if unknown:
        parser.error(f"unknown {', '.join(unknown)}; expected some of {', '.join(names)}")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(2)
    # ONNX Runtime's tools switch on the root logger, and the exporters then tell thousands of lines.
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    disable_progress_bar()
    return args
