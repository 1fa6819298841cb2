//! Lines between the command line and the supervisor, in both directions.

use pm::ipc::codec;
use pm::ipc::protocol::{Call, Line, Request};
use pm::model::difference;
use pm::model::mask::{self, MASK, ShowEnv};
use pm::model::spec::AppSpec;

/// A stream as a peer could send it: any number of lines.
pub(crate) fn cli_protocol(input: &[u8]) {
    let mut stream = std::io::BufReader::with_capacity(16, input);
    let mut line = Vec::new();
    while codec::read_line(&mut stream, &mut line).is_ok() {
        assert!(!line.contains(&b'\n'));
        call(&line);
        answer(&line);
    }
}

fn call(line: &[u8]) {
    let Ok(call) = serde_json::from_slice::<Call>(line) else { return };
    let text = serde_json::to_string(&call).expect("what was read can be written");
    assert!(!text.contains('\n'));
    let again: Call = serde_json::from_str(&text).expect("and read");
    assert_eq!(serde_json::to_string(&again).expect("and written"), text);
    match &call.request {
        Request::Start { specs, .. } | Request::Apply { specs, .. } | Request::Act { specs, .. } => {
            specs.iter().for_each(spec);
        }
        _ => {}
    }
}

/// What is shown of an app shows none of its variables.
fn spec(spec: &AppSpec) {
    let shown = mask::spec(spec, ShowEnv::No);
    assert!(shown.env.vars.iter().all(|(key, value)| mask::is_open(key) || value == MASK));
    assert!(difference::differences(spec, spec).is_empty());
    let _ = (difference::settings(&shown), spec.name.file_stem());
    assert!(!spec.name.as_str().contains(['/', '\0']) && !spec.name.file_stem().contains('/'));
}

fn answer(line: &[u8]) {
    let raw = codec::raw_answer(line).map(<[u8]>::to_vec);
    if let Ok(line) = codec::parse(line) {
        let text = serde_json::to_vec(&line).expect("what was read can be written");
        let again: Line = serde_json::from_slice(&text).expect("and read");
        assert_eq!(again.op, line.op);
        assert_eq!(codec::raw_answer(&text), raw.as_deref(), "an answer passes through unchanged");
    }
}
