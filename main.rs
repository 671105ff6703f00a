//! CoAP to Telegram gateway for RIOT-OS motes, which cannot speak TLS.
//!
//! ```text
//! mote ──CoAP/UDP──▶ this program ──HTTPS──▶ Telegram Bot API ──▶ people
//! ```
//!
//! * `POST /message`, payload `url=…&token=…&chat_ids=1,2&text=…`: one `sendMessage` for each chat.
//! * `POST /update`, payload `url=…&token=…`: `getUpdates`, answered with all that the mote should
//!   know, as `r123;i5;f1;Ada:123` (a removed user, interval, LED feedback, a user), unless it has
//!   acknowledged just that.
//! * `GET /.well-known/core`: RFC 6690.
//!
//! One thread owns everything ([`Gateway`]) and does one thing at a time: it receives a datagram,
//! sends the empty ACK, calls Telegram, sends the separate response, and only then writes to the
//! disk and to people. What comes meanwhile waits in the socket. When nothing waits, it retransmits
//! and fetches what people wrote. Another thread logs a heartbeat; a text to several chats has a
//! thread for each while it is sent.
//!
//! A datagram travels `run` → `receive` → `handle` → `deliver` or `update` → `settle`; what people
//! write travels `fetch` → `People::take` → `State::tokens`.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixDatagram};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use std::{env, fmt, mem, thread};

use coap::{Event, Exchanges, Request, Response};
use coap_lite::{MessageClass, MessageType, Packet, ResponseType};
use log::{LevelFilter, error, info, warn};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use simple_logger::SimpleLogger;
use ureq::config::IpFamily;
use ureq::tls::{PemItem, RootCerts, TlsConfig};
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{DefaultConnector, NextTimeout};

// ---------- Limits, each with its reason ----------

/// For a request: RIOT's nanocoap_sock waits 10 s after the empty ACK, so it is answered within 9 s.
const REQUEST_TIME: Duration = Duration::from_millis(8500);
/// The same while Telegram does not answer, so that all who wait are soon told.
const REQUEST_TIME_IN_A_HANG: Duration = Duration::from_secs(2);
/// For the gateway's own fetch, during which requests wait.
const FETCH_TIME: Duration = Duration::from_secs(5);
/// Between two fetches. Three connections take turns, so each is used every 45 s.
const FETCH_EVERY: Duration = Duration::from_secs(15);
/// After a failed fetch, and in a hang between two tries with all the time.
const FETCH_AFTER_FAILURE: Duration = Duration::from_secs(60);
/// tdlib/telegram-bot-api holds a `getUpdates` that repeats the offset of the one before for 3 s.
const FOUND_NOTHING_HOLDS: Duration = Duration::from_secs(3);
/// Telegram closes idle connections after about a minute, and a text that meets the closing is lost.
const IDLE_CONNECTION: Duration = Duration::from_secs(50);
/// For a connection over all addresses of the host, and for their look-up.
const CONNECT_TIME: Duration = Duration::from_secs(4);
/// How long the addresses of the host serve.
const ADDRESSES_HOLD: Duration = Duration::from_secs(60);
/// For a look-up while old addresses can serve.
const LOOK_UP_AGAIN_TIME: Duration = Duration::from_secs(1);
/// Of calls that surely did not reach Telegram, or came too early (429).
const ATTEMPTS: u32 = 3;
const ATTEMPT_PAUSE: Duration = Duration::from_millis(500);
/// Bot API server: pages of updates are cut beyond 4 MiB of JSON.
const PAGE_BYTES_MAX: u64 = 8 << 20;
/// Of any other answer: a `Message` of 4,096 characters, each `\uXXXX\uXXXX`.
const ANSWER_BYTES_MAX: u64 = 64 << 10;
/// Bot API, getUpdates: updates in one page.
const PAGE: usize = 100;
/// Characters of the reason of a failed call.
const REASON_MAX: usize = 300;
/// Bot API, sendMessage: characters of a text.
const TEXT_MAX: usize = 4096;
/// Firmware: users it keeps, and chats it can name.
const USERS_MAX: usize = 10;
/// Removed chats that are remembered.
const REMOVED_MAX: usize = 100;
/// Motes that are remembered.
const MOTES_MAX: usize = 64;
/// Then a mote is told everything again: it may have restarted unnoticed.
const ACKNOWLEDGED_HOLDS: Duration = Duration::from_secs(3600);
/// Firmware: its message IDs go up by 1 to 3, and some requests get lost.
const MESSAGE_ID_STEP_MAX: u16 = 64;
/// Firmware: bytes of a user's name.
const NAME_MAX: usize = 14;
/// Firmware: 11 characters of a chat id; it cuts longer ones.
const CHAT_ID_MAX: i64 = 99_999_999_999;
/// Firmware: bytes of a reply; a longer one is thrown away whole.
const REPLY_MAX: usize = 302;
/// Firmware: bytes of its token.
const MOTE_TOKEN_MAX: usize = 49;
/// Wrong passwords in a row, after which a chat's `config` is ignored for `LOCKED_OUT`.
const WRONG_PASSWORDS_MAX: u32 = 5;
const LOCKED_OUT: Duration = Duration::from_secs(3600);
/// Chats whose wrong passwords are counted.
const SUSPECTS_MAX: usize = 256;
/// Of `coap_server.log`, bytes; then it becomes `coap_server.log.1`.
const LOG_MAX: u64 = 1 << 20;
const HEARTBEAT: Duration = Duration::from_secs(15 * 60);
/// Longest sleep of the loop, which serves systemd's watchdog.
const TICK: Duration = Duration::from_secs(1);
/// More datagrams than the socket holds: no flood puts off for ever what is due.
const SOCKET_HOLDS: u32 = 1000;

/// Of a payload's fields.
const KEYS: [&str; 4] = ["&url=", "&token=", "&chat_ids=", "&text="];
const MESSAGES_SENT: &str = "Messages sent successfully";
const NO_UPDATES: &str = "No Updates";
const MISSING_FIELDS: &str = "Missing required fields";
const LINKS: &str = r#"</message>;rt="telegram.message";ct=0,</update>;rt="telegram.update";ct=0"#;
const HELP: &str = "I pass on what the sensors report.\n\
    remove me - no more messages\n\
    config <password> interval <1..120> - minutes between two reports\n\
    config <password> feedback <0|1> - LED feedback off or on\n\
    help - this text";
const REGISTERED: &str = "You are registered.";
const LIST_IS_FULL: &str = "The list is full: 10 people are registered already.";
const REMOVED: &str = "You are removed and get no more messages. Write anything to register again.";
const CONFIG_FORM: &str = "Allowed is: config <password> interval <1..120>, \
    or: config <password> feedback <0|1>. Nothing was changed.";
const USAGE: &str = "\
usage: coap_websocket                serve
       coap_websocket check          test the configuration and the way to Telegram
       coap_websocket send -i <chat-id> -m <message> [-u coap://[address]:port]
                                     send one message through a running gateway
       coap_websocket --help | --version";

// ---------- Arguments and configuration ----------

fn main() -> ExitCode {
    let words: Vec<_> = env::args_os().skip(1).collect();
    let words: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
    let words: Vec<&str> = words.iter().map(AsRef::as_ref).collect();
    let outcome = match words[..] {
        [] => serve(),
        ["check"] => check(),
        ["send", ref options @ ..] => {
            let after = |name: &str| options.iter().skip_while(move |word| **word != name).nth(1);
            match (after("-i"), after("-m"), after("-u"), options.len()) {
                (Some(chat), Some(text), None, 4) => send(chat, text, None),
                (Some(chat), Some(text), Some(uri), 6) if uri.starts_with("coap://") => {
                    send(chat, text, Some(uri))
                }
                _ => return usage(),
            }
        }
        ["--help" | "-h"] => say(USAGE),
        ["--version" | "-V"] => say(concat!("coap_websocket ", env!("CARGO_PKG_VERSION"))),
        _ => return usage(),
    };
    if let Err(reason) = outcome {
        let _ = writeln!(io::stderr(), "coap_websocket: {reason}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn usage() -> ExitCode {
    let _ = writeln!(io::stderr(), "{USAGE}");
    ExitCode::from(2)
}

/// `println!`, but a closed pipe is no reason to panic.
fn say(text: &str) -> Result<(), String> {
    let _ = writeln!(io::stdout(), "{text}");
    Ok(())
}

/// A token or a password. Without `Debug` and `Display` it cannot get into a log line by accident.
#[derive(Clone)]
struct Secret(String);

impl Secret {
    /// `<bot id>:<letters, digits, _ and ->`, so that it can stand in a URL as it is.
    fn is_bot_token(&self) -> bool {
        let (id, key) = self.0.split_once(':').unwrap_or_default();
        let is_id = (1..=20).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_digit());
        let fits = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-';
        is_id && (1..=100).contains(&key.len()) && key.bytes().all(fits)
    }

    /// The part of a bot token before the colon: the bot's user id, which is public.
    fn bot_id(&self) -> &str {
        self.0.split(':').next().unwrap_or_default()
    }

    /// Compares in a time that depends on the guess alone.
    fn is(&self, guess: &str) -> bool {
        let mut unlike = self.0.len() ^ guess.len();
        for (a, b) in guess.bytes().zip(self.0.bytes().cycle()) {
            unlike |= usize::from(a ^ b);
        }
        std::hint::black_box(unlike) == 0
    }
}

/// What the operator has set, checked.
struct Config {
    /// The only Bot API url that is served and connected to.
    url: String,
    /// `None`: `/message` serves any token, `/update` the first bot that Telegram accepts.
    token: Option<Secret>,
    /// What motes may present for `token`, so that it never crosses the mesh.
    mote_token: Option<Secret>,
    mote_token_origin: String,
    ip_family: IpFamily,
    /// `None`: every `config` is refused.
    password: Option<Secret>,
    listen: SocketAddr,
    roots: RootCerts,
    roots_origin: String,
    state_path: PathBuf,
}

impl Config {
    /// From `config.ini`, `.env` and the environment. An error names file, line and reason.
    fn load() -> Result<Config, String> {
        let mut config = Config {
            url: "https://api.telegram.org/bot".to_string(),
            token: None,
            mote_token: None,
            mote_token_origin: String::new(),
            ip_family: IpFamily::Any,
            password: None,
            listen: SocketAddr::new(Ipv6Addr::LOCALHOST.into(), coap::PORT),
            roots: RootCerts::WebPki,
            roots_origin: "Mozilla's, built in".to_string(),
            state_path: folder("STATE_DIRECTORY", "/var/lib").join("state.json"),
        };
        let (ini, dot_env) = (settings_file("config.ini"), settings_file(".env"));
        read_settings(&ini, &mut config, true)?;
        read_settings(&dot_env, &mut config, false)?;
        for name in "PASSWORD SSL_CERT_FILE COAP_SERVER_IP COAP_SERVER_PORT".split(' ') {
            let value = env::var(name).unwrap_or_default();
            if !value.is_empty() {
                config.set("environment", name, &value)?;
            }
        }
        if config.token.is_none() && config.mote_token.is_some() {
            let origin = config.mote_token_origin;
            return Err(format!("{origin}: mote_token without bot_token"));
        }
        if config.token.is_none() {
            warn!(
                "no bot_token is set in {}: /message serves any token, \
                /update the first bot that Telegram accepts",
                ini.display()
            );
        }
        if config.password.is_none() {
            let file = dot_env.display();
            warn!("no PASSWORD is set in {file}: every `config` is refused");
        }
        Ok(config)
    }

    /// An error does not repeat the value, for it may be a secret.
    fn set(&mut self, origin: &str, name: &str, value: &str) -> Result<(), String> {
        let fault = |rule: &str| format!("{origin}: {name} {rule}");
        let is_word = !value.contains(char::is_whitespace);
        let secret = Secret(value.to_string());
        match name {
            "bot_token" if value == "your_telegram_bot_token" => {}
            "bot_token" if secret.is_bot_token() => self.token = Some(secret),
            "bot_token" => return Err(fault("is not a bot token (digits, a colon, letters)")),
            "mote_token" if is_word && value.len() <= MOTE_TOKEN_MAX && !value.contains('&') => {
                self.mote_token = Some(secret);
                self.mote_token_origin = origin.to_string();
            }
            "mote_token" => return Err(fault("is not a word of at most 49 bytes without &")),
            "url" if is_https_url(value) => self.url = value.to_string(),
            "url" => return Err(fault("is not of the form https://host/bot")),
            "ip_family" if value == "any" => self.ip_family = IpFamily::Any,
            "ip_family" if value == "ipv4" => self.ip_family = IpFamily::Ipv4Only,
            "ip_family" if value == "ipv6" => self.ip_family = IpFamily::Ipv6Only,
            "ip_family" => return Err(fault("is none of any, ipv4, ipv6")),
            "PASSWORD" if is_word => self.password = Some(secret),
            "PASSWORD" => return Err(fault("holds white space, which nobody could send")),
            "COAP_SERVER_IP" => match value.parse() {
                Ok(ip) => self.listen.set_ip(ip),
                Err(_) => return Err(fault("is not an IP address (without a zone)")),
            },
            "COAP_SERVER_PORT" => match value.parse() {
                Ok(port) => self.listen.set_port(port),
                Err(_) => return Err(fault("is not a port (0 to 65535)")),
            },
            "SSL_CERT_FILE" => {
                self.roots = read_roots(value).map_err(|reason| fault(&reason))?;
                self.roots_origin = format!("those in SSL_CERT_FILE {value}");
            }
            _ => warn!("{}", fault("is unknown and ignored")),
        }
        Ok(())
    }

    /// For the commands that cannot do without.
    fn required_token(&self) -> Result<&Secret, String> {
        let file = settings_file("config.ini").display().to_string();
        self.token
            .as_ref()
            .ok_or(format!("no bot_token is set in {file}"))
    }
}

fn settings_file(name: &str) -> PathBuf {
    let folder = folder("CREDENTIALS_DIRECTORY", "/etc");
    match env::var_os("CREDENTIALS_DIRECTORY") {
        Some(_) => folder.join(name.trim_start_matches('.')),
        None => folder.join(name),
    }
}

/// What systemd names in `variable`; else the working directory, unless it holds no settings but an
/// installation does: so `check` and `send` work from every folder of the Pi.
fn folder(variable: &str, root: &str) -> PathBuf {
    let value = env::var(variable).unwrap_or_default();
    let first = value.split(':').next().unwrap_or_default();
    let is_here = Path::new("config.ini").exists() || Path::new(".env").exists();
    let is_installed = Path::new("/etc/coap_websocket/config.ini").exists();
    if first.is_empty() && is_installed && !is_here {
        return Path::new(root).join("coap_websocket");
    }
    first.into()
}

/// Of an INI file only `[telegram]`, for the other sections belong to the firmware's build.
fn read_settings(path: &Path, config: &mut Config, is_ini: bool) -> Result<(), String> {
    let content = match fs::read(path) {
        Ok(content) => content,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(format!("cannot read {}: {error}", path.display())),
    };
    let content = content.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&content);
    let mut section = if is_ini { "" } else { "telegram" };
    let mut names = Vec::new();
    for (number, line) in (1..).zip(content.split(|byte| *byte == b'\n')) {
        let origin = format!("{}:{number}", path.display());
        let line = str::from_utf8(line).map_err(|_| format!("{origin}: not UTF-8 text"))?;
        let line = line.trim();
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        if is_ini && let Some(name) = line.strip_prefix('[') {
            let name = name
                .split_once(']')
                .ok_or(format!("{origin}: `[` without `]`"))?
                .0;
            section = name.trim();
            continue;
        }
        if section.is_empty() {
            return Err(format!("{origin}: no section yet; put [telegram] above it"));
        }
        if section != "telegram" {
            continue;
        }
        let line = line.strip_prefix("export ").unwrap_or(line);
        let fault = || format!("{origin}: not `NAME=value`");
        let (name, value) = line.split_once('=').ok_or_else(fault)?;
        let (name, value) = (name.trim().to_string(), value.trim());
        let name = if is_ini { name.to_lowercase() } else { name };
        if names.contains(&name) {
            return Err(format!("{origin}: {name} is set twice; remove one of them"));
        }
        let unquote = |quote: char| value.strip_prefix(quote)?.strip_suffix(quote);
        let value = unquote('"').or(unquote('\'')).unwrap_or(value);
        let is_overruled = !is_ini && env::var(&name).is_ok_and(|real| !real.is_empty());
        if !value.is_empty() && !is_overruled {
            config.set(&origin, &name, value)?;
        }
        names.push(name);
    }
    Ok(())
}

fn is_https_url(text: &str) -> bool {
    let uri = ureq::http::Uri::try_from(text).unwrap_or_default();
    let has_host = uri.host().is_some_and(|host| !host.is_empty());
    uri.scheme_str() == Some("https") && has_host && !text.contains(['?', '#'])
}

fn read_roots(file: &str) -> Result<RootCerts, String> {
    let pem = fs::read(file).map_err(|error| format!("cannot be read: {file}: {error}"))?;
    let mut certificates = Vec::new();
    for item in ureq::tls::parse_pem(&pem) {
        if let Ok(PemItem::Certificate(certificate)) = item {
            certificates.push(certificate);
        }
    }
    if certificates.is_empty() {
        return Err(format!("holds no certificate: {file}"));
    }
    Ok(RootCerts::new_with_certs(&certificates))
}

// ---------- The loop ----------

/// Everything; one thread owns it.
struct Gateway {
    config: Config,
    /// Answers leave from it, too: gcoap looks at the server's address and port.
    socket: UdpSocket,
    exchanges: Exchanges,
    telegram: Telegram,
    state: State,
    /// What `state.json` holds, if it is known.
    saved: Option<State>,
    motes: Motes,
    people: People,
    /// For its own fetches: the configured token, else the last that Telegram accepted.
    token: Option<Secret>,
    /// When the gateway fetches on its own.
    next_fetch: Instant,
    /// When the last fetch found that nobody had written.
    found_nothing: Option<Instant>,
    /// Whether the last fetch failed.
    fetch_fails: bool,
    /// While Telegram does not answer: when the next try may take all its time.
    hang: Option<Instant>,
    /// Of the request or the fetch under way.
    deadline: Instant,
}

/// Serves for ever. Faults of the start end it, but nothing that a datagram holds.
fn serve() -> Result<(), String> {
    start_log(folder("LOGS_DIRECTORY", "/var/log").join("coap_server.log"))?;
    let config = Config::load()?;
    let state = State::open(&config);
    notify("READY=1");
    let socket = bind(config.listen)?;
    thread::spawn(heartbeat);
    let version = env!("CARGO_PKG_VERSION");
    info!("coap_websocket {version} serves CoAP on {}", config.listen);
    notify(&format!("STATUS=Serves CoAP on {}", config.listen));
    let mut gateway = Gateway {
        socket,
        exchanges: Exchanges::new(),
        telegram: Telegram::new(&config),
        state,
        saved: None,
        motes: Motes::default(),
        people: People::default(),
        token: config.token.clone(),
        next_fetch: Instant::now(),
        found_nothing: None,
        fetch_fails: false,
        hang: None,
        deadline: Instant::now(),
        config,
    };
    gateway.settle(); // so that the time of the first start outlives a crash
    gateway.run()
}

/// Waits for an address that does not exist yet, after READY: a unit that waits holds up the boot.
fn bind(listen: SocketAddr) -> Result<UdpSocket, String> {
    let mut is_told = false;
    loop {
        match UdpSocket::bind(listen) {
            Err(error) if error.kind() == ErrorKind::AddrNotAvailable => {}
            result => return result.map_err(|error| format!("cannot bind {listen}: {error}")),
        }
        if !is_told {
            warn!("address {listen} does not exist yet; trying every second");
            notify(&format!("STATUS=Waits for address {listen} to appear"));
            is_told = true;
        }
        notify("WATCHDOG=1");
        thread::sleep(TICK);
    }
}

impl Gateway {
    fn run(&mut self) -> ! {
        let mut buffer = vec![0; coap::DATAGRAM_MAX];
        let mut watched = Instant::now();
        let mut in_a_row = 0;
        loop {
            let _ = self.socket.set_read_timeout(Some(self.rest()));
            match self.socket.recv_from(&mut buffer) {
                Ok((length, peer)) => {
                    self.receive(peer, &buffer[..length]);
                    in_a_row += 1;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => in_a_row = SOCKET_HOLDS,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    warn!("cannot receive: {error}");
                    thread::sleep(TICK);
                }
            }
            if in_a_row >= SOCKET_HOLDS {
                self.tend();
                in_a_row = 0;
            }
            if watched.elapsed() >= TICK {
                notify("WATCHDOG=1");
                watched = Instant::now();
            }
        }
    }

    /// How long there is nothing to do but to receive.
    fn rest(&self) -> Duration {
        let now = Instant::now();
        let fetch = self.token.is_some().then_some(self.next_fetch);
        let due = self.exchanges.next_due().into_iter().chain(fetch).min();
        let rest = due.map_or(TICK, |due| due.saturating_duration_since(now));
        rest.clamp(Duration::from_millis(1), TICK) // zero would be no limit at all
    }

    /// Whatever waited in the socket, such as an ACK, has been read.
    fn tend(&mut self) {
        let now = Instant::now();
        for (peer, bytes) in self.exchanges.retransmissions(now) {
            self.transmit(peer, &bytes);
        }
        if now >= self.next_fetch
            && let Some(token) = self.token.clone()
        {
            self.deadline = now + self.time_for(FETCH_TIME);
            let _ = self.fetch(&token);
            self.settle();
        }
    }

    fn receive(&mut self, peer: SocketAddr, datagram: &[u8]) {
        match self.exchanges.receive(Instant::now(), peer, datagram) {
            Event::Send(bytes) => self.transmit(peer, &bytes),
            Event::Request(request) => self.handle(request),
            Event::Acknowledged(version) => self.motes.acknowledge(peer, version, Instant::now()),
        }
    }

    fn handle(&mut self, mut request: Request) {
        let response = match self.judge(&mut request) {
            Err(response) | Ok(Work::Reply(response)) => {
                let reply = self.exchanges.acknowledge(&request, Some(&response));
                self.transmit(request.peer, &reply);
                return log_outcome(&request, &response);
            }
            Ok(Work::Message(message)) => {
                self.begin(&request);
                self.deliver(&message)
            }
            Ok(Work::Update(token)) => {
                self.begin(&request);
                self.update(&token, request.peer)
            }
        };
        let bytes = self.exchanges.respond(Instant::now(), &request, &response);
        self.transmit(request.peer, &bytes);
        log_outcome(&request, &response);
        self.settle();
    }

    /// Promises a response.
    fn begin(&mut self, request: &Request) {
        let acknowledgement = self.exchanges.acknowledge(request, None);
        self.transmit(request.peer, &acknowledgement);
        self.motes
            .note_request(request.peer, request.packet.header.message_id);
        self.deadline = request.at + self.time_for(REQUEST_TIME);
    }

    /// A datagram that cannot be sent is one that was lost: CoAP retransmits.
    fn transmit(&self, peer: SocketAddr, bytes: &[u8]) {
        if !bytes.is_empty() {
            let _ = self.socket.send_to(bytes, peer);
        }
    }

    /// What can wait until the mote has its response: the disk, then the people, for nobody is told
    /// of a change that a power cut would undo.
    fn settle(&mut self) {
        USERS.store(self.state.users.len() as u64, Relaxed);
        match self.save() {
            Ok(()) => self.answer_people(),
            Err(reason) => error!("{reason}"),
        }
    }

    /// Writes `state.json` if it is not what it should be.
    fn save(&mut self) -> Result<(), String> {
        if self.saved.as_ref() != Some(&self.state) {
            let path = &self.config.state_path;
            let fault = |error| format!("cannot write {}: {error}", path.display());
            self.state.write(path).map_err(fault)?;
            self.saved = Some(self.state.clone());
        }
        Ok(())
    }

    /// In a hang, one try a minute has the usual time, and so notices the end of it.
    fn time_for(&mut self, usual: Duration) -> Duration {
        let now = Instant::now();
        if self.hang.is_some_and(|next_try| now < next_try) {
            return REQUEST_TIME_IN_A_HANG;
        }
        self.hang = self.hang.map(|_| now + FETCH_AFTER_FAILURE);
        usual
    }
}

// ---------- Judging a request ----------

/// What an acceptable request asks for.
enum Work {
    /// An answer that needs no Telegram.
    Reply(Response),
    Message(Message),
    /// With the bot's token.
    Update(Secret),
}

/// What a mote wants to have sent.
struct Message {
    token: Secret,
    chats: Vec<Value>,
    text: String,
}

impl Gateway {
    /// What to do, or the answer that refuses it.
    fn judge(&mut self, request: &mut Request) -> Result<Work, Response> {
        request.check_options()?;
        let path = request.path();
        match path.as_str() {
            "message" | "update" => check_formats(request, coap::POST, coap::TEXT_PLAIN)?,
            ".well-known/core" => {
                check_formats(request, coap::GET, coap::LINK_FORMAT)?;
                let links = Response::content(ResponseType::Content, coap::LINK_FORMAT, LINKS);
                return Ok(Work::Reply(links));
            }
            _ => return Err(Response::error(ResponseType::NotFound, "No such resource")),
        }
        if !self.exchanges.assemble(request)? {
            return Ok(Work::Reply(Response::error(ResponseType::Continue, "")));
        }
        let payload = String::from_utf8_lossy(&request.packet.payload);
        let payload = format!("&{}", trim(&payload)); // so that each key has its `&`
        let [url, token, chat_ids, text] = KEYS.map(|key| field(&payload, key));
        let is_message = path == "message";
        if [url, token].contains(&"") || is_message && [chat_ids, text].contains(&"") {
            return Err(bad_request(MISSING_FIELDS));
        }
        if url != self.config.url {
            return Err(forbidden("url"));
        }
        let token = self.served_token(token, is_message)?;
        if !is_message {
            return Ok(Work::Update(token));
        }
        if text.chars().count() > TEXT_MAX {
            return Err(bad_request("Text too long, at most 4096 characters"));
        }
        let (chats, text) = (chats(chat_ids)?, text.to_string());
        Ok(Work::Message(Message { token, chats, text }))
    }

    /// The bot's token for what a mote has presented.
    fn served_token(&self, presented: &str, is_message: bool) -> Result<Secret, Response> {
        if let Some(own) = &self.config.token {
            let mote_token = self.config.mote_token.as_ref();
            let is_mote_token = mote_token.is_some_and(|word| word.is(presented));
            let is_served = is_mote_token || own.is(presented);
            return is_served.then(|| own.clone()).ok_or(forbidden("token"));
        }
        let token = Secret(presented.to_string());
        if !token.is_bot_token() {
            return Err(bad_request("Malformed token"));
        }
        let first = self.state.bot.as_deref().unwrap_or(token.bot_id());
        if !is_message && first != token.bot_id() {
            return Err(forbidden("token"));
        }
        Ok(token)
    }
}

fn bad_request(reason: &str) -> Response {
    Response::error(ResponseType::BadRequest, reason)
}

fn forbidden(what: &str) -> Response {
    let reason = format!("This gateway does not serve that {what}");
    Response::error(ResponseType::Forbidden, &reason)
}

/// RFC 7252 §5.8, §5.10.3 and §5.10.4.
fn check_formats(request: &Request, method: u8, format: u32) -> Result<(), Response> {
    let error = |code, reason| Err(Response::error(code, reason));
    let given = request.uint(coap::CONTENT_FORMAT);
    let wanted = request.uint(coap::ACCEPT);
    if request.code() != method {
        return error(ResponseType::MethodNotAllowed, "Method not allowed");
    }
    if method == coap::POST && given.is_some_and(|given| given != coap::TEXT_PLAIN) {
        return error(ResponseType::UnsupportedContentFormat, "Only text/plain");
    }
    if wanted.is_some_and(|wanted| wanted != format) {
        return error(ResponseType::NotAcceptable, "Not available in this format");
    }
    // Replies are short and go whole, whatever size of block is asked for.
    if request.block(coap::BLOCK2)?.number > 0 {
        return error(ResponseType::BadRequest, "No such block");
    }
    Ok(())
}

/// The value of a field, empty if it is missing; it is not percent-encoded. Only the first of each
/// key separates: a text may hold anything else.
fn field<'a>(payload: &'a str, key: &str) -> &'a str {
    let Some(start) = payload.find(key) else {
        return "";
    };
    let starts = KEYS.iter().filter_map(|key| payload.find(key));
    let end = starts.filter(|other| *other > start).min();
    trim(&payload[start + key.len()..end.unwrap_or(payload.len())])
}

/// Firmware: payloads are padded with NUL, texts may end in a line feed.
fn trim(text: &str) -> &str {
    text.trim_matches(|c: char| c == '\0' || c.is_whitespace())
}

/// Each chat once.
fn chats(list: &str) -> Result<Vec<Value>, Response> {
    let mut chats = Vec::new();
    for entry in list.split(',').map(trim).filter(|entry| !entry.is_empty()) {
        let chat = chat_id(entry).ok_or(bad_request("Malformed chat id"))?;
        if !chats.contains(&chat) {
            chats.push(chat);
        }
    }
    match chats.len() {
        0 => Err(bad_request(MISSING_FIELDS)),
        1..=USERS_MAX => Ok(chats),
        _ => Err(bad_request("Too many chat ids, at most 10")),
    }
}

/// Bot API, `chat_id`: an integer, or `@` and the username of a channel.
fn chat_id(text: &str) -> Option<Value> {
    if let Some(name) = text.strip_prefix('@') {
        let fits = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
        let is_name = (1..=32).contains(&name.len()) && name.bytes().all(fits);
        return is_name.then(|| text.into());
    }
    let number = text.parse::<i64>().ok()?;
    (!text.starts_with('+')).then(|| number.into())
}

// ---------- Message and update ----------

impl Gateway {
    /// Sends the text to every chat but the removed ones.
    fn deliver(&mut self, message: &Message) -> Response {
        let mut chats = message.chats.clone();
        chats.retain(|chat| !self.state.removed.iter().any(|removed| chat == removed));
        let results = self.telegram.send_to_all(message, &chats, self.deadline);
        let sent = results.iter().filter(|result| result.is_ok()).count();
        let (mut is_answered, mut is_hang) = (sent > 0, false);
        for (chat, result) in chats.iter().zip(results) {
            let Err(failure) = result else { continue };
            warn!("sendMessage to {chat} failed: {}", failure.reason);
            is_answered |= failure.code.is_some();
            is_hang |= failure.timed_out;
            if failure.code == Some(403)
                && let Some(id) = chat.as_i64().filter(is_private)
            {
                let user = self.state.remove(id);
                info!("{user} is removed: Telegram refuses messages to it");
            }
        }
        if is_answered && self.hang.take().is_some() {
            self.next_fetch = Instant::now();
        } else if is_hang && !is_answered {
            self.note_hang();
        }
        FORWARDED.fetch_add(sent as u64, Relaxed);
        FAILURES.fetch_add((chats.len() - sent) as u64, Relaxed);
        let mut response = Response::text(ResponseType::Content, MESSAGES_SENT);
        if sent == 0 && !chats.is_empty() {
            response = Response::failed();
        }
        response.detail = format!("{sent} of {} chats", message.chats.len());
        response
    }

    /// Fetches what people wrote, and tells the mote all, unless it knows that.
    fn update(&mut self, token: &Secret, peer: SocketAddr) -> Response {
        let is_fresh = |at: Instant| at.elapsed() < FOUND_NOTHING_HOLDS;
        let is_accepted = self.token.as_ref().is_some_and(|own| own.is(&token.0));
        if !(is_accepted && self.found_nothing.is_some_and(is_fresh))
            && let Err(failure) = self.fetch(token)
        {
            FAILURES.fetch_add(1, Relaxed);
            let mut response = Response::failed();
            response.detail = failure.reason;
            return response;
        }
        let tokens = self.state.tokens();
        let version = self.motes.offer(&tokens);
        if tokens.is_empty() || self.motes.has_acknowledged(peer, version, Instant::now()) {
            return Response::text(ResponseType::Valid, NO_UPDATES);
        }
        let mut response = Response::text(ResponseType::Content, &tokens);
        (response.version, response.detail) = (Some(version), tokens);
        response
    }

    /// Takes in what people wrote. Start and end of trouble are logged once each.
    fn fetch(&mut self, token: &Secret) -> Result<(), Failure> {
        let result = self.fetch_pages(token);
        match &result {
            Err(failure) if failure.timed_out => self.note_hang(),
            Err(_) => {
                self.hang = None;
                self.next_fetch = Instant::now() + FETCH_AFTER_FAILURE;
            }
            Ok(()) => {
                self.hang = None;
                self.next_fetch = Instant::now() + FETCH_EVERY;
                self.token = Some(token.clone());
            }
        }
        if result.is_err() != self.fetch_fails {
            self.fetch_fails = result.is_err();
            let mut status = format!("Serves CoAP on {}", self.config.listen);
            match &result {
                Ok(()) => info!("Telegram answers again"),
                Err(failure) => {
                    warn!("cannot fetch what people write: {}", failure.reason);
                    status += ", but cannot fetch what people write";
                }
            }
            notify(&format!("STATUS={status}"));
        }
        result
    }

    /// Progress is saved before the next call's offset confirms it, and before anybody is answered.
    fn fetch_pages(&mut self, token: &Secret) -> Result<(), Failure> {
        loop {
            self.save().map_err(Failure::new)?;
            let offset = self.state.offset;
            let page = self.telegram.get_updates(token, offset, self.deadline)?;
            let Value::Array(page) = page else {
                return Err(Failure::new(
                    "getUpdates: the answer is no list".to_string(),
                ));
            };
            let length = page.len();
            self.state.bot = Some(token.bot_id().to_string());
            for update in &page {
                self.people
                    .take(update, &mut self.state, &self.config.password);
            }
            if length == 0 {
                // The only proof that there is no more: pages are cut.
                self.state.ignore_commands_before = None;
                self.found_nothing = Some(Instant::now());
            }
            if length < PAGE {
                return self.save().map_err(Failure::new);
            }
        }
    }

    /// Telegram does not answer: requests get little time until it does.
    fn note_hang(&mut self) {
        let next_try = Instant::now() + FETCH_AFTER_FAILURE;
        self.next_fetch = *self.hang.get_or_insert(next_try);
    }

    /// Best effort: the mote has its answer.
    fn answer_people(&mut self) {
        let Some(token) = &self.token else { return };
        let mut dropped = 0;
        for (chat, answer) in mem::take(&mut self.people.answers) {
            let text = format!("{:.TEXT_MAX$}", answer.texts.join("\n\n"));
            let mut calls = Vec::new();
            if !text.is_empty() {
                calls.push(("sendMessage", json!({"chat_id": chat, "text": text})));
            }
            for id in answer.deleted {
                calls.push(("deleteMessage", json!({"chat_id": chat, "message_id": id})));
            }
            for (method, parameters) in calls {
                if Instant::now() >= self.deadline {
                    dropped += 1;
                    continue;
                }
                let telegram = &self.telegram;
                let result = telegram.call(token, method, &parameters, self.deadline);
                if let Err(failure) = result {
                    warn!("{method} to {chat} failed: {}", failure.reason);
                }
            }
        }
        if dropped > 0 {
            warn!("no time left: {dropped} answers to people are dropped");
        }
    }
}

// ---------- Telegram ----------

/// The Bot API.
struct Telegram {
    agent: ureq::Agent,
    url: String,
    /// Their origin, for people.
    roots: String,
}

type Called = Result<Value, Failure>;

/// Why a call did not succeed.
struct Failure {
    /// For a person; never holds the token.
    reason: String,
    /// Bot API, `error_code`; none if the answer did not come from the Bot API.
    code: Option<u64>,
    /// The pause before another attempt, if that cannot deliver a text twice.
    retry_in: Option<Duration>,
    timed_out: bool,
}

impl Failure {
    /// Of a call that may have had its effect.
    fn new(reason: String) -> Failure {
        Failure {
            reason,
            code: None,
            retry_in: None,
            timed_out: false,
        }
    }
}

impl Telegram {
    fn new(config: &Config) -> Telegram {
        let tls = TlsConfig::builder().root_certs(config.roots.clone());
        let settings = ureq::Agent::config_builder()
            .http_status_as_error(false) // description and retry_after are in the body
            .max_redirects(0)
            .max_redirects_will_error(false)
            .ip_family(config.ip_family)
            .tls_config(tls.build())
            .timeout_global(Some(REQUEST_TIME))
            .timeout_connect(Some(CONNECT_TIME))
            .timeout_resolve(Some(CONNECT_TIME))
            .input_buffer_size(8 << 10)
            .output_buffer_size(8 << 10)
            .max_idle_connections(USERS_MAX)
            .max_idle_connections_per_host(USERS_MAX)
            .max_idle_age(IDLE_CONNECTION)
            .build();
        let (connector, resolver) = (DefaultConnector::default(), Addresses::default());
        Telegram {
            agent: ureq::Agent::with_parts(settings, connector, resolver),
            url: config.url.clone(),
            roots: config.roots_origin.clone(),
        }
    }

    /// The updates from `offset` on; those before are confirmed.
    fn get_updates(&self, token: &Secret, offset: i64, by: Instant) -> Called {
        let parameters = json!({"offset": offset, "limit": PAGE, "allowed_updates": ["message"]});
        self.call(token, "getUpdates", &parameters, by)
    }

    /// One `sendMessage` for each chat, all at the same time; results in order.
    fn send_to_all(&self, message: &Message, chats: &[Value], deadline: Instant) -> Vec<Called> {
        let send = |chat: &Value| {
            let parameters = json!({"chat_id": chat, "text": message.text});
            self.call(&message.token, "sendMessage", &parameters, deadline)
        };
        thread::scope(|scope| {
            let spawn = |chat| thread::Builder::new().spawn_scoped(scope, move || send(chat));
            let others: Vec<_> = chats.iter().skip(1).map(spawn).collect();
            let mut results: Vec<Called> = chats.iter().take(1).map(send).collect();
            for thread in others {
                results.push(match thread {
                    Ok(thread) => thread.join().expect("a call does not panic"),
                    Err(error) => Err(Failure::new(format!("cannot start a thread: {error}"))),
                });
            }
            results
        })
    }

    /// Calls a method, until `by`: again only where the call before surely had no effect.
    fn call(&self, token: &Secret, method: &str, parameters: &Value, by: Instant) -> Called {
        let call = || self.call_once(token, method, parameters, by);
        let first = match call() {
            Err(failure) => failure,
            done => return done,
        };
        let mut retry_in = first.retry_in;
        for _ in 1..ATTEMPTS {
            let left = by.saturating_duration_since(Instant::now());
            let Some(pause) = retry_in.filter(|pause| *pause < left) else {
                break;
            };
            thread::sleep(pause);
            match call() {
                Err(failure) if failure.code.is_none() => retry_in = failure.retry_in,
                Err(failure) if failure.retry_in.is_some() => retry_in = failure.retry_in,
                done => return done,
            }
        }
        Err(first) // its reason tells more than the last one's
    }

    fn call_once(&self, token: &Secret, method: &str, parameters: &Value, by: Instant) -> Called {
        let remaining = by.saturating_duration_since(Instant::now());
        let bytes = parameters.to_string().into_bytes();
        let mut unread = bytes.as_slice();
        let mut request = self.agent.post(format!("{}{}/{method}", self.url, token.0));
        request = request.header("content-type", "application/json");
        request = request.header("content-length", bytes.len());
        // ureq keeps the TLS configuration only of requests with the agent's own settings.
        if remaining + Duration::from_millis(100) < REQUEST_TIME {
            request = request.config().timeout_global(Some(remaining)).build();
        }
        let limit = match method {
            "getUpdates" => PAGE_BYTES_MAX,
            _ => ANSWER_BYTES_MAX,
        };
        let answer = request.send(ureq::SendBody::from_reader(&mut unread));
        let answer = answer.and_then(|mut response| {
            let body = response.body_mut().with_config().limit(limit);
            Ok((body.read_to_vec()?, response.status().as_u16()))
        });
        let result = match answer {
            Ok((answer, status)) => read_answer(status, &answer),
            Err(error) => Err(Failure {
                // As long as nobody asked for the body, Telegram cannot have acted on the call.
                retry_in: (unread.len() == bytes.len()).then_some(ATTEMPT_PAUSE),
                timed_out: matches!(error, ureq::Error::Timeout(_)),
                ..Failure::new(self.describe(&error))
            }),
        };
        result.map_err(|failure| {
            let reason = failure.reason.replace(&token.0, "<token>");
            let reason = format!("{}: {reason:.REASON_MAX$}", self.url);
            Failure { reason, ..failure }
        })
    }

    fn describe(&self, error: &ureq::Error) -> String {
        let tls = match error {
            ureq::Error::Timeout(stage) => return format!("no answer in time ({stage})"),
            ureq::Error::Rustls(error) => Some(error),
            ureq::Error::Io(error) => error.get_ref().and_then(|inner| inner.downcast_ref()),
            _ => None,
        };
        let Some(rustls::Error::InvalidCertificate(reason)) = tls else {
            return error.to_string();
        };
        let hint = format!("roots: {}; is the clock right?", self.roots);
        format!("its certificate is not trusted: {reason} ({hint})")
    }
}

/// Success is `200` and `"ok": true`, nothing else.
fn read_answer(status: u16, body: &[u8]) -> Called {
    let mut answer: Value = serde_json::from_slice(body).unwrap_or_default();
    if status == 200 && answer["ok"] == true {
        return Ok(answer["result"].take());
    }
    let code = answer["error_code"].as_u64();
    let Some(code) = code.filter(|_| answer["ok"] == false) else {
        let origin = "not from the Bot API: from a proxy, or a login page of the network?";
        return Err(Failure::new(format!("HTTP {status}, {origin}")));
    };
    let description = answer["description"].as_str().unwrap_or("no description");
    let parameters = &answer["parameters"];
    let moved_to = parameters["migrate_to_chat_id"].as_i64();
    let hint = match code {
        401 | 404 => " (is the bot's token right?)".to_string(),
        409 => " (open <url><token>/deleteWebhook once, or stop the other program)".to_string(),
        _ => moved_to.map_or(String::new(), |id| {
            format!(" (its id is now {id}: tell the mote)")
        }),
    };
    let retry_after = parameters["retry_after"].as_u64().filter(|_| code == 429);
    Err(Failure {
        code: Some(code),
        retry_in: retry_after.map(Duration::from_secs),
        ..Failure::new(format!("{code} {description}{hint}"))
    })
}

/// Keeps the addresses of the host (the Bot API's or the proxy's), for ureq asks for them on each
/// call. The lock makes one look-up of many at once.
#[derive(Debug, Default)]
struct Addresses(Mutex<LookUp>);

#[derive(Debug, Default)]
struct LookUp {
    at: Option<Instant>,
    /// The last that were found: they serve while the name server fails.
    found: Option<ResolvedSocketAddrs>,
}

impl Resolver for Addresses {
    fn resolve(
        &self,
        uri: &ureq::http::Uri,
        config: &ureq::config::Config,
        mut timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let asked = Instant::now();
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = &last.found {
            if last.at.is_some_and(|at| at.elapsed() < ADDRESSES_HOLD) {
                return Ok(found.clone());
            }
            timeout.after = (*timeout.after).min(LOOK_UP_AGAIN_TIME).into();
        } else if last.at.is_some_and(|at| at >= asked) {
            return Err(ureq::Error::HostNotFound); // another call's look-up has just failed
        }
        let result = DefaultResolver::default().resolve(uri, config, timeout);
        last.at = Some(Instant::now());
        match result {
            Ok(found) => Ok(last.found.insert(found).clone()),
            Err(error) => last.found.clone().ok_or(error),
        }
    }
}

// ---------- State, and what each mote has acknowledged of it ----------

/// What outlives the process, in `state.json`.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    /// Minutes; none until somebody sets it.
    interval: Option<u8>,
    /// LED feedback, 0 or 1; none until somebody sets it.
    feedback: Option<u8>,
    users: Vec<User>,
    /// Chats to which nothing is sent until they write again, the latest last.
    removed: Vec<i64>,
    /// Id of the bot that `offset` belongs to.
    bot: Option<String>,
    /// Bot API: the next update's id. It may fall: after a quiet week Telegram numbers anew.
    offset: i64,
    /// First start, Unix seconds; none once all that was written before was fetched.
    ignore_commands_before: Option<u64>,
}

#[derive(Clone, PartialEq, Serialize, Deserialize)]
struct User {
    name: String,
    chat: i64,
}

impl State {
    /// A damaged file is set aside: it may be worth a look, and the gateway must start.
    fn open(config: &Config) -> State {
        let path = &config.state_path;
        let known = State::read(path).unwrap_or_else(|reason| {
            let aside = beside(path, ".damaged");
            match fs::rename(path, &aside) {
                Ok(()) => error!("{reason}; starting anew, it is kept as {}", aside.display()),
                Err(error) => error!("{reason}; starting anew, and it cannot be kept: {error}"),
            }
            None
        });
        let mut state = known.unwrap_or_else(|| State {
            ignore_commands_before: Some(unix_now()),
            ..State::default()
        });
        // Update ids are counted for each bot.
        if let Some(token) = &config.token
            && state.bot.as_deref() != Some(token.bot_id())
        {
            state.bot = Some(token.bot_id().to_string());
            state.offset = 0;
        }
        state
    }

    /// `None`: there is no such file.
    fn read(path: &Path) -> Result<Option<State>, String> {
        let result = match fs::read(path) {
            Ok(text) => serde_json::from_slice(&text)
                .map_err(io::Error::from)
                .map(Some),
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => Err(error),
        };
        result.map_err(|error| format!("cannot read {}: {error}", path.display()))
    }

    /// The old or the new one, also after a power cut. Readable by its owner alone.
    fn write(&self, path: &Path) -> io::Result<()> {
        let new = beside(path, ".new");
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        let mut file = options.open(&new)?;
        file.write_all(&serde_json::to_vec_pretty(self)?)?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        let folder = Path::new(".").join(path); // for a path without a folder
        File::open(folder.parent().unwrap_or(path))?.sync_all()
    }

    /// What is said to a chat that is not registered; `None` to one that is.
    fn register(&mut self, chat: i64, name: &str) -> Option<&'static str> {
        let known = self.users.iter().position(|user| user.chat == chat);
        if known.is_none() && self.users.len() >= USERS_MAX {
            return Some(LIST_IS_FULL);
        }
        let others = self.users.iter().filter(|user| user.chat != chat);
        let taken: Vec<&str> = others.map(|user| user.name.as_str()).collect();
        let name = wire_name(name, &taken);
        let Some(at) = known else {
            info!("{name} ({chat}) is registered");
            self.removed.retain(|removed| *removed != chat);
            self.users.push(User { name, chat });
            return Some(REGISTERED);
        };
        if self.users[at].name != name {
            let known = self.users.remove(at);
            info!("{} ({chat}) is now called {name}", known.name);
            self.users.push(User { name, chat });
        }
        None
    }

    /// Returns the user for the log.
    fn remove(&mut self, chat: i64) -> String {
        let known = self.users.iter().position(|user| user.chat == chat);
        let user = known.map(|at| self.users.remove(at));
        self.removed.retain(|removed| *removed != chat);
        self.removed.push(chat);
        if self.removed.len() > REMOVED_MAX {
            self.removed.remove(0);
        }
        user.map_or(chat.to_string(), |user| format!("{} ({chat})", user.name))
    }

    /// All that a mote should know: removals first, which make room; users in the order of their
    /// changes, so that a name is free before it is taken. That is at most 277 bytes, and the latest
    /// removals that still fit.
    fn tokens(&self) -> String {
        let mut tokens = Vec::new();
        tokens.extend(self.interval.map(|minutes| format!("i{minutes}")));
        tokens.extend(self.feedback.map(|on| format!("f{on}")));
        for User { name, chat } in &self.users {
            tokens.push(format!("{name}:{chat}"));
        }
        let mut tokens = tokens.join(";");
        for chat in self.removed.iter().rev() {
            let separator = if tokens.is_empty() { "" } else { ";" };
            let longer = format!("r{chat}{separator}{tokens}");
            if longer.len() > REPLY_MAX {
                break;
            }
            tokens = longer;
        }
        tokens
    }
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// A person whom the firmware can hold and remove: it removes only ids that start with a digit.
fn is_private(chat: &i64) -> bool {
    (1..=CHAT_ID_MAX).contains(chat)
}

/// A name that the firmware neither cuts nor takes for something else, and none of `taken`, for it
/// finds users by name.
fn wire_name(name: &str, taken: &[&str]) -> String {
    let fits = |c: &char| !c.is_control() && !";:,&=".contains(*c);
    let clean: String = name.chars().filter(fits).collect();
    let base = match cut(clean.trim(), NAME_MAX) {
        "" => "user".to_string(),
        name if is_misread(name) => format!("_{name}"),
        name => name.to_string(),
    };
    let mut name = cut(&base, NAME_MAX).to_string();
    let mut number = 2;
    while taken.contains(&name.as_str()) {
        let suffix = format!("_{number}");
        name = format!("{}{suffix}", cut(&base, NAME_MAX - suffix.len()));
        number += 1;
    }
    name
}

/// Firmware: what it takes for a setting, a removal, everybody, or an id.
fn is_misread(name: &str) -> bool {
    match name.as_bytes() {
        [b'f', b'0' | b'1', ..] | [b'i' | b'r', b'0'..=b'9', ..] => true,
        name => name == b"all" || name.iter().all(u8::is_ascii_digit),
    }
}

/// At most `end` bytes, whole characters, no white space behind.
fn cut(text: &str, end: usize) -> &str {
    let mut end = end.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].trim_end()
}

/// What the motes have acknowledged. It ends with the process: then they are told everything.
#[derive(Default)]
struct Motes {
    /// The longest silent first.
    known: Vec<Mote>,
    /// Number and text of the state that was last offered.
    version: u64,
    tokens: String,
}

struct Mote {
    address: IpAddr,
    port: u16,
    message_id: u16,
    /// The version that it acknowledged last, 0 for none, and when.
    version: u64,
    at: Instant,
}

impl Motes {
    /// The version of these tokens: a new one if they are not those that were last offered.
    fn offer(&mut self, tokens: &str) -> u64 {
        if self.tokens != tokens {
            self.tokens = tokens.to_string();
            self.version += 1;
        }
        self.version
    }

    /// A mote whose message ID does not go on has restarted, and knows nothing. Other clients have a
    /// new port for each request.
    fn note_request(&mut self, peer: SocketAddr, message_id: u16) {
        let address = peer.ip().to_canonical();
        let known = self.known.iter().position(|mote| mote.address == address);
        let mut mote = match known {
            Some(at) => self.known.remove(at),
            None => Mote {
                address,
                port: peer.port(),
                message_id: message_id.wrapping_sub(1),
                version: 0,
                at: Instant::now(),
            },
        };
        let step = message_id.wrapping_sub(mote.message_id);
        if mote.port == peer.port() && !(1..=MESSAGE_ID_STEP_MAX).contains(&step) {
            info!("{address} has restarted, its message ID says: it is told everything");
            mote.version = 0;
        }
        (mote.port, mote.message_id) = (peer.port(), message_id);
        if self.known.len() >= MOTES_MAX {
            self.known.remove(0);
        }
        self.known.push(mote);
    }

    fn acknowledge(&mut self, peer: SocketAddr, version: u64, now: Instant) {
        if let Some(mote) = self.find(peer) {
            (mote.version, mote.at) = (version, now);
        }
    }

    fn has_acknowledged(&mut self, peer: SocketAddr, version: u64, now: Instant) -> bool {
        let mote = self.find(peer);
        mote.is_some_and(|mote| mote.version == version && now < mote.at + ACKNOWLEDGED_HOLDS)
    }

    fn find(&mut self, peer: SocketAddr) -> Option<&mut Mote> {
        let address = peer.ip().to_canonical();
        self.known.iter_mut().find(|mote| mote.address == address)
    }
}

// ---------- What people write ----------

/// Bot API, `Message`: what is needed of it.
#[derive(Deserialize)]
struct Written {
    message_id: i64,
    /// Unix time.
    date: u64,
    chat: Chat,
    #[serde(default)]
    text: String,
}

/// Bot API, `Chat`.
#[derive(Deserialize)]
struct Chat {
    id: i64,
    #[serde(rename = "type")]
    kind: String,
    /// People have first names, groups have titles.
    #[serde(default, alias = "first_name", alias = "title")]
    name: String,
}

impl fmt::Display for Chat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} ({})", self.id, self.name, self.kind)
    }
}

/// Those who write to the bot.
#[derive(Default)]
struct People {
    /// By chat: what is to be said once it is saved.
    answers: BTreeMap<i64, Answer>,
    /// By chat: who has tried wrong passwords.
    suspects: BTreeMap<i64, Suspect>,
}

#[derive(Default)]
struct Answer {
    texts: Vec<String>,
    /// Messages to delete, for they may hold the password.
    deleted: Vec<i64>,
}

#[derive(Default)]
struct Suspect {
    /// Wrong passwords in a row.
    wrong: u32,
    locked_until: Option<Instant>,
}

impl People {
    /// Progress first: an update that cannot be understood must not come back.
    fn take(&mut self, update: &Value, state: &mut State, password: &Option<Secret>) {
        let Some(id) = update["update_id"].as_i64() else {
            return;
        };
        state.offset = id.saturating_add(1);
        let written = match Written::deserialize(&update["message"]) {
            Ok(written) => written,
            Err(error) => return info!("update {id} is not understood: {error}"),
        };
        let chat = &written.chat;
        if chat.kind != "private" || !is_private(&chat.id) {
            return info!("{chat} cannot register");
        }
        let chat = chat.id;
        // Written before the gateway was there.
        let start = state.ignore_commands_before;
        let is_old = start.is_some_and(|start| written.date < start);
        let words: Vec<&str> = written.text.split_whitespace().collect();
        let lower: Vec<String> = words.iter().map(|word| word.to_lowercase()).collect();
        let lower: Vec<&str> = lower.iter().map(String::as_str).collect();
        if lower == ["remove", "me"] && !is_old {
            let user = state.remove(chat);
            info!("{user} is removed, as asked");
            return self.say(chat, REMOVED);
        }
        let news = state.register(chat, &written.chat.name);
        if let Some(news) = news {
            self.say(chat, news);
        }
        match lower[..] {
            ["config" | "/config", ..] => {
                // Also a wrong password: it may be nearly right.
                let answer = self.answers.entry(chat).or_default();
                answer.deleted.push(written.message_id);
                if !is_old {
                    self.configure(chat, &words, state, password);
                }
            }
            ["help" | "/help" | "/start"] => self.say(chat, HELP),
            _ if news == Some(REGISTERED) => self.say(chat, HELP),
            _ if news.is_some() || words.is_empty() => {} // the list is full, or a sticker
            _ => {
                self.say(chat, "I do not understand that.");
                self.say(chat, HELP);
            }
        }
    }

    /// Only a complete command is a guess at the password; the rest is not looked at unless it is right.
    fn configure(&mut self, chat: i64, words: &[&str], state: &mut State, own: &Option<Secret>) {
        let Some(password) = own else {
            return self.say(chat, "No password is set, so nothing can be changed.");
        };
        let suspect = self.suspects.get(&chat);
        let locked_until = suspect.and_then(|suspect| suspect.locked_until);
        if locked_until.is_some_and(|until| Instant::now() < until) {
            return;
        }
        let [_, guess, key, value] = *words else {
            return self.say(chat, CONFIG_FORM);
        };
        if !password.is(guess) {
            return self.suspect(chat);
        }
        self.suspects.remove(&chat);
        let number = value.parse::<u8>().ok().filter(|_| !value.starts_with('+'));
        let told = match (key.to_ascii_lowercase().as_str(), number) {
            ("interval", Some(minutes @ 1..=120)) => {
                state.interval = Some(minutes);
                format!("The interval is set to {minutes} minutes.")
            }
            ("feedback", Some(on @ 0..=1)) => {
                state.feedback = Some(on);
                format!("The LED feedback is set to {on}.")
            }
            _ => return self.say(chat, CONFIG_FORM),
        };
        info!("chat {chat}: {told}");
        self.say(chat, &told);
    }

    /// Counts a wrong password.
    fn suspect(&mut self, chat: i64) {
        if self.suspects.len() >= SUSPECTS_MAX && !self.suspects.contains_key(&chat) {
            self.suspects.pop_first();
        }
        let suspect = self.suspects.entry(chat).or_default();
        suspect.wrong += 1;
        let mut told = "Wrong password. Nothing was changed.";
        if suspect.wrong >= WRONG_PASSWORDS_MAX {
            suspect.wrong = 0;
            suspect.locked_until = Some(Instant::now() + LOCKED_OUT);
            told = "Wrong password. Your config messages are ignored for an hour.";
        }
        warn!("chat {chat}: {told}");
        self.say(chat, told);
    }

    /// Each text once.
    fn say(&mut self, chat: i64, text: &str) {
        let texts = &mut self.answers.entry(chat).or_default().texts;
        if !texts.iter().any(|said| said == text) {
            texts.push(text.to_string());
        }
    }
}

// ---------- Log, heartbeat, systemd ----------

/// For the heartbeat, which has a thread of its own.
static FORWARDED: AtomicU64 = AtomicU64::new(0);
static FAILURES: AtomicU64 = AtomicU64::new(0);
static USERS: AtomicU64 = AtomicU64::new(0);

/// What simple_logger writes to the console goes to a file, too.
struct Log {
    console: SimpleLogger,
    path: PathBuf,
}

/// Nothing of the libraries: their records hold URLs, and so the token.
fn console(level: LevelFilter) -> SimpleLogger {
    log::set_max_level(level);
    let silent = SimpleLogger::new().with_level(LevelFilter::Off);
    silent.with_module_level("coap_websocket", level)
}

fn start_log(path: PathBuf) -> Result<(), String> {
    let (console, name) = (console(LevelFilter::Info), path.display().to_string());
    let log = Log { console, path };
    let result = log.append("");
    log::set_boxed_logger(Box::new(log)).map_err(|error| error.to_string())?;
    if let Err(error) = result {
        warn!("cannot write {name}, so the log goes to the console alone: {error}");
    }
    Ok(())
}

impl Log {
    fn append(&self, line: &str) -> io::Result<()> {
        let mut options = OpenOptions::new();
        options.append(true).create(true);
        let mut file = options.open(&self.path)?;
        if file.metadata()?.len() + line.len() as u64 > LOG_MAX {
            let moved = fs::rename(&self.path, beside(&self.path, ".1"));
            moved.or_else(|_| file.set_len(0))?;
            file = options.open(&self.path)?;
        }
        file.write_all(line.as_bytes())
    }
}

impl log::Log for Log {
    fn enabled(&self, metadata: &log::Metadata) -> bool {
        self.console.enabled(metadata)
    }

    fn log(&self, record: &log::Record) {
        if self.enabled(record.metadata()) {
            let text = escape(&record.args().to_string());
            let mut escaped = log::Record::builder();
            escaped.metadata(record.metadata().clone());
            let console = &self.console;
            console.log(&escaped.args(format_args!("{text}")).build());
            let (time, level) = (utc(unix_now()), record.level());
            let _ = self.append(&format!("{time} [{level}] {text}\n"));
        }
    }

    fn flush(&self) {}
}

/// So that what comes from outside cannot forge a line.
fn escape(text: &str) -> String {
    let escaped = text.chars().map(|c| match c {
        '\u{2028}' | '\u{2029}' | '\0'..' ' | '\x7f'..'\u{a0}' => c.escape_default().to_string(),
        c => c.to_string(),
    });
    escaped.collect()
}

fn unix_now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs())
}

/// `2026-01-31 12:00:00` of Unix seconds, by H. Hinnant's `civil_from_days`.
fn utc(seconds: u64) -> String {
    let (days, time) = (seconds / 86400 + 719_468, seconds % 86400);
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153; // from March on, as the year
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year + u64::from(month <= 2);
    let (hours, minutes, seconds) = (time / 3600, time / 60 % 60, time % 60);
    format!("{year:04}-{month:02}-{day:02} {hours:02}:{minutes:02}:{seconds:02}")
}

fn log_outcome(request: &Request, response: &Response) {
    let (code, detail) = (response.code(), &response.detail);
    let (peer, time) = (request.peer, request.at.elapsed().as_millis());
    let separator = if detail.is_empty() { "" } else { ": " };
    let level = match code.starts_with('5') {
        true => log::Level::Warn,
        false => log::Level::Info,
    };
    log::log!(
        level,
        "{peer} {request} -> {code} in {time} ms{separator}{detail}"
    );
}

fn heartbeat() {
    let start = Instant::now();
    loop {
        thread::sleep(HEARTBEAT);
        let (minutes, forwarded) = (start.elapsed().as_secs() / 60, FORWARDED.load(Relaxed));
        let (failures, users) = (FAILURES.load(Relaxed), USERS.load(Relaxed));
        let (hours, minutes) = (minutes / 60, minutes % 60);
        info!(
            "Server is still running: up {hours} h {minutes} min, {forwarded} messages forwarded, \
            {failures} failures, {users} registered users"
        );
    }
}

/// sd_notify(3). Without systemd, nothing.
fn notify(message: &str) {
    let Ok(path) = env::var("NOTIFY_SOCKET") else {
        return;
    };
    let address = match path.strip_prefix('@') {
        Some(name) => UnixAddr::from_abstract_name(name),
        None => UnixAddr::from_pathname(&path),
    };
    let socket = UnixDatagram::unbound();
    if let (Ok(address), Ok(socket)) = (address, socket) {
        let _ = socket.send_to_addr(message.as_bytes(), &address);
    }
}

// ---------- `check` and `send` ----------

/// Changes nothing: what people wrote is shown, not confirmed.
fn check() -> Result<(), String> {
    console(LevelFilter::Warn)
        .init()
        .map_err(|error| error.to_string())?;
    let config = Config::load()?;
    let token = config.required_token()?;
    let telegram = Telegram::new(&config);
    let deadline = Instant::now() + REQUEST_TIME;
    let fault = |failure: Failure| escape(&failure.reason);
    let bot = telegram.call(token, "getMe", &json!({}), deadline);
    let bot = bot.map_err(fault)?;
    let text = |key: &str| bot[key].as_str().unwrap_or("?");
    let (name, username) = (text("first_name"), text("username"));
    say(&escape(&format!("bot: {name} (@{username})")))?;
    say("registered users:")?;
    for user in State::read(&config.state_path)?.unwrap_or_default().users {
        say(&format!("  {} {}", user.chat, user.name))?;
    }
    say("chats with messages not fetched yet (for others see the log):")?;
    let mut told = Vec::new();
    // 1 confirms nothing, and is no offset of the gateway's: Telegram would hold a repeated one.
    let updates = telegram.get_updates(token, 1, deadline).map_err(fault)?;
    for update in updates.as_array().into_iter().flatten() {
        if let Ok(chat) = Chat::deserialize(&update["message"]["chat"])
            && !told.contains(&chat.id)
        {
            say(&escape(&format!("  {chat}")))?;
            told.push(chat.id);
        }
    }
    Ok(())
}

/// One `POST /message` as a mote sends it; without a URI, to the gateway configured here.
fn send(chat: &str, text: &str, uri: Option<&str>) -> Result<(), String> {
    let config = Config::load()?;
    let token = config.required_token()?;
    let token = &config.mote_token.as_ref().unwrap_or(token).0;
    let peer = match uri {
        Some(uri) => address_of(uri).ok_or(format!("cannot resolve {}", escape(uri)))?,
        None => config.listen,
    };
    let url = &config.url;
    let form = format!("url={url}&token={token}&chat_ids={chat}&text={text}");
    let answer = exchange(peer, &coap::post("message", &form));
    let answer = answer.map_err(|error| format!("cannot reach a gateway at {peer}: {error}"))?;
    let answer = answer.ok_or(format!("no answer from {peer}"))?;
    let (code, text) = (
        answer.header.get_code(),
        escape(&String::from_utf8_lossy(&answer.payload)),
    );
    if !code.starts_with('2') {
        return Err(format!("{code} {text} (the gateway's log tells why)"));
    }
    say(&format!("{code} {text}"))
}

/// Of a URI `coap://host[:port]`.
fn address_of(uri: &str) -> Option<SocketAddr> {
    let host = uri.strip_prefix("coap://")?.trim_end_matches('/');
    let with_port = format!("{host}:{}", coap::PORT);
    let found = host
        .to_socket_addrs()
        .or_else(|_| with_port.to_socket_addrs());
    found.ok()?.next()
}

/// A client's side of one exchange, RFC 7252 §4.2. `None`: nobody answers.
fn exchange(peer: SocketAddr, request: &[u8]) -> io::Result<Option<Packet>> {
    let local = if peer.is_ipv4() { "0.0.0.0" } else { "::" };
    let socket = UdpSocket::bind((local, 0))?;
    socket.connect(peer)?;
    let mut timeout = coap::ACK_TIMEOUT;
    for _ in 0..=coap::MAX_RETRANSMIT {
        socket.send(request)?;
        match receive_packet(&socket, timeout)? {
            None => timeout *= 2,
            // The gateway answers within 9 s, and repeats what gets lost.
            Some(empty) if empty.header.code == MessageClass::Empty => {
                return receive_packet(&socket, 2 * REQUEST_TIME);
            }
            response => return Ok(response),
        }
    }
    Ok(None)
}

/// `None`: nothing comes in time.
fn receive_packet(socket: &UdpSocket, timeout: Duration) -> io::Result<Option<Packet>> {
    socket.set_read_timeout(Some(timeout))?;
    let mut buffer = vec![0; coap::DATAGRAM_MAX];
    let length = match socket.recv(&mut buffer) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
        length => length?,
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

/// RFC 7252 and Block1 of RFC 7959: bytes and a time in, bytes out; no socket, no clock.
mod coap {
    use std::collections::{BTreeMap, VecDeque};
    use std::fmt;
    use std::hash::{BuildHasher as _, Hasher as _, RandomState};
    use std::net::SocketAddr;
    use std::time::{Duration, Instant};

    use coap_lite::{MessageClass, MessageType, Packet, ResponseType};

    /// RFC 7252 §6.1.
    pub const PORT: u16 = 5683;
    /// RFC 7252 §4.8, transmission parameters, and §4.8.2, what follows from them.
    pub const ACK_TIMEOUT: Duration = Duration::from_secs(2);
    const ACK_RANDOM_MS: u64 = 1000;
    pub const MAX_RETRANSMIT: u32 = 4;
    const MAX_TRANSMIT_SPAN_S: u64 = 3 * ((1 << MAX_RETRANSMIT) - 1);
    const MAX_LATENCY_S: u64 = 100;
    const NON_LIFETIME_S: u64 = MAX_TRANSMIT_SPAN_S + MAX_LATENCY_S;
    pub const NON_LIFETIME: Duration = Duration::from_secs(NON_LIFETIME_S);
    pub const EXCHANGE_LIFETIME: Duration = Duration::from_secs(NON_LIFETIME_S + MAX_LATENCY_S + 2);

    /// UDP carries no more.
    pub const DATAGRAM_MAX: usize = 1 << 16;
    /// Of a request's payload, bytes: 4,096 characters of 4 bytes, and the rest of the form.
    pub const BODY_MAX: usize = 17 << 10;
    /// Remembered messages: 1,000 motes that all send four in `EXCHANGE_LIFETIME`.
    pub const SEEN_MAX: usize = 4096;
    /// Responses that wait for their ACK; beyond that, one is given up.
    const OPEN_MAX: usize = 1024;
    /// Block1 assemblies, of `BODY_MAX` each; beyond that, one is given up.
    pub const ASSEMBLIES_MAX: usize = 32;
    pub const ASSEMBLY_LIFETIME: Duration = Duration::from_secs(60);

    /// RFC 7252 §12.1.1, §12.2 and §12.3.
    pub const GET: u8 = 1;
    pub const POST: u8 = 2;
    const URI_PATH: u16 = 11;
    pub const CONTENT_FORMAT: u16 = 12;
    pub const ACCEPT: u16 = 17;
    pub const BLOCK2: u16 = 23;
    const BLOCK1: u16 = 27;
    const SIZE1: u16 = 60;
    /// RFC 7959 §2.2: more blocks follow.
    const MORE: u32 = 8;
    pub const TEXT_PLAIN: u32 = 0;
    pub const LINK_FORMAT: u32 = 40;

    /// Random enough for message IDs and timeouts.
    fn random() -> u64 {
        RandomState::new().build_hasher().finish()
    }

    /// RFC 7959 §2.2; a message without the option is its only block.
    #[derive(Clone, Copy, Default)]
    pub struct Block {
        pub number: usize,
        has_more: bool,
        size: usize,
    }

    /// RFC 7252 §3.2: no leading zeros.
    fn uint(value: u32) -> Vec<u8> {
        let zeros = value.leading_zeros() as usize / 8;
        value.to_be_bytes()[zeros..].to_vec()
    }

    /// A request that nobody has acted on.
    pub struct Request {
        pub peer: SocketAddr,
        pub at: Instant,
        pub packet: Packet,
        /// Of the peer and the whole datagram: restarted motes use message IDs again.
        digest: u64,
    }

    /// For the log. Of the path only the start, up to a colon: the token may have been put there.
    impl fmt::Display for Request {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            let path = self.path();
            let path = path.split(':').next().unwrap_or_default();
            let methods = ["", "GET", "POST", "PUT", "DELETE"];
            let method = methods.get(usize::from(self.code())).unwrap_or(&"?");
            write!(f, "{method} /{path:.24}")
        }
    }

    impl Request {
        pub fn code(&self) -> u8 {
            self.packet.header.code.into()
        }

        fn is_confirmable(&self) -> bool {
            self.packet.header.get_type() == MessageType::Confirmable
        }

        fn values(&self, option: u16) -> impl Iterator<Item = &Vec<u8>> {
            self.packet.get_option(option.into()).into_iter().flatten()
        }

        /// As in a URI: segments joined with `/`, one inside a segment encoded. RFC 7252 §6.5.
        pub fn path(&self) -> String {
            let mut path = Vec::new();
            for segment in self.values(URI_PATH) {
                path.push(String::from_utf8_lossy(segment).replace('/', "%2F"));
            }
            path.join("/")
        }

        /// The first value; none if it is too long, RFC 7252 §5.4.3 (of elective options).
        pub fn uint(&self, option: u16) -> Option<u32> {
            let value = self.values(option).next()?;
            let longest = match option {
                BLOCK1 | BLOCK2 => 3,
                _ => 2,
            };
            let mut number = 0;
            for byte in value.iter().take(longest) {
                number = number << 8 | u32::from(*byte);
            }
            (value.len() <= longest).then_some(number)
        }

        pub fn block(&self, option: u16) -> Result<Block, Response> {
            let Some(value) = self.uint(option) else {
                return Ok(Block::default());
            };
            if value & 7 == 7 {
                let reason = "Reserved block size";
                return Err(Response::error(ResponseType::BadRequest, reason));
            }
            Ok(Block {
                number: value as usize >> 4,
                has_more: value & MORE != 0,
                size: 16 << (value & 7),
            })
        }

        /// RFC 7252 §5.4: critical options must be known, of a valid length, and most of them single.
        pub fn check_options(&self) -> Result<(), Response> {
            for (&number, values) in self.packet.options() {
                let (lengths, is_repeatable) = match number {
                    3 => (1..=255, false),            // Uri-Host
                    7 | ACCEPT => (0..=2, false),     // 7: Uri-Port
                    URI_PATH | 15 => (0..=255, true), // 15: Uri-Query
                    BLOCK1 | BLOCK2 => (0..=3, false),
                    35 | 39 => {
                        // Proxy-Uri, Proxy-Scheme
                        let code = ResponseType::ProxyingNotSupported;
                        return Err(Response::error(code, "This is no proxy"));
                    }
                    elective if elective % 2 == 0 => continue,
                    _ => return Err(bad_option(number, "not supported")),
                };
                let is_valid = values.iter().all(|value| lengths.contains(&value.len()));
                if !is_valid || values.len() > 1 && !is_repeatable {
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

    /// A response; message ID, type and token come from the exchange.
    pub struct Response {
        packet: Packet,
        /// Of the state that it tells; comes back with its ACK.
        pub version: Option<u64>,
        /// For the log.
        pub detail: String,
    }

    impl Response {
        /// With a diagnostic payload, RFC 7252 §5.5.2. It leaves only inside an ACK, see `encode`.
        pub fn error(code: ResponseType, reason: &str) -> Response {
            let mut packet = Packet::new();
            packet.header.code = MessageClass::Response(code);
            packet.payload = reason.as_bytes().to_vec();
            Response {
                packet,
                version: None,
                detail: reason.to_string(),
            }
        }

        pub fn failed() -> Response {
            Response::error(ResponseType::InternalServerError, "")
        }

        /// Without anything for the log.
        pub fn content(code: ResponseType, format: u32, payload: &str) -> Response {
            let mut response = Response::error(code, payload);
            response.option(CONTENT_FORMAT, format);
            response.detail.clear();
            response
        }

        pub fn text(code: ResponseType, payload: &str) -> Response {
            Response::content(code, TEXT_PLAIN, payload)
        }

        fn option(&mut self, number: u16, value: u32) {
            self.packet.add_option(number.into(), uint(value));
        }

        /// As in `2.05`.
        pub fn code(&self) -> String {
            self.packet.header.get_code()
        }
    }

    /// What a datagram turned out to be.
    pub enum Event {
        /// A reset, the reply to a duplicate, or nothing at all.
        Send(Vec<u8>),
        Request(Request),
        /// A response that told a version of the state has arrived.
        Acknowledged(u64),
    }

    /// A message that was acted on. RFC 7252 §4.5.
    struct Seen {
        digest: u64,
        expires: Instant,
        /// What a duplicate is answered with; for NON nothing.
        reply: Vec<u8>,
    }

    /// A separate CON response without its ACK. RFC 7252 §4.2.
    struct Open {
        bytes: Vec<u8>,
        retransmitted: u32,
        timeout: Duration,
        due: Instant,
        version: Option<u64>,
    }

    /// What has come of a request in blocks. RFC 7959 §2.5.
    struct Assembly {
        body: Vec<u8>,
        touched: Instant,
    }

    /// Everything about message types, message IDs and time.
    #[derive(Default)]
    pub struct Exchanges {
        last_message_id: u16,
        hasher: RandomState,
        /// In the order in which they came.
        seen: VecDeque<Seen>,
        /// By peer and message ID.
        open: BTreeMap<(SocketAddr, u16), Open>,
        /// By peer and path.
        assemblies: BTreeMap<(SocketAddr, String), Assembly>,
    }

    impl Exchanges {
        pub fn new() -> Exchanges {
            let last_message_id = random() as u16;
            Exchanges {
                last_message_id,
                ..Exchanges::default()
            }
        }

        /// Remembers nothing: `acknowledge` does, when a request is acted on.
        pub fn receive(&mut self, now: Instant, peer: SocketAddr, datagram: &[u8]) -> Event {
            if peer.ip().is_unspecified() {
                return Event::Send(Vec::new()); // firmware: it cannot be answered, and comes again
            }
            let packet = match parse(datagram) {
                Ok(packet) => packet,
                Err(reset) => return Event::Send(reset),
            };
            let (kind, id) = (packet.header.get_type(), packet.header.message_id);
            if matches!(kind, MessageType::Acknowledgement | MessageType::Reset) {
                let version = self.open.remove(&(peer, id)).and_then(|open| open.version);
                let version = version.filter(|_| kind == MessageType::Acknowledgement);
                return version.map_or(Event::Send(Vec::new()), Event::Acknowledged);
            }
            let digest = self.hasher.hash_one((peer, datagram));
            let is_twin = |seen: &&Seen| seen.digest == digest && now < seen.expires;
            if let Some(twin) = self.seen.iter().find(is_twin) {
                return Event::Send(twin.reply.clone());
            }
            Event::Request(Request {
                peer,
                at: now,
                packet,
                digest,
            })
        }

        /// Answers at once: inside the ACK, or a NON with a NON. RFC 7252 §5.2. Without a response,
        /// with an empty ACK (or nothing); then `respond` follows.
        pub fn acknowledge(&mut self, request: &Request, response: Option<&Response>) -> Vec<u8> {
            let is_over = |seen: &Seen| seen.expires <= request.at;
            while self.seen.front().is_some_and(is_over) || self.seen.len() >= SEEN_MAX {
                self.seen.pop_front();
            }
            let (mut reply, mut lifetime) = (Vec::new(), NON_LIFETIME);
            if request.is_confirmable() {
                let (kind, id) = (
                    MessageType::Acknowledgement,
                    request.packet.header.message_id,
                );
                lifetime = EXCHANGE_LIFETIME;
                reply = match response {
                    Some(response) => encode(kind, id, request, response),
                    None => empty(kind, id),
                };
            }
            self.seen.push_back(Seen {
                digest: request.digest,
                expires: request.at + lifetime,
                reply: reply.clone(),
            });
            match response {
                // RFC 7252 §5.4.1: a NON with a bad option gets silence.
                Some(response) if !request.is_confirmable() && response.code() != "4.02" => encode(
                    MessageType::NonConfirmable,
                    self.next_message_id(),
                    request,
                    response,
                ),
                _ => reply,
            }
        }

        /// The separate response to an accepted request. RFC 7252 §5.2.2.
        pub fn respond(&mut self, now: Instant, request: &Request, response: &Response) -> Vec<u8> {
            let id = self.next_message_id();
            if !request.is_confirmable() {
                return encode(MessageType::NonConfirmable, id, request, response);
            }
            let bytes = encode(MessageType::Confirmable, id, request, response);
            if self.open.len() >= OPEN_MAX {
                self.open.pop_first();
            }
            let timeout = ACK_TIMEOUT + Duration::from_millis(random() % (1 + ACK_RANDOM_MS));
            let open = Open {
                bytes: bytes.clone(),
                retransmitted: 0,
                timeout,
                due: now + timeout,
                version: response.version,
            };
            self.open.insert((request.peer, id), open);
            bytes
        }

        /// What is to be sent again now.
        pub fn retransmissions(&mut self, now: Instant) -> Vec<(SocketAddr, Vec<u8>)> {
            self.open
                .retain(|_, open| now < open.due || open.retransmitted < MAX_RETRANSMIT);
            let mut again = Vec::new();
            for ((peer, _), open) in self.open.iter_mut().filter(|(_, open)| open.due <= now) {
                again.push((*peer, open.bytes.clone()));
                open.retransmitted += 1;
                open.timeout *= 2;
                open.due = now + open.timeout;
            }
            again
        }

        /// When the next retransmission is due.
        pub fn next_due(&self) -> Option<Instant> {
            self.open.values().map(|open| open.due).min()
        }

        /// Whether the request is whole; then it has its whole body. `Err` refuses the block.
        pub fn assemble(&mut self, request: &mut Request) -> Result<bool, Response> {
            let block = request.block(BLOCK1)?;
            let (key, touched) = ((request.peer, request.path()), request.at);
            self.assemblies
                .retain(|_, known| touched < known.touched + ASSEMBLY_LIFETIME);
            let known = self.assemblies.remove(&key).filter(|_| block.number > 0);
            let mut body = known.map_or(Vec::new(), |known| known.body);
            let length = request.packet.payload.len();
            if body.len() != block.number * block.size {
                let code = ResponseType::RequestEntityIncomplete;
                return Err(Response::error(code, "A block is missing"));
            }
            if block.size > 0 && length > block.size || block.has_more && length < block.size {
                let reason = "A block is not of its size";
                return Err(Response::error(ResponseType::BadRequest, reason));
            }
            body.append(&mut request.packet.payload);
            if body.len() > BODY_MAX {
                let code = ResponseType::RequestEntityTooLarge;
                let mut response = Response::error(code, "At most 17 KiB");
                response.option(SIZE1, BODY_MAX as u32);
                return Err(response);
            }
            if !block.has_more {
                request.packet.payload = body;
                return Ok(true);
            }
            if self.assemblies.len() >= ASSEMBLIES_MAX {
                self.assemblies.pop_first();
            }
            self.assemblies.insert(key, Assembly { body, touched });
            Ok(false)
        }

        fn next_message_id(&mut self) -> u16 {
            self.last_message_id = self.last_message_id.wrapping_add(1);
            self.last_message_id
        }
    }

    /// RFC 7252 §3, §4.2 and §4.3. `Err` is the RST that a malformed CON gets, empty for others. The
    /// codec is laxer than the RFC, so what it reads must be what it would write: that leaves no
    /// marker without payload, for one.
    fn parse(datagram: &[u8]) -> Result<Packet, Vec<u8>> {
        let [first, code, high, low, ..] = *datagram else {
            return Err(Vec::new());
        };
        let (version, kind) = (first >> 6, first >> 4 & 3);
        let is_expected = match kind {
            0 | 1 => (1..32).contains(&code),      // a request
            _ => code == 0 && datagram.len() == 4, // an empty ACK or RST
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

    /// Firmware: it takes payloads outside an ACK for configuration, so an error there has none.
    fn encode(kind: MessageType, id: u16, request: &Request, response: &Response) -> Vec<u8> {
        let mut packet = response.packet.clone();
        // RFC 7959 §2.3: a response to a block says which one.
        if let Some(block) = request.uint(BLOCK1) {
            let more = if response.code() == "2.31" { MORE } else { 0 };
            packet.add_option(BLOCK1.into(), uint(block & !MORE | more));
        }
        if kind != MessageType::Acknowledgement && !response.code().starts_with('2') {
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

    /// A client's CON `POST`.
    pub fn post(path: &str, payload: &str) -> Vec<u8> {
        let [high, low, token @ ..] = random().to_be_bytes();
        let id = u16::from_be_bytes([high, low]);
        let mut packet = Packet::new();
        packet.header.code = POST.into();
        packet.header.message_id = id;
        packet.set_token(token[..4].to_vec());
        packet.add_option(URI_PATH.into(), path.as_bytes().to_vec());
        packet.payload = payload.as_bytes().to_vec();
        to_bytes(&packet)
    }
}

#[cfg(any(test, fuzzing))]
#[path = "tests/unit/fuzz.rs"]
pub mod fuzz;
#[cfg(test)]
#[path = "tests/unit/mod.rs"]
mod tests;
