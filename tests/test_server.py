"""The API: what OpenAI's own client gets, who is refused, and that nobody's reply depends on the others."""

import copy
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import transformers
from faults import beside
from serve import Bare, Told, build_session, serve
from tiny import BYTES

import inference
from firstwords.errors import BadFlag, CannotCreate, MissingInput
from firstwords.generate import Sampling
from firstwords.schema import Message
from firstwords.server.api import build_app
from firstwords.server.batching import Batcher
from firstwords.server.guard import Limits
from firstwords.server.protocol import ReplyText
from firstwords.server.serving import check_key, open_port
from firstwords.template import CHAT_TEMPLATE

ROOT = Path(inference.__file__).parent
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def session():
    return build_session()


@pytest.fixture
def lone(session):
    """A session of its own over the served model."""
    own = copy.copy(session)
    own.reset()
    return own


@pytest.fixture(scope="module")
def address(session):
    with serve(session) as address:
        yield address


def connect(address, **options):
    return openai.OpenAI(**{"base_url": f"{address}/v1", "api_key": "none", "max_retries": 0, **options})


@pytest.fixture(scope="module")
def client(address):
    with connect(address) as client:
        yield client


def post(address, body, path="/v1/chat/completions", method="POST", **headers):
    """Send a request as it stands and return status, headers and what came, as JSON where it is."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    is_json = answer.headers.get_content_type() == "application/json"
    return answer.status, answer.headers, json.loads(content) if is_json else content


def ask(address, text, **options):
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}], **options}
    status, _, answer = post(address, json.dumps(body))
    assert status == 200, answer
    return answer["choices"][0]["message"]["content"]


# --- OpenAI's client


def test_an_answer_has_its_text_its_reason_and_its_tokens(client, lone):
    answer = client.chat.completions.create(model="tiny", messages=HI)
    assert answer.choices[0].message.content == lone.ask("Hi")
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == ("stop" if lone.last.stopped else "length")
    assert answer.usage.prompt_tokens == len(lone.last.prompt)
    assert answer.usage.completion_tokens == len(lone.last.ids)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert (answer.usage.context, answer.usage.evicted) == (200, 0)


def test_a_stream_is_the_answer_in_pieces(client):
    whole = client.chat.completions.create(model="tiny", messages=HI, max_tokens=30)
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=HI, max_tokens=30, stream=True, stream_options={"include_usage": True}
        )
    )
    assert len(chunks) > 10
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_limits_of_length_end_with_length(client):
    for name in ("max_tokens", "max_completion_tokens"):
        answer = client.chat.completions.create(model="tiny", messages=HI, **{name: 3})
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")


def test_seed_and_temperature_decide_the_draws(client):
    def draw(**options):
        answer = client.chat.completions.create(model="tiny", messages=HI, max_tokens=20, **options)
        return answer.choices[0].message.content

    warm = {"temperature": 1.2, "top_p": 0.9}
    assert draw(**warm, seed=1) == draw(**warm, seed=1)
    assert len({draw(**warm, seed=seed) for seed in range(4)}) > 1
    assert draw(temperature=0) == draw() == draw(temperature=1.5, extra_body={"top_k": 1})


def test_stop_strings_end_a_reply_and_are_left_out():
    with serve(batcher=Told(lambda question: "one two three")) as address, connect(address) as client:
        for stop, text in [(" t", "one"), (["x", "three"], "one two "), (["threes"], "one two three")]:
            answer = client.chat.completions.create(model="tiny", messages=HI, stop=stop)
            assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (text, "stop")


def test_conversations_system_messages_and_text_parts(client, lone):
    turns = [
        {"role": "system", "content": "Be brief."},
        *HI,
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": [{"type": "text", "text": "How "}, {"type": "text", "text": "so?"}]},
    ]
    lone.restore([Message(turn["role"], turn["content"]) for turn in turns[:3]])
    answer = client.chat.completions.create(model="tiny", messages=turns)
    assert answer.choices[0].message.content == lone.ask("How so?")


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").context == 200
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


REFUSED = [
    ({"model": "gpt-4"}, 404, "model"),
    ({"messages": []}, 400, "messages"),
    ({"messages": "Hi"}, 400, "messages"),
    ({"messages": ["Hi"]}, 400, "messages"),
    ({"messages": [{"role": "wizard", "content": "Hi"}]}, 400, "messages"),
    ({"messages": [{"role": "assistant", "content": "Hi"}]}, 400, "messages"),
    ({"messages": [*HI, *HI]}, 400, "messages"),
    ({"messages": [*HI, {"role": "system", "content": "Be brief."}]}, 400, "messages"),
    ({"messages": [*HI, {"role": "assistant", "content": "Hello"}]}, 400, "messages"),
    ({"messages": [{"role": "user", "content": ""}]}, 400, "messages"),
    ({"messages": [{"role": "user", "content": None}]}, 400, "messages"),
    ({"messages": [{"role": "user", "content": "a\0b"}]}, 400, "messages"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages"),
    ({"messages": [{"role": "user", "content": "x" * 300}]}, 400, "messages"),
    ({"messages": [{"role": "system", "content": "x" * 300}, *HI]}, 400, "messages"),
    ({"messages": [*HI, {"role": "assistant", "content": "Hello"}] * 500 + HI}, 400, "messages"),
    ({"messages": [*HI, {"role": "assistant", "content": "x" * 180}, *HI]}, 400, "messages"),
    ({"temperature": -1}, 400, "temperature"),
    ({"temperature": "warm"}, 400, "temperature"),
    ({"temperature": float("nan")}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"top_p": 2}, 400, "top_p"),
    ({"min_p": 2}, 400, "min_p"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": 1.5}, 400, "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, 400, "max_tokens"),
    ({"n": 2}, 400, "n"),
    ({"logprobs": True}, 400, "logprobs"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty"),
    ({"tools": [{"type": "function"}]}, 400, "tools"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format"),
    ({"stop": list("abcde")}, 400, "stop"),
    ({"stop": ""}, 400, "stop"),
    ({"stream": "yes"}, 400, "stream"),
    ({"truncation": "left"}, 400, "truncation"),
    ({"surprise": 1}, 400, "surprise"),
]


@pytest.mark.parametrize(("change", "status", "param"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_met_is_refused_in_openais_form(address, change, status, param):
    answer = post(address, json.dumps({"model": "tiny", "messages": HI, **change}))
    error = answer[2]["error"]
    assert (answer[0], error["param"], error["type"]) == (status, param, "invalid_request_error")
    assert ":" in error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 400


def test_the_client_raises_its_own_errors(client):
    with pytest.raises(openai.NotFoundError, match="gpt-4") as caught:
        client.chat.completions.create(model="gpt-4", messages=HI)
    assert caught.value.code == "model_not_found"
    long = [{"role": "user", "content": "x" * 300}]
    with pytest.raises(openai.BadRequestError, match="300 tokens long") as caught:
        client.chat.completions.create(model="tiny", messages=long)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="-0.5; give a number"):
        client.chat.completions.create(model="tiny", messages=HI, temperature=-0.5)


def test_what_asks_for_nothing_more_is_accepted(client):
    neutral = {"n": 1, "presence_penalty": 0, "logprobs": False, "user": "me", "stop": None, "seed": None}
    answer = client.chat.completions.create(model="tiny", messages=HI, max_tokens=2, **neutral)
    assert answer.usage.completion_tokens == 2


def test_the_oldest_turns_are_dropped_when_asked_to(client):
    turns = [*HI, {"role": "assistant", "content": "x" * 120}, *HI]
    answer = client.chat.completions.create(
        model="tiny", messages=turns, max_tokens=100, extra_body={"truncation": "auto"}
    )
    alone = client.chat.completions.create(model="tiny", messages=HI, max_tokens=100)
    assert answer.usage.evicted == 1
    assert answer.choices[0].message.content == alone.choices[0].message.content


# --- the same text everywhere


def test_all_ways_give_the_same_greedy_text(tmp_path, session, address, capsys):
    questions = ["What is tea?", "Say something long", "ab", "Why?"]
    folder = tmp_path / "model"
    session.model.save_pretrained(folder)
    BYTES.save(folder, chat_template=CHAT_TEMPLATE)
    pipeline = transformers.pipeline("text-generation", model=str(folder), device="cpu")
    # A model that learned nothing says control ids too, which our own ways never do.
    settings = {"do_sample": False, "max_new_tokens": 40, "suppress_tokens": sorted(session.banned_ids)}
    stops = sorted(session.stop_ids)
    piped = [
        pipeline([{"role": "user", "content": text}], eos_token_id=stops, **settings)[0]["generated_text"][-1]
        for text in questions
    ]
    capsys.readouterr()
    for text in questions:
        inference.main(["--model_dir", str(folder), "--max_new_tokens", "40", "--prompt", text])
    typed = capsys.readouterr().out
    alone = [ask(address, text, max_tokens=40) for text in questions]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda text: ask(address, text, max_tokens=40), questions))
    assert len(set(alone)) == 4
    assert together == alone
    assert [turn["content"] for turn in piped] == alone
    assert typed == "".join(inference.mask_control(text) + "\n" for text in alone)


def test_a_reply_in_pieces_never_breaks_a_character_or_shows_a_stop_string():
    text = ReplyText(BYTES, ["END"])
    pieces = [text.push(token_id) for token_id in BYTES.encode("dé EN日 END")]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert "".join(pieces) + text.finish() == "dé EN日 "
    assert text.stopped
    half = ReplyText(BYTES, ["END"])
    assert "".join([half.push(token_id) for token_id in BYTES.encode("x EN")]) == "x "
    assert half.finish() == "EN"


# --- who may ask


def test_a_key_is_asked_for_and_is_never_logged(capfd):
    with serve(key="s3cret-key") as address:
        with connect(address, api_key="wrong") as client, pytest.raises(openai.AuthenticationError) as caught:
            client.chat.completions.create(model="tiny", messages=HI)
        assert "s3cret" not in str(caught.value)
        with connect(address, api_key="s3cret-key") as client:
            assert client.chat.completions.create(model="tiny", messages=HI, max_tokens=1).choices
        assert post(address, None, "/health", "GET")[0] == 200
        for given in ("", "s3cret-key", "Basic s3cret-key", "Bearer s3cret-ke", "Bearer s3cret-key\xe9"):
            assert post(address, None, "/v1/models", "GET", Authorization=given)[0] == 401
    assert "s3cret" not in "".join(capfd.readouterr())


def unguarded(session, **options):
    """The app as it is without its guard."""
    return Bare(build_app(session, **options).app)


FOREIGN = [
    {"Host": "evil.example"},
    {"Host": "127.0.0.1.evil.example:8000"},
    {"Host": ""},
    {"Host": "["},
    {"Origin": "https://evil.example"},
    {"Origin": "http://localhost:9"},
    {"Origin": "null"},
    {"Origin": "http://["},
    {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "no-cors"},
    {"Content_Type": "text/plain"},
    {"Content_Type": "application/x-www-form-urlencoded"},
]


@beside(build_app, unguarded)
def test_pages_of_others_cannot_drive_the_server(implementation):
    body = json.dumps({"model": "tiny", "messages": HI, "max_tokens": 1})
    told = Told(lambda question: "hello")
    with serve(build=implementation, batcher=told, web=True) as address:
        for headers in FOREIGN:
            status, headers, _ = post(address, body, **headers)
            assert status in (403, 415)
            assert "access-control-allow-origin" not in headers
        assert not told.questions
        assert post(address, None, method="OPTIONS", Origin="https://evil.example")[0] == 403
        assert post(address, None, "/", "GET", Host="evil.example")[0] == 403
        own = address.removeprefix("http://")
        assert post(address, body, Origin=address)[0] == 200
        assert post(address, body, Host=own.replace("127.0.0.1", "localhost"))[0] == 200


def test_other_machines_are_answered_only_with_a_key():
    for host in ("0.0.0.0", "192.0.2.1", "::", "example.org"):
        with pytest.raises(BadFlag, match=f"^--host {host}: .*FIRSTWORDS_API_KEY"):
            check_key(None, host)
        check_key("key", host)
    for host in ("127.0.0.1", "127.3.4.5", "::1", "localhost"):
        check_key(None, host)
    for key in ("", " ", "a\nb", "schlüssel"):
        with pytest.raises(BadFlag, match="^--api_key: ") as caught:
            check_key(key, "127.0.0.1")
        assert key.strip() == "" or key not in str(caught.value)


# --- load


def read_memory():
    """Return the resident bytes of this process at their peak since `reset_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def reset_peak():
    Path("/proc/self/clear_refs").write_text("5")


def send_body(address, size, *, chunked):
    """Send a body of zeros that nobody holds as a whole; returns the status."""
    host, port = address.removeprefix("http://").split(":")
    part = bytes(1 << 16)
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(f"{head}{length}\r\n\r\n".encode())
        for _ in range(size // len(part)):
            connection.sendall(b"%x\r\n%b\r\n" % (len(part), part) if chunked else part)
        if chunked:
            connection.sendall(b"0\r\n\r\n")
        return int(connection.recv(4096).split()[1])


NONSENSE = [
    b"",
    b"\0" * 1000,
    b"{",
    b"[]",
    b"null",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b'{"messages": 1' + b"0" * 10_000 + b"}",
    b"\xff\xfe" * 500,
    os.urandom(10_000),
]


@beside(build_app, unguarded)
def test_bodies_of_100_mb_and_of_nonsense_are_refused(implementation):
    with serve(build=implementation) as address:
        assert "body: is no JSON" in post(address, b"hello")[2]["error"]["message"]
        for body in NONSENSE:
            status, _, answer = post(address, body)
            assert 400 <= status < 500
            assert answer["error"]["message"]
        reset_peak()
        before = read_memory()
        for size in (2_000_000, 100_000_000):
            assert send_body(address, size, chunked=False) == 413
            assert send_body(address, size, chunked=True) == 413
        assert read_memory() - before < 20_000_000
        assert ask(address, "Hi")


class _Mixing(Batcher):
    """Forgets that the rows of the decoder have an order."""

    def _admit(self):
        new = super()._admit()
        if new:
            self._running.reverse()
        return new


def mixing(session, **options):
    """A server that gives some their neighbour's reply."""
    app = build_app(session, **options)
    api = app.app.state.api
    api.batcher.close()
    api.batcher = _Mixing(session.model, stop_ids=session.stop_ids, banned_ids=session.banned_ids)
    return app


def open_stream(address, text):
    """Send a request for a stream and return its socket, of which nothing was read."""
    host, port = address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    body = json.dumps({"model": "tiny", "stream": True, "messages": [{"role": "user", "content": text}]})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    head += "Connection: close\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    return connection


@beside(build_app, mixing)
def test_a_thousand_requests_of_50_clients_get_their_own_replies(implementation):
    session = build_session()
    texts = [f"question {number} {'ab' * (number % 9)}" for number in range(40)]
    expected = {}
    for text in texts:
        session.reset()
        session.sampling = Sampling(max_new_tokens=4 + len(expected) % 12)
        expected[text] = session.ask(text), session.sampling.max_new_tokens
    session.reset()
    session.sampling = Sampling()
    assert len({reply for reply, _ in expected.values()}) > 30, "replies that are alike show little"
    wrong = []

    def work(client):
        for number in range(20):
            text = texts[(client * 7 + number * 3) % len(texts)]
            reply, most = expected[text]
            if number % 10 == 9:
                open_stream(address, text).close()
            if ask(address, text, max_tokens=most) != reply:
                wrong.append(text)

    with serve(session, build=implementation, limits=Limits(requests=200)) as address:
        slow = [open_stream(address, texts[number]) for number in range(5)]
        ask(address, "warm up", max_tokens=2)
        reset_peak()
        before = read_memory()
        with ThreadPoolExecutor(50) as pool:
            list(pool.map(work, range(50)))
        assert not wrong
        assert read_memory() - before < 150_000_000
        for connection, text in zip(slow, texts, strict=False):
            assert read_stream(connection) == ask(address, text)
        assert wait_until_idle(address)


def read_stream(connection):
    """Return the text of a stream to its end."""
    with connection:
        lines = b"".join(iter(lambda: connection.recv(1 << 16), b"")).split(b"\r\n\r\n", 1)[1].splitlines()
    events = [line[line.index(b"{") :] for line in lines if b"{" in line]
    return "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events)


def wait_until_idle(address):
    """Wait until nothing is decoded or waits; each look is a request, so that nothing spins."""
    return any(
        (health["running"], health["waiting"]) == (0, 0)
        for health in (post(address, None, "/health", "GET")[2] for _ in range(5000))
    )


def test_a_client_that_goes_frees_its_place_at_once():
    """The reply of one who left would be endless; the next one gets the only place."""
    session = build_session(context=20_000)
    session.stop_ids = frozenset()
    with serve(session, max_streams=1) as address:
        gone = open_stream(address, "endless")
        assert gone.recv(100)
        assert post(address, None, "/health", "GET")[2]["running"] == 1
        gone.close()
        assert len(ask(address, "Hi", max_tokens=2)) <= 2
        whole = http.client.HTTPConnection(address.removeprefix("http://"))
        whole.request(
            "POST",
            "/v1/chat/completions",
            json.dumps({"model": "tiny", "messages": HI}),
            {"Content-Type": "application/json"},
        )
        while post(address, None, "/health", "GET")[2]["running"] == 0:
            pass
        whole.close()
        assert len(ask(address, "Hi", max_tokens=2)) <= 2


def test_more_requests_than_the_limit_get_429_and_when_to_try_again():
    session = build_session(context=20_000)
    session.stop_ids = frozenset()
    with serve(session, limits=Limits(requests=2)) as address:
        streams = [open_stream(address, "endless") for _ in range(2)]
        assert all(stream.recv(100) for stream in streams)
        status, headers, answer = post(address, json.dumps({"model": "tiny", "messages": HI}))
        assert (status, headers["Retry-After"]) == (429, "1")
        assert answer["error"]["code"] == "rate_limit_exceeded"
        assert post(address, None, "/health", "GET")[0] == 200
        streams[0].close()
        wait_for_running(address, 1)
        assert ask(address, "Hi", max_tokens=1) is not None
        streams[1].close()


def wait_for_running(address, count):
    while post(address, None, "/health", "GET")[2]["running"] != count:
        pass


def test_answers_and_bodies_that_take_too_long_are_broken_off():
    session = build_session(context=20_000)
    session.stop_ids = frozenset()
    with serve(session, limits=Limits(seconds=0.3, body_seconds=0.3)) as address:
        status, _, answer = post(address, json.dumps({"model": "tiny", "messages": HI}))
        assert (status, answer["error"]["type"]) == (504, "server_error")
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            head = f"POST /v1/x HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            assert connection.recv(4096).split()[1] == b"408"
        with open_stream(address, "endless") as connection:
            assert b"[DONE]" not in b"".join(iter(lambda: connection.recv(1 << 16), b""))


def test_no_sampling_of_one_client_ends_the_reply_of_another(client):
    """All streams are drawn in one thread: what one of them breaks, all of them lose."""
    others = client.chat.completions.create(model="tiny", messages=HI, stream=True, temperature=1.5, seed=4)
    arrived = [next(others)]
    for wish in ({"temperature": 1.7e308}, {"temperature": 5e-324}, {"temperature": 2, "top_p": 5e-324}):
        answer = client.chat.completions.create(model="tiny", messages=HI, max_tokens=2, **wish)
        assert answer.choices[0].finish_reason == "length"
    arrived += others
    assert arrived[-1].choices[0].finish_reason in ("stop", "length")


def test_a_model_that_gives_nan_is_told_and_the_server_stays(session):
    broken = build_session()
    with serve(broken) as address:
        good = ask(address, "Hi", max_tokens=3)
        bias = broken.model.transformer.ln_f.bias.data
        kept = bias.clone()
        bias.fill_(float("nan"))
        status, _, answer = post(address, json.dumps({"model": "tiny", "messages": HI}))
        assert (status, answer["error"]["type"]) == (500, "server_error")
        assert "NaN" in answer["error"]["message"]
        with connect(address) as client, pytest.raises(openai.APIError, match="NaN"):
            list(client.chat.completions.create(model="tiny", messages=HI, stream=True))
        bias.copy_(kept)
        assert ask(address, "Hi", max_tokens=3) == good


# --- the process


def test_a_port_in_use_or_out_of_reach_is_one_line():
    with open_port("127.0.0.1", 0) as port:
        number = port.getsockname()[1]
        with pytest.raises(CannotCreate, match=f"^--port {number}: cannot be opened .*in use"):
            open_port("127.0.0.1", number)
    for host, port in [("127.0.0.1", 70_000), ("192.0.2.1", 0), ("no such host", 0)]:
        with pytest.raises(BadFlag, match="^--(port|host)"):
            open_port(host, port)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow, id="SIGTERM")]
)
def test_a_signal_ends_the_server_in_the_middle_of_a_reply(number, tmp_path):
    session = build_session(context=20_000)
    session.model.config.eos_token_id = None
    folder = tmp_path / "model"
    session.model.save_pretrained(folder)
    BYTES.save(folder, chat_template=CHAT_TEMPLATE)
    words = ["--model_dir", str(folder), "--serve", "--port", "0", "--device", "cpu"]
    server = subprocess.Popen(
        [sys.executable, "inference.py", *words], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    try:
        told = next(line for line in server.stderr if line.startswith("API at http://127.0.0.1:"))
        address = told.split()[2].removesuffix("/v1")
        body = json.dumps({"model": "model", "messages": HI, "stream": True, "temperature": 2})
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.read(50)
        server.send_signal(number)
        answer.read()
        assert server.wait(timeout=30) == 0
        assert server.stderr.read() == ""
    finally:
        server.kill()
        server.wait()
        server.stderr.close()


def test_a_folder_without_a_model_ends_before_anything_is_served(tmp_path):
    with pytest.raises(MissingInput):
        inference.main(["--model_dir", str(tmp_path), "--serve", "--port", "0"])
