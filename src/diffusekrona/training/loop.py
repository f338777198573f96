"""The training loop. It optimizes any parameters of a pipeline on any images and knows no kind of adapter."""

from __future__ import annotations

import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ..errors import CheckpointError, TrainingConfigError, TrainingDivergedError, TrainingInterrupted
from .batches import AsBase, Batches, free_encoders, trained_encoders
from .checkpoints import Checkpoint, Checkpoints
from .config import TrainingConfig
from .data import TrainingImage
from .families import family_of
from .optimizer_names import check_optimizer
from .optimizers import optimizer_of, optimizer_state, restore_optimizer
from .randomness import seed_for
from .runtime import accelerator_for, checkpointed, modes_kept, random_state_kept, sharding_of

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


@dataclass(frozen=True)
class TrainingStep:
    """What is known after each optimizer step.

    Attributes:
        step: how many are done, from 1.
        steps: how many there will be.
        loss: of this step, averaged over its batches; NaN where the step was skipped.
        average: mean loss of the last 50 steps, or of all so far; steadier, because noise levels are random.
        learning_rate: that this step used.
        seconds: since this run, or the part of it after it was resumed, began its first step.
        images_per_second: in that time, of all processes together.
        validation_loss: of the held-out images after this step, over noise that is the same each time; None where it
            was not computed.
        averaged: with it, the parameters are for a while what they would end as now: with `ema_decay`, their averages.
    """

    step: int
    steps: int
    loss: float
    average: float
    learning_rate: float
    seconds: float
    images_per_second: float
    validation_loss: float | None = None
    averaged: Callable[[], AbstractContextManager[None]] = field(default=nullcontext, repr=False, compare=False)


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run was.

    Attributes:
        losses: one per optimizer step; NaN where it was skipped.
        seconds: that the steps took, without loading and encoding.
        images: how many images it was trained on.
        parameters: how many numbers were trained.
        resumed_at: the step that it went on from; 0 where it started anew.
        validation_losses: of the held-out images, by step.
    """

    losses: tuple[float, ...]
    seconds: float
    images: int
    parameters: int
    resumed_at: int = 0
    validation_losses: Mapping[int, float] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return len(self.losses)

    @property
    def final_loss(self) -> float:
        """Mean over the last 50 steps; one step's loss says little, because its noise levels are random."""
        return _recent_mean(self.losses)


def _recent_mean(losses: Sequence[float]) -> float:
    recent = [loss for loss in losses[-50:] if math.isfinite(loss)]
    return sum(recent) / len(recent) if recent else math.nan


def fit(
    pipe: Any,
    images: Sequence[TrainingImage],
    parameters: Mapping[str, nn.Parameter],
    config: TrainingConfig,
    on_step: Callable[[TrainingStep], None] | None = None,
    *,
    class_images: Sequence[TrainingImage] = (),
    held_out: Sequence[TrainingImage] = (),
    as_base: AsBase | None = None,
    folder: Path | None = None,
    resume: bool = False,
    about: Mapping[str, Any] | None = None,
    keep_encoders: bool = True,
) -> TrainingResult:
    """Train parameters of a pipeline's denoiser, and of its text encoders if the config says so.

    The pipeline is moved to accelerate's device. Its scheduler, its frozen weights and each module's train or
    eval mode are as before when this returns or raises. With `ema_decay`, the parameters end as their averages,
    also where the user stops the run; a checkpoint has both.

    Started by accelerate in several processes, each computes its share of every batch, and gradients are averaged;
    factors are those of one process with the same batch in all, but for rounding. With FSDP in its settings, the
    denoiser's frozen weights are split meanwhile; they are lost if one process fails by itself.

    Args:
        pipe: a pipeline of a family that `families` has, in which nothing but `parameters` requires gradients.
        images: what to learn; see `load_folder` and `prepare_images`.
        parameters: what to optimize, float32, by name; those of a text encoder start with `text_encoder`.
        config: how.
        on_step: called after every optimizer step, in every process; what it raises ends the run.
        class_images: of other subjects of the class, which the model shall draw as before (prior preservation).
        held_out: images that are not trained on; their loss is computed now and then.
        as_base: makes the pipeline the base's for a while, which `prior_prompt` needs.
        folder: for checkpoints and what is cached on disk; without it, there are no checkpoints.
        resume: go on from the newest checkpoint in the folder, if there is one; otherwise those there are replaced.
        about: what else tells this run from others, values for JSON; a checkpoint of another is not gone on from.
        keep_encoders: without, the pipeline loses the encoders that no step runs, and their memory is free.

    Raises:
        UnsupportedPipelineError: the pipeline is of another kind.
        TrainingConfigError: the configuration does not suit the pipeline or the machine.
        TrainingDivergedError: a loss, a gradient or a parameter is not finite.
        CheckpointError: one cannot be written, or belongs to another run.
        TrainingInterrupted: the user stopped it; it can be resumed if it has a folder.
    """
    family = family_of(pipe)
    if config.guidance_scale != 1 and not family.denoiser.config.get("guidance_embeds"):
        raise TrainingConfigError(
            "guidance_scale is told to bases that were distilled for it, and this "
            f"{type(family.denoiser).__name__} was not. Leave it out."
        )
    family.guidance = config.guidance_scale
    check_optimizer(config)
    if not parameters:
        raise TrainingConfigError("There is nothing to train: no parameters were given.")
    if config.cache == "disk" and folder is None:
        raise TrainingConfigError("cache 'disk' needs a folder for its files.")
    modules = [module for module in pipe.components.values() if isinstance(module, nn.Module)]
    trained = [family.denoiser, *trained_encoders(pipe, config)]
    with ExitStack() as borrowed:
        accelerator = borrowed.enter_context(accelerator_for(config.mixed_precision))
        config = config.in_steps(len(images), accelerator.num_processes)
        sharding = sharding_of(accelerator.state)
        borrowed.enter_context(random_state_kept(accelerator.device))
        borrowed.enter_context(modes_kept(modules))
        borrowed.callback(pipe.to, "cpu" if config.offload != "none" else accelerator.device)
        for module in modules:
            module.train(module in trained)
        sets = [("subject", images, 1.0)]
        if class_images:
            sets.append(("class", class_images, config.prior_loss_weight))
        prior = [] if config.prior_prompt is None else [config.prior_prompt]
        cache = folder and folder / "cache"
        made = [Batches(name, pipe, family, some, config, accelerator, cache, prior) for name, some, _ in sets]
        losses = [_Loss(batches.loss, batches, weight) for batches, (*_, weight) in zip(made, sets, strict=True)]
        if config.prior_prompt is not None:
            kept = partial(made[0].kept, prompt=config.prior_prompt, as_base=_needed(as_base))
            losses.append(_Loss(kept, made[0], config.prior_loss_weight))
        validation = Batches("held-out", pipe, family, held_out, config, accelerator, cache) if held_out else None
        if not keep_encoders:
            free_encoders(pipe, config)
        if config.offload != "none":
            if sharding is not None:
                raise TrainingConfigError(
                    "offload is not possible with FSDP, which has a way of its own: leave it out."
                )
            from .offload import offloaded

            borrowed.enter_context(offloaded(family.denoiser, parameters.values(), accelerator.device, config.offload))
        elif sharding is None:  # not before, so that the device never holds the encoders beside it
            family.denoiser.to(accelerator.device)
        else:  # the device may have no room for more than these
            for parameter in parameters.values():
                parameter.data = parameter.data.to(accelerator.device)
        if config.gradient_checkpointing:
            borrowed.enter_context(checkpointed(trained))
        run = _Run(losses, parameters, accelerator, config, folder, about or {}, validation, trained)
        if resume:
            run.resume()
        if sharding is not None:
            from .sharded import sharded  # which needs a newer PyTorch than the rest

            borrowed.enter_context(sharded(pipe, family.denoiser, parameters.values(), sharding))
        run.finish(on_step)
    return TrainingResult(
        tuple(run.losses),
        run.seconds,
        len(images),
        sum(p.numel() for p in parameters.values()),
        run.started_at,
        run.validation_losses,
    )


def _needed(as_base: AsBase | None) -> AsBase:
    if as_base is None:
        raise TrainingConfigError("prior_prompt needs a way to the base's own predictions: give as_base.")
    return as_base


class _Loss(NamedTuple):
    """A part of the loss: what gives it for a batch's number, whose batches these are, and its weight."""

    of: Callable[[int], Tensor]
    batches: Batches
    weight: float


VALIDATION_BATCHES = 8
"""Batches of held-out images, whose noise and noise levels are the same each time."""


class _Run:
    """A run between two steps: what it has become so far, and how it goes on."""

    def __init__(
        self,
        sources: Sequence[_Loss],
        parameters: Mapping[str, nn.Parameter],
        accelerator: Accelerator,
        config: TrainingConfig,
        folder: Path | None,
        about: Mapping[str, Any],
        validation: Batches | None,
        modules: Sequence[nn.Module],
    ) -> None:
        self._validation, self._modules = validation, modules
        self.validation_losses: dict[int, float] = {}
        self._about: dict[str, Any] = json.loads(json.dumps(about, default=sorted))  # as a file has it; sets are sorted
        self._newest_file: Path | None = None
        self._sources, self._parameters, self._accelerator, self._config = sources, parameters, accelerator, config
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

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        found = self._checkpoints.newest() if self._checkpoints is not None else None
        if found is not None:
            self._restore(found)

    def finish(self, on_step: Callable[[TrainingStep], None] | None) -> None:
        """All the steps that are left."""
        began = time.monotonic()
        images = len(self._sources) * self._config.train_batch_size * self._accelerator.num_processes
        with _interruptions() as interrupted:
            while len(self.losses) < self._config.max_train_steps:
                rate = float(self._schedule.get_last_lr()[0])
                stop = self._step(interrupted())
                self.seconds = time.monotonic() - began
                self._validate()
                if self._due() or stop:
                    self._save()
                if on_step is not None:
                    on_step(self._report(rate, images))
                if stop and len(self.losses) < self._config.max_train_steps:
                    self._end_as_averages()
                    raise TrainingInterrupted(len(self.losses), self._newest_file)
        self._check_finite()
        self._end_as_averages()

    @torch.no_grad()
    def _validate(self) -> None:
        """Compute the loss of the held-out images, without dropout, where it is due."""
        done = len(self.losses)
        if self._validation is None or (
            done % self._config.validation_loss_steps and done != self._config.max_train_steps
        ):
            return
        with self._averaged_meanwhile(), modes_kept(self._modules):
            for module in self._modules:
                module.eval()
            total = sum(float(self._validation.loss(number)) for number in range(VALIDATION_BATCHES))
        mean = torch.tensor(total / VALIDATION_BATCHES, device=self._accelerator.device)
        self.validation_losses[done] = float(self._accelerator.reduce(mean, "mean"))

    def _end_as_averages(self) -> None:
        if self._ema is not None:
            self._ema.copy_to(self._parameters.values())

    @contextmanager
    def _averaged_meanwhile(self) -> Iterator[None]:
        if self._ema is None:
            yield
            return
        self._ema.store(self._parameters.values())
        self._ema.copy_to(self._parameters.values())
        try:
            yield
        finally:
            self._ema.restore(self._parameters.values())

    def _step(self, interrupted: bool) -> bool:
        """One optimizer step; whether some process was asked to stop."""
        step = len(self.losses)
        loss, stop = self._gradients(step, interrupted)
        norm = self._accelerator.clip_grad_norm_(
            list(self._parameters.values()), self._config.max_grad_norm or math.inf
        )
        # fp16's scaler finds gradients that are not finite by itself, and lowers its scale.
        finite = math.isfinite(loss) and (self._accelerator.scaler is not None or bool(torch.isfinite(norm)))
        if not finite:
            self._not_finite(step, loss)
            # Without gradients, the optimizer's step changes nothing; the schedule and fp16's scaler wait for it.
            self._optimizer.zero_grad(set_to_none=True)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss if finite else math.nan)
        if self._ema is not None and finite:
            self._ema.step(self._parameters.values())
        return stop

    def _gradients(self, step: int, interrupted: bool) -> tuple[float, bool]:
        """Add up the gradients of the mean loss over a step's batches; that loss, and whether to stop."""
        passes, total = self._config.gradient_accumulation_steps, 0.0
        for number in self._numbers(step):
            for part in self._sources:
                # Dropout draws from here, anew in each process.
                purpose = ("dropout", number, self._accelerator.process_index)
                torch.manual_seed(seed_for(self._config.seed, *purpose))
                loss = part.of(number) * (part.weight / passes)
                self._accelerator.backward(loss)
                total += float(loss.detach())
        return self._averaged(total, interrupted)

    def _numbers(self, step: int) -> range:
        passes = self._config.gradient_accumulation_steps
        return range(step * passes, (step + 1) * passes)

    def _averaged(self, loss: float, interrupted: bool) -> tuple[float, bool]:
        """Average gradients and loss over the processes."""
        if self._accelerator.num_processes == 1:
            return loss, interrupted
        grads = [p.grad for p in self._parameters.values() if p.grad is not None]
        device = self._accelerator.device
        flat = torch.cat([*(grad.flatten() for grad in grads), torch.tensor([loss, float(interrupted)], device=device)])
        flat = self._accelerator.reduce(flat, "mean")
        for grad, mean in zip(grads, flat[:-2].split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(mean.view_as(grad))
        return float(flat[-2]), bool(flat[-1] > 0)

    def _report(self, rate: float, images: int) -> TrainingStep:
        done = len(self.losses)
        per_step = images * self._config.gradient_accumulation_steps
        return TrainingStep(
            done,
            self._config.max_train_steps,
            self.losses[-1],
            _recent_mean(self.losses),
            rate,
            self.seconds,
            (done - self.started_at) * per_step / self.seconds,
            self.validation_losses.get(done),
            self._averaged_meanwhile,
        )

    # Checkpoints

    def _due(self) -> bool:
        done = len(self.losses)
        return done % self._config.checkpointing_steps == 0 or done == self._config.max_train_steps

    def _save(self) -> None:
        if self._checkpoints is not None:
            if self._accelerator.is_main_process:
                self._checkpoints.save(len(self.losses), *self._state())
            self._newest_file = self._checkpoints.file(len(self.losses))
            self._accelerator.wait_for_everyone()

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        optimizer, values = optimizer_state(self._plain_optimizer)
        tensors = {f"factor/{name}": parameter.detach() for name, parameter in self._parameters.items()}
        tensors |= {f"optimizer/{name}": tensor for name, tensor in optimizer.items()}
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        state = {
            "step": len(self.losses),
            "config": {**self._about, **dict(self._config)},
            "images": [part.batches.marks for part in self._sources],
            "validation": self.validation_losses,
            "processes": self._accelerator.num_processes,
            "optimizer": values,
            "schedule": self._schedule.state_dict(),
        }
        if self._ema is not None:
            averages = zip(self._parameters, self._ema.shadow_params, strict=True)
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
            for name, parameter in self._parameters.items():
                parameter.copy_(part["factor"][name])
        restore_optimizer(self._plain_optimizer, part["optimizer"], found.values["optimizer"])
        self._schedule.load_state_dict(found.values["schedule"])
        if self._ema is not None:
            device = self._accelerator.device
            self._ema.shadow_params = [part["ema"][name].to(device) for name in self._parameters]
            self._ema.optimization_step = found.values["ema"]
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(found.values["scaler"])
        self.losses = found.tensors["losses"].tolist()
        self.validation_losses = {int(step): loss for step, loss in found.values.get("validation", {}).items()}
        self.started_at, self._newest_file = found.step, found.path
        if (
            self._config.lr_scheduler not in STEADY
            and found.values["config"]["max_train_steps"] != self._config.max_train_steps
        ):
            _log.warning("max_train_steps is another than before, so the schedule of the learning rate is, too.")

    def _check_same(self, found: Checkpoint) -> None:
        """Raise `CheckpointError` unless a checkpoint is of this very run."""
        now, then = {**self._about, **dict(self._config)}, found.values["config"]
        problems = [
            f"{name} was {then.get(name)!r} and is {now[name]!r}"
            for name in now
            if name not in MAY_DIFFER and now[name] != then.get(name)
        ]
        shapes = {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}
        saved = {
            name.removeprefix("factor/"): tuple(tensor.shape)
            for name, tensor in found.tensors.items()
            if name.startswith("factor/")
        }
        if shapes != saved:
            problems.append("other parameters are trained")
        if found.values["images"] != [part.batches.marks for part in self._sources]:
            problems.append("the images or their prompts are others")
        if found.values["processes"] != self._accelerator.num_processes:
            problems.append(f"there were {found.values['processes']} processes")
        if found.step > self._config.max_train_steps:
            problems.append(f"it has done {found.step} steps, more than max_train_steps")
        if problems:
            raise CheckpointError(
                f"The checkpoint {found.path} is of another run: {'; '.join(problems)}. Resume with the settings that "
                "it was begun with, or start anew in another folder."
            )

    # What must not be

    def _not_finite(self, step: int, loss: float) -> None:
        what = f"The loss became {loss}" if not math.isfinite(loss) else "A gradient is not a finite number"
        each = (part.batches.sources(number) for number in self._numbers(step) for part in self._sources)
        files = ", ".join(dict.fromkeys(name for names in each for name in names))
        skipped = len(self.losses) - max((i + 1 for i, one in enumerate(self.losses) if math.isfinite(one)), default=0)
        if self._config.on_non_finite == "stop" or skipped + 1 >= MOST_SKIPPED:
            again = f" and in the {skipped} before" if skipped else ""
            raise self._diverged(f"{what} at step {step + 1} of {self._config.max_train_steps}{again}, on {files}")

    def _check_finite(self) -> None:
        if not all(bool(parameter.isfinite().all()) for parameter in self._parameters.values()):
            raise self._diverged("A trained weight is no longer a finite number")

    def _diverged(self, what: str) -> TrainingDivergedError:
        wider = {"fp16": ' or mixed_precision "bf16"', "bf16": ' or mixed_precision "no"'}
        newest = self._newest_file
        return TrainingDivergedError(
            f"{what}. {f'The last good checkpoint is {newest}' if newest else 'Nothing was saved'}. "
            f"Try a learning rate below {self._config.learning_rate:g}{wider.get(self._config.mixed_precision, '')}, "
            'look for images that are blank or damaged, or let such steps be skipped: on_non_finite "skip".'
        )


@contextmanager
def _interruptions() -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C be asked for in place of a `KeyboardInterrupt`; a second one is that as ever."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: Any) -> None:
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)
