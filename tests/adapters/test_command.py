"""`hess-patch calibrate` on upstream's own classes, shrunk, with weights from every place they may come from."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from torch import nn

from hess_plugin import Profile
from hess_plugin.cli import main
from hess_plugin.scenes.scene import Scene
from hess_plugin.scenes.writing import write_folder


def calibrate(model: str, checkout: str, weights: str, data: Path, output: Path) -> str:
    """Run the command and return what it printed."""
    arguments = ["--model", model, "--weights", weights, "--repo", checkout, "--data", f"folder:{data}"]
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
    assert profile.adapter == name.removesuffix("x") and profile.scenes == ("plane",)
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
        assert facts["views"] == 3 and not height % 14 and not width % 14
        # VGGT scales to a width, Pi3 to an area.
        assert width == 84 if name == "vggt" else 84**2 * 0.7 < height * width <= 84**2
        assert facts["scale"] > 0 and facts["alignment"]


@pytest.mark.parametrize("kind", ["folder", "safetensors", "pt"])
def test_weights_from_a_file_or_folder(
    small_upstream: tuple[str, str], small_scene: Scene, tmp_path: Path, kind: str
) -> None:
    name, checkout = small_upstream
    if name == "pi3x":
        pytest.skip("the same loader as Pi3, and ten times its size")
    upstream = importlib.import_module({"vggt": "vggt.models.vggt", "pi3": "pi3.models.pi3"}[name])
    torch.manual_seed(1)
    model: nn.Module = (upstream.VGGT if name == "vggt" else upstream.Pi3)()
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
    assert Profile.load(tmp_path / "out.hess").fingerprint == weights_fingerprint(sites)
