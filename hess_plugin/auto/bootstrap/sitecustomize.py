"""Imported by every Python that `hess-patch run` starts, before its program; torch is not imported here."""

import os
import sys


def _bootstrap() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    # The program must not see this folder. PYTHONPATH keeps it, for the Pythons that the program starts.
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != here]
    try:
        _import_shadowed()
    finally:  # if that one fails, Python says so and goes on
        _start()


def _start() -> None:
    try:
        from hess_plugin.auto.starting import start
    except ImportError as error:
        if os.environ.get("HESS_AUTO_PATCH_ROOT") == str(os.getpid()):  # other processes go unmentioned
            sys.stderr.write(
                f"hess-patch: nothing will be patched: {sys.executable} cannot import hess_plugin ({error}); install "
                "it in the environment that runs the program.\n"
            )
        return
    start()


def _import_shadowed() -> None:
    """Import the sitecustomize that this one hides, if the environment has one."""
    own = sys.modules.pop("sitecustomize", None)
    try:
        __import__("sitecustomize")
    except ImportError as error:
        if error.name != "sitecustomize":
            raise
    finally:
        if own is not None:
            sys.modules.setdefault("sitecustomize", own)


_bootstrap()
