// The server that this page came from: /kasa/v1 for adapters, /v1 for answers. A failure is an
// ApiError with the server's own words.

const TOKEN = "kasa-token";

export class ApiError extends Error {
  /** `status` 0: no answer came. */
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// Kept for this tab alone, and gone with it.
export const token = () => sessionStorage.getItem(TOKEN) ?? "";
export const setToken = (value) =>
  value ? sessionStorage.setItem(TOKEN, value) : sessionStorage.removeItem(TOKEN);

const headers = () => (token() ? { authorization: `Bearer ${token()}` } : {});

export const adapterPath = (name, action = "") =>
  `/kasa/v1/adapters/${encodeURIComponent(name)}${action}`;

/** The JSON that a path answers with; null where it answers with nothing. */
export async function call(method, path) {
  const response = await request(path, { method, headers: headers() });
  return response.status === 204 ? null : response.json();
}

/** The events of a stream of /v1, as they come. Leaving the loop closes it. */
export async function* stream(path, body, signal) {
  const response = await request(path, {
    method: "POST",
    headers: { ...headers(), "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } }),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new ApiError(0, "the answer was cut off");
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new ApiError(200, event.error.message);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Uploads files as an adapter; `progress` is called with 0 to 1. Aborts with `signal`. */
export function upload(name, files, progress, signal) {
  // Not with fetch, which does not tell how much has been sent.
  return new Promise((resolve, reject) => {
    const sending = new XMLHttpRequest();
    const form = new FormData();
    for (const file of files) form.append("file", file, file.name);
    sending.open("PUT", adapterPath(name));
    for (const [key, value] of Object.entries(headers())) sending.setRequestHeader(key, value);
    sending.upload.onprogress = (event) => progress(event.loaded / event.total);
    sending.onload = () => {
      const good = sending.status < 300;
      if (good) resolve(JSON.parse(sending.responseText));
      else reject(new ApiError(sending.status, messageOf(sending.responseText, sending.status)));
    };
    sending.onerror = () => reject(new ApiError(0, "the connection broke during the upload"));
    sending.onabort = () => reject(new DOMException("stopped", "AbortError"));
    signal.addEventListener("abort", () => sending.abort());
    sending.send(form);
  });
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "the server does not answer");
  }
  if (!response.ok) throw new ApiError(response.status, messageOf(await response.text(), response.status));
  return response;
}

function messageOf(text, status) {
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `the server answered with status ${status}`;
  }
}
