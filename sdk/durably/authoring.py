"""Marking functions as workflows and steps, and the registry that processors and workers find them in."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import math
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Protocol, TypeVar, cast, overload

from durably_schemas import Catalogue, events

from durably.durations import LONGEST, Duration, milliseconds
from durably.errors import ConfigurationError, DurablyError, RegistrationError
from durably.runtime import workflow_context

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
    from types import ModuleType

P = ParamSpec("P")
R = TypeVar("R")
D = TypeVar("D", "StepDefinition[..., Any]", "WorkflowDefinition[..., Any]")

_CATALOGUE = Catalogue()


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Delays between attempts: ``initial``, then ``factor`` times the last one, never more than ``maximum``."""

    initial: Duration = "1s"
    factor: float = 2.0
    maximum: Duration = "60s"

    def record(self) -> events.Backoff:
        """In milliseconds, as it is recorded. Raises `ValueError` for a factor below 1 or a bad duration."""
        if not 1 <= self.factor < float("inf"):
            raise ValueError(f"backoff factor {self.factor!r}: at least 1, and finite")
        return events.Backoff(
            initial_ms=milliseconds(self.initial), factor=float(self.factor), max_ms=milliseconds(self.maximum)
        )


DEFAULT_BACKOFF = Backoff().record()


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class StepDefinition(Generic[P, R]):
    """A function marked `step`.

    Called in a workflow it is run by a worker, and the call is a coroutine also where the function is synchronous.
    Called elsewhere it is the function.
    """

    name: str
    fn: Callable[..., Any]
    queue: str
    max_retries: int
    timeout_ms: int | None
    backoff: events.Backoff
    is_async: bool
    yields: bool = False  # what it yields goes into a stream, and its result is that stream's handle

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[None, None, R]:
        """Runs the step, where the call stands in a workflow; else calls the function."""
        run = workflow_context()
        if run is not None:
            return run.call_step(self, args, kwargs)
        return cast("Coroutine[None, None, R]", self.fn(*args, **kwargs))

    @overload
    def __get__(self, instance: None, owner: type, /) -> StepDefinition[P, R]: ...
    @overload
    def __get__(self, instance: object, owner: type, /) -> Callable[..., Coroutine[None, None, R]]: ...
    def __get__(self, instance: object, owner: type, /) -> Any:
        """As a method: the instance travels as the first argument, so its class must be one that can."""
        return self if instance is None else partial(cast("Callable[..., Any]", self), instance)

    def options(
        self,
        *,
        queue: str | None = None,
        max_retries: int | None = None,
        timeout: Duration | None = None,
        backoff: Duration | Backoff | None = None,
    ) -> StepDefinition[P, R]:
        """The same step with other settings, for single calls: ``charge.options(queue="gpu")(order)``."""
        changes: dict[str, Any] = {}
        if queue is not None:
            changes["queue"] = queue
        if max_retries is not None:
            changes["max_retries"] = max_retries
        if timeout is not None:
            changes["timeout_ms"] = _timeout(self.name, timeout)
        if backoff is not None:
            changes["backoff"] = _backoff(self.name, backoff)
        return dataclasses.replace(self, **changes)

    def __post_init__(self) -> None:
        if (
            isinstance(self.max_retries, bool)
            or not isinstance(self.max_retries, int)
            or not 0 <= self.max_retries < 2**31 - 1
        ):
            raise RegistrationError(
                f"step {self.name}: max_retries={self.max_retries!r} must be a whole number, 0 to {2**31 - 2}"
            )
        # Some have been made of a handle that travelled, and with it from anywhere.
        times = (self.timeout_ms or 0, self.backoff.initial_ms, self.backoff.max_ms)
        if not (all(type(ms) is int and 0 <= ms <= LONGEST for ms in times) and 1 <= self.backoff.factor < math.inf):
            raise RegistrationError(f"step {self.name}: timeout={self.timeout_ms!r} ms, {self.backoff}: out of range")
        try:
            _CATALOGUE.requests(self.queue)
        except (ValueError, TypeError) as e:
            raise RegistrationError(f"step {self.name}: {e}") from e

    def __repr__(self) -> str:
        return f"<step {self.name} ({_place(self.fn)})>"


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class WorkflowDefinition(Generic[P, R]):
    """A function marked `workflow`. Start it with ``start()``; called inside a run it becomes part of that run.

    Attributes:
        name: what runs are recorded under.
        fn: the function.
        version: which of several that stand side by side under one name; None: it is the only one.
        pinned: a run's steps go to the workers of the build that it began with.
    """

    name: str
    fn: Callable[..., Coroutine[Any, Any, Any]]
    version: int | None = None
    pinned: bool = False

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[None, None, R]:
        """Inlines the workflow into the run whose code is calling. Raises `DurablyError` elsewhere."""
        if workflow_context() is None:
            raise DurablyError(
                f"workflow {self.name} was called outside of a run: start it with start({self.fn.__name__}, …), "
                f"which returns the run"
            )
        return self.fn(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<workflow {self.name} ({_place(self.fn)})>"


class Registry:
    """Workflows and steps by name."""

    def __init__(self) -> None:
        self.workflows: dict[str, WorkflowDefinition[..., Any]] = {}
        self.steps: dict[str, StepDefinition[..., Any]] = {}
        self._versions: dict[
            str, WorkflowDefinition[..., Any]
        ] = {}  # of workflows that have several, by "name version"
        self._code_version: str | None = None

    def add_workflow(self, definition: WorkflowDefinition[..., Any]) -> None:
        """Registers, or replaces what the same place registered before. Raises `RegistrationError` on a clash.

        Of several versions of a workflow the newest is the one that `workflows` has.
        """
        from durably import health  # it is made of a step

        if definition.name == health.WORKFLOW:
            raise RegistrationError(f"workflow {_place(definition.fn)}: {health.WORKFLOW!r} is durably's own name")
        newest = self.workflows.get(definition.name)
        if definition.version is None or newest is None or newest.version is None:
            self._add("workflow", self.workflows, definition.name, definition)
        elif definition.version >= newest.version:
            self.workflows[definition.name] = definition
        if definition.version is not None:
            self._add("workflow", self._versions, f"{definition.name} {definition.version}", definition)
        self._code_version = None

    def versions(self, name: str) -> dict[int, WorkflowDefinition[..., Any]]:
        """The versions of a workflow; none where it is registered without."""
        found = (definition for definition in self._versions.values() if definition.name == name)
        return {definition.version: definition for definition in found if definition.version is not None}

    def add_step(self, definition: StepDefinition[..., Any]) -> None:
        """Registers, or replaces what the same place registered before. Raises `RegistrationError` on a clash."""
        self._add("step", self.steps, definition.name, definition)

    def step(self, name: str) -> StepDefinition[..., Any] | None:
        """The step of this name: one of the user's, else one that durably brings along."""
        return self.steps.get(name) or _builtin_steps().get(name)

    def code_version(self) -> str:
        """12 hex digits over the source of all registered workflows, and of the modules of their packages.

        Of the modules, too, because what a workflow calls decides as much as itself what it does.
        """
        if self._code_version is None:
            digest = hashlib.blake2b(digest_size=6)
            definitions = (*sorted(self.workflows.items()), *sorted(self._versions.items()))
            for name, definition in definitions:
                digest.update(f"{name}\0{_source(definition.fn)}\0".encode())
            for source in _module_sources(definition.fn.__module__ for _, definition in definitions):
                digest.update(source)
            self._code_version = digest.hexdigest()
        return self._code_version

    def _add(self, kind: str, known: dict[str, D], key: str, definition: D) -> None:
        other = known.get(key)
        if other is not None and _place(other.fn) != _place(definition.fn):
            remedy = "give one of them name=" if kind == "step" else "give one of them name=, or each a version="
            raise RegistrationError(
                f"two {kind}s are named {key!r}: {_place(other.fn)} and {_place(definition.fn)}; {remedy}"
            )
        known[key] = definition


@cache
def _builtin_steps() -> dict[str, StepDefinition[..., Any]]:
    from durably import health
    from durably.web import BUILTIN_STEPS

    return {step.name: step for step in (*BUILTIN_STEPS, health.answer)}


registry = Registry()
"""What the decorators fill."""


class _StepDecorator(Protocol):
    """The type of ``step(…)``: keeps the parameters and the awaited result of what it decorates."""

    @overload
    def __call__(self, fn: Callable[P, Awaitable[R]], /) -> StepDefinition[P, R]: ...
    @overload
    def __call__(self, fn: Callable[P, R], /) -> StepDefinition[P, R]: ...


@overload
def workflow(fn: Callable[P, Coroutine[Any, Any, R]], /) -> WorkflowDefinition[P, R]: ...
@overload
def workflow(
    *, name: str | None = None, version: int | None = None, pinned: bool = False
) -> Callable[[Callable[P, Coroutine[Any, Any, R]]], WorkflowDefinition[P, R]]: ...
def workflow(
    fn: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    version: int | None = None,
    pinned: bool = False,
) -> Any:
    """Marks an ``async def`` as a workflow: deterministic, executed in the processor, recorded.

    Args:
        fn: the function.
        name: what runs are recorded under, and what it is started by; the function's own name by default.
        version: several functions may share a name, each with a version of its own, 1 or more: new runs begin with the
            newest, and every run goes on with the one that it began with.
        pinned: the steps of a run go to the workers of the build (``DURABLY_BUILD``) that it began with.

    Raises:
        RegistrationError: not an ``async def``, or the name is taken, or a version that is none.
    """

    def register(fn: Callable[..., Any]) -> WorkflowDefinition[..., Any]:
        if not inspect.iscoroutinefunction(fn):
            raise RegistrationError(f"workflow {_place(fn)} is not an async def: write it as one")
        if version is not None and (type(version) is not int or not 1 <= version < 2**31):
            raise RegistrationError(f"workflow {_place(fn)}: version={version!r} must be a whole number, 1 or more")
        definition: WorkflowDefinition[..., Any] = WorkflowDefinition(_name(fn, name), fn, version, pinned)
        registry.add_workflow(definition)
        return definition

    return register if fn is None else register(fn)


@overload
def step(fn: Callable[P, Awaitable[R]], /) -> StepDefinition[P, R]: ...
@overload
def step(fn: Callable[P, R], /) -> StepDefinition[P, R]: ...
@overload
def step(
    *,
    max_retries: int = 3,
    timeout: Duration | None = None,
    queue: str = "default",
    backoff: Duration | Backoff | None = None,
    name: str | None = None,
) -> _StepDecorator: ...
def step(
    fn: Callable[..., Any] | None = None,
    /,
    *,
    max_retries: int = 3,
    timeout: Duration | None = None,
    queue: str = "default",
    backoff: Duration | Backoff | None = None,
    name: str | None = None,
) -> Any:
    """Marks a function, async or not, as a step: run by a worker, retried, its result recorded.

    Args:
        fn: the function. What a generator yields is written to a stream, whose handle is the step's result.
        max_retries: how many attempts may follow the first one.
        timeout: how long one attempt may run.
        queue: which workers run it.
        backoff: delay before each retry, or a `Backoff`; 1 s doubling to 60 s by default.
        name: what calls are recorded under; the function's own name by default.

    Raises:
        RegistrationError: no function, a bad setting, or the name is taken.
    """

    def register(fn: Callable[..., Any]) -> StepDefinition[..., Any]:
        if not inspect.isroutine(fn):
            raise RegistrationError(f"step {_place(fn)} is neither a function nor an async function")
        if workflow_context() is not None:
            raise RegistrationError(
                f"step {_place(fn)} is defined while a workflow runs, and no worker would find it: define it at the top "
                "level of a module, and pass to it what it needs"
            )
        known_as = _name(fn, name)
        definition: StepDefinition[..., Any] = StepDefinition(
            name=known_as,
            fn=fn,
            queue=queue,
            max_retries=max_retries,
            timeout_ms=None if timeout is None else _timeout(known_as, timeout),
            backoff=DEFAULT_BACKOFF if backoff is None else _backoff(known_as, backoff),
            is_async=inspect.iscoroutinefunction(fn) or inspect.isasyncgenfunction(fn),
            yields=inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn),
        )
        registry.add_step(definition)
        return definition

    return register if fn is None else register(fn)


def load_module(spec: str) -> ModuleType:
    """Imports user code, so that its workflows and steps are registered.

    Args:
        spec: ``package.module``, looked for in the current folder too, or ``path/to/file.py``.

    Raises:
        ConfigurationError: the import failed; its ``__cause__`` is what the module raised.
    """
    folder, name = Path.cwd(), spec
    if spec.endswith(".py"):
        path = Path(spec).resolve()
        folder, name = path.parent, path.stem
        if not path.is_file():
            raise ConfigurationError(f"cannot load {spec}: there is no file {path}; check the path")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(name)
    except Exception as e:
        missing = isinstance(e, ModuleNotFoundError) and e.name is not None and f"{name}.".startswith(f"{e.name}.")
        remedy = (
            f"run from the folder that holds it (now {Path.cwd()}), or give the path of the file"
            if missing
            else "correct the module, or install what it needs"
        )
        raise ConfigurationError(f"cannot load {spec}: {type(e).__name__}: {e}; {remedy}") from e
    if spec.endswith(".py") and Path(module.__file__ or "").resolve() != path:
        raise ConfigurationError(
            f"cannot load {spec}: a module named {name} is imported already, from {module.__file__}; rename the file"
        )
    return module


def load_object(spec: str, setting: str, example: str) -> Any:
    """What a setting names as ``module:object``; a class is called. Raises `ConfigurationError`, which names the setting."""
    module, _, name = spec.partition(":")
    try:
        found = getattr(load_module(module), name)
        return found() if isinstance(found, type) else found
    except ConfigurationError:
        raise
    except Exception as e:
        raise ConfigurationError(
            f"{setting} names {spec!r}: {type(e).__name__}: {e}; write module:object, such as {example}"
        ) from e


def _place(fn: Callable[..., Any]) -> str:
    return f"{getattr(fn, '__module__', '?')}.{getattr(fn, '__qualname__', repr(fn))}"


def _name(fn: Callable[..., Any], name: str | None) -> str:
    if name is None:
        return fn.__name__
    if not name or not isinstance(name, str):
        raise RegistrationError(f"{_place(fn)}: name={name!r} must be a text that is not empty")
    return name


def _timeout(name: str, value: Duration) -> int:
    try:
        ms = milliseconds(value)
    except (TypeError, ValueError) as e:
        raise RegistrationError(f"step {name}: timeout: {e}") from e
    if ms == 0:
        raise RegistrationError(f"step {name}: timeout={value!r} leaves no time to run")
    return ms


def _backoff(name: str, value: Duration | Backoff) -> events.Backoff:
    try:
        return (value if isinstance(value, Backoff) else Backoff(initial=value, factor=1.0, maximum=value)).record()
    except (TypeError, ValueError) as e:
        raise RegistrationError(f"step {name}: backoff: {e}") from e


def _module_sources(names: Iterable[str]) -> Iterator[bytes]:
    """Of these modules and of all that are loaded of their packages, in the order of their names."""
    packages = {name.partition(".")[0] for name in names}
    for name, module in sorted(sys.modules.items()):
        if name.partition(".")[0] not in packages or not getattr(module, "__file__", None):
            continue
        with suppress(OSError):  # in an archive, say
            yield Path(module.__file__ or "").read_bytes()


def _source(fn: Callable[..., Any]) -> str:
    try:
        return inspect.getsource(fn)
    except (OSError, TypeError):  # typed into a prompt, or compiled
        return fn.__code__.co_code.hex()
