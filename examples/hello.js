// A web server that is ready for reloads without a lost request. Needs nothing but Node.
//
//   pm start examples/hello.js -i 2 --wait-ready
//   curl http://localhost:3000
//   pm reload hello
'use strict';

const http = require('node:http');

const port = process.env.PORT || 3000;
const slot = process.env.NODE_APP_INSTANCE || '0';
// Change it, reload, and watch the answers change without one of them failing.
const version = process.env.VERSION || '1';

const server = http.createServer((request, response) => {
  response.setHeader('Content-Type', 'text/plain; charset=utf-8');
  response.end(`hello from pid ${process.pid}, slot ${slot}, version ${version}\n`);
});

server.listen(port, () => {
  console.log(`listening on port ${server.address().port}, pid ${process.pid}, slot ${slot}, version ${version}`);
  // Tells pm that this instance may get traffic (wait_ready). Only there when somebody listens to it.
  if (process.send) process.send('ready');
});

process.on('SIGINT', () => {
  // Takes no new connections, finishes what is in flight, then leaves.
  server.close(() => process.exit(0));
});
