/**
 * Follow Headway's jobs and rooms from a page, over one WebSocket that is made again whenever it breaks.
 *
 *     import { Live } from "https://jobs.example/static/headway/headway.js";
 *
 *     const live = new Live({ ticket: async () => (await fetch("/ticket", { method: "POST" })).text() });
 *     for await (const envelope of live.follow(id)) console.log(envelope.t, envelope.d);
 *
 * Every event comes once and in order. What was missed while there was no connection comes when there is one again.
 * https://jobs.example/api/v1/live describes all frames.
 *
 * @typedef {{t: "snapshot"|"state"|"progress"|"log", job: string, epoch: number, prev: number|null, seq: number,
 *     d: any, set?: string[], cursor?: string}} Envelope
 * @typedef {{t: "resync", job?: string, set?: string, room?: string, d: {reason: string}}} Resync
 * @typedef {{t: "message", room: string, prev: number|null, seq: number,
 *     d: {id: string, author: string, message: string, at: string}}} Message
 * @typedef {{t: "presence", room: string, d: {here: string[]}|{joined: string}|{left: string}}} Presence
 * @typedef {any} Frame
 */

const FIRST_PAUSE = 250;
const LONGEST_PAUSE = 5000;
// The server takes 20 commands a second, and frames of 16 KiB.
const PACE = 100;
const AT_ONCE = 100;
// Past so many frames that nobody reads, the rest is left with the server until the reader has caught up.
const MOST_WAITING = 1000;
const MOST_KNOWN = 10_000;
const WELCOME = 10_000;
// A heartbeat may be late by one whole, and by this.
const SLACK = 5000;
const RESTART = 1012;
const ENDED = ["succeeded", "failed", "cancelled"];

/** Nothing more will come: the server refused, and trying again would not help. A ticket function may throw it too. */
export class Refused extends Error {
  /**
   * @param {string} message What to do.
   * @param {{code?: number, type?: string}} [details] The close code, or the type of a refusal.
   */
  constructor(message, { code, type } = {}) {
    super(message);
    this.name = "Refused";
    this.code = code;
    this.type = type;
  }
}

/** The connection cannot be trusted any more. */
class Lost extends Error {}

/** One thing that is followed: where it stands, and what came of it that was not read yet. */
class Subscription {
  /**
   * @param {"jobs"|"sets"|"rooms"} section
   * @param {string} name
   */
  constructor(section, name) {
    this.section = section;
    this.name = name;
    this.key = `${section} ${name}`;
    // Whether what comes is for us: it is not between the subscribe and its ack.
    this.open = false;
    this.behind = false;
    /** @type {Frame[]} */
    this.waiting = [];
    /** @type {Error|null|undefined} */
    this.end = undefined;
    this.changed = () => {};
    this.arrived = () => {};
    /** @type {Map<string, number>} By job or room: the seq that came last. */
    this.held = new Map();
  }

  begin() {
    this.open = true;
    this.held.clear();
  }

  /** @param {Frame} frame */
  offer(frame) {
    if (!this.open || this.behind) return;
    if ("prev" in frame) {
      const name = frame.job ?? frame.room;
      const held = this.held.get(name);
      if (frame.prev !== null && held !== undefined && frame.prev !== held) throw new Lost("a frame is missing");
      if (ended(frame)) this.held.delete(name);
      else this.held.set(name, frame.seq);
    }
    if (!this.accept(frame)) return;
    const last = this.waiting.at(-1);
    if (last?.t === "progress" && frame.t === "progress" && last.job === frame.job) this.waiting.pop();
    this.waiting.push(frame);
    if (this.waiting.length >= MOST_WAITING) {
      this.behind = true;
      this.changed();
    }
    this.arrived();
  }

  /** @param {Error|null} error Why nothing more comes; null if it is over. */
  finish(error) {
    this.end ??= error;
    this.arrived();
  }

  /** The reader wants no more. */
  stop() {
    this.waiting = [];
    this.finish(null);
  }

  async *frames() {
    while (true) {
      if (this.waiting.length) {
        yield this.waiting.shift();
      } else if (this.end !== undefined) {
        if (this.end) throw this.end;
        return;
      } else {
        if (this.behind) {
          this.behind = false;
          this.changed();
        }
        await new Promise((resolve) => (this.arrived = () => resolve(undefined)));
      }
    }
  }
}

class Job extends Subscription {
  constructor(id) {
    super("jobs", id);
    this.epoch = null;
    this.seq = -1;
  }

  request() {
    return this.epoch === null ? { job: this.name } : { job: this.name, since: this.seq, epoch: this.epoch };
  }

  accept(frame) {
    if (frame.t === "resync") this.epoch = null;
    if (frame.t === "bye") this.finish(null);
    if (!("seq" in frame)) return false;
    if (frame.t !== "snapshot" && frame.epoch !== this.epoch) throw new Lost("there was no snapshot");
    if (frame.epoch === this.epoch && frame.seq <= this.seq) return false;
    this.epoch = frame.epoch;
    this.seq = frame.seq;
    return true;
  }

  mark(marks) {
    if (this.open && !this.behind && marks.jobs?.[this.name] > this.seq) throw new Lost("a frame is missing");
  }
}

class JobSet extends Subscription {
  constructor(name, fitting, since) {
    super("sets", name);
    this.fitting = fitting;
    this.cursor = since;
    /** @type {Map<string, {epoch: number, seq: number}>} The last envelope of each job, oldest first. */
    this.known = new Map();
  }

  request() {
    return { set: this.name, ...this.fitting, ...(this.cursor ? { since: this.cursor } : {}) };
  }

  accept(frame) {
    if (frame.t === "resync") {
      this.cursor = undefined;
      this.known.clear();
      return true;
    }
    this.cursor = frame.cursor ?? this.cursor;
    const known = this.known.get(frame.job);
    if (known && known.epoch === frame.epoch && known.seq >= frame.seq) return false;
    this.known.delete(frame.job);
    this.known.set(frame.job, { epoch: frame.epoch, seq: frame.seq });
    if (this.known.size > MOST_KNOWN) this.known.delete(this.known.keys().next().value);
    return true;
  }

  // The cursor is good for all sets of a socket, and so may lie a little behind what one of them has had.
  mark(marks) {
    if (this.open && !this.behind) this.cursor = marks.cursor ?? this.cursor;
  }
}

class RoomFeed extends Subscription {
  constructor(name, since) {
    super("rooms", name);
    this.seq = since;
  }

  request() {
    return this.seq === undefined ? { room: this.name } : { room: this.name, since: this.seq };
  }

  accept(frame) {
    if (frame.t === "resync") this.seq = undefined;
    if (frame.t !== "message") return true;
    if (frame.seq <= (this.seq ?? 0)) return false;
    this.seq = frame.seq;
    return true;
  }

  mark(marks) {
    const seq = marks.rooms?.[this.name];
    if (!this.open || this.behind || seq === undefined) return;
    if (seq > (this.seq ?? seq)) throw new Lost("a frame is missing");
    this.seq = seq;
  }
}

/** One socket after the other, as long as something is followed or to be said. */
class Line {
  /** @param {Live} live */
  constructor(live) {
    this.live = live;
    /** @type {Map<string, Subscription>} */
    this.subscriptions = new Map();
    // What the server was asked for on this socket. Commands make it what the subscriptions want.
    /** @type {Map<string, Subscription>} */
    this.asked = new Map();
    /** @type {Map<number, Subscription[]>} */
    this.unanswered = new Map();
    /** @type {{room: string, message: string, key: string, id: number, done: Function, failed: Function}[]} */
    this.sayings = [];
    this.commands = 0;
    this.changed = () => {};
    this.running = false;
    this.hangUp = () => {};
  }

  get empty() {
    return !this.subscriptions.size && !this.sayings.length;
  }

  add(subscription) {
    this.subscriptions.set(subscription.key, subscription);
    subscription.changed = () => this.changed();
    this.start();
  }

  remove(subscription) {
    this.subscriptions.delete(subscription.key);
    this.changed();
    this.rest();
  }

  say(room, message) {
    return new Promise((done, failed) => {
      this.sayings.push({ room, message, key: crypto.randomUUID(), id: 0, done, failed });
      this.start();
    });
  }

  rest() {
    if (this.empty) this.hangUp();
  }

  start() {
    this.changed();
    if (!this.running) {
      this.running = true;
      this.last();
    }
  }

  async last() {
    let failures = 0;
    while (!this.empty) {
      const began = Date.now();
      let code = 0;
      try {
        code = await this.connected(await this.live.ticket());
      } catch (error) {
        if (error instanceof Refused) {
          this.refuse(error);
          break;
        }
        if (!(error instanceof Lost)) console.warn("Headway:", error);
      }
      this.live.connection(false);
      for (const subscription of this.asked.values()) subscription.open = false;
      this.asked.clear();
      this.unanswered.clear();
      for (const saying of this.sayings) saying.id = 0;
      if (Date.now() - began > LONGEST_PAUSE) failures = 0;
      const longest = code === RESTART ? LONGEST_PAUSE : Math.min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** failures);
      failures += 1;
      if (!this.empty) await pause(Math.random() * longest);
    }
    this.running = false;
  }

  refuse(error) {
    for (const subscription of this.subscriptions.values()) subscription.finish(error);
    for (const saying of this.sayings) saying.failed(error);
    this.sayings = [];
  }

  /** One socket; the code that it was closed with. Throws Lost or Refused. */
  connected(ticket) {
    const socket = new WebSocket(this.live.address, ["jobs.v1", `ticket.${ticket}`]);
    let silence = WELCOME;
    let heard = Date.now();
    return new Promise((resolve, reject) => {
      // A computer that slept comes back here or to a message, whichever is first: it has heard nothing for too long.
      const silent = () => Date.now() - heard > silence && reject(new Lost("the server is silent"));
      const watching = setInterval(silent, 1000);
      const moved = () => reject(new Lost("the network has changed"));
      globalThis.addEventListener?.("online", moved);
      this.hangUp = () => resolve(1000);
      socket.onmessage = (event) => {
        if (silent()) return;
        heard = Date.now();
        try {
          for (const frame of [JSON.parse(event.data)].flat()) {
            if (frame.t === "welcome") {
              silence = 2000 * frame.d.hb + SLACK;
              this.live.connection(true);
              this.command(socket);
            } else {
              this.take(frame);
            }
          }
        } catch (error) {
          reject(error instanceof Lost ? error : new Lost(`a frame is not of the protocol: ${error}`));
        }
      };
      socket.onclose = ({ code, reason }) => {
        if (code >= 4500 && code < 4600) reject(new Refused(reason || `The server closed with ${code}.`, { code }));
        else resolve(code);
      };
      const cleanUp = () => {
        clearInterval(watching);
        globalThis.removeEventListener?.("online", moved);
        this.changed = this.hangUp = () => {};
        socket.onmessage = socket.onclose = null;
        // Not waited for: on a network that is gone it takes long.
        socket.close();
      };
      this.over = cleanUp;
    }).finally(() => this.over());
  }

  /** Tell the server whatever changes in what is wanted, a few times a second at most. */
  command(socket) {
    let paced = false;
    this.changed = () => {
      const next = paced || socket.readyState !== WebSocket.OPEN ? null : this.change();
      if (!next) return;
      paced = true;
      socket.send(JSON.stringify(next));
      setTimeout(() => {
        paced = false;
        this.changed();
      }, PACE);
    };
    this.changed();
  }

  /** The next command that brings the server nearer to what is wanted; null if it is there. */
  change() {
    const gone = [...this.asked.values()].filter((one) => this.subscriptions.get(one.key) !== one || one.behind);
    if (gone.length) {
      const some = gone.slice(0, AT_ONCE);
      for (const one of some) {
        this.asked.delete(one.key);
        one.open = false;
      }
      return { t: "unsubscribe", id: ++this.commands, ...sections(some, (one) => one.name) };
    }
    const wanted = [...this.subscriptions.values()].filter((one) => !one.behind && one.end === undefined);
    const fresh = wanted.filter((one) => !this.asked.has(one.key)).slice(0, AT_ONCE);
    if (fresh.length) {
      const id = ++this.commands;
      for (const one of fresh) this.asked.set(one.key, one);
      this.unanswered.set(id, fresh);
      return { t: "subscribe", id, ...sections(fresh, (one) => one.request()) };
    }
    const saying = this.sayings.find((one) => !one.id);
    if (!saying) return null;
    const { room, message, key } = saying;
    saying.id = ++this.commands;
    return { t: "publish", id: saying.id, room, message, key };
  }

  take(frame) {
    if (frame.t === "ack") {
      for (const one of this.unanswered.get(frame.id) ?? []) one.begin();
      this.said(frame.id)?.done(frame.d);
    } else if (frame.t === "hb") {
      for (const one of this.asked.values()) one.mark(frame.d);
    } else if (frame.t === "error") {
      const error = new Refused(frame.d.detail, { type: frame.d.type });
      const named = keys(frame.d).flatMap((key) => this.asked.get(key) ?? []);
      for (const one of named.length ? named : this.unanswered.get(frame.id) ?? []) one.finish(error);
      this.said(frame.id)?.failed(error);
    } else {
      for (const key of keys(frame)) {
        const one = this.asked.get(key);
        one?.offer(frame);
        if (frame.t === "bye") this.asked.delete(key);
      }
    }
  }

  /** What was said with this command; it is off the list. */
  said(id) {
    const place = this.sayings.findIndex((one) => one.id === id);
    if (place < 0) return undefined;
    const [saying] = this.sayings.splice(place, 1);
    this.rest();
    return saying;
  }
}

/** A server to follow. */
export class Live {
  /**
   * @param {object} options
   * @param {string} [options.url] Where Headway is; where this module is from, if left out.
   * @param {() => Promise<string>} options.ticket Fetches a new ticket, of `POST /api/v1/ws-tickets`, for each
   *     connection: from your own server, which holds the API key. If it throws Refused nothing is tried again.
   * @param {(connected: boolean) => void} [options.connection] Is told when the connection is there and when it broke.
   */
  constructor({ url = new URL(import.meta.url).origin, ticket, connection = () => {} }) {
    this.address = `${url.replace(/^http/, "ws").replace(/\/$/, "")}/ws/v1`;
    this.ticket = ticket;
    this.connection = connection;
    /** @type {Line[]} */
    this.lines = [];
  }

  /**
   * A job, from a snapshot of how it is now to its end. Progress that was not read yet is replaced by newer.
   * @param {string} job
   * @param {{signal?: AbortSignal}} [options] The signal ends it earlier.
   * @returns {AsyncGenerator<Envelope, void, void>}
   */
  follow(job, { signal } = {}) {
    return this.read(new Job(job), signal);
  }

  /**
   * All jobs that fit, without an end: snapshots of those that are open, then what happens. With `since`, the `cursor`
   * of an envelope of before, what happened after that comes in place of the snapshots.
   * @param {{tag?: string, kind?: string, parent?: string, since?: string, signal?: AbortSignal}} [options]
   * @returns {AsyncGenerator<Envelope|Resync, void, void>}
   */
  watch({ tag, kind, parent, since, signal } = {}) {
    return this.read(new JobSet(crypto.randomUUID(), { tag, kind, parent }, since), signal);
  }

  /**
   * A room to listen and talk in. With `since` the messages after that seq come first; 0 is all that is kept.
   * @param {string} name
   * @param {{since?: number, signal?: AbortSignal}} [options]
   * @returns {AsyncIterable<Message|Presence|Resync> & {send: (message: string) => Promise<{room: string, seq: number}>}}
   *     `send` says something once, however often the connection breaks meanwhile.
   */
  room(name, { since, signal } = {}) {
    return {
      send: (message) => this.line(null).say(name, message),
      [Symbol.asyncIterator]: () => this.read(new RoomFeed(name, since), signal),
    };
  }

  /** End everything that is followed. */
  close() {
    for (const line of this.lines) {
      for (const subscription of line.subscriptions.values()) subscription.finish(null);
      for (const saying of line.sayings) saying.failed(new Refused("The connection was closed by the page."));
      line.sayings = [];
      line.hangUp();
    }
  }

  /** The first connection with room: there is one, unless more is followed than fits on it or the same thing twice. */
  line(subscription) {
    const fits = (line) => !subscription || (line.subscriptions.size < 256 && !line.subscriptions.has(subscription.key));
    const line = this.lines.find(fits) ?? new Line(this);
    if (!this.lines.includes(line)) this.lines.push(line);
    return line;
  }

  async *read(subscription, signal) {
    const line = this.line(subscription);
    const stop = () => subscription.stop();
    signal?.addEventListener("abort", stop);
    if (signal?.aborted) return;
    line.add(subscription);
    try {
      for await (const frame of subscription.frames()) {
        yield frame;
        if (subscription instanceof Job && ended(frame)) return;
      }
    } finally {
      signal?.removeEventListener("abort", stop);
      line.remove(subscription);
    }
  }
}

/** Whether it is the last of its job. */
function ended(frame) {
  return (frame.t === "snapshot" || frame.t === "state") && ENDED.includes(frame.d.state);
}

/** The subscriptions that a frame is for. */
function keys(frame) {
  if (frame.set) return [frame.set].flat().map((name) => `sets ${name}`);
  if (frame.job) return [`jobs ${frame.job}`];
  return frame.room ? [`rooms ${frame.room}`] : [];
}

function sections(subscriptions, item) {
  const found = {};
  for (const one of subscriptions) (found[one.section] ??= []).push(item(one));
  return found;
}

/** Wait, but no longer than until there is a network again. */
function pause(milliseconds) {
  return new Promise((resolve) => {
    const timer = setTimeout(done, milliseconds);
    globalThis.addEventListener?.("online", done);
    function done() {
      clearTimeout(timer);
      globalThis.removeEventListener?.("online", done);
      resolve(undefined);
    }
  });
}
