"""What every test of a patch leaves behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _no_mode_left() -> Iterator[None]:
    yield
    assert len(torch.overrides._get_current_function_mode_stack()) == 0
