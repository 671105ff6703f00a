//! CoAP to Telegram gateway for RIOT-OS motes, which cannot speak TLS.
//!
//! ```text
//! mote ──CoAP/UDP──▶ this program ──HTTPS──▶ Telegram Bot API ──▶ people
//! ```
//!
//! * `POST /message`, payload `url=…&token=…&chat_ids=1,2&text=…`: one `sendMessage` for each chat.
//! * `POST /update`, payload `url=…&token=…`: `getUpdates`, answered with all that the mote should
//!   know, as `r123;i5;f1;Ada:456` (a removed user, interval, LED feedback, a user), unless the mote
//!   has acknowledged just that.
//! * `GET /.well-known/core`: RFC 6690.
//!
//! One thread owns everything ([`Gateway`]) and does one thing at a time: it receives a datagram,
//! sends the empty ACK, calls Telegram, sends the separate response, and only then writes to people.
//! What comes meanwhile waits in the socket. Between the datagrams it retransmits, and fetches on its
//! own. Three kinds of threads help: the heartbeat logs a line now and then; a text to several chats
//! has a thread for each but the first; a look-up of Telegram's address has one.
//!
//! The way of a datagram: `run` → `receive` → `take_datagram` → `Exchanges::receive`, which knows
//! duplicates and ACKs → `handle` → `judge`, which either refuses it (the answer goes inside the
//! ACK) or says what is to be done → `deliver` or `update` → the separate response → `settle`.
//!
//! The way of a text that somebody writes to the bot: `fetch` → `People::take` → `State` → `save`
//! → `State::summary`, which a mote gets with its next `/update`; and an answer by `answer_people`.
//!
//! Where the promises are kept: nothing is sent twice ([`coap::Exchanges`] knows duplicates,
//! [`Telegram::attempt`] repeats only what surely had no effect); no change is lost ([`Motes`] counts
//! only what was acknowledged, `fetch_pages` saves before it confirms); nobody waits long
//! ([`Polling`] says how long a call may take); nothing that comes by network ends it
//! ([`Gateway::run`] never returns).

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, IsTerminal as _, Read as _, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::os::unix::net::{SocketAddr as UnixAddress, UnixDatagram};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use std::{env, fmt, mem, thread};

use coap::{Event, Exchanges, Request, Response};
use coap_lite::{CoapOption, MessageClass, MessageType, Packet, RequestType, ResponseType};
use log::{Level, LevelFilter, error, info, warn};
use rustls::RootCertStore;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use simple_logger::SimpleLogger;
use ureq::config::IpFamily;
use ureq::http::Uri;
use ureq::tls::{PemItem, RootCerts, TlsConfig};
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{DefaultConnector, NextTimeout};

// ---------- What the program promises ----------
//
// Every other limit stands at the head of the section that keeps it. A limit without a reason only
// bounds memory or time, far above what a Pi with a handful of motes meets.

/// How long Telegram may take for one request. RIOT's nanocoap_sock waits 10 s after the empty ACK;
/// we promise 9 s and keep half a second for ourselves.
const REQUEST_TIME: Duration = Duration::from_millis(8500);
/// How many people can be registered: the firmware keeps 10, and names no more chats in a request.
const USERS_MAX: usize = 10;
/// The longest text in characters. Bot API, sendMessage.
const TEXT_MAX: usize = 4096;
/// The shortest and the longest interval that people can set, in minutes.
const INTERVAL_MIN: i64 = 1;
const INTERVAL_MAX: i64 = 120;
/// How long a mote is told nothing after it has acknowledged everything. Then it is told all of it
/// again, for it may have restarted unnoticed.
const ACKNOWLEDGED_HOLDS: Duration = Duration::from_secs(3600);
/// Wrong passwords in a row after which a chat's commands with a password are ignored, and how long.
const WRONG_PASSWORDS_MAX: u32 = 5;
const LOCKED_OUT: Duration = Duration::from_secs(3600);

// ---------- The command line ----------

const USAGE: &str = "\
usage: coap_websocket                    serve
       coap_websocket check              test the configuration and the way to Telegram
       coap_websocket check --settings   test the configuration alone
       coap_websocket send -i <chat-id> -m <message> [-u coap://[address]:port]
                                         send one message through a running gateway
       coap_websocket --help | --version";

const VERSION: &str = concat!("coap_websocket ", env!("CARGO_PKG_VERSION"));

fn main() -> ExitCode {
    let words = env::args_os().map(|word| word.to_string_lossy().into_owned());
    let words: Vec<String> = words.skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let outcome = match words[..] {
        [] => serve(),
        ["check"] => check(),
        ["check", "--settings"] => check_settings(),
        ["send", ref options @ ..] => {
            let mut options: Vec<&[&str]> = options.chunks(2).collect();
            options.sort(); // so that they may come in any order
            match options[..] {
                [["-i", id], ["-m", text]] => send(id, text, None),
                [["-i", id], ["-m", text], ["-u", uri]] if uri.starts_with("coap://") => {
                    send(id, text, Some(uri))
                }
                _ => return refuse_arguments(),
            }
        }
        ["--help" | "-h"] => print(USAGE),
        ["--version" | "-V"] => print(VERSION),
        _ => return refuse_arguments(),
    };
    if let Err(reason) = outcome {
        let priority = journal_priority(Level::Error);
        let _ = writeln!(io::stderr(), "{priority}coap_websocket: {reason}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// Says how the program is called. A shell, too, gives 2 for wrong usage.
fn refuse_arguments() -> ExitCode {
    let _ = writeln!(io::stderr(), "{USAGE}");
    ExitCode::from(2)
}

/// Prints a line. `println!` would take a closed pipe for a reason to panic.
fn print(line: &str) -> Result<(), String> {
    writeln!(io::stdout(), "{line}").map_err(|error| format!("cannot write: {error}"))
}

// ---------- The loop ----------
//
// One thread receives, answers, and does what is due between the requests. It owns the socket, the
// state and everything else that changes.

/// The time between two signs of life for systemd's watchdog (up to 14 s while a fetch and a request
/// last), between two attempts to get the address, and the longest wait for a datagram.
const TICK: Duration = Duration::from_secs(1);
/// How long what is due may be put off while datagrams wait without a pause.
const OVERDUE_MAX: Duration = Duration::from_secs(1);
/// How often it is checked that this host still has the address.
const ADDRESS_CHECK: Duration = Duration::from_secs(60);
/// How long a datagram may wait to be sent. The kernel holds what goes to a neighbour that it still looks
/// for (3 s), and once 277 such datagrams fill the socket's buffer, every other one waits behind them.
const SEND_TIME: Duration = Duration::from_millis(1);

/// Everything that the program knows.
struct Gateway {
    config: Config,
    /// Responses leave from it, too: gcoap looks at the server's address and port.
    socket: UdpSocket,
    exchanges: Exchanges,
    motes: Motes,
    telegram: Telegram,
    polling: Polling,
    people: People,
    state: State,
    /// What `state.json` holds, once this run has written it.
    saved: Option<State>,
    address_is_gone: bool,
    /// When a request, or what was due, was last done with: since then only ACKs and the like came.
    reads_since: Instant,
}

/// Serves for ever. A fault of the start ends it; nothing that comes by network does.
fn serve() -> Result<(), String> {
    let folders = Folders::find();
    if folders.belong_to_another {
        return Err(format!(
            "{INSTALLED_SETTINGS} belongs to the service, and two gateways would take each other's \
            messages; run: sudo systemctl start coap_websocket"
        ));
    }
    start_log(LevelFilter::Info, Some(folders.log.join("coap_server.log")))?;
    let config = Config::load(&folders, environment()?)?;
    let state = State::open(&config)?;
    notify("READY=1"); // before there is an address: a unit that waits would hold up the boot
    let socket = bind(config.listen)?;
    thread::spawn(heartbeat);
    Gateway::new(config, state, socket).run()
}

/// Waits for the address as long as this host cannot use it.
fn bind(listen: SocketAddr) -> Result<UdpSocket, String> {
    let mut is_told = false;
    loop {
        match UdpSocket::bind(listen) {
            Err(error) if error.kind() == ErrorKind::AddrNotAvailable => {}
            result => return result.map_err(|error| format!("cannot bind {listen}: {error}")),
        }
        if !is_told {
            let cause = "it is not there, or another host has it too";
            warn!("waits for address {listen}: {cause}; trying every second");
            notify(&format!("STATUS=Waits for address {listen}: {cause}"));
            is_told = true;
        }
        notify("WATCHDOG=1");
        thread::sleep(TICK);
    }
}

impl Gateway {
    fn new(config: Config, state: State, socket: UdpSocket) -> Gateway {
        Gateway {
            socket,
            exchanges: Exchanges::new(),
            motes: Motes::default(),
            telegram: Telegram::new(&config),
            polling: Polling::new(config.token.clone(), Instant::now()),
            people: People::default(),
            state,
            saved: None,
            address_is_gone: false,
            reads_since: Instant::now(),
            config,
        }
    }

    fn run(&mut self) -> ! {
        let listen = self.config.listen;
        info!("{VERSION} serves CoAP on {listen}");
        self.tell_status();
        self.settle(Instant::now()); // without time for Telegram: tells of a disk that cannot be written
        let _ = self.socket.set_write_timeout(Some(SEND_TIME));
        let mut buffer = vec![0; coap::DATAGRAM_MAX];
        let mut next_tick = Instant::now();
        let mut next_address_check = Instant::now() + ADDRESS_CHECK;
        loop {
            let is_idle = self.receive(&mut buffer);
            let now = Instant::now();
            // What is due waits until the socket is empty, as an ACK in it may make a retransmission
            // needless, but no longer than OVERDUE_MAX.
            if is_idle || now >= self.reads_since + OVERDUE_MAX {
                self.do_what_is_due(now);
                self.reads_since = Instant::now();
            }
            if now >= next_tick {
                notify("WATCHDOG=1");
                next_tick = now + TICK;
            }
            if now >= next_address_check {
                self.check_address();
                next_address_check = now + ADDRESS_CHECK;
            }
        }
    }

    /// Receives one datagram and handles it, or waits until something is due. Returns whether
    /// nothing waits in the socket.
    fn receive(&mut self, buffer: &mut [u8]) -> bool {
        let due_in = self.next_due().saturating_duration_since(Instant::now());
        let patience = due_in.max(Duration::from_millis(1)); // std refuses zero
        let _ = self.socket.set_read_timeout(Some(patience));
        match self.socket.recv_from(buffer) {
            Ok((length, peer)) => self.take_datagram(peer, &buffer[..length]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => {
                warn!("cannot receive: {error}");
                thread::sleep(TICK);
            }
        }
        false
    }

    /// When the next retransmission or fetch is due; within the next tick if nothing else is.
    fn next_due(&self) -> Instant {
        let tick = Instant::now() + TICK;
        let retransmission = self.exchanges.next_due().unwrap_or(tick);
        let fetch = self.polling.next_due().unwrap_or(tick);
        tick.min(retransmission).min(fetch)
    }

    /// Retransmits and fetches, if that is due. Answers and deletions for which there was no time behind
    /// the gateway's last fetch come first, in a round of their own.
    fn do_what_is_due(&mut self, now: Instant) {
        for (peer, bytes) in self.exchanges.retransmissions(now) {
            self.transmit(peer, &bytes);
        }
        let Some(token) = self.polling.token_if_due(now) else {
            return;
        };
        let deadline = now + FETCH_TIME; // a due fetch is *the try* of a hang, so not shortened: see Polling
        if mem::take(&mut self.people.have_next_turn) {
            return self.settle(deadline); // the fetch stays due: the next round makes it
        }
        let _ = self.fetch(&token, deadline); // it logs when failing begins and ends
        self.settle(deadline);
        self.people.have_next_turn = self.people.are_waiting();
    }

    fn take_datagram(&mut self, peer: SocketAddr, datagram: &[u8]) {
        let now = Instant::now();
        match self.exchanges.receive(now, peer, datagram) {
            Event::Send(bytes) => self.transmit(peer, &bytes),
            Event::Acknowledged(ticket) => self.motes.acknowledge(peer, ticket, now),
            Event::Request(request) => {
                // Requests without a pause keep `reads_since` young: `run` would find nothing overdue.
                if now >= self.next_due() + OVERDUE_MAX {
                    self.do_what_is_due(now);
                }
                self.handle(request);
                self.reads_since = Instant::now(); // ACKs that came meanwhile are read first
            }
        }
    }

    /// Answers a request: at once, or with an empty ACK, a call of Telegram, a separate response.
    fn handle(&mut self, mut request: Request) {
        let peer = request.peer;
        let verdict = self.judge(&mut request);
        let work = match verdict.unwrap_or_else(Verdict::Reply) {
            Verdict::Work(work) => work,
            Verdict::Reply(response) => {
                let reply = self.exchanges.respond_now(&request, &response);
                self.transmit(peer, &reply);
                return log_outcome(&request, &response);
            }
        };
        let acknowledgement = self.exchanges.promise(&request);
        self.transmit(peer, &acknowledgement);
        let id = request.packet.header.message_id;
        let began = Instant::now();
        self.motes.note_request(peer, id, began);
        let deadline = began + self.polling.request_time(began);
        let response = match work {
            Work::Message(text) => self.deliver(&text, deadline),
            Work::Update(token) => self.update(&token, peer, deadline),
        };
        let bytes = self.exchanges.respond(Instant::now(), &request, &response);
        self.transmit(peer, &bytes);
        log_outcome(&request, &response);
        self.settle(deadline);
    }

    /// Sends a datagram, if there is one. One that cannot be sent counts as lost: CoAP retransmits.
    fn transmit(&self, peer: SocketAddr, bytes: &[u8]) {
        if !bytes.is_empty() {
            let _ = self.socket.send_to(bytes, peer);
        }
    }

    /// Does what can wait until the mote has its response. It saves what the request itself has
    /// changed (what was fetched is saved already), then answers people, for nobody is told of a
    /// change that a power cut would undo.
    fn settle(&mut self, deadline: Instant) {
        USERS.store(self.state.users.len() as u64, Relaxed); // for the heartbeat
        if let Err(reason) = self.save() {
            return error!("{reason}");
        }
        if let Some(token) = self.polling.token.clone() {
            self.delete_passwords(&token, deadline);
            self.answer_people(&token, deadline);
        }
    }

    /// Writes `state.json` if it is not what it should be.
    fn save(&mut self) -> Result<(), String> {
        if self.saved.as_ref() == Some(&self.state) {
            return Ok(());
        }
        let path = &self.config.state_path;
        let result = self.state.write(path);
        result.map_err(|error| format!("cannot write {}: {error}", path.display()))?;
        self.saved = Some(self.state.clone());
        Ok(())
    }

    /// Tells when this host has lost the address, or has it back. The socket outlives both.
    fn check_address(&mut self) {
        let ip = self.config.listen.ip();
        let result = UdpSocket::bind((ip, 0));
        let is_gone = result.is_err_and(|error| error.kind() == ErrorKind::AddrNotAvailable);
        if is_gone == self.address_is_gone {
            return;
        }
        self.address_is_gone = is_gone;
        match is_gone {
            true => warn!("address {ip} has gone: its link is down, or another host has it too"),
            false => info!("address {ip} is back"),
        }
        self.tell_status();
    }

    /// Says in `systemctl status` what is served and what does not work.
    fn tell_status(&self) {
        let mut status = format!("STATUS=Serves CoAP on {}", self.config.listen);
        if self.address_is_gone {
            status += ", but this address has gone (link down, or another host has it)";
        }
        if self.polling.is_failing {
            status += ", but cannot fetch what people write";
        }
        notify(&status);
    }
}

fn log_outcome(request: &Request, response: &Response) {
    let failed = response.is(ResponseType::InternalServerError);
    let level = if failed { Level::Warn } else { Level::Info };
    let mut line = format!("{} {request} -> {}", request.peer, response.code());
    line += &format!(" in {} ms", request.received_at.elapsed().as_millis());
    if !response.detail.is_empty() {
        line += &format!(": {}", response.detail);
    }
    log::log!(level, "{line}");
}

// ---------- Judging a request ----------
//
// Everything that can be said about a request without Telegram is said here, in this order: options,
// path, method and formats, blocks, then the fields of the payload.

/// The keys of a payload's fields. A `&` is put in front of the first one.
const URL: &str = "&url=";
const TOKEN: &str = "&token=";
const CHAT_IDS: &str = "&chat_ids=";
const TEXT: &str = "&text=";
const KEYS: [&str; 4] = [URL, TOKEN, CHAT_IDS, TEXT];

const LINKS: &str = r#"</message>;rt="telegram.message";ct=0,</update>;rt="telegram.update";ct=0"#;
const MISSING_FIELDS: &str = "Missing required fields";
const NO_CHAT_IDS: &str = "No chat ids: nobody is registered yet";

/// What becomes of a request.
enum Verdict {
    /// It is answered at once, inside the ACK.
    Reply(Response),
    /// It is promised a separate response.
    Work(Work),
}

/// What an acceptable request asks for.
enum Work {
    Message(Text),
    /// Holds the bot's token.
    Update(Secret),
}

/// What a mote wants to have sent.
struct Text {
    token: Secret,
    chats: Vec<ChatId>,
    text: String,
}

/// Bot API, `chat_id`.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
enum ChatId {
    Number(i64),
    /// `@` and the username of a channel.
    Channel(String),
}

impl ChatId {
    /// Reads an integer or `@channelname`; none for anything else.
    fn parse(text: &str) -> Option<ChatId> {
        if let Some(name) = text.strip_prefix('@') {
            let fits = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
            let is_name = (1..=32).contains(&name.len()) && name.bytes().all(fits);
            return is_name.then(|| ChatId::Channel(text.to_string()));
        }
        parse_number(text).map(ChatId::Number)
    }
}

impl fmt::Display for ChatId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ChatId::Number(id) => write!(f, "{id}"),
            ChatId::Channel(name) => write!(f, "{name}"),
        }
    }
}

impl Gateway {
    /// Decides what to do with a request, or how to answer it at once. `Err` refuses it.
    fn judge(&mut self, request: &mut Request) -> Result<Verdict, Response> {
        request.check_options()?;
        let path = request.path();
        match path.as_str() {
            "message" | "update" => check_formats(request, RequestType::Post, coap::TEXT_PLAIN)?,
            ".well-known/core" => {
                check_formats(request, RequestType::Get, coap::LINK_FORMAT)?;
                let code = ResponseType::Content;
                let links = Response::content(code, coap::LINK_FORMAT, LINKS);
                return Ok(Verdict::Reply(links));
            }
            _ => return Err(Response::error(ResponseType::NotFound, "No such resource")),
        }
        let is_whole = self.exchanges.assemble(request)?;
        if !is_whole {
            return Ok(Verdict::Reply(Response::new(ResponseType::Continue)));
        }
        let payload = String::from_utf8_lossy(&request.packet.payload);
        let payload = format!("&{}", trim(&payload)); // so that each key has its `&`
        let work = match path.as_str() {
            "message" => Work::Message(self.accept_message(&payload)?),
            _ => Work::Update(self.accept_update(&payload)?),
        };
        Ok(Verdict::Work(work))
    }

    /// Reads the payload of `POST /message`.
    fn accept_message(&self, payload: &str) -> Result<Text, Response> {
        let text = field(payload, TEXT).to_string();
        if field(payload, URL).is_empty() || field(payload, TOKEN).is_empty() || text.is_empty() {
            return Err(Response::bad_request(MISSING_FIELDS));
        }
        if text.chars().count() > TEXT_MAX {
            let reason = format!("Text too long, at most {TEXT_MAX} characters");
            return Err(Response::bad_request(&reason));
        }
        let chats = read_chats(field(payload, CHAT_IDS))?;
        let token = self.accept_token(payload)?;
        Ok(Text { token, chats, text })
    }

    /// Reads the payload of `POST /update`. Without a configured token, the first bot that Telegram
    /// has accepted is the only one: its offset and its people are in the state.
    fn accept_update(&self, payload: &str) -> Result<Secret, Response> {
        if field(payload, URL).is_empty() || field(payload, TOKEN).is_empty() {
            return Err(Response::bad_request(MISSING_FIELDS));
        }
        let token = self.accept_token(payload)?;
        let first = self.state.bot.as_deref();
        if self.config.token.is_none() && first.is_some_and(|first| first != token.bot_id()) {
            return Err(forbidden("token"));
        }
        Ok(token)
    }

    /// Returns the configured token if the mote presents that or `mote_token`; without a configured one,
    /// the mote's. No mote chooses the url that the gateway connects to.
    fn accept_token(&self, payload: &str) -> Result<Secret, Response> {
        if field(payload, URL) != self.config.url {
            return Err(forbidden("url"));
        }
        let presented = field(payload, TOKEN);
        let token = Secret(presented.to_string());
        let mote_token = self.config.mote_token.as_ref();
        let is_word = mote_token.is_some_and(|word| word.matches(presented));
        match &self.config.token {
            Some(own) if is_word || own.matches(presented) => Ok(own.clone()),
            Some(_) => Err(forbidden("token")),
            None if token.is_bot_token() => Ok(token),
            None => Err(Response::bad_request("Malformed token")),
        }
    }
}

fn forbidden(what: &str) -> Response {
    let reason = format!("This gateway does not serve that {what}");
    Response::error(ResponseType::Forbidden, &reason)
}

/// Checks method, Content-Format, Accept (`format` is the answer's) and Block2. RFC 7252 §5.8,
/// §5.10.3 and §5.10.4.
fn check_formats(request: &Request, method: RequestType, format: u16) -> Result<(), Response> {
    let error = |code, reason| Err(Response::error(code, reason));
    if request.packet.header.code != MessageClass::Request(method) {
        return error(ResponseType::MethodNotAllowed, "Method not allowed");
    }
    let given = request.uint(CoapOption::ContentFormat);
    if method == RequestType::Post && given.is_some_and(|given| given != coap::TEXT_PLAIN) {
        return error(ResponseType::UnsupportedContentFormat, "Only text/plain");
    }
    let wanted = request.uint(CoapOption::Accept);
    if wanted.is_some_and(|wanted| wanted != format) {
        return error(ResponseType::NotAcceptable, "Not available in this format");
    }
    request.block(CoapOption::Block1)?; // `assemble` reads it, but a GET has nothing to assemble
    // Replies are short and go whole, whatever size of block is asked for.
    let block = request.block(CoapOption::Block2)?;
    if block.is_some_and(|block| block.number > 0) {
        return error(ResponseType::BadRequest, "No such block");
    }
    Ok(())
}

/// Returns the value of a field, empty if it is missing. It ends at the first occurrence of another key,
/// if that is behind it: a text that comes last may hold all keys. Values are not percent-encoded.
fn field<'a>(payload: &'a str, key: &str) -> &'a str {
    let Some(start) = payload.find(key) else {
        return "";
    };
    let starts = KEYS.iter().filter_map(|other| payload.find(other));
    let end = starts.filter(|at| *at > start).min();
    trim(&payload[start + key.len()..end.unwrap_or(payload.len())])
}

/// Strips what the firmware puts around its fields: NUL up to a fixed length, and line feeds.
fn trim(text: &str) -> &str {
    text.trim_matches(|c: char| c == '\0' || c.is_whitespace())
}

/// Reads a list of chat ids, each of them once. Blanks and empty entries mean nothing.
fn read_chats(list: &str) -> Result<Vec<ChatId>, Response> {
    let mut chats = Vec::new();
    for entry in list.split(',') {
        let entry = trim(entry);
        if entry.is_empty() {
            continue;
        }
        let Some(chat) = ChatId::parse(entry) else {
            return Err(Response::bad_request("Malformed chat id"));
        };
        // Telegram reads the name of a channel without regard to case.
        let shown = chat.to_string();
        let is_same = |other: &ChatId| other.to_string().eq_ignore_ascii_case(&shown);
        if chats.iter().any(is_same) {
            continue;
        }
        if chats.len() >= USERS_MAX {
            let reason = format!("Too many chat ids, at most {USERS_MAX}");
            return Err(Response::bad_request(&reason));
        }
        chats.push(chat);
    }
    if chats.is_empty() {
        return Err(Response::bad_request(NO_CHAT_IDS)); // the firmware's first boot
    }
    Ok(chats)
}

// ---------- Message and update ----------
//
// What is done for an accepted request: texts go to Telegram, and what people wrote comes from it.

const MESSAGES_SENT: &str = "Messages sent successfully";
const NO_UPDATES: &str = "No Updates";

impl Gateway {
    /// Sends a text to every chat but the removed ones. The request has succeeded if one of them
    /// got it, or if all had been removed before.
    fn deliver(&mut self, text: &Text, deadline: Instant) -> Response {
        let began = Instant::now();
        let mut chats = text.chats.clone();
        chats.retain(|chat| !self.state.is_removed(chat));
        let results = self.telegram.send_to_all(text, &chats, deadline);
        self.polling.note_texts(&results, began, Instant::now());
        let sent = results.iter().filter(|result| result.is_ok()).count();
        for (chat, result) in chats.iter().zip(results) {
            if let Err(failure) = result {
                self.note_failed_text(chat, &failure, &text.token);
            }
        }
        FORWARDED.fetch_add(sent as u64, Relaxed);
        FAILURES.fetch_add((chats.len() - sent) as u64, Relaxed);
        let mut response = Response::new(ResponseType::InternalServerError);
        if sent > 0 || chats.is_empty() {
            response = Response::text(ResponseType::Content, MESSAGES_SENT);
        }
        response.detail = format!("{sent} of {} chats", text.chats.len());
        response
    }

    /// Removes a person who has blocked the bot, as if they had asked, and logs why a chat did not get
    /// a text. A group that refuses may have the bot back tomorrow.
    fn note_failed_text(&mut self, chat: &ChatId, failure: &Failure, token: &Secret) {
        warn!("sendMessage to {chat} failed: {}", failure.reason);
        let ChatId::Number(id) = *chat else { return };
        // Another bot's 403 says nothing of our people; a mote may use one if no token is configured.
        let own = self.state.bot.as_deref().unwrap_or(token.bot_id());
        // The ids of groups are negative, and do not fit.
        if failure.error_code == Some(403) && own == token.bot_id() && fits_firmware(id) {
            let who = self.state.remove(id);
            info!("{who} is removed: Telegram refuses messages to it");
        }
    }

    /// Fetches what people wrote, and tells the mote everything unless it knows that.
    fn update(&mut self, token: &Secret, peer: SocketAddr, deadline: Instant) -> Response {
        let result = match self.polling.empty_page_holds(token, Instant::now()) {
            true => self.save().map_err(Failure::new), // nobody is told what is not saved
            false => self.fetch(token, deadline),
        };
        if let Err(failure) = result {
            FAILURES.fetch_add(1, Relaxed);
            return Response::error(ResponseType::InternalServerError, &failure.reason);
        }
        let summary = self.state.summary();
        let version = self.motes.version_of(&summary);
        let knows = self.motes.has_acknowledged(peer, version, Instant::now());
        if summary.is_empty() || knows {
            return Response::text(ResponseType::Valid, NO_UPDATES);
        }
        let mut response = Response::text(ResponseType::Content, &summary);
        response.ticket = Some(version);
        response.detail = summary;
        response
    }

    /// Takes in what people wrote. The log tells once when trouble starts, and once when it ends.
    fn fetch(&mut self, token: &Secret, deadline: Instant) -> Result<(), Failure> {
        let began = Instant::now();
        if let Some(left) = self.polling.refused_for(began) {
            let seconds = left.as_secs_f64().ceil();
            let reason = format!("Telegram wants no getUpdates for another {seconds} s");
            return Err(Failure::new(reason));
        }
        let was_failing = self.polling.is_failing;
        let result = self.fetch_pages(token, deadline);
        let now = Instant::now();
        if let Err(failure) = &result {
            // A mote's token may be wrong if none is configured, which says nothing of the one that works.
            let is_wrong_token = matches!(failure.error_code, Some(401 | 404));
            let own = self.polling.token.as_ref().unwrap_or(token);
            if is_wrong_token && !own.matches(&token.0) {
                return result;
            }
            self.polling.note_failed_fetch(failure, began, now);
        }
        if self.polling.is_failing != was_failing {
            match &result {
                Ok(()) => info!("Telegram answers again"),
                Err(failure) => warn!("cannot fetch what people write: {}", failure.reason),
            }
            self.tell_status();
        }
        result
    }

    /// Takes pages until one is empty, which alone proves that there is no more, or half the time is
    /// used: the rest is for answers, and the next fetch goes on. Progress is saved before the next
    /// call confirms it and before anybody is answered.
    fn fetch_pages(&mut self, token: &Secret, deadline: Instant) -> Result<(), Failure> {
        let began = Instant::now();
        let half_time = began + deadline.saturating_duration_since(began) / 2;
        let mut has_news = false;
        self.save().map_err(Failure::new)?;
        loop {
            let offset = self.state.offset;
            let limit = self.polling.page_limit;
            let page = self.telegram.get_updates(token, offset, limit, deadline)?;
            self.polling.note_page(page.len(), Instant::now());
            self.state.bot = Some(token.bot_id().to_string());
            for update in &page {
                self.people.take(update, &mut self.state, &self.config);
            }
            self.save().map_err(Failure::new)?;
            // Not `page.is_empty()`: updates without an id would come again and again. Not `>`: ids may
            // fall.
            let has_moved = self.state.offset != offset;
            has_news |= has_moved;
            if !has_moved || Instant::now() >= half_time {
                self.polling.note_fetch(token, has_news, Instant::now());
                return Ok(());
            }
        }
    }

    /// Deletes messages that hold a password. One about which Telegram has not decided is tried again the
    /// next time, behind the others.
    fn delete_passwords(&mut self, token: &Secret, deadline: Instant) {
        while Instant::now() + CALL_TIME_MIN < deadline
            && let Some(deletion) = self.people.deletions.pop_front()
        {
            let Deletion { chat, message_id } = deletion;
            let body = json!({"chat_id": chat, "message_id": message_id});
            if let Err(failure) = self.telegram.call(token, "deleteMessage", &body, deadline) {
                warn!("deleteMessage in {chat} failed: {}", failure.reason);
                if !failure.is_final() {
                    return self.people.deletions.push_back(deletion);
                }
            }
        }
    }

    /// Tells people what became of their messages. An answer is sent once, when there is time.
    fn answer_people(&mut self, token: &Secret, deadline: Instant) {
        while Instant::now() + CALL_TIME_MIN < deadline
            && let Some(Answer { chat, texts }) = self.people.answers.pop_front()
        {
            let text = format!("{:.TEXT_MAX$}", texts.join("\n\n")); // cut to what Telegram takes
            let body = json!({"chat_id": chat, "text": text});
            if let Err(failure) = self.telegram.call(token, "sendMessage", &body, deadline) {
                warn!("sendMessage to {chat} failed: {}", failure.reason);
            }
        }
    }
}

// ---------- Polling ----------
//
// When to fetch, how much, and how long a call may take. It has no clock: the time is an argument.
//
// Telegram *hangs* once a fetch, or a text to all of its chats, got no answer in time. Requests then
// have TIME_IN_A_HANG only, but for one *try* a minute: the first fetch or text, the gateway's own or
// a request's, at `next_fetch` or later. If it times out as well, the next is due a minute after it
// began. Any answer to a fetch, or the Bot API's to a text, ends the hang.

/// How long the gateway's own fetch may take, during which requests wait.
const FETCH_TIME: Duration = Duration::from_secs(5);
/// The pause between two fetches while nobody writes. It also keeps up to three connections open for the
/// next text: ureq uses the idle ones in turn, and 3 * 15 s are less than `IDLE_CONNECTION`.
const FETCH_EVERY: Duration = Duration::from_secs(15);
/// The pause after a fetch with news, for whoever wrote may be about to write again; without news it
/// doubles. Also the pause after a page that was too much to be read.
const FETCH_SOON: Duration = Duration::from_secs(3);
/// The pause after a failed fetch. In a hang, one call in this time may take its usual time.
const FETCH_AFTER_FAILURE: Duration = Duration::from_secs(60);
/// How long after an empty page an `/update` makes do without a fetch: a `getUpdates` with the same
/// offset as the one before is delayed by up to 3 s, see tdlib/telegram-bot-api.
const EMPTY_PAGE_HOLDS: Duration = Duration::from_secs(3);
/// How long a request may take while Telegram does not answer, so that all who wait are soon told.
const TIME_IN_A_HANG: Duration = Duration::from_secs(2);
/// How many updates a page may hold. Ten of the longest are half a megabyte.
const PAGE_LIMIT: usize = 10;

/// Knows when to fetch next, how much to ask for, and how long calls may take.
struct Polling {
    /// The bot whose people are heard: the configured token, else the one that Telegram accepted last.
    /// That may be a new token, but of the first bot: `accept_update` refuses every other one.
    token: Option<Secret>,
    /// When the gateway fetches on its own; while Telegram hangs, when the next try is due.
    next_fetch: Instant,
    /// The pause before it while nothing fails.
    pause: Duration,
    /// How many updates to ask for: one after a time-out or a page that could not be read, until
    /// a page has come.
    page_limit: usize,
    /// When the last page came, if it was empty.
    empty_page_at: Option<Instant>,
    /// Before this, Telegram wants no `getUpdates`: the `retry_after` of a 429.
    refused_until: Option<Instant>,
    /// Whether the last fetch failed.
    is_failing: bool,
    /// Whether an answer to a text, be it a refusal, makes the gateway fetch at once: the last fetch
    /// failed, by a 5xx or without the Bot API. What it refused itself it would refuse again.
    fetches_after_text: bool,
    /// Whether Telegram hangs: the last fetch, or a text to all its chats, got no answer in time.
    hangs: bool,
}

impl Polling {
    fn new(token: Option<Secret>, now: Instant) -> Polling {
        Polling {
            token,
            next_fetch: now,
            pause: FETCH_EVERY,
            page_limit: PAGE_LIMIT,
            empty_page_at: None,
            refused_until: None,
            is_failing: false,
            fetches_after_text: false,
            hangs: false,
        }
    }

    /// When the gateway fetches on its own; never before it knows a bot.
    fn next_due(&self) -> Option<Instant> {
        self.token.as_ref()?;
        let refused_until = self.refused_until.unwrap_or(self.next_fetch);
        Some(refused_until.max(self.next_fetch))
    }

    fn token_if_due(&self, now: Instant) -> Option<Secret> {
        let is_due = now >= self.next_due()?;
        if is_due { self.token.clone() } else { None }
    }

    /// Whether this token's last page was empty, so lately that an `/update` needs no fetch.
    fn empty_page_holds(&self, token: &Secret, now: Instant) -> bool {
        let (Some(own), Some(at)) = (&self.token, self.empty_page_at) else {
            return false;
        };
        own.matches(&token.0) && now < at + EMPTY_PAGE_HOLDS
    }

    /// Returns how long Telegram still wants no `getUpdates`.
    fn refused_for(&self, now: Instant) -> Option<Duration> {
        let until = self.refused_until?;
        (now < until).then(|| until - now)
    }

    /// How long a request may take that begins now.
    fn request_time(&self, now: Instant) -> Duration {
        match self.hangs && now < self.next_fetch {
            true => TIME_IN_A_HANG,
            false => REQUEST_TIME,
        }
    }

    fn note_page(&mut self, updates: usize, now: Instant) {
        self.page_limit = PAGE_LIMIT;
        self.empty_page_at = (updates == 0).then_some(now);
    }

    /// A fetch has ended well. The pauses after news are 3, 6, 12, 15 s.
    fn note_fetch(&mut self, token: &Secret, has_news: bool, now: Instant) {
        self.token = Some(token.clone());
        self.is_failing = false;
        self.fetches_after_text = false;
        self.hangs = false;
        let longer = FETCH_EVERY.min(2 * self.pause);
        self.pause = if has_news { FETCH_SOON } else { longer };
        self.next_fetch = now + self.pause;
    }

    /// A fetch, begun at `began`, has failed.
    fn note_failed_fetch(&mut self, failure: &Failure, began: Instant, now: Instant) {
        self.is_failing = true;
        self.fetches_after_text = failure.error_code.is_none_or(|code| code >= 500);
        let was_unreadable = failure.http_began && failure.error_code.is_none();
        if failure.timed_out {
            self.note_time_out(began);
        } else {
            if failure.http_began {
                self.hangs = false;
            }
            self.next_fetch = now + FETCH_AFTER_FAILURE;
        }
        // Soon again, then with one update. If it was only one already, its size is not the reason.
        if was_unreadable && self.page_limit > 1 {
            self.next_fetch = now + FETCH_SOON;
        }
        if was_unreadable || failure.timed_out {
            self.page_limit = 1;
        }
        if let Some(retry_after) = failure.retry_after {
            self.refused_until = Some(now + retry_after);
        }
    }

    /// The calls for a text, begun at `began`, have ended. They may show that Telegram hangs, or that
    /// it answers again, be it with a refusal.
    fn note_texts(&mut self, results: &[ApiResult], began: Instant, now: Instant) {
        let has_answer = |result: &ApiResult| match result {
            Ok(_) => true,
            Err(failure) => failure.error_code.is_some(), // a portal's page is none
        };
        let timed_out = |result: &ApiResult| result.as_ref().is_err_and(|f| f.timed_out);
        if results.iter().any(has_answer) {
            if self.hangs || self.fetches_after_text {
                self.next_fetch = now;
            }
            self.hangs = false;
        } else if !results.is_empty() && results.iter().all(timed_out) {
            self.note_time_out(began);
        }
    }

    /// A call, begun at `began`, got no answer in time. The call that begins the hang, and each try (see
    /// `next_fetch`), put the next try off by a minute; the short calls between do not.
    fn note_time_out(&mut self, began: Instant) {
        let was_try = began >= self.next_fetch;
        if was_try || !self.hangs {
            self.next_fetch = began + FETCH_AFTER_FAILURE;
        }
        self.hangs = true;
    }
}

// ---------- Telegram ----------
//
// The Bot API over HTTPS. A call is repeated only if it surely had no effect, so that no text
// arrives twice.

/// How long a connection is kept that nobody uses. Telegram closes them after about a minute, and a
/// text that meets the closing is lost.
const IDLE_CONNECTION: Duration = Duration::from_secs(50);
/// What connecting may take over all addresses of the host, and what looking them up may take.
const CONNECT_TIME: Duration = Duration::from_secs(4);
/// How often a call is tried, and how long to wait between.
const ATTEMPTS: u32 = 3;
const ATTEMPT_PAUSE: Duration = Duration::from_millis(500);
/// How much time must be left to begin a call that need not be made at all.
const CALL_TIME_MIN: Duration = Duration::from_millis(500);
/// How many bytes a page of updates may have: ten of the longest take about half of that.
const PAGE_MAX: u64 = 1 << 20;
/// How many bytes of a single update are read at least before it is given up as too long for this
/// connection. What somebody wants of the bot is shorter.
const UPDATE_MAX: usize = 30 << 10;
/// How many bytes any other answer may have: a `Message` of 4,096 characters fits, all escaped, or with
/// a command in every third one.
const ANSWER_MAX: u64 = 256 << 10;
/// How much less than `FETCH_TIME` may be left for a call to do with the agent's time-out, see
/// `with_limits`.
const TIME_LEFT_SLACK: Duration = Duration::from_millis(100);
/// How many characters of the reason of a failed call are kept.
const REASON_MAX: usize = 300;
/// The longest `retry_after` in seconds that is believed: Telegram keeps updates for a day.
const RETRY_AFTER_MAX: f64 = 86_400.0;

struct Telegram {
    agent: ureq::Agent,
    url: String,
    /// Where a call goes, for a person: the url, and the proxy without name and password.
    place: String,
    /// When a call last ended without any HTTP answer. Connections that were idle then are not used
    /// any more: a router that has forgotten one has forgotten all.
    silent_at: Option<Instant>,
}

/// What a call returns: the Bot API's `result`.
type ApiResult = Result<Value, Failure>;

/// Why a call did not succeed.
///
/// | | `error_code` | `retry_after` | `was_unsent` | `timed_out` | `http_began` |
/// |---|---|---|---|---|---|
/// | nothing was sent but a head, at most | | | yes | maybe | |
/// | no answer came | | | | maybe | |
/// | it was never called (the disk, a thread, a 429 before) | | | | | |
/// | a page that is not the Bot API's, or is too slow | | | | | yes |
/// | the Bot API has refused it | yes | with 429 | | | yes |
#[derive(Default)]
struct Failure {
    /// Tells a person what failed and why. It never holds the token.
    reason: String,
    /// Both are the Bot API's.
    error_code: Option<u64>,
    retry_after: Option<Duration>,
    /// At most the head of the call was sent, so Telegram surely has not acted on it.
    was_unsent: bool,
    /// No answer began in time.
    timed_out: bool,
    /// An HTTP answer began, whoever sent it.
    http_began: bool,
    /// The first update's id, if a whole page is no JSON, or too long for the connection.
    update_id: Option<i64>,
}

impl Failure {
    /// A failure without a call.
    fn new(reason: String) -> Failure {
        Failure {
            reason,
            ..Failure::default()
        }
    }

    /// A failure with an HTTP answer.
    fn with_answer(reason: impl Into<String>) -> Failure {
        let mut failure = Failure::new(reason.into());
        failure.http_began = true;
        failure
    }

    /// The pause before another attempt, if that cannot do anything twice: after a call of which
    /// at most the head was sent, or a 429 that says when.
    fn retry_in(&self) -> Option<Duration> {
        match self.was_unsent {
            true => Some(ATTEMPT_PAUSE),
            false => self.retry_after,
        }
    }

    /// Whether the Bot API has decided, and has not only put it off (429) or failed itself (5xx).
    fn is_final(&self) -> bool {
        self.error_code
            .is_some_and(|code| code < 500 && code != 429)
    }
}

impl Telegram {
    fn new(config: &Config) -> Telegram {
        let tls = TlsConfig::builder().root_certs(config.roots.clone());
        let settings = ureq::Agent::config_builder()
            .http_status_as_error(false) // description and retry_after are in the body
            .max_redirects(0)
            // ureq is built without gzip: a delivered text whose answer is packed would count as failed.
            .accept_encoding("identity")
            .accept("") // without these two, which nobody reads, an idle hour is 9 kB cheaper
            .user_agent("")
            .ip_family(config.ip_family)
            .proxy(config.proxy.clone()) // `None` is the direct way, whatever the environment says
            .tls_config(tls.build())
            .timeout_global(Some(FETCH_TIME))
            .timeout_connect(Some(CONNECT_TIME))
            .timeout_resolve(Some(CONNECT_TIME))
            .input_buffer_size(8 << 10) // ureq's has 128 KiB, and a text to ten chats ten of them
            .output_buffer_size(8 << 10)
            .max_idle_connections(USERS_MAX)
            .max_idle_connections_per_host(USERS_MAX)
            .max_idle_age(IDLE_CONNECTION)
            .build();
        let connector = DefaultConnector::default();
        let mut place = config.url.clone();
        if let Some(proxy) = &config.proxy {
            place += &format!(" by HTTPS_PROXY {}:{}", proxy.host(), proxy.port());
        }
        Telegram {
            place,
            agent: ureq::Agent::with_parts(settings, connector, Addresses::default()),
            url: config.url.clone(),
            silent_at: None,
        }
    }

    /// Returns the updates from `offset` on, at most `limit`; those before are confirmed.
    fn get_updates(
        &mut self,
        token: &Secret,
        offset: i64,
        limit: usize,
        deadline: Instant,
    ) -> Result<Vec<Value>, Failure> {
        let body = json!({"offset": offset, "limit": limit, "allowed_updates": ["message"]});
        match self.call(token, "getUpdates", &body, deadline) {
            Ok(Value::Array(page)) => Ok(page),
            Ok(_) => Err(Failure::with_answer("getUpdates: the result is no list")),
            Err(failure) => match failure.update_id {
                // Nobody can read this update. It must not block those behind it.
                Some(id) if limit == 1 => Ok(vec![json!({"update_id": id})]),
                _ => Err(failure),
            },
        }
    }

    /// Sends a text to every chat at the same time, to the first without a thread. Results in order.
    fn send_to_all(&mut self, text: &Text, chats: &[ChatId], deadline: Instant) -> Vec<ApiResult> {
        let telegram: &Telegram = self;
        let send = |chat: &ChatId| {
            let body = json!({"chat_id": chat, "text": text.text});
            telegram.attempt(&text.token, "sendMessage", &body, deadline)
        };
        let results = thread::scope(|scope| {
            let mut threads = Vec::new();
            for chat in chats.iter().skip(1) {
                threads.push(thread::Builder::new().spawn_scoped(scope, move || send(chat)));
            }
            let mut results: Vec<ApiResult> = chats.iter().take(1).map(send).collect();
            for thread in threads {
                results.push(match thread {
                    Ok(thread) => thread.join().expect("a call does not panic"),
                    Err(error) => Err(Failure::new(format!("cannot start a thread: {error}"))),
                });
            }
            results
        });
        for result in &results {
            self.note_silence(result);
        }
        results
    }

    fn call(&mut self, token: &Secret, method: &str, body: &Value, deadline: Instant) -> ApiResult {
        let result = self.attempt(token, method, body, deadline);
        self.note_silence(&result);
        result
    }

    fn note_silence(&mut self, result: &ApiResult) {
        if result.as_ref().is_err_and(|failure| !failure.http_began) {
            self.silent_at = Some(Instant::now());
        }
    }

    /// Calls a method. It tries again (`ATTEMPTS`, the deadline) only if the call before surely had no
    /// effect.
    fn attempt(&self, token: &Secret, method: &str, body: &Value, deadline: Instant) -> ApiResult {
        let mut first_reason = None;
        let mut attempts_left = ATTEMPTS;
        loop {
            let failure = match self.post(token, method, body, deadline) {
                Ok(result) => return Ok(result),
                Err(failure) => failure,
            };
            attempts_left -= 1;
            let time_left = deadline.saturating_duration_since(Instant::now() + CALL_TIME_MIN);
            match failure.retry_in() {
                Some(pause) if attempts_left > 0 && pause < time_left => thread::sleep(pause),
                _ if failure.is_final() => return Err(failure),
                // The first of some attempts that came to nothing tells more than the last.
                _ => {
                    let reason = first_reason.unwrap_or(failure.reason);
                    return Err(Failure { reason, ..failure });
                }
            }
            first_reason.get_or_insert(failure.reason);
        }
    }

    fn post(&self, token: &Secret, method: &str, body: &Value, deadline: Instant) -> ApiResult {
        let body = body.to_string().into_bytes();
        // ureq moves this slice on as it takes the body. While it is whole, at most the head was sent,
        // and on that alone Telegram does not act.
        let mut unread = body.as_slice();
        let request = self.agent.post(format!("{}{}/{method}", self.url, token.0));
        let request = request
            .header("content-type", "application/json")
            .header("content-length", body.len());
        let request = self.with_limits(request, deadline);
        let result = match request.send(ureq::SendBody::from_reader(&mut unread)) {
            Ok(response) => read_response(response, method),
            Err(error) => Err(Failure {
                reason: describe(&error),
                was_unsent: unread.len() == body.len(),
                timed_out: matches!(error, ureq::Error::Timeout(_)),
                ..Failure::default()
            }),
        };
        result.map_err(|failure| {
            let reason = format!("{}: {}", self.place, failure.reason);
            let reason = reason.replace(&token.0, "<token>");
            let reason = format!("{reason:.REASON_MAX$}");
            Failure { reason, ..failure }
        })
    }

    /// Sets what differs from the agent's: the time, and for how long a connection may have been idle
    /// to be used. Once Telegram has been silent, that is the time since then: what was idle already
    /// at that moment is closed.
    fn with_limits(&self, request: PostRequest, deadline: Instant) -> PostRequest {
        let time_left = deadline.saturating_duration_since(Instant::now());
        let since_silence = self.silent_at.map_or(IDLE_CONNECTION, |at| at.elapsed());
        let idle_age = since_silence.min(IDLE_CONNECTION);
        // ureq caches the TLS settings (with the roots) only of a request without a config of its own;
        // until then each other request builds them anew. So the gateway's fetch, usually the first
        // call of all, gets no config.
        let has_agents_time = (FETCH_TIME - TIME_LEFT_SLACK..=FETCH_TIME).contains(&time_left);
        if has_agents_time && idle_age == IDLE_CONNECTION {
            return request;
        }
        let config = request.config().timeout_global(Some(time_left));
        config.max_idle_age(idle_age).build()
    }
}

type PostRequest = ureq::RequestBuilder<ureq::typestate::WithBody>;

fn describe(error: &ureq::Error) -> String {
    let tls = match error {
        ureq::Error::Timeout(stage) => return format!("no answer in time ({stage})"),
        ureq::Error::Rustls(error) => Some(error),
        ureq::Error::Io(error) => error.get_ref().and_then(|inner| inner.downcast_ref()),
        _ => None,
    };
    if let Some(rustls::Error::InvalidCertificate(reason)) = tls {
        let hint = "is the clock right? and SSL_CERT_FILE?";
        return format!("its certificate is not trusted: {reason} ({hint})");
    }
    error.to_string()
}

fn read_response(mut response: ureq::http::Response<ureq::Body>, method: &str) -> ApiResult {
    let status = response.status().as_u16();
    let is_page = method == "getUpdates";
    let limit = if is_page { PAGE_MAX } else { ANSWER_MAX };
    let mut body = Vec::new();
    let mut reader = response.body_mut().with_config().limit(limit).reader();
    if let Err(error) = reader.read_to_end(&mut body) {
        let reason = format!("HTTP {status}, then {}", describe(&error.into()));
        let mut failure = Failure::with_answer(reason);
        if status == 200 && body.len() > UPDATE_MAX {
            failure.update_id = first_update_id(&body);
        }
        return Err(failure);
    }
    read_answer(status, &body)
}

/// Reads the body of an answer. Success is `200` and `"ok": true`, nothing else.
fn read_answer(status: u16, body: &[u8]) -> ApiResult {
    let mut update_id = None;
    let cause = match serde_json::from_slice::<Value>(body) {
        Ok(mut answer) if status == 200 && answer["ok"] == true => {
            return Ok(answer["result"].take());
        }
        Ok(answer) => match read_refusal(&answer) {
            Some(failure) => return Err(failure),
            None => "JSON, but not the Bot API's".to_string(),
        },
        Err(error) => {
            // What was cut off may be whole the next time.
            if status == 200 && !error.is_eof() {
                update_id = first_update_id(body);
            }
            format!("no JSON: {error}")
        }
    };
    let reason = format!("HTTP {status} with {} bytes, {cause}", body.len());
    let mut failure = Failure::with_answer(reason);
    failure.update_id = update_id;
    Err(failure)
}

/// Finds the first `"update_id":`. In a text the second quotation mark would have a backslash.
fn first_update_id(body: &[u8]) -> Option<i64> {
    let body = String::from_utf8_lossy(body);
    let (_, behind) = body.split_once(r#""update_id":"#)?;
    let is_end = |c: char| !c.is_ascii_digit();
    behind.trim_start().split(is_end).next()?.parse().ok()
}

/// Reads what the Bot API says when it refuses a call, and adds what to do about it.
fn read_refusal(answer: &Value) -> Option<Failure> {
    let code = answer["error_code"].as_u64()?;
    if answer["ok"] != false {
        return None;
    }
    let description = answer["description"].as_str().unwrap_or("no description");
    let has_webhook = description.to_lowercase().contains("webhook");
    let parameters = &answer["parameters"];
    let hint = match code {
        401 | 404 => " (are the bot's token and the url right?)",
        409 if has_webhook => " (open <url><token>/deleteWebhook once)",
        409 => " (stop the other program that uses this bot)",
        _ => "",
    };
    let mut reason = format!("{code} {description}{hint}");
    if let Some(id) = parameters["migrate_to_chat_id"].as_i64() {
        reason += &format!(" (its id is now {id}: tell the mote)");
    }
    let mut failure = Failure::with_answer(reason);
    failure.error_code = Some(code);
    if code == 429 {
        failure.retry_after = seconds(&parameters["retry_after"]);
    }
    Some(failure)
}

/// Reads a number of seconds: Telegram's integer, or what other servers make of it, a fraction or a string.
fn seconds(value: &Value) -> Option<Duration> {
    let seconds = match value {
        Value::String(text) => text.trim().parse().ok()?,
        value => value.as_f64()?,
    };
    let is_sensible = seconds >= 0.0;
    is_sensible.then(|| Duration::from_secs_f64(RETRY_AFTER_MAX.min(seconds)))
}

/// How long after the end of a look-up, failed or not, the known addresses serve without another one.
const ADDRESSES_HOLD: Duration = Duration::from_secs(60);
/// How long that other one is waited for before the known addresses serve after all.
const NEW_ADDRESSES_TIME: Duration = Duration::from_secs(1);

/// Keeps the addresses of the Bot API or the proxy, for ureq asks for them on each call. There is
/// one look-up at a time, in a thread of its own, and its answer counts whenever it comes.
#[derive(Debug, Default)]
struct Addresses {
    look_up: Arc<Mutex<LookUp>>,
    changed: Arc<Condvar>,
}

#[derive(Debug, Default)]
struct LookUp {
    /// When the one that runs began; none if none runs.
    running_since: Option<Instant>,
    /// When the last one ended, well or not.
    ended_at: Option<Instant>,
    /// What the last successful one found. It serves while the name server fails.
    found: Option<ResolvedSocketAddrs>,
}

impl Resolver for Addresses {
    fn resolve(
        &self,
        uri: &Uri,
        config: &ureq::config::Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let mut look_up = self.look_up.lock().expect("no thread panics");
        let elapsed = |at: Option<Instant>| at.map_or(Duration::ZERO, |at| at.elapsed());
        let mut patience = *timeout.after; // as a Duration of std
        if let Some(found) = &look_up.found {
            if elapsed(look_up.ended_at) < ADDRESSES_HOLD {
                return Ok(found.clone());
            }
            // Zero if none runs: the one that is started below gets the whole NEW_ADDRESSES_TIME.
            let runs_for = elapsed(look_up.running_since);
            patience = patience.min(NEW_ADDRESSES_TIME.saturating_sub(runs_for));
        }
        if look_up.running_since.is_none() {
            self.start(uri.clone(), config.clone())?;
            look_up.running_since = Some(Instant::now());
        }
        let runs = |look_up: &mut LookUp| look_up.running_since.is_some();
        let outcome = self.changed.wait_timeout_while(look_up, patience, runs);
        let (look_up, _) = outcome.expect("no thread panics");
        match &look_up.found {
            Some(found) => Ok(found.clone()),
            None if look_up.running_since.is_some() => Err(ureq::Error::Timeout(timeout.reason)),
            None => Err(ureq::Error::HostNotFound),
        }
    }
}

impl Addresses {
    /// Starts a look-up. Without a time-out, ureq's resolver starts no thread of its own.
    fn start(&self, uri: Uri, config: ureq::config::Config) -> io::Result<()> {
        let shared = Arc::clone(&self.look_up);
        let changed = Arc::clone(&self.changed);
        let run = move || {
            let resolver = DefaultResolver::default();
            let result = resolver.resolve(&uri, &config, NextTimeout::default());
            let mut look_up = shared.lock().expect("no thread panics");
            look_up.running_since = None;
            look_up.ended_at = Some(Instant::now());
            if let Ok(found) = result {
                look_up.found = Some(found);
            }
            changed.notify_all();
        };
        thread::Builder::new().spawn(run)?;
        Ok(())
    }
}

// ---------- State ----------
//
// What outlives the process: who is registered, who has left, what is set, and how far Telegram's
// updates have been read.

/// How many removed chats are remembered.
const REMOVED_MAX: usize = 100;
/// How many bytes of a user's name the firmware keeps.
const NAME_MAX: usize = 14;
/// The largest chat id that the firmware keeps whole. A longer one it cuts: that is another chat.
const CHAT_ID_MAX: i64 = 99_999_999_999;
/// The longest reply in bytes that the firmware takes. A longer one is thrown away whole.
const REPLY_MAX: usize = 302;

/// The content of `state.json`, in words that an operator can read. Unknown keys are ignored and
/// missing ones have defaults, so that neither an update nor a way back loses anybody.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct State {
    /// Minutes between two reports; none until somebody sets it.
    interval: Option<i64>,
    /// LED feedback, 0 or 1; none until somebody sets it.
    feedback: Option<i64>,
    users: Vec<User>,
    /// Chats to which no texts of motes are sent until they are registered again, the latest last. In
    /// memory only those that were registered, for the others are in `strangers`; the file has both here.
    removed: VecDeque<i64>,
    /// The removed ones that were not registered, as far as this run knows: motes are told of them last.
    #[serde(skip)]
    strangers: VecDeque<i64>,
    /// The id of the bot that `offset` belongs to. Without a configured token, no other is polled.
    bot: Option<String>,
    /// Bot API, getUpdates: the next update's id. It may fall: Telegram numbers anew after a week.
    offset: i64,
}

#[derive(Clone, PartialEq, Serialize, Deserialize)]
struct User {
    #[serde(default)]
    name: String,
    chat: i64,
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name, self.chat)
    }
}

impl State {
    /// Reads the state. A damaged file is set aside, for the gateway must start. One that cannot be
    /// read ends the start and stays as it is: it may hold everybody.
    fn open(config: &Config) -> Result<State, String> {
        let path = &config.state_path;
        let content = read_file(path)?;
        let mut state = State::parse(path, content).unwrap_or_else(|reason| {
            let aside = beside(path, ".damaged");
            match fs::rename(path, &aside) {
                Ok(()) => error!("{reason}; starting anew, it is kept as {}", aside.display()),
                Err(error) => error!("{reason}; starting anew, it cannot be kept: {error}"),
            }
            State::default()
        });
        // Update ids are counted for each bot.
        if let Some(token) = &config.token
            && state.bot.as_deref() != Some(token.bot_id())
        {
            state.bot = Some(token.bot_id().to_string());
            state.offset = 0;
        }
        Ok(state)
    }

    /// Reads the content of the file, if there is one. Whatever somebody has written there, the firmware
    /// understands what is left of it.
    fn parse(path: &Path, content: Option<Vec<u8>>) -> Result<State, String> {
        let Some(content) = content else {
            return Ok(State::default());
        };
        // An array, too, would be a State to serde, with its values in order.
        let object = serde_json::from_slice::<serde_json::Map<String, Value>>(&content);
        let state = object.and_then(|object| State::deserialize(Value::Object(object)));
        let mut state =
            state.map_err(|error| format!("cannot read {}: {error}", path.display()))?;
        let as_read = state.clone();
        let is_interval = |minutes: &i64| (INTERVAL_MIN..=INTERVAL_MAX).contains(minutes);
        state.interval = state.interval.filter(is_interval);
        state.feedback = state.feedback.filter(|on| matches!(on, 0 | 1));
        let removed = mem::take(&mut state.removed);
        let users = mem::take(&mut state.users);
        for chat in removed.into_iter().filter(|chat| fits_firmware(*chat)) {
            state.remove(chat);
        }
        for user in users.into_iter().filter(|user| fits_firmware(user.chat)) {
            state.register(user.chat, &user.name);
        }
        if state.for_file() != as_read {
            let path = path.display();
            warn!("{path}: what motes would not understand is left out or changed");
        }
        Ok(state)
    }

    /// Replaces the file, readable by its owner alone. A power cut leaves the old or the new one.
    fn write(&self, path: &Path) -> io::Result<()> {
        let new = beside(path, ".new");
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        let mut file = options.open(&new)?;
        file.set_permissions(fs::Permissions::from_mode(0o600))?; // one that was left there, too
        file.write_all(&serde_json::to_vec_pretty(&self.for_file())?)?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        let whole = Path::new(".").join(path); // so that a bare name, too, has a folder
        File::open(whole.parent().unwrap_or(&whole))?.sync_all()
    }

    fn is_user(&self, chat: i64) -> bool {
        self.users.iter().any(|user| user.chat == chat)
    }

    fn is_removed(&self, chat: &ChatId) -> bool {
        self.removals().any(|id| ChatId::Number(id) == *chat)
    }

    /// Returns who is removed, the latest of each kind last.
    fn removals(&self) -> impl Iterator<Item = i64> {
        self.strangers.iter().chain(&self.removed).copied()
    }

    /// Returns what the file holds, which does not tell strangers apart.
    fn for_file(&self) -> State {
        State {
            removed: self.removals().collect(),
            strangers: VecDeque::new(),
            ..self.clone()
        }
    }

    /// Registers a chat if there is room, and returns its user. Who is registered keeps the name, even
    /// after changing it at Telegram: the firmware finds users by name, and of two who swap theirs
    /// between two polls it would keep one twice and lose the other.
    fn register(&mut self, chat: i64, name: &str) -> Option<&User> {
        if !self.is_user(chat) && self.users.len() < USERS_MAX {
            self.removed.retain(|removed| *removed != chat);
            self.strangers.retain(|removed| *removed != chat);
            let name = self.free_name(name);
            self.users.push(User { name, chat });
        }
        self.users.iter().find(|user| user.chat == chat)
    }

    /// Removes a chat, known or not: the firmware may have it built in. Returns who it was.
    fn remove(&mut self, chat: i64) -> String {
        let mut shown = chat.to_string();
        if let Some(index) = self.users.iter().position(|user| user.chat == chat) {
            shown = self.users.remove(index).to_string();
            self.removed.push_back(chat);
        } else if !self.removed.contains(&chat) {
            self.strangers.retain(|removed| *removed != chat);
            self.strangers.push_back(chat);
        }
        if self.removals().count() > REMOVED_MAX && self.strangers.pop_front().is_none() {
            self.removed.pop_front();
        }
        shown
    }

    /// Finds the chat that somebody means by an id or by a user's name. An id that nobody has may be
    /// built into the firmware; but first it may be somebody's name.
    fn find(&self, meant: &str) -> Option<i64> {
        let id = parse_number(meant).filter(|id| fits_firmware(*id));
        if id.is_some_and(|id| self.is_user(id)) {
            return id;
        }
        let name = clean_name(meant);
        let lower = name.to_lowercase();
        let is_like = |user: &&User| user.name.to_lowercase() == lower;
        let exact = self.users.iter().find(|user| user.name == name);
        let found = exact.or_else(|| self.users.iter().find(is_like));
        found.map(|user| user.chat).or(id)
    }

    /// Returns a name for the firmware that no user has, for it finds users by name.
    fn free_name(&self, name: &str) -> String {
        let mut clean = clean_name(name);
        if clean.is_empty() {
            clean = "user".to_string();
        }
        let mut free = clean.clone();
        let mut number = 2;
        while self.users.iter().any(|user| user.name == free) {
            let suffix = format!("_{number}");
            free = format!("{}{suffix}", cut(&clean, NAME_MAX - suffix.len()));
            number += 1;
        }
        free
    }

    /// Returns all that a mote should know: removals first, for they make room; then settings and
    /// users. A removal that does not fit any more is not told, but nothing is sent to that chat
    /// either; the newest of those who were registered are the last to be left out.
    fn summary(&self) -> String {
        let mut tokens = Vec::new();
        tokens.extend(self.interval.map(|minutes| format!("i{minutes}")));
        tokens.extend(self.feedback.map(|on| format!("f{on}")));
        for User { name, chat } in &self.users {
            tokens.push(format!("{name}:{chat}"));
        }
        // At most 277 bytes: i120;f1; and ten times a name of 14, a colon, an id of 11 digits.
        let others = tokens.join(";");
        let removed = newest_removals(&self.removed, REPLY_MAX - others.len());
        let room = REPLY_MAX - others.len() - removed.len();
        let strangers = newest_removals(&self.strangers, room);
        let summary = removed + &strangers + &others;
        summary.trim_end_matches(';').to_string()
    }
}

/// Returns the tokens of the newest removals that fit into so many bytes, each with a `;`.
fn newest_removals(chats: &VecDeque<i64>, room: usize) -> String {
    let mut tokens = String::new();
    for chat in chats.iter().rev() {
        let longer = format!("r{chat};{tokens}");
        if longer.len() > room {
            break;
        }
        tokens = longer;
    }
    tokens
}

/// Reads a number as people mean it: Rust would take a leading `+`, too.
fn parse_number(text: &str) -> Option<i64> {
    let has_plus = text.starts_with('+');
    if has_plus { None } else { text.parse().ok() }
}

/// Appends an entry. If there are as many as there may be, the oldest gives way and is returned.
fn push_bounded<T>(queue: &mut VecDeque<T>, entry: T, max: usize) -> Option<T> {
    let is_full = queue.len() >= max;
    let oldest = if is_full { queue.pop_front() } else { None };
    queue.push_back(entry);
    oldest
}

/// Reads a text file, if there is one. An error names the file.
fn read_file(path: &Path) -> Result<Option<Vec<u8>>, String> {
    match fs::read(path) {
        Ok(content) => Ok(Some(without_mark(&content).to_vec())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        // Nothing can be there: its folder is a file.
        Err(error) if error.kind() == ErrorKind::NotADirectory => Ok(None),
        Err(error) => Err(format!("cannot read {}: {error}", path.display())),
    }
}

/// Strips the byte order mark that editors on Windows put in front of a text.
fn without_mark(content: &[u8]) -> &[u8] {
    content.strip_prefix(b"\xef\xbb\xbf").unwrap_or(content)
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Whether the firmware keeps this id whole, and can remove it: for that it begins with a digit.
fn fits_firmware(chat: i64) -> bool {
    (1..=CHAT_ID_MAX).contains(&chat)
}

/// Returns what is left of a name, maybe nothing, without what nobody sees and what separates the
/// firmware's tokens. The firmware neither cuts it nor takes it for anything else.
fn clean_name(name: &str) -> String {
    let is_lost = |c: char| c.is_control() || is_invisible(c) || ";:,&=".contains(c);
    let mut visible = name.to_string();
    visible.retain(|c| c.is_whitespace() || !is_lost(c)); // a line feed is a control, and parts words
    let words: Vec<&str> = visible.split_whitespace().collect();
    let mut name = words.join(" ");
    if is_misread(cut(&name, NAME_MAX)) {
        name.insert(0, '_');
    }
    cut(&name, NAME_MAX).to_string()
}

/// Whether the firmware would take a name for a setting, a removal, everybody, or an id.
fn is_misread(name: &str) -> bool {
    match name.as_bytes() {
        [] => false,
        [b'f', b'0' | b'1', ..] | [b'i' | b'r', b'0'..=b'9', ..] => true,
        name => name == b"all" || name.iter().all(u8::is_ascii_digit),
    }
}

/// Cuts a text to at most so many bytes, at a character, and without white space at its end.
fn cut(text: &str, bytes: usize) -> &str {
    text[..text.floor_char_boundary(bytes)].trim_end()
}

/// Whether nobody sees this character: joiners, marks of direction, variation selectors, fillers.
fn is_invisible(c: char) -> bool {
    matches!(c,
        '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}'
        | '\u{180b}'..='\u{180f}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}' | '\u{2800}' | '\u{3164}' | '\u{fe00}'..='\u{fe0f}'
        | '\u{feff}' | '\u{ffa0}' | '\u{fff0}'..='\u{fffb}' | '\u{1bca0}'..='\u{1bca3}'
        | '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{e0fff}')
}

// ---------- Motes ----------
//
// What each mote has acknowledged of the state. It ends with the process: then everybody is told
// everything again.

/// How many motes are remembered.
const MOTES_MAX: usize = 64;
/// How far a message ID may be from the highest one of the same mote. The firmware's go up by 1 to
/// 3, and some requests get lost; after a restart they begin anew, at random.
const MESSAGE_ID_STEP_MAX: u16 = 64;

#[derive(Default)]
struct Motes {
    /// The longest silent one comes first.
    motes: VecDeque<Mote>,
    /// The number of the summary that was last offered, and its text.
    version: u64,
    summary: String,
}

struct Mote {
    address: IpAddr,
    port: u16,
    /// The highest message ID, and when it came.
    message_id: u16,
    message_id_at: Instant,
    /// The version that it acknowledged last, 0 for none, and when.
    version: u64,
    acknowledged_at: Instant,
}

impl Motes {
    /// Returns the version of this summary: a new one if it is not the one that was last offered.
    fn version_of(&mut self, summary: &str) -> u64 {
        if self.summary != summary {
            self.summary = summary.to_string();
            self.version += 1;
        }
        self.version
    }

    /// Remembers a mote by its request. One whose message ID does not go on from the highest has
    /// restarted, and knows nothing. Another port is another client, whose message IDs say nothing.
    fn note_request(&mut self, peer: SocketAddr, message_id: u16, now: Instant) {
        let address = peer.ip().to_canonical();
        let index = self.motes.iter().position(|mote| mote.address == address);
        let known = index.and_then(|index| self.motes.remove(index));
        let mut mote = known.unwrap_or(Mote {
            address,
            port: peer.port(),
            message_id: message_id.wrapping_sub(1), // so that this one goes on from it
            message_id_at: now,
            version: 0,
            acknowledged_at: now,
        });
        let steps = 1..=MESSAGE_ID_STEP_MAX;
        let is_same_client = mote.port == peer.port();
        let is_next = steps.contains(&message_id.wrapping_sub(mote.message_id));
        let is_late = is_same_client
            && steps.contains(&mote.message_id.wrapping_sub(message_id))
            && now < mote.message_id_at + coap::MAX_TRANSMIT_WAIT;
        if is_same_client && !is_next && !is_late {
            info!("{address} has restarted, its message ID says: it is told everything");
            mote.version = 0;
        }
        if !is_late {
            mote.port = peer.port();
            mote.message_id = message_id;
            mote.message_id_at = now;
        }
        push_bounded(&mut self.motes, mote, MOTES_MAX);
    }

    fn acknowledge(&mut self, peer: SocketAddr, version: u64, now: Instant) {
        if let Some(mote) = self.find(peer) {
            mote.version = version;
            mote.acknowledged_at = now;
        }
    }

    /// Whether a mote knows this version, and not for so long that it may have restarted since.
    fn has_acknowledged(&mut self, peer: SocketAddr, version: u64, now: Instant) -> bool {
        self.find(peer).is_some_and(|mote| {
            mote.version == version && now < mote.acknowledged_at + ACKNOWLEDGED_HOLDS
        })
    }

    fn find(&mut self, peer: SocketAddr) -> Option<&mut Mote> {
        let address = peer.ip().to_canonical();
        self.motes.iter_mut().find(|mote| mote.address == address)
    }
}

// ---------- People ----------
//
// What people write to the bot, and what they are answered. Ids and the chat's type must be there;
// everything else in a message may be missing or odd.

/// How many messages that hold a password wait for their deletion, and how many chats for an answer.
const WAITING_MAX: usize = 100;
/// How many chats are remembered for their wrong passwords.
const SUSPECTS_MAX: usize = 256;
const REGISTERED: &str = "You are registered.";
const HOW_TO_REGISTER: &str = "To register, write: register <password>";
const NOT_UNDERSTOOD: &str = "I do not understand that.";
const WRONG_PASSWORD: &str = "Wrong password. Nothing was changed.";
const TOO_MANY_WRONG_PASSWORDS: &str =
    "Wrong password. Your config and register messages are ignored for an hour.";

/// What is needed of the Bot API's `Chat`.
struct Chat {
    id: i64,
    kind: String,
    name: String,
}

impl fmt::Display for Chat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} ({})", self.id, self.name, self.kind)
    }
}

impl Chat {
    /// None without an id or a type. People have first names, groups have titles.
    fn read(chat: &Value) -> Option<Chat> {
        let text = |key: &str| chat[key].as_str().filter(|text| !text.is_empty());
        let name = text("first_name").or(text("title")).or(text("username"));
        Some(Chat {
            id: chat["id"].as_i64()?,
            kind: chat["type"].as_str()?.to_string(),
            name: name.unwrap_or_default().to_string(),
        })
    }
}

/// Whether a message holds something that people send beside texts. Bot API, Message.
fn has_media(message: &Value) -> bool {
    let mut fields = message.as_object().into_iter().flatten();
    fields.any(|(key, value)| match key.as_str() {
        "animation" | "audio" | "checklist" | "contact" | "dice" | "document" | "game"
        | "invoice" | "live_photo" | "location" | "paid_media" | "photo" | "poll" | "sticker"
        | "story" | "venue" | "video" | "video_note" | "voice" => !value.is_null(),
        _ => false,
    })
}

#[derive(Default)]
struct People {
    /// What is to be said as soon as it is saved, the oldest first.
    answers: VecDeque<Answer>,
    /// What is to be deleted, the oldest first.
    deletions: VecDeque<Deletion>,
    /// Whether the gateway's last fetch left no time for all of them: then they get a turn before the next.
    have_next_turn: bool,
    /// Who has tried wrong passwords, the latest last.
    suspects: VecDeque<Suspect>,
}

/// All that one chat is told at once.
struct Answer {
    chat: i64,
    texts: Vec<String>,
}

/// A message that may hold a password.
struct Deletion {
    chat: i64,
    message_id: i64,
}

struct Suspect {
    chat: i64,
    /// Wrong passwords in a row.
    wrong: u32,
    last_at: Instant,
}

impl People {
    fn are_waiting(&self) -> bool {
        !self.answers.is_empty() || !self.deletions.is_empty()
    }

    /// Takes an update in. Progress comes first: one that cannot be understood must not come back.
    fn take(&mut self, update: &Value, state: &mut State, config: &Config) {
        let Some(id) = update["update_id"].as_i64() else {
            return info!("an update without an id is ignored");
        };
        state.offset = id.saturating_add(1);
        let message = &update["message"];
        match Chat::read(&message["chat"]) {
            None => info!("update {id} is ignored: it is no message in a chat with id and type"),
            Some(chat) => self.hear(&chat, message, state, config),
        }
    }

    /// Carries out what somebody has written, and registers them unless that takes the password.
    fn hear(&mut self, chat: &Chat, message: &Value, state: &mut State, config: &Config) {
        let id = chat.id;
        let text = message["text"].as_str().unwrap_or_default();
        let caption = message["caption"].as_str().unwrap_or_default();
        let command = Command::read(text, config);
        if command.has_password() || Command::read(caption, config).has_password() {
            self.delete_later(id, message); // in a group, too, where it is not carried out
        }
        if chat.kind != "private" || !fits_firmware(id) {
            return info!("{chat} cannot register");
        }
        // Not before the deletion: in a group a person may write as a bot, an anonymous admin for one.
        if message["from"]["is_bot"] == true {
            return info!("{chat} is a bot, and ignored");
        }
        if text.is_empty() && caption.is_empty() && !has_media(message) {
            return; // a service message: it tells what happened in the chat
        }
        if let Command::Leave = command {
            let who = state.remove(id);
            info!("{who} is removed, as asked");
            return self.say(id, &removal_notice(config));
        }
        let is_newcomer = !state.is_user(id); // before this message
        let has_left = state.is_removed(&ChatId::Number(id));
        let may_register = !has_left || !text.is_empty(); // a sticker brings back nobody who left
        if is_newcomer && may_register && !config.registration_by_password {
            self.register(chat, state);
        }
        match command {
            _ if command.has_password() && self.is_locked_out(id) => {}
            Command::Config(words) => self.configure(id, &words, state, config),
            Command::Register(words) => self.on_register(chat, &words, state, config),
            Command::Help => self.say(id, &help(config)),
            _ if is_newcomer && config.registration_by_password => self.say(id, HOW_TO_REGISTER),
            _ if is_newcomer && state.is_user(id) => self.say(id, &help(config)), // just registered
            Command::Unknown if !is_newcomer => {
                self.say(id, NOT_UNDERSTOOD);
                self.say(id, &help(config));
            }
            _ => {} // a sticker; or the list is full, as `register` has said
        }
    }

    /// Registers a chat as long as there is room, and says so.
    fn register(&mut self, chat: &Chat, state: &mut State) {
        match state.register(chat.id, &chat.name) {
            Some(user) => {
                info!("{user} is registered");
                self.say(chat.id, REGISTERED);
            }
            None => {
                let full = format!("The list is full: {USERS_MAX} people are registered already.");
                self.say(chat.id, &full);
            }
        }
    }

    /// Carries out `register <password>`.
    fn on_register(&mut self, chat: &Chat, words: &[&str], state: &mut State, config: &Config) {
        let [_, guess] = *words else {
            return self.say(chat.id, HOW_TO_REGISTER);
        };
        if self.check_password(chat.id, guess, config) {
            self.register(chat, state);
            if state.is_user(chat.id) {
                self.say(chat.id, &help(config));
            }
        }
    }

    /// Carries out `config <password> <key> <value>`. Fewer than four words are no guess. Key and value
    /// are looked at after the password, so that nobody learns anything without it.
    fn configure(&mut self, chat: i64, words: &[&str], state: &mut State, config: &Config) {
        if config.password.is_none() {
            return self.say(chat, "No password is set, so nothing can be changed.");
        }
        let form = format!("Nothing was changed. Allowed is:\n{}", config_commands());
        let [_, guess, key, _, ..] = *words else {
            return self.say(chat, &form);
        };
        if !self.check_password(chat, guess, config) {
            return;
        }
        let value = words[3..].join(" ");
        let number = parse_number(unquote(&value));
        let confirmation = match (plain(key).as_str(), number) {
            ("remove", _) => return self.remove_other(chat, &value, state, config),
            ("interval", Some(minutes @ INTERVAL_MIN..=INTERVAL_MAX)) => {
                state.interval = Some(minutes);
                format!("The interval is set to {minutes} minutes.")
            }
            ("feedback", Some(on @ 0..=1)) => {
                state.feedback = Some(on);
                format!("The LED feedback is set to {on}.")
            }
            _ => return self.say(chat, &form),
        };
        info!("chat {chat}: {confirmation}");
        self.say(chat, &confirmation);
    }

    /// Unregisters somebody else: strangers who fill the list must not lock the owner out.
    fn remove_other(&mut self, chat: i64, meant: &str, state: &mut State, config: &Config) {
        let found = state.find(meant).or_else(|| state.find(unquote(meant)));
        let Some(other) = found else {
            return self.say(chat, "Nobody is registered with this name or id.");
        };
        let was_user = state.is_user(other);
        let who = state.remove(other);
        let confirmation = format!("{who} is removed.");
        info!("chat {chat}: {confirmation}");
        self.say(chat, &confirmation);
        if was_user {
            let notice = removal_notice(config);
            let notice = format!("Somebody with the password did it: {notice}");
            self.say(other, &notice);
        }
    }

    /// Whether what a chat writes with a password is ignored. After an hour it begins anew.
    fn is_locked_out(&mut self, chat: i64) -> bool {
        let is_locked = |suspect: &Suspect| suspect.wrong >= WRONG_PASSWORDS_MAX;
        self.suspects
            .retain(|known| !is_locked(known) || known.last_at.elapsed() < LOCKED_OUT);
        let suspect = self.suspects.iter().find(|known| known.chat == chat);
        suspect.is_some_and(is_locked)
    }

    /// Returns whether the password is right. A wrong one is counted and answered.
    fn check_password(&mut self, chat: i64, guess: &str, config: &Config) -> bool {
        let index = self.suspects.iter().position(|known| known.chat == chat);
        let known = index.and_then(|index| self.suspects.remove(index));
        let password = config.password.as_ref();
        if password.is_some_and(|password| password.matches(guess)) {
            return true;
        }
        let suspect = Suspect {
            chat,
            wrong: 1 + known.map_or(0, |known| known.wrong),
            last_at: Instant::now(),
        };
        let answer = match suspect.wrong {
            WRONG_PASSWORDS_MAX.. => TOO_MANY_WRONG_PASSWORDS,
            _ => WRONG_PASSWORD,
        };
        warn!("chat {chat}: {answer}");
        self.say(chat, answer);
        push_bounded(&mut self.suspects, suspect, SUSPECTS_MAX);
        false
    }

    /// Keeps a message for deletion. If there are too many, the oldest stays in its chat.
    fn delete_later(&mut self, chat: i64, message: &Value) {
        if let Some(message_id) = message["message_id"].as_i64() {
            let deletion = Deletion { chat, message_id };
            push_bounded(&mut self.deletions, deletion, WAITING_MAX);
        }
    }

    /// Adds a text to what a chat is told, once. If too many chats wait, the oldest hears nothing.
    fn say(&mut self, chat: i64, text: &str) {
        let text = text.to_string();
        if let Some(answer) = self.answers.iter_mut().find(|answer| answer.chat == chat) {
            answer.texts.retain(|other| *other != text); // what is said last is what holds
            answer.texts.push(text);
            return;
        }
        let texts = vec![text];
        let dropped = push_bounded(&mut self.answers, Answer { chat, texts }, WAITING_MAX);
        if dropped.is_some() {
            warn!("too many chats wait: an answer to a person is dropped");
        }
    }
}

/// What somebody wants. Commands with a password keep their words as they were written.
enum Command<'a> {
    /// There is no text.
    Nothing,
    Leave,
    Help,
    Config(Vec<&'a str>),
    Register(Vec<&'a str>),
    Unknown,
}

impl<'a> Command<'a> {
    /// Reads a command as people write it, also as Telegram's apps suggest it: `/remove_me@bot`.
    fn read(text: &'a str, config: &Config) -> Command<'a> {
        let mut words: Vec<&str> = text.split_whitespace().collect();
        words.retain(|word| !word.chars().all(is_invisible));
        if words.is_empty() {
            return Command::Nothing;
        }
        // Words of signs alone, such as an emoji, are dropped in front; behind, they may be the password.
        let Some(start) = words.iter().position(|word| !plain(word).is_empty()) else {
            return Command::Unknown;
        };
        words.drain(..start);
        let first = plain(words[0]);
        let command = first.split('@').next().unwrap_or_default(); // without the bot's name
        let mut phrase = vec![command.to_string()];
        phrase.extend(words[1..].iter().map(|word| plain(word)));
        let phrase = phrase.join(" ").replace('_', " ");
        let phrase: Vec<&str> = phrase.split_whitespace().collect();
        match phrase[..] {
            ["remove", "me"] | ["stop"] => Command::Leave,
            ["help"] | ["start", ..] => Command::Help,
            ["config", ..] => Command::Config(words),
            ["register", ..] if config.registration_by_password => Command::Register(words),
            _ => Command::Unknown,
        }
    }

    fn has_password(&self) -> bool {
        matches!(self, Command::Config(_) | Command::Register(_))
    }
}

/// Returns a word for comparison: lower-case, visible, from the first to the last letter or digit.
fn plain(word: &str) -> String {
    let mut visible = word.to_lowercase();
    visible.retain(|c| !is_invisible(c) && c != '\u{307}'); // `İ` becomes `i` and this
    visible.trim_matches(|c: char| !c.is_alphanumeric()).into()
}

/// Strips what people put around a value: quotes, brackets, and the end of a sentence.
fn unquote(value: &str) -> &str {
    let is_around = |c: char| "\"'“”„‘’«»<>()[]`".contains(c) || is_invisible(c);
    let value = value.trim_matches(is_around);
    let value = value.trim_end_matches(['.', ',', ';', ':', '!', '?']);
    value.trim_matches(is_around)
}

/// Returns what the bot can do with these settings.
fn help(config: &Config) -> String {
    let mut help = "I pass on what the sensors report.\n".to_string();
    if config.registration_by_password {
        help += "register <password> - get the messages\n";
    }
    help += "remove me - no more messages\n";
    if config.password.is_some() {
        help += &config_commands();
    }
    help + "help - this text"
}

fn config_commands() -> String {
    format!(
        "config <password> interval <{INTERVAL_MIN}..{INTERVAL_MAX}> - minutes between two reports\n\
        config <password> feedback <0|1> - LED feedback off or on\n\
        config <password> remove <name or id> - no more messages for somebody else\n"
    )
}

fn removal_notice(config: &Config) -> String {
    let again = match config.registration_by_password {
        true => "To register again, write: register <password>",
        false => "Write anything to register again.",
    };
    format!("You are removed and get no more messages. {again}")
}

// ---------- Configuration ----------
//
// What the operator has set, read once at the start. A setting that cannot be honoured ends it.

/// How many bytes of its token the firmware keeps.
const MOTE_TOKEN_MAX: usize = 49;
/// Where setup.sh puts the settings, and what belongs to them.
const INSTALLED_SETTINGS: &str = "/etc/coap_websocket";
const INSTALLED_STATE: &str = "/var/lib/coap_websocket";
const INSTALLED_LOG: &str = "/var/log/coap_websocket";
/// What is read of the real environment, which wins over `.env`.
const VARIABLES: [&str; 5] = [
    "PASSWORD",
    "COAP_SERVER_IP",
    "COAP_SERVER_PORT",
    "SSL_CERT_FILE",
    "HTTPS_PROXY",
];

/// A token or a password. Without `Debug` and `Display` it cannot get into a log line by accident.
#[derive(Clone)]
struct Secret(String);

impl Secret {
    /// Whether this is `<bot id>:<letters, digits, _ and ->`: it stands in a URL as it is.
    fn is_bot_token(&self) -> bool {
        let (id, key) = self.0.split_once(':').unwrap_or_default();
        let is_id = (1..=20).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_digit());
        let fits = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-';
        is_id && (1..=100).contains(&key.len()) && key.bytes().all(fits)
    }

    /// Returns the part of a bot token before the colon: the bot's user id, which is public.
    fn bot_id(&self) -> &str {
        self.0.split(':').next().unwrap_or_default()
    }

    /// Compares in constant time: how long it takes depends on the guess alone.
    fn matches(&self, guess: &str) -> bool {
        let mut unlike = self.0.len() ^ guess.len();
        for (own, guessed) in self.0.bytes().cycle().zip(guess.bytes()) {
            unlike |= usize::from(own ^ guessed);
        }
        std::hint::black_box(unlike) == 0
    }
}

struct Folders {
    config_ini: PathBuf,
    dot_env: PathBuf,
    state: PathBuf,
    log: PathBuf,
    /// Whether these are an installed service's, and this process is not that service.
    belong_to_another: bool,
}

impl Folders {
    /// Finds what systemd names; else the working directory if it holds settings; else those of an
    /// installation, so that `check` and `send` work from every folder of the Pi; else the working
    /// directory.
    fn find() -> Folders {
        let is_installed = Path::new(INSTALLED_SETTINGS).join("config.ini").exists();
        // Whoever stands in that folder sees the installation's config.ini, not one of their own.
        let is_inside = env::current_dir().is_ok_and(|here| here == Path::new(INSTALLED_SETTINGS));
        let has_settings = Path::new("config.ini").exists() || Path::new(".env").exists();
        let uses_installation = is_installed && (is_inside || !has_settings);
        let folder = |variable: &str, installed: &str| match folder_of_systemd(variable) {
            Some(folder) => folder,
            None if uses_installation => installed.into(),
            None => PathBuf::new(),
        };
        let is_service = folder_of_systemd("STATE_DIRECTORY").is_some();
        let settings = folder("CREDENTIALS_DIRECTORY", INSTALLED_SETTINGS);
        let are_credentials = folder_of_systemd("CREDENTIALS_DIRECTORY").is_some();
        let dot_env = if are_credentials { "env" } else { ".env" }; // systemd wants no dot there
        Folders {
            config_ini: settings.join("config.ini"),
            dot_env: settings.join(dot_env),
            state: folder("STATE_DIRECTORY", INSTALLED_STATE),
            log: folder("LOGS_DIRECTORY", INSTALLED_LOG),
            belong_to_another: uses_installation && !is_service,
        }
    }
}

/// Returns the folder that systemd names in a variable; of several, the first.
fn folder_of_systemd(variable: &str) -> Option<PathBuf> {
    let folders = env::var(variable).ok()?;
    let first = folders.split(':').next()?;
    (!first.is_empty()).then(|| first.into())
}

struct Config {
    /// The only Bot API url that is served and connected to.
    url: String,
    /// `None`: `/message` serves any token, `/update` the first bot that Telegram accepts.
    token: Option<Secret>,
    /// What motes may present for `token`, so that it never crosses the mesh.
    mote_token: Option<Secret>,
    /// Whether registering takes the password. Otherwise whoever writes is registered.
    registration_by_password: bool,
    ip_family: IpFamily,
    /// `None`: every `config` is refused.
    password: Option<Secret>,
    listen: SocketAddr,
    roots: RootCerts,
    proxy: Option<ureq::Proxy>,
    state_path: PathBuf,
    /// Where a bot token is looked for, for a message about one that is missing.
    config_ini: PathBuf,
}

impl Config {
    fn new(folders: &Folders) -> Config {
        Config {
            url: "https://api.telegram.org/bot".to_string(),
            token: None,
            mote_token: None,
            registration_by_password: false,
            ip_family: IpFamily::Any,
            password: None,
            listen: SocketAddr::new(Ipv6Addr::LOCALHOST.into(), coap::PORT),
            roots: RootCerts::WebPki,
            proxy: None,
            state_path: folders.state.join("state.json"),
            config_ini: folders.config_ini.clone(),
        }
    }

    /// Reads `.env` and `config.ini`; the environment wins. An error names file, line and reason.
    fn load(folders: &Folders, environment: Vec<Setting>) -> Result<Config, String> {
        let mut config = Config::new(folders);
        let mut variables = read_settings(&folders.dot_env, None)?;
        variables.retain(|own| environment.iter().all(|other| other.name != own.name));
        variables.extend(environment);
        for setting in &variables {
            config.set_variable(setting)?;
        }
        let of_ini = read_settings(&folders.config_ini, Some("telegram"))?;
        for setting in &of_ini {
            config.set_ini(setting)?;
        }
        for setting in &of_ini {
            if config.token.is_none() && setting.name.eq_ignore_ascii_case("mote_token") {
                return Err(setting.fault("does not work without bot_token"));
            }
        }
        let ini = folders.config_ini.display();
        let env = folders.dot_env.display();
        if config.token.is_none() {
            warn!("no bot_token is set in {ini}: /message serves any token, /update the first bot");
        }
        if config.password.is_none() {
            warn!("no PASSWORD is set in {env}: every `config` is refused");
        }
        Ok(config)
    }

    /// Sets what stands in `[telegram]` of `config.ini`, once the variables are set.
    fn set_ini(&mut self, setting: &Setting) -> Result<(), String> {
        let value = setting.value.as_str();
        let secret = Secret(value.to_string());
        let refuse = |rule: &str| Err(setting.fault(rule));
        match (setting.name.to_lowercase().as_str(), value) {
            ("bot_token", "your_telegram_bot_token") => {} // the template's: not set
            ("bot_token", _) if secret.is_bot_token() => self.token = Some(secret),
            ("bot_token", _) => return refuse("is not a bot token (digits, a colon, letters)"),
            ("mote_token", _) if is_mote_token(value) => self.mote_token = Some(secret),
            ("mote_token", _) => {
                let rule = format!("is not a word of at most {MOTE_TOKEN_MAX} bytes without &");
                return refuse(&rule);
            }
            ("registration", "open") => self.registration_by_password = false,
            ("registration", "password") if self.password.is_none() => {
                return refuse("does not work without PASSWORD, which .env sets");
            }
            ("registration", "password") => self.registration_by_password = true,
            ("registration", _) => return refuse("is neither open nor password"),
            ("url", _) if is_https_url(value) => self.url = value.to_string(),
            ("url", _) => return refuse("is not of the form https://host/bot"),
            ("ip_family", "any") => self.ip_family = IpFamily::Any,
            ("ip_family", "ipv4") => self.ip_family = IpFamily::Ipv4Only,
            ("ip_family", "ipv6") => self.ip_family = IpFamily::Ipv6Only,
            ("ip_family", _) => return refuse("is none of any, ipv4, ipv6"),
            _ => warn!("{}", setting.fault("is unknown and ignored")),
        }
        Ok(())
    }

    /// Sets what stands in `.env` or in the environment.
    fn set_variable(&mut self, setting: &Setting) -> Result<(), String> {
        let value = setting.value.as_str();
        let refuse = |rule: &str| Err(setting.fault(rule));
        match setting.name.as_str() {
            "PASSWORD" if value.contains(|c: char| c.is_whitespace() || c.is_control()) => {
                return refuse("holds white space or a control character, which nobody could send");
            }
            "PASSWORD" => self.password = Some(Secret(value.to_string())),
            "COAP_SERVER_IP" => match value.parse() {
                Ok(ip) if is_one_address(ip) => self.listen.set_ip(ip),
                Ok(_) => return refuse("is not one address: name the one that the motes send to"),
                Err(_) => return refuse("is not an IP address (without a zone)"),
            },
            "COAP_SERVER_PORT" => match value.parse() {
                Ok(port @ 1..) => self.listen.set_port(port),
                _ => return refuse("is not a port (1 to 65535)"),
            },
            "SSL_CERT_FILE" => {
                self.roots = read_roots(value).map_err(|reason| setting.fault(&reason))?;
            }
            "HTTPS_PROXY" => {
                let rule = "is not of the form http://[user:password@]host:port";
                self.proxy = Some(read_proxy(value).ok_or_else(|| setting.fault(rule))?);
            }
            _ => warn!("{}", setting.fault("is unknown and ignored")),
        }
        Ok(())
    }

    /// Returns the token for the commands that cannot do without.
    fn required_token(&self) -> Result<&Secret, String> {
        let missing = || format!("no bot_token is set in {}", self.config_ini.display());
        self.token.as_ref().ok_or_else(missing)
    }
}

/// A line of settings.
struct Setting {
    /// File and line, or the environment.
    place: String,
    /// The name as it is spelled there.
    name: String,
    /// Not empty; maybe a secret, so that no message repeats it.
    value: String,
}

impl Setting {
    /// Reads `NAME=value`; the value may stand in quotes.
    fn read(place: String, line: &str) -> Result<Setting, String> {
        let line = line.strip_prefix("export ").unwrap_or(line);
        let fits = |c: char| c.is_alphanumeric() || "_-.".contains(c);
        let is_name = |name: &str| !name.is_empty() && name.chars().all(fits);
        let pair = line
            .split_once('=')
            .map(|(name, value)| (name.trim(), value.trim()));
        let Some((name, value)) = pair.filter(|(name, _)| is_name(name)) else {
            return Err(format!("{place}: not `NAME=value`")); // the line may hold a secret
        };
        let name = name.to_string();
        let between = |quote: char| value.strip_prefix(quote)?.strip_suffix(quote);
        let value = between('"').or(between('\'')).unwrap_or(value).to_string();
        Ok(Setting { place, name, value })
    }

    fn fault(&self, rule: &str) -> String {
        format!("{}: {} {rule}", self.place, self.name)
    }
}

/// Reads the settings of a file or of a section of it. What is set to nothing is not set.
fn read_settings(path: &Path, section: Option<&str>) -> Result<Vec<Setting>, String> {
    let content = read_file(path)?.unwrap_or_default();
    let mut current = None;
    let mut settings: Vec<Setting> = Vec::new();
    for (number, line) in (1..).zip(content.split(|byte| *byte == b'\n')) {
        let place = format!("{}:{number}", path.display());
        let Ok(line) = str::from_utf8(line) else {
            return Err(format!("{place}: not UTF-8 text"));
        };
        let line = line.trim();
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        if section.is_some() && line.starts_with('[') {
            let Some((name, behind)) = line[1..].split_once(']') else {
                return Err(format!("{place}: `[` without `]`"));
            };
            let behind = behind.trim_start();
            if !behind.is_empty() && !behind.starts_with(['#', ';']) {
                return Err(format!(
                    "{place}: something behind `]`; put it in a line of its own"
                ));
            }
            current = Some(name.trim().to_lowercase());
        } else if section.is_some() && current.is_none() {
            return Err(format!("{place}: no section yet; put [telegram] above it"));
        } else if current.as_deref() == section {
            let setting = Setting::read(place, line)?;
            // Variables are told apart by case: many set `no_proxy` and `NO_PROXY`.
            let is_same = |other: &Setting| match section {
                Some(_) => other.name.eq_ignore_ascii_case(&setting.name),
                None => other.name == setting.name,
            };
            if settings.iter().any(is_same) {
                return Err(setting.fault("is set twice; remove one of them"));
            }
            settings.push(setting);
        }
    }
    settings.retain(|setting| !setting.value.is_empty());
    Ok(settings)
}

/// Reads the variables of the real environment. What is set to nothing is not set.
fn environment() -> Result<Vec<Setting>, String> {
    let mut settings = Vec::new();
    for name in VARIABLES.map(str::to_string) {
        let place = "environment".to_string();
        let value = env::var_os(&name).unwrap_or_default().into_string();
        let value = value.map_err(|_| format!("{place}: {name} is not UTF-8 text"))?;
        if !value.is_empty() {
            settings.push(Setting { place, name, value });
        }
    }
    Ok(settings)
}

/// Whether every mote can present this word: the firmware keeps so many bytes of it.
fn is_mote_token(value: &str) -> bool {
    let separates = |c: char| c.is_whitespace() || c == '&';
    value.len() <= MOTE_TOKEN_MAX && !value.contains(separates)
}

/// Whether a bot's token can be put behind this. Without a path it would become part of the host. What
/// may be a secret itself, a token or a password, is refused: every message about a call holds the url.
fn is_https_url(text: &str) -> bool {
    let uri = Uri::try_from(text).unwrap_or_default();
    let authority = uri.authority().map_or("", |authority| authority.as_str());
    let host = uri.host().unwrap_or_default();
    let has_port = uri.port_u16().is_some_and(|port| port > 0);
    let is_host = !host.is_empty() && (has_port || authority.ends_with(host)); // no `host:`, no `host:0`
    let has_path = uri.path().len() > 1 && !text.contains(['?', '#']);
    let has_secret = authority.contains('@') || uri.path().contains(':');
    uri.scheme_str() == Some("https") && is_host && has_path && !has_secret
}

/// Whether an address is that of one host, without a zone. From a wildcard socket an answer may leave
/// from another address than the mote asked, and gcoap drops it.
fn is_one_address(ip: IpAddr) -> bool {
    let ip = ip.to_canonical();
    let is_unclear = match ip {
        IpAddr::V4(ip) => ip.is_broadcast(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    !is_unclear && !ip.is_unspecified() && !ip.is_multicast()
}

/// Reads PEM roots. One that rustls cannot use does not count: without any, each call would fail.
fn read_roots(file: &str) -> Result<RootCerts, String> {
    let pem = fs::read(file).map_err(|error| format!("cannot be read: {file}: {error}"))?;
    let pem = without_mark(&pem);
    let mut certificates = Vec::new();
    for item in ureq::tls::parse_pem(pem) {
        if let Ok(PemItem::Certificate(certificate)) = item
            && RootCertStore::empty().add(certificate.der().into()).is_ok()
        {
            certificates.push(certificate);
        }
    }
    if certificates.is_empty() {
        return Err(format!("holds no certificate: {file}"));
    }
    Ok(RootCerts::new_with_certs(&certificates))
}

/// Reads a proxy; none if it cannot be used exactly as it stands there.
fn read_proxy(value: &str) -> Option<ureq::Proxy> {
    let uri = Uri::try_from(value).ok()?;
    let has_host = uri.host().is_some_and(|host| !host.is_empty());
    let has_port = uri.port_u16().is_some_and(|port| port > 0);
    let is_whole = matches!(uri.path(), "" | "/") && uri.query().is_none();
    if uri.scheme_str() != Some("http") || !has_host || !has_port || !is_whole {
        return None;
    }
    ureq::Proxy::new(value).ok()
}

// ---------- Log, heartbeat, systemd ----------
//
// What the operator hears of the program.

/// How many bytes `coap_server.log` may have before it becomes `coap_server.log.1`.
const LOG_MAX: u64 = 1 << 20;
/// How often the log says that the program is alive.
const HEARTBEAT: Duration = Duration::from_secs(15 * 60);

/// What the heartbeat tells, which has a thread of its own.
static FORWARDED: AtomicU64 = AtomicU64::new(0);
static FAILURES: AtomicU64 = AtomicU64::new(0);
static USERS: AtomicU64 = AtomicU64::new(0);

/// Writes to a file, and to the console as simple_logger does, whose `println!` would panic once nobody
/// reads it.
struct Log {
    /// Says what is logged: this program's records, for the libraries' hold URLs, and so the token.
    filter: SimpleLogger,
    file: Option<PathBuf>,
}

/// Starts the log; to the console alone if there is no file or if it cannot be written.
fn start_log(level: LevelFilter, file: Option<PathBuf>) -> Result<(), String> {
    let silent = SimpleLogger::new().with_level(LevelFilter::Off);
    let filter = silent.with_module_level("coap_websocket", level);
    let log = Log { filter, file };
    let probe = log.append("");
    let name = log.file.clone().unwrap_or_default();
    log::set_max_level(level);
    log::set_boxed_logger(Box::new(log)).map_err(|error| error.to_string())?;
    if let Err(error) = probe {
        let name = name.display();
        warn!("cannot write {name}, so the log goes to the console alone: {error}");
    }
    Ok(())
}

impl Log {
    fn append(&self, line: &str) -> io::Result<()> {
        let Some(path) = &self.file else {
            return Ok(());
        };
        let mut options = OpenOptions::new();
        options.append(true).create(true);
        let mut file = options.open(path)?;
        let mut length = file.metadata()?.len();
        if length + line.len() as u64 > LOG_MAX {
            let moved = fs::rename(path, beside(path, ".1"));
            moved.or_else(|_| file.set_len(0))?;
            file = options.open(path)?;
            length = 0;
        }
        let written = file.write_all(line.as_bytes());
        if written.is_err() {
            file.set_len(length)?; // a full disk leaves no half of a line
        }
        written
    }
}

impl log::Log for Log {
    fn enabled(&self, metadata: &log::Metadata) -> bool {
        self.filter.enabled(metadata)
    }

    fn log(&self, record: &log::Record) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let level = record.level();
        let text = escape(&record.args().to_string());
        let priority = journal_priority(level);
        let console = format!("{priority}{level:<5} [{}] {text}\n", record.target());
        let _ = io::stdout().write_all(console.as_bytes());
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let time = utc(now.unwrap_or_default().as_secs());
        let _ = self.append(&format!("{time} [{level}] {text}\n"));
    }

    fn flush(&self) {}
}

/// Returns what tells the journal the priority of a line, sd-daemon(3); nothing if the console is not
/// the journal. A terminal may have inherited JOURNAL_STREAM.
fn journal_priority(level: Level) -> &'static str {
    // This asks stderr, for stdout and stderr of the service both go to the journal.
    let is_journal = env::var_os("JOURNAL_STREAM").is_some() && !io::stderr().is_terminal();
    match level {
        _ if !is_journal => "",
        Level::Error => "<3>",
        Level::Warn => "<4>",
        _ => "<6>",
    }
}

/// Escapes what could forge a line or hide one.
fn escape(text: &str) -> String {
    let mut escaped = String::new();
    for c in text.chars() {
        // Separators of lines and paragraphs, and what turns the direction of the rest.
        let is_mark = matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if is_mark || c.is_control() {
            escaped.extend(c.escape_default());
        } else {
            escaped.push(c);
        }
    }
    escaped
}

/// Returns `2026-01-31 12:00:00` for Unix seconds: H. Hinnant's `civil_from_days`, with his names
/// (day of era, year of era, day of year, month from March on).
fn utc(seconds: u64) -> String {
    let days = seconds / 86_400 + 719_468;
    let era = days / 146_097;
    let doe = days % 146_097;
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let day = doy - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    let year = era * 400 + yoe + u64::from(month <= 2);
    let hour = seconds / 3600 % 24;
    let minute = seconds / 60 % 60;
    let second = seconds % 60;
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}")
}

fn heartbeat() {
    let start = Instant::now();
    loop {
        thread::sleep(HEARTBEAT);
        let minutes = start.elapsed().as_secs() / 60;
        info!(
            "Server is still running: up {} h {} min, {} messages forwarded, {} failures, \
            {} registered users",
            minutes / 60,
            minutes % 60,
            FORWARDED.load(Relaxed),
            FAILURES.load(Relaxed),
            USERS.load(Relaxed)
        );
    }
}

/// Tells systemd something, sd_notify(3). Without systemd it does nothing.
fn notify(message: &str) {
    let Ok(path) = env::var("NOTIFY_SOCKET") else {
        return;
    };
    let address = match path.strip_prefix('@') {
        Some(name) => UnixAddress::from_abstract_name(name),
        None => UnixAddress::from_pathname(&path),
    };
    if let (Ok(address), Ok(socket)) = (address, UnixDatagram::unbound()) {
        let _ = socket.set_nonblocking(true); // whoever does not read holds up nothing
        let _ = socket.send_to_addr(message.as_bytes(), &address);
    }
}

// ---------- `check` and `send` ----------
//
// What an operator calls by hand. `check` changes nothing; `send` is a mote for one message.

fn check_settings() -> Result<(), String> {
    start_log(LevelFilter::Warn, None)?;
    Config::load(&Folders::find(), environment()?)?;
    Ok(())
}

fn check() -> Result<(), String> {
    start_log(LevelFilter::Warn, None)?;
    let config = Config::load(&Folders::find(), environment()?)?;
    let token = config.required_token()?;
    let mut telegram = Telegram::new(&config);
    let deadline = Instant::now() + REQUEST_TIME;
    let fault = |failure: Failure| escape(&failure.reason);
    let bot = telegram.call(token, "getMe", &json!({}), deadline);
    let bot = bot.map_err(fault)?;
    let name = bot["first_name"].as_str().unwrap_or("?");
    let username = bot["username"].as_str().unwrap_or("?");
    print(&escape(&format!("bot: {name} (@{username})")))?;
    let saved = read_file(&config.state_path)?;
    print_users(&State::parse(&config.state_path, saved)?)?;
    print("chats with messages not fetched yet (for others see the log):")?;
    // Offset 1 confirms nothing. It differs from the gateway's, too: the same one again would be
    // delayed, see EMPTY_PAGE_HOLDS.
    let updates = telegram.get_updates(token, 1, PAGE_LIMIT, deadline);
    let mut printed = Vec::new();
    for update in updates.map_err(fault)? {
        if let Some(chat) = Chat::read(&update["message"]["chat"])
            && !printed.contains(&chat.id)
        {
            print(&escape(&format!("  {chat}")))?;
            printed.push(chat.id);
        }
    }
    Ok(())
}

/// Prints the registered users, and the line that names them to the firmware's build.
fn print_users(state: &State) -> Result<(), String> {
    print("registered users:")?;
    let mut chat_ids = Vec::new();
    for User { name, chat } in &state.users {
        print(&format!("  {chat} {name}"))?;
        chat_ids.push(format!("{name}:{chat}"));
    }
    if chat_ids.is_empty() {
        return print("  nobody: write to the bot, then run this again");
    }
    print("for the firmware's config.ini:")?;
    print(&format!("chat_ids = {}", chat_ids.join(",")))
}

/// Sends one `POST /message` as a mote sends it, and shows the answer.
fn send(chat: &str, text: &str, uri: Option<&str>) -> Result<(), String> {
    let config = Config::load(&Folders::find(), environment()?)?;
    let token = config.required_token()?;
    let token = &config.mote_token.as_ref().unwrap_or(token).0;
    let peer = match uri {
        Some(uri) => address_of(uri).ok_or_else(|| format!("cannot resolve {}", escape(uri)))?,
        None => config.listen,
    };
    let url = &config.url;
    let payload = format!("url={url}&token={token}&chat_ids={chat}&text={text}");
    let answer = match exchange(peer, &coap::post("message", &payload)) {
        Ok(Some(answer)) => answer,
        Ok(None) => return Err(format!("no answer from {peer}")),
        Err(error) => return Err(format!("cannot reach a gateway at {peer}: {error}")),
    };
    let code = answer.header.get_code();
    let text = String::from_utf8_lossy(&answer.payload).replace(token, "<token>"); // an answer may repeat it
    let text = escape(&text);
    if !code.starts_with('2') {
        return Err(format!("{code} {text} (the gateway's log tells why)"));
    }
    print(&format!("{code} {text}"))
}

/// Resolves a URI `coap://host[:port]`.
fn address_of(uri: &str) -> Option<SocketAddr> {
    let host = uri.strip_prefix("coap://")?.trim_end_matches('/');
    let with_port = format!("{host}:{}", coap::PORT);
    let found = host.to_socket_addrs();
    let found = found.or_else(|_| with_port.to_socket_addrs());
    found.ok()?.next()
}

/// Plays a client's side of one exchange, RFC 7252 §4.2. `None`: nobody answers.
fn exchange(peer: SocketAddr, request: &[u8]) -> io::Result<Option<Packet>> {
    let local = if peer.is_ipv4() { "0.0.0.0" } else { "::" };
    let socket = UdpSocket::bind((local, 0))?;
    socket.connect(peer)?;
    let mut timeout = coap::ACK_TIMEOUT;
    for _ in 0..=coap::MAX_RETRANSMIT {
        socket.send(request)?;
        match receive_packet(&socket, timeout)? {
            None => timeout *= 2,
            Some(reset) if reset.header.get_type() == MessageType::Reset => {
                return Err(ErrorKind::ConnectionReset.into());
            }
            // The gateway answers within 9 s, and repeats what gets lost.
            Some(empty) if empty.header.code == MessageClass::Empty => loop {
                match receive_packet(&socket, 2 * REQUEST_TIME)? {
                    Some(again) if again.header.code == MessageClass::Empty => {}
                    response => return Ok(response),
                }
            },
            response => return Ok(response),
        }
    }
    Ok(None)
}

/// Receives a packet and acknowledges it if it asks for that. `None`: nothing comes in time.
fn receive_packet(socket: &UdpSocket, timeout: Duration) -> io::Result<Option<Packet>> {
    socket.set_read_timeout(Some(timeout))?;
    let mut buffer = vec![0; coap::DATAGRAM_MAX];
    let length = match socket.recv(&mut buffer) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
        result => result?,
    };
    let packet = Packet::from_bytes(&buffer[..length]);
    let packet = packet.map_err(|error| io::Error::other(error.to_string()))?;
    if packet.header.get_type() == MessageType::Confirmable {
        let id = packet.header.message_id;
        socket.send(&coap::empty(MessageType::Acknowledgement, id))?;
    }
    Ok(Some(packet))
}

// ---------- The CoAP message layer ----------
//
// RFC 7252, and Block1 of RFC 7959. It is a module of its own, for what it keeps may only be changed
// by its own rules: bytes and a time go in, bytes come out; it sees no socket and no clock.

mod coap {
    use std::collections::VecDeque;
    use std::fmt;
    use std::hash::{BuildHasher as _, Hasher as _, RandomState};
    use std::net::SocketAddr;
    use std::time::{Duration, Instant};

    use coap_lite::option_value::{OptionValueU16, OptionValueU32};
    use coap_lite::{CoapOption, MessageClass, MessageType, Packet, RequestType, ResponseType};

    /// The default port of `coap:`. RFC 7252 §6.1.
    pub const PORT: u16 = 5683;

    /// Transmission parameters, RFC 7252 §4.8, and what follows from them, §4.8.2.
    pub const ACK_TIMEOUT: Duration = Duration::from_secs(2);
    pub const MAX_RETRANSMIT: u32 = 4;
    /// By how much a first timeout may be longer: ACK_RANDOM_FACTOR is 1.5.
    const ACK_RANDOM_MS: u64 = 1000;
    const ACK_TIMEOUT_MAX_S: u64 = 3;
    const MAX_TRANSMIT_SPAN_S: u64 = ACK_TIMEOUT_MAX_S * ((1 << MAX_RETRANSMIT) - 1);
    const MAX_LATENCY_S: u64 = 100;
    const PROCESSING_DELAY_S: u64 = 2;
    const EXCHANGE_LIFETIME_S: u64 = MAX_TRANSMIT_SPAN_S + 2 * MAX_LATENCY_S + PROCESSING_DELAY_S;
    pub const MAX_TRANSMIT_WAIT: Duration =
        Duration::from_secs(ACK_TIMEOUT_MAX_S * ((2 << MAX_RETRANSMIT) - 1));
    pub const NON_LIFETIME: Duration = Duration::from_secs(MAX_TRANSMIT_SPAN_S + MAX_LATENCY_S);
    pub const EXCHANGE_LIFETIME: Duration = Duration::from_secs(EXCHANGE_LIFETIME_S);

    /// The longest datagram: UDP carries no more.
    pub const DATAGRAM_MAX: usize = 1 << 16;
    /// The longest body in blocks, in bytes: 4,096 characters of 4 bytes, and the other fields.
    pub const BODY_MAX: usize = 17 << 10;
    /// How many messages each `Memory` holds: those of 1,000 motes that all send four in
    /// `EXCHANGE_LIFETIME`. Each takes about 50 bytes.
    pub const SEEN_MAX: usize = 4096;
    /// How many responses may wait for their ACK. Each has at most 320 bytes.
    pub const UNACKNOWLEDGED_MAX: usize = 1024;
    /// How many bytes all unfinished bodies may take, and how long one waits for its next block.
    pub const ASSEMBLIES_MAX: usize = 512 << 10;
    pub const ASSEMBLY_LIFETIME: Duration = Duration::from_secs(60);
    /// About how much memory a body takes beside its bytes, at most.
    const BODY_OVERHEAD: usize = 256;

    /// Content formats, RFC 7252 §12.3.
    pub const TEXT_PLAIN: u16 = 0;
    pub const LINK_FORMAT: u16 = 40;
    /// RFC 9175 §3.
    const REQUEST_TAG: CoapOption = CoapOption::Unknown(292);
    /// The bit of a block option that says that more blocks follow. RFC 7959 §2.2.
    const MORE: u32 = 8;

    /// Random enough for message IDs and timeouts.
    fn random() -> u64 {
        RandomState::new().build_hasher().finish()
    }

    // ----- Requests -----

    /// The value of a block option. RFC 7959 §2.2.
    #[derive(Clone, Copy)]
    pub struct Block {
        pub number: usize,
        has_more: bool,
        size: usize,
    }

    /// A request on which nobody has acted yet.
    pub struct Request {
        pub peer: SocketAddr,
        pub received_at: Instant,
        pub packet: Packet,
        /// Stands for the peer and the whole datagram: restarted motes use message IDs again.
        digest: u64,
    }

    /// Shows what the log says. A path that is none of ours is not shown, for it may hold a token.
    impl fmt::Display for Request {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            let method = match self.packet.header.code {
                MessageClass::Request(method) => format!("{method:?}").to_ascii_uppercase(),
                _ => "?".to_string(),
            };
            match self.path().as_str() {
                path @ ("message" | "update" | ".well-known/core") => write!(f, "{method} /{path}"),
                _ => write!(f, "{method} of another path"),
            }
        }
    }

    impl Request {
        fn is_confirmable(&self) -> bool {
            self.packet.header.get_type() == MessageType::Confirmable
        }

        fn values(&self, option: CoapOption) -> impl Iterator<Item = &Vec<u8>> {
            self.packet.get_option(option).into_iter().flatten()
        }

        /// Returns the path with `/` between segments, and `%2F` for one inside. RFC 7252 §6.5.
        pub fn path(&self) -> String {
            let mut path = Vec::new();
            for segment in self.values(CoapOption::UriPath) {
                path.push(String::from_utf8_lossy(segment).replace('/', "%2F"));
            }
            path.join("/")
        }

        /// Returns the first value of Content-Format or Accept. None if it is longer than its
        /// format allows: an elective option is then ignored (§5.4.3), and a critical one was
        /// refused by `check_options`.
        pub fn uint(&self, option: CoapOption) -> Option<u16> {
            let value = self.packet.get_first_option_as::<OptionValueU16>(option)?;
            value.ok().map(|value| value.0)
        }

        fn block_value(&self, option: CoapOption) -> Option<u32> {
            let value = self.packet.get_first_option_as::<OptionValueU32>(option)?;
            let value = value.ok()?.0;
            (value >> 24 == 0).then_some(value) // longer ones are refused, but `encode` asks again
        }

        /// Returns Block1 or Block2, if the request has it. `Err` refuses the reserved size.
        pub fn block(&self, option: CoapOption) -> Result<Option<Block>, Response> {
            let Some(value) = self.block_value(option) else {
                return Ok(None);
            };
            if value & 7 == 7 {
                return Err(Response::bad_request("Reserved block size"));
            }
            Ok(Some(Block {
                number: value as usize >> 4,
                has_more: value & MORE != 0,
                size: 16 << (value & 7),
            }))
        }

        /// Refuses critical options that are unknown, of a wrong length, or repeated though they
        /// must be single. RFC 7252 §5.4.
        pub fn check_options(&self) -> Result<(), Response> {
            for (&number, values) in self.packet.options() {
                let (lengths, is_repeatable) = match CoapOption::from(number) {
                    CoapOption::UriHost => (1..=255, false),
                    CoapOption::UriPort | CoapOption::Accept => (0..=2, false),
                    CoapOption::UriPath | CoapOption::UriQuery => (0..=255, true),
                    CoapOption::Block1 | CoapOption::Block2 => (0..=3, false),
                    CoapOption::ProxyUri | CoapOption::ProxyScheme => {
                        let code = ResponseType::ProxyingNotSupported;
                        return Err(Response::error(code, "This is no proxy"));
                    }
                    _ if number % 2 == 0 => continue, // elective
                    _ => return Err(bad_option(number, "not supported")),
                };
                let is_valid = values.iter().all(|value| lengths.contains(&value.len()));
                if !is_valid || (values.len() > 1 && !is_repeatable) {
                    return Err(bad_option(number, "malformed"));
                }
            }
            Ok(())
        }
    }

    fn bad_option(number: u16, fault: &str) -> Response {
        let reason = format!("Option {number} is {fault}");
        Response::error(ResponseType::BadOption, &reason)
    }

    // ----- Responses -----

    /// A response. Its type, message ID and token come from the exchange.
    #[derive(Default)]
    pub struct Response {
        packet: Packet,
        /// What `Event::Acknowledged` brings back for it: the version that a mote is told.
        pub ticket: Option<u64>,
        /// What the log says about it.
        pub detail: String,
    }

    impl Response {
        pub fn new(code: ResponseType) -> Response {
            let mut response = Response::default();
            response.packet.header.code = MessageClass::Response(code);
            response
        }

        /// An error with a diagnostic payload, RFC 7252 §5.5.2. `encode` drops it outside an ACK.
        pub fn error(code: ResponseType, reason: &str) -> Response {
            let mut response = Response::new(code);
            response.packet.payload = reason.as_bytes().to_vec();
            response.detail = reason.to_string();
            response
        }

        pub fn bad_request(reason: &str) -> Response {
            Response::error(ResponseType::BadRequest, reason)
        }

        pub fn content(code: ResponseType, format: u16, payload: &str) -> Response {
            let mut response = Response::new(code);
            let packet = &mut response.packet;
            packet.add_option_as(CoapOption::ContentFormat, OptionValueU16(format));
            packet.payload = payload.as_bytes().to_vec();
            response
        }

        pub fn text(code: ResponseType, payload: &str) -> Response {
            Response::content(code, TEXT_PLAIN, payload)
        }

        pub fn is(&self, code: ResponseType) -> bool {
            self.code() == MessageClass::Response(code)
        }

        /// Shown as in `2.05`.
        pub fn code(&self) -> MessageClass {
            self.packet.header.code
        }
    }

    // ----- Exchanges -----

    /// What a datagram turned out to be.
    pub enum Event {
        /// It is answered with a reset or as its first copy was, or (no bytes) with silence.
        Send(Vec<u8>),
        Request(Request),
        /// The mote has acknowledged the separate response with this ticket.
        Acknowledged(u64),
    }

    /// A message that must not be acted on twice. RFC 7252 §4.5.
    struct Seen {
        digest: u64,
        expires: Instant,
        /// What a duplicate is answered with; a NON with nothing.
        reply: Vec<u8>,
    }

    /// Messages that must not be acted on twice, in the order in which they came.
    #[derive(Default)]
    struct Memory(VecDeque<Seen>);

    impl Memory {
        fn find(&self, digest: u64, now: Instant) -> Option<&Seen> {
            let mut all = self.0.iter();
            all.find(|seen| seen.digest == digest && now < seen.expires)
        }

        fn remember(&mut self, request: &Request, reply: &[u8]) {
            let now = request.received_at;
            let has_expired = |seen: &Seen| seen.expires <= now;
            while self.0.len() >= SEEN_MAX || self.0.front().is_some_and(has_expired) {
                self.0.pop_front();
            }
            let lifetime = match request.is_confirmable() {
                true => EXCHANGE_LIFETIME,
                false => NON_LIFETIME,
            };
            self.0.push_back(Seen {
                digest: request.digest,
                expires: now + lifetime,
                reply: reply.to_vec(),
            });
        }
    }

    /// A separate CON response without its ACK. RFC 7252 §4.2.
    struct Unacknowledged {
        peer: SocketAddr,
        message_id: u16,
        bytes: Vec<u8>,
        retransmitted: u32,
        timeout: Duration,
        due: Instant,
        ticket: Option<u64>,
    }

    /// What has come of a request in blocks. RFC 7959 §2.5.
    struct Assembly {
        /// Stands for peer, path and Request-Tag, which tell bodies apart. RFC 9175 §3.3.
        key: u64,
        body: Vec<u8>,
        /// The datagram that brought the last block, and when that or a copy of it came.
        digest: u64,
        touched: Instant,
    }

    /// Everything about message types, message IDs and time.
    #[derive(Default)]
    pub struct Exchanges {
        last_message_id: u16,
        hasher: RandomState,
        /// Requests that were promised a response: they held an acceptable token.
        begun: Memory,
        /// Blocks that were answered at once: 2.31, or a refusal that ended their body. Apart from `begun`,
        /// so that they cannot push anything out of it: anybody can send many, for the bot's token is
        /// looked for in a whole body only.
        blocks: Memory,
        /// The oldest comes first.
        unacknowledged: VecDeque<Unacknowledged>,
        assemblies: Vec<Assembly>,
    }

    impl Exchanges {
        pub fn new() -> Exchanges {
            Exchanges {
                last_message_id: random() as u16,
                ..Exchanges::default()
            }
        }

        /// Says what a datagram is. It remembers nothing: `promise` does, and `respond_now` a block. Any
        /// other request that was answered at once has done nothing: a duplicate is judged again.
        pub fn receive(&mut self, now: Instant, peer: SocketAddr, datagram: &[u8]) -> Event {
            if peer.ip().is_unspecified() {
                return Event::Send(Vec::new()); // the firmware, before it has an address
            }
            let packet = match parse(datagram) {
                Ok(packet) => packet,
                Err(reset) => return Event::Send(reset),
            };
            let kind = packet.header.get_type();
            if matches!(kind, MessageType::Acknowledgement | MessageType::Reset) {
                let ticket = self.close(peer, packet.header.message_id);
                return match (kind, ticket) {
                    (MessageType::Acknowledgement, Some(ticket)) => Event::Acknowledged(ticket),
                    _ => Event::Send(Vec::new()),
                };
            }
            let digest = self.hasher.hash_one((peer, datagram));
            let begun = self.begun.find(digest, now);
            if let Some(first) = begun.or_else(|| self.blocks.find(digest, now)) {
                // Whoever repeats a block still waits for its answer, and has not abandoned the body.
                let mut all = self.assemblies.iter_mut();
                if let Some(assembly) = all.find(|assembly| assembly.digest == digest) {
                    assembly.touched = now;
                }
                return Event::Send(first.reply.clone());
            }
            Event::Request(Request {
                peer,
                received_at: now,
                packet,
                digest,
            })
        }

        /// Ends the retransmission of a response, and returns its ticket.
        fn close(&mut self, peer: SocketAddr, id: u16) -> Option<u64> {
            let is_meant = |open: &Unacknowledged| open.peer == peer && open.message_id == id;
            let index = self.unacknowledged.iter().position(is_meant)?;
            self.unacknowledged.remove(index)?.ticket
        }

        /// Promises a separate response: an empty ACK for a CON, silence for a NON.
        pub fn promise(&mut self, request: &Request) -> Vec<u8> {
            let id = request.packet.header.message_id;
            let mut reply = Vec::new();
            if request.is_confirmable() {
                reply = empty(MessageType::Acknowledgement, id);
            }
            self.begun.remember(request, &reply);
            reply
        }

        /// Answers at once: a CON with a piggybacked response, a NON with a NON. RFC 7252 §5.2.
        pub fn respond_now(&mut self, request: &Request, response: &Response) -> Vec<u8> {
            let mut reply = Vec::new();
            if request.is_confirmable() {
                let kind = MessageType::Acknowledgement;
                reply = encode(kind, request.packet.header.message_id, request, response);
            }
            if request.block_value(CoapOption::Block1).is_some() {
                self.blocks.remember(request, &reply);
            }
            // RFC 7252 §5.4.1: a NON with a bad option gets silence.
            if request.is_confirmable() || response.is(ResponseType::BadOption) {
                return reply;
            }
            let id = self.next_message_id();
            encode(MessageType::NonConfirmable, id, request, response)
        }

        /// Answers with a separate response, as it was promised. RFC 7252 §5.2.2.
        pub fn respond(&mut self, now: Instant, request: &Request, response: &Response) -> Vec<u8> {
            let message_id = self.next_message_id();
            if !request.is_confirmable() {
                return encode(MessageType::NonConfirmable, message_id, request, response);
            }
            let bytes = encode(MessageType::Confirmable, message_id, request, response);
            if self.unacknowledged.len() >= UNACKNOWLEDGED_MAX {
                self.unacknowledged.pop_front();
            }
            let timeout = ACK_TIMEOUT + Duration::from_millis(random() % (1 + ACK_RANDOM_MS));
            self.unacknowledged.push_back(Unacknowledged {
                peer: request.peer,
                message_id,
                bytes: bytes.clone(),
                retransmitted: 0,
                timeout,
                due: now + timeout,
                ticket: response.ticket,
            });
            bytes
        }

        /// Returns what is to be sent again now, and gives up what was sent often enough.
        pub fn retransmissions(&mut self, now: Instant) -> Vec<(SocketAddr, Vec<u8>)> {
            self.unacknowledged
                .retain(|open| now < open.due || open.retransmitted < MAX_RETRANSMIT);
            let mut again = Vec::new();
            for open in &mut self.unacknowledged {
                if open.due <= now {
                    again.push((open.peer, open.bytes.clone()));
                    open.retransmitted += 1;
                    open.timeout *= 2;
                    open.due = now + open.timeout;
                }
            }
            again
        }

        pub fn next_due(&self) -> Option<Instant> {
            self.unacknowledged.iter().map(|open| open.due).min()
        }

        fn next_message_id(&mut self) -> u16 {
            self.last_message_id = self.last_message_id.wrapping_add(1);
            self.last_message_id
        }

        // ----- Block1 -----

        /// Returns whether the request has its whole body now. `Err` refuses the block.
        pub fn assemble(&mut self, request: &mut Request) -> Result<bool, Response> {
            let now = request.received_at;
            self.assemblies
                .retain(|assembly| now < assembly.touched + ASSEMBLY_LIFETIME);
            let Some(block) = request.block(CoapOption::Block1)? else {
                return Ok(true);
            };
            let length = request.packet.payload.len();
            if length > block.size || (block.has_more && length < block.size) {
                return Err(Response::bad_request("A block is not of its size"));
            }
            if block.number == 0 && !block.has_more {
                return Ok(true); // a body of its own, whatever else is unfinished
            }
            let tags: Vec<&Vec<u8>> = request.values(REQUEST_TAG).collect();
            let key = self.hasher.hash_one((request.peer, request.path(), tags));
            let mut body = self.body_before(key, block, &request.packet.payload)?;
            body.append(&mut request.packet.payload);
            if body.len() > BODY_MAX {
                return Err(too_large());
            }
            if !block.has_more {
                request.packet.payload = body;
                return Ok(true);
            }
            self.assemblies
                .retain(|other| other.key != key || other.body != body); // the same, if it was begun again
            self.assemblies.push(Assembly {
                key,
                body,
                digest: request.digest,
                touched: now,
            });
            self.make_room();
            Ok(false)
        }

        /// Takes out the body that a block continues, or begins one. Without Request-Tag a client may send
        /// two bodies at once. A block that fits behind both could belong to either: both are kept, and
        /// it is refused until one of them has gone.
        fn body_before(
            &mut self,
            key: u64,
            block: Block,
            payload: &[u8],
        ) -> Result<Vec<u8>, Response> {
            if block.number == 0 {
                return Ok(Vec::new());
            }
            let length = block.number * block.size;
            let fits = |known: &Assembly| {
                // The block may be in it already, and come again in a new message.
                let is_repeated = known.body.get(length..) == Some(payload);
                known.key == key && (known.body.len() == length || is_repeated)
            };
            let fitting = self.assemblies.iter().filter(|known| fits(known));
            let mut bodies: Vec<&[u8]> = fitting.map(|known| &known.body[..length]).collect();
            bodies.dedup();
            let reason = match bodies[..] {
                [body] => {
                    let body = body.to_vec();
                    self.assemblies.retain(|known| !fits(known));
                    return Ok(body);
                }
                [] => "A block before it is missing",
                _ => "Two bodies at once: send one after the other, or with Request-Tag",
            };
            let code = ResponseType::RequestEntityIncomplete;
            Err(Response::error(code, reason))
        }

        /// Gives up what has waited longest, and all with its key: its next block might fit one of them.
        fn make_room(&mut self) {
            let size = |known: &Assembly| BODY_OVERHEAD + known.body.len();
            self.assemblies.sort_by_key(|assembly| assembly.touched);
            while self.assemblies.iter().map(size).sum::<usize>() > ASSEMBLIES_MAX {
                let oldest = self.assemblies[0].key;
                self.assemblies.retain(|other| other.key != oldest);
            }
        }
    }

    fn too_large() -> Response {
        let code = ResponseType::RequestEntityTooLarge;
        let reason = format!("At most {} KiB", BODY_MAX >> 10);
        let mut response = Response::error(code, &reason);
        let size = OptionValueU32(BODY_MAX as u32);
        response.packet.add_option_as(CoapOption::Size1, size);
        response
    }

    // ----- Bytes -----

    /// Reads a message by RFC 7252 §3, §4.2 and §4.3. `Err` is the RST that a CON gets, empty for
    /// others. The codec is laxer than the RFC. What it reads must therefore be what it would write;
    /// this refuses a marker without a payload, among others.
    fn parse(datagram: &[u8]) -> Result<Packet, Vec<u8>> {
        let [first, code, high, low, ..] = *datagram else {
            return Err(Vec::new());
        };
        let version = first >> 6;
        let kind = first >> 4 & 3;
        let is_expected = match kind {
            0 | 1 => (1..32).contains(&code),      // a CON or NON is a request
            _ => code == 0 && datagram.len() == 4, // an ACK or RST is empty
        };
        if version == 1
            && is_expected
            && let Ok(packet) = Packet::from_bytes(datagram)
            && to_bytes(&packet) == datagram
        {
            return Ok(packet);
        }
        match (version, kind) {
            (1, 0) => Err(empty(MessageType::Reset, u16::from_be_bytes([high, low]))),
            _ => Err(Vec::new()),
        }
    }

    pub fn empty(kind: MessageType, message_id: u16) -> Vec<u8> {
        let mut packet = Packet::new();
        packet.header.code = MessageClass::Empty;
        packet.header.set_type(kind);
        packet.header.message_id = message_id;
        to_bytes(&packet)
    }

    /// Encodes a response. An error's payload goes in an ACK only: elsewhere the firmware takes it for
    /// settings.
    fn encode(kind: MessageType, id: u16, request: &Request, response: &Response) -> Vec<u8> {
        let mut packet = response.packet.clone();
        // RFC 7959 §2.3: a response to a block says which one. §2.2: the reserved size must not be sent.
        if let Some(block) = request.block_value(CoapOption::Block1)
            && block & 7 < 7
        {
            let goes_on = response.is(ResponseType::Continue);
            let more = if goes_on { MORE } else { 0 };
            let value = OptionValueU32(block & !MORE | more);
            packet.add_option_as(CoapOption::Block1, value);
        }
        let is_success = u8::from(response.code()) >> 5 == 2;
        if kind != MessageType::Acknowledgement && !is_success {
            packet.payload.clear();
        }
        packet.header.set_type(kind);
        packet.header.message_id = id;
        packet.set_token(request.packet.get_token().to_vec());
        to_bytes(&packet)
    }

    fn to_bytes(packet: &Packet) -> Vec<u8> {
        packet.to_bytes_unlimited().unwrap_or_default() // fails only over a size limit
    }

    /// Encodes a client's CON `POST`.
    pub fn post(path: &str, payload: &str) -> Vec<u8> {
        let [high, low, token @ ..] = random().to_be_bytes();
        let mut packet = Packet::new();
        packet.header.code = MessageClass::Request(RequestType::Post);
        packet.header.message_id = u16::from_be_bytes([high, low]);
        packet.set_token(token[..4].to_vec());
        packet.add_option(CoapOption::UriPath, path.as_bytes().to_vec());
        packet.payload = payload.as_bytes().to_vec();
        to_bytes(&packet)
    }
}

#[cfg(any(test, fuzzing))]
#[path = "tests/unit/fixtures.rs"]
mod fixtures;
#[cfg(any(test, fuzzing))]
#[path = "tests/unit/fuzz.rs"]
pub mod fuzz;
#[cfg(test)]
#[path = "tests/unit/mod.rs"]
mod tests;
