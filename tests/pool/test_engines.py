"""Every wire engine keeps the contract."""

import pytest

from llmmw.testing.pool_contract import PoolContract


class TestAiohttp(PoolContract):
    engine = "aiohttp"


class TestHttpx(PoolContract):
    engine = "httpx"


class TestHttpx2(PoolContract):
    engine = "httpx2"

    @pytest.fixture(autouse=True)
    def _needs(self):
        pytest.importorskip("httpcore2")


class TestPyreqwest(PoolContract):
    engine = "pyreqwest"
    sees_connections = False

    @pytest.fixture(autouse=True)
    def _needs(self):
        pytest.importorskip("pyreqwest")
