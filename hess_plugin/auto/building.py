"""Noticing every module that a program builds, the moment it is built."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from torch import nn

Built = Callable[[nn.Module], None]

_lock = threading.Lock()
_listeners: list[Built] = []
_wrapped: list[tuple[type[nn.Module], Callable[..., None], Callable[..., None] | None]] = []
_MARK = "_hess_plugin_reports"
_own_setstate = nn.Module.__setstate__


def listen(built: Built) -> Callable[[], None]:
    """Call `built` with every module of a class that is not torch's own, as soon as its ``__init__`` has returned.

    Inner modules come before the outer ones; a module of a subclass comes once, when the subclass is through, and
    an unpickled one or a deepcopy when its state is set. Class, signature and behaviour of the modules stay.

    ``nn.Module.__new__`` is where it is noticed that a class is about to be instantiated, in time to wrap the
    ``__init__`` of just that class. Python cannot take a ``__new__`` back: an inert one stays after the last listener.

    Args:
        built: must not raise; what it did would come out of the program's constructor call.

    Returns:
        The function that ends it; the last one puts every ``__init__`` back.
    """
    with _lock:
        if not _listeners:
            _install()
        _listeners.append(built)

    def end() -> None:
        with _lock:
            if built in _listeners:
                _listeners.remove(built)
                if not _listeners:
                    _uninstall()

    return end


def _install() -> None:
    if "__new__" not in nn.Module.__dict__:
        nn.Module.__new__ = staticmethod(_new)  # type: ignore[method-assign, assignment]
    nn.Module.__setstate__ = _setstate  # type: ignore[method-assign]


def _uninstall() -> None:
    nn.Module.__setstate__ = _own_setstate  # type: ignore[method-assign]
    for cls, wrapper, own in _wrapped:
        if cls.__dict__.get("__init__") is not wrapper:
            continue  # replaced since, by the program
        if own is None:
            del cls.__init__
        else:
            cls.__init__ = own  # type: ignore[method-assign]
    _wrapped.clear()


def _new(cls: type[nn.Module], /, *args: Any, **kwargs: Any) -> Any:
    if _listeners and not _is_torch(cls):
        _wrap(cls)
    # Classes that come after nn.Module in the resolution order may have a __new__ of their own (the hub's mixin has).
    following = super(nn.Module, cls).__new__
    return following(cls) if following is object.__new__ else following(cls, *args, **kwargs)


def _setstate(self: nn.Module, state: dict[str, Any]) -> None:
    _own_setstate(self, state)
    if not _is_torch(type(self)):
        _tell(self)


def _is_torch(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "torch"


def _wrap(cls: type[nn.Module]) -> None:
    """Have the ``__init__`` of instances of exactly this class report; Python looks it up after ``__new__``."""
    with _lock:
        found = cls.__init__
        if getattr(found, _MARK, None) is cls:
            return

        @functools.wraps(found)
        def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            found(self, *args, **kwargs)
            if type(self) is cls:  # else a subclass is still at work
                _tell(self)

        setattr(init, _MARK, cls)
        _wrapped.append((cls, init, cls.__dict__.get("__init__")))
        cls.__init__ = init  # type: ignore[method-assign]


def _tell(module: nn.Module) -> None:
    for listener in tuple(_listeners):
        listener(module)
