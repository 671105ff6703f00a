//! Clients as they really are: many at once, impatient, late, and not all of them friendly.

use std::collections::HashSet;
use std::net::Ipv6Addr;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::*;

/// A gateway on 127.0.0.1, so that each mote has an address of its own.
fn start_ipv4() -> (BotApi, Gateway) {
    let api = BotApi::start();
    let gateway = start_with(&api, Setup::ipv4(&api));
    (api, gateway)
}

fn mote(number: usize, gateway: &Gateway) -> Mote {
    let ip = format!("127.1.{}.{}", number / 250, 1 + number % 250);
    Mote::at(&ip, gateway.address())
}

// --- duplicates ---

/// What costs nothing makes nobody forget what was begun: the text's datagram, once more behind a flood of refusals, is
/// a duplicate.
#[test]
fn a_flood_of_refusals_makes_nothing_forgotten() {
    type Flood = fn(&Mote, &BotApi) -> Message;
    let cases: [(&str, Flood); 6] = [
        ("unknown path", |mote, _| mote.request(Kind::Con, GET, "x")),
        ("discovery", |mote, _| {
            mote.request(Kind::Con, GET, ".well-known/core")
        }),
        ("an unknown option", |mote, _| {
            mote.post("message", "x").option(65, "x")
        }),
        ("another token", |mote, api| {
            let token = TOKEN.replace('a', "b");
            mote.post("message", form(&api.url(), &token, "5", "x"))
        }),
        ("a gap in blocks", |mote, _| {
            let last = block(5, false, 64);
            mote.post("message", [120; 64]).option(BLOCK1, last)
        }),
        ("not confirmable", |mote, _| {
            mote.request(Kind::Non, GET, "x")
        }),
    ];
    in_parallel(&cases, |request| {
        let (api, gateway) = start_ipv4();
        let friend = mote(0, &gateway);
        let text = friend.post("message", message(&api, "5", "once"));
        friend.separate(&text).expect("2.05", SENT);
        let flooder = mote(1, &gateway);
        for _ in 0..4200 / 20 {
            for _ in 0..20 {
                flooder.send(&request(&flooder, &api));
            }
            for _ in 0..20 {
                flooder.try_receive(PATIENCE).expect("a refusal");
            }
        }
        friend.begin(&text);
        friend.expect_silence(QUIET);
        assert_eq!(api.texts_to(5), ["once"]);
    });
}

/// Refusals are judged again each time, with the same bytes.
#[test]
fn a_refusal_is_judged_again() {
    let (_api, gateway) = start_ipv4();
    let mote = mote(0, &gateway);
    for request in [
        mote.request(Kind::Con, GET, "x"),
        mote.request(Kind::Con, GET, ".well-known/core"),
        mote.post("message", "x").option(65, "x"),
        mote.post("message", ""),
    ] {
        let first = mote.piggybacked(&request);
        for _ in 0..2 {
            assert_eq!(mote.piggybacked(&request), first);
        }
    }
}

// --- blocks ---

/// The number of the block in an assembly, of this size, of a body.
fn part(request: Message, body: &str, number: usize, size: usize) -> Message {
    let parts: Vec<&[u8]> = body.as_bytes().chunks(size).collect();
    let more = number + 1 < parts.len();
    request
        .option(BLOCK1, block(number as u32, more, size as u32))
        .payload(parts[number])
}

/// Sends a block and returns the code of its response, wherever it stands.
fn send_part(mote: &Mote, request: &Message) -> String {
    mote.send(request);
    let mut answer = mote.receive();
    if answer.code == 0 {
        answer = mote.response(request);
        mote.acknowledge(&answer);
    }
    answer.code()
}

/// Motes that send their texts in blocks, all at the same time: nobody is pushed out because of his address.
#[test]
fn many_motes_send_blocks_at_once() {
    // Motes, length of a text, size of a block: all together less than 512 KiB.
    let cases = [
        ("three blocks of 64", (100, 10, 64)),
        ("three blocks of 1024", (100, 2400, 1024)),
        ("many blocks of 16", (40, 800, 16)),
        ("17 KiB each", (28, 16_000, 1024)),
    ];
    in_parallel(&cases, |(motes, length, size)| {
        let (api, gateway) = start_ipv4();
        let motes: Vec<Mote> = (0..*motes).map(|number| mote(number, &gateway)).collect();
        let text = |number: usize| format!("{number}: {}", "🙂".repeat(length / 4));
        let bodies: Vec<String> = (0..motes.len())
            .map(|number| message(&api, "5", &text(number)))
            .collect();
        let longest = bodies
            .iter()
            .map(|body| body.len().div_ceil(*size))
            .max()
            .unwrap();
        let mut codes = vec![String::new(); motes.len()];
        for block in 0..longest {
            for ((mote, body), code) in motes.iter().zip(&bodies).zip(&mut codes) {
                if block * size < body.len() && (block == 0 || code == "2.31") {
                    *code = send_part(mote, &part(mote.post("message", ""), body, block, *size));
                }
            }
        }
        let mut failed = Vec::new();
        for (number, code) in codes.iter().enumerate() {
            if code != "2.05" {
                failed.push(format!("mote {number}: {code}"));
            }
        }
        assert!(failed.is_empty(), "{failed:?}");
        let arrived: HashSet<String> = api.texts_to(5).into_iter().collect();
        let all: HashSet<String> = (0..motes.len()).map(text).collect();
        assert_eq!(arrived, all);
    });
}

/// What does not fit: the oldest assemblies are given up, whatever their addresses are.
#[test]
fn the_oldest_assembly_is_given_up() {
    type Order = fn(usize) -> usize;
    let orders: [(&str, Order); 2] = [("upwards", |n| n), ("downwards", |n| 59 - n)];
    in_parallel(&orders, |order| {
        let (api, gateway) = start_ipv4();
        let size = 1024;
        // 60 × 15 KiB are more than 512 KiB.
        let body = |number: usize| message(&api, "5", &format!("{number} {}", "🙂".repeat(3900)));
        let motes: Vec<Mote> = (0..60)
            .map(|number| mote(order(number), &gateway))
            .collect();
        let last = body(10).len().div_ceil(size) - 1;
        for (number, mote) in motes.iter().enumerate() {
            for block in 0..last {
                let request = part(mote.post("message", ""), &body(number), block, size);
                assert_eq!(
                    send_part(mote, &request),
                    "2.31",
                    "mote {number} block {block}"
                );
            }
        }
        for (number, mote) in motes.iter().enumerate().rev() {
            let last = body(number).len().div_ceil(size) - 1;
            let code = send_part(
                mote,
                &part(mote.post("message", ""), &body(number), last, size),
            );
            if number >= 30 {
                assert_eq!(code, "2.05", "one of the newest, mote {number}");
            }
            if number < 20 {
                assert_eq!(code, "4.08", "one of the oldest, mote {number}");
            }
        }
        assert!(
            gateway.status("VmHWM") < 12 << 10,
            "{} KiB",
            gateway.status("VmHWM")
        );
    });
}

/// The blocks of two texts, in this order: `A0` is the first of A, which goes to chat 5, C to chat 6.
fn interleaved(order: &str, tags: [Option<&[u8]>; 2]) -> (BotApi, Gateway, Vec<(String, String)>) {
    let (api, gateway) = start_ipv4();
    let mote = mote(0, &gateway);
    let bodies = [
        message(&api, "5", &"A".repeat(120)),
        message(&api, "6", &"C".repeat(120)),
    ];
    let mut codes = Vec::new();
    for name in order.split(' ') {
        let which = usize::from(name.starts_with('C'));
        let number: usize = name[1..].parse().unwrap();
        let mut request = part(mote.post("message", ""), &bodies[which], number, 64);
        if let Some(tag) = tags[which] {
            request = request.option(REQUEST_TAG, tag);
        }
        codes.push((name.to_string(), send_part(&mote, &request)));
    }
    for (chat, letter) in [(5, "A"), (6, "C")] {
        for text in api.texts_to(chat) {
            assert_eq!(text, letter.repeat(120), "a mixture, after {codes:?}");
        }
    }
    (api, gateway, codes)
}

/// Request-Tag tells two texts of one socket apart (libcoap sends it).
#[test]
fn request_tags_keep_texts_apart() {
    let orders = [
        "A0 C0 A1 C1 A2 C2 A3 C3",
        "A0 C0 C1 A1 A2 C2 C3 A3",
        "A0 A1 A2 C0 C1 C2 C3 A3",
        "C0 A0 A1 A2 A3 C1 C2 C3",
    ];
    let tags: [(&str, [Option<&[u8]>; 2]); 5] = [
        ("1 and 2", [Some(&[1]), Some(&[2])]),
        ("none and 2", [None, Some(&[2])]),
        (
            "empty and 8 bytes",
            [Some(&[]), Some(&[1, 2, 3, 4, 5, 6, 7, 8])],
        ),
        ("1 and 01", [Some(&[1]), Some(&[0, 1])]),
        ("ends alike", [Some(&[7, 8]), Some(&[8])]),
    ];
    in_parallel(&tags, |tags| {
        for order in orders {
            let (api, _gateway, codes) = interleaved(order, *tags);
            assert_eq!(api.texts_to(5).len(), 1, "{order}: {codes:?}");
            assert_eq!(api.texts_to(6).len(), 1, "{order}: {codes:?}");
        }
    });
}

/// Without tags, or with the same, nobody can tell them apart: one of them or none gets through, but never a mixture.
#[test]
fn two_texts_are_never_mixed() {
    let orders = [
        "A0 C0 A1 C1 A2 C2 A3 C3",
        "A0 C0 C1 A1 C2 A2 C3 A3",
        "A0 A1 C0 A2 A3 C1 C2 C3",
        "A0 A1 A2 C0 C1 C2 A3 C3",
        "C0 A0 C1 A1 C2 A2 C3 A3",
        "A0 A1 C0 C1 A2 A3",
        "A0 A1 C0 C1 C2 A2 C3 A3",
        "A0 A1 C0 C0 C1 A2 C2 A3 C3",
        "A0 A1 A2 C0 A0 C1 C2 A1 A2 C3 A3",
        // Whoever is refused begins anew.
        "A0 C0 C1 C0 A1 A2 A3",
        "A0 C0 A1 A0 C1 C2 C3",
        "A0 A1 C0 C1 C2 C0 C1 A2 A3",
        "A0 C0 C1 C2 C0 A1 A2 A3",
    ];
    let cases = orders.map(|order| (order, order));
    in_parallel(&cases, |order| {
        interleaved(order, [None, None]);
        interleaved(order, [Some(&[3]), Some(&[3])]);
    });
}

/// A client that begins a text again is understood at once, whatever it had sent of it.
#[test]
fn a_text_that_is_begun_again() {
    for order in [
        "A0 A0 A1 A2 A3",
        "A0 A1 A0 A1 A2 A3",
        "A0 A1 A2 A0 A1 A0 A1 A2 A3",
        "A0 A1 A1 A2 A3",
        "A0 A2 A0 A1 A2 A3",
        "A0 A2 A1 A2 A3",
    ] {
        let (api, _gateway, codes) = interleaved(order, [None, None]);
        assert_eq!(api.texts_to(5).len(), 1, "{order}: {codes:?}");
    }
}

// --- message IDs ---

/// Requests with these message IDs, `u` for /update and `m` for /message: what each update is answered.
fn with_ids(ids: &str) -> Vec<String> {
    let (api, gateway) = start_ipv4();
    api.person_writes(ADA, "Ada", "hi");
    let witness = mote(9, &gateway);
    let is_heard = within(PATIENCE, || poll(&witness, &api) != NOTHING);
    assert!(is_heard);
    let mote = mote(0, &gateway);
    let mut told = Vec::new();
    for step in ids.split(' ') {
        let (path, payload) = match &step[..1] {
            "u" => ("update", update(&api)),
            _ => ("message", message(&api, "5", step)),
        };
        let mut request = mote.post(path, payload);
        request.id = step[1..].parse().unwrap();
        let response = mote.separate(&request);
        if path == "update" {
            let all = response.code() == "2.05";
            told.push(if all { "all" } else { "nothing" }.to_string());
        }
    }
    told
}

/// A late copy of a request is no restart, and a restart is one.
#[test]
fn late_message_ids() {
    let cases: [(&str, (&str, &str)); 9] = [
        (
            "late by one",
            ("u100 u101 m103 u102", "all nothing nothing"),
        ),
        (
            "late twice",
            (
                "u100 u101 m104 u102 u103 u105",
                "all nothing nothing nothing nothing",
            ),
        ),
        (
            "late by 64",
            ("u100 u164 u228 u164", "all nothing nothing nothing"),
        ),
        (
            "about zero",
            ("u65534 u65535 m1 u0 u2", "all nothing nothing nothing"),
        ),
        (
            "far about zero",
            ("u65500 u20 u65530 u21", "all nothing nothing nothing"),
        ),
        (
            "the highest stays",
            ("u100 u160 u110 u220", "all nothing nothing nothing"),
        ),
        (
            "a restart upwards",
            ("u100 u101 u25000 u25001", "all nothing all nothing"),
        ),
        (
            "a restart downwards",
            ("u25000 u25001 u100 u101", "all nothing all nothing"),
        ),
        (
            "just too far",
            ("u1000 u1001 u936 u937", "all nothing all nothing"),
        ),
    ];
    in_parallel(&cases, |(ids, expected)| {
        assert_eq!(with_ids(ids).join(" "), *expected, "{ids}");
    });
}

// --- always busy ---

/// Stops those who go on asking, also when the test fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// A client that always has a request open.
fn ask_without_a_pause(number: usize, api: &BotApi, gateway: &Gateway, is_over: &AtomicBool) {
    let mote = mote(number, gateway);
    let mut count = 0;
    while !is_over.load(Relaxed) {
        count += 1;
        let text = format!("text {count}");
        let request = mote.post("message", message(api, &number.to_string(), &text));
        mote.reliable(&request, PATIENCE, PATIENCE);
    }
}

/// Clients that always have a request open, Telegram far away: what is due is done within 2 s all the same.
#[test]
fn what_is_due_is_done_though_datagrams_wait() {
    // Clients, and milliseconds to Telegram and back.
    let cases = [("four clients", (4, 300)), ("eight clients", (8, 100))];
    in_parallel(&cases, |(clients, round_trip)| {
        let (api, gateway) = start_ipv4();
        let round_trip = Duration::from_millis(*round_trip);
        api.set_round_trip(round_trip);
        let (api, gateway, is_over) = (&api, &gateway, &AtomicBool::new(false));
        thread::scope(|scope| {
            let _stop = Stop(is_over);
            for number in 1..=*clients {
                scope.spawn(move || ask_without_a_pause(number, api, gateway, is_over));
            }
            thread::sleep(Duration::from_millis(500));
            let patient = mote(100, gateway);
            let poll = patient.post("update", update(api));
            patient.begin(&poll);
            let first = patient.response(&poll);
            let start = Instant::now();
            let again = patient.try_receive(Duration::from_secs(8));
            let taken = start.elapsed();
            println!("retransmitted after {taken:.1?}");
            assert_eq!(again.as_ref(), Some(&first), "a retransmission");
            // Due after 2 to 3 s, and another request may be under way.
            assert!(taken < Duration::from_secs(5) + 2 * round_trip, "{taken:?}");
            patient.acknowledge(&first);
            // After somebody has written, a fetch is due in 3 s.
            api.person_writes(ADA, "Ada", "hi");
            let other = mote(101, gateway);
            let is_heard = within(PATIENCE, || {
                let poll = other.post("update", update(api));
                other.reliable(&poll, PATIENCE, PATIENCE);
                !api.texts_to(ADA).is_empty()
            });
            assert!(is_heard, "though a mote asks");
            let start = Instant::now();
            api.person_writes(ADA, "Ada", "help");
            let is_answered = |seen: &Seen| seen.texts_to(ADA).len() > 1;
            let is_answered = api.wait_until(Duration::from_secs(9), is_answered);
            let taken = start.elapsed();
            println!("fetched without being asked after {taken:.1?}");
            assert!(
                is_answered && taken < Duration::from_secs(5) + 5 * round_trip,
                "{taken:?}"
            );
        });
    });
}

/// Each datagram that waits takes longer than a second: what is due is not put off until a quick one comes.
#[test]
fn what_is_due_is_done_though_each_datagram_takes_long() {
    let api = BotApi::start();
    api.person_writes(ADA, "Ada", "hi");
    let gateway = start_with(&api, Setup::ipv4(&api));
    let is_greeted = |seen: &Seen| seen.texts_to(ADA).len() == 1;
    assert!(api.wait_until(PATIENCE, is_greeted));
    api.set_round_trip(Duration::from_millis(1150));
    let (api, gateway, is_over) = (&api, &gateway, &AtomicBool::new(false));
    thread::scope(|scope| {
        let _stop = Stop(is_over);
        for number in 1..=4 {
            scope.spawn(move || {
                let mote = mote(number, gateway);
                while !is_over.load(Relaxed) {
                    let mut request = mote.post("message", message(api, "5", "x"));
                    request.kind = Kind::Non;
                    mote.send(&request);
                    let response = mote.try_receive(Duration::from_secs(30));
                    response.expect("a response").expect("2.05", SENT);
                }
            });
        }
        // Its fetch, or the gateway's own one behind the greeting, comes before this; the next one in 3 s or 6.
        let patient = mote(100, gateway);
        let poll = patient.post("update", update(api));
        patient.begin(&poll);
        let first = patient.response(&poll);
        api.person_writes(ADA, "Ada", "help");
        let again = patient.try_receive(Duration::from_secs(8));
        assert_eq!(again, Some(first), "a retransmission");
        let is_answered = |seen: &Seen| seen.texts_to(ADA).len() > 1;
        let is_answered = api.wait_until(Duration::from_secs(20), is_answered);
        assert!(is_answered, "no fetch");
    });
}

// --- neighbours that are not there ---

/// The kernel keeps an answer to a neighbour that does not answer it for 3 s, and has room for 277 of them.
/// Nobody waits for that room.
#[test]
fn nobody_waits_for_those_who_are_not_there() {
    if !can_send_from(nobody_waits_for_those_who_are_not_there) {
        return;
    }
    run("ip", "link add usb0 type veth peer name far");
    run("ip", "link set usb0 up");
    run("ip", "link set far up");
    run("ip", "-6 addr add 2001:db8::1/64 dev usb0 nodad");
    let api = BotApi::start();
    let mut setup = Setup::new(&api);
    setup.ip = "2001:db8::1".to_string();
    let gateway = start_with(&api, setup);
    let mote = Mote::new(gateway.address());
    let sources = (0..320).map(|number| Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 1, number));
    let sources: Vec<Ipv6Addr> = sources.collect();
    send_from(&sources, gateway.address(), &hex("40000000"));
    mote.send(&mote.post("message", message(&api, "5", "x")));
    let start = Instant::now();
    let is_delivered = api.wait_until(PATIENCE, |seen| !seen.texts_to(5).is_empty());
    let taken = start.elapsed();
    println!("delivered after {taken:.1?}");
    assert!(
        is_delivered && taken < Duration::from_secs(2),
        "after {taken:?}"
    );
}

// --- responses that nobody acknowledges ---

/// There is room for 1,024 of them; then the oldest is given up, whatever its address is.
#[test]
fn the_oldest_response_is_given_up() {
    let (api, gateway) = start_ipv4();
    // The newest have the lowest addresses; nobody acknowledges.
    let motes: Vec<Mote> = (0..110)
        .map(|number| mote(109 - number, &gateway))
        .collect();
    for mote in &motes {
        for _ in 0..10 {
            let request = mote.post("message", message(&api, "5", "x"));
            mote.begin(&request);
            mote.response(&request).expect("2.05", SENT);
        }
    }
    for (number, mote) in motes.iter().enumerate().skip(110 - 90) {
        for _ in 0..10 {
            let again = mote.try_receive(Duration::from_secs(8));
            assert!(again.is_some(), "mote {number} of 110");
        }
    }
}
