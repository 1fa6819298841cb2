//! Keys of specs that only a later version knows.
//!
//! Unknown fields of requests are ignored, so that versions understand each other. Not those of specs: an app that is to
//! run as another user must not run as the daemon's because the daemon is older than that key.

use serde_json::Value;

use super::protocol::Request;

/// The first key of a spec in this request that was not understood, as `app: path.to.key`. `line` is what `request` was
/// read from.
#[must_use]
pub fn unknown_key(request: &Request, line: &[u8]) -> Option<String> {
    if request.specs().is_empty() {
        return None;
    }
    let sent: Value = serde_json::from_slice(line).ok()?;
    // `{"request": {"start": {"specs": […]}}}`, whatever the verb.
    let sent = sent.get("request")?.as_object()?.values().next()?.get("specs")?.as_array()?;
    sent.iter().zip(request.specs()).find_map(|(sent, spec)| {
        let understood = serde_json::to_value(spec).ok()?;
        Some(format!("{}: {}", spec.name, missing(sent, &understood)?))
    })
}

fn missing(sent: &Value, understood: &Value) -> Option<String> {
    match (sent, understood) {
        (Value::Object(sent), Value::Object(understood)) => {
            sent.iter().find_map(|(key, value)| match understood.get(key) {
                Some(known) => missing(value, known).map(|path| format!("{key}.{path}")),
                // What is not set asks for nothing.
                None => (!value.is_null()).then(|| key.clone()),
            })
        }
        (Value::Array(sent), Value::Array(understood)) => {
            sent.iter().zip(understood).find_map(|(sent, understood)| missing(sent, understood))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::ipc::protocol::Call;
    use crate::model::id::AppName;
    use crate::model::spec::{AppSpec, CommandSpec, Runtime};

    fn line(change: impl FnOnce(&mut Value)) -> (Request, Vec<u8>) {
        let command = CommandSpec {
            script: "/srv/app".into(),
            interpreter: None,
            interpreter_args: Vec::new(),
            args: Vec::new(),
            runtime: Runtime::Other,
        };
        let spec = AppSpec::new(AppName::new("web").unwrap(), command, "/srv".into());
        let mut spec = serde_json::to_value(spec).unwrap();
        change(&mut spec);
        let line = json!({ "v": 1, "op": 7, "request": { "start": { "specs": [spec], "shell": {} } } });
        let line = serde_json::to_vec(&line).unwrap();
        (serde_json::from_slice::<Call>(&line).unwrap().request, line)
    }

    #[test]
    fn what_is_known_passes_and_what_a_later_version_added_is_named() {
        let (request, text) = line(|_| {});
        assert_eq!(unknown_key(&request, &text), None);
        let (request, text) = line(|spec| spec["seal"] = json!(true));
        assert_eq!(unknown_key(&request, &text).as_deref(), Some("web: seal"));
        let (request, text) = line(|spec| spec["stop"]["politely"] = json!({ "a": 1 }));
        assert_eq!(unknown_key(&request, &text).as_deref(), Some("web: stop.politely"));
        let (request, text) = line(|spec| spec["seal"] = Value::Null);
        assert_eq!(unknown_key(&request, &text), None, "not asked for");
    }
}
