//! A CONNECT proxy that leads one host name to the stand-in: the firmware names `https://api.telegram.org/bot`, and no
//! test talks to that host.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// The running proxy. Its threads end with the connections that it leads; its listener ends with the value.
pub struct Proxy {
    address: SocketAddr,
    heads: Arc<Mutex<Vec<String>>>,
    stop: Arc<Mutex<bool>>,
}

impl Proxy {
    /// Leads `host:port` to `target` and refuses everything else.
    pub fn start(authority: &str, target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let heads = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(Mutex::new(false));
        let (log, stopped, authority) =
            (Arc::clone(&heads), Arc::clone(&stop), authority.to_string());
        thread::spawn(move || {
            while let Ok((client, _)) = listener.accept() {
                if *stopped.lock().unwrap() {
                    break;
                }
                let (log, authority) = (Arc::clone(&log), authority.clone());
                thread::spawn(move || lead(client, &authority, target, &log));
            }
        });
        Self {
            address,
            heads,
            stop,
        }
    }

    /// For `HTTPS_PROXY`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Every request, with its headers.
    pub fn heads(&self) -> Vec<String> {
        self.heads.lock().unwrap().clone()
    }

    /// Every `host:port` that was asked for.
    pub fn asked(&self) -> Vec<String> {
        let heads = self.heads();
        let targets = heads.iter().map(|head| head.split_whitespace().nth(1));
        targets
            .map(|target| target.unwrap_or_default().to_string())
            .collect()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        *self.stop.lock().unwrap() = true;
        let _ = TcpStream::connect(self.address);
    }
}

fn lead(
    mut client: TcpStream,
    authority: &str,
    target: SocketAddr,
    log: &Mutex<Vec<String>>,
) -> io::Result<()> {
    client.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        client.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    client.set_read_timeout(None)?;
    let head = String::from_utf8_lossy(&head).into_owned();
    let asked = head
        .split_whitespace()
        .nth(1)
        .unwrap_or_default()
        .to_string();
    let allowed = head.starts_with("CONNECT ") && asked == authority;
    log.lock().unwrap().push(head);
    if !allowed {
        return client.write_all(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n");
    }
    let server = TcpStream::connect(target)?;
    client.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n")?;
    let (mut from_client, mut to_server) = (client.try_clone()?, server.try_clone()?);
    thread::spawn(move || copy(&mut from_client, &mut to_server));
    copy(&mut { server }, &mut client);
    Ok(())
}

fn copy(from: &mut TcpStream, to: &mut TcpStream) {
    let _ = to.set_nodelay(true); // else each answer is 40 ms late
    let _ = io::copy(from, to);
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}
