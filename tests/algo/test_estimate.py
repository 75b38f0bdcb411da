"""Token estimates."""

import pytest

from llmmw.algo.estimate import LearnedOutput, choices, output_cap, prompt_tokens


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        ({"messages": [{"role": "user", "content": "x" * 40}]}, 14),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "abcd"}]}]}, 6),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:..."}}]}]}, 1004),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{"function": {"x": "y" * 8}}]}]}, 6),
        ({"messages": [[{"role": "user", "content": "abcd"}], [{"role": "user", "content": "abcd"}]]}, 10),
        ({"prompt": "x" * 400}, 100),
        ({"prompt": [1, 2, 3, 4]}, 4),
        ({"prompt": ["abcd", "abcd"]}, 2),
        ({"input": "abcd", "model": "ignored"}, 1),
        ({"prompt": "日本語で"}, 3),
        ({"question": "abcdefgh", "n": 3}, 2),
        ({}, 0),
    ],
)  # fmt: skip
def test_a_quarter_of_the_characters_and_a_little_per_message(payload, expected):
    assert prompt_tokens(payload) == expected


def test_endless_nesting_is_cut_off():
    deep = "x" * 400
    for _ in range(5000):
        deep = [deep]
    assert prompt_tokens({"prompt": deep}) == 0


def test_output_cap_and_number_of_answers():
    assert output_cap({"max_tokens": 5}) == 5
    assert output_cap({"max_completion_tokens": 7, "max_tokens": None}) == 7
    assert output_cap({"max_tokens": True}) is None
    assert output_cap({"max_tokens": -1}) is None
    assert choices({"n": 3, "prompt": ["a", "b"]}) == 6
    assert choices({"messages": [[{}], [{}]]}) == 2
    assert choices({"messages": [{}], "n": 0}) == 1
    assert choices({"prompt": [1, 2]}) == 1


def test_output_is_expected_at_the_90th_percentile_of_the_last_64():
    learned = LearnedOutput()
    assert learned.expect(None) == 512
    assert learned.expect(100) == 100
    assert learned.expect(100_000) == 100_000
    for _ in range(200):
        learned.learn(1000)
    for tokens in range(1, 65):
        learned.learn(tokens)
    assert learned.expect(None) == 58
    assert learned.expect(10) == 10
