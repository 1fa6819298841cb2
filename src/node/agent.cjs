'use strict';
// pm's agent: runs in the app's process before the app (`node --require`), and stays passive until the supervisor
// greets it over the IPC channel with messages that the app never sees. Answers how many listeners the app has for
// the kill signal, and lets the app's connections end before that signal comes.
//
// It never keeps the process alive, never throws into the app, and does nothing in worker threads and in children
// that the app forks (they inherit the option, but nobody greets them).

if (require('node:worker_threads').isMainThread && typeof process.send === 'function') install();

function install() {
  // The app sees the arguments it was given, and hands no more than those to the children it forks.
  const own = process.execArgv.indexOf(__filename);
  if (own > 0 && process.execArgv[own - 1] === '--require') process.execArgv.splice(own - 1, 2);

  const net = require('node:net');
  // The app may replace or wrap both later.
  const { send, listenerCount } = process;
  const { listen } = net.Server.prototype;
  const { getConnections } = net.Server.prototype;

  // Servers that were told to listen. Weak: an app that makes and drops many servers does not grow.
  let servers = [];
  let pruneAt = 32;
  let greeted = false;
  let drain = null;
  // Connections that the supervisor handed over, once it balances by their number.
  let handed = null;

  function remember(server) {
    if (alive().includes(server)) return;
    servers.push(new WeakRef(server));
    if (servers.length > pruneAt) {
      servers = servers.filter((ref) => ref.deref() !== undefined);
      pruneAt = servers.length * 2 + 32;
    }
  }

  function alive() {
    return servers.map((ref) => ref.deref()).filter((server) => server !== undefined);
  }

  function listenRemembered(...args) {
    try {
      remember(this);
    } catch { /* a server that cannot be drained still listens */ }
    return Reflect.apply(listen, this, args);
  }
  for (const property of ['name', 'length']) {
    Object.defineProperty(listenRemembered, property, { value: listen[property], configurable: true });
  }
  net.Server.prototype.listen = listenRemembered;

  function say(message) {
    // With a callback a closed channel is no 'error' event, which would end the app.
    if (process.connected) Reflect.apply(send, process, [message, undefined, undefined, () => {}]);
  }

  process.on('internalMessage', (message, handle) => {
    try {
      if (message === null || typeof message !== 'object') return;
      if (handed !== null && message.act === 'newconn' && message.cmd === 'NODE_CLUSTER') handOver(handle);
      if (message.cmd === 'NODE_PM_HELLO') {
        greeted = true;
        say({ cmd: 'NODE_PM_HELLO', version: process.version });
      } else if (greeted && message.cmd === 'NODE_PM_LISTENERS') {
        const count = Reflect.apply(listenerCount, process, [message.signal]);
        say({ cmd: 'NODE_PM_LISTENERS', signal: message.signal, count });
      } else if (greeted && message.cmd === 'NODE_PM_DRAIN') {
        startDrain(message.idle === 'close', message.within);
      } else if (greeted && message.cmd === 'NODE_PM_WATCH') {
        handed ??= { received: 0, closed: 0, open: new WeakSet(), planned: false };
        say({ cmd: 'NODE_PM_CLOSED', received: handed.received, closed: handed.closed });
      }
    } catch { /* the supervisor goes on without an answer */ }
  });

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
    setImmediate(() => {
      handed.planned = false;
      say({ cmd: 'NODE_PM_CLOSED', closed: handed.closed });
    }).unref();
  }

  function startDrain(closeIdle, within) {
    const before = drain;
    drain = { closeIdle, until: performance.now() + within, timer: null };
    if (before === null) {
      for (const server of alive()) stopAccepting(server);
      require('node:diagnostics_channel').subscribe('http.server.request.start', endAfter);
      try {
        endBusyConnections();
      } catch { /* they end with the time limit or their next request */ }
    } else {
      clearInterval(before.timer);
    }
    drain.timer = setInterval(step, 15);
    drain.timer.unref();
    step();
  }

  // Every further response says `Connection: close`, unless the app itself says otherwise.
  function endAfter({ response }) {
    response.shouldKeepAlive = false;
  }

  // Responses that were begun before the drain. Node keeps a server's connections in a list for its own time-outs;
  // where that is missing, such a connection ends with the time limit or its next request.
  function endBusyConnections() {
    for (const server of alive()) {
      const symbol = Object.getOwnPropertySymbols(server).find((each) => each.description === 'http.server.connections');
      const list = symbol && server[symbol];
      if (!list || typeof list.all !== 'function') continue;
      for (const parser of list.all()) {
        const response = parser && parser.socket && parser.socket._httpMessage;
        if (response && !response.headersSent && response.shouldKeepAlive === true) response.shouldKeepAlive = false;
      }
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

  function step() {
    try {
      const current = drain;
      const all = alive();
      let left = all.length;
      let open = 0;
      const closeIdle = current.closeIdle || performance.now() >= current.until;
      const counted = (error, count) => {
        open += error ? 0 : count;
        left -= 1;
        if (left <= 0 && open === 0) finish(current);
      };
      if (left === 0) finish(current);
      for (const server of all) {
        if (closeIdle && typeof server.closeIdleConnections === 'function') server.closeIdleConnections();
        Reflect.apply(getConnections, server, [counted]);
      }
    } catch { /* the supervisor's own time limit ends the drain */ }
  }

  function finish(current) {
    if (current !== drain || current.timer === null) return;
    clearInterval(current.timer);
    current.timer = null;
    say({ cmd: 'NODE_PM_DRAINED' });
  }
}
