from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffusekrona.training.reports import ready_to_draw


class Part(nn.Linear):
    """A model that tells where it is sent to and stays, so that one device is enough for these tests."""

    def __init__(self, device):
        super().__init__(1, 1, device=device)
        self.sent = []

    def to(self, device):
        self.sent.append(str(device))
        return self


def pipeline(**devices):
    parts = {name: Part(device) for name, device in devices.items()}
    return SimpleNamespace(
        components={**parts, "tokenizer": None, "feature_extractor": object()},
        to=lambda device: [part.to(device) for part in parts.values()],
    ), parts


@pytest.mark.parametrize(
    ("homes", "asked", "there"),
    [
        (("cpu", "cpu"), None, "cpu"),
        (("cpu", "meta"), None, "meta"),
        (("cpu", "meta"), torch.device("cuda:1"), "cuda:1"),
    ],
)
def test_all_models_draw_on_one_device_and_go_home_also_after_an_error(homes, asked, there):
    pipe, parts = pipeline(**dict(zip(("text_encoder", "unet"), homes, strict=True)))
    parts["unet"].train()
    parts["text_encoder"].eval()

    def fail_to_draw():
        with ready_to_draw(pipe, asked):
            assert [part.sent for part in parts.values()] == [[there], [there]]
            assert not any(part.training for part in parts.values())
            raise MemoryError

    with pytest.raises(MemoryError):
        fail_to_draw()
    assert [part.sent[1] for part in parts.values()] == list(homes)
    assert [part.training for part in parts.values()] == [False, True]
