//! What must hold whatever arrives, from the datagram to the decision. `one` is run by the fuzzer in `tests/fuzz/` with
//! inputs that it makes up, and by `cargo test` with those that once reached something new (`tests/fuzz/corpus.hex`).

// The datagrams are read and written by the mote's hand-made codec, for the gateway's own cannot judge itself.
#[allow(dead_code)]
#[path = "../support/mote.rs"]
mod mote;

use std::sync::LazyLock;

use super::*;
use mote::{BLOCK1, BLOCK2, Kind, Message as Datagram, POST, URI_PATH};

// The firmware's datagrams hold them; the mote's file asks for both.
const URL: &str = "https://api.telegram.org/bot";
const TOKEN: &str = "123456789:AAEaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
const PASSWORD: &str = "geheim";
const NOW: u64 = 1_769_860_800;

/// The first byte chooses the part (a digit, in the corpus).
pub fn one(input: &[u8]) {
    let Some((part, rest)) = input.split_first() else {
        return;
    };
    match part % 8 {
        0 => datagram(rest),
        1 => exchanges(rest),
        2 => form(rest),
        3 => people(rest),
        4 => answer(rest),
        5 => saved(rest),
        6 => names(rest),
        _ => client(rest),
    }
}

/// Every input that is kept, as a line of hexadecimal digits.
#[test]
fn corpus() {
    let text = include_str!("../fuzz/corpus.hex");
    for (number, line) in (1..).zip(text.lines()) {
        println!("line {number}"); // shown if it fails
        let digits = line
            .as_bytes()
            .chunks(2)
            .map(|pair| str::from_utf8(pair).unwrap());
        one(&digits
            .map(|pair| u8::from_str_radix(pair, 16).unwrap())
            .collect::<Vec<u8>>());
    }
    assert!(text.lines().count() > 200, "the corpus is gone");
}

// Datagrams -----------------------------------------------------------------------------------------------------------

fn config(token: Option<&str>) -> Config {
    Config {
        url: URL.to_string(),
        token: token.and_then(Secret::token),
        ip_family: IpFamily::Any,
        password: Some(Secret(PASSWORD.to_string())),
        address: String::new(),
        port: 0,
        level: log::LevelFilter::Off,
        proxy: None,
        roots: None,
        state_path: PathBuf::new(),
        log_path: PathBuf::new(),
        warnings: Vec::new(),
    }
}

fn gateway(config: Config) -> Gateway {
    Gateway {
        telegram: Telegram::new(&config),
        socket: UdpSocket::bind("127.0.0.1:0").unwrap(),
        exchanges: Mutex::new(Exchanges::new(0)),
        state: Mutex::default(),
        saved: Mutex::default(),
        journal: Journal {
            file: File::open("/dev/null").unwrap(),
            before: Vec::new(),
            next: AtomicU64::new(0),
        },
        polling: Mutex::new(false),
        polled: Condvar::new(),
        answers: mpsc::sync_channel(1).0,
        forwarded: AtomicU64::new(0),
        failures: AtomicU64::new(0),
        config,
    }
}

/// A gateway in front of which time and datagrams are made up, and what the outside knows of it.
struct World {
    gateway: &'static Gateway,
    now: Instant,
    /// Requests that were acted on: peer, datagram, when, and what a duplicate must be answered with.
    acted: Vec<(SocketAddr, Vec<u8>, Instant, Vec<u8>)>,
    /// Requests that wait for Telegram.
    working: Vec<(Request, Datagram)>,
    /// Separate CON responses without ACK or RST: peer, datagram, what it delivers, copies sent.
    open: Vec<(SocketAddr, Vec<u8>, Option<u64>, u32)>,
    /// Bodies of which some blocks came, the latest touched last.
    bodies: Vec<(SocketAddr, String, Vec<u8>, Instant)>,
}

fn peer(number: u8) -> SocketAddr {
    (std::net::Ipv4Addr::new(10, 0, 0, number), 61616).into()
}

impl World {
    /// With a bot token in the configuration, or one bot that was served first, or neither.
    fn new(token: Option<&str>, bot: Option<&str>) -> World {
        static GATEWAYS: LazyLock<[Gateway; 2]> =
            LazyLock::new(|| [Some(TOKEN), None].map(|it| gateway(config(it))));
        let gateway = &GATEWAYS[usize::from(token.is_none())];
        *lock(&gateway.exchanges) = Exchanges::new(0);
        lock(&gateway.state).bot = bot.map(str::to_string);
        let (acted, working, open, bodies) = Default::default();
        World {
            gateway,
            now: Instant::now(),
            acted,
            working,
            open,
            bodies,
        }
    }

    fn exchanges(&self) -> MutexGuard<'_, Exchanges> {
        lock(&self.gateway.exchanges)
    }

    fn deliver(&mut self, peer: SocketAddr, bytes: &[u8]) {
        let event = self.exchanges().receive(self.now, peer, bytes);
        let message = Datagram::decode(bytes).filter(|it| match (it.kind, it.code >> 5) {
            (Kind::Con | Kind::Non, 0) => it.code != 0,
            (Kind::Ack, 2 | 4 | 5) => true,
            (kind, _) => it.code == 0 && (kind == Kind::Ack || kind == Kind::Rst),
        });
        let reply = match event {
            coap::Event::Nothing => Vec::new(),
            coap::Event::Send(reply) => reply,
            coap::Event::Acknowledged(delivers) => {
                let open = self.close(peer, message.filter(|it| it.kind == Kind::Ack));
                return assert_eq!(Some(delivers), open.map(|open| open.2), "an ACK of nothing");
            }
            coap::Event::Refused => {
                return assert!(
                    self.close(peer, message.filter(|it| it.kind == Kind::Rst))
                        .is_some(),
                    "RST of nothing"
                );
            }
            coap::Event::Request(request) => {
                assert!(self.known(peer, bytes).is_none(), "a duplicate is acted on");
                return self.act(
                    request,
                    message.expect("a malformed message is a request"),
                    bytes,
                );
            }
        };
        match message {
            // RFC 7252 §4.2 and §4.3.
            None => {
                let confirmable = bytes.len() >= 4 && bytes[0] & 0xf0 == 0x40;
                let reset = if confirmable {
                    vec![0x70, 0, bytes[2], bytes[3]]
                } else {
                    Vec::new()
                };
                assert_eq!(reply, reset, "malformed");
            }
            Some(message) if message.kind == Kind::Ack || message.kind == Kind::Rst => {
                assert!(reply.is_empty(), "an ACK or RST is answered");
                // Of a response that was given up, perhaps.
                assert!(
                    self.close(peer, Some(message))
                        .is_none_or(|open| open.3 == coap::MAX_RETRANSMIT)
                );
            }
            Some(message) => match self.known(peer, bytes) {
                Some(before) => assert_eq!(&reply, before, "another answer for a duplicate"),
                // RFC 7252 §5.4.1: a NON with an unknown critical option.
                None => assert!(
                    message.kind == Kind::Non
                        && reply.is_empty()
                        && message.options.iter().any(|it| it.0 % 2 == 1),
                    "not acted on"
                ),
            },
        }
    }

    /// What a duplicate must be answered with.
    fn known(&self, peer: SocketAddr, bytes: &[u8]) -> Option<&Vec<u8>> {
        let lifetime = Duration::from_secs(if bytes[0] & 0x30 == 0 { 247 } else { 145 });
        let waits = || {
            self.working
                .iter()
                .any(|(request, message)| request.peer == peer && message.encode() == bytes)
        };
        let same = |(other, datagram, at, _): &&(SocketAddr, Vec<u8>, Instant, Vec<u8>)| {
            *other == peer && datagram == bytes && (self.now - *at < lifetime || waits())
        };
        self.acted.iter().rev().find(same).map(|(.., reply)| reply)
    }

    fn act(&mut self, mut request: Request, message: Datagram, bytes: &[u8]) {
        let critical = [3, 7, URI_PATH, 15, 17, BLOCK2, BLOCK1];
        let unknown = message
            .options
            .iter()
            .find(|(number, _)| number % 2 == 1 && !critical.contains(number));
        assert!(
            !format!("{request}").contains(TOKEN),
            "the token gets into the log"
        );
        let peer = request.peer;
        match prepare(self.gateway, &mut request) {
            Err(response) => {
                let reply = self.exchanges().reply(&request, response);
                let code = self.immediate(peer, &message, bytes, &reply);
                if code == "2.31" {
                    let body = self.body(peer, &message);
                    assert!(
                        body.len() <= 8192 && message.option_uint(BLOCK1).unwrap() & 8 != 0,
                        "a wrong block is kept"
                    );
                    self.bodies.push((peer, path(&message), body, self.now));
                }
            }
            Ok(Some(work)) => {
                assert_eq!(unknown, None, "a critical option is ignored");
                let body = self.body(peer, &message);
                assert!(
                    body == request.payload && body.len() <= 8192,
                    "a body that was not sent so"
                );
                check_work(&self.gateway.config, &work, &body);
                let ack = self.exchanges().accept(&request);
                let expected = if message.kind == Kind::Con {
                    vec![0x60, 0, bytes[2], bytes[3]]
                } else {
                    Vec::new()
                };
                assert_eq!(ack, expected, "not an empty ACK");
                self.acted.push((peer, bytes.to_vec(), self.now, ack));
                self.working.push((request, message));
                assert!(self.working.len() <= 32, "too many requests in progress");
            }
            Ok(None) => assert_eq!(self.working.len(), 32, "refused although there is room"),
        }
    }

    /// The payload of a request, with the blocks before it.
    fn body(&mut self, peer: SocketAddr, message: &Datagram) -> Vec<u8> {
        let Some(block) = message.option_uint(BLOCK1) else {
            return message.payload.clone();
        };
        let (number, size) = ((block >> 4) as usize, 16 << (block & 7));
        assert!(
            size <= 1024 && message.payload.len() <= size,
            "a block that is too large"
        );
        assert!(
            block & 8 == 0 || message.payload.len() == size,
            "a block that is too small"
        );
        let at = self
            .bodies
            .iter()
            .rposition(|(other, resource, ..)| *other == peer && *resource == path(message));
        let known = at.map(|at| (self.bodies.len() - at, self.bodies.remove(at)));
        if number == 0 {
            return message.payload.clone();
        }
        let (age, (_, _, body, touched)) = known.expect("a block without its first one is taken");
        assert!(
            age <= 64 && self.now - touched < Duration::from_secs(60),
            "an abandoned body is kept"
        );
        assert_eq!(body.len(), number * size, "a gap is overlooked");
        [body, message.payload.clone()].concat()
    }

    /// Checks an answer that is given at once; returns its code.
    fn immediate(
        &mut self,
        peer: SocketAddr,
        request: &Datagram,
        bytes: &[u8],
        reply: &[u8],
    ) -> String {
        let answer = self.readable(request, reply);
        assert!(
            "2.05 2.31 4.00 4.02 4.03 4.04 4.05 4.06 4.08 4.13 4.15 5.05".contains(&answer.code()),
            "{answer}"
        );
        let before = match request.kind {
            Kind::Con => {
                assert_eq!(
                    (answer.kind, answer.id),
                    (Kind::Ack, request.id),
                    "not in the ACK"
                );
                reply.to_vec()
            }
            _ => Vec::new(),
        };
        self.acted.push((peer, bytes.to_vec(), self.now, before));
        answer.code()
    }

    /// What holds for every response.
    fn readable(&self, request: &Datagram, reply: &[u8]) -> Datagram {
        let answer = Datagram::decode(reply).expect("a malformed answer");
        assert_eq!(answer.token, request.token, "{answer}");
        assert!(matches!(answer.code >> 5, 2 | 4 | 5), "{answer}");
        if answer.kind != Kind::Ack {
            assert!(
                answer.code >> 5 == 2 || answer.payload.is_empty(),
                "the mote takes it for configuration: {answer}"
            );
            assert_eq!(answer.kind, request.kind);
        }
        let size = request
            .option_uint(BLOCK2)
            .map_or(1 << 16, |block| 16 << (block & 7));
        assert!(
            answer.code >> 5 != 2 || answer.payload.len() <= size,
            "larger than asked for: {answer}"
        );
        assert!(
            !reply
                .windows(TOKEN.len())
                .any(|window| window == TOKEN.as_bytes()),
            "the token is sent"
        );
        answer
    }

    /// The oldest request that waits for Telegram is answered.
    fn finish(&mut self, outcome: u8) {
        if self.working.is_empty() {
            return;
        }
        let (request, message) = self.working.remove(0);
        let tokens = "i5;f1;Ada:1234567890;r2345678901;".repeat(8);
        let response = match outcome % 4 {
            0 => Response::text(ResponseType::Content, MESSAGES_SENT),
            1 => Response {
                delivers: Some(7),
                ..Response::text(ResponseType::Content, &tokens)
            },
            2 => Response::text(ResponseType::Valid, NO_UPDATES),
            _ => Response::error(ResponseType::InternalServerError, TOKEN),
        };
        let response = response.in_block2(&request);
        let delivers = response.delivers;
        let bytes = self
            .exchanges()
            .respond(self.now, &request, response, outcome.into());
        let answer = self.readable(&message, &bytes);
        assert_ne!(answer.kind, Kind::Ack, "not separate");
        let fresh = self
            .open
            .iter()
            .all(|(_, open, ..)| open[2..4] != bytes[2..4]);
        assert!(fresh, "two responses with message ID {:04x}", answer.id);
        if answer.kind == Kind::Con {
            self.open.push((request.peer, bytes, delivers, 0));
        }
    }

    /// The response that an ACK or RST is for.
    fn close(
        &mut self,
        peer: SocketAddr,
        message: Option<Datagram>,
    ) -> Option<(SocketAddr, Vec<u8>, Option<u64>, u32)> {
        let id = message?.id.to_be_bytes();
        let at = self
            .open
            .iter()
            .position(|(other, bytes, ..)| *other == peer && bytes[2..4] == id)?;
        Some(self.open.remove(at))
    }

    fn wait(&mut self, seconds: u8) {
        for _ in 0..seconds {
            self.now += Duration::from_secs(1);
            let (resend, _) = self.exchanges().due(self.now);
            for (peer, bytes) in resend {
                let same =
                    |open: &&mut (SocketAddr, Vec<u8>, _, _)| open.0 == peer && open.1 == bytes;
                let open = self
                    .open
                    .iter_mut()
                    .find(same)
                    .expect("something else is sent again");
                open.3 += 1;
                assert!(open.3 <= 4, "sent more often than MAX_RETRANSMIT allows");
            }
        }
    }
}

fn path(message: &Datagram) -> String {
    let segments = message
        .options
        .iter()
        .filter(|(number, _)| *number == URI_PATH);
    segments
        .map(|(_, value)| format!("/{}", String::from_utf8_lossy(value)))
        .collect()
}

/// One datagram, and what it is when it comes again.
fn datagram(bytes: &[u8]) {
    let mut world = World::new(Some(TOKEN), None);
    world.deliver(peer(1), bytes);
    world.deliver(peer(1), bytes);
    world.deliver(peer(2), bytes);
    world.finish(bytes.len() as u8);
    world.deliver(peer(1), bytes);
}

/// A script of datagrams, answers from Telegram, and time.
fn exchanges(mut script: &[u8]) {
    let mut world = World::new(Some(TOKEN), None);
    let mut last = Vec::new();
    while let [operation, tail @ ..] = script {
        let (from, argument) = (
            peer(operation & 15),
            tail.first().copied().unwrap_or_default(),
        );
        script = tail;
        match operation >> 4 {
            0..=7 => {
                let [high, low, rest @ ..] = script else {
                    return;
                };
                let length = usize::from(u16::from_be_bytes([*high, *low])).min(rest.len());
                (last, script) = (rest[..length].to_vec(), &rest[length..]);
                world.deliver(from, &last);
            }
            8 => world.deliver(from, &last),
            9 => (0..argument).for_each(|number| world.deliver(peer(number), &last)),
            10 => world.finish(operation & 15),
            11 | 12 => {
                if let Some((peer, bytes, ..)) = world.open.last().cloned() {
                    world.deliver(
                        peer,
                        &[
                            if operation >> 4 == 11 { 0x60 } else { 0x70 },
                            0,
                            bytes[2],
                            bytes[3],
                        ],
                    );
                }
            }
            13 => world.wait(argument),
            // The next message: another ID.
            _ if last.len() >= 4 => {
                last[3] = last[3].wrapping_add(1);
                world.deliver(from, &last);
            }
            _ => {}
        }
        if world.acted.len() > 500 {
            return; // soon enough that nothing is evicted
        }
    }
}

// Forms ---------------------------------------------------------------------------------------------------------------

fn check_work(config: &Config, work: &Work, payload: &[u8]) {
    let served = |token: &Secret| match &config.token {
        Some(own) => own.0 == token.0,
        None => Secret::token(&token.0).is_some(),
    };
    match work {
        Work::Repeated(sent) => assert!(*sent && payload.is_empty(), "nothing was repeated"),
        Work::Update(token) => assert!(served(token)),
        Work::Message(message) => {
            let Message { token, chats, text } = message;
            assert!(
                served(token) && all_distinct(chats.iter()) && (1..=10).contains(&chats.len()),
                "{chats:?}"
            );
            assert!((1..=4096).contains(&text.chars().count()) && text == trim(text));
            assert!(
                String::from_utf8_lossy(payload).contains(text.as_str()),
                "{text}"
            );
            // Said again in the firmware's words, it is the same.
            let ids: Vec<String> = chats
                .iter()
                .map(|id| id.as_str().map_or(id.to_string(), str::to_string))
                .collect();
            let payload = mote::form(&config.url, &token.0, &ids.join(","), text);
            let [url, again, ids, said] = fields(&payload);
            assert_eq!(
                (url, again, said),
                (config.url.as_str(), token.0.as_str(), text.as_str())
            );
            assert_eq!(super::chats(ids).ok().as_ref(), Some(chats), "{payload}");
        }
    }
}

fn form(payload: &[u8]) {
    let post = |path| Datagram::new(Kind::Con, POST, 1).path(path);
    for (token, pinned) in [(Some(TOKEN), None), (None, None), (None, Some("123456789"))] {
        let mut world = World::new(token, pinned);
        world.deliver(peer(1), &post("message").payload(payload).encode());
        world.deliver(peer(1), &post("update").payload(payload).encode());
        if let Some((request, _)) = world.working.last()
            && let (Some(bot), "update") = (pinned, request.path().as_str())
        {
            assert!(
                String::from_utf8_lossy(&request.payload).contains(&format!("{bot}:")),
                "another bot"
            );
        }
    }
    // A text may hold anything.
    let text = String::from_utf8_lossy(payload).into_owned();
    let whole = [mote::form(URL, TOKEN, "1, ,@a,1", "").as_bytes(), payload].concat();
    let mut world = World::new(Some(TOKEN), None);
    world.deliver(peer(1), &post("message").payload(whole).encode());
    let said = trim(&text);
    match world.working.first() {
        Some((request, _)) => {
            assert_eq!(fields(&String::from_utf8_lossy(&request.payload))[3], said)
        }
        None => assert!(
            said.is_empty() || said.chars().count() > 4096 || payload.len() > 8000,
            "refused"
        ),
    }
}

// People --------------------------------------------------------------------------------------------------------------

/// What holds for every state.
fn check_state(state: &State) {
    let names: Vec<&str> = state.users().map(|(_, name)| name).collect();
    names.iter().for_each(|name| check_name(name));
    assert!(names.len() <= 10 && all_distinct(names.iter()), "{names:?}");
    assert!(state.removals() <= 10 && state.motes.len() <= 64 && state.suspects.len() <= 256);
    assert!(
        state
            .changes
            .iter()
            .all(|(sequence, _)| (1..=state.sequence).contains(sequence))
    );
    assert!(
        settings(state)
            .0
            .is_none_or(|value| (1..=120).contains(&value))
    );
}

/// Interval and feedback.
fn settings(state: &State) -> (Option<u8>, Option<u8>) {
    let find = |value: fn(&Change) -> Option<u8>| {
        state.changes.iter().find_map(|(_, change)| value(change))
    };
    let interval = find(|change| {
        if let Change::Interval(minutes) = change {
            Some(*minutes)
        } else {
            None
        }
    });
    (
        interval,
        find(|change| {
            if let Change::Feedback(on) = change {
                Some(*on)
            } else {
                None
            }
        }),
    )
}

fn check_restart(state: &State) {
    let text = state.to_json();
    assert_eq!(
        State::from_json(&text).expect(&text).to_json(),
        text,
        "another state after a restart"
    );
}

fn check_name(name: &str) {
    assert!(
        (1..=14).contains(&name.len()) && name == name.trim(),
        "{name:?}"
    );
    assert!(
        !name.chars().any(|c| c.is_control() || ";:,&=".contains(c)),
        "{name:?}"
    );
    let digit = |start| {
        name.strip_prefix(start)
            .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    let misread = name == "all"
        || name.starts_with("f0")
        || name.starts_with("f1")
        || digit('i')
        || digit('r');
    assert!(!misread, "{name:?} is misread");
}

/// What a mote keeps of what it is told.
#[derive(Clone, Debug, Default, PartialEq)]
struct Heard {
    interval: Option<u8>,
    feedback: Option<u8>,
    users: BTreeMap<i64, String>,
}

impl Heard {
    fn take(&mut self, token: &str) {
        if let Some((name, id)) = token.split_once(':') {
            check_name(name);
            assert!(id.len() <= 11, "{token}");
            self.users.insert(id.parse().unwrap(), name.to_string());
            return;
        }
        match token.split_at(1) {
            ("i", minutes) => self.interval = Some(minutes.parse().unwrap()),
            ("f", on @ ("0" | "1")) => self.feedback = on.parse().ok(),
            ("r", id) if id.len() <= 11 => drop(self.users.remove(&id.parse().unwrap())),
            _ => panic!("no token: {token}"),
        }
    }

    fn poll(&mut self, state: &mut State, mote: IpAddr, limit: usize) -> (Option<u64>, usize) {
        let (reply, last, left) = state.tokens_for(mote, limit);
        assert!(
            reply.len() <= limit && reply.is_empty() == last.is_none(),
            "{reply}"
        );
        reply
            .split(';')
            .filter(|token| !token.is_empty())
            .for_each(|token| self.take(token));
        (last, left)
    }

    /// Polls until it knows everything, but for removals that were forgotten before it heard of them.
    fn catch_up(&mut self, state: &mut State, mote: IpAddr, forgotten: bool) {
        for _ in 0..4 {
            match self.poll(state, mote, 302) {
                (Some(last), _) => state.acknowledge(mote, last),
                (None, left) => {
                    assert_eq!(left, 0, "a token that fits nowhere");
                    break;
                }
            }
        }
        let names = state
            .users()
            .filter(|(id, _)| (1..=99_999_999_999).contains(id));
        let users: BTreeMap<i64, String> = names.map(|(id, name)| (id, name.to_string())).collect();
        if forgotten {
            self.users.retain(|id, _| users.contains_key(id));
        }
        let (interval, feedback) = settings(state);
        let all = Heard {
            interval: interval.or(self.interval),
            feedback: feedback.or(self.feedback),
            users,
        };
        assert_eq!(*self, all, "a mote that missed something");
    }
}

/// A script of lines. `?`: a mote polls. Else somebody writes: one byte for who, the name, a tab, the text.
fn people(script: &[u8]) {
    let config = config(Some(TOKEN));
    let mut state = State {
        started: NOW - 1000,
        ..State::default()
    };
    let mut motes: [Heard; 3] = Default::default();
    let (mut now, mut forgotten) = (NOW, false);
    for (number, line) in (1..).zip(script.split(|byte| *byte == b'\n')) {
        match line {
            [] => now += 600,
            [b'?', options @ ..] => {
                let option = |at: usize| usize::from(options.get(at).copied().unwrap_or_default());
                let (mote, heard) = (peer(option(0) as u8 % 3).ip(), &mut motes[option(0) % 3]);
                let listed: Vec<Value> = heard.users.keys().map(|id| json!(id)).collect();
                assert!(
                    !state.notice_restart(mote, &listed),
                    "a mote that did not restart"
                );
                match option(1) % 4 {
                    0 => drop(heard.poll(&mut state, mote, 16 << (option(2) % 5))), // and the ACK is lost
                    1 if state.notice_restart(mote, &[]) => *heard = Heard::default(),
                    1 => {}
                    _ => {
                        if let (Some(last), _) =
                            heard.poll(&mut state, mote, 302.min(16 << (option(2) % 6)))
                        {
                            state.acknowledge(mote, last);
                        }
                    }
                }
            }
            [who, line @ ..] => {
                let line = String::from_utf8_lossy(line);
                let (name, text) = line.split_once('\t').unwrap_or(("Ada", &line));
                somebody_writes(&mut state, &config, number, *who, name, text, now);
            }
        }
        check_state(&state);
        forgotten |= state.removals() == 10;
    }
    check_restart(&state);
    for (number, heard) in (0..).zip(&mut motes) {
        heard.catch_up(&mut state, peer(number).ip(), forgotten);
    }
}

fn somebody_writes(
    state: &mut State,
    config: &Config,
    number: i64,
    who: u8,
    name: &str,
    text: &str,
    now: u64,
) {
    let chat = [1, 99_999_999_999, 100_000_000_000, -7]
        .get(usize::from(who % 16))
        .copied()
        .unwrap_or(who.into());
    let private = (1..=99_999_999_999).contains(&chat);
    let old = who >= 0x80;
    let date = if old { 0 } else { now };
    let update = json!({"update_id": number, "message": {"message_id": 77, "date": date, "text": text,
        "chat": {"id": chat, "type": "private", "first_name": name}}});
    let (before_settings, users) = (settings(state), state.users().count());
    let listed = |state: &State| {
        let change = state
            .changes
            .iter()
            .find(|(_, change)| change.key() == (2, chat));
        change.map(|(_, change)| matches!(change, Change::User(..)))
    };
    let before = listed(state);
    let locked = state
        .suspects
        .iter()
        .any(|(id, _, until)| *id == chat && *until > now);
    handle_update(state, &update, config, now);

    assert_eq!(state.offset, number + 1);
    let answer = state.answers.pop();
    assert_eq!(
        answer.as_ref().map(|answer| answer.chat),
        private.then_some(chat),
        "an answer to somebody else"
    );
    let answer = answer.unwrap_or_default();
    assert!(
        !answer.text.unwrap_or_default().contains(PASSWORD),
        "the password is said"
    );
    let words: Vec<String> = text.split_whitespace().map(str::to_string).collect();
    let lower: Vec<String> = words.iter().map(|word| word.to_ascii_lowercase()).collect();
    let is_config = lower
        .first()
        .is_some_and(|word| word == "config" || word == "/config");
    assert_eq!(
        answer.delete.is_some(),
        private && is_config && words.len() > 1,
        "a password stays in the chat"
    );

    let (interval, feedback) = settings(state);
    let allowed =
        is_config && private && !old && !locked && words.len() == 4 && words[1] == PASSWORD;
    let value = words
        .get(3)
        .filter(|value| allowed && value.bytes().all(|byte| byte.is_ascii_digit()));
    let value: Option<u8> = value.and_then(|value| value.parse().ok());
    match (lower.get(2).map(String::as_str), value) {
        (Some("interval"), Some(minutes @ 1..=120)) => assert_eq!(interval, Some(minutes)),
        (Some("feedback"), Some(on @ 0..=1)) => assert_eq!(feedback, Some(on)),
        _ => assert_eq!(settings(state), before_settings, "changed by {text:?}"),
    }
    let entry = listed(state);
    match (private, lower.as_slice() == ["remove", "me"] && !old) {
        (false, _) => assert_eq!(entry, before, "a chat that the firmware cannot hold"),
        (true, true) => assert_eq!(entry, Some(false), "not removed"),
        (true, false) => assert!(entry == Some(true) || users == 10, "not registered"),
    }
}

/// The body of an answer of the Bot API; the first byte chooses the status.
fn answer(input: &[u8]) {
    let Some((status, body)) = input.split_first() else {
        return;
    };
    let status = [200, 200, 200, 400, 401, 403, 429, 502][usize::from(status % 8)];
    let json: Option<Value> = serde_json::from_slice(body).ok();
    let result = match Failure::or_result(status, body) {
        Ok(result) => result,
        Err(failure) => {
            assert!(
                !(status == 200 && json.is_some_and(|json| json["ok"] == true)),
                "a success is a failure"
            );
            assert!(
                failure
                    .retry_after
                    .is_none_or(|pause| failure.code == Some(429) && pause.as_secs() < 60)
            );
            return;
        }
    };
    let json = json.expect("a success that is no JSON");
    assert!(
        status == 200 && json["ok"] == true && json["result"] == result,
        "no success: {status} {json}"
    );
    let config = config(Some(TOKEN));
    let mut state = State {
        offset: -1,
        ..State::default()
    };
    for update in result.as_array().into_iter().flatten() {
        let offset = update["update_id"]
            .as_i64()
            .map_or(state.offset, |id| id.saturating_add(1));
        handle_update(&mut state, update, &config, NOW);
        assert_eq!(
            state.offset, offset,
            "an update that blocks the ones behind it"
        );
        check_state(&state);
    }
    check_restart(&state);
    assert!(state.answers.len() <= result.as_array().map_or(0, Vec::len));
    Heard::default().catch_up(&mut state, peer(1).ip(), false);
}

/// `state.json`: what is accepted is a state like any other, and the gateway goes on with it.
fn saved(text: &[u8]) {
    let Some(mut state) = str::from_utf8(text).ok().and_then(State::from_json) else {
        return;
    };
    check_state(&state);
    check_restart(&state);
    state.motes.truncate(63);
    let mote = "2001:db8::1".parse().unwrap();
    state.motes.retain(|(address, _)| *address != mote);
    let mut heard = Heard::default();
    heard.catch_up(&mut state, mote, true);
    let config = config(Some(TOKEN));
    for (who, text) in (4..16).zip(
        ["hi", "remove me", "config geheim interval 7"]
            .into_iter()
            .cycle(),
    ) {
        state.started = 0;
        somebody_writes(&mut state, &config, 5, who, "Ada", text, NOW);
        check_state(&state);
    }
    check_restart(&state);
    heard.catch_up(&mut state, mote, true);
}

/// Names, one a line, all of them taken.
fn names(text: &[u8]) {
    let text = String::from_utf8_lossy(text);
    let mut taken: Vec<String> = Vec::new();
    for line in text.split('\n').take(20) {
        let name = wire_name(line, &taken.iter().map(String::as_str).collect::<Vec<_>>());
        check_name(&name);
        assert!(!taken.contains(&name), "{name} is not unique");
        assert_eq!(wire_name(&name, &[]), name, "another name after a restart");
        taken.push(name);
    }
}

/// What `send` makes of a datagram.
fn client(bytes: &[u8]) {
    let request = coap::encode_request("message", b"a", 0x0102_0304_0506_0708);
    let same_id = bytes.get(2..4) == Some(&[7, 8]);
    match coap::decode_response(bytes, &request) {
        None => {}
        Some((code, ..)) if code == "0.00" => assert!(same_id),
        Some((_, _, acknowledgement)) => {
            assert_eq!(bytes[4..8], request[4..8], "the answer to another request");
            let ack = if bytes[0] & 0x30 == 0 {
                vec![0x60, 0, bytes[2], bytes[3]]
            } else {
                Vec::new()
            };
            assert_eq!(acknowledgement, ack);
        }
    }
}
