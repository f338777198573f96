"""Other adapters for each image of a batch, against each image drawn alone with its adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusekrona import KronAConfig, inject_krona, krona_batch, merge_krona
from diffusekrona.errors import AdapterNameError, BatchError
from diffusekrona.tuner.injected import adapter_tensors, krona_layers
from tests.modules import CONTEXT, WIDTH, network
from tests.pipelines import tiny_flux_pipeline, tiny_sd3_pipeline, tiny_sd_pipeline, tiny_sdxl_pipeline

SHAPES: dict[str, dict[str, Any]] = {
    "dog": {"a1": 4, "a2": 8},
    "cat": {"a1": 2, "a2": 4, "alpha": 3.0},
    "fox": {"a1": 4, "a2": 8, "num_terms": 2, "target_modules": ["to_q"]},
    "hen": {"a1": 8, "a2": 2, "b_rank": 1, "layout": "transposed"},
}
Names = list[str | None]
mixes = pytest.mark.parametrize(
    "names",
    [["dog", None, "cat", "dog"], ["fox", "hen", None, "cat"], [None] * 4, ["dog"] * 4],
    ids=lambda names: "-".join(map(str, names)),
)


def adapted(model: Any, *names: str, **more: Any) -> Any:
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        inject_krona(model, KronAConfig(init_weights=False, **SHAPES[name]), name, **more)
    return model


def activate(model: Any, name: str | None) -> None:
    """Make one adapter, or none, the active one of a module or pipeline."""
    parts = [model] if isinstance(model, nn.Module) else list(model.components.values())
    for part in (part for part in parts if isinstance(part, nn.Module)):
        for layer in krona_layers(part).values():
            layer.set_adapter([name] if name in layer.krona_A else [])


def samples(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    sizes = ((4, 5, WIDTH), (4, 7, CONTEXT))
    x, context = (torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes)
    return x, context


# A module


@mixes
def test_each_sample_equals_what_it_is_alone(names: Names) -> None:
    model, (x, context) = adapted(network(), *SHAPES).double(), samples()
    with krona_batch(model, names):
        found = model(x, context)
    for row, name in enumerate(names):
        activate(model, name)
        torch.testing.assert_close(found[row], model(x, context)[row], rtol=1e-10, atol=1e-10)


@mixes
def test_so_do_the_gradients(names: Names) -> None:
    model, (x, context) = adapted(network(), *SHAPES).double(), samples()
    x.requires_grad_()
    weight = torch.randn(4, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tensors = {f"{name} {key}": t for name in SHAPES for key, t in adapter_tensors(model, name).items()}
    leaves = [x, *(tensor.requires_grad_() for tensor in tensors.values())]
    with krona_batch(model, names):
        found = torch.autograd.grad((model(x, context) * weight).sum(), leaves, allow_unused=True)
    expected = [torch.zeros_like(leaf) for leaf in leaves]
    for row, name in enumerate(names):
        activate(model, name)
        for leaf in leaves:
            leaf.requires_grad_()
        alone = (model(x[row : row + 1], context[row : row + 1]) * weight[row : row + 1]).sum()
        for total, gradient in zip(expected, torch.autograd.grad(alone, leaves, allow_unused=True), strict=True):
            total += 0 if gradient is None else gradient
    for gradient, total in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.zeros_like(total) if gradient is None else gradient, total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_in_the_bases_dtype_to_its_rounding(dtype: torch.dtype) -> None:
    model, (x, context) = adapted(network(), "dog", "cat").to(dtype), samples(dtype)
    with krona_batch(model, ["dog", None, "cat", "dog"]):
        found = model(x, context)
    assert found.dtype == dtype
    close = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    for row, name in enumerate(["dog", None, "cat", "dog"]):
        activate(model, name)
        torch.testing.assert_close(found[row], model(x, context)[row], rtol=close, atol=close)


def test_what_was_active_before_is_so_again() -> None:
    model, (x, context) = adapted(network(), "dog", "cat").double(), samples()
    before = model(x, context)
    with pytest.raises(RuntimeError), krona_batch(model, [None] * 4):
        raise RuntimeError
    assert torch.equal(model(x, context), before)
    with krona_batch(model, ["dog"] * 4):
        with krona_batch(model, [None] * 4):
            inner = model(x, context)
        outer = model(x, context)
    assert not torch.allclose(inner, outer)


def test_dropout_and_hooks_take_the_other_path_and_agree() -> None:
    model, (x, context) = adapted(network(), "dog", "cat").double(), samples()
    names: Names = ["dog", None, "cat", "dog"]
    with krona_batch(model, names):
        expected = model(x, context)
        handles = [layer.base_layer.register_forward_hook(lambda *_: None) for layer in krona_layers(model).values()]
        torch.testing.assert_close(model(x, context), expected)
        for handle in handles:
            handle.remove()
    model = adapted(network(), "dog").double().train()
    for layer in krona_layers(model).values():
        layer.dropout["dog"] = 0.9
    with krona_batch(model, ["dog", None, None, None]):
        torch.manual_seed(0)
        one, two = model(x, context), model(x, context)
    assert not torch.equal(one[0], two[0])
    assert torch.equal(one[1:], two[1:])


def test_gradient_checkpointing_inside_gives_the_same_gradients() -> None:
    model, (x, context) = adapted(network(), "dog", "cat").double(), samples()
    found = []
    for compute in (model, lambda *given: checkpoint(model, *given, use_reentrant=False)):
        for parameter in model.parameters():
            parameter.grad = None
        with krona_batch(model, ["dog", None, "cat", "dog"]):
            compute(x, context).sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert found[0]
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


def test_what_cannot_be_is_refused_by_name() -> None:
    model, (x, context) = adapted(network(), "dog", "cat"), samples(torch.float32)
    for names, text in (([], "takes a list"), ("dog", "takes a list")):
        with pytest.raises(BatchError, match=text), krona_batch(model, names):
            pass
    with pytest.raises(AdapterNameError, match="cow"), krona_batch(model, ["dog", "cow"]):
        pass
    with krona_batch(model, ["dog", None, "cat"]), pytest.raises(BatchError, match="input has 4 rows for 3 images"):
        model(x, context)
    with krona_batch(model, ["dog", None]):  # as for guidance, the batch twice
        twice = model(x, context)
    activate(model, "dog")
    torch.testing.assert_close(twice[[0, 2]], model(x, context)[[0, 2]])
    with krona_batch(model, ["dog"]), pytest.raises(BatchError, match="5 rows"):
        model(x[:1].expand(5, -1, -1), context[:1].expand(5, -1, -1))
    inject_krona(model, KronAConfig(a1=4, a2=8, modules_to_save=["proj_out"]), "whole")
    with pytest.raises(BatchError, match="'whole' trains whole modules"), krona_batch(model, ["whole", "dog"]):
        pass
    merge_krona(model, "cat")
    with pytest.raises(BatchError, match=r"holds merged adapters \(cat\)"), krona_batch(model, ["dog", None]):
        pass


@pytest.mark.parametrize("whole", [True, False], ids=["torch.compile", "compile()"])
def test_nothing_is_compiled_anew_for_other_adapters(whole: bool) -> None:
    torch._dynamo.reset()
    model, (x, context) = adapted(network(), *SHAPES).double(), samples()
    activate(model, None)
    plain = model(x, context)
    if whole:
        called = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    else:
        (called := model).compile(backend="aot_eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        for number, names in enumerate((["dog", "cat", "fox", "hen"], ["hen", "fox", "cat", "dog"])):
            with krona_batch(called, names), torch._dynamo.config.patch(error_on_recompile=number > 0):
                found = called(x, context)
                expected = torch.stack([row_alone(names[row], x, context, row) for row in range(4)])
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(found, plain)


def row_alone(name: str, x: Tensor, context: Tensor, row: int) -> Tensor:
    model = adapted(network(), *SHAPES).double()
    activate(model, name)
    found: Tensor = model(x, context)[row]
    return found


# A pipeline

PIPELINES: dict[str, Callable[[], Any]] = {
    "sd": tiny_sd_pipeline,
    "sdxl": tiny_sdxl_pipeline,
    "sd3": tiny_sd3_pipeline,
    "flux": tiny_flux_pipeline,
}
PROMPTS = ["a toy", "a dog on sand", "a red toy"]
CHOSEN: Names = ["dog", None, "cat"]


def drawn(pipe: Any, prompts: list[str], seeds: list[int], **more: Any) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    pipe.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent", "generator": generators, **more}
    result: Tensor = pipe(prompts, **given).images
    return result


@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize("build", PIPELINES.values(), ids=PIPELINES)
def test_each_image_of_a_pipeline_is_what_it_is_alone(build: Callable[[], Any], each: int) -> None:
    pipe = adapted(build(), "dog", "cat")
    seeds = list(range(each * len(PROMPTS)))
    with krona_batch(pipe, CHOSEN):
        found = drawn(pipe, PROMPTS, seeds, num_images_per_prompt=each)
    for number, (prompt, name) in enumerate(zip(PROMPTS, CHOSEN, strict=True)):
        activate(pipe, name)
        own = slice(number * each, (number + 1) * each)
        alone = drawn(pipe, [prompt], seeds[own], num_images_per_prompt=each)
        torch.testing.assert_close(found[own], alone, rtol=1e-3, atol=1e-3)
    assert "prepare_latents" not in vars(pipe)


def test_text_encoders_have_their_own_adapters_too() -> None:
    pipe = adapted(tiny_sdxl_pipeline(), "dog", "cat", text_encoders=True)
    with krona_batch(pipe, CHOSEN):
        found = drawn(pipe, PROMPTS, [0, 1, 2])
        with pytest.raises(BatchError, match=r"1 rows for 3 prompts\. Give as many prompts as adapters"):
            drawn(pipe, PROMPTS[:1], [0, 1, 2], num_images_per_prompt=3)
    for number, name in enumerate(CHOSEN):
        activate(pipe, name)
        alone = drawn(pipe, PROMPTS[number : number + 1], [number])
        torch.testing.assert_close(found[number : number + 1], alone, rtol=1e-3, atol=1e-3)


def test_images_of_one_prompt_may_have_their_own_adapters() -> None:
    pipe = adapted(tiny_sd_pipeline(), "dog", "cat")
    with krona_batch(pipe, CHOSEN):
        found = drawn(pipe, PROMPTS[:1], [0, 1, 2], num_images_per_prompt=3)
        with pytest.raises(BatchError, match="3 adapters are given for 4 images"):
            drawn(pipe, PROMPTS[:1], [0, 1, 2, 3], num_images_per_prompt=4)
    for number, name in enumerate(CHOSEN):
        activate(pipe, name)
        alone = drawn(pipe, PROMPTS[:1], [number])
        torch.testing.assert_close(found[number : number + 1], alone, rtol=1e-3, atol=1e-3)


def test_images_from_images() -> None:
    made = adapted(tiny_sd_pipeline(), "dog", "cat")
    pipe = StableDiffusionImg2ImgPipeline(**made.components, requires_safety_checker=False)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with krona_batch(pipe, CHOSEN):
        found = drawn(pipe, PROMPTS, [0, 1, 2], image=images, strength=1.0)
    for number, name in enumerate(CHOSEN):
        activate(pipe, name)
        own = slice(number, number + 1)
        alone = drawn(pipe, PROMPTS[own], [number], image=images[own], strength=1.0)
        torch.testing.assert_close(found[own], alone, rtol=1e-3, atol=1e-3)


def test_fused_projections() -> None:
    pipe = adapted(tiny_sd_pipeline(), "dog", "cat")
    with krona_batch(pipe, CHOSEN):
        apart = drawn(pipe, PROMPTS, [0, 1, 2])
    pipe.fuse_qkv_projections()
    with krona_batch(pipe, CHOSEN):
        torch.testing.assert_close(drawn(pipe, PROMPTS, [0, 1, 2]), apart, rtol=1e-3, atol=1e-3)
