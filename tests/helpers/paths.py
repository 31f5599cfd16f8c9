"""The folders of the repository, and of the package, which may be installed elsewhere."""

from pathlib import Path

import minikeras

PACKAGE = Path(minikeras.__file__).parent
ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
