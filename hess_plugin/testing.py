"""The contract suite: what an adapter author runs on a tiny instance of their model, and our own tests run too."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pluggy
import torch
from torch import Tensor, nn

from .adapting import Adapter
from .calibration.calibrator import calibrate
from .calibration.fisher import head_traces, only_sites_require_grad
from .calibration.measuring import MEMORY, Protocol, measuring
from .exceptions import AdapterError, PatchError
from .interception import SDPA, intercept
from .patching import patch, unpatch
from .plugins import resolve_adapter
from .predictions import Prediction
from .profiles import ERROR_NAMES
from .scenes.scene import Scene

_ANY_DISTANCE = 1e6  # random weights predict points far from the truth; every point is an inlier


@dataclass(frozen=True)
class Check:
    """One line of the checklist.

    Attributes:
        name: what was checked.
        problem: what is wrong and what to do, or None if it holds.
    """

    name: str
    problem: str | None

    def __str__(self) -> str:
        return f"[ok]   {self.name}" if self.problem is None else f"[FAIL] {self.name}: {self.problem}"


def check_adapter(
    model: nn.Module,
    scene: Scene,
    *,
    adapter: str | None = None,
    manager: pluggy.PluginManager | None = None,
    block: int = 4,
    sparsity: float = 0.5,
) -> list[Check]:
    """Check that an adapter keeps the contract on one model: claims, sites, exactness, undo, gradients, calibration.

    Args:
        model: a small instance in eval mode, on the CPU; random weights do.
        scene: a scene with true cameras and depth at a size the model takes, 3 views or more.
        adapter: the adapter meant; by default the one that claims the model.
        manager: plugin manager; a fresh one by default.
        block: patch tokens in a query or key block; small, because a small input has few tokens.
        sparsity: target of the sparse checks.

    Returns:
        One `Check` each; print them. `require` raises on a failed one.
    """
    suite = _Suite(model, scene.normalised(), resolve_adapter(model, adapter, manager), block, sparsity)
    checks = []
    for name, method in suite.checks():
        try:
            problem = method()
        except Exception as error:  # a broken adapter may raise anything; the checklist goes on
            problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
        finally:
            unpatch(model)
        checks.append(Check(name, problem))
    return checks


def require(checks: list[Check]) -> None:
    """Raise if a check failed, with the whole checklist as the message.

    Raises:
        AdapterError: at least one check failed.
    """
    if any(check.problem for check in checks):
        raise AdapterError("the adapter does not keep the contract:\n" + "\n".join(str(check) for check in checks))


class _Suite:
    """The checks; each returns what is wrong, or None."""

    def __init__(self, model: nn.Module, scene: Scene, adapter: Adapter, block: int, sparsity: float) -> None:
        self.model, self.scene, self.adapter, self.sparsity = model, scene, adapter, sparsity
        self.options: dict[str, Any] = {
            "adapter": adapter.name,
            "manager": adapter.manager,
            "block_q": block,
            "block_k": block,
        }

    def checks(self) -> list[tuple[str, Callable[[], str | None]]]:
        return [
            ("exactly one adapter claims the model", self.claimed_once),
            ("sites are modules of the model with their projections", self.sites_fit),
            ("a prediction has cameras, points and confidence of every view", self.prediction_fits),
            ("the token layout has the length of the attention sequence", self.layout_fits),
            ("at sparsity 0 the output is the unpatched one, bit for bit", self.dense_is_exact),
            ("the chosen backend agrees with the plain reference", self.reference_agrees),
            ("a patched forward drops the share asked for", self.sparsity_is_measured),
            ("removing a patch leaves no trace", self.undo_is_complete),
            ("a patched model refuses a second patch", self.second_patch_refused),
            ("an exception inside a patched forward leaves nothing behind", self.exception_is_safe),
            ("a deepcopy of a patched model runs by itself", self.deepcopy_runs),
            ("errors have a gradient at every site", self.gradient_everywhere),
            ("measuring in little memory gives the same traces and leaves no trace", self.lean_is_exact),
            ("calibrating gives a profile that patches the model", self.profile_works),
        ]

    def claimed_once(self) -> str | None:
        found = resolve_adapter(self.model, None, self.adapter.manager)
        return None if found.name == self.adapter.name else f"{found.name!r} claims it, not {self.adapter.name!r}"

    def sites_fit(self) -> str | None:
        for site in self.adapter.sites(self.model):
            for letter in site.projections:
                rows, wanted = site.head_rows(site.weight(letter), letter).shape[:2], (site.num_heads, site.head_dim)
                if tuple(rows) != wanted:
                    return f"{site.name} projection {letter} has rows {list(rows)}, wanted heads x width {list(wanted)}"
        return None

    def prediction_fits(self) -> str | None:
        prediction = self.predict()
        views = self.scene.views
        if prediction.c2w.shape[0] != views:
            return f"{prediction.c2w.shape[0]} poses for {views} views"
        if not all(bool(torch.isfinite(t).all()) for t in (prediction.c2w, prediction.points, prediction.confidence)):
            return "it holds a value that is not finite; initialise the tiny model's weights"
        rotation = prediction.c2w[:, :3, :3].double()
        identity = torch.eye(3, dtype=torch.float64)
        if not torch.allclose(rotation @ rotation.mT, identity.expand_as(rotation), atol=1e-4):
            return "c2w[:, :3, :3] is not a rotation; return camera-to-world poses with OpenCV axes"
        return None

    def layout_fits(self) -> str | None:
        seen: dict[str, list[int]] = {}
        replacements = []
        for site in self.adapter.sites(self.model):
            lengths = seen.setdefault(site.name, [])
            replacements.append(intercept(site, _recording(lengths)))
        try:
            self.predict()
        finally:
            for replacement in replacements:
                replacement.remove()
        for name, lengths in seen.items():
            if not lengths:
                return f"{name} made no scaled_dot_product_attention call; drop it or implement hess_replace_attention"
        # patch() looks the layout up by length and raises if it was not announced.
        with patch(self.model, sparsity=0.0, **self.options):
            self.predict()
        return None

    def dense_is_exact(self) -> str | None:
        plain = self.predict()
        with patch(self.model, sparsity=0.0, **self.options) as handle:
            patched = self.predict()
        if not all(site.calls == site.dense_calls > 0 for site in handle.report().sites):
            return "a site was not reached, or not by the dense path"
        return _difference(plain, patched)

    def reference_agrees(self) -> str | None:
        outputs = []
        for backend in ("reference", "auto"):
            with patch(self.model, sparsity=self.sparsity, backend=backend, **self.options):
                outputs.append(self.predict())
        scale = outputs[0].points.abs().max().item()
        worst = (outputs[0].points - outputs[1].points).abs().max().item()
        return (
            None if worst <= 1e-3 * max(scale, 1e-6) else f"points of two backends differ by {worst:.2e} of {scale:.2e}"
        )

    def sparsity_is_measured(self) -> str | None:
        with patch(self.model, sparsity=self.sparsity, **self.options) as handle:
            prediction = self.predict()
        measured = handle.report().sparsity
        if measured is None or measured <= 0.0:
            return f"measured sparsity is {measured}; give a scene with more patches or smaller blocks"
        return None if bool(torch.isfinite(prediction.points).all()) else "points are not finite"

    def undo_is_complete(self) -> str | None:
        before, plain = _state(self.model), self.predict()
        handle = patch(self.model, sparsity=self.sparsity, **self.options)
        self.predict()
        handle.remove()
        handle.remove()
        after = _state(self.model)
        changed = [name for name in before if before[name] != after.get(name)] + [n for n in after if n not in before]
        return f"{changed[0]} changed" if changed else _difference(plain, self.predict())

    def second_patch_refused(self) -> str | None:
        with patch(self.model, sparsity=0.0, **self.options):
            try:
                patch(self.model, sparsity=0.0, **self.options)
            except PatchError:
                return None
        return "it was accepted"

    def exception_is_safe(self) -> str | None:
        plain = self.predict()
        try:
            with patch(self.model, sparsity=self.sparsity, **self.options):
                hook = self.adapter.sites(self.model)[0].module.register_forward_hook(_fail)
                try:
                    self.predict()
                finally:
                    hook.remove()
        except _Deliberate:
            return _difference(plain, self.predict())
        return "the exception did not get out"

    def deepcopy_runs(self) -> str | None:
        with patch(self.model, sparsity=self.sparsity, **self.options):
            patched = self.predict()
            twin = copy.deepcopy(self.model)
            problem = _difference(patched, self.predict(twin))
        if problem is not None:
            return f"the copy differs from the patched model: {problem}"
        if unpatch(twin) != len(self.adapter.sites(self.model)):
            return "unpatch(copy) did not restore every site"
        return _difference(self.predict(), self.predict(twin))

    def gradient_everywhere(self) -> str | None:
        sites = self.adapter.sites(self.model)
        with only_sites_require_grad(self.model, sites) as weights:
            errors = self.adapter.compute_errors(self.model, self.scene, _ANY_DISTANCE)
            found = {name: e for name in ERROR_NAMES if (e := getattr(errors, name)) is not None}
            if not found:
                return "neither error was computed; give a scene with cameras and depth"
            traces = [head_traces(error, sites, weights, retain_graph=True)["q"] for error in found.values()]
        total = torch.stack(traces).sum((0, 2))
        silent = [site.name for site, value in zip(sites, total.tolist(), strict=True) if value == 0.0]
        return f"no gradient reaches {silent[0]}; hess_predict must not detach" if silent else None

    def lean_is_exact(self) -> str | None:
        before, sites, traces = _state(self.model), self.adapter.sites(self.model), []
        for memory in MEMORY:
            with measuring(self.adapter, self.model, sites, Protocol(eps=_ANY_DISTANCE, memory=memory)) as measurer:
                traces.append(measurer.measure(self.scene).traces)
        after = _state(self.model)
        changed = [name for name in before if before[name] != after.get(name)]
        if changed or len(after) != len(before):
            return f"{changed[0] if changed else 'something new'} was left changed"
        for name, first in traces[0].items():
            worst = (first - traces[1][name]).abs().max().item() / max(first.max().item(), 1e-300)
            if not worst <= 1e-3 and not bool(first.isnan().all()):
                return (
                    f"traces {name} differ by {worst:.1e} of the largest; blocks must be modules that draw nothing at "
                    "random, frame_heads must treat frames alone"
                )
        return None

    def profile_works(self) -> str | None:
        profile = calibrate(
            self.model,
            [self.scene],
            camera_weight=0.5,
            eps=_ANY_DISTANCE,
            adapter=self.adapter.name,
            manager=self.adapter.manager,
        )
        with patch(self.model, profile=profile, sparsity=self.sparsity, **self.options) as handle:
            self.predict()
        return None if handle.report().sparsity else "nothing was dropped"

    def predict(self, model: nn.Module | None = None) -> Prediction:
        with torch.no_grad():
            return self.adapter.predict(self.model if model is None else model, self.scene.images)


class _Deliberate(Exception):
    """Raised on purpose by a check."""


def _fail(*_: object) -> None:
    raise _Deliberate


def _recording(lengths: list[int]) -> Callable[..., Tensor]:
    def attend(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        lengths.append(query.shape[-2])
        return SDPA(query, *args, **kwargs)

    return attend


def _difference(first: Prediction, second: Prediction) -> str | None:
    """Name the first field in which two predictions are not equal bit for bit."""
    for field in dataclasses.fields(Prediction):
        a, b = getattr(first, field.name), getattr(second, field.name)
        if isinstance(a, Tensor) and not torch.equal(a, b):
            return f"{field.name} differs by {(a - b).abs().max().item():.2e}"
    return None


def _state(model: nn.Module) -> dict[str, object]:
    """Everything a patch could leave behind: classes, instance attributes, hooks, parameters and buffers."""
    state: dict[str, object] = {}
    for name, module in model.named_modules():
        state[f"{name}: class"] = type(module)
        state[f"{name}: attributes"] = tuple(module.__dict__)
        for kind, hooks in vars(module).items():
            if "hooks" in kind and isinstance(hooks, dict):
                state[f"{name}: {kind}"] = tuple(hooks)
    for name, tensor in model.state_dict().items():
        state[f"{name}: value"] = (tensor.data_ptr(), tensor._version, tuple(tensor.shape), tensor.dtype)
    for name, parameter in model.named_parameters():
        state[f"{name}: requires_grad"] = parameter.requires_grad
    return state
