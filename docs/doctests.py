"""For the reference: the examples in docstrings, `>>>` and what it prints, are shown as code."""

import re
from typing import Any

import griffe


class Doctests(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"^>>> .*(?:\n.+)*", "```pycon\n\\g<0>\n```", obj.docstring.value, flags=re.M)
