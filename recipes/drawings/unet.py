"""The denoiser and its text encoders, trained together on captioned drawings in latent space."""

import os
import tempfile
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import art, pictures, scenes
from . import text as text_stage
from . import vae as vae_stage
from .art import PIXELS
from .captions import training_caption
from .training import Run, mixed, note, pick_device, random_of, worker

BATCH = 64
STEPS = 24_000
SCHEDULE = (7e-4, 0.02, 300)
CAPTION_DROPOUT = 0.1
SNR_CAP = 5.0
POOL = 8_000  # latents kept; FRESH of them are replaced at each step
FRESH = 16
DRAW = 250  # latents drawn at once when the pool is filled


def build_unet() -> UNet2DConditionModel:
    """Stable Diffusion XL's layout in small: no attention at the finest level, two blocks of it below.

    With attention at 16 x 16, too, a step takes over twice the time.
    """
    return UNet2DConditionModel(
        sample_size=vae_stage.SIDE,
        in_channels=vae_stage.CHANNELS,
        out_channels=vae_stage.CHANNELS,
        block_out_channels=(96, 192, 192),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2, 1),
        attention_head_dim=(2, 6, 6),  # diffusers reads this as the number of heads
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

    def __init__(self, vae: AutoencoderKL, text: text_stage.Text, rng: np.random.Generator, size: int) -> None:
        self.vae, self.text, self.known = vae, text, art.known_drawings()
        drawn = [self.draw(min(DRAW, size - start), rng) for start in range(0, size, DRAW)]
        self.latents, self.ids = (torch.cat(parts) for parts in zip(*drawn, strict=True))

    @torch.no_grad()
    def draw(self, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """New scaled latents (count, 8, 16, 16) with their token ids (count, 24)."""
        drawn, captions = [], []
        for _ in range(count):
            number, style, drawing = scenes.one_of(rng, self.known)
            scene = scenes.random_scene(rng)
            drawn.append(scenes.draw(art.places()[drawing], scene, rng))
            captions.append(training_caption(art.concepts()[number], style, scene, rng))
        with mixed(self.vae.device):
            mean = self.vae.encode(pictures.to_network(drawn).to(self.vae.device)).latent_dist.mean
        return mean.float() * self.vae.config.scaling_factor, self.text.ids(captions).to(self.vae.device)

    def batch(self, count: int, fresh: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """A batch without repeats, after redrawing some entries at random places."""
        places = torch.from_numpy(rng.choice(len(self.ids), fresh, replace=False))
        self.latents[places], self.ids[places] = self.draw(fresh, rng)
        chosen = torch.from_numpy(rng.choice(len(self.ids), count, replace=False))
        return self.latents[chosen], self.ids[chosen]


@dataclass
class Model:
    """The three trained networks."""

    unet: UNet2DConditionModel
    text: text_stage.Text

    def parts(self) -> dict[str, nn.Module]:
        """The networks under their names in a pipeline."""
        return {"unet": self.unet, "text_encoder": self.text.first, "text_encoder_2": self.text.second}


def build() -> Model:
    """Fresh networks from seed 0, on the chosen device."""
    torch.manual_seed(0)
    model, device = Model(build_unet(), text_stage.build()), pick_device()
    for part in model.parts().values():
        part.to(device)
        part.train()
    model.unet.to(memory_format=torch.channels_last)
    return model


def diffusion_loss(model: Model, latents: Tensor, ids: Tensor, alphas: Tensor) -> Tensor:
    """Velocity loss at one noise level per latent, levels spread evenly over the batch.

    The weight is min(1, SNR_CAP / (1 + SNR)): one at high noise (where the objective needs it, as the
    signal there is zero) and falling at low noise as in min-SNR weighting.
    """
    count, device = len(latents), latents.device
    spread = (torch.arange(count) + torch.rand(1)) / count
    level = (spread * len(alphas)).long().clamp(max=len(alphas) - 1)
    alpha = alphas[level].to(device)
    signal, sigma = (value.sqrt()[:, None, None, None] for value in (alpha, 1 - alpha))
    noise = torch.randn(latents.shape).to(device)
    keep = (torch.rand(count) >= CAPTION_DROPOUT).float().to(device)
    with mixed(device):
        prompt, pooled = model.text.encode(ids)
        sizes = torch.tensor([PIXELS, PIXELS, 0, 0, PIXELS, PIXELS], device=device).repeat(count, 1)
        prompt, pooled = prompt * keep[:, None, None], pooled * keep[:, None]
        extra = {"text_embeds": pooled, "time_ids": sizes}
        noisy = (signal * latents + sigma * noise).contiguous(memory_format=torch.channels_last)
        answer = model.unet(noisy, level.to(device), prompt, added_cond_kwargs=extra).sample
    error = (answer.float() - (signal * noise - sigma * latents)).square().mean(dim=(1, 2, 3))
    weight = (SNR_CAP * (1 - alpha)).clamp(max=1)  # 1 + SNR = 1 / (1 - alpha)
    return (weight * error).mean()


def attention_for(device: torch.device) -> AbstractContextManager[None]:
    """On a CPU the plain attention kernel, which trains faster than the fused one at these sizes."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def train() -> None:
    """Train to the end; on a CPU in one single-threaded worker per core, which beats one with threads."""
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
    """The training itself, from the last checkpoint."""
    model, device, (_, workers) = build(), pick_device(), worker()
    run = Run("unet", model.parts(), STEPS, SCHEDULE)
    alphas = build_scheduler().alphas_cumprod
    vae = vae_stage.load().to(device)
    pool = LatentPool(vae, model.text, random_of(run.step + 2**30), POOL // workers)
    compiled = Model(torch.compile(model.unet), model.text)  # a third faster on a CPU, after two minutes of compiling

    def loss_at(rng: np.random.Generator) -> Tensor:
        return diffusion_loss(compiled, *pool.batch(BATCH // workers, FRESH // workers, rng), alphas)

    with attention_for(device):
        run.fit(loss_at, lambda: look(model, vae), look_every=1000)


@torch.no_grad()
def look(model: Model, vae: AutoencoderKL) -> None:
    """Save a sheet of what the denoiser draws for a few captions, a row for each style."""

    pipe = assemble(model, vae)
    pipe.set_progress_bar_config(disable=True)
    names = ("bear", "dog", "robot", "hamburger", "tractor", "owl", "ghost", "guitar")
    captions = [
        f"a {style} {name} on a {colour} background"
        for style in art.STYLES.values()
        for name, colour in zip(names, pictures.COLOURS, strict=False)
    ]
    seeds = [torch.Generator().manual_seed(number) for number in range(len(captions))]
    with mixed(model.unet.device):
        drawn = pipe(captions, generator=seeds, guidance_scale=3.0, num_inference_steps=20, output_type="pt").images
    pictures.sheet(list((drawn.float().cpu() * 2 - 1).split(len(names))), art.CACHE / "unet-sheet.png")
    for part in model.parts().values():
        part.train()
    note("unet drew a sheet")


def averaged() -> Model:
    """The networks with the checkpoint's mean weights."""
    model = build()
    run = Run("unet", model.parts(), STEPS, SCHEDULE)
    if run.step == 0:
        raise FileNotFoundError("run the unet stage first")
    run.average.swap()
    for part in model.parts().values():
        part.eval()
    return model


def assemble(model: Model, vae: AutoencoderKL) -> StableDiffusionXLPipeline:
    """The pipeline around the given networks."""
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=model.text.first,
        text_encoder_2=model.text.second,
        tokenizer=model.text.tokenizer,
        tokenizer_2=model.text.tokenizer,
        unet=model.unet,
        scheduler=build_scheduler(),
        add_watermarker=False,
    )
