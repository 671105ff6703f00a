//! What people write to the bot, what they are answered, and what the mote hears of it.

use crate::support::*;
use serde_json::json;

/// The first of ten people who are registered.
const FIRST: i64 = 1_000_000_000;

/// What was written to a chat, once the gateway has written something.
#[track_caller]
fn answers(api: &BotApi, chat: i64) -> String {
    api.wait_for(&format!("an answer to {chat}"), |seen| {
        !seen.texts_to(chat).is_empty()
    });
    api.texts_to(chat).join("\n\n")
}

// --- registration ---

#[test]
fn a_new_user_is_greeted() {
    let api = BotApi::start();
    let sticker = json!({"sticker": {"file_id": "x"}});
    api.person_writes(ADA, "Ada", "hello?");
    api.push_message(BOB, "Bob", sticker.clone());
    let gateway = start_with(&api, Setup::new(&api));
    let mote = Mote::new(gateway.address());
    assert_eq!(poll(&mote, &api), format!("{ADA_TOKEN};Bob:2345678901"));
    for (chat, name) in [(ADA, "Ada"), (BOB, "Bob")] {
        let greeting = answers(&api, chat);
        for part in ["config", "interval", "feedback", "remove me"] {
            assert!(greeting.contains(part), "{part:?} in {greeting:?}");
        }
        let log = gateway.log();
        let told = |line: &str| line.contains(name) && line.contains(&chat.to_string());
        assert!(log.lines().any(told), "{log}");
    }
    // What holds no text is not answered otherwise.
    api.push_message(BOB, "Bob", sticker);
    assert_eq!(hear(&mote, &api), NOTHING);
    assert!(mote.ping(PATIENCE));
    assert_eq!(api.count("sendMessage"), 2);
}

#[test]
fn ten_users() {
    let api = BotApi::start();
    let writes =
        |number: i64, text: &str| api.person_writes(FIRST + number, &format!("User{number}"), text);
    let user = |number: i64| format!("User{number}:{}", FIRST + number);
    for number in 0..12 {
        writes(number, "hi");
    }
    let gateway = start_with(&api, Setup::new(&api));
    let mote = Mote::new(gateway.address());
    let mut users: Vec<String> = (0..10).map(user).collect();
    assert_eq!(poll(&mote, &api), users.join(";"));
    for late in [FIRST + 10, FIRST + 11] {
        assert!(answers(&api, late).contains("full"));
    }
    // One leaves: there is room for one. Who is not on the list can still ask what there is.
    writes(3, "remove me");
    writes(10, "and now?");
    writes(11, "/help");
    users.remove(3);
    users.push(user(10));
    let state = format!("r1000000003;{}", users.join(";"));
    assert_eq!(hear(&mote, &api), state);
}

/// Only private chats, with ids that the firmware has room for. The others are logged: so one finds a group's id.
#[test]
fn who_cannot_register() {
    let api = BotApi::start();
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
    let gateway = start_with(&api, Setup::new(&api));
    let mote = Mote::new(gateway.address());
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
    let api = BotApi::start();
    let names = "Ada|Ada|f0|i5;r1|r2d2|all|1000000001||\u{1f3f3}\u{fe0f}\u{200d}\u{1f308}|Maximilian der Große";
    for (chat, name) in (FIRST..).zip(names.split('|')) {
        api.person_writes(chat, name, "hi");
    }
    let gateway = start_with(&api, Setup::new(&api));
    let reply = poll(&Mote::new(gateway.address()), &api);
    let mut firmware = Firmware::default();
    firmware.take(&reply);
    assert!(reply.starts_with("Ada:1000000000;"), "{reply}");
    assert_eq!(firmware.users().len(), 10, "{reply}");
    assert_eq!(firmware.knows(), firmware.users().join(";"), "no settings");
    let ids = (FIRST..FIRST + 10).map(|id| id.to_string());
    assert_eq!(firmware.chat_ids(), ids.collect::<Vec<_>>().join(","));
}

// --- leaving ---

/// Holds at once and until they write again; also for a chat that only the firmware knows.
#[test]
fn remove_me() {
    let api = BotApi::start();
    api.person_writes(ADA, "Ada", "hi");
    let gateway = start_with(&api, Setup::new(&api));
    let mote = Mote::new(gateway.address());
    let send = |text: &str| {
        mote.post_separate("message", message(&api, "1234567890,2345678901", text))
            .expect_code("2.05");
        [ADA, BOB].map(|chat| api.texts_to(chat).iter().any(|sent| sent == text))
    };
    assert_eq!(poll(&mote, &api), ADA_TOKEN);
    assert_eq!(send("to both"), [true, true]);
    api.person_writes(ADA, "Ada", "Remove Me");
    api.person_writes(BOB, "Bob", "remove me");
    assert_eq!(hear(&mote, &api), "r1234567890;r2345678901");
    assert!(mote.ping(PATIENCE));
    for chat in [ADA, BOB] {
        assert!(answers(&api, chat).contains("You are removed"));
    }
    assert_eq!(send("to nobody"), [false, false]);
    api.person_writes(ADA, "Ada", "hello again");
    assert_eq!(hear(&mote, &api), format!("r2345678901;{ADA_TOKEN}"));
    assert_eq!(send("to Ada"), [true, false]);
}

// --- settings ---

/// What is written, what the mote is told, and what is confirmed.
const SETTINGS: &str = "
config {P} interval 5             | i5      | 5 minutes
config {P} interval 1             | i1      | 1 minutes
config {P} interval 120           | i120    | 120 minutes
config {P} feedback 1             | f1      | set to 1
config {P} feedback 0             | f0      | set to 0
/Config {P} INTERVAL 6            | i6      | 6 minutes
";

#[test]
fn settings() {
    each_row(SETTINGS, |[text, settings, confirmed]| {
        let api = BotApi::start();
        api.person_writes(ADA, "Ada", &text.replace("{P}", PASSWORD));
        let gateway = start_with(&api, Setup::new(&api));
        let mote = Mote::new(gateway.address());
        assert_eq!(poll(&mote, &api), format!("{settings};{ADA_TOKEN}"));
        let answer = answers(&api, ADA);
        assert!(answer.contains(confirmed), "{answer:?}");
        assert!(!answer.contains(PASSWORD));
        assert!(gateway.log().contains(confirmed), "changes are logged");
    });
}

/// Nothing changes, and whoever writes it is told what is allowed.
#[test]
fn wrong_settings() {
    let wrong = [
        "interval 0",
        "interval 121",
        "interval -1",
        "interval 99999999999999999999",
        "interval five",
        "interval 5 6",
        "feedback 2",
        "volume 11",
        "interval",
        "",
    ];
    let api = BotApi::start();
    for (chat, rest) in (FIRST..).zip(wrong) {
        api.person_writes(chat, "Ada", &format!("config {PASSWORD} {rest}"));
    }
    let gateway = start_with(&api, Setup::new(&api));
    let told = poll(&Mote::new(gateway.address()), &api);
    let users = told.split(';').all(|token| token.contains(':'));
    assert!(users, "a setting in {told}");
    for (chat, rest) in (FIRST..).zip(wrong) {
        let answer = answers(&api, chat);
        let is_told = answer.contains("Nothing was changed") && !answer.contains(PASSWORD);
        assert!(is_told, "{rest:?}: {answer:?}");
    }
}

/// The password counts with its case; after five wrong ones in a row a chat is not heard for an hour.
#[test]
fn wrong_passwords() {
    let api = BotApi::start();
    let ada = |password: &str, setting: &str| {
        api.person_writes(ADA, "Ada", &format!("config {password} {setting}"));
    };
    let wrong = PASSWORD.to_uppercase();
    for _ in 0..2 {
        (0..4).for_each(|_| ada(&wrong, "interval 5"));
        ada(PASSWORD, "feedback 1"); // four are not five
    }
    let nearly = [
        "x",
        &PASSWORD[1..],
        &format!("{PASSWORD}x"),
        &PASSWORD[..PASSWORD.len() - 1],
        &wrong,
    ];
    for password in nearly {
        ada(password, "interval 5");
    }
    ada(PASSWORD, "feedback 0");
    // Others are heard, and she is with what needs no password.
    api.person_writes(BOB, "Bob", &format!("config {PASSWORD} interval 6"));
    api.person_writes(ADA, "Ada", "help");
    let gateway = start_with(&api, Setup::new(&api));
    let told = poll(&Mote::new(gateway.address()), &api);
    assert_eq!(told, format!("i6;f1;{ADA_TOKEN};Bob:2345678901"));
    let answer = answers(&api, ADA);
    for part in ["Wrong password", "set to 1", "remove me"] {
        assert!(answer.contains(part), "{part:?} in {answer:?}");
    }
    assert!(!answer.contains("set to 0") && !answer.contains(&wrong));
    assert!(!gateway.log().contains(&wrong), "{}", gateway.log());
}

#[test]
fn without_a_password() {
    let api = BotApi::start();
    let mut setup = Setup::new(&api);
    setup.dotenv = None;
    for text in [
        &format!("config {PASSWORD} interval 5"),
        "config  interval 5",
        "config interval 5",
    ] {
        api.person_writes(ADA, "Ada", text);
    }
    let gateway = start_with(&api, setup);
    let log = gateway.log();
    let warned = |line: &str| line.contains("[WARN]") && line.contains("PASSWORD");
    assert!(log.lines().any(warned), "{log}");
    let told = poll(&Mote::new(gateway.address()), &api);
    assert_eq!(told, ADA_TOKEN);
    assert!(answers(&api, ADA).contains("No password is set"));
}

/// A message whose first word is config does not stay in the chat; only these, or one could try passwords by it.
#[test]
fn passwords_are_deleted() {
    let api = BotApi::start();
    let mut expected = Vec::new();
    for (text, is_deleted) in [
        ("config {P} interval 5", true),
        ("/CONFIG {P} nonsense", true),
        ("config wrong interval 5", true),
        ("config", true),
        ("{P}", false),
        ("the password is {P}", false),
        ("configure {P} interval 5", false),
        ("help", false),
    ] {
        let id = api.person_writes(ADA, "Ada", &text.replace("{P}", PASSWORD));
        expected.extend(is_deleted.then(|| (ADA.to_string(), id)));
    }
    let gateway = start_with(&api, Setup::new(&api));
    let mote = Mote::new(gateway.address());
    assert_eq!(api.seen().deleted, expected);
    // One that does not get through is made up for; Ada is answered all the same.
    api.fail(next(1, "deleteMessage"), Fault::Page(502));
    let id = api.person_writes(ADA, "Ada", &format!("config {PASSWORD} interval 9"));
    assert_eq!(hear(&mote, &api), format!("i9;{ADA_TOKEN}"));
    expected.push((ADA.to_string(), id));
    api.wait_for("the deletion", |seen| seen.deleted == expected);
    assert!(answers(&api, ADA).contains("9 minutes"));
}

// --- answers ---

/// One answer for each chat and fetch: its different texts joined, however much one person writes.
#[test]
fn answers_are_joined() {
    let api = BotApi::start();
    api.person_writes(ADA, "Ada", "hi");
    api.person_writes(ADA, "Ada", "config wrong interval 6");
    for _ in 0..300 {
        api.person_writes(BOB, "Bob", "help");
    }
    let gateway = start_with(&api, Setup::new(&api));
    assert!(Mote::new(gateway.address()).ping(PATIENCE));
    let texts = api.texts_to(ADA);
    assert_eq!(texts.len(), 1, "{texts:#?}");
    assert!(texts[0].contains("remove me") && texts[0].contains("Wrong password"));
    let texts = api.texts_to(BOB);
    assert_eq!(texts.len(), 1, "{texts:#?}");
    assert_eq!(texts[0].matches("remove me").count(), 1);
    // What is said last is what holds.
    for text in ["stop", "hi", "stop"] {
        api.person_writes(BOB, "Bob", text);
    }
    hear(&Mote::new(gateway.address()), &api);
    let told = api.texts_to(BOB).pop().unwrap();
    let (removed, registered) = (told.rfind("are removed"), told.rfind("are registered"));
    assert!(registered.is_some() && removed > registered, "{told}");
}

// --- the log ---

/// Whatever people and motes write: each line of the log is one of the gateway's own records, also on the console.
#[test]
fn nobody_forges_the_log() {
    let api = BotApi::start();
    let forged = "x\n2026-01-31 12:00:00 [INFO] forged\r\nINFO forged\u{1b}[31mforged\u{2028}forged\u{202e}\0";
    api.person_writes(ADA, forged, forged);
    api.person_writes(BOB, forged, &format!("config {forged} {forged}"));
    let gateway = start_with(&api, Setup::new(&api));
    let mote = Mote::new(gateway.address());
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
        let plain = |c: char| !c.is_control() && !"\u{2028}\u{202e}".contains(c);
        assert!(line.chars().all(plain), "{line:?}");
    }
}
