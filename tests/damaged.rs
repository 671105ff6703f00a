//! Damaged datagrams of the firmware, the same ones in every run, to the running gateway: it serves on, no larger than
//! before, and answers nothing that is malformed or holds a secret.

mod support;

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::time::{Duration, Instant};

use support::Kind::{Ack, Con, Rst};
use support::*;

/// A ping follows that many datagrams: its RST tells that they were read, and the socket's buffer holds more of them.
const BATCH: usize = 32;
/// More than the gateway remembers.
const MOTES: usize = 100;
/// Of the resident memory, after the first fifth; four million datagrams end where one million does.
const GROWTH_KIB: u64 = 1536;
const LOG_MAX: u64 = 1 << 20;

#[test]
fn some_damaged_datagrams() {
    bombard(20_000);
}

#[test]
#[ignore = "takes minutes: cargo test --release --test damaged -- --include-ignored"]
fn a_million_damaged_datagrams() {
    bombard(1_000_000);
}

fn bombard(total: usize) {
    let api = BotApi::with(BotApiOptions {
        names: vec!["api.telegram.org".into()],
        ..BotApiOptions::default()
    });
    let proxy = Proxy::start("api.telegram.org:443", api.address());
    let config = format!("[telegram]\nbot_token = {TOKEN}\n");
    let setup = Setup::ipv4(&api)
        .config(&config)
        .env("HTTPS_PROXY", proxy.url());
    let mut gateway = Gateway::prepared(setup, |directory| {
        let nearly_full = "2026-01-31 12:00:00 [INFO] older\n".repeat(LOG_MAX as usize / 36);
        fs::write(directory.join("coap_server.log"), nearly_full).unwrap();
    });
    for chat in 1..=3 {
        api.person_writes(chat, "Ada", "hi");
    }
    let names = [
        "message_all_three_chats",
        "message_all_two_chats",
        "message_one_chat_text_with_separators",
        "update",
    ];
    let whole = names.map(firmware);
    let motes: Vec<Mote> = (1..=MOTES)
        .map(|n| Mote::at(&format!("127.0.1.{n}"), gateway.address()))
        .collect();
    let (pid, threads, start) = (gateway.pid(), gateway.threads(), Instant::now());
    let mut random = Numbers(5683);
    let (mut replies, mut sent, mut rss) = (BTreeMap::new(), 0, 0);
    while sent < total {
        let mote = &motes[random.below(MOTES)];
        for _ in 0..BATCH {
            sent += 1;
            let mut bytes = whole[random.below(whole.len())].clone();
            if random.below(8) > 0 {
                let id = random.next() as u16;
                bytes[2..4].copy_from_slice(&id.to_be_bytes()); // else it comes again
            }
            match random.below(64) {
                // A text that must not come twice, however often it is sent.
                0 => {
                    let form = form(
                        "https://api.telegram.org/bot",
                        TOKEN,
                        "77",
                        &format!("once {sent}"),
                    );
                    let request = mote.post("message", form);
                    (0..1 + random.below(3)).for_each(|_| mote.send(&request));
                }
                _ => {
                    damage(&mut bytes, &whole, &mut random);
                    mote.send_raw(&bytes);
                }
            }
        }
        listen(mote, &mut random, &mut replies);
        // Telegram keeps up, else most of what is still valid would find no room.
        if sent % (64 * BATCH) == 0 {
            let idle = within(Duration::from_secs(30), || gateway.threads() == threads);
            assert!(idle, "{} threads", gateway.threads());
        }
        if rss == 0 && sent >= total / 5 {
            rss = gateway.rss_kib();
        }
    }
    let (time, lost) = (start.elapsed(), dropped(gateway.address().port()));
    assert_eq!(lost, 0, "datagrams that the gateway never saw");

    // What waited for Telegram ends.
    let idle = within(Duration::from_secs(30), || gateway.threads() == threads);
    assert!(idle, "{} threads", gateway.threads());
    let rss_after = gateway.rss_kib();
    assert!(
        gateway.is_running() && gateway.pid() == pid,
        "another process"
    );
    motes
        .iter()
        .for_each(|mote| listen(mote, &mut random, &mut replies));
    let mote = Mote::at("127.0.2.1", gateway.address());
    assert!(mote.ping(PATIENCE));
    mote.post_separate(
        "message",
        form("https://api.telegram.org/bot", TOKEN, "88", "the last"),
    )
    .expect("2.05", "Messages sent successfully");
    assert_eq!(api.texts_to(88), ["the last"]);
    assert!(poll_as(&mote).contains("Ada:1;"), "the users are forgotten");

    let once: Vec<String> = api
        .texts_to(77)
        .into_iter()
        .filter(|text| text.starts_with("once "))
        .collect();
    assert!(once.len() > total / 2000, "{} texts came", once.len());
    assert_eq!(
        once.iter().collect::<HashSet<_>>().len(),
        once.len(),
        "a text came twice"
    );
    for kind in [
        "RST",
        "ACK empty",
        "ACK 4.00",
        "ACK 4.02",
        "ACK 4.03",
        "ACK 4.04",
        "ACK 4.05",
        "CON 2.05",
        "NON 4.04",
    ] {
        assert!(
            replies.contains_key(kind),
            "nothing was answered {kind}: {replies:?}"
        );
    }
    let (sizes, lines) = log_of(&gateway);
    assert!(
        rss_after <= rss + GROWTH_KIB,
        "{rss} KiB after a fifth, {rss_after} KiB at the end"
    );
    println!(
        "{sent} datagrams in {:.1} s, none lost; {} texts sent",
        time.as_secs_f64(),
        api.seen().sent.len()
    );
    println!(
        "RSS: {rss} KiB after a fifth, {rss_after} KiB at the end; {threads} threads before and after"
    );
    println!("log: {sizes:?} bytes, {lines} lines in all; replies: {replies:?}");
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
        let kind = match (reply.kind, reply.code) {
            (Rst, _) => "RST".to_string(),
            (Ack, 0) => "ACK empty".to_string(),
            (kind, _) => format!(
                "{} {}",
                if kind == Ack {
                    "ACK"
                } else if kind == Con {
                    "CON"
                } else {
                    "NON"
                },
                reply.code()
            ),
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

fn poll_as(mote: &Mote) -> String {
    mote.post_separate(
        "update",
        format!("url=https://api.telegram.org/bot&token={TOKEN}"),
    )
    .text()
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

/// Sizes of the log files, and all lines on the console; each is one of the gateway's own making.
fn log_of(gateway: &Gateway) -> ([u64; 2], usize) {
    let size = |name| fs::metadata(gateway.directory().join(name)).map_or(0, |file| file.len());
    let sizes = ["coap_server.log", "coap_server.log.1"].map(size);
    assert!(
        sizes.iter().all(|size| (1..=LOG_MAX).contains(size)),
        "{sizes:?}"
    );
    let output = gateway.output();
    for line in output.lines() {
        let own = line
            .as_bytes()
            .get(..20)
            .is_some_and(|start| start.starts_with(b"2") && start[19] == b' ');
        assert!(own && line[20..].starts_with('['), "a forged line: {line}");
    }
    (sizes, output.lines().count())
}
