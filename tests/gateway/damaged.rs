//! A trouble of `endurance.rs`: damaged datagrams of the firmware, to which nothing is answered that is malformed or holds
//! a secret.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use crate::support::Kind::{Ack, Con, Rst};
use crate::support::*;

/// A ping follows that many datagrams: its RST tells that they were read, and the socket's buffer holds more of them.
const BATCH: usize = 32;
/// A ping stands behind whatever the motes asked for meanwhile: two calls that hang, each 8.5 s, were seen at once.
const PING_PATIENCE: Duration = Duration::from_secs(60);
/// More than the gateway remembers.
const MOTES: usize = 100;
const LOG_MAX: usize = 1 << 20;
const CHAT: &str = "77";

/// Whoever sends such things.
pub struct Damage {
    api_url: String,
    motes: Vec<Mote>,
    whole: Vec<Vec<u8>>,
    random: Numbers,
    sent: usize,
    /// What came back, by type and code.
    replies: BTreeMap<String, usize>,
}

impl Damage {
    pub fn new(api: &BotApi, gateway: &Gateway, seed: u64) -> Self {
        let names = [
            "message_all_three_chats",
            "message_all_two_chats",
            "message_one_chat_text_with_separators",
            "update",
        ];
        let mote = |number| Mote::at(&format!("127.0.4.{number}"), gateway.address());
        Self {
            api_url: api.url(),
            motes: (1..=MOTES).map(mote).collect(),
            whole: names.map(|name| for_this_telegram(name, api)).to_vec(),
            random: Numbers(seed),
            sent: 0,
            replies: BTreeMap::new(),
        }
    }

    /// Sends them and reads what comes back: as long as the others go on, and until there were so many in all.
    pub fn bombard(&mut self, ended: &AtomicBool, least: &AtomicUsize) {
        while !ended.load(SeqCst) || self.sent < least.load(SeqCst) {
            let number = self.random.below(MOTES);
            (0..BATCH).for_each(|_| self.send_one(number));
            self.listen(number);
        }
    }

    /// A damaged datagram; or now and then a whole one, with a text that must not arrive twice, however often it is sent.
    fn send_one(&mut self, number: usize) {
        let (mote, random) = (&self.motes[number], &mut self.random);
        self.sent += 1;
        if random.below(64) == 0 {
            let text = format!("once {}", self.sent);
            let request = mote.post("message", form(&self.api_url, TOKEN, CHAT, &text));
            (0..1 + random.below(3)).for_each(|_| mote.send(&request));
            return;
        }
        let mut bytes = self.whole[random.below(self.whole.len())].clone();
        if random.below(8) > 0 {
            let id = random.next() as u16;
            bytes[2..4].copy_from_slice(&id.to_be_bytes()); // else it comes again
        }
        damage(&mut bytes, &self.whole, random);
        mote.send_raw(&bytes);
    }

    /// Reads what came, until all that was sent has been read by the gateway.
    fn listen(&mut self, number: usize) {
        let mote = &self.motes[number];
        let ping = Message::new(Con, 0, mote.next_id());
        mote.send(&ping);
        loop {
            // Well-formed and without a secret, or it panics.
            let reply = mote
                .try_receive(PING_PATIENCE)
                .expect("the gateway answers");
            if (reply.kind, reply.id) == (Rst, ping.id) {
                return;
            }
            let kind = match reply.code {
                0 => format!("{:?}", reply.kind),
                _ => format!("{:?} {}", reply.kind, reply.code()),
            };
            *self.replies.entry(kind).or_default() += 1;
            assert!(
                reply.kind == Ack || reply.code >> 5 == 2 || reply.payload.is_empty(),
                "read as configuration: {reply}"
            );
            match (reply.kind, self.random.below(10)) {
                (Con, 1) => mote.reset(&reply),
                (Con, 2..) => mote.acknowledge(&reply),
                _ => {} // and some ACKs are lost
            }
        }
    }

    pub fn judge(&self, api: &BotApi, gateway: &Gateway) {
        let mut once = api.texts_to(CHAT);
        once.retain(|text| text.starts_with("once "));
        assert!(once.len() > self.sent / 2000, "{} texts came", once.len());
        let different: HashSet<_> = once.iter().collect();
        assert_eq!(different.len(), once.len(), "a text came twice");
        for kind in [
            "Rst", "Ack", "Ack 4.00", "Ack 4.02", "Ack 4.03", "Ack 4.04", "Ack 4.05", "Con 2.05",
            "Non 4.04",
        ] {
            let replies = &self.replies;
            assert!(replies.contains_key(kind), "no {kind} in {replies:?}");
        }
        let lost = dropped(gateway.address().port());
        assert_eq!(lost, 0, "datagrams that the gateway never saw");
        let lines = judge_logs(gateway);
        println!(
            "{} damaged datagrams, {lines} lines of log; {:?}",
            self.sent, self.replies
        );
    }
}

/// A datagram of the firmware that names the stand-in in place of api.telegram.org.
fn for_this_telegram(name: &str, api: &BotApi) -> Vec<u8> {
    let message = Message::decode(&firmware(name)).unwrap();
    let payload = message
        .text()
        .replace("https://api.telegram.org/bot", &api.url());
    assert!(payload.contains(&api.url()), "{payload}");
    message.payload(payload).encode()
}

/// One to three things go wrong with a datagram, most of them where its header and options are.
fn damage(bytes: &mut Vec<u8>, whole: &[Vec<u8>], random: &mut Numbers) {
    for _ in 0..=random.below(3) {
        let near = if random.below(4) > 0 { 20 } else { 200 };
        let at = random.below(near).min(bytes.len());
        let end = (at + random.below(9)).min(bytes.len());
        match random.below(10) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            1 if at < bytes.len() => bytes[at] = b'\n', // in a path it would begin a line of the log
            2 => bytes.truncate(at),
            3 => drop(bytes.splice(
                at..at,
                random.next().to_be_bytes().into_iter().take(1 + end - at),
            )),
            4 => drop(bytes.drain(at..end)),
            // Version, type, token length; code.
            5 if bytes.len() > 1 => match random.below(3) {
                0 => bytes[0] ^= 0x10, // NON
                field => bytes[field - 1] = random.next() as u8,
            },
            // An option's delta and length.
            6 if bytes.len() > 6 => bytes[6] = random.next() as u8,
            // Another option behind the path, perhaps one of those that mean something.
            7 if bytes
                .get(6)
                .is_some_and(|first| bytes.len() > 7 + usize::from(first & 15)) =>
            {
                let behind = 7 + usize::from(bytes[6] & 15);
                let value = &random.next().to_be_bytes()[..random.below(4)];
                let delta = [1, 4, 6, 12, 0xd0, random.below(16) as u8][random.below(6)]; // 12, 15, 17, 23, and 24 and more
                let mut option = vec![(delta & 15) << 4 | value.len() as u8];
                if delta == 0xd0 {
                    option = vec![0xd0 | value.len() as u8, [3, 11, 15, 36][random.below(4)]]; // 27, 35, 39, 60
                }
                bytes.splice(behind..behind, [&option, value].concat());
            }
            // A piece of another one, or of this one again.
            8 => {
                let other = &whole[random.below(whole.len())];
                let from = random.below(other.len());
                bytes.splice(
                    at..end,
                    other[from..].iter().take(random.below(60)).copied(),
                );
            }
            9 if random.below(8) == 0 => {
                *bytes = (0..random.below(600))
                    .map(|_| random.next() as u8)
                    .collect()
            }
            _ => bytes.extend(random.next().to_be_bytes()),
        }
    }
}

/// Datagrams that the kernel threw away before the gateway read them: the last column of its line.
fn dropped(port: u16) -> u64 {
    let table = fs::read_to_string("/proc/net/udp").unwrap();
    let own = format!("0100007F:{port:04X}");
    let line = table
        .lines()
        .find(|line| line.split_whitespace().nth(1) == Some(own.as_str()));
    line.and_then(|line| line.split_whitespace().last())
        .expect("the gateway's socket")
        .parse()
        .unwrap()
}

/// The log files stay small, and each line on the console is one of the gateway's own making. Returns how many there are.
fn judge_logs(gateway: &Gateway) -> usize {
    for name in ["coap_server.log", "coap_server.log.1"] {
        let size = gateway.file(name).len();
        assert!(size <= LOG_MAX, "{name}: {size} bytes");
    }
    let output = gateway.output();
    for line in output.lines() {
        let own = ["INFO  [", "WARN  [", "ERROR ["];
        assert!(
            own.iter().any(|own| line.starts_with(own)),
            "forged: {line}"
        );
    }
    output.lines().count()
}
