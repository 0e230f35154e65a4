"""Tests of the reference itself: python -m unittest discover -s models/reference -t models"""

import importlib.util
import sys
import unittest
from pathlib import Path

import torch
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.vision_utils import get_vision_window_index

from .llava import Llava
from .merge import merge
from .order import Margins, top
from .qwen_tower import Seen, look, merge_grid
from .recipe import Merge, Prune, parse

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("llava", "forms")]
import build  # noqa: E402
import common  # noqa: E402
import towers  # noqa: E402
import variants  # noqa: E402


def qwen_vl(name: str):
    """A module of models/qwen_vl, whose files are called as llava's are."""
    folder = Path(__file__).parents[1] / "qwen_vl"
    # What it imports by a name that llava has not lies beside it.
    sys.path.append(str(folder))
    spec = importlib.util.spec_from_file_location(f"qwen_vl_{name}", folder / f"{name}.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


qwen = qwen_vl("build")

IMAGE = 4


def setUpModule():
    torch.set_grad_enabled(False)
    torch.set_num_threads(2)


def prompt(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, mask and positions of `rows` padded on the left."""
    length = max(map(len, rows))
    ids = torch.tensor([[3] * (length - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (length - len(r)) + [1] * len(r) for r in rows])
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def words(count: int, seed: int) -> list[int]:
    return torch.randint(5, 400, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def pixels(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 126, 126, generator=torch.Generator().manual_seed(5))


class AgainstTransformers(unittest.TestCase):
    """Without a pass, the reference is the model that Transformers computes."""

    def test_features_and_logits_over_two_calls(self):
        for name in ("mha", "gqa"):
            net = build.model(name)
            llava = Llava(net)
            features, _ = llava.image_features(pixels(2))
            want = torch.stack(list(net.get_image_features(pixels(2)).pooler_output))
            torch.testing.assert_close(features, want, atol=1e-5, rtol=0)

            ids, mask, positions = prompt(
                [words(3, 1) + [IMAGE] * 81 + words(9, 2), words(2, 3) + [IMAGE] * 81 + words(4, 4)]
            )
            embeds = net.get_input_embeddings()(ids).clone()
            embeds[ids == IMAGE] = features.flatten(0, 1)
            cache = DynamicCache()
            result = llava.call(ids, mask, positions, features)
            for step in range(2):
                out = net.model.language_model(
                    inputs_embeds=embeds,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                )
                torch.testing.assert_close(result.logits, net.lm_head(out.last_hidden_state[:, -1]), atol=2e-5, rtol=0)
                for mine, theirs in zip(result.cache, cache.layers):
                    real = mine.real[:, None, :, None]
                    torch.testing.assert_close(mine.keys * real, theirs.keys * real, atol=2e-5, rtol=0)
                if step == 0:
                    ids = torch.tensor([words(3, 6), words(3, 7)])
                    mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
                    positions = (mask.cumsum(1) - 1)[:, -3:]
                    embeds = net.get_input_embeddings()(ids)
                    result = llava.call(ids, mask, positions, past=result.cache)


class OtherModels(unittest.TestCase):
    """The same for the language models and towers that only the forms have."""

    def test_logits_over_two_calls(self):
        for name in ("gqa16", *list(variants.VARIANTS)[2:], *(t for t in towers.SIZES if t.startswith("siglip"))):
            with self.subTest(name):
                make = towers.model if name in towers.SIZES else variants.model
                net, theirs = make(name), make(name)
                llava = Llava(net)
                features, _ = llava.image_features(pixels(2))
                if name in towers.SIZES:
                    want = towers.FullTower(theirs)(pixels(2))
                else:
                    want = torch.stack(list(theirs.get_image_features(pixels(2)).pooler_output))
                torch.testing.assert_close(features, want, atol=1e-5, rtol=0)

                ids, mask, positions = prompt(
                    [words(3, 1) + [IMAGE] * 81 + words(9, 2), words(2, 3) + [IMAGE] * 81 + words(4, 4)]
                )
                embeds = theirs.get_input_embeddings()(ids).clone()
                embeds[ids == IMAGE] = features.flatten(0, 1)
                cache = DynamicCache()
                result = llava.call(ids, mask, positions, features)
                for step in range(2):
                    out = theirs.model.language_model(
                        inputs_embeds=embeds,
                        attention_mask=mask,
                        position_ids=positions,
                        past_key_values=cache,
                        use_cache=True,
                    )
                    want = common.head(theirs, out.last_hidden_state[:, -1])
                    torch.testing.assert_close(result.logits, want, atol=2e-5, rtol=0)
                    if step == 0:
                        ids = torch.tensor([words(3, 6), words(3, 7)])
                        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
                        positions = (mask.cumsum(1) - 1)[:, -3:]
                        embeds = theirs.get_input_embeddings()(ids)
                        result = llava.call(ids, mask, positions, past=result.cache)


class Stages(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.net = build.model("gqa")

    def test_keeping_everything_changes_nothing(self):
        plain = Llava(self.net)
        kept = Llava(self.net, Merge(81, 0, cls="drop"), Prune(((2, 1.0), (5, 1.0))))
        a, _ = plain.image_features(pixels(1))
        b, _ = kept.image_features(pixels(1))
        torch.testing.assert_close(a, b, atol=0, rtol=0)
        inputs = prompt([words(3, 1) + [IMAGE] * 81 + words(9, 2)])
        torch.testing.assert_close(plain.call(*inputs, a).logits, kept.call(*inputs, b).logits, atol=1e-6, rtol=0)

    def test_features_keep_their_places(self):
        """Everything kept in place changes nothing; discarded features have no say, whatever they hold."""
        ids, mask, positions = prompt([words(3, 1) + [IMAGE] * 81 + words(9, 2)])
        plain = Llava(self.net)
        features, _ = plain.image_features(pixels(1))
        want = plain.call(ids, mask, positions, features)
        all_kept = Llava(self.net, Merge(81, 0, placement="decoder"))
        features, merged = all_kept.image_features(pixels(1))
        got = all_kept.call(ids, mask, positions, features, gone=all_kept.gone(list(features), merged))
        torch.testing.assert_close(got.logits, want.logits, atol=1e-5, rtol=0)

        some = Llava(self.net, Merge(20, 4, placement="decoder"), Prune(((2, 0.5),)))
        features, merged = some.image_features(pixels(1))
        (gone,) = some.gone(list(features), merged)
        self.assertEqual(int(gone.sum()), 81 - 24)
        step = torch.tensor([[9]])
        longer = torch.cat([mask, torch.ones_like(step)], dim=1)
        results = []
        for noise in (0.0, 3.0):
            rows = features + noise * gone[:, None]
            first = some.call(ids, mask, positions, rows, gone=[gone])
            second = some.call(step, longer, positions[:, -1:] + 1, past=first.cache)
            self.assertEqual([c.real.shape[1] for c in second.cache[:3]], [94, 94 - 57, 94 - 57 - 12])
            results.append((first.logits, second.logits))
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, atol=0, rtol=0)

    def test_rows_are_ranked_as_if_alone(self):
        llava = Llava(self.net, None, Prune(((2, 0.5), (5, 0.1))))
        features, _ = llava.image_features(pixels(2))
        rows = [words(3, 1) + [IMAGE] * 81 + words(9, 2), words(2, 3) + [IMAGE] * 81 + words(4, 4)]
        both = llava.call(*prompt(rows), features)
        for index, row in enumerate(rows):
            alone = llava.call(*prompt([row]), features[index : index + 1])
            torch.testing.assert_close(both.logits[index], alone.logits[0], atol=2e-5, rtol=0)
            pad = max(map(len, rows)) - len(row)
            for one, many in zip(alone.drops, both.drops):
                self.assertEqual((one.origin[0] + pad).tolist(), many.origin[index][pad:].tolist())

    def test_rows_lose_what_the_poorest_row_loses(self):
        llava = Llava(self.net, None, Prune(((2, 0.5), (5, 0.0))))
        features, _ = llava.image_features(pixels(3))
        rows = [words(2, 1) + [IMAGE] * 81 + words(4, 2), words(2, 3) + [IMAGE] * 162 + words(4, 4)]
        result = llava.call(*prompt(rows), features)
        # 81 - 40 = 41 first; then 81 in all, although the second row could lose all of its 162.
        self.assertEqual([d.visual.tolist() for d in result.drops], [[40, 121], [0, 81]])
        self.assertEqual([c.real.shape[1] for c in result.cache], [168] * 2 + [127] * 3 + [87] * 3)
        self.assertEqual(result.cache[7].real[0].sum(), 6)

    def test_ratios_of_what_is_left(self):
        """The public schedule for Qwen2.5-VL: 81 -> 40; 20 of 40 ranked, 10 kept, 20 stay as text; and so on."""
        steps = ((2, 0.5), (4, 0.25), (5, 0.25), (6, 0.0))
        llava = Llava(self.net, None, Prune(steps, ratio_base="current"))
        features, _ = llava.image_features(pixels(1))
        result = llava.call(*prompt([words(2, 1) + [IMAGE] * 81 + words(4, 2)]), features)
        self.assertEqual([d.visual.tolist() for d in result.drops], [[40], [10], [2], [0]])
        # 20 - 10 leave, then 2 - 2 (floor(10 / 4) ranked and kept), then floor(2 / 4) - 0.
        self.assertEqual([c.real.shape[1] for c in result.cache], [87] * 2 + [46] * 2 + [36, 36, 36, 36])
        # The first 20 of the 40 were ranked, so the others are all there.
        first, second = (d.origin[0] for d in result.drops[:2])
        self.assertTrue(set(first[2:42][20:].tolist()) <= set(second.tolist()))

    def test_ratios_of_what_is_left_in_a_batch(self):
        steps = ((2, 0.5), (5, 0.25))
        llava = Llava(self.net, None, Prune(steps, ratio_base="current"))
        features, _ = llava.image_features(pixels(3))
        rows = [words(2, 1) + [IMAGE] * 81 + words(4, 2), words(2, 3) + [IMAGE] * 162 + words(4, 4)]
        result = llava.call(*prompt(rows), features)
        # 81 - 40 = 41 leave; then of 40 and 121 are 20 and 60 ranked, and 20 - 10 leave.
        self.assertEqual([d.visual.tolist() for d in result.drops], [[40, 121], [10, 50]])
        self.assertEqual([c.real.shape[1] for c in result.cache], [168] * 2 + [127] * 3 + [117] * 3)
        alone = llava.call(*prompt(rows[:1]), features[:1])
        torch.testing.assert_close(result.logits[0], alone.logits[0], atol=2e-5, rtol=0)
        nothing = llava.call(*prompt([rows[0], words(9, 3)]), features[:1])
        self.assertEqual([c.real.shape[1] for c in nothing.cache], [87] * 8)

    def test_one_drop_has_one_base(self):
        features, kept = None, []
        for base in ("entered", "current"):
            llava = Llava(self.net, None, Prune(((3, 0.3),), ratio_base=base))
            features, _ = llava.image_features(pixels(1)) if features is None else (features, None)
            result = llava.call(*prompt([words(2, 1) + [IMAGE] * 81 + words(4, 2)]), features)
            kept.append(result.drops[0].kept.tolist())
        self.assertEqual(*kept)

    def test_a_row_without_an_image_keeps_all(self):
        llava = Llava(self.net, None, Prune(((2, 0.0),)))
        features, _ = llava.image_features(pixels(1))
        result = llava.call(*prompt([words(2, 1) + [IMAGE] * 81 + words(4, 2), words(9, 3)]), features)
        self.assertEqual([c.real.shape[1] for c in result.cache], [87] * 8)

    def test_positions(self):
        """Renumbering is what calling with the kept tokens alone would number; keeping is not."""
        for positions, same in (("renumber", True), ("keep", False)):
            llava = Llava(self.net, None, Prune(((2, 0.5),), positions=positions))
            features, _ = llava.image_features(pixels(1))
            ids, mask, numbers = prompt([words(2, 1) + [IMAGE] * 81 + words(4, 2)])
            seen = []
            inner = llava.decoder._layer

            def spy(layer, tokens, past, inner=inner, seen=seen):
                seen.append(tokens.positions[0].tolist())
                return inner(layer, tokens, past)

            llava.decoder._layer = spy
            result = llava.call(ids, mask, numbers, features)
            self.assertEqual(seen[1], list(range(87)))
            self.assertEqual(seen[2], list(range(46)) if same else result.drops[0].kept[0].tolist())
            seen.clear()
            one = torch.tensor([[9]])
            llava.call(one, torch.ones(1, 88), torch.tensor([[87]]), past=result.cache)
            self.assertEqual([seen[0], seen[7]], [[87], [46 if same else 87]])

    def test_the_marked_tokens_ask(self):
        llava = Llava(self.net, None, Prune(((2, 0.3),), text="salient"))
        features, _ = llava.image_features(pixels(1))
        inputs = prompt([words(2, 1) + [IMAGE] * 81 + words(6, 2)])
        none, some = torch.zeros(1, 89, dtype=torch.bool), torch.zeros(1, 89, dtype=torch.bool)
        some[0, 84:86] = True
        last = Llava(self.net, None, Prune(((2, 0.3),), text="last")).call(*inputs, features)
        kept = [llava.call(*inputs, features, salient=s).drops[0].kept.tolist() for s in (none, some)]
        self.assertEqual(kept[0], last.drops[0].kept.tolist())
        self.assertNotEqual(kept[0], kept[1])


class MergeByHand(unittest.TestCase):
    """Six patches whose features are powers of ten, so that a sum tells what went into it."""

    def setUp(self):
        self.hidden = torch.tensor([[7.0], [1], [10], [100], [1000], [10000], [100000]])
        # CLS attends most to patch 2, then 5, 0, 4, 1, 3; the other queries to patch 3, then 1.
        cls = torch.tensor([0.0, 0.15, 0.1, 0.4, 0.05, 0.12, 0.18])
        others = torch.tensor([0.0, 0.1, 0.2, 0.05, 0.5, 0.05, 0.1])
        self.probs = torch.stack([cls, *[others] * 6])[None]
        # Patches 0, 1, 3 point one way, 4 and 5 another.
        self.metric = torch.tensor([[1.0, 1], [1, 0], [1, 0.1], [0, 1], [1, 0.05], [0.1, 1], [0, 1]])

    def run_merge(self, **options):
        return merge(self.hidden, self.probs, self.metric, Merge(**options), Margins())

    def test_attention(self):
        # Residuals by score: 5, 0, 4, 1, 3; pool of 4; anchors 5 and 4; 0 and 1 go to 4 (nearer to x).
        got = self.run_merge(dominant=2, contextual=2, cluster_width=2)
        self.assertEqual((got.dominant, got.anchors, got.members), ([2], [5, 4], [[], [0, 1]]))
        self.assertEqual(got.hidden.flatten().tolist(), [7, 100, 100000, 10000 + (1 + 10) / 2])

    def test_uniform(self):
        # Residuals in order: 0, 1, 3, 4, 5; step 2; anchors 0 and 3. Metric of 0 is (1, 0), of 3 (1, 0.05):
        # all others have more in the second direction, so they are nearer to 3.
        got = self.run_merge(dominant=1, contextual=2, selector="uniform", cls="drop")
        self.assertEqual((got.dominant, got.anchors, got.members), ([2], [0, 3], [[], [1, 4, 5]]))
        want = torch.tensor([100, 1, 1000 + (10 + 10000 + 100000) / 3])
        torch.testing.assert_close(got.hidden.flatten(), want)

    def test_local(self):
        # Most received among the residuals: 3, then 1; one neighbour each: 1's and 3's nearest is the other.
        got = self.run_merge(dominant=2, contextual=2, selector="local", cluster_width=1)
        self.assertEqual((got.anchors, got.members), ([3, 1], [[1], [3]]))
        self.assertEqual(got.hidden.flatten().tolist(), [7, 100, 505, 505])

    def test_clamps(self):
        got = self.run_merge(dominant=5, contextual=9)
        self.assertEqual((got.dominant, got.anchors), ([0, 2, 4, 5], [1, 3]))
        self.assertEqual(len(self.run_merge(dominant=99, contextual=3).hidden), 7)
        self.assertEqual(len(self.run_merge(dominant=3, contextual=0).hidden), 3)
        self.assertEqual(Merge(0.5, 0.2).counts(81), (39, 16))

    def test_ties_go_to_the_lower_index(self):
        self.assertEqual(top(torch.tensor([1.0, 2, 2, 1, 2]), 2).tolist(), [1, 2])
        self.probs[:] = 0.1
        got = self.run_merge(dominant=3, contextual=1, cluster_width=2)
        self.assertEqual((got.dominant, got.anchors, got.members), ([0, 1], [2], [[3]]))


class QwenTowers(unittest.TestCase):
    GRIDS = ((1, 8, 8), (1, 10, 6), (1, 2, 14), (2, 6, 10), (1, 2, 2))

    def patches(self, grid, seed=0):
        return torch.randn(grid[0] * grid[1] * grid[2], 96, generator=torch.Generator().manual_seed(seed))

    def test_features_are_those_of_transformers(self):
        net = qwen.model()
        for grid in self.GRIDS:
            given = self.patches(grid)
            want = net.model.visual(given, grid_thw=torch.tensor([grid])).pooler_output
            torch.testing.assert_close(look(net, given, grid).features, want, atol=1e-5, rtol=0)

    def test_scores_are_those_of_windowed_attention_put_back_in_order(self):
        """Queries and keys as Transformers' last block has them, in the order of windows, and frames as it cuts."""
        net, calls = qwen.model(), []

        def spy(module, query, key, value, attention_mask, scaling, **_):
            # Called for each frame, or each window, by itself.
            calls.append((query[0], key[0]))
            probs = torch.softmax(query @ key.transpose(2, 3) * scaling, dim=-1)
            return (probs @ value).transpose(1, 2), probs

        ALL_ATTENTION_FUNCTIONS["spy"] = spy
        net.config.vision_config._attn_implementation = "spy"
        for grid in self.GRIDS:
            given = self.patches(grid, 1)
            calls.clear()
            net.model.visual(given, grid_thw=torch.tensor([grid]))
            received, keys = [], []
            for query, key in calls[-grid[0] :]:
                probs = torch.softmax(query @ key.transpose(1, 2) * query.shape[-1] ** -0.5, dim=-1)
                received.append(probs.sum(dim=1).mean(dim=0))
                keys.append(key.mean(dim=0))
            order, _ = get_vision_window_index(torch.tensor([grid]), 2, qwen.SIZE.window, qwen.SIZE.patch)
            back = order.argsort()
            score = torch.cat(received).reshape(-1, 4).mean(dim=1)[back]
            metric = torch.cat(keys).reshape(-1, 4, keys[0].shape[1]).mean(dim=1)[back]
            seen = look(net, given, grid)
            torch.testing.assert_close(seen.score, score, atol=1e-6, rtol=0)
            torch.testing.assert_close(seen.metric, metric, atol=1e-5, rtol=0)

    def test_tokens_come_out_in_ascending_order_each_in_its_place(self):
        features = torch.tensor([[1.0], [10], [100], [1000], [10000], [100000]])
        # Dominant 2; residuals by score 5, 0, 4, 1, 3; pool of 4; anchors 5 and 4; 0 and 1 are nearer to 4.
        score = torch.tensor([0.15, 0.1, 0.4, 0.05, 0.12, 0.18])
        metric = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [1, 0.05], [0.1, 1], [0, 1]])
        metric[4] = torch.tensor([1.0, 0.2])
        got = merge_grid(Seen(features, score, metric), Merge(1, 2, cluster_width=2), Margins())
        self.assertEqual((got.dominant, got.anchors, got.members), ([2], [5, 4], [[], [0, 1]]))
        self.assertEqual((got.kept, got.features.flatten().tolist()), ([2, 4, 5], [100, 10000 + 5.5, 100000]))

    def test_budgets_are_clamped_to_what_an_image_has(self):
        net = qwen.model()
        for grid in self.GRIDS:
            seen = look(net, self.patches(grid), grid)
            n = seen.features.shape[0]
            for dominant, contextual, k1, k2 in (
                (540, 100, n, 0),
                (n, 3, n, 0),
                (n - 1, 3, n - 1, 1),
                (0.5, 0.5, max(n // 2, 1), n // 2),
                (1.0, 0, n, 0),
            ):
                got = merge_grid(seen, Merge(dominant, contextual), Margins())
                self.assertEqual((len(got.dominant), len(got.anchors)), (k1, k2))
                self.assertEqual(got.kept, sorted(set(got.dominant) | set(got.anchors)))
                self.assertEqual(got.features.shape[0], len(got.kept))
                if k1 == n:
                    self.assertEqual(got.features.tolist(), seen.features.tolist())


class Recipes(unittest.TestCase):
    def test_refusals(self):
        for wrong in (
            {"token_merge": {"dominant": 0, "contextual": 1}},
            {"token_merge": {"dominant": 4, "contextual": 1, "selector": "best"}},
            {"visual_prune": {"drops": [{"after_layer": 2, "keep": 0.2}, {"after_layer": 4, "keep": 0.5}]}},
            {"visual_prune": {"drops": [{"after_layer": 8, "keep": 0.5}]}},
            {"visual_prune": {"drops": [{"after_layer": 2, "keep": 0.5}], "ratio_base": "left"}},
            {"prune": {}},
        ):
            with self.subTest(wrong), self.assertRaises(ValueError):
                net = build.model("mha")
                Llava(net, *parse({"passes": [wrong]})).image_features(pixels(1))


if __name__ == "__main__":
    unittest.main()
