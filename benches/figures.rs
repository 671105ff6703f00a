//! `cargo bench`: what the release binary costs, as a Markdown table. Everything runs on loopback against the stand-in;
//! beside the gateway's latency and CPU time stands the bare HTTPS call with the same ureq settings, made in turns with
//! it by a process of its own, so that the difference is the gateway's own share.

#[path = "../tests/support/mod.rs"]
mod support;

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs, io, thread};

use support::Kind::Con;
use support::*;

const MESSAGES: usize = 2000;
const BURST: usize = 1000;
const ROUND_TRIP: Duration = Duration::from_millis(50);
const TEXT: &str = "CPU Temperature: 25.00 °C";

fn main() {
    let arguments: Vec<String> = env::args().collect();
    if let [_, mode, url, ca] = arguments.as_slice()
        && mode == "bare"
    {
        return answer_with_bare_calls(url, ca);
    }
    println!("| Figure | Measured |\n|---|---|");
    size_and_start();
    cost_of_a_message();
    round_trips();
    burst();
}

fn row(name: &str, value: impl std::fmt::Display) {
    println!("| {name} | {value} |");
}

fn milliseconds(time: Duration) -> String {
    format!("{:.2} ms", time.as_secs_f64() * 1e3)
}

/// Median and 99th percentile.
fn spread(times: &mut [Duration]) -> String {
    times.sort_unstable();
    let (median, high) = (times[times.len() / 2], times[times.len() * 99 / 100]);
    format!(
        "{} median, {} p99",
        milliseconds(median),
        milliseconds(high)
    )
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// User and system time of a process with all its threads, also those that have ended. The kernel counts in ticks of
/// 10 ms here.
fn cpu_time(pid: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat
        .rsplit_once(')')
        .unwrap()
        .1
        .split_whitespace()
        .collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(10 * ticks)
}

/// Voluntary context switches of all threads.
fn wakeups(pid: u32) -> u64 {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let of = |task: io::Result<fs::DirEntry>| {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap_or_default();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        line.map_or(0, |count| count.trim().parse().unwrap())
    };
    tasks.map(of).sum()
}

fn size_and_start() {
    row(
        "Size of the binary",
        format!("{} bytes", fs::metadata(binary()).unwrap().len()),
    );
    let api = BotApi::start();
    let mut gateway = Gateway::stopped(Setup::new(&api));
    let mut times: Vec<Duration> = (0..10)
        .map(|_| {
            let start = Instant::now();
            gateway.launch();
            let mote = Mote::new(gateway.address());
            while !mote.ping(Duration::from_millis(1)) {}
            start.elapsed()
        })
        .collect();
    row(
        "Start to first answered ping",
        milliseconds(median(&mut times)),
    );
    thread::sleep(Duration::from_secs(1));
    let before = wakeups(gateway.pid());
    thread::sleep(Duration::from_secs(5));
    row(
        "Idle wakeups per second",
        format!("{:.1}", (wakeups(gateway.pid()) - before) as f64 / 5.0),
    );
    row(
        "RSS idle, threads",
        format!("{} KiB, {}", gateway.rss_kib(), gateway.threads()),
    );
}

/// A message's delay until its empty ACK and until its response, which is acknowledged.
fn timed_message(mote: &Mote, api: &BotApi, chats: &str) -> (Duration, Duration) {
    let request = mote.post("message", message(api, chats, TEXT));
    let start = Instant::now();
    mote.begin(&request);
    let acknowledged = start.elapsed();
    let response = mote.response(&request);
    let answered = start.elapsed();
    mote.acknowledge(&response);
    response.expect("2.05", "Messages sent successfully");
    (acknowledged, answered)
}

fn cost_of_a_message() {
    let (api, gateway) = start();
    let mote = Mote::new(gateway.address());
    let mut bare = Bare::start(&api);
    for _ in 0..50 {
        timed_message(&mote, &api, "5");
        bare.call();
    }
    let (connections, threads) = (api.seen().connections, gateway.threads());
    let (own, other) = (cpu_time(gateway.pid()), cpu_time(bare.child.id()));
    let (mut acks, mut answers, mut calls) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..MESSAGES {
        let (ack, answer) = timed_message(&mote, &api, "5");
        acks.push(ack);
        answers.push(answer);
        calls.push(bare.call());
    }
    let own = (cpu_time(gateway.pid()) - own) / MESSAGES as u32;
    let other = (cpu_time(bare.child.id()) - other) / MESSAGES as u32;
    row("ACK delay", spread(&mut acks));
    row("Message latency", spread(&mut answers));
    row("Latency of the bare HTTPS call", spread(&mut calls));
    let share = median(&mut answers).saturating_sub(median(&mut calls));
    row(
        "Gateway's own share of the latency (median)",
        milliseconds(share),
    );
    row("CPU time of a message", milliseconds(own));
    row("CPU time of the bare HTTPS call", milliseconds(other));
    row(
        "Ratio",
        format!("{:.2}", own.as_secs_f64() / other.as_secs_f64()),
    );
    let new = api.seen().connections - connections;
    row(
        &format!("Connections used by {MESSAGES} messages, opened meanwhile"),
        format!("1, {new}"),
    );
    within(Duration::from_secs(2), || gateway.threads() <= threads);
    let after = format!("{} KiB, {}", gateway.rss_kib(), gateway.threads());
    row(&format!("RSS after {MESSAGES} messages, threads"), after);
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
            .arg(api.ca_path());
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (input, output) = (
            child.stdin.take().unwrap(),
            BufReader::new(child.stdout.take().unwrap()),
        );
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
        .input_buffer_size(4 << 10)
        .output_buffer_size(4 << 10)
        .max_idle_connections(10)
        .max_idle_connections_per_host(10)
        .max_idle_age(Duration::from_secs(60))
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

fn round_trips() {
    for (name, chats) in [("one chat", "1"), ("ten chats", "1,2,3,4,5,6,7,8,9,10")] {
        let (api, gateway) = start();
        api.set_round_trip(ROUND_TRIP);
        let mote = Mote::new(gateway.address());
        let trips = || {
            let (_, time) = timed_message(&mote, &api, chats);
            format!(
                "{:.2} ({})",
                time.as_secs_f64() / ROUND_TRIP.as_secs_f64(),
                milliseconds(time)
            )
        };
        row(&format!("Round trips of 50 ms, {name}, cold"), trips());
        row(&format!("Round trips of 50 ms, {name}, warm"), trips());
        row(&format!("Connections used, {name}"), api.seen().connections);
    }
}

/// So many motes within a second, each with its own address and with the retransmission of RFC 7252.
fn burst() {
    allow_sockets();
    let api = BotApi::start();
    let gateway = Gateway::with(Setup::ipv4(&api));
    api.set_round_trip(ROUND_TRIP);
    let threads = gateway.threads();
    let payload = message(&api, "5", TEXT);
    let start = Instant::now();
    let (mut times, mut peak) = (Vec::new(), 0);
    thread::scope(|scope| {
        let run = |number: usize| {
            let mote = Mote::at(
                &format!("127.0.{}.{}", 1 + number / 250, 1 + number % 250),
                gateway.address(),
            );
            let request = mote.request(Con, POST, "message").payload(&payload);
            thread::sleep(Duration::from_millis(number as u64));
            let begun = Instant::now();
            let response = mote
                .persist(&request, Duration::from_millis(number as u64))
                .expect("an answer");
            (response.code() == "2.05").then(|| begun.elapsed())
        };
        let mote = |number| {
            thread::Builder::new()
                .stack_size(128 << 10)
                .spawn_scoped(scope, move || run(number))
        };
        let motes: Vec<_> = (0..BURST).map(|number| mote(number).unwrap()).collect();
        while motes.iter().any(|mote| !mote.is_finished()) {
            peak = peak.max(gateway.threads());
            thread::sleep(Duration::from_millis(20));
        }
        times.extend(motes.into_iter().filter_map(|mote| mote.join().unwrap()));
    });
    let name = format!("Burst of {BURST} messages, 50 ms away");
    row(
        &name,
        format!(
            "{} answered 2.05 in {:.1} s",
            times.len(),
            start.elapsed().as_secs_f64()
        ),
    );
    row("… each", spread(&mut times));
    row(
        "… connections opened, threads at most",
        format!("{}, {peak}", api.seen().connections),
    );
    within(Duration::from_secs(2), || gateway.threads() <= threads);
    row(
        "… RSS and threads afterwards",
        format!("{} KiB, {}", gateway.rss_kib(), gateway.threads()),
    );
}
