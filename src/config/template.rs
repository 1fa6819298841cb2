//! The file that `pm init` writes.

/// A short ecosystem.toml: one app that runs as it is once its script exists, and the keys most people reach for.
pub const ECOSYSTEM: &str = r#"# Start everything here with `pm start ecosystem.toml`, ship a new version with `pm reload ecosystem.toml`.
# Check it with `pm check ecosystem.toml`. Every key: docs/config.md.

[[apps]]
name = "app"
script = "server.js"          # relative to this file, or to `cwd`
instances = 2                 # a number, "max" or 0 (one per CPU), -1 (CPUs less one)
wait_ready = false            # true: an instance is ready when it says process.send('ready')
listen_timeout = "30s"        # not ready by then: the new version is dropped and the old one stays
kill_timeout = "10s"          # from SIGINT to SIGKILL
# listen = ["0.0.0.0:3000"]   # for programs that are not Node: a socket that all instances inherit
# env_file = ".env"

# A Node app needs no code for a reload without loss. One that has things of its own to end does it on SIGINT:
#   process.on('SIGINT', () => {
#     server.close(async () => {   // called when the last request is answered
#       await database.end();
#       process.exit(0);
#     });
#   });

[apps.env]
NODE_ENV = "development"

# Chosen with `pm start ecosystem.toml --env production`.
[apps.env_production]
NODE_ENV = "production"
"#;
