"""A setting that cannot work fails when it is built, naming option, value and what is allowed."""

from __future__ import annotations

import pytest

from llmmw.errors import ConfigError, LLMMWError
from llmmw.settings import choice, number, positive_seconds, seconds, settings, whole


@settings
class Sample:
    """Settings for the tests."""

    ttl: float | str = 60
    size: int = 1

    def __post_init__(self):
        positive_seconds("Sample(ttl=)", self.ttl)
        whole("Sample(size=)", self.size)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("250ms", 0.25), ("10m", 600), ("12h", 43200), ("1h30m", 5400), ("1w", 604800), ("2.5s", 2.5), ("7", 7), (3, 3)],
)
def test_durations_are_seconds_or_text(text, expected):
    assert seconds("x", text) == expected


@pytest.mark.parametrize(
    "wrong", ["", "abc", "10 parsecs", "5m!", "-1s", -1, float("nan"), float("inf"), True, None, []]
)
def test_what_is_no_duration_is_refused(wrong):
    with pytest.raises(ConfigError, match="x="):
        seconds("x", wrong)


def test_settings_are_frozen_comparable_and_printable():
    assert Sample(5) == Sample(ttl=5)
    assert repr(Sample(5)) == "Sample(ttl=5, size=1)"
    assert hash(Sample(5)) == hash(Sample(5))
    with pytest.raises(AttributeError):
        Sample().ttl = 3


def test_an_unknown_option_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"unexpected keyword argument 'sise' \(options: ttl, size\)"):
        Sample(sise=3)
    with pytest.raises(ConfigError, match="positional"):
        Sample(1, 2, 3)


def test_a_wrong_value_names_option_value_and_bounds():
    with pytest.raises(ConfigError, match=r"Sample\(ttl=0\): must be greater than 0"):
        Sample(ttl=0)
    with pytest.raises(ConfigError, match=r"Sample\(size=1.5\): must be a whole number, at least 1"):
        Sample(size=1.5)
    with pytest.raises(ConfigError, match="one of 'a', 'b'"):
        choice("x", "c", ["a", "b"])
    with pytest.raises(ConfigError, match="greater than 0 and at most 1"):
        number("x", 0, high=1, open_low=True)
    assert number("x", 0.5, high=1) == 0.5
    assert choice("x", "a", ["a"]) == "a"
    for wrong in (float("nan"), "1", None, True, 2):
        with pytest.raises(ConfigError):
            number("x", wrong, high=1)


def test_a_config_error_is_also_a_value_error():
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, LLMMWError)
