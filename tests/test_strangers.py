"""Adapters of others, installed or in a file: what works, what breaks, and that ours work all the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import hess_plugin
from hess_plugin import AdapterError, UnknownModel, hookimpl
from hess_plugin.cli import main
from hess_plugin.demo.model import TinyVGGT
from hess_plugin.plugins import BUILT_IN, describe_plugins, get_plugin_manager, load_model, register, resolve_adapter
from hess_plugin.registration.files import load_file, name_files, named_files
from hess_plugin.registration.registry import Origin

CPU: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
CLAIM = "from hess_plugin import hookimpl\n@hookimpl\ndef hess_claim_model(model):\n    return None\n"
Install = Callable[..., None]
Invoke = Callable[..., Result]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("HESS_PLUGINS", raising=False)
    monkeypatch.delenv("HESS_DISABLE_PLUGINS", raising=False)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("stranger"):
            del sys.modules[name]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Lay out an installed package: its metadata, its entry point and, unless it is gone, its module."""

    def lay(source: str | None, name: str = "mynet", package: str = "hess-plugin-mynet", **more: Any) -> None:
        module = more.get("module", f"stranger_{package.replace('-', '_')}")
        site = tmp_path / package
        info = site / f"{package.replace('-', '_')}-0.3.dist-info"
        info.mkdir(parents=True)
        if more.get("metadata", True):
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.3\n")
        (info / "entry_points.txt").write_text(f"[hess_plugin]\n{name} = {module}{more.get('attribute', '')}\n")
        if source is not None:
            (site / f"{module}.py").write_text(source)
        monkeypatch.syspath_prepend(site)

    return lay


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="hess-patch")

    return run


def assert_ours_work() -> None:
    manager = get_plugin_manager()
    assert resolve_adapter(TinyVGGT(), manager=manager).name == "vggt"
    assert isinstance(load_model("demo", "random", manager=manager, **CPU), TinyVGGT)


# ---------------------------------------------------------------- installed, and broken

BROKEN: dict[str, tuple[str | None, dict[str, Any], tuple[str, ...]]] = {
    "module gone": (None, {}, ("cannot be imported", "No module named 'stranger_hess_plugin_mynet'")),
    "import": ("import no_such_package_anywhere", {}, ("ModuleNotFoundError: No module named 'no_such_package",)),
    "name": ("from torch import no_such_name", {}, ("ImportError: cannot import name 'no_such_name'",)),
    "raises": ("1 / 0", {}, ("ZeroDivisionError: division by zero",)),
    "exits": ("import sys\nsys.exit(3)", {}, ("SystemExit: 3",)),
    "syntax": ("x = 1\ndef hess(:\n", {}, ("SyntaxError", "stranger_hess_plugin_mynet.py line 2")),
    "attribute": (CLAIM, {"attribute": ":Adapter"}, ("AttributeError", "'Adapter'")),
    "misspelt": (CLAIM.replace("claim_model", "claim_modle"), {}, ("hess_claim_modle is no hook, did you mean "
                 "hess_claim_model?",)),
    "unmarked and misspelt": (CLAIM + "def hess_predictt(model, images): ...", {}, ("hess_predictt is no hook",)),
    "unmarked": (CLAIM + "def hess_predict(model, images): ...", {}, ("hess_predict without @hess_plugin.hookimpl",)),
    "argument": (CLAIM.replace("(model)", "(model, colour)"), {}, ("colour",)),
    "no hooks": ("x = 1", {}, ("has no hook; mark functions such as hess_claim_model",)),
    "our name": (CLAIM, {"name": "vggt"}, ("taken by hess-plugin itself",)),
}  # fmt: skip


@pytest.mark.parametrize("source, options, words", BROKEN.values(), ids=BROKEN)
def test_a_broken_package_is_told_and_left_out(
    install: Install, source: str | None, options: dict[str, Any], words: tuple[str, ...]
) -> None:
    install(source, **options)
    name = options.get("name", "mynet")
    with pytest.warns(RuntimeWarning, match=f"adapter {name!r} of package hess-plugin-mynet 0.3 was left out") as told:
        manager = get_plugin_manager()
    sentence = str(told[0].message)
    assert len(told) == 1 and "\n" not in sentence and all(word in sentence for word in words), sentence
    assert "Repair or uninstall hess-plugin-mynet, or" in sentence
    assert sentence.endswith("HESS_DISABLE_PLUGINS=hess-plugin-mynet.")
    assert set(dict(manager.list_name_plugin())) == set(BUILT_IN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_ours_work()
        (left,) = [plugin for plugin in describe_plugins() if plugin["status"] != "ok"]
    assert (left["name"], left["package"], left["status"]) == (name, "hess-plugin-mynet 0.3", "broken")
    assert left["hooks"] == [] and all(word in str(left["why"]) for word in words)


@pytest.mark.parametrize("given", ["mynet", "other, mynet ,", "hess-plugin-mynet", "Hess_Plugin.MyNet"])
def test_a_disabled_package_is_left_out_without_a_word(
    install: Install, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    install("raise SystemExit('imported all the same')")
    monkeypatch.setenv("HESS_DISABLE_PLUGINS", given)
    assert_ours_work()  # warnings are errors here
    (left,) = [plugin for plugin in describe_plugins() if plugin["status"] != "ok"]
    assert (left["name"], left["status"], left["why"]) == ("mynet", "disabled", "HESS_DISABLE_PLUGINS names it")
    with pytest.raises(UnknownModel, match=r"'mynet'; .*; left out: mynet \(disabled\), see hess-patch plugins\.$"):
        load_model("mynet", "random", **CPU)
    with pytest.raises(UnknownModel, match=r"left out: mynet \(disabled\), see hess-patch plugins; write one"):
        resolve_adapter(torch.nn.Linear(1, 1))


def test_disabling_one_leaves_the_others_and_ours(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(CLAIM, name="one", package="hess-plugin-one")
    install(CLAIM, name="two", package="hess-plugin-two")
    monkeypatch.setenv("HESS_DISABLE_PLUGINS", "one,vggt,pi3")
    assert set(dict(get_plugin_manager().list_name_plugin())) == {*BUILT_IN, "two"}


def test_a_package_that_lost_its_metadata_is_still_named(install: Install) -> None:
    install(None, metadata=False)
    with pytest.warns(RuntimeWarning, match="adapter 'mynet' of package .*hess.plugin.mynet.* was left out: it cannot"):
        assert_ours_work()


def test_of_two_packages_with_one_name_the_second_is_told_of_the_first(install: Install) -> None:
    install(CLAIM, package="hess-plugin-a")
    install(CLAIM, package="hess-plugin-b")
    sentence = (
        r"'mynet' of package hess-plugin-b 0\.3 was left out: it has a name that is taken by package hess-plugin-a 0\.3"
        r"\. Repair or uninstall hess-plugin-b, or .*HESS_DISABLE_PLUGINS=hess-plugin-b\.$"
    )
    with pytest.warns(RuntimeWarning, match=sentence):
        manager = get_plugin_manager()
    assert str(manager.origins["mynet"]) == "package hess-plugin-a 0.3"
    with pytest.MonkeyPatch.context() as patched:  # the way out that was told is one
        patched.setenv("HESS_DISABLE_PLUGINS", "hess-plugin-b")
        assert str(get_plugin_manager().origins["mynet"]) == "package hess-plugin-a 0.3"


def test_the_commands_go_on_and_list_what_was_left_out(install: Install, tmp_path: Path) -> None:
    install("1 / 0")
    install(CLAIM, name="fine", package="hess-plugin-fine")
    sites = os.pathsep.join(str(tmp_path / name) for name in ("hess-plugin-mynet", "hess-plugin-fine"))

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command, environment = [sys.executable, "-m", "hess_plugin.cli", *arguments], {**os.environ, **variables}
        environment["PYTHONPATH"] = sites
        return subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=60, check=True)

    done = run("plugins")
    assert done.stderr.count("Warning: ") == done.stderr.count("Warning: adapter 'mynet' of package hess-plugin-m") == 1
    listed = {plugin["name"]: plugin for plugin in json.loads(done.stdout)}
    assert listed["mynet"]["status"] == "broken" and "division by zero" in listed["mynet"]["why"]
    assert listed["fine"]["status"] == listed["vggt"]["status"] == "ok" and listed["vggt"]["why"] is None
    assert all(set(plugin) == set(listed["vggt"]) for plugin in listed.values())
    done = run("sites", "--model", "demo")  # which makes two managers
    assert done.stderr.count("Warning: ") == 1 and "adapter vggt claims TinyVGGT: 4 sites" in done.stdout
    assert run("sites", "--model", "demo", HESS_DISABLE_PLUGINS="mynet").stderr == ""


# ---------------------------------------------------------------- hooks that fail or answer nonsense

OWNED = "adapter 'mynet' of package hess-plugin-mynet 0.3"


def stranger(**hooks: Callable[..., Any]) -> Any:
    """A manager with an installed adapter for TinyVGGT that does what VGGT's does, but for some hooks."""
    manager = get_plugin_manager(entry_points=False)
    module = types.ModuleType("stranger")
    vggt: Any = manager.unregister(name="vggt")
    for name in dir(vggt):
        if name.startswith("hess_"):
            setattr(module, name, getattr(vggt, name))
    for name, hook in hooks.items():
        setattr(module, name, hookimpl(hook))
    register(manager, module, "mynet", Origin("hess-plugin-mynet", "0.3"))
    return manager


@pytest.mark.parametrize("answer", ["yes", 1, {}, [True], torch.tensor(True)])
def test_a_claim_that_is_no_answer_is_told_and_counts_as_no(answer: object) -> None:
    manager = stranger(hess_claim_model=lambda model: answer)
    with (
        pytest.warns(RuntimeWarning, match=rf"^{OWNED} answered whether it knows TinyVGGT .*wanted True, False"),
        pytest.raises(UnknownModel, match="no adapter claims TinyVGGT"),
    ):
        resolve_adapter(TinyVGGT(), manager=manager)


def test_a_claim_that_raises_is_told_with_the_way_out() -> None:
    manager = stranger(hess_claim_model=lambda model: model.no_such_part)
    with (
        pytest.warns(RuntimeWarning, match=f"^{OWNED} failed when asked .*HESS_DISABLE_PLUGINS=hess-plugin-mynet"),
        pytest.raises(UnknownModel),
    ):
        resolve_adapter(TinyVGGT(), manager=manager)


WRONG: dict[str, tuple[str, Callable[..., Any], str]] = {
    "sites": ("hess_find_global_attention", lambda model: ["aggregator"], "a list with a str, wanted a list of "
              "hess_plugin.Site"),
    "one site": ("hess_find_global_attention", lambda model: model, "a TinyVGGT, wanted a list of hess_plugin.Site"),
    "layout": ("hess_token_layout", lambda model: {"frames": 4}, "a dict, wanted a hess_plugin.TokenLayout"),
    "prediction": ("hess_predict", lambda model: (1, 2), "a tuple, wanted a hess_plugin.Prediction"),
    "family": ("hess_describe_family", lambda model: 0.5, "a float, wanted a hess_plugin.Family"),
    "errors": ("hess_compute_errors", lambda model: torch.zeros(2), "a Tensor, wanted a hess_plugin.Errors"),
    "replacement": ("hess_replace_attention", lambda site: True, "a bool, wanted an object with remove()"),
    "model": ("hess_load_model", lambda name: {} if name == "mynet" else None, "a dict, wanted a torch.nn.Module"),
}  # fmt: skip


def use(manager: Any, scene: Any) -> None:
    """Everything that asks a hook."""
    load_model("mynet", "random", manager=manager, **CPU)
    model = TinyVGGT().eval()
    adapter = resolve_adapter(model, "mynet", manager)
    adapter.family(model)
    adapter.compute_errors(model, scene, 1e6)
    adapter.predict(model, scene.images)
    with hess_plugin.patch(model, adapter="mynet", manager=manager, sparsity=0.0):
        model(scene.images)


@pytest.mark.parametrize("hook, answer, words", WRONG.values(), ids=WRONG)
def test_an_answer_of_the_wrong_type_names_adapter_package_and_hook(
    room: Any, hook: str, answer: Callable[..., Any], words: str
) -> None:
    loads = {"hess_load_model": lambda name: TinyVGGT().eval() if name == "mynet" else None}
    with pytest.raises(AdapterError) as caught:
        use(stranger(**{**loads, hook: answer}), room)
    assert str(caught.value) == f"{OWNED} answered {hook} with {words}; repair the hook."


@pytest.mark.parametrize("hook", sorted({hook for hook, _, _ in WRONG.values()}))
def test_a_hook_that_raises_names_adapter_package_hook_and_cause(room: Any, hook: str) -> None:
    def fail(*arguments: Any) -> Any:
        return {}["no such key"]

    taken = {"hess_load_model": "name", "hess_replace_attention": "site"}.get(hook, "model")
    failing = eval(f"lambda {taken}: fail()", {"fail": fail})  # a hook says which arguments it takes
    failing.__code__ = failing.__code__.replace(co_filename=__file__)
    loads = {"hess_load_model": lambda name: TinyVGGT().eval() if name == "mynet" else None}
    with pytest.raises(AdapterError, match=rf"^{OWNED} failed in {hook}: KeyError: 'no such key' \(test_strang"):
        use(stranger(**{**loads, hook: failing}), room)


def test_errors_of_the_model_are_not_the_adapters(room: Any) -> None:
    """A program that runs out of memory, or a model that refuses an input, is to be seen as it is."""
    model, manager = TinyVGGT().eval(), stranger()

    def refuse(*_: Any) -> None:
        raise KeyError("the model's own")

    model.camera_head.register_forward_hook(refuse)
    with pytest.raises(KeyError, match="the model's own"):
        resolve_adapter(model, "mynet", manager).predict(model, room.images)


def test_a_stranger_that_fails_to_load_does_not_stand_before_ours() -> None:
    manager = stranger(hess_load_model=lambda name: 1 / 0)
    assert isinstance(load_model("demo", "random", manager=manager, **CPU), TinyVGGT)
    with pytest.raises(AdapterError, match=f"^{OWNED} failed in hess_load_model: ZeroDivisionError"):
        load_model("mynet", "random", manager=manager, **CPU)


def test_of_two_strangers_the_one_that_fails_is_told_and_the_other_loads() -> None:
    manager, other = stranger(hess_load_model=lambda name: 1 / 0), types.ModuleType("other")
    other.hess_load_model = hookimpl(lambda name: TinyVGGT().eval() if name == "mynet" else None)  # type: ignore[attr-defined]
    register(manager, other, "other", Origin("hess-plugin-other", "1"))
    with pytest.warns(RuntimeWarning, match=f"while 'mynet' was looked for: {OWNED} failed in hess_load_model"):
        assert isinstance(load_model("mynet", "random", manager=manager, **CPU), TinyVGGT)


def test_a_model_in_training_mode_is_refused() -> None:
    manager = stranger(hess_load_model=lambda name: TinyVGGT().train() if name == "mynet" else None)
    with pytest.raises(AdapterError, match=f"^{OWNED} loads 'mynet' in training mode; return model.eval()"):
        load_model("mynet", "random", manager=manager, **CPU)


# ---------------------------------------------------------------- files


def test_a_named_file_registers_under_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two-b"):
        (tmp_path / f"{name}.py").write_text(CLAIM)
    paths = [str(tmp_path / "one.py"), "", str(tmp_path / "two-b.py"), str(tmp_path / "." / "one.py")]
    monkeypatch.setenv("HESS_PLUGINS", os.pathsep.join(paths))
    before = list(sys.path)
    assert set(dict(get_plugin_manager().list_name_plugin())) == {*BUILT_IN, "one", "two-b"}
    assert set(dict(get_plugin_manager(entry_points=False).list_name_plugin())) == set(BUILT_IN)
    assert sys.path == before and "one" not in sys.modules and not (tmp_path / "__pycache__").exists()
    described = {plugin["name"]: plugin for plugin in describe_plugins()}
    assert described["one"]["file"] == str(tmp_path / "one.py") and described["one"]["package"] is None
    assert described["one"]["hooks"] == ["hess_claim_model"] and described["vggt"]["file"] is None


def test_a_file_is_executed_once_until_it_changes(tmp_path: Path) -> None:
    path, count = tmp_path / "mine.py", tmp_path / "count"
    path.write_text(f"with open({str(count)!r}, 'a') as file:\n    file.write('x')\n{CLAIM}")
    first = load_file(path)
    assert load_file(path) is first and count.read_text() == "x"
    stamp = path.stat()
    path.write_text(path.read_text().replace("'x'", "'y'"))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # same size and time: only the text tells
    second = load_file(path)
    assert second is not first and count.read_text() == "xy" and load_file(path) is second


def test_a_file_may_hold_what_looks_its_module_up(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from __future__ import annotations\nimport dataclasses, typing\n@dataclasses.dataclass\n"
        f"class Sizes:\n    width: typing.ClassVar[int] = 3\n    names: list[str]\n{CLAIM}"
    )
    module = load_file(path)
    assert module.Sizes(["a"]).names == ["a"] and sys.modules[module.__name__] is module
    other = tmp_path / "other" / "mine.py"
    other.parent.mkdir()
    other.write_text(CLAIM)
    assert load_file(other).__name__ != module.__name__


@pytest.mark.parametrize(
    "source, words",
    [
        ("x = 1\nclass (:\n", ("cannot be imported", "SyntaxError", "(mine.py line 2)")),
        ("x = 1\n\nimport beside\n", ("No module named 'beside'", "(mine.py line 3)", "stands alone")),
        ("from . import beside\n", ("ImportError", "stands alone")),
        ("def f():\n    return 1 / 0\nf()\n", ("ZeroDivisionError: division by zero (mine.py line 2)", "repair")),
        ("raise SystemExit(2)", ("SystemExit: 2", "__name__ == '__main__'")),
        ("x = 1", ("adapter 'mine' of file", "has no hook; mark functions such as hess_claim_model")),
        (CLAIM.replace("claim_model", "claim_modle"), ("adapter 'mine' of file", "did you mean hess_claim_model?")),
        ("x = '\0'", ("cannot be imported",)),
    ],
)
def test_a_named_file_that_does_not_work_is_an_error_in_one_sentence(
    tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch, source: str, words: tuple[str, ...]
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(source)
    for arguments in (("--plugin", path, "sites"), ("sites", "--plugin", path)):
        result = invoke(*arguments, "--model", "demo")
        assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
        sentence = result.stderr.removeprefix("Error: ").strip()
        assert "\n" not in sentence and str(path) in sentence and all(word in sentence for word in words), sentence
    monkeypatch.setenv("HESS_PLUGINS", str(path))
    with pytest.raises(AdapterError, match="mine"):
        hess_plugin.patch(TinyVGGT())
    if "cannot be imported" in sentence:
        assert not any(getattr(module, "__file__", None) == str(path) for module in list(sys.modules.values()))


@pytest.mark.parametrize("name, words", [("none.py", "does not exist"), ("folder.py", "is not a Python file"),
                                         ("mine.txt", "is not a Python file")])  # fmt: skip
def test_a_path_that_is_no_python_file_is_a_wrong_option(
    tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "mine.txt").write_text(CLAIM)
    for arguments in (("--plugin", tmp_path / name, "plugins"), ("plugins", "--plugin", tmp_path / name)):
        result = invoke(*arguments)
        assert result.exit_code == 2 and "Usage: hess-patch" in result.stderr
        assert f"plugin file {tmp_path / name} {words}; give the path of a .py file" in result.stderr.replace("\n", " ")
    monkeypatch.setenv("HESS_PLUGINS", str(tmp_path / name))
    with pytest.raises(AdapterError, match=words):
        get_plugin_manager()


def test_a_path_that_the_variable_cannot_hold_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / f"a{os.pathsep}b"
    folder.mkdir()
    (folder / "mine.py").write_text(CLAIM)
    with pytest.raises(AdapterError, match="which HESS_PLUGINS splits at; move it"):
        name_files([folder / "mine.py"])


def test_names_that_are_taken_are_refused_with_the_way_out(
    tmp_path: Path, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(CLAIM)
    for folder, name in (("a", "vggt"), ("b", "mynet"), ("c", "same"), ("d", "same")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.py").write_text(CLAIM)
    monkeypatch.setenv("HESS_PLUGINS", str(tmp_path / "a" / "vggt.py"))
    with pytest.raises(AdapterError, match=r"'vggt' of file .*a/vggt\.py .* taken by hess-plugin itself; rename the f"):
        get_plugin_manager()
    monkeypatch.setenv("HESS_PLUGINS", str(tmp_path / "b" / "mynet.py"))
    way_out = (
        r"taken by package hess-plugin-mynet 0\.3; rename the file, or .*HESS_DISABLE_PLUGINS=hess-plugin-mynet\.$"
    )
    with pytest.raises(AdapterError, match=way_out):
        get_plugin_manager()
    monkeypatch.setenv("HESS_DISABLE_PLUGINS", "hess-plugin-mynet")
    assert get_plugin_manager().origins["mynet"].file == str(tmp_path / "b" / "mynet.py")
    monkeypatch.setenv("HESS_PLUGINS", f"{tmp_path}/c/same.py{os.pathsep}{tmp_path}/d/same.py")
    with pytest.raises(AdapterError, match=r"d/same\.py has a name that is taken by file .*c/same\.py; rename"):
        get_plugin_manager()


def test_the_option_works_on_either_side_is_repeatable_and_ends_with_the_command(
    tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two", "three"):
        (tmp_path / f"{name}.py").write_text(CLAIM)
    monkeypatch.setenv("HESS_PLUGINS", str(tmp_path / "three.py"))
    result = invoke(
        "--plugin", tmp_path / "one.py", "plugins", "--plugin", tmp_path / "two.py", "--plugin", "../one.py"
    )
    assert result.exit_code == 0, result.output
    found = {plugin["name"]: plugin["file"] for plugin in json.loads(result.stdout) if plugin["file"]}
    assert found == {name: str(tmp_path / f"{name}.py") for name in ("one", "two", "three")}
    assert os.environ["HESS_PLUGINS"] == str(tmp_path / "three.py")
    monkeypatch.delenv("HESS_PLUGINS")
    assert invoke("--plugin", tmp_path / "one.py", "plugins").exit_code == 0
    assert "HESS_PLUGINS" not in os.environ


def test_every_command_that_takes_a_model_takes_the_option() -> None:
    taking = {name for name, command in main.commands.items() if any(p.name == "model" for p in command.params)}
    assert {"sites", "check", "calibrate", "evaluate", "sweep"} <= taking
    for name in (*taking, "plugins", "run"):
        assert sum("--plugin" in parameter.opts for parameter in main.commands[name].params) == 1, name
    assert any("--plugin" in parameter.opts for parameter in main.params)


def test_processes_started_from_here_see_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(CLAIM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HESS_PLUGINS", "")
    name_files([Path("mine.py")])
    assert named_files() == [tmp_path / "mine.py"]
    code = "from hess_plugin.registration.files import named_files; print(*named_files())"
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == str(tmp_path / "mine.py")


def test_help_with_a_plugin_imports_neither_it_nor_torch(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("raise SystemExit('imported')")
    arguments = ["--plugin", str(tmp_path / "mine.py"), "check", "--help"]
    code = (
        "import sys\nfrom hess_plugin.cli import main\n"
        f"try: main({arguments!r}, prog_name='hess-patch')\nexcept SystemExit: pass\n"
        "print({'torch', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "set()" and "Usage: hess-patch check" in done.stdout
