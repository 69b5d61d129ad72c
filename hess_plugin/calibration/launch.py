"""What torchrun, or another launcher, tells a process about its place among others; read without importing torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from hess_plugin.exceptions import HessError


class Launch(NamedTuple):
    """Where this process stands among those that a launcher such as torchrun started.

    Attributes:
        rank: its number among all.
        size: how many there are.
        local_rank: its number on this machine, or None if it was started alone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int | None = None


def launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Read what torchrun says in the environment; a process that it did not start is alone.

    Raises:
        HessError: a variable is not a number, or the address to meet at is missing.
    """
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return Launch()
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        value = environment.get(name, "0")
        if not value.isdecimal():
            raise HessError(f"{name} is {value!r} in the environment, wanted a number as torchrun sets it; unset it.")
        numbers[name] = int(value)
    rank, size = numbers["RANK"], numbers["WORLD_SIZE"]
    if size <= 1:
        return Launch()
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing or rank >= size:
        wrong = f"{missing[0]} is missing" if missing else f"RANK is {rank}"
        raise HessError(
            f"{wrong} in the environment beside WORLD_SIZE {size}; start all {size} processes with torchrun, or unset "
            "WORLD_SIZE to calibrate in one."
        )
    return Launch(rank, size, numbers["LOCAL_RANK"])
