"""Every line of the checklist fails for an adapter that breaks what it says, and the line says what to do."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import hess_plugin
from hess_plugin import (
    AdapterError,
    Family,
    JoinedLayers,
    PatchError,
    Prediction,
    TokenLayout,
    attention,
    fused_site,
    hookimpl,
    intercept,
)
from hess_plugin.cli import main
from hess_plugin.contract import exactness, little_memory
from hess_plugin.contract.case import Case
from hess_plugin.demo.rooms import make_scene
from hess_plugin.memory import chunks
from hess_plugin.plugins import get_plugin_manager, register, resolve_adapter
from hess_plugin.registration.registry import Registry
from hess_plugin.scenes.scene import Scene
from hess_plugin.testing import CHECKS, Check, check_adapter, require

ROOT = Path(__file__).resolve().parents[1]
TOY = ROOT / "examples/hess-plugin-toy/src"


def _load(path: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


networks = _load(ROOT / "tests/strangers/mynet/model.py", "mynet_of_the_contract_tests")
Hooks = dict[str, Callable[..., Any]]


def sites(model: Any) -> Any:
    return [fused_site(model, f"mynet_blocks.{i}", "") for i in range(1, len(model.mynet_blocks), 2)]


def layout(model: Any, args: Any, kwargs: Any) -> TokenLayout:
    images = args[0] if args else kwargs["images"]
    grid = (images.shape[-2] // model.patch, images.shape[-1] // model.patch)
    return TokenLayout(images.shape[1], grid[0] * grid[1], leading=model.special, grid=grid)


def predict(model: Any, images: Tensor) -> Prediction:
    output = model(images[None])
    return Prediction(output["c2w"][0], output["points"][0], output["conf"][0], min_confidence=0.0)


def manager_of(hooks: Hooks) -> Registry:
    """An adapter for MyNet with some hooks exchanged."""
    manager, module = get_plugin_manager(entry_points=False), types.ModuleType("mine")
    kept: Hooks = {
        "hess_claim_model": lambda model: hasattr(model, "mynet_blocks"),
        "hess_find_global_attention": sites,
        "hess_token_layout": layout,
        "hess_predict": predict,
    }
    for name, hook in {**kept, **hooks}.items():
        setattr(module, name, hookimpl(hook))
    register(manager, module, "mine")
    return manager


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return networks.MyNet().eval()


@pytest.fixture(scope="module")
def scene() -> Scene:
    return make_scene(11, views=4, image_size=56)


def problems(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.problem for check in checks if check.problem is not None}


def changed(**fields: Callable[[Tensor], Any]) -> Hooks:
    """The prediction with some fields changed."""

    def hess_predict(model: Any, images: Tensor) -> Prediction:
        right = predict(model, images)
        new = {name: change(getattr(right, name)) for name, change in fields.items()}
        return dataclasses.replace(right, **new)

    return {"hess_predict": hess_predict}


def family(**fields: Any) -> Hooks:
    return {"hess_describe_family": lambda model: Family(**fields)}


def site_with(**fields: Any) -> Hooks:
    return {"hess_find_global_attention": lambda model: [dataclasses.replace(s, **fields) for s in sites(model)]}


def transposed(model: Any, images: Tensor) -> Prediction:
    right = predict(model, images)
    return Prediction(right.c2w, right.points.transpose(1, 2), right.confidence.transpose(1, 2), 0.0)


def counted_batch(model: Any, args: Any, kwargs: Any) -> TokenLayout:
    found = layout(model, args, kwargs)
    images = args[0] if args else kwargs["images"]
    return dataclasses.replace(found, frames=images.shape[0] * images.shape[1])


def remembering() -> Callable[..., Any]:
    first: list[TokenLayout] = []

    def hess_token_layout(model: Any, args: Any, kwargs: Any) -> TokenLayout:
        first.append(layout(model, args, kwargs))
        return first[0]

    return hess_token_layout


def swallowing() -> Callable[..., Any]:
    last: list[Prediction] = []

    def hess_predict(model: Any, images: Tensor) -> Prediction:
        with contextlib.suppress(Exception):
            last.append(predict(model, images))
        return last[-1]

    return hess_predict


def doubling(site: Any, attend: Any) -> Any:
    return intercept(site, attend, forward=lambda self, x: 2 * type(self).forward(self, x))


def not_in_half(site: Any, attend: Any) -> Any:
    def forward(self: Any, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("no half")
        result: Tensor = type(self).forward(self, x)
        return result

    return intercept(site, attend, forward=forward)


class Careless:
    """A replacement that is written by hand, bound to the module it was made for."""

    def __init__(self, site: Any, attend: Any, mark: bool) -> None:
        self.module, self.mark, own = site.module, mark, type(site.module)

        def forward(x: Tensor) -> Tensor:
            q, k, v = self.module.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
            result: Tensor = x + self.module.proj(attend(q, k, v).transpose(1, 2).flatten(2))
            return result

        assert own.__name__ == "Block"
        self.module.forward = forward

    def remove(self) -> None:
        self.module.__dict__.pop("forward", None)
        if self.mark:
            self.module.left_behind = True


class Leaking:
    """A replacement that turns its function mode on and off by hand, not in a with statement."""

    def __init__(self, site: Any, attend: Any) -> None:
        self.module, own = site.module, type(site.module).forward

        class Mode(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                answer = attend if func is torch.nn.functional.scaled_dot_product_attention else func
                return answer(*args, **(kwargs or {}))

        def forward(x: Tensor) -> Tensor:
            mode = Mode()
            mode.__enter__()
            result: Tensor = own(self.module, x)
            mode.__exit__(None, None, None)
            return result

        self.module.forward = forward

    def remove(self) -> None:
        self.module.__dict__.pop("forward", None)


class Changing(Careless):
    """A replacement that leaves another value in an attribute, under the same name."""

    def remove(self) -> None:
        super().remove()
        self.module.training = True


def not_over_its_own() -> Callable[..., Any]:
    """A replacement that refuses what it replaced itself, and does not look for anybody else."""

    def hess_replace_attention(site: Any, attend: Any) -> Any:
        if getattr(vars(site.module).get("forward"), "__name__", "") == "forward":
            raise PatchError("replaced already.")
        return Careless(site, attend, False)

    return hess_replace_attention


def read_layers(*read: int) -> JoinedLayers:
    return JoinedLayers("mynet_blocks", ("mynet_blocks", "mynet_blocks"), read)


LENGTH = "the token layout has the length of the attention sequence"
PREDICTION = "a prediction has cameras, points and confidence of every view"
FAMILY = "the family's settings fit the model"
DENSE = next(name for name, _, _ in CHECKS if name.startswith("at sparsity 0"))
SITES = "sites are modules of the model with their projections"
ROWS = "the rows of W_Q, W_K and W_V are those of their heads"
LITTLE = "inference in little memory predicts the same"
NAMED = "a call by name has the same token layout"
REFUSED = "attention that is replaced already is refused"
EXCEPTION = "an exception inside a patched forward leaves nothing behind"
GRADIENT = "errors have a gradient at every site"
WRONG: dict[str, tuple[Hooks, str, str]] = {
    "camera weight": (family(camera_weight=2.0), FAMILY, "give a share, 0 to 1"),
    "string": (family(blocks="mynet_blocks"), FAMILY, "give a tuple of names: ('mynet_blocks',)"),
    "unknown block": (family(frame_heads=("heads",)), FAMILY, "names 'heads', which the model does not have"),
    "unknown separable": (family(separable=(("point_head", 1), ("nosuch.module", 0))), FAMILY,
                          "names 'nosuch.module', which the model does not have"),
    "separable without axis": (family(separable=("point_head",)), FAMILY, "give pairs of a name and an axis"),
    "axis": (family(separable=(("point_head", -1),)), FAMILY, "give pairs of a name and an axis"),
    "unknown layers": (family(joined_layers=JoinedLayers("nowhere", ("mynet_blocks", "mynet_blocks"), (0,))), FAMILY,
                       "names 'nowhere', which the model does not have"),
    "uneven layers": (family(joined_layers=JoinedLayers("", ("mynet_blocks", "point_head"), (0,))), FAMILY,
                      "joins 4 blocks with 0"),
    "no such layer": (family(joined_layers=read_layers(0, 4)), FAMILY, "reads layer 4 of 4; count from 0"),
    "last layer": (family(joined_layers=read_layers(-1)), FAMILY, "reads layer -1 of 4; count from 0"),
    "mixes tokens": (family(separable=(("point_head", 1), ("mynet_blocks.2", 1))), LITTLE,
                     "; Family(separable=...) has ('mynet_blocks.2', 1), name there only what treats"),
    "mixes frames": (family(separable=(("embed", 0), ("", 1))), LITTLE, "Family(separable=...) has ('', 1)"),
    "head that mixes": (family(frame_heads=("mynet_blocks.2",)), LITTLE,
                        "Family(frame_heads=...) has 'mynet_blocks.2', name there only heads that treat frames"),
    "position alone": ({"hess_token_layout": lambda model, args: layout(model, args, {})}, NAMED,
                       "take what may come by name from there: args[0] if args else kwargs['images']"),
    "other by name": ({"hess_token_layout": lambda model, args, kwargs: layout(model, args, kwargs) if args
                       else TokenLayout(4, 17)}, NAMED, "hess_token_layout announced TokenLayout(frames=4, patches=17"),
    "heads": (site_with(num_heads=2), ROWS,
              "attention of mynet_blocks.1 has 4 heads of width 8, its site says 2 of 8; correct num_heads"),
    "no projection": (site_with(projections={}), SITES, "give Site(projections=...) q, k and v"),
    "half": (changed(points=Tensor.half), PREDICTION, "return points.float() from hess_predict"),
    "nan": (changed(points=lambda p: p * torch.nan), PREDICTION, "not finite"),
    "scaled": (changed(c2w=lambda p: p * torch.tensor([2.0, 1, 1, 1])), PREDICTION, "is not a rotation"),
    "mirrored": (changed(c2w=lambda p: p * torch.tensor([-1.0, 1, 1, 1])), PREDICTION, "mirrors"),
    "row": (changed(c2w=lambda p: p + torch.eye(4)[3]), PREDICTION, "the last row of c2w is not 0 0 0 1"),
    "threshold": (changed(min_confidence=lambda c: "low"), PREDICTION, "is a str; give a number"),
    "axes": ({"hess_predict": transposed}, PREDICTION, "exchange the two axes"),
    "one view": (changed(c2w=lambda p: p[:1], points=lambda p: p[:1], confidence=lambda p: p[:1]), PREDICTION,
                 "1 poses for 4 views"),
    "length": ({"hess_token_layout": lambda model, args: TokenLayout(4, 16, leading=2)}, LENGTH,
               "attends over 68 tokens, hess_token_layout announced 72"),
    "frames": ({"hess_token_layout": lambda model, args: TokenLayout(1, 68)}, LENGTH, "1 frames for 4 views"),
    "no layout": (site_with(layout_module="depth_head"), LENGTH, "name the module whose forward gets the images"),
    "not called": ({"hess_find_global_attention": lambda model: [*sites(model), fused_site(model, "spare", "")]},
                   LENGTH, "spare was not called; leave it out"),
    "doubled": ({"hess_replace_attention": doubling}, DENSE, "more than rounding; the forward given to intercept"),
    "remembered": ({"hess_token_layout": remembering()}, "forwards of several sizes do not disturb each other",
                   "the model's inputs announced 68"),
    "batch": ({"hess_token_layout": counted_batch}, "scenes in a batch do not disturb each other", "announced 136"),
    "not in half": ({"hess_replace_attention": not_in_half}, "it runs in half precision", "RuntimeError: no half"),
    "left": ({"hess_replace_attention": lambda site, attend: Careless(site, attend, True)},
             "removing a patch leaves no trace", "attributes changed; remove() has to put it back"),
    "changed": ({"hess_replace_attention": lambda site, attend: Changing(site, attend, False)},
                  "removing a patch leaves no trace", "mynet_blocks.1: attribute training changed"),
    "replaced twice": ({"hess_replace_attention": lambda site, attend: Careless(site, attend, False)}, REFUSED,
                       "a forward that hess_plugin had replaced was replaced again"),
    "another tool": ({"hess_replace_attention": not_over_its_own()}, REFUSED,
                     "a forward that another tool had replaced was replaced again"),
    "leaked": ({"hess_replace_attention": lambda site, attend: Leaking(site, attend)}, EXCEPTION,
               "a function mode is still on"),
    "swallowed": ({"hess_predict": swallowing()}, EXCEPTION, "do not catch errors of the model"),
    "closure": ({"hess_replace_attention": lambda site, attend: Careless(site, attend, False)},
                "a deepcopy of a patched model runs by itself", "build hess_replace_attention on hess_plugin.inter"),
    "detached": (changed(c2w=Tensor.detach, points=Tensor.detach), GRADIENT, "no gradient with respect to the model"),
    "not alone": (family(frame_heads=("mynet_blocks.1",)),
                  "measuring in little memory gives the same traces and leaves no trace", "name only heads that"),
}  # fmt: skip


@pytest.mark.parametrize("hooks, name, words", WRONG.values(), ids=WRONG)
def test_a_broken_adapter_fails_its_line_with_what_to_do(
    model: Any, scene: Scene, hooks: Hooks, name: str, words: str
) -> None:
    model.spare = networks.Block().eval()
    checks = check_adapter(model, scene, manager=manager_of(hooks), block=8)
    found = problems(checks)
    assert words in found.get(name, "nothing"), found
    assert all("\n" not in str(check) for check in checks)
    # What a failure makes pointless is not run, and says so, instead of failing for the same reason.
    for check in checks:
        assert check.unknown is None or check.unknown.startswith("it needs that"), str(check)
    with pytest.raises(AdapterError, match=r"does not keep the contract:\n\[ok\]"):
        require(checks)


def test_a_right_adapter_passes_every_line(model: Any, scene: Scene) -> None:
    checks = check_adapter(model, scene, manager=manager_of({}), block=8)
    require(checks)
    assert len(checks) == len(CHECKS) == 22 and all(str(check).startswith("[ok]   ") for check in checks)


def test_every_line_is_broken_by_some_test_here() -> None:
    broken = {name for _, name, _ in WRONG.values()}
    others = {
        "exactly one adapter claims the model",
        "the model is in eval mode",
        "the chosen backend agrees with the plain reference",
        "a patched forward drops the share asked for",
        "calibrating gives a profile that patches the model",
    }
    assert broken | others == {name for name, _, _ in CHECKS} and not broken & others


def test_a_prediction_that_fails_is_told_once(model: Any, scene: Scene) -> None:
    checks = check_adapter(model, scene, manager=manager_of({"hess_predict": lambda model, images: {}["no"]}), block=8)
    assert list(problems(checks)) == [PREDICTION]
    assert "failed in hess_predict: KeyError: 'no' (test_contract_suite.py line " in problems(checks)[PREDICTION]
    assert sum(str(check).endswith(f"not checked, it needs that {PREDICTION}") for check in checks) >= 2


def test_an_adapter_that_does_not_claim_the_model(model: Any, scene: Scene) -> None:
    manager = manager_of({})
    right: Any = manager.get_plugin("mine")
    other = types.ModuleType("other")
    for name in dir(right):
        if name.startswith("hess_"):
            setattr(other, name, getattr(right, name))
    other.hess_claim_model = hookimpl(lambda model: False)  # type: ignore[attr-defined]
    register(manager, other, "other")
    found = problems(check_adapter(model, scene, adapter="other", manager=manager, block=8))
    assert found == {
        "exactly one adapter claims the model": "'mine' claims it, not 'other'; make hess_claim_model look at more "
        "attributes"
    }


def test_a_part_in_training_mode(model: Any, scene: Scene) -> None:
    model.mynet_blocks[2].train()
    found = problems(check_adapter(model, scene, manager=manager_of({}), block=8))
    assert found["the model is in eval mode"].startswith("mynet_blocks.2 is in training mode; call model.eval()")


@pytest.mark.parametrize("network", ["OtherOrderNet"])
def test_rows_that_are_another_projections_are_named(scene: Scene, network: str) -> None:
    torch.manual_seed(0)
    model = getattr(networks, network)().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = problems(check_adapter(model, scene, manager=manager_of({}), block=8))
    assert found == {
        "the rows of W_Q, W_K and W_V are those of their heads": "changing the rows of W_Q of head 3 at mynet_blocks.1 "
        "changed k of head 3; the projection is packed in another order: give Site(projections=...) the rows where q "
        "starts"
    }
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_backends_that_disagree(model: Any, scene: Scene) -> None:
    noisy = changed(points=lambda points: points + torch.randn_like(points))
    case = Case(model, scene, resolve_adapter(model, None, manager_of(noisy)), 8, 0.5)
    assert "points of two backends differ by" in str(exactness.reference_agrees(case))


def test_a_scene_that_is_too_small_for_its_blocks(model: Any, scene: Scene) -> None:
    found = problems(check_adapter(model, scene, manager=manager_of({}), block=64))
    assert "give a scene with more patches or smaller blocks" in found["a patched forward drops the share asked for"]
    assert "smaller blocks" in found["calibrating gives a profile that patches the model"]


def test_a_leaked_function_mode_is_told_and_taken_away(model: Any, scene: Scene) -> None:
    plain = predict(model, scene.images).points
    check_adapter(
        model,
        scene,
        manager=manager_of({"hess_replace_attention": lambda site, attend: Leaking(site, attend)}),
        block=8,
    )
    assert not torch.overrides._get_current_function_mode_stack()
    assert torch.equal(predict(model, scene.images).points, plain)


def test_what_a_model_changes_itself_is_not_put_on_the_patch(model: Any, scene: Scene) -> None:
    def note(module: Any, args: Any, output: Any) -> None:
        module.calls = getattr(module, "calls", 0) + 1
        module.last = output.detach()

    for part in (model.mynet_blocks[1], model.point_head):
        part.register_forward_hook(note)
    found = problems(check_adapter(model, scene, manager=manager_of({}), block=8))
    assert found == {}


def test_a_model_whose_arguments_have_no_names(scene: Scene) -> None:
    class Nameless(networks.MyNet):  # type: ignore[misc, name-defined]
        def forward(self, *inputs: Tensor) -> Any:
            return super().forward(*inputs)

    torch.manual_seed(0)
    checks = check_adapter(Nameless().eval(), scene, manager=manager_of({}), block=8)
    require(checks)
    (told,) = [str(check) for check in checks if check.unknown]
    assert NAMED in told and "takes arguments by position alone" in told


def test_a_batch_of_which_nothing_can_be_compared_is_not_said_to_hold(scene: Scene) -> None:
    class Flat(networks.MyNet):  # type: ignore[misc, name-defined]
        """Returns the views of all scenes in one axis."""

        def forward(self, images: Tensor) -> Any:
            return {name: value.flatten(0, 1) for name, value in super().forward(images).items()}

    def hess_predict(model: Any, images: Tensor) -> Prediction:
        output = model(images[None])
        return Prediction(output["c2w"], output["points"], output["conf"], min_confidence=0.0)

    torch.manual_seed(0)
    checks = check_adapter(Flat().eval(), scene, manager=manager_of({"hess_predict": hess_predict}), block=8)
    require(checks)
    (told,) = [str(check) for check in checks if check.unknown]
    assert told.endswith("not checked, the model returns nothing that has an axis for the scenes of a batch")


def test_pieces_are_as_small_as_they_can_be_and_then_as_before(model: Any, scene: Scene) -> None:
    before, lengths = (chunks.CHUNK, attention.GROUP), []
    model.point_head = nn.Sequential(model.point_head).eval()
    model.point_head[0].register_forward_hook(lambda module, args, output: lengths.append(args[0].shape[1]))
    manager = manager_of(family(frame_heads=("point_head",)))
    case = Case(model, scene, resolve_adapter(model, None, manager), 8, 0.5)
    assert little_memory.lean_predicts_the_same(case) is None
    assert 2 in lengths and 4 in lengths and before == (chunks.CHUNK, attention.GROUP)


def test_a_model_of_strict_sizes_needs_a_framing(model: Any, scene: Scene) -> None:
    def strict(module: nn.Module, args: tuple[Tensor]) -> None:
        if args[0].shape[-1] % 14 or args[0].shape[-2] % 14:
            raise ValueError("sides must be multiples of 14")

    model.register_forward_pre_hook(strict)
    name = "a prediction has cameras, points and confidence of every view"
    found = problems(check_adapter(model, scene, manager=manager_of({}), block=8))
    assert "multiples of 14" in found[name] and "Framing(multiple=...)" in found[name]
    framed = family(framing=hess_plugin.Framing(14))
    assert problems(check_adapter(model, scene, manager=manager_of(framed), block=8)) == {}


def test_what_cannot_be_told_says_why_and_does_not_fail(model: Any, scene: Scene) -> None:
    def refuse(*_: object) -> None:
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("no bfloat16 kernel")

    model.point_head.register_forward_hook(refuse)
    checks = check_adapter(model, scene, manager=manager_of({}), block=8)
    require(checks)
    (told,) = [str(check) for check in checks if check.unknown]
    assert told.startswith(
        "[-]    it runs in half precision: not checked, the unpatched model does not run in bfloat16"
    )
    assert "no bfloat16 kernel" in told


# ---------------------------------------------------------------- the command


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="hess-patch")

    return run


def test_check_of_the_demo_model(invoke: Callable[..., Result]) -> None:
    result = invoke("check", "--model", "demo", "--views", 3)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == (
        "adapter 'vggt' on TinyVGGT: 3 views of 60 x 60 pixels, blocks of 8, sparsity 0.5"
    )
    assert result.stdout.endswith("22 hold, 0 fail, 0 not checked\n") and result.stderr == ""
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("name", ["toy", "toy-spelled"])
def test_check_of_the_example(invoke: Callable[..., Result], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TOY)  # installed by test_toy_example
    result = invoke("check", "--plugin", TOY / "hess_plugin_toy/adapter.py", "--model", name)
    assert result.exit_code == 0, result.output
    assert "21 hold, 0 fail, 1 not checked" in result.stdout and "the model takes one scene at a time" in result.stdout
    assert "WARNING: random weights" in result.stderr


def test_check_fails_with_exit_code_1(
    invoke: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(TOY)
    source = (TOY / "hess_plugin_toy/adapter.py").read_text()
    (tmp_path / "mine.py").write_text(source.replace("trailing=model.pose_tokens, tail=1", "trailing=3, tail=1"))
    result = invoke("--plugin", "mine.py", "check", "--model", "toy")
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert "[FAIL] the token layout has the length" in result.stdout and "Traceback" not in result.output
    counts = result.stdout.splitlines()[-1]
    assert " 0 fail" not in counts and counts.endswith("not checked")
    assert json.loads(invoke("--plugin", "mine.py", "plugins").stdout)


def test_check_refuses_a_size_that_the_family_does_not_take(invoke: Callable[..., Result]) -> None:
    result = invoke("check", "--model", "demo", "--size", 61)
    assert result.exit_code == 2 and "--size 61 is no multiple of 10" in result.stderr
