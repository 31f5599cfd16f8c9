"""What a page prints, without what differs from run to run."""

import re

# as minikeras.report.progress.clock writes it
TIME = r"(?:\d+\.\d s|\d+ min \d+ s|\d+ h \d+ min)"


def without_times(text):
    """Leave out times: those of a fit's table and of the line at its end, and a diagnosis's."""
    lines = []
    in_head = False
    for line in text.splitlines():
        if re.fullmatch(rf"(\d+ epochs?|epochs? \d+( to \d+)?) in {TIME}", line):
            continue
        if in_head:  # the dashes
            line = re.sub(r" +-+$", "", line)
        in_head = re.fullmatch(r"epoch .* time", line) is not None
        if in_head:
            line = re.sub(r" +time$", "", line)
        line = re.sub(rf"; {TIME}\.$", "", line)  # of a diagnosis
        lines.append(re.sub(rf" +{TIME}$", "", line))
    return "\n".join(lines)


def numbers_rounded(text):
    """Split a text, with two digits of each number: the rest may depend on the processor."""
    text = without_times(text)
    return re.sub(r"\d+\.\d+", lambda found: f"{float(found[0]):.1f}", text).split()
