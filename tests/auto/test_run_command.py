"""`hess-patch run`: programs behave as without it, but for their models."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hess_plugin.cli import main

Programs = Any  # of conftest.py
PYTHON = sys.executable
KINDS = {
    "file": (PYTHON, "main.py"),
    "bare file": ("main.py",),
    "module": (PYTHON, "-m", "scenenet"),
    "options": (PYTHON, "-O", "-u", "-W", "ignore", "main.py"),
    "code": (PYTHON, "-c", "import sys; sys.argv[0] = 'x'; import runpy; runpy.run_path('main.py')"),
}


def usage(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["run", *arguments])
    return result.exit_code, result.output


@pytest.mark.parametrize("kind", KINDS)
def test_at_sparsity_0_a_program_is_what_it_was(project: Programs, kind: str) -> None:
    """Arguments, name, folder, path, output, standard input, exit code: all its own."""
    command, arguments = KINDS[kind], ("7", "--sparsity", "x y")
    plain = project.plain(*((PYTHON,) if kind == "bare file" else ()), *command, *arguments, given="hello")
    patched = project.patched(*command, *arguments, options=("--sparsity", 0, *project.small), given="hello")
    assert plain.code == patched.code == 7 and plain.output == patched.output and plain.error == patched.error
    assert not plain.said and len(patched.said) == 1
    assert (
        "SceneNet was patched (adapter vggt, 4 sites): 1 forward, all of them dense, as asked for." in patched.said[0]
    )


def test_what_was_measured_is_said_and_reported(project: Programs) -> None:
    report = project.folder / "report.json"
    plain = project.plain(PYTHON, "main.py", 0)
    patched = project.patched("main.py", 0, options=("--sparsity", 0.5, *project.small, "--report", report))
    assert patched.code == 0 and plain.output != patched.output  # it was sparse
    assert "measured sparsity 0.5000 (0.5 asked for), budgets uniform, backend gather" in patched.said[0]
    (process,) = json.loads(report.read_text())["processes"]
    (model,) = process["models"]
    assert model["class"] == "SceneNet" and model["sparsity"] == pytest.approx(0.5) and len(model["sites"]) == 4
    assert process["command"] == ["main.py", "0"] and process["refusals"] == []


def test_a_report_of_an_earlier_run_does_not_survive(project: Programs) -> None:
    report = project.write("report.json", '{"processes": [{"models": [1], "refusals": []}]}')
    patched = project.patched(PYTHON, "-c", "pass", options=("--report", report))
    assert json.loads(report.read_text()) == {"processes": []}
    assert patched.said == ["hess-patch: nothing was patched: the program never imported torch."]


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("print(1)", "the program never imported torch."),
        ("import torch; torch.nn.Linear(2, 2)", "the program built no model of its own."),
        (
            "import torch\nclass Mine(torch.nn.Module): pass\nMine()",
            "no adapter knows a model that the program built, the last of which was Mine (__main__); `hess-patch "
            "plugins` lists the adapters, and a new one is one file (hess_plugin/adapters/README.md).",
        ),
    ],
)
def test_it_is_said_plainly_that_nothing_was_patched(programs: Programs, code: str, why: str) -> None:
    patched = programs.patched(PYTHON, "-c", code)
    assert patched.code == 0 and patched.said == [f"hess-patch: nothing was patched: {why}"]


def test_no_temporary_file_stays(project: Programs) -> None:
    folder = project.folder / "temporary"
    folder.mkdir()
    project.patched("main.py", 0, options=project.small, variables={"TMPDIR": str(folder)})
    project.patched(PYTHON, "-c", "pass", variables={"TMPDIR": str(folder)})
    assert list(folder.iterdir()) == []


def test_a_traceback_is_the_programs_own(programs: Programs) -> None:
    programs.write("wrong.py", "import torch\nclass A(torch.nn.Module):\n    pass\nA()\n1 / 0\n")
    plain, patched = programs.plain(PYTHON, "wrong.py"), programs.patched("wrong.py")
    assert plain.code == patched.code == 1 and "ZeroDivisionError" in plain.error and plain.error == patched.error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals_end_it_as_they_would(programs: Programs, number: signal.Signals) -> None:
    programs.write("wait.py", "import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    codes = []
    for command in ((PYTHON, "wait.py"), (*programs.hess_patch, "run", "--", PYTHON, "wait.py")):
        process = programs.start(*command)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(number)
        process.communicate(timeout=60)
        codes.append(process.returncode)
    assert codes[0] == codes[1] == -number


def test_a_closed_pipe_ends_a_shell_command_as_it_would(programs: Programs) -> None:
    """Python ignores SIGPIPE; a program that it becomes must not inherit that."""
    for command in (("yes",), (*programs.hess_patch, "run", "--", "yes")):
        process = programs.start(*command)
        assert process.stdout is not None and process.stdout.readline() == "y\n"
        process.stdout.close()
        assert process.wait(timeout=60) == -signal.SIGPIPE
        for stream in (process.stdin, process.stderr):
            assert stream is not None
            stream.close()


def test_the_environments_own_sitecustomize_still_runs(programs: Programs) -> None:
    programs.write("site/sitecustomize.py", "print('customised')\nMARK = 1\n")
    code = "import sys; print(sys.modules['sitecustomize'].MARK, [p for p in sys.path if 'bootstrap' in p])"
    variables = {"PYTHONPATH": str(programs.folder / "site")}
    plain, patched = (run(PYTHON, "-c", code, variables=variables) for run in (programs.plain, programs.patched))
    # hess-patch is a Python of this environment as well, before it becomes the program.
    assert plain.output == "customised\n1 []\n" and patched.output == "customised\n" + plain.output


def test_processes_that_the_program_starts_are_patched_too(project: Programs) -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, 'main.py', '0'], check=True, input=b'')"
    report = project.folder / "report.json"
    patched = project.patched(PYTHON, "-c", code, options=(*project.small, "--report", report))
    (process,) = json.loads(report.read_text())["processes"]
    assert process["models"][0]["class"] == "SceneNet"
    assert len(patched.said) == 1 and "SceneNet was patched" in patched.said[0]


def test_torchrun(project: Programs) -> None:
    """Two processes patch and report, one speaks, and the launcher itself does not claim that nothing was patched."""
    report = project.folder / "report.json"
    launcher = (PYTHON, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", 29541)
    patched = project.patched(*launcher, "main.py", 0, options=(*project.small, "--sparsity", 0.5, "--report", report))
    assert patched.code == 0, patched.error
    processes = json.loads(report.read_text())["processes"]
    assert sorted(process["rank"] for process in processes) == ["0", "1"]
    assert all(process["models"][0]["sparsity"] == pytest.approx(0.5) for process in processes)
    assert len(patched.said) == 1 and "SceneNet was patched" in patched.said[0]


def test_a_spawned_process_is_patched(project: Programs) -> None:
    project.write(
        "spawn.py",
        "import multiprocessing\nfrom scenenet.net import SceneNet, images\n"
        "def work(number):\n    import torch\n    with torch.no_grad():\n        SceneNet()(images())\n"
        "if __name__ == '__main__':\n"
        "    worker = multiprocessing.get_context('spawn').Process(target=work, args=(1,))\n"
        "    worker.start(); worker.join(); raise SystemExit(worker.exitcode)\n",
    )
    assert project.patched("spawn.py", options=project.small).code == 0


def test_the_variables_alone_do_it(project: Programs) -> None:
    printed = project.plain(*project.hess_patch, "run", "--shell", "--sparsity", 0.5, *project.small)
    assert printed.code == 0
    script = project.write("job.sh", f'eval "$1"\n{PYTHON} main.py 0\n{PYTHON} -c "import torch"\n')
    ran = project.plain("bash", script, printed.output)
    assert ran.code == 0 and len(ran.said) == 1 and "measured sparsity 0.5000" in ran.said[0]
    without = project.plain(
        "bash", project.write("off.sh", f'eval "$1"\nHESS_AUTO_PATCH=off {PYTHON} main.py 0\n'), printed.output
    )
    assert without.code == 0 and without.said == []


def test_an_environment_without_the_plugin_is_named(programs: Programs) -> None:
    """The program runs all the same, as it would have."""
    programs.write("blocked/hess_plugin/__init__.py", "raise ImportError('not here')\n")
    blocked = {"PYTHONPATH": str(programs.folder / "blocked")}
    command = [
        word.replace("from hess_plugin", "import sys; sys.path.pop(1); from hess_plugin")
        for word in programs.hess_patch
    ]
    probe = subprocess.run(
        [*command, "run", "--", PYTHON, "-c", "print('ran')"],
        env={**programs.environment, **blocked},
        capture_output=True,
        text=True,
    )
    assert probe.returncode == 0 and probe.stdout == "ran\n", probe.stderr
    assert f"nothing will be patched: {PYTHON} cannot import hess_plugin (not here); install it" in probe.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "COMMAND is missing"),
        (("--shell", "--", "x"), "--shell prints variables and runs nothing"),
        (("--", "no-such-program-at-all"), "no-such-program-at-all cannot be run: no such program"),
        (("--", "missing.py"), "missing.py does not exist"),
        (("--", "python3", "-I", "x.py"), "python -I takes nothing from the environment"),
        (("--", "python3", "-uE", "x.py"), "leave out -E"),
        (("--", "python3", "-W", "ignore", "-S", "x.py"), "leave out -S"),
        (("--sparsty", "0.5", "--", "true"), "No such option"),
        (("--any-weights", "--", "true"), "--any-weights needs a profile"),
        (("--backend", "fast", "--", "true"), "backend is 'fast', wanted one of auto"),
        (("--", "/tmp"), "/tmp cannot be run: it is a folder"),
        (("--sparsity", "1", "--", "true"), "1.0 is not in the range 0<=x<1"),
        (("--sparsity", ".5", "--sparse-ratio", ".5", "--", "true"), "choose one of them"),
        (("--allocation", "hess", "--", "true"), "--allocation needs a profile and none was given"),
        (("--camera-weight", ".5", "--", "true"), "--camera-weight needs a profile"),
        (("--profile", "nowhere.hess", "--", "true"), "nowhere.hess"),
        (("--report", "report.txt", "--", "true"), "wanted a name that ends in .json"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    code, output = usage(*arguments)
    assert code in (1, 2) and sentence in " ".join(output.split()) and "Traceback" not in output


def test_options_of_python_that_look_alike_are_let_through(programs: Programs) -> None:
    for options in (
        ("-W", "ignore", "-X", "dev", "-c", "print('ran')"),
        ("-cSEED=1;print('ran')",),
        ("-uc", "print('ran')"),
    ):
        patched = programs.patched(PYTHON, *options)
        assert patched.code == 0 and patched.output == "ran\n"


def test_the_programs_folder_can_be_another_when_it_loads_the_profile(project: Programs, demo_profile: Path) -> None:
    """Paths mean what they meant where they were typed."""
    os.symlink(demo_profile, project.folder / "p.hess")
    code = (
        "import os; os.chdir('/'); import torch; from hess_plugin.demo.model import load_demo_model\n"
        "model = load_demo_model()\nwith torch.no_grad(): model(torch.rand(1, 8, 3, 60, 60))"
    )
    patched = project.patched(PYTHON, "-c", code, options=("--profile", "p.hess", "--sparsity", 0.5, *project.small))
    assert patched.code == 0 and "budgets hess" in patched.said[0] and "sparsity 0.5000" in patched.said[0]


def test_a_program_that_uses_the_plugin_itself(project: Programs) -> None:
    """torch is then imported in the middle of an import of the plugin."""
    project.write(
        "uses.py",
        "from hess_plugin import patch\nimport torch\nfrom scenenet.net import SceneNet, images\nmodel = SceneNet()\n"
        "with patch(model, sparsity=0.75, block_q=8, block_k=8) as handle, torch.no_grad():\n    model(images())\n"
        "print(round(handle.report().sparsity, 2))\n",
    )
    patched = project.patched("uses.py", options=(*project.small, "--sparsity", 0.5))
    assert patched.output == "0.75\n" and patched.said == [
        "hess-patch: SceneNet was patched (adapter vggt, 4 sites) and never called."
    ]


def test_forked_workers_report(project: Programs) -> None:
    """What is built and called in a worker that multiprocessing forks, which ends without exit handlers."""
    project.write(
        "fork.py",
        "import multiprocessing, torch\nfrom scenenet.net import SceneNet, images\n"
        "def work():\n    with torch.no_grad():\n        (model or SceneNet())(images())\n"
        "import sys\nmodel = SceneNet() if sys.argv[1] == 'before' else None\n"
        "worker = multiprocessing.get_context('fork').Process(target=work)\n"
        "worker.start(); worker.join(); raise SystemExit(worker.exitcode)\n",
    )
    for when in ("before", "within"):
        report = project.folder / "report.json"
        patched = project.patched("fork.py", when, options=(*project.small, "--sparsity", 0.5, "--report", report))
        assert patched.code == 0 and "measured sparsity 0.5000" in patched.said[0]
        assert not any("nothing was patched" in line for line in patched.said)
        calls = [process["models"][0]["sites"][0]["calls"] for process in json.loads(report.read_text())["processes"]]
        assert calls == ([1, 0] if when == "before" else [1])


def test_an_empty_entry_of_the_path_is_the_current_folder(programs: Programs) -> None:
    programs.write("here.py", "")
    script = programs.write("scripts/program.py", "import here\nprint('found')\n")
    variables = {"PYTHONPATH": ":/nowhere"}
    assert programs.plain(PYTHON, script, variables=variables).output == "found\n"
    assert programs.patched(PYTHON, script, variables=variables).output == "found\n"


def test_a_run_inside_a_run_keeps_its_report(project: Programs) -> None:
    inner = (
        " ".join(shlex.quote(word) for word in project.hess_patch) + " run --report inner.json --block-q 8 --block-k 8"
    )
    project.write("outer.sh", f"{inner} -- {PYTHON} main.py 0 < /dev/null\n")
    assert project.patched("bash", "outer.sh").code == 0
    (process,) = json.loads((project.folder / "inner.json").read_text())["processes"]
    assert process["models"][0]["class"] == "SceneNet"


def test_hess_patch_itself_is_left_alone_by_the_variables(programs: Programs) -> None:
    printed = programs.plain(*programs.hess_patch, "run", "--shell", "--sparsity", 0.5)
    command = " ".join(shlex.quote(word) for word in programs.hess_patch)
    script = programs.write("sites.sh", f'eval "$1"\n{command} sites --model demo\n')
    ran = programs.plain("bash", script, printed.output)
    assert ran.code == 0 and ran.said == [] and "adapter vggt claims TinyVGGT" in ran.output


def test_it_can_be_switched_off_from_outside(project: Programs) -> None:
    patched = project.patched("main.py", 0, variables={"HESS_AUTO_PATCH": "off"})
    assert patched.code == 0 and patched.said == ["hess-patch: HESS_AUTO_PATCH is off: nothing will be patched."]
    variables = {"HESS_AUTO_PATCH": "sparsity=0.9,block_q=8,block_k=8"}
    patched = project.patched("main.py", 0, options=("--sparsity", 0.5), variables=variables)
    assert "measured sparsity 0.5000" in patched.said[0]  # an option goes before the variable


def test_a_sitecustomize_that_fails_stops_nothing(project: Programs) -> None:
    project.write("site/sitecustomize.py", "raise ValueError('broken')\n")
    variables = {"PYTHONPATH": str(project.folder / "site")}
    patched = project.patched("main.py", 0, options=project.small, variables=variables)
    assert patched.code == 0 and "SceneNet was patched" in patched.said[-1]


def test_a_closed_standard_error_stops_nothing(project: Programs) -> None:
    command = " ".join(shlex.quote(str(word)) for word in (*project.hess_patch, "run", "--", PYTHON, "main.py", 3))
    script = project.write("closed.sh", f"{command} 2>&- < /dev/null\n")
    assert project.plain("bash", script).code in (1, 3)  # the program itself prints on it
