"""Swaps of blocks in Triton on numbers that float32 holds exactly: to the bit what a loop over blocks does."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hess_plugin_cuda.triton_selection import restoration, shapes, swaps
from hess_plugin_cuda.triton_selection.launch import launch
from hess_plugin_cuda.triton_selection.restoration import DROP, RESTORE, START, Chunk
from hess_plugin_cuda.triton_selection.tokens import Attended, Tokens

WIDTH = 4
# What is past the last column is never written, and may be anything.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero):RuntimeWarning")

KEPT, DROPPED = -128, 0  # states: only the sign is looked at


def chunk_of(keys: Tensor, counts: Tensor, device: torch.device) -> Chunk:
    """Rows `[1, r, T_k]` of keys, of one head whose values are all 0."""
    _, rows, columns = keys.shape
    zeros = torch.zeros(1, rows, device=device)
    v = torch.zeros(1, columns, WIDTH, device=device)
    out = torch.zeros(1, rows, WIDTH, device=device)
    tokens = Tokens(out, v, v, v[:, :0], v[:, :0], v[0, :, 0], torch.ones(rows, device=device), 1, 1)
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    col = torch.full((int(starts[-1]) + 1,), -7, dtype=torch.int32, device=device)
    attended = Attended(zeros, zeros, out, out, zeros)
    gram = tokens.products()
    chunk = Chunk(tokens, attended, gram, counts[None].to(device), starts[None, :-1].contiguous().to(device), col)
    chunk.probabilities.zero_()
    chunk.keys.fill_(-1)  # past the last column: below every key
    chunk.keys[..., :columns] = keys.to(device)
    return chunk


def least(keys: list[int], among: list[bool], n: int) -> list[int]:
    """Columns of the n least keys of those that can be chosen, ties to the lower column."""
    return sorted(sorted((key, j) for j, key in enumerate(keys) if among[j])[:n][i][1] for i in range(n))


def check_choice(keys: Tensor, kept: Tensor, counts: Tensor, turn: int, device: torch.device) -> None:
    """The columns that each step lists and turns, of rows `[r, T_k]`."""
    columns = keys.shape[1]
    for step, among in ((START, torch.ones_like(kept)), (RESTORE, ~kept), (DROP, kept)):
        chunk = chunk_of(keys[None], counts, device)
        chunk.states[..., :columns] = torch.where(kept, KEPT, DROPPED).to(torch.int8).to(device)
        for x in (chunk.residual, chunk.kept, chunk.drift):
            x.zero_()
        chunk.choose(step, turn, True)
        col, states = chunk.col.cpu(), chunk.states[0, :, :columns].cpu().tolist()
        assert int(col[-1]) == -7
        for row, start in enumerate(chunk.starts[0].tolist()):
            number = int(counts[row]) if step == START else moved(int(counts[row]), columns, turn)
            number = min(number, int(among[row].sum()))
            wanted = least(keys[row].tolist(), among[row].tolist(), number)
            assert col[start : start + number].tolist() == wanted
            old = [KEPT if k else DROPPED for k in kept[row].tolist()]
            if step == START:
                assert states[row] == [-127 if j in wanted else 0 for j in range(columns)]
            else:
                turned = [(state + 256 if state < 0 else state) ^ (0x80 | (2 << turn)) for state in old]
                turned = [state - 256 if state > 127 else state for state in turned]
                assert states[row] == [turned[j] if j in wanted else old[j] for j in range(columns)]


def moved(count: int, columns: int, turn: int) -> int:
    """Blocks that a round swaps; Python rounds half to even as well."""
    return min(max(1, round(Fraction(count, 2 ** (turn + 2)))), count, columns - count)


def rows_of(kinds: int, columns: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys of so many kinds, which blocks are kept, and their numbers: enough for every swap."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(0, kinds, (4, columns), generator=generator, dtype=torch.int32)
    keys[0] += 0x7F800000 - kinds  # the largest keys that drifts have
    keys[1] = torch.rand(columns, generator=generator).view(torch.int32)
    kept = torch.rand(4, columns, generator=generator) < torch.tensor([0.1, 0.3, 0.6, 0.9])[:, None]
    kept[:, 0], kept[:, -1] = True, columns == 1
    return keys, kept, kept.sum(-1)


@pytest.mark.parametrize(("columns", "kinds"), [(1, 3), (40, 2), (70, 1000), (150, 5), (300, 2**30)])
def test_choices(columns: int, kinds: int, device: torch.device) -> None:
    keys, kept, counts = rows_of(kinds, columns, columns)
    check_choice(keys, kept, counts, columns % 3, device)


def test_choices_in_pieces(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "LONGEST_ROW", 16)
    monkeypatch.setattr(shapes, "_PIECE", 64)
    assert shapes.swap_shape(150) == (64, 0, False, 1)
    keys, kept, counts = rows_of(4, 150, 0)
    check_choice(keys, kept, counts, 0, device)


@given(columns=st.integers(1, 2**15 + 9))
def test_shapes_hold_every_row(columns: int) -> None:
    shape = shapes.swap_shape(columns)
    sizes = [size for size in (shape.size, shape.rest) if size]
    assert all(size & (size - 1) == 0 for size in (*sizes, *shape.constants.values()) if size)
    assert not shape.whole or columns <= sum(sizes) <= max(96, columns * 3 // 2)
    assert shape.whole == (columns <= shapes.LONGEST_ROW)


@given(keys=st.lists(st.integers(0, 5), min_size=6, max_size=6), kept=st.lists(st.booleans(), min_size=6, max_size=6))
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_keys(keys: list[int], kept: list[bool], device: torch.device) -> None:
    marks = torch.tensor([kept])
    marks[0, 0], marks[0, 5] = True, False
    check_choice(torch.tensor([keys], dtype=torch.int32), marks, marks.sum(-1), 0, device)


@pytest.mark.parametrize("turn", [0, 2, 5])
def test_how_many_are_swapped(turn: int, device: torch.device) -> None:
    """Of counts of 23 columns, with halves among their parts, by what a round turns."""
    counts = torch.tensor([1, 2, 3, 6, 8, 10, 14, 18, 22, 23])
    kept = torch.arange(23) < counts[:, None]
    chunk = chunk_of(torch.arange(23, dtype=torch.int32).expand(1, 10, 23), counts, device)
    chunk.states[..., :23] = torch.where(kept, KEPT, DROPPED).to(torch.int8).to(device)
    chunk.residual.zero_()
    chunk.kept.zero_()
    chunk.choose(RESTORE, turn, True)
    turned = (chunk.states[0, :, :23].cpu() & (2 << turn)) != 0
    assert turned.sum(-1).tolist() == [moved(int(count), 23, turn) for count in counts]


def dyadic(rows: int, columns: int, parts: tuple[int, int], special: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities in 1/16 that sum to 1, `[rows * A, T_k * F + S]`, values -1, 0 and 1, and counts."""
    generator = torch.Generator().manual_seed(seed)
    n = columns * parts[1] + special
    p = torch.stack(
        [torch.bincount(torch.randint(0, n, (16,), generator=generator), minlength=n) for _ in range(rows * parts[0])]
    )
    u = torch.randint(-1, 2, (n, WIDTH), generator=generator)
    return p / 16, u.float(), torch.randint(1, columns + 1, (rows,), generator=generator)


def by_loops(
    p: Tensor, u: Tensor, counts: Tensor, parts: tuple[int, int], columns: int, rounds: int
) -> list[list[int]]:
    """Restoration in exact fractions, except for the last division, which is float32's."""
    found = []
    f = parts[1]
    patches = columns * f
    for row, count in enumerate(counts.tolist()):
        sub = [[Fraction(x) for x in line] for line in p[row * parts[0] : (row + 1) * parts[0]].tolist()]
        values = [[Fraction(x) for x in line] for line in u.tolist()]

        def drift(kept: set[int], sub: list = sub, values: list = values) -> float:
            total = torch.tensor(0.0)
            for line in sub:
                v = [sum(x * y[i] for x, y in zip(line, values, strict=True)) for i in range(WIDTH)]
                ways = [s for s in range(len(line)) if s >= patches or s // f in kept]
                share = sum(line[s] for s in ways)
                g = [sum(line[s] * values[s][i] for s in ways) - share * v[i] for i in range(WIDTH)]
                length = torch.tensor(float(sum(x * x for x in g)))
                least_share = torch.tensor(float(share)).clamp(min=1e-4)
                total = total + length / (least_share * least_share)
            return float(total)

        every = set(range(columns))
        cost = {j: -drift(every - {j}) for j in every}
        kept = best = set(sorted(every, key=lambda j: (cost[j], j))[:count])
        reached = drift(kept)
        for turn in range(rounds):
            number = moved(count, columns, turn)
            cost = {j: drift(kept | {j}) for j in every - kept}
            kept = kept | set(sorted(cost, key=lambda j: (cost[j], j))[:number])
            cost = {j: drift(kept - {j}) for j in kept}
            kept = kept - set(sorted(cost, key=lambda j: (cost[j], j))[:number])
            if drift(kept) < reached:
                best, reached = kept, drift(kept)
        found.append(sorted(best))
    return found


@pytest.mark.parametrize(("parts", "special"), [((1, 1), 0), ((1, 1), 3), ((2, 1), 1), ((1, 2), 2), ((2, 4), 0)])
def test_exact_restoration(parts: tuple[int, int], special: int, device: torch.device) -> None:
    """After the softmax every number but the quotients is exact: the same blocks, ties included."""
    rows, columns, rounds = 3, 18, 2
    p, u, counts = dyadic(rows, columns, parts, special, 10 * parts[0] + parts[1])
    patches = columns * parts[1]
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    col = torch.full((int(starts[-1]) + 1,), -7, dtype=torch.int32)
    out, special_out = p @ u, p[:, patches:] @ u[patches:]
    ones = torch.ones(rows * parts[0])
    tensors = [
        x.contiguous().to(device)
        for x in (out[None], u[None, :patches], u[None, :0], torch.zeros(patches), ones, special_out[None])
    ]
    out, v, none, bias, ones, special_out = tensors
    tokens = Tokens(out, v, v, none, none, bias, ones, *parts)
    attended = Attended(ones[None], ones[None], out, special_out, p[None, :, patches:].sum(-1).to(device))
    chunk = Chunk(
        tokens, attended, tokens.products(), counts[None].to(device), starts[None, :-1].contiguous().to(device),
        col.to(device),
    )  # fmt: skip
    blocks = p[:, :patches].unflatten(-1, (columns, parts[1]))
    toward = (blocks[..., None] * u[:patches].unflatten(0, (columns, parts[1]))).sum(-2)
    d = blocks.sum(-1, keepdim=True) * (p @ u)[:, None] - toward
    squares = d.square().sum(-1)
    chunk.probabilities[0, :, :patches] = p[:, :patches].to(device)
    chunk.squares[0, :, :columns] = squares.to(device)
    alone = (squares / (1 - blocks.sum(-1)).clamp(min=1e-4).square()).unflatten(0, (rows, parts[0])).sum(1)
    chunk.keys[0, :, :columns] = (0x7F800000 - alone.view(torch.int32)).to(device)
    chunk.choose(START, 0, True)
    chunk.swap(rounds)
    lists = [part.tolist() for part in chunk.col[:-1].cpu().split(counts.tolist())]
    assert lists == by_loops(p, u, counts, parts, columns, rounds)


def test_the_best_state_is_listed(device: torch.device) -> None:
    """Every way in which three rounds may turn a block, and each of the states that may be the best."""
    states = torch.arange(16, dtype=torch.int8).repeat(4, 1)
    best = torch.arange(4, dtype=torch.int32)
    wanted = [[s for s in range(16) if bin(s & ((2 << b) - 1)).count("1") % 2] for b in range(4)]
    starts = torch.arange(4) * 8
    col = torch.full((33,), -7, dtype=torch.int32, device=device)
    launch(
        swaps.list_kernel, (4, 1), device, states.to(device), best.to(device), starts.to(device), col, 16, 16,
        TILE=16, num_warps=1,
    )  # fmt: skip
    assert col.cpu().tolist() == [*[j for row in wanted for j in row], -7]


def test_what_a_chunk_takes() -> None:
    q = torch.zeros(1, 4 * 2, 4)
    tokens = Tokens(q, q[:, :1].expand(1, 40, 4), q, q, q, q, q, 4, 2)
    assert Chunk.row_bytes(tokens) == 32 * (4 + 1) + 4 * 4 * (32 + 48)
    assert restoration.SCRATCH_BYTES // Chunk.row_bytes(tokens) > 1
