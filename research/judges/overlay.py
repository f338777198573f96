"""A score for who knows the true drawing: it is laid over the picture, where the picture has it, and compared.

Place, size, stretch and turn of the drawing are searched, whatever the flat background; of several copies the best
counts. The score is structure × colours:

    structure = min((S - S0) / (1 - S0), 4 (S - G) / (1 - G)), at least 0
    colours = 1 / (1 + (E / 15)²)

S is the mean structural similarity of the picture with the drawing on the picture's background, weighted by the detail
that either has inside the outline, and a little by the outline itself. S0 is that of nothing on black and on white, and
G that of the picture's background alone, so that nothing gets 0 even where it has the drawing's colour. E is the mean
CIEDE2000 difference of the smoothed colours inside the outline. What is finer than a pixel or two is not compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from scipy import fft
from scipy.ndimage import gaussian_filter
from skimage.color import deltaE_ciede2000, rgb2lab
from skimage.metrics import structural_similarity
from torch import Tensor
from torch.nn import functional

from diffusekrona.errors import KronAError

from .spoiling import from_image, resized

Array = npt.NDArray[np.float32]
Spectra = npt.NDArray[np.complex64]
EDGES = (0.3, 1.0)
"""Smallest and largest edge of a drawing's square that is looked for, as shares of the picture's."""
RATIO = 1.06  # between edges
OUTSIDE = 0.06  # of the picture's edge, that a drawing may be off it
PLACES = 3  # that are looked at closely
WORSE = 0.6  # of the best place's correlation, that another must have
STEPS = 8  # of the alignment
STRETCH, TURN = 0.08, 0.12  # that the alignment may find: share of the edge, radians
SMOOTH = 1.0  # pixels; both pictures are smoothed so much
WINDOW = 2.0  # pixels; standard deviation of the structural similarity's windows
CONTRAST = 0.05  # its K2: how little contrast counts as none
OUTLINE = 0.02  # weight of the outline; a detail's weight is its standard deviation, about 0.3 for an eye
CERTAIN = 4.0  # how fast structure may grow with what is better than the background alone
COLOUR_SCALE = 15.0  # the difference that halves the score


@dataclass(frozen=True)
class Laid:
    """How a picture compares with the true drawing.

    Attributes:
        score: structure × colours.
        structure: 1 where all is as drawn, 0 where it is no better than the background alone.
        colours: 1 where they are right.
        box: left, top, right and bottom of the drawing's square, as shares of the picture's edges.
    """

    score: float
    structure: float
    colours: float
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Place:
    """Where the square of a drawing lies.

    Attributes:
        edge: in whole pixels, before it is bent.
        middle: in pixels from the left and from the top.
        bend: logarithms of the widening and heightening, and the turn in radians.
    """

    edge: int
    middle: tuple[float, float]
    bend: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def vector(self) -> npt.NDArray[np.float64]:
        """What the alignment changes."""
        return np.array([*self.middle, *self.bend])

    def at(self, vector: npt.NDArray[np.float64]) -> Place:
        """The same square elsewhere."""
        x, y, wide, high, turn = (float(value) for value in vector)
        return Place(self.edge, (x, y), (wide, high, turn))

    def whole(self) -> Place:
        """The nearest place in whole pixels, neither stretched nor turned."""
        edge = round(self.edge * math.exp((self.bend[0] + self.bend[1]) / 2))
        left, top = (round(middle - edge / 2) for middle in self.middle)
        return Place(edge, (left + edge / 2, top + edge / 2))

    def box(self, edge: int) -> tuple[float, float, float, float]:
        """Left, top, right and bottom, as shares of a picture's edge; the turn is left out."""
        across, down = (self.edge / 2 * math.exp(bend) for bend in self.bend[:2])
        x, y = self.middle
        return (x - across) / edge, (y - down) / edge, (x + across) / edge, (y + down) / edge


@dataclass(frozen=True)
class _Canvas:
    """A part of a picture, and its background's colour, (3,).

    Attributes:
        pixels: (3, height, width) in [0, 1]; background where the part goes beyond the picture.
        corner: left and top of the part in the picture.
    """

    pixels: Tensor
    ground: Tensor
    corner: tuple[int, int]

    def around(self, place: Place) -> _Canvas:
        """The part in which a drawing from about this place may lie."""
        size = math.ceil(place.edge * 1.25) + 12
        left, top = (round(middle - size / 2) for middle in place.middle)
        height, width = self.pixels.shape[-2:]
        ends = (-left, left + size - width, -top, top + size - height)
        wide = torch.cat(
            [
                functional.pad(p[None, None], ends, value=float(g))[0]
                for p, g in zip(self.pixels, self.ground, strict=True)
            ]
        )
        return _Canvas(wide, self.ground, (left, top))

    def laid(self, drawing: Tensor, places: Sequence[Place]) -> Tensor:
        """A drawing, premultiplied and of the places' edge, at each of them: (n, 4, height, width)."""
        size, edge = drawing.shape[-1], self.pixels.shape[-1]
        turned = []
        for place in places:
            wide, high, turn = place.bend
            x, y = (2 * (m - c) / edge - 1 for m, c in zip(place.middle, self.corner, strict=True))
            cos, sin, across = math.cos(turn), math.sin(turn), edge / size
            rows = [(cos * math.exp(-wide), sin * math.exp(-wide)), (-sin * math.exp(-high), cos * math.exp(-high))]
            turned.append([[across * a, across * b, -across * (a * x + b * y)] for a, b in rows])
        grid = functional.affine_grid(torch.tensor(turned), [len(places), 4, edge, edge], align_corners=False)
        return functional.grid_sample(drawing.expand(len(places), -1, -1, -1), grid, align_corners=False)

    def differences(self, drawing: Tensor, places: Sequence[Place]) -> npt.NDArray[np.float64]:
        """What the picture has more than the drawing on the background, where the drawing is: (n, values)."""
        laid = self.laid(drawing, places)
        made = laid[:, :3] + (1 - laid[:, 3:]) * self.ground[:, None, None]
        return ((made - self.pixels) * (laid[:, 3:] > 0)).flatten(1).double().numpy()


class Overlay:
    """A true drawing, ready to be laid over pictures.

    Args:
        drawing: RGBA, square, transparent around its outline.

    Raises:
        KronAError: it is not so.
    """

    def __init__(self, drawing: Image.Image) -> None:
        self._drawing = from_image(drawing)
        if drawing.width != drawing.height or not self._drawing[3].min() < 0.5 < self._drawing[3].max():
            raise KronAError(f"A true drawing is square and transparent around its outline, but {drawing} is not.")
        self._sizes: dict[int, Tensor] = {}
        self._spectra: dict[tuple[int, int], tuple[Spectra, Spectra]] = {}

    def lay(self, image: Image.Image) -> Laid:
        """Find the drawing in a square picture on a flat background, and compare.

        Raises:
            KronAError: the picture is not square.
        """
        if image.width != image.height:
            raise KronAError(f"The true drawing is laid over square pictures, but this one is {image.size}.")
        pixels = torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1)
        whole = _Canvas(pixels, ground_of(pixels), (0, 0))
        found = []
        for place in self._likely(whole):
            canvas = whole.around(place)
            aligned = self._aligned(canvas, place)
            structure, colours = self._compared(canvas, aligned)
            found.append(Laid(structure * colours, structure, colours, aligned.box(image.width)))
        return max(found, key=lambda laid: laid.score)

    def _sized(self, edge: int) -> Tensor:
        if edge not in self._sizes:
            self._sizes[edge] = resized(self._drawing, edge)
        return self._sizes[edge]

    def _spectra_of(self, size: int, length: int) -> tuple[Spectra, Spectra]:
        """Transforms of the drawing of a size, (4, …), and of its mask."""
        if (size, length) not in self._spectra:
            drawing = self._sized(size).numpy()
            mask = (drawing[3] > 0.05).astype(np.float32)
            self._spectra[size, length] = (
                fft.rfft2(drawing, (length,) * 2).conj(),
                fft.rfft2(mask, (length,) * 2).conj(),
            )
        return self._spectra[size, length]

    def _likely(self, whole: _Canvas) -> list[Place]:
        """The best places, by a correlation of what differs from the background, at half size.

        It is 2 Σ p·t / Σ (p² + t²) where the drawing is, for picture p and drawing t less the background: 1 where
        they are equal.
        """
        halved = functional.avg_pool2d(whole.pixels, 2).numpy()
        edge, ground = halved.shape[-1], whole.ground.numpy()[:, None, None]
        pad, count = math.ceil(OUTSIDE * edge), math.floor(math.log(EDGES[1] / EDGES[0]) / math.log(RATIO))
        rest = np.pad(halved - ground, ((0, 0), (pad, pad), (pad, pad)))
        sizes = sorted({round(edge * EDGES[1] / RATIO**n) for n in range(count + 1)})
        length = fft.next_fast_len(edge + 2 * pad + sizes[-1], real=True)
        here, power = fft.rfft2(rest, (length,) * 2), fft.rfft2((rest**2).sum(0), (length,) * 2)
        maps = {}
        for size in sizes:
            drawn, mask = self._spectra_of(size, length)
            sized, room = self._sized(size).numpy(), edge + 2 * pad - size + 1
            own = float(((sized[:3] - ground * sized[3]) ** 2).sum())
            spectra = np.stack([(here * (drawn[:3] - ground * drawn[3])).sum(0), power * mask])
            crossed, under = fft.irfft2(spectra, (length,) * 2)[:, :room, :room]
            maps[size] = 2 * crossed / (under + own + 1e-3 * size**2)
        return [Place(2 * size, (2 * (left - pad) + size, 2 * (top - pad) + size)) for size, top, left in _peaks(maps)]

    def _aligned(self, canvas: _Canvas, place: Place) -> Place:
        """The place after some steps of Levenberg's and Marquardt's method on the differences inside the outline."""
        drawing, origin, now, damping = self._sized(place.edge), place.vector(), place.vector(), 1e-3
        units = np.array([0.5, 0.5, 0.01, 0.01, 0.01])
        limits = np.array([0.1 * place.edge, 0.1 * place.edge, STRETCH, STRETCH, TURN])
        error = canvas.differences(drawing, [place])[0]
        for _ in range(STEPS):
            slopes = canvas.differences(drawing, [place.at(now + units * row) for row in np.eye(5)]) - error
            normal = slopes @ slopes.T
            step = np.linalg.solve(normal + np.diag(damping * normal.diagonal() + 1e-6), -slopes @ error)
            following = origin + np.clip(now + units * step - origin, -limits, limits)
            after = canvas.differences(drawing, [place.at(following)])[0]
            if after @ after >= error @ error:
                damping *= 10
                continue
            done = bool(np.all(np.abs(following - now) < units / 10))
            now, error, damping = following, after, damping / 5
            if done:
                break
        whole = place.at(now).whole()
        exact = canvas.differences(self._sized(whole.edge), [whole])[0]
        return whole if exact @ exact <= error @ error else place.at(now)

    def _compared(self, canvas: _Canvas, place: Place) -> tuple[float, float]:
        """Structure and colours at a place."""
        laid = canvas.laid(self._sized(place.edge), [place])[0].numpy()
        alpha, ground, seen = laid[3], canvas.ground.numpy()[:, None, None], canvas.pixels.numpy()
        made = laid[:3] + (1 - alpha) * ground
        around = _spread(laid, place.edge / 20)  # the outline's contrast is no detail of the drawing
        inner = laid[:3] + (1 - alpha) * around
        seen_inner = np.where(alpha > 0, seen + (1 - alpha) * (around - ground), around)
        outer = _smooth(alpha, WINDOW)
        detail = np.maximum(_detail(inner), _detail(seen_inner) * ((outer - 0.85) / 0.15).clip(0))
        weights = alpha * detail + 4 * OUTLINE * outer * (1 - outer)
        alike = _similarity(made, seen, weights)
        empty = _similarity(made, np.broadcast_to(ground, made.shape), weights)
        grounds = ((laid[:3] + (1 - alpha) * level, np.full_like(made, level)) for level in (0.0, 1.0))
        nothing = mean(_similarity(on, ground, weights) for on, ground in grounds)
        structure = min((alike - nothing) / (1 - nothing), CERTAIN * (alike - empty) / (1 - empty))
        labs = [rgb2lab(_smooth(part, place.edge / 24).clip(0, 1), channel_axis=0) for part in (inner, seen_inner)]
        error = float(np.average(deltaE_ciede2000(*labs, channel_axis=0), weights=alpha))
        return max(0.0, structure), 1 / (1 + (error / COLOUR_SCALE) ** 2)


def ground_of(picture: Tensor) -> Tensor:
    """The background's colour, (3,), of a picture (3, height, width): the median of its frame."""
    frame = torch.cat([picture[:, 0], picture[:, -1], picture[:, :, 0], picture[:, :, -1]], dim=1)
    return frame.median(dim=1).values


def _peaks(maps: dict[int, Array]) -> list[tuple[int, int, int]]:
    """Size, top and left of the highest values, each of another copy, the highest first."""
    found: list[tuple[int, int, int]] = []
    best = max(float(values.max()) for values in maps.values())
    while len(found) < PLACES:
        size = max(maps, key=lambda size: float(maps[size].max()))
        top, left = (int(index) for index in np.unravel_index(maps[size].argmax(), maps[size].shape))
        if found and maps[size][top, left] < max(WORSE * best, 0):
            break
        found.append((size, top, left))
        for other, values in maps.items():
            row, column, near = top + (size - other) // 2, left + (size - other) // 2, size // 3
            values[max(0, row - near) : max(0, row + near + 1), max(0, column - near) : max(0, column + near + 1)] = -1
    return found


def _smooth(picture: Array, width: float) -> Array:
    smoothed: Array = gaussian_filter(picture, (*(0.0 for _ in picture.shape[:-2]), width, width), mode="nearest")
    return smoothed


def _spread(laid: Array, width: float) -> Array:
    """A drawing's smoothed colours, inside its outline and beyond it: (3, height, width)."""
    far = _smooth(laid, width) + 0.02 * _smooth(laid, 6 * width) + 1e-6 * laid.mean((1, 2), keepdims=True)
    spread: Array = far[:3] / np.maximum(far[3], 1e-9)
    return spread


def _similarity(made: Array, seen: Array, weights: Array) -> float:
    _, values = structural_similarity(
        _smooth(made, SMOOTH), _smooth(seen, SMOOTH), channel_axis=0, data_range=1.0, full=True,
        gaussian_weights=True, sigma=WINDOW, use_sample_covariance=False, K2=CONTRAST,
    )  # fmt: skip
    return float(np.average(values.mean(0), weights=weights))


def _detail(picture: Array) -> Array:
    """Standard deviation around each pixel."""
    soft = _smooth(picture, SMOOTH)
    detail: Array = np.sqrt((_smooth(soft**2, WINDOW) - _smooth(soft, WINDOW) ** 2).clip(0).mean(0))
    return detail
