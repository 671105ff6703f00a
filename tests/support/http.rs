//! The stand-in's connections: TLS and HTTP/1.1, and how they break.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use rustls::{ProtocolVersion, ServerConfig, ServerConnection, StreamOwned};
use serde_json::{Map, Value};

use super::bot_api::{ConnectionFault, Fault, Reply, Request, Shared};

/// A thread that accepts connections. It ends after those of its connections.
pub struct Acceptor {
    /// The listener itself: shut down, it refuses at once, also where a program that another thread starts just then
    /// holds a copy of it.
    socket: TcpStream,
    thread: JoinHandle<()>,
}

impl Acceptor {
    pub fn stop(self) {
        let _ = self.socket.shutdown(Shutdown::Both);
        let _ = self.thread.join();
    }
}

pub fn accept(shared: Arc<Shared>, listener: TcpListener) -> Acceptor {
    let socket = TcpStream::from(OwnedFd::from(listener.try_clone().unwrap()));
    let thread = thread::spawn(move || {
        let mut running: Vec<JoinHandle<()>> = Vec::new();
        while let Ok((stream, _)) = listener.accept() {
            running.retain(|thread| !thread.is_finished());
            let mut state = shared.lock();
            if state.stopped {
                break;
            }
            state.seen.connections += 1;
            let number = state.seen.connections;
            let Ok(copy) = stream.try_clone() else {
                continue;
            };
            state.open.insert(number, copy);
            drop(state);
            shared.changed.notify_all();
            let shared = Arc::clone(&shared);
            running.push(thread::spawn(move || {
                let _ = serve(&shared, &stream, number);
                let _ = stream.shutdown(Shutdown::Both);
                shared.lock().open.remove(&number);
            }));
        }
        drop(listener);
        for thread in running {
            let _ = thread.join();
        }
    });
    Acceptor { socket, thread }
}

/// One connection, until either side closes it.
fn serve(shared: &Shared, stream: &TcpStream, number: usize) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let (config, fault) = {
        let mut state = shared.lock();
        let (times, fault) = state.connection_faults;
        state.connection_faults.0 = times.saturating_sub(usize::from(times != usize::MAX));
        (Arc::clone(&state.config), (times > 0).then_some(fault))
    };
    match fault {
        Some(ConnectionFault::Hang) => return read_to_end(stream),
        Some(ConnectionFault::Close) => return { stream }.read(&mut [0; 1]).map(drop),
        None => {}
    }
    shared.round_trip(); // TCP
    let mut tls = handshake(shared, stream, config)?;
    stream.set_read_timeout(Some(shared.lock().idle_limit))?;
    let mut input = Vec::new();
    // An idle connection ends the loop with an error: the read timed out.
    while let Ok(Some(request)) = read_request(&mut tls, &mut input) {
        let reply = shared.call(request.call(number));
        shared.round_trip();
        if !write_reply(shared, &mut tls, reply)? {
            return Ok(());
        }
    }
    tls.conn.send_close_notify();
    tls.flush()
}

fn read_to_end(mut stream: &TcpStream) -> io::Result<()> {
    while stream.read(&mut [0; 4096])? > 0 {}
    Ok(())
}

type Tls<'a> = StreamOwned<ServerConnection, &'a TcpStream>;

/// The TLS handshake, with a round trip before each flight of ours (one in TLS 1.3, two in TLS 1.2).
fn handshake<'a>(
    shared: &Shared,
    mut stream: &'a TcpStream,
    config: Arc<ServerConfig>,
) -> io::Result<Tls<'a>> {
    let mut tls = ServerConnection::new(config).map_err(io::Error::other)?;
    while tls.is_handshaking() {
        if tls.read_tls(&mut stream)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if let Err(error) = tls.process_new_packets() {
            let _ = tls.write_tls(&mut stream);
            return Err(io::Error::other(error));
        }
        if tls.wants_write()
            && (tls.is_handshaking() || tls.protocol_version() == Some(ProtocolVersion::TLSv1_2))
        {
            shared.round_trip();
        }
        while tls.wants_write() {
            tls.write_tls(&mut stream)?;
        }
    }
    Ok(StreamOwned::new(tls, stream))
}

/// One HTTP request.
struct HttpRequest {
    head: String,
    target: String,
    body: Vec<u8>,
}

impl HttpRequest {
    fn call(&self, connection: usize) -> Request {
        let (path, query) = self.target.split_once('?').unwrap_or((&self.target, ""));
        let (token, method) = path
            .strip_prefix("/bot")
            .and_then(|rest| rest.split_once('/'))
            .unwrap_or_default();
        Request {
            method: method.to_string(),
            token: token.to_string(),
            parameters: parameters(query, &self.body),
            connection,
            head: self.head.clone(),
        }
    }
}

/// Reads the next request. `input` holds what was read beyond the one before.
fn read_request(tls: &mut Tls<'_>, input: &mut Vec<u8>) -> io::Result<Option<HttpRequest>> {
    let Some(head_end) = read_until(tls, input, |input| find(input, b"\r\n\r\n"))? else {
        return Ok(None);
    };
    let head = String::from_utf8_lossy(&input[..head_end]).into_owned();
    input.drain(..head_end + 4);
    let header = |name: &str| {
        let mut lines = head.lines().skip(1).filter_map(|line| line.split_once(':'));
        lines
            .find(|(key, _)| key.trim().eq_ignore_ascii_case(name))
            .map(|(_, value)| value.trim().to_string())
    };
    let chunked = header("transfer-encoding").is_some_and(|it| it.eq_ignore_ascii_case("chunked"));
    let length = header("content-length").and_then(|value| value.parse().ok());
    let body = if chunked {
        read_chunks(tls, input)?
    } else {
        read_bytes(tls, input, length.unwrap_or(0))?
    };
    let target = head.split_whitespace().nth(1).unwrap_or_default();
    Ok(body.map(|body| HttpRequest {
        target: target.to_string(),
        head: head.clone(),
        body,
    }))
}

fn read_bytes(
    tls: &mut Tls<'_>,
    input: &mut Vec<u8>,
    length: usize,
) -> io::Result<Option<Vec<u8>>> {
    let there = read_until(tls, input, |input| (input.len() >= length).then_some(0))?;
    Ok(there.map(|_| input.drain(..length).collect()))
}

fn read_chunks(tls: &mut Tls<'_>, input: &mut Vec<u8>) -> io::Result<Option<Vec<u8>>> {
    let mut body = Vec::new();
    loop {
        let Some(end) = read_until(tls, input, |input| find(input, b"\r\n"))? else {
            return Ok(None);
        };
        let digits = String::from_utf8_lossy(&input[..end]).into_owned();
        let length = usize::from_str_radix(&digits, 16).unwrap_or(0);
        input.drain(..end + 2);
        let Some(chunk) = read_bytes(tls, input, length + 2)? else {
            return Ok(None);
        };
        body.extend_from_slice(&chunk[..length]);
        if length == 0 {
            return Ok(Some(body));
        }
    }
}

fn find(input: &[u8], what: &[u8]) -> Option<usize> {
    input.windows(what.len()).position(|window| window == what)
}

/// Reads until `done` finds something in the input; none if the connection ends before.
fn read_until(
    tls: &mut Tls<'_>,
    input: &mut Vec<u8>,
    done: impl Fn(&[u8]) -> Option<usize>,
) -> io::Result<Option<usize>> {
    let mut buffer = [0; 4096];
    loop {
        if let Some(found) = done(input) {
            return Ok(Some(found));
        }
        match tls.read(&mut buffer)? {
            0 => return Ok(None),
            length => input.extend_from_slice(&buffer[..length]),
        }
    }
}

/// Parameters from the query and from the body, JSON or form.
fn parameters(query: &str, body: &[u8]) -> Option<Map<String, Value>> {
    let mut parameters = form(query);
    match body.trim_ascii().first() {
        None => {}
        Some(b'{') => parameters.extend(serde_json::from_slice::<Map<String, Value>>(body).ok()?),
        Some(_) => parameters.extend(form(&String::from_utf8_lossy(body))),
    }
    Some(parameters)
}

fn form(text: &str) -> Map<String, Value> {
    let pairs = text.split('&').filter_map(|pair| pair.split_once('='));
    pairs
        .map(|(key, value)| (percent_decoded(key), Value::String(percent_decoded(value))))
        .collect()
}

fn percent_decoded(text: &str) -> String {
    let (mut bytes, mut rest) = (Vec::new(), text.as_bytes());
    while let [first, tail @ ..] = rest {
        let escaped = (*first == b'%').then(|| tail.get(..2)).flatten();
        let escaped = escaped
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok());
        bytes.push(escaped.unwrap_or(if *first == b'+' { b' ' } else { *first }));
        rest = if escaped.is_some() { &tail[2..] } else { tail };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// False if the connection ends with it.
fn write_reply(shared: &Shared, tls: &mut Tls<'_>, reply: Reply) -> io::Result<bool> {
    let Reply { answer, fault } = reply;
    let response = http(answer.status, "application/json", &answer.body);
    match fault {
        Some(Fault::Hang) => {
            tls.sock.set_read_timeout(None)?;
            read_to_end(tls.sock)?;
            return Ok(false);
        }
        Some(Fault::CloseUnanswered) => return Ok(false),
        Some(Fault::Bytes(bytes)) => {
            tls.write_all(&bytes)?;
            tls.flush()?;
            return Ok(false);
        }
        Some(Fault::Page(status)) => {
            tls.write_all(http(status, "text/html", &answer.body).as_bytes())?;
        }
        Some(Fault::Giant(length)) => {
            tls.write_all(http(200, "application/json", &"x".repeat(length)).as_bytes())?;
        }
        Some(Fault::Trickle(pause)) => {
            for byte in response.as_bytes() {
                tls.write_all(&[*byte])?;
                tls.flush()?;
                shared.pause(pause);
            }
        }
        Some(Fault::Replaced(from, to)) => {
            let body = answer.body.replace(from, to);
            tls.write_all(http(answer.status, "application/json", &body).as_bytes())?;
        }
        Some(Fault::Late(time)) => {
            shared.pause(time);
            tls.write_all(response.as_bytes())?;
        }
        _ => tls.write_all(response.as_bytes())?,
    }
    tls.flush()?;
    if matches!(fault, Some(Fault::CloseAnswered)) {
        tls.conn.send_close_notify();
        tls.flush()?;
        return Ok(false);
    }
    Ok(true)
}

fn http(status: u16, content_type: &str, body: &str) -> String {
    let reason = match status {
        200 => "OK",
        302 => "Found\r\nLocation: http://portal.example/login",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        409 => "Conflict",
        429 => "Too Many Requests",
        500 => "Internal Server Error",
        502 => "Bad Gateway",
        _ => "Status",
    };
    format!(
        "HTTP/1.1 {status} {reason}\r\nServer: nginx/1.18.0\r\nContent-Type: {content_type}\r\n\
         Content-Length: {}\r\nConnection: keep-alive\r\n\r\n{body}",
        body.len()
    )
}
