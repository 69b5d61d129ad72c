"""Sub-blocks of the block map: pooling, and probabilities that are added over the parts of a block."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hess_plugin.sparsity import (
    SELECTORS,
    PooledTokens,
    SparsityError,
    block_map,
    pool,
    pool_values,
    pooled_uniform_counts,
    select,
    uniform_counts,
)

from .restoration_problems import Problem, make, row_of

ALL = slice(None)


def tokens(seed: int, patches: int, special: int = 0, heads: int = 2, batch: int = 1) -> tuple[Tensor, ...]:
    """q, k and v, special tokens last."""
    shape = (3, batch, heads, patches + special, 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(1.5).unbind(0)


@given(
    st.integers(0, 10**6), st.integers(1, 60), st.sampled_from([(8, 8), (8, 4), (6, 2), (4, 1)]),
    st.sampled_from([0, 1, 5]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_sub_blocks_are_averages_and_zeros_where_there_are_no_tokens(
    seed: int, patches: int, sizes: tuple[int, int], special: int
) -> None:
    block, part = sizes
    q, k, v = tokens(seed, patches, special)
    pooled = pool(
        q[:, :, :patches], k[:, :, :patches], block, block, scale=0.5, pool_q=part, pool_k=part,
        special=k[:, :, patches:],
    )  # fmt: skip
    root = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(seed))
    values = pool_values(k, v, patches, block, pool_k=part, root=root)
    assert (pooled.rows, pooled.columns) == (-(-patches // block),) * 2
    assert pooled.parts_q == pooled.parts_k == block // part
    assert (pooled.special_k is None) == (part == block)
    for head in range(2):
        assert pooled.special_k is None or torch.equal(pooled.special_k[head], k[0, head, patches:])
        assert torch.equal(values.special_k[head], k[0, head, patches:])
        near(values.special_v[head], v[0, head, patches:] @ root[head])
        for i in range(pooled.rows * pooled.parts_q):
            some = slice(i * part, min((i + 1) * part, patches))
            empty = some.start >= patches
            for found, x in ((pooled.q, q * 0.5), (pooled.k, k), (values.v, (v[0] @ root)[None])):
                near(found[head, i], torch.zeros(8) if empty else x[0, head, some].mean(0))


def near(given: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5)


PROBLEMS = st.builds(
    make,
    st.integers(0, 10**6),
    heads=st.integers(1, 2),
    query_tokens=st.integers(1, 20),
    key_tokens=st.integers(1, 30),
    pool=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    parts=st.sampled_from([(1, 2), (2, 1), (2, 2), (3, 2)]),
    special=st.sampled_from([0, 1, 5, 17]),
)


@given(PROBLEMS)
@settings(max_examples=40, deadline=None)
def test_scores_are_the_logarithms_of_mean_probabilities(problem: Problem) -> None:
    pooled = problem.pooled
    scores = pooled.scores(ALL, ALL)
    assert scores.shape == (pooled.heads, pooled.rows, pooled.columns)
    for head in range(pooled.heads):
        for row in range(pooled.rows):
            numbers = row_of(problem, head, row)
            for j in range(pooled.columns):
                mass = sum(w * sum(p[j]) for w, p in zip(numbers.weights, numbers.p, strict=True))
                assert float(scores[head, row, j].exp()) == pytest.approx(mass / sum(numbers.weights), rel=1e-9)


@pytest.mark.parametrize("special", [0, 5])
def test_sub_blocks_of_one_token_give_the_attention_itself(special: int) -> None:
    patches = 37
    q, k, _ = tokens(0, patches, special)
    pooled = pool(
        q[:, :, :patches], k[:, :, :patches], 8, 4, pool_q=1, pool_k=1, special=k[:, :, patches:]
    )  # fmt: skip
    attention = (q @ k.mT * 8**-0.5).softmax(-1)[0, :, :patches, :patches]
    columns = torch.stack([part.sum(-1) for part in attention.split(4, -1)], -1)
    wanted = torch.stack([part.mean(1) for part in columns.split(8, 1)], 1)
    torch.testing.assert_close(pooled.scores(ALL, ALL).exp(), wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("entries", [None, 1, 300])
@pytest.mark.parametrize("pooling", [(8, 2), (4, 4), (2, 1)])
def test_counts_and_lists_go_by_the_scores_of_sub_blocks(pooling: tuple[int, int], entries: int | None) -> None:
    patches = 203
    q, k, _ = tokens(1, patches, 5)
    pooled = pool(
        q[:, :, :patches], k[:, :, :patches], 8, 4, pool_q=pooling[0], pool_k=pooling[1], special=k[:, :, patches:],
        chunk_entries=entries,
    )  # fmt: skip
    scores = pooled.scores(ALL, ALL)
    shares = scores.softmax(-1)[None]
    counts = pooled_uniform_counts(pooled, 0.9, 0.5)
    assert torch.equal(counts, uniform_counts(shares, 0.9, 0.5))
    best = shares.sort(-1, descending=True).values.cumsum(-1)
    for amounts in ({"counts": counts}, {"budgets": torch.tensor([[400, 555]])}):
        lists = SELECTORS["mass"](pooled, **amounts).check()
        kept = lists.counts()
        if "budgets" in amounts:
            assert kept.sum(-1).tolist() == [[400, 555]]
            assert kept.amax(-1).sub(kept.amin(-1)).max() <= 1
        else:
            assert torch.equal(kept, counts)
        mass = (shares * lists.to_mask()).sum(-1)
        torch.testing.assert_close(mass, best.gather(-1, kept.unsqueeze(-1) - 1).squeeze(-1))


def test_whole_blocks_named_by_their_size_are_whole_blocks() -> None:
    q, k, _ = tokens(2, 77)
    named = pool(q, k, 8, 4, pool_q=8, pool_k=4, special=k[:, :, :3])
    plain = pool(q, k, 8, 4)
    assert named.parts == 1 and named.special_k is None
    assert torch.equal(named.scores(ALL, ALL), plain.scores(ALL, ALL))
    assert torch.equal(plain.scores(ALL, ALL).softmax(-1), block_map(q, k, 8, 4)[0])


def test_what_is_no_number_has_no_probability() -> None:
    q, k, _ = tokens(3, 32, heads=1)
    k[0, 0, 5], k[0, 0, 9, 2], q[0, 0, 20] = torch.nan, torch.inf, torch.nan
    scores = pool(q, k, 8, 4, pool_q=4, pool_k=2).scores(ALL, ALL)
    assert not scores.isnan().any() and not (scores == torch.inf).any()
    assert torch.isfinite(scores[0, 2]).any()  # the other half of its queries are numbers
    nothing = pool(torch.full_like(q, torch.nan), k, 8, 4, pool_q=4).scores(ALL, ALL)
    assert (nothing == -torch.inf).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"pool_q": 3}, "pool_q must divide block_q, 8 tokens; got 3"),
        ({"pool_k": 0}, "pool_k must divide block_k, 4 tokens; got 0"),
        ({"pool_k": 8}, "pool_k must divide block_k, 4 tokens; got 8"),
        ({"patches": 0}, "q must be floating patch tokens"),
        ({"v": torch.zeros(1, 2, 39, 8)}, r"k and v must hold 30 patches, .* got \[1, 2, 40, 8\] and \[1, 2, 39, 8\]"),
        ({"v": torch.zeros(1, 3, 40, 8)}, r"special must hold keys \[B, H, S, d\] beside those of k"),
    ],
)
def test_refuses(change: dict[str, object], says: str) -> None:
    q, k, v = tokens(0, 30, 10)
    good = {"q": q, "k": k, "v": v, "block_q": 8, "block_k": 4, "patches": 30, "selector": "restore"}
    with pytest.raises(SparsityError, match=says):
        select(**(good | {"budgets": torch.tensor([[4, 9]])} | change))  # type: ignore[arg-type]


def test_refuses_values_of_other_blocks() -> None:
    q, k, v = tokens(0, 30)
    pooled: PooledTokens = pool(q, k, 8, 4)
    budgets = torch.tensor([[4, 9]])
    with pytest.raises(SparsityError, match=r"those of the pooled keys \[2, 8, 8\].* got \[2, 16, 8\]"):
        SELECTORS["drift"](pooled, values=lambda: pool_values(k, v, 30, 4, pool_k=2), budgets=budgets)
