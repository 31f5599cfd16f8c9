"""What a page prints."""

import re


def numbers_rounded(text):
    """Two digits of each number: the rest may differ from one processor to another."""
    return re.sub(r"\d+\.\d+", lambda found: f"{float(found[0]):.1f}", text).split()
