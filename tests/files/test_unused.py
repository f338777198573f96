"""What of a file cannot be used: an error that names it and changes nothing, or a warning and exactly the rest."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from diffusekrona import KronAConfig, inject_krona, load_krona, merge_file, save_krona
from diffusekrona.cli import app
from diffusekrona.errors import AdapterFileError, ConfigError
from diffusekrona.files.unused import Reading, few
from diffusekrona.tuner.injected import krona_layers
from tests.modules import WIDTH, network
from tests.pipelines import tiny_sd_pipeline
from tests.snapshots import bits, unchanged

Tensors = dict[str, Tensor]
WAY_OUT = r"layers can be used without them: on_unused='warn' does \(--on-unused warn on the command line\)"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def lokr(name: str, width: int = WIDTH, **more: Tensor) -> Tensors:
    factors = {"lokr_w1": random(4, 4), "lokr_w2": random(width // 4, width // 4, seed=len(name)), **more}
    return {f"{name}.{part}": tensor for part, tensor in factors.items()}


def lora(name: str, **more: Tensor) -> Tensors:
    factors = {"lora_A.weight": random(2, WIDTH), "lora_B.weight": random(WIDTH, 2), **more}
    return {f"{name}.{part}": tensor for part, tensor in factors.items()}


GOOD = {**lokr("blocks.0.to_q"), **lokr("blocks.1.to_q")}
OUT = "blocks.0.to_out.0"
NOT_HERE = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"

NOWHERE: dict[str, tuple[Tensors, str]] = {
    "unknown tensors": (
        {f"{OUT}.strange_{n}": torch.ones(2) for n in "ab"},
        rf"of a kind that cannot be read here, 2 of 6: {OUT}\.strange_a, {OUT}\.strange_b\. Known are LoKr",
    ),
    "embeddings": (
        {"bundle_emb.dog.string_to_param.*": torch.ones(1, 4), "emb_params": torch.ones(1, 4)},
        r"embeddings of new words beside its layers, 2 of 6 tensors: bundle_emb\.dog.*load_textual_inversion",
    ),
    "a text encoder": (
        lokr(NOT_HERE),
        rf"1 of 3 layers match nothing here, for example {NOT_HERE}\. They look made for a pipeline with a text "
        r"encoder\. Here there is a model \(Network\)",
    ),
}
"""What neither an adapter nor a merge has a use for → the tensors, and what is said of them."""

MERGED = r"merge_file\(pipe, path\) merges them into the weights exactly"
NEAREST = rf"{MERGED}; `diffusekrona convert --budget` finds the nearest"
NO_ADAPTER: dict[str, tuple[Tensors, str]] = {
    "LoRA": (lora(OUT), rf"holds LoRA updates, which are no Kronecker .*1 of 3 layers: {OUT}\)\. {NEAREST}"),
    "DoRA": (
        lora(OUT, dora_scale=torch.ones(WIDTH, 1)),
        rf"holds DoRA updates, which depend on the base's weights \(1 of 3 layers: {OUT}\)\. {MERGED}\.",
    ),
    "LoKr under DoRA": (
        lokr(OUT, dora_scale=torch.ones(1, WIDTH)),
        rf"holds DoRA updates, which depend on the base's weights \(1 of 3 layers: {OUT}\)\. {MERGED}\.",
    ),
    "whole updates": ({f"{OUT}.diff": random(WIDTH, WIDTH)}, rf"holds whole updates, which .*{OUT}\)\. {NEAREST}"),
    "a norm": (
        {"norm.w_norm": random(WIDTH), "norm.b_norm": random(WIDTH)},
        rf"changes norms, which no adapter of ours does \(1 of 3 layers: norm\)\. {MERGED}\.",
    ),
    "a bias": (
        {f"{OUT}.diff_b": random(WIDTH)},
        rf"changes biases, which no adapter of ours does \(1 of 3 layers: {OUT}\)\. {MERGED}\.",
    ),
    "what multiplies": (
        {f"{OUT}.oft_R.weight": random(6, 6) * 0.1},
        rf"holds oft updates, which multiply the base's weights \(1 of 3 layers: {OUT}\)\. {MERGED}\.",
    ),
}
"""What a merge has a use for, and an adapter of ours has not."""


def saved(folder: Path, tensors: Tensors) -> Path:
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / "dog.safetensors")
    return folder / "dog.safetensors"


def deltas(model: nn.Module) -> Tensors:
    return {name: layer.get_delta_weight("default").detach() for name, layer in krona_layers(model).items()}


EXPECTED = {
    name: torch.kron(GOOD[f"{name}.lokr_w1"], GOOD[f"{name}.lokr_w2"]) for name in ("blocks.0.to_q", "blocks.1.to_q")
}


def assert_rest_is_loaded(model: nn.Module) -> None:
    found = deltas(model)
    assert found.keys() == EXPECTED.keys()
    assert all(torch.equal(found[name], delta) for name, delta in EXPECTED.items())


# Files of other programs


@pytest.mark.parametrize(("extra", "text"), (NOWHERE | NO_ADAPTER).values(), ids=NOWHERE | NO_ADAPTER)
def test_load_krona_names_what_it_cannot_use_and_takes_the_rest_if_asked(
    extra: Tensors, text: str, tmp_path: Path
) -> None:
    path, model = saved(tmp_path, GOOD | extra), network()
    with unchanged(model), pytest.raises(AdapterFileError, match=rf"dog\.safetensors.*{text}.* 2 {WAY_OUT}"):
        load_krona(model, path)
    with pytest.warns(UserWarning, match=rf"{text}.* The other 2 layers are used\.$"):
        load_krona(model, path, on_unused="warn")
    assert_rest_is_loaded(model)


@pytest.mark.parametrize(("extra", "text"), NOWHERE.values(), ids=NOWHERE)
def test_merge_file_names_what_it_cannot_use_and_takes_the_rest_if_asked(
    extra: Tensors, text: str, tmp_path: Path
) -> None:
    model, expected = network(), network()
    merge_file(expected, saved(tmp_path, GOOD))
    path = saved(tmp_path, GOOD | extra)
    with unchanged(model), pytest.raises(AdapterFileError, match=rf"{text}.* 2 {WAY_OUT}"):
        merge_file(model, path)
    with pytest.warns(UserWarning, match=rf"{text}.* The other 2 layers are used\.$"):
        assert merge_file(model, path, on_unused="warn") == 2
    assert bits(model) == bits(expected)


@pytest.mark.parametrize("extra", [extra for extra, _ in NO_ADAPTER.values()], ids=NO_ADAPTER)
def test_what_is_no_adapter_merges_without_a_word(
    extra: Tensors, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    if any("oft_R" in key for key in extra):
        extra = extra | {f"{OUT}.oft_R.weight": torch.zeros(6, 6)}
    assert merge_file(network(), saved(tmp_path, GOOD | extra)) == 3
    assert not [one for one in recwarn if "dog.safetensors" in str(one.message)]


def test_the_weight_of_a_layer_is_loaded_where_its_bias_is_not(tmp_path: Path) -> None:
    path, model = saved(tmp_path, GOOD | {"blocks.0.to_q.diff_b": random(WIDTH)}), network()
    with unchanged(model), pytest.raises(AdapterFileError, match=r"changes biases, .*1 of 2 layers: blocks\.0\.to_q\)"):
        load_krona(model, path)
    with pytest.warns(UserWarning, match="changes biases"):
        load_krona(model, path, on_unused="warn")
    assert_rest_is_loaded(model)


def test_all_that_cannot_be_used_is_in_one_error(tmp_path: Path) -> None:
    every = NOWHERE | NO_ADAPTER
    several = ("unknown tensors", "a text encoder", "LoRA", "a norm")
    path = saved(tmp_path, GOOD | {key: tensor for name in several for key, tensor in every[name][0].items()})
    with pytest.raises(AdapterFileError) as error:
        load_krona(network(), path)
    for text in ("of a kind that cannot be read", "match nothing here", "LoRA updates", "changes norms", "other 2 lay"):
        assert text in str(error.value)


@pytest.mark.parametrize("on_unused", ["error", "warn"])
@pytest.mark.parametrize("use", [load_krona, merge_file])
@pytest.mark.parametrize("extra", [extra for extra, _ in NOWHERE.values()], ids=NOWHERE)
def test_where_nothing_is_left_to_use_there_is_an_error_in_any_case(
    use: Callable[..., Any], extra: Tensors, on_unused: str, tmp_path: Path
) -> None:
    path, model = saved(tmp_path, extra), network()
    with unchanged(model), pytest.raises(AdapterFileError, match=r"dog\.safetensors") as error:
        use(model, path, on_unused=on_unused)
    assert "on_unused" not in str(error.value)


@pytest.mark.parametrize("extra", [extra for extra, _ in NO_ADAPTER.values()], ids=NO_ADAPTER)
def test_a_file_without_any_product_is_no_adapter(extra: Tensors, tmp_path: Path) -> None:
    path, model = saved(tmp_path, extra), network()
    with unchanged(model), pytest.raises(AdapterFileError, match=MERGED) as error:
        load_krona(model, path, on_unused="warn")
    assert "on_unused" not in str(error.value)


@pytest.mark.parametrize("use", [load_krona, merge_file])
@pytest.mark.parametrize(
    ("name", "choices"), [("on_unused", "'error' or 'warn'"), ("alpha_of_whole", "'ignored' or 'applied'")]
)
def test_there_are_no_other_choices(use: Callable[..., Any], name: str, choices: str, tmp_path: Path) -> None:
    path, model = saved(tmp_path, GOOD), network()
    with unchanged(model), pytest.raises(ConfigError, match=f"{name} must be {choices}, not 'ignore'"):
        use(model, path, **{name: "ignore"})
    with pytest.raises(ConfigError, match=name):
        Reading(**{name: None})


def test_a_few_names_are_shown() -> None:
    assert few(["a", "b", "c"]) == "a, b, c"
    assert few({"a": 1, "b": 2, "c": 3, "d": 4}) == "a, b, c, …"


# Our own files


@pytest.fixture
def trained() -> Any:
    pipe = tiny_sd_pipeline()
    inject_krona(pipe, KronAConfig(a1=4, a2=8, init_b="normal", target_modules=["to_q", "q_proj"]), text_encoders=True)
    return pipe


@pytest.mark.parametrize("form", ["dog", "dog.safetensors"])
@pytest.mark.parametrize("use", [load_krona, merge_file])
@pytest.mark.parametrize("single", [True, False], ids=["single model", "pipeline"])
def test_an_adapter_of_a_text_encoder_that_is_not_there(
    single: bool, use: Callable[..., Any], form: str, trained: Any, tmp_path: Path
) -> None:
    path, pipe = save_krona(trained, tmp_path / form), tiny_sd_pipeline()
    if not single:
        pipe.text_encoder = None
    model = pipe.unet if single else pipe
    layers = len(krona_layers(trained.unet))
    text = r"holds an adapter for text_encoder, unet, but this model has " + ("no named" if single else "unet")
    with unchanged(model), pytest.raises(AdapterFileError, match=rf"{text}.* {layers} {WAY_OUT}"):
        use(model, path)
    with pytest.warns(UserWarning, match=rf"{text}.* The other {layers} layers are used\.$"):
        use(model, path, on_unused="warn")
    expected = tiny_sd_pipeline().unet
    (load_krona if use is load_krona else merge_file)(expected, save_krona(trained.unet, tmp_path / "unet"))
    if use is load_krona:
        found, right = deltas(pipe.unet), deltas(expected)
        assert found.keys() == right.keys()
        assert all(torch.equal(found[name], delta) for name, delta in right.items())
    else:
        assert bits(pipe.unet) == bits(expected)


@pytest.mark.parametrize("use", [load_krona, merge_file])
def test_an_adapter_for_nothing_that_is_there_is_an_error_in_any_case(
    use: Callable[..., Any], trained: Any, tmp_path: Path
) -> None:
    folder, pipe = save_krona(trained, tmp_path / "dog"), tiny_sd_pipeline()
    shutil.rmtree(folder / "unet")
    pipe.text_encoder = None
    with unchanged(pipe), pytest.raises(AdapterFileError, match="for text_encoder, but this model has unet") as error:
        use(pipe, folder, on_unused="warn")
    assert "on_unused" not in str(error.value)


def test_whole_modules_beside_the_updates_are_loaded_but_not_merged(tmp_path: Path) -> None:
    trained = network()
    inject_krona(trained, KronAConfig(a1=2, a2=8, init_b="normal", modules_to_save=["norm"]))
    path, model, expected = save_krona(trained, tmp_path / "dog"), network(), network()
    text = r"holds whole modules \(norm\) beside its updates, which load_krona loads\."
    with unchanged(model), pytest.raises(AdapterFileError, match=rf"{text} The other 8 {WAY_OUT}"):
        merge_file(model, path)
    with pytest.warns(UserWarning, match=text):
        assert merge_file(model, path, on_unused="warn") == 8
    for name, delta in deltas(trained).items():
        expected.get_submodule(name).weight.data += delta
    torch.testing.assert_close(model.state_dict(), expected.state_dict())
    load_krona(network(), path)


# On the command line


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def test_the_commands_have_the_same_choice(tmp_path: Path) -> None:
    pipe = tiny_sd_pipeline()
    pipe.save_pretrained(tmp_path / "base")
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    path = saved(tmp_path, lokr(layer, 128) | {"bundle_emb.dog.x": torch.ones(1)})
    commands = {
        "merge": ("merge", tmp_path / "base", path, tmp_path / "merged"),
        "convert": ("convert", path, tmp_path / "new", "--model", tmp_path / "base"),
    }
    for name, command in commands.items():
        text = run(*command, code=1)
        assert "embeddings of new words" in text
        assert "--on-unused warn" in text
        assert not (tmp_path / {"merge": "merged", "convert": "new"}[name]).exists()
        assert "Invalid value for '--on-unused'" in run(*command, "--on-unused", "ignore", code=2)
        with pytest.warns(UserWarning, match="embeddings of new words.* The other 1 layers are used"):
            run(*command, "--on-unused", "warn")
    merge_file(pipe, saved(tmp_path, lokr(layer, 128)))
    merged = type(pipe.unet).from_pretrained(tmp_path / "merged" / "unet")
    assert bits(merged) == bits(pipe.unet)
    adapted = tiny_sd_pipeline()
    load_krona(adapted, tmp_path / "new")
    assert list(krona_layers(adapted.unet)) == [layer.removeprefix("unet.")]


def test_the_alpha_of_two_whole_factors_is_a_choice_everywhere(tmp_path: Path) -> None:
    layer, pipe = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", tiny_sd_pipeline()
    tensors = lokr(f"unet.{layer}", 128, lokr_w1=random(4, 4)) | {f"unet.{layer}.alpha": torch.tensor(2.0)}
    path = tmp_path / "dog.safetensors"
    save_file(tensors, path, {"ss_network_dim": "16"})
    delta = torch.kron(tensors[f"unet.{layer}.lokr_w1"], tensors[f"unet.{layer}.lokr_w2"])
    pipe.save_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match=r"alpha 2 beside rank 16\. .* it is 0\.125"):
        load_krona(pipe, path)
    load_krona(pipe, path, "applied", alpha_of_whole="applied")
    adapted = krona_layers(pipe.unet)[layer]
    assert torch.equal(adapted.get_delta_weight("default").detach(), delta)
    torch.testing.assert_close(adapted.get_delta_weight("applied").detach(), delta / 8)
    merged = tiny_sd_pipeline()
    before = merged.unet.get_submodule(layer).weight.detach().clone()
    merge_file(merged, path, alpha_of_whole="applied")
    torch.testing.assert_close(merged.unet.get_submodule(layer).weight.detach(), before + delta / 8)
    run("merge", tmp_path / "base", path, tmp_path / "merged", "--alpha-of-whole", "applied")
    assert bits(type(merged.unet).from_pretrained(tmp_path / "merged" / "unet")) == bits(merged.unet)
