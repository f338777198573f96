import re

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from diffusekrona.cli import app
from diffusekrona.cli.options import factor_pattern, flags_of_training, help_of, named_values, with_flags
from diffusekrona.errors import KronAError
from diffusekrona.training.script_names import MEANT
from diffusekrona.training.settings import GROUPS, NAMES, SHORT_NAMES


def flag(name):
    return f"--{name.replace('_', '-')}"


def given_to(*arguments):
    """What a command gets of some flags."""
    found = {}
    program = typer.Typer()

    @program.command(context_settings={"token_normalize_func": lambda name: name.replace("_", "-")})
    @with_flags(flags_of_training())
    def command(**values):
        """Nothing."""
        found.update(values)

    result = CliRunner().invoke(program, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return found


def help_of_training():
    """The text of `train --help` without frames and line breaks."""
    text = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, ["train", "--help"]).stdout
    return " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())


def test_text_encoders_are_named_one_by_one():
    given = given_to("--train_text_encoder", "--text-encoders-to-train", "text_encoder_2")
    assert given == {"train_text_encoder": True, "text_encoders_to_train": ["text_encoder_2"]}
    both = given_to(*[part for name in ("a", "b") for part in ("--text_encoders_to_train", name)])
    assert both == {"text_encoders_to_train": ["a", "b"]}
    assert given_to("--train-text-encoder") == {"train_text_encoder": True}


def test_each_setting_has_a_flag_and_each_flag_its_text():
    text = help_of_training()
    for group in GROUPS:
        assert group.heading in text
        for name in group.fields:
            assert re.search(rf"{flag(name)}[ ,]", text)
            assert " ".join(help_of(group.model, name).split()[:3]) in text


COMMANDS = typer.main.get_command(app).commands


def test_training_has_a_flag_for_each_setting_and_two_of_its_own():
    assert {parameter.name for parameter in COMMANDS["train"].params} == NAMES.keys() | MEANT.keys() | {
        "config",
        "plan",
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_each_flag_and_argument_is_a_sentence(name):
    assert re.fullmatch(r"[A-Z].*\.", COMMANDS[name].help, re.DOTALL)
    for parameter in COMMANDS[name].params:
        assert re.fullmatch(r"[A-Z](\S+ ){3,}.*\.", parameter.help or ""), parameter.name


def test_only_what_is_given_is_passed_on_even_if_it_is_the_default():
    assert given_to() == {}
    assert given_to("--a1", 4, "--center-crop") == {"a1": 4, "center_crop": True}
    assert given_to("--a1", 2, "--no-center-crop") == {"a1": 2, "center_crop": False}


def test_each_type_of_setting_can_be_given():
    found = given_to(
        "--max-train-steps", 3, "--learning-rate", "1e-4", "--random-flip", "--optimizer", "prodigy",
        "--instance-prompt", "a toy", "--lr-scheduler", "constant_with_warmup",
        "--factors", "to_k=2,8", "--factors", "a=b=4,4",
        "--optimizer-args", "betas=[0.9, 0.99]", "--optimizer-args", "d0=1e-5",
    )  # fmt: skip
    assert found == {
        "max_train_steps": 3,
        "learning_rate": 1e-4,
        "random_flip": True,
        "optimizer": "prodigy",
        "instance_prompt": "a toy",
        "lr_scheduler": "constant_with_warmup",
        "factors": {"to_k": (2, 8), "a=b": (4, 4)},
        "optimizer_args": {"betas": [0.9, 0.99], "d0": 1e-5},
    }


@pytest.mark.parametrize(("short", "name"), SHORT_NAMES.items())
def test_some_flags_have_a_shorter_name(short, name):
    long = given_to(flag(name), "something")
    assert given_to(flag(short), "something") == long
    assert str(long[name]) == "something"


@pytest.mark.parametrize("name", ["max_train_steps", "train_batch_size", "seed"])
def test_flags_may_be_written_with_underscores_as_in_diffusers_scripts(name):
    assert given_to(f"--{name}", 7) == given_to(flag(name), 7) == {name: 7}


@given(
    st.text(min_size=1).map(str.strip).filter(lambda text: text and "\n" not in text), st.integers(1), st.integers(1)
)
def test_factors_are_read_whatever_the_expression_holds(expression, a1, a2):
    assert factor_pattern([f"{expression}={a1}, {a2} "]) == {expression: (a1, a2)}


@pytest.mark.parametrize("text", ["to_k", "to_k=4", "=4,8", "to_k=4,8,", "to_k=a,b", "to_k=-4,8"])
def test_other_factors_are_refused_with_an_example(text):
    with pytest.raises(KronAError, match="--factors takes REGEX=A1,A2, such as"):
        factor_pattern([text])


@pytest.mark.parametrize(
    ("text", "value"), [("0.9", 0.9), ("1e-4", 1e-4), ("[0.9, 0.99]", [0.9, 0.99]), ("true", True), ("a=b", "a=b")]
)
def test_values_of_an_optimizers_arguments_are_what_they_are_in_a_file(text, value):
    assert named_values([f"one={text}", "two=2"]) == {"one": value, "two": 2}


@pytest.mark.parametrize("text", ["weight_decay", "=1"])
def test_other_arguments_are_refused_with_an_example(text):
    with pytest.raises(KronAError, match=r"--optimizer-args takes NAME=VALUE, such as weight_decay=0\.01"):
        named_values([text])
