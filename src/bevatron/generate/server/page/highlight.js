// Colours for code: comments, strings, numbers and words of the language. One regular expression per
// kind of language, every alternative of which takes linear time.

import { el } from "./dom.js";

const LONGEST = 60_000;
const STRING = /"(?:[^"\\\n]|\\[^])*"?|'(?:[^'\\\n]|\\[^])*'?/.source;
const NUMBER = /\b\d[\w.]*/.source;
const WORD = /[A-Za-z_$][\w$]*/.source;
const HASH = /#[^\n]*/.source;
const SLASH = /\/\/[^\n]*|\/\*[^]*?(?:\*\/|$)/.source;

const words = (text) => new Set(text.split(" "));
const PYTHON = words("False None True and as assert async await break case class continue def del elif else except " +
  "finally for from global if import in is lambda match nonlocal not or pass raise return try while with yield self");
const SHELL = words("if then else elif fi for while until do done case esac in function return export local set cd " +
  "echo source exec exit sudo");
const C = words("abstract as async auto await bool boolean break case catch char class const constexpr continue default " +
  "defer delete do double else enum export extends extern false final float fn for from func function go if impl " +
  "implements import in instanceof int interface let long match mod mut namespace new nil null nullptr of package " +
  "private protected pub public range return self short signed sizeof static struct super switch template this throw " +
  "trait true try type typedef typename typeof undefined unsigned use using var virtual void volatile where while yield");
const DATA = words("true false null yes no on off");
const SQL = words("select from where join left right inner outer on group by order having limit offset insert into values " +
  "update set delete create table drop alter as and or not null is in like between union all distinct case when then " +
  "else end primary key references index with");

const kind = (comment, keywords, strings = STRING, fold = false) =>
  ({ pattern: `(${comment})|(${strings})|(${NUMBER})|(${WORD})`, keywords, fold });
const KINDS = {
  python: kind(HASH, PYTHON, `"""[^]*?(?:"""|$)|'''[^]*?(?:'''|$)|${STRING}`),
  shell: kind(`(?<![^\\s])${HASH}`, SHELL),
  c: kind(SLASH, C, `${STRING}|\`(?:[^\`\\\\]|\\\\[^])*\`?`),
  rust: kind(SLASH, C, `"(?:[^"\\\\]|\\\\[^])*"?|'(?:[^'\\\\\\n]|\\\\.)'`), // 'a is a lifetime
  data: kind(`${HASH}|${SLASH}`, DATA),
  sql: kind(`--[^\\n]*|${SLASH}`, SQL, STRING, true),
};
const NAMES = {
  py: "python", python: "python", python3: "python", pycon: "python", bash: "shell", sh: "shell", shell: "shell",
  zsh: "shell", console: "shell", dockerfile: "shell", makefile: "shell", json: "data", yaml: "data", yml: "data",
  toml: "data", ini: "data", sql: "sql", rust: "rust", rs: "rust",
};
for (const name of ("c cpp c++ cc h hpp cuda cu java js javascript jsx ts typescript tsx go golang cs csharp kotlin " +
  "swift php scala zig").split(" ")) NAMES[name] = "c";
const CLASSES = ["", "comment", "string", "number"];

/** The nodes of `code`; plain text for an unknown language or very long code. */
export function highlight(code, language, budget) {
  const known = Object.hasOwn(NAMES, language) ? KINDS[NAMES[language]] : null;
  if (!known || code.length > LONGEST) return [code];
  const pattern = new RegExp(known.pattern, "g");
  const out = [];
  let at = 0;
  for (let found; budget.left > 0 && (found = pattern.exec(code)); ) {
    const [text] = found;
    if (!text) break;
    const word = known.fold ? text.toLowerCase() : text;
    const name = found[4] === undefined ? CLASSES[[1, 2, 3].find((i) => found[i] !== undefined)]
      : known.keywords.has(word) ? "keyword" : code[pattern.lastIndex] === "(" ? "call" : "";
    if (!name) continue;
    out.push(code.slice(at, found.index), el("span", { class: `x-${name}` }, text));
    budget.left -= 2;
    at = pattern.lastIndex;
  }
  out.push(code.slice(at));
  return out;
}
