"""The embedded model server: OpenAI-shaped HTTP on loopback, deterministic made-up answers, emulated latency.

It is a test double and never a model: texts are seeded syllables, vectors are seeded noise, and both say nothing
about the prompt. ``/v1/models``, the ``Server`` header and ``system_fingerprint`` say so too.

    async with running_server(ServerConfig(latency="engine")) as server: ...     # on this loop
    with server_process(ServerConfig(rpm=60)) as server: ...                     # a real process
"""

from .app import ModelServer, running_server
from .cli import main
from .config import ServerConfig
from .faults import FaultRule, Match
from .process import ServerProcess, server_process

__all__ = [
    "FaultRule",
    "Match",
    "ModelServer",
    "ServerConfig",
    "ServerProcess",
    "main",
    "running_server",
    "server_process",
]
