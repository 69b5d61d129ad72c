"""Running a module in chunks: what it gives whole, or whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hess_plugin import patch
from hess_plugin.demo.model import TinyVGGT
from hess_plugin.memory.chunks import Chunks
from hess_plugin.plugins import resolve_adapter


class Alone(nn.Module):
    """Treats entries alone, and returns what `answer` makes of them."""

    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.answer = answer
        self.lengths: list[int] = []

    def forward(self, x: Tensor, **others: Any) -> Any:
        self.lengths.append(len(x))
        return self.answer(x)


class Odict(dict):  # type: ignore[type-arg]
    """As addict's: a subclass of dict."""


@settings(max_examples=50, deadline=None)
@given(
    length=st.integers(1, 40),
    width=st.integers(1, 9),
    chunk=st.integers(1, 400),
    axis=st.integers(0, 1),
    seed=st.integers(0, 99),
)
def test_chunks_give_what_the_whole_gives(length: int, width: int, chunk: int, axis: int, seed: int) -> None:
    shape = (length, width, 3) if axis == 0 else (width, length, 3)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def answer(part: Tensor) -> Any:
        return Odict(a=(part * 2, None), b=[part.transpose(0, 1).sum(-1).T, "text"])

    sizes: list[int] = []

    def own(part: Tensor, **_: Any) -> Any:
        sizes.append(part.shape[axis])
        return answer(part)

    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr("hess_plugin.memory.chunks.CHUNK", chunk)
        found = Chunks("name", axis)(nn.Identity(), own, (x,), {"other": 3})
    wanted = answer(x)
    assert type(found) is Odict and found["a"][1] is None and found["b"][1] == "text"
    assert torch.equal(found["a"][0], wanted["a"][0]) and torch.equal(found["b"][0], wanted["b"][0])
    assert sum(sizes) == length and max(sizes) - min(sizes) <= 1
    assert max(sizes) <= max(2, chunk * length // x.numel())
    assert len(sizes) == 1 or max(sizes) > min(sizes)  # one length could be another one's by coincidence


@dataclass
class Held:
    """An output with a tensor in it, whose comparison is a tensor."""

    values: Tensor


@pytest.mark.parametrize("hold", [Held, lambda x: x.numpy(), lambda x: [x, float("nan")], lambda x: {1, len(x)}])
def test_outputs_that_cannot_be_compared_run_whole(
    hold: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hess_plugin.memory.chunks.CHUNK", 6)
    module, x = Alone(hold), torch.randn(7, 3)
    found = Chunks("the head", 0)(module, module.forward, (x,), {})
    assert type(found) is type(hold(x)) and module.lengths[-1] == 7 and len(module.lengths) < 4
    assert "the head does not return one entry for each of its inputs; it runs whole" in caplog.text


@pytest.mark.parametrize("held", [Held(torch.ones(7, 3)), torch.ones(7, 3).numpy()])
def test_inputs_that_may_hold_tensors_are_not_left_behind_by_those_that_are_cut(
    held: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hess_plugin.memory.chunks.CHUNK", 6)
    lengths: list[int] = []

    def own(x: Tensor, other: Any) -> Tensor:
        lengths.append(len(x))
        return x + torch.as_tensor(getattr(other, "values", other))

    x = torch.randn(7, 3)
    assert torch.equal(Chunks("the head", 0)(nn.Identity(), own, (x, held), {}), x + 1) and lengths == [7]
    assert "the head is given an object that may hold tensors; it runs whole" in caplog.text


@settings(max_examples=100, deadline=None)
@given(length=st.integers(1, 12), table=st.integers(1, 12), chunk=st.integers(1, 40))
def test_an_output_as_long_as_a_chunk_by_coincidence_is_not_joined(length: int, table: int, chunk: int) -> None:
    """What a module gives back beside its entries keeps its length, whatever the length of the chunks."""
    x, fixed = torch.randn(length, 3), torch.arange(table)
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr("hess_plugin.memory.chunks.CHUNK", chunk)
        twice, same = Chunks("name", 0)(nn.Identity(), lambda part: (part * 2, fixed), (x,), {})
    assert torch.equal(twice, x * 2) and torch.equal(same, fixed)


@settings(max_examples=100, deadline=None)
@given(length=st.integers(2, 12), table=st.integers(2, 12), chunk=st.integers(1, 40))
def test_a_table_as_long_as_the_input_by_coincidence_is_not_cut(length: int, table: int, chunk: int) -> None:
    """Known from another call of the same module, in which it had another length."""
    assume(length != table)
    fixed, chunks = torch.randn(table, 3), Chunks("name", 0)

    def own(part: Tensor, other: Tensor) -> Tensor:
        assert len(other) == table
        return part @ other.T

    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr("hess_plugin.memory.chunks.CHUNK", chunk)
        for count in (length, table):
            x = torch.randn(count, 3)
            torch.testing.assert_close(chunks(nn.Identity(), own, (x, fixed), {}), x @ fixed.T)


@pytest.mark.parametrize(
    "answer",
    [
        lambda x: x.sum(0),  # one for all
        lambda x: (x, x.sum()),
        lambda x: x[:-1],
        lambda x: (x, len(x)),
        lambda x: [x] * len(x),
    ],
)
def test_what_does_not_return_an_entry_for_each_runs_whole(
    answer: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hess_plugin.memory.chunks.CHUNK", 6)
    module, x, chunks = Alone(answer), torch.randn(7, 3), Chunks("the head", 0)
    own = module.forward
    for _ in range(2):
        found, wanted = chunks(module, own, (x,), {}), answer(x)
        torch.testing.assert_close(found, wanted)
    assert caplog.text.count("the head does not return one entry for each of its inputs; it runs whole") == 1


def test_only_tensors_of_the_same_length_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hess_plugin.memory.chunks.CHUNK", 6)
    seen: list[tuple[Any, ...]] = []

    def own(x: Tensor, table: Tensor, *, extra: list[Any], scalar: Tensor) -> Tensor:
        seen.append((x.shape, table.shape, extra[0].shape, extra[1], scalar.shape))
        return x

    x = torch.randn(5, 3)
    Chunks("name", 0)(nn.Identity(), own, (x, torch.ones(1, 3)), {"extra": [torch.ones(5), None], "scalar": x.sum()})
    assert seen == [((n, 3), (1, 3), (n,), None, ()) for n in (1, 2, 2)]


def test_a_part_of_a_contiguous_tensor_can_be_viewed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hess_plugin.memory.chunks.CHUNK", 12)
    x = torch.randn(2, 6, 3)  # two items: a slice of the second axis has gaps
    found = Chunks("name", 1)(nn.Identity(), lambda part: part.view(-1, 3).view(part.shape), (x,), {})
    assert torch.equal(found, x)


def test_a_module_that_takes_statistics_over_its_batch_is_left_whole(
    tiny_model: TinyVGGT, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model.point_head.norm = nn.BatchNorm1d(64, track_running_stats=False)
    family = resolve_adapter(tiny_model).family(tiny_model)
    monkeypatch.setattr("hess_plugin.adapting.Adapter.family", lambda *_: family)
    with patch(tiny_model, sparsity=0.5, memory="lean"):
        assert "forward" not in vars(tiny_model.point_head) and "forward" in vars(tiny_model.depth_head)
    assert "point_head is not run in chunks" in caplog.text
