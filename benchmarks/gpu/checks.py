"""Section "check": every backend against float64, outputs poisoned beforehand, run twice, gradients of the small."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hess_plugin_cuda import BlockLists, block_count, block_sparse_attention, reference_attention
from hess_plugin_cuda.backends import get_backend

from .exact import Worst, attend, row_keys, row_queries
from .options import BLOCK_K, BLOCK_Q, WIDTH, Options
from .problems import Size, make_lists, make_tokens
from .sheet import Sheet

_TOLD = 300  # characters of an error's message


@dataclass(frozen=True)
class Case:
    """One small problem.

    Attributes:
        name: what is special about it.
        patches: patch tokens of queries and keys.
        special: special tokens.
        kept: share of blocks; 0 is one block a row.
        batch: items.
        heads: heads.
        dtype: of q, k and v.
        strided: heads lie side by side in memory, as a projection leaves them.
    """

    name: str
    patches: int
    special: int
    kept: float = 0.4
    batch: int = 1
    heads: int = 3
    dtype: torch.dtype = torch.bfloat16
    strided: bool = False


CASES = (
    Case("ragged tail, special tokens, two items", 1369, 13, batch=2),
    Case("float16", 1369, 13, dtype=torch.float16),
    Case("heads side by side", 1000, 5, strided=True),
    Case("one block a row", 1153, 0, kept=0.0),
    Case("one block a row, special tokens", 1153, 70, kept=0.0),
    Case("whole blocks only", 1024, 128, dtype=torch.float16),
    Case("one query block, fewer keys than a block", 37, 5, kept=1.0, batch=2),
    Case("everything kept", 700, 150, kept=1.0),
)
QUICK = (CASES[6], Case("ragged tail, special tokens, two items", 200, 7, batch=2, heads=2))


def check_backend(name: str, options: Options, sheet: Sheet) -> None:
    """Check one backend on small problems of every shape, and on sampled rows of large ones."""
    for case in QUICK if options.quick else CASES:
        refusal = options.refusal(name, case.dtype)
        if refusal is not None:
            sheet.row("correctness", backend=name, problem=case.name, result=f"refused: {refusal}")
            continue
        started = time.monotonic()
        q, k, v, lists = make_case(case, options.device)
        _report(name, case.name, (q, k, v), lists, range(lists.rows), sheet, started)
        if case is CASES[0] or options.quick:
            _check_gradients(name, case, options, sheet)
    if options.refusal(name) is not None:
        return
    for views, heads in ((2, 2),) if options.quick else ((10, 16), (100, 16), (300, 8)):
        if options.left < 15 or (name == "gather" and views > 10 and not options.quick):
            sheet.note(f"{name} was not checked at {views} views.")
            continue
        started = time.monotonic()
        size = Size.of(options, views, heads)
        q, k, v = make_tokens(size, options.device, options.half)
        lists = make_lists(size, 0.1, options.device, spread="ragged")
        rows = torch.randint(lists.rows, (32,), generator=torch.Generator().manual_seed(views)).tolist()
        ends = [head * lists.query_blocks - 1 for head in range(1, heads + 1)]  # the ragged rows
        _report(name, f"{views} views, {heads} heads", (q, k, v), lists, [*rows, *ends], sheet, started)


def make_case(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor, BlockLists]:
    """Random tokens and lists of a small problem, the same on every device."""
    generator = torch.Generator().manual_seed(case.patches)
    tokens = case.patches + case.special
    shape = (3, case.batch, tokens, case.heads, WIDTH) if case.strided else (3, case.batch, case.heads, tokens, WIDTH)
    q, k, v = torch.randn(shape, generator=generator).to(case.dtype).to(device)
    if case.strided:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grid = (case.batch, case.heads, block_count(case.patches, BLOCK_Q), block_count(case.patches, BLOCK_K))
    mask = torch.rand(grid, generator=generator) < case.kept
    one = torch.randint(grid[3], (*grid[:3], 1), generator=generator)
    mask.scatter_(3, one, True)
    lists = BlockLists.from_mask(mask, case.patches, case.patches, BLOCK_Q, BLOCK_K).to(device)
    return q, k, v, lists


def _report(
    name: str,
    problem: str,
    tokens: tuple[Tensor, Tensor, Tensor],
    lists: BlockLists,
    rows: range | list[int],
    sheet: Sheet,
    started: float,
) -> None:
    """Run a backend twice and compare the rows, and the special queries, with float64."""
    q, k, v = tokens
    scale = q.shape[-1] ** -0.5
    worst, outputs = Worst(), []
    for _ in range(2):
        _poison(q)
        out, lse = get_backend(name).forward(q, k, v, lists, scale, None)
        outputs.append((out, lse))
        for given, given_lse, expected in _compared(out, lse, tokens, lists, rows, scale):
            worst.add(given, given_lse, expected)
    same = torch.equal(outputs[0][0], outputs[1][0])
    right = worst.right(v.dtype)
    sheet.row(
        "correctness",
        backend=name,
        problem=problem,
        dtype=str(v.dtype).removeprefix("torch."),
        rows=worst.rows // 2,
        error=worst.error / worst.size,
        plain=worst.plain / worst.size,
        lse=None if outputs[0][1] is None else worst.lse,
        repeatable=same,
        result="right" if right else "WRONG",
        seconds=time.monotonic() - started,
    )
    if not right:
        sheet.fail(f"{name} is wrong on {problem}: error {worst.error:.2g}, of plain torch {worst.plain:.2g}.")
    if not same:
        sheet.fail(f"{name} gives another result in a second run on {problem}.")


def _poison(like: Tensor) -> None:
    """Leave NaN in the memory that the next output is likely to get."""
    shapes = (like.shape, like.shape[:3])
    left = [torch.full(shape, float("nan"), dtype=like.dtype, device=like.device) for shape in shapes]
    left += [torch.full(shapes[1], float("nan"), dtype=torch.float32, device=like.device)]
    del left


def _compared(
    out: Tensor,
    lse: Tensor | None,
    tokens: tuple[Tensor, Tensor, Tensor],
    lists: BlockLists,
    rows: range | list[int],
    scale: float,
) -> Iterator[tuple[Tensor, Tensor | None, tuple[Tensor, Tensor, Tensor]]]:
    q, k, v = tokens
    for row in rows:
        item, head = divmod(row // lists.query_blocks, lists.heads)
        queries, keys = row_queries(lists, row), row_keys(lists, row, k.shape[2])
        expected = attend(q[item, head, queries], k[item, head, keys], v[item, head, keys], scale)
        yield out[item, head, queries], None if lse is None else lse[item, head, queries], expected
    special = slice(lists.query_tokens, lists.query_tokens + 64)
    if q.shape[2] > lists.query_tokens:
        for item, head in {(0, 0), (lists.batch - 1, lists.heads - 1)}:
            expected = attend(q[item, head, special], k[item, head], v[item, head], scale)
            yield out[item, head, special], None if lse is None else lse[item, head, special], expected


def _check_gradients(name: str, case: Case, options: Options, sheet: Sheet) -> None:
    """Compare the gradients of the public function with those of the reference in float64."""
    q, k, v, lists = make_case(case, options.device)
    flow = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q.dtype).to(options.device)
    ways = {
        "exact": (torch.float64, lambda *x: reference_attention(*x, lists, WIDTH**-0.5, dtype=torch.float64)),
        "plain": (q.dtype, lambda *x: reference_attention(*x, lists, WIDTH**-0.5)),
        "given": (q.dtype, lambda *x: block_sparse_attention(*x, lists, backend=name)),
    }
    found = {}
    for way, (dtype, call) in ways.items():
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        found[way] = torch.autograd.grad(call(*leaves), leaves, flow.to(dtype))
    for index, letter in enumerate("qkv"):
        exact = found["exact"][index]
        size = float(exact.abs().max())
        error, plain = (float((found[way][index].double() - exact).abs().max()) for way in ("given", "plain"))
        # The reference keeps float32 inside; a kernel rounds what it multiplies.
        right = error <= 3 * plain + 4 * torch.finfo(q.dtype).eps * size
        result = "right" if right else "WRONG"
        sheet.row("gradients", backend=name, problem=case.name, of=letter, error=error / size, plain=plain / size,
                  result=result)  # fmt: skip
        if not right:
            sheet.fail(
                f"the gradient of {letter} by {name} is wrong: error {error / size:.2g}, plain {plain / size:.2g}."
            )


def told(error: BaseException) -> str:
    """An error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:_TOLD]}"
