"""The notebooks are those of the scripts, and they run."""

import importlib.util
import pathlib

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
MAKE = ROOT / "examples" / "notebooks" / "make.py"
SPEC = importlib.util.spec_from_file_location("make_notebooks", MAKE)
make = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make)


def test_each_script_has_an_up_to_date_notebook():
    notebooks = {path.stem: path.read_text("utf-8") for path in MAKE.parent.glob("*.ipynb")}
    assert notebooks == {s.stem: make.text(s) for s in make.SCRIPTS}, f"Run: python {MAKE}"


# Of the others it is enough that their scripts run.
RUN = [script for script in make.SCRIPTS if script.stem == "by_hand"]


@pytest.mark.parametrize("script", RUN, ids=lambda script: script.stem)
def test_a_notebook_runs_from_its_file(script, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
    notebook = nbformat.read(MAKE.parent / f"{script.stem}.ipynb", as_version=4)
    # The tests run this checkout. Installing it would change the environment they run in.
    client = nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        skip_cells_with_tag=make.INSTALL_TAG,
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    install, *code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert install.source == make.INSTALL and install.execution_count is None
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any(output.name == "stdout" for output in code[-1].outputs)
