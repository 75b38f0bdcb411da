"""The `llmmw` command."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from llmmw import __version__
from llmmw.errors import LLMMWError

if TYPE_CHECKING:
    from collections.abc import Sequence

_NEEDS_EXTRA = (
    "the llmmw command needs two small packages: pip install 'llmmw[cli]' (the demo more: pip install 'llmmw[demo]')"
)

_BENCH = """Ask a server N questions in several shapes; show time, tokens per second and client CPU of each.

The shapes are taken in turn, each wave with a client of its own; every prompt is new. They are:

\b
one-by-one      bare aiohttp, one chat after the other (above 16 extrapolated)
sdk             bare openai SDK, all chats at once
aiohttp         bare aiohttp, all chats at once
list            bare aiohttp, one /completions with a list of prompts
batch           bare aiohttp, one /chat/completions/batch (vLLM)
client          llmmw Client, all chats at once
generate-batch  llmmw Client.generate_batch(messages=...)

\b
llmmw bench --base-url http://127.0.0.1:8000/v1 --n 1,4,16,64,256
llmmw bench --shapes client,generate-batch,batch --n 64 --json b.json
"""


def main(argv: "Sequence[str] | None" = None) -> None:
    """Run the command line; exits with the command's status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["serve"]:
        # The server has its own options (and needs no extra), so they are passed on as they are.
        from llmmw.testing.server import main as serve  # noqa: PLC0415 — only this command needs the server

        sys.exit(serve(arguments[1:]))
    try:
        app = build_app()
    except ImportError:
        sys.exit(_NEEDS_EXTRA)
    try:
        app(arguments, prog_name="llmmw")
    except LLMMWError as error:
        sys.exit(f"llmmw: {error}")


def limit_of(concurrency: str) -> int | str:
    """What `RateLimiter(concurrency=)` takes, from the command line."""
    return int(concurrency) if concurrency.isdigit() else concurrency


def build_app() -> Any:
    """The typer application."""
    import typer  # noqa: PLC0415 — belongs to the extra

    from llmmw.cli.cache import cache_app  # noqa: PLC0415 — likewise

    app = typer.Typer(
        help="Caching and pooling middleware for LLM calls.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    @app.command()
    def demo(
        base_url: Annotated[str | None, typer.Option(help="Ask this OpenAI-shaped server instead.")] = None,
        model: Annotated[str | None, typer.Option(help="Model name at --base-url.")] = None,
        api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", show_envvar=True)] = None,
        agents: Annotated[int, typer.Option(min=1, help="How many agents ask.")] = 20,
        ticks: Annotated[int, typer.Option(min=1, help="How many rounds.")] = 6,
        max_tokens: Annotated[int, typer.Option(min=1, help="Bound on each answer; a cut one is not cached.")] = 256,
        stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer; may be repeated.")] = None,
        json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
        chart: Annotated[Path | None, typer.Option(help="Write a chart here (png, svg, pdf).")] = None,
    ) -> None:
        """Run 20 agents for several ticks three ways: bare SDK one by one, all at once, and through llmmw."""
        from llmmw.cli.demo import run_demo  # noqa: PLC0415 — only this command needs the demo
        from llmmw.demo.workload import Workload  # noqa: PLC0415 — likewise

        if (base_url is None) != (model is None):
            raise typer.BadParameter("--base-url and --model go together")
        workload = Workload(agents=agents, ticks=ticks, max_tokens=max_tokens, stop=tuple(stop or ()))
        run_demo(base_url, model, api_key, workload, json, chart)

    @app.command(help=_BENCH)
    def bench(
        base_url: Annotated[str, typer.Option(help="OpenAI-shaped server; none: the embedded one.")] = "",
        model: Annotated[str, typer.Option(help="Model name there; none: the first it lists.")] = "",
        api_key_env: Annotated[str | None, typer.Option(help="Environment variable that holds the credential.")] = None,
        shapes: Annotated[str, typer.Option(help="Names from above, separated by commas.")] = "all",
        n: Annotated[str, typer.Option("--n", help="Numbers of calls, separated by commas.")] = "1,4,16,64",
        repeats: Annotated[int, typer.Option(min=1, help="Waves of each kind.")] = 3,
        max_tokens: Annotated[int, typer.Option(min=1, help="Bound on each answer.")] = 64,
        concurrency: Annotated[
            str | None, typer.Option(help='Of llmmw, as "64" or "floor-start-ceiling"; none: as recommended.')
        ] = None,
        timeout: Annotated[float, typer.Option(min=1, help="Seconds for each call.")] = 120,
        json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
        chart: Annotated[Path | None, typer.Option(help="Write a chart here (png, svg, pdf).")] = None,
        label: Annotated[str, typer.Option(help="Title of the table and the chart.")] = "",
        *,
        cold: Annotated[bool, typer.Option("--cold", help="No warm-up: connections are opened as it runs.")] = False,
        check: Annotated[bool, typer.Option("--check", help="Exit with 1 where a promise is broken.")] = False,
    ) -> None:
        from llmmw.bench.run import Plan  # noqa: PLC0415 — keeps `--help` quick
        from llmmw.bench.shapes import Target  # noqa: PLC0415 — likewise
        from llmmw.cli.bench import key_from, numbers_of, run_bench, shapes_of  # noqa: PLC0415 — likewise

        limit = None if concurrency is None else limit_of(concurrency)
        target = Target(base_url, model, key_from(api_key_env), max_tokens, timeout, limit)
        plan = Plan(shapes_of(shapes), numbers_of(n), repeats, cold=cold)
        kept = run_bench(target, plan, json=json, chart=chart, label=label)
        raise typer.Exit(1 if check and not kept else 0)

    @app.command()
    def serve() -> None:
        """Serve the embedded model server (a test double, not a model); `llmmw serve --help` lists its options."""

    @app.command()
    def explain(
        cache_ttl: Annotated[str | None, typer.Option(help='Lifetime of cached answers, e.g. "10m".')] = "10m",
        rpm: Annotated[int | None, typer.Option(help="Requests per minute.")] = None,
        tpm: Annotated[int | None, typer.Option(help="Tokens per minute.")] = None,
        concurrency: Annotated[str, typer.Option(help='Calls in flight, or "floor-start-ceiling".')] = "64",
        deadline: Annotated[str | None, typer.Option(help="For a whole call.")] = None,
    ) -> None:
        """Print the recommended stack: its layers, their settings, and why they stand in this order."""
        from llmmw.stack import Stack  # noqa: PLC0415 — keeps `--help` quick

        limit = limit_of(concurrency)
        stack = Stack.recommended(cache_ttl=cache_ttl, rpm=rpm, tpm=tpm, concurrency=limit, deadline=deadline)
        typer.echo(stack.explain())

    @app.command()
    def version() -> None:
        """Print the version."""
        typer.echo(__version__)

    app.add_typer(cache_app(), name="cache")
    return app
