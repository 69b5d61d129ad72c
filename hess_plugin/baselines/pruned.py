"""Running a model without some of its heads: their attention is not computed at all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import pluggy
import torch
from torch import Tensor, nn

from hess_plugin.adapting import Adapter
from hess_plugin.exceptions import PatchError
from hess_plugin.handle import Handle
from hess_plugin.interception import SDPA, is_patched
from hess_plugin.plugins import resolve_adapter
from hess_plugin.report import PatchReport, Tally
from hess_plugin.sites import Site


class PrunedAttention:
    """The attention of one site over its kept heads; the others give zeros."""

    def __init__(self, site: Site, mask: Tensor) -> None:
        self.site = site
        self.tally = Tally(site)
        self._kept = [head for head, value in enumerate(mask.tolist()) if value != 0.0]
        self._scales = [mask[head].item() for head in self._kept]
        self._scaled = any(scale != 1.0 for scale in self._scales)
        self._whole = len(self._kept) == site.num_heads
        self._counts = (mask != 0).long()
        self._tensors: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Answer one ``scaled_dot_product_attention`` call on q, k, v ``[B, H, N, d]``.

        Raises:
            PatchError: the call is masked or grouped, or has another number of heads.
        """
        pairs = query.shape[0] * query.shape[-2] * key.shape[-2]
        started = self.tally.start(query.device)
        if self._whole and not self._scaled:
            # The module's own call, argument for argument: bit for bit what the unpatched model computes.
            output = SDPA(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
            self.tally.dense(pairs, 0)
        else:
            self._check(query, key, value, attn_mask, enable_gqa)
            output = self._attend(query, key, value, dropout_p=dropout_p, is_causal=is_causal, scale=scale)
            self.tally.sparse(self._counts * pairs, pairs, 0)
        self.tally.stop(started, query.device)
        return output

    def _check(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, grouped: bool) -> None:
        heads = [t.shape[1] if t.ndim == 4 else 0 for t in (query, key, value)]
        if mask is not None or grouped or set(heads) != {self.site.num_heads}:
            raise PatchError(
                f"{self.site.name} called attention {'with attn_mask' if mask is not None else 'over'} "
                f"{list(query.shape)}, wanted plain attention of {self.site.num_heads} heads; keep all heads of this "
                "site in the mask."
            )

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        shape = (*query.shape[:-1], value.shape[-1])
        if not self._kept:
            return value.new_zeros(shape, dtype=_output_dtype(value))
        index, scales = self._on(query.device)
        query, key, value = (tensor.index_select(1, index) for tensor in (query, key, value))
        output = SDPA(query, key, value, **options)
        if self._scaled:
            output = output * scales.to(output.dtype)
        return output if self._whole else output.new_zeros(shape).index_copy(1, index, output)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Indices ``[K]`` and masks ``[K, 1, 1]`` of the kept heads; copied to a device once, which waits for it."""
        found = self._tensors.get(device)
        if found is None:
            with torch.inference_mode(False):  # a later training step could not save an inference tensor
                scales = torch.tensor(self._scales, dtype=torch.float64)[:, None, None]
                found = self._tensors[device] = (torch.tensor(self._kept).to(device), scales.to(device))
        return found


def _output_dtype(value: Tensor) -> torch.dtype:
    """Type of what ``scaled_dot_product_attention`` would return, which autocast decides."""
    kind = value.device.type
    if torch.is_autocast_enabled(kind) and value.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return value.dtype


class Pruned(Handle):
    """The handle of one pruned model: a context manager, a report and the undo; made by `prune_heads`."""

    def __init__(self, attentions: Sequence[PrunedAttention], settings: dict[str, Any]) -> None:
        super().__init__()
        self._attentions = attentions
        self._settings = settings

    def report(self) -> PatchReport:
        """Report the share of pruned heads, measured by site and head, and seconds, since `prune_heads`.

        A pruned head drops its share of all query-key pairs, those of special tokens as well, so `sparsity` and
        `sparsity_all_keys` are one number; block sparsity of the same `sparsity` computes special tokens on top.
        """
        sites = tuple(attention.tally.report() for attention in self._attentions)
        return PatchReport(sites, "sdpa", "pruned", dict(self._settings))

    def __repr__(self) -> str:
        state = "active" if self._active else "removed"
        return f"<Pruned: {self._settings['pruned_heads']} of {self._settings['heads']} heads, {state}>"


def prune_heads(
    model: nn.Module,
    mask: Tensor,
    *,
    adapter: str | None = None,
    manager: pluggy.PluginManager | None = None,
) -> Pruned:
    """Run a model's global attention without the heads whose mask is 0, until the handle is removed.

    Works at once and also as a context manager. Where a site's masks are all 1 its own attention call runs, bit for
    bit.

    Args:
        model: a model that an adapter claims, not patched; changed in place.
        mask: ``[L, H]`` real numbers: 0 prunes a head, another value multiplies its output.
        adapter: take this adapter instead of asking which one claims the model.
        manager: plugin manager; a fresh one by default.

    Returns:
        The handle that undoes everything.

    Raises:
        UnknownModel, AmbiguousModel: not exactly one adapter claims the model.
        PatchError: the model is patched already, or the mask does not fit it.
    """
    chosen = resolve_adapter(model, adapter, manager)
    if is_patched(model):
        raise PatchError("this model is patched already; call remove() on its patch (or hess_plugin.unpatch) first.")
    sites = chosen.sites(model)
    return install(chosen, sites, checked_mask(mask, sites))


def checked_mask(mask: Tensor, sites: Sequence[Site]) -> Tensor:
    """Return a mask as float64 ``[L, H]`` on the CPU, apart from the caller's.

    Raises:
        PatchError: it is not that of the sites.
    """
    heads = sorted({site.num_heads for site in sites})
    wanted = f"[{len(sites)}, {' or '.join(map(str, heads))}]"
    given = f"of type {type(mask).__name__}" if not isinstance(mask, Tensor) else f"of shape {list(mask.shape)}"
    if not isinstance(mask, Tensor) or len(heads) != 1 or tuple(mask.shape) != (len(sites), heads[0]):
        raise PatchError(f"a head mask {given} was given, wanted a tensor {wanted}: sites by heads of this model.")
    if mask.is_complex() or not bool(torch.isfinite(mask).all()):
        raise PatchError("the head mask holds values that are not finite real numbers; 0 prunes a head, 1 keeps it.")
    with torch.inference_mode(False):
        return mask.detach().to("cpu", torch.float64, copy=True)


def install(adapter: Adapter, sites: Sequence[Site], mask: Tensor) -> Pruned:
    """Prune the sites of a model by a mask that `checked_mask` returned."""
    attentions = [PrunedAttention(site, row) for site, row in zip(sites, mask, strict=True)]
    settings = {
        "heads": mask.numel(),
        "pruned_heads": int((mask == 0).sum()),
        "scaled_heads": int(((mask != 0) & (mask != 1)).sum()),
    }
    handle = Pruned(attentions, settings)
    # If anything fails half way, the sites replaced so far are put back.
    with contextlib.ExitStack() as undo:
        for site, attention in zip(sites, attentions, strict=True):
            undo.callback(adapter.replace_attention(site, _function(attention)).remove)
        handle._undo = undo.pop_all()
    return handle


def _function(attention: PrunedAttention) -> Callable[..., Tensor]:
    # A plain function: copy.deepcopy of a pruned model copies functions by reference and would walk through an object
    # to the original model.
    def attend(*args: Any, **kwargs: Any) -> Tensor:
        return attention(*args, **kwargs)

    return attend
