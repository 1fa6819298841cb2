// A genuine Node cluster of two, for comparison: NODE_CLUSTER_SCHED_POLICY chooses the policy.
const cluster = require('cluster');
cluster.setupPrimary({ exec: require('path').join(__dirname, 'web.js') });
cluster.fork();
cluster.fork();
