"""For the reference: the examples in docstrings are shown as code, `>>>` and what it prints, and what follows `::`."""

import re
import textwrap
from typing import Any

import griffe


def fenced(found: re.Match[str]) -> str:
    before, code = found.groups()
    return f"{before}{':' * bool(before)}\n\n```python\n{textwrap.dedent(code).strip()}\n```\n"


class Doctests(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            text = re.sub(r"^>>> .*(?:\n.+)*", "```pycon\n\\g<0>\n```", obj.docstring.value, flags=re.M)
            obj.docstring.value = re.sub(r"^(.*)::\n\n((?:    .*\n?|\n)+)", fenced, text, flags=re.M)
