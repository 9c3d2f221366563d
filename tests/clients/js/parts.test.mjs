// The parts of clients/js that need no network: frames, fold, pace, backoff. Run by test_parts.py, or by `node --test`.

import assert from "node:assert/strict";
import { test } from "node:test";
import { Backoff, ConnectionLost, Fold, FrameParser, Pace, Refused, fold, textOf } from "../../../clients/js/longhaul.js";

const bytes = (text) => new TextEncoder().encode(text);
const LOG = [
  ": longhaul", "retry: 1000", "",
  "id: 1", "event: text.delta", 'data: {"text":"Gr\u00fc\u00dfe, \u{1f600} \u2028 \u65e5\u672c"}', "",
  ": ping", "",
  "id: 0190:2", "event: text.delta", 'data: {"seq":2,', 'data: "more": "lines"}', "",
  "event:ping", "data:{}", "",
  "id: 3", "event: half",
];

for (const end of ["\n", "\r\n", "\r"]) {
  test(`frames come whole wherever the bytes are cut, with ${JSON.stringify(end)}`, () => {
    const whole = bytes(LOG.join(end));
    const expected = new FrameParser().push(whole);
    assert.deepEqual(expected.map(({ id, event, comment }) => id ?? event ?? comment), ["longhaul", "1", "ping", "0190:2", "ping"]);
    assert.equal(JSON.parse(expected[1].data).text, "Gr\u00fc\u00dfe, \u{1f600} \u2028 \u65e5\u672c");
    assert.deepEqual(JSON.parse(expected[3].data), { seq: 2, more: "lines" });
    for (let cut = 0; cut <= whole.length; cut += 1) {
      const parser = new FrameParser();
      assert.deepEqual([...parser.push(whole.subarray(0, cut)), ...parser.push(whole.subarray(cut))], expected, `cut at ${cut}`);
    }
    const single = new FrameParser();
    assert.deepEqual([...whole].flatMap((byte) => single.push(Uint8Array.of(byte))), expected, "byte by byte");
  });
}

test("what a cut has left of a frame is no frame", () => {
  const whole = bytes('id: 1\nevent: text.delta\ndata: {"text":"x"}\n\n');
  for (let cut = 0; cut < whole.length; cut += 1) assert.deepEqual(new FrameParser().push(whole.subarray(0, cut)), []);
});

test("a long frame comes in many pieces, and one without an end is none", () => {
  const text = "\u{1f600}\u00fc".repeat(200_000);
  const whole = bytes(`id: 1\ndata: ${JSON.stringify({ text })}\n\n: ping\n\n`);
  const parser = new FrameParser();
  const found = [];
  for (let from = 0; from < whole.length; from += 4099) found.push(...parser.push(whole.subarray(from, from + 4099)));
  assert.deepEqual([found.length, JSON.parse(found[0].data).text === text, found[1].comment], [2, true, "ping"]);
  const piece = new Uint8Array(1 << 20).fill(120);
  assert.throws(() => {
    for (let n = 0; n < 70; n += 1) parser.push(piece);
  }, (error) => error instanceof ConnectionLost && error.code === "unexpected_answer");
});

const at = "2026-11-21T10:00:00Z";
const log = (...events) => events.map((event, n) => ({ seq: n + 1, run: "r", at, ...event }));

test("text is the sum of its pieces, and a message what was committed", () => {
  const events = log(
    { type: "run.queued", reason: "start" },
    { type: "message.completed", message: "u", role: "user", content: [{ type: "text", text: "Hi" }], client_id: "c1" },
    { type: "leg.started", leg: 1 },
    { type: "message.created", message: "a", role: "assistant", step: 1 },
    { type: "reasoning.delta", message: "a", text: "Hm" },
    { type: "reasoning.delta", message: "a", text: "m" },
    { type: "text.delta", message: "a", text: "Hel" },
    { type: "text.delta", message: "a", text: "lo" },
  );
  const before = fold(events);
  assert.deepEqual(before[1].content, [{ type: "reasoning", text: "Hmm" }, { type: "text", text: "Hello" }]);
  assert.equal(before[1].status, "pending");
  assert.equal(before[0].key, "c1");
  assert.equal(textOf(before[1]), "Hello");
  const after = fold([...events, ...log({ type: "message.completed", message: "a", role: "assistant", content: [], partial: true })]);
  assert.deepEqual([after[1].content, after[1].status], [[], "partial"]);
  // A delta that stands for a range, and types that nobody knows, make no difference.
  const joined = [...events.slice(0, 6), { ...events[7], from_seq: 7, text: "Hello" }, { type: "new.thing", seq: 9, run: "r", at }];
  assert.deepEqual(fold(joined), before);
});

test("a discarded message takes its calls along, and a call is what its last event says", () => {
  const made = new Fold();
  const call = (id, message) => [
    { type: "message.created", message, role: "assistant", step: 1 },
    { type: "tool_call.arguments_delta", tool_call: id, name: "look", message, text: '{"n"' },
    { type: "tool_call.created", tool_call: id, name: "look", message, arguments: { n: 1 } },
    { type: "tool_call.started", tool_call: id, name: "look", message, attempt: 1 },
    { type: "tool_call.progress", tool_call: id, name: "look", message, fraction: 0.5, note: "half" },
  ];
  for (const event of log(...call("lost", "m1"), ...call("kept", "m2"))) made.apply(event);
  assert.equal(made.toolCalls.kept.fraction, 0.5);
  assert.equal(made.toolCalls.kept.argumentsText, undefined);
  made.apply({ type: "message.discarded", seq: 11, run: "r", at, message: "m1", reason: "lost" });
  made.apply({ type: "tool_call.settled", seq: 12, run: "r", at, tool_call: "kept", name: "look", message: "m2", outcome: "success", result: 1 });
  assert.deepEqual(Object.keys(made.toolCalls), ["kept"]);
  const { status, outcome, result, name } = made.toolCalls.kept;
  assert.deepEqual({ status, outcome, result, name }, { status: "settled", outcome: "success", result: 1, name: "look" });
  assert.deepEqual(made.messages.map(({ id }) => id), ["m2"]);
});

test("a snapshot knows its calls, and goes on", () => {
  const row = { role: "assistant", run: "r", step: 1, client_id: null, metadata: {}, created_at: at, thread: "t" };
  const rows = [
    { ...row, id: "1", status: "completed", content: [{ type: "tool_call", tool_call: "c", name: "look", arguments: {} }] },
    { ...row, id: "2", role: "tool", status: "completed", content: [{ type: "tool_result", tool_call: "c", name: "look", outcome: "success", result: 7 }] },
    { ...row, id: "3", status: "pending", content: [{ type: "text", text: "It " }] },
    { ...row, id: "4", role: "user", status: "waiting", content: [{ type: "text", text: "And?" }] },
  ];
  const made = new Fold(rows);
  assert.equal(made.toolCalls.c.result, 7);
  const first = made.messages;
  made.apply({ type: "text.delta", seq: 5, run: "r", at, message: "3", text: "is" });
  assert.equal(textOf(made.messages[2]), "It is");
  assert.equal(textOf(first[2]), "It ", "what was handed out does not change");
  assert.equal(made.messages[0], first[0], "what has not changed is the same object");
  // The one that waited gets its place behind what came before it.
  made.apply({ type: "message.created", seq: 6, run: "r", at, message: "5", role: "assistant", step: 2 });
  assert.deepEqual(made.messages.map(({ id }) => id), ["1", "2", "3", "5", "4"]);
  made.apply({ type: "message.completed", seq: 7, run: "r", at, message: "4", role: "user", content: rows[3].content });
  made.apply({ type: "message.created", seq: 8, run: "r", at, message: "6", role: "assistant", step: 3 });
  assert.deepEqual(made.messages.map(({ id }) => id), ["1", "2", "3", "5", "4", "6"]);
  const now = made.messages;
  made.reset(rows);
  assert.equal(made.messages[0], now[0], "nor after the snapshot was loaded again");
});

test("a run is what its last event says, and a retry takes away what it replaces", () => {
  const made = new Fold();
  const told = [];
  for (const event of log(
    { type: "run.queued", reason: "start" }, { type: "leg.started" }, { type: "run.waiting" },
    { type: "run.queued", reason: "tools" }, { type: "message.created", message: "a", role: "assistant" },
    { type: "message.completed", message: "a", role: "assistant", content: [] },
    { type: "run.failed", stop_reason: "error", error: { code: "model", message: "No." } },
  )) {
    made.apply(event);
    if (told.at(-1) !== made.run.status) told.push(made.run.status);
  }
  assert.deepEqual(told, ["queued", "running", "waiting", "queued", "running", "failed"]);
  assert.equal(made.run.error.code, "model");
  made.apply({ type: "run.queued", seq: 1, run: "s", at, reason: "start", superseded: "a" });
  assert.deepEqual([made.run, made.messages], [{ id: "s", status: "queued", stop_reason: null, error: null, output: null }, []]);
});

test("a run that was rolled back takes its messages and its calls away", () => {
  const made = new Fold();
  const answer = { message: "a", role: "assistant", step: 1 };
  const back = { type: "message.discarded", reason: "rolled_back" };
  for (const event of log(
    { type: "message.completed", message: "u", role: "user", content: [{ type: "text", text: "Hi" }] },
    { type: "message.created", ...answer }, { type: "message.completed", ...answer, content: [] },
    { type: "tool_call.created", tool_call: "c", name: "book", message: "a", arguments: {} },
    { ...back, message: "u", role: "user" }, { ...back, ...answer },
    { type: "run.cancelled", stop_reason: "rolled_back", error: null, output: null, next: "s" },
  )) made.apply(event);
  assert.deepEqual([made.messages, made.run.status, made.run.stop_reason], [[], "cancelled", "rolled_back"]);
});

test("what its thread does not show is known, and not shown", () => {
  const made = new Fold();
  const hidden = { type: "message.completed", message: "u", role: "user", content: [{ type: "text", text: "Hi" }], shown: false };
  const answer = { message: "a", role: "assistant", step: 1 };
  for (const event of log(
    hidden, { type: "message.created", ...answer, shown: false }, { type: "text.delta", message: "a", text: "Yes" },
    { type: "message.completed", ...answer, content: [{ type: "text", text: "Yes" }] },
    { type: "message.completed", message: "v", role: "user", content: [] },
  )) made.apply(event);
  assert.deepEqual(made.messages.map(({ id }) => id), ["u", "a", "v"]);
  assert.deepEqual(made.shown.map(({ id }) => id), ["v"]);
});

test("a call holds nothing of the attempt before", () => {
  const made = new Fold();
  const call = { tool_call: "c", name: "look", message: "m", run: "r", at };
  const told = (type, more) => made.apply({ type: `tool_call.${type}`, ...call, ...more });
  const { c } = (told("created", { arguments: {} }), told("approval_requested"), told("approved"), made.toolCalls);
  assert.equal(c.status, "requested");
  told("started", { attempt: 1 });
  told("progress", { fraction: 0.5, note: "half" });
  told("unknown", { attempt: 1 });
  told("retrying", { attempt: 2, error: { code: "x" }, by: "ann" });
  assert.deepEqual([made.toolCalls.c.status, made.toolCalls.c.error, made.toolCalls.c.by], ["retrying", { code: "x" }, "ann"]);
  told("settled", { outcome: "cancelled", result: null });
  assert.deepEqual([made.toolCalls.c.outcome, made.toolCalls.c.error, made.toolCalls.c.by], ["cancelled", undefined, undefined]);
  told("started", { attempt: 2 });
  assert.deepEqual([made.toolCalls.c.attempt, made.toolCalls.c.fraction, made.toolCalls.c.note], [2, undefined, undefined]);
});

test("calls that a cancelled message was about to make come to nothing", () => {
  const made = new Fold();
  for (const event of log(
    { type: "message.created", message: "m", role: "assistant", step: 1 },
    { type: "tool_call.arguments_delta", tool_call: "c", name: "look", message: "m", text: '{"n"' },
  )) made.apply(event);
  assert.deepEqual(Object.keys(made.toolCalls), ["c"]);
  made.apply({ type: "message.completed", seq: 3, run: "r", at, message: "m", role: "assistant", content: [], partial: true });
  assert.deepEqual([made.messages[0].status, made.toolCalls], ["partial", {}]);
});

test("what a snapshot lacks its thread does not show", () => {
  // A run with save: "none" was speaking when the thread was loaded: its message's beginning told that it is not shown.
  const row = { id: "u", role: "user", run: "r", step: null, client_id: null, metadata: {}, created_at: at, status: "completed", content: [] };
  const piece = { type: "text.delta", message: "m", text: "Hu" };
  const whole = { type: "message.completed", message: "m", role: "assistant", step: 1, content: [{ type: "text", text: "Hush." }] };
  const said = { type: "message.completed", message: "v", role: "user", content: [] };
  for (const rows of [[row], []]) {
    for (const events of [[piece, whole, said], [whole, said]]) {
      const made = new Fold(rows);
      for (const event of log(...events)) made.apply(event);
      assert.deepEqual(made.shown.map(({ id }) => id), [...rows.map(({ id }) => id), "v"]);
    }
  }
  // Nothing is known of what is not at the end of a page, nor without one.
  for (const made of [new Fold(), new Fold([{ ...row, status: "waiting" }])]) {
    for (const event of log(piece)) made.apply(event);
    assert.deepEqual(made.shown.map(({ id }) => id)[0], "m");
  }
});

/** Feed a pace with bursts, look at it each 16 ms; return what was shown when. */
function played(bursts, until) {
  const pace = new Pace();
  const shown = [];
  let length = 0;
  const due = [...bursts];
  for (let now = 0; now <= until; now += 16) {
    while (due.length && due[0][0] <= now) {
      length += due[0][1];
      pace.push(length, due.shift()[0]);
    }
    shown.push([now, pace.advance(now)]);
  }
  return { pace, shown };
}

for (const [name, bursts] of Object.entries({
  "even bursts": Array.from({ length: 20 }, (_, n) => [n * 300, 60]),
  "a great one": [[0, 20_000]],
  "many small ones": Array.from({ length: 400 }, (_, n) => [n * 10, 1 + (n % 3)]),
  "now and then": [[0, 5], [40, 300], [900, 2], [905, 500], [2500, 1], [2700, 90], [2701, 4]],
})) {
  test(`text is never more than half a second behind: ${name}`, () => {
    const { pace, shown } = played(bursts, 7000);
    const total = bursts.reduce((sum, [, count]) => sum + count, 0);
    let before = 0;
    for (const [now, count] of shown) {
      const arrived = (by) => bursts.reduce((sum, [when, size]) => sum + (when <= by ? size : 0), 0);
      assert.ok(count >= arrived(now - 500), `at ${now}: ${count} shown of ${arrived(now - 500)}`);
      assert.ok(count <= arrived(now));
      assert.ok(count >= before);
      before = count;
    }
    assert.equal(before, total);
    assert.equal(pace.behind, false);
  });
}

test("bursts become an even flow", () => {
  const { shown } = played(Array.from({ length: 20 }, (_, n) => [n * 300, 60]), 6000);
  const steps = shown.slice(1).map(([, count], n) => count - shown[n][1]);
  // Raw, each burst would be one step of 60 and eighteen of nothing.
  const later = steps.slice(60, 350);
  assert.ok(Math.max(...later) <= 10, `the greatest step is ${Math.max(...later)}`);
  assert.ok(later.filter((step) => step > 0).length > later.length * 0.7, "most frames show something new");
});

test("waits are drawn up to a bound that doubles, and what a server asks for counts", () => {
  const most = new Backoff({ baseMs: 500, maxMs: 4000 }, () => 1);
  assert.deepEqual([1, 2, 3, 4, 5].map(() => most.next()), [500, 1000, 2000, 4000, 4000]);
  most.reset();
  assert.equal(most.next(), 500);
  const least = new Backoff({ baseMs: 500, maxMs: 4000 }, () => 0);
  assert.deepEqual([least.next(), least.next(7000)], [0, 7000]);
});

test("which answers pass", () => {
  const passing = (status, code = "x") => new Refused(status, [{ code, detail: "", attr: null }]).passing;
  assert.deepEqual([400, 401, 403, 404, 413, 422, 501].filter((status) => passing(status)), []);
  assert.deepEqual([408, 425, 429, 500, 502, 503, 504].filter((status) => !passing(status)), []);
  assert.deepEqual([passing(409, "thread_busy"), passing(409, "idempotency_conflict")], [false, true]);
});

test("a snapshot says how the calls of the live run stand, and events go on from there", () => {
  const message = (id) => ({ id, role: "assistant", status: "completed", run: "r", step: 1, content: [
    { type: "tool_call", tool_call: "c1", name: "look", arguments: {} }, { type: "tool_call", tool_call: "c2", name: "send", arguments: {} },
  ] });
  const made = new Fold();
  made.reset([message("a")], [
    { tool_call: "c1", name: "look", message: "a", status: "running", attempt: 2, outcome: null, result: null, error: null, fraction: 0.5, note: "half" },
    { tool_call: "c2", name: "send", message: "a", status: "requested", attempt: 1, outcome: null, result: null, error: null, fraction: null, note: null },
  ]);
  const { c1: look, c2: send } = made.toolCalls;
  assert.deepEqual([look.status, look.attempt, look.fraction, look.note, look.run], ["running", 2, 0.5, "half", "r"]);
  assert.deepEqual([send.status, send.attempt], ["requested", undefined]);
  made.apply({ seq: 9, type: "tool_call.settled", run: "r", tool_call: "c1", name: "look", message: "a", outcome: "success", result: 3, at });
  assert.deepEqual(Object.values(made.toolCalls).map(({ status, result }) => [status, result]), [["settled", 3], ["requested", undefined]]);
});
