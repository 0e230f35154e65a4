"""The CLIP or SigLIP tower up to the layer whose output LLaVA selects, and what that layer's attention says."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class TowerOutput:
    """T tokens: CLS, where the tower has one, followed by the N patches, in position order."""

    hidden: torch.Tensor  # [images, T, C], what the projector would receive (CLS still there)
    probs: torch.Tensor  # [images, heads, T queries, T keys], of the selected layer
    metric: torch.Tensor  # [images, T, head_dim], key projection with bias, mean over heads
    cls: bool


ACTIVATIONS = {
    "gelu": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def run(net, pixel_values: torch.Tensor) -> TowerOutput:
    """`net` is a LlavaForConditionalGeneration, `pixel_values` [images, 3, H, W]."""
    tower, config = net.model.vision_tower, net.config
    heads = config.vision_config.num_attention_heads
    eps = config.vision_config.layer_norm_eps
    tower = getattr(tower, "vision_model", tower)
    # hidden_states[0] is the embedding, so entry -2 of L+1 entries is the output of L-1 layers.
    live = config.vision_config.num_hidden_layers + 1 + config.vision_feature_layer

    def norm(module, x):
        return F.layer_norm(x, x.shape[-1:], module.weight, module.bias, eps)

    def linear(module, x):
        return F.linear(x, module.weight, module.bias)

    embeddings, act = tower.embeddings, ACTIVATIONS[config.vision_config.hidden_act]
    has_cls = hasattr(embeddings, "class_embedding")
    patch = embeddings.patch_embedding
    x = F.conv2d(pixel_values, patch.weight, patch.bias, stride=config.vision_config.patch_size)
    x = x.flatten(2).transpose(1, 2)
    if has_cls:
        x = torch.cat([embeddings.class_embedding.expand(x.shape[0], 1, -1), x], dim=1)
    x = x + embeddings.position_embedding.weight
    if has_cls:
        x = norm(tower.pre_layrnorm, x)

    def heads_of(attention, h):
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        return (linear(p, h).unflatten(-1, (heads, -1)).transpose(1, 2) for p in projections)

    def attend(attention, h):
        q, k, v = heads_of(attention, h)
        probs = torch.softmax(q @ k.transpose(2, 3) * q.shape[-1] ** -0.5, dim=-1)
        return linear(attention.out_proj, (probs @ v).transpose(1, 2).flatten(2)), probs, k

    probs = metric = None
    for layer in tower.encoder.layers[:live]:
        if hasattr(layer, "temporal_attn"):
            # The tokens of one place in all frames of a clip, [clips, frames, T, C] -> [clips * T, frames, C].
            frames = layer.temporal_embedding.shape[0]
            places = x.unflatten(0, (-1, frames)).transpose(1, 2)
            size = places.shape[:2]
            places = places.flatten(0, 1) + layer.temporal_embedding
            places = places + attend(layer.temporal_attn, norm(layer.temporal_layer_norm1, places))[0]
            x = places.unflatten(0, size).transpose(1, 2).flatten(0, 1)
        out, probs, k = attend(layer.self_attn, norm(layer.layer_norm1, x))
        metric = k.mean(dim=1)
        x = x + out
        h = linear(layer.mlp.fc1, norm(layer.layer_norm2, x))
        x = x + linear(layer.mlp.fc2, act(h))
    return TowerOutput(x, probs, metric, has_cls)


def project(net, hidden: torch.Tensor) -> torch.Tensor:
    """The two-layer projector: [.., C] -> [.., D]."""
    projector = net.model.multi_modal_projector
    hidden = F.gelu(F.linear(hidden, projector.linear_1.weight, projector.linear_1.bias))
    return F.linear(hidden, projector.linear_2.weight, projector.linear_2.bias)
