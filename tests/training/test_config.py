import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusekrona.training import TrainingConfig, TrainingConfigError


def test_defaults_are_the_papers():
    config = TrainingConfig()
    assert (config.max_train_steps, config.learning_rate, config.lr_scheduler) == (1000, 5e-4, "constant")
    assert not config.train_text_encoder
    assert not config.random_flip


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_train_steps", 0),
        ("max_train_steps", 10.0),
        ("max_train_steps", True),
        ("train_batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("lr_num_cycles", 0),
        ("checkpointing_steps", 0),
        ("checkpoints_total_limit", 0),
        ("seed", -1),
        ("learning_rate", 0.0),
        ("learning_rate", -1e-4),
        ("learning_rate", float("nan")),
        ("learning_rate", "5e-4"),
        ("text_encoder_lr", 0.0),
        ("loraplus_lr_ratio", 0.0),
        ("adam_beta1", 1.0),
        ("adam_beta2", -0.1),
        ("adam_epsilon", 0.0),
        ("adam_weight_decay", -0.1),
        ("max_grad_norm", -1.0),
        ("snr_gamma", float("inf")),
        ("noise_offset", -0.1),
        ("ema_decay", 1.0),
        ("prior_loss_weight", -1.0),
        ("lr_power", 0),
        ("lr_warmup_steps", -1),
        ("mixed_precision", "fp8"),
        ("lr_scheduler", "piecewise_constant"),
        ("cache", "cloud"),
        ("on_non_finite", "ignore"),
        ("random_flip", "no"),
        ("train_text_encoder", 1),
        ("gradient_checkpointing", None),
        ("seed", "5"),
        ("seed", None),
    ],
)
def test_an_impossible_value_is_refused_by_name(field, value):
    with pytest.raises(TrainingConfigError, match=rf"^{field} must be .*{value!r}"):
        TrainingConfig(**{field: value})


@pytest.mark.parametrize(
    "fields",
    [
        {"adam_weight_decay": 0},
        {"max_grad_norm": 0},
        {"snr_gamma": 5},
        {"learning_rate": 1},
        {"ema_decay": 0},
        {"prior_loss_weight": 0},
        {"noise_offset": 0},
        {"train_text_encoder": True, "text_encoder_lr": 1e-4},
        {"train_text_encoder": True, "text_encoders_to_train": ["text_encoder_2"], "text_encoder_lr": 1e-4},
        {"train_text_encoder": True, "text_encoders_to_train": ["text_encoder_2"], "text_encoder_2_lr": 1e-4},
        {
            "train_text_encoder": True,
            "text_encoders_to_train": ["text_encoder", "text_encoder_2"],
            "text_encoder_lr": 1e-4,
            "text_encoder_2_lr": 1e-4,
        },
    ],
)
def test_edge_values_are_accepted(fields):
    for name, value in fields.items():
        assert getattr(TrainingConfig(**fields), name) == value


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"train_text_encoder": False}, "it is used only with train_text_encoder: true"),
        ({"text_encoders_to_train": []}, r"text_encoders_to_train must be such as \['text_encoder_2'\], not \[\]"),
        ({"text_encoders_to_train": [2]}, r"text_encoders_to_train must be such as \['text_encoder_2'\], not \[2\]"),
        ({"text_encoder_3_lr": 1e-4}, "text_encoder_3_lr is given, .* none of the text_encoders_to_train"),
        ({"text_encoder_lr": 1e-3, "text_encoder_2_lr": 1e-4}, "text_encoder_lr is given, .*, text_encoder_2. Name"),
    ],
)
def test_text_encoders_that_are_chosen_are_trained_and_their_rates_are_theirs(fields, said):
    chosen = {"train_text_encoder": True, "text_encoders_to_train": ["text_encoder_2"]}
    with pytest.raises(TrainingConfigError, match=said):
        TrainingConfig(**{**chosen, **fields})


def test_adapted_encoders_are_all_or_those_that_are_named():
    assert TrainingConfig().adapted_encoders is False
    config = TrainingConfig(train_text_encoder=True)
    assert config.adapted_encoders is True
    one = config.replace(text_encoders_to_train="text_encoder_2")
    assert one.adapted_encoders == ["text_encoder_2"]
    assert one == config.replace(text_encoders_to_train=["text_encoder_2"])
    assert hash(one) == hash(one.replace())


def test_each_wrong_value_has_a_sentence_and_an_unknown_name_the_nearest_known_one():
    with pytest.raises(TrainingConfigError) as error:
        TrainingConfig(seed=True, optimizer=1, learning_rat=1)
    assert str(error.value) == (
        "seed must be a whole number of at least 0, not True. "
        "optimizer must be a text, not 1. "
        "There is no setting 'learning_rat'; did you mean 'learning_rate'?"
    )
    assert error.value.__suppress_context__


def test_a_config_stays_as_it_is_and_another_one_is_checked_as_the_first():
    config = TrainingConfig(seed=1, learning_rate=1)
    with pytest.raises(AttributeError, match=r"TrainingConfig does not change; \.replace\(seed=…\)"):
        config.seed = 2
    assert config.replace(seed=2) == TrainingConfig(seed=2, learning_rate=1.0)
    assert (config.seed, hash(config)) == (1, hash(TrainingConfig(seed=1, learning_rate=1)))
    with pytest.raises(TrainingConfigError, match=r"^seed must be"):
        config.replace(seed=-1)
    with pytest.raises(TrainingConfigError, match="did you mean 'seed'"):
        config.replace(sed=1)


@given(beta=st.floats())
def test_a_beta_is_from_zero_to_below_one_or_refused(beta):
    if 0 <= beta < 1:
        assert TrainingConfig(adam_beta1=beta).adam_beta1 == beta
    else:
        with pytest.raises(TrainingConfigError, match="adam_beta1"):
            TrainingConfig(adam_beta1=beta)


def test_a_warm_up_that_would_do_nothing_is_refused():
    with pytest.raises(TrainingConfigError, match="constant_with_warmup"):
        TrainingConfig(lr_warmup_steps=5)


def test_a_warm_up_that_never_ends_is_refused():
    with pytest.raises(TrainingConfigError, match=r"lr_warmup_steps \(10\) must be below max_train_steps \(10\)"):
        TrainingConfig(max_train_steps=10, lr_scheduler="linear", lr_warmup_steps=10)


def test_a_learning_rate_of_text_encoders_that_are_not_trained_is_refused():
    with pytest.raises(TrainingConfigError, match="text_encoder_lr is given, but"):
        TrainingConfig(text_encoder_lr=1e-4)
    with pytest.raises(TrainingConfigError, match="text_encoder_2_lr is given, but"):
        TrainingConfig(text_encoder_2_lr=1e-4)


@pytest.mark.parametrize(
    ("values", "used"),
    [
        ({"huber_c": 0.2}, {"loss_type": "huber"}),
        ({"keep_tags": 2}, {"shuffle_tags": True}),
        ({"lr_num_cycles": 3}, {"lr_scheduler": "cosine_with_restarts"}),
        ({"lr_power": 2.0}, {"lr_scheduler": "polynomial"}),
        ({"mode_scale": 0.5}, {"timestep_sampling": "mode"}),
    ],
    ids=str,
)
def test_what_would_not_be_used_is_not_dropped_in_silence(values, used):
    with pytest.raises(TrainingConfigError, match=r"is given, but it is used only with \w+: "):
        TrainingConfig(**values)
    assert TrainingConfig(**values, **used)
