//! CoAP to Telegram gateway for RIOT-OS motes, which cannot speak TLS.
//!
//! ```text
//! mote ──CoAP/UDP──▶ this program ──HTTPS──▶ Telegram Bot API ──▶ people
//! ```
//!
//! * `POST /message`, payload `url=…&token=…&chat_ids=1,2&text=…`: one `sendMessage` for each chat.
//! * `POST /update`, payload `url=…&token=…`: `getUpdates`, answered with what this mote has not heard of yet:
//!   `i5` (interval, minutes), `f1` (LED feedback), `Ada:123` (a user), `r123` (a removed one), joined with `;`.
//! * `GET /.well-known/core`: RFC 6690.
//!
//! Threads: the receive loop (`serve`), which never waits for Telegram; one for each request that needs Telegram, with
//! one more for each further chat; one that writes to people; one for the heartbeat. What they share is `Gateway`.
//!
//! The file reads top-down. A datagram travels `serve` → `coap::Exchanges::receive` → `dispatch` → `deliver_message` or
//! `fetch_update` → `Exchanges::respond`; what people write travels `poll` → `judge` → `State` → `State::tokens_for`.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write as _};
use std::net::{IpAddr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr as _;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use std::{env, iter, thread};

use coap::{Exchanges, Request, Response};
use coap_lite::ResponseType;
use log::{debug, error, info, warn};
use serde_json::{Value, json};
use ureq::config::IpFamily;
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{DefaultConnector, NextTimeout};

// ---------------------------------------------------------------------------------------------------------------------
// Limits, each with its reason
// ---------------------------------------------------------------------------------------------------------------------

/// Telegram must have answered by then, counted from the request's arrival: the mote is answered within 9 s (its client
/// stops waiting 10 s after the empty ACK), and half a second is left for a slow SD card.
const TELEGRAM_BUDGET: Duration = Duration::from_millis(8500);
/// Share of it for one connection (TCP and TLS, over all addresses of the host): leaves time for a second attempt.
const CONNECT_BUDGET: Duration = Duration::from_secs(5);
/// Calls that surely did not reach Telegram, and HTTP 429, are tried this often in all.
const ATTEMPTS: u32 = 3;
const ATTEMPT_PAUSE: Duration = Duration::from_millis(500);
/// Idle connections to Telegram: a message costs one round trip when it finds one. Telegram closes them after
/// about a minute itself.
const IDLE_CONNECTIONS: usize = coap::IN_PROGRESS_MAX;
const IDLE_AGE: Duration = Duration::from_secs(60);
/// How long the addresses of a host are kept: ureq asks for them on every call, also when a connection is open.
const ADDRESS_AGE: Duration = Duration::from_secs(60);
/// Of one answer of the Bot API: 100 updates of 4,096 characters, each `\uXXXX`, with the message replied to.
const BODY_MAX: u64 = 8 << 20;
/// Bot API, getUpdates: updates in one page.
const PAGE: usize = 100;
/// Of an error description in the log, characters.
const DESCRIPTION_MAX: usize = 200;
/// Bot API, sendMessage: characters of a text.
const TEXT_MAX: usize = 4096;
/// Firmware: users it keeps, hence chats it can name in one message.
const USERS_MAX: usize = 10;
/// Removals told to a mote that asks for the first time; older ones are forgotten.
const REMOVALS_MAX: usize = 10;
/// Motes whose acknowledged changes are known; the longest silent is forgotten, and told everything again.
const MOTES_MAX: usize = 64;
/// Firmware: bytes of a user's name.
const NAME_MAX: usize = 14;
/// Firmware: 11 characters of a chat id; it cuts longer ones, so that they name another chat.
const CHAT_ID_MAX: i64 = 99_999_999_999;
/// Firmware: bytes of a reply; a longer one is thrown away whole.
const REPLY_MAX: usize = 302;
/// Wrong passwords in a row from one chat, after which its `config` is ignored for `LOCK_SECONDS`.
const WRONG_PASSWORDS_MAX: u32 = 5;
const LOCK_SECONDS: u64 = 3600;
/// Chats whose wrong passwords are counted: what a flood of strangers can take of memory.
const SUSPECTS_MAX: usize = 256;
/// Answers to people that wait to be sent: ten full pages of updates.
const ANSWERS_MAX: usize = 1000;
/// Of `coap_server.log`, bytes; then it becomes `coap_server.log.1`.
const LOG_MAX: u64 = 1 << 20;
const HEARTBEAT: Duration = Duration::from_secs(15 * 60);
/// Longest sleep of the receive loop: a response that another thread has just opened is retransmitted 2 s later at the
/// earliest, so it is seen in time.
const TICK: Duration = Duration::from_secs(1);
/// Of a thread: TLS needs about 100 KiB in an unoptimised build.
const STACK: usize = 512 << 10;

const MESSAGES_SENT: &[u8] = b"Messages sent successfully";
const NO_UPDATES: &[u8] = b"No Updates";
const MISSING_FIELDS: &str = "Missing required fields";
const CORE_LINKS: [(&str, &str); 2] = [("/message", "telegram.message"), ("/update", "telegram.update")];

const HELP: &str = "I pass on what the sensors report.\n\
    remove me - no more messages\n\
    config <password> interval <1..120> - minutes between two reports\n\
    config <password> feedback <0|1> - LED feedback off or on\n\
    help - this text";
const CONFIG_FORM: &str = "Allowed is: config <password> interval <1..120>, or: config <password> feedback <0|1>. \
    Nothing was changed.";

const USAGE: &str = "\
usage: coap_websocket                serve
       coap_websocket check          test the configuration and the way to Telegram
       coap_websocket send -i <chat-id> -m <message> [-u coap://[address]:port]
                                     send one message through a running gateway
       coap_websocket --help | --version";

// ---------------------------------------------------------------------------------------------------------------------
// Program start: arguments and configuration
// ---------------------------------------------------------------------------------------------------------------------

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match Command::parse(&words) {
        Ok(Command::Help) => {
            say(USAGE);
            Ok(())
        }
        Ok(Command::Version) => {
            say(concat!("coap_websocket ", env!("CARGO_PKG_VERSION")));
            Ok(())
        }
        Ok(Command::Serve) => Config::load().and_then(serve).map(|never| match never {}),
        Ok(Command::Check) => Config::load().and_then(|config| check(&config)),
        Ok(Command::Send { chat, text, to }) => Config::load().and_then(|config| send(&config, &chat, &text, to)),
        Err(reason) => {
            let _ = writeln!(io::stderr(), "coap_websocket: {reason}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    outcome.map_or_else(
        |reason| {
            let _ = writeln!(io::stderr(), "coap_websocket: {reason}");
            ExitCode::FAILURE
        },
        |()| ExitCode::SUCCESS,
    )
}

/// `println!`, but a closed pipe is no reason to panic.
fn say(text: &str) {
    let _ = writeln!(io::stdout(), "{text}");
}

/// What the command line asks for.
#[derive(Debug, PartialEq)]
enum Command {
    Serve,
    Check,
    Send { chat: String, text: String, to: Option<String> },
    Help,
    Version,
}

impl Command {
    fn parse(words: &[&str]) -> Result<Command, String> {
        match words {
            [] => Ok(Command::Serve),
            ["check"] => Ok(Command::Check),
            ["--help" | "-h"] => Ok(Command::Help),
            ["--version" | "-V"] => Ok(Command::Version),
            ["send", options @ ..] => Self::parse_send(options),
            [word, ..] => Err(format!("unknown argument `{}`", word.escape_default())),
        }
    }

    fn parse_send(options: &[&str]) -> Result<Command, String> {
        let (mut chat, mut text, mut to) = (None, None, None);
        for pair in options.chunks(2) {
            let (slot, value) = match *pair {
                ["-i", value] => (&mut chat, value),
                ["-m", value] => (&mut text, value),
                ["-u", value] if value.starts_with("coap://") => (&mut to, value),
                [option, ..] => {
                    return Err(format!("send: unknown or incomplete option `{}`", option.escape_default()));
                }
                [] => unreachable!("chunks are not empty"),
            };
            *slot = Some(value.to_string());
        }
        match (chat, text) {
            (Some(chat), Some(text)) => Ok(Command::Send { chat, text, to }),
            _ => Err("send: needs -i <chat-id> and -m <message>".to_string()),
        }
    }
}

/// A token or a password. It has neither `Debug` nor `Display`, so it cannot get into a log line by accident.
#[derive(Clone)]
struct Secret(String);

impl Secret {
    /// A bot token, `<bot id>:<letters, digits, _ and ->`, so that it can stand in a URL as it is.
    fn token(text: &str) -> Option<Secret> {
        let (id, key) = text.split_once(':')?;
        let digits = (1..=20).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_digit());
        let letters =
            (1..=100).contains(&key.len()) && key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
        (digits && letters).then(|| Secret(text.to_string()))
    }

    /// The part of a bot token before the colon: the bot's user id, which is public.
    fn bot_id(&self) -> &str {
        self.0.split(':').next().unwrap_or_default()
    }

    /// Compares in a time that depends on the guess alone.
    fn is(&self, guess: &str) -> bool {
        let (own, guess) = (self.0.as_bytes(), guess.as_bytes());
        let unlike = guess.iter().enumerate().fold(own.len() ^ guess.len(), |unlike, (at, byte)| {
            unlike | usize::from(byte ^ own.get(at % own.len().max(1)).unwrap_or(&0))
        });
        std::hint::black_box(unlike) == 0
    }
}

/// What the operator has set, checked.
struct Config {
    /// The only Bot API url that is served and connected to.
    url: String,
    /// `None`: `/message` serves any token, `/update` the first bot that Telegram accepts.
    token: Option<Secret>,
    ip_family: IpFamily,
    /// `None`: every `config` is refused.
    password: Option<Secret>,
    /// IP address, perhaps with a zone (`fe80::1%usb0`), hence not an `IpAddr`: the zone may not exist yet.
    address: String,
    port: u16,
    level: log::LevelFilter,
    proxy: Option<ureq::Proxy>,
    /// Instead of the built-in Mozilla roots.
    roots: Option<Vec<ureq::tls::Certificate<'static>>>,
    state_path: PathBuf,
    log_path: PathBuf,
    /// For the log, once there is one.
    warnings: Vec<String>,
}

impl Config {
    /// Reads `config.ini`, `.env` and the environment. An error is one line that names file, line and reason.
    fn load() -> Result<Config, String> {
        let credentials = directory("CREDENTIALS_DIRECTORY");
        let dot_env = credentials.as_ref().map_or(PathBuf::from(".env"), |dir| dir.join("env"));
        let ini = credentials.unwrap_or_default().join("config.ini");
        let variables = parse_env(&dot_env, &read_optional(&dot_env)?)?;
        let mut warnings = Vec::new();
        let telegram = parse_ini(&ini, &read_optional(&ini)?, &mut warnings)?;

        let ini_value = |key| telegram.get(key).map(|(value, origin)| (value.as_str(), origin.clone()));
        let (url, origin) = ini_value("url").unwrap_or(("https://api.telegram.org/bot", String::new()));
        check_url(url).map_err(|reason| format!("{origin}: url {reason}"))?;
        let token = match ini_value("bot_token").filter(|(value, _)| !["", "your_telegram_bot_token"].contains(value)) {
            Some((text, origin)) => Some(Secret::token(text).ok_or(format!(
                "{origin}: bot_token is not a bot token (digits, a colon, letters, as BotFather shows it)"
            ))?),
            None => None,
        };
        let ip_family = match ini_value("ip_family") {
            None | Some(("any", _)) => IpFamily::Any,
            Some(("ipv4", _)) => IpFamily::Ipv4Only,
            Some(("ipv6", _)) => IpFamily::Ipv6Only,
            Some((other, origin)) => {
                return Err(format!("{origin}: ip_family `{}` is none of any, ipv4, ipv6", other.escape_default()));
            }
        };
        let variable = |name| lookup(&variables, name);
        let (address, origin) = variable("COAP_SERVER_IP").unwrap_or(("::1".to_string(), String::new()));
        let (ip, zone) = address.split_once('%').map_or((address.as_str(), None), |(ip, zone)| (ip, Some(zone)));
        if ip.parse::<IpAddr>().is_err() || zone == Some("") || (zone.is_some() && !ip.contains(':')) {
            return Err(format!("{origin}: COAP_SERVER_IP `{}` is not an IP address", address.escape_default()));
        }
        Ok(Config {
            url: url.to_string(),
            token,
            ip_family,
            password: password(variable("PASSWORD"))?,
            address,
            port: match variable("COAP_SERVER_PORT") {
                None => coap::PORT,
                Some((text, origin)) => text.parse().map_err(|_| {
                    format!("{origin}: COAP_SERVER_PORT `{}` is not a port (0 to 65535)", text.escape_default())
                })?,
            },
            level: log_level(variable("RUST_LOG"), &mut warnings),
            proxy: proxy(variable("HTTPS_PROXY"))?,
            roots: variable("SSL_CERT_FILE").map(|(path, origin)| read_roots(&path, &origin)).transpose()?,
            state_path: directory("STATE_DIRECTORY").unwrap_or_default().join("state.json"),
            log_path: directory("LOGS_DIRECTORY").unwrap_or_default().join("coap_server.log"),
            warnings,
        })
    }
}

/// A directory that systemd names; of several, separated by colons, the first.
fn directory(variable: &str) -> Option<PathBuf> {
    let value = env::var(variable).ok()?;
    value.split(':').next().filter(|first| !first.is_empty()).map(PathBuf::from)
}

/// An empty text where there is no such file.
fn read_optional(path: &Path) -> Result<String, String> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(String::new()),
        Err(error) => return Err(format!("cannot read {}: {error}", path.display())),
    };
    String::from_utf8(bytes).map_err(|error| {
        let line = 1 + error.as_bytes()[..error.utf8_error().valid_up_to()].iter().filter(|&&b| b == b'\n').count();
        format!("{}:{line}: not UTF-8 text", path.display())
    })
}

/// The lines that say something, with their numbers.
fn lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    (1..).zip(text.lines().map(str::trim)).filter(|(_, line)| !line.is_empty() && !line.starts_with(['#', ';']))
}

/// Names, their values, and where they stand (`.env:3`).
type Settings = BTreeMap<String, (String, String)>;

/// What stands in the section `[telegram]`. Other sections belong to the firmware's build.
fn parse_ini(path: &Path, text: &str, warnings: &mut Vec<String>) -> Result<Settings, String> {
    let mut telegram = Settings::new();
    let mut section = None;
    for (number, line) in lines(text) {
        let origin = format!("{}:{number}", path.display());
        if let Some(name) = line.strip_prefix('[') {
            section = Some(name.strip_suffix(']').ok_or(format!("{origin}: `[` without `]`"))?.trim());
            continue;
        }
        let (key, value) = line.split_once('=').ok_or(format!("{origin}: neither `[section]` nor `key = value`"))?;
        let key = key.trim().to_ascii_lowercase();
        match section {
            None => return Err(format!("{origin}: stands before the first section; put [telegram] above it")),
            Some("telegram") if !["bot_token", "url", "ip_family"].contains(&key.as_str()) => {
                warnings.push(format!("{origin}: unknown key `{}` is ignored", key.escape_default()));
            }
            Some("telegram") => {
                if let Some((_, first)) = telegram.insert(key, (value.trim().to_string(), origin.clone())) {
                    return Err(format!("{origin}: set before in {first}; remove one of them"));
                }
            }
            Some(_) => {}
        }
    }
    Ok(telegram)
}

fn parse_env(path: &Path, text: &str) -> Result<Settings, String> {
    let mut variables = Settings::new();
    for (number, line) in lines(text) {
        let origin = format!("{}:{number}", path.display());
        let (name, value) = line
            .strip_prefix("export ")
            .unwrap_or(line)
            .split_once('=')
            .map(|(name, value)| (name.trim(), value.trim()))
            .filter(|(name, _)| !name.is_empty() && !name.contains(char::is_whitespace))
            .ok_or(format!("{origin}: not `NAME=value`"))?;
        let quoted = ['"', '\''].iter().find_map(|&q| value.strip_prefix(q)?.strip_suffix(q));
        variables.insert(name.to_string(), (quoted.unwrap_or(value).to_string(), origin));
    }
    Ok(variables)
}

/// A variable and where it was set: the real environment wins, and an empty one is not set.
fn lookup(dot_env: &Settings, name: &str) -> Option<(String, String)> {
    let real = env::var_os(name).map(|value| (value.to_string_lossy().into_owned(), "environment".to_string()));
    real.filter(|(value, _)| !value.is_empty())
        .or_else(|| dot_env.get(name).cloned())
        .filter(|(value, _)| !value.is_empty())
}

fn check_url(url: &str) -> Result<(), &'static str> {
    let uri: ureq::http::Uri = url.parse().map_err(|_| "is not a URL")?;
    match (uri.scheme_str(), uri.host(), uri.query()) {
        (Some("https"), Some(host), None) if !host.is_empty() && !url.contains('#') => Ok(()),
        _ => Err("is not of the form https://host/bot"),
    }
}

fn password(variable: Option<(String, String)>) -> Result<Option<Secret>, String> {
    match variable {
        Some((text, origin)) if text.contains(char::is_whitespace) => {
            Err(format!("{origin}: PASSWORD holds white space, so nobody could write it in a `config` message"))
        }
        other => Ok(other.map(|(text, _)| Secret(text))),
    }
}

fn log_level(variable: Option<(String, String)>, warnings: &mut Vec<String>) -> log::LevelFilter {
    let Some((text, origin)) = variable else { return log::LevelFilter::Info };
    log::LevelFilter::from_str(&text).unwrap_or_else(|_| {
        warnings.push(format!("{origin}: RUST_LOG is none of off, error, warn, info, debug; info is used"));
        log::LevelFilter::Info
    })
}

/// `HTTPS_PROXY` wins; else what ureq finds in the environment (`ALL_PROXY`, `https_proxy`, with `NO_PROXY`).
fn proxy(variable: Option<(String, String)>) -> Result<Option<ureq::Proxy>, String> {
    let Some((text, origin)) = variable else {
        return Ok(ureq::Proxy::try_from_env().filter(|proxy| is_http(proxy.protocol())));
    };
    // Its value may hold a password, so it is not repeated. ureq panics on SOCKS without the feature for it.
    let proxy = ureq::Proxy::new(&text).ok().filter(|proxy| is_http(proxy.protocol()));
    proxy.map(Some).ok_or(format!("{origin}: HTTPS_PROXY is not of the form http://host:port"))
}

fn is_http(protocol: ureq::ProxyProtocol) -> bool {
    matches!(protocol, ureq::ProxyProtocol::Http | ureq::ProxyProtocol::Https)
}

fn read_roots(path: &str, origin: &str) -> Result<Vec<ureq::tls::Certificate<'static>>, String> {
    let pem = fs::read(path).map_err(|error| format!("{origin}: cannot read SSL_CERT_FILE {path}: {error}"))?;
    let roots: Vec<_> = ureq::tls::parse_pem(&pem)
        .filter_map(|item| match item {
            Ok(ureq::tls::PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    if roots.is_empty() {
        return Err(format!("{origin}: SSL_CERT_FILE {path} holds no PEM certificate"));
    }
    Ok(roots)
}

// ---------------------------------------------------------------------------------------------------------------------
// The receive loop
// ---------------------------------------------------------------------------------------------------------------------

/// What the threads share.
struct Gateway {
    config: Config,
    telegram: Telegram,
    /// Answers leave from the socket that received: gcoap matches a response by the server's address and port.
    socket: UdpSocket,
    /// Never locked across I/O, so that the receive loop never waits.
    exchanges: Mutex<Exchanges>,
    /// Never locked across I/O either; see `save`.
    state: Mutex<State>,
    /// What `state.json` holds; locked while it is written.
    saved: Mutex<String>,
    /// Whether somebody fetches updates, for they are handled by one request at a time.
    polling: Mutex<bool>,
    polled: Condvar,
    /// To the thread that writes to people.
    answers: SyncSender<(Secret, Answer)>,
    forwarded: AtomicU64,
    failures: AtomicU64,
}

/// A poisoned lock means a panic in a debug build; what it guards is still whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_secs())
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name.to_string()).stack_size(STACK).spawn(run).map(drop)
}

/// Serves for ever. Faults of the start end it; afterwards nothing that a datagram holds does.
fn serve(config: Config) -> Result<Infallible, String> {
    start_log(&config)?;
    config.warnings.iter().for_each(|warning| warn!("{warning}"));
    if config.token.is_none() {
        warn!("no bot_token in config.ini: /message serves any token, /update the first bot that Telegram accepts");
    }
    let state = open_state(&config)?;
    notify("READY=1");
    let socket = bind(&config)?;
    let local = socket.local_addr().map_err(|error| format!("cannot read the socket's address: {error}"))?;
    info!("coap_websocket {} serves CoAP on {local}", env!("CARGO_PKG_VERSION"));
    notify(&format!("STATUS=Serves CoAP on {local}"));

    let (answers, queue) = mpsc::sync_channel(ANSWERS_MAX);
    let gateway = Arc::new(Gateway {
        telegram: Telegram::new(&config),
        socket,
        exchanges: Mutex::new(Exchanges::new(coap::random())),
        state: Mutex::new(state),
        saved: Mutex::default(),
        polling: Mutex::new(false),
        polled: Condvar::new(),
        answers,
        forwarded: AtomicU64::new(0),
        failures: AtomicU64::new(0),
        config,
    });
    // At once: what people write from now on must not count as older than the first start after a crash.
    gateway.save()?;
    let (writer, heart) = (Arc::clone(&gateway), Arc::clone(&gateway));
    spawn("answers", move || write_to_people(&writer, &queue)).map_err(|error| format!("cannot start: {error}"))?;
    spawn("heartbeat", move || heartbeat(&heart)).map_err(|error| format!("cannot start: {error}"))?;
    receive_loop(&gateway)
}

fn receive_loop(gateway: &Arc<Gateway>) -> ! {
    let mut watchdog = Watchdog::new();
    let mut datagram = [0; coap::DATAGRAM_MAX];
    loop {
        let now = Instant::now();
        watchdog.feed(now);
        let (resend, next) = lock(&gateway.exchanges).due(now);
        for (peer, bytes) in resend {
            gateway.transmit(peer, &bytes);
        }
        let sleep = next.map_or(TICK, |due| due.saturating_duration_since(now)).clamp(Duration::from_millis(1), TICK);
        let _ = gateway.socket.set_read_timeout(Some(sleep));
        match gateway.socket.recv_from(&mut datagram) {
            Ok((length, peer)) => receive(gateway, peer, &datagram[..length]),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => {
                warn!("cannot receive: {error}");
                thread::sleep(TICK);
            }
        }
    }
}

/// Waits for an address that does not exist yet: READY was said before, for a unit that waits would hold up the boot.
fn bind(config: &Config) -> Result<UdpSocket, String> {
    const NO_SUCH_DEVICE: i32 = 19; // ENODEV: the interface of a zone went away
    let name = SocketName(&config.address, config.port);
    let mut watchdog = Watchdog::new();
    let mut told = false;
    loop {
        let error = match UdpSocket::bind((config.address.as_str(), config.port)) {
            Ok(socket) => return Ok(socket),
            Err(error) => error,
        };
        // A zone that names no interface fails in the look-up, which has no OS error.
        let absent = error.kind() == io::ErrorKind::AddrNotAvailable
            || matches!(error.raw_os_error(), None | Some(NO_SUCH_DEVICE));
        if !absent {
            return Err(format!("cannot bind {name}: {error}"));
        }
        if !told {
            warn!("address {name} does not exist yet; trying every second");
            notify(&format!("STATUS=Waits for address {name} to appear"));
            told = true;
        }
        watchdog.feed(Instant::now());
        thread::sleep(TICK);
    }
}

struct SocketName<'a>(&'a str, u16);

impl std::fmt::Display for SocketName<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0.contains(':') {
            true => write!(f, "[{}]:{}", self.0, self.1),
            false => write!(f, "{}:{}", self.0, self.1),
        }
    }
}

fn receive(gateway: &Arc<Gateway>, peer: SocketAddr, datagram: &[u8]) {
    let event = lock(&gateway.exchanges).receive(Instant::now(), peer, datagram);
    match event {
        coap::Event::Nothing => {}
        coap::Event::Send(bytes) => gateway.transmit(peer, &bytes),
        coap::Event::Request(request) => dispatch(gateway, request),
        coap::Event::Refused => info!("{peer} did not want the response (RST); changes in it are offered again"),
        coap::Event::Acknowledged(None) => {}
        coap::Event::Acknowledged(Some(sequence)) => {
            lock(&gateway.state).acknowledge(mote(peer), sequence);
            let gateway = Arc::clone(gateway);
            // Not here: the disk may be slow. If it fails, the next save has it, or the mote is told again.
            let _ = spawn("save", move || {
                gateway.save().unwrap_or_else(|reason| error!("{reason}"));
            });
        }
    }
}

/// A mote is told apart by its address alone: gcoap picks its port anew.
fn mote(peer: SocketAddr) -> IpAddr {
    peer.ip().to_canonical()
}

/// Answers at once what needs no Telegram; everything else gets its empty ACK and a thread.
fn dispatch(gateway: &Arc<Gateway>, mut request: Request) {
    let work = match prepare(gateway, &mut request) {
        Ok(Some(work)) => work,
        Ok(None) => return,
        Err(response) => {
            let reason =
                if response.code().starts_with('2') { "".into() } else { String::from_utf8_lossy(&response.payload) };
            log_outcome(&request, &response, &reason);
            let bytes = lock(&gateway.exchanges).reply(&request, response);
            return gateway.transmit(request.peer, &bytes);
        }
    };
    let acknowledgement = lock(&gateway.exchanges).accept(&request);
    gateway.transmit(request.peer, &acknowledgement);
    let (worker, accepted) = (Arc::clone(gateway), request.clone());
    let started = spawn("request", move || {
        let deadline = accepted.at + TELEGRAM_BUDGET;
        let outcome = match work {
            Work::Nothing => Outcome::text(ResponseType::Content, MESSAGES_SENT, String::new()),
            Work::Message(form) => deliver_message(&worker, &form, mote(accepted.peer), deadline),
            Work::Update(token) => fetch_update(&worker, &token, &accepted, deadline),
        };
        worker.respond(&accepted, outcome);
    });
    if let Err(error) = started {
        gateway.respond(&request, Outcome::failed(format!("cannot start a thread: {error}")));
    }
}

/// What a request needs Telegram for.
enum Work {
    Message(Form),
    Update(Secret),
    /// A further block of the answer to a message: nothing is sent again.
    Nothing,
}

/// From a well-formed message to a decision. `Err` is the immediate answer; `None` leaves the request unanswered, so
/// that its sender's own retransmission brings it back when there is room.
fn prepare(gateway: &Gateway, request: &mut Request) -> Result<Option<Work>, Response> {
    let resource = route(request)?;
    if resource == Resource::Core {
        return Err(discovery(request));
    }
    let mut exchanges = lock(&gateway.exchanges);
    if !exchanges.has_room() {
        return Ok(None);
    }
    exchanges.assemble(request)?;
    drop(exchanges);
    let pinned = lock(&gateway.state).bot.clone();
    judge_request(&gateway.config, pinned.as_deref(), resource, request).map(Some)
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Resource {
    Message,
    Update,
    Core,
}

/// Path, method and formats. RFC 7252 §5.10 and §5.8.
fn route(request: &Request) -> Result<Resource, Response> {
    use ResponseType::{MethodNotAllowed, NotAcceptable, NotFound, UnsupportedContentFormat};
    let (resource, method, format) = match request.path().as_str() {
        "message" => (Resource::Message, coap::POST, coap::TEXT_PLAIN),
        "update" => (Resource::Update, coap::POST, coap::TEXT_PLAIN),
        ".well-known/core" => (Resource::Core, coap::GET, coap::LINK_FORMAT),
        _ => return Err(Response::error(NotFound, "No such resource")),
    };
    if request.code != method {
        return Err(Response::error(MethodNotAllowed, "Method not allowed"));
    }
    if method == coap::POST && request.uint(coap::CONTENT_FORMAT).is_some_and(|given| given != coap::TEXT_PLAIN) {
        return Err(Response::error(UnsupportedContentFormat, "Only text/plain"));
    }
    if request.uint(coap::ACCEPT).is_some_and(|wanted| wanted != format) {
        return Err(Response::error(NotAcceptable, "Not available in this format"));
    }
    Ok(resource)
}

/// The links that match every `name=value` of the query; `*` at the end of a value stands for anything. RFC 6690 §4.1.
fn discovery(request: &Request) -> Response {
    let queries = request.queries();
    let matches = |(href, rt): &(&str, &str)| {
        queries.iter().all(|query| {
            let (name, value) = query.split_once('=').unwrap_or((query, "*"));
            let own = match name {
                "href" => *href,
                "rt" => *rt,
                "ct" => "0",
                _ => return false,
            };
            value.strip_suffix('*').map_or(own == value, |start| own.starts_with(start))
        })
    };
    let links: Vec<String> =
        CORE_LINKS.iter().filter(|link| matches(link)).map(|(href, rt)| format!("<{href}>;rt=\"{rt}\";ct=0")).collect();
    Response::content(ResponseType::Content, links.join(",").as_bytes(), coap::LINK_FORMAT).in_block2(request)
}

/// Whether the form can be carried out.
fn judge_request(config: &Config, pinned: Option<&str>, what: Resource, request: &Request) -> Result<Work, Response> {
    if request.block2()?.is_some_and(|block| block.number > 0) {
        return match what {
            Resource::Message if request.payload.is_empty() => Ok(Work::Nothing),
            _ => Err(Response::error(ResponseType::BadRequest, "No such block")),
        };
    }
    let form = Form::parse(&request.payload)?;
    if form.url != config.url {
        return Err(Response::error(ResponseType::Forbidden, "This gateway does not serve that url"));
    }
    let served = match (&config.token, what) {
        (Some(own), _) => own.is(&form.token.0),
        (None, Resource::Update) => pinned.is_none_or(|bot| bot == form.token.bot_id()),
        (None, _) => true,
    };
    if !served {
        return Err(Response::error(ResponseType::Forbidden, "This gateway does not serve that token"));
    }
    match what {
        Resource::Message => form.check_message().map(Work::Message),
        _ => form.check_token().map(|form| Work::Update(form.token)),
    }
}

/// The fields of a payload, which are not percent-encoded.
struct Form {
    url: String,
    /// Perhaps not well-formed, see `check_token`; a secret from the start.
    token: Secret,
    chats: String,
    text: String,
    /// `chats`, parsed.
    ids: Vec<ChatId>,
}

impl Form {
    /// A key separates only where it stands at the start or behind `&`, and only once: a text may hold anything else.
    fn parse(payload: &[u8]) -> Result<Form, Response> {
        const KEYS: [&str; 4] = ["url=", "token=", "chat_ids=", "text="];
        let payload = String::from_utf8_lossy(payload);
        let payload = trim(&payload);
        let mut starts: Vec<(usize, usize)> = Vec::new();
        for (field, key) in KEYS.iter().enumerate() {
            let behind = || payload.find(&format!("&{key}"));
            if let Some(at) = payload.starts_with(key).then_some(0).or_else(behind) {
                starts.insert(starts.partition_point(|start| start.0 < at), (at, field));
            }
        }
        let mut values = [""; 4];
        for (index, &(start, field)) in starts.iter().enumerate() {
            let end = starts.get(index + 1).map_or(payload.len(), |next| next.0);
            let start = start + KEYS[field].len() + usize::from(payload[start..].starts_with('&'));
            values[field] = trim(&payload[start..end]);
        }
        let [url, token, chats, text] = values.map(str::to_string);
        if url.is_empty() || token.is_empty() {
            return Err(bad_request(MISSING_FIELDS));
        }
        Ok(Form { url, token: Secret(token), chats, text, ids: Vec::new() })
    }

    fn check_token(self) -> Result<Form, Response> {
        Secret::token(&self.token.0).map(|token| Form { token, ..self }).ok_or(bad_request("Malformed token"))
    }

    fn check_message(self) -> Result<Form, Response> {
        let mut ids = Vec::new();
        for entry in self.chats.split(',').map(trim).filter(|entry| !entry.is_empty()) {
            let id = ChatId::parse(entry).ok_or(bad_request("Malformed chat id"))?;
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
        match () {
            () if ids.is_empty() || self.text.is_empty() => Err(bad_request(MISSING_FIELDS)),
            () if ids.len() > USERS_MAX => Err(bad_request("Too many chat ids, at most 10")),
            () if self.text.chars().count() > TEXT_MAX => Err(bad_request("Text too long, at most 4096 characters")),
            () => Form { ids, ..self }.check_token(),
        }
    }
}

fn bad_request(reason: &str) -> Response {
    Response::error(ResponseType::BadRequest, reason)
}

/// Firmware: payloads are padded with NUL, texts may end in a line feed.
fn trim(text: &str) -> &str {
    text.trim_matches(|c: char| c == '\0' || c.is_whitespace())
}

/// Bot API, `chat_id`: "unique identifier for the target chat or username of the target channel".
#[derive(Clone, Debug, PartialEq)]
enum ChatId {
    Number(i64),
    Channel(String),
}

impl ChatId {
    fn parse(text: &str) -> Option<ChatId> {
        if let Some(name) = text.strip_prefix('@') {
            let valid = (1..=32).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
            return valid.then(|| ChatId::Channel(text.to_string()));
        }
        text.parse().ok().filter(|_| !text.starts_with('+')).map(ChatId::Number)
    }

    fn json(&self) -> Value {
        match self {
            ChatId::Number(id) => json!(id),
            ChatId::Channel(name) => json!(name),
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Requests that need Telegram
// ---------------------------------------------------------------------------------------------------------------------

/// How a request ended.
struct Outcome {
    response: Response,
    /// The change up to which the mote has heard everything once it acknowledges the response.
    delivers: Option<u64>,
    /// For the log.
    detail: String,
}

impl Outcome {
    fn failed(detail: String) -> Outcome {
        Outcome { response: Response::error(ResponseType::InternalServerError, ""), delivers: None, detail }
    }

    fn text(code: ResponseType, text: &[u8], detail: String) -> Outcome {
        Outcome { response: Response::content(code, text, coap::TEXT_PLAIN), delivers: None, detail }
    }
}

impl Gateway {
    /// A datagram that cannot be sent is one that was lost: CoAP retransmits.
    fn transmit(&self, peer: SocketAddr, bytes: &[u8]) {
        if !bytes.is_empty()
            && let Err(error) = self.socket.send_to(bytes, peer)
        {
            debug!("cannot send to {peer}: {error}");
        }
    }

    fn respond(&self, request: &Request, outcome: Outcome) {
        let response = outcome.response.in_block2(request);
        log_outcome(request, &response, &outcome.detail);
        let bytes = lock(&self.exchanges).respond(Instant::now(), request, response, outcome.delivers, coap::random());
        self.transmit(request.peer, &bytes);
    }

    /// Writes `state.json` if it is not what it should be. Call it without a lock.
    fn save(&self) -> Result<(), String> {
        let mut saved = lock(&self.saved);
        let text = lock(&self.state).to_json();
        if *saved != text {
            let path = &self.config.state_path;
            replace(path, &text).map_err(|error| format!("cannot write {}: {error}", path.display()))?;
            *saved = text;
        }
        Ok(())
    }
}

/// Sends the text to every chat that has not asked to be left alone.
fn deliver_message(gateway: &Gateway, form: &Form, mote: IpAddr, deadline: Instant) -> Outcome {
    let chats: Vec<&ChatId> = {
        let mut state = lock(&gateway.state);
        if state.notice_restart(mote, &form.ids) {
            info!("{mote} does not know its users any more: it will be told everything again");
        }
        form.ids.iter().filter(|id| !state.is_removed(id)).collect()
    };
    let results = gateway.telegram.send_to_all(&form.token, &chats, &form.text, deadline);
    for (chat, failure) in iter::zip(&chats, &results).filter_map(|(chat, result)| Some((chat, result.as_ref().err()?)))
    {
        warn!("sendMessage to {} failed: {}", chat.json(), failure.reason);
        if let (Some(403), ChatId::Number(id)) = (failure.code, chat) {
            let user = lock(&gateway.state).remove(*id, false); // not as an argument of info!, which may be off
            info!("{user} is removed, for Telegram refuses messages to it");
        }
    }
    gateway.save().unwrap_or_else(|reason| error!("{reason}"));
    let sent = results.iter().filter(|result| result.is_ok()).count();
    gateway.forwarded.fetch_add(sent as u64, Relaxed);
    gateway.failures.fetch_add((results.len() - sent) as u64, Relaxed);
    let detail = format!("{sent} of {} chats", form.ids.len());
    match chats.is_empty() || sent > 0 {
        true => Outcome::text(ResponseType::Content, MESSAGES_SENT, detail),
        false => Outcome::failed(detail),
    }
}

/// Fetches what people wrote, then answers with what this mote has not acknowledged.
fn fetch_update(gateway: &Gateway, token: &Secret, request: &Request, deadline: Instant) -> Outcome {
    if let Err(reason) = poll(gateway, token, deadline) {
        gateway.failures.fetch_add(1, Relaxed);
        return Outcome::failed(reason);
    }
    // A block that is not valid was answered before.
    let limit = request.block2().ok().flatten().map_or(REPLY_MAX, |block| block.size().min(REPLY_MAX));
    let (tokens, last, left) = lock(&gateway.state).tokens_for(mote(request.peer), limit);
    match last {
        None if left == 0 => Outcome::text(ResponseType::Valid, NO_UPDATES, String::new()),
        None => Outcome::failed(format!("no change fits into blocks of {limit} bytes")),
        Some(_) => {
            let detail = format!("{tokens}, {left} left for the next poll");
            let detail = if left == 0 { tokens.clone() } else { detail };
            Outcome { delivers: last, ..Outcome::text(ResponseType::Content, tokens.as_bytes(), detail) }
        }
    }
}

/// Handles every waiting update. Progress is saved before it is confirmed to Telegram (by the next page's offset) and
/// before anybody is answered.
fn poll(gateway: &Gateway, token: &Secret, deadline: Instant) -> Result<(), String> {
    let remaining = deadline.saturating_duration_since(Instant::now());
    let turn = gateway.polled.wait_timeout_while(lock(&gateway.polling), remaining, |busy| *busy);
    let (mut busy, waited) = turn.unwrap_or_else(PoisonError::into_inner);
    if waited.timed_out() {
        return Err("getUpdates: another request still waits for Telegram".to_string());
    }
    *busy = true;
    drop(busy);
    let result = poll_pages(gateway, token, deadline);
    *lock(&gateway.polling) = false;
    gateway.polled.notify_one();
    result
}

fn poll_pages(gateway: &Gateway, token: &Secret, deadline: Instant) -> Result<(), String> {
    loop {
        gateway.save()?; // Nothing to do, unless the last time it failed.
        let offset = lock(&gateway.state).offset;
        let parameters = json!({"offset": offset, "limit": PAGE, "timeout": 0, "allowed_updates": ["message"]});
        let result = gateway
            .telegram
            .call(token, "getUpdates", &parameters, deadline)
            .map_err(|failure| format!("getUpdates: {}", failure.reason))?;
        let updates = result.as_array().ok_or("getUpdates: Telegram's answer is not a list")?;
        {
            let mut state = lock(&gateway.state);
            if state.bot.as_deref().is_some_and(|bot| bot != token.bot_id()) {
                return Err("getUpdates: another bot was served first".to_string());
            }
            state.bot = Some(token.bot_id().to_string());
            updates.iter().for_each(|update| handle_update(&mut state, update, &gateway.config, unix_now()));
            if updates.len() < PAGE {
                state.started = 0;
            }
        }
        gateway.save()?;
        let (answers, moved) = {
            let mut state = lock(&gateway.state);
            (std::mem::take(&mut state.answers), state.offset != offset)
        };
        for answer in answers {
            if gateway.answers.try_send((token.clone(), answer)).is_err() {
                warn!("too many answers wait to be sent: one is dropped");
            }
        }
        if updates.len() < PAGE || !moved {
            return Ok(());
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Telegram
// ---------------------------------------------------------------------------------------------------------------------

/// The Bot API.
struct Telegram {
    agent: ureq::Agent,
    url: String,
}

/// Why a call did not succeed.
struct Failure {
    /// For a person; never holds the token.
    reason: String,
    /// Bot API, `error_code`.
    code: Option<u64>,
    /// Set if another attempt cannot deliver a text twice: pause before it.
    retry_after: Option<Duration>,
}

impl Telegram {
    fn new(config: &Config) -> Telegram {
        let mut tls = ureq::tls::TlsConfig::builder();
        if let Some(roots) = &config.roots {
            tls = tls.root_certs(ureq::tls::RootCerts::new_with_certs(roots));
        }
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false) // the description and retry_after are in the body
            .max_redirects(0)
            .max_redirects_will_error(false)
            .ip_family(config.ip_family)
            .tls_config(tls.build())
            .proxy(config.proxy.clone())
            .timeout_global(Some(TELEGRAM_BUDGET))
            .timeout_connect(Some(CONNECT_BUDGET))
            .timeout_resolve(Some(CONNECT_BUDGET))
            .input_buffer_size(8 << 10)
            .output_buffer_size(8 << 10)
            .max_idle_connections(IDLE_CONNECTIONS)
            .max_idle_connections_per_host(IDLE_CONNECTIONS)
            .max_idle_age(IDLE_AGE)
            .user_agent(concat!("coap_websocket/", env!("CARGO_PKG_VERSION")))
            .build();
        let agent = ureq::Agent::with_parts(agent, DefaultConnector::default(), Addresses::default());
        Telegram { agent, url: config.url.clone() }
    }

    /// One `sendMessage` for each chat, all at the same time; the results in the same order.
    fn send_to_all(&self, token: &Secret, to: &[&ChatId], text: &str, deadline: Instant) -> Vec<Result<(), Failure>> {
        let send = |chat: &ChatId| {
            let parameters = json!({"chat_id": chat.json(), "text": text});
            self.call(token, "sendMessage", &parameters, deadline).map(drop)
        };
        let Some((first, others)) = to.split_first() else { return Vec::new() };
        thread::scope(|scope| {
            let start = |&chat| thread::Builder::new().stack_size(STACK).spawn_scoped(scope, move || send(chat));
            let threads: Vec<_> = others.iter().map(start).collect();
            let own = send(first);
            let join = |thread: io::Result<thread::ScopedJoinHandle<'_, _>>| match thread {
                Ok(thread) => thread.join().unwrap_or_else(|_| Err(Failure::unknown("the thread died".to_string()))),
                Err(error) => Err(Failure::unknown(format!("cannot start a thread: {error}"))),
            };
            iter::once(own).chain(threads.into_iter().map(join)).collect()
        })
    }

    /// Calls a method. Again only where the first call surely had no effect, and while the deadline allows it.
    fn call(&self, token: &Secret, method: &str, parameters: &Value, deadline: Instant) -> Result<Value, Failure> {
        let mut attempt = 1;
        loop {
            let failure = match self.call_once(token, method, parameters, deadline) {
                Ok(result) => return Ok(result),
                Err(failure) => failure,
            };
            match failure.retry_after {
                Some(pause) if attempt < ATTEMPTS && Instant::now() + pause < deadline => thread::sleep(pause),
                _ => return Err(failure),
            }
            attempt += 1;
        }
    }

    fn call_once(&self, token: &Secret, method: &str, parameters: &Value, deadline: Instant) -> Result<Value, Failure> {
        let remaining = deadline.saturating_duration_since(Instant::now());
        if remaining.is_zero() {
            return Err(Failure::unknown("no time left".to_string()));
        }
        let bytes = parameters.to_string().into_bytes();
        let mut body = Body { bytes: &bytes, read: false };
        let mut request = self
            .agent
            .post(format!("{}{}/{method}", self.url, token.0))
            .header("content-type", "application/json")
            .header("content-length", bytes.len());
        // ureq caches the TLS configuration only for requests with the agent's own settings.
        if remaining + ATTEMPT_PAUSE < TELEGRAM_BUDGET {
            request = request.config().timeout_global(Some(remaining)).build();
        }
        let answer = request.send(ureq::SendBody::from_reader(&mut body)).and_then(|mut response| {
            let status = response.status().as_u16();
            Ok((status, response.body_mut().with_config().limit(BODY_MAX).read_to_vec()?))
        });
        match answer {
            Ok((status, body)) => Failure::or_result(status, &body, token),
            Err(error) => Err(Failure {
                reason: describe(&error),
                code: None,
                retry_after: (!body.read && certificate_error(&error).is_none()).then_some(ATTEMPT_PAUSE),
            }),
        }
    }
}

/// The addresses that were looked up last. Without them a look-up, on a thread of its own, would precede every call.
#[derive(Default)]
struct Addresses {
    resolver: DefaultResolver,
    /// Host and port (the Bot API's or the proxy's, never both), when, and what was found.
    known: Mutex<Option<(String, Instant, Vec<SocketAddr>)>>,
}

/// Asked for by `Resolver`.
impl std::fmt::Debug for Addresses {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Addresses")
    }
}

impl Resolver for Addresses {
    fn resolve(
        &self,
        uri: &ureq::http::Uri,
        config: &ureq::config::Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let host = uri.authority().map_or_else(String::new, ToString::to_string);
        let fresh = |(known, since, _): &&(String, Instant, _)| *known == host && since.elapsed() < ADDRESS_AGE;
        if let Some((_, _, addresses)) = lock(&self.known).as_ref().filter(fresh) {
            let mut found = self.empty();
            addresses.iter().for_each(|address| found.push(*address));
            return Ok(found);
        }
        let found = self.resolver.resolve(uri, config, timeout)?;
        *lock(&self.known) = Some((host, Instant::now(), found.to_vec()));
        Ok(found)
    }
}

/// A request's body that knows whether it was asked for. As long as it was not, Telegram cannot have acted on the
/// request, whatever happened to the connection.
struct Body<'a> {
    bytes: &'a [u8],
    read: bool,
}

impl Read for Body<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.read = true;
        self.bytes.read(buffer)
    }
}

impl Failure {
    /// The call may have had its effect.
    fn unknown(reason: String) -> Failure {
        Failure { reason, code: None, retry_after: None }
    }

    /// Success is `200` and `"ok": true`, nothing else.
    fn or_result(status: u16, body: &[u8], token: &Secret) -> Result<Value, Failure> {
        let Ok(mut answer) = serde_json::from_slice::<Value>(body) else {
            return Err(Failure::unknown(format!("HTTP {status} with a body that is not JSON")));
        };
        if status == 200 && answer["ok"] == true {
            return Ok(answer["result"].take());
        }
        let code = answer["error_code"].as_u64().unwrap_or(status.into());
        let description = answer["description"].as_str().unwrap_or("no description").replace(&token.0, "<token>");
        let description: String = description.chars().take(DESCRIPTION_MAX).collect();
        let seconds = answer["parameters"]["retry_after"].as_u64().filter(|_| code == 429);
        let retry_after = seconds.filter(|&seconds| seconds < 60).map(Duration::from_secs);
        Err(Failure { reason: format!("{code} {description}"), code: Some(code), retry_after })
    }
}

/// In words, and without what some of these errors hold: the URL, and so the token.
fn describe(error: &ureq::Error) -> String {
    use rustls::CertificateError::{Expired, ExpiredContext, NotValidYet, NotValidYetContext};
    match (certificate_error(error), error) {
        (Some(Expired | ExpiredContext { .. } | NotValidYet | NotValidYetContext { .. }), _) => {
            "the certificate is expired or not valid yet: is this machine's clock set?".to_string()
        }
        (Some(reason), _) => format!("the server's certificate is not trusted: {reason}"),
        (None, ureq::Error::HostNotFound) => "cannot resolve the host name".to_string(),
        (None, ureq::Error::Timeout(stage)) => format!("no answer in time ({stage})"),
        (None, ureq::Error::Io(error)) => error.to_string(),
        (None, ureq::Error::Rustls(error)) => error.to_string(),
        (None, ureq::Error::ConnectionFailed) => "cannot connect".to_string(),
        (None, ureq::Error::ConnectProxyFailed(_)) => "the proxy refuses to connect".to_string(),
        (None, ureq::Error::BodyExceedsLimit(limit)) => format!("the answer is larger than {limit} bytes"),
        (None, ureq::Error::Protocol(_)) => "the answer is not HTTP".to_string(),
        _ => "the HTTPS call failed".to_string(),
    }
}

fn certificate_error(error: &ureq::Error) -> Option<&rustls::CertificateError> {
    let error = match error {
        ureq::Error::Rustls(error) => error,
        ureq::Error::Io(error) => error.get_ref()?.downcast_ref()?,
        _ => return None,
    };
    match error {
        rustls::Error::InvalidCertificate(reason) => Some(reason),
        _ => None,
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// State: the change log, what each mote has acknowledged, Telegram's offset
// ---------------------------------------------------------------------------------------------------------------------

/// What outlives the process.
#[derive(Default)]
struct State {
    /// First start, Unix seconds: commands written before are not carried out. 0 once all of them were fetched.
    started: u64,
    /// Id of the bot that `offset` belongs to.
    bot: Option<String>,
    /// Bot API: the next update's id. It may fall: after a quiet week Telegram numbers anew.
    offset: i64,
    /// Number of the latest change.
    sequence: u64,
    /// The latest change of each key with its number.
    interval: Option<(u64, u8)>,
    feedback: Option<(u64, bool)>,
    /// A user's name as the mote hears it; `None`: removed.
    chats: BTreeMap<i64, (u64, Option<String>)>,
    /// The change up to which a mote has acknowledged everything; the longest silent first.
    motes: Vec<(IpAddr, u64)>,
    /// Not saved: answers to people, until what they say is saved.
    answers: Vec<Answer>,
    /// Not saved: wrong passwords in a row, and the time (Unix seconds) until which `config` is ignored.
    suspects: BTreeMap<i64, (u32, u64)>,
}

/// What `register` found.
#[derive(Debug, PartialEq)]
enum Registration {
    New,
    Known,
    Full,
}

impl State {
    fn next(&mut self) -> u64 {
        self.sequence += 1;
        self.sequence
    }

    fn users(&self) -> impl Iterator<Item = (i64, &str)> {
        self.chats.iter().filter_map(|(id, (_, name))| Some((*id, name.as_deref()?)))
    }

    fn is_removed(&self, chat: &ChatId) -> bool {
        matches!(chat, ChatId::Number(id) if matches!(self.chats.get(id), Some((_, None))))
    }

    fn register(&mut self, chat: i64, name: &str) -> Registration {
        let known = self.users().any(|(id, _)| id == chat);
        if !known && self.users().count() >= USERS_MAX {
            return Registration::Full;
        }
        let taken: Vec<&str> = self.users().filter(|(id, _)| *id != chat).map(|(_, name)| name).collect();
        let name = wire_name(name, &taken);
        if self.users().all(|user| user != (chat, &name)) {
            info!("{name} ({chat}) is {}", if known { "the new name" } else { "registered" });
            let change = (self.next(), Some(name));
            self.chats.insert(chat, change);
        }
        if known { Registration::Known } else { Registration::New }
    }

    /// Whoever asks is told again (`again`), even if it was removed before. Returns the user for the log.
    fn remove(&mut self, chat: i64, again: bool) -> String {
        let name = match self.chats.get(&chat) {
            Some((_, None)) if !again => return chat.to_string(),
            Some((_, Some(name))) => format!("{name} ({chat})"),
            _ => chat.to_string(),
        };
        let change = (self.next(), None);
        self.chats.insert(chat, change);
        let removed = self.chats.iter().filter(|(_, (_, name))| name.is_none());
        let oldest = removed.clone().min_by_key(|(_, (sequence, _))| *sequence).map(|(id, _)| *id);
        if let (true, Some(oldest)) = (removed.count() > REMOVALS_MAX, oldest) {
            self.chats.remove(&oldest);
        }
        name
    }

    /// The changes that a mote has not acknowledged, oldest first, as far as they fit into `limit` bytes; the number of
    /// the last of them; how many are left.
    fn tokens_for(&mut self, mote: IpAddr, limit: usize) -> (String, Option<u64>, usize) {
        let heard = self.acknowledged(mote);
        let settings = [
            self.interval.map(|(sequence, minutes)| (sequence, format!("i{minutes}"))),
            self.feedback.map(|(sequence, on)| (sequence, format!("f{}", u8::from(on)))),
        ];
        let chats = self.chats.iter().filter(|(id, _)| fits_firmware(**id)).map(|(id, (sequence, name))| {
            (*sequence, name.as_ref().map_or_else(|| format!("r{id}"), |name| format!("{name}:{id}")))
        });
        let mut changes = Vec::new();
        for change in settings.into_iter().flatten().chain(chats).filter(|(sequence, _)| *sequence > heard) {
            changes.insert(changes.partition_point(|earlier| *earlier < change), change);
        }
        let (mut reply, mut last, mut left) = (String::new(), None, changes.len());
        for (sequence, token) in &changes {
            let separator = if reply.is_empty() { "" } else { ";" };
            if reply.len() + separator.len() + token.len() > limit {
                break;
            }
            reply.push_str(separator);
            reply.push_str(token);
            (last, left) = (Some(*sequence), left - 1);
        }
        (reply, last, left)
    }

    /// Moves the mote to the end of the list: it is not silent.
    fn acknowledged(&mut self, mote: IpAddr) -> u64 {
        let Some(at) = self.motes.iter().position(|(address, _)| *address == mote) else { return 0 };
        let entry = self.motes.remove(at);
        self.motes.push(entry);
        entry.1
    }

    /// The mote's ACK of a response arrived.
    fn acknowledge(&mut self, mote: IpAddr, sequence: u64) {
        let heard = self.acknowledged(mote).max(sequence);
        self.motes.retain(|(address, _)| *address != mote);
        if self.motes.len() >= MOTES_MAX {
            self.motes.remove(0);
        }
        self.motes.push((mote, heard));
    }

    /// Firmware that lost its RAM names other chats than those that it acknowledged. It is told everything again.
    fn notice_restart(&mut self, mote: IpAddr, listed: &[ChatId]) -> bool {
        let heard = self.acknowledged(mote);
        let lost = self.chats.iter().any(|(id, (sequence, name))| {
            *sequence <= heard && fits_firmware(*id) && name.is_some() != listed.contains(&ChatId::Number(*id))
        });
        if lost {
            self.motes.retain(|(address, _)| *address != mote);
        }
        lost
    }

    fn to_json(&self) -> String {
        let setting = |(sequence, value): (u64, u8)| json!({"sequence": sequence, "value": value});
        let chats: Vec<Value> = self
            .chats
            .iter()
            .map(|(id, (sequence, name))| json!({"id": id, "sequence": sequence, "name": name}))
            .collect();
        let motes: Vec<Value> =
            self.motes.iter().map(|(ip, heard)| json!({"address": ip.to_string(), "acknowledged": heard})).collect();
        let state = json!({
            "started": self.started,
            "bot": self.bot,
            "offset": self.offset,
            "sequence": self.sequence,
            "interval": self.interval.map(setting),
            "feedback": self.feedback.map(|(sequence, on)| setting((sequence, on.into()))),
            "chats": chats,
            "motes": motes,
        });
        state.to_string()
    }

    /// `None` if it is not what `to_json` writes.
    fn from_json(text: &str) -> Option<State> {
        let json: Value = serde_json::from_str(text).ok()?;
        let sequence = json["sequence"].as_u64()?;
        let number = |entry: &Value, key: &str| entry[key].as_u64().filter(|&number| number <= sequence);
        let setting = |key: &str, range: std::ops::RangeInclusive<u64>| match &json[key] {
            Value::Null => Some(None),
            entry => {
                let value = entry["value"].as_u64().filter(|value| range.contains(value))?;
                Some(Some((number(entry, "sequence")?, u8::try_from(value).ok()?)))
            }
        };
        let chat = |entry: &Value| {
            let name = match &entry["name"] {
                Value::Null => None,
                name => Some(name.as_str().filter(|name| wire_name(name, &[]) == *name)?.to_string()),
            };
            Some((entry["id"].as_i64()?, (number(entry, "sequence")?, name)))
        };
        let mote = |entry: &Value| Some((entry["address"].as_str()?.parse().ok()?, number(entry, "acknowledged")?));
        let mut chats = BTreeMap::new();
        for entry in json["chats"].as_array()? {
            let (id, change) = chat(entry)?;
            chats.insert(id, change);
        }
        let bot = match &json["bot"] {
            Value::Null => None,
            bot => Some(bot.as_str()?.to_string()),
        };
        let state = State {
            started: json["started"].as_u64()?,
            bot,
            offset: json["offset"].as_i64()?,
            sequence,
            interval: setting("interval", 1..=120)?,
            feedback: setting("feedback", 0..=1)?.map(|(sequence, value)| (sequence, value == 1)),
            chats,
            motes: json["motes"].as_array()?.iter().map(mote).collect::<Option<_>>()?,
            ..State::default()
        };
        let settings = [state.interval.map(|change| change.0), state.feedback.map(|change| change.0)];
        let numbers = settings.into_iter().flatten().chain(state.chats.values().map(|change| change.0));
        let (users, removed) = (state.users().count(), state.chats.values().filter(|chat| chat.1.is_none()).count());
        let bounded = users <= USERS_MAX && removed <= REMOVALS_MAX && state.motes.len() <= MOTES_MAX;
        // Two of the same number or name: one of them would never reach the mote.
        let distinct = all_distinct(numbers) && all_distinct(state.users().map(|(_, name)| name));
        (bounded && distinct).then_some(state)
    }
}

fn all_distinct<T: PartialEq>(items: impl Iterator<Item = T>) -> bool {
    let items: Vec<T> = items.collect();
    (1..items.len()).all(|at| !items[..at].contains(&items[at]))
}

/// Firmware: it can hold this id, and remove it (only ids that start with a digit).
fn fits_firmware(chat: i64) -> bool {
    (1..=CHAT_ID_MAX).contains(&chat)
}

/// A name that the firmware neither cuts nor takes for something else, unlike every one of `taken`, for it looks users
/// up by name first.
fn wire_name(name: &str, taken: &[&str]) -> String {
    let clean: String = name.chars().filter(|&c| !c.is_control() && !";:,&=".contains(c)).collect();
    let base = match clean.trim() {
        "" => "user",
        name => name,
    };
    // Judged as it will be: what is cut off does not help. A suffix makes no name that is misread.
    let misread = match cut(base, NAME_MAX).as_bytes() {
        [b'f', b'0' | b'1', ..] | [b'i' | b'r', b'0'..=b'9', ..] => true,
        name => name == b"all",
    };
    let base = if misread { format!("_{base}") } else { base.to_string() };
    let numbered = |number: usize| {
        let suffix = if number == 1 { String::new() } else { format!("_{number}") };
        format!("{}{suffix}", cut(&base, NAME_MAX - suffix.len()))
    };
    let name = (1..).map(numbered).find(|name| !taken.contains(&name.as_str()));
    name.unwrap_or_default() // there are more numbers than users
}

/// At most `end` bytes, whole characters, no white space behind.
fn cut(text: &str, end: usize) -> &str {
    let end = (0..=text.len().min(end)).rev().find(|end| text.is_char_boundary(*end));
    text[..end.unwrap_or(0)].trim_end()
}

/// Reads `state.json`. A damaged one is set aside: its content may be worth a look, and the gateway must start.
fn open_state(config: &Config) -> Result<State, String> {
    let path = &config.state_path;
    let mut state = State { started: unix_now(), ..State::default() };
    match fs::read(path) {
        Ok(bytes) => match str::from_utf8(&bytes).ok().and_then(State::from_json) {
            Some(known) => state = known,
            None => {
                let aside = beside(path, ".damaged");
                fs::rename(path, &aside).map_err(|error| format!("cannot set {} aside: {error}", path.display()))?;
                error!("{} is damaged: starting anew, it is kept as {}", path.display(), aside.display());
            }
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(format!("cannot read {}: {error}", path.display())),
    }
    // Update ids are counted for each bot.
    let bot = config.token.as_ref().map(|token| token.bot_id().to_string());
    if bot.is_some() && bot != state.bot {
        (state.bot, state.offset) = (bot, 0);
    }
    Ok(state)
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Replaces a file so that it is the old or the new one after a power cut, too. Readable by its owner alone.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, path)
}

// ---------------------------------------------------------------------------------------------------------------------
// What people write
// ---------------------------------------------------------------------------------------------------------------------

/// What is said to a person, and the message to delete because it held a password.
#[derive(Debug, Default, PartialEq)]
struct Answer {
    chat: i64,
    text: Option<String>,
    delete: Option<i64>,
}

/// Bot API, `Message`: what is read of it. Only private chats with an id that the firmware can hold count.
struct Message<'a> {
    id: i64,
    chat: i64,
    name: &'a str,
    text: &'a str,
    /// Unix seconds.
    date: u64,
}

impl Message<'_> {
    fn of(update: &Value) -> Option<Message<'_>> {
        let message = &update["message"];
        let chat = &message["chat"];
        let names = [&chat["first_name"], &message["from"]["first_name"], &chat["username"]];
        (chat["type"] == "private").then_some(Message {
            id: message["message_id"].as_i64().unwrap_or_default(),
            chat: chat["id"].as_i64().filter(|id| fits_firmware(*id))?,
            name: names.into_iter().find_map(|name| name.as_str()).unwrap_or_default(),
            text: message["text"].as_str().unwrap_or_default(),
            date: message["date"].as_u64().unwrap_or_default(),
        })
    }
}

/// Progress before judgement: an update that cannot be understood must not come back.
fn handle_update(state: &mut State, update: &Value, config: &Config, now: u64) {
    let Some(id) = update["update_id"].as_i64() else { return };
    state.offset = id.saturating_add(1);
    match Message::of(update) {
        Some(message) => {
            let answer = judge(state, &message, config.password.as_ref(), now);
            state.answers.push(answer);
        }
        None => debug!("update {id} is no message in a private chat that the mote can hold"),
    }
}

fn judge(state: &mut State, message: &Message, password: Option<&Secret>, now: u64) -> Answer {
    let words: Vec<&str> = message.text.split_whitespace().collect();
    let first = words.first().unwrap_or(&"").to_ascii_lowercase();
    let is_remove = first == "remove" && words.len() == 2 && words[1].eq_ignore_ascii_case("me");
    let is_config = ["config", "/config"].contains(&first.as_str());
    let is_help = (first == "help" && words.len() == 1) || ["/help", "/start"].contains(&first.as_str());
    // Written before the gateway was there: the sender could not know what it does.
    let old = message.date < state.started;
    if is_remove && !old {
        let user = state.remove(message.chat, true); // not as an argument of info!, which may be off
        info!("{user} is removed, as asked");
        let text = "You are removed and get no more messages. Write anything to register again.";
        return Answer { chat: message.chat, text: Some(text.to_string()), delete: None };
    }
    let registration = state.register(message.chat, message.name);
    let full = format!("The list is full: {USERS_MAX} people are registered already.");
    let welcome = match registration {
        Registration::New => Some(format!("You are registered.\n{HELP}")),
        Registration::Full => Some(full),
        Registration::Known => None,
    };
    let done = match () {
        () if is_config && !old => configure(state, message.chat, &words[1..], password, now),
        () if is_config || registration == Registration::New => None,
        () if is_help => Some(HELP.to_string()),
        () if registration == Registration::Known => Some(format!("I do not understand that.\n{HELP}")),
        () => None,
    };
    let text: Vec<String> = welcome.into_iter().chain(done).collect();
    Answer {
        chat: message.chat,
        text: (!text.is_empty()).then(|| text.join("\n\n")),
        // Whether right or wrong: a wrong password may be nearly right.
        delete: (is_config && words.len() > 1).then_some(message.id),
    }
}

/// `config` with its arguments. `None`: ignored. Only a complete command is a guess at the password, and nothing is
/// said about the rest of it unless the password is right.
fn configure(state: &mut State, chat: i64, words: &[&str], password: Option<&Secret>, now: u64) -> Option<String> {
    let Some(password) = password else {
        return Some("No password is set on the gateway, so nothing can be changed.".to_string());
    };
    let (mut wrong, until) = state.suspects.get(&chat).copied().unwrap_or_default();
    if until > now {
        return None;
    }
    let [guess, key, value] = *words else { return Some(CONFIG_FORM.to_string()) };
    if !password.is(guess) {
        wrong += 1;
        let locked = wrong >= WRONG_PASSWORDS_MAX;
        let entry = if locked { (0, now + LOCK_SECONDS) } else { (wrong, 0) };
        if state.suspects.len() >= SUSPECTS_MAX && !state.suspects.contains_key(&chat) {
            // Those that are not locked out go first.
            let least = state.suspects.iter().min_by_key(|(_, (wrong, until))| (*until, *wrong)).map(|(id, _)| *id);
            state.suspects.remove(&least.unwrap_or_default());
        }
        state.suspects.insert(chat, entry);
        warn!("wrong password from chat {chat}{}", if locked { ": its config is ignored for an hour" } else { "" });
        let hour = if locked { " Your config messages are ignored for an hour." } else { "" };
        return Some(format!("Wrong password. Nothing was changed.{hour}"));
    }
    state.suspects.remove(&chat);
    let number = || value.parse::<u8>().ok().filter(|_| value.bytes().all(|b| b.is_ascii_digit()));
    match (key.to_ascii_lowercase().as_str(), number()) {
        ("interval", Some(minutes @ 1..=120)) => {
            state.interval = Some((state.next(), minutes));
            info!("interval is set to {minutes} minutes by chat {chat}");
            Some(format!("The interval is set to {minutes} minutes."))
        }
        ("feedback", Some(on @ 0..=1)) => {
            state.feedback = Some((state.next(), on == 1));
            info!("LED feedback is set to {on} by chat {chat}");
            Some(format!("The LED feedback is set to {on} ({}).", if on == 1 { "on" } else { "off" }))
        }
        _ => Some(CONFIG_FORM.to_string()),
    }
}

/// One at a time and in order; best effort, for the mote has its answer already.
fn write_to_people(gateway: &Gateway, queue: &Receiver<(Secret, Answer)>) {
    for (token, answer) in queue {
        let call = |method, parameters| {
            let deadline = Instant::now() + TELEGRAM_BUDGET;
            if let Err(failure) = gateway.telegram.call(&token, method, &parameters, deadline) {
                warn!("{method} to {} failed: {}", answer.chat, failure.reason);
            }
        };
        if let Some(text) = &answer.text {
            call("sendMessage", json!({"chat_id": answer.chat, "text": text}));
        }
        if let Some(message) = answer.delete {
            call("deleteMessage", json!({"chat_id": answer.chat, "message_id": message}));
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Log, heartbeat, systemd
// ---------------------------------------------------------------------------------------------------------------------

/// simple_logger decides what is logged; it has neither this line format nor a file, and panics when its pipe is gone.
struct Log {
    filter: simple_logger::SimpleLogger,
    file: Mutex<LogFile>,
}

struct LogFile {
    path: PathBuf,
    /// `None`: it cannot be opened; the console has the lines all the same.
    file: Option<File>,
    size: u64,
}

fn start_log(config: &Config) -> Result<(), String> {
    // Off for the libraries, whatever RUST_LOG says: their records hold URLs, and so the token.
    let filter = simple_logger::SimpleLogger::new()
        .with_level(log::LevelFilter::Off)
        .with_module_level("coap_websocket", config.level);
    log::set_max_level(filter.max_level());
    let mut file = LogFile { path: config.log_path.clone(), file: None, size: 0 };
    let opened = file.open();
    log::set_boxed_logger(Box::new(Log { filter, file: Mutex::new(file) })).map_err(|error| error.to_string())?;
    if let Err(error) = opened {
        warn!("cannot open {}: {error}; the log goes to the console alone", config.log_path.display());
    }
    Ok(())
}

impl log::Log for Log {
    fn enabled(&self, metadata: &log::Metadata) -> bool {
        self.filter.enabled(metadata)
    }

    fn log(&self, record: &log::Record) {
        if self.enabled(record.metadata()) {
            let text = escape(&record.args().to_string());
            let line = format!("{} [{}] {text}\n", utc(unix_now()), record.level());
            let _ = io::stdout().write_all(line.as_bytes());
            lock(&self.file).append(&line);
        }
    }

    fn flush(&self) {}
}

impl LogFile {
    fn open(&mut self) -> io::Result<()> {
        let file = OpenOptions::new().append(true).create(true).open(&self.path)?;
        self.size = file.metadata()?.len();
        self.file = Some(file);
        Ok(())
    }

    fn append(&mut self, line: &str) {
        if self.file.is_some() && self.size + line.len() as u64 > LOG_MAX {
            let _ = fs::rename(&self.path, beside(&self.path, ".1"));
            let _ = self.open();
        }
        if let Some(file) = &mut self.file
            && file.write_all(line.as_bytes()).is_ok()
        {
            self.size += line.len() as u64;
        }
    }
}

/// So that what comes from outside cannot forge a line.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c.is_control() || matches!(c, '\u{2028}' | '\u{2029}') {
            true => escaped.extend(c.escape_default()),
            false => escaped.push(c),
        }
    }
    escaped
}

/// `2026-01-31 12:00:00` of Unix seconds. Days to a date: H. Hinnant, "chrono-Compatible Low-Level Date Algorithms".
fn utc(seconds: u64) -> String {
    let (days, time) = (seconds / 86400 + 719_468, seconds % 86400);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_based = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_based + 2) / 5 + 1;
    let month = if march_based < 10 { march_based + 3 } else { march_based - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}", time / 3600, time / 60 % 60, time % 60)
}

fn log_outcome(request: &Request, response: &Response, detail: &str) {
    let mut line = format!("{} {} -> {}", request.peer, request, response.code());
    let _ = write!(line, " in {} ms", request.at.elapsed().as_millis());
    if !detail.is_empty() {
        let _ = write!(line, ": {detail}");
    }
    match response.code() {
        code if code.starts_with('5') => warn!("{line}"),
        _ => info!("{line}"),
    }
}

fn heartbeat(gateway: &Gateway) {
    let start = Instant::now();
    loop {
        thread::sleep(HEARTBEAT);
        let minutes = start.elapsed().as_secs() / 60;
        info!(
            "Server is still running: up {} h {} min, {} messages forwarded, {} failures, {} registered users",
            minutes / 60,
            minutes % 60,
            gateway.forwarded.load(Relaxed),
            gateway.failures.load(Relaxed),
            lock(&gateway.state).users().count(),
        );
    }
}

/// sd_notify(3). Without systemd, nothing.
fn notify(message: &str) {
    let Some(path) = env::var("NOTIFY_SOCKET").ok().filter(|path| !path.is_empty()) else { return };
    let address = match path.strip_prefix('@') {
        Some(name) => std::os::unix::net::SocketAddr::from_abstract_name(name),
        None => std::os::unix::net::SocketAddr::from_pathname(&path),
    };
    let _ = address.and_then(|address| UnixDatagram::unbound()?.send_to_addr(message.as_bytes(), &address));
}

/// Tells systemd that the receive loop turns, at half of `$WATCHDOG_USEC` as sd_watchdog_enabled(3) advises.
struct Watchdog {
    period: Option<Duration>,
    due: Instant,
}

impl Watchdog {
    fn new() -> Watchdog {
        let microseconds = env::var("WATCHDOG_USEC").ok().and_then(|text| text.parse().ok());
        Watchdog { period: microseconds.map(|all: u64| Duration::from_micros(all / 2)), due: Instant::now() }
    }

    fn feed(&mut self, now: Instant) {
        if let Some(period) = self.period.filter(|_| now >= self.due) {
            notify("WATCHDOG=1");
            // The loop turns once a TICK.
            self.due = now + period.saturating_sub(TICK);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// `check` and `send`
// ---------------------------------------------------------------------------------------------------------------------

/// Changes nothing: what people wrote is shown, not confirmed.
fn check(config: &Config) -> Result<(), String> {
    config.warnings.iter().for_each(|warning| say(&format!("warning: {}", escape(warning))));
    let token = config.token.as_ref().ok_or("config.ini: no bot_token is set, so Telegram cannot be asked")?;
    let telegram = Telegram::new(config);
    let ask = |method, parameters| {
        let result = telegram.call(token, method, &parameters, Instant::now() + TELEGRAM_BUDGET);
        result.map_err(|failure| format!("{method}: {}", escape(&failure.reason)))
    };
    let me = ask("getMe", json!({}))?;
    let (name, username) = (me["first_name"].as_str().unwrap_or("?"), me["username"].as_str().unwrap_or("?"));
    say(&format!("bot: {} (@{})", escape(name), escape(username)));
    say(&format!("password for config: {}", if config.password.is_some() { "set" } else { "not set" }));

    let path = &config.state_path;
    match fs::read_to_string(path).map(|text| State::from_json(&text)) {
        Ok(Some(state)) => {
            let users: Vec<String> = state.users().map(|(id, name)| format!("{name} ({id})")).collect();
            say(&format!("registered users: {}", if users.is_empty() { "none".to_string() } else { users.join(", ") }));
        }
        Ok(None) => say(&format!("registered users: unknown, {} is damaged", path.display())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => say("registered users: none"),
        Err(error) => say(&format!("registered users: unknown, cannot read {}: {error}", path.display())),
    }
    let waiting = ask("getUpdates", json!({"limit": PAGE, "timeout": 0, "allowed_updates": ["message"]}))?;
    let mut chats: Vec<(i64, String)> = Vec::new();
    for chat in waiting.as_array().into_iter().flatten().map(|update| &update["message"]["chat"]) {
        if let Some(id) = chat["id"].as_i64().filter(|id| chats.iter().all(|(known, _)| known != id)) {
            let name = chat["first_name"].as_str().or(chat["title"].as_str()).unwrap_or("?");
            chats.push((id, escape(name)));
        }
    }
    say(if chats.is_empty() { "no chat has a message waiting" } else { "chats with a message waiting:" });
    chats.iter().for_each(|(id, name)| say(&format!("  {id} {name}")));
    Ok(())
}

/// One `POST /message` as a mote would send it.
fn send(config: &Config, chat: &str, text: &str, to: Option<String>) -> Result<(), String> {
    let token = config.token.as_ref().ok_or("config.ini: no bot_token is set")?;
    let own = SocketName(&config.address, config.port).to_string();
    let to = to.as_deref().map_or(Ok(own.as_str()), |uri| {
        uri.strip_prefix("coap://")
            .map(|host| host.trim_end_matches('/'))
            .ok_or(format!("`{uri}` is not a coap:// URI"))
    })?;
    let with_port = format!("{to}:{}", coap::PORT);
    let host = if to.ends_with(']') || !to.contains(':') { with_port.as_str() } else { to };
    // RFC 6874: a zone's `%` may be written `%25`; std wants the address with a zone without brackets.
    let (name, port) = host.rsplit_once(':').unwrap_or_default();
    let name = name.trim_matches(['[', ']']).replace("%25", "%");
    let port: u16 = port.parse().map_err(|_| format!("`{to}` has no valid port"))?;
    let peer = (name.as_str(), port)
        .to_socket_addrs()
        .ok()
        .and_then(|mut addresses| addresses.next())
        .ok_or(format!("cannot resolve `{to}`"))?;

    let payload = format!("url={}&token={}&chat_ids={chat}&text={text}", config.url, token.0);
    let answer = exchange(peer, payload.as_bytes()).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => format!("no answer from {peer}"),
        _ => format!("cannot reach a gateway at {peer}: {error}"),
    })?;
    let line = format!("{} {}", answer.0, escape(&String::from_utf8_lossy(&answer.1)));
    if !answer.0.starts_with('2') {
        return Err(format!("{} (the gateway's log tells why)", line.trim_end()));
    }
    say(&line);
    Ok(())
}

/// A client's side of one exchange, RFC 7252 §4.2: code and payload of the response.
fn exchange(peer: SocketAddr, payload: &[u8]) -> io::Result<(String, Vec<u8>)> {
    let local = if peer.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(local)?;
    socket.connect(peer)?;
    let seed = coap::random();
    let request = coap::encode_request("message", payload, seed);
    let (mut sent, mut timeout) = (0, coap::ACK_TIMEOUT);
    let mut due = Instant::now();
    let mut buffer = [0; coap::DATAGRAM_MAX];
    loop {
        let now = Instant::now();
        if now >= due {
            if sent > coap::MAX_RETRANSMIT {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            socket.send(&request)?;
            (sent, due, timeout) = (sent + 1, now + timeout, timeout * 2);
        }
        socket.set_read_timeout(Some((due - now).max(Duration::from_millis(1))))?;
        let length = match socket.recv(&mut buffer) {
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error),
        };
        match coap::decode_response(&buffer[..length], &request) {
            Some(coap::Answer::Acknowledged) => {
                // The gateway answers within 9 s; from here on, waiting is all there is to do.
                (sent, due) = (coap::MAX_RETRANSMIT + 1, now + Duration::from_secs(15));
            }
            Some(coap::Answer::Response { code, payload, acknowledgement }) => {
                if let Some(bytes) = acknowledgement {
                    socket.send(&bytes)?;
                }
                return Ok((code, payload));
            }
            None => {}
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The CoAP message layer
// ---------------------------------------------------------------------------------------------------------------------

/// RFC 7252 and Block1 of RFC 7959: bytes and a time in, bytes out. It sees neither a socket nor a clock.
mod coap {
    use std::collections::VecDeque;
    use std::fmt;
    use std::hash::{BuildHasher as _, Hasher as _, RandomState};
    use std::net::SocketAddr;
    use std::time::{Duration, Instant};

    use coap_lite::{MessageClass, MessageType, Packet, ResponseType};

    /// RFC 7252 §6.1.
    pub const PORT: u16 = 5683;
    /// RFC 7252 §4.8, transmission parameters, and §4.8.2, what follows from them.
    pub const ACK_TIMEOUT: Duration = Duration::from_secs(2);
    pub const MAX_RETRANSMIT: u32 = 4;
    const ACK_RANDOM_PERCENT: u32 = 50;
    const MAX_LATENCY: Duration = Duration::from_secs(100);
    const MAX_TRANSMIT_SPAN: Duration = Duration::from_millis(
        ACK_TIMEOUT.as_millis() as u64 * ((1 << MAX_RETRANSMIT) - 1) * (100 + ACK_RANDOM_PERCENT as u64) / 100,
    );
    pub const NON_LIFETIME: Duration = MAX_TRANSMIT_SPAN.saturating_add(MAX_LATENCY);
    pub const EXCHANGE_LIFETIME: Duration = NON_LIFETIME.saturating_add(MAX_LATENCY).saturating_add(ACK_TIMEOUT);

    /// Of an assembled request's payload, bytes: a text of 4,096 characters that are not all outside of Latin script.
    pub const BODY_MAX: usize = 8 << 10;
    /// One datagram with such a payload and 1 KiB of options; a longer one arrives cut and is refused for its payload.
    pub const DATAGRAM_MAX: usize = BODY_MAX + (1 << 10);
    /// Requests that wait for Telegram: bounds threads and memory.
    pub const IN_PROGRESS_MAX: usize = 32;
    /// Remembered messages. A mesh of 1,000 motes that all send four messages in `EXCHANGE_LIFETIME` fits.
    pub const SEEN_MAX: usize = 4096;
    /// Responses that wait for their ACK; the oldest is given up.
    const OPEN_MAX: usize = 1024;
    /// Block1 assemblies: half a megabyte.
    pub const ASSEMBLIES_MAX: usize = 64;
    pub const ASSEMBLY_LIFETIME: Duration = Duration::from_secs(60);

    /// RFC 7252 §12.1.1, §12.2 and §12.3.
    pub const GET: u8 = 1;
    pub const POST: u8 = 2;
    const URI_PATH: u16 = 11;
    pub const CONTENT_FORMAT: u16 = 12;
    const URI_QUERY: u16 = 15;
    pub const ACCEPT: u16 = 17;
    const BLOCK2: u16 = 23;
    const BLOCK1: u16 = 27;
    const PROXY_URI: u16 = 35;
    const PROXY_SCHEME: u16 = 39;
    const SIZE1: u16 = 60;
    pub const TEXT_PLAIN: u32 = 0;
    pub const LINK_FORMAT: u32 = 40;

    /// Random enough for a message ID and a timeout; each call gives another number.
    pub fn random() -> u64 {
        RandomState::new().build_hasher().finish()
    }

    /// RFC 7959 §2.2.
    #[derive(Clone, Copy, Debug, PartialEq)]
    pub struct Block {
        pub number: usize,
        pub more: bool,
        exponent: u8,
    }

    impl Block {
        pub fn size(self) -> usize {
            16 << self.exponent
        }

        fn value(self) -> Vec<u8> {
            uint(((self.number as u32) << 4) | u32::from(self.more) << 3 | u32::from(self.exponent))
        }
    }

    /// RFC 7252 §3.2: no leading zeros.
    fn uint(value: u32) -> Vec<u8> {
        value.to_be_bytes().into_iter().skip_while(|byte| *byte == 0).collect()
    }

    /// A request that nobody has acted on.
    #[derive(Clone)]
    pub struct Request {
        pub peer: SocketAddr,
        pub at: Instant,
        pub code: u8,
        pub payload: Vec<u8>,
        packet: Packet,
        digest: u64,
    }

    /// For the log: method and path. No more of a path than could hold no token.
    impl fmt::Display for Request {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            let path: String = self.path().chars().take(24).take_while(|c| *c != ':').collect();
            match self.code {
                GET => write!(f, "GET /{path}"),
                POST => write!(f, "POST /{path}"),
                code => write!(f, "{}.{:02} /{path}", code >> 5, code & 31),
            }
        }
    }

    impl Request {
        fn is_confirmable(&self) -> bool {
            self.packet.header.get_type() == MessageType::Confirmable
        }

        fn strings(&self, option: u16) -> Vec<String> {
            let values = self.packet.get_option(option.into()).into_iter().flatten();
            values.map(|value| String::from_utf8_lossy(value).into_owned()).collect()
        }

        /// As in a URI: segments joined with `/`, one inside a segment encoded. RFC 7252 §6.5.
        pub fn path(&self) -> String {
            self.strings(URI_PATH).iter().map(|segment| segment.replace('/', "%2F")).collect::<Vec<_>>().join("/")
        }

        pub fn queries(&self) -> Vec<String> {
            self.strings(URI_QUERY)
        }

        /// The first value; one that is too long for its option is ignored as RFC 7252 §5.4.3 asks of elective ones.
        pub fn uint(&self, option: u16) -> Option<u32> {
            let value = self.packet.get_first_option(option.into())?;
            let limit = if [BLOCK1, BLOCK2].contains(&option) { 3 } else { 2 };
            (value.len() <= limit).then(|| value.iter().fold(0, |all, byte| all << 8 | u32::from(*byte)))
        }

        fn block(&self, option: u16) -> Result<Option<Block>, Response> {
            match self.uint(option) {
                Some(value) if value & 7 == 7 => Err(Response::error(ResponseType::BadRequest, "Reserved block size")),
                value => Ok(value.map(|value| Block {
                    number: (value >> 4) as usize,
                    more: value & 8 != 0,
                    exponent: (value & 7) as u8,
                })),
            }
        }

        pub fn block2(&self) -> Result<Option<Block>, Response> {
            self.block(BLOCK2)
        }
    }

    /// Code, payload and options of a response; message ID, type and token come from the exchange.
    #[derive(Debug)]
    pub struct Response {
        code: ResponseType,
        pub payload: Vec<u8>,
        options: Vec<(u16, Vec<u8>)>,
    }

    impl Response {
        /// A diagnostic payload, RFC 7252 §5.5.2. It leaves only inside an ACK, see `Exchanges::encode`.
        pub fn error(code: ResponseType, reason: &str) -> Response {
            Response { code, payload: reason.as_bytes().to_vec(), options: Vec::new() }
        }

        pub fn content(code: ResponseType, payload: &[u8], format: u32) -> Response {
            Response { code, payload: payload.to_vec(), options: vec![(CONTENT_FORMAT, uint(format))] }
        }

        /// As in `2.05`.
        pub fn code(&self) -> String {
            MessageClass::Response(self.code).to_string()
        }

        /// Cuts the payload to the block that the request asks for. RFC 7959 §2.4.
        pub fn in_block2(mut self, request: &Request) -> Response {
            let block = match request.block2() {
                Err(error) => return error,
                Ok(None) => return self,
                Ok(Some(block)) => block,
            };
            let start = block.number.saturating_mul(block.size());
            if self.code.is_error() || (start == 0 && self.payload.len() <= block.size()) {
                return self;
            }
            if start >= self.payload.len() {
                return Response::error(ResponseType::BadRequest, "No such block");
            }
            let end = self.payload.len().min(start + block.size());
            self.options.push((BLOCK2, Block { more: end < self.payload.len(), ..block }.value()));
            self.payload = self.payload[start..end].to_vec();
            self
        }
    }

    /// What a datagram turned out to be.
    pub enum Event {
        Nothing,
        /// A reset, or the reply to a duplicate.
        Send(Vec<u8>),
        Request(Request),
        /// The response that `respond` made has arrived, with what was said there to be delivered by it.
        Acknowledged(Option<u64>),
        /// The response was answered with RST.
        Refused,
    }

    /// A message that was acted on. RFC 7252 §4.5.
    struct Seen {
        peer: SocketAddr,
        /// Of the whole datagram: a restarted mote uses message IDs again, for other requests.
        digest: u64,
        at: Instant,
        lifetime: Duration,
        in_progress: bool,
        /// What a duplicate is answered with; for NON nothing.
        reply: Vec<u8>,
    }

    /// A separate CON response without its ACK. RFC 7252 §4.2.
    struct Open {
        peer: SocketAddr,
        message_id: u16,
        bytes: Vec<u8>,
        retransmitted: u32,
        timeout: Duration,
        due: Instant,
        delivers: Option<u64>,
    }

    /// A request of which some blocks have come. RFC 7959 §2.5.
    struct Assembly {
        peer: SocketAddr,
        path: String,
        body: Vec<u8>,
        touched: Instant,
    }

    /// Everything about message types, message IDs and time.
    pub struct Exchanges {
        next_message_id: u16,
        hasher: RandomState,
        /// In the order in which they came.
        seen: VecDeque<Seen>,
        open: VecDeque<Open>,
        assemblies: VecDeque<Assembly>,
        in_progress: usize,
    }

    impl Exchanges {
        pub fn new(seed: u64) -> Exchanges {
            Exchanges {
                next_message_id: seed as u16,
                hasher: RandomState::new(),
                seen: VecDeque::new(),
                open: VecDeque::new(),
                assemblies: VecDeque::new(),
                in_progress: 0,
            }
        }

        /// Judges a datagram, but remembers nothing: `reply` or `accept` does, when it is acted on.
        pub fn receive(&mut self, now: Instant, peer: SocketAddr, datagram: &[u8]) -> Event {
            let mut packet = match parse(datagram) {
                Ok(packet) => packet,
                Err(reset) => return reset.map_or(Event::Nothing, Event::Send),
            };
            let message_id = packet.header.message_id;
            if matches!(packet.header.get_type(), MessageType::Acknowledgement | MessageType::Reset) {
                let open = self.open.iter().position(|open| open.peer == peer && open.message_id == message_id);
                return match open.and_then(|at| self.open.remove(at)) {
                    None => Event::Nothing,
                    Some(_) if packet.header.get_type() == MessageType::Reset => Event::Refused,
                    Some(open) => Event::Acknowledged(open.delivers),
                };
            }
            let digest = self.hasher.hash_one(datagram);
            let alive = |seen: &&Seen| seen.in_progress || now.saturating_duration_since(seen.at) < seen.lifetime;
            let twin = self.seen.iter().find(|seen| seen.digest == digest && seen.peer == peer && alive(seen));
            if let Some(twin) = twin {
                return Event::Send(twin.reply.clone());
            }
            let code = datagram[1];
            let request = Request { peer, at: now, code, payload: std::mem::take(&mut packet.payload), packet, digest };
            match check_options(&request.packet) {
                Ok(()) => Event::Request(request),
                // RFC 7252 §5.4.1: a NON with an unrecognised critical option is rejected, and RST is optional.
                Err(response) if response.code == ResponseType::BadOption && !request.is_confirmable() => {
                    Event::Nothing
                }
                Err(response) => Event::Send(self.reply(&request, response)),
            }
        }

        /// Whether one more request may wait for Telegram.
        pub fn has_room(&self) -> bool {
            self.in_progress < IN_PROGRESS_MAX
        }

        /// Answers at once: inside the ACK for CON, with a NON for NON.
        pub fn reply(&mut self, request: &Request, response: Response) -> Vec<u8> {
            if request.is_confirmable() {
                let message_id = request.packet.header.message_id;
                let bytes = encode(MessageType::Acknowledgement, message_id, request, response);
                self.remember(request, bytes.clone(), false);
                return bytes;
            }
            self.remember(request, Vec::new(), false);
            encode(MessageType::NonConfirmable, self.message_id(), request, response)
        }

        /// The empty ACK (for NON, nothing), and the promise of `respond`.
        pub fn accept(&mut self, request: &Request) -> Vec<u8> {
            let ack = match request.is_confirmable() {
                true => empty(MessageType::Acknowledgement, request.packet.header.message_id),
                false => Vec::new(),
            };
            self.in_progress += 1;
            self.remember(request, ack.clone(), true);
            ack
        }

        /// The separate response to an accepted request. RFC 7252 §5.2.2. `delivers` comes back with its ACK; `random`
        /// spreads the retransmissions.
        pub fn respond(
            &mut self,
            now: Instant,
            request: &Request,
            response: Response,
            delivers: Option<u64>,
            random: u64,
        ) -> Vec<u8> {
            self.in_progress -= 1;
            let own = |seen: &&mut Seen| seen.in_progress && seen.digest == request.digest && seen.peer == request.peer;
            if let Some(seen) = self.seen.iter_mut().find(own) {
                seen.in_progress = false;
            }
            let message_id = self.message_id();
            if !request.is_confirmable() {
                return encode(MessageType::NonConfirmable, message_id, request, response);
            }
            let bytes = encode(MessageType::Confirmable, message_id, request, response);
            if self.open.len() >= OPEN_MAX {
                self.open.pop_front();
            }
            let steps = (ACK_TIMEOUT * ACK_RANDOM_PERCENT / 100).as_micros() + 1;
            let spread = Duration::from_micros(((u128::from(random) * steps) >> u64::BITS) as u64);
            let timeout = ACK_TIMEOUT + spread;
            self.open.push_back(Open {
                peer: request.peer,
                message_id,
                bytes: bytes.clone(),
                retransmitted: 0,
                timeout,
                due: now + timeout,
                delivers,
            });
            bytes
        }

        /// What is to be sent again now, and when the next is due.
        pub fn due(&mut self, now: Instant) -> (Vec<(SocketAddr, Vec<u8>)>, Option<Instant>) {
            let mut resend = Vec::new();
            self.open.retain_mut(|open| {
                if open.due > now {
                    return true;
                }
                if open.retransmitted == MAX_RETRANSMIT {
                    return false;
                }
                resend.push((open.peer, open.bytes.clone()));
                open.retransmitted += 1;
                open.timeout *= 2;
                open.due = now + open.timeout;
                true
            });
            (resend, self.open.iter().map(|open| open.due).min())
        }

        /// Puts the whole body into a request whose last block has come. `Err` is the answer to all other blocks.
        pub fn assemble(&mut self, request: &mut Request) -> Result<(), Response> {
            let too_large = || Response {
                options: vec![(SIZE1, uint(BODY_MAX as u32))],
                ..Response::error(ResponseType::RequestEntityTooLarge, "At most 8192 bytes")
            };
            let Some(block) = request.block(BLOCK1)? else {
                return if request.payload.len() > BODY_MAX { Err(too_large()) } else { Ok(()) };
            };
            let own = |assembly: &Assembly| assembly.peer == request.peer && assembly.path == request.path();
            self.assemblies.retain(|known| request.at.saturating_duration_since(known.touched) < ASSEMBLY_LIFETIME);
            let known = self.assemblies.iter().position(own).and_then(|at| self.assemblies.remove(at));
            let mut body = match known {
                _ if block.number == 0 => Vec::new(),
                Some(known) if known.body.len() == block.number * block.size() => known.body,
                _ => return Err(Response::error(ResponseType::RequestEntityIncomplete, "A block is missing")),
            };
            let full = request.payload.len() == block.size();
            if request.payload.len() > block.size() || (block.more && !full) {
                return Err(Response::error(ResponseType::BadRequest, "A block is not of its size"));
            }
            if body.len() + request.payload.len() > BODY_MAX {
                return Err(too_large());
            }
            body.extend_from_slice(&request.payload);
            if !block.more {
                request.payload = body;
                return Ok(());
            }
            if self.assemblies.len() >= ASSEMBLIES_MAX {
                self.assemblies.pop_front();
            }
            self.assemblies.push_back(Assembly { peer: request.peer, path: request.path(), body, touched: request.at });
            Err(Response::error(ResponseType::Continue, ""))
        }

        fn message_id(&mut self) -> u16 {
            self.next_message_id = self.next_message_id.wrapping_add(1);
            self.next_message_id
        }

        fn remember(&mut self, request: &Request, reply: Vec<u8>, in_progress: bool) {
            let lifetime = if request.is_confirmable() { EXCHANGE_LIFETIME } else { NON_LIFETIME };
            let (peer, digest, at) = (request.peer, request.digest, request.at);
            let over = |seen: &Seen| at.saturating_duration_since(seen.at) >= EXCHANGE_LIFETIME;
            while self.seen.front().is_some_and(|seen| !seen.in_progress && over(seen)) {
                self.seen.pop_front();
            }
            if self.seen.len() >= SEEN_MAX
                && let Some(oldest) = self.seen.iter().position(|seen| !seen.in_progress)
            {
                self.seen.remove(oldest);
            }
            self.seen.push_back(Seen { peer, digest, at, lifetime, in_progress, reply });
        }
    }

    /// RFC 7252 §3 and §4.2/4.3: `Err` is the RST that a malformed or unexpected CON gets. The codec is laxer than the
    /// RFC, so what it reads must be what it would write: that leaves no marker without payload, for one.
    fn parse(datagram: &[u8]) -> Result<Packet, Option<Vec<u8>>> {
        let [first, code, high, low, ..] = *datagram else { return Err(None) };
        if first >> 6 != 1 {
            return Err(None);
        }
        let kind = first >> 4 & 3;
        let reject = || (kind == 0).then(|| empty(MessageType::Reset, u16::from_be_bytes([high, low])));
        let packet = Packet::from_bytes(datagram).map_err(|_| reject())?;
        let as_expected = match (kind, code >> 5) {
            (2 | 3, _) if code == 0 => datagram.len() == 4,
            (0 | 1, 0) => code != 0,
            (2, 2 | 4 | 5) => true,
            _ => false,
        };
        let same = packet.to_bytes_unlimited().is_ok_and(|bytes| bytes == datagram);
        if as_expected && same { Ok(packet) } else { Err(reject()) }
    }

    /// RFC 7252 §5.4: critical options must be known, of a valid length, and not repeated where they may not be.
    fn check_options(packet: &Packet) -> Result<(), Response> {
        for (&number, values) in packet.options().filter(|(number, _)| *number % 2 == 1) {
            let (shortest, longest, repeatable) = match number {
                3 | PROXY_SCHEME => (1, 255, false), // 3: Uri-Host
                7 | ACCEPT => (0, 2, false),         // 7: Uri-Port
                URI_PATH | URI_QUERY => (0, 255, true),
                BLOCK1 | BLOCK2 => (0, 3, false),
                PROXY_URI => (1, 1034, false),
                _ => {
                    return Err(Response::error(ResponseType::BadOption, &format!("Option {number} is not supported")));
                }
            };
            let valid = values.iter().all(|value| (shortest..=longest).contains(&value.len()));
            if !valid || (values.len() > 1 && !repeatable) {
                return Err(Response::error(ResponseType::BadOption, &format!("Option {number} is malformed")));
            }
        }
        if [PROXY_URI, PROXY_SCHEME].iter().any(|number| packet.get_option((*number).into()).is_some()) {
            return Err(Response::error(ResponseType::ProxyingNotSupported, "This is no proxy"));
        }
        Ok(())
    }

    fn empty(kind: MessageType, message_id: u16) -> Vec<u8> {
        let kind = if kind == MessageType::Reset { 0x70 } else { 0x60 };
        let [high, low] = message_id.to_be_bytes();
        vec![kind, 0, high, low]
    }

    /// Firmware: it takes every payload outside an ACK for configuration, so an error there has none.
    fn encode(kind: MessageType, message_id: u16, request: &Request, mut response: Response) -> Vec<u8> {
        if response.code.is_error() && kind != MessageType::Acknowledgement {
            response.payload.clear();
        }
        // RFC 7959 §2.3: a response to a block says which one.
        if let Ok(Some(block)) = request.block(BLOCK1) {
            let more = response.code == ResponseType::Continue;
            response.options.push((BLOCK1, Block { more, ..block }.value()));
        }
        let mut packet = Packet::new();
        packet.header.set_version(1);
        packet.header.set_type(kind);
        packet.header.code = MessageClass::Response(response.code);
        packet.header.message_id = message_id;
        packet.set_token(request.packet.get_token().to_vec());
        for (number, value) in response.options {
            packet.add_option(number.into(), value);
        }
        packet.payload = response.payload;
        packet.to_bytes_unlimited().unwrap_or_default() // fails only over a size limit
    }

    /// A client's `POST`: CON, with message ID and token out of `seed`.
    pub fn encode_request(path: &str, payload: &[u8], seed: u64) -> Vec<u8> {
        let mut packet = Packet::new();
        packet.header.set_version(1);
        packet.header.code = POST.into();
        packet.header.message_id = seed as u16;
        packet.set_token(seed.to_be_bytes()[..4].to_vec());
        packet.add_option(URI_PATH.into(), path.as_bytes().to_vec());
        packet.payload = payload.to_vec();
        packet.to_bytes_unlimited().unwrap_or_default()
    }

    /// What a client receives for its request.
    pub enum Answer {
        Acknowledged,
        Response { code: String, payload: Vec<u8>, acknowledgement: Option<Vec<u8>> },
    }

    /// `None`: not for this request.
    pub fn decode_response(datagram: &[u8], request: &[u8]) -> Option<Answer> {
        let own = Packet::from_bytes(request).ok()?;
        let packet = Packet::from_bytes(datagram).ok()?;
        let message_id = packet.header.message_id;
        if packet.header.code == MessageClass::Empty {
            let acknowledges = packet.header.get_type() == MessageType::Acknowledgement;
            return (acknowledges && message_id == own.header.message_id).then_some(Answer::Acknowledged);
        }
        let confirmable = packet.header.get_type() == MessageType::Confirmable;
        (packet.get_token() == own.get_token()).then(|| Answer::Response {
            code: packet.header.get_code(),
            payload: packet.payload.clone(),
            acknowledgement: confirmable.then(|| empty(MessageType::Acknowledgement, message_id)),
        })
    }
}

#[cfg(any(test, fuzzing))]
#[path = "tests/unit/fuzz.rs"]
pub mod fuzz;
#[cfg(test)]
#[path = "tests/unit/mod.rs"]
mod tests;
