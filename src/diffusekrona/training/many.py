"""Many subjects trained on one base, some of them at a time, each in the batches of the others."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from torch import nn

from ..errors import KronAError, TrainingConfigError, TrainingInterrupted
from ..pipeline import unload_krona
from ..storage import write_whole
from ..tuner.components import adaptable_components
from .batches import trained_encoders
from .checkpoints import base_identity
from .data import TrainingImage
from .dreambooth import about_run, begun_adapter, training_resolution
from .families import Family, family_of
from .hub import check_hub, hub_repository
from .loop import interruptions, parts_of
from .observers import Observers
from .optimizer_names import check_optimizer
from .output import Output
from .progress import TrainingStep
from .run import (
    Done,
    base_of,
    class_images,
    held_out_images,
    image_plan,
    saved_run,
    status_of,
    tell_all,
    training_images,
)
from .run_state import RunState
from .runtime import accelerator_for, checkpointed, modes_kept, random_state_kept, this_process
from .settings import Settings, settings_text
from .status import StatusWriter
from .subjects import Subject
from .together import Member, Together, active_alone

SUMMARY = "summary.json"
"""File beside the adapters that says what became of each subject."""

SHARED = (
    "pretrained_model_name_or_path", "dtype", "quantize", "quantize_text_encoders", "variant", "revision",
    "pretrained_vae_model_name_or_path", "base_configs", "mixed_precision", "guidance_scale", "gradient_checkpointing",
    "train_denoiser", "train_text_encoder", "text_encoders_to_train",
)  # fmt: skip
"""Settings that all subjects of one base have in common."""


@dataclass(frozen=True)
class Ended:
    """What became of a subject.

    Attributes:
        name: of the subject.
        state: "trained", "earlier" where an earlier run had finished it, or "set aside".
        reason: why it was set aside; None otherwise.
        steps: how many it has done.
        final_loss: mean over the last 50 of them; None where there are none.
        seconds: from its first step to its last, beside the others.
        path: of the adapter; None where it was set aside.
    """

    name: str
    state: Literal["trained", "earlier", "set aside"]
    reason: str | None = None
    steps: int = 0
    final_loss: float | None = None
    seconds: float = 0.0
    path: str | None = None


_End = tuple[Ended, tuple[Settings, Output, Done] | None]
"""What became of a subject, and what is to be told of it."""


def train_many(
    subjects: Sequence[Subject],
    at_once: int = 4,
    on_step: Callable[[str, TrainingStep], None] | None = None,
    on_end: Callable[[Ended], None] | None = None,
) -> list[Ended]:
    """Train an adapter for each subject, `at_once` of them in the same batches; each as it would be by itself.

    When one ends, the next begins. One that goes wrong is set aside, and the others go on.

    Args:
        subjects: with their settings; see `find_subjects`.
        at_once: how many share a batch, each with its own `train_batch_size` images.
        on_step: called with a subject's name after each of its steps.
        on_end: called when a subject ends.

    Raises:
        KronAError: before anything is trained, where the settings do not go together or an output is in the way.
        TrainingInterrupted: the user stopped it; each subject's state and adapter so far are saved.
    """
    check_all(subjects, at_once)
    ended, waiting = [], []
    for subject in subjects:
        output = Output(subject.settings)
        if subject.settings.output.resume and output.is_complete:
            ended.append(_earlier(subject, output))
            if on_end is not None:
                on_end(ended[-1])
        else:
            waiting.append(subject)
    if not waiting:
        return ended
    to_score = []
    with _session(waiting[0].settings) as session:
        for one, done in session.run(waiting, at_once, on_step):
            ended.append(one)
            if done is not None and done[0].output.score:
                to_score.append(done)  # which needs the base anew, and this one out of memory
            elif done is not None:
                tell_all(*done)
            if on_end is not None:
                on_end(one)
    for done in to_score:
        tell_all(*done)
    return sorted(ended, key=lambda one: one.name)


def check_all(subjects: Sequence[Subject], at_once: int) -> None:
    """Raise `KronAError` for what would go wrong before a subject's first step, with nothing loaded."""
    if not subjects:
        raise TrainingConfigError("There is no subject to train.")
    if at_once < 1:
        raise TrainingConfigError(f"At least one subject must be trained at once, not {at_once}.")
    if this_process().num_processes > 1:
        raise TrainingConfigError(
            "Many subjects are trained in one process; accelerate started several. Use --ray for several machines."
        )
    first = subjects[0].settings.flat()
    for subject in subjects:
        values = subject.settings.flat()
        for name in SHARED:
            if values[name] != first[name]:
                raise TrainingConfigError(
                    f"{name} is {values[name]!r} for {subject.name} and {first[name]!r} for {subjects[0].name}, "
                    "but they share one base. Give them the same, or train them apart."
                )
        _check_one(subject, at_once)


def _check_one(subject: Subject, at_once: int) -> None:
    settings = subject.settings
    if settings.training.offload != "none":
        raise TrainingConfigError("offload is not possible with many subjects at once. Leave it out.")
    if settings.adapter.dropout and at_once > 1:
        raise TrainingConfigError(
            f"dropout draws for a whole batch at once, so {subject.name} would not be what it is alone. "
            "Leave it out, or train one at a time."
        )
    check_optimizer(settings.training)
    output = Output(settings)
    if settings.output.resume and not output.is_complete and output.checkpoints.newest() is None:
        # Killed before its first checkpoint, or never begun.
        settings = settings.replace(output=settings.output.replace(resume=False))
        output = Output(settings)
    output.make_room()
    repository = hub_repository(settings.output)
    if repository is not None:
        check_hub(repository)


def _earlier(subject: Subject, output: Output) -> Ended:
    """A subject that an earlier run finished; set aside where its settings were others."""
    then = yaml.safe_load((output.folder / "settings.yaml").read_text(encoding="utf-8"))
    now = yaml.safe_load(settings_text(subject.settings))
    if changed := [name for name in now if now[name] != then.get(name)]:
        told = ", ".join(f"{name} was {then.get(name)!r} and is {now[name]!r}" for name in changed)
        return Ended(
            subject.name,
            "set aside",
            f"It is finished already, with other settings: {told}. Choose another output, or let it be replaced: "
            "overwrite.",
        )
    found = output.checkpoints.newest()
    return Ended(subject.name, "earlier", steps=found.step if found else 0, path=str(output.path))


@contextmanager
def _session(settings: Settings) -> Iterator[_Session]:
    """The base of many subjects on its device, as `fit` has it for one."""
    pipe = base_of(settings)
    config, family = settings.training, family_of(pipe)
    family.guidance = config.guidance_scale
    identity = base_identity(pipe)
    modules = [module for module in pipe.components.values() if isinstance(module, nn.Module)]
    trained = [family.denoiser, *trained_encoders(pipe, config)]
    with ExitStack() as borrowed:
        accelerator = borrowed.enter_context(accelerator_for(config.mixed_precision))
        borrowed.enter_context(random_state_kept(accelerator.device))
        borrowed.enter_context(modes_kept(modules))
        for module in modules:
            module.requires_grad_(False)
            module.train(module in trained)
        family.denoiser.to(accelerator.device)
        if config.gradient_checkpointing:
            borrowed.enter_context(checkpointed(trained))
        yield _Session(pipe, family, accelerator, identity, trained)


@dataclass
class _Active:
    """A subject in training."""

    subject: Subject
    output: Output
    member: Member
    status: StatusWriter
    observers: Observers
    images: list[TrainingImage]
    borrowed: ExitStack
    began: float


class _Session:
    """One base, and the subjects that are trained on it."""

    def __init__(
        self, pipe: Any, family: Family, accelerator: Any, identity: str, trained: Sequence[nn.Module]
    ) -> None:
        self._pipe, self._family, self._accelerator = pipe, family, accelerator
        self._identity, self._trained = identity, trained
        self._together = Together(family, accelerator)
        self._active: list[_Active] = []
        self._number = 0

    def run(
        self, subjects: Sequence[Subject], at_once: int, on_step: Callable[[str, TrainingStep], None] | None
    ) -> Iterator[_End]:
        """Train them all; each as it ends, with what is to be told of it."""
        waiting = list(subjects)
        with interruptions() as self._interrupted:
            while waiting or self._active:
                while waiting and len(self._active) < at_once:
                    if (failed := self._begin(waiting.pop(0))) is not None:
                        yield failed, None
                yield from self._step(on_step)
                if self._interrupted() and (waiting or self._active):
                    raise self._stopped()

    def _begin(self, subject: Subject) -> Ended | None:
        """Let a subject take part; what became of it where it cannot."""
        with ExitStack() as borrowed:
            status = status_of(subject.settings, Output(subject.settings))
            try:
                self._active.append(self._prepared(subject, status, borrowed))
            except (KronAError, OSError) as error:
                status.tell("failed", str(error))
                return Ended(subject.name, "set aside", str(error))
            self._active[-1].borrowed = borrowed.pop_all()
        return None

    def _prepared(self, subject: Subject, status: StatusWriter, borrowed: ExitStack) -> _Active:
        settings, pipe = subject.settings, self._pipe
        self._number += 1
        output = Output(settings, f"subject-{self._number}")
        plan = image_plan(settings, training_resolution(pipe, settings.images.resolution), self._family.reduction)
        images = training_images(settings, plan)
        with active_alone(adaptable_components(pipe), []):
            others = class_images(pipe, settings, plan, None)
        output.write({output.folder / "settings.yaml": settings_text(settings)})
        config = settings.training.in_steps(len(images), 1)
        krona_config = settings.adapter.config()
        about = about_run(krona_config, self._identity)
        assert output.adapter_name is not None
        krona = borrowed.enter_context(
            _removed_at_end(
                pipe, begun_adapter(pipe, config, krona_config, output.adapter_name, settings.data.init_from)
            )
        )
        accelerator = borrowed.enter_context(accelerator_for(config.mixed_precision))
        parts, validation = parts_of(
            pipe,
            self._family,
            config,
            accelerator,
            images,
            class_images=others,
            held_out=held_out_images(settings, plan),
            folder=output.folder,
        )
        factors = dict(krona.named_parameters())
        state = RunState(parts, factors, accelerator, config, output.folder, about, validation, self._trained)
        if settings.output.resume:
            state.resume()
        observers = Observers(pipe, settings, output, status)
        borrowed.callback(observers.close)
        member = Member(krona, state, accelerator)
        return _Active(subject, output, member, status, observers, images, borrowed, time.monotonic())

    def _step(self, on_step: Callable[[str, TrainingStep], None] | None) -> Iterator[_End]:
        """A step of each subject that takes part."""
        stepping = [active for active in self._active if not active.member.state.finished]
        losses = self._together.gradients([active.member for active in stepping]) if stepping else []
        for active, loss in zip(stepping, losses, strict=True):
            try:
                done = self._take(active, loss)
            except (KronAError, OSError) as error:
                yield self._set_aside(active, error), None
                continue
            if on_step is not None:
                on_step(active.subject.name, done)
        for active in [one for one in self._active if one.member.state.finished]:
            try:
                yield self._finish(active)
            except (KronAError, OSError) as error:
                yield self._set_aside(active, error), None

    def _take(self, active: _Active, loss: float) -> TrainingStep:
        """Take a subject's step along its gradients, and do what is due after it."""
        state = active.member.state
        rate = state.update(loss)
        state.seconds = time.monotonic() - active.began
        with active.member.alone():
            state.validate()
            if state.due():
                state.save()
            done = state.report(rate, self._interrupted)
            active.observers(done)
        return done

    def _finish(self, active: _Active) -> _End:
        """Save a subject's adapter, and take it out of the base."""
        state, settings, output = active.member.state, active.subject.settings, active.output
        state.check_finite()
        state.end()
        result = state.result(len(active.images))
        done = saved_run(self._pipe, settings, output, result, active.images)
        self._leave(active)
        active.status.tell("finished")
        name, path = active.subject.name, str(output.path)
        ended = Ended(name, "trained", None, state.step, result.final_loss, state.seconds, path)
        return ended, (settings, output, done)

    def _set_aside(self, active: _Active, error: Exception) -> Ended:
        self._leave(active)
        active.status.tell("failed", str(error))
        return Ended(active.subject.name, "set aside", str(error), active.member.state.step)

    def _leave(self, active: _Active) -> None:
        self._active.remove(active)
        active.borrowed.close()

    def _stopped(self) -> TrainingInterrupted:
        """Save what each subject is so far."""
        step = max((active.member.state.step for active in self._active), default=0)
        for active in list(self._active):
            active.member.state.save()
            active.member.state.end()
            active.output.save_step(self._pipe, active.member.state.step)
            self._leave(active)
            active.status.tell("stopped")
        return TrainingInterrupted(step, None)


@contextmanager
def _removed_at_end(pipe: Any, adapter: Any) -> Iterator[Any]:
    """An adapter that is taken out of the pipeline when the block ends, however it does."""
    with adapter as krona:
        yield krona
    unload_krona(pipe, krona.name)


def write_summary(folder: Path, ended: Sequence[Ended]) -> Path:
    """Write what became of each subject beside the adapters; the file."""
    file = folder / SUMMARY
    write_whole({file: (json.dumps([asdict(one) for one in ended], indent=2, ensure_ascii=False) + "\n").encode()})
    return file
