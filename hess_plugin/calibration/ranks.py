"""One process among several that share a calibration: what they tell each other, and how they stop together.

A few kilobytes a scene travel between them, so it is always gloo that carries them, also between GPUs and also where
the caller's own process group is NCCL: gloo notices at once that a process has died, works in processes that have no
GPU of their own, and keeps clear of the caller's collectives. Only bytes travel; nothing is pickled.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from hess_plugin.exceptions import CalibrationError, HessError

from .launch import launch

_MEETING = datetime.timedelta(minutes=5)
# Ranks wait for the slowest scene of a round, which on a CPU may take hours; a rank that dies is noticed at once.
_PATIENCE = datetime.timedelta(days=1)
_OK, _FAILED = b"+", b"-"


class RankStopped(CalibrationError):
    """Another rank failed, and said why."""


class RankLost(CalibrationError):
    """Another rank is gone without a word."""


class Ranks:
    """This process among those that share the scenes; alone by default.

    All of them take the same steps: each `exchange` of one rank meets the same `exchange` of every other.

    Attributes:
        rank: number of this process; 0 writes the files and speaks for all.
        size: how many there are.
        stopped: whether all stopped on an error that every one of them knows of.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        """Take a gloo process group; `of_all` and `launched` make one."""
        self.rank, self.size, self.stopped = rank, size, False
        self._group, self._lost, self._depth, self._hint = group, False, 0, ""

    @classmethod
    @contextlib.contextmanager
    def of_all(cls) -> Iterator[Ranks]:
        """Share a calibration among all processes of `torch.distributed`'s default group; every one of them calls this.

        The default group may be of any backend; it is left alone.

        Raises:
            HessError: there is no default group, or a process cannot be reached.
        """
        import torch.distributed as dist

        if not dist.is_available() or not dist.is_initialized():
            raise HessError("torch.distributed has no process group yet; call init_process_group first.")
        if dist.get_world_size() == 1:
            yield cls()
            return
        try:
            group = dist.new_group(timeout=_PATIENCE, backend="gloo")
        except RuntimeError as error:
            raise _not_connected(dist.get_world_size(), error) from error
        ranks = cls(dist.get_rank(), dist.get_world_size(), group)
        del group  # the last reference closes the connections
        try:
            yield ranks
        finally:
            ranks._close()

    @contextlib.contextmanager
    def together(self, hint: str = "") -> Iterator[None]:
        """Do something that all ranks get through or none.

        Whatever stops one rank inside reaches the others at their next `exchange`, at the latest at the end. May be
        nested.

        Args:
            hint: what to do next, for those that are stopped by another.

        Raises:
            RankStopped: another rank failed; the one that failed raises its own error.
            RankLost: another rank is gone.
        """
        outer, self._hint = self._hint, hint or self._hint
        if self._depth == 0:
            self.stopped = False
        self._depth += 1
        try:
            yield
            self.exchange(b"")  # another rank may still be about to fail
        except BaseException as error:
            if not self.stopped and not self._lost:
                with contextlib.suppress(RankLost):  # it could not be told; the error is still the one that matters
                    self._gather(_FAILED + _reason(error).encode(errors="replace"))
                    self.stopped = True
            raise
        finally:
            self._depth -= 1
            self._hint = outer

    def exchange(self, payload: bytes) -> list[bytes]:
        """Give every rank the payloads of all, in the order of ranks; to be called inside `together`.

        Raises:
            RankStopped: another rank failed before it came here.
            RankLost: another rank is gone.
        """
        messages = self._gather(_OK + payload)
        for rank, message in enumerate(messages):
            if message.startswith(_FAILED):
                self.stopped = True
                raise RankStopped(f"rank {rank} stopped: {self._sentence(message[1:].decode())}")
        return [message[1:] for message in messages]

    def agree(self, values: Mapping[str, Any]) -> None:
        """Check that all ranks were given the same values (JSON types); to be called inside `together`.

        Raises:
            CalibrationError: in every rank, naming the first difference.
        """
        first, *others = (json.loads(told) for told in self.exchange(json.dumps(dict(values)).encode()))
        for rank, other in enumerate(others, 1):
            for name in sorted(first | other):
                if first.get(name) != other.get(name):
                    raise CalibrationError(
                        f"rank {rank} has {name} = {other.get(name)!r}, rank 0 has {first.get(name)!r}; give every "
                        "rank the same model, scenes and options."
                    )

    def _sentence(self, reason: str) -> str:
        return f"{reason.rstrip('.')}; {self._hint}." if self._hint else f"{reason.rstrip('.')}."

    def _gather(self, message: bytes) -> list[bytes]:
        """Exchange messages of any length: their lengths first, then all at the length of the longest."""
        if self.size == 1:
            return [message]
        if self._lost:
            raise RankLost(self._sentence("the connection to the other ranks is closed"))
        try:
            lengths = [int.from_bytes(told, "little") for told in self._all_gather(len(message).to_bytes(8, "little"))]
            padded = self._all_gather(message.ljust(max(lengths), b"\0"))
        except RuntimeError as error:
            self._lost = True
            broken = f"the connection to another rank broke off ({_first_words(error)}), it was killed or cut off"
            raise RankLost(self._sentence(broken)) from error
        except BaseException:
            self._lost = True  # interrupted between the two: out of step with the others
            raise
        return [told[:length] for told, length in zip(padded, lengths, strict=True)]

    def _all_gather(self, message: bytes) -> list[bytes]:
        import torch
        import torch.distributed as dist

        own = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        told = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(told, own, group=self._group)
        return [tensor.numpy().tobytes() for tensor in told]

    def _close(self) -> None:
        """Close the connections: ranks that still wait for this one stop."""
        import torch.distributed as dist

        dist.destroy_process_group(self._group)
        self._group, self._lost = None, True


@contextlib.contextmanager
def launched() -> Iterator[Ranks]:
    """This process among those that torchrun started with it; alone, and without torch.distributed, if there are none.

    Raises:
        HessError: the environment is incomplete, or the other processes do not come within five minutes.
    """
    found = launch()
    if found.size == 1:
        yield Ranks()
        return
    import torch.distributed as dist

    try:
        dist.init_process_group("gloo", timeout=_MEETING)
    except RuntimeError as error:
        raise _not_connected(found.size, error) from error
    try:
        with Ranks.of_all() as ranks:
            yield ranks
    finally:
        dist.destroy_process_group()


def _not_connected(size: int, error: RuntimeError) -> HessError:
    address = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    return HessError(
        f"the {size} processes could not all be connected at {address} ({_first_words(error)}); check that all were "
        "started and reach each other (GLOO_SOCKET_IFNAME names the network interface), or unset WORLD_SIZE to go "
        "on in one."
    )


def _reason(error: BaseException) -> str:
    """Say in one line why a rank stopped."""
    text = " ".join(str(error).split())
    if isinstance(error, HessError):
        return text
    if isinstance(error, KeyboardInterrupt):
        return text or "interrupted"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _first_words(error: RuntimeError) -> str:
    """The message of gloo without the place in its source and its advice."""
    return str(error).partition("\n")[0].rpartition("] ")[2].partition(". ")[0].strip() or type(error).__name__
