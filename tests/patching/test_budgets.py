"""How much a patch keeps, by every rule and allocation, and what its report says of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hess_plugin import TokenLayout, patch
from hess_plugin.calibration.calibrator import calibrate
from hess_plugin.demo.model import TinyVGGT
from hess_plugin.interception import SDPA, intercept
from hess_plugin.plugins import resolve_adapter
from hess_plugin.scenes.scene import Scene
from hess_plugin.settings import ALLOCATIONS
from hess_plugin.sparsity import allocate, block_map, target_total, uniform_counts

from .patching_problems import BLOCKS, SPECIALS, images_of, outputs, profile_of


@pytest.fixture
def captured(tiny_model: TinyVGGT) -> Callable[[Tensor], list[tuple[Tensor, Tensor]]]:
    """Reads q and k of every site of the unpatched model."""

    def capture(images: Tensor) -> list[tuple[Tensor, Tensor]]:
        seen: list[tuple[Tensor, Tensor]] = []

        def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
            seen.append((query.detach().clone(), key.detach().clone()))
            return SDPA(query, key, value, **options)

        replaced = [intercept(site, attend) for site in resolve_adapter(tiny_model).sites(tiny_model)]
        outputs(tiny_model, images)
        for one in replaced:
            one.remove()
        return seen

    return capture


@pytest.mark.parametrize("ratio", [None, 0.3, 0.75, 0.999])
@pytest.mark.parametrize("mass", [None, 0.0, 0.4, 0.9])
@pytest.mark.parametrize("minimum", [1, 3])
def test_the_uniform_rule_keeps_what_it_says_on_the_captured_block_map(
    tiny_model: TinyVGGT,
    captured: Callable[[Tensor], list[tuple[Tensor, Tensor]]],
    ratio: float | None,
    mass: float | None,
    minimum: int,
) -> None:
    if ratio is None and mass is None:
        return
    images = images_of(3, 40, 70)
    with patch(tiny_model, sparse_ratio=ratio, cdf_threshold=mass, minimum=minimum, **BLOCKS) as handle:
        outputs(tiny_model, images)
    # Only the first site's input is the unpatched one.
    q, k = captured(images)[0]
    order = TokenLayout(3, 28, leading=SPECIALS).patches_first()[: 3 * 28]
    pooled = block_map(q[:, :, order], k[:, :, order], 8, 8)
    counts = uniform_counts(pooled, ratio, mass, minimum)
    wanted = 1 - counts.double().sum(-1)[0] / (pooled.shape[-1] * pooled.shape[-2])
    site = handle.report().sites[0]
    assert site.head_sparsity == pytest.approx(wanted.tolist())
    assert site.sparsity == pytest.approx(wanted.mean().item())
    special = -(-3 * SPECIALS // 8)
    columns = pooled.shape[-1]
    assert site.sparsity_all_keys == pytest.approx(wanted.mean().item() * columns / (columns + special))


@pytest.mark.parametrize("target", [0.1, 0.5, 0.73, 0.95, 0.9999])
def test_a_sparsity_target_is_met_to_one_block_pair(tiny_model: TinyVGGT, target: float) -> None:
    images = images_of(4)
    rows = columns = 4 * 36 // 8
    with patch(tiny_model, sparsity=target, **BLOCKS) as handle:
        outputs(tiny_model, images)
    pairs = 4 * rows * columns
    wanted = 1 - target_total(target, 4, rows, columns, 2) / pairs
    for site in handle.report().sites:
        assert site.sparsity == pytest.approx(wanted, abs=1e-12)
        # The floor of two key blocks a row limits what can be dropped.
        assert abs(site.sparsity - min(target, 1 - 2 / columns)) <= 1 / pairs


@pytest.mark.parametrize("rule", [{"sparsity": 0.5}, {"cdf_threshold": 0.6}])
@pytest.mark.parametrize("allocation", [name for name in ALLOCATIONS if name != "harm"])  # over all layers at once
def test_every_allocation_divides_one_total_by_the_scores(
    tiny_model: TinyVGGT, allocation: str, rule: dict[str, float]
) -> None:
    images = images_of(4, batch=2)
    traces = torch.tensor([[1.0, 2.0, 3.0, 30.0], [4.0, 3.0, 2.0, 1.0]])
    profile = profile_of(tiny_model, traces)
    with patch(tiny_model, **rule, **BLOCKS) as handle:
        outputs(tiny_model, images)
    uniform = handle.report().sites[0]
    with patch(tiny_model, profile=profile, allocation=allocation, seed=3, **rule, **BLOCKS) as handle:
        outputs(tiny_model, images)
    first, second = handle.report().sites
    assert first.head_sparsity is not None and second.head_sparsity is not None
    if allocation == "uniform":
        assert first == uniform.__class__(**{**vars(uniform), "seconds": first.seconds})
        return
    if allocation == "uncapped":
        assert first.sparsity >= uniform.sparsity
    else:
        assert first.sparsity == pytest.approx(uniform.sparsity, abs=1e-12)
    kept = [[1 - s for s in site.head_sparsity] for site in (first, second)]
    ranks = [sorted(range(4), key=lambda h, k=k: k[h]) for k in kept]
    if allocation == "equal":
        assert max(kept[0]) - min(kept[0]) <= 1 / (18 * 18) + 1e-9
    elif allocation in ("hess", "uncapped"):
        assert ranks[0] == [0, 1, 2, 3] and kept[0][3] == 1.0  # more than a head can use: capped
        if "sparsity" in rule:
            assert ranks[1] == [3, 2, 1, 0]
    elif allocation == "reverse":
        assert kept[0][0] == 1.0 and kept[0][0] > kept[0][1] >= kept[0][2] >= kept[0][3]
    else:
        assert sorted(kept[0])[-1] == 1.0
    if "sparsity" in rule and allocation == "hess":
        total = target_total(0.5, 4, 18, 18)
        budgets = allocate(total, traces.double(), rows=18, columns=18)
        wanted = (budgets.double() / 18**2).tolist()
        assert kept[0] == pytest.approx(wanted[0]) and kept[1] == pytest.approx(wanted[1])


def test_random_allocation_is_repeatable_and_depends_on_the_seed(tiny_model: TinyVGGT) -> None:
    found = []
    profile = profile_of(tiny_model)
    for seed in (0, 0, 1, 2, 3):
        with patch(tiny_model, profile=profile, allocation="random", sparsity=0.6, seed=seed, **BLOCKS) as handle:
            outputs(tiny_model, images_of(4))
        found.append(tuple(site.head_sparsity for site in handle.report().sites))
    assert found[0] == found[1] and len(set(found)) > 1


def test_a_profile_file_and_its_object_give_the_same_patch(tiny_model: TinyVGGT, tmp_path: Any) -> None:
    profile = profile_of(tiny_model)
    profile.save(tmp_path / "a.hess")
    results = []
    for given in (profile, tmp_path / "a.hess", str(tmp_path / "a.hess")):
        with patch(tiny_model, profile=given, **BLOCKS) as handle:
            results.append(outputs(tiny_model, images_of(3)))
        assert handle.report().allocation == "hess" and handle.report().settings["sparsity"] == 0.73
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_calibrated_demo_model_runs_patched(room: Scene) -> None:
    from hess_plugin.demo.model import load_demo_model

    model = load_demo_model()
    profile = calibrate(model, [room])
    with patch(model, profile=profile, sparsity=0.5, **BLOCKS) as handle:
        outputs(model, room.images)
    budgets = torch.tensor([site.head_sparsity for site in handle.report().sites])
    scores = profile.scores()
    # More sensitive heads never keep less.
    for row, score in zip(1 - budgets, scores, strict=True):
        assert bool((row[score.argsort()].diff() >= -1 / 18**2).all())


def test_the_report_before_and_after_forwards(tiny_model: TinyVGGT) -> None:
    with patch(tiny_model, sparsity=0.5, **BLOCKS) as handle:
        empty = handle.report()
        assert empty.sparsity is None and empty.sparsity_all_keys is None and empty.seconds == 0
        assert "sparsity - (- of all key blocks)" in str(empty)
        json.dumps(empty.to_dict(), allow_nan=False)
        outputs(tiny_model, images_of(3))
        outputs(tiny_model, images_of(1, 30, 30))  # so short that it stays dense
    report = handle.report()
    assert [site.calls for site in report.sites] == [2, 2] and [site.dense_calls for site in report.sites] == [1, 1]
    assert report.backend == "gather" and report.seconds > 0
    assert 0.4 < report.sparsity < 0.5  # the dense call counts as dropping nothing
    text = str(report)
    assert "aggregator.global_blocks.1.attn" in text and "backend gather" in text and "allocation uniform" in text
    loaded = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert loaded["sparsity"] == report.sparsity and len(loaded["sites"][0]["head_sparsity"]) == 4
    assert loaded["settings"]["block_q"] == 8


def test_a_report_is_a_snapshot(tiny_model: TinyVGGT) -> None:
    with patch(tiny_model, sparsity=0.5, **BLOCKS) as handle:
        outputs(tiny_model, images_of(2))
        first = handle.report()
        outputs(tiny_model, images_of(2))
        assert first.sites[0].calls == 1 and handle.report().sites[0].calls == 2
        assert handle.report().sparsity == pytest.approx(first.sparsity)
