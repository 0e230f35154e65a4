"""Stage 2: a Llama decoder with a cache for each layer that drops visual tokens between layers."""

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from .recipe import Prune
from .order import Margins, top


@dataclass
class Cache:
    """What one layer keeps: rotated keys and values [B, kv_heads, P, head_dim], and which are real."""

    keys: torch.Tensor
    values: torch.Tensor
    real: torch.Tensor  # bool [B, P]


@dataclass
class Tokens:
    """The sequence that is being processed now, as it is between two layers."""

    hidden: torch.Tensor  # [B, S, D]
    real: torch.Tensor  # bool [B, S], false for padding and for gone tokens: nothing attends to them
    visual: torch.Tensor  # bool [B, S]
    asks: torch.Tensor  # bool [B, S], the queries that rank; may be empty in a row
    positions: torch.Tensor  # int64 [B, S], or [B, S, 3] with M-RoPE
    origin: torch.Tensor  # int64 [B, S], index at the decoder's entry
    gone: torch.Tensor  # bool [B, S], features that the merge discarded and left in their places

    def take(self, kept: torch.Tensor) -> "Tokens":
        """`kept` [B, S'] indexes the sequence of each row."""
        rows = torch.arange(kept.shape[0])[:, None]
        return Tokens(*(getattr(self, name)[rows, kept] for name in self.__dataclass_fields__))


@dataclass
class Drop:
    """One drop point of one call; indices are into the sequence just before it."""

    after_layer: int
    kept: torch.Tensor  # int64 [B, S']
    origin: torch.Tensor  # int64 [B, S'], the same tokens' indices at the decoder's entry
    visual: torch.Tensor  # int64 [B], tokens left in each row that count as visual


@dataclass
class Result:
    logits: torch.Tensor  # [B, V] of the last token
    cache: list[Cache]
    drops: list[Drop] = field(default_factory=list)


def entry(hidden, real, visual, positions, prune: Prune | None, salient=None, gone=None) -> Tokens:
    """The tokens at the decoder's entry; which of them ask is settled here, once."""
    gone = torch.zeros_like(real) if gone is None else gone
    real, visual = real & ~gone, visual & ~gone
    asks = torch.zeros_like(real)
    for row in range(real.shape[0]):
        seen = visual[row].nonzero().flatten()
        if prune is not None and prune.text == "all":
            asks[row, int(seen[-1]) + 1 if len(seen) else 0 :] = True
        elif prune is not None and prune.text == "salient" and salient is not None:
            asks[row] = salient[row] & ~visual[row]
            # The last token of the prompt is always among them.
            asks[row, real[row].nonzero()[-1]] = True
    origin = torch.arange(real.shape[1]).expand(real.shape)
    return Tokens(hidden, real, visual, asks & real, positions, origin, gone)


def rms_norm(x: torch.Tensor, module, eps: float) -> torch.Tensor:
    return module.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def rotate(x: torch.Tensor, positions: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of `x` [B, heads, S, head_dim], halves paired (Llama's layout)."""
    angle = positions[:, None, :, None].to(x.dtype) * inverse.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Decoder:
    """The layers of `net`, a LlavaForConditionalGeneration, with the schedule of `prune`."""

    def __init__(self, net, prune: Prune | None):
        self.net, self.prune = net, prune
        self.model, self.config = net.model.language_model, net.config.text_config
        if prune is not None and any(layer >= len(self.model.layers) for layer, _ in prune.drops):
            raise ValueError(f"visual_prune.drops: expected layers before the last of {len(self.model.layers)}")

    def _heads(self, x: torch.Tensor, projection) -> torch.Tensor:
        return F.linear(x, projection.weight).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)

    def _query_key(self, layer, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = rms_norm(tokens.hidden, layer.input_layernorm, self.config.rms_norm_eps)
        inverse = self.model.rotary_emb.inv_freq
        q = rotate(self._heads(x, layer.self_attn.q_proj), tokens.positions, inverse)
        return x, q, rotate(self._heads(x, layer.self_attn.k_proj), tokens.positions, inverse)

    def _probs(self, q: torch.Tensor, keys: torch.Tensor, real: torch.Tensor, causal: bool = True) -> torch.Tensor:
        """Attention of `q` to `keys`, of which the last q-many are the tokens processed now."""
        keys = keys.repeat_interleave(q.shape[1] // keys.shape[1], dim=1)
        now, total = q.shape[2], keys.shape[2]
        seen = torch.ones(now, total, dtype=torch.bool)
        seen = ((seen.tril(total - now) if causal else seen) & real[:, None, :])[:, None]
        scores = q @ keys.transpose(2, 3) * self.config.head_dim**-0.5
        # Rows of padding see nothing: zero, not NaN.
        return torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1).nan_to_num(0.0)

    def _layer(self, layer, tokens: Tokens, past: Cache | None) -> tuple[torch.Tensor, Cache]:
        x, q, k = self._query_key(layer, tokens)
        cache = Cache(k, self._heads(x, layer.self_attn.v_proj), tokens.real)
        if past is not None:
            cache = Cache(
                torch.cat([past.keys, cache.keys], dim=2),
                torch.cat([past.values, cache.values], dim=2),
                torch.cat([past.real, cache.real], dim=1),
            )
        probs = self._probs(q, cache.keys, cache.real)
        values = cache.values.repeat_interleave(q.shape[1] // cache.values.shape[1], dim=1)
        hidden = tokens.hidden + F.linear((probs @ values).transpose(1, 2).flatten(2), layer.self_attn.o_proj.weight)
        y = rms_norm(hidden, layer.post_attention_layernorm, self.config.rms_norm_eps)
        gate = F.silu(F.linear(y, layer.mlp.gate_proj.weight)) * F.linear(y, layer.mlp.up_proj.weight)
        return hidden + F.linear(gate, layer.mlp.down_proj.weight), cache

    def scores(self, layer: int, tokens: Tokens) -> torch.Tensor:
        """How much the asking tokens look at every token: [B, S], by `layer` on what enters it.

        Only the tokens processed now are keys: the cache of an earlier turn is not consulted.
        """
        _, q, k = self._query_key(self.model.layers[layer], tokens)
        probs = self._probs(q, k, tokens.real, self.prune.rank_mask == "causal").mean(dim=1)
        result = []
        for row in range(probs.shape[0]):
            asks = tokens.asks[row].nonzero().flatten()
            if not len(asks):
                asks = tokens.real[row].nonzero().flatten()[-1:]
            result.append(probs[row, asks].mean(dim=0))
        return torch.stack(result)

    def _drop(self, ranking: tuple[int, Tokens], lose: int, tokens: Tokens, margins: Margins) -> torch.Tensor:
        """Indices [B, S - lose] of the tokens that stay when every row loses `lose`: gone ones, then visual ones.

        `ranking` is the layer that ranks, and what enters it."""
        scores = self.scores(*ranking)
        kept = []
        for row in range(scores.shape[0]):
            seen = tokens.visual[row].nonzero().flatten()
            left = tokens.gone[row].nonzero().flatten()
            leaving = min(lose, len(left))
            count = len(seen) - (lose - leaving)
            stays = ~tokens.visual[row]
            stays[left[len(left) - leaving :]] = False
            stays[seen[top(scores[row, seen], count)]] = True
            margins.cut(scores[row, seen], count)
            kept.append(stays.nonzero().flatten())
        return torch.stack(kept)

    def _ranked(self, tokens: Tokens, before: float, keep: float) -> tuple[Tokens, int]:
        """With `ratio_base: current` (see recipe.Prune): the tokens with only those still visual that are ranked at
        this drop, and how many every row loses of them."""
        visual, asks, lose = tokens.visual.clone(), tokens.asks.clone(), []
        for row in range(visual.shape[0]):
            seen = visual[row].nonzero().flatten()
            ranked = int(len(seen) * before)
            visual[row, seen[ranked:]] = False
            if self.prune.text == "all":
                asks[row, seen[ranked:]] = True
            lose.append(ranked - int(len(seen) * keep) + int(tokens.gone[row].sum()))
        return replace(tokens, visual=visual, asks=asks), min(lose)

    def _behind(
        self, index: int, kept: torch.Tensor, tokens: Tokens, earlier: int, placed: bool
    ) -> tuple[Tokens, Drop]:
        """The tokens behind a drop point; `earlier` left there in earlier calls."""
        tokens = tokens.take(kept)
        positions = (self.prune or Prune(())).positions_of(tokens.positions.dim() == 3, placed)
        if positions == "renumber":
            # Less by the tokens that left before it, in this call and in earlier ones.
            tokens.positions = tokens.positions - (kept - torch.arange(kept.shape[1])) - earlier
        return tokens, Drop(index, kept, tokens.origin, tokens.visual.sum(dim=1))

    def run(self, tokens: Tokens, past: list[Cache] | None, margins: Margins, placed: bool = False) -> Result:
        """With `placed`, gone tokens leave before the second layer, as many of each row as of any other."""
        entered, discarded = (flags.sum(dim=1).tolist() for flags in (tokens.visual, tokens.gone))
        schedule = dict(self.prune.drops) if self.prune else {}
        cache, drops, lost, ratio, before = [], [], 0, 1.0, tokens
        for index, layer in enumerate(self.model.layers):
            earlier = past[index - 1].real.shape[1] - past[index].real.shape[1] if past and index else 0
            if placed and index == 1:
                lost, length = min(discarded), tokens.gone.shape[1]
                # Those at the end leave first, where a row has some left over.
                behind = tokens.gone.flip(1).cumsum(1).flip(1)
                stays = ~(tokens.gone & (behind <= lost))
                kept = torch.arange(length).expand(stays.shape)[stays].reshape(-1, length - lost)
                tokens, drop = self._behind(index, kept, tokens, earlier, placed)
                drops.append(drop)
                earlier = 0
            if index in schedule:
                # Rows stay of one length: all lose what the row that may lose least loses.
                if self.prune.ratio_base == "current":
                    tokens, lose = self._ranked(tokens, ratio, schedule[index])
                else:
                    target = min(n - int(n * schedule[index]) + g for n, g in zip(entered, discarded))
                    lose, lost = target - lost, target
                previous = self.prune.rank_layer == "previous"
                ranking = (index - 1, before) if previous else (index, tokens)
                kept, ratio = self._drop(ranking, lose, tokens, margins), schedule[index]
                tokens, drop = self._behind(index, kept, tokens, earlier, placed)
                drops.append(drop)
            before = replace(tokens)
            tokens.hidden, layer_cache = self._layer(layer, tokens, past[index] if past else None)
            cache.append(layer_cache)
        return Result(self._logits(tokens.hidden[:, -1]), cache, drops)

    def _logits(self, last: torch.Tensor) -> torch.Tensor:
        """[B, V] of the last hidden states [B, D]."""
        return F.linear(rms_norm(last, self.model.norm, self.config.rms_norm_eps), self.net.lm_head.weight)
