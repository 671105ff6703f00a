//! What the tests, the demo and the benches share: everything that surrounds the gateway, played on loopback.
//!
//! [`BotApi`] stands in for Telegram, [`Gateway`] runs the real binary in a directory of its own, [`Mote`] speaks CoAP
//! to it with bytes made by hand (so that the gateway's codec is not tested against itself), and [`Firmware`] is what a
//! mote makes of the replies.

// Each test program uses a part of this.
#![allow(dead_code, unused_imports)]

mod bot_api;
mod certificates;
mod field;
mod firmware;
mod gateway;
mod http;
mod line;
mod mote;
mod name_server;
mod needs;
mod proxy;
mod scene;
mod spoof;
mod telegram;
mod trouble;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use std::{env, fs, process, thread};

pub use bot_api::{BotApi, BotApiOptions, Call, ConnectionFault, Fault, Seen, every, next};
pub use certificates::Certificate;
pub use field::{Asked, FieldMote, GIVEN_UP, Outcome, at_once, judge};
pub use firmware::{Firmware, REPLY_MAX};
pub use gateway::{Finished, Gateway, PASSWORD, Setup, binary, free_udp_port, loopback};
pub use line::Line;
pub use mote::*;
pub use name_server::{NameServer, Names};
pub use needs::{has_client, has_ipv6, in_namespaces, run};
pub use proxy::Proxy;
pub use scene::Scene;
pub use spoof::{can_send_from, send_from};
pub use telegram::{Pace, Refusal};

/// How long an empty page counts: Telegram holds a fetch that repeats its offset before, so it is not asked again.
pub const EMPTY_PAGE_HOLDS: Duration = Duration::from_secs(3);

/// What a mote is answered when its text was delivered, and when it knows everything.
pub const SENT: &str = "Messages sent successfully";
pub const NOTHING: &str = "No Updates";

/// Two people, and the first as a mote hears of her.
pub const ADA: i64 = 1_234_567_890;
pub const BOB: i64 = 2_345_678_901;
pub const ADA_TOKEN: &str = "Ada:1234567890";

/// The bot token of the firmware's datagrams, and of the stand-in unless told otherwise.
pub const TOKEN: &str = "123456789:AAEaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";

/// A directory that is gone when the value is.
pub struct TempDir(PathBuf);

impl TempDir {
    pub fn new() -> Self {
        static COUNTER: AtomicUsize = AtomicUsize::new(0);
        let name = format!(
            "coap_websocket-{}-{}",
            process::id(),
            COUNTER.fetch_add(1, Ordering::Relaxed)
        );
        let path = env::temp_dir().join(name);
        let _ = fs::remove_dir_all(&path); // left by a killed process that had our number
        fs::create_dir_all(&path).expect("create a temporary directory");
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Bytes from hexadecimal digits; white space between them is ignored.
pub fn hex(digits: &str) -> Vec<u8> {
    let digits: Vec<u8> = digits
        .bytes()
        .filter(|byte| !byte.is_ascii_whitespace())
        .collect();
    assert!(
        digits.len().is_multiple_of(2),
        "odd number of hexadecimal digits"
    );
    let byte = |pair: &[u8]| {
        u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).expect("hexadecimal digits")
    };
    digits.chunks(2).map(byte).collect()
}

/// One datagram of the unmodified firmware, from `tests/firmware/`.
pub fn firmware(name: &str) -> Vec<u8> {
    hex(match name {
        "message_all_three_chats" => include_str!("../firmware/message_all_three_chats.hex"),
        "message_all_two_chats" => include_str!("../firmware/message_all_two_chats.hex"),
        "message_one_chat_text_with_separators" => {
            include_str!("../firmware/message_one_chat_text_with_separators.hex")
        }
        "update" => include_str!("../firmware/update.hex"),
        _ => panic!("no datagram is called {name}"),
    })
}

/// The rows of a table, one a line, with columns between `|`. Columns that are not there are empty.
pub fn rows<const COLUMNS: usize>(table: &str) -> Vec<[&str; COLUMNS]> {
    let lines = table.lines().filter(|line| !line.is_empty());
    let row = |line| {
        let mut columns = str::split(line, '|').map(str::trim);
        let row = [(); COLUMNS].map(|()| columns.next().unwrap_or_default());
        assert_eq!(columns.next(), None, "too many columns: {line}");
        row
    };
    lines.map(row).collect()
}

/// As [`in_parallel`], for the rows of a table.
pub fn each_row<const COLUMNS: usize>(table: &str, check: impl Fn([&str; COLUMNS]) + Sync) {
    let rows = rows(table);
    let names: Vec<String> = rows.iter().map(|row| row.join(" | ")).collect();
    let cases: Vec<_> = names.iter().map(String::as_str).zip(rows).collect();
    in_parallel(&cases, |row| check(*row));
}

/// Waits until `done` says so; false after `limit`.
pub fn within(limit: Duration, mut done: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + limit;
    loop {
        if done() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Runs every case of a table on a thread of its own, because most cases only wait; fails naming the cases that failed.
pub fn in_parallel<Case: Sync>(cases: &[(&str, Case)], check: impl Fn(&Case) + Sync) {
    let failed: Vec<&str> = thread::scope(|scope| {
        let running: Vec<_> = cases
            .iter()
            .map(|(name, case)| (*name, scope.spawn(|| check(case))))
            .collect();
        running
            .into_iter()
            .filter_map(|(name, thread)| thread.join().is_err().then_some(name))
            .collect()
    });
    assert!(failed.is_empty(), "failed cases: {failed:?}");
}

/// A stand-in and a gateway that uses it, as most tests need them.
pub fn start() -> (BotApi, Gateway) {
    let api = BotApi::start();
    let gateway = start_with(&api, Setup::new(&api));
    (api, gateway)
}

/// As [`start`], with other settings. The gateway has made its first fetch, in which it has heard all that people wrote
/// before; so it does nothing by itself for some seconds.
pub fn start_with(api: &BotApi, setup: Setup) -> Gateway {
    let gateway = Gateway::with(setup);
    api.wait_for("the first fetch", |seen| seen.count("getUpdates") > 0);
    assert!(Mote::new(gateway.address()).ping(PATIENCE));
    gateway
}

/// The payload of POST /message as the firmware writes it.
pub fn message(api: &BotApi, chats: &str, text: &str) -> String {
    form(&api.url(), api.token(), chats, text)
}

/// The payload of POST /update.
pub fn update(api: &BotApi) -> String {
    format!("url={}&token={}", api.url(), api.token())
}

/// A whole poll by a mote, acknowledged: the tokens, or `No Updates`.
#[track_caller]
pub fn poll(mote: &Mote, api: &BotApi) -> String {
    let response = mote.post_separate("update", update(api));
    let tokens = response.text();
    let code = if tokens == NOTHING { "2.03" } else { "2.05" };
    assert_eq!(response.code(), code, "{response}");
    tokens
}

/// Polls until the gateway has heard all that people wrote, and returns the last that the mote was told. That takes up to
/// [`EMPTY_PAGE_HOLDS`].
#[track_caller]
pub fn hear(mote: &Mote, api: &BotApi) -> String {
    let mut told = NOTHING.to_string();
    let has_heard = within(PATIENCE, || {
        let is_all = api.waiting_updates() == 0;
        let reply = poll(mote, api);
        if reply != NOTHING {
            told = reply;
        }
        is_all
    });
    assert!(has_heard, "what people wrote is not heard");
    told
}

/// The seed of a test's [`Numbers`], printed so that a failure can be repeated: `SEED=7 cargo test …`.
pub fn seed() -> u64 {
    let seed = env::var("SEED").map_or(2026, |seed| seed.parse().expect("SEED is a number"));
    println!("SEED={seed}");
    seed
}

/// Numbers for tests that need many different ones, the same in every run (SplitMix64).
pub struct Numbers(pub u64);

impl Numbers {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}
