"""convert: files of one format as files of another, exactly or by the nearest Kronecker products, errors reported."""

import shutil
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusekrona import KronAConfig, inject_krona, krona_report, load_krona, merge_file, save_krona, unload_krona
from diffusekrona.bases.architectures import build_pipeline
from diffusekrona.bases.loading import BaseModelError
from diffusekrona.errors import AdapterFileError, FactorShapeError, KronAError
from diffusekrona.files.convert import Target, approximated, components_for, convert
from diffusekrona.files.extract import Difference, FolderWeights, extract
from diffusekrona.files.formats import foreign
from diffusekrona.files.formats.updates import Update
from diffusekrona.files.unused import Reading
from diffusekrona.kron.shapes import divisors
from diffusekrona.tuner.injected import krona_layers
from tests.pipelines import tiny_sd_pipeline, tiny_sdxl_pipeline


def adapted(build: Any = tiny_sdxl_pipeline, **fields: Any) -> Any:
    pipe = build()
    torch.manual_seed(0)
    text_encoders = "target_modules" not in fields
    inject_krona(pipe, KronAConfig(**{"a1": 4, "a2": 8, "init_b": "normal", **fields}), text_encoders=text_encoders)
    return pipe


def deltas(pipe: Any) -> dict[str, Tensor]:
    return {
        name: layer.get_delta_weight("default").detach().double() for name, layer in krona_layers(pipe.unet).items()
    }


def base_folder(pipe: Any, path: Any) -> Any:
    unload_krona(pipe)
    pipe.save_pretrained(path)
    return path


@pytest.mark.filterwarnings("ignore:Diffusers (by itself refuses factors|reads no LoKr)")
@pytest.mark.parametrize("to", ["lokr", "lokr-diffusers", "krona"])
def test_there_and_back_is_the_same_adapter_bit_for_bit(tmp_path, to):
    pipe = adapted(alpha_pattern={"to_k": 2.0}, factor_pattern={"to_v": (8, 4)})
    file, expected = save_krona(pipe, tmp_path / "a.safetensors"), deltas(pipe)
    base = base_folder(pipe, tmp_path / "base")
    there = convert(file, tmp_path / "b.safetensors", to, base)
    back = convert(tmp_path / "b.safetensors", tmp_path / "c", "krona", base)
    assert (there.layers, there.parameters) == (back.layers, back.parameters)
    assert not there.errors
    load_krona(pipe, tmp_path / "c")
    direct = load_file(save_krona(pipe, tmp_path / "d.safetensors", format=to))
    assert load_file(tmp_path / "b.safetensors").keys() == direct.keys()
    found = deltas(pipe)
    assert all(torch.equal(found[name], delta) for name, delta in expected.items())
    assert there.layers == sum(len(krona_layers(part)) for part in (pipe.unet, pipe.text_encoder, pipe.text_encoder_2))


FORMS = {
    "krona": {"alpha": 0.7},
    "several terms": {"alpha": -0.7, "num_terms": 2},
    "transposed": {"layout": "transposed"},
    "lokr": {"alpha": 0.7, "b_rank": 2},
}


@pytest.mark.parametrize("kind", ["lora", *FORMS])
def test_an_approximation_is_the_nearest_and_its_errors_are_what_they_say(tmp_path, kind):
    source = tmp_path / ("source.safetensors" if kind == "lokr" else "source")
    if kind == "lora":
        pipe = tiny_sd_pipeline()
        pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k"], init_lora_weights=False))
        pipe.unet.save_lora_adapter(source)
        expected = {
            name: (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach().double() * 2
            for name, layer in pipe.unet.named_modules()
            if hasattr(layer, "lora_A") and hasattr(layer, "base_layer")
        }
        pipe.unet.unload_lora()
    else:
        pipe = adapted(tiny_sd_pipeline, target_modules=["to_q", "to_k"], **FORMS[kind])
        expected = deltas(pipe)
        save_krona(pipe.unet, source, format="lokr" if kind == "lokr" else "krona")
        unload_krona(pipe)
    pipe.save_pretrained(tmp_path / "base")
    calls = []
    result = convert(
        source, tmp_path / "out", model=tmp_path / "base", target=Target((2, 4)),
        on_layer=lambda done, total: calls.append((done, total)),
    )  # fmt: skip
    load_krona(pipe, tmp_path / "out")
    found = deltas(pipe)
    assert found.keys() == expected.keys()
    missed = whole = 0.0
    for name, delta in expected.items():
        rearranged = delta.view(2, len(delta) // 2, 4, -1).permute(0, 2, 1, 3).reshape(8, -1)
        singular = torch.linalg.svdvals(rearranged)
        error = float((delta - found[name]).norm() / delta.norm())
        assert error == pytest.approx(float(singular[1:].norm() / singular.norm()), rel=1e-3)
        assert result.errors[f"unet.{name}"] == pytest.approx(error, rel=1e-3)
        missed, whole = missed + float((delta - found[name]).norm()) ** 2, whole + float(delta.norm()) ** 2
    assert result.total_error == pytest.approx((missed / whole) ** 0.5, rel=1e-3)
    assert result.parameters == krona_report(pipe).parameters
    assert calls == [(i + 1, len(expected)) for i in range(len(expected))]


def random(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))


CONVOLUTIONS = {
    "lora": {"lora_down.weight": random(3, 8, 3, 3), "lora_up.weight": random(12, 3, 1, 1), "alpha": torch.tensor(1.5)},
    "lora with a core": {
        "lora_down.weight": random(3, 8, 1, 1), "lora_up.weight": random(12, 3, 1, 1),
        "lora_mid.weight": random(3, 3, 3, 3), "alpha": torch.tensor(1.5),
    },
    "lokr": {
        "lokr_w1": random(2, 4), "lokr_w2_a": random(6, 1), "lokr_w2_b": random(1, 2, 3, 3), "alpha": torch.tensor(0.5)
    },
    "loha": {f"hada_w{i}_{part}": random(*size) for i in (1, 2) for part, size in (("a", (12, 2)), ("b", (2, 72)))},
    "full": {"diff": random(12, 8, 3, 3)},
}  # fmt: skip


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_the_nearest_products_to_a_convolutions_update_have_the_kernel_in_their_columns(kind):
    update = foreign.parse({f"x.{part}": tensor for part, tensor in CONVOLUTIONS[kind].items()})["x"]
    delta = update.delta().reshape(12, 72).double()
    fit = approximated({("unet", "x"): update}, Target((2, 4), num_terms=2))["unet", "x"]
    u, s, v = torch.linalg.svd(delta.view(2, 6, 4, 18).permute(0, 2, 1, 3).reshape(8, 108), full_matrices=False)
    nearest = ((u[:, :2] * s[:2]) @ v[:2]).view(2, 4, 6, 18).permute(0, 2, 1, 3).reshape(12, 72)
    found = sum(torch.kron(A, B) for A, B in zip(fit.A.double(), fit.B.double(), strict=True))
    torch.testing.assert_close(found, nearest, rtol=1e-4, atol=1e-4)
    assert fit.norm == pytest.approx(float(delta.norm()), rel=1e-5)
    assert fit.error == pytest.approx(float((delta - nearest).norm() / delta.norm()), rel=1e-4, abs=1e-6)


def test_more_terms_come_nearer_and_enough_of_them_are_exact(tmp_path):
    pipe = adapted(tiny_sd_pipeline, a1=4, a2=4, num_terms=3)
    file = save_krona(pipe, tmp_path / "a.safetensors")
    base = base_folder(pipe, tmp_path / "base")
    errors = [
        convert(file, tmp_path / f"{terms}", model=base, target=Target((4, 4), num_terms=terms)).total_error
        for terms in (1, 2, 3)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-6


@pytest.mark.parametrize("budget", [0.3, 20_000])
def test_a_budget_is_kept_and_the_factors_are_the_best_within_it(tmp_path, budget):
    pipe = adapted(tiny_sd_pipeline, a1=2, a2=2)
    report = krona_report(pipe)
    file = save_krona(pipe, tmp_path / "a.safetensors")
    base = base_folder(pipe, tmp_path / "base")
    result = convert(file, tmp_path / "b", model=base, target=Target(budget=budget))
    allowed = budget * report.parameters if budget <= 1 else budget
    assert 0.2 * allowed < result.parameters <= allowed
    load_krona(pipe, tmp_path / "b")
    assert krona_report(pipe).parameters == result.parameters
    same = convert(file, tmp_path / "c", model=base, target=Target(budget=1.0))
    assert same.total_error < 1e-6


def test_within_a_budget_a_lora_becomes_as_many_terms_as_come_nearest(tmp_path):
    """A ΔW of rank 4 is four terms of one column and one row, half of the LoRA's eight ranks."""
    pipe = tiny_sd_pipeline()
    pipe.unet.add_adapter(LoraConfig(r=8, target_modules=["to_q"], init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if "lora_A" in name:
                parameter[4:] = 0
    pipe.unet.save_lora_adapter(tmp_path / "lora")
    pipe.unet.unload_lora()
    base = base_folder(pipe, tmp_path / "base")
    best = convert(tmp_path / "lora", tmp_path / "best", model=base, target=Target(budget=0.5))
    assert best.total_error < 1e-6
    for terms in (1, 2):
        fewer = convert(
            tmp_path / "lora", tmp_path / f"{terms}", model=base, target=Target(budget=0.5, num_terms=terms)
        )
        assert fewer.total_error > 0.1


@pytest.mark.parametrize("rank", [3, None])
def test_a_budget_of_all_parameters_finds_the_same_update_in_any_number_of_terms(tmp_path, rank):
    """Three terms, which are no power of two, and two, where four are affordable."""
    if rank is None:
        pipe = adapted(tiny_sd_pipeline, num_terms=2, target_modules=["to_q"])
        file = save_krona(pipe, tmp_path / "source")
    else:
        pipe, file = tiny_sd_pipeline(), tmp_path / "source"
        pipe.unet.add_adapter(LoraConfig(r=rank, target_modules=["to_q"], init_lora_weights=False))
        pipe.unet.save_lora_adapter(file)
        pipe.unet.unload_lora()
    base = base_folder(pipe, tmp_path / "base")
    assert convert(file, tmp_path / "out", model=base, target=Target(budget=1.0)).total_error < 1e-6


def whole(*diffs: Tensor) -> dict[tuple[str, str], Update]:
    return {("unet", str(i)): foreign.parse({"x.diff": diff})["x"] for i, diff in enumerate(diffs)}


def test_what_a_small_layer_takes_beyond_its_share_is_not_spent_twice_and_the_rest_is_spent():
    exact = torch.kron(random(4, 8), random(32, 16))
    small, needed = 8 + 8, 4 * 8 + 32 * 16
    updates = whole(random(8, 8), exact)
    for budget, found in ((small + needed, True), (small + needed - 1, False)):
        fits = approximated(updates, Target(budget=budget, num_terms=1))
        assert sum(fit.A.numel() + fit.B.numel() for fit in fits.values()) <= budget
        assert (fits["unet", "1"].error < 1e-6) == found


@pytest.mark.parametrize("kind", ["full", "lora", "lokr"])
def test_the_largest_update_decides_on_the_factors_of_all_layers_of_its_size(kind):
    """The small one's update is a row ⊗ B and the large one's a column ⊗ B, with B of rank 2."""
    updates, (up, down) = {}, (random(16, 2), random(2, 128))
    for name, size, scale in (("small", (1, 8), 0.01), ("large", (8, 1), 1.0)):
        A = random(*size).sign() * scale
        left, right = (up, down) if name == "large" else (random(128, 2), random(2, 16))
        B, ones = left @ right, torch.ones(1, 1)
        tensors = {
            "full": {"diff": torch.kron(A, B)},
            "lora": {
                "lora_up.weight": torch.kron(A if name == "large" else ones, left),
                "lora_down.weight": torch.kron(ones if name == "large" else A, right),
            },
            "lokr": {"lokr_w1": A, "lokr_w2": B},
        }[kind]
        updates["unet", name] = foreign.parse({f"x.{part}": tensor for part, tensor in tensors.items()})["x"]
    fits = approximated(updates, Target(budget=2 * (8 + 16 * 128), num_terms=1))
    assert fits["unet", "large"].error < 1e-6
    assert fits["unet", "small"].error > 0.1


def test_layers_of_other_sizes_that_have_as_much_to_spend_get_factors_of_their_own():
    updates = whole(torch.kron(random(8, 1), random(2, 64)), torch.kron(random(1, 8), random(64, 2)) / 100)
    fits = approximated(updates, Target(budget=2 * (8 + 128), num_terms=1))
    assert [fit.error < 1e-6 for fit in fits.values()] == [True, True]


def test_layers_too_small_for_their_share_take_from_the_others_and_the_budget_is_kept(tmp_path):
    """Of two layers, one has a LoRA so large that the other's share is less than any factors take."""
    tensors = {
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": (128, 128),
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (128, 64),
    }
    pipe = tiny_sd_pipeline()
    file, base = tmp_path / "lora.safetensors", base_folder(pipe, tmp_path / "base")
    sides = {name: pipe.unet.get_submodule(name.removeprefix("unet.")).weight.shape for name in tensors}
    save_file(
        {
            f"{name}.lora_{part}.weight": torch.randn(size)
            for (name, (d, h)), rank in zip(sides.items(), (40, 2), strict=True)
            for part, size in (("A", (rank, h)), ("B", (d, rank)))
        },
        file,
    )
    least = sum(
        min(a1 * a2 + d // a1 * (h // a2) for a1 in divisors(d) for a2 in divisors(h)) for d, h in sides.values()
    )
    result = convert(file, tmp_path / "least", model=base, target=Target(budget=least))
    assert result.parameters == least
    result = convert(file, tmp_path / "more", model=base, target=Target(budget=least + 100))
    assert least <= result.parameters <= least + 100
    with pytest.raises(FactorShapeError, match=f"these 2 layers take {least:,}"):
        convert(file, tmp_path / "fewer", model=base, target=Target(budget=least - 1))


@pytest.mark.parametrize("to", ["krona", "lokr"])
def test_a_fine_tune_is_extracted_to_the_nearest_products_of_what_it_changed(tmp_path, to):
    pipe = tiny_sdxl_pipeline()
    base_folder(pipe, tmp_path / "base")
    torch.manual_seed(0)
    inject_krona(pipe, KronAConfig(a1=4, a2=8, init_b="normal", target_modules=["to_q", "to_v"]))
    expected = deltas(pipe)
    file = save_krona(pipe, tmp_path / "a.safetensors")
    unload_krona(pipe)
    merge_file(pipe, file)
    pipe.unet.conv_in.weight.data += 1
    pipe.save_pretrained(tmp_path / "tuned")
    result = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "b.safetensors", Target((4, 8)), to)
    assert result.layers == len(expected)
    assert result.total_error < 1e-4
    fresh = tiny_sdxl_pipeline()
    load_krona(fresh, tmp_path / "b.safetensors")
    for name, delta in deltas(fresh).items():
        torch.testing.assert_close(delta, expected[name], rtol=1e-3, atol=1e-5)


def test_only_what_is_asked_for_is_extracted_from_all_shards_within_a_share_of_its_weights(tmp_path):
    pipe = tiny_sd_pipeline()
    pipe.save_pretrained(tmp_path / "base", max_shard_size="200KB")
    sizes = {}
    for name, module in pipe.unet.named_modules():
        if isinstance(module, nn.Linear):
            module.weight.data += torch.randn_like(module.weight)
            if name.endswith("to_k"):
                sizes[f"unet.{name}"] = module.weight.numel()
    pipe.save_pretrained(tmp_path / "tuned", max_shard_size="200KB")
    target = Target(budget=0.1, num_terms=1)
    result = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", target, target_modules=r".*\.to_k")
    assert result.errors.keys() == sizes.keys()
    assert 0.5 < result.parameters / (0.1 * sum(sizes.values())) <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_what_a_fine_tune_changed_is_not_rounded_to_the_weights_dtype(tmp_path, dtype):
    unet, name = tiny_sd_pipeline().unet, "conv_in"
    weights = {folder: random(*unet.conv_in.weight.shape, i)[..., 0].to(dtype) for i, folder in enumerate("ab", 1)}
    for folder, weight in weights.items():
        (tmp_path / folder).mkdir()
        save_file({f"{name}.weight": weight}, tmp_path / folder / "model.safetensors")
    before, after = (FolderWeights(tmp_path / folder, "unet", unet) for folder in weights)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.equal(Difference(before, after, name).delta(), weights["b"].to(wide) - weights["a"].to(wide))


def test_extracting_from_models_that_are_alike_or_unlike_is_an_error(tmp_path):
    for name, build in (("sd", tiny_sd_pipeline), ("sdxl", tiny_sdxl_pipeline), ("part", tiny_sd_pipeline)):
        build().save_pretrained(tmp_path / name)
    shutil.copytree(tmp_path / "part", tmp_path / "pickle")
    (file,) = (tmp_path / "part" / "unet").glob("*.safetensors")
    tensors = load_file(file)
    missing = min(key for key in tensors if key.endswith("to_q.weight"))
    save_file({key: tensor for key, tensor in tensors.items() if key != missing}, file)
    next((tmp_path / "pickle" / "unet").glob("*.safetensors")).rename(tmp_path / "pickle" / "unet" / "model.bin")
    for other, message in (
        ("sd", "same weights in the layers"),
        ("sdxl", "different models"),
        ("part", f"has no weight for {missing.removesuffix('.weight')}"),
        ("pickle", "holds no safetensors weights"),
    ):
        with pytest.raises(BaseModelError, match=message):
            extract(tmp_path / "sd", tmp_path / other, tmp_path / "out", Target((2, 2)))
    with pytest.raises(AdapterFileError, match=r"end in \.safetensors"):
        extract(tmp_path / "sd", tmp_path / "sd", tmp_path / "out", Target((2, 2)), "lokr")
    assert not (tmp_path / "out").exists()


def test_what_an_adapter_is_for_is_found_out_among_the_known_pipelines(tmp_path):
    for name in ("sdxl", "sd15"):
        unet = build_pipeline(name)["unet"]
        layers = [n for n, _ in unet.named_modules() if n.endswith("attn2.to_k")]
        tensors = {}
        for layer in layers:
            d, h = unet.get_submodule(layer).weight.shape
            key = f"lora_unet_{layer.replace('.', '_')}"
            tensors |= {f"{key}.lokr_w1": torch.ones(4, 8), f"{key}.lokr_w2": torch.ones(d // 4, h // 8)}
        save_file(tensors, tmp_path / "lokr.safetensors")
        result = convert(tmp_path / "lokr.safetensors", tmp_path / f"{name}.safetensors")
        assert result.layers == len(layers)
    nothing = "lora_unet_down_blocks_9_nothing"
    save_file(
        {f"{nothing}.lokr_w1": torch.ones(2, 2), f"{nothing}.lokr_w2": torch.ones(2, 2)}, tmp_path / "x.safetensors"
    )
    with pytest.raises(AdapterFileError, match=r"(?s)fits none of sdxl, sd15; say what it is for.*sdxl: .*sd15: "):
        convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors")


OF_TRANSFORMERS = {
    "lora_unet_double_blocks_0_img_attn_proj": (3072, 3072, None),
    "diffusion_model.double_blocks.0.img_mod.lin": (18432, 3072, "FluxTransformer2DModel"),
    "lycoris_transformer_blocks_0_attn_to_q": (2432, 2432, "SD3Transformer2DModel"),
    "transformer.transformer_blocks.0.txt_mod.1": (18432, 3072, "QwenImageTransformer2DModel"),
    "diffusion_model.layers.0.attention.out": (3840, 3840, "ZImageTransformer2DModel"),
    "transformer.single_transformer_blocks.0.attn.to_out": (3072, 12288, "Flux2Transformer2DModel"),
}
"""A layer's name in some file, its size, and the class of the one transformer that has such; None if several do."""


@pytest.mark.parametrize("layer", OF_TRANSFORMERS)
def test_the_transformer_that_a_file_is_for_is_found_or_asked_for(tmp_path, layer):
    d, h, kind = OF_TRANSFORMERS[layer]
    file = tmp_path / "lokr.safetensors"
    save_file({f"{layer}.lokr_w1": torch.ones(4, 8), f"{layer}.lokr_w2": torch.ones(d // 4, h // 8)}, file)
    if kind is None:
        with pytest.raises(AdapterFileError, match=r"fits flux1, .*chroma.* alike; say which it is for"):
            convert(file, tmp_path / "out.safetensors")
        assert convert(file, tmp_path / "out.safetensors", model="flux1").layers == 1
    else:
        assert type(components_for(file, None)["transformer"]).__name__ == kind
        assert convert(file, tmp_path / "out.safetensors").layers == 1


@pytest.mark.parametrize("width", [5120, 1536])
def test_models_of_one_family_are_told_by_their_sizes(tmp_path, width):
    layer, file = "diffusion_model.blocks.0.self_attn.q", tmp_path / "lokr.safetensors"
    save_file({f"{layer}.lokr_w1": torch.ones(4, 8), f"{layer}.lokr_w2": torch.ones(width // 4, width // 8)}, file)
    config = components_for(file, None)["transformer"].config
    assert config.num_attention_heads * config.attention_head_dim == width


BLOCK = "attentions.0.transformer_blocks.0"


@pytest.mark.parametrize(
    ("layer", "sizes"),
    [
        (f"down_blocks.1.{BLOCK}.attn2.to_k", {"sdxl": (640, 2048), "sd15": (640, 768)}),
        ("up_blocks.1.resnets.0.time_emb_proj", {"sdxl": (640, 1280), "sd15": (1280, 1280)}),
        (f"mid_block.{BLOCK}.attn1.to_k", {"sdxl": (1280, 1280), "sd15": (1280, 1280)}),
    ],
    ids=["inputs", "outputs", "neither"],
)
def test_models_with_layers_of_one_name_are_told_by_their_sizes_or_by_the_caller(tmp_path, layer, sizes):
    for name, (d, h) in sizes.items():
        file = tmp_path / f"{name}.safetensors"
        save_file(
            {f"unet.{layer}.lokr_w1": torch.ones(4, 8), f"unet.{layer}.lokr_w2": torch.ones(d // 4, h // 8)}, file
        )
        found = {given: components_for(file, given)["unet"].config.cross_attention_dim for given in (None, name)}
        width = {"sdxl": 2048, "sd15": 768}[name]
        assert found[name] == width
        assert found[None] == (2048 if sizes["sdxl"] == sizes["sd15"] else width)


@pytest.mark.parametrize(
    ("target", "message"), [(None, "DoRA updates"), (Target((2, 2)), "on the base's weights .DoRA's")]
)
def test_an_update_under_dora_is_refused_as_such(tmp_path, target, message):
    layer, file = f"unet.mid_block.{BLOCK}.attn1.to_q", tmp_path / "dora.safetensors"
    parts = {"lora_A.weight": (2, 1280), "lora_B.weight": (1280, 2), "lora_magnitude_vector": (1280,)}
    save_file({f"{layer}.{part}": torch.ones(size) for part, size in parts.items()}, file)
    with pytest.raises(AdapterFileError, match=message):
        convert(file, tmp_path / "out", target=target)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_done_is_an_error_and_writes_nothing(tmp_path):
    pipe = adapted(tiny_sd_pipeline, num_terms=2)
    file = save_krona(pipe, tmp_path / "a.safetensors")
    base = base_folder(pipe, tmp_path / "base")
    before = sorted(tmp_path.iterdir())
    for call, error, message in (
        (lambda: convert(file, tmp_path / "b.safetensors", "lokr", base), AdapterFileError, "sums of several products"),
        (lambda: convert(file, tmp_path / "b", "lokr", base), AdapterFileError, r"end in \.safetensors"),
        (lambda: convert(file, tmp_path / "b", "dora", base), AdapterFileError, "no format 'dora'"),
        (lambda: convert(file, tmp_path / "b", model=base, target=Target((5, 7))), FactorShapeError, "a1=5"),
        (
            lambda: convert(file, tmp_path / "b", model=base, target=Target(budget=1e-6)),
            FactorShapeError,
            "is too small: with the smallest factors",
        ),
        (lambda: Target(), KronAError, "either factors"),
        (lambda: Target((2, 2), 0.5), KronAError, "either factors"),
        (lambda: Target(budget=-1), KronAError, "above 0"),
        (lambda: Target((2, 2), num_terms=0), KronAError, "at least 1, not 0"),
    ):
        with pytest.raises(error, match=message):
            call()
    assert sorted(tmp_path.iterdir()) == before


def test_several_terms_compressed_to_one_can_be_written_as_lokr(tmp_path):
    pipe = adapted(tiny_sd_pipeline, num_terms=2)
    file = save_krona(pipe, tmp_path / "a.safetensors")
    base = base_folder(pipe, tmp_path / "base")
    result = convert(file, tmp_path / "b.safetensors", "lokr", base, Target((4, 8)))
    assert 0 < result.total_error < 1
    assert any(key.endswith("lokr_w1") for key in load_file(tmp_path / "b.safetensors"))


def test_a_file_with_more_than_an_adapter_goes_to_the_pipeline_that_uses_most_of_it(tmp_path):
    """The text encoder of SD 1.5 is the first of SDXL, too, which is tried first."""
    layers = {
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (768, 768),
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": (320, 320),
    }
    tensors = {}
    for name, (d, h) in layers.items():
        tensors |= {f"{name}.lokr_w1": torch.ones(4, 4), f"{name}.lokr_w2": torch.ones(d // 4, h // 4)}
    save_file(tensors | {"bundle_emb.dog": torch.ones(1, 768)}, tmp_path / "dog.safetensors")
    with pytest.warns(UserWarning, match="embeddings of new words"):
        result = convert(tmp_path / "dog.safetensors", tmp_path / "out.safetensors", reading=Reading("warn"))
    assert result.layers == 2
