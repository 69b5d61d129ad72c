"""Noticing what is built: every module once, when it is complete, and nothing left of it."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import multiprocessing
import sys
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from hess_plugin.auto.building import listen


class Leaf(nn.Module):
    def __init__(self, width: int = 3, *, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=bias)


class Tree(Leaf):
    def __init__(self) -> None:
        super().__init__(4)
        self.leaf = Leaf()
        self.complete = True


class Heir(Tree):
    """Has no ``__init__`` of its own."""


class Late(Heir):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.leaf = Leaf()


@dataclass(eq=False)
class Data(nn.Module):
    """Gets its ``__init__`` after the class was made."""

    width: int

    def __post_init__(self) -> None:
        super().__init__()


class Named:
    """A mixin with a ``__new__`` of its own, behind nn.Module, as the hub's."""

    def __new__(cls, *args: object, **kwargs: object) -> Named:
        made = super().__new__(cls)
        made.given = (args, kwargs)  # type: ignore[attr-defined]
        return made


class Mixed(nn.Module, Named):
    def __init__(self, width: int, *, deep: bool = False) -> None:
        super().__init__()
        self.width = width


@pytest.fixture
def seen() -> Iterator[list[nn.Module]]:
    found: list[nn.Module] = []
    end = listen(found.append)
    yield found
    end()


def names(modules: list[nn.Module]) -> list[str]:
    return [type(module).__name__ for module in modules]


def test_inner_modules_come_first_and_each_comes_once(seen: list[nn.Module]) -> None:
    tree = Tree()
    assert names(seen) == ["Leaf", "Tree"] and seen[1] is tree and seen[0] is tree.leaf
    seen.clear()
    assert [Heir(), Heir()][1].complete and names(seen) == ["Leaf", "Heir", "Leaf", "Heir"]


def test_a_module_is_complete_when_it_comes() -> None:
    complete: list[bool] = []
    end = listen(lambda module: complete.append(not isinstance(module, Tree) or hasattr(module, "complete")))
    Heir(), Tree()
    end()
    assert complete == [True] * 4


def test_a_class_that_skips_its_parents_init(seen: list[nn.Module]) -> None:
    Late()
    assert names(seen) == ["Leaf", "Late"]


def test_a_dataclass(seen: list[nn.Module]) -> None:
    assert Data(3).width == 3 and names(seen) == ["Data"]


def test_a_mixin_behind_module_keeps_its_new(seen: list[nn.Module]) -> None:
    made = Mixed(3, deep=True)
    assert made.given == ((3,), {"deep": True}) and made.width == 3 and names(seen) == ["Mixed"]  # type: ignore[attr-defined]


def test_torchs_own_modules_are_let_alone(seen: list[nn.Module]) -> None:
    own = nn.Linear.__init__
    nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert seen == [] and nn.Linear.__init__ is own


def test_copies_and_unpickled_modules_come_too(seen: list[nn.Module]) -> None:
    leaf = Leaf()
    seen.clear()
    twin = copy.deepcopy(leaf)
    assert seen == [twin] and list(twin.state_dict()) == list(leaf.state_dict())
    file = io.BytesIO()
    torch.save(leaf, file)
    file.seek(0)
    with torch.serialization.safe_globals([Leaf, nn.Linear, set]):
        read = torch.load(file, weights_only=False)
    assert seen == [twin, read]


def test_a_constructor_that_fails_is_not_told_and_works_the_next_time(seen: list[nn.Module]) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'wrong'"):
        Leaf(wrong=1)  # type: ignore[call-arg]
    assert seen == []
    Leaf(5)
    assert names(seen) == ["Leaf"]


def test_signature_and_name_stay(seen: list[nn.Module]) -> None:
    before = inspect.signature(Leaf)
    Leaf()
    assert inspect.signature(Leaf) == before and Leaf.__init__.__qualname__ == "Leaf.__init__"
    assert inspect.unwrap(Leaf.__init__).__code__.co_varnames[:3] == ("self", "width", "bias")


def test_nothing_stays_but_an_inert_new() -> None:
    def state() -> list[object]:
        classes = (Leaf, Tree, Heir, Late, Data, Mixed, nn.Module, nn.Linear)
        return [{name: value for name, value in vars(cls).items() if name != "__new__"} for cls in classes]

    before = state()
    end, other = listen(lambda module: None), listen(lambda module: None)
    Heir(), Late(), Data(1), Mixed(1)
    end()
    assert state() != before  # the other one still listens
    other()
    other()
    assert state() == before
    assert Tree().complete and nn.Linear(2, 2).in_features == 2


def test_an_init_that_the_program_replaced_stays_replaced() -> None:
    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()

    def another(self: nn.Module) -> None:
        nn.Module.__init__(self)

    end = listen(lambda module: None)
    Changed()
    Changed.__init__ = another  # type: ignore[method-assign]
    end()
    assert Changed.__init__ is another


def test_threads_build_at_once(seen: list[nn.Module]) -> None:
    class Fresh(nn.Module):
        def __init__(self) -> None:
            super().__init__()

    start = threading.Barrier(4)

    def work() -> None:
        start.wait()
        for _ in range(50):
            Fresh()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names(seen) == ["Fresh"] * 200


def test_meta_tensors_and_compiled_modules_are_built_as_before(seen: list[nn.Module]) -> None:
    with torch.device("meta"):
        leaf = Leaf()
    assert leaf.linear.weight.is_meta and names(seen) == ["Leaf"]
    compiled = torch.compile(Leaf(), backend="eager")
    assert isinstance(compiled, nn.Module)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = 1


class Inherits(Base):
    pass


def test_an_init_that_a_program_gives_a_base_later_is_run(
    seen: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Inherits().value == 1

    def another(self: Base) -> None:
        nn.Module.__init__(self)
        self.value = 2

    monkeypatch.setattr(Base, "__init__", another)
    assert Inherits().value == 2 and names(seen) == ["Inherits", "Inherits"]


def test_a_class_that_allows_no_change_is_let_alone(seen: list[nn.Module]) -> None:
    class Strict(type):
        def __setattr__(cls, name: str, value: object) -> None:
            raise TypeError("no")

    class Closed(nn.Module, metaclass=Strict):
        def __init__(self) -> None:
            super().__init__()

    class Nowhere(nn.Module):
        pass

    Nowhere.__module__ = None  # type: ignore[assignment]
    assert isinstance(Closed(), nn.Module) and isinstance(Nowhere(), nn.Module) and names(seen) == ["Nowhere"]


def test_classes_that_a_program_drops_are_let_go(seen: list[nn.Module]) -> None:
    def make() -> weakref.ref[type]:
        class Made(nn.Module):
            def __init__(self) -> None:
                super().__init__()

        Made()
        return weakref.ref(Made)

    gone = [make() for _ in range(5)]
    seen.clear()
    gc.collect()
    assert [reference() for reference in gone] == [None] * 5


@pytest.mark.parametrize("listening", [True, False])
def test_a_compiler_follows_what_is_built_in_a_forward(listening: bool) -> None:
    end = listen(lambda module: None)
    if not listening:
        end()
    try:
        x = torch.rand(3, 4)
        torch._dynamo.reset()
        found = torch.compile(lambda x: nn.Softmax(dim=-1)(x), backend="eager", fullgraph=True)(x)
        assert torch.equal(found, x.softmax(-1))
    finally:
        end()


def test_a_forked_process_builds(seen: list[nn.Module]) -> None:
    process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(len(names(seen)) or (Leaf() and 7)))
    process.start()
    process.join()
    assert process.exitcode == 7
