"""How `duet diff` grows: times and memory on large pairs, each beside what reads the same bytes.

    python models/diff/scale.py --duet target/release/duet [--gib 10] [--folder DIR]

Weights are compared with `cmp`, which reads both files to the end (the element that changed is the last one);
graphs with `onnx.load`, which reads and decodes them. Both are run in turns with `duet diff`, five times (large
files three), and medians and their ratio are printed, with the peak memory of `duet diff`. `--gib` is the size of
the weights of each of the two models; the folder has to have room for both.
"""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BLOCK = 1 << 26


def run(command: list[str], codes: tuple[int, ...]) -> tuple[float, int]:
    """Seconds and peak memory in bytes of a command that has to end with one of `codes`."""
    start = time.perf_counter()
    with open(os.devnull, "w") as out:
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE)
        _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    code = os.waitstatus_to_exitcode(status)
    if code not in codes:
        raise RuntimeError(f"{' '.join(command)}: exit code {code}\n{child.stderr.read().decode()}")
    return seconds, usage.ru_maxrss * 1024


def external(folder: Path, name: str, data: str, elements: int) -> None:
    """One product with a weight of `elements` floats in the file `data`."""
    from onnx import TensorProto, helper

    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[elements // 1024, 1024])
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", data), ("offset", "0"), ("length", str(4 * elements))):
        weight.external_data.add(key=key, value=value)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", elements // 1024])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1024])
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "weights", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    (folder / name).write_bytes(model.SerializeToString())


def chain(path: Path, count: int, inserted: bool, prefix: str, weights: bool) -> None:
    """`count` nodes one after the other: with `weights` each adds 16 KiB of its own, else nothing tells them apart."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper

    rng = np.random.default_rng(0)
    nodes, tensors, at = [], [], "x"
    for i in range(count):
        inputs = [at]
        if weights:
            tensors.append(onnx.numpy_helper.from_array(rng.standard_normal(4096, np.float32), f"{prefix}w{i}"))
            inputs.append(f"{prefix}w{i}")
        nodes.append(helper.make_node("Add" if weights else "Neg", inputs, [f"{prefix}{i}"], name=f"{prefix}n{i}"))
        at = f"{prefix}{i}"
        if inserted and i == count // 2:
            nodes.append(helper.make_node("Abs", [at], [f"{prefix}extra"]))
            at = f"{prefix}extra"
    nodes.append(helper.make_node("Identity", [at], ["y"]))
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 4096]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], tensors)
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString())


CHAINS = (
    ("2,000 nodes and 31 MiB of weights, all renamed", 2000, True, False, 0),
    ("10,000 nodes that nothing tells apart, one inserted", 10000, False, True, 1),
    ("20,000 of them", 20000, False, True, 1),
)


def make(folder: Path, elements: int) -> None:
    """All models. In a process of its own: a child's peak memory counts what its parent had when it began."""
    import numpy as np

    block = np.random.default_rng(1).standard_normal(BLOCK // 4, np.float32).tobytes()
    for name in ("a.data", "b.data", "c.data"):
        with open(folder / name, "wb") as file:
            for _ in range(4 * elements // BLOCK):
                file.write(block)
    with open(folder / "b.data", "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(np.float32(1e9).tobytes())
    for name, data in (("a", "a"), ("b", "b"), ("c", "c"), ("a_again", "a")):
        external(folder, f"{name}.onnx", f"{data}.data", elements)
    for _, count, weights, inserted, _ in CHAINS:
        for p in "pq":
            chain(folder / f"{count}{p}.onnx", count, inserted and p == "q", p, weights)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--duet", default="duet")
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, help="where the models are made (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folder = Path(scratch)
        elements = max(int(args.gib * (1 << 30)) // BLOCK, 1) * BLOCK // 4
        maker = multiprocessing.get_context("spawn").Process(target=make, args=(folder, elements))
        maker.start()
        maker.join()
        if maker.exitcode:
            return 1
        big = [folder / f"{n}.onnx" for n in "ab"]
        shared = folder / "a_again.onnx"
        load = [sys.executable, "-c", "import sys, onnx, time\nfor p in sys.argv[1:]: onnx.load(p)"]
        same = [str(big[0]), str(folder / "c.onnx")]
        cases = [
            (
                f"2 × {4 * elements / (1 << 30):.0f} GiB, the same contents in another file",
                same,
                0,
                ["cmp", str(folder / "a.data"), str(folder / "c.data")],
                3,
            ),
            (
                f"2 × {4 * elements / (1 << 30):.0f} GiB, the last element changed",
                [str(p) for p in big],
                1,
                ["cmp", str(folder / "a.data"), str(folder / "b.data")],
                3,
            ),
            ("the same, both models over one file", [str(big[0]), str(shared)], 0, None, 5),
        ]
        for what, count, _, _, code in CHAINS:
            paths = [str(folder / f"{count}{p}.onnx") for p in "pq"]
            cases.append((what, paths, code, [*load, *paths], 5))
        print("| pair | duet diff | beside it | ratio | peak memory |\n|---|---|---|---|---|")
        for what, paths, code, other, times in cases:
            ours, theirs, peak = [], [], 0
            for _ in range(times):
                seconds, memory = run([args.duet, "diff", *paths], (code,))
                ours.append(seconds)
                peak = max(peak, memory)
                if other:
                    theirs.append(run(other, (0, 1))[0])
            median = statistics.median(ours)
            beside = ratio = "–"
            if other:
                beside = f"{statistics.median(theirs):.2f} s ({'cmp' if other[0] == 'cmp' else 'onnx.load'})"
                ratio = f"{median / statistics.median(theirs):.2f}"
            print(f"| {what} | {median:.2f} s | {beside} | {ratio} | {peak / 1e6:.0f} MB |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
