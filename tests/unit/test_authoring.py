"""Marking functions, finding them by name, and what a mark changes about a call."""

import asyncio
import sys

import pytest
from durably import authoring, runtime
from durably.authoring import Backoff, Registry, WorkflowDefinition, load_module, step, workflow
from durably.errors import ConfigurationError, DurablyError, RegistrationError
from durably.streams import Writable, get_writable
from durably_schemas import events


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    fresh = Registry()
    monkeypatch.setattr(authoring, "registry", fresh)
    return fresh


class Run:
    run_id, workflow_name, started_at_ms, url = "wrun_1", "flow", 1_700_000_000_000, "https://hooks.example"

    def __init__(self):
        self.slept = []

    async def call_step(self, step, args, kwargs):
        return step.name, args, kwargs

    async def sleep(self, value):
        self.slept.append(value)


def in_run(make):
    """Awaits what ``make`` returns as code of a workflow would."""
    run = Run()

    async def main():
        asyncio.get_running_loop().workflow_context = run
        return await make()

    return asyncio.run(main()), run


def test_a_step_is_a_plain_call_outside_of_a_workflow():
    @step
    def double(x: int) -> int:
        return 2 * x

    assert double(4) == 8


def test_a_step_is_recorded_in_a_workflow_whether_async_or_not():
    @step
    def double(x: int) -> int:
        return 2 * x

    @step(name="other", queue="gpu", max_retries=0, timeout="1s", backoff="2s")
    async def triple(x: int) -> int:
        return 3 * x

    assert in_run(lambda: double(4, y=1))[0] == ("double", (4,), {"y": 1})
    assert in_run(lambda: triple(4))[0] == ("other", (4,), {})
    assert (triple.queue, triple.max_retries, triple.timeout_ms) == ("gpu", 0, 1000)
    assert triple.backoff == events.Backoff(initial_ms=2000, factor=1.0, max_ms=2000)
    assert triple.is_async
    assert not double.is_async


def test_the_default_backoff_is_a_second_doubling_to_a_minute():
    @step
    def plain() -> None: ...

    assert plain.backoff == events.Backoff(initial_ms=1000, factor=2.0, max_ms=60_000)
    assert (plain.max_retries, plain.timeout_ms, plain.queue) == (3, None, "default")


def test_options_make_a_copy_of_the_same_name(registry):
    @step
    def work() -> None: ...

    other = work.options(queue="gpu", max_retries=9, timeout=5, backoff=Backoff(initial="1s", factor=3, maximum="9s"))
    assert (other.name, other.queue, other.max_retries, other.timeout_ms) == ("work", "gpu", 9, 5000)
    assert other.backoff == events.Backoff(initial_ms=1000, factor=3.0, max_ms=9000)
    assert registry.steps["work"] is work
    assert work.queue == "default"


@pytest.mark.parametrize(
    "options",
    [
        {"max_retries": -1}, {"max_retries": True}, {"timeout": "soon"}, {"timeout": 0}, {"queue": "a/b"},
        {"backoff": Backoff(factor=0.5)}, {"backoff": -1}, {"name": ""},
    ],
)  # fmt: skip
def test_bad_settings_are_refused_where_they_stand(options):
    with pytest.raises(RegistrationError):
        step(**options)(lambda: None)


def test_only_functions_are_steps_and_only_async_functions_workflows():
    with pytest.raises(RegistrationError, match="neither a function"):
        step(int)
    with pytest.raises(RegistrationError, match="not an async def"):
        workflow(lambda: None)


def test_a_step_that_is_a_generator_says_so_and_one_that_is_a_method_takes_its_instance_along(registry):
    @step
    async def ticks(n: int):
        yield n

    @step
    def tocks(n: int):
        yield n

    assert (ticks.yields, ticks.is_async) == (True, True)
    assert (tocks.yields, tocks.is_async) == (True, False)

    class Shop:
        name = "corner"

        @step
        async def sell(self, item: str) -> str:
            return f"{self.name}: {item}"

        @staticmethod
        @step(name="opening")
        def opening(hour: int) -> int:
            return hour

    shop = Shop()
    assert asyncio.run(shop.sell("tea")) == "corner: tea"
    assert shop.opening(9) == Shop.opening(9) == 9
    value, _ = in_run(lambda: shop.sell("tea"))
    assert value == ("sell", (shop, "tea"), {})


def test_a_step_defined_while_a_workflow_runs_is_refused_since_no_worker_would_find_it(registry):
    async def body():
        @step
        def inner() -> None: ...

    with pytest.raises(RegistrationError, match="top level of a module"):
        in_run(body)


def test_steps_that_durably_brings_along_are_found_behind_the_users(registry):
    from durably.authoring import Registry

    assert Registry().step("durably.fetch").name == "durably.fetch"
    assert Registry().step("nowhere") is None


def test_two_functions_of_one_name_clash_and_a_reload_replaces(registry):
    def define():
        @step
        def work() -> None: ...

        return work

    define()
    again = define()
    assert registry.steps["work"] is again

    with pytest.raises(RegistrationError, match=r"define\.<locals>\.work.*clash.*give one of them name="):

        @step
        def work() -> None: ...


def test_a_workflow_is_inlined_in_a_run_and_refused_elsewhere(registry):
    @workflow(name="flow")
    async def fn(x: int) -> int:
        return x + 1

    assert registry.workflows == {"flow": fn}
    assert in_run(lambda: fn(1))[0] == 2
    with pytest.raises(DurablyError, match=r"start\(fn"):
        fn(1)


def test_the_code_version_follows_the_source(registry):
    empty = registry.code_version()

    @workflow
    async def fn() -> int:
        return 1

    first = registry.code_version()

    def other():
        @workflow(name="second")
        async def fn() -> int:
            return 2

    other()
    assert len({empty, first, registry.code_version()}) == 3
    assert len(first) == 12
    assert int(first, 16) >= 0


@pytest.mark.parametrize("version", [None, 1])
def test_the_code_version_follows_what_a_workflow_calls(tmp_path, monkeypatch, version):
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "versions_shop"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "flows.py").write_text("from versions_shop import prices\nasync def flow(): return prices.of(1)\n")
    seen = []
    for factor in (2, 3, 2):
        (package / "prices.py").write_text(f"def of(n): return n * {factor}\n")
        found = load_module("versions_shop.flows")
        registry = Registry()
        registry.add_workflow(WorkflowDefinition("flow", found.flow, version))
        if version is not None:
            registry.add_workflow(WorkflowDefinition("flow", in_run, version + 1))  # the newest, of another package
        seen.append(registry.code_version())
        for name in [name for name in sys.modules if name.startswith("versions_shop")]:
            del sys.modules[name]
    assert seen[0] == seen[2] != seen[1]


def test_modules_load_by_name_and_by_path(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "durably_test_a.py").write_text("x = 1")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "durably_test_b.py").write_text("x = 2")
    try:
        assert load_module("durably_test_a").x == 1
        assert load_module("sub/durably_test_b.py").x == 2
        (tmp_path / "durably_test_b.py").write_text("x = 3")
        with pytest.raises(ConfigurationError, match="imported already"):
            load_module("durably_test_b.py")
    finally:
        for name in ("durably_test_a", "durably_test_b"):
            sys.modules.pop(name, None)


def test_a_module_that_fails_says_so_and_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "durably_test_bad.py").write_text("import durably_test_missing_dependency")
    with pytest.raises(ConfigurationError, match=r"durably_test_missing_dependency.*install") as e:
        load_module(str(tmp_path / "durably_test_bad.py"))
    assert isinstance(e.value.__cause__, ModuleNotFoundError)
    with pytest.raises(ConfigurationError, match="run from the folder"):
        load_module("durably_test_nowhere")
    with pytest.raises(ConfigurationError, match="no file"):
        load_module("nowhere/durably_test.py")


def test_metadata_and_sleep_know_their_places():
    async def flow():
        await runtime.sleep("1s")
        with pytest.raises(DurablyError, match="in a step only"):
            runtime.get_step_metadata()
        handle = get_writable()
        with pytest.raises(DurablyError, match="pass the handle"):
            await handle.write(1)
        return runtime.get_workflow_metadata(), handle

    (metadata, handle), run = in_run(flow)
    assert (metadata.run_id, metadata.workflow_name) == ("wrun_1", "flow")
    assert metadata.started_at.timestamp() * 1000 == Run.started_at_ms
    assert run.slept == ["1s"]
    assert handle == Writable("wrun_1", "default")

    for nowhere in (runtime.get_step_metadata, runtime.get_workflow_metadata, get_writable):
        with pytest.raises(DurablyError):
            nowhere()
    with pytest.raises(DurablyError, match=r"asyncio\.sleep"):
        asyncio.run(runtime.sleep(1))
