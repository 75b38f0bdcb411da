"""What servers say about their limits, and what they send instead."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmmw.algo.headers import MAX_WAIT_S, NO_FEEDBACK, Feedback, Reading, duration, feedback, retry_after

WALL = 1_800_000_000.0  # Fri, 15 Jan 2027 08:00:00 GMT
DATE = ("date", "Fri, 15 Jan 2027 08:00:00 GMT")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("6m0s", 360.0),
        ("12ms", 0.012),
        ("1s", 1.0),
        ("1h2m3.5s", 3723.5),
        ("45.8379s", 45.8379),
        (" 7 ", 7.0),
        ("1e2", 100.0),
        ("-5", -5.0),
        ("", None),
        ("inf", None),
        ("nan", None),
        ("1e309", None),
        ("1_000", None),
        ("٣", None),
        ("1s garbage", None),
        ("s", None),
        ("1s1", None),
        ("9" * 100, None),
    ],
)
def test_limit_08_durations_are_parsed_or_refused(text, expected):
    found = duration(text)
    assert found == (expected if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([("retry-after", "7")], 7.0),
        ([("retry-after", "1.5")], 1.5),
        ([("retry-after", "6m0s")], 360.0),
        ([("retry-after-ms", "250"), ("retry-after", "1")], 0.25),
        ([("retry-after-ms", "junk"), ("retry-after", "1")], 1.0),
        ([("retry-after-ms", "0"), ("retry-after", "1")], 1.0),
        ([("retry-after", "999999")], MAX_WAIT_S),
        ([("retry-after", "1"), ("retry-after", "9")], 1.0),
        ([("retry-after", "")], None),
        ([("retry-after", "0")], None),
        ([("retry-after", "-5")], None),
        ([("retry-after", "inf")], None),
        ([("retry-after", "NaN")], None),
        ([("retry-after", "1e309")], None),
        ([("retry-after", "x" * 1000)], None),
        ([("retry-after", "Fri, 99 Xxx 2027 08:00:00 GMT")], None),
        ([], None),
    ],
)
def test_limit_08_retry_after_is_a_usable_wait_or_none(headers, expected):
    assert retry_after(headers, None, WALL) == expected


def test_limit_08_dates_are_read_against_the_servers_own_clock():
    skewed = ("date", "Fri, 15 Jan 2027 07:00:00 GMT")
    at = ("retry-after", "Fri, 15 Jan 2027 07:00:30 GMT")
    assert retry_after([at, skewed], None, WALL) == 30.0
    assert retry_after([("retry-after", "2027-01-15T08:00:30Z")], None, WALL) == 30.0
    assert retry_after([("retry-after", "2027-01-15T08:00:30"), ("date", "junk")], None, WALL) == 30.0


def test_route_20_date_just_past_gives_no_wait():
    assert retry_after([("retry-after", "Fri, 15 Jan 2027 08:00:00 GMT")], None, WALL + 0.001) is None
    assert retry_after([("retry-after", "Fri, 15 Jan 2027 08:00:00 GMT"), DATE], None, WALL) is None


def test_limit_08_gemini_retry_info_is_found_in_the_body():
    details = [
        {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": []},
        {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "45.837906927s"},
    ]
    body = {"error": {"code": 429, "details": details}}
    assert retry_after([], body, WALL) == pytest.approx(45.837906927)
    assert retry_after([], [body], WALL) == pytest.approx(45.837906927)
    assert retry_after([("retry-after", "3")], body, WALL) == 3.0


@pytest.mark.parametrize(
    "body", [None, [], [1], 5, "x", {"error": "x"}, {"error": {"details": [1, {"retryDelay": 3}]}}]
)
def test_limit_08_other_bodies_give_no_wait(body):
    assert retry_after([], body, WALL) is None


def test_limit_08_openai_headers():
    headers = [
        ("x-ratelimit-limit-requests", "60"),
        ("x-ratelimit-remaining-requests", "59"),
        ("x-ratelimit-reset-requests", "1s"),
        ("x-ratelimit-limit-tokens", "150000"),
        ("x-ratelimit-remaining-tokens", "149984"),
        ("x-ratelimit-reset-tokens", "6m0s"),
        ("content-type", "application/json"),
    ]
    found = feedback(headers, WALL)
    assert found == Feedback((Reading("requests", 60, 59, 1.0), Reading("tokens", 150000, 149984, 360.0)), 0)


def test_limit_08_anthropic_resets_are_dates_with_clock_skew():
    headers = [
        ("date", "Fri, 15 Jan 2027 07:00:00 GMT"),
        ("anthropic-ratelimit-input-tokens-limit", "50000"),
        ("anthropic-ratelimit-input-tokens-remaining", "1000"),
        ("anthropic-ratelimit-input-tokens-reset", "2027-01-15T07:00:42Z"),
        ("anthropic-ratelimit-output-tokens-reset", "2027-01-15T05:00:00Z"),
        ("anthropic-ratelimit-unified-status", "allowed"),
    ]
    assert feedback(headers, WALL) == Feedback((Reading("input_tokens", 50000, 1000, 42.0),), 1)


def test_limit_08_azure_nonsense_is_ignored_and_counted():
    headers = [
        ("x-ratelimit-limit-requests", "60"),
        ("x-ratelimit-limit-requests", "90"),
        ("x-ratelimit-remaining-requests", "-1"),
        ("x-ratelimit-reset-requests", "0"),
        ("x-ratelimit-limit-tokens", "1e309"),
        ("x-ratelimit-reset-tokens", ""),
    ]
    assert feedback(headers, WALL) == Feedback((Reading("requests", 60),), 4)


def test_responses_without_limit_headers_cost_nothing():
    assert feedback([DATE, ("server", "uvicorn")], WALL) is NO_FEEDBACK
    assert feedback([], WALL) is NO_FEEDBACK
    assert feedback([("x-ratelimit-limit-images", "5"), ("x-ratelimit-resource", "core")], WALL) == Feedback()


@settings(max_examples=150, derandomize=True, deadline=None)
@given(text=st.text(max_size=80), date=st.text(max_size=40), body=st.recursive(st.none() | st.text(), st.lists))
def test_no_text_makes_the_parsers_raise_or_leave_their_bounds(text, date, body):
    headers = [("retry-after", text), ("date", date), ("x-ratelimit-reset-tokens", text), ("retry-after-ms", text)]
    wait = retry_after(headers, body, WALL)
    assert wait is None or 0 < wait <= MAX_WAIT_S
    for reading in feedback(headers, WALL).readings:
        assert reading.reset_s is None or 0 < reading.reset_s <= MAX_WAIT_S
