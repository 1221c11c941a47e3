"""``durably replay``: whether new code can take over the runs that there are."""

from pathlib import Path
from typing import Annotated, Any

import typer

from durably.cli.shell import Shell
from durably.installation import processor_module


def replay(
    shell: Shell,
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...", exists=True, dir_okay=False, help="What `durably runs events RUN --json` printed."
        ),
    ],
    *,
    app: Annotated[
        list[str],
        typer.Option("--app", metavar="MODULE", help="The code: package.module or path/to/file.py. Repeatable."),
    ],
) -> None:
    """Replays recorded runs with the code that there is now; ends with 1 where one would be blocked."""
    processor_module("process").prepare(app)
    from durably import history
    from durably.errors import DurablyError, NonDeterminismError
    from durably.testing.replayer import replay_history

    wrong = False
    for file in files:
        told: dict[str, Any] = {"file": str(file), "run_id": None, "events": 0, "ok": True}
        try:
            events = history.load(file.read_bytes())
            told |= {"run_id": events[0].run_id, "events": len(events)}
            replay_history(events)
        except DurablyError as e:
            wrong = True
            told |= {"ok": False, "error": str(e)}
            if isinstance(e, NonDeterminismError):
                told |= {"expected": e.expected, "found": e.found}
        shell.show(told, lambda told=told: _line(told))  # type: ignore[misc]
    if wrong:
        raise typer.Exit(1)


def _line(told: dict[str, Any]) -> str:
    verdict = "replays" if told["ok"] else f"does not replay: {told['error']}"
    return f"{told['file']}: run {told['run_id']} ({told['events']} events) {verdict}"
