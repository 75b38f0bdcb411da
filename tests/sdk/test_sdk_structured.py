"""Structured outputs: a schema in `create()`, the SDKs' `parse` and stream helpers, over every edge.

`wrap_client` takes over `create()` alone, so what does not call it reaches the server each time (`edges/sdk.py`).
"""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import BaseModel

from llmmw import Coalescer, Stack, TTLCache

CACHED = Stack(TTLCache(300), Coalescer())
only = pytest.mark.only


class Place(BaseModel):
    north: float
    east: float


class City(BaseModel):
    name: str
    people: int
    size: Literal["small", "large"]
    place: Place
    mayor: str | None
    twins: list[str]


def schema_of(driver, model):
    """`create()`'s argument that asks for this schema."""
    schema = model.model_json_schema()
    if driver.sdk == "openai":
        return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}}
    return {"output_config": {"format": {"type": "json_schema", "schema": schema}}}


def model_of(driver, model):
    """The helpers' argument that asks for this model."""
    return {"response_format" if driver.sdk == "openai" else "output_format": model}


def parsed_of(driver, answer):
    return answer.choices[0].message.parsed if driver.sdk == "openai" else answer.parsed_output


async def test_structured_outputs_of_create_satisfy_the_schema_which_counts(connect, server):
    driver = connect(CACHED)
    for model in (City, Place, City, Place):
        model.model_validate_json(driver.text(await driver.ask(**schema_of(driver, model))))
    assert server.stats(0)["received"] == 2
    for model in (City, Place, City, Place):
        model.model_validate_json(driver.streamed_text(await driver.stream("streamed", **schema_of(driver, model))))
    assert server.stats(0)["received"] == 4
    assert driver.stats["cache_hits"] == 4


async def test_structured_outputs_parse(connect, server):
    driver = connect(CACHED)
    for _ in range(2):
        answer = await driver.run(driver.resource.parse, **driver.arguments(**model_of(driver, City)))
        assert isinstance(parsed_of(driver, answer), City)
    assert server.stats(0)["received"] == (2 if driver.edge == "wrap" else 1)


async def test_structured_outputs_of_the_stream_helper_parse(connect, server):
    driver = connect(CACHED)
    read = {"openai": "get_final_completion", "anthropic": "get_final_message"}[driver.sdk]
    for _ in range(2):
        helper = driver.resource.stream(**driver.arguments(**model_of(driver, City)))
        assert isinstance(parsed_of(driver, await driver.entered(helper, read)), City)
    past_us = driver.sdk == "anthropic" and driver.edge == "wrap"
    assert server.stats(0)["received"] == (2 if past_us else 1)


@only("anthropic")
async def test_structured_outputs_of_the_beta_methods(connect, server):
    driver = connect(CACHED)
    beta = driver.client.beta.messages
    for _ in range(2):
        answer = await driver.run(beta.parse, **driver.arguments("a", output_format=City))
        assert isinstance(answer.parsed_output, City)
        answer = await driver.run(beta.create, **driver.arguments("b", **schema_of(driver, City)))
        City.model_validate_json(answer.content[0].text)
        helper = beta.stream(**driver.arguments("c", output_format=City))
        assert isinstance((await driver.entered(helper, "get_final_message")).parsed_output, City)
    assert server.stats(0)["received"] == (6 if driver.edge == "wrap" else 3)


@only("openai")
async def test_structured_outputs_of_responses_parse(connect, server):
    driver = connect(CACHED)
    for _ in range(2):
        answer = await driver.run(driver.client.responses.parse, model="llmmw-embedded", input="hi", text_format=City)
        assert isinstance(answer.output_parsed, City)
    assert server.stats(0)["received"] == (2 if driver.edge == "wrap" else 1)
