//! Motes and people that go on for thousands of messages while the Bot API fails at random: nothing is lost, nothing
//! happens twice, and the gateway is no larger at the end.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};
use std::{fs, thread};

use super::damaged::Damage;
use crate::support::*;

const MOTES: usize = 8;
/// Ids of those who register and stay; only they know the password.
const RESIDENTS: Range<i64> = 1_000_000_000..1_000_000_005;
/// Of those who come and go. With the residents they are more than the list holds.
const GUESTS: Range<i64> = 1_000_000_010..1_000_000_020;
/// Of those who guess at the password; more than the gateway counts the guesses of.
const STRANGERS: Range<i64> = 1_000_001_000..1_000_001_300;
/// Of the chats that the motes' firmware was built with.
const BUILT_IN: i64 = 1_000_002_000;
const LIST_MAX: usize = 10;
/// Of the memory at the end against that after the first hundred cycles. Gaps in the heap made 320 to 540 KiB of it; 10 bytes
/// for each request would be more than this.
const RSS_TOLERANCE_KIB: u64 = 1024;
/// Of the release binary: 7 MB; 5.9 were seen.
const RSS_MAX_KIB: u64 = 7_000_000 / 1024;
/// Of all files of the gateway without its logs: far below what ten thousand of anything would take.
const FILES_MAX: u64 = 64 << 10;
/// As long as the duplicates that the gateway remembers at most.
const SEEN_MAX: usize = 4096;
/// Cycles of one mote between two calls that hang; each costs everybody 8.5 s.
const HANG_EACH: usize = 2000;

#[test]
fn two_hundred_cycles() {
    endure(200, 2000);
}

#[test]
#[ignore = "takes minutes"]
fn ten_thousand_cycles() {
    endure(10_000, 1_000_000);
}

/// At least so many of the datagrams are damaged.
fn endure(cycles: usize, damaged: usize) {
    let seed = seed();
    let mut world = World::new(seed);
    let mut motes: Vec<Resident> = (0..MOTES)
        .map(|number| Resident::new(&world.gateway, number, seed))
        .collect();

    let start = Instant::now();
    world.run(&mut motes, 100, damaged / 10);
    let fill = SEEN_MAX.min(cycles);
    let before = world.size(&mut motes, fill);
    world.run(&mut motes, cycles - 100, damaged);
    let after = world.size(&mut motes, fill);
    println!("{cycles} cycles in {:.0?}", start.elapsed());
    println!("after 100: {before:?}\nat the end: {after:?}");

    after.assert_no_larger_than(&before);
    judge_texts(&world, &motes);
    judge_answers(&world);
    world
        .damage
        .lock()
        .unwrap()
        .judge(&world.api, &world.gateway);
    judge_polls(&mut world, &motes);
}

// --- what must not grow ---

#[derive(Debug)]
struct Size {
    rss_kib: u64,
    threads: u64,
    open_files: usize,
    /// Of `state.json`, with each number as one digit: their values grow, their count must not.
    state: usize,
    /// Of all files but the logs.
    files: u64,
}

impl Size {
    fn of(gateway: &Gateway) -> Self {
        let directory = fs::read_dir(gateway.directory()).unwrap();
        let files = directory.map(Result::unwrap).filter(|file| {
            let name = file.file_name();
            !name.to_string_lossy().starts_with("coap_server.log")
        });
        let mut state = gateway.state().into_bytes();
        state.dedup_by(|a, b| a.is_ascii_digit() && b.is_ascii_digit());
        Self {
            rss_kib: gateway.rss_kib(),
            threads: gateway.threads(),
            open_files: gateway.open_files(),
            state: state.len(),
            files: files.map(|file| file.metadata().unwrap().len()).sum(),
        }
    }

    fn assert_no_larger_than(&self, before: &Size) {
        assert!(self.rss_kib <= before.rss_kib + RSS_TOLERANCE_KIB);
        assert!(cfg!(debug_assertions) || self.rss_kib <= RSS_MAX_KIB);
        assert!(self.threads <= before.threads);
        // On a busy machine fewer calls overlap, so not every chat had an idle connection before.
        assert!(self.open_files <= before.open_files + LIST_MAX);
        assert!(self.state <= before.state);
        assert!(self.files <= FILES_MAX);
    }
}

// --- the world ---

struct World {
    api: BotApi,
    gateway: Gateway,
    people: Mutex<People>,
    damage: Mutex<Damage>,
    /// Odd while one is under way.
    outages: AtomicUsize,
    /// One at a time.
    outage: Mutex<()>,
    /// So many polls may have failed because `getUpdates` did.
    poll_faults: AtomicUsize,
}

impl World {
    fn new(seed: u64) -> Self {
        let api = BotApi::start();
        // With an arena for each thread, glibc's allocator takes the most that ever met in each of them: 6.4 MB in all.
        let gateway = Gateway::with(Setup::ipv4(&api).env("MALLOC_ARENA_MAX", 1));
        let mut people = People {
            random: Numbers(seed),
            wanted: Firmware::default(),
            written: BTreeMap::new(),
            configs: 0,
        };
        RESIDENTS.for_each(|chat| people.register(&api, chat));
        let damage = Mutex::new(Damage::new(&api, &gateway, seed));
        Self {
            damage,
            api,
            gateway,
            people: Mutex::new(people),
            outages: AtomicUsize::new(0),
            outage: Mutex::new(()),
            poll_faults: AtomicUsize::new(0),
        }
    }

    /// So many cycles, shared by all motes, at the same time, and damaged datagrams all the while.
    fn run(&self, motes: &mut [Resident], cycles: usize, damaged: usize) {
        let (ended, least) = (AtomicBool::new(false), AtomicUsize::new(damaged));
        thread::scope(|scope| {
            scope.spawn(|| self.damage.lock().unwrap().bombard(&ended, &least));
            let cycle = |mote: &mut Resident| {
                let own = cycles / MOTES + usize::from(mote.mote.number < cycles % MOTES);
                (0..own).for_each(|_| mote.cycle(self));
            };
            let motes = motes
                .iter_mut()
                .map(|mote| scope.spawn(move || cycle(mote)));
            let motes: Vec<_> = motes.collect();
            let results: Vec<_> = motes.into_iter().map(|mote| mote.join()).collect();
            if results.iter().any(Result::is_err) {
                least.store(0, SeqCst);
            }
            ended.store(true, SeqCst);
            results.into_iter().for_each(Result::unwrap);
        });
    }

    /// No faults any more: all that people wrote is handled, and every mote hears of it.
    fn catch_up(&self, motes: &mut [Resident]) {
        self.api.heal();
        let wanted = self.people.lock().unwrap().wanted.knows();
        for mote in motes {
            within(Duration::from_secs(10), || {
                mote.poll(self);
                self.api.waiting_updates() == 0 && mote.mote.firmware.knows() == wanted
            });
            assert_eq!(self.api.waiting_updates(), 0, "never confirmed");
            assert_eq!(mote.mote.firmware.knows(), wanted);
        }
    }

    /// Measured when everything bounded is full: the list, the idle connections, and the duplicates if so many texts are
    /// more than the gateway remembers.
    fn size(&self, motes: &mut [Resident], texts: usize) -> Size {
        self.people.lock().unwrap().fill_the_list(&self.api);
        self.catch_up(motes);
        self.api.set_round_trip(Duration::from_millis(100)); // so that the calls overlap
        motes[0].report(self, None);
        self.api.set_round_trip(Duration::ZERO);
        let mote = Mote::at("127.0.3.1", self.gateway.address());
        for _ in 0..texts {
            mote.post_separate("message", message(&self.api, "7", "once more"))
                .expect_code("2.05");
        }
        Size::of(&self.gateway)
    }

    /// Connections break, whatever is under way on them, and sometimes new ones are refused for a while.
    fn fail(&self, random: &mut Numbers) {
        let _one = self.outage.lock().unwrap();
        self.outages.fetch_add(1, SeqCst);
        let refused = match random.below(4) {
            0 => 0,
            1 => {
                self.api.fail_connections(1, ConnectionFault::Close);
                0
            }
            2 => random.below(300),
            _ => 1200, // longer than the gateway tries again
        };
        if refused == 0 {
            self.api.close_connections();
        } else {
            self.api.refuse();
            thread::sleep(Duration::from_millis(refused as u64));
            self.api.accept_again();
        }
        self.outages.fetch_add(1, SeqCst);
    }

    /// Runs an exchange; true if there was no outage meanwhile.
    fn calm<T>(&self, exchange: impl FnOnce() -> T) -> (T, bool) {
        let before = self.outages.load(SeqCst);
        let result = exchange();
        let calm = before.is_multiple_of(2) && self.outages.load(SeqCst) == before;
        (result, calm)
    }
}

// --- people ---

/// Everybody who writes, and what a mote should know when all of it is handled.
struct People {
    random: Numbers,
    wanted: Firmware,
    /// Messages of each chat.
    written: BTreeMap<i64, usize>,
    /// Messages with a password, which are deleted.
    configs: usize,
}

fn name(chat: i64) -> String {
    format!("P{}", chat % 1_000_000_000)
}

impl People {
    fn write(&mut self, api: &BotApi, chat: i64, text: &str) {
        api.person_writes(chat, &name(chat), text);
        *self.written.entry(chat).or_default() += 1;
        self.configs += usize::from(text.starts_with("config"));
    }

    fn register(&mut self, api: &BotApi, chat: i64) {
        self.write(api, chat, "hi");
        self.wanted.take(&format!("{}:{chat}", name(chat))); // unless its list is full
    }

    fn remove(&mut self, api: &BotApi, chat: i64) {
        self.write(api, chat, "remove me");
        self.wanted.take(&format!("r{chat}"));
    }

    fn set(&mut self, api: &BotApi, chat: i64, key: &str, value: usize) {
        self.write(api, chat, &format!("config {PASSWORD} {key} {value}"));
        self.wanted.take(&format!("{}{value}", &key[..1]));
    }

    /// Everybody is known, as many as possible are registered, and each setting was changed.
    fn fill_the_list(&mut self, api: &BotApi) {
        GUESTS.for_each(|chat| self.remove(api, chat));
        GUESTS.for_each(|chat| self.register(api, chat));
        self.set(api, RESIDENTS.start, "feedback", 0);
        let minutes = 100 + self.random.below(21);
        self.set(api, RESIDENTS.start, "interval", minutes);
    }

    fn somebody_writes(&mut self, api: &BotApi) {
        let mut one_of = |ids: Range<i64>| ids.start + self.random.below(ids.count()) as i64;
        let (resident, guest, stranger) = (one_of(RESIDENTS), one_of(GUESTS), one_of(STRANGERS));
        let minutes = self.random.below(21) + 100;
        match self.random.below(10) {
            // Nobody registers by a wrong password, for the list is full.
            0 | 1 if self.wanted.users().len() == LIST_MAX => {
                self.write(api, stranger, "config let-me-in interval 5");
            }
            0..3 => self.remove(api, guest),
            3..6 => self.register(api, guest),
            6 | 7 => self.set(api, resident, "interval", minutes),
            8 => self.set(api, resident, "feedback", minutes % 2),
            _ => {
                let too_long = format!("config {PASSWORD} interval {}", minutes + 21);
                self.write(api, resident, &too_long);
            }
        }
    }
}

// --- motes ---

/// What happens to the calls that bring one text to its chats.
#[derive(Clone, Copy, Debug)]
struct Trouble {
    /// None: to all of them.
    only: Option<i64>,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
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

impl Kind {
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
    asked: Asked,
    trouble: Option<Trouble>,
    calm: bool,
}

impl Report {
    fn trouble_of(&self, chat: i64) -> Option<Kind> {
        let hits = |it: &Trouble| it.only.is_none_or(|only| only == chat);
        self.trouble.filter(hits).map(|trouble| trouble.kind)
    }
}

/// A mote that reports to whom it has heard of, and polls.
struct Resident {
    mote: FieldMote,
    cycle: usize,
    reports: Vec<Report>,
    /// Polls that failed without an outage.
    failed_polls: usize,
}

impl Resident {
    fn new(gateway: &Gateway, number: usize, seed: u64) -> Self {
        let mut mote = FieldMote::new(number, seed, gateway.address());
        // A machine or a disk that stalls is no lost answer. How long one may take is judged elsewhere.
        mote.patience = GIVEN_UP;
        Self {
            mote,
            cycle: 0,
            reports: Vec::new(),
            failed_polls: 0,
        }
    }

    fn cycle(&mut self, world: &World) {
        self.cycle += 1;
        let random = &mut self.mote.random;
        if random.below(5) == 0 {
            world.people.lock().unwrap().somebody_writes(&world.api);
        }
        if random.below(200) == 0 {
            world.fail(random);
        }
        if random.below(300) == 0 {
            self.mote.reboot();
        }
        let trouble = self.draw_trouble();
        self.report(world, trouble);
        self.plan_a_poll_fault(world);
        self.poll(world);
    }

    fn chats(&self) -> Vec<i64> {
        let ids = self.mote.firmware.chat_ids();
        if ids.is_empty() {
            return vec![BUILT_IN + self.mote.number as i64];
        }
        ids.split(',').map(|id| id.parse().unwrap()).collect()
    }

    /// What costs seconds is rare, for all motes wait meanwhile.
    fn draw_trouble(&mut self) -> Option<Trouble> {
        let chats = self.chats();
        let random = &mut self.mote.random;
        let only = Some(chats[random.below(chats.len())]);
        let hangs = self.cycle % HANG_EACH == HANG_EACH / MOTES * self.mote.number;
        let (only, kind) = match random.below(400) {
            _ if hangs => (only, Kind::Hangs),
            0..8 => (only, Kind::Refused),
            8..16 => (only, Kind::Flooded),
            16..24 => (only, Kind::Unanswered),
            24 => (only, Kind::Delayed),
            25..29 => (None, Kind::Refused),
            29..33 => (None, Kind::Unanswered),
            _ => return None,
        };
        Some(Trouble { only, kind })
    }

    fn report(&mut self, world: &World, trouble: Option<Trouble>) {
        if let Some(trouble) = trouble {
            let calls = match trouble.only {
                Some(chat) => next(1, "sendMessage").to(chat),
                None => every("sendMessage"),
            };
            let text = self.mote.next_text();
            world.api.fail(calls.saying(&text), trouble.kind.fault());
        }
        let ids: Vec<String> = self.chats().iter().map(i64::to_string).collect();
        let (asked, calm) = world.calm(|| self.mote.report(&world.api, &ids.join(",")));
        assert!(asked.code.is_some(), "given up: {asked:?}");
        self.reports.push(Report {
            asked,
            trouble,
            calm,
        });
    }

    /// Whichever `getUpdates` is next.
    fn plan_a_poll_fault(&mut self, world: &World) {
        let fault = match self.mote.random.below(600) {
            _ if self.mote.number == 0 && self.cycle == HANG_EACH / 16 => Fault::Hang,
            0 => Fault::error(500, "Internal Server Error"),
            1 => Fault::conflict(),
            2 => Fault::CloseUnanswered,
            _ => return,
        };
        world.poll_faults.fetch_add(1, SeqCst);
        world.api.fail(next(1, "getUpdates"), fault);
    }

    fn poll(&mut self, world: &World) {
        let (asked, calm) = world.calm(|| self.mote.poll(&world.api));
        assert!(asked.code.is_some(), "given up: {asked:?}");
        self.failed_polls += usize::from(asked.got("5.00") && calm);
    }
}

// --- what must have come of it ---

fn judge_texts(world: &World, motes: &[Resident]) {
    let reports: Vec<&Report> = motes.iter().flat_map(|mote| &mote.reports).collect();
    let asked: Vec<Asked> = reports.iter().map(|report| report.asked.clone()).collect();
    let outcome = judge(&world.api, &asked, 1);
    for report in &reports {
        if let Err(fault) = judge_report(report, &outcome) {
            panic!("{fault}: {report:?}");
        }
    }
    let calm = reports.iter().filter(|report| report.calm).count();
    println!("{} texts, {calm} of them without an outage", reports.len());
    assert!(calm * 2 > reports.len(), "too few to prove anything");
}

/// What the trouble that was planned for a text lets one expect, beyond what holds for every text.
fn judge_report(report: &Report, outcome: &Outcome) -> Result<(), &'static str> {
    let text = report.asked.text.as_deref().unwrap_or_default();
    let mut must_succeed = false;
    let mut may_succeed = false;
    for chat in &report.asked.chats {
        let arrived = outcome.count(chat, text) > 0;
        let chat: i64 = chat.parse().unwrap();
        let trouble = report.trouble_of(chat);
        let refused = matches!(trouble, Some(Kind::Refused | Kind::Flooded));
        let goes_through = matches!(trouble, None | Some(Kind::Delayed));
        let stays = !GUESTS.contains(&chat); // a guest may be removed before the mote hears of it
        must_succeed |= report.calm && stays && goes_through;
        may_succeed |= goes_through;
        if !arrived && report.calm && stays && !refused {
            return Err("lost");
        }
        if arrived && refused {
            return Err("arrived although it was refused");
        }
    }
    if must_succeed && report.asked.got("5.00") {
        return Err("delivered, but not confirmed");
    }
    if !may_succeed && report.asked.got("2.05") {
        return Err("confirmed, but never accepted");
    }
    Ok(())
}

/// Every mote has heard everything, see [`World::size`]. So does one that comes now, and one that comes after a restart.
fn judge_polls(world: &mut World, motes: &[Resident]) {
    for number in [MOTES, MOTES + 1] {
        let newcomer = Resident::new(&world.gateway, number, 0);
        world.catch_up(&mut [newcomer]);
        world.gateway.restart();
    }
    let failed: usize = motes.iter().map(|mote| mote.failed_polls).sum();
    let planned = world.poll_faults.load(SeqCst);
    println!("{failed} polls failed without an outage, of {planned} that may");
    assert!(failed <= planned);
}

/// Nobody is answered twice, and what holds a password seldom stays.
fn judge_answers(world: &World) {
    let people = world.people.lock().unwrap();
    let seen = world.api.seen();
    let mut answers = 0;
    for (chat, written) in &people.written {
        let texts = seen.texts_to(chat);
        let count = texts
            .iter()
            .filter(|text| !text.starts_with("mote "))
            .count();
        assert!(count <= *written, "{count} answers to {written} of {chat}");
        answers += count;
    }
    let deleted = seen.deleted.len();
    let in_vain = seen.count("deleteMessage") - deleted;
    println!(
        "{answers} answers to {} messages of people; {deleted} of {} deleted, {in_vain} tried again in vain",
        people.written.values().sum::<usize>(),
        people.configs
    );
    assert!(deleted * 10 >= people.configs * 9);
    // An outage may have taken the answer to the one deletion that was under way.
    assert!(in_vain <= world.outages.load(SeqCst) / 2);
}
