"""No adapter takes a model that it would run wrongly: StreamVGGT looks like VGGT and is causal.

`HESS_TEST_STREAMVGGT` names a checkout (the folder that holds `streamvggt`), unless it is importable.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
from torch import nn

from hess_plugin import UnknownModel, resolve_adapter


@pytest.mark.upstream
def test_streamvggt_is_claimed_by_nobody(
    checkouts_of: Callable[[str, str], list[str]], upstream_of: Callable[[str, str], AbstractContextManager[None]]
) -> None:
    """Its global attention gets a mask, or keys and values of earlier frames, which block lists cannot express."""
    found = checkouts_of("streamvggt", "HESS_TEST_STREAMVGGT")
    if not found:
        pytest.skip("no upstream code: `streamvggt` is not importable and HESS_TEST_STREAMVGGT names no checkout")
    with upstream_of("streamvggt", found[0]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        aggregator = importlib.import_module("streamvggt.models.aggregator").Aggregator
        model = nn.Module()
        model.aggregator = aggregator(img_size=56, depth=2, embed_dim=64, num_heads=4, patch_embed="conv")
    for part in ("frame_blocks", "global_blocks", "camera_token", "register_token", "patch_start_idx"):
        assert hasattr(model.aggregator, part)  # all that VGGT has
    with pytest.raises(UnknownModel, match="no adapter claims Module"):
        resolve_adapter(model)
