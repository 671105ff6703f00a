//! The line between a gateway and Telegram: as slow as one likes, and with a router on it that forgets connections.
//! (How far Telegram is away, the stand-in emulates itself: `BotApi::set_round_trip`.)

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// What TCP puts into one packet.
const PACKET: usize = 1400;
/// What is read within this time was there already.
const AT_ONCE: Duration = Duration::from_millis(20);

/// The running line. Its threads end with the connections that it leads; its listener ends with the value.
pub struct Line {
    address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    bytes_per_second: usize,
    /// Until when each direction is busy. All connections share them.
    up: Mutex<Instant>,
    down: Mutex<Instant>,
    downloaded: AtomicUsize,
    connections: AtomicUsize,
    /// Connections up to this number are forgotten.
    forgotten: AtomicUsize,
    stopped: AtomicBool,
}

impl Line {
    /// Leads to `target`, with so many bytes per second in each direction.
    pub fn start(target: SocketAddr, bytes_per_second: usize) -> Self {
        let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
        Self::start_at(any_port, target, bytes_per_second)
    }

    pub fn start_at(listen: SocketAddr, target: SocketAddr, bytes_per_second: usize) -> Self {
        let listener = TcpListener::bind(listen).unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            bytes_per_second,
            up: Mutex::new(Instant::now()),
            down: Mutex::new(Instant::now()),
            downloaded: AtomicUsize::new(0),
            connections: AtomicUsize::new(0),
            forgotten: AtomicUsize::new(0),
            stopped: AtomicBool::new(false),
        });
        let own = Arc::clone(&shared);
        thread::spawn(move || {
            while let Ok((client, _)) = listener.accept() {
                if own.stopped.load(Relaxed) {
                    break;
                }
                let shared = Arc::clone(&own);
                thread::spawn(move || lead(&shared, client, target));
            }
        });
        Self { address, shared }
    }

    /// The base url that a gateway is configured with, to reach the stand-in by this line.
    pub fn url(&self) -> String {
        format!("https://localhost:{}/bot", self.address.port())
    }

    /// The connections that are there go dead without a word to either side; new ones work.
    pub fn forget_connections(&self) {
        let all = self.shared.connections.load(Relaxed);
        self.shared.forgotten.store(all, Relaxed);
    }

    /// Connections that were opened since the start.
    pub fn connections(&self) -> usize {
        self.shared.connections.load(Relaxed)
    }

    /// Bytes that came from Telegram.
    pub fn downloaded(&self) -> usize {
        self.shared.downloaded.load(Relaxed)
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Relaxed);
        let _ = TcpStream::connect(self.address);
    }
}

impl Shared {
    /// Waits until so many bytes have gone over a direction. Those that have waited for the line follow those before,
    /// however late this thread woke up, or the line would be slower on a busy machine.
    fn transmit(&self, direction: &Mutex<Instant>, length: usize, have_waited: bool) {
        let time = Duration::from_secs_f64(length as f64 / self.bytes_per_second as f64);
        let mut busy_until = direction.lock().unwrap();
        if !have_waited {
            *busy_until = (*busy_until).max(Instant::now());
        }
        *busy_until += time;
        let done = *busy_until;
        drop(busy_until);
        thread::sleep(done.saturating_duration_since(Instant::now()));
    }
}

fn lead(shared: &Arc<Shared>, client: TcpStream, target: SocketAddr) {
    let number = shared.connections.fetch_add(1, Relaxed) + 1;
    let Ok(server) = TcpStream::connect(target) else {
        return;
    };
    let (from_client, to_server) = (client.try_clone().unwrap(), server.try_clone().unwrap());
    let up = Arc::clone(shared);
    thread::spawn(move || copy(from_client, to_server, number, &up, &up.up, None));
    let count = Some(&shared.downloaded);
    copy(server, client, number, shared, &shared.down, count);
}

fn copy(
    mut from: TcpStream,
    mut to: TcpStream,
    number: usize,
    shared: &Shared,
    direction: &Mutex<Instant>,
    count: Option<&AtomicUsize>,
) {
    let _ = to.set_nodelay(true);
    let mut buffer = [0; PACKET];
    let is_forgotten = || number <= shared.forgotten.load(Relaxed);
    loop {
        let start = Instant::now();
        let length = from.read(&mut buffer).unwrap_or(0);
        let have_waited = start.elapsed() < AT_ONCE;
        if is_forgotten() {
            if length == 0 {
                return; // not a word to the other side
            }
            continue;
        }
        shared.transmit(direction, length, have_waited);
        if let Some(count) = count {
            count.fetch_add(length, Relaxed);
        }
        if length == 0 || to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}
