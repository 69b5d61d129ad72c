"""Section "check": the call of a patched layer never makes the host wait for the GPU."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch

import hess_plugin
from hess_plugin.attention import SiteAttention
from hess_plugin.demo.model import TinyVGGT, TinyVGGTConfig

from .checks import told
from .options import Options
from .random_profile import random_profile
from .sheet import Sheet

RULES: dict[str, dict[str, Any]] = {
    "sparsity, same share for all heads": {"sparsity": 0.75},
    "sparsity, shares by score": {"sparsity": 0.75, "profile": True},
    "CDF threshold": {"cdf_threshold": 0.9},
}


def check_waiting(options: Options, sheet: Sheet) -> None:
    """Run a patched model of heads 64 wide, with torch's alarm for waiting on inside the attention of its sites."""
    torch.manual_seed(0)
    config = TinyVGGTConfig(dim=128, num_heads=2, depth=1 if options.quick else 2)
    model = TinyVGGT(config).eval().to(options.device)
    images = torch.rand(1, 2 if options.quick else 16, 3, 120, 120, device=options.device)
    profile = random_profile(model)
    backends = ["auto", *(["triton"] if options.refusal("triton") is None and not options.quick else [])]
    for (rule, asked), backend in itertools.product(RULES.items(), backends):
        how = {**asked, "backend": backend} | ({"profile": profile, "strict": False} if "profile" in asked else {})
        if options.quick:  # too few tokens for blocks of the usual size
            how |= {"block_q": 64, "block_k": 64}
        _check_rule(rule, how, model, images, options, sheet)


def _check_rule(
    rule: str, how: dict[str, Any], model: TinyVGGT, images: torch.Tensor, options: Options, sheet: Sheet
) -> None:
    with hess_plugin.patch(model, **how) as handle, torch.inference_mode(), _half(options):
        model(images)  # compiles, makes plans and orders
        model(images)
        before = handle.report()
        try:
            with alarmed(options.device):
                model(images)
            result = "never waits" if options.device.type == "cuda" else "refused: there is no GPU to wait for"
        except RuntimeError as error:
            result = f"WAITS: {told(error)}"
            sheet.fail(f"a patched layer waits for the GPU, with the rule {rule}: {told(error)}")
    sheet.row("waiting", rule=rule, backend=before.backend, sparsity=before.sparsity, result=result)


def _half(options: Options) -> contextlib.AbstractContextManager[None]:
    """The autocast that models run in."""
    return torch.autocast(options.device.type, options.half)


@contextlib.contextmanager
def alarmed(device: torch.device) -> Iterator[None]:
    """Let torch raise where the attention of a site waits for a GPU; what the model does around it may wait."""
    call = SiteAttention.__call__

    def watched(self: SiteAttention, *args: Any, **kwargs: Any) -> Any:
        if device.type != "cuda":
            return call(self, *args, **kwargs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return call(self, *args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    SiteAttention.__call__ = watched  # type: ignore[method-assign]
    try:
        yield
    finally:
        SiteAttention.__call__ = call  # type: ignore[method-assign]
