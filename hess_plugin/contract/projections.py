"""A check that the rows of W_Q, W_K and W_V are where a site says: by changing those of one head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hess_plugin.sites import PROJECTIONS, Site

from .case import Case

Called = dict[str, Tensor]


def rows_are_the_heads(case: Case) -> str | None:
    """Changing a head's rows of a projection changes that head's queries (keys, values) at that site, nothing else."""
    twin = case.copy()
    sites = case.adapter.sites(twin)
    problem = _shapes_problem(case, twin, sites)
    if problem is not None:
        return problem
    for site in dict.fromkeys((sites[0].name, sites[-1].name)):
        problem = _site_problem(case, twin, next(s for s in sites if s.name == site))
        if problem is not None:
            return problem
    return None


def _shapes_problem(case: Case, twin: nn.Module, sites: list[Site]) -> str | None:
    """Heads and their width as attention sees them."""
    shapes: dict[str, tuple[int, int]] = {}

    def note(name: str, query: Tensor, key: Tensor, value: Tensor) -> None:
        shapes[name] = (query.shape[1], query.shape[3])

    with case.watched(twin, note):
        case.predict(twin)
    for site in sites:
        heads, width = shapes[site.name]
        if (heads, width) != (site.num_heads, site.head_dim):
            return (
                f"attention of {site.name} has {heads} heads of width {width}, its site says {site.num_heads} of "
                f"{site.head_dim}; correct num_heads and head_dim"
            )
    return None


def _site_problem(case: Case, twin: nn.Module, site: Site) -> str | None:
    before = _first_call(case, twin, site)
    head = site.num_heads - 1  # the last one lies wrong if any count is wrong
    for letter in PROJECTIONS:
        weight = site.weight(letter)
        with torch.no_grad():
            kept = weight.clone()
            rows = site.head_rows(weight, letter)[head]
            noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
            rows += noise.to(rows) * weight.std()
            after = _first_call(case, twin, site)
            weight.copy_(kept)
        changed = [
            (name, h) for name in PROJECTIONS for h in range(site.num_heads) if _differs(before[name], after[name], h)
        ]
        if changed != [(letter, head)]:
            return _sentence(site, letter, head, changed)
    return None


def _first_call(case: Case, twin: nn.Module, site: Site) -> Called:
    """The q, k, v of the site's first attention call, each ``[B, H, N, d]``."""
    calls: list[Called] = []

    def note(name: str, query: Tensor, key: Tensor, value: Tensor) -> None:
        if name == site.name and not calls:
            calls.append({"q": query.detach().clone(), "k": key.detach().clone(), "v": value.detach().clone()})

    with case.watched(twin, note):
        case.predict(twin)
    return calls[0]


def _differs(before: Tensor, after: Tensor, head: int) -> bool:
    a, b = before[:, head].double(), after[:, head].double()
    # Another way through the same matrix product may round differently; a changed row changes far more.
    return bool((a - b).abs().max() > 1e-4 * a.abs().max().clamp(min=1e-12))


def _sentence(site: Site, letter: str, head: int, changed: list[tuple[str, int]]) -> str:
    seen = ", ".join(f"{name} of head {number}" for name, number in changed[:4]) or "nothing"
    more = "" if len(changed) <= 4 else ", ..."
    return (
        f"changing the rows of W_{letter.upper()} of head {head} at {site.name} changed {seen}{more}; "
        f"the projection is packed in another order: give Site(projections=...) the rows where {letter} starts"
    )
