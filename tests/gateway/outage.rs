//! Telegram is gone for a while, in each way in which a network fails, and ten motes go on asking: each is told soon,
//! nothing happens twice, and afterwards all is as before.

use std::collections::HashSet;
use std::net::UdpSocket;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering::Relaxed};
use std::time::{Duration, Instant};
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

struct World {
    api: BotApi,
    gateway: Gateway,
    url: String,
}

/// What a mote asked for, and what it got.
struct Asked {
    /// None: it polled.
    text: Option<String>,
    /// None: it gave up.
    code: Option<String>,
    waited: Duration,
}

impl World {
    fn new() -> Self {
        let api = BotApi::start();
        let gateway = Gateway::with(Setup::ipv4(&api));
        let url = api.url();
        Self { api, gateway, url }
    }

    fn ask(&self, mote: &Mote, text: Option<String>, jitter: usize) -> Asked {
        let path = if text.is_some() { "message" } else { "update" };
        let payload = form(&self.url, TOKEN, "5", text.as_deref().unwrap_or_default());
        let ack_timeout = Duration::from_millis(2000 + jitter as u64);
        let start = Instant::now();
        let response = mote.reliable(&mote.post(path, payload), ack_timeout, PATIENCE);
        Asked {
            text,
            code: response.map(|response| response.code()),
            waited: start.elapsed(),
        }
    }

    fn mote(&self, number: usize) -> Mote {
        Mote::at(&format!("127.0.1.{}", number + 1), self.gateway.address())
    }

    /// Polls and reports by turns until told to stop.
    fn go_on_asking(&self, number: usize, stop: &AtomicBool) -> Vec<Asked> {
        let mote = self.mote(number);
        let mut random = Numbers(number as u64);
        let mut asked = Vec::new();
        while !stop.load(Relaxed) {
            let text = format!("mote {number} text {}", asked.len());
            let text = (asked.len() % 2 == 1).then_some(text);
            asked.push(self.ask(&mote, text, random.below(1000)));
            thread::sleep(Duration::from_millis(random.below(2000) as u64));
        }
        asked
    }

    /// Lets ten motes ask before, during and after an outage, and judges what came of it.
    fn survives(&self, span: &Span, begin: impl FnOnce(), end: impl FnOnce()) -> Vec<Asked> {
        let stop = AtomicBool::new(false);
        let (asked, afterwards) = thread::scope(|scope| {
            let stop = &stop;
            let motes: Vec<_> = (0..MOTES)
                .map(|number| scope.spawn(move || self.go_on_asking(number, stop)))
                .collect();
            thread::sleep(Duration::from_secs(1));
            begin();
            thread::sleep(span.outage);
            end();
            thread::sleep(span.recovery);
            let afterwards = self.ask(&self.mote(MOTES), Some("afterwards".to_string()), 0);
            stop.store(true, Relaxed);
            let asked = motes.into_iter().flat_map(|mote| mote.join().unwrap());
            (asked.collect::<Vec<_>>(), afterwards)
        });
        self.judge(&asked);
        println!("afterwards a request took {:.1?}", afterwards.waited);
        assert_eq!(afterwards.code.as_deref(), Some("2.05"));
        assert!(afterwards.waited < Duration::from_secs(1));
        asked
    }

    fn judge(&self, asked: &[Asked]) {
        let sent = self.api.texts_to(5);
        let arrived: HashSet<&String> = sent.iter().collect();
        let count =
            |code: Option<&str>| asked.iter().filter(|it| it.code.as_deref() == code).count();
        let longest = asked.iter().map(|it| it.waited).max().unwrap();
        println!(
            "{} requests: {} answered 5.00, {} given up, the longest waited {longest:.1?}; {} texts arrived",
            asked.len(),
            count(Some("5.00")),
            count(None),
            sent.len()
        );
        assert_eq!(arrived.len(), sent.len(), "a text was sent twice");
        for it in asked {
            match (it.code.as_deref(), &it.text) {
                (Some("2.05"), Some(text)) => assert!(arrived.contains(text), "lost: {text}"),
                (Some("2.03" | "2.05"), None) | (Some("5.00") | None, _) => {}
                (code, text) => panic!("{text:?} was answered {code:?}"),
            }
        }
        assert!(longest < WAIT_MAX);
    }

    /// The log says the start and the end of the outage, once each, if a poll met it.
    fn assert_logged(&self, asked: &[Asked]) {
        let failed_poll = |it: &Asked| it.text.is_none() && it.code.as_deref() == Some("5.00");
        let times = usize::from(asked.iter().any(failed_poll));
        let log = self.gateway.log();
        for line in [STARTS, ENDS] {
            assert_eq!(log.matches(line).count(), times, "{line:?}");
        }
    }
}

/// An outage that motes notice.
fn outage(span: &Span, begin: fn(&BotApi), end: fn(&BotApi)) {
    let world = World::new();
    let asked = world.survives(span, || begin(&world.api), || end(&world.api));
    let failed = asked.iter().filter(|it| it.code.as_deref() == Some("5.00"));
    assert!(failed.count() > 0, "there was no outage");
    world.assert_logged(&asked);
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
fn seconds() {
    type Outage = fn(&Span);
    let outages: [(&str, Outage); 4] = [
        ("hang", hang),
        ("refused", refused),
        ("page", page),
        ("other certificate", other_certificate),
    ];
    in_parallel(&outages, |outage| outage(&SHORT));
}

#[test]
#[ignore = "takes minutes: cargo test --release outage:: -- --include-ignored"]
fn minutes_of_hanging() {
    hang(&LONG);
}

#[test]
#[ignore = "takes minutes, see above"]
fn minutes_of_refused_connections() {
    refused(&LONG);
}

#[test]
#[ignore = "takes minutes, see above"]
fn minutes_of_a_routers_page() {
    page(&LONG);
}

#[test]
#[ignore = "takes minutes, see above"]
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

/// The gateway starts with a name server that answers so.
fn world_by_name(response_code: u16) -> (World, Arc<AtomicU16>) {
    let name_server = start_name_server(response_code);
    let api = BotApi::with(BotApiOptions {
        names: vec![HOST.to_string()],
        ..BotApiOptions::default()
    });
    let url = format!("https://{HOST}:{}/bot", api.address().port());
    let config = format!("[telegram]\nbot_token = {TOKEN}\nurl = {url}\n");
    let gateway = Gateway::with(Setup::ipv4(&api).config(&config));
    (World { api, gateway, url }, name_server)
}

/// The gateway keeps the addresses that it has found.
#[test]
#[ignore = "takes minutes, see above"]
fn minutes_without_dns() {
    if !in_namespaces(minutes_without_dns) {
        return;
    }
    let (world, name_server) = world_by_name(NO_ERROR);
    let begin = || name_server.store(SILENT, Relaxed);
    let asked = world.survives(&LONG, begin, || name_server.store(NO_ERROR, Relaxed));
    for it in &asked {
        assert!(matches!(it.code.as_deref(), Some("2.03" | "2.05")));
    }
    world.assert_logged(&asked);
}

/// As after a power cut, when the router takes longer than the gateway.
fn starts_without_dns(test: impl Fn(), response_code: u16) {
    if !in_namespaces(test) {
        return;
    }
    let (world, name_server) = world_by_name(response_code);
    let asked = world.survives(&LONG, || {}, || name_server.store(NO_ERROR, Relaxed));
    world.assert_logged(&asked);
}

#[test]
#[ignore = "takes minutes, see above"]
fn starts_with_a_silent_name_server() {
    starts_without_dns(starts_with_a_silent_name_server, SILENT);
}

#[test]
#[ignore = "takes minutes, see above"]
fn starts_with_a_refusing_name_server() {
    starts_without_dns(starts_with_a_refusing_name_server, REFUSED);
}
