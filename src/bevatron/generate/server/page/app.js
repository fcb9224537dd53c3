// The conversation: what was said, what is asked of the server, what the buttons do.

import { ApiError, answer as ask, models as askModels } from "./api.js";
import { $, announce, copy, icon } from "./dom.js";
import { Follow } from "./follow.js";
import { askKey, historyPanel, keyPanel, settingsPanel, themeSwitch } from "./panels.js";
import * as store from "./store.js";
import { contextLine, documentView, emptyState, enters, parts, turn } from "./turns.js";

const CONTINUED = 256; // new tokens of a continued text unless the settings say otherwise
const input = $("input");
const values = store.settings();
let models = [];
let model = null;
let problem = null; // why there is no model
let conversation = store.last() ?? store.fresh();
let views = []; // of the messages; one for all of them when the model continues a text
let running = null; // {abort, answer} while an answer comes

const final = () => conversation.messages.at(-1);
const completes = () => Boolean(model && (!model.chat || values.mode === "complete"));
const shownAnswer = (message) => message.answers[message.shown];
const newAnswer = () => ({ content: "", reasoning: "", calls: [], stats: {}, finish: "", error: null });

// --- showing ---

const follow = new Follow($("scroller"), $("latest"));

function draw() {
  const { messages } = conversation;
  if (completes()) views = messages.length ? [documentView(messages, actions(messages.length - 1))] : [];
  else views = messages.map((message, i) => turn(message, actions(i)));
  $("turns").replaceChildren(...views.map((view) => view.root));
  views.forEach((_, i) => update(i));
  const empty = !messages.length;
  $("empty").hidden = !empty && !problem;
  $("empty").replaceChildren(...emptyState(model, completes(), problem, connect));
  document.body.classList.toggle("empty", empty);
  document.body.classList.toggle("completes", completes());
  drawFrame();
}

function update(i = views.length - 1) {
  const last = i === views.length - 1;
  views[i]?.update({ last, live: Boolean(running) && last });
}

/** What stands around the conversation. */
function drawFrame() {
  const { system } = values;
  $("system-line").hidden = !system.trim() || completes();
  $("system-line").textContent = `System: ${system.trim().replace(/\s+/g, " ").slice(0, 200)}`;
  const send = $("send");
  const name = running ? "Stop" : completes() ? "Continue the text" : "Send";
  if (send.title !== name) {
    send.title = name;
    send.setAttribute("aria-label", name);
    send.replaceChildren(icon(running ? "stop" : "up"));
  }
  send.disabled = !running && (!model || !(input.value.trim() || (completes() && conversation.messages.length)));
  send.classList.toggle("stops", Boolean(running));
  document.body.classList.toggle("runs", Boolean(running));
  for (const button of document.querySelectorAll("[data-run]")) button.disabled = Boolean(running);
  input.placeholder = completes() ? "Text to continue" : "Message";
  const { stats = {} } = final()?.role === "assistant" ? shownAnswer(final()) : {};
  contextLine(stats.prompt ? stats.prompt + (stats.completion ?? 0) : 0, model?.context);
}

/** Draw a growing answer once a frame, and never with more than a fifth of the time. */
let painting = null;
let cost = 0;
function paint() {
  painting ??= setTimeout(() => requestAnimationFrame(() => {
    if (painting === null) return;
    painting = null;
    const start = performance.now();
    update();
    cost = performance.now() - start;
  }), Math.min(cost * 4, 2000));
}

// --- asking ---

function sampling() {
  const body = { model: model.id };
  for (const name of store.NUMBERS) if (values[name] !== "") body[name] = Number(values[name]);
  // Chosen here and shown with the answer, so that any answer can be had again.
  body.seed ??= crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;
  const stop = values.stop.split("\n").filter((line) => line);
  if (stop.length) body.stop = stop;
  return body;
}

/** The messages before the last one, which is the answer to come. */
function chatMessages(messages) {
  const sent = values.system.trim() ? [{ role: "system", content: values.system }] : [];
  for (const message of messages) {
    if (message.role === "tool") sent.push({ role: "tool", tool_call_id: message.call, name: message.name, content: message.content });
    else if (message.role === "assistant") {
      const said = shownAnswer(message);
      const { text } = parts(said);
      const calls = said.calls.map((c) => ({ id: c.id, type: "function", function: { name: c.name, arguments: c.arguments } }));
      if (calls.length) sent.push({ role: "assistant", content: text, tool_calls: calls });
      else if (text) sent.push({ role: "assistant", content: text });
    } else if (sent.at(-1)?.role === "user") {
      // What got no answer is asked together with what follows: templates want turns to alternate.
      sent.at(-1).content += `\n\n${message.content}`;
    } else sent.push({ role: "user", content: message.content });
  }
  return sent;
}

function request() {
  const before = conversation.messages.slice(0, -1);
  const body = sampling();
  if (completes()) {
    const said = (m) => (m.role === "assistant" ? shownAnswer(m).content : m.content);
    return { ...body, prompt: before.map(said).join(""), max_tokens: body.max_tokens ?? CONTINUED };
  }
  if (values.tools.trim()) body.tools = JSON.parse(values.tools);
  return { ...body, messages: chatMessages(before) };
}

/** The answer; where the context has no room for as much as this page asks for by itself, what fits. */
async function* within(body, signal) {
  try {
    yield* ask(body, signal);
  } catch (error) {
    if (error.code !== "context_length_exceeded" || values.max_tokens !== "" || !body.max_tokens) throw error;
    yield* ask({ ...body, max_tokens: undefined }, signal);
  }
}

function takeCalls(answer, deltas) {
  for (const { index = 0, id, function: f = {} } of deltas) {
    if (!Number.isInteger(index) || index < 0 || index > 100) continue;
    while (answer.calls.length <= index) answer.calls.push({ id: "", name: "", arguments: "" });
    const call = answer.calls[index];
    call.id ||= id ?? "";
    call.name += f.name ?? "";
    call.arguments += f.arguments ?? "";
  }
}

/** Get the last message's answer from the server. */
async function run() {
  const answer = shownAnswer(final());
  const mine = conversation;
  running = { abort: new AbortController(), answer };
  draw();
  follow.follow();
  announce("Answering");
  const start = performance.now();
  const since = () => (performance.now() - start) / 1000;
  const { stats } = answer;
  let saved = start;
  try {
    const body = request();
    stats.seed = body.seed;
    for await (const event of within(body, running.abort.signal)) {
      if (event.text !== undefined || event.reasoning || event.calls) {
        stats.first ??= since();
        stats.completion = (stats.completion ?? 0) + 1;
        stats.rate = stats.completion > 1 ? (stats.completion - 1) / (since() - stats.first) : 0;
      }
      answer.content += event.text ?? "";
      answer.reasoning += event.reasoning ?? "";
      if (event.calls) takeCalls(answer, event.calls);
      if (event.finish) answer.finish = event.finish;
      if (event.usage) {
        stats.prompt = event.usage.prompt_tokens;
        stats.completion = event.usage.completion_tokens;
        stats.rate = stats.completion > 1 ? (stats.completion - 1) / (since() - stats.first) : 0;
      }
      if (event.text && stats.thought === undefined) {
        const { reasoning, thinking } = parts(answer, true);
        if (!thinking) stats.thought = reasoning ? since() - stats.first : 0;
      }
      paint();
      if (performance.now() - saved > 2000) {
        saved = performance.now();
        save(mine);
      }
    }
    announce(`Answer: ${parts(answer).text.slice(0, 4000)}`);
  } catch (error) {
    if (error.name === "AbortError") {
      answer.finish = "stopped";
      announce("Stopped");
    } else {
      if (!(error instanceof ApiError)) console.error(error);
      answer.error = { kind: error.kind ?? "server", message: error.message, code: error.code };
    }
  } finally {
    running = null;
    clearTimeout(painting);
    painting = null;
    save(mine);
    draw();
  }
  if (answer.error?.kind === "key") giveKey(answer.error.message, retry);
}

function save(which) {
  which.changed = Date.now();
  store.save(which);
}

const retry = () => {
  const message = final();
  if (running || message?.role !== "assistant") return;
  message.answers[message.shown] = newAnswer();
  run();
};

async function giveKey(message, then) {
  if (await askKey(message)) await connect();
  if (model) then();
}

/** Add messages and have them answered. False when the settings cannot be sent. */
function say(...messages) {
  if (running || !model || !settings.valid()) return false;
  const old = final();
  if (old?.role === "assistant" && old.answers.every((a) => !a.content && !a.reasoning && !a.calls.length)) conversation.messages.pop();
  conversation.messages.push(...messages, { role: "assistant", answers: [newAnswer()], shown: 0 });
  run();
  return true;
}

const stop = () => running?.abort.abort();

/** What the buttons of message `i` do. */
function actions(i) {
  const message = conversation.messages[i];
  const again = () => {
    if (running || !settings.valid()) return;
    message.answers.push(newAnswer());
    message.shown = message.answers.length - 1;
    run();
  };
  return {
    retry,
    again,
    key: () => giveKey("This server asks for an API key.", retry),
    complete: () => {
      setMode("complete");
      retry();
    },
    show: (step) => {
      message.shown = Math.min(Math.max(message.shown + step, 0), message.answers.length - 1);
      save(conversation);
      draw();
    },
    edit: (text) => rewrite(i, text),
    rewrite: (text) => rewrite(0, text),
    results: (results) => say(...results),
  };
}

/** Message `i` says `text` now, and what came after it is asked anew. */
function rewrite(i, text) {
  if (running || !model || !settings.valid()) return;
  conversation.messages.length = i;
  say({ role: "user", content: text });
  input.focus();
}

// --- the frame ---

async function connect() {
  try {
    models = await askModels();
    model = models.find(({ id }) => id === values.model) ?? models[0] ?? null;
    problem = model ? null : new ApiError("server", "The server has no model.");
  } catch (error) {
    model = null;
    problem = error;
    if (error.kind === "key") giveKey(error.message, () => {});
  }
  const select = $("model");
  select.replaceChildren(...models.map(({ id }) => new Option(id, id, false, id === model?.id)));
  select.hidden = models.length < 2;
  $("model-name").hidden = models.length > 1;
  setModel();
}

function setModel() {
  $("model-name").textContent = model?.id ?? "";
  $("model-name").title = model?.id ?? "";
  document.title = model ? `${model.id.split("/").pop()} · Bevatron` : "Bevatron";
  setMode(values.mode);
}

function setMode(mode) {
  values.mode = mode;
  const form = $("settings-form");
  form.elements.mode.value = completes() ? "complete" : "chat";
  const without = Boolean(model && !model.chat);
  for (const radio of form.elements.mode) radio.disabled = without;
  const usual = { ...model?.sampling, max_tokens: completes() ? CONTINUED : undefined, seed: "random" };
  for (const name of store.NUMBERS) form.elements[name].placeholder = usual[name] ?? "default";
  $("mode-note").textContent = without ? "This model has no chat template."
    : completes() ? "The model continues the text as it is." : "";
  $("system-field").hidden = $("tools-field").hidden = completes();
  draw();
}

function open(which) {
  stop();
  conversation = which;
  if (!which.messages.length) store.leave();
  draw();
  follow.follow();
  input.focus();
}

const settings = settingsPanel(values, () => {
  if (completes() === document.body.classList.contains("completes")) drawFrame();
  else setMode(values.mode);
}, () => JSON.stringify(chatMessages(conversation.messages), null, 2), copy);
historyPanel(() => conversation.id, {
  open: (id) => open(store.load(id) ?? store.fresh()),
  forgotten: (id) => id === conversation.id && open(store.fresh()),
});
keyPanel();
themeSwitch();

function grow() {
  if (CSS.supports("field-sizing", "content")) return;
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return stop();
  const text = completes() ? input.value : input.value.trim();
  const messages = text ? [{ role: "user", content: text }] : [];
  if (!messages.length && !(completes() && conversation.messages.length)) return;
  if (!say(...messages)) return;
  input.value = "";
  grow();
  drawFrame();
});
input.addEventListener("input", () => {
  grow();
  drawFrame();
});
input.addEventListener("keydown", (event) => {
  if (enters(event)) {
    event.preventDefault();
    if (!running) $("composer").requestSubmit();
  } else if (event.key === "ArrowUp" && !input.value && !running) {
    const view = views.findLast(({ edit }) => edit);
    if (!view) return;
    event.preventDefault();
    view.edit();
  }
});
document.addEventListener("keydown", (event) => {
  const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement.tagName);
  if (event.key === "Escape" && running && !document.querySelector("dialog:modal")) stop();
  else if (event.key === "Escape" && $("settings").open && !event.defaultPrevented) $("settings").close();
  else if (event.key === "/" && !typing && !document.querySelector("dialog:modal")) {
    event.preventDefault();
    input.focus();
  }
});
$("new").addEventListener("click", () => open(store.fresh()));
$("system-line").addEventListener("click", () => settings.open("system"));
$("model").addEventListener("change", ({ target }) => {
  model = models.find(({ id }) => id === target.value);
  values.model = model.id;
  store.keepSettings(values);
  setModel();
});
addEventListener("pagehide", () => running && save(conversation));

if (!matchMedia("(pointer: coarse)").matches) input.focus();
draw();
connect();
