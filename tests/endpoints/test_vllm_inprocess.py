"""`VLLMEngine` on a stand-in for the vllm package: which of its functions are used how, and what callers see.

The real package is asked in `tests/vllm/test_vllm_engine.py`.
"""

import argparse
import asyncio
import gc
import json
import sys
import threading
import weakref
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest

from llmmw import Client, Stack, using
from llmmw.call import Call
from llmmw.endpoints import Endpoint
from llmmw.endpoints.base import BatchEndpoint
from llmmw.endpoints.vllm_engine import VLLMEngine
from llmmw.env import Env
from llmmw.errors import AmbiguousOutcome, Closed, ConfigError, ConnectionFailed, MissingExtra, StatusError

PATIENCE_S = 120
DEFAULTS = {
    "model": "default",
    "served_model_name": None,
    "disable_log_stats": False,
    "scheduling_policy": "fcfs",
    "max_model_len": None,
    "chat_template": None,
}


class FakeLLM:
    """What stands for AsyncLLM."""

    made = ()  # replaced by the fixture
    fails_with = None

    def __init__(self, args, *, reading=None):
        model = SimpleNamespace(model=args.model, served_model_name=args.model)
        scheduler = SimpleNamespace(policy=args.scheduling_policy)
        self.vllm_config = SimpleNamespace(model_config=model, scheduler_config=scheduler)
        self.args = args
        self.output_handler = reading
        self.errored = False
        self.dead_error = RuntimeError("EngineCore encountered an issue")
        self.shutdowns = []
        self.made_on = threading.current_thread()

    @classmethod
    def from_engine_args(cls, args):
        if cls.fails_with is not None:
            raise cls.fails_with
        cls.made.append(cls(args))
        return cls.made[-1]

    async def get_supported_tasks(self):
        return ("generate",)

    def get_num_unfinished_requests(self):
        return 7

    def generate(self): ...

    def abort(self): ...

    def shutdown(self, timeout=None):
        self.shutdowns.append(timeout)


class EngineArgs:
    def __init__(self, **values):
        if values["max_model_len"] == "long":
            raise ValueError("max_model_len: not a number")
        vars(self).update(values, max_model_len=values["max_model_len"] and int(values["max_model_len"]))

    @classmethod
    def from_cli_args(cls, args):
        return cls(**{name: value for name, value in vars(args).items() if name != "chat_template"})


class Middleware:
    def __init__(self, name):
        self.cls = type(name, (), {})


class FakeApp:
    """Answers as vLLM's server does, as far as the questions below go."""

    def __init__(self):
        self.state = SimpleNamespace()
        names = ("CORSMiddleware", "ScalingMiddleware", "AuthenticationMiddleware")
        self.user_middleware = [Middleware(name) for name in names]
        self.middleware_stack = "made"
        self.asked, self.left = [], threading.Event()

    async def __call__(self, scope, receive, send):
        path, raw = scope["path"], (await receive())["body"]
        payload = json.loads(raw)
        self.asked.append((path, payload))
        prompts = payload["messages"] if path.endswith("/batch") else payload.get("prompt", payload.get("messages"))
        engine = self.state.engine_client
        if prompts == "die":
            engine.errored = True
            await answer(send, {"error": {"message": "EngineDeadError", "code": 500}}, 500)
        elif payload.get("temperature", 0) < 0:
            error = {"message": "temperature must be non-negative", "type": "BadRequestError", "param": "temperature"}
            await answer(send, {"error": {**error, "code": 400}}, 400)
        elif prompts == "wait":
            await receive()
            self.left.set()
        elif payload.get("stream"):
            await self.stream(send)
        elif path.endswith("/batch") or (path.endswith("/completions") and isinstance(payload.get("prompt"), list)):
            await answer(send, completion(path, prompts))
        else:
            await answer(send, completion(path, [prompts]))

    async def stream(self, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for text, finish in (("Hel", None), ("lo", "stop")):
            choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
            event = {"id": "x", "object": "chat.completion.chunk", "choices": [choice]}
            await send(part(b"data: " + json.dumps(event).encode() + b"\n\n"))
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        await send(part(b"data: " + json.dumps({"id": "x", "choices": [], "usage": usage}).encode() + b"\n\n"))
        await send(part(b"data: [DONE]\n\n"))
        await send({"type": "http.response.body"})


def part(data):
    return {"type": "http.response.body", "body": data, "more_body": True}


def completion(path, prompts):
    def choice(index, prompt):
        text = f"answer to {prompt if isinstance(prompt, str) else prompt[-1]['content']}"
        said = {"message": {"role": "assistant", "content": text}} if "chat" in path else {"text": text}
        return {"index": index, **said, "finish_reason": "stop"}

    choices = [choice(index, prompt) for index, prompt in enumerate(prompts)]
    count = len(prompts)
    usage = {"prompt_tokens": 3 * count, "completion_tokens": 2 * count, "total_tokens": 5 * count}
    return {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": choices, "usage": usage}


async def answer(send, value, status=200):
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": json.dumps(value).encode()})


def package(monkeypatch, **modules):
    """Modules below `vllm`, each a mapping of names, in place of the real package."""
    for name in ("", *modules):
        full = f"vllm.{name.replace('__', '.')}" if name else "vllm"
        while full:
            if full not in sys.modules:
                module = ModuleType(full)
                module.__path__ = []
                module.__spec__ = ModuleSpec(full, None)
                monkeypatch.setitem(sys.modules, full, module)
            full = full.rpartition(".")[0]
    for name, found in modules.items():
        vars(sys.modules[f"vllm.{name.replace('__', '.')}"]).update(found)
    sys.modules["vllm"].__version__ = "0.99"


def make_arg_parser(parser):
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name}", default=default)
    return parser


class Vllm:
    """The stand-in's parts."""

    def __init__(self):
        self.apps, self.validated, self.told = [], [], []

    def build_app(self, args, supported_tasks=None, model_config=None):
        self.told.append((supported_tasks, model_config))
        self.apps.append(FakeApp())
        return self.apps[-1]

    async def init_app_state(self, engine_client, state, args, supported_tasks=None):
        state.engine_client = engine_client
        state.args = args

    def validate_parsed_serve_args(self, args):
        self.validated.append(args)
        if args.chat_template == "missing.jinja":
            raise TypeError("no such template")


@pytest.fixture
def vllm(monkeypatch):
    found = Vllm()
    found.engines = []
    monkeypatch.setattr(FakeLLM, "made", found.engines)
    monkeypatch.setattr(FakeLLM, "fails_with", None)
    package(
        monkeypatch,
        utils__argparse_utils={"FlexibleArgumentParser": argparse.ArgumentParser},
        entrypoints__launchers__cli_args={
            "make_arg_parser": make_arg_parser,
            "validate_parsed_serve_args": found.validate_parsed_serve_args,
        },
        entrypoints__launchers__app={"build_app": found.build_app},
        entrypoints__launchers__api_server__app_state={"init_app_state": found.init_app_state},
        engine__arg_utils={"AsyncEngineArgs": EngineArgs},
        v1__engine__async_llm={"AsyncLLM": FakeLLM},
    )
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    return found


def client(engine, **options):
    return Client(engine, model="m", stack=Stack.recommended(cache_ttl=300, timeout=60), **options)


# ── what can be asked ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_client_asks_it_like_a_server(vllm):
    async with client(VLLMEngine("org/model")) as asked:
        chat = await asked.chat("hello")
        assert (chat.text, chat.usage.total_tokens, chat.endpoint) == ("answer to hello", 5, "vllm:org/model")
        assert (await asked.complete("more")).text == "answer to more"
        pieces = [piece async for piece in asked.stream("hello to you")]
        assert "".join(pieces) == "Hello"
        with pytest.raises(StatusError, match="temperature must be non-negative") as caught:
            await asked.chat("hello", temperature=-1)
        assert (caught.value.status, caught.value.fault) == (400, "invalid")
        stats = asked.get_performance_stats()
    assert stats["upstream_requests"] == 4
    assert [path for path, _ in vllm.apps[0].asked[:2]] == ["/v1/chat/completions", "/v1/completions"]
    assert (len(vllm.engines), len(vllm.engines[0].shutdowns)) == (1, 1)


async def test_a_cached_stream_is_replayed_as_it_came(vllm):
    async with client(VLLMEngine("m")) as asked:
        first = [piece async for piece in asked.stream("hello")]
        assert [piece async for piece in asked.stream("hello")] == first
        assert len(vllm.apps[0].asked) == 1


async def test_a_batch_is_one_joint_call(vllm):
    async with client(VLLMEngine("m")) as asked:
        outcomes = await asked.generate_batch(messages=[f"q{i}" for i in range(40)])
    assert [outcome.text for outcome in outcomes] == [f"answer to q{i}" for i in range(40)]
    paths = {path for path, _ in vllm.apps[0].asked}
    assert "/v1/chat/completions/batch" in paths
    assert len(vllm.apps[0].asked) < 40


async def test_it_answers_many_calls_without_a_stack(vllm):
    engine = VLLMEngine("m")
    assert isinstance(engine, Endpoint)
    assert isinstance(engine, BatchEndpoint)
    assert {"batch:chat", "batch:complete", "n", "idempotent"} == engine.capabilities
    engine.start(Env())
    calls = [Call("complete", "m", {"model": "m", "prompt": f"p{i}"}, target=engine.name) for i in range(3)]
    outcomes = await engine.generate_batch(calls)
    assert [outcome.text for outcome in outcomes] == ["answer to p0", "answer to p1", "answer to p2"]
    await engine.aclose()


async def test_a_cancelled_call_is_aborted(vllm):
    async with client(VLLMEngine("m")) as asked:
        task = asyncio.create_task(asked.complete("wait"))
        while not (vllm.apps and vllm.apps[0].asked):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(vllm.apps[0].left.wait, PATIENCE_S)


@pytest.mark.parametrize(("policy", "sent"), [("priority", [-3, None, 5]), ("fcfs", [None, None, None])])
async def test_the_priority_goes_along_where_the_engine_schedules_by_it(vllm, policy, sent):
    async with client(VLLMEngine("m", scheduling_policy=policy)) as asked:
        with using(priority=-3):
            await asked.complete("urgent")
        await asked.complete("ordinary")
        with using(priority=-3):
            await asked.complete("says so itself", priority=5)
    assert [payload.get("priority") for _, payload in vllm.apps[0].asked] == sent


async def test_tenants_are_kept_apart_in_the_prefix_cache_where_that_is_wanted(vllm):
    engine = VLLMEngine("m", cache_salt="a secret that nobody can guess")
    async with client(engine) as asked:
        for tenant in ("alice", "bob"):
            with using(tenant=tenant):
                await asked.complete("hello")
    salts = [payload["cache_salt"] for _, payload in vllm.apps[0].asked]
    assert len(set(salts)) == 2


# ── how it starts and ends ──────────────────────────────────────────────────────────────────────────────────────────


async def test_it_starts_when_it_is_first_asked_or_awaited_on_a_thread_of_its_own(vllm):
    engine = VLLMEngine("m")
    assert (vllm.engines, engine.gauges()["state"]) == ([], "new")
    assert await engine.ready() is engine
    assert vllm.engines[0].made_on is not threading.current_thread()
    assert engine.gauges() == {"engine": "vllm", "state": "running", "unfinished": 7}
    await engine.aclose()
    await engine.aclose()
    assert vllm.engines[0].shutdowns == [60.0]
    assert engine.gauges()["state"] == "closed"
    assert not [thread for thread in threading.enumerate() if "vLLM" in thread.name]


def test_it_serves_one_loop_after_the_other(vllm):
    engine = VLLMEngine("m")
    asked = client(engine)
    for number in range(3):
        asyncio.run(asked.chat(f"hello {number}"))
    asyncio.run(asked.aclose())
    assert (len(vllm.engines), len(vllm.apps[0].asked)) == (1, 3)


async def test_closed_it_answers_no_more(vllm):
    engine = VLLMEngine("m")
    engine.start(Env())
    await engine.aclose()
    with pytest.raises(Closed):
        await engine(Call("complete", "m", {"prompt": "p"}))
    assert vllm.engines == []


async def test_the_options_are_those_of_the_server(vllm):
    engine = VLLMEngine("m", served_model_name="tiny", max_model_len="64", name="mine")
    await engine.ready()
    args = vllm.apps[0].state.args
    assert (args.model, args.served_model_name, args.max_model_len) == ("m", ["tiny"], 64)
    assert args.disable_log_stats
    assert vllm.validated == [args]
    assert vllm.told == [(("generate",), vllm.engines[0].vllm_config.model_config)]
    assert [each.cls.__name__ for each in vllm.apps[0].user_middleware] == ["ScalingMiddleware"]
    assert vllm.apps[0].middleware_stack is None
    assert (engine.name, repr(engine)) == ("mine", "VLLMEngine('mine')")
    await engine.aclose()


async def test_a_directory_may_be_a_path(vllm, tmp_path):
    engine = VLLMEngine(tmp_path / "model")
    await engine.ready()
    assert vllm.engines[0].args.model == str(tmp_path / "model")
    await engine.aclose()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_model_length": 3}, "no such option; did you mean max_model_len"),
        ({"zzz": 3}, r"VLLMEngine\(zzz=\): vLLM has no such option$"),
        ({"max_model_len": "long"}, "refuses its options: max_model_len: not a number"),
        ({"chat_template": "missing.jinja"}, "refuses its options: no such template"),
    ],
)
async def test_options_that_vllm_refuses_are_a_configuration_error(vllm, options, words):
    engine = VLLMEngine("m", **options)
    with pytest.raises(ConfigError, match=words):
        await engine.ready()
    async with client(engine) as asked:
        with pytest.raises(ConfigError, match=words):
            await asked.chat("hello")
    assert engine.gauges()["state"] == "closed"


@pytest.mark.parametrize(
    ("error", "raised", "words"),
    [
        (ValueError("dtype"), ConfigError, "refuses its options: dtype"),
        (RuntimeError("Engine core initialization failed"), ConnectionFailed, "__main__"),
        (OSError("no such model"), ConnectionFailed, "did not start: OSError: no such model"),
    ],
)
async def test_an_engine_that_does_not_start_says_why(vllm, monkeypatch, error, raised, words):
    monkeypatch.setattr(FakeLLM, "fails_with", error)
    engine = VLLMEngine("m")
    with pytest.raises(raised, match=words):
        await engine.ready()
    await engine.aclose()


async def test_an_engine_that_dies_is_an_error_of_the_endpoint(vllm):
    engine = VLLMEngine("m")
    engine.start(Env())
    with pytest.raises(AmbiguousOutcome, match="engine is dead: EngineCore encountered"):
        await engine(Call("complete", "m", {"prompt": "die"}))
    assert vllm.apps[0].state.server.should_exit is False
    with pytest.raises(ConnectionFailed, match="engine is dead"):
        await engine(Call("complete", "m", {"prompt": "hello"}))
    assert engine.gauges()["state"] == "failed"
    await engine.aclose()
    assert len(vllm.engines[0].shutdowns) == 1


async def test_closed_it_keeps_nothing_of_vllm(vllm):
    engine = VLLMEngine("m")
    await engine.ready()
    hosted = engine._hosting.hosted
    kept = weakref.ref(vllm.engines.pop())
    await engine.aclose()
    assert (hosted.broken(), hosted.unfinished()) == (None, None)
    vllm.apps.clear()
    vllm.told.clear()
    gc.collect()
    assert kept() is None


async def test_one_that_nobody_closes_warns_and_ends(vllm):
    engines = [VLLMEngine("m")]
    await engines[0].ready()
    with pytest.warns(ResourceWarning, match="was not closed"):
        engines.clear()
    thread = next(thread for thread in threading.enumerate() if "vLLM" in thread.name)
    await asyncio.to_thread(thread.join, PATIENCE_S)
    assert len(vllm.engines[0].shutdowns) == 1


# ── an engine that is already made ──────────────────────────────────────────────────────────────────────────────────


def made(*, reading=None):
    return FakeLLM(argparse.Namespace(**DEFAULTS | {"model": "theirs"}), reading=reading)


async def test_an_engine_that_was_made_on_this_loop_is_asked_here_and_left_to_its_owner(vllm):
    reading = asyncio.create_task(asyncio.Event().wait())
    theirs = made(reading=reading)
    async with client(VLLMEngine(theirs, chat_template="x")) as asked:
        assert (await asked.chat("hello")).text == "answer to hello"
        assert asked.endpoint.name == "vllm:theirs"
        assert asked.endpoint._hosting.loop is asyncio.get_running_loop()
        args = vllm.apps[0].state.args
        assert (args.model, args.served_model_name, args.chat_template) == ("theirs", ["theirs"], "x")
    assert (theirs.shutdowns, vllm.engines, reading.done()) == ([], [], False)
    reading.cancel()


async def test_an_engine_that_has_not_met_a_loop_gets_one(vllm):
    engine = VLLMEngine(made())
    await engine.ready()
    assert engine._hosting.loop is not asyncio.get_running_loop()
    await engine.aclose()


def test_an_engine_whose_loop_has_ended_says_so(vllm):
    async def make():
        return made(reading=asyncio.create_task(asyncio.Event().wait()))

    engine = VLLMEngine(asyncio.run(make()))
    with pytest.raises(ConnectionFailed, match="has ended"):
        asyncio.run(engine.ready())


# ── several stacks ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_one_engine_serves_two_clients_and_ends_with_the_first_of_its_endpoints(vllm):
    engine = VLLMEngine("m")
    async with client(engine) as first:
        async with client(VLLMEngine(engine, name="second")) as second:
            assert (await first.chat("hello")).text == (await second.chat("hello")).text
            assert (second.endpoint.name, len(vllm.engines), len(vllm.apps)) == ("second", 1, 1)
        assert (await first.chat("still there?")).text
        with pytest.raises(ConfigError, match=r"belongs to another stack; VLLMEngine\(it\)"):
            client(engine)
    assert len(vllm.engines[0].shutdowns) == 1
    with pytest.raises(ConfigError, match="max_model_len: belongs to VLLMEngine"):
        VLLMEngine(engine, max_model_len=3)


# ── other releases of vLLM ──────────────────────────────────────────────────────────────────────────────────────────


async def test_older_releases_have_their_functions_elsewhere_and_with_other_arguments(monkeypatch):
    old = Vllm()
    monkeypatch.setattr(FakeLLM, "made", [])
    monkeypatch.setattr(FakeLLM, "fails_with", None)
    monkeypatch.setattr(FakeLLM, "shutdown", lambda self: self.shutdowns.append("no timeout"))
    monkeypatch.setattr(FakeLLM, "get_num_unfinished_requests", None)

    def build_app(args):
        return old.build_app(args)

    async def init_app_state(engine_client, vllm_config, state, args):
        assert vllm_config is engine_client.vllm_config
        await old.init_app_state(engine_client, state, args)

    package(
        monkeypatch,
        utils={"FlexibleArgumentParser": argparse.ArgumentParser},
        entrypoints__openai__cli_args={"make_arg_parser": make_arg_parser, "validate_parsed_serve_args": vars},
        entrypoints__openai__api_server={"build_app": build_app, "init_app_state": init_app_state},
        engine__arg_utils={"AsyncEngineArgs": EngineArgs},
        v1__engine__async_llm={"AsyncLLM": FakeLLM},
    )
    engine = VLLMEngine("m")
    async with client(engine) as asked:
        assert (await asked.chat("hello")).text == "answer to hello"
        assert engine.gauges()["unfinished"] is None
    assert FakeLLM.made[0].shutdowns == ["no timeout"]


async def test_a_release_without_what_is_needed_is_named(monkeypatch):
    package(monkeypatch)
    engine = VLLMEngine("m")
    with pytest.raises(ConfigError, match=r"this vLLM \(0\.99\): it has no make_arg_parser"):
        await engine.ready()
    await engine.aclose()


# ── what it is given ────────────────────────────────────────────────────────────────────────────────────────────────


def test_without_vllm_the_error_says_what_to_install():
    with pytest.raises(MissingExtra, match=r"pip install 'llmmw\[vllm\]'"):
        VLLMEngine("m")


@pytest.mark.parametrize("model", [None, 3, object(), ""])
def test_a_model_is_a_name_or_an_engine(vllm, model):
    with pytest.raises(ConfigError, match="VLLMEngine"):
        VLLMEngine(model)


def test_a_failed_constructor_leaves_nothing_to_warn_of(vllm):
    with pytest.raises(ConfigError):
        VLLMEngine("m", name="")
