//! POST /message: forms, deliveries, and everything that Telegram and the network can do to them.

mod support;

use std::time::{Duration, Instant};

use serde_json::json;
use support::Kind::{Ack, Con};
use support::*;

const SENT: &str = "Messages sent successfully";
const MISSING: &str = "Missing required fields";
/// Every request is answered within 9 s, whatever Telegram does; the rest is the machine's.
const LIMIT: Duration = Duration::from_millis(9200);

// --- the firmware ---

/// The datagrams of the unmodified firmware. It names api.telegram.org, to which a proxy leads the gateway.
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
        assert_eq!(
            mote.receive_raw(PATIENCE),
            Some(vec![0x60, 0, high, low]),
            "{name}: the empty ACK"
        );
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
    assert!(
        proxy
            .asked()
            .iter()
            .all(|asked| asked == "api.telegram.org:443"),
        "{:?}",
        proxy.asked()
    );
}

// --- forms ---

/// What a form says, the code that it is answered with, and what reaches Telegram. {U} and {T} stand for url and token.
#[test]
fn forms() {
    let (api, gateway) = start();
    let full = |form: &str| form.replace("{U}", &api.url()).replace("{T}", TOKEN);
    let mote = Mote::new(gateway.address());
    let ok: Vec<(&str, &[&str], &str)> = vec![
        ("url={U}&token={T}&chat_ids=5&text=hello", &["5"], "hello"),
        ("text=hello&chat_ids=5&token={T}&url={U}", &["5"], "hello"),
        ("chat_ids=5&text=hello&url={U}&token={T}", &["5"], "hello"),
        // Only known keys separate.
        (
            "url={U}&token={T}&chat_ids=5&text=a&b=c%20d+e;f=g",
            &["5"],
            "a&b=c%20d+e;f=g",
        ),
        (
            "text=1 & 2&x=&texts=3&url={U}&token={T}&chat_ids=5",
            &["5"],
            "1 & 2&x=&texts=3",
        ),
        (
            "url={U}&token={T}&chat_ids=5&text=url=x, text=y",
            &["5"],
            "url=x, text=y",
        ),
        // Padding and white space.
        (
            "url={U}&token={T}&chat_ids=5&text=hello\n\0\0\0",
            &["5"],
            "hello",
        ),
        (
            "url= {U} &token=\t{T}\0&chat_ids= 5\n&text= \n hello  world \n",
            &["5"],
            "hello  world",
        ),
        (
            "url={U}&token={T}&chat_ids=5&text=two\nlines\n",
            &["5"],
            "two\nlines",
        ),
        (
            "url={U}&token={T}&chat_ids=5&text=25.00 °C 🙂",
            &["5"],
            "25.00 °C 🙂",
        ),
        (
            "url={U}&token={T}&chat_ids=5&text=\"quoted\" \\ {json}",
            &["5"],
            "\"quoted\" \\ {json}",
        ),
        // Chats.
        (
            "url={U}&token={T}&chat_ids=5, 6 ,,7,&text=x",
            &["5", "6", "7"],
            "x",
        ),
        (
            "url={U}&token={T}&chat_ids=5,6,5,5&text=x",
            &["5", "6"],
            "x",
        ),
        (
            "url={U}&token={T}&chat_ids=-1001234567890,@news&text=x",
            &["-1001234567890", "@news"],
            "x",
        ),
        (
            "url={U}&token={T}&chat_ids=1,2,3,4,5,6,7,8,9,10&text=x",
            &["1", "2", "3", "4", "5", "6", "7", "8", "9", "10"],
            "x",
        ),
    ];
    for (form, chats, text) in ok {
        let before = api.seen().sent.len();
        mote.post_separate("message", full(form))
            .expect("2.05", SENT);
        let mut sent: Vec<(String, String)> = api.seen().sent[before..]
            .iter()
            .map(|sent| (sent.chat.clone(), sent.text.clone()))
            .collect();
        let mut expected: Vec<(String, String)> = chats
            .iter()
            .map(|chat| (chat.to_string(), text.to_string()))
            .collect();
        sent.sort();
        expected.sort();
        assert_eq!(sent, expected, "{form:?}");
    }

    let calls = api.seen().calls.len();
    for missing in [
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
    ] {
        mote.post_piggybacked("message", full(missing))
            .expect("4.00", MISSING);
    }
    for malformed in [
        "url={U}&token={T}&chat_ids=Ada&text=x",
        "url={U}&token={T}&chat_ids=5,1x&text=x",
        "url={U}&token={T}&chat_ids=5.5&text=x",
        "url={U}&token={T}&chat_ids=@&text=x",
        "url={U}&token={T}&chat_ids=99999999999999999999&text=x",
        "url={U}&token={T}&chat_ids=1,2,3,4,5,6,7,8,9,10,11&text=x",
    ] {
        let response = mote.post_piggybacked("message", full(malformed));
        response.expect_code("4.00");
        assert!(
            !response.payload.is_empty() && response.text() != MISSING,
            "{malformed}: {response}"
        );
    }
    assert_eq!(api.seen().calls.len(), calls, "nothing was sent");
}

/// Invalid UTF-8 is replaced in the text.
#[test]
fn invalid_utf8() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    let mut payload = message(&api, "5", "25 ").into_bytes();
    payload.extend(b"\xb0C");
    mote.post_separate("message", payload).expect("2.05", SENT);
    assert_eq!(api.texts_to(5), ["25 \u{fffd}C"]);
    // In any other field it makes the field wrong.
    let payload = [b"url=\xb0&".as_slice(), message(&api, "5", "x").as_bytes()].concat();
    let code = mote.post_piggybacked("message", payload).code();
    assert!(code == "4.00" || code == "4.03", "{code}");
}

#[test]
fn the_longest_text() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    let send = |text: &str| {
        let payload = message(&api, "5", text);
        let blocks: Vec<&[u8]> = payload.as_bytes().chunks(1024).collect();
        let part = |number: usize| {
            let more = number + 1 < blocks.len();
            mote.post("message", blocks[number])
                .option(BLOCK1, block(number as u32, more, 1024))
        };
        (0..blocks.len() - 1)
            .for_each(|number| mote.piggybacked(&part(number)).expect_code("2.31"));
        part(blocks.len() - 1)
    };
    // Characters, not bytes.
    let longest = "é".repeat(3000) + &"x".repeat(1096);
    mote.separate(&send(&longest)).expect("2.05", SENT);
    assert_eq!(api.texts_to(5), [longest]);
    let response = mote.piggybacked(&send(&"x".repeat(4097)));
    response.expect_code("4.00");
    assert!(!response.payload.is_empty());
    assert_eq!(api.count("sendMessage"), 1);
}

/// The mote never chooses where the gateway connects to, nor for which bot.
#[test]
fn other_urls_and_tokens() {
    let (api, gateway) = start();
    let other = BotApi::start();
    let mote = Mote::new(gateway.address());
    let urls = [
        "http://127.0.0.1:1/bot".to_string(),
        other.url(),
        "https://api.telegram.org/bot".to_string(),
        api.url().replace("https", "http"),
        api.url().replace("/bot", "/"),
        format!("{}x", api.url()),
    ];
    for url in urls {
        mote.post_piggybacked("message", form(&url, TOKEN, "5", "x"))
            .expect_code("4.03");
        mote.post_piggybacked("update", format!("url={url}&token={TOKEN}"))
            .expect_code("4.03");
    }
    for token in [
        TOKEN.replace('a', "b"),
        TOKEN[..TOKEN.len() - 1].to_string(),
        format!("{TOKEN}a"),
    ] {
        let answer = mote.post_piggybacked("message", form(&api.url(), &token, "5", "x"));
        answer.expect_code("4.03");
        assert!(!answer.text().contains(&token), "{answer}");
        mote.post_piggybacked("update", format!("url={}&token={token}", api.url()))
            .expect_code("4.03");
        assert!(
            !gateway.log().contains(&token[..token.len() - 2]),
            "{}",
            gateway.log()
        );
    }
    assert_eq!(
        (api.seen().connections, other.seen().connections),
        (0, 0),
        "no connection made"
    );
}

// --- delivery ---

/// What Telegram is asked: the chat and the text as it is, without any formatting.
#[test]
fn the_call() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    mote.post_separate("message", message(&api, "5", "<b>*x*</b>"))
        .expect("2.05", SENT);
    let call = &api.seen().calls[0];
    assert_eq!(
        (call.method.as_str(), call.token.as_str()),
        ("sendMessage", TOKEN)
    );
    let chat = call.body["chat_id"].to_string();
    assert_eq!(chat.trim_matches('"'), "5");
    assert_eq!(call.body["text"], json!("<b>*x*</b>"));
    assert_eq!(call.body.get("parse_mode"), None);
}

/// With a warm connection one message costs one round trip, ten chats also one; with a cold one three.
#[test]
fn round_trips() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    let trip = Duration::from_millis(400);
    api.set_round_trip(trip);
    let ten = "1,2,3,4,5,6,7,8,9,10";
    for (name, chats, trips) in [
        ("cold", "1", 3),
        ("warm", "1", 1),
        ("ten chats, cold", ten, 3),
        ("ten chats, warm", ten, 1),
        ("warm again", ten, 1),
    ] {
        let start = Instant::now();
        mote.post_separate("message", message(&api, chats, name))
            .expect("2.05", SENT);
        let taken = start.elapsed();
        assert!(
            (trip * trips..trip * (trips + 1)).contains(&taken),
            "{name}: {taken:?} with {trip:?} for a round trip"
        );
    }
}

#[test]
fn some_chats_refused() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    api.unknown_chat(404_404);
    mote.post_separate("message", message(&api, "5,404404", "x"))
        .expect("2.05", SENT);
    assert_eq!(api.texts_to(5), ["x"]);
    let refusal = |line: &&str| line.contains("404404") && line.contains("chat not found");
    assert!(
        gateway.log().lines().any(|line| refusal(&line)),
        "{}",
        gateway.log()
    );
    mote.post_separate("message", message(&api, "404404", "x"))
        .expect("5.00", "");
    // Not found is not gone: the operator may have forgotten to write to the bot first.
    assert_eq!(api.count("sendMessage"), 3, "tried again");
}

/// A chat that has blocked the bot is removed as if it had asked for it.
#[test]
fn a_blocked_chat_is_removed() {
    let api = BotApi::start();
    let mut gateway = Gateway::start(&api);
    let mote = Mote::new(gateway.address());
    api.person_writes(1_000_000_006, "Eve", "hi");
    assert_eq!(poll(&mote, &api), "Eve:1000000006");
    api.wait_for("the greeting", |seen| {
        !seen.texts_to(1_000_000_006).is_empty()
    });
    api.block_chat(1_000_000_006);
    api.block_chat(1_000_000_007);
    mote.post_separate("message", message(&api, "5,1000000006,1000000007", "x"))
        .expect("2.05", SENT);
    assert_eq!(api.texts_to(5), ["x"]);
    let calls = api.count("sendMessage");
    mote.post_separate("message", message(&api, "1000000006,1000000007", "y"))
        .expect("2.05", SENT);
    gateway.restart();
    mote.post_separate("message", message(&api, "1000000007,1000000006", "z"))
        .expect("2.05", SENT);
    assert_eq!(api.count("sendMessage"), calls, "not even tried");
    let tokens = poll(&mote, &api);
    let mut tokens: Vec<&str> = tokens.split(';').collect();
    tokens.sort_unstable();
    assert_eq!(tokens, ["r1000000006", "r1000000007"]);
    // Blocked is the only one of all: delivered to none.
    api.block_chat(1_000_000_008);
    mote.post_separate("message", message(&api, "1000000008", "x"))
        .expect("5.00", "");
}

// --- when things go wrong ---

type Break = fn(&BotApi);
/// What breaks, how many calls are made, and parts of what the log says.
type Failure = (Break, usize, &'static [&'static str]);

/// Row 26: one message, what Telegram does, and what the log says about it (any of these).
#[test]
fn failures() {
    let cases: [(&str, Failure); 22] = [
        ("400", (|api| api.unknown_chat(5), 1, &["chat not found"])),
        (
            "401",
            (
                |api| api.fail(every(""), Fault::error(401, "Unauthorized")),
                1,
                &["Unauthorized"],
            ),
        ),
        (
            "404",
            (
                |api| api.fail(every(""), Fault::error(404, "Not Found")),
                1,
                &["Not Found"],
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
            (
                |api| api.fail(every(""), Fault::error(500, "Internal Server Error")),
                1,
                &["Internal Server Error"],
            ),
        ),
        (
            "502, a page",
            (
                |api| {
                    api.fail(
                        every(""),
                        Fault::Answer(502, "<html>Bad Gateway</html>".into()),
                    )
                },
                1,
                &["502"],
            ),
        ),
        (
            "no JSON",
            (
                |api| api.fail(every(""), Fault::Answer(200, "hello".into())),
                1,
                &["200", "JSON"],
            ),
        ),
        (
            "no object",
            (
                |api| api.fail(every(""), Fault::Answer(200, "[true]".into())),
                1,
                &[],
            ),
        ),
        (
            "ok is text",
            (
                |api| api.fail(every(""), Fault::Answer(200, r#"{"ok":"true"}"#.into())),
                1,
                &[],
            ),
        ),
        (
            "not ok",
            (
                |api| {
                    api.fail(
                        every(""),
                        Fault::Answer(200, r#"{"ok":false,"description":"nope"}"#.into()),
                    )
                },
                1,
                &["nope"],
            ),
        ),
        (
            "ok, but 500",
            (
                |api| {
                    api.fail(
                        every(""),
                        Fault::Answer(500, r#"{"ok":true,"result":{}}"#.into()),
                    )
                },
                1,
                &["500"],
            ),
        ),
        (
            "the token in the description, cut in two",
            (
                |api| {
                    let description = format!("{TOKEN}{}{TOKEN}", "x".repeat(196 - TOKEN.len()));
                    api.fail(every(""), Fault::error(400, &description));
                },
                1,
                &["400 <token>xxx"],
            ),
        ),
        (
            "empty body",
            (
                |api| api.fail(every(""), Fault::Answer(200, String::new())),
                1,
                &[],
            ),
        ),
        (
            "closed",
            (|api| api.fail(every(""), Fault::CloseUnanswered), 1, &[]),
        ),
        (
            "no HTTP",
            (
                |api| api.fail(every(""), Fault::Bytes(b"SSH-2.0-OpenSSH_9.2\r\n".to_vec())),
                1,
                &[],
            ),
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
            "trickle",
            (
                |api| api.fail(every(""), Fault::Trickle(Duration::from_millis(200))),
                1,
                &["time"],
            ),
        ),
        (
            "other authority",
            (
                |api| api.show(Certificate::OtherAuthority),
                0,
                &["certificate"],
            ),
        ),
        (
            "wrong name",
            (|api| api.show(Certificate::WrongName), 0, &["certificate"]),
        ),
        (
            "expired",
            (|api| api.show(Certificate::Expired), 0, &["certificate"]),
        ),
        ("refused", (|api| api.refuse(), 0, &["efused"])),
    ];
    in_parallel(&cases, |(break_it, calls, logged)| {
        let (api, gateway) = start();
        break_it(&api);
        let mote = Mote::new(gateway.address());
        let start = Instant::now();
        mote.post_separate("message", message(&api, "5", "x"))
            .expect("5.00", "");
        assert!(start.elapsed() < LIMIT, "took {:?}", start.elapsed());
        assert_eq!(api.count("sendMessage"), *calls, "calls");
        let log = gateway.log();
        let told = log
            .lines()
            .filter(|line| line.contains("[WARN]") || line.contains("[ERROR]"))
            .count();
        assert!((1..=2).contains(&told), "one clear line:\n{log}");
        assert!(
            logged.is_empty() || logged.iter().any(|part| log.contains(part)),
            "{logged:?} in:\n{log}"
        );
        assert!(mote.ping(PATIENCE));
    });
}

/// Other ways not to get there: no DNS, no TLS handshake, a redirect to somewhere else.
#[test]
fn no_way_to_telegram() {
    let api = BotApi::start();
    let other = BotApi::start();
    let no_dns = |api: &BotApi| Setup {
        config: Some(format!(
            "[telegram]\nbot_token = {TOKEN}\nurl = https://no-such-host.invalid/bot\n"
        )),
        ..Setup::new(api)
    };
    in_parallel(
        &[("no DNS", 0), ("no handshake", 1), ("redirect", 2)],
        |case| {
            let local = BotApi::start();
            let mut url = local.url();
            let setup = match case {
                0 => {
                    url = "https://no-such-host.invalid/bot".to_string();
                    no_dns(&api)
                }
                1 => {
                    local.fail_connections(usize::MAX, ConnectionFault::Hang);
                    Setup::new(&local)
                }
                _ => {
                    let location = format!("{}{TOKEN}/sendMessage", other.url());
                    let redirect = format!(
                        "HTTP/1.1 307 Moved\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n"
                    );
                    local.fail(every(""), Fault::Bytes(redirect.into()));
                    Setup::new(&local)
                }
            };
            let gateway = Gateway::with(setup);
            let mote = Mote::new(gateway.address());
            let start = Instant::now();
            mote.post_separate("message", form(&url, TOKEN, "5", "x"))
                .expect("5.00", "");
            assert!(start.elapsed() < LIMIT, "took {:?}", start.elapsed());
        },
    );
    assert_eq!(other.seen().connections, 0, "the redirect was not followed");
}

/// A mote that repeats its request to a restarted gateway hears how it ended, and the text is not sent again: one that
/// was answered, one that was being sent, and the last block of a long one.
#[test]
fn a_restart_sends_nothing_twice() {
    let (api, mut gateway) = start();
    let mote = Mote::new(gateway.address());
    let answered = mote.post("message", message(&api, "5", "answered"));
    mote.separate(&answered).expect("2.05", SENT);
    let body = message(&api, "5", "in blocks");
    let block = |number: u32| {
        let (start, end) = (
            number as usize * 64,
            body.len().min((number as usize + 1) * 64),
        );
        mote.post("message", &body[start..end])
            .option(27, support::block(number, end < body.len(), 64))
    };
    let last = (body.len() as u32 - 1) / 64;
    for number in 0..last {
        let block = block(number);
        mote.piggybacked(&block).expect_code("2.31");
    }
    let blocks = block(last);
    mote.separate(&blocks).expect("2.05", SENT);
    api.fail(next(1, "sendMessage").to(6), Fault::Hang);
    let begun = mote.post("message", message(&api, "6", "begun"));
    mote.begin(&begun);
    api.wait_for("the call", |seen| seen.count("sendMessage") == 3);
    for _ in 0..2 {
        gateway.kill9();
        gateway.restart();
        for (request, code) in [(&answered, "2.05"), (&blocks, "2.05"), (&begun, "5.00")] {
            mote.separate(request).expect_code(code);
        }
    }
    assert_eq!(
        (api.texts_to(5), api.texts_to(6)),
        (
            vec!["answered".into(), "in blocks".into()],
            vec!["begun".into()]
        )
    );
    // A restarted mote may use its message ID and token again, for another text.
    let other = Message {
        payload: message(&api, "5", "other").into(),
        ..answered
    };
    mote.separate(&other).expect("2.05", SENT);
    assert_eq!(api.count("sendMessage"), 4);
}

/// Where a request surely did not reach Telegram, it is sent again; each text arrives once.
#[test]
fn retries() {
    let cases: [(&str, Break); 6] = [
        ("closed after the answer", |api| {
            api.fail(next(1, ""), Fault::CloseAnswered)
        }),
        ("idle connections closed", |_| {}),
        ("closed in the handshake", |api| {
            api.fail_connections(1, ConnectionFault::Close)
        }),
        ("429, 1 s", |api| {
            api.fail(next(2, "").to(6), Fault::too_many_requests(1))
        }),
        ("429, 1 s, all chats", |api| {
            api.fail(next(3, ""), Fault::too_many_requests(1))
        }),
        ("late", |api| {
            api.fail(every(""), Fault::Late(Duration::from_secs(5)))
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
        let sent = api
            .seen()
            .sent
            .iter()
            .map(|sent| (sent.chat.clone(), sent.text.clone()))
            .collect::<Vec<_>>();
        for chat in [5, 6, 7] {
            assert_eq!(api.texts_to(chat), ["first", "second"], "{sent:?}");
        }
        assert_eq!(sent.len(), 6, "{sent:?}");
    });
}

/// 429 for some chats only, and longer than there is time for: the others have it, and nobody waits for nothing.
#[test]
fn flood_control_of_one_chat() {
    let (api, gateway) = start();
    api.fail(every("sendMessage").to(6), Fault::too_many_requests(60));
    let mote = Mote::new(gateway.address());
    let start = Instant::now();
    mote.post_separate("message", message(&api, "5,6", "x"))
        .expect("2.05", SENT);
    assert!(
        start.elapsed() < Duration::from_secs(2),
        "took {:?}",
        start.elapsed()
    );
    assert_eq!(
        (api.texts_to(5), api.count("sendMessage")),
        (vec!["x".to_string()], 2)
    );
    assert!(
        gateway.log().contains("retry after 60"),
        "{}",
        gateway.log()
    );
}

/// A text that may have arrived is not sent again: one hanging chat does not take the others' delivery away.
#[test]
fn one_chat_hangs() {
    let (api, gateway) = start();
    api.fail(every("sendMessage").to(6), Fault::Hang);
    api.fail(every("sendMessage").to(7), Fault::CloseUnanswered);
    let mote = Mote::new(gateway.address());
    let start = Instant::now();
    mote.post_separate("message", message(&api, "5,6,7", "x"))
        .expect("2.05", SENT);
    assert!(start.elapsed() < LIMIT, "took {:?}", start.elapsed());
    assert_eq!(api.count("sendMessage"), 3, "one for each");
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

// --- footprint ---

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
    assert!(
        within(Duration::from_secs(2), || gateway.threads() <= idle),
        "{} threads, {idle} before",
        gateway.threads()
    );
    assert!(
        gateway.open_files() < 40,
        "{} open files",
        gateway.open_files()
    );
    assert_eq!(api.seen().sent.len(), 1000);
}

/// A piggybacked error answer and the ACK of a request leave in one go with nothing behind them.
#[test]
fn one_answer_each() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    let wrong = mote.post_piggybacked("message", "nonsense");
    assert_eq!(wrong.kind, Ack);
    mote.expect_silence(QUIET);
    let right = mote.post_separate("message", message(&api, "5", "x"));
    assert_eq!(right.kind, Con);
    mote.expect_silence(QUIET);
}
