"""What `duet diff` and other tools find in the same pairs of models, as a table.

    pip install -r models/diff/requirements.txt
    pip install --no-deps onnx-diff==0.1.2
    cargo build --release
    python models/diff/side_by_side.py --duet target/release/duet > table.md

The pairs are made from the vision tower of a committed fixture, each with one thing done to it. A tool "finds"
a difference if it says of the pair something else than of the tower and itself (times and file names left
out), so a tool that only prints counts finds what changes a count. Besides the yes or no, each tool's time is
given. Right is: nothing for the first five pairs, something for the others.
"""

import argparse
import difflib
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np
import onnx
from onnx import numpy_helper as nh

TOWER = pathlib.Path(__file__).parents[1] / "llava/fixtures/ts-sdpa-mha/onnx/vision_encoder.onnx"


def tensor(model, least=256):
    return next(t for t in model.graph.initializer if t.data_type == 1 and np.prod(t.dims) >= least)


def nothing(model):
    pass


def rename(model):
    graph = model.graph
    kept = {v.name for v in [*graph.input, *graph.output]} | {""}
    names = {}
    new = lambda n: n if n in kept else names.setdefault(n, f"r{len(names)}")
    for node in graph.node:
        node.name = f"node{len(names)}_{node.op_type}"
        node.input[:] = [new(n) for n in node.input]
        node.output[:] = [new(n) for n in node.output]
    for thing in [*graph.initializer, *graph.value_info]:
        thing.name = new(thing.name)


def shuffle(model):
    """Another topological order, and another order of the initializers."""
    dice = random.Random(1)
    nodes, done, order = list(model.graph.node), {v.name for v in model.graph.input} | {""}, []
    done |= {t.name for t in model.graph.initializer}
    while nodes:
        ready = [n for n in nodes if all(i in done for i in n.input)]
        node = dice.choice(ready)
        nodes.remove(node)
        order.append(node)
        done |= set(node.output)
    weights = list(model.graph.initializer)
    dice.shuffle(weights)
    for field, items in [("node", order), ("initializer", weights)]:
        model.graph.ClearField(field)
        getattr(model.graph, field).extend(items)


def everything(model):
    rename(model)
    shuffle(model)


def one_element(model):
    t = tensor(model)
    array = nh.to_array(t).copy()
    array.flat[array.size // 2] *= 1.0001
    t.CopyFrom(nh.from_array(array, t.name))


def one_element_renamed(model):
    one_element(model)
    rename(model)


def attribute(model):
    node = next(n for n in model.graph.node if n.op_type == "LayerNormalization")
    next(a for a in node.attribute if a.name == "epsilon").f *= 10


def commuted(model):
    node = next(n for n in model.graph.node if n.op_type == "MatMul" and n.input[1] not in
                {t.name for t in model.graph.initializer})
    node.input[:] = node.input[::-1]


def crossed(model):
    """Queries and keys exchanged: the same nodes with the same numbers of readers, wired crosswise."""
    weights = {t.name for t in model.graph.initializer}
    products = [n for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in weights]
    a, b = products[0].input[1], products[1].input[1]
    products[0].input[1], products[1].input[1] = b, a


def inserted(model):
    node = next(n for n in model.graph.node if n.op_type == "Softmax")
    old = node.input[0]
    node.input[0] = "inserted"
    index = list(model.graph.node).index(node)
    model.graph.node.insert(index, onnx.helper.make_node("Identity", [old], ["inserted"], name="inserted"))


def opset(model):
    next(o for o in model.opset_import if o.domain in ("", "ai.onnx")).version += 1


def metadata(model):
    model.metadata_props.add(key="licence", value="none")


def dim(model):
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "images"


PAIRS = [
    ("the same file", nothing, None),
    ("weights in an external file", nothing, "external"),
    ("everything renamed", rename, None),
    ("another order of nodes and weights", shuffle, None),
    ("renamed and in another order", everything, None),
    ("one element of one weight", one_element, None),
    ("one element, everything renamed", one_element_renamed, None),
    ("one bit of an external file", nothing, "bit"),
    ("one attribute (epsilon)", attribute, None),
    ("operands of one MatMul exchanged", commuted, None),
    ("two weights of the same shape exchanged", crossed, None),
    ("one node inserted", inserted, None),
    ("operator set", opset, None),
    ("a key of the metadata", metadata, None),
    ("name of a dimension of the input", dim, None),
]


def duet(binary):
    def run(a, b):
        done = subprocess.run([binary, "diff", a, b, "--quiet"], capture_output=True, text=True)
        if done.returncode not in (0, 1):
            raise RuntimeError(done.stderr)
        return str(done.returncode)
    return run


def onnx_diff(a, b):
    """onnx-diff: the counts of what matches, without the graph kernel's score (which is not deterministic)."""
    from onnx_diff.diff import OnnxDiff
    return str(OnnxDiff(onnx.load(a), onnx.load(b)).summary(output=False))


def command(*line):
    def run(a, b):
        given = [str(a) if w == "A" else str(b) if w == "B" else w for w in line]
        done = subprocess.run(given, capture_output=True, text=True, timeout=300)
        if done.returncode != 0:
            raise RuntimeError(done.stderr[-200:])
        return done.stdout
    return run


def onnxsim(a, b):
    """The table that onnxsim prints of a model before and after."""
    import io
    import rich
    from onnxsim import model_info
    out = io.StringIO()
    rich.reconfigure(file=out, width=200)
    model_info.print_simplifying_info(onnx.load(a), onnx.load(b))
    return re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())


def printer(a, b):
    """onnx.printer's text of both, line by line."""
    lines = [onnx.printer.to_text(onnx.load(m)).splitlines() for m in (a, b)]
    return "\n".join(difflib.unified_diff(*lines, lineterm="", n=0))


def said(text, paths):
    for path in paths:
        text = text.replace(str(path), "MODEL")
    return re.sub(r"\d+\.\d+ ?m?s\b|0x[0-9a-f]+", "", text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--duet", required=True)
    arguments = parser.parse_args()
    scripts = pathlib.Path(sys.executable).parent
    tools = {
        "duet diff": duet(arguments.duet),
        "onnx-diff 0.1.2": onnx_diff,
        "diffonnx 1.0.2": command(str(scripts / "diffonnx"), "A", "B"),
        "onnxsim 0.8.1, table": onnxsim,
        "onnx.printer + difflib": printer,
    }
    print("| pair | right | " + " | ".join(tools) + " |")
    print("|---|---|" + "---|" * len(tools))
    wrong = dict.fromkeys(tools, 0)
    spent = dict.fromkeys(tools, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        base = pathlib.Path(folder, "base", "model.onnx")
        base.parent.mkdir()
        shutil.copy(TOWER, base)
        itself = {}
        for index, (name, change, storage) in enumerate(PAIRS):
            a, b = base, pathlib.Path(folder, f"pair{index}", "model.onnx")
            b.parent.mkdir()
            model = onnx.load(base)
            change(model)
            keep = dict(save_as_external_data=True, location="model.data", size_threshold=256)
            if storage == "bit":
                a = pathlib.Path(folder, f"pair{index}a", "model.onnx")
                a.parent.mkdir()
                onnx.save(onnx.load(base), a, **keep)
            onnx.save(model, b, **(keep if storage else {}))
            if storage == "bit":
                data = bytearray((b.parent / "model.data").read_bytes())
                data[len(data) // 2] ^= 1
                (b.parent / "model.data").write_bytes(data)
            right = index >= 5
            cells = []
            for tool, run in tools.items():
                try:
                    if a not in itself.setdefault(tool, {}):
                        itself[tool][a] = said(run(a, a), [a])
                    start = time.perf_counter()
                    found = said(run(a, b), [a, b]) != itself[tool][a]
                    taken = time.perf_counter() - start
                    spent[tool] += taken
                    mark = "found" if found else "nothing"
                    wrong[tool] += found != right
                    mark = mark if found == right else f"**{mark}**"
                    cells.append(f"{mark} ({taken:.2f} s)")
                except Exception as error:
                    wrong[tool] += 1
                    cells.append(f"**fails** ({type(error).__name__})")
            print(f"| {name} | {'found' if right else 'nothing'} | " + " | ".join(cells) + " |", flush=True)
    print("| wrong of " + str(len(PAIRS)) + " | | " + " | ".join(str(wrong[t]) for t in tools) + " |")
    print("| seconds in all | | " + " | ".join(f"{spent[t]:.1f}" for t in tools) + " |")


main()
