"""LLaVA-1.5 from pixels and token ids to logits, both stages included."""

import torch

from . import tower
from .decoder import Cache, Decoder, Result, entry
from .families import Family
from .keep import places
from .merge import Merged, merge
from .recipe import Keep, Merge, Prune
from .order import Margins


class Llava:
    """A LlavaForConditionalGeneration with the two stages of a recipe (None: that stage is absent)."""

    def __init__(self, net, merging: Merge | Keep | None = None, pruning: Prune | None = None):
        self.net, self.merging = net, merging
        # Llama is written out; the other families run as Transformers has their layers.
        llama = net.config.text_config.model_type == "llama"
        self.decoder = (Decoder if llama else Family)(net, pruning)
        self.pruning = pruning
        self.margins = Margins()
        self.kept: list[list[int]] = []  # of each image encoded last, where some tokens are kept as they are

    def image_features(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, list[Merged]]:
        """[images, 3, H, W] -> features [images, tokens, D] and how each image was merged."""
        out = tower.run(self.net, pixel_values)
        if self.merging is None:
            return tower.project(self.net, out.hidden[:, int(out.cls) :]), []
        if isinstance(self.merging, Keep):
            features = tower.project(self.net, out.hidden[:, int(out.cls) :])
            self.kept = [places(image, self.merging, self.margins) for image in features]
            return torch.stack([image[stay] for image, stay in zip(features, self.kept)]), []
        images = zip(out.hidden, out.probs, out.metric)
        merged = [merge(*image, self.merging, self.margins, out.cls) for image in images]
        features = tower.project(self.net, torch.stack([m.hidden for m in merged]))
        if self.merging.placement == "encoder":
            return features, merged
        # As many as before: dominant tokens at their own places, contextual ones at their anchors'.
        placed = features.new_zeros(len(merged), out.hidden.shape[1] - int(out.cls), features.shape[-1])
        for image, rows, one in zip(placed, features, merged):
            image[torch.tensor(one.dominant + one.anchors)] = rows
        return placed, merged

    def gone(self, features: list[torch.Tensor], merged: list[Merged]) -> list[torch.Tensor] | None:
        """Which features of each image were discarded, bool [tokens]; None if those do not come out."""
        if self.merging is None or self.merging.placement == "encoder":
            return None
        flags = [torch.ones(len(rows), dtype=torch.bool) for rows in features]
        for flag, one in zip(flags, merged):
            flag[one.dominant + one.anchors] = False
        return flags

    def encode(self, images: list) -> tuple[torch.Tensor, list[torch.Tensor], list[Merged]]:
        """Images [3, H, W] -> features as the encoder gives them, the rows that go to each image's places, merges."""
        features, merged = self.image_features(torch.stack(images))
        return features, list(features), merged

    def call(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        features: torch.Tensor | list[torch.Tensor] | None = None,
        past: list[Cache] | None = None,
        salient: torch.Tensor | None = None,
        gone: list[torch.Tensor] | None = None,
    ) -> Result:
        """One call of the decoder: a prompt, a further question on the cache, or one new token.

        `input_ids` [B, S] holds one placeholder for each feature, row after row; `attention_mask`
        [B, past + S] may mark padding; `features` [images, tokens, D], or [tokens, D] of each image; `gone`
        [tokens] of each image marks discarded ones.
        """
        visual = input_ids == self.net.config.image_token_index
        embeds = self.net.get_input_embeddings()(input_ids).clone()
        if features is not None:
            flat = torch.cat(list(features))
            if int(visual.sum()) != flat.shape[0]:
                raise ValueError(f"expected {flat.shape[0]} image placeholders; found {int(visual.sum())}")
            embeds[visual] = flat
        elif bool(visual.any()):
            raise ValueError("expected no image placeholders without features")
        real = attention_mask[:, -input_ids.shape[1] :].bool()
        discarded = torch.zeros_like(visual)
        if gone is not None:
            discarded[visual] = torch.cat(gone)
        tokens = entry(embeds, real, visual, position_ids, self.pruning, salient, discarded)
        placed = self.merging is not None and self.merging.placement == "decoder"
        return self.decoder.run(tokens, past, self.margins, placed)
