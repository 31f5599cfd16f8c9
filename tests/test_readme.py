"""The README runs, and names what there is."""

import contextlib
import io
import re

from helpers.pages import numbers_rounded
from helpers.paths import PACKAGE, ROOT


def test_readme_runs_and_prints_what_it_shows():
    readme = (ROOT / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```\n", readme, re.DOTALL)
    shown = re.search(r"```text\n(.*?)```\n", readme[code.end() :], re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code[1], "README.md", "exec"), {"__name__": "__main__"})
    assert numbers_rounded(printed.getvalue()) == numbers_rounded(shown[1])


def test_readme_names_each_module():
    readme = (ROOT / "README.md").read_text()
    rooms = {path.name for path in PACKAGE.glob("*.py")} | {
        f"{path.parent.name}/" for path in PACKAGE.glob("*/*.py")
    }
    assert rooms == set(re.findall(r"^  (\w+(?:\.py|/))  ", readme, re.MULTILINE))
