"""Files and models that fuse a layer's projections differently: adapters and merges are rows of the dense ΔW."""

from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusekrona import load_krona, merge_file, merge_krona
from diffusekrona.errors import AdapterFileError
from diffusekrona.files.convert import _approximable as approximable  # what convert does once it knows the model
from diffusekrona.files.read import updates_in
from diffusekrona.files.unused import STRICT
from diffusekrona.tuner.injected import krona_layers
from tests.snapshots import unchanged
from tests.transformers import chroma, flux, flux2, sd3

Tensors = dict[str, Tensor]
DOUBLE, SINGLE = "transformer_blocks.0.attn", "single_transformer_blocks.0"


def unet() -> nn.Module:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        block_out_channels=(16,),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=8,
        cross_attention_dim=12,
    ).eval()


def fused(model: nn.Module) -> nn.Module:
    model.fuse_qkv_projections()
    return model


def output(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(1, 4, 8, generator=generator),
            encoder_hidden_states=torch.randn(1, 3, 16, generator=generator),
            timestep=torch.tensor([0.5]),
            img_ids=torch.arange(16.0).view(4, 4),
            txt_ids=torch.zeros(3, 4),
            guidance=torch.ones(1),
            return_dict=False,
        )[0]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.3


def lokr(name: str, d: int, h: int, a1: int = 4, a2: int = 4) -> tuple[Tensors, Tensor]:
    """A layer of a file, and its ΔW."""
    w1, w2 = random(a1, a2), random(d // a1, h // a2)
    return {f"{name}.lokr_w1": w1, f"{name}.lokr_w2": w2}, torch.kron(w1, w2)


def lora(name: str, d: int, h: int, ends: tuple[str, str]) -> tuple[Tensors, Tensor]:
    up, down = random(d, 4), random(4, h)
    return {f"{name}{ends[0]}": up, f"{name}{ends[1]}": down}, up @ down


def rows(delta: Tensor, *names: str) -> Tensors:
    """Equal numbers of rows for each name."""
    return dict(zip(names, delta.chunk(len(names)), strict=True))


def saved(folder: Path, *layers: Tensors) -> Path:
    path = folder / "a.safetensors"
    save_file({key: tensor.clone() for layer in layers for key, tensor in layer.items()}, path)
    return path


def loaded(model: nn.Module, path: Path) -> Tensors:
    """What load_krona adds, by layer."""
    load_krona(model, path)
    return {name: layer.get_delta_weight("default").detach() for name, layer in krona_layers(model).items()}


def merged(model: nn.Module, path: Path) -> Tensors:
    """What merge_file changes in a model of zeros, by parameter."""
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    merge_file(model, path)
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.any()}


def assert_same(found: Tensors, expected: Tensors, ending: str = "", exact: bool = True) -> None:
    assert found.keys() == {name + ending for name in expected}
    for name, delta in expected.items():
        tolerance = 0.0 if exact else 1e-6
        torch.testing.assert_close(found[name + ending], delta, rtol=tolerance, atol=tolerance)


# Products


def fused_file(folder: Path) -> tuple[Path, Tensors, Tensors]:
    """A LoKr of FLUX.2 in its original layout; its updates by Diffusers' layers, apart and fused."""
    blocks = "diffusion_model.double_blocks.0."
    qkv, of_qkv = lokr(f"{blocks}img_attn.qkv", 72, 24)
    text, of_text = lokr(f"{blocks}txt_attn.qkv", 72, 24, a1=36)
    proj, of_proj = lokr(f"{blocks}img_attn.proj", 24, 24)
    modulation, swapped = lokr("diffusion_model.final_layer.adaLN_modulation.1", 48, 24)
    path = saved(folder, qkv, text, proj, modulation)
    same = {f"{DOUBLE}.to_out.0": of_proj, "norm_out.linear": swapped.roll(24, 0)}
    apart = rows(of_qkv, *(f"{DOUBLE}.to_{n}" for n in "qkv"))
    apart |= rows(of_text, *(f"{DOUBLE}.add_{n}_proj" for n in "qkv"))
    return path, {**apart, **same}, {f"{DOUBLE}.to_qkv": of_qkv, f"{DOUBLE}.to_added_qkv": of_text, **same}


def test_a_fused_lokr_becomes_adapters_of_q_k_and_v_exactly(tmp_path: Path) -> None:
    path, apart, _ = fused_file(tmp_path)
    model = flux2()
    assert_same(loaded(model, path), apart)
    assert krona_layers(model)[f"{DOUBLE}.to_q"].shapes("default").num_terms == 3  # 18 rows of w2 in parts of 6
    assert krona_layers(model)[f"{DOUBLE}.add_q_proj"].shapes("default").num_terms == 1
    assert_same(merged(flux2(), path), apart, ".weight")


def test_an_adapted_model_computes_what_the_merged_one_does(tmp_path: Path) -> None:
    path, _, _ = fused_file(tmp_path)
    models = [flux2() for _ in range(3)]
    load_krona(models[0], path)
    merge_file(models[1], path)
    load_krona(fused(models[2]), path)
    base, expected = output(flux2()), output(models[1])
    assert float((expected - base).abs().max()) > 0.01
    for model in (models[0], models[2]):
        torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-5)
        merge_krona(model)
        torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-5)


def test_a_fused_file_fits_a_fused_model_as_it_is(tmp_path: Path) -> None:
    path, _, whole = fused_file(tmp_path)
    model = fused(flux2())
    assert_same(loaded(model, path), whole)
    assert krona_layers(model)[f"{DOUBLE}.to_qkv"].shapes("default").num_terms == 1
    assert_same(merged(fused(flux2()), path), whole, ".weight")


@pytest.mark.parametrize("names", [("to_q", "to_k", "to_v"), ("to_q", "to_v"), ("to_k",)], ids=str)
def test_a_file_of_single_projections_fits_a_fused_model_as_rows(names: tuple[str, ...], tmp_path: Path) -> None:
    deltas, files = {}, []
    for name, a1 in zip(names, (4, 6, 4), strict=False):
        file, deltas[name] = lokr(f"transformer.{DOUBLE}.{name}", 24, 24, a1)
        files.append(file)
    path = saved(tmp_path, *files)
    zeros = torch.zeros(24, 24)
    whole = torch.cat([deltas.get(name, zeros) for name in ("to_q", "to_k", "to_v")])
    assert_same(loaded(fused(flux2()), path), {f"{DOUBLE}.to_qkv": whole})
    assert_same(merged(fused(flux2()), path), {f"{DOUBLE}.to_qkv": whole}, ".weight")


def test_names_of_a_fused_model_fit_one_that_is_not(tmp_path: Path) -> None:
    file, delta = lokr(f"transformer.{DOUBLE}.to_qkv", 72, 24)
    expected = rows(delta, *(f"{DOUBLE}.to_{n}" for n in "qkv"))
    path = saved(tmp_path, file)
    assert_same(loaded(flux2(), path), expected)
    assert_same(merged(flux2(), path), expected, ".weight")


def test_a_unets_cross_attention_is_fused_without_its_queries(tmp_path: Path) -> None:
    block = "mid_block.attentions.0.transformer_blocks.0"
    layers = {f"{block}.attn1.to_{n}": (16, 16) for n in "qkv"} | {f"{block}.attn2.to_{n}": (16, 12) for n in "kv"}
    made = {name: lokr(f"unet.{name}", d, h, 2) for name, (d, h) in layers.items()}
    path = saved(tmp_path, *(file for file, _ in made.values()))
    deltas = {name: delta for name, (_, delta) in made.items()}
    assert_same(merged(unet(), path), deltas, ".weight")
    whole = {
        f"{block}.attn1.to_qkv": torch.cat([deltas[f"{block}.attn1.to_{n}"] for n in "qkv"]),
        f"{block}.attn2.to_kv": torch.cat([deltas[f"{block}.attn2.to_{n}"] for n in "kv"]),
    }
    assert_same(loaded(fused(unet()), path), whole)
    assert_same(merged(fused(unet()), path), whole, ".weight")
    file, delta = lokr(f"unet.{block}.attn2.to_kv", 32, 12, 2)
    assert_same(merged(unet(), saved(tmp_path, file)), rows(delta, *(f"{block}.attn2.to_{n}" for n in "kv")), ".weight")


def test_what_would_take_more_products_than_it_is_worth_is_refused_and_merges(tmp_path: Path) -> None:
    """15 heads' rows in one w2, and 13 of the heads are the queries'."""
    heads = {"to_q": 26, "to_k": 2, "to_v": 2}
    model = nn.ModuleDict({"attn": nn.ModuleDict({name: nn.Linear(8, d) for name, d in heads.items()})})
    file, delta = lokr("attn.to_qkv", 30, 8, 1, 1)
    path = saved(tmp_path, file)
    text = r"sums of up to 13 products, which cost more .*\(1 of 3 layers: attn\.to_q\).*merge_file.*convert --budget"
    with unchanged(model), pytest.raises(AdapterFileError, match=text):
        load_krona(model, path)
    parts = {f"attn.{name}": delta[first:last] for name, (first, last) in zip(heads, ends(heads.values()), strict=True)}
    assert_same(merged(model, path), parts, ".weight")
    with pytest.warns(UserWarning, match=r"attn\.to_q\).* The other 2 layers are used"):
        load_krona(model, path, on_unused="warn")
    assert krona_layers(model).keys() == {"attn.to_k", "attn.to_v"}


def ends(sizes):
    return pairwise(accumulate(sizes, initial=0))


def test_a_model_with_other_sizes_is_named(tmp_path: Path) -> None:
    file, _ = lokr(f"{DOUBLE}.to_qkv", 48, 24)
    model = flux2()
    with unchanged(model), pytest.raises(AdapterFileError, match=r"to_qkv has 48 outputs, and the layers .* have 72"):
        merge_file(model, saved(tmp_path, file))


# LoRA and DoRA

KOHYA = (".lora_up.weight", ".lora_down.weight")
PEFT = (".lora_B.weight", ".lora_A.weight")
XLABS = (".up.weight", ".down.weight")
TO_QKV = tuple(f"{DOUBLE}.to_{n}" for n in "qkv")
ADDED = tuple(f"{DOUBLE}.add_{n}_proj" for n in "qkv")
LORAS: list[tuple[Callable[[], nn.Module], str, tuple[str, str], tuple[str, ...]]] = [
    (flux, "lora_unet_double_blocks_0_img_attn_qkv", KOHYA, TO_QKV),
    (flux, "lora_unet_double_blocks_0_txt_attn_qkv", KOHYA, ADDED),
    (flux, "lora_unet_double_blocks_0_img_attn_proj", KOHYA, (f"{DOUBLE}.to_out.0",)),
    (flux, "lora_unet_final_layer_adaLN_modulation_1", KOHYA, ("norm_out.linear",)),
    (flux, "double_blocks.0.processor.qkv_lora1", XLABS, TO_QKV),
    (flux, "double_blocks.0.processor.qkv_lora2", XLABS, ADDED),
    (flux, "double_blocks.0.processor.proj_lora2", XLABS, (f"{DOUBLE}.to_add_out",)),
    (flux, "single_blocks.0.processor.qkv_lora", XLABS, tuple(f"{SINGLE}.attn.to_{n}" for n in "qkv")),
    (chroma, "diffusion_model.double_blocks.0.img_attn.qkv", PEFT, TO_QKV),
    (sd3, "lora_unet_joint_blocks_0_x_block_attn_qkv", KOHYA, TO_QKV),
    (sd3, "diffusion_model.joint_blocks.0.context_block.attn.qkv", PEFT, ADDED),
]


@pytest.mark.parametrize(("build", "name", "ends", "modules"), LORAS, ids=[one[1] for one in LORAS])
def test_the_rows_of_a_fused_lora_are_merged_where_they_belong(
    build: Callable[[], nn.Module], name: str, ends: tuple[str, str], modules: tuple[str, ...], tmp_path: Path
) -> None:
    model = build()
    sizes = [model.get_submodule(module).weight.shape for module in modules]
    file, delta = lora(name, sum(d for d, _ in sizes), sizes[0][1], ends)
    if modules == ("norm_out.linear",):
        delta = delta.roll(len(delta) // 2, 0)
    assert_same(merged(model, saved(tmp_path, file)), rows(delta, *modules), ".weight", exact=False)


def test_the_mlp_that_follows_q_k_and_v_has_its_own_rows(tmp_path: Path) -> None:
    file, delta = lora("lora_unet_single_blocks_0_linear1", 48 + 64, 16, KOHYA)
    expected = rows(delta[:48], *(f"{SINGLE}.attn.to_{n}" for n in "qkv")) | {f"{SINGLE}.proj_mlp": delta[48:]}
    assert_same(merged(flux(), saved(tmp_path, file)), expected, ".weight", exact=False)


def test_halves_that_are_the_other_way_round_are_so_in_biases_too(tmp_path: Path) -> None:
    name, diff, diff_b = "lora_unet_final_layer_adaLN_modulation_1", random(32, 16), random(32)
    path = saved(tmp_path, {f"{name}.diff": diff, f"{name}.diff_b": diff_b})
    expected = {"norm_out.linear.weight": diff.roll(16, 0), "norm_out.linear.bias": diff_b.roll(16, 0)}
    assert_same(merged(flux(), path), expected)
    path = saved(tmp_path, {f"{name}.diff_b": diff_b})
    assert_same(merged(flux(), path), {"norm_out.linear.bias": diff_b.roll(16, 0)})


def dora(name: str, d: int, h: int) -> tuple[Tensors, Callable[[Tensor], Tensor]]:
    """A layer of a DoRA file, and what becomes of a weight."""
    file, delta = lora(name, d, h, KOHYA)
    magnitudes = random(d, 1).abs() + 0.5
    return {
        **file,
        f"{name}.dora_scale": magnitudes,
    }, lambda W: magnitudes * (W + delta) / (W + delta).norm(dim=1, keepdim=True)


def test_magnitudes_of_outputs_go_to_q_k_and_v(tmp_path: Path) -> None:
    file, becomes = dora("lora_unet_double_blocks_0_img_attn_qkv", 72, 24)
    model = flux2()
    weights = [model.get_submodule(f"{DOUBLE}.to_{n}").weight for n in "qkv"]
    expected = becomes(torch.cat([weight.detach().clone() for weight in weights]))
    merge_file(model, saved(tmp_path, file))
    torch.testing.assert_close(torch.cat([weight.detach() for weight in weights]), expected)
    file["lora_unet_double_blocks_0_img_attn_qkv.dora_scale"] = torch.ones(1, 24)
    with unchanged(model), pytest.raises(AdapterFileError, match=r"img_attn_qkv has DoRA's magnitudes for each input"):
        merge_file(model, saved(tmp_path, file))


def test_magnitudes_of_single_projections_go_into_a_fused_one_but_nothing_is_nearest_to_them(tmp_path: Path) -> None:
    made = {n: dora(f"transformer.{DOUBLE}.to_{n}", 24, 24) for n in "qkv"}
    path = saved(tmp_path, *(file for file, _ in made.values()))
    model = fused(flux2())
    weight = model.get_submodule(f"{DOUBLE}.to_qkv").weight
    expected = torch.cat([becomes(W) for (_, becomes), W in zip(made.values(), weight.detach().chunk(3), strict=True)])
    with (
        unchanged(model),
        pytest.raises(AdapterFileError, match=r"holds DoRA updates.* merges them into the weights e"),
    ):
        load_krona(model, path)
    updates = updates_in(path, {"transformer": model})
    with pytest.raises(AdapterFileError, match=r"1 layers whose updates depend on the base's weights .*to_qkv"):
        approximable(updates, path, STRICT)
    merge_file(model, path)
    torch.testing.assert_close(weight.detach(), expected)
