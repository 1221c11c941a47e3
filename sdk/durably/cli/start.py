"""``durably start``: a run of a workflow by name, with JSON for arguments."""

from typing import Annotated, Any

import typer

from durably.cli.shell import Shell

_SHOWN = 200  # characters of an argument that a message repeats


def start(
    shell: Shell,
    name: Annotated[str, typer.Argument(help="The workflow's name.", show_default=False)],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[JSON]...", help="Its positional arguments, each one as JSON.", show_default=False),
    ] = None,
    *,
    keywords: Annotated[
        str | None, typer.Option("--input", metavar="JSON", help="A JSON object: its keyword arguments.")
    ] = None,
    run_id: Annotated[str | None, typer.Option(help="An id of your own; an existing run is attached to.")] = None,
    attribute: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A text to find the run by. Repeatable.")
    ] = None,
    delay: Annotated[str | None, typer.Option(metavar="TIME", help='Wait before the workflow begins: "10s".')] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the result, and print it.")] = False,
    timeout: Annotated[float | None, typer.Option(help="With --wait: give up after this many seconds.")] = None,
) -> None:
    """Starts a run."""
    import msgspec
    from durably_schemas.records import Payload

    from durably import payload_codec
    from durably.client.client import Starter
    from durably.client.starting import StartOptions
    from durably.errors import ConfigurationError
    from durably.payloads import JSON, encode

    given = [parsed(text, f"argument {i}") for i, text in enumerate(arguments or (), 1)]
    if keywords is not None:
        if given:
            raise typer.BadParameter("give positional arguments, or --input with keyword arguments, not both")
        document = parsed(keywords, "--input")
        if not isinstance(document, dict):
            raise typer.BadParameter(f"--input must be a JSON object, as in --input '{{\"n\": 1}}'; it is {keywords}")
    else:
        document = given
    try:
        options = StartOptions(run_id=run_id, attributes=pairs(attribute), delay=delay)
    except (ValueError, ConfigurationError) as e:
        raise typer.BadParameter(str(e)) from None
    payload_codec.installed()  # a wrong setting should be told before anything is sent
    with shell.connection() as connection:
        payload = encode(Payload(content_type=JSON, data=msgspec.json.encode(document)))
        run = Starter(connection, options).start_payload(name, payload)
        if not wait:
            shell.show({"run_id": run.id}, lambda: run.id)
            return
        if not shell.json:
            shell.say(f"run {run.id} is started")  # to be watched, or cancelled, while this waits
        result = run.result(timeout)
        if shell.json:
            shell.line({"run_id": run.id, "status": "completed", "result": result})
        else:
            shell.line(result)


def pairs(texts: list[str] | None) -> dict[str, str]:
    """``KEY=VALUE`` texts as a dict."""
    found = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"--attribute {text!r} is not KEY=VALUE")
        found[key] = value
    return found


def parsed(text: str, what: str) -> Any:
    """The JSON of an argument, as a value. Raises `typer.BadParameter`."""
    import msgspec

    try:
        return msgspec.json.decode(text)
    except (ValueError, RecursionError) as e:  # an argument may hold bytes that are no UTF-8
        shown = text[:_SHOWN].encode(errors="replace").decode()
        raise typer.BadParameter(
            f"{what} is not JSON: {shown} ({e}); a text needs double quotes within single ones: '\"{shown}\"'"
        ) from None
