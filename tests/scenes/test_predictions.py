from __future__ import annotations

import pytest
import torch

from hess_plugin.exceptions import AdapterError
from hess_plugin.predictions import Prediction


def test_centres_and_confident_points() -> None:
    c2w = torch.eye(4).repeat(2, 1, 1)
    c2w[1, :3, 3] = torch.tensor([1.0, 2.0, 3.0])
    confidence = torch.tensor([1.0, 1.5, 0.9, 1.2]).reshape(1, 2, 2).repeat(2, 1, 1).requires_grad_()
    prediction = Prediction(c2w, torch.zeros(2, 2, 2, 3), confidence, 1.0)
    assert prediction.centres.tolist() == [[0, 0, 0], [1, 2, 3]]
    assert prediction.confident[0].tolist() == [[True, True], [False, True]]
    assert not prediction.confident.requires_grad


@pytest.mark.parametrize("image, grid", [(12, 12), (12, 6), (60, 30), (14, 5), (7, 3)])
def test_the_pixel_grid_is_the_nearest_pixel_of_each_cell(image: int, grid: int) -> None:
    prediction = Prediction(torch.eye(4)[None], torch.zeros(1, grid, grid, 3), torch.ones(1, grid, grid), 0)
    rows, columns = prediction.pixel_grid(image, image)
    exact = [(i + 0.5) * image / grid - 0.5 for i in range(grid)]
    assert all(abs(row - at) <= 0.5 + 1e-9 for row, at in zip(rows.tolist(), exact, strict=True))
    assert rows.tolist() == columns.tolist()
    assert len(set(rows.tolist())) == grid and int(rows.max()) < image


@pytest.mark.parametrize(
    "c2w, points, confidence, field",
    [
        ((2, 3, 4), (2, 4, 5, 3), (2, 4, 5), "c2w"),
        ((0, 4, 4), (0, 4, 5, 3), (0, 4, 5), "c2w"),
        ((2, 4, 4), (3, 4, 5, 3), (3, 4, 5), "points"),
        ((2, 4, 4), (2, 4, 5), (2, 4, 5), "points"),
        ((2, 4, 4), (2, 4, 5, 3), (2, 4, 5, 1), "confidence"),
    ],
)
def test_shapes_that_do_not_fit_are_named(
    c2w: tuple[int, ...], points: tuple[int, ...], confidence: tuple[int, ...], field: str
) -> None:
    with pytest.raises(AdapterError, match=f"prediction's {field} has shape"):
        Prediction(torch.zeros(c2w), torch.zeros(points), torch.zeros(confidence), 1.0)
