"""The scripted model server: the sequential job, and that it is the server it says it is."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import httpx2
import pytest
from openai import OpenAI

from agents_project.demo.model_server import (
    Cut,
    ModelCall,
    ModelServer,
    Reply,
    Script,
    ScriptError,
    Status,
    Text,
    ToolCall,
    load,
)
from agents_project.demo.scripts import demo, failing, parallel, saying, sequential, steps
from runs.providers import Finished, ModelRequest, TextDelta, ToolCallDelta, ToolSpec
from runs.providers.openai import OpenAIProvider

JOB = "Test the test tool with the numbers 1-{last}, one after another, then give me the total."
TOOL = ToolSpec("test_tool", "Test a number.", {"type": "object", "properties": {"number": {"type": "integer"}}})


def converse(
    script: Script, prompt: str, tool: Callable[[int], Any], *, most: int = 100
) -> tuple[list[int], list[str], list[int]]:
    """Work through a job as a leg would; return the numbers that were called, the texts, the chunks of each text."""
    numbers: list[int] = []
    texts: list[str] = []
    chunks: list[int] = []
    with ModelServer(script) as server, closing(OpenAIProvider("key", server.url)) as provider:
        rendered = [provider.render({"role": "user", "content": [{"type": "text", "text": prompt}]})]
        tools = provider.render_tools([TOOL])
        for _ in range(most):
            events = list(provider.stream(ModelRequest("m", "You test tools.", rendered, tools)))
            said = [event.text for event in events if isinstance(event, TextDelta)]
            texts.append("".join(said))
            chunks.append(len(said))
            if events[-1] == Finished("stop"):
                break
            calls = [event for event in events if isinstance(event, ToolCallDelta)]
            parts = [
                {
                    "type": "tool_call",
                    "tool_call": f"{len(texts)}-{call.index}",
                    "name": call.name,
                    "arguments": call.text,
                }
                for call in calls
            ]
            rendered.append(provider.render({"role": "assistant", "content": parts}))
            for call, part in zip(calls, parts, strict=True):
                number = json.loads(call.text)["number"]
                numbers.append(number)
                result = {
                    "type": "tool_result",
                    "tool_call": part["tool_call"],
                    "outcome": "success",
                    "result": tool(number),
                }
                rendered.append(provider.render({"role": "tool", "content": [result]}))
    return numbers, texts, chunks


def test_the_sequential_job_calls_one_number_after_another_and_ends_with_the_total() -> None:
    numbers, texts, chunks = converse(
        sequential(text_seconds=0.02), JOB.format(last=7), lambda number: {"value": number}
    )

    assert numbers == [1, 2, 3, 4, 5, 6, 7]
    assert texts[0] == "Testing 1 of 7."
    assert texts[-1] == "The total is 28."
    assert all(count > 1 for count in chunks)


def test_the_total_is_that_of_the_results_and_not_of_the_numbers() -> None:
    _, texts, _ = converse(sequential(text_seconds=0), JOB.format(last=3), lambda number: number * 100)

    assert texts[-1] == "The total is 600."


def test_a_job_without_numbers_has_as_many_as_the_script_says() -> None:
    numbers, _, _ = converse(sequential(total=4, text_seconds=0), "Go on.", lambda number: number)

    assert numbers == [1, 2, 3, 4]


def test_the_prompt_sets_the_pace() -> None:
    started = time.monotonic()
    converse(sequential(text_seconds=60), JOB.format(last=3) + " (text_seconds=0)", lambda number: number)

    assert time.monotonic() - started < 30


def test_an_answer_takes_about_as_long_as_the_script_says() -> None:
    started = time.monotonic()
    converse(sequential(text_seconds=0.2), JOB.format(last=1), lambda number: number)

    assert 0.4 <= time.monotonic() - started < 20  # two answers, on a machine that may be busy


def ask(script: Script, messages: list[dict[str, Any]], **fields: Any) -> Reply:
    body = {"messages": messages, "tools": [{"function": {"name": "test_tool"}}], **fields}
    return script(ModelCall(body, 1, {}))


def test_a_call_that_is_asked_again_is_answered_the_same() -> None:
    messages = [{"role": "user", "content": JOB.format(last=50)}, {"role": "tool", "content": "1"}]
    script = sequential()

    assert ask(script, messages) == ask(script, messages)
    assert ask(script, messages)[-1] == ToolCall("test_tool", {"number": 2})


def test_a_second_job_on_a_thread_begins_anew() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": JOB.format(last=2)},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "The total is 3."},
        {"role": "user", "content": [{"type": "text", "text": JOB.format(last=3)}]},
        {"role": "tool", "content": "1"},
    ]

    assert ask(sequential(), messages)[-1] == ToolCall("test_tool", {"number": 2})


def test_the_last_step_allowed_gives_the_total_so_far() -> None:
    messages = [{"role": "user", "content": JOB.format(last=50)}, {"role": "tool", "content": "1"}]

    (said,) = ask(sequential(text_seconds=0), messages, tool_choice="none")

    assert said == Text("The total is 1.")


def test_steps_call_without_a_word() -> None:
    numbers, texts, _ = converse(steps(3), "Go on.", lambda number: number)

    assert (numbers, texts) == ([1, 2, 3], ["", "", "", "Done."])


def test_parallel_calls_come_in_one_step() -> None:
    numbers, texts, _ = converse(parallel(4), "Go on.", lambda number: number)

    assert (numbers, texts) == ([1, 2, 3, 4], ["", "The total is 10."])


def test_the_demo_echoes_what_is_no_job() -> None:
    _, texts, chunks = converse(demo, "Good morning, everyone.", lambda number: number)

    assert texts == ["Good morning, everyone."]
    assert chunks[0] > 1


# --- the server -----------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[ModelServer]:
    with ModelServer(saying(Text("Hello.", chunk_chars=2), ToolCall("look_up", {"number": 1}))) as server:
        yield server


def test_openais_own_client_understands_the_stream(server: ModelServer) -> None:
    with OpenAI(api_key="key", base_url=server.url, max_retries=0) as client:
        chunks = list(
            client.chat.completions.create(
                model="m",
                messages=[{"role": "user", "content": "Well?"}],
                stream=True,
                stream_options={"include_usage": True},
            )
        )

    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello."
    calls = [call for chunk in chunks if chunk.choices for call in chunk.choices[0].delta.tool_calls or []]
    assert [(call.function.name, call.function.arguments) for call in calls if call.function] == [
        ("look_up", '{"number":1}')
    ]
    assert chunks[-1].usage is not None
    assert chunks[-2].choices[0].finish_reason == "tool_calls"


def test_a_client_that_does_not_stream_gets_the_answer_in_one_piece(server: ModelServer) -> None:
    with OpenAI(api_key="key", base_url=server.url, max_retries=0) as client:
        answer = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Well?"}])

    message = answer.choices[0].message
    assert (message.content, answer.choices[0].finish_reason) == ("Hello.", "tool_calls")
    assert [call.function.arguments for call in message.tool_calls or [] if call.type == "function"] == ['{"number":1}']
    assert answer.usage is not None


def test_requests_may_come_in_pieces_and_one_after_another(server: ModelServer) -> None:
    body = b'{"model":"m","messages":[]}'
    request = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    both = request + request
    with socket.create_connection(("127.0.0.1", int(server.url.split(":")[2].split("/")[0]))) as client:
        client.settimeout(5)
        for start in range(0, len(both), 50):
            client.sendall(both[start : start + 50])
        answers = b""
        while answers.count(b'"chat.completion"') < 2:
            answers += client.recv(65536)

    assert answers.count(b"HTTP/1.1 200 OK") == 2
    assert [call.number for call in server.calls] == [1, 2]


@pytest.mark.parametrize("reset", [True, False])
def test_a_cut_is_a_reset_or_an_early_end(server: ModelServer, reset: bool) -> None:
    server.script = saying(Text("Good"), Cut(reset))
    with socket.create_connection(("127.0.0.1", int(server.url.split(":")[2].split("/")[0])), timeout=5) as client:
        client.sendall(b'POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 15\r\n\r\n{"stream":true}')
        heard = b""
        was_reset = False
        try:
            while data := client.recv(65536):
                heard += data
        except ConnectionResetError:
            was_reset = True

    assert was_reset == reset
    assert reset or b"Good" in heard
    assert b"[DONE]" not in heard


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/chat/completions", b"{", 400),
        ("POST", "/chat/completions", b"[]", 400),
        ("POST", "/elsewhere", b"{}", 404),
        ("GET", "/chat/completions", b"", 404),
        ("GET", "/models", b"", 200),
    ],
)
def test_what_is_no_call_is_refused(server: ModelServer, method: str, path: str, body: bytes, status: int) -> None:
    with httpx2.Client() as client:
        assert client.request(method, server.url + path, content=body).status_code == status


def test_a_script_that_fails_answers_with_its_error(server: ModelServer, capfd: pytest.CaptureFixture[str]) -> None:
    def broken(call: ModelCall) -> Reply:
        raise LookupError("no such line")

    server.script = broken
    with httpx2.Client() as client:
        answer = client.post(f"{server.url}/chat/completions", json={"messages": []})

    assert answer.status_code == 500
    assert "no such line" in answer.json()["error"]["message"]
    assert "no such line" in capfd.readouterr().err


def test_the_first_calls_can_fail(server: ModelServer) -> None:
    server.script = failing(2, [Status(500)], saying(Text("Hello.")))
    with httpx2.Client() as client:
        answers = [client.post(f"{server.url}/chat/completions", json={}).status_code for _ in range(3)]

    assert answers == [500, 500, 200]


def test_a_port_that_is_taken_is_said(server: ModelServer) -> None:
    port = int(server.url.split(":")[2].split("/")[0])

    with pytest.raises(OSError, match="in use"):
        ModelServer(saying(), port).start()


def test_a_script_is_named_by_its_module() -> None:
    assert load("agents_project.demo.scripts:demo") is demo
    assert ask(load("agents_project.demo.scripts:steps", {"count": 0}), []) == [Text("Done.")]
    for name in ("demo", "agents_project.demo.scripts:nobody", "agents_project.nowhere:demo"):
        with pytest.raises(ScriptError):
            load(name)


# --- as a process ---------------------------------------------------------------------------------------------------


def start(*arguments: str, **options: Any) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "agents_project.demo.model_server", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())["url"]


def test_the_process_tells_its_address_and_ends_on_sigterm() -> None:
    process, url = start("--script", "agents_project.demo.scripts:steps", "--options", '{"count": 0}')
    with process:
        answer = httpx2.post(f"{url}/chat/completions", json={"messages": []})
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=10)

    assert answer.json()["choices"][0]["message"]["content"] == "Done."
    assert code == 0


def test_the_process_ends_when_its_stdin_closes() -> None:
    process, _ = start(stdin=subprocess.PIPE)
    with process:
        assert process.stdin is not None
        process.stdin.close()

        assert process.wait(timeout=10) == 0


def test_the_process_ends_when_its_parent_is_gone() -> None:
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-m', 'agents_project.demo.model_server'],"
        " stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)\n"
        "print(child.pid, child.stdout.readline())\n"
    )
    parent = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=20)
    pid = int(parent.stdout.split()[0])

    deadline = time.monotonic() + 10
    while running(pid):
        assert time.monotonic() < deadline, "it outlived its parent"
        time.sleep(0.05)


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
