"""The autoencoder: 64 x 64 pictures to 8 x 16 x 16 latents and back, trained on emoji over flat colours."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from .art import CACHE, COLOURS, STYLES, Floats, Renderer, background, concepts, every_image, to_tensor
from .training import Budget, fit, load_checkpoint, mixed, note, pick_device, save_checkpoint

BATCH = 16
STEPS = 20_000
MINUTES = 60.0
SCHEDULE = (2e-3, 0.0, 100)
CHANNELS = 8  # 4 lose the eyes of a small bear
KL_WEIGHT = 1e-4  # on the mean over latent elements
EDGE_WEIGHT = 0.5
DRAWING_WEIGHT = 3.0  # of a drawing's pixels; the flat background's count 1
FOLDER = CACHE / "vae"


def build() -> AutoencoderKL:
    """A narrow `AutoencoderKL`: 16, 32 and 64 channels, one layer per block, no attention."""
    kinds = 3
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * kinds,
        up_block_types=("UpDecoderBlock2D",) * kinds,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def random_colour(rng: np.random.Generator) -> Floats:
    """A background to train on: half the time one of the named colours, else any colour at all."""
    if rng.random() < 0.5:
        return background(str(rng.choice(list(COLOURS))), rng)
    return rng.random(3, dtype=np.float32)


def draw_batch(renderer: Renderer, rng: np.random.Generator, count: int) -> torch.Tensor:
    """Random drawings on random colours: (count, 3, 64, 64) in [-1, 1]."""
    pictures = []
    for _ in range(count):
        index, style = int(rng.integers(len(renderer.images))), int(rng.integers(len(renderer.styles)))
        pictures.append(renderer.draw(index, style, random_colour(rng), rng))
    return to_tensor(pictures)


def edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences between neighbouring pixels, downwards and rightwards."""
    return x[:, :, 1:] - x[:, :, :-1], x[..., 1:] - x[..., :-1]


def weights(x: torch.Tensor) -> torch.Tensor:
    """Weight of each pixel, (n, 1, 64, 64), mean 1: drawings count more than the flat colour of the corner."""
    drawn = ((x - x[:, :, :1, :1]).abs() > 0.05).any(1, keepdim=True)
    weight = torch.where(drawn, DRAWING_WEIGHT, 1.0)
    return weight / weight.mean()


def picture_loss(decoded: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Absolute error of pixels, weighted, plus that of edges."""
    down, right = (F.l1_loss(a, b) for a, b in zip(edges(decoded), edges(x), strict=True))
    return (weights(x) * (decoded - x).abs()).mean() + EDGE_WEIGHT * (down + right)


def loss_of(vae: AutoencoderKL, x: torch.Tensor) -> torch.Tensor:
    """Absolute error of pixels and of edges, plus a light pull of the latents towards a unit Gaussian."""
    posterior = vae.encode(x).latent_dist
    decoded = vae.decode(posterior.sample()).sample.float()
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).mean()
    return picture_loss(decoded, x) + KL_WEIGHT * kl


def train() -> None:
    """Train to the budget, continuing from the last checkpoint; leaves the model folder in the cache."""
    torch.manual_seed(0)
    vae = build().to(pick_device())
    renderer = Renderer(every_image(), styles=(*STYLES, "fluent"), sizes=(36, 46, 56))
    optimise(vae, renderer)
    vae.register_to_config(scaling_factor=measured_scale(vae, renderer))
    vae.save_pretrained(FOLDER)
    note(f"vae done: L1 {reconstruction_error(vae):.4f}, scaling factor {vae.config.scaling_factor}")


def optimise(vae: AutoencoderKL, renderer: Renderer) -> None:
    """Train the autoencoder to the budget, with checkpoints."""
    device, path, budget = vae.device, CACHE / "vae.pt", Budget(STEPS, MINUTES)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=SCHEDULE[0], weight_decay=0.0, fused=True)
    if state := load_checkpoint(path):
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        budget.restore(state["budget"])
    rng = np.random.default_rng(budget.step)

    def one_step() -> torch.Tensor:
        x = draw_batch(renderer, rng, BATCH).to(device)
        with mixed(device):
            return loss_of(vae, x)

    def checkpoint() -> None:
        model, optim = vae.state_dict(), optimizer.state_dict()
        save_checkpoint(path, {"model": model, "optimizer": optim, "budget": budget.state()})

    fit("vae", budget, optimizer, one_step, checkpoint, SCHEDULE)


def load(folder: Path = FOLDER) -> AutoencoderKL:
    """The trained autoencoder, on the CPU, in evaluation mode."""
    vae: AutoencoderKL = AutoencoderKL.from_pretrained(folder)
    return vae.eval()


@torch.no_grad()
def measured_scale(vae: AutoencoderKL, renderer: Renderer) -> float:
    """One over the standard deviation of the latents, from 512 drawings."""
    batch = draw_batch(renderer, np.random.default_rng(1), 512).to(vae.device)
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in batch.split(64)])
    return round(1 / float(latents.std()), 5)


@torch.no_grad()
def reconstruction_error(vae: AutoencoderKL) -> float:
    """Mean absolute error, in units of [-1, 1], over 256 drawings of the chosen concepts at unseen places."""
    renderer = Renderer([c.image for c in concepts()], sizes=(38, 50))
    batch = draw_batch(renderer, np.random.default_rng(2), 256)
    errors = []
    for part in batch.split(64):
        x = part.to(vae.device)
        errors.append(float((vae.decode(vae.encode(x).latent_dist.mode()).sample - x).abs().mean()))
    return sum(errors) / len(errors)
