"""The order of work against a brute-force twin, and what it does to the time that programs wait for the last one."""

from __future__ import annotations

import heapq

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hess_plugin_cuda import BlockLists
from hess_plugin_cuda.schedule import work_order


def random_lists(batch: int, heads: int, rows: int, columns: int, seed: int) -> BlockLists:
    """Counts of few different values, so that rows and pairs tie."""
    generator = torch.Generator().manual_seed(seed)
    counts = 1 + torch.randint(min(3, columns), (batch, heads, rows, 1), generator=generator)
    places = torch.rand(batch, heads, rows, columns, generator=generator).argsort(-1)
    return BlockLists.from_mask(places < counts, rows * 16, columns * 16, 16, 16)


def plain_order(lists: BlockLists, special_tiles: int, heads: tuple[int, ...] | None) -> list[int]:
    """Pairs by cost, inside a pair rows by cost, and what ties by its place."""
    rows = lists.query_blocks
    counts = lists.counts().tolist()
    pairs = []
    for item in range(lists.batch):
        for head in range(lists.heads) if heads is None else heads:
            own = counts[item][head]
            first = (item * lists.heads + head) * (rows + special_tiles)
            tiles = [(-own[row] if row < rows else -lists.key_blocks - 1, row) for row in range(rows + special_tiles)]
            pairs.append((-sum(own), len(pairs), [first + row for _, row in sorted(tiles)]))
    return [work for _, _, pair in sorted(pairs) for work in pair]


@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 7), st.integers(1, 6), st.integers(0, 3),
    st.integers(0, 10**6), st.data(),
)  # fmt: skip
def test_order_is_that_of_the_twin(
    batch: int, heads: int, rows: int, columns: int, special_tiles: int, seed: int, data: st.DataObject
) -> None:
    lists = random_lists(batch, heads, rows, columns, seed)
    some = data.draw(st.none() | st.lists(st.integers(0, heads - 1), min_size=1, unique=True).map(tuple))
    order = work_order(lists, special_tiles, some)
    assert order.dtype == torch.int32
    assert order.tolist() == plain_order(lists, special_tiles, some)


def test_every_item_of_work_is_done_once() -> None:
    lists = random_lists(2, 3, 50, 6, 0)
    assert sorted(work_order(lists, 4, None).tolist()) == list(range(2 * 3 * 54))


def makespan(costs: list[float], workers: int) -> float:
    """When the last of the workers is done, if each takes the next item as soon as it is free."""
    free = [0.0] * workers
    for cost in costs:
        heapq.heappush(free, heapq.heappop(free) + cost)
    return max(free)


@pytest.mark.parametrize(("views", "slack"), [(10, 1.05), (50, 1.02)])
def test_programs_hardly_wait_for_the_last_one(views: int, slack: float) -> None:
    """264 programs at a time, as an H200 runs them; heads of very different fullness, the full one last by number."""
    rows, columns = -(-views * 1369 // 128), -(-views * 1369 // 64)
    generator = torch.Generator().manual_seed(0)
    fullness = torch.tensor([0.02, 0.5, 0.06, 0.04, 0.3, 0.02, 0.1, 1.0])[None, :, None]
    spread = torch.exp(0.4 * torch.randn(1, 8, rows, generator=generator))
    counts = (fullness * spread * columns).round().clamp(1, columns).long()
    counts[0, 7] = columns
    pointer = torch.cat([torch.zeros(1, dtype=torch.int64), counts.flatten().cumsum(0)])
    col = torch.zeros(int(pointer[-1]), dtype=torch.int32)  # which blocks they are does not matter here
    lists = BlockLists(pointer, col, 1, 8, views * 1369, views * 1369, 128, 64)
    fixed = 6  # beginning and end of a program, in the time of one block
    cost = (counts + fixed).flatten()
    order = work_order(lists, 0, None).long()
    ideal = max(int(cost.sum()) / 264, int(cost.max()))
    assert makespan(cost[order].tolist(), 264) <= slack * ideal
    assert makespan(cost.tolist(), 264) > 1.1 * ideal  # in the order of the heads they do wait
