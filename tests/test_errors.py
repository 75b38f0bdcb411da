"""Errors pickle, copy and print without losing what they say."""

from __future__ import annotations

import copy
import pickle

import pytest

from llmmw import errors
from llmmw.call import Attempt, Usage

ATTEMPTS = (Attempt("http://a", "server", 503, wait_s=0.5), Attempt("http://b", "server", 500))

SAMPLES = [
    errors.ConfigError("x"),
    errors.OrderError("x", rule="a-outside-b"),
    errors.MissingExtra("pip install x"),
    errors.RateLimited("x", retry_at=12.0, retry_after_s=2.0, attempts=ATTEMPTS),
    errors.CircuitOpen("x", retry_at=1.0),
    errors.QueueFull("x"),
    errors.DeadlineExceeded("x"),
    errors.Closed("x"),
    errors.StatusError("x", endpoint="e", status=429, code="c", fault="rate", retry_after_s=1.0, request_id="r"),
    errors.UpstreamTimeout("x", endpoint="e", sent=False),
    errors.ConnectionFailed("x"),
    errors.StaleConnection("x"),
    errors.AmbiguousOutcome("x"),
    errors.AmbiguousTimeout("x", endpoint="e"),
    errors.PoolTimeout("x"),
    errors.ProtocolError("x"),
    errors.TruncatedStream("x", partial="half", usage=Usage(3, 2, reported=True), attempts=ATTEMPTS),
    errors.DeadlineExceeded("x", sent=True, retry_at=3.0, attempts=ATTEMPTS),
    errors.ResponseTooLarge("x"),
    errors.StreamInterrupted("x", partial="half", endpoint="e"),
    errors.AllEndpointsFailed("x", [errors.StatusError("y", status=500), ValueError("z")], attempts=ATTEMPTS),
]


@pytest.mark.parametrize("error", SAMPLES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("clone", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy], ids=["pickle", "copy"])
def test_route_17_every_error_survives_a_copy(error, clone):
    found = clone(error)
    assert type(found) is type(error)
    assert found.message == error.message
    assert found.attempts == error.attempts
    plain = {name: value for name, value in vars(error).items() if name != "exceptions"}
    assert {name: vars(found)[name] for name in plain} == plain
    assert isinstance(found, errors.LLMMWError)


def test_the_tree_is_what_the_design_says():
    for refused in (errors.RateLimited, errors.CircuitOpen, errors.QueueFull, errors.DeadlineExceeded, errors.Closed):
        assert issubclass(refused, errors.Refused)
    for upstream in (
        errors.StatusError, errors.UpstreamTimeout, errors.ConnectionFailed, errors.StaleConnection,
        errors.AmbiguousOutcome, errors.ProtocolError, errors.ResponseTooLarge, errors.TruncatedStream,
        errors.StreamInterrupted,
    ):  # fmt: skip
        assert issubclass(upstream, errors.UpstreamError)
    assert issubclass(errors.MissingExtra, ImportError)
    assert issubclass(errors.AllEndpointsFailed, ExceptionGroup)


def test_a_group_splits_into_groups_of_its_kind():
    group = SAMPLES[-1]
    status, rest = group.split(errors.StatusError)
    assert isinstance(status, errors.AllEndpointsFailed)
    assert isinstance(rest, errors.AllEndpointsFailed)
    assert status.attempts == ATTEMPTS
    assert len(rest.exceptions) == 1


def every_class(root):
    return {root}.union(*(every_class(one) for one in root.__subclasses__() if one.__module__ == "llmmw.errors"))


def test_route_17_no_error_class_is_left_out():
    assert every_class(errors.LLMMWError) - {errors.LLMMWError, errors.Refused, errors.UpstreamError} == {
        type(error) for error in SAMPLES
    }


@pytest.mark.parametrize("error", SAMPLES, ids=lambda error: type(error).__name__)
def test_route_17_notes_survive_a_pickle_and_causes_stay_behind(error):
    error = copy.copy(error)
    error.add_note("a note")
    try:
        raise error from ValueError("the cause")
    except errors.LLMMWError as caught:
        found = pickle.loads(pickle.dumps(caught))
    assert found.__notes__ == ["a note"]
    assert found.__cause__ is None
    assert found.__traceback__ is None


class Unpicklable(Exception):
    def __init__(self, message, *, response):
        super().__init__(message)
        self.response = response


class Speechless(Unpicklable):
    def __str__(self):
        raise RuntimeError


def test_route_17_group_pickles_whatever_is_in_it():
    members = [
        Unpicklable("the SDK's own " + "x" * 9999, response=lambda: 0),
        Speechless("x", response=1),
        ValueError("y"),
    ]
    group = errors.AllEndpointsFailed("all failed", members, attempts=ATTEMPTS)
    group.add_note("a note")
    found = pickle.loads(pickle.dumps(group))
    assert (found.message, found.attempts, found.__notes__) == ("all failed", ATTEMPTS, ["a note"])
    assert [type(error) for error in found.exceptions] == [errors.UpstreamError, errors.UpstreamError, ValueError]
    assert str(found.exceptions[0]).startswith("Unpicklable: the SDK's own x")
    assert len(str(found.exceptions[0])) < 600
    assert str(found.exceptions[1]) == "Speechless: without words"
