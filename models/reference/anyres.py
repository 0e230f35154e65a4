"""LLaVA-NeXT and LLaVA-OneVision: images of several crops, the base image first."""

from dataclasses import dataclass

import torch

from .llava import Llava
from .merge import Merged


@dataclass
class Picture:
    """An image of any resolution, prepared."""

    crops: torch.Tensor  # [crops, 3, H, W], the base image first, then the crops row by row
    size: tuple[int, int]  # height and width of the original


class AnyRes(Llava):
    """Stage 1 works on each crop alone; stage 2 on the union of all crops of all images.

    Without a merge, features are laid out, freed of padding and given newline tokens by the model's own class.
    With a merge there are no rows of a grid left that could end: the crops' tokens follow each other, the base
    image's first, without newline tokens.
    """

    def encode(self, images: list[Picture]) -> tuple[torch.Tensor, list[torch.Tensor], list[Merged]]:
        if self.merging is not None and self.merging.placement == "decoder":
            raise ValueError("token_merge.placement: expected encoder for images of several crops; found decoder")
        features, merged = self.image_features(torch.cat([i.crops for i in images]))
        crops = features.split([i.crops.shape[0] for i in images])
        if self.merging is not None:
            return features, [c.flatten(0, 1) for c in crops], merged
        inner, config = self.net.model, self.net.config
        options = {"image_newline": inner.image_newline}
        if config.model_type == "llava_next":
            options["vision_feature_select_strategy"] = config.vision_feature_select_strategy
        else:
            options["vision_aspect_ratio"] = config.vision_aspect_ratio
        packed, _ = inner.pack_image_features(crops, [list(i.size) for i in images], **options)
        return features, packed, merged
