//! POST /update: what the mote is told, until it has acknowledged it, whatever happens on the way.

mod support;

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};
use std::{fs, thread};

use serde_json::{Value, json};
use support::*;

const SENT: &str = "Messages sent successfully";
const NOTHING: &str = "No Updates";
const ADA: i64 = 1_234_567_890;
const BOB: i64 = 2_345_678_901;

fn config(setting: &str) -> String {
    format!("config {PASSWORD} {setting}")
}

// --- the reply ---

#[test]
fn the_example_of_the_contract() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    assert_eq!(poll(&mote, &api), NOTHING);
    api.person_writes(BOB, "Bob", &config("interval 5"));
    api.person_writes(ADA, "Ada", "hello");
    api.person_writes(BOB, "Bob", "remove me");
    assert_eq!(poll(&mote, &api), "i5;Ada:1234567890;r2345678901");
    assert_eq!(poll(&mote, &api), NOTHING);
}

/// Each key once, with its latest change, in the order of the changes; chat_ids and text in a poll are ignored.
#[test]
fn the_latest_change_of_each_key() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    api.person_writes(ADA, "Ada", &config("interval 5"));
    api.person_writes(ADA, "Ada", &config("feedback 1"));
    api.person_writes(BOB, "Bob", "hi");
    api.person_writes(ADA, "Ada", &config("interval 7"));
    api.person_writes(ADA, "Ada", &config("feedback 0"));
    let request = mote.post("update", message(&api, "5", "ignored"));
    mote.separate(&request)
        .expect("2.05", "Ada:1234567890;Bob:2345678901;i7;f0");
    // Removed and back again.
    api.person_writes(BOB, "Bob", "remove me");
    api.person_writes(BOB, "Bob", "I am back");
    assert_eq!(poll(&mote, &api), "Bob:2345678901");
    api.person_writes(BOB, "Robert", "renamed");
    assert_eq!(poll(&mote, &api), "Robert:2345678901");
}

#[test]
fn missing_fields() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    let url = api.url();
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
    assert_eq!(api.seen().connections, 0);
}

/// A NON poll gets a NON reply; nothing acknowledges it, so it stays on offer.
#[test]
fn non_confirmable_poll() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    api.person_writes(ADA, "Ada", "hi");
    for _ in 0..2 {
        mote.send(
            &mote
                .request(Kind::Non, POST, "update")
                .payload(update(&api)),
        );
        let response = mote.receive();
        assert_eq!(response.kind, Kind::Non);
        response.expect("2.05", "Ada:1234567890");
    }
    assert_eq!(poll(&mote, &api), "Ada:1234567890");
    assert_eq!(poll(&mote, &api), NOTHING);
}

// --- offered until acknowledged ---

#[test]
fn offered_until_acknowledged() {
    let api = BotApi::start();
    let mut gateway = Gateway::start(&api);
    let mote = Mote::new(gateway.address());
    api.person_writes(ADA, "Ada", &config("interval 5"));
    let offer = "Ada:1234567890;i5";
    let ask = || {
        let request = mote.post("update", update(&api));
        mote.begin(&request);
        let response = mote.response(&request);
        response.expect("2.05", offer);
        response
    };
    ask(); // the ACK is lost
    let late = ask();
    mote.reset(&late); // the mote does not know the token any more
    ask();
    gateway.kill9();
    gateway.restart();
    mote.acknowledge(&late); // of another life of the gateway
    let response = ask();
    let elsewhere = Mote::new(gateway.address());
    elsewhere.acknowledge(&response); // not the endpoint that it went to
    let response = ask();
    mote.acknowledge(&response);
    assert_eq!(poll(&mote, &api), NOTHING);
    gateway.kill9();
    gateway.restart();
    assert_eq!(poll(&mote, &api), NOTHING, "what was acknowledged stays so");
}

/// What changes after the reply was sent is not acknowledged with it.
#[test]
fn an_ack_covers_what_was_in_the_reply() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    api.person_writes(ADA, "Ada", "hi");
    let first = mote.post("update", update(&api));
    mote.begin(&first);
    let response = mote.response(&first);
    response.expect("2.05", "Ada:1234567890");
    api.person_writes(BOB, "Bob", &config("interval 9"));
    let second = mote.post("update", update(&api));
    mote.begin(&second);
    let later = mote.response(&second);
    later.expect("2.05", "Ada:1234567890;Bob:2345678901;i9");
    mote.acknowledge(&response);
    assert_eq!(poll(&mote, &api), "Bob:2345678901;i9");
    mote.acknowledge(&later);
    assert_eq!(poll(&mote, &api), NOTHING);
}

/// What a mote has in its RAM after the replies that it got, as the firmware reads them.
#[derive(Default, Debug, PartialEq)]
struct Memory {
    interval: Option<String>,
    feedback: Option<String>,
    users: BTreeMap<i64, String>,
}

impl Memory {
    fn read(&mut self, reply: &str) {
        for token in reply.split(';').filter(|token| *token != NOTHING) {
            match (token.split_once(':'), token.as_bytes()) {
                (Some((name, id)), _) => {
                    self.users.insert(id.parse().unwrap(), name.to_string());
                }
                (None, [b'i', ..]) => self.interval = Some(token[1..].to_string()),
                (None, [b'f', ..]) => self.feedback = Some(token[1..].to_string()),
                (None, [b'r', ..]) => {
                    self.users.remove(&token[1..].parse().unwrap());
                }
                _ => panic!("not a token: {token:?} in {reply:?}"),
            }
        }
    }
}

/// kill -9 at any moment of a poll: no change is lost, the state file is never half written.
#[test]
fn killed_at_any_moment() {
    let worlds: Vec<(String, u64)> = (0..4).map(|seed| (format!("seed {seed}"), seed)).collect();
    let worlds: Vec<(&str, u64)> = worlds
        .iter()
        .map(|(name, seed)| (name.as_str(), *seed))
        .collect();
    in_parallel(&worlds, |seed| {
        let api = BotApi::start();
        let mut gateway = Gateway::start(&api);
        let mote = Mote::new(gateway.address());
        let (mut memory, mut numbers) = (Memory::default(), Numbers(*seed));
        for round in 1..=12 {
            let id = 1_000_000_000 + round % 8;
            match round % 3 {
                0 => api.person_writes(id, &format!("User{id}"), "remove me"),
                1 => api.person_writes(id, &format!("User{id}"), "hello"),
                _ => api.person_writes(
                    id,
                    &format!("User{id}"),
                    &config(&format!("interval {round}")),
                ),
            };
            let kill_after = Duration::from_micros(numbers.next() % 60_000);
            let request = mote.post("update", update(&api));
            let start = Instant::now();
            mote.send(&request);
            while let Some(left) = kill_after.checked_sub(start.elapsed()) {
                match mote.try_receive(left.max(Duration::from_millis(1))) {
                    Some(response)
                        if response.kind == Kind::Con && response.token == request.token =>
                    {
                        memory.read(&response.text());
                        mote.acknowledge(&response);
                    }
                    _ => {}
                }
            }
            gateway.kill9();
            while mote.try_receive(Duration::from_millis(1)).is_some() {}
            if !gateway.state().is_empty() {
                let state: Result<Value, _> = serde_json::from_str(&gateway.state());
                assert!(state.is_ok(), "half written: {}", gateway.state());
            }
            gateway.restart();
        }
        loop {
            match poll(&mote, &api) {
                reply if reply == NOTHING => break,
                reply => memory.read(&reply),
            }
        }
        // Rounds 1 4 7 10 write hello, 2 5 8 11 set the interval (ids 2 5 0 3), 3 6 9 12 leave (ids 3 6 1 4).
        let users = [0, 2, 3, 5, 7].map(|n| 1_000_000_000 + n);
        let users = users
            .map(|id| (id, format!("User{id}")))
            .into_iter()
            .collect();
        assert_eq!(
            memory,
            Memory {
                interval: Some("11".into()),
                feedback: None,
                users
            }
        );
    });
}

// --- several motes ---

#[test]
fn several_motes() {
    let api = BotApi::start();
    let mut gateway = Gateway::with(Setup::ipv4(&api));
    let mote = |number: u8| Mote::at(&format!("127.0.0.{number}"), gateway.address());
    let (one, two, three) = (mote(2), mote(3), mote(4));
    api.person_writes(ADA, "Ada", &config("feedback 1"));
    assert_eq!(poll(&one, &api), "Ada:1234567890;f1");
    api.person_writes(BOB, "Bob", "hi");
    assert_eq!(poll(&one, &api), "Bob:2345678901");
    assert_eq!(poll(&two, &api), "Ada:1234567890;f1;Bob:2345678901");
    api.person_writes(BOB, "Bob", "remove me");
    assert_eq!(poll(&two, &api), "r2345678901");
    gateway.restart();
    assert_eq!(
        poll(&three, &api),
        "Ada:1234567890;f1;r2345678901",
        "a new mote gets the whole state"
    );
    assert_eq!(poll(&one, &api), "r2345678901");
    // A mote is its IP address: after a restart it asks from another port.
    assert_eq!(
        poll(&Mote::at("127.0.0.2", gateway.address()), &api),
        NOTHING
    );
}

/// 64 motes are remembered; the longest silent one is told everything again.
#[test]
fn many_motes() {
    let api = BotApi::start();
    let gateway = Gateway::with(Setup::ipv4(&api));
    let mote = |number: usize| Mote::at(&format!("127.0.1.{number}"), gateway.address());
    api.person_writes(ADA, "Ada", "hi");
    for number in 1..=64 {
        assert_eq!(poll(&mote(number), &api), "Ada:1234567890");
    }
    assert_eq!(poll(&mote(1), &api), NOTHING); // not silent any more
    assert_eq!(poll(&mote(65), &api), "Ada:1234567890");
    assert_eq!(poll(&mote(1), &api), NOTHING);
    assert_eq!(poll(&mote(64), &api), NOTHING);
    assert_eq!(
        poll(&mote(2), &api),
        "Ada:1234567890",
        "forgotten for number 65"
    );
}

/// Firmware that lost its RAM gives itself away by the chats that it sends to.
#[test]
fn restarted_mote() {
    let api = BotApi::start();
    let gateway = Gateway::with(Setup::ipv4(&api));
    let (mote, other) = (
        Mote::at("127.0.0.2", gateway.address()),
        Mote::at("127.0.0.3", gateway.address()),
    );
    let send = |mote: &Mote, chats: &str| {
        mote.post_separate("message", message(&api, chats, "x"))
            .expect("2.05", SENT)
    };
    api.person_writes(BOB, "Bob", "hi");
    api.person_writes(ADA, "Ada", &config("interval 5"));
    api.person_writes(BOB, "Bob", "remove me");
    let all = "Ada:1234567890;i5;r2345678901";
    assert_eq!(poll(&mote, &api), all);
    assert_eq!(poll(&other, &api), all);
    // With all registered users, and others that are built in: nothing was lost.
    send(&mote, "1234567890,5");
    assert_eq!(poll(&mote, &api), NOTHING);
    // Without a registered one.
    send(&mote, "5");
    assert_eq!(poll(&mote, &api), all);
    assert_eq!(poll(&mote, &api), NOTHING);
    // With a removed one.
    send(&mote, "1234567890,2345678901");
    assert_eq!(poll(&mote, &api), all);
    assert_eq!(
        poll(&other, &api),
        NOTHING,
        "the other mote was not restarted"
    );
    assert!(api.texts_to(BOB).iter().all(|text| text != "x"));
    // A mote that was not told yet cannot have forgotten: it hears the rest only.
    api.person_writes(3_333_333_333, "Cyd", "hi");
    let request = mote.post("update", update(&api));
    mote.begin(&request);
    mote.response(&request).expect("2.05", "Cyd:3333333333"); // its ACK is lost
    send(&mote, "1234567890");
    assert_eq!(poll(&mote, &api), "Cyd:3333333333");
}

// --- long replies ---

/// Ten users with the longest names, ten removals, both settings: more than the firmware's 302 bytes.
#[test]
fn long_replies() {
    let (api, gateway) = start();
    let mut expected = Vec::new();
    for number in 0..10_i64 {
        api.person_writes(
            10_000_000_000 + number,
            &format!("Bartholomew-0{number}"),
            "hi",
        );
        expected.push(format!("Bartholomew-0{number}:{}", 10_000_000_000 + number));
        api.person_writes(20_000_000_000 + number, "Stranger", "remove me");
        expected.push(format!("r{}", 20_000_000_000 + number));
    }
    api.person_writes(10_000_000_000, "Bartholomew-00", &config("interval 120"));
    api.person_writes(10_000_000_000, "Bartholomew-00", &config("feedback 1"));
    expected.extend(["i120".to_string(), "f1".to_string()]);
    let mote = Mote::new(gateway.address());
    let collect = |limit: usize, ask: &dyn Fn() -> String| {
        let mut tokens: Vec<String> = Vec::new();
        let mut replies = 0;
        loop {
            let reply = ask();
            if reply == NOTHING {
                return (tokens, replies);
            }
            assert!(reply.len() <= limit, "{} bytes: {reply}", reply.len());
            tokens.extend(reply.split(';').map(str::to_string));
            replies += 1;
        }
    };
    // Not acknowledged: the same part again. By another socket, to which the retransmissions go.
    let deaf = Mote::new(gateway.address());
    let request = deaf.post("update", update(&api));
    deaf.begin(&request);
    let lost = deaf.response(&request);
    let (tokens, replies) = collect(302, &|| poll(&mote, &api));
    assert_eq!(
        (tokens, replies),
        (expected.clone(), 2),
        "as full as can be"
    );
    assert!(expected.join(";").starts_with(&lost.text()) && lost.payload.len() > 302 - 27);
    // A restarted mote with a small buffer names a block size.
    mote.post_separate("message", message(&api, "5", "x"))
        .expect("2.05", SENT);
    let small = || {
        let request = mote
            .post("update", update(&api))
            .option(BLOCK2, block(0, false, 64));
        mote.separate(&request).text()
    };
    let (tokens, _) = collect(64, &small);
    assert_eq!(tokens, expected);
}

// --- Telegram's side ---

#[test]
fn how_updates_are_fetched() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    for number in 0..250 {
        api.person_writes(
            1_000_000_000 + number % 10,
            &format!("User{}", number % 10),
            "hi",
        );
    }
    let start = Instant::now();
    let expected: Vec<String> = (0..10)
        .map(|n| format!("User{n}:{}", 1_000_000_000 + n))
        .collect();
    assert_eq!(poll(&mote, &api), expected.join(";"));
    assert!(start.elapsed() < Duration::from_secs(9));
    assert_eq!(poll(&mote, &api), NOTHING);
    assert_eq!(api.waiting_updates(), 0, "all confirmed");
    let calls = api.seen().calls("getUpdates");
    let first = 700_000_001;
    let offsets: Vec<i64> = calls
        .iter()
        .map(|call| call.body["offset"].as_i64().unwrap_or(0))
        .collect();
    assert!(offsets[0] <= 1, "{offsets:?}");
    assert_eq!(offsets[1..3], [first + 100, first + 200]);
    assert!(
        offsets[3..].iter().all(|offset| *offset == first + 250),
        "{offsets:?}"
    );
    for call in &calls {
        assert_eq!(call.body["limit"], json!(100));
        assert_eq!(call.body["allowed_updates"], json!(["message"]));
    }
}

/// Before anybody is answered the change and the progress are in the state file.
#[test]
fn progress_is_saved_first() {
    let api = BotApi::start();
    let mut gateway = Gateway::start(&api);
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
    assert!(
        state.contains("1234567890") && state.contains("Ada"),
        "{state}"
    );
    api.heal();
    gateway.restart();
    while mote.try_receive(QUIET).is_some() {}
    assert_eq!(poll(&mote, &api), "Ada:1234567890;i5");
    let confirmed = 700_000_002;
    assert_eq!(
        api.seen().calls("getUpdates").last().unwrap().body["offset"],
        json!(confirmed)
    );
}

/// Updates that mean nothing to the gateway, or that are not what the documentation says.
#[test]
fn odd_updates() {
    let (api, gateway) = start();
    let chat = json!({"id": ADA, "type": "private", "first_name": "Ada"});
    let from = json!({"id": ADA, "is_bot": false, "first_name": "Ada"});
    for odd in [
        json!({}),
        json!({"message": null}),
        json!({"message": []}),
        json!({"message": "hi"}),
        json!({"message": {}}),
        json!({"message": {"text": "hi"}}),
        json!({"message": {"chat": null, "text": "hi"}}),
        json!({"message": {"chat": {"id": "1", "type": "private"}, "from": from, "date": 1, "text": "hi"}}),
        json!({"message": {"chat": {"id": 1.5, "type": "private"}, "from": from, "date": 1, "text": "hi"}}),
        json!({"message": {"chat": {"id": 1e300, "type": "private"}, "from": from, "date": 1, "text": "hi"}}),
        json!({"message": {"chat": {"id": 7}, "from": from, "date": 1, "text": "hi"}}),
        json!({"edited_message": {"chat": chat, "from": from, "date": 1, "text": "config"}}),
        json!({"channel_post": {"chat": {"id": -100_123, "type": "channel"}, "text": "hi"}}),
        json!({"callback_query": {"id": "1"}}),
        json!({"my_chat_member": {"chat": chat}}),
        json!({"update_id": "700000050", "message": {"chat": chat}}),
        json!({"update_id": null}),
        json!({"update_id": 1e30}),
        json!("hi"),
    ] {
        if odd.is_object() {
            api.push_update(odd);
        }
    }
    api.push_message(
        BOB,
        "Bob",
        json!({"text": ["config"], "entities": {"a": [null]}}),
    );
    api.person_writes(3_333_333_333, "Cyd", "hi");
    let mote = Mote::new(gateway.address());
    let tokens = poll(&mote, &api);
    assert!(
        tokens.split(';').any(|token| token == "Cyd:3333333333"),
        "{tokens}"
    );
    assert!(!tokens.contains("Ada"), "{tokens}");
    api.person_writes(4_444_444_444, "Dee", "hi");
    assert_eq!(poll(&mote, &api), "Dee:4444444444");
}

/// After a quiet week Telegram counts on from any number, also from a lower one.
#[test]
fn renumbered_updates() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    api.person_writes(ADA, "Ada", "hi");
    assert_eq!(poll(&mote, &api), "Ada:1234567890");
    assert_eq!(poll(&mote, &api), NOTHING);
    api.set_next_update_id(1000);
    api.person_writes(BOB, "Bob", &config("interval 5"));
    assert_eq!(poll(&mote, &api), "Bob:2345678901;i5");
    api.person_writes(BOB, "Bob", &config("interval 6"));
    assert_eq!(poll(&mote, &api), "i6");
    assert_eq!(poll(&mote, &api), NOTHING);
    assert!(
        api.count("getUpdates") < 20,
        "{} calls",
        api.count("getUpdates")
    );
}

/// Two motes that poll at the same time: each update is handled once, both motes get it.
#[test]
fn two_polls_at_once() {
    let api = BotApi::start();
    let gateway = Gateway::with(Setup::ipv4(&api));
    api.fail(every("getUpdates"), Fault::Late(Duration::from_millis(300)));
    api.person_writes(ADA, "Ada", &config("interval 77"));
    let replies: Vec<String> = thread::scope(|scope| {
        let polls = ["127.0.0.2", "127.0.0.3", "127.0.0.4"].map(|ip| {
            let (api, address) = (&api, gateway.address());
            scope.spawn(move || poll(&Mote::at(ip, address), api))
        });
        polls.into_iter().map(|poll| poll.join().unwrap()).collect()
    });
    assert_eq!(replies, ["Ada:1234567890;i77"; 3]);
    api.wait_for("the end of it", |seen| !seen.deleted.is_empty());
    thread::sleep(QUIET);
    let texts = api.texts_to(ADA);
    let confirmations = texts.iter().filter(|text| text.contains("77"));
    assert_eq!(confirmations.count(), 1, "{texts:?}");
    assert_eq!(api.seen().deleted.len(), 1);
}

/// Telegram fails: the mote learns it by the code alone, and nothing is lost.
#[test]
fn telegram_fails() {
    type Break = fn(&BotApi);
    let cases: [(&str, Break); 7] = [
        ("401", |api| {
            api.fail(every(""), Fault::error(401, "Unauthorized"))
        }),
        ("409", |api| api.fail(every(""), Fault::conflict())),
        ("500", |api| {
            api.fail(every(""), Fault::error(500, "Internal Server Error"))
        }),
        ("no JSON", |api| {
            api.fail(every(""), Fault::Answer(200, "hello".into()))
        }),
        ("no array", |api| {
            api.fail(
                every(""),
                Fault::Answer(200, r#"{"ok":true,"result":{}}"#.into()),
            )
        }),
        ("hang", |api| api.fail(every(""), Fault::Hang)),
        ("refused", |api| api.refuse()),
    ];
    in_parallel(&cases, |break_it| {
        let (api, gateway) = start();
        let mote = Mote::new(gateway.address());
        break_it(&api);
        api.person_writes(ADA, "Ada", &config("interval 5"));
        let start = Instant::now();
        mote.post_separate("update", update(&api))
            .expect("5.00", "");
        assert!(
            start.elapsed() < Duration::from_millis(9200),
            "took {:?}",
            start.elapsed()
        );
        let told = |line: &str| line.contains("[WARN]") || line.contains("[ERROR]");
        assert!(gateway.log().lines().any(told), "{}", gateway.log());
        api.heal();
        api.accept_again();
        assert_eq!(poll(&mote, &api), "Ada:1234567890;i5");
    });
}

// --- the state file ---

#[test]
fn the_state_file() {
    let api = BotApi::start();
    let mut gateway = Gateway::start(&api);
    let mote = Mote::new(gateway.address());
    api.person_writes(ADA, "Ada", &config("interval 5"));
    assert_eq!(poll(&mote, &api), "Ada:1234567890;i5");
    let path = gateway.directory().join("state.json");
    assert_eq!(
        fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o600
    );
    assert!(
        serde_json::from_str::<Value>(&gateway.state()).is_ok(),
        "{}",
        gateway.state()
    );
    gateway.settle();
    gateway.restart();
    assert_eq!(poll(&mote, &api), NOTHING);
    // Lost altogether: everything that Telegram still has is new, and nothing ends.
    gateway.kill9();
    fs::remove_file(&path).unwrap();
    gateway.restart();
    assert_eq!(poll(&mote, &api), NOTHING);
    let mut files: Vec<String> = fs::read_dir(gateway.directory())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    files.sort();
    assert_eq!(
        files,
        [
            ".env",
            "coap_server.log",
            "config.ini",
            "state.journal",
            "state.json"
        ],
        "nothing else is left"
    );
}

/// A damaged state is set aside, with an error in the log, and the gateway serves.
#[test]
fn damaged_state_files() {
    let good = {
        let (api, gateway) = start();
        api.person_writes(ADA, "Ada", &config("interval 5"));
        poll(&Mote::new(gateway.address()), &api);
        gateway.state()
    };
    let half = &good[..good.len() / 2];
    let cases: [(&str, &[u8]); 7] = [
        ("empty", b""),
        ("half", half.as_bytes()),
        ("garbage", b"\xff\xfe\0\x01garbage"),
        ("array", b"[]"),
        ("null", b"null"),
        ("text", b"\"state\""),
        ("zeros", &[0; 4096]),
    ];
    in_parallel(&cases, |damaged| {
        let api = BotApi::start();
        let mut gateway = Gateway::prepared(Setup::new(&api), |directory| {
            fs::write(directory.join("state.json"), damaged).unwrap();
        });
        let mote = Mote::new(gateway.address());
        api.person_writes(BOB, "Bob", "hi");
        assert_eq!(poll(&mote, &api), "Bob:2345678901");
        let log = gateway.log();
        assert!(
            log.lines()
                .any(|line| line.contains("[ERROR]") && line.contains("state.json")),
            "{log}"
        );
        let aside = fs::read_dir(gateway.directory())
            .unwrap()
            .map(|entry| entry.unwrap().path());
        let aside = aside.filter(|path| {
            path.file_name()
                .unwrap()
                .to_str()
                .unwrap()
                .starts_with("state.json.")
        });
        assert_eq!(
            aside
                .map(|path| fs::read(path).unwrap())
                .collect::<Vec<_>>(),
            [damaged.to_vec()],
            "set aside"
        );
        gateway.settle();
        gateway.restart();
        assert_eq!(poll(&mote, &api), NOTHING);
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
    let keys: Vec<String> = good
        .as_object()
        .expect("the state is a JSON object")
        .keys()
        .cloned()
        .collect();
    let mut cases = Vec::new();
    for key in &keys {
        for value in [
            json!(null),
            json!(-1),
            json!(1e300),
            json!("x"),
            json!([null]),
            json!({"x": [1]}),
        ] {
            let mut tampered = good.clone();
            tampered[key] = value;
            cases.push(tampered);
        }
    }
    let api = BotApi::start();
    for tampered in cases.chunks(8) {
        let table: Vec<(&str, &Value)> = tampered.iter().map(|value| ("tampered", value)).collect();
        in_parallel(&table, |state| {
            let mut gateway = Gateway::prepared(Setup::new(&api), |directory| {
                fs::write(directory.join("state.json"), state.to_string()).unwrap();
            });
            let mote = Mote::new(gateway.address());
            mote.post_separate("update", update(&api));
            gateway.restart();
            mote.post_separate("update", update(&api));
        });
    }
}

/// Without a configured token, two bots ask at once before one is pinned: the second one's updates are not confirmed
/// with the first one's offset.
#[test]
fn two_bots_at_once() {
    let api = BotApi::start();
    let gateway =
        Gateway::with(Setup::new(&api).config(&format!("[telegram]\nurl = {}\n", api.url())));
    api.person_writes(ADA, "Ada", "hi");
    api.set_round_trip(Duration::from_millis(200));
    let (one, two) = (Mote::new(gateway.address()), Mote::new(gateway.address()));
    let first = one.post("update", update(&api));
    let second = two.post("update", update(&api).replace(TOKEN, "987654321:other"));
    one.begin(&first);
    two.begin(&second);
    one.response(&first).expect("2.05", "Ada:1234567890");
    two.response(&second).expect("5.00", "");
    let calls = api.seen().calls("getUpdates");
    assert!(calls.iter().all(|call| call.token == TOKEN), "{calls:?}");
}
