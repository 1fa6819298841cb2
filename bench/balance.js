// The server that bench/balance.py asks. `/block` keeps its event loop busy for 40 ms without using the processor.
const http = require('http');
const wait = new Int32Array(new SharedArrayBuffer(4));
const server = http.createServer((request, response) => {
  if (request.url === '/block') Atomics.wait(wait, 0, 0, 40);
  response.setHeader('x-slot', process.env.NODE_APP_INSTANCE);
  response.end('ok\n');
});
server.keepAliveTimeout = 60_000;
server.listen(Number(process.env.PORT), '127.0.0.1');
