"""The CLIP tower up to the layer whose output LLaVA selects, and what that layer's attention says."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class TowerOutput:
    """Tokens are CLS followed by the N patches, in position order."""

    hidden: torch.Tensor  # [images, 1+N, C], what the projector would receive (CLS still there)
    probs: torch.Tensor  # [images, heads, 1+N queries, 1+N keys], of the selected layer
    metric: torch.Tensor  # [images, 1+N, head_dim], key projection with bias, mean over heads


def run(net, pixel_values: torch.Tensor) -> TowerOutput:
    """`net` is a LlavaForConditionalGeneration, `pixel_values` [images, 3, H, W]."""
    tower, config = net.model.vision_tower, net.config
    heads = config.vision_config.num_attention_heads
    eps = config.vision_config.layer_norm_eps
    # hidden_states[0] is the embedding, so entry -2 of L+1 entries is the output of L-1 layers.
    live = config.vision_config.num_hidden_layers + 1 + config.vision_feature_layer

    def norm(module, x):
        return F.layer_norm(x, x.shape[-1:], module.weight, module.bias, eps)

    def linear(module, x):
        return F.linear(x, module.weight, module.bias)

    embeddings = tower.embeddings
    patches = F.conv2d(pixel_values, embeddings.patch_embedding.weight, stride=config.vision_config.patch_size)
    patches = patches.flatten(2).transpose(1, 2)
    cls = embeddings.class_embedding.expand(patches.shape[0], 1, -1)
    x = torch.cat([cls, patches], dim=1) + embeddings.position_embedding.weight
    x = norm(tower.pre_layrnorm, x)
    probs = metric = None
    for layer in tower.encoder.layers[:live]:
        attention = layer.self_attn
        h = norm(layer.layer_norm1, x)
        q, k, v = (
            linear(p, h).unflatten(-1, (heads, -1)).transpose(1, 2)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        probs = torch.softmax(q @ k.transpose(2, 3) * q.shape[-1] ** -0.5, dim=-1)
        metric = k.mean(dim=1)
        x = x + linear(attention.out_proj, (probs @ v).transpose(1, 2).flatten(2))
        h = linear(layer.mlp.fc1, norm(layer.layer_norm2, x))
        x = x + linear(layer.mlp.fc2, h * torch.sigmoid(1.702 * h))
    return TowerOutput(x, probs, metric)


def project(net, hidden: torch.Tensor) -> torch.Tensor:
    """The two-layer projector: [.., C] -> [.., D]."""
    projector = net.model.multi_modal_projector
    hidden = F.gelu(F.linear(hidden, projector.linear_1.weight, projector.linear_1.bias))
    return F.linear(hidden, projector.linear_2.weight, projector.linear_2.bias)
