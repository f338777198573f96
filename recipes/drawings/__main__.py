"""`python -m recipes.drawings [stage ...]`: all stages in order, or those named; goes on where it was killed."""

import argparse
from collections.abc import Callable

from . import art, classifier, encoder, export, judge, subjects, unet, vae
from .training import note


def make_art() -> None:
    """Fetch the drawings, put them into the bank, and draw the subjects' pictures."""
    art.fetch()
    art.make_bank()
    subjects.draw_all()
    note(f"art done: {len(art.places())} drawings, {len(art.concepts())} concepts in {len(art.STYLES)} styles")


STAGES: dict[str, Callable[[], None]] = {
    "art": make_art,
    "vae": vae.train,
    "unet": unet.train,
    "export": export.export,
    "classifier": classifier.train,
    "encoder": encoder.train,
    "judge": judge.judge,
}


def main() -> None:
    """Run the stages asked for, in their order."""
    parser = argparse.ArgumentParser(prog="python -m recipes.drawings", description=__doc__)
    listed = ", ".join(STAGES)
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"any of: {listed} (default: all)")
    named = parser.parse_args().stages
    if unknown := set(named) - set(STAGES):
        parser.error(f"no such stage: {', '.join(sorted(unknown))}")
    for name, stage in STAGES.items():
        if not named or name in named:
            stage()


if __name__ == "__main__":
    main()
