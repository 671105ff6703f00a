//! What cannot be seen from outside within a test's time: hours, bounds, and tables.

use super::fuzz::firmware::Firmware;
use super::fuzz::mote::{self, BLOCK1, Kind, Message as Datagram};
use super::fuzz::{PASSWORD, TOKEN, config_of, gateway, password, peer, update};
use super::*;

const SECOND: Duration = Duration::from_secs(1);
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

/// RFC 7252 §4.8.2.
#[test]
fn derived_constants() {
    assert_eq!(coap::EXCHANGE_LIFETIME.as_secs(), 247);
    assert_eq!(coap::NON_LIFETIME.as_secs(), 145);
}

#[test]
fn duplicates_are_remembered_for_their_lifetime() {
    for (kind, seconds) in [(Kind::Con, 247), (Kind::Non, 145)] {
        let (mut exchanges, start) = (Exchanges::new(), Instant::now());
        let message = post(kind, 7);
        let first = request(&mut exchanges, start, 1, &message);
        let acknowledgement = exchanges.acknowledge(&first, None);
        let end = start + seconds * SECOND;
        match receive(&mut exchanges, end - MOMENT, 1, &message) {
            Event::Send(again) => assert_eq!(again, acknowledgement),
            _ => panic!("acted on twice"),
        }
        request(&mut exchanges, end, 1, &message);
        request(&mut exchanges, start, 2, &message); // somebody else
        request(&mut exchanges, start, 1, &post(kind, 7).payload("another"));
    }
}

#[test]
fn as_many_duplicates_are_remembered() {
    let (mut exchanges, now) = (Exchanges::new(), Instant::now());
    for id in 0..=coap::SEEN_MAX as u16 {
        let message = request(&mut exchanges, now, 1, &post(Kind::Con, id));
        exchanges.acknowledge(&message, None);
    }
    request(&mut exchanges, now, 1, &post(Kind::Con, 0));
    let second = receive(&mut exchanges, now, 1, &post(Kind::Con, 1));
    assert!(matches!(second, Event::Send(_)), "forgotten too soon");
}

/// RFC 7252 §4.2: 2 to 3 s, then twice that, four times.
#[test]
fn retransmission() {
    let mut firsts = Vec::new();
    for id in 0..50 {
        let (mut exchanges, start) = (Exchanges::new(), Instant::now());
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
    let (shortest, longest) = (firsts.iter().min(), firsts.iter().max());
    let (shortest, longest) = (*shortest.unwrap(), *longest.unwrap());
    assert!(2 * SECOND <= shortest && longest <= 3 * SECOND);
    assert!(longest - shortest > SECOND / 2, "not random");
}

#[test]
fn responses_that_wait_for_their_ack_are_bounded() {
    let (mut exchanges, now) = (Exchanges::new(), Instant::now());
    let response = Response::text(ResponseType::Content, "i5");
    for id in 0..1100 {
        let message = request(&mut exchanges, now, 1, &post(Kind::Con, id));
        exchanges.respond(now, &message, &response);
    }
    assert_eq!(exchanges.retransmissions(now + 3 * SECOND).len(), 1024);
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
        response.version = Some(3);
        let bytes = exchanges.respond(now, &message, &response);
        let id = u16::from_be_bytes([bytes[2], bytes[3]]);
        let event = receive(&mut exchanges, now, from, &Datagram::new(kind, 0, id));
        assert_eq!(matches!(event, Event::Acknowledged(3)), counts, "{kind:?}");
        assert_eq!(exchanges.next_due().is_none(), ends, "{kind:?}");
    }
}

/// The first of two blocks, or the second.
fn assemble(
    exchanges: &mut Exchanges,
    now: Instant,
    from: u8,
    number: u32,
) -> Result<bool, String> {
    let block = mote::block(number, number == 0, 16);
    let message = post(Kind::Con, number as u16).option(BLOCK1, block);
    let mut request = request(exchanges, now, from, &message.payload([0; 16]));
    let whole = exchanges.assemble(&mut request);
    whole.map_err(|response| response.code())
}

#[test]
fn abandoned_bodies_are_dropped() {
    let start = Instant::now();
    let end = start + 60 * SECOND;
    let missing = Err("4.08".to_string());
    for (at, outcome) in [(end - MOMENT, Ok(true)), (end, missing)] {
        let mut exchanges = Exchanges::new();
        assert_eq!(assemble(&mut exchanges, start, 1, 0), Ok(false));
        assert_eq!(assemble(&mut exchanges, at, 1, 1), outcome);
    }
}

#[test]
fn bodies_are_bounded() {
    let (mut exchanges, now) = (Exchanges::new(), Instant::now());
    for from in 0..40 {
        assert_eq!(assemble(&mut exchanges, now, from, 0), Ok(false));
    }
    let whole = (0..40).filter(|from| assemble(&mut exchanges, now, *from, 1) == Ok(true));
    assert_eq!(whole.count(), 32);
}

// ---------- Motes ----------

#[test]
fn an_acknowledgement_holds_for_an_hour() {
    let (mut motes, now) = (Motes::default(), Instant::now());
    motes.note_request(peer(1), 7);
    let version = motes.offer("i5");
    assert!(!motes.has_acknowledged(peer(1), version, now));
    motes.acknowledge(peer(1), version, now);
    let end = now + 3600 * SECOND;
    assert!(motes.has_acknowledged(peer(1), version, end - MOMENT));
    assert!(!motes.has_acknowledged(peer(1), version, end));
    assert!(!motes.has_acknowledged(peer(2), version, now));
    assert_eq!(motes.offer("i5"), version);
    let next = motes.offer("i6");
    assert!(!motes.has_acknowledged(peer(1), next, now));
}

#[test]
fn the_longest_silent_mote_is_forgotten() {
    let (mut motes, now) = (Motes::default(), Instant::now());
    for number in 1..=64 {
        motes.note_request(peer(number), 7);
        motes.acknowledge(peer(number), 1, now);
    }
    motes.note_request(peer(1), 8);
    motes.note_request(peer(65), 7);
    assert_eq!(motes.known.len(), 64);
    assert!(motes.has_acknowledged(peer(1), 1, now), "heard of since");
    assert!(!motes.has_acknowledged(peer(2), 1, now));
    assert!(motes.has_acknowledged(peer(3), 1, now));
}

#[test]
fn restarted_motes() {
    for (step, goes_on) in [
        (1, true),
        (64, true),
        (65, false),
        (0, false),
        (u16::MAX, false),
    ] {
        for last in [7, u16::MAX - 1] {
            let (mut motes, now) = (Motes::default(), Instant::now());
            motes.note_request(peer(1), last);
            motes.acknowledge(peer(1), 1, now);
            motes.note_request(peer(1), last.wrapping_add(step));
            let knows = motes.has_acknowledged(peer(1), 1, now);
            assert_eq!(knows, goes_on, "{step} after {last}");
        }
    }
    let (mut motes, now) = (Motes::default(), Instant::now());
    motes.note_request(peer(1), 7);
    motes.acknowledge(peer(1), 1, now);
    let other_port = SocketAddr::new(peer(1).ip(), 9);
    motes.note_request(other_port, 4711);
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
    (state.interval, state.feedback) = (Some(120), Some(1));
    let all = state.tokens();
    assert_eq!(all.len(), 277);
    for (ids, told) in [
        (&[11, 12, 13][..], "r11;r12;r13;"),
        (&[CHAT_ID_MAX, 11, 12], "r99999999999;r11;r12;"),
        (&[11, CHAT_ID_MAX - 20, CHAT_ID_MAX], "r99999999999;"),
    ] {
        let mut state = state.clone();
        ids.iter().for_each(|id| drop(state.remove(*id)));
        assert_eq!(state.tokens(), told.to_string() + &all, "{ids:?}");
    }
}

#[test]
fn removals_alone_fill_a_reply() {
    let mut state = State::default();
    for id in 100_000_001..=100_000_099 {
        state.remove(id);
    }
    let tokens = state.tokens();
    assert_eq!(tokens.len(), 27 * 11 - 1); // one more would be 307
    assert!(tokens.ends_with("r100000099") && !tokens.contains(";;"));
}

#[test]
fn the_latest_removals_are_remembered() {
    let mut state = State::default();
    for id in 1..=101 {
        state.remove(id);
    }
    assert_eq!(state.removed, (2..=101).collect::<Vec<i64>>());
    state.remove(2);
    assert_eq!(state.removed.last(), Some(&2), "the latest, not twice");
    assert_eq!(state.removed.len(), 100);
    state.register(50, "Ada");
    assert!(!state.removed.contains(&50), "removed and registered");
}

/// The firmware puts a user where it finds the name or the id: a name that somebody took must come
/// after the news that it is free.
#[test]
fn a_name_that_changes_hands() {
    let (mut state, mut mote) = (State::default(), Firmware::default());
    for (chat, name) in [(1, "Ada"), (2, "Bob"), (3, "Cy")] {
        state.register(chat, name);
    }
    mote.take(&state.tokens());
    state.remove(1);
    state.register(4, "Di");
    mote.take(&state.tokens());
    state.register(4, "Eve");
    state.register(2, "Di");
    mote.take(&state.tokens());
    assert_eq!(mote.users(), ["Cy:3", "Di:2", "Eve:4"]);
}

#[test]
fn names_on_the_wire() {
    for (name, taken, expected) in [
        ("Ada", &[][..], "Ada"),
        ("", &[], "user"),
        (" ;:,&=\n\u{7f} ", &[], "user"),
        ("A;d:a,&=\u{1b}", &[], "Ada"),
        ("Ada Lovelace, Countess", &[], "Ada Lovelace C"),
        ("Ada Lovelace  Countess", &[], "Ada Lovelace"),
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
        ("abcdefghijklmn", &["abcdefghijklmn"], "abcdefghijkl_2"),
        ("i5", &["_i5"], "_i5_2"),
    ] {
        assert_eq!(wire_name(name, taken), expected, "{name:?} {taken:?}");
    }
}

// ---------- People ----------

/// What is answered.
fn write(people: &mut People, state: &mut State, chat: i64, text: &str) -> String {
    people.take(&update(chat, "Ada", text, 1), state, &password());
    let answer = people.answers.remove(&chat).unwrap();
    answer.texts.concat()
}

#[test]
fn a_lock_out_ends_after_an_hour() {
    let (mut people, mut state) = (People::default(), State::default());
    state.register(5, "Ada");
    let right = format!("config {PASSWORD} interval 7");
    for _ in 0..2 {
        for _ in 0..5 {
            assert!(write(&mut people, &mut state, 5, "config x interval 7").contains("Wrong"));
        }
        assert_eq!(write(&mut people, &mut state, 5, &right), "");
        let until = &mut people.suspects.get_mut(&5).unwrap().locked_until;
        let left = until.unwrap() - Instant::now();
        assert!((3595..=3600).contains(&left.as_secs()), "{left:?}");
        *until = Some(Instant::now());
    }
    assert_eq!(state.interval, None);
    write(&mut people, &mut state, 5, "config x interval 7");
    write(&mut people, &mut state, 5, &right);
    assert_eq!(state.interval, Some(7));
    assert!(people.suspects.is_empty(), "still counted");
}

#[test]
fn suspects_are_bounded() {
    let (mut people, mut state) = (People::default(), State::default());
    for chat in 1..=300 {
        write(&mut people, &mut state, chat, "config x interval 7");
    }
    assert_eq!(people.suspects.len(), 256);
}

// ---------- The loop ----------

#[test]
fn time_in_a_hang() {
    let mut gateway = gateway(Some(TOKEN));
    assert_eq!(gateway.time_for(FETCH_TIME), FETCH_TIME);
    gateway.note_hang();
    assert_eq!(gateway.time_for(FETCH_TIME), 2 * SECOND);
    let left = gateway.hang.unwrap() - Instant::now();
    assert!((59..=60).contains(&left.as_secs()), "{left:?}");
    gateway.hang = Some(Instant::now());
    assert_eq!(gateway.time_for(FETCH_TIME), FETCH_TIME, "one try");
    assert_eq!(gateway.time_for(FETCH_TIME), 2 * SECOND, "no second one");
}

// ---------- Tables ----------

#[test]
fn fields() {
    let form = "&url=u&token=t&chat_ids=1,2&text=a&b=c&url=d \n\0\0";
    for (key, value) in [("url", "u"), ("token", "t"), ("chat_ids", "1,2")] {
        assert_eq!(field(form, &format!("&{key}=")), value);
    }
    assert_eq!(field(form, "&text="), "a&b=c&url=d");
    for (form, text) in [
        ("&text=a&token=t", "a"),
        ("&text=\0 a b \0", "a b"),
        ("&text=&token=t", ""),
        ("&text=a%20&+=;", "a%20&+=;"),
        ("&text=a&text=b", "a&text=b"),
        ("&token=text=a", ""),
    ] {
        assert_eq!(field(form, "&text="), text, "{form}");
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
    ] {
        let chats = chats(list).ok().map(|chats| Value::from(chats).to_string());
        assert_eq!(chats.as_deref(), expected, "{list:?}");
    }
    assert!(chat_id(&format!("@{}", "a".repeat(32))).is_some());
    assert!(chat_id(&format!("@{}", "a".repeat(33))).is_none());
}

#[test]
fn secrets() {
    let secret = Secret("geheim".to_string());
    assert!(secret.is("geheim"));
    for guess in [
        "",
        "geheim ",
        "geheimgeheim",
        "gehei",
        "Geheim",
        "geheiM",
        "g",
    ] {
        assert!(!secret.is(guess), "{guess}");
    }
    assert!(!Secret(String::new()).is("a") && Secret(String::new()).is(""));
    let is_token = |text: &str| Secret(text.to_string()).is_bot_token();
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
    ] {
        let (config, fault) = config_of(content.as_bytes(), true);
        let found = config.token.map(|token| token.0);
        assert_eq!((found.as_deref(), fault.as_str()), (token, ""), "{content}");
    }
    let variables = b"# a\nexport PASSWORD=\"a=b\"\nCOAP_SERVER_IP=::1\nCOAP_SERVER_PORT=9";
    let (config, fault) = config_of(variables, false);
    assert_eq!(fault, "");
    assert_eq!(config.listen.to_string(), "[::1]:9");
    assert!(config.password.unwrap().is("a=b"));
}

#[test]
fn wrong_lines_of_settings() {
    for (content, expected) in [
        ("bot_token=1:a", ":1: no section yet"),
        ("\n[telegram", ":2: `[` without `]`"),
        ("[telegram]\nbot_token", ":2: not `NAME=value`"),
        ("[telegram]\nurl=https://a/b\nURL=", ":3: url is set twice"),
        ("[telegram]\nbot_token=1", ":2: bot_token is not"),
        ("[telegram]\nurl=http://a/b", ":2: url is not"),
        ("[telegram]\nip_family=ipv5", ":2: ip_family is none"),
        ("[telegram]\nmote_token=a b", ":2: mote_token is not"),
        ("[telegram]\nmote_token=a&b", ":2: mote_token is not"),
    ] {
        let (_, fault) = config_of(content.as_bytes(), true);
        assert!(fault.starts_with(expected), "{content:?}: {fault}");
    }
    for (content, expected) in [
        ("PASSWORD=a b", ":1: PASSWORD holds white space"),
        ("\nCOAP_SERVER_PORT=65536", ":2: COAP_SERVER_PORT is not"),
        ("COAP_SERVER_IP=fe80::1%usb0", ":1: COAP_SERVER_IP is not"),
    ] {
        let (_, fault) = config_of(content.as_bytes(), false);
        assert!(fault.starts_with(expected), "{content:?}: {fault}");
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
