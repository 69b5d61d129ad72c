"""The metric of a site's output projection: exact, up to date, and absent where there is nothing to read."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch
from torch import nn

from hess_plugin.demo.model import load_demo_model
from hess_plugin.output_metric import OutputMetric
from hess_plugin.plugins import resolve_adapter
from hess_plugin.sites import Site

CPU = torch.device("cpu")


class Module(nn.Module):
    """An output projection of 2 heads of width 3 onto 5 channels."""

    def __init__(self, columns: int = 6) -> None:
        super().__init__()
        self.proj = nn.Linear(columns, 5)


def site(module: nn.Module, output: str | None = "proj.weight") -> Site:
    return Site("attn", module, 2, 3, "", {}, output=output)


def test_root_is_that_of_each_heads_columns() -> None:
    module = Module()
    root = OutputMetric(site(module)).root(CPU)
    assert root is not None and root.shape == (2, 3, 3)
    for head in range(2):
        columns = module.proj.weight[:, 3 * head : 3 * head + 3]
        torch.testing.assert_close(root[head] @ root[head].T, columns.T @ columns)


def test_a_change_of_a_head_weighs_what_it_does_to_the_output() -> None:
    module = Module()
    metric = OutputMetric(site(module)).root(CPU)
    assert metric is not None
    change = torch.randn(3)
    output = module.proj.weight[:, 3:] @ change
    torch.testing.assert_close((change @ metric[1]).square().sum(), output.square().sum())


def test_singular_and_narrow_projections_have_a_root() -> None:
    module = Module()
    with torch.no_grad():
        module.proj.weight.zero_()
    root = OutputMetric(site(module)).root(CPU)
    assert root is not None and bool((root == 0).all())
    narrow = nn.Module()
    narrow.proj = nn.Linear(6, 2)  # fewer channels than a head is wide
    found = OutputMetric(site(narrow)).root(CPU)
    assert found is not None and found.shape == (2, 3, 2)
    columns = narrow.proj.weight[:, :3]
    torch.testing.assert_close(found[0] @ found[0].T, columns.T @ columns)


def test_made_once_and_again_when_the_weight_changes() -> None:
    module = Module()
    metric = OutputMetric(site(module))
    first = metric.root(CPU)
    assert metric.root(CPU) is first
    module.load_state_dict({name: 2 * value for name, value in module.state_dict().items()})
    second = metric.root(CPU)
    assert first is not None and second is not None
    torch.testing.assert_close((second @ second.mT), 4 * (first @ first.mT))


def test_another_parameter_in_its_place_is_seen() -> None:
    module = Module()
    metric = OutputMetric(site(module))
    for _ in range(20):  # a freed parameter's address is soon taken by the next
        module.proj.weight = nn.Parameter(torch.randn(5, 6))
        root = metric.root(CPU)
        assert root is not None
        columns = module.proj.weight[:, :3]
        torch.testing.assert_close(root[0] @ root[0].T, columns.T @ columns)


def test_a_copy_whose_original_is_gone_keeps_what_was_seen() -> None:
    module = Module()
    metric = OutputMetric(dataclasses.replace(site(module), module=weakref.proxy(module)))
    seen = metric.root(CPU)
    assert seen is not None
    wanted = seen.clone()
    del module
    gc.collect()
    found = metric.root(CPU)
    assert found is not None and torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("module", "output"),
    [
        (Module(), None),
        (nn.Identity(), "proj.weight"),
        (Module(9), "proj.weight"),
        (Module().to("meta"), "proj.weight"),
    ],
)
def test_nothing_to_read_is_the_identity(module: nn.Module, output: str | None) -> None:
    assert OutputMetric(site(module, output)).root(CPU) is None


def test_quantised_values_without_their_scales_are_not_read() -> None:
    module = nn.Module()
    module.proj = nn.Module()
    module.proj.register_buffer("weight", torch.ones(5, 6, dtype=torch.int8))
    assert OutputMetric(site(module)).root(CPU) is None


def test_made_under_inference_mode_it_serves_training() -> None:
    metric = OutputMetric(site(Module()))
    with torch.inference_mode():
        root = metric.root(CPU)
    assert root is not None and not root.is_inference()


def test_the_sites_of_the_adapters_name_their_projection() -> None:
    model = load_demo_model()
    for found in resolve_adapter(model).sites(model):
        weight = found.output_weight()
        assert weight is found.module.proj.weight
        assert dataclasses.replace(found, output=None).output_weight() is None
