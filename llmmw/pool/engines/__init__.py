"""The wire engines, one module each, imported when a pool first needs one."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from llmmw.errors import MissingExtra

if TYPE_CHECKING:
    from llmmw.pool.engine import Engine, EngineOptions

ENGINES = ("aiohttp", "httpx", "httpx2", "pyreqwest")
_INSTALL = {"aiohttp": "aiohttp", "httpx": "httpx", "httpx2": "llmmw[httpx2]", "pyreqwest": "llmmw[speed]"}
_OWN_HTTP2 = frozenset({"pyreqwest"})


def check_installed(name: str, *, http2: bool = False) -> None:
    """See that the packages of an engine are there, without loading them.

    Raises:
        MissingExtra: one is not.
    """
    if find_spec(name) is None:
        raise _missing(name)
    if http2 and name not in _OWN_HTTP2 and find_spec("h2") is None:
        raise MissingExtra("ConnectionPool(http2=True) needs a package that is missing: pip install 'llmmw[http2]'")


def _missing(name: str) -> MissingExtra:
    return MissingExtra(
        f"ConnectionPool(engine={name!r}) needs a package that is missing: pip install '{_INSTALL[name]}'"
    )


def make_engine(name: str, options: EngineOptions) -> Engine:
    """An engine for the running loop.

    Raises:
        MissingExtra: its package is not installed.
    """
    engine = _make_http1(name, options)
    if not options.http2 or name in _OWN_HTTP2:
        return engine
    from llmmw.pool.engines.http2 import Http2Engine  # noqa: PLC0415 — engines load when used

    return Http2Engine(engine, options)


def _make_http1(name: str, options: EngineOptions) -> Engine:
    try:
        if name == "aiohttp":
            from llmmw.pool.engines.aiohttp import AiohttpEngine  # noqa: PLC0415 — engines load when used

            return AiohttpEngine(options)
        if name == "pyreqwest":
            from llmmw.pool.engines.pyreqwest import PyreqwestEngine  # noqa: PLC0415 — likewise

            return PyreqwestEngine(options)
        from llmmw.pool.engines.httpx import HttpcoreEngine  # noqa: PLC0415 — likewise

        return HttpcoreEngine(name, options)
    except ImportError as error:
        if isinstance(error, MissingExtra):
            raise
        raise _missing(name) from error
