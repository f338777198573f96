"""Run a script with KronA in PEFT's tables of methods: `python with_krona.py SCRIPT ARGUMENTS…`."""

import runpy
import sys
from pathlib import Path

import diffusekrona  # noqa: F401 (enters KronA)

if __name__ == "__main__":
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)  # as Python does for a script
    runpy.run_path(sys.argv[0], run_name="__main__")
