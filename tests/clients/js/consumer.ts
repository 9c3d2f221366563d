// A program that uses the module's types. The lines behind "wrong:" must each be refused.

import { Fold, LogGap, Refused, fold, openThread, request, streamRun, streamThread, textOf } from "longhaul-client";
import type { Message, Run, RunEvent, Thread, ThreadState, ToolCall } from "longhaul-client";

const thread: Thread = openThread({ baseUrl: "/api", thread: "t", agent: "support", apiKey: async () => "lh_x", smooth: false });

// What React's useSyncExternalStore asks for, and Svelte's store.
declare function useSyncExternalStore<T>(subscribe: (changed: () => void) => () => void, getSnapshot: () => T): T;
const state: ThreadState = useSyncExternalStore(thread.subscribe, thread.getSnapshot);
const leave: () => void = thread.subscribe((state) => console.log(state.status, state.connection));

for (const message of state.messages) {
  const text: string = textOf(message);
  if (message.status === "failed") void thread.resend(message.key);
  console.log(message.role, text, message.error?.code, message.content[0]?.type);
}
const calls: ToolCall[] = Object.values(state.toolCalls);
if (state.isRunning) await thread.stop("enough");
const run: Run = await thread.send([{ type: "text", text: "Hi" }], { metadata: { from: "page" } });
const more: boolean = await thread.loadOlder();
leave();

const controller = new AbortController();
const seen: RunEvent[] = [];
try {
  for await (const event of streamRun({ run: run.id, after: 3, signal: controller.signal })) seen.push(event);
  for await (const event of streamRun({ start: { agent: "support", input: "Hi" }, onRun: (id) => console.log(id) })) seen.push(event);
  for await (const event of streamThread({ thread: run.thread, after: `${run.id}:3` })) seen.push(event);
} catch (error) {
  if (error instanceof Refused && error.status === 401) console.log(error.code, error.detail);
  if (error instanceof LogGap) console.log(error.from, error.to);
}
const messages: readonly Message[] = fold(seen);
const made = new Fold(messages);
const active = await request({ baseUrl: "https://host/api" }, "GET", "runs?active=true");
console.log(calls, more, made.messages, active.results);

// wrong: state.messages.push(state.messages[0]);
// wrong: state.isRunning = false;
// wrong: openThread({ baseUrl: 8000 });
// wrong: thread.send();
// wrong: const status: "sending" = state.messages[0].status;
