// Says messages of 3 MB over its IPC channel, each known by its length, and listens after each: the answer shows that the
// stream of messages is whole, because a part of one would have swallowed the question.
const net = require('net')
let n = 0
const say = () => {
  n += 1
  process.send({ n, text: 'x'.repeat(3e6 + n) }, (error) => {
    if (error) throw error
    const server = net.createServer().listen(+process.env.PORT, '127.0.0.1', () => {
      console.log(`answered ${n}`)
      // Node says that a worker listens when this has returned, and not of a server that is closed by then.
      setImmediate(() => server.close(() => setTimeout(say, 20)))
    })
  })
}
process.on('SIGINT', () => process.exit(0))
say()
