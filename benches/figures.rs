//! `cargo bench`: what the release binary costs, as a Markdown table. Everything runs on loopback against the stand-in.
//! Beside the gateway stands the bare HTTPS call: the same request by ureq alone, in a process of its own and in the
//! same run, so that the difference is the gateway's share.

#[path = "../tests/support/mod.rs"]
mod support;

use std::fmt::{self, Display};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs, io, thread};

use support::*;

const MESSAGES: u32 = 2000;
/// The kernel counts CPU time in ticks of 10 ms.
const MESSAGES_FOR_CPU_TIME: u32 = 3 * MESSAGES;
const MESSAGES_UNDER_STRACE: u32 = 500;
const BURST: usize = 300;
const ROUND_TRIP: Duration = Duration::from_millis(50);
const SILENCE: Duration = Duration::from_secs(75);
/// The gateway fetches every 15 s.
const FETCHES_AN_HOUR: u64 = 240;
/// Of a segment on loopback: IPv4, TCP and its timestamps.
const HEADERS: u64 = 52;
const TEN_CHATS: &str = "1,2,3,4,5,6,7,8,9,10";
const TEXT: &str = "CPU Temperature: 25.00 °C";

fn main() {
    let arguments: Vec<String> = env::args().collect();
    if let [_, mode, url, ca] = arguments.as_slice()
        && mode == "bare"
    {
        return answer_with_bare_calls(url, ca);
    }
    println!("| Figure | Bound | Measured |\n|---|---|---|");
    size_and_start();
    idle();
    cost_of_a_message();
    system_calls();
    memory_of_texts_to_ten();
    the_fields_pattern();
    burst();
}

fn row(name: impl Display, bound: &str, value: impl Display) {
    println!("| {name} | {bound} | {value} |");
}

fn milliseconds(time: Duration) -> String {
    format!("{:.2} ms", time.as_secs_f64() * 1e3)
}

/// The value that this share of them does not exceed.
fn quantile(times: &mut [Duration], percent: usize) -> Duration {
    times.sort_unstable();
    times[(times.len() - 1) * percent / 100]
}

fn spread(times: &mut [Duration]) -> String {
    let (median, high) = (quantile(times, 50), quantile(times, 99));
    format!(
        "{} median, {} p99",
        milliseconds(median),
        milliseconds(high)
    )
}

// --- size, start, idle ---

fn size_and_start() {
    let size = fs::metadata(binary()).unwrap().len() as f64 / 1e6;
    row(
        "Stripped binary (x86-64)",
        "1.85 MB",
        format!("{size:.2} MB"),
    );
    let api = BotApi::start();
    let mut gateway = Gateway::stopped(Setup::new(&api));
    let mut start = || {
        let start = Instant::now();
        gateway.launch();
        let mote = Mote::new(gateway.address());
        while !mote.ping(Duration::from_millis(1)) {}
        start.elapsed()
    };
    let mut times: Vec<Duration> = (0..10).map(|_| start()).collect();
    row(
        "Start to first answered ping",
        "",
        milliseconds(quantile(&mut times, 50)),
    );
}

/// After the first fetch, and before the second.
fn idle() {
    let (api, gateway) = start();
    api.wait_for("the first fetch", |seen| seen.count("getUpdates") > 0);
    thread::sleep(Duration::from_secs(1));
    let before = wakeups(&gateway);
    thread::sleep(Duration::from_secs(10));
    let wakeups = (wakeups(&gateway) - before) as f64 / 5.0;
    row("Wakeups in 2 s, idle", "3", format!("{wakeups:.1}"));
    row("Threads, idle", "2", gateway.threads());
    row("RSS, idle", "4 MB", megabytes(&gateway));
}

/// Voluntary context switches of all threads.
fn wakeups(gateway: &Gateway) -> u64 {
    let tasks = fs::read_dir(format!("/proc/{}/task", gateway.pid())).unwrap();
    let of = |task: io::Result<fs::DirEntry>| {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        let name = "voluntary_ctxt_switches:";
        let count = status.lines().find_map(|line| line.strip_prefix(name));
        count.unwrap().trim().parse::<u64>().unwrap()
    };
    tasks.map(of).sum()
}

fn megabytes(gateway: &Gateway) -> String {
    format!("{:.1} MB", gateway.rss_kib() as f64 * 1024.0 / 1e6)
}

// --- one message ---

/// A message's delay until its empty ACK and until its response.
struct Delays {
    acknowledged: Duration,
    answered: Duration,
}

fn timed_message(mote: &Mote, api: &BotApi, chats: &str) -> Delays {
    let request = mote.post("message", message(api, chats, TEXT));
    let start = Instant::now();
    mote.begin(&request);
    let acknowledged = start.elapsed();
    let response = mote.response(&request);
    let answered = start.elapsed();
    mote.acknowledge(&response);
    response.expect("2.05", "Messages sent successfully");
    Delays {
        acknowledged,
        answered,
    }
}

/// User and system time of a process with all its threads, also those that have ended.
fn cpu_time(pid: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, fields) = stat.rsplit_once(')').unwrap();
    let fields: Vec<&str> = fields.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(10 * ticks)
}

fn cost_of_a_message() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    let mut bare = Bare::start(&api);
    bare.call();
    let (own, other) = (cpu_time(gateway.pid()), cpu_time(bare.child.id()));
    let (mut acks, mut answers, mut calls) = (Vec::new(), Vec::new(), Vec::new());
    for number in 1..=MESSAGES_FOR_CPU_TIME {
        let delays = timed_message(&mote, &api, "5");
        acks.push(delays.acknowledged);
        answers.push(delays.answered);
        calls.push(bare.call());
        if number == MESSAGES {
            let name = format!("RSS after {MESSAGES} messages");
            row(name, "6 MB", megabytes(&gateway));
        }
    }
    let own = (cpu_time(gateway.pid()) - own) / MESSAGES_FOR_CPU_TIME;
    let other = (cpu_time(bare.child.id()) - other) / MESSAGES_FOR_CPU_TIME;
    let ratio = own.as_secs_f64() / other.as_secs_f64();
    row("ACK delay", "1 ms", spread(&mut acks));
    row("Message, back to back", "", spread(&mut answers));
    row("… bare HTTPS call", "", spread(&mut calls));
    row("CPU time of a message", "", milliseconds(own));
    row("… bare HTTPS call", "", milliseconds(other));
    row("… ratio", "1.25", format!("{ratio:.2}"));
    row("Connections in all", "", api.seen().connections - 1);
}

/// Ten threads at a time: glibc's allocator gives each an arena.
fn memory_of_texts_to_ten() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    for _ in 0..MESSAGES {
        timed_message(&mote, &api, TEN_CHATS);
    }
    let name = format!("RSS after {MESSAGES} messages to ten chats");
    row(name, "6 MB", megabytes(&gateway));
}

fn system_calls() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    timed_message(&mote, &api, "5");
    let directory = TempDir::new();
    let (table, pid) = (directory.join("strace"), gateway.pid().to_string());
    let mut strace = Command::new("strace");
    strace
        .args(["-f", "-c", "-q", "-p", &pid, "-o"])
        .arg(&table);
    let Ok(mut strace) = strace.spawn() else {
        let name = "System calls of a message";
        return row(name, "25", "not measured: strace is not installed");
    };
    let attached = within(Duration::from_secs(5), || gateway.status("TracerPid") > 0);
    assert!(attached, "strace may not trace the gateway");
    for _ in 0..MESSAGES_UNDER_STRACE {
        timed_message(&mote, &api, "5");
    }
    let interrupt = ["-INT", &strace.id().to_string()];
    Command::new("kill").args(interrupt).status().unwrap();
    strace.wait().unwrap();
    let table = fs::read_to_string(table).unwrap();
    let total = table.lines().find(|line| line.ends_with("total")).unwrap();
    let calls: f64 = total.split_whitespace().nth(3).unwrap().parse().unwrap();
    let each = calls / f64::from(MESSAGES_UNDER_STRACE);
    row("System calls of a message", "25", format!("{each:.1}"));
}

/// The bare HTTPS call: this program again, which makes one for each line that it reads.
struct Bare {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Bare {
    fn start(api: &BotApi) -> Self {
        let mut command = Command::new(env::current_exe().unwrap());
        command
            .args(["bare", &format!("{}{TOKEN}/sendMessage", api.url())])
            .arg(api.ca_path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self {
            child,
            input,
            output,
        }
    }

    /// Duration of the call, without the way to the other process.
    fn call(&mut self) -> Duration {
        self.input.write_all(b"\n").unwrap();
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        Duration::from_nanos(line.trim().parse().expect("the bare call succeeds"))
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// With the settings that the gateway gives its agent, but ureq's own resolver, which looks the host up for every call.
fn answer_with_bare_calls(url: &str, ca: &str) {
    use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
    let pem = fs::read(ca).unwrap();
    let certificate = parse_pem(&pem).find_map(|item| match item {
        Ok(PemItem::Certificate(certificate)) => Some(certificate),
        _ => None,
    });
    let roots = RootCerts::new_with_certs(&[certificate.unwrap()]);
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .tls_config(TlsConfig::builder().root_certs(roots).build())
        .proxy(None)
        .timeout_global(Some(Duration::from_millis(8500)))
        .timeout_connect(Some(Duration::from_secs(5)))
        .timeout_resolve(Some(Duration::from_secs(5)))
        .input_buffer_size(8 << 10)
        .output_buffer_size(8 << 10)
        .max_idle_connections(10)
        .max_idle_connections_per_host(10)
        .max_idle_age(Duration::from_secs(50))
        .build()
        .into();
    for _ in io::stdin().lines() {
        let start = Instant::now();
        let body = serde_json::json!({"chat_id": 5, "text": TEXT}).to_string();
        let mut response = agent
            .post(url)
            .header("content-type", "application/json")
            .send(&body)
            .unwrap();
        response.body_mut().read_to_vec().unwrap();
        println!("{}", start.elapsed().as_nanos());
    }
}

// --- the field's pattern: minutes of silence ---

fn the_fields_pattern() {
    thread::scope(|scope| {
        let bare = scope.spawn(bare_round_trips);
        let motes = [
            ("1", "one chat"),
            ("1,2,3", "three chats"),
            (TEN_CHATS, "ten chats"),
        ]
        .map(|(chats, name)| (name, scope.spawn(move || round_trips(chats))));
        let person = scope.spawn(a_person_writes);
        let traffic = scope.spawn(idle_hour);
        let bounds = ["1 / 1 / 1", "3 / 1 / 1", "3 / 1 / 3"];
        for ((name, measured), bound) in motes.into_iter().zip(bounds) {
            let name = format!("Round trips of a message to {name}: first / next / after 75 s");
            row(name, bound, measured.join().unwrap());
        }
        row("… bare HTTPS call", "", bare.join().unwrap());
        let mut waits = person.join().unwrap();
        let (median, longest) = (quantile(&mut waits, 50), quantile(&mut waits, 100));
        let value = format!("{median:.1?} median, {longest:.1?} longest");
        row("A person is answered while no mote asks", "20 s", value);
        row("An idle hour", "", traffic.join().unwrap());
    });
}

/// In units of the emulated round trip.
struct RoundTrips {
    first: f64,
    next: f64,
    after_silence: f64,
}

impl RoundTrips {
    fn measure(mut message: impl FnMut() -> Duration) -> Self {
        let mut message = || message().as_secs_f64() / ROUND_TRIP.as_secs_f64();
        thread::sleep(Duration::from_secs(5)); // so that no fetch of the gateway's own falls together with a message
        let (first, next) = (message(), message());
        thread::sleep(SILENCE);
        let after_silence = message();
        Self {
            first,
            next,
            after_silence,
        }
    }
}

impl Display for RoundTrips {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            first,
            next,
            after_silence,
        } = self;
        write!(out, "{first:.2} / {next:.2} / {after_silence:.2}")
    }
}

fn round_trips(chats: &str) -> RoundTrips {
    let (api, gateway) = start();
    api.set_round_trip(ROUND_TRIP);
    let mote = Mote::new(gateway.address());
    RoundTrips::measure(|| timed_message(&mote, &api, chats).answered)
}

fn bare_round_trips() -> RoundTrips {
    let api = BotApi::start();
    api.set_round_trip(ROUND_TRIP);
    let mut bare = Bare::start(&api);
    RoundTrips::measure(|| bare.call())
}

/// At five moments between two fetches. Returns how long it took until each was answered.
fn a_person_writes() -> Vec<Duration> {
    let (api, _gateway) = start();
    api.set_round_trip(ROUND_TRIP);
    api.wait_for("the first fetch", |seen| seen.count("getUpdates") > 0);
    let write = |after_fetch| {
        thread::sleep(Duration::from_secs(after_fetch));
        let (written, start) = (api.count("sendMessage"), Instant::now());
        api.person_writes(1_000_000_000, "Ada", "hi");
        let answered = api.wait_until(Duration::from_secs(60), |seen| {
            seen.count("sendMessage") > written
        });
        assert!(answered, "a person is not answered");
        start.elapsed()
    };
    [0, 3, 6, 9, 12].map(write).to_vec()
}

/// The traffic of some fetches, times as many as an hour has.
fn idle_hour() -> String {
    let (api, _gateway) = start();
    let fetched = |count| {
        let limit = Duration::from_secs(90);
        let fetched = api.wait_until(limit, |seen| seen.count("getUpdates") >= count);
        assert!(fetched, "the gateway fetches nothing");
        thread::sleep(Duration::from_secs(1)); // the last ACK of TCP
        Traffic::of_connections_to(api.address().port())
    };
    let (before, after) = (fetched(1), fetched(5));
    let hour = |counter: fn(&Traffic) -> u64| {
        (counter(&after) - counter(&before)) * FETCHES_AN_HOUR / 4 / 1000
    };
    let (sent, received) = (hour(|it| it.sent), hour(|it| it.received));
    let segments = hour(|it| it.segments * HEADERS);
    format!("{sent} kB to Telegram, {received} kB from it, {segments} kB of IP and TCP headers")
}

/// What the kernel has counted of open connections.
struct Traffic {
    sent: u64,
    received: u64,
    /// In both directions.
    segments: u64,
}

impl Traffic {
    fn of_connections_to(port: u16) -> Self {
        let filter = format!("127.0.0.1:{port}");
        let ss = Command::new("ss").args(["-tinH", "dst", &filter]).output();
        let table = String::from_utf8(ss.expect("ss (Debian: iproute2)").stdout).unwrap();
        let sum = |name: &str| -> u64 {
            let fields = table.split_whitespace();
            let values = fields.filter_map(|field| field.strip_prefix(name));
            values.map(|value| value.parse::<u64>().unwrap()).sum()
        };
        Self {
            sent: sum("bytes_sent:"),
            received: sum("bytes_received:"),
            segments: sum("segs_out:") + sum("segs_in:"),
        }
    }
}

// --- many at once ---

/// So many motes at the same moment, each with its own address and with the retransmission of RFC 7252.
fn burst() {
    let api = BotApi::start();
    let gateway = Gateway::with(Setup::ipv4(&api));
    api.set_round_trip(ROUND_TRIP);
    let payload = message(&api, "5", TEXT);
    let exchange = |number: usize| {
        let address = format!("127.0.{}.{}", 1 + number / 250, 1 + number % 250);
        let mote = Mote::at(&address, gateway.address());
        let ack_timeout = Duration::from_millis(2000 + number as u64 * 1000 / BURST as u64);
        let begun = Instant::now();
        let response = mote.reliable(&mote.post("message", &payload), ack_timeout, PATIENCE)?;
        (response.code() == "2.05").then(|| begun.elapsed())
    };
    let mut times: Vec<Duration> = thread::scope(|scope| {
        let exchange = &exchange;
        let motes: Vec<_> = (0..BURST)
            .map(|number| scope.spawn(move || exchange(number)))
            .collect();
        let answered = motes.into_iter().filter_map(|mote| mote.join().unwrap());
        answered.collect()
    });
    let name = format!("{BURST} messages at once");
    let (count, longest) = (times.len(), quantile(&mut times, 100));
    let value = format!("{count} answered 2.05, the last after {longest:.1?}");
    row(name, "all in 93 s", value);
    row("RSS then", "6 MB", megabytes(&gateway));
}
