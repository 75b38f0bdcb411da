"""What a vLLM server says about its load, in every spelling, and what is no figure."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmmw.algo.headers import Feedback, feedback
from llmmw.algo.load import LOAD_HEADER, NO_LOAD, Load, load_of_header, load_of_metrics

PAGE = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="t}iny {1"} 2.0
vllm:num_requests_running{engine="1",model_name="tiny"} 3.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 100.0
vllm:num_requests_waiting{engine="0"} 7.0
vllm:prefix_cache_queries_created{engine="0"} 1.79e+09
"""
NEW = """\
vllm:kv_cache_usage_perc{engine="0"} 0.25
vllm:kv_cache_usage_perc{engine="1"} 0.5
vllm:prefix_cache_queries_total{engine="0"} 2000.0
vllm:prefix_cache_hits_total{engine="0"} 1500.0
vllm:external_prefix_cache_hits_total{engine="0"} 3.0
"""
OLD = """\
vllm:gpu_cache_usage_perc{model_name="m"} 0.5 1700000000000\r
vllm:gpu_prefix_cache_queries{model_name="m"} 2000
vllm:gpu_prefix_cache_hits{model_name="m"} 1.5e3
"""


@pytest.mark.parametrize("page", [PAGE + NEW, OLD + PAGE, PAGE + NEW + OLD], ids=["new", "old", "both"])
def test_old_and_new_names_on_the_metrics_page(page):
    load = load_of_metrics(page)
    assert load == Load(running=5, waiting=7, kv_cache_usage=0.5, prefix_queries=2000, prefix_hits=1500)
    assert load.prefix_hit_rate == 0.75


def test_a_page_of_somebody_else_says_nothing():
    assert load_of_metrics("") == load_of_metrics("<html>no</html>") == NO_LOAD
    assert load_of_metrics("sglang:num_requests_waiting 3\nvllm:num_requests_waiting NaN\n") == NO_LOAD
    assert NO_LOAD.prefix_hit_rate is None
    assert (
        load_of_metrics("vllm:prefix_cache_queries_total 0\nvllm:prefix_cache_hits_total 0\n").prefix_hit_rate is None
    )


@pytest.mark.parametrize(
    "value",
    [
        'JSON {"named_metrics": {"num_requests_waiting": 3.0, "kv_cache_usage_perc": 0.25}}',
        'json {"named_metrics": {"num_requests_waiting": 3, "gpu_cache_usage_perc": 0.25}, "cpu_utilization": 0.1}',
        "TEXT named_metrics.num_requests_waiting=3.0, named_metrics.kv_cache_usage_perc=0.25",
        "TEXT num_requests_waiting = 3,kv_cache_usage_perc= 2.5e-1",
    ],
)
def test_the_header_in_both_formats(value):
    assert load_of_header(value) == Load(waiting=3, kv_cache_usage=0.25)


@pytest.mark.parametrize(
    "value",
    [
        "", "JSON", "JSON {", "JSON []", 'JSON {"named_metrics": []}', "BIN CiQ=", "TEXT", "TEXT nonsense", "3",
        'JSON {"named_metrics": {"num_requests_waiting": -1, "kv_cache_usage_perc": "0.5"}}',
        'JSON {"named_metrics": {"num_requests_waiting": true, "kv_cache_usage_perc": 1e300}}',
        'JSON {"named_metrics": {"num_requests_waiting": NaN}}', "JSON " + "[" * 4000, "\udcff",
        "TEXT num_requests_waiting=1e999", "TEXT num_requests_waiting=1-1",
    ],
)  # fmt: skip
def test_what_cannot_be_read_says_nothing(value):
    assert load_of_header(value) == NO_LOAD


PARTS = ["vllm:", "num_requests_waiting", "{", "}", " ", "1", "\n", "e", "=", "_total"]


@settings(max_examples=100, derandomize=True, deadline=None)
@given(text=st.text(max_size=200), page=st.lists(st.sampled_from(PARTS), max_size=40).map("".join))
def test_nothing_makes_it_raise_or_go_below_zero(text, page):
    for load in (load_of_header(text), load_of_header("TEXT " + page), load_of_metrics(page)):
        assert all(value is None or value >= 0 for value in (load.running, load.waiting, load.kv_cache_usage))


def test_the_queue_is_told_with_the_rate_limits_or_alone():
    told = (LOAD_HEADER, "TEXT num_requests_waiting=4")
    assert feedback([told], 0.0) == Feedback(waiting=4)
    both = feedback([("x-ratelimit-limit-requests", "10"), told, (LOAD_HEADER, "TEXT num_requests_waiting=9")], 0.0)
    assert (both.waiting, both.readings[0].limit) == (4, 10)
    assert feedback([(LOAD_HEADER, "garbage")], 0.0) == Feedback()
