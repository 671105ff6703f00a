//! What cannot be seen from outside within a test's time: hours, bounds, and tables.

use super::fixtures::firmware::Firmware;
use super::fixtures::mote::{self, BLOCK1, Kind, Message as Datagram, REQUEST_TAG};
use super::fixtures::{PASSWORD, Scratch, TOKEN, config, config_of, message, peer, secret, update};
use super::*;

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);
const MOMENT: Duration = Duration::from_millis(1);

// ---------- The message layer ----------

fn post(kind: Kind, id: u16) -> Datagram {
    Datagram::new(kind, mote::POST, id).path("update")
}

fn receive(exchanges: &mut Exchanges, now: Instant, from: u8, message: &Datagram) -> Event {
    exchanges.receive(now, peer(from), &message.encode())
}

fn request(exchanges: &mut Exchanges, now: Instant, from: u8, message: &Datagram) -> Request {
    match receive(exchanges, now, from, message) {
        Event::Request(request) => request,
        _ => panic!("no request: {message}"),
    }
}

/// Returns what a duplicate is answered with.
fn duplicate(exchanges: &mut Exchanges, now: Instant, message: &Datagram) -> Vec<u8> {
    match receive(exchanges, now, 1, message) {
        Event::Send(reply) => reply,
        _ => panic!("acted on twice: {message}"),
    }
}

/// RFC 7252 §4.8.2.
#[test]
fn derived_constants() {
    assert_eq!(coap::MAX_TRANSMIT_WAIT.as_secs(), 93);
    assert_eq!(coap::EXCHANGE_LIFETIME.as_secs(), 247);
    assert_eq!(coap::NON_LIFETIME.as_secs(), 145);
}

#[test]
fn duplicates_are_remembered_for_their_lifetime() {
    for (kind, seconds) in [(Kind::Con, 247), (Kind::Non, 145)] {
        for is_begun in [true, false] {
            let mut exchanges = Exchanges::new();
            let start = Instant::now();
            let message = post(kind, 7).option(BLOCK1, [0x10]); // a last block
            let first = request(&mut exchanges, start, 1, &message);
            let reply = match is_begun {
                true => exchanges.promise(&first),
                false => exchanges.respond_now(&first, &Response::bad_request("no")),
            };
            let end = start + seconds * SECOND;
            let again = duplicate(&mut exchanges, end - MOMENT, &message);
            match kind {
                Kind::Con => assert_eq!(again, reply),
                _ => assert!(again.is_empty()),
            }
            request(&mut exchanges, end, 1, &message);
            request(&mut exchanges, start, 2, &message); // somebody else
            request(&mut exchanges, start, 1, &post(kind, 7).payload("another"));
        }
    }
}

/// Nobody without a token can make a text go out twice.
#[test]
fn only_what_was_begun_pushes_out_what_was_begun() {
    let mut exchanges = Exchanges::new();
    let now = Instant::now();
    let first = post(Kind::Con, 0);
    let begun = request(&mut exchanges, now, 1, &first);
    exchanges.promise(&begun);
    let refusal = Response::bad_request("no");
    for id in 0..=coap::SEEN_MAX as u16 {
        let whole = post(Kind::Con, id);
        let block = post(Kind::Con, id).option(BLOCK1, [0x10]);
        for message in [whole, block] {
            let message = request(&mut exchanges, now, 2, &message);
            exchanges.respond_now(&message, &refusal);
        }
    }
    duplicate(&mut exchanges, now, &first);
    for id in 1..=coap::SEEN_MAX as u16 {
        let message = request(&mut exchanges, now, 1, &post(Kind::Con, id));
        exchanges.promise(&message);
    }
    request(&mut exchanges, now, 1, &first); // the oldest is forgotten
    duplicate(&mut exchanges, now, &post(Kind::Con, 1));
}

#[test]
fn a_refusal_is_judged_again() {
    let mut exchanges = Exchanges::new();
    let now = Instant::now();
    let mut replies = Vec::new();
    for _ in 0..2 {
        let message = request(&mut exchanges, now, 1, &post(Kind::Con, 7));
        replies.push(exchanges.respond_now(&message, &Response::bad_request("no")));
    }
    assert_eq!(replies[0], replies[1]);
}

/// RFC 7252 §4.2: 2 to 3 s, then twice that, four times.
#[test]
fn retransmission() {
    let mut firsts = Vec::new();
    for id in 0..50 {
        let mut exchanges = Exchanges::new();
        let start = Instant::now();
        let message = request(&mut exchanges, start, 1, &post(Kind::Con, id));
        let response = Response::text(ResponseType::Content, "i5");
        let bytes = exchanges.respond(start, &message, &response);
        let first = exchanges.next_due().unwrap() - start;
        firsts.push(first);
        let mut due = start;
        for doubled in [1, 2, 4, 8] {
            due += first * doubled;
            assert_eq!(exchanges.next_due(), Some(due));
            assert_eq!(exchanges.retransmissions(due - MOMENT), []);
            let again = exchanges.retransmissions(due);
            assert_eq!(again, [(peer(1), bytes.clone())]);
        }
        due += first * 16;
        assert_eq!(exchanges.retransmissions(due), [], "a fifth time");
        assert_eq!(exchanges.next_due(), None, "not given up");
    }
    let shortest = *firsts.iter().min().unwrap();
    let longest = *firsts.iter().max().unwrap();
    assert!(2 * SECOND <= shortest && longest <= 3 * SECOND);
    assert!(longest - shortest > SECOND / 2, "not random");
}

#[test]
fn of_the_responses_that_wait_for_their_ack_the_oldest_goes() {
    let mut exchanges = Exchanges::new();
    let now = Instant::now();
    let response = Response::text(ResponseType::Content, "i5");
    let mut sent = Vec::new();
    for id in 0..1100 {
        let message = request(&mut exchanges, now, 1, &post(Kind::Con, id));
        sent.push((peer(1), exchanges.respond(now, &message, &response)));
    }
    let again = exchanges.retransmissions(now + 3 * SECOND);
    assert!(again == sent[1100 - 1024..], "{} again", again.len());
}

#[test]
fn what_ends_retransmission() {
    let now = Instant::now();
    for (from, kind, ends, counts) in [
        (1, Kind::Ack, true, true),
        (1, Kind::Rst, true, false),
        (2, Kind::Ack, false, false),
        (2, Kind::Rst, false, false),
    ] {
        let mut exchanges = Exchanges::new();
        let message = request(&mut exchanges, now, 1, &post(Kind::Con, 7));
        let mut response = Response::text(ResponseType::Content, "i5");
        response.ticket = Some(3);
        let bytes = exchanges.respond(now, &message, &response);
        let id = u16::from_be_bytes([bytes[2], bytes[3]]);
        let event = receive(&mut exchanges, now, from, &Datagram::new(kind, 0, id));
        assert_eq!(matches!(event, Event::Acknowledged(3)), counts, "{kind:?}");
        assert_eq!(exchanges.next_due().is_none(), ends, "{kind:?}");
    }
}

// ---------- Block1 ----------

/// Assembles what has come. Returns the whole body, "" if blocks are missing, or why it is refused.
fn assemble(exchanges: &mut Exchanges, now: Instant, from: SocketAddr, block: &Datagram) -> String {
    let Event::Request(mut request) = exchanges.receive(now, from, &block.encode()) else {
        panic!("no request: {block}");
    };
    match exchanges.assemble(&mut request) {
        Ok(true) => String::from_utf8(request.packet.payload).unwrap(),
        Ok(false) => String::new(),
        Err(response) => response.code().to_string(),
    }
}

/// A block of 16 bytes; the last of a body has the number 2.
fn block(number: u32, letter: char) -> Datagram {
    let value = mote::block(number, number < 2, 16);
    let payload = letter.to_string().repeat(16);
    post(Kind::Con, 7).option(BLOCK1, value).payload(payload)
}

#[test]
fn an_abandoned_body_is_dropped() {
    let start = Instant::now();
    for (pause, outcome) in [(MINUTE - MOMENT, ""), (MINUTE, "4.08")] {
        let mut exchanges = Exchanges::new();
        assert_eq!(assemble(&mut exchanges, start, peer(1), &block(0, 'a')), "");
        let late = start + pause;
        let second = assemble(&mut exchanges, late, peer(1), &block(1, 'a'));
        assert_eq!(second, outcome);
    }
}

/// Copies of its last block keep a body: only the answers to them were lost.
#[test]
fn a_body_on_a_lossy_line_is_kept() {
    let start = Instant::now();
    let mut exchanges = Exchanges::new();
    let first = block(0, 'a');
    let request = request(&mut exchanges, start, 1, &first);
    exchanges.respond_now(&request, &Response::new(ResponseType::Continue));
    let Ok(false) = exchanges.assemble(&mut { request }) else {
        panic!("no first block");
    };
    duplicate(&mut exchanges, start + 45 * SECOND, &first);
    let later = start + 105 * SECOND;
    let second = block(1, 'a');
    assert_eq!(
        assemble(&mut exchanges, later - MOMENT, peer(1), &second),
        ""
    );
    let third = block(2, 'a');
    let whole = assemble(&mut exchanges, later + MINUTE, peer(1), &third);
    assert_eq!(whole, "4.08", "nothing came for a minute");
}

/// Whatever else its sender begins and finishes meanwhile.
#[test]
fn an_abandoned_body_is_not_kept_by_another() {
    let start = Instant::now();
    let mut exchanges = Exchanges::new();
    let mut send = |seconds: u32, number, letter| {
        let now = start + seconds * SECOND;
        assemble(&mut exchanges, now, peer(1), &block(number, letter))
    };
    assert_eq!(send(0, 0, 'a'), "");
    assert_eq!(send(0, 1, 'a'), "");
    assert_eq!(send(30, 0, 'b'), "");
    assert_eq!(send(31, 1, 'b'), "");
    let whole = send(60, 2, 'b');
    assert_eq!(whole.len(), 48, "{whole}");
}

/// Of a body, each letter is a block; the case is its Request-Tag.
#[test]
fn bodies_are_never_mixed() {
    for (blocks, outcome) in [
        ("a0 a1 a2", "_ _ aaa"),
        ("a0 a0 a1 a2", "_ _ _ aaa"),
        ("a0 a1 a0 a1 a2", "_ _ _ _ aaa"),
        ("a0 a1 a1 a2", "_ _ _ aaa"),
        ("a0 a1 a2 a2", "_ _ aaa 4.08"),
        ("a0 A0 a1 A1 a2 A2", "_ _ _ _ aaa AAA"),
        ("a0 b0 a1 b1 b2", "_ _ 4.08 4.08 4.08"),
        ("a0 b0 b1 a1 a2", "_ _ 4.08 4.08 4.08"),
        ("a0 b0 b1 b1", "_ _ 4.08 4.08"),
        ("a0 b0 b1 b0 a1", "_ _ 4.08 _ 4.08"),
        ("a0 a1 b0 a2 b1 b2", "_ _ _ aaa _ bbb"),
        ("a0 a1 b0 b1 a2 b2", "_ _ _ _ 4.08 4.08"),
        ("a0 a1 b0 b1 b1 a2", "_ _ _ _ _ 4.08"),
        ("a0 a2", "_ 4.08"),
        ("a0 a2 a1 a2", "_ 4.08 _ aaa"),
        ("a1", "4.08"),
    ] {
        let mut exchanges = Exchanges::new();
        let mut outcomes = Vec::new();
        for (id, step) in (1..).zip(blocks.split(' ')) {
            let letter = step.chars().next().unwrap();
            let tag = [u8::from(letter.is_uppercase())];
            let mut block = block(step[1..].parse().unwrap(), letter).option(REQUEST_TAG, tag);
            block.id = id;
            let outcome = assemble(&mut exchanges, Instant::now(), peer(1), &block);
            outcomes.push(match outcome.as_str() {
                "" => "_".to_string(),
                refusal if refusal.starts_with('4') => refusal.to_string(),
                body => body.chars().step_by(16).collect(),
            });
        }
        assert_eq!(outcomes.join(" "), outcome, "{blocks}");
    }
}

/// 512 KiB: each of these takes 1,024 bytes and what is around it.
#[test]
fn of_all_unfinished_bodies_the_oldest_goes() {
    let mut exchanges = Exchanges::new();
    let now = Instant::now();
    let first = mote::block(0, true, 1024);
    let last = mote::block(1, false, 1024);
    let first = post(Kind::Con, 1)
        .option(BLOCK1, first)
        .payload([b'a'; 1024]);
    let last = post(Kind::Con, 2).option(BLOCK1, last).payload("b");
    let sender = |port: u16| SocketAddr::new(peer(1).ip(), port);
    for port in 1..=600 {
        assert_eq!(assemble(&mut exchanges, now, sender(port), &first), "");
    }
    let mut whole = Vec::new();
    for port in 1..=600 {
        if assemble(&mut exchanges, now, sender(port), &last).len() == 1025 {
            whole.push(port);
        }
    }
    assert_eq!(whole.last(), Some(&600));
    assert_eq!(whole.len(), usize::from(601 - whole[0]), "not the oldest");
    assert!((350..=512).contains(&whole.len()), "{}", whole.len());
}

// ---------- Polling ----------

/// The gateway's own fetches, with what each of them meets.
struct Fetches {
    polling: Polling,
    start: Instant,
}

impl Fetches {
    fn new() -> Fetches {
        let start = Instant::now();
        let polling = Polling::new(Some(secret(TOKEN)), start);
        Fetches { polling, start }
    }

    fn at(&self, seconds: u64) -> Instant {
        self.start + Duration::from_secs(seconds)
    }

    /// Pages come until one is empty.
    fn succeed(&mut self, seconds: u64, has_news: bool) {
        let now = self.at(seconds);
        if has_news {
            self.polling.note_page(1, now);
        }
        self.polling.note_page(0, now);
        self.polling.note_fetch(&secret(TOKEN), has_news, now);
    }

    fn fail(&mut self, seconds: u64, failure: Failure) {
        let began = self.at(seconds);
        self.polling
            .note_failed_fetch(&failure, began, began + SECOND / 2);
    }

    /// A mote's text is sent.
    fn text(&mut self, seconds: u64, result: ApiResult) {
        let began = self.at(seconds);
        self.polling.note_texts(&[result], began, began);
    }

    /// Seconds until the next fetch.
    fn next(&self, seconds: u64) -> f64 {
        let due = self.polling.next_due().unwrap();
        let left = due.saturating_duration_since(self.at(seconds));
        left.as_secs_f64()
    }

    /// What a request gets, in seconds.
    fn time(&self, seconds: u64) -> f64 {
        let time = self.polling.request_time(self.at(seconds));
        time.as_secs_f64()
    }
}

fn unreachable() -> Failure {
    Failure::new("no route".to_string())
}

fn timed_out() -> Failure {
    Failure {
        timed_out: true,
        ..unreachable()
    }
}

/// An answer began, but nobody can read it: it comes too slowly, or it is a login page.
fn unreadable() -> Failure {
    Failure {
        http_began: true,
        ..unreachable()
    }
}

fn refused(code: u64, retry_after: Option<Duration>) -> Failure {
    Failure {
        error_code: Some(code),
        retry_after,
        ..unreadable()
    }
}

#[test]
fn a_fetch_comes_every_15_seconds_while_nobody_writes() {
    let mut fetches = Fetches::new();
    assert_eq!(fetches.next(0), 0.0, "right after the start");
    for seconds in [0, 15, 30] {
        fetches.succeed(seconds, false);
        assert_eq!(fetches.next(seconds), 15.0);
        let due = fetches.at(seconds + 15);
        assert!(fetches.polling.token_if_due(due - MOMENT).is_none());
        assert!(fetches.polling.token_if_due(due).is_some());
    }
}

#[test]
fn a_fetch_waits_for_a_bot() {
    let now = Instant::now();
    let mut polling = Polling::new(None, now);
    assert_eq!(polling.next_due(), None);
    polling.note_fetch(&secret(TOKEN), false, now);
    assert_eq!(polling.next_due(), Some(now + 15 * SECOND));
}

#[test]
fn a_conversation() {
    let mut fetches = Fetches::new();
    for (seconds, has_news, pause) in [
        (0, true, 3.0),
        (3, true, 3.0),
        (6, false, 6.0),
        (12, false, 12.0),
        (24, false, 15.0),
        (39, false, 15.0),
        (54, true, 3.0),
    ] {
        fetches.succeed(seconds, has_news);
        assert_eq!(fetches.next(seconds), pause, "at {seconds} s");
    }
}

/// Telegram would hold a fetch that repeats the offset of an empty page.
#[test]
fn an_empty_page_counts_for_three_seconds() {
    let mut fetches = Fetches::new();
    let counts = |fetches: &Fetches, token: &str, now| {
        let token = secret(token);
        fetches.polling.empty_page_holds(&token, now)
    };
    assert!(!counts(&fetches, TOKEN, fetches.start));
    fetches.succeed(0, true);
    assert!(counts(&fetches, TOKEN, fetches.at(3) - MOMENT));
    assert!(!counts(&fetches, TOKEN, fetches.at(3)));
    assert!(!counts(&fetches, "2:b", fetches.at(1)), "another bot");
    let now = fetches.at(2);
    fetches.polling.note_page(10, now);
    assert!(!counts(&fetches, TOKEN, now), "there may be more");
}

#[test]
fn a_failed_fetch_is_followed_in_a_minute() {
    for failure in [unreachable(), refused(401, None), refused(500, None)] {
        let mut fetches = Fetches::new();
        fetches.fail(0, failure);
        assert!(fetches.polling.is_failing);
        assert_eq!(fetches.next(0), 60.5);
        assert_eq!(fetches.time(1), 8.5, "no hang");
        assert_eq!(fetches.polling.page_limit, 10);
        fetches.succeed(61, false);
        assert!(!fetches.polling.is_failing);
        assert_eq!(fetches.next(61), 15.0);
    }
}

/// Each try that has all its time begins another minute.
#[test]
fn a_hang() {
    let mut fetches = Fetches::new();
    assert_eq!(fetches.time(0), 8.5);
    fetches.fail(0, timed_out());
    assert!(fetches.polling.is_failing);
    for (seconds, time) in [(5, 2.0), (59, 2.0), (60, 8.5)] {
        assert_eq!(fetches.time(seconds), time, "at {seconds} s");
    }
    fetches.fail(30, timed_out()); // a request's try of 2 s
    assert_eq!(fetches.next(30), 30.0, "put off");
    fetches.fail(60, timed_out());
    for (seconds, time) in [(61, 2.0), (119, 2.0), (120, 8.5)] {
        assert_eq!(fetches.time(seconds), time, "at {seconds} s");
    }
    fetches.succeed(120, false);
    assert_eq!(fetches.time(121), 8.5, "after its end");
}

/// The texts of one message: all have to time out before an answer began.
#[test]
fn what_texts_tell_of_a_hang() {
    let blocked = || Err(refused(403, None));
    let sent = || Ok(Value::Null);
    for (results, is_hang) in [
        (vec![Err(timed_out())], true),
        (vec![Err(timed_out()), Err(timed_out())], true),
        (vec![Err(timed_out()), sent()], false),
        (vec![Err(timed_out()), blocked()], false),
        (vec![Err(timed_out()), Err(unreachable())], false),
        (vec![Err(unreadable())], false),
        (vec![], false), // to nobody
    ] {
        let mut fetches = Fetches::new();
        fetches.succeed(0, false);
        let began = fetches.at(1);
        fetches.polling.note_texts(&results, began, began + SECOND);
        assert_eq!(fetches.time(2) == 2.0, is_hang, "{}", results.len());
        assert_eq!(fetches.next(1), if is_hang { 60.0 } else { 14.0 });
        assert!(!fetches.polling.is_failing, "no fetch has failed yet");
    }
}

#[test]
fn texts_that_time_out_begin_one_minute() {
    let mut fetches = Fetches::new();
    fetches.text(0, Err(timed_out()));
    fetches.text(30, Err(timed_out()));
    assert_eq!(fetches.next(30), 30.0);
    fetches.text(60, Err(timed_out()));
    assert_eq!(fetches.next(60), 60.0, "it had all its time");
}

/// An answer ends it, whoever sent it; a look-up that came to nothing does not.
#[test]
fn what_ends_a_hang() {
    for (failure, time) in [
        (unreadable(), 8.5),
        (refused(500, None), 8.5),
        (unreachable(), 2.0),
    ] {
        let mut fetches = Fetches::new();
        fetches.fail(0, timed_out());
        fetches.fail(60, failure);
        assert_eq!(fetches.time(61), time);
    }
}

#[test]
fn a_text_that_is_answered_ends_the_minute() {
    let sent = || Ok(Value::Null);
    for (failure, answer, next) in [
        (unreachable(), sent(), 0.0),
        (timed_out(), sent(), 0.0),
        (unreadable(), Err(refused(403, None)), 0.0),
        (refused(500, None), sent(), 0.0),
        (refused(409, None), sent(), 50.5), // a webhook is still there
    ] {
        let mut fetches = Fetches::new();
        fetches.fail(0, failure);
        fetches.text(9, Err(unreachable()));
        fetches.text(10, answer);
        assert_eq!(fetches.next(10), next);
        assert_eq!(fetches.time(10), 8.5);
    }
    let mut fetches = Fetches::new();
    fetches.succeed(0, false);
    fetches.text(1, sent());
    assert_eq!(fetches.next(1), 14.0, "nothing had failed");
}

#[test]
fn nobody_asks_before_retry_after() {
    let mut fetches = Fetches::new();
    fetches.fail(0, refused(429, Some(100 * SECOND)));
    let end = fetches.start + SECOND / 2 + 100 * SECOND;
    fetches.text(10, Ok(Value::Null));
    assert_eq!(fetches.polling.next_due(), Some(end));
    assert_eq!(fetches.polling.refused_for(end - MOMENT), Some(MOMENT));
    assert_eq!(fetches.polling.refused_for(end), None);
    let mut fetches = Fetches::new();
    fetches.fail(0, refused(429, None));
    assert_eq!(fetches.polling.refused_for(fetches.at(1)), None);
}

/// The unit of progress fits into the time for it.
#[test]
fn one_update_at_a_time_until_a_page_has_come() {
    let mut fetches = Fetches::new();
    fetches.fail(0, timed_out());
    assert_eq!(fetches.polling.page_limit, 1);
    fetches.polling.note_page(1, fetches.at(60));
    assert_eq!(fetches.polling.page_limit, 10);

    fetches.fail(70, unreadable());
    assert_eq!(fetches.polling.page_limit, 1);
    assert_eq!(fetches.next(70), 3.5, "soon, for it is much less");
    assert_eq!(fetches.time(71), 8.5, "a slow line is no hang");
    fetches.fail(74, unreadable());
    assert_eq!(fetches.polling.page_limit, 1);
    assert_eq!(fetches.next(74), 60.5, "it was as little before");
}

// ---------- Telegram ----------

fn refusal(code: u16, description: &str, parameters: Value) -> Failure {
    let answer = json!({
        "ok": false, "error_code": code, "description": description, "parameters": parameters
    });
    read_answer(code, answer.to_string().as_bytes()).unwrap_err()
}

#[test]
fn refusals_of_the_bot_api() {
    let not_found = "Bad Request: chat not found";
    let failure = refusal(400, not_found, Value::Null);
    assert_eq!(failure.reason, format!("400 {not_found}"));
    assert_eq!(failure.error_code, Some(400));
    assert!(failure.http_began && !failure.timed_out);

    let moved = refusal(400, not_found, json!({"migrate_to_chat_id": -1001}));
    let told = "(its id is now -1001: tell the mote)";
    assert!(moved.reason.ends_with(told), "{}", moved.reason);

    for (code, retry_after) in [(429, Some(7 * SECOND)), (500, None)] {
        let failure = refusal(code, "later", json!({"retry_after": 7}));
        assert_eq!(failure.retry_after, retry_after, "{code}");
    }
}

/// What comes from a proxy or a login page decides nothing.
#[test]
fn answers_of_something_in_between() {
    for (status, body) in [
        (200, "<html>"),
        (200, "{}"),
        (200, r#"{"ok":"true"}"#),
        (201, r#"{"ok":true,"result":[]}"#),
        (403, ""),
        (403, "[]"),
        (403, r#"{"ok":true,"error_code":403}"#),
        (403, r#"{"ok":false,"error_code":"403"}"#),
        (502, r#"{"ok":true,"result":[]}"#),
    ] {
        let failure = read_answer(status, body.as_bytes()).unwrap_err();
        let told = format!("HTTP {status} with {} bytes", body.len());
        assert!(failure.reason.starts_with(&told), "{}", failure.reason);
        assert!(failure.http_began && !failure.timed_out, "{body}");
        assert_eq!(failure.error_code, None, "{body}");
        assert_eq!(failure.retry_in(), None, "{body}");
    }
    let page = read_answer(200, br#"{"ok":true,"result":[7]}"#);
    assert!(page.is_ok_and(|page| page == json!([7])));
}

/// Only what surely had no effect, or was put off, is tried again.
#[test]
fn what_is_tried_again() {
    let no_effect = Failure {
        was_unsent: true,
        ..unreachable()
    };
    for (failure, retry_in, is_final) in [
        (unreachable(), None, false),
        (timed_out(), None, false),
        (unreadable(), None, false),
        (no_effect, Some(SECOND / 2), false),
        (refused(429, Some(3 * SECOND)), Some(3 * SECOND), false),
        (refused(429, None), None, false),
        (refused(400, None), None, true),
        (refused(500, None), None, false),
    ] {
        assert_eq!(failure.retry_in(), retry_in, "{:?}", failure.error_code);
        assert_eq!(failure.is_final(), is_final, "{:?}", failure.error_code);
    }
}

#[test]
fn numbers_of_seconds() {
    for (value, seconds) in [
        (json!(0), Some(0.0)),
        (json!(7), Some(7.0)),
        (json!(0.5), Some(0.5)),
        (json!("7"), Some(7.0)),
        (json!(" 1.5 "), Some(1.5)),
        (json!(86_400), Some(86_400.0)),
        (json!(86_401), Some(86_400.0)),
        (json!(-1), None),
        (json!("NaN"), None),
        (json!("inf"), Some(86_400.0)),
        (json!(""), None),
        (json!(true), None),
        (json!([7]), None),
        (Value::Null, None),
    ] {
        let expected = seconds.map(Duration::from_secs_f64);
        assert_eq!(super::seconds(&value), expected, "{value}");
    }
}

#[test]
fn hints_fit_their_cause() {
    let conflict = "Conflict: terminated by other getUpdates request; \
        make sure that only one bot instance is running";
    let webhook = "Conflict: can't use getUpdates method while webhook is active; \
        use deleteWebhook to delete the webhook first";
    for (code, description, told) in [
        (401, "Unauthorized", "token"),
        (404, "Not Found", "token"),
        (409, conflict, "other program"),
        (409, webhook, "deleteWebhook"),
        (400, "Bad Request: chat not found", ""),
        (403, "Forbidden: bot was blocked by the user", ""),
        (500, "Internal Server Error: restart", ""),
    ] {
        let reason = refusal(code, description, Value::Null).reason;
        let hint = reason.replace(&format!("{code} {description}"), "");
        assert_eq!(hint.is_empty(), told.is_empty(), "{reason}");
        assert!(hint.contains(told), "{reason}");
    }
}

// ---------- Motes ----------

/// Motes that have acknowledged version 1 in a request with this message ID.
fn motes(message_id: u16, now: Instant) -> Motes {
    let mut motes = Motes::default();
    motes.note_request(peer(1), message_id, now);
    motes.acknowledge(peer(1), 1, now);
    motes
}

#[test]
fn an_acknowledgement_holds_for_an_hour() {
    let mut motes = Motes::default();
    let now = Instant::now();
    motes.note_request(peer(1), 7, now);
    let version = motes.version_of("i5");
    assert!(!motes.has_acknowledged(peer(1), version, now));
    motes.acknowledge(peer(1), version, now);
    assert!(motes.has_acknowledged(peer(1), version, now + HOUR - MOMENT));
    assert!(!motes.has_acknowledged(peer(1), version, now + HOUR));
    assert!(!motes.has_acknowledged(peer(2), version, now));
    assert_eq!(motes.version_of("i5"), version);
    let next = motes.version_of("i6");
    assert!(!motes.has_acknowledged(peer(1), next, now));
    assert_ne!(
        motes.version_of("i5"),
        version,
        "the mote may have heard i6"
    );
}

#[test]
fn the_longest_silent_mote_is_forgotten() {
    let now = Instant::now();
    let mut motes = Motes::default();
    for number in 1..=64 {
        motes.note_request(peer(number), 7, now);
        motes.acknowledge(peer(number), 1, now);
    }
    motes.note_request(peer(1), 8, now);
    motes.note_request(peer(65), 7, now);
    for (number, is_known) in [(1, true), (2, false), (3, true), (64, true)] {
        let knows = motes.has_acknowledged(peer(number), 1, now);
        assert_eq!(knows, is_known, "mote {number}");
    }
}

#[test]
fn restarted_motes() {
    let now = Instant::now();
    for (step, pause, goes_on) in [
        (1, SECOND, true),
        (64, HOUR, true),
        (65, SECOND, false),
        (0, SECOND, false),
        (-1, SECOND, true),
        (-64, 93 * SECOND - MOMENT, true),
        (-64, 93 * SECOND, false),
        (-65, SECOND, false),
    ] {
        for last in [7, u16::MAX - 1] {
            let mut motes = motes(last, now);
            let next = last.wrapping_add_signed(step);
            motes.note_request(peer(1), next, now + pause);
            let knows = motes.has_acknowledged(peer(1), 1, now);
            assert_eq!(knows, goes_on, "{step} after {last}, {pause:?} later");
        }
    }
}

/// What is late says nothing new: the highest message ID stays, and when it came.
#[test]
fn a_late_request() {
    let now = Instant::now();
    let mut motes = motes(100, now);
    motes.note_request(peer(1), 40, now + 90 * SECOND);
    motes.note_request(peer(1), 164, now + 91 * SECOND);
    assert!(
        motes.has_acknowledged(peer(1), 1, now),
        "164 goes on from 100"
    );
    motes.note_request(peer(1), 163, now + 120 * SECOND);
    assert!(motes.has_acknowledged(peer(1), 1, now), "164 is 29 s old");
}

#[test]
fn a_mote_is_its_address() {
    let now = Instant::now();
    let mut motes = motes(7, now);
    let other_port = SocketAddr::new(peer(1).ip(), 9);
    motes.note_request(other_port, 4711, now);
    assert!(motes.has_acknowledged(other_port, 1, now));
    let mapped = "[::ffff:10.0.0.1]:9".parse().unwrap();
    assert!(motes.has_acknowledged(mapped, 1, now), "the same address");
}

// ---------- State ----------

#[test]
fn settings_and_ten_users_fit() {
    let mut state = State::default();
    for number in 1..=10 {
        state.register(CHAT_ID_MAX - number, &format!("{number:_>14}"));
    }
    state.interval = Some(120);
    state.feedback = Some(1);
    let all = state.summary();
    assert_eq!(all.len(), 277);
    for (ids, told) in [
        (&[11, 12, 13][..], "r11;r12;r13;"),
        (&[CHAT_ID_MAX, 11, 12], "r99999999999;r11;r12;"),
        (&[11, CHAT_ID_MAX - 20, CHAT_ID_MAX], "r99999999999;"),
    ] {
        let mut state = state.clone();
        for id in ids {
            state.remove(*id);
        }
        assert_eq!(state.summary(), told.to_string() + &all, "{ids:?}");
    }
}

#[test]
fn removals_alone_fill_a_reply() {
    let mut state = State::default();
    for id in 100_000_001..=100_000_099 {
        state.remove(id);
    }
    let summary = state.summary();
    assert_eq!(summary.len(), 27 * 11 - 1); // one more would be 307
    assert!(summary.ends_with("r100000099") && !summary.contains(";;"));
}

#[test]
fn the_latest_removals_are_remembered() {
    let mut state = State::default();
    for id in 201..=301 {
        state.remove(id);
    }
    state.remove(202); // again: the latest, not twice
    for id in 1..=60 {
        state.register(id, "Ada");
        state.remove(id);
    }
    state.remove(2); // once is enough
    let removed: Vec<i64> = state.removals().collect();
    let expected = (263..=301).chain([202]).chain(1..=60);
    assert_eq!(removed, expected.collect::<Vec<i64>>());
    for id in [50, 290] {
        state.register(id, "Ada");
        assert!(!state.is_removed(&ChatId::Number(id)), "and registered");
    }
    for id in 400..=500 {
        state.register(id, "Ada");
        state.remove(id);
    }
    assert!(state.removals().eq(401..=500), "strangers go first");
}

/// Whoever was registered may have a place in a mote that somebody else needs.
#[test]
fn strangers_who_stop_push_nobody_out_of_a_reply() {
    let mut state = State::default();
    let mut mote = Firmware::default();
    for chat in 1_000_000_001..=1_000_000_010 {
        state.register(chat, &format!("User {chat}"));
    }
    mote.take(&state.summary());
    state.remove(1_000_000_001);
    (2_000_000_001..=2_000_000_020).for_each(|chat| drop(state.remove(chat)));
    state.register(1_000_000_011, "Cy");
    mote.take(&state.summary());
    assert!(mote.chat_ids().contains("1000000011"), "no room for Cy");
}

#[test]
fn ten_people_register() {
    let mut state = State::default();
    for chat in 1..=10 {
        assert!(state.register(chat, "Ada").is_some());
    }
    assert!(state.register(11, "Bob").is_none());
    assert!(state.register(10, "Bob").is_some());
    assert_eq!(state.users[9].name, "Ada_10", "a name is kept");
    assert_eq!(state.remove(10), "Ada_10 (10)");
    assert!(state.register(11, "Bob").is_some());
}

/// The firmware puts a user where it finds the name or the id: a name that somebody took must come
/// after the news that it is free.
#[test]
fn a_name_that_changes_hands() {
    let mut state = State::default();
    let mut mote = Firmware::default();
    for (chat, name) in [(1, "Ada"), (2, "Bob"), (3, "Cy")] {
        state.register(chat, name);
    }
    mote.take(&state.summary());
    state.remove(1);
    state.register(4, "Ada");
    state.register(1, "Ada");
    mote.take(&state.summary());
    assert_eq!(mote.users(), ["Ada:4", "Ada_2:1", "Bob:2", "Cy:3"]);
}

/// Neither an update of the program nor a way back loses anybody; what is no state is kept aside.
#[test]
fn states_of_other_versions() {
    let before = r#"{"interval": 5, "feedback": null, "users": [{"name": "Ada", "chat": 5}],
        "removed": [6], "bot": "123456789", "offset": 7, "ignore_commands_before": null}"#;
    for (content, summary, offset) in [
        (before, "r6;i5;Ada:5", 7),
        ("{}", "", 0),
        ("\u{feff}{\"offset\": 7, \"bot\": \"123456789\"}", "", 7),
        (r#"{"interval": 0, "feedback": 2}"#, "", 0),
        (r#"{"interval": 121, "feedback": 1}"#, "f1", 0),
        (
            r#"{"interval": 300, "feedback": -1, "users": [{"chat": 5}]}"#,
            "user:5",
            0,
        ),
        (
            r#"{"users": [{"chat": 1, "name": "a;i9"}, {"chat": 2, "name": "ai9"}, {"chat": 1}, {"chat": -1}]}"#,
            "ai9:1;ai9_2:2",
            0,
        ),
        (
            r#"{"users": [{"chat": 1}], "removed": [1, 2, -5, 3, 2]}"#,
            "r3;r2;user:1",
            0,
        ),
        (
            r#"{"users": [{"chat": 5}, {"name": "", "chat": 6}]}"#,
            "user:5;user_2:6",
            0,
        ),
        (r#"{"bot": "123456789", "offset": 7, "new": [1]}"#, "", 7),
        (r#"{"bot": "1", "offset": 7, "interval": 5}"#, "i5", 0),
        (r#"{"offset": 7}"#, "", 0),
        (r#"{"users": [{"name": "Ada"}]}"#, "damaged", 0),
        (r#"[5, null, [], [], null, 7]"#, "damaged", 0),
        ("", "damaged", 0),
    ] {
        let scratch = Scratch::new();
        let mut config = config(Some(TOKEN));
        config.state_path = scratch.0.join("state.json");
        fs::write(&config.state_path, content).unwrap();
        let Ok(state) = State::open(&config) else {
            panic!("not opened: {content}");
        };
        let aside = fs::read_to_string(scratch.0.join("state.json.damaged"));
        match summary {
            "damaged" => assert_eq!(aside.unwrap(), content),
            _ => assert_eq!(state.summary(), summary, "{content}"),
        }
        assert_eq!(state.offset, offset, "{content}");
        assert_eq!(state.bot.as_deref(), Some("123456789"), "{content}");
    }
}

/// A state with users of these names, whose chats are 1, 2, ….
fn state_of(names: &[&str]) -> State {
    let users = (1..).zip(names).map(|(chat, name)| User {
        name: name.to_string(),
        chat,
    });
    State {
        users: users.collect(),
        ..State::default()
    }
}

#[test]
fn names_on_the_wire() {
    for (name, taken, expected) in [
        ("Ada", &[][..], "Ada"),
        ("", &[], "user"),
        (" ;:,&=\n\u{7f} ", &[], "user"),
        ("\u{200b}\u{202e}\u{feff}", &[], "user"),
        ("A;d:a,&=\u{1b}", &[], "Ada"),
        ("\u{202e}A\u{200d}da", &[], "Ada"),
        ("\u{200b}r2", &[], "_r2"),
        ("Ada\tLovelace", &[], "Ada Lovelace"),
        ("Ada Lovelace, Countess", &[], "Ada Lovelace C"),
        ("Ada Lovelace  Countess", &[], "Ada Lovelace C"),
        ("Ada Loveland , Countess", &[], "Ada Loveland C"),
        ("Ada Lovelace1 Countess", &[], "Ada Lovelace1"),
        ("Ada & = Bob", &[], "Ada Bob"),
        ("\u{1bca0}\u{fff0}", &[], "user"),
        ("ääääääää", &[], "äääääää"),
        ("abcdefghijklmä", &[], "abcdefghijklm"),
        ("f0rd", &[], "_f0rd"),
        ("f2", &[], "f2"),
        ("F0", &[], "F0"),
        ("i5", &[], "_i5"),
        ("ian", &[], "ian"),
        ("r2d2", &[], "_r2d2"),
        ("r2d2r2d2r2d2r2", &[], "_r2d2r2d2r2d2r"),
        ("all", &[], "_all"),
        ("ally", &[], "ally"),
        ("007", &[], "_007"),
        ("Ada", &["Ada"], "Ada_2"),
        ("Ada", &["Ada", "Ada_2"], "Ada_3"),
        ("Ada", &["ada"], "Ada"),
        ("", &["user"], "user_2"),
        ("abcdefghijklmn", &["abcdefghijklmn"], "abcdefghijkl_2"),
        ("i5", &["_i5"], "_i5_2"),
    ] {
        let free = state_of(taken).free_name(name);
        assert_eq!(free, expected, "{name:?} {taken:?}");
    }
}

#[test]
fn whom_somebody_means() {
    let state = state_of(&["Ada", "ada", "_007", "Grace Hopper", "user", "_12"]);
    for (meant, found) in [
        ("Ada", Some(1)),
        ("ada", Some(2)),
        ("ADA", Some(1)),
        ("_007", Some(3)),
        ("grace hopper", Some(4)),
        ("Grace Hopper of the Navy", None),
        ("12", Some(6)),                       // it is somebody's name
        ("99999999999", Some(99_999_999_999)), // the firmware may have it built in
        ("100000000000", None),
        ("-5", None),
        ("Eve", None),
        ("", None),
        (";", None),
    ] {
        assert_eq!(state.find(meant), found, "{meant:?}");
    }
}

// ---------- People ----------

/// Those who write, with what their messages lead to.
struct Town {
    people: People,
    state: State,
    config: Config,
}

impl Town {
    fn new() -> Town {
        Town {
            people: People::default(),
            state: State::default(),
            config: config(Some(TOKEN)),
        }
    }

    fn with_registration_by_password() -> Town {
        let mut town = Town::new();
        town.config.registration_by_password = true;
        town
    }

    fn take(&mut self, message: Value) {
        let update = update(message);
        self.people.take(&update, &mut self.state, &self.config);
    }

    /// Returns what is answered.
    fn write(&mut self, chat: i64, text: &str) -> String {
        self.take(message(chat, "Ada", text));
        self.answer(chat)
    }

    fn answer(&mut self, chat: i64) -> String {
        let mut texts = Vec::new();
        for answer in &mut self.people.answers {
            if answer.chat == chat {
                texts.append(&mut answer.texts);
            }
        }
        texts.join("\n")
    }
}

/// For both commands together.
#[test]
fn a_lock_out_ends_after_an_hour() {
    let mut town = Town::with_registration_by_password();
    let set = format!("config {PASSWORD} interval 7");
    let register = format!("register {PASSWORD}");
    for _ in 0..2 {
        for wrong in ["config x interval 7", "register x"].repeat(2) {
            assert_eq!(town.write(5, wrong), WRONG_PASSWORD);
        }
        assert!(town.write(5, "register x").contains("ignored for an hour"));
        assert_eq!(town.write(5, &set), "");
        assert_eq!(town.write(5, &register), "");
        town.people.suspects[0].last_at -= HOUR - 5 * SECOND;
        assert_eq!(town.write(5, &set), "", "it ends too soon");
        town.people.suspects[0].last_at -= 5 * SECOND;
    }
    assert_eq!(town.state.interval, None);
    assert!(!town.state.is_user(5));
    town.write(5, "config x interval 7");
    town.write(5, &set);
    assert_eq!(town.state.interval, Some(7));
    assert!(town.people.suspects.is_empty(), "still counted");
}

#[test]
fn of_the_suspects_the_oldest_is_forgotten() {
    let mut town = Town::new();
    for chat in 1..=300 {
        town.write(chat, "config x interval 7");
    }
    let suspects = town.people.suspects.iter().map(|suspect| suspect.chat);
    assert!(suspects.eq(45..=300));
}

#[test]
fn of_the_deletions_the_oldest_is_given_up() {
    let mut town = Town::new();
    for id in 1..=120 {
        let mut message = message(5, "Ada", "config x");
        message["message_id"] = json!(id);
        town.take(message);
    }
    let ids = town.people.deletions.iter();
    assert!(ids.map(|deletion| deletion.message_id).eq(21..=120));
}

#[test]
fn of_the_answers_the_oldest_is_dropped() {
    let mut town = Town::new();
    for chat in 1..=120 {
        town.take(message(chat, "Ada", "config x"));
    }
    let chats = town.people.answers.iter().map(|answer| answer.chat);
    assert!(chats.eq(21..=120));
}

#[test]
fn who_can_register() {
    for (chat, can_register) in [
        (
            json!({"id": 5, "type": "private", "first_name": "Ada"}),
            true,
        ),
        (
            json!({"id": 5, "type": "private", "first_name": null}),
            true,
        ),
        (json!({"id": 5, "type": "private", "title": 7}), true),
        (json!({"id": 5, "type": "private"}), true),
        (json!({"id": 5, "type": "group"}), false),
        (json!({"id": 5, "type": "channel"}), false),
        (json!({"id": 5, "type": null}), false),
        (json!({"id": 5}), false),
        (json!({"id": "5", "type": "private"}), false),
        (json!({"id": 5.5, "type": "private"}), false),
        (json!({"id": -5, "type": "private"}), false),
        (json!({"id": 99_999_999_999_i64, "type": "private"}), true),
        (json!({"id": 100_000_000_000_i64, "type": "private"}), false),
        (json!([]), false),
        (Value::Null, false),
    ] {
        let mut town = Town::new();
        town.take(json!({"chat": chat, "text": "hi"}));
        assert_eq!(town.state.users.len(), usize::from(can_register), "{chat}");
        let is_answered = !town.people.answers.is_empty();
        assert_eq!(is_answered, can_register, "{chat}");
        assert_eq!(town.state.offset, 2, "it would come again: {chat}");
    }
}

/// Everything but a person's text, caption or media is a service message, or odd.
#[test]
fn what_counts_as_writing() {
    let timer = json!({"message_auto_delete_time": 86_400});
    for (content, is_writing) in [
        (json!({"text": "hi"}), true),
        (json!({"text": "hi", "date": -1}), true),
        (json!({"text": "hi", "date": 1.5}), true),
        (json!({"text": "hi", "from": null}), true),
        (json!({"text": "hi", "from": {"is_bot": true}}), false),
        (json!({"text": null, "caption": "hi"}), true),
        (json!({"text": 7, "sticker": {}}), true),
        (json!({"photo": []}), true),
        (json!({"photo": null}), false),
        (json!({"text": null, "caption": ""}), false),
        (json!({"pinned_message": {"text": "hi"}}), false),
        (json!({"message_auto_delete_timer_changed": timer}), false),
        (json!({"gift": {"text": "hi"}}), false),
        (json!({}), false),
    ] {
        let mut town = Town::new();
        let mut message = content.clone();
        message["chat"] = json!({"id": 5, "type": "private"});
        town.take(message);
        assert_eq!(town.state.is_user(5), is_writing, "{content}");
        let is_answered = !town.people.answers.is_empty();
        assert_eq!(is_answered, is_writing, "{content}");
    }
}

#[test]
fn whoever_left_comes_back_by_a_text() {
    let chat = json!({"id": 5, "type": "private"});
    for (message, comes_back) in [
        (json!({"chat": chat, "sticker": {}}), false),
        (json!({"chat": chat, "photo": [], "caption": "hi"}), false),
        (json!({"chat": chat, "pinned_message": {}}), false),
        (json!({"chat": chat, "text": "hi"}), true),
    ] {
        let mut town = Town::new();
        town.write(5, "remove me");
        town.take(message.clone());
        assert_eq!(town.state.is_user(5), comes_back, "{message}");
    }
}

#[test]
fn commands() {
    let open = config(Some(TOKEN));
    let mut by_password = config(Some(TOKEN));
    by_password.registration_by_password = true;
    for (text, expected) in [
        ("remove me", "leave"),
        (" Remove\n ME. ", "leave"),
        ("/remove_me@lab_bot", "leave"),
        ("/remove@lab_bot me", "leave"),
        ("\u{200b}remove \u{2060}me\u{fe0f} !", "leave"),
        ("re\u{ad}mo\u{200d}ve me", "leave"),
        ("\"stop\"", "leave"),
        ("/STOP@lab_bot", "leave"),
        ("remove", "unknown"),
        ("please remove me", "unknown"),
        ("removeme", "unknown"),
        ("stop it", "unknown"),
        ("help", "help"),
        ("¿Help?", "help"),
        ("/help@lab_bot", "help"),
        ("/start", "help"),
        ("/start sensor1", "help"),
        ("started", "unknown"),
        ("", "none"),
        (" \n\u{200b} \u{feff}", "none"),
        ("!", "unknown"),
        ("config", "config"),
        ("/Config@lab_bot a b 1", "config"),
        ("configure a b 1", "unknown"),
        ("my config a b 1", "unknown"),
        ("register a", "register"),
        ("/register@lab_bot", "register"),
    ] {
        let kind = |config: &Config| match Command::read(text, config) {
            Command::Nothing => "none",
            Command::Leave => "leave",
            Command::Help => "help",
            Command::Config(_) => "config",
            Command::Register(_) => "register",
            Command::Unknown => "unknown",
        };
        assert_eq!(kind(&by_password), expected, "{text:?}");
        let in_open = expected.replace("register", "unknown");
        assert_eq!(kind(&open), in_open, "{text:?}");
    }
}

/// The password stays as it was written.
#[test]
fn settings_that_people_make() {
    for (text, interval, feedback) in [
        ("config geheim interval 7", Some(7), None),
        ("/config@lab_bot geheim INTERVAL: \"120\".", Some(120), None),
        ("Config\ngeheim  interval\t<1>", Some(1), None),
        ("- / config geheim interval 7", Some(7), None),
        ("config geheim feedback 0!", None, Some(0)),
        ("config geheim feedback (1)", None, Some(1)),
        ("config geheim interval 0", None, None),
        ("config geheim interval 121", None, None),
        ("config geheim interval +7", None, None),
        ("config geheim interval -7", None, None),
        ("config geheim interval 7.5", None, None),
        ("config geheim interval 7 8", None, None),
        ("config geheim interval", None, None),
        ("config geheim feedback 2", None, None),
        ("config geheim intervall 7", None, None),
        ("config Geheim interval 7", None, None),
        ("config geheim. interval 7", None, None),
        ("config \"geheim\" interval 7", None, None),
    ] {
        let mut town = Town::new();
        let answer = town.write(5, text);
        let state = &town.state;
        assert_eq!(
            (state.interval, state.feedback),
            (interval, feedback),
            "{text:?}"
        );
        let is_set = interval.is_some() || feedback.is_some();
        assert_eq!(answer.contains("is set to"), is_set, "{text:?}: {answer}");
        assert_eq!(
            answer.contains("Nothing was changed"),
            !is_set,
            "{text:?}: {answer}"
        );
        assert_eq!(town.people.deletions.len(), 1, "{text:?}");
    }
}

#[test]
fn whom_the_owner_removes() {
    for (command, gone) in [
        ("config geheim remove Ada", Some(1)),
        ("/config@lab_bot geheim REMOVE \"ada.\"", Some(1)),
        ("CONFİG geheim Remove Ada", Some(1)), // in capitals of a Turkish keyboard
        ("config geheim remove Grace Hopper", Some(2)),
        ("config geheim remove 2!", Some(2)),
        ("config geheim remove 7", Some(7)), // the firmware may have it built in
        ("config geheim remove Eve", None),
        ("config geheim remove", None),
        ("config x remove Ada", None),
    ] {
        let mut town = Town::new();
        town.state = state_of(&["Ada", "Grace Hopper"]);
        let shown = match gone {
            Some(chat @ 1..=2) => town.state.users[chat as usize - 1].to_string(),
            _ => "7".to_string(),
        };
        let answer = town.write(9, command);
        let confirmation = format!("{shown} is removed.");
        assert_eq!(answer.contains(&confirmation), gone.is_some(), "{answer}");
        assert!(town.state.removals().eq(gone), "{command}");
        for chat in 1..=2 {
            let is_gone = gone == Some(chat);
            assert_eq!(town.state.is_user(chat), !is_gone, "{command}");
            let told = town.answer(chat);
            assert_eq!(told.contains("You are removed"), is_gone, "{told}");
        }
    }
}

/// Only what begins with a command that takes the password is deleted. A caption is never carried
/// out.
#[test]
fn what_is_deleted_from_its_chat() {
    let register = format!("register {PASSWORD}");
    let config = format!("config {PASSWORD} interval 7");
    for (key, text, by_password, is_deleted) in [
        ("text", config.as_str(), false, true),
        ("text", "config", false, true),
        ("text", &register, true, true),
        ("text", &register, false, false),
        ("text", PASSWORD, true, false),
        ("text", "to config it", false, false),
        ("caption", &config, false, true),
        ("caption", &register, true, true),
        ("caption", "hi", true, false),
    ] {
        let mut group = message(5, "Ada", text);
        group["chat"] = json!({"id": -5, "type": "group", "title": "Lab"});
        let mut town = Town::new();
        town.config.registration_by_password = by_password;
        town.take(group);
        let is_kept = town.people.deletions.is_empty();
        assert_eq!(is_kept, !is_deleted, "{text} in a group");
        assert!(town.state.users.is_empty() && town.state.interval.is_none());
        let mut town = Town::new();
        town.config.registration_by_password = by_password;
        let mut message = message(5, "Ada", "");
        message["photo"] = json!([]);
        message[key] = json!(text);
        town.take(message);
        let is_kept = town.people.deletions.is_empty();
        assert_eq!(is_kept, !is_deleted, "{text} in a {key}");
        let is_carried_out = key == "text" && text == config;
        assert_eq!(town.state.interval.is_some(), is_carried_out, "{text}");
        let registers = !by_password || key == "text" && text == register;
        assert_eq!(town.state.is_user(5), registers, "{text} in a {key}");
    }
}

// ---------- Tables ----------

#[test]
fn fields() {
    let form = "&url=u&token=t&chat_ids=1,2&text=a&b=c&url=d \n\0\0";
    for (key, value) in [("url", "u"), ("token", "t"), ("chat_ids", "1,2")] {
        assert_eq!(field(form, &format!("&{key}=")), value);
    }
    assert_eq!(field(form, TEXT), "a&b=c&url=d");
    for (form, text) in [
        ("&text=a&token=t", "a"),
        ("&text=\0 a b \0", "a b"),
        ("&text=&token=t", ""),
        ("&text=a%20&+=;", "a%20&+=;"),
        ("&text=a&text=b", "a&text=b"),
        ("&token=text=a", ""),
    ] {
        assert_eq!(field(form, TEXT), text, "{form}");
    }
}

#[test]
fn chat_ids() {
    let ten = "1,2,3,4,5,6,7,8,9,10";
    for (list, expected) in [
        ("1", Some("[1]")),
        (" 1 , ,-2,\0@ab_1,1,", Some(r#"[1,-2,"@ab_1"]"#)),
        (ten, Some("[1,2,3,4,5,6,7,8,9,10]")),
        ("1,2,3,4,5,6,7,8,9,10,11", None),
        ("9223372036854775807", Some("[9223372036854775807]")),
        ("9223372036854775808", None),
        ("", None),
        (",", None),
        ("+1", None),
        ("1.5", None),
        ("ab", None),
        ("@", None),
        ("@a-b", None),
        ("@ä", None),
        ("1;2", None),
        ("-100123:45", None),
    ] {
        let chats = read_chats(list).ok().map(|chats| json!(chats).to_string());
        assert_eq!(chats.as_deref(), expected, "{list:?}");
    }
    assert!(ChatId::parse(&format!("@{}", "a".repeat(32))).is_some());
    assert!(ChatId::parse(&format!("@{}", "a".repeat(33))).is_none());
}

#[test]
fn secrets() {
    let own = secret("geheim");
    assert!(own.matches("geheim"));
    for guess in [
        "",
        "geheim ",
        "geheimgeheim",
        "gehei",
        "Geheim",
        "geheiM",
        "g",
    ] {
        assert!(!own.matches(guess), "{guess}");
    }
    assert!(!secret("").matches("a") && secret("").matches(""));
    let is_token = |text: &str| secret(text).is_bot_token();
    assert!(is_token(TOKEN) && is_token("1:a_-Z9"));
    for text in [
        "", ":", "1:", ":a", "a:a", "1a:a", "1:a/b", "1:a b", "1:a:b", "1:ä",
    ] {
        assert!(!is_token(text), "{text}");
    }
    assert!(!is_token(&"1".repeat(21)) && !is_token(&format!("1:{}", "a".repeat(101))));
}

#[test]
fn lines_of_settings() {
    for (content, token) in [
        ("", None),
        ("; a\n# b\n\n[telegram]\n", None),
        ("\u{feff}[telegram]\r\nbot_token=1:a\r\n", Some("1:a")),
        ("[ telegram ]\n Bot_Token = '1:a' ", Some("1:a")),
        ("[telegram]\nbot_token=\"1:a\"", Some("1:a")),
        (
            "[wifi]\nno line\n[telegram]\nbot_token=1:a\n[x]\nbot_token=2:a",
            Some("1:a"),
        ),
        ("[telegram]\nbot_token=\nunknown=1", None),
        ("[telegram]\nbot_token=your_telegram_bot_token", None),
        ("[telegram]\nregistration=\nPASSWORD=a b", None),
    ] {
        let config = config_of(content.as_bytes(), b"").map_err(|fault| panic!("{fault}"));
        let found = config.unwrap().token.map(|token| token.0);
        assert_eq!(found.as_deref(), token, "{content}");
    }
    let config_ini = b"[telegram]\nregistration=password\nIP_family=ipv6";
    let dot_env =
        b"# a\nno_proxy=x\nNO_PROXY=x\nexport PASSWORD=\"a=b\"\nCOAP_SERVER_IP=::2\nCOAP_SERVER_PORT=9\nbot_token=x";
    let Ok(config) = config_of(config_ini, dot_env) else {
        panic!("refused");
    };
    assert_eq!(config.listen.to_string(), "[::2]:9");
    assert!(config.password.unwrap().matches("a=b"));
    assert!(config.registration_by_password && config.token.is_none());
    assert_eq!(config.ip_family, IpFamily::Ipv6Only);
}

#[test]
fn wrong_lines_of_settings() {
    for (content, expected) in [
        ("bot_token=1:a", ":1: no section yet"),
        ("\n[telegram", ":2: `[` without `]`"),
        ("[telegram] registration = open", ":1: something behind `]`"),
        ("[telegram]\rbot_token=1:a", ":1: something behind `]`"),
        ("[Telegram]\nip_family=ipv5", ":2: ip_family is none"),
        ("[telegram] ; mine\nip_family=ipv5", ":2: ip_family is none"),
        ("[telegram]\nbot_token", ":2: not `NAME=value`"),
        ("[telegram]\nbot_token: 1:a=", ":2: not `NAME=value`"),
        ("[telegram]\n=1:geheim", ":2: not `NAME=value`"),
        ("[telegram]\nurl=https://a/b\nURL=", ":3: URL is set twice"),
        ("[telegram]\nbot_token=1", ":2: bot_token is not"),
        ("[telegram]\nurl=http://a/b", ":2: url is not"),
        ("[telegram]\nurl=https://a", ":2: url is not"),
        ("[telegram]\nurl=https://a/", ":2: url is not"),
        ("[telegram]\nurl=https://a:443", ":2: url is not"),
        ("[telegram]\nurl=https://a:99999/b", ":2: url is not"),
        ("[telegram]\nurl=https:///b", ":2: url is not"),
        ("[telegram]\nurl=https://a/bot123:geheim/", ":2: url is not"),
        ("[telegram]\nurl=https://me:geheim@a/bot", ":2: url is not"),
        ("[telegram]\nip_family=ipv5", ":2: ip_family is none"),
        ("[telegram]\nregistration=on", ":2: registration is neither"),
        (
            "[telegram]\nregistration=password",
            ":2: registration does not work without PASSWORD",
        ),
        ("[telegram]\nmote_token=a b", ":2: mote_token is not"),
        ("[telegram]\nmote_token=a&b", ":2: mote_token is not"),
        (
            "[telegram]\nmote_token=a",
            ":2: mote_token does not work without bot_token",
        ),
    ] {
        let fault = config_of(content.as_bytes(), b"").err().unwrap_or_default();
        let expected = format!("config.ini{expected}");
        assert!(fault.starts_with(&expected), "{content:?}: {fault}");
        assert!(!fault.contains("geheim"), "a secret: {fault}");
    }
    for (content, expected) in [
        ("PASSWORD=geheim b", ":1: PASSWORD holds white space"),
        ("PASSWORD=a\u{a0}b", ":1: PASSWORD holds white space"),
        ("\nCOAP_SERVER_PORT=65536", ":2: COAP_SERVER_PORT is not"),
        ("COAP_SERVER_IP=fe80::1%usb0", ":1: COAP_SERVER_IP is not"),
        ("COAP_SERVER_IP=::", ":1: COAP_SERVER_IP is not one address"),
        (
            "HTTPS_PROXY=socks5://a:geheim@127.0.0.1:1",
            ":1: HTTPS_PROXY is not",
        ),
        ("PASSWORD=a\nPASSWORD=b", ":2: PASSWORD is set twice"),
        ("PASSWORD: geheim=", ":1: not `NAME=value`"),
    ] {
        let fault = config_of(b"", content.as_bytes()).err().unwrap_or_default();
        let expected = format!(".env{expected}");
        assert!(fault.starts_with(&expected), "{content:?}: {fault}");
        assert!(!fault.contains("geheim"), "a secret: {fault}");
    }
}

#[test]
fn urls_of_a_bot_api() {
    for url in [
        "https://a/b",
        "https://a:8081/b",
        "https://[::1]/b",
        "https://[::1]:8081/bot",
    ] {
        assert!(is_https_url(url), "{url}");
    }
}

/// What stands between the marks of a certificate must be one.
#[test]
fn files_with_certificates() {
    let scratch = Scratch::new();
    let file = scratch.0.join("ca.pem");
    for content in ["AAAA", "", "MIIB"] {
        let mark = |word| format!("-----{word} CERTIFICATE-----\n");
        fs::write(&file, mark("BEGIN") + content + "\n" + &mark("END")).unwrap();
        let fault = read_roots(file.to_str().unwrap()).err();
        assert!(fault.is_some_and(|fault| fault.starts_with("holds no certificate")));
    }
}

#[test]
fn addresses_of_one_host() {
    for (address, expected) in [
        ("::1", true),
        ("fe80::1", false),
        ("2001:470:7347:c810::1234", true),
        ("10.0.0.1", true),
        ("::ffff:10.0.0.1", true),
        ("::", false),
        ("0.0.0.0", false),
        ("::ffff:0.0.0.0", false),
        ("ff02::1", false),
        ("224.0.1.187", false),
        ("::ffff:224.0.1.187", false),
        ("255.255.255.255", false),
    ] {
        let is_one = is_one_address(address.parse().unwrap());
        assert_eq!(is_one, expected, "{address}");
    }
}

#[test]
fn proxies() {
    for (value, expected) in [
        ("http://proxy:3128", true),
        ("http://proxy.example:3128/", true),
        ("http://[::1]:3128", true),
        ("http://user:password@10.0.0.1:3128", true),
        ("proxy:3128", false),
        ("http://proxy", false),
        ("http://:3128", false),
        ("http://proxy:", false),
        ("http://proxy:0", false),
        ("http://proxy:65536", false),
        ("http://proxy:3128/path", false),
        ("http://proxy:3128?a=b", false),
        ("http:/proxy:3128", false),
        ("https://proxy:3128", false),
        ("socks5://127.0.0.1:1080", false),
        ("socks4://127.0.0.1:1080", false),
        ("", false),
    ] {
        assert_eq!(read_proxy(value).is_some(), expected, "{value}");
    }
}

#[test]
fn times() {
    for (seconds, time) in [
        (0, "1970-01-01 00:00:00"),
        (951_782_399, "2000-02-28 23:59:59"),
        (951_782_400, "2000-02-29 00:00:00"),
        (1_769_860_800, "2026-01-31 12:00:00"),
        (1_772_323_199, "2026-02-28 23:59:59"),
        (1_772_323_200, "2026-03-01 00:00:00"),
        (1_798_761_599, "2026-12-31 23:59:59"),
        (4_107_542_400, "2100-03-01 00:00:00"),
    ] {
        assert_eq!(utc(seconds), time);
    }
}
