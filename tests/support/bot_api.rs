//! A stand-in for Telegram's Bot API: real TLS on loopback, the documented behaviour of the four methods that the
//! gateway uses, a record of everything that was asked, and every way to fail that a network has.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use std::{fs, thread};

use rustls::{ProtocolVersion, ServerConfig, ServerConnection, StreamOwned};
use serde_json::{Map, Value, json};

use super::certificates::{Authority, Certificate};
use super::{TOKEN, TempDir};

/// How one API call goes wrong. Hanging and closing happen *after* the call was carried out: the worst case, because
/// only the answer is lost.
#[derive(Clone, Debug)]
pub enum Fault {
    /// Carried out, never answered; the connection stays open.
    Hang,
    /// Carried out, answered that much later.
    Late(Duration),
    /// Carried out; the connection is closed instead of an answer.
    CloseUnanswered,
    /// Carried out and answered; then the connection is closed although it was promised to stay.
    CloseAnswered,
    /// Not carried out; this status and this body.
    Answer(u16, String),
    /// Not carried out; these bytes instead of HTTP.
    Bytes(Vec<u8>),
    /// Not carried out; an answer of that many bytes.
    Giant(usize),
    /// Carried out and answered, but one byte each time that this passed.
    Trickle(Duration),
}

impl Fault {
    /// An error in Telegram's form.
    pub fn error(status: u16, description: &str) -> Self {
        Self::Answer(status, error(status, description).1.to_string())
    }

    pub fn too_many_requests(retry_after: u64) -> Self {
        let body = json!({"ok": false, "error_code": 429,
            "description": format!("Too Many Requests: retry after {retry_after}"),
            "parameters": {"retry_after": retry_after}});
        Self::Answer(429, body.to_string())
    }

    pub fn conflict() -> Self {
        Self::error(
            409,
            "Conflict: terminated by other getUpdates request; make sure that only one bot instance is running",
        )
    }
}

/// Which calls a [`Fault`] hits: see [`every`] and [`next`].
pub struct When {
    method: String,
    chat: Option<String>,
    text: Option<String>,
    times: usize,
}

/// Every call of a method from now on; of any method if it is empty.
pub fn every(method: &str) -> When {
    next(usize::MAX, method)
}

/// The next `times` calls of a method; of any method if it is empty.
pub fn next(times: usize, method: &str) -> When {
    When {
        method: method.to_string(),
        chat: None,
        text: None,
        times,
    }
}

impl When {
    /// Only those for this chat.
    pub fn to(mut self, chat: impl ToString) -> Self {
        self.chat = Some(chat.to_string());
        self
    }

    /// Only those with this text.
    pub fn saying(mut self, text: &str) -> Self {
        self.text = Some(text.to_string());
        self
    }
}

/// How a connection goes wrong before there is any call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectionFault {
    /// Accepted, but no TLS handshake is answered.
    Hang,
    /// Closed in the TLS handshake.
    Close,
}

/// One call of an API method, recorded when it was read.
#[derive(Clone, Debug)]
pub struct Call {
    pub method: String,
    pub token: String,
    pub body: Value,
    pub at: Instant,
    /// Number of the connection that it came on, counted from 1.
    pub connection: usize,
    /// What it was (or would have been) answered with.
    pub status: u16,
}

/// One text that a chat received.
#[derive(Clone, Debug)]
pub struct Sent {
    pub chat: String,
    pub text: String,
    pub message_id: i64,
}

/// Everything that the stand-in has seen.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    pub calls: Vec<Call>,
    pub sent: Vec<Sent>,
    /// Chat and message id.
    pub deleted: Vec<(String, i64)>,
    pub connections: usize,
}

impl Seen {
    pub fn calls(&self, method: &str) -> Vec<Call> {
        self.calls
            .iter()
            .filter(|call| call.method == method)
            .cloned()
            .collect()
    }

    pub fn count(&self, method: &str) -> usize {
        self.calls
            .iter()
            .filter(|call| call.method == method)
            .count()
    }

    pub fn texts_to(&self, chat: impl ToString) -> Vec<String> {
        let chat = chat.to_string();
        self.sent
            .iter()
            .filter(|sent| sent.chat == chat)
            .map(|sent| sent.text.clone())
            .collect()
    }
}

struct State {
    seen: Seen,
    updates: VecDeque<Value>,
    next_update_id: i64,
    next_message_id: i64,
    /// `date` of what people write; now if none.
    date: Option<i64>,
    /// Kept from the last `getUpdates` that named it, as documented; empty means every kind.
    allowed_updates: Vec<String>,
    unknown: HashSet<String>,
    blocked: HashSet<String>,
    faults: Vec<(When, Fault)>,
    connection_faults: (usize, ConnectionFault),
    round_trip: Duration,
    config: Arc<ServerConfig>,
    open: HashMap<usize, TcpStream>,
    stopped: bool,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    token: String,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Sleeps, unless the stand-in is stopped meanwhile.
    fn pause(&self, time: Duration) {
        if !time.is_zero() {
            let _ = self
                .changed
                .wait_timeout_while(self.lock(), time, |state| !state.stopped);
        }
    }

    /// One network round trip.
    fn round_trip(&self) {
        let time = self.lock().round_trip;
        self.pause(time);
    }
}

/// Where and for whom a stand-in listens.
pub struct BotApiOptions {
    pub listen: SocketAddr,
    pub token: String,
    /// Further host names in its certificate.
    pub names: Vec<String>,
    /// Where the authority's certificate is written; a temporary file if none.
    pub ca_path: Option<PathBuf>,
}

impl Default for BotApiOptions {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            token: TOKEN.to_string(),
            names: Vec::new(),
            ca_path: None,
        }
    }
}

/// The running stand-in; it ends with the value.
pub struct BotApi {
    shared: Arc<Shared>,
    listener: Mutex<Option<JoinHandle<()>>>,
    address: SocketAddr,
    authority: Authority,
    names: Vec<String>,
    ca_path: PathBuf,
    /// Holds the certificate, unless it was wanted elsewhere.
    _directory: Option<TempDir>,
}

impl BotApi {
    pub fn start() -> Self {
        Self::with(BotApiOptions::default())
    }

    pub fn with(options: BotApiOptions) -> Self {
        let authority = Authority::new();
        let directory = options.ca_path.is_none().then(TempDir::new);
        let temporary = || directory.as_ref().unwrap().join("ca.pem");
        let ca_path = options.ca_path.unwrap_or_else(temporary);
        fs::write(&ca_path, &authority.pem)
            .unwrap_or_else(|error| panic!("write {}: {error}", ca_path.display()));
        let mut names = vec![
            "localhost".to_string(),
            "127.0.0.1".to_string(),
            "::1".to_string(),
        ];
        names.extend(options.names);
        let state = State {
            seen: Seen::default(),
            updates: VecDeque::new(),
            next_update_id: 700_000_001,
            next_message_id: 1,
            date: None,
            allowed_updates: Vec::new(),
            unknown: HashSet::new(),
            blocked: HashSet::new(),
            faults: Vec::new(),
            connection_faults: (0, ConnectionFault::Hang),
            round_trip: Duration::ZERO,
            config: authority.server_config(Certificate::Good, &names),
            open: HashMap::new(),
            stopped: false,
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            changed: Condvar::new(),
            token: options.token,
        });
        let listener = TcpListener::bind(options.listen)
            .unwrap_or_else(|error| panic!("cannot listen on {}: {error}", options.listen));
        let address = listener.local_addr().unwrap();
        let thread = accept(Arc::clone(&shared), listener);
        let listener = Mutex::new(Some(thread));
        Self {
            shared,
            listener,
            address,
            authority,
            names,
            ca_path,
            _directory: directory,
        }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The base url that a gateway is configured with.
    pub fn url(&self) -> String {
        format!("https://localhost:{}/bot", self.address.port())
    }

    pub fn token(&self) -> &str {
        &self.shared.token
    }

    /// PEM file with the authority's certificate.
    pub fn ca_path(&self) -> &PathBuf {
        &self.ca_path
    }

    // --- what people do ---

    /// Somebody writes to the bot in a private chat. Returns the message's id.
    pub fn person_writes(&self, chat: i64, first_name: &str, text: &str) -> i64 {
        self.push_message(chat, first_name, json!({ "text": text }))
    }

    /// A message in a private chat with other content than text: `{"photo": [...], "caption": "..."}`. Fields given
    /// here replace the usual ones.
    pub fn push_message(&self, chat: i64, first_name: &str, content: Value) -> i64 {
        let mut state = self.shared.lock();
        let message_id = state.message_id();
        let mut message = json!({
            "message_id": message_id,
            "from": {"id": chat, "is_bot": false, "first_name": first_name, "language_code": "en"},
            "chat": {"id": chat, "first_name": first_name, "type": "private"},
            "date": state.date.unwrap_or_else(now),
        });
        for (key, value) in content.as_object().expect("content is a JSON object") {
            message[key] = value.clone();
        }
        state.push(json!({ "message": message }));
        message_id
    }

    /// Any update; its `update_id` is added unless it brings one.
    pub fn push_update(&self, update: Value) {
        self.shared.lock().push(update);
    }

    /// `date` of what people write from now on (seconds of the Unix epoch).
    pub fn set_date(&self, date: i64) {
        self.shared.lock().date = Some(date);
    }

    /// Telegram goes on counting updates from here: after a quiet week it chooses any number.
    pub fn set_next_update_id(&self, id: i64) {
        self.shared.lock().next_update_id = id;
    }

    /// Updates that nobody has confirmed.
    pub fn waiting_updates(&self) -> usize {
        self.shared.lock().updates.len()
    }

    // --- what can go wrong ---

    /// Sending to this chat fails with 400 "chat not found"; every other chat is known.
    pub fn unknown_chat(&self, chat: impl ToString) {
        self.shared.lock().unknown.insert(chat.to_string());
    }

    /// Sending to this chat fails with 403 "bot was blocked by the user".
    pub fn block_chat(&self, chat: impl ToString) {
        self.shared.lock().blocked.insert(chat.to_string());
    }

    /// Calls go wrong: `api.fail(next(1, "sendMessage").to(5), Fault::Hang)`. The first fault that fits is taken.
    pub fn fail(&self, when: When, fault: Fault) {
        self.shared.lock().faults.push((when, fault));
    }

    /// The next connections go wrong.
    pub fn fail_connections(&self, times: usize, fault: ConnectionFault) {
        self.shared.lock().connection_faults = (times, fault);
    }

    /// No faults from now on (those under way stay).
    pub fn heal(&self) {
        let mut state = self.shared.lock();
        state.faults.clear();
        state.connection_faults.0 = 0;
    }

    /// Which certificate new connections see.
    pub fn show(&self, certificate: Certificate) {
        let config = self.authority.server_config(certificate, &self.names);
        self.shared.lock().config = config;
    }

    /// Emulates a distance: TCP's handshake, TLS's handshake, and each answer take this long each.
    pub fn set_round_trip(&self, time: Duration) {
        self.shared.lock().round_trip = time;
    }

    /// Closes every connection, as a server does with idle ones.
    pub fn close_connections(&self) {
        for stream in self.shared.lock().open.values() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Stops listening: connecting is refused until [`BotApi::accept_again`].
    pub fn refuse(&self) {
        let Some(thread) = self.listener.lock().unwrap().take() else {
            return;
        };
        self.shared.lock().stopped = true;
        self.shared.changed.notify_all();
        self.close_connections();
        let _ = TcpStream::connect(wake_address(self.address));
        let _ = thread.join();
    }

    /// Listens again on the same port, if it does not.
    pub fn accept_again(&self) {
        if self.listener.lock().unwrap().is_some() {
            return;
        }
        self.shared.lock().stopped = false;
        let listener = TcpListener::bind(self.address).expect("listen on the same port again");
        *self.listener.lock().unwrap() = Some(accept(Arc::clone(&self.shared), listener));
    }

    // --- what was seen ---

    pub fn seen(&self) -> Seen {
        self.shared.lock().seen.clone()
    }

    /// The calls after the first `known` ones.
    pub fn calls_after(&self, known: usize) -> Vec<Call> {
        self.shared.lock().seen.calls[known..].to_vec()
    }

    pub fn texts_to(&self, chat: impl ToString) -> Vec<String> {
        self.shared.lock().seen.texts_to(chat)
    }

    pub fn count(&self, method: &str) -> usize {
        self.shared.lock().seen.count(method)
    }

    /// Waits until something was seen; false after `limit`.
    pub fn wait_until(&self, limit: Duration, mut done: impl FnMut(&Seen) -> bool) -> bool {
        let state = self.shared.lock();
        let (state, _) = self
            .shared
            .changed
            .wait_timeout_while(state, limit, |state| !done(&state.seen))
            .unwrap();
        done(&state.seen)
    }

    /// Waits some seconds until something was seen; panics with what was expected and what was seen instead.
    #[track_caller]
    pub fn wait_for(&self, what: &str, done: impl FnMut(&Seen) -> bool) {
        assert!(
            self.wait_until(Duration::from_secs(10), done),
            "Telegram never saw: {what}\n{:#?}",
            self.seen()
        );
    }
}

impl Drop for BotApi {
    fn drop(&mut self) {
        self.refuse();
    }
}

fn now() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs() as i64
}

// --- Telegram's side of the calls ---

fn error(status: u16, description: &str) -> (u16, Value) {
    (
        status,
        json!({"ok": false, "error_code": status, "description": description}),
    )
}

fn success(result: Value) -> (u16, Value) {
    (200, json!({"ok": true, "result": result}))
}

/// A parameter as an integer, which may also come as text.
fn integer(parameters: &Map<String, Value>, name: &str) -> Option<i64> {
    let value = parameters.get(name)?;
    value.as_i64().or_else(|| value.as_str()?.parse().ok())
}

fn chat_of(parameters: &Map<String, Value>) -> Option<String> {
    match parameters.get("chat_id")? {
        Value::String(text) if !text.is_empty() => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

/// Digits, a colon and the secret part, as BotFather writes them.
fn well_formed(token: &str) -> bool {
    let secret_ok = |secret: &str| {
        secret.len() >= 30
            && secret
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b))
    };
    token
        .split_once(':')
        .is_some_and(|(id, secret)| id.parse::<u64>().is_ok() && secret_ok(secret))
}

impl State {
    fn message_id(&mut self) -> i64 {
        self.next_message_id += 1;
        self.next_message_id - 1
    }

    fn push(&mut self, mut update: Value) {
        let allowed =
            |kind: &String| self.allowed_updates.is_empty() || self.allowed_updates.contains(kind);
        let kinds = update.as_object().expect("an update is a JSON object");
        if !kinds.keys().any(|kind| kind == "update_id") {
            if !kinds.is_empty() && !kinds.keys().any(allowed) {
                return; // Telegram does not keep what nobody wants
            }
            update["update_id"] = json!(self.next_update_id);
            self.next_update_id += 1;
        }
        self.updates.push_back(update);
    }

    fn answer(
        &mut self,
        method: &str,
        token_ok: Option<bool>,
        parameters: &Map<String, Value>,
    ) -> (u16, Value) {
        match (token_ok, method) {
            (None, _) => error(404, "Not Found"),
            (Some(false), _) => error(401, "Unauthorized"),
            (_, "getMe") => success(
                json!({"id": 123_456_789, "is_bot": true, "first_name": "RIOT mote",
                "username": "riot_mote_bot", "can_join_groups": true, "can_read_all_group_messages": false,
                "supports_inline_queries": false}),
            ),
            (_, "getUpdates") => self.get_updates(parameters),
            (_, "sendMessage") => self.send_message(parameters),
            (_, "deleteMessage") => self.delete_message(parameters),
            _ => error(404, "Not Found"),
        }
    }

    fn get_updates(&mut self, parameters: &Map<String, Value>) -> (u16, Value) {
        if let Some(kinds) = parameters.get("allowed_updates") {
            let text = kinds.as_str().unwrap_or_default(); // in a query: JSON as text
            let kinds = serde_json::from_str(text).unwrap_or_else(|_| kinds.clone());
            let Ok(kinds) = serde_json::from_value(kinds) else {
                return error(400, "Bad Request: can't parse allowed updates JSON object");
            };
            self.allowed_updates = kinds;
        }
        let limit = integer(parameters, "limit").unwrap_or(100).clamp(1, 100) as usize;
        let offset = integer(parameters, "offset").unwrap_or(0);
        if offset < 0 {
            let keep = usize::try_from(-offset).unwrap();
            let forgotten = self.updates.len().saturating_sub(keep);
            self.updates.drain(..forgotten);
        } else if offset <= self.next_update_id + 10 {
            // The real server ignores an offset further in the future than that.
            self.updates
                .retain(|update| update["update_id"].as_i64().is_none_or(|id| id >= offset));
        }
        success(self.updates.iter().take(limit).cloned().collect())
    }

    fn send_message(&mut self, parameters: &Map<String, Value>) -> (u16, Value) {
        let Some(chat) = chat_of(parameters) else {
            return error(400, "Bad Request: chat_id is empty");
        };
        let text = parameters
            .get("text")
            .and_then(Value::as_str)
            .unwrap_or_default();
        if chat.parse::<i64>().is_err() && !chat.starts_with('@') || self.unknown.contains(&chat) {
            return error(400, "Bad Request: chat not found");
        }
        if self.blocked.contains(&chat) {
            return error(403, "Forbidden: bot was blocked by the user");
        }
        if text.trim().is_empty() {
            return error(400, "Bad Request: message text is empty");
        }
        if text.chars().count() > 4096 {
            return error(400, "Bad Request: message is too long");
        }
        let message_id = self.message_id();
        self.seen.sent.push(Sent {
            chat: chat.clone(),
            text: text.to_string(),
            message_id,
        });
        let chat = match chat.parse::<i64>() {
            Ok(id) => json!({"id": id, "type": "private", "first_name": "Somebody"}),
            Err(_) => {
                json!({"id": -1_001_234_567_890_i64, "type": "channel", "username": &chat[1..]})
            }
        };
        success(
            json!({"message_id": message_id, "chat": chat, "date": now(), "text": text.trim(),
            "from": {"id": 123_456_789, "is_bot": true, "first_name": "RIOT mote", "username": "riot_mote_bot"}}),
        )
    }

    fn delete_message(&mut self, parameters: &Map<String, Value>) -> (u16, Value) {
        match (chat_of(parameters), integer(parameters, "message_id")) {
            (None, _) => error(400, "Bad Request: chat_id is empty"),
            (Some(chat), _) if self.unknown.contains(&chat) => {
                error(400, "Bad Request: chat not found")
            }
            (Some(chat), Some(id)) if (1..self.next_message_id).contains(&id) => {
                self.seen.deleted.push((chat, id));
                success(json!(true))
            }
            _ => error(400, "Bad Request: message to delete not found"),
        }
    }

    /// The first fault planned for this call, counted down.
    fn fault(&mut self, method: &str, parameters: &Map<String, Value>) -> Option<Fault> {
        let chat = chat_of(parameters);
        let text = parameters.get("text").and_then(Value::as_str);
        let fits = |when: &When| {
            (when.method.is_empty() || when.method == method)
                && (when.chat.is_none() || when.chat == chat)
                && (when.text.is_none() || when.text.as_deref() == text)
        };
        let at = self.faults.iter().position(|(when, _)| fits(when))?;
        let (when, fault) = &mut self.faults[at];
        when.times = when
            .times
            .saturating_sub(usize::from(when.times != usize::MAX));
        let (spent, fault) = (when.times == 0, fault.clone());
        if spent {
            self.faults.remove(at);
        }
        Some(fault)
    }
}

// --- TLS and HTTP ---

/// Where to connect to, to wake a listener.
fn wake_address(address: SocketAddr) -> SocketAddr {
    let ip = match address {
        SocketAddr::V4(v4) if v4.ip().is_unspecified() => [127, 0, 0, 1].into(),
        SocketAddr::V6(v6) if v6.ip().is_unspecified() => std::net::Ipv6Addr::LOCALHOST.into(),
        other => other.ip(),
    };
    SocketAddr::new(ip, address.port())
}

/// Accepts on a thread until stopped; that thread ends after those of its connections.
fn accept(shared: Arc<Shared>, listener: TcpListener) -> JoinHandle<()> {
    thread::spawn(move || {
        let mut running: Vec<JoinHandle<()>> = Vec::new();
        while let Ok((stream, _)) = listener.accept() {
            running.retain(|thread| !thread.is_finished());
            let mut state = shared.lock();
            if state.stopped {
                break;
            }
            state.seen.connections += 1;
            let number = state.seen.connections;
            let Ok(copy) = stream.try_clone() else {
                continue;
            };
            state.open.insert(number, copy);
            drop(state);
            shared.changed.notify_all();
            let shared = Arc::clone(&shared);
            running.push(thread::spawn(move || {
                let _ = serve(&shared, &stream, number);
                let _ = stream.shutdown(Shutdown::Both);
                shared.lock().open.remove(&number);
            }));
        }
        drop(listener);
        for thread in running {
            let _ = thread.join();
        }
    })
}

/// One connection, until either side closes it.
fn serve(shared: &Shared, stream: &TcpStream, number: usize) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let (config, fault) = {
        let mut state = shared.lock();
        let (times, fault) = state.connection_faults;
        state.connection_faults.0 = times.saturating_sub(usize::from(times != usize::MAX));
        (Arc::clone(&state.config), (times > 0).then_some(fault))
    };
    match fault {
        Some(ConnectionFault::Hang) => return read_to_end(stream),
        Some(ConnectionFault::Close) => return { stream }.read(&mut [0; 1]).map(drop),
        None => {}
    }
    shared.round_trip(); // TCP
    let mut tls = handshake(shared, stream, config)?;
    let mut input = Vec::new();
    while let Some((path, body)) = read_request(&mut tls, &mut input)? {
        if !answer_request(shared, &mut tls, number, &path, &body)? {
            break;
        }
    }
    Ok(())
}

fn read_to_end(mut stream: &TcpStream) -> io::Result<()> {
    while stream.read(&mut [0; 4096])? > 0 {}
    Ok(())
}

type Tls<'a> = StreamOwned<ServerConnection, &'a TcpStream>;

/// The TLS handshake, with a round trip before each flight of ours (one in TLS 1.3, two in TLS 1.2).
fn handshake<'a>(
    shared: &Shared,
    mut stream: &'a TcpStream,
    config: Arc<ServerConfig>,
) -> io::Result<Tls<'a>> {
    let mut tls = ServerConnection::new(config).map_err(io::Error::other)?;
    while tls.is_handshaking() {
        if tls.read_tls(&mut stream)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if let Err(error) = tls.process_new_packets() {
            let _ = tls.write_tls(&mut stream);
            return Err(io::Error::other(error));
        }
        if tls.wants_write()
            && (tls.is_handshaking() || tls.protocol_version() == Some(ProtocolVersion::TLSv1_2))
        {
            shared.round_trip();
        }
        while tls.wants_write() {
            tls.write_tls(&mut stream)?;
        }
    }
    Ok(StreamOwned::new(tls, stream))
}

/// Reads the next request: its target and its body. `input` holds what was read beyond the one before.
fn read_request(tls: &mut Tls<'_>, input: &mut Vec<u8>) -> io::Result<Option<(String, Vec<u8>)>> {
    let Some(head_end) = read_until(tls, input, |input| find(input, b"\r\n\r\n"))? else {
        return Ok(None);
    };
    let head = String::from_utf8_lossy(&input[..head_end]).into_owned();
    input.drain(..head_end + 4);
    let header = |name: &str| {
        let mut lines = head.lines().skip(1).filter_map(|line| line.split_once(':'));
        lines
            .find(|(key, _)| key.trim().eq_ignore_ascii_case(name))
            .map(|(_, value)| value.trim().to_string())
    };
    let mut body = Vec::new();
    if header("transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked")) {
        loop {
            let Some(end) = read_until(tls, input, |input| find(input, b"\r\n"))? else {
                return Ok(None);
            };
            let length =
                usize::from_str_radix(std::str::from_utf8(&input[..end]).unwrap_or("0"), 16)
                    .unwrap_or(0);
            let Some(_) = read_until(tls, input, |input| {
                (input.len() >= end + length + 4).then_some(0)
            })?
            else {
                return Ok(None);
            };
            body.extend_from_slice(&input[end + 2..end + 2 + length]);
            input.drain(..end + length + 4);
            if length == 0 {
                break;
            }
        }
    } else if let Some(length) =
        header("content-length").and_then(|value| value.parse::<usize>().ok())
    {
        if read_until(tls, input, |input| (input.len() >= length).then_some(0))?.is_none() {
            return Ok(None);
        }
        body = input.drain(..length).collect();
    }
    let target = head
        .split_whitespace()
        .nth(1)
        .unwrap_or_default()
        .to_string();
    Ok(Some((target, body)))
}

fn find(input: &[u8], what: &[u8]) -> Option<usize> {
    input.windows(what.len()).position(|window| window == what)
}

/// Reads until `done` finds something in the input; none if the connection ends before.
fn read_until(
    tls: &mut Tls<'_>,
    input: &mut Vec<u8>,
    done: impl Fn(&[u8]) -> Option<usize>,
) -> io::Result<Option<usize>> {
    let mut buffer = [0; 4096];
    loop {
        if let Some(found) = done(input) {
            return Ok(Some(found));
        }
        match tls.read(&mut buffer)? {
            0 => return Ok(None),
            length => input.extend_from_slice(&buffer[..length]),
        }
    }
}

/// Parameters from the query and from the body, JSON or form.
fn parameters(query: &str, body: &[u8]) -> Option<Map<String, Value>> {
    let mut parameters = form(query);
    match body.trim_ascii().first() {
        None => {}
        Some(b'{') => parameters.extend(serde_json::from_slice::<Map<String, Value>>(body).ok()?),
        Some(_) => parameters.extend(form(&String::from_utf8_lossy(body))),
    }
    Some(parameters)
}

fn form(text: &str) -> Map<String, Value> {
    let pairs = text.split('&').filter_map(|pair| pair.split_once('='));
    pairs
        .map(|(key, value)| (percent_decoded(key), Value::String(percent_decoded(value))))
        .collect()
}

fn percent_decoded(text: &str) -> String {
    let (mut bytes, mut rest) = (Vec::new(), text.as_bytes());
    while let [first, tail @ ..] = rest {
        let escaped = (*first == b'%').then(|| tail.get(..2)).flatten();
        let escaped = escaped
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok());
        bytes.push(escaped.unwrap_or(if *first == b'+' { b' ' } else { *first }));
        rest = if escaped.is_some() { &tail[2..] } else { tail };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Carries out one request and answers it; false if the connection ends with it.
fn answer_request(
    shared: &Shared,
    tls: &mut Tls<'_>,
    connection: usize,
    target: &str,
    body: &[u8],
) -> io::Result<bool> {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let (token, method) = path
        .strip_prefix("/bot")
        .and_then(|rest| rest.split_once('/'))
        .unwrap_or_default();
    let parameters = parameters(query, body);
    let (status, answer, fault) = {
        let mut state = shared.lock();
        let fault = parameters
            .as_ref()
            .and_then(|parameters| state.fault(method, parameters));
        let (status, answer) = match (&fault, &parameters) {
            (Some(Fault::Answer(status, body)), _) => (*status, body.clone()),
            (Some(Fault::Bytes(_) | Fault::Giant(_)), _) => (200, String::new()),
            (_, None) => {
                let (status, body) = error(400, "Bad Request: can't parse request parameters");
                (status, body.to_string())
            }
            (_, Some(parameters)) => {
                let token_ok = well_formed(token).then(|| token == shared.token);
                let (status, body) = state.answer(method, token_ok, parameters);
                (status, body.to_string())
            }
        };
        let (method, token) = (method.to_string(), token.to_string());
        let body = Value::Object(parameters.unwrap_or_default());
        state.seen.calls.push(Call {
            method,
            token,
            body,
            at: Instant::now(),
            connection,
            status,
        });
        (status, answer, fault)
    };
    shared.changed.notify_all();
    shared.round_trip();
    write_answer(shared, tls, status, &answer, fault)
}

fn write_answer(
    shared: &Shared,
    tls: &mut Tls<'_>,
    status: u16,
    body: &str,
    fault: Option<Fault>,
) -> io::Result<bool> {
    let response = http(status, body);
    match fault {
        Some(Fault::Hang) => {
            tls.sock.set_read_timeout(None)?;
            read_to_end(tls.sock)?;
            return Ok(false);
        }
        Some(Fault::CloseUnanswered) => return Ok(false),
        Some(Fault::Bytes(bytes)) => {
            tls.write_all(&bytes)?;
            tls.flush()?;
            return Ok(false);
        }
        Some(Fault::Giant(length)) => {
            tls.write_all(http(200, &"x".repeat(length)).as_bytes())?;
        }
        Some(Fault::Trickle(pause)) => {
            for byte in response.as_bytes() {
                tls.write_all(&[*byte])?;
                tls.flush()?;
                shared.pause(pause);
            }
        }
        Some(Fault::Late(time)) => {
            shared.pause(time);
            tls.write_all(response.as_bytes())?;
        }
        _ => tls.write_all(response.as_bytes())?,
    }
    tls.flush()?;
    if matches!(fault, Some(Fault::CloseAnswered)) {
        tls.conn.send_close_notify();
        tls.flush()?;
        return Ok(false);
    }
    Ok(true)
}

fn http(status: u16, body: &str) -> String {
    let reason = match status {
        200 => "OK",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        409 => "Conflict",
        429 => "Too Many Requests",
        500 => "Internal Server Error",
        _ => "Status",
    };
    format!(
        "HTTP/1.1 {status} {reason}\r\nServer: nginx/1.18.0\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\nConnection: keep-alive\r\n\r\n{body}",
        body.len()
    )
}
