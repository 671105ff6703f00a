//! Damaged datagrams of the firmware to the running gateway: it serves on, no larger than before, and answers nothing
//! that is malformed or holds a secret.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::time::Instant;

use crate::support::Kind::{Ack, Con, Rst};
use crate::support::*;

/// A ping follows that many datagrams: its RST tells that they were read, and the socket's buffer holds more of them.
const BATCH: usize = 32;
/// More than the gateway remembers.
const MOTES: usize = 100;
/// Of the resident memory, after the first fifth.
const GROWTH_KIB: u64 = 1024;
const LOG_MAX: usize = 1 << 20;
const URL: &str = "https://api.telegram.org/bot";

#[test]
fn some_damaged_datagrams() {
    bombard(20_000);
}

#[test]
#[ignore = "takes minutes: cargo test --release damaged:: -- --include-ignored"]
fn a_million_damaged_datagrams() {
    bombard(1_000_000);
}

fn bombard(total: usize) {
    let api = BotApi::with(BotApiOptions {
        names: vec!["api.telegram.org".into()],
        ..BotApiOptions::default()
    });
    for chat in 1..=3 {
        api.person_writes(chat, "Ada", "hi");
    }
    let proxy = Proxy::start("api.telegram.org:443", api.address());
    let mut gateway = start_with_nearly_full_log(&api, &proxy);
    let whole = [
        "message_all_three_chats",
        "message_all_two_chats",
        "message_one_chat_text_with_separators",
        "update",
    ]
    .map(firmware);
    let motes: Vec<Mote> = (1..=MOTES)
        .map(|number| Mote::at(&format!("127.0.1.{number}"), gateway.address()))
        .collect();
    let (pid, threads, start) = (gateway.pid(), gateway.threads(), Instant::now());
    let mut random = Numbers(seed());
    let mut replies = BTreeMap::new();
    let mut rss = 0;
    for batch in 0..total / BATCH {
        let mote = &motes[random.below(MOTES)];
        for number in 0..BATCH {
            send_one(mote, &whole, batch * BATCH + number, &mut random);
        }
        listen(mote, &mut random, &mut replies);
        if batch == total / BATCH / 5 {
            rss = gateway.rss_kib();
        }
    }
    let (time, lost) = (start.elapsed(), dropped(gateway.address().port()));
    assert_eq!(lost, 0, "datagrams that the gateway never saw");
    let rss_after = gateway.rss_kib();
    assert!(gateway.is_running() && gateway.pid() == pid);
    assert_eq!(gateway.threads(), threads);
    assert_serves(&api, &gateway);
    judge_texts(&api, total);
    judge_replies(&replies);
    let lines = judge_logs(&gateway);
    println!("{total} datagrams in {time:.1?}, none lost; {lines} lines of log; {replies:?}");
    println!("RSS: {rss} KiB after a fifth, {rss_after} KiB at the end");
    assert!(rss_after <= rss + GROWTH_KIB);
}

/// The firmware's datagrams name api.telegram.org, which a proxy leads to the stand-in.
fn start_with_nearly_full_log(api: &BotApi, proxy: &Proxy) -> Gateway {
    let config = format!("[telegram]\nbot_token = {TOKEN}\n");
    let setup = Setup::ipv4(api).config(&config);
    let mut gateway = Gateway::stopped(setup.env("HTTPS_PROXY", proxy.url()));
    let nearly_full = "2026-01-31 12:00:00 [INFO] older\n".repeat(LOG_MAX / 36);
    fs::write(gateway.directory().join("coap_server.log"), nearly_full).unwrap();
    gateway.restart();
    gateway
}

/// A damaged datagram; or now and then a whole one, with a text that must not arrive twice, however often it is sent.
fn send_one(mote: &Mote, whole: &[Vec<u8>], number: usize, random: &mut Numbers) {
    if random.below(64) == 0 {
        let form = form(URL, TOKEN, "77", &format!("once {number}"));
        let request = mote.post("message", form);
        (0..1 + random.below(3)).for_each(|_| mote.send(&request));
        return;
    }
    let mut bytes = whole[random.below(whole.len())].clone();
    if random.below(8) > 0 {
        let id = random.next() as u16;
        bytes[2..4].copy_from_slice(&id.to_be_bytes()); // else it comes again
    }
    damage(&mut bytes, whole, random);
    mote.send_raw(&bytes);
}

fn assert_serves(api: &BotApi, gateway: &Gateway) {
    let mote = Mote::at("127.0.2.1", gateway.address());
    assert!(mote.ping(PATIENCE));
    mote.post_separate("message", form(URL, TOKEN, "88", "the last"))
        .expect("2.05", "Messages sent successfully");
    assert_eq!(api.texts_to(88), ["the last"]);
    let told = mote.post_separate("update", format!("url={URL}&token={TOKEN}"));
    assert!(told.text().contains("Ada:1;"), "the users are forgotten");
}

fn judge_texts(api: &BotApi, total: usize) {
    let mut once = api.texts_to(77);
    once.retain(|text| text.starts_with("once "));
    assert!(once.len() > total / 2000, "{} texts came", once.len());
    let different: HashSet<_> = once.iter().collect();
    assert_eq!(different.len(), once.len(), "a text came twice");
}

fn judge_replies(replies: &BTreeMap<String, usize>) {
    for kind in [
        "Rst", "Ack", "Ack 4.00", "Ack 4.02", "Ack 4.03", "Ack 4.04", "Ack 4.05", "Con 2.05",
        "Non 4.04",
    ] {
        assert!(replies.contains_key(kind), "no {kind} in {replies:?}");
    }
}

/// One to three things go wrong with a datagram, most of them where its header and options are.
fn damage(bytes: &mut Vec<u8>, whole: &[Vec<u8>], random: &mut Numbers) {
    for _ in 0..=random.below(3) {
        let near = if random.below(4) > 0 { 20 } else { 200 };
        let at = random.below(near).min(bytes.len());
        let end = (at + random.below(9)).min(bytes.len());
        match random.below(10) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            1 if at < bytes.len() => bytes[at] = b'\n', // in a path it would begin a line of the log
            2 => bytes.truncate(at),
            3 => drop(bytes.splice(
                at..at,
                random.next().to_be_bytes().into_iter().take(1 + end - at),
            )),
            4 => drop(bytes.drain(at..end)),
            // Version, type, token length; code.
            5 if bytes.len() > 1 => match random.below(3) {
                0 => bytes[0] ^= 0x10, // NON
                field => bytes[field - 1] = random.next() as u8,
            },
            // An option's delta and length.
            6 if bytes.len() > 6 => bytes[6] = random.next() as u8,
            // Another option behind the path, perhaps one of those that mean something.
            7 if bytes
                .get(6)
                .is_some_and(|first| bytes.len() > 7 + usize::from(first & 15)) =>
            {
                let behind = 7 + usize::from(bytes[6] & 15);
                let value = &random.next().to_be_bytes()[..random.below(4)];
                let delta = [1, 4, 6, 12, 0xd0, random.below(16) as u8][random.below(6)]; // 12, 15, 17, 23, and 24 and more
                let mut option = vec![(delta & 15) << 4 | value.len() as u8];
                if delta == 0xd0 {
                    option = vec![0xd0 | value.len() as u8, [3, 11, 15, 36][random.below(4)]]; // 27, 35, 39, 60
                }
                bytes.splice(behind..behind, [&option, value].concat());
            }
            // A piece of another one, or of this one again.
            8 => {
                let other = &whole[random.below(whole.len())];
                let from = random.below(other.len());
                bytes.splice(
                    at..end,
                    other[from..].iter().take(random.below(60)).copied(),
                );
            }
            9 if random.below(8) == 0 => {
                *bytes = (0..random.below(600))
                    .map(|_| random.next() as u8)
                    .collect()
            }
            _ => bytes.extend(random.next().to_be_bytes()),
        }
    }
}

/// Reads what came, until all that was sent has been read by the gateway; counts it by type and code.
fn listen(mote: &Mote, random: &mut Numbers, replies: &mut BTreeMap<String, usize>) {
    let ping = Message::new(Con, 0, mote.next_id());
    mote.send(&ping);
    loop {
        let reply = mote.receive(); // well-formed and without a secret, or it panics
        if (reply.kind, reply.id) == (Rst, ping.id) {
            return;
        }
        let kind = match reply.code {
            0 => format!("{:?}", reply.kind),
            _ => format!("{:?} {}", reply.kind, reply.code()),
        };
        *replies.entry(kind).or_default() += 1;
        assert!(
            reply.kind == Ack || reply.code >> 5 == 2 || reply.payload.is_empty(),
            "read as configuration: {reply}"
        );
        match (reply.kind, random.below(10)) {
            (Con, 1) => mote.reset(&reply),
            (Con, 2..) => mote.acknowledge(&reply),
            _ => {} // and some ACKs are lost
        }
    }
}

/// Datagrams that the kernel threw away before the gateway read them: the last column of its line.
fn dropped(port: u16) -> u64 {
    let table = fs::read_to_string("/proc/net/udp").unwrap();
    let own = format!("0100007F:{port:04X}");
    let line = table
        .lines()
        .find(|line| line.split_whitespace().nth(1) == Some(own.as_str()));
    line.and_then(|line| line.split_whitespace().last())
        .expect("the gateway's socket")
        .parse()
        .unwrap()
}

/// The log files stay small, and each line on the console is one of the gateway's own making. Returns how many there are.
fn judge_logs(gateway: &Gateway) -> usize {
    for name in ["coap_server.log", "coap_server.log.1"] {
        let size = gateway.file(name).len();
        assert!((1..=LOG_MAX).contains(&size), "{name}: {size} bytes");
    }
    let output = gateway.output();
    for line in output.lines() {
        let own = ["INFO  [", "WARN  [", "ERROR ["];
        assert!(
            own.iter().any(|own| line.starts_with(own)),
            "forged: {line}"
        );
    }
    output.lines().count()
}
