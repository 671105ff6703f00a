//! What must hold whatever arrives, from the datagram to the decision. The fuzzer in `tests/fuzz/`
//! runs `one` with inputs that it makes up, `cargo test` with those that once reached something new
//! (`tests/fuzz/corpus.hex`).

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};

use super::fixtures::firmware::{self, Firmware};
use super::fixtures::mote::{
    self, BLOCK1, BLOCK2, Kind, Message as Datagram, MessageIds, REQUEST_TAG, URI_PATH,
};
use super::fixtures::{
    MOTE_TOKEN, PASSWORD, Scratch, TOKEN, URL, config, config_of, gateway, message, peer, secret,
    update,
};
use super::*;

/// No answer to a datagram.
const SILENCE: &[u8] = &[];

/// The first byte chooses the part.
pub fn one(input: &[u8]) {
    let Some((part, rest)) = input.split_first() else {
        return;
    };
    let _ = log::set_logger(&Witness); // fails from the second time on
    log::set_max_level(LevelFilter::Info);
    LOG.take();
    match part % 10 {
        0 => one_datagram(rest),
        1 => script_of_datagrams(rest),
        2 => form(rest),
        3 => script_of_people(rest),
        4 => answer_of_telegram(rest),
        5 => saved_state(rest),
        6 => names(rest),
        7 => settings(rest),
        8 => script_of_fetches(rest),
        _ => script_of_blocks(rest),
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

// ---------- The log ----------

thread_local! {
    /// What was logged since `one` began.
    static LOG: RefCell<String> = RefCell::default();
}

struct Witness;

impl log::Log for Witness {
    fn enabled(&self, metadata: &log::Metadata) -> bool {
        metadata.level() <= Level::Info
    }

    fn log(&self, record: &log::Record) {
        LOG.with_borrow_mut(|log| *log += &record.args().to_string());
    }

    fn flush(&self) {}
}

fn is_logged(secret: &str) -> bool {
    LOG.with_borrow(|log| log.contains(secret))
}

// ---------- Datagrams ----------

/// A gateway for which time and datagrams are made up, and what the outside knows of it.
struct World {
    gateway: Gateway,
    now: Instant,
    /// How Telegram will answer.
    outcome: u8,
    delivered: u32,
    acted: Vec<Acted>,
    /// What a CON without blocks was answered at once.
    refused: HashMap<(SocketAddr, Vec<u8>), Vec<u8>>,
    open: Vec<Open>,
    unfinished: HashMap<BodyKey, Unfinished>,
}

/// A request that was begun, or a block that was taken.
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
    ticket: Option<u64>,
    copies: u32,
}

#[derive(PartialEq, Eq, Hash)]
struct BodyKey {
    peer: SocketAddr,
    path: String,
    tags: Vec<Vec<u8>>,
}

/// What may have come of requests in blocks: what was refused is not taken out.
#[derive(Default)]
struct Unfinished {
    bodies: Vec<Vec<u8>>,
    at: Option<Instant>,
}

impl World {
    fn new() -> World {
        World {
            gateway: gateway(Some(TOKEN)),
            now: Instant::now(),
            outcome: 0,
            delivered: 0,
            acted: Vec::new(),
            refused: HashMap::new(),
            open: Vec::new(),
            unfinished: HashMap::new(),
        }
    }

    /// Whether the gateway may soon forget something for want of room.
    fn is_full(&self) -> bool {
        let bodies = self.unfinished.values().flat_map(|known| &known.bodies);
        let bytes: usize = bodies.map(|body| 256 + body.len()).sum();
        self.acted.len() > 200 || self.delivered > 1000 || bytes > coap::ASSEMBLIES_MAX / 2
    }

    fn deliver(&mut self, peer: SocketAddr, bytes: &[u8]) {
        self.delivered += 1;
        let message = Datagram::decode(bytes).filter(|message| match message.kind {
            Kind::Con | Kind::Non => (1..32).contains(&message.code),
            Kind::Ack | Kind::Rst => message.code == 0,
        });
        let reply = match self.gateway.exchanges.receive(self.now, peer, bytes) {
            Event::Send(reply) => reply,
            Event::Acknowledged(ticket) => {
                let message = message.filter(|message| message.kind == Kind::Ack);
                let open = self.close(peer, &message.expect("no ACK, but it counts"));
                return assert_eq!(Some(ticket), open.unwrap().ticket);
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
                assert!(delivered.is_none_or(|open| open.ticket.is_none()));
            }
            Some(message) => {
                assert_eq!(Some(&reply), self.known(peer, bytes), "not acted on");
                if let Some(unfinished) = self.unfinished.get_mut(&BodyKey::of(peer, &message)) {
                    unfinished.at = Some(self.now); // at most: another of its bodies may be meant
                }
            }
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
        assert!(!request.to_string().contains(TOKEN), "a token for the log");
        let verdict = self.gateway.judge(&mut request);
        match verdict.unwrap_or_else(Verdict::Reply) {
            Verdict::Reply(response) => self.answer_at_once(&request, &message, bytes, &response),
            Verdict::Work(work) => {
                let known = [3, 7, URI_PATH, 15, mote::ACCEPT, BLOCK2, BLOCK1];
                let is_known = |number: u16| number.is_multiple_of(2) || known.contains(&number);
                assert!(message.options.iter().all(|option| is_known(option.0)));
                let bodies = self.assemble(request.peer, &message);
                assert!(bodies.contains(&request.packet.payload), "it was not sent");
                check_work(&self.gateway, &work);
                let reply = self.gateway.exchanges.promise(&request);
                let empty = [0x60, 0, bytes[2], bytes[3]];
                match message.kind {
                    Kind::Con => assert_eq!(reply, empty, "not an empty ACK"),
                    _ => assert_eq!(reply, SILENCE),
                }
                self.respond(&request, &message);
                self.remember(request.peer, bytes, reply);
            }
        }
    }

    fn remember(&mut self, peer: SocketAddr, bytes: &[u8], reply: Vec<u8>) {
        self.acted.push(Acted {
            peer,
            datagram: bytes.to_vec(),
            at: self.now,
            reply,
        });
    }

    fn answer_at_once(
        &mut self,
        request: &Request,
        message: &Datagram,
        bytes: &[u8],
        response: &Response,
    ) {
        let peer = request.peer;
        let is_con = message.kind == Kind::Con;
        let reply = self.gateway.exchanges.respond_now(request, response);
        let code = response.code().to_string();
        self.check_immediate(message, &reply);
        let is_silent = reply == SILENCE;
        assert_eq!(is_silent, !is_con && code == "4.02", "RFC 7252 §5.4.1");
        if code == "2.31" {
            let mut bodies = self.assemble(peer, message);
            let unfinished = self.unfinished.entry(BodyKey::of(peer, message));
            let unfinished = unfinished.or_default();
            unfinished.bodies.append(&mut bodies);
            unfinished.at = Some(self.now);
        }
        let is_block = |value: &[u8]| value.len() < 4 || value.len() == 4 && value[0] == 0;
        if message.option_value(BLOCK1).is_some_and(is_block) {
            let again = if is_con { reply } else { Vec::new() };
            self.remember(peer, bytes, again);
        } else if is_con {
            let first = self.refused.entry((peer, bytes.to_vec()));
            let first = first.or_insert_with(|| reply.clone());
            assert_eq!(*first, reply, "judged otherwise the second time");
        }
    }

    /// What the body of a request that was taken may be, with the blocks before it.
    fn assemble(&mut self, peer: SocketAddr, message: &Datagram) -> Vec<Vec<u8>> {
        assert!(is_of_its_size(message), "a block of another size");
        let block = message.option_uint(BLOCK1).unwrap_or_default();
        let start = (block as usize >> 4) * (16 << (block & 7));
        let mut bodies = vec![Vec::new()];
        if start > 0 {
            let unfinished = self.unfinished.get_mut(&BodyKey::of(peer, message));
            let unfinished = unfinished.expect("the first block is missing");
            let age = self.now - unfinished.at.expect("nothing has come");
            assert!(age < Duration::from_secs(60), "too late");
            let again = message.payload.as_slice();
            let fits = |body: &mut Vec<u8>| body.len() == start || body.get(start..) == Some(again);
            bodies = unfinished.bodies.extract_if(.., fits).collect();
            assert!(!bodies.is_empty(), "a gap");
            unfinished.at = Some(self.now);
        }
        for body in &mut bodies {
            body.truncate(start);
            body.extend(&message.payload);
            assert!(body.len() <= 17 << 10, "too long");
        }
        bodies
    }

    /// Checks a response that is sent at once.
    fn check_immediate(&self, request: &Datagram, reply: &[u8]) {
        if reply == SILENCE {
            let mut numbers = request.options.iter().map(|(number, _)| number);
            return assert!(numbers.any(|number| number % 2 == 1), "not answered");
        }
        let answer = check_response(request, reply);
        let codes = "2.05 2.31 4.00 4.02 4.03 4.04 4.05 4.06 4.08 4.13 4.15 5.05";
        assert!(codes.contains(&answer.code()), "{answer}");
        if request.kind == Kind::Con {
            assert_eq!(answer.kind, Kind::Ack);
            assert_eq!(answer.id, request.id);
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
        response.ticket = is_state.then_some(self.acted.len() as u64);
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
                ticket: response.ticket,
                copies: 0,
            });
        }
    }

    /// The response that an ACK or RST is for.
    fn close(&mut self, peer: SocketAddr, message: &Datagram) -> Option<Open> {
        let id = message.id.to_be_bytes();
        let is_own = |open: &Open| open.peer == peer && open.bytes[2..4] == id;
        let index = self.open.iter().position(is_own)?;
        Some(self.open.remove(index))
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

impl BodyKey {
    fn of(peer: SocketAddr, message: &Datagram) -> BodyKey {
        let mut path = String::new();
        let mut tags = Vec::new();
        for (number, value) in &message.options {
            match *number {
                URI_PATH => path += &format!("/{}", String::from_utf8_lossy(value)),
                REQUEST_TAG => tags.push(value.clone()),
                _ => {}
            }
        }
        BodyKey { peer, path, tags }
    }
}

fn is_of_its_size(message: &Datagram) -> bool {
    let Some(block) = message.option_uint(BLOCK1) else {
        return true;
    };
    let size = 16 << (block & 7);
    let length = message.payload.len();
    let is_full = length == size || block & 8 == 0 && length < size;
    block & 7 < 7 && is_full
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
    let nowhere = ([0; 4], 5683).into();
    match world.gateway.exchanges.receive(world.now, nowhere, bytes) {
        Event::Send(reply) => assert_eq!(reply, SILENCE),
        _ => panic!("from nowhere"),
    }
    assert!(!is_logged(TOKEN));
}

/// Datagrams, how Telegram answers, and time.
fn script_of_datagrams(mut script: &[u8]) {
    let mut world = World::new();
    let mut last = Vec::new();
    while let [operation, tail @ ..] = script
        && !world.is_full()
    {
        let from = peer(operation & 15);
        let argument = tail.first().copied().unwrap_or_default();
        script = tail;
        match operation >> 4 {
            0..=7 => {
                let [high, low, rest @ ..] = script else {
                    return;
                };
                let length = usize::from(u16::from_be_bytes([*high, *low])).min(rest.len());
                last = rest[..length].to_vec();
                script = &rest[length..];
                world.deliver(from, &last);
            }
            8 => world.deliver(from, &last),
            9 => {
                for number in 0..argument {
                    world.deliver(peer(number), &last);
                }
            }
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
    }
    assert!(!is_logged(TOKEN));
}

/// Eight clients behind one address and port that send texts of three blocks, one step a byte. Every
/// two have one Request-Tag, and the texts of half of these pairs begin alike. Whoever is refused, has
/// got through or was silent for a minute starts anew.
fn script_of_blocks(script: &[u8]) {
    let mut exchanges = Exchanges::new();
    let mut now = Instant::now();
    let mut next_blocks = [(0, now); 8];
    for (id, step) in (0..).zip(script) {
        let client = step & 7;
        let (next, last) = &mut next_blocks[usize::from(client)];
        match step >> 3 & 3 {
            0 => *next = 0, // it has restarted
            1 => now += Duration::from_secs(9),
            _ => {}
        }
        if now - *last >= Duration::from_secs(60) {
            *next = 0;
        }
        *last = now;
        let first = if client & 2 == 0 { client | 1 } else { client };
        let letter = if *next == 0 { first } else { client };
        let block = mote::block(*next, *next < 2, 16);
        let datagram = Datagram::new(Kind::Con, mote::POST, id).path("message");
        let datagram = datagram.option(BLOCK1, block).payload([letter; 16]);
        let datagram = datagram.option(REQUEST_TAG, [client >> 1]);
        let event = exchanges.receive(now, peer(1), &datagram.encode());
        let Event::Request(mut request) = event else {
            panic!("no request");
        };
        match exchanges.assemble(&mut request) {
            Ok(false) => *next += 1,
            Ok(true) => {
                *next = 0;
                let body = request.packet.payload;
                let own = [[first; 16], [client; 16], [client; 16]].concat();
                assert_eq!(body, own);
            }
            Err(response) => {
                *next = 0;
                assert_eq!(response.code().to_string(), "4.08");
            }
        }
    }
}

// ---------- Forms ----------

/// What a form asks for, if it is accepted.
fn judged(gateway: &mut Gateway, path: &str, payload: &[u8]) -> Option<Work> {
    let datagram = Datagram::new(Kind::Con, mote::POST, 1).path(path);
    let datagram = datagram.payload(payload).encode();
    let event = gateway
        .exchanges
        .receive(Instant::now(), peer(1), &datagram);
    let Event::Request(mut request) = event else {
        panic!("no request");
    };
    match gateway.judge(&mut request).unwrap_or_else(Verdict::Reply) {
        Verdict::Work(work) => Some(work),
        Verdict::Reply(_) => None,
    }
}

/// What holds for everything that is carried out.
fn check_work(gateway: &Gateway, work: &Work) {
    let token = match work {
        Work::Update(token) => token,
        Work::Message(text) => &text.token,
    };
    match &gateway.config.token {
        Some(own) => assert!(own.0 == token.0, "another token"),
        None => assert!(token.is_bot_token(), "no token"),
    }
    match work {
        Work::Update(token) => {
            let bot = gateway.state.bot.as_deref();
            assert!(bot.is_none_or(|bot| bot == token.bot_id()), "another bot");
        }
        Work::Message(Text { chats, text, .. }) => {
            let distinct: BTreeSet<String> = chats.iter().map(ChatId::to_string).collect();
            assert!(distinct.len() == chats.len() && (1..=10).contains(&chats.len()));
            assert!((1..=4096).contains(&text.chars().count()) && text == trim(text));
        }
    }
}

fn form(payload: &[u8]) {
    let mut bound = gateway(None);
    bound.state.bot = Some("123456789".to_string());
    for mut gateway in [gateway(Some(TOKEN)), gateway(None), bound] {
        if let Some(work) = judged(&mut gateway, "update", payload) {
            check_work(&gateway, &work);
        }
        let Some(work) = judged(&mut gateway, "message", payload) else {
            continue;
        };
        check_work(&gateway, &work);
        let Work::Message(text) = work else {
            panic!("another resource");
        };
        let payload = String::from_utf8_lossy(payload);
        assert!(payload.contains(&text.text));
        let own = [TOKEN, MOTE_TOKEN];
        assert!(gateway.config.token.is_none() || own.iter().any(|own| payload.contains(own)));
        // Said again in the firmware's words, it is the same.
        let ids: Vec<String> = text.chats.iter().map(ChatId::to_string).collect();
        let again = mote::form(URL, &text.token.0, &ids.join(","), &text.text);
        match judged(&mut gateway, "message", again.as_bytes()) {
            Some(Work::Message(again)) => {
                assert_eq!(again.chats, text.chats);
                assert_eq!(again.text, text.text);
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
        Some(Work::Message(message)) => assert_eq!(message.text, text),
        _ => assert!(text.is_empty() || text.chars().count() > 4096, "refused"),
    }
}

// ---------- People ----------

/// What holds for every state.
fn check_state(state: &State) {
    let names: BTreeSet<&String> = state.users.iter().map(|user| &user.name).collect();
    let ids: BTreeSet<i64> = state.users.iter().map(|user| user.chat).collect();
    let removed: BTreeSet<i64> = state.removals().collect();
    for name in &names {
        check_name(name);
    }
    let users = state.users.len();
    assert!(users <= 10 && names.len() == users && ids.len() == users);
    assert_eq!(removed.len(), state.removals().count());
    assert!(state.removed.len() <= 100 && state.strangers.len() <= 100);
    assert!(ids.is_disjoint(&removed));
    assert!(ids.union(&removed).all(|id| is_for_firmware(*id)));
    assert!(matches!(state.interval, None | Some(1..=120)));
    assert!(matches!(state.feedback, None | Some(0 | 1)));
    assert!(state.summary().len() <= firmware::REPLY_MAX, "too long");
}

/// Whether the firmware keeps this id whole, and can remove it.
fn is_for_firmware(chat: i64) -> bool {
    chat > 0 && chat.to_string().len() <= 11
}

fn check_restart(state: &State) {
    let text = serde_json::to_vec_pretty(&state.for_file()).unwrap();
    let Ok(again) = State::parse(Path::new("state.json"), Some(text)) else {
        panic!("not readable");
    };
    assert!(again.for_file() == state.for_file(), "another state");
    // Strangers who left are not told apart any more, but the same tokens fit.
    let tokens = |state: &State| -> BTreeSet<String> {
        state.summary().split(';').map(str::to_string).collect()
    };
    assert_eq!(tokens(&again), tokens(state), "after a restart");
}

fn check_name(name: &str) {
    let fits = (1..=14).contains(&name.len()) && name == name.trim();
    let is_wrong = |c: char| c.is_control() || ";:,&=\u{200b}\u{202e}\u{feff}".contains(c);
    let is_digit = |c: Option<char>| c.is_some_and(|c| c.is_ascii_digit());
    let mut chars = name.chars();
    let is_command = match chars.next() {
        Some('f') => matches!(chars.next(), Some('0' | '1')),
        Some('i' | 'r') => is_digit(chars.next()),
        _ => name == "all" || name.chars().all(|c| is_digit(Some(c))),
    };
    assert!(fits && !name.contains(is_wrong) && !is_command, "{name:?}");
}

/// Telegram, the motes, and the gateway between them.
struct Town {
    state: State,
    people: People,
    config: Config,
    motes: Motes,
    now: Instant,
    residents: [Resident; 3],
    /// Somebody calls himself like the password.
    is_password_a_name: bool,
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
            state: State::default(),
            people: People::default(),
            config: config(Some(TOKEN)),
            motes: Motes::default(),
            now: Instant::now(),
            residents: [1, 2, 3].map(|number| Resident {
                peer: peer(number),
                ids: MessageIds::new(number.into()),
                firmware: Firmware::default(),
                acknowledged: None,
                is_right: true,
            }),
            is_password_a_name: false,
        }
    }

    /// `fate`: 0, the reply is lost; 1, its ACK is lost; 2, the mote restarts first; else nothing.
    fn poll(&mut self, number: u8, fate: u8) {
        let mote = &mut self.residents[usize::from(number) % 3];
        let fate = fate % 4;
        if fate == 2 {
            mote.firmware.reboot();
            mote.ids.restart();
            mote.acknowledged = None;
            mote.is_right = true;
        }
        self.motes
            .note_request(mote.peer, mote.ids.next(), self.now);
        let tokens = self.state.summary();
        let version = self.motes.version_of(&tokens);
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

    /// Takes a message, and checks that nothing happens but what it may lead to.
    fn hear(&mut self, message: &Value) {
        let before = self.state.clone();
        let writer = Writer::of(message, self);
        self.state.offset = 0;
        let update = update(message.clone());
        self.people.take(&update, &mut self.state, &self.config);
        assert_eq!(self.state.offset, 2, "it would come again");
        self.state.offset = before.offset;
        assert!(self.people.suspects.len() <= 256);
        let answers = mem::take(&mut self.people.answers);
        let deletions = mem::take(&mut self.people.deletions);
        self.check_secrets(message, &answers);
        self.check_deletions(message, deletions.into());
        let Some(writer) = writer else {
            assert!(self.state == before, "changed by no writing: {message}");
            return assert!(answers.is_empty(), "{message}");
        };
        self.check_users(&before, &writer);
        self.check_settings(&before, &writer);
        let has_left = |chat: i64| self.state.is_removed(&ChatId::Number(chat));
        for answer in &answers {
            let is_told = answer.chat == writer.chat;
            assert!(is_told || writer.is_obeyed && has_left(answer.chat));
        }
        let is_answered = |chat| answers.iter().any(|answer| answer.chat == chat);
        assert!(is_answered(writer.chat) || writer.is_locked || writer.letters.is_empty());
        for User { chat, .. } in &before.users {
            let stays = self.state.is_user(*chat);
            assert!(stays || is_answered(*chat), "removed without a word");
        }
    }

    /// The password is never said, nor logged, unless somebody makes it their name.
    fn check_secrets(&mut self, message: &Value, answers: &VecDeque<Answer>) {
        let mut decoration = message.clone();
        for key in ["text", "caption"] {
            decoration
                .as_object_mut()
                .map(|message| message.remove(key));
        }
        self.is_password_a_name |= holds(&decoration, PASSWORD);
        if self.is_password_a_name {
            return;
        }
        let mut texts = answers.iter().flat_map(|answer| &answer.texts);
        assert!(!texts.any(|text| text.contains(PASSWORD)), "it is said");
        assert!(!is_logged(PASSWORD), "it is logged");
    }

    /// Everybody keeps their place and their name but who leaves. Only the writer comes.
    fn check_users(&self, before: &State, writer: &Writer) {
        let state = &self.state;
        let mut removed_others = 0;
        for user in &before.users {
            let after = state.users.iter().find(|after| after.chat == user.chat);
            match after {
                Some(after) => assert_eq!(after.name, user.name, "a name is kept"),
                None if user.chat == writer.chat => {}
                None => removed_others += 1,
            }
        }
        assert!(
            removed_others <= u32::from(writer.is_obeyed),
            "others are removed"
        );
        let is_user = state.is_user(writer.chat);
        let mut new_users = state.users.clone();
        new_users.retain(|user| !before.is_user(user.chat));
        if is_user && !before.is_user(writer.chat) {
            assert!(!self.config.registration_by_password || writer.is_obeyed);
            let had_left = before.is_removed(&ChatId::Number(writer.chat));
            assert!(!had_left || !writer.text.is_empty());
            assert_eq!(new_users.len(), 1);
        } else {
            assert!(new_users.is_empty(), "somebody else is registered");
        }
        let is_removed = state.is_removed(&ChatId::Number(writer.chat));
        if writer.words == ["remove", "me"] || writer.words == ["stop"] {
            return assert!(!is_user && is_removed, "not removed: {}", writer.text);
        }
        let letters = &writer.letters;
        let may_leave = letters.contains("remove") || letters.starts_with("stop");
        if !is_user && (before.is_user(writer.chat) || !state.removals().eq(before.removals())) {
            assert!(may_leave, "{}", writer.letters);
        }
        let is_open = !self.config.registration_by_password && !writer.text.is_empty();
        let has_left = may_leave && is_removed;
        assert!(is_user || has_left || !is_open || before.users.len() >= 10);
    }

    fn check_settings(&self, before: &State, writer: &Writer) {
        let mut interval = before.interval;
        let mut feedback = before.feedback;
        let words: Vec<&str> = writer.text.split(' ').collect();
        let is_number = |value: &str| value.bytes().all(|byte| byte.is_ascii_digit());
        match words[..] {
            _ if !writer.is_obeyed => {}
            ["config", PASSWORD, "interval", value] if is_number(value) => {
                let minutes = value.parse().ok().filter(|value| (1..=120).contains(value));
                interval = minutes.or(interval);
            }
            ["config", PASSWORD, "feedback", value] if is_number(value) => {
                let on = value.parse().ok().filter(|value| *value <= 1);
                feedback = on.or(feedback);
            }
            _ => return, // maybe in other words
        }
        assert_eq!(self.state.interval, interval, "{}", writer.text);
        assert_eq!(self.state.feedback, feedback, "{}", writer.text);
    }

    /// What begins with a command that takes the password is deleted, in whatever chat, and nothing else.
    fn check_deletions(&self, message: &Value, deletions: Vec<Deletion>) {
        let chat = &message["chat"];
        let id = message["message_id"].as_i64();
        let (Some(id), Some(chat), true) = (id, chat["id"].as_i64(), chat["type"].is_string())
        else {
            return assert!(deletions.is_empty());
        };
        if message["from"]["is_bot"] == true {
            return assert!(deletions.is_empty());
        }
        let mut is_needed = false;
        let mut is_allowed = false;
        for key in ["text", "caption"] {
            let text = message[key].as_str().unwrap_or_default();
            for command in ["config", "register"] {
                if command == "config" || self.config.registration_by_password {
                    is_needed |= words(text).first().is_some_and(|word| word == command);
                    is_allowed |= letters(text).starts_with(command);
                }
            }
        }
        assert!(!is_needed || deletions.len() == 1, "not deleted: {message}");
        assert!(is_allowed || deletions.is_empty(), "deleted: {message}");
        for deletion in deletions {
            assert_eq!(deletion.chat, chat);
            assert_eq!(deletion.message_id, id);
        }
    }
}

/// Whoever has written to the bot, and what decides what may come of it. Read beside the gateway's
/// own way.
struct Writer {
    chat: i64,
    text: String,
    words: Vec<String>,
    letters: String,
    is_locked: bool,
    /// The password is a word of the text, and it would be heard.
    is_obeyed: bool,
}

impl Writer {
    /// None if it is no writing of a person.
    fn of(message: &Value, town: &Town) -> Option<Writer> {
        let chat = message["chat"]["id"].as_i64()?;
        let is_person = message["chat"]["type"] == "private" && message["from"]["is_bot"] != true;
        let text = message["text"].as_str().unwrap_or_default();
        let caption = message["caption"].as_str().unwrap_or_default();
        let is_writing = has_media(message) || !text.is_empty() || !caption.is_empty();
        if !is_person || !is_for_firmware(chat) || !is_writing {
            return None;
        }
        let mut suspects = town.people.suspects.iter();
        let suspect = suspects.find(|suspect| suspect.chat == chat);
        let is_locked = suspect.is_some_and(|suspect| suspect.wrong >= 5);
        Some(Writer {
            chat,
            text: text.to_string(),
            words: words(text),
            letters: letters(text),
            is_locked,
            is_obeyed: !is_locked && text.split_whitespace().any(|word| word == PASSWORD),
        })
    }
}

/// The words of a text as somebody types it who does not type anything odd.
fn words(text: &str) -> Vec<String> {
    let words = text.split_whitespace();
    words.map(str::to_ascii_lowercase).collect()
}

/// What is left of a text without all that may stand around and between words.
fn letters(text: &str) -> String {
    let mut letters = text.to_lowercase();
    letters.retain(char::is_alphanumeric);
    letters
}

/// Whether a string somewhere in it may be shown as one that holds this word.
fn holds(value: &Value, word: &str) -> bool {
    match value {
        Value::String(text) => letters(text).contains(word),
        Value::Array(values) => values.iter().any(|value| holds(value, word)),
        Value::Object(values) => values.values().any(|value| holds(value, word)),
        _ => false,
    }
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

/// Lines. `?`: a mote polls. `!`: a chat refuses. `=`: registering takes the password, or does no
/// longer. `{`: a message as Telegram sends it. Empty: ten minutes pass. Else somebody writes: one
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
            [b'=', ..] => town.config.registration_by_password ^= true,
            [b'{', ..] => {
                if let Ok(message) = serde_json::from_slice(line) {
                    town.hear(&message);
                }
            }
            [who, line @ ..] => {
                let line = String::from_utf8_lossy(line);
                let (name, text) = line.split_once('\t').unwrap_or(("Ada", &line));
                let chat = match who % 16 {
                    0 => 99_999_999_999,
                    1 => 100_000_000_000,
                    2 => -7,
                    _ => i64::from(*who),
                };
                town.hear(&message(chat, name, text));
            }
        }
        check_state(&town.state);
    }
    check_restart(&town.state);
    town.now += Duration::from_secs(3600);
    for number in [0, 1, 2, 0, 1, 2] {
        town.poll(number, 3);
    }
}

// ---------- Fetches ----------

/// Two bytes for each step: what happens, and how many seconds pass before it.
fn script_of_fetches(script: &[u8]) {
    let mut now = Instant::now();
    let mut polling = Polling::new(Some(secret(TOKEN)), now);
    let mut refused_until = now;
    let mut is_last_page_unread = false;
    for step in script.chunks_exact(2) {
        now += Duration::from_secs(u64::from(step[1]) / 4);
        let mut failure = Failure::new("no route".to_string());
        failure.timed_out = step[0] & 0x10 != 0;
        failure.http_began = step[0] & 0x20 != 0 && !failure.timed_out;
        match step[0] % 8 {
            0 => polling.note_texts(&[Err(failure), Ok(Value::Null)], now, now),
            1 => polling.note_texts(&[Err(failure)], now, now),
            // A fetch; nobody asks while Telegram wants none.
            _ if now < refused_until => {
                assert!(polling.token_if_due(now).is_none(), "it asks too soon");
                assert_eq!(polling.refused_for(now), Some(refused_until - now));
            }
            2 => {
                polling.note_page(0, now);
                polling.note_fetch(&secret(TOKEN), step[0] & 0x10 != 0, now);
                is_last_page_unread = false;
                let due = polling.next_due().unwrap();
                assert!((3..=15).contains(&(due - now).as_secs()));
                assert!(polling.empty_page_holds(&secret(TOKEN), now) && !polling.is_failing);
            }
            3 => {
                failure.http_began = true;
                failure.timed_out = false;
                failure.error_code = Some(429);
                let retry_after = Duration::from_secs(step[1].into());
                failure.retry_after = Some(retry_after);
                polling.note_failed_fetch(&failure, now, now);
                refused_until = now + retry_after;
            }
            _ => {
                is_last_page_unread |= failure.timed_out || failure.http_began;
                polling.note_failed_fetch(&failure, now, now);
                assert!(polling.is_failing);
            }
        }
        let minute_later = now + Duration::from_secs(60);
        let due = polling.next_due().unwrap();
        assert!(due <= minute_later.max(refused_until), "deaf");
        assert!(
            due >= refused_until || now >= refused_until,
            "it asks too soon"
        );
        let time = polling.request_time(now);
        assert!(time == REQUEST_TIME || time == Duration::from_secs(2) && polling.hangs);
        assert_eq!(polling.request_time(minute_later), REQUEST_TIME);
        assert_eq!(polling.page_limit, if is_last_page_unread { 1 } else { 10 });
    }
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
            assert!(failure.error_code.is_none() || json["ok"] == false);
            assert!(failure.retry_after.is_none() || failure.error_code == Some(429));
            return assert!(failure.http_began && !failure.timed_out);
        }
    };
    assert!(status == 200 && json["ok"] == true && json["result"] == result);
    let config = config(Some(TOKEN));
    let mut state = State::default();
    let mut people = People::default();
    for update in result.as_array().into_iter().flatten() {
        let id = update["update_id"].as_i64();
        let offset = id.map_or(state.offset, |id| id.saturating_add(1));
        people.take(update, &mut state, &config);
        assert_eq!(state.offset, offset, "it blocks those behind it");
        check_state(&state);
    }
    check_restart(&state);
}

/// `state.json`: the gateway goes on with whatever there is.
fn saved_state(text: &[u8]) {
    let scratch = Scratch::new();
    let mut config = config(Some(TOKEN));
    config.state_path = scratch.0.join("state.json");
    fs::write(&config.state_path, text).unwrap();
    let object = serde_json::from_slice::<serde_json::Map<String, Value>>(without_mark(text));
    let saved = object.and_then(|object| State::deserialize(Value::Object(object)));
    let Ok(mut state) = State::open(&config) else {
        panic!("it can be read");
    };
    match saved {
        Ok(saved) => {
            check_state(&state);
            let mut chats = Vec::new();
            for user in &saved.users {
                if fits_firmware(user.chat) && !chats.contains(&user.chat) && chats.len() < 10 {
                    chats.push(user.chat);
                }
            }
            assert!(state.users.iter().map(|user| user.chat).eq(chats.clone()));
            let has_left = |chat: &&i64| fits_firmware(**chat) && !chats.contains(*chat);
            let removed: BTreeSet<&i64> = saved.removed.iter().filter(has_left).collect();
            assert_eq!(state.removals().count(), removed.len().min(100));
            assert!(state.removals().all(|chat| removed.contains(&chat)));
            let is_sensible = saved
                .interval
                .is_none_or(|minutes| (1..=120).contains(&minutes));
            assert_eq!(state.interval == saved.interval, is_sensible);
            let is_same_bot = saved.bot.as_deref() == Some("123456789");
            assert_eq!(state.offset, if is_same_bot { saved.offset } else { 0 });
        }
        Err(_) => {
            assert!(state.users.is_empty() && state.offset == 0);
            let aside = fs::read(scratch.0.join("state.json.damaged"));
            assert!(aside.is_ok_and(|kept| kept == text), "it is lost");
        }
    }
    assert_eq!(state.bot.as_deref(), Some("123456789"));
    check_restart(&state);
    let mut people = People::default();
    for who in 4..16 {
        for text in ["hi", "remove me", "config geheim interval 7", "hi"] {
            let update = update(message(who, "Ada", text));
            people.take(&update, &mut state, &config);
            state.summary();
        }
    }
    assert_eq!(state.interval, Some(7));
    check_restart(&state);
}

/// Names, one a line, all of them taken.
fn names(text: &[u8]) {
    let text = String::from_utf8_lossy(text);
    let mut state = State::default();
    for (chat, line) in (1..20).zip(text.split('\n')) {
        let name = state.free_name(line);
        check_name(&name);
        let mut users = state.users.iter();
        assert!(users.all(|user| user.name != name), "{name} is taken");
        let again = State::default().free_name(&name);
        assert_eq!(again, name, "another name the next time");
        state.users.push(User { name, chat });
    }
}

/// `config.ini`, a NUL, and `.env`; without a NUL the same for both.
fn settings(content: &[u8]) {
    let text = String::from_utf8_lossy(content);
    if text.contains("SSL_CERT_FILE") {
        return; // it names a file that is read
    }
    let mut files = content.splitn(2, |byte| *byte == 0);
    let config_ini = files.next().unwrap_or_default();
    let dot_env = files.next().unwrap_or(content);
    let result = config_of(config_ini, dot_env);
    let fault = result.as_ref().err();
    for secret in [TOKEN, PASSWORD] {
        let mut lines = text.split(['\n', '\0']);
        let is_a_name = |line: &str| line.split('=').next().unwrap().contains(secret);
        if !lines.any(is_a_name) {
            let is_said = fault.is_some_and(|fault| fault.contains(secret));
            assert!(!is_said && !is_logged(secret), "a secret is told");
        }
    }
    match result {
        Ok(config) => check_config(&config, &String::from_utf8_lossy(dot_env)),
        Err(fault) => {
            let (file, rest) = fault.split_once(':').expect(&fault);
            let content = if file == ".env" { dot_env } else { config_ini };
            let line: usize = rest.split(':').next().unwrap().parse().expect(&fault);
            let lines = content.split(|byte| *byte == b'\n').count();
            assert!((1..=lines).contains(&line), "{fault}");
        }
    }
}

fn check_config(config: &Config, dot_env: &str) {
    let is_word = |secret: &Secret| !secret.0.is_empty() && !secret.0.contains(' ');
    assert!(config.token.as_ref().is_none_or(Secret::is_bot_token));
    assert!(config.mote_token.as_ref().is_none_or(is_word));
    assert!(config.mote_token.is_none() || config.token.is_some());
    assert!(config.password.as_ref().is_none_or(is_word));
    assert!(config.password.is_some() || !config.registration_by_password);
    assert!(is_https_url(&config.url));
    let ip = config.listen.ip();
    assert!(!ip.is_unspecified() && !ip.is_multicast());
    if let Some(proxy) = &config.proxy {
        assert_eq!(proxy.protocol(), ureq::ProxyProtocol::Http);
        let host = proxy.host().to_lowercase();
        assert!(!host.is_empty() && dot_env.to_lowercase().contains(&host));
        assert!(dot_env.contains(&proxy.port().to_string()));
    }
    assert!(config.proxy.is_some() || !dot_env.starts_with("HTTPS_PROXY=h"));
}
