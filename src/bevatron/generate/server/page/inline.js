// Markdown inside of a paragraph: code, bold, italic, struck out, links. Text is untrusted: nodes are
// made of names written here and of text; addresses are http or https; nothing is fetched.
//
// One pass from left to right. Openers wait on a stack of at most DEEP, of which the oldest is
// forgotten, so hostile text costs linear time and cannot nest deeper than the stack.

import { el } from "./dom.js";

const DEEP = 20;
const LONG = 3; // a longer run of * or _ is a line of stars, not emphasis
const SPECIAL = /\\[!-'*-/:-@^_`|~]|`+|\*+|_+|~+|!?\[|\]|<(?:br ?\/?>|https?:\/\/)|\bhttps?:\/\/|\n/g;
const ADDRESS = /https?:\/\/[^\s<>`"[\]{}|\\^]+/y;
const TITLE = /[ \t]+"[^"\]\n]*"/y;
const MARK = /[\p{P}\p{S}]/u;

/**
 * The nodes of `text`. `open`: more text will come, so what is half written is shown as if closed.
 * `budget.left`: how many nodes may still be made; without one the rest stays text as it is.
 */
export function inline(text, budget, open = false) {
  const out = [];
  const stack = []; // {mark, size, both, at}: `at` is the place in `out` of the opener's own text
  let held = "";
  let runs = null;

  const flush = () => {
    if (held) out.push(document.createTextNode(held));
    held = "";
  };
  const put = (node) => {
    budget.left -= 2;
    flush();
    out.push(node);
  };
  const push = (mark, source, size, both) => {
    flush();
    budget.left -= 1;
    out.push(document.createTextNode(source));
    stack.push({ mark, size, both, at: out.length - 1 });
    if (stack.length > DEEP) stack.shift();
  };
  const wrap = (node, k) => {
    flush();
    budget.left -= 2;
    const { at } = stack[k];
    node.append(...drain(out, at + 1));
    out.push(node);
    return node;
  };
  const closes = (opener, mark, size, both) =>
    opener.mark === mark &&
    (mark !== "~" || size === opener.size) &&
    (!(both || opener.both) || (opener.size + size) % 3 !== 0 || (size % 3 === 0 && opener.size % 3 === 0));

  function emphasis(source, start) {
    const mark = source[0];
    let size = source.length;
    if (size > LONG || (mark === "~" && size !== 2)) {
      held += source;
      return;
    }
    const before = text[start - 1] ?? " ";
    const after = text[start + size] ?? (open ? "x" : " ");
    const left = !/\s/.test(after) && (!MARK.test(after) || /\s/.test(before) || MARK.test(before));
    const right = !/\s/.test(before) && (!MARK.test(before) || /\s/.test(after) || MARK.test(after));
    const opens = left && (mark !== "_" || !right || MARK.test(before));
    const shuts = right && (mark !== "_" || !left || MARK.test(after));
    while (shuts && size > 0) {
      const k = stack.findLastIndex((o) => closes(o, mark, size, opens && shuts));
      if (k < 0) break;
      const opener = stack[k];
      const used = Math.min(size, opener.size, 2);
      wrap(el(mark === "~" ? "del" : used === 2 ? "strong" : "em"), k);
      opener.size -= used;
      out[opener.at].data = mark.repeat(opener.size);
      stack.length = opener.size ? k + 1 : k;
      size -= used;
    }
    if (!size) return;
    if (opens) push(mark, mark.repeat(size), size, shuts);
    else held += mark.repeat(size);
  }

  /** Code up to the next run of as many backticks; -1 when there is none. */
  function code(source, start) {
    const from = start + source.length;
    runs ??= backticks(text);
    const places = runs.get(source.length) ?? [];
    while (places.length && places.at(-1) < from) places.pop();
    let end = places.at(-1);
    if (end === undefined && !(open && source.length < 3 && /\S/.test(text[from] ?? ""))) return -1;
    end ??= text.length;
    let inside = text.slice(from, end).replaceAll("\n", " ");
    if (inside.length > 2 && inside.startsWith(" ") && inside.endsWith(" ")) inside = inside.slice(1, -1);
    put(el("code", {}, inside));
    return end + source.length;
  }

  /** `](address "title")` closes the nearest bracket; the place after it, or -1. */
  function link(start) {
    const k = stack.findLastIndex((o) => o.mark === "[");
    if (k < 0) return -1;
    const address = text[start + 1] === "(" ? addressAt(text, start + 2) : "";
    let end = start + 2 + address.length;
    TITLE.lastIndex = end;
    if (address && TITLE.test(text)) end = TITLE.lastIndex;
    const node = text[end] === ")" ? anchor(address) : null;
    if (!node) {
      stack.splice(k, 1);
      return -1;
    }
    const opener = stack[k];
    wrap(node, k);
    for (const inner of node.querySelectorAll("a")) inner.replaceWith(inner.textContent);
    out[opener.at].data = "";
    stack.length = k;
    for (let i = k - 1; i >= 0; i -= 1) if (stack[i].mark === "[") stack.splice(i, 1); // no link in a link
    if (!node.textContent.trim()) node.append(address);
    else showHost(node);
    return end + 1;
  }

  let at = 0;
  const special = new RegExp(SPECIAL);
  for (let found; (found = special.exec(text)); special.lastIndex = at) {
    if (budget.left <= 0) break;
    const [source] = found;
    const start = found.index;
    held += text.slice(at, start);
    at = start + source.length;
    let next = -1;
    if (source[0] === "\\") held += source[1];
    else if (source === "\n") {
      put(el("br"));
      while (text[at] === " ") at += 1;
    } else if ("*_~".includes(source[0])) emphasis(source, start);
    else if (source.endsWith("[")) push("[", source, 1, false);
    else if (source[0] === "`") next = code(source, start);
    else if (source === "]") next = link(start);
    else if (source.startsWith("<br")) put(el("br"));
    else {
      const from = source[0] === "<" ? start + 1 : start;
      const address = addressAt(text, from, true);
      const node = address && anchor(address);
      if (node) {
        node.append(address);
        showHost(node);
        put(node);
        next = from + address.length + (source[0] === "<" && text[from + address.length] === ">");
      }
    }
    if (next >= 0) at = next;
    else if (source[0] === "`" || source === "]" || source.endsWith("//")) held += source;
  }
  held += text.slice(at);
  if (open) {
    for (let k = stack.length - 1; k >= 0; k -= 1) {
      if (stack[k].mark !== "*" || stack[k].size !== 2) continue;
      wrap(el("strong"), k);
      out[stack[k].at].data = "";
    }
  }
  flush();
  return out;
}

/** Take `list[from..]` off the list. (No spread into splice: lists can be long.) */
function* drain(list, from) {
  const taken = list.slice(from);
  list.length = from;
  yield* taken;
}

/** Where the runs of backticks start, by their length, the first one last. */
function backticks(text) {
  const runs = new Map();
  for (const { 0: run, index } of text.matchAll(/`+/g)) {
    if (!runs.has(run.length)) runs.set(run.length, []);
    runs.get(run.length).push(index);
  }
  for (const places of runs.values()) places.reverse();
  return runs;
}

/** The http(s) address at `from`, up to a bracket that was not opened in it; "" when there is none. */
function addressAt(text, from, bare = false) {
  ADDRESS.lastIndex = from;
  let address = ADDRESS.exec(text)?.[0] ?? "";
  let depth = 0;
  for (let i = 0; i < address.length; i += 1) {
    if (address[i] === "(") depth += 1;
    else if (address[i] === ")" && --depth < 0) address = address.slice(0, i);
  }
  let end = address.length;
  while (bare && end && ".,;:!?'*_~".includes(address[end - 1])) end -= 1;
  return address.slice(0, end);
}

function anchor(address) {
  if (!URL.canParse(address) || !/^https?:$/.test(new URL(address).protocol)) return null;
  return el("a", { href: address, target: "_blank", rel: "noopener noreferrer", title: address });
}

/** A link must not look like it leads elsewhere: its host stands beside its words. */
function showHost(node) {
  const { host, username, href } = new URL(node.href);
  const words = node.textContent;
  if (!username && (words === href || words === node.getAttribute("href") || words === host)) return;
  node.append(el("small", { class: "host" }, host));
}
