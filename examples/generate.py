"""A rewritten LLaVA with ONNX Runtime and Transformers' own processor, as the unmodified one is run.

    pip install onnxruntime transformers pillow
    python examples/generate.py MODEL_DIR "What is this?" photo.jpg [--tokens 64]

Prints the ids of the answer, then the answer.
"""

import argparse

import numpy as np
from onnxruntime import InferenceSession
from PIL import Image
from transformers import AutoConfig, AutoProcessor

arguments = argparse.ArgumentParser()
arguments.add_argument("model")
arguments.add_argument("prompt")
arguments.add_argument("images", nargs="*")
arguments.add_argument("--tokens", type=int, default=64)
options = arguments.parse_args()

names = ("vision_encoder", "embed_tokens", "decoder_model_merged")
vision, embed, decoder = (InferenceSession(f"{options.model}/onnx/{name}.onnx") for name in names)
processor = AutoProcessor.from_pretrained(options.model)
config = AutoConfig.from_pretrained(options.model)

content = [{"type": "image"} for _ in options.images] + [{"type": "text", "text": options.prompt}]
prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
images = [Image.open(image).convert("RGB") for image in options.images] or None
inputs = processor(text=prompt, images=images, return_tensors="np")
input_ids, attention_mask = inputs["input_ids"].astype(np.int64), inputs["attention_mask"].astype(np.int64)
position_ids = attention_mask.cumsum(-1) - 1
empty = {i.name: np.zeros([1, i.shape[1], 0, i.shape[3]], np.float32) for i in decoder.get_inputs() if "past" in i.name}
past, answer = empty, []
while len(answer) < options.tokens and answer[-1:] != [config.text_config.eos_token_id]:
    embeds = embed.run(None, {"input_ids": input_ids})[0]
    if images and not answer:
        features = vision.run(None, {"pixel_values": inputs["pixel_values"]})[0]
        embeds[input_ids == config.image_token_index] = features.reshape(-1, features.shape[-1])
    feeds = {"inputs_embeds": embeds, "attention_mask": attention_mask, "position_ids": position_ids}
    logits, *present = decoder.run(None, {**feeds, **past})
    past = dict(zip(past, present))
    input_ids = logits[:, -1].argmax(-1, keepdims=True)
    answer.append(int(input_ids[0, 0]))
    attention_mask = np.concatenate([attention_mask, np.ones_like(input_ids)], axis=-1)
    position_ids = position_ids[:, -1:] + 1
print(answer)
print(processor.tokenizer.decode(answer, skip_special_tokens=True))
