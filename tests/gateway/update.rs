//! POST /update: what the mote is told, until it has acknowledged it, whatever happens on the way.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};
use std::{fs, thread};

use crate::support::*;
use serde_json::{Value, json};

const SENT: &str = "Messages sent successfully";
const NOTHING: &str = "No Updates";
const ADA: i64 = 1_234_567_890;
const BOB: i64 = 2_345_678_901;
const ADA_TOKEN: &str = "Ada:1234567890";
const BOTH: &str = "Ada:1234567890;Bob:2345678901";

/// Ends the gateway at once and starts it again. The update is for Telegram, which holds a fetch like the one before it.
fn restart(api: &BotApi, gateway: &mut Gateway) {
    api.push_update(json!({}));
    gateway.restart();
}

fn config(setting: &str) -> String {
    format!("config {PASSWORD} {setting}")
}

// --- the reply ---

#[test]
fn the_example_of_the_contract() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    api.person_writes(BOB, "Bob", &config("interval 5"));
    api.person_writes(ADA, "Ada", "hello");
    api.person_writes(BOB, "Bob", "remove me");
    assert_eq!(poll(&mote, &api), "r2345678901;i5;Ada:1234567890");
    assert_eq!(poll(&mote, &api), NOTHING);
}

/// What Ada or Bob writes, and the whole state that the mote is told then; nothing if it knows that already.
#[test]
fn everything_or_nothing() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    let ada = |text: &str| api.person_writes(ADA, "Ada", text);
    let mut told = Vec::new();
    let mut expect = |tokens: &str| {
        let request = mote.post("update", message(&api, "5", "ignored"));
        told.push(mote.separate(&request).text());
        assert_eq!(told.last().unwrap(), tokens, "after {told:#?}");
    };
    expect(NOTHING);
    thread::sleep(Duration::from_secs(3)); // the empty page counts for 3 s
    ada("hi");
    expect(ADA_TOKEN);
    ada(&config("interval 5"));
    ada(&config("feedback 1"));
    api.person_writes(BOB, "Bob", "hi");
    expect(&format!("i5;f1;{BOTH}"));
    ada(&config("feedback 0"));
    ada(&config("interval 7"));
    expect(&format!("i7;f0;{BOTH}"));
    ada(&config("interval 7"));
    expect(NOTHING);
    api.push_update(json!({}));
    api.person_writes(BOB, "Bob", "remove me");
    expect(&format!("r2345678901;i7;f0;{ADA_TOKEN}"));
    api.person_writes(BOB, "Bob", "I am back");
    expect(&format!("i7;f0;{BOTH}"));
    api.person_writes(BOB, "Robert", "renamed");
    expect(&format!("i7;f0;{ADA_TOKEN};Robert:2345678901"));
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
    let mut gateway = start_with(&api, Setup::new(&api));
    let mote = Mote::new(gateway.address());
    api.person_writes(ADA, "Ada", &config("interval 5"));
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
    restart(&api, &mut gateway);
    mote.acknowledge(&stale);
    mote.acknowledge(&ask());
    assert_eq!(poll(&mote, &api), NOTHING);
    // Nothing about motes is kept on disk.
    restart(&api, &mut gateway);
    assert_eq!(poll(&mote, &api), state);
    assert_eq!(poll(&mote, &api), NOTHING);
}

/// What changes after the reply was sent is not acknowledged with it.
#[test]
fn an_ack_covers_what_was_in_the_reply() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    let ask = |expected: &str| {
        let request = mote.post("update", update(&api));
        mote.begin(&request);
        let response = mote.response(&request);
        response.expect("2.05", expected);
        response
    };
    api.person_writes(ADA, "Ada", "hi");
    let first = ask(ADA_TOKEN);
    api.person_writes(BOB, "Bob", "hi");
    let second = ask(BOTH);
    mote.acknowledge(&first);
    assert_eq!(fresh_poll(&mote, &api), BOTH);
    mote.acknowledge(&second);
    assert_eq!(fresh_poll(&mote, &api), NOTHING);
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
        firmware.take(&fresh_poll(&mote, &api));
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
    let gateway = start_with(&api, Setup::ipv4(&api));
    let mote = |number: u8| Mote::at(&format!("127.0.0.{number}"), gateway.address());
    let (one, two, three) = (mote(2), mote(3), mote(4));
    api.person_writes(ADA, "Ada", "hi");
    assert_eq!(poll(&one, &api), ADA_TOKEN);
    api.person_writes(BOB, "Bob", "hi");
    assert_eq!(fresh_poll(&one, &api), BOTH);
    assert_eq!(fresh_poll(&two, &api), BOTH);
    api.person_writes(BOB, "Bob", "remove me");
    let left = "r2345678901;Ada:1234567890";
    for mote in [&two, &three, &one] {
        assert_eq!(poll(mote, &api), left);
        assert_eq!(poll(mote, &api), NOTHING);
    }
    assert_eq!(poll(&mote(2), &api), NOTHING, "another port");
}

/// 64 motes are remembered, the longest silent one is forgotten.
#[test]
fn many_motes() {
    let api = BotApi::start();
    let gateway = start_with(&api, Setup::ipv4(&api));
    let mote = |number: usize| Mote::at(&format!("127.0.1.{number}"), gateway.address());
    api.person_writes(ADA, "Ada", "hi");
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
    let gateway = start_with(&api, Setup::ipv4(&api));
    let mote = Mote::at("127.0.0.2", gateway.address());
    let other = Mote::at("127.0.0.3", gateway.address());
    api.person_writes(ADA, "Ada", "hi");
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
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    for number in 0..30_i64 {
        api.person_writes(20_000_000_000 + number, "Stranger", "remove me");
    }
    let removals = |tokens: &str| -> BTreeSet<i64> {
        let ids = tokens
            .split(';')
            .filter_map(|token| token.strip_prefix('r'));
        ids.map(|id| id.parse::<i64>().unwrap() - 20_000_000_000)
            .collect()
    };
    let reply = poll(&mote, &api);
    assert_eq!((reply.len(), removals(&reply)), (298, (7..30).collect()));
    let mut all = "i120;f1".to_string();
    for number in 0..10_i64 {
        let (id, name) = (10_000_000_000 + number, format!("Bartholomew-0{number}"));
        api.person_writes(id, &name, "hi");
        all += &format!(";{name}:{id}");
    }
    api.person_writes(10_000_000_000, "Bartholomew-00", &config("interval 120"));
    api.person_writes(10_000_000_000, "Bartholomew-00", &config("feedback 1"));
    assert_eq!(poll(&mote, &api), format!("r20000000029;{all}"));
    // The other removals hold all the same.
    mote.post_separate("message", message(&api, "20000000000,20000000029", "x"))
        .expect("2.05", SENT);
    assert!(api.seen().sent.iter().all(|sent| sent.text != "x"));
}

// --- Telegram's side ---

#[test]
fn how_updates_are_fetched() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    let long = "x".repeat(4000); // a page of 400 KiB
    for number in 0..250 {
        let (id, name) = (1_000_000_000 + number % 10, format!("User{}", number % 10));
        api.person_writes(id, &name, &long);
    }
    let expected: Vec<String> = (0..10)
        .map(|n| format!("User{n}:{}", 1_000_000_000 + n))
        .collect();
    assert_eq!(poll(&mote, &api), expected.join(";"));
    assert_eq!(poll(&mote, &api), NOTHING);
    assert_eq!(api.waiting_updates(), 0, "all confirmed");
    let calls = api.seen().calls("getUpdates");
    let offset = |call: &Call| call.body["offset"].as_i64().unwrap_or(0);
    let offsets: Vec<i64> = calls.iter().map(offset).collect();
    assert!(offsets[0] <= 1, "{offsets:?}");
    let first = 700_000_002; // behind the update that means nothing
    assert_eq!(offsets[1..], [first, first + 100, first + 200, first + 250]);
    for call in &calls {
        assert_eq!(call.body["limit"], json!(100));
        assert_eq!(call.body["allowed_updates"], json!(["message"]));
    }
}

/// Before anybody is answered, and before Telegram forgets it, the change is in the state file.
#[test]
fn progress_is_saved_first() {
    let api = BotApi::start();
    let mut gateway = start_with(&api, Setup::new(&api));
    api.fail(every("sendMessage"), Fault::Hang);
    api.person_writes(ADA, "Ada", &config("interval 5"));
    let mote = Mote::new(gateway.address());
    mote.begin(&mote.post("update", update(&api)));
    let mut state = String::new();
    api.wait_for("an answer to Ada", |seen| {
        state = gateway.state();
        seen.count("sendMessage") > 0
    });
    gateway.kill9();
    assert!(state.contains("1234567890") && state.contains("Ada"));
    api.heal();
    gateway.restart();
    while mote.try_receive(QUIET).is_some() {}
    assert_eq!(poll(&mote, &api), "i5;Ada:1234567890");
    let last = api.seen().calls("getUpdates").pop().unwrap();
    assert_eq!(last.body["offset"], json!(700_000_003));
}

/// Updates that mean nothing to the gateway, or that are not what the documentation says.
#[test]
fn odd_updates() {
    let (api, gateway) = start();
    let chat = json!({"id": ADA, "type": "private", "first_name": "Ada"});
    let from = json!({"id": ADA, "is_bot": false, "first_name": "Ada"});
    let whole =
        |chat: Value| json!({"message": {"chat": chat, "from": from, "date": 1, "text": "hi"}});
    for odd in [
        json!({}),
        json!({"message": null}),
        json!({"message": []}),
        json!({"message": "hi"}),
        json!({"message": {}}),
        json!({"message": {"text": "hi"}}),
        whole(json!(null)),
        whole(json!({"id": "1", "type": "private"})),
        whole(json!({"id": 1.5, "type": "private"})),
        whole(json!({"id": 1e300, "type": "private"})),
        whole(json!({"id": 7})),
        json!({"edited_message": {"chat": chat, "from": from, "date": 1, "text": "config"}}),
        json!({"channel_post": {"chat": {"id": -100_123, "type": "channel"}, "text": "hi"}}),
        json!({"callback_query": {"id": "1"}}),
        json!({"update_id": "700000050", "message": {"chat": chat}}),
        json!({"update_id": null}),
        json!({"update_id": 1e30}),
    ] {
        api.push_update(odd);
    }
    let strange = json!({"text": ["config"], "entities": {"a": [null]}});
    api.push_message(BOB, "Bob", strange);
    api.person_writes(3_333_333_333, "Cyd", "hi");
    let mote = Mote::new(gateway.address());
    let tokens = poll(&mote, &api);
    assert!(tokens.contains("Cyd:3333333333"), "{tokens}");
    assert!(!tokens.contains("Ada"), "{tokens}");
    api.person_writes(4_444_444_444, "Dee", "hi");
    let tokens = poll(&mote, &api);
    assert!(tokens.contains("Dee:4444444444"), "{tokens}");
}

/// After a quiet week Telegram counts on from any number, also from a lower one.
#[test]
fn renumbered_updates() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    api.person_writes(ADA, "Ada", "hi");
    assert_eq!(poll(&mote, &api), ADA_TOKEN);
    api.set_next_update_id(1000);
    api.person_writes(BOB, "Bob", &config("interval 5"));
    assert_eq!(poll(&mote, &api), format!("i5;{BOTH}"));
    api.person_writes(BOB, "Bob", &config("interval 6"));
    assert_eq!(poll(&mote, &api), format!("i6;{BOTH}"));
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
hang                                | time
refuse                              | efused
"#;

/// The mote learns it by the code alone, and nothing is lost.
#[test]
fn telegram_fails() {
    each_row(FAILURES, |[trouble, word]| {
        let (api, gateway) = start();
        let mote = Mote::new(gateway.address());
        api.fail_with(trouble);
        api.person_writes(ADA, "Ada", &config("interval 5"));
        let start = Instant::now();
        mote.post_separate("update", update(&api))
            .expect("5.00", "");
        let taken = start.elapsed();
        assert!(taken < Duration::from_millis(9200), "{taken:?}");
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
    assert!(
        taken < Duration::from_millis(9100),
        "the first took {taken:?}"
    );
    assert_eq!(second.receive(), Message::new(Kind::Ack, 0, text.id));
    let acknowledged = Instant::now();
    let response = second.response(&text);
    second.acknowledge(&response);
    response.expect("5.00", "");
    let taken = acknowledged.elapsed();
    assert!(
        taken < Duration::from_millis(2500),
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
        ("hang", (Fault::Hang, "dropped")), // for which there is no time left
        ("500", (Fault::error(500, "restart"), "restart")),
        ("closed", (Fault::CloseUnanswered, "closed")),
        ("late", (Fault::Late(Duration::from_secs(1)), "registered")),
    ];
    in_parallel(&cases, |(fault, word)| {
        let (api, gateway) = start();
        let mote = Mote::new(gateway.address());
        api.fail(every("sendMessage"), fault.clone());
        api.person_writes(ADA, "Ada", "hi");
        api.person_writes(BOB, "Bob", &config("interval 5"));
        let start = Instant::now();
        assert_eq!(poll(&mote, &api), format!("i5;{BOTH}"));
        let taken = start.elapsed();
        assert!(taken < Duration::from_millis(500), "{taken:?}");
        api.wait_for("the attempt", |seen| seen.count("sendMessage") >= 1);
        assert!(mote.ping(PATIENCE), "within the time of a request");
        let log = gateway.log();
        assert!(log.contains(word), "{word:?} in {log}");
    });
}

#[test]
#[ignore = "takes a minute: cargo test update:: -- --ignored"]
fn the_end_of_a_hang_is_noticed_within_a_minute() {
    let (api, gateway) = start();
    api.fail(every(""), Fault::Hang);
    let mote = Mote::new(gateway.address());
    mote.post_separate("update", update(&api))
        .expect("5.00", "");
    api.heal();
    api.person_writes(ADA, "Ada", "hi");
    let heard = api.wait_until(Duration::from_secs(62), |seen| {
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
    let mut gateway = start_with(&api, Setup::new(&api));
    let mote = Mote::new(gateway.address());
    api.person_writes(ADA, "Ada", &config("interval 5"));
    api.person_writes(BOB, "Bob", "remove me");
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
    restart(&api, &mut gateway);
    assert_eq!(poll(&mote, &api), all);
    // Lost altogether: everything that Telegram still has is new, and nothing ends.
    gateway.kill9();
    fs::remove_file(&path).unwrap();
    restart(&api, &mut gateway);
    assert_eq!(poll(&mote, &api), NOTHING);
    let expected = [".env", "coap_server.log", "config.ini", "state.json"];
    assert_eq!(files(&gateway), expected, "nothing else is left");
}

/// Version 1.0's.
const FORMER: &str = r#"{"bot":123456789,"changes":[[1,"interval"],[2,{"user":1234567890}]],"feedback":null,
"interval":5,"motes":[],"offset":700000002,"removed":[],"sequence":2,"started":1700000000,"users":[[1234567890,"Ada"]]}"#;

/// A damaged state is set aside, with an error in the log, and the gateway serves, also the next time.
#[test]
fn damaged_state_files() {
    let good = {
        let (api, gateway) = start();
        api.person_writes(ADA, "Ada", &config("interval 5"));
        poll(&Mote::new(gateway.address()), &api);
        gateway.state()
    };
    let cases: [(&str, &[u8]); 8] = [
        ("empty", b""),
        ("half", &good.as_bytes()[..good.len() / 2]),
        ("garbage", b"\xff\xfe\0\x01garbage"),
        ("array", b"[]"),
        ("null", b"null"),
        ("text", b"\"state\""),
        ("zeros", &[0; 4096]),
        ("of version 1.0", FORMER.as_bytes()),
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
        restart(&api, &mut gateway);
        assert_eq!(poll(&mote, &api), "Bob:2345678901");
    });
}

/// Values of the wrong kind in an otherwise good state: set aside or made good, but served, also the next time.
#[test]
fn tampered_state_files() {
    let good: Value = {
        let (api, gateway) = start();
        api.person_writes(ADA, "Ada", &config("interval 5"));
        poll(&Mote::new(gateway.address()), &api);
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
            restart(&api, &mut gateway);
            Mote::new(gateway.address())
                .post_separate("message", message(&api, "5", "x"))
                .expect("2.05", SENT);
        });
    }
}
