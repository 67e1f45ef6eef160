import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)


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


def test_the_examples_run_as_printed(tmp_path):
    assert len(EXAMPLES) == 2
    script = "\n".join(EXAMPLES)  # the second continues the first, as a reader would
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, check=False, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "saved_models" / "quickstart" / "1" / "saved_model.pb").exists()


def test_every_module_has_its_place_in_the_picture():
    for path in [*ROOT.glob("keras_tbptt/*.py"), *ROOT.glob("experiments/*.py")]:
        assert path.name == "__init__.py" or path.name in README, path
