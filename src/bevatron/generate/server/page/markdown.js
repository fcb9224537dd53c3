// Markdown as models write it, into nodes: headings, lists, tables, fenced code, quotes, paragraphs.
// Blocks are found line by line, so of a growing text only the last blocks are made anew.

import { copyButton, el } from "./dom.js";
import { highlight } from "./highlight.js";
import { inline } from "./inline.js";

const DEEP = 8; // lists and quotes inside of each other
const NODES = 40_000; // of one answer; what comes after them stays plain text

const FENCE = /^( {0,3})(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?: +(.*))?$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?:( {1,4})(?! )|( )|$)/;
const blank = (line) => line === undefined || !/\S/.test(line);
const indent = (line) => /^ */.exec(line)[0].length;
const rule = (line) => line.length < 200 && /^ {0,3}([-*_]) *(?:\1 *){2,}$/.test(line);

/** Shows a text that may grow in `root`. */
export class Markdown {
  constructor(root) {
    this.root = root;
    this.restart();
  }

  restart() {
    this.text = "";
    this.offset = 0; // of the text that is not yet settled,
    this.nodes = []; // whose nodes these are
    this.left = NODES;
    this.root.replaceChildren();
  }

  /** `open`: more will come. A text that does not continue the last one is made anew as a whole. */
  set(text, open = false) {
    if (!text.startsWith(this.text)) this.restart();
    this.text = text;
    const lines = text.slice(this.offset).split("\n").map(untabbed);
    const budget = { left: this.left };
    const fresh = [];
    let settled = 0;
    for (const block of blocks(lines, budget, 0, open)) {
      // The line that ended a block must itself be whole: "-" may become "- item" or "-5".
      if (block.end <= lines.length - 2) {
        settled = block.end;
        this.left = budget.left;
        block.settled = true;
      }
      fresh.push(block);
    }
    this.replace(fresh);
    this.nodes = fresh.filter((block) => !block.settled).map((block) => block.node);
    for (let i = 0; i < settled; i += 1) this.offset = text.indexOf("\n", this.offset) + 1;
  }

  /** New nodes for those of the last blocks; growing code keeps its element, scrolling and button. */
  replace(fresh) {
    const [old] = this.nodes;
    if (this.nodes.length === 1 && fresh.length && sameCode(old, fresh[0].node)) {
      old.querySelector("code").replaceChildren(...fresh[0].node.querySelector("code").childNodes);
      fresh[0].node = old;
    } else for (const node of this.nodes) node.remove();
    this.root.append(...fresh.map((block) => block.node));
  }
}

const sameCode = (a, b) => a.className === "code" && b.className === "code" && a.dataset.language === b.dataset.language;
const untabbed = (line) => line.replace(/\r$/, "").replace(/^[ \t]+/, (space) => space.replaceAll("\t", "    "));

/** The blocks of `lines`: {node, end}, `end` being the line after it. */
function* blocks(lines, budget, depth, open) {
  for (let i = 0; i < lines.length; ) {
    if (blank(lines[i])) {
      i += 1;
      continue;
    }
    budget.left -= 2;
    if (budget.left <= 0) {
      yield { node: el("p", { class: "plain" }, lines.slice(i).join("\n")), end: lines.length };
      return;
    }
    const nested = () => quote(lines, i, budget, depth, open) ?? list(lines, i, budget, depth, open);
    const block = fence(lines, i, budget) ?? indented(lines, i) ?? heading(lines, i, budget, open) ??
      table(lines, i, budget) ?? (depth < DEEP ? nested() : null) ?? paragraph(lines, i, budget, depth, open);
    yield block;
    i = block.end;
  }
}

const children = (lines, budget, depth, open) =>
  Array.from(blocks(lines, budget, depth + 1, open), (block) => block.node);

/** Whether line `i` ends a paragraph before it. */
function interrupts(lines, i, depth) {
  const line = lines[i];
  if (blank(line) || FENCE.test(line) || HEADING.test(line) || rule(line)) return true;
  if (depth < DEEP) {
    if (QUOTE.test(line)) return true;
    const item = ITEM.exec(line);
    if (item && (item[3] || item[4]) && (!/\d/.test(item[2]) || /^0*1[.)]/.test(item[2]))) return true;
  }
  return aligned(lines, i) !== null;
}

function fence(lines, i, budget) {
  const start = FENCE.exec(lines[i]);
  if (!start) return null;
  const [, space, mark, info] = start;
  let end = i + 1;
  const closes = (line) => {
    const text = line.trim();
    return text.length >= mark.length && text[0] === mark[0] && indent(line) < 4 && text === mark[0].repeat(text.length);
  };
  while (end < lines.length && !closes(lines[end])) end += 1;
  const code = lines.slice(i + 1, end).map((line) => line.slice(Math.min(indent(line), space.length)));
  return { node: codeBlock(code.join("\n"), info.trim().split(/\s/)[0].slice(0, 30), budget), end: Math.min(end + 1, lines.length) };
}

function indented(lines, i) {
  if (indent(lines[i]) < 4) return null;
  let end = i + 1;
  for (let k = end; k < lines.length && (blank(lines[k]) || indent(lines[k]) >= 4); k += 1) {
    if (!blank(lines[k])) end = k + 1;
  }
  return { node: codeBlock(lines.slice(i, end).map((line) => line.slice(4)).join("\n"), "", { left: 0 }), end };
}

export function codeBlock(code, language, budget) {
  const body = el("code", {}, ...highlight(code, language.toLowerCase(), budget));
  budget.left -= 16;
  const bar = el("div", { class: "bar" }, el("span", {}, language || "text"),
    copyButton(() => body.textContent, "Copy code"));
  return el("div", { class: "code", "data-language": language }, bar, el("pre", { tabindex: "0" }, body));
}

function heading(lines, i, budget, open) {
  if (rule(lines[i])) return { node: el("hr"), end: i + 1 };
  const found = HEADING.exec(lines[i]);
  if (!found) return null;
  let text = (found[2] ?? "").trimEnd();
  let end = text.length;
  while (text[end - 1] === "#") end -= 1;
  if (end === 0 || text[end - 1] === " ") text = text.slice(0, end).trimEnd();
  // The page's own heading is h1 and each answer's h2.
  const level = Math.min(found[1].length + 2, 6);
  const node = el(`h${level}`, { class: `h${found[1].length}` });
  node.append(...inline(text, budget, open && i === lines.length - 1));
  return { node, end: i + 1 };
}

function quote(lines, i, budget, depth, open) {
  if (!QUOTE.test(lines[i])) return null;
  let end = i + 1;
  while (end < lines.length && (QUOTE.test(lines[end]) || !interrupts(lines, end, depth))) end += 1;
  const inside = lines.slice(i, end).map((line) => line.replace(QUOTE, ""));
  const node = el("blockquote");
  node.append(...children(inside, budget, depth, open && end === lines.length));
  return { node, end };
}

function list(lines, i, budget, depth, open) {
  const first = ITEM.exec(lines[i]);
  if (!first) return null;
  const kind = first[2].at(-1);
  const ordered = kind === "." || kind === ")";
  const start = ordered ? parseInt(first[2], 10) : 1;
  const node = el(ordered ? "ol" : "ul", { start: start !== 1 && start });
  let end = i;
  for (let item = first; item && item[2].at(-1) === kind && !rule(lines[end]); item = ITEM.exec(lines[end] ?? "")) {
    const width = item[0].length + (item[3] || item[4] ? 0 : 1);
    // Models indent what is inside of "1. " by two as often as by three.
    const inner = item[1].length + 2;
    const inside = [lines[end].slice(width)];
    let gap = 0;
    for (end += 1; end < lines.length; end += 1) {
      const line = lines[end];
      if (blank(line)) {
        gap += 1;
        continue;
      }
      const space = indent(line);
      const nested = space >= width || (space >= inner && ITEM.test(line.slice(inner)));
      if (!nested && (gap || interrupts(lines, end, depth) || ITEM.test(line))) break;
      for (; gap; gap -= 1) inside.push("");
      inside.push(line.slice(Math.min(space, width)));
    }
    const last = end === lines.length;
    if (gap && !last && ITEM.exec(lines[end])?.[2].at(-1) === kind) node.classList.add("loose");
    budget.left -= 1;
    node.append(el("li", {}, ...children(tasked(inside), budget, depth, open && last)));
    if (budget.left <= 0) break;
  }
  return { node, end };
}

function tasked(lines) {
  lines[0] = lines[0].replace(/^\[([ xX])\] /, (_, x) => (x === " " ? "☐ " : "☑ "));
  return lines;
}

/** The columns' alignments when a table starts at line `i`, otherwise null. */
function aligned(lines, i) {
  const marks = lines[i + 1];
  if (marks === undefined || !lines[i].includes("|") || !marks.includes("-") || !/^[|:\- ]+$/.test(marks)) return null;
  const cells = row(marks);
  if (!cells.every((cell) => /^:?-+:?$/.test(cell)) || cells.length !== row(lines[i]).length) return null;
  return cells.map((c) => (c.endsWith(":") ? (c.startsWith(":") ? "center" : "right") : "left"));
}

/** The cells of a row; a pipe after a backslash or in code does not part them. */
function row(line) {
  const cells = [];
  let cell = "";
  for (const [part] of line.trim().matchAll(/\\[^]|`[^`]*`|[|]|[^\\`|]+|`/g)) {
    if (part !== "|") cell += part === "\\|" ? "|" : part;
    else {
      cells.push(cell);
      cell = "";
    }
  }
  if (cells.length && !cells[0].trim()) cells.shift();
  if (cell.trim() || !cells.length) cells.push(cell);
  return cells.map((text) => text.trim());
}

function table(lines, i, budget) {
  const columns = aligned(lines, i);
  if (!columns) return null;
  const cells = (tag, line) => {
    const texts = row(line);
    return el("tr", {}, ...columns.map((side, k) => {
      budget.left -= 2;
      const cell = el(tag, { class: side, scope: tag === "th" && "col" });
      cell.append(...inline(texts[k] ?? "", budget));
      return cell;
    }));
  };
  const body = el("tbody");
  const head = el("thead", {}, cells("th", lines[i]));
  let end = i + 2;
  for (; end < lines.length && !blank(lines[end]) && lines[end].includes("|") && budget.left > 0; end += 1) {
    body.append(cells("td", lines[end]));
  }
  return { node: el("div", { class: "table", tabindex: "0", role: "group", "aria-label": "Table" },
    el("table", {}, head, body)), end };
}

function paragraph(lines, i, budget, depth, open) {
  let end = i + 1;
  while (end < lines.length && !interrupts(lines, end, depth)) end += 1;
  const node = el("p");
  const text = lines.slice(i, end).map((line) => line.trim()).join("\n");
  node.append(...inline(text, budget, open && end === lines.length));
  return { node, end };
}
