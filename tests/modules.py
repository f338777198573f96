"""A small network with attention projections, for tests that need neither a UNet nor a pipeline."""

import torch
from torch import nn

WIDTH = 24
CONTEXT = 16


class Attention(nn.Module):
    """Cross-attention with the projections' names in Diffusers; K and V are WIDTH × CONTEXT."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(WIDTH, WIDTH)
        self.to_k = nn.Linear(CONTEXT, WIDTH, bias=False)
        self.to_v = nn.Linear(CONTEXT, WIDTH, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Dropout(0.0)])

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        scores = self.to_q(x) @ self.to_k(context).mT / WIDTH**0.5
        hidden = scores.softmax(-1) @ self.to_v(context)
        for layer in self.to_out:
            hidden = layer(hidden)
        return hidden


class Network(nn.Module):
    """Two attention blocks between a linear layer at the start and one at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_in = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([Attention(), Attention()])
        self.norm = nn.LayerNorm(WIDTH)
        self.proj_out = nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        x = self.proj_in(x)
        for block in self.blocks:
            x = x + block(x, context)
        return self.proj_out(self.norm(x))


def network(seed: int = 0) -> Network:
    """A network in evaluation mode whose weights come from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network().eval()


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, WIDTH, generator=generator)
    return x.to(dtype), torch.randn(2, 7, CONTEXT, generator=generator).to(dtype)
