//! CoAP clients that the project did not write. Without libcoap's `coap-client` (Debian: libcoap3-bin) they are skipped.

mod support;

use std::process::Command;

use support::*;

const SENT: &str = "Messages sent successfully\n";

/// What `coap-client` prints: payloads to its standard output, error responses to its standard error.
fn libcoap(gateway: &Gateway, arguments: &[&str], path: &str) -> Option<String> {
    let uri = format!("coap://{}/{path}", gateway.address());
    let output = Command::new("coap-client-notls").args(["-B", "20"]).args(arguments).arg(uri).output();
    let Ok(output) = output else {
        println!("skipped: there is no coap-client-notls");
        return None;
    };
    Some(String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap())
}

#[test]
fn libcoap_delivers_each_text_once() {
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
        let Some(said) = libcoap(&gateway, &[options, &["-e", &payload]].concat(), "message") else { return };
        assert_eq!(said, SENT, "{options:?}");
        assert_eq!(api.texts_to(chat), [text], "{options:?}");
    }
}

#[test]
fn libcoap_polls_and_discovers() {
    let (api, gateway) = start();
    api.person_writes(1234567890, "Ada", "hi");
    let form = update(&api);
    let poll = ["-m", "post", "-e", &form];
    let Some(said) = libcoap(&gateway, &poll, "update") else { return };
    assert_eq!(said, "Ada:1234567890\n");
    assert_eq!(libcoap(&gateway, &poll, "update").unwrap(), "No Updates\n");
    let links = libcoap(&gateway, &["-m", "get"], ".well-known/core").unwrap();
    assert!(links.contains("</message>;rt=") && links.contains("</update>;rt="), "{links}");
    assert_eq!(libcoap(&gateway, &["-b", "16", "-m", "get"], ".well-known/core").unwrap(), links, "in blocks of 16");
}

#[test]
fn libcoap_is_told_what_is_wrong() {
    let (_api, gateway) = start();
    for (options, path, expected) in [
        (["-m", "get", "-e", ""], "message", "4.05 Method not allowed\n"),
        (["-m", "post", "-e", "x"], "nope", "4.04 No such resource\n"),
        (["-m", "post", "-e", "x"], "message", "4.00 Missing required fields\n"),
    ] {
        let Some(said) = libcoap(&gateway, &options, path) else { return };
        assert_eq!(said, expected, "{path}");
    }
}
