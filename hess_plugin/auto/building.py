"""Noticing every module that a program builds, the moment it is built."""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Built = Callable[[nn.Module], None]

_OWN = "_hess_plugin_own_init"
_listeners: list[Built] = []
# The classes whose __init__ reports. What it replaced is kept on the class: a class that the program drops must go.
_wrapped: weakref.WeakSet[type[nn.Module]] = weakref.WeakSet()
_lock = threading.RLock()
_before: dict[str, Any] = {}


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
    if "__new__" not in _before:
        _before["__new__"] = nn.Module.__dict__.get("__new__")  # another tool's
        nn.Module.__new__ = staticmethod(_new)  # type: ignore[method-assign, assignment]
    _before["__setstate__"] = nn.Module.__setstate__
    nn.Module.__setstate__ = _setstate  # type: ignore[method-assign]


def _uninstall() -> None:
    nn.Module.__setstate__ = _before["__setstate__"]  # type: ignore[method-assign]
    for cls in list(_wrapped):
        init = cls.__dict__.get("__init__")
        if not hasattr(init, _OWN):
            continue  # replaced since, by the program
        own = getattr(init, _OWN)
        if own is None:
            del cls.__init__
        else:
            cls.__init__ = own  # type: ignore[method-assign]
    _wrapped.clear()


def _new(cls: type[nn.Module], /, *args: Any, **kwargs: Any) -> Any:
    # A compiler follows this function, and can follow nothing but what is below.
    if not torch.compiler.is_compiling() and _listeners:
        _wrap(cls)
    if _before["__new__"] is not None:
        return _before["__new__"].__func__(cls, *args, **kwargs)
    # Classes that come after nn.Module in the resolution order may have a __new__ of their own (the hub's mixin has).
    for base in cls.__mro__[cls.__mro__.index(nn.Module) + 1 : -1]:
        if "__new__" in base.__dict__:
            return super(nn.Module, cls).__new__(cls, *args, **kwargs)
    return object.__new__(cls)


def _setstate(self: nn.Module, state: dict[str, Any]) -> None:
    _before["__setstate__"](self, state)
    if not _is_torch(type(self)):
        _tell(self)


def _is_torch(cls: type) -> bool:
    return str(getattr(cls, "__module__", "")).partition(".")[0] == "torch"


def _wrap(cls: type[nn.Module]) -> None:
    """Have the ``__init__`` of instances of exactly this class report; Python looks it up after ``__new__``."""
    if cls in _wrapped or _is_torch(cls):
        return
    with _lock:
        own = cls.__dict__.get("__init__")
        if hasattr(own, _OWN):
            return

        @functools.wraps(cls.__init__)
        def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            if own is None:  # found anew each time: the program may replace that of a base
                super(cls, self).__init__(*args, **kwargs)
            else:
                own(self, *args, **kwargs)
            if type(self) is cls:  # else a subclass is still at work
                _tell(self)

        setattr(init, _OWN, own)
        try:
            cls.__init__ = init  # type: ignore[method-assign]
        except Exception:  # a class that forbids it is let alone
            return
        _wrapped.add(cls)


def _tell(module: nn.Module) -> None:
    for listener in tuple(_listeners):
        listener(module)


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()  # a thread that held it is not in the forked process


os.register_at_fork(after_in_child=_renew_lock)
