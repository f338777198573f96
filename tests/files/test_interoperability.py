"""Other programs' files through whole pipelines: written by us and read by them, written by them and read by us."""

import json
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from lycoris import LycorisNetwork, create_lycoris, create_lycoris_from_weights
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusekrona import KronAConfig, inject_krona, load_krona, merge_file, merge_krona, save_krona, unmerge_krona
from diffusekrona.bases.architectures import build_pipeline
from diffusekrona.errors import AdapterFileError, MergeError
from diffusekrona.files.formats.krona import SavedAdapter
from diffusekrona.files.write import foreign_bytes
from diffusekrona.storage import data_hash
from diffusekrona.tuner.injected import krona_layers
from tests.pipelines import tiny_sd_pipeline, tiny_sdxl_pipeline
from tests.snapshots import unchanged

pytestmark = pytest.mark.filterwarnings("ignore:Diffusers (by itself refuses factors|reads no LoKr of text)")

FORMATS = pytest.mark.parametrize("format", ["lokr", "lokr-diffusers"])
PIPELINES = pytest.mark.parametrize("build", [tiny_sd_pipeline, tiny_sdxl_pipeline])
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def config(**fields: Any) -> KronAConfig:
    return KronAConfig(**{"a1": 4, "a2": 8, "init_b": "normal", "alpha": 0.7, **fields})


def deltas(pipe: Any) -> dict[str, Tensor]:
    """Every layer's dense update, by component and name."""
    parts = {part: module for part, module in pipe.components.items() if isinstance(module, nn.Module)}
    return {
        f"{part}.{name}": layer.get_delta_weight("default").detach()
        for part, module in parts.items()
        for name, layer in krona_layers(module).items()
    }


def weights(unet: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in unet.state_dict().items()}


# Ours, written as LoKr


@FORMATS
@PIPELINES
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"factor_pattern": {"to_k": (2, 4), r"attentions\.0\..*to_v": (8, 8)}, "alpha_pattern": {"to_q": 3.0}},
        {"b_rank": 1},
        {"target_modules": ["to_q", "conv1", "conv_shortcut", "ff.net.2"], "a1": 2, "a2": 2},
    ],
    ids=["plain", "patterns", "b_rank", "convolutions"],
)
def test_what_is_written_as_lokr_is_read_back_as_the_same_update_bit_for_bit(tmp_path, format, build, fields):
    pipe, other = build(), build()
    text_encoders = "target_modules" not in fields
    inject_krona(pipe, config(**fields), text_encoders=text_encoders)
    file = save_krona(pipe, tmp_path / "adapter.safetensors", format=format)
    load_krona(other, file)
    expected, found = deltas(pipe), deltas(other)
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert torch.equal(found[name], delta), name
    first, again = (save_krona(p, tmp_path / f"{i}.safetensors", format=format) for i, p in enumerate((other, pipe)))
    if "b_rank" not in fields:
        assert all(torch.equal(t, load_file(again)[key]) for key, t in load_file(first).items())


@FORMATS
def test_comfyuis_rule_kron_of_both_factors_is_our_update(tmp_path, format):
    """ComfyUI multiplies lokr_w1 and lokr_w2 in fp32 whatever their shapes, and ignores alpha."""
    pipe = tiny_sdxl_pipeline()
    inject_krona(pipe, config())
    tensors = load_file(save_krona(pipe, tmp_path / "adapter.safetensors", format=format))
    layers = {key.removesuffix(".lokr_w1") for key in tensors if key.endswith(".lokr_w1")}
    assert len(layers) == len(krona_layers(pipe.unet)) > 0
    found = {torch.kron(tensors[f"{n}.lokr_w1"], tensors[f"{n}.lokr_w2"]).double().sum().item() for n in layers}
    assert found == {delta.double().sum().item() for delta in deltas(pipe).values()}


def test_names_are_those_that_sdxl_and_sd_programs_look_for(tmp_path):
    for build, expected in (
        (tiny_sdxl_pipeline, ("lora_unet_input_blocks_", "lora_te1_text_model_encoder_layers_0_self_attn_q_proj")),
        (tiny_sd_pipeline, ("lora_unet_down_blocks_", "lora_te_text_model_encoder_layers_0_self_attn_q_proj")),
    ):
        pipe = build()
        inject_krona(pipe, config(), text_encoders=True)
        keys = load_file(save_krona(pipe, tmp_path / "adapter.safetensors", format="lokr"))
        assert all(any(key.startswith(name) for key in keys) for name in expected)
        keys = load_file(save_krona(pipe, tmp_path / "adapter.safetensors", format="lokr-diffusers"))
        assert {key.partition(".")[0] for key in keys} >= {"unet", "text_encoder"}


def test_lycoris_merges_our_file_to_the_same_weights(tmp_path):
    """It names the layers of a module it wraps `lycoris_` and then as kohya does. Its loader wants a square w1."""
    unet = tiny_sd_pipeline().unet
    inject_krona(unet, config(a1=4, a2=4, alpha=0.5))
    tensors = load_file(save_krona(unet, tmp_path / "adapter.safetensors", format="lokr"))
    file = tmp_path / "renamed.safetensors"
    save_file({key.replace("lora_unet_", "lycoris_"): tensor for key, tensor in tensors.items()}, file)
    theirs = tiny_sd_pipeline().unet
    LycorisNetwork.apply_preset({"enable_conv": False, "target_name": [r".*\.to_(q|k|v|out\.0)"]})
    network, _ = create_lycoris_from_weights(1.0, str(file), theirs)
    assert len(network.loras) == len(krona_layers(unet))
    network.merge_to(1.0)
    merge_krona(unet)
    for name, layer in krona_layers(unet).items():
        torch.testing.assert_close(
            theirs.get_submodule(name).weight, layer.get_base_layer().weight, rtol=1e-6, atol=1e-7, msg=name
        )


@pytest.mark.parametrize(("b_rank", "dim", "alpha"), [(None, "Dynamic", "1"), (2, "2", "2")])
def test_a_lokr_file_has_the_headers_that_other_programs_show(tmp_path, b_rank, dim, alpha):
    pipe = tiny_sdxl_pipeline()
    inject_krona(pipe, config(b_rank=b_rank))
    pipe.unet.register_to_config(_name_or_path="painter/base")
    said = {"ss_steps": "70", "modelspec.prediction_type": "v_prediction"}
    file = save_krona(pipe, tmp_path / "a.safetensors", format="lokr", metadata=said)
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    assert header["ss_network_module"] == "lycoris.kohya"
    arguments = {"algo": "lokr", "full_matrix": str(b_rank is None), "a1": "4", "a2": "8"}
    assert json.loads(header["ss_network_args"]) == arguments
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == (dim, alpha)
    assert header["ss_sd_model_name"] == "painter/base"
    assert header.items() >= said.items(), "what the caller says wins"
    assert header["modelspec.sai_model_spec"] == "1.0.0"
    assert "modelspec.architecture" not in header, "a tiny model is none that is known"
    assert header["sshs_model_hash"] == data_hash(load_file(file))
    before = file.read_bytes()
    assert save_krona(pipe, file, format="lokr", metadata=said).read_bytes() == before


def test_a_header_names_the_architecture_and_the_base_where_they_are_known(tmp_path):
    tiny_flux = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    for model, architecture, base in (
        (build_pipeline("sdxl")["unet"], "stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0"),
        (build_pipeline("sd15")["unet"], "stable-diffusion-v1/lora", "sd_v1"),
        (tiny_flux, "flux-1-dev/lora", "flux1"),
    ):
        adapter = config(base_model_name_or_path="painter/base", target_modules=["to_q"])
        saved = {"unet": SavedAdapter(adapter, {}, tmp_path)}
        layers = [name for name, _ in model.named_modules() if name.endswith("to_q")]
        for name in layers:
            d, h = model.get_submodule(name).weight.shape
            saved["unet"].tensors[f"{name}.krona_A"] = torch.ones(4, 8)
            saved["unet"].tensors[f"{name}.krona_B"] = torch.ones(d // 4, h // 8)
        file = tmp_path / "lokr.safetensors"
        file.write_bytes(foreign_bytes(saved, {"unet": model}, "lokr"))
        with safe_open(file, "pt") as opened:
            header = opened.metadata()
        assert header["modelspec.architecture"] == architecture
        assert header["ss_base_model_version"] == base
        assert header["ss_sd_model_name"] == "painter/base"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_terms": 2}, "sums of several products"),
        ({"layout": "transposed"}, "order of the paper authors"),
        ({"modules_to_save": ["conv_in"]}, r"whole modules \(conv_in\)"),
    ],
)
@FORMATS
def test_what_lokr_cannot_say_is_refused_and_nothing_is_written(tmp_path, fields, message, format):
    pipe = tiny_sd_pipeline()
    inject_krona(pipe, config(**fields))
    with pytest.raises(AdapterFileError, match=message):
        save_krona(pipe, tmp_path / "adapter.safetensors", format=format)
    assert not list(tmp_path.iterdir())


def test_an_unknown_format_and_a_folder_for_lokr_are_refused(tmp_path):
    pipe = tiny_sd_pipeline()
    inject_krona(pipe, config())
    with pytest.raises(AdapterFileError, match="no format 'dora'; there are: krona, lokr, lokr-diffusers"):
        save_krona(pipe, tmp_path / "a.safetensors", format="dora")
    with pytest.raises(AdapterFileError, match=r"end in \.safetensors"):
        save_krona(pipe, tmp_path / "a", format="lokr")


# Theirs, loaded and merged


def peft_unet(peft_config: Any) -> UNet2DConditionModel:
    """A UNet with PEFT's adapter in it, its factors random."""
    unet = tiny_sd_pipeline().unet
    inject_adapter_in_model(peft_config, unet)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "default" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return unet


def output(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    width = unet.config.cross_attention_dim
    with torch.no_grad():
        return unet(
            torch.randn(2, 4, 8, 8, generator=generator), 7, torch.randn(2, 5, width, generator=generator)
        ).sample


@pytest.mark.parametrize(
    "settings", [{"r": 100_000, "decompose_factor": 4}, {"r": 2}, {"r": 2, "decompose_both": True}]
)
def test_pefts_lokr_folder_becomes_an_adapter_with_the_same_outputs(tmp_path, settings):
    lokr = LoKrConfig(alpha=settings["r"] * 2, target_modules=TARGETS, **settings)
    model = get_peft_model(tiny_sd_pipeline().unet, lokr)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lokr" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(tmp_path / "lokr")
    pipe = tiny_sd_pipeline()
    base = output(pipe.unet)
    load_krona(pipe, tmp_path / "lokr")
    expected = output(model.get_base_model())
    assert not torch.allclose(base, expected, atol=1e-3)
    torch.testing.assert_close(output(pipe.unet), expected, rtol=1e-4, atol=1e-5)
    merged = tiny_sd_pipeline()
    assert merge_file(merged, tmp_path / "lokr") == len(krona_layers(pipe.unet))
    torch.testing.assert_close(output(merged.unet), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("algo", ["lokr", "loha", "locon", "full"])
@pytest.mark.parametrize(
    "settings", [{}, {"use_tucker": True}, {"dora_wd": True}, {"factor": 4}, {"full_matrix": True}]
)
def test_a_file_of_lycoris_is_merged_as_lycoris_merges_it(tmp_path, algo, settings):
    if settings and (algo == "full" or (algo != "lokr" and not {"factor", "full_matrix"}.isdisjoint(settings))):
        pytest.skip("no such setting for this algorithm")
    LycorisNetwork.apply_preset({"enable_conv": True, "target_module": ["Transformer2DModel", "ResnetBlock2D"]})
    torch.manual_seed(0)
    unet = tiny_sd_pipeline().unet
    extra = {} if algo == "full" else {"conv_dim": 2, "conv_alpha": 1.0}
    network = create_lycoris(unet, 1.0, linear_dim=2, linear_alpha=1.0, algo=algo, **extra, **settings)
    network.apply_to()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "dora" not in name and not name.endswith("bias"):
                parameter.add_(torch.randn(parameter.shape) * 0.05)
    tensors = {key.replace("lycoris_", "lora_unet_", 1): t for key, t in network.state_dict().items()}
    file = tmp_path / "lycoris.safetensors"
    save_file({key: t.contiguous() for key, t in tensors.items() if not key.endswith("diff_b")}, file)
    ours, base = tiny_sd_pipeline(), output(tiny_sd_pipeline().unet)
    assert merge_file(ours, file) > 10
    # Its own merge differs from its forward pass where alpha is not the rank: it applies the scale twice.
    expected = output(unet)
    assert (expected - base).abs().max() > 1e-3
    torch.testing.assert_close(output(ours.unet), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"use_dora": True}, {"alpha_pattern": {"to_q": 5}}])
def test_a_lora_of_diffusers_is_merged_as_diffusers_fuses_it(tmp_path, fields):
    lora = LoraConfig(r=4, lora_alpha=2, target_modules=[*TARGETS, "conv1"], **fields)
    unet = peft_unet(lora)
    unet._hf_peft_config_loaded = True
    unet.save_lora_adapter(tmp_path)
    expected = output(unet)
    pipe = tiny_sd_pipeline()
    merge_file(pipe, tmp_path)
    torch.testing.assert_close(output(pipe.unet), expected, rtol=1e-4, atol=1e-4)
    half, base = tiny_sd_pipeline(), weights(tiny_sd_pipeline().unet)
    merge_file(half, tmp_path, weight=0.5)
    for name, tensor in weights(half.unet).items():
        middle = (base[name] + weights(pipe.unet)[name]) / 2
        torch.testing.assert_close(tensor, middle, rtol=1e-4, atol=1e-6, msg=name)


def test_a_loha_of_peft_is_merged_and_refused_as_an_adapter(tmp_path):
    unet = peft_unet(LoHaConfig(r=2, alpha=3, target_modules=TARGETS))
    tensors = get_peft_model_state_dict(unet, adapter_name="default")
    (tmp_path / "loha").mkdir()
    LoHaConfig(r=2, alpha=3, target_modules=TARGETS).save_pretrained(tmp_path / "loha")
    save_file({f"base_model.model.{k}": t for k, t in tensors.items()}, tmp_path / "loha" / "adapter_model.safetensors")
    pipe = tiny_sd_pipeline()
    with unchanged(pipe), pytest.raises(AdapterFileError, match=r"LoHa updates.*merge_file"):
        load_krona(pipe, tmp_path / "loha")
    merge_file(pipe, tmp_path / "loha")
    torch.testing.assert_close(output(pipe.unet), output(unet), rtol=1e-4, atol=1e-5)


def reference_forward(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """What the authors' layer computes of three-dimensional inputs, with `down` a2 × a1 and `up` b1 × b2."""
    (a2, a1), (b1, b2) = down.shape, up.shape
    return torch.einsum("ntjl,ji,kl->ntki", x.unflatten(-1, (a2, b2)), down, up).reshape(*x.shape[:-1], b1 * a1)


@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_a_checkpoint_of_the_papers_authors_computes_their_function(tmp_path, prefix):
    pipe, tensors, factors = tiny_sd_pipeline(), {}, {}
    for name, module in pipe.unet.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(tuple(TARGETS)):
            down, up = torch.randn(8, 4) * 0.1, torch.randn(module.out_features // 4, module.in_features // 8) * 0.1
            parent, _, projection = name.removesuffix(".0").rpartition(".")
            tensors |= {
                f"{prefix}{parent}.processor.{projection}_lora.down.weight": down,
                f"{prefix}{parent}.processor.{projection}_lora.up.weight": up,
            }
            factors[name] = (down, up)
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    load_krona(pipe, tmp_path)
    layers = krona_layers(pipe.unet)
    assert layers.keys() == factors.keys()
    for name, layer in layers.items():
        x = torch.randn(2, 3, layer.in_features)
        expected = layer.base_layer(x) + reference_forward(x, *factors[name])
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    computed, before = output(pipe.unet), weights(tiny_sd_pipeline().unet)
    merge_krona(pipe)
    torch.testing.assert_close(output(pipe.unet), computed, rtol=1e-4, atol=1e-5)
    unmerge_krona(pipe)
    assert all(torch.equal(layer.base_layer.weight, before[f"{name}.weight"]) for name, layer in layers.items())
    ours = save_krona(pipe, tmp_path / "ours.safetensors")
    again, folded = tiny_sd_pipeline(), tiny_sd_pipeline()
    load_krona(again, ours)
    assert torch.equal(output(again.unet), computed)
    merge_file(folded, ours)
    torch.testing.assert_close(output(folded.unet), computed, rtol=1e-4, atol=1e-5)


# merge_file


@pytest.mark.parametrize("form", [{}, {"num_terms": 2}, {"b_rank": 1}])
def test_our_own_file_is_merged_to_the_bits_of_merge_krona(tmp_path, form):
    pipe, folded = tiny_sdxl_pipeline(), tiny_sdxl_pipeline()
    inject_krona(pipe, config(**form), text_encoders=True)
    saved = save_krona(pipe, tmp_path / "adapter")
    merge_krona(pipe)
    merge_file(folded, saved)
    for part in ("unet", "text_encoder", "text_encoder_2"):
        for name, layer in krona_layers(getattr(pipe, part)).items():
            merged = getattr(folded, part).get_submodule(name).weight
            torch.testing.assert_close(merged, layer.get_base_layer().weight, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_merged_weight_is_the_sum_in_fp32_or_its_own_wider_dtype_rounded_once(tmp_path, dtype):
    pipe, merged = tiny_sd_pipeline(), tiny_sd_pipeline()
    inject_krona(pipe, config())
    saved, expected = save_krona(pipe, tmp_path / "adapter.safetensors"), deltas(pipe)
    merged.unet.to(dtype)
    for parameter in merged.unet.parameters():
        parameter.data += torch.rand_like(parameter) * 1e-10
    before, wide = weights(merged.unet), torch.float64 if dtype == torch.float64 else torch.float32
    assert merge_file(merged, saved, 0.3) == len(expected)
    for name, delta in expected.items():
        key = f"{name.removeprefix('unet.')}.weight"
        total = (before[key].to(wide) + 0.3 * delta.to(wide)).to(dtype)
        assert torch.equal(merged.unet.state_dict()[key], total), name


def test_a_model_that_has_adapters_which_are_not_merged_is_merged_into_below_them(tmp_path):
    pipe, plain = tiny_sd_pipeline(), tiny_sd_pipeline()
    inject_krona(pipe, config())
    file = save_krona(pipe, tmp_path / "adapter.safetensors")
    assert merge_file(pipe, file) == merge_file(plain, file) > 0
    for name, layer in krona_layers(pipe.unet).items():
        assert torch.equal(layer.get_base_layer().weight, plain.unet.get_submodule(name).weight), name


def test_quantized_weights_and_modules_without_any_are_not_merged_into(tmp_path):
    pipe, name = tiny_sd_pipeline(), "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file({f"unet.{name}.diff": torch.ones(128, 128)}, tmp_path / "a.safetensors")
    save_file({"unet.mid_block.attentions.0.diff": torch.ones(128, 128)}, tmp_path / "b.safetensors")
    layer = pipe.unet.get_submodule(name)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    for file, error, message in (
        ("a", MergeError, "keeps its weight as torch.float8_e4m3fn"), ("b", AdapterFileError, "mid_block.attentions.0")
    ):  # fmt: skip
        with unchanged(pipe), pytest.raises(error, match=message):
            merge_file(pipe, tmp_path / f"{file}.safetensors")


def test_a_file_for_another_model_or_with_bad_numbers_changes_nothing(tmp_path):
    other = tiny_sdxl_pipeline()
    inject_krona(other, config())
    file = save_krona(other, tmp_path / "other.safetensors", format="lokr")
    pipe = tiny_sd_pipeline()
    for call in (load_krona, merge_file):
        with unchanged(pipe), pytest.raises(AdapterFileError):
            call(pipe, file)
    tensors = load_file(file)
    *_, key = (key for key in tensors if key.endswith("lokr_w2"))
    for bad, error, message in (
        (tensors[key] * torch.nan, AdapterFileError, "infinity or a NaN"),
        (tensors[key].sign() * 1e38, MergeError, "Nothing was merged"),
        (tensors[key][:-1], AdapterFileError, "made for a weight of"),
    ):
        save_file({**tensors, key: bad.contiguous()}, tmp_path / "bad.safetensors")
        with unchanged(other), pytest.raises(error, match=message):
            merge_file(other, tmp_path / "bad.safetensors", weight=1e4)


def test_weights_that_hold_merged_adapters_are_not_merged_into(tmp_path):
    pipe = tiny_sd_pipeline()
    inject_krona(pipe, config())
    file = save_krona(pipe, tmp_path / "adapter.safetensors")
    merge_krona(pipe)
    with unchanged(pipe), pytest.raises(MergeError, match="unmerge them first"):
        merge_file(pipe, file)
