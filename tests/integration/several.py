"""Runs a command several times. Each run is a process, but the imports are done only once.

    python several.py MODULE '[["--flag", ...], ...]' INPUT

Prints the status, the output and the errors of each run, as JSON.
"""

import importlib
import json
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile

SHARED = ("tensorflow", "keras_tbptt", "experiments.runner", "experiments.data")


ROOT = pathlib.Path(__file__).parent.parent.parent


def several(module, runs, text="", cwd=ROOT):
    """Runs this file.

    Args:
        module: str. The command's module.
        runs: A list of the flags of each run.
        text: str. The standard input of each run.
        cwd: The directory that the runs are started in.

    Returns:
        Status, output and errors of each run.
    """
    done = subprocess.run(
        [sys.executable, __file__, module, json.dumps(runs), text],
        capture_output=True, text=True, check=False, cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def main():
    module, runs, text = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
    for name in SHARED:
        importlib.import_module(name)
    results = []
    for flags in runs:
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile("w+") as output:
            with tempfile.TemporaryFile("w+") as errors:
                given.write(text.encode())
                given.seek(0)
                child = os.fork()
                if child == 0:
                    for descriptor, file in enumerate((given, output, errors)):
                        os.dup2(file.fileno(), descriptor)
                    sys.argv = [module, *flags]
                    runpy.run_module(module, run_name="__main__", alter_sys=True)
                    sys.exit()
                status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                for file in (output, errors):
                    file.seek(0)
                results.append((status, output.read(), errors.read()))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
