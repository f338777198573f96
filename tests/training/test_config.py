import pytest

from diffusekrona.training import TrainingConfig, TrainingConfigError


def test_defaults_are_the_papers():
    config = TrainingConfig()
    assert (config.steps, config.learning_rate, config.lr_schedule) == (1000, 5e-4, "constant")
    assert not config.text_encoders
    assert not config.horizontal_flip


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("steps", 10.0),
        ("steps", True),
        ("batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("resolution", 0),
        ("seed", -1),
        ("learning_rate", 0.0),
        ("learning_rate", -1e-4),
        ("learning_rate", float("nan")),
        ("learning_rate", "5e-4"),
        ("weight_decay", -0.1),
        ("max_grad_norm", 0.0),
        ("snr_gamma", float("inf")),
        ("lr_warmup_steps", -1),
        ("mixed_precision", "fp8"),
        ("lr_schedule", "piecewise_constant"),
    ],
)
def test_an_impossible_value_is_refused_by_name(field, value):
    with pytest.raises(TrainingConfigError, match=rf"^{field} must be .*{value!r}"):
        TrainingConfig(**{field: value})


@pytest.mark.parametrize(
    "fields", [{"weight_decay": 0}, {"max_grad_norm": None}, {"snr_gamma": 5}, {"learning_rate": 1}]
)
def test_edge_values_are_accepted(fields):
    for name, value in fields.items():
        assert getattr(TrainingConfig(**fields), name) == value


def test_a_warm_up_that_would_do_nothing_is_refused():
    with pytest.raises(TrainingConfigError, match="constant_with_warmup"):
        TrainingConfig(lr_warmup_steps=5)


def test_a_warm_up_that_never_ends_is_refused():
    with pytest.raises(TrainingConfigError, match=r"lr_warmup_steps \(10\) must be below steps \(10\)"):
        TrainingConfig(steps=10, lr_schedule="linear", lr_warmup_steps=10)
