// The server under load: small answers, and the SIGINT handler of the tutorials.
const server = require('http').createServer((request, response) => response.end('hello\n'));
server.listen(Number(process.env.PORT), '127.0.0.1', () => process.send && process.send('ready'));
process.on('SIGINT', () => server.close(() => process.exit(0)));
