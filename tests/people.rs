//! What people write to the bot, what they are answered, and what the mote hears of it.

mod support;

use std::collections::HashSet;
use std::thread;
use std::time::Duration;

use serde_json::json;
use support::*;

const SENT: &str = "Messages sent successfully";
const NOTHING: &str = "No Updates";
const ADA: i64 = 1_234_567_890;
const BOB: i64 = 2_345_678_901;

/// Waits for the answer to what a chat wrote: the texts after the first `known` ones.
#[track_caller]
fn answers(api: &BotApi, chat: i64, known: usize) -> Vec<String> {
    api.wait_for(&format!("an answer to {chat}"), |seen| {
        seen.texts_to(chat).len() > known
    });
    api.texts_to(chat).split_off(known)
}

/// Ada writes, the mote polls; the tokens that it gets and the last text that Ada gets.
#[track_caller]
fn ada_writes(api: &BotApi, mote: &Mote, text: &str) -> (String, String) {
    let known = api.texts_to(ADA).len();
    api.person_writes(ADA, "Ada", text);
    let tokens = poll(mote, api);
    (tokens, answers(api, ADA, known).pop().unwrap())
}

/// A stand-in, a gateway and a mote, with Ada registered and the mote told so.
fn with_ada() -> (BotApi, Gateway, Mote) {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    assert_eq!(ada_writes(&api, &mote, "hi").0, "Ada:1234567890");
    (api, gateway, mote)
}

// --- registration ---

#[test]
fn a_new_user_is_greeted() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    api.person_writes(ADA, "Ada", "hello?");
    api.push_message(
        BOB,
        "Bob",
        json!({"photo": [{"file_id": "x"}], "caption": "look"}),
    );
    assert_eq!(poll(&mote, &api), "Ada:1234567890;Bob:2345678901");
    for chat in [ADA, BOB] {
        let greeting = answers(&api, chat, 0).remove(0);
        for part in ["config", "interval", "feedback", "remove me"] {
            assert!(greeting.contains(part), "{part:?} in {greeting:?}");
        }
    }
    assert!(
        gateway.log().contains("Ada") && gateway.log().contains("1234567890"),
        "{}",
        gateway.log()
    );
}

#[test]
fn help() {
    let (api, _gateway, mote) = with_ada();
    for text in ["/start", "help", "/help", "HELP", "/Start", "  help \n"] {
        let (tokens, answer) = ada_writes(&api, &mote, text);
        assert_eq!(tokens, NOTHING, "{text:?}");
        assert!(
            answer.contains("remove me") && answer.contains("interval"),
            "{text:?}: {answer:?}"
        );
    }
}

#[test]
fn ten_users() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    for number in 0..12 {
        api.person_writes(1_000_000_000 + number, &format!("User{number}"), "hi");
    }
    let expected: Vec<String> = (0..10)
        .map(|n| format!("User{n}:{}", 1_000_000_000 + n))
        .collect();
    assert_eq!(poll(&mote, &api), expected.join(";"));
    for late in [1_000_000_010, 1_000_000_011] {
        let answer = answers(&api, late, 0).remove(0);
        assert!(answer.contains("full"), "{answer:?}");
    }
    // One leaves: there is room for one.
    api.person_writes(1_000_000_003, "User3", "remove me");
    api.person_writes(1_000_000_010, "User10", "and now?");
    api.person_writes(1_000_000_011, "User11", "and now?");
    assert_eq!(poll(&mote, &api), "r1000000003;User10:1000000010");
    // Who is not on the list can still ask what there is, and is not registered by it.
    api.person_writes(1_000_000_011, "User11", "/help");
    assert_eq!(poll(&mote, &api), NOTHING);
}

/// Only private chats, with ids that the firmware has room for.
#[test]
fn who_cannot_register() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    let group = |kind: &str, id: i64| json!({"chat": {"id": id, "type": kind, "title": "Group"}, "text": "hi"});
    api.push_message(ADA, "Ada", group("group", -4_444_444));
    api.push_message(ADA, "Ada", group("supergroup", -1_001_234_567_890));
    api.push_message(ADA, "Ada", group("channel", -1_001_234_567_891));
    api.person_writes(123_456_789_012, "Long", "hi");
    api.person_writes(12_345_678_901, "Eleven", "hi");
    assert_eq!(poll(&mote, &api), "Eleven:12345678901");
}

// --- names on the wire ---

/// What the firmware can take for a user (contract §5, names).
fn assert_wire_name(name: &str) {
    assert!(!name.is_empty() && name.len() <= 14, "length of {name:?}");
    assert!(
        !name.contains(|c: char| c.is_control() || ";:,&=".contains(c)),
        "characters of {name:?}"
    );
    assert!(name != "all", "all chats");
    let bytes = name.as_bytes();
    let digit = bytes.get(1).is_some_and(u8::is_ascii_digit);
    let setting = matches!(bytes[0], b'i' | b'r') && digit
        || name.starts_with("f0")
        || name.starts_with("f1");
    assert!(!setting, "{name:?} reads as a setting");
}

#[test]
fn names() {
    let tables: [(&str, &[&str]); 3] = [
        (
            "settings",
            &[
                "f0", "f1", "f1x", "i5", "i5;r1", "r2d2", "r2d2", "all", "all", "f2",
            ],
        ),
        (
            "characters",
            &[
                "",
                " ",
                ";;;",
                "A;B:C,D&E=F",
                "x\u{7}y\nz\u{85}",
                "🙂🙂🙂🙂🙂",
                "🏳️‍🌈🏳️‍🌈",
                "Ada",
                "Ada",
                "Ada",
            ],
        ),
        (
            "length",
            &[
                "Bartholomew Aa",
                "Bartholomew Aab",
                "Bartholomew Aac",
                "Bartholomew A",
                "Maximilian der Große",
                "ÄÖÜÄÖÜÄÖÜ",
                ";;;;;;;;;;;;;;;;all",
                ":r2",
                "\u{202e}abc",
                "Анастасия",
            ],
        ),
    ];
    in_parallel(&tables, |names| {
        let (api, gateway) = start();
        let mote = Mote::new(gateway.address());
        for (number, name) in names.iter().enumerate() {
            api.person_writes(1_000_000_000 + number as i64, name, "hi");
        }
        let mut seen = HashSet::new();
        let mut replies = Vec::new();
        while replies.last().is_none_or(|reply| reply != NOTHING) {
            replies.push(poll(&mote, &api));
        }
        replies.pop();
        let tokens: Vec<&str> = replies.iter().flat_map(|reply| reply.split(';')).collect();
        assert_eq!(tokens.len(), names.len(), "{tokens:?}");
        for (number, token) in tokens.iter().enumerate() {
            let (name, id) = token
                .split_once(':')
                .unwrap_or_else(|| panic!("no user: {token:?}"));
            assert_wire_name(name);
            assert!(
                seen.insert(name.to_string()),
                "{name:?} twice in {tokens:?}"
            );
            assert_eq!(id, (1_000_000_000 + number).to_string());
        }
    });
}

#[test]
fn good_names_stay_as_they_are() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    for (number, name) in [
        "Ada",
        "Jean-Luc",
        "Zoë",
        "r",
        "i",
        "f",
        "Rita",
        "f2a",
        "Anna Maria",
        "12345678901234",
    ]
    .iter()
    .enumerate()
    {
        let id = 1_000_000_000 + number as i64;
        api.person_writes(id, name, "hi");
        assert_eq!(poll(&mote, &api), format!("{name}:{id}"));
    }
}

/// A user who is registered already and takes the name of another one.
#[test]
fn a_name_that_is_taken() {
    let (api, _gateway, mote) = with_ada();
    api.person_writes(BOB, "Bob", "hi");
    assert_eq!(poll(&mote, &api), "Bob:2345678901");
    api.person_writes(BOB, "Ada", "I am called Ada now");
    let tokens = poll(&mote, &api);
    let (name, id) = tokens.split_once(':').expect("a new name");
    assert!(
        name != "Ada" && name != "Bob" && id == "2345678901",
        "{tokens}"
    );
    assert_wire_name(name);
    api.person_writes(BOB, "Ada", "still");
    api.person_writes(ADA, "Ada", "still");
    assert_eq!(poll(&mote, &api), NOTHING, "names are stable");
}

// --- leaving ---

#[test]
fn remove_me() {
    let (api, gateway, mote) = with_ada();
    let send = |text: &str| {
        mote.post_separate("message", message(&api, "1234567890", text))
            .expect("2.05", SENT)
    };
    for text in ["remove me", "Remove Me", "  REMOVE ME \n"] {
        send("still here");
        let (tokens, answer) = ada_writes(&api, &mote, text);
        assert_eq!(tokens, "r1234567890", "{text:?}");
        assert!(answer.to_lowercase().contains("remove"), "{answer:?}");
        let known = api.seen().sent.len();
        send("not any more");
        assert_eq!(api.seen().sent.len(), known, "holds at once");
        assert_eq!(
            ada_writes(&api, &mote, "hello again").0,
            "Ada:1234567890",
            "until they write again"
        );
    }
    // Also for a chat that only the firmware knows.
    api.person_writes(5_555_555_555, "Eve", "remove me");
    assert_eq!(poll(&mote, &api), "r5555555555");
    answers(&api, 5_555_555_555, 0);
    let known = api.seen().sent.len();
    mote.post_separate("message", message(&api, "5555555555", "x"))
        .expect("2.05", SENT);
    assert_eq!(api.seen().sent.len(), known);
    drop(gateway);
}

/// The ten latest removals are kept for motes that come later.
#[test]
fn many_removals() {
    let api = BotApi::start();
    let gateway = Gateway::with(Setup::ipv4(&api));
    for number in 0..13 {
        api.person_writes(1_000_000_000 + number, "Stranger", "remove me");
    }
    let tokens = poll(&Mote::at("127.0.0.2", gateway.address()), &api);
    let expected: Vec<String> = (3..13).map(|n| format!("r{}", 1_000_000_000 + n)).collect();
    assert_eq!(tokens, expected.join(";"));
}

// --- settings ---

#[test]
fn settings() {
    let (api, gateway, mote) = with_ada();
    for (setting, token) in [
        ("interval 5", "i5"),
        ("interval 1", "i1"),
        ("interval 120", "i120"),
        ("feedback 1", "f1"),
        ("feedback 0", "f0"),
        ("INTERVAL 6", "i6"),
        ("Feedback 1", "f1"),
        ("interval 7 \n", "i7"),
    ] {
        let (tokens, answer) = ada_writes(&api, &mote, &format!("config {PASSWORD} {setting}"));
        assert_eq!(tokens, token, "{setting:?}");
        assert!(
            answer.contains(&token[1..]),
            "{setting:?} is confirmed: {answer:?}"
        );
        assert!(!answer.contains(PASSWORD));
    }
    let (tokens, _) = ada_writes(&api, &mote, &format!(" CONFIG {PASSWORD} interval 8"));
    assert_eq!(tokens, "i8");
    let applied = gateway.log();
    assert!(
        applied.contains("120"),
        "every applied change is logged: {applied}"
    );
}

/// Nothing changes, and Ada is told what is allowed.
#[test]
fn wrong_settings() {
    let (api, _gateway, mote) = with_ada();
    let rest = [
        "interval 0",
        "interval 121",
        "interval -1",
        "interval +5",
        "interval 5.0",
        "interval 99999999999999999999",
        "interval five",
        "interval",
        "interval 5 6",
        "feedback 2",
        "feedback on",
        "feedback",
        "volume 11",
        "",
    ];
    for rest in rest {
        let (tokens, answer) = ada_writes(&api, &mote, &format!("config {PASSWORD} {rest}"));
        assert_eq!(tokens, NOTHING, "{rest:?}");
        assert!(
            answer.contains("interval") || answer.contains("120") || answer.contains("feedback"),
            "{rest:?}: {answer:?}"
        );
        assert!(!answer.contains(PASSWORD));
    }
    let (tokens, answer) = ada_writes(&api, &mote, "config");
    assert_eq!(tokens, NOTHING);
    assert!(answer.contains("config"), "{answer:?}");
    // A word that only begins like it is no command.
    api.person_writes(ADA, "Ada", "configuration is fun");
    assert_eq!(poll(&mote, &api), NOTHING);
}

/// The password counts with its case; after five wrong ones in a row a chat is not heard for an hour.
#[test]
fn wrong_passwords() {
    let (api, gateway, mote) = with_ada();
    let wrong = PASSWORD.to_uppercase();
    for _ in 0..2 {
        for _ in 0..4 {
            let (tokens, answer) = ada_writes(&api, &mote, &format!("config {wrong} interval 5"));
            assert_eq!(tokens, NOTHING);
            assert!(answer.to_lowercase().contains("password"), "{answer:?}");
            assert!(!answer.contains(&wrong));
        }
        ada_writes(&api, &mote, &format!("config {PASSWORD} feedback 1"));
    }
    for nearly in [
        "x",
        &PASSWORD[1..],
        &format!("{PASSWORD}x"),
        &PASSWORD[..PASSWORD.len() - 1],
        &wrong,
    ] {
        let (tokens, _) = ada_writes(&api, &mote, &format!("config {nearly} interval 5"));
        assert_eq!(tokens, NOTHING, "{nearly:?}");
    }
    let known = api.texts_to(ADA).len();
    api.person_writes(ADA, "Ada", &format!("config {PASSWORD} interval 5"));
    assert_eq!(poll(&mote, &api), NOTHING, "not heard");
    // Others are, and she is with what needs no password.
    api.person_writes(BOB, "Bob", &format!("config {PASSWORD} interval 6"));
    assert_eq!(poll(&mote, &api), "Bob:2345678901;i6");
    thread::sleep(QUIET);
    assert_eq!(api.texts_to(ADA).len(), known, "ignored");
    assert!(ada_writes(&api, &mote, "help").1.contains("remove me"));
    assert!(!gateway.log().contains(&wrong), "{}", gateway.log());
}

#[test]
fn without_a_password() {
    let api = BotApi::start();
    let mut setup = Setup::new(&api);
    setup.dotenv = None;
    let gateway = Gateway::with(setup);
    let mote = Mote::new(gateway.address());
    ada_writes(&api, &mote, "hi");
    for text in [
        format!("config {PASSWORD} interval 5"),
        "config  interval 5".into(),
        "config interval 5".into(),
    ] {
        let (tokens, _) = ada_writes(&api, &mote, &text);
        assert_eq!(tokens, NOTHING, "{text:?}");
    }
}

/// A message that holds the password does not stay in the chat; best effort.
#[test]
fn passwords_are_deleted() {
    let (api, _gateway, mote) = with_ada();
    let mut expected = Vec::new();
    for rest in ["interval 5", "interval 500", "nonsense"] {
        let id = api.person_writes(ADA, "Ada", &format!("config {PASSWORD} {rest}"));
        expected.push((ADA.to_string(), id));
        poll(&mote, &api);
    }
    api.wait_for("three deletions", |seen| seen.deleted.len() == 3);
    assert_eq!(api.seen().deleted, expected);
    api.person_writes(ADA, "Ada", "just talking");
    api.person_writes(ADA, "Ada", "help");
    poll(&mote, &api);
    api.fail(
        every("deleteMessage"),
        Fault::error(400, "Bad Request: message can't be deleted for everyone"),
    );
    assert_eq!(
        ada_writes(&api, &mote, &format!("config {PASSWORD} interval 9")).0,
        "i9"
    );
    thread::sleep(QUIET);
    assert_eq!(api.seen().deleted, expected);
}

/// The answers to people can fail in every way: what they wanted is done, and the mote is answered.
#[test]
fn answers_that_fail() {
    type Break = fn(&BotApi);
    let cases: [(&str, Break); 4] = [
        ("blocked", |api| api.block_chat(ADA)),
        ("hang", |api| api.fail(every("sendMessage"), Fault::Hang)),
        ("500", |api| {
            api.fail(
                every("sendMessage"),
                Fault::error(500, "Internal Server Error"),
            )
        }),
        ("closed", |api| {
            api.fail(every("sendMessage"), Fault::CloseUnanswered)
        }),
    ];
    in_parallel(&cases, |break_it| {
        let (api, gateway) = start();
        let mote = Mote::new(gateway.address());
        break_it(&api);
        api.person_writes(ADA, "Ada", "hi");
        api.person_writes(BOB, "Bob", &format!("config {PASSWORD} interval 5"));
        assert_eq!(poll(&mote, &api), "Ada:1234567890;Bob:2345678901;i5");
        api.wait_for("the attempt", |seen| seen.count("sendMessage") >= 1);
        assert!(mote.ping(Duration::from_millis(100)));
    });
}

// --- the very first start ---

/// Commands from before the very first start are not carried out; their senders are registered. Later ones are.
#[test]
fn old_commands() {
    let api = BotApi::start();
    api.set_date(1_700_000_000);
    api.person_writes(ADA, "Ada", &format!("config {PASSWORD} interval 5"));
    api.person_writes(BOB, "Bob", "remove me");
    let mut gateway = Gateway::start(&api);
    let mote = Mote::new(gateway.address());
    assert_eq!(poll(&mote, &api), "Ada:1234567890;Bob:2345678901");
    // Written while the gateway was off, with a state: carried out.
    gateway.settle();
    gateway.kill9();
    api.person_writes(BOB, "Bob", &format!("config {PASSWORD} interval 6"));
    api.person_writes(ADA, "Ada", "remove me");
    gateway.restart();
    assert_eq!(poll(&mote, &api), "i6;r1234567890");
}

// --- the log ---

/// Whatever people and motes write: each line of the log is one of the gateway's own records.
#[test]
fn nobody_forges_the_log() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    let forged = "x\n2026-01-31 12:00:00 [INFO] forged\r\nforged\u{1b}[31mforged\u{2028}forged\0";
    api.person_writes(ADA, forged, forged);
    api.person_writes(BOB, forged, &format!("config {forged} {forged}"));
    poll(&mote, &api);
    api.unknown_chat(7);
    api.fail(every("sendMessage").to(8), Fault::error(400, forged));
    mote.post_separate("message", message(&api, "5,7,8", forged))
        .expect("2.05", SENT);
    mote.post_piggybacked("message", message(&api, forged, "x"))
        .expect_code("4.00");
    mote.post_piggybacked(
        "message",
        format!("url={forged}&token={forged}&chat_ids=5&text=x"),
    );
    let path = mote.request(Kind::Con, POST, "").option(URI_PATH, forged);
    mote.piggybacked(&path).expect_code("4.04");
    for line in gateway.log().lines() {
        let bytes = line.as_bytes();
        let shape: String = line
            .chars()
            .take(21)
            .map(|c| if c.is_ascii_digit() { '0' } else { c })
            .collect();
        assert_eq!(shape, "0000-00-00 00:00:00 [", "{line:?}");
        assert!(!line[20..].starts_with("[INFO] forged"), "{line:?}");
        assert!(!bytes.iter().any(u8::is_ascii_control), "{line:?}");
        assert!(!line.contains('\u{2028}'), "{line:?}");
    }
}
