"""Models inside the wrappers of other tools."""

from __future__ import annotations

import sys

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .exceptions import PatchError


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside ``torch.compile``, ``DistributedDataParallel`` and ``DataParallel``, or the model itself.

    Raises:
        PatchError: ``FullyShardedDataParallel`` renamed the modules and flattened the parameters inside.
    """
    if not isinstance(model, nn.Module):
        return model  # refused in words where adapters are asked
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:  # the documented attribute of what torch.compile returns
            model = model.get_submodule("_orig_mod")
        else:
            break
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules()):
        raise PatchError(
            "this model is wrapped in FullyShardedDataParallel, which hides its parameters; patch it before it is "
            "wrapped, or shard it with fully_shard."
        )
    return model
