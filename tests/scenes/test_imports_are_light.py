from __future__ import annotations

import subprocess
import sys

LIGHT = "hess_plugin.scenes, hess_plugin.calibration.errors, hess_plugin.evaluation.pose, hess_plugin.evaluation.clouds"
HEAVY = "open3d, faiss, matplotlib, PIL, scipy, pycolmap"


def test_reading_the_modules_loads_no_optional_package() -> None:
    script = f"import sys, {LIGHT}\nprint([name for name in {HEAVY.split(', ')!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
