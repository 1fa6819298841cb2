//! The whole fleet in a made-up world: scripted processes, a clock that jumps, a disk that fails, a supervisor that dies
//! after any prefix of its actions.
//!
//! `scenarios` tells stories about single promises, `together` about promises that meet; `overlap` lets every command meet every operation at every instant of
//! it; `memory` does that with memory limits; `random` throws 20,000 seeded sequences at the same world and
//! checks the invariants of `world` after every turn; `sabotage` plants bugs between the fleet and the world and
//! demands that the invariants find each of them.

#![expect(clippy::unwrap_used, reason = "helpers of tests, where a panic is an answer")]

mod behaviour;
mod memory;
mod overlap;
mod pains;
mod random;
mod rng;
mod sabotage;
mod scenarios;
mod specs;
mod together;
mod world;
