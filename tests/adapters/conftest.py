"""Small instances of the upstream models, built from the user's own checkouts where there are any.

`HESS_TEST_VGGT`, `HESS_TEST_PI3`, `HESS_TEST_OMEGA` and `HESS_TEST_DA3` name checkouts (several separated by the path
separator); without them an importable package is used. Depth Anything 3 is on PyPI, from where it is had otherwise;
the tests of the others are skipped.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from hess_plugin.scenes.scene import Scene

DA3_WHEEL = "depth_anything_3-0.1.1-py3-none-any.whl"
DA3_HASH = "d7de119f5d235bb06044d83e0e41ee63dee7f30126776b23d648e4dbcf106542"


@contextmanager
def upstream(package: str, checkout: str) -> Iterator[None]:
    """Import `package` afresh from one checkout, so that old and new code can be tested in one process."""
    stale = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == package}
    sys.path.insert(0, checkout)
    try:
        yield
    finally:
        sys.path.remove(checkout)
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            del sys.modules[name]
        sys.modules.update(stale)


def checkouts(package: str, variable: str) -> list[str]:
    """The checkouts to test against; empty if there is none."""
    if os.environ.get(variable):
        return [path for path in os.environ[variable].split(os.pathsep) if path]
    spec = importlib.util.find_spec(package)
    if spec is None:
        return []
    places = list(spec.submodule_search_locations or [])
    return [str(Path(places[0]).parent)] if places else []


@pytest.fixture
def checkouts_of() -> Callable[[str, str], list[str]]:
    """`checkouts`, of a package and an environment variable."""
    return checkouts


@pytest.fixture
def upstream_of() -> Callable[[str, str], AbstractContextManager[None]]:
    """`upstream`, for a package and its checkout."""
    return upstream


def shrink_vggt(monkeypatch: pytest.MonkeyPatch) -> type[nn.Module]:
    """Make upstream's VGGT class build a small model; the class is then called without arguments that matter."""
    module = importlib.import_module("vggt.models.vggt")
    settings: dict[str, object] = {"depth": 2, "num_heads": 4, "patch_embed": "conv"}
    if "cached_layer_indices" in module.Aggregator.__init__.__code__.co_varnames:
        settings["cached_layer_indices"] = (0, 1)
    monkeypatch.setattr(module, "Aggregator", partial(module.Aggregator, **settings))
    monkeypatch.setattr(module, "CameraHead", partial(module.CameraHead, trunk_depth=1, num_heads=4))
    small = {"features": 32, "out_channels": [32] * 4, "intermediate_layer_idx": [0, 0, 1, 1]}
    monkeypatch.setattr(module, "DPTHead", partial(module.DPTHead, **small))

    # The code of 2025 has no enable_track and always builds the tracker.
    monkeypatch.setattr(module, "TrackHead", lambda **options: None)
    original_class = module.VGGT

    class Small(original_class):
        def __init__(self) -> None:
            super().__init__(img_size=56, embed_dim=64)

    monkeypatch.setattr(module, "VGGT", Small)
    return Small


def shrink_pi3(monkeypatch: pytest.MonkeyPatch, name: str, multimodal: bool = False) -> type[nn.Module]:
    """Make upstream's Pi3 or Pi3X class build a small model; Pi3X with its inputs for depth, rays and poses or not."""
    module = importlib.import_module(f"pi3.models.{name}")
    vision = importlib.import_module("pi3.models.dinov2.models.vision_transformer")
    block = importlib.import_module("pi3.models.layers.block").BlockRope
    heads = importlib.import_module("pi3.models.layers.transformer_head")
    width, num_heads = (384, 6) if name == "pi3" else (1024, 16)
    blocks = 4

    def encoder(pretrained: bool = False) -> nn.Module:
        return vision.DinoVisionTransformer(
            img_size=56, patch_size=14, embed_dim=width, depth=1, num_heads=num_heads, mlp_ratio=1,
            num_register_tokens=4, init_values=1.0, block_chunks=0, interpolate_antialias=True, interpolate_offset=0.0,
        )  # fmt: skip

    monkeypatch.setattr(module, "dinov2_vitl14_reg", encoder)
    small = {"dec_embed_dim": 64, "dec_num_heads": 2, "depth": 1}
    for decoder in ("TransformerDecoder", "ContextOnlyTransformerDecoder"):
        if hasattr(module, decoder):
            original = getattr(heads, decoder)
            monkeypatch.setattr(module, decoder, lambda original=original, **options: original(**{**options, **small}))
    original_class = module.Pi3 if name == "pi3" else module.Pi3X
    original_init = original_class.__init__

    class Small(original_class):
        def __init__(self) -> None:
            count = itertools.count()
            made = lambda **o: block(**{**o, "mlp_ratio": 1}) if next(count) < blocks else nn.Identity()  # noqa: E731
            with pytest.MonkeyPatch.context() as patcher:
                patcher.setattr(module, "BlockRope", made)
                if name == "pi3":
                    original_init(self, decoder_size="small")
                else:
                    pose_block = module.PoseInjectBlock
                    patcher.setattr(module, "PoseInjectBlock", lambda **o: pose_block(**{**o, "mlp_ratio": 1}))
                    original_init(self, use_multimodal=multimodal)
            self.decoder = nn.ModuleList(list(self.decoder)[:blocks])

    monkeypatch.setattr(module, original_class.__name__, Small)
    return Small


def shrink_omega(monkeypatch: pytest.MonkeyPatch) -> type[nn.Module]:
    """Make upstream's VGGTOmega class build a narrow model: its depths are written into its code."""
    module = importlib.import_module("vggt_omega.models")
    original_class = module.VGGTOmega

    class Small(original_class):
        def __init__(self) -> None:
            super().__init__(embed_dim=64)

        def apply(self, fn: Callable[[nn.Module], None]) -> nn.Module:
            """Initialise; layer scales begin at 1e-5 and would let what attention does be lost in rounding."""
            super().apply(fn)
            for name, parameter in self.named_parameters():
                if name.endswith(".gamma"):
                    nn.init.constant_(parameter, 0.1)
            return self

    monkeypatch.setattr(module, "VGGTOmega", Small)
    return Small


def keep_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest released configuration of Depth Anything 3 is small enough."""


BUILDERS: dict[str, tuple[str, str, Callable[[pytest.MonkeyPatch], object]]] = {
    "vggt": ("vggt", "HESS_TEST_VGGT", shrink_vggt),
    "pi3": ("pi3", "HESS_TEST_PI3", partial(shrink_pi3, name="pi3")),
    "pi3x": ("pi3", "HESS_TEST_PI3", partial(shrink_pi3, name="pi3x")),
    "vggt-omega": ("vggt_omega", "HESS_TEST_OMEGA", shrink_omega),
    "da3-small": ("depth_anything_3", "HESS_TEST_DA3", keep_whole),
}


@pytest.fixture(scope="session")
def da3_wheel(pytestconfig: pytest.Config) -> str:
    """The folder with Depth Anything 3 from PyPI, kept in pytest's cache from one run to the next."""
    for needed in ("addict", "einops", "omegaconf"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"Depth Anything 3 needs {needed}: pip install -e '.[test]'")
    folder = pytestconfig.cache.mkdir("depth-anything-3")  # type: ignore[union-attr]
    unpacked = folder / DA3_HASH
    if not unpacked.is_dir():
        # Its metadata ask for a GPU's libraries and an old NumPy, which the network itself does not need.
        (folder / "wheel.txt").write_text(f"depth-anything-3==0.1.1 --hash=sha256:{DA3_HASH}\n")
        options = ["--no-deps", "--ignore-requires-python", "--only-binary=:all:", "--retries=1", "--timeout=15"]
        command = [sys.executable, "-m", "pip", "download", "-q", *options, "-r", "wheel.txt", "-d", "."]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or ["pip failed"])[-1]
            pytest.skip(f"no Depth Anything 3: HESS_TEST_DA3 names no checkout and pip cannot download it ({reason})")
        partial_folder = folder / f"unpacking-{os.getpid()}"
        with zipfile.ZipFile(folder / DA3_WHEEL) as wheel:
            wheel.extractall(partial_folder)
        partial_folder.rename(unpacked)
    return str(unpacked)


def upstream_cases(*models: str) -> list[object]:
    """One case for each model and checkout; a skipped one, with the reason, for a model without a checkout."""
    cases: list[object] = []
    for model in models or BUILDERS:
        package, variable, _ = BUILDERS[model]
        found = checkouts(package, variable)
        for checkout in found:
            cases.append(
                pytest.param((model, checkout), id=f"{model}-{Path(checkout).name}", marks=pytest.mark.upstream)
            )
        if not found and model == "da3-small":
            cases.append(pytest.param((model, ""), id=f"{model}-wheel"))
        elif not found:
            reason = f"no upstream code for {model}: `{package}` is not importable and {variable} names no checkout"
            marks = [pytest.mark.upstream, pytest.mark.skip(reason=reason)]
            cases.append(pytest.param((model, ""), id=f"{model}-missing", marks=marks))
    return cases


@pytest.fixture(params=upstream_cases())
def small_upstream(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """A model name whose upstream class builds a small model while the test runs, and its checkout."""
    name, checkout = request.param
    package, _, shrink = BUILDERS[name]
    checkout = checkout or request.getfixturevalue("da3_wheel")
    with upstream(package, checkout), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # upstream's own deprecations and missing optional packages
        shrink(monkeypatch)
        yield name, checkout


@pytest.fixture(params=upstream_cases("pi3x"))
def multimodal_pi3x(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[nn.Module]:
    """A small Pi3X as it is by default: it also takes depth, rays and poses."""
    with upstream("pi3", request.param[1]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        yield shrink_pi3(monkeypatch, "pi3x", multimodal=True)().eval()


@pytest.fixture(params=upstream_cases("da3-small"))
def da3_net(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    """The network of Depth Anything 3 in its smallest released configuration; its code can be imported meanwhile."""
    from hess_plugin.plugins import load_model

    with (
        upstream("depth_anything_3", request.param[1] or request.getfixturevalue("da3_wheel")),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield load_model("da3-small", "random", device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(params=upstream_cases("vggt-omega"))
def omega_code(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """VGGT-Omega's code can be imported meanwhile, and builds a narrow model."""
    with upstream("vggt_omega", request.param[1]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shrink_omega(monkeypatch)
        yield


@pytest.fixture
def upstream_model(small_upstream: tuple[str, str]) -> nn.Module:
    """A small instance of the upstream model, weights random but the same in every run."""
    from hess_plugin.plugins import load_model

    return load_model(small_upstream[0], "random", device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture
def small_scene(request: pytest.FixtureRequest) -> Scene:
    """Three views of a textured plane with known depth, 4 x 5 patches."""
    omega = "small_upstream" in request.fixturenames and request.getfixturevalue("small_upstream")[0] == "vggt-omega"
    return plane_scene(3, 64, 80) if omega else plane_scene(3, 56, 70)


@pytest.fixture(scope="session")
def plane() -> Callable[[int, int, int], Scene]:
    """`plane_scene`, for a number of views, a height and a width."""
    return plane_scene


def plane_scene(views: int, height: int, width: int, *, seed: int = 0) -> Scene:
    """Cameras side by side before a plane at depth 2, with random texture."""
    generator = torch.Generator().manual_seed(seed)
    c2w = torch.eye(4).repeat(views, 1, 1)
    c2w[:, 0, 3] = torch.arange(views) * 0.3
    c2w[:, 1, 3] = (torch.arange(views) % 2) * 0.2
    intrinsics = torch.tensor([[50.0, 0, width / 2 - 0.5], [0, 50.0, height / 2 - 0.5], [0, 0, 1]]).repeat(views, 1, 1)
    return Scene(
        name=f"plane-{seed}",
        images=torch.rand(views, 3, height, width, generator=generator),
        c2w=c2w,
        intrinsics=intrinsics,
        depth=torch.full((views, height, width), 2.0) + 0.2 * torch.rand(views, height, width, generator=generator),
    )
