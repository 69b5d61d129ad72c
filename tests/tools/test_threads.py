"""Threads: two patched models at once, one patched model on several inputs at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hess_plugin import TokenLayout, patch
from hess_plugin.demo.model import TinyVGGT
from hess_plugin.plans import Layouts
from hess_plugin.report import Tally
from hess_plugin.sites import Site

Run = Callable[[nn.Module, Tensor], Tensor]
ROUNDS = 6


def at_once(*jobs: Callable[[], list[Tensor]]) -> list[list[Tensor]]:
    """Start all jobs at the same moment, each in a thread of its own."""
    gate = threading.Barrier(len(jobs))

    def start(job: Callable[[], list[Tensor]]) -> list[Tensor]:
        torch.set_num_threads(1)
        gate.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(start, jobs))


@pytest.mark.parametrize("allocation", ["uniform", "equal"])
def test_two_patched_models_run_at_once_as_they_do_one_after_the_other(
    make_model: Callable[..., TinyVGGT],
    outputs: Run,
    images: Callable[..., Tensor],
    small_blocks: dict[str, Any],
    allocation: str,
) -> None:
    models = [make_model(), make_model(seed=1)]
    x = [images(3), images(4, seed=1)]
    handles = [
        patch(model, allocation=allocation, **{**small_blocks, "sparsity": s})
        for model, s in zip(models, (0.5, 0.8), strict=True)
    ]
    wanted = [outputs(model, inputs) for model, inputs in zip(models, x, strict=True)]
    found = at_once(
        *(
            lambda m=model, i=inputs: [outputs(m, i) for _ in range(ROUNDS)]
            for model, inputs in zip(models, x, strict=True)
        )
    )
    for results, want in zip(found, wanted, strict=True):
        assert all(torch.equal(result, want) for result in results)
    for handle, sparsity in zip(handles, (0.5, 0.8), strict=True):
        assert {site.calls for site in handle.report().sites} == {1 + ROUNDS}
        assert handle.report().sparsity == pytest.approx(sparsity, abs=0.02)


def test_one_patched_model_runs_inputs_of_several_shapes_at_once(
    make_model: Callable[..., TinyVGGT], outputs: Run, images: Callable[..., Tensor], small_blocks: dict[str, Any]
) -> None:
    model = make_model()
    # Of the last two, 7 views of 30 patches and 5 of 44, both sequences have 245 tokens.
    x = [images(3), images(5, 40, 70), images(7, 50, 60), images(5, 40, 110)]
    tokens = [views.shape[0] * (5 + views.shape[2] * views.shape[3] // 100) for views in x]
    assert tokens[2] == tokens[3] == 245
    with patch(model, **small_blocks) as handle:
        wanted = [outputs(model, inputs) for inputs in x]
        alone = handle.report()
        found = at_once(*(lambda i=inputs: [outputs(model, i) for _ in range(ROUNDS)] for inputs in x))
    for results, want in zip(found, wanted, strict=True):
        assert all(torch.equal(result, want) for result in results)
    report = handle.report()
    for site, one in zip(report.sites, alone.sites, strict=True):
        assert site.calls == (1 + ROUNDS) * one.calls and site.head_sparsity == pytest.approx(one.head_sparsity)


def test_a_model_runs_while_another_is_patched_and_unpatched(
    make_model: Callable[..., TinyVGGT], outputs: Run, images: Callable[..., Tensor], small_blocks: dict[str, Any]
) -> None:
    model, other, x = make_model(), make_model(seed=1), images()
    wanted, plain = outputs(model, x), outputs(other, x)

    def patching() -> list[Tensor]:
        for _ in range(ROUNDS):
            with patch(other, **small_blocks):
                pass
        return [outputs(other, x)]

    (still, *_), (after,) = at_once(lambda: [outputs(model, x) for _ in range(ROUNDS)], patching)
    assert torch.equal(still, wanted) and torch.equal(after, plain)


def test_a_thread_that_announced_nothing_takes_the_layout_of_another_and_its_own_if_it_did() -> None:
    layouts = Layouts("raster", 64)
    first, second = TokenLayout(2, 40), TokenLayout(4, 20)
    layouts.see(first)

    def elsewhere(announce: bool) -> TokenLayout:
        if announce:
            layouts.see(second)
        return layouts.of(80, "a site")

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(elsewhere, False).result() is first  # as autograd does, which recomputes in its own thread
        assert pool.submit(elsewhere, True).result() is second
    assert layouts.of(80, "a site") is first
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(elsewhere, False).result() is second  # the latest of any thread


def test_no_count_is_lost_among_threads() -> None:
    tally = Tally(Site("a site", nn.Identity(), 4, 8, "", {}))
    each, cpu = 400, torch.device("cpu")

    def count() -> list[Tensor]:
        for _ in range(each):
            started = tally.start(cpu)
            tally.sparse(torch.tensor([1, 2, 3, 4]), 8, 2)
            tally.dense(8, 2)
            tally.unfit("why")
            tally.stop(started, cpu)
        return []

    at_once(*[count] * 4)
    report = tally.report()
    assert (report.calls, report.dense_calls, report.unfit_calls) == (4 * each,) * 3
    assert report.head_sparsity == pytest.approx((7 / 16, 6 / 16, 5 / 16, 4 / 16))
