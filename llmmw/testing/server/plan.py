"""What will be answered, decided before anything is timed: a pure function of the request.

Text = f(config.seed, model, rendered prompt, schema or tool, sampling). With temperature 0 the other sampling
parameters do not matter (greedy); with a seed, choice k uses seed + k; otherwise each repetition of the same request
is the next draw of a counter, so a rerun against a fresh (or reset) server gives the same sequence of texts.
``max_tokens`` only cuts: a longer answer starts with the shorter one.
"""

from collections import OrderedDict
from hashlib import sha256
from typing import Any, Final

from msgspec import Struct

from .config import ServerConfig
from .engine import Sequence
from .errors import bad_value, too_long
from .schema import instance
from .tokens import CHARS_PER_TOKEN, count, words
from .wire import Json, SamplingFields, as_dict, as_list, compact, text_of

MAX_DRAWS: Final = 100_000
MAX_CHOICES: Final = 10_000
MAX_TEXTS: Final = 100_000
MAX_LOGPROBS: Final = 20


class Prompt(Struct):
    """One prompt as the pretended model sees it.

    Attributes:
        units: rendered text, or token ids.
        tokens: its length.
        last_user: text of the last message when that is the user's, else "".
    """

    units: str | list[int]
    tokens: int
    last_user: str


class Tool(Struct):
    """A function the model may call; ``parameters`` is its JSON schema."""

    name: str
    parameters: Json


class Sampling(Struct, kw_only=True):
    """Sampling parameters, the same for every route."""

    model: str
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    n: int = 1
    priority: int = 0
    salt: str = ""
    schema: Json | None = None
    tool: Tool | None = None


class Planned(Struct):
    """One text to come. ``finish`` is stop, length or tool_calls; ``tool`` is the called function's name."""

    text: str
    tokens: int
    finish: str
    tool: str
    sequence: Sequence


def chat_prompt(messages: list[Json], tools: Any = None) -> Prompt:
    """Render a conversation; the rendering includes roles, tool definitions and tool calls."""
    if not messages:
        raise bad_value("list object has no element 0: messages must not be empty", "messages")
    parts = [compact(tools)] if tools else []
    for message in messages:
        role = message.get("role")
        if not isinstance(role, str):
            raise bad_value(f"messages: role {role!r} is not allowed; a text is", "messages")
        text = text_of(message.get("content"))
        if len(message) > 2:  # noqa: PLR2004 — more than role and content
            rest = {key: value for key, value in message.items() if key not in {"role", "content"}}
            text += compact(rest)
        parts.append(f"<{role}>{text}")
    last = messages[-1]
    last_user = text_of(last.get("content")) if last.get("role") == "user" else ""
    parts.append("<assistant>")
    rendered = "\n".join(parts)
    return Prompt(rendered, count(rendered), last_user)


def text_prompts(prompt: str | list[Any]) -> list[Prompt]:
    """The prompts of a completion: text, texts, ids, or lists of ids."""
    if isinstance(prompt, str):
        return [Prompt(prompt, count(prompt), prompt)]
    if prompt and all(isinstance(item, int) for item in prompt):
        return [Prompt(prompt, len(prompt), "")]
    made: list[Prompt] = []
    for item in prompt:
        if isinstance(item, str):
            made.append(Prompt(item, count(item), item))
        else:
            ids = [unit for unit in as_list(item) if isinstance(unit, int)]
            if not ids or len(ids) != len(as_list(item)):
                raise bad_value("prompt: each item must be a text or a list of token ids", "prompt")
            made.append(Prompt(ids, len(ids), ""))
    if not made:
        raise bad_value("prompt must not be empty", "prompt")
    return made


def sampling_of(fields: SamplingFields, model: str, max_tokens: int | None) -> Sampling:
    """Checked sampling parameters of an OpenAI-shaped body."""
    temperature = 1.0 if fields.temperature is None else fields.temperature
    n = 1 if fields.n is None else fields.n
    if temperature < 0.0:
        raise bad_value(f"temperature must be non-negative, got {temperature}.", "temperature")
    if not 1 <= n <= MAX_CHOICES:
        raise bad_value(f"n must be between 1 and {MAX_CHOICES}, got {n}.", "n")
    if n > 1 and temperature == 0.0:
        raise bad_value(f"n must be 1 when using greedy sampling, got {n}.", "n")
    if max_tokens is not None and max_tokens < 1:
        raise bad_value(f"max_tokens must be at least 1, got {max_tokens}.", "max_tokens")
    if fields.top_p is not None and not 0.0 < fields.top_p <= 1.0:
        raise bad_value(f"top_p must be in (0, 1], got {fields.top_p}.", "top_p")
    stop = fields.stop or []
    return Sampling(
        model=model,
        temperature=temperature,
        top_p=1.0 if fields.top_p is None else fields.top_p,
        seed=fields.seed,
        max_tokens=max_tokens,
        min_tokens=fields.min_tokens or 0,
        ignore_eos=bool(fields.ignore_eos),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        n=n,
        priority=fields.priority or 0,
        salt=fields.cache_salt or "",
        schema=wanted_schema(fields.response_format, fields.structured_outputs),
    )


def wanted_schema(response_format: Json | None, structured: Json | None = None) -> Json | None:
    """The schema the answer must satisfy, if any; ``json_object`` means any object."""
    if structured and isinstance(structured.get("json"), dict):
        return as_dict(structured["json"])
    kind = (response_format or {}).get("type")
    if response_format is None or kind in {None, "text"}:
        return None
    if kind == "json_object":
        return {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}
    if kind == "json_schema":
        holder = as_dict(response_format.get("json_schema")) or response_format
        schema = holder.get("schema")
        if not isinstance(schema, dict):
            raise bad_value("response_format: json_schema needs an object under schema", "response_format")
        return as_dict(schema)
    raise bad_value(
        f"response_format: type {kind!r} is not allowed; text, json_object, json_schema are", "response_format"
    )


def chosen_tool(tools: list[Tool], choice: str, last_user: str, marker: str) -> Tool | None:
    """The tool to call: ``choice`` is none, auto, required, or a tool's name.

    Auto calls a tool when the last message is the user's and contains the marker. Among several, the first one
    named in that message is taken, else the first.
    """
    if not tools or choice == "none" or (choice == "auto" and marker not in last_user):
        return None
    if choice not in {"auto", "required"}:
        for tool in tools:
            if tool.name == choice:
                return tool
        raise bad_value(f"tool_choice: {choice!r} is not among the tools", "tool_choice")
    return next((tool for tool in tools if tool.name in last_user), tools[0])


class Planner:
    """Turns prompts and sampling into texts; remembers draws."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self._draws: OrderedDict[bytes, int] = OrderedDict()

    def reset(self) -> None:
        """Start the draws of every request from the first again."""
        self._draws.clear()

    def plan(self, prompts: list[Prompt], sampling: Sampling) -> list[Planned]:
        """``len(prompts) * n`` texts, index = prompt * n + k; refuses what does not fit the context."""
        config = self.config
        limit = config.max_model_len
        asked = sampling.max_tokens
        if asked is not None and asked > limit:
            message = f"max_tokens={asked} cannot be greater than max_model_len={limit}. Please request fewer."
            raise bad_value(message, "max_tokens")
        if len(prompts) * sampling.n > MAX_TEXTS:
            raise bad_value(f"prompts * n must be at most {MAX_TEXTS}, got {len(prompts) * sampling.n}.", "n")
        for prompt in prompts:
            if prompt.tokens + (asked or 1) > limit:
                raise too_long(limit, prompt.tokens, asked or 1)
        return [self._one(prompt, sampling, k) for prompt in prompts for k in range(sampling.n)]

    def _one(self, prompt: Prompt, sampling: Sampling, k: int) -> Planned:
        key = self._key(prompt, sampling, k)
        limit = sampling.max_tokens or self.config.max_model_len - prompt.tokens
        tool = sampling.tool
        if tool is not None:
            text = compact(instance(tool.parameters, key))
            finish = "tool_calls"
        elif sampling.schema is not None:
            text, finish = compact(instance(sampling.schema, key)), "stop"
        else:
            text, finish = self._text(prompt, sampling, key, limit)
        if tool is None and count(text) > limit:
            text, finish = text[: limit * CHARS_PER_TOKEN], "length"
        tokens = max(1, count(text) + (count(tool.name) if tool else 0))
        sequence = Sequence(prompt.tokens, tokens, priority=sampling.priority, units=prompt.units, salt=sampling.salt)
        return Planned(text, tokens, finish, tool.name if tool else "", sequence)

    def _key(self, prompt: Prompt, sampling: Sampling, k: int) -> bytes:
        units = prompt.units
        hasher = sha256(f"{self.config.seed}\0{sampling.model}\0".encode())
        hasher.update((units if isinstance(units, str) else repr(units)).encode("utf-8", "surrogatepass"))
        if sampling.schema is not None:
            hasher.update(compact(sampling.schema).encode())
        if sampling.tool is not None:
            hasher.update(sampling.tool.name.encode())
        if sampling.temperature == 0.0:
            hasher.update(b"\0greedy")
            return hasher.digest()
        hasher.update(f"\0{sampling.temperature}\0{sampling.top_p}".encode())
        if sampling.seed is not None:
            hasher.update(f"\0seed {sampling.seed + k}".encode())
            return hasher.digest()
        content = hasher.digest()
        draw = self._draws.pop(content, 0)
        self._draws[content] = draw + 1
        if len(self._draws) > MAX_DRAWS:
            self._draws.popitem(last=False)
        hasher.update(f"\0draw {draw}".encode())
        return hasher.digest()

    def _text(self, prompt: Prompt, sampling: Sampling, key: bytes, limit: int) -> tuple[str, str]:
        config = self.config
        if config.reply_text:
            text, finish = config.reply_text, "stop"
        elif config.reply == "echo":
            text, finish = prompt.last_user or words(key, 1), "stop"
        else:
            unit = int.from_bytes(key[:4], "big") / 2**32
            natural = max(1, round(config.reply_tokens * (1.0 + config.reply_spread * (2.0 * unit - 1.0))))
            natural = max(natural, sampling.min_tokens)
            endless = sampling.ignore_eos and sampling.max_tokens is not None
            finish = "length" if endless or natural > limit else "stop"
            text = words(key, limit if endless else min(natural, limit))
        for mark in sampling.stop:
            if mark and (at := text.find(mark)) >= 0:
                text, finish = text[:at], "stop"
        return text, finish
