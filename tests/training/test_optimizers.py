import json
import sys

import pytest
import torch
from torch import nn

from diffusekrona.storage import read_safetensors, safetensors_bytes
from diffusekrona.training import TrainingConfig, TrainingConfigError
from diffusekrona.training.optimizer_names import check_optimizer
from diffusekrona.training.optimizers import optimizer_of, optimizer_state, restore_optimizer
from tests.training.runs import PACKAGES, need

OPTIMIZERS = pytest.mark.parametrize("name", [*PACKAGES, "paged_adamw8bit", "Muon", "soap", "adashift"])
CONFIG = TrainingConfig(learning_rate=0.1, adam_weight_decay=0.2, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-3)


def parameters():
    """One that 8-bit optimizers quantize and one that is too small for that."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"unet.large": (80, 64), "text_encoder.small": (3, 2)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def step(optimizer, found, number):
    generator = torch.Generator().manual_seed(number)
    for parameter in found.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def made(name, found, **more):
    pytest.importorskip(PACKAGES.get(name, "pytorch_optimizer"))
    return optimizer_of(found, TrainingConfig(optimizer=name, **more))


@OPTIMIZERS
def test_its_state_goes_through_a_file_and_it_continues_bit_for_bit(name, tmp_path):
    found = parameters()
    optimizer = made(name, found)
    for number in range(3):
        step(optimizer, found, number)
    tensors, values = optimizer_state(optimizer)
    (tmp_path / "state.safetensors").write_bytes(safetensors_bytes(tensors, {"values": json.dumps(values)}))
    tensors, metadata = read_safetensors(tmp_path / "state.safetensors")

    again = {key: nn.Parameter(parameter.detach().clone()) for key, parameter in found.items()}
    other = made(name, again)
    restore_optimizer(other, tensors, json.loads(metadata["values"]))
    for number in range(3, 6):
        step(optimizer, found, number)
        step(other, again, number)
    assert all(torch.equal(found[key], again[key]) for key in found)


@pytest.mark.parametrize("name", ["SGD", "sgd", "Adafactor", "rmsprop"])
def test_names_of_torch_are_its_own(name):
    optimizer = optimizer_of(parameters(), TrainingConfig(optimizer=name))
    assert type(optimizer).__module__.startswith("torch.optim")
    assert type(optimizer).__name__.lower() == name.lower()


@pytest.mark.parametrize(
    ("name", "near"), [("adamww", "adamw"), ("cme", "came"), ("AdanW", "AdamW"), ("adamw8bits", "adamw8bit")]
)
def test_an_unknown_name_gets_the_nearest_known_one(name, near):
    pytest.importorskip("pytorch_optimizer")
    with pytest.raises(TrainingConfigError, match=f"no optimizer '{name}'; did you mean '{near}'"):
        check_optimizer(TrainingConfig(optimizer=name))


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam", "schedulefreeadamw", "adahessian", "alig", "conda"])
def test_an_optimizer_that_the_loop_cannot_run_is_refused(name):
    pytest.importorskip("pytorch_optimizer")
    with pytest.raises(TrainingConfigError, match=f"'{name}' cannot be used here, for it"):
        check_optimizer(TrainingConfig(optimizer=name))


def test_arguments_reach_the_optimizer_and_win_over_our_own_of_it():
    args = {"momentum": 0.5, "nesterov": True}
    (group,) = made("SGD", {"a": nn.Parameter(torch.ones(2))}, optimizer_args=args).param_groups
    assert (group["momentum"], group["nesterov"]) == (0.5, True)
    (group,) = made("adamw", {"a": nn.Parameter(torch.ones(2))}, optimizer_args={"betas": [0.5, 0.6]}).param_groups
    assert (group["betas"], group["weight_decay"]) == ((0.5, 0.6), 0.01)
    (group,) = made("came", {"a": nn.Parameter(torch.ones(2))}, optimizer_args={"betas": [0.5, 0.6, 0.7]}).param_groups
    assert group["betas"] == (0.5, 0.6, 0.7)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"optimizer": "SGD", "optimizer_args": {"momentun": 1}}, "no argument 'momentun'.*it has momentum, dampening"),
        ({"optimizer": "SGD", "optimizer_args": {"lr": 1}}, "lr, which is the setting learning_rate"),
        ({"optimizer": "SGD", "optimizer_args": {"momentum": -1}}, "cannot be made with .*'momentum': -1"),
        ({"optimizer": "lion", "adam_beta1": 0.5}, "adam_beta1 is given, but is not for optimizer 'lion'"),
        ({"adam_beta1": 0.5, "optimizer_args": {"betas": [0.5, 0.6]}}, "betas, and adam_beta1 is given"),
    ],
)
def test_arguments_that_cannot_be_are_refused_by_name(fields, said):
    pytest.importorskip("pytorch_optimizer")
    with pytest.raises(TrainingConfigError, match=said):
        optimizer_of(parameters(), TrainingConfig(**fields))


@pytest.mark.parametrize("name", ["lion", "came", "adafactor", "muon", "SGD"])
def test_the_learning_rate_is_what_steps_are_measured_by(name):
    moved = []
    for rate in (1e-3, 1e-2):
        found = {"a": nn.Parameter(torch.zeros(8, 8))}
        optimizer = made(name, found, learning_rate=rate)
        step(optimizer, found, 0)
        moved.append(found["a"].detach().norm())
    assert moved[1] / moved[0] == pytest.approx(10, rel=0.01)


def test_muon_takes_adams_step_on_what_is_no_matrix():
    found = {"a": nn.Parameter(torch.zeros(4, 8)), "b": nn.Parameter(torch.zeros(2, 4, 8))}
    groups = made("muon", found, learning_rate=0.1).param_groups
    assert [(group["use_muon"], group["lr"]) for group in groups] == [(True, 0.1), (False, 0.1)]


def test_adamw_is_the_formula():
    found = parameters()
    started = {key: parameter.detach().double() for key, parameter in found.items()}
    optimizer = optimizer_of(found, CONFIG)
    sums = {key: (torch.zeros_like(one), torch.zeros_like(one)) for key, one in started.items()}
    for number in range(4):
        step(optimizer, found, number)
        for key, parameter in found.items():
            gradient, (first, second) = parameter.grad.double(), sums[key]
            first = 0.8 * first + 0.2 * gradient
            second = 0.95 * second + 0.05 * gradient**2
            sums[key] = first, second
            unbiased = first / (1 - 0.8 ** (number + 1)), second / (1 - 0.95 ** (number + 1))
            started[key] = (1 - 0.1 * 0.2) * started[key] - 0.1 * unbiased[0] / (unbiased[1].sqrt() + 1e-3)
    for key, parameter in found.items():
        torch.testing.assert_close(parameter.double(), started[key], rtol=1e-4, atol=1e-5)


def test_eight_bits_come_near_to_thirty_two():
    need("adamw8bit")
    ends = {}
    for name in ("adamw", "adamw8bit"):
        found = parameters()
        optimizer = made(name, found, learning_rate=0.01)
        for number in range(5):
            step(optimizer, found, number)
        ends[name] = found
    moved = [ends[name]["unet.large"] - parameters()["unet.large"] for name in ("adamw", "adamw8bit")]
    assert (moved[0] - moved[1]).norm() < 0.2 * moved[0].norm()
    tensors, _ = optimizer_state(optimizer)
    assert torch.uint8 in {tensor.dtype for tensor in tensors.values()}


def test_text_encoders_have_a_learning_rate_of_their_own():
    config = TrainingConfig(learning_rate=1e-2, text_encoder_lr=1e-3, train_text_encoder=True)
    found = parameters()
    groups = optimizer_of(found, config).param_groups
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    assert {key: rates[id(parameter)] for key, parameter in found.items()} == {
        "unet.large": 1e-2,
        "text_encoder.small": 1e-3,
    }


def test_each_text_encoder_has_a_learning_rate_of_its_own_or_else_the_first_ones():
    found = {
        f"{part}.layers.0.a": nn.Parameter(torch.ones(2))
        for part in ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer")
    }
    config = TrainingConfig(
        learning_rate=1e-2, text_encoder_lr=1e-3, text_encoder_3_lr=1e-5, train_text_encoder=True, adam_weight_decay=0
    )
    optimizer = optimizer_of(found, config)
    for parameter in found.values():
        parameter.grad = torch.ones(2)
    optimizer.step()
    moved = {name.partition(".")[0]: float(1 - parameter.detach()[0]) for name, parameter in found.items()}
    expected = {"transformer": 1e-2, "text_encoder": 1e-3, "text_encoder_2": 1e-3, "text_encoder_3": 1e-5}
    assert moved == pytest.approx(expected, rel=0.01)


def test_a_learning_rate_of_no_text_encoder_is_refused():
    config = TrainingConfig(text_encoder_2_lr=1e-3, train_text_encoder=True)
    with pytest.raises(TrainingConfigError, match="no text_encoder_2 that is trained"):
        optimizer_of(parameters(), config)


def test_parameters_of_a_text_encoder_that_is_not_named_are_refused():
    config = TrainingConfig(train_text_encoder=True, text_encoders_to_train=["text_encoder_2"])
    with pytest.raises(TrainingConfigError, match=r"Parameters of text_encoder are given, .* only text_encoder_2\.$"):
        optimizer_of(parameters(), config)


def test_b_has_a_multiple_of_as_learning_rate_in_every_part():
    names = ("krona_A", "krona_B", "krona_B1", "krona_B2", "lora_A.default.weight", "lora_B.default.weight")
    found = {f"{part}.to_q.{name}": nn.Parameter(torch.ones(2)) for part in ("unet", "text_encoder") for name in names}
    config = TrainingConfig(
        learning_rate=1e-3, text_encoder_lr=1e-4, train_text_encoder=True, loraplus_lr_ratio=8, adam_weight_decay=0
    )
    optimizer = optimizer_of(found, config)
    for parameter in found.values():
        parameter.grad = torch.ones(2)
    optimizer.step()
    for name, parameter in found.items():
        rate = (1e-3 if name.startswith("unet") else 1e-4) * (8 if "_B" in name else 1)
        assert float(1 - parameter.detach()[0]) == pytest.approx(rate, rel=0.01), name


def test_a_learning_rate_of_no_b_is_refused():
    with pytest.raises(TrainingConfigError, match="loraplus_lr_ratio is given, but nothing"):
        optimizer_of(parameters(), TrainingConfig(loraplus_lr_ratio=2))


def test_without_text_encoders_there_is_one_group_and_without_a_rate_of_their_own_they_have_the_common_one():
    assert len(optimizer_of({"unet.large": parameters()["unet.large"]}, CONFIG).param_groups) == 1
    assert {group["lr"] for group in optimizer_of(parameters(), CONFIG).param_groups} == {0.1}


def test_prodigy_finds_one_learning_rate_and_refuses_two():
    need("prodigy")
    found = {**parameters(), "unet.to_q.krona_B": nn.Parameter(torch.ones(2))}
    for more in ({"text_encoder_lr": 0.5, "train_text_encoder": True}, {"loraplus_lr_ratio": 2}):
        with pytest.raises(TrainingConfigError, match="leave those of text encoders and of B out"):
            optimizer_of(found, TrainingConfig(optimizer="prodigy", learning_rate=1.0, **more))


@pytest.mark.parametrize(
    ("name", "package"), [("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt"), ("came", "pytorch-optimizer")]
)
def test_a_missing_package_is_named_with_how_to_install_it(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)
    with pytest.raises(TrainingConfigError, match=f"'{name}'.* needs? {package}: pip install {package}"):
        optimizer_of(parameters(), TrainingConfig(optimizer=name))


def test_the_8_bit_states_of_several_large_parameters_can_be_saved_and_restored(tmp_path):
    need("adamw8bit")
    found = {name: nn.Parameter(torch.ones(4096)) for name in "ab"}  # below 4096 they stay 32 bits wide
    config = TrainingConfig(optimizer="adamw8bit")
    optimizer = optimizer_of(found, config)
    for parameter in found.values():
        parameter.grad = torch.linspace(-1, 1, 4096)
    optimizer.step()
    tensors, values = optimizer_state(optimizer)
    assert any(tensor.dtype == torch.uint8 for tensor in tensors.values())
    (tmp_path / "state.safetensors").write_bytes(safetensors_bytes(tensors, {}))
    saved, _ = read_safetensors(tmp_path / "state.safetensors")
    others = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in found.items()}
    again = optimizer_of(others, config)
    restore_optimizer(again, saved, values)
    for one, some in ((optimizer, found), (again, others)):
        for parameter in some.values():
            parameter.grad = torch.linspace(1, -2, 4096)
        one.step()
    assert all(torch.equal(found[name], others[name]) for name in found)
