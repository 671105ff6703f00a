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
//! one more for each further chat; one that writes to people; one for the heartbeat; short ones that save, and look up
//! addresses. What they share is `Gateway`.
//!
//! The file reads top-down. A datagram travels `serve` → `coap::Exchanges::receive` → `dispatch` → `deliver_message` or
//! `fetch_update` → `Exchanges::respond`; what people write travels `poll` → `judge` → `State` → `State::tokens_for`.

use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::os::unix::net::{SocketAddr as UnixAddr, UnixDatagram};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use std::{env, iter, thread};

use coap::{Exchanges, Request, Response};
use coap_lite::ResponseType;
use log::{LevelFilter, debug, error, info, warn};
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
/// Share of it for one connection (TCP and TLS, over all addresses of the host), and for a look-up of them: leaves time
/// for a second attempt.
const CONNECT_BUDGET: Duration = Duration::from_secs(5);
/// Calls that surely did not reach Telegram, and HTTP 429, are tried this often in all.
const ATTEMPTS: u32 = 3;
const ATTEMPT_PAUSE: Duration = Duration::from_millis(500);
/// How long idle connections are kept (Telegram closes them after about a minute itself), and after which its host is
/// looked up anew.
const REUSE: Duration = Duration::from_secs(60);
/// Of one answer of the Bot API: 100 updates of 4,096 characters, each `\uXXXX`, with the message replied to.
const BODY_MAX: u64 = 8 << 20;
/// Bot API, getUpdates: updates in one page.
const PAGE: usize = 100;
/// Of the reason of a failed call in the log, characters.
const REASON_MAX: usize = 200;
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

const MESSAGES_SENT: &str = "Messages sent successfully";
const NO_UPDATES: &str = "No Updates";
const MISSING_FIELDS: &str = "Missing required fields";
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
    let words: Vec<String> = env::args_os()
        .skip(1)
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let outcome = match words[..] {
        [] => Config::load().and_then(serve),
        ["check"] => Config::load().and_then(|config| check(&config)),
        ["send", ref options @ ..] => match send_options(options) {
            Some([chat, text, to]) => {
                Config::load().and_then(|config| send(&config, chat, text, to))
            }
            None => return usage(),
        },
        ["--help" | "-h"] => say(USAGE),
        ["--version" | "-V"] => say(concat!("coap_websocket ", env!("CARGO_PKG_VERSION"))),
        _ => return usage(),
    };
    let Err(reason) = outcome else {
        return ExitCode::SUCCESS;
    };
    let _ = writeln!(io::stderr(), "coap_websocket: {reason}");
    ExitCode::FAILURE
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

/// Chat, message and, if given, URI (else empty), in any order.
fn send_options<'a>(words: &[&'a str]) -> Option<[&'a str; 3]> {
    let mut values = [None, None, Some("")];
    for pair in words.chunks(2) {
        let slot = ["-i", "-m", "-u"]
            .iter()
            .position(|option| *option == pair[0])?;
        values[slot] = Some(*pair.get(1)?);
    }
    let [chat, text, uri] = values;
    Some([
        chat?,
        text?,
        uri.filter(|uri| uri.is_empty() || uri.starts_with("coap://"))?,
    ])
}

/// A token or a password. It has neither `Debug` nor `Display`, so it cannot get into a log line by accident.
#[derive(Clone)]
struct Secret(String);

impl Secret {
    /// A bot token, `<bot id>:<letters, digits, _ and ->`, so that it can stand in a URL as it is.
    fn token(text: &str) -> Option<Secret> {
        let (id, key) = text.split_once(':')?;
        let digits = (1..=20).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_digit());
        let letters = key
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
        (digits && letters && (1..=100).contains(&key.len())).then(|| Secret(text.to_string()))
    }

    /// The part of a bot token before the colon: the bot's user id, which is public.
    fn bot_id(&self) -> &str {
        self.0.split(':').next().unwrap_or_default()
    }

    /// Compares in a time that depends on the guess alone.
    fn is(&self, guess: &str) -> bool {
        let pairs = guess.bytes().zip(self.0.bytes().cycle());
        let unlike = pairs.fold(self.0.len() ^ guess.len(), |unlike, (a, b)| {
            unlike | usize::from(a ^ b)
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
    level: LevelFilter,
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
        let dot_env = credentials
            .as_ref()
            .map_or(PathBuf::from(".env"), |dir| dir.join("env"));
        let ini = credentials.unwrap_or_default().join("config.ini");
        let variables = settings(&dot_env, &read_optional(&dot_env)?, false)?;
        let telegram = settings(&ini, &read_optional(&ini)?, true)?;
        let unknown = telegram
            .iter()
            .filter(|(key, _)| !["bot_token", "url", "ip_family"].contains(&key.as_str()));
        let mut warnings: Vec<String> = unknown
            .map(|(key, set)| format!("{}: unknown key `{key}` is ignored", set.origin))
            .collect();
        let key = |name| {
            telegram
                .get(name)
                .cloned()
                .filter(|set| set.text != "your_telegram_bot_token")
        };
        let variable = |name| lookup(&variables, name);
        let url = judged(key("url"), "is not of the form https://host/bot", https_url)?;
        let token = "is not a bot token (digits, a colon, letters, as BotFather shows it)";
        let password = "holds white space, so nobody could write it in a `config` message";
        let address = judged(
            variable("COAP_SERVER_IP"),
            "is not an IP address",
            ip_address,
        )?;
        let port = judged(
            variable("COAP_SERVER_PORT"),
            "is not a port (0 to 65535)",
            |text| text.parse().ok(),
        )?;
        Ok(Config {
            url: url.unwrap_or_else(|| "https://api.telegram.org/bot".to_string()),
            token: judged(key("bot_token"), token, Secret::token)?,
            ip_family: judged(key("ip_family"), "is none of any, ipv4, ipv6", ip_family)?
                .unwrap_or(IpFamily::Any),
            password: judged(variable("PASSWORD"), password, one_word)?,
            address: address.unwrap_or_else(|| "::1".to_string()),
            port: port.unwrap_or(coap::PORT),
            level: log_level(variable("RUST_LOG"), &mut warnings),
            proxy: judged(
                variable("HTTPS_PROXY"),
                "is not of the form http://host:port",
                http_proxy,
            )?,
            roots: variable("SSL_CERT_FILE")
                .map(|file| read_roots(&file))
                .transpose()?,
            state_path: directory("STATE_DIRECTORY")
                .unwrap_or_default()
                .join("state.json"),
            log_path: directory("LOGS_DIRECTORY")
                .unwrap_or_default()
                .join("coap_server.log"),
            warnings,
        })
    }

    /// Where it listens, for people: `[::1]:5683`.
    fn name(&self) -> String {
        let (address, port) = (&self.address, self.port);
        if address.contains(':') {
            format!("[{address}]:{port}")
        } else {
            format!("{address}:{port}")
        }
    }
}

/// A directory that systemd names; of several, separated by colons, the first.
fn directory(variable: &str) -> Option<PathBuf> {
    let value = env::var(variable).ok()?;
    value
        .split(':')
        .next()
        .filter(|first| !first.is_empty())
        .map(PathBuf::from)
}

/// An empty text where there is no such file.
fn read_optional(path: &Path) -> Result<String, String> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(String::new()),
        Err(error) => return Err(format!("cannot read {}: {error}", path.display())),
    };
    String::from_utf8(bytes).map_err(|error| {
        let line = 1 + error.as_bytes()[..error.utf8_error().valid_up_to()]
            .iter()
            .filter(|&&b| b == b'\n')
            .count();
        format!("{}:{line}: not UTF-8 text", path.display())
    })
}

/// What is set, and where it stands, as in `.env:3`.
#[derive(Clone)]
struct Setting {
    name: String,
    text: String,
    origin: String,
}

/// The lines `name = value` that are neither empty nor comments; of an INI file those of `[telegram]`, for the other
/// sections belong to the firmware's build.
fn settings(path: &Path, content: &str, ini: bool) -> Result<BTreeMap<String, Setting>, String> {
    let mut found = BTreeMap::<String, Setting>::new();
    let mut section = if ini { None } else { Some("telegram") };
    let content = content.strip_prefix('\u{feff}').unwrap_or(content);
    for (number, line) in (1..).zip(content.lines().map(str::trim)) {
        let fault = |reason: &str| format!("{}:{number}: {reason}", path.display());
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        if let Some(name) = line.strip_prefix('[').filter(|_| ini) {
            section = Some(
                name.strip_suffix(']')
                    .ok_or(fault("`[` without `]`"))?
                    .trim(),
            );
            continue;
        }
        match section {
            None => {
                return Err(fault(
                    "stands before the first section; put [telegram] above it",
                ));
            }
            Some("telegram") => {}
            Some(_) => continue,
        }
        let (name, value) = line
            .strip_prefix("export ")
            .unwrap_or(line)
            .split_once('=')
            .unwrap_or_default();
        let (name, value) = (name.trim(), value.trim());
        if name.is_empty() || name.contains(|c: char| c.is_whitespace() || c.is_control()) {
            return Err(fault("not `NAME=value`"));
        }
        let name = if ini {
            name.to_ascii_lowercase()
        } else {
            name.to_string()
        };
        let quoted = ['"', '\'']
            .iter()
            .find_map(|&quote| value.strip_prefix(quote)?.strip_suffix(quote));
        let (text, origin) = (
            quoted.unwrap_or(value).to_string(),
            format!("{}:{number}", path.display()),
        );
        if let Some(first) = found.insert(name.clone(), Setting { name, text, origin }) {
            return Err(fault(&format!(
                "set before in {}; remove one of them",
                first.origin
            )));
        }
    }
    Ok(found)
}

/// The real environment wins over `.env`, and an empty variable is not set.
fn lookup(dot_env: &BTreeMap<String, Setting>, name: &str) -> Option<Setting> {
    let text =
        env::var_os(name).map_or(String::new(), |value| value.to_string_lossy().into_owned());
    let real = Some(Setting {
        name: name.to_string(),
        text,
        origin: "environment".to_string(),
    });
    real.into_iter()
        .chain(dot_env.get(name).cloned())
        .find(|set| !set.text.is_empty())
}

/// What `judge` makes of a setting (`None`: it is not set), or what is wrong where. Its text is not repeated, for it may
/// be a secret.
fn judged<T>(
    set: Option<Setting>,
    fault: &str,
    judge: fn(&str) -> Option<T>,
) -> Result<Option<T>, String> {
    let set = set.filter(|set| !set.text.is_empty());
    set.map(|set| judge(&set.text).ok_or(format!("{}: {} {fault}", set.origin, set.name)))
        .transpose()
}

fn one_word(text: &str) -> Option<Secret> {
    (!text.contains(char::is_whitespace)).then(|| Secret(text.to_string()))
}

fn log_level(set: Option<Setting>, warnings: &mut Vec<String>) -> LevelFilter {
    let Some(set) = set else {
        return LevelFilter::Info;
    };
    set.text.parse().unwrap_or_else(|_| {
        warnings.push(format!(
            "{}: RUST_LOG is none of off, error, warn, info, debug; info is used",
            set.origin
        ));
        LevelFilter::Info
    })
}

fn https_url(text: &str) -> Option<String> {
    let uri: ureq::http::Uri = text.parse().ok()?;
    let valid = uri.scheme_str() == Some("https") && uri.query().is_none() && !text.contains('#');
    (valid && !uri.host()?.is_empty()).then(|| text.to_string())
}

fn ip_family(text: &str) -> Option<IpFamily> {
    match text {
        "any" => Some(IpFamily::Any),
        "ipv4" => Some(IpFamily::Ipv4Only),
        "ipv6" => Some(IpFamily::Ipv6Only),
        _ => None,
    }
}

fn ip_address(text: &str) -> Option<String> {
    let (ip, zone) = text
        .split_once('%')
        .map_or((text, None), |(ip, zone)| (ip, Some(zone)));
    let valid = ip.parse::<IpAddr>().ok()?.is_ipv6() || zone.is_none();
    (valid && zone != Some("")).then(|| text.to_string())
}

/// ureq panics on SOCKS without the feature for it.
fn http_proxy(text: &str) -> Option<ureq::Proxy> {
    let proxy = ureq::Proxy::new(text).ok()?;
    matches!(
        proxy.protocol(),
        ureq::ProxyProtocol::Http | ureq::ProxyProtocol::Https
    )
    .then_some(proxy)
}

fn read_roots(file: &Setting) -> Result<Vec<ureq::tls::Certificate<'static>>, String> {
    let Setting {
        text: path, origin, ..
    } = file;
    let pem = fs::read(path)
        .map_err(|error| format!("{origin}: cannot read SSL_CERT_FILE {path}: {error}"))?;
    let certificates = ureq::tls::parse_pem(&pem).filter_map(|item| match item {
        Ok(ureq::tls::PemItem::Certificate(certificate)) => Some(certificate),
        _ => None,
    });
    let roots: Vec<_> = certificates.collect();
    if roots.is_empty() {
        return Err(format!(
            "{origin}: SSL_CERT_FILE {path} holds no PEM certificate"
        ));
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
    /// Never locked across I/O either, but for lines of the log; see `save`.
    state: Mutex<State>,
    /// What `state.json` holds; locked while it is written.
    saved: Mutex<String>,
    journal: Journal,
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
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |age| age.as_secs())
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<(), String> {
    let started = thread::Builder::new().name(name.to_string()).spawn(run);
    started
        .map(drop)
        .map_err(|error| format!("cannot start a thread: {error}"))
}

/// Serves for ever. Faults of the start end it; afterwards nothing that a datagram holds does.
fn serve(config: Config) -> Result<(), String> {
    start_log(&config)?;
    config
        .warnings
        .iter()
        .for_each(|warning| warn!("{warning}"));
    if config.token.is_none() {
        warn!(
            "no bot_token in config.ini: /message serves any token, /update the first bot that Telegram accepts"
        );
    }
    let state = open_state(&config)?;
    let journal = Journal::open(&config.state_path.with_extension("journal"))?;
    notify("READY=1");
    let socket = bind(&config)?;
    let local = socket
        .local_addr()
        .map_err(|error| format!("cannot read the socket's address: {error}"))?;
    info!(
        "coap_websocket {} serves CoAP on {local}",
        env!("CARGO_PKG_VERSION")
    );
    notify(&format!("STATUS=Serves CoAP on {local}"));

    let (answers, queue) = mpsc::sync_channel(ANSWERS_MAX);
    let gateway = Arc::new(Gateway {
        telegram: Telegram::new(&config),
        socket,
        exchanges: Mutex::new(Exchanges::new(coap::random())),
        state: Mutex::new(state),
        saved: Mutex::default(),
        journal,
        polling: Mutex::new(false),
        polled: Condvar::new(),
        answers,
        forwarded: AtomicU64::new(0),
        failures: AtomicU64::new(0),
        config,
    });
    // At once: what people write from now on must not count as older than the first start after a crash.
    gateway.save().unwrap_or_else(|reason| error!("{reason}"));
    let (writer, heart) = (Arc::clone(&gateway), Arc::clone(&gateway));
    spawn("answers", move || write_to_people(&writer, &queue))?;
    spawn("heartbeat", move || heartbeat(&heart))?;
    receive_loop(&gateway)
}

/// Waits for an address that does not exist yet: READY was said before, for a unit that waits would hold up the boot.
fn bind(config: &Config) -> Result<UdpSocket, String> {
    const NO_SUCH_DEVICE: i32 = 19; // ENODEV: the interface of a zone went away
    let name = config.name();
    let mut told = false;
    loop {
        let error = match UdpSocket::bind((config.address.as_str(), config.port)) {
            Ok(socket) => return Ok(socket),
            Err(error) => error,
        };
        // A zone that names no interface fails in the look-up, which has no OS error.
        let absent = matches!(error.raw_os_error(), None | Some(NO_SUCH_DEVICE));
        if !absent && error.kind() != io::ErrorKind::AddrNotAvailable {
            return Err(format!("cannot bind {name}: {error}"));
        }
        if !told {
            warn!("address {name} does not exist yet; trying every second");
            notify(&format!("STATUS=Waits for address {name} to appear"));
            told = true;
        }
        notify("WATCHDOG=1");
        thread::sleep(TICK);
    }
}

fn receive_loop(gateway: &Arc<Gateway>) -> ! {
    let mut datagram = [0; coap::DATAGRAM_MAX];
    let (mut watched, mut busy) = (None, false);
    bound_memory();
    loop {
        let now = Instant::now();
        if watched.is_none_or(|last| now.saturating_duration_since(last) >= TICK) {
            notify("WATCHDOG=1");
            watched = Some(now);
        }
        let (resend, next) = lock(&gateway.exchanges).due(now);
        resend
            .iter()
            .for_each(|(peer, bytes)| gateway.transmit(*peer, bytes));
        let sleep = next
            .map_or(TICK, |due| due.saturating_duration_since(now))
            .clamp(Duration::from_millis(1), TICK);
        let _ = gateway.socket.set_read_timeout(Some(sleep));
        match gateway.socket.recv_from(&mut datagram) {
            Ok((length, peer)) => {
                receive(gateway, peer, &datagram[..length]);
                busy = true;
            }
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                if std::mem::take(&mut busy) {
                    bound_memory();
                }
            }
            Err(error) => {
                warn!("cannot receive: {error}");
                thread::sleep(TICK);
            }
        }
    }
}

/// glibc makes eight arenas for each core, and keeps in them what a crowd of threads needed: after 32 messages to ten
/// chats at once, half of 14 MB. Two are enough, and nearly all can be given back.
fn bound_memory() {
    #[cfg(target_env = "gnu")]
    {
        use std::ffi::c_int;
        unsafe extern "C" {
            safe fn mallopt(parameter: c_int, value: c_int) -> c_int;
            safe fn malloc_trim(keep: usize) -> c_int;
        }
        mallopt(-8, 2); // M_ARENA_MAX
        malloc_trim(0);
    }
}

fn receive(gateway: &Arc<Gateway>, peer: SocketAddr, datagram: &[u8]) {
    let event = lock(&gateway.exchanges).receive(Instant::now(), peer, datagram);
    match event {
        coap::Event::Nothing => {}
        coap::Event::Send(bytes) => gateway.transmit(peer, &bytes),
        coap::Event::Request(request) => dispatch(gateway, request),
        coap::Event::Refused => {
            info!("{peer} did not want the response (RST); changes in it are offered again")
        }
        coap::Event::Acknowledged(None) => {}
        coap::Event::Acknowledged(Some(sequence)) => {
            lock(&gateway.state).acknowledge(mote(peer), sequence);
            let gateway = Arc::clone(gateway);
            // Not here: the disk may be slow. If it fails, the next save has it, or the mote is told again.
            let _ = spawn("save", move || {
                gateway.save().unwrap_or_else(|reason| error!("{reason}"))
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
            let reason = String::from_utf8_lossy(&response.payload);
            log_outcome(
                &request,
                &response,
                if response.code.is_error() {
                    &reason
                } else {
                    ""
                },
            );
            let bytes = lock(&gateway.exchanges).reply(&request, response);
            return gateway.transmit(request.peer, &bytes);
        }
    };
    let acknowledgement = lock(&gateway.exchanges).accept(&request);
    gateway.transmit(request.peer, &acknowledgement);
    let request = Arc::new(request);
    let (worker, accepted) = (Arc::clone(gateway), Arc::clone(&request));
    let started = spawn("request", move || {
        let deadline = accepted.at + TELEGRAM_BUDGET;
        let (response, detail) = match work {
            Work::Message(message) => deliver_message(&worker, &message, &accepted, deadline),
            Work::Update(token) => fetch_update(&worker, &token, &accepted, deadline),
            Work::Repeated(true) => (
                Response::text(ResponseType::Content, MESSAGES_SENT),
                "sent before".to_string(),
            ),
            Work::Repeated(false) => (
                Response::failed(),
                "not sent again: it was begun before a restart".to_string(),
            ),
        };
        worker.respond(&accepted, response, &detail);
    });
    if let Err(reason) = started {
        gateway.respond(&request, Response::failed(), &reason);
    }
}

/// What an accepted request is about.
enum Work {
    Message(Message),
    Update(Secret),
    /// A message that was handled already, and whether it was sent: a further block of its answer, or a duplicate of
    /// one that came before a restart.
    Repeated(bool),
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
    if let Some(sent) = gateway.journal.find(request.digest, unix_now()) {
        return Ok(Some(Work::Repeated(sent)));
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
    request.check_options()?;
    let (resource, method, format) = match request.path().as_str() {
        "message" => (Resource::Message, coap::POST, coap::TEXT_PLAIN),
        "update" => (Resource::Update, coap::POST, coap::TEXT_PLAIN),
        ".well-known/core" => (Resource::Core, coap::GET, coap::LINK_FORMAT),
        _ => return Err(Response::error(NotFound, "No such resource")),
    };
    if request.code != method {
        return Err(Response::error(MethodNotAllowed, "Method not allowed"));
    }
    if method == coap::POST
        && request
            .uint(coap::CONTENT_FORMAT)
            .is_some_and(|given| given != coap::TEXT_PLAIN)
    {
        return Err(Response::error(UnsupportedContentFormat, "Only text/plain"));
    }
    if request
        .uint(coap::ACCEPT)
        .is_some_and(|wanted| wanted != format)
    {
        return Err(Response::error(
            NotAcceptable,
            "Not available in this format",
        ));
    }
    Ok(resource)
}

/// The links that match every `name=value` of the query; `*` at the end of a value stands for anything. RFC 6690 §4.1.
fn discovery(request: &Request) -> Response {
    let matches = |href: &str, rt: &str, query: &str| {
        let (name, value) = query.split_once('=').unwrap_or((query, "*"));
        let own = match name {
            "href" => href,
            "rt" => rt,
            "ct" => "0",
            _ => return false,
        };
        value
            .strip_suffix('*')
            .map_or(own == value, |start| own.starts_with(start))
    };
    let queries = request.strings(coap::URI_QUERY);
    let mut links = Vec::new();
    for (href, rt) in [
        ("/message", "telegram.message"),
        ("/update", "telegram.update"),
    ] {
        if queries.iter().all(|query| matches(href, rt, query)) {
            links.push(format!("<{href}>;rt=\"{rt}\";ct=0"));
        }
    }
    Response::content(ResponseType::Content, &links.join(","), coap::LINK_FORMAT).in_block2(request)
}

/// Whether the request can be carried out.
fn judge_request(
    config: &Config,
    pinned: Option<&str>,
    what: Resource,
    request: &Request,
) -> Result<Work, Response> {
    if request
        .block(coap::BLOCK2)?
        .is_some_and(|block| block.number > 0)
    {
        let further = what == Resource::Message && request.payload.is_empty();
        return if further {
            Ok(Work::Repeated(true))
        } else {
            Err(bad_request("No such block"))
        };
    }
    let payload = String::from_utf8_lossy(&request.payload);
    let [url, token, chat_ids, text] = fields(&payload);
    if url.is_empty() || token.is_empty() {
        return Err(bad_request(MISSING_FIELDS));
    }
    let served = match (&config.token, what) {
        (Some(own), _) => own.is(token),
        (None, Resource::Update) => {
            pinned.is_none_or(|bot| bot == Secret(token.to_string()).bot_id())
        }
        (None, _) => true,
    };
    if url != config.url || !served {
        let what = if served { "url" } else { "token" };
        return Err(Response::error(
            ResponseType::Forbidden,
            &format!("This gateway does not serve that {what}"),
        ));
    }
    let token = Secret::token(token).ok_or(bad_request("Malformed token"))?;
    if what == Resource::Update {
        return Ok(Work::Update(token));
    }
    let chats = chats(chat_ids)?;
    match text.chars().count() {
        length if length == 0 || chats.is_empty() => Err(bad_request(MISSING_FIELDS)),
        _ if chats.len() > USERS_MAX => Err(bad_request(&format!(
            "Too many chat ids, at most {USERS_MAX}"
        ))),
        length if length > TEXT_MAX => Err(bad_request(&format!(
            "Text too long, at most {TEXT_MAX} characters"
        ))),
        _ => Ok(Work::Message(Message {
            token,
            chats,
            text: text.to_string(),
        })),
    }
}

fn bad_request(reason: &str) -> Response {
    Response::error(ResponseType::BadRequest, reason)
}

/// What a mote wants to have sent.
struct Message {
    token: Secret,
    chats: Vec<Value>,
    text: String,
}

/// The values of url, token, chat_ids and text (empty: missing), which are not percent-encoded. A key separates only
/// where it stands at the start or behind `&`, and only once: a text may hold anything else.
fn fields(payload: &str) -> [&str; 4] {
    const KEYS: [&str; 4] = ["url=", "token=", "chat_ids=", "text="];
    let payload = trim(payload);
    let starts = KEYS.map(|key| match payload.starts_with(key) {
        true => Some((0, key.len())),
        false => payload
            .find(&format!("&{key}"))
            .map(|at| (at, at + 1 + key.len())),
    });
    let ends = |start| {
        starts
            .iter()
            .flatten()
            .map(|next| next.0)
            .filter(|next| *next > start)
            .min()
    };
    starts.map(|found| match found {
        Some((start, value)) => trim(&payload[value..ends(start).unwrap_or(payload.len())]),
        None => "",
    })
}

/// Firmware: payloads are padded with NUL, texts may end in a line feed.
fn trim(text: &str) -> &str {
    text.trim_matches(|c: char| c == '\0' || c.is_whitespace())
}

/// Each chat once.
fn chats(list: &str) -> Result<Vec<Value>, Response> {
    let mut chats = Vec::new();
    for entry in list.split(',').map(trim).filter(|entry| !entry.is_empty()) {
        let id = chat_id(entry).ok_or(bad_request("Malformed chat id"))?;
        if !chats.contains(&id) {
            chats.push(id);
        }
    }
    Ok(chats)
}

/// Bot API, `chat_id`: "unique identifier for the target chat or username of the target channel", `@name`.
fn chat_id(text: &str) -> Option<Value> {
    let Some(name) = text.strip_prefix('@') else {
        return text
            .parse::<i64>()
            .ok()
            .filter(|_| !text.starts_with('+'))
            .map(Value::from);
    };
    let valid = (1..=32).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    valid.then(|| text.into())
}

// ---------------------------------------------------------------------------------------------------------------------
// Requests that need Telegram
// ---------------------------------------------------------------------------------------------------------------------

impl Gateway {
    /// A datagram that cannot be sent is one that was lost: CoAP retransmits.
    fn transmit(&self, peer: SocketAddr, bytes: &[u8]) {
        if !bytes.is_empty()
            && let Err(error) = self.socket.send_to(bytes, peer)
        {
            debug!("cannot send to {peer}: {error}");
        }
    }

    fn respond(&self, request: &Request, response: Response, detail: &str) {
        let response = response.in_block2(request);
        log_outcome(request, &response, detail);
        let bytes =
            lock(&self.exchanges).respond(Instant::now(), request, response, coap::random());
        self.transmit(request.peer, &bytes);
    }

    /// Writes `state.json` if it is not what it should be. Call it without a lock.
    fn save(&self) -> Result<(), String> {
        let mut saved = lock(&self.saved);
        let text = lock(&self.state).to_json();
        if *saved != text {
            let path = &self.config.state_path;
            replace(path, &text)
                .map_err(|error| format!("cannot write {}: {error}", path.display()))?;
            *saved = text;
        }
        Ok(())
    }
}

/// Sends the text to every chat that has not asked to be left alone. The response, and what the log says of it.
fn deliver_message(
    gateway: &Gateway,
    message: &Message,
    request: &Request,
    deadline: Instant,
) -> (Response, String) {
    let Message {
        token,
        chats: listed,
        text,
    } = message;
    let mote = mote(request.peer);
    let chats: Vec<&Value> = {
        let mut state = lock(&gateway.state);
        if state.notice_restart(mote, listed) {
            info!("{mote} does not know its users any more: it will be told everything again");
        }
        listed.iter().filter(|id| !state.is_removed(id)).collect()
    };
    let entry = gateway.journal.begin(request);
    let results = gateway.telegram.send_to_all(token, &chats, text, deadline);
    let failures = || {
        iter::zip(&chats, &results)
            .filter_map(|(chat, result)| Some((chat, result.as_ref().err()?)))
    };
    for (chat, failure) in failures() {
        warn!("sendMessage to {chat} failed: {}", failure.reason);
        if let (Some(403), Some(id)) = (failure.code, chat.as_i64()) {
            let user = lock(&gateway.state).remove(id, false); // not as an argument of info!, which may be off
            info!("{user} is removed, for Telegram refuses messages to it");
        }
    }
    gateway.save().unwrap_or_else(|reason| error!("{reason}"));
    let failed = failures().count();
    let sent = chats.len() - failed;
    gateway.forwarded.fetch_add(sent as u64, Relaxed);
    gateway.failures.fetch_add(failed as u64, Relaxed);
    let done = chats.is_empty() || sent > 0;
    gateway.journal.end(entry, done);
    let response = if done {
        Response::text(ResponseType::Content, MESSAGES_SENT)
    } else {
        Response::failed()
    };
    (response, format!("{sent} of {} chats", listed.len()))
}

/// Fetches what people wrote, then answers with what this mote has not acknowledged.
fn fetch_update(
    gateway: &Gateway,
    token: &Secret,
    request: &Request,
    deadline: Instant,
) -> (Response, String) {
    if let Err(reason) = poll(gateway, token, deadline) {
        gateway.failures.fetch_add(1, Relaxed);
        return (Response::failed(), reason);
    }
    // A block that is not valid was answered before.
    let limit = request
        .block(coap::BLOCK2)
        .ok()
        .flatten()
        .map_or(REPLY_MAX, |block| block.size().min(REPLY_MAX));
    let (tokens, last, left) = lock(&gateway.state).tokens_for(mote(request.peer), limit);
    match (last, left) {
        (None, 0) => (
            Response::text(ResponseType::Valid, NO_UPDATES),
            String::new(),
        ),
        (None, _) => (
            Response::failed(),
            format!("no change fits into blocks of {limit} bytes"),
        ),
        _ => {
            let rest = if left > 0 {
                format!(", {left} left for the next poll")
            } else {
                String::new()
            };
            let response = Response::text(ResponseType::Content, &tokens);
            (
                Response {
                    delivers: last,
                    ..response
                },
                tokens + &rest,
            )
        }
    }
}

/// Handles every waiting update.
fn poll(gateway: &Gateway, token: &Secret, deadline: Instant) -> Result<(), String> {
    let remaining = deadline.saturating_duration_since(Instant::now());
    let turn = gateway
        .polled
        .wait_timeout_while(lock(&gateway.polling), remaining, |busy| *busy);
    let (mut busy, _) = turn.unwrap_or_else(PoisonError::into_inner);
    if *busy {
        return Err("getUpdates: another request still waits for Telegram".to_string());
    }
    *busy = true;
    drop(busy);
    let mut result = Ok(true);
    while matches!(result, Ok(true)) {
        result = poll_page(gateway, token, deadline);
    }
    *lock(&gateway.polling) = false;
    gateway.polled.notify_one();
    result.map(drop)
}

/// Whether there may be more. Progress is saved before it is confirmed to Telegram (by the next page's offset) and
/// before anybody is answered.
fn poll_page(gateway: &Gateway, token: &Secret, deadline: Instant) -> Result<bool, String> {
    gateway.save()?; // Nothing to do, unless it failed the last time or a mote restarted meanwhile.
    let (bot, offset) = {
        let state = lock(&gateway.state);
        (state.bot.clone(), state.offset)
    };
    if bot.is_some_and(|bot| bot != token.bot_id()) {
        return Err("getUpdates: another bot was served first".to_string());
    }
    let parameters =
        json!({"offset": offset, "limit": PAGE, "timeout": 0, "allowed_updates": ["message"]});
    let result = gateway
        .telegram
        .call(token, "getUpdates", &parameters, deadline);
    let result = result.map_err(|failure| format!("getUpdates: {}", failure.reason))?;
    let updates = result
        .as_array()
        .ok_or("getUpdates: Telegram's answer is not a list")?;
    {
        let mut state = lock(&gateway.state);
        state.bot = Some(token.bot_id().to_string());
        updates
            .iter()
            .for_each(|update| handle_update(&mut state, update, &gateway.config, unix_now()));
        if updates.len() < PAGE {
            state.started = 0;
        }
    }
    gateway.save()?;
    let mut state = lock(&gateway.state);
    for answer in state.answers.drain(..) {
        if gateway.answers.try_send((token.clone(), answer)).is_err() {
            warn!("too many answers wait to be sent: one is dropped");
        }
    }
    Ok(updates.len() >= PAGE && state.offset != offset)
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
            .input_buffer_size(4 << 10)
            .output_buffer_size(4 << 10)
            .max_idle_connections(coap::IN_PROGRESS_MAX) // a message costs one round trip when it finds one
            .max_idle_connections_per_host(coap::IN_PROGRESS_MAX)
            .max_idle_age(REUSE)
            .user_agent(concat!("coap_websocket/", env!("CARGO_PKG_VERSION")))
            .build();
        let agent =
            ureq::Agent::with_parts(agent, DefaultConnector::default(), Addresses::default());
        Telegram {
            agent,
            url: config.url.clone(),
        }
    }

    /// One `sendMessage` for each chat, all at the same time; the results in the same order.
    fn send_to_all(
        &self,
        token: &Secret,
        to: &[&Value],
        text: &str,
        deadline: Instant,
    ) -> Vec<Result<(), Failure>> {
        let send = |chat: &Value| {
            let parameters = json!({"chat_id": chat, "text": text});
            self.call(token, "sendMessage", &parameters, deadline)
                .map(drop)
        };
        let Some((first, others)) = to.split_first() else {
            return Vec::new();
        };
        thread::scope(|scope| {
            let start = |&chat| thread::Builder::new().spawn_scoped(scope, move || send(chat));
            let threads: Vec<_> = others.iter().map(start).collect();
            let own = send(first);
            let join = |thread: io::Result<thread::ScopedJoinHandle<'_, _>>| match thread {
                Ok(thread) => thread
                    .join()
                    .unwrap_or_else(|_| Err(Failure::unknown("the thread died".to_string()))),
                Err(error) => Err(Failure::unknown(format!("cannot start a thread: {error}"))),
            };
            iter::once(own)
                .chain(threads.into_iter().map(join))
                .collect()
        })
    }

    /// Calls a method. Again only where the first call surely had no effect, and while the deadline allows it.
    fn call(
        &self,
        token: &Secret,
        method: &str,
        parameters: &Value,
        deadline: Instant,
    ) -> Result<Value, Failure> {
        for _ in 1..ATTEMPTS {
            match self.call_once(token, method, parameters, deadline) {
                Err(Failure {
                    retry_after: Some(pause),
                    ..
                }) if Instant::now() + pause < deadline => {
                    thread::sleep(pause);
                }
                result => return result,
            }
        }
        self.call_once(token, method, parameters, deadline)
    }

    fn call_once(
        &self,
        token: &Secret,
        method: &str,
        parameters: &Value,
        deadline: Instant,
    ) -> Result<Value, Failure> {
        let remaining = deadline.saturating_duration_since(Instant::now());
        if remaining.is_zero() {
            return Err(Failure::unknown("no time left".to_string()));
        }
        let bytes = parameters.to_string().into_bytes();
        let mut body = Body {
            bytes: &bytes,
            read: false,
        };
        let mut request = self.agent.post(format!("{}{}/{method}", self.url, token.0));
        request = request
            .header("content-type", "application/json")
            .header("content-length", bytes.len());
        // ureq caches the TLS configuration only for requests with the agent's own settings.
        if remaining + Duration::from_millis(100) < TELEGRAM_BUDGET {
            request = request.config().timeout_global(Some(remaining)).build();
        }
        let answer = request
            .send(ureq::SendBody::from_reader(&mut body))
            .and_then(|mut response| {
                let status = response.status().as_u16();
                Ok((
                    status,
                    response
                        .body_mut()
                        .with_config()
                        .limit(BODY_MAX)
                        .read_to_vec()?,
                ))
            });
        let result = answer.map_err(|error| Failure {
            retry_after: (!body.read).then_some(ATTEMPT_PAUSE),
            ..Failure::unknown(describe(&error))
        });
        let result = result.and_then(|(status, body)| Failure::or_result(status, &body));
        result.map_err(|failure| {
            let reason = failure.reason.replace(&token.0, "<token>");
            Failure {
                reason: reason.chars().take(REASON_MAX).collect(),
                ..failure
            }
        })
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
        Failure {
            reason,
            code: None,
            retry_after: None,
        }
    }

    /// Success is `200` and `"ok": true`, nothing else.
    fn or_result(status: u16, body: &[u8]) -> Result<Value, Failure> {
        let Ok(mut answer) = serde_json::from_slice::<Value>(body) else {
            return Err(Failure::unknown(format!(
                "HTTP {status} with a body that is not JSON"
            )));
        };
        if status == 200 && answer["ok"] == true {
            return Ok(answer["result"].take());
        }
        let code = answer["error_code"].as_u64().unwrap_or(status.into());
        let description = answer["description"].as_str().unwrap_or("no description");
        let seconds = answer["parameters"]["retry_after"]
            .as_u64()
            .filter(|&seconds| code == 429 && seconds < 60);
        let retry_after = seconds.map(Duration::from_secs);
        Err(Failure {
            code: Some(code),
            retry_after,
            ..Failure::unknown(format!("{code} {description}"))
        })
    }
}

fn describe(error: &ureq::Error) -> String {
    use rustls::CertificateError::{Expired, ExpiredContext, NotValidYet, NotValidYetContext};
    let tls = match error {
        ureq::Error::Timeout(stage) => return format!("no answer in time ({stage})"),
        ureq::Error::Rustls(error) => Some(error),
        ureq::Error::Io(error) => error.get_ref().and_then(|inner| inner.downcast_ref()),
        _ => None,
    };
    let Some(rustls::Error::InvalidCertificate(reason)) = tls else {
        return error.to_string();
    };
    let outdated = matches!(
        reason,
        Expired | ExpiredContext { .. } | NotValidYet | NotValidYetContext { .. }
    );
    let hint = if outdated {
        " (is this machine's clock set?)"
    } else {
        ""
    };
    format!("the server's certificate is not trusted: {reason}{hint}")
}

/// Addresses of the host (the Bot API's or the proxy's, never both), for ureq asks for them on every call, also when a
/// connection is open. One look-up at a time: many would be as many threads, which nothing can end while DNS hangs.
#[derive(Clone, Debug, Default)]
struct Addresses(Arc<(Mutex<LookUp>, Condvar)>);

#[derive(Debug, Default)]
struct LookUp {
    running: bool,
    done: Option<Instant>,
    /// The last that were found: good enough until newer ones are.
    found: Vec<SocketAddr>,
}

impl Resolver for Addresses {
    fn resolve(
        &self,
        uri: &ureq::http::Uri,
        config: &ureq::config::Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let (shared, changed) = &*self.0;
        let mut look_up = lock(shared);
        if !look_up.running && look_up.done.is_none_or(|done| done.elapsed() >= REUSE) {
            let host = uri.scheme().zip(uri.authority());
            let host = host
                .and_then(|(scheme, authority)| DefaultResolver::host_and_port(scheme, authority));
            let (host, own) = (host.ok_or(ureq::Error::HostNotFound)?, self.clone());
            look_up.running = spawn("look-up", move || own.look_up(&host)).is_ok();
        }
        let wait = |look_up: &mut LookUp| look_up.running && look_up.found.is_empty();
        let (look_up, _) = changed
            .wait_timeout_while(look_up, *timeout.after, wait)
            .unwrap_or_else(PoisonError::into_inner);
        let mut wanted = self.empty();
        config
            .ip_family()
            .keep_wanted(look_up.found.iter().copied())
            .take(16)
            .for_each(|address| wanted.push(address));
        match (wanted.is_empty(), look_up.running) {
            (false, _) => Ok(wanted),
            (true, true) => Err(ureq::Error::Timeout(timeout.reason)),
            (true, false) => Err(ureq::Error::HostNotFound),
        }
    }
}

impl Addresses {
    fn look_up(&self, host: &str) {
        let found: Vec<SocketAddr> = host
            .to_socket_addrs()
            .map(Iterator::collect)
            .unwrap_or_default();
        let (shared, changed) = &*self.0;
        let mut look_up = lock(shared);
        look_up.running = false;
        if !found.is_empty() {
            (look_up.done, look_up.found) = (Some(Instant::now()), found);
        }
        changed.notify_all();
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// State: the change log, what each mote has acknowledged, Telegram's offset
// ---------------------------------------------------------------------------------------------------------------------

/// What a mote is told; `Display` is the token on the wire.
#[derive(Clone, Debug, PartialEq)]
enum Change {
    /// Minutes.
    Interval(u8),
    /// LED feedback, 0 or 1.
    Feedback(u8),
    /// Name and chat.
    User(String, i64),
    Removed(i64),
}

impl Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Change::Interval(minutes) => write!(f, "i{minutes}"),
            Change::Feedback(on) => write!(f, "f{on}"),
            Change::User(name, chat) => write!(f, "{name}:{chat}"),
            Change::Removed(chat) => write!(f, "r{chat}"),
        }
    }
}

impl Change {
    /// Back from the token.
    fn parse(token: &str) -> Option<Change> {
        if let Some((name, chat)) = token.split_once(':') {
            return (wire_name(name, &[]) == name)
                .then_some(Change::User(name.to_string(), chat.parse().ok()?));
        }
        let (kind, value) = token.split_at_checked(1)?;
        match kind {
            "i" => value
                .parse()
                .ok()
                .filter(|minutes| (1..=120).contains(minutes))
                .map(Change::Interval),
            "f" => value
                .parse()
                .ok()
                .filter(|on| *on <= 1)
                .map(Change::Feedback),
            "r" => value.parse().ok().map(Change::Removed),
            _ => None,
        }
    }

    /// A change replaces the one before of the same key.
    fn key(&self) -> (u8, i64) {
        match self {
            Change::Interval(_) => (0, 0),
            Change::Feedback(_) => (1, 0),
            Change::User(_, chat) | Change::Removed(chat) => (2, *chat),
        }
    }

    /// Whether the firmware can hold it.
    fn fits(&self) -> bool {
        let (kind, chat) = self.key();
        kind != 2 || fits_firmware(chat)
    }
}

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
    /// The latest change of each key with its number, in the order in which they happened.
    changes: Vec<(u64, Change)>,
    /// The change up to which a mote has acknowledged everything; the longest silent first.
    motes: Vec<(IpAddr, u64)>,
    /// Not saved: answers to people, until what they say is saved.
    answers: Vec<Answer>,
    /// Not saved: chat, wrong passwords in a row, and the time (Unix seconds) until which its `config` is ignored.
    suspects: Vec<(i64, u32, u64)>,
}

impl State {
    fn record(&mut self, change: Change) {
        self.sequence += 1;
        self.changes
            .retain(|(_, known)| known.key() != change.key());
        self.changes.push((self.sequence, change));
        if self.removals() > REMOVALS_MAX
            && let Some(oldest) = self
                .changes
                .iter()
                .position(|(_, change)| matches!(change, Change::Removed(_)))
        {
            self.changes.remove(oldest);
        }
    }

    fn users(&self) -> impl Iterator<Item = (i64, &str)> {
        self.changes.iter().filter_map(|(_, change)| match change {
            Change::User(name, chat) => Some((*chat, name.as_str())),
            _ => None,
        })
    }

    fn removals(&self) -> usize {
        self.changes
            .iter()
            .filter(|(_, change)| matches!(change, Change::Removed(_)))
            .count()
    }

    fn is_removed(&self, chat: &Value) -> bool {
        self.changes
            .iter()
            .any(|(_, change)| matches!(change, Change::Removed(id) if chat == id))
    }

    /// What is said to a user who is new, or who cannot be one.
    fn register(&mut self, chat: i64, name: &str) -> Option<String> {
        let known = self.users().any(|(id, _)| id == chat);
        if !known && self.users().count() >= USERS_MAX {
            return Some(format!(
                "The list is full: {USERS_MAX} people are registered already."
            ));
        }
        let taken: Vec<&str> = self
            .users()
            .filter(|(id, _)| *id != chat)
            .map(|(_, name)| name)
            .collect();
        let name = wire_name(name, &taken);
        if self.users().all(|user| user != (chat, &name)) {
            info!(
                "{name} ({chat}) is {}",
                if known { "the new name" } else { "registered" }
            );
            self.record(Change::User(name, chat));
        }
        (!known).then(|| format!("You are registered.\n{HELP}"))
    }

    /// Whoever asks is told again (`again`), even if it was removed before. Returns the user for the log.
    fn remove(&mut self, chat: i64, again: bool) -> String {
        let name = self
            .users()
            .find(|(id, _)| *id == chat)
            .map(|(_, name)| format!("{name} ({chat})"));
        if again || !self.is_removed(&chat.into()) {
            self.record(Change::Removed(chat));
        }
        name.unwrap_or(chat.to_string())
    }

    /// The changes that a mote has not acknowledged, oldest first, as far as they fit into `limit` bytes; the number of
    /// the last of them; how many are left.
    fn tokens_for(&mut self, mote: IpAddr, limit: usize) -> (String, Option<u64>, usize) {
        let heard = self.acknowledged(mote);
        let (mut reply, mut last, mut left) = (String::new(), None, 0);
        for (sequence, change) in self
            .changes
            .iter()
            .filter(|(sequence, change)| *sequence > heard && change.fits())
        {
            let separator = if reply.is_empty() { "" } else { ";" };
            let token = format!("{separator}{change}");
            if left > 0 || reply.len() + token.len() > limit {
                left += 1;
            } else {
                reply.push_str(&token);
                last = Some(*sequence);
            }
        }
        (reply, last, left)
    }

    /// Moves the mote to the end of the list: it is not silent.
    fn acknowledged(&mut self, mote: IpAddr) -> u64 {
        let Some(at) = self.motes.iter().position(|(address, _)| *address == mote) else {
            return 0;
        };
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
    fn notice_restart(&mut self, mote: IpAddr, listed: &[Value]) -> bool {
        let heard = self.acknowledged(mote);
        let mut told = self
            .changes
            .iter()
            .filter(|(sequence, change)| *sequence <= heard && change.fits());
        let lost = told.any(|(_, change)| match change {
            Change::User(_, chat) => !listed.contains(&json!(chat)),
            Change::Removed(chat) => listed.contains(&json!(chat)),
            _ => false,
        });
        if lost {
            self.motes.retain(|(address, _)| *address != mote);
        }
        lost
    }

    fn to_json(&self) -> String {
        let changes: Vec<_> = self
            .changes
            .iter()
            .map(|(sequence, change)| (sequence, change.to_string()))
            .collect();
        json!({
            "started": self.started,
            "bot": self.bot,
            "offset": self.offset,
            "sequence": self.sequence,
            "changes": changes,
            "motes": self.motes,
        })
        .to_string()
    }

    /// `None` if it is not what `to_json` writes.
    fn from_json(text: &str) -> Option<State> {
        let json: Value = serde_json::from_str(text).ok()?;
        let tokens: Vec<(u64, String)> = serde_json::from_value(json["changes"].clone()).ok()?;
        let change = |(sequence, token): &(u64, String)| Some((*sequence, Change::parse(token)?));
        let state = State {
            started: json["started"].as_u64()?,
            bot: serde_json::from_value(json["bot"].clone()).ok()?,
            offset: json["offset"].as_i64()?,
            sequence: json["sequence"]
                .as_u64()
                .filter(|sequence| *sequence < u64::MAX / 2)?,
            changes: tokens.iter().map(change).collect::<Option<_>>()?,
            motes: serde_json::from_value(json["motes"].clone()).ok()?,
            ..State::default()
        };
        let numbers = iter::once(0)
            .chain(state.changes.iter().map(|change| change.0))
            .chain([state.sequence + 1]);
        let heard = state
            .motes
            .iter()
            .all(|(_, heard)| *heard <= state.sequence);
        let (users, removals, motes) = (state.users().count(), state.removals(), state.motes.len());
        let bounded = users <= USERS_MAX && removals <= REMOVALS_MAX && motes <= MOTES_MAX;
        // Two changes of the same key or name: one of them would never reach the mote.
        let distinct = all_distinct(state.changes.iter().map(|(_, change)| change.key()))
            && all_distinct(state.users().map(|(_, name)| name));
        (numbers.is_sorted_by(|a, b| a < b) && heard && bounded && distinct).then_some(state)
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
    let clean: String = name
        .chars()
        .filter(|&c| !c.is_control() && !";:,&=".contains(c))
        .collect();
    let base = match clean.trim() {
        "" => "user",
        name => name,
    };
    // Judged as it will be: what is cut off does not help. A suffix makes no name that is misread.
    let misread = match cut(base, NAME_MAX).as_bytes() {
        [b'f', b'0' | b'1', ..] | [b'i' | b'r', b'0'..=b'9', ..] => true,
        name => name == b"all",
    };
    let base = if misread {
        format!("_{base}")
    } else {
        base.to_string()
    };
    let numbered = |number: usize| {
        let suffix = if number == 1 {
            String::new()
        } else {
            format!("_{number}")
        };
        format!("{}{suffix}", cut(&base, NAME_MAX - suffix.len()))
    };
    let name = (1..)
        .map(numbered)
        .find(|name| !taken.contains(&name.as_str()));
    name.unwrap_or_default() // there are more numbers than users
}

/// At most `end` bytes, whole characters, no white space behind.
fn cut(text: &str, end: usize) -> &str {
    let end = (0..=text.len().min(end))
        .rev()
        .find(|end| text.is_char_boundary(*end));
    text[..end.unwrap_or(0)].trim_end()
}

/// Reads `state.json`. A damaged one is set aside: its content may be worth a look, and the gateway must start.
fn open_state(config: &Config) -> Result<State, String> {
    let path = &config.state_path;
    let mut state = State {
        started: unix_now(),
        ..State::default()
    };
    match fs::read(path) {
        Ok(bytes) => match str::from_utf8(&bytes).ok().and_then(State::from_json) {
            Some(known) => state = known,
            None => {
                let aside = beside(path, ".damaged");
                fs::rename(path, &aside)
                    .map_err(|error| format!("cannot set {} aside: {error}", path.display()))?;
                error!(
                    "{} is damaged: starting anew, it is kept as {}",
                    path.display(),
                    aside.display()
                );
            }
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(format!("cannot read {}: {error}", path.display())),
    }
    // Update ids are counted for each bot.
    let bot = config
        .token
        .as_ref()
        .map(|token| token.bot_id().to_string());
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
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
}

/// The messages that were begun lately, in a ring of lines beside `state.json`: a mote that repeats its request to a
/// restarted gateway must not have it sent twice. Not synchronised to the disk, for no exchange outlives a reboot.
struct Journal {
    file: File,
    /// What the processes before began: digest of the request, Unix seconds until which it counts, 1 if it was sent.
    before: Vec<[u64; 3]>,
    next: AtomicU64,
}

/// Its line, digest and end of life.
#[derive(Clone, Copy)]
struct Entry(u64, u64, u64);

impl Journal {
    fn open(path: &Path) -> Result<Journal, String> {
        let fault = |error| format!("cannot open {}: {error}", path.display());
        let mut options = OpenOptions::new();
        let mut file = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(fault)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(fault)?;
        let numbers = |line: &str| {
            line.split(' ')
                .map_while(|number| number.parse().ok())
                .collect::<Vec<u64>>()
        };
        let text = String::from_utf8_lossy(&bytes);
        let before: Vec<[u64; 3]> = text
            .lines()
            .filter_map(|line| numbers(line).try_into().ok())
            .collect();
        let oldest = (0..before.len()).min_by_key(|at| before[*at][1]);
        let next = oldest
            .filter(|_| before.len() >= coap::SEEN_MAX)
            .unwrap_or(before.len());
        Ok(Journal {
            file,
            before,
            next: AtomicU64::new(next as u64),
        })
    }

    /// Whether a request that counts at this time, in Unix seconds, was sent; `None`: there was no such request.
    fn find(&self, digest: u64, now: u64) -> Option<bool> {
        self.before
            .iter()
            .find(|entry| entry[0] == digest && entry[1] >= now)
            .map(|entry| entry[2] == 1)
    }

    fn begin(&self, request: &Request) -> Entry {
        let line = self.next.fetch_add(1, Relaxed) % coap::SEEN_MAX as u64;
        let entry = Entry(
            line,
            request.digest,
            unix_now() + request.lifetime().as_secs(),
        );
        self.end(entry, false);
        entry
    }

    fn end(&self, Entry(line, digest, until): Entry, sent: bool) {
        let text = format!("{digest:020} {until:020} {}\n", u8::from(sent));
        if let Err(error) = self
            .file
            .write_all_at(text.as_bytes(), line * text.len() as u64)
        {
            warn!("cannot write the journal, so a restart may send twice: {error}");
        }
    }
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

/// Progress before judgement: an update that cannot be understood must not come back.
fn handle_update(state: &mut State, update: &Value, config: &Config, now: u64) {
    let Some(id) = update["update_id"].as_i64() else {
        return;
    };
    state.offset = id.saturating_add(1);
    match judge(state, &update["message"], config.password.as_ref(), now) {
        Some(answer) => state.answers.push(answer),
        None => debug!("update {id} is no message in a private chat that the mote can hold"),
    }
}

/// Carries out a Bot API `Message`. `None`: it is not from a private chat with an id that the firmware can hold.
fn judge(
    state: &mut State,
    message: &Value,
    password: Option<&Secret>,
    now: u64,
) -> Option<Answer> {
    let chat = message["chat"]["id"]
        .as_i64()
        .filter(|id| fits_firmware(*id) && message["chat"]["type"] == "private")?;
    let names = [
        &message["chat"]["first_name"],
        &message["from"]["first_name"],
        &message["chat"]["username"],
    ];
    let name = names
        .into_iter()
        .find_map(Value::as_str)
        .unwrap_or_default();
    let text = message["text"].as_str().unwrap_or_default();
    let lower = text.to_ascii_lowercase();
    let words: Vec<&str> = lower.split_whitespace().collect();
    // Written before the gateway was there: the sender could not know what it does.
    let old = message["date"].as_u64().unwrap_or_default() < state.started;
    let is_config = matches!(words[..], ["config" | "/config", ..]);
    if words == ["remove", "me"] && !old {
        let user = state.remove(chat, true); // not as an argument of info!, which may be off
        info!("{user} is removed, as asked");
        let text = "You are removed and get no more messages. Write anything to register again.";
        return Some(Answer {
            chat,
            text: Some(text.to_string()),
            delete: None,
        });
    }
    let welcome = state.register(chat, name);
    let has_help = welcome.as_ref().is_some_and(|text| text.ends_with(HELP));
    let done = match words[..] {
        _ if is_config && old => None,
        _ if is_config => configure(state, chat, text, password, now),
        ["help"] | ["/help" | "/start", ..] if !has_help => Some(HELP.to_string()),
        _ if welcome.is_some() => None,
        _ => Some(format!("I do not understand that.\n{HELP}")),
    };
    let text: Vec<String> = welcome.into_iter().chain(done).collect();
    Some(Answer {
        chat,
        text: (!text.is_empty()).then(|| text.join("\n\n")),
        // Whether right or wrong: a wrong password may be nearly right.
        delete: message["message_id"]
            .as_i64()
            .filter(|_| is_config && words.len() > 1),
    })
}

/// Carries out `config …`. `None`: ignored. Only a complete command is a guess at the password, and nothing is said
/// about the rest of it unless the password is right.
fn configure(
    state: &mut State,
    chat: i64,
    text: &str,
    password: Option<&Secret>,
    now: u64,
) -> Option<String> {
    let Some(password) = password else {
        return Some("No password is set on the gateway, so nothing can be changed.".to_string());
    };
    let known = state.suspects.iter().find(|suspect| suspect.0 == chat);
    let (_, wrong, until) = known.copied().unwrap_or_default();
    if (now + 1..=now + LOCK_SECONDS).contains(&until) {
        return None; // and a clock that was set back locks nobody out
    }
    let words: Vec<&str> = text.split_whitespace().collect();
    let [_, guess, key, value] = words[..] else {
        return Some(CONFIG_FORM.to_string());
    };
    state.suspects.retain(|suspect| suspect.0 != chat);
    if !password.is(guess) {
        return Some(suspect(state, chat, wrong + 1, now));
    }
    let number = value.parse::<u8>().ok().filter(|_| !value.starts_with('+'));
    match (key.to_ascii_lowercase().as_str(), number) {
        ("interval", Some(minutes @ 1..=120)) => {
            state.record(Change::Interval(minutes));
            info!("interval is set to {minutes} minutes by chat {chat}");
            Some(format!("The interval is set to {minutes} minutes."))
        }
        ("feedback", Some(on @ 0..=1)) => {
            state.record(Change::Feedback(on));
            info!("LED feedback is set to {on} by chat {chat}");
            Some(format!(
                "The LED feedback is set to {on} ({}).",
                if on == 1 { "on" } else { "off" }
            ))
        }
        _ => Some(CONFIG_FORM.to_string()),
    }
}

/// Counts a wrong password.
fn suspect(state: &mut State, chat: i64, wrong: u32, now: u64) -> String {
    let locked = wrong >= WRONG_PASSWORDS_MAX;
    if state.suspects.len() >= SUSPECTS_MAX {
        // Those that are not locked out go first.
        let weight = |at: &usize| (state.suspects[*at].2 > now, state.suspects[*at].1);
        let least = (0..SUSPECTS_MAX).min_by_key(weight).unwrap_or_default();
        state.suspects.remove(least);
    }
    state.suspects.push(if locked {
        (chat, 0, now + LOCK_SECONDS)
    } else {
        (chat, wrong, 0)
    });
    warn!(
        "wrong password from chat {chat}{}",
        if locked {
            ": its config is ignored for an hour"
        } else {
            ""
        }
    );
    let hour = if locked {
        " Your config messages are ignored for an hour."
    } else {
        ""
    };
    format!("Wrong password. Nothing was changed.{hour}")
}

/// One at a time and in order; best effort, for the mote has its answer already.
fn write_to_people(gateway: &Gateway, queue: &Receiver<(Secret, Answer)>) {
    for (token, Answer { chat, text, delete }) in queue {
        let text = text.map(|text| ("sendMessage", json!({"chat_id": chat, "text": text})));
        let delete = delete.map(|message| {
            (
                "deleteMessage",
                json!({"chat_id": chat, "message_id": message}),
            )
        });
        for (method, parameters) in text.into_iter().chain(delete) {
            if let Err(failure) = gateway.telegram.call(
                &token,
                method,
                &parameters,
                Instant::now() + TELEGRAM_BUDGET,
            ) {
                warn!("{method} to {chat} failed: {}", failure.reason);
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Log, heartbeat, systemd
// ---------------------------------------------------------------------------------------------------------------------

/// simple_logger decides what is logged; it has neither this line format nor a file, and panics when its pipe is gone.
struct Log {
    filter: simple_logger::SimpleLogger,
    path: PathBuf,
    /// `None`: it cannot be opened; the console has the lines all the same.
    file: Mutex<Option<File>>,
}

fn start_log(config: &Config) -> Result<(), String> {
    // Off for the libraries, whatever RUST_LOG says: their records hold URLs, and so the token.
    let filter = simple_logger::SimpleLogger::new().with_level(LevelFilter::Off);
    let filter = filter.with_module_level("coap_websocket", config.level);
    log::set_max_level(filter.max_level());
    let (path, file) = (config.log_path.clone(), open_log(&config.log_path));
    let fault = file
        .as_ref()
        .err()
        .map(|error| format!("cannot open {}: {error}", path.display()));
    let log = Log {
        filter,
        path,
        file: Mutex::new(file.ok()),
    };
    log::set_boxed_logger(Box::new(log)).map_err(|error| error.to_string())?;
    fault
        .iter()
        .for_each(|fault| warn!("{fault}; the log goes to the console alone"));
    Ok(())
}

fn open_log(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).open(path)
}

impl log::Log for Log {
    fn enabled(&self, metadata: &log::Metadata) -> bool {
        self.filter.enabled(metadata)
    }

    fn log(&self, record: &log::Record) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let line = format!(
            "{} [{}] {}\n",
            utc(unix_now()),
            record.level(),
            escape(&record.args().to_string())
        );
        let _ = io::stdout().write_all(line.as_bytes());
        let mut open = lock(&self.file);
        let Some(file) = open.as_mut() else { return };
        if file
            .metadata()
            .is_ok_and(|file| file.len() + line.len() as u64 > LOG_MAX)
        {
            let _ = fs::rename(&self.path, beside(&self.path, ".1")).or_else(|_| file.set_len(0));
            if let Ok(new) = open_log(&self.path) {
                *file = new;
            }
        }
        let _ = file.write_all(line.as_bytes());
    }

    fn flush(&self) {}
}

/// So that what comes from outside cannot forge a line.
fn escape(text: &str) -> String {
    let forges = |c: char| c.is_control() || matches!(c, '\u{2028}' | '\u{2029}');
    text.chars()
        .map(|c| {
            if forges(c) {
                c.escape_default().to_string()
            } else {
                c.into()
            }
        })
        .collect()
}

/// `2026-01-31 12:00:00` of Unix seconds. Days to a date: H. Hinnant, "chrono-Compatible Low-Level Date Algorithms".
fn utc(seconds: u64) -> String {
    let (days, time) = (seconds / 86400 + 719_468, seconds % 86400);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_based = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_based + 2) / 5 + 1;
    let month = if march_based < 10 {
        march_based + 3
    } else {
        march_based - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}",
        time / 3600,
        time / 60 % 60,
        time % 60
    )
}

fn log_outcome(request: &Request, response: &Response, detail: &str) {
    let level = if response.code().starts_with('5') {
        log::Level::Warn
    } else {
        log::Level::Info
    };
    let (code, duration) = (response.code(), request.at.elapsed().as_millis());
    let separator = if detail.is_empty() { "" } else { ": " };
    log::log!(
        level,
        "{} {request} -> {code} in {duration} ms{separator}{detail}",
        request.peer
    );
}

fn heartbeat(gateway: &Gateway) {
    let start = Instant::now();
    loop {
        thread::sleep(HEARTBEAT);
        let minutes = start.elapsed().as_secs() / 60;
        let (hours, minutes) = (minutes / 60, minutes % 60);
        let (forwarded, failures) = (
            gateway.forwarded.load(Relaxed),
            gateway.failures.load(Relaxed),
        );
        let users = lock(&gateway.state).users().count();
        info!(
            "Server is still running: up {hours} h {minutes} min, {forwarded} messages forwarded, \
            {failures} failures, {users} registered users"
        );
    }
}

/// sd_notify(3). Without systemd, nothing.
fn notify(message: &str) {
    let Some(path) = env::var("NOTIFY_SOCKET")
        .ok()
        .filter(|path| !path.is_empty())
    else {
        return;
    };
    let address = match path.strip_prefix('@') {
        Some(name) => UnixAddr::from_abstract_name(name),
        None => UnixAddr::from_pathname(&path),
    };
    let _ = address
        .and_then(|address| UnixDatagram::unbound()?.send_to_addr(message.as_bytes(), &address));
}

// ---------------------------------------------------------------------------------------------------------------------
// `check` and `send`
// ---------------------------------------------------------------------------------------------------------------------

/// Changes nothing: what people wrote is shown, not confirmed.
fn check(config: &Config) -> Result<(), String> {
    config
        .warnings
        .iter()
        .try_for_each(|warning| say(&format!("warning: {warning}")))?;
    let token = config
        .token
        .as_ref()
        .ok_or("config.ini: no bot_token is set, so Telegram cannot be asked")?;
    let telegram = Telegram::new(config);
    let ask = |method, parameters| {
        let result = telegram.call(token, method, &parameters, Instant::now() + TELEGRAM_BUDGET);
        result.map_err(|failure| format!("{method}: {}", escape(&failure.reason)))
    };
    let me = ask("getMe", json!({}))?;
    let (name, username) = (
        me["first_name"].as_str().unwrap_or("?"),
        me["username"].as_str().unwrap_or("?"),
    );
    say(&escape(&format!("bot: {name} (@{username})")))?;
    say(&format!(
        "password for config: {}",
        if config.password.is_some() {
            "set"
        } else {
            "not set"
        }
    ))?;

    let path = &config.state_path;
    let users = match fs::read_to_string(path).map(|text| State::from_json(&text)) {
        Ok(Some(state)) => state
            .users()
            .map(|(id, name)| format!("{name} ({id})"))
            .collect::<Vec<_>>()
            .join(", "),
        Ok(None) => format!("unknown, {} is damaged", path.display()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => format!("unknown, cannot read {}: {error}", path.display()),
    };
    say(&format!(
        "registered users: {}",
        if users.is_empty() { "none" } else { &users }
    ))?;
    let waiting = ask(
        "getUpdates",
        json!({"limit": PAGE, "timeout": 0, "allowed_updates": ["message"]}),
    )?;
    let mut chats: Vec<String> = Vec::new();
    for chat in waiting
        .as_array()
        .into_iter()
        .flatten()
        .map(|update| &update["message"]["chat"])
    {
        let name = chat["first_name"]
            .as_str()
            .or(chat["title"].as_str())
            .unwrap_or("?");
        let line = format!("  {} {}", chat["id"], escape(name));
        if chat["id"].is_i64() && !chats.contains(&line) {
            chats.push(line);
        }
    }
    say(if chats.is_empty() {
        "no chat has a message waiting"
    } else {
        "chats with a message waiting:"
    })?;
    chats.iter().try_for_each(|line| say(line))
}

/// One `POST /message` as a mote would send it; to the gateway of this configuration if no `uri` is given.
fn send(config: &Config, chat: &str, text: &str, uri: &str) -> Result<(), String> {
    let token = config
        .token
        .as_ref()
        .ok_or("config.ini: no bot_token is set")?;
    let own = format!("coap://{}", config.name());
    let to = if uri.is_empty() { &own } else { uri };
    let peer = address_of(to).ok_or(format!(
        "cannot resolve `{}`, which is to be coap://host:port",
        to.escape_debug()
    ))?;
    let payload = format!(
        "url={}&token={}&chat_ids={chat}&text={text}",
        config.url, token.0
    );
    let (code, payload) =
        exchange(peer, payload.as_bytes()).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => format!("no answer from {peer}"),
            _ => format!("cannot reach a gateway at {peer}: {error}"),
        })?;
    let line = format!("{code} {}", escape(&String::from_utf8_lossy(&payload)));
    match code.starts_with('2') {
        true => say(&line),
        false => Err(format!("{} (the gateway's log tells why)", line.trim_end())),
    }
}

/// Of a URI `coap://host[:port]`. RFC 6874: a zone's `%` may be written `%25`; std wants a zone without brackets.
fn address_of(uri: &str) -> Option<SocketAddr> {
    let host = uri.strip_prefix("coap://")?.trim_end_matches('/');
    let has_port = host.contains(':') && !host.ends_with(']');
    let (name, port) = if has_port {
        host.rsplit_once(':')?
    } else {
        (host, "")
    };
    let port = if has_port {
        port.parse().ok()?
    } else {
        coap::PORT
    };
    let name = name.trim_matches(['[', ']']).replace("%25", "%");
    (name.as_str(), port).to_socket_addrs().ok()?.next()
}

/// A client's side of one exchange, RFC 7252 §4.2: code and payload of the response.
fn exchange(peer: SocketAddr, payload: &[u8]) -> io::Result<(String, Vec<u8>)> {
    let socket = UdpSocket::bind(if peer.is_ipv4() {
        "0.0.0.0:0"
    } else {
        "[::]:0"
    })?;
    socket.connect(peer)?;
    let request = coap::encode_request("message", payload, coap::random());
    let mut buffer = [0; coap::DATAGRAM_MAX];
    let (mut timeout, mut left) = (coap::ACK_TIMEOUT, coap::MAX_RETRANSMIT + 1);
    while left > 0 {
        left -= 1;
        socket.send(&request)?;
        let mut due = Instant::now() + timeout;
        timeout *= 2;
        while let Some(wait) = due
            .checked_duration_since(Instant::now())
            .filter(|wait| !wait.is_zero())
        {
            socket.set_read_timeout(Some(wait))?;
            let length = match socket.recv(&mut buffer) {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            };
            match coap::decode_response(&buffer[..length], &request) {
                // The gateway answers within 9 s; from here on, waiting is all there is to do.
                Some((code, ..)) if code == "0.00" => {
                    (left, due) = (0, Instant::now() + Duration::from_secs(15));
                }
                Some((code, payload, acknowledgement)) => {
                    if !acknowledgement.is_empty() {
                        socket.send(&acknowledgement)?;
                    }
                    return Ok((code, payload));
                }
                None => {}
            }
        }
    }
    Err(io::ErrorKind::WouldBlock.into())
}

// ---------------------------------------------------------------------------------------------------------------------
// The CoAP message layer
// ---------------------------------------------------------------------------------------------------------------------

/// RFC 7252 and Block1 of RFC 7959: bytes and a time in, bytes out. It sees neither a socket nor a clock.
mod coap {
    use std::collections::VecDeque;
    use std::fmt;
    use std::hash::{BuildHasher as _, DefaultHasher, Hash as _, Hasher as _, RandomState};
    use std::net::SocketAddr;
    use std::time::{Duration, Instant};

    use coap_lite::{MessageClass, MessageType, Packet, ResponseType};

    /// RFC 7252 §6.1.
    pub const PORT: u16 = 5683;
    /// RFC 7252 §4.8, transmission parameters, and §4.8.2, what follows from them.
    pub const ACK_TIMEOUT: Duration = Duration::from_secs(2);
    pub const MAX_RETRANSMIT: u32 = 4;
    const ACK_RANDOM_PERCENT: u64 = 50;
    const MAX_LATENCY: Duration = Duration::from_secs(100);
    const MAX_TRANSMIT_SPAN: Duration = Duration::from_millis(
        ACK_TIMEOUT.as_millis() as u64 * ((1 << MAX_RETRANSMIT) - 1) * (100 + ACK_RANDOM_PERCENT)
            / 100,
    );
    pub const NON_LIFETIME: Duration = MAX_TRANSMIT_SPAN.saturating_add(MAX_LATENCY);
    pub const EXCHANGE_LIFETIME: Duration = NON_LIFETIME
        .saturating_add(MAX_LATENCY)
        .saturating_add(ACK_TIMEOUT);

    /// Of an assembled request's payload, bytes: a text of 4,096 characters that are not all outside of Latin script.
    pub const BODY_MAX: usize = 8 << 10;
    /// One datagram with such a payload and 1 KiB of options; a longer one arrives cut and is refused for its payload.
    pub const DATAGRAM_MAX: usize = BODY_MAX + (1 << 10);
    /// Requests that wait for Telegram: bounds threads and memory.
    pub const IN_PROGRESS_MAX: usize = 32;
    /// Remembered messages, also in the journal. A mesh of 1,000 motes that all send four messages in `EXCHANGE_LIFETIME` fits.
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
    pub const URI_QUERY: u16 = 15;
    pub const ACCEPT: u16 = 17;
    pub const BLOCK2: u16 = 23;
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
        value
            .to_be_bytes()
            .into_iter()
            .skip_while(|byte| *byte == 0)
            .collect()
    }

    /// A request that nobody has acted on.
    pub struct Request {
        pub peer: SocketAddr,
        pub at: Instant,
        pub code: u8,
        pub payload: Vec<u8>,
        /// Of the peer and the whole datagram: a restarted mote uses message IDs again, for other requests. The same
        /// after a restart of this program.
        pub digest: u64,
        packet: Packet,
    }

    /// For the log: method and path. Only the start of a path, up to a colon: somebody may have put the token there.
    impl fmt::Display for Request {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            let path: String = self
                .path()
                .chars()
                .take(24)
                .take_while(|c| *c != ':')
                .collect();
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

        /// How long a duplicate of it may come.
        pub fn lifetime(&self) -> Duration {
            if self.is_confirmable() {
                EXCHANGE_LIFETIME
            } else {
                NON_LIFETIME
            }
        }

        pub fn strings(&self, option: u16) -> Vec<String> {
            let values = self.packet.get_option(option.into()).into_iter().flatten();
            values
                .map(|value| String::from_utf8_lossy(value).into_owned())
                .collect()
        }

        /// As in a URI: segments joined with `/`, one inside a segment encoded. RFC 7252 §6.5.
        pub fn path(&self) -> String {
            self.strings(URI_PATH)
                .iter()
                .map(|segment| segment.replace('/', "%2F"))
                .collect::<Vec<_>>()
                .join("/")
        }

        /// The first value; one that is too long for its option is ignored as RFC 7252 §5.4.3 asks of elective ones.
        pub fn uint(&self, option: u16) -> Option<u32> {
            let value = self.packet.get_first_option(option.into())?;
            let limit = if [BLOCK1, BLOCK2].contains(&option) {
                3
            } else {
                2
            };
            (value.len() <= limit).then(|| {
                value
                    .iter()
                    .fold(0, |all, byte| all << 8 | u32::from(*byte))
            })
        }

        pub fn block(&self, option: u16) -> Result<Option<Block>, Response> {
            let Some(value) = self.uint(option) else {
                return Ok(None);
            };
            match (value & 7) as u8 {
                7 => Err(Response::error(
                    ResponseType::BadRequest,
                    "Reserved block size",
                )),
                exponent => Ok(Some(Block {
                    number: (value >> 4) as usize,
                    more: value & 8 != 0,
                    exponent,
                })),
            }
        }

        /// RFC 7252 §5.4: critical options must be known, of a valid length, and not repeated where they may not be.
        pub fn check_options(&self) -> Result<(), Response> {
            let bad_option = |number, fault| {
                Response::error(
                    ResponseType::BadOption,
                    &format!("Option {number} is {fault}"),
                )
            };
            for (&number, values) in self.packet.options().filter(|(number, _)| *number % 2 == 1) {
                let (shortest, longest, repeatable) = match number {
                    3 | PROXY_SCHEME => (1, 255, false), // 3: Uri-Host
                    7 | ACCEPT => (0, 2, false),         // 7: Uri-Port
                    URI_PATH | URI_QUERY => (0, 255, true),
                    BLOCK1 | BLOCK2 => (0, 3, false),
                    PROXY_URI => (1, 1034, false),
                    _ => return Err(bad_option(number, "not supported")),
                };
                let valid = values
                    .iter()
                    .all(|value| (shortest..=longest).contains(&value.len()));
                if !valid || (values.len() > 1 && !repeatable) {
                    return Err(bad_option(number, "malformed"));
                }
            }
            if [PROXY_URI, PROXY_SCHEME]
                .iter()
                .any(|number| self.packet.get_option((*number).into()).is_some())
            {
                return Err(Response::error(
                    ResponseType::ProxyingNotSupported,
                    "This is no proxy",
                ));
            }
            Ok(())
        }
    }

    /// Numbers and values.
    type Options = Vec<(u16, Vec<u8>)>;

    /// A response; message ID, type and token come from the exchange.
    #[derive(Debug)]
    pub struct Response {
        pub code: ResponseType,
        pub payload: Vec<u8>,
        pub options: Options,
        /// Comes back with the response's ACK.
        pub delivers: Option<u64>,
    }

    impl Response {
        pub fn content(code: ResponseType, payload: &str, format: u32) -> Response {
            let options = vec![(CONTENT_FORMAT, uint(format))];
            Response {
                code,
                payload: payload.as_bytes().to_vec(),
                options,
                delivers: None,
            }
        }

        pub fn text(code: ResponseType, payload: &str) -> Response {
            Response::content(code, payload, TEXT_PLAIN)
        }

        /// A diagnostic payload, RFC 7252 §5.5.2. It leaves only inside an ACK, see `encode`.
        pub fn error(code: ResponseType, reason: &str) -> Response {
            Response {
                options: Vec::new(),
                ..Response::text(code, reason)
            }
        }

        pub fn failed() -> Response {
            Response::error(ResponseType::InternalServerError, "")
        }

        /// As in `2.05`.
        pub fn code(&self) -> String {
            MessageClass::Response(self.code).to_string()
        }

        /// Cuts the payload to the block that the request asks for. RFC 7959 §2.4.
        pub fn in_block2(mut self, request: &Request) -> Response {
            let block = match request.block(BLOCK2) {
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
            self.options.push((
                BLOCK2,
                Block {
                    more: end < self.payload.len(),
                    ..block
                }
                .value(),
            ));
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
        /// The response that `respond` made has arrived, with what it delivers.
        Acknowledged(Option<u64>),
        /// The response was answered with RST.
        Refused,
    }

    /// A message that was acted on. RFC 7252 §4.5.
    struct Seen {
        digest: u64,
        expires: Instant,
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
    #[derive(Default)]
    pub struct Exchanges {
        last_message_id: u16,
        /// In the order in which they came.
        seen: VecDeque<Seen>,
        open: VecDeque<Open>,
        assemblies: VecDeque<Assembly>,
        in_progress: usize,
    }

    impl Exchanges {
        pub fn new(seed: u64) -> Exchanges {
            Exchanges {
                last_message_id: seed as u16,
                ..Exchanges::default()
            }
        }

        /// Judges a datagram, but remembers nothing: `reply` or `accept` does, when it is acted on.
        pub fn receive(&mut self, now: Instant, peer: SocketAddr, datagram: &[u8]) -> Event {
            let mut packet = match parse(datagram) {
                Ok(packet) => packet,
                Err(reset) => return reset.map_or(Event::Nothing, Event::Send),
            };
            let (kind, message_id) = (packet.header.get_type(), packet.header.message_id);
            if matches!(kind, MessageType::Acknowledgement | MessageType::Reset) {
                let open = self
                    .open
                    .iter()
                    .position(|open| open.peer == peer && open.message_id == message_id);
                return match open.and_then(|at| self.open.remove(at)) {
                    None => Event::Nothing,
                    Some(_) if kind == MessageType::Reset => Event::Refused,
                    Some(open) => Event::Acknowledged(open.delivers),
                };
            }
            let mut hasher = DefaultHasher::new();
            (peer, datagram).hash(&mut hasher);
            let digest = hasher.finish();
            let twin = self
                .seen
                .iter()
                .find(|seen| seen.digest == digest && (seen.in_progress || now < seen.expires));
            if let Some(twin) = twin {
                return Event::Send(twin.reply.clone());
            }
            let (code, payload) = (datagram[1], std::mem::take(&mut packet.payload));
            let request = Request {
                peer,
                at: now,
                code,
                payload,
                digest,
                packet,
            };
            // RFC 7252 §5.4.1: a NON with an unrecognised critical option is rejected, and RST is optional.
            let bad_option = |fault: Response| fault.code == ResponseType::BadOption;
            if !request.is_confirmable() && request.check_options().is_err_and(bad_option) {
                return Event::Nothing;
            }
            Event::Request(request)
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
            encode(
                MessageType::NonConfirmable,
                self.message_id(),
                request,
                response,
            )
        }

        /// The empty ACK (for NON, nothing), and the promise of `respond`.
        pub fn accept(&mut self, request: &Request) -> Vec<u8> {
            let ack = match request.is_confirmable() {
                true => empty(
                    MessageType::Acknowledgement,
                    request.packet.header.message_id,
                ),
                false => Vec::new(),
            };
            self.in_progress += 1;
            self.remember(request, ack.clone(), true);
            ack
        }

        /// The separate response to an accepted request. RFC 7252 §5.2.2. `random` spreads the retransmissions.
        pub fn respond(
            &mut self,
            now: Instant,
            request: &Request,
            response: Response,
            random: u64,
        ) -> Vec<u8> {
            self.in_progress -= 1;
            if let Some(seen) = self
                .seen
                .iter_mut()
                .rev()
                .find(|seen| seen.digest == request.digest)
            {
                seen.in_progress = false;
            }
            let (message_id, delivers) = (self.message_id(), response.delivers);
            if !request.is_confirmable() {
                return encode(MessageType::NonConfirmable, message_id, request, response);
            }
            let bytes = encode(MessageType::Confirmable, message_id, request, response);
            if self.open.len() >= OPEN_MAX {
                self.open.pop_front();
            }
            let spread = ACK_TIMEOUT.as_millis() as u64 * ACK_RANDOM_PERCENT / 100;
            let timeout = ACK_TIMEOUT + Duration::from_millis(random % (spread + 1));
            let (peer, due) = (request.peer, now + timeout);
            let open = Open {
                peer,
                message_id,
                bytes: bytes.clone(),
                retransmitted: 0,
                timeout,
                due,
                delivers,
            };
            self.open.push_back(open);
            bytes
        }

        /// What is to be sent again now, and when the next is due.
        pub fn due(&mut self, now: Instant) -> (Vec<(SocketAddr, Vec<u8>)>, Option<Instant>) {
            let mut resend = Vec::new();
            self.open
                .retain(|open| open.due > now || open.retransmitted < MAX_RETRANSMIT);
            for open in self.open.iter_mut().filter(|open| open.due <= now) {
                resend.push((open.peer, open.bytes.clone()));
                open.retransmitted += 1;
                open.timeout *= 2;
                open.due = now + open.timeout;
            }
            (resend, self.open.iter().map(|open| open.due).min())
        }

        /// Puts the whole body into a request whose last block has come. `Err` is the answer to all other blocks.
        pub fn assemble(&mut self, request: &mut Request) -> Result<(), Response> {
            let Some(block) = request.block(BLOCK1)? else {
                return if request.payload.len() > BODY_MAX {
                    Err(too_large())
                } else {
                    Ok(())
                };
            };
            let own = |assembly: &Assembly| {
                assembly.peer == request.peer && assembly.path == request.path()
            };
            self.assemblies.retain(|known| {
                request.at.saturating_duration_since(known.touched) < ASSEMBLY_LIFETIME
            });
            let known = self
                .assemblies
                .iter()
                .position(own)
                .and_then(|at| self.assemblies.remove(at));
            let mut body = match known {
                _ if block.number == 0 => Vec::new(),
                Some(known) if known.body.len() == block.number * block.size() => known.body,
                _ => {
                    return Err(Response::error(
                        ResponseType::RequestEntityIncomplete,
                        "A block is missing",
                    ));
                }
            };
            let length = request.payload.len();
            if length > block.size() || (block.more && length < block.size()) {
                return Err(Response::error(
                    ResponseType::BadRequest,
                    "A block is not of its size",
                ));
            }
            if body.len() + length > BODY_MAX {
                return Err(too_large());
            }
            body.append(&mut request.payload);
            if !block.more {
                request.payload = body;
                return Ok(());
            }
            if self.assemblies.len() >= ASSEMBLIES_MAX {
                self.assemblies.pop_front();
            }
            self.assemblies.push_back(Assembly {
                peer: request.peer,
                path: request.path(),
                body,
                touched: request.at,
            });
            Err(Response::error(ResponseType::Continue, ""))
        }

        fn message_id(&mut self) -> u16 {
            self.last_message_id = self.last_message_id.wrapping_add(1);
            self.last_message_id
        }

        fn remember(&mut self, request: &Request, reply: Vec<u8>, in_progress: bool) {
            while self
                .seen
                .front()
                .is_some_and(|seen| !seen.in_progress && seen.expires <= request.at)
            {
                self.seen.pop_front();
            }
            if self.seen.len() >= SEEN_MAX
                && let Some(oldest) = self.seen.iter().position(|seen| !seen.in_progress)
            {
                self.seen.remove(oldest);
            }
            let expires = request.at + request.lifetime();
            self.seen.push_back(Seen {
                digest: request.digest,
                expires,
                in_progress,
                reply,
            });
        }
    }

    fn too_large() -> Response {
        let options = vec![(SIZE1, uint(BODY_MAX as u32))];
        Response {
            options,
            ..Response::error(
                ResponseType::RequestEntityTooLarge,
                &format!("At most {BODY_MAX} bytes"),
            )
        }
    }

    /// RFC 7252 §3 and §4.2/4.3: `Err` is the RST that a malformed or unexpected CON gets. The codec is laxer than the
    /// RFC, so what it reads must be what it would write: that leaves no marker without payload, for one.
    fn parse(datagram: &[u8]) -> Result<Packet, Option<Vec<u8>>> {
        let [first, code, high, low, ..] = *datagram else {
            return Err(None);
        };
        let (version, kind) = (first >> 6, first >> 4 & 3);
        let reset = (kind == 0).then(|| empty(MessageType::Reset, u16::from_be_bytes([high, low])));
        let as_expected = match (kind, code >> 5) {
            _ if version != 1 => return Err(None),
            (2 | 3, _) if code == 0 => datagram.len() == 4,
            (0 | 1, 0) => code != 0,
            (2, 2 | 4 | 5) => true,
            _ => false,
        };
        let same = |packet: &Packet| {
            packet
                .to_bytes_unlimited()
                .is_ok_and(|bytes| bytes == datagram)
        };
        Packet::from_bytes(datagram)
            .ok()
            .filter(|packet| as_expected && same(packet))
            .ok_or(reset)
    }

    fn empty(kind: MessageType, message_id: u16) -> Vec<u8> {
        let kind = if kind == MessageType::Reset {
            0x70
        } else {
            0x60
        };
        let [high, low] = message_id.to_be_bytes();
        vec![kind, 0, high, low]
    }

    /// Firmware: it takes every payload outside an ACK for configuration, so an error there has none.
    fn encode(
        kind: MessageType,
        message_id: u16,
        request: &Request,
        mut response: Response,
    ) -> Vec<u8> {
        if response.code.is_error() && kind != MessageType::Acknowledgement {
            response.payload.clear();
        }
        // RFC 7959 §2.3: a response to a block says which one.
        if let Ok(Some(block)) = request.block(BLOCK1) {
            let more = response.code == ResponseType::Continue;
            response
                .options
                .push((BLOCK1, Block { more, ..block }.value()));
        }
        let code = MessageClass::Response(response.code);
        message(
            kind,
            code,
            message_id,
            request.packet.get_token(),
            response.options,
            &response.payload,
        )
    }

    fn message(
        kind: MessageType,
        code: MessageClass,
        id: u16,
        token: &[u8],
        options: Options,
        body: &[u8],
    ) -> Vec<u8> {
        let mut packet = Packet::new();
        packet.header.set_version(1);
        packet.header.set_type(kind);
        packet.header.code = code;
        packet.header.message_id = id;
        packet.set_token(token.to_vec());
        for (number, value) in options {
            packet.add_option(number.into(), value);
        }
        packet.payload = body.to_vec();
        packet.to_bytes_unlimited().unwrap_or_default() // fails only over a size limit
    }

    /// A client's `POST`: CON, with message ID and token out of `seed`.
    pub fn encode_request(path: &str, payload: &[u8], seed: u64) -> Vec<u8> {
        let (token, options) = (
            &seed.to_be_bytes()[..4],
            vec![(URI_PATH, path.as_bytes().to_vec())],
        );
        message(
            MessageType::Confirmable,
            POST.into(),
            seed as u16,
            token,
            options,
            payload,
        )
    }

    /// What a client receives for its request: code (`0.00`: the empty ACK), payload, and the ACK to send (or nothing).
    /// `None`: not for this request.
    pub fn decode_response(datagram: &[u8], request: &[u8]) -> Option<(String, Vec<u8>, Vec<u8>)> {
        let (own, packet) = (
            Packet::from_bytes(request).ok()?,
            Packet::from_bytes(datagram).ok()?,
        );
        let (kind, message_id) = (packet.header.get_type(), packet.header.message_id);
        let own = match packet.header.code {
            MessageClass::Empty => {
                kind == MessageType::Acknowledgement && message_id == own.header.message_id
            }
            _ => packet.get_token() == own.get_token(),
        };
        let confirmable = kind == MessageType::Confirmable;
        let ack = if confirmable {
            empty(MessageType::Acknowledgement, message_id)
        } else {
            Vec::new()
        };
        own.then(|| (packet.header.get_code(), packet.payload, ack))
    }
}

#[cfg(any(test, fuzzing))]
#[path = "tests/unit/fuzz.rs"]
pub mod fuzz;
#[cfg(test)]
#[path = "tests/unit/mod.rs"]
mod tests;
