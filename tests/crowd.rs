//! 1,000 motes at once, each with an address of its own and with the retransmission of RFC 7252: the gateway works for
//! 32 at a time and leaves the others unacknowledged.

mod support;

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::{fs, thread};

use support::*;

const MOTES: usize = 1000;
const SENT: &str = "Messages sent successfully";
/// A thread lives a moment longer than the request that it works for.
const THREADS_MAX: u64 = 2 * 32;
/// 8 MB; an unoptimised gateway has larger code and larger stacks.
const RSS_MAX_KIB: u64 = if cfg!(debug_assertions) {
    18_000_000
} else {
    8_000_000
} / 1024;

/// One crowd after the other, also when all tests run.
static TURN: Mutex<()> = Mutex::new(());

fn mote(number: usize, gateway: &Gateway) -> Mote {
    Mote::at(
        &format!("127.0.{}.{}", 1 + number / 250, 1 + number % 250),
        gateway.address(),
    )
}

/// Each mote sends its text to chat 5, all within a second. The codes that they are answered with, none where a mote has
/// given up; and the most threads that the gateway had meanwhile.
fn crowd(api: &BotApi, gateway: &Gateway) -> (Vec<Option<String>>, u64) {
    allow_sockets();
    let start = Instant::now() + Duration::from_millis(500);
    thread::scope(|scope| {
        let exchange = move |number: usize| {
            let mote = mote(number, gateway);
            let request = mote.post("message", message(api, "5", &format!("text {number}")));
            let moment = Duration::from_millis(number as u64);
            thread::sleep((start + moment).saturating_duration_since(Instant::now()));
            let response = mote.persist(&request, moment)?;
            response.expect(
                &response.code(),
                if response.code() == "2.05" { SENT } else { "" },
            );
            Some(response.code())
        };
        let mote = |number| {
            thread::Builder::new()
                .stack_size(128 << 10)
                .spawn_scoped(scope, move || exchange(number))
        };
        let motes: Vec<_> = (0..MOTES).map(|number| mote(number).unwrap()).collect();
        let mut threads = 0;
        while motes.iter().any(|mote| !mote.is_finished()) {
            threads = threads.max(gateway.threads());
            thread::sleep(Duration::from_millis(20));
        }
        (
            motes.into_iter().map(|mote| mote.join().unwrap()).collect(),
            threads,
        )
    })
}

/// No more threads and memory than are allowed for, and none of the threads once all is over.
fn assert_bounded(gateway: &Gateway, idle: u64, threads: u64) {
    println!(
        "{} KiB at most, {} now; {threads} threads at most",
        gateway.status("VmHWM"),
        gateway.rss_kib()
    );
    assert!(
        threads <= idle + THREADS_MAX,
        "{threads} threads, {idle} when idle"
    );
    assert!(
        gateway.status("VmHWM") <= RSS_MAX_KIB,
        "{} KiB",
        gateway.status("VmHWM")
    );
    assert!(
        within(Duration::from_secs(2), || gateway.threads() == idle),
        "{} threads are left",
        gateway.threads()
    );
}

/// The numbers of the texts that Telegram got, each once.
fn texts(api: &BotApi) -> Vec<usize> {
    let number = |text: &String| text.strip_prefix("text ").unwrap().parse().unwrap();
    let mut numbers: Vec<usize> = api.texts_to(5).iter().map(number).collect();
    numbers.sort_unstable();
    let twice = numbers.windows(2).find(|pair| pair[0] == pair[1]);
    assert_eq!(twice, None, "a text was sent twice");
    numbers
}

/// How long a ping takes: by the clock, and without the time for which its two threads stood in the queue for a processor
/// (where the kernel tells it), for that is the other programs' doing.
fn ping(mote: &Mote, gateway: &Gateway) -> (Duration, Duration) {
    let queued = || {
        let of = |thread: &str| {
            fs::read_to_string(format!("/proc/{thread}/schedstat")).unwrap_or_default()
        };
        let queued = |stat: String| {
            stat.split_whitespace()
                .nth(1)
                .map_or(0, |time| time.parse().unwrap())
        };
        Duration::from_nanos(queued(of("thread-self")) + queued(of(&gateway.pid().to_string())))
    };
    let before = queued();
    let start = Instant::now();
    assert!(mote.ping(PATIENCE), "a ping is lost");
    let taken = start.elapsed();
    (taken, taken.saturating_sub(queued() - before))
}

/// Telegram is 50 ms away: everybody is served.
#[test]
fn every_mote_is_served() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let api = BotApi::start();
    let gateway = Gateway::with(Setup::ipv4(&api));
    api.set_round_trip(Duration::from_millis(50));
    let idle = gateway.threads();
    let start = Instant::now();
    let (codes, threads) = crowd(&api, &gateway);
    println!(
        "{:.1} s, {} connections",
        start.elapsed().as_secs_f64(),
        api.seen().connections
    );
    let served = codes
        .iter()
        .flatten()
        .filter(|code| *code == "2.05")
        .count();
    assert_eq!(served, MOTES);
    assert_eq!(texts(&api), Vec::from_iter(0..MOTES));
    assert_bounded(&gateway, idle, threads);
}

/// Telegram takes every text and answers none: the gateway stays awake, tells those motes that it works for, and serves
/// again as soon as Telegram does.
#[test]
#[ignore = "takes minutes: cargo test --release --test crowd -- --include-ignored"]
fn telegram_hangs() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let api = BotApi::start();
    let gateway = Gateway::with(Setup::ipv4(&api));
    api.fail(every(""), Fault::Hang);
    let idle = gateway.threads();
    let (codes, threads, mut pings) = thread::scope(|scope| {
        let crowd = scope.spawn(|| crowd(&api, &gateway));
        let mote = mote(MOTES, &gateway);
        let mut pings = Vec::new();
        while !crowd.is_finished() {
            pings.push(ping(&mote, &gateway));
            thread::sleep(Duration::from_millis(75));
        }
        let (codes, threads) = crowd.join().unwrap();
        (codes, threads, pings)
    });
    pings.sort_unstable();
    let (median, (worst, _)) = (pings[pings.len() / 2].0, pings[pings.len() - 1]);
    let own = pings.iter().map(|ping| ping.1).max().unwrap();
    println!(
        "{} pings: median {median:?}, worst {worst:?}, {own:?} without the queue",
        pings.len()
    );
    assert!(
        pings.len() > 500 && own < Duration::from_millis(100),
        "{:?}",
        &pings[pings.len() - 9..]
    );

    let answered: Vec<usize> = (0..MOTES)
        .filter(|number| codes[*number].is_some())
        .collect();
    println!(
        "{} motes are told 5.00, the others have given up",
        answered.len()
    );
    assert!(
        codes.iter().flatten().all(|code| code == "5.00"),
        "{codes:?}"
    );
    assert!(answered.len() > 2 * 32, "places are not used again");
    assert_eq!(
        texts(&api),
        answered,
        "the texts that Telegram got are those of the motes that were answered"
    );

    api.heal();
    let start = Instant::now();
    mote(MOTES, &gateway)
        .post_separate("message", message(&api, "6", "fresh"))
        .expect("2.05", SENT);
    println!("served {:?} after Telegram's return", start.elapsed());
    assert!(start.elapsed() < Duration::from_secs(1));
    assert_bounded(&gateway, idle, threads);
}
