//! A mote: CoAP messages made and read byte by byte (RFC 7252 §3), and a client on a UDP socket of its own.

use std::cell::RefCell;
use std::fmt;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Longer than the gateway may take for any answer (9 s).
pub const PATIENCE: Duration = Duration::from_secs(12);
/// What an answer that needs all the time of a request (8.5 s, see unit/mod.rs) takes at most, on a busy machine.
pub const IN_TIME: Duration = Duration::from_secs(11);
/// How long "nothing comes" is waited for.
pub const QUIET: Duration = Duration::from_millis(300);

pub const GET: u8 = 1;
pub const POST: u8 = 2;
pub const PUT: u8 = 3;
pub const DELETE: u8 = 4;

// Option numbers (RFC 7252 §12.2, RFC 7959 §6, RFC 9175).
pub const URI_PATH: u16 = 11;
pub const CONTENT_FORMAT: u16 = 12;
pub const URI_QUERY: u16 = 15;
pub const ACCEPT: u16 = 17;
pub const BLOCK2: u16 = 23;
pub const BLOCK1: u16 = 27;
pub const PROXY_URI: u16 = 35;
pub const PROXY_SCHEME: u16 = 39;
pub const SIZE1: u16 = 60;
pub const REQUEST_TAG: u16 = 292;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Con,
    Non,
    Ack,
    Rst,
}

use Kind::{Ack, Con, Non, Rst};

/// One CoAP message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    pub kind: Kind,
    pub code: u8,
    pub id: u16,
    pub token: Vec<u8>,
    /// Number and value, in the order in which they were added or read.
    pub options: Vec<(u16, Vec<u8>)>,
    pub payload: Vec<u8>,
}

/// An option value: the shortest big-endian form (RFC 7252 §3.2).
pub fn uint(value: u32) -> Vec<u8> {
    value
        .to_be_bytes()
        .into_iter()
        .skip_while(|byte| *byte == 0)
        .collect()
}

/// The value of a Block option; `size` is 16 to 1024.
pub fn block(number: u32, more: bool, size: u32) -> Vec<u8> {
    uint(number << 4 | u32::from(more) << 3 | (size.ilog2() - 4))
}

impl Message {
    pub fn new(kind: Kind, code: u8, id: u16) -> Self {
        Self {
            kind,
            code,
            id,
            token: Vec::new(),
            options: Vec::new(),
            payload: Vec::new(),
        }
    }

    pub fn token(mut self, token: &[u8]) -> Self {
        self.token = token.to_vec();
        self
    }

    pub fn option(mut self, number: u16, value: impl AsRef<[u8]>) -> Self {
        self.options.push((number, value.as_ref().to_vec()));
        self
    }

    pub fn path(self, path: &str) -> Self {
        path.split('/')
            .filter(|part| !part.is_empty())
            .fold(self, |message, part| message.option(URI_PATH, part))
    }

    pub fn payload(mut self, payload: impl AsRef<[u8]>) -> Self {
        self.payload = payload.as_ref().to_vec();
        self
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![
            1 << 6 | (self.kind as u8) << 4 | self.token.len() as u8,
            self.code,
        ];
        bytes.extend(self.id.to_be_bytes());
        bytes.extend(&self.token);
        let mut options = self.options.clone();
        options.sort_by_key(|(number, _)| *number); // stable: repeated options keep their order
        let mut last = 0;
        for (number, value) in options {
            let (delta, delta_bytes) = nibble(number - last);
            let (length, length_bytes) = nibble(value.len() as u16);
            bytes.push(delta << 4 | length);
            bytes.extend(delta_bytes);
            bytes.extend(length_bytes);
            bytes.extend(value);
            last = number;
        }
        if !self.payload.is_empty() {
            bytes.push(0xff);
            bytes.extend(&self.payload);
        }
        bytes
    }

    /// Reads a message strictly: none if anything is not as RFC 7252 §3 says.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let [first, code, id1, id2, rest @ ..] = bytes else {
            return None;
        };
        let token_length = usize::from(first & 15);
        if first >> 6 != 1 || token_length > 8 || rest.len() < token_length {
            return None;
        }
        let kind = [Con, Non, Ack, Rst][usize::from(first >> 4 & 3)];
        let (token, mut rest) = rest.split_at(token_length);
        let mut message = Self::new(kind, *code, u16::from_be_bytes([*id1, *id2])).token(token);
        if *code == 0 && bytes.len() > 4 {
            return None;
        }
        let mut number: u16 = 0;
        while let [first, tail @ ..] = rest {
            if *first == 0xff {
                message.payload = tail.to_vec();
                return (!tail.is_empty()).then_some(message);
            }
            let (delta, tail) = extended(first >> 4, tail)?;
            let (length, tail) = extended(first & 15, tail)?;
            let (value, tail) = tail.split_at_checked(usize::from(length))?;
            number = number.checked_add(delta)?;
            message.options.push((number, value.to_vec()));
            rest = tail;
        }
        Some(message)
    }

    pub fn option_value(&self, number: u16) -> Option<&[u8]> {
        self.options
            .iter()
            .find(|(other, _)| *other == number)
            .map(|(_, value)| value.as_slice())
    }

    pub fn option_uint(&self, number: u16) -> Option<u32> {
        Some(
            self.option_value(number)?
                .iter()
                .fold(0, |value, byte| value << 8 | u32::from(*byte)),
        )
    }

    /// The code as it is written in the RFC: `2.05`.
    pub fn code(&self) -> String {
        format!("{}.{:02}", self.code >> 5, self.code & 31)
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.payload).into_owned()
    }

    /// Asserts code and payload.
    #[track_caller]
    pub fn expect(&self, code: &str, payload: &str) {
        assert_eq!(
            (self.code().as_str(), self.text().as_str()),
            (code, payload),
            "in {self}"
        );
    }

    /// Asserts the code alone.
    #[track_caller]
    pub fn expect_code(&self, code: &str) {
        assert_eq!(self.code(), code, "in {self}");
    }
}

/// As the demo prints it: `CON 2.05 [ID 4711, token beef] "No Updates"`.
impl fmt::Display for Message {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = ["CON", "NON", "ACK", "RST"][self.kind as usize];
        let code = match self.code {
            0 => "empty".to_string(),
            GET => "GET".to_string(),
            POST => "POST".to_string(),
            _ => self.code(),
        };
        write!(out, "{kind} {code} [ID {:04x}", self.id)?;
        if !self.token.is_empty() {
            write!(out, ", token ")?;
            self.token
                .iter()
                .try_for_each(|byte| write!(out, "{byte:02x}"))?;
        }
        write!(out, "]")?;
        for (number, value) in &self.options {
            match (*number, value.as_slice()) {
                (URI_PATH, path) => write!(out, " /{}", String::from_utf8_lossy(path))?,
                (CONTENT_FORMAT, []) => write!(out, " Content-Format: text/plain")?,
                (CONTENT_FORMAT, [40]) => write!(out, " Content-Format: link-format")?,
                (BLOCK1, value) => write!(out, " Block1: {value:02x?}")?,
                (number, value) => write!(out, " option {number}: {value:02x?}")?,
            }
        }
        if self.payload.is_empty() {
            Ok(())
        } else {
            write!(out, " {:?}", self.text())
        }
    }
}

/// The 4-bit form of an option's delta or length, and the bytes that extend it (RFC 7252 §3.1).
fn nibble(value: u16) -> (u8, Vec<u8>) {
    match value {
        0..=12 => (value as u8, Vec::new()),
        13..=268 => (13, vec![(value - 13) as u8]),
        _ => (14, (value - 269).to_be_bytes().to_vec()),
    }
}

fn extended(nibble: u8, bytes: &[u8]) -> Option<(u16, &[u8])> {
    match nibble {
        13 => bytes
            .split_first()
            .map(|(byte, rest)| (u16::from(*byte) + 13, rest)),
        14 => bytes
            .split_first_chunk()
            .and_then(|(two, rest)| Some((u16::from_be_bytes(*two).checked_add(269)?, rest))),
        15 => None,
        _ => Some((nibble.into(), bytes)),
    }
}

/// The payload of a request as the firmware writes it.
pub fn form(url: &str, token: &str, chats: &str, text: &str) -> String {
    format!("url={url}&token={token}&chat_ids={chats}&text={text}")
}

/// Message IDs as gcoap counts them: 1 to 3 from one request to the next, and from anywhere after a restart.
#[derive(Clone, Debug)]
pub struct MessageIds {
    last: u16,
    random: u64,
}

impl MessageIds {
    pub fn new(seed: u64) -> Self {
        let mut ids = Self {
            last: 0,
            random: seed,
        };
        ids.restart();
        ids
    }

    pub fn next(&mut self) -> u16 {
        self.last = self.last.wrapping_add(1 + self.draw(3));
        self.last
    }

    /// At least 1000 away, for nobody can tell a restart that happens to go on from the last ID; and never so far that
    /// an ID comes again soon, for the same request would be a duplicate, RFC 7252 §4.5.
    pub fn restart(&mut self) {
        self.last = self.last.wrapping_add(1000 + self.draw(5000));
    }

    /// The high bits of a linear congruential generator.
    fn draw(&mut self, below: u64) -> u16 {
        self.random = self
            .random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((self.random >> 33) % below) as u16
    }
}

/// One mote: a UDP socket connected to the gateway, so that only answers from the gateway's own address and port are
/// seen, as gcoap does. The gateway tells motes apart by their IP address: see [`Mote::at`].
pub struct Mote {
    pub socket: UdpSocket,
    ids: RefCell<MessageIds>,
}

impl Mote {
    pub fn new(gateway: SocketAddr) -> Self {
        // From ::1 there is no way to a link-local address.
        let local = match gateway {
            SocketAddr::V4(_) => "127.0.0.1",
            SocketAddr::V6(gateway) if gateway.ip().is_unicast_link_local() => "::",
            SocketAddr::V6(_) => "::1",
        };
        Self::at(local, gateway)
    }

    /// A mote with an address of its own, `127.0.0.2` to `127.255.255.254` (for a gateway on `127.0.0.1`).
    pub fn at(ip: &str, gateway: SocketAddr) -> Self {
        Self::at_port(ip, 0, gateway)
    }

    /// A mote with an address and a port of its own. The firmware's port is always 5683.
    pub fn at_port(ip: &str, port: u16, gateway: SocketAddr) -> Self {
        let ip: IpAddr = ip.parse().unwrap();
        let socket = UdpSocket::bind((ip, port)).unwrap();
        socket.connect(gateway).unwrap();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        Self {
            socket,
            ids: RefCell::new(MessageIds::new(now.as_nanos() as u64)),
        }
    }

    pub fn next_id(&self) -> u16 {
        self.ids.borrow_mut().next()
    }

    /// From now on its message IDs are those of a mote that has booted again, with the same address and port.
    pub fn reboot(&self) {
        self.ids.borrow_mut().restart();
    }

    /// A POST with a new message ID and a 2-byte token, as the firmware sends it.
    pub fn post(&self, path: &str, payload: impl AsRef<[u8]>) -> Message {
        self.request(Con, POST, path).payload(payload)
    }

    pub fn request(&self, kind: Kind, method: u8, path: &str) -> Message {
        let id = self.next_id();
        Message::new(kind, method, id)
            .token(&(!id).to_be_bytes())
            .path(path)
    }

    pub fn send(&self, message: &Message) {
        self.send_raw(&message.encode());
    }

    pub fn send_raw(&self, bytes: &[u8]) {
        // A gateway that is being restarted makes the kernel report a refused connection; the datagram is lost.
        match self.socket.send(bytes) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
            Err(error) => panic!("send: {error}"),
        }
    }

    /// The bytes of the next datagram; none if there is none within `limit`.
    pub fn receive_raw(&self, limit: Duration) -> Option<Vec<u8>> {
        let end = Instant::now() + limit;
        let mut buffer = [0; 2048];
        loop {
            let left = end
                .saturating_duration_since(Instant::now())
                .max(Duration::from_micros(1));
            self.socket.set_read_timeout(Some(left)).unwrap();
            match self.socket.recv(&mut buffer) {
                Ok(length) => return Some(buffer[..length].to_vec()),
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                    ) => {}
                Err(error) => panic!("receive: {error}"),
            }
            if Instant::now() >= end {
                return None;
            }
        }
    }

    pub fn try_receive(&self, limit: Duration) -> Option<Message> {
        let bytes = self.receive_raw(limit)?;
        for secret in [super::TOKEN, super::PASSWORD] {
            let leaked = bytes
                .windows(secret.len())
                .any(|window| window == secret.as_bytes());
            assert!(
                !leaked,
                "the gateway sent a secret: {:?}",
                String::from_utf8_lossy(&bytes)
            );
        }
        Some(
            Message::decode(&bytes)
                .unwrap_or_else(|| panic!("the gateway sent a malformed message: {bytes:02x?}")),
        )
    }

    #[track_caller]
    pub fn receive(&self) -> Message {
        self.try_receive(PATIENCE).expect("the gateway answers")
    }

    #[track_caller]
    pub fn expect_silence(&self, time: Duration) {
        if let Some(message) = self.try_receive(time) {
            panic!("unexpected: {message}");
        }
    }

    /// A CoAP ping; false without a matching RST within `limit`.
    pub fn ping(&self, limit: Duration) -> bool {
        let ping = Message::new(Con, 0, self.next_id());
        self.send(&ping);
        let end = Instant::now() + limit;
        while let Some(message) = self.try_receive(end.saturating_duration_since(Instant::now())) {
            if message == Message::new(Rst, 0, ping.id) {
                return true;
            }
        }
        false
    }

    /// Acknowledges a separate response.
    pub fn acknowledge(&self, response: &Message) {
        self.send(&Message::new(Ack, 0, response.id));
    }

    /// Rejects a separate response.
    pub fn reset(&self, response: &Message) {
        self.send(&Message::new(Rst, 0, response.id));
    }

    /// Sends a CON request and expects its empty ACK.
    #[track_caller]
    pub fn begin(&self, request: &Message) {
        self.send(request);
        assert_eq!(
            self.receive(),
            Message::new(Ack, 0, request.id),
            "empty ACK of {request}"
        );
    }

    /// Waits for the separate CON response of a request, and does not acknowledge it.
    #[track_caller]
    pub fn response(&self, request: &Message) -> Message {
        let response = self.receive();
        assert_eq!(
            (response.kind, &response.token),
            (Con, &request.token),
            "separate response: {response}"
        );
        response
    }

    /// Sends a CON request and expects an empty ACK at once and a separate CON response, which is acknowledged.
    #[track_caller]
    pub fn separate(&self, request: &Message) -> Message {
        self.begin(request);
        let response = self.response(request);
        self.acknowledge(&response);
        response
    }

    /// Sends a CON request and expects a response inside the ACK.
    #[track_caller]
    pub fn piggybacked(&self, request: &Message) -> Message {
        self.send(request);
        let response = self.receive();
        assert_eq!(
            (response.kind, response.id),
            (Ack, request.id),
            "piggybacked response: {response}"
        );
        assert_eq!(response.token, request.token, "token of {response}");
        assert_ne!(response.code, 0, "a response in the ACK, not an empty ACK");
        response
    }

    /// A whole POST with a separate response, acknowledged.
    #[track_caller]
    pub fn post_separate(&self, path: &str, payload: impl AsRef<[u8]>) -> Message {
        self.separate(&self.post(path, payload))
    }

    /// A whole POST with a piggybacked response.
    #[track_caller]
    pub fn post_piggybacked(&self, path: &str, payload: impl AsRef<[u8]>) -> Message {
        self.piggybacked(&self.post(path, payload))
    }

    /// A whole exchange over a lossy link: the request is retransmitted as RFC 7252 §4.2 says, starting with
    /// `ack_timeout`, until it is acknowledged or answered; then the response may take so long as `patience`. None if
    /// the exchange fails.
    pub fn reliable(
        &self,
        request: &Message,
        ack_timeout: Duration,
        patience: Duration,
    ) -> Option<Message> {
        let mut timeout = ack_timeout;
        let mut acknowledged = false;
        for _ in 0..=4 {
            self.send(request);
            let end = Instant::now() + timeout;
            while let Some(message) =
                self.try_receive(end.saturating_duration_since(Instant::now()))
            {
                match message.kind {
                    Ack | Rst if message.id != request.id => {}
                    Rst => return None,
                    Ack if message.code == 0 => acknowledged = true,
                    Ack => return Some(message),
                    Con | Non if message.token != request.token => self.reset(&message),
                    Con | Non => {
                        self.acknowledge(&message);
                        return Some(message);
                    }
                }
                if acknowledged {
                    break;
                }
            }
            if acknowledged {
                break;
            }
            timeout *= 2;
        }
        if !acknowledged {
            return None;
        }
        let end = Instant::now() + patience;
        while let Some(message) = self.try_receive(end.saturating_duration_since(Instant::now())) {
            if matches!(message.kind, Con | Non) && message.token == request.token {
                self.acknowledge(&message);
                return Some(message);
            }
        }
        None
    }
}
