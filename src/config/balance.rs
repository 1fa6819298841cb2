//! Which `balance` an app can have: it depends on who accepts its connections.

use crate::model::spec::{AppSpec, Balance, ListenAddress};

/// What is wrong with a balance, and what would work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unfit {
    /// Why it cannot be.
    pub message: String,
    /// What can.
    pub help: &'static str,
}

/// The balance of an app that does not say.
#[must_use]
pub fn default_for(is_node_cluster: bool, inherits: bool) -> Balance {
    // Instances accept from a socket that they inherit by themselves.
    if inherits && !is_node_cluster { Balance::Shared } else { Balance::RoundRobin }
}

/// Whether the app can be balanced as its spec says. Without instances that share a socket it does not matter.
///
/// # Errors
/// [`Unfit`], for people.
pub fn check(spec: &AppSpec) -> Result<(), Unfit> {
    let unfit = |message: &str, help: &'static str| Err(Unfit { message: message.to_owned(), help });
    if spec.balance == Balance::StickySlots && spec.instances > Balance::STICKY_SLOTS_MAX {
        return unfit(
            &format!("balance = \"sticky-slots\" is for up to {} instances", Balance::STICKY_SLOTS_MAX),
            "use balance = \"sticky\" or \"slots\"",
        );
    }
    if spec.listen.is_empty() {
        return Ok(());
    }
    match spec.balance {
        Balance::Slots | Balance::StickySlots if spec.is_node_cluster() => unfit(
            &format!(
                "balance = \"{}\" opens a socket per slot for what the workers themselves listen on, so `listen` has no place in it",
                spec.balance
            ),
            "remove `listen`: workers of a Node cluster need none; or use balance = \"shared\"",
        ),
        Balance::Slots | Balance::StickySlots => {
            match spec.listen.iter().find(|l| matches!(l.address, ListenAddress::Unix(_))) {
                Some(listener) => Err(Unfit {
                    message: format!(
                        "balance = \"{}\" needs TCP addresses: the kernel cannot spread the connections of {} over several sockets",
                        spec.balance, listener.address
                    ),
                    help: "use balance = \"shared\", or an address with a port",
                }),
                None => Ok(()),
            }
        }
        Balance::RoundRobin | Balance::LeastConnections | Balance::Sticky if !spec.is_node_cluster() => {
            Err(Unfit {
                message: format!(
                    "balance = \"{}\" is for Node clusters: instances that inherit a socket accept from it by themselves",
                    spec.balance
                ),
                help: "use balance = \"shared\" (one socket for all), \"slots\" (a socket for each slot) or \"sticky-slots\"",
            })
        }
        Balance::RoundRobin | Balance::LeastConnections | Balance::Sticky | Balance::Shared => Ok(()),
    }
}
