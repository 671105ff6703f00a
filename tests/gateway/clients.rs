//! CoAP clients that the project did not write: libcoap's `coap-client` (Debian: libcoap3-bin) and aiocoap (from PyPI, for
//! the Python that AIOCOAP_PYTHON names, else `python3`). The tests of a client that is not installed are skipped; where
//! REQUIRE_CLIENTS is set they fail.

use std::io::Write;
use std::process::{Command, Stdio};
use std::{env, iter};

use crate::support::*;
use serde_json::{Value, json};

/// Somebody has written before the gateway starts, so its first fetch finds it.
fn with_ada() -> (BotApi, Gateway) {
    let api = BotApi::start();
    api.person_writes(1234567890, "Ada", "hi");
    let gateway = Gateway::with(Setup::new(&api));
    (api, gateway)
}

// --- libcoap ---

fn has_libcoap(test: impl Fn()) -> bool {
    let is_installed = Command::new("coap-client-notls").output().is_ok();
    has_client(test, "coap-client-notls (libcoap3-bin)", is_installed)
}

/// What `coap-client` prints: payloads to its standard output, error responses to its standard error.
fn libcoap(gateway: &Gateway, arguments: &[&str], path: &str) -> String {
    let uri = format!("coap://{}/{path}", gateway.address());
    let output = Command::new("coap-client-notls")
        .args(["-B", "20"])
        .args(arguments)
        .arg(uri)
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap()
}

#[test]
fn libcoap_delivers_each_text_once() {
    if !has_libcoap(libcoap_delivers_each_text_once) {
        return;
    }
    let (api, gateway) = start();
    let long = "y".repeat(3000);
    let cases: [(&str, &[&str], &str); 5] = [
        ("1", &["-m", "post"], "by CON ä & = ;"),
        ("2", &["-N", "-m", "post"], "by NON"),
        ("3", &["-b", "16", "-m", "post"], "in blocks of 16"),
        ("4", &["-b", "64", "-m", "post"], &long),
        ("5", &["-b", "1024", "-m", "post"], &long),
    ];
    for (chat, options, text) in cases {
        let payload = message(&api, chat, text);
        let said = libcoap(&gateway, &[options, &["-e", &payload]].concat(), "message");
        assert_eq!(said, format!("{SENT}\n"), "{options:?}");
        assert_eq!(api.texts_to(chat), [text], "{options:?}");
    }
}

#[test]
fn libcoap_polls_and_discovers() {
    if !has_libcoap(libcoap_polls_and_discovers) {
        return;
    }
    let (api, gateway) = with_ada();
    let form = update(&api);
    let poll = ["-m", "post", "-e", &form];
    assert_eq!(libcoap(&gateway, &poll, "update"), "Ada:1234567890\n");
    assert_eq!(libcoap(&gateway, &poll, "update"), "No Updates\n");
    let links = libcoap(&gateway, &["-m", "get"], ".well-known/core");
    assert!(
        links.contains("</message>;rt=") && links.contains("</update>;rt="),
        "{links}"
    );
    assert_eq!(
        libcoap(&gateway, &["-b", "16", "-m", "get"], ".well-known/core"),
        links,
        "in blocks of 16"
    );
}

#[test]
fn libcoap_is_told_what_is_wrong() {
    if !has_libcoap(libcoap_is_told_what_is_wrong) {
        return;
    }
    let (_api, gateway) = start();
    for (options, path, expected) in [
        (
            ["-m", "get", "-e", ""],
            "message",
            "4.05 Method not allowed\n",
        ),
        (["-m", "post", "-e", "x"], "nope", "4.04 No such resource\n"),
        (
            ["-m", "post", "-e", "x"],
            "message",
            "4.00 Missing required fields\n",
        ),
    ] {
        assert_eq!(libcoap(&gateway, &options, path), expected, "{path}");
    }
}

// --- aiocoap ---

fn python() -> Command {
    Command::new(env::var_os("AIOCOAP_PYTHON").unwrap_or("python3".into()))
}

fn has_aiocoap(test: impl Fn()) -> bool {
    let import = python().args(["-c", "import aiocoap"]).output();
    let is_installed = import.is_ok_and(|output| output.status.success());
    has_client(test, "aiocoap (from PyPI)", is_installed)
}

/// The responses to these requests, made one after the other from one endpoint: see `clients.py`.
fn aiocoap(requests: &[Value]) -> Vec<Value> {
    let [input, output] = [Stdio::piped(), Stdio::piped()];
    let mut child = python()
        .args(["-c", include_str!("clients.py")])
        .stdin(input)
        .stdout(output)
        .spawn()
        .unwrap();
    let lines: String = requests
        .iter()
        .flat_map(|request| [request.to_string(), "\n".into()])
        .collect();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(lines.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "clients.py: {}", output.status);
    let lines = String::from_utf8(output.stdout).unwrap();
    let responses: Vec<Value> = lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(responses.len(), requests.len());
    responses
}

fn uri(gateway: &Gateway, path: &str) -> String {
    format!("coap://{}/{path}", gateway.address())
}

#[test]
fn aiocoap_delivers_each_text_once() {
    if !has_aiocoap(aiocoap_delivers_each_text_once) {
        return;
    }
    let (api, gateway) = start();
    // Block borders fall into the middle of its characters.
    let long: String = "Wärme 25.00 °C & Pumpe=an 🙂; "
        .chars()
        .cycle()
        .take(4000)
        .collect();
    let (short, long) = ("by aiocoap ä & = ;", long.trim());
    let cases = [
        (1, true, 1024, short),
        (2, false, 1024, short),
        (3, true, 16, long),
        (4, true, 64, long),
        (5, true, 1024, long),
        (6, false, 16, long),
        (7, false, 64, long),
    ];
    let requests = cases.map(|(chat, confirmable, block, text)| {
        let payload = message(&api, &chat.to_string(), text);
        json!({"uri": uri(&gateway, "message"), "confirmable": confirmable, "block": block, "payload": payload})
    });
    assert_eq!(aiocoap(&requests), vec![json!(["2.05", SENT]); cases.len()]);
    for (chat, confirmable, block, text) in cases {
        assert_eq!(
            api.texts_to(chat),
            [text],
            "confirmable {confirmable}, blocks of {block}"
        );
    }
}

#[test]
fn aiocoap_polls_and_discovers() {
    if !has_aiocoap(aiocoap_polls_and_discovers) {
        return;
    }
    let (api, gateway) = with_ada();
    let poll = json!({"uri": uri(&gateway, "update"), "payload": update(&api)});
    let mut unconfirmed = poll.clone();
    unconfirmed["confirmable"] = false.into();
    let core = json!({"method": "GET", "uri": uri(&gateway, ".well-known/core")});
    let in_blocks_of_16 = json!({"method": "GET", "uri": uri(&gateway, ".well-known/core"), "options": [[BLOCK2, []]]});
    let with_query =
        json!({"method": "GET", "uri": uri(&gateway, ".well-known/core?rt=telegram.u*")});
    let links = [
        json!(["/message", [["rt", "telegram.message"], ["ct", "0"]]]),
        json!(["/update", [["rt", "telegram.update"], ["ct", "0"]]]),
    ];
    let expected = [
        json!(["2.05", "Ada:1234567890"]),
        json!(["2.05", "Ada:1234567890"]), // the NON before it acknowledged nothing
        json!(["2.03", "No Updates"]),
        json!(["2.05", links]),
        json!(["2.05", links]),
        json!(["2.05", links]),
    ];
    assert_eq!(
        aiocoap(&[
            unconfirmed,
            poll.clone(),
            poll,
            core,
            in_blocks_of_16,
            with_query
        ]),
        expected
    );
}

/// What a request has, and the code and diagnostic text that it is answered with.
#[test]
fn aiocoap_is_told_what_is_wrong() {
    if !has_aiocoap(aiocoap_is_told_what_is_wrong) {
        return;
    }
    let (api, gateway) = start();
    let other_token = form(&api.url(), &TOKEN.replace('a', "b"), "5", "x");
    let too_large = message(&api, "5", &"x".repeat(18_000));
    let (json, unknown) = (json!(uint(50)), 65001);
    let cases = [
        (
            json!({"payload": "x"}),
            json!(["4.00", "Missing required fields"]),
        ),
        (
            json!({"options": [[unknown, [1]]]}),
            json!(["4.02", "Option 65001 is not supported"]),
        ),
        (
            json!({"options": [[unknown, [1]]], "confirmable": false, "patience": 1}),
            Value::Null,
        ),
        (
            json!({"payload": other_token}),
            json!(["4.03", "This gateway does not serve that token"]),
        ),
        (
            json!({"uri": uri(&gateway, "nope")}),
            json!(["4.04", "No such resource"]),
        ),
        (
            json!({"method": "GET"}),
            json!(["4.05", "Method not allowed"]),
        ),
        (
            json!({"options": [[ACCEPT, json]]}),
            json!(["4.06", "Not available in this format"]),
        ),
        (
            json!({"payload": too_large, "block": 64}),
            json!(["4.13", "At most 17 KiB"]),
        ),
        (
            json!({"options": [[CONTENT_FORMAT, json]]}),
            json!(["4.15", "Only text/plain"]),
        ),
        (
            json!({"options": [[PROXY_SCHEME, b"coap"]]}),
            json!(["5.05", "This is no proxy"]),
        ),
    ];
    let usual = json!({"uri": uri(&gateway, "message"), "payload": message(&api, "5", "x")});
    let requests = cases.clone().map(|(different, _)| {
        let mut request = usual.clone();
        request
            .as_object_mut()
            .unwrap()
            .extend(different.as_object().unwrap().clone());
        request
    });
    for ((different, expected), response) in iter::zip(&cases, aiocoap(&requests)) {
        assert_eq!(response, *expected, "{different}");
    }
    assert_eq!(api.count("sendMessage"), 0);
}
