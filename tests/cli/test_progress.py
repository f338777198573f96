import io
import re

import pytest
from rich.console import Console

from diffusekrona.cli import progress as bars
from diffusekrona.training import TrainingStep


@pytest.fixture
def shown(monkeypatch):
    """What is written to a terminal of 80 columns."""
    terminal = io.StringIO()
    monkeypatch.setattr(bars, "errors", Console(file=terminal, width=80, force_terminal=True, color_system=None))
    return lambda: [re.sub(r"\x1b\[[\d?]*\w", "", line).strip() for line in re.split(r"[\r\n]+", terminal.getvalue())]


def step(number, steps=1000):
    return TrainingStep(number, steps, 0.9, 0.1234567, 5e-4, 100.0, 12.3456)


def test_training_shows_steps_loss_learning_rate_speed_and_time_left_on_80_columns(shown):
    with bars.training_progress() as show:
        show(step(999))
        show(step(1000))
    line = next(line for line in reversed(shown()) if line)
    assert re.fullmatch(r"Training ━+ 1000/1000 loss 0\.1235 lr 5\.0e-04 12\.3 images/s left 0:00:00", line), line
    assert len(line) <= 80


def test_there_is_no_bar_before_the_first_step(shown):
    with pytest.raises(ValueError, match="early"), bars.training_progress():
        raise ValueError("early")
    assert shown() == [""]


def test_class_images_have_a_bar_that_ends_before_that_of_the_training(shown):
    with bars.class_images_progress() as drawn, bars.training_progress() as trained:
        for done in (1, 2, 3):
            drawn(done, 3)
        trained(step(1, 2))
        trained(step(2, 2))
    text = "\n".join(shown())
    assert re.search(r"Class images ━+ 3/3 left 0:00:00", text)
    assert text.rindex("Class images") < text.index("Training")


def test_a_bar_that_is_interrupted_gives_the_terminal_back(shown):
    def interrupted():
        with bars.class_images_progress() as drawn:
            drawn(1, 9)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with bars.training_progress() as trained:
        trained(step(1, 2))
    assert any(re.match(r"Class images ━*[╸╺]?━* *1/9 ", line) for line in shown())
    assert any(line.startswith("Training") for line in shown())
