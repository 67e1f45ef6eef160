import subprocess
import sys

import pytest


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_another_backend_is_refused(backend):
    code = (
        "import sys, types\n"
        "keras = types.ModuleType('keras'); keras.backend = types.SimpleNamespace()\n"
        f"keras.backend.backend = lambda: {backend!r}\n"
        "sys.modules['keras'] = keras\n"
        "import keras_tbptt"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.strip().endswith(f"Received: KERAS_BACKEND={backend}")
