//! A link that drops 30 %, doubles 15 % and reorders in both directions, the same in every run.

mod support;

use std::collections::BTreeMap;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use support::*;

const DROPPED_PERCENT: usize = 30;
const DOUBLED_PERCENT: usize = 15;
/// Longer than what lies between two datagrams of one exchange, so that they overtake each other.
const DELAY_MAX_MS: usize = 40;
/// Of the motes: a quarter of RFC 7252's, to spare time.
const ACK_TIMEOUT: Duration = Duration::from_millis(500);
/// RFC 7252 §4.8.2, of the gateway.
const MAX_TRANSMIT_WAIT: Duration = Duration::from_secs(93);

/// Stands between one mote and the gateway.
struct Relay {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Relay {
    fn start(gateway: SocketAddr, seed: u64) -> Self {
        let [front, back] = [(); 2].map(|()| UdpSocket::bind("[::1]:0").unwrap());
        back.connect(gateway).unwrap();
        [&front, &back]
            .iter()
            .for_each(|socket| socket.set_nonblocking(true).unwrap());
        let (address, stop) = (
            front.local_addr().unwrap(),
            Arc::new(AtomicBool::new(false)),
        );
        let stopped = Arc::clone(&stop);
        let thread = Some(thread::spawn(move || {
            Self::run(&front, &back, &stopped, Numbers(seed))
        }));
        Self {
            address,
            stop,
            thread,
        }
    }

    fn run(front: &UdpSocket, back: &UdpSocket, stop: &AtomicBool, mut random: Numbers) {
        let mut mote = None;
        let mut waiting: Vec<(Instant, bool, Vec<u8>)> = Vec::new();
        let mut buffer = [0; 2048];
        while !stop.load(Relaxed) {
            for to_gateway in [true, false] {
                let received = if to_gateway {
                    front.recv_from(&mut buffer).map(|(length, peer)| {
                        mote = Some(peer);
                        length
                    })
                } else {
                    back.recv(&mut buffer)
                };
                let Ok(length) = received else { continue };
                let copies = usize::from(random.below(100) >= DROPPED_PERCENT)
                    * (1 + usize::from(random.below(100) < DOUBLED_PERCENT));
                for _ in 0..copies {
                    let due =
                        Instant::now() + Duration::from_millis(random.below(DELAY_MAX_MS) as u64);
                    waiting.push((due, to_gateway, buffer[..length].to_vec()));
                }
            }
            waiting.retain(|(due, to_gateway, bytes)| {
                let now = Instant::now() >= *due;
                if now && *to_gateway {
                    let _ = back.send(bytes);
                } else if let (true, Some(mote)) = (now, mote) {
                    let _ = front.send_to(bytes, mote);
                }
                !now
            });
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

#[test]
fn some_texts() {
    no_text_is_lost_or_doubled(40, false);
}

#[test]
#[ignore = "takes minutes: cargo test --release --test lossy -- --include-ignored"]
fn two_hundred_texts() {
    no_text_is_lost_or_doubled(200, false);
}

#[test]
#[ignore = "takes minutes: cargo test --release --test lossy -- --include-ignored"]
fn two_hundred_texts_and_a_kill() {
    no_text_is_lost_or_doubled(200, true);
}

/// So many messages, all at once: no text twice, and none lost whose request arrived. Or within a second, and the
/// gateway is killed and started again in the middle: then responses and what it was about to send are lost, for the
/// motes have their ACKs; but still none is sent twice.
fn no_text_is_lost_or_doubled(count: u64, kill: bool) {
    let (api, mut gateway) = start();
    let address = gateway.address();
    let (spread, patience) = if kill {
        (Duration::from_secs(1), PATIENCE)
    } else {
        (Duration::ZERO, MAX_TRANSMIT_WAIT)
    };
    let answered: Vec<String> = thread::scope(|scope| {
        let motes: Vec<_> = (0..count)
            .map(|number| {
                let api = &api;
                scope.spawn(move || {
                    thread::sleep(spread * number as u32 / count as u32);
                    let relay = Relay::start(address, number);
                    let mote = Mote::new(relay.address);
                    let text = format!("text {number}");
                    let response = mote.reliable(
                        &mote.post("message", message(api, "5", &text)),
                        ACK_TIMEOUT,
                        patience,
                    );
                    response.filter(|it| it.code() == "2.05").map(|_| text)
                })
            })
            .collect();
        if kill {
            api.wait_for("half of the texts", |seen| {
                seen.count("sendMessage") as u64 >= count / 2
            });
            gateway.kill9();
            gateway.restart();
        }
        motes
            .into_iter()
            .flat_map(|mote| mote.join().unwrap())
            .collect()
    });
    let mut texts = api.texts_to("5");
    let sent = texts.len() as u64;
    texts.sort();
    texts.dedup();
    assert_eq!(texts.len() as u64, sent, "a text was sent twice");
    assert!(
        answered.iter().all(|text| texts.contains(text)),
        "a text that was answered 2.05 is lost"
    );
    // Five requests or five responses in a row are lost once in 200 times each, so nearly all must have come.
    let expected = if kill { count / 3 } else { count * 19 / 20 };
    assert!(
        answered.len() as u64 >= expected,
        "{} of {count} are answered",
        answered.len()
    );
}

/// What the firmware keeps of the tokens that it hears.
#[derive(Debug, Default, PartialEq)]
struct Heard {
    interval: String,
    users: BTreeMap<String, String>,
}

impl Heard {
    fn take(&mut self, reply: &str) {
        for token in reply.split(';') {
            match token.split_once(':') {
                Some((name, id)) => drop(self.users.insert(id.to_string(), name.to_string())),
                None if token.starts_with('r') => drop(self.users.remove(&token[1..])),
                None => self.interval = token.to_string(),
            }
        }
    }
}

/// 50 changes, with the gateway killed in the middle of a poll: the mote ends with what people wanted.
#[test]
fn every_change_arrives() {
    let (api, mut gateway) = start();
    let mut expected = Heard::default();
    let mut heard = Heard::default();
    for step in 0..50u64 {
        let chat = 1000 + step as i64 % 7;
        match step % 3 {
            0 => {
                api.person_writes(
                    chat,
                    &format!("P{chat}"),
                    &format!("config {PASSWORD} interval {}", step + 1),
                );
                expected.interval = format!("i{}", step + 1);
                expected.users.insert(chat.to_string(), format!("P{chat}"));
            }
            1 => {
                api.person_writes(chat, &format!("P{chat}"), "hi");
                expected.users.insert(chat.to_string(), format!("P{chat}"));
            }
            _ => {
                api.person_writes(chat, &format!("P{chat}"), "remove me");
                expected.users.remove(&chat.to_string());
            }
        }
        if step % 10 == 9 {
            let relay = Relay::start(gateway.address(), 1000 + step);
            let mote = Mote::new(relay.address);
            if step == 29 {
                mote.send(&mote.post("update", update(&api)));
                thread::sleep(Duration::from_millis(60));
                gateway.kill9();
                gateway.restart();
            }
            let request = mote.post("update", update(&api));
            if let Some(reply) = mote
                .reliable(&request, ACK_TIMEOUT, MAX_TRANSMIT_WAIT)
                .filter(|it| it.code() == "2.05")
            {
                heard.take(&reply.text());
            }
        }
    }
    let mote = Mote::new(gateway.address());
    for _ in 0..10 {
        match poll(&mote, &api).as_str() {
            "No Updates" => return assert_eq!(heard, expected),
            reply => heard.take(reply),
        }
    }
    panic!("the polls never end");
}
