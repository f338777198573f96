"""`make fuzz`: each target in a process of its own, with inputs that atheris chooses by what they reach in our code.

A finding ends the run: an exception that is not one of our errors, an input that takes ten seconds, or memory out of
proportion. Its file is `TARGET-crash-…` or `TARGET-timeout-…` in `build/fuzz/`, and
`python -m tests.fuzz TARGET FILE` reads it again.
"""

import argparse
import random
import resource
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

MEMORY = 1 << 30
"""Bytes of address space that reading a file of 64 KiB may take, beyond what was taken before."""


def limit_memory() -> None:
    """Make allocations fail that are out of proportion: torch and Python then raise errors that are not ours."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))


def fuzz(name: str, seconds: int, again: list[Path]) -> None:
    """Run one target: on files to read again, or for so long."""
    import torch

    torch.set_num_threads(1)
    instrumented: AbstractContextManager[None] = nullcontext()
    if not again:
        import atheris

        instrumented = atheris.instrument_imports(include=["diffusekrona"])
    with instrumented:
        from tests.fuzz.files import LARGEST, mutated
        from tests.fuzz.targets import TARGETS, run

    target = TARGETS[name]
    torch.manual_seed(0)
    seeds = list(target.seeds())
    for seed in seeds:
        run(target, seed)
    if sys.platform == "linux":
        limit_memory()
    for path in again:
        run(target, path.read_bytes())
    if again:
        return
    corpus = Path("build/fuzz") / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)

    def mutate(data: bytes, largest: int, seed: int) -> bytes:
        changed = mutated(bytes(data), seeds, random.Random(seed))
        return changed if len(changed) <= largest else changed[:largest]

    options = [
        f"-max_total_time={seconds}",
        "-timeout=10",
        "-rss_limit_mb=0",
        f"-max_len={LARGEST}",
        f"-artifact_prefix={corpus}-",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], lambda data: run(target, data), custom_mutator=mutate)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", nargs="?", help="by default all, one after the other")
    parser.add_argument("file", nargs="*", type=Path, help="files to read again, in place of fuzzing")
    parser.add_argument("--seconds", type=int, default=50, help="for each target")
    asked = parser.parse_args()
    if asked.target is not None:
        fuzz(asked.target, asked.seconds, asked.file)
        return
    from tests.fuzz.targets import TARGETS

    for name in TARGETS:
        print(f"== {name}", flush=True)
        command = [sys.executable, "-m", "tests.fuzz", name, "--seconds", str(asked.seconds)]
        if subprocess.run(command, check=False).returncode:
            sys.exit(f"{name}: a finding; see above and build/fuzz/")


if __name__ == "__main__":
    main()
