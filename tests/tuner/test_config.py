"""KronAConfig: refuses what no layer could use, where it is made, and survives being saved."""

import json
from collections.abc import Iterator
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftConfig

from diffusekrona import KronAConfig
from diffusekrona.errors import ConfigError, KronAError
from diffusekrona.tuner.fields import PRESETS

ZERO_TO_ONE = [float("nan"), float("inf"), -0.1, 1, 1.0, 2, "0.5", None, True]
NOT_A_FACTOR = [0, -4, 2.0, "4", None, True, float("nan")]
NOT_A_PAIR = [4, (4,), (4, 64, 1), "46", None, (0, 64), (4, -1), (4, 2.0), (True, 64), {4: 64}, [[4], [64]]]
NOT_FINITE = [float("inf"), float("-inf"), float("nan"), 10**400, "1", None, True, [1.0]]
NOT_AN_INIT = ["gaussian", "Normal", "", None, 0, True, ["normal"]]
NOT_A_REGEX = ["(", "*", "[a", 5, None, b"to_q"]


def wrong(field: str, values: list[object], text: str) -> Iterator[object]:
    return (pytest.param({field: value}, text, id=f"{field}={value!r:.30}") for value in values)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        *wrong("a1", [value for value in NOT_A_FACTOR if value is not None], "two whole numbers of at least 1"),
        *wrong("a2", NOT_A_FACTOR, "two whole numbers of at least 1"),
        *wrong(
            "factor_pattern",
            [{"to_q": pair} for pair in NOT_A_PAIR],
            r"factor_pattern\['to_q'\] must be two whole",
        ),
        *wrong("factor_pattern", [None, 4, ["to_q"], [("to_q", 4, 64)], "to_q"], "must map regular expressions"),
        *wrong("factor_pattern", [{key: (4, 64)} for key in NOT_A_REGEX], "not a regular expression"),
        *wrong("alpha", NOT_FINITE, "alpha must be a finite number"),
        *wrong(
            "alpha_pattern",
            [{"to_q": value} for value in NOT_FINITE],
            r"alpha_pattern\['to_q'\] must be a finite",
        ),
        *wrong("alpha_pattern", [None, 1.0, ["to_q"]], "must map regular expressions to values"),
        *wrong("alpha_pattern", [{key: 1.0} for key in NOT_A_REGEX], "not a regular expression"),
        *wrong(
            "terms_pattern",
            [{"to_q": value} for value in (0, -1, 1.0, "2", True, None)],
            r"terms_pattern\['to_q'\] must be a whole number of at least 1",
        ),
        *wrong("terms_pattern", [None, 2, ["to_q"]], "terms_pattern must map regular expressions to values"),
        *wrong("terms_pattern", [{key: 2} for key in NOT_A_REGEX], "not a regular expression"),
        *wrong("dropout", ZERO_TO_ONE, "dropout must be at least 0 and below 1"),
        *wrong("init_a", NOT_AN_INIT, "init_a must be one of zeros, normal, normal_sqrt, kaiming_uniform, xavier"),
        *wrong("init_b", NOT_AN_INIT, "init_b must be one of zeros"),
        *wrong("init_a", ["zeros"], "both zeros: every gradient would be zero"),
        *wrong("init_weights", [1, 0, None, "yes"], "init_weights must be True or False"),
        *wrong("scaling", ["rank", None, 1], "scaling must be one of alpha, cdka"),
        *wrong("b1", [0, -1, 1.0, "2", True], "two whole numbers"),
        ({"b1": 2, "a1": 4}, r"a1 \(4\) and b1 \(2\) both say how many rows A has"),
        *wrong("num_terms", [0, -1, 1.0, "2", True, None], "num_terms must be a whole number"),
        *wrong("b_rank", [0, -1, 1.0, "2", True], "b_rank must be a whole number"),
        *wrong("layout", ["rows", None, 3], "layout must be one of"),
        *wrong("target_modules", [[], set(), "", ()], "target_modules is empty"),
        *wrong(
            "target_modules",
            [5, True, ["to_q", 5], [None], b"to_q"],
            "target_modules must be a list of names",
        ),
        *wrong("target_modules", ["(", "to_[q"], "not a regular expression"),
        *wrong("exclude_modules", [5, True, ["to_q", 5], [None]], "exclude_modules must be a list of names"),
        *wrong("exclude_modules", ["(", "to_[q"], "not a regular expression"),
        *wrong("modules_to_save", ["conv_in", 5, [5], [None]], "modules_to_save must be a list of names"),
        *wrong("layers_to_transform", [-1, "3", 1.5, True, [1, -1], [1.5], ["1"]], "layer indices of at least 0"),
        *wrong(
            "layers_pattern",
            ["blocks", ["blocks"]],
            "layers_pattern does nothing without layers_to_transform",
        ),
    ],
)
def test_a_wrong_value_is_refused_where_it_is_made_and_named(settings, text):
    with pytest.raises(ConfigError, match=text) as caught:
        KronAConfig(**settings)
    assert next(iter(settings)) in str(caught.value)


@pytest.mark.parametrize("pattern", [5, [5], "(", ["("]])
def test_a_wrong_list_name_for_the_layer_indices_is_refused(pattern):
    with pytest.raises(ConfigError, match="layers_pattern"):
        KronAConfig(layers_to_transform=[0], layers_pattern=pattern)


def test_layer_indices_beside_a_regular_expression_are_refused_because_they_would_do_nothing():
    with pytest.raises(ConfigError, match="layers_to_transform does nothing where target_modules is a regular"):
        KronAConfig(target_modules=r".*to_q", layers_to_transform=[0])
    KronAConfig(target_modules="all-linear", layers_to_transform=[0])


def test_a_config_error_can_be_caught_as_a_value_error():
    assert issubclass(ConfigError, KronAError)
    assert issubclass(KronAError, ValueError)


def test_the_defaults_are_the_papers_best_settings():
    config = KronAConfig()
    assert (config.a1, config.a2, config.alpha) == (4, 64, 1.0)
    assert (config.init_a, config.init_b) == ("normal", "zeros")
    assert config.dropout == 0.0


def test_the_default_target_is_attention_and_words_for_presets_stay_words():
    assert KronAConfig().target_modules == KronAConfig(target_modules=None).target_modules == "attention"
    for word in PRESETS:
        assert KronAConfig(target_modules=word).target_modules == word
        assert KronAConfig(target_modules=word, layers_to_transform=[0]).target_modules == word


@pytest.mark.parametrize("names", [["to_q", "to_k"], ("to_q", "to_k"), {"to_q", "to_k"}, frozenset({"to_q", "to_k"})])
def test_names_may_come_in_any_collection(names):
    config = KronAConfig(target_modules=names, exclude_modules=names, modules_to_save=names)
    assert config.target_modules == config.exclude_modules == set(names)
    assert isinstance(config.modules_to_save, list)
    assert sorted(config.modules_to_save) == ["to_k", "to_q"]


def test_both_factors_may_start_at_zero_if_init_weights_makes_them_random_anyway():
    assert KronAConfig(init_a="zeros", init_b="zeros", init_weights=False).init_a == "zeros"
    assert KronAConfig(init_a="zeros", init_b="normal").init_b == "normal"


def test_factors_of_a_pattern_become_a_tuple_as_json_has_only_lists():
    assert KronAConfig(factor_pattern={"to_q": [2, 32]}).factor_pattern == {"to_q": (2, 32)}
    assert isinstance(KronAConfig(factor_pattern={"to_q": [2, 32]}).factor_pattern["to_q"], tuple)


def test_mappings_and_numpy_floats_are_taken_as_what_they_stand_for(tmp_path):
    config = KronAConfig(
        alpha=np.float64(0.5),
        factor_pattern=MappingProxyType({"to_q": (2, 32)}),
        alpha_pattern=MappingProxyType({"to_q": 2.0}),
    )
    config.save_pretrained(tmp_path)
    assert KronAConfig.from_pretrained(tmp_path) == config


def test_a_config_is_not_tied_to_the_collections_it_was_made_from():
    factors, alphas, saved = {"to_q": (2, 32)}, {"to_q": 2.0}, ["conv_in"]
    config = KronAConfig(factor_pattern=factors, alpha_pattern=alphas, modules_to_save=saved)
    factors["("] = alphas["("] = None
    saved.append(5)
    assert (config.factor_pattern, config.alpha_pattern, config.modules_to_save) == (
        {"to_q": (2, 32)},
        {"to_q": 2.0},
        ["conv_in"],
    )


names = st.lists(st.text("abcdefghij_.0", min_size=1, max_size=8), min_size=1, max_size=4)
patterns = st.from_regex(r"\A[a-z_]{1,6}(\.\*)?\Z")
alphas = st.floats(-1e6, 1e6, allow_subnormal=False) | st.integers(-5, 5)
whole = st.integers(1, 128)
inits = st.sampled_from(["normal", "normal_sqrt", "kaiming_uniform", "xavier_uniform"])


@st.composite
def configs(draw: st.DrawFn) -> KronAConfig:
    layers = draw(st.none() | st.integers(0, 9) | st.lists(st.integers(0, 9), min_size=1, max_size=3))
    return KronAConfig(
        **{draw(st.sampled_from(["a1", "b1"])): draw(whole)},
        a2=draw(whole),
        scaling=draw(st.sampled_from(["alpha", "cdka"])),
        alpha=draw(alphas),
        num_terms=draw(whole),
        b_rank=draw(st.none() | whole),
        layout=draw(st.sampled_from(["kron", "transposed"])),
        target_modules=draw(st.none() | names | (patterns if layers is None else names.map(set))),
        exclude_modules=draw(st.none() | names | patterns),
        factor_pattern=draw(st.dictionaries(patterns, st.tuples(whole, whole), max_size=3)),
        alpha_pattern=draw(st.dictionaries(patterns, alphas, max_size=3)),
        terms_pattern=draw(st.dictionaries(patterns, whole, max_size=3)),
        dropout=draw(st.floats(0, 1, exclude_max=True)),
        init_a=draw(inits),
        init_b=draw(inits | st.just("zeros")),
        init_weights=draw(st.booleans()),
        layers_to_transform=layers,
        layers_pattern=None if layers is None else draw(st.sampled_from([None, "blocks", ["blocks", "layers"]])),
        modules_to_save=draw(st.none() | names | names.map(set)),
        inference_mode=draw(st.booleans()),
    )


@settings(deadline=None, max_examples=60)
@given(config=configs())
def test_a_saved_config_is_read_back_equal_and_saved_again_byte_for_byte(config, tmp_path_factory):
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    config.save_pretrained(first)
    read = KronAConfig.from_pretrained(first)
    assert read == config
    assert all(isinstance(pair, tuple) for pair in read.factor_pattern.values())
    # The first pattern that matches counts, so their order matters, though dictionaries compare without it.
    assert list(read.factor_pattern) == list(config.factor_pattern)
    assert list(read.alpha_pattern) == list(config.alpha_pattern)
    assert list(read.terms_pattern) == list(config.terms_pattern)
    read.save_pretrained(second)
    files = [(folder / "adapter_config.json").read_bytes() for folder in (first, second)]
    assert files[0] == files[1]
    assert json.loads(files[0])["peft_type"] == "KRONA"


def test_patterns_keep_their_order_through_a_file_because_the_first_match_counts(tmp_path):
    config = KronAConfig(
        factor_pattern={"to_q": (2, 2), ".*": (4, 4)},
        alpha_pattern={"to_q": 2.0, ".*": 3.0},
        terms_pattern={"to_q": 2, ".*": 3},
    )
    config.save_pretrained(tmp_path)
    read = KronAConfig.from_pretrained(tmp_path)
    assert list(read.factor_pattern.items()) == [("to_q", (2, 2)), (".*", (4, 4))]
    assert list(read.alpha_pattern.items()) == [("to_q", 2.0), (".*", 3.0)]
    assert list(read.terms_pattern.items()) == [("to_q", 2), (".*", 3)]


@settings(deadline=None, max_examples=60)
@given(names=names)
def test_equal_configs_are_saved_as_equal_bytes_whatever_order_their_names_came_in(names, tmp_path_factory):
    folders = [tmp_path_factory.mktemp("config") for _ in range(2)]
    for folder, ordered in zip(folders, (names, names[::-1]), strict=True):
        KronAConfig(target_modules=ordered, exclude_modules=set(ordered)).save_pretrained(folder)
    files = [(folder / "adapter_config.json").read_bytes() for folder in folders]
    assert files[0] == files[1]


def test_peft_reads_a_saved_config_as_ours(tmp_path):
    KronAConfig(a1=2, a2=8).save_pretrained(tmp_path)
    read = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(read, KronAConfig)
    assert (read.a1, read.a2) == (2, 8)


def test_a_wrong_value_in_a_saved_file_is_refused_when_it_is_read(tmp_path):
    KronAConfig().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"a1": 0}))
    with pytest.raises(ConfigError, match="two whole numbers"):
        KronAConfig.from_pretrained(tmp_path)
