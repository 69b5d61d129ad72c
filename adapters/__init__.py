"""The built-in adapters, installed as `hess_plugin.adapters`."""

if __name__ != "hess_plugin.adapters":
    # In a checkout this folder is importable as `adapters`, a name that belongs to another package on PyPI.
    raise ImportError("import hess_plugin.adapters; the folder adapters/ is not a top-level package.")
