//! The message layer and the options of CoAP (RFC 7252, RFC 7959, RFC 6690), over UDP against the running gateway.

mod support;

use std::thread;
use std::time::{Duration, Instant};

use support::Kind::{Ack, Con, Non, Rst};
use support::*;

const SENT: &str = "Messages sent successfully";
const AT_ONCE: Duration = Duration::from_millis(100);

fn ms(number: u64) -> Duration {
    Duration::from_millis(number)
}

// --- messages (§3, §4) ---

#[test]
fn a_ping_is_answered_with_its_reset() {
    let (_api, gateway) = start();
    let mote = Mote::new(gateway.address());
    mote.send_raw(&hex("40001234"));
    assert_eq!(mote.receive_raw(PATIENCE), Some(hex("70001234")));
}

/// Malformed CON: RST with the same ID. Everything else that is malformed or unexpected: silence.
#[test]
fn malformed_and_stray_messages() {
    let (api, gateway) = start();
    const SILENCE: &str = "";
    let path = "b76d657373616765";
    let cases = [
        ("NON ping", "50001235", SILENCE),
        ("stray ACK", "60001236", SILENCE),
        ("stray RST", "70001236", SILENCE),
        ("stray ACK with a response", "60451236", SILENCE),
        ("version 0", "00021237", SILENCE),
        ("version 2", "80021238", SILENCE),
        ("version 3", "c0021238", SILENCE),
        ("no bytes", "", SILENCE),
        ("one byte", "40", SILENCE),
        ("three bytes", "400212", SILENCE),
        ("token length 9", "49021239010203040506070809", "70001239"),
        (
            "token length 15",
            "4f02123a0102030405060708090a0b0c0d0e0f",
            "7000123a",
        ),
        ("NON, token length 9", "59021239010203040506070809", SILENCE),
        ("truncated token", "4802123b0102", "7000123b"),
        ("NON, truncated token", "5802123b0102", SILENCE),
        ("reserved option delta", "4002123cf0", "7000123c"),
        ("NON, reserved option delta", "5002123cf0", SILENCE),
        ("reserved option length", "4002123d0f", "7000123d"),
        ("truncated option value", "4002123eb76d6573", "7000123e"),
        ("truncated option delta", "4002123fd0", "7000123f"),
        (
            "truncated option delta, 2 bytes",
            "40021240e001",
            "70001240",
        ),
        ("truncated option length", "40021241bd", "70001241"),
        (
            "truncated option length, 2 bytes",
            "40021242be01",
            "70001242",
        ),
        (
            "payload marker without payload",
            "40021243b76d657373616765ff",
            "70001243",
        ),
        (
            "NON, marker without payload",
            "50021243b76d657373616765ff",
            SILENCE,
        ),
        ("empty with a token", "4100124401", "70001244"),
        ("empty with an option", "40001245b161", "70001245"),
        ("empty with a payload", "40001246ff61", "70001246"),
        ("NON, empty with a payload", "50001246ff61", SILENCE),
        ("reserved class 1", "40211247", "70001247"),
        ("reserved class 6", "40c11248", "70001248"),
        ("reserved class 7", "40e11249", "70001249"),
        ("NON, reserved class 1", "50211247", SILENCE),
        ("a response that nobody asked for", "4045124a", "7000124a"),
    ];
    in_parallel(
        &cases.map(|(name, sent, expected)| (name, (sent, expected))),
        |(sent, expected)| {
            let mote = Mote::new(gateway.address());
            mote.send_raw(&hex(sent));
            let limit = if expected.is_empty() { QUIET } else { PATIENCE };
            assert_eq!(mote.receive_raw(limit).unwrap_or_default(), hex(expected));
        },
    );
    // What follows a malformed message is served, also from the same mote.
    let mote = Mote::new(gateway.address());
    mote.send_raw(&hex(&format!("4002124bf0{path}")));
    assert_eq!(mote.receive(), Message::new(Rst, 0, 0x124b));
    mote.post_separate("message", message(&api, "5", "x"))
        .expect("2.05", SENT);
}

/// Damaged datagrams of the firmware, and plain noise: nothing ends the gateway.
#[test]
fn noise_does_not_end_it() {
    let (_api, gateway) = start();
    let mote = Mote::new(gateway.address());
    let seeds = [
        "message_all_three_chats",
        "message_one_chat_text_with_separators",
        "update",
    ]
    .map(firmware);
    let mut numbers = Numbers(7252);
    for round in 0..20_000 {
        let mut bytes = seeds[numbers.below(seeds.len())].clone();
        match numbers.below(3) {
            0 => {
                bytes = (0..numbers.below(60))
                    .map(|_| numbers.next() as u8)
                    .collect()
            }
            1 => bytes.truncate(numbers.below(60)),
            _ => {}
        }
        for _ in 0..numbers.below(6) {
            let near = bytes.len().min(40);
            if near > 0 {
                bytes[numbers.below(near)] = numbers.next() as u8;
            }
        }
        if let [first, ..] = bytes.as_mut_slice() {
            *first = *first & 0x3f | 0x40; // most of them with the right version
        }
        mote.send_raw(&bytes);
        if round % 50 == 0 {
            assert!(mote.ping(PATIENCE), "after {round} datagrams");
        }
    }
    assert!(Mote::new(gateway.address()).ping(PATIENCE));
}

#[test]
fn methods_and_paths() {
    let (api, gateway) = start();
    let cases = [
        (GET, "message", "4.05"),
        (PUT, "message", "4.05"),
        (DELETE, "message", "4.05"),
        (5, "message", "4.05"),  // FETCH
        (31, "message", "4.05"), // unknown
        (GET, "update", "4.05"),
        (PUT, "update", "4.05"),
        (DELETE, "update", "4.05"),
        (POST, ".well-known/core", "4.05"),
        (POST, "nope", "4.04"),
        (GET, "nope", "4.04"),
        (POST, "", "4.04"),
        (POST, "Message", "4.04"),
        (POST, "message/x", "4.04"),
        (POST, "x/message", "4.04"),
        (GET, ".well-known", "4.04"),
    ];
    let mote = Mote::new(gateway.address());
    for (method, path, expected) in cases {
        let request = mote
            .request(Con, method, path)
            .payload(message(&api, "5", "x"));
        assert_eq!(
            mote.piggybacked(&request).code(),
            expected,
            "CON {method} /{path}"
        );
        let request = Message {
            kind: Non,
            id: mote.next_id(),
            ..request
        };
        mote.send(&request);
        let response = mote.receive();
        assert_eq!(
            (response.kind, response.code().as_str()),
            (Non, expected),
            "NON {method} /{path}"
        );
        assert_eq!(response.token, request.token);
    }
    // Segments count, not the text that they make: "/message" as one segment, and an empty one after "message".
    for path in [vec!["/message"], vec!["message", ""], vec!["", "message"]] {
        let request = mote.request(Con, POST, "").payload(message(&api, "5", "x"));
        let request = path
            .iter()
            .fold(request, |request, part| request.option(URI_PATH, part));
        assert_eq!(mote.piggybacked(&request).code(), "4.04", "{path:?}");
    }
    assert_eq!(api.seen().connections, 0);
}

// --- options (§5.4, §5.10) ---

#[test]
fn options() {
    let (api, gateway) = start();
    let empty: &[u8] = b"";
    type Options<'a> = Vec<(u16, &'a [u8])>;
    let cases: Vec<(Options, &str)> = vec![
        // unrecognised and critical
        (vec![(65, b"x")], "4.02"),
        (vec![(9, empty)], "4.02"),
        (vec![(65_001, b"x")], "4.02"),
        // unrecognised and elective
        (vec![(REQUEST_TAG, b"x")], "served"),
        (vec![(65_000, b"x")], "served"),
        (vec![(258, empty)], "served"), // No-Response
        // what says where the request goes
        (
            vec![(URI_HOST, b"gateway.example"), (URI_PORT, b"\x16\x33")],
            "served",
        ),
        (vec![(PROXY_URI, b"coap://[::1]/message")], "5.05"),
        (vec![(PROXY_SCHEME, b"coap")], "5.05"),
        // formats
        (vec![(ACCEPT, empty)], "served"),
        (vec![(ACCEPT, b"\x3c")], "4.06"),
        (vec![(ACCEPT, b"\x28")], "4.06"),
        (vec![(CONTENT_FORMAT, empty)], "served"),
        (vec![(CONTENT_FORMAT, b"\x00")], "served"), // leading zeros are allowed (§3.2)
        (vec![(CONTENT_FORMAT, b"\x32")], "4.15"),
        (vec![(CONTENT_FORMAT, b"\x2a")], "4.15"),
        (vec![(CONTENT_FORMAT, b"\xff\xff")], "4.15"),
        // a wrong length or a repetition makes an option unrecognised (§5.4.3, §5.4.5)
        (vec![(URI_HOST, empty)], "4.02"),
        (vec![(URI_PORT, b"\x00\x16\x33")], "4.02"),
        (vec![(ACCEPT, b"\x00\x00\x00")], "4.02"),
        (vec![(ACCEPT, empty), (ACCEPT, empty)], "4.02"),
        (vec![(URI_HOST, b"a"), (URI_HOST, b"a")], "4.02"),
        (vec![(BLOCK1, b"\x00\x00\x00\x06")], "4.02"),
        (vec![(CONTENT_FORMAT, b"\x00\x00\x00")], "served"),
        (
            vec![(CONTENT_FORMAT, empty), (CONTENT_FORMAT, b"\x32")],
            "served",
        ),
    ];
    let mote = Mote::new(gateway.address());
    let mut served = 0;
    for (options, expected) in cases {
        let request = mote.post("message", message(&api, "5", "x"));
        let request = options.iter().fold(request, |request, (number, value)| {
            request.option(*number, value)
        });
        if expected == "served" {
            mote.separate(&request).expect("2.05", SENT);
            served += 1;
        } else {
            assert_eq!(mote.piggybacked(&request).code(), expected, "{options:?}");
        }
        assert_eq!(api.count("sendMessage"), served, "{options:?}");
    }
    let logged = |text| gateway.log().contains(text);
    assert!(
        logged("-> 4.02 in 0 ms: Option 65 is not supported")
            && logged("-> 5.05 in 0 ms: This is no proxy")
    );
    let non = |number: u16| {
        mote.request(Non, POST, "message")
            .option(number, "x")
            .payload(message(&api, "5", "x"))
    };
    mote.send(&non(65));
    mote.expect_silence(QUIET);
    mote.send(&non(PROXY_URI));
    assert_eq!(
        (mote.receive().code().as_str(), api.count("sendMessage")),
        ("5.05", served)
    );
}

// --- separate responses (§4.2, §5.2.2) ---

/// Rows 8 and 11: the ACK does not wait for Telegram, the response is a message of its own, duplicates do nothing.
#[test]
fn a_slow_telegram() {
    let (api, gateway) = start();
    api.fail(every("sendMessage"), Fault::Late(ms(1500)));
    let mote = Mote::new(gateway.address());
    let request = mote.post("message", message(&api, "5", "x"));
    let asked = Instant::now();
    mote.begin(&request);
    assert!(
        asked.elapsed() < AT_ONCE,
        "empty ACK after {:?}",
        asked.elapsed()
    );
    mote.begin(&request);
    mote.expect_silence(QUIET);
    mote.begin(&request);
    let response = mote.response(&request);
    response.expect("2.05", SENT);
    assert_ne!(response.id, request.id, "an ID of its own");
    mote.begin(&request);
    mote.acknowledge(&response);
    mote.begin(&request);
    mote.expect_silence(ms(4000)); // a retransmission would come within 3 s
    assert_eq!(api.count("sendMessage"), 1);
}

/// Rows 12 and 13. The rest of the schedule takes more than a minute: the unit tests have it, with a clock of their own.
#[test]
fn an_unacknowledged_response_is_retransmitted() {
    let (api, gateway) = start();
    in_parallel(
        &[
            ("doubling", None),
            ("until ACK", Some(Ack)),
            ("until RST", Some(Rst)),
        ],
        |end| {
            let mote = Mote::new(gateway.address());
            let request = mote.post("message", message(&api, "5", "x"));
            mote.begin(&request);
            let first = mote.receive_raw(PATIENCE).expect("a response");
            let start = Instant::now();
            assert_eq!(
                mote.receive_raw(PATIENCE).as_ref(),
                Some(&first),
                "identical"
            );
            let gap = start.elapsed();
            assert!((ms(1950)..ms(3100)).contains(&gap), "first gap {gap:?}");
            if let Some(end) = end {
                let response = Message::decode(&first).unwrap();
                mote.send(&Message::new(*end, 0, response.id));
                return mote.expect_silence(gap * 2 + ms(500));
            }
            let start = Instant::now();
            assert_eq!(
                mote.receive_raw(PATIENCE).as_ref(),
                Some(&first),
                "identical"
            );
            let second = start.elapsed();
            assert!(
                (gap * 2).abs_diff(second) < ms(200),
                "the gap doubles: {gap:?}, {second:?}"
            );
        },
    );
    assert_eq!(api.count("sendMessage"), 3, "one for each mote");
}

#[test]
fn a_reset_ends_the_response() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    let request = mote.post("message", message(&api, "5", "x"));
    mote.begin(&request);
    mote.reset(&mote.response(&request));
    mote.expect_silence(ms(3500));
}

/// An ACK or an RST counts only from the endpoint that the response went to.
#[test]
fn an_ack_of_somebody_else_ends_nothing() {
    let (api, gateway) = start();
    let (mote, other) = (Mote::new(gateway.address()), Mote::new(gateway.address()));
    let request = mote.post("message", message(&api, "5", "x"));
    mote.begin(&request);
    let response = mote.response(&request);
    other.acknowledge(&response);
    other.reset(&response);
    assert_eq!(
        mote.try_receive(ms(3500)),
        Some(response),
        "the retransmission"
    );
}

#[test]
fn tokens_are_echoed() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    for token in [&b""[..], b"\x00", b"\xab\xcd", b"12345678"] {
        mote.separate(&mote.post("message", message(&api, "5", "x")).token(token))
            .expect("2.05", SENT);
        mote.piggybacked(&mote.post("message", "").token(token))
            .expect_code("4.00");
    }
}

/// Rows 9 and 14: a NON request gets a NON response, once.
#[test]
fn non_confirmable_requests() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    let request = mote
        .request(Non, POST, "message")
        .payload(message(&api, "5", "x"));
    mote.send(&request);
    let response = mote.receive();
    assert_eq!((response.kind, &response.token), (Non, &request.token));
    response.expect("2.05", SENT);
    mote.send(&request);
    mote.expect_silence(ms(3500));
    assert_eq!(api.count("sendMessage"), 1);
}

// --- duplicates (§4.5) ---

#[test]
fn duplicates() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    // After a piggybacked response: the same bytes.
    let wrong = mote.post("message", "url=x");
    mote.send(&wrong);
    let answer = mote.receive_raw(PATIENCE).unwrap();
    mote.send(&wrong);
    assert_eq!(mote.receive_raw(PATIENCE), Some(answer));
    // The same ID in another datagram: a mote that was restarted.
    let first = mote.post("message", message(&api, "5", "first"));
    mote.separate(&first).expect("2.05", SENT);
    mote.separate(&Message {
        payload: message(&api, "5", "second").into(),
        ..first.clone()
    })
    .expect("2.05", SENT);
    assert_eq!(api.texts_to(5), ["first", "second"]);
    // The same datagram from another port: another mote.
    Mote::new(gateway.address())
        .separate(&first)
        .expect("2.05", SENT);
    assert_eq!(api.texts_to(5), ["first", "second", "first"]);
    // A ping is no request; it is answered each time.
    for _ in 0..2 {
        mote.send_raw(&hex("40001234"));
        assert_eq!(mote.receive_raw(PATIENCE), Some(hex("70001234")));
    }
}

/// Memory for duplicates is bounded, and requests in progress are not what is forgotten.
#[test]
fn a_request_in_progress_is_not_forgotten() {
    let (api, gateway) = start();
    api.fail(next(1, "sendMessage"), Fault::Late(ms(3000)));
    let mote = Mote::new(gateway.address());
    let request = mote.post("message", message(&api, "5", "slow"));
    mote.begin(&request);
    api.wait_for("the slow message", |seen| seen.count("sendMessage") == 1);
    let busy = Mote::new(gateway.address());
    for _ in 0..5000 {
        busy.post_piggybacked("message", "").expect_code("4.00");
    }
    mote.begin(&request); // still a duplicate
    let response = mote.response(&request);
    mote.acknowledge(&response);
    response.expect("2.05", SENT);
    assert_eq!(api.texts_to(5), ["slow"]);
}

// --- concurrency ---

/// Row 25: who waits for Telegram does not keep the others waiting.
#[test]
fn a_hanging_telegram() {
    let (api, gateway) = start();
    api.fail(every(""), Fault::Hang);
    let (first, second) = (Mote::new(gateway.address()), Mote::new(gateway.address()));
    let (one, two) = (
        first.post("message", message(&api, "5", "x")),
        second.post("update", update(&api)),
    );
    let asked = Instant::now();
    first.begin(&one);
    api.wait_for("the first message", |seen| seen.count("sendMessage") == 1);
    let then = Instant::now();
    assert!(second.ping(AT_ONCE));
    second.begin(&two);
    assert!(then.elapsed() < AT_ONCE, "took {:?}", then.elapsed());
    thread::scope(|scope| {
        for (mote, request) in [(first, one), (second, two)] {
            scope.spawn(move || {
                let response = mote.response(&request);
                assert!(asked.elapsed() < ms(9100), "took {:?}", asked.elapsed());
                response.expect("5.00", "");
                mote.acknowledge(&response);
            });
        }
    });
    assert_eq!(
        api.count("sendMessage"),
        1,
        "it may have arrived: no second attempt"
    );
}

/// At most 32 requests in progress. A further one is not acknowledged, so that its sender repeats it.
#[test]
fn too_many_requests_at_once() {
    let (api, gateway) = start();
    api.fail(every("sendMessage"), Fault::Late(ms(3000)));
    let motes: Vec<Mote> = (0..40).map(|_| Mote::new(gateway.address())).collect();
    let requests: Vec<Message> = motes
        .iter()
        .enumerate()
        .map(|(number, mote)| mote.post("message", message(&api, "5", &format!("#{number}"))))
        .collect();
    for (mote, request) in motes.iter().zip(&requests) {
        mote.send(request);
    }
    let taken = |mote: &Mote, request: &Message| {
        mote.try_receive(ms(100)) == Some(Message::new(Ack, 0, request.id))
    };
    let left: Vec<usize> = (0..40)
        .filter(|&number| !taken(&motes[number], &requests[number]))
        .collect();
    assert_eq!(
        left,
        (32..40).collect::<Vec<_>>(),
        "acknowledged none but the first 32"
    );
    assert!(Mote::new(gateway.address()).ping(AT_ONCE));
    let finish = |number: usize| {
        let response = motes[number].response(&requests[number]);
        motes[number].acknowledge(&response);
        response.expect("2.05", SENT);
    };
    (0..32).for_each(finish);
    for &number in &left {
        motes[number].begin(&requests[number]);
    }
    left.into_iter().for_each(finish);
    let mut texts = api.texts_to(5);
    texts.sort_by_key(|text| text[1..].parse::<u32>().unwrap());
    assert_eq!(
        texts,
        (0..40)
            .map(|number| format!("#{number}"))
            .collect::<Vec<_>>(),
        "each once"
    );
}

// --- blockwise transfer (RFC 7959) ---

/// Sends a payload in blocks; expects 2.31 for each but the last, and returns that one unsent.
#[track_caller]
fn send_blocks(mote: &Mote, path: &str, payload: &str, size: usize) -> Message {
    let blocks: Vec<&[u8]> = payload.as_bytes().chunks(size).collect();
    let request = |number: usize| {
        let option = block(number as u32, number + 1 < blocks.len(), size as u32);
        mote.post(path, blocks[number]).option(BLOCK1, option)
    };
    for number in 0..blocks.len() - 1 {
        let request = request(number);
        let answer = mote.piggybacked(&request);
        answer.expect("2.31", "");
        assert_eq!(
            answer.option_value(BLOCK1),
            request.option_value(BLOCK1),
            "{answer}"
        );
    }
    request(blocks.len() - 1)
}

#[test]
fn block1() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    for (number, size) in [16, 32, 64, 128, 256, 512, 1024].into_iter().enumerate() {
        let text = format!("{size}: {}", "long and longer; ".repeat(80)) + "!";
        let last = send_blocks(&mote, "message", &message(&api, "5", &text), size);
        let response = mote.separate(&last);
        response.expect("2.05", SENT);
        assert_eq!(
            response.option_value(BLOCK1),
            last.option_value(BLOCK1),
            "the last block is named too"
        );
        assert_eq!(api.texts_to(5).len(), number + 1);
        assert_eq!(api.texts_to(5).last(), Some(&text));
    }
    // Errors about the whole request come with the last block.
    mote.piggybacked(&send_blocks(&mote, "message", &message(&api, "5", ""), 64))
        .expect("4.00", "Missing required fields");
    // A request of one block only.
    mote.separate(
        &mote
            .post("message", message(&api, "5", "one"))
            .option(BLOCK1, block(0, false, 1024)),
    )
    .expect("2.05", SENT);
    // The longest text that there is.
    let text = "x".repeat(4096);
    mote.separate(&send_blocks(
        &mote,
        "message",
        &message(&api, "6", &text),
        1024,
    ))
    .expect("2.05", SENT);
    assert_eq!(api.texts_to(6), [text]);
}

#[test]
fn block1_out_of_order() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    let part = |number, more| {
        mote.post("message", [b'x'; 64])
            .option(BLOCK1, block(number, more, 64))
    };
    mote.piggybacked(&part(5, true)).expect_code("4.08"); // row 22
    assert!(mote.ping(PATIENCE));
    mote.piggybacked(&part(1, false)).expect_code("4.08");
    mote.piggybacked(&part(0, true)).expect_code("2.31");
    mote.piggybacked(&part(2, true)).expect_code("4.08");
    // An assembly belongs to one endpoint and one path.
    mote.piggybacked(&part(0, true)).expect_code("2.31");
    let other = Mote::new(gateway.address());
    other
        .piggybacked(
            &other
                .post("message", "x")
                .option(BLOCK1, block(1, false, 64)),
        )
        .expect_code("4.08");
    mote.piggybacked(&mote.post("update", "x").option(BLOCK1, block(1, false, 64)))
        .expect_code("4.08");
    // The reserved size; too large.
    mote.piggybacked(&mote.post("message", "x").option(BLOCK1, [0x0f]))
        .expect_code("4.00");
    mote.piggybacked(&mote.post("message", "x").option(BLOCK1, [0x07]))
        .expect_code("4.00");
    assert_eq!(api.seen().connections, 0);
}

/// A block that is repeated because its answer was lost is answered again and not appended again; block 0 starts anew.
#[test]
fn block1_repeated() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    let payload = message(&api, "5", &"0123456789".repeat(6));
    let blocks: Vec<&[u8]> = payload.as_bytes().chunks(64).collect();
    let abandoned = mote
        .post("message", [b'y'; 64])
        .option(BLOCK1, block(0, true, 64));
    mote.piggybacked(&abandoned).expect_code("2.31");
    for (number, bytes) in blocks.iter().enumerate() {
        let last = number + 1 == blocks.len();
        let request = mote
            .post("message", bytes)
            .option(BLOCK1, block(number as u32, !last, 64));
        if last {
            mote.separate(&request).expect("2.05", SENT);
        } else {
            let answer = mote.piggybacked(&request);
            assert_eq!(mote.piggybacked(&request), answer);
        }
    }
    assert_eq!(api.texts_to(5), ["0123456789".repeat(6)]);
}

#[test]
fn block1_beyond_the_limit() {
    let (_api, gateway) = start();
    let mote = Mote::new(gateway.address());
    let part = |number| {
        mote.post("message", [b'x'; 1024])
            .option(BLOCK1, block(number, true, 1024))
    };
    for number in 0..8 {
        mote.piggybacked(&part(number)).expect_code("2.31");
    }
    let refused = mote.piggybacked(&part(8));
    refused.expect_code("4.13");
    assert_eq!(refused.option_uint(SIZE1), Some(8192));
}

/// Abandoned assemblies do not keep others out.
#[test]
fn block1_of_many_motes() {
    let (api, gateway) = start();
    for _ in 0..500 {
        let mote = Mote::new(gateway.address());
        mote.send(
            &mote
                .post("message", [b'x'; 1024])
                .option(BLOCK1, block(0, true, 1024)),
        );
        assert!(mote.try_receive(PATIENCE).is_some());
    }
    let mote = Mote::new(gateway.address());
    mote.separate(&send_blocks(&mote, "message", &message(&api, "5", "x"), 32))
        .expect("2.05", SENT);
}

// --- discovery (RFC 6690) ---

#[test]
fn discovery() {
    let (_api, gateway) = start();
    let mote = Mote::new(gateway.address());
    let get = |query: &[&str]| {
        let request = mote.request(Con, GET, ".well-known/core");
        let request = query
            .iter()
            .fold(request, |request, part| request.option(URI_QUERY, part));
        let response = mote.piggybacked(&request);
        response.expect_code("2.05");
        assert_eq!(response.option_uint(CONTENT_FORMAT), Some(40));
        response.text()
    };
    let both = get(&[]);
    let links: Vec<&str> = both.split(',').collect();
    assert!(
        links.len() == 2
            && links[0].starts_with("</message>;")
            && links[1].starts_with("</update>;"),
        "{both}"
    );
    let rt = |link: &str| {
        link.split("rt=\"")
            .nth(1)
            .unwrap()
            .split('"')
            .next()
            .unwrap()
            .to_string()
    };
    let (message, update) = (rt(links[0]), rt(links[1]));
    assert_ne!(message, update);
    let cases = [
        (vec![format!("rt={message}")], links[0]),
        (vec![format!("rt={update}")], links[1]),
        (
            vec![format!("rt={}*", &update[..update.len() - 1])],
            links[1],
        ),
        (vec!["rt=*".to_string()], both.as_str()),
        (vec!["href=/message".to_string()], links[0]),
        (vec!["href=/up*".to_string()], links[1]),
        (vec!["rt=nothing".to_string()], ""),
        (vec!["if=x".to_string()], ""),
        (vec![format!("rt={}", &message[..message.len() - 1])], ""),
    ];
    for (query, expected) in cases {
        let query: Vec<&str> = query.iter().map(String::as_str).collect();
        assert_eq!(get(&query), expected, "{query:?}");
    }
    // A request for another format, and for this one.
    let request = |accept: &[u8]| {
        mote.request(Con, GET, ".well-known/core")
            .option(ACCEPT, accept)
    };
    mote.piggybacked(&request(b"\x28")).expect("2.05", &both);
    mote.piggybacked(&request(b"")).expect_code("4.06");
    mote.piggybacked(&request(b"\x3c")).expect_code("4.06");
}
