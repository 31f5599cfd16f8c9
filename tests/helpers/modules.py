"""The modules of the package, and the order in which they may import each other."""

from helpers.paths import PACKAGE

# a module may import those below it only; a folder is one room
ORDER = [
    ["__main__", "integrations"],
    ["__init__"],
    ["model", "plotting"],
    ["prediction", "export"],
    ["loop", "notebook", "jit"],
    ["progress", "checkpoint"],
    ["run"],
    ["callbacks"],
    ["precision"],
    ["metrics", "layer_summary"],
    ["columns", "on_all_rows"],
    ["checks"],
    ["broadcast", "losses", "faults"],
    ["data"],
    ["distributed", "randomness", "atomic"],
    ["results"],
    ["modes"],
    ["exported"],
    ["errors", "overrides", "paths", "reachable"],
]

LEVELS = {}
for number, names in enumerate(ORDER):
    for name in names:
        LEVELS[name] = number

MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]
