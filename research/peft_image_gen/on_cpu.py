"""Run the benchmark's script with KronA and, where there is no GPU, on the CPU: `python on_cpu.py run.py ARGUMENTS…`.

The benchmark refuses a CPU as its module `utils` is imported, and asks the device for memory. So `utils` is imported
while PEFT claims a GPU, then told of the CPU, which gets the functions that PyTorch has for GPUs. They count nothing.
"""

import runpy
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import peft.utils
import torch

import diffusekrona  # noqa: F401 (enters KronA)


def stand_in() -> None:
    """Let the benchmark take the CPU for a device of its."""
    cpu: Any = torch.cpu
    for name in ("memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cpu, name, lambda: 0)
    for name in ("reset_peak_memory_stats", "empty_cache"):
        setattr(cpu, name, lambda: None)
    cpu.manual_seed_all = torch.manual_seed
    cpu.get_device_name = lambda number: "CPU (dry run)"
    theirs: Any = peft.utils
    theirs.infer_device = lambda: "cuda"
    import_module("utils").device = "cpu"  # type: ignore[attr-defined]
    theirs.infer_device = lambda: "cpu"


if __name__ == "__main__":
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    if peft.utils.infer_device() not in ("cuda", "xpu"):
        stand_in()
    runpy.run_path(sys.argv[0], run_name="__main__")
