r"""A config's regular expressions, which come with files: what they match, and that matching them ends.

Python's `re` goes back and tries the next way wherever a match fails, and nothing stops it: `(a+)+b` goes 2ⁿ ways
through n letters a. So before expressions meet the names of a model or a file, `check_matching` counts the ways, and
refuses those that have too many for these very names. What is usual, such as `.*attn\d\.to_(q|k)` or `(\w+\.)*to_q`,
has some hundred, and what could be trained here can be loaded.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable
from functools import lru_cache
from itertools import accumulate
from typing import Any

from ..errors import ConfigError
from .compat import parsed_expression

MOST_STEPS = 100_000_000
"""For all expressions and names of a config: some seconds."""

LONGEST_PATTERNS = 1_000_000
"""Characters of all patterns of one field; one that names each of a thousand layers has 100,000."""

_COUNTED = 10  # counting a step takes at least as long as so many steps
_Places = dict[int, int]  # position in a name → how many ways lead there


class _TooMany(Exception):
    pass


def first_match(patterns: Iterable[str], name: str) -> str:
    """The first pattern that matches a layer's name or its dotted suffix; the name itself if none does, as in PEFT."""
    return next((pattern for pattern in patterns if _compiled(pattern).match(name)), name)


@lru_cache(maxsize=20_000)  # re keeps 512, and some files have a pattern for each layer
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def check_expressions(field: str, expressions: Collection[str], whole: bool = False) -> None:
    """Raise `ConfigError` for what is no regular expression, or for more of them than a config can have a use for.

    Args:
        field: of the config.
        expressions: its patterns.
        whole: whether they have to match whole names, as they are; PEFT puts others into an expression of its own.
    """
    length = sum(map(len, expressions))
    if length > LONGEST_PATTERNS:
        raise ConfigError(f"{field} has {length:,} characters of patterns, and {LONGEST_PATTERNS:,} is the most.")
    for expression in expressions:
        try:
            re.compile(expression)
            if not whole:  # a flag would have to come first, and the name of a group may be taken
                with warnings.catch_warnings():
                    warnings.simplefilter("error", DeprecationWarning)  # which is all that Python 3.10 says of flags
                    re.compile(rf"(.*\.)?({expression})$(?P<idx>)")
        except (re.error, OverflowError, RecursionError, DeprecationWarning) as error:
            raise ConfigError(
                f"{field} has {_short(expression)}, which is not a regular expression that can be used: {error}."
            ) from error


def check_matching(
    names: Collection[str], whole: Collection[str] = (), endings: Collection[str] = (), plain: int = 0
) -> None:
    """Raise `ConfigError` if matching could take all too long.

    Args:
        names: of layers.
        whole: expressions that each name is matched against.
        endings: expressions that each name and each of its dotted suffixes is matched against.
        plain: how many names, without expressions, each name is compared with.
    """
    left = MOST_STEPS - plain * len(names)
    if left < 0:
        raise ConfigError(f"the config names {plain:,} layers, more than a model could have.")
    longest = max(map(len, names), default=0)
    starts = 1 + max((name.count(".") for name in names), default=0)
    for expressions, by_suffix in ((whole, False), (endings, True)):
        for expression in expressions:
            bound = _most_ways(_parsed(expression), longest) * len(names) * (starts if by_suffix else 1)
            if bound <= left:
                left -= bound
                continue
            for name in names:
                left -= _COUNTED * _steps(expression, name, by_suffix)
                if left < 0:
                    raise ConfigError(
                        f"the regular expression {_short(expression)} could take all too long to match; write it "
                        "without repetitions within repetitions, or as a list of names."
                    )


def _short(text: str) -> str:
    return repr(text if len(text) <= 200 else f"{text[:200]}…")


@lru_cache(maxsize=64)
def _parsed(expression: str) -> Any:
    return parsed_expression(expression)


def _most_ways(items: Any, longest: int) -> int:
    """At least the ways through any name of so many characters; more than `MOST_STEPS` where only the name tells."""
    ways = 1
    for item, value in items:
        kind = str(item)
        if kind == "BRANCH":
            ways *= sum(_most_ways(branch, longest) for branch in value[1])
        elif kind == "SUBPATTERN":
            ways *= _most_ways(value[-1], longest)
        elif kind.endswith("_REPEAT"):
            least, most, body = value
            inside = _most_ways(body, longest)
            if most == 1:
                ways *= inside + (least == 0)
            elif inside == 1 and body.getwidth() == (1, 1) and least <= longest:
                ways *= min(int(most), longest) - least + 1
            else:
                return MOST_STEPS + 1
        elif kind not in ("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT"):
            return MOST_STEPS + 1
        if ways > MOST_STEPS:
            return ways
    return ways


@lru_cache(maxsize=1 << 16)
def _steps(expression: str, name: str, by_suffix: bool) -> int:
    """Steps of a matcher that tries every way through a name; more than `MOST_STEPS` if they could not be counted."""
    counting = _Counting(name, MOST_STEPS // _COUNTED)
    starts = {0: 1} | ({at + 1: 1 for at, letter in enumerate(name) if letter == "."} if by_suffix else {})
    try:
        counting.through(_parsed(expression), starts)
    except (_TooMany, RecursionError):
        return MOST_STEPS + 1
    return MOST_STEPS // _COUNTED - counting.left


class _Counting:
    """Goes all ways through a name at once, counting those that lead to each position."""

    def __init__(self, name: str, limit: int) -> None:
        self.name, self.left, self.any_case = name, limit, False
        self._ends: dict[tuple[int, bool], list[int]] = {}

    def through(self, items: Any, places: _Places) -> _Places:
        self.any_case |= bool(items.state.flags & re.IGNORECASE)
        for item, value in items:
            self._spend(places)
            if not places:
                break
            places = self._item(str(item), value, places)
        return places

    def _spend(self, places: _Places) -> None:
        self.left -= 1 + sum(places.values())
        if self.left < 0:
            raise _TooMany

    def _item(self, kind: str, value: Any, places: _Places) -> _Places:
        if kind in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            end = len(self.name)
            return {at + 1: ways for at, ways in places.items() if at < end and self._takes(kind, value, self.name[at])}
        if kind == "BRANCH":
            return self._together(self.through(branch, places) for branch in value[1])
        if kind == "SUBPATTERN":
            self.any_case |= bool(value[1] & re.IGNORECASE)
            return self.through(value[-1], places)
        if kind == "ATOMIC_GROUP":
            return self.through(value, places)
        if kind.endswith("_REPEAT"):
            least, most, body = value
            return self._repeated(least, most, body, places)
        if kind in ("ASSERT", "ASSERT_NOT"):
            direction, inside = value
            back = inside.getwidth()[0] if direction < 0 else 0
            self.through(inside, {at - back: ways for at, ways in places.items() if at >= back})
            return places
        if kind == "GROUPREF_EXISTS":
            _, yes, no = value
            return self._together([self.through(yes, places), places if no is None else self.through(no, places)])
        if kind == "GROUPREF":  # may be any text
            ends = range(len(self.name) + 1)
            return self._together({end: ways for end in ends if end >= at} for at, ways in places.items())
        return {} if kind == "FAILURE" else places  # AT

    def _repeated(self, least: int, most: int, body: Any, places: _Places) -> _Places:
        if len(body) == 1 and str(body[0][0]) in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            found = self._run(least, int(most), body, places)
            self._spend(found)
            return found
        if least > len(self.name) + 1000:
            raise _TooMany  # of nothing, since there are not so many letters
        found = dict(places) if least == 0 else {}
        # What matches nothing is not repeated further than it has to be.
        for time in range(1, min(int(most), least + len(self.name) + 1) + 1):
            self._spend(places)
            places = self.through(body, places)
            if not places:
                break
            if time >= least:
                for at, ways in places.items():
                    found[at] = found.get(at, 0) + ways
        return found

    def _run(self, least: int, most: int, body: Any, places: _Places) -> _Places:
        """Ways through one letter's repetitions, by where they begin to differ and where they end."""
        length, key = len(self.name), (id(body), self.any_case)
        if key not in self._ends:
            (kind, value), ends = body[0], [length] * (length + 1)
            for at in reversed(range(length)):
                ends[at] = ends[at + 1] if self._takes(str(kind), value, self.name[at]) else at
            self._ends[key] = ends
        ends = self._ends[key]
        changes = [0] * (length + 2)
        for at, ways in places.items():
            last = min(ends[at], at + most)
            if at + least <= last:
                changes[at + least] += ways
                changes[last + 1] -= ways
        return {at: ways for at, ways in enumerate(accumulate(changes)) if ways}

    def _takes(self, kind: str, value: Any, letter: str) -> bool:
        if kind == "ANY":
            return True
        letters = {letter, letter.lower(), letter.upper(), letter.upper().lower()} if self.any_case else {letter}
        taken = [_is_in(value, one) if kind == "IN" else one == chr(value) for one in letters if len(one) == 1]
        return not all(taken) if kind == "NOT_LITERAL" else any(taken)

    @staticmethod
    def _together(several: Iterable[_Places]) -> _Places:
        found: _Places = {}
        for places in several:
            for at, ways in places.items():
                found[at] = found.get(at, 0) + ways
        return found


_CATEGORIES = {
    "CATEGORY_DIGIT": r"\d",
    "CATEGORY_NOT_DIGIT": r"\D",
    "CATEGORY_SPACE": r"\s",
    "CATEGORY_NOT_SPACE": r"\S",
    "CATEGORY_WORD": r"\w",
    "CATEGORY_NOT_WORD": r"\W",
}


@lru_cache(maxsize=4096)
def _is_of_category(category: str, letter: str) -> bool:
    return bool(re.fullmatch(_CATEGORIES[category], letter))


def _is_in(items: list[tuple[Any, Any]], letter: str) -> bool:
    found, negated = False, False
    for item, value in items:
        kind = str(item)
        if kind == "NEGATE":
            negated = True
        elif kind == "CATEGORY":
            found |= _is_of_category(str(value), letter)
        else:
            first, last = value if kind == "RANGE" else (value, value)
            found |= first <= ord(letter) <= last
    return found != negated
