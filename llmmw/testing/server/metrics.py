"""GET /metrics: Prometheus text under vLLM's names; nothing else is promised of these figures."""

from .core import Core
from .stats import BUCKETS, Histogram


def metrics(core: Core) -> str:
    """The page."""
    config, stats, engine = core.config, core.stats, core.engine
    label = f'engine="0",model_name="{config.models[0]}"'
    lines: list[str] = []

    def one(name: str, kind: str, value: float, extra: str = "") -> None:
        header = f"# TYPE vllm:{name} {kind}"
        if header not in lines:
            lines.append(header)
        lines.append(f"vllm:{name}{{{label}{extra}}} {value}")

    if config.latency == "engine":
        running, waiting = len(engine.running), engine.waiting
    else:
        running, waiting = stats.in_flight, 0
    one("num_requests_running", "gauge", running)
    one("num_requests_waiting", "gauge", waiting)
    one("kv_cache_usage_perc", "gauge", engine.kv_usage)
    one("prefix_cache_queries_total", "counter", engine.prefix.queries)
    one("prefix_cache_hits_total", "counter", engine.prefix.hits)
    one("prompt_tokens_total", "counter", stats.prompt_tokens)
    one("generation_tokens_total", "counter", stats.output_tokens)
    one("num_preemptions_total", "counter", 0)
    one("admission_rejections_total", "counter", stats.by_outcome["http_503"])
    for reason in ("stop", "length", "tool_calls"):
        one("request_success_total", "counter", stats.by_finish[reason], f',finished_reason="{reason}"')
    # vLLM keeps this at 0 when clients leave; so do we.
    one("request_success_total", "counter", 0, ',finished_reason="abort"')
    for name, histogram in (
        ("time_to_first_token_seconds", engine.first_token_s),
        ("request_queue_time_seconds", engine.queue_s),
        ("e2e_request_latency_seconds", stats.latency),
    ):
        lines.extend(_histogram(name, label, histogram))
    return "\n".join(lines) + "\n"


def _histogram(name: str, label: str, histogram: Histogram) -> list[str]:
    lines = [f"# TYPE vllm:{name} histogram"]
    total = 0
    for bound, amount in zip((*BUCKETS, "+Inf"), histogram.counts, strict=True):
        total += amount
        lines.append(f'vllm:{name}_bucket{{{label},le="{bound}"}} {total}')
    lines.append(f"vllm:{name}_count{{{label}}} {total}")
    lines.append(f"vllm:{name}_sum{{{label}}} {histogram.total}")
    return lines


def load_header(core: Core, wanted: str) -> dict[str, str]:
    """The ``endpoint-load-metrics`` response header in the asked format (``JSON`` or ``TEXT``), else nothing."""
    waiting, usage = float(core.engine.waiting), round(core.engine.kv_usage, 6)
    kind = wanted.upper()
    if kind == "JSON":
        inner = f'"kv_cache_usage_perc": {usage}, "num_requests_waiting": {waiting}'
        return {"endpoint-load-metrics": f'JSON {{"named_metrics": {{{inner}}}}}'}
    if kind == "TEXT":
        text = f"named_metrics.kv_cache_usage_perc={usage}, named_metrics.num_requests_waiting={waiting}"
        return {"endpoint-load-metrics": f"TEXT {text}"}
    return {}
