//! Configuration, command line, files, log, and systemd.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::net::{Ipv6Addr, SocketAddr, UdpSocket};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{self, UnixDatagram};
use std::path::Path;
use std::process::{self, Command};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use crate::support::*;
use serde_json::json;

/// A token that looks right and that no stand-in knows.
fn other_token() -> String {
    TOKEN.replace('a', "b")
}

fn has_line(text: &str, words: &[&str]) -> bool {
    text.lines()
        .any(|line| words.iter().all(|word| line.contains(word)))
}

fn mount(arguments: &[&str]) {
    let status = Command::new("mount").args(arguments).status();
    assert!(status.unwrap().success(), "mount {arguments:?}");
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
    for word in ["token", "PASSWORD"] {
        assert!(has_line(&gateway.log(), &["[WARN]", word]), "{word}");
    }
}

/// Without a token in config.ini: /message for any well-formed one, /update for the first bot that Telegram accepts.
#[test]
fn without_a_token() {
    let cases = [
        ("none", ""),
        ("empty", "bot_token ="),
        ("placeholder", "bot_token = your_telegram_bot_token"),
    ];
    in_parallel(&cases, |line| {
        let api = BotApi::start();
        let config = format!("[telegram]\n{line}\nurl = {}\n", api.url());
        let mut setup = Setup::new(&api).config(&config);
        setup.secrets.push(other_token());
        let mut gateway = Gateway::with(setup);
        let mote = Mote::new(gateway.address());
        assert!(has_line(&gateway.log(), &["[WARN]", "token"]));
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
        let other_bot = format!("9{TOKEN}");
        mote.separate(&update(&other_token())).expect("5.00", "");
        mote.separate(&update(TOKEN)).expect("2.03", NOTHING);
        mote.piggybacked(&update(&other_bot)).expect_code("4.03");
        api.push_update(json!({})); // or Telegram holds the new life's first fetch for 3 s
        gateway.restart();
        mote.piggybacked(&update(&other_bot)).expect_code("4.03");
        mote.separate(&update(TOKEN)).expect("2.03", NOTHING);
    });
}

/// A mote with a wrong token, or one of another bot, keeps nobody from being heard, and removes nobody.
#[test]
fn other_tokens_without_one() {
    let api = BotApi::start();
    let config = format!("[telegram]\nurl = {}\n", api.url());
    let mut setup = Setup::new(&api).config(&config);
    let other_key = format!("{TOKEN}x");
    let other_bot = format!("9{TOKEN}");
    setup.secrets.extend([other_key.clone(), other_bot.clone()]);
    let gateway = Gateway::with(setup);
    let mote = Mote::new(gateway.address());
    api.person_writes(ADA, "Ada", "hi");
    assert_eq!(hear(&mote, &api), ADA_TOKEN);

    let fault = Fault::error(
        403,
        "Forbidden: bot can't initiate conversation with a user",
    );
    api.fail(next(1, "sendMessage").saying("of another bot"), fault);
    let of_another = form(&api.url(), &other_bot, &ADA.to_string(), "of another bot");
    mote.post_separate("message", of_another).expect("5.00", "");
    mote.post_separate("message", message(&api, &ADA.to_string(), "of ours"));
    assert!(api.texts_to(ADA).contains(&"of ours".to_string()));

    api.person_writes(ADA, "Ada", "help");
    let start = Instant::now();
    while api.waiting_updates() > 0 {
        assert!(start.elapsed() < Duration::from_secs(20), "not heard");
        mote.post_separate("update", format!("url={}&token={other_key}", api.url()))
            .expect("5.00", "");
        thread::sleep(Duration::from_millis(500));
    }
    assert!(!gateway.log().contains("cannot fetch"));
}

/// Motes may present a word in place of the token, which Telegram never sees and nobody reads in the log.
#[test]
fn mote_token() {
    let api = BotApi::start();
    let config = |word: &str| {
        let text = format!("[telegram]\nbot_token = {TOKEN}\nurl = {}\n", api.url());
        Setup::new(&api).config(&format!("{text}mote_token = {word}\n"))
    };
    let longest = "x=;ü".repeat(9) + "abcd"; // 49 bytes
    for word in ["sesame-open", &longest] {
        let mut setup = config(word);
        setup.secrets.push(word.to_string());
        let gateway = start_with(&api, setup);
        let mote = Mote::new(gateway.address());
        for token in [word, TOKEN] {
            mote.post_separate("message", form(&api.url(), token, "5", "x"))
                .expect("2.05", SENT);
            let poll = format!("url={}&token={token}", api.url());
            mote.post_separate("update", poll).expect("2.03", NOTHING);
        }
        for other in [&word[1..], &word.to_uppercase(), &format!("{word}x"), "x"] {
            mote.post_piggybacked("message", form(&api.url(), other, "5", "x"))
                .expect_code("4.03");
            mote.post_piggybacked("update", format!("url={}&token={other}", api.url()))
                .expect_code("4.03");
        }
        assert_eq!(gateway.run(&["send", "-i", "6", "-m", "x"]).code(), Some(0));
        assert_eq!(gateway.run(&["check"]).code(), Some(0));
    }
    assert!(api.seen().calls.iter().all(|call| call.token == TOKEN));
}

/// config.ini as people write it.
#[test]
fn config_files() {
    let cases = [
        ("tight", "[telegram]\nbot_token={T}\nurl={U}"),
        (
            "wide",
            "\n  [telegram]  \n\n  bot_token   =   {T}  \n\turl =\t{U}\t\n\n",
        ),
        ("Windows", "[telegram]\r\nbot_token = {T}\r\nurl = {U}\r\n"),
        (
            "comments",
            "# one\n; two\n[telegram]\n# three\nurl = {U}\n;bot_token = x\nbot_token = {T}\n",
        ),
        (
            "IPv4",
            "[telegram]\nip_family = ipv4\nbot_token = {T}\nurl = {U}\n",
        ),
    ];
    in_parallel(&cases, |text| {
        let api = BotApi::start();
        let url = api.url();
        let text = text.replace("{T}", TOKEN).replace("{U}", &url);
        let gateway = Gateway::with(Setup::new(&api).config(&text));
        let mote = Mote::new(gateway.address());
        mote.post_separate("message", message(&api, "5", "x"))
            .expect("2.05", SENT);
        mote.post_piggybacked("message", form(&url, &other_token(), "5", "x"))
            .expect_code("4.03");
    });
}

#[test]
fn ip_family() {
    if !has_ipv6(ip_family) {
        return;
    }
    let api = BotApi::with(BotApiOptions {
        listen: "[::1]:0".parse().unwrap(),
        ..BotApiOptions::default()
    });
    let url = format!("https://[::1]:{}/bot", api.address().port());
    for (family, code) in [("any", "2.05"), ("ipv6", "2.05"), ("ipv4", "5.00")] {
        let config =
            format!("[telegram]\nbot_token = {TOKEN}\nurl = {url}\nip_family = {family}\n");
        let gateway = start_with(&api, Setup::new(&api).config(&config));
        let mote = Mote::new(gateway.address());
        mote.post_separate("message", form(&url, TOKEN, "5", family))
            .expect_code(code);
    }
    assert_eq!(api.texts_to(5), ["any", "ipv6"]);
}

/// Whoever answers `send` may say what it was sent.
#[test]
fn send_to_an_echo() {
    let api = BotApi::start();
    let echo = UdpSocket::bind("127.0.0.1:0").unwrap();
    let uri = format!("coap://{}", echo.local_addr().unwrap());
    thread::spawn(move || {
        let mut datagram = [0; 2048];
        let (length, peer) = echo.recv_from(&mut datagram).unwrap();
        echo.send_to(&datagram[..length], peer).unwrap();
    });
    let finished = Setup::new(&api).run(&["send", "-i", "5", "-m", "x", "-u", &uri]);
    assert!(finished.stderr.contains("<token>"), "{finished:?}");
    assert!(!format!("{finished:?}").contains(TOKEN), "{finished:?}");
}

/// `.env` brings any variable; the real environment wins.
#[test]
fn environment_files() {
    let ada_writes = |setup: Setup, api: &BotApi, password: &str| {
        api.person_writes(ADA, "Ada", &format!("config {password} interval 77"));
        let gateway = start_with(api, setup);
        let tokens = poll(&Mote::new(gateway.address()), api);
        assert_eq!(tokens, format!("i77;{ADA_TOKEN}"), "{password:?}");
    };
    let (file, environment) = ("in-the-file", "in-the-environment");
    let cases = [
        ("file", ("# comment\n\nPASSWORD=in-the-file\n{C}\n", file)),
        ("environment", ("PASSWORD=not one word\n{C}\n", environment)),
        ("Windows", ("PASSWORD=a=b#c;d\r\n{C}\r\n", "a=b#c;d")),
    ];
    in_parallel(&cases, |(text, password)| {
        let api = BotApi::start();
        let pem = fs::read_to_string(api.ca_path()).unwrap();
        fs::write(api.ca_path(), format!("\u{feff}{pem}")).unwrap(); // as an editor on Windows saves it
        let certificates = format!("SSL_CERT_FILE={}", api.ca_path().display());
        let mut setup = Setup::new(&api).dotenv(&text.replace("{C}", &certificates));
        setup.env.clear();
        setup.secrets.push(password.to_string());
        if *password == environment {
            setup = setup.env("PASSWORD", environment);
        }
        ada_writes(setup, &api, password);
    });
}

/// What cannot be read is not taken for unset.
#[test]
fn a_variable_that_is_no_text() {
    let directory = TempDir::new();
    let mut command = Command::new(binary());
    command.current_dir(directory.path()).env_clear();
    command.env("PASSWORD", OsStr::from_bytes(b"gehe\xff"));
    let output = command.args(["check", "--settings"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    let expected = "coap_websocket: environment: PASSWORD is not UTF-8 text\n";
    assert_eq!(said, expected);
}

/// A proxy's 403 is not Telegram's: nobody is removed because of it.
#[test]
fn a_proxy_that_refuses() {
    let api = BotApi::start();
    let proxy = Proxy::start("elsewhere:443", api.address());
    let gateway = Gateway::with(Setup::new(&api).env("HTTPS_PROXY", proxy.url()));
    Mote::new(gateway.address())
        .post_separate("message", message(&api, "1234567890", "x"))
        .expect("5.00", "");
    assert!(!proxy.asked().is_empty());
    assert!(!gateway.state().contains("1234567890"));
}

fn files(directory: &Path) -> BTreeSet<String> {
    fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| name.to_string()).collect()
}

/// systemd's directories.
#[test]
fn directories() {
    let api = BotApi::start();
    let (credentials, state, logs) = (TempDir::new(), TempDir::new(), TempDir::new());
    let mut setup = Setup::new(&api)
        .env("CREDENTIALS_DIRECTORY", credentials.path().display())
        .env("STATE_DIRECTORY", state.path().display())
        .env("LOGS_DIRECTORY", logs.path().display());
    for (name, text) in [
        ("config.ini", setup.config.take()),
        ("env", setup.dotenv.take()),
    ] {
        fs::write(credentials.join(name), text.unwrap()).unwrap();
    }
    api.person_writes(ADA, "Ada", &format!("config {PASSWORD} interval 5"));
    let gateway = start_with(&api, setup);
    let mote = Mote::new(gateway.address());
    assert_eq!(poll(&mote, &api), format!("i5;{ADA_TOKEN}"));
    assert_eq!(files(state.path()), set(&["state.json"]));
    assert_eq!(files(logs.path()), set(&["coap_server.log"]));
    assert_eq!(files(credentials.path()), set(&["config.ini", "env"]));
    assert_eq!(files(&gateway.directory()), set(&[]));
    let log = fs::read_to_string(logs.join("coap_server.log")).unwrap();
    assert!(log.contains("Ada") && !log.contains(PASSWORD) && !log.contains(TOKEN));
}

/// Empty /etc, /var/lib and /var/log, as this process and its children see them.
fn empty_system(etc: &TempDir) {
    for name in ["hosts", "nsswitch.conf"] {
        let _ = fs::copy(Path::new("/etc").join(name), etc.join(name));
    }
    mount(&["--bind", &etc.path().display().to_string(), "/etc"]);
    for place in ["/var/lib", "/var/log"] {
        mount(&["-t", "tmpfs", "tmpfs", place]);
    }
}

/// An installed Pi: without a config.ini or .env here, those in /etc/coap_websocket count, for every command.
#[test]
fn installed() {
    if !in_namespaces(installed) {
        return;
    }
    let (api, etc) = (BotApi::start(), TempDir::new());
    empty_system(&etc);
    let mut setup = Setup::new(&api);
    let (config, dotenv) = (setup.config.take().unwrap(), setup.dotenv.take().unwrap());
    // Nothing here and nothing there: what was looked for is named.
    let checked = setup.run(&["check"]);
    assert_eq!(checked.code(), Some(1), "{checked:?}");
    assert!(checked.stderr.contains("config.ini"), "{checked:?}");
    for place in ["/etc", "/var/lib", "/var/log"] {
        fs::create_dir(format!("{place}/coap_websocket")).unwrap();
    }
    fs::write("/etc/coap_websocket/config.ini", &config).unwrap();
    fs::write("/etc/coap_websocket/.env", dotenv).unwrap();
    api.person_writes(ADA, "Ada", &format!("config {PASSWORD} interval 5"));
    let of_systemd = setup
        .clone()
        .env("STATE_DIRECTORY", "/var/lib/coap_websocket");
    let gateway = start_with(&api, of_systemd);
    let told = poll(&Mote::new(gateway.address()), &api);
    assert_eq!(told, format!("i5;{ADA_TOKEN}"));
    assert_eq!(files(&gateway.directory()), set(&[]));
    assert_eq!(
        files("/var/lib/coap_websocket".as_ref()),
        set(&["state.json"])
    );
    let log = fs::read_to_string("/var/log/coap_websocket/coap_server.log").unwrap();
    assert!(log.contains("Ada"), "{log}");
    let checked = setup.run(&["check"]);
    assert_eq!(checked.code(), Some(0), "{checked:?}");
    assert!(checked.stdout.contains("riot_mote_bot") && checked.stdout.contains("Ada"));
    let to = format!("coap://{}", gateway.address());
    let sent = setup.run(&["send", "-i", "5", "-m", "from anywhere", "-u", &to]);
    assert_eq!(sent.code(), Some(0), "{sent:?}");
    // Mistakes in these files are named with their place.
    fs::write("/etc/coap_websocket/config.ini", "nonsense").unwrap();
    let bad = setup.run(&["check"]);
    assert_eq!(bad.code(), Some(1), "{bad:?}");
    assert!(
        bad.stderr.contains("/etc/coap_websocket/config.ini:1"),
        "{bad:?}"
    );
    // A file here counts more than those.
    let checked = setup.config(&config).run(&["check"]);
    assert_eq!(checked.code(), Some(0), "{checked:?}");
    let (users, _) = checked.stdout.split_once("chats").unwrap();
    assert!(!users.contains("Ada"), "{checked:?}");
}

/// The section of config.ini, all of a file, or a variable; its text, with `¶` for the end of a line; and what the
/// reason names.
const MISTAKES: &str = "
telegram         | nonsense                         | config.ini:2
config.ini       | ¶¶[telegram¶url = x¶             | config.ini:3
telegram         | ip_family = ipv5                 | config.ini:2 ip_family
telegram         | url = http://localhost/bot       | config.ini:2 https
telegram         | url = nonsense                   | config.ini:2
telegram         | ¶¶bot_token = {T} x              | config.ini:4
telegram         | bot_token = 123456789            | config.ini:2
telegram         | mote_token = sesame              | config.ini:2 mote_token bot_token
telegram         | bot_token = your_telegram_bot_token¶mote_token = sesame | config.ini:3 mote_token bot_token
telegram         | bot_token = {T}¶mote_token = a sesame | config.ini:3 mote_token
telegram         | bot_token = {T}¶mote_token = sesame&  | config.ini:3 mote_token
telegram         | bot_token = {T}¶mote_token = 50-characters-are-one-more-than-the-firmware-holds | config.ini:3 mote_token
.env             | # x¶PASSWORD sesame¶             | .env:2
.env             | PASSWORD=sesame\u{7f}sesame       | .env:1 PASSWORD control
.env             | COAP_SERVER_PORT=70000           | .env COAP_SERVER_PORT
COAP_SERVER_PORT | 70000                            | environment COAP_SERVER_PORT
COAP_SERVER_PORT | 0                                | environment COAP_SERVER_PORT
COAP_SERVER_PORT | coap                             | COAP_SERVER_PORT
COAP_SERVER_IP   | gateway                          | environment COAP_SERVER_IP
COAP_SERVER_IP   | fe80::1%lo                       | COAP_SERVER_IP
SSL_CERT_FILE    | /nowhere/ca.pem                  | SSL_CERT_FILE /nowhere/ca.pem
SSL_CERT_FILE    | /dev/null                        | SSL_CERT_FILE /dev/null
";

/// Bad configuration ends the start: one line with file, number and reason, exit status 1.
#[test]
fn bad_configuration() {
    let api = BotApi::start();
    each_row(MISTAKES, |[place, text, words]| {
        let good = Setup::new(&api);
        let text = text.replace("{T}", TOKEN).replace('¶', "\n");
        let setup = match place {
            "telegram" => good.config(&format!("[telegram]\n{text}\n")),
            "config.ini" => good.config(&text),
            ".env" => good.without("COAP_SERVER_PORT").dotenv(&text),
            variable => good.env(variable, text),
        };
        let finished = setup.run(&[]);
        assert_eq!(finished.code(), Some(1), "{finished:?}");
        let said = finished.stdout.clone() + &finished.stderr;
        assert_eq!(said.lines().count(), 1, "one line: {said:?}");
        for word in words.split(' ') {
            assert!(said.contains(word), "{word:?} in {said:?}");
        }
        for secret in [TOKEN, "sesame"] {
            assert!(!said.contains(secret), "{said:?}");
        }
    });
}

/// A file that cannot be read is an error, not "no configuration".
#[test]
fn unreadable_configuration() {
    let api = BotApi::start();
    for name in ["config.ini", "env"] {
        let directory = TempDir::new();
        fs::create_dir(directory.join(name)).unwrap();
        let mut setup = Setup::new(&api).env("CREDENTIALS_DIRECTORY", directory.path().display());
        (setup.config, setup.dotenv) = (None, None);
        let finished = setup.run(&[]);
        assert_eq!(finished.code(), Some(1), "{finished:?}");
        let path = directory.join(name).display().to_string();
        assert!(finished.stderr.contains(&path), "{path}: {finished:?}");
    }
}

// --- where it listens ---

/// A taken port is an operator's mistake: one line.
#[test]
fn a_taken_port() {
    let api = BotApi::start();
    let taken = UdpSocket::bind((loopback(), 0)).unwrap();
    let address = taken.local_addr().unwrap();
    let setup = Setup::new(&api).env("COAP_SERVER_PORT", address.port());
    let finished = setup.run(&[]);
    assert_eq!(finished.code(), Some(1), "{finished:?}");
    let said = format!("cannot bind {address}: ");
    assert!(finished.stderr.contains(&said), "{finished:?}");
    assert_eq!(finished.stderr.lines().count(), 1, "{finished:?}");
}

/// Row 25c: it could not be answered, and comes again from the real address; else its text would be sent twice.
#[test]
fn from_the_unspecified_address() {
    if !can_send_from(from_the_unspecified_address) {
        return;
    }
    let api = BotApi::start();
    let gateway = start_with(&api, Setup::new(&api));
    let mote = Mote::new(gateway.address());
    let request = mote.post("message", message(&api, "5", "x"));
    let send = |target| send_from(&[Ipv6Addr::UNSPECIFIED], target, &request.encode());
    // It arrives where an ordinary socket listens.
    let witness = UdpSocket::bind("[::1]:0").unwrap();
    send(witness.local_addr().unwrap());
    witness.set_read_timeout(Some(PATIENCE)).unwrap();
    let (_, source) = witness.recv_from(&mut [0; 2048]).unwrap();
    assert_eq!(source.to_string(), "[::]:5683");
    send(gateway.address());
    assert!(mote.ping(PATIENCE), "what came before the ping was read");
    assert_eq!(api.count("sendMessage"), 0);
    mote.separate(&request).expect("2.05", SENT);
    assert_eq!(api.texts_to(5), ["x"]);
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
    assert_eq!(version.code(), Some(0));
    let number = env!("CARGO_PKG_VERSION");
    assert!(version.stdout.contains(number), "{version:?}");
    for wrong in [
        "--nonsense",
        "serve",
        "",
        "check more",
        "--help more",
        "send",
        "send -i 5",
        "send -m x",
        "send -i",
        "send -i 5 -m x -u http://localhost",
        "send -i 5 -m x --nonsense",
    ] {
        let arguments: Vec<&str> = wrong.split(' ').collect();
        let finished = setup.run(&arguments);
        assert_eq!(finished.code(), Some(2), "{wrong:?}: {finished:?}");
        assert!(finished.stderr.to_lowercase().contains("usage"), "{wrong}");
        assert_eq!(finished.stdout, "", "{wrong:?}");
    }
}

/// `check`: the bot, the users, the chats that have written; without taking anything from the running gateway.
#[test]
fn check() {
    let api = BotApi::start();
    api.person_writes(ADA, "Ada", "hi");
    let gateway = start_with(&api, Setup::new(&api));
    let mote = Mote::new(gateway.address());
    assert_eq!(poll(&mote, &api), ADA_TOKEN);
    api.person_writes(2_345_678_901, "Bob", "hello");
    let group = json!({"id": -4_444, "type": "group", "title": "Greenhouse"});
    api.push_message(ADA, "Ada", json!({"chat": group, "text": "hi"}));
    let state = gateway.state();
    let checked = gateway.run(&["check"]);
    assert_eq!(checked.code(), Some(0), "{checked:?}");
    for words in [
        &["riot_mote_bot"][..],
        &["Ada", "1234567890"],
        &["Bob", "2345678901"],
        &["Greenhouse", "-4444"],
    ] {
        assert!(has_line(&checked.stdout, words), "{words:?}: {checked:?}");
    }
    assert!(!checked.stdout.contains(TOKEN) && !checked.stdout.contains(PASSWORD));
    assert_eq!(gateway.state(), state);
    let both = format!("{ADA_TOKEN};Bob:2345678901");
    assert_eq!(hear(&mote, &api), both, "still there");
}

const FAILURES: &str = "
error 401 Unauthorized            | Unauthorized
refuse                            | efused
certificate of another authority  | certificate
page 200                          | HTTP 200
hang                              | time
webhook                           | webhook
";

#[test]
fn check_that_fails() {
    each_row(FAILURES, |[trouble, word]| {
        let api = BotApi::start();
        api.fail_with(trouble);
        let finished = Setup::new(&api).run(&["check"]);
        assert_eq!(finished.code(), Some(1), "{finished:?}");
        let said = finished.stdout + &finished.stderr;
        assert!(said.contains(word) && !said.contains(TOKEN), "{said}");
    });
}

/// `send` is a mote: one POST /message, and what it was answered.
#[test]
fn send() {
    let (api, gateway) = start();
    let url = format!("coap://{}", gateway.address());
    let finished = gateway.run(&["send", "-i", "5", "-m", "hello & welcome", "-u", &url]);
    assert_eq!(finished.code(), Some(0), "{finished:?}");
    assert!(has_line(&finished.stdout, &["2.05", SENT]), "{finished:?}");
    assert_eq!(api.texts_to(5), ["hello & welcome"]);
    // The options come in any order.
    let finished = gateway.run(&["send", "-u", &url, "-m", "turned round", "-i", "7"]);
    assert_eq!(finished.code(), Some(0), "{finished:?}");
    assert_eq!(api.texts_to(7), ["turned round"]);
    // Without -u: to the gateway that this configuration describes. Longer than one datagram should be.
    let long = "0123456789".repeat(150);
    let finished = gateway.run(&["send", "-m", &long, "-i", "5,6"]);
    assert_eq!(finished.code(), Some(0), "{finished:?}");
    assert_eq!(api.texts_to(6), [long]);
    // Refused by Telegram; refused by the gateway.
    api.unknown_chat(8);
    for (chat, code) in [("8", "5.00"), ("Ada", "4.00")] {
        let finished = gateway.run(&["send", "-i", chat, "-m", "x"]);
        assert_eq!(finished.code(), Some(1), "{finished:?}");
        let said = finished.stdout + &finished.stderr;
        assert!(said.contains(code) && !said.contains(TOKEN), "{said}");
    }
    // Nobody there.
    let start = Instant::now();
    let url = format!("coap://{}", SocketAddr::new(loopback(), free_udp_port()));
    let finished = gateway.run(&["send", "-i", "5", "-m", "x", "-u", &url]);
    assert_eq!(finished.code(), Some(1), "{finished:?}");
    assert!(!finished.stderr.is_empty() && start.elapsed() < Duration::from_secs(15));
    // Somebody who is no CoAP server for this.
    let other = UdpSocket::bind((loopback(), 0)).unwrap();
    let url = format!("coap://{}", other.local_addr().unwrap());
    let finished = thread::scope(|scope| {
        scope.spawn(|| {
            let mut request = [0; 2048];
            let (_, client) = other.recv_from(&mut request).unwrap();
            let reset = [0x70, 0, request[2], request[3]];
            other.send_to(&reset, client).unwrap();
        });
        gateway.run(&["send", "-i", "5", "-m", "x", "-u", &url])
    });
    assert_eq!(finished.code(), Some(1), "{finished:?}");
    assert!(finished.stderr.contains("reset"), "{finished:?}");

    // A copy of the request gets an empty ACK of its own.
    let finished = thread::scope(|scope| {
        scope.spawn(|| {
            let mut request = [0; 2048];
            let (_, client) = other.recv_from(&mut request).unwrap();
            let acknowledgement = [0x60, 0, request[2], request[3]];
            let mut response = vec![0x54, 0x45, 0, 1]; // NON, 2.05
            response.extend(&request[4..8]);
            for bytes in [&acknowledgement[..], &acknowledgement, &response] {
                other.send_to(bytes, client).unwrap();
            }
        });
        gateway.run(&["send", "-i", "5", "-m", "x", "-u", &url])
    });
    assert_eq!(finished.stdout, "2.05 \n", "{finished:?}");
}

// --- the log ---

/// Every request with its peer, resource, outcome and duration, in the file with the time, on the console without.
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
    api.unknown_chat(404);
    mote.post_separate("message", message(&api, "404", "x"))
        .expect("5.00", "");
    assert!(mote.ping(PATIENCE), "what belongs to the requests is done");
    let peer = mote.socket.local_addr().unwrap().to_string();
    let log = gateway.log();
    for (resource, outcome) in [
        ("/message", "2.05"),
        ("/update", "2.03"),
        ("/message", "4.00"),
        ("/message", "5.00"),
    ] {
        let words = [resource, outcome, &peer, " ms"];
        assert!(has_line(&log, &words), "{words:?} in:\n{log}");
    }
    assert!(has_line(&log, &["[WARN]", "404", "chat not found"]));
    let console = gateway.output();
    assert_eq!(console.lines().count(), log.lines().count());
    for (line, shown) in log.lines().zip(console.lines()) {
        let (time, record) = line.split_at("2026-01-31 12:00:00 ".len());
        let shape = time.replace(|c: char| c.is_ascii_digit(), "0");
        assert_eq!(shape, "0000-00-00 00:00:00 ", "{line}");
        let (level, text) = record[1..].split_once("] ").unwrap();
        assert!(["INFO", "WARN", "ERROR"].contains(&level), "{line}");
        assert!(shown.starts_with(level) && shown.ends_with(text), "{shown}");
    }
    for library in ["rustls", "ureq", "DEBUG", "TRACE"] {
        assert!(!console.contains(library), "{console}");
    }
}

/// At 1 MiB the log is moved to coap_server.log.1; if that cannot be, it begins anew.
#[test]
fn log_rotation() {
    let api = BotApi::start();
    let old = "2026-01-31 12:00:00 [INFO] old\n".repeat((1 << 20) / 31 - 10);
    for movable in [true, false] {
        api.push_update(json!({})); // or Telegram holds the second one's first fetch for 3 s
        let mut gateway = Gateway::stopped(Setup::new(&api));
        let directory = gateway.directory();
        fs::write(directory.join("coap_server.log"), &old).unwrap();
        let former = directory.join("coap_server.log.1");
        if movable {
            fs::write(former, "older\n").unwrap();
        } else {
            fs::create_dir_all(former.join("x")).unwrap();
        }
        gateway.restart();
        let mote = Mote::new(gateway.address());
        for _ in 0..100 {
            mote.post_piggybacked("message", "nonsense")
                .expect_code("4.00");
        }
        let log = gateway.log();
        assert!((100..100_000).contains(&log.len()), "{} bytes", log.len());
        assert!(!log.contains(" old"));
        let moved = gateway.file("coap_server.log.1");
        assert!(moved.len() <= (1 << 20) + 1000, "{} bytes", moved.len());
        assert_eq!(moved.starts_with(&old), movable);
    }
}

// --- the disk ---

/// Folders that do not exist and cannot be made: said in the log, and `/message` needs none of them.
#[test]
fn no_place_for_anything() {
    let api = BotApi::start();
    let setup = Setup::new(&api)
        .env("STATE_DIRECTORY", "/dev/null/state")
        .env("LOGS_DIRECTORY", "/dev/null/logs");
    let gateway = Gateway::with(setup);
    Mote::new(gateway.address())
        .post_separate("message", message(&api, "5", "x"))
        .expect("2.05", SENT);
    let console = gateway.output();
    for words in [["ERROR", "/dev/null/state"], ["WARN", "/dev/null/logs"]] {
        assert!(has_line(&console, &words), "{words:?} in {console}");
    }
}

/// Texts go out, polls are answered 5.00, nothing is confirmed to Telegram and nobody is answered until the disk is
/// mended; then nothing is lost.
#[test]
fn a_disk_that_cannot_be_written() {
    if !in_namespaces(a_disk_that_cannot_be_written) {
        return;
    }
    let fill = |disk: &Path| drop(fs::write(disk.join("filler"), vec![0; 1 << 20]));
    let empty = |disk: &Path| fs::remove_file(disk.join("filler")).unwrap();
    let remount = |disk: &Path, how: &str| mount(&["-o", how, &disk.display().to_string()]);
    let protect = |disk: &Path| remount(disk, "remount,bind,ro");
    let release = |disk: &Path| remount(disk, "remount,bind,rw");
    assert_disk_is_spoilt(false, fill, empty);
    assert_disk_is_spoilt(false, protect, release);
    assert_disk_is_spoilt(true, protect, release);
}

/// Spoils the disk before the gateway starts, or later.
fn assert_disk_is_spoilt(later: bool, spoil: impl Fn(&Path), mend: impl Fn(&Path)) {
    let (api, disk) = (BotApi::start(), Path::new("/mnt"));
    mount(&["-t", "tmpfs", "-o", "size=64k", "tmpfs", "/mnt"]);
    if !later {
        spoil(disk);
    }
    let gateway = Gateway::with(Setup::new(&api).env("STATE_DIRECTORY", "/mnt"));
    let mote = Mote::new(gateway.address());
    if later {
        api.person_writes(2_345_678_901, "Bob", "remove me");
        assert!(within(PATIENCE, || poll(&mote, &api) == "r2345678901"));
        spoil(disk);
    }
    mote.post_separate("message", message(&api, "5", "x"))
        .expect("2.05", SENT);
    api.person_writes(ADA, "Ada", "hi");
    let polls = || mote.post_separate("update", update(&api)).code();
    assert!(within(PATIENCE, || polls() == "5.00"));
    assert_eq!(polls(), "5.00");
    assert!(mote.ping(PATIENCE));
    assert!(api.texts_to(ADA).is_empty(), "answered too early");
    assert!(api.waiting_updates() > 0, "confirmed too early");
    let log = gateway.log();
    assert!(has_line(&log, &["[ERROR]", "state.json"]), "{log}");
    mend(disk);
    let response = mote.post_separate("update", update(&api));
    response.expect_code("2.05");
    assert!(response.text().ends_with(ADA_TOKEN), "{response}");
    api.wait_for("the greeting", |seen| seen.texts_to(ADA).len() == 1);
    assert_eq!(files(disk), set(&["state.json"]));
}

/// A disk that takes its time (here: until somebody reads what is written) delays no response to a message.
#[test]
fn a_slow_disk() {
    let api = BotApi::start();
    let gateway = start_with(&api, Setup::new(&api));
    let mote = Mote::new(gateway.address());
    let pipe = gateway.directory().join("state.json.new");
    let made = Command::new("mkfifo").arg(&pipe).status();
    assert!(made.unwrap().success());
    api.block_chat(ADA);
    // It leaves before the state is written, which ends only below.
    mote.post_separate("message", message(&api, "1234567890,5", "x"))
        .expect("2.05", SENT);
    assert!(!mote.ping(QUIET), "the removal is being written");
    let state = fs::read_to_string(&pipe).unwrap();
    assert!(state.contains("1234567890"), "{state}");
    fs::remove_file(&pipe).unwrap();
    assert!(mote.ping(PATIENCE));
}

/// A disk that takes longer than a request has is no Telegram that hangs.
#[test]
fn a_disk_that_takes_too_long() {
    let directory = TempDir::new();
    let source = directory.join("slow.c");
    let library = directory.join("slow.so");
    let once = directory.join("once");
    let code = format!(
        "#include <unistd.h>\n#include <sys/syscall.h>\n\
        int fsync(int fd) {{ if (unlink(\"{}\") == 0) sleep(9); return syscall(SYS_fsync, fd); }}\n",
        once.display()
    );
    fs::write(&source, code).unwrap();
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-o"]);
    let compiled = compiler.arg(&library).arg(&source).status().unwrap();
    assert!(compiled.success());
    let api = BotApi::start();
    let setup = Setup::new(&api).env("LD_PRELOAD", library.display());
    let gateway = start_with(&api, setup);
    let mote = Mote::new(gateway.address());
    thread::sleep(EMPTY_PAGE_HOLDS);
    fs::write(&once, "").unwrap();
    api.person_writes(ADA, "Ada", "hi");
    mote.post_separate("update", update(&api))
        .expect("2.05", ADA_TOKEN);
    assert!(!once.exists(), "it was fast");
    assert!(!gateway.log().contains("cannot fetch"));
    let late = Fault::Late(Duration::from_millis(2600)); // more than a request has while Telegram hangs
    api.fail(next(1, "sendMessage").to(5), late);
    mote.post_separate("message", message(&api, "5", "x"))
        .expect("2.05", SENT);
}

/// What does not fit on the disk leaves no half lines.
#[test]
fn a_log_on_a_full_disk() {
    if !in_namespaces(a_log_on_a_full_disk) {
        return;
    }
    let api = BotApi::start();
    let disk = TempDir::new();
    let mut mount = Command::new("mount");
    mount.args(["-t", "tmpfs", "-o", "size=64k", "none"]);
    assert!(mount.arg(disk.path()).status().unwrap().success());
    let setup = Setup::new(&api).env("LOGS_DIRECTORY", disk.path().display());
    let gateway = start_with(&api, setup);
    let mote = Mote::new(gateway.address());
    let send = |times: usize| {
        for _ in 0..times {
            mote.post_separate("message", message(&api, "5", "x"))
                .expect("2.05", SENT);
        }
    };
    let _ = fs::write(disk.join("fill"), [0; 60_000]);
    send(150);
    fs::remove_file(disk.join("fill")).unwrap();
    send(5);
    let log = fs::read_to_string(disk.join("coap_server.log")).unwrap();
    assert!(log.lines().count() < 150, "the disk was not full");
    for line in log.lines() {
        assert!(
            line.starts_with("20") && line.matches("[INFO]").count() == 1,
            "{line}"
        );
    }
}

// --- systemd ---

/// What the service manager hears until `limit`, or until `done` says so.
fn notifications(socket: &UnixDatagram, limit: Duration, done: impl Fn(&str) -> bool) -> String {
    let end = Instant::now() + limit;
    let mut all = String::new();
    while !done(&all) {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        socket.set_read_timeout(Some(left)).unwrap();
        let mut buffer = [0; 4096];
        if let Ok(length) = socket.recv(&mut buffer) {
            all += &String::from_utf8_lossy(&buffer[..length]);
            all += "\n";
        }
    }
    all
}

/// Ready, alive, and in words what it does; when Telegram stops and starts to answer, once each, also in the log.
#[test]
fn notifications_to_systemd() {
    let api = BotApi::start();
    let name = format!("coap_websocket-{}", process::id());
    let socket =
        UnixDatagram::bind_addr(&net::SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    let setup = Setup::new(&api)
        .env("NOTIFY_SOCKET", format!("@{name}"))
        .env("WATCHDOG_USEC", 2_000_000);
    let gateway = start_with(&api, setup);
    let limit = Duration::from_secs(5);
    let told = notifications(&socket, limit, |all| {
        all.contains("READY=1") && all.contains("STATUS=") && all.contains("WATCHDOG=1")
    });
    assert!(
        has_line(&told, &["READY=1"]) && has_line(&told, &["WATCHDOG=1"]),
        "{told:?}"
    );
    assert!(
        told.lines()
            .any(|line| line.starts_with("STATUS=") && line.len() > 10)
    );
    let mote = Mote::new(gateway.address());
    let polls = |code: &str| {
        let known = gateway.log().lines().count();
        for _ in 0..2 {
            mote.post_separate("update", update(&api)).expect_code(code);
        }
        assert!(mote.ping(PATIENCE));
        let told = notifications(&socket, QUIET, |_| false);
        let mut told: Vec<String> = told.lines().map(str::to_string).collect();
        told.retain(|line| line.starts_with("STATUS="));
        assert_eq!(told.len(), 1, "{told:?}");
        let log = gateway.log();
        let own = |line: &&str| !line.contains("POST /update");
        let own: Vec<&str> = log.lines().skip(known).filter(own).collect();
        assert_eq!(own.len(), 1, "beside the requests: {own:#?}");
        told.remove(0)
    };
    thread::sleep(EMPTY_PAGE_HOLDS);
    notifications(&socket, QUIET, |_| false);
    api.fail(every(""), Fault::error(500, "Internal Server Error"));
    let stopped = polls("5.00");
    api.heal();
    assert_ne!(polls("2.03"), stopped);
}

/// A full socket that nobody reads holds up nothing.
#[test]
fn nobody_reads_the_notifications() {
    let api = BotApi::start();
    let directory = TempDir::new();
    let path = directory.join("notify");
    let _deaf = UnixDatagram::bind(&path).unwrap();
    let filler = UnixDatagram::unbound().unwrap();
    filler.set_nonblocking(true).unwrap();
    while filler.send_to(b"full", &path).is_ok() {}
    let setup = Setup::new(&api).env("NOTIFY_SOCKET", path.display());
    let gateway = start_with(&api, setup);
    assert!(Mote::new(gateway.address()).ping(PATIENCE));
}

/// Ready and alive also while the address is not there, or the boot would wait. Never with a bad configuration.
#[test]
fn an_address_that_does_not_exist() {
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
    let all = |all: &str| all.contains("READY=1") && all.contains("WATCHDOG=1");
    let told = notifications(&socket, Duration::from_secs(5), all);
    assert!(all(&told) && gateway.is_running(), "{told:?}");
}

// --- footprint ---

/// An idle gateway wakes at most three times in 2 s, and has no thread but the heartbeat.
#[test]
fn idle() {
    let (_api, gateway) = start();
    thread::sleep(Duration::from_millis(500));
    let switches = || -> u64 {
        let tasks = fs::read_dir(format!("/proc/{}/task", gateway.pid())).unwrap();
        let switches = tasks.map(|task| {
            let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            let line = status.lines().find(|line| line.starts_with("voluntary"));
            let number = line.and_then(|line| line.split_whitespace().nth(1));
            number.unwrap().parse::<u64>().unwrap()
        });
        switches.sum()
    };
    // The least of three, for on a busy machine it may have to wait for something else, too.
    let woken = [(); 3].map(|()| {
        let before = switches();
        thread::sleep(Duration::from_secs(2));
        switches() - before
    });
    assert!(woken.iter().any(|it| *it <= 3), "{woken:?} times in 2 s");
    assert_eq!(gateway.threads(), 2);
}
