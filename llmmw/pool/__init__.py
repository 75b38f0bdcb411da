"""Connections to servers: `ConnectionPool` and the HTTP engines below it."""

from llmmw.pool.bound import BoundPool, Response
from llmmw.pool.pool import ConnectionPool

__all__ = ["BoundPool", "ConnectionPool", "Response"]
