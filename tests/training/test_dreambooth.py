import gc

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import nn

from diffusekrona import KronAConfig, KronALayer, KronAModel, inject_krona, load_krona, save_krona
from diffusekrona.errors import AdapterFileError, AdapterNameError, FactorShapeError
from diffusekrona.training import (
    DatasetError,
    ImagePlan,
    TrainingConfig,
    TrainingConfigError,
    TrainingDivergedError,
    UnsupportedPipelineError,
    fit,
    prepare_images,
    train_dreambooth,
)
from diffusekrona.training.dreambooth import training_resolution
from diffusekrona.training.families import family_of
from diffusekrona.training.run import run
from diffusekrona.training.settings import Settings
from tests.pipelines import IMAGE_SIZE, tiny_sd3_pipeline, tiny_sd_pipeline, tiny_sdxl_pipeline
from tests.training.runs import FAMILIES, PLAN, SMALL, adapted, examples, pictures, same

PROMPT = "a sks toy"
QUICK = TrainingConfig(max_train_steps=2, learning_rate=1e-2, train_batch_size=2)


@pytest.fixture
def folder(tmp_path):
    for index, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (50, 40), colour).save(tmp_path / f"{index}.png")
    return tmp_path


def image_of(pipe):
    options = {
        "height": IMAGE_SIZE,
        "width": IMAGE_SIZE,
        "num_inference_steps": 2,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "np",
    }
    return pipe(PROMPT, **options).images[0]


def adapted_layers(pipe):
    return [name for name, module in pipe.unet.named_modules() if isinstance(module, KronALayer)]


def factors_of(pipe):
    return {name: p.detach().clone() for name, p in pipe.unet.named_parameters() if KronAModel.prefix in name}


@FAMILIES
def test_a_trained_adapter_changes_images_and_does_so_again_after_saving_and_loading(build, folder, tmp_path):
    pipe = build()
    plain = image_of(pipe)
    result = train_dreambooth(pipe, folder, PROMPT, QUICK)
    trained = image_of(pipe)
    save_krona(pipe, tmp_path / "toy.safetensors")
    fresh = build()
    load_krona(fresh, tmp_path / "toy.safetensors")
    assert result.images == 3
    assert not np.array_equal(plain, trained)
    assert np.array_equal(image_of(fresh), trained)


def test_the_adapter_is_the_one_asked_for(folder):
    pipe = tiny_sd_pipeline()
    config = KronAConfig(a1=2, a2=8, target_modules=["to_q"])
    train_dreambooth(pipe, folder, PROMPT, QUICK, config, adapter_name="toy")
    assert all(name.endswith("to_q") for name in adapted_layers(pipe))
    assert pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.krona_A["toy"].shape == (2, 8)


def test_the_text_encoders_are_adapted_when_asked_for(folder):
    pipe = tiny_sd_pipeline()
    train_dreambooth(pipe, folder, PROMPT, TrainingConfig(max_train_steps=1, train_text_encoder=True))
    assert any(isinstance(module, KronALayer) for module in pipe.text_encoder.modules())


def test_one_of_the_text_encoders_is_adapted_when_it_is_named(folder):
    pipe = tiny_sdxl_pipeline()
    config = TrainingConfig(max_train_steps=1, train_text_encoder=True, text_encoders_to_train=["text_encoder_2"])
    train_dreambooth(pipe, folder, PROMPT, config)
    assert any(isinstance(module, KronALayer) for module in pipe.text_encoder_2.modules())
    assert not any(isinstance(module, KronALayer) for module in pipe.text_encoder.modules())


@pytest.mark.parametrize("more", [{}, {"gradient_checkpointing": True}, {"offload": "all"}], ids=str)
def test_text_encoders_are_adapted_without_the_denoiser(folder, more):
    pipe = tiny_sdxl_pipeline()
    chosen = {"train_text_encoder": True, "text_encoders_to_train": ["text_encoder"], "train_denoiser": False}
    result = train_dreambooth(pipe, folder, PROMPT, TrainingConfig(max_train_steps=2, **chosen, **more))
    adapted = {name for name, part in pipe.components.items() if name != "vae" and has_krona(part)}
    assert adapted == {"text_encoder"}
    factors = {name: factor for name, factor in pipe.text_encoder.named_parameters() if KronAModel.prefix in name}
    assert result.parameters == sum(factor.numel() for factor in factors.values())
    learnt = [factor.any() for name, factor in factors.items() if "krona_B" in name]
    assert all(learnt[: len(learnt) // 2])  # SDXL does not use the encoder's last layer


def has_krona(part):
    return isinstance(part, torch.nn.Module) and any(isinstance(module, KronALayer) for module in part.modules())


def test_the_whole_run_depends_on_the_seed_alone(folder):
    runs = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        pipe = tiny_sd_pipeline()
        train_dreambooth(pipe, folder, PROMPT, QUICK)
        runs.append(factors_of(pipe))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_images_in_memory_are_as_good_as_a_folder(folder):
    runs = []
    for images in (folder, [Image.open(path) for path in sorted(folder.iterdir())]):
        pipe = tiny_sd_pipeline()
        runs.append(train_dreambooth(pipe, images, PROMPT, QUICK).losses)
    assert runs[0] == runs[1]


def test_each_caption_reaches_the_text_encoder_once(folder):
    (folder / "1.txt").write_text("a sks toy on sand")
    pipe, seen = tiny_sd_pipeline(), []
    pipe.text_encoder.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    train_dreambooth(pipe, folder, PROMPT, QUICK)
    assert seen == [1, 1]


def test_ctrl_c_keeps_the_adapter_and_leaves_a_pipeline_that_works(folder):
    pipe = tiny_sd_pipeline()
    plain = image_of(pipe)

    def stop(step):
        if step.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_dreambooth(pipe, folder, PROMPT, TrainingConfig(max_train_steps=9, learning_rate=1e-2), on_step=stop)
    assert adapted_layers(pipe)
    assert not any(part.training for part in pipe.unet.modules() if not isinstance(part, nn.ParameterDict))
    assert not np.array_equal(image_of(pipe), plain)


def test_a_failed_run_takes_its_adapter_out_and_leaves_others_in(folder):
    pipe = tiny_sd_pipeline()
    inject_krona(pipe, KronAConfig(), adapter_name="first")
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    pipe.unet.conv_out.bias.data[0] = torch.nan
    with pytest.raises(TrainingDivergedError):
        train_dreambooth(pipe, folder, PROMPT, QUICK, adapter_name="second")
    pipe.unet.conv_out.bias.data[0] = before["conv_out.bias"][0]
    after = pipe.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_error_in_the_callers_callback_takes_the_adapter_out(folder):
    pipe = tiny_sd_pipeline()
    trainable = [parameter.requires_grad for parameter in pipe.unet.parameters()]

    def fail(step):
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        train_dreambooth(pipe, folder, PROMPT, QUICK, on_step=fail)
    assert not adapted_layers(pipe)
    assert [parameter.requires_grad for parameter in pipe.unet.parameters()] == trainable


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"images": "nowhere"}, DatasetError),
        ({"prompt": ""}, DatasetError),
        ({"krona_config": KronAConfig(a1=3)}, FactorShapeError),
        ({"config": TrainingConfig(cache="disk")}, TrainingConfigError),
        ({"adapter_name": "taken"}, AdapterNameError),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_changed(folder, change, error):
    pipe = tiny_sd_pipeline()
    inject_krona(pipe, KronAConfig(target_modules=["to_q"]), adapter_name="taken")
    before = adapted_layers(pipe)
    arguments = {"images": folder, "prompt": PROMPT, "config": QUICK, "krona_config": None} | change
    with pytest.raises(error):
        train_dreambooth(pipe, **arguments)
    assert adapted_layers(pipe) == before


def test_something_that_is_no_pipeline_is_refused(folder):
    with pytest.raises(UnsupportedPipelineError, match="UNet2DConditionModel"):
        train_dreambooth(tiny_sd_pipeline().unet, folder, PROMPT)


@FAMILIES
def test_the_resolution_is_the_pipelines_own_unless_given(build):
    assert training_resolution(build(), None) == IMAGE_SIZE
    assert training_resolution(build(), 64) == 64


def test_a_resolution_that_does_not_divide_names_its_neighbours():
    with pytest.raises(TrainingConfigError, match=r"resolution 30 is not divisible by 4, .* use 28 or 32"):
        training_resolution(tiny_sd_pipeline(), 30)
    with pytest.raises(TrainingConfigError, match=r"use 4\."):
        training_resolution(tiny_sd_pipeline(), 3)


def test_training_works_at_another_resolution(folder):
    pipe, sizes = tiny_sd_pipeline(), set()
    pipe.unet.register_forward_pre_hook(lambda module, args: sizes.add(tuple(args[0].shape)))
    train_dreambooth(pipe, folder, PROMPT, TrainingConfig(max_train_steps=1), plan=ImagePlan(48))
    assert sizes == {(1, 4, 12, 12)}


@pytest.mark.parametrize(("build", "pixels"), [(tiny_sd_pipeline, 4), (tiny_sdxl_pipeline, 4), (tiny_sd3_pipeline, 8)])
def test_images_are_reduced_by_the_autoencoder_and_by_patches(build, pixels):
    assert family_of(build()).reduction == pixels
    with pytest.raises(TrainingConfigError, match=rf"resolution 34 is not divisible by {pixels}"):
        training_resolution(build(), 34)


def test_prepared_images_are_taken_as_they_are():
    pipe, prompts = tiny_sd_pipeline(), []
    encode = pipe.encode_prompt
    pipe.encode_prompt = lambda prompt, **options: prompts.extend(prompt) or encode(prompt=prompt, **options)
    train_dreambooth(pipe, examples(2, ["a cup", "a toy"]), "ignored", QUICK, KronAConfig(**SMALL))
    assert prompts == ["a cup", "a toy"]


def test_images_of_the_class_are_learnt_beside_the_subject(folder):
    runs = []
    for others in ((), prepare_images(pictures(2), "a toy", PLAN)):
        pipe = tiny_sd_pipeline()
        train_dreambooth(pipe, folder, PROMPT, QUICK, KronAConfig(**SMALL), class_images=others)
        runs.append(factors_of(pipe))
    assert not same(*runs)


def test_a_run_is_resumed_with_another_pipeline_and_gives_the_same_adapter(folder, tmp_path):
    config = QUICK.replace(max_train_steps=4, checkpointing_steps=2)
    runs = []

    def stop(step):
        if step.step == 3:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        train_dreambooth(tiny_sd_pipeline(), folder, PROMPT, config, on_step=stop, folder=tmp_path / "run")
    for options in ({"folder": tmp_path / "run", "resume": True}, {}):
        torch.manual_seed(len(runs))
        pipe = tiny_sd_pipeline()
        runs.append((train_dreambooth(pipe, folder, PROMPT, config, **options), factors_of(pipe)))
    assert [result.resumed_at for result, _ in runs] == [2, 0]
    assert runs[0][0].losses == runs[1][0].losses
    assert same(runs[0][1], runs[1][1])


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_without_its_encoders_a_pipeline_learns_the_same_and_saves_it(folder, tmp_path, cache):
    config, saved = QUICK.replace(cache=cache), []
    for keep in (True, False):
        pipe = tiny_sdxl_pipeline()
        train_dreambooth(pipe, folder, PROMPT, config, KronAConfig(**SMALL), keep_encoders=keep)
        saved.append(save_krona(pipe, tmp_path / f"{keep}.safetensors").read_bytes())
        assert (pipe.vae is None) == (not keep and cache == "memory")
    assert saved[0] == saved[1]


def autoencoders():
    """How many there are whose weights take memory."""
    gc.collect()
    found = [one for one in gc.get_objects() if isinstance(one, AutoencoderKL)]
    return sum(next(one.parameters()).device.type != "meta" for one in found)


@pytest.mark.parametrize(("values", "kept"), [({}, 0), ({"validation_prompt": [PROMPT]}, 1)])
def test_a_run_keeps_encoders_only_for_validation_pictures(folder, tmp_path, values, kept):
    tiny_sd_pipeline().save_pretrained(tmp_path / "base")
    paths = {"pretrained_model_name_or_path": "base", "output_dir": "out"}
    given = {
        **{name: str(tmp_path / path) for name, path in paths.items()},
        **{"instance_data_dir": str(folder), "instance_prompt": PROMPT, "max_train_steps": 1},
        **{"validation_inference_steps": 1, **SMALL, **values},
    }
    before, found = autoencoders(), []
    run(Settings.of(given), lambda step: found.append(autoencoders() - before))
    assert found == [kept]


# Beginning with an adapter, keeping a class, held-out images


def of(krona_pipe):
    return {name: factor.detach().clone() for name, factor in krona_pipe.unet.named_parameters() if "krona_" in name}


def test_a_training_begins_with_a_saved_adapter(tmp_path):
    first = tiny_sd_pipeline()
    train_dreambooth(first, pictures(2), "a sks toy", QUICK, KronAConfig(**SMALL))
    save_krona(first, tmp_path / "first")
    second = tiny_sd_pipeline()
    still = QUICK.replace(max_train_steps=1, learning_rate=1e-30, adam_weight_decay=0.0)
    train_dreambooth(
        second, pictures(1, seed=5), "a sks cup", still, KronAConfig(**SMALL), init_from=tmp_path / "first"
    )
    assert same(of(first), of(second))
    third = tiny_sd_pipeline()
    other = KronAConfig(a1=2, a2=32, **SMALL)
    with pytest.raises(AdapterFileError, match="differ in shape"):
        train_dreambooth(third, pictures(1), "a sks toy", still, other, init_from=tmp_path / "first")
    assert not of(third)


def test_the_base_stays_what_it_is_for_the_class_without_class_images():
    """Beside the subject alone, the class's own predictions move much less."""
    images, strong = examples(2), QUICK.replace(max_train_steps=30, learning_rate=2e-2)
    moved = {}
    for prior in (None, "a toy"):
        pipe = tiny_sd_pipeline()
        train_dreambooth(
            pipe, images, "a sks toy", strong.replace(prior_prompt=prior, prior_loss_weight=5.0), KronAConfig(**SMALL)
        )
        family = family_of(pipe)
        noisy = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        times = torch.tensor([100, 300, 500, 900])
        with torch.no_grad():
            text = {
                name: row.expand(4, *row.shape[1:])
                for name, row in family.encode(["a toy"], torch.device("cpu")).items()
            }
            after = family.predict(noisy, times, text, torch.zeros(4, 6))
            before = family_of(tiny_sd_pipeline()).predict(noisy, times, text, torch.zeros(4, 6))
        moved[prior] = float((after - before).square().mean())
    assert 0 < moved["a toy"] < 0.5 * moved[None]


def test_a_class_is_kept_only_where_the_base_can_be_asked():
    pipe, factors = adapted(**SMALL)
    with pytest.raises(TrainingConfigError, match="give as_base"):
        fit(pipe, examples(), factors, QUICK.replace(prior_prompt="a toy"))


def test_the_loss_of_held_out_images_is_of_the_same_noise_each_time_and_changes_nothing():
    config = QUICK.replace(max_train_steps=4, validation_loss_steps=2)
    options = KronAConfig(dropout=0.3, **SMALL)
    plain, watched = tiny_sd_pipeline(), tiny_sd_pipeline()
    train_dreambooth(plain, examples(), "a sks toy", config, options)
    seen = []
    result = train_dreambooth(
        watched, examples(), "a sks toy", config, options, held_out=examples(2, seed=7),
        on_step=lambda done: seen.append(done.validation_loss),
    )  # fmt: skip
    assert same(of(plain), of(watched))
    assert [loss is None for loss in seen] == [True, False, True, False]
    assert list(result.validation_losses) == [2, 4]
    config = config.replace(learning_rate=1e-30, adam_weight_decay=0.0)
    still = train_dreambooth(tiny_sd_pipeline(), examples(), "a sks toy", config, options, held_out=examples(2, seed=7))
    first, last = still.validation_losses.values()
    assert first == last != pytest.approx(result.validation_losses[4], rel=1e-6)
