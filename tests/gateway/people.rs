//! What people write to the bot, what they are answered, and what the mote hears of it.

use std::thread;
use std::time::Duration;

use crate::support::*;
use serde_json::json;

const NOTHING: &str = "No Updates";
const ADA: i64 = 1_234_567_890;
const BOB: i64 = 2_345_678_901;
const ADA_TOKEN: &str = "Ada:1234567890";

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
    let tokens = fresh_poll(mote, api);
    (tokens, answers(api, ADA, known).pop().unwrap())
}

/// A stand-in, a gateway and a mote, with Ada registered and the mote told so.
fn with_ada() -> (BotApi, Gateway, Mote) {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    assert_eq!(ada_writes(&api, &mote, "hi").0, ADA_TOKEN);
    (api, gateway, mote)
}

// --- registration ---

#[test]
fn a_new_user_is_greeted() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    let sticker = json!({"sticker": {"file_id": "x"}});
    api.person_writes(ADA, "Ada", "hello?");
    api.push_message(BOB, "Bob", sticker.clone());
    assert_eq!(poll(&mote, &api), format!("{ADA_TOKEN};Bob:2345678901"));
    for (chat, name) in [(ADA, "Ada"), (BOB, "Bob")] {
        let greeting = answers(&api, chat, 0).remove(0);
        for part in ["config", "interval", "feedback", "remove me"] {
            assert!(greeting.contains(part), "{part:?} in {greeting:?}");
        }
        let log = gateway.log();
        let told = |line: &str| line.contains(name) && line.contains(&chat.to_string());
        assert!(log.lines().any(told), "{log}");
    }
    // What holds no text is not answered otherwise.
    let known = api.count("sendMessage");
    api.push_message(BOB, "Bob", sticker);
    assert_eq!(ada_writes(&api, &mote, "help").0, NOTHING);
    assert_eq!(api.count("sendMessage"), known + 1);
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
    let writes = |number: i64, text: &str| {
        api.person_writes(1_000_000_000 + number, &format!("User{number}"), text)
    };
    let user = |number: i64| format!("User{number}:{}", 1_000_000_000 + number);
    for number in 0..12 {
        writes(number, "hi");
    }
    let mut users: Vec<String> = (0..10).map(user).collect();
    assert_eq!(poll(&mote, &api), users.join(";"));
    for late in [1_000_000_010, 1_000_000_011] {
        let answer = answers(&api, late, 0).remove(0);
        assert!(answer.contains("full"), "{answer:?}");
    }
    // One leaves: there is room for one.
    writes(3, "remove me");
    writes(10, "and now?");
    writes(11, "and now?");
    users.remove(3);
    users.push(user(10));
    let state = format!("r1000000003;{}", users.join(";"));
    assert_eq!(poll(&mote, &api), state);
    // Who is not on the list can still ask what there is, and is not registered by it.
    writes(11, "/help");
    assert_eq!(fresh_poll(&mote, &api), NOTHING);
}

/// Only private chats, with ids that the firmware has room for. The others are logged: so one finds a group's id.
#[test]
fn who_cannot_register() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    let groups = [
        (-4_444_444_i64, "group"),
        (-1_001_234_567_890, "supergroup"),
        (-1_001_234_567_891, "channel"),
    ];
    for (id, kind) in groups {
        let chat = json!({"id": id, "type": kind, "title": "Group"});
        api.push_message(ADA, "Ada", json!({"chat": chat, "text": "hi"}));
    }
    api.person_writes(123_456_789_012, "Long", "hi");
    api.person_writes(12_345_678_901, "Eleven", "hi");
    assert_eq!(poll(&mote, &api), "Eleven:12345678901");
    let log = gateway.log();
    for (id, kind) in groups.into_iter().chain([(123_456_789_012, "private")]) {
        let told = |line: &str| line.contains(&id.to_string()) && line.contains(kind);
        assert!(log.lines().any(told), "{kind} {id} in {log}");
    }
}

// --- names on the wire ---

/// Ten names, of which only the first can stay as it is; see the table in the unit tests. A mote ends with ten users.
#[test]
fn names() {
    let (api, gateway) = start();
    let names = "Ada|Ada|f0|i5;r1|r2d2|all|1000000001||\u{1f3f3}\u{fe0f}\u{200d}\u{1f308}|Maximilian der Große";
    for (chat, name) in (1_000_000_000..).zip(names.split('|')) {
        api.person_writes(chat, name, "hi");
    }
    let reply = fresh_poll(&Mote::new(gateway.address()), &api);
    let mut firmware = Firmware::default();
    firmware.take(&reply);
    assert!(reply.starts_with("Ada:1000000000;"), "{reply}");
    assert_eq!(firmware.users().len(), 10, "{reply}");
    assert_eq!(firmware.knows(), firmware.users().join(";"), "no settings");
    let ids = (1_000_000_000..1_000_000_010).map(|id| id.to_string());
    assert_eq!(firmware.chat_ids(), ids.collect::<Vec<_>>().join(","));
}

/// A user who is registered already and takes the name of another one.
#[test]
fn a_name_that_is_taken() {
    let (api, _gateway, mote) = with_ada();
    api.person_writes(BOB, "Bob", "hi");
    assert_eq!(
        fresh_poll(&mote, &api),
        format!("{ADA_TOKEN};Bob:2345678901")
    );
    api.person_writes(BOB, "Ada", "I am called Ada now");
    let tokens = fresh_poll(&mote, &api);
    let (ada, bob) = tokens.split_once(';').unwrap();
    let (name, id) = bob.split_once(':').unwrap();
    assert_eq!((ada, id), (ADA_TOKEN, "2345678901"));
    assert!(name != "Ada" && name != "Bob", "{name}");
    api.person_writes(BOB, "Ada", "still");
    api.person_writes(ADA, "Ada", "still");
    assert_eq!(fresh_poll(&mote, &api), NOTHING, "names are stable");
}

// --- leaving ---

#[test]
fn remove_me() {
    let (api, _gateway, mote) = with_ada();
    let send = |chat: i64, text: &str| {
        mote.post_separate("message", message(&api, &chat.to_string(), text))
            .expect_code("2.05");
        api.texts_to(chat).iter().any(|sent| sent == text)
    };
    for (number, text) in ["remove me", "Remove Me", "  REMOVE ME \n"]
        .iter()
        .enumerate()
    {
        assert!(send(ADA, &format!("still here {number}")));
        let (tokens, answer) = ada_writes(&api, &mote, text);
        assert_eq!(tokens, "r1234567890", "{text:?}");
        assert!(answer.to_lowercase().contains("remove"), "{answer:?}");
        assert!(!send(ADA, "not any more"), "holds at once");
        let tokens = ada_writes(&api, &mote, "hello again").0;
        assert_eq!(tokens, ADA_TOKEN, "until they write again");
    }
    // Also for a chat that only the firmware knows.
    let eve = 5_555_555_555;
    api.person_writes(eve, "Eve", "remove me");
    assert_eq!(fresh_poll(&mote, &api), format!("r{eve};{ADA_TOKEN}"));
    answers(&api, eve, 0);
    assert!(!send(eve, "not any more"));
}

// --- settings ---

#[test]
fn settings() {
    let (api, gateway, mote) = with_ada();
    for (text, settings) in [
        ("config {P} interval 5", "i5"),
        ("config {P} interval 1", "i1"),
        ("config {P} interval 120", "i120"),
        ("config {P} feedback 1", "i120;f1"),
        ("config {P} feedback 0", "i120;f0"),
        ("config {P} INTERVAL 6", "i6;f0"),
        ("config {P} Feedback 1", "i6;f1"),
        (" CONFIG  {P}\tinterval 7 \n", "i7;f1"),
        ("/config {P} interval 8", "i8;f1"),
        ("/Config {P} interval 9", "i9;f1"),
    ] {
        let (tokens, answer) = ada_writes(&api, &mote, &text.replace("{P}", PASSWORD));
        assert_eq!(tokens, format!("{settings};{ADA_TOKEN}"), "{text:?}");
        let value = text.trim().rsplit(' ').next().unwrap();
        assert!(answer.contains(value), "{text:?} is confirmed: {answer:?}");
        assert!(!answer.contains(PASSWORD));
    }
    let log = gateway.log();
    assert!(log.contains("120"), "every applied change is logged: {log}");
}

/// Nothing changes, and Ada is told what is allowed.
#[test]
fn wrong_settings() {
    let (api, _gateway, mote) = with_ada();
    for rest in [
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
    ] {
        let (tokens, answer) = ada_writes(&api, &mote, &format!("config {PASSWORD} {rest}"));
        assert_eq!(tokens, NOTHING, "{rest:?}");
        let told = answer.contains("interval") || answer.contains("feedback");
        assert!(told && !answer.contains(PASSWORD), "{rest:?}: {answer:?}");
    }
    let (tokens, answer) = ada_writes(&api, &mote, "config");
    assert_eq!(tokens, NOTHING);
    assert!(answer.contains("config"), "{answer:?}");
    // A word that only begins like it is no command.
    api.person_writes(ADA, "Ada", "configuration is fun");
    assert_eq!(fresh_poll(&mote, &api), NOTHING);
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
        let right = format!("config {PASSWORD} feedback 1");
        assert!(ada_writes(&api, &mote, &right).1.contains('1'));
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
    assert_eq!(fresh_poll(&mote, &api), NOTHING, "not heard");
    // Others are, and she is with what needs no password.
    api.person_writes(BOB, "Bob", &format!("config {PASSWORD} interval 6"));
    let state = format!("i6;f1;{ADA_TOKEN};Bob:2345678901");
    assert_eq!(fresh_poll(&mote, &api), state);
    answers(&api, BOB, 0);
    assert_eq!(api.texts_to(ADA).len(), known, "ignored");
    assert!(ada_writes(&api, &mote, "help").1.contains("remove me"));
    assert!(!gateway.log().contains(&wrong), "{}", gateway.log());
}

#[test]
fn without_a_password() {
    let api = BotApi::start();
    let mut setup = Setup::new(&api);
    setup.dotenv = None;
    let gateway = start_with(&api, setup);
    let log = gateway.log();
    let warned = |line: &str| line.contains("[WARN]") && line.contains("PASSWORD");
    assert!(log.lines().any(warned), "{log}");
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

/// A message whose first word is config does not stay in the chat; only these, or one could try passwords by it.
#[test]
fn passwords_are_deleted() {
    let (api, _gateway, mote) = with_ada();
    let mut expected = Vec::new();
    for (text, deleted) in [
        ("config {P} interval 5", true),
        ("/config {P} interval 5", true),
        ("Config {P} interval 500", true),
        ("/CONFIG {P} nonsense", true),
        ("config wrong interval 5", true),
        ("config", true),
        ("{P}", false),
        ("the password is {P}", false),
        ("configure {P} interval 5", false),
        ("help", false),
    ] {
        let id = api.person_writes(ADA, "Ada", &text.replace("{P}", PASSWORD));
        fresh_poll(&mote, &api);
        expected.extend(deleted.then(|| (ADA.to_string(), id)));
    }
    api.wait_for("the deletions", |seen| seen.deleted.len() == expected.len());
    // Best effort.
    let fault = Fault::error(400, "Bad Request: message can't be deleted for everyone");
    api.fail(every("deleteMessage"), fault);
    let text = format!("config {PASSWORD} interval 9");
    assert_eq!(ada_writes(&api, &mote, &text).0, format!("i9;{ADA_TOKEN}"));
    assert_eq!(api.seen().deleted, expected);
}

// --- answers ---

/// One answer for each chat and fetch: its different texts joined, however much one person writes.
#[test]
fn answers_are_joined() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    api.person_writes(ADA, "Ada", "hi");
    api.person_writes(ADA, "Ada", &format!("config {PASSWORD} interval 5"));
    api.person_writes(ADA, "Ada", "config wrong interval 6");
    api.person_writes(ADA, "Ada", "help");
    fresh_poll(&mote, &api);
    answers(&api, ADA, 0);
    for _ in 0..300 {
        api.person_writes(BOB, "Bob", "help");
    }
    fresh_poll(&mote, &api);
    answers(&api, BOB, 0);
    assert!(mote.ping(PATIENCE)); // it has sent all that it wants to send
    let texts = api.texts_to(ADA);
    assert_eq!(texts.len(), 1, "{texts:#?}");
    assert!(texts[0].contains("remove me") && texts[0].to_lowercase().contains("password"));
    let texts = api.texts_to(BOB);
    assert!(texts.len() <= 4, "{} answers to 300 texts", texts.len());
    let helped: usize = texts
        .iter()
        .map(|text| text.matches("remove me").count())
        .sum();
    assert_eq!(helped, texts.len(), "the same is said once: {texts:#?}");
}

// --- the very first start ---

/// Commands from before the very first start are not carried out until an empty page has come; their senders are
/// registered. With a state, they are.
#[test]
fn old_commands() {
    let api = BotApi::start();
    api.set_date(1_700_000_000);
    api.person_writes(ADA, "Ada", &format!("config {PASSWORD} interval 5"));
    api.person_writes(BOB, "Bob", "remove me");
    let mut gateway = Gateway::with(Setup::new(&api));
    let mote = Mote::new(gateway.address());
    let both = format!("{ADA_TOKEN};Bob:2345678901");
    assert_eq!(poll(&mote, &api), both);
    assert_eq!(poll(&mote, &api), NOTHING);
    thread::sleep(Duration::from_secs(3)); // the empty page counts for 3 s
    api.person_writes(ADA, "Ada", &format!("config {PASSWORD} interval 6"));
    assert_eq!(poll(&mote, &api), format!("i6;{both}"));
    // Written while the gateway was off.
    gateway.kill9();
    api.person_writes(BOB, "Bob", &format!("config {PASSWORD} interval 7"));
    api.person_writes(ADA, "Ada", "remove me");
    gateway.restart();
    assert_eq!(poll(&mote, &api), "r1234567890;i7;Bob:2345678901");
}

// --- the log ---

/// Whatever people and motes write: each line of the log is one of the gateway's own records, also on the console.
#[test]
fn nobody_forges_the_log() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    let forged =
        "x\n2026-01-31 12:00:00 [INFO] forged\r\nINFO forged\u{1b}[31mforged\u{2028}forged\0";
    api.person_writes(ADA, forged, forged);
    api.person_writes(BOB, forged, &format!("config {forged} {forged}"));
    fresh_poll(&mote, &api);
    api.unknown_chat(7);
    api.fail(every("sendMessage").to(8), Fault::error(400, forged));
    mote.post_separate("message", message(&api, "5,7,8", forged))
        .expect_code("2.05");
    mote.post_piggybacked("message", message(&api, forged, "x"))
        .expect_code("4.00");
    mote.post_piggybacked("message", form(forged, forged, "5", "x"));
    mote.piggybacked(&mote.post("", "x").option(URI_PATH, forged))
        .expect_code("4.04");
    for line in gateway.log().lines() {
        let shape = line.chars().take(21);
        let shape: String = shape
            .map(|c| if c.is_ascii_digit() { '0' } else { c })
            .collect();
        assert_eq!(shape, "0000-00-00 00:00:00 [", "{line:?}");
    }
    for line in (gateway.log() + &gateway.output()).lines() {
        let head: String = line.chars().take(34).collect();
        assert!(!head.contains("forged"), "{line:?}");
        let plain = |c: char| !c.is_control() && c != '\u{2028}';
        assert!(line.chars().all(plain), "{line:?}");
    }
}
