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

        limit = int(concurrency) if concurrency.isdigit() else concurrency
        stack = Stack.recommended(cache_ttl=cache_ttl, rpm=rpm, tpm=tpm, concurrency=limit, deadline=deadline)
        typer.echo(stack.explain())

    @app.command()
    def version() -> None:
        """Print the version."""
        typer.echo(__version__)

    app.add_typer(cache_app(), name="cache")
    return app
