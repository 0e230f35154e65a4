"""Video-LLaVA from pixels and token ids to logits: two towers, each frame of a clip merged alone, one set of
visual tokens for the decoder."""

from types import SimpleNamespace

import torch

from . import tower
from .decoder import Cache, Decoder, Result, entry
from .merge import Merged, merge
from .order import Margins
from .recipe import Merge, Prune


class VideoLlava:
    """A VideoLlavaForConditionalGeneration with the two stages of a recipe (None: that stage is absent)."""

    def __init__(self, net, merging: Merge | None = None, pruning: Prune | None = None):
        self.net, self.merging = net, merging
        self.decoder = Decoder(net, pruning)
        self.pruning = pruning
        self.margins = Margins()

    def _features(self, which: str, pixels: torch.Tensor, drop_cls: bool) -> tuple[torch.Tensor, list[Merged]]:
        """[images, 3, H, W] -> [images, tokens, D] through the tower called `which`, and the merges."""
        model = self.net.model
        parts = {"vision_tower": getattr(model, which), "multi_modal_projector": model.multi_modal_projector}
        view = SimpleNamespace(model=SimpleNamespace(**parts), config=self.net.config)
        out = tower.run(view, pixels)
        if self.merging is None:
            return tower.project(view, out.hidden[:, int(drop_cls) :]), []
        images = zip(out.hidden, out.probs, out.metric)
        merged = [merge(*image, self.merging, self.margins, out.cls) for image in images]
        return tower.project(view, torch.stack([m.hidden for m in merged])), merged

    def image_features(self, pixels: torch.Tensor) -> tuple[torch.Tensor, list[Merged]]:
        """[images, 3, H, W] -> [images, tokens, D]; without a merge CLS is dropped, as the class does."""
        return self._features("image_tower", pixels, drop_cls=True)

    def video_features(self, pixels: torch.Tensor) -> tuple[torch.Tensor, list[Merged]]:
        """[clips, frames, 3, H, W] -> [clips, frames * tokens, D], frames in order; without a merge CLS of
        every frame is there, as the class has it."""
        features, merged = self._features("video_tower", pixels.flatten(0, 1), drop_cls=False)
        return features.unflatten(0, pixels.shape[:2]).flatten(1, 2), merged

    def call(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        images: torch.Tensor | None = None,
        clips: torch.Tensor | None = None,
        past: list[Cache] | None = None,
    ) -> Result:
        """One call of the decoder; `input_ids` [B, S] holds one placeholder for each feature."""
        embeds = self.net.get_input_embeddings()(input_ids).clone()
        visual = torch.zeros_like(input_ids, dtype=torch.bool)
        config = self.net.config
        for token, features in ((config.image_token_index, images), (config.video_token_index, clips)):
            here = input_ids == token
            count = 0 if features is None else features.flatten(0, 1).shape[0]
            if int(here.sum()) != count:
                raise ValueError(f"expected {count} placeholders of token {token}; found {int(here.sum())}")
            if features is not None:
                embeds[here] = features.flatten(0, 1)
            visual |= here
        real = attention_mask[:, -input_ids.shape[1] :].bool()
        tokens = entry(embeds, real, visual, position_ids, self.pruning)
        return self.decoder.run(tokens, past, self.margins)
