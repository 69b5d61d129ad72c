"""Loading weights the safe way: a hub id, a local file that is never unpickled, or random numbers."""

from __future__ import annotations

import importlib
import logging
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from .exceptions import HessError, MissingDependency

RANDOM = "random"
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_log = logging.getLogger(__name__)


def import_upstream(module: str, repository: str) -> ModuleType:
    """Import a module of the user's own checkout of a model.

    Raises:
        MissingDependency: it cannot be imported; says where to get it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependency(
            f"cannot import {module} ({error}); install {repository} or give its checkout with --repo DIR."
        ) from error


def load_weights(
    build: Callable[[], nn.Module],
    weights: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    prefix: str = "",
) -> nn.Module:
    """Build a model and give it weights.

    Args:
        build: makes the model; usually the upstream class, whose ``from_pretrained`` is used for hub ids and folders.
        weights: ``random`` (seeded, for tests), the path of a ``.safetensors``, ``.pt``, ``.pth`` or ``.bin`` file, a
            local folder, or a hub id such as ``facebook/VGGT-1B``.
        device: where the model goes.
        dtype: floating type of its parameters.
        prefix: what names in a file may start with, where upstream saves something around the model.

    Returns:
        The model in eval mode.

    Raises:
        HessError: the file is missing, unreadable or of another model, or the hub cannot be reached.
    """
    path = Path(weights)
    if weights == RANDOM:
        # The CPU generator alone: torch.manual_seed would reseed the user's graphics cards as well.
        state = torch.get_rng_state()
        try:
            torch.default_generator.manual_seed(0)
            model = build()
        finally:
            torch.set_rng_state(state)
    elif path.suffix in _SUFFIXES:
        model = build()
        _load_state(model, {name.removeprefix(prefix): value for name, value in read_state(path).items()}, path)
    else:
        model = _from_pretrained(build, weights)
    return model.to(device=device, dtype=dtype).eval()


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict without unpickling objects.

    Raises:
        HessError: the file is missing, truncated, or holds more than tensors.
    """
    if not path.is_file():
        raise HessError(f"weights file {path} does not exist; give a file, a hub id or `random`.")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol, which is not the user's business
            state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own text advises to load it without protection.
        raise HessError(
            f"weights file {path} cannot be read (truncated, or it holds objects other than tensors, which could run "
            "code); download it again, or save its state dict as safetensors."
        ) from error
    except Exception as error:  # zip, pickle and safetensors errors have no common base
        raise HessError(f"weights file {path} cannot be read ({_first_line(error)}); download it again.") from error
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise HessError(f"weights file {path} holds no state dict; give a file of named tensors.")
    return state


def _load_state(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load a state dict; missing or misshapen weights are an error, surplus ones are only reported."""
    wanted = model.state_dict()
    # Of the names that share a tensor (layer norms in the head of Depth Anything 3) safetensors files keep one.
    first = {(tensor.data_ptr(), tensor.shape): name for name, tensor in wanted.items() if name in state}
    for name, tensor in wanted.items():
        twin = first.get((tensor.data_ptr(), tensor.shape))
        if name not in state and twin is not None:
            state[name] = state[twin]
    missing = [name for name in wanted if name not in state]
    misshapen = [name for name in wanted if name in state and state[name].shape != wanted[name].shape]
    if missing or misshapen:
        name = (missing or misshapen)[0]
        given = "is missing" if missing else f"has shape {list(state[name].shape)}, wanted {list(wanted[name].shape)}"
        raise HessError(
            f"weights file {path} is of another model: {name} {given} (and {len(missing) + len(misshapen) - 1} more)."
        )
    surplus = len(state) - len(wanted)
    if surplus:
        _log.warning("%s holds %d tensors that %s does not use", path, surplus, type(model).__name__)
    model.load_state_dict({name: state[name] for name in wanted})


def _from_pretrained(build: Callable[[], nn.Module], weights: str) -> nn.Module:
    loader = getattr(build, "from_pretrained", None)
    if loader is None:
        name = getattr(build, "__name__", "this model")
        raise HessError(f"{name} cannot be loaded from {weights!r}; give a {', '.join(_SUFFIXES)} file or `random`.")
    try:
        model: nn.Module = loader(weights)
    except Exception as error:  # network, repository and file errors of the hub client
        raise HessError(
            f"weights {weights!r} are neither a {'/'.join(_SUFFIXES)} file nor a folder nor a hub id that can be "
            f"loaded ({_first_line(error)})."
        ) from error
    return model


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
