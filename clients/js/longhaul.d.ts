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
export type RunStatus = "held" | "queued" | "running" | "waiting" | "requires_action" | "completed" | "failed" | "cancelled";
export type SavedStatus = "waiting" | "pending" | "completed" | "partial" | "discarded" | "superseded" | "rolled_back";
export type RunEvent = {
    type: string;
    seq: number;
    run: string;
    at: string;
    from_seq?: number;
    [field: string]: any;
};
export type Run = {
    id: string;
    thread: string;
    agent: string;
    status: RunStatus;
    stop_reason: string | null;
    why: string;
    error: Problem | null;
    output: any;
    last_seq: number;
    [field: string]: any;
};
export type Problem = {
    code: string;
    message: string;
    retryable?: boolean;
    [field: string]: any;
};
export type Part = {
    readonly type: string;
    readonly text?: string;
    readonly [field: string]: any;
};
export type MessageFields = {
    /**
     * for lists: stays the same for as long as the message is shown
     */
    key: string;
    id: string;
    role: "user" | "assistant" | "tool" | "system";
    status: SavedStatus | "sending" | "sent" | "failed";
    content: readonly Part[];
    run: string | null;
    step: number | null;
    client_id: string | null;
    metadata: Readonly<Record<string, any>>;
    /**
     * RFC 3339
     */
    created_at: string;
    /**
     * false: said by a run that its thread does not show, as with `save: "none"`
     */
    shown: boolean;
    /**
     * why it could not be sent
     */
    error?: LonghaulError;
};
export type Message = Readonly<MessageFields>;
export type CallStatus = "requested" | "awaiting_approval" | "running" | "retrying" | "awaiting_result" | "awaiting_child" | "unknown" | "settled";
export type ToolCallFields = {
    id: string;
    name: string;
    /**
     * the message that asked for it
     */
    message: string;
    run: string | null;
    status: CallStatus;
    /**
     * once they are complete
     */
    arguments?: any;
    /**
     * while they come
     */
    argumentsText?: string;
    /**
     * of a settled one: success, failed, denied, cancelled
     */
    outcome?: string;
    /**
     * as the model read it: a long one is cut, with a note, and a file is described
     */
    result?: any;
    /**
     * what of it stands apart, to be had whole at /api/tool-calls/ID/content
     */
    stored?: any;
    error?: any;
    /**
     * who answered it in place of its worker
     */
    by?: string;
    attempt?: number;
    /**
     * how far it is, from 0 to 1
     */
    fraction?: number;
    note?: string;
};
export type ToolCall = Readonly<ToolCallFields>;
export type Input = string | readonly Part[];
export type HeadersGiven = Record<string, string> | Headers | [string, string][];
export type Patience = {
    /**
     * the wait after a first failure is drawn from 0 to this; each further one doubles it. Default 500
     */
    baseMs: number;
    /**
     * at most. Default 15,000
     */
    maxMs: number;
    /**
     * a stream without a byte for so long is dead: pings come every 15 s. Default 40,000
     */
    stallMs: number;
    /**
     * for the head of an answer, or a whole one that is no stream. Default 30,000
     */
    answerMs: number;
    /**
     * of a request that is no stream. Default 5
     */
    tries: number;
    /**
     * failures in a row, without an event in between, until a stream gives up. Default Infinity
     */
    streamTries: number;
};
export type ApiOptions = {
    /**
     * of the API, `https://host/api`. Default: `/api` of the page
     */
    baseUrl?: string;
    /**
     * `lh_...`. A function is asked before each request
     */
    apiKey?: string | (() => string | Promise<string>);
    /**
     * sent with each request
     */
    headers?: HeadersGiven | (() => HeadersGiven | Promise<HeadersGiven>);
    /**
     * of `fetch`. Default: `same-origin`, so a session's cookie is sent to its own site
     */
    credentials?: RequestCredentials;
    /**
     * its value goes into `X-CSRFToken`, to the page's own site. Default `csrftoken`
     */
    csrfCookie?: string | false;
    /**
     * in place of the global one
     */
    fetch?: typeof globalThis.fetch;
    /**
     * ends all that was begun with these options
     */
    signal?: AbortSignal;
    patience?: Partial<Patience>;
};
/**
 * What went wrong. None of the messages holds a key, a header or an address.
 *
 *     LonghaulError
 *     ├── Refused          the server said no: status, code, detail
 *     ├── ConnectionLost   no answer, or half of one; code: connection_lost, timed_out, stalled, unexpected_answer
 *     └── LogGap           the log goes on behind what comes next: from, to
 */
export declare class LonghaulError extends Error {
    detail: string;
    code: string;
    status: number;
    /**
     * @param {string} detail
     * @param {string} code
     * @param {number} status of the answer; 0 when there was none
     */
    constructor(detail: string, code: string, status?: number);
}
/** The server refused the request. `errors` is all that it said, each with `code`, `detail` and the field it is about. */
export declare class Refused extends LonghaulError {
    errors: readonly {
        code: string;
        detail: string;
        attr: string | null;
    }[];
    retryAfterMs: number | null;
    /**
     * @param {number} status
     * @param {readonly { code: string, detail: string, attr: string | null }[]} errors
     * @param {number | null} retryAfterMs what its Retry-After asks for
     */
    constructor(status: number, errors: readonly {
        code: string;
        detail: string;
        attr: string | null;
    }[], retryAfterMs?: number | null);
    /** Whether the same request may be answered otherwise a little later. */
    get passing(): boolean;
}
/** There was no answer, or it broke off. */
export declare class ConnectionLost extends LonghaulError {
    constructor(detail?: string, code?: string, status?: number);
}
/** Events were removed from the log, or are missing. Load the messages again, and stream from their cursor. */
export declare class LogGap extends LonghaulError {
    from: number;
    to: number;
    /**
     * @param {number} from
     * @param {number} to
     */
    constructor(from: number, to: number);
}
export type Asked = {
    /**
     * sent as JSON
     */
    body?: any;
    idempotencyKey?: string;
    lastEventId?: string;
    /**
     * the answer is read by whoever asks: only its head is waited for
     */
    stream?: boolean;
    signal?: AbortSignal;
};
/**
 * How long to wait after failures: drawn from 0 to a bound that doubles, so that a thousand readers that lost their server at
 * once do not come back at once. `reset` when something went right.
 */
export declare class Backoff {
    patience: Pick<Patience, "baseMs" | "maxMs">;
    random: () => number;
    failures: number;
    /**
     * @param {Pick<Patience, "baseMs" | "maxMs">} patience
     * @param {() => number} random
     */
    constructor(patience: Pick<Patience, "baseMs" | "maxMs">, random?: () => number);
    reset(): void;
    /**
     * Count a failure; return the milliseconds until the next try. What a Retry-After asked for counts in any case.
     * @param {number | null} asked
     */
    next(asked?: number | null): number;
    /**
     * Wait so long. A page that is shown again, or online again, waits no more, unless a server has asked it to.
     * @param {unknown} error what has failed
     * @param {AbortSignal | undefined} signal
     */
    wait(error: unknown, signal: AbortSignal | undefined): Promise<void>;
}
export type Frame = {
    id?: string;
    event?: string;
    data?: string;
    comment?: string;
};
/**
 * One server-sent event, or a comment.
 * @typedef {{ id?: string, event?: string, data?: string, comment?: string }} Frame
 */
/**
 * Makes frames of bytes, wherever these are cut: within a character, or between CR and LF. What no empty line has ended is no
 * frame yet. A connection has a parser of its own.
 */
export declare class FrameParser {
    #private;
    /**
     * @param {Uint8Array} bytes
     * @returns {Frame[]} those that are whole now
     */
    push(bytes: Uint8Array): Frame[];
}
export type Connecting = "connecting" | "open" | "reconnecting";
export type RunToStream = {
    run?: string;
    /**
     * the last seq that is known. Default 0
     */
    after?: number;
    /**
     * starts a run and streams it: the body of `POST /runs`, or of the thread's
     */
    start?: Record<string, any>;
    /**
     * where to start it; a new one without
     */
    thread?: string;
    /**
     * of the start. Default: a new one
     */
    idempotencyKey?: string;
    /**
     * told the run's id, before its first event
     */
    onRun?: (run: string) => void;
    onConnection?: (state: Connecting) => void;
};
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
export declare function streamRun(options: ApiOptions & RunToStream): AsyncGenerator<RunEvent, void, void>;
/**
 * Yield the events of a thread's runs after the cursor, one run after another, each once. It has no end: abort `signal`, or
 * leave the loop.
 * @param {ApiOptions & { thread: string, after?: string, onConnection?: (state: Connecting) => void }} options
 *   `after` is a cursor, `RUN:SEQ`; without one it begins with the thread's first run
 * @returns {AsyncGenerator<RunEvent, void, void>}
 */
export declare function streamThread(options: ApiOptions & {
    thread: string;
    after?: string;
    onConnection?: (state: Connecting) => void;
}): AsyncGenerator<RunEvent, void, void>;
/**
 * Ask the API for something that is no stream. What has failed in passing is tried again; a POST happens once, for it gets an
 * Idempotency-Key. Raises Refused, ConnectionLost.
 * @param {ApiOptions} options
 * @param {string} method
 * @param {string} path below `baseUrl`, such as `runs?active=true&agent=support`
 * @param {{ body?: any, idempotencyKey?: string }} [more]
 * @returns {Promise<any>} the answer's JSON; null where there is none
 */
export declare function request(options: ApiOptions, method: string, path: string, more?: {
    body?: any;
    idempotencyKey?: string;
}): Promise<any>;
export type RunTold = Pick<Run, "id" | "status" | "stop_reason" | "error" | "output">;
/** @typedef {Pick<Run, "id" | "status" | "stop_reason" | "error" | "output">} RunTold */
/**
 * Messages, tool calls and runs, as a log tells them. It begins with a snapshot or with nothing; `apply` takes the events in
 * their order. What it hands out is never changed afterwards: what is new is a new object, all else stays the same one.
 */
export declare class Fold {
    #private;
    /** @type {RunTold | null} the run whose events came last */
    run: RunTold | null;
    /** @param {Iterable<any>} [messages] the newest of a thread as the API lists them, the oldest first */
    constructor(messages?: Iterable<any>);
    /** The messages in their order; those that wait for their place are the last. @returns {readonly Message[]} */
    get messages(): readonly Message[];
    /** Those of the messages that the thread shows. @returns {readonly Message[]} */
    get shown(): readonly Message[];
    /** The tool calls by their ids. @returns {Readonly<Record<string, ToolCall>>} */
    get toolCalls(): Readonly<Record<string, ToolCall>>;
    /**
     * @param {string} id
     * @returns {Message | undefined}
     */
    message(id: string): Message | undefined;
    /**
     * Begin anew with this snapshot. What has not changed stays the same object.
     * @param {Iterable<any>} messages
     * @param {Iterable<any>} [calls] how those of the live run stand
     */
    reset(messages: Iterable<any>, calls?: Iterable<any>): void;
    /** Put older messages before all that are there. @param {Iterable<any>} messages */
    prepend(messages: Iterable<any>): void;
    /** @param {RunEvent} event */
    apply(event: RunEvent): void;
}
/**
 * Make messages of a log.
 * @param {Iterable<RunEvent>} events in the order of their seq
 * @param {Iterable<any>} [messages] the snapshot that they follow, if there is one
 * @returns {readonly Message[]}
 */
export declare function fold(events: Iterable<RunEvent>, messages?: Iterable<any>): readonly Message[];
/** Return what a message says to a reader: its text parts. @param {Pick<Message, "content">} message */
export declare function textOf(message: Pick<Message, "content">): string;
/**
 * At what pace to show text that comes in bursts: evenly, over about the time until the next burst, and never more than `lagMs`
 * behind. It counts characters and is told the time, in milliseconds.
 */
export declare class Pace {
    #private;
    shown: number;
    length: number;
    lagMs: number;
    /**
     * @param {number} shown how many characters are shown already
     * @param {number} lagMs
     */
    constructor(shown?: number, lagMs?: number);
    /**
     * Tell it that the text is so long now.
     * @param {number} length
     * @param {number} now
     */
    push(length: number, now: number): void;
    /**
     * Return how many characters to show now.
     * @param {number} now
     */
    advance(now: number): number;
    /** Whether there is text that is not shown yet. */
    get behind(): boolean;
}
export type ThreadFields = {
    /**
     * its id; null until the first `send` has made it
     */
    thread: string | null;
    /**
     * what is said, what is being said, what was sent just now
     */
    messages: readonly Message[];
    /**
     * by id
     */
    toolCalls: Readonly<Record<string, ToolCall>>;
    /**
     * the run that lives, or the last one
     */
    run: RunTold | null;
    /**
     * of that run; null before the first
     */
    status: RunStatus | null;
    /**
     * whether something is sent, held, queued or running
     */
    isRunning: boolean;
    /**
     * what went wrong for good: of loading, streaming, or the last stop, resume or retry.
     * That of a message that was not sent stands at the message, that of a run in `run.error`
     */
    error: LonghaulError | null;
    connection: "idle" | "connecting" | "open" | "reconnecting" | "closed";
    /**
     * until the messages are there
     */
    isLoading: boolean;
    /**
     * whether `loadOlder` finds more
     */
    hasOlder: boolean;
};
export type ThreadState = Readonly<ThreadFields>;
export type ThreadOptions = {
    /**
     * its id. Without one the first `send` makes a thread
     */
    thread?: string | null;
    /**
     * of runs that are sent here; a thread that is there may name one itself
     */
    agent?: string;
    /**
     * more for `POST /threads`, such as a title
     */
    newThread?: Record<string, any>;
    /**
     * more for each `POST .../runs`, such as limits
     */
    run?: Record<string, any>;
    /**
     * false: nothing is loaded before `open()`
     */
    start?: boolean;
    /**
     * show text at an even pace. Default: true, but not where the user prefers reduced motion
     */
    smooth?: boolean;
    /**
     * how many messages are loaded at first, and by `loadOlder`. Default 100, at most 200
     */
    pageSize?: number;
    /**
     * told each event of the stream, after it was applied
     */
    onEvent?: (event: RunEvent) => void;
};
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
export declare function openThread(options: ApiOptions & ThreadOptions): Thread;
export type Outgoing = {
    message: Message;
    body: Record<string, any>;
    run?: string;
};
/**
 * What was sent from here, and is not yet in the log.
 * @typedef {{ message: Message, body: Record<string, any>, run?: string }} Outgoing
 */
/** A thread as an interface needs it. All its functions may be passed on by themselves. */
export declare class Thread {
    #private;
    /** @param {ApiOptions & ThreadOptions} options */
    constructor(options: ApiOptions & ThreadOptions);
    /** Its id; null until the first `send` has made it. */
    get id(): string | null;
    /** The state as it is now: the same object until something changes. */
    getSnapshot: () => Readonly<ThreadFields>;
    /**
     * Hear of each new state, and of that of now at once. Returns what ends it. This is a Svelte store, and with `getSnapshot` what
     * React's `useSyncExternalStore` asks for.
     * @param {(state: ThreadState) => void} listener
     * @returns {() => void}
     */
    subscribe: (listener: (state: ThreadState) => void) => () => void;
    /** Load, and stream. Also after `close`, or after an error that has ended the stream; else nothing. */
    open: () => void;
    /** End the stream. What is being sent is still sent. The state stays. */
    close: () => void;
    /**
     * Say something: it is shown at once, and starts a run. Resolves when the server has accepted it. When that fails the message
     * has the status `failed`, and `resend` tries again; the promise may be ignored.
     * @param {Input} input a text, or parts
     * @param {Record<string, any>} [run] more for `POST .../runs`: metadata, limits, busy, ...
     * @returns {Promise<Run>}
     */
    send: (input: Input, run?: Record<string, any>) => Promise<Run>;
    /**
     * Send a message again that has failed: under its Idempotency-Key, so it is never there twice.
     * @param {string} key of the message
     * @returns {Promise<Run | null>} null when it has arrived after all
     */
    resend: (key: string) => Promise<Run | null>;
    /** Take a message away that has failed. @param {string} key */
    discard: (key: string) => void;
    /**
     * Cancel the run that lives; what it has said stays. Without any: nothing.
     * @param {string} [reason]
     * @returns {Promise<Run | null>}
     */
    stop: (reason?: string) => Promise<Run | null>;
    /**
     * Go on after the last run was cancelled or has failed, by a new run.
     * @param {Input} [input]
     * @returns {Promise<Run>}
     */
    resume: (input?: Input) => Promise<Run>;
    /** Do the last step of the last run again, by a new run. @returns {Promise<Run>} */
    retry: () => Promise<Run>;
    /** Load the messages before those that are there. Returns whether there are more. @returns {Promise<boolean>} */
    loadOlder: () => Promise<boolean>;
}
