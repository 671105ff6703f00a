//! The stand-ins themselves: a test that trusts them must not be fooled by them.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::*;
use serde_json::{Value, json};
use ureq::tls::{Certificate as Pem, RootCerts, TlsConfig};
use ureq::{Agent, Proxy as ProxySetting};

/// The first update of every stand-in.
const FIRST: i64 = 700_000_001;

/// Somebody who uses the bot's token.
struct Client {
    agent: Agent,
    url: String,
}

#[derive(Debug)]
struct Answer {
    status: u16,
    body: Value,
    took: Duration,
}

impl Answer {
    fn description(&self) -> &str {
        self.body["description"].as_str().unwrap_or_default()
    }

    fn updates(&self) -> Vec<i64> {
        let updates = self.body["result"].as_array().expect("updates");
        updates
            .iter()
            .map(|update| update["update_id"].as_i64().unwrap())
            .collect()
    }

    #[track_caller]
    fn expect(&self, status: u16, description: &str) {
        assert_eq!(
            (self.status, self.description()),
            (status, description),
            "{self:?}"
        );
        assert_eq!(self.body["ok"], status == 200);
        if status != 200 {
            assert_eq!(self.body["error_code"], status);
        }
    }

    /// Up to 1.5 s more are allowed, for the machine may be busy: half of what Telegram holds a call.
    #[track_caller]
    fn expect_after(&self, seconds: u64) {
        let seconds = Duration::from_secs(seconds);
        let most = seconds + Duration::from_millis(1500);
        assert!((seconds..most).contains(&self.took), "{self:?}");
    }
}

impl Client {
    fn new(api: &BotApi) -> Self {
        Self {
            agent: agent(api, Duration::from_secs(30), None),
            url: format!("{}{TOKEN}/", api.url()),
        }
    }

    fn try_to_ask(&self, method: &str, body: &Value) -> Result<Answer, ureq::Error> {
        let start = Instant::now();
        let request = self.agent.post(format!("{}{method}", self.url));
        let mut response = request
            .content_type("application/json")
            .send(body.to_string().as_bytes())?;
        let status = response.status().as_u16();
        let text = response
            .body_mut()
            .with_config()
            .limit(64 << 20)
            .read_to_string()?;
        Ok(Answer {
            status,
            body: serde_json::from_str(&text).unwrap_or(Value::String(text)),
            took: start.elapsed(),
        })
    }

    #[track_caller]
    fn ask(&self, method: &str, body: Value) -> Answer {
        self.try_to_ask(method, &body).unwrap()
    }

    #[track_caller]
    fn updates_from(&self, offset: i64) -> Answer {
        self.ask("getUpdates", json!({"offset": offset}))
    }

    #[track_caller]
    fn send(&self, chat: i64) -> Answer {
        self.ask("sendMessage", json!({"chat_id": chat, "text": "hi"}))
    }
}

fn agent(api: &BotApi, limit: Duration, proxy: Option<&str>) -> Agent {
    let pem = std::fs::read(api.ca_path()).unwrap();
    let roots = RootCerts::new_with_certs(&[Pem::from_pem(&pem).unwrap()]);
    let config = Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .proxy(proxy.map(|url| ProxySetting::new(url).unwrap()))
        .timeout_global(Some(limit))
        .max_idle_age(Duration::from_secs(60))
        .tls_config(TlsConfig::builder().root_certs(roots).build());
    config.build().into()
}

#[test]
fn answers_as_telegram_documents() {
    let api = BotApi::start();
    let client = Client::new(&api);
    let chat = |id: Value, text: &str| json!({"chat_id": id, "text": text});
    let bad_request = |method: &str, body: Value, description: &str| {
        client
            .ask(method, body)
            .expect(400, &format!("Bad Request: {description}"));
    };
    bad_request("sendMessage", chat(json!(1), ""), "message text is empty");
    bad_request(
        "sendMessage",
        chat(json!(1), &"ü".repeat(4097)),
        "message is too long",
    );
    bad_request("sendMessage", chat(json!("Ada"), "x"), "chat not found");
    let unknown = json!({"chat_id": 1, "message_id": 99});
    bad_request("deleteMessage", unknown, "message to delete not found");
    let known = json!({"chat_id": 1, "message_id": api.person_writes(1, "Ada", "hi")});
    client.ask("deleteMessage", known.clone()).expect(200, "");
    bad_request("deleteMessage", known, "message to delete not found");
    client.ask("nonsense", json!({})).expect(404, "Not Found");
    for (token, status, description) in [
        ("12:short".to_string(), 404, "Not Found"),
        (TOKEN.replace('a', "b"), 401, "Unauthorized"),
    ] {
        let stranger = Client {
            agent: client.agent.clone(),
            url: format!("{}{token}/", api.url()),
        };
        stranger.ask("getMe", json!({})).expect(status, description);
    }
    let longest = json!({"chat_id": 2, "text": "🌡".repeat(4096)});
    client.ask("sendMessage", longest).expect(200, "");
    let sent = client.ask("sendMessage", json!({"chat_id": "@news", "text": "hi"}));
    sent.expect(200, "");
    assert_eq!(sent.body["result"]["text"], "hi");
    assert_eq!(api.texts_to("@news"), ["hi"]);
    assert_eq!(api.seen().connections, 1, "kept alive");
}

#[test]
fn refuses_each_chat_for_its_reason() {
    let api = BotApi::start();
    let client = Client::new(&api);
    for (refusal, status, description) in [
        (
            Refusal::Blocked,
            403,
            "Forbidden: bot was blocked by the user",
        ),
        (
            Refusal::KickedFromGroup,
            403,
            "Forbidden: bot was kicked from the group chat",
        ),
        (Refusal::NotFound, 400, "Bad Request: chat not found"),
    ] {
        api.refuse_chat(-5, refusal);
        client.send(-5).expect(status, description);
    }
    api.refuse_chat(-5, Refusal::MigratedTo(-1_001_234));
    let moved = client.send(-5);
    moved.expect(
        400,
        "Bad Request: group chat was upgraded to a supergroup chat",
    );
    assert_eq!(moved.body["parameters"]["migrate_to_chat_id"], -1_001_234);
    client.send(-6).expect(200, "");
    api.refuse_chat(-5, None);
    client.send(-5).expect(200, "");
    assert_eq!(api.texts_to(-5).len(), 1);
}

#[test]
fn hands_out_updates_until_they_are_confirmed() {
    let api = BotApi::start();
    let client = Client::new(&api);
    for _ in 0..250 {
        api.person_writes(1, "Ada", "hi");
    }
    let page = |from: i64, count: i64| (FIRST + from..FIRST + from + count).collect::<Vec<_>>();
    assert_eq!(client.updates_from(0).updates(), page(0, 100));
    let three = json!({"offset": FIRST, "limit": 3});
    assert_eq!(
        client.ask("getUpdates", three).updates(),
        page(0, 3),
        "not confirmed yet"
    );
    assert_eq!(client.updates_from(FIRST + 100).updates(), page(100, 100));
    assert_eq!(
        client.updates_from(FIRST + 1_000_000).updates(),
        page(100, 100),
        "too far in the future: ignored"
    );
    assert_eq!(
        client.updates_from(-2).updates(),
        page(248, 2),
        "the last two; the others are forgotten"
    );
    let all = json!({"offset": FIRST + 250, "allowed_updates": ["message"]});
    assert!(client.ask("getUpdates", all).updates().is_empty());
    api.push_update(json!({"edited_message": {}}));
    assert_eq!(api.waiting_updates(), 0, "only what is allowed");
    api.person_writes(1, "Ada", "hi");
    assert!(client.updates_from(FIRST + 251).updates().is_empty());
    assert_eq!(api.waiting_updates(), 0, "confirmed");
    api.set_next_update_id(5);
    api.person_writes(1, "Ada", "hi");
    assert_eq!(client.updates_from(FIRST + 252).updates(), [5]);
}

/// A short page is no proof that it is the last one.
#[test]
fn cuts_a_page_at_4_mib() {
    let api = BotApi::start();
    let client = Client::new(&api);
    for _ in 0..5 {
        api.person_writes(1, "Ada", &"x".repeat(1 << 20));
    }
    let ids: Vec<i64> = (FIRST..FIRST + 5).collect();
    assert_eq!(client.updates_from(0).updates(), ids[..3]);
    assert_eq!(client.updates_from(ids[3]).updates(), ids[3..]);
}

#[test]
fn holds_who_asks_too_often() {
    let api = BotApi::start();
    let client = Client::new(&api);
    client.updates_from(0).expect_after(0);
    let held = client.updates_from(0);
    held.expect_after(3);
    assert!(held.updates().is_empty());
    client.updates_from(0).expect_after(0); // 3 s after the beginning of the last one
    client.updates_from(1).expect_after(0); // another offset
    client.updates_from(0).expect_after(0); // counts only against the call before
    let writes = thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(800));
            api.person_writes(1, "Ada", "hi");
        });
        client.updates_from(0)
    });
    assert_eq!(writes.updates(), [FIRST]);
    assert!(writes.took < Duration::from_millis(2500), "{writes:?}");
    let asked = json!({"offset": FIRST + 1, "timeout": 1});
    client.ask("getUpdates", asked).expect_after(1);
}

#[test]
fn gives_one_update_to_who_asks_at_once() {
    let api = BotApi::start();
    let client = Client::new(&api);
    for _ in 0..3 {
        api.person_writes(1, "Ada", "hi");
    }
    assert_eq!(client.updates_from(0).updates().len(), 3);
    // Half a second later it would get all of them again: the machine may be busy.
    let is_single = || client.updates_from(0).updates() == [FIRST];
    assert!(within(PATIENCE, is_single));
    assert_eq!(client.updates_from(FIRST).updates().len(), 3);
    thread::sleep(Duration::from_millis(600));
    let page = client.updates_from(FIRST);
    page.expect_after(0);
    assert_eq!(page.updates().len(), 3, "it is not held with updates there");
}

const OTHER_POLL: &str = "Conflict: terminated by other getUpdates request; make sure that only one bot instance is running";
const WEBHOOK: &str = "Conflict: can't use getUpdates method while webhook is active; \
    use deleteWebhook to delete the webhook first";

#[test]
fn one_long_poll_ends_the_other() {
    let api = BotApi::start();
    let clients = [(); 3].map(|()| Client::new(&api));
    let poll = || json!({"offset": FIRST, "timeout": 8});
    let start = Instant::now();
    thread::scope(|scope| {
        let first = scope.spawn(|| clients[0].ask("getUpdates", poll()));
        api.wait_for("the first", |seen| seen.count("getUpdates") == 1);
        clients[2].updates_from(0).expect_after(0); // answered at once, it ends nothing
        let second = scope.spawn(|| clients[1].ask("getUpdates", poll()));
        let first = first.join().unwrap();
        first.expect(409, OTHER_POLL);
        first.expect_after(0);
        let third = scope.spawn(|| clients[2].ask("getUpdates", poll()));
        let second = second.join().unwrap();
        second.expect(409, OTHER_POLL);
        second.expect_after(3);
        api.person_writes(1, "Ada", "hi");
        assert_eq!(third.join().unwrap().updates(), [FIRST]);
    });
    assert!(start.elapsed() < Duration::from_millis(7500));
    let statuses: Vec<u16> = api.seen().calls.iter().map(|call| call.status).collect();
    assert_eq!(statuses, [409, 200, 409, 200]);
}

#[test]
fn a_webhook_takes_the_updates() {
    let api = BotApi::start();
    let client = Client::new(&api);
    api.set_webhook(true);
    let refused = client.updates_from(0);
    refused.expect(409, WEBHOOK);
    refused.expect_after(0);
    let again = client.updates_from(0);
    again.expect(409, WEBHOOK);
    again.expect_after(3);
    client.ask("getMe", json!({})).expect(200, "");
    client.send(1).expect(200, "");
    api.set_webhook(false);
    client.updates_from(0).expect(200, "");
    client.updates_from(1).expect(200, "");
    let ended = thread::scope(|scope| {
        let held = scope.spawn(|| client.updates_from(1));
        api.wait_for("the last", |seen| seen.count("getUpdates") == 5);
        api.set_webhook(true);
        held.join().unwrap()
    });
    ended.expect(409, "Conflict: terminated by setWebhook request");
    ended.expect_after(0);
}

#[test]
fn refuses_too_fast_a_bot() {
    let api = BotApi::start();
    let client = Client::new(&api);
    let burst = || [(); 4].map(|()| client.send(1).status);
    assert_eq!(burst(), [200; 4], "not unless told");
    api.set_pace(true);
    assert_eq!(burst(), [200, 200, 200, 429]);
    let refused = client.send(1);
    refused.expect(429, "Too Many Requests: retry after 3");
    assert_eq!(refused.body["parameters"]["retry_after"], 3);
    assert_eq!(api.texts_to(1).len(), 7);
}

/// With a clock of its own: a group's minute is too long to wait for.
#[test]
fn limits_each_chat_each_group_and_the_bot() {
    let start = Instant::now();
    let at = |ms: u64| start + Duration::from_millis(ms);
    let mut pace = Pace::default();
    for ms in 0..3 {
        assert_eq!(pace.count("1", at(ms)), Ok(()));
    }
    assert_eq!(pace.count("1", at(3)), Err(3));
    assert_eq!(pace.count("1", at(2500)), Err(1));
    assert_eq!(pace.count("1", at(3000)), Ok(()));
    assert_eq!(
        pace.count("1", at(3000)),
        Err(1),
        "no new burst: one a second"
    );

    let mut pace = Pace::default();
    for second in 0..20 {
        assert_eq!(pace.count("-5", at(1000 * second)), Ok(()), "{second}");
    }
    assert_eq!(pace.count("-5", at(20_000)), Err(40));
    assert_eq!(pace.count("-5", at(60_000)), Ok(()));
    assert_eq!(pace.count("-5", at(60_500)), Err(1));
    assert_eq!(
        pace.count("5", at(60_500)),
        Ok(()),
        "a person is another chat"
    );

    let mut pace = Pace::default();
    for chat in 0..30 {
        assert_eq!(pace.count(&chat.to_string(), at(0)), Ok(()));
    }
    assert_eq!(pace.count("30", at(900)), Err(1));
    assert_eq!(pace.count("30", at(1000)), Ok(()));
}

#[test]
fn goes_wrong_as_planned() {
    let api = BotApi::start();
    // A new connection each time: what is left of the one before is not to be mixed up with it.
    let send = || {
        let client = Client {
            agent: agent(&api, Duration::from_secs(4), None),
            ..Client::new(&api)
        };
        client.try_to_ask("sendMessage", &json!({"chat_id": 1, "text": "hi"}))
    };
    api.fail(next(1, "sendMessage"), Fault::too_many_requests(7));
    let refused = send().unwrap();
    refused.expect(429, "Too Many Requests: retry after 7");
    assert_eq!(refused.body["parameters"]["retry_after"], 7);
    for fault in [
        Fault::Hang,
        Fault::CloseUnanswered,
        Fault::Bytes(b"nonsense\r\n\r\n".to_vec()),
    ] {
        api.fail(next(1, "sendMessage"), fault.clone());
        assert!(send().is_err(), "{fault:?}");
    }
    for status in [200, 302, 403, 502] {
        api.fail(next(1, "sendMessage"), Fault::Page(status));
        let page = send().unwrap();
        assert_eq!(page.status, status);
        assert!(page.body.as_str().unwrap().starts_with("<html>"));
    }
    assert_eq!(send().unwrap().status, 200);
    for certificate in [
        Certificate::OtherAuthority,
        Certificate::WrongName,
        Certificate::Expired,
    ] {
        api.show(certificate);
        assert!(send().is_err(), "{certificate:?}");
    }
    api.show(Certificate::Good);
    for fault in [ConnectionFault::Hang, ConnectionFault::Close] {
        api.fail_connections(1, fault);
        assert!(send().is_err(), "{fault:?}");
    }
    api.refuse();
    assert!(send().is_err(), "refused");
    api.accept_again();
    assert_eq!(send().unwrap().status, 200);
    assert_eq!(
        api.texts_to(1).len(),
        4,
        "hanging and closing come after the fact"
    );
}

#[test]
fn closes_idle_connections() {
    let api = BotApi::start();
    api.close_idle_after(Duration::from_millis(1500));
    let client = Client::new(&api);
    for (pause_ms, connections) in [(0, 1), (100, 1), (100, 1), (3000, 2)] {
        thread::sleep(Duration::from_millis(pause_ms));
        client.send(1).expect(200, "");
        assert_eq!(api.seen().connections, connections);
    }
}

/// One round trip each for TCP, TLS 1.3 and the request; one in all on a warm connection.
#[test]
fn emulates_a_distance() {
    let api = BotApi::start();
    let client = Client::new(&api);
    let trip = Duration::from_millis(1200);
    api.set_round_trip(trip);
    for (trips, what) in [(3, "cold"), (1, "warm")] {
        let taken = client.ask("getMe", json!({})).took;
        let expected = trip * trips..trip * (trips + 1);
        assert!(expected.contains(&taken), "{what}: {taken:?}");
    }
}

#[test]
fn the_proxy_leads_one_name_only() {
    let names = vec!["api.telegram.org".to_string()];
    let api = BotApi::with(BotApiOptions {
        names,
        ..BotApiOptions::default()
    });
    let proxy = Proxy::start("api.telegram.org:443", api.address());
    let agent = agent(&api, Duration::from_secs(10), Some(&proxy.url()));
    let answer = agent
        .get(format!("https://api.telegram.org/bot{TOKEN}/getMe"))
        .call()
        .unwrap();
    assert_eq!(answer.status(), 200);
    assert!(
        agent
            .get(format!("https://localhost/bot{TOKEN}/getMe"))
            .call()
            .is_err()
    );
    assert_eq!(proxy.asked(), ["api.telegram.org:443", "localhost:443"]);
    assert_eq!(api.count("getMe"), 1);
}

/// The mote's bytes are the firmware's bytes.
#[test]
fn motes_write_what_the_firmware_writes() {
    for name in [
        "message_all_three_chats",
        "message_all_two_chats",
        "message_one_chat_text_with_separators",
        "update",
    ] {
        let bytes = firmware(name);
        let message = Message::decode(&bytes).expect("a message");
        assert_eq!(message.encode(), bytes, "{name}");
        let path = name.split('_').next().unwrap();
        let written = Message::new(Kind::Con, POST, message.id)
            .token(&message.token)
            .path(path);
        assert_eq!(written.payload(&message.payload).encode(), bytes, "{name}");
    }
    // Long options, and what a strict reader refuses.
    let long = Message::new(Kind::Con, GET, 1)
        .option(URI_PATH, [b'x'; 300])
        .option(REQUEST_TAG, [b'y'; 20]);
    assert_eq!(Message::decode(&long.encode()), Some(long));
    for malformed in [
        "",
        "400212",
        "80021234",
        "49021234",
        "40021234f0",
        "40021234ff",
        "40001234ff61",
        "40021234b2",
    ] {
        assert_eq!(Message::decode(&hex(malformed)), None, "{malformed}");
    }
}

/// Each with its own way of going from one message ID to the next.
#[test]
fn motes_count_as_the_firmware_does() {
    let gateway = "127.0.0.1:9".parse().unwrap();
    let mote = Mote::at_port("127.0.0.9", free_udp_port(), gateway);
    let mut last = mote.next_id();
    let mut steps = [0; 4];
    for _ in 0..300 {
        let id = mote.next_id();
        steps[usize::from(id.wrapping_sub(last))] += 1;
        last = id;
    }
    assert!(steps[0] == 0 && steps[1..].iter().all(|count| *count > 50));
    mote.reboot();
    assert!(mote.next_id().wrapping_sub(last) > 64);
}

/// JSON as Telegram writes it is ASCII: an emoji takes twelve bytes.
#[test]
fn answers_are_ascii() {
    let api = BotApi::start();
    api.person_writes(5, "Zoë", "ä🙂\n\"");
    let agent = agent(&api, Duration::from_secs(10), None);
    let request = agent.post(format!("{}{TOKEN}/getUpdates", api.url()));
    let mut response = request.send_empty().unwrap();
    let text = response.body_mut().read_to_string().unwrap();
    let message = r#""text":"\u00e4\ud83d\ude42\n\"""#;
    assert!(text.is_ascii() && text.contains(message), "{text}");
}

/// A server that answers each byte with a thousand.
fn chatterbox() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().take(2) {
            let mut stream = stream.unwrap();
            thread::spawn(move || {
                while let Ok(1) = stream.read(&mut [0]) {
                    stream.write_all(&[7; 1000]).unwrap();
                }
            });
        }
    });
    address
}

/// A line is as slow as it was told to be, and a router on it forgets connections without a word.
#[test]
fn a_slow_line_that_forgets() {
    let line = Line::start(chatterbox(), 10_000);
    let connect = || {
        let url = line.url();
        let address = url.split('/').nth(2).unwrap();
        let stream = TcpStream::connect(address).unwrap();
        let limit = Some(Duration::from_secs(2));
        stream.set_read_timeout(limit).unwrap();
        stream
    };
    let ask = |stream: &mut TcpStream, times: usize| {
        stream.write_all(&vec![1; times]).unwrap();
        stream.read_exact(&mut vec![0; 1000 * times])
    };
    let mut first = connect();
    let start = Instant::now();
    ask(&mut first, 10).unwrap();
    let taken = start.elapsed();
    assert!(taken >= Duration::from_millis(950), "{taken:?}");
    assert_eq!(line.downloaded(), 10_000);
    line.forget_connections();
    let error = ask(&mut first, 1).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock, "no word at all");
    ask(&mut connect(), 1).unwrap();
    assert_eq!((line.downloaded(), line.connections()), (11_000, 2));
}

// --- the model of the firmware ---

/// What it knows after these replies.
fn heard(replies: &[&str]) -> String {
    let mut firmware = Firmware::default();
    replies.iter().for_each(|reply| firmware.take(reply));
    firmware.knows()
}

#[test]
fn the_firmware_reads_tokens() {
    for (replies, expected) in [
        (&["r7;i5;f1;Ada:1234567890"][..], "i5;f1;Ada:1234567890"),
        (
            &["Ada:1", "No Updates", "", "Messages sent successfully"],
            "Ada:1",
        ),
        (&["Ada:1;Bob:2", "r1", "i120"], "i120;Bob:2"),
        (&["Ada:1", "Ada:2"], "Ada:2"), // the first one's id is gone
        (&["Ada:1", "Eve:1"], "Eve:1"), // a new name
        (&["Ada:1;Bob:2", "Ada:2"], "Ada:2;Bob:2"), // the first slot of the two
        (&["7:1;Bob:2", "r7"], "Bob:2"), // a name of digits
        (&["Ada:1", "r2d2:5"], "Ada:1"), // taken for a removal
        (&["i5ve:5", "f0x:6"], "i5;f0"), // taken for settings
        (&["Ada:123456789012"], "Ada:12345678901"),
        (&["Maximiliana-Aurelia:1"], "Maximiliana-Au:1"),
        (
            &["a:1;b:2;c:3;d:4;e:5;g:6;h:7;j:8;k:9;l:10;m:11", "r3"],
            "a:1;b:2;d:4;e:5;g:6;h:7;j:8;k:9;l:10",
        ),
    ] {
        assert_eq!(heard(replies), expected, "{replies:?}");
    }
}

#[test]
fn the_firmware_throws_long_replies_away() {
    let reply = |length: usize| format!("Ada:1;{}:2", "x".repeat(length - 8));
    assert_eq!(
        heard(&[&reply(REPLY_MAX)]),
        format!("Ada:1;{}:2", "x".repeat(14))
    );
    assert_eq!(heard(&[&reply(REPLY_MAX + 1)]), "");
}

#[test]
fn the_firmware_forgets_when_it_boots() {
    let mut firmware = Firmware::default();
    firmware.take("i5;f1;Ada:1;Bob:2");
    assert_eq!(firmware.chat_ids(), "1,2");
    firmware.reboot();
    assert_eq!(firmware.knows(), "");
}

#[test]
#[should_panic(expected = "the firmware crashes")]
fn the_firmware_crashes_without_a_colon() {
    heard(&["Missing required fields"]);
}
