// The state of a thread, and the streams, against a server that is a function: each answer can be lost, late or refused.

import assert from "node:assert/strict";
import { createServer } from "node:http";
import { afterEach, test } from "node:test";
import { ConnectionLost, LogGap, Refused, openThread, request, streamRun, streamThread, textOf } from "../../../clients/js/longhaul.js";

const AT = "2026-11-21T10:00:00Z";
const unhandled = [];
process.on("unhandledRejection", (error) => unhandled.push(error));

/** As little of Longhaul as the module talks to. `faults` are functions for the next requests: each may throw, or answer. */
class Server {
  requests = [];
  faults = [];
  rows = [];
  runs = new Map();
  keys = new Map();
  events = [];
  streams = new Set();
  threads = 0;
  status = "queued";
  refuses = null; // an answer to all
  older = null;

  fetch = async (url, init) => {
    const { pathname, search } = new URL(url, "http://test");
    const asked = { method: init.method, path: pathname.replace("/api/", ""), search, headers: init.headers, body: init.body && JSON.parse(init.body) };
    this.requests.push(asked);
    if (init.signal.aborted) throw new DOMException("aborted", "AbortError");
    if (this.refuses) return this.refuses();
    const fault = this.faults.length && this.faults[0].when(asked) ? this.faults.shift() : null;
    if (fault?.before) return fault.before(asked, init);
    const response = this.answer(asked, init);
    return fault?.after ? fault.after(response) : response;
  };

  fault(path, parts) {
    this.faults.push({ when: (asked) => asked.path.endsWith(path), ...parts });
  }

  answer(asked, { signal }) {
    const { method, path, headers, body } = asked;
    if (path.endsWith("/stream")) return this.stream(headers.get("Last-Event-ID"), path, signal);
    if (method === "GET" && path.endsWith("/messages")) {
      const before = asked.search.includes("cursor=older");
      const rows = before ? this.older : this.rows;
      const next = !before && this.older ? "https://elsewhere.example/api/threads/t/messages?cursor=older" : null;
      return Response.json({ results: [...rows].reverse(), next, previous: null, cursor: this.cursor });
    }
    if (method === "GET" && path === "runs") return Response.json({ results: [...this.runs.values()].reverse(), next: null });
    if (method === "GET") return Response.json(this.runs.get(path.split("/")[1]));
    const key = headers.get("Idempotency-Key");
    const made = this.keys.get(key) ?? this.create(path, body);
    if (key) this.keys.set(key, made);
    return body.stream ? this.stream("0", `runs/${made.id}/stream`, signal) : Response.json(made, { status: 202 });
  }

  create(path, body) {
    if (path === "threads") {
      this.threads += 1;
      return { id: "t", agent: body.agent };
    }
    if (path.endsWith("/cancel")) {
      const run = this.runs.get(path.split("/")[1]);
      run.status = "cancelled";
      this.say(run.id, { type: "run.cancelled", stop_reason: "cancelled" });
      return run;
    }
    const run = { id: `r${this.runs.size + 1}`, thread: "t", status: this.status, stop_reason: null, error: null, output: null, last_seq: 0 };
    this.runs.set(run.id, run);
    if (body.input) this.said = { type: "message.completed", message: `u${this.runs.size}`, role: "user", content: [{ type: "text", text: body.input }], client_id: body.client_id };
    if (this.tells) this.tell(run.id);
    return run;
  }

  tells = true;
  tell(run) {
    this.say(run, { type: "run.queued", reason: "start" }, this.said);
  }

  get cursor() {
    const last = this.at ?? this.events.at(-1);
    return last ? { run: last.run, seq: last.seq } : { run: null, seq: 0 };
  }

  say(run, ...events) {
    for (const event of events) {
      const seq = this.events.filter((each) => each.run === run).length + 1;
      this.events.push({ seq, run, at: AT, ...event });
    }
    for (const stream of this.streams) stream();
  }

  stream(after, path, signal) {
    const ofRun = path.startsWith("runs/");
    const [run, seq] = ofRun ? [path.split("/")[1], after ?? "0"] : (after ?? ":0").split(":");
    let next = this.events.findIndex((each) => each.run === run && each.seq === Number(seq)) + 1;
    let send;
    const body = new ReadableStream({
      start: (controller) => {
        send = () => {
          if (signal.aborted) return void this.streams.delete(send);
          for (; next < this.events.length; next += 1) {
            const { raw, ...event } = this.events[next];
            if (ofRun && event.run !== run) continue;
            controller.enqueue(new TextEncoder().encode(raw ?? `id: ${event.run}:${event.seq}\nevent: ${event.type}\ndata: ${JSON.stringify(event)}\n\n`));
          }
        };
        send.cut = () => controller.error(new TypeError("terminated"));
        send.close = () => controller.close();
        signal.addEventListener("abort", () => {
          this.streams.delete(send);
          try { send.cut(); } catch { /* it was closed */ }
        });
        this.streams.add(send);
        controller.enqueue(new TextEncoder().encode(": longhaul\nretry: 1000\n\n"));
        send();
      },
    });
    return new Response(body, { headers: { "Content-Type": "text/event-stream", "X-Run-Id": run } });
  }

  cut() {
    for (const stream of [...this.streams]) {
      this.streams.delete(stream);
      stream.cut();
    }
  }
}

const open = [];
function opened(server, options = {}) {
  const patience = { baseMs: 5, maxMs: 20, answerMs: 2000, ...options.patience };
  const thread = openThread({ baseUrl: "http://test/api", thread: "t", agent: "a", smooth: false, fetch: server.fetch, ...options, patience });
  open.push(thread);
  return thread;
}

afterEach(async () => {
  for (const thread of open.splice(0)) thread.close();
  await new Promise((resolve) => setImmediate(resolve));
  assert.deepEqual(unhandled, []);
});

/** Return the first state that satisfies. */
function until(thread, what) {
  return new Promise((resolve, reject) => {
    let leave = () => {};
    const timer = setTimeout(() => reject(new Error(`never: ${what}\n${JSON.stringify(thread.getSnapshot(), null, 1)}`)), 20_000);
    leave = thread.subscribe((state) => {
      if (!what(state)) return;
      clearTimeout(timer);
      queueMicrotask(() => leave());
      resolve(state);
    });
  });
}

const row = (id, text, more = {}) => ({ id, thread: "t", run: "r1", step: 1, role: "assistant", status: "completed", content: [{ type: "text", text }], metadata: {}, client_id: null, created_at: AT, ...more });
const delta = (text, message = "m") => ({ type: "text.delta", message, text });
const texts = (state) => state.messages.map(textOf);
const lost = () => { throw new TypeError("fetch failed"); };
const status = (code, headers = {}) => () => Response.json({ type: "error", errors: [{ code: "told", detail: `It is ${code}.`, attr: null }] }, { status: code, headers });

test("snapshot, then stream: each character once, over cuts", async () => {
  const server = new Server();
  server.runs.set("r1", { id: "r1", status: "running", stop_reason: null, error: null, output: null });
  server.say("r1", { type: "leg.started" }, { type: "message.created", message: "m", role: "assistant", step: 1 }, delta("Hel"));
  server.rows = [row("u", "Hi", { role: "user" }), row("m", "Hel", { status: "pending" })];
  const thread = opened(server);
  const first = await until(thread, (state) => state.connection === "open" && state.run);
  assert.deepEqual([texts(first), first.status, first.isRunning], [["Hi", "Hel"], "running", true]);
  server.say("r1", delta("lo"));
  const second = await until(thread, (state) => texts(state)[1] === "Hello");
  assert.equal(second.messages[0], first.messages[0]);
  for (const piece of [" you", ", ", "th", "ere"]) {
    server.cut();
    server.say("r1", delta(piece));
    await until(thread, (state) => texts(state)[1].endsWith(piece));
  }
  const cursors = server.requests.filter(({ path }) => path.endsWith("/stream")).map(({ headers }) => headers.get("Last-Event-ID"));
  assert.deepEqual(cursors, ["r1:3", "r1:4", "r1:5", "r1:6", "r1:7"], "nothing is asked for twice");
  server.say("r1", { type: "message.completed", message: "m", role: "assistant", content: [{ type: "text", text: "Hello you, there" }] });
  server.say("r1", { type: "run.completed", stop_reason: "end_turn", output: "Hello you, there" });
  const last = await until(thread, (state) => !state.isRunning);
  assert.deepEqual([texts(last), last.status, last.run.output], [["Hi", "Hello you, there"], "completed", "Hello you, there"]);
  assert.equal(thread.getSnapshot(), thread.getSnapshot());
});

test("what is sent is shown at once, and what was saved takes its place", async () => {
  const server = new Server();
  const thread = opened(server);
  await until(thread, (state) => state.connection === "open");
  const sent = thread.send("Where is it?");
  const before = thread.getSnapshot();
  assert.deepEqual([texts(before), before.messages[0].status, before.isRunning], [["Where is it?"], "sending", true]);
  assert.equal((await sent).id, "r1");
  const after = await until(thread, (state) => state.messages[0]?.status === "completed");
  assert.deepEqual([after.messages.length, after.messages[0].id, after.messages[0].key], [1, "u1", before.messages[0].key]);
  assert.deepEqual([after.status, after.isRunning], ["queued", true]);
});

test("a send whose answer is lost is sent again under its key, and is there once", async () => {
  const server = new Server();
  const thread = opened(server);
  server.fault("/runs", { after: lost });
  server.fault("/runs", { before: lost });
  server.fault("/runs", { before: status(503) });
  await thread.send("One");
  const posts = server.requests.filter(({ method }) => method === "POST");
  assert.equal(posts.length, 4);
  assert.equal(new Set(posts.map(({ headers }) => headers.get("Idempotency-Key"))).size, 1);
  assert.equal(server.runs.size, 1);
  assert.deepEqual(texts(await until(thread, (state) => state.messages[0]?.status === "completed")), ["One"]);
});

test("messages arrive in the order in which they were sent", async () => {
  const server = new Server();
  const thread = opened(server);
  server.fault("/runs", { before: async (asked, init) => {
    await new Promise((resolve) => setTimeout(resolve, 30)); // so that the second one could overtake it
    return server.answer(asked, init);
  } });
  await Promise.all([thread.send("One"), thread.send("Two")]);
  assert.deepEqual(texts(await until(thread, (state) => state.messages.every(({ status }) => status === "completed"))), ["One", "Two"]);
});

test("a listener that throws does not end the stream, nor keep others from hearing", async () => {
  const server = new Server();
  const reported = [];
  globalThis.reportError = (error) => reported.push(error.message);
  const thread = opened(server, { onEvent: () => { throw new Error("of an event"); } });
  let calls = 0;
  thread.subscribe(() => { if ((calls += 1) > 1) throw new Error("of a state"); });
  thread.send("One");
  await until(thread, (state) => state.messages[0]?.status === "completed");
  thread.send("Two");
  await until(thread, (state) => state.messages[1]?.status === "completed");
  thread.close();
  delete globalThis.reportError;
  assert.deepEqual([...new Set(reported)].sort(), ["of a state", "of an event"]);
});

test("a send that has failed says so, and goes out again under the same key", async () => {
  const server = new Server();
  const thread = opened(server, { patience: { tries: 2 } });
  await until(thread, (state) => state.connection === "open");
  server.tells = false;
  server.fault("/runs", { after: lost }); // it has taken effect
  server.fault("/runs", { before: lost });
  const sent = thread.send("One");
  await assert.rejects(sent, (error) => error instanceof ConnectionLost && error.code === "connection_lost");
  const failed = thread.getSnapshot();
  assert.deepEqual([failed.messages[0].status, failed.messages[0].error.code, failed.isRunning, failed.error], ["failed", "connection_lost", false, null]);
  assert.equal((await thread.resend(failed.messages[0].key)).id, "r1");
  const again = thread.getSnapshot();
  assert.deepEqual([again.messages[0].status, again.messages[0].error, server.runs.size], ["sent", undefined, 1]);
  server.tell("r1");
  await until(thread, (state) => state.messages[0].status === "completed");
  assert.equal(await thread.resend(failed.messages[0].key), null, "it has arrived");
  // Of one that was saved so long ago that its key is forgotten, the list says so.
  server.fault("/runs", { before: lost });
  server.fault("/runs", { before: lost });
  await assert.rejects(thread.send("Two"));
  const key = thread.getSnapshot().messages[1].key;
  server.rows = [row("u2", "Two", { role: "user", client_id: key })];
  assert.equal(await thread.resend(key), null);
  assert.equal(server.runs.size, 1);
});

test("a refused send is not tried again, and can be taken away", async () => {
  const server = new Server();
  const thread = opened(server);
  server.fault("/runs", { before: status(400) });
  thread.send("One"); // whoever ignores the promise is not punished for it
  const failed = await until(thread, (state) => state.messages[0]?.status === "failed");
  assert.deepEqual([failed.messages[0].error.status, failed.messages[0].error.detail], [400, "It is 400."]);
  thread.discard(failed.messages[0].key);
  assert.deepEqual(thread.getSnapshot().messages, []);
});

test("an event that comes before the answer, or in its place", async () => {
  const server = new Server();
  const thread = opened(server, { patience: { tries: 1 } });
  await until(thread, (state) => state.connection === "open");
  server.fault("/runs", { after: async () => {
    await until(thread, (state) => state.messages[0]?.status === "completed");
    return lost();
  } });
  assert.equal((await thread.send("One")).id, "r1");
  assert.deepEqual(thread.getSnapshot().messages.map(({ status }) => status), ["completed"]);
});

test("the first send makes the thread, once, and messages keep their order", async () => {
  const server = new Server();
  const thread = opened(server, { thread: null, newThread: { title: "T" } });
  assert.deepEqual([thread.getSnapshot().connection, thread.id], ["idle", null]);
  server.fault("threads", { after: lost });
  const sent = [thread.send("One"), thread.send("Two")];
  assert.deepEqual((await Promise.all(sent)).map(({ id }) => id), ["r1", "r2"]);
  const made = server.requests.filter(({ method, path }) => method === "POST" && path === "threads");
  assert.equal(new Set(made.map(({ headers }) => headers.get("Idempotency-Key"))).size, 1);
  assert.deepEqual(made[0].body, { agent: "a", title: "T" });
  const state = await until(thread, (state) => state.messages.every(({ status }) => status === "completed"));
  assert.deepEqual([state.thread, texts(state)], ["t", ["One", "Two"]]);
});

test("runs that are over before the messages are loaded are over", async () => {
  const server = new Server();
  const thread = opened(server, { thread: null });
  let over = () => {};
  const ended = new Promise((resolve) => (over = resolve));
  server.fault("/messages", { before: async (asked, init) => {
    await ended; // the list comes so late that its cursor is behind all of them
    return server.answer(asked, init);
  } });
  await thread.send("One");
  server.status = "held";
  await thread.send("Two");
  await thread.send("Three");
  assert.equal(thread.getSnapshot().isRunning, true);
  for (const run of server.runs.values()) {
    server.say(run.id, { type: "run.completed" });
    run.status = "completed";
  }
  server.rows = server.events.filter(({ message }) => message).map((event) => row(event.message, textOf(event), { role: "user", client_id: event.client_id }));
  over();
  const state = await until(thread, (state) => !state.isRunning && state.connection === "open");
  assert.deepEqual([texts(state), state.status, state.run.id], [["One", "Two", "Three"], "completed", "r3"]);
});

test("a thread whose making has failed is made under the same key", async () => {
  const server = new Server();
  const thread = opened(server, { thread: null, patience: { tries: 1 } });
  server.fault("threads", { after: lost });
  await assert.rejects(thread.send("One"));
  await thread.send("Two");
  await thread.resend(thread.getSnapshot().messages.find(({ status }) => status === "failed").key);
  const state = await until(thread, (state) => state.messages.every(({ status }) => status === "completed"));
  assert.deepEqual([texts(state), server.threads], [["Two", "One"], 1]);
});

test("what the thread does not show is not shown", async () => {
  const server = new Server();
  const thread = opened(server);
  await until(thread, (state) => state.connection === "open");
  server.say("r1", { type: "message.completed", message: "u", role: "user", content: [], shown: false }, { type: "run.completed" });
  assert.deepEqual((await until(thread, (state) => state.status === "completed")).messages, []);
});

test("stop cancels what waits for its turn, where nothing lives", async () => {
  const server = new Server();
  server.tells = false;
  server.status = "held";
  const thread = opened(server);
  await thread.send("One");
  assert.deepEqual([thread.getSnapshot().status, thread.getSnapshot().isRunning], [null, true]);
  assert.equal((await thread.stop()).id, "r1");
  assert.equal((await until(thread, (state) => state.status === "cancelled")).isRunning, false);
});

test("stop cancels what lives, also what is just being sent", async () => {
  const server = new Server();
  const thread = opened(server);
  await until(thread, (state) => state.connection === "open");
  assert.equal(await thread.stop(), null, "nothing lives");
  thread.send("One");
  assert.equal((await thread.stop("enough")).status, "cancelled");
  assert.deepEqual(server.requests.at(-1).body, { reason: "enough" });
  const state = await until(thread, (state) => state.status === "cancelled");
  assert.equal(state.isRunning, false);
  assert.equal((await thread.resume("go on")).id, "r2");
  assert.equal(server.requests.at(-1).path, "runs/r1/resume");
  assert.equal((await until(thread, (state) => state.run.id === "r2")).isRunning, true);
});

test("an action that fails stands in the state", async () => {
  const server = new Server();
  const thread = opened(server);
  await until(thread, (state) => state.connection === "open");
  await thread.send("One");
  server.fault("/cancel", { before: status(403) });
  thread.stop();
  const state = await until(thread, (state) => state.error);
  assert.deepEqual([state.error.status, state.connection], [403, "open"]);
  await thread.stop();
  assert.equal(thread.getSnapshot().error, null);
});

for (const code of [400, 401, 403, 404]) {
  test(`a stream ends for good with ${code}, until it is opened again`, async () => {
    const server = new Server();
    const thread = opened(server);
    await until(thread, (state) => state.connection === "open");
    server.refuses = status(code);
    server.cut();
    const state = await until(thread, (state) => state.connection === "closed");
    assert.deepEqual([state.error instanceof Refused, state.error.status, state.error.code], [true, code, "told"]);
    const asked = server.requests.length;
    await new Promise((resolve) => setTimeout(resolve, 60)); // several times the longest wait
    assert.equal(server.requests.length, asked);
    server.refuses = null;
    if (code === 401) thread.send("Hi"); // signed in again
    else thread.open();
    assert.equal((await until(thread, (state) => state.connection === "open")).error, null);
  });
}

test("what passes is tried again, not before the server allows it", async () => {
  const server = new Server();
  for (const code of [500, 502, 503]) server.fault("/stream", { before: status(code) });
  server.fault("/stream", { before: status(429, { "Retry-After": "1" }) });
  const begun = performance.now();
  const thread = opened(server);
  await until(thread, (state) => state.connection === "open");
  assert.ok(performance.now() - begun >= 990);
  assert.equal(server.requests.filter(({ path }) => path.endsWith("/stream")).length, 5);
});

test("a stream without a byte is dead", async () => {
  const server = new Server();
  const thread = opened(server, { patience: { stallMs: 40 } });
  await until(thread, (state) => state.connection === "reconnecting");
  await until(thread, (state) => state.connection === "open");
  await assert.rejects(async () => {
    for await (const _ of streamRun({ baseUrl: "http://test/api", run: "r", fetch: server.fetch, patience: { stallMs: 20, streamTries: 1 } }));
  }, (error) => error.code === "stalled");
});

test("after a gap the messages are loaded anew", async () => {
  const server = new Server();
  server.say("r1", { type: "leg.started" });
  const thread = opened(server);
  await until(thread, (state) => state.connection === "open");
  server.rows = [row("m", "All of it")];
  server.events.push({ run: "r1", seq: 2, type: "x" }, { run: "r1", seq: 3, type: "x", raw: 'event: resume_gap\ndata: {"type":"resume_gap","from":2,"to":3}\n\n' });
  server.at = { run: "r1", seq: 3 };
  server.events.splice(1, 1);
  server.say("r1");
  assert.deepEqual(texts(await until(thread, (state) => state.messages.length)), ["All of it"]);
  await until(thread, (state) => state.connection === "open");
  assert.equal(server.requests.at(-1).headers.get("Last-Event-ID") ?? server.requests.at(-2).headers.get("Last-Event-ID"), "r1:3");
});

test("older messages are loaded when they are asked for, and from the same server", async () => {
  const server = new Server();
  server.rows = [row("3", "three")];
  server.older = [row("1", "one"), row("2", "two")];
  const thread = opened(server);
  assert.equal((await until(thread, (state) => state.messages.length)).hasOlder, true);
  assert.equal(await thread.loadOlder(), false);
  assert.deepEqual([texts(thread.getSnapshot()), thread.getSnapshot().hasOlder], [["one", "two", "three"], false]);
  assert.ok(server.requests.some(({ path, search }) => path === "threads/t/messages" && search === "?cursor=older"));
});

/** Let 16 ms be from frame to frame, however slow the machine is. Returns what ends that. */
function frames() {
  const { now } = performance;
  let at = 0;
  performance.now = () => at;
  globalThis.requestAnimationFrame = (draw) => setImmediate(() => draw((at += 16)));
  globalThis.cancelAnimationFrame = clearImmediate;
  return () => {
    performance.now = now;
    delete globalThis.requestAnimationFrame;
  };
}

test("text comes at an even pace, and the end of a message flushes it", async () => {
  const server = new Server();
  const real = frames();
  try {
    const thread = opened(server, { smooth: true });
    await until(thread, (state) => state.connection === "open");
    for (const [at, one] of ["\u{1f600}", "\u{1f469}\u{200d}\u{1f467}", "\u{1f1e9}\u{1f1ea}", "e\u0301", "\u65e5"].entries()) {
      const message = `m${at}`;
      const shown = [];
      const leave = thread.subscribe((state) => state.messages[at] && shown.push(textOf(state.messages[at]).length));
      const long = one.repeat(120);
      server.say("r1", { type: "message.created", message, role: "assistant" }, delta(long, message));
      const partly = await until(thread, (state) => state.messages[at] && textOf(state.messages[at]));
      assert.ok(textOf(partly.messages[at]).length < long.length);
      await until(thread, (state) => textOf(state.messages[at]) === long);
      assert.ok(new Set(shown).size >= 5, `${shown}`);
      assert.deepEqual(shown.filter((length) => length % one.length), [], `no half of ${one}`);
      assert.deepEqual(shown, [...shown].sort((a, b) => a - b), "what is shown stays");
      leave();
      server.say("r1", delta("x".repeat(500), message));
      const whole = `${long}${"x".repeat(500)}`;
      server.say("r1", { type: "message.completed", message, role: "assistant", content: [{ type: "text", text: whole }] });
      const done = await until(thread, (state) => state.messages[at].status === "completed");
      assert.equal(textOf(done.messages[at]), whole);
    }
    const now = thread.getSnapshot();
    await new Promise((resolve) => setTimeout(resolve, 50));
    assert.equal(thread.getSnapshot(), now);
    thread.close();
  } finally {
    real();
  }
});

test("what is not shown draws no frames, and what is taken away none any more", async () => {
  const server = new Server();
  const real = frames();
  try {
    let drawn = 0;
    const frame = globalThis.requestAnimationFrame;
    globalThis.requestAnimationFrame = (draw) => ((drawn += 1), frame(draw));
    const thread = opened(server, { smooth: true });
    await until(thread, (state) => state.connection === "open");
    server.say("r1", { type: "message.created", message: "h", role: "assistant", shown: false }, delta("Hush. ".repeat(50), "h"), { type: "run.completed" });
    await until(thread, (state) => state.status === "completed");
    assert.deepEqual([drawn, thread.getSnapshot().messages], [0, []]);
    // A worker dies in the middle of a message, and another says it anew.
    server.say("r2", { type: "message.created", message: "a", role: "assistant" }, delta("So far so ".repeat(50), "a"));
    await until(thread, (state) => state.messages[0] && textOf(state.messages[0]));
    server.say("r2", { type: "message.discarded", message: "a" }, { type: "message.created", message: "b", role: "assistant" }, delta("It is ".repeat(50), "b"));
    const anew = await until(thread, (state) => state.messages.some(({ id }) => id === "b"));
    assert.deepEqual(anew.messages.map(({ id }) => id), ["b"]);
    await until(thread, (state) => state.messages[0] && textOf(state.messages[0]) === "It is ".repeat(50));
    const before = drawn;
    await new Promise((resolve) => setTimeout(resolve, 50));
    assert.equal(drawn, before);
    thread.close();
  } finally {
    real();
  }
});

test("a subscriber hears the state of now, and nothing after it has left", async () => {
  const server = new Server();
  const thread = opened(server);
  const heard = [];
  const leave = thread.subscribe((state) => heard.push(state));
  assert.deepEqual(heard, [thread.getSnapshot()]);
  leave();
  await until(thread, (state) => state.connection === "open");
  assert.equal(heard.length, 1);
  thread.close();
  assert.equal(thread.getSnapshot().connection, "closed");
  assert.equal(server.streams.size, 0);
});

test("an abort ends all, at any moment", async () => {
  for (let wait = 0; wait < 80; wait += 1) {
    const server = new Server();
    const controller = new AbortController();
    const thread = opened(server, { signal: controller.signal });
    for (let n = 0; n < wait; n += 1) await Promise.resolve();
    controller.abort();
    for (let n = 0; n < 5; n += 1) await new Promise((resolve) => setImmediate(resolve));
    assert.deepEqual([thread.getSnapshot().connection, thread.getSnapshot().error, server.streams.size], ["closed", null, 0]);
  }
});

test("a run is streamed to its end, over cuts, each event once", async () => {
  const server = new Server();
  const base = { baseUrl: "http://test/api", fetch: server.fetch, patience: { baseMs: 2, maxMs: 5, streamTries: 3 } };
  server.said = { type: "usage" };
  server.fault("runs", { after: lost });
  const seen = [];
  const told = [];
  for await (const event of streamRun({ ...base, start: { agent: "a", input: "Hi" }, onRun: (run) => told.push(run) })) {
    seen.push(event.seq);
    if (seen.length < 20) {
      server.say("r1", delta("x"));
      if (seen.length % 3 === 0) server.cut();
    } else if (seen.length === 20) server.say("r1", { type: "run.completed" });
  }
  assert.deepEqual(seen, server.events.map(({ seq }) => seq));
  assert.deepEqual([told, server.runs.size], [["r1"], 1]);
  // One that has been told whole already.
  server.fault("/stream", { before: () => new Response(null, { status: 204 }) });
  for await (const event of streamRun({ ...base, run: "r1", after: seen.length })) assert.fail(event);
});

test("events that are missing are not passed over in silence", async () => {
  const server = new Server();
  server.say("r1", delta("a"), delta("b"), delta("c"));
  server.events.splice(1, 1);
  const base = { baseUrl: "http://test/api", fetch: server.fetch };
  const seen = [];
  await assert.rejects(async () => {
    for await (const event of streamRun({ ...base, run: "r1" })) seen.push(event.seq);
  }, (error) => error instanceof LogGap && error.from === 2 && error.to === 2);
  assert.deepEqual(seen, [1]);
  await assert.rejects(async () => {
    for await (const _ of streamThread({ ...base, thread: "t" }));
  }, LogGap);
});

/** Return what a run's stream yields when its answers are these, one a connection; an answer is one piece. */
async function yielded(answers, options = {}) {
  const asked = [];
  const fetch = async (url, { headers }) => {
    asked.push(headers.get("Last-Event-ID"));
    return new Response(answers.shift().map((event) => `data: ${JSON.stringify(event)}\n\n`).join(""), { headers: { "Content-Type": "text/event-stream" } });
  };
  const seen = [];
  let error = null;
  try {
    const base = { baseUrl: "http://test/api", fetch, patience: { baseMs: 1, maxMs: 1 } };
    for await (const event of streamRun({ ...base, run: "r1", ...options })) seen.push(event.seq ?? event.type);
  } catch (raised) {
    error = raised;
  }
  return { seen, asked, error };
}

test("ranges follow one another, and what comes twice is passed over", async () => {
  const event = (seq, more = {}) => ({ seq, run: "r1", type: "text.delta", ...more });
  const last = event(9, { type: "run.completed" });
  const ranges = await yielded([[event(1), event(4, { from_seq: 2 })], [event(4), event(5), event(8, { from_seq: 6 }), last]]);
  assert.deepEqual([ranges.seen, ranges.asked, ranges.error], [[1, 4, 5, 8, 9], ["0", "4"], null]);
  const gap = await yielded([[event(1), event(2), event(6, { from_seq: 4 })]]);
  assert.deepEqual([gap.seen, gap.error.from, gap.error.to], [[1, 2], 3, 5], "what came before the gap is not lost with it");
  const told = await yielded([[{ type: "resume_gap", from: 3, to: 8 }], [last]], { after: 2 });
  assert.deepEqual([told.seen, told.asked], [["resume_gap", 9], ["2", "8"]]);
});

test("no error holds the key", async () => {
  const secret = "lh_secret";
  const server = new Server();
  const base = { baseUrl: "http://user:lh_secret@nowhere.invalid/api", apiKey: `${secret}\n${secret}` };
  const errors = [];
  const tried = async (options) => request({ patience: { tries: 1 }, ...options }, "GET", "runs").catch((error) => errors.push(error));
  await tried(base);
  await tried({ ...base, apiKey: secret });
  await tried({ apiKey: secret, baseUrl: "http://127.0.0.1:1/api" });
  await tried({ apiKey: secret, baseUrl: "http://test/api", fetch: server.fetch, headers: { "X-\u00e4": secret } });
  server.refuses = status(401);
  await tried({ apiKey: secret, baseUrl: "http://test/api", fetch: server.fetch });
  assert.equal(errors.length, 5);
  for (const error of errors) {
    const told = [error.message, error.stack, String(error.cause), JSON.stringify(error)].join();
    assert.ok(!told.includes(secret), told);
  }
});

test("a server that leads elsewhere is refused, and nobody else hears a key", async () => {
  const heard = [];
  const listening = async (answer) => {
    const server = createServer((asked, reply) => {
      heard.push([answer.name, asked.method]);
      reply.writeHead(...answer(asked)).end("{}");
    });
    await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
    return server;
  };
  const other = await listening(function other() { return [200, { "Content-Type": "application/json" }]; });
  const first = await listening(function first() { return [307, { Location: `http://127.0.0.1:${other.address().port}/api/runs` }]; });
  try {
    const options = { baseUrl: `http://127.0.0.1:${first.address().port}/api`, apiKey: "lh_secret", headers: { "X-Tenant": "ours" } };
    const redirected = (error) => error instanceof Refused && error.code === "redirected";
    await assert.rejects(request(options, "GET", "runs"), redirected);
    await assert.rejects(request(options, "POST", "runs", { body: {} }), redirected);
    await assert.rejects(streamRun({ ...options, run: "r" }).next(), redirected);
    assert.deepEqual(heard, [["first", "GET"], ["first", "POST"], ["first", "GET"]]);
  } finally {
    for (const server of [first, other]) {
      server.closeAllConnections();
      server.close();
    }
  }
});

test("who is asked to wait for very long does not come at once, nor waits without a word", async () => {
  const server = new Server();
  server.fault("/stream", { before: status(429, { "Retry-After": "9999999" }) }); // more than a timer of the engine holds
  const thread = opened(server);
  await until(thread, (state) => state.connection === "reconnecting");
  await new Promise((resolve) => setTimeout(resolve, 60)); // several times the longest wait
  assert.equal(server.requests.filter(({ path }) => path.endsWith("/stream")).length, 1);
  server.fault("/runs", { before: status(429, { "Retry-After": "7200" }) });
  await assert.rejects(thread.send("One"), (error) => error.status === 429);
  assert.equal(thread.getSnapshot().messages[0].status, "failed");
});

test("a key that stands for another request ends a start", async () => {
  const server = new Server();
  const conflict = { type: "error", errors: [{ code: "idempotency_conflict", detail: "Used.", attr: null }] };
  server.refuses = () => Response.json(conflict, { status: 409 });
  const base = { baseUrl: "http://test/api", fetch: server.fetch, patience: { baseMs: 1, maxMs: 1, tries: 3 } };
  await assert.rejects(streamRun({ ...base, start: { input: "Hi" }, idempotencyKey: "mine" }).next(), (error) => error.code === "idempotency_conflict");
  assert.equal(server.requests.length, 3);
});

test("what is deleted by an answer that was lost is deleted", async () => {
  const server = new Server();
  const options = { baseUrl: "http://test/api", fetch: server.fetch, patience: { baseMs: 1, maxMs: 1 } };
  server.fault("messages/m", { before: lost });
  server.fault("messages/m", { before: status(404) });
  assert.equal(await request(options, "DELETE", "messages/m"), null);
  server.fault("messages/m", { before: status(404) });
  await assert.rejects(request(options, "DELETE", "messages/m"), (error) => error.status === 404);
});

test("an event that names another run is one of the run whose log it is in", async () => {
  const server = new Server();
  const child = { seq: 2, run: "child", at: AT, type: "tool_call.awaiting_child", tool_call: "c", name: "ask", message: "m" };
  server.say("r1", { type: "run.queued" }, { ...child, run: "r1", raw: `id: r1:2\nevent: ${child.type}\ndata: ${JSON.stringify(child)}\n\n` }, { type: "run.completed" });
  const base = { baseUrl: "http://test/api", fetch: server.fetch };
  const ofRun = [];
  for await (const event of streamRun({ ...base, run: "r1" })) ofRun.push([event.seq, event.run]);
  assert.deepEqual(ofRun, [[1, "r1"], [2, "child"], [3, "r1"]]);
  const ofThread = [];
  for await (const event of streamThread({ ...base, thread: "t" })) if (ofThread.push(event.seq) === 3) break;
  assert.deepEqual(ofThread, [1, 2, 3]);
});

test("a server that tells but what was told before is asked ever more seldom", async () => {
  const answer = (seqs) => seqs.map((seq) => `data: ${JSON.stringify({ seq, run: "r1", type: seq === 3 ? "run.completed" : "usage" })}\n\n`).join("");
  const answers = [[1, 2], [1, 2], [1], [], [1, 2], [1, 2, 3]];
  const fetch = async () => new Response(answer(answers.shift()), { headers: { "Content-Type": "text/event-stream" } });
  const waits = [];
  const { random } = Math;
  Math.random = () => 1;
  const real = globalThis.setTimeout;
  globalThis.setTimeout = (call, ms, ...rest) => (ms < 1000 && waits.push(ms), real(call, ms < 1000 ? 0 : ms, ...rest));
  try {
    const seen = [];
    for await (const event of streamRun({ baseUrl: "http://test/api", fetch, run: "r1", patience: { baseMs: 10, maxMs: 500 } })) seen.push(event.seq);
    assert.deepEqual([seen, waits], [[1, 2, 3], [10, 20, 40, 80, 160]]);
  } finally {
    Math.random = random;
    globalThis.setTimeout = real;
  }
});
