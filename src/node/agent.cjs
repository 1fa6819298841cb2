'use strict';
// pm's agent: runs in the app's process before the app (`node --require`), and stays passive until the supervisor
// greets it over the IPC channel with messages that the app never sees. Lets the app's connections end before the kill
// signal comes, answers how many listeners the app has for that signal, and measures.
//
// It never keeps the process alive, never throws into the app, and does nothing in worker threads and in children
// that the app forks (they inherit the option, but nobody greets them). What an app that looks for it can see is
// listed in docs/agent.md.

// The app sees the arguments it was given, and hands no more than those to the children it forks.
const own = process.execArgv.indexOf(__filename);
if (own > 0 && process.execArgv[own - 1] === '--require') process.execArgv.splice(own - 1, 2);
delete require.cache[__filename];
if (require('node:worker_threads').isMainThread && typeof process.send === 'function') install();

function install() {
  const net = require('node:net');
  // The app may replace or wrap all of these later.
  const { createHistogram, performance } = require('node:perf_hooks');
  const { clearInterval, setImmediate, setInterval, setTimeout } = require('node:timers');
  const { send, listenerCount, memoryUsage, _getActiveHandles, _getActiveRequests } = process;

  // How long a TLS connection may stay without a parser before it counts as upgraded and not as in its handshake.
  const HANDSHAKE = 1000;
  // How long a client that was told to go has to end its HTTP/2 session by itself.
  const LEAVE = 100;
  const STEP = 15;

  // Servers that were told to listen. Weak: an app that makes and drops many servers does not grow.
  let servers = [];
  let greeted = false;
  let drain = null;
  // Connections that the supervisor handed over, once it balances by their number.
  let handed = null;
  // Sessions of HTTP/2 servers: their open streams, when the last one was closed, and whether they are told to go.
  const sessions = new Map();
  // Open websockets, with what had been written to them before the upgrade; followed only where they are to be closed.
  let websockets = null;
  const followed = new WeakSet();

  // ---- servers ----------------------------------------------------------------------------------------------------

  function remember(server) {
    if (alive().includes(server)) return;
    servers.push(new WeakRef(server));
    // Only servers of HTTP/2 have it. Node keeps no list of a server's sessions before version 24.
    if (typeof server.updateSettings === 'function') server.on('session', guarded(followSession));
    if (websockets !== null) followUpgrades(server);
  }

  function alive() {
    servers = servers.filter((ref) => ref.deref() !== undefined);
    return servers.map((ref) => ref.deref());
  }

  // What the app must not notice may fail without a word.
  function guarded(action) {
    return (...args) => {
      try {
        action(...args);
      } catch { /* the app goes on as if we were not here */ }
    };
  }

  // Has `note` see a method's calls before the method does. A proxy has the method's name, length and properties.
  function wrap(object, method, note) {
    const noted = guarded(note);
    object[method] = new Proxy(object[method], {
      apply(original, self, args) {
        noted(self, args);
        return Reflect.apply(original, self, args);
      },
    });
  }

  wrap(net.Server.prototype, 'listen', remember);

  function followSession(session) {
    const known = { streams: new Set(), last: 0, told: false };
    sessions.set(session, known);
    session.once('close', () => sessions.delete(session));
    session.on('stream', guarded((stream) => {
      const start = requestBegins();
      known.streams.add(stream);
      stream.once('close', () => {
        known.streams.delete(stream);
        known.last = requestEnds(start);
      });
      if (drain !== null) goAway(session, known);
    }));
  }

  function goAway(session, known) {
    if (known.told || session.closed || session.destroyed) return;
    known.told = true;
    session.goaway();
    // The client says GOAWAY, too, and Node answers by closing the session: version 18 at the moment of the last
    // stream's end, before that is on its way.
    const { close } = session;
    session.close = (done) => {
      if (typeof done === 'function') session.once('close', done);
    };
    known.close = () => Reflect.apply(close, session, []);
  }

  // Node's list of an HTTP/1 server's connections, which it keeps for its own time-outs.
  function parsers(server) {
    const symbol = Object.getOwnPropertySymbols(server).find((each) => each.description === 'http.server.connections');
    const list = symbol && server[symbol];
    return list && typeof list.all === 'function' ? list.all() : null;
  }

  // Only servers of HTTP/1 have a keepAliveTimeout. Once: what follows websockets from now on has been remembered before.
  function followUpgrades(server) {
    if (!('keepAliveTimeout' in server) || followed.has(server)) return;
    followed.add(server);
    wrap(server, 'emit', (_, [name, request, socket]) => {
      if (name !== 'upgrade' || !/^websocket$/i.test(request.headers.upgrade)) return;
      websockets.set(socket, socket.bytesWritten);
      socket.once('close', () => websockets.delete(socket));
    });
  }

  // ---- the channel ------------------------------------------------------------------------------------------------

  function say(message) {
    // With a callback a closed channel is no 'error' event, which would end the app.
    if (process.connected) Reflect.apply(send, process, [message, undefined, undefined, () => {}]);
  }

  const orders = {
    NODE_PM_HELLO(message) {
      if (!greeted) measure();
      greeted = true;
      if (message.websockets && websockets === null) {
        websockets = new Map();
        alive().forEach(followUpgrades);
      }
      return { version: process.version };
    },
    NODE_PM_LISTENERS: ({ signal }) => ({ signal, count: Reflect.apply(listenerCount, process, [signal]) }),
    NODE_PM_DRAIN: startDrain,
    NODE_PM_PROBE: (_, handle) => takeProbe(handle),
    NODE_PM_STATS: ({ ask }) => ({ ask, ...stats() }),
    NODE_PM_WATCH() {
      handed ??= { received: 0, closed: 0, open: new WeakSet(), planned: false };
      say({ cmd: 'NODE_PM_CLOSED', received: handed.received, closed: handed.closed });
    },
  };

  process.on('internalMessage', guarded((message, handle) => {
    if (message === null || typeof message !== 'object') return;
    const { act, cmd } = message;
    if (handed !== null && act === 'newconn' && cmd === 'NODE_CLUSTER') handOver(handle);
    // Before the greeting it is not from a supervisor that knows us.
    if (!Object.hasOwn(orders, cmd) || (!greeted && cmd !== 'NODE_PM_HELLO')) return;
    const answer = orders[cmd](message, handle);
    if (answer !== undefined) say({ cmd, ...answer });
  }));

  // A check comes as a socket of its own: the app's HTTP server takes it like a connection that it has accepted, so that
  // it reaches this very process, without a port and without TLS.
  function takeProbe(handle) {
    const server = alive().find((each) => each.listening && each.listenerCount('request') > 0);
    if (server === undefined) return void handle.close();
    const socket = new net.Socket({ handle, readable: true, writable: true });
    socket.on('error', () => {});
    const known = { remoteAddress: '127.0.0.1', remoteFamily: 'IPv4', remotePort: 0 };
    for (const [name, value] of Object.entries(known)) {
      Object.defineProperty(socket, name, { value, configurable: true });
    }
    const secure = typeof server.setSecureContext === 'function';
    if (secure) Object.assign(socket, { encrypted: true, alpnProtocol: 'http/1.1' });
    server.emit(secure ? 'secureConnection' : 'connection', socket);
  }

  // The cluster module has already served or rejected the connection: its listener is older than ours. One that it did
  // not take counts as handed over and closed, so that the supervisor need not know what became of it.
  function handOver(handle) {
    handed.received += 1;
    if (!handle || !(handle.fd >= 0)) return ended();
    handed.open.add(handle);
    // A pipe has no reset().
    for (const end of ['close', 'reset'].filter((each) => each in handle)) {
      wrap(handle, end, () => { if (handed.open.delete(handle)) ended(); });
    }
  }

  // One message per turn of the loop, however many have ended in it.
  function ended() {
    handed.closed += 1;
    if (handed.planned) return;
    handed.planned = true;
    setImmediate(guarded(() => {
      handed.planned = false;
      say({ cmd: 'NODE_PM_CLOSED', closed: handed.closed });
    })).unref();
  }

  // ---- draining ---------------------------------------------------------------------------------------------------

  // `idle`: "close" idle connections at once, or "wait" for one more request on each, `patience` ms at most (null: as
  // long as the server itself would). `requests`: those in flight after that are left to the app's signal handler
  // ("leave"), or there is none and they are waited for ("finish"). All is over after `within` ms.
  function startDrain({ idle, patience, requests, websockets: withWebsockets, within }) {
    const since = performance.now();
    const until = since + Math.min(patience ?? keepAlive(), within - 2 * STEP);
    const before = drain;
    drain = {
      since,
      idleUntil: idle === 'close' ? since : until,
      leaveAt: requests === 'leave' ? until : Infinity,
      websocketsUntil: withWebsockets ? until : since,
      timer: null,
    };
    if (before === null) {
      alive().forEach(stopAccepting);
      channel.start.subscribe(guarded(({ response }) => endAfter(response)));
      guarded(endBusyConnections)();
    } else {
      clearInterval(before.timer);
    }
    if (withWebsockets) guarded(closeWebsockets)();
    // After the loop has read what has arrived: on a busy machine a request may lie in the socket while its connection
    // looks idle.
    const look = () => setImmediate(step);
    drain.timer = setInterval(look, STEP);
    drain.timer.unref();
    look();
  }

  // Sessions of HTTP/2 have no such time, and get what HTTP/1 has by default; 0 means for ever.
  function keepAlive() {
    const times = alive().map(({ keepAliveTimeout, updateSettings }) => keepAliveTimeout ?? (updateSettings ? 5000 : 1));
    return Math.max(0, ...times.map((time) => (time > 0 ? time : Infinity))) + 1000;
  }

  // Says `Connection: close`, whatever the app says, and ends the connection after the response.
  function endAfter(response) {
    if (response.headersSent || typeof response._storeHeader !== 'function') return;
    response.shouldKeepAlive = false;
    response.setHeader('Connection', 'close');
    wrap(response, '_storeHeader', () => {
      if (!/upgrade/i.test(response.getHeader('connection'))) response.setHeader('Connection', 'close');
    });
  }

  // Responses that were begun before the drain.
  function endBusyConnections() {
    for (const parser of alive().flatMap((server) => parsers(server) ?? [])) {
      const response = parser && parser.socket && parser.socket._httpMessage;
      if (response && response.shouldKeepAlive === true) endAfter(response);
    }
  }

  // A close frame with the code 1001, "going away", where the handshake is answered; the app's library does the rest.
  function closeWebsockets() {
    for (const [socket, before] of websockets ?? []) {
      if (socket.bytesWritten > before && socket.writable) socket.write(Buffer.from([0x88, 2, 0x03, 0xe9]));
    }
  }

  // GOAWAY, and the end when the last stream is answered. What a client sends while GOAWAY is on its way to it is not
  // served, so as with HTTP/1 it comes before the answer to a request, while the client waits; or when time is over.
  function endSessions(now) {
    for (const [session, known] of sessions) {
      const { streams, last, told } = known;
      const waits = [...streams].some((stream) => !stream.writableEnded);
      if (waits || now >= drain.idleUntil) goAway(session, known);
      if (told && streams.size === 0 && now >= last + LEAVE) known.close();
    }
  }

  // A socket that other instances accept from too: leave it to them. The app's server must still be one that is
  // listening, or the server.close() of its signal handler would fail; so it keeps a handle without a socket, as
  // Node's own round-robin workers have. (Those get no connections any more; theirs is left as it is.)
  function stopAccepting(server) {
    const handle = server._handle;
    if (!handle || !(handle.fd >= 0) || typeof handle.close !== 'function') return;
    const name = {};
    if (typeof handle.getsockname === 'function') handle.getsockname(name);
    const keep = setInterval(() => {}, 0x7fffffff);
    if (typeof handle.hasRef === 'function' && !handle.hasRef()) keep.unref();
    // A timer has close(), ref(), unref() and hasRef() as a handle has them.
    server._handle = Object.assign(keep, { fd: -1, getsockname: (out) => (Object.assign(out, name), 0) });
    handle.close();
  }

  const step = guarded(() => {
    if (drain.timer === null) return;
    const now = performance.now();
    endSessions(now);
    if (now >= drain.idleUntil) alive().forEach(closeIdle);
    const open = alive().reduce((sum, server) => sum + server._connections - upgraded(server, now), 0);
    if (open <= 0 || now >= drain.leaveAt) finish();
  });

  function closeIdle(server) {
    if (typeof server.closeIdleConnections === 'function') server.closeIdleConnections();
    // To Node a connection that has not said anything yet is not idle.
    for (const { socket } of parsers(server) ?? []) if (socket && socket.bytesRead === 0) socket.destroy();
  }

  // Upgraded connections (websockets) last as long as the client likes; the drain does not wait for them.
  function upgraded(server, now) {
    const known = parsers(server);
    const upgrades = server.listenerCount('upgrade') + server.listenerCount('connect') > 0;
    if (known === null || !upgrades || now < drain.websocketsUntil) return 0;
    if (typeof server.setSecureContext === 'function' && now < drain.since + HANDSHAKE) return 0;
    return Math.max(0, server._connections - known.length);
  }

  function finish() {
    clearInterval(drain.timer);
    drain.timer = null;
    say({ cmd: 'NODE_PM_DRAINED' });
    // A handler that only closes its servers leaves it to Node to exit when nothing is left to do; but the channel would
    // keep a worker alive.
    const look = setInterval(guarded(() => {
      if (alive().some((server) => server.listening)) return;
      clearInterval(look);
      if (process.channel) process.channel.unref();
    }), 50);
    look.unref();
  }

  // ---- measuring --------------------------------------------------------------------------------------------------

  const diagnostics = require('node:diagnostics_channel');
  // Kept: a channel without a reference loses its subscribers.
  const channel = {
    start: diagnostics.channel('http.server.request.start'),
    finish: diagnostics.channel('http.server.response.finish'),
  };
  const START = Symbol('pm.start');
  const loop = window();
  const latency = window();
  let requests = 0;

  function measure() {
    channel.start.subscribe(guarded(({ response }) => { response[START] = requestBegins(); }));
    channel.finish.subscribe(guarded(({ response }) => requestEnds(response[START])));
    probe(performance.now(), 20);
  }

  function requestBegins() {
    requests += 1;
    return performance.now();
  }

  function requestEnds(start) {
    const now = performance.now();
    if (start !== undefined) latency.add(now - start);
    return now;
  }

  // How late a timer is: ten times a second while requests come or the loop is late, else once.
  function probe(now, wait) {
    const before = requests;
    setTimeout(guarded(() => {
      const then = performance.now();
      const late = then - now - wait;
      loop.add(late);
      probe(then, requests !== before || late > 5 ? 100 : 1000);
    }), wait).unref();
  }

  // The spread of what was added in the last 15 to 30 seconds, to 1 %, in fixed memory: two histograms of microseconds,
  // up to three minutes, that are begun anew in turn.
  function window() {
    const half = () => ({ since: performance.now(), seen: createHistogram({ highest: 180e6, figures: 2 }) });
    let [old, young] = [half(), half()];
    const turn = () => {
      const age = performance.now() - young.since;
      if (age >= 15000) [old, young] = age < 30000 ? [young, half()] : [half(), half()];
    };
    return {
      add(millis) {
        turn();
        const micros = Math.min(180e6, Math.max(1, Math.round(millis * 1000)));
        for (const { seen } of [old, young]) seen.record(micros);
      },
      // Per second, and the values below which these percentages of all lie.
      spread(...percentages) {
        turn();
        const { since, seen } = old;
        const quantiles = percentages.map((each) => (seen.count === 0 ? null : seen.percentile(each) / 1000));
        return { rate: (seen.count * 1000) / Math.max(1000, performance.now() - since), quantiles };
      },
    };
  }

  function stats() {
    const { heapUsed, heapTotal, external, arrayBuffers } = memoryUsage();
    const http = latency.spread(50, 95, 99);
    return {
      heap: [heapUsed, heapTotal, external, arrayBuffers],
      loop: loop.spread(50, 95, 99).quantiles,
      handles: Reflect.apply(_getActiveHandles, process, []).length,
      requests: Reflect.apply(_getActiveRequests, process, []).length,
      connections: alive().reduce((sum, server) => sum + (server._connections || 0), 0),
      http: requests > 0 ? [http.rate, ...http.quantiles] : null,
    };
  }
}
