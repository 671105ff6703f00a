//! POST /message: forms, deliveries, and everything that Telegram and the network can do to them.

use std::net::Ipv4Addr;
use std::thread;
use std::time::{Duration, Instant};

use crate::support::*;
use serde_json::json;

const MISSING: &str = "Missing required fields";

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

const INCOMPLETE: [&str; 13] = [
    "",
    "\0\0\0",
    "nonsense",
    "url={U}&token={T}&chat_ids=5",
    "url={U}&chat_ids=5&text=x",
    "token={T}&chat_ids=5&text=x",
    "url=&token={T}&chat_ids=5&text=x",
    "url={U}&token=&chat_ids=5&text=x",
    "url={U}&token={T}&chat_ids=5&text=",
    "url={U}&token={T}&chat_ids=5&text= \n\0",
    "URL={U}&TOKEN={T}&CHAT_IDS=5&TEXT=x",
    "xurl={U}&token={T}&chat_ids=5&text=x",
    "url = {U}&token={T}&chat_ids=5&text=x",
];

/// So it is at each boot of a mote without built-in users.
const WITHOUT_CHATS: [&str; 3] = ["", "chat_ids=&", "chat_ids= ,, &"];

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
    for chats in WITHOUT_CHATS {
        let form = format!("url={{U}}&token={{T}}&{chats}text=x");
        mote.post_piggybacked("message", full(&form))
            .expect("4.00", "No chat ids: nobody is registered yet");
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
    let trip = Duration::from_millis(1200);
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
    poll(&mote, &api); // or the gateway's own fetch might come in between
    assert_trips(&api, &mote, "ten chats, cold", TEN, 3);
    assert_trips(&api, &mote, "ten chats, warm", TEN, 1);
}

/// Row 25b, and that a connection which has been idle for 50 s is not used. The text goes 5 s after the gateway's own fetch,
/// which it would have to wait for at 75 s.
#[test]
#[ignore = "takes 81 s"]
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
        thread::sleep(Duration::from_secs(80));
        assert_trips(&api, &mote, "after 80 s", chats, *trips);
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
    for [chat, answer, removes] in rows(REFUSALS) {
        let fault = match answer.starts_with(['<', '{']) {
            true => Fault::Answer(403, answer.to_string()),
            false => Fault::error(403, answer),
        };
        api.fail(next(1, "sendMessage").to(chat), fault);
        send(chat, "5.00");
        assert!(warnings(&gateway).join("\n").contains(chat), "{chat}");
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
    api.refuse_chat(-4444, Refusal::MigratedTo(-1_001_234_567_890));
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

/// What breaks, how many calls are made, and what the log says of it, in words between commas.
const FAILURES: &str = r#"
error 400 Bad Request: chat not found              | 1 | chat not found
error 401 Unauthorized                             | 1 | Unauthorized
error 404 Not Found                                | 1 | Not Found
flood 60                                           | 1 | retry after 60
flood 18446744073709551615                         | 1 | retry after 18446744073709551615
error 500 Internal Server Error: restart           | 1 | restart
answer 502 <html>Bad Gateway</html>                | 1 | 502
answer 200 <html>Log in</html>                     | 1 | HTTP 200
answer 200 [true]                                  | 1 |
answer 200 {"ok":"true"}                           | 1 |
answer 200 {"ok":false}                            | 1 |
answer 200 {"ok":false,"error_code":1,"description":"nope"} | 1 | nope
answer 200                                         | 1 |
answer 500 {"ok":true,"result":{}}                 | 1 | 500
close                                              | 1 |
endless                                            | 1 |
hang                                               | 1 | time
drip                                               | 1 | time
certificate of another authority                   | 0 | localhost, certificate, SSL_CERT_FILE
certificate of another name                        | 0 | localhost, certificate
certificate expired                                | 0 | localhost, certificate
handshake is not answered                          | 0 | localhost, time
refuse                                             | 0 | localhost, efused
"#;

/// Row 26: one message, what Telegram does, and what the log says about it.
#[test]
fn failures() {
    each_row(FAILURES, |[trouble, calls, words]| {
        let (api, gateway) = start();
        api.fail_with(trouble);
        assert_fails(&api, &gateway, calls.parse().unwrap(), words);
    });
}

#[track_caller]
fn assert_fails(api: &BotApi, gateway: &Gateway, calls: usize, words: &str) {
    let mote = Mote::new(gateway.address());
    let start = Instant::now();
    mote.post_separate("message", message(api, "5", "x"))
        .expect("5.00", "");
    assert!(start.elapsed() < IN_TIME, "took {:?}", start.elapsed());
    assert_eq!(api.count("sendMessage"), calls, "calls");
    let told = warnings(gateway);
    assert!((1..=2).contains(&told.len()), "one clear line: {told:#?}");
    for word in words.split(", ") {
        assert!(told[0].contains(word), "{word:?} in {told:#?}");
    }
}

#[test]
fn the_first_reason_of_two_is_told() {
    let (api, gateway) = start();
    api.fail(next(1, ""), Fault::too_many_requests(1));
    api.fail_with("close");
    assert_fails(&api, &gateway, 2, "retry after 1");
}

/// Also where the description, which is cut, ends in the middle of the token.
#[test]
fn no_token_is_told() {
    let (api, gateway) = start();
    let padding = "x".repeat(196 - TOKEN.len());
    api.fail_with(&format!("error 400 {TOKEN}{padding}{TOKEN}"));
    assert_fails(&api, &gateway, 1, "400, xxx");
    assert!(!gateway.log().contains(&TOKEN[..20]), "{}", gateway.log());
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
    assert!(start.elapsed() < IN_TIME, "took {:?}", start.elapsed());
    let told = warnings(&gateway).join("\n");
    assert!(told.contains("no-such-host.invalid"), "{told}");
}

/// ureq would look Telegram up for each call.
#[test]
fn a_look_up_serves_many_texts() {
    if !in_namespaces(a_look_up_serves_many_texts) {
        return;
    }
    let names = NameServer::start(Names::Lead(Ipv4Addr::LOCALHOST), "");
    let api = BotApi::with(BotApiOptions {
        names: vec!["telegram.test".to_string()],
        ..BotApiOptions::default()
    });
    let gateway = start_with(&api, Setup::new(&api));
    let mote = Mote::new(gateway.address());
    for _ in 0..5 {
        mote.post_separate("message", message(&api, "5", "x"))
            .expect("2.05", SENT);
    }
    let questions = names.questions();
    assert!((1..=2).contains(&questions), "{questions}: IPv4 and IPv6");
}

/// What a server may answer, and what it comes to: 2.05 if it says that the text is delivered. `¶` stands for the end of
/// a line, {OK} for that answer, and `(x)9` for nine times x.
const ODDITIES: &str = r#"
2.05 | HTTP/1.1 200 OK¶Content-Length: 23¶¶{OK}
2.05 | HTTP/1.1 200 OK¶Content-Length: 23¶¶{OK}HTTP/1.1 500 No¶¶
2.05 | HTTP/1.1 200¶Content-Length: 23¶¶{OK}
2.05 | HTTP/1.1 200 OK¶¶{OK}
2.05 | HTTP/1.0 200 OK¶¶{OK}
2.05 | HTTP/1.0 200 OK¶Content-Length: 23¶¶{OK}
2.05 | HTTP/1.1 100 Continue¶¶HTTP/1.1 200 OK¶Content-Length: 23¶¶{OK}
2.05 | HTTP/1.1 200 OK¶Transfer-Encoding: chunked¶¶17¶{OK}¶0¶¶
5.00 | HTTP/1.1 200 OK¶Transfer-Encoding: chunked¶¶999¶{OK}
5.00 | HTTP/1.1 200 OK¶Transfer-Encoding: chunked¶¶xyz¶{OK}¶0¶¶
5.00 | HTTP/1.1 200 OK¶Transfer-Encoding: chunked¶¶ffffffffffffffffff¶{OK}
5.00 | HTTP/1.1 200 OK¶Content-Length: 9¶¶{OK}
5.00 | HTTP/1.1 200 OK¶Content-Length: 999¶¶{OK}
5.00 | HTTP/1.1 200 OK¶Content-Length: -1¶¶{OK}
5.00 | HTTP/1.1 200 OK¶Content-Length: 99999999999999999999¶¶{OK}
5.00 | HTTP/1.1 200 OK¶Content-Encoding: gzip¶Content-Length: 9¶¶{GZIP}
5.00 | HTTP/1.1 200 OK¶Content-Length: 26¶¶{BOM}{OK}
5.00 | HTTP/1.1 101 Switching Protocols¶Upgrade: x¶¶{OK}
5.00 | HTTP/1.1 204 No Content¶¶
5.00 | HTTP/1.1 304 Not Modified¶¶
5.00 | HTTP/1.1 201 Created¶Content-Length: 23¶¶{OK}
5.00 | HTTP/1.1 999 What¶Content-Length: 0¶¶
5.00 | HTTP/1.1 20 OK¶Content-Length: 23¶¶{OK}
5.00 | HTTP/1.1 abc¶¶{OK}
5.00 | HTTP/9.9 200 OK¶Content-Length: 23¶¶{OK}
5.00 | HTTP/1.1 200 OK¶no colon¶Content-Length: 23¶¶{OK}
5.00 | HTTP/1.1 200 OK¶X: {NUL}¶¶{OK}
5.00 | HTTP/1.1 200 OK¶Content-Le
5.00 | HTTP/1.1 401 Unauthorized¶¶
5.00 | HTTP/1.1 301 Moved¶Location: {ELSEWHERE}¶Content-Length: 0¶¶
5.00 | HTTP/1.1 303 Moved¶Location: {ELSEWHERE}¶Content-Length: 0¶¶
5.00 | HTTP/1.1 307 Moved¶Location: {ELSEWHERE}¶Content-Length: 0¶¶
5.00 | HTTP/1.1 308 Moved¶Location: {ELSEWHERE}¶Content-Length: 23¶¶{OK}
5.00 | SSH-2.0-OpenSSH_9.2¶
5.00 | ¶¶¶
5.00 |
2.05 | HTTP/1.1 200 OK¶¶( )245760{OK}
5.00 | HTTP/1.1 200 OK¶¶( )266240{OK}
5.00 | HTTP/1.1 200 OK¶¶([)61440{OK}
5.00 | HTTP/1.1 200 OK¶¶({"a":)10240{OK}
5.00 | HTTP/1.1 200 OK¶Transfer-Encoding: chunked¶¶(1¶ ¶)266240 17¶{OK}¶0¶¶
5.00 | HTTP/1.1 200 OK¶X: (x)1048576¶¶{OK}
5.00 | HTTP/1.1 200 OK¶(X: x¶)102400¶{OK}
5.00 | (HTTP/1.1 100 Continue¶¶)102400 HTTP/1.1 500 No¶¶
"#;

/// The bytes that a row of the table stands for.
fn spelt_out(shape: &str) -> String {
    let text = match shape.split_once('(') {
        None => shape.to_string(),
        Some((before, rest)) => {
            let (part, rest) = rest.split_once(')').unwrap();
            let is_digit = |c: char| c.is_ascii_digit();
            let after = rest.trim_start_matches(is_digit);
            let times = rest[..rest.len() - after.len()].parse().unwrap();
            [before, &part.repeat(times), after.trim_start()].concat()
        }
    };
    text.replace('¶', "\r\n")
        .replace("{OK}", r#"{"ok":true,"result":{}}"#)
        .replace("{GZIP}", "\u{1f}x\u{8}xxxxxx")
        .replace("{BOM}", "\u{feff}")
        .replace("{NUL}", "\0")
}

/// HTTP as nobody should speak it: the named answer, one line in the log, and the next request is served.
#[test]
fn http_oddities() {
    let (api, gateway) = start();
    let other = BotApi::start();
    let elsewhere = format!("{}{TOKEN}/sendMessage", other.url());
    let mote = Mote::new(gateway.address());
    for [code, shape] in rows(ODDITIES) {
        let text = spelt_out(shape).replace("{ELSEWHERE}", &elsewhere);
        api.fail(next(1, "sendMessage"), Fault::Bytes(text.into_bytes()));
        api.close_connections(); // what is left of the last row is not to be met half closed
        let (calls, told) = (api.count("sendMessage"), warnings(&gateway).len());
        let start = Instant::now();
        let response = mote.post_separate("message", message(&api, "5", "x"));
        assert!(start.elapsed() < IN_TIME, "{shape}");
        assert_eq!(response.code(), code, "{shape}");
        assert_eq!(api.count("sendMessage"), calls + 1, "{shape}");
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
    type Break = fn(&BotApi);
    let cases: [(&str, Break); 5] = [
        ("closed after the answer", |api| {
            api.fail(next(1, "sendMessage"), Fault::CloseAnswered);
        }),
        ("idle connections closed", |_| {}),
        ("closed in the handshake", |api| {
            api.fail_connections(1, ConnectionFault::Close);
        }),
        ("429, 1 s", |api| {
            api.fail(next(2, "sendMessage").to(6), Fault::too_many_requests(1));
        }),
        ("429, 1 s, all chats", |api| {
            api.fail(next(3, "sendMessage"), Fault::too_many_requests(1));
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
        let limit = if hangs {
            IN_TIME
        } else {
            Duration::from_secs(5)
        };
        assert!(start.elapsed() < limit, "took {:?}", start.elapsed());
        assert_eq!(api.count("sendMessage"), 3, "one for each");
        assert_eq!([api.texts_to(5), api.texts_to(7)], [["x"], ["x"]]);
        let told = warnings(&gateway).join("\n");
        assert!(told.contains("6666") && told.contains(word), "{told}");
    });
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

/// A 429 is repeated only if there is time for an answer, too. It is no hang.
#[test]
fn a_429_that_leaves_no_time() {
    let (api, gateway) = start();
    api.fail(next(1, "sendMessage"), Fault::too_many_requests(8));
    let mote = Mote::new(gateway.address());
    mote.post_separate("message", message(&api, "5", "x"))
        .expect("5.00", "");
    assert!(api.texts_to(5).is_empty(), "told 5.00, but sent");
    let late = Fault::Late(Duration::from_millis(2500)); // more than a request has while Telegram hangs
    api.fail(next(1, "sendMessage").saying("y"), late);
    mote.post_separate("message", message(&api, "5", "y"))
        .expect("2.05", SENT);
}
