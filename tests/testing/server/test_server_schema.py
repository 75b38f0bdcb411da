import json

from hypothesis import given
from hypothesis import strategies as st

from llmmw.testing.server.schema import MAX_DEPTH, instance


def made(schema, seed=b"s"):
    return instance(schema, seed)


def test_constants_enums_and_formats():
    assert made({"const": 4}) == 4
    assert made({"enum": ["a", "b"]}) in {"a", "b"}
    assert made({"type": "string", "format": "date"}) == "2024-01-02"
    assert made({"type": "null"}) is None
    assert made({"type": "boolean"}) in {True, False}
    assert made(True) is None
    assert isinstance(made({}), str)


def test_lengths_and_items():
    assert len(made({"type": "string", "minLength": 40})) == 40
    assert len(made({"type": "string", "maxLength": 2})) == 2
    assert len(made({"type": "array", "items": {"type": "integer"}, "minItems": 5})) == 5
    assert made({"type": "array", "items": {}, "maxItems": 0}) == []
    pair = made({"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}]})
    assert [type(item) for item in pair] == [int, str]


def test_unions_merges_and_references():
    assert isinstance(made({"type": ["null", "integer"]}), int)
    assert isinstance(made({"anyOf": [{"type": "null"}, {"type": "integer"}]}), int)
    merged = {"allOf": [{"properties": {"a": {"type": "integer"}}, "required": ["a"]}, {"properties": {"b": {}}}]}
    assert set(made(merged)) == {"a", "b"}
    assert isinstance(made({"$ref": "#/$defs/x~1y", "$defs": {"x/y": {"type": "number"}}}), float)
    assert made({"$ref": "#/nowhere"}) is not None
    assert made({"anyOf": [1]}) is not None
    assert "b" in made({"type": "object", "required": ["b"]})


def test_recursive_schemas_end():
    tree = {
        "$defs": {
            "n": {
                "type": "object",
                "properties": {"v": {"type": "integer"}, "kids": {"type": "array", "items": {"$ref": "#/$defs/n"}}},
            }
        },
        "$ref": "#/$defs/n",
    }
    assert "v" in made(tree)
    link = {
        "$defs": {
            "n": {
                "type": "object",
                "properties": {"next": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}},
                "required": ["next"],
            }
        },
        "$ref": "#/$defs/n",
    }
    assert "null" in json.dumps(made(link))
    typed = {
        "$defs": {"n": {"type": ["object", "null"], "properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"]}},
        "$ref": "#/$defs/n",
    }
    assert "null" in json.dumps(made(typed))
    endless = {
        "$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"]}},
        "$ref": "#/$defs/n",
    }
    assert json.dumps(made(endless)).count("{") <= 2 * MAX_DEPTH + 1
    rows = {"$defs": {"n": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/n"}}}, "$ref": "#/$defs/n"}
    text = json.dumps(made(rows))
    assert text.index("]") <= 2 * MAX_DEPTH + 1  # opening brackets before the first closing one: the depth
    assert made({"$ref": "#"}) is not None
    both = {"type": "object", "properties": {"a": {"$ref": "#"}, "b": {"$ref": "#"}}, "required": ["a", "b"]}
    assert len(json.dumps(made(both))) < 200_000


@given(
    low=st.none() | st.integers(-(10**6), 10**6),
    span=st.none() | st.integers(0, 500),
    exclusive=st.booleans(),
    whole=st.booleans(),
    seed=st.binary(max_size=4),
)
def test_numbers_stay_within_their_bounds(low, span, exclusive, whole, seed):
    schema = {"type": "integer" if whole else "number"}
    if low is not None:
        schema["exclusiveMinimum" if exclusive else "minimum"] = low
    if span is not None:
        schema["exclusiveMaximum" if exclusive else "maximum"] = (low or 0) + span + 2
    value = instance(schema, seed)
    assert isinstance(value, int if whole else float)
    if low is not None:
        assert value > low if exclusive else value >= low
    if span is not None:
        high = (low or 0) + span + 2
        assert value < high if exclusive else value <= high
    assert instance(schema, seed) == value


@given(step=st.integers(1, 50), low=st.integers(-100, 100))
def test_multiples(step, low):
    value = made({"type": "integer", "multipleOf": step, "minimum": low})
    assert value >= low
    assert value % step == 0
