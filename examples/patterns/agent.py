"""An agent: a model decides which tools to call, and the workflow around it is the loop that survives everything.

Each call of the model is a step, so a crash never pays for one twice; each tool is a step, or workflow code that may
sleep or wait for a human. A tool's failure goes back to the model as a message. The model here is a script; a step that
calls a real one has the same shape.
"""

import asyncio
from typing import Any

from _run import resume, run
from durably import AsyncClient, FatalError, create_hook, step, workflow

Message = dict[str, Any]


@step
async def model(messages: list[Message]) -> Message:
    """Answers with text, or with the tools that it wants to be called."""
    heard = [str(m["content"]) for m in messages if m["role"] == "tool"]
    match len(heard):
        case 0:
            calls = [{"tool": "weather_in", "city": city} for city in ("Lisbon", "Atlantis")]
            return {"role": "assistant", "tools": calls}
        case 2:
            return {"role": "assistant", "tools": [{"tool": "ask_human", "question": "Lisbon?"}]}
    return {"role": "assistant", "text": f"{heard[-1]}: Lisbon, because it is {heard[0]}"}


@step
async def weather_in(city: str) -> str:
    if city == "Atlantis":
        raise FatalError("no such city")
    return f"sunny in {city}"


async def ask_human(question: str) -> str:
    async with create_hook(token=f"agent-{question}", metadata=question) as hook:
        return str(await hook)


TOOLS = {"weather_in": weather_in, "ask_human": ask_human}


async def call_tool(call: dict[str, Any]) -> Message:
    arguments = {name: value for name, value in call.items() if name != "tool"}
    try:
        content = await TOOLS[call["tool"]](**arguments)
    except Exception as e:  # the model shall know, and may do without
        content = f"failed: {e}"
    return {"role": "tool", "content": content}


@workflow
async def agent(prompt: str, turns: int = 10) -> list[Message]:
    messages: list[Message] = [{"role": "user", "content": prompt}]
    for _ in range(turns):
        answer = await model(messages)
        messages.append(answer)
        if "tools" not in answer:
            break
        messages += await asyncio.gather(*map(call_tool, answer["tools"]))
    return messages


async def main() -> None:
    async with AsyncClient() as client:
        chat = await client.start(agent, "Where shall I go?")
        await resume(client, "agent-Lisbon?", "yes")
        for message in await chat.result(timeout=60):
            print(f"{message['role']}: {message.get('content') or message.get('text') or len(message['tools'])}")


if __name__ == "__main__":
    run(main)
