// The server's routes, OpenAI's. Addresses are relative, so the page also works behind a proxy's path.

/** A failure in words for the reader. `kind`: "key", "busy", "network", "server" or "request". */
export class ApiError extends Error {
  constructor(kind, message, code = null) {
    super(message);
    this.kind = kind;
    this.code = code;
  }
}

// For this tab only: another program may have this port, and so this origin, tomorrow.
export const key = {
  get: () => sessionStorage.getItem("bevatron.key") ?? "",
  set: (text) => sessionStorage.setItem("bevatron.key", text),
};

async function request(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, credentials: "same-origin", cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("network", "The server cannot be reached. Is it still running?");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch { /* a proxy's page, or nothing */ }
  const said = typeof error.message === "string" ? error.message : "";
  const { status } = response;
  if (status === 401) {
    return new ApiError("key", key.get() ? "The server does not accept this key." : "This server asks for an API key.");
  }
  if (status === 429) return new ApiError("busy", said || "The server is busy. Try again in a moment.");
  if (status >= 500) return new ApiError("server", said || `The server failed (status ${status}).`);
  return new ApiError("request", said || `The server refused this (status ${status}).`, error.code ?? null);
}

/**
 * [{id, chat, context, sampling}]; `chat` is false for a model without a chat template; `sampling` is
 * what the server takes for settings that a request does not have.
 */
export async function models() {
  const { data } = await (await request("v1/models")).json();
  return data.map(({ id, chat, context, sampling }) =>
    ({ id, chat: chat !== false, context: Number(context) || null, sampling: sampling ?? {} }));
}

/**
 * Yields the events of an answer: {text}, {reasoning}, {calls}, {finish}, {usage}. `body` has either
 * messages or a prompt. Ends normally only after the server said that the answer is complete.
 */
export async function* answer(body, signal) {
  const path = body.messages ? "v1/chat/completions" : "v1/completions";
  const payload = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await request(path, { method: "POST", body: JSON.stringify(payload), signal });
  let finished = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    let chunk;
    try {
      chunk = JSON.parse(data);
    } catch {
      throw new ApiError("server", "The server sent something that is not an answer.");
    }
    if (chunk.error) throw new ApiError("server", String(chunk.error.message ?? "The server failed while it answered."));
    const choice = chunk.choices?.[0];
    const delta = choice?.delta ?? {};
    const text = choice?.text ?? delta.content;
    if (text) yield { text };
    if (delta.reasoning_content) yield { reasoning: delta.reasoning_content };
    if (delta.tool_calls) yield { calls: delta.tool_calls };
    if (choice?.finish_reason) {
      finished = true;
      yield { finish: choice.finish_reason };
    }
    if (chunk.usage) yield { usage: chunk.usage };
  }
  if (!finished) throw new ApiError("network", "The connection ended before the answer did.");
}

/** The data of server-sent events, whatever pieces the network cuts them into. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      let read;
      try {
        read = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ApiError("network", "The connection to the server was lost.");
      }
      if (read.done) return;
      const lines = (rest + read.value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        const text = line.endsWith("\r") ? line.slice(0, -1) : line;
        if (text.startsWith("data:")) data.push(text.slice(text[5] === " " ? 6 : 5));
        else if (!text && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // hang up: the server stops at once
  }
}
