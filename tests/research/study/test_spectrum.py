"""Updates and their singular values, against numbers known beforehand."""

import pytest
import torch

from diffusekrona import inject_krona
from research.methods import method_from
from research.study.spectrum import linear_weights, summary, updates
from tests.pipelines import tiny_sdxl_pipeline


def test_a_flat_spectrum_and_a_single_value():
    flat = summary({"a": torch.eye(10)})
    assert flat == pytest.approx({"layers": 1, "rank90": 9, "stable_rank": 10, "energy4": 0.4, "norm": 10**0.5})
    single = summary({"a": torch.ones(6, 4)})
    assert single == pytest.approx({"layers": 1, "rank90": 1, "stable_rank": 1, "energy4": 1, "norm": 24**0.5})


def test_means_are_over_layers_and_norms_add_up():
    both = summary({"a": torch.eye(10), "b": torch.ones(6, 4)})
    assert both["rank90"] == 5
    assert both["norm"] == pytest.approx(34**0.5)
    assert summary({}) == {"layers": 0.0}


@pytest.mark.parametrize(
    ("name", "options"),
    [("krona", {"a1": 2, "a2": 4}), ("lora", {"rank": 2}), ("svdiff", {}), ("custom-diffusion", {})],
)
def test_updates_are_what_the_method_adds_whatever_it_is(name, options):
    pipe = tiny_sdxl_pipeline()
    before = linear_weights(pipe.unet)
    method = method_from(name, **options)
    trained = method.prepare(pipe)
    assert updates(pipe.unet, before) == {}
    with torch.no_grad():
        for index, parameter in enumerate(trained.values()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    found = updates(pipe.unet, before)
    assert found
    for layer_name, change in found.items():
        layer = pipe.unet.get_submodule(layer_name)
        x = torch.randn(5, change.shape[1])
        plain = x @ (before[layer_name] + change).T + (0 if layer.bias is None else layer.bias)
        torch.testing.assert_close(layer(x), plain, rtol=1e-3, atol=1e-4)


def test_only_what_changed_is_there():
    pipe = tiny_sdxl_pipeline()
    before = linear_weights(pipe.unet)
    krona = inject_krona(pipe)
    name, factor = next((name, p) for name, p in krona.named_parameters() if "krona_b" in name.lower())
    with torch.no_grad():
        factor.fill_(0.1)
    assert len(updates(pipe.unet, before)) == 1, name
