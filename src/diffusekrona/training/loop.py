"""The training loop. It optimizes any parameters of a pipeline on any images and knows no kind of adapter."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..errors import TrainingConfigError, TrainingInterrupted
from .batches import AsBase, Batches, free_encoders, trained_encoders
from .config import TrainingConfig
from .data import TrainingImage
from .families import Family, family_of
from .optimizer_names import check_optimizer
from .progress import Interrupted, TrainingResult, TrainingStep
from .randomness import seed_for
from .run_state import LossPart, RunState
from .runtime import accelerator_for, checkpointed, modes_kept, random_state_kept, sharding_of


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
        parts, validation = parts_of(
            pipe, family, config, accelerator, images, class_images=class_images, held_out=held_out, folder=folder
        )
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
        state = RunState(parts, parameters, accelerator, config, folder, about or {}, validation, trained)
        run = _Loop(state, accelerator, as_base)
        if resume:
            state.resume()
        if sharding is not None:
            from .sharded import sharded  # which needs a newer PyTorch than the rest

            borrowed.enter_context(sharded(pipe, family.denoiser, parameters.values(), sharding))
        run.finish(on_step)
    return state.result(len(images))


def parts_of(
    pipe: Any,
    family: Family,
    config: TrainingConfig,
    accelerator: Accelerator,
    images: Sequence[TrainingImage],
    *,
    class_images: Sequence[TrainingImage],
    held_out: Sequence[TrainingImage],
    folder: Path | None,
) -> tuple[list[LossPart], Batches | None]:
    """The parts of a run's loss, and the batches of its held-out images, all encoded."""
    cache = folder and folder / "cache"
    prior = [] if config.prior_prompt is None else [config.prior_prompt]

    def batches(name: str, some: Sequence[TrainingImage]) -> Batches:
        return Batches(name, pipe, family, some, config, accelerator, cache, prior)

    parts = [LossPart(batches("subject", images), 1.0)]
    if class_images:
        parts.append(LossPart(batches("class", class_images), config.prior_loss_weight))
    if config.prior_prompt is not None:
        parts.append(LossPart(parts[0].batches, config.prior_loss_weight, config.prior_prompt))
    return parts, batches("held-out", held_out) if held_out else None


class _Loop:
    """All the steps that are left of a run.

    Args:
        state: of the run.
        accelerator: device and processes.
        as_base: makes the pipeline the base's for a while, which a part with a prompt needs.
    """

    def __init__(self, state: RunState, accelerator: Accelerator, as_base: AsBase | None) -> None:
        self._state, self._accelerator = state, accelerator
        if as_base is None and any(part.prompt is not None for part in state.parts):
            raise TrainingConfigError("prior_prompt needs a way to the base's own predictions: give as_base.")
        self._as_base = as_base

    def finish(self, on_step: Callable[[TrainingStep], None] | None) -> None:
        """Take them, and leave the parameters as they end."""
        state, began = self._state, time.monotonic()
        with interruptions() as interrupted:
            while not state.finished:
                loss, stop = self._averaged(self._gradients(), interrupted())
                rate = state.update(loss)
                state.seconds = time.monotonic() - began
                state.validate()
                if state.due() or stop:
                    state.save()
                if on_step is not None:
                    on_step(state.report(rate, interrupted))
                if stop and not state.finished:
                    state.end()
                    raise TrainingInterrupted(state.step, state.newest_file)
        state.check_finite()
        state.end()

    def _gradients(self) -> float:
        """Add up the gradients of the mean loss over a step's batches; that loss."""
        config, total = self._state.config, 0.0
        for number in self._state.numbers:
            for part in self._state.parts:
                # Dropout draws from here, anew in each process.
                torch.manual_seed(seed_for(config.seed, "dropout", number, self._accelerator.process_index))
                loss = self._loss(part, number) * (part.weight / config.gradient_accumulation_steps)
                self._accelerator.backward(loss)
                total += float(loss.detach())
        return total

    def _loss(self, part: LossPart, number: int) -> Tensor:
        if part.prompt is None:
            return part.batches.loss(number)
        assert self._as_base is not None
        return part.batches.kept(number, part.prompt, self._as_base)

    def _averaged(self, loss: float, interrupted: bool) -> tuple[float, bool]:
        """Average gradients and loss over the processes; the loss, and whether some process was asked to stop."""
        if self._accelerator.num_processes == 1:
            return loss, interrupted
        grads = [p.grad for p in self._state.parameters.values() if p.grad is not None]
        device = self._accelerator.device
        flat = torch.cat([*(grad.flatten() for grad in grads), torch.tensor([loss, float(interrupted)], device=device)])
        flat = self._accelerator.reduce(flat, "mean")
        for grad, mean in zip(grads, flat[:-2].split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(mean.view_as(grad))
        return float(flat[-2]), bool(flat[-1] > 0)


@contextmanager
def interruptions() -> Iterator[Interrupted]:
    """Let the first Ctrl-C be asked for in place of a `KeyboardInterrupt`; a second one is that as ever."""
    interrupted = Interrupted()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: Any) -> None:
        interrupted.ask()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, ask)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
