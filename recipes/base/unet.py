"""The denoiser and its text encoders, trained together on captioned drawings in latent space."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import scenes
from . import text as text_stage
from . import vae as vae_stage
from .art import CACHE, PIXELS, Renderer, concepts, to_tensor
from .captions import training_caption
from .training import (
    Budget,
    average_gradients,
    fit,
    load_checkpoint,
    mixed,
    note,
    pick_device,
    save_checkpoint,
)

BATCH = 64  # at 32 a step takes 0.47 s, but forward and backward only 0.28 s of it
STEPS = 26_500
MINUTES = 700.0
SCHEDULE = (7e-4, 0.03, 200)
CAPTION_DROPOUT = 0.1
EMA_DECAY = 0.999
SNR_CAP = 5.0
POOL = 6_000  # latents kept; FRESH of them are replaced at each step
FRESH = 16
STYLE = "google"  # under one caption two styles mix
CHECKPOINT = CACHE / "unet.pt"
TRANSFORMER_LAYERS = (1, 1, 1)


def build_unet() -> UNet2DConditionModel:
    """SDXL's block layout in small: attention at the two coarser levels and in the middle."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=vae_stage.CHANNELS,
        out_channels=vae_stage.CHANNELS,
        block_out_channels=(64, 128, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=TRANSFORMER_LAYERS,
        attention_head_dim=(2, 4, 4),  # diffusers reads this as the number of heads
        cross_attention_dim=2 * text_stage.WIDTH,
        norm_num_groups=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=text_stage.WIDTH + 6 * 32,
    )


def build_scheduler() -> DDIMScheduler:
    """Velocity prediction down to zero signal, so that flat backgrounds come out in the colour asked for."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


class LatentPool:
    """Captioned latents, partly redrawn at every step so that no epoch repeats the last one."""

    def __init__(self, vae: AutoencoderKL, text: text_stage.Text, rng: np.random.Generator, size: int = POOL) -> None:
        self.vae, self.text, self.rng = vae, text, rng
        self.concepts = concepts()
        self.renderer = Renderer([c.image for c in self.concepts], styles=(STYLE,), sizes=scenes.EDGES)
        drawn = [self.draw(min(256, size - start)) for start in range(0, size, 256)]
        self.latents, self.ids = (torch.cat(parts) for parts in zip(*drawn, strict=True))

    @torch.no_grad()
    def draw(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """New scaled latents (count, 8, 16, 16) with their token ids (count, 24)."""
        pictures, captions = [], []
        for _ in range(count):
            index = int(self.rng.integers(len(self.concepts)))
            scene = scenes.random_scene(self.rng)
            pictures.append(scenes.draw(self.renderer, index, 0, scene, self.rng))
            captions.append(training_caption(self.concepts[index], scene, self.rng))
        with mixed(self.vae.device):
            mean = self.vae.encode(to_tensor(pictures).to(self.vae.device)).latent_dist.mean
        return mean.float() * self.vae.config.scaling_factor, self.text.ids(captions).to(self.vae.device)

    def batch(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch without repeats, after redrawing `FRESH` entries at random places."""
        places = self.places(max(1, count * FRESH // BATCH))
        self.latents[places], self.ids[places] = self.draw(len(places))
        chosen = self.places(count)
        return self.latents[chosen], self.ids[chosen]

    def places(self, count: int) -> torch.Tensor:
        """That many different entries of the pool."""
        return torch.from_numpy(self.rng.choice(len(self.ids), count, replace=False)).to(self.ids.device)


@dataclass
class Model:
    """The three trained networks."""

    unet: UNet2DConditionModel
    text: text_stage.Text

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """All of them, in a fixed order."""
        return chain(self.unet.parameters(), self.text.first.parameters(), self.text.second.parameters())


def build() -> Model:
    """Fresh networks from seed 0, on the chosen device."""
    torch.manual_seed(0)
    model, device = Model(build_unet(), text_stage.build()), pick_device()
    for part in (model.unet, model.text.first, model.text.second):
        part.to(device)
        part.train()
    return model


def diffusion_loss(
    model: Model, latents: torch.Tensor, ids: torch.Tensor, alphas: torch.Tensor, draw: torch.Generator
) -> torch.Tensor:
    """Velocity loss at one noise level per latent, levels spread evenly over the batch.

    The weight is min(1, SNR_CAP / (1 + SNR)): one at high noise (where the objective needs it, as the
    signal there is zero) and falling at low noise as in min-SNR weighting.
    """
    count, device = len(latents), latents.device
    spread = (torch.arange(count) + torch.rand(1, generator=draw)) / count
    level = (spread * len(alphas)).long().clamp(max=len(alphas) - 1)
    alpha = alphas[level].to(device)
    signal, sigma = (value.sqrt()[:, None, None, None] for value in (alpha, 1 - alpha))
    noise = torch.randn(latents.shape, generator=draw).to(device)
    keep = (torch.rand(count, generator=draw) >= CAPTION_DROPOUT).float().to(device)
    with mixed(device):
        prompt, pooled = model.text.encode(ids)
        sizes = torch.tensor([PIXELS, PIXELS, 0, 0, PIXELS, PIXELS], device=device).repeat(count, 1)
        prompt, pooled = prompt * keep[:, None, None], pooled * keep[:, None]
        extra = {"text_embeds": pooled, "time_ids": sizes}
        noisy = signal * latents + sigma * noise
        answer = model.unet(noisy, level.to(device), prompt, added_cond_kwargs=extra).sample
    error = (answer.float() - (signal * noise - sigma * latents)).square().mean(dim=(1, 2, 3))
    weight = (SNR_CAP * (1 - alpha)).clamp(max=1)  # 1 + SNR = 1 / (1 - alpha)
    return (weight * error).mean()


def attention_for(device: torch.device) -> AbstractContextManager[None]:
    """On a CPU the plain attention kernel: at these sizes it trains a fifth faster than the fused one."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def train() -> None:
    """Train to the budget; on a CPU in one single-threaded worker per core, which beats one with threads."""
    workers = 1 if pick_device().type == "cuda" else int(os.environ.get("WORKERS") or os.cpu_count() or 1)
    if workers > 1:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(work, (workers, f"{folder}/meeting"), workers)  # type: ignore[no-untyped-call]
    else:
        optimise()


def work(rank: int, workers: int, meeting: str) -> None:
    """One of several workers that share the gradients of each step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=workers)
    optimise()
    dist.destroy_process_group()


def optimise() -> None:
    """The training itself, continuing from the last checkpoint."""
    model, device = build(), pick_device()
    optimizer = torch.optim.AdamW(model.parameters(), lr=SCHEDULE[0], weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    ema = EMAModel(model.parameters(), decay=EMA_DECAY, foreach=True)
    start, state = {"step": 0.0, "minutes": 0.0}, load_checkpoint(CHECKPOINT)
    if state:
        for name, part in parts(model).items():
            part.load_state_dict(state[name])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        ema.to(device)
        start = state["budget"]
    workers, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    seed = int(start["step"]) + 1_000_003 * rank
    rng = np.random.default_rng(seed)
    pool = LatentPool(vae_stage.load().to(device), model.text, rng, POOL // workers)
    alphas = build_scheduler().alphas_cumprod
    draw = torch.Generator().manual_seed(seed)
    budget = Budget(STEPS, MINUTES)
    budget.restore(start)

    def one_step() -> torch.Tensor:
        ema.step(model.parameters())
        latents, ids = pool.batch(BATCH // workers)
        return diffusion_loss(model, latents, ids, alphas, draw)

    weights = [p for p in model.parameters() if p.requires_grad]
    share = (lambda: average_gradients(weights)) if workers > 1 else None

    def checkpoint() -> None:
        if rank > 0:
            return
        state = {name: part.state_dict() for name, part in parts(model).items()}
        rest = {"optimizer": optimizer.state_dict(), "ema": ema.state_dict(), "budget": budget.state()}
        save_checkpoint(CHECKPOINT, state | rest)

    with attention_for(device):
        fit("unet", budget, optimizer, one_step, checkpoint, SCHEDULE, share=share)
    note(f"unet done: {budget.step} steps, {budget.elapsed():.1f} min")


def parts(model: Model) -> dict[str, torch.nn.Module]:
    """The networks under their checkpoint names."""
    return {"unet": model.unet, "text_encoder": model.text.first, "text_encoder_2": model.text.second}


def averaged() -> tuple[Model, dict[str, float]]:
    """The networks with the checkpoint's averaged weights, and the budget spent on them."""
    state = load_checkpoint(CHECKPOINT)
    if state is None:
        raise FileNotFoundError("run the unet stage first")
    model = build()
    ema = EMAModel(model.parameters(), decay=EMA_DECAY)
    ema.load_state_dict(state["ema"])
    ema.to(pick_device())
    ema.copy_to(model.parameters())
    for part in parts(model).values():
        part.eval()
    return model, state["budget"]
