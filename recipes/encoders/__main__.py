"""`python -m recipes.encoders [stage ...]`: clip, vision, judge in order, or those named; goes on where it stopped."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from recipes.base.training import load_checkpoint, note

from . import clip, vision

RESULTS = Path(__file__).parent / "results.json"


def make_judgement() -> None:
    """Held-out retrieval of both encoders, into `results.json`."""
    report = {}
    for name, stage in (("clip", clip), ("vision", vision)):
        state = load_checkpoint(stage.CHECKPOINT)
        spent = state["budget"] if state else {"step": 0, "minutes": 0.0}
        steps, minutes = int(spent["step"]), round(float(spent["minutes"]), 1)
        report[stage.FOLDER.name] = {"steps": steps, "minutes": minutes, "held out": stage.judge()}
        note(f"{name}: {report[stage.FOLDER.name]}")
    RESULTS.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


STAGES: dict[str, Callable[[], None]] = {"clip": clip.train, "vision": vision.train, "judge": make_judgement}


def main() -> None:
    """Run the stages asked for, in their order."""
    parser = argparse.ArgumentParser(prog="python -m recipes.encoders", description=__doc__)
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"any of: {', '.join(STAGES)} (default: all)")
    named = parser.parse_args().stages
    for name, stage in STAGES.items():
        if not named or name in named:
            stage()


if __name__ == "__main__":
    main()
