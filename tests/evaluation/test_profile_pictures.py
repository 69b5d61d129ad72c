"""What the pictures of profiles show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hess_plugin import HessError, Profile
from hess_plugin.agreement import compare_profiles
from hess_plugin.evaluation import plots
from hess_plugin.scoring import ERROR_NAMES, Scoring
from hess_plugin.sites import PROJECTIONS


def profile_of(seed: int = 0, layers: int = 3, heads: int = 5, **named: Tensor) -> Profile:
    generator = torch.Generator().manual_seed(seed)
    traces = {
        f"{error}.{projection}": torch.rand(4, layers, heads, dtype=torch.float64, generator=generator)
        for error in ERROR_NAMES
        for projection in PROJECTIONS
    }
    traces |= {f"{error}.q": trace for error, trace in named.items()}
    sites = tuple(f"aggregator.global_blocks.{i}.attn" for i in range(layers))
    return Profile("vggt", sites, heads, tuple("abcd"), traces, 0.5, "f" * 16)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures, as they are when they are written."""
    figures: list[Any] = []
    save = plots._save

    def keep(figure: Any, path: str | Path) -> None:
        save(figure, path)
        figures.append(figure)

    monkeypatch.setattr(plots, "_save", keep)
    return figures


def maps(figure: Any) -> dict[str, np.ndarray]:
    """Heat maps of a figure by title, NaN where nothing is drawn."""
    return {axis.get_title(): axis.images[0].get_array().filled(np.nan) for axis in figure.axes if axis.images}


def test_the_heat_map_shows_the_score_and_both_errors(drawn: list[Any], tmp_path: Path) -> None:
    profile, scoring = profile_of(), Scoring(0.3, "k", "log")
    plots.head_sensitivity_map(profile, tmp_path / "a.png", scoring)
    found, score = maps(drawn[0]), profile.scores(0.3, "k", "log")
    assert list(found) == ["score", "camera error alone", "point error alone", "score, sorted in each layer"]
    np.testing.assert_array_equal(found["score"], score)
    np.testing.assert_array_equal(found["camera error alone"], profile.scores(1.0, "k", "log"))
    np.testing.assert_array_equal(found["point error alone"], profile.scores(0.0, "k", "log"))
    np.testing.assert_array_equal(found["score, sorted in each layer"], score.sort(1, descending=True).values)
    assert "camera weight 0.3, projection k, normalisation log, rows all" in drawn[0].get_suptitle()
    assert len({axis.images[0].norm for axis in drawn[0].axes if axis.images}) == 1  # one colour, one share


def test_an_error_that_was_not_measured_has_no_panel(drawn: list[Any], tmp_path: Path) -> None:
    lost = torch.full((4, 3, 5), torch.nan, dtype=torch.float64)
    plots.head_sensitivity_map(profile_of(points=lost), tmp_path / "a.png")
    assert list(maps(drawn[0])) == ["score", "camera error alone", "score, sorted in each layer"]


def test_a_layer_without_gradient_is_left_blank(drawn: list[Any], tmp_path: Path) -> None:
    camera = torch.rand(4, 3, 5, dtype=torch.float64)
    camera[:, 2] = 0
    plots.head_sensitivity_map(profile_of(camera=camera), tmp_path / "a.png")
    found = maps(drawn[0])
    assert np.isnan(found["camera error alone"][2]).all() and not np.isnan(found["camera error alone"][:2]).any()
    assert not np.isnan(found["score"]).any()


def test_two_profiles_are_drawn_side_by_side_and_head_against_head(drawn: list[Any], tmp_path: Path) -> None:
    first, second = profile_of(0), profile_of(1)
    plots.agreement_map(compare_profiles(first, second), ("mine", "yours"), tmp_path / "a.png")
    found = maps(drawn[0])
    assert list(found) == ["mine", "yours"]
    np.testing.assert_array_equal(found["yours"], second.scores())
    (scatter,) = [axis for axis in drawn[0].axes if axis.get_xlabel() == "score, mine"]
    dots = scatter.collections[0].get_offsets()
    np.testing.assert_array_equal(dots, torch.stack([first.scores().flatten(), second.scores().flatten()], 1))
    assert scatter.get_ylabel() == "score, yours" and "Spearman" in scatter.get_title()
    assert scatter.get_xlim() == scatter.get_ylim() and scatter.get_xlim()[1] > dots.max()


@pytest.mark.parametrize("layers, heads", [(1, 1), (1, 16), (24, 1), (24, 16)])
def test_pictures_of_any_size_are_drawn(tmp_path: Path, layers: int, heads: int) -> None:
    first, second = (profile_of(seed, layers, heads) for seed in (0, 1))
    plots.head_sensitivity_map(first, tmp_path / "a.png")
    plots.agreement_map(compare_profiles(first, second), ("a", "b"), tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_is_no_png_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HessError, match=r"a\.svg cannot be written: pictures are PNG files"):
        plots.agreement_map(compare_profiles(profile_of(0), profile_of(1)), ("a", "b"), tmp_path / "a.svg")
    assert list(tmp_path.iterdir()) == []
