import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from diffusekrona.training.encoding import Encoded, fingerprint

KEEPS = pytest.mark.parametrize("keep", ["memory", "disk", "none"])
KEYS = [1, 2, 3]


class Encoder:
    """Something to see how often it runs."""

    def __init__(self):
        self.ran = []

    def __call__(self, key):
        self.ran.append(key)
        generator = torch.Generator().manual_seed(key)
        return {"mean": torch.randn(2, 3, generator=generator), "half": torch.full((key,), 0.1, dtype=torch.bfloat16)}


def encoded(folder, keep, encoder=None):
    found = Encoded(encoder or Encoder(), keep, folder, lambda key: f"one-{key}")
    found.prepare(KEYS)
    return found


@KEEPS
def test_what_is_found_is_what_the_encoder_says(tmp_path, keep):
    found = encoded(tmp_path, keep)
    for key in KEYS:
        assert found[key].keys() == Encoder()(key).keys()
        for name, tensor in Encoder()(key).items():
            assert torch.equal(found[key][name], tensor)
            assert found[key][name].dtype == tensor.dtype


@pytest.mark.parametrize(("keep", "runs", "files"), [("memory", 3, 0), ("disk", 3, 3), ("none", 6, 0)])
def test_the_encoder_runs_once_for_each_key_or_each_time(tmp_path, keep, runs, files):
    encoder = Encoder()
    found = encoded(tmp_path, keep, encoder)
    for key in KEYS * 2:
        found[key]
    assert len(encoder.ran) == runs
    assert len(list(tmp_path.iterdir())) == files


def test_files_are_found_again(tmp_path):
    encoded(tmp_path, "disk")
    encoder = Encoder()
    found = encoded(tmp_path, "disk", encoder)
    assert not encoder.ran
    assert torch.equal(found[2]["mean"], Encoder()(2)["mean"])


@given(st.data())
def test_a_file_with_any_byte_changed_or_missing_is_made_anew(tmp_path, data):
    encoded(tmp_path, "disk")
    path = tmp_path / "one-2.safetensors"
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[place:]
    else:
        content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    found = encoded(tmp_path, "disk")
    for name, tensor in Encoder()(2).items():
        assert torch.equal(found[2][name], tensor)


def test_weights_and_settings_have_a_fingerprint_and_it_tells_them_apart():
    def model(seed, width=3):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return nn.Linear(2, width)

    same = fingerprint([model(0), model(1)])
    assert same == fingerprint([model(0), model(1)])
    others = [
        fingerprint([model(1), model(0)]),
        fingerprint([model(0)]),
        fingerprint([model(0), model(2)]),
        fingerprint([model(0), model(1).half()]),
        fingerprint([model(0), model(1, 4)]),
        fingerprint([model(0), model(1)], "scaled"),
    ]
    assert len({same, *others}) == 7
