//! All tests that run the gateway from outside. One program, because they mostly wait: see tests/README.md.

#[path = "../support/mod.rs"]
mod support;

mod coap;
mod config;
mod field_lines;
mod field_peers;
mod field_people;
mod field_settings;
mod message;
mod people;
mod stand_in;
mod update;

// The proofs: what takes minutes there is ignored unless it is asked for.
mod clients;
mod crowd;
mod damaged;
mod endurance;
mod lossy;
mod outage;
