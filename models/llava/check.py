"""Compares an exported directory, run by ONNX Runtime, with the PyTorch model it came from."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from transformers import LlavaForConditionalGeneration
from transformers.cache_utils import DynamicCache

import tokens
from build import Size

# Logits have a standard deviation of about 3; what is left is the order of fp32 sums.
TOLERANCE = 2e-4


class Triple:
    """The three sessions of an exported directory."""

    def __init__(self, folder: Path):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 2
        options.log_severity_level = 3
        self.vision, self.embed, self.decoder = (
            ort.InferenceSession(str(folder / "onnx" / f"{f}.onnx"), options, providers=["CPUExecutionProvider"])
            for f in ("vision_encoder", "embed_tokens", "decoder_model_merged")
        )

    def image_features(self, pixel_values: np.ndarray) -> np.ndarray:
        if len(self.vision.get_inputs()[0].shape) == 5:
            # [batch, crops, 3, H, W], all of them crops of one image.
            pixel_values = pixel_values[None]
        return self.vision.run(None, {"pixel_values": pixel_values})[0]

    def inputs_embeds(self, input_ids: np.ndarray) -> np.ndarray:
        return self.embed.run(None, {"input_ids": input_ids})[0]

    def decode(self, embeds, mask, positions, past=None) -> list[np.ndarray]:
        """logits followed by the present cache; `past` None is an empty cache."""
        feed = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}
        for i, value in enumerate(self.decoder.get_inputs()[3:]):
            _, heads, _, width = value.shape
            feed[value.name] = past[i] if past else np.zeros((embeds.shape[0], heads, 0, width), np.float32)
        return self.decoder.run(None, feed)


def torch_decode(net: LlavaForConditionalGeneration, embeds, mask, positions, cache):
    out = net.model.language_model(
        inputs_embeds=torch.from_numpy(embeds),
        attention_mask=torch.from_numpy(mask),
        position_ids=torch.from_numpy(positions),
        past_key_values=cache,
        use_cache=True,
    )
    return net.lm_head(out.last_hidden_state).numpy()


def positions_of(mask: np.ndarray) -> np.ndarray:
    return np.clip(np.cumsum(mask, axis=1) - 1, 0, None)


def compare(folder: Path, net: LlavaForConditionalGeneration, size: Size) -> dict[str, float]:
    """Largest absolute differences, keyed by what was compared; padding rows are not compared."""
    triple = Triple(folder)
    result = {}
    for batch in (1, 2):
        rng = np.random.default_rng(batch)
        pixels = rng.standard_normal((batch, 3, size.image, size.image)).astype(np.float32)
        features = triple.image_features(pixels)
        with torch.no_grad():
            expected = torch.stack(list(net.get_image_features(torch.from_numpy(pixels)).pooler_output)).numpy()
        result[f"batch {batch} image features"] = float(np.abs(features - expected).max())

        # A prompt with an image, the first row of a larger batch padded on the left by two.
        ids = rng.integers(5, tokens.VOCAB, (batch, 12))
        embeds = triple.inputs_embeds(ids)
        want = net.get_input_embeddings()(torch.from_numpy(ids)).numpy()
        result[f"batch {batch} embeddings"] = float(np.abs(embeds - want).max())
        embeds = np.concatenate([embeds[:, :5], features, embeds[:, 5:]], axis=1)
        mask = np.ones(embeds.shape[:2], np.int64)
        if batch > 1:
            mask[0, :2] = 0
        cache, past = DynamicCache(), None
        # Prefill; one token; a second question of several tokens; one more token.
        for step, length in enumerate((embeds.shape[1], 1, 6, 1)):
            if step:
                embeds = triple.inputs_embeds(rng.integers(5, tokens.VOCAB, (batch, length)))
                mask = np.concatenate([mask, np.ones((batch, length), np.int64)], axis=1)
            positions = positions_of(mask)[:, -length:]
            with torch.no_grad():
                want = torch_decode(net, embeds, mask, positions, cache)
            logits, *past = triple.decode(embeds, mask, positions, past)
            real = mask[:, -length:] == 1
            result[f"batch {batch} step {step} logits"] = float(np.abs(logits - want)[real].max())
            for index, layer in enumerate(cache.layers):
                for got, value in ((past[2 * index], layer.keys), (past[2 * index + 1], layer.values)):
                    if got.shape != tuple(value.shape):
                        raise RuntimeError(f"{folder}: present.{index} is {got.shape}, expected {tuple(value.shape)}")
                    seen = mask[:, None, :, None] == 1
                    difference = float(np.abs(np.where(seen, got - value.numpy(), 0)).max())
                    key = f"batch {batch} step {step} cache"
                    result[key] = max(result.get(key, 0.0), difference)
    # NaN compares false with everything: turn it into a difference that no tolerance accepts.
    return {k: v if v == v else float("inf") for k, v in result.items()}
