"""`hess-patch calibrate` on upstream's own classes, shrunk, with weights from every place they may come from."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from hess_plugin import Profile
from hess_plugin.cli import main
from hess_plugin.scenes.scene import Scene
from hess_plugin.scenes.writing import write_folder

ADAPTERS = {"pi3x": "pi3", "da3-small": "da3"}
SIZES = {"vggt-omega": "64", "da3-small": "70"}  # where the real one, of hundreds of pixels, takes half a minute


def calibrate(model: str, checkout: str, weights: str, data: Path, output: Path) -> str:
    """Run the command and return what it printed."""
    arguments = ["--model", model, "--weights", weights, "--repo", checkout, "--data", f"folder:{data}"]
    if model in SIZES:
        arguments += ["--resolution", SIZES[model]]
    result = CliRunner().invoke(main, ["calibrate", *arguments, "--eps", "1e6", "--device", "cpu", "-o", str(output)])
    assert result.exit_code == 0, result.output
    return result.output


def test_calibrate_with_random_weights(small_upstream: tuple[str, str], small_scene: Scene, tmp_path: Path) -> None:
    name, checkout = small_upstream
    write_folder(small_scene, tmp_path / "plane")
    output = tmp_path / "out.hess"
    text = calibrate(name, checkout, "random", tmp_path, output)
    assert text.count("WARNING: random weights") == 2
    profile = Profile.load(output)
    assert profile.adapter == ADAPTERS.get(name, name) and profile.scenes == ("plane",)
    assert profile.metadata["weights"] == "random"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.hess", "plane"]


def test_calibrate_on_real_images(small_upstream: tuple[str, str], real_scenes: Path, tmp_path: Path) -> None:
    """Real photographs with depth, at reduced size, through upstream's own code: what a user runs."""
    name, checkout = small_upstream
    output = tmp_path / "out.hess"
    arguments = ["--model", name, "--weights", "random", "--repo", checkout, "--data", f"folder:{real_scenes}"]
    limits = [
        "--scenes",
        "2",
        "--views",
        "3",
        "--seed",
        "1",
        "--resolution",
        "84",
        "--eps",
        "1e6",
        "--camera-weight",
        "0.5",
    ]
    result = CliRunner().invoke(main, ["calibrate", *arguments, *limits, "-o", str(output)])
    assert result.exit_code == 0, result.output
    measured = Profile.load(output).metadata["measured"]
    assert len(measured) == 2
    for facts in measured.values():
        height, width = facts["size"]
        patch = 16 if name == "vggt-omega" else 14
        assert facts["views"] == 3 and not height % patch and not width % patch
        # VGGT scales to a width, Depth Anything 3 to a longest side, the others to an area.
        if name == "vggt":
            assert width == 84
        elif name == "da3-small":
            assert max(height, width) == 84
        else:
            assert 84**2 * 0.6 < height * width <= 84**2
        assert facts["scale"] > 0 and facts["alignment"]


def upstream_class(module: str, name: str) -> nn.Module:
    model: nn.Module = getattr(importlib.import_module(module), name)()
    return model


def omega() -> nn.Module:
    """With everything set that upstream leaves to its weights file."""
    initialise = importlib.import_module("vggt_omega.models.layers.vision_transformer").init_weights_vit
    return upstream_class("vggt_omega.models", "VGGTOmega").apply(initialise)


def depth_anything_3() -> nn.Module:
    """What upstream saves: its API object, which is this much around the network, and needs more packages than it."""
    cfg = importlib.import_module("depth_anything_3.cfg")
    registry = importlib.import_module("depth_anything_3.registry").MODEL_REGISTRY

    class DepthAnything3(nn.Module, PyTorchModelHubMixin):
        def __init__(self, model_name: str = "da3-large", **kwargs: object) -> None:
            super().__init__()
            self.model_name = model_name
            self.model = cfg.create_object(cfg.load_config(registry[model_name]))

    return DepthAnything3(model_name="da3-small")


MODELS: dict[str, Callable[[], nn.Module]] = {
    "vggt": partial(upstream_class, "vggt.models.vggt", "VGGT"),
    "pi3": partial(upstream_class, "pi3.models.pi3", "Pi3"),
    "vggt-omega": omega,
    "da3-small": depth_anything_3,
}


def test_evaluate_with_random_weights(small_upstream: tuple[str, str], small_scene: Scene, tmp_path: Path) -> None:
    name, checkout = small_upstream
    if name not in SIZES:
        pytest.skip("evaluated elsewhere, on the demo's model")
    write_folder(small_scene, tmp_path / "plane")
    arguments = ["--model", name, "--weights", "random", "--repo", checkout, "--data", f"folder:{tmp_path}"]
    arguments += [
        "--resolution",
        SIZES[name],
        "--device",
        "cpu",
        "--sparsity",
        "0.5",
        "--block-q",
        "4",
        "--block-k",
        "4",
    ]
    result = CliRunner().invoke(main, ["evaluate", *arguments])
    assert result.exit_code == 0, result.output
    # Two tables of the same arms: cameras, and points.
    assert len(re.findall(r"^\| dense +\| 0 +\|", result.output, re.MULTILINE)) == 2
    (measured,) = re.findall(r"^\| uniform +\| 0\.5 +\| (0\.\d{4}) +\| \d+\.\d ", result.output, re.MULTILINE)
    assert float(measured) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("kind", ["folder", "safetensors", "pt"])
def test_weights_from_a_file_or_folder(
    small_upstream: tuple[str, str], small_scene: Scene, tmp_path: Path, kind: str
) -> None:
    name, checkout = small_upstream
    if name == "pi3x":
        pytest.skip("the same loader as Pi3, and ten times its size")
    if name == "vggt-omega" and kind == "folder":
        pytest.skip("upstream's class has no from_pretrained")
    torch.manual_seed(1)
    model = MODELS[name]()
    weights = tmp_path / f"weights.{kind}"
    if kind == "folder":
        model.save_pretrained(weights)
    elif kind == "pt":
        torch.save(model.state_dict(), weights)
    else:
        safetensors.torch.save_model(model, str(weights))
    write_folder(small_scene, tmp_path / "scenes" / "plane")
    text = calibrate(name, checkout, str(weights), tmp_path / "scenes", tmp_path / "out.hess")
    assert "WARNING" not in text
    from hess_plugin import resolve_adapter
    from hess_plugin.profiles import weights_fingerprint

    sites = resolve_adapter(model).sites(model)
    assert (name == "da3-small") == any(site.name.startswith("model.") for site in sites)
    assert Profile.load(tmp_path / "out.hess").fingerprint == weights_fingerprint(sites)
