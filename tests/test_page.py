"""The page in a real browser: what a person does there, and that no text ever acts."""

import json
import shutil
import socket
import tempfile
import threading
from importlib.resources import files

import pytest

if not (shutil.which("chromium") and shutil.which("chromedriver")):
    pytest.skip("needs chromium and chromedriver on the PATH", allow_module_level=True)

from fastapi.responses import Response
from faults import beside
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from serve import Bare, Told, build_session, serve

from firstwords.server import page
from firstwords.server.api import build_app

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--window-size=1200,800",
)
PHONE = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
# All elements that a conversation may consist of.
ALLOWED = {
    *("ARTICLE", "DIV", "P", "H3", "H4", "H5", "UL", "OL", "LI", "BLOCKQUOTE", "HR", "BR"),
    *("PRE", "CODE", "STRONG", "EM", "SPAN", "BUTTON"),
    *("TABLE", "THEAD", "TBODY", "TR", "TH", "TD"),
}


@pytest.fixture(scope="module")
def chromium():
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in [*FLAGS, f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        yield driver
        driver.quit()


class Page:
    """What a person does on the page."""

    def __init__(self, driver, address):
        self.driver = driver
        driver.get(address)
        self.wait(lambda: self.knows_model() or self.texts("#why") != [""])

    def knows_model(self):
        return "weights" in self.find("#about").get_attribute("textContent")

    def find(self, where):
        return self.driver.find_element(By.CSS_SELECTOR, where)

    def texts(self, where):
        """Return what stands in the elements, all of one moment."""
        script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.innerText.trim())"
        return self.run(script, where)

    def wait(self, holds):
        return WebDriverWait(self.driver, 15, poll_frequency=0.02).until(lambda _: holds())

    def run(self, script, *values):
        return self.driver.execute_script(script, *values)

    def type(self, text):
        self.find("#draft").send_keys(text, Keys.ENTER)

    def say(self, text):
        """Paste a text, send it, and wait for the end of the reply."""
        self.run("draft.value = arguments[0]; draft.dispatchEvent(new Event('input'))", text)
        self.find("#draft").send_keys(Keys.ENTER)
        self.wait_for_reply()

    def wait_for_reply(self):
        self.wait(lambda: self.find("#stop").get_attribute("hidden") and self.texts(".turn.assistant"))

    def use(self, where):
        """Click what may show only under the pointer."""
        self.run("arguments[0].click()", self.find(where))

    def read_chats(self):
        return json.loads(self.run("return localStorage.getItem('firstwords.chats')") or "[]")


@pytest.fixture
def told():
    return Told(lambda question: f"You said {question}.")


@pytest.fixture
def shown(chromium, told):
    with serve(build_session(context=400), batcher=told, web=True) as address:
        chromium.get_log("browser")
        yield Page(chromium, address)
        severe = [
            line
            for line in chromium.get_log("browser")
            if line["level"] == "SEVERE" and "status of 400" not in line["message"]
        ]
        assert not severe


def test_a_conversation_streams_and_outlives_a_reload(shown, told):
    assert shown.find("#tokens").text == "0 / 400"
    shown.type("tea")
    shown.wait_for_reply()
    assert shown.find("#voice").get_attribute("textContent") == "You said tea."
    shown.type("milk")
    shown.wait(lambda: len(shown.texts(".turn")) == 4)
    shown.wait_for_reply()
    assert shown.texts(".turn .body") == ["tea", "You said tea.", "milk", "You said milk."]
    assert told.prompts[1] == (
        "<|user|>tea<|end|><|assistant|>You said tea.<|end|><|user|>milk<|end|><|assistant|>"
    )
    used = len("teaYou said tea.milkYou said milk.") + 8
    assert shown.find("#tokens").text == f"{used} / 400"
    shown.driver.refresh()
    shown.wait(lambda: shown.texts("#chats .open") == ["tea"])
    shown.use("#chats .open")
    assert shown.texts(".turn .body") == ["tea", "You said tea.", "milk", "You said milk."]


def test_retry_edit_rename_delete_and_undo(shown, told):
    shown.say("tea")
    shown.use(".retry")
    shown.wait(lambda: len(told.questions) == 2)
    shown.wait_for_reply()
    assert shown.texts(".turn .body") == ["tea", "You said tea."]
    shown.use(".edit")
    shown.find(".editor textarea").send_keys("cup", Keys.ENTER)
    shown.wait(lambda: shown.texts(".turn .body") == ["teacup", "You said teacup."])
    shown.wait_for_reply()
    shown.use(".rename")
    shown.find("#chats input").send_keys("Crockery", Keys.ENTER)
    shown.wait(lambda: shown.texts("#chats .open") == ["Crockery"])
    assert shown.find("#title").text == "Crockery"
    shown.use("#new-chat")
    shown.say("two")
    assert shown.texts("#chats .open") == ["two", "Crockery"]
    shown.use("#chats .delete")
    shown.wait(lambda: shown.texts("#chats .open") == ["Crockery"])
    assert [chat["title"] for chat in shown.read_chats()] == ["Crockery"]
    shown.use("#notice button")
    shown.wait(lambda: shown.texts("#chats .open") == ["two", "Crockery"])


def test_the_keyboard_keeps_its_place(shown, told):
    def held():
        return shown.run("let e = document.activeElement; return e.className || e.id")

    shown.say("tea")
    shown.find(".retry").send_keys(Keys.ENTER)
    shown.wait(lambda: len(told.questions) == 2 and held() == "retry")
    shown.find(".edit").send_keys(Keys.ENTER)
    shown.find(".editor textarea").send_keys("cup", Keys.ESCAPE)
    assert held() == "edit"
    assert shown.texts(".turn .body") == ["tea", "You said tea."]
    shown.find(".edit").send_keys(Keys.ENTER)
    shown.find(".editor textarea").send_keys("cup", Keys.ENTER)
    shown.wait(lambda: len(told.questions) == 3 and held() == "retry")
    shown.type("more")
    shown.wait(lambda: len(told.questions) == 4)
    shown.wait_for_reply()
    assert held() == "draft"


def test_a_server_that_asks_for_a_key_is_given_it_in_the_drawer(chromium, told):
    with serve(build_session(), batcher=told, web=True, key="sesame") as address:
        page = Page(chromium, address)
        assert page.texts("#why") == ["This server asks for its key."]
        chromium.switch_to.active_element.send_keys("sesame", Keys.ENTER)
        page.wait(page.knows_model)
        page.say("tea")
        assert page.texts(".turn .body") == ["tea", "You said tea."]
        page.find("#open-drawer").click()
        assert page.texts("#why") == [""]


def test_stop_keeps_what_came_and_frees_the_server(shown, told):
    waiting = threading.Event()

    async def halt(told):
        if len(told.questions) == 1 and told.shown > 8:
            waiting.set()
            await told.forever()
        told.shown += 1

    import asyncio

    told.shown, told.forever, told.gate = 0, asyncio.Event().wait, halt
    shown.type("tea")
    assert waiting.wait(15)
    shown.wait(lambda: shown.texts(".turn.assistant .body") == ["You said"])
    shown.find("#draft").send_keys(Keys.ESCAPE)
    shown.wait_for_reply()
    assert shown.texts(".remark") == ["stopped"]
    assert [turn["content"].strip() for turn in shown.read_chats()[0]["turns"]] == ["tea", "You said"]
    shown.say("again")
    assert shown.texts(".turn .body")[-1] == "You said again."


def test_the_drawers_settings_are_sent_and_kept(shown, told):
    shown.find("#open-drawer").click()
    for name, value in {
        "system": "Be brief.",
        "temperature": "0.7",
        "top_k": "40",
        "max_tokens": "30",
    }.items():
        shown.find(f"#settings [name={name}]").send_keys(value)
    shown.find("#settings [name=seed]").send_keys("3", Keys.ESCAPE)
    shown.wait(lambda: not shown.find("#drawer").is_displayed())
    shown.driver.refresh()
    shown.wait(lambda: "weights" in shown.find("#about").text)
    shown.say("tea")
    assert told.prompts[0].startswith("<|system|>Be brief.<|end|><|user|>tea")
    sampling = told.samplings[0]
    assert (sampling.temperature, sampling.top_k, sampling.seed, sampling.max_new_tokens) == (0.7, 40, 3, 30)


def test_a_full_context_is_told(shown):
    shown.say("a" * 100)
    shown.say("b" * 100)
    assert "oldest turn is out of the model's view" in shown.find("#notice").text
    shown.say("c" * 2000)
    assert "shorten it" in shown.find("#notice").text
    assert shown.find("#notice").get_attribute("class") == "error"


def test_light_dark_keyboard_and_phone(shown):
    def colour():
        return shown.run("return getComputedStyle(document.body).backgroundColor")

    media = {"features": [{"name": "prefers-color-scheme", "value": "light"}]}
    shown.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    shown.wait(lambda: colour() == "rgb(251, 250, 247)")
    media["features"][0]["value"] = "dark"
    shown.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    shown.wait(lambda: colour() == "rgb(23, 25, 28)")
    shown.find("#theme").click()
    assert colour() == "rgb(251, 250, 247)"
    shown.driver.refresh()
    shown.wait(lambda: colour() == "rgb(251, 250, 247)")
    shown.say("word " + "long" * 60)
    reached = set()
    for _ in range(16):
        shown.driver.switch_to.active_element.send_keys(Keys.TAB)
        reached.add(shown.run("let e = document.activeElement; return e.id || e.className || e.tagName"))
    assert {
        "new-chat",
        "open",
        "tool rename",
        "tool delete",
        "theme",
        "open-drawer",
        "draft",
        "retry",
    } <= reached
    shown.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    try:
        assert shown.run("return document.documentElement.scrollWidth") == 360
        shown.wait(lambda: not shown.find("#sidebar").is_displayed())
        shown.find("#open-sidebar").click()
        shown.wait(lambda: shown.find("#new-chat").is_displayed())
        shown.find("#new-chat").send_keys(Keys.ENTER)
        shown.wait(lambda: not shown.find("#sidebar").is_displayed())
    finally:
        shown.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_markdown_becomes_elements(shown, told):
    told.reply = lambda question: (
        "# Head\nA **bold** *word* and `code`.\n\n- one\n- two\n\n3. three\n\n> said\n\n---\n"
        "```py\nx = '<b>'\n  y\n```\nend"
    )
    shown.say("show")
    code = shown.find(".code pre code")
    assert code.get_attribute("textContent") == "x = '<b>'\n  y"
    assert shown.texts(".body strong, .body em, .body p code, .body h3, .body li, .body blockquote") == [
        *("Head", "bold", "word", "code", "one", "two", "three", "said")
    ]
    assert shown.find(".body ol").get_attribute("start") == "3"
    assert shown.texts(".code .bar span") == ["py"]
    assert shown.texts(".code .copy") == ["Copy"]


def test_tables_become_elements(shown, told):
    told.reply = lambda question: (
        "Sizes:\n| name | `size` | note |\n|:---|---:|:-:|\n| **a** | 1 | x \\| y |\n| b |\n"
        "c | 3 | z | more\n\n| one |\n| --- |\n| last |\n- item\n\na | b\n--- | --- | ---\n\n| no |\n---"
    )
    shown.say("show")
    assert shown.texts(".body th") == ["name", "size", "note", "one"]
    assert shown.texts(".body td") == ["a", "1", "x | y", "b", "c", "3", "z", "last"]
    assert shown.texts(".body td strong, .body th code") == ["size", "a"]
    assert shown.run("return [...document.querySelectorAll('th')].map((e) => e.className)") == [
        *("", "right", "middle", "")
    ]
    assert shown.texts(".body > p") == ["Sizes:", "a | b\n--- | --- | ---", "| no |\n---"]
    assert shown.texts(".body li") == ["item"]
    long = "|".join(["a long heading"] * 40)
    told.reply = lambda question: f"{long}\n{'|'.join(['---'] * 40)}\n"
    shown.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    try:
        shown.say("wide")
        assert shown.run("return document.documentElement.scrollWidth") == 360
    finally:
        shown.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_line_of_many_bars_takes_no_time(shown):
    rules = ["|-" * 20_000 + "x", f"|{' ' * 50_000}|{' ' * 50_000}x", f"|{'- ' * 50_000}x"]
    text = "\n".join(line for rule in rules for line in ("|" * 9_000, rule))
    chat = {"id": "1", "title": "bars", "turns": [{"role": "assistant", "content": text}]}
    shown.run("localStorage.setItem('firstwords.chats', arguments[0])", json.dumps([chat]))
    shown.driver.refresh()
    shown.wait(lambda: shown.texts("#chats .open"))
    shown.use("#chats .open")
    shown.wait(lambda: len(shown.texts(".assistant .body > *")) == 1)  # for fifteen seconds


def list_hostile(canary):
    """Return texts that act where they are taken for HTML; those with the canary's address call it."""
    bad = "window.pwned=1"
    return [
        f"<script>{bad}</script>",
        f"<img src=x onerror={bad}>",
        f"<img src={canary}/a>",
        f"<svg onload={bad}>",
        f"<svg><script>{bad}</script></svg>",
        f"<iframe src=javascript:parent.{bad}></iframe>",
        f'<iframe srcdoc="<script>parent.{bad}</script>"></iframe>',
        f"<link rel=stylesheet href={canary}/b>",
        f"<style>@import url({canary}/c);</style>",
        f"<object data={canary}/d></object><embed src={canary}/e>",
        f"<video src={canary}/f onerror={bad}>",
        f"<form action={canary}/g><input autofocus onfocus={bad}></form>",
        f"<meta http-equiv=refresh content='0;url={canary}/h'>",
        f"<base href={canary}/>",
        f"<details open ontoggle={bad}>",
        f"<body onload={bad}>",
        f"<math><mtext></p><style><img src=x onerror={bad}></style></mtext></math>",
        f"</div></article></main><img src=x onerror={bad}>",
        f"[click](javascript:{bad})",
        f"![image]({canary}/i)",
        f"[x]: {canary}/j\n![x]",
        f"<{canary}/k>",
        f"```html\n<img src=x onerror={bad}>\n```",
        f'```"><img/src=x/onerror={bad}>\nx\n```',
        f"`<img src=x onerror={bad}>`",
        f"**<b onmouseover={bad}>x**",
        f"# <img src=x onerror={bad}>",
        f"> <img src=x onerror={bad}>",
        f"1. <img src=x onerror={bad}>",
        f"| <img src=x onerror={bad}> | a |\n|---|:-:|\n| <script>{bad}</script> | `<b onclick={bad}>` |",
        f"a | b\n:-- | --:\n{canary}/t | [x](javascript:{bad}) | <td onclick={bad}>",
        f"&lt;img src=x onerror={bad}&gt;",
        f"<a href='javascript:{bad}'>x</a>",
        "\u202e<b>turned</b>\u2066 \u2028 \x1b[31m \x00".replace("\x00", ""),
        "data: [DONE]\n\ndata: {}\n\n",
        "*" * 200 + "_" * 200 + "`" * 199,
        "[" * 150 + "]" * 150,
    ]


def trusting(session, **options):
    """The server with a page that takes text for HTML, and without the headers that forbid it."""
    app = build_app(session, **{**options, "web": False}).app
    for path, (name, kind) in page.FILES.items():
        text = (files(page) / name).read_text(encoding="utf-8")
        text = text.replace("body.textContent = turn.content", "body.innerHTML = turn.content")
        text = text.replace("body.append(...renderMarkdown(turn.content))", "body.innerHTML = turn.content")
        app.get(path)(_send(text, kind))
    return Bare(app)


def _send(text, kind):
    async def answer():
        return Response(text, media_type=kind)

    return answer


@beside(build_app, trusting)
def test_no_text_acts(implementation, chromium):
    told = Told(lambda question: question)
    session = build_session(context=4000)
    with (
        socket.create_server(("127.0.0.1", 0)) as canary,
        serve(session, build=implementation, batcher=told, web=True) as address,
    ):
        canary.setblocking(False)
        hostile = list_hostile(f"http://127.0.0.1:{canary.getsockname()[1]}")
        shown = Page(chromium, address)
        for text in hostile:
            shown.use("#new-chat")
            shown.say(text)
            # What the browser normalises in a field is sent as it shows it.
            assert told.questions[-1].split() == text.split()
            check_harmless(shown, address, canary)
        chats = [
            {
                "id": text,
                "title": text,
                "turns": [{"role": role, "content": text} for role in ("user", "assistant")],
            }
            for text in hostile
        ]
        chats += [{"id": 1}, None, {"id": "x", "title": "y", "turns": [{"role": "evil"}, None]}]
        shown.run("localStorage.setItem('firstwords.chats', arguments[0])", json.dumps(chats))
        shown.driver.refresh()
        shown.wait(lambda: len(shown.texts("#chats li")) == len(hostile) + 1)
        for place in range(len(hostile)):
            shown.use(f"#chats li:nth-child({place + 1}) .open")
            check_harmless(shown, address, canary)


def check_harmless(shown, address, canary):
    """No script ran, no element came in, no request left."""
    found = shown.run("return [...document.querySelectorAll('#log *')].map((e) => e.tagName)")
    assert set(found) <= ALLOWED
    named = shown.run(
        "return [...document.querySelectorAll('#log *, #chats *')].flatMap((e) => e.getAttributeNames())"
    )
    assert set(named) <= {"class", "dir", "type", "title", "aria-label", "tabindex", "start", "aria-current"}
    assert shown.run("return window.pwned ?? null") is None
    called = shown.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert all(name.startswith(f"{address}/") for name in called)
    assert shown.driver.current_url == f"{address}/"
    with pytest.raises(BlockingIOError):
        canary.accept()


def test_the_page_comes_from_its_own_server_alone(shown):
    called = shown.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert len(called) >= 4
    root = shown.driver.current_url
    assert all(name.startswith(root) for name in called)
    blocked = shown.run("try { document.body.innerHTML = '<p>x</p>' } catch (e) { return e.name }")
    assert blocked == "TypeError"
    shown.driver.get_log("browser")
