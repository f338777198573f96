"""Small models of several kinds with adapters, for tests of what PEFT does with them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaForCausalLM

from diffusekrona import KronAConfig
from diffusekrona.tuner.injected import krona_layers
from diffusekrona.tuner.layer import KronALayer

quiet = [
    pytest.mark.filterwarnings("ignore:(All adapters|Already|You are trying|Adapter)"),
    pytest.mark.filterwarnings("ignore:.*use_reentrant"),
]


class Mlp(nn.Module):
    """A convolution, two linear layers and a head. Two names hold what PEFT looks for in the names of adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.krona_conv = nn.Conv2d(4, 8, 3, padding=1)
        self.lin0 = nn.Linear(32, 16)
        self.lin1_default = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.krona_conv(x).relu().flatten(1)
        return self.head(self.lin1_default(self.lin0(x).relu()))


def clip() -> nn.Module:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=12,
            eos_token_id=39,
            initializer_factor=3.0,
        )
    )


def decoder() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            initializer_range=0.2,
        )
    )


def unet() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(16,),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=8,
        cross_attention_dim=16,
    )


@dataclass(frozen=True)
class Kind:
    """A kind of model: how it is made and called, which layers are adapted, and one that is trained in full."""

    make: Callable[[], nn.Module]
    inputs: dict[str, Tensor]
    targets: tuple[str, ...]
    copied: str

    def base(self) -> Any:
        """The model in evaluation mode; every call gives the same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make().eval()

    def config(self, **fields: Any) -> KronAConfig:
        """Factors that start random, so that an adapter changes the output at once."""
        return KronAConfig(**{"a1": 2, "a2": 4, "init_weights": False, "target_modules": list(self.targets), **fields})

    def adapted(self, name: str = "default", seed: int = 1, **fields: Any) -> Any:
        torch.manual_seed(seed)
        return get_peft_model(self.base(), self.config(**fields), name)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


TOKENS = torch.arange(20).view(2, 10)
MLP = Kind(Mlp, {"x": numbers(3, 4, 2, 2)}, ("krona_conv", "lin0", "lin1_default"), "head")
CLIP = Kind(clip, {"input_ids": TOKENS}, ("q_proj", "out_proj", "fc1"), "final_layer_norm")
DECODER = Kind(decoder, {"input_ids": TOKENS}, ("q_proj", "v_proj", "down_proj"), "lm_head")
UNET = Kind(
    unet,
    {"sample": numbers(1, 4, 8, 8), "timestep": torch.tensor([7]), "encoder_hidden_states": numbers(1, 3, 16)},
    ("to_q", "to_k", "to_out.0", "conv1"),
    "conv_out",
)
KINDS = {"mlp": MLP, "clip": CLIP, "decoder": DECODER, "unet": UNET}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "terms": {"num_terms": 2},
    "product": {"b_rank": 1},
    "terms of products": {"num_terms": 2, "b_rank": 1},
    "scales": {"alpha": 0.5, "alpha_pattern": {"to_q|q_proj|lin0": -2.0}},
    "terms of a layer's own": {"terms_pattern": {"to_q|q_proj|lin0": 3}},
}

kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
half_types = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def output(kind: Kind, model: nn.Module) -> Tensor:
    """What a model computes, the same bits whatever of it is trained: on some processors convolutions look at that."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with torch.no_grad():
            return with_gradients(kind, model)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def with_gradients(kind: Kind, model: nn.Module) -> Tensor:
    dtype = next(p.dtype for name, p in model.named_parameters() if "krona_A" not in name and "krona_B" not in name)
    inputs = {key: x.to(dtype) if x.is_floating_point() else x for key, x in kind.inputs.items()}
    result = model(**inputs)
    return result if isinstance(result, Tensor) else result[0]


def delta(layer: KronALayer, adapter: str) -> Tensor:
    """ΔW in float64, from the definition."""
    factors = {key: factor.detach().double() for key, factor in layer.parameters_of(adapter).items()}
    A = factors["krona_A"]
    B = factors["krona_B"] if "krona_B" in factors else factors["krona_B1"] @ factors["krona_B2"]
    terms = list(zip(A, B, strict=True)) if A.dim() == 3 else [(A, B)]
    return layer.scaling[adapter] * sum(torch.kron(a, b) for a, b in terms).view(layer.get_base_layer().weight.shape)


def dense(kind: Kind, model: nn.Module, weights: dict[str, float]) -> Any:
    """The base model with Σ w · ΔW in its weights, computed in float64."""
    base = kind.base().double()
    for name, layer in krona_layers(model).items():
        path = name.replace(".base_layer", "").removeprefix("base_model.model.")
        for adapter, weight in weights.items():
            if adapter in layer.krona_A:
                base.get_submodule(path).weight.data += weight * delta(layer, adapter)
    return base


def assert_computes(kind: Kind, model: nn.Module, **weights: float) -> None:
    """The model computes what the base does with Σ w · ΔW, and that is not what the base does."""
    expected = output(kind, dense(kind, model, weights))
    torch.testing.assert_close(output(kind, model).double(), expected, rtol=1e-3, atol=1e-4)
    assert bool((expected - output(kind, kind.base())).abs().max() > 1e-3)


def assert_base(kind: Kind, model: nn.Module) -> None:
    assert torch.equal(output(kind, model), output(kind, kind.base()))


def factors(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """An adapter's factors by layer and key, without the wrappers' prefixes."""
    return {
        f"{name.removeprefix('base_model.model.').removeprefix('_orig_mod.')}.{key}": factor
        for name, layer in krona_layers(model).items()
        if adapter in layer.krona_A
        for key, factor in layer.parameters_of(adapter).items()
    }


def same_factors(model: nn.Module, other: nn.Module, adapter: str = "default", name: str = "default") -> bool:
    ours, theirs = factors(model, adapter), factors(other, name)
    return bool(ours) and ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def trainable(model: nn.Module) -> set[str]:
    """The adapters, and else the parameters, that require gradients."""
    names = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return {name.rpartition(".")[2] if ".krona_" in name else name for name in names}


def weights(model: nn.Module) -> dict[str, bytes]:
    """The bits of the base's own weights, under the names that they have without adapters."""
    return {
        name.replace(".base_layer", "").removeprefix("base_model.model."): tensor.view(torch.uint8).numpy().tobytes()
        for name, tensor in model.state_dict().items()
        if ".krona_A." not in name and ".krona_B" not in name and ".modules_to_save." not in name
    }


def lora(kind: Kind, **fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": list(kind.targets), "init_lora_weights": False, **fields})
