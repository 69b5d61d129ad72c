"""Pruning heads in a sweep: gradients once, a mask for each method and sparsity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pluggy
from torch import Tensor, nn

from hess_plugin.baselines import GateGradients, Pruned, gate_gradients, prune_heads, pruning_mask
from hess_plugin.plugins import resolve_adapter
from hess_plugin.profiles import weights_fingerprint
from hess_plugin.scenes.image_set import ImageSet
from hess_plugin.scenes.scene import Scene


class HeadPruner:
    """Prunes heads of one model by the methods of `hess_plugin.baselines`; called by `Runner`.

    The gradients of the gates are measured when the first mask is asked for, and kept in a file.
    """

    def __init__(
        self,
        model: nn.Module,
        scenes: Sequence[Scene | ImageSet],
        file: Path,
        camera_weight: float,
        *,
        note: Callable[[str, int, int, str], None] | None = None,
        adapter: str | None = None,
        manager: pluggy.PluginManager | None = None,
    ) -> None:
        """Remember what is needed; nothing is measured.

        Args:
            model: to prune.
            scenes: calibration scenes.
            file: where the gradients are kept; a file that is there is used if it is the model's.
            camera_weight: lambda of HeSS, 0 to 1.
            note: called as ``note(stage, done, total, what)``.
            adapter: take this adapter instead of asking which one claims the model.
            manager: plugin manager; a fresh one by default.
        """
        self._model, self._scenes, self._file, self._camera_weight = model, scenes, file, camera_weight
        self._note, self._adapter, self._manager = note, adapter, manager
        self._masks: dict[tuple[str, float], Tensor] = {}
        self._gradients: GateGradients | None = None

    def __call__(self, model: nn.Module, method: str, sparsity: float) -> Pruned:
        """Prune the model until the handle is removed.

        Raises:
            CalibrationError: no scene gave a gradient, or the sparsity cannot be reached.
            ProfileMismatch: the file holds the gradients of another model.
        """
        mask = self._mask(method, sparsity)
        return prune_heads(model, mask, adapter=self._adapter, manager=self._manager)

    def _mask(self, method: str, sparsity: float) -> Tensor:
        key = (method, sparsity)
        if key not in self._masks:
            tuning = {"adapter": self._adapter, "manager": self._manager}
            self._masks[key] = pruning_mask(
                method,
                self._measured(),
                sparsity,
                self._camera_weight,
                model=self._model,
                scenes=self._scenes,
                progress=self._progress(f"tune {sparsity:.3f}"),
                **tuning,
            )
        return self._masks[key]

    def _measured(self) -> GateGradients:
        if self._gradients is None:
            if self._file.exists():
                sites = resolve_adapter(self._model, self._adapter, self._manager).sites(self._model)
                found = GateGradients.load(self._file)
                found.check(sites, weights_fingerprint(sites))
            else:
                found = gate_gradients(
                    self._model,
                    self._scenes,
                    progress=self._progress("gates"),
                    adapter=self._adapter,
                    manager=self._manager,
                )
                found.save(self._file)
            self._gradients = found
        return self._gradients

    def _progress(self, stage: str) -> Callable[[int, int, str], None] | None:
        note = self._note
        return None if note is None else lambda done, total, what: note(stage, done, total, what)
