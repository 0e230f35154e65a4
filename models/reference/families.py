"""Stage 2 for language models other than Llama: the layers of Transformers, with the schedule around them.

Each layer runs as its class has it, on the tokens that are there; the cache, the masks and what is dropped
are this implementation's. Queries and keys are taken where the class hands them to its attention function,
so biases, norms on the heads, partial rotary embeddings and caps on the scores are the family's own.
"""

from dataclasses import dataclass

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .decoder import Cache, Decoder, Result, Tokens
from .order import Margins

NAME = "duet_reference"


@dataclass
class Asked:
    """What a layer handed to its attention, [B, heads, S, head_dim], rotary embedding applied."""

    query: torch.Tensor
    key: torch.Tensor
    scaling: float
    softcap: float | None


def weigh(query, key, seen, scaling: float, softcap: float | None) -> torch.Tensor:
    """Attention probabilities [B, heads, S, P + S]; rows that see nothing are zero."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1).nan_to_num(0.0)


class Recorder:
    """The attention function that the layers call, and what it was called with last."""

    def __init__(self):
        self.last: Asked | None = None
        ALL_ATTENTION_FUNCTIONS[NAME] = self

    def __call__(self, module, query, key, value, attention_mask, scaling=None, softcap=None, **_):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        softcap = getattr(module, "attn_logit_softcapping", None) if softcap is None else softcap
        self.last = Asked(query, key, scaling, softcap)
        probs = weigh(query, key, attention_mask, scaling, softcap)
        value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        return (probs @ value).transpose(1, 2), probs


class OneLayer:
    """The cache of one layer in the interface that Transformers' attention updates."""

    def __init__(self, past: Cache | None):
        self.past, self.keys, self.values = past, None, None

    def update(self, keys, values, *_, **__):
        self.keys, self.values = keys, values
        if self.past is not None:
            self.keys = torch.cat([self.past.keys, keys], dim=2)
            self.values = torch.cat([self.past.values, values], dim=2)
        return self.keys, self.values


class Family(Decoder):
    """The layers of `net`, any LlavaForConditionalGeneration, with the schedule of `prune`."""

    def __init__(self, net, prune):
        super().__init__(net, prune)
        self.recorder = Recorder()
        self.config._attn_implementation = NAME

    def _rotary(self, index: int, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        rotary, kinds = self.model.rotary_emb, getattr(self.config, "layer_types", None)
        if self.config.model_type == "gemma3_text":
            return rotary(tokens.hidden, tokens.positions, kinds[index])
        if tokens.positions.dim() == 3:
            # M-RoPE: the rows of a token go together through drops, last; the class has them first.
            return rotary(tokens.hidden, tokens.positions.permute(2, 0, 1))
        return rotary(tokens.hidden, tokens.positions)

    def _window(self, index: int) -> int | None:
        kinds = getattr(self.config, "layer_types", None)
        if kinds is not None and kinds[index] != "sliding_attention":
            return None
        return getattr(self.config, "sliding_window", None)

    def _seen(self, now: int, real: torch.Tensor, window: int | None) -> torch.Tensor:
        total = real.shape[1]
        causal = torch.ones(now, total, dtype=torch.bool).tril(total - now)
        if window is not None:
            causal &= ~torch.ones(now, total, dtype=torch.bool).tril(total - now - window)
        return (causal & real[:, None, :])[:, None]

    def scores(self, layer: int, tokens: Tokens) -> torch.Tensor:
        """As in Decoder; a sliding window plays no part in the ranking."""
        module = self.model.layers[layer]
        seen = self._seen(tokens.real.shape[1], tokens.real, None)
        if self.prune.rank_mask == "none":
            seen = tokens.real[:, None, None, :].expand(seen.shape)
        module.self_attn(
            hidden_states=module.input_layernorm(tokens.hidden),
            position_embeddings=self._rotary(layer, tokens),
            attention_mask=seen,
        )
        asked = self.recorder.last
        probs = weigh(asked.query, asked.key, seen, asked.scaling, asked.softcap).mean(dim=1)
        result = []
        for row in range(probs.shape[0]):
            asks = tokens.asks[row].nonzero().flatten()
            if not len(asks):
                asks = tokens.real[row].nonzero().flatten()[-1:]
            result.append(probs[row, asks].mean(dim=0))
        return torch.stack(result)

    def _layer(self, layer, tokens: Tokens, past: Cache | None) -> tuple[torch.Tensor, Cache]:
        index = layer.self_attn.layer_idx
        real = tokens.real if past is None else torch.cat([past.real, tokens.real], dim=1)
        cache = OneLayer(past)
        hidden = layer(
            tokens.hidden,
            position_embeddings=self._rotary(index, tokens),
            attention_mask=self._seen(tokens.hidden.shape[1], real, self._window(index)),
            past_key_values=cache,
        )
        return hidden, Cache(cache.keys, cache.values, real)

    def run(self, tokens: Tokens, past: list[Cache] | None, margins: Margins, placed: bool = False) -> Result:
        self.config._attn_implementation = NAME
        return super().run(tokens, past, margins, placed)

    def _logits(self, last: torch.Tensor) -> torch.Tensor:
        logits = self.net.lm_head(self.model.norm(last))
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)
