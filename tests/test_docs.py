"""The documentation: the code of every page runs, and prints what the page shows."""

import ast
import contextlib
import io
import itertools
import re

import pytest
import torch
from helpers.pages import numbers_rounded
from helpers.paths import PACKAGE, ROOT

import minikeras

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
WITH_CODE = [page for page in PAGES if "```python\n" in page.read_text()]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks_of(page):
    """The fenced blocks of a page in order: (language, text)."""
    return BLOCK.findall(page.read_text())


@pytest.fixture
def _offline(monkeypatch):
    """Trackers speak with no one, and say nothing."""
    for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "WANDB_SILENT"):
        monkeypatch.setenv(name, "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


@pytest.mark.usefixtures("_offline", "one_thread")
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # SQLAlchemy's, of MLflow
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_docs_page_runs_and_prints_what_it_shows(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # the pages show what the CPU gives
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    namespace = {"__name__": "__main__"}
    blocks = [*blocks_of(page), ("", "")]
    for (language, code), (following, shown) in itertools.pairwise(blocks):
        if language == "python":
            printed = run(code, page, namespace)
            if following == "text":
                assert numbers_rounded(printed) == numbers_rounded(shown)


def run(code, page, namespace):
    """What a block prints; its lines keep their numbers in the page, for the traceback."""
    before = page.read_text().partition(f"```python\n{code}")[0].count("\n") + 1
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile("\n" * before + code, str(page), "exec"), namespace)
    return printed.getvalue()


RECIPES = re.split(r"^(?=### )", (DOCS / "recipes.md").read_text(), flags=re.MULTILINE)


def name_of(section):
    """The heading of a recipe, as in its link."""
    return section.partition("\n")[0].removeprefix("### ").lower().replace(" ", "-")


@pytest.mark.usefixtures("_offline", "one_thread")
@pytest.mark.parametrize("recipe", RECIPES[1:], ids=name_of)
def test_docs_recipe_runs_alone_after_the_first_lines(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    namespace = {"__name__": "__main__"}
    codes = []
    for section in (RECIPES[0], recipe):
        codes += [code for language, code in BLOCK.findall(section) if language == "python"]
    assert len(codes) > 1
    for code in codes:
        run(code, DOCS / "recipes.md", namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_docs_page_names_the_language_of_each_of_its_blocks(page):
    fences = re.findall(r"^ *(`{3,}.*)$", page.read_text(), re.MULTILINE)
    assert len(fences) == 2 * len(blocks_of(page))
    assert {language for language, _ in blocks_of(page)} <= {"python", "text", "bash"}


def test_docs_menu_has_every_page():
    menu = (ROOT / "mkdocs.yml").read_text()
    assert sorted(re.findall(r": (\w+\.md)$", menu, re.MULTILINE)) == [page.name for page in PAGES]


def test_docs_reference_has_every_public_name():
    shown = re.findall(r"^::: minikeras\.(\w+)$", (DOCS / "reference.md").read_text(), re.MULTILINE)
    assert sorted(shown) == sorted(minikeras.__all__)


def test_docs_list_each_example():
    listed = re.findall(r"^\| `(\w+\.py)` \|", (DOCS / "examples.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def test_docs_figures_are_small_and_shown():
    figures = sorted((DOCS / "img").glob("*.png"))
    assert figures
    assert all(figure.stat().st_size < 100_000 for figure in figures)
    shown = []
    for page in [*PAGES, ROOT / "README.md"]:
        shown += re.findall(r"img/(\w+\.png)", page.read_text())
    assert set(shown) == {figure.name for figure in figures}


def texts_of_the_package():
    """Every string of the package but docstrings; a NUL where an f-string inserts a value."""
    texts = []
    for path in PACKAGE.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        docstrings = [node.value for node in nodes if isinstance(node, ast.Expr)]
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                parts = []
                for part in node.values:
                    parts.append(part.value if isinstance(part, ast.Constant) else "\0")
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                if node not in docstrings:
                    texts.append(node.value)
    return texts


def test_docs_quote_messages_that_the_package_has():
    tables = (DOCS / "troubleshooting.md").read_text().partition("## By message")[2]
    rows = [line for line in tables.splitlines() if line.startswith("| ")]
    quoted = [row.split("|")[1].strip() for row in rows]
    messages = [message for message in quoted if message != "message"]
    assert len(messages) > 20
    texts = texts_of_the_package()
    missing = []
    for message in messages:
        parts = message.strip("`").split("...")
        pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
        if not any(pattern.search(text) for text in texts):
            missing.append(message)
    assert missing == []
