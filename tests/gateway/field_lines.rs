//! Lines as they really are: slow, forgotten by a router, far from a name server, and with somebody else's answers.

use std::collections::HashSet;
use std::net::Ipv4Addr;
use std::thread;
use std::time::{Duration, Instant};

use crate::support::*;
use serde_json::{Value, json};

const STRANGER: i64 = 7_777_777_777;
/// Of a loopback that is not slowed down.
const FAST: usize = 1 << 30;

/// A gateway that reaches Telegram by a line.
struct Behind {
    api: BotApi,
    line: Line,
    gateway: Gateway,
}

impl Behind {
    fn start(api: BotApi, bytes_per_second: usize) -> Self {
        let line = Line::start(api.address(), bytes_per_second);
        let config = format!("[telegram]\nbot_token = {TOKEN}\nurl = {}\n", line.url());
        let gateway = Gateway::with(Setup::ipv4(&api).config(&config));
        Self { api, line, gateway }
    }

    fn mote(&self) -> Mote {
        Mote::new(self.gateway.address())
    }

    fn text(&self, mote: &Mote, chats: &str, text: &str) -> Message {
        mote.post_separate("message", form(&self.line.url(), TOKEN, chats, text))
    }

    fn poll(&self, mote: &Mote) -> Message {
        mote.post_separate("update", format!("url={}&token={TOKEN}", self.line.url()))
    }
}

// --- slow lines ---

/// Bytes of a page of updates that hold such texts, as Telegram writes them.
fn weight(count: usize, text: &str) -> usize {
    let escaped: usize = text.chars().map(|c| 6 * c.len_utf16()).sum();
    count * (escaped + 400)
}

/// A stranger's long texts, and behind them somebody who says hello.
fn long_texts(count: usize, text: &str) -> BotApi {
    let api = BotApi::start();
    for _ in 0..count {
        api.person_writes(STRANGER, "Stranger", text);
    }
    api.person_writes(ADA, "Ada", "hello");
    api
}

/// Ada is heard in time, and what is in front of her is not fetched more than three times.
fn assert_heard(behind: &Behind, start: Instant, limit: Duration, weight: usize) {
    let is_heard = |seen: &Seen| !seen.texts_to(ADA).is_empty();
    let is_in_time = behind.api.wait_until(limit, is_heard);
    let downloaded = behind.line.downloaded();
    println!(
        "{:.1?}: {downloaded} bytes of {weight} ({:.2} times)",
        start.elapsed(),
        downloaded as f64 / weight as f64
    );
    assert!(
        is_in_time,
        "deaf; {} updates wait\n{}",
        behind.api.waiting_updates(),
        behind.gateway.log()
    );
    assert!(downloaded <= 3 * weight, "{downloaded} bytes of {weight}");
}

/// A page that takes longer than the time for it: the next fetch asks for one message. A mote asks, too, or it would
/// take a minute more.
#[test]
fn a_page_that_is_too_slow() {
    let text = "ä".repeat(4096);
    let weight = weight(2, &text);
    // Both texts need 8.8 s, longer than any fetch may take.
    let start = Instant::now();
    let behind = Behind::start(long_texts(2, &text), weight * 10 / 88);
    let mote = behind.mote();
    while behind.api.texts_to(ADA).is_empty() && start.elapsed() < Duration::from_secs(25) {
        behind.poll(&mote);
    }
    assert_heard(&behind, start, Duration::from_secs(1), weight);
}

#[test]
#[ignore = "takes a minute"]
fn a_line_of_4_megabits() {
    let text = "🙂".repeat(4096);
    let start = Instant::now();
    let behind = Behind::start(long_texts(85, &text), 500_000);
    assert_heard(&behind, start, Duration::from_secs(60), weight(85, &text));
}

#[test]
#[ignore = "takes two minutes"]
fn a_line_of_64_kilobits() {
    let text = "ä".repeat(4096);
    let start = Instant::now();
    let behind = Behind::start(long_texts(3, &text), 8_000);
    assert_heard(&behind, start, Duration::from_secs(150), weight(3, &text));
}

/// Ten long answers to long texts are more than is read at once; they are read one by one.
#[test]
fn a_page_that_is_too_long() {
    let api = BotApi::start();
    let text = "🙂".repeat(4096);
    let bold = |offset| json!({"type": "bold", "offset": offset, "length": 1});
    let entities: Vec<Value> = (0..100).map(bold).collect();
    let chat = json!({"id": STRANGER, "type": "private", "first_name": "Stranger"});
    for _ in 0..12 {
        let before =
            json!({"message_id": 1, "date": 0, "chat": chat, "text": text, "entities": entities});
        let answer = json!({"text": text, "entities": entities, "reply_to_message": before});
        api.push_message(STRANGER, "Stranger", answer);
    }
    api.person_writes(ADA, "Ada", "hello");
    let start = Instant::now();
    let gateway = Gateway::with(Setup::new(&api));
    let is_heard = |seen: &Seen| !seen.texts_to(ADA).is_empty();
    let is_in_time = api.wait_until(Duration::from_secs(60), is_heard);
    println!("after {:.1?}", start.elapsed());
    assert!(is_in_time, "{}", gateway.log());
}

/// A long answer to a long text is one update, and more than such a line brings in time.
#[test]
fn an_update_that_is_too_long_for_the_line() {
    let api = BotApi::start();
    let text = "🙂".repeat(4096);
    let chat = json!({"id": STRANGER, "type": "private", "first_name": "Stranger"});
    let before = json!({"message_id": 1, "date": 0, "chat": chat, "text": text});
    let answer = json!({"text": text, "reply_to_message": before});
    api.push_message(STRANGER, "Stranger", answer);
    api.person_writes(ADA, "Ada", "hello");
    let line = Line::start(api.address(), 8_000);
    let config = format!("[telegram]\nbot_token = {TOKEN}\nurl = {}\n", line.url());
    let gateway = Gateway::with(Setup::ipv4(&api).config(&config));
    let is_heard = |seen: &Seen| !seen.texts_to(ADA).is_empty();
    let is_in_time = api.wait_until(Duration::from_secs(90), is_heard);
    assert!(is_in_time, "{}", gateway.log());
}

/// A stranger's longest texts are read in little memory: the unit has 64 MB.
#[test]
fn the_memory_of_a_page() {
    let api = long_texts(90, &"🙂".repeat(4096));
    let gateway = Gateway::with(Setup::new(&api));
    let mote = Mote::new(gateway.address());
    let is_heard = within(Duration::from_secs(90), || {
        mote.post_separate("update", update(&api));
        !api.texts_to(ADA).is_empty()
    });
    assert!(is_heard, "deaf");
    let peak = gateway.status("VmHWM");
    println!("{peak} KiB");
    assert!(peak < 12 << 10, "{peak} KiB at the peak");
}

// --- connections that are dead without a word ---

/// A router forgets all connections; one call fails because of it, and afterwards every text arrives.
fn after_a_failure(chats: &str, failing: impl Fn(&Behind, &Mote)) {
    let behind = Behind::start(BotApi::start(), FAST);
    behind
        .api
        .wait_for("the first fetch", |seen| seen.count("getUpdates") > 0);
    let mote = behind.mote();
    let warm = behind.text(&mote, chats, "warm");
    warm.expect_code("2.05");
    behind.line.forget_connections();
    failing(&behind, &mote);
    let ids: Vec<&str> = chats.split(',').collect();
    for number in 0..3 {
        let text = format!("text {number}");
        behind.text(&mote, chats, &text).expect_code("2.05");
        for id in &ids {
            assert!(
                behind.api.texts_to(id).contains(&text),
                "{text:?} to {id} is lost"
            );
        }
    }
    let sent: Vec<(String, String)> = behind
        .api
        .seen()
        .sent
        .into_iter()
        .map(|it| (it.chat, it.text))
        .collect();
    let different: HashSet<&(String, String)> = sent.iter().collect();
    assert_eq!(different.len(), sent.len(), "a text went out twice");
}

/// What the first fetch has found counts for 3 s; then Telegram is asked, on a dead connection.
fn fail_a_poll(behind: &Behind, mote: &Mote) {
    let has_failed = || behind.poll(mote).code() == "5.00";
    assert!(within(PATIENCE, has_failed), "no fetch failed");
}

#[test]
fn dead_connections_are_not_used_up_one_by_one() {
    type Failing = fn(&Behind, &Mote);
    let cases: [(&str, (&str, Failing)); 4] = [
        (
            "a poll fails, three chats",
            ("5,6,7", |behind, mote| fail_a_poll(behind, mote)),
        ),
        (
            "a text fails, three chats",
            ("5,6,7", |behind, mote| {
                behind.text(mote, "8", "lost").expect_code("5.00")
            }),
        ),
        (
            "a poll fails, ten chats",
            ("1,2,3,4,5,6,7,8,9,10", |behind, mote| {
                fail_a_poll(behind, mote)
            }),
        ),
        (
            "a text to two fails, four chats",
            ("5,6,7,8", |behind, mote| {
                behind.text(mote, "8,9", "lost").expect_code("5.00")
            }),
        ),
    ];
    in_parallel(&cases, |(chats, failing)| after_a_failure(chats, failing));
}

/// The field's pattern: the own fetch meets the dead connection, and the next texts meet none.
#[test]
#[ignore = "takes half a minute"]
fn the_own_fetch_meets_a_dead_connection() {
    after_a_failure("5,6,7", |behind, _| {
        let has_failed = || {
            behind
                .gateway
                .log()
                .contains("cannot fetch what people write")
        };
        assert!(
            within(Duration::from_secs(30), has_failed),
            "no fetch failed"
        );
    });
}

// --- name servers ---

/// A stand-in that has to be looked up.
fn by_name(listen: Ipv4Addr) -> BotApi {
    BotApi::with(BotApiOptions {
        listen: (listen, 0).into(),
        names: vec!["telegram.test".to_string()],
        ..BotApiOptions::default()
    })
}

/// Whatever resolv.conf says, there is one look-up at a time: a silent name server fills no process with threads.
fn one_look_up(options: &str, texts: usize) -> (BotApi, Gateway, NameServer) {
    let names = NameServer::start(Names::Silent, options);
    let api = by_name(Ipv4Addr::LOCALHOST);
    let gateway = Gateway::with(Setup::ipv4(&api));
    let mut most = 0;
    let start = Instant::now();
    thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let mote = Mote::new(gateway.address());
            for number in 0..texts {
                let text = format!("text {number}");
                let form = message(&api, "5", &text);
                mote.post_separate("message", form).expect_code("5.00");
            }
        });
        while !asking.is_finished() {
            most = most.max(gateway.threads());
            thread::sleep(Duration::from_millis(50));
        }
    });
    println!(
        "{options:?}: {most} threads in {:.0?}, {} questions",
        start.elapsed(),
        names.questions()
    );
    assert!(names.questions() > 0, "nobody asked");
    assert!(
        most <= 3,
        "{most} threads: the loop, the heartbeat, a look-up"
    );
    assert!(api.texts_to(5).is_empty());
    (api, gateway, names)
}

#[test]
fn a_silent_name_server() {
    if !in_namespaces(a_silent_name_server) {
        return;
    }
    one_look_up("", 4);
}

#[test]
#[ignore = "takes a minute"]
fn a_silent_name_server_and_patient_settings() {
    if !in_namespaces(a_silent_name_server_and_patient_settings) {
        return;
    }
    let (api, gateway, names) = one_look_up("options timeout:30 attempts:5", 10);
    // It knows again: served as ever, as soon as the look-up of before asks once more.
    names.set(Names::Lead(Ipv4Addr::LOCALHOST));
    let mote = Mote::new(gateway.address());
    let is_served = within(Duration::from_secs(35), || {
        let form = message(&api, "6", "x");
        mote.post_separate("message", form).code() == "2.05"
    });
    assert!(is_served, "{}", gateway.log());
}

/// A look-up that takes longer than a request gives it is believed all the same, the next time.
#[test]
fn a_late_name_server_from_the_start() {
    if !in_namespaces(a_late_name_server_from_the_start) {
        return;
    }
    let names = NameServer::start(Names::Lead(Ipv4Addr::LOCALHOST), "options timeout:20");
    names.is_late(Duration::from_secs(9));
    let api = by_name(Ipv4Addr::LOCALHOST);
    let gateway = Gateway::with(Setup::ipv4(&api));
    let mote = Mote::new(gateway.address());
    let start = Instant::now();
    let is_served = within(Duration::from_secs(15), || {
        let form = message(&api, "5", "x");
        mote.post_separate("message", form).code() == "2.05"
    });
    println!("served after {:.1?}", start.elapsed());
    assert!(is_served, "{}", gateway.log());
}

/// Telegram moves, and the name server takes its time to say so.
#[test]
#[ignore = "takes two minutes"]
fn a_new_address_of_a_late_name_server_is_followed() {
    if !in_namespaces(a_new_address_of_a_late_name_server_is_followed) {
        return;
    }
    let new = Ipv4Addr::new(127, 0, 0, 2);
    let api = by_name(new);
    let names = NameServer::start(Names::Lead(Ipv4Addr::LOCALHOST), "");
    let old_address = (Ipv4Addr::LOCALHOST, api.address().port()).into();
    let line = Line::start_at(old_address, api.address(), FAST);
    let gateway = Gateway::with(Setup::ipv4(&api));
    let mote = Mote::new(gateway.address());
    let text = |text: &str| {
        let response = mote.post_separate("message", message(&api, "5", text));
        response.code()
    };
    assert_eq!(text("before"), "2.05");
    assert!(line.connections() > 0);
    names.is_late(Duration::from_millis(1300));
    names.set(Names::Lead(new));
    // Addresses hold for a minute. Each text needs a new connection.
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(75) {
        thread::sleep(Duration::from_secs(3));
        assert_eq!(text("meanwhile"), "2.05");
        api.close_connections();
    }
    // Nobody is left at the old address.
    line.forget_connections();
    drop(line);
    let is_followed = within(Duration::from_secs(20), || text("afterwards") == "2.05");
    assert!(is_followed, "{}", gateway.log());
}

// --- what is no answer of Telegram's ---

/// An HTTP response in full.
fn response(status: &str, headers: &str, body: &[u8]) -> Fault {
    let head = format!(
        "HTTP/1.1 {status}\r\n{headers}Content-Length: {}\r\n\r\n",
        body.len()
    );
    Fault::Bytes([head.as_bytes(), body].concat())
}

const JSON: &str = "Content-Type: application/json\r\n";
const HTML: &str = "Content-Type: text/html\r\n";

/// What was read is told: status, length and the reader's own reason, not a guess.
#[test]
fn an_answer_that_cannot_be_read() {
    let page = b"<html><h1>Please log in</h1></html>";
    let packed = hex(
        "1f8b0800000000000203ab56cacf56b22a292a4dd5512a4a2d2ecd2951b28a8ead0500d8a0010f17000000",
    );
    let cut = br#"{"ok":true,"result":{"message_id":1,"text":"gr"#;
    let cases: [(&str, (Fault, &[&str])); 10] = [
        (
            "a page",
            (
                response("200 OK", HTML, page),
                &["200", "35 bytes", "expected value at line 1 column 1"],
            ),
        ),
        (
            "a page with 502",
            (
                response("502 Bad Gateway", HTML, page),
                &["502", "35 bytes", "expected value"],
            ),
        ),
        (
            "nothing",
            (response("200 OK", JSON, b""), &["200", "0 bytes", "EOF"]),
        ),
        (
            "nothing with 504",
            (
                response("504 Gateway Timeout", "", b""),
                &["504", "0 bytes", "EOF"],
            ),
        ),
        (
            "a cut one",
            (response("200 OK", JSON, cut), &["200", "46 bytes", "EOF"]),
        ),
        (
            "a packed one",
            (
                response(
                    "200 OK",
                    &format!("{JSON}Content-Encoding: gzip\r\n"),
                    &packed,
                ),
                &["200", "bytes", "line 1 column"],
            ),
        ),
        (
            "a mark of order",
            (
                response("200 OK", JSON, b"\xef\xbb\xbf{\"ok\":true}"),
                &["200", "14 bytes", "line 1 column 1"],
            ),
        ),
        (
            "twice",
            (
                response("200 OK", JSON, b"{\"ok\":true,\"result\":[]}{}"),
                &["200", "25 bytes", "trailing"],
            ),
        ),
        (
            "no UTF-8",
            (
                response("200 OK", JSON, b"{\"ok\":\"\xff\"}"),
                &["200", "10 bytes", "line 1 column"],
            ),
        ),
        (
            "a list",
            (response("200 OK", JSON, b"[]"), &["200", "2 bytes"]),
        ),
    ];
    in_parallel(&cases, |(fault, words)| {
        let (api, gateway) = start();
        let mote = Mote::new(gateway.address());
        api.fail(every("sendMessage"), fault.clone());
        mote.post_separate("message", message(&api, "5", "x"))
            .expect("5.00", "");
        assert!(mote.ping(PATIENCE));
        let log = gateway.log();
        let refused = log
            .lines()
            .find(|line| line.contains("[WARN]") && line.contains("5"));
        let refused = refused.unwrap_or_else(|| panic!("not told: {log}"));
        for word in *words {
            assert!(refused.contains(word), "{word:?} in {refused:?}");
        }
        assert!(!log.contains("login page"), "a guess: {refused:?}");
        assert_eq!(api.count("sendMessage"), 1, "it may have arrived");
    });
}

/// The same for what people write; Telegram's own answers are asked for as they are.
#[test]
fn a_page_that_cannot_be_read() {
    let page = b"<html><h1>Please log in</h1></html>";
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    api.fail(next(1, "getUpdates"), response("200 OK", HTML, page));
    api.person_writes(ADA, "Ada", "hi");
    let is_told = within(PATIENCE, || {
        mote.post_separate("update", update(&api));
        thread::sleep(Duration::from_millis(300));
        let log = gateway.log();
        let words = ["[WARN]", "HTTP 200", "35 bytes", "line 1 column 1"];
        log.lines()
            .any(|line| words.iter().all(|word| line.contains(word)))
    });
    assert!(is_told, "{}", gateway.log());
    let is_heard = |seen: &Seen| !seen.texts_to(ADA).is_empty();
    let is_in_time = within(PATIENCE, || {
        mote.post_separate("update", update(&api));
        is_heard(&api.seen())
    });
    assert!(is_in_time, "{}", gateway.log());
    let calls = api.seen().calls("getUpdates");
    for call in &calls {
        let head = call.head.to_lowercase();
        let asks = head.lines().any(|line| line == "accept-encoding: identity");
        assert!(asks, "{head}");
    }
    // The next one after it asks for one, as after a page that was too slow; then ten again.
    let limits: Vec<Option<i64>> = calls
        .iter()
        .map(|call| call.body["limit"].as_i64())
        .collect();
    let failed = limits.iter().position(|limit| *limit == Some(1));
    assert!(failed.is_some_and(|failed| failed >= 1), "{limits:?}");
    assert_eq!(limits[0], Some(10), "{limits:?}");
    assert_eq!(limits.last(), Some(&Some(10)), "{limits:?}");
}

/// An update that is no JSON is skipped, once it is alone; those before and behind it are heard.
#[test]
fn an_update_that_cannot_be_read() {
    let cases = [
        ("half a character", r"\ud83d"),
        ("a control character", "\u{1}"),
        ("an escape that is none", r"\x"),
        ("quotation marks", "\""),
    ];
    in_parallel(&cases, |odd| {
        let api = BotApi::start();
        api.fail(every("getUpdates"), Fault::Replaced("ODD", odd));
        api.person_writes(BOB, "Bob", "hi");
        api.person_writes(STRANGER, "Stranger", "ODD");
        api.person_writes(STRANGER, "Stranger", r#""update_id":1000000000, ODD"#);
        api.person_writes(ADA, "Ada", "hi");
        let gateway = Gateway::with(Setup::new(&api));
        let is_heard = |seen: &Seen| !seen.texts_to(ADA).is_empty();
        let is_in_time = api.wait_until(Duration::from_secs(40), is_heard);
        assert!(is_in_time, "{}", gateway.log());
        assert_eq!(api.texts_to(BOB).len(), 1, "{}", gateway.log());
        assert!(api.texts_to(STRANGER).is_empty());
    });
}

/// After a fetch that failed the next one comes in a minute; but whoever has written meanwhile is heard as soon as a text
/// shows that Telegram is there.
#[test]
fn an_answer_ends_the_minute() {
    let cases = [
        ("closed", Fault::CloseUnanswered),
        ("a page of the front end", Fault::Page(502)),
        ("no HTTP", Fault::Bytes(b"SSH-2.0-OpenSSH_9.2\r\n".to_vec())),
        ("hang", Fault::Hang),
        ("500", Fault::error(500, "Internal Server Error: restart")),
    ];
    in_parallel(&cases, |fault| {
        let api = BotApi::start();
        api.fail(every("getUpdates"), fault.clone());
        let gateway = Gateway::with(Setup::new(&api));
        gateway.wait_for_log("cannot fetch what people write");
        api.person_writes(ADA, "Ada", "hi");
        thread::sleep(Duration::from_millis(3500)); // one that could not be read is tried again at once, for one message
        api.heal();
        let mote = Mote::new(gateway.address());
        mote.post_separate("message", message(&api, "5", "x"))
            .expect_code("2.05");
        let is_heard = |seen: &Seen| !seen.texts_to(ADA).is_empty();
        let is_in_time = api.wait_until(Duration::from_secs(5), is_heard);
        assert!(is_in_time, "{}", gateway.log());
    });
}

// --- too many requests ---

/// Nobody asks again before the time is over, whatever form it has; motes are told so at once.
#[test]
fn retry_after() {
    let cases = [
        ("number", json!(6)),
        ("fraction", json!(5.5)),
        ("string", json!("6")),
        ("string of a fraction", json!("5.5")),
    ];
    in_parallel(&cases, |retry_after| {
        let api = BotApi::start();
        let body = json!({"ok": false, "error_code": 429, "description": "Too Many Requests: retry after 6",
            "parameters": {"retry_after": retry_after}});
        api.fail(next(1, "getUpdates"), Fault::Answer(429, body.to_string()));
        let gateway = Gateway::with(Setup::new(&api));
        api.wait_for("the first fetch", |seen| seen.count("getUpdates") > 0);
        let refused = api.seen().calls("getUpdates")[0].at;
        let mote = Mote::new(gateway.address());
        while refused.elapsed() < Duration::from_millis(3500) {
            let start = Instant::now();
            mote.post_separate("update", update(&api))
                .expect("5.00", "");
            let taken = start.elapsed();
            assert!(taken < Duration::from_secs(2), "{taken:?}");
            thread::sleep(Duration::from_millis(300));
        }
        // Texts are another matter.
        mote.post_separate("message", message(&api, "5", "x"))
            .expect_code("2.05");
        assert_eq!(api.texts_to(5), ["x"]);
        let is_served = || mote.post_separate("update", update(&api)).code() == "2.03";
        assert!(within(PATIENCE, is_served), "{}", gateway.log());
        let early = api.seen().calls("getUpdates")[1].at - refused;
        assert!(
            early >= Duration::from_millis(5500),
            "asked after {early:?}"
        );
    });
}

/// A text that comes too early goes out when its time has come.
#[test]
fn retry_after_of_a_text() {
    let cases = [
        ("number", json!(1)),
        ("fraction", json!(0.5)),
        ("string", json!("1")),
        ("string of a fraction", json!("1.5")),
    ];
    in_parallel(&cases, |retry_after| {
        let (api, gateway) = start();
        let body = json!({"ok": false, "error_code": 429, "description": "Too Many Requests",
            "parameters": {"retry_after": retry_after}});
        api.fail(next(1, "sendMessage"), Fault::Answer(429, body.to_string()));
        let mote = Mote::new(gateway.address());
        mote.post_separate("message", message(&api, "5", "x"))
            .expect_code("2.05");
        let calls = api.seen().calls("sendMessage");
        assert_eq!(calls.len(), 2);
        assert!(calls[1].at - calls[0].at >= Duration::from_millis(500));
        assert_eq!(api.texts_to(5), ["x"]);
    });
}
