"""The README and the documentation: their examples run, and their map of modules is complete."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted(ROOT.glob("docs/guide/*.md"))]
# What cannot run here is fenced as ```py: it needs a server, another framework or a new process.
EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.S | re.M)
# The packages without which the examples of a page cannot run.
NEEDS = {"streams": ["ai_edge_litert"]}
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)[^)]*\)")


def text_of(page):
    return page.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_examples_of_a_page_run_as_one_script(page, tmp_path, monkeypatch):
    for package in NEEDS.get(page.stem, []):
        pytest.importorskip(package)
    examples = EXAMPLE.findall(text_of(page))
    assert examples
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(examples), page.name, "exec"), {"__name__": "__main__"})


def test_the_readme_is_short():
    readme = text_of(README)
    assert len(readme.splitlines()) <= 130
    assert len(readme.split()) <= 900


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "index.md"], ids=lambda page: page.stem)
def test_the_links_of_the_front_pages_lead_somewhere(page):
    for link in LINK.findall(text_of(page)):
        assert (page.parent / link).exists(), link


def test_every_module_has_its_place_in_the_design():
    design = text_of(ROOT / "docs" / "design.md")
    for path in [*ROOT.glob("keras_tbptt/**/*.py"), *ROOT.glob("experiments/*.py")]:
        assert path.name == "__init__.py" or f"  {path.name} " in design, path
