"""The rewritten ONNX model against PyTorch with the method, on the same weights, machine and inputs, in turns.

    python models/mid_size.py --out DIR
    duet plan DIR --budget 192 -o 192.yaml                          # and 128, 64
    duet rewrite DIR --recipe 192.yaml --beside 192                 # and 128, 64
    python models/bench_torch.py DIR 192 128 64 [--rounds N] [--threads N]

DIR is what mid_size.py wrote; the others are suffixes of what was written beside it. Compared are

- the unmodified model in PyTorch: the classes of Transformers, scaled_dot_product_attention, logits of the last
  token alone, as its `generate` does;
- PyTorch with the method: `reference/`, with the recipe that the rewritten file is stamped with. It is written to
  be read; what it does besides (indices as Python lists, attention written out) is small beside the products;
- the unmodified and the rewritten ONNX files with ONNX Runtime.

PyTorch is one process, as its models share the weights, each ONNX model one of its own, all with as many threads. In
a round each has one turn, the next round starts with another one: pixels and ids of one prompt (an image, --text
tokens around it) to the first token's logits, then decode steps. Printed are medians of all rounds, and ratios to
unmodified PyTorch (medians of the rounds' ratios). Logits of the prompt's last token are compared between PyTorch and
ONNX: that both dropped the same tokens.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import numpy as np

BEFORE = 6  # tokens of text in front of the image


class Onnx:
    """The files of a directory with a suffix, by ONNX Runtime."""

    def __init__(self, folder: Path, suffix: str, threads: int):
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        end = f"_{suffix}.onnx" if suffix else ".onnx"
        self.vision, self.embed, self.decoder = (
            ort.InferenceSession(folder / "onnx" / f"{name}{end}", options, providers=["CPUExecutionProvider"])
            for name in ("vision_encoder", "embed_tokens", "decoder_model_merged")
        )
        self.recipe = self.decoder.get_modelmeta().custom_metadata_map.get("duet.recipe")

    def step(self, embeds: np.ndarray, past: list | None) -> list:
        old = past[0].shape[2] if past else 0
        length = embeds.shape[1]
        feed = {
            "inputs_embeds": embeds,
            "attention_mask": np.ones((1, old + length), np.int64),
            "position_ids": np.arange(old, old + length)[None],
        }
        for index, value in enumerate(self.decoder.get_inputs()[3:]):
            _, heads, _, width = value.shape
            feed[value.name] = past[index] if past else np.zeros((1, heads, 0, width), np.float32)
        logits, *past = self.decoder.run(None, feed)
        return [logits[0, -1], past]

    def prompt(self, pixels: np.ndarray, text: np.ndarray) -> tuple:
        features = self.vision.run(None, {"pixel_values": pixels})[0]
        words = self.embed.run(None, {"input_ids": text})[0]
        logits, self.past = self.step(np.concatenate([words[:, :BEFORE], features, words[:, BEFORE:]], axis=1), None)
        return logits, features.shape[1]

    def token(self, number: int) -> None:
        self.step(self.embed.run(None, {"input_ids": np.array([[number]])})[0], self.past)


class Torch:
    """The same weights in PyTorch, unmodified or with the stages of one of the recipes."""

    def __init__(self, folder: Path, recipes: list[str | None], threads: int):
        import torch
        import yaml

        import mid_size
        from reference.llava import Llava
        from reference.recipe import parse

        torch.set_num_threads(threads)
        self.torch = torch
        config = json.loads((folder / "config.json").read_text())
        blocks = config["vision_config"]["num_hidden_layers"] - 1
        self.net = mid_size.model(mid_size.size_of(config["text_config"]["num_hidden_layers"], blocks))
        self.methods = [Llava(self.net, *parse(yaml.safe_load(r))) if r else None for r in recipes]
        self.image = self.net.config.image_token_index

    def prompt(self, pixels: np.ndarray, text: np.ndarray) -> tuple:
        torch = self.torch
        with torch.inference_mode():
            words, pixels = torch.from_numpy(text), torch.from_numpy(pixels)
            if self.method:
                features, _ = self.method.image_features(pixels)
            else:
                features = torch.stack(list(self.net.get_image_features(pixels).pooler_output))
            count = features.shape[1]
            ids = torch.cat([words[:, :BEFORE], torch.full((1, count), self.image), words[:, BEFORE:]], dim=1)
            self.length = ids.shape[1]
            if self.method:
                mask, positions = torch.ones_like(ids), torch.arange(self.length)[None]
                out = self.method.call(ids, mask, positions, features)
                self.past = out.cache
                return out.logits[0].numpy(), count
            embeds = self.net.get_input_embeddings()(ids)
            embeds[:, BEFORE : BEFORE + count] = features
            out = self.net.model.language_model(inputs_embeds=embeds, use_cache=True)
            self.past = out.past_key_values
            return self.net.lm_head(out.last_hidden_state[:, -1])[0].numpy(), count

    def token(self, number: int) -> None:
        torch = self.torch
        with torch.inference_mode():
            ids = torch.tensor([[number]])
            if self.method:
                mask = torch.ones(1, self.length + 1, dtype=torch.long)
                self.method.call(ids, mask, torch.tensor([[self.length]]), None, self.past)
                return
            embeds = self.net.get_input_embeddings()(ids)
            out = self.net.model.language_model(inputs_embeds=embeds, past_key_values=self.past, use_cache=True)
            self.net.lm_head(out.last_hidden_state[:, -1])
            # Every step starts from the prompt's cache.
            self.past.crop(-1)


def work(pipe, kind: str, arguments: tuple, pixels: np.ndarray, text: np.ndarray, steps: int) -> None:
    """A model's process: a turn for each message, until there are none."""
    model = {"onnx": Onnx, "torch": Torch}[kind](*arguments)
    pipe.send(getattr(model, "recipe", None))
    while (which := pipe.recv()) is not None:
        if kind == "torch":
            model.method = model.methods[which]
        began = time.perf_counter()
        logits, tokens = model.prompt(pixels, text)
        prompt, each = time.perf_counter() - began, []
        for number in range(steps):
            began = time.perf_counter()
            model.token(5 + number)
            each.append(time.perf_counter() - began)
        pipe.send((prompt, statistics.median(each), tokens, logits))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("suffixes", nargs="+", metavar="SUFFIX")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="decode steps in a turn")
    parser.add_argument("--text", type=int, default=40, help="tokens of text around the image")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    config = json.loads((args.folder / "config.json").read_text())
    random = np.random.default_rng(0)
    edge = config["vision_config"]["image_size"]
    pixels = random.standard_normal((1, 3, edge, edge)).astype(np.float32)
    text = random.integers(5, 400, (1, args.text))
    context = multiprocessing.get_context("spawn")
    # Of each model: its process, and its number there.
    workers = {}

    def start(names: list[str], kind: str, what) -> str | None:
        ours, theirs = context.Pipe()
        given = (theirs, kind, (args.folder, what, args.threads), pixels, text, args.steps)
        process = context.Process(target=work, args=given, daemon=True)
        process.start()
        # So that the end of the process is an error here, not a wait.
        theirs.close()
        workers.update({name: (ours, number) for number, name in enumerate(names)})
        return ours.recv()

    start(["ONNX"], "onnx", "")
    recipes = [start([f"ONNX, {suffix}"], "onnx", suffix) for suffix in args.suffixes]
    if None in recipes:
        parser.error(f"{args.suffixes[recipes.index(None)]}: its decoder is not a rewritten one")
    start(["PyTorch", *(f"PyTorch, {suffix}" for suffix in args.suffixes)], "torch", [None, *recipes])
    names = [f"{kind}{end}" for end in ["", *(f", {s}" for s in args.suffixes)] for kind in ("PyTorch", "ONNX")]
    turns = {name: [] for name in names}
    for number in range(args.rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            pipe, which = workers[name]
            pipe.send(which)
            turn = pipe.recv()
            # The first round warms up.
            if number:
                turns[name].append(turn)
    for pipe in {pipe for pipe, _ in workers.values()}:
        pipe.send(None)

    def ratio(name: str, what: int) -> float:
        rounds = zip(turns["PyTorch"], turns[name])
        return statistics.median(base[what] / own[what] for base, own in rounds)

    print(f"{'':18} features  first token          decode step          logits")
    for name in names:
        prompt, step = (statistics.median(t[i] for t in turns[name]) for i in (0, 1))
        end = ""
        partner = name.replace("ONNX", "PyTorch")
        if partner != name:
            ours, theirs = turns[name][-1][3], turns[partner][-1][3]
            end = f"{np.abs(ours - theirs).max() / theirs.std():.1e} σ from PyTorch's"
        print(
            f"{name:18} {turns[name][-1][2]:8} {prompt * 1e3:8.0f} ms {ratio(name, 0):6.2f}x"
            f"  {step * 1e3:8.1f} ms {ratio(name, 1):6.2f}x  {end}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
