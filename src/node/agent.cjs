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
  const { performance } = require('node:perf_hooks');
  const { clearInterval, setImmediate, setInterval, setTimeout } = require('node:timers');
  const { send, listenerCount, memoryUsage, _getActiveHandles, _getActiveRequests } = process;
  const { listen, getConnections } = net.Server.prototype;

  // How long a TLS connection may stay without a parser before it counts as upgraded and not as in its handshake.
  const HANDSHAKE = 1000;
  // How long a client that was told to go has to end its HTTP/2 session by itself.
  const LEAVE = 100;
  const STEP = 15;

  // Servers that were told to listen. Weak: an app that makes and drops many servers does not grow.
  let servers = [];
  let pruneAt = 32;
  let greeted = false;
  let drain = null;
  // Connections that the supervisor handed over, once it balances by their number.
  let handed = null;
  // Sessions of HTTP/2 servers: their open streams, when the last one was closed, and whether they are told to go.
  const sessions = new Map();
  // Open websockets, with what had been written to them before the upgrade; followed only where they are to be closed.
  let websockets = null;

  // ---- servers ----------------------------------------------------------------------------------------------------

  function remember(server) {
    if (alive().includes(server)) return;
    servers.push(new WeakRef(server));
    if (servers.length > pruneAt) {
      servers = servers.filter((ref) => ref.deref() !== undefined);
      pruneAt = servers.length * 2 + 32;
    }
    // Only servers of HTTP/2 have it. Node keeps no list of a server's sessions before version 24.
    if (typeof server.updateSettings === 'function') server.on('session', guarded(followSession));
    if (websockets !== null) followUpgrades(server);
  }

  function alive() {
    return servers.map((ref) => ref.deref()).filter((server) => server !== undefined);
  }

  // What the app must not notice may fail without a word.
  function guarded(action) {
    return (...args) => {
      try {
        action(...args);
      } catch { /* the app goes on as if we were not here */ }
    };
  }

  const rememberGuarded = guarded(remember);
  function listenRemembered(...args) {
    rememberGuarded(this);
    return Reflect.apply(listen, this, args);
  }
  for (const property of ['name', 'length']) {
    Object.defineProperty(listenRemembered, property, { value: listen[property], configurable: true });
  }
  net.Server.prototype.listen = listenRemembered;

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

  function followUpgrades(server) {
    const { emit } = server;
    // Those of HTTP/1 have it.
    if (!('keepAliveTimeout' in server) || emit.name === 'emitFollowed') return;
    const note = guarded((request, socket) => {
      if (!/^websocket$/i.test(request.headers.upgrade)) return;
      websockets.set(socket, socket.bytesWritten);
      socket.once('close', () => websockets.delete(socket));
    });
    server.emit = function emitFollowed(name, ...args) {
      if (name === 'upgrade') note(...args);
      return Reflect.apply(emit, this, [name, ...args]);
    };
  }

  // ---- the channel ------------------------------------------------------------------------------------------------

  function say(message) {
    // With a callback a closed channel is no 'error' event, which would end the app.
    if (process.connected) Reflect.apply(send, process, [message, undefined, undefined, () => {}]);
  }

  process.on('internalMessage', guarded((message, handle) => {
    if (message === null || typeof message !== 'object') return;
    if (handed !== null && message.act === 'newconn' && message.cmd === 'NODE_CLUSTER') handOver(handle);
    if (message.cmd === 'NODE_PM_HELLO') {
      if (!greeted) measure();
      greeted = true;
      if (message.websockets && websockets === null) {
        websockets = new Map();
        for (const server of alive()) followUpgrades(server);
      }
      say({ cmd: 'NODE_PM_HELLO', version: process.version });
    } else if (!greeted) {
      // Not from a supervisor that knows us.
    } else if (message.cmd === 'NODE_PM_LISTENERS') {
      const count = Reflect.apply(listenerCount, process, [message.signal]);
      say({ cmd: 'NODE_PM_LISTENERS', signal: message.signal, count });
    } else if (message.cmd === 'NODE_PM_DRAIN') {
      startDrain(message);
    } else if (message.cmd === 'NODE_PM_PROBE') {
      takeProbe(handle);
    } else if (message.cmd === 'NODE_PM_STATS') {
      say({ cmd: 'NODE_PM_STATS', ask: message.ask, ...stats() });
    } else if (message.cmd === 'NODE_PM_WATCH') {
      handed ??= { received: 0, closed: 0, open: new WeakSet(), planned: false };
      say({ cmd: 'NODE_PM_CLOSED', received: handed.received, closed: handed.closed });
    }
  }));

  // A check comes as a socket of its own: the app's HTTP server takes it like a connection that it has accepted, so that
  // it reaches this very process, without a port and without TLS.
  function takeProbe(handle) {
    const server = alive().find((each) => each.listening && each.listenerCount('request') > 0);
    if (server === undefined) {
      handle.close();
      return;
    }
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
    if (!handle || !(handle.fd >= 0)) {
      ended();
      return;
    }
    handed.open.add(handle);
    handle.close = closeCounted;
    if (typeof handle.reset === 'function') handle.reset = resetCounted;
  }

  function closeCounted(...args) {
    if (handed.open.delete(this)) ended();
    return Reflect.apply(Object.getPrototypeOf(this).close, this, args);
  }

  function resetCounted(...args) {
    if (handed.open.delete(this)) ended();
    return Reflect.apply(Object.getPrototypeOf(this).reset, this, args);
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
      for (const server of alive()) stopAccepting(server);
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
    const { _storeHeader } = response;
    if (response.headersSent || typeof _storeHeader !== 'function') return;
    response.shouldKeepAlive = false;
    response.setHeader('Connection', 'close');
    response._storeHeader = function storeHeader(...args) {
      if (!/upgrade/i.test(this.getHeader('connection'))) this.setHeader('Connection', 'close');
      return Reflect.apply(_storeHeader, this, args);
    };
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
    server._handle = {
      fd: -1,
      close(callback) {
        clearInterval(keep);
        if (typeof callback === 'function') setImmediate(callback);
      },
      ref: () => keep.ref(),
      unref: () => keep.unref(),
      hasRef: () => keep.hasRef(),
      getsockname: (out) => (Object.assign(out, name), 0),
      getAsyncId: () => -1,
    };
    handle.close();
  }

  const step = guarded(() => {
    const current = drain;
    const now = performance.now();
    const all = alive();
    let left = all.length;
    let open = 0;
    endSessions(now);
    if (left === 0 || now >= current.leaveAt) finish(current);
    for (const server of all) {
      if (now >= current.idleUntil) closeIdle(server);
      const counted = guarded((error, count) => {
        open += error ? 0 : count - upgraded(server, count, now);
        left -= 1;
        if (left <= 0 && open <= 0) finish(current);
      });
      Reflect.apply(getConnections, server, [counted]);
    }
  });

  function closeIdle(server) {
    if (typeof server.closeIdleConnections === 'function') server.closeIdleConnections();
    // To Node a connection that has not said anything yet is not idle.
    for (const { socket } of parsers(server) ?? []) if (socket && socket.bytesRead === 0) socket.destroy();
  }

  // Upgraded connections (websockets) last as long as the client likes; the drain does not wait for them.
  function upgraded(server, count, now) {
    const known = parsers(server);
    const upgrades = server.listenerCount('upgrade') + server.listenerCount('connect') > 0;
    if (known === null || !upgrades || now < drain.websocketsUntil) return 0;
    if (typeof server.setSecureContext === 'function' && now < drain.since + HANDSHAKE) return 0;
    return Math.max(0, count - known.length);
  }

  function finish(current) {
    if (current !== drain || current.timer === null) return;
    clearInterval(current.timer);
    current.timer = null;
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
      const late = Math.max(0, then - now - wait);
      loop.add(late);
      probe(then, requests !== before || late > 5 ? 100 : 1000);
    }), wait).unref();
  }

  // The spread of what was added in the last 15 to 30 seconds, to 5 %, in fixed memory: eight classes to each doubling
  // from 0.01 ms to three minutes.
  function window() {
    const half = () => ({ since: performance.now(), count: 0, classes: new Uint32Array(192) });
    let old = null;
    let young = half();
    const turn = () => {
      const age = performance.now() - young.since;
      if (age < 15000) return;
      old = age < 30000 ? young : null;
      young = half();
    };
    return {
      add(millis) {
        turn();
        young.count += 1;
        young.classes[Math.min(191, Math.max(0, Math.round(Math.log2(millis * 100) * 8)))] += 1;
      },
      // Per second, and the value below which these shares of all lie.
      spread(...shares) {
        turn();
        const total = young.count + (old ? old.count : 0);
        const seconds = (performance.now() - (old ?? young).since) / 1000;
        const quantiles = shares.map((share) => {
          let rest = Math.ceil(total * share);
          const found = young.classes.findIndex((count, i) => (rest -= count + (old ? old.classes[i] : 0)) <= 0);
          return total === 0 ? null : 2 ** (found / 8) / 100;
        });
        return { rate: total / Math.max(1, seconds), quantiles };
      },
    };
  }

  function stats() {
    const { heapUsed, heapTotal, external, arrayBuffers } = memoryUsage();
    const http = latency.spread(0.5, 0.95, 0.99);
    return {
      heap: [heapUsed, heapTotal, external, arrayBuffers],
      loop: loop.spread(0.5, 0.95, 0.99).quantiles,
      handles: Reflect.apply(_getActiveHandles, process, []).length,
      requests: Reflect.apply(_getActiveRequests, process, []).length,
      connections: alive().reduce((sum, server) => sum + (server._connections || 0), 0),
      http: requests > 0 ? [http.rate, ...http.quantiles] : null,
    };
  }
}
