"""The autoencoder: 128 x 128 pictures to 8 x 16 x 16 latents and back, trained on every drawing but the hidden ones."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from . import art, pictures, scenes
from .art import CACHE, PIXELS
from .training import Run, mixed, note, pick_device, random_of

BATCH = 8
STEPS = 10_000
CROPPED = 8_000  # steps at first that see twice as many pieces of pictures, of a quarter of their area
PIECE = PIXELS // 2
SCHEDULE = (2e-3, 0.0, 100)
WIDTHS = (16, 32, 96, 128)  # nearly all time goes into the first two
GROUPS = 4
CHANNELS = 8
SIDE = PIXELS // 2 ** (len(WIDTHS) - 1)  # of a picture's latents
KL_WEIGHT = 1e-4  # on the mean over latent elements
EDGE_WEIGHT = 0.5
COLOUR_WEIGHT = 1.0
CELL = 16  # pixels; the mean colour of each such cell must be right
DRAWING_WEIGHT = 3.0  # of a drawing's pixels; the flat background's count 1
EDGES = (44, 126)  # of a drawing, in pixels
FOLDER = CACHE / "vae"


def build() -> AutoencoderKL:
    """A narrow `AutoencoderKL`, one layer per block, no attention."""
    kinds = len(WIDTHS)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * kinds,
        up_block_types=("UpDecoderBlock2D",) * kinds,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=GROUPS,
        sample_size=PIXELS,
        mid_block_add_attention=False,
        force_upcast=False,
    )


class Painter:
    """Pictures to train on: half of them are the denoiser's, half of any drawing that is not hidden, anywhere."""

    def __init__(self) -> None:
        self.known = [art.places()[drawing] for _, _, drawing in art.known_drawings()]
        self.every = [number for drawing, number in art.places().items() if drawing not in art.hidden()]

    def one(self, rng: np.random.Generator) -> Tensor:
        """A picture as the denoiser has them, or a drawing, sometimes two or three, on a named colour or any."""
        if rng.random() < 0.5:
            return scenes.draw(scenes.one_of(rng, self.known), scenes.random_scene(rng), rng)
        picture = pictures.flat(random_colour(rng))
        for _ in range(int(rng.choice((1, 2, 3), p=(0.8, 0.1, 0.1)))):
            edge = int(rng.integers(EDGES[0], EDGES[1] + 1))
            top, left = (int(offset) for offset in rng.integers(0, PIXELS - edge + 1, 2))
            pictures.paste(picture, pictures.resized(scenes.one_of(rng, self.every), edge), top, left)
        return picture

    def pieces(self, rng: np.random.Generator) -> Tensor:
        """(2 · BATCH, 3, 64, 64) in [-1, 1], of pictures of as many, at random places."""
        cut = []
        for _ in range(2 * BATCH):
            top, left = (int(offset) for offset in rng.integers(0, PIXELS - PIECE + 1, 2))
            cut.append(self.one(rng)[:, top : top + PIECE, left : left + PIECE])
        return pictures.to_network(cut)

    def batch(self, rng: np.random.Generator, count: int = BATCH) -> Tensor:
        """(count, 3, 128, 128) in [-1, 1]."""
        return pictures.to_network([self.one(rng) for _ in range(count)])


def random_colour(rng: np.random.Generator) -> list[float]:
    """Half the time one of the named colours, else any colour at all."""
    if rng.random() < 0.5:
        return pictures.named(str(rng.choice(list(pictures.COLOURS))), rng)
    return [float(level) for level in rng.random(3)]


def weights(x: Tensor) -> Tensor:
    """Weight of each pixel, (n, 1, height, width), mean 1: drawings count more than the flat colour of the corner."""
    drawn = ((x - x[:, :, :1, :1]).abs() > 0.05).any(1, keepdim=True)
    weight = torch.where(drawn, DRAWING_WEIGHT, 1.0)
    return weight / weight.mean()


def picture_loss(decoded: Tensor, x: Tensor) -> Tensor:
    """Absolute error of pixels, weighted, of edges, and of the mean colours of cells."""
    error = decoded - x
    down, right = error[:, :, 1:] - error[:, :, :-1], error[..., 1:] - error[..., :-1]
    sharp = EDGE_WEIGHT * (down.abs().mean() + right.abs().mean())
    colour = COLOUR_WEIGHT * F.avg_pool2d(error, CELL).abs().mean()
    return (weights(x) * error.abs()).mean() + sharp + colour


def loss_of(vae: AutoencoderKL, x: Tensor, noise: Tensor) -> Tensor:
    """The picture's loss, plus a light pull of the latents towards a unit Gaussian."""
    with mixed(x.device):
        posterior = vae.encode(x).latent_dist
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample.float()
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).mean()
    return picture_loss(decoded, x) + KL_WEIGHT * kl


def train() -> None:
    """Train to the end, from the last checkpoint; leaves the model folder in the cache."""
    torch.manual_seed(0)
    device = pick_device()
    vae = build().to(device, memory_format=torch.channels_last)
    run, painter = Run("vae", {"vae": vae}, STEPS, SCHEDULE, weight_decay=0.0), Painter()

    def loss_at(rng: np.random.Generator) -> Tensor:
        x = (painter.pieces(rng) if run.step < CROPPED else painter.batch(rng)).to(device)
        side = x.shape[-1] * SIDE // PIXELS
        return loss_of(vae, x, torch.randn(len(x), CHANNELS, side, side).to(device))

    def look() -> None:
        reconstruct(vae, painter, CACHE / "vae-sheet.png")

    run.fit(loss_at, look)
    run.average.swap()
    vae.register_to_config(scaling_factor=measured_scale(vae, painter))
    vae.save_pretrained(FOLDER)
    run.average.swap()
    note(f"vae done: {errors(load(), painter)}, scaling factor {vae.config.scaling_factor}")


def load(folder: Path = FOLDER) -> AutoencoderKL:
    """The trained autoencoder, on the CPU, in evaluation mode."""
    vae: AutoencoderKL = AutoencoderKL.from_pretrained(folder)
    return vae.eval()


@torch.no_grad()
def decoded(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """Pictures through the latents and back, in parts of 16."""
    return torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample for part in x.to(vae.device).split(16)])


@torch.no_grad()
def measured_scale(vae: AutoencoderKL, painter: Painter) -> float:
    """One over the standard deviation of the latents, from 256 pictures."""
    batch = painter.batch(random_of(-1 % 2**31), 256).to(vae.device)
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in batch.split(16)])
    return round(1 / float(latents.std()), 5)


def hidden_pictures() -> Tensor:
    """The subjects, which the autoencoder has never seen, on ten colours."""
    rng, drawn = np.random.default_rng(3), []
    for number, subject in enumerate(art.subjects()):
        picture = pictures.flat(pictures.named(list(pictures.COLOURS)[number % 11], rng, 0))
        pictures.paste(picture, pictures.resized(art.places()[subject.set, subject.drawing], 96), 16, 16)
        drawn.append(picture)
    return pictures.to_network(drawn)


def errors(vae: AutoencoderKL, painter: Painter) -> dict[str, float]:
    """Mean absolute errors, of a range of 2: of 128 pictures, of the subjects, and of the latter's background."""
    seen, unseen = painter.batch(np.random.default_rng(2), 128), hidden_pictures()
    found = {"l1": (decoded(vae, seen).cpu() - seen).abs().mean()}
    error = (decoded(vae, unseen).cpu() - unseen).abs()
    found |= {"l1_of_subjects": error.mean(), "l1_of_their_ground": error[:, :, :12].mean()}
    return {name: round(float(value), 4) for name, value in found.items()}


def reconstruct(vae: AutoencoderKL, painter: Painter, path: Path) -> None:
    """Save a sheet of pictures over what the autoencoder makes of them: the subjects, then others."""
    rows = [hidden_pictures(), painter.batch(np.random.default_rng(4), len(art.subjects()))]
    pairs = [(row, decoded(vae, row).cpu()) for row in rows]
    pictures.sheet([picture for pair in pairs for picture in pair], path)
    note(f"vae looks: {errors(vae, painter)}")
