//! Tables for everything that needs neither a socket nor a clock.

use super::*;

const TOKEN: &str = "123456:AAF-x_9";
const URL: &str = "https://api.telegram.org/bot";
const ADA: i64 = 1_234_567_890;
const NOW: u64 = 1_769_860_800;

fn text<T>(result: Result<T, Response>) -> String {
    result.err().map_or(String::new(), |error| {
        format!(
            "{} {}",
            error.code(),
            String::from_utf8_lossy(&error.payload)
        )
    })
}

fn ip(last: u16) -> IpAddr {
    std::net::Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, last).into()
}

fn peer(last: u16) -> SocketAddr {
    (ip(last), 61616).into()
}

fn config(token: Option<&str>) -> Config {
    Config {
        url: URL.to_string(),
        token: token.and_then(Secret::token),
        ip_family: IpFamily::Any,
        password: Some(Secret("geheim".to_string())),
        address: "::1".to_string(),
        port: 5683,
        level: log::LevelFilter::Info,
        proxy: None,
        roots: None,
        state_path: PathBuf::new(),
        log_path: PathBuf::new(),
        warnings: Vec::new(),
    }
}

/// RFC 7252 §3. `kind`: 0 CON, 1 NON, 2 ACK, 3 RST. Options in ascending order.
fn datagram(kind: u8, code: u8, id: u16, options: &[(u16, &[u8])], payload: &[u8]) -> Vec<u8> {
    let extended = |value: usize| match value {
        0..13 => (value as u8, vec![]),
        13..269 => (13, vec![(value - 13) as u8]),
        _ => (14, ((value - 269) as u16).to_be_bytes().to_vec()),
    };
    let mut bytes = vec![
        0x42 | kind << 4,
        code,
        (id >> 8) as u8,
        id as u8,
        0xca,
        0xfe,
    ];
    let mut last = 0;
    for (number, value) in options {
        let ((delta, more), (length, longer)) =
            (extended((number - last).into()), extended(value.len()));
        bytes.push(delta << 4 | length);
        bytes.extend([&more[..], &longer, value].concat());
        last = *number;
    }
    if !payload.is_empty() {
        bytes.push(0xff);
        bytes.extend(payload);
    }
    bytes
}

fn post(id: u16, payload: &[u8]) -> Vec<u8> {
    datagram(0, 2, id, &[(11, b"message")], payload)
}

fn request(exchanges: &mut Exchanges, now: Instant, from: SocketAddr, bytes: &[u8]) -> Request {
    match exchanges.receive(now, from, bytes) {
        coap::Event::Request(request) => request,
        event => panic!("{}", shown(event)),
    }
}

fn parsed(bytes: &[u8]) -> Request {
    request(&mut Exchanges::new(0), Instant::now(), peer(1), bytes)
}

fn shown(event: coap::Event) -> String {
    match event {
        coap::Event::Nothing => "nothing".to_string(),
        coap::Event::Send(bytes) => {
            format!(
                "send{}",
                bytes
                    .iter()
                    .fold(String::new(), |all, byte| format!("{all} {byte:02x}"))
            )
        }
        coap::Event::Request(request) => format!("request {request}"),
        coap::Event::Acknowledged(delivers) => format!("acknowledged {delivers:?}"),
        coap::Event::Refused => "refused".to_string(),
    }
}

fn sent() -> Response {
    Response::text(ResponseType::Content, "ok")
}

// Arguments and configuration -----------------------------------------------------------------------------------------

#[test]
fn options_of_send() {
    for (words, expected) in [
        (&["-i", "1", "-m", "a b"][..], Some(["1", "a b", ""])),
        (
            &["-u", "coap://[::1]", "-m", "-i", "-i", "-5"],
            Some(["-5", "-i", "coap://[::1]"]),
        ),
        (&["-i", "1", "-m", "a", "-u", "http://[::1]"], None),
        (&[], None),
        (&["-i", "1"], None),
        (&["-m", "a"], None),
        (&["-i", "1", "-m"], None),
        (&["-i", "1", "-m", "a", "-x", "1"], None),
    ] {
        assert_eq!(send_options(words), expected, "{words:?}");
    }
    for (uri, address) in [
        ("coap://[::1]", Some("[::1]:5683")),
        ("coap://[::1]:1/", Some("[::1]:1")),
        ("coap://127.0.0.1", Some("127.0.0.1:5683")),
        ("coap://127.0.0.1:7", Some("127.0.0.1:7")),
        ("coap://[fe80::1%251]:7", Some("[fe80::1%1]:7")),
        ("coap://[fe80::1%1]", Some("[fe80::1%1]:5683")),
        ("http://127.0.0.1", None),
        ("coap://127.0.0.1:x", None),
        ("coap://", None),
    ] {
        assert_eq!(
            address_of(uri).map(|found| found.to_string()).as_deref(),
            address,
            "{uri}"
        );
    }
}

#[test]
fn secrets() {
    let (long, longer) = (
        format!("{}:{}", "1".repeat(20), "a".repeat(100)),
        "a".repeat(101),
    );
    let bad = [
        "",
        ":",
        "1:",
        ":a",
        "1a:b",
        "1:b/c",
        "1:b c",
        "1:ä",
        "1:a:b",
        "-1:a",
        &format!("1:{longer}"),
    ];
    for good in [TOKEN, "1:a", &long] {
        assert!(
            Secret::token(good).is_some_and(|token| token.0 == good),
            "{good}"
        );
    }
    bad.iter()
        .for_each(|bad| assert!(Secret::token(bad).is_none(), "{bad}"));
    assert!(Secret::token(&format!("{}:a", "1".repeat(21))).is_none());
    assert_eq!(Secret::token(TOKEN).unwrap().bot_id(), "123456");
    let own = Secret("abab".to_string());
    for (guess, same) in [
        ("abab", true),
        ("", false),
        ("ab", false),
        ("abababab", false),
        ("abaB", false),
        ("Abab", false),
    ] {
        assert_eq!(own.is(guess), same, "{guess}");
    }
    assert!(Secret("pässwört".to_string()).is("pässwört") && !Secret("".to_string()).is("a"));
}

fn shown_settings(path: &str, text: &str, ini: bool) -> String {
    settings(Path::new(path), text, ini).map_or_else(
        |reason| reason,
        |all| {
            let lines = all
                .into_values()
                .map(|set| format!("{} {}={}", set.origin, set.name, set.text));
            lines.collect::<Vec<_>>().join("|")
        },
    )
}

#[test]
fn ini() {
    for (text, expected) in [
        ("", ""),
        (
            "\u{feff}[telegram]\r\n BOT_token = 1:a=b \r\n",
            "c.ini:2 bot_token=1:a=b",
        ),
        (
            "# a\n;b\n\n[ telegram ]\nurl='x'\nip_family=\n",
            "c.ini:6 ip_family=|c.ini:5 url=x",
        ),
        (
            "[other]\nbot_token=1\na b\n[telegram]\nurl=2\n[more]\nurl=3\nurl=4\n",
            "c.ini:5 url=2",
        ),
        ("[telegram]\nk\u{7}=1\n", "c.ini:2: not `NAME=value`"),
        ("[Telegram]\nurl=1\n", ""),
        ("\n[telegram\n", "c.ini:2: `[` without `]`"),
        ("[telegram]\nurl\n", "c.ini:2: not `NAME=value`"),
        (
            "url=1\n",
            "c.ini:1: stands before the first section; put [telegram] above it",
        ),
        (
            "[telegram]\nurl=1\n\nURL=2\n",
            "c.ini:4: set before in c.ini:2; remove one of them",
        ),
    ] {
        assert_eq!(shown_settings("c.ini", text, true), expected, "{text:?}");
    }
}

#[test]
fn dot_env() {
    for (text, expected) in [
        ("", ""),
        ("# c\n\nPASSWORD=a=b\n", ".env:3 PASSWORD=a=b"),
        (
            "export A = \"x y\" \nB='z'\nC=\"'\nD=\"\nE=\n",
            ".env:1 A=x y|.env:2 B=z|.env:3 C=\"'|.env:4 D=\"|.env:5 E=",
        ),
        ("\u{feff}A=1\r\na=2\r\n", ".env:1 A=1|.env:2 a=2"),
        (
            "A=1\nA=2\n",
            ".env:2: set before in .env:1; remove one of them",
        ),
        ("A=1\nB\n", ".env:2: not `NAME=value`"),
        ("=1\n", ".env:1: not `NAME=value`"),
        ("A B=1\n", ".env:1: not `NAME=value`"),
        ("[telegram]\n", ".env:1: not `NAME=value`"),
    ] {
        assert_eq!(shown_settings(".env", text, false), expected, "{text:?}");
    }
}

#[test]
fn values_of_settings() {
    for good in [
        URL,
        "https://h",
        "https://[::1]:8443/bot",
        "https://h:443/a/b",
    ] {
        assert_eq!(https_url(good).as_deref(), Some(good));
    }
    for bad in [
        "",
        "x y",
        "http://h/bot",
        "h/bot",
        "/bot",
        "https://",
        "https:///bot",
        "https://h/bot?a=b",
        "ftp://h",
    ] {
        assert_eq!(https_url(bad), None, "{bad}");
    }
    for good in ["::1", "127.0.0.1", "fe80::1%usb0", "::"] {
        assert_eq!(ip_address(good).as_deref(), Some(good));
    }
    for bad in [
        "",
        "localhost",
        "127.0.0.1%usb0",
        "fe80::1%",
        "[::1]",
        "1.2.3",
    ] {
        assert_eq!(ip_address(bad), None, "{bad}");
    }
    let from = |text: &str| {
        Some(Setting {
            name: "NAME".to_string(),
            text: text.to_string(),
            origin: ".env:1".to_string(),
        })
    };
    let judge = |text: &str| {
        judged(from(text), "is none", one_word).map(|found| found.map(|secret| secret.0))
    };
    assert_eq!(judge("a%;ü"), Ok(Some("a%;ü".to_string())));
    assert_eq!(judge("a\tb"), Err(".env:1: NAME is none".to_string()));
    assert_eq!(
        (
            judge(""),
            judged(None, "is none", one_word).is_ok_and(|none| none.is_none())
        ),
        (Ok(None), true)
    );
    for (value, level, warned) in [
        ("debug", "DEBUG", 0),
        ("OFF", "OFF", 0),
        ("Warn", "WARN", 0),
        ("all", "INFO", 1),
        ("coap=info", "INFO", 1),
    ] {
        let mut warnings = Vec::new();
        assert_eq!(log_level(from(value), &mut warnings).as_str(), level);
        assert_eq!(warnings.len(), warned, "{value}");
    }
    assert_eq!(log_level(None, &mut Vec::new()), LevelFilter::Info);
    assert!(http_proxy("http://u:p@h:3128").is_some());
    assert!(http_proxy("socks5://u:secret@h:1").is_none());
    let named = |address: &str| {
        Config {
            address: address.to_string(),
            ..config(None)
        }
        .name()
    };
    assert_eq!(
        (named("fe80::1%usb0"), named("127.0.0.1")),
        ("[fe80::1%usb0]:5683".into(), "127.0.0.1:5683".into())
    );
}

// Payloads ------------------------------------------------------------------------------------------------------------

#[test]
fn forms() {
    let invalid = [b"url=u&token=t&chat_ids=1&text=a", &[0xff, b'b'][..]].concat();
    for (payload, [url, token, chats, message]) in [
        (
            &b"url=u&token=t&chat_ids=1,2&text=a"[..],
            ["u", "t", "1,2", "a"],
        ),
        (b"text=a&chat_ids=1,2&token=t&url=u", ["u", "t", "1,2", "a"]),
        (b"token=t&text=a&url=u&chat_ids=1", ["u", "t", "1", "a"]),
        (b"&url=u&token=t", ["u", "t", "", ""]),
        (
            b"url=u&token=t&text=a&b=c%20+;d&chat_ids =1&texts=&&",
            ["u", "t", "", "a&b=c%20+;d&chat_ids =1&texts=&&"],
        ),
        (
            b"url=u&token=t&chat_ids=1&text=a&text=b&url=v&token=w",
            ["u", "t", "1", "a&text=b&url=v&token=w"],
        ),
        (
            b"\0\r\n url= u\0&token=\tt \n&chat_ids= 1 &text=\0\n a\0b \n\0\0\0",
            ["u", "t", "1", "a\0b"],
        ),
        (b"x&url=u&token=t", ["u", "t", "", ""]),
        (
            b"url=u&token=t&text=xurl=&Token=",
            ["u", "t", "", "xurl=&Token="],
        ),
        (&invalid, ["u", "t", "1", "a\u{fffd}b"]),
    ] {
        let payload = String::from_utf8_lossy(payload);
        assert_eq!(
            fields(&payload),
            [url, token, chats, message],
            "{payload:?}"
        );
    }
    for payload in ["", "\0\0", "url=&token= \0", "Url=u&Token=t", "x"] {
        assert_eq!(fields(payload), [""; 4], "{payload:?}");
    }
}

#[test]
fn messages() {
    let check = |chats: &str, message: &str| {
        let payload = format!("url={URL}&token={TOKEN}&chat_ids={chats}&text={message}");
        match judge_request(
            &config(None),
            None,
            Resource::Message,
            &parsed(&post(1, payload.as_bytes())),
        )? {
            Work::Message(message) => Ok(message),
            _ => panic!("no message"),
        }
    };
    for (chats, ids) in [
        ("1", json!([1])),
        (" 1 ,, 2,\n3, 1,02,", json!([1, 2, 3])),
        (
            "-1001234567890,@a_1,@a_1",
            json!([-1_001_234_567_890i64, "@a_1"]),
        ),
        (
            "1,2,3,4,5,6,7,8,9,10,10,1",
            json!([1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        ),
    ] {
        assert_eq!(
            json!(
                check(chats, "a")
                    .unwrap_or_else(|error| panic!("{error:?}"))
                    .chats
            ),
            ids,
            "{chats}"
        );
    }
    let (fits, longer) = ("ä".repeat(4000), "a".repeat(4097));
    assert_eq!(
        check("1", &fits).map(|message| message.text).ok(),
        Some(fits)
    );
    for (chats, message, error) in [
        ("", "a", "4.00 Missing required fields"),
        (" ,, ", "a", "4.00 Missing required fields"),
        ("1", " \0", "4.00 Missing required fields"),
        ("1,x", "a", "4.00 Malformed chat id"),
        (
            "1,2,3,4,5,6,7,8,9,10,11",
            "a",
            "4.00 Too many chat ids, at most 10",
        ),
        ("1", &longer, "4.00 Text too long, at most 4096 characters"),
    ] {
        assert_eq!(text(check(chats, message)), error);
    }
}

#[test]
fn chat_ids() {
    let long = format!("@{}", "a".repeat(32));
    for (id, value) in [
        ("0", json!(0)),
        ("-5", json!(-5)),
        ("9223372036854775807", json!(i64::MAX)),
        ("@Name_1", json!("@Name_1")),
        (&long, json!(long)),
    ] {
        assert_eq!(chat_id(id), Some(value), "{id}");
    }
    for bad in [
        "",
        "+1",
        "1.0",
        "1 2",
        "9223372036854775808",
        "@",
        "@a b",
        "@ä",
        "a",
        "--1",
        &format!("{long}a"),
    ] {
        assert_eq!(chat_id(bad), None, "{bad}");
    }
}

#[test]
fn requests_served() {
    let judged =
        |own: Option<&str>, pinned: Option<&str>, what, payload: String| match judge_request(
            &config(own),
            pinned,
            what,
            &parsed(&post(1, payload.as_bytes())),
        ) {
            Ok(Work::Message(message)) => format!("message {}", message.text),
            Ok(Work::Update(token)) => format!("update {}", token.bot_id()),
            Ok(Work::Repeated(_)) => "repeated".to_string(),
            Err(error) => text::<()>(Err(error)),
        };
    let form = |url: &str, token: &str| format!("url={url}&token={token}&chat_ids=1&text=a");
    let (url, token) = (
        "4.03 This gateway does not serve that url",
        "4.03 This gateway does not serve that token",
    );
    use Resource::{Message, Update};
    for (own, pinned, what, payload, expected) in [
        (Some(TOKEN), None, Message, form(URL, TOKEN), "message a"),
        (
            Some(TOKEN),
            Some("1"),
            Update,
            form(URL, TOKEN),
            "update 123456",
        ),
        (Some(TOKEN), None, Message, form(URL, "1:a"), token),
        (Some(TOKEN), None, Update, form(URL, "1:a"), token),
        (
            Some(TOKEN),
            None,
            Message,
            form("https://evil/bot", TOKEN),
            url,
        ),
        (
            None,
            None,
            Message,
            form("https://api.telegram.org/bot/", "1:a"),
            url,
        ),
        (None, Some("1"), Message, form(URL, TOKEN), "message a"),
        (None, None, Update, form(URL, TOKEN), "update 123456"),
        (
            None,
            Some("123456"),
            Update,
            form(URL, TOKEN),
            "update 123456",
        ),
        (None, Some("1"), Update, form(URL, TOKEN), token),
        (
            None,
            None,
            Update,
            form(URL, "nonsense"),
            "4.00 Malformed token",
        ),
        (
            None,
            None,
            Message,
            form(URL, "1:a/../b"),
            "4.00 Malformed token",
        ),
        (Some(TOKEN), None, Message, form(URL, "nonsense"), token),
        (
            None,
            None,
            Message,
            "token=t".to_string(),
            "4.00 Missing required fields",
        ),
        (
            None,
            None,
            Message,
            "url=u&token= \0".to_string(),
            "4.00 Missing required fields",
        ),
        (
            None,
            None,
            Update,
            format!("url={URL}&token={TOKEN}"),
            "update 123456",
        ),
        (
            None,
            None,
            Message,
            format!("url={URL}&token={TOKEN}"),
            "4.00 Missing required fields",
        ),
    ] {
        assert_eq!(
            judged(own, pinned, what, payload.clone()),
            expected,
            "{payload}"
        );
    }
    let block = |payload: &[u8]| {
        parsed(&datagram(
            0,
            2,
            1,
            &[(11, b"message"), (23, &[0x12])],
            payload,
        ))
    };
    assert!(matches!(
        judge_request(&config(None), None, Message, &block(b"")),
        Ok(Work::Repeated(true))
    ));
    assert_eq!(
        text(judge_request(&config(None), None, Message, &block(b"a"))),
        "4.00 No such block"
    );
    assert_eq!(
        text(judge_request(&config(None), None, Update, &block(b""))),
        "4.00 No such block"
    );
}

#[test]
fn routes_and_discovery() {
    let core: [(u16, &[u8]); 2] = [(11, b".well-known"), (11, b"core")];
    let with = |code: u8, options: &[(u16, &[u8])]| parsed(&datagram(0, code, 1, options, b""));
    let path = |code, path: &str| with(code, &[(11, path.as_bytes())]);
    assert_eq!(route(&path(2, "message")).ok(), Some(Resource::Message));
    assert_eq!(route(&path(2, "update")).ok(), Some(Resource::Update));
    assert_eq!(route(&with(1, &core)).ok(), Some(Resource::Core));
    for (request, error) in [
        (path(2, "Message"), "4.04 No such resource"),
        (path(2, ".well-known/core"), "4.04 No such resource"),
        (path(1, "message"), "4.05 Method not allowed"),
        (with(2, &core), "4.05 Method not allowed"),
        (
            with(2, &[(11, b"message"), (12, &[50])]),
            "4.15 Only text/plain",
        ),
        (
            with(2, &[(11, b"update"), (17, &[50])]),
            "4.06 Not available in this format",
        ),
        (
            with(1, &[core[0], core[1], (17, &[])]),
            "4.06 Not available in this format",
        ),
    ] {
        assert_eq!(text(route(&request)), error, "{request}");
    }
    assert!(route(&with(2, &[(11, b"message"), (12, &[]), (17, &[])])).is_ok());
    assert!(route(&with(1, &[core[0], core[1], (17, &[40])])).is_ok());

    let (message, update) = (
        "</message>;rt=\"telegram.message\";ct=0",
        "</update>;rt=\"telegram.update\";ct=0",
    );
    let both = format!("{message},{update}");
    for (queries, links) in [
        (&[][..], both.as_str()),
        (&["rt=telegram.message"], message),
        (&["rt=telegram.*"], &both),
        (&["rt=telegram.u*"], update),
        (&["rt=telegram"], ""),
        (&["href=/update"], update),
        (&["href=/*", "rt=telegram.update"], update),
        (&["href=/message", "rt=telegram.update"], ""),
        (&["ct=0"], &both),
        (&["ct=40"], ""),
        (&["if=x"], ""),
    ] {
        let queries: Vec<(u16, &[u8])> =
            queries.iter().map(|query| (15, query.as_bytes())).collect();
        let response = discovery(&with(1, &[&core[..], &queries].concat()));
        assert_eq!(
            (response.code().as_str(), response.payload.as_slice()),
            ("2.05", links.as_bytes()),
            "{queries:?}"
        );
    }
    for (block, code, payload) in [
        (0x00, "2.05", &both[..16]),
        (0x11, "2.05", &both[32..64]),
        (0x41, "4.00", "No such block"),
        (0x07, "4.00", "Reserved block size"),
    ] {
        let response = discovery(&with(1, &[core[0], core[1], (23, &[block])]));
        assert_eq!(
            (response.code().as_str(), response.payload.as_slice()),
            (code, payload.as_bytes()),
            "{block}"
        );
    }
}

// State ---------------------------------------------------------------------------------------------------------------

#[test]
fn names() {
    for (name, taken, expected) in [
        ("Ada", &[][..], "Ada"),
        ("ABCDEFGHIJKLMNO", &[], "ABCDEFGHIJKLMN"),
        ("ABCDEFGHIJKLMä", &[], "ABCDEFGHIJKLM"),
        ("ÄÄÄÄÄÄÄÄ", &[], "ÄÄÄÄÄÄÄ"),
        ("😀😀😀😀", &[], "😀😀😀"),
        (" A;d:a,&=\n\u{7f}\u{85}\0 ", &[], "Ada"),
        ("ABCDEFGHIJKLM N", &[], "ABCDEFGHIJKLM"),
        ("", &[], "user"),
        (" ;:\n", &["user"], "user_2"),
        ("f0", &[], "_f0"),
        ("f1x", &[], "_f1x"),
        ("i5", &[], "_i5"),
        ("r2d2", &[], "_r2d2"),
        ("r2d2r2d2r2d2r2d2", &[], "_r2d2r2d2r2d2r"),
        (";f0", &[], "_f0"),
        ("all", &[], "_all"),
        ("f2", &[], "f2"),
        ("fa", &[], "fa"),
        ("Ida", &[], "Ida"),
        ("ida", &[], "ida"),
        ("allan", &[], "allan"),
        ("All", &[], "All"),
        ("Ada", &["Ada"], "Ada_2"),
        ("Ada", &["Ada", "Ada_2"], "Ada_3"),
        ("i", &["i"], "i_2"),
        ("r", &["r"], "r_2"),
        ("ABCDEFGHIJKLMNO", &["ABCDEFGHIJKLMN"], "ABCDEFGHIJKL_2"),
        ("ÄÄÄÄÄÄÄ", &["ÄÄÄÄÄÄÄ"], "ÄÄÄÄÄÄ_2"),
        ("ABCDEFGHIJ KLM", &["ABCDEFGHIJ KLM"], "ABCDEFGHIJ K_2"),
        ("all", &["_all"], "_all_2"),
    ] {
        assert_eq!(wire_name(name, taken), expected, "{name:?} {taken:?}");
    }
}

/// The cut comes last, and may leave what was not there before.
#[test]
fn a_cut_name_is_not_misread_either() {
    assert_ne!(wire_name("all            x", &[]), "all");
}

/// The number and the token of the latest change of a chat.
fn latest(state: &State, chat: i64) -> Option<(u64, String)> {
    let of_chat = |(_, change): &&(u64, Change)| change.key() == (2, chat);
    state
        .changes
        .iter()
        .find(of_chat)
        .map(|(sequence, change)| (*sequence, change.to_string()))
}

fn full_state() -> State {
    let mut state = State::default();
    (1..=10).for_each(|id| assert!(state.register(id, &format!("u{id}")).is_some()));
    state
}

#[test]
fn change_log() {
    let mut state = State::default();
    assert_eq!(state.tokens_for(ip(1), 302), (String::new(), None, 0));
    state.record(Change::Interval(5));
    assert!(
        state
            .register(ADA, "Ada")
            .is_some_and(|text| text.starts_with("You are registered"))
    );
    assert_eq!(state.remove(7, true), "7");
    state.record(Change::Feedback(1));
    assert_eq!(
        state.tokens_for(ip(1), 302),
        ("i5;Ada:1234567890;r7;f1".to_string(), Some(4), 0)
    );
    state.record(Change::Interval(120));
    state.record(Change::Feedback(0));
    assert_eq!(state.register(ADA, "Ada"), None);
    assert_eq!(
        state.tokens_for(ip(1), 302),
        ("Ada:1234567890;r7;i120;f0".to_string(), Some(6), 0)
    );
    assert_eq!(state.register(ADA, "Eva"), None);
    assert!(
        state
            .register(8, "Eva")
            .is_some_and(|text| text.starts_with("You are registered"))
    );
    assert_eq!(
        state.tokens_for(ip(1), 302),
        ("r7;i120;f0;Eva:1234567890;Eva_2:8".to_string(), Some(8), 0)
    );
    // The firmware can hold neither, but both are skipped in /message.
    for id in [-7, CHAT_ID_MAX + 1] {
        state.remove(id, false);
        assert!(state.is_removed(&json!(id)));
    }
    assert!(!state.is_removed(&json!(8)) && !state.is_removed(&json!("@a")));
    state.acknowledge(ip(1), 6);
    assert_eq!(
        state.tokens_for(ip(1), 302),
        ("Eva:1234567890;Eva_2:8".to_string(), Some(8), 0)
    );
    assert_eq!(state.tokens_for(ip(2), 302).1, Some(8));
    state.acknowledge(ip(1), 8);
    assert_eq!(state.tokens_for(ip(1), 302), (String::new(), None, 0));
    state.acknowledge(ip(1), 3); // an older ACK that was late
    assert_eq!(state.tokens_for(ip(1), 302), (String::new(), None, 0));
    // Asked again: told again; refused by Telegram again: not.
    assert_eq!(
        (state.remove(7, false), state.sequence),
        ("7".to_string(), 10)
    );
    assert_eq!(
        (state.remove(7, true), state.sequence),
        ("7".to_string(), 11)
    );
    assert_eq!(
        (state.remove(8, false), state.sequence),
        ("Eva_2 (8)".to_string(), 12)
    );
    assert!(
        state
            .register(7, "Bob")
            .is_some_and(|text| text.starts_with("You are registered"))
    );
    assert_eq!(
        state.tokens_for(ip(1), 302),
        ("r8;Bob:7".to_string(), Some(13), 0)
    );
}

#[test]
fn replies_are_cut_between_tokens() {
    // Users take 10 * 26 + 9 = 269 bytes, two removals 13 each, and the last one 2 and its digits.
    for (last_id, length, last, left) in [(12_345, 302, 13, 0), (123_456, 295, 12, 1)] {
        let mut state = State::default();
        for n in 0..10 {
            state.register(10_000_000_000 + n, &format!("ABCDEFGHIJKLM{n}"));
        }
        let _ = [20_000_000_000, 20_000_000_001, last_id].map(|id| state.remove(id, true));
        let (tokens, delivers, rest) = state.tokens_for(ip(1), REPLY_MAX);
        assert_eq!((tokens.len(), delivers, rest), (length, Some(last), left));
        state.acknowledge(ip(1), last);
        let next = if left == 0 {
            (String::new(), None, 0)
        } else {
            (format!("r{last_id}"), Some(13), 0)
        };
        assert_eq!(state.tokens_for(ip(1), REPLY_MAX), next);
        // A change that does not fit is not jumped over.
        assert_eq!(state.tokens_for(ip(2), 25), (String::new(), None, 13));
        assert_eq!(state.tokens_for(ip(2), 26).1, Some(1));
        assert_eq!(state.tokens_for(ip(2), 52).1, Some(1));
        assert_eq!(state.tokens_for(ip(2), 53).1, Some(2));
    }
}

#[test]
fn bounds() {
    let mut state = full_state();
    assert_eq!(state.register(11, "x").as_deref(), Some(FULL));
    assert_eq!(state.register(10, "x"), None);
    assert_eq!(
        (state.users().count(), state.sequence, latest(&state, 11)),
        (10, 11, None)
    );
    (20..=30).rev().for_each(|id| drop(state.remove(id, true)));
    assert_eq!(
        (
            state.removals(),
            state.is_removed(&json!(30)),
            state.is_removed(&json!(29))
        ),
        (10, false, true)
    );
    for n in 1..=64 {
        state.acknowledge(ip(n), u64::from(n % 9 + 1));
    }
    state.tokens_for(ip(1), 302); // not silent
    state.acknowledge(ip(65), 5);
    state.acknowledge(ip(65), 6);
    assert_eq!(
        (state.motes.len(), state.motes[0].0, state.motes[63]),
        (64, ip(3), (ip(65), 6))
    );
    assert_eq!(
        state.tokens_for(ip(2), 302).0.split(';').next(),
        Some("u1:1")
    );
    assert_eq!(state.motes[62], (ip(1), 2));
}

#[test]
fn restarts() {
    let named = |ids: &[i64]| ids.iter().map(|id| json!(id)).collect::<Vec<_>>();
    let mut state = State::default();
    state.register(1, "Ada");
    state.register(2, "Bob");
    state.remove(3, true);
    state.remove(-4, false);
    for (heard, listed, restarted) in [
        (0, &[][..], false),
        (1, &[1], false),
        (1, &[1, 2, 3], false),
        (1, &[2], true),
        (2, &[1, 2, 99], false),
        (2, &[1], true),
        (3, &[2, 1], false),
        (3, &[1, 2, 3], true),
        (4, &[1, 2, -4], false),
    ] {
        state.motes = vec![(ip(1), heard), (ip(2), 4)];
        assert_eq!(
            state.notice_restart(ip(1), &named(listed)),
            restarted,
            "{heard} {listed:?}"
        );
        let left = if restarted {
            vec![(ip(2), 4)]
        } else {
            vec![(ip(2), 4), (ip(1), heard)]
        };
        assert_eq!(state.motes, left, "{heard} {listed:?}");
    }
    assert!(!state.notice_restart(ip(9), &named(&[3])) && state.motes.len() == 2);
}

fn whole_state() -> Value {
    json!({
        "started": 5, "bot": "123456", "offset": -3, "sequence": 9,
        "changes": [[1, "i120"], [3, "Ada:1"], [4, "r-7"], [9, "f1"]],
        "motes": [["fe80::1", 9], ["10.0.0.1", 0]],
    })
}

#[test]
fn saved_state() {
    let text = whole_state().to_string();
    let state = State::from_json(&text).unwrap();
    assert_eq!(state.to_json(), text);
    assert_eq!(
        (
            state.started,
            state.bot.as_deref(),
            state.offset,
            state.sequence
        ),
        (5, Some("123456"), -3, 9)
    );
    let changes = [
        Change::Interval(120),
        Change::User("Ada".to_string(), 1),
        Change::Removed(-7),
        Change::Feedback(1),
    ];
    assert_eq!(
        state.changes,
        iter::zip([1, 3, 4, 9], changes).collect::<Vec<_>>()
    );
    assert_eq!(state.motes, [(ip(1), 9), ("10.0.0.1".parse().unwrap(), 0)]);
    let empty = State::default().to_json();
    assert_eq!(
        State::from_json(&empty).map(|state| state.to_json()),
        Some(empty)
    );
    for damaged in [
        "",
        "{}",
        "[]",
        "null",
        "\0\0\0",
        &text[..text.len() - 3],
        &format!("{text}}}"),
    ] {
        assert!(State::from_json(damaged).is_none(), "{damaged}");
    }
}

#[test]
fn damaged_state() {
    let changes = |tokens: &mut dyn Iterator<Item = String>| {
        json!((1..).zip(tokens).collect::<Vec<(u64, String)>>())
    };
    let mote = |n: i64| json!([format!("::{n:x}"), 1]);
    for (pointer, value) in [
        ("/started", json!(-1)),
        ("/started", json!(null)),
        ("/bot", json!(1)),
        ("/offset", json!("1")),
        ("/offset", json!(1.5)),
        ("/sequence", json!(8)),
        ("/sequence", json!(null)),
        ("/sequence", json!(u64::MAX)),
        ("/changes", json!(null)),
        ("/changes", json!({})),
        ("/changes", json!([1])),
        (
            "/changes",
            changes(&mut (1..=11).map(|id| format!("u{id}:{id}"))),
        ),
        (
            "/changes",
            changes(&mut (1..=11).map(|id| format!("r{id}"))),
        ),
        ("/changes/0", json!([1, 5])),
        ("/changes/0/0", json!("1")),
        ("/changes/0/0", json!(0)), // told to nobody
        ("/changes/0/0", json!(3)), // two of one number
        ("/changes/0/0", json!(4)), // out of order
        ("/changes/3/0", json!(10)),
        ("/changes/0/1", json!("")),
        ("/changes/0/1", json!("i")),
        ("/changes/0/1", json!("i0")),
        ("/changes/0/1", json!("i121")),
        ("/changes/0/1", json!("f1")), // two of one key
        ("/changes/3/1", json!("f2")),
        ("/changes/3/1", json!("ftrue")),
        ("/changes/3/1", json!("ä")),
        ("/changes/2/1", json!("r1")),
        ("/changes/2/1", json!("r")),
        ("/changes/2/1", json!("rx")),
        ("/changes/2/1", json!("Ada:2")), // two of one name
        ("/changes/1/1", json!("Ada:x")),
        ("/changes/1/1", json!(":1")),
        ("/changes/1/1", json!("r2d2:1")),
        ("/changes/1/1", json!("A;b:1")),
        ("/changes/1/1", json!("ABCDEFGHIJKLMNO:1")),
        ("/motes", json!(null)),
        ("/motes", (1..=65).map(mote).collect()),
        ("/motes/0/0", json!("fe80::g")),
        ("/motes/0/0", json!(null)),
        ("/motes/0/1", json!(10)),
        ("/motes/0/1", json!(-1)),
    ] {
        let mut state = whole_state();
        *state.pointer_mut(pointer).unwrap() = value.clone();
        assert!(
            State::from_json(&state.to_string()).is_none(),
            "{pointer} {value}"
        );
    }
}

/// Three records are enough to be read back; the fourth is damaged.
#[test]
fn journal() {
    let path = env::temp_dir().join(format!("coap_websocket-{}.journal", std::process::id()));
    let _ = fs::remove_file(&path);
    let now = unix_now();
    let requests: Vec<Request> = (1..=4).map(|id| parsed(&post(id, b"a"))).collect();
    let journal = Journal::open(&path).unwrap();
    let entries: Vec<Entry> = requests
        .iter()
        .map(|request| journal.begin(request))
        .collect();
    journal.end(entries[1], true);
    assert_eq!(journal.find(requests[1].digest, now), None); // `Exchanges` knows those of this process
    journal.file.write_all_at(b"x", 3 * 44).unwrap();
    let journal = Journal::open(&path).unwrap();
    let find = |index: usize, now| journal.find(requests[index].digest, now);
    assert_eq!(
        [0, 1, 2, 3].map(|index| find(index, now)),
        [Some(false), Some(true), Some(false), None]
    );
    assert_eq!(
        (find(1, now + 246), find(1, now + 249), find(1, now - 9)),
        (Some(true), None, Some(true))
    );
    // The ring goes on where it was, and never grows beyond its size.
    for _ in 0..2 * coap::SEEN_MAX {
        journal.begin(&requests[0]);
    }
    assert_eq!(
        fs::metadata(&path).unwrap().len(),
        44 * coap::SEEN_MAX as u64
    );
    fs::remove_file(&path).unwrap();
}

// What people write ---------------------------------------------------------------------------------------------------

fn message(id: i64, chat: i64, text: &str, date: u64) -> Value {
    let chat = json!({"id": chat, "type": "private", "first_name": "Ada"});
    json!({"message_id": id, "chat": chat, "text": text, "date": date})
}

fn write(state: &mut State, chat: i64, text: &str, now: u64) -> (String, bool) {
    let password = Secret("geheim".to_string());
    let answer = judge(state, &message(77, chat, text, now), Some(&password), now).unwrap();
    assert_eq!(answer.chat, chat);
    assert!(answer.delete.is_none_or(|id| id == 77));
    (answer.text.unwrap_or_default(), answer.delete.is_some())
}

const REMOVED: &str = "You are removed and get no more messages. Write anything to register again.";
const FULL: &str = "The list is full: 10 people are registered already.";
const WRONG: &str = "Wrong password. Nothing was changed.";

#[test]
fn texts() {
    let (new, unknown) = (
        format!("You are registered.\n{HELP}"),
        format!("I do not understand that.\n{HELP}"),
    );
    // Text; answers to a new user, to a known one and with a full list; whether it is deleted.
    for (text, to_new, to_known, to_full, delete) in [
        (
            "hello",
            new.clone(),
            unknown.clone(),
            FULL.to_string(),
            false,
        ),
        ("", new.clone(), unknown.clone(), FULL.to_string(), false),
        (
            "/START",
            new.clone(),
            HELP.to_string(),
            format!("{FULL}\n\n{HELP}"),
            false,
        ),
        (
            "/start x",
            new.clone(),
            HELP.to_string(),
            format!("{FULL}\n\n{HELP}"),
            false,
        ),
        (
            " \nHelp ",
            new.clone(),
            HELP.to_string(),
            format!("{FULL}\n\n{HELP}"),
            false,
        ),
        (
            "/help",
            new.clone(),
            HELP.to_string(),
            format!("{FULL}\n\n{HELP}"),
            false,
        ),
        (
            "help me",
            new.clone(),
            unknown.clone(),
            FULL.to_string(),
            false,
        ),
        (
            "remove",
            new.clone(),
            unknown.clone(),
            FULL.to_string(),
            false,
        ),
        (
            "remove me now",
            new.clone(),
            unknown.clone(),
            FULL.to_string(),
            false,
        ),
        (
            "config",
            format!("{new}\n\n{CONFIG_FORM}"),
            CONFIG_FORM.into(),
            format!("{FULL}\n\n{CONFIG_FORM}"),
            false,
        ),
        (
            "Config geheim",
            format!("{new}\n\n{CONFIG_FORM}"),
            CONFIG_FORM.into(),
            format!("{FULL}\n\n{CONFIG_FORM}"),
            true,
        ),
        (
            "config a b c",
            format!("{new}\n\n{WRONG}"),
            WRONG.to_string(),
            format!("{FULL}\n\n{WRONG}"),
            true,
        ),
    ] {
        let (mut fresh, mut known, mut full) = (State::default(), State::default(), full_state());
        known.register(ADA, "Ada");
        assert_eq!(
            write(&mut fresh, ADA, text, NOW),
            (to_new, delete),
            "new: {text}"
        );
        assert_eq!(
            write(&mut known, ADA, text, NOW),
            (to_known, delete),
            "known: {text}"
        );
        assert_eq!(
            write(&mut full, ADA, text, NOW),
            (to_full, delete),
            "full: {text}"
        );
        assert_eq!(
            latest(&fresh, ADA),
            Some((1, "Ada:1234567890".to_string())),
            "{text}"
        );
        assert_eq!(full.users().count(), 10);
    }
}

/// With any log level: a macro of `log` evaluates its arguments only if the level is enabled.
#[test]
fn removal() {
    let mut state = full_state();
    assert_eq!(
        write(&mut state, 1, "REMOVE  me\n", NOW),
        (REMOVED.to_string(), false)
    );
    assert_eq!(
        (state.users().count(), latest(&state, 1)),
        (9, Some((11, "r1".to_string())))
    );
    let mut state = State::default();
    write(&mut state, ADA, "remove me", NOW);
    assert_eq!(write(&mut state, ADA, "remove me", NOW).0, REMOVED);
    assert_eq!(latest(&state, ADA), Some((2, "r1234567890".to_string()))); // told again
    assert_eq!(
        write(&mut state, ADA, "hello", NOW).0,
        format!("You are registered.\n{HELP}")
    );
    assert_eq!(state.tokens_for(ip(1), 302).0, "Ada:1234567890");
}

#[test]
fn config_messages() {
    let mut state = State::default();
    state.register(ADA, "Ada");
    for (text, answer, tokens) in [
        (
            "config geheim interval 1",
            "The interval is set to 1 minutes.",
            "Ada:1234567890;i1",
        ),
        (
            "/CONFIG geheim INTERVAL 120 ",
            "The interval is set to 120 minutes.",
            "Ada:1234567890;i120",
        ),
        (
            "config geheim feedback 1",
            "The LED feedback is set to 1 (on).",
            "Ada:1234567890;i120;f1",
        ),
        (
            "config geheim Feedback 0",
            "The LED feedback is set to 0 (off).",
            "Ada:1234567890;i120;f0",
        ),
        (
            "config geheim interval 0",
            CONFIG_FORM,
            "Ada:1234567890;i120;f0",
        ),
        (
            "config geheim interval 121",
            CONFIG_FORM,
            "Ada:1234567890;i120;f0",
        ),
        (
            "config geheim interval +5",
            CONFIG_FORM,
            "Ada:1234567890;i120;f0",
        ),
        (
            "config geheim interval 256",
            CONFIG_FORM,
            "Ada:1234567890;i120;f0",
        ),
        (
            "config geheim feedback 2",
            CONFIG_FORM,
            "Ada:1234567890;i120;f0",
        ),
        (
            "config geheim feedback on",
            CONFIG_FORM,
            "Ada:1234567890;i120;f0",
        ),
        (
            "config geheim colour 1",
            CONFIG_FORM,
            "Ada:1234567890;i120;f0",
        ),
        (
            "config geheim interval 5 6",
            CONFIG_FORM,
            "Ada:1234567890;i120;f0",
        ),
        (
            "config geheim interval",
            CONFIG_FORM,
            "Ada:1234567890;i120;f0",
        ),
        ("config GEHEIM interval 5", WRONG, "Ada:1234567890;i120;f0"),
        ("config falsch nonsense 5", WRONG, "Ada:1234567890;i120;f0"),
    ] {
        assert_eq!(
            write(&mut state, ADA, text, NOW),
            (answer.to_string(), true),
            "{text}"
        );
        assert_eq!(state.tokens_for(ip(1), 302).0, tokens, "{text}");
    }
    let answer = judge(
        &mut state,
        &message(1, ADA, "config x interval 5", NOW),
        None,
        NOW,
    )
    .unwrap()
    .text;
    assert_eq!(
        answer.as_deref(),
        Some("No password is set on the gateway, so nothing can be changed.")
    );
    assert_eq!(
        (state.sequence, &state.changes[1]),
        (5, &(3, Change::Interval(120)))
    );
}

#[test]
fn wrong_passwords() {
    let mut state = State::default();
    let _ = [ADA, 2].map(|chat| state.register(chat, "Ada"));
    let (right, wrong) = ("config geheim interval 5", "config falsch interval 5");
    let (done, last) = (
        "The interval is set to 5 minutes.",
        format!("{WRONG} Your config messages are ignored for an hour."),
    );
    let mut expect = |chat, text, now, answer: &str| {
        assert_eq!(
            write(&mut state, chat, text, now),
            (answer.to_string(), true),
            "{text} at {now}"
        );
    };
    (0..4).for_each(|_| expect(ADA, wrong, NOW, WRONG));
    expect(ADA, right, NOW, done); // no longer in a row
    (0..4).for_each(|_| expect(ADA, wrong, NOW, WRONG));
    expect(ADA, "config falsch", NOW, CONFIG_FORM); // no guess, and no pardon
    expect(ADA, wrong, NOW, &last);
    for (text, now) in [
        (right, NOW),
        (wrong, NOW + 1),
        ("config geheim", NOW + 2),
        (right, NOW + 3599),
    ] {
        expect(ADA, text, now, "");
    }
    expect(2, right, NOW, done);
    (0..4).for_each(|_| expect(ADA, wrong, NOW + 3600, WRONG));
    expect(ADA, wrong, NOW + 3600, &last);
    expect(ADA, right, NOW + 7199, "");
    expect(ADA, right, NOW + 7200, done);
    assert!(state.suspects.is_empty());
    // A flood of strangers pardons nobody who is locked out.
    (0..5).for_each(|_| drop(write(&mut state, ADA, wrong, NOW)));
    (1000..2000).for_each(|chat| drop(write(&mut state, chat, wrong, NOW)));
    assert_eq!(
        (state.suspects.len(), state.suspects[0]),
        (256, (ADA, 0, NOW + 3600))
    );
}

#[test]
fn updates() {
    let mut state = State {
        started: 100,
        ..State::default()
    };
    let mut handle = |update: Value| {
        handle_update(&mut state, &update, &config(None), NOW);
        (
            state.offset,
            state
                .answers
                .pop()
                .map(|answer| answer.text.unwrap_or_default()),
        )
    };
    let from = |id: i64, chat: Value, text: &str, date: u64| json!({"update_id": id, "message": {"message_id": 1, "chat": chat, "text": text, "date": date}});
    let ada = json!({"id": ADA, "type": "private", "first_name": "Ada"});
    let new = format!("You are registered.\n{HELP}");
    assert_eq!(
        handle(from(7, ada.clone(), "remove me", 99)),
        (8, Some(new))
    );
    assert_eq!(
        handle(from(8, ada.clone(), "config geheim interval 5", 99)),
        (9, Some(String::new()))
    );
    assert_eq!(
        handle(from(9, ada, "config geheim interval 5", 100))
            .1
            .unwrap(),
        "The interval is set to 5 minutes."
    );
    for (id, update) in [
        (11, json!({"update_id": 11})),
        (12, json!({"update_id": 12, "message": 5})),
        (
            13,
            from(
                13,
                json!({"id": -5, "type": "group", "title": "G"}),
                "a",
                200,
            ),
        ),
        (
            14,
            from(
                14,
                json!({"id": 100_000_000_000i64, "type": "private"}),
                "a",
                200,
            ),
        ),
        (
            15,
            from(15, json!({"id": "5", "type": "private"}), "a", 200),
        ),
        (16, from(16, json!({"id": 0, "type": "private"}), "a", 200)),
        (2, json!({"update_id": 2})),
        (2, json!({"message": 1})),
        (2, json!(null)),
    ] {
        assert_eq!(handle(update.clone()), (id + 1, None), "{update}");
    }
    assert!(
        handle(from(
            20,
            json!({"id": 99_999_999_999i64, "type": "private", "username": "bob"}),
            "a",
            0
        ))
        .1
        .is_some()
    );
    handle(json!({"update_id": i64::MAX}));
    assert_eq!(
        (state.offset, &state.changes[1]),
        (i64::MAX, &(2, Change::Interval(5)))
    );
    assert_eq!(
        state.users().collect::<Vec<_>>(),
        [(ADA, "Ada"), (99_999_999_999, "bob")]
    );
}

// Telegram's answers and the log --------------------------------------------------------------------------------------

#[test]
fn telegram_answers() {
    let seconds = |seconds| Some(Duration::from_secs(seconds));
    for (status, body, reason, code, retry_after) in [
        (
            401,
            r#"{"ok":false,"error_code":401,"description":"Unauthorized"}"#,
            "401 Unauthorized",
            Some(401),
            None,
        ),
        (
            403,
            r#"{"ok":false,"error_code":403,"description":"Forbidden: bot was blocked by the user"}"#,
            "403 Forbidden: bot was blocked by the user",
            Some(403),
            None,
        ),
        (
            429,
            r#"{"ok":false,"error_code":429,"description":"slow","parameters":{"retry_after":3}}"#,
            "429 slow",
            Some(429),
            seconds(3),
        ),
        (
            429,
            r#"{"ok":false,"error_code":429,"parameters":{"retry_after":59}}"#,
            "429 no description",
            Some(429),
            seconds(59),
        ),
        (
            429,
            r#"{"ok":false,"error_code":429,"parameters":{"retry_after":60}}"#,
            "429 no description",
            Some(429),
            None,
        ),
        (
            429,
            r#"{"ok":false}"#,
            "429 no description",
            Some(429),
            None,
        ),
        (
            400,
            r#"{"ok":false,"error_code":400,"parameters":{"retry_after":3}}"#,
            "400 no description",
            Some(400),
            None,
        ),
        (
            200,
            r#"{"ok":false,"error_code":403}"#,
            "403 no description",
            Some(403),
            None,
        ),
        (
            200,
            r#"{"ok":"true"}"#,
            "200 no description",
            Some(200),
            None,
        ),
        (
            500,
            r#"{"ok":true,"result":1}"#,
            "500 no description",
            Some(500),
            None,
        ),
        (404, "[]", "404 no description", Some(404), None),
        (
            502,
            "<html>",
            "HTTP 502 with a body that is not JSON",
            None,
            None,
        ),
        (200, "", "HTTP 200 with a body that is not JSON", None, None),
    ] {
        let failure = Failure::or_result(status, body.as_bytes()).err().unwrap();
        assert_eq!(
            (failure.reason.as_str(), failure.code, failure.retry_after),
            (reason, code, retry_after),
            "{body}"
        );
    }
    for (body, result) in [
        (r#"{"ok":true,"result":[1]}"#, json!([1])),
        (r#"{"ok":true}"#, Value::Null),
    ] {
        assert_eq!(Failure::or_result(200, body.as_bytes()).ok(), Some(result));
    }
}

#[test]
fn log_lines() {
    for (text, escaped) in [
        ("a%ä😀 \\", "a%ä😀 \\"),
        ("a\nb\r\t\0", "a\\nb\\r\\t\\u{0}"),
        ("\u{1b}[2J\u{7f}\u{85}", "\\u{1b}[2J\\u{7f}\\u{85}"),
        ("\u{2028}\u{2029}", "\\u{2028}\\u{2029}"),
    ] {
        assert_eq!(escape(text), escaped);
    }
    for (seconds, date) in [
        (0, "1970-01-01 00:00:00"),
        (86_399, "1970-01-01 23:59:59"),
        (68_169_600, "1972-02-29 00:00:00"),
        (951_782_400, "2000-02-29 00:00:00"),
        (951_868_800, "2000-03-01 00:00:00"),
        (1_709_208_000, "2024-02-29 12:00:00"),
        (1_735_689_599, "2024-12-31 23:59:59"),
        (NOW, "2026-01-31 12:00:00"),
        (1_772_323_200, "2026-03-01 00:00:00"),
        (4_107_456_000, "2100-02-28 00:00:00"),
        (4_107_542_400, "2100-03-01 00:00:00"),
    ] {
        assert_eq!(utc(seconds), date);
    }
}

// The CoAP message layer ----------------------------------------------------------------------------------------------

#[test]
fn constants() {
    assert_eq!(
        (
            coap::EXCHANGE_LIFETIME.as_secs(),
            coap::NON_LIFETIME.as_secs()
        ),
        (247, 145)
    );
    assert_eq!(
        (
            coap::ACK_TIMEOUT.as_secs(),
            coap::MAX_RETRANSMIT,
            coap::PORT
        ),
        (2, 4, 5683)
    );
    assert_eq!(
        (
            coap::IN_PROGRESS_MAX,
            coap::BODY_MAX,
            coap::ASSEMBLY_LIFETIME.as_secs()
        ),
        (32, 8192, 60)
    );
}

#[test]
fn retransmission() {
    for (random, timeout) in [(0, 2000), (1000, 3000), (1001, 2000)] {
        let (start, mut exchanges) = (Instant::now(), Exchanges::new(0xffff));
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        let request = request(&mut exchanges, start, peer(1), &post(9, b"a"));
        assert_eq!(exchanges.accept(&request), [0x60, 0, 0, 9]);
        assert_eq!(exchanges.due(at(1 << 30)), (vec![], None));
        let bytes = exchanges.respond(start, &request, sent(), random);
        assert_eq!(
            bytes,
            [&[0x42, 0x45, 0, 0, 0xca, 0xfe, 0xc0, 0xff][..], b"ok"].concat()
        );
        let mut due = timeout;
        for retransmission in 0..4 {
            assert_eq!(
                exchanges.due(at(due - 1)),
                (vec![], Some(at(due))),
                "{retransmission}"
            );
            let next = due + (timeout << (retransmission + 1));
            assert_eq!(
                exchanges.due(at(due)),
                (vec![(peer(1), bytes.clone())], Some(at(next))),
                "{retransmission}"
            );
            due = next;
        }
        assert_eq!(due, timeout * 31);
        assert_eq!(exchanges.due(at(due - 1)), (vec![], Some(at(due))));
        assert_eq!(exchanges.due(at(due)), (vec![], None));
        assert_eq!(
            shown(exchanges.receive(at(due), peer(1), &[0x60, 0, 0, 0])),
            "nothing"
        );
    }
}

#[test]
fn acknowledgements() {
    for (answer, delivers, shows) in [
        (0x60, Some(4), "acknowledged Some(4)"),
        (0x60, None, "acknowledged None"),
        (0x70, Some(4), "refused"),
    ] {
        let (now, mut exchanges) = (Instant::now(), Exchanges::new(7));
        let accepted = request(&mut exchanges, now, peer(1), &post(9, b"a"));
        exchanges.accept(&accepted);
        exchanges.respond(now, &accepted, Response { delivers, ..sent() }, 0);
        let other_port = SocketAddr::from((ip(1), 61617));
        for (from, id) in [(peer(2), 8), (other_port, 8), (peer(1), 9), (peer(1), 7)] {
            assert_eq!(
                shown(exchanges.receive(now, from, &[answer, 0, 0, id])),
                "nothing"
            );
        }
        assert!(exchanges.due(now).1.is_some());
        assert_eq!(
            shown(exchanges.receive(now, peer(1), &[answer, 0, 0, 8])),
            shows
        );
        assert_eq!(
            exchanges.due(now + Duration::from_secs(100)),
            (vec![], None)
        );
        assert_eq!(
            shown(exchanges.receive(now, peer(1), &[answer, 0, 0, 8])),
            "nothing"
        );
    }
    let (now, mut exchanges) = (Instant::now(), Exchanges::new(7));
    let request = request(
        &mut exchanges,
        now,
        peer(1),
        &datagram(1, 2, 9, &[(11, b"message")], b"a"),
    );
    assert!(exchanges.accept(&request).is_empty());
    let failed = Response::error(ResponseType::InternalServerError, "not for the firmware");
    let failed = Response {
        delivers: Some(1),
        ..failed
    };
    assert_eq!(
        exchanges.respond(now, &request, failed, 0),
        [0x52, 0xa0, 0, 8, 0xca, 0xfe]
    );
    assert_eq!(
        exchanges.due(now + Duration::from_secs(100)),
        (vec![], None)
    );
}

#[test]
fn duplicates() {
    let (con, non) = (post(9, b"a"), datagram(1, 2, 9, &[(11, b"message")], b"a"));
    let ack = "send 60 00 00 09";
    for (bytes, lifetime, early, late) in [
        (&con, 247, ack, "send 62 84 00 09 ca fe ff 78"),
        (&non, 145, "send", "send"),
    ] {
        let (start, mut exchanges) = (Instant::now(), Exchanges::new(0));
        let (before, after) = (
            Duration::from_millis(lifetime * 1000 - 1),
            Duration::from_secs(lifetime),
        );
        // In progress, for however long; then until the lifetime is over.
        let first = request(&mut exchanges, start, peer(1), bytes);
        exchanges.accept(&first);
        assert_eq!(
            shown(exchanges.receive(start + after * 2, peer(1), bytes)),
            early
        );
        exchanges.respond(start, &first, sent(), 0);
        assert_eq!(
            shown(exchanges.receive(start + before, peer(1), bytes)),
            early
        );
        assert_eq!(
            shown(exchanges.receive(start, peer(2), bytes)),
            "request POST /message"
        );
        assert_eq!(
            shown(exchanges.receive(start + after, peer(1), bytes)),
            "request POST /message"
        );
        // Answered at once.
        let (other, start) = (
            bytes.iter().chain(b"b").copied().collect::<Vec<_>>(),
            start + after,
        );
        let second = request(&mut exchanges, start, peer(1), &other);
        exchanges.reply(&second, Response::error(ResponseType::NotFound, "x"));
        assert_eq!(
            shown(exchanges.receive(start + before, peer(1), &other)),
            late
        );
        assert_eq!(
            shown(exchanges.receive(start + after, peer(1), &other)),
            "request POST /message"
        );
    }
}

#[test]
fn bounded_memory() {
    let (now, mut exchanges) = (Instant::now(), Exchanges::new(0));
    let first: Vec<_> = (0..32)
        .map(|id| {
            assert!(exchanges.has_room());
            let request = request(&mut exchanges, now, peer(1), &post(id, b"a"));
            exchanges.accept(&request);
            request
        })
        .collect();
    assert!(!exchanges.has_room());
    for n in 0..=coap::SEEN_MAX as u16 {
        let other = request(&mut exchanges, now, peer(2), &post(n, b"a"));
        exchanges.reply(&other, sent());
    }
    assert_eq!(
        shown(exchanges.receive(now, peer(1), &post(0, b"a"))),
        "send 60 00 00 00"
    );
    assert_eq!(
        shown(exchanges.receive(now, peer(1), &post(31, b"a"))),
        "send 60 00 00 1f"
    );
    assert_eq!(
        shown(exchanges.receive(now, peer(2), &post(32, b"a"))),
        "request POST /message"
    );
    assert!(
        shown(exchanges.receive(now, peer(2), &post(33, b"a"))).starts_with("send 62 45 00 21")
    );
    exchanges.respond(now, &first[0], sent(), 0);
    assert!(exchanges.has_room());
}

#[test]
fn blocks() {
    let start = Instant::now();
    let mut exchanges = Exchanges::new(0);
    let mut id = 0;
    // Payload of the assembled request, or code and diagnostic payload.
    let mut block = |second: u64, from: u16, path: &str, value: &[u8], payload: &[u8]| {
        id += 1;
        let bytes = datagram(0, 2, id, &[(11, path.as_bytes()), (27, value)], payload);
        let mut request = request(
            &mut exchanges,
            start + Duration::from_secs(second),
            peer(from),
            &bytes,
        );
        match exchanges.assemble(&mut request) {
            Ok(()) => format!("{} {:x?}", request.payload.len(), request.payload.last()),
            Err(error) => text::<()>(Err(error)).trim_end().to_string(),
        }
    };
    let (missing, size) = ("4.08 A block is missing", "4.00 A block is not of its size");
    let (a, b) = ([b'a'; 16], [b'b'; 16]);
    for (second, from, path, value, payload, expected) in [
        (0, 1, "message", &[0x08][..], &a[..], "2.31"),
        (0, 2, "message", &[0x08], &a, "2.31"), // another peer
        (0, 1, "update", &[0x08], &a, "2.31"),  // another path
        (0, 1, "message", &[0x18], &a, "2.31"),
        (59, 1, "message", &[0x20], b"c", "33 Some(63)"),
        (59, 1, "message", &[0x20], b"c", missing), // it was used up
        (59, 2, "message", &[0x20], b"c", missing), // a gap
        (59, 2, "message", &[0x10], b"c", missing), // which ended it
        (59, 1, "update", &[0x10], &b, "32 Some(62)"),
        (60, 1, "message", &[], &a, "16 Some(61)"), // the only block
        (60, 1, "message", &[0x08], &a, "2.31"),
        (60, 1, "message", &[0x08], &b, "2.31"), // from the start again
        (60, 1, "message", &[0x10], &a, "32 Some(61)"),
        (60, 1, "message", &[0x0f], &a, "4.00 Reserved block size"),
        (60, 1, "message", &[0x08], b"a", size),
        (60, 1, "message", &[0x00], &[0; 17], size),
        (60, 1, "message", &[0x0e], &[0; 1024], "2.31"),
        (60, 1, "message", &[0x19], &[0; 32], missing), // of another size, at another place
        (70, 1, "message", &[0x08], &a, "2.31"),
        (129, 1, "message", &[0x18], &a, "2.31"),
        (189, 1, "message", &[0x20], &a, missing), // 60 s
    ] {
        assert_eq!(
            block(second, from, path, value, payload),
            expected,
            "{second} {from} {path} {value:?}"
        );
    }
    for (last, expected) in [(&[0; 1024][..], "8192 Some(0)"), (&[0; 1], "7169 Some(0)")] {
        (0..7).for_each(|n| {
            assert_eq!(
                block(200, 1, "message", &[n << 4 | 0x0e], &[0; 1024]),
                "2.31"
            )
        });
        assert_eq!(block(200, 1, "message", &[0x76], last), expected);
    }
    (0..8).for_each(|n| {
        assert_eq!(
            block(200, 1, "message", &[n << 4 | 0x0e], &[0; 1024]),
            "2.31"
        )
    });
    assert_eq!(
        block(200, 1, "message", &[0x86], b"a"),
        "4.13 At most 8192 bytes"
    );
    assert_eq!(block(200, 1, "message", &[0x86], b"a"), missing);
    // One more than are kept: the oldest has gone.
    (0..=64).for_each(|n| assert_eq!(block(300, n, "message", &[0x08], &a), "2.31"));
    assert_eq!(block(300, 0, "message", &[0x10], b"c"), missing);
    assert_eq!(block(300, 1, "message", &[0x10], b"c"), "17 Some(63)");
}

#[test]
fn block_answers() {
    let (now, mut exchanges) = (Instant::now(), Exchanges::new(0));
    for (bytes, expected) in [
        (
            datagram(0, 2, 9, &[(11, b"message"), (27, &[0x08])], &[0; 16]),
            &[0x62, 0x5f, 0, 9, 0xca, 0xfe, 0xd1, 14, 8][..],
        ),
        (
            post(9, &[0; 8193]),
            &[
                &[0x62, 0x8d, 0, 9, 0xca, 0xfe, 0xd2, 47, 0x20, 0, 0xff],
                &b"At most 8192 bytes"[..],
            ]
            .concat(),
        ),
    ] {
        let mut request = request(&mut exchanges, now, peer(1), &bytes);
        let response = exchanges.assemble(&mut request).unwrap_err();
        assert_eq!(exchanges.reply(&request, response), expected);
    }
    assert!(
        exchanges
            .assemble(&mut parsed(&post(9, &[0; 8192])))
            .is_ok()
    );
}

#[test]
fn options() {
    let answer = |bytes: &[u8]| {
        let mut exchanges = Exchanges::new(0);
        match exchanges.receive(Instant::now(), peer(1), bytes) {
            coap::Event::Request(request) => match request.check_options() {
                Ok(()) => format!("request {request}"),
                Err(response) => shown(coap::Event::Send(exchanges.reply(&request, response))),
            },
            event => shown(event),
        }
    };
    let other = |number: u16| {
        format!(
            "send {} ff {}",
            "62 82 00 09 ca fe",
            hex(&format!("Option {number} is not supported"))
        )
    };
    let wrong = |number: u16| {
        format!(
            "send {} ff {}",
            "62 82 00 09 ca fe",
            hex(&format!("Option {number} is malformed"))
        )
    };
    let proxy = format!("send 62 a5 00 09 ca fe ff {}", hex("This is no proxy"));
    let long = [b'a'; 256];
    let fine = "request POST /".to_string();
    for (options, expected) in [
        (
            vec![
                (2, &b"elective"[..]),
                (14, b""),
                (60, b"abcdefghi"),
                (258, b"x"),
                (2048, b""),
            ],
            fine.clone(),
        ),
        (
            vec![
                (3, b"host"),
                (7, b"\x16\x33"),
                (15, b"a"),
                (15, b"b"),
                (17, b""),
                (23, b"\x06"),
            ],
            fine,
        ),
        (vec![(1, b"")], other(1)),
        (vec![(5, b"")], other(5)),
        (vec![(9, b"x")], other(9)),
        (vec![(65001, b"x")], other(65001)),
        (vec![(11, &long)], wrong(11)),
        (vec![(3, b"")], wrong(3)),
        (vec![(3, b"a"), (3, b"b")], wrong(3)),
        (vec![(17, b""), (17, b"")], wrong(17)),
        (vec![(17, b"abc")], wrong(17)),
        (vec![(23, b"abcd")], wrong(23)),
        (vec![(27, b"abcd")], wrong(27)),
        (vec![(35, b"coap://x")], proxy.clone()),
        (vec![(39, b"coap")], proxy),
    ] {
        let bytes = datagram(0, 2, 9, &options, b"");
        assert_eq!(answer(&bytes), expected, "{options:?}");
    }
    for (number, expected) in [(9, "nothing"), (39, "send 52 a5 00 01 ca fe")] {
        assert_eq!(answer(&datagram(1, 2, 9, &[(number, b"x")], b"")), expected);
    }
    let request = parsed(&datagram(
        0,
        5,
        9,
        &[(11, b"a/b"), (11, b""), (11, b"c:secret")],
        b"",
    ));
    assert_eq!(
        (request.path().as_str(), request.to_string().as_str()),
        ("a%2Fb//c:secret", "0.05 /a%2Fb//c")
    );
}

fn hex(text: &str) -> String {
    text.bytes()
        .map(|byte| format!("{byte:02x}"))
        .collect::<Vec<_>>()
        .join(" ")
}

#[test]
fn malformed_datagrams() {
    let reset = "send 70 00 00 09";
    for (bytes, expected) in [
        (&[][..], "nothing"),
        (&[0x40], "nothing"),
        (&[0x40, 2, 0], "nothing"),
        (&[0x00, 2, 0, 9], "nothing"), // version 0
        (&[0x80, 2, 0, 9], "nothing"), // version 2
        (&[0xc0, 0, 0, 9], "nothing"), // version 3
        (&[0x40, 0, 0, 9], reset),     // ping
        (&[0x40, 0, 0, 9, 0xff], reset),
        (&[0x41, 0, 0, 9, 1], reset),  // empty with a token
        (&[0x50, 0, 0, 9], "nothing"), // empty NON
        (&[0x60, 0, 0, 9], "nothing"), // stray ACK
        (&[0x70, 0, 0, 9], "nothing"), // stray RST
        (&[0x40, 2, 0, 9], "request POST /"),
        (&[0x40, 4, 0, 9], "request 0.04 /"),
        (&[0x40, 31, 0, 9], "request 0.31 /"),
        (&[0x50, 1, 0, 9], "request GET /"),
        (&[0x40, 2, 0, 9, 0xff], reset), // marker without payload
        (&[0x50, 2, 0, 9, 0xff], "nothing"),
        (&[0x40, 2, 0, 9, 0xb1, b'a', 0xff], reset),
        (&[0x40, 0x20, 0, 9], reset), // reserved class 1
        (&[0x40, 0x45, 0, 9], reset), // unexpected response
        (&[0x50, 0x45, 0, 9], "nothing"),
        (&[0x40, 0xe1, 0, 9], reset),  // class 7
        (&[0x60, 2, 0, 9], "nothing"), // request as ACK
        (&[0x70, 2, 0, 9], "nothing"),
        (&[0x49, 2, 0, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9], reset), // token of 9 bytes
        (&[0x4f, 2, 0, 9], reset),
        (&[0x42, 2, 0, 9, 1], reset),                // token cut
        (&[0x40, 2, 0, 9, 0xb2, b'a'], reset),       // option cut
        (&[0x40, 2, 0, 9, 0xf1, b'a'], reset),       // reserved delta
        (&[0x40, 2, 0, 9, 0xbf, b'a'], reset),       // reserved length
        (&[0x40, 2, 0, 9, 0xe0, 0xff, 0xff], reset), // number beyond 65535
        (&[0x40, 2, 0, 9, 0xd0], reset),
    ] {
        assert_eq!(
            shown(Exchanges::new(0).receive(Instant::now(), peer(1), bytes)),
            expected,
            "{bytes:x?}"
        );
    }
}

#[test]
fn client() {
    let request = coap::encode_request("message", b"a", 0x0102_0304_0506_0708);
    assert_eq!(
        request,
        [&[0x44, 2, 7, 8, 1, 2, 3, 4, 0xb7][..], b"message\xffa"].concat()
    );
    let answer = |bytes: &[u8]| match coap::decode_response(bytes, &request) {
        None => "none".to_string(),
        Some((code, payload, ack)) => {
            format!("{code} {} {ack:x?}", String::from_utf8_lossy(&payload))
        }
    };
    for (bytes, expected) in [
        (&[0x60, 0, 7, 8][..], "0.00  []"),
        (&[0x60, 0, 7, 9], "none"),
        (&[0x70, 0, 7, 8], "none"),
        (
            &[0x44, 0x45, 0, 9, 1, 2, 3, 4, 0xff, b'x'],
            "2.05 x [60, 0, 0, 9]",
        ),
        (&[0x54, 0xa0, 0, 9, 1, 2, 3, 4], "5.00  []"),
        (&[0x64, 0x80, 7, 8, 1, 2, 3, 4], "4.00  []"),
        (&[0x44, 0x45, 0, 9, 1, 2, 3, 5], "none"),
        (&[], "none"),
    ] {
        assert_eq!(answer(bytes), expected, "{bytes:x?}");
    }
}
