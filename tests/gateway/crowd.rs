//! Many motes at the same time: those that the gateway has no time for yet wait in its socket.

use std::thread;
use std::time::Duration;

use crate::support::*;

const CHATS_EACH: usize = 3;

/// So many motes send a text each, all within this time, to the chats that `chats` names.
fn crowd(
    api: &BotApi,
    motes: usize,
    within: Duration,
    chats: impl Fn(usize) -> String + Sync,
) -> Outcome {
    let gateway = Gateway::with(Setup::ipv4(api));
    let asked = at_once(motes, |number| {
        let mut mote = FieldMote::new(number, 0, gateway.address());
        thread::sleep(within.mul_f64(number as f64 / motes as f64));
        mote.report(api, &chats(number))
    });
    judge(api, &asked, 1)
}

/// Without limits of Telegram's, 50 ms away: everybody is served.
fn everybody_is_served(motes: usize) {
    let api = BotApi::start();
    api.set_round_trip(Duration::from_millis(50));
    let outcome = crowd(&api, motes, Duration::ZERO, |_| "5".to_string());
    assert_eq!((outcome.served, outcome.arrived.len()), (motes, motes));
    assert!(outcome.longest < GIVEN_UP);
}

#[test]
fn fifty_at_once() {
    everybody_is_served(50);
}

#[test]
#[ignore = "takes half a minute"]
fn three_hundred_at_once() {
    everybody_is_served(300);
}

/// Telegram refuses what comes faster than one text a second for a chat and 30 a second for the bot.
fn at_telegrams_pace(chats: impl Fn(usize) -> String + Sync) {
    let api = BotApi::start();
    api.set_pace(true);
    let outcome = crowd(&api, 60, Duration::from_secs(1), chats);
    assert!(outcome.arrived.len() >= 60 * CHATS_EACH * 95 / 100);
    let calls = api.seen().calls;
    let refused = calls.iter().filter(|it| it.status == 429).count();
    println!("429 was answered {refused} times");
    // All of them take 6 s at 30 a second; a machine that is no faster by itself shows nothing here.
    let took = calls.last().unwrap().at - calls[0].at;
    let is_slow = took > Duration::from_secs(5);
    assert!(refused > 0 || is_slow, "never too fast, in {took:?}");
}

#[test]
fn sixty_with_three_chats_each() {
    at_telegrams_pace(|number| {
        let chats = (0..CHATS_EACH).map(|chat| (1000 + number * CHATS_EACH + chat).to_string());
        chats.collect::<Vec<_>>().join(",")
    });
}

#[test]
#[ignore = "takes more than a minute"]
fn sixty_with_the_same_three_chats() {
    at_telegrams_pace(|_| "1,2,3".to_string());
}
