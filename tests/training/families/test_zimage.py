import pytest
import torch

from diffusekrona.training import UnsupportedPipelineError
from diffusekrona.training.families import family_of
from tests.pipelines import tiny_zimage_pipeline
from tests.training.families.steps import CPU, PROMPTS, Step
from tests.training.families.test_families import told

LONG = "a sks toy on a beach, at dawn, " * 4


def the_scripts_loss(step):
    """As examples/dreambooth/train_dreambooth_lora_z_image.py computes it."""
    hidden, _ = step.pipe.encode_prompt(prompt=list(step.prompts), do_classifier_free_guidance=False)
    sigma = (step.timesteps / 1000).view(-1, 1, 1, 1)
    noisy = (1 - sigma) * step.latents + sigma * step.noise
    frames = list(noisy.unsqueeze(2).unbind(0))
    said = step.pipe.transformer(frames, (1000 - step.timesteps) / 1000, hidden, return_dict=False)[0]
    said = -torch.stack(said, dim=0).squeeze(2)
    return ((said - (step.noise - step.latents)) ** 2).reshape(2, -1).mean(1).mean()


@pytest.mark.parametrize("prompts", [PROMPTS, ("a toy", LONG)], ids=["alike", "of several lengths"])
def test_loss_and_gradients_are_those_of_diffusers_script(prompts):
    """The transformer pads to a multiple of 32 tokens; only beyond that does it mask a shorter prompt's end."""
    Step(tiny_zimage_pipeline(), prompts).is_that_of(the_scripts_loss)


def test_each_prompt_is_as_long_as_it_is_alone():
    family = family_of(tiny_zimage_pipeline())
    text = family.encode(["a toy", LONG], CPU)
    alone = [family.encode([prompt], CPU)["hidden"][0] for prompt in ("a toy", LONG)]
    assert text["mask"].dtype == torch.bool
    assert text["mask"].sum(1).tolist() == [len(rows) for rows in alone]
    noisy = torch.randn(2, 4, 8, 8)
    heard, _ = told(family.denoiser, lambda: family.predict(noisy, torch.tensor([1.0, 999.0]), text, torch.zeros(2, 6)))
    assert [rows.shape for rows in heard["context"]] == [rows.shape for rows in alone]
    assert [tuple(image.shape) for image in heard["sample"]] == [(4, 1, 8, 8)] * 2
    torch.testing.assert_close(heard["timestep"], torch.tensor([0.999, 0.001]))


def test_prompts_that_are_encoded_stay_as_they_are():
    prompts = ["a toy"]
    family_of(tiny_zimage_pipeline()).encode(prompts, CPU)
    assert prompts == ["a toy"]


def test_sides_are_multiples_of_what_the_transformer_makes_a_token_of():
    family = family_of(tiny_zimage_pipeline())
    assert (family.reduction, family.resolution) == (8, 1024)
    assert family.tokens(32, 64) == 4 * 8


def test_the_shift_is_the_schedulers():
    assert family_of(tiny_zimage_pipeline()).shift(16) == 3
    dynamic = tiny_zimage_pipeline(use_dynamic_shifting=True)
    assert family_of(dynamic).shift(256) == pytest.approx(torch.tensor(0.5).exp().item())


def test_a_transformer_for_editing_is_refused():
    pipe = tiny_zimage_pipeline()
    pipe.transformer.register_to_config(siglip_feat_dim=16)
    with pytest.raises(UnsupportedPipelineError, match=r"ZImagePipeline has siglip_feat_dim, .* Use the text-to-image"):
        family_of(pipe)
