"""DistributedDataParallel, fully_shard, FullyShardedDataParallel and DataParallel around patched models."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DataParallel

from hess_plugin import PatchError, patch
from hess_plugin.demo.model import TinyVGGT
from hess_plugin.interception import is_patched

WORKER = Path(__file__).with_name("parallel_worker.py")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_patched_models_run_in_several_processes_whatever_wraps_them(tmp_path: Path, processes: int) -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch was built without gloo")
    command = [sys.executable, str(WORKER)]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(processes), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert [process.returncode for process in running] == [0] * processes, "\n".join(said)
    assert all(text.endswith("all well\n") for text in said)


def test_data_parallel_on_one_device_runs_the_patched_model_and_its_replicas_are_refused(
    make_model: Callable[..., TinyVGGT], images: Callable[..., Tensor], small_blocks: dict[str, Any]
) -> None:
    model, x = make_model(), images()
    wrapped = DataParallel(model, device_ids=[])
    with patch(wrapped, **small_blocks) as handle, torch.no_grad():
        assert is_patched(model) and torch.equal(wrapped(x)["depth"], model(x)["depth"])
        assert handle.report().sites[0].calls == 2
        replica = model.aggregator._replicate_for_data_parallel()  # what a second device would run
        with pytest.raises(PatchError, match=r"nn\.DataParallel.*use DistributedDataParallel, one process a device"):
            replica(x[None])
    assert not is_patched(model)
