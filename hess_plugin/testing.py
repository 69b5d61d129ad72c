"""The contract suite: what an adapter author runs on a tiny instance of their model, and our own tests run too.

From a shell: ``hess-patch --plugin ./mynet.py check --model mynet --weights random``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pluggy
from torch import nn

from .contract import answers, calibrating, exactness, little_memory, projections, undoing
from .contract.case import CannotTell, Case
from .exceptions import AdapterError, HessError
from .patching import unpatch
from .plugins import resolve_adapter
from .registration.registry import cause_of
from .scenes.scene import Scene

_FAMILY = "the family's settings fit the model"
_SITES = "sites are modules of the model with their projections"
_LENGTH = "the token layout has the length of the attention sequence"
_PREDICTION = "a prediction has cameras, points and confidence of every view"
_DENSE = "at sparsity 0 the output is the unpatched one, bit for bit (to rounding if attention is spelled out)"

Checker = Callable[[Case], "str | None"]
CHECKS: tuple[tuple[str, Checker, tuple[str, ...]], ...] = (
    ("exactly one adapter claims the model", answers.claimed_once, ()),
    ("the model is in eval mode", answers.in_eval_mode, ()),
    (_FAMILY, answers.family_fits, ()),
    (_SITES, answers.sites_fit, ()),
    (_PREDICTION, answers.prediction_fits, ()),
    (_LENGTH, answers.layout_fits, (_SITES, _PREDICTION)),
    ("a call by name has the same token layout", answers.layout_by_keyword, (_LENGTH,)),
    ("the rows of W_Q, W_K and W_V are those of their heads", projections.rows_are_the_heads, (_LENGTH,)),
    ("removing a patch leaves no trace", undoing.undo_is_complete, (_LENGTH,)),  # before others patch the model
    (_DENSE, exactness.dense_is_exact, (_LENGTH,)),
    ("the chosen backend agrees with the plain reference", exactness.reference_agrees, (_DENSE,)),
    ("a patched forward drops the share asked for", exactness.sparsity_is_measured, (_DENSE,)),
    ("forwards of several sizes do not disturb each other", exactness.sizes_follow_each_other, (_DENSE,)),
    ("scenes in a batch do not disturb each other", exactness.batches_are_independent, (_DENSE,)),
    ("it runs in half precision", exactness.half_precision_runs, (_DENSE,)),
    ("inference in little memory predicts the same", little_memory.lean_predicts_the_same, (_FAMILY, _DENSE)),
    ("attention that is replaced already is refused", undoing.second_replacement_refused, (_DENSE,)),
    ("an exception inside a patched forward leaves nothing behind", undoing.exception_is_safe, (_DENSE,)),
    ("a deepcopy of a patched model runs by itself", undoing.deepcopy_runs, (_DENSE,)),
    ("errors have a gradient at every site", calibrating.gradient_everywhere, (_SITES, _PREDICTION)),
    (
        "measuring in little memory gives the same traces and leaves no trace",
        calibrating.lean_is_exact,
        ("errors have a gradient at every site",),
    ),
    (
        "calibrating gives a profile that patches the model",
        calibrating.profile_works,
        ("errors have a gradient at every site", _DENSE),
    ),
)
"""Name, function, and the checks without which it would only fail for the same reason again."""


@dataclass(frozen=True)
class Check:
    """One line of the checklist.

    Attributes:
        name: what was checked.
        problem: what is wrong and what to do, or None.
        unknown: why it could not be checked, or None.
    """

    name: str
    problem: str | None
    unknown: str | None = None

    def __str__(self) -> str:
        if self.problem is not None:
            return f"[FAIL] {self.name}: {self.problem}"
        return f"[ok]   {self.name}" if self.unknown is None else f"[-]    {self.name}: not checked, {self.unknown}"


def check_adapter(
    model: nn.Module,
    scene: Scene,
    *,
    adapter: str | None = None,
    manager: pluggy.PluginManager | None = None,
    block: int = 4,
    sparsity: float = 0.5,
) -> list[Check]:
    """Check that an adapter keeps the contract on one model: answers, exactness, undo, gradients, calibration.

    Args:
        model: a small instance in eval mode; random weights do.
        scene: a scene with true cameras and depth at a size the model takes, 3 views or more, on the model's device.
        adapter: the adapter meant; by default the one that claims the model.
        manager: plugin manager; a fresh one by default.
        block: patch tokens in a query or key block; small, because a small input has few tokens.
        sparsity: target of the sparse checks.

    Returns:
        One `Check` each; print them. `require` raises on a failed one.

    Raises:
        UnknownModel, AmbiguousModel: not exactly one adapter claims the model.
    """
    case = Case(model, scene.normalised(), resolve_adapter(model, adapter, manager), block, sparsity)
    checks: list[Check] = []
    for name, checker, needs in CHECKS:
        failed = [check.name for check in checks if check.name in needs and (check.problem or check.unknown)]
        if failed:
            checks.append(Check(name, None, f"it needs that {failed[0]}"))
        else:
            checks.append(_run(name, checker, case))
    return checks


def require(checks: Iterable[Check]) -> None:
    """Raise if a check failed, with the whole checklist as the message.

    Raises:
        AdapterError: at least one check failed.
    """
    checks = list(checks)
    if any(check.problem for check in checks):
        raise AdapterError("the adapter does not keep the contract:\n" + "\n".join(str(check) for check in checks))


def _run(name: str, checker: Checker, case: Case) -> Check:
    try:
        problem = checker(case)
    except CannotTell as reason:
        return Check(name, None, str(reason))
    except HessError as error:  # a sentence that says it all
        problem = " ".join(str(error).split()).rstrip(".")
    except Exception as error:  # a broken adapter may raise anything; the checklist goes on
        problem = cause_of(error, case.adapter.file_of("hess_claim_model"))
    finally:
        unpatch(case.model)
    return Check(name, problem)
