"""What a page prints."""

import re


def numbers_rounded(text):
    """Split a text, with two digits of each number: the rest may depend on the processor."""
    return re.sub(r"\d+\.\d+", lambda found: f"{float(found[0]):.1f}", text).split()
