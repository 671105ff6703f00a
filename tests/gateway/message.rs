//! POST /message: forms, deliveries, and everything that Telegram and the network can do to them.

use std::thread;
use std::time::{Duration, Instant};

use crate::support::*;
use serde_json::json;

const SENT: &str = "Messages sent successfully";
const MISSING: &str = "Missing required fields";
/// Every request is answered within 9 s, whatever Telegram does; the rest is the machine's.
const LIMIT: Duration = Duration::from_millis(9200);

/// The log's lines that tell of something wrong, that of a request answered 5.00 included.
fn warnings(gateway: &Gateway) -> Vec<String> {
    // What belongs to a request is done when the next datagram is answered.
    assert!(Mote::new(gateway.address()).ping(PATIENCE));
    let log = gateway.log();
    let wrong = |line: &&str| line.contains("[WARN]") || line.contains("[ERROR]");
    log.lines().filter(wrong).map(str::to_string).collect()
}

// --- the firmware ---

/// Row 27: the datagrams of the unmodified firmware. It names api.telegram.org, to which a proxy leads the gateway.
#[test]
fn datagrams_of_the_firmware() {
    let api = BotApi::with(BotApiOptions {
        names: vec!["api.telegram.org".into()],
        ..BotApiOptions::default()
    });
    let proxy = Proxy::start("api.telegram.org:443", api.address());
    let setup = Setup::new(&api)
        .config(&format!("[telegram]\nbot_token = {TOKEN}\n"))
        .env("HTTPS_PROXY", proxy.url());
    let gateway = Gateway::with(setup);
    let mote = Mote::new(gateway.address());
    let exchange = |name: &str| {
        let request = Message::decode(&firmware(name)).unwrap();
        mote.send_raw(&firmware(name));
        let [high, low] = request.id.to_be_bytes();
        let acknowledgement = mote.receive_raw(PATIENCE);
        assert_eq!(acknowledgement, Some(vec![0x60, 0, high, low]), "{name}");
        let response = mote.response(&request);
        mote.acknowledge(&response);
        response
    };
    exchange("message_all_three_chats").expect("2.05", SENT);
    exchange("message_all_two_chats").expect("2.05", SENT);
    exchange("message_one_chat_text_with_separators").expect("2.05", SENT);
    let (temperature, pump) = ("CPU Temperature: 25.00 °C", "pump on; A=1&B=2");
    assert_eq!(api.texts_to(1_111_111_111), ["x", temperature, pump]);
    assert_eq!(api.texts_to(2_222_222_222_i64), ["x", temperature]);
    assert_eq!(api.texts_to(5_555_555_555_i64), ["x"]);
    exchange("update").expect("2.03", "No Updates");
    let asked = proxy.asked();
    assert!(
        asked.iter().all(|host| host == "api.telegram.org:443"),
        "{asked:?}"
    );
}

// --- forms ---

/// What follows `url={U}&token={T}&`, the chats that it is sent to, and the text.
const FORMS: [(&str, &str, &str); 13] = [
    ("chat_ids=5&text=hello", "5", "hello"),
    ("text=hello&chat_ids=5", "5", "hello"),
    // Only known keys separate.
    ("chat_ids=5&text=a&b=c%20d+e;f=g", "5", "a&b=c%20d+e;f=g"),
    ("text=1 & 2&x=&texts=3&chat_ids=5", "5", "1 & 2&x=&texts=3"),
    ("chat_ids=5&text=url=x, text=y", "5", "url=x, text=y"),
    // Padding and white space.
    ("chat_ids=5&text=hello\n\0\0\0", "5", "hello"),
    ("chat_ids= 5\n&text= \n two\nlines \n", "5", "two\nlines"),
    ("chat_ids=5&text=25.00 °C 🙂", "5", "25.00 °C 🙂"),
    ("chat_ids=5&text=\"a\" \\ {b}", "5", "\"a\" \\ {b}"),
    // Chats.
    ("chat_ids=5, 6 ,,7,&text=x", "5 6 7", "x"),
    ("chat_ids=5,6,5,5&text=x", "5 6", "x"),
    ("chat_ids=-123,@news&text=x", "-123 @news", "x"),
    (
        "chat_ids=1,2,3,4,5,6,7,8,9,10&text=x",
        "1 10 2 3 4 5 6 7 8 9",
        "x",
    ),
];

const INCOMPLETE: [&str; 16] = [
    "",
    "\0\0\0",
    "nonsense",
    "url={U}&token={T}&chat_ids=5",
    "url={U}&token={T}&text=x",
    "url={U}&chat_ids=5&text=x",
    "token={T}&chat_ids=5&text=x",
    "url=&token={T}&chat_ids=5&text=x",
    "url={U}&token=&chat_ids=5&text=x",
    "url={U}&token={T}&chat_ids=&text=x",
    "url={U}&token={T}&chat_ids= ,, &text=x",
    "url={U}&token={T}&chat_ids=5&text=",
    "url={U}&token={T}&chat_ids=5&text= \n\0",
    "URL={U}&TOKEN={T}&CHAT_IDS=5&TEXT=x",
    "xurl={U}&token={T}&chat_ids=5&text=x",
    "url = {U}&token={T}&chat_ids=5&text=x",
];

#[test]
fn forms() {
    let (api, gateway) = start();
    let full = |form: &str| form.replace("{U}", &api.url()).replace("{T}", TOKEN);
    let mote = Mote::new(gateway.address());
    for (form, chats, text) in FORMS {
        for whole in [
            format!("url={{U}}&token={{T}}&{form}"),
            format!("{}&url= {{U}} &token=\t{{T}}\0", form.trim_end()),
        ] {
            let before = api.seen().sent.len();
            mote.post_separate("message", full(&whole))
                .expect("2.05", SENT);
            let sent = api.seen().sent.split_off(before);
            let mut reached: Vec<&str> = sent.iter().map(|sent| sent.chat.as_str()).collect();
            reached.sort_unstable();
            assert_eq!(reached.join(" "), chats, "{whole:?}");
            assert!(sent.iter().all(|sent| sent.text == text), "{sent:?}");
        }
    }
    let calls = api.count("sendMessage");
    for form in INCOMPLETE {
        mote.post_piggybacked("message", full(form))
            .expect("4.00", MISSING);
    }
    let longer = "x".repeat(4097);
    for (chats, text) in [
        ("Ada", "x"),
        ("5,1x", "x"),
        ("5.5", "x"),
        ("@", "x"),
        ("99999999999999999999", "x"),
        ("1,2,3,4,5,6,7,8,9,10,11", "x"),
        ("5", longer.as_str()),
    ] {
        let response = mote.post_piggybacked("message", message(&api, chats, text));
        response.expect_code("4.00");
        let reason = response.text();
        assert!(!reason.is_empty() && reason != MISSING, "{chats}: {reason}");
    }
    assert_eq!(api.count("sendMessage"), calls, "nothing was sent");
}

/// Invalid UTF-8 is replaced in the text, and makes any other field wrong.
#[test]
fn invalid_utf8() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    let payload = [message(&api, "5", "25 ").as_bytes(), b"\xb0C"].concat();
    mote.post_separate("message", payload).expect("2.05", SENT);
    assert_eq!(api.texts_to(5), ["25 \u{fffd}C"]);
    let payload = [b"url=\xb0&".as_slice(), message(&api, "5", "x").as_bytes()].concat();
    let code = mote.post_piggybacked("message", payload).code();
    assert!(code == "4.00" || code == "4.03", "{code}");
}

/// Row 24: the mote never chooses where the gateway connects to, nor for which bot.
#[test]
fn other_urls_and_tokens() {
    let (api, gateway) = start();
    let other = BotApi::start();
    let mote = Mote::new(gateway.address());
    let known = api.seen().calls.len();
    let refused = |url: &str, token: &str| {
        let answer = mote.post_piggybacked("message", form(url, token, "5", "x"));
        answer.expect_code("4.03");
        assert!(!answer.text().contains(token), "{answer}");
        mote.post_piggybacked("update", format!("url={url}&token={token}"))
            .expect_code("4.03");
    };
    refused("http://127.0.0.1:1/bot", TOKEN);
    refused(&other.url(), TOKEN);
    refused("https://api.telegram.org/bot", TOKEN);
    refused(&api.url().replace("https", "http"), TOKEN);
    refused(&api.url().replace("/bot", "/"), TOKEN);
    refused(&format!("{}x", api.url()), TOKEN);
    for token in [
        TOKEN.replace('a', "b"),
        TOKEN[..TOKEN.len() - 1].to_string(),
        format!("{TOKEN}a"),
    ] {
        refused(&api.url(), &token);
        assert!(!gateway.log().contains(&token[..token.len() - 2]));
    }
    assert_eq!(other.seen().connections, 0, "no connection made");
    assert_eq!(api.calls_after(known).len(), 0);
}

// --- delivery ---

/// What Telegram is asked: the chat and the text as it is, without any formatting.
#[test]
fn the_call() {
    let (api, gateway) = start();
    Mote::new(gateway.address())
        .post_separate("message", message(&api, "5", "<b>*x*</b>"))
        .expect("2.05", SENT);
    let call = &api.seen().calls("sendMessage")[0];
    let chat = call.body["chat_id"].to_string();
    assert_eq!((call.token.as_str(), chat.trim_matches('"')), (TOKEN, "5"));
    assert_eq!(call.body["text"], json!("<b>*x*</b>"));
    assert_eq!(call.body.get("parse_mode"), None);
}

const THREE: &str = "1,2,3";
const TEN: &str = "1,2,3,4,5,6,7,8,9,10";

/// Sends one text, and asserts how many round trips it takes.
#[track_caller]
fn assert_trips(api: &BotApi, mote: &Mote, name: &str, chats: &str, trips: u32) {
    let trip = Duration::from_millis(300);
    api.set_round_trip(trip);
    let start = Instant::now();
    mote.post_separate("message", message(api, chats, name))
        .expect("2.05", SENT);
    let taken = start.elapsed();
    let expected = trip * trips..trip * (trips + 1);
    assert!(
        expected.contains(&taken),
        "{name}: {taken:?} with {trip:?} for a round trip"
    );
}

/// With open connections a message costs one round trip to however many chats, without them three.
#[test]
fn round_trips() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    assert_trips(&api, &mote, "the first one", "1", 1);
    assert_trips(&api, &mote, "three chats, cold", THREE, 3);
    assert_trips(&api, &mote, "two chats, warm", "1,2", 1);
    assert_trips(&api, &mote, "three chats, warm", THREE, 1);
    assert_trips(&api, &mote, "ten chats, cold", TEN, 3);
    assert_trips(&api, &mote, "ten chats, warm", TEN, 1);
}

/// Row 25b, and that a connection which has been idle for 50 s is not used.
#[test]
#[ignore = "takes 76 s: cargo test message:: -- --ignored"]
fn round_trips_after_silence() {
    let cases = [
        ("one", ("1", 1)),
        ("two", ("1,2", 1)),
        ("three", (THREE, 1)),
        ("ten", (TEN, 3)),
    ];
    in_parallel(&cases, |(chats, trips)| {
        let (api, gateway) = start();
        let mote = Mote::new(gateway.address());
        mote.post_separate("message", message(&api, TEN, "before"))
            .expect("2.05", SENT);
        thread::sleep(Duration::from_secs(75));
        assert_trips(&api, &mote, "after 75 s", chats, *trips);
    });
}

#[test]
fn some_chats_refused() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    api.unknown_chat(404_404);
    mote.post_separate("message", message(&api, "5,404404", "x"))
        .expect("2.05", SENT);
    assert_eq!(api.texts_to(5), ["x"]);
    let told = warnings(&gateway).join("\n");
    assert!(
        told.contains("404404") && told.contains("chat not found"),
        "{told}"
    );
    mote.post_separate("message", message(&api, "404404", "x"))
        .expect("5.00", "");
    // Not found is not gone: the operator may have forgotten to write to the bot first.
    assert_eq!(api.count("sendMessage"), 3, "tried again");
}

/// A chat, what sending to it is answered with 403 (the Bot API's description, or a body as it stands here), and whether
/// that removes it.
const REFUSALS: &str = r#"
1000000001     | Forbidden: bot was blocked by the user                 | removed
1000000002     | Forbidden: user is deactivated                         | removed
1000000003     | Forbidden: bot can't initiate conversation with a user | removed
-1000000004    | Forbidden: bot was kicked from the group chat          |
-1001234567890 | Forbidden: bot is not a member of the supergroup chat  |
@news          | Forbidden: bot was blocked by the user                 |
1000000005     | <html>Blocked by policy</html>                         |
1000000006     | {}                                                     |
1000000007     | {"error":"forbidden"}                                  |
1000000008     | {"ok":false}                                           |
1000000009     | {"ok":true,"error_code":403}                           |
1000000010     | {"ok":false,"error_code":400,"description":"not found"} |
"#;

/// Which 403 removes a chat: only the Bot API's own, and only for a private chat.
#[test]
fn chats_that_refuse() {
    let api = BotApi::start();
    let mut gateway = Gateway::with(Setup::new(&api));
    let mote = Mote::new(gateway.address());
    let send = |chat: &str, code: &str| {
        mote.post_separate("message", message(&api, chat, "x"))
            .expect_code(code);
    };
    let mut removed = Vec::new();
    for row in REFUSALS.trim().lines() {
        let fields: Vec<&str> = row.split('|').map(str::trim).collect();
        let [chat, answer, removes] = fields[..] else {
            panic!("{row}");
        };
        let fault = match answer.starts_with(['<', '{']) {
            true => Fault::Answer(403, answer.to_string()),
            false => Fault::error(403, answer),
        };
        api.fail(next(1, "sendMessage").to(chat), fault);
        send(chat, "5.00");
        assert!(warnings(&gateway).join("\n").contains(chat), "{row}");
        removed.push((chat, !removes.is_empty()));
    }
    api.push_update(json!({})); // or Telegram holds the new life's first fetch for 3 s
    gateway.restart();
    for (chat, removed) in removed {
        send(chat, "2.05");
        assert_eq!(api.texts_to(chat).is_empty(), removed, "{chat}");
    }
    assert_eq!(poll(&mote, &api), "r1000000001;r1000000002;r1000000003");
    // A list with others in it is served for the others.
    send("1000000001,5,1000000002", "2.05");
    assert_eq!(api.texts_to(5), ["x"]);
}

/// A group that has become a supergroup: the log says its new id.
#[test]
fn a_group_that_migrated() {
    let (api, gateway) = start();
    let body = json!({"ok": false, "error_code": 400,
        "description": "Bad Request: group chat was upgraded to a supergroup chat",
        "parameters": {"migrate_to_chat_id": -1_001_234_567_890_i64}});
    api.fail(every("sendMessage"), Fault::Answer(400, body.to_string()));
    Mote::new(gateway.address())
        .post_separate("message", message(&api, "-4444", "x"))
        .expect("5.00", "");
    let told = warnings(&gateway).join("\n");
    assert!(
        told.contains("-4444") && told.contains("-1001234567890"),
        "{told}"
    );
}

// --- when things go wrong ---

type Break = fn(&BotApi);
/// What breaks, how many calls are made, and what the log says of it.
type Failure = (Break, usize, &'static [&'static str]);

fn answer(api: &BotApi, status: u16, body: &str) {
    api.fail(every(""), Fault::Answer(status, body.to_string()));
}

fn error(api: &BotApi, status: u16, description: &str) {
    api.fail(every(""), Fault::error(status, description));
}

const FAILURES: &[(&str, Failure)] = &[
    ("400", (|api| api.unknown_chat(5), 1, &["chat not found"])),
    (
        "401",
        (|api| error(api, 401, "Unauthorized"), 1, &["Unauthorized"]),
    ),
    (
        "404",
        (|api| error(api, 404, "Not Found"), 1, &["Not Found"]),
    ),
    (
        "429, longer than any clock",
        (
            |api| api.fail(every(""), Fault::too_many_requests(u64::MAX)),
            1,
            &["retry after 18446744073709551615"],
        ),
    ),
    (
        "429, 60 s",
        (
            |api| api.fail(every(""), Fault::too_many_requests(60)),
            1,
            &["retry after 60"],
        ),
    ),
    (
        "500",
        (|api| error(api, 500, "Internal: restart"), 1, &["restart"]),
    ),
    (
        "502, a page",
        (
            |api| answer(api, 502, "<html>Bad Gateway</html>"),
            1,
            &["502"],
        ),
    ),
    (
        "a router's page",
        (
            |api| answer(api, 200, "<html>Log in</html>"),
            1,
            &["HTTP 200", "proxy"],
        ),
    ),
    ("no object", (|api| answer(api, 200, "[true]"), 1, &[])),
    (
        "ok is text",
        (|api| answer(api, 200, r#"{"ok":"true"}"#), 1, &[]),
    ),
    (
        "not ok",
        (
            |api| {
                answer(
                    api,
                    200,
                    r#"{"ok":false,"error_code":1,"description":"nope"}"#,
                )
            },
            1,
            &["nope"],
        ),
    ),
    (
        "ok, but 500",
        (
            |api| answer(api, 500, r#"{"ok":true,"result":{}}"#),
            1,
            &["500"],
        ),
    ),
    (
        "the token in the description, cut in two",
        (
            |api| {
                let padding = "x".repeat(196 - TOKEN.len());
                error(api, 400, &format!("{TOKEN}{padding}{TOKEN}"));
            },
            1,
            &["400", "xxx"],
        ),
    ),
    (
        "not ok, no more",
        (|api| answer(api, 200, r#"{"ok":false}"#), 1, &[]),
    ),
    ("empty body", (|api| answer(api, 200, ""), 1, &[])),
    (
        "closed",
        (|api| api.fail(every(""), Fault::CloseUnanswered), 1, &[]),
    ),
    (
        "endless",
        (|api| api.fail(every(""), Fault::Giant(16 << 20)), 1, &[]),
    ),
    (
        "hang",
        (|api| api.fail(every(""), Fault::Hang), 1, &["time"]),
    ),
    (
        "drip",
        (
            |api| api.fail(every(""), Fault::Trickle(Duration::from_millis(200))),
            1,
            &["time"],
        ),
    ),
    (
        "other authority",
        (
            |api| {
                api.show(Certificate::OtherAuthority);
                api.close_connections();
            },
            0,
            &["localhost", "certificate", "SSL_CERT_FILE"],
        ),
    ),
    (
        "wrong name",
        (
            |api| {
                api.show(Certificate::WrongName);
                api.close_connections();
            },
            0,
            &["localhost", "certificate"],
        ),
    ),
    (
        "expired",
        (
            |api| {
                api.show(Certificate::Expired);
                api.close_connections();
            },
            0,
            &["localhost", "certificate"],
        ),
    ),
    (
        "no handshake",
        (
            |api| {
                api.fail_connections(usize::MAX, ConnectionFault::Hang);
                api.close_connections();
            },
            0,
            &["localhost", "time"],
        ),
    ),
    ("refused", (|api| api.refuse(), 0, &["localhost", "efused"])),
    (
        "the first reason of two",
        (
            |api| {
                api.fail(next(1, ""), Fault::too_many_requests(1));
                api.fail(every(""), Fault::CloseUnanswered);
            },
            2,
            &["retry after 1"],
        ),
    ),
];

/// Row 26: one message, what Telegram does, and what the log says about it.
#[test]
fn failures() {
    in_parallel(FAILURES, |(break_it, calls, words)| {
        let (api, gateway) = start();
        break_it(&api);
        let mote = Mote::new(gateway.address());
        let start = Instant::now();
        mote.post_separate("message", message(&api, "5", "x"))
            .expect("5.00", "");
        assert!(start.elapsed() < LIMIT, "took {:?}", start.elapsed());
        assert_eq!(api.count("sendMessage"), *calls, "calls");
        let told = warnings(&gateway);
        assert!((1..=2).contains(&told.len()), "one clear line: {told:#?}");
        for word in *words {
            assert!(told[0].contains(word), "{word:?} in {told:#?}");
        }
        assert!(mote.ping(PATIENCE));
    });
}

#[test]
fn no_name_server() {
    let api = BotApi::start();
    let url = "https://no-such-host.invalid/bot";
    let config = format!("[telegram]\nbot_token = {TOKEN}\nurl = {url}\n");
    let gateway = Gateway::with(Setup::new(&api).config(&config));
    let start = Instant::now();
    Mote::new(gateway.address())
        .post_separate("message", form(url, TOKEN, "5", "x"))
        .expect("5.00", "");
    assert!(start.elapsed() < LIMIT, "took {:?}", start.elapsed());
    let told = warnings(&gateway).join("\n");
    assert!(told.contains("no-such-host.invalid"), "{told}");
}

const OK: &str = r#"{"ok":true,"result":{}}"#;

/// What a server may answer, and what it comes to: 2.05 if it says that the text is delivered. {OK} stands for that.
const ODDITIES: &[(&str, &str)] = &[
    ("HTTP/1.1 200 OK\r\nContent-Length: 23\r\n\r\n{OK}", "2.05"),
    (
        "HTTP/1.1 200 OK\r\nContent-Length: 23\r\n\r\n{OK}HTTP/1.1 500 No\r\n\r\n",
        "2.05",
    ),
    ("HTTP/1.1 200\r\nContent-Length: 23\r\n\r\n{OK}", "2.05"),
    ("HTTP/1.1 200 OK\r\n\r\n{OK}", "2.05"),
    ("HTTP/1.0 200 OK\r\n\r\n{OK}", "2.05"),
    ("HTTP/1.0 200 OK\r\nContent-Length: 23\r\n\r\n{OK}", "2.05"),
    (
        "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 23\r\n\r\n{OK}",
        "2.05",
    ),
    (
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n17\r\n{OK}\r\n0\r\n\r\n",
        "2.05",
    ),
    (
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n999\r\n{OK}",
        "5.00",
    ),
    (
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n{OK}\r\n0\r\n\r\n",
        "5.00",
    ),
    (
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n{OK}",
        "5.00",
    ),
    ("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{OK}", "5.00"),
    ("HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{OK}", "5.00"),
    ("HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n{OK}", "5.00"),
    (
        "HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n{OK}",
        "5.00",
    ),
    (
        "HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 9\r\n\r\n\u{1f}x\u{8}xxxxxx",
        "5.00",
    ),
    (
        "HTTP/1.1 200 OK\r\nContent-Length: 26\r\n\r\n\u{feff}{OK}",
        "5.00",
    ),
    (
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n{OK}",
        "5.00",
    ),
    ("HTTP/1.1 204 No Content\r\n\r\n", "5.00"),
    ("HTTP/1.1 304 Not Modified\r\n\r\n", "5.00"),
    (
        "HTTP/1.1 201 Created\r\nContent-Length: 23\r\n\r\n{OK}",
        "5.00",
    ),
    ("HTTP/1.1 999 What\r\nContent-Length: 0\r\n\r\n", "5.00"),
    ("HTTP/1.1 20 OK\r\nContent-Length: 23\r\n\r\n{OK}", "5.00"),
    ("HTTP/1.1 abc\r\n\r\n{OK}", "5.00"),
    ("HTTP/9.9 200 OK\r\nContent-Length: 23\r\n\r\n{OK}", "5.00"),
    (
        "HTTP/1.1 200 OK\r\nno colon\r\nContent-Length: 23\r\n\r\n{OK}",
        "5.00",
    ),
    ("HTTP/1.1 200 OK\r\nX: \0\r\n\r\n{OK}", "5.00"),
    ("HTTP/1.1 200 OK\r\nContent-Le", "5.00"),
    ("HTTP/1.1 401 Unauthorized\r\n\r\n", "5.00"),
    (
        "HTTP/1.1 301 Moved\r\nLocation: {ELSEWHERE}\r\nContent-Length: 0\r\n\r\n",
        "5.00",
    ),
    (
        "HTTP/1.1 303 Moved\r\nLocation: {ELSEWHERE}\r\nContent-Length: 0\r\n\r\n",
        "5.00",
    ),
    (
        "HTTP/1.1 307 Moved\r\nLocation: {ELSEWHERE}\r\nContent-Length: 0\r\n\r\n",
        "5.00",
    ),
    (
        "HTTP/1.1 308 Moved\r\nLocation: {ELSEWHERE}\r\nContent-Length: 23\r\n\r\n{OK}",
        "5.00",
    ),
    ("SSH-2.0-OpenSSH_9.2\r\n", "5.00"),
    ("\r\n\r\n\r\n", "5.00"),
    ("", "5.00"),
];

/// Answers that are not worth reading whole: what stands before {OK}, how often, and what it comes to.
const HUGE: &[(&str, usize, &str)] = &[
    ("HTTP/1.1 200 OK\r\n\r\n| |{OK}", 60 << 10, "2.05"),
    ("HTTP/1.1 200 OK\r\n\r\n| |{OK}", 65 << 10, "5.00"),
    ("HTTP/1.1 200 OK\r\n\r\n|[|{OK}", 60 << 10, "5.00"),
    ("HTTP/1.1 200 OK\r\n\r\n|{\"a\":|{OK}", 10 << 10, "5.00"),
    (
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n|1\r\n \r\n|17\r\n{OK}\r\n0\r\n\r\n",
        100 << 10,
        "5.00",
    ),
    ("HTTP/1.1 200 OK\r\nX: |x|\r\n\r\n{OK}", 1 << 20, "5.00"),
    ("HTTP/1.1 200 OK\r\n|X: x\r\n|\r\n{OK}", 100 << 10, "5.00"),
    (
        "|HTTP/1.1 100 Continue\r\n\r\n|HTTP/1.1 500 No\r\n\r\n",
        100 << 10,
        "5.00",
    ),
];

/// HTTP as nobody should speak it: the named answer, one line in the log, and the next request is served.
#[test]
fn http_oddities() {
    let (api, gateway) = start();
    let other = BotApi::start();
    let elsewhere = format!("{}{TOKEN}/sendMessage", other.url());
    let huge = HUGE.iter().map(|(shape, times, code)| {
        let mut parts = shape.split('|');
        let mut part = || parts.next().unwrap();
        (part().to_string() + &part().repeat(*times) + part(), *code)
    });
    let plain = ODDITIES
        .iter()
        .map(|(text, code)| (text.to_string(), *code));
    let mote = Mote::new(gateway.address());
    for (text, code) in plain.chain(huge) {
        let short: String = text.chars().take(150).collect();
        let text = text.replace("{OK}", OK).replace("{ELSEWHERE}", &elsewhere);
        api.fail(next(1, "sendMessage"), Fault::Bytes(text.into_bytes()));
        let (calls, told) = (api.count("sendMessage"), warnings(&gateway).len());
        let start = Instant::now();
        let response = mote.post_separate("message", message(&api, "5", "x"));
        assert!(start.elapsed() < LIMIT, "{short:?}");
        assert_eq!(response.code(), code, "{short:?}");
        assert_eq!(api.count("sendMessage"), calls + 1, "{short:?}");
        let lines = warnings(&gateway).split_off(told);
        let expected = usize::from(code == "5.00");
        assert!(
            (expected..=2 * expected).contains(&lines.len()),
            "{lines:?}"
        );
    }
    mote.post_separate("message", message(&api, "5", "after all"))
        .expect("2.05", SENT);
    assert_eq!(api.texts_to(5), ["after all"]);
    assert_eq!(other.seen().connections, 0, "no redirect was followed");
}

/// Where a request surely did not reach Telegram, it is sent again; each text arrives once.
#[test]
fn retries() {
    let cases: [(&str, Break); 5] = [
        ("closed after the answer", |api| {
            api.fail(next(1, "sendMessage"), Fault::CloseAnswered)
        }),
        ("idle connections closed", |_| {}),
        ("closed in the handshake", |api| {
            api.fail_connections(1, ConnectionFault::Close)
        }),
        ("429, 1 s", |api| {
            api.fail(next(2, "sendMessage").to(6), Fault::too_many_requests(1))
        }),
        ("429, 1 s, all chats", |api| {
            api.fail(next(3, "sendMessage"), Fault::too_many_requests(1))
        }),
    ];
    in_parallel(&cases, |break_it| {
        let (api, gateway) = start();
        break_it(&api);
        let mote = Mote::new(gateway.address());
        for text in ["first", "second"] {
            mote.post_separate("message", message(&api, "5,6,7", text))
                .expect("2.05", SENT);
            api.close_connections();
        }
        for chat in [5, 6, 7] {
            assert_eq!(api.texts_to(chat), ["first", "second"], "{chat}");
        }
    });
}

/// What fails for one chat is not tried again where the text may have arrived, and takes nothing from the others.
#[test]
fn one_chat_of_three_fails() {
    let cases = [
        ("hang", (Fault::Hang, "time")),
        ("closed", (Fault::CloseUnanswered, "closed")),
        (
            "429, 60 s",
            (Fault::too_many_requests(60), "retry after 60"),
        ),
    ];
    in_parallel(&cases, |(fault, word)| {
        let (api, gateway) = start();
        api.fail(every("sendMessage").to(6666), fault.clone());
        let start = Instant::now();
        Mote::new(gateway.address())
            .post_separate("message", message(&api, "5,6666,7", "x"))
            .expect("2.05", SENT);
        let hangs = matches!(fault, Fault::Hang);
        let limit = if hangs { LIMIT } else { Duration::from_secs(2) };
        assert!(start.elapsed() < limit, "took {:?}", start.elapsed());
        assert_eq!(api.count("sendMessage"), 3, "one for each");
        assert_eq!([api.texts_to(5), api.texts_to(7)], [["x"], ["x"]]);
        let told = warnings(&gateway).join("\n");
        assert!(told.contains("6666") && told.contains(word), "{told}");
    });
}

/// Telegram goes away and comes back; the gateway needs no help.
#[test]
fn an_outage() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    let send = |text: &str| {
        mote.post_separate("message", message(&api, "5", text))
            .code()
    };
    assert_eq!(send("before"), "2.05");
    api.refuse();
    assert_eq!(send("meanwhile"), "5.00");
    api.accept_again();
    assert_eq!(send("after"), "2.05");
    assert_eq!(api.texts_to(5), ["before", "after"]);
}

/// What finished requests leave behind: no thread, no connection beyond those kept for the next one.
#[test]
fn nothing_is_left_behind() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    let idle = gateway.threads();
    for number in 0..200 {
        mote.post_separate("message", message(&api, "1,2,3,4,5", &number.to_string()))
            .expect("2.05", SENT);
    }
    let ended = within(Duration::from_secs(2), || gateway.threads() <= idle);
    assert!(ended, "{} threads, {idle} before", gateway.threads());
    let files = gateway.open_files();
    assert!(files < 40, "{files} open files");
    assert_eq!(api.seen().sent.len(), 1000);
}
