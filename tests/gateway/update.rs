//! POST /update: what the mote is told, until it has acknowledged it, whatever happens on the way.

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};
use std::{fs, thread};

use crate::support::*;
use serde_json::{Value, json};

const BOTH: &str = "Ada:1234567890;Bob:2345678901";

fn config(setting: &str) -> String {
    format!("config {PASSWORD} {setting}")
}

// --- the reply ---

#[test]
fn the_example_of_the_contract() {
    let api = BotApi::start();
    api.person_writes(BOB, "Bob", &config("interval 5"));
    api.person_writes(ADA, "Ada", "hello");
    api.person_writes(BOB, "Bob", "remove me");
    let gateway = start_with(&api, Setup::new(&api));
    let mote = Mote::new(gateway.address());
    assert_eq!(poll(&mote, &api), "r2345678901;i5;Ada:1234567890");
    assert_eq!(poll(&mote, &api), NOTHING);
}

/// What Ada or Bob writes, and the whole state that the mote is told then; nothing if it knows that already.
#[test]
fn everything_or_nothing() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    let ada = |text: &str| api.person_writes(ADA, "Ada", text);
    let bob = |text: &str| api.person_writes(BOB, "Bob", text);
    assert_eq!(poll(&mote, &api), NOTHING);
    ada(&config("interval 5"));
    ada(&config("feedback 1"));
    bob("hi");
    assert_eq!(hear(&mote, &api), format!("i5;f1;{BOTH}"));
    ada(&config("feedback 0"));
    ada(&config("interval 7"));
    assert_eq!(hear(&mote, &api), format!("i7;f0;{BOTH}"));
    ada(&config("interval 7"));
    assert_eq!(hear(&mote, &api), NOTHING);
    bob("remove me");
    assert_eq!(hear(&mote, &api), format!("r2345678901;i7;f0;{ADA_TOKEN}"));
    bob("I am back");
    assert_eq!(hear(&mote, &api), format!("i7;f0;{BOTH}"));
}

#[test]
fn missing_fields() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    let url = api.url();
    let known = api.seen().calls.len();
    for form in [
        "",
        "nonsense",
        "chat_ids=5&text=x",
        &format!("url={url}"),
        "token=x",
        &format!("url={url}&token=\0"),
    ] {
        mote.post_piggybacked("update", form)
            .expect("4.00", "Missing required fields");
    }
    assert_eq!(api.calls_after(known).len(), 0);
}

// --- offered until acknowledged ---

/// Only the ACK of the response counts: not its loss, an RST, another endpoint's, one of a former life, nor a NON poll.
#[test]
fn offered_until_acknowledged() {
    let api = BotApi::start();
    api.person_writes(ADA, "Ada", &config("interval 5"));
    let mut gateway = start_with(&api, Setup::new(&api));
    let mote = Mote::new(gateway.address());
    let state = "i5;Ada:1234567890";
    let ask = || {
        let request = mote.post("update", update(&api));
        mote.begin(&request);
        let response = mote.response(&request);
        response.expect("2.05", state);
        response
    };
    ask(); // the ACK is lost
    let late = ask();
    mote.reset(&late); // the mote does not know the token any more
    let stale = ask();
    Mote::new(gateway.address()).acknowledge(&stale);
    let request = mote.request(Kind::Non, POST, "update");
    mote.send(&request.payload(update(&api)));
    let response = mote.receive();
    assert_eq!(response.kind, Kind::Non);
    response.expect("2.05", state);
    gateway.restart();
    mote.acknowledge(&stale);
    mote.acknowledge(&ask());
    assert_eq!(poll(&mote, &api), NOTHING);
    // Nothing about motes is kept on disk.
    gateway.restart();
    assert_eq!(poll(&mote, &api), state);
    assert_eq!(poll(&mote, &api), NOTHING);
}

/// What changes after the reply was sent is not acknowledged with it.
#[test]
fn an_ack_covers_what_was_in_the_reply() {
    let api = BotApi::start();
    api.person_writes(ADA, "Ada", "hi");
    let gateway = start_with(&api, Setup::new(&api));
    let mote = Mote::new(gateway.address());
    let request = mote.post("update", update(&api));
    mote.begin(&request);
    let first = mote.response(&request);
    first.expect("2.05", ADA_TOKEN);
    api.person_writes(BOB, "Bob", "hi");
    api.wait_for("Bob's greeting", |seen| !seen.texts_to(BOB).is_empty());
    mote.acknowledge(&first);
    while mote.try_receive(QUIET).is_some() {} // it was sent again meanwhile
    assert_eq!(poll(&mote, &api), BOTH);
    assert_eq!(poll(&mote, &api), NOTHING);
}

/// kill -9 at any moment of a poll: no change is lost, the state file is never half written.
#[test]
fn killed_at_any_moment() {
    in_parallel(&[("1", 1), ("2", 2), ("3", 3), ("4", 4)], |seed| {
        let api = BotApi::start();
        let mut gateway = Gateway::with(Setup::new(&api));
        let mote = Mote::new(gateway.address());
        let (mut firmware, mut numbers) = (Firmware::default(), Numbers(*seed));
        for round in 1..=12 {
            let id = 1_000_000_000 + round % 8;
            let text = match round % 3 {
                0 => "remove me".to_string(),
                1 => "hello".to_string(),
                _ => config(&format!("interval {round}")),
            };
            api.person_writes(id, &format!("User{id}"), &text);
            mote.send(&mote.post("update", update(&api)));
            let end = Instant::now() + Duration::from_micros(numbers.next() % 40_000);
            while let Some(message) = mote.try_receive(end - Instant::now()) {
                if message.kind == Kind::Con {
                    firmware.take(&message.text());
                    mote.acknowledge(&message);
                }
            }
            gateway.kill9();
            let state = gateway.state();
            let whole = state.is_empty() || serde_json::from_str::<Value>(&state).is_ok();
            assert!(whole, "half written: {state}");
            gateway.restart();
        }
        while mote.try_receive(QUIET).is_some() {}
        firmware.take(&hear(&mote, &api));
        // Rounds 1 4 7 10 write hello, 2 5 8 11 set the interval (ids 2 5 0 3), 3 6 9 12 leave (ids 3 6 1 4).
        let users = [0, 2, 3, 5, 7].map(|n| format!("User100000000{n}:100000000{n}"));
        assert_eq!(
            (firmware.interval, firmware.users()),
            (Some(11), users.to_vec())
        );
    });
}

// --- several motes ---

/// A mote is its IP address: each hears everything once, whatever port it asks from, however late it comes.
#[test]
fn several_motes() {
    let api = BotApi::start();
    api.person_writes(ADA, "Ada", "hi");
    let gateway = start_with(&api, Setup::ipv4(&api));
    let mote = |number: u8| Mote::at(&format!("127.0.0.{number}"), gateway.address());
    let (one, two, three) = (mote(2), mote(3), mote(4));
    assert_eq!(poll(&one, &api), ADA_TOKEN);
    api.person_writes(BOB, "Bob", "hi");
    assert_eq!(hear(&one, &api), BOTH);
    assert_eq!(poll(&two, &api), BOTH);
    api.person_writes(BOB, "Bob", "remove me");
    let left = "r2345678901;Ada:1234567890";
    assert_eq!(hear(&two, &api), left);
    for mote in [&three, &one] {
        assert_eq!(poll(mote, &api), left);
        assert_eq!(poll(mote, &api), NOTHING);
    }
    assert_eq!(poll(&mote(2), &api), NOTHING, "another port");
}

/// 64 motes are remembered, the longest silent one is forgotten.
#[test]
fn many_motes() {
    let api = BotApi::start();
    api.person_writes(ADA, "Ada", "hi");
    let gateway = start_with(&api, Setup::ipv4(&api));
    let mote = |number: usize| Mote::at(&format!("127.0.1.{number}"), gateway.address());
    for number in 1..=64 {
        assert_eq!(poll(&mote(number), &api), ADA_TOKEN, "{number}");
    }
    assert_eq!(poll(&mote(1), &api), NOTHING); // not silent any more
    assert_eq!(poll(&mote(65), &api), ADA_TOKEN);
    assert_eq!(poll(&mote(1), &api), NOTHING);
    assert_eq!(poll(&mote(64), &api), NOTHING);
    assert_eq!(poll(&mote(2), &api), ADA_TOKEN, "forgotten for number 65");
}

/// Row 25d: a mote that has lost its RAM gives itself away by message IDs that do not go on, whatever it asks for. The
/// table of steps is in the unit tests.
#[test]
fn restarted_mote() {
    let api = BotApi::start();
    api.person_writes(ADA, "Ada", "hi");
    let gateway = start_with(&api, Setup::ipv4(&api));
    let mote = Mote::at("127.0.0.2", gateway.address());
    let other = Mote::at("127.0.0.3", gateway.address());
    assert_eq!(poll(&other, &api), ADA_TOKEN);
    let ask = |id: u16, expected: &str| {
        let request = Message {
            id,
            ..mote.post("update", update(&api))
        };
        assert_eq!(mote.separate(&request).text(), expected, "{id}");
    };
    ask(100, ADA_TOKEN);
    ask(101, NOTHING);
    ask(25_000, ADA_TOKEN);
    ask(25_001, NOTHING);
    let text = Message {
        id: 50_000,
        ..mote.post("message", message(&api, "5", "restarted"))
    };
    mote.separate(&text).expect("2.05", SENT);
    ask(50_001, ADA_TOKEN);
    assert_eq!(poll(&other, &api), NOTHING, "the other mote was not");
}

// --- long replies ---

/// Ten users with the longest names, both settings: always all of it; of the removals the latest that still fit.
#[test]
fn long_replies() {
    let api = BotApi::start();
    for number in 0..30 {
        api.person_writes(20_000_000_000 + number, "Stranger", "remove me");
    }
    let mut all = "i120;f1".to_string();
    for number in 0..10 {
        let (id, name) = (10_000_000_000 + number, format!("Bartholomew-0{number}"));
        api.person_writes(id, &name, "hi");
        all += &format!(";{name}:{id}");
    }
    api.person_writes(10_000_000_000, "Bartholomew-00", &config("interval 120"));
    api.person_writes(10_000_000_000, "Bartholomew-00", &config("feedback 1"));
    let gateway = start_with(&api, Setup::new(&api));
    let mote = Mote::new(gateway.address());
    let reply = poll(&mote, &api);
    assert_eq!(reply, format!("r20000000029;{all}"));
    assert!(reply.len() <= REPLY_MAX);
    // The other removals hold all the same.
    mote.post_separate("message", message(&api, "20000000000,20000000029", "x"))
        .expect("2.05", SENT);
    assert!(api.seen().sent.iter().all(|sent| sent.text != "x"));
}

// --- Telegram's side ---

/// Ten at a time, until a page is empty: only that one is proof of the last one.
#[test]
fn how_updates_are_fetched() {
    let api = BotApi::start();
    for number in 0..25 {
        let (id, name) = (1_000_000_000 + number % 10, format!("User{}", number % 10));
        api.person_writes(id, &name, "hi");
    }
    let gateway = start_with(&api, Setup::new(&api));
    let told = poll(&Mote::new(gateway.address()), &api);
    let user = |number| format!("User{number}:{}", 1_000_000_000 + number);
    assert_eq!(told, (0..10).map(user).collect::<Vec<_>>().join(";"));
    assert_eq!(api.waiting_updates(), 0, "all confirmed");
    let calls = api.seen().calls("getUpdates");
    let offset = |call: &Call| call.body["offset"].as_i64().unwrap_or(0);
    let offsets: Vec<i64> = calls.iter().map(offset).collect();
    let first = 700_000_001;
    assert!(offsets[0] <= 1, "{offsets:?}");
    assert_eq!(offsets[1..], [first + 10, first + 20, first + 25]);
    for call in &calls {
        assert_eq!(call.body["limit"], json!(10));
        assert_eq!(call.body["allowed_updates"], json!(["message"]));
    }
}

/// Before anybody is answered, and before Telegram forgets it, the change is in the state file.
#[test]
fn progress_is_saved_first() {
    let api = BotApi::start();
    api.fail(every("sendMessage"), Fault::Hang);
    api.person_writes(ADA, "Ada", &config("interval 5"));
    let mut gateway = Gateway::stopped(Setup::new(&api));
    gateway.launch();
    let mut state = String::new();
    api.wait_for("an answer to Ada", |seen| {
        state = gateway.state();
        seen.count("sendMessage") > 0
    });
    gateway.kill9();
    assert!(state.contains("1234567890") && state.contains("Ada"));
    api.heal();
    gateway.restart();
    let mote = Mote::new(gateway.address());
    assert_eq!(poll(&mote, &api), "i5;Ada:1234567890");
    let last = api.seen().calls("getUpdates").pop().unwrap();
    assert_eq!(last.body["offset"], json!(700_000_002));
}

/// Updates that mean nothing to the gateway do not stop those behind them.
#[test]
fn odd_updates() {
    let api = BotApi::start();
    let chat = json!({"id": ADA, "type": "private", "first_name": "Ada"});
    for odd in [
        json!({}),
        json!({"message": null}),
        json!({"message": "hi"}),
        json!({"message": {"text": "hi"}}),
        json!({"message": {"chat": {"id": "1", "type": "private"}, "text": "hi"}}),
        json!({"edited_message": {"chat": chat, "date": 1, "text": "config"}}),
        json!({"callback_query": {"id": "1"}}),
    ] {
        api.push_update(odd);
    }
    api.person_writes(BOB, "Bob", "hi");
    let gateway = start_with(&api, Setup::new(&api));
    let told = poll(&Mote::new(gateway.address()), &api);
    assert_eq!(told, "Bob:2345678901");
    assert_eq!(api.waiting_updates(), 0, "confirmed");
}

/// Each bot has its own count: with another token in config.ini, the old offset would confirm what nobody has heard.
#[test]
fn another_bot() {
    let api = BotApi::start();
    api.person_writes(ADA, "Ada", "hi");
    let mut gateway = Gateway::stopped(Setup::new(&api));
    let state =
        json!({"bot": "987654321", "offset": 700_000_005, "users": [{"name": "Bob", "chat": BOB}]});
    fs::write(gateway.directory().join("state.json"), state.to_string()).unwrap();
    gateway.restart();
    let told = hear(&Mote::new(gateway.address()), &api);
    assert_eq!(told, format!("Bob:2345678901;{ADA_TOKEN}"));
}

/// After a quiet week Telegram counts on from any number, also from a lower one.
#[test]
fn renumbered_updates() {
    let api = BotApi::start();
    api.person_writes(ADA, "Ada", "hi");
    let gateway = start_with(&api, Setup::new(&api));
    let mote = Mote::new(gateway.address());
    assert_eq!(poll(&mote, &api), ADA_TOKEN);
    api.set_next_update_id(1000);
    api.person_writes(BOB, "Bob", &config("interval 5"));
    assert_eq!(hear(&mote, &api), format!("i5;{BOTH}"));
    api.person_writes(BOB, "Bob", &config("interval 6"));
    assert_eq!(hear(&mote, &api), format!("i6;{BOTH}"));
    assert_eq!(poll(&mote, &api), NOTHING);
    let calls = api.count("getUpdates");
    assert!(calls < 8, "{calls} calls");
}

/// Row 25a: motes that ask at once are all answered at once, and each update is handled once.
#[test]
fn twelve_motes_at_once() {
    let api = BotApi::start();
    let gateway = start_with(&api, Setup::ipv4(&api));
    let motes: Vec<Mote> = (0..12)
        .map(|number| Mote::at(&format!("127.0.0.{}", number + 2), gateway.address()))
        .collect();
    api.person_writes(ADA, "Ada", &config("interval 77"));
    thread::sleep(EMPTY_PAGE_HOLDS);
    for expected in ["i77;Ada:1234567890", NOTHING, NOTHING] {
        let requests: Vec<Message> = motes
            .iter()
            .map(|mote| mote.post("update", update(&api)))
            .collect();
        let start = Instant::now();
        for (mote, request) in motes.iter().zip(&requests) {
            mote.send(request);
        }
        for (mote, request) in motes.iter().zip(&requests) {
            assert_eq!(mote.receive(), Message::new(Kind::Ack, 0, request.id));
            let response = mote.response(request);
            mote.acknowledge(&response);
            assert_eq!(response.text(), expected);
        }
        let taken = start.elapsed();
        assert!(taken < Duration::from_millis(2500), "{taken:?}");
    }
    let calls = api.count("getUpdates");
    assert!(calls <= 6, "{calls} calls for 36 polls");
    let texts = api.texts_to(ADA);
    let confirmations = texts.iter().filter(|text| text.contains("77"));
    assert_eq!(confirmations.count(), 1, "{texts:?}");
    assert_eq!(api.seen().deleted.len(), 1);
}

/// How Telegram fails, and what the log says of it.
const FAILURES: &str = r#"
error 401 Unauthorized              | Unauthorized
error 404 Not Found                 | Not Found
conflict                            | only one bot instance
webhook                             | webhook
error 500 restart                   | restart
page 200                            | HTTP 200
answer 200 {"ok":true,"result":{}}  | getUpdates
endless                             | larger than request limit
hang                                | time
refuse                              | efused
"#;

/// The mote learns it by the code alone, and nothing is lost.
#[test]
fn telegram_fails() {
    each_row(FAILURES, |[trouble, word]| {
        let (api, gateway) = start();
        let mote = Mote::new(gateway.address());
        thread::sleep(EMPTY_PAGE_HOLDS);
        api.fail_with(trouble);
        api.person_writes(ADA, "Ada", &config("interval 5"));
        let start = Instant::now();
        mote.post_separate("update", update(&api))
            .expect("5.00", "");
        let taken = start.elapsed();
        assert!(taken < IN_TIME, "{taken:?}");
        let log = gateway.log();
        let told = |line: &str| {
            (line.contains("[WARN]") || line.contains("[ERROR]")) && line.contains(word)
        };
        assert!(log.lines().any(told), "{word:?} in {log}");
        api.heal();
        api.set_webhook(false);
        api.accept_again();
        assert_eq!(poll(&mote, &api), "i5;Ada:1234567890");
    });
}

/// Row 25: each request is answered within 9 s of its ACK. The others wait in the socket, and their repeats do nothing.
#[test]
fn a_hanging_telegram() {
    let (api, gateway) = start();
    thread::sleep(EMPTY_PAGE_HOLDS);
    api.fail(every(""), Fault::Hang);
    let (first, second) = (Mote::new(gateway.address()), Mote::new(gateway.address()));
    let poll = first.post("update", update(&api));
    first.begin(&poll);
    let asked = Instant::now();
    let text = second.post("message", message(&api, "5", "x"));
    second.send(&text);
    second.send(&text);
    let response = first.response(&poll);
    first.acknowledge(&response);
    response.expect("5.00", "");
    let taken = asked.elapsed();
    assert!(taken < IN_TIME, "the first took {taken:?}");
    assert_eq!(second.receive(), Message::new(Kind::Ack, 0, text.id));
    let acknowledged = Instant::now();
    let response = second.response(&text);
    second.acknowledge(&response);
    response.expect("5.00", "");
    let taken = acknowledged.elapsed();
    assert!(
        taken < Duration::from_secs(6),
        "told soon, for the last fetch timed out: {taken:?}"
    );
    assert_eq!(second.receive(), Message::new(Kind::Ack, 0, text.id));
    assert_eq!(api.count("sendMessage"), 1, "it may have arrived");
}

// --- between requests ---

/// People are answered within 20 s though no mote asks: with the configured token, else with the last one that Telegram
/// accepted.
#[test]
fn people_are_heard_though_no_mote_asks() {
    in_parallel(&[("configured", true), ("accepted", false)], |configured| {
        let api = BotApi::start();
        let mut setup = Setup::new(&api);
        if !configured {
            setup = setup.config(&format!("[telegram]\nurl = {}\n", api.url()));
        }
        let gateway = Gateway::with(setup);
        let mote = Mote::new(gateway.address());
        if *configured {
            api.wait_for("a fetch right after the start", |seen| {
                seen.count("getUpdates") > 0
            });
        } else {
            assert_eq!(poll(&mote, &api), NOTHING);
        }
        assert!(mote.ping(PATIENCE), "it has fetched");
        api.person_writes(ADA, "Ada", "hi");
        let heard = api.wait_until(Duration::from_secs(20), |seen| {
            !seen.texts_to(ADA).is_empty()
        });
        assert!(heard, "nobody answers");
        assert_eq!(poll(&mote, &api), ADA_TOKEN);
    });
}

/// Answers to people can fail in every way: what they wanted is done, and the mote is answered before.
#[test]
fn answers_that_fail() {
    let blocked = "Forbidden: bot was blocked by the user";
    let cases = [
        ("blocked", (Fault::error(403, blocked), blocked)),
        ("hang", (Fault::Hang, "time")),
        ("500", (Fault::error(500, "restart"), "restart")),
        ("closed", (Fault::CloseUnanswered, "closed")),
        ("late", (Fault::Late(Duration::from_secs(4)), "registered")),
    ];
    in_parallel(&cases, |(fault, word)| {
        let (api, gateway) = start();
        let mote = Mote::new(gateway.address());
        thread::sleep(EMPTY_PAGE_HOLDS);
        api.fail(every("sendMessage"), fault.clone());
        api.person_writes(ADA, "Ada", "hi");
        api.person_writes(BOB, "Bob", &config("interval 5"));
        let start = Instant::now();
        assert_eq!(poll(&mote, &api), format!("i5;{BOTH}"));
        let taken = start.elapsed();
        assert!(taken < Duration::from_secs(3), "{taken:?}");
        api.wait_for("the attempt", |seen| seen.count("sendMessage") >= 1);
        assert!(mote.ping(PATIENCE), "within the time of a request");
        let log = gateway.log();
        assert!(log.contains(word), "{word:?} in {log}");
    });
}

#[test]
#[ignore = "takes a minute"]
fn the_end_of_a_hang_is_noticed_within_a_minute() {
    let (api, gateway) = start();
    thread::sleep(EMPTY_PAGE_HOLDS);
    api.fail(every(""), Fault::Hang);
    let mote = Mote::new(gateway.address());
    mote.post_separate("update", update(&api))
        .expect("5.00", "");
    api.heal();
    api.person_writes(ADA, "Ada", "hi");
    let heard = api.wait_until(Duration::from_secs(68), |seen| {
        !seen.texts_to(ADA).is_empty()
    });
    assert!(heard, "{}", gateway.log());
}

// --- the state file ---

fn files(gateway: &Gateway) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(gateway.directory())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn the_state_file() {
    let api = BotApi::start();
    api.person_writes(ADA, "Ada", &config("interval 5"));
    api.person_writes(BOB, "Bob", "remove me");
    let mut gateway = start_with(&api, Setup::new(&api));
    let mote = Mote::new(gateway.address());
    let all = "r2345678901;i5;Ada:1234567890";
    assert_eq!(poll(&mote, &api), all);
    let path = gateway.directory().join("state.json");
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    // In words that an operator can read.
    let state = gateway.state();
    for word in [
        "interval",
        "5",
        "Ada",
        "1234567890",
        "removed",
        "2345678901",
        "offset",
    ] {
        assert!(state.contains(word), "{word} in {state}");
    }
    gateway.restart();
    assert_eq!(poll(&mote, &api), all);
    // Lost altogether: everything that Telegram still has is new, and nothing ends.
    gateway.kill9();
    fs::remove_file(&path).unwrap();
    gateway.restart();
    assert_eq!(poll(&mote, &api), NOTHING);
    let expected = [".env", "coap_server.log", "config.ini", "state.json"];
    assert_eq!(files(&gateway), expected, "nothing else is left");
}

/// A damaged state is set aside, with an error in the log, and the gateway serves, also the next time.
#[test]
fn damaged_state_files() {
    let good = {
        let api = BotApi::start();
        api.person_writes(ADA, "Ada", &config("interval 5"));
        let gateway = start_with(&api, Setup::new(&api));
        gateway.state()
    };
    let cases: [(&str, &[u8]); 7] = [
        ("empty", b""),
        ("half", &good.as_bytes()[..good.len() / 2]),
        ("garbage", b"\xff\xfe\0\x01garbage"),
        ("array", b"[]"),
        ("null", b"null"),
        ("text", b"\"state\""),
        ("zeros", &[0; 4096]),
    ];
    in_parallel(&cases, |damaged| {
        let api = BotApi::start();
        api.person_writes(BOB, "Bob", "hi");
        let mut gateway = Gateway::stopped(Setup::new(&api));
        fs::write(gateway.directory().join("state.json"), damaged).unwrap();
        gateway.restart();
        let mote = Mote::new(gateway.address());
        assert_eq!(poll(&mote, &api), "Bob:2345678901");
        let log = gateway.log();
        let told = |line: &str| line.contains("[ERROR]") && line.contains("state.json");
        assert!(log.lines().any(told), "{log}");
        let mut aside = files(&gateway);
        aside.retain(|name| name.starts_with("state.json."));
        assert_eq!(aside.len(), 1, "{aside:?}");
        let kept = fs::read(gateway.directory().join(&aside[0])).unwrap();
        assert_eq!(kept, *damaged, "set aside");
        gateway.restart();
        assert_eq!(poll(&mote, &api), "Bob:2345678901");
    });
}

/// Values of the wrong kind in an otherwise good state: set aside or made good, but served, also the next time.
#[test]
fn tampered_state_files() {
    let good: Value = {
        let api = BotApi::start();
        api.person_writes(ADA, "Ada", &config("interval 5"));
        let gateway = start_with(&api, Setup::new(&api));
        serde_json::from_str(&gateway.state()).unwrap()
    };
    let keys: Vec<&String> = good.as_object().expect("a JSON object").keys().collect();
    for value in [
        json!(null),
        json!(-1),
        json!(1e300),
        json!("x"),
        json!([null]),
    ] {
        let mut cases = Vec::new();
        for key in &keys {
            let mut tampered = good.clone();
            tampered[key.as_str()] = value.clone();
            cases.push((key.as_str(), tampered));
        }
        in_parallel(&cases, |state| {
            let api = BotApi::start();
            let mut gateway = Gateway::stopped(Setup::new(&api));
            fs::write(gateway.directory().join("state.json"), state.to_string()).unwrap();
            gateway.restart();
            gateway.restart();
            Mote::new(gateway.address())
                .post_separate("message", message(&api, "5", "x"))
                .expect("2.05", SENT);
        });
    }
}
