"""Pictures with place, size, rotation, mirroring, colours and sharpness all varied, made in whole batches."""

import numpy as np
import torch
import torch.nn.functional as F

from .art import COLOURS, PIXELS, background, sprite

BANK_PIXELS = 48


def bank_of(drawings: list[tuple[str, str]]) -> torch.Tensor:
    """Sprites (n, 4, 48, 48), premultiplied, of (style, image) pairs."""
    return torch.from_numpy(np.stack([sprite(style, image, BANK_PIXELS) for style, image in drawings]))


class Augmenter:
    """Draws sprites of a bank on named background colours.

    Args:
        bank: from `bank_of`.
        device: of the pictures.
        seed: of everything random.
        edges: smallest and largest edge of a drawing, in pixels.
    """

    def __init__(
        self, bank: torch.Tensor, device: torch.device, seed: int, edges: tuple[float, float] = (30, 58)
    ) -> None:
        self.bank, self.device, self.edges = bank.to(device), device, edges
        self.random = torch.Generator().manual_seed(seed)
        self.rng = np.random.default_rng(seed)

    def choose(self, below: int, count: int) -> torch.Tensor:
        """Random whole numbers, (count)."""
        return torch.randint(below, (count,), generator=self.random)

    def between(self, low: float, high: float, *shape: int) -> torch.Tensor:
        """Uniform random numbers."""
        return low + (high - low) * torch.rand(shape, generator=self.random)

    def draw(self, drawing: torch.Tensor, colour: torch.Tensor) -> torch.Tensor:
        """Pictures (n, 3, 64, 64) in [-1, 1] of drawings, by number, on backgrounds, by number of `COLOURS`."""
        count, names = len(drawing), list(COLOURS)
        flat = np.stack([background(names[int(i)], self.rng, jitter=14) for i in colour])
        drawn = self.placed(self.bank[drawing.to(self.device)])
        alpha = drawn[:, 3:]
        tint = self.between(0.88, 1.12, count, 3, 1, 1) * self.between(0.85, 1.15, count, 1, 1, 1)
        ink = torch.minimum(drawn[:, :3] * tint.to(self.device), alpha)
        picture = ink + (1 - alpha) * torch.from_numpy(flat).to(self.device)[:, :, None, None]
        grain = 0.02 * torch.randn(picture.shape, generator=self.random).to(self.device)
        picture = self.softened(picture) + grain
        return (picture.clamp(0, 1) * 2 - 1).contiguous(memory_format=torch.channels_last)

    def placed(self, drawings: torch.Tensor) -> torch.Tensor:
        """Turn, mirror, resize and move premultiplied drawings on an empty (n, 4, 64, 64) canvas."""
        count = len(drawings)
        size = self.between(*self.edges, count) / PIXELS  # share of the canvas
        turn = self.between(-0.3, 0.3, count)  # radians
        mirror = torch.where(torch.rand(count, generator=self.random) < 0.5, -1.0, 1.0)
        shift = self.between(-1, 1, count, 2) * (1 - size)[:, None]
        rows = torch.stack([turn.cos() * mirror, -turn.sin() * mirror, turn.sin(), turn.cos()], -1)
        matrix = rows.view(count, 2, 2) / size[:, None, None]
        offset = -(matrix @ shift[..., None])
        theta = torch.cat([matrix, offset], -1).to(self.device)
        grid = F.affine_grid(theta, [count, 4, PIXELS, PIXELS], align_corners=False)
        return F.grid_sample(drawings, grid, align_corners=False)

    def softened(self, picture: torch.Tensor) -> torch.Tensor:
        """Blend each picture with a blurred copy of itself, by a random share."""
        blurred = F.avg_pool2d(F.pad(picture, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        share = self.between(0, 1, len(picture), 1, 1, 1).to(self.device)
        return picture + share * (blurred - picture)
