//! Many motes at the same time, each with an address of its own and with the retransmission of RFC 7252: those that the
//! gateway has no time for yet wait in its socket.

use std::collections::HashSet;
use std::thread;
use std::time::{Duration, Instant};

use crate::support::*;

/// RFC 7252 §4.8.2: MAX_TRANSMIT_WAIT. Then a mote has given up.
const GIVEN_UP: Duration = Duration::from_secs(93);
const CHATS_EACH: usize = 3;

/// How a mote fared.
struct Fared {
    /// None: it has given up.
    code: Option<String>,
    waited: Duration,
}

/// So many motes send a text each, all within this time, to the chats that `chats` names.
fn crowd(
    api: &BotApi,
    motes: usize,
    within: Duration,
    chats: impl Fn(usize) -> String + Sync,
) -> Vec<Fared> {
    let gateway = Gateway::with(Setup::ipv4(api));
    let exchange = |number: usize| {
        let address = format!("127.0.{}.{}", 1 + number / 250, 1 + number % 250);
        let mote = Mote::at(&address, gateway.address());
        let text = format!("text {number}");
        let request = mote.post("message", message(api, &chats(number), &text));
        let share = number as f64 / motes as f64;
        thread::sleep(within.mul_f64(share));
        let start = Instant::now();
        let ack_timeout = Duration::from_secs(2) + Duration::from_secs(1).mul_f64(share);
        let response = mote.reliable(&request, ack_timeout, PATIENCE);
        Fared {
            code: response.map(|response| response.code()),
            waited: start.elapsed(),
        }
    };
    thread::scope(|scope| {
        let exchange = &exchange;
        let motes: Vec<_> = (0..motes)
            .map(|number| scope.spawn(move || exchange(number)))
            .collect();
        motes.into_iter().map(|mote| mote.join().unwrap()).collect()
    })
}

/// Says what came of it, and asserts how many texts arrived: none of them twice.
fn judge(api: &BotApi, fared: &[Fared], texts: usize, texts_at_least: usize) {
    let sent = api.seen().sent;
    let arrived: HashSet<_> = sent.iter().map(|sent| (&sent.chat, &sent.text)).collect();
    let served = fared.iter().filter(|it| it.code.as_deref() == Some("2.05"));
    println!(
        "{} of {texts} texts arrived, {} of {} motes were answered 2.05, {} gave up; the longest waited {:.1?}",
        arrived.len(),
        served.count(),
        fared.len(),
        fared.iter().filter(|it| it.code.is_none()).count(),
        fared.iter().map(|it| it.waited).max().unwrap(),
    );
    assert_eq!(arrived.len(), sent.len(), "a text was sent twice");
    assert!(arrived.len() >= texts_at_least, "{texts_at_least} must be");
}

/// Without limits of Telegram's, 50 ms away: everybody is served.
fn everybody_is_served(motes: usize) {
    let api = BotApi::start();
    api.set_round_trip(Duration::from_millis(50));
    let fared = crowd(&api, motes, Duration::ZERO, |_| "5".to_string());
    judge(&api, &fared, motes, motes);
    for mote in &fared {
        assert_eq!(mote.code.as_deref(), Some("2.05"));
        assert!(mote.waited < GIVEN_UP, "{:?}", mote.waited);
    }
}

#[test]
fn fifty_at_once() {
    everybody_is_served(50);
}

#[test]
#[ignore = "takes half a minute: cargo test --release crowd:: -- --include-ignored"]
fn three_hundred_at_once() {
    everybody_is_served(300);
}

/// Telegram refuses what comes faster than one text a second for a chat and 30 a second for the bot.
fn at_telegrams_pace(chats: impl Fn(usize) -> String + Sync) {
    let api = BotApi::start();
    api.set_pace(true);
    let fared = crowd(&api, 60, Duration::from_secs(1), chats);
    let texts = 60 * CHATS_EACH;
    judge(&api, &fared, texts, texts * 95 / 100);
    let refused = api
        .seen()
        .calls
        .iter()
        .filter(|it| it.status == 429)
        .count();
    println!("429 was answered {refused} times");
    assert!(refused > 0, "Telegram never found it too fast");
}

#[test]
fn sixty_with_three_chats_each() {
    at_telegrams_pace(|number| {
        let chats = (0..CHATS_EACH).map(|chat| (1000 + number * CHATS_EACH + chat).to_string());
        chats.collect::<Vec<_>>().join(",")
    });
}

#[test]
#[ignore = "takes more than a minute: cargo test --release crowd:: -- --include-ignored"]
fn sixty_with_the_same_three_chats() {
    at_telegrams_pace(|_| "1,2,3".to_string());
}
