"""Tests of what other methods choose: python -m unittest discover -s models/reference -t models"""

import sys
import unittest
from pathlib import Path

import torch

from .keep import diverse, drawn, even, splitmix64
from .llava import Llava
from .order import Margins
from .recipe import parse

sys.path[:0] = [str(Path(__file__).parents[1] / "llava")]
import build  # noqa: E402

IMAGE = 4


def setUpModule():
    torch.set_grad_enabled(False)


class Keeping(unittest.TestCase):
    def test_the_generator_is_splitmix64(self):
        # The sequence from 1234567 that implementations of it are tested with.
        numbers = splitmix64(1234567)
        published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
        self.assertEqual([next(numbers) for _ in published], published)

    def test_places(self):
        self.assertEqual(drawn(81, 81, 7), list(range(81)))
        self.assertTrue(set(drawn(81, 9, 7)) < set(drawn(81, 20, 7)))
        self.assertEqual(even(9, 3), [1, 4, 7])
        self.assertEqual(even(81, 81), list(range(81)))

    def test_diverse_by_definition(self):
        """Each choice, looked at alone: nobody else is farther from its nearest chosen token."""
        made = torch.Generator().manual_seed(3)
        for count, keep in ((20, 20), (81, 16), (33, 1)):
            features = torch.randn(count, 24, generator=made, dtype=torch.float64)
            order = diverse(features, keep, Margins())
            self.assertEqual(len(set(order)), keep)
            apart = 1 - torch.nn.functional.cosine_similarity(features[:, None], features[None], dim=-1)
            # The public implementation's first choice: the second smallest of each column, the smallest being its own.
            self.assertEqual(order[0], int(apart.topk(2, dim=0, largest=False).values[1].argmax()))
            for at in range(1, keep):
                nearest = apart[order[:at]].min(dim=0).values
                nearest[order[:at]] = -1
                self.assertEqual(order[at], int(nearest.argmax()))


class FastV(unittest.TestCase):
    """FastV against the attention that Transformers itself gives out."""

    def test_what_stays_is_what_the_last_token_looked_at(self):
        for name in ("mha", "gqa"):
            net = build.model(name)
            net.set_attn_implementation("eager")
            for after, keep in ((1, 0.3), (2, 0.5), (3, 0.1)):
                llava = Llava(net, *parse({"passes": [{"fast_v": {"after_layer": after, "keep": keep}}]}))
                picture = torch.randn(1, 3, 126, 126, generator=torch.Generator().manual_seed(5))
                features, _ = llava.image_features(picture)
                words = torch.randint(5, 400, (12,), generator=torch.Generator().manual_seed(after)).tolist()
                ids = torch.tensor([words[:4] + [IMAGE] * 81 + words[4:]])
                mask, positions = torch.ones_like(ids), torch.arange(ids.shape[1])[None]
                result = llava.call(ids, mask, positions, features)
                embeds = net.get_input_embeddings()(ids).clone()
                embeds[ids == IMAGE] = features.flatten(0, 1)
                out = net.model.language_model(inputs_embeds=embeds, attention_mask=mask, output_attentions=True)
                paid = out.attentions[after - 1][0].mean(dim=0)[-1][4:85]
                stay = (paid.topk(int(81 * keep)).indices + 4).tolist()
                want = sorted([*range(4), *stay, *range(85, ids.shape[1])])
                self.assertEqual(result.drops[0].kept.tolist(), [want])
                lengths = [c.real.shape[1] for c in result.cache]
                self.assertEqual(lengths, [93] * after + [len(want)] * (len(lengths) - after))


if __name__ == "__main__":
    unittest.main()
