"""Gates: gradients checked by finite differences and by the output projection, and no trace of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hess_plugin import CalibrationError, PatchError, ProfileError, ProfileMismatch, Scene, patch
from hess_plugin.adapting import Adapter
from hess_plugin.baselines import GateGradients, gate_gradients
from hess_plugin.baselines.gates import gating
from hess_plugin.demo.model import TinyVGGT, load_demo_model
from hess_plugin.demo.rooms import make_scene
from hess_plugin.plugins import resolve_adapter
from hess_plugin.scenes.image_set import ImageSet
from hess_plugin.sites import Site

EPS = 1e6  # every predicted point counts: random weights predict none near the truth


@pytest.fixture(scope="module")
def demo() -> TinyVGGT:
    return load_demo_model()


@pytest.fixture(scope="module")
def rooms() -> list[Scene]:
    return [make_scene(41, 3), make_scene(42, 4)]


def state_of(model: nn.Module) -> list[object]:
    modules = [(n, type(m), sorted(vars(m)), m.training, len(m._forward_hooks)) for n, m in model.named_modules()]
    return [*modules, [(n, p.requires_grad, p.grad) for n, p in model.named_parameters()]]


def test_gates_of_one_change_no_bit(demo: TinyVGGT, rooms: list[Scene]) -> None:
    adapter = resolve_adapter(demo)
    plain = demo(rooms[0].images)
    with gating(adapter, adapter.sites(demo)) as gates:
        gated = demo(rooms[0].images)
    assert len(gates) == 4 and all(gate.shape == (8,) and gate.dtype == torch.float64 for gate in gates)
    for name in ("pose_enc", "depth", "world_points", "depth_conf"):
        assert torch.equal(plain[name], gated[name])


@pytest.mark.parametrize("batch", [1, 2])
def test_gradients_are_those_of_finite_differences(demo: TinyVGGT, rooms: list[Scene], batch: int) -> None:
    model = copy.deepcopy(demo).double()
    embed = model.aggregator.patch_embed.float()  # makes its positions in float32
    embed.register_forward_hook(lambda module, args, output: output.double())
    images = torch.stack([room.images[:3] for room in rooms])[:batch]
    adapter = resolve_adapter(model)

    def loss() -> Tensor:  # of what the heads read: the camera head cuts its own graph between refinements
        return torch.stack([pair.square().mean() for pair in model.aggregator(images)[0]]).sum()

    step = 1e-5
    with gating(adapter, adapter.sites(model)) as gates:
        found = torch.stack(torch.autograd.grad(loss(), gates))
        with torch.no_grad():
            for layer, head in [(0, 0), (0, 5), (1, 3), (2, 7), (3, 0), (3, 6)]:
                values = []
                for sign in (1, -1):
                    gates[layer][head] += sign * step
                    values.append(loss())
                    gates[layer][head] -= sign * step
                slope = (values[0] - values[1]) / (2 * step)
                torch.testing.assert_close(found[layer, head], slope, rtol=1e-5, atol=1e-7 * float(found.abs().max()))


def test_gradients_are_those_of_a_layer_written_out_head_by_head(tiny_model: TinyVGGT) -> None:
    model = tiny_model.double()
    attention = model.aggregator.global_blocks[0].attn
    tokens = torch.randn(2, 7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    site = resolve_adapter(model).sites(model)[0]

    own = torch.ones(4, dtype=torch.float64, requires_grad=True)
    q, k, v = attention.qkv(tokens).reshape(2, 7, 3, 4, 8).permute(2, 3, 0, 1, 4).unbind(0)
    q, k = attention.q_norm(q), attention.k_norm(k)
    heads = [(q[h] @ k[h].mT / 8**0.5).softmax(-1) @ v[h] for h in range(4)]
    columns = attention.proj.weight.split(8, dim=1)
    output = attention.proj.bias + sum(own[h] * heads[h] @ columns[h].T for h in range(4))
    (wanted,) = torch.autograd.grad(output.pow(3).sum(), own)

    with gating(resolve_adapter(model), [site]) as gates:
        (found,) = torch.autograd.grad(attention(tokens).pow(3).sum(), gates)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def by_projection(model: TinyVGGT, scene: Scene, eps: float) -> dict[str, Tensor]:
    """The same derivative without gates: scaling a head is scaling its columns of the output projection."""
    adapter = resolve_adapter(model)
    sites = adapter.sites(model)
    errors = adapter.compute_errors(model, scene.normalised(), eps)
    weights = [site.module.proj.weight for site in sites]
    found = {}
    for name in ("camera", "points"):
        grads = torch.autograd.grad(getattr(errors, name), weights, retain_graph=True)
        rows = [
            (w * g).unflatten(1, (s.num_heads, -1)).sum((0, 2)) for w, g, s in zip(weights, grads, sites, strict=True)
        ]
        found[name] = torch.stack(rows).detach()
    return found


@pytest.mark.parametrize("memory", ["lean", "plain"])
def test_errors_are_those_of_a_calibration(demo: TinyVGGT, rooms: list[Scene], memory: str) -> None:
    found = gate_gradients(demo, rooms, memory=memory)
    assert found.scenes == ("room-41", "room-42") and found.camera.shape == found.points.shape == (2, 4, 8)
    for index, scene in enumerate(rooms):
        for name, wanted in by_projection(demo, scene, 0.05).items():
            got = getattr(found, name)[index]
            # Sums of float32 products that nearly cancel: compare with the largest.
            torch.testing.assert_close(got, wanted.double(), rtol=1e-3, atol=2e-4 * float(wanted.abs().max()))


def test_nothing_of_it_stays(tiny_model: TinyVGGT, rooms: list[Scene]) -> None:
    tiny_model.train()
    tiny_model.aggregator.camera_token.requires_grad_(False)
    before = state_of(tiny_model)
    gate_gradients(tiny_model, rooms[:1], eps=EPS)
    assert state_of(tiny_model) == before
    adapter = resolve_adapter(tiny_model)
    with pytest.raises(ZeroDivisionError), gating(adapter, adapter.sites(tiny_model)):
        raise ZeroDivisionError
    assert state_of(tiny_model) == before


def test_gates_alone_get_a_gradient(tiny_model: TinyVGGT, rooms: list[Scene], monkeypatch: pytest.MonkeyPatch) -> None:
    asking: list[bool] = []
    compute = Adapter.compute_errors

    def watched(self: Adapter, model: nn.Module, scene: Scene, eps: float) -> Any:
        asking.extend(parameter.requires_grad for parameter in model.parameters())
        return compute(self, model, scene, eps)

    monkeypatch.setattr(Adapter, "compute_errors", watched)
    gate_gradients(tiny_model, rooms[:1], eps=EPS)
    assert asking and not any(asking)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_a_callers_modes_change_nothing(tiny_model: TinyVGGT, rooms: list[Scene], context: Callable[[], Any]) -> None:
    wanted = gate_gradients(tiny_model, rooms[:1], eps=EPS)
    with context(), torch.autocast("cpu", torch.bfloat16):
        found = gate_gradients(tiny_model, rooms[:1], eps=EPS)
    assert torch.equal(found.camera, wanted.camera) and torch.equal(found.points, wanted.points)
    assert bool((found.points != 0).all())


def test_bfloat16_is_near(demo: TinyVGGT, rooms: list[Scene]) -> None:
    wanted, found = gate_gradients(demo, rooms[:1]), gate_gradients(demo, rooms[:1], autocast=torch.bfloat16)
    assert found.metadata["autocast"] == "bfloat16" and not torch.equal(found.points, wanted.points)
    assert float(F.cosine_similarity(found.points.flatten(), wanted.points.flatten(), dim=0)) > 0.9


def test_a_scene_without_points_holds_nan(demo: TinyVGGT, rooms: list[Scene]) -> None:
    found = gate_gradients(demo, [replace(rooms[1], depth=None), rooms[0]])
    assert bool(found.points[0].isnan().all()) and bool(found.points[1].isfinite().all())
    assert len(found.present("points")) == 1 and len(found.present("camera")) == 2


def test_images_alone_are_measured_against_the_prediction(demo: TinyVGGT, rooms: list[Scene]) -> None:
    found = gate_gradients(demo, [ImageSet("images", rooms[0].images)])
    assert found.metadata["target"] == "self" and bool(found.camera.isfinite().all())


def test_skipped_scenes_are_told(tiny_model: TinyVGGT, rooms: list[Scene]) -> None:
    flat = replace(rooms[1], depth=None, name="flat").subset([0, 1])
    found = gate_gradients(tiny_model, [flat, rooms[0]], eps=EPS)
    assert found.scenes == ("room-41",) and "no depth or points" in found.metadata["skipped"]["flat"]
    assert found.metadata["digests"] == {"room-41": rooms[0].digest()}
    with pytest.raises(CalibrationError, match="none of 1 scenes gave a usable error: Scene flat"):
        gate_gradients(tiny_model, [flat], eps=EPS)
    with pytest.raises(CalibrationError, match="there was no scene"):
        gate_gradients(tiny_model, [], eps=EPS)


def test_a_patched_model_is_refused(tiny_model: TinyVGGT, rooms: list[Scene]) -> None:
    with patch(tiny_model), pytest.raises(PatchError, match="remove the patch before"):
        gate_gradients(tiny_model, rooms)


def test_a_wrong_number_of_heads_is_told(tiny_model: TinyVGGT) -> None:
    adapter = resolve_adapter(tiny_model)
    site: Site = replace(adapter.sites(tiny_model)[0], num_heads=2, head_dim=16)
    with (
        gating(adapter, [site]),
        pytest.raises(PatchError, match=r"global_blocks\.0\.attn gave .*, wanted \[B, 2, N, d\]"),
    ):
        site.module(torch.zeros(1, 3, 32))


def made(model: nn.Module) -> GateGradients:
    generator = torch.Generator().manual_seed(0)
    camera, points = torch.randn(2, 3, 2, 4, generator=generator, dtype=torch.float64)
    points[1] = torch.nan
    return GateGradients("vggt", ("a", "b"), ("x", "y", "z"), camera, points, "f" * 16, {"eps": 0.05})


def test_a_file_holds_everything(tiny_model: TinyVGGT, tmp_path: Path) -> None:
    wanted = made(tiny_model)
    wanted.save(tmp_path / "new" / "gates.safetensors")
    found = GateGradients.load(tmp_path / "new" / "gates.safetensors")
    for name in ("camera", "points"):
        assert torch.equal(getattr(found, name).nan_to_num(7.0), getattr(wanted, name).nan_to_num(7.0))
    for name in ("adapter", "sites", "scenes", "fingerprint", "metadata", "num_heads"):
        assert getattr(found, name) == getattr(wanted, name)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["gates.safetensors"]


def test_damaged_files_are_told(tiny_model: TinyVGGT, tmp_path: Path) -> None:
    path = tmp_path / "gates.safetensors"
    with pytest.raises(ProfileError, match="is not a file"):
        GateGradients.load(path)
    made(tiny_model).save(path)
    data = path.read_bytes()
    key = "hess_gate_gradients"
    for content, message in (
        (b"", "is damaged"),
        (data[:-1], "is damaged"),
        (safetensors.torch.save({"a": torch.zeros(1)}), "is damaged or holds no gate gradients"),
        (safetensors.torch.save({"a": torch.zeros(1)}, metadata={key: "{"}), "is damaged"),
        (safetensors.torch.save({"a": torch.zeros(1)}, metadata={key: "[1]"}), "broken header"),
        (safetensors.torch.save({"a": torch.zeros(1)}, metadata={key: "{}"}), "has format None"),
        (safetensors.torch.save({"a": torch.zeros(1)}, metadata={key: '{"format_version": 1}'}), "is incomplete"),
        (data.replace(b'\\"z\\"', b'\\"y\\"').replace(b', \\"y\\"]', b"]       "), "gates.safetensors"),
    ):
        path.write_bytes(content)
        with pytest.raises(ProfileError, match=message):
            GateGradients.load(path)


def test_parts_that_do_not_fit_are_told(tiny_model: TinyVGGT) -> None:
    good = made(tiny_model)
    for changes, message in (
        ({"scenes": ()}, "need scenes and sites"),
        ({"sites": ("a",)}, "'camera' have shape"),
        ({"points": good.points[..., :2]}, "'points' have shape"),
        ({"points": good.points.float()}, "not finite float64"),
        ({"camera": good.camera / 0}, "not finite float64"),
    ):
        with pytest.raises(ProfileError, match=message):
            replace(good, **changes)


def test_gradients_of_another_model_are_told(tiny_model: TinyVGGT, rooms: list[Scene]) -> None:
    found = gate_gradients(tiny_model, rooms[:1], eps=EPS)
    sites = resolve_adapter(tiny_model).sites(tiny_model)
    found.check(sites, found.fingerprint)
    found.check(sites)
    for given, what in (
        (replace(found, fingerprint="0" * 16), "weights"),
        (replace(found, sites=("a", "b")), "sites"),
        (replace(found, camera=found.camera[..., :2], points=found.points[..., :2]), "heads"),
    ):
        with pytest.raises(ProfileMismatch, match=f"measured with {what}"):
            given.check(sites, found.fingerprint)
