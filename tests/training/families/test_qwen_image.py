import pytest
import torch
from diffusers import QwenImageEditPipeline, QwenImagePipeline

from diffusekrona.training import UnsupportedPipelineError
from diffusekrona.training.families import family_of
from tests.pipelines import tiny_qwen_image_pipeline
from tests.training.families.steps import CPU, Step, shifts_as_its_pipeline


def the_scripts_loss(step):
    """As examples/dreambooth/train_dreambooth_lora_qwen_image.py computes it, frames and all."""
    pipe, latents, noise = step.pipe, step.latents.unsqueeze(2), step.noise.unsqueeze(2)
    hidden, mask = pipe.encode_prompt(step.prompts)
    count, channels, _, height, width = latents.shape
    sigma = (step.timesteps / 1000).view(-1, 1, 1, 1, 1)
    noisy = ((1 - sigma) * latents + sigma * noise).permute(0, 2, 1, 3, 4)
    said = pipe.transformer(
        hidden_states=QwenImagePipeline._pack_latents(noisy, count, channels, height, width),
        encoder_hidden_states=hidden,
        encoder_hidden_states_mask=mask,
        timestep=step.timesteps / 1000,
        img_shapes=[(1, height // 2, width // 2)] * count,
        return_dict=False,
    )[0]
    factor = pipe.vae_scale_factor
    said = QwenImagePipeline._unpack_latents(said, height * factor, width * factor, factor)
    return ((said - (noise - latents)) ** 2).reshape(count, -1).mean(1).mean()


@pytest.mark.parametrize("prompts", [("a sks toy on a beach", "a toy"), ("a toy", "a toy")], ids=["padded", "equal"])
def test_loss_and_gradients_are_those_of_diffusers_script(prompts):
    Step(tiny_qwen_image_pipeline(), prompts).is_that_of(the_scripts_loss)


def test_the_mask_tells_where_a_short_prompt_ends():
    text = family_of(tiny_qwen_image_pipeline()).encode(["a toy", "a"], CPU)
    assert text["mask"].sum(1).diff().tolist() == [-4]
    assert text["mask"].dtype == torch.bool
    assert not text["hidden"][1, -4:].any()


@pytest.mark.parametrize("size", [(32, 32), (32, 64)])
def test_noise_levels_are_shifted_by_the_number_of_tokens(size):
    pipe = tiny_qwen_image_pipeline(base_image_seq_len=8, max_image_seq_len=64)
    assert family_of(pipe).tokens(*size) == size[1] // 2
    assert shifts_as_its_pipeline(pipe, size)


@pytest.mark.parametrize("name", ["zero_cond_t", "use_additional_t_cond"])
def test_transformers_for_editing_and_for_layers_are_refused(name):
    pipe = tiny_qwen_image_pipeline()
    pipe.transformer.register_to_config(**{name: True})
    with pytest.raises(UnsupportedPipelineError, match=f"QwenImagePipeline has {name}, .* Use the text-to-image"):
        family_of(pipe)


def test_a_pipeline_whose_prompts_are_about_images_is_refused():
    pipe = QwenImageEditPipeline(**tiny_qwen_image_pipeline().components, processor=None)
    with pytest.raises(UnsupportedPipelineError, match=r"QwenImageEditPipeline is none of .* from text to image"):
        family_of(pipe)
