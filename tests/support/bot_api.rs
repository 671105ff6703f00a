//! A stand-in for Telegram's Bot API: real TLS on loopback, the four methods that the gateway uses as the real server
//! carries them out (also what it does not like), a record of everything that was asked, and every way to fail that a
//! network has.

use std::collections::{HashMap, VecDeque};
use std::fs;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustls::ServerConfig;
use serde_json::{Map, Value, json};

use super::certificates::{Authority, Certificate};
use super::http::{Acceptor, accept};
use super::telegram::{
    Answer, CONFLICT_PAUSE, LongPoll, OTHER_POLL, Outcome, Pace, Polls, Refusal, now,
};
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
    /// Not carried out; a page of HTML with this status, as it comes from a proxy, a captive portal (which leads
    /// elsewhere with 302) or Telegram's front end (502).
    Page(u16),
    /// Not carried out; these bytes instead of HTTP.
    Bytes(Vec<u8>),
    /// Not carried out; an answer of that many bytes.
    Giant(usize),
    /// Carried out and answered, but one byte each time that this passed.
    Trickle(Duration),
    /// Carried out and answered, with the second text in place of the first.
    Replaced(&'static str, &'static str),
}

impl Fault {
    /// An error in Telegram's form.
    pub fn error(status: u16, description: &str) -> Self {
        Self::Answer(status, Answer::error(status, description).body)
    }

    pub fn too_many_requests(retry_after: u64) -> Self {
        Self::Answer(429, Answer::too_many_requests(retry_after).body)
    }

    /// Another instance of the bot: what it takes from this one's `getUpdates`.
    pub fn conflict() -> Self {
        Self::error(409, OTHER_POLL)
    }

    /// What is answered instead of carrying the call out; none if it is carried out.
    fn instead(&self) -> Option<Answer> {
        let (status, body) = match self {
            Self::Answer(status, body) => (*status, body.clone()),
            Self::Page(status) => (*status, "<html><h1>Please log in</h1></html>".to_string()),
            Self::Bytes(_) | Self::Giant(_) => (200, String::new()),
            _ => return None,
        };
        Some(Answer { status, body })
    }
}

/// Which calls a [`Fault`] hits: see [`every`] and [`next`].
pub struct When {
    pub(super) method: String,
    pub(super) chat: Option<String>,
    pub(super) text: Option<String>,
    pub(super) times: usize,
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
    /// The request line and the headers.
    pub head: String,
    /// What it was (or would have been) answered with.
    pub status: u16,
}

/// One text that a chat received.
#[derive(Clone, Debug)]
pub struct Sent {
    pub chat: String,
    pub text: String,
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

/// Everything that changes; its methods are in `telegram.rs`.
pub(super) struct State {
    pub token: String,
    pub seen: Seen,
    pub updates: VecDeque<Value>,
    pub next_update_id: i64,
    pub next_message_id: i64,
    /// `date` of what people write; now if none.
    date: Option<i64>,
    /// Kept from the last `getUpdates` that named it, as documented; empty means every kind.
    pub allowed_updates: Vec<String>,
    pub polls: Polls,
    pub refusals: HashMap<String, Refusal>,
    /// None: as fast as anybody likes.
    pub pace: Option<Pace>,
    pub faults: Vec<(When, Fault)>,
    pub connection_faults: (usize, ConnectionFault),
    round_trip: Duration,
    pub idle_limit: Duration,
    pub config: Arc<ServerConfig>,
    pub open: HashMap<usize, TcpStream>,
    pub stopped: bool,
}

pub(super) struct Shared {
    state: Mutex<State>,
    pub changed: Condvar,
}

impl Shared {
    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Sleeps, unless the stand-in is stopped meanwhile.
    pub fn pause(&self, time: Duration) {
        if !time.is_zero() {
            let _ = self
                .changed
                .wait_timeout_while(self.lock(), time, |state| !state.stopped);
        }
    }

    /// One network round trip.
    pub fn round_trip(&self) {
        let time = self.lock().round_trip;
        self.pause(time);
    }

    /// Carries out and records a call, and holds it as long as Telegram does.
    pub fn call(&self, request: Request) -> Reply {
        let mut state = self.lock();
        let Request {
            method,
            token,
            parameters,
            connection,
            head,
        } = request;
        let fault = parameters
            .as_ref()
            .and_then(|parameters| state.fault(&method, parameters));
        let instead = fault.as_ref().and_then(Fault::instead);
        let outcome = match (instead, &parameters) {
            (Some(answer), _) => Outcome::Answered(answer),
            (None, Some(parameters)) => state.carry_out(&method, &token, parameters),
            (None, None) => Outcome::Answered(Answer::error(
                400,
                "Bad Request: can't parse request parameters",
            )),
        };
        let number = state.seen.calls.len();
        state.seen.calls.push(Call {
            method,
            token,
            body: Value::Object(parameters.unwrap_or_default()),
            at: Instant::now(),
            connection,
            head,
            status: match &outcome {
                Outcome::Answered(answer) | Outcome::Delayed(answer) => answer.status,
                Outcome::Held(_) => 200, // unless it ends with a 409
            },
        });
        drop(state);
        self.changed.notify_all();
        let answer = self.wait(outcome);
        self.lock().seen.calls[number].status = answer.status;
        Reply { answer, fault }
    }

    fn wait(&self, outcome: Outcome) -> Answer {
        match outcome {
            Outcome::Answered(answer) => answer,
            Outcome::Delayed(answer) => {
                self.pause(CONFLICT_PAUSE);
                answer
            }
            Outcome::Held(poll) => {
                let ended = self.hold(&poll);
                self.wait(ended)
            }
        }
    }

    fn hold(&self, poll: &LongPoll) -> Outcome {
        let limit = poll.until.saturating_duration_since(Instant::now());
        let (mut state, _) = self
            .changed
            .wait_timeout_while(self.lock(), limit, |state| state.holds(poll))
            .unwrap();
        state.release(poll)
    }
}

/// One call, as it was read.
pub(super) struct Request {
    pub method: String,
    pub token: String,
    /// None if they cannot be understood.
    pub parameters: Option<Map<String, Value>>,
    pub connection: usize,
    pub head: String,
}

/// What is sent back, and how that goes wrong.
pub(super) struct Reply {
    pub answer: Answer,
    pub fault: Option<Fault>,
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
    acceptor: Mutex<Option<Acceptor>>,
    address: SocketAddr,
    token: String,
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
        let mut names = options.names;
        names.extend(["localhost", "127.0.0.1", "::1"].map(str::to_string));
        let state = State {
            token: options.token.clone(),
            seen: Seen::default(),
            updates: VecDeque::new(),
            next_update_id: 700_000_001,
            next_message_id: 1,
            date: None,
            allowed_updates: Vec::new(),
            polls: Polls::default(),
            refusals: HashMap::new(),
            pace: None,
            faults: Vec::new(),
            connection_faults: (0, ConnectionFault::Hang),
            round_trip: Duration::ZERO,
            idle_limit: Duration::from_secs(60),
            config: authority.server_config(Certificate::Good, &names),
            open: HashMap::new(),
            stopped: false,
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            changed: Condvar::new(),
        });
        let listener = TcpListener::bind(options.listen)
            .unwrap_or_else(|error| panic!("cannot listen on {}: {error}", options.listen));
        let address = listener.local_addr().unwrap();
        let acceptor = Mutex::new(Some(accept(Arc::clone(&shared), listener)));
        Self {
            shared,
            acceptor,
            address,
            token: options.token,
            authority,
            names,
            ca_path,
            _directory: directory,
        }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The base url that a gateway is configured with: by the first name that was asked for.
    pub fn url(&self) -> String {
        let host = self.names.first().expect("localhost at least");
        match self.address.port() {
            443 => format!("https://{host}/bot"),
            port => format!("https://{host}:{port}/bot"),
        }
    }

    pub fn token(&self) -> &str {
        &self.token
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
        drop(state);
        self.shared.changed.notify_all();
        message_id
    }

    /// Any update; its `update_id` is added unless it brings one.
    pub fn push_update(&self, update: Value) {
        self.shared.lock().push(update);
        self.shared.changed.notify_all();
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

    /// Sending to this chat fails from now on; without a reason, it works again.
    pub fn refuse_chat(&self, chat: impl ToString, reason: impl Into<Option<Refusal>>) {
        let mut state = self.shared.lock();
        match reason.into() {
            Some(reason) => state.refusals.insert(chat.to_string(), reason),
            None => state.refusals.remove(&chat.to_string()),
        };
    }

    /// Sending to this chat fails with 400 "chat not found"; every other chat is known.
    pub fn unknown_chat(&self, chat: impl ToString) {
        self.refuse_chat(chat, Refusal::NotFound);
    }

    /// Sending to this chat fails with 403 "bot was blocked by the user".
    pub fn block_chat(&self, chat: impl ToString) {
        self.refuse_chat(chat, Refusal::Blocked);
    }

    /// Somebody has set a webhook, or deleted it: with one, `getUpdates` is answered 409.
    pub fn set_webhook(&self, on: bool) {
        self.shared.lock().set_webhook(on);
        self.shared.changed.notify_all();
    }

    /// Whether texts that come too fast are refused with 429.
    pub fn set_pace(&self, on: bool) {
        self.shared.lock().pace = on.then(Pace::default);
    }

    /// Connections are closed after so long without a request: a minute, unless told otherwise before they open.
    pub fn close_idle_after(&self, time: Duration) {
        self.shared.lock().idle_limit = time;
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
        let Some(acceptor) = self.acceptor.lock().unwrap().take() else {
            return;
        };
        self.shared.lock().stopped = true;
        self.shared.changed.notify_all();
        self.close_connections();
        acceptor.stop();
    }

    /// Listens again on the same port, if it does not.
    pub fn accept_again(&self) {
        if self.acceptor.lock().unwrap().is_some() {
            return;
        }
        self.shared.lock().stopped = false;
        let listener = TcpListener::bind(self.address).expect("listen on the same port again");
        *self.acceptor.lock().unwrap() = Some(accept(Arc::clone(&self.shared), listener));
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
