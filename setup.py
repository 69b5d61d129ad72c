"""Only what pyproject.toml cannot say: adapters/ and cli.py of the root are installed inside hess_plugin.

Neither may become a top-level import name (PyPI has an `adapters`). `package_dir` is enough for the folder.
For the single file, `hess_plugin.cli` is declared as a package, so that an editable install maps the name to
cli.py, and `BuildPy` ships it as the module it is.
"""

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    def find_package_modules(self, package, package_dir):
        if package == "hess_plugin.cli":
            return []
        modules = super().find_package_modules(package, package_dir)
        return [*modules, ("hess_plugin", "cli", "cli.py")] if package == "hess_plugin" else modules


setup(
    packages=[
        *find_packages(include=["hess_plugin", "hess_plugin.*", "hess_plugin_cuda", "hess_plugin_cuda.*"]),
        "hess_plugin.adapters",
        "hess_plugin.cli",
    ],
    package_dir={"hess_plugin.adapters": "adapters", "hess_plugin.cli": "cli"},
    cmdclass={"build_py": BuildPy},
)
