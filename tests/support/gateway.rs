//! The real gateway, run in a directory and an environment of its own.

use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};
use std::{env, process, thread};

use super::{BotApi, Mote, PATIENCE, TempDir, within};

/// `PASSWORD` of every gateway unless told otherwise.
pub const PASSWORD: &str = "correct-horse-battery";

/// The gateway's executable: cargo names it to tests and benches; an example looks beside itself.
pub fn binary() -> PathBuf {
    if let Some(path) = option_env!("CARGO_BIN_EXE_coap_websocket") {
        return path.into();
    }
    let example = env::current_exe().expect("path of this executable");
    let profile = example
        .parent()
        .and_then(Path::parent)
        .expect("target/<profile>/examples/");
    profile.join("coap_websocket")
}

/// `::1`, as motes speak IPv6; `127.0.0.1` where this machine does not, as in some containers.
pub fn loopback() -> IpAddr {
    static LOOPBACK: LazyLock<IpAddr> = LazyLock::new(|| {
        let ipv6 = IpAddr::from(Ipv6Addr::LOCALHOST);
        match UdpSocket::bind((ipv6, 0)) {
            Ok(_) => ipv6,
            Err(_) => Ipv4Addr::LOCALHOST.into(),
        }
    });
    *LOOPBACK
}

/// A UDP port that nothing uses. It lies outside the range from which the system takes ports by itself, so that no
/// socket of another test can take it before the gateway does, also while a gateway is restarted.
pub fn free_udp_port() -> u16 {
    static BLOCK: LazyLock<PortBlock> = LazyLock::new(PortBlock::claim);
    // Not tried with a socket: a program that another thread starts just then would hold a copy of it for a moment.
    let used = fs::read_to_string("/proc/net/udp").unwrap()
        + &fs::read_to_string("/proc/net/udp6").unwrap_or_default();
    for _ in 0..PortBlock::PORTS {
        let port = BLOCK.next();
        if !used.contains(&format!(":{port:04X} ")) {
            return port;
        }
    }
    panic!("no free UDP port");
}

/// A session begins with 1,024 open files, which is too few for tests that run at the same time, and may take more.
fn raise_file_limit() {
    let this = process::id().to_string();
    let mut prlimit = Command::new("prlimit");
    prlimit.args(["--pid", &this, "--nofile=8192:"]);
    let _ = prlimit.stderr(Stdio::null()).status();
}

/// Ports of this process alone, as long as it holds the first one's namesake of TCP.
struct PortBlock {
    first: u16,
    given: AtomicU16,
    _held: TcpListener,
}

impl PortBlock {
    const PORTS: u16 = 1_500;

    fn claim() -> Self {
        raise_file_limit();
        for first in (20_000..32_000).step_by(Self::PORTS.into()) {
            if let Ok(held) = TcpListener::bind(("127.0.0.1", first)) {
                return Self {
                    first,
                    given: AtomicU16::new(0),
                    _held: held,
                };
            }
        }
        panic!("eight other programs of these tests run");
    }

    fn next(&self) -> u16 {
        self.first + self.given.fetch_add(1, Ordering::Relaxed) % Self::PORTS
    }
}

/// What a gateway is started with.
#[derive(Clone)]
pub struct Setup {
    pub ip: String,
    /// Text of `config.ini`; no file if none.
    pub config: Option<String>,
    /// Text of `.env`; no file if none.
    pub dotenv: Option<String>,
    /// The environment, in full.
    pub env: Vec<(String, String)>,
    /// Variables that are not set although they usually are.
    pub removed: Vec<&'static str>,
    /// What must never be seen in what the gateway writes.
    pub secrets: Vec<String>,
}

impl Setup {
    /// The usual one: the stand-in's url, token and certificate, and a password.
    pub fn new(api: &BotApi) -> Self {
        Self {
            ip: loopback().to_string(),
            config: Some(format!(
                "[telegram]\nbot_token = {}\nurl = {}\n",
                api.token(),
                api.url()
            )),
            dotenv: Some(format!("PASSWORD={PASSWORD}\n")),
            env: vec![(
                "SSL_CERT_FILE".to_string(),
                api.ca_path().display().to_string(),
            )],
            removed: Vec::new(),
            secrets: vec![api.token().to_string(), PASSWORD.to_string()],
        }
    }

    /// As [`Setup::new`], on `127.0.0.1`, so that motes can have addresses of their own.
    pub fn ipv4(api: &BotApi) -> Self {
        Self {
            ip: "127.0.0.1".to_string(),
            ..Self::new(api)
        }
    }

    pub fn env(mut self, name: &str, value: impl ToString) -> Self {
        self.env.retain(|(other, _)| other != name);
        self.env.push((name.to_string(), value.to_string()));
        self
    }

    /// Without a variable that would be there otherwise.
    pub fn without(mut self, name: &'static str) -> Self {
        self.removed.push(name);
        self
    }

    pub fn config(mut self, text: &str) -> Self {
        self.config = Some(text.to_string());
        self
    }

    pub fn dotenv(mut self, text: &str) -> Self {
        self.dotenv = Some(text.to_string());
        self
    }

    fn write_files(&self, directory: &Path) {
        let write = |name: &str, text: &Option<String>| match text {
            Some(text) => fs::write(directory.join(name), text).unwrap(),
            None => drop(fs::remove_file(directory.join(name))),
        };
        write("config.ini", &self.config);
        write(".env", &self.dotenv);
    }

    fn command(&self, directory: &Path, port: u16) -> Command {
        let mut command = Command::new(binary());
        command
            .current_dir(directory)
            .env_clear()
            .stdin(Stdio::null());
        command
            .env("COAP_SERVER_IP", &self.ip)
            .env("COAP_SERVER_PORT", port.to_string());
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        for name in &self.removed {
            command.env_remove(name);
        }
        command
    }

    /// Runs the gateway's executable in a new directory until it ends, with these arguments.
    pub fn run(&self, arguments: &[&str]) -> Finished {
        let directory = TempDir::new();
        self.write_files(directory.path());
        self.run_in(directory.path(), free_udp_port(), arguments)
    }

    fn run_in(&self, directory: &Path, port: u16, arguments: &[&str]) -> Finished {
        let streams = TempDir::new();
        let (out, err) = (streams.join("out"), streams.join("err"));
        let mut command = self.command(directory, port);
        command
            .args(arguments)
            .stdout(File::create(&out).unwrap())
            .stderr(File::create(&err).unwrap());
        let mut child = command.spawn().expect("start the gateway");
        let mut status = None;
        let ended = within(Duration::from_secs(20), || {
            status = child.try_wait().unwrap();
            status.is_some()
        });
        if !ended {
            let _ = child.kill();
            let _ = child.wait();
        }
        let read = |path: &Path| String::from_utf8_lossy(&fs::read(path).unwrap()).into_owned();
        let finished = Finished {
            status,
            stdout: read(&out),
            stderr: read(&err),
        };
        assert!(
            ended,
            "`coap_websocket {}` does not end: {finished:?}",
            arguments.join(" ")
        );
        finished
    }
}

/// How a run of the executable ended.
#[derive(Debug)]
pub struct Finished {
    status: Option<ExitStatus>,
    pub stdout: String,
    pub stderr: String,
}

impl Finished {
    pub fn code(&self) -> Option<i32> {
        self.status.and_then(|status| status.code())
    }
}

/// A running gateway; killed, and its directory removed, with the value.
pub struct Gateway {
    pub setup: Setup,
    port: u16,
    child: Option<Child>,
    directory: TempDir,
}

impl Gateway {
    /// Started, and it answers a ping; its first fetch may still be under way.
    pub fn with(setup: Setup) -> Self {
        let mut gateway = Self::stopped(setup);
        gateway.restart();
        gateway
    }

    /// Its files are there, and others can be put beside them; [`Gateway::restart`] starts it.
    pub fn stopped(setup: Setup) -> Self {
        let directory = TempDir::new();
        fs::create_dir(directory.join("work")).unwrap();
        setup.write_files(&directory.join("work"));
        Self {
            setup,
            port: free_udp_port(),
            child: None,
            directory,
        }
    }

    /// Kills the gateway if it runs, and starts it in the same directory and on the same port.
    pub fn restart(&mut self) {
        self.launch();
        let mote = Mote::new(self.address());
        let end = Instant::now() + Duration::from_secs(10);
        let mut patience = Duration::from_millis(20);
        while !mote.ping(patience) {
            patience *= 2; // the machine may be slow
            if let Some(status) = self.child.as_mut().unwrap().try_wait().unwrap() {
                panic!("the gateway ended with {status}:\n{}", self.output());
            }
            assert!(
                Instant::now() < end,
                "the gateway does not answer a ping:\n{}",
                self.output()
            );
        }
    }

    /// As [`Gateway::restart`], without waiting until it answers.
    pub fn launch(&mut self) {
        let stdout = self.stream("stdout");
        self.launch_to(stdout);
    }

    fn stream(&self, name: &str) -> File {
        let mut options = File::options();
        options.create(true).append(true);
        options.open(self.directory.join(name)).unwrap()
    }

    /// As [`Gateway::launch`], with another standard output.
    pub fn launch_to(&mut self, stdout: File) {
        self.kill9();
        let mut command = self.setup.command(&self.directory(), self.port);
        let child = command.stdout(stdout).stderr(self.stream("stderr")).spawn();
        self.child =
            Some(child.unwrap_or_else(|error| panic!("start {}: {error}", binary().display())));
    }

    /// Ends the gateway at once, in the middle of whatever it does.
    pub fn kill9(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    pub fn is_running(&mut self) -> bool {
        self.child
            .as_mut()
            .is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    pub fn address(&self) -> SocketAddr {
        let (ip, zone) = self
            .setup
            .ip
            .split_once('%')
            .unwrap_or((&self.setup.ip, ""));
        let mut address = SocketAddr::new(ip.parse().expect("a literal address"), self.port);
        if let SocketAddr::V6(address) = &mut address
            && let Ok(index) = fs::read_to_string(format!("/sys/class/net/{zone}/ifindex"))
        {
            address.set_scope_id(index.trim().parse().unwrap());
        }
        address
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("the gateway runs").id()
    }

    /// Its working directory.
    pub fn directory(&self) -> PathBuf {
        self.directory.join("work")
    }

    pub fn file(&self, name: &str) -> String {
        String::from_utf8_lossy(&fs::read(self.directory().join(name)).unwrap_or_default())
            .into_owned()
    }

    pub fn log(&self) -> String {
        self.file("coap_server.log")
    }

    pub fn state(&self) -> String {
        self.file("state.json")
    }

    /// What it wrote to standard output and standard error since the first start.
    pub fn output(&self) -> String {
        let read = |name| {
            String::from_utf8_lossy(&fs::read(self.directory.join(name)).unwrap_or_default())
                .into_owned()
        };
        read("stdout") + &read("stderr")
    }

    /// Runs the executable beside the running gateway: same directory, environment and port.
    pub fn run(&self, arguments: &[&str]) -> Finished {
        self.setup.run_in(&self.directory(), self.port, arguments)
    }

    /// Waits some seconds until the log holds `text`.
    #[track_caller]
    pub fn wait_for_log(&self, text: &str) {
        let found = within(Duration::from_secs(10), || self.log().contains(text));
        assert!(found, "never logged: {text:?}\n{}", self.log());
    }

    /// Asserts that nothing the gateway wrote for people holds a token or a password.
    #[track_caller]
    pub fn assert_no_secret(&self) {
        for (place, text) in [
            ("output", self.output()),
            ("log", self.log()),
            ("old log", self.file("coap_server.log.1")),
        ] {
            for secret in &self.setup.secrets {
                assert!(
                    !text.contains(secret),
                    "the {place} holds the secret {secret}:\n{text}"
                );
            }
        }
    }

    /// A number from `/proc/<pid>/status`, as `VmRSS` (KiB) or `Threads`.
    pub fn status(&self, name: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    pub fn threads(&self) -> u64 {
        self.status("Threads")
    }

    pub fn rss_kib(&self) -> u64 {
        self.status("VmRSS")
    }

    pub fn open_files(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid()))
            .unwrap()
            .count()
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.kill9();
        if thread::panicking() {
            let output = self.output();
            let lines: Vec<&str> = output.lines().collect();
            let last = &lines[lines.len().saturating_sub(500)..];
            eprintln!(
                "--- the gateway of the failed test wrote, at the end:\n{}",
                last.join("\n")
            );
            return;
        }
        self.assert_no_secret();
        let output = self.output();
        assert!(
            !output.contains("panicked at"),
            "the gateway panicked:\n{output}"
        );
    }
}
