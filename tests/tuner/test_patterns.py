"""How long matching a config's regular expressions may take: never counted too low, and what is usual passes."""

import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusekrona.errors import ConfigError
from diffusekrona.tuner.patterns import (
    LONGEST_PATTERNS,
    MOST_STEPS,
    _Counting,
    _most_ways,
    _parsed,
    check_expressions,
    check_matching,
    first_match,
)

BLOCKS = (
    "down_blocks.1.attentions.0",
    "down_blocks.2.attentions.1",
    "mid_block.attentions.0",
    "up_blocks.0.attentions.2",
)
NAMES = [
    f"{block}.transformer_blocks.{i}.{attention}.{layer}"
    for block in BLOCKS
    for i in range(10)
    for attention in ("attn1", "attn2")
    for layer in ("to_q", "to_k", "to_v", "to_out.0")
] + [f"add_embedding.linear_{i}" for i in range(700)]
"""As long, and with the others as many, as those of a large UNet."""


@pytest.mark.parametrize(
    "pattern",
    [
        "to_q",
        "attn1.to_q|attn2.to_k",
        r".*attn\d\.to_(q|k|v)",
        r"(\w+\.)*to_q",
        r"([a-z_]+\d*\.|\d+\.)+to_q",
        r".*(down|up)_blocks.*attn2.*to_(q|k|v)",
        r"^(?!.*attn2).*to_q$",
        r"(?<=x)?mid_block\..*",
        r"(down_blocks\.(?P<n>\d)\.)?.*\.to_out\.0",
        r"(?:.*?(?:down|up|mid).*?(?:self_attn|attn|ff).*?(?:to_q|to_k|proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.x)",
        r"[^.]+(\.[^.]+){2,7}",
        "|".join(map(re.escape, NAMES)),
        "|".join(f"({re.escape(name)})" for name in NAMES),
    ],
)
def test_usual_expressions_may_be_matched(pattern: str) -> None:
    check_expressions("factor_pattern", [pattern])
    check_matching(NAMES, endings=[pattern])
    check_matching(NAMES, whole=[pattern])


def test_one_pattern_for_each_layer_may_be_matched() -> None:
    patterns = [re.escape(name) for name in NAMES]
    check_expressions("alpha_pattern", patterns)
    check_matching(NAMES, endings=patterns)


@pytest.mark.parametrize(
    "pattern",
    [
        "(.+)+,", "(.*)*,", r"(\w+)*,", r"(\w+\.?)*,", r"(\w{1,2}\.?)*,", ".*" * 20 + ",", r"((\w|\.)+;?)+,",
        "(?i)(.+)+,", "(?i:(.+))+,", r"(?=(.+)+,)x", r"(?!(.+)+,)x", r"(.)?(?(1)(.+)+|x),", r"(.+)(\1|.)*,",
        *(["(?>(.+)+,)"] if sys.version_info >= (3, 11) else []), "(?:){4000000000},", "(a?){4000000000},",
        "(.+)+,|(.+)+,", r"(\S+\s*)+,", r"([^,]+[^;]*)+,",
    ],
)  # fmt: skip
def test_expressions_that_would_take_for_ever_are_refused(pattern: str) -> None:
    for arguments in ({"whole": [pattern]}, {"endings": [pattern]}):
        with pytest.raises(ConfigError, match="could take all too long to match"):
            check_matching(NAMES, **arguments)


def test_very_many_expressions_or_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="could take all too long"):
        check_matching(["x" * 100] * 1000, endings=[rf"x{number}.*" for number in range(10_000)])
    with pytest.raises(ConfigError, match="names 200,000 layers"):
        check_matching(NAMES, plain=200_000)
    check_matching(NAMES, plain=2 * len(NAMES))
    check_matching([], whole=["(.+)+,"])


@pytest.mark.parametrize("pattern", ["(", "a{99999999999999999999}", "(" * 100_000 + ")" * 100_000, "[", "*"])
def test_what_is_no_expression_is_named(pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"alpha_pattern has '.*, which is not a regular expression") as raised:
        check_expressions("alpha_pattern", ["x", pattern])
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("pattern", ["(?i)to_q", "(?P<idx>to_q)"])
def test_what_does_not_fit_into_pefts_own_expression_is_named(pattern: str) -> None:
    check_expressions("target_modules", [pattern], whole=True)
    with pytest.raises(ConfigError, match="not a regular expression that can be used"):
        check_expressions("alpha_pattern", [pattern])


def test_more_characters_than_all_layers_need_are_refused() -> None:
    check_expressions("alpha_pattern", ["x" * (LONGEST_PATTERNS // 1000)] * 1000)
    with pytest.raises(ConfigError, match="alpha_pattern has 1,000,001 characters"):
        check_expressions("alpha_pattern", ["x" * LONGEST_PATTERNS, "x"])


def test_the_first_pattern_that_matches_counts() -> None:
    patterns = [r"mid\.\d+", "to_q", "^up.to_q", "x|y"]
    names = {"mid.1": r"mid\.\d+", "a.mid.1": r"mid\.\d+", "up.to_q": "to_q", "a.y": "x|y", "to_qq": "to_qq", "z": "z"}
    assert {name: first_match(patterns, name) for name in names} == names


letters = st.sampled_from([*"abAB1_.", r"\.", r"\d", r"\w", r"\W", r"\s", "[ab]", "[^a]", "[a-c1]", r"[^\w.]", "é"])
expressions = st.recursive(
    letters,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"(?:{two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{2}", "{1,2}", "{0,3}?"])).map(
            lambda parts: f"(?:{parts[0]}){parts[1]}"
        ),
        inner.map(lambda text: f"(?={text})"),
        inner.map(lambda text: f"(?!{text})"),
        inner.map(lambda text: f"(?i:{text})"),
        inner.map(lambda text: rf"({text})"),
    ),
    max_leaves=8,
)


@given(expression=expressions, name=st.text("abAB1_.é", max_size=8), any_case=st.booleans())
def test_every_way_that_re_goes_is_counted(expression: str, name: str, any_case: bool) -> None:
    """Where `re` matches, from each start, the count has a way to the same end, and no more than the bound."""
    expression = f"(?i){expression}" if any_case else expression
    found = re.match(expression, name)
    ends = _Counting(name, MOST_STEPS).through(_parsed(expression), {0: 1})
    assert found is None or ends.get(found.end(), 0) >= 1
    assert sum(ends.values()) <= max(_most_ways(_parsed(expression), len(name)), 0)


@given(name=st.text("ab", max_size=12), most=st.integers(1, 4))
def test_ways_are_counted_exactly(name: str, most: int) -> None:
    """(a|ab|b){0,most} as a recursion."""

    def ways(at: int, left: int) -> dict[int, int]:
        found = {at: 1}
        for option in ("a", "ab", "b"):
            if left and name.startswith(option, at):
                for end, count in ways(at + len(option), left - 1).items():
                    found[end] = found.get(end, 0) + count
        return found

    assert _Counting(name, MOST_STEPS).through(_parsed(f"(?:a|ab|b){{0,{most}}}"), {0: 1}) == ways(0, most)
