"""Runs rewritten models in the clients that people have, and prints what each of them makes of it.

    tests/clients/run            installs what is needed into the user's cache, then runs this

Models are the project's own exports. `duet` rewrites them, and its own greedy answers (`duet run --json`) are what
every client has to give, token for token: to pictures, to several in one prompt, to text alone, to further questions
on the cache, and to prompts side by side. With a recipe that keeps everything, a client has to give what it gives with
the unmodified model.
"""

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MODELS = ROOT / "models"
TRAINED = MODELS / "vqa"
TOKENS = 24
AT_LEAST = (5, 16)  # answers to pictures have as many tokens

sys.dont_write_bytecode = True
sys.path.insert(0, str(MODELS / "llava"))
import draw  # noqa: E402

BOTH = """version: 1
passes:
  - token_merge: {{ dominant: {dominant}, contextual: {contextual}, cluster_width: 4{more} }}
  - visual_prune:
      drops:
        - {{ after_layer: {first}, keep: 0.5 }}
        - {{ after_layer: {second}, keep: 0.0 }}
"""
KEEP = """version: 1
passes:
  - token_merge: {{ dominant: {patches}, contextual: 0, cls: drop }}
  - visual_prune: {{ drops: [{{ after_layer: {first}, keep: 1.0 }}] }}
"""


VARIANTS = {
    "original": "unmodified",
    "both": "both stages",
    "placed": "placement: decoder",
    "keep": "everything kept",
}


@dataclass
class Model:
    """A model, the side of its pictures, and its recipes."""

    name: str
    side: int
    recipes: dict[str, str]
    clients: tuple[str, ...]
    kv: str = "ragged"
    without: tuple[str, ...] = ()  # cases that the unmodified model cannot do either
    whole: tuple[str, ...] = ()  # all that is asked where nothing is reduced, if not everything
    trained: bool = False  # it answers with a word, to questions about pictures of its own

    def source(self, into: Path) -> Path:
        """The directory of the unmodified model: a copy of a fixture, or a packed form put together."""
        target = into / f"{self.name}-original"
        form = MODELS / "forms/packed" / self.name / "form.json"
        if self.trained:
            shutil.copytree(TRAINED / "llava", target)
        elif not form.is_file():
            shutil.copytree(MODELS / "llava/fixtures" / self.name, target)
        else:
            for file, source in json.loads(form.read_text())["files"].items():
                packed = (MODELS / source).read_bytes()
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                (target / file).write_bytes(gzip.decompress(packed) if source.endswith(".gz") else packed)
        if (target / "genai_config.json").is_file():
            # What `duet run` needs to know of pictures, as the checkpoint that the builder began with has it.
            for file in ("config.json", "preprocessor_config.json", "processor_config.json"):
                shutil.copy(MODELS / "llava/fixtures/dynamo18-gqa" / file, target)
        return target


def recipes(first: int, second: int, dominant: int, contextual: int, patches: int, names: list[str]) -> dict[str, str]:
    numbers = {"first": first, "second": second, "dominant": dominant, "contextual": contextual, "patches": patches}
    known = {
        "both": BOTH.format(**numbers, more=""),
        "placed": BOTH.format(**numbers, more=", placement: decoder"),
        "keep": KEEP.format(**numbers),
    }
    return {name: known[name] for name in names}


GENERAL = ("transformers.js", "transformers.js in Chromium", "onnxruntime-node", "onnxruntime-web in Chromium",
           "onnxruntime (Python)", "AutoProcessor + onnxruntime", "examples/generate.mjs")  # fmt: skip
GENAI = "ONNX Runtime GenAI"
LOOP = "onnxruntime (Python), card's loop"
MODELS_TESTED = [
    Model(
        "demo",
        336,
        recipes(8, 12, 170, 32, 576, ["both", "keep"]),
        GENERAL,
        whole=("image 1", "image 2", "text", "turns", "batch"),
    ),  # prompts of 585 tokens take their time
    Model("dynamo18-gqa", 126, recipes(3, 6, 24, 6, 81, ["both", "placed", "keep"]), GENERAL),
    Model(
        "genai09-mha-mha", 126, recipes(3, 6, 24, 6, 81, ["both"]), ("onnxruntime (Python)", LOOP), without=("turns",)
    ),  # it takes one token at a time on top of a cache
    Model(
        "trained",
        196,
        {"both": (ROOT / "passes/tiles-43.yaml").read_text()},
        GENERAL,
        whole=("image 1", "image 2", "batch"),
        trained=True,
    ),  # its answers end, after a word; the others go on for TOKENS tokens
    Model("genaivlm-fp32-gqa", 126, recipes(3, 6, 24, 6, 81, ["both", "placed", "keep"]), (GENAI,), kv="padded"),
]


class Duet:
    """The command that is tested."""

    def __init__(self, binary: str) -> None:
        self.binary = binary
        self.features: dict[str, int] = {}
        self.known: dict[str, list[list[int]]] = {}

    def __call__(self, *arguments: str | Path) -> str:
        done = subprocess.run([self.binary, *map(str, arguments)], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"duet {' '.join(map(str, arguments))}\n{done.stderr}")
        return done.stdout

    def answers(self, model: Path, turns: list[dict]) -> list[list[int]]:
        """Tokens that `duet run` answers, of each turn."""
        key = json.dumps([str(model), turns])
        if key not in self.known:
            self.known[key] = self.asked(model, turns)
        return self.known[key]

    def asked(self, model: Path, turns: list[dict]) -> list[list[int]]:
        first, *further = turns
        images = [argument for image in first["images"] for argument in ("--image", image)]
        then = [argument for turn in further for argument in ("--then", turn["prompt"])]
        text = self(
            "run", model, *images, "--prompt", first["prompt"], *then, "--max-new-tokens", str(TOKENS), "--json"
        )
        answer = json.loads(text)
        if len(first["images"]) == 1:
            self.features[str(model)] = answer["visual_tokens"]
        return [answer["tokens"], *(a["tokens"] for a in answer.get("then", []))]


def pictures(side: int, into: Path) -> list[str]:
    """Six drawn pictures of the model's own size: resizing is each client's own matter, and rounds differently."""
    files = []
    for seed, kind in enumerate((draw.street, draw.shapes) * 3):
        file = into / f"{kind.__name__}-{seed}-{side}.png"
        kind((side, side), seed).save(file)
        files.append(str(file))
    return files


def questions() -> list[dict]:
    """What the trained model is asked: of pictures that it has not seen, questions of every type that it knows."""
    asked, types = [], set()
    for line in (TRAINED / "test/questions.jsonl").read_text().splitlines():
        question = json.loads(line)
        if question["type"] not in types:
            types.add(question["type"])
            image = str(TRAINED / "test" / question["image"])
            asked.append({"prompt": question["question"], "images": [image]})
    rows = [asked[at % len(asked)] for at in range(3)]
    return [
        *({"name": f"image {n + 1}", "turns": [turn]} for n, turn in enumerate(asked)),
        {"name": "batch", "batch": True, "rows": [{**row, "prompt": asked[0]["prompt"]} for row in rows]},
    ]


def cases(images: list[str]) -> list[dict]:
    """What is asked. `padded` batches have prompts of different lengths, the others not."""

    def turn(prompt: str, *images: str) -> dict:
        return {"prompt": prompt, "images": list(images)}

    several = [{"name": f"image {n + 1}", "turns": [turn("What is this?", image)]} for n, image in enumerate(images)]
    return [
        *several,
        {"name": "two images", "turns": [turn("Which one has more houses?", images[1], images[2])]},
        {"name": "text", "turns": [turn("Is there a dog near the water?")]},
        {"name": "text 2", "turns": [turn("How many trees are there, and where?")]},
        {"name": "turns", "turns": [turn("What is this?", images[0]), turn("How many houses?"), turn("And trees?")]},
        {"name": "batch", "batch": True, "rows": [turn("What is this?", image) for image in images[:3]]},
        {"name": "padded", "batch": True, "rows": [turn("What is this?", images[3]), turn("How many of them are red?", images[4])]},
        {"name": "padded text", "batch": True, "rows": [turn("How many trees are there, and where?"), turn("Is there a dog near the water?")]},
    ]  # fmt: skip


@dataclass
class Job:
    """A model's variant, what is asked of it, and what is expected."""

    model: Model
    variant: str
    folder: Path
    cases: list[dict]
    suits: dict[str, str]  # what `duet rewrite` says of clients
    expected: dict = field(default_factory=dict)
    features: int = 0  # of an image

    @property
    def name(self) -> str:
        return f"{self.model.name}, {self.variant}"

    def document(self, names: set[str], **more: str) -> dict:
        asked = [case for case in self.cases if case["name"] in names]
        external = [file.stem for file in sorted((self.folder / "onnx").glob("*.onnx_data"))]
        numbers = {"tokens": TOKENS, "features": self.features}
        return {"model": str(self.folder), **numbers, "external": external, "cases": asked, **more}


@dataclass
class Client:
    """A client: how it is started, and which cases are none for it and why."""

    name: str
    module: str
    how: str
    left_out: dict[str, str] = field(default_factory=dict)
    called: str = "ONNX Runtime (Python, Node.js, Web)"  # by `duet rewrite`
    more: dict[str, str] = field(default_factory=dict)


PADDED = "transformers.js sees padding as text in decode steps with pictures, in unmodified models too"
SINGLE = "one prompt at a time"
UNSHARED = "with pictures GenAI goes on from a cache only in a shared buffer, which padded caches are not for"
TOGETHER = "GenAI allocates features of rank 3 as [images, tokens of all images], for unmodified models too"
CLIENTS = [
    Client("transformers.js", "transformers", "node", {"padded": PADDED}, called="transformers.js"),
    Client("transformers.js in Chromium", "transformers", "web", {"padded": PADDED}, called="transformers.js"),
    Client("onnxruntime-node", "plain", "node"),
    Client("onnxruntime-web in Chromium", "plain", "web"),
    Client("onnxruntime (Python)", "plain", "python"),
    Client(LOOP, "plain", "python", more={"loop": "card"}, left_out={"padded": "a mask of ones tells no padding", "padded text": "a mask of ones tells no padding"}),
    Client("AutoProcessor + onnxruntime", "examples/generate.py", "example", dict.fromkeys(["turns", "batch", "padded", "padded text"], SINGLE), called="AutoProcessor with ONNX Runtime"),
    Client("examples/generate.mjs", "examples/generate.mjs", "example", dict.fromkeys(["turns", "batch", "padded", "padded text", "two images"], SINGLE)),
    Client(GENAI, "genai", "python", {**dict.fromkeys(["batch", "padded", "padded text"], SINGLE), "two images": TOGETHER, "turns": UNSHARED}, called=GENAI),
]  # fmt: skip


class Runner:
    """Starts clients and reads what they answer."""

    def __init__(self, modules: Path, chromium: str, scratch: Path) -> None:
        self.modules, self.chromium, self.scratch = modules, chromium, scratch
        # Modules are found beside the scripts, and nothing is installed into the project.
        for part in ("clients", "web"):
            shutil.copytree(HERE / part, scratch / part)
        shutil.copytree(ROOT / "examples", scratch / "examples")
        (scratch / "node_modules").symlink_to(modules)

    def started(self, command: list[str], what: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=560, cwd=self.scratch)
        if done.returncode:
            raise SystemExit(f"{what} failed:\n{done.stderr[-3000:]}")
        return done.stdout

    def run(self, client: Client, documents: list[dict]) -> list[dict]:
        file = self.scratch / "jobs.json"
        file.write_text(json.dumps([{"client": client.module, "job": d} for d in documents]))
        match client.how:
            case "node":
                return json.loads(self.started(["node", "clients/node.mjs", str(file)], client.name))
            case "python":
                return json.loads(self.started([sys.executable, f"clients/{client.module}.py", str(file)], client.name))
            case "web":
                return json.loads(self.started(["node", "web/serve.mjs", str(file), self.chromium], client.name))
            case _:
                return [self.example(client, document) for document in documents]

    def example(self, client: Client, document: dict) -> dict:
        interpreter = {".py": sys.executable, ".mjs": "node"}[Path(client.module).suffix]
        answers = {}
        for case in document["cases"]:
            (turn,) = case["turns"]
            text = self.started(
                [
                    interpreter,
                    client.module,
                    document["model"],
                    turn["prompt"],
                    *turn["images"],
                    "--tokens",
                    str(TOKENS),
                ],
                client.name,
            )
            answers[case["name"]] = [json.loads(text.splitlines()[0])]
        if client.module.endswith(".py"):
            version = f"transformers {metadata.version('transformers')}"
        else:
            package = json.loads((self.modules / "onnxruntime-node/package.json").read_text())
            version = f"onnxruntime-node {package['version']}"
        return {"version": version, "answers": answers}


def prepare(duet: Duet, models: list[Model], scratch: Path) -> list[Job]:
    """Every variant of every model, rewritten, with what `duet run` answers."""
    jobs = []
    for model in models:
        everything = questions() if model.trained else cases(pictures(model.side, scratch))
        asked = [case for case in everything if case["name"] not in model.without]
        original = model.source(scratch)
        folders = {"original": original}
        suits: dict[str, dict[str, str]] = {"original": {}}
        references = {"original": original}  # `duet run` answers on ragged caches, whatever a client has
        for name, text in model.recipes.items():
            for kv in {"ragged", model.kv}:
                recipe = scratch / f"{model.name}-{name}-{kv}.yaml"
                recipe.write_text(f"{text}kv: {kv}\n")
                folder = scratch / f"{model.name}-{name}-{kv}"
                said = json.loads(duet("rewrite", original, "--recipe", recipe, "--out", folder, "--quiet", "--json"))
                if kv == "ragged":
                    references[name] = folder
                if kv == model.kv:
                    folders[name] = folder
                    suits[name] = {entry["client"]: entry["suits"] for entry in said["clients"]}
        for variant, folder in folders.items():
            limited = model.whole if variant in ("original", "keep") else ()
            own = [case for case in asked if not limited or case["name"] in limited]
            job = Job(model, variant, folder, own, suits[variant])
            for case in own:
                conversations = [[row] for row in case["rows"]] if case.get("batch") else [case["turns"]]
                # What keeps everything answers as the unmodified model does.
                answering = references["original" if variant == "keep" else variant]
                job.expected[case["name"]] = [tokens for c in conversations for tokens in duet.answers(answering, c)]
            job.features = duet.features[str(answering)]
            long = [
                case for case, (tokens, *_) in job.expected.items() if "image" in case and len(tokens) >= AT_LEAST[1]
            ]
            if len(long) < AT_LEAST[0] and not limited and not model.trained:
                raise SystemExit(
                    f"{job.name}: only {long} have {AT_LEAST[1]} tokens; expected {AT_LEAST[0]} such answers"
                )
            jobs.append(job)
        # As exports made for transformers.js have it: its processor knows no strategy, and counts what is added.
        for folder in (folders[name] for name in ("original", "keep", "placed") if name in folders):
            settings = json.loads((folder / "processor_config.json").read_text())
            settings |= {"num_additional_image_tokens": 0, "vision_feature_select_strategy": "full"}
            (folder / "processor_config.json").write_text(json.dumps(settings))
    return jobs


def compare(client: Client, job: Job, answers: dict, original: dict | None) -> list[str]:
    """What is wrong with the answers of a client."""
    wrong = []
    if job.suits.get(client.called, "yes") == "no":
        wrong.append(f"duet rewrite says that it does not suit {client.called}")
    for case, expected in job.expected.items():
        if case in client.left_out:
            continue
        given = answers.get(case)
        if given != expected:
            wrong.append(f"{case}: {given}, expected {expected}")
        elif job.variant == "keep" and given != (original or {}).get(case):
            wrong.append(f"{case}: {given}, but {(original or {}).get(case)} with the unmodified model")
    return wrong


def table(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def main() -> int:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--duet", required=True)
    arguments.add_argument("--modules", type=Path, required=True, help="node_modules")
    arguments.add_argument("--chromium", required=True)
    arguments.add_argument("--only", help="clients whose name contains this")
    arguments.add_argument("--model", help="models whose name contains this")
    options = arguments.parse_args()
    models = [m for m in MODELS_TESTED if (options.model or "") in m.name]
    begun = time.monotonic()
    failures, rows = [], [["client", "version", *VARIANTS.values()]]
    with tempfile.TemporaryDirectory(prefix="duet-clients-", ignore_cleanup_errors=True) as folder:
        scratch = Path(folder)
        jobs = prepare(Duet(options.duet), models, scratch)
        runner = Runner(options.modules, options.chromium, scratch)
        print(
            f"{len(jobs)} models and {sum(len(j.expected) for j in jobs)} reference answers: {time.monotonic() - begun:.0f} s",
            flush=True,
        )
        for client in CLIENTS:
            if options.only and options.only not in client.name:
                continue
            start = time.monotonic()
            own = [job for job in jobs if client.name in job.model.clients]
            if not own:
                continue
            asked = [{case["name"] for case in job.cases} - set(client.left_out) for job in own]
            documents = [job.document(names, **client.more) for job, names in zip(own, asked)]
            results = runner.run(client, documents)
            cells: dict[str, list[int]] = {}
            originals = {}
            for job, names, result in zip(own, asked, results, strict=True):
                if "error" in result:
                    wrong = [result["error"]]
                else:
                    if job.variant == "original":
                        originals[job.model.name] = result["answers"]
                    wrong = compare(client, job, result["answers"], originals.get(job.model.name))
                failures += [f"{client.name}, {job.name}: {problem}" for problem in wrong]
                cell = cells.setdefault(job.variant, [0, 0])
                cell[0] += len(names) - min(len(wrong), len(names))
                cell[1] += len(names)
            counts = ["{} of {}".format(*cells[v]) if v in cells else "" for v in VARIANTS]
            rows.append([client.name, results[0].get("version", ""), *counts])
            print(f"{client.name}: {time.monotonic() - start:.0f} s", flush=True)
    print()
    print(table(rows))
    for client in CLIENTS:
        for case, why in client.left_out.items():
            print(f"{client.name}: '{case}' is left out: {why}")
    print(f"{time.monotonic() - begun:.0f} s in all")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
