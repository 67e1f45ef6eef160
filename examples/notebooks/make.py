"""Writes a notebook for each example, for Jupyter or Colab.

python examples/notebooks/make.py

Edit the scripts, never the notebooks. Comments in front of code become text. A notebook has no
outputs, and its cells have fixed ids, so it changes only if its script does.
"""

import ast
import pathlib
import re

import jupytext
import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell

FOLDER = pathlib.Path(__file__).parent
SCRIPTS = sorted(FOLDER.parent.glob("*.py"))
# keras_tbptt is not on PyPI yet. Jupyter starts a notebook in the folder that contains it.
INSTALL_TEXT = """\
The next cell installs keras_tbptt from the clone of the repository that contains this notebook. In
Colab, clone or upload the repository first, and run `%cd <clone>/examples/notebooks`."""
INSTALL = "%pip install --quiet ../.."
INSTALL_TAG = "install"


def notebook(script):
    """Makes the notebook of a script, as an `nbformat.NotebookNode`."""
    docstring, *cells = jupytext.read(script).cells
    title = script.stem.replace("_", " ").capitalize()
    made = [
        new_markdown_cell(f"# {title}\n\n{ast.literal_eval(docstring.source).strip()}"),
        new_markdown_cell(INSTALL_TEXT),
        new_code_cell(INSTALL, metadata={"tags": [INSTALL_TAG]}),
    ]
    for cell in cells:
        comment = re.match(r"(# .*\n)*", cell.source)[0]
        if comment:
            made.append(new_markdown_cell(re.sub(r"(?m)^# ", "", comment).strip()))
        made.append(new_code_cell(cell.source[len(comment) :]))
    for i, cell in enumerate(made):
        cell.id = f"cell-{i}"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbformat.v4.new_notebook(cells=made, metadata={"kernelspec": kernel})


def text(script):
    """Returns the content of the notebook's file."""
    return nbformat.writes(notebook(script)) + "\n"


if __name__ == "__main__":
    for script in SCRIPTS:
        (FOLDER / f"{script.stem}.ipynb").write_text(text(script), encoding="utf-8")
