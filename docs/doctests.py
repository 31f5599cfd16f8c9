"""For the reference, docstrings as griffe reads them.

>>> and what it prints      code
what follows ::             code
    name, other: text       an argument of its own for each name, with its type and default
"""

import re
import textwrap
from typing import Any

import griffe


def fenced(found: re.Match[str]) -> str:
    before, code = found.groups()
    return f"{before}{':' * bool(before)}\n\n```python\n{textwrap.dedent(code).strip()}\n```\n"


def one_by_one(found: re.Match[str]) -> str:
    names, text = found.groups()
    return "".join(f"    {name}:{text.rstrip()}\n" for name in names.split(", "))


class Doctests(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            text = re.sub(
                r"^>>> .*(?:\n.+)*", "```pycon\n\\g<0>\n```", obj.docstring.value, flags=re.M
            )
            text = re.sub(
                r"^    (\w+(?:, \w+)+):(.*\n?(?:        .*\n?)*)", one_by_one, text, flags=re.M
            )
            obj.docstring.value = re.sub(
                r"^(.*)::\n\n((?:    .*\n?|\n)+)", fenced, text, flags=re.M
            )
