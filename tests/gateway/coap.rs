//! The message layer and the options of CoAP (RFC 7252, RFC 7959, RFC 6690), over UDP against the running gateway.

use std::time::{Duration, Instant};

use crate::support::Kind::{Ack, Con, Non, Rst};
use crate::support::*;

/// A first retransmission comes after 2 to 3 s.
const RETRANSMITTED: Duration = Duration::from_millis(3500);

fn ms(number: u64) -> Duration {
    Duration::from_millis(number)
}

// --- messages (§3, §4) ---

/// What is sent, and the answer; silence where none stands.
const MESSAGES: &str = "
ping                                    | 40001234 | 70001234
NON ping                                | 50001235
stray ACK                               | 60001236
stray RST                               | 70001236
stray ACK with a response               | 60451236
version 0                               | 00021237
version 2                               | 80021238
version 3                               | c0021238
no bytes                                |
one byte                                | 40
three bytes                             | 400212
token length 9                          | 49021239010203040506070809 | 70001239
token length 15                         | 4f02123a0102030405060708090a0b0c0d0e0f | 7000123a
NON, token length 9                     | 59021239010203040506070809
truncated token                         | 4802123b0102 | 7000123b
NON, truncated token                    | 5802123b0102
reserved option delta                   | 4002123cf0 | 7000123c
NON, reserved option delta              | 5002123cf0
reserved option length                  | 4002123d0f | 7000123d
truncated option value                  | 4002123eb76d6573 | 7000123e
truncated option delta                  | 4002123fd0 | 7000123f
truncated option delta, 2 bytes         | 40021240e001 | 70001240
truncated option length                 | 40021241bd | 70001241
truncated option length, 2 bytes        | 40021242be01 | 70001242
payload marker without payload          | 40021243b76d657373616765ff | 70001243
NON, marker without payload             | 50021243b76d657373616765ff
empty with a token                      | 4100124401 | 70001244
empty with an option                    | 40001245b161 | 70001245
empty with a payload                    | 40001246ff61 | 70001246
NON, empty with a payload               | 50001246ff61
reserved class 1                        | 40211247 | 70001247
reserved class 6                        | 40c11248 | 70001248
reserved class 7                        | 40e11249 | 70001249
NON, reserved class 1                   | 50211247
a response that nobody asked for        | 4045124a | 7000124a
";

/// Rows 1 to 5.
#[test]
fn malformed_and_stray_messages() {
    let (api, gateway) = start();
    each_row(MESSAGES, |[_, sent, answer]| {
        let mote = Mote::new(gateway.address());
        mote.send_raw(&hex(sent));
        let silent = answer.is_empty();
        let limit = if silent { QUIET } else { PATIENCE };
        assert_eq!(mote.receive_raw(limit).unwrap_or_default(), hex(answer));
    });
    // What follows a malformed message is served, also from the same mote.
    let mote = Mote::new(gateway.address());
    mote.send_raw(&hex("4002124bf0b76d657373616765"));
    assert_eq!(mote.receive(), Message::new(Rst, 0, 0x124b));
    mote.post_separate("message", message(&api, "5", "x"))
        .expect("2.05", SENT);
}

/// Rows 6 and 7.
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
        mote.piggybacked(&request).expect_code(expected);
        let request = Message {
            kind: Non,
            id: mote.next_id(),
            ..request
        };
        mote.send(&request);
        let response = mote.receive();
        assert_eq!((response.kind, &response.token), (Non, &request.token));
        response.expect(expected, ""); // the firmware would take a text for configuration
    }
    // Segments count, not the text that they make: "/message" as one segment, and an empty one after "message".
    for path in [vec!["/message"], vec!["message", ""], vec!["", "message"]] {
        let mut request = mote.post("", message(&api, "5", "x"));
        for segment in path {
            request = request.option(URI_PATH, segment);
        }
        mote.piggybacked(&request).expect_code("4.04");
    }
    assert_eq!(api.count("sendMessage"), 0);
}

/// 64 KiB are received: the longest text in one datagram, and one that is longer than Telegram takes.
#[test]
fn large_datagrams() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    let longest = "🙂".repeat(4096);
    mote.send(&mote.post("message", message(&api, "5", &longest)));
    mote.receive().expect("0.00", "");
    mote.receive().expect("2.05", SENT);
    assert!(
        api.texts_to(5) == [longest],
        "{} texts",
        api.texts_to(5).len()
    );
    let text = "é".repeat(3950);
    let request = mote.post("message", message(&api, "6", &text));
    mote.separate(&request.option(65_000, [b'x'; 2000]))
        .expect("2.05", SENT);
    assert!(api.texts_to(6) == [text], "cut");
    let longer = message(&api, "5", &"x".repeat(65_000));
    let code = mote.post_piggybacked("message", longer).code();
    assert!(code == "4.00" || code == "4.13", "{code}");
    assert_eq!(api.texts_to(5).len(), 1);
}

// --- options (§5.4, §5.10) ---

/// Rows 16 to 20: number and value in hexadecimal digits of each option, and the code.
const OPTIONS: &str = "
65=78              | 4.02 | unrecognised and critical
9=                 | 4.02 |
65001=78           | 4.02 |
292=78             | 2.05 | unrecognised and elective: Request-Tag
65000=78           | 2.05 |
258=               | 2.05 | No-Response
3=61 7=1633        | 2.05 | Uri-Host, Uri-Port
35=636f61703a2f2f  | 5.05 | Proxy-Uri
39=636f6170        | 5.05 | Proxy-Scheme
17=                | 2.05 | Accept text/plain
17=3c              | 4.06 | Accept CBOR
17=28              | 4.06 | Accept link-format
12=                | 2.05 | Content-Format text/plain
12=00              | 2.05 | leading zeros are allowed (§3.2)
12=32              | 4.15 | Content-Format JSON
12=2a              | 4.15 |
12=ffff            | 4.15 |
23=02              | 2.05 | Block2 number 0
23=12              | 4.00 | Block2 number 1
27=07              | 4.00 | Block1 with the reserved size
27=0f              | 4.00 |
3=                 | 4.02 | a wrong length makes an option unrecognised (§5.4.3)
7=001633           | 4.02 |
17=000000          | 4.02 |
27=00000006        | 4.02 |
27=01000006        | 4.02 |
12=000000          | 2.05 |
17= 17=            | 4.02 | a repetition, too (§5.4.5)
3=61 3=61          | 4.02 |
12= 12=32          | 2.05 |
";

#[test]
fn options() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    let mut served = 0;
    for [options, expected, _] in rows(OPTIONS) {
        let mut request = mote.post("message", message(&api, "5", "x"));
        for option in options.split_whitespace() {
            let (number, value) = option.split_once('=').unwrap();
            request = request.option(number.parse().unwrap(), hex(value));
        }
        if expected == "2.05" {
            mote.separate(&request).expect("2.05", SENT);
            served += 1;
        } else {
            let answer = mote.piggybacked(&request);
            assert_eq!(answer.code(), expected, "{options}");
            let block = answer.option_value(BLOCK1).unwrap_or_default();
            assert!(block.len() <= 3, "{answer}");
            let size = answer.option_uint(BLOCK1).unwrap_or_default() & 7;
            assert!(size < 7, "must not be sent: {answer}");
        }
        assert_eq!(api.count("sendMessage"), served, "{options}");
    }
    assert_eq!(served, 10);
    let said = |code: &str, word: &str| {
        let told = |line: &str| line.contains(code) && line.contains(word);
        assert!(gateway.log().lines().any(told), "{}", gateway.log());
    };
    said("4.02", "65");
    said("5.05", "proxy");
    // As NON: silence for 4.02, an answer for the others.
    let non = |number: u16| {
        mote.request(Non, POST, "message")
            .option(number, "x")
            .payload(message(&api, "5", "x"))
    };
    mote.send(&non(65));
    mote.expect_silence(QUIET);
    mote.send(&non(PROXY_URI));
    mote.receive().expect_code("5.05");
    assert_eq!(api.count("sendMessage"), served);
}

// --- separate responses (§4.2, §5.2.2) ---

/// Rows 8 and 11: the ACK does not wait for Telegram, the response is a message of its own, duplicates do nothing.
#[test]
fn a_slow_telegram() {
    let (api, gateway) = start();
    let late = ms(3000);
    api.fail(every("sendMessage"), Fault::Late(late));
    let mote = Mote::new(gateway.address());
    let request = mote.post("message", message(&api, "5", "x"));
    let asked = Instant::now();
    mote.begin(&request);
    let taken = asked.elapsed();
    assert!(taken < late / 2, "empty ACK after {taken:?}");
    mote.send(&request);
    mote.send(&request);
    let response = mote.response(&request);
    response.expect("2.05", SENT);
    assert_ne!(response.id, request.id, "an ID of its own");
    for _ in 0..2 {
        assert_eq!(mote.receive(), Message::new(Ack, 0, request.id));
    }
    mote.acknowledge(&response);
    mote.begin(&request);
    mote.expect_silence(RETRANSMITTED);
    assert_eq!(api.count("sendMessage"), 1);
}

/// Row 12, once. The schedule, and what else ends it, is in the unit tests, with a clock of their own.
#[test]
fn retransmission() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    let start = Instant::now();
    mote.begin(&mote.post("message", message(&api, "5", "x")));
    let first = mote.receive_raw(PATIENCE).expect("a response");
    let received = Instant::now();
    let response = Message::decode(&first).unwrap();
    // An ACK or a RST counts only from the endpoint that the response went to.
    let other = Mote::new(gateway.address());
    other.acknowledge(&response);
    other.reset(&response);
    assert_eq!(mote.receive_raw(PATIENCE), Some(first));
    // After 2 to 3 s; the machine may be late with either of the two.
    let (most, least) = (start.elapsed(), received.elapsed());
    assert!(
        most >= ms(2000) && least < ms(3900),
        "{least:?} to {most:?}"
    );
    mote.acknowledge(&response);
    mote.expect_silence(most * 2 + ms(500));
    assert_eq!(api.count("sendMessage"), 1);
}

/// What waits in the socket is read before anything is retransmitted: the ACK may be what waits.
#[test]
fn an_ack_that_waits() {
    let (api, gateway) = start();
    api.fail(next(1, "sendMessage").to(6), Fault::Late(ms(4000)));
    let (first, second) = (Mote::new(gateway.address()), Mote::new(gateway.address()));
    let request = first.post("message", message(&api, "5", "x"));
    first.begin(&request);
    let response = first.response(&request);
    let slow = second.post("message", message(&api, "6", "x"));
    second.begin(&slow);
    first.acknowledge(&response);
    let late = second.response(&slow);
    second.acknowledge(&late);
    first.expect_silence(ms(1000));
}

/// Row 10.
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
    mote.expect_silence(RETRANSMITTED);
    assert_eq!(api.count("sendMessage"), 1);
}

// --- duplicates (§4.5) ---

/// Row 15, and what a repeat is answered.
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
    let second = message(&api, "5", "second");
    mote.separate(&first.clone().payload(&second))
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

// --- blockwise transfer (RFC 7959) ---

/// Sends a payload in blocks; expects 2.31 for each but the last, and returns that one unsent.
#[track_caller]
fn send_blocks(mote: &Mote, payload: &str, size: usize) -> Message {
    let blocks: Vec<&[u8]> = payload.as_bytes().chunks(size).collect();
    let request = |number: usize| {
        let option = block(number as u32, number + 1 < blocks.len(), size as u32);
        mote.post("message", blocks[number]).option(BLOCK1, option)
    };
    for number in 0..blocks.len() - 1 {
        let request = request(number);
        let answer = mote.piggybacked(&request);
        answer.expect("2.31", "");
        let named = answer.option_value(BLOCK1);
        assert_eq!(named, request.option_value(BLOCK1), "{answer}");
        if number == 1 {
            // Its answer was lost: it is answered again and not appended again.
            assert_eq!(mote.piggybacked(&request), answer);
        }
    }
    request(blocks.len() - 1)
}

/// Row 21.
#[test]
fn block1() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    let mut texts = Vec::new();
    for size in [16, 32, 64, 128, 256, 512, 1024] {
        texts.push(format!("{size}: {}!", "long and longer; ".repeat(80)));
        let last = send_blocks(&mote, &message(&api, "5", &texts[texts.len() - 1]), size);
        let response = mote.separate(&last);
        response.expect("2.05", SENT);
        let named = response.option_value(BLOCK1);
        assert_eq!(named, last.option_value(BLOCK1), "also in the response");
        assert_eq!(api.texts_to(5), texts);
    }
    // Errors about the whole request come with the last block.
    let last = send_blocks(&mote, &message(&api, "5", ""), 64);
    for _ in 0..2 {
        let answer = mote.piggybacked(&last); // also if it was lost
        answer.expect("4.00", "Missing required fields");
    }
    // A request of one block only.
    let whole = mote.post("message", message(&api, "6", "one"));
    mote.separate(&whole.option(BLOCK1, block(0, false, 1024)))
        .expect("2.05", SENT);
    // The longest text that there is, in characters of 4 bytes.
    let longest = "🙂".repeat(4096);
    mote.separate(&send_blocks(&mote, &message(&api, "6", &longest), 1024))
        .expect("2.05", SENT);
    assert!(api.texts_to(6) == ["one".to_string(), longest]);
}

/// A full block of some request that goes on.
fn part(mote: &Mote, number: u32) -> Message {
    mote.post("message", [b'x'; 1024])
        .option(BLOCK1, block(number, true, 1024))
}

/// Row 22.
#[test]
fn block1_out_of_order() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    mote.piggybacked(&part(&mote, 5)).expect_code("4.08");
    assert!(mote.ping(PATIENCE));
    let last = |path: &str| mote.post(path, "x").option(BLOCK1, block(1, false, 1024));
    mote.piggybacked(&last("message")).expect_code("4.08");
    mote.piggybacked(&part(&mote, 0)).expect_code("2.31");
    mote.piggybacked(&part(&mote, 2)).expect_code("4.08");
    // An assembly belongs to one endpoint and one path.
    mote.piggybacked(&part(&mote, 0)).expect_code("2.31");
    mote.piggybacked(&last("update")).expect_code("4.08");
    let other = Mote::new(gateway.address());
    other.piggybacked(&part(&other, 1)).expect_code("4.08");
    mote.piggybacked(&part(&mote, 1)).expect_code("2.31");
    assert_eq!(api.count("sendMessage"), 0);
}

#[test]
fn block1_beyond_the_limit() {
    let (_api, gateway) = start();
    let mote = Mote::new(gateway.address());
    for number in 0..17 {
        mote.piggybacked(&part(&mote, number)).expect_code("2.31");
    }
    let refused = mote.piggybacked(&part(&mote, 17));
    refused.expect_code("4.13");
    assert_eq!(refused.option_uint(SIZE1), Some(17 << 10));
}

/// Abandoned assemblies do not keep others out, and their memory is bounded.
#[test]
fn block1_of_many_motes() {
    let (api, gateway) = start();
    let before = gateway.rss_kib();
    for _ in 0..500 {
        let mote = Mote::new(gateway.address());
        for number in 0..8 {
            mote.send(&part(&mote, number));
            assert!(mote.try_receive(PATIENCE).is_some());
        }
    }
    let grown = gateway.rss_kib().saturating_sub(before);
    assert!(grown < 2048, "4 MiB were sent, {grown} KiB are kept");
    let mote = Mote::new(gateway.address());
    mote.separate(&send_blocks(&mote, &message(&api, "5", "x"), 32))
        .expect("2.05", SENT);
}

// --- discovery (RFC 6690) ---

/// Row 23: both resources, whatever the query asks for.
#[test]
fn discovery() {
    let (_api, gateway) = start();
    let mote = Mote::new(gateway.address());
    let get = || mote.request(Con, GET, ".well-known/core");
    let response = mote.piggybacked(&get());
    response.expect_code("2.05");
    assert_eq!(response.option_uint(CONTENT_FORMAT), Some(40));
    let both = response.text();
    for resource in ["</message>;rt=\"", "</update>;rt=\""] {
        assert!(both.contains(resource), "{both}");
    }
    for query in ["rt=nothing", "href=/message", "if=x"] {
        mote.piggybacked(&get().option(URI_QUERY, query))
            .expect("2.05", &both);
    }
    let accept = |format: &[u8]| get().option(ACCEPT, format);
    mote.piggybacked(&accept(b"\x28")).expect("2.05", &both);
    mote.piggybacked(&accept(b"")).expect_code("4.06");
    mote.piggybacked(&accept(b"\x3c")).expect_code("4.06");
    for option in [BLOCK1, BLOCK2] {
        let reserved = get().option(option, b"\x07");
        mote.piggybacked(&reserved)
            .expect("4.00", "Reserved block size");
    }
}
