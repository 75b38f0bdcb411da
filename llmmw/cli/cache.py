"""`llmmw cache`: looking after a cache directory, also while programs use it, and saying why two requests differ."""

from pathlib import Path
from typing import Annotated, Any, cast

import msgspec
import typer

from llmmw.call import Call
from llmmw.errors import ConfigError
from llmmw.keys import TRANSPORT_FIELDS, Uncacheable, explain_difference, key_of, uncounted_differences
from llmmw.stores.upkeep import DiskUsage, clear, prune, usage

_OPS = ("chat", "complete", "embed", "messages", "responses")
_BY_FIELD = {"messages": "chat", "prompt": "complete", "input": "embed"}
_HELP = """Look after a cache directory; other programs may use it meanwhile.

\b
llmmw cache stats --directory ~/.cache/llmmw
LLMMW_CACHE_DIR=~/.cache/llmmw llmmw cache prune
llmmw cache clear --yes
llmmw cache explain monday.json tuesday.json
"""
_EXPLAIN = """Name the field in which two requests differ for the cache. A and B are request bodies in JSON files.

\b
llmmw cache explain monday.json tuesday.json
llmmw cache explain --op responses a.json b.json --json
"""

Directory = Annotated[
    Path,
    typer.Option(
        "--directory", "-d", envvar="LLMMW_CACHE_DIR", help="The cache directory, as in TTLCache(directory=)."
    ),
]
Network = Annotated[bool, typer.Option("--network", help="Also on a network file system.")]
Op = Annotated[str | None, typer.Option(help=f"What is asked for: {', '.join(_OPS)}; by default told by the body.")]
AsJSON = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def cache_app() -> typer.Typer:
    """The commands."""
    app = typer.Typer(help=_HELP, no_args_is_help=True)
    app.command("stats")(_stats)
    app.command("prune")(_prune)
    app.command("clear")(_clear)
    app.command("explain", help=_EXPLAIN)(_explain)
    return app


def _stats(directory: Directory, *, network: Network = False, json: AsJSON = False) -> None:
    """How many answers there are, how old, how large, and what was put aside as broken."""
    found = usage(directory, network=network)
    if json:
        _print_json({"directory": str(directory), **msgspec.to_builtins(found)})
        return
    typer.echo(f"{directory}: " + (_described(found) if found.bytes or found.quarantined else "no cache there yet"))


def _described(found: DiskUsage) -> str:
    lines = [f"{_count(found.entries, 'answer')}, {found.expired} of them expired"]
    if found.oldest_s is not None and found.newest_s is not None:
        lines.append(f"stored {_span(found.oldest_s)} to {_span(found.newest_s)} ago")
    if found.expires_last_s is not None and found.expires_last_s > 0:
        lines.append(f"the last one expires in {_span(found.expires_last_s)}")
    limit = f" of {_size(found.limit_bytes)}" if found.limit_bytes else ""
    lines.append(f"{_size(found.bytes)}{limit} on disk ({_size(found.wal_bytes)} of it log)")
    if found.quarantined:
        aside = f"{_count(found.quarantined, 'broken file')} ({_size(found.quarantined_bytes)})"
        lines.append(f"{aside} put aside as *.corrupt-<time>; `llmmw cache clear` deletes them")
    return "\n  ".join(lines)


def _prune(directory: Directory, *, network: Network = False, json: AsJSON = False) -> None:
    """Delete the answers whose time is over."""
    _tell_removed(directory, prune(directory, network=network), "expired answer", json=json)


def _clear(
    directory: Directory,
    *,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    network: Network = False,
    json: AsJSON = False,
) -> None:
    """Delete every answer, and what was put aside as broken. What programs hold in memory stays there."""
    if not yes:
        typer.confirm(f"Delete every cached answer in {directory}?", abort=True, err=True)
    _tell_removed(directory, clear(directory, network=network), "answer", json=json)


def _tell_removed(directory: Path, count: int, what: str, *, json: bool) -> None:
    if json:
        _print_json({"directory": str(directory), "removed": count})
    else:
        typer.echo(f"{directory}: {_count(count, what)} deleted")


def _explain(
    first: Annotated[Path, typer.Argument(metavar="A.json", help="A request body.")],
    second: Annotated[Path, typer.Argument(metavar="B.json", help="Another one.")],
    *,
    op: Op = None,
    json: AsJSON = False,
) -> None:
    if op is not None and op not in _OPS:
        raise typer.BadParameter(f"{op!r}: must be one of {', '.join(_OPS)}", param_hint="--op")
    calls = [_call(path, op) for path in (first, second)]
    reasons = [_why_uncacheable(call) for call in calls]
    field = explain_difference(*calls) if reasons == [None, None] else None
    ignored = uncounted_differences(calls[0].payload, calls[1].payload)
    if json:
        same = reasons == [None, None] and field is None
        _print_json({"same": same, "field": field, "uncacheable": reasons, "ignored_differences": ignored})
        return
    for path, reason in zip((first, second), reasons, strict=True):
        if reason is not None:
            typer.echo(f"{path} is never cached: {reason}")
    if field is not None:
        typer.echo(f"two answers: the requests differ in {field}")
    elif reasons == [None, None]:
        typer.echo("one answer: the requests are the same question")
    if ignored:
        typer.echo(f"they also differ in {', '.join(ignored)}, which never counts")
    typer.echo(f"\nNever counted: {', '.join(sorted(TRANSPORT_FIELDS))}; the order of keys outside schemas.")
    typer.echo("Counted besides the body: endpoint, API version and beta headers, credential or tenant, and with")
    typer.echo('sampling="lanes" agent and sample.')


def _call(path: Path, op: str | None) -> Call:
    try:
        body: object = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON ({error})") from None
    if not isinstance(body, dict):
        raise ConfigError(f"{path}: expected the JSON object of a request's body")
    fields = cast("dict[str, Any]", body)
    kinds = [kind for name, kind in _BY_FIELD.items() if name in fields] if op is None else [op]
    if not kinds:
        raise ConfigError(f"{path}: no messages, prompt or input in it; say --op")
    return Call(kinds[0], str(fields.get("model", "")), fields)


def _why_uncacheable(call: Call) -> str | None:
    try:
        key_of(call)
    except Uncacheable as error:
        return error.reason
    return None


def _print_json(found: dict[str, Any]) -> None:
    typer.echo(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


_UNITS = (("day", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0))


def _span(seconds: float) -> str:
    """The two largest units of a duration."""
    left = max(0, round(seconds))
    shown: list[str] = []
    for name, unit in _UNITS:
        count, left = divmod(left, int(unit))
        if count or (name == "s" and not shown):
            shown.append(f"{count} {name}{'s' if name == 'day' and count > 1 else ''}")
    return " ".join(shown[:2])


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "KB", "MB"):
        if size < 1000:  # noqa: PLR2004 — decimal units
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
