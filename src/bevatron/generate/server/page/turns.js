// How messages look. Nothing here talks to the server: what a button does comes in as `act`.

import { $, copyButton, count, el, icon, iconButton, tokens } from "./dom.js";
import { codeBlock, Markdown } from "./markdown.js";

/** An answer's reasoning and its text. `thinking`: the reasoning still goes on. */
export function parts(answer, open = false) {
  const content = answer.content.trimStart();
  const start = "<think>";
  if (open && content && start.startsWith(content)) return { reasoning: "", text: "", thinking: true };
  const begins = content.startsWith(start);
  const end = content.indexOf("</think>");
  // Some templates write the opening tag into the prompt, so an answer may have the closing one alone.
  if (begins || end >= 0) {
    const reasoning = content.slice(begins ? start.length : 0, end < 0 ? undefined : end).trim();
    return { reasoning, text: end < 0 ? "" : content.slice(end + 8).trimStart(), thinking: end < 0 };
  }
  return { reasoning: answer.reasoning, text: answer.content, thinking: Boolean(answer.reasoning && !content) };
}

const number = (x) => (x >= 100 ? count(Math.round(x)) : x >= 10 ? x.toFixed(1) : x.toFixed(2));

function statistics({ stats, finish }, live) {
  const words = [];
  if (finish === "stopped") words.push("stopped");
  if (finish === "length") words.push("cut at the token limit");
  if (stats.completion) words.push(`${live ? "≈ " : ""}${tokens(stats.completion)}`);
  if (stats.rate) words.push(`${number(stats.rate)} tokens/s`);
  if (!live && stats.first) words.push(`first after ${number(stats.first)} s`);
  if (!live && stats.seed != null) words.push(`seed ${stats.seed}`);
  return words.join(" · ");
}

function errorBox(error, act) {
  const box = el("div", { class: "error", role: "alert" }, icon("alert"), el("p", {}, error.message));
  if (error.kind === "key") box.append(el("button", { type: "button", click: act.key }, "Enter key"));
  if (error.code === "no_chat_template") {
    box.append(el("button", { type: "button", click: act.complete }, "Use completion"));
  }
  box.append(el("button", { type: "button", click: act.retry }, "Try again"));
  return box;
}

/** One turn of a chat: {root, update(state)}; `state`: {last, live}. */
export function turn(message, act) {
  if (message.role === "user") return userTurn(message, act);
  if (message.role === "tool") return toolTurn(message);
  return answerTurn(message, act);
}

function toolTurn(message) {
  const root = el("article", { class: "turn tool" }, el("h2", { class: "unseen" }, "Result"),
    el("details", {}, el("summary", {}, icon("tool"), `Result of ${message.name}`), codeBlock(message.content, "", { left: 0 })));
  return { root, update() {} };
}

function userTurn(message, act) {
  const bubble = el("div", { class: "bubble" }, message.content);
  const root = el("article", { class: "turn user" }, el("h2", { class: "unseen" }, "You"));
  const actions = el("div", { class: "actions" }, copyButton(() => message.content),
    iconButton("edit", "Edit", () => edit(), { "data-run": true }));
  function show() {
    root.classList.remove("editing");
    root.replaceChildren(root.firstChild, bubble, actions);
  }
  function edit() {
    const form = editor(message.content, "Send", act.edit, () => {
      show();
      actions.querySelector("[data-run]").focus();
    });
    root.classList.add("editing");
    root.replaceChildren(root.firstChild, form);
    form.querySelector("textarea").focus();
  }
  show();
  return { root, edit, update() {} };
}

/** A text area with two buttons; Enter is done, Esc is cancelled. */
export function editor(text, word, done, cancel) {
  const area = el("textarea", { "aria-label": "Edit the text", class: "grows" });
  area.value = text;
  const finish = () => area.value.trim() && done(area.value);
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") cancel();
    else if (!enters(event)) return;
    else finish();
    event.preventDefault();
    event.stopPropagation();
  });
  return el("div", { class: "editor" }, area, el("div", { class: "row" },
    el("button", { type: "button", class: "quiet", click: cancel }, "Cancel"),
    el("button", { type: "button", class: "strong", click: finish, "data-run": true }, word)));
}

const touch = matchMedia("(hover: none) and (pointer: coarse)");
/** Enter sends, but on a phone, whose keyboards have no other way to a new line, the button does. */
export const enters = (event) =>
  event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229 && !touch.matches;

function answerTurn(message, act) {
  const thoughts = el("div", { class: "markdown" });
  const summary = el("summary", {}, "Reasoning");
  const details = el("details", { class: "think" }, summary, thoughts);
  const body = el("div", { class: "markdown" });
  const calls = el("div", { class: "calls" });
  const error = el("div");
  const waiting = el("div", { class: "waiting" }, el("i"), el("i"), el("i"));
  const stats = el("span", { class: "stats" });
  const place = el("span", { class: "place" });
  const pager = el("span", { class: "pager" }, iconButton("back", "Previous answer", () => act.show(-1), { "data-run": true }),
    place, iconButton("forth", "Next answer", () => act.show(1), { "data-run": true }));
  const again = iconButton("again", "Another answer", act.again, { "data-run": true });
  const actions = el("div", { class: "actions" }, copyButton(() => parts(current()).text), again, pager, stats);
  const root = el("article", { class: "turn answer" }, el("h2", { class: "unseen" }, "Answer"),
    details, body, calls, waiting, error, actions);
  const [shown, thought] = [new Markdown(body), new Markdown(thoughts)];
  const current = () => message.answers[message.shown];
  let drawnCalls = "";

  function update({ last, live }) {
    const answer = current();
    const { reasoning, text, thinking } = parts(answer, live);
    details.hidden = !reasoning;
    thought.set(reasoning, live && thinking);
    summary.textContent = live && thinking ? "Reasoning…"
      : answer.stats.thought ? `Reasoned for ${number(answer.stats.thought)} s` : "Reasoning";
    summary.classList.toggle("busy", live && thinking);
    shown.set(text, live);
    const key = JSON.stringify([answer.calls, last && !live]);
    if (key !== drawnCalls) calls.replaceChildren(...toolCalls(answer.calls, last && !live, act.results));
    drawnCalls = key;
    waiting.hidden = !live || Boolean(text || reasoning || answer.calls.length);
    error.replaceChildren(...(answer.error ? [errorBox(answer.error, act)] : []));
    root.setAttribute("aria-busy", String(live));
    root.classList.toggle("live", live);
    root.classList.toggle("last", last);
    again.hidden = pager.hidden = !last;
    pager.hidden ||= message.answers.length < 2;
    place.textContent = `${message.shown + 1}/${message.answers.length}`;
    stats.textContent = statistics(answer, live);
  }
  return { root, update };
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

/** What the model wants called, and a place for what it gave. */
function toolCalls(calls, asks, results) {
  const cards = calls.map((call) => {
    const area = el("textarea", { "aria-label": `Result of ${call.name}`, rows: 2, class: "mono", placeholder: "What the call gave" });
    const card = el("div", { class: "call" }, el("div", { class: "name" }, icon("tool"), el("span", {}, call.name || "a tool")),
      codeBlock(pretty(call.arguments), "json", { left: 10_000 }), asks && area);
    return { card, area, call };
  });
  const nodes = cards.map(({ card }) => card);
  const send = () => results(cards.map(({ call, area }) => ({ role: "tool", call: call.id, name: call.name, content: area.value })));
  if (asks && cards.length) {
    nodes.push(el("button", { type: "button", class: "strong", click: send, "data-run": true },
      cards.length > 1 ? "Send results" : "Send result"));
  }
  return nodes;
}

/** A text that the model continues: all of it in one piece, what the model wrote in its own colour. */
export function documentView(messages, act) {
  const text = el("div", { class: "prose" });
  const error = el("div");
  const stats = el("span", { class: "stats" });
  const place = el("span", { class: "place" });
  const pager = el("span", { class: "pager" }, iconButton("back", "Previous answer", () => act.show(-1), { "data-run": true }),
    place, iconButton("forth", "Next answer", () => act.show(1), { "data-run": true }));
  const again = iconButton("again", "Another continuation", act.again, { "data-run": true });
  const actions = el("div", { class: "actions" }, copyButton(() => text.textContent),
    iconButton("edit", "Edit", () => edit(), { "data-run": true }), again, pager, stats);
  const root = el("article", { class: "turn document last" }, el("h2", { class: "unseen" }, "Text"), text, error, actions);
  const spans = messages.map((m) => el("span", { class: m.role === "assistant" ? "made" : "given" }));
  text.append(...spans);

  function edit() {
    const form = editor(text.textContent, "Continue", act.rewrite, () => form.replaceWith(text));
    text.replaceWith(form);
    form.querySelector("textarea").focus();
  }

  function update({ live }) {
    for (const [i, m] of messages.entries()) {
      const content = m.role === "assistant" ? m.answers[m.shown].content : m.content;
      const [node] = spans[i].childNodes;
      if (!node) spans[i].append(content);
      else if (content.length > node.length && content.startsWith(node.data)) node.appendData(content.slice(node.length));
      else if (content !== node.data) node.data = content;
    }
    const final = messages.at(-1);
    const answer = final?.role === "assistant" ? final.answers[final.shown] : null;
    again.hidden = !answer;
    pager.hidden = !answer || final.answers.length < 2;
    place.textContent = answer ? `${final.shown + 1}/${final.answers.length}` : "";
    stats.textContent = answer ? statistics(answer, live) : "";
    error.replaceChildren(...(answer?.error ? [errorBox(answer.error, act)] : []));
    root.classList.toggle("live", live);
    root.setAttribute("aria-busy", String(live));
  }
  return { root, edit, update };
}

/** What stands where a conversation will be. */
export function emptyState(model, completes, problem, retry) {
  if (problem) return [el("h2", {}, problem.kind === "key" ? "An API key is needed" : "No connection"), el("p", {}, problem.message),
    el("button", { type: "button", class: "strong", click: retry }, "Try again")];
  if (!model) return [];
  const facts = [model.context && `${count(model.context)} tokens of context`,
    !model.chat && "no chat template: it continues text"].filter(Boolean).join(" · ");
  return [el("h2", {}, model.id), el("p", {}, facts),
    el("p", { class: "faint" }, completes ? "Write the beginning of a text." : "Conversations are kept in this browser only.")];
}

export const contextLine = (used, context) => {
  $("context").textContent = !used ? "" : context ? `Context ${count(used)} of ${tokens(context)}` : tokens(used);
  $("context").classList.toggle("full", Boolean(context && used > 0.9 * context));
};
