"""The adapter guide is true: every block of code in it runs, and every error it quotes is raised."""

from __future__ import annotations

import json
import re
import shlex
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

import hess_plugin
from hess_plugin import HessError, Profile
from hess_plugin.cli import main
from hess_plugin.demo.rooms import make_scene
from hess_plugin.plugins import get_plugin_manager, hook_names, register
from hess_plugin.registration.files import load_file
from hess_plugin.registration.registry import Registry
from hess_plugin.scenes.scene import Scene
from hess_plugin.testing import Check, check_adapter, require

ROOT = Path(__file__).resolve().parents[1]
GUIDE = (ROOT / "adapters/README.md").read_text(encoding="utf-8")
CHECKOUT = ROOT / "tests/strangers"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
SECTIONS = dict(
    part.split("\n", 1) for part in re.split(r"^##+ ", re.sub(r"\A# ", "## ", GUIDE), flags=re.MULTILINE)[1:]
)
FIXES = {
    "Attention spelled out as a softmax": "SpelledOutNet",
    "Packed qkv in another order": "OtherOrderNet",
    "A second attention inside the block": "TwofoldNet",
}


def blocks(section: str, language: str) -> list[str]:
    """The blocks of one language between a heading and the next."""
    return [code for found, code in BLOCK.findall(SECTIONS[section]) if found == language]


FINISHED = blocks("Write an adapter in 30 lines", "python")[0]


def adapter_of(*codes: str) -> types.ModuleType:
    """A file whose later blocks replace hooks of the earlier ones."""
    module = types.ModuleType("hess_plugin_mynet")
    for code in codes:
        exec(compile(code, "adapters/README.md", "exec"), module.__dict__)
    return module


def manager_of(*codes: str) -> Registry:
    manager = get_plugin_manager(entry_points=False)
    register(manager, adapter_of(*codes), "mynet")
    return manager


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """The model's own code, imported from its checkout."""
    monkeypatch.syspath_prepend(CHECKOUT)
    import mynet.model  # type: ignore[import-not-found]

    yield mynet.model
    for name in [name for name in sys.modules if name.partition(".")[0] == "mynet"]:
        del sys.modules[name]


def tiny(networks: types.ModuleType, name: str = "MyNet") -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = getattr(networks, name)().eval()
    return model


@pytest.fixture(scope="module")
def scene() -> Scene:
    return make_scene(11, views=4, image_size=56)


def failed(checks: list[Check]) -> str:
    return "\n".join(str(check) for check in checks if check.problem)


# ---------------------------------------------------------------- the code


def test_every_block_of_the_guide_is_run_by_a_test_here() -> None:
    run = ["Write an adapter in 30 lines", "Run it in a minute", "See what is installed", "Check it", *FIXES]
    run.append("Say more about the family")
    assert {section for section, text in SECTIONS.items() if BLOCK.search(text)} == set(run)
    assert {language for language, _ in BLOCK.findall(GUIDE)} == {"python", "bash", "toml"}
    counts = {section: len(BLOCK.findall(SECTIONS[section])) for section in run}
    assert counts == {**dict.fromkeys(run, 1), "Run it in a minute": 2, "Check it": 2}
    assert GUIDE.count("```") == 2 * sum(counts.values())


def test_the_finished_file_is_short_and_keeps_the_contract(networks: types.ModuleType, scene: Scene) -> None:
    assert len([line for line in FINISHED.splitlines() if line.strip()]) <= 30
    model = tiny(networks)
    for codes in ((FINISHED,), (FINISHED, *blocks("Say more about the family", "python"))):
        checks = check_adapter(model, scene, manager=manager_of(*codes), block=8)
        require(checks)
        assert not any(check.unknown for check in checks), "\n".join(map(str, checks))
    family = hess_plugin.resolve_adapter(model, manager=manager_of(*codes)).family(model)
    assert family.framing == hess_plugin.Framing(14, 518, "crop") and family.unused_heads == ("depth_head",)


def test_the_snippet_that_checks_runs(
    networks: types.ModuleType, scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "mynet.py").write_text(FINISHED)
    monkeypatch.setenv("HESS_PLUGINS", str(tmp_path / "mynet.py"))
    (snippet,) = blocks("Check it", "python")
    exec(compile(snippet, "adapters/README.md", "exec"), {"model": tiny(networks), "scene": scene})
    assert capsys.readouterr().out.count("[ok]") > 15


@pytest.mark.parametrize("section, network", FIXES.items())
def test_the_fixes_fix_what_the_default_does_not(
    networks: types.ModuleType, scene: Scene, section: str, network: str
) -> None:
    model = tiny(networks, network)
    (told,) = re.findall(r"You will see `(.*?)`", SECTIONS[section])
    without = check_adapter(model, scene, manager=manager_of(FINISHED), block=8)
    assert told in failed(without), failed(without)
    (fix,) = blocks(section, "python")
    assert len([line for line in fix.splitlines() if line.strip() and "import" not in line]) <= 10
    checks = check_adapter(model, scene, manager=manager_of(FINISHED, fix), block=8)
    require(checks)
    assert not any(check.unknown for check in checks)


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Result]]:
    """Run a line of the guide in a folder with mynet.py, the model's checkout in the home folder."""
    (tmp_path / "mynet.py").write_text(FINISHED)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "mynet").symlink_to(CHECKOUT)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(line: str) -> Result:
        program, *arguments = shlex.split(line)
        assert program == "hess-patch"
        arguments = [str(Path(a).expanduser()) if a.startswith("~") else a for a in arguments]
        return CliRunner().invoke(main, arguments, prog_name="hess-patch")

    yield run
    for name in [name for name in sys.modules if name.partition(".")[0] == "mynet"]:
        del sys.modules[name]


def test_the_commands_run(shell: Callable[[str], Result], tmp_path: Path) -> None:
    (sites,), (plugins,) = blocks("Run it in a minute", "bash"), blocks("See what is installed", "bash")
    (check,) = blocks("Check it", "bash")
    result = shell(sites)
    assert result.exit_code == 0, result.output
    assert "adapter mynet claims MyNet: 2 sites" in result.stdout and "mynet_blocks.3" in result.stdout
    result = shell(check)
    assert result.exit_code == 0, result.output
    assert "22 hold, 0 fail, 0 not checked" in result.stdout
    assert f"adapter 'mynet' of file {tmp_path / 'mynet.py'} on MyNet: 4 views of 56 x 56 pixels" in result.stdout
    assert {plugin["status"] for plugin in json.loads(shell(plugins).stdout)} <= {"ok", "broken", "disabled"}
    # The variable does the same as the option.
    (variable,) = re.findall(r"`(HESS_PLUGINS=\S+)`", SECTIONS["Run it in a minute"])
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(*variable.split("="))
        assert "mynet" in {plugin["name"] for plugin in json.loads(shell(plugins).stdout)}
    assert "mynet" not in {plugin["name"] for plugin in json.loads(shell(plugins).stdout)}


def test_the_entry_point_finds_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    (text,) = blocks("Run it in a minute", "toml")
    project = tomllib.loads(text)["project"]
    assert f"`{project['name']}`" in GUIDE
    assert len([line for line in text.splitlines() if line]) == 5
    ((group, entries),) = project["entry-points"].items()
    ((name, value),) = entries.items()
    (tmp_path / f"{value}.py").write_text(FINISHED)
    info = tmp_path / f"{value}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n")
    monkeypatch.syspath_prepend(tmp_path)
    manager = get_plugin_manager()
    assert str(manager.origins["mynet"]) == "package hess-plugin-mynet 0.1"
    sys.modules.pop(value)


def test_the_guide_names_only_what_exists() -> None:
    named = set(re.findall(r"\bhess_[a-z]+_[a-z_]+", GUIDE)) - {"hess_plugin_mynet", "hess_find_global_atention"}
    assert named <= set(hook_names())
    for target in re.findall(r"\]\(([^)]+)\)", GUIDE):
        assert (ROOT / "adapters" / target).exists(), target
    from hess_plugin.plugins import BUILT_IN

    for family in ("vggt", "pi3", "vggt-omega", "da3"):
        assert family in BUILT_IN


# ---------------------------------------------------------------- the errors

Provoke = Callable[[types.ModuleType, Scene, Path], object]
HEADINGS = [heading.strip("`") for heading in SECTIONS if heading.startswith("`")]


def wrong(old: str, new: str) -> str:
    """The finished file with a mistake in it."""
    assert old in FINISHED
    return FINISHED.replace(old, new)


def unclaimed(networks: types.ModuleType, scene: Scene, folder: Path) -> object:
    return hess_plugin.patch(tiny(networks), manager=get_plugin_manager(entry_points=False))


def claimed_twice(networks: types.ModuleType, scene: Scene, folder: Path) -> object:
    manager = manager_of(FINISHED)
    register(manager, adapter_of(FINISHED), "other")
    return hess_plugin.patch(tiny(networks), manager=manager)


def registering(code: str) -> Provoke:
    return lambda networks, scene, folder: manager_of(code)


def patching(code: str, network: str = "MyNet", views: int = 4) -> Provoke:
    def provoke(networks: types.ModuleType, scene: Scene, folder: Path) -> object:
        model, manager = tiny(networks, network), manager_of(code)
        with torch.no_grad(), hess_plugin.patch(model, sparsity=0.5, block_q=8, block_k=8, manager=manager):
            return hess_plugin.resolve_adapter(model, manager=manager).predict(model, scene.images[:views])

    return provoke


def taken(networks: types.ModuleType, scene: Scene, folder: Path) -> object:
    (folder / "vggt.py").write_text(FINISHED)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HESS_PLUGINS", str(folder / "vggt.py"))
        return get_plugin_manager()


def neighbour(networks: types.ModuleType, scene: Scene, folder: Path) -> object:
    (folder / "beside.py").write_text("")
    (folder / "mine.py").write_text(f"import beside\n{FINISHED}")
    return load_file(folder / "mine.py")


def unknown_block(networks: types.ModuleType, scene: Scene, folder: Path) -> object:
    (family,) = blocks("Say more about the family", "python")
    manager = manager_of(FINISHED, family.replace('"mynet_blocks",', '"layers",'))
    return hess_plugin.calibrate(tiny(networks), [scene], manager=manager, eps=1e6)


def other_profile(networks: types.ModuleType, scene: Scene, folder: Path) -> object:
    model = tiny(networks)
    profile = hess_plugin.calibrate(model, [scene], manager=manager_of(FINISHED), eps=1e6)
    assert isinstance(profile, Profile)
    fewer = manager_of(wrong("range(1, len(model.mynet_blocks), 2)", "range(1, 2)"))
    return hess_plugin.patch(model, profile=profile, manager=fewer)


A_TUPLE = wrong(
    'return Prediction(output["c2w"][0], output["points"][0], output["conf"][0], min_confidence=0.0)',
    'return output["c2w"][0], output["points"][0]',
)
ANOTHER_NAME = wrong(
    'return [fused_site(model, f"mynet_blocks.{i}", "")',
    'return [__import__("dataclasses").replace(fused_site(model, f"mynet_blocks.{i}", ""), name=f"blocks.{i}")',
)
PROVOKED: dict[str, Provoke] = {
    "no adapter claims": unclaimed,
    "is claimed by": claimed_twice,
    "did you mean": registering(wrong("hess_find_global_attention", "hess_find_global_atention")),
    "Argument(s)": registering(wrong("hess_predict(model, images)", "hess_predict(model, pictures)")),
    "without @hess_plugin.hookimpl": registering(wrong("@hookimpl\ndef hess_predict", "def hess_predict")),
    "a name that is taken": taken,
    "cannot be imported": neighbour,
    "failed in": patching(wrong('output["points"]', 'output["world_points"]')),
    "answered": patching(A_TUPLE),
    "names a site": patching(ANOTHER_NAME),
    "attention 0 times": patching(FINISHED, "SpelledOutNet"),
    "attention 2 times": patching(FINISHED, "TwofoldNet", views=1),  # where both are of one length
    "got a sequence": patching(wrong("leading=model.special, ", "")),
    "does not have": unknown_block,
    "the profile has": other_profile,
}


def test_every_quoted_error_is_provoked_once() -> None:
    assert len(HEADINGS) == len(PROVOKED) >= 12
    for words in PROVOKED:
        assert sum(words in heading for heading in HEADINGS) == 1, words


@pytest.mark.parametrize("words, provoke", PROVOKED.items(), ids=PROVOKED)
def test_quoted_errors_are_raised_word_for_word(
    networks: types.ModuleType, scene: Scene, tmp_path: Path, words: str, provoke: Provoke
) -> None:
    (heading,) = [heading for heading in HEADINGS if words in heading]
    with pytest.raises(HessError) as caught:
        provoke(networks, scene, tmp_path)
    assert re.fullmatch(".+".join(re.escape(part) for part in heading.split("…")), str(caught.value)), caught.value
