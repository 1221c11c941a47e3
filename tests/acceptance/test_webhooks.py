"""What a webhook may be made with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from durably import ConfigurationError, Request, Response, create_webhook, workflow

if TYPE_CHECKING:
    from harness import System


@workflow
async def tries_every_response(token: str) -> list[str]:
    refused = []
    for response in ("at once", 202, b"thanks"):
        try:
            create_webhook(token=token, respond_with=response)
        except ConfigurationError as e:
            refused.append(str(e))
    return refused


@workflow
async def waits_with_metadata(token: str) -> str:
    response = Response.json({"thanks": True}, status=201)
    async with create_webhook(token=token, respond_with=response, metadata={"for": "Ada"}) as webhook:
        return await (await webhook).text()


def test_what_is_no_response_is_refused_at_the_creation_and_holds_no_token(lone_system: System) -> None:
    lone_system.start_processor()
    run = lone_system.client.start(tries_every_response, "t")
    refused = run.result(30)
    assert len(refused) == 3
    assert all("give a Response" in message for message in refused)
    assert "hook_created" not in lone_system.types(run.id)


def test_a_webhook_has_metadata_beside_its_response(lone_system: System) -> None:
    lone_system.start_processor()
    lone_system.start_worker()
    run = lone_system.client.start(waits_with_metadata, "t")
    hook = lone_system.hook("t")
    assert (hook.webhook, hook.metadata) == (True, {"for": "Ada"})
    assert hook.response.status == 201
    answer = lone_system.client.resume_webhook("t", Request("POST", "http://localhost/", body="hello"))
    assert (answer.status, run.result(30)) == (201, "hello")
