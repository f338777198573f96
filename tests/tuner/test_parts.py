"""Models that are made of parts of an adapted one."""

import pytest
import torch
from diffusers import ControlNetModel, FluxControlNetModel
from torch import nn

from diffusekrona import KronAConfig, inject_krona, merge_krona, save_krona, unload_krona
from tests.pipelines import tiny_sd_pipeline
from tests.snapshots import bits, unchanged
from tests.transformers import flux

UNMERGED = r"without the adapter\(s\) default, which are not merged.*merge_krona"


def config(**fields: object) -> KronAConfig:
    return KronAConfig(**{"a1": 2, "a2": 4, "init_weights": False, **fields})


def shared(part: nn.Module, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The parameters of a part that the model has under the same names, of both."""
    own, whole = part.state_dict(), {k.replace(".base_layer.", "."): t for k, t in model.state_dict().items()}
    names = [name for name in own if name in whole]
    return {name: own[name] for name in names}, {name: whole[name] for name in names}


def test_a_controlnet_has_the_weights_of_the_base_and_says_what_is_left_out():
    unet = tiny_sd_pipeline().unet
    base = bits(ControlNetModel.from_unet(unet).down_blocks)
    inject_krona(unet, config(modules_to_save=["time_embedding"]))
    with pytest.warns(UserWarning, match=UNMERGED):
        controlnet = ControlNetModel.from_unet(unet)
    assert bits(controlnet.down_blocks) == base
    assert not any("krona" in name or "base_layer" in name for name in controlnet.state_dict())


def test_a_controlnet_has_merged_weights():
    unet = tiny_sd_pipeline().unet
    base = bits(ControlNetModel.from_unet(unet).down_blocks)
    inject_krona(unet, config())
    merge_krona(unet)
    controlnet = ControlNetModel.from_unet(unet)  # a warning would be an error
    own, whole = shared(controlnet.down_blocks, unet.down_blocks)
    assert len(own) == len(controlnet.down_blocks.state_dict())
    assert all(torch.equal(own[name], whole[name]) for name in own)
    assert bits(controlnet.down_blocks) != base


def test_a_copy_that_is_not_strict_has_all_weights_too():
    model = flux()
    inject_krona(model, config())
    with pytest.warns(UserWarning, match=UNMERGED):
        controlnet = FluxControlNetModel.from_transformer(
            model, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2
        )
    assert torch.equal(
        controlnet.transformer_blocks[0].attn.to_q.weight, model.transformer_blocks[0].attn.to_q.base_layer.weight
    )


def test_the_state_of_a_whole_model_and_of_what_is_none_of_diffusers_is_as_ever(tmp_path):
    unet = tiny_sd_pipeline().unet
    with unchanged(unet):
        inject_krona(unet, config())
        names = list(unet.state_dict())
        assert sum(".krona_A." in name for name in names) == sum(".base_layer.weight" in name for name in names) > 0
        both = nn.ModuleDict({"unet": unet})
        assert [name.removeprefix("unet.") for name in both.state_dict()] == names
        save_krona(unet, tmp_path / "a.safetensors")
        unload_krona(unet)
    plain = nn.Sequential(nn.Sequential(nn.Linear(16, 16)))
    inject_krona(plain, config(target_modules=["0.0"]))
    assert any("krona_A" in name for name in plain[0].state_dict())


def test_a_second_adapter_in_other_layers_is_left_out_too_and_leaves_without_a_trace():
    unet = tiny_sd_pipeline().unet
    inject_krona(unet, config(target_modules=["to_q"]), "one")
    with unchanged(unet):
        inject_krona(unet, config(target_modules=r"mid_block\.resnets.*time_emb_proj"), "two")
        with pytest.warns(UserWarning, match=r"adapter\(s\) two"):
            assert not any("krona" in name for name in unet.mid_block.resnets.state_dict())
        unload_krona(unet, "two")
    assert not any("krona" in name for name in unet.mid_block.resnets.state_dict())
