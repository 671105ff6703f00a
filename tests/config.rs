//! Configuration, command line, files, log, and systemd.

mod support;

use std::collections::BTreeSet;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};
use std::{fs, process, thread};

use support::*;

const SENT: &str = "Messages sent successfully";
const NOTHING: &str = "No Updates";
const ADA: i64 = 1_234_567_890;

/// A token that looks right and that no stand-in knows.
fn other_token() -> String {
    TOKEN.replace('a', "b")
}

fn other_bot() -> String {
    format!("9{TOKEN}")
}

// --- where configuration comes from ---

/// Nothing is needed: no file, no environment but the port that the test chose.
#[test]
fn without_any_configuration() {
    let api = BotApi::start();
    let setup = Setup {
        config: None,
        dotenv: None,
        env: Vec::new(),
        ..Setup::new(&api)
    };
    let gateway = Gateway::with(setup);
    let mote = Mote::new(gateway.address());
    // The default url is Telegram's own; others are not served.
    mote.post_piggybacked("message", form("https://localhost/bot", TOKEN, "5", "x"))
        .expect_code("4.03");
    assert!(
        gateway
            .log()
            .lines()
            .any(|line| line.contains("[WARN]") && line.contains("token")),
        "{}",
        gateway.log()
    );
}

/// Without a token in config.ini: /message for any well-formed one, /update for the first bot that Telegram accepts.
#[test]
fn without_a_token() {
    for line in ["", "bot_token =", "bot_token = your_telegram_bot_token"] {
        let api = BotApi::start();
        let mut setup =
            Setup::new(&api).config(&format!("[telegram]\n{line}\nurl = {}\n", api.url()));
        setup.secrets.push(other_token());
        let mut gateway = Gateway::with(setup);
        let mote = Mote::new(gateway.address());
        let warning = |line: &str| line.contains("[WARN]") && line.contains("token");
        assert!(
            gateway.log().lines().any(warning),
            "{line:?}: {}",
            gateway.log()
        );
        let message = |token: &str| mote.post("message", form(&api.url(), token, "5", "x"));
        let update = |token: &str| mote.post("update", format!("url={}&token={token}", api.url()));
        mote.separate(&message(TOKEN)).expect("2.05", SENT);
        mote.separate(&message(&other_token())).expect("5.00", ""); // Telegram does not know it
        for malformed in [
            "nonsense",
            "123456789:",
            ":AAE",
            "12 34:AAEaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
            "1/../2:x",
        ] {
            let code = mote.piggybacked(&message(malformed)).code();
            assert!(code == "4.00" || code == "4.03", "{malformed:?}: {code}");
        }
        mote.separate(&update(&other_token())).expect("5.00", "");
        mote.separate(&update(TOKEN)).expect("2.03", NOTHING);
        mote.piggybacked(&update(&other_bot())).expect_code("4.03");
        gateway.restart();
        mote.piggybacked(&update(&other_bot())).expect_code("4.03");
        mote.separate(&update(TOKEN)).expect("2.03", NOTHING);
    }
}

/// config.ini as people write it.
#[test]
fn config_files() {
    let api = BotApi::start();
    let url = api.url();
    let cases = [
        ("tight", format!("[telegram]\nbot_token={TOKEN}\nurl={url}")),
        (
            "wide",
            format!("\n  [telegram]  \n\n  bot_token   =   {TOKEN}  \n\turl =\t{url}\t\n\n"),
        ),
        (
            "Windows",
            format!("[telegram]\r\nbot_token = {TOKEN}\r\nurl = {url}\r\n"),
        ),
        (
            "comments",
            format!(
                "# one\n; two\n[telegram]\n# three\nurl = {url}\n;bot_token = x\nbot_token = {TOKEN}\n"
            ),
        ),
        (
            "family",
            format!("[telegram]\nip_family = any\nbot_token = {TOKEN}\nurl = {url}\n"),
        ),
        (
            "IPv4",
            format!("[telegram]\nip_family = ipv4\nbot_token = {TOKEN}\nurl = {url}\n"),
        ),
    ];
    let cases: Vec<(&str, &String)> = cases.iter().map(|(name, text)| (*name, text)).collect();
    in_parallel(&cases, |text| {
        let gateway = Gateway::with(Setup::new(&api).config(text));
        let mote = Mote::new(gateway.address());
        mote.post_separate("message", message(&api, "5", "x"))
            .expect("2.05", SENT);
        mote.post_piggybacked("message", form(&api.url(), &other_token(), "5", "x"))
            .expect_code("4.03");
    });
}

#[test]
fn ip_family() {
    let api = BotApi::with(BotApiOptions {
        listen: "[::1]:0".parse().unwrap(),
        ..BotApiOptions::default()
    });
    let url = format!("https://[::1]:{}/bot", api.address().port());
    for (family, code) in [("any", "2.05"), ("ipv6", "2.05"), ("ipv4", "5.00")] {
        let config =
            format!("[telegram]\nbot_token = {TOKEN}\nurl = {url}\nip_family = {family}\n");
        let gateway = Gateway::with(Setup::new(&api).config(&config));
        let mote = Mote::new(gateway.address());
        mote.post_separate("message", form(&url, TOKEN, "5", family))
            .expect_code(code);
    }
    assert_eq!(api.texts_to(5), ["any", "ipv6"]);
}

/// `.env` brings any variable; the real environment wins; values may be quoted.
#[test]
fn environment_files() {
    let api = BotApi::start();
    let ca = api.ca_path().display().to_string();
    let password_is = |setup: Setup, password: &str| {
        let gateway = Gateway::with(setup);
        let mote = Mote::new(gateway.address());
        api.person_writes(ADA, "Ada", &format!("config {password} interval 77"));
        let tokens = poll(&mote, &api);
        assert!(
            tokens.split(';').any(|token| token == "i77"),
            "{password:?}: {tokens}"
        );
    };
    let mut setup = Setup::new(&api).dotenv(&format!(
        "# comment\n\nPASSWORD=in-the-file\nSSL_CERT_FILE={ca}\n"
    ));
    setup.env.clear();
    setup
        .secrets
        .extend(["in-the-file".to_string(), "in-the-environment".to_string()]);
    password_is(setup.clone(), "in-the-file");
    password_is(
        setup.clone().env("PASSWORD", "in-the-environment"),
        "in-the-environment",
    );
    password_is(
        setup.dotenv(&format!(
            "PASSWORD=with=equals#and;more\r\nSSL_CERT_FILE={ca}\r\n"
        )),
        "with=equals#and;more",
    );
}

/// systemd's directories.
#[test]
fn directories() {
    let api = BotApi::start();
    let (credentials, state, logs) = (TempDir::new(), TempDir::new(), TempDir::new());
    let setup = Setup::new(&api);
    fs::write(
        credentials.join("config.ini"),
        setup.config.as_ref().unwrap(),
    )
    .unwrap();
    fs::write(credentials.join("env"), setup.dotenv.as_ref().unwrap()).unwrap();
    let mut setup = setup
        .env("CREDENTIALS_DIRECTORY", credentials.path().display())
        .env("STATE_DIRECTORY", state.path().display())
        .env("LOGS_DIRECTORY", logs.path().display());
    (setup.config, setup.dotenv) = (None, None);
    let gateway = Gateway::with(setup);
    let mote = Mote::new(gateway.address());
    api.person_writes(ADA, "Ada", &format!("config {PASSWORD} interval 5"));
    assert_eq!(poll(&mote, &api), "Ada:1234567890;i5");
    gateway.settle();
    let files = |directory: &std::path::Path| -> BTreeSet<String> {
        fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    };
    assert_eq!(
        files(state.path()),
        ["state.journal".to_string(), "state.json".to_string()].into()
    );
    assert_eq!(files(logs.path()), ["coap_server.log".to_string()].into());
    assert_eq!(
        files(credentials.path()),
        ["config.ini".to_string(), "env".to_string()].into()
    );
    assert_eq!(files(&gateway.directory()), BTreeSet::new());
    let log = fs::read_to_string(logs.join("coap_server.log")).unwrap();
    assert!(
        log.contains("Ada") && !log.contains(PASSWORD) && !log.contains(TOKEN),
        "{log}"
    );
}

/// Bad configuration ends the start: one line, file and number and reason, exit status 1.
#[test]
fn bad_configuration() {
    let api = BotApi::start();
    let good = || Setup::new(&api);
    let config = |text: String| good().config(&text);
    let url = api.url();
    let cases: Vec<(&str, Setup, Vec<&str>)> = vec![
        (
            "no key",
            config("[telegram]\nnonsense\n".into()),
            vec!["config.ini", "2"],
        ),
        (
            "unclosed section",
            config("\n\n[telegram\nurl = x\n".into()),
            vec!["config.ini", "3"],
        ),
        (
            "family",
            config(format!("[telegram]\nurl = {url}\nip_family = ipv5\n")),
            vec!["config.ini:3", "ip_family"],
        ),
        (
            "plain http",
            config("[telegram]\nurl = http://localhost/bot\n".into()),
            vec!["config.ini", "2", "https"],
        ),
        (
            "no url",
            config("[telegram]\nurl = nonsense\n".into()),
            vec!["config.ini", "2"],
        ),
        (
            "token",
            config(format!("[telegram]\n\n\nbot_token = {TOKEN} x\n")),
            vec!["config.ini", "4"],
        ),
        (
            "token without colon",
            config("[telegram]\nbot_token = 123456789\n".into()),
            vec!["config.ini", "2"],
        ),
        (
            ".env",
            good().dotenv(&format!("# x\nPASSWORD {PASSWORD}\n")),
            vec![".env", "2"],
        ),
        (
            ".env port",
            good()
                .without("COAP_SERVER_PORT")
                .dotenv("COAP_SERVER_PORT=70000\n"),
            vec!["COAP_SERVER_PORT", "65535"],
        ),
        (
            "port",
            good().env("COAP_SERVER_PORT", "70000"),
            vec!["COAP_SERVER_PORT", "65535"],
        ),
        (
            "no port",
            good().env("COAP_SERVER_PORT", "coap"),
            vec!["COAP_SERVER_PORT", "coap"],
        ),
        (
            "address",
            good().env("COAP_SERVER_IP", "gateway"),
            vec!["environment", "COAP_SERVER_IP"],
        ),
        (
            "no certificates",
            good().env("SSL_CERT_FILE", "/nowhere/ca.pem"),
            vec!["SSL_CERT_FILE", "/nowhere/ca.pem"],
        ),
        (
            "empty certificates",
            good().env("SSL_CERT_FILE", "/dev/null"),
            vec!["SSL_CERT_FILE", "/dev/null"],
        ),
    ];
    let cases: Vec<(&str, (Setup, Vec<&str>))> = cases
        .into_iter()
        .map(|(name, setup, parts)| (name, (setup, parts)))
        .collect();
    in_parallel(&cases, |(setup, parts)| {
        let finished = setup.run(&[]);
        assert_eq!(finished.code(), Some(1), "{finished:?}");
        let said = finished.stdout.clone() + &finished.stderr;
        assert_eq!(said.lines().count(), 1, "one line: {said:?}");
        assert!(
            parts.iter().all(|part| said.contains(part)),
            "{parts:?} in {said:?}"
        );
        assert!(
            !said.contains(TOKEN) && !said.contains(PASSWORD),
            "{said:?}"
        );
    });
}

/// config.ini that cannot be read is an error, not "no configuration".
#[test]
fn unreadable_configuration() {
    let api = BotApi::start();
    let directory = TempDir::new();
    fs::create_dir(directory.join("config.ini")).unwrap();
    let mut setup = Setup::new(&api).env("CREDENTIALS_DIRECTORY", directory.path().display());
    (setup.config, setup.dotenv) = (None, None);
    let finished = setup.run(&[]);
    assert_eq!(finished.code(), Some(1), "{finished:?}");
    assert!((finished.stdout + &finished.stderr).contains("config.ini"));
}

// --- where it listens ---

/// An address that does not exist yet: said once, tried again, and not the end.
#[test]
fn an_address_that_does_not_exist() {
    let api = BotApi::start();
    let mut setup = Setup::new(&api);
    setup.ip = "2001:db8::1234".to_string();
    let mut gateway = Gateway::stopped(setup);
    gateway.launch();
    gateway.wait_for_log("2001:db8::1234");
    let said = || gateway.log().matches("2001:db8::1234").count();
    let before = said();
    thread::sleep(Duration::from_millis(2500));
    assert_eq!(said(), before, "said once: {}", gateway.log());
    assert!(gateway.log().contains("[WARN]") || gateway.log().contains("[ERROR]"));
    assert!(gateway.is_running());
}

/// A taken port is an operator's mistake: one line.
#[test]
fn a_taken_port() {
    let api = BotApi::start();
    let setup = Setup::new(&api);
    let taken = std::net::UdpSocket::bind("[::1]:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let finished = setup
        .env("COAP_SERVER_PORT", &address["[::1]:".len()..])
        .run(&[]);
    assert_eq!(finished.code(), Some(1), "{finished:?}");
    let said = format!("coap_websocket: cannot bind {address}: ");
    assert!(
        finished.stderr.starts_with(&said) && finished.stderr.lines().count() == 1,
        "{finished:?}"
    );
}

/// A link-local address with its zone, as on the Pi's usb0; where the machine has one.
#[test]
fn a_zone() {
    let addresses = fs::read_to_string("/proc/net/if_inet6").unwrap_or_default();
    let Some(line) = addresses.lines().find(|line| line.starts_with("fe80")) else {
        return;
    };
    let groups: Vec<&str> = (0..8)
        .map(|group| &line[4 * group..4 * group + 4])
        .collect();
    let api = BotApi::start();
    let mut setup = Setup::new(&api);
    setup.ip = format!(
        "{}%{}",
        groups.join(":"),
        line.split_whitespace().last().unwrap()
    );
    let gateway = Gateway::with(setup);
    Mote::new(gateway.address())
        .post_separate("message", message(&api, "5", "x"))
        .expect("2.05", SENT);
}

// --- the command line ---

#[test]
fn arguments() {
    let api = BotApi::start();
    let setup = Setup::new(&api);
    let help = setup.run(&["--help"]);
    assert_eq!(help.code(), Some(0));
    for part in ["check", "send", "--help", "--version"] {
        assert!(help.stdout.contains(part), "{part}: {}", help.stdout);
    }
    let version = setup.run(&["--version"]);
    assert_eq!(
        (
            version.code(),
            version.stdout.contains(env!("CARGO_PKG_VERSION"))
        ),
        (Some(0), true),
        "{version:?}"
    );
    for wrong in [
        &["--nonsense"][..],
        &["serve"],
        &[""],
        &["check", "more"],
        &["--help", "more"],
        &["send"],
        &["send", "-i", "5"],
        &["send", "-m", "x"],
        &["send", "-i"],
        &["send", "-i", "5", "-m", "x", "-u", "http://localhost"],
        &["send", "-i", "5", "-m", "x", "--nonsense"],
    ] {
        let finished = setup.run(wrong);
        assert_eq!(finished.code(), Some(2), "{wrong:?}: {finished:?}");
        assert!(
            finished.stderr.to_lowercase().contains("usage"),
            "{wrong:?}: {finished:?}"
        );
        assert_eq!(finished.stdout, "", "{wrong:?}");
    }
}

/// `check`: the bot, the users, the chats that have written; without taking anything from the running gateway.
#[test]
fn check() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    api.person_writes(ADA, "Ada", "hi");
    assert_eq!(poll(&mote, &api), "Ada:1234567890");
    api.person_writes(2_345_678_901, "Bob", "hello");
    let checked = gateway.run(&["check"]);
    assert_eq!(checked.code(), Some(0), "{checked:?}");
    for part in ["riot_mote_bot", "Ada", "1234567890", "Bob", "2345678901"] {
        assert!(
            checked.stdout.contains(part),
            "{part} in {}",
            checked.stdout
        );
    }
    assert!(
        !checked.stdout.contains(TOKEN) && !checked.stdout.contains(PASSWORD),
        "{}",
        checked.stdout
    );
    assert_eq!(poll(&mote, &api), "Bob:2345678901", "still there");
    gateway.settle();
    let state = gateway.state();
    assert_eq!(gateway.run(&["check"]).code(), Some(0));
    assert_eq!(gateway.state(), state);
}

#[test]
fn check_that_fails() {
    type Break = fn(&BotApi);
    let cases: [(&str, (Break, &str)); 5] = [
        (
            "401",
            (
                |api| api.fail(every(""), Fault::error(401, "Unauthorized")),
                "Unauthorized",
            ),
        ),
        ("refused", (|api| api.refuse(), "efused")),
        (
            "certificate",
            (|api| api.show(Certificate::OtherAuthority), "certificate"),
        ),
        (
            "no JSON",
            (
                |api| api.fail(every(""), Fault::Answer(200, "hello".into())),
                "",
            ),
        ),
        ("hang", (|api| api.fail(every(""), Fault::Hang), "time")),
    ];
    in_parallel(&cases, |(break_it, part)| {
        let api = BotApi::start();
        break_it(&api);
        let finished = Setup::new(&api).run(&["check"]);
        assert_eq!(finished.code(), Some(1), "{finished:?}");
        let said = finished.stdout + &finished.stderr;
        assert!(said.contains(part) && !said.contains(TOKEN), "{said}");
    });
    let api = BotApi::start();
    let finished = Setup::new(&api)
        .config(&format!("[telegram]\nurl = {}\n", api.url()))
        .run(&["check"]);
    assert_eq!(finished.code(), Some(1), "no token: {finished:?}");
}

/// `send` is a mote: one POST /message, and what it was answered.
#[test]
fn send() {
    let (api, gateway) = start();
    let url = format!("coap://[::1]:{}", gateway.address().port());
    let finished = gateway.run(&["send", "-i", "5", "-m", "hello & welcome", "-u", &url]);
    assert_eq!(finished.code(), Some(0), "{finished:?}");
    assert!(
        finished.stdout.contains("2.05") && finished.stdout.contains(SENT),
        "{finished:?}"
    );
    assert_eq!(api.texts_to(5), ["hello & welcome"]);
    // Without -u: to the gateway that this configuration describes.
    assert_eq!(
        gateway.run(&["send", "-m", "again", "-i", "5,6"]).code(),
        Some(0)
    );
    assert_eq!(api.texts_to(6), ["again"]);
    // Longer than one datagram should be.
    let long = "0123456789".repeat(150);
    assert_eq!(
        gateway.run(&["send", "-i", "7", "-m", &long]).code(),
        Some(0)
    );
    assert_eq!(api.texts_to(7), [long]);
    // Refused by Telegram; refused by the gateway.
    api.unknown_chat(8);
    for (chat, code) in [("8", "5.00"), ("Ada", "4.00")] {
        let finished = gateway.run(&["send", "-i", chat, "-m", "x"]);
        assert_eq!(finished.code(), Some(1), "{finished:?}");
        assert!(
            (finished.stdout.clone() + &finished.stderr).contains(code),
            "{finished:?}"
        );
        assert!(!(finished.stdout + &finished.stderr).contains(TOKEN));
    }
}

/// Nobody there: said so, within a few seconds.
#[test]
fn send_to_nobody() {
    let api = BotApi::start();
    let start = Instant::now();
    let url = format!("coap://[::1]:{}", free_udp_port());
    let finished = Setup::new(&api).run(&["send", "-i", "5", "-m", "x", "-u", &url]);
    assert_eq!(finished.code(), Some(1), "{finished:?}");
    assert!(
        !finished.stderr.is_empty() && start.elapsed() < Duration::from_secs(15),
        "{:?}",
        start.elapsed()
    );
}

// --- the log ---

#[test]
fn the_log() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    mote.post_separate("message", message(&api, "5", "x"))
        .expect("2.05", SENT);
    mote.post_separate("update", update(&api))
        .expect("2.03", NOTHING);
    mote.post_piggybacked("message", "nonsense")
        .expect_code("4.00");
    let peer = mote.socket.local_addr().unwrap();
    for (resource, outcome) in [
        ("/message", "2.05"),
        ("/update", "2.03"),
        ("/message", "4.00"),
    ] {
        let said = |line: &str| {
            [resource, outcome, &peer.to_string()]
                .iter()
                .all(|part| line.contains(part))
        };
        let found = within(Duration::from_secs(2), || gateway.log().lines().any(said));
        assert!(
            found,
            "{resource} {outcome} of {peer} in:\n{}",
            gateway.log()
        );
    }
    let duration = |line: &str| {
        line.contains("2.05")
            && (line.contains(" ms") || line.contains("ms ") || line.contains(" s"))
    };
    assert!(gateway.log().lines().any(duration), "{}", gateway.log());
    // The console shows the same.
    let on_console = gateway.output();
    for line in gateway.log().lines() {
        assert!(on_console.contains(line), "{line} in:\n{on_console}");
    }
    let timed = |line: &str| {
        let shape: String = line
            .chars()
            .map(|c| if c.is_ascii_digit() { '0' } else { c })
            .take(21)
            .collect();
        shape == "0000-00-00 00:00:00 ["
    };
    assert!(gateway.log().lines().all(timed), "{}", gateway.log());
}

#[test]
fn log_levels() {
    let api = BotApi::start();
    let cases = [
        ("trace", true, true),
        ("debug", true, true),
        ("info", true, true),
        ("warn", false, true),
        ("off", false, false),
    ];
    let cases = cases.map(|(level, info, warn)| (level, (level, info, warn)));
    in_parallel(&cases, |(level, info, warn)| {
        let gateway = Gateway::with(Setup::new(&api).env("RUST_LOG", level));
        let mote = Mote::new(gateway.address());
        mote.post_separate("message", message(&api, "5", "x"))
            .expect("2.05", SENT);
        api.unknown_chat(404);
        mote.post_separate("message", message(&api, "404", "x"))
            .expect("5.00", "");
        thread::sleep(QUIET);
        let log = gateway.log();
        assert_eq!(log.contains("[INFO]"), *info, "{log}");
        assert_eq!(
            log.contains("[WARN]") || log.contains("[ERROR]"),
            *warn,
            "{log}"
        );
        assert!(
            !log.contains("[TRACE]") && !log.contains("rustls") && !log.contains("ureq"),
            "{log}"
        );
    });
}

/// At 1 MiB the log is moved to coap_server.log.1.
#[test]
fn log_rotation() {
    let api = BotApi::start();
    let old = "2026-01-31 12:00:00 [INFO] old\n".repeat((1 << 20) / 31 - 10);
    let gateway = Gateway::prepared(Setup::new(&api), |directory| {
        fs::write(directory.join("coap_server.log"), &old).unwrap();
        fs::write(directory.join("coap_server.log.1"), "older\n").unwrap();
    });
    let mote = Mote::new(gateway.address());
    for _ in 0..100 {
        mote.post_piggybacked("message", "nonsense")
            .expect_code("4.00");
    }
    assert!(
        within(Duration::from_secs(2), || gateway.log().len() < 100_000),
        "{} bytes",
        gateway.log().len()
    );
    let moved = gateway.file("coap_server.log.1");
    assert!(
        moved.starts_with(&old) && moved.len() <= (1 << 20) + 1000,
        "{} bytes",
        moved.len()
    );
    assert!(!gateway.log().is_empty() && !gateway.log().contains(" old"));
}

/// A log file that cannot be written does not end the service; the console still has it.
#[test]
fn no_place_for_the_log() {
    let api = BotApi::start();
    let gateway = Gateway::with(Setup::new(&api).env("LOGS_DIRECTORY", "/nowhere"));
    let mote = Mote::new(gateway.address());
    mote.post_separate("message", message(&api, "5", "x"))
        .expect("2.05", SENT);
    assert!(gateway.output().contains("[INFO]"), "{}", gateway.output());
}

// --- systemd ---

/// What the service manager hears until `limit`, or until `done` says so.
fn notifications(socket: &UnixDatagram, limit: Duration, done: impl Fn(&str) -> bool) -> String {
    let end = Instant::now() + limit;
    let mut all = String::new();
    while let Some(left) = end
        .checked_duration_since(Instant::now())
        .filter(|left| !left.is_zero())
    {
        socket.set_read_timeout(Some(left)).unwrap();
        let mut buffer = [0; 4096];
        if let Ok(length) = socket.recv(&mut buffer) {
            all += &String::from_utf8_lossy(&buffer[..length]);
            all += "\n";
        }
        if done(&all) {
            break;
        }
    }
    all
}

#[test]
fn notifications_to_systemd() {
    let api = BotApi::start();
    let directory = TempDir::new();
    let path = directory.join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    let setup = Setup::new(&api)
        .env("NOTIFY_SOCKET", path.display())
        .env("WATCHDOG_USEC", 4_000_000);
    let gateway = Gateway::with(setup);
    let limit = Duration::from_secs(5);
    let told = notifications(&socket, limit, |all| {
        all.contains("READY=1") && all.contains("STATUS=")
    });
    assert!(told.lines().any(|line| line == "READY=1"), "{told:?}");
    assert!(
        told.lines()
            .any(|line| line.starts_with("STATUS=") && line.len() > 10),
        "{told:?}"
    );
    // The watchdog is fed in time, also while Telegram hangs.
    api.fail(every(""), Fault::Hang);
    let mote = Mote::new(gateway.address());
    mote.begin(&mote.post("message", message(&api, "5", "x")));
    for _ in 0..2 {
        let fed = notifications(&socket, Duration::from_secs(4), |all| {
            all.contains("WATCHDOG=1")
        });
        assert!(fed.lines().any(|line| line == "WATCHDOG=1"), "{fed:?}");
    }
}

#[test]
fn abstract_notify_socket() {
    let api = BotApi::start();
    let name = format!("coap_websocket-{}", process::id());
    let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    let _gateway = Gateway::with(Setup::new(&api).env("NOTIFY_SOCKET", format!("@{name}")));
    let told = notifications(&socket, Duration::from_secs(5), |all| {
        all.contains("READY=1")
    });
    assert!(told.contains("READY=1"), "{told:?}");
}

/// Ready once the configuration is read, even if the address is still missing; never with a bad configuration.
#[test]
fn ready_without_an_address() {
    let api = BotApi::start();
    let directory = TempDir::new();
    let path = directory.join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    let mut setup = Setup::new(&api)
        .env("NOTIFY_SOCKET", path.display())
        .env("WATCHDOG_USEC", 2_000_000);
    setup.ip = "2001:db8::1234".to_string();
    let bad = setup.clone().config("nonsense").run(&[]);
    assert_eq!(bad.code(), Some(1));
    assert!(!notifications(&socket, QUIET, |_| false).contains("READY"));
    let mut gateway = Gateway::stopped(setup);
    gateway.launch();
    let all = |all: &str| {
        all.contains("READY=1") && all.contains("WATCHDOG=1") && all.contains("2001:db8::1234")
    };
    let told = notifications(&socket, Duration::from_secs(5), all);
    assert!(
        all(&told),
        "ready, alive, and the status names the address: {told:?}"
    );
}

// --- footprint ---

/// An idle gateway wakes at most once a second.
#[test]
fn idle() {
    let (_api, gateway) = start();
    thread::sleep(Duration::from_millis(500));
    let switches = || -> u64 {
        let tasks = fs::read_dir(format!("/proc/{}/task", gateway.pid())).unwrap();
        let status =
            tasks.map(|task| fs::read_to_string(task.unwrap().path().join("status")).unwrap());
        let lines = status.map(|status| {
            let line = status
                .lines()
                .find(|line| line.starts_with("voluntary"))
                .map(str::to_string);
            line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok())
                .unwrap_or(0)
        });
        lines.sum()
    };
    let before = switches();
    thread::sleep(Duration::from_secs(3));
    let woken = switches() - before;
    assert!(woken <= 5, "{woken} times in 3 s");
    assert!(gateway.threads() <= 3, "{} threads", gateway.threads());
}

/// A gateway that starts with a full disk forwards what it can: the state can be read, and nothing has changed.
#[test]
fn a_full_disk() {
    let api = BotApi::start();
    let mut gateway = Gateway::start(&api);
    gateway.settle();
    gateway.kill9();
    fs::remove_file(gateway.directory().join("state.json")).unwrap();
    std::os::unix::fs::symlink("/dev/full", gateway.directory().join("state.new")).unwrap();
    gateway.restart();
    let mote = Mote::new(gateway.address());
    mote.post_separate("message", message(&api, "5", "x"))
        .expect_code("2.05");
    api.person_writes(ADA, "Ada", "hi");
    mote.post_separate("update", update(&api))
        .expect("5.00", "");
    assert_eq!(
        api.waiting_updates(),
        1,
        "confirmed although it was not saved"
    );
    let log = gateway.log();
    assert!(
        log.contains("[ERROR] cannot write state.json: No space left on device"),
        "{log}"
    );
}

/// A log that cannot be moved begins anew.
#[test]
fn a_log_that_cannot_be_moved() {
    let api = BotApi::start();
    let gateway = Gateway::prepared(Setup::new(&api), |directory| {
        fs::create_dir_all(directory.join("coap_server.log.1/x")).unwrap();
        fs::write(directory.join("coap_server.log"), vec![b'x'; 1 << 20]).unwrap();
    });
    let mote = Mote::new(gateway.address());
    (0..50).for_each(|_| drop(mote.post_piggybacked("nowhere", "x")));
    let length = fs::metadata(gateway.directory().join("coap_server.log"))
        .unwrap()
        .len();
    assert!((100..100_000).contains(&length), "{length} bytes");
}
