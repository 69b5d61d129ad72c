"""Patching a model in place and undoing it without a trace."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pluggy
from torch import nn
from torch.utils.hooks import RemovableHandle

from .adapting import Adapter, Replacement
from .attention import SiteAttention
from .block_choice import warn_of_other_blocks
from .exceptions import PatchError
from .following import check_verdict, follow
from .handle import Patch
from .harm_curves import model_curves
from .interception import SDPA, LayoutHook, is_patched, restore, taken
from .memory.lean import make_lean, unmake_lean
from .model_budgets import LayerBudgets, ModelBudgets
from .pickling import is_left_out
from .place import Place
from .plans import Layouts
from .plugins import resolve_adapter
from .profiles import Profile, weights_fingerprint
from .scoring import Scoring, head_scores
from .settings import DENSE_FROM, check_unfit, make_settings
from .sites import Site
from .wrappers import unwrapped


def patch(
    model: nn.Module,
    *,
    profile: Profile | str | Path | None = None,
    sparsity: float | None = None,
    sparse_ratio: float | None = None,
    cdf_threshold: float | None = None,
    allocation: str | None = None,
    preset: str | None = None,
    selector: str | None = None,
    backend: str = "auto",
    block_q: int = 128,
    block_k: int = 64,
    pool_q: int | None = None,
    pool_k: int | None = None,
    block_order: str | None = None,
    minimum: int = 2,
    camera_weight: float | None = None,
    projection: str = "q",
    normalisation: str = "sum",
    rows: str = "all",
    seed: int = 0,
    strict: bool = True,
    verdict: str = "follow",
    dense_below: int | None = None,
    dense_from: float = DENSE_FROM,
    unfit: str = "raise",
    memory: str = "plain",
    adapter: str | None = None,
    manager: pluggy.PluginManager | None = None,
) -> Patch:
    """Make a model's global attention compute only the key blocks that matter, until the patch is removed.

    Works at once and also as a context manager::

        with hess_plugin.patch(model, profile="vggt.hess", sparsity=0.73) as patch:
            predictions = model(images)
        print(patch.report())

    How much is kept: either `sparsity`, the share of patch-block pairs each layer drops, or the rule of
    SparseVGGT, `sparse_ratio` and/or `cdf_threshold`; with none of them, sparsity 0.73. Camera, register and
    other special tokens are always kept, as queries and as keys. Where nothing would be dropped (sparsity 0,
    very short inputs) the module's own attention call runs, bit for bit.

    Args:
        model: a model that an adapter claims; changed in place. It may be
            compiled or wrapped in ``DistributedDataParallel``, before or after.
        profile: a calibrated `Profile` or its file; None divides budgets uniformly.
        sparsity: dropped share of patch-block pairs, 0 (dense) to below 1.
        sparse_ratio: rho of SparseVGGT, the share of key blocks a row may drop.
        cdf_threshold: tau of SparseVGGT, the attention mass a row keeps.
        allocation: how the layer's total is divided among heads: ``hess`` (default with a profile),
            ``uniform`` (default without), ``equal``, or the checks ``reverse``, ``uncapped``, ``random``. ``harm``
            divides one total over the heads of all layers, by harm curves of the profile, and takes a `sparsity`; of
            the options of the score it follows `camera_weight` alone. A patch whose blocks are chosen otherwise than
            those of the curves (by another selector, in other parts or another order) warns of it; blocks of another
            size alone are fine, as curves are in shares of the pairs.
        preset: settings that go well together, where they are not given: ``hess``, the method as published, or
            ``balanced`` and ``accurate``, which choose blocks by ``restore`` (on halves of query blocks in Hilbert
            order; on quarters of all blocks) and divide budgets by ``harm`` if the profile has its curves. They keep
            more of the accuracy and take more time to choose. By default the one that the profile was calibrated for,
            else ``hess``.
        selector: the rule that fills a budget, by pooled queries, keys and values. ``mass`` takes the blocks of most
            attention. ``drift`` takes those whose loss alone would change the output most. ``restore`` starts from
            these and swaps kept blocks for dropped ones as long as the change by all dropped blocks together falls
            (ReSS, arXiv 2609.35593).
        backend: attention code; ``auto`` chooses, a name must work or raises.
        block_q: patch queries in a block.
        block_k: patch keys in a block.
        pool_q: patch queries pooled together when blocks are compared, a divisor of `block_q`; the whole block by
            default. Fewer see differences inside a block and cost more: half a block about doubles the selection.
        pool_k: patch keys pooled together likewise, a divisor of `block_k`.
        block_order: order in which the patches of a frame fill blocks: ``raster``, ``hilbert`` or ``tiles``.
        minimum: key blocks every row keeps at least.
        camera_weight: lambda of the score, 0 to 1; the profile's by default.
        projection: whose traces make the score: ``q`` (the method), the published ablations ``k`` and ``v``, or
            ``output``, the gradient by the heads' attention outputs, if the profile recorded it.
        normalisation: how the errors' traces are made comparable: ``sum`` (the method), ``scene`` (the same for each
            scene before they are averaged), or the ablations ``raw``, ``linear``, ``softmax`` and ``log`` (see
            `hess_plugin.scoring.Scoring`).
        rows: ``all``, or ``patch`` for the gradient through patch tokens' rows alone, if the profile recorded it.
        seed: of the ``random`` allocation.
        strict: refuse a profile that was calibrated on other weights.
        verdict: what to do where `hess-patch verify` recorded in the profile, for this allocation, this score and about
            this sparsity, that its budgets are worse than uniform ones on held-out scenes: ``follow`` warns and takes
            uniform budgets (and warns of a profile that helps in one metric and harms in another, but uses it),
            ``refuse`` raises instead, ``ignore`` uses the profile. A profile that was not verified is used without a
            word.
        dense_below: patch tokens of a forward, of all views together, below which every site takes the dense path.
            None takes what `hess-patch bench` recorded in the profile for the machine and device that the model runs
            on, backend, block sizes and about this sparsity, or no limit where nothing was; 0 never takes the dense
            path for being short.
        dense_from: on a GPU and with a fixed `sparsity`, heads whose budget keeps at least this share of their pairs
            keep all of them, by a dense kernel, which is expected to be no slower there; the report counts what is
            kept. 1 leaves budgets as they are.
        unfit: what to do with an attention call that cannot be made sparse (masked, causal, of tokens that no forward
            announced): ``raise`` a `PatchError`, or answer it ``dense``, as the unpatched model does, and report it.
        memory: ``plain``, or ``lean`` for inference in less memory with the same outputs, to rounding: what nothing
            reads is not kept, and heads, blocks and attention run in chunks. It works where no gradient is recorded
            (``torch.no_grad()`` or ``inference_mode``), and in eval mode; elsewhere everything is as in ``plain``. A
            forward hook inside a module that runs in chunks is called once a chunk, with that piece.
        adapter: take this adapter instead of asking which one claims the model.
        manager: plugin manager; a fresh one by default.

    Returns:
        The handle that undoes everything.

    Raises:
        UnknownModel, AmbiguousModel: not exactly one adapter claims the model.
        ProfileError, ProfileMismatch: the profile cannot be read, is not this model's, has no such score or, with
            `verdict` ``refuse``, was shown to harm.
        PatchError: the model is patched already, or a setting is out of range.
    """
    profile = _loaded(profile)
    settings = make_settings(
        profile=profile,
        preset=preset,
        sparsity=sparsity,
        sparse_ratio=sparse_ratio,
        cdf_threshold=cdf_threshold,
        allocation=allocation,
        selector=selector,
        backend=backend,
        block_q=block_q,
        block_k=block_k,
        pool_q=pool_q,
        pool_k=pool_k,
        minimum=minimum,
        seed=seed,
        block_order=block_order,
        dense_below=0 if dense_below is None else dense_below,
        memory=memory,
        dense_from=dense_from,
    )
    allocation = settings.allocation
    check_unfit(unfit)
    if profile is None and allocation not in ("uniform", "equal"):
        raise PatchError(
            f"allocation {allocation!r} divides budgets by a profile and none was given; pass profile=FILE."
        )
    scoring = Scoring(camera_weight, projection, normalisation, rows)
    if profile is None and scoring != Scoring():
        raise PatchError(
            f"a score was chosen ({scoring}), which is made of a profile, and none was given; pass profile=FILE."
        )
    check_verdict(verdict)
    model = unwrapped(model)
    chosen = resolve_adapter(model, adapter, manager)
    if is_patched(model) and is_left_out(model):
        unpatch(model)  # what is asked for goes before what `auto_patch` did by itself
    if is_patched(model):
        raise PatchError(
            "this model, or a module that it shares with another, is patched already; call remove() on its patch (or "
            "hess_plugin.unpatch) first."
        )
    sites = chosen.sites(model)
    scores = stepped_aside = budgets = None
    if profile is not None:
        profile.check(sites, weights_fingerprint(sites) if strict else None)
        scoring = scoring.resolved(profile)
        scores = head_scores(profile, scoring)
        settings, stepped_aside = follow(profile, settings, scoring, sites, verdict, strict)
        if settings.allocation == "harm":
            warn_of_other_blocks(profile, settings)
            budgets = ModelBudgets(*model_curves(profile, scoring.camera_weight))
    place = Place(settings, profile if dense_below is None else None)
    place.settle(sites[0])  # a backend that cannot run is told now, not in the first forward
    layouts = Layouts(settings.block_order, block_k)
    attentions = [
        SiteAttention(
            site,
            settings,
            None if scores is None else scores[i],
            layouts,
            i,
            place,
            None if budgets is None else LayerBudgets(budgets, i),
        )
        for i, site in enumerate(sites)
    ]
    made = None if profile is None or stepped_aside is not None else scoring
    handle = Patch(attentions, place, made, stepped_aside)
    # If anything fails half way, the sites replaced so far are put back.
    with contextlib.ExitStack() as undo:
        for site, attention in zip(sites, attentions, strict=True):
            undo.callback(_replace(chosen, site, attention, unfit).remove)
        for name in dict.fromkeys(site.layout_module for site in sites):
            undo.callback(_watch_layout(chosen, model, name, layouts, attentions[0], unfit).remove)
        if memory == "lean":
            handle.measures = make_lean(model, chosen.family(model), sites, undo)
        handle._undo = undo.pop_all()
    return handle


def unpatch(model: nn.Module) -> int:
    """Remove every patch from a model whose handle is lost, or from a deepcopy of a patched model.

    Returns:
        How many sites were restored.
    """
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, LayoutHook):
                module._forward_pre_hooks.pop(key)
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    unmake_lean(model)
    return sum(restore(module) for module in model.modules())


def _loaded(profile: Profile | str | Path | None) -> Profile | None:
    """Read a profile, if it is a file."""
    if isinstance(profile, (str, Path)):
        profile = Profile.load(profile)
    if profile is not None and not isinstance(profile, Profile):
        raise PatchError(f"profile is of type {type(profile).__name__}, wanted a Profile or the name of its file.")
    return profile


def _replace(adapter: Adapter, site: Site, attention: SiteAttention, unfit: str) -> Replacement:
    # A plain function, not the SiteAttention itself: copy.deepcopy of a patched model copies functions by
    # reference and would walk through an object into the adapter, the site and the original model.
    def attend(*args: Any, **kwargs: Any) -> Any:
        try:
            return attention(*args, **kwargs)
        except PatchError as error:
            if not taken(attend, error):
                raise
            return SDPA(*args, **kwargs)

    return adapter.replace_attention(site, _with_note(attend, attention, unfit))


def _watch_layout(
    adapter: Adapter, model: nn.Module, name: str, layouts: Layouts, first: SiteAttention, unfit: str
) -> RemovableHandle:
    """Note the token layout before every forward of the module that receives the images."""

    def see(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        layouts.see(adapter.token_layout(model, args, kwargs))

    hook = LayoutHook(model, _with_note(see, first, unfit))
    return model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)


def _with_note(function: Any, attention: SiteAttention, unfit: str) -> Any:
    """Let a function of the patch note what does not fit, where it is not to be raised."""
    if unfit == "dense":
        function.unfit = attention.tally.unfit
    return function
