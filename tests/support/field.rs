//! Motes as they are in the field: each has an address of its own, retransmits as RFC 7252 says, and remembers what it
//! is told; and the judge of what came of their texts.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use super::{BotApi, Firmware, Mote, Numbers, PATIENCE, message, update};

/// RFC 7252 §4.8.2, MAX_TRANSMIT_WAIT: then a mote has given up.
pub const GIVEN_UP: Duration = Duration::from_secs(93);

/// What a mote asked for, and what it got.
#[derive(Clone, Debug)]
pub struct Asked {
    /// None: it polled.
    pub text: Option<String>,
    pub chats: Vec<String>,
    /// None: it gave up.
    pub code: Option<String>,
    pub waited: Duration,
}

impl Asked {
    pub fn got(&self, code: &str) -> bool {
        self.code.as_deref() == Some(code)
    }
}

pub struct FieldMote {
    pub mote: Mote,
    pub number: usize,
    pub firmware: Firmware,
    pub random: Numbers,
    /// RFC 7252's ACK_TIMEOUT, between 2 and 3 s.
    pub ack_timeout: Duration,
    /// How long the response may take after the ACK.
    pub patience: Duration,
    texts: usize,
}

impl FieldMote {
    /// The mote of this number, with the address 127.0.1.1 and so on.
    pub fn new(number: usize, seed: u64, gateway: SocketAddr) -> Self {
        let address = format!("127.0.{}.{}", 1 + number / 250, 1 + number % 250);
        let mut random = Numbers(seed ^ (number as u64 + 1) << 32);
        let jitter = Duration::from_millis(random.below(1000) as u64);
        Self {
            mote: Mote::at(&address, gateway),
            number,
            firmware: Firmware::default(),
            random,
            ack_timeout: Duration::from_secs(2) + jitter,
            patience: PATIENCE,
            texts: 0,
        }
    }

    /// Its power was cut.
    pub fn reboot(&mut self) {
        self.mote.reboot();
        self.firmware.reboot();
    }

    /// The text that it sends next; no other mote sends the same.
    pub fn next_text(&self) -> String {
        format!("mote {} text {}", self.number, self.texts)
    }

    /// Sends a new text to these chats.
    pub fn report(&mut self, api: &BotApi, chats: &str) -> Asked {
        let text = self.next_text();
        self.texts += 1;
        let payload = message(api, chats, &text);
        let asked = self.ask("message", &payload);
        Asked {
            text: Some(text),
            chats: chats.split(',').map(str::to_string).collect(),
            ..asked
        }
    }

    /// Asks what people want, and remembers it.
    pub fn poll(&mut self, api: &BotApi) -> Asked {
        self.ask("update", &update(api))
    }

    fn ask(&mut self, path: &str, payload: &str) -> Asked {
        let start = Instant::now();
        let request = self.mote.post(path, payload);
        let response = self
            .mote
            .reliable(&request, self.ack_timeout, self.patience);
        if let Some(response) = &response {
            self.firmware.take(&response.text()); // it does not look at the code
        }
        Asked {
            text: None,
            chats: Vec::new(),
            code: response.map(|response| response.code()),
            waited: start.elapsed(),
        }
    }

    /// Polls and reports by turns, with up to 2 s in between, until told to stop.
    pub fn go_on_asking(&mut self, api: &BotApi, chats: &str, stop: &AtomicBool) -> Vec<Asked> {
        let mut asked = Vec::new();
        while !stop.load(Relaxed) {
            asked.push(match asked.len() % 2 {
                0 => self.poll(api),
                _ => self.report(api, chats),
            });
            thread::sleep(Duration::from_millis(self.random.below(2000) as u64));
        }
        asked
    }
}

/// Lets so many motes do something at the same time; what comes of it, in their order.
pub fn at_once<T: Send>(motes: usize, each: impl Fn(usize) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let each = &each;
        let running: Vec<_> = (0..motes)
            .map(|number| scope.spawn(move || each(number)))
            .collect();
        running
            .into_iter()
            .map(|mote| mote.join().unwrap())
            .collect()
    })
}

/// What became of the texts.
#[derive(Debug)]
pub struct Outcome {
    /// How often each arrived, by chat and text.
    pub arrived: HashMap<(String, String), usize>,
    /// Requests that were answered 2.05 or 2.03.
    pub served: usize,
    /// Requests that were answered 5.00.
    pub failed: usize,
    pub given_up: usize,
    pub longest: Duration,
}

impl Outcome {
    pub fn count(&self, chat: &str, text: &str) -> usize {
        let key = (chat.to_string(), text.to_string());
        self.arrived.get(&key).copied().unwrap_or(0)
    }

    pub fn twice(&self) -> usize {
        self.arrived.values().filter(|count| **count > 1).count()
    }
}

/// Judges what every test of motes in the field promises: each run of the gateway delivers a text once at most, what was
/// confirmed has arrived, and nothing is answered but success, 5.00, or nothing at all. Prints the numbers.
#[track_caller]
pub fn judge(api: &BotApi, asked: &[Asked], runs: usize) -> Outcome {
    let texts: HashSet<&String> = asked.iter().filter_map(|it| it.text.as_ref()).collect();
    let mut arrived = HashMap::new();
    for sent in api.seen().sent {
        if texts.contains(&sent.text) {
            *arrived.entry((sent.chat, sent.text)).or_default() += 1;
        }
    }
    let count = |codes: &[Option<&str>]| {
        let fits = |it: &&Asked| codes.contains(&it.code.as_deref());
        asked.iter().filter(fits).count()
    };
    let outcome = Outcome {
        arrived,
        served: count(&[Some("2.05"), Some("2.03")]),
        failed: count(&[Some("5.00")]),
        given_up: count(&[None]),
        longest: asked.iter().map(|it| it.waited).max().unwrap_or_default(),
    };
    println!(
        "{} requests: {} served, {} answered 5.00, {} given up, the longest waited {:.1?}; {} texts arrived, {} twice",
        asked.len(),
        outcome.served,
        outcome.failed,
        outcome.given_up,
        outcome.longest,
        outcome.arrived.len(),
        outcome.twice(),
    );
    for it in asked {
        let Some(text) = &it.text else {
            assert!(
                it.code.is_none() || it.got("2.05") || it.got("2.03") || it.got("5.00"),
                "{it:?}"
            );
            continue;
        };
        assert!(
            it.code.is_none() || it.got("2.05") || it.got("5.00"),
            "{it:?}"
        );
        let counts = it.chats.iter().map(|chat| outcome.count(chat, text));
        let most = counts.max().unwrap_or(0);
        assert!(most <= runs, "sent {most} times: {it:?}");
        assert!(most > 0 || !it.got("2.05"), "lost: {it:?}");
    }
    outcome
}
