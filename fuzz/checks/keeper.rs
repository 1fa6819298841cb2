//! Frames between keeper and supervisor, in both directions, and the command inside of a spawn.

use pm::keeper::wire::{CommandView, FromKeeper, ToKeeper};

/// The first byte says in which direction it goes, the second how many descriptors came along. Whatever is understood is
/// understood the same after it was written again.
pub(crate) fn keeper_wire(input: &[u8]) {
    let [direction, fds, frame @ ..] = input else { return };
    let fds = usize::from(*fds);
    match direction % 3 {
        0 => {
            let Ok(message) = ToKeeper::decode(frame, fds) else { return };
            if matches!(message, ToKeeper::Unknown { .. }) {
                return;
            }
            let again = message.encode(fds).expect("what was read can be written");
            assert_eq!(ToKeeper::decode(&again, fds).as_ref(), Ok(&message));
            if let ToKeeper::Spawn(spawn) = message {
                command(spawn.command.as_deref().unwrap_or_default());
            }
        }
        1 => {
            let Ok(message) = FromKeeper::decode(frame, fds) else { return };
            if matches!(message, FromKeeper::Unknown { .. }) {
                return;
            }
            let again = message.encode(fds).expect("what was read can be written");
            assert_eq!(FromKeeper::decode(&again, fds).as_ref(), Ok(&message));
        }
        _ => command(frame),
    }
}

fn command(bytes: &[u8]) {
    let Ok(view) = CommandView::decode(bytes) else { return };
    let command = view.to_command();
    let again = command.encode().expect("what was read can be written");
    assert_eq!(CommandView::decode(&again).expect("and read").to_command(), command);
    // Texts borrow from the frame and lists are bounded by it: a length that lies reserves nothing.
    assert!(command.args.len() + command.env.len() <= bytes.len());
}
