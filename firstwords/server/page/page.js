"use strict";
// The page of firstwords. What people and models write becomes text nodes alone: nothing here parses HTML.

const $ = (id) => document.getElementById(id);
const CHATS = "firstwords.chats", SETTINGS = "firstwords.settings", THEME = "firstwords.theme", KEY = "firstwords.key";
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "max_tokens"];
const NO_KEY = "This server asks for its key.";
const MAX_SENT = 400; // turns: more than any context holds, and less than the server's limit

let chats = [], current = null, settings = {}, model = null, writing = null, deleted = null;

// --- elements

function make(tag, props = {}, ...children) {
  const element = Object.assign(document.createElement(tag), props);
  element.append(...children);
  return element;
}

function button(text, label, act, className = "") {
  const made = make("button", { type: "button", textContent: text, className });
  if (label) { made.setAttribute("aria-label", label); made.title = label; }
  made.addEventListener("click", act);
  return made;
}

const count = (number) => number.toLocaleString("en");

function tell(text, isError = false, ...more) {
  $("notice").className = isError ? "error" : "";
  $("notice").replaceChildren(text, ...more);
}

// --- Markdown: blocks of lines, then what stands inside a line

function renderMarkdown(text) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n"), blocks = [];
  let at = 0;
  const take = (holds) => { const from = at; while (at < lines.length && holds(lines[at], at - from)) at++; return lines.slice(from, at); };
  while (at < lines.length) {
    const line = lines[at];
    const fence = /^\s{0,3}(`{3,}|~{3,})\s*([\w+#.-]{0,20})/.exec(line);
    const heading = /^(#{1,6})\s+(.+)/.exec(line);
    if (!line.trim()) at++;
    else if (fence) {
      at++;
      const closes = (l) => l.trim().startsWith(fence[1]) && !l.trim().replaceAll(fence[1][0], "");
      blocks.push(renderCode(take((l) => !closes(l)).join("\n"), fence[2]));
      at++;
    } else if (heading) {
      at++;
      blocks.push(make(`h${Math.min(heading[1].length + 2, 5)}`, {}, ...renderInline(heading[2])));
    } else if (/^\s*([-*_])(\s*\1){2,}\s*$/.test(line)) { at++; blocks.push(make("hr")); }
    else if (/^\s*>/.test(line)) {
      const quoted = take((l) => /^\s*>/.test(l)).map((l) => l.replace(/^\s*> ?/, ""));
      blocks.push(make("blockquote", {}, ...joinLines(quoted)));
    } else if (opensTable(lines, at)) blocks.push(renderTable(take((l, n) => l.trim() && (n < 2 || !OPENS.test(l)))));
    else if (LIST.test(line)) blocks.push(renderList(take((l) => LIST.test(l) || /^\s{2,}\S/.test(l))));
    else blocks.push(make("p", {}, ...joinLines(take((l, n) => l.trim() && (!n || !(OPENS.test(l) || opensTable(lines, at)))))));
  }
  return blocks;
}

const LIST = /^\s*([-*+]|\d{1,9}[.)])\s+/;
const OPENS = /^\s*(`{3,}|~{3,}|>|#{1,6}\s|([-*+]|\d{1,9}[.)])\s)/;

function renderList(lines) {
  const number = /^\s*(\d+)/.exec(lines[0]);
  const items = [];
  for (const line of lines) {
    if (LIST.test(line)) items.push([line.replace(LIST, "")]);
    else items.at(-1).push(line.trim());
  }
  const list = make(number ? "ol" : "ul", {}, ...items.map((item) => make("li", {}, ...joinLines(item))));
  if (number) list.start = Number(number[1]);
  return list;
}

// A line of cells, and below it as many of dashes.
function opensTable(lines, at) {
  const below = lines[at + 1] ?? "";
  if (!lines[at].includes("|") || !below.includes("|")) return false;
  const rule = splitCells(below);
  return rule.length === splitCells(lines[at]).length && rule.every((cell) => /^:?-+:?$/.test(cell));
}

function splitCells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function renderTable(lines) {
  const [head, rule, ...rows] = lines.map(splitCells);
  const sides = rule.map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "middle" : "right") : ""));
  const renderRow = (tag, cells) =>
    make("tr", {}, ...cells.slice(0, head.length).map((cell, n) => make(tag, { className: sides[n] }, ...renderInline(cell))));
  const body = make("tbody", {}, ...rows.map((cells) => renderRow("td", cells)));
  const table = make("table", {}, make("thead", {}, renderRow("th", head)), body);
  return make("div", { className: "table", tabIndex: 0 }, table);
}

function joinLines(lines) {
  return lines.flatMap((line, n) => (n ? [make("br"), ...renderInline(line)] : renderInline(line)));
}

const INLINE = /(`+)(.+?)\1|\*\*(?=\S)(.+?)\*\*|(?<![\w*])\*(?=[^\s*])([^*]+?)\*(?![\w*])|(?<!\w)_(?=[^\s_])([^_]+?)_(?!\w)/;

function renderInline(text) {
  const nodes = [];
  while (text) {
    const found = INLINE.exec(text);
    if (!found) { nodes.push(text); break; }
    if (found.index) nodes.push(text.slice(0, found.index));
    const [whole, , code, strong, star, line] = found;
    if (code !== undefined) nodes.push(make("code", { textContent: code }));
    else if (strong !== undefined) nodes.push(make("strong", {}, ...renderInline(strong)));
    else nodes.push(make("em", {}, ...renderInline(star ?? line)));
    text = text.slice(found.index + whole.length);
  }
  return nodes;
}

function renderCode(text, language) {
  const copy = button("Copy", "Copy the code", () => copyText(text, copy), "copy");
  const bar = make("div", { className: "bar" }, make("span", { textContent: language || "text" }), copy);
  const pre = make("pre", { tabIndex: 0 }, make("code", { textContent: text }));
  return make("div", { className: "code" }, bar, pre);
}

async function copyText(text, from) {
  try { await navigator.clipboard.writeText(text); from.textContent = "Copied"; }
  catch { from.textContent = "Cannot copy"; }
  setTimeout(() => { from.textContent = "Copy"; }, 1500);
}

// --- what the browser keeps

function load(key, fallback) {
  try { return JSON.parse(localStorage.getItem(key)) ?? fallback; } catch { return fallback; }
}

function keep(key, value) {
  try { localStorage.setItem(key, JSON.stringify(value)); }
  catch { tell("The browser's store is full: delete conversations, or this one is lost with the tab.", true); }
}

function isTurn(turn) {
  return turn && (turn.role === "user" || turn.role === "assistant") && typeof turn.content === "string";
}

function loadChats() {
  const found = load(CHATS, []);
  const whole = (chat) => chat && typeof chat.id === "string" && typeof chat.title === "string" && Array.isArray(chat.turns);
  chats = (Array.isArray(found) ? found : []).filter(whole);
  for (const chat of chats) chat.turns = chat.turns.filter(isTurn);
}

function keepChats() { keep(CHATS, chats.filter((chat) => chat.turns.length)); }

// --- conversations

function newChat() {
  current = { id: `${Date.now()}-${Math.random()}`, title: "New conversation", turns: [], usage: null };
  show();
  $("draft").focus();
}

function openChat(chat) { stop(); current = chat; closeSidebar(); show(); }

function deleteChat(chat) {
  const place = chats.indexOf(chat);
  if (chat === current) stop();
  deleted = [chat, place];
  chats.splice(place, 1);
  keepChats();
  if (chat === current) newChat(); else showChats();
  tell("Deleted. ", false, button("Undo", "", undelete));
}

function undelete() {
  const [chat, place] = deleted;
  chats.splice(place, 0, chat);
  keepChats();
  openChat(chat);
}

function renameChat(chat, item) {
  const input = make("input", { value: chat.title, maxLength: 80 });
  input.setAttribute("aria-label", "Name of the conversation");
  const finish = (takes) => {
    if (!input.isConnected) return;
    if (takes && input.value.trim()) { chat.title = input.value.trim(); chat.named = true; }
    keepChats();
    show();
  };
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter") finish(true);
    if (event.key === "Escape") finish(false);
  });
  item.replaceChildren(input);
  input.focus();
  input.select();
  input.addEventListener("blur", () => finish(true));
}

// --- what is shown

function show() {
  tell("");
  showChats();
  $("title").textContent = current.title;
  document.title = `${current.title} · firstwords`;
  $("welcome").hidden = current.turns.length > 0;
  $("log").replaceChildren(...current.turns.map(renderTurn));
  showUsage();
  follow(true);
}

function showChats() {
  $("chats").replaceChildren(...chats.map((chat) => {
    const open = button(chat.title, "", () => openChat(chat), "open");
    open.title = chat.title;
    const item = make("li", { className: chat === current ? "current" : "" }, open);
    if (chat === current) open.setAttribute("aria-current", "true");
    item.append(
      button("✎", `Rename ${chat.title}`, () => renameChat(chat, item), "tool rename"),
      button("✕", `Delete ${chat.title}`, () => deleteChat(chat), "tool delete"),
    );
    return item;
  }));
}

function renderTurn(turn, place) {
  const body = make("div", { className: "body", dir: "auto" });
  const tools = make("div", { className: "tools" });
  if (turn.role === "user") {
    body.textContent = turn.content;
    tools.append(button("Edit", "Edit this message", () => editTurn(place), "edit"));
  } else {
    body.append(...renderMarkdown(turn.content));
    tools.append(button("Copy", "Copy the reply", (event) => copyText(turn.content, event.currentTarget)));
    if (place === current.turns.length - 1) tools.append(button("Retry", "Ask again", retry, "retry"));
    if (turn.remark) tools.append(make("span", { className: "remark", textContent: turn.remark }));
  }
  const shown = make("article", { className: `turn ${turn.role}` }, body, tools);
  shown.setAttribute("aria-label", turn.role === "user" ? "You" : "Model");
  return shown;
}

function showUsage() {
  const context = current.usage?.context ?? model?.context, used = current.usage?.total_tokens ?? 0;
  $("gauge").hidden = !context;
  if (!context) return;
  $("meter").max = context;
  $("meter").value = used;
  $("tokens").textContent = `${count(used)} / ${count(context)}`;
  $("gauge").title = `${used} tokens of the context in use, ${Math.max(context - used, 0)} left`;
  $("gauge").classList.toggle("full", used > 0.85 * context);
}

function follow(always = false) {
  const area = $("scroll");
  if (always || area.scrollHeight - area.scrollTop - area.clientHeight < 120) area.scrollTop = area.scrollHeight;
}

// --- asking

function headers() {
  const key = sessionStorage.getItem(KEY);
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function fetchModel() {
  try {
    const answer = await fetch("/v1/models", { headers: headers() });
    if (answer.status === 401) { tell(NO_KEY, true); openDrawer("key", NO_KEY); return; }
    model = (await answer.json()).data[0];
    const weights = model.parameters >= 1e6 ? `${(model.parameters / 1e6).toFixed(1)} million` : count(model.parameters);
    const step = Number.isInteger(model.step) ? `, step ${count(model.step)}` : "";
    $("about").textContent = `${model.id}: ${weights} weights, ${count(model.context)} tokens of context${step}.`;
    tell("");
    showUsage();
  } catch { tell("The server does not answer. Start it again, then load this page anew.", true); }
}

function buildRequest() {
  const turns = current.turns.filter((turn) => turn.content.trim()).slice(-MAX_SENT + 1);
  while (turns.length && turns[0].role !== "user") turns.shift();
  const messages = turns.map(({ role, content }) => ({ role, content }));
  if (settings.system?.trim()) messages.unshift({ role: "system", content: settings.system });
  const numbers = Object.fromEntries(NUMBERS.filter((name) => Number.isFinite(settings[name])).map((name) => [name, settings[name]]));
  return { model: model?.id ?? "", messages, stream: true, stream_options: { include_usage: true }, truncation: "auto", ...numbers };
}

async function ask() {
  const chat = current, reply = { role: "assistant", content: "" };
  const request = JSON.stringify(buildRequest());
  const control = new AbortController();
  writing = { chat, control };
  chat.turns.push(reply);
  keepChats();
  show();
  setBusy(true);
  // The button or the editor that asked is gone with its turn: its place is where one can stop.
  if (document.activeElement === document.body) $("stop").focus();
  const paint = paintLater(chat, reply);
  try {
    const answer = await fetch("/v1/chat/completions", { method: "POST", headers: headers(), body: request, signal: control.signal });
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    let ended = false;
    for await (const event of readEvents(answer.body)) {
      if (event === null) { ended = true; break; }
      if (event.error) throw new Error(event.error.message);
      if (event.usage) chat.usage = event.usage;
      const choice = event.choices[0];
      if (choice?.delta.content) { reply.content += choice.delta.content; paint(); }
      if (choice?.finish_reason === "length") reply.remark = "cut: no room left";
    }
    if (!ended) throw new Error("server: the connection broke; ask again");
    finish(chat, reply, evictionText(chat));
  } catch (error) {
    if (control.signal.aborted) { reply.remark = "stopped"; finish(chat, reply, "Stopped."); }
    else { reply.remark = "broken off"; finish(chat, reply, error.message, true); }
  }
}

function finish(chat, reply, text, isError = false) {
  if (!reply.content.trim()) {
    chat.turns.splice(chat.turns.indexOf(reply), 1);
    if (!text) text = "The model said nothing.";
  }
  const waited = document.activeElement === $("stop");
  if (writing?.chat === chat) { writing = null; setBusy(false); }
  keepChats();
  // Read aloud once and whole, not at every token.
  $("voice").textContent = reply.content;
  if (chat === current) { show(); if (text) tell(text, isError); }
  if (waited) ($("log").querySelector(".retry") ?? $("draft")).focus();
}

function evictionText(chat) {
  const gone = chat.usage?.evicted;
  return gone ? `The context is full: the oldest ${gone === 1 ? "turn is" : `${gone} turns are`} out of the model's view.` : "";
}

function paintLater(chat, reply) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      const shown = $("log").lastElementChild;
      if (chat !== current || writing?.chat !== chat || !shown) return;
      shown.querySelector(".body").replaceChildren(...renderMarkdown(reply.content));
      follow();
    });
  };
}

async function* readEvents(stream) {
  const decoder = new TextDecoder(), reader = stream.getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const events = (text + decoder.decode(value, { stream: true })).split("\n\n");
    text = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      yield data === "[DONE]" ? null : JSON.parse(data);
    }
  }
}

function setBusy(busy) {
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  $("log").setAttribute("aria-busy", String(busy));
  $("log").lastElementChild?.classList.toggle("writing", busy);
  updateSend();
}

function stop() {
  if (!writing) return;
  writing.control.abort();
  if (document.activeElement === $("stop")) $("draft").focus();
}

function submit(event) {
  event.preventDefault();
  const text = $("draft").value;
  if (!text.trim() || writing) return;
  if (!chats.includes(current)) chats.unshift(current);
  if (!current.turns.length && !current.named) current.title = text.trim().replace(/\s+/g, " ").slice(0, 60);
  if (current.turns.at(-1)?.role === "user") current.turns.pop();
  current.turns.push({ role: "user", content: text });
  $("draft").value = "";
  resize();
  ask();
}

function retry() {
  if (writing || current.turns.at(-1)?.role !== "assistant") return;
  current.turns.pop();
  ask();
}

function editTurn(place) {
  if (writing) return;
  const shown = $("log").children[place];
  const leave = () => { show(); $("log").children[place].querySelector(".edit").focus(); };
  const field = make("textarea", { value: current.turns[place].content, rows: 3 });
  field.setAttribute("aria-label", "Edit the message");
  const form = make("form", { className: "editor" }, field, make("div", {},
    button("Cancel", "", leave, "cancel"), make("button", { type: "submit", textContent: "Send" })));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!field.value.trim() || writing) return;
    current.turns = [...current.turns.slice(0, place), { role: "user", content: field.value }];
    ask();
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { event.stopPropagation(); leave(); }
    if (sends(event)) { event.preventDefault(); form.requestSubmit(); }
  });
  shown.replaceChildren(form);
  field.focus();
}

const sends = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing;

// --- the frame

function resize() {
  const field = $("draft");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
  updateSend();
}

function updateSend() { $("send").disabled = !$("draft").value.trim(); }

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").title = theme === "dark" ? "Light" : "Dark";
}

function startTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const wanted = () => { const kept = load(THEME, null); return kept === "dark" || kept === "light" ? kept : system.matches ? "dark" : "light"; };
  setTheme(wanted());
  system.addEventListener("change", () => setTheme(wanted()));
  $("theme").addEventListener("click", () => {
    keep(THEME, document.documentElement.dataset.theme === "dark" ? "light" : "dark");
    setTheme(wanted());
  });
}

function openDrawer(field, why = "") {
  const form = $("settings").elements;
  $("why").textContent = why;
  form.system.value = settings.system ?? "";
  for (const name of NUMBERS) form[name].value = settings[name] ?? "";
  form.key.value = sessionStorage.getItem(KEY) ?? "";
  if (!$("drawer").open) $("drawer").showModal();
  if (field) form[field].focus();
}

function takeSettings() {
  const form = $("settings").elements;
  settings = { system: form.system.value };
  for (const name of NUMBERS) if (form[name].value !== "" && form[name].checkValidity()) settings[name] = Number(form[name].value);
  keep(SETTINGS, settings);
  if (form.key.value !== (sessionStorage.getItem(KEY) ?? "")) { sessionStorage.setItem(KEY, form.key.value); fetchModel(); }
}

function openSidebar() { $("sidebar").classList.add("open"); $("new-chat").focus(); }

function closeSidebar() { $("sidebar").classList.remove("open"); }

function start() {
  startTheme();
  const found = load(SETTINGS, {});
  settings = found && typeof found === "object" ? found : {};
  loadChats();
  $("composer").addEventListener("submit", submit);
  $("draft").addEventListener("input", resize);
  $("draft").addEventListener("keydown", (event) => { if (sends(event)) submit(event); });
  $("stop").addEventListener("click", stop);
  $("new-chat").addEventListener("click", () => { stop(); closeSidebar(); newChat(); });
  $("open-sidebar").addEventListener("click", openSidebar);
  $("close-sidebar").addEventListener("click", closeSidebar);
  $("veil").addEventListener("click", closeSidebar);
  $("open-drawer").addEventListener("click", () => openDrawer());
  $("drawer").addEventListener("close", takeSettings);
  $("drawer").addEventListener("click", (event) => { if (event.target === $("drawer")) $("drawer").close(); });
  $("defaults").addEventListener("click", () => { for (const name of [...NUMBERS, "system"]) $("settings").elements[name].value = ""; });
  addEventListener("keydown", (event) => { if (event.key === "Escape" && !$("drawer").open) { stop(); closeSidebar(); } });
  addEventListener("storage", (event) => {
    if (event.key !== CHATS || writing) return;
    loadChats();
    current = chats.find((chat) => chat.id === current.id) ?? current;
    show();
  });
  newChat();
  resize();
  fetchModel();
}

start();
