"""Loading weights: the same every time, never unpickled, and every mistake told in a sentence."""

from __future__ import annotations

import logging
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from hess_plugin import HessError, MissingDependency, import_upstream, load_weights
from hess_plugin.loading import read_state


class Net(nn.Module):
    """A small upstream class without from_pretrained."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)


class HubNet(Net):
    """An upstream class that knows the hub."""

    asked: list[str]

    @classmethod
    def from_pretrained(cls, name: str) -> HubNet:
        cls.asked.append(name)
        if name == "org/offline":
            raise ConnectionError("We couldn't connect to 'https://hub'\nCheck your internet connection.")
        return cls()


def same(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_random_weights_are_the_same_every_time_and_leave_the_generator_alone() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one = load_weights(Net, "random")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    two = load_weights(Net, "random")
    assert same(one, two) and not one.training


def test_a_build_that_fails_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()

    def build() -> nn.Module:
        torch.rand(5)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        load_weights(build, "random")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
@pytest.mark.parametrize("key", [None, "model", "state_dict"])
def test_files_give_their_weights(tmp_path: Path, suffix: str, key: str | None) -> None:
    trained = Net()
    nn.init.constant_(trained.layer.weight, 0.25)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(trained.state_dict(), path)
    else:
        state = dict(trained.state_dict())
        torch.save(state if key is None else {key: state, "epoch": 3}, path)
    loaded = load_weights(Net, str(path))
    assert same(loaded, trained) and not loaded.training


def test_device_and_type_are_applied_to_floating_weights(tmp_path: Path) -> None:
    torch.save(Net().state_dict(), tmp_path / "a.pt")
    loaded = load_weights(Net, str(tmp_path / "a.pt"), device="meta", dtype=torch.bfloat16)
    assert loaded.layer.weight.dtype == torch.bfloat16 and loaded.layer.weight.device.type == "meta"
    assert loaded.norm.num_batches_tracked.dtype == torch.int64


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("keep", [0, 1, 7, 100, 0.5, -1])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str, keep: float) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(Net().state_dict(), path)
    else:
        torch.save(Net().state_dict(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if keep == 0.5 else int(keep)])
    with pytest.raises(HessError, match=r"cannot be read .*download it again") as caught:
        load_weights(Net, str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_missing_files_are_told(tmp_path: Path, suffix: str) -> None:
    for path in (tmp_path / f"none{suffix}", tmp_path / f"folder{suffix}"):
        (tmp_path / f"folder{suffix}").mkdir(exist_ok=True)
        with pytest.raises(HessError, match="does not exist; give a file, a hub id or `random`"):
            load_weights(Net, str(path))


def test_weights_of_another_model_name_the_first_difference(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    state = Net().state_dict()
    torch.save({k: v for k, v in state.items() if "layer" not in k}, path)
    with pytest.raises(HessError, match=r"is of another model: layer\.weight is missing \(and 1 more\)\."):
        load_weights(Net, str(path))
    torch.save({**state, "layer.weight": torch.zeros(5, 3)}, path)
    with pytest.raises(HessError, match=r"layer\.weight has shape \[5, 3\], wanted \[2, 3\] \(and 0 more\)\."):
        load_weights(Net, str(path))


def test_surplus_weights_are_reported_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.pt"
    torch.save({**Net().state_dict(), "tracker.weight": torch.zeros(1), "tracker.bias": torch.zeros(1)}, path)
    with caplog.at_level(logging.WARNING):
        load_weights(Net, str(path))
    assert "holds 2 tensors that Net does not use" in caplog.text


class Payload:
    """Makes a file when unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors"])
@pytest.mark.parametrize("plain", [True, False])
def test_a_pickle_is_refused_and_not_executed(tmp_path: Path, suffix: str, plain: bool) -> None:
    victim = tmp_path / "executed"
    path = tmp_path / f"evil{suffix}"
    objects = {**Net().state_dict(), "evil": Payload(str(victim))}
    if plain:
        path.write_bytes(pickle.dumps(objects))
    else:
        torch.save(objects, path)
    with pytest.raises(HessError, match="cannot be read"):
        load_weights(Net, str(path))
    assert not victim.exists()


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"model": {"a": "b"}}, torch.zeros(3), 5])
def test_files_without_named_tensors_are_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(HessError, match="holds no state dict; give a file of named tensors"):
        read_state(tmp_path / "a.pt")


def test_a_hub_id_or_folder_goes_to_from_pretrained(tmp_path: Path) -> None:
    HubNet.asked = []
    for name in ("facebook/VGGT-1B", str(tmp_path), "org/name.v2"):
        assert not load_weights(HubNet, name, dtype=torch.bfloat16).training
    assert HubNet.asked == ["facebook/VGGT-1B", str(tmp_path), "org/name.v2"]


def test_a_hub_that_cannot_be_reached_is_told_in_one_line() -> None:
    HubNet.asked = []
    with pytest.raises(
        HessError, match=r"'org/offline' are neither .* nor a hub id that can be loaded \(We couldn't"
    ) as e:
        load_weights(HubNet, "org/offline")
    assert "\n" not in str(e.value) and str(e.value).endswith(").")


def test_a_class_without_from_pretrained_wants_a_file() -> None:
    with pytest.raises(HessError, match=r"Net cannot be loaded from 'org/name'; give a \.safetensors, .* or `random`"):
        load_weights(Net, "org/name")


def test_upstream_modules_that_cannot_be_imported_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingDependency, match=r"cannot import no_such_model\.models .*https://x.* --repo DIR"):
        import_upstream("no_such_model.models", "https://x")
    # An upstream module whose own import fails says which one.
    (tmp_path / "half_there.py").write_text("import no_such_dependency_of_it")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependency, match="No module named 'no_such_dependency_of_it'"):
        import_upstream("half_there", "https://x")
    assert import_upstream("json", "https://x").dumps({}) == "{}"
