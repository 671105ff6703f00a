//! Telegram is gone for a while, in each way in which a network fails, and ten motes go on asking: each is told soon,
//! nothing happens twice, and afterwards all is as before.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

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
    // Behind one call that still hangs it would wait for 2 s.
    assert!(afterwards.got("2.05") && afterwards.waited < Duration::from_millis(1900));
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
const HERE: Names = Names::Lead(Ipv4Addr::LOCALHOST);

/// Two minutes with a gateway that knows Telegram by a name, and a name server that answers so from the start and so
/// during the outage.
fn without_dns(from_the_start: Names, meanwhile: Names) -> Survived {
    let name_server = NameServer::start(from_the_start, "");
    let api = BotApi::with(BotApiOptions {
        names: vec![HOST.to_string()],
        ..BotApiOptions::default()
    });
    let gateway = Gateway::with(Setup::ipv4(&api));
    let begin = || name_server.set(meanwhile);
    let end = || name_server.set(HERE);
    survive(&api, &gateway, &LONG, begin, end)
}

/// The gateway keeps the addresses that it has found.
#[test]
#[ignore = "takes two minutes"]
fn minutes_without_dns() {
    if in_namespaces(minutes_without_dns) {
        let survived = without_dns(HERE, Names::Silent);
        assert_eq!(survived.outcome.served, survived.asked.len());
    }
}

/// As after a power cut, when the router takes longer than the gateway.
#[test]
#[ignore = "takes two minutes"]
fn starts_with_a_silent_name_server() {
    if in_namespaces(starts_with_a_silent_name_server) {
        without_dns(Names::Silent, Names::Silent);
    }
}

#[test]
#[ignore = "takes two minutes"]
fn starts_with_a_refusing_name_server() {
    if in_namespaces(starts_with_a_refusing_name_server) {
        without_dns(Names::Refused, Names::Refused);
    }
}
