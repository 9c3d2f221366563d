// Holds a conversation by the module while its connections are cut, and tells what it has seen. Run by test_cuts.py.
//
//     node conversation.mjs '{"baseUrl": ..., "apiKey": ..., "agent": ..., "say": ["...", ...]}'

import { openThread, streamRun, streamThread } from "../../../clients/js/longhaul.js";

const { baseUrl, apiKey, agent, say } = JSON.parse(process.argv[2]);
const patience = { baseMs: 20, maxMs: 300, stallMs: 1500, answerMs: 4000, tries: 200 };
const api = { baseUrl, apiKey, patience };
const thread = openThread({ ...api, agent });
const connections = [];
thread.subscribe(({ connection }) => connections.at(-1) !== connection && connections.push(connection));

const runs = await Promise.all(say.map((text) => thread.send(text)));
const log = [];
let ended = 0;
for await (const event of streamThread({ ...api, thread: thread.id })) {
  log.push(event);
  if (["run.completed", "run.failed", "run.cancelled"].includes(event.type) && (ended += 1) === say.length) break;
}
const ofRuns = [];
for (const { id } of runs) for await (const event of streamRun({ ...api, run: id })) ofRuns.push(event);
await new Promise((resolve) => {
  const leave = thread.subscribe((state) => state.isRunning || queueMicrotask(() => resolve(leave())));
});
const { messages, toolCalls, status, error } = thread.getSnapshot();
thread.close();
const told = { thread: thread.id, runs: runs.map(({ id }) => id), log, ofRuns, messages, toolCalls, status, error, connections };
process.stdout.write(JSON.stringify(told));
