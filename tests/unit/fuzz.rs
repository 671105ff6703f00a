//! What must hold whatever arrives, from the datagram to the decision. The fuzzer in `tests/fuzz/`
//! runs `one` with inputs that it makes up, `cargo test` with those that once reached something new
//! (`tests/fuzz/corpus.hex`).

// The datagrams are read and written by the mote's hand-made codec, for the gateway's own cannot
// judge itself.
#[allow(dead_code)]
#[path = "../support/firmware.rs"]
pub(super) mod firmware;
#[allow(dead_code)]
#[path = "../support/mote.rs"]
pub(super) mod mote;

use std::collections::{BTreeSet, HashMap};
use std::process;

use super::*;
use firmware::Firmware;
use mote::{BLOCK1, BLOCK2, Kind, Message as Datagram, MessageIds, URI_PATH};

// As in the firmware's datagrams.
pub(super) const URL: &str = "https://api.telegram.org/bot";
pub(super) const TOKEN: &str = "123456789:AAEaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
pub(super) const PASSWORD: &str = "geheim";
const MOTE_TOKEN: &str = "mesh";
/// Before it, the gateway was not there.
const START: u64 = 1_769_860_800;
/// No answer to a datagram.
const SILENCE: &[u8] = &[];

/// The first byte chooses the part (a digit, in the corpus).
pub fn one(input: &[u8]) {
    let Some((part, rest)) = input.split_first() else {
        return;
    };
    match part % 8 {
        0 => one_datagram(rest),
        1 => script_of_datagrams(rest),
        2 => form(rest),
        3 => script_of_people(rest),
        4 => answer_of_telegram(rest),
        5 => saved_state(rest),
        6 => names(rest),
        _ => settings(rest),
    }
}

/// Every input that is kept, as a line of hexadecimal digits.
#[test]
fn corpus() {
    let text = include_str!("../fuzz/corpus.hex");
    for (number, line) in (1..).zip(text.lines()) {
        println!("line {number}"); // shown if it fails
        let digits = line.as_bytes().chunks(2);
        let byte = |pair| u8::from_str_radix(str::from_utf8(pair).unwrap(), 16).unwrap();
        one(&digits.map(byte).collect::<Vec<u8>>());
    }
    assert!(text.lines().count() > 200, "the corpus is gone");
}

// ---------- Datagrams ----------

pub(super) fn gateway(token: Option<&str>) -> Gateway {
    let config = config(token);
    Gateway {
        socket: UdpSocket::bind("127.0.0.1:0").unwrap(),
        exchanges: Exchanges::new(),
        telegram: Telegram::new(&config),
        state: State::default(),
        saved: None,
        motes: Motes::default(),
        people: People::default(),
        token: None,
        next_fetch: Instant::now(),
        found_nothing: None,
        fetch_fails: false,
        hang: None,
        deadline: Instant::now(),
        config,
    }
}

pub(super) fn config(token: Option<&str>) -> Config {
    let secret = |text: &str| Secret(text.to_string());
    Config {
        url: URL.to_string(),
        token: token.map(secret),
        mote_token: token.map(|_| secret(MOTE_TOKEN)),
        mote_token_origin: String::new(),
        ip_family: IpFamily::Any,
        password: password(),
        listen: ([127, 0, 0, 1], 0).into(),
        roots: RootCerts::WebPki,
        roots_origin: String::new(),
        state_path: PathBuf::new(),
    }
}

pub(super) fn peer(number: u8) -> SocketAddr {
    ([10, 0, 0, number], 61616).into()
}

/// A gateway for which time and datagrams are made up, and what the outside knows of it.
struct World {
    gateway: Gateway,
    now: Instant,
    /// How Telegram will answer.
    outcome: u8,
    acted: Vec<Acted>,
    open: Vec<Open>,
    /// By peer and path: what has come of a request in blocks, and when the last one came.
    bodies: HashMap<(SocketAddr, String), (Vec<u8>, Instant)>,
}

/// A request that was acted on.
struct Acted {
    peer: SocketAddr,
    datagram: Vec<u8>,
    at: Instant,
    /// What a duplicate must be answered with.
    reply: Vec<u8>,
}

/// A separate CON response without ACK or RST.
struct Open {
    peer: SocketAddr,
    bytes: Vec<u8>,
    version: Option<u64>,
    copies: u32,
}

impl World {
    fn new() -> World {
        World {
            gateway: gateway(Some(TOKEN)),
            now: Instant::now(),
            outcome: 0,
            acted: Vec::new(),
            open: Vec::new(),
            bodies: HashMap::new(),
        }
    }

    fn deliver(&mut self, peer: SocketAddr, bytes: &[u8]) {
        let message = Datagram::decode(bytes).filter(|message| match message.kind {
            Kind::Con | Kind::Non => (1..32).contains(&message.code),
            Kind::Ack | Kind::Rst => message.code == 0,
        });
        let reply = match self.gateway.exchanges.receive(self.now, peer, bytes) {
            Event::Send(reply) => reply,
            Event::Acknowledged(version) => {
                let message = message.filter(|message| message.kind == Kind::Ack);
                let open = self.close(peer, &message.expect("no ACK, but it counts"));
                return assert_eq!(Some(version), open.unwrap().version);
            }
            Event::Request(request) => {
                let message = message.expect("a malformed message is a request");
                assert_eq!(self.known(peer, bytes), None, "a duplicate is acted on");
                return self.act(request, message, bytes);
            }
        };
        match message {
            // RFC 7252 §4.2 and §4.3.
            None if bytes.len() >= 4 && bytes[0] & 0xf0 == 0x40 => {
                assert_eq!(reply, [0x70, 0, bytes[2], bytes[3]], "malformed CON");
            }
            None => assert_eq!(reply, SILENCE, "malformed"),
            Some(message) if matches!(message.kind, Kind::Ack | Kind::Rst) => {
                assert_eq!(reply, SILENCE, "an ACK or RST is answered");
                let open = self.close(peer, &message);
                let delivered = open.filter(|open| message.kind == Kind::Ack && open.copies < 4);
                assert!(delivered.is_none_or(|open| open.version.is_none()));
            }
            Some(_) => assert_eq!(Some(&reply), self.known(peer, bytes), "not acted on"),
        }
    }

    /// What a duplicate must be answered with.
    fn known(&self, peer: SocketAddr, bytes: &[u8]) -> Option<&Vec<u8>> {
        let lifetime = Duration::from_secs(if bytes[0] & 0x30 == 0 { 247 } else { 145 });
        let is_same = |acted: &&Acted| {
            acted.peer == peer && acted.datagram == bytes && self.now - acted.at < lifetime
        };
        self.acted.iter().find(is_same).map(|acted| &acted.reply)
    }

    fn act(&mut self, mut request: Request, message: Datagram, bytes: &[u8]) {
        let peer = request.peer;
        assert!(!request.to_string().contains(TOKEN), "a token for the log");
        let work = self.gateway.judge(&mut request);
        let reply = match work {
            Err(response) | Ok(Work::Reply(response)) => {
                let exchanges = &mut self.gateway.exchanges;
                let reply = exchanges.acknowledge(&request, Some(&response));
                self.check_immediate(&message, &reply);
                if response.code() == "2.31" {
                    let body = self.body(peer, &message);
                    let key = (peer, path(&message));
                    self.bodies.insert(key, (body, self.now));
                }
                reply
            }
            Ok(work) => {
                let known = [3, 7, URI_PATH, 15, mote::ACCEPT, BLOCK2, BLOCK1];
                let is_known = |number: u16| number.is_multiple_of(2) || known.contains(&number);
                assert!(message.options.iter().all(|option| is_known(option.0)));
                let body = self.body(peer, &message);
                assert!(body == request.packet.payload, "a body that was not sent");
                check_work(&self.gateway, &work);
                let reply = self.gateway.exchanges.acknowledge(&request, None);
                let is_con = message.kind == Kind::Con;
                let empty = [0x60, 0, bytes[2], bytes[3]];
                let expected = if is_con { &empty[..] } else { SILENCE };
                assert_eq!(reply, expected, "not an empty ACK");
                self.respond(&request, &message);
                reply
            }
        };
        let is_con = message.kind == Kind::Con;
        self.acted.push(Acted {
            peer,
            datagram: bytes.to_vec(),
            at: self.now,
            reply: if is_con { reply } else { Vec::new() },
        });
    }

    /// The body of a request that was taken, with the blocks before it.
    fn body(&mut self, peer: SocketAddr, message: &Datagram) -> Vec<u8> {
        let mut body = Vec::new();
        if let Some(block) = message.option_uint(BLOCK1) {
            let (number, size) = (block as usize >> 4, 16 << (block & 7));
            let length = message.payload.len();
            assert!(size <= 1024 && length <= size, "a long block");
            assert!(block & 8 == 0 || length == size, "a short block");
            let known = self.bodies.remove(&(peer, path(message)));
            if number > 0 {
                let (before, at) = known.expect("the first block is missing");
                assert!(self.now - at < Duration::from_secs(60), "abandoned");
                assert_eq!(before.len(), number * size, "a gap");
                body = before;
            }
        }
        body.extend(&message.payload);
        assert!(body.len() <= 17 << 10, "too long");
        body
    }

    /// Checks a response that is sent at once.
    fn check_immediate(&self, request: &Datagram, reply: &[u8]) {
        if reply == SILENCE {
            // RFC 7252 §5.4.1: a bad option in a NON.
            assert_eq!(request.kind, Kind::Non, "not answered");
            let numbers = request.options.iter().map(|(number, _)| number);
            return assert!({ numbers }.any(|number| number % 2 == 1), "not answered");
        }
        let answer = check_response(request, reply);
        let codes = "2.05 2.31 4.00 4.02 4.03 4.04 4.05 4.06 4.08 4.13 4.15 5.05";
        assert!(codes.contains(&answer.code()), "{answer}");
        if request.kind == Kind::Con {
            assert_eq!((answer.kind, answer.id), (Kind::Ack, request.id));
        }
        if ["2.31", "4.08", "4.13"].contains(&answer.code().as_str()) {
            let more = if answer.code() == "2.31" { 8 } else { 0 };
            let block = request.option_uint(BLOCK1).unwrap_or_default() & !8 | more;
            let block = request.option_value(BLOCK1).map(|_| block);
            assert_eq!(answer.option_uint(BLOCK1), block, "{answer}");
        }
    }

    /// Telegram has answered.
    fn respond(&mut self, request: &Request, message: &Datagram) {
        let mut response = match self.outcome % 4 {
            0 => Response::text(ResponseType::Content, MESSAGES_SENT),
            1 => Response::text(ResponseType::Content, "r2345678901;i5;f1;Ada:1234567890"),
            2 => Response::text(ResponseType::Valid, NO_UPDATES),
            _ => Response::error(ResponseType::InternalServerError, TOKEN),
        };
        let is_state = self.outcome % 4 == 1;
        response.version = is_state.then_some(self.acted.len() as u64);
        let exchanges = &mut self.gateway.exchanges;
        let bytes = exchanges.respond(self.now, request, &response);
        let answer = check_response(message, &bytes);
        assert_ne!(answer.kind, Kind::Ack, "not separate");
        if answer.kind == Kind::Con {
            let is_fresh = self.open.iter().all(|open| open.bytes[2..4] != bytes[2..4]);
            assert!(is_fresh, "another response has message ID {}", answer.id);
            self.open.push(Open {
                peer: request.peer,
                bytes,
                version: response.version,
                copies: 0,
            });
        }
    }

    /// The response that an ACK or RST is for.
    fn close(&mut self, peer: SocketAddr, message: &Datagram) -> Option<Open> {
        let id = message.id.to_be_bytes();
        let is_own = |open: &Open| open.peer == peer && open.bytes[2..4] == id;
        let at = self.open.iter().position(is_own)?;
        Some(self.open.remove(at))
    }

    fn wait(&mut self, seconds: u8) {
        for _ in 0..seconds {
            self.now += Duration::from_secs(1);
            for (peer, bytes) in self.gateway.exchanges.retransmissions(self.now) {
                let is_own = |open: &&mut Open| open.peer == peer && open.bytes == bytes;
                let open = self.open.iter_mut().find(is_own);
                let open = open.expect("something else is sent again");
                open.copies += 1;
                assert!(open.copies <= 4, "sent too often");
            }
            let due = self.gateway.exchanges.next_due();
            assert!(due.is_none_or(|due| due > self.now), "overlooked");
        }
    }
}

fn path(message: &Datagram) -> String {
    let segments = message.options.iter();
    let segments = segments.filter(|(number, _)| *number == URI_PATH);
    let segments = segments.map(|(_, value)| String::from_utf8_lossy(value).into_owned());
    segments.collect::<Vec<String>>().join("/")
}

/// What holds for every response.
fn check_response(request: &Datagram, bytes: &[u8]) -> Datagram {
    let answer = Datagram::decode(bytes).expect("a malformed answer");
    assert_eq!(answer.token, request.token, "{answer}");
    assert!(matches!(answer.code >> 5, 2 | 4 | 5), "{answer}");
    if answer.kind != Kind::Ack {
        let is_silent = answer.code >> 5 == 2 || answer.payload.is_empty();
        assert!(is_silent, "taken for configuration: {answer}");
        assert_eq!(answer.kind, request.kind, "{answer}");
    }
    assert!(!answer.text().contains(TOKEN), "the token is sent");
    answer
}

/// One datagram, and what it is when it comes again.
fn one_datagram(bytes: &[u8]) {
    let mut world = World::new();
    world.outcome = bytes.len() as u8;
    world.deliver(peer(1), bytes);
    world.deliver(peer(1), bytes);
    world.deliver(peer(2), bytes);
    let (exchanges, nowhere) = (&mut world.gateway.exchanges, ([0; 4], 5683).into());
    match exchanges.receive(world.now, nowhere, bytes) {
        Event::Send(reply) => assert_eq!(reply, SILENCE),
        _ => panic!("from nowhere"),
    }
}

/// Datagrams, how Telegram answers, and time.
fn script_of_datagrams(mut script: &[u8]) {
    let mut world = World::new();
    let mut last = Vec::new();
    while let [operation, tail @ ..] = script {
        let from = peer(operation & 15);
        let argument = tail.first().copied().unwrap_or_default();
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
            10 => world.outcome = operation & 15,
            kind @ (11 | 12) => {
                if let Some(open) = world.open.last() {
                    let first = if kind == 11 { 0x60 } else { 0x70 };
                    let closing = [first, 0, open.bytes[2], open.bytes[3]];
                    world.deliver(open.peer, &closing);
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
        if world.acted.len() > 200 {
            return; // before anything is forgotten for want of room
        }
    }
}

// ---------- Forms ----------

fn judged(gateway: &mut Gateway, path: &str, payload: &[u8]) -> Result<Work, Response> {
    let datagram = Datagram::new(Kind::Con, mote::POST, 1).path(path);
    let datagram = datagram.payload(payload).encode();
    let exchanges = &mut gateway.exchanges;
    match exchanges.receive(Instant::now(), peer(1), &datagram) {
        Event::Request(mut request) => gateway.judge(&mut request),
        _ => panic!("no request"),
    }
}

/// What holds for everything that is carried out.
fn check_work(gateway: &Gateway, work: &Work) {
    let (token, message) = match work {
        Work::Reply(_) => return,
        Work::Update(token) => (token, None),
        Work::Message(message) => (&message.token, Some(message)),
    };
    match &gateway.config.token {
        Some(own) => assert!(own.0 == token.0, "another token"),
        None => assert!(token.is_bot_token(), "no token"),
    }
    if let (None, Some(bot)) = (message, &gateway.state.bot) {
        assert_eq!(bot, token.bot_id(), "another bot");
    }
    if let Some(Message { chats, text, .. }) = message {
        let distinct: BTreeSet<String> = chats.iter().map(Value::to_string).collect();
        assert!(distinct.len() == chats.len() && (1..=10).contains(&chats.len()));
        assert!((1..=4096).contains(&text.chars().count()) && text == trim(text));
    }
}

fn form(payload: &[u8]) {
    let mut bound = gateway(None);
    bound.state.bot = Some("123456789".to_string());
    for mut gateway in [gateway(Some(TOKEN)), gateway(None), bound] {
        if let Ok(work) = judged(&mut gateway, "update", payload) {
            check_work(&gateway, &work);
        }
        let Ok(work) = judged(&mut gateway, "message", payload) else {
            continue;
        };
        check_work(&gateway, &work);
        let Work::Message(message) = work else { return };
        assert!(String::from_utf8_lossy(payload).contains(&message.text));
        // Said again in the firmware's words, it is the same.
        let id = |chat: &Value| chat.as_str().map_or(chat.to_string(), str::to_string);
        let ids: Vec<String> = message.chats.iter().map(id).collect();
        let again = mote::form(URL, &message.token.0, &ids.join(","), &message.text);
        match judged(&mut gateway, "message", again.as_bytes()) {
            Ok(Work::Message(again)) => {
                assert_eq!((&again.chats, &again.text), (&message.chats, &message.text));
            }
            _ => panic!("refused: {again}"),
        }
    }
    // A text may hold anything.
    let start = mote::form(URL, MOTE_TOKEN, "1, ,@a,1", "");
    let whole = [start.as_bytes(), payload].concat();
    let text = String::from_utf8_lossy(payload);
    let text = trim(&text);
    match judged(&mut gateway(Some(TOKEN)), "message", &whole) {
        Ok(Work::Message(message)) => assert_eq!(message.text, text),
        _ => assert!(text.is_empty() || text.chars().count() > 4096, "refused"),
    }
}

// ---------- People ----------

/// What holds for every state.
fn check_state(state: &State) {
    let names: BTreeSet<&String> = state.users.iter().map(|user| &user.name).collect();
    let ids: BTreeSet<i64> = state.users.iter().map(|user| user.chat).collect();
    let removed: BTreeSet<i64> = state.removed.iter().copied().collect();
    names.iter().for_each(|name| check_name(name));
    let users = state.users.len();
    assert!(users <= 10 && names.len() == users && ids.len() == users);
    assert!(removed.len() == state.removed.len() && removed.len() <= 100);
    assert!(ids.is_disjoint(&removed) && ids.union(&removed).all(is_private));
    assert!(matches!(state.interval, None | Some(1..=120)));
    assert!(matches!(state.feedback, None | Some(0 | 1)));
    assert!(state.tokens().len() <= firmware::REPLY_MAX, "too long");
}

fn check_restart(state: &State) {
    let text = serde_json::to_vec_pretty(state).unwrap();
    let again: State = serde_json::from_slice(&text).expect("not readable");
    assert!(&again == state, "another state after a restart");
}

fn check_name(name: &str) {
    let fits = (1..=14).contains(&name.len()) && name == name.trim();
    let is_separator = |c: char| c.is_control() || ";:,&=".contains(c);
    let is_digit = |c: Option<char>| c.is_some_and(|c| c.is_ascii_digit());
    let mut chars = name.chars();
    let is_command = match chars.next() {
        Some('f') => matches!(chars.next(), Some('0' | '1')),
        Some('i' | 'r') => is_digit(chars.next()),
        _ => name == "all" || name.chars().all(|c| is_digit(Some(c))),
    };
    assert!(
        fits && !name.contains(is_separator) && !is_command,
        "{name:?}"
    );
}

/// Telegram, the motes, and the gateway between them.
struct Town {
    state: State,
    people: People,
    motes: Motes,
    now: Instant,
    residents: [Resident; 3],
}

/// A mote, and what it has acknowledged.
struct Resident {
    peer: SocketAddr,
    ids: MessageIds,
    firmware: Firmware,
    /// Tokens, and when.
    acknowledged: Option<(String, Instant)>,
    /// Whether what it was told last told it everything, see `is_enough`.
    is_right: bool,
}

impl Town {
    fn new() -> Town {
        Town {
            state: State {
                ignore_commands_before: Some(START),
                ..State::default()
            },
            people: People::default(),
            motes: Motes::default(),
            now: Instant::now(),
            residents: [1, 2, 3].map(|number| Resident {
                peer: peer(number),
                ids: MessageIds::new(number.into()),
                firmware: Firmware::default(),
                acknowledged: None,
                is_right: true,
            }),
        }
    }

    /// `fate`: 0, the reply is lost; 1, its ACK is lost; 2, the mote restarts first; else nothing.
    fn poll(&mut self, number: u8, fate: u8) {
        let (mote, fate) = (&mut self.residents[usize::from(number) % 3], fate % 4);
        if fate == 2 {
            mote.firmware.reboot();
            mote.ids.restart();
            (mote.acknowledged, mote.is_right) = (None, true);
        }
        self.motes.note_request(mote.peer, mote.ids.next());
        let tokens = self.state.tokens();
        let version = self.motes.offer(&tokens);
        if tokens.is_empty() || self.motes.has_acknowledged(mote.peer, version, self.now) {
            if !tokens.is_empty() {
                let (told, at) = mote.acknowledged.as_ref().expect("told nothing");
                assert_eq!(told, &tokens, "a mote that missed something");
                assert!(self.now < *at + Duration::from_secs(3600), "for too long");
            }
            let is_right = mote.firmware.knows() == all_of(&self.state);
            return assert!(is_right || !mote.is_right, "a mote that is wrong");
        }
        if fate == 0 {
            return;
        }
        mote.is_right = is_enough(&self.state, &tokens, &mote.firmware);
        mote.firmware.take(&tokens);
        if mote.is_right {
            assert_eq!(mote.firmware.knows(), all_of(&self.state), "told {tokens}");
        }
        if fate != 1 {
            self.motes.acknowledge(mote.peer, version, self.now);
            mote.acknowledged = Some((tokens, self.now));
        }
    }

    /// `who` says who in which chat, and whether it was before the gateway was there.
    fn write(&mut self, who: u8, name: &str, text: &str) {
        let chat = match who % 16 {
            0 => 99_999_999_999,
            1 => 100_000_000_000,
            2 => -7,
            _ => i64::from(who),
        };
        let (before, is_old) = (self.state.clone(), who >= 0x80);
        let suspect = self.people.suspects.get(&chat);
        let is_locked = suspect.is_some_and(|suspect| suspect.locked_until.is_some());
        self.state.offset = 0;
        let update = update(chat, name, text, if is_old { 0 } else { START });
        self.people.take(&update, &mut self.state, &password());
        assert_eq!(self.state.offset, 2);
        assert!(self.people.suspects.len() <= 256);
        let words: Vec<&str> = text.split_whitespace().collect();
        let lower: Vec<String> = words.iter().map(|word| word.to_lowercase()).collect();
        let first = lower.first().map_or("", String::as_str);
        let is_config = ["config", "/config"].contains(&first);
        self.check_answer(is_private(&chat).then_some(chat), is_config);

        let mut expected = (before.interval, before.feedback);
        let is_heard = is_private(&chat) && !is_old && !is_locked;
        if is_heard && is_config && words.len() == 4 && words[1] == PASSWORD {
            let digits = Some(words[3]).filter(|text| text.bytes().all(|b| b.is_ascii_digit()));
            let value = digits.and_then(|digits| digits.parse::<u8>().ok());
            match (words[2].to_ascii_lowercase().as_str(), value) {
                ("interval", Some(1..=120)) => expected.0 = value,
                ("feedback", Some(0 | 1)) => expected.1 = value,
                _ => {}
            }
        }
        let state = &self.state;
        assert_eq!((state.interval, state.feedback), expected, "{text:?}");
        let is_user = state.users.iter().any(|user| user.chat == chat);
        if !is_private(&chat) {
            assert!(state.users == before.users, "it cannot register");
        } else if lower == ["remove", "me"] && !is_old {
            assert!(!is_user && state.removed.last() == Some(&chat));
        } else {
            assert!(is_user || before.users.len() == 10, "not registered");
        }
    }

    /// Nobody is told anything but the one who wrote.
    fn check_answer(&mut self, chat: Option<i64>, is_config: bool) {
        let answers = mem::take(&mut self.people.answers);
        assert!(answers.keys().all(|told| Some(*told) == chat));
        let is_deleted = answers.values().any(|answer| answer.deleted == [1]);
        assert_eq!(is_deleted, chat.is_some() && is_config);
        let mut texts = answers.values().flat_map(|answer| &answer.texts);
        assert!(!texts.any(|text| text.contains(PASSWORD)), "it is said");
    }
}

/// Bot API, `Update`: somebody writes to the bot.
pub(super) fn update(chat: i64, name: &str, text: &str, date: u64) -> Value {
    let chat = json!({"id": chat, "type": "private", "first_name": name});
    let message = json!({"message_id": 1, "date": date, "chat": chat, "text": text});
    json!({"update_id": 1, "message": message})
}

pub(super) fn password() -> Option<Secret> {
    Some(Secret(PASSWORD.to_string()))
}

/// As `Firmware::knows` says it.
fn all_of(state: &State) -> String {
    let name = |user: &User| format!("{}:{}", user.name, user.chat);
    let mut users: Vec<String> = state.users.iter().map(name).collect();
    users.sort();
    let mut all = Vec::new();
    all.extend(state.interval.map(|minutes| format!("i{minutes}")));
    all.extend(state.feedback.map(|on| format!("f{on}")));
    all.extend(users);
    all.join(";")
}

/// Whether a mote knows everything after these tokens. It does not if there was no room to tell it of
/// all who are gone; or if a user has the name that it knows for another one, who comes later: it
/// finds users by name or id, whichever slot comes first.
fn is_enough(state: &State, tokens: &str, firmware: &Firmware) -> bool {
    let mut ids = BTreeSet::new();
    firmware.users().iter().all(|user| {
        let (name, id) = user.rsplit_once(':').unwrap();
        let has_id = |user: &User| user.chat.to_string() == id;
        let is_gone = tokens.split(';').any(|token| token == format!("r{id}"));
        let place = state.users.iter().position(has_id);
        let namesake = state.users.iter().position(|user| user.name == name);
        let is_late = place.is_some() && namesake.is_some_and(|namesake| Some(namesake) < place);
        ids.insert(id.to_string()) && (is_gone || place.is_some() && !is_late)
    })
}

/// Lines. `?`: a mote polls. `!`: a chat refuses. Empty: ten minutes pass. Else somebody writes: one
/// byte for who, the name, a tab, the text.
fn script_of_people(script: &[u8]) {
    let mut town = Town::new();
    for line in script.split(|byte| *byte == b'\n') {
        match line {
            [] => town.now += Duration::from_secs(600),
            [b'?', options @ ..] => {
                let option = |at: usize| options.get(at).copied().unwrap_or_default();
                town.poll(option(0), option(1));
            }
            [b'!', who, ..] => drop(town.state.remove(i64::from(who % 16) + 1)),
            [who, line @ ..] => {
                let line = String::from_utf8_lossy(line);
                let (name, text) = line.split_once('\t').unwrap_or(("Ada", &line));
                town.write(*who, name, text);
            }
        }
        check_state(&town.state);
    }
    check_restart(&town.state);
    town.now += Duration::from_secs(3600);
    (0..3).for_each(|number| town.poll(number, 3));
    (0..3).for_each(|number| town.poll(number, 3));
}

// ---------- What is read ----------

/// The body of an answer of the Bot API; the first byte chooses the status.
fn answer_of_telegram(input: &[u8]) {
    let Some((status, body)) = input.split_first() else {
        return;
    };
    let status = [200, 200, 200, 400, 401, 403, 429, 502][usize::from(status % 8)];
    let json: Value = serde_json::from_slice(body).unwrap_or_default();
    let result = match read_answer(status, body) {
        Ok(result) => result,
        Err(failure) => {
            assert!(status != 200 || json["ok"] != true, "a success");
            assert!(failure.code.is_none() || json["ok"] == false);
            return assert!(failure.retry_in.is_none() || failure.code == Some(429));
        }
    };
    assert!(status == 200 && json["ok"] == true && json["result"] == result);
    let (mut state, mut people) = (State::default(), People::default());
    let updates = result.as_array().into_iter().flatten();
    for update in updates {
        let id = update["update_id"].as_i64();
        let offset = id.map_or(state.offset, |id| id.saturating_add(1));
        people.take(update, &mut state, &password());
        assert_eq!(state.offset, offset, "it blocks those behind it");
        check_state(&state);
    }
    check_restart(&state);
}

/// `state.json`: the gateway goes on with whatever it accepts.
fn saved_state(text: &[u8]) {
    let Ok(mut state) = serde_json::from_slice::<State>(text) else {
        return;
    };
    check_restart(&state);
    let mut people = People::default();
    for who in 4..16 {
        for text in ["hi", "remove me", "config geheim interval 7", "hi"] {
            people.take(&update(who, "Ada", text, START), &mut state, &password());
            state.tokens();
        }
    }
    assert_eq!(state.interval, Some(7));
    check_restart(&state);
}

/// Names, one a line, all of them taken.
fn names(text: &[u8]) {
    let text = String::from_utf8_lossy(text);
    let mut taken: Vec<String> = Vec::new();
    for line in text.split('\n').take(20) {
        let others: Vec<&str> = taken.iter().map(String::as_str).collect();
        let name = wire_name(line, &others);
        check_name(&name);
        assert!(!taken.contains(&name), "{name} is taken");
        assert_eq!(wire_name(&name, &[]), name, "another name the next time");
        taken.push(name);
    }
}

/// `config.ini`, and the same as `.env`.
fn settings(content: &[u8]) {
    if String::from_utf8_lossy(content).contains("SSL_CERT_FILE") {
        return; // it names a file that is read
    }
    for is_ini in [true, false] {
        let (config, fault) = config_of(content, is_ini);
        if !fault.is_empty() {
            let line: usize = fault.split(':').nth(1).unwrap().parse().expect(&fault);
            let lines = content.split(|byte| *byte == b'\n').count();
            assert!((1..=lines).contains(&line), "{fault}");
        }
        let is_word = |secret: &Secret| !secret.0.is_empty() && !secret.0.contains(' ');
        assert!(config.token.is_none_or(|token| token.is_bot_token()));
        assert!(config.mote_token.is_none_or(|word| is_word(&word)));
        assert!(config.password.is_some_and(|word| is_word(&word)));
        assert!(is_https_url(&config.url));
    }
}

/// What a file sets, and what is wrong with it, as in `:3: no section yet`.
pub(super) fn config_of(content: &[u8], is_ini: bool) -> (Config, String) {
    static FILES: AtomicU64 = AtomicU64::new(0);
    let number = FILES.fetch_add(1, Relaxed);
    let name = format!("coap_websocket-unit-{}-{number}", process::id());
    let path = env::temp_dir().join(name);
    fs::write(&path, content).unwrap();
    let mut config = config(None);
    let result = read_settings(&path, &mut config, is_ini);
    fs::remove_file(&path).unwrap();
    let fault = result.err().unwrap_or_default();
    let place = path.display().to_string();
    assert!(fault.is_empty() || fault.starts_with(&place), "{fault}");
    (config, fault.replace(&place, ""))
}
