"""Connections to servers: `ConnectionPool` and the HTTP engines below it."""

from llmmw.pool.bound import BoundPool
from llmmw.pool.pool import ConnectionPool
from llmmw.pool.response import Response

__all__ = ["BoundPool", "ConnectionPool", "Response"]
