"""ONNX Runtime GenAI: its own generator and its own three sessions.

    python genai.py JOBS.json     a list of answers on stdout

GenAI has no type for LLaVA, and its built-in image processors count tokens by themselves; so the prompt with its
placeholders, the pixels and the number of image tokens come from here (`set_inputs`).
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai
from plain import IMAGE, pixels_of
from tokenizers import Tokenizer


class Model:
    def __init__(self, job: dict) -> None:
        folder = Path(job["model"])
        self.model = genai.Model(str(folder))
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.settings = json.loads((folder / "preprocessor_config.json").read_text())
        self.config = json.loads((folder / "genai_config.json").read_text())["model"]
        # Tokens of an image: what its vision encoder says, or what the processor's config counts.
        self.features, self.tokens = job["features"], job["tokens"]

    def prompt(self, turn: dict) -> np.ndarray:
        chat = f"USER: {''.join(IMAGE + chr(10) for _ in turn['images'])}{turn['prompt']} ASSISTANT:"
        ids = self.tokenizer.encode(chat).ids
        image = self.config["image_token_id"]
        return np.array([[j for i in ids for j in [i] * (self.features if i == image else 1)]], np.int32)

    def answer(self, turn: dict) -> list[int]:
        parameters = genai.GeneratorParams(self.model)
        parameters.set_search_options(max_length=self.config["context_length"], do_sample=False)
        generator = genai.Generator(self.model, parameters)
        images = turn["images"]
        inputs = genai.NamedTensors()
        side = self.settings["crop_size"]["height"]
        # (Without pixels GenAI takes the embedding graph to want features of rank 2.)
        inputs["pixel_values"] = (
            pixels_of(images, self.settings) if images else np.zeros((1, 3, side, side), np.float32)
        )
        inputs["num_image_tokens"] = np.array([self.features * len(images)], np.int64)
        generator.set_inputs(inputs)
        generator.append_tokens(self.prompt(turn))
        answer: list[int] = []
        while len(answer) < self.tokens and answer[-1:] != [self.config["eos_token_id"]]:
            generator.generate_next_token()
            answer.append(int(generator.get_next_tokens()[0]))
        return answer


def answers(job: dict) -> dict:
    model = Model(job)
    given = {case["name"]: [model.answer(*case["turns"])] for case in job["cases"]}
    return {"version": f"onnxruntime-genai {genai.__version__}", "answers": given}


if __name__ == "__main__":
    print(json.dumps([answers(entry["job"]) for entry in json.loads(Path(sys.argv[1]).read_text())]))
