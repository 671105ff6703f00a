//! The stand-ins themselves: a test that trusts them must not be fooled by them.

mod support;

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::*;
use ureq::tls::{Certificate as Pem, RootCerts, TlsConfig};
use ureq::{Agent, Proxy as ProxySetting};

fn client(api: &BotApi) -> Agent {
    client_through(api, None)
}

fn client_through(api: &BotApi, proxy: Option<&str>) -> Agent {
    let pem = std::fs::read(api.ca_path()).unwrap();
    let roots = RootCerts::new_with_certs(&[Pem::from_pem(&pem).unwrap()]);
    let config = Agent::config_builder()
        .http_status_as_error(false)
        .proxy(proxy.map(|url| ProxySetting::new(url).unwrap()))
        .timeout_global(Some(Duration::from_secs(2)))
        .tls_config(TlsConfig::builder().root_certs(roots).build());
    config.build().into()
}

fn ask(
    client: &Agent,
    api: &BotApi,
    token: &str,
    method: &str,
    body: &Value,
) -> Result<(u16, Value), ureq::Error> {
    let url = format!("{}{token}/{method}", api.url());
    let body = body.to_string();
    let mut response = client
        .post(&url)
        .content_type("application/json")
        .send(body.as_bytes())?;
    let status = response.status().as_u16();
    let text = response.body_mut().read_to_string()?;
    Ok((
        status,
        serde_json::from_str(&text).unwrap_or(Value::String(text)),
    ))
}

#[test]
fn answers_as_telegram_documents() {
    let api = BotApi::start();
    let client = client(&api);
    let error = |status: u16, text: &str| {
        (
            status,
            json!({"ok": false, "error_code": status, "description": text}),
        )
    };
    api.unknown_chat(5);
    api.block_chat(6);
    let cases = [
        (
            TOKEN,
            "sendMessage",
            json!({"chat_id": 1, "text": ""}),
            error(400, "Bad Request: message text is empty"),
        ),
        (
            TOKEN,
            "sendMessage",
            json!({"chat_id": 1, "text": "x".repeat(4097)}),
            error(400, "Bad Request: message is too long"),
        ),
        (
            TOKEN,
            "sendMessage",
            json!({"chat_id": 5, "text": "x"}),
            error(400, "Bad Request: chat not found"),
        ),
        (
            TOKEN,
            "sendMessage",
            json!({"chat_id": 6, "text": "x"}),
            error(403, "Forbidden: bot was blocked by the user"),
        ),
        (TOKEN, "nonsense", json!({}), error(404, "Not Found")),
        ("12:short", "getMe", json!({}), error(404, "Not Found")),
        (
            &TOKEN.replace('a', "b"),
            "getMe",
            json!({}),
            error(401, "Unauthorized"),
        ),
        (
            TOKEN,
            "deleteMessage",
            json!({"chat_id": 1, "message_id": 99}),
            error(400, "Bad Request: message to delete not found"),
        ),
    ];
    for (token, method, body, expected) in cases {
        assert_eq!(
            ask(&client, &api, token, method, &body).unwrap(),
            expected,
            "{method} {body}"
        );
    }
    let (status, answer) = ask(
        &client,
        &api,
        TOKEN,
        "sendMessage",
        &json!({"chat_id": "@news", "text": "hi"}),
    )
    .unwrap();
    assert_eq!(
        (status, &answer["ok"], &answer["result"]["text"]),
        (200, &json!(true), &json!("hi"))
    );
    assert_eq!(api.texts_to("@news"), ["hi"]);
    assert_eq!(api.seen().connections, 1, "kept alive");
}

#[test]
fn hands_out_updates_until_they_are_confirmed() {
    let api = BotApi::start();
    let client = client(&api);
    let ids = |body: Value| -> Vec<i64> {
        let (_, answer) = ask(&client, &api, TOKEN, "getUpdates", &body).unwrap();
        answer["result"]
            .as_array()
            .unwrap()
            .iter()
            .map(|update| update["update_id"].as_i64().unwrap())
            .collect()
    };
    for _ in 0..250 {
        api.person_writes(1, "Ada", "hi");
    }
    let first = 700_000_001;
    let page = |from: i64, count: i64| (first + from..first + from + count).collect::<Vec<_>>();
    assert_eq!(ids(json!({})), page(0, 100));
    assert_eq!(ids(json!({"limit": 3})), page(0, 3), "not confirmed yet");
    assert_eq!(ids(json!({"offset": first + 100})), page(100, 100));
    assert_eq!(
        ids(json!({"offset": first + 1_000_000})),
        page(100, 100),
        "too far in the future: ignored"
    );
    assert_eq!(
        ids(json!({"offset": -2})),
        page(248, 2),
        "the last two; the others are forgotten"
    );
    let all = json!({"offset": first + 250, "allowed_updates": ["message"]});
    assert!(ids(all).is_empty());
    api.push_update(json!({"edited_message": {}}));
    assert!(ids(json!({})).is_empty(), "only what is allowed");
}

#[test]
fn goes_wrong_as_planned() {
    let api = BotApi::start();
    let send = |client: &Agent| {
        ask(
            client,
            &api,
            TOKEN,
            "sendMessage",
            &json!({"chat_id": 1, "text": "hi"}),
        )
    };
    api.fail(next(1, "sendMessage"), Fault::too_many_requests(7));
    let (status, answer) = send(&client(&api)).unwrap();
    assert_eq!(
        (status, &answer["parameters"]["retry_after"]),
        (429, &json!(7))
    );
    for fault in [
        Fault::Hang,
        Fault::CloseUnanswered,
        Fault::Bytes(b"nonsense\r\n\r\n".to_vec()),
    ] {
        api.fail(next(1, "sendMessage"), fault.clone());
        assert!(send(&client(&api)).is_err(), "{fault:?}");
    }
    assert_eq!(send(&client(&api)).unwrap().0, 200);
    for certificate in [
        Certificate::OtherAuthority,
        Certificate::WrongName,
        Certificate::Expired,
    ] {
        api.show(certificate);
        assert!(send(&client(&api)).is_err(), "{certificate:?}");
    }
    api.show(Certificate::Good);
    for fault in [ConnectionFault::Hang, ConnectionFault::Close] {
        api.fail_connections(1, fault);
        assert!(send(&client(&api)).is_err(), "{fault:?}");
    }
    api.refuse();
    assert!(send(&client(&api)).is_err(), "refused");
    api.accept_again();
    assert_eq!(send(&client(&api)).unwrap().0, 200);
}

/// One round trip each for TCP, TLS 1.3 and the request; one in all on a warm connection.
#[test]
fn emulates_a_distance() {
    let api = BotApi::start();
    let client = client(&api);
    api.set_round_trip(Duration::from_millis(200));
    for (round_trips, what) in [(3, "cold"), (1, "warm")] {
        let start = Instant::now();
        ask(&client, &api, TOKEN, "getMe", &json!({})).unwrap();
        let taken = start.elapsed().as_millis();
        assert!(
            (200 * round_trips..200 * round_trips + 190).contains(&taken),
            "{what}: {taken} ms"
        );
    }
}

/// A thousand messages in a second or so, so that it is never the stand-in that a measurement shows.
#[test]
fn is_fast() {
    let api = BotApi::start();
    let client = client(&api);
    let start = Instant::now();
    for number in 0..1000 {
        let body = json!({"chat_id": number % 10, "text": "hi"});
        assert_eq!(
            ask(&client, &api, TOKEN, "sendMessage", &body).unwrap().0,
            200
        );
    }
    assert!(
        start.elapsed() < Duration::from_secs(5),
        "took {:?}",
        start.elapsed()
    );
    assert_eq!(api.seen().sent.len(), 1000);
}

#[test]
fn the_proxy_leads_one_name_only() {
    let names = vec!["api.telegram.org".to_string()];
    let api = BotApi::with(BotApiOptions {
        names,
        ..BotApiOptions::default()
    });
    let proxy = Proxy::start("api.telegram.org:443", api.address());
    let client = client_through(&api, Some(&proxy.url()));
    let answer = client
        .get(format!("https://api.telegram.org/bot{TOKEN}/getMe"))
        .call()
        .unwrap();
    assert_eq!(answer.status(), 200);
    assert!(
        client
            .get(format!("https://localhost/bot{TOKEN}/getMe"))
            .call()
            .is_err()
    );
    assert_eq!(proxy.asked(), ["api.telegram.org:443", "localhost:443"]);
    assert_eq!(api.count("getMe"), 1);
}

/// The mote's bytes are the firmware's bytes.
#[test]
fn motes_write_what_the_firmware_writes() {
    for name in [
        "message_all_three_chats",
        "message_all_two_chats",
        "message_one_chat_text_with_separators",
        "update",
    ] {
        let bytes = firmware(name);
        let message = Message::decode(&bytes).expect("a message");
        assert_eq!(message.encode(), bytes, "{name}");
        let path = name.split('_').next().unwrap();
        let written = Message::new(Kind::Con, POST, message.id)
            .token(&message.token)
            .path(path);
        assert_eq!(written.payload(&message.payload).encode(), bytes, "{name}");
    }
    // Long options, and what a strict reader refuses.
    let long = Message::new(Kind::Con, GET, 1)
        .option(URI_PATH, [b'x'; 300])
        .option(REQUEST_TAG, [b'y'; 20]);
    assert_eq!(Message::decode(&long.encode()), Some(long));
    for malformed in [
        "",
        "400212",
        "80021234",
        "49021234",
        "40021234f0",
        "40021234ff",
        "40001234ff61",
        "40021234b2",
    ] {
        assert_eq!(Message::decode(&hex(malformed)), None, "{malformed}");
    }
}
