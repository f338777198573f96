"""What a run is between two steps, and how a step's gradients change it; its checkpoints."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ..errors import CheckpointError, TrainingDivergedError
from .batches import Batches
from .checkpoints import Checkpoint, Checkpoints
from .config import TrainingConfig
from .optimizers import optimizer_of, optimizer_state, restore_optimizer
from .progress import Interrupted, TrainingResult, TrainingStep, recent_mean
from .runtime import modes_kept

_log = logging.getLogger(__name__)

MAY_DIFFER = (
    "max_train_steps", "checkpointing_steps", "checkpoints_total_limit", "cache", "gradient_checkpointing", "offload",
    "on_non_finite", "validation_loss_steps",
)  # fmt: skip
"""Settings that a run may change when it goes on from a checkpoint."""

STEADY = ("constant", "constant_with_warmup")
"""Schedules that do not depend on how many steps there will be."""

MOST_SKIPPED = 100
"""Steps in a row that are skipped before a run that skips them stops after all."""


VALIDATION_BATCHES = 8
"""Batches of held-out images, whose noise and noise levels are the same each time."""


class LossPart(NamedTuple):
    """A part of a run's loss.

    Attributes:
        batches: of its images.
        weight: what it counts.
        prompt: where it is how far the predictions for this prompt are from the base's own; None where it is the
            images' own loss.
    """

    batches: Batches
    weight: float
    prompt: str | None = None


class RunState:
    """A run between two steps: parameters, optimizer, schedule, averages and losses so far.

    Args:
        parts: of the loss, whose images tell this run from others.
        parameters: what is trained, by name.
        accelerator: device and processes.
        config: how.
        folder: for checkpoints; without it there are none.
        about: what else tells this run from others, values for JSON.
        validation: batches of images that are not trained on.
        modules: those in training mode.
    """

    def __init__(
        self,
        parts: Sequence[LossPart],
        parameters: Mapping[str, nn.Parameter],
        accelerator: Accelerator,
        config: TrainingConfig,
        folder: Path | None,
        about: Mapping[str, Any],
        validation: Batches | None,
        modules: Sequence[nn.Module],
    ) -> None:
        self.parts, self.parameters, self.config = parts, parameters, config
        self._validation, self._modules = validation, modules
        self.validation_losses: dict[int, float] = {}
        self._about: dict[str, Any] = json.loads(json.dumps(about, default=sorted))  # as a file has it; sets are sorted
        self.newest_file: Path | None = None
        self._accelerator = accelerator
        self._checkpoints = Checkpoints(folder / "checkpoints", config.checkpoints_total_limit) if folder else None
        optimizer = optimizer_of(parameters, config)
        self._schedule = get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
        )
        self._plain_optimizer = optimizer
        # Not `prepare`, which with FSDP takes an optimizer only beside its model.
        self._optimizer: Any = accelerator.prepare_optimizer(optimizer)
        self._ema = None if config.ema_decay is None else EMAModel(parameters.values(), decay=config.ema_decay)
        self.losses: list[float] = []
        self.seconds = 0.0
        self.started_at = 0

    @property
    def step(self) -> int:
        """How many are done."""
        return len(self.losses)

    @property
    def finished(self) -> bool:
        """Whether the last one is done."""
        return self.step >= self.config.max_train_steps

    @property
    def numbers(self) -> range:
        """Of the batches of the next step."""
        passes = self.config.gradient_accumulation_steps
        return range(self.step * passes, (self.step + 1) * passes)

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        found = self._checkpoints.newest() if self._checkpoints is not None else None
        if found is not None:
            self._restore(found)

    def update(self, loss: float) -> float:
        """Take a step along the gradients, and validate where it is due; the learning rate that it used.

        Args:
            loss: the mean that the gradients are of.

        Raises:
            TrainingDivergedError: the loss or a gradient is not finite, and such steps are not skipped.
        """
        rate = float(self._schedule.get_last_lr()[0])
        norm = self._accelerator.clip_grad_norm_(list(self.parameters.values()), self.config.max_grad_norm or math.inf)
        # fp16's scaler finds gradients that are not finite by itself, and lowers its scale.
        finite = math.isfinite(loss) and (self._accelerator.scaler is not None or bool(torch.isfinite(norm)))
        if not finite:
            self._not_finite(loss)
            # Without gradients, the optimizer's step changes nothing; the schedule and fp16's scaler wait for it.
            self._optimizer.zero_grad(set_to_none=True)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss if finite else math.nan)
        if self._ema is not None and finite:
            self._ema.step(self.parameters.values())
        return rate

    @torch.no_grad()
    def validate(self) -> None:
        """Compute the loss of the held-out images, without dropout, where it is due."""
        done = self.step
        if self._validation is None or (
            done % self.config.validation_loss_steps and done != self.config.max_train_steps
        ):
            return
        with self.averaged(), modes_kept(self._modules):
            for module in self._modules:
                module.eval()
            total = sum(float(self._validation.loss(number)) for number in range(VALIDATION_BATCHES))
        mean = torch.tensor(total / VALIDATION_BATCHES, device=self._accelerator.device)
        self.validation_losses[done] = float(self._accelerator.reduce(mean, "mean"))

    def end(self) -> None:
        """Let the parameters be what they end as: their averages, where there are any."""
        if self._ema is not None:
            self._ema.copy_to(self.parameters.values())

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the parameters be for a while what they would end as now."""
        if self._ema is None:
            yield
            return
        self._ema.store(self.parameters.values())
        self._ema.copy_to(self.parameters.values())
        try:
            yield
        finally:
            self._ema.restore(self.parameters.values())

    def report(self, rate: float, interrupted: Interrupted) -> TrainingStep:
        """What is known after a step that used this learning rate."""
        done = self.step
        images = len(self.parts) * self.config.train_batch_size * self._accelerator.num_processes
        per_step = images * self.config.gradient_accumulation_steps
        return TrainingStep(
            done,
            self.config.max_train_steps,
            self.losses[-1],
            recent_mean(self.losses),
            rate,
            self.seconds,
            (done - self.started_at) * per_step / self.seconds,
            self.validation_losses.get(done),
            self.averaged,
            interrupted,
        )

    def result(self, images: int) -> TrainingResult:
        """What a finished run on so many images was."""
        return TrainingResult(
            tuple(self.losses),
            self.seconds,
            images,
            sum(p.numel() for p in self.parameters.values()),
            self.started_at,
            self.validation_losses,
        )

    # Checkpoints

    def due(self) -> bool:
        """Whether a checkpoint is to be written after this step."""
        done = self.step
        return done % self.config.checkpointing_steps == 0 or done == self.config.max_train_steps

    def save(self) -> None:
        """Write a checkpoint, where there is a folder; the first process does."""
        if self._checkpoints is not None:
            if self._accelerator.is_main_process:
                self._checkpoints.save(self.step, *self._state())
            self.newest_file = self._checkpoints.file(self.step)
            self._accelerator.wait_for_everyone()

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        optimizer, values = optimizer_state(self._plain_optimizer)
        tensors = {f"factor/{name}": parameter.detach() for name, parameter in self.parameters.items()}
        tensors |= {f"optimizer/{name}": tensor for name, tensor in optimizer.items()}
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        state = {
            "step": self.step,
            "config": {**self._about, **dict(self.config)},
            "images": [part.batches.marks for part in self.parts],
            "validation": self.validation_losses,
            "processes": self._accelerator.num_processes,
            "optimizer": values,
            "schedule": self._schedule.state_dict(),
        }
        if self._ema is not None:
            averages = zip(self.parameters, self._ema.shadow_params, strict=True)
            tensors |= {f"ema/{name}": average for name, average in averages}
            state["ema"] = self._ema.optimization_step
        if self._accelerator.scaler is not None:
            state["scaler"] = self._accelerator.scaler.state_dict()
        return tensors, state

    def _restore(self, found: Checkpoint) -> None:
        self._check_same(found)
        part = {
            kind: {
                name.removeprefix(f"{kind}/"): tensor
                for name, tensor in found.tensors.items()
                if name.startswith(f"{kind}/")
            }
            for kind in ("factor", "optimizer", "ema")
        }
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(part["factor"][name])
        restore_optimizer(self._plain_optimizer, part["optimizer"], found.values["optimizer"])
        self._schedule.load_state_dict(found.values["schedule"])
        if self._ema is not None:
            device = self._accelerator.device
            self._ema.shadow_params = [part["ema"][name].to(device) for name in self.parameters]
            self._ema.optimization_step = found.values["ema"]
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(found.values["scaler"])
        self.losses = found.tensors["losses"].tolist()
        self.validation_losses = {int(step): loss for step, loss in found.values.get("validation", {}).items()}
        self.started_at, self.newest_file = found.step, found.path
        if (
            self.config.lr_scheduler not in STEADY
            and found.values["config"]["max_train_steps"] != self.config.max_train_steps
        ):
            _log.warning("max_train_steps is another than before, so the schedule of the learning rate is, too.")

    def _check_same(self, found: Checkpoint) -> None:
        """Raise `CheckpointError` unless a checkpoint is of this very run."""
        now, then = {**self._about, **dict(self.config)}, found.values["config"]
        problems = [
            f"{name} was {then.get(name)!r} and is {now[name]!r}"
            for name in now
            if name not in MAY_DIFFER and now[name] != then.get(name)
        ]
        shapes = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        saved = {
            name.removeprefix("factor/"): tuple(tensor.shape)
            for name, tensor in found.tensors.items()
            if name.startswith("factor/")
        }
        if shapes != saved:
            problems.append("other parameters are trained")
        if found.values["images"] != [part.batches.marks for part in self.parts]:
            problems.append("the images or their prompts are others")
        if found.values["processes"] != self._accelerator.num_processes:
            problems.append(f"there were {found.values['processes']} processes")
        if found.step > self.config.max_train_steps:
            problems.append(f"it has done {found.step} steps, more than max_train_steps")
        if problems:
            raise CheckpointError(
                f"The checkpoint {found.path} is of another run: {'; '.join(problems)}. Resume with the settings that "
                "it was begun with, or start anew in another folder."
            )

    # What must not be

    def _not_finite(self, loss: float) -> None:
        what = f"The loss became {loss}" if not math.isfinite(loss) else "A gradient is not a finite number"
        each = (part.batches.sources(number) for number in self.numbers for part in self.parts)
        files = ", ".join(dict.fromkeys(name for names in each for name in names))
        skipped = self.step - max((i + 1 for i, one in enumerate(self.losses) if math.isfinite(one)), default=0)
        if self.config.on_non_finite == "stop" or skipped + 1 >= MOST_SKIPPED:
            again = f" and in the {skipped} before" if skipped else ""
            raise self._diverged(f"{what} at step {self.step + 1} of {self.config.max_train_steps}{again}, on {files}")

    def check_finite(self) -> None:
        """Raise `TrainingDivergedError` where a parameter is no finite number."""
        if not all(bool(parameter.isfinite().all()) for parameter in self.parameters.values()):
            raise self._diverged("A trained weight is no longer a finite number")

    def _diverged(self, what: str) -> TrainingDivergedError:
        wider = {"fp16": ' or mixed_precision "bf16"', "bf16": ' or mixed_precision "no"'}
        newest = self.newest_file
        return TrainingDivergedError(
            f"{what}. {f'The last good checkpoint is {newest}' if newest else 'Nothing was saved'}. "
            f"Try a learning rate below {self.config.learning_rate:g}{wider.get(self.config.mixed_precision, '')}, "
            'look for images that are blank or damaged, or let such steps be skipped: on_non_finite "skip".'
        )
