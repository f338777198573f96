import pytest
import torch
from accelerate import Accelerator

from diffusekrona.training import TrainingConfig, prepare_images
from diffusekrona.training.batches import Batches, text_encoders
from diffusekrona.training.encoding import Texts
from diffusekrona.training.families import family_of
from tests.pipelines import tiny_flux_pipeline, tiny_sd_pipeline, tiny_sdxl_pipeline
from tests.training.runs import FAMILIES, PLAN, examples, pictures

PROMPTS = ["a sks toy", "a dog on sand", "a sks toy"]
CPU = torch.device("cpu")


def texts(pipe, prompts=PROMPTS, trained=False, **options):
    return Texts(family_of(pipe), prompts, text_encoders(pipe), trained=trained, device=CPU, **options)


def close(actual, expected):
    """Equal up to what the size of a batch changes in the rounding of matrix products."""
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@FAMILIES
@pytest.mark.parametrize("trained", [False, True])
def test_rows_follow_the_prompts_asked_for(build, trained):
    source = texts(build(), trained=trained)
    asked = [PROMPTS[1], PROMPTS[0], PROMPTS[1]]
    together, alone = source(asked), [source([prompt]) for prompt in asked]
    for row, single in enumerate(alone):
        for name, tensor in together.items():
            close(tensor[row], single[name][0])
    assert not torch.equal(alone[0]["hidden"], alone[1]["hidden"])


@FAMILIES
def test_frozen_encoders_run_once_per_distinct_prompt_and_never_again(build):
    pipe, rows = build(), []
    pipe.text_encoder.register_forward_hook(lambda module, args, output: rows.append(1))
    source = texts(pipe)
    source(PROMPTS)
    source(PROMPTS[:1])
    assert len(rows) == 2


@FAMILIES
def test_gradients_reach_trained_encoders_and_not_frozen_ones(build):
    pipe = build()
    assert not texts(pipe)(PROMPTS)["hidden"].requires_grad
    said = texts(pipe, trained=True)(PROMPTS)
    sum(tensor.sum() for tensor in said.values()).backward()
    for encoder in text_encoders(pipe):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())


@FAMILIES
def test_texts_have_the_denoisers_type(build):
    pipe = build()
    family_of(pipe).denoiser.to(torch.bfloat16)
    assert {tensor.dtype for tensor in texts(pipe)(PROMPTS).values()} == {torch.bfloat16}


@FAMILIES
def test_kept_in_memory_on_disk_or_nowhere_texts_are_the_same_bits(build, tmp_path):
    found = [texts(build(), keep=keep, folder=tmp_path)(PROMPTS) for keep in ("memory", "disk", "none")]
    for other in found[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in found[0].items())


def test_on_disk_texts_are_found_again_and_those_of_other_encoders_are_not(tmp_path):
    runs = []
    for seed in (0, 0, 1):
        pipe, count = tiny_sd_pipeline(seed), []
        pipe.text_encoder.register_forward_hook(lambda *_, count=count: count.append(1))
        texts(pipe, keep="disk", folder=tmp_path)(PROMPTS)
        runs.append(len(count))
    assert runs == [2, 0, 2]
    assert len(list(tmp_path.iterdir())) == 4


def test_trained_encoders_are_run_each_time_whatever_was_to_be_kept(tmp_path):
    pipe = tiny_sd_pipeline()
    source = texts(pipe, trained=True, keep="disk", folder=tmp_path)
    before = source(PROMPTS)["hidden"]
    with torch.no_grad():
        for parameter in pipe.text_encoder.parameters():
            parameter += 0.1
    assert before.requires_grad
    assert not torch.equal(source(PROMPTS)["hidden"], before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("build", [tiny_sd_pipeline, tiny_sdxl_pipeline])
@pytest.mark.parametrize("trained", [False, True])
def test_what_stands_after_the_77th_token_is_heard_and_all_prompts_are_as_long(build, trained):
    pipe = build()
    prompts = ["a sks toy " + "x" * 80 + " at night", "a sks toy " + "x" * 80 + " by day", "a dog"]
    said = texts(pipe, prompts, trained=trained)(prompts)["hidden"]
    assert said.shape[:2] == (3, 154)
    assert not torch.allclose(said[0], said[1])


def test_encodings_of_other_lengths_are_other_files(tmp_path):
    pipe = tiny_sd_pipeline()
    for prompts in (["a dog"], ["a dog", "x" * 80]):
        texts(pipe, prompts, keep="disk", folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_what_no_encoder_reads_of_a_prompt_is_told_with_its_file(caplog):
    pipe = tiny_flux_pipeline()
    long = prepare_images(pictures(1), "a sks toy " + "x" * 600 + "at night", PLAN)
    Batches("subject", pipe, family_of(pipe), [*long, *examples(1)], TrainingConfig(), Accelerator(cpu=True))
    (told,) = [record.getMessage() for record in caplog.records if "cut off is" in record.getMessage()]
    assert told.startswith("The prompt of image 1 is longer than FLUX.1 reads; cut off is: xx")
    assert told.endswith("at night")
