"""What selection on a GPU holds, starts and waits for, at real sizes: counted on tensors without memory."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from hess_plugin.calibration.live_memory import LiveMemory
from hess_plugin.sparsity import pool, pooled_uniform_counts, target_total
from hess_plugin.sparsity.selection import UNKNOWN_LIMIT, select_mass
from hess_plugin_cuda import BlockLists

HEADS, PATCHES, GIB = 16, 1369, 2**30  # of VGGT at 518 pixels

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed: pip install 'triton>=3.6'"
)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels that would have been started; none is."""
    names: list[str] = []
    for module in ("rows", "pooling"):
        monkeypatch.setattr(f"hess_plugin.sparsity.{module}.uses_triton", lambda device: True)

    def note(kernel: Any, *arguments: Any, **options: Any) -> None:
        names.append(kernel.__name__)

    monkeypatch.setattr("hess_plugin_cuda.triton_selection.launch.launch", note)
    yield names


class Operations(LiveMemory):
    """Counts memory, and the operations that would start a kernel of torch."""

    def __init__(self, existing: Any) -> None:
        super().__init__(existing)
        self.started: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = super().__torch_dispatch__(func, types, args, kwargs)
        if not func.is_view and not func.__name__.startswith("empty"):
            self.started.append(func.__name__)
        return output


def counted(views: int, uniform: bool = False) -> tuple[Operations, BlockLists]:
    """A selection at 90 % sparsity of a layer over so many views. No value can be read from these tensors."""
    q = torch.empty(1, HEADS, views * PATCHES, 64, dtype=torch.bfloat16, device="meta")
    rows, columns = -(-views * PATCHES // 128), -(-views * PATCHES // 64)
    with Operations([q]) as operations:
        pooled = pool(q, q, 128, 64)
        if uniform:
            lists = select_mass(pooled, counts=pooled_uniform_counts(pooled, 0.9, 0.5))
        else:
            totals = (target_total(0.9, HEADS, rows, columns) // HEADS,) * HEADS
            budgets = torch.empty(1, HEADS, dtype=torch.int64, device="meta")
            lists = select_mass(pooled, budgets=budgets, head_totals=totals)
            assert (lists.head_kept, lists.exact) == (totals, True)
    return operations, lists


def test_a_thousand_views_take_less_than_two_gib(started: list[str]) -> None:
    operations, lists = counted(1000)
    own = lists.col.untyped_storage().nbytes()
    assert own == pytest.approx(1.46e9, rel=0.01)
    assert operations.peak < 2 * GIB
    assert operations.peak - own < 0.2 * GIB  # pooled tokens, a chunk of scores, and small numbers for each row


@pytest.mark.parametrize(("views", "most"), [(20, 6), (100, 6), (130, 6)])
def test_small_layers_take_few_launches(views: int, most: int, started: list[str]) -> None:
    operations, _ = counted(views)
    assert started == ["pool_kernel", "pool_kernel", "score_kernel", "threshold_kernel", "spread_kernel", "emit_kernel"]
    assert len(started) == most
    assert len(operations.started) <= 4, operations.started
    assert operations.peak < 0.4 * GIB


def test_large_layers_take_two_passes(started: list[str]) -> None:
    operations, _ = counted(1000)
    chunks = started.count("threshold_kernel")
    assert 400 < chunks < 500  # of 32 MiB
    assert (started.count("emit_kernel"), started.count("score_kernel")) == (chunks, 2 * chunks)
    assert len(operations.started) <= 4


def test_lists_of_unknown_length_have_room_for_all_while_that_is_little(started: list[str]) -> None:
    operations, lists = counted(200, uniform=True)
    assert not lists.exact
    assert lists.col.numel() == lists.rows * lists.key_blocks
    assert operations.peak < UNKNOWN_LIMIT + 0.4 * GIB
    assert "count_kernel" in started
    with pytest.raises(RuntimeError, match="meta"):  # the one wait
        counted(300, uniform=True)
