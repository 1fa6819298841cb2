//! `pm scale`.

use super::{Wording, apps_of, not_there, operate, show_table};
use crate::cli::Context;
use crate::cli::args::Scale;
use crate::cli::error::CliError;
use crate::ipc::protocol::{Request, ScaleTo};

pub(super) fn run(args: &Scale, context: &mut Context) -> Result<(), CliError> {
    let to = parse(&args.number)?;
    let Some(mut session) = context.session()? else {
        return Err(not_there(&args.target, context));
    };
    let request = Request::Scale { target: args.target.clone(), to };
    let done = operate(request, &Wording { verb: "scale" }, args.waiting.no_wait, &mut session, context)?;
    show_table(&apps_of(done.as_ref()), &mut session, context)
}

fn parse(text: &str) -> Result<ScaleTo, CliError> {
    let (make, digits): (fn(u32) -> ScaleTo, &str) = if let Some(rest) = text.strip_prefix('+') {
        (ScaleTo::Up, rest)
    } else if let Some(rest) = text.strip_prefix('-') {
        (ScaleTo::Down, rest)
    } else {
        (ScaleTo::To, text)
    };
    // `parse` alone would take "+-2" and "++2".
    let number = digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok()).flatten();
    number.map(make).ok_or_else(|| CliError::Usage {
        message: format!("{} is no number of instances", crate::config::error::quoted(text)),
        cause: None,
        hint: Some("Use `pm scale api 4`, `pm scale api +2` or `pm scale api -1`.".to_owned()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_steps() {
        for (text, expected) in [("4", ScaleTo::To(4)), ("+2", ScaleTo::Up(2)), ("-1", ScaleTo::Down(1))] {
            assert_eq!(parse(text).unwrap(), expected);
        }
        for text in ["", "+", "-", "+-2", "++2", "max", "1.5", "99999999999"] {
            assert_eq!(parse(text).unwrap_err().code(), 2, "{text}");
        }
    }
}
