"""One `create()` of a wrapped SDK client: arguments become a call, replies the SDK's types, errors its exceptions."""

from __future__ import annotations

import functools
import inspect
import sys
import typing
from typing import TYPE_CHECKING, Any

import msgspec

from llmmw.call import Call, Reply, current_context
from llmmw.edges.outcome import Answer, answer_of, failure_of
from llmmw.endpoints.sdk import Invocation
from llmmw.errors import ConfigError, LLMMWError
from llmmw.keys.canonical import is_flat
from llmmw.layers.attempt import annotate
from llmmw.wire import PATHS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from llmmw.edges.outcome import Failure
    from llmmw.edges.sdk import Wrapping

_OPTIONS = frozenset({"extra_headers", "extra_query", "extra_body", "timeout"})
_RAW = "x-stainless-raw-response"
_USUAL = frozenset({str, int, float, bool, type(None), list, dict})


class Method:
    """One `create()`: arguments to a call, replies to the SDK's types."""

    def __init__(self, wrapping: Wrapping, op: str, resource: Any) -> None:
        self._wrapping = wrapping
        self._shared = wrapping.shared
        self._engine = wrapping.shared.engine
        self._op = op
        self._original = resource.create
        # Built from the original now, so that these two stay the SDK's own and we have one that tells headers.
        self._raw = resource.with_raw_response.create
        _ = resource.with_streaming_response
        self._is_async = inspect.iscoroutinefunction(inspect.unwrap(self._original))
        self._type, self._stream, self._chunk = _answer_types(self._original)

    def caller(self) -> Callable[..., Any]:
        """What takes the place of the SDK's method."""
        original, engine = self._original, self._engine

        async def create(*args: Any, **kwargs: Any) -> Any:
            call = None if args else self._call(kwargs)
            if call is None:
                return await original(*args, **kwargs)
            try:
                found = engine.at_once(call)
                reply = found if isinstance(found, Reply) else await engine.go_on(found)
            except LLMMWError as error:
                raise self._exception(error) from error
            return self._value(reply)

        def create_sync(*args: Any, **kwargs: Any) -> Any:
            call = None if args else self._call(kwargs)
            if call is None:
                return original(*args, **kwargs)
            try:
                reply = engine.call_sync(call)
            except LLMMWError as error:
                raise self._exception(error) from error
            return self._value(reply)

        return functools.wraps(original)(create if self._is_async else create_sync)

    # ── arguments → call ────────────────────────────────────────────────────────────────────────────────────────

    def _call(self, kwargs: dict[str, Any]) -> Call | None:
        """The call, or None where the SDK must answer by itself (raw responses, missing arguments)."""
        headers: Mapping[str, Any] = kwargs.get("extra_headers") or {}
        model = kwargs.get("model")
        if not isinstance(model, str) or (headers and any(name.lower() == _RAW for name in headers)):
            return None
        absent = self._shared.absent
        body: dict[str, Any] = {}
        for name, value in kwargs.items():
            if name in _OPTIONS:
                continue
            if type(value) not in _USUAL:
                if isinstance(value, absent):
                    continue
                if hasattr(value, "__next__"):  # an iterator would be empty when the SDK reads it
                    kwargs[name] = value = list(value)  # noqa: PLW2901 — read once, used twice
            body[name] = value
        if extra_body := kwargs.get("extra_body"):
            body.update(extra_body)
        shared, context = self._shared, current_context()
        standing = self._wrapping.standing(headers, kwargs.get("extra_query"))
        return Call(
            self._op,
            model,
            body if is_flat(body) else _plain(body),
            bool(body.get("stream")),
            context,
            Invocation(self._raw, kwargs, self._is_async, self._op == "embed"),
            standing.target,
            shared.namespaces.of(standing.credential, context.tenant or shared.tenant),
            standing.variant,
            inherits_context=True,
        )

    # ── reply → the SDK's types ─────────────────────────────────────────────────────────────────────────────────

    def _value(self, reply: Reply) -> Any:
        if not reply.ok:
            raise self._refused(reply)
        if reply.chunks is not None:
            bodies = self._wrapping.bodies
            body = bodies.AsyncBody if self._is_async else bodies.SyncBody
            request = self._request()
            stream = body(self._wrapping.library, request, self._engine, reply.chunks)
            response = self._response(answer_of(reply, final=self._shared.retries), request, stream)
            return self._stream(cast_to=self._chunk, response=response, client=self._wrapping.client)
        value = self._parsed(reply)
        headers = dict(reply.headers)
        # As the SDK itself does; pydantic's own way comes to the same in ten times as long.
        object.__setattr__(value, "_request_id", headers.get("x-request-id") or headers.get("request-id"))
        return value

    def _parsed(self, reply: Reply) -> Any:
        """A fresh object of the SDK's type.

        Validating JSON in one go is ten times faster than the SDK's own construction. A server that leaves the
        schema (an unknown finish_reason) fails it and gets the SDK's tolerant way, as without llmmw.
        """
        data = reply.data or b""
        try:
            return self._type.__pydantic_validator__.validate_json(data)  # what `model_validate_json` calls
        except ValueError:
            answer = Answer(reply.status, [(b"content-type", b"application/json")], data)
            response = self._response(answer, self._request())
            process = self._wrapping.client._process_response_data  # noqa: SLF001 — the SDK has no public one
            return process(data=msgspec.json.decode(data), cast_to=self._type, response=response)

    def _request(self) -> Any:
        path = PATHS[self._op]
        return self._wrapping.library.Request("POST", self._wrapping.standing({}, None).target + path)

    def _response(self, answer: Answer, request: Any, stream: Any = None) -> Any:
        body = {"content": answer.body} if stream is None else {"stream": stream}
        return self._wrapping.library.Response(answer.status, headers=answer.headers, request=request, **body)

    # ── failures ────────────────────────────────────────────────────────────────────────────────────────────────

    def _refused(self, reply: Reply) -> Exception:
        """The SDK's exception for a refusal: its own object, or one made from the response (for a follower)."""
        error = reply.native
        if not isinstance(error, Exception):
            error = self._status_error(answer_of(reply, final=self._shared.retries))
        annotate(error, reply.attempts)
        return error

    def _status_error(self, answer: Answer) -> Exception:
        response = self._response(answer, self._request())
        error: Exception = self._wrapping.client._make_status_error_from_response(response)  # noqa: SLF001 — the SDK has no public one
        return error

    def _exception(self, error: LLMMWError) -> Exception:
        """The SDK's exception for what llmmw raised."""
        if isinstance(error, ConfigError):
            return error
        made = self._made(failure_of(error), error.message)
        annotate(made, error.attempts)
        return made

    def _made(self, found: Answer | Failure, message: str) -> Exception:
        if isinstance(found, Answer):
            return self._status_error(found)
        sdk = sys.modules[self._shared.package]
        timed_out = found in {"ReadTimeout", "ConnectTimeout"}
        made: Exception = (
            sdk.APITimeoutError(request=self._request())
            if timed_out
            else sdk.APIConnectionError(message=message, request=self._request())
        )
        return made


def _answer_types(create: Any) -> tuple[Any, Any, Any]:
    """What `create` is annotated to return: the answer's class, the stream's class and the type of its chunks."""
    function = inspect.unwrap(create)
    annotation: Any = function.__annotations__["return"]
    if isinstance(annotation, str):
        annotation = eval(annotation, function.__globals__)  # noqa: S307 — the SDK's own source text
    answer = stream = chunk = None
    for kind in typing.get_args(annotation) or (annotation,):
        if typing.get_origin(kind) is None:
            answer = kind
        else:
            stream, (chunk,) = kind, typing.get_args(kind)
    return answer, stream, chunk


class _Converted(Exception):
    """The body holds something that is not JSON and cannot be made so."""


def _plain(body: dict[str, Any]) -> dict[str, Any]:
    """The body with the SDK's own objects (messages of earlier answers) as the JSON they are sent as."""
    found = False

    def hook(value: Any) -> Any:
        nonlocal found
        dump = getattr(value, "model_dump", None)
        if dump is None or isinstance(value, type):
            raise _Converted
        found = True
        return dump(mode="json", by_alias=True, exclude_unset=True)

    try:
        data = msgspec.json.encode(body, enc_hook=hook)
    except (_Converted, TypeError, ValueError, RecursionError):
        return body  # its key says it cannot be shared, and the SDK judges whether it can be sent
    return msgspec.json.decode(data) if found else body
