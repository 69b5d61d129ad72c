"""Block lists against the table they stand for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hess_plugin_cuda import BlockLists, block_count

SIZES = st.tuples(*(st.integers(1, n) for n in (3, 3, 40, 40, 17, 9)), st.integers(0, 10**6))


def random_mask(batch: int, heads: int, rows: int, columns: int, seed: int) -> Tensor:
    """A table with at least one kept block a row and every degree of fullness."""
    generator = torch.Generator().manual_seed(seed)
    fullness = torch.rand(batch, heads, 1, 1, generator=generator) * 1.5
    mask = torch.rand(batch, heads, rows, columns, generator=generator) < fullness
    first = torch.randint(columns, (batch, heads, rows, 1), generator=generator)
    return mask.scatter(-1, first, True)


def random_mask_of_counts(batch: int, kept: Tensor, rows: int, columns: int, seed: int) -> Tensor:
    """A table whose heads keep `kept` pairs each, one or more a row, the same number in every item."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(batch, len(kept), rows, columns, dtype=torch.bool)
    mask[..., 0] = True
    for item in range(batch):
        for head, count in enumerate(kept.tolist()):
            others = torch.randperm(rows * (columns - 1), generator=generator)[: count - rows]
            mask[item, head, others // max(columns - 1, 1), 1 + others % max(columns - 1, 1)] = True
    return mask


@given(SIZES)
@settings(max_examples=60, deadline=None)
def test_lists_say_what_the_mask_says(sizes: tuple[int, ...]) -> None:
    batch, heads, queries, keys, block_q, block_k, seed = sizes
    rows, columns = -(-queries // block_q), -(-keys // block_k)
    mask = random_mask(batch, heads, rows, columns, seed)
    lists = BlockLists.from_mask(mask, queries, keys, block_q, block_k).check()
    assert (lists.query_blocks, lists.key_blocks, lists.rows) == (rows, columns, batch * heads * rows)
    assert torch.equal(lists.to_mask(), mask)
    assert torch.equal(lists.counts(), mask.sum(-1))
    assert lists.kept == int(mask.sum())
    assert lists.sparsity() == pytest.approx(1 - mask.double().mean().item())
    assert lists.is_full == bool(mask.all())
    for row, flags in enumerate(mask.reshape(-1, columns).tolist()):
        start, stop = lists.row_ptr[row : row + 2].tolist()
        assert lists.col[start:stop].tolist() == [j for j, kept in enumerate(flags) if kept]


@given(SIZES, st.data())
@settings(max_examples=40, deadline=None)
def test_lists_of_some_heads_are_theirs(sizes: tuple[int, ...], data: st.DataObject) -> None:
    batch, heads, queries, keys, block_q, block_k, seed = sizes
    rows, columns = -(-queries // block_q), -(-keys // block_k)
    kept = torch.randint(rows, rows * columns + 1, (heads,), generator=torch.Generator().manual_seed(seed))
    mask = random_mask_of_counts(batch, kept, rows, columns, seed)
    lists = BlockLists.from_mask(mask, queries, keys, block_q, block_k)
    lists = replace(lists, head_kept=tuple(kept.tolist())).check()
    some = data.draw(st.lists(st.integers(0, heads - 1), min_size=1, max_size=heads, unique=True))
    own = lists.of_heads(some).check()
    assert torch.equal(own.to_mask(), mask[:, some]) and own.head_kept == tuple(kept[some].tolist())


def test_lists_of_some_heads_need_to_know_where_each_begins() -> None:
    lists = BlockLists.full(1, 2, 20, 20, 8, 8)
    with pytest.raises(ValueError, match="of_heads needs lists that are exact and know head_kept"):
        lists.of_heads([0])


def test_lists_with_room_to_spare_say_what_exact_ones_do() -> None:
    mask = random_mask(2, 3, 4, 5, seed=1)
    exact = BlockLists.from_mask(mask, 32, 40, 8, 8)
    room = torch.cat([exact.col, torch.full((mask.numel() - exact.kept,), -7, dtype=torch.int32)])
    lists = replace(exact, col=room, exact=False).check()
    assert lists.kept == exact.kept and lists.sparsity() == exact.sparsity()
    assert torch.equal(lists.to_mask(), mask)
    assert not lists.is_full and not replace(lists, row_ptr=exact.row_ptr).is_full  # no host can tell
    assert lists.to("cpu").exact is False


@pytest.mark.parametrize(
    ("head_kept", "says"),
    [((6,), "head_kept of 2 heads, 3 to 9 pairs each"), ((2, 9), "3 to 9 pairs each"), ((9, 8), "sum to 17 an item")],
)
def test_what_heads_keep_must_fit(head_kept: tuple[int, ...], says: str) -> None:
    full = BlockLists.full(1, 2, 20, 20, 8, 8)
    with pytest.raises(ValueError, match=says):
        replace(full, head_kept=head_kept)


def test_what_heads_keep_is_checked_against_the_lists() -> None:
    mask = torch.ones(1, 2, 3, 3, dtype=torch.bool)
    mask[0, 0, 0, 0] = False
    lists = replace(BlockLists.from_mask(mask, 20, 20, 8, 8), head_kept=(9, 8))
    with pytest.raises(ValueError, match=r"head_kept says \(9, 8\); the heads of the items keep \[\[8, 9\]\]"):
        lists.check()


def test_full_lists_keep_everything() -> None:
    lists = BlockLists.full(2, 3, 100, 50, 16, 8).check()
    assert lists.is_full
    assert lists.sparsity() == 0.0
    assert lists.to_mask().all()


def test_sparsity_over_all_key_blocks_counts_special_ones_as_kept() -> None:
    mask = torch.zeros(1, 1, 2, 8, dtype=torch.bool)
    mask[..., :2] = True
    lists = BlockLists.from_mask(mask, 20, 80, 10, 10)
    assert lists.sparsity() == pytest.approx(0.75)
    assert lists.sparsity(special_keys=11) == pytest.approx(1 - 4 / 10)  # 11 tokens are two blocks of their own


@pytest.mark.parametrize(("tokens", "block", "blocks"), [(1, 64, 1), (64, 64, 1), (65, 64, 2), (128, 64, 2)])
def test_block_count_rounds_up(tokens: int, block: int, blocks: int) -> None:
    assert block_count(tokens, block) == blocks


def valid() -> dict[str, object]:
    return {
        "row_ptr": torch.tensor([0, 1, 3]),
        "col": torch.tensor([1, 0, 2], dtype=torch.int32),
        "batch": 1,
        "heads": 1,
        "query_tokens": 20,
        "key_tokens": 25,
        "block_q": 10,
        "block_k": 10,
    }


@pytest.mark.parametrize(
    ("field", "value", "error", "says"),
    [
        ("heads", 0, ValueError, "heads >= 1"),
        ("block_q", 1.5, ValueError, "block_q >= 1"),
        ("row_ptr", torch.tensor([0, 1, 3], dtype=torch.int32), TypeError, r"row_ptr .* torch.int64"),
        ("col", [1, 0, 2], TypeError, r"col .* got list"),
        ("col", torch.tensor([[1, 0, 2]], dtype=torch.int32), TypeError, r"col .* \[1, 3\]"),
        ("query_tokens", 31, ValueError, "row_ptr of 5 entries"),
        ("col", torch.zeros(7, dtype=torch.int32), ValueError, "1 to 3 key blocks"),
        ("col", torch.zeros(1, dtype=torch.int32), ValueError, "1 to 3 key blocks"),
    ],
)
def test_construction_refuses(field: str, value: object, error: type[Exception], says: str) -> None:
    BlockLists(**valid())  # type: ignore[arg-type]
    arguments = valid() | {field: value}
    if field == "query_tokens":
        arguments["query_tokens"] = 31  # four query blocks
    with pytest.raises(error, match=says):
        BlockLists(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row_ptr", "col", "says"),
    [
        ([0, 1, 2], [1, 0, 2], "from 0 to 3"),
        ([0, 0, 3], [0, 1, 2], "query block 0 of head 0 of item 0 keeps none"),
        ([0, 1, 3], [1, 0, 3], "query block 1 of head 0 of item 0 lists 3"),
        ([0, 1, 3], [-1, 0, 2], "query block 0 of head 0 of item 0 lists -1"),
        ([0, 1, 3], [1, 2, 0], "query block 1 of head 0 of item 0 lists 2 before 0"),
        ([0, 1, 3], [1, 2, 2], "ascend without repeats"),
    ],
)
def test_check_names_the_row(row_ptr: list[int], col: list[int], says: str) -> None:
    table = {"row_ptr": torch.tensor(row_ptr), "col": torch.tensor(col, dtype=torch.int32)}
    lists = BlockLists(**(valid() | table))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=says):
        lists.check()


def test_from_mask_refuses_empty_rows_and_wrong_sizes() -> None:
    with pytest.raises(ValueError, match="empty row"):
        BlockLists.from_mask(torch.zeros(1, 1, 2, 3, dtype=torch.bool), 20, 25, 10, 10)
    with pytest.raises(ValueError, match=r"\[B, H, 2, 3\]"):
        BlockLists.from_mask(torch.ones(1, 1, 2, 2, dtype=torch.bool), 20, 25, 10, 10)
