"""Block lists against the table they stand for."""

from __future__ import annotations

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
