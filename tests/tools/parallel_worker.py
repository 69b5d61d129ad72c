"""Run by test_parallel.py in every process: patches before and after wrapping, exits 1 where something differs."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from hess_plugin import PatchError, Profile, ProfileError, patch
from hess_plugin.demo.layers import Block
from hess_plugin.demo.model import TinyVGGT, TinyVGGTConfig
from hess_plugin.plugins import resolve_adapter
from hess_plugin.profiles import weights_fingerprint
from hess_plugin.scoring import ERROR_NAMES
from hess_plugin.sites import PROJECTIONS

BLOCKS: dict[str, Any] = {"sparsity": 0.5, "block_q": 8, "block_k": 8}


def model() -> TinyVGGT:
    torch.manual_seed(0)
    return TinyVGGT(TinyVGGTConfig(dim=32, num_heads=4, depth=2, stem=16, camera_depth=1)).eval()


def outputs(runs: nn.Module) -> Tensor:
    """What this process predicts of images of its own."""
    images = torch.rand(3, 3, 60, 60, generator=torch.Generator().manual_seed(dist.get_rank()))
    with torch.no_grad():
        return runs(images)["depth"]


def data_parallel(inside: nn.Module) -> nn.Module:
    return DistributedDataParallel(inside)


def sharded(inside: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in (module for module in list(inside.modules()) if isinstance(module, Block)):
        fully_shard(block, mesh=mesh)
    return fully_shard(inside, mesh=mesh)


def sharded_first_version(inside: nn.Module) -> nn.Module:
    policy = ModuleWrapPolicy({Block})
    return FullyShardedDataParallel(inside, auto_wrap_policy=policy, device_id=torch.device("cpu"))


def check(wrap: Callable[[nn.Module], nn.Module], before: bool, plain: Tensor, wanted: Tensor) -> None:
    """Patch before or after wrapping: run, step back through it, undo, run again."""
    inside = model()
    handle = patch(inside, **BLOCKS) if before else None
    runs = wrap(inside)
    handle = handle or patch(runs, **BLOCKS)
    assert torch.equal(outputs(runs), wanted), "patched, it differs from the unwrapped patched model"
    runs(torch.rand(2, 3, 60, 60))["depth"].sum().backward()
    assert {site.calls for site in handle.report().sites} == {2}
    handle.remove()
    assert torch.equal(outputs(runs), plain), "after remove() it differs from the unpatched model"


def main() -> None:
    warnings.simplefilter("ignore")  # these wrappers warn of each other
    torch.set_num_threads(1)
    rank, size, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    unwrapped = model()
    plain = outputs(unwrapped)
    sites = resolve_adapter(unwrapped).sites(unwrapped)
    traces = {f"{e}.{p}": torch.rand(1, 2, 4).double() for e in ERROR_NAMES for p in PROJECTIONS}
    names = tuple(site.name for site in sites)
    profile = Profile("vggt", names, 4, ("one",), traces, 0.5, weights_fingerprint(sites))
    with patch(unwrapped, **BLOCKS):
        wanted = outputs(unwrapped)
    assert not torch.equal(plain, wanted)
    for wrap in (data_parallel, sharded):
        for before in (True, False):
            check(wrap, before, plain, wanted)
    check(sharded_first_version, True, plain, wanted)
    try:
        patch(sharded_first_version(model()), **BLOCKS)
    except PatchError as error:
        assert "patch it before it is wrapped" in str(error), error
    else:
        raise AssertionError("a model inside FullyShardedDataParallel was patched")
    pieces = sharded(model())
    try:
        patch(pieces, profile=profile, **BLOCKS)
    except ProfileError as error:
        assert "sharded and cannot be compared" in str(error) and "strict=False" in str(error), error
    else:
        raise AssertionError("sharded weights were compared with a profile's")
    with patch(pieces, profile=profile, strict=False, **BLOCKS):
        outputs(pieces)
    dist.barrier()
    dist.destroy_process_group()
    print("all well")


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # threads of the process group may outlive the interpreter's own end
