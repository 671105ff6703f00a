//! Motes and people that go on for thousands of messages while the Bot API fails at random: nothing is lost, nothing
//! happens twice, and the gateway is no larger at the end. The same faults in every run; `SEED=7` gives others.

mod support;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Barrier, Mutex};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use support::*;

const MOTES: usize = 8;
/// Ids of those who register and stay; only they know the password.
const RESIDENTS: Range<i64> = 1_000_000_000..1_000_000_005;
/// Of those who come and go. With the residents they are more than the list holds, and as many as there are removals
/// that a mote is told of however long it was silent.
const GUESTS: Range<i64> = 1_000_000_010..1_000_000_020;
/// Of those who guess at the password; more than the gateway counts the guesses of.
const STRANGERS: Range<i64> = 1_000_001_000..1_000_001_300;
/// Of the chats that the motes' firmware was built with.
const BUILT_IN: i64 = 1_000_002_000;
const LIST_MAX: usize = 10;
/// Of the memory at the end against that after the first hundred cycles: glibc's allocator keeps an arena for each of
/// the threads that meet (16 with two cores), and each grows to the most that ever met in it.
const RSS_TOLERANCE_KIB: u64 = 1024;
/// Of the release binary, 8 MB.
const RSS_MAX_KIB: u64 = 8_000_000 / 1024;
/// Of all files of the gateway without its logs: far below what ten thousand of anything would take.
const FILES_MAX: u64 = 256 << 10;
/// As long as the duplicates that the gateway remembers at most.
const SEEN_MAX: usize = 4096;
/// Cycles of one mote between two calls that hang; each costs up to 8.5 s.
const HANG_EACH: usize = 500;

#[test]
fn three_hundred_cycles() {
    // So soon the memory has not found its size yet: each thread takes from whichever of glibc's arenas is free, and
    // each arena grows to the most that ever met in it. So there is one.
    endure(300, |setup| setup.env("MALLOC_ARENA_MAX", 1));
}

#[test]
#[ignore = "takes minutes: cargo test --release --test endurance -- --include-ignored"]
fn ten_thousand_cycles() {
    endure(10_000, |setup| setup);
}

fn endure(cycles: usize, adapt: fn(Setup) -> Setup) {
    let seed = env::var("SEED").map_or(2026, |seed| seed.parse().expect("SEED is a number"));
    println!("SEED={seed}");
    let api = BotApi::start();
    let gateway = Gateway::with(adapt(Setup::ipv4(&api)));
    let idle = gateway.threads();
    let mut people = People {
        random: Numbers(seed),
        wanted: Settings::default(),
        written: BTreeMap::new(),
    };
    RESIDENTS.for_each(|chat| people.register(&api, chat));
    let mut world = World {
        api,
        gateway,
        people: Mutex::new(people),
        outages: AtomicUsize::new(0),
        outage: Mutex::new(()),
        poll_faults: AtomicUsize::new(0),
    };
    let mut motes: Vec<Firmware> = (0..MOTES)
        .map(|number| Firmware::new(&world.gateway, number, seed))
        .collect();

    let start = Instant::now();
    world.run(&mut motes, 100);
    let before = world.size(&mut motes, idle);
    (0..4).for_each(|_| world.run(&mut motes, (cycles - 100) / 4));
    let after = world.size(&mut motes, idle);
    println!(
        "{cycles} cycles in {:?}\nafter 100: {before:?}\nat the end: {after:?}",
        start.elapsed()
    );

    assert!(
        after.rss_kib <= before.rss_kib + RSS_TOLERANCE_KIB,
        "{before:?}, then {after:?}"
    );
    assert!(
        cfg!(debug_assertions) || after.rss_kib <= RSS_MAX_KIB,
        "{after:?}"
    );
    assert!(
        after.threads <= before.threads,
        "{before:?}, then {after:?}"
    );
    assert!(
        after.open_files <= before.open_files,
        "{before:?}, then {after:?}"
    );
    assert!(
        after.state_length <= before.state_length,
        "{before:?}, then {after:?}"
    );
    let files = fs::read_dir(world.gateway.directory())
        .unwrap()
        .map(Result::unwrap);
    let files = files.filter(|file| {
        !file
            .file_name()
            .to_string_lossy()
            .starts_with("coap_server.log")
    });
    let bytes: u64 = files.map(|file| file.metadata().unwrap().len()).sum();
    assert!(bytes <= FILES_MAX, "{bytes} bytes of files");
    judge_texts(&world, &motes);
    judge_answers(&world);
    judge_polls(&mut world, &motes);
}

fn numbers_as_digits(text: &str) -> String {
    text.split(|c: char| c.is_ascii_digit())
        .filter(|part| !part.is_empty())
        .map(|part| format!("{part}0"))
        .collect()
}

/// What must not grow.
#[derive(Debug)]
struct Size {
    rss_kib: u64,
    threads: u64,
    open_files: usize,
    /// Of `state.json`, with each number as one digit: their values grow, their count must not.
    state_length: usize,
}

struct World {
    api: BotApi,
    gateway: Gateway,
    people: Mutex<People>,
    /// Odd while one is under way.
    outages: AtomicUsize,
    /// One at a time.
    outage: Mutex<()>,
    /// So many polls may have failed because `getUpdates` did.
    poll_faults: AtomicUsize,
}

impl World {
    /// So many cycles, shared by all motes, at the same time. Then every mote hears what it has not heard yet.
    fn run(&self, motes: &mut [Firmware], cycles: usize) {
        thread::scope(|scope| {
            for mote in motes.iter_mut() {
                let own = cycles / MOTES + usize::from(mote.number < cycles % MOTES);
                scope.spawn(move || (0..own).for_each(|_| mote.cycle(self)));
            }
        });
        self.catch_up(motes);
    }

    fn catch_up(&self, motes: &mut [Firmware]) {
        self.api.heal();
        for mote in motes {
            while mote.poll(self) {}
            assert_eq!(
                mote.heard,
                self.people.lock().unwrap().wanted,
                "mote {}",
                mote.number
            );
        }
    }

    /// Measured when everything bounded is full: the list, the duplicates, the idle connections, the allocator's arenas.
    fn size(&self, motes: &mut [Firmware], idle: u64) -> Size {
        self.people.lock().unwrap().fill_the_list(&self.api);
        self.catch_up(motes);
        self.api.set_round_trip(Duration::from_millis(100)); // so that the calls overlap
        let together = Barrier::new(motes.len());
        thread::scope(|scope| {
            for mote in motes.iter_mut() {
                let together = &together;
                scope.spawn(move || {
                    for _ in 0..2 {
                        together.wait();
                        mote.send(self, None);
                    }
                });
            }
        });
        self.api.set_round_trip(Duration::ZERO);
        let seen = |mote: &Mote| {
            mote.piggybacked(&mote.post("message", "").option(9, ""))
                .expect_code("4.02")
        };
        (0..SEEN_MAX).for_each(|_| seen(&motes[0].mote));
        let ended = within(Duration::from_secs(5), || self.gateway.threads() <= idle);
        assert!(
            ended,
            "{} threads, {idle} when idle",
            self.gateway.threads()
        );
        thread::sleep(Duration::from_millis(1500)); // it gives memory back when a second was quiet
        Size {
            rss_kib: self.gateway.rss_kib(),
            threads: self.gateway.threads(),
            open_files: self.gateway.open_files(),
            state_length: numbers_as_digits(&self.gateway.state()).len(),
        }
    }

    /// Connections break, whatever is under way on them, and sometimes new ones are refused for a while.
    fn fail(&self, random: &mut Numbers) {
        let _one = self.outage.lock().unwrap();
        self.outages.fetch_add(1, SeqCst);
        match random.below(4) {
            0 => self.api.close_connections(),
            1 => {
                self.api.fail_connections(1, ConnectionFault::Close);
                self.api.close_connections();
            }
            2 => {
                self.api.refuse();
                thread::sleep(Duration::from_millis(random.below(300) as u64));
                self.api.accept_again();
            }
            // Longer than the gateway tries again.
            _ => {
                self.api.refuse();
                thread::sleep(Duration::from_millis(1200));
                self.api.accept_again();
            }
        }
        self.outages.fetch_add(1, SeqCst);
    }

    /// Runs an exchange; true if there was no outage meanwhile.
    fn calm<T>(&self, exchange: impl FnOnce() -> T) -> (T, bool) {
        let before = self.outages.load(SeqCst);
        let result = exchange();
        (
            result,
            before.is_multiple_of(2) && self.outages.load(SeqCst) == before,
        )
    }
}

// --- people ---

/// What a mote keeps of the tokens that it hears.
#[derive(Clone, Debug, Default, PartialEq)]
struct Settings {
    interval: String,
    feedback: String,
    users: BTreeMap<i64, String>,
}

impl Settings {
    fn take(&mut self, reply: &str) {
        for token in reply.split(';') {
            match token.split_once(':') {
                Some((name, id)) => drop(self.users.insert(id.parse().unwrap(), name.to_string())),
                None if token.starts_with('i') => self.interval = token.to_string(),
                None if token.starts_with('f') => self.feedback = token.to_string(),
                None => drop(self.users.remove(&token[1..].parse().expect("r<id>"))),
            }
        }
    }
}

/// Everybody who writes, one at a time, and what they want to come of it.
struct People {
    random: Numbers,
    wanted: Settings,
    /// Messages of each chat.
    written: BTreeMap<i64, usize>,
}

impl People {
    fn write(&mut self, api: &BotApi, chat: i64, text: &str) {
        api.person_writes(chat, &format!("P{}", chat % 1_000_000_000), text);
        *self.written.entry(chat).or_default() += 1;
    }

    fn register(&mut self, api: &BotApi, chat: i64) {
        self.write(api, chat, "hi");
        if self.wanted.users.len() < LIST_MAX {
            self.wanted
                .users
                .insert(chat, format!("P{}", chat % 1_000_000_000));
        }
    }

    fn remove(&mut self, api: &BotApi, chat: i64) {
        self.write(api, chat, "remove me");
        self.wanted.users.remove(&chat);
    }

    fn set_interval(&mut self, api: &BotApi, chat: i64, minutes: usize) {
        self.write(api, chat, &format!("config {PASSWORD} interval {minutes}"));
        self.wanted.interval = format!("i{minutes}");
    }

    fn set_feedback(&mut self, api: &BotApi, chat: i64, on: usize) {
        self.write(api, chat, &format!("config {PASSWORD} feedback {on}"));
        self.wanted.feedback = format!("f{on}");
    }

    /// Everybody is known, as many as possible are registered, and each setting was changed.
    fn fill_the_list(&mut self, api: &BotApi) {
        GUESTS.for_each(|chat| self.remove(api, chat));
        GUESTS.for_each(|chat| self.register(api, chat));
        [1, 0]
            .into_iter()
            .for_each(|on| self.set_feedback(api, RESIDENTS.start, on));
        [119, 120]
            .into_iter()
            .for_each(|minutes| self.set_interval(api, RESIDENTS.start, minutes));
    }

    fn somebody_writes(&mut self, api: &BotApi) {
        let mut one_of = |ids: Range<i64>| ids.start + self.random.below(ids.count()) as i64;
        let (resident, guest, stranger) = (one_of(RESIDENTS), one_of(GUESTS), one_of(STRANGERS));
        let number = self.random.below(21) + 100;
        match self.random.below(10) {
            // Nobody registers by a wrong password, for the list is full.
            0 | 1 if self.wanted.users.len() == LIST_MAX => {
                self.write(
                    api,
                    stranger,
                    &format!("config let-me-in interval {number}"),
                );
            }
            0..3 => self.remove(api, guest),
            3..6 => self.register(api, guest),
            6 | 7 => self.set_interval(api, resident, number),
            8 => self.set_feedback(api, resident, number % 2),
            _ => self.write(
                api,
                resident,
                &format!("config {PASSWORD} interval {}", number + 21),
            ),
        }
    }
}

// --- motes ---

/// What happens to the calls that bring one text to its chats.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Trouble {
    /// HTTP 500.
    Refused,
    /// HTTP 429 for a minute.
    Flooded,
    /// HTTP 429 for a second, once: it goes again in time.
    Delayed,
    /// Carried out, but the connection ends without an answer.
    Unanswered,
    /// Carried out, but never answered.
    Hangs,
}

impl Trouble {
    fn fault(self) -> Fault {
        match self {
            Self::Refused => Fault::error(500, "Internal Server Error"),
            Self::Flooded => Fault::too_many_requests(60),
            Self::Delayed => Fault::too_many_requests(1),
            Self::Unanswered => Fault::CloseUnanswered,
            Self::Hangs => Fault::Hang,
        }
    }
}

/// One POST /message and what came of it.
#[derive(Debug)]
struct Report {
    text: String,
    chats: Vec<i64>,
    /// Of one of the chats, or of all.
    trouble: Option<(Option<i64>, Trouble)>,
    code: String,
    calm: bool,
}

impl Report {
    fn trouble_of(&self, chat: i64) -> Option<Trouble> {
        self.trouble
            .filter(|(only, _)| only.is_none_or(|only| only == chat))
            .map(|(_, trouble)| trouble)
    }
}

/// A mote with the firmware: it reports to whom it has heard of, and polls.
struct Firmware {
    mote: Mote,
    number: usize,
    random: Numbers,
    cycle: usize,
    heard: Settings,
    reports: Vec<Report>,
    /// Polls that failed without an outage.
    failed_polls: usize,
}

impl Firmware {
    fn new(gateway: &Gateway, number: usize, seed: u64) -> Self {
        Self {
            mote: Mote::at(&format!("127.0.2.{}", number + 1), gateway.address()),
            number,
            random: Numbers(seed ^ (number as u64 + 1) << 32),
            cycle: 0,
            heard: Settings::default(),
            reports: Vec::new(),
            failed_polls: 0,
        }
    }

    fn cycle(&mut self, world: &World) {
        self.cycle += 1;
        if self.random.below(5) == 0 {
            world.people.lock().unwrap().somebody_writes(&world.api);
        }
        if self.random.below(100) == 0 {
            world.fail(&mut self.random);
        }
        if self.random.below(300) == 0 {
            self.heard = Settings::default(); // the power was cut
        }
        let chats = self.chats();
        let only = Some(chats[self.random.below(chats.len())]);
        let trouble = match self.random.below(100) {
            _ if self.cycle.is_multiple_of(HANG_EACH) => Some((only, Trouble::Hangs)),
            0 | 1 => Some((only, Trouble::Refused)),
            2 | 3 => Some((only, Trouble::Flooded)),
            4 | 5 => Some((only, Trouble::Delayed)),
            6 | 7 => Some((only, Trouble::Unanswered)),
            8 => Some((None, Trouble::Refused)),
            9 => Some((None, Trouble::Unanswered)),
            _ => None,
        };
        self.send(world, trouble);
        self.plan_a_poll_fault(world);
        self.poll(world);
    }

    fn chats(&self) -> Vec<i64> {
        if self.heard.users.is_empty() {
            vec![BUILT_IN + self.number as i64]
        } else {
            self.heard.users.keys().copied().collect()
        }
    }

    fn send(&mut self, world: &World, trouble: Option<(Option<i64>, Trouble)>) {
        let text = format!("mote {} text {}", self.number, self.reports.len());
        if let Some((only, trouble)) = trouble {
            let calls = if only.is_some() {
                next(1, "sendMessage")
            } else {
                every("sendMessage")
            };
            let calls = only
                .into_iter()
                .fold(calls.saying(&text), |calls, chat| calls.to(chat));
            world.api.fail(calls, trouble.fault());
        }
        let chats = self.chats();
        let list = chats
            .iter()
            .map(i64::to_string)
            .collect::<Vec<_>>()
            .join(",");
        let payload = message(&world.api, &list, &text);
        let (response, calm) = world.calm(|| self.mote.post_separate("message", payload));
        self.reports.push(Report {
            text,
            chats,
            trouble,
            code: response.code(),
            calm,
        });
    }

    /// Whichever mote's `getUpdates` is next.
    fn plan_a_poll_fault(&mut self, world: &World) {
        let (fault, polls) = match self.random.below(200) {
            // Those of all motes wait for the one that hangs.
            _ if self.number < 2 && self.cycle.is_multiple_of(HANG_EACH + 7 * self.number) => {
                (Fault::Hang, MOTES)
            }
            0 => (Fault::too_many_requests(1), 1),
            1 | 2 => (Fault::error(500, "Internal Server Error"), 1),
            3 | 4 => (Fault::conflict(), 1),
            5 | 6 => (Fault::CloseUnanswered, 1),
            _ => return,
        };
        world.poll_faults.fetch_add(polls, SeqCst);
        world.api.fail(next(1, "getUpdates"), fault);
    }

    /// True if it heard something new.
    fn poll(&mut self, world: &World) -> bool {
        let (response, calm) = world.calm(|| self.mote.post_separate("update", update(&world.api)));
        match response.code().as_str() {
            "2.05" => self.heard.take(&response.text()),
            "2.03" => response.expect("2.03", "No Updates"),
            _ => {
                response.expect("5.00", "");
                self.failed_polls += usize::from(calm);
            }
        }
        response.code() == "2.05"
    }
}

// --- what must have come of it ---

fn judge_texts(world: &World, motes: &[Firmware]) {
    let mut arrived: HashMap<(String, String), usize> = HashMap::new();
    for sent in world.api.seen().sent {
        *arrived.entry((sent.chat, sent.text)).or_default() += 1;
    }
    let reports: Vec<&Report> = motes.iter().flat_map(|mote| &mote.reports).collect();
    for report in &reports {
        let count = |chat: &i64| {
            arrived
                .get(&(chat.to_string(), report.text.clone()))
                .copied()
                .unwrap_or(0)
        };
        let counts: Vec<usize> = report.chats.iter().map(count).collect();
        let what = || format!("{report:?} arrived {counts:?}");
        assert!(
            ["2.05", "5.00"].contains(&report.code.as_str()),
            "{}",
            what()
        );
        assert!(counts.iter().all(|count| *count <= 1), "twice: {}", what());
        assert!(
            report.code == "5.00" || counts.contains(&1),
            "lost: {}",
            what()
        );
        let mut delivered = false;
        for (chat, count) in report.chats.iter().zip(&counts) {
            let trouble = report.trouble_of(*chat);
            let refused = matches!(trouble, Some(Trouble::Refused | Trouble::Flooded));
            assert!(
                !refused || *count == 0,
                "arrived after it was refused: {}",
                what()
            );
            // A guest may be removed before the mote hears of it.
            let stays = !GUESTS.contains(chat);
            assert!(
                refused || !stays || !report.calm || *count == 1,
                "lost: {}",
                what()
            );
            delivered |= stays && matches!(trouble, None | Some(Trouble::Delayed));
        }
        let failed = report
            .chats
            .iter()
            .all(|chat| !matches!(report.trouble_of(*chat), None | Some(Trouble::Delayed)));
        assert!(
            !report.calm || !delivered || report.code == "2.05",
            "not delivered: {}",
            what()
        );
        assert!(
            !failed || report.code == "5.00",
            "not confirmed: {}",
            what()
        );
    }
    let calm = reports.iter().filter(|report| report.calm).count();
    println!(
        "{} texts, {calm} of them without an outage meanwhile",
        reports.len()
    );
    assert!(
        calm * 2 > reports.len(),
        "{calm} of {} without an outage: too few to prove anything",
        reports.len()
    );
}

/// Every mote has heard everything, see [`World::size`]. So does one that comes now, and one that comes after a restart.
fn judge_polls(world: &mut World, motes: &[Firmware]) {
    for number in [MOTES, MOTES + 1] {
        let mut newcomer = Firmware::new(&world.gateway, number, 0);
        while newcomer.poll(world) {}
        assert_eq!(newcomer.heard, world.people.lock().unwrap().wanted);
        world.gateway.restart();
    }
    assert_eq!(
        world.api.waiting_updates(),
        0,
        "handled, but never confirmed to Telegram"
    );
    let failed: usize = motes.iter().map(|mote| mote.failed_polls).sum();
    let allowed = world.poll_faults.load(SeqCst);
    println!("{failed} polls failed without an outage, of {allowed} that may");
    assert!(
        failed <= allowed,
        "{failed} polls failed, but only {allowed} because of Telegram"
    );
}

/// Nobody is answered twice. That an answer is lost may happen, but seldom.
fn judge_answers(world: &World) {
    let people = world.people.lock().unwrap();
    let written: usize = people.written.values().sum();
    let of_motes = |sent: &Sent| sent.text.starts_with("mote ");
    let answers = |seen: &Seen| seen.sent.iter().filter(|sent| !of_motes(sent)).count();
    world
        .api
        .wait_until(Duration::from_secs(10), |seen| answers(seen) == written);
    let seen = world.api.seen();
    for (chat, written) in &people.written {
        let answers = seen
            .sent
            .iter()
            .filter(|sent| sent.chat == chat.to_string() && !of_motes(sent))
            .count();
        assert!(
            answers <= *written,
            "{answers} answers to {written} messages of {chat}"
        );
    }
    let mut deleted = HashSet::new();
    assert!(
        seen.deleted
            .iter()
            .all(|message| deleted.insert(message.clone())),
        "deleted twice"
    );
    println!(
        "{} answers to {written} messages of people, {} deleted",
        answers(&seen),
        deleted.len()
    );
    assert!(
        answers(&seen) * 10 >= written * 9,
        "{} answers to {written} messages",
        answers(&seen)
    );
}
