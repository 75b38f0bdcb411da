"""One cap for all agents: 40 calls at 30 requests a minute cost 40 requests, and nobody is refused."""

from __future__ import annotations

from llmmw_mesa import Options, install, step_agents

from llmmw import Deadline, RateLimiter, Retry, Role, Stack, Timeout

WINDOW_S = 3.0


def test_mesa_m14_twenty_agents_at_thirty_requests_a_window_cost_forty_requests_and_no_refusal(world, server):
    """The minute is scaled down, in the server that enforces the limit and in the stack that keeps it.

    The server's bucket has room for requests that come late and then together; it has none for 40 at once.
    """
    server.configure(rpm=30, limit_window_s=WINDOW_S, limit_kind="bucket", limit_style="none")
    stack = Stack(Deadline(90), Retry(attempts=1), RateLimiter(rpm=30, concurrency=64, window=WINDOW_S), Timeout(60))
    model = world(20)
    with install(stack=stack):
        for _ in range(2):
            assert len(step_agents(model.agents).succeeded) == 20
        engine = model.agents[0].llm.get_performance_stats()
    stats = server.stats(0)
    assert stats["completed"] == stats["received"] == engine["upstream_requests"] == 40
    assert all(len(agent.done) == 2 for agent in model.agents)


def test_mesa_m14_the_options_reach_the_limiter():
    limiter = Options(rpm=30, tpm=9000, max_concurrency=16).layers()[Role.LIMIT]
    assert (limiter.rpm, limiter.tpm, limiter.concurrency, limiter.window) == (30, 9000, 16, 60.0)
    assert Options().layers()[Role.LIMIT].concurrency == 64


def test_mesa_m14_no_more_calls_are_under_way_than_allowed(world, server):
    model = world(20)
    with install(max_concurrency=5):
        assert len(step_agents(model.agents).succeeded) == 20
    assert server.stats(0)["peak_in_flight"] <= 5
