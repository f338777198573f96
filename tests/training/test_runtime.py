import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from torch import nn

from diffusekrona.training import TrainingConfigError
from diffusekrona.training.runtime import accelerator_for, checkpointed, modes_kept, seeded
from tests.pipelines import tiny_sd_pipeline


@pytest.fixture
def hosts_accelerator():
    """The accelerator of a program that calls us."""
    yield Accelerator(mixed_precision="bf16")
    AcceleratorState._reset_state()


def test_our_state_is_dropped_after_a_run_and_after_a_failed_one():
    with accelerator_for("bf16") as accelerator:
        assert accelerator.mixed_precision == "bf16"
    assert not is_initialized()
    with pytest.raises(RuntimeError), accelerator_for("bf16"):
        raise RuntimeError
    assert not is_initialized()


def test_the_hosts_state_is_used_and_kept(hosts_accelerator):
    with accelerator_for("bf16"):
        pass
    assert is_initialized()
    assert hosts_accelerator.mixed_precision == "bf16"


def test_another_precision_than_the_hosts_is_refused(hosts_accelerator):
    with (
        pytest.raises(TrainingConfigError, match="cannot be set up with mixed_precision 'no'"),
        accelerator_for("no"),
    ):
        pass
    assert is_initialized()


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(TrainingConfigError, match=r"2 processes .* set ACCELERATE_USE_CPU"),
        accelerator_for("no"),
    ):
        pass


def test_the_random_state_is_given_back_after_an_error():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)

    def fail():
        with seeded(0, torch.device("cpu")):
            torch.rand(2)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert torch.equal(torch.rand(3), expected)


def test_a_seed_decides_what_is_drawn():
    def draw(seed):
        with seeded(seed, torch.device("cpu")):
            return torch.rand(2)

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_modes_are_given_back_part_by_part_after_an_error():
    model = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Dropout(), nn.Linear(1, 1)))
    model[1].eval()
    model[1][0].train()
    before = [part.training for part in model.modules()]

    def fail():
        with modes_kept([model]):
            model.eval()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [part.training for part in model.modules()] == before


def test_activations_are_recomputed_within_and_a_model_that_did_so_already_goes_on():
    pipe = tiny_sd_pipeline()
    pipe.unet.enable_gradient_checkpointing()
    models = [pipe.unet, pipe.text_encoder]
    with checkpointed(models):
        assert [model.is_gradient_checkpointing for model in models] == [True, True]
    assert [model.is_gradient_checkpointing for model in models] == [True, False]
