/**
 * Longhaul's runs and threads, in a browser or in Node (18 or newer): one module, no dependencies.
 *
 *     const thread = openThread({ baseUrl: "/api", thread: id });    // what an interface shows, kept up to date
 *     thread.subscribe((state) => render(state.messages));
 *     thread.send("Where is order 1042?");
 *
 *     for await (const event of streamRun({ baseUrl, apiKey, run: id })) ...   // the log itself, every event once
 *
 * From below to above: errors, requests, frames, the connection that comes back, the two streams, the fold of a log, the
 * pace of text, the thread. The rules are those of Longhaul's `docs/streams.md`.
 */

/** @typedef {"held" | "queued" | "running" | "waiting" | "requires_action" | "completed" | "failed" | "cancelled"} RunStatus */
/** @typedef {"waiting" | "pending" | "completed" | "partial" | "discarded" | "superseded" | "rolled_back"} SavedStatus */

/**
 * One event of a log. Which fields there are beside these, its type says. A `resume_gap` has `from` and `to`, and no `seq`.
 * @typedef {{ type: string, seq: number, run: string, at: string, from_seq?: number, [field: string]: any }} RunEvent
 */

/**
 * A run, as the API shows it.
 * @typedef {{
 *   id: string, thread: string, agent: string, status: RunStatus, stop_reason: string | null, why: string,
 *   error: Problem | null, output: any, last_seq: number, [field: string]: any,
 * }} Run
 */

/** @typedef {{ code: string, message: string, retryable?: boolean, [field: string]: any }} Problem */

/**
 * One part of what a message says: `text` and `reasoning` have a text, `tool_call` and `tool_result` name their call.
 * @typedef {{ readonly type: string, readonly text?: string, readonly [field: string]: any }} Part
 */

/**
 * A message. `key` stays the same from the moment of `send` on, also when the saved message takes the place of the one that was
 * shown at once. That one has the status `sending`, then `sent`, or `failed` with an `error`.
 * @typedef {object} MessageFields
 * @property {string} key for lists: stays the same for as long as the message is shown
 * @property {string} id
 * @property {"user" | "assistant" | "tool" | "system"} role
 * @property {SavedStatus | "sending" | "sent" | "failed"} status
 * @property {readonly Part[]} content
 * @property {string | null} run
 * @property {number | null} step
 * @property {string | null} client_id
 * @property {Readonly<Record<string, any>>} metadata
 * @property {string} created_at RFC 3339
 * @property {boolean} shown false: said by a run that its thread does not show, as with `save: "none"`
 * @property {LonghaulError} [error] why it could not be sent
 */
/** @typedef {Readonly<MessageFields>} Message */

/**
 * @typedef {"requested" | "awaiting_approval" | "running" | "retrying" | "awaiting_result" | "awaiting_child" | "unknown"
 *   | "settled"} CallStatus
 */

/**
 * A tool call, as the last event about it left it.
 * @typedef {object} ToolCallFields
 * @property {string} id
 * @property {string} name
 * @property {string} message the message that asked for it
 * @property {string | null} run
 * @property {CallStatus} status
 * @property {any} [arguments] once they are complete
 * @property {string} [argumentsText] while they come
 * @property {string} [outcome] of a settled one: success, failed, denied, cancelled
 * @property {any} [result] as the model read it: a long one is cut, with a note, and a file is described
 * @property {any} [stored] what of it stands apart, to be had whole at /api/tool-calls/ID/content
 * @property {any} [error]
 * @property {string} [by] who answered it in place of its worker
 * @property {number} [attempt]
 * @property {number} [fraction] how far it is, from 0 to 1
 * @property {string} [note]
 */
/** @typedef {Readonly<ToolCallFields>} ToolCall */

/** @typedef {string | readonly Part[]} Input */
/** @typedef {Record<string, string> | Headers | [string, string][]} HeadersGiven */

/**
 * How long to wait, and for what. Times are milliseconds.
 * @typedef {object} Patience
 * @property {number} baseMs the wait after a first failure is drawn from 0 to this; each further one doubles it. Default 500
 * @property {number} maxMs at most. Default 15,000
 * @property {number} stallMs a stream without a byte for so long is dead: pings come every 15 s. Default 40,000
 * @property {number} answerMs for the head of an answer, or a whole one that is no stream. Default 30,000
 * @property {number} tries of a request that is no stream. Default 5
 * @property {number} streamTries failures in a row, without an event in between, until a stream gives up. Default Infinity
 */

/**
 * Where the API is, and who asks.
 * @typedef {object} ApiOptions
 * @property {string} [baseUrl] of the API, `https://host/api`. Default: `/api` of the page
 * @property {string | (() => string | Promise<string>)} [apiKey] `lh_...`. A function is asked before each request
 * @property {HeadersGiven | (() => HeadersGiven | Promise<HeadersGiven>)} [headers] sent with each request
 * @property {RequestCredentials} [credentials] of `fetch`. Default: `same-origin`, so a session's cookie is sent to its own site
 * @property {string | false} [csrfCookie] its value goes into `X-CSRFToken`, to the page's own site. Default `csrftoken`
 * @property {typeof globalThis.fetch} [fetch] in place of the global one
 * @property {AbortSignal} [signal] ends all that was begun with these options
 * @property {Partial<Patience>} [patience]
 */

/** @type {Patience} */
const PATIENCE = { baseMs: 500, maxMs: 15_000, stallMs: 40_000, answerMs: 30_000, tries: 5, streamTries: Infinity };
const PATIENT_MS = 60_000; // a request whose server asks for a longer wait is told so
const LONGEST_MS = 3_600_000; // of a Retry-After; engines take a timer beyond 24 days for one of no time
const MOST_CHARACTERS = 64 * 1024 * 1024; // of one frame: one without an end is none
const TERMINAL = new Set(["run.completed", "run.failed", "run.cancelled"]);
/** @type {Set<string>} */
const ENDED = new Set(["completed", "failed", "cancelled"]);

// --- errors ---------------------------------------------------------------------------------------------------------

/**
 * What went wrong. None of the messages holds a key, a header or an address.
 *
 *     LonghaulError
 *     ├── Refused          the server said no: status, code, detail
 *     ├── ConnectionLost   no answer, or half of one; code: connection_lost, timed_out, stalled, unexpected_answer
 *     └── LogGap           the log goes on behind what comes next: from, to
 */
export class LonghaulError extends Error {
  /**
   * @param {string} detail
   * @param {string} code
   * @param {number} status of the answer; 0 when there was none
   */
  constructor(detail, code, status = 0) {
    super(detail);
    this.name = new.target.name;
    this.detail = detail;
    this.code = code;
    this.status = status;
  }
}

/** The server refused the request. `errors` is all that it said, each with `code`, `detail` and the field it is about. */
export class Refused extends LonghaulError {
  /**
   * @param {number} status
   * @param {readonly { code: string, detail: string, attr: string | null }[]} errors
   * @param {number | null} retryAfterMs what its Retry-After asks for
   */
  constructor(status, errors, retryAfterMs = null) {
    super(errors[0]?.detail ?? `The server answered ${status}.`, errors[0]?.code ?? `http_${status}`, status);
    this.errors = errors;
    this.retryAfterMs = retryAfterMs;
  }

  /** Whether the same request may be answered otherwise a little later. */
  get passing() {
    if (this.status === 409) return this.code === "idempotency_conflict"; // the first one under our key has just failed
    return [408, 425, 429].includes(this.status) || (this.status >= 500 && this.status !== 501);
  }
}

/** There was no answer, or it broke off. */
export class ConnectionLost extends LonghaulError {
  constructor(detail = "The connection was lost.", code = "connection_lost", status = 0) {
    super(detail, code, status);
  }
}

/** Events were removed from the log, or are missing. Load the messages again, and stream from their cursor. */
export class LogGap extends LonghaulError {
  /**
   * @param {number} from
   * @param {number} to
   */
  constructor(from, to) {
    super(`The events ${from} to ${to} are not there any more.`, "log_gap");
    this.from = from;
    this.to = to;
  }
}

/** @returns {LonghaulError} */
const closed = () => new LonghaulError("This was closed.", "closed");

// --- requests -------------------------------------------------------------------------------------------------------

/**
 * @typedef {object} Asked
 * @property {any} [body] sent as JSON
 * @property {string} [idempotencyKey]
 * @property {string} [lastEventId]
 * @property {boolean} [stream] the answer is read by whoever asks: only its head is waited for
 * @property {AbortSignal} [signal]
 */

/** The requests to one API. */
class Api {
  /** @param {ApiOptions} options */
  constructor(options) {
    this.options = options;
    /** @type {Patience} */
    this.patience = { ...PATIENCE, ...options.patience };
    this.base = (options.baseUrl ?? "/api").replace(/\/+$/, "");
  }

  /**
   * Ask once. Raises Refused, ConnectionLost; LonghaulError `closed` when the signal is aborted.
   * @param {string} method
   * @param {string} path below the base, with its query
   * @param {Asked} asked
   * @returns {Promise<Response>}
   */
  async ask(method, path, asked = {}) {
    const { signal } = asked;
    const url = `${this.base}/${path}`;
    const headers = await this.#headers(method, url, asked);
    if (signal?.aborted) throw closed();
    const attempt = new AbortController();
    const abort = () => attempt.abort();
    signal?.addEventListener("abort", abort);
    let late = false;
    const timer = setTimeout(() => {
      late = true;
      attempt.abort();
    }, this.patience.answerMs);
    let streams = false;
    try {
      const send = this.options.fetch ?? globalThis.fetch;
      const response = await send(url, {
        method,
        headers,
        body: asked.body === undefined ? undefined : JSON.stringify(asked.body),
        credentials: this.options.credentials ?? "same-origin",
        cache: "no-store",
        redirect: "manual", // a key stays with its server, and a POST is not to become a GET
        signal: attempt.signal,
      });
      if (response.type === "opaqueredirect" || (response.status >= 300 && response.status < 400)) {
        attempt.abort(); // nobody reads its body
        const detail = "The server leads elsewhere: is this the address of the API?";
        throw new Refused(response.status, [{ code: "redirected", detail, attr: null }]);
      }
      if (!response.ok) throw await refusal(response);
      if (asked.stream) {
        streams = true;
        return response;
      }
      // Read here, while the timer runs.
      const body = response.status === 204 ? null : await response.arrayBuffer();
      return new Response(body, { status: response.status, headers: response.headers });
    } catch (error) {
      if (error instanceof LonghaulError) throw error;
      if (signal?.aborted) throw closed();
      // The cause is left out: engines put headers and addresses into its message.
      if (late) throw new ConnectionLost("The server did not answer in time.", "timed_out");
      throw new ConnectionLost();
    } finally {
      clearTimeout(timer);
      // A stream is ended by its reader, which hears the same signal.
      signal?.removeEventListener("abort", abort);
      if (streams) signal?.addEventListener("abort", abort, { once: true });
    }
  }

  /**
   * Ask until there is an answer: what has failed in passing is tried again. For requests that may come twice.
   * @param {string} method
   * @param {string} path
   * @param {Asked} asked
   * @param {number} tries
   * @returns {Promise<any>} the answer's JSON
   */
  async json(method, path, asked = {}, tries = this.patience.tries) {
    const signal = asked.signal ?? this.options.signal;
    const backoff = new Backoff(this.patience);
    for (;;) {
      try {
        const response = await this.ask(method, path, { ...asked, signal });
        if (response.status === 204) return null;
        try {
          return await response.json();
        } catch {
          throw new ConnectionLost("The answer is not JSON: is this the address of the API?", "unexpected_answer");
        }
      } catch (error) {
        const asked = error instanceof Refused ? error.retryAfterMs : null;
        // What an answer that was lost has deleted is not there any more.
        if (method === "DELETE" && backoff.failures && error instanceof Refused && error.status === 404) return null;
        const late = (asked ?? 0) > PATIENT_MS && tries < Infinity; // say so, rather than wait without a word
        if (!passes(error) || late || backoff.failures + 1 >= this.bound(error, tries)) throw error;
        await backoff.wait(error, signal);
      }
    }
  }

  /**
   * How often to try, after this. A wrong address answers, too, and a key may stand for another request: that must be told in
   * the end.
   * @param {unknown} error
   * @param {number} tries
   */
  bound(error, tries) {
    const wrong = error instanceof LonghaulError && ["unexpected_answer", "idempotency_conflict"].includes(error.code);
    return wrong ? Math.min(tries, this.patience.tries) : tries;
  }

  /**
   * @param {string} method
   * @param {string} url
   * @param {Asked} asked
   * @returns {Promise<Headers>}
   */
  async #headers(method, url, asked) {
    const { apiKey, headers: given, csrfCookie = "csrftoken" } = this.options;
    const key = typeof apiKey === "function" ? await apiKey() : apiKey;
    const more = typeof given === "function" ? await given() : given;
    let headers;
    try {
      headers = new Headers(more);
      if (key) headers.set("Authorization", `Bearer ${key}`);
    } catch {
      // The engine's own message quotes the value.
      throw new LonghaulError("The key, or a header, has characters that no header may have.", "bad_header");
    }
    headers.set("Accept", asked.stream ? "text/event-stream" : "application/json");
    if (asked.body !== undefined) headers.set("Content-Type", "application/json");
    if (asked.idempotencyKey) headers.set("Idempotency-Key", asked.idempotencyKey);
    if (asked.lastEventId) headers.set("Last-Event-ID", asked.lastEventId);
    if (method !== "GET" && csrfCookie && !headers.has("Authorization")) {
      const token = ownCookie(url, csrfCookie);
      if (token && !headers.has("X-CSRFToken")) headers.set("X-CSRFToken", token);
    }
    return headers;
  }
}

/**
 * Return a cookie of this page, for a request to its own site only.
 * @param {string} url
 * @param {string} name
 */
function ownCookie(url, name) {
  if (typeof document === "undefined" || new URL(url, document.baseURI).origin !== location.origin) return null;
  for (const pair of document.cookie.split("; ")) {
    const [key, ...value] = pair.split("=");
    if (key === name) return decodeURIComponent(value.join("="));
  }
  return null;
}

/**
 * @param {Response} response
 * @returns {Promise<Refused>}
 */
async function refusal(response) {
  /** @type {any} */
  let told = null;
  try {
    told = await response.json();
  } catch {
    // A proxy's page, or nothing.
  }
  const errors = Array.isArray(told?.errors) ? told.errors : [];
  return new Refused(response.status, errors, retryAfter(response.headers.get("Retry-After")));
}

/**
 * Return how many milliseconds a Retry-After asks for: seconds, or a date.
 * @param {string | null} value
 */
function retryAfter(value) {
  if (!value) return null;
  const found = /^\d+$/.test(value.trim()) ? Number(value) * 1000 : Date.parse(value) - Date.now();
  return Number.isNaN(found) ? null : Math.min(Math.max(found, 0), LONGEST_MS);
}

/** @param {unknown} error */
const passes = (error) => error instanceof ConnectionLost || (error instanceof Refused && error.passing);

/**
 * How long to wait after failures: drawn from 0 to a bound that doubles, so that a thousand readers that lost their server at
 * once do not come back at once. `reset` when something went right.
 */
export class Backoff {
  /**
   * @param {Pick<Patience, "baseMs" | "maxMs">} patience
   * @param {() => number} random
   */
  constructor(patience, random = Math.random) {
    this.patience = patience;
    this.random = random;
    this.failures = 0;
  }

  reset() {
    this.failures = 0;
  }

  /**
   * Count a failure; return the milliseconds until the next try. What a Retry-After asked for counts in any case.
   * @param {number | null} asked
   */
  next(asked = null) {
    this.failures += 1;
    const bound = Math.min(this.patience.baseMs * 2 ** (this.failures - 1), this.patience.maxMs);
    return (asked ?? 0) + this.random() * bound;
  }

  /**
   * Wait so long. A page that is shown again, or online again, waits no more, unless a server has asked it to.
   * @param {unknown} error what has failed
   * @param {AbortSignal | undefined} signal
   */
  async wait(error, signal) {
    const asked = error instanceof Refused ? error.retryAfterMs : null;
    const delay = this.next(asked);
    if (signal?.aborted) throw closed();
    let wake = () => {};
    /** @type {() => void} */
    let asleep = () => {};
    const slept = new Promise((resolve) => (wake = () => resolve(undefined)));
    const timer = setTimeout(wake, delay);
    if (!asked) asleep = onWake(wake);
    signal?.addEventListener("abort", wake);
    await slept;
    clearTimeout(timer);
    asleep();
    signal?.removeEventListener("abort", wake);
    if (signal?.aborted) throw closed();
  }
}

/**
 * Call when the page is online again, or shown again. Returns what ends that.
 * @param {(why: "online" | "visible") => void} callback
 * @returns {() => void}
 */
function onWake(callback) {
  if (typeof document === "undefined" || typeof window === "undefined") return () => {};
  const online = () => callback("online");
  const visible = () => {
    if (document.visibilityState === "visible") callback("visible");
  };
  window.addEventListener("online", online);
  window.addEventListener("pageshow", visible);
  document.addEventListener("visibilitychange", visible);
  return () => {
    window.removeEventListener("online", online);
    window.removeEventListener("pageshow", visible);
    document.removeEventListener("visibilitychange", visible);
  };
}

// --- frames ---------------------------------------------------------------------------------------------------------

/**
 * One server-sent event, or a comment.
 * @typedef {{ id?: string, event?: string, data?: string, comment?: string }} Frame
 */

/**
 * Makes frames of bytes, wherever these are cut: within a character, or between CR and LF. What no empty line has ended is no
 * frame yet. A connection has a parser of its own.
 */
export class FrameParser {
  #decoder = new TextDecoder();
  #rest = ""; // of the line whose end has not come
  #heldCr = false;
  #size = 0; // characters since the last frame's end, about
  /** @type {Frame} */
  #frame = {};
  /** @type {string[]} */
  #data = [];

  /**
   * @param {Uint8Array} bytes
   * @returns {Frame[]} those that are whole now
   */
  push(bytes) {
    /** @type {Frame[]} */
    const found = [];
    const piece = this.#decoder.decode(bytes, { stream: true });
    this.#size += piece.length;
    this.#rest += piece;
    // A long line is looked at when its end has come, not with each of its pieces.
    if (this.#heldCr || /[\r\n]/.test(piece)) {
      let text = this.#rest;
      // A CR at the end may be half of a line's end.
      this.#heldCr = text.endsWith("\r");
      if (this.#heldCr) text = text.slice(0, -1);
      const lines = text.split(/\r\n|\n|\r/);
      this.#rest = (lines.pop() ?? "") + (this.#heldCr ? "\r" : "");
      for (const line of lines) this.#line(line, found);
    }
    if (this.#size > MOST_CHARACTERS && !found.length) throw new ConnectionLost("A frame has no end.", "unexpected_answer");
    return found;
  }

  /**
   * @param {string} line
   * @param {Frame[]} found
   */
  #line(line, found) {
    if (line === "") {
      if (this.#data.length) found.push({ ...this.#frame, data: this.#data.join("\n") });
      this.#frame = {};
      this.#data = [];
      this.#size = this.#rest.length;
      return;
    }
    const colon = line.indexOf(":");
    if (colon === 0) {
      found.push({ comment: line.slice(1).trim() });
      return;
    }
    const name = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(line[colon + 1] === " " ? colon + 2 : colon + 1);
    if (name === "data") this.#data.push(value);
    else if (name === "id" || name === "event") this.#frame[name] = value;
  }
}

// --- a connection that comes back -------------------------------------------------------------------------------------

/** @typedef {"connecting" | "open" | "reconnecting"} Connecting */

/**
 * Read a stream through any number of connections; yield what `take` makes of the frames, in the batches in which they came.
 *
 * `open` asks for the stream from the cursor on. `take` moves the cursor, and returns nothing for what is to be passed over.
 * Ends when the server says 204, or `done` is true. Raises what is final.
 *
 * @template T
 * @param {Api} api
 * @param {{
 *   open: (signal: AbortSignal) => Promise<Response>,
 *   take: (frame: Frame) => T | undefined,
 *   done: () => boolean,
 *   signal?: AbortSignal,
 *   onConnection?: (state: Connecting) => void,
 * }} line
 * @returns {AsyncGenerator<T[], void, void>}
 */
async function* follow(api, { open, take, done, signal, onConnection = () => {} }) {
  const backoff = new Backoff(api.patience);
  const quiet = Math.min(20_000, api.patience.stallMs / 2); // pings come every 15 s
  onConnection("connecting");
  for (;;) {
    if (signal?.aborted) return;
    const attempt = new AbortController();
    const leave = () => attempt.abort();
    signal?.addEventListener("abort", leave);
    let woken = false;
    let heard = Date.now();
    const awake = onWake((why) => {
      // Another network, or a page that was frozen: the connection may be dead without a word.
      if (why === "online" || Date.now() - heard > quiet) {
        woken = true;
        leave();
      }
    });
    /** @type {unknown} */
    let failure = new ConnectionLost();
    /** @type {ReadableStreamDefaultReader<Uint8Array> | undefined} */
    let reader;
    try {
      const response = await open(attempt.signal);
      if (response.status === 204) return;
      if (!response.body || !response.headers.get("Content-Type")?.startsWith("text/event-stream")) {
        throw new ConnectionLost("The answer is no event stream: is this the address of the API?", "unexpected_answer");
      }
      reader = response.body.getReader();
      onConnection("open");
      const parser = new FrameParser();
      for (;;) {
        const { value, done: ended } = await within(reader.read(), api.patience.stallMs, leave);
        if (ended) break;
        heard = Date.now();
        /** @type {T[]} */
        const taken = [];
        /** @type {unknown} */
        let wrong;
        try {
          for (const frame of parser.push(value)) {
            const found = frame.data === undefined ? undefined : take(frame);
            if (found !== undefined) taken.push(found);
            // A new event, or a ping, but not the comment with which each connection opens, nor what was told before.
            if (found !== undefined || frame.comment === "ping" || frame.event === "ping") backoff.reset();
          }
        } catch (error) {
          wrong = error;
        }
        if (taken.length) yield taken; // the cursor is behind them, whatever came next
        if (wrong) throw wrong;
        if (done()) return;
      }
    } catch (error) {
      if (signal?.aborted) return;
      if (error instanceof LonghaulError && !passes(error) && !(woken && error.code === "closed")) throw error;
      failure = error instanceof LonghaulError ? error : new ConnectionLost();
    } finally {
      awake();
      signal?.removeEventListener("abort", leave);
      leave();
      reader?.cancel().catch(() => {}); // of a consumer that has left, or of a connection that is lost already
    }
    if (signal?.aborted) return;
    onConnection("reconnecting");
    if (woken) continue;
    if (backoff.failures + 1 >= api.bound(failure, api.patience.streamTries)) throw failure;
    try {
      await backoff.wait(failure, signal);
    } catch {
      return; // closed
    }
  }
}

/**
 * Return what the promise brings. Raises ConnectionLost when it takes longer, and calls `late`.
 * @template T
 * @param {Promise<T>} promise
 * @param {number} ms
 * @param {() => void} late
 * @returns {Promise<T>}
 */
function within(promise, ms, late) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => {
      reject(new ConnectionLost("Nothing came for too long, not even a ping.", "stalled"));
      late();
    }, ms);
    promise.then(resolve, reject).finally(() => clearTimeout(timer));
  });
}

/**
 * Read a frame's event.
 * @param {Frame} frame
 * @returns {RunEvent | undefined} nothing for a ping
 */
function eventOf(frame) {
  if (frame.event === "ping") return undefined;
  try {
    return JSON.parse(frame.data ?? "");
  } catch {
    throw new ConnectionLost("An event is not JSON.", "unexpected_answer");
  }
}

// --- the streams ------------------------------------------------------------------------------------------------------

/**
 * Which run to stream, or how to start it.
 * @typedef {object} RunToStream
 * @property {string} [run]
 * @property {number} [after] the last seq that is known. Default 0
 * @property {Record<string, any>} [start] starts a run and streams it: the body of `POST /runs`, or of the thread's
 * @property {string} [thread] where to start it; a new one without
 * @property {string} [idempotencyKey] of the start. Default: a new one
 * @property {(run: string) => void} [onRun] told the run's id, before its first event
 * @property {(state: Connecting) => void} [onConnection]
 */

/**
 * Yield the events of a run after the cursor, each once, to its last one; over as many connections as it takes.
 *
 * A `resume_gap` comes as an event of its own. Raises Refused, LogGap; ConnectionLost only with a bound of `streamTries`.
 * @param {ApiOptions & RunToStream} options
 * @returns {AsyncGenerator<RunEvent, void, void>}
 */
export async function* streamRun(options) {
  const api = new Api(options);
  const { start, thread, onRun, onConnection, signal } = options;
  const key = options.idempotencyKey ?? uuid();
  let run = options.run ?? null;
  let seq = options.after ?? 0;
  let over = false;
  if (!run && !start) throw new LonghaulError("Name a run, or say what to start.", "bad_options");
  const known = (/** @type {string} */ id) => {
    if (run !== id) onRun?.(id);
    run = id;
  };
  const batches = follow(api, {
    signal,
    onConnection,
    done: () => over,
    open: async (signal) => {
      if (run) return api.ask("GET", `runs/${run}/stream`, { stream: true, signal, lastEventId: `${seq}` });
      // The same request again is the same run, from its first event on.
      const path = thread ? `threads/${thread}/runs` : "runs";
      const body = { ...start, stream: true };
      const response = await api.ask("POST", path, { stream: true, signal, body, idempotencyKey: key });
      const id = response.headers.get("X-Run-Id"); // from another origin only where the server exposes it
      if (id) known(id);
      return response;
    },
    take: (frame) => {
      const event = eventOf(frame);
      if (!event) return undefined;
      if (event.type === "resume_gap") {
        seq = event.to;
        return event;
      }
      if (!run) known(event.run); // only the first tells it: a payload may name another run, a child's
      if (event.seq <= seq) return undefined;
      if ((event.from_seq ?? event.seq) !== seq + 1) throw new LogGap(seq + 1, event.seq - 1);
      seq = event.seq;
      over = TERMINAL.has(event.type);
      return event;
    },
  });
  for await (const batch of batches) yield* batch;
}

/**
 * Yield the events of a thread's runs after the cursor, one run after another, each once. It has no end: abort `signal`, or
 * leave the loop.
 * @param {ApiOptions & { thread: string, after?: string, onConnection?: (state: Connecting) => void }} options
 *   `after` is a cursor, `RUN:SEQ`; without one it begins with the thread's first run
 * @returns {AsyncGenerator<RunEvent, void, void>}
 */
export async function* streamThread(options) {
  for await (const batch of threadBatches(new Api(options), options)) yield* batch;
}

/**
 * @param {Api} api
 * @param {{ thread: string, after?: string, signal?: AbortSignal, onConnection?: (state: Connecting) => void }} options
 */
function threadBatches(api, { thread, after, signal, onConnection }) {
  let [run, seen] = after ? after.split(":") : ["", "0"];
  let seq = Number(seen);
  let gap = false;
  return follow(api, {
    signal,
    onConnection,
    done: () => false,
    open: (signal) => {
      const lastEventId = run ? `${run}:${seq}` : undefined;
      return api.ask("GET", `threads/${thread}/stream`, { stream: true, signal, lastEventId });
    },
    take: (frame) => {
      const event = eventOf(frame);
      if (!event) return undefined;
      if (event.type === "resume_gap") {
        gap = true;
        return event;
      }
      const own = frame.id?.split(":")[0] || event.run; // a payload may name another run, a child's
      const before = own === run ? seq : 0;
      if (event.seq <= before) return undefined;
      if (!gap && (event.from_seq ?? event.seq) !== before + 1) throw new LogGap(before + 1, event.seq - 1);
      gap = false;
      run = own;
      seq = event.seq;
      return event;
    },
  });
}

/**
 * Ask the API for something that is no stream. What has failed in passing is tried again; a POST happens once, for it gets an
 * Idempotency-Key. Raises Refused, ConnectionLost.
 * @param {ApiOptions} options
 * @param {string} method
 * @param {string} path below `baseUrl`, such as `runs?active=true&agent=support`
 * @param {{ body?: any, idempotencyKey?: string }} [more]
 * @returns {Promise<any>} the answer's JSON; null where there is none
 */
export async function request(options, method, path, more = {}) {
  const idempotencyKey = more.idempotencyKey ?? (method === "POST" ? uuid() : undefined);
  return new Api(options).json(method, path.replace(/^\/+/, ""), { ...more, idempotencyKey });
}

/** Return 122 random bits in the form of a UUID. `crypto.randomUUID` is there in secure contexts only. */
function uuid() {
  const bytes = globalThis.crypto?.getRandomValues
    ? globalThis.crypto.getRandomValues(new Uint8Array(16))
    : Uint8Array.from({ length: 16 }, () => Math.random() * 256); // Node 18 without a flag
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const hex = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");
}

// --- the fold of a log --------------------------------------------------------------------------------------------------

/** Which status of a tool call an event about it tells. */
const CALL_STATUS = /** @type {Record<string, CallStatus>} */ ({
  "tool_call.created": "requested",
  "tool_call.approval_requested": "awaiting_approval",
  "tool_call.approved": "requested",
  "tool_call.started": "running",
  "tool_call.retrying": "retrying",
  "tool_call.awaiting_result": "awaiting_result",
  "tool_call.awaiting_child": "awaiting_child",
  "tool_call.unknown": "unknown",
  "tool_call.settled": "settled",
});
const CALL_FIELDS = ["attempt", "fraction", "note", "outcome", "result", "stored", "error", "by", "arguments", "deadline", "assignee"];
/** What the attempt before has left, and does not hold any more. */
const LEFT = /** @type {Record<string, string[]>} */ ({
  "tool_call.created": ["argumentsText"],
  "tool_call.started": ["fraction", "note", "error", "by"],
  "tool_call.settled": ["error", "by"],
});

/** @typedef {Pick<Run, "id" | "status" | "stop_reason" | "error" | "output">} RunTold */

/**
 * Messages, tool calls and runs, as a log tells them. It begins with a snapshot or with nothing; `apply` takes the events in
 * their order. What it hands out is never changed afterwards: what is new is a new object, all else stays the same one.
 */
export class Fold {
  /** @type {Map<string, Message>} */
  #messages = new Map();
  /** @type {Map<string, ToolCall>} */
  #calls = new Map();
  /** @type {Message[] | null} */
  #list = null;
  /** @type {readonly Message[] | null} */
  #listShown = null;
  /** @type {Record<string, ToolCall> | null} */
  #table = null;
  /** @type {RunTold | null} the run whose events came last */
  run = null;

  /** Whether there is a snapshot, that has all that its thread shows of what is being said. */
  #whole = false;

  /** @param {Iterable<any>} [messages] the newest of a thread as the API lists them, the oldest first */
  constructor(messages) {
    if (messages) this.reset(messages);
  }

  /** The messages in their order; those that wait for their place are the last. @returns {readonly Message[]} */
  get messages() {
    if (!this.#list) {
      const all = [...this.#messages.values()];
      this.#list = [...all.filter((each) => each.status !== "waiting"), ...all.filter((each) => each.status === "waiting")];
    }
    return this.#list;
  }

  /** Those of the messages that the thread shows. @returns {readonly Message[]} */
  get shown() {
    const all = this.messages;
    return (this.#listShown ??= all.every(({ shown }) => shown) ? all : all.filter(({ shown }) => shown));
  }

  /** The tool calls by their ids. @returns {Readonly<Record<string, ToolCall>>} */
  get toolCalls() {
    return (this.#table ??= Object.fromEntries(this.#calls));
  }

  /**
   * @param {string} id
   * @returns {Message | undefined}
   */
  message(id) {
    return this.#messages.get(id);
  }

  /**
   * Begin anew with this snapshot. What has not changed stays the same object.
   * @param {Iterable<any>} messages
   * @param {Iterable<any>} [calls] how those of the live run stand
   */
  reset(messages, calls = []) {
    const before = this.#messages;
    this.#messages = new Map();
    this.#calls = new Map();
    for (const row of messages) this.#add(saved(row), before.get(row.id));
    for (const told of calls) this.#callStands(told);
    this.#list = this.#listShown = this.#table = null;
    const all = this.messages;
    this.#whole = !all.length || all[0].status !== "waiting"; // one of what waits alone has not
  }

  /** Put older messages before all that are there. @param {Iterable<any>} messages */
  prepend(messages) {
    const before = this.#messages;
    const calls = this.#calls;
    this.#messages = new Map();
    this.#calls = new Map();
    for (const row of messages) this.#add(saved(row), before.get(row.id));
    for (const [id, message] of before) this.#messages.set(id, message);
    for (const [id, call] of calls) this.#calls.set(id, { ...this.#calls.get(id), ...call });
    this.#list = this.#listShown = this.#table = null;
  }

  /**
   * @param {Message} message
   * @param {Message | undefined} before
   */
  #add(message, before) {
    const same = before && before.status === message.status && sameJson(before.content, message.content);
    this.#messages.set(message.id, same ? before : message);
    this.#callsIn(message);
  }

  /** Take what a message's parts say of calls. @param {Message} message */
  #callsIn({ id, run, content }) {
    for (const part of content) {
      if (part.type === "tool_call" && !this.#calls.has(part.tool_call)) {
        const { tool_call, name } = part;
        this.#call({ id: tool_call, name, message: id, run, status: "requested", arguments: part.arguments });
      } else if (part.type === "tool_result" && this.#calls.get(part.tool_call)?.status !== "settled") {
        const { tool_call, name, outcome, result, stored, error } = part;
        const known = this.#calls.get(tool_call) ?? { id: tool_call, name: name ?? "", message: "", run };
        this.#call({ ...known, status: "settled", outcome, result, ...(stored && { stored }), error });
      }
    }
  }

  /** Take over how a call stood at the snapshot's cursor. @param {any} told */
  #callStands(told) {
    const { tool_call: id, name, message, status } = told;
    const call = { .../** @type {any} */ (this.#calls.get(id) ?? { id, name, message, run: this.#messages.get(message)?.run }), status };
    for (const field of CALL_FIELDS) {
      if ((told[field] ?? null) !== null && (field !== "attempt" || status !== "requested")) call[field] = told[field];
    }
    this.#call(call);
  }

  /** @param {ToolCall} call */
  #call(call) {
    this.#calls.set(call.id, call);
    this.#table = null;
  }

  /** @param {RunEvent} event */
  apply(event) {
    const { type } = event;
    if (type.startsWith("run.") || type === "leg.started") return this.#ofRun(event);
    if (type.startsWith("tool_call.")) return this.#ofCall(event);
    switch (type) {
      case "message.created":
        // Where a lingering worker goes on, nothing else says that the run runs again.
        this.#runIs(event.run, "running");
        this.#say({ ...begun(event), shown: this.#messages.get(event.message)?.shown ?? event.shown !== false });
        break;
      case "text.delta":
      case "reasoning.delta": {
        const message = this.#messages.get(event.message) ?? { ...begun(event), shown: !this.#whole };
        const kind = type === "text.delta" ? "text" : "reasoning";
        const last = message.content[message.content.length - 1];
        const content =
          last?.type === kind
            ? [...message.content.slice(0, -1), { ...last, text: (last.text ?? "") + event.text }]
            : [...message.content, { type: kind, text: event.text }];
        this.#say({ ...message, content });
        break;
      }
      case "message.completed": {
        const known = this.#messages.get(event.message);
        if (known?.status === "waiting") this.#messages.delete(known.id); // it has got its place now: here
        const status = event.partial ? "partial" : "completed";
        const message = { ...(known ?? begun(event)), role: event.role, status, content: event.content };
        // One that has begun before the snapshot, which does not show it.
        if (!known && this.#whole && message.role === "assistant" && message.step !== null) message.shown = false;
        if (event.partial) this.#forgetCalls(event.message); // those that it was about to make
        this.#say(/** @type {Message} */ (message));
        this.#callsIn(/** @type {Message} */ (message));
        break;
      }
      case "message.discarded":
        this.#takeAway(event.message);
        break;
    }
  }

  /** @param {Message} message */
  #say(message) {
    this.#messages.set(message.id, message);
    this.#list = this.#listShown = null;
  }

  /** @param {string} id of a message; its calls go with it */
  #takeAway(id) {
    this.#messages.delete(id);
    this.#forgetCalls(id);
    this.#list = this.#listShown = null;
  }

  /** @param {string} message */
  #forgetCalls(message) {
    for (const call of this.#calls.values()) if (call.message === message) this.#calls.delete(call.id);
    this.#table = null;
  }

  /** @param {RunEvent} event */
  #ofRun({ type, run: id, ...event }) {
    const word = type === "leg.started" || type === "run.started" ? "running" : type.slice("run.".length);
    const run = this.#runIs(id, /** @type {RunStatus} */ (word));
    if (ENDED.has(word)) {
      const { stop_reason = null, error = null, output = null } = event;
      this.run = { ...run, stop_reason, error, output };
    }
    // A run that says the last step again: the answer that it replaces is not shown any more.
    if (event.superseded) this.#takeAway(event.superseded);
  }

  /** @param {string} id @param {RunStatus} status @returns {RunTold} */
  #runIs(id, status) {
    const before = this.run?.id === id ? this.run : { id, stop_reason: null, error: null, output: null };
    if (this.run !== before || this.run.status !== status) this.run = { ...before, status };
    return this.run;
  }

  /** @param {RunEvent} event */
  #ofCall(event) {
    const { tool_call: id, name, message, run, type } = event;
    /** @type {any} */
    const before = this.#calls.get(id) ?? { id, name, message, run, status: "requested" };
    const call = { ...before, status: CALL_STATUS[type] ?? before.status };
    if (type === "tool_call.arguments_delta") call.argumentsText = (before.argumentsText ?? "") + event.text;
    for (const field of LEFT[type] ?? []) delete call[field];
    for (const field of CALL_FIELDS) if (event[field] !== undefined) call[field] = event[field];
    this.#call(call);
  }
}

/**
 * Make messages of a log.
 * @param {Iterable<RunEvent>} events in the order of their seq
 * @param {Iterable<any>} [messages] the snapshot that they follow, if there is one
 * @returns {readonly Message[]}
 */
export function fold(events, messages) {
  const made = new Fold(messages);
  for (const event of events) made.apply(event);
  return made.messages;
}

/** Return what a message says to a reader: its text parts. @param {Pick<Message, "content">} message */
export function textOf(message) {
  return message.content.map((part) => (part.type === "text" ? part.text : "")).join("");
}

/** @param {any} row @returns {Message} */
function saved({ id, role, status, content, run, step, client_id, metadata, created_at, shown = true }) {
  const key = client_id || id;
  return { key, id, role, status, content, run, step, client_id: client_id || null, metadata, created_at, shown };
}

/** @param {RunEvent} event @returns {Message} */
function begun({ message: id, role, run, step, client_id, at, shown = true }) {
  const known = { id, role: role ?? "assistant", run, step: step ?? null, client_id: client_id || null, created_at: at };
  return { ...known, key: client_id || id, status: "pending", content: [], metadata: {}, shown };
}

/** @param {any} one @param {any} other */
const sameJson = (one, other) => one === other || JSON.stringify(one) === JSON.stringify(other);

// --- the pace of text ---------------------------------------------------------------------------------------------------

/**
 * At what pace to show text that comes in bursts: evenly, over about the time until the next burst, and never more than `lagMs`
 * behind. It counts characters and is told the time, in milliseconds.
 */
export class Pace {
  /** @type {{ length: number, by: number }[]} what must be shown by when */
  #due = [];
  #rate = 0; // characters a millisecond
  #gap = 100; // ms between bursts, about
  /** @type {number | null} */
  #told = null;
  #at = 0;

  /**
   * @param {number} shown how many characters are shown already
   * @param {number} lagMs
   */
  constructor(shown = 0, lagMs = 500) {
    this.shown = shown;
    this.length = shown;
    this.lagMs = lagMs;
  }

  /**
   * Tell it that the text is so long now.
   * @param {number} length
   * @param {number} now
   */
  push(length, now) {
    this.advance(now);
    if (this.#told !== null) this.#gap += (Math.min(now - this.#told, this.lagMs) - this.#gap) * 0.3;
    this.#told = this.#at = now;
    this.length = length;
    this.#due.push({ length, by: now + this.lagMs });
    const over = Math.min(Math.max(this.#gap * 1.5, 50), this.lagMs * 0.8);
    this.#rate = (length - this.shown) / over;
    // As slowly as that, but so that all that came before is shown in its time.
    for (const due of this.#due) this.#rate = Math.max(this.#rate, (due.length - this.shown) / Math.max(due.by - now, 1));
  }

  /**
   * Return how many characters to show now.
   * @param {number} now
   */
  advance(now) {
    this.shown = Math.min(this.length, this.shown + this.#rate * Math.max(now - this.#at, 0));
    this.#at = Math.max(now, this.#at);
    while (this.#due.length && (this.#due[0].by <= now || this.#due[0].length <= this.shown)) {
      this.shown = Math.max(this.shown, this.#due[0].length);
      this.#due.shift();
    }
    return Math.floor(this.shown);
  }

  /** Whether there is text that is not shown yet. */
  get behind() {
    return Math.floor(this.shown) < this.length;
  }
}

/** @param {readonly Part[]} content */
const lengthOf = (content) => content.reduce((sum, part) => sum + (part.text?.length ?? 0), 0);

const GRAPHEMES = typeof Intl === "object" && Intl.Segmenter ? new Intl.Segmenter(undefined, { granularity: "grapheme" }) : null;
/** Whether a character belongs to none that stands before it, as some of the others do. @param {number} code */
const single = (code) => code < 0x300 || (code >= 0x3400 && code <= 0x9fff);

/**
 * Return the first place from `count` on at which the text may be cut: not within a pair of surrogates, nor where the engine
 * knows it within a family, a flag or an accented letter. What is shown once stays, though more may come to belong to it.
 * @param {string} text
 * @param {number} count
 */
function placeToCut(text, count) {
  if (count <= 0 || count >= text.length || single(text.charCodeAt(count))) return count;
  let from = count;
  while (from > 0 && count - from < 2000 && !single(text.charCodeAt(from))) from -= 1;
  const found = GRAPHEMES?.segment(text.slice(from, count + 200)).containing(count - from);
  if (found) return found.index + from < count ? found.index + from + found.segment.length : count;
  const half = (text.charCodeAt(count - 1) & 0xfc00) === 0xd800;
  return half ? count + 1 : count;
}

/**
 * Return the content up to about so many characters.
 * @param {readonly Part[]} content
 * @param {number} count
 * @returns {Part[]}
 */
function upTo(content, count) {
  /** @type {Part[]} */
  const found = [];
  for (const part of content) {
    const text = part.text ?? "";
    if (text.length > count) {
      const shown = text.slice(0, placeToCut(text, count));
      if (shown) found.push({ ...part, text: shown });
      break;
    }
    found.push(part);
    count -= text.length;
  }
  return found;
}

// --- the thread ---------------------------------------------------------------------------------------------------------

/**
 * What an interface shows of a thread. A state is never changed; the next one shares with it whatever has stayed the same, so
 * `before.messages[3] === after.messages[3]` says that there is nothing to draw anew.
 *
 * @typedef {object} ThreadFields
 * @property {string | null} thread its id; null until the first `send` has made it
 * @property {readonly Message[]} messages what is said, what is being said, what was sent just now
 * @property {Readonly<Record<string, ToolCall>>} toolCalls by id
 * @property {RunTold | null} run the run that lives, or the last one
 * @property {RunStatus | null} status of that run; null before the first
 * @property {boolean} isRunning whether something is sent, held, queued or running
 * @property {LonghaulError | null} error what went wrong for good: of loading, streaming, or the last stop, resume or retry.
 *   That of a message that was not sent stands at the message, that of a run in `run.error`
 * @property {"idle" | "connecting" | "open" | "reconnecting" | "closed"} connection
 * @property {boolean} isLoading until the messages are there
 * @property {boolean} hasOlder whether `loadOlder` finds more
 */
/** @typedef {Readonly<ThreadFields>} ThreadState */

/**
 * @typedef {object} ThreadOptions
 * @property {string | null} [thread] its id. Without one the first `send` makes a thread
 * @property {string} [agent] of runs that are sent here; a thread that is there may name one itself
 * @property {Record<string, any>} [newThread] more for `POST /threads`, such as a title
 * @property {Record<string, any>} [run] more for each `POST .../runs`, such as limits
 * @property {boolean} [start] false: nothing is loaded before `open()`
 * @property {boolean} [smooth] show text at an even pace. Default: true, but not where the user prefers reduced motion
 * @property {number} [pageSize] how many messages are loaded at first, and by `loadOlder`. Default 100, at most 200
 * @property {(event: RunEvent) => void} [onEvent] told each event of the stream, after it was applied
 */

/**
 * Open a thread: load its messages, and keep them up to date.
 * @param {ApiOptions & ThreadOptions} options
 */
export function openThread(options) {
  return new Thread(options);
}

/**
 * What was sent from here, and is not yet in the log.
 * @typedef {{ message: Message, body: Record<string, any>, run?: string }} Outgoing
 */

/** A thread as an interface needs it. All its functions may be passed on by themselves. */
export class Thread {
  #api;
  #options;
  #fold = new Fold();
  /** @type {string | null} */
  #id;
  /** @type {Map<string, Outgoing>} by client_id */
  #outgoing = new Map();
  /** Runs that were accepted, and of which no event has come. @type {Set<string>} */
  #upcoming = new Set();
  /** @type {Set<string>} */
  #told = new Set();
  /** @type {Map<string, Pace>} by message */
  #paces = new Map();
  /** What is shown of a message that is not shown whole. @type {WeakMap<Message, Message>} */
  #cut = new WeakMap();
  /** @type {string | null} the query that finds older messages */
  #older = null;
  /** @type {AbortController | null} */
  #life = null;
  /** Sends go out one after another. @type {Promise<unknown>} */
  #sends = Promise.resolve();
  #threadKey = uuid();
  /** @type {Set<(state: ThreadState) => void>} */
  #listeners = new Set();
  /** @type {ThreadState} */
  #state;
  /** @type {LonghaulError | null} */
  #error = null;
  /** @type {ThreadState["connection"]} */
  #connection = "idle";
  #loading = false;
  #loads = 0;
  #awaken = () => {};
  #cancelFrame = () => {};
  #framed = false;

  /** @param {ApiOptions & ThreadOptions} options */
  constructor(options) {
    this.#options = options;
    this.#api = new Api(options);
    this.#id = options.thread ?? null;
    this.#state = this.#made();
    options.signal?.addEventListener("abort", this.close);
    if (options.start !== false) this.open();
  }

  /** Its id; null until the first `send` has made it. */
  get id() {
    return this.#id;
  }

  /** The state as it is now: the same object until something changes. */
  getSnapshot = () => this.#state;

  /**
   * Hear of each new state, and of that of now at once. Returns what ends it. This is a Svelte store, and with `getSnapshot` what
   * React's `useSyncExternalStore` asks for.
   * @param {(state: ThreadState) => void} listener
   * @returns {() => void}
   */
  subscribe = (listener) => {
    const own = (/** @type {ThreadState} */ state) => listener(state); // the same function may listen twice
    this.#listeners.add(own);
    listener(this.#state);
    return () => void this.#listeners.delete(own);
  };

  /** Load, and stream. Also after `close`, or after an error that has ended the stream; else nothing. */
  open = () => {
    if (this.#life || this.#options.signal?.aborted) return;
    this.#life = new AbortController();
    this.#error = null;
    const hidden = () => {
      if (document.visibilityState === "hidden") this.#showAll(); // no frame is drawn there
    };
    if (typeof document !== "undefined") {
      document.addEventListener("visibilitychange", hidden);
      this.#awaken = () => document.removeEventListener("visibilitychange", hidden);
    }
    this.#connection = "idle";
    if (this.#id) void this.#live(this.#life.signal);
    else this.#changed();
  };

  /** End the stream. What is being sent is still sent. The state stays. */
  close = () => {
    const life = this.#life;
    this.#life = null;
    life?.abort();
    this.#end();
  };

  /**
   * Say something: it is shown at once, and starts a run. Resolves when the server has accepted it. When that fails the message
   * has the status `failed`, and `resend` tries again; the promise may be ignored.
   * @param {Input} input a text, or parts
   * @param {Record<string, any>} [run] more for `POST .../runs`: metadata, limits, busy, ...
   * @returns {Promise<Run>}
   */
  send = (input, run = {}) => {
    const client_id = uuid();
    const content = typeof input === "string" ? [{ type: "text", text: input }] : [...input];
    /** @type {Message} */
    const message = {
      key: client_id, id: client_id, role: "user", status: "sending", content, run: null, step: null, client_id,
      metadata: {}, created_at: new Date().toISOString(), shown: true,
    };
    const { agent } = this.#options;
    const body = { ...(agent ? { agent } : {}), ...this.#options.run, ...run, input, client_id };
    const outgoing = { message, body };
    this.#outgoing.set(client_id, outgoing);
    if (this.#error && !this.#life) this.open(); // else nobody would hear the answer
    this.#changed();
    return this.#queued(() => this.#deliver(outgoing));
  };

  /**
   * Send a message again that has failed: under its Idempotency-Key, so it is never there twice.
   * @param {string} key of the message
   * @returns {Promise<Run | null>} null when it has arrived after all
   */
  resend = (key) => {
    const outgoing = this.#outgoing.get(key);
    if (outgoing?.message.status !== "failed") return Promise.resolve(null);
    const { error: _, ...message } = outgoing.message;
    outgoing.message = { ...message, status: "sending" };
    this.#changed();
    return this.#queued(async () => {
      // The server forgets keys after a day: look first.
      try {
        if (this.#id && (await this.#arrived(key))) {
          outgoing.message = { ...outgoing.message, status: "sent" }; // until its event comes
          this.#changed();
          return null;
        }
      } catch (error) {
        outgoing.message = { ...outgoing.message, status: "failed", error: ours(error) };
        this.#changed();
        throw error;
      }
      return this.#deliver(outgoing);
    });
  };

  /** Take a message away that has failed. @param {string} key */
  discard = (key) => {
    if (this.#outgoing.get(key)?.message.status !== "failed") return;
    this.#outgoing.delete(key);
    this.#changed();
  };

  /**
   * Cancel the run that lives; what it has said stays. Without any: nothing.
   * @param {string} [reason]
   * @returns {Promise<Run | null>}
   */
  stop = (reason) =>
    this.#doing(async () => {
      await this.#sends; // it may be the one that is being sent
      const run = this.#lives() ? this.#fold.run?.id : [...this.#upcoming][0];
      return run ? this.#api.json("POST", `runs/${run}/cancel`, { body: reason ? { reason } : {} }) : null;
    });

  /**
   * Go on after the last run was cancelled or has failed, by a new run.
   * @param {Input} [input]
   * @returns {Promise<Run>}
   */
  resume = (input) => this.#doing(() => this.#follow("resume", input === undefined ? {} : { input }));

  /** Do the last step of the last run again, by a new run. @returns {Promise<Run>} */
  retry = () => this.#doing(() => this.#follow("retry", {}));

  /** Load the messages before those that are there. Returns whether there are more. @returns {Promise<boolean>} */
  loadOlder = () =>
    this.#doing(async () => {
      const query = this.#older;
      if (!query) return false;
      const page = await this.#api.json("GET", `threads/${this.#id}/messages?${query}`);
      if (query === this.#older) {
        this.#older = queryOf(page.next);
        this.#fold.prepend(page.results.reverse());
        this.#changed();
      }
      return this.#older !== null;
    });

  // Its life

  /** @param {AbortSignal} signal */
  async #live(signal) {
    const backoff = new Backoff(this.#api.patience);
    try {
      for (;;) {
        const after = await this.#load(signal);
        void this.#discover(signal);
        try {
          await this.#stream(after, signal, backoff);
          return;
        } catch (error) {
          if (!(error instanceof LogGap)) throw error;
          await backoff.wait(error, signal); // the messages have it, and a cursor behind it
        }
      }
    } catch (error) {
      if (signal.aborted) return;
      this.#life = null;
      this.#error = ours(error);
      this.#end();
    }
  }

  /**
   * Load the newest messages. Returns the cursor at which they were read.
   * @param {AbortSignal} signal
   * @returns {Promise<string | undefined>}
   */
  async #load(signal) {
    this.#connection = this.#connection === "idle" ? "connecting" : "reconnecting";
    this.#loading = true;
    this.#changed();
    const path = `threads/${this.#id}/messages?order=desc&limit=${this.#options.pageSize ?? 100}`;
    const page = await this.#api.json("GET", path, { signal }, this.#api.patience.streamTries);
    if (signal.aborted) throw closed();
    this.#older = queryOf(page.next);
    this.#paces.clear();
    this.#fold.reset(page.results.reverse(), page.tool_calls);
    for (const message of this.#fold.messages) this.#arrives(message.client_id, message.run);
    const { run, seq } = page.cursor;
    this.#loading = false;
    this.#loads += 1;
    this.#changed();
    return run ? `${run}:${seq}` : undefined;
  }

  /** Find the runs that wait or go on, also those that others have started. @param {AbortSignal} signal */
  async #discover(signal) {
    const known = this.#fold.run;
    try {
      const page = await this.#api.json("GET", `runs?thread=${this.#id}&limit=20`, { signal });
      if (signal.aborted) return;
      /** @type {Run[]} */
      const runs = page.results;
      for (const run of runs) {
        if (run.status === "held") this.#accepted(run);
        else if (ENDED.has(run.status)) this.#upcoming.delete(run.id); // before the cursor: the stream will not tell of it
      }
      const begun = runs.filter((run) => run.status !== "held");
      const now = begun.find((run) => !ENDED.has(run.status)) ?? begun[0];
      const run = this.#fold.run;
      // Else the stream has told something newer, or one was started since.
      const older = run === known || !run || (!this.#told.has(run.id) && runs.some(({ id }) => id === run.id));
      if (now && older) this.#goesOn(now);
      this.#changed();
    } catch {
      // The stream says what becomes of it.
    }
  }

  /**
   * @param {string | undefined} after
   * @param {AbortSignal} signal
   * @param {Backoff} backoff
   */
  async #stream(after, signal, backoff) {
    const onConnection = (/** @type {Connecting} */ state) => {
      if (signal.aborted) return;
      this.#connection = state;
      this.#changed();
    };
    const thread = /** @type {string} */ (this.#id);
    for await (const events of threadBatches(this.#api, { thread, after, signal, onConnection })) {
      if (signal.aborted) return;
      const now = clock();
      const smooth = this.#smooths();
      let more = false;
      for (const event of events) {
        if (event.type === "resume_gap") throw new LogGap(event.from, event.to);
        if (smooth && event.type.endsWith(".delta") && event.message) this.#paced(event, now);
        else {
          this.#fold.apply(event);
          more = true;
          if (event.message && !event.type.startsWith("tool_call.")) this.#paces.delete(event.message); // whole, or not smoothed
          this.#arrives(event.client_id, event.run);
        }
        this.#told.add(event.run);
        this.#upcoming.delete(event.run);
      }
      backoff.reset();
      if (more || !this.#framed) this.#draw(); // else the next frame shows it
      for (const event of events) tell(this.#options.onEvent, event);
    }
  }

  #end() {
    this.#awaken();
    this.#connection = "closed";
    this.#loading = false;
    this.#showAll();
  }

  // Sending

  /**
   * @template T
   * @param {() => Promise<T>} work
   * @returns {Promise<T>}
   */
  #queued(work) {
    const done = this.#sends.then(work);
    this.#sends = done.catch(() => {});
    return done;
  }

  /** @param {Outgoing} outgoing @returns {Promise<Run>} */
  async #deliver(outgoing) {
    const key = outgoing.message.key;
    const loads = this.#loads;
    try {
      const thread = await this.#thread();
      const { body } = outgoing;
      const run = await this.#api.json("POST", `threads/${thread}/runs`, { body, idempotencyKey: key });
      if (this.#outgoing.has(key)) outgoing.message = { ...outgoing.message, status: "sent", run: run.id };
      this.#accepted(run);
      // An answer that took long may be older than what was loaded meanwhile: the first one is told again.
      if (this.#life && loads !== this.#loads) void this.#discover(this.#life.signal);
      this.#changed();
      return run;
    } catch (error) {
      // Its event may have come though its answer has not.
      if (outgoing.run) return this.#api.json("GET", `runs/${outgoing.run}`);
      outgoing.message = { ...outgoing.message, status: "failed", error: ours(error) };
      this.#changed();
      throw error;
    }
  }

  /** Return the thread's id; make it before, if need be. @returns {Promise<string>} */
  async #thread() {
    if (this.#id) return this.#id;
    const { agent, newThread } = this.#options;
    const body = { ...(agent ? { agent } : {}), ...newThread };
    // Under one key, for this may be the second message, after a first one that has failed.
    this.#id = (await this.#api.json("POST", "threads", { body, idempotencyKey: this.#threadKey })).id;
    if (this.#life) void this.#live(this.#life.signal);
    return /** @type {string} */ (this.#id);
  }

  /** Return whether the message is in the thread already. @param {string} client_id */
  async #arrived(client_id) {
    const page = await this.#api.json("GET", `threads/${this.#id}/messages?order=desc&limit=200`);
    if (!page.results.some((/** @type {any} */ row) => row.client_id === client_id)) return false;
    return true;
  }

  /** The saved message takes the place of what was shown at once. @param {string | null | undefined} client_id */
  #arrives(client_id, /** @type {string | null} */ run) {
    const outgoing = client_id ? this.#outgoing.get(client_id) : undefined;
    if (!outgoing) return;
    if (run) outgoing.run = run;
    this.#outgoing.delete(outgoing.message.key);
  }

  /** @param {Run} run one that was started, or found */
  #accepted({ id, status, stop_reason, error, output }) {
    if (this.#told.has(id) || this.#fold.run?.id === id) return; // the stream knows more of it
    if (status === "held" || this.#lives()) this.#upcoming.add(id);
    else this.#goesOn({ id, status, stop_reason, error, output });
  }

  /** @param {RunTold} run */
  #goesOn({ id, status, stop_reason, error, output }) {
    this.#fold.run = { id, status, stop_reason, error, output };
    this.#upcoming.delete(id);
  }

  /** @param {"resume" | "retry"} verb @param {any} body */
  async #follow(verb, body) {
    await this.#sends;
    const last = this.#fold.run?.id;
    if (!last) throw new LonghaulError("The thread has no run yet.", "no_run");
    const run = await this.#api.json("POST", `runs/${last}/${verb}`, { body, idempotencyKey: uuid() });
    this.#accepted(run);
    this.#changed();
    return run;
  }

  /**
   * Do what the user has asked for. What goes wrong stands in the state, so the promise may be ignored.
   * @template T
   * @param {() => Promise<T>} work
   * @returns {Promise<T>}
   */
  #doing(work) {
    if (this.#error && this.#life) {
      this.#error = null;
      this.#changed();
    }
    const done = work().catch((error) => {
      this.#error = ours(error);
      this.#changed();
      throw error;
    });
    done.catch(() => {});
    return done;
  }

  #lives() {
    const run = this.#fold.run;
    return run !== null && !ENDED.has(run.status);
  }

  // What is shown

  #smooths() {
    if (this.#options.smooth === false) return false;
    if (typeof document === "undefined") return true;
    if (document.visibilityState === "hidden") return false;
    return !globalThis.matchMedia?.("(prefers-reduced-motion: reduce)").matches;
  }

  /** Apply a delta that is not shown at once. @param {RunEvent} event @param {number} now */
  #paced(event, now) {
    const before = this.#fold.message(event.message);
    let pace = this.#paces.get(event.message);
    if (!pace) this.#paces.set(event.message, (pace = new Pace(before ? lengthOf(before.content) : 0)));
    this.#fold.apply(event);
    const after = this.#fold.message(event.message);
    if (after?.shown) pace.push(lengthOf(after.content), now); // else nobody draws it, and it would be behind for ever
  }

  #showAll() {
    this.#paces.clear();
    this.#cancelFrame();
    this.#framed = false;
    this.#changed();
  }

  /** Show what is due, now and frame by frame, until all is shown. */
  #draw() {
    this.#changed();
    if (this.#framed || ![...this.#paces.values()].some((pace) => pace.behind)) return;
    this.#framed = true;
    const next = () => {
      this.#framed = false;
      this.#draw();
    };
    if (typeof requestAnimationFrame === "function") {
      const frame = requestAnimationFrame(next);
      this.#cancelFrame = () => cancelAnimationFrame(frame);
    } else {
      const timer = setTimeout(next, 16);
      this.#cancelFrame = () => clearTimeout(timer);
    }
  }

  /** Return the message as far as it is to be shown now. @param {Message} message @param {number} now */
  #shown(message, now) {
    const pace = this.#paces.get(message.id);
    if (!pace) return message;
    const count = pace.advance(now);
    if (!pace.behind) return message;
    const content = upTo(message.content, count);
    const before = this.#cut.get(message);
    if (before && lengthOf(before.content) === lengthOf(content)) return before;
    const cut = { ...message, content };
    this.#cut.set(message, cut);
    return cut;
  }

  /** @returns {ThreadState} */
  #made() {
    const now = clock();
    const before = this.#state;
    const saved = this.#fold.shown;
    let messages = this.#paces.size ? saved.map((message) => this.#shown(message, now)) : saved;
    if (this.#outgoing.size) messages = [...messages, ...[...this.#outgoing.values()].map((each) => each.message)];
    if (before && sameItems(before.messages, messages)) messages = before.messages;
    const run = this.#fold.run;
    const sending = [...this.#outgoing.values()].some((each) => each.message.status === "sending");
    return {
      thread: this.#id,
      messages,
      toolCalls: this.#fold.toolCalls,
      run,
      status: run?.status ?? null,
      isRunning: sending || this.#lives() || this.#upcoming.size > 0,
      error: this.#error,
      connection: this.#connection,
      isLoading: this.#loading,
      hasOlder: this.#older !== null,
    };
  }

  /** Make the new state, and tell it, if it is one. */
  #changed() {
    const before = /** @type {any} */ (this.#state);
    const state = /** @type {any} */ (this.#made());
    if (Object.keys(state).every((name) => state[name] === before[name])) return;
    this.#state = state;
    for (const listener of [...this.#listeners]) tell(listener, state);
  }
}

/** Return the query of a next page: only that is taken, so that no key is sent elsewhere. @param {string | null} url */
const queryOf = (url) => (url?.includes("?") ? url.slice(url.indexOf("?") + 1) : null);

/** @param {readonly any[]} one @param {readonly any[]} other */
const sameItems = (one, other) => one.length === other.length && one.every((item, n) => item === other[n]);

/**
 * Call a function of the page. What it throws is the page's affair: the stream goes on, and so do the other listeners.
 * @template T
 * @param {((given: T) => void) | undefined} callback
 * @param {T} given
 */
function tell(callback, given) {
  try {
    callback?.(given);
  } catch (error) {
    if (typeof reportError === "function") return reportError(error);
    queueMicrotask(() => {
      throw error;
    });
  }
}

/** Milliseconds that only go forwards. */
const clock = () => (typeof performance === "undefined" ? Date.now() : performance.now());

/** @param {unknown} error @returns {LonghaulError} */
function ours(error) {
  return error instanceof LonghaulError ? error : new LonghaulError("Something went wrong in the page.", "failed");
}
