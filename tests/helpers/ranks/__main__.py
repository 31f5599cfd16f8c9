"""One process of torchrun."""

import sys

from helpers.launch import save_results
from helpers.ranks import CASES

if __name__ == "__main__":
    save_results(CASES, sys.argv[1], sys.argv[2:])
