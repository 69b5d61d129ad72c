"""Where the rows of a head lie in a weight."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hess_plugin.sites import Projection, Site


@given(
    heads=st.integers(1, 4),
    width=st.integers(1, 5),
    start=st.integers(0, 4),
    gap=st.integers(0, 7),
    after=st.integers(0, 3),
    inputs=st.integers(0, 3),
)
def test_rows_of_every_head_are_where_start_and_stride_say(
    heads: int, width: int, start: int, gap: int, after: int, inputs: int
) -> None:
    """Against every row looked up by itself; a bias (no inputs) as well, and in place."""
    stride = width + gap
    size = start + (heads - 1) * stride + width + after
    weight = torch.arange(float(size * max(inputs, 1))).reshape((size, inputs) if inputs else (size,))
    projection = Projection("qkv.weight", start, stride if gap else None)
    site = Site("attn", nn.Identity(), heads, width, "", {"q": projection})
    rows = site.head_rows(weight, "q")
    wanted = torch.stack([torch.stack([weight[start + h * stride + r] for r in range(width)]) for h in range(heads)])
    assert torch.equal(rows, wanted)
    rows[0] = -1.0
    assert bool((weight[start : start + width] == -1).all())  # a view
