//! Addresses, files and settings as operators really have them, and what the gateway says of them.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};
use std::{fs, io, thread};

use crate::support::*;
use serde_json::{Value, json};

/// The start has ended with one line that holds these words.
#[track_caller]
fn assert_refused(finished: &Finished, words: &[&str]) {
    assert_eq!(finished.code(), Some(1), "{finished:?}");
    assert_eq!(finished.stderr.lines().count(), 1, "{finished:?}");
    for word in words {
        assert!(finished.stderr.contains(word), "{word:?} in {finished:?}");
    }
}

// --- the address ---

/// From a socket on all addresses an answer may leave from another one than the mote has asked.
#[test]
fn an_address_that_is_not_one() {
    let api = BotApi::start();
    let addresses = [
        "::",
        "0.0.0.0",
        "0:0:0:0:0:0:0:0",
        "::ffff:0.0.0.0",
        "ff02::1",
        "ff05::fd",
        "ff0e::101",
        "224.0.1.187",
        "239.1.2.3",
        "::ffff:224.0.1.187",
        "255.255.255.255",
    ];
    let cases = addresses.map(|address| (address, address));
    in_parallel(&cases, |address| {
        let setup = Setup::new(&api);
        let in_environment = setup.clone().env("COAP_SERVER_IP", address);
        let dotenv = format!("PASSWORD={PASSWORD}\nCOAP_SERVER_IP={address}\n");
        let in_file = setup.without("COAP_SERVER_IP").dotenv(&dotenv);
        for arguments in [&[][..], &["check"], &["check", "--settings"]] {
            let words = ["COAP_SERVER_IP", "environment", "address"];
            assert_refused(&in_environment.run(arguments), &words);
            let words = ["COAP_SERVER_IP", ".env:2", "address"];
            assert_refused(&in_file.run(arguments), &words);
        }
    });
    assert_eq!(api.seen().connections, 0);
}

/// What systemd is told.
struct Systemd {
    socket: UnixDatagram,
    _directory: TempDir,
    path: String,
}

impl Systemd {
    fn new() -> Self {
        let directory = TempDir::new();
        let path = directory.join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        let path = path.display().to_string();
        Self {
            socket,
            _directory: directory,
            path,
        }
    }

    /// Waits for this STATUS.
    #[track_caller]
    fn wait_for(&self, status: &str, limit: Duration) {
        let end = Instant::now() + limit;
        let mut all = Vec::new();
        loop {
            let left = end.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "no STATUS={status:?}, but {all:#?}");
            self.socket.set_read_timeout(Some(left)).unwrap();
            let mut buffer = [0; 4096];
            if let Ok(length) = self.socket.recv(&mut buffer) {
                let told = String::from_utf8_lossy(&buffer[..length]).into_owned();
                if told.lines().any(|line| line == format!("STATUS={status}")) {
                    return;
                }
                all.push(told);
            }
        }
    }
}

/// It may be another host's: both causes are named, in the log and in STATUS.
#[test]
fn an_address_that_cannot_be_used() {
    let api = BotApi::start();
    let systemd = Systemd::new();
    let mut setup = Setup::new(&api).env("NOTIFY_SOCKET", &systemd.path);
    setup.ip = "2001:db8::1234".to_string();
    let mut gateway = Gateway::stopped(setup);
    gateway.launch();
    let waits = format!(
        "Waits for address {}: it is not there, or another host has it too",
        gateway.address()
    );
    systemd.wait_for(&waits, PATIENCE);
    thread::sleep(Duration::from_millis(2200));
    let log = gateway.log();
    let mut told = log.lines().filter(|line| line.contains("2001:db8::1234"));
    let line = told.next().unwrap_or_else(|| panic!("{log}"));
    let words = [
        "[WARN]",
        "it is not there, or another host has it too",
        "trying every second",
    ];
    for word in words {
        assert!(line.contains(word), "{word:?} in {line:?}");
    }
    assert_eq!(told.next(), None, "once");
}

/// Another network namespace at the other end of a cable, with a process that keeps it.
struct OtherHost(Child);

impl OtherHost {
    /// The cable's ends are called here and there.
    fn connected() -> Self {
        let sleep = Command::new("unshare")
            .args(["--net", "sleep", "300"])
            .spawn();
        let host = Self(sleep.unwrap());
        let own = fs::read_link("/proc/self/ns/net").unwrap();
        let namespace = format!("/proc/{}/ns/net", host.0.id());
        let is_apart = || fs::read_link(&namespace).is_ok_and(|other| other != own);
        assert!(within(PATIENCE, is_apart), "unshare");
        run("ip", "link add here type veth peer name there");
        run("ip", &format!("link set there netns {}", host.0.id()));
        run("ip", "link set here up");
        host.ip("link set lo up");
        host.ip("link set there up");
        host
    }

    fn ip(&self, arguments: &str) {
        run("nsenter", &format!("-t {} -n ip {arguments}", self.0.id()));
    }
}

impl Drop for OtherHost {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn address_flags() -> String {
    let shown = Command::new("ip")
        .args(["-6", "address", "show", "dev", "here"])
        .output();
    String::from_utf8_lossy(&shown.unwrap().stdout).into_owned()
}

/// Another host has the address: it is there and cannot be used, until the other one gives it up.
#[test]
fn an_address_that_another_host_has() {
    if !in_namespaces(an_address_that_another_host_has) {
        return;
    }
    let other = OtherHost::connected();
    other.ip("-6 address add 2001:db8::7/64 dev there nodad");
    run("ip", "-6 address add 2001:db8::7/64 dev here");
    let is_refused = || address_flags().contains("dadfailed");
    assert!(within(PATIENCE, is_refused), "{}", address_flags());
    let api = BotApi::start();
    let systemd = Systemd::new();
    let mut setup = Setup::new(&api).env("NOTIFY_SOCKET", &systemd.path);
    setup.ip = "2001:db8::7".to_string();
    let mut gateway = Gateway::stopped(setup);
    gateway.launch();
    let address = gateway.address();
    let waits = format!("Waits for address {address}: it is not there, or another host has it too");
    systemd.wait_for(&waits, PATIENCE);
    other.ip("-6 address del 2001:db8::7/64 dev there");
    run("ip", "-6 address del 2001:db8::7/64 dev here");
    run("ip", "-6 address add 2001:db8::7/64 dev here");
    systemd.wait_for(&format!("Serves CoAP on {address}"), PATIENCE);
    other.ip("-6 address add 2001:db8::8/64 dev there nodad");
    let mote = Mote::at("2001:db8::7", address);
    assert!(mote.ping(PATIENCE));
    mote.post_separate("message", message(&api, "5", "x"))
        .expect("2.05", SENT);
}

/// The link goes down and up again, as when a dongle is replugged: told once each, and serving goes on.
#[test]
#[ignore = "takes two minutes"]
fn an_address_that_goes_and_comes_back() {
    if !in_namespaces(an_address_that_goes_and_comes_back) {
        return;
    }
    let _other = OtherHost::connected();
    let add = || run("ip", "-6 address add 2001:db8::7/64 dev here nodad");
    add();
    let api = BotApi::start();
    let systemd = Systemd::new();
    let mut setup = Setup::new(&api).env("NOTIFY_SOCKET", &systemd.path);
    setup.ip = "2001:db8::7".to_string();
    let gateway = Gateway::with(setup);
    let serves = format!("Serves CoAP on {}", gateway.address());
    systemd.wait_for(&serves, PATIENCE);
    let minute = Duration::from_secs(65);
    run("ip", "link set here down"); // which takes its addresses away
    let gone = format!("{serves}, but this address has gone (link down, or another host has it)");
    systemd.wait_for(&gone, minute);
    run("ip", "link set here up");
    add();
    systemd.wait_for(&serves, minute);
    let mote = Mote::at("2001:db8::7", gateway.address());
    mote.post_separate("message", message(&api, "5", "x"))
        .expect("2.05", SENT);
    let log = gateway.log();
    for line in [
        "address 2001:db8::7 has gone",
        "address 2001:db8::7 is back",
    ] {
        assert_eq!(log.matches(line).count(), 1, "{line:?} in {log}");
    }
}

// --- the state ---

/// As version 1.0.0 writes it.
const OF_1_0_0: &str = r#"{
  "interval": 5,
  "feedback": 1,
  "users": [
    {
      "name": "Ada",
      "chat": 1234567890
    },
    {
      "name": "Bob_2",
      "chat": 2345678901
    }
  ],
  "removed": [
    3456789012
  ],
  "bot": "123456789",
  "offset": 700000001,
  "ignore_commands_before": null
}"#;
const TOLD_OF_1_0_0: &str = "r3456789012;i5;f1;Ada:1234567890;Bob_2:2345678901";

/// That state with some keys changed; null takes a key out.
fn changed(changes: Value) -> String {
    let mut state: Value = serde_json::from_str(OF_1_0_0).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        match value {
            Value::Null => drop(state.as_object_mut().unwrap().remove(key)),
            value => state[key] = value.clone(),
        }
    }
    state.to_string()
}

/// Nobody is lost by an update, nor by a way back.
#[test]
fn states_of_other_versions() {
    let ada = json!({"name": "Ada", "chat": ADA, "language": "en", "since": [1, 2]});
    let cases = [
        ("of 1.0.0", (OF_1_0_0.to_string(), TOLD_OF_1_0_0)),
        (
            "of 1.0.0, before its first page",
            (
                changed(json!({"ignore_commands_before": 1_700_000_000})),
                TOLD_OF_1_0_0,
            ),
        ),
        (
            "one key more",
            (changed(json!({"timezone": "Europe/Berlin"})), TOLD_OF_1_0_0),
        ),
        (
            "many more",
            (
                changed(
                    json!({"version": 2, "motes": [{"a": null}], "language": {"de": 1}, "": []}),
                ),
                TOLD_OF_1_0_0,
            ),
        ),
        (
            "one key more of a user",
            (
                changed(json!({"users": [ada]})),
                "r3456789012;i5;f1;Ada:1234567890",
            ),
        ),
        (
            "no settings",
            (
                changed(json!({"interval": null, "feedback": null})),
                "r3456789012;Ada:1234567890;Bob_2:2345678901",
            ),
        ),
        (
            "nobody removed",
            (
                changed(json!({"removed": null})),
                "i5;f1;Ada:1234567890;Bob_2:2345678901",
            ),
        ),
        (
            "no bot and no offset",
            (
                changed(json!({"bot": null, "offset": null, "ignore_commands_before": null})),
                TOLD_OF_1_0_0,
            ),
        ),
        (
            "users alone",
            (
                r#"{"users":[{"name":"Ada","chat":1234567890}]}"#.to_string(),
                ADA_TOKEN,
            ),
        ),
        ("nothing in it", ("{}".to_string(), "No Updates")),
        (
            "no users",
            (changed(json!({"users": null})), "r3456789012;i5;f1"),
        ),
    ];
    in_parallel(&cases, |(state, told)| {
        let api = BotApi::start();
        let mut gateway = Gateway::stopped(Setup::new(&api));
        fs::write(gateway.directory().join("state.json"), state).unwrap();
        gateway.restart();
        let mote = Mote::new(gateway.address());
        assert_eq!(poll(&mote, &api), *told);
        let aside = gateway.directory().join("state.json.damaged");
        assert!(!aside.exists(), "{}", gateway.log());
        let offset = &api.seen().calls("getUpdates")[0].body["offset"];
        let known: Value = serde_json::from_str(state).unwrap();
        assert_eq!(*offset, json!(known["offset"].as_i64().unwrap_or(0)));
        // And again, from what it has written itself.
        api.push_update(json!({}));
        gateway.restart();
        mote.reboot();
        assert_eq!(poll(&mote, &api), *told);
    });
}

/// Version 1.0.0 refuses keys that it does not know and wants its own.
#[test]
fn a_way_back() {
    let scene = Scene::new();
    scene.writes(ADA, "Ada", "hi");
    scene.writes(2_345_678_901, "Bob", "remove me");
    scene.catch_up();
    let state: Value = serde_json::from_str(&scene.gateway.state()).unwrap();
    let known: Value = serde_json::from_str(OF_1_0_0).unwrap();
    for key in state.as_object().unwrap().keys() {
        assert!(known.get(key).is_some(), "{key:?} in {state}");
    }
    for key in ["users", "removed", "offset"] {
        assert!(state.get(key).is_some(), "no {key:?} in {state}");
    }
    let user = &state["users"][0];
    assert_eq!(*user, json!({"name": "Ada", "chat": ADA}));
}

/// Whatever a power cut has left, the state is its owner's alone.
#[test]
fn a_state_that_was_not_finished() {
    let api = BotApi::start();
    let mut gateway = Gateway::stopped(Setup::new(&api));
    let unfinished = gateway.directory().join("state.json.new");
    fs::write(&unfinished, "{").unwrap();
    fs::set_permissions(&unfinished, fs::Permissions::from_mode(0o644)).unwrap();
    gateway.restart();
    assert!(within(PATIENCE, || !unfinished.exists()));
    let state = fs::metadata(gateway.directory().join("state.json")).unwrap();
    assert_eq!(state.permissions().mode() & 0o777, 0o600);
}

/// What is left out of a state that somebody has edited is told.
#[test]
fn an_edited_state() {
    for (edited, is_told) in [
        (json!({"interval": 90}), false),
        (json!({"interval": 900}), true),
        (json!({"feedback": 2}), true),
        (json!({"removed": [-5]}), true),
        (json!({"users": [{"name": "Lab", "chat": -100}]}), true),
    ] {
        let api = BotApi::start();
        let gateway = Gateway::stopped(Setup::new(&api));
        let path = gateway.directory().join("state.json");
        fs::write(&path, changed(edited.clone())).unwrap();
        let said = gateway.run(&["check"]);
        let warning = "state.json: what motes would not understand is left out";
        let was_told = said.stdout.contains(warning);
        assert_eq!(was_told, is_told, "{edited}: {said:?}");
    }
}

/// What cannot be read is not worthless: the start ends, systemd tries again, and nobody is lost.
#[test]
fn a_state_that_cannot_be_read() {
    type Place = fn(&Path);
    let cases: [(&str, Place); 3] = [
        ("a folder", |path| fs::create_dir(path).unwrap()),
        ("a link to itself", |path| symlink(path, path).unwrap()),
        ("another user's", |path| {
            fs::write(path, OF_1_0_0).unwrap();
            fs::set_permissions(path, fs::Permissions::from_mode(0o000)).unwrap();
        }),
    ];
    in_parallel(&cases, |place| {
        let api = BotApi::start();
        let directory = TempDir::new();
        let path = directory.join("state.json");
        place(&path);
        let before = fs::symlink_metadata(&path).unwrap();
        if fs::read(&path).is_ok() {
            return; // root can read everything
        }
        let setup = Setup::new(&api).env("STATE_DIRECTORY", directory.path().display());
        let finished = setup.run(&[]);
        let name = path.display().to_string();
        assert_refused(&finished, &["cannot read", &name]);
        let after = fs::symlink_metadata(&path).unwrap();
        assert_eq!(before.file_type(), after.file_type());
        assert_eq!(before.modified().unwrap(), after.modified().unwrap());
        let names = fs::read_dir(directory.path()).unwrap();
        assert_eq!(names.count(), 1, "nothing is set aside");
        assert_eq!(api.seen().connections, 0);
    });
}

/// The same where only root can make it: a file that root has left and the service's user may not read.
#[test]
fn a_state_of_roots() {
    if fs::metadata("/proc/self").unwrap().uid() != 0 {
        return; // then the test above has "another user's"
    }
    const NOBODY: u32 = 65_534;
    let (state, work) = (TempDir::new(), TempDir::new());
    for directory in [&state, &work] {
        chown(directory.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    }
    let path = state.join("state.json");
    fs::write(&path, OF_1_0_0).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    // Where nobody may run it. `fs::copy` would hold it open for writing while another test forks.
    let program = work.join("coap_websocket");
    let copied = Command::new("cp").arg(binary()).arg(&program).status();
    assert!(copied.unwrap().success());
    let output = Command::new("timeout")
        .arg("10")
        .arg(&program)
        .uid(NOBODY)
        .gid(NOBODY)
        .current_dir(work.path())
        .env_clear()
        .env("STATE_DIRECTORY", state.path())
        .env("COAP_SERVER_PORT", free_udp_port().to_string())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains(&path.display().to_string()), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert_eq!(fs::read_to_string(&path).unwrap(), OF_1_0_0);
}

/// Whoever serves by hand from an installation's folders leaves files there that the service cannot read.
#[test]
fn nobody_serves_an_installation_by_hand() {
    if !in_namespaces(nobody_serves_an_installation_by_hand) {
        return;
    }
    let (api, etc) = (BotApi::start(), TempDir::new());
    for name in ["hosts", "nsswitch.conf"] {
        let _ = fs::copy(Path::new("/etc").join(name), etc.join(name));
    }
    run("mount", &format!("--bind {} /etc", etc.path().display()));
    for place in ["/var/lib", "/var/log"] {
        run("mount", &format!("-t tmpfs tmpfs {place}"));
    }
    for place in ["/etc", "/var/lib", "/var/log"] {
        fs::create_dir(format!("{place}/coap_websocket")).unwrap();
    }
    let mut setup = Setup::new(&api);
    let (config, dotenv) = (setup.config.take().unwrap(), setup.dotenv.take().unwrap());
    fs::write("/etc/coap_websocket/config.ini", &config).unwrap();
    fs::write("/etc/coap_websocket/.env", dotenv).unwrap();
    let state = Path::new("/var/lib/coap_websocket/state.json");
    fs::write(state, OF_1_0_0).unwrap();
    let finished = setup.run(&[]);
    assert_refused(&finished, &["sudo systemctl start coap_websocket"]);
    assert_eq!(fs::read_to_string(state).unwrap(), OF_1_0_0);
    assert_eq!(fs::read_dir("/var/lib/coap_websocket").unwrap().count(), 1);
    assert_eq!(api.seen().connections, 0);
    // What changes nothing works from everywhere.
    assert_eq!(setup.run(&["check", "--settings"]).code(), Some(0));
    let checked = setup.run(&["check"]);
    assert_eq!(checked.code(), Some(0), "{checked:?}");
    assert!(checked.stdout.contains("Bob_2"), "{checked:?}");
    assert_eq!(fs::read_to_string(state).unwrap(), OF_1_0_0);
    // So does what has settings of its own, and the service.
    drop(Gateway::with(setup.clone().config(&config)));
    let service = setup
        .env("STATE_DIRECTORY", "/var/lib/coap_websocket")
        .env("LOGS_DIRECTORY", "/var/log/coap_websocket");
    let gateway = Gateway::with(service);
    let told = poll(&Mote::new(gateway.address()), &api);
    assert_eq!(told, TOLD_OF_1_0_0);
}

// --- the proxy ---

/// A stand-in and a proxy that leads to it; the gateway would reach it directly as well.
fn with_proxy() -> (BotApi, Proxy) {
    let api = BotApi::start();
    let authority = api.url()["https://".len()..].replace("/bot", "");
    let proxy = Proxy::start(&authority, api.address());
    (api, proxy)
}

fn dotenv(line: &str) -> String {
    format!("PASSWORD={PASSWORD}\n{line}\n")
}

/// Who cannot be reached, Telegram or the proxy, is told, but not how one logs in there.
#[test]
fn a_proxy_that_is_not_there() {
    for proxy in ["127.0.0.1:1", "no-such-proxy.invalid:3128"] {
        let api = BotApi::start();
        let url = format!("http://gateway:hush-hush@{proxy}");
        let mut setup = Setup::new(&api).env("HTTPS_PROXY", url);
        setup.secrets.push("hush-hush".to_string());
        let gateway = Gateway::with(setup);
        gateway.wait_for_log("cannot fetch");
        let expected = format!(" by HTTPS_PROXY {proxy}: ");
        assert!(gateway.log().contains(&expected), "{}", gateway.log());
        let checked = gateway.run(&["check"]);
        assert!(checked.stderr.contains(&expected), "{checked:?}");
    }
}

/// HTTPS_PROXY in `.env` or in the environment; for `check` as well.
#[test]
fn the_proxy_is_used() {
    type Place = fn(Setup, &str) -> Setup;
    let cases: [(&str, Place); 5] = [
        (".env", |setup, url| {
            setup.dotenv(&dotenv(&format!("HTTPS_PROXY={url}")))
        }),
        ("environment", |setup, url| setup.env("HTTPS_PROXY", url)),
        ("the environment counts more", |setup, url| {
            let setup = setup.env("HTTPS_PROXY", url);
            setup.dotenv(&dotenv("HTTPS_PROXY=http://127.0.0.1:1"))
        }),
        ("a host by name", |setup, url| {
            setup.env("HTTPS_PROXY", url.replace("127.0.0.1", "localhost"))
        }),
        ("whatever NO_PROXY says", |setup, url| {
            let setup = setup
                .env("HTTPS_PROXY", url)
                .env("NO_PROXY", "localhost,127.0.0.1,*");
            setup
                .env("no_proxy", "*")
                .env("ALL_PROXY", "http://127.0.0.1:1")
        }),
    ];
    in_parallel(&cases, |place| {
        let (api, proxy) = with_proxy();
        let setup = place(Setup::new(&api), &proxy.url());
        let gateway = Gateway::with(setup);
        let mote = Mote::new(gateway.address());
        mote.post_separate("message", message(&api, "5", "x"))
            .expect("2.05", SENT);
        assert!(!proxy.asked().is_empty(), "directly");
        assert_eq!(api.seen().connections, proxy.asked().len());
        let known = proxy.asked().len();
        let checked = gateway.run(&["check"]);
        assert_eq!(checked.code(), Some(0), "{checked:?}");
        assert!(proxy.asked().len() > known, "check goes directly");
        assert_eq!(api.seen().connections, proxy.asked().len());
    });
}

/// The name and the password go to the proxy and nowhere else.
#[test]
fn the_proxys_password() {
    let (api, proxy) = with_proxy();
    let url = proxy.url().replace("http://", "http://gateway:hush-hush@");
    let mut setup = Setup::new(&api).dotenv(&dotenv(&format!("HTTPS_PROXY={url}")));
    setup.secrets.push("hush-hush".to_string());
    let credentials = "Z2F0ZXdheTpodXNoLWh1c2g="; // Base64 of both
    setup.secrets.push(credentials.to_string());
    let gateway = Gateway::with(setup);
    let mote = Mote::new(gateway.address());
    mote.post_separate("message", message(&api, "5", "x"))
        .expect("2.05", SENT);
    let heads = proxy.heads();
    assert!(!heads.is_empty());
    for head in &heads {
        let given = format!("proxy-authorization: basic {credentials}").to_lowercase();
        assert!(head.to_lowercase().contains(&given), "{head}");
    }
    let calls = api.seen().calls;
    assert!(calls.iter().all(|call| !call.head.contains(credentials)));
    // Nor when the proxy is gone, in anything that is said.
    drop(proxy);
    api.close_connections();
    mote.post_separate("message", message(&api, "5", "y"))
        .expect("5.00", "");
    let checked = gateway.run(&["check"]);
    assert_eq!(checked.code(), Some(1));
    let said = checked.stdout + &checked.stderr;
    assert!(
        !said.contains("hush") && !said.contains(credentials),
        "{said}"
    );
    gateway.assert_no_secret();
}

/// What cannot be used ends the start with the variable's name: never silently the direct way.
#[test]
fn a_proxy_that_cannot_be_used() {
    let api = BotApi::start();
    let values = [
        "socks5://127.0.0.1:1080",
        "socks5h://127.0.0.1:1080",
        "socks4://127.0.0.1:1080",
        "socks://hush:hush@127.0.0.1:1080",
        "https://127.0.0.1:3128",
        "ftp://127.0.0.1:3128",
        "htp://127.0.0.1:3128",
        "http//127.0.0.1:3128",
        "http:/127.0.0.1:3128",
        "://127.0.0.1:3128",
        "127.0.0.1:3128",
        "proxy.example:3128",
        "http://127.0.0.1",
        "http://gateway:hush@127.0.0.1",
        "http://127.0.0.1:",
        "http://127.0.0.1:99999",
        "http://127.0.0.1:port",
        "http://127.0.0.1:-1",
        "http://:3128",
        "http://gateway:hush@:3128",
        "http://",
        "http://127.0.0.1:3128:3128",
        "http://127.0.0.1 :3128",
        "proxy",
    ];
    let cases = values.map(|value| (value, value));
    in_parallel(&cases, |value| {
        let setup = Setup::new(&api);
        for arguments in [&[][..], &["check"], &["check", "--settings"]] {
            let finished = setup.clone().env("HTTPS_PROXY", value).run(arguments);
            assert_refused(&finished, &["environment", "HTTPS_PROXY"]);
            let said = finished.stdout.clone() + &finished.stderr;
            assert!(!said.contains("hush"), "{said}");
        }
        let in_file = setup.dotenv(&dotenv(&format!("HTTPS_PROXY={value}")));
        let finished = in_file.run(&[]);
        assert_refused(&finished, &[".env:2", "HTTPS_PROXY"]);
        assert!(!finished.stderr.contains("hush"), "{finished:?}");
    });
    assert_eq!(api.seen().connections, 0);
}

/// No other variable of that kind counts, in whatever place.
#[test]
fn other_proxy_variables_do_not_count() {
    let cases = [
        "ALL_PROXY",
        "all_proxy",
        "https_proxy",
        "HTTP_PROXY",
        "http_proxy",
        "NO_PROXY",
    ];
    let cases = cases.map(|name| (name, name));
    in_parallel(&cases, |name| {
        let (api, proxy) = with_proxy();
        let setup = Setup::new(&api).env(name, proxy.url());
        let setup = setup.dotenv(&dotenv(&format!("{name}={}", proxy.url())));
        let gateway = Gateway::with(setup);
        let mote = Mote::new(gateway.address());
        mote.post_separate("message", message(&api, "5", "x"))
            .expect("2.05", SENT);
        assert_eq!(gateway.run(&["check"]).code(), Some(0));
        assert!(proxy.asked().is_empty(), "{name} is used");
    });
}

// --- the log ---

/// Where the console is the journal, each line begins with its priority, so that `journalctl -p warning` finds warnings.
#[test]
fn priorities_for_the_journal() {
    let api = BotApi::start();
    let mut setup = Setup::new(&api).env("STATE_DIRECTORY", "/dev/null/state");
    setup.dotenv = None;
    let in_journal = setup.clone().env("JOURNAL_STREAM", "8:12345");
    for (setup, is_journal) in [(setup, false), (in_journal, true)] {
        api.push_update(json!({})); // or Telegram holds the second one's first fetch
        let gateway = Gateway::with(setup);
        let mote = Mote::new(gateway.address());
        mote.post_separate("message", message(&api, "5", "x"))
            .expect("2.05", SENT);
        let output = gateway.output();
        let mut seen = Vec::new();
        for line in output.lines() {
            for (level, priority) in [("ERROR", "<3>"), ("WARN", "<4>"), ("INFO", "<6>")] {
                let start = if is_journal { priority } else { "" };
                if line.starts_with(&format!("{start}{level}")) {
                    seen.push(level);
                }
            }
        }
        assert_eq!(seen.len(), output.lines().count(), "{output}");
        for level in ["ERROR", "WARN", "INFO"] {
            assert!(seen.contains(&level), "no {level} in {output}");
        }
        assert!(!gateway.log().contains("<6>"));
    }
    // The line that ends a start is an error, too.
    let bad = Setup::new(&api)
        .env("JOURNAL_STREAM", "8:12345")
        .config("nonsense");
    let finished = bad.run(&[]);
    assert_refused(&finished, &["config.ini:1"]);
    assert!(finished.stderr.starts_with("<3>"), "{finished:?}");
}

/// Nobody reads what the gateway writes, or the disk behind it is full: it serves, and its file has the log.
#[test]
fn a_console_that_cannot_be_written() {
    let api = BotApi::start();
    let (reader, pipe) = io::pipe().unwrap();
    drop(reader);
    let full = File::options().write(true).open("/dev/full").unwrap();
    let pipe = File::from(OwnedFd::from(pipe));
    for stdout in [full, pipe] {
        let mut gateway = Gateway::stopped(Setup::new(&api));
        gateway.launch_to(stdout);
        let mote = Mote::new(gateway.address());
        assert!(within(PATIENCE, || mote.ping(QUIET)));
        for _ in 0..3 {
            mote.post_piggybacked("nowhere", "").expect_code("4.04");
        }
        assert!(within(PATIENCE, || gateway.log().matches("4.04").count() == 3));
        assert!(gateway.is_running());
    }
}

/// One of the two is cured by deleteWebhook, the other by stopping the other program.
#[test]
fn hints_fit_their_cause() {
    type Break = fn(&BotApi);
    let cases: [(&str, (Break, &str, &str)); 2] = [
        (
            "a webhook",
            (
                |api| api.set_webhook(true),
                "/deleteWebhook once",
                "stop the other program",
            ),
        ),
        (
            "another program",
            (
                |api| api.fail(every("getUpdates"), Fault::conflict()),
                "stop the other program",
                "deleteWebhook",
            ),
        ),
    ];
    in_parallel(&cases, |(break_it, right, wrong)| {
        let api = BotApi::start();
        break_it(&api);
        let gateway = Gateway::with(Setup::new(&api));
        gateway.wait_for_log("Conflict");
        let log = gateway.log();
        let told = log.lines().find(|line| line.contains("Conflict")).unwrap();
        assert!(told.contains(right) && !told.contains(wrong), "{told}");
        let checked = gateway.run(&["check"]);
        let said = checked.stdout + &checked.stderr;
        assert!(said.contains(right) && !said.contains(wrong), "{said}");
    });
}

/// The firmware sends it at every boot until somebody is registered.
#[test]
fn no_chat_ids() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    for chats in ["", " ", ",", " , ,", "\0"] {
        mote.post_piggybacked("message", message(&api, chats, "21.5 °C"))
            .expect("4.00", "No chat ids: nobody is registered yet");
    }
    assert!(
        gateway
            .log()
            .contains("No chat ids: nobody is registered yet")
    );
    for (chats, text) in [("", ""), ("5", ""), ("5", " ")] {
        mote.post_piggybacked("message", message(&api, chats, text))
            .expect("4.00", "Missing required fields");
    }
    let without_token = form(&api.url(), "", "", "x");
    mote.post_piggybacked("message", without_token)
        .expect("4.00", "Missing required fields");
    assert_eq!(api.count("sendMessage"), 0);
}

// --- check ---

/// A line to paste into the firmware's config.ini.
#[test]
fn check_prints_the_firmwares_line() {
    let scene = Scene::new();
    scene.writes(ADA, "Ada", "hi");
    scene.writes(2_345_678_901, "Anna Maria", "hi");
    scene.writes(3_456_789_012, "r2d2", "hi");
    scene.catch_up();
    let checked = scene.gateway.run(&["check"]);
    assert_eq!(checked.code(), Some(0), "{checked:?}");
    let users = scene.tokens().replace(';', ",");
    let (_, rest) = checked
        .stdout
        .split_once("for the firmware's config.ini:")
        .expect("a heading");
    let line = format!("chat_ids = {users}");
    let is_it = |shown: &str| shown.trim() == line;
    assert!(rest.lines().any(is_it), "{line:?} in {checked:?}");
    assert!(
        users.starts_with("Ada:1234567890,Anna Maria:2345678901,"),
        "{users}"
    );
}

/// `check --settings` reads the configuration and does nothing else: setup.sh asks it before its first change.
#[test]
fn check_of_the_settings() {
    let api = BotApi::start();
    let good = Setup::new(&api);
    let directory = TempDir::new();
    let there = |config: &str, env: &str| {
        fs::write(directory.join("config.ini"), config).unwrap();
        fs::write(directory.join("env"), env).unwrap();
        let mut setup = good
            .clone()
            .env("CREDENTIALS_DIRECTORY", directory.path().display())
            .without("COAP_SERVER_PORT");
        (setup.config, setup.dotenv) = (None, None);
        setup.run(&["check", "--settings"])
    };
    let config = good.config.clone().unwrap();
    let checked = there(&config, "PASSWORD=long-enough\n");
    assert_eq!(checked.code(), Some(0), "{checked:?}");
    assert_eq!(checked.stdout + &checked.stderr, "");
    let checked = there("[telegram]\n", "");
    assert_eq!(checked.code(), Some(0), "{checked:?}");
    let said = checked.stdout + &checked.stderr;
    assert!(
        said.contains("no bot_token") && said.contains("no PASSWORD"),
        "{said}"
    );
    let by_password = format!("{config}registration = password\n");
    let cases = [
        (config.as_str(), "PASSWORD=no\u{a0}break-space\n", "env:1"),
        (&config, "PASSWORD=\u{3000}wide blank\n", "env:1"),
        (
            &config,
            "PASSWORD=good-one\nHTTPS_PROXY=socks5://127.0.0.1:1080\n",
            "env:2",
        ),
        (&config, "COAP_SERVER_PORT=70000\n", "env:1"),
        (&config, "# x\n\nnonsense\n", "env:3"),
        ("[telegram]\nbot_token = 5\n", "", "config.ini:2"),
        (
            "[telegram]\nregistration = maybe\n",
            "PASSWORD=good-one\n",
            "config.ini:2",
        ),
        (
            "[telegram]\nregistration = Password please\n",
            "PASSWORD=good-one\n",
            "config.ini:2",
        ),
        (&by_password, "", "config.ini:4"),
        (&by_password, "PASSWORD=\n", "config.ini:4"),
    ];
    for (config, env, place) in cases {
        let checked = there(config, env);
        let place = format!("{}/{place}", directory.path().display());
        assert_refused(&checked, &[&place]);
        assert_eq!(checked.stdout, "", "{env:?}");
        for secret in ["break-space", "wide blank", "good-one"] {
            assert!(!checked.stderr.contains(secret), "{checked:?}");
        }
    }
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2);
    assert_eq!(api.seen().connections, 0);
    for wrong in [
        &["check", "--setting"][..],
        &["check", "--settings", "x"],
        &["--settings"],
    ] {
        assert_eq!(good.run(wrong).code(), Some(2), "{wrong:?}");
    }
}

/// Each file takes its own names only; an unknown one is a warning that spells it as the file does.
#[test]
fn each_file_has_its_own_names() {
    let api = BotApi::start();
    let setup = Setup::new(&api);
    let config = setup.config.clone().unwrap()
        + "PASSWORD = in-the-wrong-file\nBot_Tokn = x\nHTTPS_PROXY = socks5://127.0.0.1:1\n"
        + "COAP_SERVER_IP = ::\nregistation = password\n";
    let env = "bot_token=5\nurl=nonsense\nPASWORD=sesame-sesame\nmote_token=x x\nNO_PROXY=*\n";
    let gateway = Gateway::with(setup.config(&config).dotenv(env));
    let mote = Mote::new(gateway.address());
    mote.post_separate("message", message(&api, "5", "x"))
        .expect("2.05", SENT);
    let log = gateway.log();
    for name in [
        "config.ini:4: PASSWORD",
        "config.ini:5: Bot_Tokn",
        "config.ini:6: HTTPS_PROXY",
        "config.ini:7: COAP_SERVER_IP",
        "config.ini:8: registation",
        ".env:1: bot_token",
        ".env:2: url",
        ".env:3: PASWORD",
        ".env:4: mote_token",
        ".env:5: NO_PROXY",
    ] {
        let is_it = |line: &str| line.contains("[WARN]") && line.contains(name);
        assert!(log.lines().any(is_it), "{name:?} in {log}");
    }
    assert!(log.contains("no PASSWORD is set"), "{log}");
    for secret in ["in-the-wrong-file", "sesame-sesame"] {
        assert!(!log.contains(secret), "{log}");
    }
}
