//! Telegram is gone for a while, in each way in which a network fails, and ten motes go on asking: each is told soon,
//! nothing happens twice, and afterwards all is as before.

use std::net::UdpSocket;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering::Relaxed};
use std::time::Duration;
use std::{fs, thread};

use crate::support::*;

const MOTES: usize = 10;
const WAIT_MAX: Duration = Duration::from_secs(30);
const STARTS: &str = "cannot fetch what people write";
const ENDS: &str = "Telegram answers again";

/// How long an outage lasts, and how long after it a request is served as ever.
struct Span {
    outage: Duration,
    recovery: Duration,
}

const LONG: Span = Span {
    outage: Duration::from_secs(120),
    recovery: Duration::from_secs(10),
};
/// A call that began just before the end of the outage takes up to 8.5 s.
const SHORT: Span = Span {
    outage: Duration::from_secs(4),
    recovery: Duration::from_secs(6),
};

/// What the motes asked for, and what became of it.
struct Survived {
    asked: Vec<Asked>,
    outcome: Outcome,
}

/// Lets ten motes ask before, during and after an outage, and judges what came of it.
fn survive(
    api: &BotApi,
    gateway: &Gateway,
    span: &Span,
    begin: impl FnOnce(),
    end: impl FnOnce(),
) -> Survived {
    let stop = AtomicBool::new(false);
    let mote = |number| FieldMote::new(number, 0, gateway.address());
    let (asked, afterwards) = thread::scope(|scope| {
        let ten =
            scope.spawn(|| at_once(MOTES, |number| mote(number).go_on_asking(api, "5", &stop)));
        thread::sleep(Duration::from_secs(1));
        begin();
        thread::sleep(span.outage);
        end();
        thread::sleep(span.recovery);
        let afterwards = mote(MOTES).report(api, "5");
        stop.store(true, Relaxed);
        (ten.join().unwrap().concat(), afterwards)
    });
    let outcome = judge(api, &asked, 1);
    assert!(outcome.longest < WAIT_MAX);
    println!("afterwards a request took {:.1?}", afterwards.waited);
    assert!(afterwards.got("2.05") && afterwards.waited < Duration::from_secs(1));
    // The log says the start and the end of the outage, once each, if a poll met it.
    let is_failed_poll = |it: &Asked| it.text.is_none() && it.got("5.00");
    let times = usize::from(asked.iter().any(is_failed_poll));
    let log = gateway.log();
    for line in [STARTS, ENDS] {
        assert_eq!(log.matches(line).count(), times, "{line:?}");
    }
    Survived { asked, outcome }
}

/// An outage that motes notice.
fn outage(span: &Span, begin: fn(&BotApi), end: fn(&BotApi)) {
    let api = BotApi::start();
    let gateway = Gateway::with(Setup::ipv4(&api));
    let survived = survive(&api, &gateway, span, || begin(&api), || end(&api));
    assert!(survived.outcome.failed > 0, "there was no outage");
}

/// Whatever is sent vanishes: calls on open connections (Telegram carries them out), and new connections.
fn hang(span: &Span) {
    let begin = |api: &BotApi| {
        api.fail(every(""), Fault::Hang);
        api.fail_connections(usize::MAX, ConnectionFault::Hang);
    };
    outage(span, begin, BotApi::heal);
}

fn refused(span: &Span) {
    outage(span, BotApi::refuse, BotApi::accept_again);
}

/// A router or a proxy in between answers with a page of its own.
fn page(span: &Span) {
    let begin = |api: &BotApi| api.fail(every(""), Fault::Page(302));
    outage(span, begin, BotApi::heal);
}

/// The same, by a router that cannot show Telegram's certificate.
fn other_certificate(span: &Span) {
    let begin = |api: &BotApi| {
        api.show(Certificate::OtherAuthority);
        api.close_connections();
    };
    outage(span, begin, |api| api.show(Certificate::Good));
}

#[test]
fn seconds_of_hanging() {
    hang(&SHORT);
}

#[test]
fn seconds_of_refused_connections() {
    refused(&SHORT);
}

#[test]
fn seconds_of_a_routers_page() {
    page(&SHORT);
}

#[test]
fn seconds_of_another_certificate() {
    other_certificate(&SHORT);
}

#[test]
#[ignore = "takes two minutes"]
fn minutes_of_hanging() {
    hang(&LONG);
}

#[test]
#[ignore = "takes two minutes"]
fn minutes_of_refused_connections() {
    refused(&LONG);
}

#[test]
#[ignore = "takes two minutes"]
fn minutes_of_a_routers_page() {
    page(&LONG);
}

#[test]
#[ignore = "takes two minutes"]
fn minutes_of_another_certificate() {
    other_certificate(&LONG);
}

// --- no DNS ---

const HOST: &str = "telegram.test";
/// DNS response codes.
const NO_ERROR: u16 = 0;
const REFUSED: u16 = 5;
/// No response at all.
const SILENT: u16 = u16::MAX;

/// A name server that knows one address for every name, in namespaces of this test's own. What it answers can be
/// changed; it ends with the process.
fn start_name_server(response_code: u16) -> Arc<AtomicU16> {
    let directory = TempDir::new();
    let resolv_conf = directory.join("resolv.conf");
    fs::write(&resolv_conf, "nameserver 127.0.0.1\n").unwrap();
    let mut mount = Command::new("mount");
    mount.arg("--bind").arg(resolv_conf).arg("/etc/resolv.conf");
    assert!(mount.status().unwrap().success());
    let socket = UdpSocket::bind("127.0.0.1:53").unwrap();
    let code = Arc::new(AtomicU16::new(response_code));
    let shared = Arc::clone(&code);
    thread::spawn(move || {
        let mut buffer = [0; 512];
        while let Ok((length, peer)) = socket.recv_from(&mut buffer) {
            let code = shared.load(Relaxed);
            if code != SILENT {
                let _ = socket.send_to(&dns_response(&buffer[..length], code), peer);
            }
        }
    });
    code
}

/// RFC 1035 §4.1: an answer only to a question for an IPv4 address.
fn dns_response(query: &[u8], code: u16) -> Vec<u8> {
    let name_end = 12 + query[12..].iter().position(|byte| *byte == 0).unwrap();
    let (kind, question_end) = (query[name_end + 2], name_end + 5);
    let found = code == NO_ERROR && kind == 1;
    let mut response = query[..2].to_vec();
    for field in [0x8180 | code, 1, u16::from(found), 0, 0] {
        response.extend(field.to_be_bytes());
    }
    response.extend(&query[12..question_end]);
    if found {
        response.extend(hex("c00c 0001 0001 00000001 0004 7f000001"));
    }
    response
}

/// Two minutes with a gateway that knows Telegram by a name, and a name server that answers so from the start and so
/// during the outage.
fn without_dns(from_the_start: u16, meanwhile: u16) -> Survived {
    let name_server = start_name_server(from_the_start);
    let api = BotApi::with(BotApiOptions {
        names: vec![HOST.to_string()],
        ..BotApiOptions::default()
    });
    let gateway = Gateway::with(Setup::ipv4(&api));
    let begin = || name_server.store(meanwhile, Relaxed);
    let end = || name_server.store(NO_ERROR, Relaxed);
    survive(&api, &gateway, &LONG, begin, end)
}

/// The gateway keeps the addresses that it has found.
#[test]
#[ignore = "takes two minutes"]
fn minutes_without_dns() {
    if in_namespaces(minutes_without_dns) {
        let survived = without_dns(NO_ERROR, SILENT);
        assert_eq!(survived.outcome.served, survived.asked.len());
    }
}

/// As after a power cut, when the router takes longer than the gateway.
#[test]
#[ignore = "takes two minutes"]
fn starts_with_a_silent_name_server() {
    if in_namespaces(starts_with_a_silent_name_server) {
        without_dns(SILENT, SILENT);
    }
}

#[test]
#[ignore = "takes two minutes"]
fn starts_with_a_refusing_name_server() {
    if in_namespaces(starts_with_a_refusing_name_server) {
        without_dns(REFUSED, REFUSED);
    }
}
