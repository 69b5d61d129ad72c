"""`hess-patch bench` on the demo model: what it prints and records, and mistakes; never how fast anything is."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from hess_plugin import Profile, patch
from hess_plugin.break_even import Timing
from hess_plugin.cli import main
from hess_plugin.demo.model import TinyVGGT, load_demo_model
from hess_plugin.evaluation import timers
from hess_plugin.evaluation.tables import profile_summary
from hess_plugin.evaluation.timing import TooLarge
from hess_plugin.plugins import resolve_adapter
from hess_plugin.profiles import weights_fingerprint
from hess_plugin.recorded_break_evens import break_evens
from hess_plugin.scoring import ERROR_NAMES
from hess_plugin.sites import PROJECTIONS

Invoke = Callable[..., Result]
SMALL = ("--block-q", 8, "--block-k", 8, "--repeats", 3)


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run the command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Result:
        words = [str(argument) for argument in arguments]
        return CliRunner().invoke(main, words, prog_name="hess-patch")

    return run


@pytest.fixture(scope="module")
def demo() -> TinyVGGT:
    return load_demo_model()


@pytest.fixture
def profile(demo: TinyVGGT, tmp_path: Path) -> Path:
    return write(demo, tmp_path / "demo.hess")


def write(model: TinyVGGT, path: Path) -> Path:
    sites = resolve_adapter(model).sites(model)
    traces = torch.arange(1.0, sites[0].num_heads + 1).repeat(1, len(sites), 1).double()
    Profile(
        adapter="vggt",
        sites=tuple(site.name for site in sites),
        num_heads=sites[0].num_heads,
        scenes=("one",),
        traces={f"{e}.{p}": traces for e in ERROR_NAMES for p in PROJECTIONS},
        camera_weight=0.5,
        fingerprint=weights_fingerprint(sites),
        metadata={"weights": "w.pt"},
    ).save(path)
    return path


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Ratios that every whole forward is said to have: `from` views on it pays; above `limit` it is too large."""
    told: dict[str, float] = {"from": 5, "limit": 10**6}

    def measure(self: timers.ForwardTimer, views: int) -> Timing:
        if views > told["limit"]:
            raise TooLarge(f"one unpatched call of {views} views took longer than 9 s")
        ratio = 0.75 if views >= told["from"] else 1.25
        return Timing(views, 36 * views, 0.7, 1.0, ratio, ratio, ratio - 0.1, ratio + 0.1, 7)

    monkeypatch.setattr(timers.ForwardTimer, "__call__", measure)
    return told


def rows(result: Result) -> list[list[str]]:
    """Cells of the table: views, patch tokens, sparsity, dense, patched, ratio, low, "to", high, pays."""
    assert result.exit_code == 0, result.output
    return [line.split() for line in result.stdout.splitlines() if re.match(r" *\d+ +\d+ +0\.\d{3} ", line)]


def assert_one_sentence(result: Result, *words: str, code: int) -> None:
    assert result.exit_code == code, result.output
    assert result.stderr.count("Error: ") == 1 and "Traceback" not in result.output
    sentence = result.stderr.partition("Error: ")[2].strip()
    assert "\n" not in sentence and all(word in sentence for word in words), sentence


# ---------------------------------------------------------------- what works


def test_attention_alone(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("bench", "--model", "demo", "--max-views", 3, "--sparsity", 0.6, *SMALL)
    assert [row[:2] for row in rows(result)] == [["2", "72"], ["3", "108"]]
    for _, _, sparsity, dense, patched, ratio, low, _, high, _ in rows(result):
        assert float(sparsity) == pytest.approx(0.6, abs=0.02)
        assert float(dense) > 0 and float(patched) > 0 and float(low) <= float(ratio) <= float(high)
    assert "attention of aggregator.global_blocks.0.attn alone (8 heads of 16), images 60 x 60 px" in result.stdout
    assert (
        "backend gather, sparsity 0.6 (uniform), blocks 8 x 8, memory plain; ratio: median of 3 repeats"
        in result.stdout
    )
    assert re.search(r"^machine: .+ threads;", result.stdout, re.MULTILINE) and "75.0% interval" in result.stdout
    assert result.stderr == "" and not re.search(r"\bPatching\b", result.stdout) and not list(tmp_path.iterdir())


def test_whole_forwards_of_given_sizes_with_random_weights(invoke: Invoke, tmp_path: Path) -> None:
    options = ("--views", 3, "--views", 1, "--resolution", 40, "--autocast", "bfloat16", "--max-seconds", 1e-9)
    result = invoke("bench", "--model", "demo", "--weights", "random", "--end-to-end", *options, *SMALL)
    assert [row[:2] for row in rows(result)] == [["1", "16"], ["3", "48"]]  # timed, whatever --max-seconds says
    assert "whole forwards, images 40 x 40 px, float32, autocast bfloat16" in result.stdout
    assert "Times are the exception" in result.stdout and "WARNING" in result.stderr
    assert re.search(r"^Patching (pays|does not pay) here", result.stdout, re.MULTILINE)
    assert not list(tmp_path.iterdir())


def test_the_break_even_is_recorded_and_followed(
    invoke: Invoke, profile: Path, made_up: dict[str, float], demo: TinyVGGT
) -> None:
    before = Profile.load(profile)
    result = invoke("bench", "--model", "demo", "--end-to-end", "--profile", profile, "--max-views", 8, *SMALL)
    assert [row[0] for row in rows(result)] == ["2", "4", "5", "6", "8"]
    assert "Patching pays here from 5 views (180 patch tokens) on, tried up to 8." in result.stdout
    assert "takes the dense path for fewer than 180 patch tokens on this machine" in result.stdout
    after = Profile.load(profile)
    (entry,) = break_evens(after)
    assert (entry.sparsity, entry.allocation, entry.height, entry.width) == (0.73, "hess", 60, 60)
    assert entry.dense_below == 180 and entry.versions["torch"] == torch.__version__ and len(entry.timings) == 5
    assert all(torch.equal(after.traces[name], trace) for name, trace in before.traces.items())
    assert (after.metadata["weights"], after.fingerprint) == ("w.pt", before.fingerprint)
    for block, limit in ((8, 180), (16, 0)):
        with patch(demo, profile=profile, sparsity=0.75, block_q=8, block_k=block) as handle:
            assert handle.report().settings["dense_below"] == limit

    made_up["from"] = 10**6  # measured again, it never pays
    result = invoke("bench", "--model", "demo", "--end-to-end", "--profile", profile, "--max-views", 4, *SMALL)
    assert "does not pay here up to 4 views (144 patch tokens), the largest size tried" in result.stdout
    (entry,) = break_evens(Profile.load(profile))
    assert entry.smallest is None and entry.dense_below == 145
    shown = profile_summary(Profile.load(profile), draws=100)
    assert shown.count("break-even: never up to 4 views (144 patch tokens), of 60 x 60 px; ") == 1
    assert "break_even" not in shown and "timings" not in shown


def test_a_link_to_the_profile_stays_one(
    invoke: Invoke, profile: Path, made_up: dict[str, float], tmp_path: Path
) -> None:
    link = tmp_path / "link.hess"
    link.symlink_to(profile)
    invoke("bench", "--model", "demo", "--end-to-end", "--profile", link, "--max-views", 4, *SMALL)
    assert link.is_symlink() and len(break_evens(Profile.load(profile))) == 1


def test_the_search_ends_at_what_takes_too_long_and_says_so(invoke: Invoke, made_up: dict[str, float]) -> None:
    made_up.update({"from": 3, "limit": 20})
    result = invoke("bench", "--model", "demo", "--end-to-end")
    assert [row[0] for row in rows(result)] == ["2", "3", "4", "8", "16"]
    assert "Larger sizes were not tried: one unpatched call of 32 views took longer than 9 s." in result.stdout
    assert "from 3 views (108 patch tokens) on, tried up to 16." in result.stdout


def test_no_time_at_all(invoke: Invoke) -> None:
    result = invoke("bench", "--model", "demo", "--end-to-end", "--max-seconds", 1e-9, *SMALL)
    assert_one_sentence(result, "one unpatched call of 2 views took longer than 1e-09 s", "give fewer views", code=1)


def test_attention_alone_records_nothing(invoke: Invoke, profile: Path) -> None:
    before = profile.read_bytes()
    result = invoke("bench", "--model", "demo", "--profile", profile, "--views", 2, *SMALL)
    assert len(rows(result)) == 1 and "sparsity 0.73 (hess)" in result.stdout
    assert "Nothing was recorded in the profile" in result.stdout and profile.read_bytes() == before


def test_a_profile_of_other_weights_will_do(invoke: Invoke, profile: Path, made_up: dict[str, float]) -> None:
    options = ("--weights", "random", "--end-to-end", "--profile", profile, "--views", 8)
    result = invoke("bench", "--model", "demo", *options)
    assert result.exit_code == 0, result.output
    (entry,) = break_evens(Profile.load(profile))
    assert entry.dense_below == 0 and "at every size tried, from 8 views (288 patch tokens) to 8." in result.stdout
    assert "takes the dense path nowhere" in result.stdout


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--views", 0], ["--views", "0 is not in the range"]),
        (["--min-views", 0], ["--min-views", "0 is not in the range"]),
        (["--min-views", 9, "--max-views", 8], ["--min-views 9 is more than --max-views 8"]),
        (["--sparsity", 0], ["--sparsity", "0.0 is not in the range 0<x<1"]),
        (["--sparsity", 1], ["--sparsity", "1.0 is not in the range"]),
        (["--sparsity", "half"], ["--sparsity", "'half' is not a valid float"]),
        (["--repeats", 2], ["--repeats", "2 is not in the range"]),
        (["--max-seconds", 0], ["--max-seconds"]),
        (["--resolution", 3], ["--resolution"]),
        (["--device", "cuda:77"], ["--device cuda:77 cannot be used here"]),
    ],
)
def test_mistakes_of_options(invoke: Invoke, options: list[object], words: list[str]) -> None:
    assert_one_sentence(invoke("bench", "--model", "demo", *options), *words, code=2)


def test_mistakes_told_by_the_model_and_the_profile(invoke: Invoke, profile: Path, tmp_path: Path) -> None:
    run = ("bench", "--model", "demo", "--end-to-end")
    assert_one_sentence(invoke(*run, "--profile", "no.hess"), "no.hess is not a file", code=1)
    assert_one_sentence(invoke(*run, "--backend", "quick"), "no attention backend 'quick'", "gather", code=1)
    assert_one_sentence(invoke("bench", "--model", "vggt"), "--weights is missing", code=2)
    (tmp_path / "text.hess").write_text("no profile")
    assert_one_sentence(invoke(*run, "--profile", "text.hess"), "text.hess is truncated or not a profile", code=1)
    from hess_plugin.demo.model import TinyVGGTConfig

    other = write(TinyVGGT(TinyVGGTConfig(dim=32, num_heads=4, depth=2, stem=16, camera_depth=1)), tmp_path / "o.hess")
    before = other.read_bytes()
    assert_one_sentence(invoke(*run, "--profile", other), "the profile has 2 sites, the model 4", code=1)
    assert other.read_bytes() == before
