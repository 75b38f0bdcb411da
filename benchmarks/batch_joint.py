"""When a joint request beats single ones: `python benchmarks/batch_joint.py --help`.

`Client.generate_batch` of N different chats, all at once, at the embedded server in a process of its own (with the
step times of a GPU), or at a real vLLM (`--url`): side by side, and jointly in requests of at most so many chats. What
is compared is the wall time of the whole and the client's CPU time, interleaved; ratios are to side by side. Then one
question of N agents, each of whom is due a sample of its own: a request each, and one request with n
(`Coalescer(merge_samples=True)`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import itertools
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from measure import Progress, Row, as_json, in_turn, table, write_json

from llmmw import Batcher, Client, Coalescer, RateLimiter, Stack, Timeout
from llmmw.testing.server import ServerConfig, server_process

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

APART = "side by side"
MERGED, EACH = "one request with n", "a request each"
_fresh = itertools.count()


def stack_of(size: int) -> Stack:
    """Requests of at most so many chats; 0: one each."""
    batcher = Batcher(joint="on" if size else "off", max_size=max(size, 1), min_size=2)
    return Stack(batcher, RateLimiter(concurrency=1024, adaptive=False), Timeout(600))


def sampling_stack(*, merge: bool) -> Stack:
    """One request for the samples of a question, or one each."""
    return Stack(Coalescer(merge_samples=merge), RateLimiter(concurrency=1024, adaptive=False), Timeout(600))


async def measure(client: Client, count: int, tokens: int, *, same: bool = False) -> tuple[float, float]:
    """Wall and CPU seconds of that many chats, all new, or `same`: of one chat so many times, with temperature 1."""
    if same:
        chats = [f"question {next(_fresh)}: what is to be done?" + 100 * " So much is known."] * count
    else:
        chats = [f"question {next(_fresh)}: what is to be done about {number}?" for number in range(count)]
    gc.collect()
    began, cpu = time.perf_counter(), time.process_time()
    outcomes = await client.generate_batch(messages=chats, max_tokens=tokens, temperature=int(same))
    found = time.perf_counter() - began, time.process_time() - cpu
    bad = [outcome.error for outcome in outcomes if not outcome.ok]
    if bad:
        raise RuntimeError(f"{len(bad)} of {count} failed, the first with {bad[0]!r}")
    return found


@contextlib.contextmanager
def server(url: str | None) -> Generator[str]:
    """The base URL of the server to ask."""
    if url is not None:
        yield url
        return
    with server_process(ServerConfig(latency="engine", max_num_seqs=1024, any_model=True)) as process:
        yield process.base_url


async def run(url: str, options: argparse.Namespace, rows: dict[tuple[int, object, str], Row], tell: Progress) -> None:
    """All repeats over one client per way, so that connections are warm."""
    async with contextlib.AsyncExitStack() as clients:

        async def client_of(stack: Stack) -> Client:
            key = os.environ.get("LLMMW_VLLM_API_KEY")
            return await clients.enter_async_context(Client(url, key, model=options.model, stack=stack))

        ways = {size: await client_of(stack_of(size)) for size in (0, *options.sizes)}
        samplers = {way: await client_of(sampling_stack(merge=way is MERGED)) for way in (EACH, MERGED)}
        for client in (*ways.values(), *samplers.values()):
            await measure(client, 4, options.tokens)
        for repeat in range(options.repeats):
            for count in options.counts:
                tell(f"repeat {repeat + 1}, {count} chats")
                for size in in_turn([0, *(size for size in options.sizes if size <= count)], repeat):
                    wall_s, cpu_s = await measure(ways[size], count, options.tokens)
                    for what, value in (("wall time", wall_s), ("client CPU", cpu_s)):
                        rows[count, size, what].values.append(value * 1e3)
            for agents in options.agents:
                tell(f"repeat {repeat + 1}, {agents} agents")
                for way in in_turn([EACH, MERGED], repeat):
                    wall_s, cpu_s = await measure(samplers[way], agents, options.tokens, same=True)
                    for what, value in (("wall time", wall_s), ("client CPU", cpu_s)):
                        rows[agents, way, f"samples, {what}"].values.append(value * 1e3)


def main(argv: Sequence[str] | None = None) -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--url", default=os.environ.get("LLMMW_VLLM_URL"), help="a real server (default $LLMMW_VLLM_URL)"
    )
    parser.add_argument("--model", default=os.environ.get("LLMMW_VLLM_MODEL", "m"))
    parser.add_argument("--counts", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256], help="chats at once")
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256], help="chats in a request")
    parser.add_argument("--agents", type=int, nargs="+", default=[4, 16, 64], help="who ask the same")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    options = parser.parse_args(argv)
    tell = Progress()
    rows: dict[tuple[int, object, str], Row] = {}
    for what in ("wall time", "client CPU"):
        for count in options.counts:
            for size in (0, *(size for size in options.sizes if size <= count)):
                name = f"{count:4} chats, {f'{size} in a request' if size else APART}"
                floor = f"{count:4} chats, {APART}" if size else ""
                rows[count, size, what] = Row(what, name, "ms", ours=True, floor=floor)
        for agents in options.agents:
            for way in (EACH, MERGED):
                floor = f"{agents:4} agents, {EACH}" if way is MERGED else ""
                section = f"samples, {what}"
                rows[agents, way, section] = Row(section, f"{agents:4} agents, {way}", "ms", ours=True, floor=floor)
    with server(options.url) as url:
        asyncio.run(run(url, options, rows, tell))
    print(table(list(rows.values())))
    if options.json is not None:
        settings: dict[str, object] = {"real": options.url is not None, "tokens": options.tokens}
        write_json(options.json, as_json(list(rows.values()), settings, tell.took_s))
    return 0


if __name__ == "__main__":
    sys.exit(main())
