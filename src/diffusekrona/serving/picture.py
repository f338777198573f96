"""What is to be drawn: one picture, as all rooms of the server hand it on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Picture:
    """One picture that someone asked for; all of it has been checked.

    Attributes:
        model: the adapter's name; None for the base alone.
        prompt: what it shows.
        seed: of its noise.
        negative_prompt: what it should not show.
        width: in pixels; None for the base's own, as the height.
        height: in pixels.
        steps: denoising steps.
        guidance_scale: how closely to follow the prompt; None for the family's own.
    """

    model: str | None
    prompt: str
    seed: int
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    steps: int = 30
    guidance_scale: float | None = None


@dataclass(frozen=True)
class Refusal:
    """Why there is no picture, as an answer of HTTP.

    Attributes:
        status: the answer's code.
        message: a sentence for the user.
        param: the name of the request's part that is wrong.
        code: a word for programs.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None


class Refused(Exception):
    """A request that is not done."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.refusal = Refusal(status, message, param, code)
