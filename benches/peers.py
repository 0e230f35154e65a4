"""Rewriting beside other tools that edit ONNX files, and beside `cp`, on the same machine in the same run.

    pip install -r benches/requirements.txt
    python benches/peers.py --duet target/release/duet --work DIR [--exporter PYTHON] [--only beside,copy,inline,7b]

| comparison | model | what is done |
|---|---|---|
| `beside` | 2,000 nodes, 2.6 GB of data | new .onnx files, data left where it is: `duet rewrite --beside`, and what of the other tools can |
| `copy` | the same, with random weights | a new model with data of its own: `duet rewrite --out`, the other tools, `cp -r` |
| `inline` | its decoder with the weights in the file, 1.9 GB | `duet rewrite --beside`, and `cp` of that file |
| `7b` | LLaVA-1.5-7B at its true size, 13 GB | as `beside` |

duet does its whole job: both passes of `llava-1.5-192` (its drops after half and three quarters of the layers) over all
three files, verified. The other tools do less, the
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
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
FULL_SIZE = HERE.parent / "models" / "full_size.py"
FILES = ("vision_encoder", "embed_tokens", "decoder_model_merged")
BLOCK = 1 << 26
SINK = bytearray(1 << 20)


# What the other tools do. Each: (folder with .onnx files, folder for the result or None for beside).


def edit_proto(model):
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
            return model
    graph.node.insert(1, helper.make_node("Identity", [old], ["edited"]))
    return model


def by_onnx(edit, source: Path, target: Path | None) -> None:
    """Each file loaded and saved by the onnx package, with `edit` (a model to a model) in between."""
    import onnx

    for name in FILES:
        model = edit(onnx.load(source / f"{name}.onnx", load_external_data=target is not None))
        if target is None:
            onnx.save(model, source / f"{name}_peer.onnx")
        else:
            data = f"{name}.onnx_data"
            onnx.save(model, target / f"{name}.onnx", save_as_external_data=True, location=data)


def peer_onnx(source: Path, target: Path | None) -> None:
    by_onnx(edit_proto, source, target)


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
    import onnx_graphsurgeon as gs

    def edit(model):
        graph = gs.import_onnx(model)
        first = graph.nodes[0]
        old = first.outputs[0]
        inner = gs.Variable("edited", dtype=old.dtype, shape=old.shape)
        first.outputs[0] = inner
        graph.nodes.insert(1, gs.Node("Identity", inputs=[inner], outputs=[old]))
        return gs.export_onnx(graph)

    by_onnx(edit, source, target)


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
class Tool:
    """A command, and what it leaves behind."""

    name: str
    command: list[str]
    leaves: list[Path]
    # Folders that have to be there.
    needs: list[Path] = field(default_factory=list)
    # What it reads to the last byte: in the page cache before it runs, whatever the tool before it has driven out.
    reads: list[Path] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    peak: int = 0
    anonymous: int = 0

    def clear(self) -> None:
        for path in self.leaves:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def run(self, look: bool) -> None:
        """One run; `look`: at its memory instead of the clock."""
        self.clear()
        for folder in self.needs:
            folder.mkdir()
        for path in self.reads:
            with open(path, "rb", buffering=0) as file:
                while file.readinto(SINK):
                    pass
        os.sync()
        with tempfile.TemporaryFile() as said:
            began = time.perf_counter()
            child = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=said)
            if look:
                self.watch(child)
            code = child.wait()
            seconds = time.perf_counter() - began
            said.seek(0)
            if code != 0:
                raise RuntimeError(f"{' '.join(self.command)}: exit code {code}\n{said.read().decode()}")
        if not look:
            self.times.append(seconds)
        self.clear()

    def watch(self, child: subprocess.Popen) -> None:
        """Reads the high-water mark until the process ends (its parent's does not count, as it does in `ru_maxrss`)."""
        while child.poll() is None:
            try:
                status = Path(f"/proc/{child.pid}/status").read_text()
            except OSError:
                break
            for line in status.splitlines():
                key, _, rest = line.partition(":")
                if key == "VmHWM":
                    self.peak = max(self.peak, int(rest.split()[0]) * 1024)
                elif key == "RssAnon":
                    self.anonymous = max(self.anonymous, int(rest.split()[0]) * 1024)
            time.sleep(0.0005)


def table(title: str, tools: list[Tool], runs: int) -> None:
    """Runs the tools in turns and prints their medians; the first one is what the others are compared with."""
    for tool in tools:
        tool.run(look=True)
    for _ in range(runs):
        for tool in tools:
            tool.run(look=False)
    own = statistics.median(tools[0].times)
    print(f"\n{title}\n\n| | time | ratio | peak memory | of it anonymous |\n|---|---|---|---|---|")
    for tool in tools:
        seconds = statistics.median(tool.times)
        shown = f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"
        ratio = f"{seconds / own:.2f}" if seconds < 10 * own else f"{seconds / own:.0f}"
        memory = [f"{m / 1e6:.0f} MB" if m else "–" for m in (tool.peak, tool.anonymous)]
        print(f"| {tool.name} | {shown} | {ratio} | {memory[0]} | {memory[1]} |", flush=True)


def recipe(args: argparse.Namespace, model: Path) -> Path:
    """passes/llava-1.5-192.yaml for a decoder of any depth."""
    layers = json.loads((model / "config.json").read_text())["text_config"]["num_hidden_layers"]
    drops = {layers // 2: 0.5, layers * 3 // 4: 0.0}
    listed = ", ".join(f"{{ after_layer: {layer}, keep: {keep} }}" for layer, keep in drops.items())
    path = args.work / f"recipe-{layers}.yaml"
    path.write_text(
        "version: 1\npasses:\n"
        "  - token_merge: { dominant: 300, contextual: 7, cluster_width: 4, selector: attention, cls: keep }\n"
        f"  - visual_prune: {{ drops: [{listed}], text: all, positions: renumber }}\n"
    )
    return path


def duet(args: argparse.Namespace, model: Path, target: Path | None, name: str) -> Tool:
    """The whole job."""
    command = [args.duet, "rewrite", str(model), "--recipe", str(recipe(args, model)), "--quiet"]
    if target is not None:
        return Tool(name, [*command, "--out", str(target)], [target])
    names = [f"onnx/{file}_peer.onnx" for file in FILES] + ["config_peer.json", "processor_config_peer.json"]
    return Tool(name, [*command, "--beside", "peer"], [model / n for n in names])


def peers(args: argparse.Namespace, model: Path, target: Path | None) -> list[Tool]:
    """The other tools, those that can."""
    found = []
    source = model / "onnx"
    for name in args.peers:
        _, alone = PEERS[name]
        if target is None and not alone:
            continue
        leaves = [target] if target else [source / f"{file}_peer.onnx" for file in FILES]
        command = [sys.executable, __file__, "--peer", name, str(source), *([str(target)] if target else [])]
        shown = f"{name} {importlib.metadata.version(name)}"
        found.append(Tool(shown, command, leaves, [target] if target else []))
    return found


def inside(args: argparse.Namespace, model: Path, runs: int) -> None:
    """What the time goes to, as `duet rewrite -v` says it."""
    tool = duet(args, model, None, "")
    command = [c for c in tool.command if c != "--quiet"] + ["-v"]
    pattern = re.compile(r"in ([\d.]+) ms; .* in ([\d.]+) ms; .* in ([\d.]+) ms")
    found = []
    for _ in range(runs):
        tool.clear()
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        times = pattern.search(said)
        if times is None:
            raise RuntimeError(f"{' '.join(command)} does not say what its time goes to:\n{said}")
        found.append([float(n) for n in times.groups()])
    tool.clear()
    steps = [statistics.median(times) for times in zip(*found)]
    total = statistics.median(sum(times) for times in found)
    print(
        f"\nInside: {steps[0]:.1f} ms reading, verifying and recognising, {steps[1]:.1f} ms patching and verifying, "
        f"{steps[2]:.1f} ms writing; {total:.1f} ms together."
    )


def described(model: Path) -> str:
    import onnx

    paths = [model / "onnx" / f"{name}.onnx" for name in FILES]
    nodes = sum(len(onnx.load(path, load_external_data=False).graph.node) for path in paths)
    data = sum(p.stat().st_size for p in model.glob("onnx/*_data"))
    return f"{nodes:,} nodes, {data / 1e9:.1f} GB of data"


def main() -> int:
    if sys.argv[1:2] == ["--peer"]:
        _, _, name, source, *target = sys.argv
        PEERS[name][0](Path(source), Path(target[0]) if target else None)
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--duet", default="target/release/duet")
    parser.add_argument("--work", type=Path, required=True, help="where models are made and kept")
    parser.add_argument("--exporter", default=sys.executable, help="Python with models/requirements.txt")
    parser.add_argument("--only", default="beside,copy,inline,7b")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--layers", type=int, default=14, help="decoder layers of the model of 2,000 nodes")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    args.peers = [name for name in args.peers.split(",") if name]
    args.work.mkdir(parents=True, exist_ok=True)
    only = set(args.only.split(","))
    small = make(args.work, "narrow", args.exporter, "llava-narrow", args.layers)
    target = args.work / "written"
    if "beside" in only:
        title = f"New files, data left where it is ({described(small)}, in holes)"
        table(title, [duet(args, small, None, "duet rewrite --beside"), *peers(args, small, None)], args.runs)
        inside(args, small, args.runs)
    if "copy" in only:
        model = filled(args.work, small)
        copy = Tool("cp -r", ["cp", "-r", str(model), str(target)], [target])
        tools = [duet(args, model, target, "duet rewrite --out"), copy, *peers(args, model, target)]
        for tool in tools:
            tool.reads = sorted(model.glob("onnx/*"))
        table(f"A new model with data of its own ({described(model)})", tools, args.runs)
    if "inline" in only:
        model = inlined(args.work, filled(args.work, small))
        file = model / "onnx" / f"{FILES[2]}.onnx"
        copied = args.work / "copied.onnx"
        copy = Tool("cp of the decoder", ["cp", str(file), str(copied)], [copied])
        title = f"Weights inside the decoder's file ({file.stat().st_size / 1e9:.2f} GB)"
        tools = [duet(args, model, None, "duet rewrite --beside"), copy]
        for tool in tools:
            tool.reads = [file]
        table(title, tools, args.runs)
    if "7b" in only:
        model = make(args.work, "llava-1.5-7b", args.exporter, "llava-1.5", None)
        title = f"LLaVA-1.5-7B, data left where it is ({described(model)}, in holes)"
        table(title, [duet(args, model, None, "duet rewrite --beside"), *peers(args, model, None)], args.runs)
        inside(args, model, args.runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
