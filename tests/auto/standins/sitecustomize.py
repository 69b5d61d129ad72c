"""Stand-ins for what a test machine lacks: weights, a graphics card, parts of packages; before a program starts.

Models are shrunk by the builders of tests/adapters/conftest.py, whose path is in HESS_TEST_BUILDERS; nothing else of
the upstream code is touched.
"""

import importlib.abc
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class Finder(importlib.abc.MetaPathFinder):
    """Runs a function after a module of the table has been imported."""

    def __init__(self, table: dict[str, Callable[[ModuleType], None]]) -> None:
        self.table, self.asking = table, False

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if self.asking or name not in self.table:
            return None
        self.asking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None:
            run: Any = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                self.table[name](module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def device(torch: Any) -> None:
    """Programs ask for the graphics card's generation before they choose a type; on the CPU both are ignored."""
    torch.cuda.get_device_capability = lambda *_: (8, 0)
    # torchvision's Python part is enough for image transforms; its operators need the wheel made for this torch.
    register = torch.library.register_fake
    torch.library.register_fake = lambda op, *args, **options: (
        (lambda function: function) if str(op).startswith("torchvision::") else register(op, *args, **options)
    )


def small(package: str, shrink: str, **options: str) -> Callable[[ModuleType], None]:
    """Shrink the class of a model and give it random weights where the program would download them."""

    def stand_in(module: ModuleType) -> None:
        import pytest
        import torch

        specification = importlib.util.spec_from_file_location("builders", os.environ["HESS_TEST_BUILDERS"])
        assert specification is not None and specification.loader is not None
        builders = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(builders)
        made: Any = getattr(builders, shrink)(pytest.MonkeyPatch(), **options)

        def build(*_: object, **__: object) -> Any:
            torch.manual_seed(3)
            model = made()
            if hasattr(model, "point_head") and package == "pi3":  # programs leave out points at edges of the depth
                for parameter in model.point_head.parameters():
                    parameter.data *= 1e-2
            return model

        made.from_pretrained = build
        torch.hub.load_state_dict_from_url = lambda url: build().state_dict()

    return stand_in


def released(api: Any) -> None:
    """Build the released small configuration where a program would download its weights."""
    import torch

    def build(*_: object, **__: object) -> Any:
        torch.manual_seed(3)
        return api.DepthAnything3(model_name="da3-small")

    api.DepthAnything3.from_pretrained = build


def absent(name: str, **names: object) -> None:
    """A module that an upstream file imports and, on the path tested, does not use."""
    if importlib.util.find_spec(name) is None:
        module = types.ModuleType(name)
        vars(module).update(names)
        sys.modules[name] = module


absent("lightglue", ALIKED=None, SIFT=None, SuperPoint=None)
sys.meta_path.insert(
    0,
    Finder(
        {
            "torch": device,
            "depth_anything_3.api": released,
            "vggt.models.vggt": small("vggt", "shrink_vggt"),
            "pi3.models.pi3": small("pi3", "shrink_pi3", name="pi3"),
            "pi3.models.pi3x": small("pi3", "shrink_pi3", name="pi3x"),
        }
    ),
)
