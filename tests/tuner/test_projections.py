"""Adapters of projections that Diffusers fuses: before, after and in between, in each kind of attention."""

import copy
import pickle
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from diffusekrona import (
    KronAConfig,
    inject_krona,
    load_krona,
    merge_file,
    merge_krona,
    save_krona,
    unload_krona,
    unmerge_krona,
)
from diffusekrona.errors import ConfigError, KronAError
from diffusekrona.tuner.injected import krona_layers
from tests.pipelines import tiny_sd_pipeline
from tests.snapshots import bits, unchanged
from tests.transformers import flux, sd3

KINDS = pytest.mark.parametrize("kind", ["unet", "sd3", "flux"])
"""An `Attention` with cross-attention, one with added projections, and one with a switch of its own."""


def model_of(kind: str) -> nn.Module:
    if kind == "unet":
        return tiny_sd_pipeline().unet
    torch.manual_seed(0)
    return (sd3() if kind == "sd3" else flux()).eval()


def config(**fields: object) -> KronAConfig:
    return KronAConfig(**{"a1": 2, "a2": 4, "alpha": 4.0, "init_weights": False, **fields})


def output(model: nn.Module, grad: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    kind = type(model).__name__
    with torch.set_grad_enabled(grad):
        if kind == "UNet2DConditionModel":
            return model(random(1, 4, 8, 8), 5, random(1, 3, model.config.cross_attention_dim)).sample
        if kind.startswith("SD3"):
            shape = (1, model.config.in_channels, 8, 8)
            pooled = random(1, model.config.pooled_projection_dim)
            return model(
                random(*shape), random(1, 3, model.config.joint_attention_dim), pooled, torch.tensor([5])
            ).sample
        return model(
            hidden_states=random(1, 4, model.config.in_channels),
            encoder_hidden_states=random(1, 3, model.config.joint_attention_dim),
            pooled_projections=random(1, model.config.pooled_projection_dim),
            timestep=torch.tensor([0.5]),
            img_ids=torch.zeros(4, 3),
            txt_ids=torch.zeros(3, 3),
        ).sample


def saved(kind: str, tmp_path) -> tuple[object, torch.Tensor, torch.Tensor]:
    """An adapter's file, and what the base and the adapted model give."""
    model = model_of(kind)
    base = output(model)
    torch.manual_seed(3)
    inject_krona(model, config())
    adapted = output(model)
    assert (adapted - base).abs().max() > 1e-3
    return save_krona(model, tmp_path / "a.safetensors"), base, adapted


def assert_gives(model: nn.Module, expected: torch.Tensor) -> None:
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-4)


@KINDS
def test_an_adapter_and_fusing_come_in_any_order(kind, tmp_path):
    path, base, adapted = saved(kind, tmp_path)
    first = model_of(kind)
    load_krona(first, path)
    first.fuse_qkv_projections()
    assert_gives(first, adapted)
    first.unfuse_qkv_projections()
    assert_gives(first, adapted)

    second = model_of(kind)
    second.fuse_qkv_projections()
    assert_gives(second, base)
    load_krona(second, path)
    assert_gives(second, adapted)
    second.unfuse_qkv_projections()
    assert_gives(second, adapted)
    second.fuse_qkv_projections()
    assert_gives(second, adapted)
    unload_krona(second)
    assert_gives(second, base)


@KINDS
def test_merged_adapters_come_out_of_fused_projections(kind, tmp_path):
    path, base, adapted = saved(kind, tmp_path)
    model = model_of(kind)
    model.fuse_qkv_projections()
    with_fused = bits(model)
    load_krona(model, path)
    merge_krona(model)
    assert_gives(model, adapted)
    unmerge_krona(model)
    assert_gives(model, adapted)
    assert bits(model) == with_fused
    merge_krona(model)
    unload_krona(model)
    assert bits(model) == with_fused
    assert_gives(model, base)


@KINDS
def test_what_was_merged_before_fusing_comes_out_after_it(kind, tmp_path):
    path, base, adapted = saved(kind, tmp_path)
    plain = model_of(kind)
    plain.fuse_qkv_projections()
    model = model_of(kind)
    load_krona(model, path)
    merge_krona(model)
    model.fuse_qkv_projections()
    assert_gives(model, adapted)
    unmerge_krona(model)
    assert bits(model) == bits(plain)
    assert_gives(model, adapted)
    unload_krona(model)
    assert_gives(model, base)


@KINDS
@pytest.mark.parametrize("exact", ["copy", False])
@pytest.mark.parametrize("fused_first", [True, False])
def test_fused_rows_come_back_in_the_way_that_was_asked_for(kind, exact, fused_first, tmp_path):
    model = model_of(kind)
    path = saved(kind, tmp_path)[0]
    if fused_first:
        model.fuse_qkv_projections()
    load_krona(model, path)
    before, unmerged = bits(model), output(model)
    merge_krona(model, exact=exact)
    if not fused_first:
        model.fuse_qkv_projections()
    assert_gives(model, unmerged)
    rows = [layer.fused_rows for layer in krona_layers(model).values() if layer.fused_rows is not None]
    assert rows
    assert {one._merged.keep for one in rows} == {"copy" if exact else "nothing"}
    with nullcontext() if exact else pytest.warns(UserWarning, match="not bit for bit"):
        unmerge_krona(model)
    assert_gives(model, unmerged)
    if exact and fused_first:
        assert bits(model) == before


@pytest.mark.parametrize("exact", [True, "copy", False])
def test_what_is_merged_into_the_whole_keeps_its_way_when_its_parts_change(exact, tmp_path):
    model = model_of("sd3")
    model.fuse_qkv_projections()
    inject_krona(model, config(target_modules=r".*\.to_qkv"), "whole")
    inject_krona(model, config(target_modules=r".*attn\.to_q"), "part")
    whole = [layer for name, layer in krona_layers(model).items() if name.endswith("to_qkv")]
    assert whole
    merge_krona(model, "whole", exact=exact)
    kept = {layer.kept for layer in whole}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*exact=False")
        merge_krona(model, "part", exact=exact)
        assert {layer.kept for layer in whole} == kept
        assert all(layer.merged_adapters == ["whole"] for layer in whole)


def test_unloading_leaves_a_fused_model_as_it_was(tmp_path):
    path, _, _ = saved("unet", tmp_path)
    model = model_of("unet")
    model.fuse_qkv_projections()
    with unchanged(model):
        load_krona(model, path)
        merge_krona(model)
        unload_krona(model)
    with unchanged(model):
        inject_krona(model, config())
        unload_krona(model)


@KINDS
def test_training_after_fusing_moves_every_factor(kind):
    model = model_of(kind)
    model.fuse_qkv_projections()
    krona = inject_krona(model, KronAConfig(a1=2, a2=4))
    plain = model_of(kind)
    names = {name for name, _ in inject_krona(plain, KronAConfig(a1=2, a2=4)).named_parameters()}
    factors = dict(krona.named_parameters())
    assert factors.keys() == names
    assert not any("qkv" in name or "to_kv" in name for name in names)
    output(model, grad=True).square().mean().backward()
    still = [name for name, factor in factors.items() if name.endswith("_B") and not factor.grad.any()]
    plain_output = output(plain, grad=True)
    plain_output.square().mean().backward()
    still_unfused = [n for n, f in plain.named_parameters() if n.endswith("_B.default") and not f.grad.any()]
    assert len(still) == len(still_unfused) <= 2, "SD3's and FLUX's last block of text may be without effect"


def test_gradients_are_those_of_the_apart_projections():
    grads = []
    for fuse in (False, True):
        model = model_of("unet")
        torch.manual_seed(3)
        krona = inject_krona(model, config())
        if fuse:
            model.fuse_qkv_projections()
        output(model, grad=True).square().mean().backward()
        grads.append({name: factor.grad for name, factor in krona.named_parameters()})
    for name, grad in grads[0].items():
        assert (grads[1][name] - grad).norm() <= 1e-3 * grad.norm() + 1e-6


def test_disabled_adapters_are_without_effect_in_fused_projections(tmp_path):
    path, base, adapted = saved("unet", tmp_path)
    for merge in (False, True):
        model = model_of("unet")
        load_krona(model, path)
        model.fuse_qkv_projections()
        if merge:
            merge_krona(model)
        model.disable_adapters()
        assert_gives(model, base)
        model.enable_adapters()
        assert_gives(model, adapted)


def test_an_adapter_of_a_fused_projection_itself_is_not_dropped():
    model = model_of("unet")
    model.fuse_qkv_projections()
    inject_krona(model, config(target_modules=["to_qkv"]))
    adapted = output(model)
    with unchanged(model), pytest.raises(KronAError, match=r"to_qkv has the adapter\(s\) default.*unload_krona"):
        model.unfuse_qkv_projections()
    with pytest.raises(KronAError, match="fusing the projections again would drop"):
        model.fuse_qkv_projections()
    assert_gives(model, adapted)
    unload_krona(model)
    model.unfuse_qkv_projections()


def test_adapters_of_the_whole_and_of_its_parts_merge_and_unmerge_exactly(tmp_path):
    path, base, _ = saved("unet", tmp_path)
    model = model_of("unet")
    model.fuse_qkv_projections()
    before = bits(model)
    inject_krona(model, config(target_modules=["to_qkv"]), "whole")
    load_krona(model, path, "parts")
    merge_krona(model, "whole")
    merge_krona(model, "parts")
    unmerge_krona(model, "whole")
    merge_krona(model, "whole")
    unmerge_krona(model, "parts")
    unmerge_krona(model, "whole")
    assert bits(model) == before
    merge_krona(model, ["parts", "whole"])
    unload_krona(model, "parts")
    unload_krona(model)
    assert bits(model) == before
    assert_gives(model, base)


def test_a_projection_that_was_unfused_is_no_target():
    model = model_of("unet")
    model.fuse_qkv_projections()
    model.unfuse_qkv_projections()
    with unchanged(model), pytest.raises(ConfigError, match=r"not called.*\n.*attn1\.to_qkv: the projections are unf"):
        inject_krona(model, config(target_modules=["to_qkv", "to_out.0"]))
    krona = inject_krona(model, config())
    assert not any("to_qkv" in name for name, _ in krona.named_parameters())


@KINDS
def test_merge_file_reaches_fused_projections(kind, tmp_path):
    path, _, adapted = saved(kind, tmp_path)
    model = model_of(kind)
    model.fuse_qkv_projections()
    merge_file(model, path)
    assert_gives(model, adapted)


def test_copies_and_pickles_of_a_fused_model_stand_alone(tmp_path):
    path, base, adapted = saved("unet", tmp_path)
    model = model_of("unet")
    load_krona(model, path)
    model.fuse_qkv_projections()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        unload_krona(other)
        assert_gives(other, base)
        assert_gives(model, adapted)
    other = copy.deepcopy(model)
    unload_krona(model)
    assert_gives(model, base)
    assert_gives(other, adapted)
    merge_krona(other)
    assert_gives(other, adapted)
    assert_gives(model, base)
    assert not krona_layers(model)
