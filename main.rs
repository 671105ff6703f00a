//! CoAP to Telegram gateway for RIOT-OS motes, which cannot speak TLS.
//!
//! ```text
//! mote ──CoAP/UDP──▶ this program ──HTTPS──▶ Telegram Bot API ──▶ people
//! ```
//!
//! * `POST /message`, payload `url=…&token=…&chat_ids=1,2&text=…`: one `sendMessage` for each chat.
//! * `POST /update`, payload `url=…&token=…`: `getUpdates`, answered with all that the mote should
//!   know, unless it has acknowledged just that: `r123` (a removed user), `i5` (interval, minutes),
//!   `f1` (LED feedback), `Ada:123` (a user), joined with `;`.
//! * `GET /.well-known/core`: RFC 6690.
//!
//! One thread owns everything ([`Gateway`]) and does one thing at a time: it receives a datagram,
//! sends the empty ACK, calls Telegram, sends the separate response, and only then writes to the
//! disk and to people. Whatever comes meanwhile waits in the socket. When nothing waits there, it
//! retransmits, and fetches what people wrote. A second thread logs a heartbeat; a text to several
//! chats has a thread for each as long as it takes.
//!
//! The file reads top-down. A datagram travels [`Gateway::run`] → [`coap::Exchanges::receive`] →
//! [`Gateway::handle`] → [`Gateway::deliver`] or [`Gateway::update`] → [`Gateway::settle`]. What
//! people write travels [`Gateway::fetch`] → [`People::take`] → [`State`] → [`State::tokens`].

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixDatagram};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use std::{env, mem, thread};

use coap::{Event, Exchanges, Request, Response};
use coap_lite::ResponseType;
use log::{error, info, warn};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use ureq::config::IpFamily;
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{DefaultConnector, NextTimeout};

// -------------------------------------------------------------------------------------------------
// Limits, each with its reason
// -------------------------------------------------------------------------------------------------

/// For a request, from its arrival: the mote is answered within 9 s, for RIOT's nanocoap_sock waits
/// 10 s after the empty ACK.
const REQUEST_TIME: Duration = Duration::from_millis(8500);
/// The same while Telegram does not answer, so that all the motes that wait are soon told.
const REQUEST_TIME_IN_A_HANG: Duration = Duration::from_secs(2);
/// For the gateway's own fetch, during which requests wait.
const FETCH_TIME: Duration = Duration::from_secs(5);
/// Between two fetches. With three connections in turn, each is used every 45 s.
const FETCH_EVERY: Duration = Duration::from_secs(15);
/// After a failed fetch; and in a hang, between two tries with all the time.
const FETCH_AFTER_FAILURE: Duration = Duration::from_secs(60);
/// tdlib/telegram-bot-api holds a `getUpdates` that repeats the offset of the one before for 3 s.
const FOUND_NOTHING_HOLDS: Duration = Duration::from_secs(3);
/// How long idle connections are kept: Telegram closes them after about a minute, and a text that
/// meets the closing is lost.
const IDLE_CONNECTION: Duration = Duration::from_secs(50);
/// For one connection (TCP and TLS, over all addresses of the host), and for a look-up: leaves time
/// for a second attempt.
const CONNECT_TIME: Duration = Duration::from_secs(5);
/// How long the addresses of the host serve without a new look-up.
const ADDRESSES_HOLD: Duration = Duration::from_secs(60);
/// For a look-up while there are old addresses to fall back on.
const LOOK_UP_AGAIN_TIME: Duration = Duration::from_secs(1);
/// Calls that surely did not reach Telegram, and HTTP 429, are tried this often in all.
const ATTEMPTS: u32 = 3;
const ATTEMPT_PAUSE: Duration = Duration::from_millis(500);
/// Bot API server: a page of updates is cut at 4 MiB of JSON. Twice that, for the one that exceeds.
const PAGE_BYTES_MAX: u64 = 8 << 20;
/// Of any other answer: a `Message` with its text, each character as `\uXXXX\uXXXX`.
const ANSWER_BYTES_MAX: u64 = 64 << 10;
/// Bot API, getUpdates: updates in one page.
const PAGE: usize = 100;
/// Of the reason of a failed call in the log, characters.
const REASON_MAX: usize = 300;
/// Bot API, sendMessage: characters of a text.
const TEXT_MAX: usize = 4096;
/// Firmware: users it keeps, hence chats it can name in one message.
const USERS_MAX: usize = 10;
/// Removals that are remembered: chats to which nothing is sent.
const REMOVED_MAX: usize = 100;
/// Motes that are remembered; the longest silent is forgotten, and told everything again.
const MOTES_MAX: usize = 64;
/// A mote that has restarted unnoticed is right again after that.
const ACKNOWLEDGED_HOLDS: Duration = Duration::from_secs(3600);
/// Firmware: its message IDs go up by 1 to 3 from one request to the next, and begin anew, at
/// random, when it boots. Room for what is lost in between.
const MESSAGE_ID_STEP_MAX: u16 = 64;
/// Firmware: bytes of a user's name.
const NAME_MAX: usize = 14;
/// Firmware: 11 characters of a chat id; it cuts longer ones, so that they name another chat.
const CHAT_ID_MAX: i64 = 99_999_999_999;
/// Firmware: bytes of a reply; a longer one is thrown away whole.
const REPLY_MAX: usize = 302;
/// Firmware: bytes of its token, with the NUL behind.
const MOTE_TOKEN_MAX: usize = 49;
/// Wrong passwords in a row from one chat, after which its `config` is ignored for `LOCKED_OUT`.
const WRONG_PASSWORDS_MAX: u32 = 5;
const LOCKED_OUT: Duration = Duration::from_secs(3600);
/// Chats whose wrong passwords are counted: what a flood of strangers can take of memory.
const SUSPECTS_MAX: usize = 256;
/// Of `coap_server.log`, bytes; then it becomes `coap_server.log.1`.
const LOG_MAX: u64 = 1 << 20;
const HEARTBEAT: Duration = Duration::from_secs(15 * 60);
/// Longest sleep of the loop: systemd's watchdog is served each time.
const TICK: Duration = Duration::from_secs(1);
/// More datagrams than Linux's default socket buffer holds: after so many in a row, all that waited
/// at the first has been read, so a flood cannot put off retransmissions for ever.
const SOCKET_HOLDS: u32 = 1000;

const LINKS: &str = r#"</message>;rt="telegram.message";ct=0,</update>;rt="telegram.update";ct=0"#;
const MESSAGES_SENT: &str = "Messages sent successfully";
const NO_UPDATES: &str = "No Updates";
const MISSING_FIELDS: &str = "Missing required fields";
const HELP: &str = "I pass on what the sensors report.\n\
    remove me - no more messages\n\
    config <password> interval <1..120> - minutes between two reports\n\
    config <password> feedback <0|1> - LED feedback off or on\n\
    help - this text";
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

// -------------------------------------------------------------------------------------------------
// Arguments and configuration
// -------------------------------------------------------------------------------------------------

fn main() -> ExitCode {
    let arguments = env::args_os().skip(1);
    let words: Vec<String> = arguments
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let outcome = match words[..] {
        [] => Config::load().and_then(serve),
        ["check"] => Config::load().and_then(|config| check(&config)),
        ["send", ref options @ ..] => match SendOptions::parse(options) {
            Some(options) => Config::load().and_then(|config| send(&config, &options)),
            None => return usage(),
        },
        ["--help" | "-h"] => {
            say(USAGE);
            Ok(())
        }
        ["--version" | "-V"] => {
            say(concat!("coap_websocket ", env!("CARGO_PKG_VERSION")));
            Ok(())
        }
        _ => return usage(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            let _ = writeln!(io::stderr(), "coap_websocket: {reason}");
            ExitCode::FAILURE
        }
    }
}

fn usage() -> ExitCode {
    let _ = writeln!(io::stderr(), "{USAGE}");
    ExitCode::from(2)
}

/// `println!`, but a closed pipe is no reason to panic.
fn say(text: &str) {
    let _ = writeln!(io::stdout(), "{text}");
}

/// A token or a password. It has neither `Debug` nor `Display`, so that it cannot get into a log
/// line by accident.
#[derive(Clone)]
struct Secret(String);

impl Secret {
    /// A bot token, `<bot id>:<letters, digits, _ and ->`, so that it can stand in a URL as it is.
    fn bot_token(text: &str) -> Option<Secret> {
        let (id, key) = text.split_once(':')?;
        let id_fits = (1..=20).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_digit());
        let key_byte = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-';
        let key_fits = (1..=100).contains(&key.len()) && key.bytes().all(key_byte);
        (id_fits && key_fits).then(|| Secret(text.to_string()))
    }

    fn password(text: &str) -> Option<Secret> {
        (!text.contains(char::is_whitespace)).then(|| Secret(text.to_string()))
    }

    fn mote_token(text: &str) -> Option<Secret> {
        let separates = |c: char| c.is_whitespace() || c == '&';
        (text.len() <= MOTE_TOKEN_MAX && !text.contains(separates))
            .then(|| Secret(text.to_string()))
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
    /// What motes may present in place of `token`, so that it never crosses the mesh.
    mote_token: Option<Secret>,
    ip_family: IpFamily,
    /// `None`: every `config` is refused.
    password: Option<Secret>,
    listen: SocketAddr,
    roots: Option<Roots>,
    places: Places,
    /// For the log, once there is one.
    warnings: Vec<String>,
}

/// Root certificates instead of the built-in Mozilla roots.
struct Roots {
    file: String,
    certificates: Vec<ureq::tls::Certificate<'static>>,
}

/// Where the files are.
struct Places {
    config_ini: PathBuf,
    dot_env: PathBuf,
    state: PathBuf,
    log: PathBuf,
}

impl Places {
    /// What systemd names; else the working directory if it holds settings; else an installation,
    /// so that `check` and `send` work from every folder of the Pi; else the working directory.
    fn find() -> Places {
        let here = Path::new("config.ini").exists() || Path::new(".env").exists();
        let [mut settings, mut state, mut logs] = [(); 3].map(|()| PathBuf::new());
        if !here && Path::new("/etc/coap_websocket/config.ini").exists() {
            settings = "/etc/coap_websocket".into();
            state = "/var/lib/coap_websocket".into();
            logs = "/var/log/coap_websocket".into();
        }
        let mut dot_env = settings.join(".env");
        if let Some(credentials) = systemd_directory("CREDENTIALS_DIRECTORY") {
            dot_env = credentials.join("env"); // a credential's name cannot start with a dot
            settings = credentials;
        }
        let state = systemd_directory("STATE_DIRECTORY").unwrap_or(state);
        let logs = systemd_directory("LOGS_DIRECTORY").unwrap_or(logs);
        Places {
            config_ini: settings.join("config.ini"),
            dot_env,
            state: state.join("state.json"),
            log: logs.join("coap_server.log"),
        }
    }
}

/// Of several directories, separated by colons, the first.
fn systemd_directory(variable: &str) -> Option<PathBuf> {
    let value = env::var(variable).ok()?;
    let first = value.split(':').next()?;
    (!first.is_empty()).then(|| first.into())
}

impl Config {
    /// Reads `config.ini`, `.env` and the environment. An error is one line that names file, line
    /// and reason.
    fn load() -> Result<Config, String> {
        let places = Places::find();
        let ini = read_settings(&places.config_ini, true)?;
        let variables = read_settings(&places.dot_env, false)?;
        let key = |name| ini.get(name).cloned();
        let variable = |name| variable(&variables, name);

        let token = key("bot_token").filter(|set| set.text != "your_telegram_bot_token");
        let token_rule = "is not a bot token (digits, a colon, letters, as BotFather shows it)";
        let token = parsed(token, token_rule, Secret::bot_token)?;
        let mote_token_rule = "is not a word of at most 49 characters without white space and &";
        let mote_token = parsed(key("mote_token"), mote_token_rule, Secret::mote_token)?;
        if let (Some(_), None, Some(set)) = (&mote_token, &token, key("mote_token")) {
            return Err(format!(
                "{}: mote_token stands for bot_token, which is not set",
                set.origin
            ));
        }
        let password_rule = "holds white space, so nobody could write it in a `config` message";
        let password = parsed(variable("PASSWORD"), password_rule, Secret::password)?;
        let url = parsed(key("url"), "is not of the form https://host/bot", https_url)?;
        let family = parsed(key("ip_family"), "is none of any, ipv4, ipv6", ip_family)?;
        let address_rule = "is not an IP address (one without a zone)";
        let address = parsed(variable("COAP_SERVER_IP"), address_rule, |text| {
            text.parse().ok()
        })?;
        let port_rule = "is not a port (0 to 65535)";
        let port = parsed(variable("COAP_SERVER_PORT"), port_rule, |text| {
            text.parse().ok()
        })?;
        let roots = variable("SSL_CERT_FILE").map(Roots::read).transpose()?;

        let mut warnings = Vec::new();
        for (name, set) in &ini {
            if !["bot_token", "mote_token", "url", "ip_family"].contains(&name.as_str()) {
                warnings.push(format!("{}: unknown key `{name}` is ignored", set.origin));
            }
        }
        if token.is_none() {
            let file = places.config_ini.display();
            warnings.push(format!(
                "no bot_token in {file}: /message serves any token, /update the first bot that Telegram accepts"
            ));
        }
        if password.is_none() {
            let file = places.dot_env.display();
            warnings.push(format!(
                "no PASSWORD in {file}: every `config` message is refused"
            ));
        }
        Ok(Config {
            url: url.unwrap_or_else(|| "https://api.telegram.org/bot".to_string()),
            token,
            mote_token,
            ip_family: family.unwrap_or(IpFamily::Any),
            password,
            listen: SocketAddr::new(
                address.unwrap_or(std::net::Ipv6Addr::LOCALHOST.into()),
                port.unwrap_or(coap::PORT),
            ),
            roots,
            places,
            warnings,
        })
    }

    /// For the commands that need one.
    fn required_token(&self) -> Result<&Secret, String> {
        let missing = || {
            format!(
                "no bot_token is set in {}",
                self.places.config_ini.display()
            )
        };
        self.token.as_ref().ok_or_else(missing)
    }
}

/// What is set, and where it stands, as in `.env:3`.
#[derive(Clone)]
struct Setting {
    name: String,
    text: String,
    origin: String,
}

/// The lines `name = value` that are neither empty nor comments; of an INI file those of
/// `[telegram]`, for the other sections belong to the firmware's build. None without a file.
fn read_settings(path: &Path, ini: bool) -> Result<BTreeMap<String, Setting>, String> {
    let mut found = BTreeMap::<String, Setting>::new();
    let content = match fs::read(path) {
        Ok(content) => content,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
        Err(error) => return Err(format!("cannot read {}: {error}", path.display())),
    };
    let mut section = if ini {
        None
    } else {
        Some("telegram".to_string())
    };
    let content = content.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&content);
    for (number, line) in (1..).zip(content.split(|byte| *byte == b'\n')) {
        let origin = format!("{}:{number}", path.display());
        let line = str::from_utf8(line)
            .map_err(|_| format!("{origin}: not UTF-8 text"))?
            .trim();
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        if let Some(name) = line.strip_prefix('[').filter(|_| ini) {
            let name = name
                .strip_suffix(']')
                .ok_or(format!("{origin}: `[` without `]`"))?;
            section = Some(name.trim().to_string());
            continue;
        }
        match section.as_deref() {
            None => return Err(format!("{origin}: no section yet; put [telegram] above it")),
            Some("telegram") => {}
            Some(_) => continue,
        }
        let set = Setting::parse(line, ini, origin)?;
        if let Some(first) = found.insert(set.name.clone(), set.clone()) {
            let (origin, first) = (set.origin, first.origin);
            return Err(format!(
                "{origin}: set before in {first}; remove one of them"
            ));
        }
    }
    Ok(found)
}

impl Setting {
    /// `name = value`, perhaps with `export` before and a pair of quotes around the value.
    fn parse(line: &str, ini: bool, origin: String) -> Result<Setting, String> {
        let line = line.strip_prefix("export ").unwrap_or(line);
        let (name, value) = line.split_once('=').unwrap_or_default();
        let (name, value) = (name.trim(), value.trim());
        if name.is_empty() || name.contains(|c: char| c.is_whitespace() || c.is_control()) {
            return Err(format!("{origin}: not `NAME=value`"));
        }
        let unquote = |quote: char| value.strip_prefix(quote)?.strip_suffix(quote);
        let text = unquote('"').or(unquote('\'')).unwrap_or(value).to_string();
        let name = if ini {
            name.to_ascii_lowercase()
        } else {
            name.to_string()
        };
        Ok(Setting { name, text, origin })
    }
}

/// The real environment wins over `.env`, and an empty variable is not set.
fn variable(dot_env: &BTreeMap<String, Setting>, name: &str) -> Option<Setting> {
    match env::var_os(name) {
        Some(value) if !value.is_empty() => Some(Setting {
            name: name.to_string(),
            text: value.to_string_lossy().into_owned(),
            origin: "environment".to_string(),
        }),
        _ => dot_env
            .get(name)
            .filter(|set| !set.text.is_empty())
            .cloned(),
    }
}

/// What `parse` makes of a setting (`None`: it is not set), or what is wrong where. The text is not
/// repeated, for it may be a secret.
fn parsed<T>(
    set: Option<Setting>,
    rule: &str,
    parse: impl Fn(&str) -> Option<T>,
) -> Result<Option<T>, String> {
    let Some(set) = set.filter(|set| !set.text.is_empty()) else {
        return Ok(None);
    };
    match parse(&set.text) {
        None => Err(format!("{}: {} {rule}", set.origin, set.name)),
        value => Ok(value),
    }
}

fn https_url(text: &str) -> Option<String> {
    let uri: ureq::http::Uri = text.parse().ok()?;
    let plain = uri.query().is_none() && !text.contains('#');
    let has_host = !uri.host()?.is_empty();
    (uri.scheme_str() == Some("https") && plain && has_host).then(|| text.to_string())
}

fn ip_family(text: &str) -> Option<IpFamily> {
    match text {
        "any" => Some(IpFamily::Any),
        "ipv4" => Some(IpFamily::Ipv4Only),
        "ipv6" => Some(IpFamily::Ipv6Only),
        _ => None,
    }
}

impl Roots {
    fn read(set: Setting) -> Result<Roots, String> {
        let (origin, file) = (set.origin, set.text);
        let pem = fs::read(&file)
            .map_err(|error| format!("{origin}: cannot read SSL_CERT_FILE {file}: {error}"))?;
        let mut certificates = Vec::new();
        for item in ureq::tls::parse_pem(&pem) {
            if let Ok(ureq::tls::PemItem::Certificate(certificate)) = item {
                certificates.push(certificate);
            }
        }
        if certificates.is_empty() {
            return Err(format!(
                "{origin}: SSL_CERT_FILE {file} holds no PEM certificate"
            ));
        }
        Ok(Roots { file, certificates })
    }
}

// -------------------------------------------------------------------------------------------------
// The loop
// -------------------------------------------------------------------------------------------------

/// Everything; one thread owns it.
struct Gateway {
    config: Config,
    /// Answers leave from the socket that received: gcoap matches a response by the server's
    /// address and port.
    socket: UdpSocket,
    exchanges: Exchanges,
    telegram: Telegram,
    state: State,
    /// What `state.json` holds, if it is known.
    saved: Option<State>,
    motes: Motes,
    people: People,
    /// For the gateway's own fetches: the configured token, else the last that Telegram accepted.
    token: Option<Secret>,
    /// When the gateway fetches on its own.
    next_fetch: Instant,
    /// When the last fetch found that nobody had written.
    found_nothing: Option<Instant>,
    /// Set while fetching fails, so that start and end are logged once.
    fetch_fails: bool,
    /// Set while Telegram does not answer: when the next try may take all its time.
    hang: Option<Instant>,
}

/// Serves for ever. Faults of the start end it; afterwards nothing that a datagram holds does.
fn serve(config: Config) -> Result<(), String> {
    start_log(&config.places.log)?;
    for warning in &config.warnings {
        warn!("{warning}");
    }
    let mut state = State::open(&config.places.state);
    // Update ids are counted for each bot.
    let bot = config
        .token
        .as_ref()
        .map(|token| token.bot_id().to_string());
    if bot.is_some() && bot != state.bot {
        state.bot = bot;
        state.offset = 0;
    }
    notify("READY=1");
    let socket = bind(config.listen)?;
    thread::Builder::new()
        .name("heartbeat".to_string())
        .spawn(heartbeat)
        .map_err(|error| format!("cannot start a thread: {error}"))?;
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
        config,
    };
    info!(
        "coap_websocket {} serves CoAP on {}",
        env!("CARGO_PKG_VERSION"),
        gateway.local_address()
    );
    gateway.tell_status();
    // At once, so that a first start that crashes is not followed by another first start.
    gateway.settle(Instant::now());
    gateway.run()
}

/// Waits for an address that does not exist yet: READY was said before, for a unit that waits would
/// hold up the boot.
fn bind(listen: SocketAddr) -> Result<UdpSocket, String> {
    let mut told = false;
    loop {
        match UdpSocket::bind(listen) {
            Ok(socket) => return Ok(socket),
            Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {}
            Err(error) => return Err(format!("cannot bind {listen}: {error}")),
        }
        if !told {
            warn!("address {listen} does not exist yet; trying every second");
            notify(&format!("STATUS=Waits for address {listen} to appear"));
            told = true;
        }
        notify("WATCHDOG=1");
        thread::sleep(TICK);
    }
}

impl Gateway {
    fn run(&mut self) -> ! {
        let mut buffer = vec![0; coap::DATAGRAM_MAX];
        let mut in_a_row = 0;
        let mut watched = Instant::now();
        loop {
            let _ = self.socket.set_read_timeout(Some(self.rest()));
            match self.socket.recv_from(&mut buffer) {
                Ok((length, peer)) => {
                    self.receive(peer, &buffer[..length]);
                    in_a_row += 1;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => in_a_row = SOCKET_HOLDS,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    warn!("cannot receive: {error}");
                    thread::sleep(TICK);
                }
            }
            // Only when all that waited has been read: an ACK may have been among it.
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
        let mut due = now + TICK;
        if let Some(retransmission) = self.exchanges.next_due() {
            due = due.min(retransmission);
        }
        if self.token.is_some() {
            due = due.min(self.next_fetch);
        }
        due.saturating_duration_since(now)
            .max(Duration::from_millis(1))
    }

    /// What is done when nothing waits in the socket.
    fn tend(&mut self) {
        let now = Instant::now();
        for (peer, bytes) in self.exchanges.retransmissions(now) {
            self.transmit(peer, &bytes);
        }
        if now >= self.next_fetch
            && let Some(token) = self.token.clone()
        {
            let deadline = now + self.time_for(FETCH_TIME);
            let _ = self.fetch(&token, deadline); // it has logged how it went
            self.settle(deadline);
        }
    }

    fn receive(&mut self, peer: SocketAddr, datagram: &[u8]) {
        match self.exchanges.receive(Instant::now(), peer, datagram) {
            Event::Nothing => {}
            Event::Send(bytes) => self.transmit(peer, &bytes),
            Event::Request(request) => self.handle(request),
            Event::Acknowledged(version) => self.motes.acknowledge(peer, version, Instant::now()),
            Event::Refused => info!("{peer} did not want the response (RST): it is told again"),
        }
    }

    fn handle(&mut self, mut request: Request) {
        let work = match self.judge(&mut request) {
            Ok(Verdict::Work(work)) => work,
            Ok(Verdict::Reply(response)) | Err(response) => return self.reply(&request, response),
        };
        let acknowledgement = self.exchanges.accept(&request);
        self.transmit(request.peer, &acknowledgement);
        self.motes.note_request(request.peer, request.message_id());
        let deadline = request.at + self.time_for(REQUEST_TIME);
        let outcome = match work {
            Work::Message(message) => self.deliver(&message, deadline),
            Work::Update(token) => self.update(&token, request.peer, deadline),
        };
        let code = outcome.response.code();
        let bytes = self
            .exchanges
            .respond(Instant::now(), &request, outcome.response);
        self.transmit(request.peer, &bytes);
        log_outcome(&request, &code, &outcome.detail);
        self.settle(deadline);
    }

    /// Answers at once, inside the ACK.
    fn reply(&mut self, request: &Request, response: Response) {
        let code = response.code();
        let detail = response.diagnostic();
        let bytes = self.exchanges.reply(request, response);
        self.transmit(request.peer, &bytes);
        log_outcome(request, &code, &detail);
    }

    /// A datagram that cannot be sent is one that was lost: CoAP retransmits.
    fn transmit(&self, peer: SocketAddr, bytes: &[u8]) {
        if !bytes.is_empty() {
            let _ = self.socket.send_to(bytes, peer);
        }
    }

    /// The disk, then the people: nobody is told of a change that a power cut would undo.
    fn settle(&mut self, deadline: Instant) {
        USERS.store(self.state.users.len() as u64, Relaxed);
        match self.save() {
            Ok(()) => self.answer_people(deadline),
            Err(reason) => error!("{reason}"),
        }
    }

    /// Writes `state.json` if it is not what it should be.
    fn save(&mut self) -> Result<(), String> {
        if self.saved.as_ref() != Some(&self.state) {
            let path = &self.config.places.state;
            self.state
                .write(path)
                .map_err(|error| format!("cannot write {}: {error}", path.display()))?;
            self.saved = Some(self.state.clone());
        }
        Ok(())
    }

    /// The time for a request or a fetch, which is `usual` unless Telegram does not answer. In a
    /// hang, one try a minute has all the time, and so notices the end of it.
    fn time_for(&mut self, usual: Duration) -> Duration {
        let now = Instant::now();
        match self.hang {
            None => usual,
            Some(next) if now < next => REQUEST_TIME_IN_A_HANG,
            Some(_) => {
                self.hang = Some(now + FETCH_AFTER_FAILURE);
                usual
            }
        }
    }

    fn local_address(&self) -> SocketAddr {
        self.socket.local_addr().unwrap_or(self.config.listen)
    }

    fn tell_status(&self) {
        let trouble = if self.fetch_fails {
            ", but Telegram does not answer: see the log"
        } else {
            ""
        };
        notify(&format!(
            "STATUS=Serves CoAP on {}{trouble}",
            self.local_address()
        ));
    }
}

// -------------------------------------------------------------------------------------------------
// Judging a request
// -------------------------------------------------------------------------------------------------

/// What becomes of an acceptable request.
enum Verdict {
    /// It is answered without Telegram.
    Reply(Response),
    Work(Work),
}

enum Work {
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

#[derive(Clone, Copy, PartialEq)]
enum Resource {
    Message,
    Update,
    Discovery,
}

impl Gateway {
    /// Whether the request can be carried out; else the answer to it.
    fn judge(&mut self, request: &mut Request) -> Result<Verdict, Response> {
        let resource = route(request)?;
        if resource == Resource::Discovery {
            let links = Response::content(ResponseType::Content, LINKS, coap::LINK_FORMAT);
            return Ok(Verdict::Reply(links));
        }
        if !self.exchanges.assemble(request)? {
            return Ok(Verdict::Reply(Response::empty(ResponseType::Continue)));
        }
        let payload = String::from_utf8_lossy(&request.payload);
        let form = Form::parse(&payload);
        let is_message = resource == Resource::Message;
        let chats = if is_message {
            chats(form.chat_ids)
        } else {
            Ok(Vec::new())
        };
        let no_chats = chats.as_ref().is_ok_and(Vec::is_empty);
        if form.url.is_empty()
            || form.token.is_empty()
            || (is_message && (no_chats || form.text.is_empty()))
        {
            return Err(bad_request(MISSING_FIELDS));
        }
        if form.url != self.config.url {
            return Err(forbidden("This gateway does not serve that url"));
        }
        let token = self.served_token(form.token, resource)?;
        if resource == Resource::Update {
            return Ok(Verdict::Work(Work::Update(token)));
        }
        let chats = chats?;
        if chats.len() > USERS_MAX {
            return Err(bad_request(&format!(
                "Too many chat ids, at most {USERS_MAX}"
            )));
        }
        if form.text.chars().count() > TEXT_MAX {
            return Err(bad_request(&format!(
                "Text too long, at most {TEXT_MAX} characters"
            )));
        }
        let text = form.text.to_string();
        Ok(Verdict::Work(Work::Message(Message { token, chats, text })))
    }

    /// The bot's token for what a mote has presented.
    fn served_token(&self, presented: &str, resource: Resource) -> Result<Secret, Response> {
        let refusal = || forbidden("This gateway does not serve that token");
        if let Some(own) = &self.config.token {
            let is_mote_token = self
                .config
                .mote_token
                .as_ref()
                .is_some_and(|word| word.is(presented));
            return if is_mote_token || own.is(presented) {
                Ok(own.clone())
            } else {
                Err(refusal())
            };
        }
        let token = Secret::bot_token(presented).ok_or(bad_request("Malformed token"))?;
        let other_bot = self
            .state
            .bot
            .as_ref()
            .is_some_and(|bot| bot != token.bot_id());
        if resource == Resource::Update && other_bot {
            Err(refusal())
        } else {
            Ok(token)
        }
    }
}

fn bad_request(reason: &str) -> Response {
    Response::error(ResponseType::BadRequest, reason)
}

fn forbidden(reason: &str) -> Response {
    Response::error(ResponseType::Forbidden, reason)
}

/// Options, path, method and formats. RFC 7252 §5.4, §5.8 and §5.10, RFC 7959 §2.2.
fn route(request: &Request) -> Result<Resource, Response> {
    use ResponseType::{MethodNotAllowed, NotAcceptable, NotFound, UnsupportedContentFormat};
    request.check_options()?;
    let (resource, method, format) = match request.path().as_str() {
        "message" => (Resource::Message, coap::POST, coap::TEXT_PLAIN),
        "update" => (Resource::Update, coap::POST, coap::TEXT_PLAIN),
        ".well-known/core" => (Resource::Discovery, coap::GET, coap::LINK_FORMAT),
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
    // Replies are short and go whole, whatever size of block is asked for.
    if request
        .block(coap::BLOCK2)?
        .is_some_and(|block| block.number > 0)
    {
        return Err(bad_request("No such block"));
    }
    Ok(resource)
}

/// The fields of a payload; an empty one is missing.
struct Form<'a> {
    url: &'a str,
    token: &'a str,
    chat_ids: &'a str,
    text: &'a str,
}

impl Form<'_> {
    /// Values are not percent-encoded. A key separates only where it stands at the start or behind
    /// `&`, and only once: a text may hold anything else.
    fn parse(payload: &str) -> Form<'_> {
        let payload = trim(payload);
        let keys = ["url=", "token=", "chat_ids=", "text="];
        // Of each key: where it (with its `&`) starts, and where its value does.
        let found = keys.map(|key| {
            if payload.starts_with(key) {
                return Some((0, key.len()));
            }
            let start = payload.find(&format!("&{key}"))?;
            Some((start, start + 1 + key.len()))
        });
        let value = |index: usize| {
            let Some((start, value)) = found[index] else {
                return "";
            };
            let starts = found.iter().flatten().map(|(start, _)| *start);
            let end = starts
                .filter(|other| *other > start)
                .min()
                .unwrap_or(payload.len());
            trim(&payload[value..end])
        };
        Form {
            url: value(0),
            token: value(1),
            chat_ids: value(2),
            text: value(3),
        }
    }
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
    Ok(chats)
}

/// Bot API, `chat_id`: an integer, or `@` and the username of a channel.
fn chat_id(text: &str) -> Option<Value> {
    if let Some(name) = text.strip_prefix('@') {
        let fits = (1..=32).contains(&name.len());
        let valid = fits && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        return valid.then(|| text.into());
    }
    let number = text.parse::<i64>().ok()?;
    (!text.starts_with('+')).then(|| number.into())
}

// -------------------------------------------------------------------------------------------------
// Message and update
// -------------------------------------------------------------------------------------------------

/// What becomes of a request, and what the log says of it.
struct Outcome {
    response: Response,
    detail: String,
}

impl Gateway {
    /// Sends the text to every chat that has not asked to be left alone.
    fn deliver(&mut self, message: &Message, deadline: Instant) -> Outcome {
        let wanted = |chat: &&Value| {
            !chat
                .as_i64()
                .is_some_and(|id| self.state.removed.contains(&id))
        };
        let chats: Vec<&Value> = message.chats.iter().filter(wanted).collect();
        let results = self
            .telegram
            .send_to_all(&message.token, &chats, &message.text, deadline);
        let sent = results.iter().filter(|result| result.is_ok()).count();
        let mut answered = sent > 0;
        let mut timed_out = false;
        for (chat, result) in chats.iter().zip(&results) {
            let Err(failure) = result else { continue };
            warn!("sendMessage to {chat} failed: {}", failure.reason);
            answered |= failure.code.is_some();
            timed_out |= failure.timed_out;
            if let (Some(403), Some(id)) = (failure.code, chat.as_i64().filter(is_private)) {
                let user = self.state.remove(id);
                info!("{user} is removed, for Telegram refuses messages to it");
            }
        }
        let failed = chats.len() - sent;
        FORWARDED.fetch_add(sent as u64, Relaxed);
        FAILURES.fetch_add(failed as u64, Relaxed);
        if answered && self.hang.take().is_some() {
            self.next_fetch = Instant::now();
        } else if timed_out && !answered {
            self.note_hang();
        }
        let detail = format!("{sent} of {} chats", message.chats.len());
        if sent > 0 || chats.is_empty() {
            let response = Response::text(ResponseType::Content, MESSAGES_SENT);
            return Outcome { response, detail };
        }
        Outcome {
            response: Response::empty(ResponseType::InternalServerError),
            detail,
        }
    }

    /// Fetches what people wrote, and tells the mote all that it should know, unless it does.
    fn update(&mut self, token: &Secret, peer: SocketAddr, deadline: Instant) -> Outcome {
        let fetched = self.token.as_ref().is_some_and(|own| own.is(&token.0))
            && self
                .found_nothing
                .is_some_and(|at| at.elapsed() < FOUND_NOTHING_HOLDS);
        if !fetched && let Err(failure) = self.fetch(token, deadline) {
            FAILURES.fetch_add(1, Relaxed);
            return Outcome {
                response: Response::empty(ResponseType::InternalServerError),
                detail: failure.reason,
            };
        }
        let tokens = self.state.tokens();
        let version = self.motes.offer(&tokens);
        if tokens.is_empty() || self.motes.has_acknowledged(peer, version, Instant::now()) {
            let response = Response::text(ResponseType::Valid, NO_UPDATES);
            return Outcome {
                response,
                detail: String::new(),
            };
        }
        let mut response = Response::text(ResponseType::Content, &tokens);
        response.version = Some(version);
        Outcome {
            response,
            detail: tokens,
        }
    }

    /// Takes in what people wrote. The first failure and the first success after it are logged.
    fn fetch(&mut self, token: &Secret, deadline: Instant) -> Result<(), Failure> {
        let result = self.fetch_pages(token, deadline);
        let fails = result.is_err();
        match &result {
            Ok(()) => {
                self.token = Some(token.clone());
                self.hang = None;
                self.next_fetch = Instant::now() + FETCH_EVERY;
                if self.fetch_fails {
                    info!("Telegram answers again");
                }
            }
            Err(failure) => {
                if !self.fetch_fails {
                    warn!("cannot fetch what people write: {}", failure.reason);
                }
                if failure.timed_out {
                    self.note_hang();
                } else {
                    self.hang = None;
                    self.next_fetch = Instant::now() + FETCH_AFTER_FAILURE;
                }
            }
        }
        if self.fetch_fails != fails {
            self.fetch_fails = fails;
            self.tell_status();
        }
        result
    }

    /// Progress is saved before it is confirmed to Telegram (by the next call's offset) and before
    /// anybody is answered.
    fn fetch_pages(&mut self, token: &Secret, deadline: Instant) -> Result<(), Failure> {
        loop {
            self.save().map_err(Failure::new)?;
            let updates = self
                .telegram
                .get_updates(token, self.state.offset, deadline)?;
            let page = updates.len();
            self.state.bot = Some(token.bot_id().to_string());
            for update in updates {
                self.people
                    .take(update, &mut self.state, self.config.password.as_ref());
            }
            if page == 0 {
                // Only an empty page is proof that there is nothing more: Telegram cuts others.
                self.state.ignore_commands_before = None;
                self.found_nothing = Some(Instant::now());
            }
            if page < PAGE {
                return self.save().map_err(Failure::new);
            }
        }
    }

    /// Telegram does not answer: from now on requests are short, until a call is answered.
    fn note_hang(&mut self) {
        let next = *self
            .hang
            .get_or_insert(Instant::now() + FETCH_AFTER_FAILURE);
        self.next_fetch = next;
    }

    /// Best effort, for the mote has its answer already: what does not fit into the time is dropped.
    fn answer_people(&mut self, deadline: Instant) {
        let Some(token) = self.token.clone() else {
            return;
        };
        let mut dropped = 0;
        for answer in mem::take(&mut self.people.answers) {
            for (method, parameters) in answer.calls() {
                if Instant::now() >= deadline {
                    dropped += 1;
                    continue;
                }
                if let Err(failure) = self.telegram.call(&token, method, &parameters, deadline) {
                    warn!("{method} to {} failed: {}", answer.chat, failure.reason);
                }
            }
        }
        if dropped > 0 {
            warn!("{dropped} answers to people are dropped, for there was no time left");
        }
    }
}

// -------------------------------------------------------------------------------------------------
// Telegram
// -------------------------------------------------------------------------------------------------

/// The Bot API.
struct Telegram {
    agent: ureq::Agent,
    url: String,
    host: String,
    /// For people.
    roots: String,
}

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
        let mut tls = ureq::tls::TlsConfig::builder();
        let mut roots = "the built-in Mozilla roots".to_string();
        if let Some(own) = &config.roots {
            tls = tls.root_certs(ureq::tls::RootCerts::new_with_certs(&own.certificates));
            roots = format!("those in SSL_CERT_FILE {}", own.file);
        }
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false) // description and retry_after are in the body
            .max_redirects(0)
            .max_redirects_will_error(false)
            .ip_family(config.ip_family)
            .tls_config(tls.build())
            .timeout_global(Some(REQUEST_TIME))
            .timeout_connect(Some(CONNECT_TIME))
            .timeout_resolve(Some(CONNECT_TIME))
            .input_buffer_size(8 << 10) // half the memory of a text to ten chats
            .output_buffer_size(8 << 10)
            .max_idle_connections(USERS_MAX)
            .max_idle_connections_per_host(USERS_MAX)
            .max_idle_age(IDLE_CONNECTION)
            .user_agent(concat!("coap_websocket/", env!("CARGO_PKG_VERSION")))
            .build();
        let uri: ureq::http::Uri = config.url.parse().unwrap_or_default(); // it was checked
        Telegram {
            agent: ureq::Agent::with_parts(
                agent,
                DefaultConnector::default(),
                Addresses::default(),
            ),
            url: config.url.clone(),
            host: uri.authority().map(ToString::to_string).unwrap_or_default(),
            roots,
        }
    }

    /// The updates from `offset` on, which confirms all before. Without `offset`, those that nobody
    /// has confirmed, and nothing is.
    fn get_updates(
        &self,
        token: &Secret,
        offset: impl Into<Option<i64>>,
        deadline: Instant,
    ) -> Result<Vec<Value>, Failure> {
        let parameters = json!({
            "offset": offset.into(),
            "limit": PAGE,
            "timeout": 0,
            "allowed_updates": ["message"],
        });
        match self.call(token, "getUpdates", &parameters, deadline)? {
            Value::Array(updates) => Ok(updates),
            _ => Err(Failure::new(
                "getUpdates: Telegram's answer is not a list".to_string(),
            )),
        }
    }

    /// One `sendMessage` for each chat, all at the same time; the results in the same order.
    fn send_to_all(
        &self,
        token: &Secret,
        chats: &[&Value],
        text: &str,
        deadline: Instant,
    ) -> Vec<Result<Value, Failure>> {
        let send = |chat: &Value| {
            let parameters = json!({"chat_id": chat, "text": text});
            self.call(token, "sendMessage", &parameters, deadline)
        };
        let Some((first, others)) = chats.split_first() else {
            return Vec::new();
        };
        thread::scope(|scope| {
            let mut threads = Vec::new();
            for chat in others {
                threads.push(thread::Builder::new().spawn_scoped(scope, move || send(chat)));
            }
            let mut results = vec![send(first)];
            for thread in threads {
                results.push(match thread {
                    Ok(running) => running
                        .join()
                        .unwrap_or_else(|_| Err(Failure::new("its thread died".to_string()))),
                    Err(error) => Err(Failure::new(format!("cannot start a thread: {error}"))),
                });
            }
            results
        })
    }

    /// Calls a method: again only where the first call surely had no effect and the time allows it.
    fn call(
        &self,
        token: &Secret,
        method: &str,
        parameters: &Value,
        deadline: Instant,
    ) -> Result<Value, Failure> {
        let mut first: Option<Failure> = None;
        let mut attempt = 1;
        loop {
            let failure = match self.call_once(token, method, parameters, deadline) {
                Ok(result) => return Ok(result),
                Err(failure) => failure,
            };
            match failure.retry_in {
                Some(pause) if attempt < ATTEMPTS && Instant::now() + pause < deadline => {
                    first.get_or_insert(failure);
                    attempt += 1;
                    thread::sleep(pause);
                }
                // What Telegram says is the truth; else the first reason tells more than the last.
                None if failure.code.is_some() => return Err(failure),
                _ => return Err(first.unwrap_or(failure)),
            }
        }
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
            return Err(Failure {
                timed_out: true,
                ..Failure::new("no time left".to_string())
            });
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
        if remaining + Duration::from_millis(100) < REQUEST_TIME {
            request = request.config().timeout_global(Some(remaining)).build();
        }
        let limit = if method == "getUpdates" {
            PAGE_BYTES_MAX
        } else {
            ANSWER_BYTES_MAX
        };
        let exchange = |mut response: ureq::http::Response<ureq::Body>| {
            let status = response.status().as_u16();
            let answer = response
                .body_mut()
                .with_config()
                .limit(limit)
                .read_to_vec()?;
            Ok((status, answer))
        };
        let answer = request
            .send(ureq::SendBody::from_reader(&mut body))
            .and_then(exchange);
        let result = match answer {
            Ok((status, answer)) => read_answer(status, &answer),
            Err(error) => Err(Failure {
                retry_in: (!body.read).then_some(ATTEMPT_PAUSE),
                timed_out: matches!(error, ureq::Error::Timeout(_)),
                ..Failure::new(self.describe(&error))
            }),
        };
        result.map_err(|failure| {
            let reason = format!(
                "{}: {}",
                self.host,
                failure.reason.replace(&token.0, "<token>")
            );
            Failure {
                reason: reason.chars().take(REASON_MAX).collect(),
                ..failure
            }
        })
    }

    fn describe(&self, error: &ureq::Error) -> String {
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
        let hint = match reason {
            Expired | ExpiredContext { .. } | NotValidYet | NotValidYetContext { .. } => {
                "; is this machine's clock set?"
            }
            _ => "",
        };
        format!(
            "its certificate is not trusted: {reason} (roots: {}{hint})",
            self.roots
        )
    }
}

/// A request's body that knows whether it was asked for. As long as it was not, Telegram cannot
/// have acted on the request, whatever happened to the connection.
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

/// Success is `200` and `"ok": true`, nothing else.
fn read_answer(status: u16, body: &[u8]) -> Result<Value, Failure> {
    let mut answer: Value = serde_json::from_slice(body).unwrap_or_default();
    if status == 200 && answer["ok"] == true {
        return Ok(answer["result"].take());
    }
    let (Some(false), Some(code)) = (answer["ok"].as_bool(), answer["error_code"].as_u64()) else {
        return Err(Failure::new(format!(
            "HTTP {status} that does not come from the Bot API (a proxy, a login page of the network?)"
        )));
    };
    let description = answer["description"].as_str().unwrap_or("no description");
    let parameters = &answer["parameters"];
    let retry_after = parameters["retry_after"].as_u64().filter(|_| code == 429);
    let migrated = parameters["migrate_to_chat_id"].as_i64();
    let hint = match code {
        401 | 404 => " (is the bot's token right?)".to_string(),
        409 if description.contains("webhook") => {
            " (open <url><token>/deleteWebhook in a browser once)".to_string()
        }
        409 => " (another program uses this bot: stop it)".to_string(),
        _ => migrated
            .map(|id| format!(" (the group's id is now {id}: change it in the mote)"))
            .unwrap_or_default(),
    };
    Err(Failure {
        code: Some(code),
        retry_in: retry_after.map(Duration::from_secs),
        ..Failure::new(format!("{code} {description}{hint}"))
    })
}

/// Keeps the addresses of the host, for ureq asks for them on every call, also when a connection is
/// open. It is the Bot API's host or the proxy's, never both. The lock makes one look-up of many at
/// once.
#[derive(Debug, Default)]
struct Addresses(Mutex<LookUp>);

#[derive(Debug, Default)]
struct LookUp {
    at: Option<Instant>,
    /// Of the last look-up that succeeded: they serve while the name server fails.
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
        let mut last = self
            .0
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(found) = &last.found {
            if last.at.is_some_and(|at| at.elapsed() < ADDRESSES_HOLD) {
                return Ok(found.clone());
            }
            timeout.after = (*timeout.after).min(LOOK_UP_AGAIN_TIME).into();
        } else if last.at.is_some_and(|at| at >= asked) {
            return Err(ureq::Error::HostNotFound); // somebody else's look-up has just failed
        }
        let result = DefaultResolver::default().resolve(uri, config, timeout);
        last.at = Some(Instant::now());
        match result {
            Ok(found) => Ok(last.found.insert(found).clone()),
            Err(error) => last.found.clone().ok_or(error),
        }
    }
}

// -------------------------------------------------------------------------------------------------
// State, and what each mote has acknowledged of it
// -------------------------------------------------------------------------------------------------

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
    /// The first start, Unix seconds: commands written before are not carried out. None once all of
    /// them were fetched.
    ignore_commands_before: Option<i64>,
}

#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct User {
    name: String,
    chat: i64,
}

enum Registration {
    New,
    Known,
    /// There are `USERS_MAX` already.
    Full,
}

impl State {
    /// A damaged file is set aside, for its content may be worth a look, and the gateway must start.
    fn open(path: &Path) -> State {
        let fresh = State {
            ignore_commands_before: Some(unix_now() as i64),
            ..State::default()
        };
        let reason = match fs::read(path).map(|text| serde_json::from_slice(&text)) {
            Ok(Ok(state)) => return state,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return fresh,
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        };
        let aside = beside(path, ".damaged");
        let (file, kept) = (path.display(), aside.display());
        match fs::rename(path, &aside) {
            Ok(()) => error!("cannot read {file}, starting anew; it is kept as {kept}: {reason}"),
            Err(error) => error!("cannot read {file}: {reason}; nor keep it as {kept}: {error}"),
        }
        fresh
    }

    /// The file is the old or the new one after a power cut, too. Readable by its owner alone.
    fn write(&self, path: &Path) -> io::Result<()> {
        let new = beside(path, ".new");
        let mut options = OpenOptions::new();
        let mut file = options
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)?;
        file.write_all(&serde_json::to_vec_pretty(self)?)?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        let folder = path
            .parent()
            .filter(|folder| !folder.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
    }

    fn register(&mut self, chat: i64, name: &str) -> Registration {
        let known = self.users.iter().position(|user| user.chat == chat);
        if known.is_none() && self.users.len() >= USERS_MAX {
            return Registration::Full;
        }
        let others = self.users.iter().filter(|user| user.chat != chat);
        let taken: Vec<&str> = others.map(|user| user.name.as_str()).collect();
        let name = wire_name(name, &taken);
        let Some(at) = known else {
            info!("{name} ({chat}) is registered");
            self.removed.retain(|removed| *removed != chat);
            self.users.push(User { name, chat });
            return Registration::New;
        };
        if self.users[at].name != name {
            info!("{name} ({chat}) is the new name of {}", self.users[at].name);
            self.users[at].name = name;
        }
        Registration::Known
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

    /// All that a mote should know: removals first, which make room in its list. Settings and ten
    /// users are at most 277 bytes; of the removals, the latest that still fit go with them.
    fn tokens(&self) -> String {
        let mut tokens = Vec::new();
        tokens.extend(self.interval.map(|minutes| format!("i{minutes}")));
        tokens.extend(self.feedback.map(|on| format!("f{on}")));
        tokens.extend(
            self.users
                .iter()
                .map(|user| format!("{}:{}", user.name, user.chat)),
        );
        let mut length = tokens.join(";").len();
        for chat in self.removed.iter().rev() {
            let token = format!("r{chat}");
            length += token.len() + 1;
            if length > REPLY_MAX {
                break;
            }
            tokens.insert(0, token);
        }
        tokens.join(";")
    }
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// A chat with one person, whom the firmware can hold and remove: it removes only ids that start
/// with a digit.
fn is_private(chat: &i64) -> bool {
    (1..=CHAT_ID_MAX).contains(chat)
}

/// A name that the firmware neither cuts nor takes for something else, and unlike every one of
/// `taken`, for it looks users up by name first.
fn wire_name(name: &str, taken: &[&str]) -> String {
    let allowed = |c: &char| !c.is_control() && !";:,&=".contains(*c);
    let clean: String = name.chars().filter(allowed).collect();
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
    let end = (0..=end.min(text.len()))
        .rev()
        .find(|end| text.is_char_boundary(*end));
    text[..end.unwrap_or(0)].trim_end()
}

/// What the motes have acknowledged. Forgotten with the process: then they are told everything.
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
    /// Version and time of the last acknowledgement.
    acknowledged: Option<(u64, Instant)>,
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

    /// A mote whose message ID does not go on from its last one has restarted, and knows nothing. A
    /// client with a new port for each request tells nothing by its message IDs.
    fn note_request(&mut self, peer: SocketAddr, message_id: u16) {
        let address = peer.ip().to_canonical();
        let known = self.known.iter().position(|mote| mote.address == address);
        let mut acknowledged = None;
        if let Some(at) = known {
            let mote = self.known.remove(at);
            let step = message_id.wrapping_sub(mote.message_id);
            acknowledged = mote.acknowledged;
            if mote.port == peer.port() && !(1..=MESSAGE_ID_STEP_MAX).contains(&step) {
                info!("{address} has restarted, as its message ID tells: it is told everything");
                acknowledged = None;
            }
        }
        if self.known.len() >= MOTES_MAX {
            self.known.remove(0);
        }
        self.known.push(Mote {
            address,
            port: peer.port(),
            message_id,
            acknowledged,
        });
    }

    fn acknowledge(&mut self, peer: SocketAddr, version: u64, now: Instant) {
        let address = peer.ip().to_canonical();
        if let Some(mote) = self.known.iter_mut().find(|mote| mote.address == address) {
            mote.acknowledged = Some((version, now));
        }
    }

    fn has_acknowledged(&self, peer: SocketAddr, version: u64, now: Instant) -> bool {
        let address = peer.ip().to_canonical();
        let mote = self.known.iter().find(|mote| mote.address == address);
        mote.and_then(|mote| mote.acknowledged)
            .is_some_and(|(acknowledged, at)| {
                acknowledged == version && now.saturating_duration_since(at) < ACKNOWLEDGED_HOLDS
            })
    }
}

// -------------------------------------------------------------------------------------------------
// What people write
// -------------------------------------------------------------------------------------------------

/// Bot API, `Message`: what is needed of it.
#[derive(Deserialize)]
struct Written {
    message_id: i64,
    /// Unix seconds.
    date: i64,
    chat: Chat,
    text: Option<String>,
}

/// Bot API, `Chat`.
#[derive(Deserialize)]
struct Chat {
    id: i64,
    #[serde(rename = "type")]
    kind: String,
    title: Option<String>,
    first_name: Option<String>,
    username: Option<String>,
}

impl Chat {
    fn name(&self) -> &str {
        let names = [&self.first_name, &self.title, &self.username];
        names
            .into_iter()
            .flatten()
            .next()
            .map_or("", String::as_str)
    }
}

/// Whoever writes to the bot.
#[derive(Default)]
struct People {
    /// What is to be said to them, when what it says is saved: one answer for each chat.
    answers: Vec<Answer>,
    suspects: Vec<Suspect>,
}

struct Answer {
    chat: i64,
    texts: Vec<String>,
    /// Messages that held a password.
    delete: Vec<i64>,
}

impl Answer {
    /// Methods of the Bot API with their parameters.
    fn calls(&self) -> Vec<(&'static str, Value)> {
        let mut calls = Vec::new();
        if !self.texts.is_empty() {
            let text: String = self.texts.join("\n\n").chars().take(TEXT_MAX).collect();
            calls.push(("sendMessage", json!({"chat_id": self.chat, "text": text})));
        }
        for message in &self.delete {
            let parameters = json!({"chat_id": self.chat, "message_id": message});
            calls.push(("deleteMessage", parameters));
        }
        calls
    }
}

/// A chat that has tried a wrong password.
struct Suspect {
    chat: i64,
    /// In a row.
    wrong: u32,
    locked_until: Option<Instant>,
}

impl People {
    /// Progress before judgement: an update that cannot be understood must not come back.
    fn take(&mut self, mut update: Value, state: &mut State, password: Option<&Secret>) {
        let Some(id) = update["update_id"].as_i64() else {
            return;
        };
        state.offset = id.saturating_add(1);
        let written = match serde_json::from_value::<Written>(update["message"].take()) {
            Ok(written) => written,
            Err(error) => return info!("update {id} is not understood: {error}"),
        };
        let chat = &written.chat;
        if chat.kind == "private" && is_private(&chat.id) {
            self.take_message(&written, state, password, Instant::now());
        } else {
            info!(
                "chat {} ({}, {}) cannot be registered",
                chat.id,
                chat.kind,
                chat.name()
            );
        }
    }

    /// Carries out a message from a private chat.
    fn take_message(
        &mut self,
        written: &Written,
        state: &mut State,
        password: Option<&Secret>,
        now: Instant,
    ) {
        let chat = written.chat.id;
        let text = written.text.as_deref().unwrap_or_default();
        let lower = text.to_ascii_lowercase();
        let words: Vec<&str> = lower.split_whitespace().collect();
        // Written before the gateway was there: the sender could not know what it does.
        let is_old = state
            .ignore_commands_before
            .is_some_and(|start| written.date < start);
        if words == ["remove", "me"] && !is_old {
            let user = state.remove(chat);
            info!("{user} is removed, as asked");
            return self.answer(chat, REMOVED);
        }
        let registration = state.register(chat, written.chat.name());
        match registration {
            Registration::New => {
                self.answer(chat, "You are registered.");
                self.answer(chat, HELP);
            }
            Registration::Full => self.answer(chat, LIST_IS_FULL),
            Registration::Known => {}
        }
        match words[..] {
            ["config" | "/config", ..] => {
                if !is_old {
                    self.configure(chat, text, state, password, now);
                }
                // Whether right or wrong: a wrong password may be nearly right.
                self.answer_to(chat).delete.push(written.message_id);
            }
            [] => {} // a sticker or the like
            ["help" | "/help" | "/start", ..] => self.answer(chat, HELP),
            _ if matches!(registration, Registration::Known) => {
                self.answer(chat, "I do not understand that.");
                self.answer(chat, HELP);
            }
            _ => {}
        }
    }

    /// Carries out `config …`. Only a complete command is a guess at the password, and nothing is
    /// said about the rest of it unless the password is right.
    fn configure(
        &mut self,
        chat: i64,
        text: &str,
        state: &mut State,
        password: Option<&Secret>,
        now: Instant,
    ) {
        let Some(password) = password else {
            return self.answer(
                chat,
                "No password is set on the gateway, so nothing can be changed.",
            );
        };
        let suspect = self.suspects.iter().find(|suspect| suspect.chat == chat);
        if suspect
            .and_then(|suspect| suspect.locked_until)
            .is_some_and(|until| now < until)
        {
            return;
        }
        let words: Vec<&str> = text.split_whitespace().collect();
        let [_, guess, key, value] = words[..] else {
            return self.answer(chat, CONFIG_FORM);
        };
        if !password.is(guess) {
            return self.suspect(chat, now);
        }
        self.suspects.retain(|suspect| suspect.chat != chat);
        let number = value.parse::<u8>().ok().filter(|_| !value.starts_with('+'));
        let told = match (key.to_ascii_lowercase().as_str(), number) {
            ("interval", Some(minutes @ 1..=120)) => {
                state.interval = Some(minutes);
                info!("interval is set to {minutes} minutes by chat {chat}");
                format!("The interval is set to {minutes} minutes.")
            }
            ("feedback", Some(on @ 0..=1)) => {
                state.feedback = Some(on);
                info!("LED feedback is set to {on} by chat {chat}");
                let state = if on == 1 { "on" } else { "off" };
                format!("The LED feedback is set to {on} ({state}).")
            }
            _ => CONFIG_FORM.to_string(),
        };
        self.answer(chat, &told);
    }

    /// Counts a wrong password.
    fn suspect(&mut self, chat: i64, now: Instant) {
        let known = self
            .suspects
            .iter()
            .position(|suspect| suspect.chat == chat);
        let before = known
            .map(|at| self.suspects.remove(at))
            .filter(|s| s.locked_until.is_none());
        let wrong = 1 + before.map_or(0, |suspect| suspect.wrong);
        if self.suspects.len() >= SUSPECTS_MAX {
            // Those that are not locked out go first.
            let least = |at: &usize| (self.suspects[*at].locked_until, self.suspects[*at].wrong);
            let least = (0..self.suspects.len())
                .min_by_key(least)
                .unwrap_or_default();
            self.suspects.remove(least);
        }
        let is_locked = wrong >= WRONG_PASSWORDS_MAX;
        let locked_until = is_locked.then(|| now + LOCKED_OUT);
        self.suspects.push(Suspect {
            chat,
            wrong,
            locked_until,
        });
        let mut told = "Wrong password. Nothing was changed.".to_string();
        if is_locked {
            told += " Your config messages are ignored for an hour.";
            warn!("wrong password from chat {chat}: its config is ignored for an hour");
        } else {
            warn!("wrong password from chat {chat}");
        }
        self.answer(chat, &told);
    }

    /// Says the same once.
    fn answer(&mut self, chat: i64, text: &str) {
        let answer = self.answer_to(chat);
        if !answer.texts.iter().any(|said| said == text) {
            answer.texts.push(text.to_string());
        }
    }

    fn answer_to(&mut self, chat: i64) -> &mut Answer {
        let known = self.answers.iter().position(|answer| answer.chat == chat);
        let at = known.unwrap_or_else(|| {
            self.answers.push(Answer {
                chat,
                texts: Vec::new(),
                delete: Vec::new(),
            });
            self.answers.len() - 1
        });
        &mut self.answers[at]
    }
}

// -------------------------------------------------------------------------------------------------
// Log, heartbeat, systemd
// -------------------------------------------------------------------------------------------------

/// For the heartbeat, which has a thread of its own: all that threads share.
static FORWARDED: AtomicU64 = AtomicU64::new(0);
static FAILURES: AtomicU64 = AtomicU64::new(0);
static USERS: AtomicU64 = AtomicU64::new(0);

/// simple_logger writes to the console; beside it, the same goes to a file.
struct Log {
    console: simple_logger::SimpleLogger,
    path: PathBuf,
    /// `None`: it cannot be opened.
    file: Mutex<Option<File>>,
}

fn start_log(path: &Path) -> Result<(), String> {
    // Off for the libraries: their records hold URLs, and so the token.
    let console = simple_logger::SimpleLogger::new()
        .with_level(log::LevelFilter::Off)
        .with_module_level("coap_websocket", log::LevelFilter::Info);
    log::set_max_level(console.max_level());
    let file = open_log(path);
    let fault = file.as_ref().err().map(ToString::to_string);
    let log = Log {
        console,
        path: path.to_path_buf(),
        file: Mutex::new(file.ok()),
    };
    log::set_boxed_logger(Box::new(log)).map_err(|error| error.to_string())?;
    if let Some(fault) = fault {
        warn!(
            "cannot open {}, so the log goes to the console alone: {fault}",
            path.display()
        );
    }
    Ok(())
}

fn open_log(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).open(path)
}

impl log::Log for Log {
    fn enabled(&self, metadata: &log::Metadata) -> bool {
        self.console.enabled(metadata)
    }

    fn log(&self, record: &log::Record) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let text = escape(&record.args().to_string());
        let mut escaped = log::Record::builder();
        escaped.metadata(record.metadata().clone());
        self.console
            .log(&escaped.args(format_args!("{text}")).build());

        let line = format!("{} [{}] {text}\n", utc(unix_now()), record.level());
        let mut open = self
            .file
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        let Some(file) = open.as_mut() else { return };
        if file
            .metadata()
            .is_ok_and(|file| file.len() + line.len() as u64 > LOG_MAX)
        {
            let moved = fs::rename(&self.path, beside(&self.path, ".1"));
            let _ = moved.or_else(|_| file.set_len(0));
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
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() || matches!(c, '\u{2028}' | '\u{2029}') {
            escaped.extend(c.escape_default());
        } else {
            escaped.push(c);
        }
    }
    escaped
}

fn unix_now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |age| age.as_secs())
}

/// `2026-01-31 12:00:00` of Unix seconds. Days to a date: H. Hinnant, "chrono-Compatible Low-Level
/// Date Algorithms", `civil_from_days`.
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
    let (hours, minutes, seconds) = (time / 3600, time / 60 % 60, time % 60);
    format!("{year:04}-{month:02}-{day:02} {hours:02}:{minutes:02}:{seconds:02}")
}

fn log_outcome(request: &Request, code: &str, detail: &str) {
    let level = if code.starts_with('5') {
        log::Level::Warn
    } else {
        log::Level::Info
    };
    let (peer, duration) = (request.peer, request.at.elapsed().as_millis());
    let separator = if detail.is_empty() { "" } else { ": " };
    log::log!(
        level,
        "{peer} {request} -> {code} in {duration} ms{separator}{detail}"
    );
}

fn heartbeat() {
    let start = Instant::now();
    loop {
        thread::sleep(HEARTBEAT);
        let minutes = start.elapsed().as_secs() / 60;
        info!(
            "Server is still running: up {} h {} min, {} messages forwarded, {} failures, {} registered users",
            minutes / 60,
            minutes % 60,
            FORWARDED.load(Relaxed),
            FAILURES.load(Relaxed),
            USERS.load(Relaxed),
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
    let _ = address
        .and_then(|address| UnixDatagram::unbound()?.send_to_addr(message.as_bytes(), &address));
}

// -------------------------------------------------------------------------------------------------
// `check` and `send`
// -------------------------------------------------------------------------------------------------

/// Changes nothing: what people wrote is shown, not confirmed.
fn check(config: &Config) -> Result<(), String> {
    for warning in &config.warnings {
        say(&format!("warning: {warning}"));
    }
    let token = config.required_token()?;
    let telegram = Telegram::new(config);
    let deadline = Instant::now() + REQUEST_TIME;
    let explained = |failure: Failure| escape(&failure.reason);
    let me = telegram
        .call(token, "getMe", &json!({}), deadline)
        .map_err(explained)?;
    let name = |key: &str| me[key].as_str().unwrap_or("?");
    say(&escape(&format!(
        "bot: {} (@{})",
        name("first_name"),
        name("username")
    )));

    let path = &config.places.state;
    let state = match fs::read(path).map(|text| serde_json::from_slice::<State>(&text)) {
        Ok(Ok(state)) => state,
        Err(error) if error.kind() == io::ErrorKind::NotFound => State::default(),
        Ok(Err(error)) => return Err(format!("cannot read {}: {error}", path.display())),
        Err(error) => return Err(format!("cannot read {}: {error}", path.display())),
    };
    say("registered users:");
    for user in &state.users {
        say(&format!("  {} {}", user.chat, user.name));
    }
    let updates = telegram
        .get_updates(token, None, deadline)
        .map_err(explained)?;
    let mut chats: Vec<String> = Vec::new();
    for mut update in updates {
        if let Ok(chat) = serde_json::from_value::<Chat>(update["message"]["chat"].take()) {
            let line = escape(&format!("  {} {} ({})", chat.id, chat.name(), chat.kind));
            if !chats.contains(&line) {
                chats.push(line);
            }
        }
    }
    say("chats with a message that no gateway has fetched yet (others: see the log):");
    for line in chats {
        say(&line);
    }
    Ok(())
}

struct SendOptions<'a> {
    chat: &'a str,
    message: &'a str,
    uri: Option<&'a str>,
}

impl SendOptions<'_> {
    fn parse<'a>(words: &[&'a str]) -> Option<SendOptions<'a>> {
        let [mut chat, mut message, mut uri] = [None; 3];
        for pair in words.chunks(2) {
            match *pair {
                ["-i", value] => chat = Some(value),
                ["-m", value] => message = Some(value),
                ["-u", value] if value.starts_with("coap://") => uri = Some(value),
                _ => return None,
            }
        }
        Some(SendOptions {
            chat: chat?,
            message: message?,
            uri,
        })
    }
}

/// One `POST /message` as a mote would send it; to the gateway of this configuration if no URI is
/// given.
fn send(config: &Config, options: &SendOptions) -> Result<(), String> {
    let token = config
        .mote_token
        .as_ref()
        .unwrap_or(config.required_token()?);
    let peer = match options.uri {
        None => config.listen,
        Some(uri) => address_of(uri).ok_or(format!("cannot resolve `{}`", uri.escape_debug()))?,
    };
    let SendOptions { chat, message, .. } = options;
    let payload = format!(
        "url={}&token={}&chat_ids={chat}&text={message}",
        config.url, token.0
    );
    let response = exchange(peer, payload.as_bytes())
        .map_err(|error| format!("cannot reach a gateway at {peer}: {error}"))?
        .ok_or(format!("no answer from {peer}"))?;
    let line = format!(
        "{} {}",
        response.code,
        escape(&String::from_utf8_lossy(&response.payload))
    );
    if !response.code.starts_with('2') {
        return Err(format!("{} (the gateway's log tells why)", line.trim_end()));
    }
    say(&line);
    Ok(())
}

/// Of a URI `coap://host[:port]`.
fn address_of(uri: &str) -> Option<SocketAddr> {
    let host = uri.strip_prefix("coap://")?.trim_end_matches('/');
    let has_port = host.contains(':') && !host.ends_with(']');
    let host = if has_port {
        host.to_string()
    } else {
        format!("{host}:{}", coap::PORT)
    };
    host.to_socket_addrs().ok()?.next()
}

/// A client's side of one exchange, RFC 7252 §4.2. `None`: nobody answers.
fn exchange(peer: SocketAddr, payload: &[u8]) -> io::Result<Option<coap::ClientResponse>> {
    let socket = UdpSocket::bind(if peer.is_ipv4() {
        "0.0.0.0:0"
    } else {
        "[::]:0"
    })?;
    socket.connect(peer)?;
    let request = coap::encode_request("message", payload);
    let mut timeout = coap::ACK_TIMEOUT;
    for _ in 0..=coap::MAX_RETRANSMIT {
        socket.send(&request)?;
        if let Some(response) = next_response(&socket, &request, timeout)? {
            if response.code != coap::EMPTY_CODE {
                return Ok(Some(response));
            }
            // Acknowledged: the gateway answers within 9 s, and on a lossy link again later.
            return next_response(&socket, &request, 2 * REQUEST_TIME);
        }
        timeout *= 2;
    }
    Ok(None)
}

/// The next datagram that belongs to the request; a response is acknowledged. `None`: none in time.
fn next_response(
    socket: &UdpSocket,
    request: &[u8],
    timeout: Duration,
) -> io::Result<Option<coap::ClientResponse>> {
    let end = Instant::now() + timeout;
    let mut buffer = vec![0; coap::DATAGRAM_MAX];
    loop {
        let left = end.saturating_duration_since(Instant::now());
        socket.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        match socket.recv(&mut buffer) {
            Ok(length) => {
                if let Some(response) = coap::decode_response(&buffer[..length], request) {
                    socket.send(&response.acknowledgement)?;
                    return Ok(Some(response));
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        if Instant::now() >= end {
            return Ok(None);
        }
    }
}

// -------------------------------------------------------------------------------------------------
// The CoAP message layer
// -------------------------------------------------------------------------------------------------

/// RFC 7252 and Block1 of RFC 7959: bytes and a time in, bytes out. It sees neither a socket nor a
/// clock.
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

    /// UDP carries no more.
    pub const DATAGRAM_MAX: usize = 1 << 16;
    /// Of a request's payload, bytes: 4,096 characters of 4 bytes, and the rest of the form.
    pub const BODY_MAX: usize = 17 << 10;
    /// Remembered messages: 1,000 motes that all send four in `EXCHANGE_LIFETIME`.
    pub const SEEN_MAX: usize = 4096;
    /// Responses that wait for their ACK; the oldest is given up.
    const OPEN_MAX: usize = 1024;
    /// Block1 assemblies, of `BODY_MAX` each; the oldest is given up.
    pub const ASSEMBLIES_MAX: usize = 32;
    pub const ASSEMBLY_LIFETIME: Duration = Duration::from_secs(60);

    /// RFC 7252 §12.1.1, §12.2 and §12.3.
    pub const GET: u8 = 1;
    pub const POST: u8 = 2;
    pub const EMPTY_CODE: &str = "0.00";
    const URI_HOST: u16 = 3;
    const URI_PORT: u16 = 7;
    const URI_PATH: u16 = 11;
    pub const CONTENT_FORMAT: u16 = 12;
    const URI_QUERY: u16 = 15;
    pub const ACCEPT: u16 = 17;
    pub const BLOCK2: u16 = 23;
    const BLOCK1: u16 = 27;
    const PROXY_URI: u16 = 35;
    const PROXY_SCHEME: u16 = 39;
    const SIZE1: u16 = 60;
    pub const TEXT_PLAIN: u32 = 0;
    pub const LINK_FORMAT: u32 = 40;

    /// Random enough for a message ID and a timeout; each call gives another number.
    fn random() -> u64 {
        RandomState::new().build_hasher().finish()
    }

    /// RFC 7959 §2.2.
    #[derive(Clone, Copy, Debug, PartialEq)]
    pub struct Block {
        pub number: usize,
        more: bool,
        exponent: u8,
    }

    impl Block {
        fn size(self) -> usize {
            16 << self.exponent
        }

        fn value(self) -> Vec<u8> {
            uint((self.number as u32) << 4 | u32::from(self.more) << 3 | u32::from(self.exponent))
        }
    }

    /// RFC 7252 §3.2: no leading zeros.
    fn uint(value: u32) -> Vec<u8> {
        let bytes = value.to_be_bytes();
        bytes.into_iter().skip_while(|byte| *byte == 0).collect()
    }

    /// A request that nobody has acted on.
    pub struct Request {
        pub peer: SocketAddr,
        pub at: Instant,
        pub code: u8,
        pub payload: Vec<u8>,
        /// Of the peer and the whole datagram: a restarted mote uses message IDs again, for other
        /// requests.
        digest: u64,
        packet: Packet,
    }

    /// For the log: method and path. Only the start of a path, up to a colon: somebody may have put
    /// the token there.
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
        pub fn message_id(&self) -> u16 {
            self.packet.header.message_id
        }

        fn is_confirmable(&self) -> bool {
            self.packet.header.get_type() == MessageType::Confirmable
        }

        /// As in a URI: segments joined with `/`, one inside a segment encoded. RFC 7252 §6.5.
        pub fn path(&self) -> String {
            let segments = self
                .packet
                .get_option(URI_PATH.into())
                .into_iter()
                .flatten();
            let segments =
                segments.map(|segment| String::from_utf8_lossy(segment).replace('/', "%2F"));
            segments.collect::<Vec<_>>().join("/")
        }

        /// The first value; none if it is too long for its option, as RFC 7252 §5.4.3 asks of
        /// elective ones.
        pub fn uint(&self, option: u16) -> Option<u32> {
            let value = self.packet.get_first_option(option.into())?;
            let limit = if [BLOCK1, BLOCK2].contains(&option) {
                3
            } else {
                2
            };
            let number = || {
                value
                    .iter()
                    .fold(0, |all, byte| all << 8 | u32::from(*byte))
            };
            (value.len() <= limit).then(number)
        }

        pub fn block(&self, option: u16) -> Result<Option<Block>, Response> {
            let Some(value) = self.uint(option) else {
                return Ok(None);
            };
            let (number, more, exponent) =
                ((value >> 4) as usize, value & 8 != 0, (value & 7) as u8);
            if exponent == 7 {
                return Err(Response::error(
                    ResponseType::BadRequest,
                    "Reserved block size",
                ));
            }
            Ok(Some(Block {
                number,
                more,
                exponent,
            }))
        }

        /// RFC 7252 §5.4: critical options must be known, of a valid length, and not repeated where
        /// they may not be.
        pub fn check_options(&self) -> Result<(), Response> {
            let is_critical = |number: u16| number % 2 == 1;
            for (&number, values) in self
                .packet
                .options()
                .filter(|(number, _)| is_critical(**number))
            {
                let (shortest, longest, repeatable) = match number {
                    URI_HOST | PROXY_SCHEME => (1, 255, false),
                    URI_PORT | ACCEPT => (0, 2, false),
                    URI_PATH | URI_QUERY => (0, 255, true),
                    BLOCK1 | BLOCK2 => (0, 3, false),
                    PROXY_URI => (1, 1034, false),
                    _ => return Err(bad_option(number, "not supported")),
                };
                let fits = values
                    .iter()
                    .all(|value| (shortest..=longest).contains(&value.len()));
                if !fits || (values.len() > 1 && !repeatable) {
                    return Err(bad_option(number, "malformed"));
                }
            }
            let has = |option: u16| self.packet.get_option(option.into()).is_some();
            if has(PROXY_URI) || has(PROXY_SCHEME) {
                return Err(Response::error(
                    ResponseType::ProxyingNotSupported,
                    "This is no proxy",
                ));
            }
            Ok(())
        }
    }

    fn bad_option(number: u16, fault: &str) -> Response {
        Response::error(
            ResponseType::BadOption,
            &format!("Option {number} is {fault}"),
        )
    }

    /// Numbers and values.
    type Options = Vec<(u16, Vec<u8>)>;

    /// A response; message ID, type and token come from the exchange.
    #[derive(Debug)]
    pub struct Response {
        pub code: ResponseType,
        pub payload: Vec<u8>,
        options: Options,
        /// Of the state that it tells; comes back with its ACK.
        pub version: Option<u64>,
    }

    impl Response {
        pub fn content(code: ResponseType, payload: &str, format: u32) -> Response {
            let options = vec![(CONTENT_FORMAT, uint(format))];
            Response {
                code,
                payload: payload.as_bytes().to_vec(),
                options,
                version: None,
            }
        }

        pub fn text(code: ResponseType, payload: &str) -> Response {
            Response::content(code, payload, TEXT_PLAIN)
        }

        pub fn empty(code: ResponseType) -> Response {
            Response::error(code, "")
        }

        /// A diagnostic payload, RFC 7252 §5.5.2. It leaves only inside an ACK, see `encode`.
        pub fn error(code: ResponseType, reason: &str) -> Response {
            Response {
                options: Vec::new(),
                ..Response::text(code, reason)
            }
        }

        /// As in `2.05`.
        pub fn code(&self) -> String {
            MessageClass::Response(self.code).to_string()
        }

        /// What an error says for people.
        pub fn diagnostic(&self) -> String {
            if !self.code.is_error() {
                return String::new();
            }
            String::from_utf8_lossy(&self.payload).into_owned()
        }
    }

    /// What a datagram turned out to be.
    pub enum Event {
        Nothing,
        /// A reset, or the reply to a duplicate.
        Send(Vec<u8>),
        Request(Request),
        /// A response that told a version of the state has arrived.
        Acknowledged(u64),
        /// A response was answered with RST.
        Refused,
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
        peer: SocketAddr,
        message_id: u16,
        bytes: Vec<u8>,
        retransmitted: u32,
        timeout: Duration,
        due: Instant,
        version: Option<u64>,
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
        last_message_id: u16,
        hasher: RandomState,
        /// In the order in which they came.
        seen: VecDeque<Seen>,
        open: VecDeque<Open>,
        assemblies: VecDeque<Assembly>,
    }

    impl Exchanges {
        pub fn new() -> Exchanges {
            Exchanges {
                last_message_id: random() as u16,
                hasher: RandomState::new(),
                seen: VecDeque::new(),
                open: VecDeque::new(),
                assemblies: VecDeque::new(),
            }
        }

        /// Judges a datagram, but remembers nothing: `reply` or `accept` does, when it is acted on.
        pub fn receive(&mut self, now: Instant, peer: SocketAddr, datagram: &[u8]) -> Event {
            if peer.ip().is_unspecified() {
                return Event::Nothing; // firmware: it cannot be answered, and comes again
            }
            let mut packet = match parse(datagram) {
                Ok(packet) => packet,
                Err(Malformed::Reset(reset)) => return Event::Send(reset),
                Err(Malformed::Ignore) => return Event::Nothing,
            };
            let (kind, message_id) = (packet.header.get_type(), packet.header.message_id);
            if matches!(kind, MessageType::Acknowledgement | MessageType::Reset) {
                return self.close(peer, kind, message_id);
            }
            let digest = self.hasher.hash_one((peer, datagram));
            let twin = self
                .seen
                .iter()
                .find(|seen| seen.digest == digest && now < seen.expires);
            if let Some(twin) = twin {
                return Event::Send(twin.reply.clone());
            }
            let (code, payload) = (datagram[1], std::mem::take(&mut packet.payload));
            Event::Request(Request {
                peer,
                at: now,
                code,
                payload,
                digest,
                packet,
            })
        }

        /// An ACK or RST ends the retransmission of a response.
        fn close(&mut self, peer: SocketAddr, kind: MessageType, message_id: u16) -> Event {
            let is_own = |open: &Open| open.peer == peer && open.message_id == message_id;
            let Some(at) = self.open.iter().position(is_own) else {
                return Event::Nothing;
            };
            let version = self.open.remove(at).and_then(|open| open.version);
            match (kind, version) {
                (MessageType::Reset, _) => Event::Refused,
                (_, Some(version)) => Event::Acknowledged(version),
                (_, None) => Event::Nothing,
            }
        }

        /// Answers at once: inside the ACK for CON, with a NON for NON.
        pub fn reply(&mut self, request: &Request, response: Response) -> Vec<u8> {
            if request.is_confirmable() {
                let message_id = request.message_id();
                let bytes = encode(MessageType::Acknowledgement, message_id, request, response);
                self.remember(request, bytes.clone());
                return bytes;
            }
            self.remember(request, Vec::new());
            if response.code == ResponseType::BadOption {
                return Vec::new(); // RFC 7252 §5.4.1: such a NON is rejected, here in silence
            }
            let message_id = self.next_message_id();
            encode(MessageType::NonConfirmable, message_id, request, response)
        }

        /// The empty ACK (for NON, nothing), and the promise of `respond`.
        pub fn accept(&mut self, request: &Request) -> Vec<u8> {
            let acknowledgement = match request.is_confirmable() {
                true => empty(MessageType::Acknowledgement, request.message_id()),
                false => Vec::new(),
            };
            self.remember(request, acknowledgement.clone());
            acknowledgement
        }

        /// The separate response to an accepted request. RFC 7252 §5.2.2.
        pub fn respond(&mut self, now: Instant, request: &Request, response: Response) -> Vec<u8> {
            let (message_id, version) = (self.next_message_id(), response.version);
            if !request.is_confirmable() {
                return encode(MessageType::NonConfirmable, message_id, request, response);
            }
            let bytes = encode(MessageType::Confirmable, message_id, request, response);
            if self.open.len() >= OPEN_MAX {
                self.open.pop_front();
            }
            let spread = ACK_TIMEOUT.as_millis() as u64 * ACK_RANDOM_PERCENT / 100;
            let timeout = ACK_TIMEOUT + Duration::from_millis(random() % (spread + 1));
            self.open.push_back(Open {
                peer: request.peer,
                message_id,
                bytes: bytes.clone(),
                retransmitted: 0,
                timeout,
                due: now + timeout,
                version,
            });
            bytes
        }

        /// What is to be sent again now.
        pub fn retransmissions(&mut self, now: Instant) -> Vec<(SocketAddr, Vec<u8>)> {
            let is_over = |open: &Open| open.due <= now && open.retransmitted >= MAX_RETRANSMIT;
            self.open.retain(|open| !is_over(open));
            let mut again = Vec::new();
            for open in self.open.iter_mut().filter(|open| open.due <= now) {
                again.push((open.peer, open.bytes.clone()));
                open.retransmitted += 1;
                open.timeout *= 2;
                open.due = now + open.timeout;
            }
            again
        }

        /// When the next retransmission is due.
        pub fn next_due(&self) -> Option<Instant> {
            self.open.iter().map(|open| open.due).min()
        }

        /// Whether the request is whole; then it has its whole body. `Err` refuses the block.
        pub fn assemble(&mut self, request: &mut Request) -> Result<bool, Response> {
            let Some(block) = request.block(BLOCK1)? else {
                return if request.payload.len() > BODY_MAX {
                    Err(too_large())
                } else {
                    Ok(true)
                };
            };
            let mut body = self.take_assembly(request, block)?;
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
                return Ok(true);
            }
            if self.assemblies.len() >= ASSEMBLIES_MAX {
                self.assemblies.pop_front();
            }
            let (peer, path, touched) = (request.peer, request.path(), request.at);
            self.assemblies.push_back(Assembly {
                peer,
                path,
                body,
                touched,
            });
            Ok(false)
        }

        /// What has come before this block.
        fn take_assembly(&mut self, request: &Request, block: Block) -> Result<Vec<u8>, Response> {
            let age = |assembly: &Assembly| request.at.saturating_duration_since(assembly.touched);
            self.assemblies
                .retain(|assembly| age(assembly) < ASSEMBLY_LIFETIME);
            let (peer, path) = (request.peer, request.path());
            let is_own = |assembly: &Assembly| assembly.peer == peer && assembly.path == path;
            let known = self.assemblies.iter().position(is_own);
            let known = known.and_then(|at| self.assemblies.remove(at));
            match known {
                _ if block.number == 0 => Ok(Vec::new()),
                Some(known) if known.body.len() == block.number * block.size() => Ok(known.body),
                _ => Err(Response::error(
                    ResponseType::RequestEntityIncomplete,
                    "A block is missing",
                )),
            }
        }

        fn next_message_id(&mut self) -> u16 {
            self.last_message_id = self.last_message_id.wrapping_add(1);
            self.last_message_id
        }

        fn remember(&mut self, request: &Request, reply: Vec<u8>) {
            while self
                .seen
                .front()
                .is_some_and(|seen| seen.expires <= request.at)
            {
                self.seen.pop_front();
            }
            if self.seen.len() >= SEEN_MAX {
                self.seen.pop_front();
            }
            let lifetime = if request.is_confirmable() {
                EXCHANGE_LIFETIME
            } else {
                NON_LIFETIME
            };
            let (digest, expires) = (request.digest, request.at + lifetime);
            self.seen.push_back(Seen {
                digest,
                expires,
                reply,
            });
        }
    }

    fn too_large() -> Response {
        let reason = format!("At most {BODY_MAX} bytes");
        let mut response = Response::error(ResponseType::RequestEntityTooLarge, &reason);
        response.options.push((SIZE1, uint(BODY_MAX as u32)));
        response
    }

    enum Malformed {
        /// With the RST that a CON gets.
        Reset(Vec<u8>),
        Ignore,
    }

    /// RFC 7252 §3, §4.2 and §4.3. The codec is laxer than the RFC, so what it reads must be what it
    /// would write: that leaves no marker without payload, for one.
    fn parse(datagram: &[u8]) -> Result<Packet, Malformed> {
        let [first, code, high, low, ..] = *datagram else {
            return Err(Malformed::Ignore);
        };
        let (version, kind, class) = (first >> 6, first >> 4 & 3, code >> 5);
        if version != 1 {
            return Err(Malformed::Ignore);
        }
        let is_expected = match (kind, class) {
            (2 | 3, 0) => code == 0 && datagram.len() == 4, // an empty ACK or RST
            (0 | 1, 0) => code != 0,                        // a request
            (2, 2 | 4 | 5) => true,                         // a response to nobody's request
            _ => false,
        };
        if is_expected
            && let Ok(packet) = Packet::from_bytes(datagram)
            && packet
                .to_bytes_unlimited()
                .is_ok_and(|bytes| bytes == datagram)
        {
            return Ok(packet);
        }
        let is_confirmable = kind == 0;
        Err(match is_confirmable {
            true => Malformed::Reset(empty(MessageType::Reset, u16::from_be_bytes([high, low]))),
            false => Malformed::Ignore,
        })
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
    fn encode(kind: MessageType, id: u16, request: &Request, mut response: Response) -> Vec<u8> {
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
        let token = request.packet.get_token();
        message(kind, code, id, token, response.options, response.payload)
    }

    fn message(
        kind: MessageType,
        code: MessageClass,
        message_id: u16,
        token: &[u8],
        options: Options,
        payload: Vec<u8>,
    ) -> Vec<u8> {
        let mut packet = Packet::new();
        packet.header.set_version(1);
        packet.header.set_type(kind);
        packet.header.code = code;
        packet.header.message_id = message_id;
        packet.set_token(token.to_vec());
        for (number, value) in options {
            packet.add_option(number.into(), value);
        }
        packet.payload = payload;
        packet.to_bytes_unlimited().unwrap_or_default() // fails only over a size limit
    }

    /// A client's CON `POST`.
    pub fn encode_request(path: &str, payload: &[u8]) -> Vec<u8> {
        let seed = random();
        let options = vec![(URI_PATH, path.as_bytes().to_vec())];
        let token = &seed.to_be_bytes()[..4];
        message(
            MessageType::Confirmable,
            POST.into(),
            seed as u16,
            token,
            options,
            payload.to_vec(),
        )
    }

    /// What a client receives for its request.
    pub struct ClientResponse {
        /// `EMPTY_CODE`: the empty ACK.
        pub code: String,
        pub payload: Vec<u8>,
        /// The ACK to send; empty if none is.
        pub acknowledgement: Vec<u8>,
    }

    /// `None`: the datagram is not for this request.
    pub fn decode_response(datagram: &[u8], request: &[u8]) -> Option<ClientResponse> {
        let own = Packet::from_bytes(request).ok()?;
        let packet = Packet::from_bytes(datagram).ok()?;
        let (kind, message_id) = (packet.header.get_type(), packet.header.message_id);
        let is_own = match packet.header.code {
            MessageClass::Empty => {
                kind == MessageType::Acknowledgement && message_id == own.header.message_id
            }
            _ => packet.get_token() == own.get_token(),
        };
        let acknowledgement = match kind {
            MessageType::Confirmable => empty(MessageType::Acknowledgement, message_id),
            _ => Vec::new(),
        };
        let code = packet.header.get_code();
        is_own.then_some(ClientResponse {
            code,
            payload: packet.payload,
            acknowledgement,
        })
    }
}

#[cfg(any(test, fuzzing))]
#[path = "tests/unit/fuzz.rs"]
pub mod fuzz;
#[cfg(test)]
#[path = "tests/unit/mod.rs"]
mod tests;
