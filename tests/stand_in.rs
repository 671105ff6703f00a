//! The stand-in Bot API itself, asked by a client of its own: a test that trusts it must not be fooled by it.

mod support;

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::*;
use ureq::Agent;
use ureq::tls::{Certificate as Pem, RootCerts, TlsConfig};

fn client(api: &BotApi) -> Agent {
    let pem = std::fs::read(api.ca_path()).unwrap();
    let roots = RootCerts::new_with_certs(&[Pem::from_pem(&pem).unwrap()]);
    let config = Agent::config_builder()
        .http_status_as_error(false)
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
