"""Rewriting beside other tools that edit ONNX files, and beside `cp`, on the same machine in the same run.

    pip install -r benches/requirements.txt
    python benches/peers.py --duet target/release/duet --work DIR [--exporter PYTHON] [--only beside,copy,inline,7b]

| comparison | model | what is done |
|---|---|---|
| `beside` | 2,000 nodes, 2.6 GB of data | new .onnx files, data left where it is: `duet rewrite --beside`, and what of the other tools can |
| `copy` | the same, with random weights | a new model with data of its own: `duet rewrite --out`, the other tools, `cp -r` |
| `inline` | its decoder with the weights in the file, 1.9 GB | `duet rewrite --beside`, and `cp` of that file |
| `7b` | LLaVA-1.5-7B at its true size, 13 GB | as `beside` |

duet does its whole job: both passes of `llava-1.5-192` over all three files, verified. The other tools do less, the
nearest that they have: load each file, put one node into it, save it (`onnxslim`: load, slim, save). Commands run in
turns, each in a process of its own; printed are medians of whole processes, Python's start and imports included, and
their ratio to duet's. Peak memory is the largest `VmHWM` of /proc/PID/status in one more run: mapped pages of files are
counted like any others.

Models are made once and kept in `--work` (10 GB), by models/full_size.py with the interpreter `--exporter` (models/requirements.txt).
Data files of holes are enough where no weight is read or written, and help the tools that read them. `--layers 2 --runs 1` is
a quick look. Linux.
"""

import argparse
import importlib.metadata
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
FULL_SIZE = HERE.parent / "models" / "full_size.py"
FILES = ("vision_encoder", "embed_tokens", "decoder_model_merged")
RECIPE = "llava-1.5-192"
BLOCK = 1 << 26


# What the other tools do. Each: (folder with .onnx files, folder for the result or None for beside).


def edit_proto(model) -> None:
    """An Identity behind the first node."""
    from onnx import helper

    graph = model.graph
    old = graph.node[0].output[0]
    for node in graph.node:
        node.input[:] = ["edited" if name == old else name for name in node.input]
    for value in graph.output:
        if value.name == old:
            graph.node[0].output[0] = "edited"
            graph.node.insert(1, helper.make_node("Identity", ["edited"], [old]))
            return
    graph.node.insert(1, helper.make_node("Identity", [old], ["edited"]))


def peer_onnx(source: Path, target: Path | None) -> None:
    import onnx

    for name in FILES:
        model = onnx.load(source / f"{name}.onnx", load_external_data=target is not None)
        edit_proto(model)
        if target is None:
            onnx.save(model, source / f"{name}_peer.onnx")
        else:
            data = f"{name}.onnx_data"
            onnx.save(model, target / f"{name}.onnx", save_as_external_data=True, location=data)


def peer_onnx_ir(source: Path, target: Path | None) -> None:
    import onnx_ir as ir

    for name in FILES:
        model = ir.load(source / f"{name}.onnx")
        first = model.graph.node(0)
        node = ir.node("Identity", [first.outputs[0]])
        ir.convenience.replace_all_uses_with(first.outputs[0], node.outputs[0], replace_graph_outputs=True)
        node.replace_input_with(0, first.outputs[0])
        model.graph.insert_after(first, node)
        if target is None:
            ir.save(model, source / f"{name}_peer.onnx")
        else:
            ir.save(model, target / f"{name}.onnx", external_data=f"{name}.onnx_data")


def peer_graphsurgeon(source: Path, target: Path | None) -> None:
    import onnx
    import onnx_graphsurgeon as gs

    for name in FILES:
        graph = gs.import_onnx(onnx.load(source / f"{name}.onnx", load_external_data=target is not None))
        first = graph.nodes[0]
        old = first.outputs[0]
        inner = gs.Variable("edited", dtype=old.dtype, shape=old.shape)
        first.outputs[0] = inner
        graph.nodes.insert(1, gs.Node("Identity", inputs=[inner], outputs=[old]))
        model = gs.export_onnx(graph)
        if target is None:
            onnx.save(model, source / f"{name}_peer.onnx")
        else:
            data = f"{name}.onnx_data"
            onnx.save(model, target / f"{name}.onnx", save_as_external_data=True, location=data)


def peer_onnxslim(source: Path, target: Path | None) -> None:
    import onnxslim

    for name in FILES:
        path = (target or source) / (f"{name}.onnx" if target else f"{name}_peer.onnx")
        onnxslim.slim(str(source / f"{name}.onnx"), str(path), save_as_external_data=True)


# Name -> (function, whether it can leave the data where it is).
PEERS = {
    "onnx": (peer_onnx, True),
    "onnx-ir": (peer_onnx_ir, True),
    "onnx-graphsurgeon": (peer_graphsurgeon, True),
    "onnxslim": (peer_onnxslim, False),
}


# Models


def make(work: Path, name: str, exporter: str, family: str, layers: int | None) -> Path:
    """A model of models/full_size.py, unless it is there."""
    place = work / f"{name}{layers or ''}"
    if not place.is_dir():
        part = work / f"{place.name}.part"
        command = [exporter, str(FULL_SIZE), "--family", family, "--out", str(part)]
        command += ["--layers", str(layers)] if layers else []
        subprocess.run(command, check=True, stdout=sys.stderr, stderr=subprocess.DEVNULL)
        part.rename(place)
    return place


def filled(work: Path, source: Path) -> Path:
    """The same model with random bytes for weights."""
    place = work / f"{source.name}-filled"
    if not place.is_dir():
        part = work / f"{place.name}.part"
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(source, part, ignore=shutil.ignore_patterns("*_data"))
        block = os.urandom(BLOCK)
        for data in source.glob("onnx/*_data"):
            left = data.stat().st_size
            with open(part / "onnx" / data.name, "wb") as file:
                while left:
                    left -= file.write(block[: min(left, BLOCK)])
        os.sync()
        part.rename(place)
    return place


def inlined(work: Path, source: Path) -> Path:
    """The same model with the decoder's weights in its .onnx file. In a process of its own, for its memory."""
    place = work / f"{source.name}-inline"
    if not place.is_dir():
        part = work / f"{place.name}.part"
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(source, part, ignore=shutil.ignore_patterns("decoder*"))
        at = f"onnx/{FILES[2]}.onnx"
        code = "import onnx, sys; onnx.save(onnx.load(sys.argv[1]), sys.argv[2])"
        subprocess.run([sys.executable, "-c", code, str(source / at), str(part / at)], check=True)
        os.sync()
        part.rename(place)
    return place


# Measuring


@dataclass
class Run:
    """A command, and what it leaves behind."""

    name: str
    command: list[str]
    leaves: list[str]
    root: Path

    def clear(self) -> None:
        for pattern in self.leaves:
            for path in self.root.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def start(self) -> subprocess.Popen:
        self.clear()
        for pattern in self.leaves:
            if pattern.endswith("-peer") and not pattern.startswith("*"):
                (self.root / pattern).mkdir()
        return subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def check(self, child: subprocess.Popen) -> None:
        error = child.stderr.read()
        if child.wait() != 0:
            raise RuntimeError(f"{' '.join(self.command)}: exit code {child.returncode}\n{error}")

    def seconds(self) -> float:
        os.sync()
        child = self.start()
        began = time.perf_counter()
        child = child if child.poll() is None else child
        raise NotImplementedError


def main() -> int:
    return 0


if __name__ == "__main__":
    sys.exit(main())
