"""The clock, the interval and the search, on made-up seconds: nothing here depends on speed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hess_plugin.break_even import BreakEven, Conditions, Timing, smallest_paying
from hess_plugin.demo.model import TinyVGGT
from hess_plugin.evaluation.sizes import Sizes, conclusion, doubled, find_break_even, time_sizes, timing_table
from hess_plugin.evaluation.timers import AttentionTimer, ForwardTimer
from hess_plugin.evaluation.timing import Stopwatch, TooLarge, coverage, interval, side_by_side, twin
from hess_plugin.interception import is_patched
from hess_plugin.plugins import resolve_adapter
from hess_plugin.settings import Settings

CPU = torch.device("cpu")
TOKENS = 36


def timing(views: int, ratio: float = 0.5, high: float | None = None, sparsity: float = 0.7) -> Timing:
    high = ratio if high is None else high
    return Timing(views, TOKENS * views, sparsity, 1.0, ratio, ratio, min(ratio, high), high, 7)


class FakeTime:
    """A clock that only calls move."""

    def __init__(self) -> None:
        self.now, self.order = 0.0, ""

    def __call__(self) -> float:
        return self.now

    def call(self, name: str, seconds: Callable[[], float]) -> Callable[[], None]:
        def run() -> None:
            self.order += name
            self.now += seconds()

        return run


# ---------------------------------------------------------------- the clock


def test_calls_alternate_in_turned_order_and_each_gets_its_own_seconds() -> None:
    time = FakeTime()
    calls = {name: time.call(name, lambda name=name: float(ord(name))) for name in "abc"}  # type: ignore[misc]
    times = side_by_side(calls, 3, CPU, clock=time)
    assert time.order == "abc" + "cba" + "abc"
    assert times == {name: [float(ord(name))] * 3 for name in "abc"}


def test_a_slow_spell_over_a_repeat_leaves_the_ratio_as_it_is() -> None:
    time = FakeTime()
    spells = iter([1.0] * 2 + [1.0, 1.0, 50.0, 50.0, 3.0, 3.0])
    dense = time.call("d", lambda: 2.0 * next(spells))
    patched = time.call("p", lambda: 1.0 * next(spells))
    found = Stopwatch(CPU, repeats=3, clock=time).compare(9, dense, patched)
    assert time.order == "dp" + "dppddp"  # warm-up first
    assert (found.ratio, found.low, found.high, found.repeats, found.views) == (0.5, 0.5, 0.5, 3, 9)
    assert found.dense == 6.0 and found.patched == 3.0 and found.dense_bytes is None


def test_a_warm_up_that_takes_too_long_ends_it() -> None:
    time = FakeTime()
    with pytest.raises(TooLarge, match="of 64 views took longer than 2 s"):
        Stopwatch(CPU, max_seconds=2.0, clock=time).compare(
            64, time.call("d", lambda: 2.5), time.call("p", lambda: 0.1)
        )
    assert time.order == "d"


def test_too_little_memory_is_a_sentence_and_other_errors_stay() -> None:
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: 1 bytes")):
        with pytest.raises(TooLarge, match="8 views do not fit in the memory of cpu"), Stopwatch(CPU).running(8):
            raise error
    with pytest.raises(RuntimeError, match="shapes"), Stopwatch(CPU).running(8):
        raise RuntimeError("shapes differ")


@settings(deadline=None)
@given(st.integers(1, 60), st.sampled_from([0.5, 0.8, 0.9, 0.95, 0.99]))
def test_the_interval_is_the_narrowest_that_the_sign_test_allows(count: int, level: float) -> None:
    from scipy.special import bdtr

    low, high = interval([float(i) for i in range(count)][::-1], level)
    cut = int(low)
    assert high == count - 1 - cut >= low
    assert coverage(count, level) == pytest.approx(1 - 2 * bdtr(cut, count, 0.5))
    if cut:
        assert coverage(count, level) >= level
    if 2 * (cut + 1) < count:
        assert 1 - 2 * bdtr(cut + 1, count, 0.5) < level


def test_seven_repeats_take_the_whole_range() -> None:
    assert interval([0.9, 0.7, 0.8, 1.1, 0.6, 0.75, 0.85]) == (0.6, 1.1)
    assert coverage(7) == 1 - 2 / 2**7


# ---------------------------------------------------------------- the search


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 500), st.integers(0, 700))
def test_a_monotone_curve_has_its_break_even_found_exactly(smallest: int, beyond: int, true: int) -> None:
    largest = smallest + beyond
    asked: list[int] = []

    def measure(views: int) -> Timing:
        asked.append(views)
        return timing(views, 0.5 + 0.5 * true / (views + 1))  # below 1 from `true` on

    found = smallest_paying(find_break_even(measure, smallest, largest).timings)
    expected = max(true, smallest)
    assert (found and found.views) == (expected if expected <= largest else None)
    assert len(asked) == len(set(asked)) and {smallest, largest} <= set(asked)
    assert len(asked) <= math.log2(largest / smallest) + 2 + math.log2(largest) + 1  # doubled, then halved


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(0, 200), st.randoms(use_true_random=False), st.floats(0.05, 0.95))
def test_noise_never_gives_a_size_above_which_one_did_not_pay(
    smallest: int, beyond: int, random: object, share: float
) -> None:
    def measure(views: int) -> Timing:
        return timing(views, 0.9 if random.random() < share else 1.1)  # type: ignore[attr-defined]

    sizes = find_break_even(measure, smallest, smallest + beyond)
    found = smallest_paying(sizes.timings)
    assert [one.views for one in sizes.timings] == sorted({one.views for one in sizes.timings})
    if found is None:
        assert not sizes.timings[-1].pays
    else:
        assert all(one.pays for one in sizes.timings if one.views >= found.views)
        below = [one for one in sizes.timings if one.views < found.views]
        # the gap is closed: the next smaller number of views was timed and does not pay
        assert not below or (not below[-1].pays and below[-1].views == found.views - 1)
    at = math.inf if found is None else found.views
    assert sizes.contradicting == [one for one in sizes.timings if one.pays and one.views < at]


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(0, 1000), st.integers(0, 1100))
def test_the_search_stops_at_what_is_too_large(smallest: int, beyond: int, limit: int) -> None:
    def measure(views: int) -> Timing:
        if views > limit:
            raise TooLarge(f"{views} views are too many")
        return timing(views, 1.5)

    if smallest > limit:
        with pytest.raises(TooLarge, match=f"^{smallest} views are too many, so nothing could be timed"):
            find_break_even(measure, smallest, smallest + beyond)
        return
    sizes = find_break_even(measure, smallest, smallest + beyond)
    assert (sizes.stopped is None) == (smallest + beyond <= limit)
    assert sizes.timings[-1].views <= limit and smallest_paying(sizes.timings) is None


def test_a_machine_that_runs_short_while_halving_keeps_what_was_found() -> None:
    def measure(views: int) -> Timing:
        if views == 24:
            raise TooLarge("busy")
        return timing(views, 0.9 if views >= 32 else 1.1)

    sizes = find_break_even(measure, 2, 64)
    assert [one.views for one in sizes.timings] == [2, 4, 8, 16, 32, 64] and sizes.stopped is None


@settings(deadline=None)
@given(st.integers(1, 100), st.integers(0, 1000))
def test_doubled_sizes_start_and_end_as_asked(smallest: int, beyond: int) -> None:
    sizes = doubled(smallest, smallest + beyond)
    assert sizes[0] == smallest and sizes[-1] == smallest + beyond
    assert all(a < b <= 2 * a for a, b in itertools.pairwise(sizes))


def test_given_sizes_are_timed_once_each_in_order() -> None:
    asked: list[int] = []
    time_sizes(lambda views: asked.append(views) or timing(views), [9, 3, 9, 5])  # type: ignore[func-returns-value]
    assert asked == [3, 5, 9]


def test_what_drops_nothing_or_may_be_chance_does_not_pay() -> None:
    assert timing(4, 0.9).pays
    assert not timing(4, 0.9, high=1.0).pays
    assert not timing(4, 0.9, sparsity=0.0).pays


# ---------------------------------------------------------------- what is said


def entry(timings: tuple[Timing, ...]) -> BreakEven:
    return BreakEven(Conditions("m", "float32", None, "gather", 128, 64), 0.73, "uniform", 60, 60, timings, {}, "today")


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ({2: 0.8, 4: 0.7}, "pays here at every size tried, from 2 views (72 patch tokens) to 4"),
        ({2: 1.2, 4: 0.9, 8: 0.7}, "pays here from 4 views (144 patch tokens) on, tried up to 8"),
        ({2: 1.2, 4: 1.1}, "does not pay here up to 4 views (144 patch tokens), the largest size tried"),
        (
            {2: 0.9, 4: 1.1, 8: 0.9},
            "from 8 views (288 patch tokens) on, tried up to 8. It also paid at 2 views but not",
        ),
    ],
)
def test_the_conclusion_is_what_the_timings_say(ratios: dict[int, float], said: str) -> None:
    timings = tuple(timing(views, ratio) for views, ratio in ratios.items())
    assert said in conclusion(entry(timings), Sizes(timings, None))


def test_the_table_has_a_line_for_each_size_and_memory_where_it_is_known() -> None:
    plain = timing_table([timing(2, 1.25), timing(16, 0.5, high=0.625)]).splitlines()
    assert len(plain) == 3 and len({len(line) for line in plain}) == 1 and "GB" not in plain[0]
    assert plain[2].split() == ["16", "576", "0.700", "1", "0.5", "0.500", "0.500", "to", "0.625", "yes"]
    known = timing_table([replace(timing(2), dense_bytes=3 * 10**9, patched_bytes=10**9)]).splitlines()
    assert known[1].split()[-2:] == ["3.00", "1.00"]


# ---------------------------------------------------------------- timing a model


def test_a_twin_shares_weights_and_nothing_else(tiny_model: TinyVGGT) -> None:
    other = twin(tiny_model)
    pairs = zip(tiny_model.state_dict(keep_vars=True).values(), other.state_dict(keep_vars=True).values(), strict=True)
    assert all(mine is theirs for mine, theirs in pairs)
    assert not set(map(id, tiny_model.modules())) & set(map(id, other.modules()))


def test_whole_forwards_are_timed_and_the_model_is_left_alone(tiny_model: TinyVGGT) -> None:
    adapter = resolve_adapter(tiny_model)
    before = {name: dict(vars(module)) for name, module in tiny_model.named_modules()}
    timer = ForwardTimer(adapter, tiny_model, (40, 70), Stopwatch(CPU, repeats=3), sparsity=0.5, block_q=8, block_k=8)
    few, many = timer(1), timer(5)
    assert (few.tokens, many.tokens) == (28, 140)
    assert many.sparsity == pytest.approx(0.5, abs=0.02) and many.repeats == 3
    for one in (few, many):
        assert 0 < one.low <= one.ratio <= one.high and one.dense > 0 and one.patched > 0
    assert not is_patched(tiny_model)
    assert before == {name: dict(vars(module)) for name, module in tiny_model.named_modules()}


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_attention_alone_is_called_as_the_model_calls_it(
    tiny_model: TinyVGGT, autocast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hess_plugin.attention import SiteAttention
    from hess_plugin.interception import SDPA, intercept

    adapter = resolve_adapter(tiny_model)
    site = adapter.sites(tiny_model)[1]
    own: list[tuple[object, ...]] = []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
        own.append((q.shape, q.dtype, k.dtype, v.dtype, options.get("scale")))
        return SDPA(q, k, v)

    replaced = intercept(site, attend)
    watch = Stopwatch(CPU, repeats=3, autocast=autocast)
    with torch.inference_mode(), watch.under_autocast():
        adapter.predict(tiny_model, torch.rand(5, 3, 60, 60))
    replaced.remove()

    asked: list[tuple[object, ...]] = []
    call = SiteAttention.__call__

    def note(self: SiteAttention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
        asked.append((q.shape, q.dtype, k.dtype, v.dtype, options.get("scale")))
        return call(self, q, k, v, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(SiteAttention, "__call__", note)
    asking = Settings(sparsity=0.5, sparse_ratio=None, cdf_threshold=None, allocation="uniform", block_q=8, block_k=8)
    found = AttentionTimer(adapter, tiny_model, site, (60, 60), watch, asking)(5)
    assert asked == own * 4  # a warm-up and three repeats
    assert found.tokens == 180 and found.sparsity == pytest.approx(0.5, abs=0.02)
    assert not is_patched(tiny_model)
