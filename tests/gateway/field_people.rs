//! People as they really write: odd messages, their own spelling, bots, strangers, an owner who wants his list back.

use std::time::{Duration, Instant};

use crate::support::*;
use serde_json::{Value, json};

/// Chats of a table's cases are counted from here.
const FIRST: i64 = 3_000_000_000;
const REGISTERED: &str = "You are registered.";
const REMOVED: &str = "You are removed and get no more messages. Write anything to register again.";
const IS_FULL: &str = "The list is full";
const HOW_TO_REGISTER: &str = "To register, write: register <password>";
const WRONG_PASSWORD: &str = "Wrong password";
const NOT_UNDERSTOOD: &str = "I do not understand that.";

/// A chat for each case of a table.
fn chats<T: Clone>(cases: &[T]) -> Vec<(i64, T)> {
    (FIRST..).zip(cases.iter().cloned()).collect()
}

/// Whoever knows the password registers.
fn by_password(setup: Setup) -> Setup {
    let config = setup.config.clone().unwrap() + "registration = password\n";
    setup.config(&config)
}

/// Fails with all that is wrong, so that one run tells of a whole table.
#[track_caller]
fn assert_none(wrong: &[String]) {
    assert!(
        wrong.is_empty(),
        "{} wrong:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

// --- what is only decoration ---

fn with_chat(field: Value) -> Value {
    let mut chat = json!({"type": "private", "first_name": "Ada"});
    for (key, value) in field.as_object().unwrap() {
        chat[key] = value.clone();
    }
    json!({ "chat": chat })
}

/// Missing, null or odd: nobody is deaf or locked in because of it.
#[test]
fn decoration_may_be_odd() {
    let cases = [
        with_chat(json!({"first_name": null})),
        with_chat(json!({"first_name": ""})),
        with_chat(json!({"first_name": 5})),
        with_chat(json!({"first_name": ["Ada"]})),
        with_chat(json!({"first_name": {"a": 1}})),
        with_chat(json!({"title": "Dr."})),
        with_chat(json!({"title": null})),
        with_chat(json!({"first_name": null, "title": "Dr."})),
        with_chat(json!({"last_name": null, "username": null, "is_forum": "no"})),
        with_chat(json!({"is_direct_messages": 1, "accent_color_id": -1})),
        json!({"chat": {"type": "private"}}),
        json!({"date": -1}),
        json!({"date": 1.5}),
        json!({"date": null}),
        json!({"date": "yesterday"}),
        json!({"date": 1e30}),
        json!({"message_id": null}),
        json!({"message_id": "7"}),
        json!({"message_id": -1}),
        json!({"from": null}),
        json!({"from": "Ada"}),
        json!({"from": {"is_bot": null}}),
        json!({"from": {"is_bot": "false", "first_name": null}}),
        json!({"from": {}}),
        json!({"entities": null, "reply_to_message": null, "link_preview_options": []}),
        json!({"caption": null, "photo": null, "sticker": null}),
        json!({"caption": 5, "caption_entities": "none"}),
        json!({"reply_to_message": {"text": null, "chat": {"id": "x"}}}),
        json!({"via_bot": null, "sender_chat": null, "forward_origin": 3}),
    ];
    let scene = Scene::new();
    let cases = chats(&cases);
    for (chat, odd) in &cases {
        for text in ["hi", "remove me"] {
            let mut content = odd.clone();
            if let Some(chat_object) = content.get_mut("chat") {
                chat_object["id"] = json!(chat);
            }
            content["text"] = json!(text);
            scene.sends(*chat, "Ada", content);
        }
    }
    scene.catch_up();
    let mut wrong = Vec::new();
    for (chat, odd) in &cases {
        let answers = scene.answers(*chat);
        if !answers.contains(REGISTERED) || !answers.contains(REMOVED) {
            wrong.push(format!("{odd}: {answers:?}"));
        }
    }
    assert_none(&wrong);
}

/// What holds nothing that can be read stops nobody who wrote later.
#[test]
fn nothing_to_read_stops_nobody() {
    let scene = Scene::new();
    for content in [
        json!({"text": null}),
        json!({"text": 5}),
        json!({"text": {"text": "hi"}}),
        json!({"text": ["remove me"]}),
        json!({"text": ""}),
        json!({"caption": null}),
        json!({"chat": null, "text": "hi"}),
        json!({"chat": {"id": null, "type": "private"}, "text": "hi"}),
        json!({"chat": {"id": 1.5, "type": "private"}, "text": "hi"}),
        json!({"chat": {"id": BOB, "type": null}, "text": "hi"}),
        json!({"chat": {"id": BOB}, "text": "hi"}),
    ] {
        scene.sends(BOB, "Bob", content);
    }
    scene.writes(ADA, "Ada", "hi");
    scene.catch_up();
    let tokens = scene.tokens();
    assert!(tokens.contains("Ada:1234567890"), "{tokens}");
}

// --- what is no writing ---

/// Telegram's service messages, as they stand in private chats and elsewhere.
fn service_messages() -> Vec<Value> {
    vec![
        json!({"message_auto_delete_timer_changed": {"message_auto_delete_time": 86400}}),
        json!({"pinned_message": {"message_id": 1, "date": 1_700_000_000, "text": "remove me",
            "chat": {"id": ADA, "type": "private", "first_name": "Ada"}}}),
        json!({"pinned_message": {"message_id": 1, "date": 0, "chat": {"id": ADA, "type": "private"}}}),
        json!({"chat_background_set": {"type": {"type": "pattern", "document": {"file_id": "x"}}}}),
        json!({"gift": {"gift": {"id": "5", "sticker": {"file_id": "x"}, "star_count": 15}, "text": "for you"}}),
        json!({"unique_gift": {"gift": {"base_name": "Hat", "name": "Hat-1", "number": 1}, "origin": "transfer"}}),
        json!({"boost_added": {"boost_count": 1}}),
        json!({"write_access_allowed": {"from_request": true}}),
        json!({"write_access_allowed": {}}),
        json!({"connected_website": "example.org"}),
        json!({"users_shared": {"request_id": 1, "users": [{"user_id": 5}]}}),
        json!({"chat_shared": {"request_id": 1, "chat_id": -5}}),
        json!({"successful_payment": {"currency": "XTR", "total_amount": 1, "invoice_payload": "x"}}),
        json!({"refunded_payment": {"currency": "XTR", "total_amount": 1}}),
        json!({"proximity_alert_triggered": {"traveler": {"id": 5}, "watcher": {"id": 6}, "distance": 1}}),
        json!({"video_chat_started": {}}),
        json!({"video_chat_ended": {"duration": 5}}),
        json!({"video_chat_scheduled": {"start_date": 1_700_000_000}}),
        json!({"new_chat_title": "Ada and the bot"}),
        json!({"new_chat_members": [{"id": 5, "is_bot": false, "first_name": "Eve"}]}),
        json!({"left_chat_member": {"id": 5, "is_bot": false, "first_name": "Eve"}}),
        json!({"new_chat_photo": [{"file_id": "x", "width": 1, "height": 1}]}),
        json!({"delete_chat_photo": true}),
        json!({"group_chat_created": true}),
        json!({"migrate_from_chat_id": -5}),
        json!({"forum_topic_created": {"name": "Topic", "icon_color": 1}}),
        json!({"giveaway_created": {}}),
        json!({"giveaway_completed": {"winner_count": 1}}),
        json!({"paid_message_price_changed": {"paid_message_star_count": 5}}),
        json!({"checklist_tasks_done": {"marked_as_done_task_ids": [1]}}),
        json!({"something_that_comes_next_year": {"text": "hi", "caption": "hi"}}),
        json!({}),
    ]
}

#[test]
fn service_messages_register_nobody() {
    let scene = Scene::new();
    let cases = chats(&service_messages());
    for (chat, content) in &cases {
        scene.sends(*chat, "Stranger", content.clone());
    }
    scene.catch_up();
    assert_eq!(scene.tokens(), NOTHING);
    let mut wrong = Vec::new();
    for (chat, content) in &cases {
        let answers = scene.answers(*chat);
        if !answers.is_empty() {
            wrong.push(format!("{content}: {answers:?}"));
        }
    }
    assert_none(&wrong);
}

/// Content that people send, and no text in it.
fn media() -> Vec<Value> {
    let file =
        json!({"file_id": "x", "file_unique_id": "y", "duration": 1, "width": 1, "height": 1});
    vec![
        json!({"sticker": file}),
        json!({"photo": [file, file]}),
        json!({"photo": [file], "caption": "the greenhouse"}),
        json!({"photo": [file], "caption": "register me again"}),
        json!({"voice": file}),
        json!({"video": file, "caption": "hi"}),
        json!({"video_note": file}),
        json!({"audio": file}),
        json!({"document": file}),
        json!({"animation": file, "document": file}),
    ]
}

/// A sticker, a picture or a voice message registers a stranger.
#[test]
fn media_register() {
    let scene = Scene::new();
    let cases = chats(&media());
    for (chat, content) in &cases {
        scene.sends(*chat, "Stranger", content.clone());
    }
    scene.catch_up();
    let tokens = scene.tokens();
    for (chat, content) in &cases {
        assert!(tokens.contains(&format!(":{chat}")), "{content}: {tokens}");
        let answers = scene.answers(*chat);
        assert!(answers.contains(REGISTERED), "{content}: {answers:?}");
    }
}

/// Who has left is out until he writes a text.
#[test]
fn nobody_comes_back_but_by_a_text() {
    let mut contents = media();
    contents.extend(service_messages());
    for more in [
        json!({"location": {"latitude": 1.5, "longitude": 2.5}}),
        json!({"contact": {"phone_number": "1", "first_name": "Ada"}}),
        json!({"dice": {"emoji": "🎲", "value": 3}}),
        json!({"poll": {"id": "1", "question": "hi?", "options": []}}),
        json!({"venue": {"title": "hi", "address": "hi"}, "location": {"latitude": 1, "longitude": 2}}),
        json!({"story": {"id": 1, "chat": {"id": ADA, "type": "private"}}}),
        json!({"game": {"title": "hi", "description": "hi"}}),
    ] {
        contents.push(more);
    }
    let scene = Scene::new();
    let cases = chats(&contents);
    for (chat, content) in &cases {
        scene.writes(*chat, "Ada", "remove me");
        scene.sends(*chat, "Ada", content.clone());
    }
    scene.catch_up();
    let mut wrong = Vec::new();
    for (chat, content) in &cases {
        let answers = scene.answers(*chat);
        if answers != REMOVED {
            wrong.push(format!("{content}: {answers:?}"));
        }
    }
    assert_none(&wrong);
    assert!(!scene.tokens().contains(':'), "somebody is registered");
    let (chat, _) = cases[0];
    let send = |text: &str| {
        let form = message(&scene.api, &chat.to_string(), text);
        scene
            .mote()
            .post_separate("message", form)
            .expect_code("2.05");
        scene.api.texts_to(chat).iter().any(|sent| sent == text)
    };
    assert!(!send("not heard"));
    scene.writes(chat, "Ada", "here I am again");
    scene.catch_up();
    assert!(scene.answers(chat).contains(REGISTERED));
    assert!(send("heard"));
}

// --- spelling ---

#[test]
fn remove_me_as_people_spell_it() {
    let cases = [
        "remove me",
        "Remove Me",
        "REMOVE ME!",
        "remove me.",
        "remove me!!!",
        "  remove   me \n",
        "\"remove me\"",
        "'remove me'",
        "„remove me“",
        "«remove me»",
        "(remove me)",
        "remove me…",
        "...remove me?",
        "¡remove me!",
        "remove_me",
        "/remove_me",
        "/remove me",
        "/Remove_Me@lab_bot",
        "/remove_me@riot_mote_bot",
        "remove_me.",
        "\u{feff}remove me",
        "remove me\u{200b}",
        "re\u{ad}move me",
        "remove\u{200d} me",
        "\u{202a}remove me\u{202c}",
        "\u{2068}remove me\u{2069}",
        "\u{200e}remove me\u{200f}",
        "remove\u{a0}me",
        "remove\u{2009}me",
        "remove\u{3000}me",
        "remove\nme",
        "stop",
        "Stop",
        "STOP!",
        "stop.",
        "/stop",
        "/STOP",
        "/stop@lab_bot",
        "/stop@riot_mote_bot ",
        "\u{200b}/stop",
        "st\u{2060}op",
    ];
    let scene = Scene::new();
    let cases = chats(&cases);
    for (chat, text) in &cases {
        scene.writes(*chat, "Ada", text);
    }
    scene.catch_up();
    let mut wrong = Vec::new();
    for (chat, text) in &cases {
        let answers = scene.answers(*chat);
        if answers != REMOVED {
            wrong.push(format!("{text:?}: {answers:?}"));
        }
    }
    assert_none(&wrong);
    assert!(!scene.tokens().contains(':'), "somebody is registered");
}

/// Words that only resemble a command remove nobody.
#[test]
fn what_is_no_remove_me() {
    let cases = [
        "please remove me",
        "remove me not",
        "removed me",
        "remove",
        "me",
        "removeme",
        "nonstop",
        "stop it",
        "don't stop",
        "unstop me",
    ];
    let scene = Scene::new();
    let cases = chats(&cases);
    for (chat, text) in &cases {
        scene.writes(*chat, "Ada", text);
    }
    scene.catch_up();
    let tokens = scene.tokens();
    for (chat, text) in &cases {
        let answers = scene.answers(*chat);
        assert!(tokens.contains(&format!(":{chat}")), "{text:?}: {tokens}");
        assert!(!answers.contains(REMOVED), "{text:?}: {answers:?}");
    }
}

#[test]
fn help_as_people_spell_it() {
    let tables: [(&str, [&str; 10]); 3] = [
        (
            "start",
            [
                "/start",
                "/start sensor1",
                "/start@lab_bot",
                "/start@lab_bot sensor1",
                "/start aHR0cHM6Ly9leGFtcGxlLm9yZw",
                "/START x_y-z",
                " /start ",
                "\u{200b}/start",
                "start",
                "Start!",
            ],
        ),
        (
            "help",
            [
                "help",
                "/help",
                "/help@lab_bot",
                "/HELP@Lab_Bot",
                "Help!",
                "help?",
                "¿help?",
                "help…",
                "\"help\"",
                "*help*",
            ],
        ),
        (
            "help in invisible company",
            [
                "\u{feff}help",
                "help\u{200b}",
                "he\u{ad}lp",
                "\u{202d}help\u{202c}",
                "\u{2066}/help\u{2069}",
                "\u{a0}help\u{a0}",
                "help\u{fe0f}",
                "\n/help\n",
                "/help\u{200e}",
                "\u{2060}help",
            ],
        ),
    ];
    in_parallel(&tables, |texts| {
        let scene = Scene::new();
        let cases = chats(texts);
        for (chat, text) in &cases {
            scene.writes(*chat, "Ada", "hi");
            scene.writes(*chat, "Ada", text);
        }
        scene.catch_up();
        let mut wrong = Vec::new();
        for (chat, text) in &cases {
            let answers = scene.answers(*chat);
            if answers.contains(NOT_UNDERSTOOD) || !answers.contains("remove me") {
                wrong.push(format!("{text:?}: {answers:?}"));
            }
        }
        assert_none(&wrong);
    });
}

/// The password is matched exactly, the other words as people write them; the message does not stay in the chat.
#[test]
fn config_as_people_spell_it() {
    let cases = [
        "config {P} interval 11",
        "/config {P} interval 11",
        "/config@lab_bot {P} interval 11",
        "/Config@Lab_Bot {P} INTERVAL 11",
        "Config: {P} interval 11",
        "\u{200b}config {P} interval 11",
        "config {P} inter\u{ad}val 11",
        "config {P} interval 11\u{200b}",
        "\u{202a}config {P} interval 11\u{202c}",
        "config {P}\u{a0}interval\u{a0}11",
        "config\n{P}\ninterval\n11",
        "\"config {P} interval 11\"",
        "config {P} interval 11.",
        "config {P} interval 11!",
    ];
    let scene = Scene::new();
    let cases = chats(&cases);
    let mut ids = Vec::new();
    for (chat, text) in &cases {
        ids.push(scene.writes(*chat, "Ada", &text.replace("{P}", PASSWORD)));
    }
    scene.catch_up();
    let deleted = scene.api.seen().deleted;
    let mut wrong = Vec::new();
    for ((chat, text), id) in cases.iter().zip(ids) {
        let answers = scene.answers(*chat);
        if !answers.contains("The interval is set to 11 minutes.") {
            wrong.push(format!("{text:?}: {answers:?}"));
        }
        if !deleted.contains(&(chat.to_string(), id)) {
            wrong.push(format!("{text:?} stays in the chat"));
        }
    }
    assert_none(&wrong);
}

/// A password is compared as it is, whatever it holds, though other words are not.
#[test]
fn odd_passwords() {
    let passwords = [
        "__init__",
        "quo\"ted",
        "dotted.",
        "/slash/",
        "at@lab_bot",
        "ÄÖÜ-ß-🙂",
        "👩\u{200d}🔬-lab",
        "remove",
        "stop",
        "Config",
        "<password>",
        "{\"a\":1}",
        "100%+5&x=y",
        "-1",
    ];
    let cases = passwords.map(|password| (password, password));
    in_parallel(&cases, |password| {
        let scene = Scene::with(|setup| {
            let mut setup = by_password(setup).dotenv(&format!("PASSWORD={password}\n"));
            setup.secrets = vec![TOKEN.to_string()];
            setup
        });
        let wrong = [
            password.to_uppercase(),
            password.to_lowercase(),
            format!("{password}."),
            format!("\"{password}\""),
            format!("{password}\u{200b}"),
            password.replace('_', " "),
            password
                .trim_matches(|c: char| !c.is_alphanumeric())
                .to_string(),
        ];
        for (chat, wrong) in (FIRST..).zip(wrong.iter().filter(|wrong| wrong != password)) {
            scene.writes(chat, "Thief", &format!("register {wrong}"));
            scene.writes(chat, "Thief", &format!("config {wrong} interval 9"));
        }
        scene.writes(ADA, "Ada", &format!("register {password}"));
        scene.writes(BOB, "Bob", &format!("config {password} interval 7"));
        scene.catch_up();
        assert_eq!(scene.tokens(), "i7;Ada:1234567890");
    });
}

// --- passwords in the chat ---

/// Telegram writes a group's anonymous admin as a bot of its own.
#[test]
fn the_password_of_an_anonymous_admin() {
    let scene = Scene::new();
    let group = -1_001_234_567_890_i64;
    let lab = json!({"id": group, "type": "supergroup", "title": "Lab"});
    let bot = json!({"id": 1_087_968_824, "is_bot": true, "first_name": "Group"});
    let text = format!("/config@lab_bot {PASSWORD} interval 7");
    let id = scene.sends(1, "", json!({"chat": lab, "from": bot, "text": text}));
    scene.catch_up();
    let deleted = scene.api.seen().deleted;
    assert_eq!(deleted, [(group.to_string(), id)]);
    assert_eq!(scene.tokens(), NOTHING);
}

/// A caption is never carried out, only deleted.
#[test]
fn captions() {
    let photo = json!([{"file_id": "x", "width": 1, "height": 1}]);
    let config = format!("config {PASSWORD} interval 7");
    let register = format!("register {PASSWORD}");
    // What carries the caption, the caption, whether it is deleted where anybody registers, and where a password does.
    let cases = [
        ("photo", config.clone(), true, true),
        ("video", config.clone(), true, true),
        (
            "document",
            format!("/config@lab_bot {PASSWORD} feedback 1"),
            true,
            true,
        ),
        (
            "animation",
            format!("CONFIG {PASSWORD} remove Ada"),
            true,
            true,
        ),
        ("voice", format!("\u{200b}config, {PASSWORD}"), true, true),
        ("audio", "config wrong interval 7".to_string(), true, true),
        ("photo", "config".to_string(), true, true),
        ("photo", register.clone(), false, true),
        ("video", "/register@lab_bot wrong".to_string(), false, true),
        (
            "photo",
            format!("look, config {PASSWORD} interval 7"),
            false,
            false,
        ),
        ("photo", "configuration".to_string(), false, false),
        ("photo", "remove me".to_string(), false, false),
        ("sticker", "stop".to_string(), false, false),
    ];
    let modes: [(&str, bool); 2] = [("open", false), ("password", true)];
    in_parallel(&modes, |wants_password| {
        let scene = Scene::with(|setup| match wants_password {
            true => by_password(setup),
            false => setup,
        });
        scene.writes(ADA, "Ada", if *wants_password { &register } else { "hi" });
        scene.catch_up();
        let known = scene.api.seen().deleted.len();
        let mut expected = Vec::new();
        for (kind, caption, in_open, in_password) in &cases {
            let id = scene.sends(ADA, "Ada", json!({*kind: photo, "caption": caption}));
            if if *wants_password {
                *in_password
            } else {
                *in_open
            } {
                expected.push((ADA.to_string(), id));
            }
        }
        scene.catch_up();
        assert_eq!(scene.tokens(), "Ada:1234567890");
        assert_eq!(scene.api.seen().deleted[known..], expected);
        let answers = scene.answers(ADA);
        assert!(
            !answers.contains("set to") && !answers.contains(WRONG_PASSWORD),
            "{answers}"
        );
    });
}

/// Each call takes 2.6 s, so the own fetch of 5 s has no time for a deletion and an answer: the deletion is done all the
/// same.
#[test]
fn a_password_is_deleted_on_a_far_line() {
    let cases = [("alone", false), ("a mote asks", true)];
    in_parallel(&cases, |with_mote| {
        let api = BotApi::start();
        api.fail(every(""), Fault::Late(Duration::from_millis(2600)));
        let id = api.person_writes(ADA, "Ada", &format!("config {PASSWORD} interval 5"));
        let gateway = Gateway::with(Setup::ipv4(&api));
        let scene = Scene::of(api, gateway);
        let mote = scene.mote();
        let start = Instant::now();
        let is_done = within(Duration::from_secs(19), || {
            if *with_mote {
                // What the gateway does after a response takes so long that the response may come again.
                let poll = mote.post("update", update(&scene.api));
                mote.reliable(&poll, Duration::from_secs(9), PATIENCE);
            }
            let seen = scene.api.seen();
            !seen.deleted.is_empty() && !seen.texts_to(ADA).is_empty()
        });
        let seen = scene.api.seen();
        println!(
            "after {:.1?}: {:?}, {:?}",
            start.elapsed(),
            seen.deleted,
            seen.texts_to(ADA)
        );
        assert!(
            is_done,
            "deleted {:?}, answered {:?}",
            seen.deleted,
            seen.texts_to(ADA)
        );
        // Again, if it was not heard that it is done.
        let is_it = |it: &(String, i64)| *it == (ADA.to_string(), id);
        assert!(seen.deleted.iter().all(is_it), "{:?}", seen.deleted);
        let answers = scene.answers(ADA);
        assert!(answers.contains("set to 5 minutes"), "{answers}");
    });
}

/// A deletion comes before the answers, and one that fails for the moment is tried again with the next fetch.
#[test]
fn deletions_are_kept_until_done() {
    let gone = Fault::error(400, "Bad Request: message to delete not found");
    // How the first try fails, and how many tries there are.
    let cases = [
        ("a page of the front end", (Fault::Page(502), 2)),
        (
            "no HTTP",
            (Fault::Bytes(b"SSH-2.0-OpenSSH_9.2\r\n".to_vec()), 2),
        ),
        ("closed", (Fault::CloseUnanswered, 2)),
        ("Telegram has decided", (gone, 1)),
    ];
    in_parallel(&cases, |(fault, tries)| {
        let scene = Scene::new();
        scene.api.fail(next(1, "deleteMessage"), fault.clone());
        let id = scene.writes(ADA, "Ada", &format!("config {PASSWORD} interval 5"));
        scene.catch_up();
        scene.writes(BOB, "Bob", "hi"); // so that there is a next fetch soon
        scene.catch_up();
        let calls = scene.api.seen().calls;
        let deletions: Vec<&Call> = calls
            .iter()
            .filter(|it| it.method == "deleteMessage")
            .collect();
        assert_eq!(deletions.len(), *tries);
        for deletion in &deletions {
            assert_eq!(deletion.body["message_id"], json!(id));
        }
        let answer = calls.iter().find(|it| it.method == "sendMessage").unwrap();
        assert!(
            deletions[0].at < answer.at,
            "the password is seen longer than needed"
        );
    });
}

// --- bots ---

/// Two of them would answer each other for ever.
#[test]
fn bots_are_ignored() {
    let scene = Scene::new();
    let texts = [
        "hi".to_string(),
        "help".to_string(),
        "/start".to_string(),
        "I do not understand that.".to_string(),
        format!("config {PASSWORD} interval 9"),
        "config wrong interval 9".to_string(),
        "remove me".to_string(),
    ];
    let robot = json!({"id": BOB, "is_bot": true, "first_name": "Robot", "username": "robot_bot"});
    for text in &texts {
        scene.sends(BOB, "Robot", json!({"from": robot, "text": text}));
    }
    for content in media() {
        let mut content = content;
        content["from"] = robot.clone();
        scene.sends(BOB + 1, "Robot", content);
    }
    scene.catch_up();
    assert_eq!(scene.tokens(), NOTHING);
    assert_eq!(scene.api.count("sendMessage"), 0);
}

// --- who may register ---

#[test]
fn registration_by_password() {
    let scene = Scene::with(by_password);
    // Strangers learn how, whatever they write; nobody is registered by it.
    let strangers = chats(&[
        "hi",
        "/start",
        "help",
        "/start sensor1",
        "register",
        "registering",
        "please register me",
    ]);
    for (chat, text) in &strangers {
        scene.writes(*chat, "Stranger", text);
    }
    scene.sends(FIRST + 50, "Stranger", json!({"sticker": {"file_id": "x"}}));
    let wrong = [
        "register wrong".to_string(),
        format!("register {}", PASSWORD.to_uppercase()),
        format!("register {PASSWORD}x"),
        format!("/register@lab_bot {}", &PASSWORD[1..]),
    ];
    let mut ids = Vec::new();
    let wrong: Vec<(i64, &String)> = (FIRST + 100..).zip(&wrong).collect();
    for (chat, text) in &wrong {
        ids.push((chat.to_string(), scene.writes(*chat, "Stranger", text)));
    }
    // `config` with the password works and registers nobody.
    let owner = FIRST + 200;
    let text = format!("config {PASSWORD} interval 7");
    ids.push((owner.to_string(), scene.writes(owner, "Owner", &text)));
    scene.catch_up();
    assert_eq!(scene.tokens(), "i7");
    for (chat, text) in strangers {
        let answers = scene.answers(chat);
        assert!(
            answers.contains("register <password>"),
            "{text:?}: {answers:?}"
        );
        assert!(!answers.contains(REGISTERED), "{text:?}: {answers:?}");
    }
    let answers = scene.answers(FIRST);
    assert!(answers.contains(HOW_TO_REGISTER), "{answers:?}");
    for (chat, text) in wrong {
        let answers = scene.answers(chat);
        assert!(answers.contains(WRONG_PASSWORD), "{text:?}: {answers:?}");
    }
    assert!(scene.answers(owner).contains("set to 7"));
    // Who knows the password registers, however the other word is spelt.
    let right = chats(&[
        "register {P}",
        "Register {P}",
        "/register {P}",
        "/register@lab_bot {P}",
        "\u{200b}register {P}",
        "register:  {P} ",
    ]);
    for (chat, text) in &right {
        let text = text.replace("{P}", PASSWORD);
        ids.push((chat.to_string(), scene.writes(*chat, "Friend", &text)));
    }
    scene.catch_up();
    let tokens = scene.tokens();
    let mut failed = Vec::new();
    for (chat, text) in &right {
        if !tokens.contains(&format!(":{chat}")) || !scene.answers(*chat).contains(REGISTERED) {
            failed.push(format!("{text:?}: {:?}", scene.answers(*chat)));
        }
    }
    assert_none(&failed);
    let mut deleted = scene.api.seen().deleted;
    for (chat, id) in &ids {
        let is_it = |it: &(String, i64)| (&it.0, it.1) == (chat, *id);
        assert!(deleted.iter().any(is_it), "{chat} {id} stays");
    }
    deleted.retain(|it| !ids.contains(it));
    let only_the_word = deleted
        .iter()
        .all(|(chat, _)| chat == &(FIRST + 4).to_string());
    assert!(only_the_word, "{deleted:?}");
    // Nobody who left comes back by a text alone.
    scene.writes(FIRST, "Friend", "remove me");
    scene.writes(FIRST, "Friend", "hi again");
    scene.catch_up();
    assert!(!scene.tokens().contains(&format!(":{FIRST}")));
    scene.gateway.assert_no_secret();
}

/// The help says what is possible in the mode that is set.
#[test]
fn the_help_fits_the_mode() {
    let modes: [(&str, bool); 2] = [("open", false), ("password", true)];
    in_parallel(&modes, |wants_password| {
        let scene = Scene::with(|setup| match wants_password {
            true => by_password(setup),
            false => setup,
        });
        scene.writes(ADA, "Ada", "help");
        scene.writes(BOB, "Bob", &format!("register {PASSWORD}"));
        scene.catch_up();
        let help = scene.answers(ADA);
        for part in [
            "config <password> interval",
            "config <password> feedback",
            "config <password> remove",
        ] {
            assert!(help.contains(part), "{part:?} in {help:?}");
        }
        assert_eq!(
            help.contains("register <password>"),
            *wants_password,
            "{help:?}"
        );
        // Where anybody registers, `register` is a word like any other.
        let is_deleted = !scene.api.seen().deleted.is_empty();
        assert_eq!(is_deleted, *wants_password);
        assert!(scene.tokens().contains("Bob:2345678901"));
    });
}

// --- the owner keeps control ---

/// A scene with so many strangers on the list.
fn with_strangers(count: i64) -> Scene {
    let scene = Scene::new();
    for number in 0..count {
        scene.writes(FIRST + number, &format!("User{number}"), "hi");
    }
    scene.catch_up();
    scene
}

#[test]
fn a_full_list_locks_nobody_out() {
    let scene = with_strangers(10);
    scene.writes(ADA, "Ada", &format!("config {PASSWORD} interval 7"));
    scene.catch_up();
    let answers = scene.answers(ADA);
    assert!(answers.contains("set to 7"), "{answers:?}");
    assert!(!scene.tokens().contains("1234567890"), "no place was left");
    let id = scene.writes(ADA, "Ada", &format!("config {PASSWORD} remove User3"));
    scene.writes(ADA, "Ada", "hi");
    scene.catch_up();
    let gone = FIRST + 3;
    let answers = scene.answers(ADA);
    assert!(
        answers.contains(&format!("User3 ({gone}) is removed.")),
        "{answers:?}"
    );
    assert!(answers.contains(REGISTERED), "{answers:?}");
    let told = scene.api.texts_to(gone).pop().unwrap();
    assert!(
        told.contains(REMOVED) && told != REMOVED,
        "by whom: {told:?}"
    );
    let tokens = scene.tokens();
    assert!(tokens.starts_with(&format!("r{gone};i7;")), "{tokens}");
    assert!(tokens.ends_with("Ada:1234567890"), "{tokens}");
    assert!(scene.api.seen().deleted.contains(&(ADA.to_string(), id)));
    let form = message(&scene.api, &gone.to_string(), "not any more");
    scene
        .mote()
        .post_separate("message", form)
        .expect_code("2.05");
    assert!(!scene.answers(gone).contains("not any more"));
}

#[test]
fn the_owner_removes_by_name_and_by_id() {
    let scene = Scene::new();
    for (chat, name) in [
        (FIRST, "Anna Maria"),
        (FIRST + 1, "Bob"),
        (FIRST + 2, "Zoë"),
        (FIRST + 3, "Cyd"),
        (FIRST + 4, "all"), // for the firmware it is called otherwise
    ] {
        scene.writes(chat, name, "hi");
    }
    scene.catch_up();
    let tokens = scene.tokens();
    let names: Vec<&str> = tokens
        .split(';')
        .map(|token| token.split(':').next().unwrap())
        .collect();
    let removed = [
        (0, names[0].to_string()),
        (1, (FIRST + 1).to_string()),
        (2, names[2].to_string()),
        (4, names[4].to_string()),
    ];
    for (_, who) in &removed {
        scene.writes(ADA, "Ada", &format!("config {PASSWORD} remove {who}"));
    }
    // Of nobody, and with a wrong password, nothing changes.
    for unknown in ["Eve", "Cy", "Cyd2"] {
        scene.writes(ADA, "Ada", &format!("config {PASSWORD} remove {unknown}"));
    }
    scene.writes(BOB, "Bob", "config wrong remove Cyd");
    scene.catch_up();
    let answers = scene.answers(ADA);
    for (number, who) in removed {
        let chat = FIRST + number as i64;
        let said = format!("{} ({chat}) is removed.", names[number]);
        assert!(answers.contains(&said), "{who:?}: {answers:?}");
        let told = scene.answers(chat);
        assert!(told.contains(REMOVED), "{who:?}: {told:?}");
        assert!(!scene.tokens().contains(&format!(":{chat}")), "{who:?}");
    }
    assert!(answers.contains("Nobody is registered"), "{answers:?}");
    assert!(scene.answers(BOB).contains(WRONG_PASSWORD));
    assert!(scene.tokens().contains(&format!("Cyd:{}", FIRST + 3)));
}

/// One count for `config` and `register`, for each chat.
#[test]
fn the_lock_out_is_shared() {
    let scene = Scene::with(by_password);
    let tables = chats(&[
        ["config wrong interval 5"; 5],
        ["register wrong"; 5],
        [
            "register wrong",
            "config wrong interval 5",
            "register wrong",
            "config wrong feedback 1",
            "/register@lab_bot wrong",
        ],
        [
            "config wrong remove Ada",
            "config wrong interval 5",
            "config wrong feedback 0",
            "register wrong",
            "config wrong remove 5",
        ],
    ]);
    for (chat, texts) in &tables {
        for text in texts {
            scene.writes(*chat, "Thief", text);
        }
        scene.writes(*chat, "Thief", &format!("register {PASSWORD}"));
        scene.writes(*chat, "Thief", &format!("config {PASSWORD} interval 9"));
    }
    // Four are not five.
    for _ in 0..4 {
        scene.writes(ADA, "Ada", "register wrong");
    }
    scene.writes(ADA, "Ada", &format!("register {PASSWORD}"));
    scene.writes(ADA, "Ada", "register wrong");
    scene.writes(ADA, "Ada", &format!("config {PASSWORD} feedback 1"));
    scene.catch_up();
    assert_eq!(scene.tokens(), "f1;Ada:1234567890");
    for (chat, texts) in tables {
        assert!(!scene.answers(chat).contains("set to"), "{texts:?}");
    }
}

/// Of those who are locked out, the one of longest ago is forgotten first, not the one with the lowest id.
#[test]
fn the_oldest_suspect_is_forgotten() {
    let scene = Scene::new();
    let wrong = "config wrong interval 5";
    for number in 0..256 {
        scene.writes(FIRST + number, "Thief", wrong);
    }
    let low = 1_000_000_000;
    for _ in 0..5 {
        scene.writes(low, "Low", wrong);
    }
    for number in 256..266 {
        scene.writes(FIRST + number, "Thief", wrong);
    }
    scene.writes(low, "Low", &format!("config {PASSWORD} interval 9"));
    scene.catch_up();
    assert!(!scene.tokens().contains("i9"), "{}", scene.tokens());
}

// --- names ---

/// Names that change owners between two polls made the mote hold one twice and another one never.
#[test]
fn names_are_kept() {
    let scene = Scene::new();
    let names = [
        "Ada", "Bob", "Cyd", "Dee", "Eve", "Fay", "Guy", "Hal", "Ida", "Jim",
    ];
    for (chat, name) in chats(&names) {
        scene.writes(chat, name, "hi");
    }
    scene.catch_up();
    let mote = scene.mote();
    let mut firmware = Firmware::default();
    let first = poll(&mote, &scene.api);
    firmware.take(&first);
    let before = firmware.users();
    let renamed = [
        (0, "Zed"),
        (1, "Ada"),
        (0, "Bob"),
        (2, "Dee"),
        (3, "Cyd"),
        (9, "all"),
        (4, ""),
        (5, "5"),
    ];
    for (number, name) in renamed {
        scene.writes(FIRST + number, name, "still me");
    }
    scene.catch_up();
    let second = scene.tokens();
    firmware.take(&second);
    assert_eq!(second, first, "a name is given once");
    assert_eq!(firmware.users(), before);
    // Until he leaves.
    scene.writes(FIRST, "Bob", "remove me");
    scene.writes(FIRST, "Zed", "hi");
    scene.catch_up();
    let third = scene.tokens();
    assert!(third.contains(&format!("Zed:{FIRST}")), "{third}");
    assert!(third.contains(&format!("Bob:{}", FIRST + 1)), "{third}");
}

/// Nothing of a name is invisible, or turns round what stands behind it.
#[test]
fn names_can_be_seen() {
    let scene = Scene::new();
    let cases = chats(&[
        "\u{200b}",
        "\u{202e}abc",
        "A\u{200d}da",
        "\u{2066}Ada\u{2069}",
        "\u{3164}",
        "\u{ad}\u{2060}",
        "\u{feff}Bob",
        "\u{e0041}\u{e0042}",
        "\u{180e}\u{61c}Cyd",
        "\u{2800}",
    ]);
    for (chat, name) in &cases {
        scene.writes(*chat, name, "hi");
    }
    scene.catch_up();
    let tokens = scene.tokens();
    let mut wrong = Vec::new();
    for (token, (chat, given)) in tokens.split(';').zip(&cases) {
        let (name, id) = token.split_once(':').unwrap();
        assert_eq!(id, chat.to_string());
        let is_invisible = |c: char| {
            matches!(c, '\u{ad}' | '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{180e}' | '\u{200b}'..='\u{200f}'
                | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{2800}' | '\u{3164}' | '\u{feff}'
                | '\u{ffa0}' | '\u{e0000}'..='\u{e0fff}')
        };
        if name.trim().is_empty() || name.contains(is_invisible) {
            wrong.push(format!("{given:?}: {name:?}"));
        }
    }
    assert_none(&wrong);
}

// --- a conversation ---

/// Somebody who writes as soon as he was answered waits about 4 s each time, whoever else does what.
#[test]
fn a_conversation() {
    type Meanwhile = fn(&Scene);
    let cases: [(&str, Meanwhile); 3] = [
        ("alone", |_| {}),
        ("a mote polls", |scene| {
            let _ = poll(&scene.mote(), &scene.api);
        }),
        ("a stranger writes, too", |scene| {
            scene.writes(FIRST, "Stranger", "hello?");
        }),
    ];
    in_parallel(&cases, |meanwhile| {
        let api = BotApi::start();
        api.person_writes(ADA, "Ada", "hi");
        let gateway = Gateway::with(Setup::ipv4(&api));
        let scene = Scene::of(api, gateway);
        let is_answered = |count: usize, limit: Duration| {
            let end = Instant::now() + limit;
            let mut next = Instant::now() + Duration::from_secs(1);
            while Instant::now() < end {
                let done = |seen: &Seen| seen.texts_to(ADA).len() > count;
                if scene.api.wait_until(Duration::from_millis(50), done) {
                    return true;
                }
                if Instant::now() >= next {
                    meanwhile(&scene);
                    next += Duration::from_secs(1);
                }
            }
            false
        };
        assert!(is_answered(0, Duration::from_secs(5)), "the greeting");
        for turn in 1..=3 {
            let texts = ["help", "what is this?", "thank you"];
            let start = Instant::now();
            scene.writes(ADA, "Ada", texts[turn - 1]);
            let is_in_time = is_answered(turn, Duration::from_millis(5500)); // not the next but one
            println!("turn {turn}: {:.1?}", start.elapsed());
            assert!(is_in_time, "turn {turn}: {:?}", scene.api.texts_to(ADA));
        }
    });
}

/// After a page with messages the own fetches come in 3, 6, 12 and 15 s.
#[test]
#[ignore = "takes a minute"]
fn the_pace_of_fetches() {
    let scene = Scene::new();
    let start = Instant::now();
    scene.writes(ADA, "Ada", "hi");
    let is_heard = |seen: &Seen| !seen.texts_to(ADA).is_empty();
    assert!(scene.api.wait_until(Duration::from_secs(17), is_heard));
    std::thread::sleep(Duration::from_secs(44));
    let calls = scene.api.seen().calls("getUpdates");
    let mut gaps = Vec::new();
    for pair in calls.windows(2) {
        let gap = pair[1].at - pair[0].at;
        if pair[0].at > start && gap > Duration::from_secs(1) {
            gaps.push(gap.as_secs()); // not less, and up to a second more
        }
    }
    assert_eq!(gaps[..4], [3, 6, 12, 15], "{gaps:?}");
}

// --- the very first start ---

/// What waits at Telegram is carried out in its order: the result is what people asked for last.
#[test]
fn what_was_written_before_the_first_start() {
    let api = BotApi::start();
    api.set_date(1_700_000_000);
    for (chat, name, text) in [
        (ADA, "Ada", "hi"),
        (ADA, "Ada", "remove me"),
        (BOB, "Bob", "remove me"),
        (BOB, "Bob", "hi again"),
        (BOB, "Bob", &format!("config {PASSWORD} interval 5")),
        (BOB, "Bob", &format!("config {PASSWORD} interval 6")),
    ] {
        api.person_writes(chat, name, text);
    }
    let gateway = Gateway::with(Setup::ipv4(&api));
    let scene = Scene::of(api, gateway);
    scene.catch_up();
    assert_eq!(scene.tokens(), "r1234567890;i6;Bob:2345678901");
}

/// A list that is full says so, also to who knows the password.
#[test]
fn a_full_list_is_full() {
    let scene = Scene::with(by_password);
    for number in 0..11 {
        let text = format!("register {PASSWORD}");
        scene.writes(FIRST + number, &format!("User{number}"), &text);
    }
    scene.catch_up();
    let answers = scene.answers(FIRST + 10);
    assert!(answers.contains(IS_FULL), "{answers:?}");
    assert_eq!(scene.tokens().split(';').count(), 10);
}
