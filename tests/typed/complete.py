"""Check with pyright that everything that the installed minikeras exports has a type.

Only what is public counts: the names in __all__, and the attributes and methods of those classes.
"""

import json
import subprocess
import sys

import minikeras

PUBLIC = {
    f"{value.__module__}.{name}"
    for name in minikeras.__all__
    for value in [getattr(minikeras, name)]
}

command = ["pyright", "--verifytypes", "minikeras", "--ignoreexternal", "--outputjson"]
found = json.loads(subprocess.run(command, capture_output=True, text=True, check=False).stdout)
symbols = [
    symbol
    for symbol in found["typeCompleteness"]["symbols"]
    if symbol["name"].startswith("minikeras.")
]
public = [
    symbol for symbol in symbols if PUBLIC & {symbol["name"], symbol["name"].rpartition(".")[0]}
]
unseen = PUBLIC - {symbol["name"] for symbol in public}
unknown = {
    symbol["name"]
    for symbol in public
    if not symbol["isTypeKnown"] and symbol["category"] != "class"
}
# a class counts by its members: by itself it is unknown for what it holds in private
if unseen or unknown:
    sys.exit(f"pyright does not know the types of: {', '.join(sorted(unseen | unknown))}")
print(f"{len(public)} public names, all typed")
